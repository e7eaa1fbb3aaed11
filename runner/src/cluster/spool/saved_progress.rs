//! How far the starts of an element have come, so that starts that get no further are noticed and limited.
//!
//! A start that gets further than all before it leaves the file `progress-<start>`; one that does not leaves none. A torn file
//! says only that its start got further.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use retort_checkpoint::regular;

use super::{make_dir, open_own, patiently, put, starts};
use crate::frame::{FromWorker, Points, Progress};

/// The most bytes of a file, the most units in it, and the most characters of a name.
const LONGEST: u64 = 64 << 10;
const MOST_UNITS: usize = 64;
const LONGEST_UNIT: usize = 128;

/// The file with what the starts of earlier jobs have saved.
const OF_EARLIER_JOBS: &str = "progress-earlier";

/// The unit of a plugin that reports only metrics: their highest step.
const METRICS: &str = "steps of metrics";

/// How much work is known to be saved, by unit: a stage may prepare something first, and count other units meanwhile.
#[derive(Debug, Default)]
pub struct SavedProgress {
    /// In this start and all before it.
    saved: BTreeMap<String, u64>,
    /// The most that this start has reported.
    reported: BTreeMap<String, u64>,
    has_advanced: bool,
}

impl SavedProgress {
    /// What the starts before this one have saved.
    pub fn before(dir: &Path, start: u32) -> Self {
        let read = |path: PathBuf| {
            let text = patiently(|| regular::whole(open_own(&path)?, LONGEST)).ok()?;
            serde_json::from_slice(&text).ok()
        };
        let of_starts = (0..start).rev().map(|start| file(dir, start));
        let mut files = of_starts.chain([dir.join(OF_EARLIER_JOBS)]);
        Self {
            saved: files.find_map(read).unwrap_or_default(),
            ..Self::default()
        }
    }

    /// Tells the next job of an element what its starts in this one have saved. The directories are those of the element.
    ///
    /// # Errors
    /// What the file system says.
    pub fn pass_on(dir: &Path, next: &Path) -> io::Result<()> {
        let known = Self::before(dir, starts(dir));
        patiently(|| make_dir(next))?;
        put(
            &next.join(OF_EARLIER_JOBS),
            &serde_json::to_vec(&known.saved)?,
        )
    }

    /// Notes what a worker reports. A start begins where the last checkpoint ends, so its first report shows what earlier ones
    /// saved, even if those were lost. Returns whether it shows more than was known: then [`Self::write`] is due.
    pub fn note(&mut self, frame: &FromWorker) -> bool {
        match frame {
            FromWorker::Progress(Progress { done, unit, .. }) => self.note_unit(unit, *done),
            FromWorker::Metrics(series) if !self.has_units() => {
                let highest = |points: &Points| points.steps.iter().max().copied();
                let step = series.iter().filter_map(highest).max();
                step.is_some_and(|step| self.note_unit(METRICS, step))
            }
            _ => false,
        }
    }

    /// Whether the stage reports progress by itself.
    fn has_units(&self) -> bool {
        let mut units = self.saved.keys().chain(self.reported.keys());
        units.any(|unit| unit != METRICS)
    }

    fn note_unit(&mut self, unit: &str, done: u64) -> bool {
        if done == 0 {
            // A stage may say so before it has looked for a checkpoint.
            return false;
        }
        let unit: String = unit.chars().take(LONGEST_UNIT).collect();
        if let Some(most) = self.reported.get_mut(&unit) {
            *most = done.max(*most);
            return false;
        }
        if self.reported.len() >= MOST_UNITS {
            return false;
        }
        self.reported.insert(unit.clone(), done);
        self.save(unit, done)
    }

    /// The worker has saved all that it reported. Returns whether that is more than was known.
    pub fn note_checkpoint(&mut self) -> bool {
        let reported = self.reported.clone();
        let further = reported
            .into_iter()
            .map(|(unit, done)| self.save(unit, done));
        further.fold(false, |any, is_further| any | is_further)
    }

    fn save(&mut self, unit: String, done: u64) -> bool {
        let is_known = self.saved.contains_key(&unit) || self.saved.len() < MOST_UNITS;
        let is_further = is_known && done > self.saved.get(&unit).copied().unwrap_or(0);
        if is_further {
            self.saved.insert(unit, done);
        }
        self.has_advanced |= is_further;
        is_further
    }

    /// Whether this start got further than all before it.
    pub fn has_advanced(&self) -> bool {
        self.has_advanced
    }

    /// Writes it, for later starts.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, dir: &Path, start: u32) -> io::Result<()> {
        put(&file(dir, start), &serde_json::to_vec(&self.saved)?)
    }
}

/// Whether a start of the element with this directory got further than all before it.
pub fn has_advanced(dir: &Path, start: u32) -> bool {
    file(dir, start).exists()
}

fn file(dir: &Path, start: u32) -> PathBuf {
    dir.join(format!("progress-{start}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::spool::Writer;

    fn progress(done: u64, unit: &str) -> FromWorker {
        FromWorker::Progress(Progress {
            done,
            total: 9,
            unit: unit.into(),
        })
    }

    #[test]
    fn a_start_begins_where_the_last_checkpoint_ends() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = SavedProgress::before(dir.path(), 0);
        assert!(!first.note(&progress(0, "captions")), "nothing yet");
        assert!(first.note(&progress(1, "captions")));
        assert!(!first.note(&progress(3, "captions")), "not yet saved");
        assert!(first.note_checkpoint());
        assert!(!first.note_checkpoint(), "again");
        first.write(dir.path(), 0).unwrap();
        // The start after it leaves half a file, and the next one nothing.
        std::fs::write(file(dir.path(), 1), "{\"steps\":").unwrap();
        assert!(has_advanced(dir.path(), 1) && !has_advanced(dir.path(), 2));
        let mut later = SavedProgress::before(dir.path(), 3);
        assert_eq!(later.saved, first.saved);
        assert!(!later.note(&progress(2, "captions")));
        assert!(!later.note(&progress(3, "captions")));
        assert!(!later.note_checkpoint() && !later.has_advanced());
        assert!(later.note(&progress(1, "steps")));
        assert!(later.has_advanced());
        // Hostile units take no more room than a file may have.
        for unit in 0..1000 {
            later.note(&progress(1, &format!("{unit}{}", "x".repeat(1000))));
        }
        later.note_checkpoint();
        assert!(serde_json::to_vec(&later.saved).unwrap().len() < LONGEST as usize);
    }

    #[test]
    fn the_next_job_knows_what_the_last_one_saved() {
        let root = tempfile::tempdir().unwrap();
        let dirs = ["1", "2", "3"].map(|job| root.path().join(job).join("0"));
        let mut start = SavedProgress::before(&dirs[0], 0);
        assert!(start.note(&progress(5, "steps")));
        let _writer = Writer::open(&dirs[0]).unwrap();
        start.write(&dirs[0], 0).unwrap();
        SavedProgress::pass_on(&dirs[0], &dirs[1]).unwrap();
        // Nothing began in the second job.
        SavedProgress::pass_on(&dirs[1], &dirs[2]).unwrap();
        let mut start = SavedProgress::before(&dirs[2], 0);
        assert!(!start.note(&progress(5, "steps")));
        assert!(!has_advanced(&dirs[2], 0));
    }

    #[test]
    fn steps_of_metrics_are_progress_if_there_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut start = SavedProgress::before(dir.path(), 0);
        let points = |steps: &[u64]| {
            FromWorker::Metrics(vec![Points {
                series: "loss".into(),
                steps: steps.to_vec(),
                ..Points::default()
            }])
        };
        assert!(start.note(&points(&[1, 2])));
        assert!(!start.note(&points(&[3])));
        assert!(start.note_checkpoint());
        start.write(dir.path(), 0).unwrap();
        let mut next = SavedProgress::before(dir.path(), 1);
        assert!(!next.note(&points(&[2, 3])));
        assert!(!next.note(&points(&[])));
        assert!(!next.note_checkpoint());
        assert!(!next.note(&points(&[4])) && next.note_checkpoint());
        // Of a stage that reports progress, metrics say nothing.
        let mut other = SavedProgress::before(dir.path(), 1);
        assert!(other.note(&progress(1, "steps")));
        assert!(!other.note(&points(&[99])) && !other.note_checkpoint());
    }
}
