//! Image files, in a folder or in archives, and their bytes.

use std::borrow::Cow;
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use retort_checkpoint::images::LONGEST_FILE;
use retort_checkpoint::regular;

use super::error::DataError;
use super::file;
use super::item::{Item, ItemLocation};
use super::memory_pool::{self, MemoryPermit};
use super::parquet::TableFiles;

/// A file that could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Path within the folder or archive.
    pub name: String,
    /// Why not.
    pub why: String,
}

/// The beginning of the reason, if a file is whole but of a kind that is not read.
pub(super) const NOT_SUPPORTED: &str = "not supported: ";

impl Damaged {
    /// What is wrong with files, and how to mend them, in words.
    pub(super) fn state(files: &[Self]) -> (&'static str, &'static str) {
        let unsupported = |file: &&Self| file.why.starts_with(NOT_SUPPORTED);
        match files.iter().filter(unsupported).count() {
            0 => ("damaged", "repair"),
            all if all == files.len() => ("unsupported", "convert"),
            _ => ("damaged or unsupported", "repair, convert"),
        }
    }

    pub(super) fn of((item, why): (Item, String)) -> Self {
        Self {
            name: item.name.into(),
            why,
        }
    }
}

/// Opens an archive.
pub(super) fn open_archive(path: &Path) -> Result<File, DataError> {
    let expected = "a tar archive (for a folder of archives, `folder:`)";
    file::open(path, expected)
}

/// Where a source's items are stored.
#[derive(Debug)]
pub(super) enum ContentSource {
    /// A folder of files, or archives.
    Files(Vec<PathBuf>),
    /// Tables.
    Tables(TableFiles),
}

impl ContentSource {
    /// Passes the bytes of items to `make` on all threads, at most this many items at a time. `take` gets the results in
    /// order, with the number of the first.
    pub(super) fn each<T: Clone + Send, E: From<DataError>>(
        &self,
        folder: &Path,
        items: &[Item],
        at_once: usize,
        make: impl Fn(&Item, &Bytes<'_>) -> T + Sync,
        mut take: impl FnMut(usize, Vec<T>) -> Result<(), E>,
    ) -> Result<(), E> {
        let archives = match self {
            Self::Files(archives) => Archives::open(folder, archives)?,
            Self::Tables(tables) => {
                let make = |item: &Item, bytes: Option<&[u8]>| make(item, &Bytes::Row(bytes));
                return tables.each(items, at_once, &make, &mut take);
            }
        };
        for (first, part) in (0..).step_by(at_once).zip(items.chunks(at_once)) {
            let made = part
                .par_iter()
                .map(|item| make(item, &Bytes::File(&archives, item)));
            take(first, made.collect())?;
        }
        Ok(())
    }
}

/// The bytes of an item, to be read.
pub(super) enum Bytes<'a> {
    /// From a file.
    File(&'a Archives<'a>, &'a Item),
    /// From a row; None if it has no bytes.
    Row(Option<&'a [u8]>),
}

impl Bytes<'_> {
    /// At most this many bytes, from the beginning.
    pub(super) fn read(&self, most: u64) -> Result<Content<'_>, String> {
        match self {
            Self::File(archives, item) => archives.content(item, most),
            Self::Row(None) => Err(
                "no bytes; a data set whose rows refer to other files has to be saved with their content in it".into(),
            ),
            Self::Row(Some(bytes)) if bytes.len() as u64 > LONGEST_FILE => Err(too_long(bytes.len() as u64)),
            Self::Row(Some(bytes)) => Ok(Content {
                bytes: Cow::Borrowed(&bytes[..bytes.len().min(most as usize)]),
                _permit: None,
            }),
        }
    }
}

/// Items whose bytes are in files.
pub(super) struct Archives<'a> {
    folder: &'a Path,
    files: Vec<File>,
}

impl<'a> Archives<'a> {
    pub(super) fn open(folder: &'a Path, archives: &[PathBuf]) -> Result<Self, DataError> {
        Ok(Self {
            folder,
            files: archives
                .iter()
                .map(|path| open_archive(path))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The bytes of an item, at most so many from its beginning.
    pub(super) fn content(&self, item: &Item, most: u64) -> Result<Content<'static>, String> {
        let unreadable = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => "no such file".to_owned(),
            std::io::ErrorKind::InvalidInput => error.to_string(),
            _ => format!("cannot be read: {error}"),
        };
        if let ItemLocation::Archive(archive, part) = item.location {
            if part.size > LONGEST_FILE {
                return Err(too_long(part.size));
            }
            let permit = memory_pool::FILES.take(part.size.min(most));
            let mut bytes = vec![0; part.size.min(most) as usize];
            let read = self.files[archive as usize].read_exact_at(&mut bytes, part.start);
            let content = Content {
                bytes: bytes.into(),
                _permit: Some(permit),
            };
            return read.map(|()| content).map_err(unreadable);
        }
        let path = self.folder.join(&*item.name);
        let file = regular::open(&path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if metadata.len() > LONGEST_FILE {
            return Err(too_long(metadata.len()));
        }
        let permit = memory_pool::FILES.take(metadata.len().min(most));
        let mut bytes = Vec::with_capacity(metadata.len().min(most) as usize);
        file.take(most)
            .read_to_end(&mut bytes)
            .map_err(unreadable)?;
        Ok(Content {
            bytes: bytes.into(),
            _permit: Some(permit),
        })
    }
}

/// The bytes of a file. Threads share the memory for them.
pub(super) struct Content<'a> {
    bytes: Cow<'a, [u8]>,
    _permit: Option<MemoryPermit>,
}

impl Deref for Content<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

fn too_long(bytes: u64) -> String {
    format!("{bytes} bytes; files of more than {LONGEST_FILE} are not decoded")
}
