//! Files of artifacts and of work directories: whole or not there, JSON, copies, and paths as recipes write them.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};

/// The most bytes of a configuration.
pub const CONFIG_MOST: u64 = 1 << 20;

/// Writes a file under another name first, so that the path always holds a whole file.
pub fn replace(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = path.with_extension("partial");
    write(&partial)?;
    std::fs::File::open(&partial)
        .and_then(|f| f.sync_all())
        .map_err(Error::io(&partial))?;
    std::fs::rename(&partial, path).map_err(Error::io(path))
}

/// Writes a directory of files under another name first, so that the path always holds a complete one. Leftovers of earlier
/// attempts are removed.
pub fn replace_dir<T>(path: &Path, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let partial = path.with_extension("partial");
    remove_dir(&partial)?;
    std::fs::create_dir(&partial).map_err(Error::io(&partial))?;
    let written = write(&partial).and_then(|written| {
        for entry in std::fs::read_dir(&partial).map_err(Error::io(&partial))? {
            let file = entry.map_err(Error::io(&partial))?.path();
            std::fs::File::open(&file)
                .and_then(|f| f.sync_all())
                .map_err(Error::io(&file))?;
        }
        remove_dir(path)?;
        std::fs::rename(&partial, path).map_err(Error::io(path))?;
        Ok(written)
    });
    if written.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    written
}

/// Removes a directory if it is there.
fn remove_dir(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
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

/// A path as written in a recipe.
pub fn resolve(base: &Path, path: &str) -> PathBuf {
    base.join(path)
}
