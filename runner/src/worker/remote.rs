//! What a worker on a cluster does besides: the events that no local process has.

use crate::store::{JobKey, LogLine};

/// An event of a remote worker only.
#[derive(Debug)]
pub enum ElementEvent {
    /// It started.
    Began {
        /// Where.
        node: String,
    },
    /// A line, from its own time.
    Line(LogLine),
    /// All its events up to this record have been read.
    ReadTo {
        /// The job.
        job: JobKey,
        /// Its element.
        element: usize,
        /// The number of the record.
        number: u64,
    },
    /// It ended, or never started, for a reason specific to clusters.
    Ended(ClusterEnd),
}

/// How an element ended for a reason specific to clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterEnd {
    /// Short and stable, for searches: `node failed`, `time limit`, `cancelled in Slurm`.
    pub reason: String,
    /// What happened, for people.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}
