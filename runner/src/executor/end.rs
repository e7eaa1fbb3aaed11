//! How an attempt ended: a short reason for the history, and a sentence for users.

use std::time::Duration;

use retort_abi::{Failure, FailureCode, Part};
use serde_json::Value;

use crate::artifact;
use crate::store::{ArtifactRecord, AttemptState};
use crate::worker::death::{UnexpectedExit, signal_name};
use crate::worker::remote::ClusterEnd;

/// How an attempt ended: each variant is a separate reason in the history.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// It succeeded.
    Succeeded {
        /// The stage's output artifact, the target of references.
        output: Box<ArtifactRecord>,
        /// Facts it returned.
        summary: Value,
    },
    /// The plugin reports why.
    Failed(Failure),
    /// The plugin reported a panic.
    Panicked(Failure),
    /// The plugin could not be loaded.
    NotLoaded {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The process ended without a result, or through a signal that we did not send.
    Died(UnexpectedExit),
    /// A worker of a training hung while the others waited for it.
    Hung(Hang),
    /// A file that the stage reads changed.
    InputChanged {
        /// Which, and when.
        message: String,
    },
    /// It took longer than the recipe allows.
    TimedOut {
        /// So long.
        limit: Duration,
        /// How it stopped.
        outcome: StopOutcome,
    },
    /// The user stopped it.
    Interrupted {
        /// How it stopped.
        outcome: StopOutcome,
    },
    /// It ended for a reason specific to clusters.
    Cluster(ClusterEnd),
    /// Workers of a training were lost; the next attempt starts with all again, or continues without them.
    LostWorkers {
        /// How the first of them ended.
        cause: Box<End>,
        /// How many there were.
        workers: usize,
        /// How many go on.
        left: usize,
    },
    /// It sent an invalid message.
    Protocol {
        /// What.
        message: String,
    },
}

/// How a hanging worker was detected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hang {
    /// Which.
    pub part: Part,
    /// What it did not do.
    pub what: String,
}

impl Hang {
    /// It gave no sign of life.
    pub fn silent(part: Part, seconds: u64) -> Self {
        Self {
            part,
            what: format!("gave no sign of life for {seconds} seconds"),
        }
    }

    /// It is alive, but as the only one neither joined an exchange nor stopped.
    pub fn unresponsive(part: Part) -> Self {
        Self {
            part,
            what: "neither took part in an exchange that the others waited for, nor stopped when asked".into(),
        }
    }
}

/// How an attempt stopped after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopOutcome {
    /// By itself, having saved its work.
    AtCheckpoint,
    /// By this signal.
    Signalled(i32),
    /// It ended in some other way at that time.
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

    /// The precise reason: short, and stable for searches.
    pub fn reason(&self) -> String {
        match self {
            Self::Succeeded { .. } => "succeeded".into(),
            Self::Failed(failure) => match failure.code {
                FailureCode::WorkersDiffer => "workers differ".into(),
                FailureCode::WorkerLost => "lost contact with a worker".into(),
                code => format!("failed: {}", code_name(code)),
            },
            Self::Panicked(_) => "panic".into(),
            Self::NotLoaded { .. } => "plugin not loaded".into(),
            Self::Died(death) => death.reason(),
            Self::Hung(hang) => format!("rank {} hangs", hang.part.index),
            Self::InputChanged { .. } => "input changed".into(),
            Self::TimedOut { .. } => "timeout".into(),
            Self::Interrupted { .. } => "interrupted".into(),
            Self::Cluster(end) => end.reason.clone(),
            Self::LostWorkers { cause, .. } => format!("lost a worker: {}", cause.reason()),
            Self::Protocol { .. } => "protocol error".into(),
        }
    }

    /// What happened, for people; `None` on success.
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
            } => {
                let cause = cause.message().unwrap_or_default();
                let count = match left == workers {
                    true => format!("all {workers}"),
                    false => format!("{left} of {workers}"),
                };
                format!("{cause}; it goes on from its last checkpoint with {count} workers")
            }
            Self::Died(death) => death.message().into(),
            Self::Hung(Hang { part, what }) => {
                format!(
                    "worker {} of {} {what}, and was ended",
                    part.index + 1,
                    part.of
                )
            }
            Self::TimedOut { limit, outcome } => {
                format!(
                    "it exceeded its timeout of {}, and {outcome}",
                    humantime::format_duration(*limit)
                )
            }
            Self::Interrupted { outcome } => format!("it {outcome}"),
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
            Self::Hung(_) => Some("`retort resume` continues from the last checkpoint".into()),
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

/// A failure's code in its JSON form.
fn code_name(code: FailureCode) -> String {
    serde_json::to_value(code)
        .ok()
        .and_then(|name| Some(name.as_str()?.to_owned()))
        .unwrap_or_default()
}
