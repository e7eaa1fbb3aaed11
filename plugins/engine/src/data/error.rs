//! Why images could not be read: every message names the file, and in tables line and column.

use std::io;
use std::path::{Path, PathBuf};

use retort_abi::{Failure, FailureCode};

/// Why images could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Options that name no source, or two, or do not fit their source.
    #[error("{0}")]
    Options(String),
    /// No such file or folder.
    #[error("{}: no such {what}", path.display())]
    Missing {
        /// The path as resolved.
        path: PathBuf,
        /// "file" or "folder".
        what: &'static str,
    },
    /// The system refused to read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The path as resolved.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No image in it.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// What should have been there.
        expected: &'static str,
        /// What was found instead, or "none".
        found: String,
    },
    /// A value of a table is wrong.
    #[error("{}:{line}: column {column}: expected {expected}, found {found}", path.display())]
    Cell {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: usize,
        /// What was expected.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A line of a CSV file has another number of columns than the images need.
    #[error("{}:{line}: expected {expected} columns, found {found}", path.display())]
    Columns {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// What was expected, and why.
        expected: String,
        /// Columns found.
        found: usize,
    },
    /// A class number in the range has no image.
    #[error("{}: class {missing} has no image, though classes go up to {last}; number them 0, 1, 2, ...", path.display())]
    ClassGap {
        /// The file or folder.
        path: PathBuf,
        /// First class without an image.
        missing: u64,
        /// Highest class.
        last: u64,
    },
    /// Anything else that is wrong with a file or folder.
    #[error("{}: {message}", path.display())]
    Content {
        /// The file or folder.
        path: PathBuf,
        /// What was expected and what was found.
        message: String,
    },
    /// The host asked to stop.
    #[error("stopped as asked")]
    Cancelled,
}

impl DataError {
    /// Something wrong with a file or folder.
    pub(crate) fn content(path: &Path, message: impl Into<String>) -> Self {
        Self::Content {
            path: path.to_owned(),
            message: message.into(),
        }
    }

    /// A system's error about a "file" or "folder".
    pub(crate) fn read(path: &Path, what: &'static str, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { path, what },
            _ => Self::Read { path, source },
        }
    }
}

/// A name from a file, prepared for a message: on one line, and of readable length.
pub(crate) fn shown(name: &str) -> String {
    const LONGEST: usize = 200;
    let kept: String = name.chars().take(LONGEST).collect();
    let more = if kept.len() < name.len() { "..." } else { "" };
    match kept.chars().any(char::is_control) {
        true => format!("{}{more}", kept.escape_debug()),
        false => kept + more,
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        let code = match &error {
            DataError::Options(_) => FailureCode::InvalidOptions,
            DataError::Missing { .. } => FailureCode::MissingInput,
            DataError::Read { .. } => FailureCode::Io,
            DataError::Cancelled => FailureCode::Cancelled,
            _ => FailureCode::BadData,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<DataError> for crate::Error {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Cancelled => crate::Error::Cancelled,
            error => crate::Error::Host(error.into()),
        }
    }
}
