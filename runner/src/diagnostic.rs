//! What is wrong with a recipe, where, and what to do about it.
//!
//! In: findings with a place in the recipe. Out: text with `file:line:column` and the marked line. Deliberately
//! absent: finding anything, and exit codes.

use serde::{Deserialize, Serialize};

pub use retort_abi::Severity;

/// A place in a text; both count from 1, columns in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `error` stops everything, `warning` is shown.
    pub severity: Severity,
    /// Where, if it is in the recipe's text (values from `--set` are not).
    pub position: Option<Position>,
    /// JSON pointer from the recipe's root, empty where the whole recipe is meant.
    pub pointer: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}
