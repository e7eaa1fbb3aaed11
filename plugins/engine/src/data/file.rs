//! Files of data: opened where they are files, and tables read record by record, each of which has to end.
//!
//! In: a path that somebody named. Out: an open regular file, or a [`DataError`] that says what is there instead. What
//! grows with a file that others made is limited here by the length of a record, before anybody holds it.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::rc::Rc;

use retort_checkpoint::regular;

use super::error::DataError;

/// Opens a file; `expected` says what it should be, should it be no file.
pub fn open(path: &Path, expected: &str) -> Result<File, DataError> {
    regular::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => {
            DataError::content(path, format!("{error}; expected {expected}"))
        }
        _ => DataError::read(path, "file", error),
    })
}

/// Gives a reader's bytes, and an error instead of a record that is longer than `most`: a reader of CSV holds the whole of
/// the record that it reads, and the place of every cell in it.
pub struct Records<R> {
    inner: R,
    left: Rc<Cell<u64>>,
}

/// Tells [`Records`] that the next record begins.
pub struct Next {
    most: u64,
    left: Rc<Cell<u64>>,
}

/// What to read records from, and what to call before each.
pub fn records<R: Read>(inner: R, most: u64) -> (Records<BufReader<R>>, Next) {
    let left = Rc::new(Cell::new(most));
    let records = Records {
        inner: BufReader::new(inner),
        left: Rc::clone(&left),
    };
    (records, Next { most, left })
}

impl Next {
    /// A record begins.
    pub fn begin(&self) {
        self.left.set(self.most);
    }

    /// What is said of a record that does not end.
    pub fn too_long(&self) -> String {
        format!(
            "a record of more than {} bytes, the longest that is read (a quotation mark that is never closed?)",
            self.most
        )
    }

    /// Whether it is the record's length that ended the reading.
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
