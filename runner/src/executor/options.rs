//! How to execute a run: concurrency, where it stops, and how it detaches from a cluster's jobs.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::slurm::Slurm;
use crate::cluster::torchrun::TrainingBoard;
use crate::settings::Settings;
use crate::store::{RunId, SweepPlace};

/// A cluster, and the stages' profiles.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Slurm.
    pub slurm: Arc<Slurm>,
    /// What is set.
    pub settings: Arc<Settings>,
}

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many stages may run at the same time.
    pub jobs: NonZeroUsize,
    /// Whether stages that do not depend on a failed one still run.
    pub keep_going: bool,
    /// How long a stage may take to reach its next checkpoint when asked to stop.
    pub grace: Duration,
    /// The arguments of the command, for the record.
    pub command: Vec<String>,
    /// The environment, for the record.
    pub environment: serde_json::Value,
    /// The run that this one resumes.
    pub resumed_from: Option<RunId>,
    /// How many runs this process executes concurrently: they share the cores.
    pub runs: NonZeroUsize,
    /// Its point of a sweep, if any.
    pub sweep: Option<SweepPlace>,
    /// The rung at which it stops.
    pub rung: Option<Rung>,
    /// The cluster whose jobs do the work; None for local processes.
    pub cluster: Option<Cluster>,
    /// The trainings for the other ranks, if `torchrun` started them.
    pub training_board: Option<Arc<TrainingBoard>>,
    /// How its jobs are left.
    pub leave: DetachPolicy,
    /// Their settings from flags, for the record.
    pub slurm: Vec<String>,
}

/// When a runner detaches from a cluster's jobs.
#[derive(Clone)]
pub enum DetachPolicy {
    /// Never: Ctrl-C cancels them.
    Never,
    /// Automatically, when everything possible has been submitted.
    WhenSubmitted,
    /// Ctrl-C asks. A function that waits for an answer; called on a thread of its own.
    Ask(Arc<dyn Fn() -> DetachAnswer + Send + Sync>),
}

impl std::fmt::Debug for DetachPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Never => "Never",
            Self::WhenSubmitted => "WhenSubmitted",
            Self::Ask(_) => "Ask",
        })
    }
}

/// The user's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetachAnswer {
    /// The jobs go on without a runner.
    Detach,
    /// They stop at their next checkpoint.
    Cancel,
    /// Nothing.
    GoOn,
}

/// A rung: the run stops at its first checkpoint after a step of a series.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rung {
    /// The series: `distill/loss`, or `student/distill/loss` with its stage.
    pub series: String,
    /// The step.
    pub step: u64,
}

impl Rung {
    /// Whether this is the rung's series.
    pub fn is_of(&self, stage: &str, series: &str) -> bool {
        let behind = |stage: &str| self.series.strip_prefix(stage)?.strip_prefix('/');
        self.series == series || behind(stage) == Some(series)
    }
}
