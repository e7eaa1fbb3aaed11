//! Checks of a stage's side effects: changes in the recipe's directory, the working directory and its inputs, and leftover
//! files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use retort_abi::Input;

use super::{CheckFailure, CheckResult, TEMPORARY, failed};
use crate::artifact;

/// Checks that an attempt left only allowed files in its directory.
pub(super) fn strays(place: &Path) -> Result<(), CheckFailure> {
    let names = |dir: &Path| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let own = ["artifacts", "staging", "work", TEMPORARY].map(|name| place.join(name));
    if let Some(path) = names(place).iter().find(|path| !own.contains(path)) {
        return failed(format!("it wrote {}", path.display()));
    }
    match names(&place.join(TEMPORARY)).first() {
        Some(path) => failed(format!(
            "it left {} in the directory for temporary files",
            path.file_name().unwrap_or_default().display()
        )),
        None => Ok(()),
    }
}

/// Files that a stage must not touch: the recipe's directory, the working directory and its inputs.
pub(super) struct WatchedFiles(BTreeMap<PathBuf, (u64, Option<SystemTime>)>);

impl WatchedFiles {
    pub(super) fn of(base_dir: &Path) -> Self {
        let mut files = BTreeMap::new();
        let mut dirs = vec![base_dir.to_owned()];
        dirs.extend(std::env::current_dir());
        for dir in dirs {
            list(&dir, 3, &mut files);
        }
        Self(files)
    }

    pub(super) fn compare(&self, base_dir: &Path, inputs: &BTreeMap<String, Input>) -> CheckResult {
        let now = Self::of(base_dir).0;
        let changed = now
            .iter()
            .find(|(path, state)| self.0.get(*path) != Some(*state));
        let gone = self.0.keys().find(|path| !now.contains_key(*path));
        if let Some(path) = changed.map(|(path, _)| path).or(gone) {
            return failed(format!("it changed {}", path.display()));
        }
        for input in inputs.values() {
            let found = artifact::contents(&input.path);
            if found.is_ok_and(|found| found.hash != input.hash) {
                return failed(format!("it changed its input {}", input.path.display()));
            }
        }
        Ok(format!("{} files around it are as they were", now.len()))
    }
}

/// Files below a directory, a few levels deep, without stores and build outputs.
fn list(dir: &Path, depth: usize, files: &mut BTreeMap<PathBuf, (u64, Option<SystemTime>)>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(found) = fs::symlink_metadata(&path) else {
            continue;
        };
        if !found.is_dir() {
            files.insert(path, (found.len(), found.modified().ok()));
        } else if depth > 0 && name != "target" && !name.to_string_lossy().starts_with('.') {
            list(&path, depth - 1, files);
        }
    }
}
