//! Artifacts: directories of files, named by their content.
//!
//! In: a staging directory that a plugin has filled. Out: `artifacts/<hash>`, complete or not there at all: files are
//! synced and hashed before one `rename` makes them visible. The hash is BLAKE3 over the sorted list of (relative path,
//! size, hash of the file). Deliberately absent: records about artifacts (the store's), and what the files mean.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;

use crate::draft::Draft;
use crate::input;
use crate::store::{ArtifactFile, ArtifactRecord};

/// What to do about an artifact that is damaged.
pub const REPAIR: &str = "`retort artifacts verify` names the files; remove the artifact's directory, and a run of the recipe that \
    made it makes it again";

/// [`REPAIR`], where a message is about a file within an artifact: nobody writes there, so something has damaged it.
pub fn repair_of(message: &str) -> Option<&'static str> {
    let is_hash = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mut places = message.match_indices("artifacts/");
    places
        .any(|(place, found)| {
            let rest = &message[place + found.len()..];
            rest.get(..64).is_some_and(is_hash) && rest.get(64..65) == Some("/")
        })
        .then_some(REPAIR)
}

/// Where things lie in a store's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    store: PathBuf,
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Hex BLAKE3 of the list of files.
    pub hash: String,
    /// Bytes of all files.
    pub size: u64,
    /// The files, sorted by path.
    pub files: Vec<ArtifactFile>,
}

/// Why files could not be made an artifact, or be hashed.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The file system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `sync`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A directory entry that is neither file nor directory.
    #[error("{} is a {kind}: an artifact holds files and directories only", path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A name that other systems could not read.
    #[error("the name of {} is not UTF-8", path.display())]
    Name {
        /// The entry.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("the artifact has no files")]
    Empty,
}

/// A difference between an artifact's record and what lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// Path within the artifact.
    pub path: String,
    /// `missing`, `changed`, `added`, or why it could not be read.
    pub problem: String,
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
    /// [`verify`] asks in earnest.
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
    pub fn open_work(&self, digest: &str) -> Result<Option<Work>, ArtifactError> {
        let dir = self.work(digest);
        let root = self.store.join("work");
        make_dir(&root)?;
        let Some(lock) = Lock::try_take(dir.with_extension("lock"))? else {
            return Ok(None);
        };
        fs::create_dir_all(&dir).map_err(failed("make", &dir))?;
        Ok(Some(Work {
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
pub struct Work {
    dir: PathBuf,
    lock: Option<Lock>,
}

impl Work {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Removes it: the stage has succeeded, there is nothing to take up again.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Drop for Work {
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

/// Makes the files in `staging` an artifact under `artifacts`, and returns what it holds. Afterwards `staging` is gone.
///
/// # Errors
/// [`ArtifactError`]; then nothing is visible under `artifacts`, and `staging` is as it was.
pub fn commit(staging: &Path, artifacts: &Path) -> Result<Contents, ArtifactError> {
    let contents = seal(staging)?;
    let place = artifacts.join(&contents.hash);
    if place.exists() {
        let whole = contents.files.iter().all(|file| {
            fs::symlink_metadata(place.join(&file.path))
                .is_ok_and(|found| found.is_file() && found.len() == file.size)
        });
        if whole {
            fs::remove_dir_all(staging).map_err(failed("remove", staging))?;
            return Ok(contents);
        }
        // Somebody damaged it: the whole one takes its place.
        let aside = Draft::folder(&place).map_err(failed("make", &place))?;
        let damaged = aside.path().join("damaged");
        fs::rename(&place, damaged).map_err(failed("move", &place))?;
    }
    publish(staging, &contents.hash, artifacts)?;
    Ok(contents)
}

/// Hashes the files in `staging`, syncs them and makes them read-only: what [`publish`] may then make visible.
///
/// # Errors
/// [`ArtifactError`].
pub fn seal(staging: &Path) -> Result<Contents, ArtifactError> {
    let contents = contents(staging)?;
    if contents.files.is_empty() {
        return Err(ArtifactError::Empty);
    }
    for file in &contents.files {
        seal_file(&staging.join(&file.path))?;
    }
    sync_dirs(staging)?;
    Ok(contents)
}

/// Makes what was sealed visible under its hash, unless another process has just done so. Afterwards `staging` is gone.
///
/// # Errors
/// [`ArtifactError::Io`].
pub fn publish(staging: &Path, hash: &str, artifacts: &Path) -> Result<(), ArtifactError> {
    make_dir(artifacts)?;
    let place = artifacts.join(hash);
    let moved = match fs::rename(staging, &place) {
        // The artifacts lie on another disk.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            let moved = carry(staging, &place)?;
            if moved.is_ok() {
                fs::remove_dir_all(staging).map_err(failed("remove", staging))?;
            }
            moved
        }
        moved => moved,
    };
    match moved {
        Ok(()) => {}
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
            ) =>
        {
            fs::remove_dir_all(staging).map_err(failed("remove", staging))?;
        }
        Err(error) => return Err(failed("move", staging)(error)),
    }
    sync(artifacts)
}

/// Copies the files of an artifact to the disk of its place, and moves them there once they are all written. What the
/// move comes to is the inner result.
fn carry(staging: &Path, place: &Path) -> Result<io::Result<()>, ArtifactError> {
    let draft = Draft::folder(place).map_err(failed("make", place))?;
    copy_files(staging, draft.path())?;
    sync_dirs(draft.path())?;
    Ok(draft.finish())
}

/// Copies the files of one directory into another, and syncs them.
fn copy_files(from: &Path, to: &Path) -> Result<(), ArtifactError> {
    for entry in fs::read_dir(from).map_err(failed("read", from))? {
        let entry = entry.map_err(failed("read", from))?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if from.is_dir() {
            fs::create_dir(&to).map_err(failed("make", &to))?;
            copy_files(&from, &to)?;
            continue;
        }
        fs::copy(&from, &to).map_err(failed("write", &to))?;
        sync(&to)?;
    }
    Ok(())
}

/// What a directory holds. Empty directories do not count.
///
/// # Errors
/// [`ArtifactError`]: something cannot be read, is a link or a device, or has a name that is not UTF-8.
pub fn contents(dir: &Path) -> Result<Contents, ArtifactError> {
    let mut files = Vec::new();
    walk(dir, dir, &mut |name, path, size| {
        files.push(ArtifactFile {
            path: name.to_owned(),
            size,
            hash: file_hash(path)?,
        });
        Ok(())
    })?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(Contents {
        hash: list_hash(&files),
        size: files.iter().map(|file| file.size).sum(),
        files,
    })
}

/// Hex BLAKE3 of a sorted list of files: the hash of the artifact that holds them.
pub fn list_hash(files: &[ArtifactFile]) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        // No path holds a NUL, and the numbers are text: no two lists write the same bytes.
        hasher.update(format!("{}\0{}\0{}\n", file.path, file.size, file.hash).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Whether a path leads to something within a directory: relative, without `..`, written in the one way there is, and
/// without characters that play tricks with terminals.
pub fn is_inner_path(path: &str) -> bool {
    let normal = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255;
    path.len() <= 4096 && !path.chars().any(char::is_control) && path.split('/').all(normal)
}

/// A name from the history as the name of a file: one that leads nowhere else, and another for every other name.
pub fn file_name(name: &str) -> String {
    let is_plain = |c: char| !c.is_control() && !matches!(c, '/' | '\\');
    let plain: String = name
        .chars()
        .map(|c| if is_plain(c) { c } else { '_' })
        .take(60)
        .collect();
    match plain == name && !matches!(name, "" | "." | "..") {
        true => plain,
        // Two names that became alike are told apart.
        false => format!(
            "{}-{}",
            plain.replace('.', "_"),
            &blake3::hash(name.as_bytes()).to_hex()[..8]
        ),
    }
}

/// Opens a file of an artifact in `dir`: a regular file within it, to which no link leads.
///
/// # Errors
/// It is not there, or it is something else.
pub fn open_inner(dir: &Path, path: &str) -> io::Result<File> {
    if !is_inner_path(path) {
        return Err(io::Error::other("its path leads out of the artifact"));
    }
    let mut place = dir.to_owned();
    for part in Path::new(path) {
        if fs::symlink_metadata(&place)?.is_symlink() {
            return Err(io::Error::other("a symbolic link leads to it"));
        }
        place.push(part);
    }
    let check = |found: fs::Metadata| match found.file_type() {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_symlink() => Err(io::Error::other("it is a symbolic link")),
        _ => Err(io::Error::other("it is no regular file")),
    };
    check(fs::symlink_metadata(&place)?)?;
    // Without waiting and without following: something else may have been put there meanwhile.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&place)?;
    check(file.metadata()?)?;
    Ok(file)
}

/// Hex BLAKE3 of a file's bytes.
///
/// # Errors
/// [`ArtifactError::Io`].
pub fn file_hash(path: &Path) -> Result<String, ArtifactError> {
    let file = regular::open(path).map_err(failed("open", path))?;
    let hash = input::content_hash(file).map_err(failed("read", path))?;
    Ok(hash.to_hex().to_string())
}

/// Compares an artifact in `dir` with its record, byte by byte. Empty: it is as it was made.
pub fn verify(dir: &Path, record: &ArtifactRecord) -> Vec<Damage> {
    let damage = |path: &str, problem: String| Damage {
        path: path.to_owned(),
        problem,
    };
    if !dir.is_dir() {
        return vec![damage("", "missing".into())];
    }
    let mut found = Vec::new();
    for file in &record.files {
        let hash = open_inner(dir, &file.path).and_then(|found| {
            // One of another size is another file, however long it is.
            if found.metadata()?.len() != file.size {
                return Ok(None);
            }
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(found)?;
            Ok(Some(hasher.finalize().to_hex().to_string()))
        });
        match hash {
            Ok(Some(hash)) if hash == file.hash => {}
            Ok(_) => found.push(damage(&file.path, "changed".into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                found.push(damage(&file.path, "missing".into()));
            }
            Err(error) => found.push(damage(&file.path, error.to_string())),
        }
    }
    let known: HashSet<&str> = record.files.iter().map(|file| file.path.as_str()).collect();
    let mut added = Vec::new();
    let walked = walk(dir, dir, &mut |name, _, _| {
        added.extend((!known.contains(name)).then(|| name.to_owned()));
        Ok(())
    });
    match walked {
        Ok(()) => {
            added.sort();
            found.extend(added.iter().map(|path| damage(path, "added".into())));
        }
        Err(error) if found.is_empty() => found.push(damage("", error.to_string())),
        Err(_) => {}
    }
    found
}

/// Shows every file below `dir`: its path within `root`, where it lies, its size.
fn walk(
    root: &Path,
    dir: &Path,
    look: &mut impl FnMut(&str, &Path, u64) -> Result<(), ArtifactError>,
) -> Result<(), ArtifactError> {
    for entry in fs::read_dir(dir).map_err(failed("read", dir))? {
        let path = entry.map_err(failed("read", dir))?.path();
        let metadata = fs::symlink_metadata(&path).map_err(failed("read", &path))?;
        if metadata.is_dir() {
            walk(root, &path, look)?;
            continue;
        }
        if !metadata.is_file() {
            let kind = if metadata.is_symlink() {
                "symbolic link"
            } else {
                "special file"
            };
            return Err(ArtifactError::Kind { path, kind });
        }
        match path.strip_prefix(root).ok().and_then(Path::to_str) {
            Some(name) => look(name, &path, metadata.len())?,
            None => return Err(ArtifactError::Name { path }),
        }
    }
    Ok(())
}

/// Syncs a file and makes it read-only, so that no later stage changes it by mistake.
fn seal_file(path: &Path) -> Result<(), ArtifactError> {
    sync(path)?;
    let mode = fs::metadata(path)
        .map_err(failed("read", path))?
        .permissions()
        .mode();
    fs::set_permissions(path, fs::Permissions::from_mode(mode & !0o222))
        .map_err(failed("protect", path))
}

fn sync_dirs(dir: &Path) -> Result<(), ArtifactError> {
    for entry in fs::read_dir(dir).map_err(failed("read", dir))? {
        let path = entry.map_err(failed("read", dir))?.path();
        if path.is_dir() {
            sync_dirs(&path)?;
        }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<(), ArtifactError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(failed("sync", path))
}

/// Makes a directory of the store where it is missing. Something else in its place is named.
fn make_dir(path: &Path) -> Result<(), ArtifactError> {
    fs::create_dir_all(path).map_err(|error| {
        let kind = match fs::metadata(path) {
            Ok(found) => regular::kind(found.file_type()),
            Err(_) if path.is_symlink() => "a link that leads nowhere",
            Err(_) => return failed("make", path)(error),
        };
        let message = format!("it is {kind}, not a directory");
        let error = io::Error::new(io::ErrorKind::NotADirectory, message);
        failed("use", path)(error)
    })
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> ArtifactError {
    let path = path.to_owned();
    move |source| ArtifactError::Io {
        action,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use retort_abi::ArtifactMeta;

    #[test]
    fn only_a_message_about_a_file_in_an_artifact_says_how_to_mend_one() {
        let hash = "0123456789abcdef".repeat(4);
        let within =
            |name: &str| format!("/store/artifacts/{name}/config.json: expected value at line 1");
        assert_eq!(repair_of(&within(&hash)), Some(REPAIR));
        let twice = format!("artifacts/x: {}", within(&hash));
        assert_eq!(repair_of(&twice), Some(REPAIR));
        for other in [
            &within(&hash[1..]),
            &within("größe"),
            "/data/artifacts/",
            "no artifact",
            &hash,
        ] {
            assert_eq!(repair_of(other), None, "{other}");
        }
        assert_eq!(repair_of(&format!("artifacts/{hash}")), None);
    }

    fn filled(root: &Path, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let dir = root.join(name);
        fs::create_dir_all(&dir).unwrap();
        for (path, text) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    fn record(contents: &Contents) -> ArtifactRecord {
        ArtifactRecord {
            hash: contents.hash.clone(),
            kind: "k".into(),
            name: "n".into(),
            size: contents.size,
            files: contents.files.clone(),
            meta: ArtifactMeta::default(),
        }
    }

    #[test]
    fn a_lock_that_nobody_holds_is_tidied_up() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path()).unwrap();
        let held = layout.open_work("held").unwrap().unwrap();
        fs::remove_dir(held.path()).unwrap();
        let work = root.path().join("work");
        // A runner that was killed left this one; that one guards something to take up again.
        fs::write(work.join("idle.lock"), "").unwrap();
        fs::write(work.join("needed.lock"), "").unwrap();
        fs::create_dir(work.join("needed")).unwrap();
        fs::write(work.join("needed/checkpoint"), "").unwrap();
        layout.tidy();
        let there = |name: &str| work.join(name).exists();
        assert!(there("held.lock") && there("needed.lock") && !there("idle.lock"));
    }

    #[test]
    fn the_hash_is_of_paths_and_bytes() {
        let root = tempfile::tempdir().unwrap();
        let hash = |name: &str, files: &[(&str, &str)]| {
            contents(&filled(root.path(), name, files)).unwrap().hash
        };
        let reference = hash("a", &[("x", "1"), ("d/y", "2")]);
        assert_eq!(reference, hash("b", &[("d/y", "2"), ("x", "1")]));
        assert_ne!(reference, hash("c", &[("x", "1"), ("d/z", "2")]));
        assert_ne!(reference, hash("d", &[("x", "1"), ("d/y", "3")]));
    }

    #[test]
    fn names_from_the_history_lead_nowhere() {
        for plain in ["codes", "größte", "a.b", "x y"] {
            assert_eq!(file_name(plain), plain);
        }
        let odd = [
            "",
            ".",
            "..",
            "../../x",
            "/",
            "a/b",
            "a_b/",
            "\x1b[2J",
            "a\0b",
            "\\",
            &"x".repeat(999),
        ];
        let names: Vec<String> = odd.iter().map(|name| file_name(name)).collect();
        for (name, odd) in names.iter().zip(odd) {
            assert!(is_inner_path(name) && !name.contains('/'), "{name}");
            assert_ne!(name, odd);
            assert_eq!(names.iter().filter(|other| *other == name).count(), 1);
        }
    }

    #[test]
    fn only_files_within_an_artifact_are_opened() {
        let root = tempfile::tempdir().unwrap();
        let dir = filled(root.path(), "a", &[("x", "1"), ("d/y", "2")]);
        fs::write(root.path().join("secret"), "3").unwrap();
        std::os::unix::fs::symlink(root.path().join("secret"), dir.join("link")).unwrap();
        std::os::unix::fs::symlink(root.path(), dir.join("up")).unwrap();
        let pipe =
            std::ffi::CString::new(dir.join("pipe").into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
        for path in ["x", "d/y"] {
            assert!(open_inner(&dir, path).is_ok(), "{path}");
        }
        let secret = root.path().join("secret");
        let refused = [
            "../secret",
            "link",
            "up/secret",
            "pipe",
            "d",
            "d/../x",
            "",
            secret.to_str().unwrap(),
        ];
        for path in refused {
            assert!(open_inner(&dir, path).is_err(), "{path}");
        }
    }

    #[test]
    fn committing_moves_once_and_again() {
        let root = tempfile::tempdir().unwrap();
        let artifacts = root.path().join("artifacts");
        let first = commit(
            &filled(root.path(), "a", &[("x", "1"), ("d/y", "2")]),
            &artifacts,
        )
        .unwrap();
        let place = artifacts.join(&first.hash);
        assert_eq!(
            (
                first.size,
                fs::read_to_string(place.join("d/y")).unwrap().as_str()
            ),
            (2, "2")
        );
        assert_eq!(
            first,
            commit(
                &filled(root.path(), "b", &[("x", "1"), ("d/y", "2")]),
                &artifacts
            )
            .unwrap()
        );
        assert!(!root.path().join("a").exists() && !root.path().join("b").exists());
        assert!(verify(&place, &record(&first)).is_empty());

        fs::remove_file(place.join("x")).unwrap();
        commit(
            &filled(root.path(), "c", &[("x", "1"), ("d/y", "2")]),
            &artifacts,
        )
        .unwrap();
        assert!(
            verify(&place, &record(&first)).is_empty(),
            "a damaged one is replaced"
        );
    }

    #[test]
    fn damage_is_named() {
        let root = tempfile::tempdir().unwrap();
        let artifacts = root.path().join("artifacts");
        let made = record(
            &commit(
                &filled(root.path(), "a", &[("x", "1"), ("y", "2"), ("z", "3")]),
                &artifacts,
            )
            .unwrap(),
        );
        let place = artifacts.join(&made.hash);
        fs::remove_file(place.join("x")).unwrap();
        fs::remove_file(place.join("y")).unwrap();
        fs::write(place.join("y"), "!").unwrap();
        // Longer than anybody waits for: its size says enough, and what is too many is not read either.
        fs::remove_file(place.join("z")).unwrap();
        for name in ["z", "new"] {
            let file = File::create(place.join(name)).unwrap();
            file.set_len(1 << 40).unwrap();
        }
        let found: Vec<_> = verify(&place, &made)
            .into_iter()
            .map(|damage| (damage.path, damage.problem))
            .collect();
        let expected = [
            ("x", "missing"),
            ("y", "changed"),
            ("z", "changed"),
            ("new", "added"),
        ];
        assert_eq!(
            found,
            expected.map(|(path, problem)| (path.to_owned(), problem.to_owned()))
        );
        assert_eq!(
            verify(&root.path().join("nowhere"), &made)[0].problem,
            "missing"
        );
    }

    #[test]
    fn only_files_make_an_artifact() {
        let root = tempfile::tempdir().unwrap();
        let artifacts = root.path().join("artifacts");
        let linked = filled(root.path(), "a", &[("x", "1")]);
        std::os::unix::fs::symlink("/etc/passwd", linked.join("link")).unwrap();
        assert!(matches!(
            commit(&linked, &artifacts),
            Err(ArtifactError::Kind { .. })
        ));
        assert!(matches!(
            commit(&filled(root.path(), "b", &[]), &artifacts),
            Err(ArtifactError::Empty)
        ));
        assert!(!artifacts.exists(), "nothing became visible");
    }

    #[test]
    fn staging_of_dead_runs_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path()).unwrap();
        let alive = layout.open_staging("alive").unwrap();
        fs::create_dir_all(layout.staging("dead").join("1")).unwrap();
        fs::write(root.path().join("staging/dead.lock"), "").unwrap();
        let _mine = layout.open_staging("mine").unwrap();
        assert!(
            !layout.staging("dead").exists() && !root.path().join("staging/dead.lock").exists()
        );
        assert!(layout.staging("alive").exists() && layout.staging("mine").exists());
        drop(alive);
        assert!(!layout.staging("alive").exists());
    }

    #[test]
    fn a_work_directory_has_one_owner_and_survives_unless_empty() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::new(root.path()).unwrap();
        let work = layout.open_work("d").unwrap().unwrap();
        assert!(layout.open_work("d").unwrap().is_none());
        fs::write(work.path().join("checkpoint"), "1").unwrap();
        drop(work);
        let again = layout.open_work("d").unwrap().unwrap();
        assert!(again.path().join("checkpoint").exists());
        again.remove();
        assert_eq!(fs::read_dir(root.path().join("work")).unwrap().count(), 0);
        drop(layout.open_work("e").unwrap());
        assert_eq!(fs::read_dir(root.path().join("work")).unwrap().count(), 0);
    }
}
