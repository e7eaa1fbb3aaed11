//! Temporary files and folders: made beside their target under a unique name, and renamed once they are complete.
//!
//! What a command is told to write takes the place of a file once it is whole; only what is no file, such as
//! `/dev/stdout`, is written as it is.
//!
//! Nothing else is overwritten or removed: the name is created exclusively, whatever lies
//! beside it. What is not finished is removed. Deliberately absent: artifacts, which have a staging of their own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use retort_checkpoint::regular;

/// A temporary file or folder.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    target: PathBuf,
    /// Folders that were made for it.
    folders: CreatedPaths,
}

/// Files and folders that this process has made, removed when dropped unless they are kept. Of a folder in which
/// something else lies by then, nothing is removed.
#[derive(Debug, Default)]
pub struct CreatedPaths(Vec<PathBuf>);

impl CreatedPaths {
    /// Makes a folder where there is none, and those that it lies in.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn folder(&mut self, path: &Path) -> io::Result<()> {
        let missing: Vec<&Path> = path
            .ancestors()
            .take_while(|folder| !folder.as_os_str().is_empty() && !folder.is_dir())
            .collect();
        for folder in missing.into_iter().rev() {
            match fs::create_dir(folder) {
                Ok(()) => self.0.push(folder.to_owned()),
                // Another process was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if !folder.is_dir() {
                        let message = format!("{} is not a folder", folder.display());
                        return Err(io::Error::new(io::ErrorKind::NotADirectory, message));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes a file, and makes its folder. One that was there stays as it was until the whole of the new one is written.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn file(
        &mut self,
        path: &Path,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            self.folder(folder)?;
        }
        let path = &place(path)?;
        let is_new = fs::symlink_metadata(path).is_err();
        let (draft, mut file) = Draft::file(path)?;
        write(&mut file)?;
        file.sync_all()?;
        draft.finish()?;
        if is_new {
            self.0.push(path.to_owned());
        }
        Ok(())
    }

    /// All of it stays.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for CreatedPaths {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = match fs::symlink_metadata(path) {
                Ok(found) if found.is_dir() => fs::remove_dir(path),
                Ok(_) => fs::remove_file(path),
                Err(_) => Ok(()),
            };
        }
    }
}

impl Draft {
    /// An empty folder that is to be `target`, whose parents are made where they are missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn folder(target: &Path) -> io::Result<Self> {
        Self::new(target, |path| fs::create_dir(path)).map(|(draft, ())| draft)
    }

    /// An empty file that is to be `target`, open for writing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn file(target: &Path) -> io::Result<(Self, File)> {
        Self::new(target, |path| File::create_new(path))
    }

    fn new<T>(target: &Path, make: impl Fn(&Path) -> io::Result<T>) -> io::Result<(Self, T)> {
        let parent = target.parent().unwrap_or(Path::new(""));
        let mut folders = CreatedPaths::default();
        folders.folder(parent)?;
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        for attempt in 0..1000 {
            let mut unique = OsString::from(".");
            unique.push(name);
            let number = now.subsec_nanos() + attempt;
            unique.push(format!(".{}-{number:x}", std::process::id()));
            let path = parent.join(unique);
            match make(&path) {
                Ok(made) => {
                    let target = target.to_owned();
                    let draft = Self {
                        path,
                        target,
                        folders,
                    };
                    return Ok((draft, made));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Where it is for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves it to its place. A file takes the place of another; a folder only that of an empty one.
    ///
    /// # Errors
    /// It cannot be moved; then it is removed.
    pub fn finish(mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.target)?;
        std::mem::take(&mut self.folders).keep();
        Ok(())
    }
}

/// The place of a file that is to be replaced, or made: where a link leads, because a link stays one.
///
/// # Errors
/// Something lies there that is no file, and would be gone.
pub fn place(target: &Path) -> io::Result<PathBuf> {
    match fs::metadata(target) {
        Ok(found) => {
            regular::expect_regular(&found)?;
            fs::canonicalize(target)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(target.to_owned()),
        Err(error) => Err(error),
    }
}

/// Writes a file that somebody named: what was there stays as it was until the whole of it is written. A pipe or a device
/// is written to, but nobody waits for a reader. No folder is made: one that is not there is a mistake in the name.
///
/// # Errors
/// It cannot be written, its folder is not there, or it is a pipe that nobody reads.
pub fn write(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let found = match fs::metadata(target) {
        Ok(found) => Some(found.file_type()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if let Some(kind) = found.filter(|kind| !kind.is_file()) {
        if kind.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(target)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENXIO) => {
                    let message = format!("it is {} that nobody reads", regular::kind(kind));
                    io::Error::new(io::ErrorKind::InvalidInput, message)
                }
                _ => error,
            })?;
        // There is a reader, who takes what comes at his pace.
        return File::options().write(true).open(target)?.write_all(bytes);
    }
    let target = place(target)?;
    let folder = target.parent().unwrap_or(Path::new(""));
    if !folder.as_os_str().is_empty() && !folder.is_dir() {
        let message = format!("there is no folder {}", folder.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    let (draft, mut file) = Draft::file(&target)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    draft.finish()
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Where it was finished there is nothing of this name any more.
        let _ = match fs::symlink_metadata(&self.path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&self.path),
            Ok(_) => fs::remove_file(&self.path),
            Err(_) => Ok(()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_finished_is_there_and_what_is_not_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/b.v2");
        let draft = Draft::folder(&target).unwrap();
        fs::write(draft.path().join("x"), "1").unwrap();
        assert!(!target.exists());
        draft.finish().unwrap();
        assert_eq!(
            (names(&root.path().join("a")), names(&target)),
            (vec!["b.v2".to_owned()], vec!["x".to_owned()])
        );
        let again = Draft::folder(&target).unwrap();
        fs::write(again.path().join("y"), "1").unwrap();
        again.finish().unwrap_err();
        assert_eq!(
            names(&target),
            ["x"],
            "a folder with something in it is not replaced"
        );
        assert_eq!(names(&root.path().join("a")), ["b.v2"]);
        let (draft, file) = Draft::file(&target).unwrap();
        assert_eq!(names(&root.path().join("a")).len(), 2);
        drop((draft, file));
        assert_eq!(names(&root.path().join("a")), ["b.v2"]);
    }

    #[test]
    fn what_is_written_takes_the_place_of_a_file_and_of_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        write(&at("new"), b"1").unwrap();
        std::os::unix::fs::symlink("new", at("link")).unwrap();
        write(&at("link"), b"2").unwrap();
        assert_eq!(fs::read(at("new")).unwrap(), b"2");
        assert!(at("link").is_symlink());
        fs::create_dir(at("folder")).unwrap();
        let error = write(&at("folder"), b"3").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
        let made = std::process::Command::new("mkfifo")
            .arg(at("pipe"))
            .status();
        assert!(made.unwrap().success());
        let error = write(&at("pipe"), b"4").unwrap_err().to_string();
        assert_eq!(error, "it is a named pipe that nobody reads");
        let pipe = at("pipe");
        let reader = File::options().read(true).write(true).open(&pipe).unwrap();
        write(&pipe, b"5").unwrap();
        let mut read = [0];
        io::Read::read_exact(&mut &reader, &mut read).unwrap();
        assert_eq!(&read, b"5");
        write(Path::new("/dev/null"), b"6").unwrap();
        let error = write(Path::new("/dev/full"), b"7").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(
            place(&at("link")).unwrap(),
            fs::canonicalize(at("new")).unwrap()
        );
        assert_eq!(place(&at("none")).unwrap(), at("none"));
        let mut made = CreatedPaths::default();
        for name in ["folder", "pipe", "/dev/null"] {
            let said = place(&at(name)).unwrap_err().to_string();
            assert!(said.contains("not a regular file"), "{name}: {said}");
            made.file(&at(name), |file| file.write_all(b"8"))
                .unwrap_err();
        }
        assert_eq!(names(root.path()), ["folder", "link", "new", "pipe"]);
    }

    #[test]
    fn what_was_made_goes_unless_it_is_kept_and_nothing_else_does() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let text = |text: &'static str| move |file: &mut File| file.write_all(text.as_bytes());
        fs::create_dir(at("mine")).unwrap();
        fs::write(at("mine/old"), "1").unwrap();
        let make = |made: &mut CreatedPaths| {
            made.file(&at("mine/old"), text("2")).unwrap();
            made.file(&at("mine/new"), text("2")).unwrap();
            made.file(&at("a/b/c"), text("2")).unwrap();
            made.file(&at("a/d/e"), text("2")).unwrap();
            // Half of it, and the disk is full.
            let error = made.file(&at("a/f/g"), |file| {
                file.write_all(b"2")?;
                Err(io::ErrorKind::StorageFull.into())
            });
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::StorageFull);
        };
        let mut made = CreatedPaths::default();
        make(&mut made);
        fs::write(at("a/d/of others"), "3").unwrap();
        drop(made);
        assert_eq!(names(root.path()), ["a", "mine"]);
        assert_eq!(names(&at("mine")), ["old"]);
        assert_eq!(
            (names(&at("a")), names(&at("a/d"))),
            (vec!["d".into()], vec!["of others".into()])
        );
        let mut made = CreatedPaths::default();
        make(&mut made);
        made.keep();
        assert_eq!(
            (names(&at("mine")), names(&at("a/b"))),
            (vec!["new".into(), "old".into()], vec!["c".into()])
        );
        // A draft that is given up leaves no folders either.
        drop(Draft::file(&at("x/y/z")).unwrap());
        drop(Draft::folder(&at("x/y/z")).unwrap());
        assert_eq!(names(root.path()), ["a", "mine"]);
    }

    #[test]
    fn two_drafts_of_one_target_do_not_meet() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("t");
        let drafts: Vec<_> = (0..20).map(|_| Draft::folder(&target).unwrap()).collect();
        assert_eq!(names(root.path()).len(), 20);
        drop(drafts);
        assert!(names(root.path()).is_empty());
    }
}
