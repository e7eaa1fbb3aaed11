//! The layout of a store's directory, and the locks on exclusive parts of it.

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
    /// The layout of the store in `dir`, made absolute: workers may have another working directory.
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

    /// What survives attempts at a stage with this digest.
    pub fn work(&self, digest: &str) -> PathBuf {
        self.store.join("work").join(digest)
    }

    /// Whether an artifact lies in its place, going by the sizes of its files: cheap enough to ask at every run.
    /// [`super::verify`] asks in earnest.
    pub fn holds(&self, record: &ArtifactRecord) -> bool {
        let dir = self.artifact(&record.hash);
        !record.files.is_empty()
            && record.files.iter().all(|file| {
                fs::symlink_metadata(dir.join(&file.path))
                    .is_ok_and(|found| found.is_file() && found.len() == file.size)
            })
    }

    /// Takes the staging directory of a run for this process, and removes what dead runs have left.
    ///
    /// # Errors
    /// [`ArtifactError::Io`].
    pub fn open_staging(&self, run: &str) -> Result<Staging, ArtifactError> {
        let (root, dir) = (self.store.join("staging"), self.staging(run));
        make_dir(&root)?;
        // Now, and not when a stage has computed its result.
        make_dir(&self.artifacts())?;
        self.tidy();
        let lock_path = dir.with_extension("lock");
        let lock = loop {
            // Another process may hold it for the moment it takes to see that nothing is to be removed.
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

    /// Removes what processes that are gone left in `staging`, and their work directories with nothing in them.
    pub fn tidy(&self) {
        for dir in ["staging", "work"] {
            let Ok(entries) = fs::read_dir(self.store.join(dir)) else {
                continue;
            };
            let locks = entries.flatten().map(|entry| entry.path());
            for path in locks.filter(|path| path.extension() == Some("lock".as_ref())) {
                // A lock ends with its process, however that ended.
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

    /// Removes it: the stage has succeeded, there is nothing to take up again.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // Without anything to take up again it leaves nothing behind.
        let _ = fs::remove_dir(&self.dir);
        if !self.dir.exists()
            && let Some(lock) = self.lock.take()
        {
            lock.remove();
        }
    }
}

/// A lock on a file, which ends with the process at the latest.
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
            // The one who had it before may have removed the file between our opening and our locking it.
            let ours = file.metadata().map_err(failed("read", &path))?.ino();
            if fs::metadata(&path).is_ok_and(|found| found.ino() == ours) {
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }

    /// Removes the file and gives the lock back, in this order.
    fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Opens a file to be locked, making it if need be. Whatever else lies there is not waited for, followed or changed.
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
