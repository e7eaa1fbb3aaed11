//! Detects that a file of the store could not grow because of the limit on the size of files (`ulimit -f`).
//!
//! SQLite reports an I/O error or a full disk, and names no file.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::StoreError;

/// The most that SQLite adds to a file with one write: a page with the header of its frame, a piece of the shared memory of
/// the write-ahead log. So a file that could not grow may be this far below the limit.
const STEP: u64 = 65536;

/// The limit, and the open file that has reached it.
pub(super) fn reached() -> Option<StoreError> {
    let limit = limit()?;
    let open = std::fs::read_dir("/proc/self/fd").ok()?.flatten();
    longest(open.map(|entry| entry.path()), limit).map(|path| StoreError::FileTooLong {
        path: std::fs::read_link(&path).unwrap_or(path),
        limit,
    })
}

/// The same for the database at `path` and the files that SQLite keeps next to it, which may be closed by now.
pub(super) fn reached_by(path: &Path) -> Option<StoreError> {
    let limit = limit()?;
    let beside = ["", "-wal", "-shm", "-journal"].map(|end| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    });
    longest(beside, limit).map(|path| StoreError::FileTooLong { path, limit })
}

/// The longest of these files, if it may have reached the limit.
fn longest(files: impl IntoIterator<Item = PathBuf>, limit: u64) -> Option<PathBuf> {
    let sizes = files.into_iter().filter_map(|path| {
        let file = std::fs::metadata(&path).ok().filter(|it| it.is_file())?;
        // A file beyond the limit existed before; it could not grow either, but is not the one being written.
        (file.size() <= limit && limit - file.size() < STEP).then_some((file.size(), path))
    });
    sizes.max().map(|(_, path)| path)
}

/// The maximum file size in bytes, if there is one.
fn limit() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes to the structure that it is given, and to nothing else.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    (done == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}
