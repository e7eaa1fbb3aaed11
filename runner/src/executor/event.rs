//! The events that a run sends to its listener.

use std::sync::Arc;
use std::time::Duration;

use crate::executor::end::End;
use crate::frame::Progress;
use crate::store::{AttemptId, LogLine, RunId};

/// Receives events, on the event loop's thread: must not block.
pub type Listener = Arc<dyn Fn(Event) + Send + Sync>;

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The run is recorded and begins.
    RunBegan {
        /// Its id.
        run: RunId,
    },
    /// A stage's result was in the store.
    Reused {
        /// The stage.
        stage: String,
        /// The run it comes from.
        from: RunId,
    },
    /// Another process is running the same stage.
    Waiting {
        /// The stage.
        stage: String,
    },
    /// Slurm has taken a job.
    Submitted {
        /// The stage.
        stage: String,
        /// Slurm's id.
        job: u64,
        /// Elements, where it is an array.
        elements: Option<usize>,
    },
    /// A worker has started on a stage.
    Began {
        /// The stage.
        stage: String,
        /// The attempt.
        attempt: AttemptId,
        /// The worker's process id.
        pid: u32,
        /// `cpu`, `cuda:0`.
        device: String,
        /// How many processes divide the work; 1 if it is not divided.
        workers: usize,
        /// Threads each may use.
        threads: usize,
    },
    /// Stage progress.
    Progress {
        /// The stage.
        stage: String,
        /// How far.
        progress: Progress,
    },
    /// A stage, or a library it uses, wrote a line.
    Line {
        /// The stage.
        stage: String,
        /// The line.
        line: LogLine,
    },
    /// An attempt has ended.
    Ended {
        /// The stage.
        stage: String,
        /// How.
        end: End,
        /// After how long.
        elapsed: Duration,
        /// The last lines of its standard error.
        last_words: Vec<String>,
    },
    /// The user wants the run to stop: workers are asked to stop at their next checkpoint.
    Stopping {
        /// How long they have.
        grace: Duration,
        /// How many there are.
        workers: usize,
    },
    /// The user wants the run to stop at once.
    Killing,
    /// The user was asked whether the run is to stop, and wants it to go on.
    GoingOn,
    /// Something is odd.
    Warning {
        /// The stage, if there is one.
        stage: Option<String>,
        /// What.
        text: String,
    },
}

impl Event {
    /// The same event with another stage name.
    pub fn renamed(mut self, name: impl Fn(&str) -> String) -> Self {
        match &mut self {
            Self::Reused { stage, .. }
            | Self::Waiting { stage }
            | Self::Submitted { stage, .. }
            | Self::Began { stage, .. }
            | Self::Progress { stage, .. }
            | Self::Line { stage, .. }
            | Self::Ended { stage, .. }
            | Self::Warning {
                stage: Some(stage), ..
            } => *stage = name(stage),
            Self::RunBegan { .. }
            | Self::Stopping { .. }
            | Self::Killing
            | Self::GoingOn
            | Self::Warning { stage: None, .. } => {}
        }
        self
    }
}
