//! How far the starts of an element have come, so that starts that get no further are noticed.
//!
//! Each start that ends at a checkpoint leaves the file `progress-<start>`, of whole bytes or none: a torn one counts as absent.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use super::{open_own, patiently, put};
use crate::frame::Progress;

/// The most bytes of a file, the most units in it, and the most characters of a name.
const LONGEST: u64 = 64 << 10;
const MOST_UNITS: usize = 64;
const LONGEST_UNIT: usize = 128;

/// The most that was done and saved so far, by unit: a stage may prepare something first, and count other units meanwhile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BestProgress(BTreeMap<String, u64>);

impl BestProgress {
    /// That of the starts before this one.
    pub fn before(dir: &Path, start: u32) -> Self {
        let read = |start| {
            let path = file(dir, start);
            let text = patiently(|| regular::whole(open_own(&path)?, LONGEST)).ok()?;
            serde_json::from_slice(&text).ok()
        };
        (0..start).rev().find_map(read).unwrap_or_default()
    }

    /// Notes progress. Returns whether it goes beyond all before; the first of a unit does.
    pub fn note(&mut self, progress: &Progress) -> bool {
        let unit: String = progress.unit.chars().take(LONGEST_UNIT).collect();
        let best = self.0.get(&unit).copied();
        let is_further = match best {
            Some(best) => progress.done > best,
            None => self.0.len() < MOST_UNITS,
        };
        if is_further {
            self.0.insert(unit, progress.done);
        }
        is_further
    }

    /// Writes it, for later starts.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, dir: &Path, start: u32) -> io::Result<()> {
        put(&file(dir, start), &serde_json::to_vec(self)?)
    }
}

fn file(dir: &Path, start: u32) -> PathBuf {
    dir.join(format!("progress-{start}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_goes_on_where_the_last_good_one_ended() {
        let dir = tempfile::tempdir().unwrap();
        let progress = |done, unit: &str| Progress {
            done,
            total: 9,
            unit: unit.into(),
        };
        let mut best = BestProgress::before(dir.path(), 0);
        assert!(best.note(&progress(0, "captions")));
        assert!(best.note(&progress(3, "captions")));
        assert!(!best.note(&progress(2, "captions")), "again");
        assert!(best.note(&progress(1, "steps")));
        best.write(dir.path(), 0).unwrap();
        // The start after it left nothing, and the next one half a file.
        std::fs::write(file(dir.path(), 2), "{\"steps\":").unwrap();
        let mut later = BestProgress::before(dir.path(), 3);
        assert_eq!(later, best);
        assert!(!later.note(&progress(3, "captions")));
        assert!(!later.note(&progress(1, "steps")));
        assert!(later.note(&progress(2, "steps")));
        // Hostile units take no more room than a file may have.
        for unit in 0..1000 {
            later.note(&progress(1, &format!("{unit}{}", "x".repeat(1000))));
        }
        assert!(serde_json::to_vec(&later).unwrap().len() < 64 << 10);
    }
}
