//! Temporary files and folders: made beside their target under a unique name, and renamed once they are complete.
//!
//! A command's output replaces an existing file only when it is complete, and only a file of the same kind ([`OutputKind`]);
//! anything that is not a regular file, such as `/dev/stdout`, is written directly.
//!
//! Nothing else is overwritten or removed: the temporary name is created exclusively. Unfinished drafts are removed. A killed
//! process leaves its draft behind, recognisable by its name and by a lock that nobody holds ([`abandoned`]). Deliberately
//! absent: artifacts, which have their own staging.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;

/// A temporary file or folder.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
    target: PathBuf,
    /// Folders created for it.
    folders: CreatedPaths,
    /// Locked while this process works on it.
    _held: File,
}

/// The part of a draft's name between the target's name and [`own_machine`] with eight more digits.
const MARK: &str = ".retort-";
/// Bytes of a target's name that are kept in the draft's name.
const LONGEST_NAME: usize = 200;

/// Files and folders created by this process, removed when dropped unless they are kept. A folder with other contents is not
/// removed.
#[derive(Debug, Default)]
pub struct CreatedPaths(Vec<PathBuf>);

impl CreatedPaths {
    /// Creates a folder and its parents if they are missing.
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

    /// Writes a file, and creates its folder. An existing file is kept until the new one is complete.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn file(
        &mut self,
        path: &Path,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> io::Result<()> {
        let (draft, mut file) = self.begin(path)?;
        write(&mut file)?;
        self.finish(draft, &file)
    }

    /// Begins a file, and creates its folder: [`Self::finish`] renames it to its target.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn begin(&mut self, path: &Path) -> io::Result<(Draft, File)> {
        if let Some(folder) = path.parent() {
            self.folder(folder)?;
        }
        Draft::file(&place(path)?)
    }

    /// Renames the finished file to its target, replacing an existing one.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(&mut self, draft: Draft, file: &File) -> io::Result<()> {
        let path = draft.target.clone();
        let is_new = fs::symlink_metadata(&path).is_err();
        file.sync_all()?;
        draft.finish()?;
        if is_new {
            self.0.push(path);
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
    /// An empty folder that will become `target`; missing parents are created.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn folder(target: &Path) -> io::Result<Self> {
        let make = |path: &Path| fs::create_dir(path).and_then(|()| File::open(path));
        Self::new(target, make).map(|(draft, _)| draft)
    }

    /// An empty file that will become `target`, open for writing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn file(target: &Path) -> io::Result<(Self, File)> {
        Self::new(target, |path| File::create_new(path))
    }

    fn new(target: &Path, make: impl Fn(&Path) -> io::Result<File>) -> io::Result<(Self, File)> {
        let parent = target.parent().unwrap_or(Path::new(""));
        let mut folders = CreatedPaths::default();
        folders.folder(parent)?;
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let name = &name.as_bytes()[..name.len().min(LONGEST_NAME)];
        for _ in 0..1000 {
            // The standard library's hash keys are the operating system's random numbers.
            let chance = std::hash::RandomState::new().build_hasher().finish() as u32;
            let digits = format!("{MARK}{}{chance:08x}", own_machine());
            let unique = [b".", name, digits.as_bytes()].concat();
            let path = parent.join(OsStr::from_bytes(&unique));
            match make(&path) {
                Ok(made) => {
                    match made.try_lock() {
                        Ok(()) if is_of(&path, &made) => {}
                        // Between the two calls another process has taken it for an abandoned one, and removes it.
                        Ok(()) => continue,
                        // Or only examines it: it is empty.
                        Err(TryLockError::WouldBlock) => {
                            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
                            continue;
                        }
                        // On a file system without locks nobody can take it for abandoned.
                        Err(TryLockError::Error(_)) => {}
                    }
                    let draft = Self {
                        path,
                        target: target.to_owned(),
                        folders,
                        _held: made.try_clone()?,
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

    /// Renames it to its target. A file may replace another; a folder only an empty one.
    ///
    /// # Errors
    /// It cannot be renamed; then it is removed.
    pub fn finish(mut self) -> io::Result<()> {
        fs::rename(&self.path, &self.target)?;
        std::mem::take(&mut self.folders).keep();
        Ok(())
    }
}

/// Whether an open file is the one with this name.
fn is_of(path: &Path, file: &File) -> bool {
    let of = |found: &fs::Metadata| (found.dev(), found.ino());
    matches!((fs::symlink_metadata(path), file.metadata()), (Ok(there), Ok(open)) if of(&there) == of(&open))
}

/// Eight digits of this machine's name. Locks may not work across machines, so drafts of other machines are left alone.
fn own_machine() -> String {
    let name = fs::read("/proc/sys/kernel/hostname").unwrap_or_default();
    blake3::hash(&name).to_hex()[..8].to_owned()
}

/// Drafts in a folder left by killed processes of this user on this machine, each with its lock, now held.
fn left_in(folder: &Path) -> Vec<(PathBuf, File)> {
    let mark = format!("{MARK}{}", own_machine());
    let has_name = |name: &[u8]| {
        let (head, digits) = name.split_at(name.len().saturating_sub(8));
        let is_digits = digits.iter().all(u8::is_ascii_hexdigit);
        name.starts_with(b".") && head.ends_with(mark.as_bytes()) && is_digits
    };
    // SAFETY: a plain system call that cannot fail.
    let user = unsafe { libc::geteuid() };
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter(|entry| has_name(entry.file_name().as_bytes()));
    named
        .filter_map(|entry| {
            let path = entry.path();
            let found = fs::symlink_metadata(&path).ok()?;
            if found.uid() != user || !(found.is_dir() || found.is_file()) {
                return None;
            }
            let held = File::options()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
                .ok()?;
            (held.try_lock().is_ok() && is_of(&path, &held)).then_some((path, held))
        })
        .collect()
}

/// The drafts that killed processes left in a folder.
pub fn abandoned(folder: &Path) -> Vec<PathBuf> {
    left_in(folder).into_iter().map(|(path, _)| path).collect()
}

/// Removes them.
pub fn tidy(folder: &Path) {
    for (path, _held) in left_in(folder) {
        let _ = match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
    }
}

/// The path of a file to be replaced or created: for a link its target, so that the link is kept.
///
/// # Errors
/// Something other than a file is there, and would be lost.
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

/// What a command writes to a path given by a user. It replaces a file of this kind, or an empty one; any other file there is
/// one that the user did not mean.
#[derive(Debug, Clone, Copy)]
pub struct OutputKind {
    /// What such a file is called.
    pub name: &'static str,
    /// The first bytes of each such file; of one without a mark none.
    pub head: &'static str,
}

impl OutputKind {
    /// Refuses to replace a file of another kind.
    fn check(self, path: &Path) -> io::Result<()> {
        let mut head = Vec::new();
        // One byte shows whether it is empty.
        let most = self.head.len().max(1) as u64;
        regular::open(path)?.take(most).read_to_end(&mut head)?;
        if head.is_empty() || head == self.head.as_bytes() {
            return Ok(());
        }
        let message = format!("only {} is replaced, and this is none", self.name);
        Err(io::Error::new(io::ErrorKind::AlreadyExists, message))
    }
}

/// An output path given by a user: a file, or a pipe or device, which is opened right away.
#[derive(Debug)]
pub struct Target {
    path: PathBuf,
    special: Option<File>,
}

impl Target {
    /// Checks that it is writable. A pipe or a device is opened without waiting for a reader. No folder is created: a missing
    /// one is a mistake in the name.
    ///
    /// # Errors
    /// It is a directory or a pipe without a reader, or its folder is missing. A file of another kind is there
    /// ([`io::ErrorKind::AlreadyExists`]).
    pub fn open(path: &Path, kind: OutputKind) -> io::Result<Self> {
        let found = match fs::metadata(path) {
            Ok(found) => Some(found.file_type()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if let Some(kind) = found.filter(|kind| !kind.is_file()) {
            return Ok(Self {
                path: path.to_owned(),
                special: Some(special(path, kind)?),
            });
        }
        if found.is_some() {
            kind.check(path)?;
        }
        let path = place(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        if !folder.as_os_str().is_empty() && !folder.is_dir() {
            let message = format!("there is no folder {}", folder.display());
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
        Ok(Self {
            path,
            special: None,
        })
    }

    /// Writes it; an existing file is kept until the new one is complete.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(self, bytes: &[u8]) -> io::Result<()> {
        if let Some(mut special) = self.special {
            // There is a reader, which may be slow.
            return special.write_all(bytes);
        }
        let (draft, mut file) = Draft::file(&self.path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        draft.finish()
    }
}

/// Opens a pipe or device for writing.
fn special(path: &Path, kind: fs::FileType) -> io::Result<File> {
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let opened = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENXIO) => {
                let message = format!("it is {} that nobody reads", regular::kind(kind));
                io::Error::new(io::ErrorKind::InvalidInput, message)
            }
            _ => error,
        })?;
    // SAFETY: plain system calls on a descriptor that is open, and nobody else's.
    unsafe {
        let flags = libc::fcntl(opened.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(opened.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK);
    }
    Ok(opened)
}

/// Writes to a user's output path through [`Target`].
///
/// # Errors
/// Those of [`Target::open`] and [`Target::write`].
pub fn write(target: &Path, kind: OutputKind, bytes: &[u8]) -> io::Result<()> {
    Target::open(target, kind)?.write(bytes)
}

impl Drop for Draft {
    fn drop(&mut self) {
        // If it was finished, nothing with this name exists any more.
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

    const NUMBERS: OutputKind = OutputKind {
        name: "a file of numbers",
        head: "n=",
    };

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
    fn a_draft_replaces_only_files() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let write = |path: &Path, text: &str| write(path, NUMBERS, text.as_bytes());
        write(&at("new"), "n=1").unwrap();
        std::os::unix::fs::symlink("new", at("link")).unwrap();
        write(&at("link"), "n=2").unwrap();
        assert_eq!(fs::read(at("new")).unwrap(), b"n=2");
        fs::write(at("mine"), "").unwrap();
        write(&at("mine"), "n=3").unwrap();
        // Another file is not, not even a shorter one, nor one that a link leads to.
        std::os::unix::fs::symlink("mine", at("way")).unwrap();
        for text in ["n", "mine"] {
            fs::write(at("mine"), text).unwrap();
            for name in ["mine", "way"] {
                let error = write(&at(name), "n=4").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
                assert_eq!(
                    error.to_string(),
                    "only a file of numbers is replaced, and this is none"
                );
                assert_eq!(fs::read_to_string(at("mine")).unwrap(), text);
            }
        }
        fs::remove_file(at("way")).unwrap();
        fs::remove_file(at("mine")).unwrap();
        assert!(at("link").is_symlink());
        fs::create_dir(at("folder")).unwrap();
        let error = write(&at("folder"), "3").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::IsADirectory);
        let made = std::process::Command::new("mkfifo")
            .arg(at("pipe"))
            .status();
        assert!(made.unwrap().success());
        let error = write(&at("pipe"), "4").unwrap_err().to_string();
        assert_eq!(error, "it is a named pipe that nobody reads");
        let pipe = at("pipe");
        let reader = File::options().read(true).write(true).open(&pipe).unwrap();
        write(&pipe, "5").unwrap();
        let mut read = [0];
        io::Read::read_exact(&mut &reader, &mut read).unwrap();
        assert_eq!(&read, b"5");
        write(Path::new("/dev/null"), "6").unwrap();
        let error = write(Path::new("/dev/full"), "7").unwrap_err();
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
        // An abandoned draft leaves no folders either.
        drop(Draft::file(&at("x/y/z")).unwrap());
        drop(Draft::folder(&at("x/y/z")).unwrap());
        assert_eq!(names(root.path()), ["a", "mine"]);
    }

    #[test]
    fn what_a_dead_process_left_is_known_and_nothing_else_is() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let used = Draft::folder(&at("used")).unwrap();
        let (file, open) = Draft::file(&at("written")).unwrap();
        // As left by a killed process.
        let digits = format!("{}89abcdef", own_machine());
        let dead = ["d", "f"].map(|name| at(&format!(".{name}.retort-{digits}")));
        fs::create_dir_all(dead[0].join("deep")).unwrap();
        fs::write(dead[0].join("deep/x"), "1").unwrap();
        fs::write(&dead[1], "1").unwrap();
        // What looks alike.
        let mine = [
            at(&format!("d.retort-{digits}")),
            at(&format!(".d.retort-{}", &digits[1..])),
            at(&format!(".d.retort-{digits}0")),
            at(&format!(".d.{digits}")),
            // Of another machine, whose locks may not be visible here.
            at(&format!(".d.retort-{:08x}89abcdef", !0u32)),
            at(".d.1234-5f"),
        ];
        for path in &mine {
            fs::create_dir(path).unwrap();
        }
        let link = at(&format!(".link.retort-{digits}"));
        std::os::unix::fs::symlink(&mine[0], &link).unwrap();
        let mut found = abandoned(root.path());
        found.sort();
        assert_eq!(found, dead);
        tidy(root.path());
        assert!(dead.iter().all(|path| !path.exists()));
        assert!(mine.iter().all(|path| path.is_dir()) && link.is_symlink());
        assert!(used.path().is_dir() && file.path().is_file());
        drop(open);
        assert!(
            abandoned(root.path()).is_empty(),
            "it is worked on although the file is closed"
        );
        file.finish().unwrap();
        used.finish().unwrap();
        // A name that leaves no room for more.
        let long = at(&"x".repeat(255));
        write(&long, NUMBERS, b"1").unwrap();
        assert_eq!(fs::read(&long).unwrap(), b"1");
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
