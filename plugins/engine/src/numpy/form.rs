//! Whether a file is an array or an archive of NumPy's: its content decides, not its name.

use std::io::Read;
use std::path::Path;

use retort_checkpoint::{archive, regular};

use crate::error::{Error, Result};

/// Forms of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One array, as `numpy.save` writes it.
    Array,
    /// An archive of arrays, as `numpy.savez` writes it.
    Archive,
    /// Something else, such as a torch or safetensors file.
    Other,
}

impl Form {
    /// The form of a file, or of a folder. If its content is of no known form, the form that its name promises: then its reader
    /// says what is wrong.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        // A checkpoint in several files.
        if path.is_dir() {
            return Ok(Self::Other);
        }
        let mut start = Vec::new();
        let file = regular::open(path).map_err(Error::io(path))?;
        let read = file.take(6).read_to_end(&mut start);
        read.map_err(Error::io(path))?;
        let promised = match path.extension() {
            Some(ending) if ending.eq_ignore_ascii_case("npz") => Self::Archive,
            Some(ending) if ending.eq_ignore_ascii_case("npy") => Self::Array,
            _ => Self::Other,
        };
        Ok(match &start[..] {
            b"\x93NUMPY" => Self::Array,
            start if start.starts_with(b"PK") => match archive::Archive::open(path) {
                Ok(zip) if is_of_torch(&zip) => Self::Other,
                Ok(_) => Self::Archive,
                Err(_) => promised,
            },
            _ => promised,
        })
    }
}

/// Whether a zip archive is one of `torch.save`.
fn is_of_torch(zip: &archive::Archive) -> bool {
    let mut names = zip.entries().iter().map(|entry| entry.name.as_str());
    names.any(|name| name == "data.pkl" || name.ends_with("/data.pkl"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_content_decides_and_not_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let zip = |entry: &str| {
            let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
            zip.start_file(entry, crate::numpy::stored(0)).unwrap();
            zip.write_all(b"x").unwrap();
            zip.finish().unwrap().into_inner()
        };
        let (npz, torch) = (zip("mu.npy"), zip("archive/data.pkl"));
        let npy = crate::numpy::header("<f8", &[0]);
        let check = |name: &str, content: &[u8], form: Form| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            assert_eq!(Form::of(&path).unwrap(), form, "{name}");
        };
        for name in ["a.npz", "a.npy", "a.pth", "a"] {
            check(name, &npz, Form::Archive);
            check(name, &npy, Form::Array);
            check(name, &torch, Form::Other);
        }
        for content in [b"".as_slice(), b"PK", b"{}"] {
            check("a.NPZ", content, Form::Archive);
            check("a.npy", content, Form::Array);
            check("a.safetensors", content, Form::Other);
        }
        assert!(Form::of(&dir.path().join("none.npz")).is_err());
        assert_eq!(Form::of(dir.path()).unwrap(), Form::Other);
    }
}
