//! Which files may be loaded: nobody else can change them, and a lock, if there is one, lists them.
//!
//! Loading a plugin runs its code with all rights of the user. So a file that others can replace is refused: it, and every
//! directory and link from the root to it, must belong to the user or to root and be writable by no one else. From a
//! directory with a `plugins.lock` only plugins whose BLAKE3 is in the lock are loaded; its lines have the format of `b3sum`,
//! `HASH  FILE`; an unreadable lock allows nothing. Deliberately absent: access lists beyond owner, group and others, and any
//! judgement of what a plugin does.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use retort_checkpoint::regular;

use crate::draft::Draft;

/// Name of the file with the hashes allowed in a directory.
pub const LOCK: &str = "plugins.lock";
/// Bytes of the longest lock that is read.
const LONGEST_LOCK: u64 = 1 << 20;
/// Links on the way to a plugin, at most, as for the kernel.
const MOST_LINKS: usize = 40;

/// Why a file is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// It cannot be looked at.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could change it.
    #[error(
        "the plugin {} is not loaded: {} {} {problem}, who could change what it does",
        plugin.display(), if *is_dir { "its directory" } else { "its file" }, path.display()
    )]
    Writable {
        /// The plugin.
        plugin: PathBuf,
        /// The file or directory at fault.
        path: PathBuf,
        /// Whether that is the directory.
        is_dir: bool,
        /// `is writable by everybody`
        problem: &'static str,
        /// The repair.
        repair: String,
    },
    /// The lock does not allow it.
    #[error("the plugin {} is not loaded: {}", plugin.display(), match known {
        Some(known) => format!("{} allows it with the hash {known}, and it has {hash}", lock.display()),
        None => format!("{} does not list it", lock.display()),
    })]
    Locked {
        /// The plugin.
        plugin: PathBuf,
        /// The lock.
        lock: PathBuf,
        /// The hash allowed under this name.
        known: Option<String>,
        /// The hash it has.
        hash: String,
    },
    /// The lock is no lock.
    #[error("{}:{line}: expected a BLAKE3 hash of 64 hex digits, two spaces and a file name", path.display())]
    NoLock {
        /// The lock.
        path: PathBuf,
        /// Where.
        line: usize,
    },
}

impl TrustError {
    /// What to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { .. } => None,
            Self::Writable { repair, .. } => Some(repair.clone()),
            Self::Locked { plugin, .. } => {
                let dir = plugin.parent().unwrap_or(plugin);
                Some(format!(
                    "if you trust it as it is now: retort plugin lock {}",
                    dir.display()
                ))
            }
            Self::NoLock { path, .. } => {
                let dir = path.parent().unwrap_or(path);
                Some(format!(
                    "`retort plugin lock {}` writes it anew",
                    dir.display()
                ))
            }
        }
    }
}

/// Refuses a plugin whose file, or a directory on the way to it, somebody else can change. Links are followed: all
/// directories count that lead to a link, and all that lead to the file.
///
/// # Errors
/// [`TrustError::Writable`] or [`TrustError::Io`].
pub fn check_owner(plugin: &Path) -> Result<(), TrustError> {
    places(plugin).map(drop)
}

/// The places of a plugin: its own, and that of the file where it is a link, with every link between them. Each has been
/// found to be safe.
fn places(plugin: &Path) -> Result<Vec<PathBuf>, TrustError> {
    let failed = |source| TrustError::Io {
        path: plugin.to_owned(),
        source,
    };
    let whole = std::path::absolute(plugin).map_err(failed)?;
    let mut here = PathBuf::from("/");
    let mut ahead: VecDeque<OsString> = parts(&whole);
    let (mut places, mut links) = (Vec::new(), 0);
    let top = fs::symlink_metadata(&here).map_err(failed)?;
    refuse(plugin, &here, &top, EntryKind::Other)?;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            here.pop();
            continue;
        }
        let path = here.join(&part);
        let found = fs::symlink_metadata(&path).map_err(failed)?;
        if ahead.is_empty() {
            // The sticky bit keeps others from replacing an entry, not from adding one.
            let dir = fs::symlink_metadata(&here).map_err(failed)?;
            refuse(plugin, &here, &dir, EntryKind::OwnDirectory)?;
            places.push(path.clone());
        }
        refuse(plugin, &path, &found, EntryKind::Other)?;
        if !found.is_symlink() {
            here = path;
            continue;
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(failed(io::Error::from_raw_os_error(libc::ELOOP)));
        }
        let target = fs::read_link(&path).map_err(failed)?;
        if target.is_absolute() {
            here = PathBuf::from("/");
        }
        for part in parts(&target).into_iter().rev() {
            ahead.push_front(part);
        }
    }
    Ok(places)
}

/// Names from the root, or from a directory; `..` is one.
fn parts(path: &Path) -> VecDeque<OsString> {
    let named = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    named.collect()
}

/// What an entry is to a plugin.
#[derive(Clone, Copy, PartialEq)]
enum EntryKind {
    /// The directory that holds it.
    OwnDirectory,
    /// Anything else on the way to it, or itself.
    Other,
}

/// Refuses what somebody else can change.
fn refuse(
    plugin: &Path,
    path: &Path,
    found: &fs::Metadata,
    kind: EntryKind,
) -> Result<(), TrustError> {
    // SAFETY: a plain system call that cannot fail.
    let user = unsafe { libc::geteuid() };
    let shown = path.display().to_string();
    let is_plain = found.is_file() || found.is_dir() || found.is_symlink();
    let (problem, repair) = match writer(found, user, kind) {
        None => return Ok(()),
        // Its rights are as they have to be.
        Some(OtherWriter::Everybody | OtherWriter::Group) if !is_plain => (
            "is a device or a pipe that others can write to",
            format!("put a regular file in the place of {}", plugin.display()),
        ),
        Some(OtherWriter::Everybody) => {
            ("is writable by everybody", format!("chmod o-w '{shown}'"))
        }
        Some(OtherWriter::Group) => ("is writable by its group", format!("chmod g-w '{shown}'")),
        Some(OtherWriter::Owner) => (
            "belongs to another user",
            format!("copy the plugin with `retort plugin install`, or: chown {user} '{shown}'"),
        ),
    };
    Err(TrustError::Writable {
        plugin: plugin.to_owned(),
        path: path.to_owned(),
        is_dir: found.is_dir(),
        problem,
        repair,
    })
}

#[derive(Debug, PartialEq)]
enum OtherWriter {
    Everybody,
    Group,
    Owner,
}

/// Who besides the user and root can write to something.
fn writer(found: &fs::Metadata, user: u32, kind: EntryKind) -> Option<OtherWriter> {
    if found.uid() != user && found.uid() != 0 {
        return Some(OtherWriter::Owner);
    }
    // A link's own rights mean nothing, and what lies in a sticky directory only its owner replaces.
    let sticky = found.is_dir() && found.mode() & 0o1000 != 0;
    if found.is_symlink() || (sticky && kind == EntryKind::Other) {
        return None;
    }
    if found.mode() & 0o002 != 0 {
        return Some(OtherWriter::Everybody);
    }
    // Where every user has a group of the same number with nobody else in it, umask 002 is usual and harmless.
    (found.mode() & 0o020 != 0 && found.gid() != found.uid()).then_some(OtherWriter::Group)
}

/// Refuses a plugin that the lock of its directory does not list with this hash; where it is a link, also that of the
/// file's directory. Without a lock everything passes.
///
/// # Errors
/// [`TrustError`].
pub fn check_lock(plugin: &Path, hash: &str) -> Result<(), TrustError> {
    for place in places(plugin)? {
        let Some(dir) = place.parent() else { continue };
        let Some(lock) = read_lock(dir)? else {
            continue;
        };
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let known = lock.get(&*name);
        if known.is_some_and(|known| known == hash) {
            continue;
        }
        return Err(TrustError::Locked {
            plugin: plugin.to_owned(),
            lock: dir.join(LOCK),
            known: known.cloned(),
            hash: hash.to_owned(),
        });
    }
    Ok(())
}

/// The hashes allowed in a directory, by file name; `None` when it has no lock. What is there and cannot be read allows
/// nothing.
///
/// # Errors
/// [`TrustError`].
pub fn read_lock(dir: &Path) -> Result<Option<BTreeMap<String, String>>, TrustError> {
    read_hashes(&dir.join(LOCK))
}

/// The hashes in a file like a lock, by name; `None` when it is not there.
///
/// # Errors
/// [`TrustError`].
pub fn read_hashes(path: &Path) -> Result<Option<BTreeMap<String, String>>, TrustError> {
    let path = path.to_owned();
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TrustError::Io { path, source }),
        Ok(_) => {}
    }
    let text = regular::read(&path, LONGEST_LOCK)
        .and_then(|bytes| String::from_utf8(bytes).map_err(io::Error::other));
    let text = match text {
        Ok(text) => text,
        Err(source) => return Err(TrustError::Io { path, source }),
    };
    check_owner(&path)?;
    let mut lock = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let entry = line.split_once("  ").filter(|(hash, name)| {
            hash.len() == 64
                && hash.bytes().all(|byte| byte.is_ascii_hexdigit())
                && !name.is_empty()
        });
        let Some((hash, name)) = entry else {
            return Err(TrustError::NoLock {
                path,
                line: number + 1,
            });
        };
        lock.insert(name.to_owned(), hash.to_ascii_lowercase());
    }
    Ok(Some(lock))
}

/// Writes the lock of a directory, in one step.
///
/// # Errors
/// [`TrustError::Io`].
pub fn write_lock(dir: &Path, hashes: &BTreeMap<String, String>) -> Result<(), TrustError> {
    write_hashes(&dir.join(LOCK), hashes)
}

/// Writes a file like a lock, in one step.
///
/// # Errors
/// [`TrustError::Io`].
pub fn write_hashes(path: &Path, hashes: &BTreeMap<String, String>) -> Result<(), TrustError> {
    let text: String = hashes
        .iter()
        .map(|(name, hash)| format!("{hash}  {name}\n"))
        .collect();
    let written = Draft::file(path).and_then(|(fresh, mut file)| {
        file.write_all(text.as_bytes())?;
        fresh.finish()
    });
    written.map_err(|source| TrustError::Io {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A file in a directory, with these permissions, and what is said about it.
    #[track_caller]
    fn check(dir_mode: u32, file_mode: u32, expected: Option<(bool, &str)>) {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("libretort_x.so");
        fs::write(&file, "").unwrap();
        // Another group than the user's own, where that is allowed (root's tests): the exception must not hide the rule.
        let _ = std::os::unix::fs::chown(&file, None, Some(12345));
        let _ = std::os::unix::fs::chown(root.path(), None, Some(12345));
        let foreign = fs::metadata(&file).unwrap().gid() == 12345;
        fs::set_permissions(&file, fs::Permissions::from_mode(file_mode)).unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(dir_mode)).unwrap();
        match (check_owner(&file), expected) {
            (Ok(()), None) => {}
            (Ok(()), Some((_, said))) if said.contains("group") && !foreign => {}
            (Err(error @ TrustError::Writable { is_dir: dir, .. }), Some((is_dir, said))) => {
                assert_eq!(dir, is_dir, "{error}");
                assert!(error.to_string().contains(said), "{error}");
                assert!(error.hint().unwrap().starts_with("chmod "), "{error}");
            }
            (found, expected) => panic!("{found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn what_others_can_write_is_refused() {
        check(0o755, 0o755, None);
        check(0o700, 0o600, None);
        check(0o755, 0o646, Some((false, "writable by everybody")));
        check(0o755, 0o664, Some((false, "writable by its group")));
        check(0o777, 0o644, Some((true, "writable by everybody")));
        // The sticky bit keeps others from replacing the file, not from adding a plugin.
        check(0o1777, 0o644, Some((true, "writable by everybody")));
        check(0o775, 0o644, Some((true, "writable by its group")));
    }

    #[test]
    fn a_link_is_judged_by_what_it_points_to_and_where_it_lies() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("real.so");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        let link = root.path().join("libretort_x.so");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(matches!(
            check_owner(&link),
            Err(TrustError::Writable { is_dir: false, .. })
        ));
        // A good file, but others can point the link elsewhere.
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        check_owner(&link).unwrap();
        let open = root.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        std::os::unix::fs::symlink(&file, open.join("libretort_x.so")).unwrap();
        assert!(matches!(
            check_owner(&open.join("libretort_x.so")),
            Err(TrustError::Writable { is_dir: true, .. })
        ));
    }

    #[test]
    fn directories_above_count_unless_they_are_sticky() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("above/inner");
        fs::create_dir_all(&inner).unwrap();
        let file = inner.join("libretort_x.so");
        fs::write(&file, "").unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap()
        };
        let above = root.path().join("above");
        check_owner(&file).unwrap();
        mode(&above, 0o777);
        let error = check_owner(&file).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/above is writable by everybody"),
            "{error}"
        );
        mode(&above, 0o1777);
        check_owner(&file).unwrap();
        // A link in a good place, through a directory that is a link, to a place below an open directory.
        mode(&above, 0o777);
        std::os::unix::fs::symlink("above/inner", root.path().join("way")).unwrap();
        std::os::unix::fs::symlink("way/libretort_x.so", root.path().join("libretort_x.so"))
            .unwrap();
        let error = check_owner(&root.path().join("libretort_x.so")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/above is writable by everybody"),
            "{error}"
        );
        mode(&above, 0o755);
        check_owner(&root.path().join("libretort_x.so")).unwrap();
        std::os::unix::fs::symlink("loop.so", root.path().join("loop.so")).unwrap();
        assert!(matches!(
            check_owner(&root.path().join("loop.so")),
            Err(TrustError::Io { .. })
        ));
    }

    #[test]
    fn a_lock_that_cannot_be_read_allows_nothing() {
        let pipe = |path: &Path| {
            assert!(
                std::process::Command::new("mkfifo")
                    .arg(path)
                    .status()
                    .unwrap()
                    .success()
            );
        };
        let dangling = |path: &Path| std::os::unix::fs::symlink("nowhere", path).unwrap();
        let makers: [&dyn Fn(&Path); 6] = [
            &dangling,
            &pipe,
            &|path| fs::create_dir(path).unwrap(),
            &|path| std::os::unix::fs::symlink("/dev/zero", path).unwrap(),
            &|path| fs::write(path, b"\xff\xfe").unwrap(),
            &|path| fs::write(path, "a".repeat(2 << 20)).unwrap(),
        ];
        for make in makers {
            let root = tempfile::tempdir().unwrap();
            let plugin = root.path().join("libretort_x.so");
            fs::write(&plugin, "").unwrap();
            make(&root.path().join(LOCK));
            let error = check_lock(&plugin, &"a".repeat(64))
                .unwrap_err()
                .to_string();
            assert!(error.contains(LOCK), "{error}");
        }
        // One that others can write allows what they like.
        let root = tempfile::tempdir().unwrap();
        let (plugin, lock) = (root.path().join("libretort_x.so"), root.path().join(LOCK));
        fs::write(&plugin, "").unwrap();
        fs::write(&lock, format!("{}  libretort_x.so\n", "a".repeat(64))).unwrap();
        check_lock(&plugin, &"a".repeat(64)).unwrap();
        fs::set_permissions(&lock, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(
            check_lock(&plugin, &"a".repeat(64)),
            Err(TrustError::Writable { .. })
        ));
    }

    #[test]
    fn a_link_needs_the_leave_of_both_directories() {
        let root = tempfile::tempdir().unwrap();
        let (here, there) = (root.path().join("here"), root.path().join("there"));
        fs::create_dir(&here).unwrap();
        fs::create_dir(&there).unwrap();
        let hash = "a".repeat(64);
        let (link, file) = (here.join("libretort_x.so"), there.join("real.so"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let lock = |dir: &Path, name: &str| {
            write_lock(dir, &BTreeMap::from([(name.to_owned(), hash.clone())])).unwrap();
        };
        check_lock(&link, &hash).unwrap();
        lock(&there, "another.so");
        assert!(matches!(
            check_lock(&link, &hash),
            Err(TrustError::Locked { .. })
        ));
        lock(&there, "real.so");
        check_lock(&link, &hash).unwrap();
        lock(&here, "another.so");
        assert!(matches!(
            check_lock(&link, &hash),
            Err(TrustError::Locked { .. })
        ));
        lock(&here, "libretort_x.so");
        check_lock(&link, &hash).unwrap();
    }

    #[test]
    fn a_lock_allows_what_it_lists() {
        let root = tempfile::tempdir().unwrap();
        let (known, other) = ("a".repeat(64), "b".repeat(64));
        let plugin = root.path().join("libretort_x.so");
        fs::write(&plugin, "").unwrap();
        fs::write(root.path().join("libretort_y.so"), "").unwrap();
        check_lock(&plugin, &known).unwrap();
        write_lock(
            root.path(),
            &BTreeMap::from([("libretort_x.so".into(), known.clone())]),
        )
        .unwrap();
        check_lock(&plugin, &known).unwrap();
        let changed = check_lock(&plugin, &other).unwrap_err();
        assert!(changed.to_string().contains(&known) && changed.to_string().contains(&other));
        let unlisted = check_lock(&root.path().join("libretort_y.so"), &known).unwrap_err();
        assert!(
            unlisted.to_string().contains("does not list it"),
            "{unlisted}"
        );
        assert!(unlisted.hint().unwrap().contains("retort plugin lock"));
        fs::write(root.path().join(LOCK), "# a comment\n\nnonsense\n").unwrap();
        assert!(matches!(
            check_lock(&plugin, &known),
            Err(TrustError::NoLock { line: 3, .. })
        ));
    }
}
