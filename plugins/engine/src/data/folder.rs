//! The image files of a folder: links followed, hidden files left out, in an order independent of the file system.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use retort_checkpoint::images::{self, MOST_FILES, MOST_FOLDERS};

use super::error::{DataError, shown};

/// The deepest nesting of folders.
const MOST_DEPTH: usize = 32;

/// The files of a folder and its subfolders, as relative paths, sorted.
pub struct Folder {
    /// Where it is.
    pub path: PathBuf,
    /// All files in it and below.
    pub files: Vec<String>,
    /// The folders directly in it.
    pub folders: Vec<String>,
}

impl Folder {
    /// Lists a folder.
    pub fn list(path: &Path) -> Result<Self, DataError> {
        let mut found = Self {
            path: path.to_owned(),
            files: Vec::new(),
            folders: Vec::new(),
        };
        let metadata = fs::metadata(path).map_err(|e| DataError::read(path, "folder", e))?;
        if !metadata.is_dir() {
            let message = "is a file; expected a folder (for a CSV file of pixels, `csv:`; an archive, `tar:`; arrays, `arrays:`)";
            return Err(DataError::content(path, message));
        }
        let mut visited = 0;
        found.walk(
            "",
            &mut vec![(metadata.dev(), metadata.ino())],
            &mut visited,
        )?;
        found.files.sort_unstable();
        found.folders.sort_unstable();
        Ok(found)
    }

    /// Adds what is in the folder `within`; `above` are the folders it lies in, itself included.
    fn walk(
        &mut self,
        within: &str,
        above: &mut Vec<(u64, u64)>,
        visited: &mut usize,
    ) -> Result<(), DataError> {
        let dir = self.path.join(within);
        *visited += 1;
        if *visited > MOST_FOLDERS {
            let message = format!("more than {MOST_FOLDERS} folders, links followed");
            return Err(DataError::content(&self.path, message));
        }
        let listing = fs::read_dir(&dir).map_err(|e| DataError::read(&dir, "folder", e))?;
        let mut folders = Vec::new();
        for entry in listing {
            let entry = entry.map_err(|e| DataError::read(&dir, "folder", e))?;
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                return Err(DataError::content(
                    &path,
                    "the name is not UTF-8; rename it",
                ));
            };
            if images::is_hidden(&name) {
                continue;
            }
            let inside = match within {
                "" => name,
                _ => format!("{within}/{name}"),
            };
            let mut kind = entry
                .file_type()
                .map_err(|e| DataError::read(&path, "file", e))?;
            let mut target = None;
            if kind.is_symlink() {
                let metadata = fs::metadata(&path);
                let metadata = metadata.map_err(|source| match source.raw_os_error() {
                    Some(ELOOP) => DataError::content(&path, "a link that leads to itself"),
                    _ => DataError::content(&path, format!("a link that leads nowhere: {source}")),
                })?;
                kind = metadata.file_type();
                target = Some(metadata);
            }
            if kind.is_dir() {
                let metadata = match target {
                    Some(metadata) => metadata,
                    None => entry
                        .metadata()
                        .map_err(|e| DataError::read(&path, "folder", e))?,
                };
                let id = (metadata.dev(), metadata.ino());
                if above.contains(&id) {
                    let message =
                        "a link to a folder that it lies in: this has no end; remove the link";
                    return Err(DataError::content(&path, message));
                }
                folders.push((inside, id));
            } else if kind.is_file() {
                self.files.push(inside);
                if self.files.len() > MOST_FILES {
                    let message = format!(
                        "more than {MOST_FILES} files; put them into tar archives (`tar:`)"
                    );
                    return Err(DataError::content(&self.path, message));
                }
            } else {
                let message = "neither file nor folder (a pipe, a socket or a device); remove it";
                return Err(DataError::content(&path, message));
            }
        }
        if above.len() > MOST_DEPTH {
            let message = format!("folders more than {MOST_DEPTH} deep");
            return Err(DataError::content(&dir, message));
        }
        for (inside, id) in folders {
            above.push(id);
            self.walk(&inside, above, visited)?;
            above.pop();
            if within.is_empty() {
                self.folders.push(inside);
            }
        }
        Ok(())
    }
}

/// The system's error number for too many links.
const ELOOP: i32 = 40;

/// Files that were left out, counted by extension.
#[derive(Debug, Default)]
pub struct SkippedFiles {
    by_ending: BTreeMap<String, usize>,
}

impl SkippedFiles {
    /// Counts a file.
    pub fn add(&mut self, name: &str) {
        *self.by_ending.entry(ending(name)).or_default() += 1;
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.by_ending.values().sum()
    }

    /// The endings, most frequent first, with their numbers.
    pub fn kinds(&self) -> String {
        let mut kinds: Vec<_> = self.by_ending.iter().collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let more = kinds.len().saturating_sub(8);
        let mut parts: Vec<String> = kinds
            .into_iter()
            .take(8)
            .map(|(ending, count)| format!("{} {count}", shown(ending)))
            .collect();
        if more > 0 {
            parts.push(format!("{more} other kinds"));
        }
        parts.join(", ")
    }
}

/// The extension of a name: `.txt`, or "no ending".
fn ending(name: &str) -> String {
    match Path::new(name).extension() {
        Some(ending) => format!(".{}", ending.to_string_lossy()),
        None => "no ending".into(),
    }
}
