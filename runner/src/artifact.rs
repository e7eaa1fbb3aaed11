//! Artifacts: directories of files, named by their content.
//!
//! In: a staging directory filled by a plugin. Out: `artifacts/<hash>`, complete or absent: files are synced and hashed
//! before one `rename` makes them visible. The hash is BLAKE3 over the sorted list of (relative path, size, hash of the
//! file). Deliberately absent: records about artifacts (the store's), and the files' meaning.

mod layout;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use retort_abi::ArtifactMeta;
use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use crate::draft::Draft;
use crate::input;

pub use layout::{Layout, Staging, WorkDir, open_lock};

/// An artifact: its content and its metadata.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArtifactRecord {
    /// Hex BLAKE3 of its content; names its directory.
    pub hash: String,
    /// `tokenizer`, `student`, ...
    pub kind: String,
    /// The name its maker gave.
    pub name: String,
    /// Bytes of all files.
    pub size: u64,
    /// Its files, by path.
    pub files: Vec<ArtifactFile>,
    /// Its maker's metadata.
    pub meta: ArtifactMeta,
}

/// A file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactFile {
    /// Path within the artifact.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Hex BLAKE3.
    pub hash: String,
}

/// Advice for a damaged artifact.
pub const REPAIR: &str = "`retort artifacts verify` names the files; remove the artifact's directory, and a run of the recipe that \
    made it makes it again";

/// Advice about the limit on the size of files.
pub const FILE_LIMIT: &str = "`ulimit -f unlimited` in this shell lifts the limit on the size of files; where the system refuses, \
                              its administrator or the batch system has set it";

/// Advice for a file that the disk cannot read.
pub const DISK: &str = "its disk is failing: the kernel's messages (`dmesg`) say which one; copy what can still be read to another, \
    and fetch or make the rest again";

/// Whether a message contains the error number of a failing disk (EIO).
pub fn is_of_disk(message: &str) -> bool {
    message.contains("(os error 5)")
}

/// [`FILE_LIMIT`] if a file may not be that long; [`DISK`] if the disk fails; [`REPAIR`] if a message is about a file within an
/// artifact: nobody writes there, so it has been damaged.
pub fn repair_of(message: &str) -> Option<&'static str> {
    if message.contains(&format!("(os error {})", libc::EFBIG)) {
        return Some(FILE_LIMIT);
    }
    if is_of_disk(message) {
        return Some(DISK);
    }
    let mut places = message.match_indices("artifacts/");
    places
        .any(|(place, found)| {
            let rest = &message[place + found.len()..];
            rest.get(..64).is_some_and(is_hash) && rest.get(64..65) == Some("/")
        })
        .then_some(REPAIR)
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

/// Why files could not be published as an artifact, or hashed.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The file system refuses.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// The failed operation: `read`, `sync`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A directory entry that is neither a file nor a directory.
    #[error("{} is a {kind}: an artifact holds files and directories only", path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A name that is not UTF-8.
    #[error("the name of {} is not UTF-8", path.display())]
    Name {
        /// The entry.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("the artifact has no files")]
    Empty,
}

/// A difference between an artifact's record and its files on disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// Path within the artifact.
    pub path: String,
    /// `missing`, `changed`, `added`, or why it could not be read.
    pub problem: String,
}

/// Publishes the files in `staging` as an artifact under `artifacts`, and returns its contents. Afterwards `staging` is gone.
///
/// # Errors
/// [`ArtifactError`]; then nothing is visible under `artifacts`, and `staging` is unchanged.
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
        // The existing one was damaged: the intact one replaces it.
        let aside = Draft::folder(&place).map_err(failed("make", &place))?;
        let damaged = aside.path().join("damaged");
        fs::rename(&place, damaged).map_err(failed("move", &place))?;
    }
    publish(staging, &contents.hash, artifacts)?;
    Ok(contents)
}

/// Prepares `staging` for [`publish`]: hashes the files, syncs them and makes them read-only.
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

/// Publishes a sealed directory under its hash, unless another process has just done so. Afterwards `staging` is gone.
///
/// # Errors
/// [`ArtifactError::Io`].
pub fn publish(staging: &Path, hash: &str, artifacts: &Path) -> Result<(), ArtifactError> {
    make_dir(artifacts)?;
    let place = artifacts.join(hash);
    let moved = match fs::rename(staging, &place) {
        // The artifacts are on another disk.
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

/// Copies the files of an artifact to the target's disk, and renames them once all are written. The inner result is that of
/// the rename.
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

/// The contents of a directory, ignoring empty directories.
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
        // Paths contain no NUL, and the numbers are text, so different lists give different bytes.
        hasher.update(format!("{}\0{}\0{}\n", file.path, file.size, file.hash).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// Checks that a commit could have made this record: the hash must match the list of files.
///
/// # Errors
/// What is wrong, in words.
pub fn check_list(hash: &str, size: u64, files: &[ArtifactFile]) -> Result<(), String> {
    let brief =
        |text: &str| -> String { text.chars().take(80).flat_map(char::escape_debug).collect() };
    if !is_hash(hash) {
        return Err(format!("`{}` is not a hash", brief(hash)));
    }
    for file in files {
        if !is_inner_path(&file.path) {
            let path = brief(&file.path);
            return Err(format!("`{path}` is not a path within an artifact"));
        }
        if !is_hash(&file.hash) {
            return Err(format!("`{}` is not a hash", brief(&file.hash)));
        }
    }
    let sum = files
        .iter()
        .try_fold(0_u64, |sum, file| sum.checked_add(file.size));
    if sum != Some(size) || i64::try_from(size).is_err() {
        let sum = sum.map_or_else(
            || "more than can be counted".to_owned(),
            |sum| sum.to_string(),
        );
        return Err(format!(
            "artifact {hash} is recorded with {size} bytes, but the sizes of its files add up to {sum}"
        ));
    }
    let in_order = files.windows(2).all(|pair| pair[0].path < pair[1].path);
    match !files.is_empty() && in_order && list_hash(files) == hash {
        true => Ok(()),
        false => Err(format!(
            "the files of artifact {hash} are not what its hash says"
        )),
    }
}

/// Whether a path stays within a directory: relative, without `..`, in canonical form, and without characters that could
/// mislead a terminal.
pub fn is_inner_path(path: &str) -> bool {
    let normal = |part: &str| !matches!(part, "" | "." | "..") && part.len() <= 255;
    path.len() <= 4096 && !path.chars().any(char::is_control) && path.split('/').all(normal)
}

/// Whether a text is a hash in the form used by directories and the history: 64 digits and letters from a to f.
pub fn is_hash(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Turns a name from the history into a safe file name; different names give different file names.
pub fn file_name(name: &str) -> String {
    let is_plain = |c: char| !c.is_control() && !matches!(c, '/' | '\\');
    let plain: String = name
        .chars()
        .map(|c| if is_plain(c) { c } else { '_' })
        .take(60)
        .collect();
    match plain == name && !matches!(name, "" | "." | "..") {
        true => plain,
        // A suffix keeps names apart that would become equal.
        false => format!(
            "{}-{}",
            plain.replace('.', "_"),
            &blake3::hash(name.as_bytes()).to_hex()[..8]
        ),
    }
}

/// Opens a file of an artifact in `dir`: a regular file inside it, without following links.
///
/// # Errors
/// It is missing, or not a regular file.
pub fn open_inner(dir: &Path, path: &str) -> io::Result<File> {
    if !is_inner_path(path) {
        return Err(io::Error::other("its path leaves the artifact"));
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
        _ => Err(io::Error::other("not a regular file")),
    };
    check(fs::symlink_metadata(&place)?)?;
    // Without blocking and without following links: the path may have been replaced meanwhile.
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

/// Compares an artifact in `dir` with its record, byte by byte. The result is empty if it is intact.
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
            // A file of another size is not hashed, however long it is.
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

/// Calls back with every file below `dir`: its path within `root`, its location, its size.
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

/// Creates a directory of the store if it is missing. If something else is in its place, the error says so.
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
