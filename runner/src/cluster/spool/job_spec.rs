//! A job's specification, the file `order.json` in its spool: the work of its elements.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_abi::Part;
use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use super::{FORMAT, SpoolError, element_dir, failed, open_own, patiently, put};
use crate::cluster::slurm::Layout;
use crate::frame::{self, Task};

/// The most bytes of a specification.
const LONGEST_SPEC: u64 = 16 << 20;
/// The most elements of a job.
const MOST_ELEMENTS: usize = 1 << 17;
/// The time between two writes of an element.
const INTERVALS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(24 * 3600);
/// The most threads of an element.
const MOST_THREADS: usize = 1 << 16;
/// The file with a job's specification.
pub(super) const JOB_SPEC: &str = "order.json";

/// The work of a job. Written once, before the job is submitted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// [`FORMAT`].
    pub format: u32,
    /// The part of each element; a job that is not an array has one element, without a part.
    pub elements: Vec<Option<Part>>,
    /// The common task, without a part.
    pub task: Task,
    /// Threads per element.
    pub threads: usize,
    /// How many restarts in a row an element may need without getting further, over all its jobs.
    pub requeue: u32,
    /// How many starts of earlier jobs have been wasted in a row, per element; empty for the first job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wasted: Vec<u32>,
    /// The time between two writes of an element.
    pub interval: Duration,
    /// Whether a worker that Slurm stops ahead of the time limit asks for the next start itself.
    pub again: bool,
    /// Whether the elements are ranks: tasks of one job that run at the same time.
    #[serde(default)]
    pub ranks: bool,
    /// The name of the ranks' rendezvous, since others may share its address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub meeting: String,
}

impl JobSpec {
    /// Checks that it is valid.
    ///
    /// # Errors
    /// The problem.
    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            let found = self.format;
            return Err(format!(
                "it was written by another retort (format {found}, this one knows {FORMAT}): both must be of one version"
            ));
        }
        let count = self.elements.len();
        let parts: Vec<&Part> = self.elements.iter().flatten().collect();
        let mut indexes: Vec<usize> = parts.iter().map(|part| part.index).collect();
        indexes.sort_unstable();
        indexes.dedup();
        let one_of_each = indexes.len() == count
            && parts
                .iter()
                .all(|part| part.index < part.of && part.of == parts[0].of);
        if count > MOST_ELEMENTS
            || !(self.elements.as_slice() == [None] || (count > 0 && one_of_each))
        {
            return Err(format!("its {count} elements are not parts of one stage"));
        }
        if !self.wasted.is_empty() && self.wasted.len() != count {
            let known = self.wasted.len();
            return Err(format!("wasted starts of {known} elements, of {count}"));
        }
        if !INTERVALS.contains(&self.interval) {
            return Err(format!(
                "an interval of {:?} between two writes",
                self.interval
            ));
        }
        match (1..=MOST_THREADS).contains(&self.threads) {
            true => Ok(()),
            false => Err(format!("{} threads", self.threads)),
        }
    }

    /// The number of an element's starts in earlier jobs that have been wasted in a row.
    pub fn wasted_before(&self, element: usize) -> u32 {
        self.wasted.get(element).copied().unwrap_or(0)
    }

    /// The directory of the element that reports an element's progress.
    pub fn reporter_dir(&self, spool: &Path, element: usize) -> PathBuf {
        element_dir(spool, self.layout().reporter(element))
    }

    /// The layout of its job.
    pub fn layout(&self) -> Layout {
        match (self.elements.first(), self.ranks) {
            (Some(Some(_)), true) => Layout::Ranks(self.elements.len()),
            (Some(Some(_)), false) => Layout::Array(self.elements.len()),
            _ => Layout::Single,
        }
    }
}

/// Writes a job's specification, and syncs it.
///
/// # Errors
/// [`SpoolError::Io`].
pub fn write_job_spec(dir: &Path, spec: &JobSpec) -> Result<(), SpoolError> {
    let path = dir.join(JOB_SPEC);
    let wrong = |message| SpoolError::Damaged {
        path: path.clone(),
        message,
    };
    spec.check().map_err(wrong)?;
    let text = serde_json::to_vec(spec).map_err(|error| wrong(error.to_string()))?;
    put(&path, &text).map_err(failed("write", &path))
}

/// Reads a job's specification.
///
/// # Errors
/// [`SpoolError`].
pub fn read_job_spec(dir: &Path) -> Result<JobSpec, SpoolError> {
    let path = dir.join(JOB_SPEC);
    let damaged = |message: String| SpoolError::Damaged {
        path: path.clone(),
        message,
    };
    let text =
        patiently(|| regular::whole(open_own(&path)?, LONGEST_SPEC)).map_err(
            |error| match error.kind() {
                io::ErrorKind::FileTooLarge => damaged(error.to_string()),
                _ => failed("read", &path)(error),
            },
        )?;
    let spec: JobSpec = frame::decode(&text).map_err(|error| damaged(error.to_string()))?;
    spec.check().map_err(damaged)?;
    Ok(spec)
}
