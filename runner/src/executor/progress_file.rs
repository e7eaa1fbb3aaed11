//! The progress of a run's stages, for other processes: a small file in the run's staging directory, rewritten at
//! most once a second and gone with the run.
//!
//! It is not part of the history: finished runs have no progress. Write errors are ignored.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::executor::event::Event;
use crate::frame::Progress;
use crate::store::Time;

/// Time between two writings.
const INTERVAL: Duration = Duration::from_secs(1);
/// The longest file that is read.
const LONGEST: u64 = 1 << 20;

/// A stage's progress, and when it was first seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProgressReading {
    /// How far.
    #[serde(flatten)]
    pub progress: Progress,
    /// The first reported progress, from which the attempt resumed.
    pub from: u64,
    /// When that was, in milliseconds since 1970.
    pub since: i64,
    /// When this was.
    pub at: i64,
}

impl ProgressReading {
    /// Remaining seconds at the current rate; None while unknown.
    pub fn left(&self, now: Time) -> Option<f64> {
        let done = self
            .progress
            .done
            .checked_sub(self.from)
            .filter(|done| *done > 0)?;
        let left = self.progress.total.checked_sub(self.progress.done)?;
        let took = Time(self.since).seconds_to(Time(self.at));
        let passed = Time(self.at).seconds_to(now).max(0.0);
        (took > 0.0).then(|| (left as f64 * took / done as f64 - passed).max(0.0))
    }
}

/// The file, for the process that writes it.
#[derive(Debug)]
pub struct ProgressFile {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    stages: BTreeMap<String, ProgressReading>,
    written: Option<Instant>,
}

impl ProgressFile {
    /// For the run that stages its files in `staging`.
    pub fn new(staging: &Path) -> Self {
        Self {
            path: path(staging),
            state: Mutex::default(),
        }
    }

    /// Notes an event of the run, and writes the file if that is due.
    pub fn hear(&self, event: &Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = match event {
            Event::Progress { stage, progress } => {
                let at = Time::now().0;
                let reading =
                    state
                        .stages
                        .entry(stage.clone())
                        .or_insert_with(|| ProgressReading {
                            progress: progress.clone(),
                            from: progress.done,
                            since: at,
                            at,
                        });
                // A stage may change units: first images read, then steps.
                let other = (&reading.progress.unit, reading.progress.total)
                    != (&progress.unit, progress.total);
                if other || progress.done < reading.progress.done {
                    (reading.from, reading.since) = (progress.done, at);
                }
                reading.progress = progress.clone();
                reading.at = at;
                state
                    .written
                    .is_none_or(|written| written.elapsed() >= INTERVAL)
            }
            Event::Ended { stage, .. } => state.stages.remove(stage).is_some(),
            _ => false,
        };
        if due {
            state.written = Some(Instant::now());
            if let Err(error) = write(&self.path, &state.stages) {
                tracing::debug!(%error, "progress was not written");
            }
        }
    }
}

/// The progress of a run's stages, by its staging directory; empty if unknown.
pub fn read(staging: &Path) -> BTreeMap<String, ProgressReading> {
    let bytes = retort_checkpoint::regular::read(&path(staging), LONGEST);
    let read = bytes
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    read.unwrap_or_default()
}

/// The file of a run's staging directory.
pub fn path(staging: &Path) -> PathBuf {
    staging.join("progress.json")
}

/// Readers see either the old or the new file.
fn write(path: &Path, stages: &BTreeMap<String, ProgressReading>) -> std::io::Result<()> {
    let draft = path.with_extension("new");
    let mut file = retort_checkpoint::regular::create_itself(&draft)?;
    file.write_all(&serde_json::to_vec(stages)?)?;
    std::fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(done: u64) -> Event {
        Event::Progress {
            stage: "a".into(),
            progress: Progress {
                done,
                total: 100,
                unit: "steps".into(),
            },
        }
    }

    #[test]
    fn what_is_heard_can_be_read_until_the_stage_ends() {
        let staging = tempfile::tempdir().unwrap();
        assert!(read(staging.path()).is_empty());
        let progress_file = ProgressFile::new(staging.path());
        progress_file.hear(&progress(10));
        // Too soon for another write.
        progress_file.hear(&progress(20));
        let reading = read(staging.path()).remove("a").unwrap();
        assert_eq!((reading.progress.done, reading.from), (10, 10));
        assert_eq!(reading.left(Time::now()), None);
        std::fs::write(path(staging.path()), "{").unwrap();
        assert!(read(staging.path()).is_empty());
    }

    #[test]
    fn what_is_left_follows_from_what_was_done_by_this_attempt() {
        let reading = ProgressReading {
            progress: Progress {
                done: 60,
                total: 100,
                unit: "steps".into(),
            },
            from: 50,
            since: 0,
            at: 20_000,
        };
        assert_eq!(reading.left(Time(20_000)), Some(80.0));
        assert_eq!(reading.left(Time(30_000)), Some(70.0));
        assert_eq!(reading.left(Time(1_000_000)), Some(0.0));
    }
}
