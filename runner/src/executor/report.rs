//! How a run went, stage by stage.

use std::time::Duration;

use crate::executor::end::End;
use crate::store::{RunId, RunState};

/// How a run went.
#[derive(Debug)]
pub struct RunReport {
    /// Its id.
    pub run: RunId,
    /// Its state.
    pub state: RunState,
    /// The signal that stopped it.
    pub signal: Option<i32>,
    /// Its value at the rung where it stopped.
    pub rung: Option<f64>,
    /// Its stages, in the plan's order, without those left out.
    pub stages: Vec<StageReport>,
    /// How long it took.
    pub elapsed: Duration,
}

/// How a stage went.
#[derive(Debug)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its outcome.
    pub outcome: Outcome,
    /// How long its attempt took; zero if there was none.
    pub elapsed: Duration,
}

/// A stage's outcome.
#[derive(Debug)]
pub enum Outcome {
    /// It ran, and ended like this.
    Ran(End),
    /// Its result was reused.
    Reused {
        /// The run it comes from.
        from: RunId,
    },
    /// It did not run because this stage did not succeed.
    Blocked {
        /// The other stage.
        by: String,
    },
    /// The run ended before the stage's turn.
    NotReached,
}

impl StageReport {
    /// Whether its result exists.
    pub fn is_good(&self) -> bool {
        matches!(
            self.outcome,
            Outcome::Ran(End::Succeeded { .. }) | Outcome::Reused { .. }
        )
    }
}

/// One line: which stages failed, and how.
pub(super) fn why(stages: &[StageReport]) -> Option<String> {
    let failed: Vec<String> = stages
        .iter()
        .filter(|stage| !stage.is_good())
        .filter_map(|stage| match &stage.outcome {
            Outcome::Ran(end) => {
                let message = end
                    .message()
                    .map_or_else(String::new, |message| format!(": {message}"));
                Some(format!("{}: {}{message}", stage.name, end.reason()))
            }
            _ => None,
        })
        .collect();
    (!failed.is_empty()).then(|| failed.join("; "))
}
