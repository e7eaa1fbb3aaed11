//! Data files: opening regular files, and reading tables record by record within a limit of length.
//!
//! In: a path that somebody named. Out: an open regular file, or a [`DataError`] that says what is there instead. A record's
//! length is limited here, before the record is in memory.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use retort_checkpoint::regular;

use super::error::DataError;

/// Separators of cells in tables, with their names.
const SEPARATORS: [(u8, &str); 4] = [
    (b',', "commas"),
    (b'\t', "tabs"),
    (b';', "semicolons"),
    (b'|', "vertical bars"),
];

/// The name of a separator other than the expected one for which this holds.
pub fn other_separator(expected: u8, is_it: impl Fn(u8) -> bool) -> Option<&'static str> {
    let mut others = SEPARATORS.into_iter().filter(|(byte, _)| *byte != expected);
    others.find(|(byte, _)| is_it(*byte)).map(|(_, name)| name)
}

/// Opens a file; `expected` says what it should be, for the error message.
pub fn open(path: &Path, expected: &str) -> Result<File, DataError> {
    regular::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => {
            DataError::content(path, format!("{error}; expected {expected}"))
        }
        _ => DataError::read(path, "file", error),
    })
}

/// Passes on a reader's bytes, and fails on a record longer than `most`: a CSV reader holds a whole record in memory, and the
/// bounds of every cell in it.
pub struct Records<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

/// Tells [`Records`] that the next record begins.
pub struct RecordStart {
    most: u64,
    left: Rc<Cell<u64>>,
}

/// A reader of records, and a callback to call before each record.
pub fn records<R: Read>(inner: R, most: u64) -> (Records<BufReader<R>>, RecordStart) {
    let left = Rc::new(Cell::new(most));
    let records = Records {
        inner: BufReader::new(inner),
        left: Rc::clone(&left),
    };
    (records, RecordStart { most, left })
}

impl RecordStart {
    /// A record begins.
    pub fn begin(&self) {
        self.left.set(self.most);
    }

    /// The error about a record that is too long.
    pub fn too_long(&self) -> String {
        format!(
            "a record of more than {} bytes, the longest that is read (a quotation mark that is never closed?)",
            self.most
        )
    }

    /// Whether reading failed because of the record's length.
    pub fn is_over(&self) -> bool {
        self.left.get() == 0
    }
}

impl<R: Read> Read for Records<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let most = usize::try_from(self.left.get()).unwrap_or(usize::MAX);
        let most = most.min(bytes.len());
        let read = self.inner.read(&mut bytes[..most])?;
        self.left.set(self.left.get() - read as u64);
        Ok(read)
    }
}
