//! Sweeps: many runs of one recipe that differ in a few values.
//!
//! In: what `--sweep` and a recipe's `sweep:` say. Out: a [`Sweep`], and its points: for each the values to set, written as
//! `--set` has them (`sweep/space.rs` reads and counts, `sweep/draw.rs` draws). `sweep/halving.rs` decides which point
//! continues after a rung; `account/results.rs` finds the best point, and `account/plot.rs` draws a sweep. Deliberately
//! absent: planning and running, which work as for any run.

use serde::{Deserialize, Serialize};

mod draw;
pub mod halving;
mod section;
mod space;

pub use section::{schema, section};
pub use space::SpaceError;

/// Maximum points of a sweep.
pub const MAX_POINTS: u64 = 10_000;

/// A sweep, as it is recorded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// What is varied.
    pub parameters: Vec<Parameter>,
    /// The objective.
    pub objective: Option<Objective>,
    /// How points are drawn; None for a grid.
    pub sample: Option<RandomSearch>,
    /// How points are stopped early.
    pub asha: Option<Asha>,
}

/// A value that is varied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parameter {
    /// Its path, as in `--set`.
    pub path: String,
    /// The values.
    #[serde(flatten)]
    pub values: Values,
}

/// The values of a parameter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Values {
    /// These, written as `--set` has them.
    Choice(Vec<String>),
    /// Whole numbers from the least to the greatest.
    Whole {
        /// The least.
        min: i64,
        /// The greatest.
        max: i64,
        /// Whether they are drawn evenly over the logarithm.
        log: bool,
    },
    /// Numbers from the least to the greatest.
    Real {
        /// The least.
        min: f64,
        /// The greatest.
        max: f64,
        /// Whether the logarithm is divided evenly.
        log: bool,
        /// How many values a grid has; drawn points need none.
        count: Option<u32>,
    },
}

/// What a sweep looks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objective {
    /// A metric, as filters have it after `metrics.`.
    pub metric: String,
    /// The least or the greatest.
    #[serde(default)]
    pub goal: Goal,
}

/// Which value is the best.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// The least.
    #[default]
    Min,
    /// The greatest.
    Max,
}

impl Goal {
    /// The order of two values, the better first; NaN is worse than any number.
    pub fn order(self, one: f64, other: f64) -> std::cmp::Ordering {
        match (one.is_nan(), other.is_nan()) {
            (false, false) => match self {
                Goal::Min => one.total_cmp(&other),
                Goal::Max => other.total_cmp(&one),
            },
            (nan, _) => nan.cmp(&other.is_nan()),
        }
    }
}

/// How points are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RandomSearch {
    /// Number.
    pub count: u32,
    /// The same seed draws the same points.
    pub seed: u64,
}

/// Successive halving, asynchronously (ASHA, Li et al., arXiv 1810.05934): a point stops at each rung, and continues if it is
/// among the best there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asha {
    /// The series that points are judged by: `distill/loss`, or `student/distill/loss` with its stage.
    pub metric: String,
    /// Which value is the better.
    #[serde(default)]
    pub goal: Goal,
    /// Steps of the series at which points are judged, rising.
    pub rungs: Vec<u64>,
    /// One in N goes on.
    pub reduction_factor: u32,
}

/// A metric with its goal, as it is typed: `loss`, `min:loss`, `max:accuracy`.
pub fn goal_and_metric(text: &str) -> (Goal, &str) {
    match text.split_once(':') {
        Some(("min", metric)) => (Goal::Min, metric),
        Some(("max", metric)) => (Goal::Max, metric),
        _ => (Goal::Min, text),
    }
}
