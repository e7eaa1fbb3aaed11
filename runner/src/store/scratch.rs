//! Temporary directories, tied to the process that uses them.
//!
//! Next to each is a file that its process keeps locked. The lock ends with the process, however that ends. So a directory
//! whose lock can be taken was left by a killed process; the next process that works in the same place removes it.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Name prefix of imports' directories.
pub(super) const IMPORT: &str = ".retort-import-";
/// Name prefix of exports' directories.
pub(super) const EXPORT: &str = ".retort-export-";

/// A directory of this process, for its owner alone; removed, with everything in it, when dropped.
#[derive(Debug)]
pub(super) struct ScratchDir {
    dir: PathBuf,
    lock: PathBuf,
    _held: File,
}

impl ScratchDir {
    /// A new one in `parent`. Removes what dead processes have left there.
    pub(super) fn new(parent: &Path, prefix: &str) -> io::Result<Self> {
        for (dir, lock, _held) in abandoned(parent, prefix) {
            remove(&dir, &lock);
        }
        loop {
            // The standard library's hash keys are the operating system's random numbers.
            let chance = std::hash::RandomState::new().build_hasher().finish();
            let dir = parent.join(format!("{prefix}{chance:016x}"));
            let lock = lock_of(&dir);
            let held = match File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&lock)
            {
                Ok(held) => held,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            // Between the two calls another process may have taken it for a leftover and removed it.
            if !take(&held, &lock)? {
                continue;
            }
            let made = DirBuilder::new().mode(0o700).create(&dir);
            return match made {
                Ok(()) => Ok(Self {
                    dir,
                    lock,
                    _held: held,
                }),
                Err(error) => {
                    let _ = fs::remove_file(&lock);
                    Err(error)
                }
            };
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        remove(&self.dir, &self.lock);
    }
}

/// The directories in `parent` whose process is dead, and its other files there. They are only listed: the locks taken to find
/// out are released again.
pub(super) fn leftovers(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let found = abandoned(parent, prefix);
    found
        .into_iter()
        .flat_map(|(dir, lock, _)| [dir, lock])
        .filter(|path| path.symlink_metadata().is_ok())
        .collect()
}

/// Directories, their lock files, and the locks, which are now held.
fn abandoned(parent: &Path, prefix: &str) -> Vec<(PathBuf, PathBuf, File)> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let ours = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.starts_with(prefix) && name.ends_with(".lock"))
            && entry.file_type().is_ok_and(|kind| kind.is_file())
    });
    ours.filter_map(|entry| {
        let lock = entry.path();
        let held = File::open(&lock).ok()?;
        take(&held, &lock)
            .ok()?
            .then(|| (lock.with_extension(""), lock, held))
    })
    .collect()
}

/// Tries to lock an open file. Returns whether that succeeded, and the file still has this name.
fn take(file: &File, path: &Path) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(false),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let ours = file.metadata()?.ino();
    Ok(fs::symlink_metadata(path).is_ok_and(|found| found.ino() == ours))
}

/// Removes the directory first: without its lock file it would never be found again.
fn remove(dir: &Path, lock: &Path) {
    // No link is followed, and only a directory is removed.
    if fs::symlink_metadata(dir).is_ok_and(|found| found.is_dir()) {
        let _ = fs::remove_dir_all(dir);
    }
    if dir.symlink_metadata().is_err() {
        let _ = fs::remove_file(lock);
    }
}

fn lock_of(dir: &Path) -> PathBuf {
    let mut lock = dir.as_os_str().to_owned();
    lock.push(".lock");
    lock.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_left_goes_and_what_is_in_use_stays() {
        let place = tempfile::tempdir().unwrap();
        let used = ScratchDir::new(place.path(), EXPORT).unwrap();
        // A process that was killed: directory and lock file are there, the lock is not.
        let dead = place.path().join(format!("{EXPORT}dead"));
        fs::create_dir_all(dead.join("deep")).unwrap();
        fs::write(lock_of(&dead), "").unwrap();
        // Similar entries that are not ours: without a lock, with another prefix, or a link.
        let kept = [".retort-export-mine", "other"].map(|name| place.path().join(name));
        for dir in &kept {
            fs::create_dir(dir).unwrap();
        }
        let link = place.path().join(format!("{EXPORT}link"));
        std::os::unix::fs::symlink(&kept[1], &link).unwrap();
        fs::write(lock_of(&link), "").unwrap();
        assert_eq!(leftovers(place.path(), EXPORT).len(), 4);
        assert_eq!(leftovers(place.path(), IMPORT).len(), 0);

        let other = ScratchDir::new(place.path(), EXPORT).unwrap();
        assert!(!dead.exists() && !lock_of(&dead).exists());
        assert!(used.path().is_dir() && other.path().is_dir());
        assert!(kept.iter().all(|dir| dir.is_dir()));
        drop((used, other));
        let mut left: Vec<_> = fs::read_dir(place.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let link = ".retort-export-link";
        assert_eq!(
            left,
            [
                link,
                &format!("{link}.lock"),
                ".retort-export-mine",
                "other"
            ]
        );
    }
}
