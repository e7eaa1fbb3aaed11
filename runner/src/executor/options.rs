//! How to execute a run: how many stages at a time, where it stops, and how it leaves a cluster's jobs.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::slurm::Slurm;
use crate::cluster::torchrun::Board;
use crate::settings::Settings;
use crate::store::{RunId, SweepPlace};

/// A cluster, and what stages ask of it.
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
    /// How long a stage may take to reach its next checkpoint when it is to stop.
    pub grace: Duration,
    /// The arguments of the command, for the record.
    pub command: Vec<String>,
    /// Where it runs, for the record.
    pub environment: serde_json::Value,
    /// The run that this one takes up again.
    pub resumed_from: Option<RunId>,
    /// How many runs this process carries out at the same time: they share the cores.
    pub runs: NonZeroUsize,
    /// The point of a sweep that it is.
    pub sweep: Option<SweepPlace>,
    /// Where it is to stop, to be judged.
    pub rung: Option<Rung>,
    /// The cluster whose jobs do the work; none: processes of this machine do.
    pub cluster: Option<Cluster>,
    /// Where the ranks are told what to do that `torchrun` has started beside this process, if it has.
    pub board: Option<Arc<Board>>,
    /// How its jobs are left.
    pub leave: DetachPolicy,
    /// What was set for them by flags, for the record.
    pub slurm: Vec<String>,
}

/// How a runner leaves jobs of a cluster.
#[derive(Clone)]
pub enum DetachPolicy {
    /// It does not: Ctrl-C cancels them.
    Never,
    /// By itself, when everything is submitted that can be.
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

/// Where a run stops: its first checkpoint after a step of a series.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rung {
    /// The series: `distill/loss`, or `student/distill/loss` with its stage.
    pub series: String,
    /// The step.
    pub step: u64,
}

impl Rung {
    /// Whether a stage's series is meant.
    pub fn is_of(&self, stage: &str, series: &str) -> bool {
        let behind = |stage: &str| self.series.strip_prefix(stage)?.strip_prefix('/');
        self.series == series || behind(stage) == Some(series)
    }
}
