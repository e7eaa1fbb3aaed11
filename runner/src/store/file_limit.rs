//! Whether a file of the store could not grow because the system lets no file of this process grow so long (`ulimit -f`).
//!
//! SQLite calls it an error of input or output, or a full disk, and names no file.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::StoreError;

/// The most that SQLite adds to a file with one write: a page with the header of its frame, a piece of the shared memory
/// of the write-ahead log. So much may be left below the limit of a file that could not grow.
const STEP: u64 = 65536;

/// The limit, and which of the files that are open has come to it.
pub(super) fn reached() -> Option<StoreError> {
    let limit = limit()?;
    let open = std::fs::read_dir("/proc/self/fd").ok()?.flatten();
    longest(open.map(|entry| entry.path()), limit).map(|path| StoreError::FileTooLong {
        path: std::fs::read_link(&path).unwrap_or(path),
        limit,
    })
}

/// The same of the database at `path` and what lies beside it, which may have been closed by now.
pub(super) fn reached_by(path: &Path) -> Option<StoreError> {
    let limit = limit()?;
    let beside = ["", "-wal", "-shm", "-journal"].map(|end| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    });
    longest(beside, limit).map(|path| StoreError::FileTooLong { path, limit })
}

/// The longest of these files, where it may have come to the limit.
fn longest(files: impl IntoIterator<Item = PathBuf>, limit: u64) -> Option<PathBuf> {
    let sizes = files.into_iter().filter_map(|path| {
        let file = std::fs::metadata(&path).ok().filter(|it| it.is_file())?;
        // What is longer than the limit was there before; it could not grow either, but nor is it what was written.
        (file.size() <= limit && limit - file.size() < STEP).then_some((file.size(), path))
    });
    sizes.max().map(|(_, path)| path)
}

/// The size in bytes that no file may be brought to exceed, where there is one.
fn limit() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes to the structure that it is given, and to nothing else.
    let done = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    (done == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}
