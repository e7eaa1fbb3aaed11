//! The engine's errors, and their form on the other side of the plugin boundary.

use std::path::{Path, PathBuf};

use retort_abi::{Failure, FailureCode};

/// Result of every engine operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tensor library refused or failed.
    #[error("{0}")]
    Backend(String),
    /// The device's memory does not suffice.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Invalid options; the pointer names the option.
    #[error("{message}")]
    Options {
        /// JSON pointer into the stage's options.
        pointer: String,
        /// What is wrong, what was expected.
        message: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file or artifact that is not what it should be.
    #[error("{path}: {message}", path = path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What was found, what was expected.
        message: String,
    },
    /// NaN or infinity where only finite values are allowed.
    #[error("{0}")]
    Numerical(String),
    /// A network's output for a sample is NaN or infinite.
    #[error("sample {sample}: {message}")]
    NotFinite {
        /// Its index: in its batch, until [`Error::of_samples`].
        sample: u64,
        /// What is not finite.
        message: String,
    },
    /// Another rank of a training is gone, or timed out.
    #[error("{0}")]
    Rank(String),
    /// The ranks of a training no longer hold the same weights.
    #[error("{0}")]
    RanksDiffer(String),
    /// The host asked to stop; the work done is in the work directory.
    #[error("stopped on request; the work so far is kept")]
    Cancelled,
    /// The host refused a service.
    #[error(transparent)]
    Host(#[from] Failure),
    /// A bug in retort.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// An error of the tensor library.
    pub fn backend(cause: impl std::fmt::Display) -> Self {
        Self::Backend(cause.to_string())
    }

    /// An option at fault.
    pub fn option(pointer: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Options {
            pointer: pointer.into(),
            message: message.into(),
        }
    }

    /// A malformed file.
    pub fn data(path: impl AsRef<Path>, message: impl std::fmt::Display) -> Self {
        Self::Data {
            path: path.as_ref().to_owned(),
            message: message.to_string(),
        }
    }

    /// The same error of a batch that begins with the sample of this index.
    pub fn of_samples(self, first: u64) -> Self {
        match self {
            Self::NotFinite { sample, message } => {
                let sample = first + sample;
                Self::NotFinite { sample, message }
            }
            other => other,
        }
    }

    /// Turns an error of reading a checkpoint into one that names the file.
    pub fn checkpoint(path: impl AsRef<Path>) -> impl FnOnce(retort_checkpoint::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |error| match error {
            retort_checkpoint::Error::Io(source) => Self::Io { path, source },
            other => Self::data(path, other),
        }
    }

    /// Turns an I/O error into one that names its file.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { path, source }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Backend(_) | Error::Internal(_) => Failure::new(FailureCode::Internal, message),
            Error::OutOfMemory(_) => {
                Failure::new(FailureCode::OutOfMemory, message).hint("lower the stage's batch size")
            }
            Error::Options { pointer, .. } => {
                Failure::new(FailureCode::InvalidOptions, message).at(pointer)
            }
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Failure::new(FailureCode::MissingInput, message)
            }
            Error::Io { .. } => Failure::new(FailureCode::Io, message),
            Error::Data { .. } => Failure::new(FailureCode::BadData, message),
            Error::Numerical(_) => Failure::new(FailureCode::Numerical, message)
                .hint("lower the learning rate or raise the warm-up; --set changes one value"),
            Error::NotFinite { .. } => Failure::new(FailureCode::Numerical, message).hint(
                "look at the curves of the stage that trained the network, and at its guidance and temperature",
            ),
            // The other rank's fate is the reason; this rank could continue.
            Error::Rank(_) => Failure {
                retryable: true,
                ..Failure::new(FailureCode::WorkerLost, message)
                    .hint("`retort resume` continues from the last checkpoint")
            },
            // Fewer workers or a retry would not help.
            Error::RanksDiffer(_) => Failure::new(FailureCode::WorkersDiffer, message).hint(
                "give all workers processors or GPUs of one kind; `retort resume` continues from the last checkpoint",
            ),
            Error::Cancelled => Failure::new(FailureCode::Cancelled, message),
            Error::Host(failure) => failure,
        }
    }
}
