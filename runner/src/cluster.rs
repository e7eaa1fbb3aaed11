//! A cluster: the work of stages done by jobs of Slurm, on machines that share the store's directory.
//!
//! In: tasks, as a worker of this machine gets them. Out: the same [`WorkerEvent`](crate::worker::process::WorkerEvent) events, and
//! [`ElementEvent`] that only a cluster has. A divisible stage is a job array, an element of it a part; another stage one job.
//! What workers say comes through a [`spool`], so neither the machine of the runner nor the runner has to be there:
//! another one takes the job up from its spool. Compute nodes never open the history.
//!
//! [`dispatch`] is the runner's end, [`node`] the end where the work is done, [`slurm`] what is asked of Slurm.

use crate::store::{JobKey, LogLine};

pub mod devices;
pub mod dispatch;
pub mod node;
pub mod slurm;
pub mod spool;

/// What only a worker on another machine does.
#[derive(Debug)]
pub enum ElementEvent {
    /// It has begun to work.
    Began,
    /// A line, from its own time.
    Line(LogLine),
    /// Everything that it has said up to this record has been heard.
    ReadTo {
        /// The job.
        job: JobKey,
        /// Its element.
        element: usize,
        /// The number of the record.
        number: u64,
    },
    /// It has ended, or never came to begin, for a reason that only a cluster has.
    Ended(ClusterEnd),
}

/// How an element ended for a reason that only a cluster has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterEnd {
    /// In few words; stable, to be searched for: `node failed`, `time limit`, `cancelled in Slurm`.
    pub reason: String,
    /// What happened, for people.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}
