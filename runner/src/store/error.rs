//! Why the store could not complete a request.

use std::path::PathBuf;

use super::{file_limit, sandbox};
use crate::filter::FilterError;

/// SQLite's code for a write that failed (`SQLITE_IOERR_WRITE`).
const WRITE_FAILED: i32 = 778;
/// SQLite's code if the shared memory of the write-ahead log cannot be enlarged (`SQLITE_IOERR_SHMSIZE`), as on a full
/// disk.
const NO_SHARED_MEMORY: i32 = 4874;

/// An error of the store. Each variant is a different thing for the user to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no store in the directory.
    #[error("there is no store in {}", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// The store was written by a later retort.
    #[error(
        "the store {} was written by a newer retort (schema {found}; this one knows up to {known}): update retort or \
         choose another --store",
        path.display()
    )]
    NewerSchema {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The last schema this program knows.
        known: i64,
    },
    /// The store was written by an earlier retort and cannot be migrated, because it cannot be written to.
    #[error(
        "the store {} was written by an older retort (schema {found} of {known}) and cannot be migrated: {source}",
        path.display()
    )]
    OlderSchema {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The schema of this program.
        known: i64,
        /// Why not.
        source: Box<StoreError>,
    },
    /// The file is something else.
    #[error("{} is not a retort history ({message}): move it away or choose another --store", path.display())]
    NotAStore {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        message: String,
    },
    /// The database, or a file that SQLite keeps next to it, is a directory, a pipe or a device.
    #[error("{} is {kind}, not a file: move it away or choose another --store", path.display())]
    NotAFile {
        /// What was found.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The history is missing or empty, although there are artifacts that it must have listed.
    #[error(
        "the history of this store is gone: {} is missing or empty, and {artifacts} artifact(s) lie beside it; nothing \
         was changed",
        path.display()
    )]
    HistoryGone {
        /// The database.
        path: PathBuf,
        /// Directories under `artifacts`.
        artifacts: usize,
    },
    /// A file that runs cannot be imported from.
    #[error("{} cannot be imported: {message}", path.display())]
    NotImportable {
        /// The file.
        path: PathBuf,
        /// Why not.
        message: String,
    },
    /// The store has no run of its own.
    #[error("there is no run to resume: {imported} run(s) here come from another store")]
    NothingToResume {
        /// Those that do.
        imported: u64,
    },
    /// The store cannot be written to.
    #[error("the store {} cannot be written to: check its permissions or choose another --store", path.display())]
    ReadOnly {
        /// The directory.
        path: PathBuf,
    },
    /// Another process kept the store locked for longer than the wait limit.
    #[error(
        "the store is busy: another retort process has been writing to it for more than 10 s; try again"
    )]
    Busy,
    /// A run is in progress, and the request would break it.
    #[error("a run is under way in this store: try again when it ends")]
    InUse,
    /// Another machine writes to the store.
    #[error(
        "the store {} is used by process {pid} on {host}, and one machine at a time can use a store",
        path.display()
    )]
    Elsewhere {
        /// The store.
        path: PathBuf,
        /// The machine.
        host: String,
        /// The process that took the store there.
        pid: u32,
    },
    /// No space left.
    #[error("the disk with the store is full: free some space and try again")]
    Full,
    /// No space left on a disk other than the store's.
    #[error("the disk with {} is full: free some space, or use another disk", path.display())]
    FullElsewhere {
        /// What was being written.
        path: PathBuf,
    },
    /// The system limits file sizes for this process.
    #[error(
        "{} cannot grow: the limit on the size of files (`ulimit -f`) is {} KiB",
        path.display(),
        limit / 1024
    )]
    FileTooLong {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// SQLite finds the database malformed.
    #[error("the store's history is damaged: {message}")]
    Damaged {
        /// SQLite's message.
        message: String,
    },
    /// An error of the file system.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A reference to a run that matches none.
    #[error("no run matches `{reference}`")]
    NoRun {
        /// As given.
        reference: String,
        /// How many runs there are, for `latest~N`.
        runs: u64,
    },
    /// A prefix that several runs share.
    #[error("`{reference}` matches {} runs: {}", candidates.len(), first(candidates))]
    AmbiguousRun {
        /// As given.
        reference: String,
        /// The runs it matches, newest first.
        candidates: Vec<String>,
    },
    /// A reference to a sweep that matches none.
    #[error("no sweep matches `{reference}`")]
    NoSweep {
        /// As given.
        reference: String,
    },
    /// A prefix that several sweeps share.
    #[error("`{reference}` matches {} sweeps: {}", candidates.len(), first(candidates))]
    AmbiguousSweep {
        /// As given.
        reference: String,
        /// The sweeps it matches, newest first.
        candidates: Vec<String>,
    },
    /// A reference to an artifact that matches none.
    #[error("no artifact matches `{reference}`")]
    NoArtifact {
        /// As given.
        reference: String,
    },
    /// A prefix that several artifacts share.
    #[error("`{reference}` matches {} artifacts: {}", candidates.len(), first(candidates))]
    AmbiguousArtifact {
        /// As given.
        reference: String,
        /// The artifacts it matches.
        candidates: Vec<String>,
    },
    /// An export target that is not an MLflow database.
    #[error("{} is no MLflow database: {message}", path.display())]
    NotMlflow {
        /// The file.
        path: PathBuf,
        /// Why not.
        message: String,
    },
    /// A filter has an unknown name, or an invalid comparison.
    #[error(transparent)]
    Filter(Box<FilterError>),
    /// A statement that found no row within the time limit.
    #[error("no row was found in {}", humantime::format_duration(*patience))]
    Endless {
        /// The time limit.
        patience: std::time::Duration,
    },
    /// A text with more than one statement.
    #[error("one statement at a time: another begins at `{more}`")]
    SeveralStatements {
        /// The first word of the next.
        more: String,
    },
    /// Any other error of SQLite.
    #[error("the store's database: {}", words(.0))]
    Sql(sqlx::Error),
}

/// What an error of SQLite says; of those about limits, what they mean here.
fn words(error: &sqlx::Error) -> String {
    let database = error.as_database_error();
    let code: Option<i32> = database.and_then(|error| error.code()?.parse().ok());
    match code {
        Some(libsqlite3_sys::SQLITE_TOOBIG) => format!(
            "a row is longer than {} MiB, which retort never writes: it is damaged, or another program wrote it",
            sandbox::LONGEST >> 20
        ),
        Some(libsqlite3_sys::SQLITE_NOMEM) => {
            "its rows do not fit in memory, of which reading may take 1 GiB".to_owned()
        }
        Some(libsqlite3_sys::SQLITE_INTERRUPT) => {
            "a statement took too long, and was ended".to_owned()
        }
        _ => error.to_string(),
    }
}

fn first(candidates: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = if candidates.len() > SHOWN {
        ", ..."
    } else {
        ""
    };
    format!(
        "{}{more}",
        candidates[..candidates.len().min(SHOWN)].join(", ")
    )
}

impl From<sqlx::Error> for StoreError {
    /// Classifies an error of SQLite; the caller adds the path where it matters.
    fn from(error: sqlx::Error) -> Self {
        let Some(database) = error.as_database_error() else {
            return match error {
                sqlx::Error::PoolTimedOut => Self::Busy,
                error => Self::Sql(error),
            };
        };
        let code: i32 = database
            .code()
            .and_then(|code| code.parse().ok())
            .unwrap_or_default();
        let message = database.message().to_owned();
        if matches!(code, WRITE_FAILED | NO_SHARED_MEMORY)
            && let Some(error) = file_limit::reached()
        {
            return error;
        }
        match (code, code & 0xff) {
            (NO_SHARED_MEMORY, _) | (_, 13) => Self::Full,
            (_, 5 | 6) => Self::Busy,
            (_, 11) => Self::Damaged { message },
            _ => Self::Sql(error),
        }
    }
}

impl StoreError {
    /// The same, with SQLite's errors about a file translated to what they mean for the database at `path`.
    pub(super) fn at(self, path: &std::path::Path) -> Self {
        let error = match self {
            Self::Sql(error) => error,
            // Of the open files, another may be equally near the limit.
            error @ (Self::Full | Self::FileTooLong { .. }) => {
                return file_limit::reached_by(path).unwrap_or(error);
            }
            error => return error,
        };
        let Some(database) = error.as_database_error() else {
            return Self::Sql(error);
        };
        let code: i32 = database
            .code()
            .and_then(|code| code.parse().ok())
            .unwrap_or_default();
        let message = database.message().to_owned();
        if code == WRITE_FAILED
            && let Some(error) = file_limit::reached_by(path)
        {
            return error;
        }
        match code & 0xff {
            8 => Self::ReadOnly {
                path: path.parent().unwrap_or(path).to_owned(),
            },
            26 => Self::NotAStore {
                path: path.to_owned(),
                message,
            },
            // SQLite does not say why; the file system does.
            14 => match std::fs::File::options().append(true).open(path) {
                Err(source) => Self::refused(path, source),
                Ok(_) => Self::ReadOnly {
                    path: path.parent().unwrap_or(path).to_owned(),
                },
            },
            _ => Self::Sql(error),
        }
    }

    /// SQLite's message, if the disk with the history has failed.
    pub fn of_disk(&self) -> Option<&str> {
        let Self::Sql(error) = self else {
            return None;
        };
        let database = error.as_database_error()?;
        let code: i32 = database.code()?.parse().ok()?;
        // Only those I/O errors that concern reading and writing: the others concern locks and permissions.
        let of_disk = [
            libsqlite3_sys::SQLITE_IOERR_READ,
            libsqlite3_sys::SQLITE_IOERR_WRITE,
            libsqlite3_sys::SQLITE_IOERR_FSYNC,
            libsqlite3_sys::SQLITE_IOERR_DIR_FSYNC,
            libsqlite3_sys::SQLITE_IOERR_TRUNCATE,
            libsqlite3_sys::SQLITE_IOERR_FSTAT,
            libsqlite3_sys::SQLITE_IOERR_CORRUPTFS,
            libsqlite3_sys::SQLITE_IOERR_DATA,
        ];
        of_disk.contains(&code).then(|| database.message())
    }

    /// The same error for a write to the file at `path`, outside the store.
    pub(super) fn of_disk_with(self, path: &std::path::Path) -> Self {
        match self {
            Self::Full => Self::FullElsewhere {
                path: path.to_owned(),
            },
            error => error,
        }
    }

    /// The meaning of a file system error for `path`, in the store's directory.
    pub(crate) fn refused(path: &std::path::Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{
            PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
        };
        match source.kind() {
            StorageFull | QuotaExceeded => Self::Full,
            PermissionDenied | ReadOnlyFilesystem => Self::ReadOnly {
                path: path.parent().unwrap_or(path).to_owned(),
            },
            _ => Self::Io {
                path: path.to_owned(),
                source,
            },
        }
    }
}
