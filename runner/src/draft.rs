//! Files and folders under way: made beside their place under a name that nobody has, and moved there once they are whole.
//!
//! What a command is told to write takes the place of a file once it is whole; only what is no file, such as
//! `/dev/stdout`, is written as it is.
//!
//! Nothing is written over and nothing is removed that was not made here: the name is made exclusively, whatever lies
//! beside it. What is not finished is removed. Deliberately absent: artifacts, which have a staging of their own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use retort_checkpoint::regular;

/// A file or folder under way.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    target: PathBuf,
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
        if !parent.as_os_str().is_empty() {
            fs::create_dir_all(parent)?;
        }
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
                    return Ok((Self { path, target }, made));
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
    pub fn finish(self) -> io::Result<()> {
        fs::rename(&self.path, &self.target)
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
    // A link stays one.
    let target = match found {
        Some(_) => fs::canonicalize(target)?,
        None => target.to_owned(),
    };
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
        assert_eq!(names(root.path()), ["folder", "link", "new", "pipe"]);
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
