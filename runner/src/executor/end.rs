//! How an attempt ended: in one word for the history, as a sentence for users.

use std::time::Duration;

use retort_abi::{Failure, FailureCode};
use serde_json::Value;

use crate::artifact;
use crate::store::{ArtifactRecord, AttemptState};
use crate::worker::death::{Death, signal_name};
use crate::worker::remote::ClusterEnd;

/// How an attempt ended: each way is a reason of its own in the history.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// It succeeded.
    Succeeded {
        /// The artifact that references to the stage stand for.
        output: Box<ArtifactRecord>,
        /// Facts it returned.
        summary: Value,
    },
    /// The plugin reports why.
    Failed(Failure),
    /// The plugin panicked, and said so.
    Panicked(Failure),
    /// The plugin could not be loaded.
    NotLoaded {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The process ended without a result, or by a signal that we did not send.
    Died(Death),
    /// A file that it reads changed.
    InputChanged {
        /// Which, and when.
        message: String,
    },
    /// It took longer than the recipe allows.
    TimedOut {
        /// So long.
        limit: Duration,
        /// How it stopped.
        manner: StopOutcome,
    },
    /// The user stopped it.
    Interrupted {
        /// How it stopped.
        manner: StopOutcome,
    },
    /// It ended for a reason specific to clusters.
    Cluster(ClusterEnd),
    /// Workers of a training were lost, and the next attempt does without them.
    LostWorkers {
        /// How the first of them ended.
        cause: Box<End>,
        /// How many there were.
        workers: usize,
        /// How many go on.
        left: usize,
    },
    /// What it sent makes no sense.
    Protocol {
        /// What.
        message: String,
    },
}

/// How an attempt stopped after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopOutcome {
    /// By itself, having saved its work.
    AtCheckpoint,
    /// By this signal.
    Signalled(i32),
    /// It ended in some other way just then.
    Otherwise,
}

impl End {
    /// In one word.
    pub fn state(&self) -> AttemptState {
        match self {
            Self::Succeeded { .. } => AttemptState::Succeeded,
            Self::Interrupted { .. } => AttemptState::Interrupted,
            _ => AttemptState::Failed,
        }
    }

    /// The precise reason, short; stable, for searches.
    pub fn reason(&self) -> String {
        match self {
            Self::Succeeded { .. } => "succeeded".into(),
            Self::Failed(failure) => format!("failed: {}", code_name(failure.code)),
            Self::Panicked(_) => "panic".into(),
            Self::NotLoaded { .. } => "plugin not loaded".into(),
            Self::Died(death) => death.reason(),
            Self::InputChanged { .. } => "input changed".into(),
            Self::TimedOut { .. } => "timeout".into(),
            Self::Interrupted { .. } => "interrupted".into(),
            Self::Cluster(end) => end.reason.clone(),
            Self::LostWorkers { cause, .. } => format!("lost a worker: {}", cause.reason()),
            Self::Protocol { .. } => "protocol error".into(),
        }
    }

    /// What happened, for people; `None` when it went well.
    pub fn message(&self) -> Option<String> {
        Some(match self {
            Self::Succeeded { .. } => return None,
            Self::Failed(failure) | Self::Panicked(failure) => {
                let place = failure
                    .pointer
                    .as_deref()
                    .filter(|pointer| !pointer.is_empty());
                let place = place.map_or_else(String::new, |pointer| format!("option {pointer}: "));
                let chain = failure
                    .chain
                    .iter()
                    .map(|cause| format!("; because {cause}"))
                    .collect::<String>();
                format!("{place}{}{chain}", failure.message)
            }
            Self::NotLoaded { message, .. }
            | Self::InputChanged { message }
            | Self::Protocol { message } => message.clone(),
            Self::Cluster(end) => end.message.clone(),
            Self::LostWorkers {
                cause,
                workers,
                left,
            } => format!(
                "{}; it goes on from its last checkpoint with {left} of {workers} workers",
                cause.message().unwrap_or_default()
            ),
            Self::Died(death) => death.message().into(),
            Self::TimedOut { limit, manner } => {
                format!(
                    "it exceeded its timeout of {}, and {manner}",
                    humantime::format_duration(*limit)
                )
            }
            Self::Interrupted { manner } => format!("it {manner}"),
        })
    }

    /// What to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Failed(failure) | Self::Panicked(failure) => {
                let repair = || artifact::repair_of(&failure.message).map(str::to_owned);
                failure.hint.clone().or_else(repair)
            }
            Self::NotLoaded { hint, .. } => hint.clone(),
            Self::Cluster(end) => end.hint.clone(),
            Self::Died(death) => death.hint().map(str::to_owned),
            Self::InputChanged { .. } => {
                Some("run again once nothing writes to it; this stage's output is discarded".into())
            }
            Self::TimedOut { .. } => Some(
                "raise the stage's `timeout`; `retort resume` continues from its last checkpoint"
                    .into(),
            ),
            _ => None,
        }
    }
}

impl std::fmt::Display for StopOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtCheckpoint => f.write_str("stopped at a checkpoint"),
            Self::Signalled(signal) => {
                write!(
                    f,
                    "was ended with {}; what it did since its last checkpoint is lost",
                    signal_name(*signal)
                )
            }
            Self::Otherwise => f.write_str("ended without a result"),
        }
    }
}

/// The code of a failure as it is written in JSON.
fn code_name(code: FailureCode) -> String {
    serde_json::to_value(code)
        .ok()
        .and_then(|name| Some(name.as_str()?.to_owned()))
        .unwrap_or_default()
}
