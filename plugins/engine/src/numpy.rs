//! NumPy's files: arrays (`.npy`, format version 1 to 3) and archives of them (`.npz`).
//!
//! In: arrays of floats, integers or truth values, of either order and byte order. Out: f64 in C order; bytes and f64 are
//! written. A large array in C order can be read row by row. Deliberately absent: pickled objects, records, strings.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use retort_checkpoint::archive::{self, Packing};
use retort_checkpoint::regular;

use crate::error::{Error, Result};

mod form;

pub use form::Form;

/// An `.npz` archive open for reading.
pub struct Archive {
    zip: archive::Archive,
    path: PathBuf,
}

impl Archive {
    /// Opens an archive.
    pub fn open(path: &Path) -> Result<Self> {
        let zip = archive::Archive::open(path).map_err(|error| match error {
            retort_checkpoint::Error::Io(_) => Error::checkpoint(path)(error),
            _ => Error::data(path, format!("not a NumPy archive: {error}")),
        })?;
        let mut names: Vec<&str> = zip.entries().iter().map(|entry| &*entry.name).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|two| two[0] == two[1]) {
            let name: String = twice[0].chars().take(100).collect();
            return Err(Error::data(path, format!("{name:?} is in it twice")));
        }
        Ok(Self {
            zip,
            path: path.to_owned(),
        })
    }

    /// The elements of the array of a name, in C order, if there is one. If its shape differs, only its header is unpacked.
    pub fn array(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f64>>> {
        match self.unpacked(name, |file, size| read_array(file, shape, Some(size)))? {
            None => Ok(None),
            Some(Ok(data)) => Ok(Some(data)),
            Some(Err(found)) => Err(Error::data(&self.path, other_shape(name, &found, shape))),
        }
    }

    /// The shape of the array of a name, if there is one. Only its header is unpacked.
    pub fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        self.unpacked(name, |file, size| {
            let header = Header::read(file)?;
            header.check_size(size)?;
            Ok(header.shape)
        })
    }

    /// A reader of the array's file, and its size, if there is one of that name. Reading the last byte fails if the CRC-32
    /// does not match.
    fn unpacked<T>(
        &self,
        name: &str,
        read: impl FnOnce(&mut dyn Read, u64) -> Result<T, String>,
    ) -> Result<Option<T>> {
        let Some(entry) = self.zip.entry(&format!("{name}.npy")) else {
            return Ok(None);
        };
        let wrong = |message: String| Error::data(&self.path, format!("array {name}: {message}"));
        let packed = self.zip.packed(entry).map_err(|e| wrong(e.to_string()))?;
        // In large pieces: arrays have short headers and millions of elements.
        let packed = io::BufReader::with_capacity(1 << 16, packed);
        let found = match entry.packing {
            Packing::Stored => read(&mut entry.checked(packed), entry.size),
            Packing::Deflate => {
                let unpacked = flate2::bufread::DeflateDecoder::new(packed);
                read(&mut entry.checked(unpacked), entry.size)
            }
            Packing::Other => Err("encrypted, or not compressed by deflate".into()),
        };
        found.map(Some).map_err(wrong)
    }
}

impl Archive {
    /// Names of the arrays.
    pub fn names(&self) -> Vec<&str> {
        let entries = self.zip.entries().iter();
        entries
            .filter_map(|entry| entry.name.strip_suffix(".npy"))
            .collect()
    }

    /// An existing array, to be read sequentially. Reading the last element fails if the entry's CRC-32 does not match.
    pub fn stream(&self, name: &str) -> Result<Stream> {
        let wrong = |message: String| Error::data(&self.path, format!("array {name}: {message}"));
        let entry = self.zip.entry(&format!("{name}.npy"));
        let entry = entry.ok_or_else(|| wrong("it is not there".into()))?;
        let start = self.zip.start(entry).map_err(|e| wrong(e.to_string()))?;
        // A separate file handle, so that several arrays can be read side by side.
        let mut file = regular::open(&self.path).map_err(Error::io(&self.path))?;
        file.seek(SeekFrom::Start(start))
            .map_err(Error::io(&self.path))?;
        let file = BufReader::new(file.take(entry.packed));
        let reader: Box<dyn Read + Send> = match entry.packing {
            Packing::Stored => Box::new(entry.checked(file)),
            Packing::Deflate => Box::new(entry.checked(flate2::bufread::DeflateDecoder::new(file))),
            Packing::Other => {
                return Err(wrong("encrypted, or not compressed by deflate".into()));
            }
        };
        let stream = Stream::begin(reader).map_err(wrong)?;
        stream.header.check_size(entry.size).map_err(wrong)?;
        Ok(stream)
    }
}

/// An array that is read sequentially, a part at a time.
pub struct Stream {
    reader: Box<dyn Read + Send>,
    header: Header,
}

impl Stream {
    /// Opens a `.npy` file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = BufReader::new(regular::open(path).map_err(Error::io(path))?);
        Self::begin(Box::new(file)).map_err(|e| Error::data(path, e))
    }

    fn begin(mut reader: Box<dyn Read + Send>) -> Result<Self, String> {
        let header = Header::read(&mut reader)?;
        if header.fortran && header.shape.len() > 1 {
            return Err(
                "an array in Fortran order, expected C order (numpy.ascontiguousarray)".into(),
            );
        }
        Ok(Self { reader, header })
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.header.shape
    }

    /// Type of the elements, as in `f4`.
    pub fn kind(&self) -> &str {
        &self.header.kind
    }

    /// The next elements.
    pub fn read(&mut self, count: usize) -> Result<Vec<f64>, String> {
        let bytes = self.read_bytes(count * self.header.size)?;
        Ok(self.header.elements(&bytes))
    }

    /// The next bytes. Memory is allocated only as data arrives, not as the header claims.
    pub fn read_bytes(&mut self, count: usize) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let read = (&mut self.reader)
            .take(count as u64)
            .read_to_end(&mut bytes);
        read.map_err(|e| e.to_string())?;
        match bytes.len() == count {
            true => Ok(bytes),
            false => Err(format!(
                "it ends early: its shape is {:?}",
                self.header.shape
            )),
        }
    }
}

/// Writes an archive of f64 arrays, stored as `numpy.savez` does.
pub fn write_archive(path: &Path, arrays: &[(&str, &[usize], &[f64])]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut archive = zip::ZipWriter::new(BufWriter::new(File::create(path)?));
        for (name, shape, data) in arrays {
            archive.start_file(format!("{name}.npy"), stored(data.len() * 8))?;
            archive.write_all(&header("<f8", shape))?;
            for part in data.chunks(8192) {
                let bytes: Vec<u8> = part.iter().flat_map(|x| x.to_le_bytes()).collect();
                archive.write_all(&bytes)?;
            }
        }
        archive.finish()?.flush()
    };
    write().map_err(Error::io(path))
}

/// The options of an archive entry of this size.
pub fn stored(bytes: usize) -> zip::write::SimpleFileOptions {
    zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .large_file(bytes >= u32::MAX as usize)
}

/// Header of a `.npy` file, version 1.0, of elements of a type (`|u1`, `<f8`) in C order.
pub fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let sizes: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let sizes = match shape.len() {
        0 | 1 => sizes.trim_end(),
        _ => sizes.trim_end_matches(", "),
    };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({sizes}), }}");
    // Magic, version and length take 10 bytes; the data starts at a multiple of 64.
    let padded = (10 + text.len() + 1).next_multiple_of(64) - 10;
    while text.len() + 1 < padded {
        text.push(' ');
    }
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend_from_slice(&(padded as u16).to_le_bytes());
    header.extend_from_slice(text.as_bytes());
    header
}

/// Longest header that is read; NumPy writes some hundred bytes.
const HEADER_MOST: usize = 64 * 1024;
/// The most dimensions of an array, as in NumPy.
const DIMENSIONS: usize = 64;

/// The contents of a `.npy` header.
struct Header {
    /// As in `f4`.
    kind: String,
    /// Bytes of an element.
    size: usize,
    /// Whether the highest byte of an element comes first.
    turned: bool,
    /// Whether the first dimension is the fastest.
    fortran: bool,
    shape: Vec<usize>,
    /// Number of elements.
    count: usize,
    /// Bytes of the header itself.
    own: u64,
}

impl Header {
    fn read(mut file: impl Read) -> Result<Self, String> {
        let mut start = [0; 8];
        file.read_exact(&mut start).map_err(|e| e.to_string())?;
        if &start[..6] != b"\x93NUMPY" || !(1..=3).contains(&start[6]) {
            return Err("not a NumPy array".into());
        }
        let mut length = [0; 4];
        let wide = if start[6] == 1 { 2 } else { 4 };
        let read = file.read_exact(&mut length[..wide]);
        read.map_err(|e| e.to_string())?;
        let length = u32::from_le_bytes(length) as usize;
        if length > HEADER_MOST {
            return Err(format!("a header of {length} bytes"));
        }
        let mut text = vec![0; length];
        file.read_exact(&mut text).map_err(|e| e.to_string())?;
        let text = String::from_utf8_lossy(&text);
        let (descr, fortran, shape) =
            parse(&text).ok_or_else(|| format!("a header that reads {}", start_of(&text)))?;
        if shape.len() > DIMENSIONS {
            return Err(format!("a shape of {} dimensions", shape.len()));
        }
        let count = shape
            .iter()
            .try_fold(1usize, |product, &n| product.checked_mul(n))
            .filter(|count| *count <= isize::MAX as usize / 8)
            .ok_or_else(|| format!("shape {shape:?}"))?;
        let kind = descr.trim_start_matches(['<', '>', '=', '|']);
        let size = match kind {
            "b1" | "i1" | "u1" => 1,
            "i2" | "u2" | "f2" => 2,
            "i4" | "u4" | "f4" => 4,
            "i8" | "u8" | "f8" => 8,
            _ => {
                let descr = start_of(descr);
                return Err(format!("type {descr}, expected floats or integers"));
            }
        };
        Ok(Self {
            kind: kind.to_owned(),
            size,
            turned: descr.starts_with('>'),
            fortran,
            shape,
            count,
            own: (8 + wide + length) as u64,
        })
    }

    /// Refuses a header that does not match the size of the archive's entry.
    fn check_size(&self, entry: u64) -> Result<(), String> {
        let expected = self.own + (self.count * self.size) as u64;
        if entry == expected {
            return Ok(());
        }
        Err(format!(
            "its entry has {entry} bytes, expected {expected} for shape {:?}",
            self.shape
        ))
    }

    /// Converts bytes to elements.
    fn elements(&self, bytes: &[u8]) -> Vec<f64> {
        let convert: fn([u8; 8]) -> f64 = match self.kind.as_str() {
            "b1" | "u1" => |b| f64::from(b[0]),
            "i1" => |b| f64::from(b[0] as i8),
            "i2" => |b| f64::from(i16::from_le_bytes([b[0], b[1]])),
            "u2" => |b| f64::from(u16::from_le_bytes([b[0], b[1]])),
            "f2" => |b| half::f16::from_le_bytes([b[0], b[1]]).to_f64(),
            "i4" => |b| f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            "u4" => |b| f64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            "f4" => |b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            "i8" => |b| i64::from_le_bytes(b) as f64,
            "u8" => |b| u64::from_le_bytes(b) as f64,
            _ => f64::from_le_bytes,
        };
        let one = |bytes: &[u8]| {
            let mut own = [0; 8];
            own[..self.size].copy_from_slice(bytes);
            if self.turned {
                own[..self.size].reverse();
            }
            convert(own)
        };
        bytes.chunks_exact(self.size).map(one).collect()
    }
}

/// The beginning of a text, enough to recognise it.
fn start_of(text: &str) -> String {
    text.trim_end().chars().take(200).collect()
}

/// Reads the elements of a `.npy` file, last dimension fastest; as an error the shape, if it is not the wanted one. `entry`
/// is the size of an archive's entry.
fn read_array(
    mut file: impl Read,
    wanted: &[usize],
    entry: Option<u64>,
) -> Result<Result<Vec<f64>, Vec<usize>>, String> {
    let header = Header::read(&mut file)?;
    if header.shape != wanted {
        return Ok(Err(header.shape));
    }
    if let Some(entry) = entry {
        header.check_size(entry)?;
    }
    let (size, shape) = (header.count * header.size, &header.shape);
    let mut bytes = Vec::new();
    file.take(size as u64)
        .read_to_end(&mut bytes)
        .map_err(|e| e.to_string())?;
    if bytes.len() != size {
        let found = bytes.len();
        return Err(format!(
            "{found} bytes, expected {size} for shape {shape:?}"
        ));
    }
    let data = header.elements(&bytes);
    Ok(Ok(if header.fortran {
        c_order(&data, shape)
    } else {
        data
    }))
}

/// A `.npy` file, open to be read row by row.
pub struct Rows {
    file: File,
    path: PathBuf,
    header: Header,
    /// Where the elements begin.
    start: u64,
}

impl Rows {
    /// Opens a file; the whole array must be there, in C order.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = regular::open(path).map_err(Error::io(path))?;
        let header = Header::read(&mut file).map_err(|e| Error::data(path, e))?;
        let start = file.stream_position().map_err(Error::io(path))?;
        let expected = (header.count * header.size) as u64;
        let found = file.metadata().map_err(Error::io(path))?.len() - start;
        if header.fortran && header.shape.len() > 1 {
            let message = "an array in Fortran order, expected C order (numpy.ascontiguousarray)";
            return Err(Error::data(path, message));
        }
        if found < expected {
            let shape = &header.shape;
            let message = format!("{found} bytes, expected {expected} for shape {shape:?}");
            return Err(Error::data(path, message));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            header,
            start,
        })
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.header.shape
    }

    /// Type of the elements, as in `f4`.
    pub fn kind(&self) -> &str {
        &self.header.kind
    }

    /// Bytes from number `first` on, without moving the position of [`Rows::read`].
    pub fn read_bytes(&self, first: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(bytes, self.start + first);
        read.map_err(Error::io(&self.path))
    }

    /// `count` elements from number `first` on, in C order. They must exist.
    pub fn read(&mut self, first: usize, count: usize) -> Result<Vec<f32>> {
        let size = self.header.size;
        let mut bytes = vec![0; count * size];
        self.file
            .seek(SeekFrom::Start(self.start + (first * size) as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(Error::io(&self.path))?;
        let elements = self.header.elements(&bytes);
        Ok(elements.into_iter().map(|x| x as f32).collect())
    }
}

/// Reorders elements from first dimension fastest to last dimension fastest.
fn c_order(data: &[f64], shape: &[usize]) -> Vec<f64> {
    let mut index = vec![0; shape.len()];
    let mut out = Vec::with_capacity(data.len());
    for _ in 0..data.len() {
        let place = index
            .iter()
            .zip(shape)
            .rev()
            .fold(0, |place, (i, n)| place * n + i);
        out.push(data[place]);
        for (i, n) in index.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *n {
                break;
            }
            *i = 0;
        }
    }
    out
}

/// Type, order and shape of a header: a Python dictionary of these three.
fn parse(text: &str) -> Option<(&str, bool, Vec<usize>)> {
    let after = |key: &str| {
        let (_, rest) = text.split_once(&format!("'{key}'"))?;
        Some(rest.trim_start().strip_prefix(':')?.trim_start())
    };
    let descr = after("descr")?.strip_prefix('\'')?.split_once('\'')?.0;
    let fortran = after("fortran_order")?.starts_with("True");
    let shape = after("shape")?.strip_prefix('(')?.split_once(')')?.0;
    let sizes = shape.split(',').map(str::trim).filter(|n| !n.is_empty());
    let shape = sizes
        .map(|n| n.parse().ok())
        .collect::<Option<Vec<usize>>>()?;
    Some((descr, fortran, shape))
}

/// The error about an array of another shape.
pub(crate) fn other_shape(name: &str, found: &[usize], expected: &[usize]) -> String {
    format!("array {name} of shape {found:?}, expected {expected:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npy(descr: &str, fortran: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let text =
            format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n");
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend_from_slice(&(text.len() as u16).to_le_bytes());
        file.extend_from_slice(text.as_bytes());
        file.extend_from_slice(data);
        file
    }

    #[test]
    fn an_archive_reads_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("statistics.npz");
        let (mu, sigma) = ([1.5, -2.0], [1.0, 0.25, 0.25, 3.0]);
        write_archive(&path, &[("mu", &[2], &mu), ("sigma", &[2, 2], &sigma)]).unwrap();
        let archive = Archive::open(&path).unwrap();
        assert_eq!(archive.array("mu", &[2]).unwrap().unwrap(), mu);
        assert_eq!(archive.array("sigma", &[2, 2]).unwrap().unwrap(), sigma);
        assert_eq!(archive.array("mu_s", &[2]).unwrap(), None);
        std::fs::write(&path, b"PK").unwrap();
        assert!(Archive::open(&path).is_err());
    }

    /// An archive of one array, `mu`, of 1000 bytes that do not compress well, in uncompressed deflate blocks if `deflated`.
    fn bytes_in_an_archive(path: &Path, deflated: bool) -> Vec<u8> {
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
        let data: Vec<u8> = (0..1000).map(noise).collect();
        let mut archive = zip::ZipWriter::new(File::create(path).unwrap());
        let array = npy("|u1", "False", "(1000,)", &data);
        if deflated {
            // The library is built without deflate: the data is deflated here, and the entry's method is patched afterwards.
            let level = flate2::Compression::none();
            let mut packed = flate2::write::DeflateEncoder::new(Vec::new(), level);
            packed.write_all(&array).unwrap();
            archive.start_file("mu.npy", stored(0)).unwrap();
            archive.write_all(&packed.finish().unwrap()).unwrap();
        } else {
            archive.start_file("mu.npy", stored(0)).unwrap();
            archive.write_all(&array).unwrap();
        }
        archive.finish().unwrap();
        if deflated {
            let mut file = std::fs::read(path).unwrap();
            let found = file.windows(4).position(|four| four == b"PK\x01\x02");
            let entry = found.unwrap();
            file[entry + 10] = 8;
            let sum = flate2_sum(&array).to_le_bytes();
            file[entry + 16..entry + 20].copy_from_slice(&sum);
            let size = (array.len() as u32).to_le_bytes();
            file[entry + 24..entry + 28].copy_from_slice(&size);
            std::fs::write(path, file).unwrap();
        }
        data
    }

    fn flate2_sum(bytes: &[u8]) -> u32 {
        let mut sum = flate2::Crc::new();
        sum.update(bytes);
        sum.sum()
    }

    #[test]
    fn a_changed_byte_is_an_error_and_no_other_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        for deflated in [false, true] {
            let data = bytes_in_an_archive(&path, deflated);
            let archive = Archive::open(&path).unwrap();
            let array = archive.array("mu", &[1000]).unwrap().unwrap();
            assert!(array.iter().zip(&data).all(|(x, y)| *x == f64::from(*y)));
            let mut stream = archive.stream("mu").unwrap();
            let parts = [400, 600].map(|count| stream.read_bytes(count).unwrap());
            assert_eq!(parts.concat(), data);

            let mut file = std::fs::read(&path).unwrap();
            let at = file.windows(1000).position(|own| own == data).unwrap();
            file[at + 100] ^= 16;
            std::fs::write(&path, file).unwrap();
            let archive = Archive::open(&path).unwrap();
            let expected = flate2_sum(&npy("|u1", "False", "(1000,)", &data));
            let check = |said: String| {
                let words = ["a.npz", "the entry mu.npy of the zip archive is damaged"];
                assert!(words.iter().all(|own| said.contains(own)), "{said}");
                let sum = format!("expected {expected:08x}");
                assert!(said.contains(&sum), "{sum}: {said}");
            };
            check(archive.array("mu", &[1000]).unwrap_err().to_string());
            // Together with the last bytes, whatever is read before.
            let mut stream = archive.stream("mu").unwrap();
            stream.read_bytes(999).unwrap();
            check(format!("a.npz: {}", stream.read_bytes(1).unwrap_err()));
        }
    }

    #[test]
    fn a_shape_that_is_not_that_of_all_elements_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        bytes_in_an_archive(&path, false);
        let mut file = std::fs::read(&path).unwrap();
        let at = file.windows(6).position(|own| own == b"(1000,").unwrap();
        file[at..at + 5].copy_from_slice(b"(  50");
        std::fs::write(&path, file).unwrap();
        let archive = Archive::open(&path).unwrap();
        let said = [
            archive.array("mu", &[50]).unwrap_err(),
            archive.stream("mu").err().unwrap(),
        ];
        for said in said.map(|error| error.to_string()) {
            assert!(said.contains("for shape [50]"), "{said}");
        }
    }

    #[test]
    fn every_order_of_floats_is_read() {
        let expected = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let turned = [1.0, 4.0, 2.0, 5.0, 3.0, 6.0];
        let bytes = |x: &[f64], f: fn(f64) -> Vec<u8>| -> Vec<u8> {
            x.iter().flat_map(|&x| f(x)).collect()
        };
        let little = |x: f64| (x as f32).to_le_bytes().to_vec();
        for (descr, fortran, data) in [
            (
                "<f8",
                "False",
                bytes(&expected, |x| x.to_le_bytes().to_vec()),
            ),
            (
                ">f8",
                "False",
                bytes(&expected, |x| x.to_be_bytes().to_vec()),
            ),
            ("<f4", "False", bytes(&expected, little)),
            ("<f4", "True", bytes(&turned, little)),
        ] {
            let found = read_array(&npy(descr, fortran, "(2, 3)", &data)[..], &[2, 3], None);
            assert_eq!(found.unwrap().unwrap(), expected);
        }
        let scalar = read_array(
            &npy("<f8", "False", "()", &7f64.to_le_bytes())[..],
            &[],
            None,
        );
        assert_eq!(scalar.unwrap().unwrap(), [7.0]);
    }

    #[test]
    fn rows_are_read_where_they_lie() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        let open = |descr, fortran, shape, data: &[u8]| {
            std::fs::write(&path, npy(descr, fortran, shape, data)).unwrap();
            Rows::open(&path)
        };
        let halves = [1.0, 2.0, 3.5, -4.0].map(|x| half::f16::from_f64(x).to_be_bytes());
        let mut rows = open(">f2", "False", "(2, 2)", &halves.concat()).unwrap();
        assert_eq!(rows.shape(), [2, 2]);
        assert_eq!(rows.read(2, 2).unwrap(), [3.5, -4.0]);
        let mut rows = open("|b1", "False", "(3,)", &[0, 1, 1]).unwrap();
        assert_eq!(rows.read(0, 3).unwrap(), [0.0, 1.0, 1.0]);
        let mut rows = open("<i8", "False", "(1,)", &(-3i64).to_le_bytes()).unwrap();
        assert_eq!(rows.read(0, 1).unwrap(), [-3.0]);
        let check = |rows: Result<Rows>, expected: &str| {
            let error = rows.err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(open("<f4", "True", "(2, 2)", &[0; 16]), "expected C order");
        check(
            open("<f4", "False", "(2, 2)", &[0; 15]),
            "15 bytes, expected 16",
        );
    }

    #[test]
    fn what_is_no_array_of_floats_is_refused() {
        for (file, expected) in [
            (b"\x93NUMPX\x01\x00".to_vec(), "not a NumPy array"),
            (
                npy("|O", "False", "(1,)", b"x"),
                "type |O, expected floats or integers",
            ),
            (
                npy("<f8", "False", "(2,)", &[0; 8]),
                "8 bytes, expected 16 for shape [2]",
            ),
            (npy("<f8", "False", "(-1,)", &[]), "a header that reads"),
            (
                npy("<f8", "False", &format!("({})", "1,".repeat(9000)), &[0; 8]),
                "a shape of 9000 dimensions",
            ),
            (
                npy("<f8", "False", "(9999999999, 9999999999)", &[]),
                "shape [9999999999, 9999999999]",
            ),
        ] {
            let error = read_array(&file[..], &[2], None).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn nothing_of_another_shape_is_unpacked() {
        // Zeros, deflated by a thousand to one: reading them would need far more than the test is given.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bomb.npz");
        let count = 300_000_000usize;
        let header = npy("<f8", "False", &format!("({count},)"), &[]);
        let mut packed =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&header).unwrap();
        for _ in 0..32 {
            packed.write_all(&vec![0; 1 << 20]).unwrap();
        }
        let packed = packed.finish().unwrap();
        // Written by hand: a directory with an arbitrary size.
        let name = b"mu.npy";
        let fields = |signature: &[u8], versions: &[u8]| {
            let mut entry = [signature, versions, &[0, 0, 8, 0], &[0; 8]].concat();
            entry.extend((packed.len() as u32).to_le_bytes());
            entry.extend(
                u32::try_from(header.len() + 8 * count)
                    .unwrap_or(u32::MAX - 1)
                    .to_le_bytes(),
            );
            entry.extend([name.len() as u8, 0, 0, 0]);
            entry
        };
        let local = [&fields(b"PK\x03\x04", &[20, 0])[..], name, &packed].concat();
        let directory = [&fields(b"PK\x01\x02", &[20, 0, 20, 0])[..], &[0; 14], name].concat();
        let mut end = b"PK\x05\x06\0\0\0\0\x01\0\x01\0".to_vec();
        end.extend((directory.len() as u32).to_le_bytes());
        end.extend((local.len() as u32).to_le_bytes());
        end.extend([0; 2]);
        std::fs::write(&path, [local, directory, end].concat()).unwrap();
        let archive = Archive::open(&path).unwrap();
        let said = archive.array("mu", &[2048]).unwrap_err().to_string();
        assert!(
            said.contains("array mu of shape [300000000], expected [2048]"),
            "{said}"
        );
        // The right shape, but truncated: only existing data is read.
        let said = archive.array("mu", &[count]).unwrap_err().to_string();
        assert!(
            said.contains("33554432 bytes, expected 2400000000"),
            "{said}"
        );
    }
}
