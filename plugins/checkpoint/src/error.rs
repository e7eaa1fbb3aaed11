//! What can be wrong with a checkpoint file. Messages do not name the file: whoever opened it does.

use std::io;

/// Result of every operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of reading checkpoints.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The file is not a checkpoint, is damaged, or uses what is not supported.
    #[error("{0}")]
    Format(String),
    /// The file demands more than any checkpoint needs.
    #[error("{what}: more than {limit}, the most that is read; this is not a file of weights")]
    Limit {
        /// The quantity that is too large.
        what: &'static str,
        /// The most that is read.
        limit: u64,
    },
    /// No dictionary of tensors was selected, or the choice is ambiguous.
    #[error("{0}")]
    Select(String),
}

impl Error {
    pub(crate) fn format(message: impl Into<String>) -> Self {
        Self::Format(message.into())
    }

    /// The same in one of several files: whoever opened these does not know which one.
    pub(crate) fn of(self, file: &str) -> Self {
        let file = file.escape_debug();
        match self {
            Self::Io(e) => Self::Io(io::Error::new(e.kind(), format!("{file}: {e}"))),
            other => Self::format(format!("{file}: {other}")),
        }
    }
}
