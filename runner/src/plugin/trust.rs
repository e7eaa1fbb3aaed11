//! Which files are loaded at all: nobody else can change them, and a lock, where there is one, lists them.
//!
//! Loading a plugin runs its code with all rights of the user. So a file that others can replace is refused: it, and its
//! directory, must belong to the user or to root and be writable by no one else. A directory with a `plugins.lock` gives
//! only the plugins whose BLAKE3 is in it; its lines are those of `b3sum`, `HASH  FILE`. Deliberately absent: directories
//! further up, and any judgement of what a plugin does.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Name of the file with the hashes allowed in a directory.
pub const LOCK: &str = "plugins.lock";

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
        /// What repairs it.
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

/// Refuses a plugin whose file, or whose directory, somebody else can change. A link is followed: its own directory and
/// that of the file count.
///
/// # Errors
/// [`TrustError::Writable`] or [`TrustError::Io`].
pub fn check_owner(plugin: &Path) -> Result<(), TrustError> {
    let read = |source| TrustError::Io {
        path: plugin.to_owned(),
        source,
    };
    let file = fs::canonicalize(plugin).map_err(read)?;
    let found = fs::metadata(&file).map_err(read)?;
    // SAFETY: a plain system call that cannot fail.
    let user = unsafe { libc::geteuid() };
    let mut looked_at = vec![(file.clone(), found, false)];
    let mut dirs: Vec<&Path> = [plugin, &file]
        .into_iter()
        .filter_map(Path::parent)
        .collect();
    dirs.dedup();
    for dir in dirs {
        // The parent of a bare file name is empty: the working directory.
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        let found = fs::metadata(dir).map_err(read)?;
        looked_at.push((dir.to_owned(), found, true));
    }
    for (path, found, is_dir) in looked_at {
        let shown = path.display().to_string();
        let (problem, repair) = match writer(&found, user) {
            None => continue,
            Some(Writer::Everybody) => ("is writable by everybody", format!("chmod o-w '{shown}'")),
            Some(Writer::Group) => ("is writable by its group", format!("chmod g-w '{shown}'")),
            Some(Writer::Owner) => (
                "belongs to another user",
                format!("copy the plugin with `retort plugin install`, or: chown {user} '{shown}'"),
            ),
        };
        return Err(TrustError::Writable {
            plugin: plugin.to_owned(),
            path,
            is_dir,
            problem,
            repair,
        });
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
enum Writer {
    Everybody,
    Group,
    Owner,
}

/// Who besides the user and root can write to something.
fn writer(found: &fs::Metadata, user: u32) -> Option<Writer> {
    if found.mode() & 0o002 != 0 {
        return Some(Writer::Everybody);
    }
    // Where every user has a group of the same number with nobody else in it, umask 002 is usual and harmless.
    if found.mode() & 0o020 != 0 && found.gid() != found.uid() {
        return Some(Writer::Group);
    }
    (found.uid() != user && found.uid() != 0).then_some(Writer::Owner)
}

/// Refuses a plugin that the lock of its directory does not list with this hash. Without a lock everything passes.
///
/// # Errors
/// [`TrustError`].
pub fn check_lock(plugin: &Path, hash: &str) -> Result<(), TrustError> {
    let Some(dir) = plugin.parent() else {
        return Ok(());
    };
    let Some(lock) = read_lock(dir)? else {
        return Ok(());
    };
    let name = plugin.file_name().unwrap_or_default().to_string_lossy();
    let known = lock.get(&*name);
    if known.is_some_and(|known| known == hash) {
        return Ok(());
    }
    Err(TrustError::Locked {
        plugin: plugin.to_owned(),
        lock: dir.join(LOCK),
        known: known.cloned(),
        hash: hash.to_owned(),
    })
}

/// The hashes allowed in a directory, by file name; `None` when it has no lock.
///
/// # Errors
/// [`TrustError::Io`] or [`TrustError::NoLock`].
pub fn read_lock(dir: &Path) -> Result<Option<BTreeMap<String, String>>, TrustError> {
    let path = dir.join(LOCK);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TrustError::Io { path, source }),
    };
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
    let path = dir.join(LOCK);
    let text: String = hashes
        .iter()
        .map(|(name, hash)| format!("{hash}  {name}\n"))
        .collect();
    let fresh = dir.join(format!(".{LOCK}-{}", std::process::id()));
    fs::write(&fresh, text)
        .and_then(|()| fs::rename(&fresh, &path))
        .map_err(|source| TrustError::Io { path, source })
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
    fn a_lock_allows_what_it_lists() {
        let root = tempfile::tempdir().unwrap();
        let (known, other) = ("a".repeat(64), "b".repeat(64));
        let plugin = root.path().join("libretort_x.so");
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
