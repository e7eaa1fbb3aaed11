//! The bytes of a checkpoint, by position: in a file or in memory.
//!
//! Files are read by position, not mapped: a mapping needs `unsafe`, and if the file shrinks the process is killed. The page
//! cache serves both equally, and tensors are converted while they are read anyway.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use crate::regular;

/// Bytes that can be read at any position.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    File(Arc<File>, u64),
    Memory(Arc<[u8]>),
}

impl Source {
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = regular::open(path)?;
        let size = file.metadata()?.len();
        Ok(Self::File(Arc::new(file), size))
    }

    /// A file's identity, independent of its names: device and inode.
    pub fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        match self {
            Self::File(file, _) => {
                let found = file.metadata()?;
                Ok(Some((found.dev(), found.ino())))
            }
            Self::Memory(_) => Ok(None),
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Fills a buffer from a position.
    pub fn read_at(&self, position: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::File(file, _) => file.read_exact_at(buffer, position),
            Self::Memory(bytes) => {
                let end = position.checked_add(buffer.len() as u64);
                let range = end.and_then(|end| bytes.get(position as usize..end as usize));
                buffer.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }

    /// `len` bytes from a position; `len` must have been checked against a limit or the size of the file.
    pub fn bytes(&self, position: u64, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.read_at(position, &mut bytes)?;
        Ok(bytes)
    }
}
