//! Writes files in the format of `torch.save`: a zip archive of stored entries, whose value is dictionaries of tensors.
//!
//! ```text
//! archive/data/KEY ..   archive/data.pkl   archive/byteorder   archive/version
//! ```
//!
//! Storages are written as they come, one tensor in memory at a time; the pickle (protocol 2) follows. Its only calls are
//! `torch._utils._rebuild_tensor_v2` and `collections.OrderedDict`, which `torch.load` allows with `weights_only` too.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use zip::CompressionMethod;
use zip::result::ZipError;
use zip::write::{SimpleFileOptions, ZipWriter};

/// Storages begin at multiples of this, so that torch can map them.
const ALIGNMENT: u16 = 64;
/// Bytes from which an entry needs a large header.
const LARGE: u64 = u32::MAX as u64;
/// Bytes converted at a time.
const PIECE: usize = 1 << 16;

/// A file being written; its value is a dictionary.
pub struct TorchWriter {
    zip: ZipWriter<Sink<BufWriter<File>>>,
    /// The pickle so far.
    pickle: Vec<u8>,
    /// Key, class and shape of each storage, by the name of its tensor.
    storages: HashMap<String, Storage>,
}

/// A file that accepts and discards everything after its first error. When an archive is dropped, the zip library tries to
/// finish it, seeks in it, and prints its errors.
struct Sink<W> {
    file: W,
    has_failed: bool,
    /// Where the next byte goes, or would go.
    position: u64,
    /// How long the file is, or would be.
    length: u64,
}

impl<W: Write + Seek> Sink<W> {
    fn new(file: W) -> Self {
        Self {
            file,
            has_failed: false,
            position: 0,
            length: 0,
        }
    }

    /// Performs an operation, or nothing after an error.
    fn unless_failed<T>(
        &mut self,
        nothing: T,
        act: impl FnOnce(&mut W) -> io::Result<T>,
    ) -> io::Result<T> {
        if self.has_failed {
            return Ok(nothing);
        }
        act(&mut self.file).inspect_err(|_| self.has_failed = true)
    }
}

impl<W: Write + Seek> Write for Sink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.unless_failed(bytes.len(), |file| file.write(bytes))?;
        self.position += written as u64;
        self.length = self.length.max(self.position);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unless_failed((), W::flush)
    }
}

impl<W: Write + Seek> Seek for Sink<W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => place,
            SeekFrom::Current(step) => self.position.saturating_add_signed(step),
            SeekFrom::End(step) => self.length.saturating_add_signed(step),
        };
        self.position = self.unless_failed(place, |file| file.seek(to))?;
        Ok(self.position)
    }
}

#[derive(Clone)]
struct Storage {
    key: String,
    class: &'static str,
    shape: Vec<usize>,
}

impl TorchWriter {
    /// Begins an empty file.
    pub fn new(file: File) -> Self {
        Self {
            zip: ZipWriter::new(Sink::new(BufWriter::new(file))),
            pickle: b"\x80\x02}(".to_vec(),
            storages: HashMap::new(),
        }
    }

    /// Begins a dictionary under a name.
    pub fn open(&mut self, name: &str) {
        self.text(name);
        self.pickle.extend(b"}(");
    }

    /// Ends the dictionary begun last.
    pub fn close(&mut self) {
        self.pickle.push(b'u');
    }

    /// Adds a whole number under a name.
    pub fn integer(&mut self, name: &str, value: i32) {
        self.text(name);
        self.number(i64::from(value));
    }

    /// Adds a tensor of f32, last dimension fastest.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn floats(&mut self, name: &str, shape: &[usize], data: &[f32]) -> std::io::Result<()> {
        self.tensor(name, "FloatStorage", shape, data, f32::to_le_bytes)
    }

    /// Adds a tensor of i64, last dimension fastest.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn longs(&mut self, name: &str, shape: &[usize], data: &[i64]) -> std::io::Result<()> {
        self.tensor(name, "LongStorage", shape, data, i64::to_le_bytes)
    }

    /// Adds the tensor last written under this name to the open dictionary; its elements are stored once.
    pub fn again(&mut self, name: &str) {
        if let Some(storage) = self.storages.get(name).cloned() {
            self.entry(name, &storage);
        }
    }

    /// Ends the file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> std::io::Result<()> {
        self.pickle.extend(b"u.");
        let pickle = std::mem::take(&mut self.pickle);
        for (name, bytes) in [
            ("data.pkl", pickle.as_slice()),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ] {
            self.begin(name, bytes.len() as u64)?;
            self.zip.write_all(bytes)?;
        }
        let mut sink = self.zip.finish().map_err(plain)?;
        sink.flush()?;
        sink.file.get_ref().sync_all()
    }

    fn tensor<T: Copy, const N: usize>(
        &mut self,
        name: &str,
        class: &'static str,
        shape: &[usize],
        data: &[T],
        bytes: fn(T) -> [u8; N],
    ) -> std::io::Result<()> {
        let storage = Storage {
            key: self.storages.len().to_string(),
            class,
            shape: shape.to_vec(),
        };
        self.begin(&format!("data/{}", storage.key), (data.len() * N) as u64)?;
        for piece in data.chunks(PIECE / N) {
            let piece: Vec<u8> = piece.iter().flat_map(|&x| bytes(x)).collect();
            self.zip.write_all(&piece)?;
        }
        self.entry(name, &storage);
        self.storages.insert(name.to_owned(), storage);
        Ok(())
    }

    /// `_rebuild_tensor_v2(storage, 0, sizes, strides, False, OrderedDict())` under a name.
    fn entry(&mut self, name: &str, storage: &Storage) {
        self.text(name);
        self.pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage");
        self.pickle.extend(b"ctorch\n");
        self.pickle.extend(storage.class.as_bytes());
        self.pickle.push(b'\n');
        self.text(&storage.key);
        self.text("cpu");
        self.number(storage.shape.iter().product::<usize>() as i64);
        self.pickle.extend(b"tQ");
        self.number(0);
        let shape = &storage.shape;
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product());
        for sizes in [shape.clone(), strides.collect()] {
            self.pickle.push(b'(');
            sizes.iter().for_each(|&n: &usize| self.number(n as i64));
            self.pickle.push(b't');
        }
        self.pickle.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }

    fn begin(&mut self, name: &str, bytes: u64) -> std::io::Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default())
            .with_alignment(ALIGNMENT)
            .large_file(bytes >= LARGE);
        let started = self.zip.start_file(format!("archive/{name}"), options);
        started.map_err(plain)
    }

    fn text(&mut self, text: &str) {
        self.pickle.push(b'X');
        self.pickle.extend((text.len() as u32).to_le_bytes());
        self.pickle.extend(text.as_bytes());
    }

    fn number(&mut self, n: i64) {
        match i32::try_from(n) {
            Ok(n) => {
                self.pickle.push(b'J');
                self.pickle.extend(n.to_le_bytes());
            }
            Err(_) => {
                self.pickle.extend(b"\x8a\x08");
                self.pickle.extend(n.to_le_bytes());
            }
        }
    }
}

fn plain(error: ZipError) -> std::io::Error {
    match error {
        ZipError::Io(error) => error,
        other => std::io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checkpoint, Container};

    /// A disk with room for so many bytes.
    struct Disk {
        file: io::Cursor<Vec<u8>>,
        room: usize,
        refused: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.file.get_ref().len() + bytes.len() > self.room {
                self.refused += 1;
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.file.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Disk {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.file.seek(to)
        }
    }

    #[test]
    fn a_full_disk_is_told_once() {
        let mut sink = Sink::new(Disk {
            file: io::Cursor::default(),
            room: 100,
            refused: 0,
        });
        assert_eq!(sink.write(&[7; 60]).unwrap(), 60);
        let error = sink.write(&[7; 60]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        // As the library does when an archive is dropped.
        sink.seek(SeekFrom::Start(0)).unwrap();
        sink.write_all(&[7; 1000]).unwrap();
        sink.flush().unwrap();
        assert_eq!((sink.file.refused, sink.file.file.get_ref().len()), (1, 60));
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("student.pt");
        let mut writer = TorchWriter::new(File::create(&path).expect("a file"));
        let weights: Vec<f32> = (0..6).map(|i| i as f32 * 0.5).collect();
        writer.open("ema");
        writer.floats("w", &[2, 3], &weights).expect("a tensor");
        writer.floats("scalar", &[], &[7.0]).expect("a tensor");
        writer
            .longs("lvl_1L", &[1, 3], &[0, 1, -2])
            .expect("a tensor");
        writer.close();
        writer.open("model");
        writer.again("w");
        writer.close();
        writer.integer("steps", -5);
        writer.finish().expect("a file");

        let found = Checkpoint::open(&path).expect("a checkpoint");
        assert_eq!(found.container(), Container::TorchZip);
        assert!(found.strangers().is_empty(), "{:?}", found.strangers());
        let ema = found.select(Some("ema")).expect("weights").clone();
        for dictionary in [&ema, found.select(Some("model")).expect("weights")] {
            let w = dictionary.get("w").expect("a tensor");
            assert_eq!(w.shape, [2, 3]);
            assert_eq!(found.floats(w).expect("floats"), weights);
        }
        let scalar = ema.get("scalar").expect("a tensor");
        assert_eq!(
            (&scalar.shape[..], found.floats(scalar).expect("a float")),
            (&[][..], vec![7.0])
        );
        assert_eq!(
            ema.get("lvl_1L").expect("a tensor").dtype,
            crate::Dtype::I64
        );
        // Each storage is stored once, at a position that torch can map.
        let bytes = std::fs::read(&path).expect("a file");
        let marks = weights
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect::<Vec<u8>>();
        let places: Vec<usize> = bytes
            .windows(24)
            .enumerate()
            .filter(|(_, w)| *w == marks)
            .map(|(at, _)| at)
            .collect();
        assert!(
            places.len() == 1 && places[0].is_multiple_of(64),
            "{places:?}"
        );
    }
}
