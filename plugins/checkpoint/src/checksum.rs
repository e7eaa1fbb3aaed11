//! Checks the entries of a zip archive against their CRC-32.
//!
//! The directory of a zip archive holds the CRC-32 of each entry. NumPy checks it; torch does not, and can be told to write 0
//! instead to save time. Here both kinds of archive are checked, so that a corrupted byte is an error instead of a wrong
//! number.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use crc32fast::Hasher;

use crate::archive::Entry;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::tensor::Tensor;

/// Bytes read at a time when they are only checked.
const CHUNK: u64 = 1 << 20;
/// The largest entry that is checked as a whole when only a part of it is read.
const FOR_A_PART: u64 = 1 << 30;

impl Entry {
    /// Whether torch has written a checksum.
    pub(crate) fn has_sum(&self) -> bool {
        self.sum != 0
    }

    /// Fails if a checksum is not the entry's.
    fn expect(&self, found: u32) -> Result<()> {
        if found == self.sum {
            return Ok(());
        }
        Err(Error::format(format!(
            "the entry {} of the zip archive is damaged: its bytes have the CRC-32 {found:08x}, expected {:08x}; get the file \
             again",
            self.name, self.sum
        )))
    }

    /// Checks all bytes of the entry.
    pub(crate) fn check(&self, bytes: &[u8]) -> Result<()> {
        self.expect(crc32fast::hash(bytes))
    }

    /// Checks the entry's bytes while they are read from `unpacked`: reading the last byte fails if the checksum does not
    /// match. Nothing beyond the entry's size is read.
    pub fn checked<R: Read>(&self, unpacked: R) -> ChecksumReader<R> {
        ChecksumReader {
            unpacked,
            left: self.size,
            found: Hasher::new(),
            entry: self.clone(),
        }
    }
}

/// A reader of an entry's bytes that checks them.
pub struct ChecksumReader<R> {
    unpacked: R,
    left: u64,
    found: Hasher,
    entry: Entry,
}

impl<R: Read> Read for ChecksumReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.left.min(buffer.len() as u64) as usize;
        if most == 0 {
            return Ok(0);
        }
        let n = self.unpacked.read(&mut buffer[..most])?;
        self.found.update(&buffer[..n]);
        self.left -= n as u64;
        if self.left == 0 {
            let found = std::mem::take(&mut self.found).finalize();
            let wrong =
                |error: Error| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
            self.entry.expect(found).map_err(wrong)?;
        }
        Ok(n)
    }
}

/// The entries of a file that are read in place and have a checksum, sorted by position.
#[derive(Default)]
pub(crate) struct Checksums {
    entries: Vec<StoredEntry>,
    /// The file's name, where it is one of several.
    file: Option<String>,
}

/// An entry that is read in place.
struct StoredEntry {
    start: u64,
    entry: Entry,
    /// Whether it has already been checked.
    is_checked: AtomicBool,
}

impl Checksums {
    /// The entries of an archive of torch, each with its position.
    pub fn of_torch(entries: impl Iterator<Item = (u64, Entry)>) -> Self {
        let mut entries: Vec<StoredEntry> = entries
            .filter(|(_, entry)| entry.has_sum() && entry.size > 0)
            .map(|(start, entry)| StoredEntry {
                start,
                entry,
                is_checked: AtomicBool::new(false),
            })
            .collect();
        entries.sort_by_key(|stored| stored.start);
        Self {
            entries,
            file: None,
        }
    }

    /// The same, of one file of several.
    pub fn of_file(self, file: &str) -> Self {
        Self {
            file: Some(file.to_owned()),
            ..self
        }
    }

    /// Passes on the elements of a tensor like [`Tensor::visit`], and checks them. A tensor that is a whole entry is checked
    /// at its end: after an error none of its elements are valid. If it is part of an entry, or its elements are in another
    /// order, the whole entry is checked first, once, unless it is very large.
    pub fn visit(
        &self,
        source: &Source,
        tensor: &Tensor,
        mut each: impl FnMut(&[u8]),
    ) -> Result<()> {
        let Some(stored) = self.around(tensor) else {
            return tensor.visit(source, each);
        };
        let whole = (stored.start, stored.entry.size);
        let checked = if tensor.run() == Some(whole) {
            let mut found = Hasher::new();
            tensor.visit(source, |bytes| {
                found.update(bytes);
                each(bytes);
            })?;
            stored.entry.expect(found.finalize())
        } else {
            let checked = stored.check(source);
            match checked {
                Ok(()) => return tensor.visit(source, each),
                error => error,
            }
        };
        checked.map_err(|error| match &self.file {
            Some(file) => error.of(file),
            None => error,
        })
    }

    /// The entry in which a non-empty tensor begins.
    fn around(&self, tensor: &Tensor) -> Option<&StoredEntry> {
        let start = tensor.begins()?;
        let after = self.entries.partition_point(|stored| stored.start <= start);
        let stored = &self.entries[after.checked_sub(1)?];
        (start - stored.start < stored.entry.size).then_some(stored)
    }
}

impl StoredEntry {
    /// Checks it, unless that has been done or would take long.
    fn check(&self, source: &Source) -> Result<()> {
        let size = self.entry.size;
        if size > FOR_A_PART || self.is_checked.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut found = Hasher::new();
        let mut buffer = vec![0; CHUNK.min(size) as usize];
        let mut done = 0;
        while done < size {
            let n = (size - done).min(CHUNK) as usize;
            source.read_at(self.start + done, &mut buffer[..n])?;
            found.update(&buffer[..n]);
            done += n as u64;
        }
        self.entry.expect(found.finalize())?;
        self.is_checked.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::Checkpoint;
    use crate::archive::Archive;

    /// An archive with an entry of these bytes.
    fn archive(bytes: &[u8]) -> Vec<u8> {
        let mut zip = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        zip.start_file("a", options).unwrap();
        zip.write_all(bytes).unwrap();
        zip.finish().unwrap().into_inner()
    }

    fn place(file: &[u8], what: &[u8]) -> usize {
        let found = file.windows(what.len()).position(|own| own == what);
        found.expect("it is there")
    }

    #[test]
    fn the_last_bytes_of_a_damaged_entry_do_not_come() {
        let mut file = archive(b"123456789");
        let read = |file: &[u8], pieces: usize| {
            let archive = Archive::read(Source::Memory(file.into())).unwrap();
            let entry = archive.entry("a").unwrap();
            // More bytes than the entry has, as a deflated stream may yield.
            let packed = archive.packed(entry).unwrap().chain(&b"more"[..]);
            let mut checked = entry.checked(packed);
            let mut all: Vec<u8> = Vec::new();
            let mut piece = vec![0; pieces];
            loop {
                match checked.read(&mut piece) {
                    Ok(0) => return Ok(all),
                    Ok(n) => all.extend(&piece[..n]),
                    Err(error) => return Err((all.len(), error.to_string())),
                }
            }
        };
        for pieces in [1, 3, 4, 100] {
            assert_eq!(read(&file, pieces).unwrap(), b"123456789");
        }
        let at = place(&file, b"123456789");
        file[at + 1] ^= 1;
        for (pieces, came) in [(1, 8), (4, 8), (100, 0)] {
            let (found, error) = read(&file, pieces).unwrap_err();
            assert_eq!(found, came);
            // The check value of CRC-32.
            assert!(
                error.ends_with(", expected cbf43926; get the file again"),
                "{error}"
            );
        }
    }

    /// A file of torch with a 2 x 3 tensor `w`, and where its elements begin.
    fn torch(dir: &std::path::Path) -> (std::path::PathBuf, Vec<u8>, usize) {
        let path = dir.join("w.pth");
        let mut writer = crate::writer::TorchWriter::new(std::fs::File::create(&path).unwrap());
        let data = [1.5f32, -2.0, 3.25, 4.0, 5.0, 6.0];
        writer.floats("w", &[2, 3], &data).unwrap();
        writer.finish().unwrap();
        let file = std::fs::read(&path).unwrap();
        let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
        let at = place(&file, &bytes);
        (path, file, at)
    }

    #[test]
    fn a_damaged_storage_is_refused_whole_and_in_parts() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut file, at) = torch(dir.path());
        let read = |file: &[u8]| {
            let opened = Checkpoint::from_bytes(file.to_vec()).unwrap();
            let tensor = opened.select(None).unwrap().get("w").unwrap();
            let part = tensor.rows(1, 1).unwrap();
            let [whole, part] = [tensor, &part].map(|tensor| opened.floats(tensor));
            (
                whole.map_err(|e| e.to_string()),
                part.map_err(|e| e.to_string()),
            )
        };
        let (whole, part) = read(&file);
        assert_eq!(whole.unwrap(), [1.5, -2.0, 3.25, 4.0, 5.0, 6.0]);
        assert_eq!(part.unwrap(), [4.0, 5.0, 6.0]);
        file[at + 2] ^= 1;
        let (whole, part) = read(&file);
        for said in [whole.unwrap_err(), part.unwrap_err()] {
            assert!(
                said.starts_with("the entry archive/data/0 of the zip archive is damaged"),
                "{said}"
            );
        }
        // torch may omit checksums, in the directory and in the headers.
        let sum = place(&file, b"PK\x01\x02") + 16;
        file[sum..sum + 4].fill(0);
        let (whole, part) = read(&file);
        assert_eq!(whole.unwrap()[1..], [-2.0, 3.25, 4.0, 5.0, 6.0]);
        part.unwrap();
    }

    #[test]
    fn a_damaged_pickle_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut file, _) = torch(dir.path());
        // Strides of 1 and 1 instead of 3 and 1.
        let strides = place(&file, b"J\x03\0\0\0J\x01\0\0\0");
        file[strides + 1] = 1;
        let said = Checkpoint::from_bytes(file).map(drop).unwrap_err();
        let said = said.to_string();
        assert!(said.contains("the entry archive/data.pkl"), "{said}");
    }

    #[test]
    fn a_damaged_file_of_several_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (path, mut file, at) = torch(dir.path());
        file[at] ^= 1;
        std::fs::write(path, file).unwrap();
        let index = dir.path().join("pytorch_model.bin.index.json");
        std::fs::write(&index, r#"{"weight_map": {"w": "w.pth"}}"#).unwrap();
        let opened = Checkpoint::open(&index).unwrap();
        let tensor = opened.select(None).unwrap().get("w").unwrap();
        let said = opened.floats(tensor).unwrap_err().to_string();
        assert!(
            said.starts_with("w.pth: the entry archive/data/0"),
            "{said}"
        );
    }
}
