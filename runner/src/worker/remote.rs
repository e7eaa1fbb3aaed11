//! Events that only a worker on a cluster has.

use crate::frame::FromWorker;
use crate::store::{LogLine, ReadMark};

/// An event of a remote worker only.
#[derive(Debug)]
pub enum ElementEvent {
    /// It started.
    Began {
        /// Its node.
        node: String,
    },
    /// A frame that is recorded, and the read position after it.
    Frame(FromWorker, ReadMark),
    /// A line with its own time; the read mark is recorded with it.
    Line(LogLine, Option<ReadMark>),
    /// All its events up to this position have been read, including those that are not recorded.
    ReadTo(ReadMark),
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
