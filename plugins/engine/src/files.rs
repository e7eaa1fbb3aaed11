//! Files of artifacts and of work directories: atomic writes, JSON, copies, locks, and paths from recipes.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result};

/// The most bytes of a configuration.
pub const CONFIG_MOST: u64 = 1 << 20;
/// How often to retry a lock that another process holds.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Writes a file under a temporary name first, so that the path always holds a complete file.
pub fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = path.with_extension("partial");
    write(&partial)?;
    sync(&partial)?;
    std::fs::rename(&partial, path).map_err(Error::io(path))
}

/// Writes what the system still holds of a file or folder to the disk.
fn sync(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(Error::io(path))
}

/// Keeps other processes on this machine from making the same file at the same time. Locks need not work across machines, and
/// some file systems have none.
#[derive(Debug)]
pub struct MakeLock {
    _lock: Option<File>,
    /// Whether this process knows that it is the only one on this machine.
    alone: bool,
}

impl MakeLock {
    /// For a process without others beside it.
    pub fn undisputed() -> Self {
        Self {
            _lock: None,
            alone: true,
        }
    }

    /// For a process that others may work beside: their unfinished files are left alone.
    pub fn shared() -> Self {
        Self {
            _lock: None,
            alone: false,
        }
    }

    /// Waits for the lock on a file as long as `go_on` allows.
    pub fn wait(path: &Path, go_on: impl Fn() -> Result<()>) -> Result<Self> {
        let file = File::create(path).map_err(Error::io(path))?;
        loop {
            match file.try_lock() {
                Ok(()) => {
                    return Ok(Self {
                        _lock: Some(file),
                        alone: true,
                    });
                }
                Err(TryLockError::WouldBlock) => {
                    go_on()?;
                    std::thread::sleep(LOOK_AGAIN);
                }
                Err(TryLockError::Error(error)) if has_no_locks(&error) => {
                    return Ok(Self::shared());
                }
                Err(TryLockError::Error(error)) => return Err(Error::io(path)(error)),
            }
        }
    }
}

/// Whether the error means that the file system has no locks.
fn has_no_locks(error: &io::Error) -> bool {
    const NO_LOCKS: i32 = 37;
    error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(NO_LOCKS)
}

/// Makes a file or a directory that processes on other machines may be making too. Each writes under its own temporary name;
/// the first complete one gets the path and stays, so nobody reads half of one. Returns the result of `write` in any case.
pub fn make_once<T>(
    path: &Path,
    lock: &MakeLock,
    write: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let own = format!("{name}.{}-", machine());
    if lock.alone {
        remove_partial(path, &own)?;
    }
    let partial = path.with_file_name(format!("{own}{}.partial", std::process::id()));
    let made = write(&partial).and_then(|made| {
        publish(&partial, path)?;
        Ok(made)
    });
    let _ = remove(&partial);
    made
}

/// Renames the complete file or directory to its path, unless that exists.
fn publish(partial: &Path, path: &Path) -> Result<()> {
    let published = if partial.is_dir() {
        for entry in fs::read_dir(partial).map_err(Error::io(partial))? {
            sync(&entry.map_err(Error::io(partial))?.path())?;
        }
        fs::rename(partial, path)
    } else {
        sync(partial)?;
        match fs::hard_link(partial, path) {
            // Without hard links the last of two simultaneous writers wins; both files are equal.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => fs::rename(partial, path),
            linked => linked,
        }
    };
    match published {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(())
        }
        published => published.map_err(Error::io(path)),
    }
}

/// Removes leftovers of processes on this machine whose names have this prefix.
fn remove_partial(path: &Path, begin: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(begin) && name.ends_with(".partial") {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// A name for this machine, until it is rebooted.
pub(crate) fn machine() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let name: String = boot
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(8)
        .collect();
    match name.is_empty() {
        true => "host".into(),
        false => name,
    }
}

/// Removes a file or a directory if it is there.
pub fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

/// What `read` finds at the path of something that is made once. If that is there and cannot be read, it is removed: it is
/// incomplete, and nobody is making it, because a file or folder appears only when it is complete.
pub fn read_or_remove<T>(path: &Path, read: impl FnOnce() -> Option<T>) -> Result<Option<T>> {
    let is_there = path.exists();
    let found = read();
    if is_there && found.is_none() {
        remove(path)?;
    }
    Ok(found)
}

/// Pretty JSON into a file.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Internal(e.to_string()))?;
    std::fs::write(path, text + "\n").map_err(Error::io(path))
}

/// A copy under another name, by hard link where the file system can.
pub fn link(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to)
        .or_else(|_| std::fs::copy(from, to).map(drop))
        .map_err(Error::io(from))
}

/// Resolves a path as written in a recipe.
pub fn resolve(base: &Path, path: &str) -> PathBuf {
    base.join(path)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The entries of a directory, sorted.
    pub(crate) fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn write(path: &Path, text: &str) -> Result<()> {
        fs::write(path, text).map_err(Error::io(path))
    }

    #[test]
    fn what_another_machine_has_made_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("a.npy"), dir.path().join("images"));
        let lock = MakeLock::undisputed();
        make_once(&file, &lock, |partial| {
            write(&file, "theirs")?;
            write(partial, "ours")
        })
        .unwrap();
        make_once(&folder, &lock, |partial| {
            fs::create_dir(&folder).map_err(Error::io(&folder))?;
            write(&folder.join("x"), "theirs")?;
            fs::create_dir(partial).map_err(Error::io(partial))?;
            write(&partial.join("y"), "ours")
        })
        .unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "theirs");
        assert_eq!(names(&folder), ["x"]);
        assert_eq!(names(dir.path()), ["a.npy", "images"]);
    }

    #[test]
    fn what_cannot_be_read_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.npy");
        let read = || {
            fs::read_to_string(&file)
                .ok()
                .filter(|text| text == "whole")
        };
        assert_eq!(read_or_remove(&file, read).unwrap(), None);
        write(&file, "whole").unwrap();
        assert_eq!(read_or_remove(&file, read).unwrap().unwrap(), "whole");
        assert!(file.exists());
        write(&file, "half").unwrap();
        assert_eq!(read_or_remove(&file, read).unwrap(), None);
        assert!(!file.exists());
    }

    #[test]
    fn only_leftovers_of_this_machine_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.npy");
        let (ours, theirs) = (
            format!("a.npy.{}-1.partial", machine()),
            "a.npy.00-1.partial",
        );
        fs::create_dir(dir.path().join(&ours)).unwrap();
        write(&dir.path().join(&ours).join("x"), "begun").unwrap();
        write(&dir.path().join(theirs), "begun").unwrap();
        let without_locks = MakeLock::shared();
        let failed = make_once(&file, &without_locks, |partial| {
            write(partial, "x")?;
            Err::<(), _>(Error::Cancelled)
        });
        assert!(matches!(failed, Err(Error::Cancelled)));
        assert_eq!(names(dir.path()).len(), 2);
        let lock = MakeLock::wait(&dir.path().join("a.lock"), || Ok(())).unwrap();
        make_once(&file, &lock, |partial| write(partial, "whole")).unwrap();
        assert_eq!(names(dir.path()), ["a.lock", "a.npy", theirs]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "whole");
    }
}
