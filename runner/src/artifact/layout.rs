//! The layout of a store's directory, and locks on parts of it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;

use super::{ArtifactError, failed, make_dir};
use crate::artifact::ArtifactRecord;

/// The layout of a store's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    store: PathBuf,
}

impl Layout {
    /// The layout of the store in `dir`, made absolute, because workers may have another working directory.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn new(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            store: std::path::absolute(dir)?,
        })
    }

    /// Committed artifacts.
    pub fn artifacts(&self) -> PathBuf {
        self.store.join("artifacts")
    }

    /// One committed artifact.
    pub fn artifact(&self, hash: &str) -> PathBuf {
        self.artifacts().join(hash)
    }

    /// Staging directories of a run's attempts.
    pub fn staging(&self, run: &str) -> PathBuf {
        self.store.join("staging").join(run)
    }

    /// The work directory of a stage with this digest, which survives attempts.
    pub fn work(&self, digest: &str) -> PathBuf {
        self.store.join("work").join(digest)
    }

    /// Whether an artifact is in place, judged by the sizes of its files: cheap enough for every run. [`super::verify`]
    /// checks the content.
    pub fn holds(&self, record: &ArtifactRecord) -> bool {
        let dir = self.artifact(&record.hash);
        !record.files.is_empty()
            && record.files.iter().all(|file| {
                fs::symlink_metadata(dir.join(&file.path))
                    .is_ok_and(|found| found.is_file() && found.len() == file.size)
            })
    }

    /// Takes the staging directory of a run for this process, and removes those of dead runs.
    ///
    /// # Errors
    /// [`ArtifactError::Io`].
    pub fn open_staging(&self, run: &str) -> Result<Staging, ArtifactError> {
        let (root, dir) = (self.store.join("staging"), self.staging(run));
        make_dir(&root)?;
        // Fail now rather than after a stage has computed its result.
        make_dir(&self.artifacts())?;
        self.tidy();
        let lock_path = dir.with_extension("lock");
        let lock = loop {
            // Another process may briefly hold it while it checks whether there is anything to remove.
            if let Some(lock) = Lock::try_take(lock_path.clone())? {
                break lock;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        };
        fs::create_dir_all(&dir).map_err(failed("make", &dir))?;
        Ok(Staging {
            dir,
            lock: Some(lock),
        })
    }

    /// Removes leftovers of dead processes in `staging`, and their empty work directories.
    pub fn tidy(&self) {
        for dir in ["staging", "work"] {
            let Ok(entries) = fs::read_dir(self.store.join(dir)) else {
                continue;
            };
            let locks = entries.flatten().map(|entry| entry.path());
            for path in locks.filter(|path| path.extension() == Some("lock".as_ref())) {
                // A lock is released when its process ends, in whatever way.
                let Ok(Some(lock)) = Lock::try_take(path.clone()) else {
                    continue;
                };
                let owned = path.with_extension("");
                let _ = match dir {
                    "staging" => fs::remove_dir_all(&owned),
                    _ => fs::remove_dir(&owned),
                };
                if !owned.exists() {
                    lock.remove();
                }
            }
        }
    }

    /// Takes the work directory of a digest for this process; `None` while another process has it.
    ///
    /// # Errors
    /// [`ArtifactError::Io`].
    pub fn open_work(&self, digest: &str) -> Result<Option<WorkDir>, ArtifactError> {
        let dir = self.work(digest);
        let root = self.store.join("work");
        make_dir(&root)?;
        let Some(lock) = Lock::try_take(dir.with_extension("lock"))? else {
            return Ok(None);
        };
        fs::create_dir_all(&dir).map_err(failed("make", &dir))?;
        Ok(Some(WorkDir {
            dir,
            lock: Some(lock),
        }))
    }
}

/// The staging directory of a run; removed, with everything in it, when dropped.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    lock: Option<Lock>,
}

impl Staging {
    /// The directory for one attempt; not yet there.
    pub fn attempt(&self, attempt: impl std::fmt::Display) -> PathBuf {
        self.dir.join(attempt.to_string())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
        if let Some(lock) = self.lock.take() {
            lock.remove();
        }
    }
}

/// The work directory of a digest, held by this process.
#[derive(Debug)]
pub struct WorkDir {
    dir: PathBuf,
    lock: Option<Lock>,
}

impl WorkDir {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Removes it: the stage has succeeded, so there is nothing to resume.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // If there is nothing to resume, nothing is left behind.
        let _ = fs::remove_dir(&self.dir);
        if !self.dir.exists()
            && let Some(lock) = self.lock.take()
        {
            lock.remove();
        }
    }
}

/// A lock on a file, released at the latest when the process ends.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes the lock, making its file; `None` while another process has it.
    fn try_take(path: PathBuf) -> Result<Option<Self>, ArtifactError> {
        loop {
            let file = open_lock(&path).map_err(failed("make", &path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
            }
            // The previous holder may have removed the file between our opening and locking it.
            let ours = file.metadata().map_err(failed("read", &path))?.ino();
            if fs::metadata(&path).is_ok_and(|found| found.ino() == ours) {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }

    /// Removes the file and releases the lock, in this order.
    fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Opens a file for locking, and creates it if necessary. Anything else at the path is neither waited for, followed nor
/// changed.
///
/// # Errors
/// It cannot be made, or is no regular file.
pub fn open_lock(path: &Path) -> io::Result<File> {
    if let Ok(found) = fs::symlink_metadata(path) {
        regular::expect_regular(&found)?;
    }
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    regular::expect_regular(&file.metadata()?)?;
    Ok(file)
}
