//! The ways through the runs, and the indexes that lead there.

use super::{AGE, FieldTarget, STARTED};
use crate::filter::{Field, Operator, Value};
use crate::store::RunFilter;

/// With this many rows in the order of a sort, a page may be full.
pub(super) const FIRST: u32 = 2048;

/// The way through the runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// All of them, or all rows with a name that a run must have.
    All,
    /// The runs: an index finds the few that can match.
    Runs,
    /// The rows that pass a comparison, by its place among the required ones.
    Rows(usize),
    /// The first ones in the order of the first sort. A statement that finds fewer runs than the limit has found nothing.
    First,
}

/// The table that leads a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leader {
    /// All rows of a joined one's name, in the order of runs.
    Joined(usize),
    /// Rows `f` of a table and a name, by an index of their values.
    Indexed((&'static str, i64)),
}

/// The table of a field's row, and the key of its name.
pub(super) fn place_of(target: &FieldTarget) -> Option<(&'static str, i64)> {
    match target {
        FieldTarget::Param(name) => Some(("params", *name)),
        FieldTarget::Series(name, _) => Some(("results", *name)),
        _ => None,
    }
}

/// The column of a field that has an index.
pub(super) fn column_of(target: &FieldTarget) -> &'static str {
    match *target {
        FieldTarget::Param(_) => "value",
        FieldTarget::Series(_, column) => column,
        _ => "created",
    }
}

/// Whether the values of a field's row have an index.
fn is_indexed(target: &FieldTarget) -> bool {
    matches!(
        target,
        FieldTarget::Param(_) | FieldTarget::Series(_, "last")
    )
}

/// Whether a filter asks for something.
pub(super) fn is_narrowed(filter: &RunFilter) -> bool {
    filter.expr.is_some() || filter.recipe.is_some() || !filter.states.is_empty()
}

/// Whether [`Way::First`] can find the runs: an index has the order, and there is a limit to reach.
pub(super) fn can_be_first(filter: &RunFilter, targets: &[(&Field, FieldTarget)]) -> bool {
    let first = filter.sort.first().and_then(|sort| {
        let found = targets.iter().find(|(known, _)| **known == sort.name.field);
        found.map(|(_, target)| target)
    });
    let has_order = match first {
        None => filter.sort.is_empty() && is_narrowed(filter),
        Some(target) if *target == STARTED => is_narrowed(filter),
        Some(target) => is_indexed(target),
    };
    has_order && filter.limit.is_some()
}

/// The way through what passes the required comparison with this number, if it has an index.
pub(super) fn way_by(
    number: usize,
    target: &FieldTarget,
    operator: Operator,
    value: &Value,
) -> Option<Way> {
    let is_equal = operator == Operator::Equal;
    match (target, operator) {
        (_, Operator::Unequal | Operator::Like | Operator::Unlike) => None,
        _ if is_indexed(target) => {
            let is_nothing = value.is_word("nan") || value.is_word("null");
            (!is_nothing).then_some(Way::Rows(number))
        }
        (FieldTarget::Run("r.recipe", _) | FieldTarget::Any("tags", _), _) => {
            is_equal.then_some(Way::Runs)
        }
        _ => (*target == STARTED || *target == AGE).then_some(Way::Runs),
    }
}
