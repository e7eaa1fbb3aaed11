//! Why a stage of a run ran, or was reused.

use std::collections::HashSet;

use serde_json::Value;

use crate::plan::decision;
use crate::store::{RunId, StageRecord, StageState, Store, StoreError};

/// The explanation of a stage.
#[derive(Debug, Clone)]
pub struct StageReason {
    /// The stage.
    pub stage: String,
    /// The number of inputs between it and the stage in question.
    pub depth: usize,
    /// How its turn went.
    pub state: StageState,
    /// The earlier run for comparison.
    pub compared_with: Option<RunId>,
    /// Why, a sentence each.
    pub why: Vec<String>,
}

/// Why a stage ran or was reused, and why changed inputs had changed.
///
/// # Errors
/// [`StoreError::Damaged`], [`StoreError::Sql`].
pub async fn of_stage(
    store: &Store,
    run: &RunId,
    stage: &str,
) -> Result<Vec<StageReason>, StoreError> {
    let mut reasons = Vec::new();
    let mut told = HashSet::new();
    let mut ahead = vec![(stage.to_owned(), 0)];
    while let Some((stage, depth)) = ahead.pop() {
        if !told.insert(stage.clone()) {
            continue;
        }
        if let Some((mut reason, changed)) = of_turn(store, run, &stage).await? {
            ahead.extend(changed.into_iter().rev().map(|input| (input, depth + 1)));
            reason.depth = depth;
            reasons.push(reason);
        }
    }
    Ok(reasons)
}

/// Why one stage ran or was reused, and which of its inputs had changed; None if the run has no such stage.
///
/// # Errors
/// [`StoreError::Damaged`], [`StoreError::Sql`].
pub async fn of_turn(
    store: &Store,
    run: &RunId,
    stage: &str,
) -> Result<Option<(StageReason, Vec<String>)>, StoreError> {
    let Some(record) = store.stage_record(run, stage).await? else {
        return Ok(None);
    };
    let before = store.earlier_stage_record(run, stage).await?;
    let changed = changed_inputs(&record, before.as_ref());
    let reason = StageReason {
        stage: stage.to_owned(),
        depth: 0,
        state: record.state,
        why: why(&record, before.as_ref()),
        compared_with: before.map(|before| before.run),
    };
    Ok(Some((reason, changed)))
}

fn why(record: &StageRecord, before: Option<&StageRecord>) -> Vec<String> {
    let Some(components) = &record.components else {
        let inputs: Vec<&str> = record
            .inputs
            .iter()
            .map(|(_, stage)| stage.as_str())
            .collect();
        return vec![match inputs.as_slice() {
            [] => "the run ended before its turn".into(),
            inputs => format!("some inputs were missing: it needs {}", inputs.join(", ")),
        }];
    };
    let differences = before
        .and_then(|before| before.components.as_ref())
        .map(|before| decision::differences(before, components));
    let mut why = Vec::new();
    if let Some(from) = &record.reused_from {
        why.push(format!(
            "run {from} had already made this result: nothing that affects it differs"
        ));
    }
    if record.forced {
        why.push("forced (--force)".into());
    }
    match (differences, before) {
        (Some(differences), Some(before)) if differences.is_empty() && why.is_empty() => {
            why.push(unchanged(before));
        }
        (Some(differences), Some(_)) => why.extend(differences),
        _ if record.reused_from.is_none() => {
            why.push("first run of this stage in this recipe".into())
        }
        _ => {}
    }
    why
}

/// Why a stage ran although nothing differs from its previous turn.
fn unchanged(before: &StageRecord) -> String {
    match before.state {
        StageState::Succeeded | StageState::Reused => {
            "nothing differs: its result was no longer in the store".into()
        }
        state => {
            let reason = before
                .reason
                .as_deref()
                .filter(|reason| *reason != state.name());
            let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
            format!("nothing differs, but it had not succeeded: it was {state}{reason}")
        }
    }
}

/// The input stages whose results have changed.
fn changed_inputs(record: &StageRecord, before: Option<&StageRecord>) -> Vec<String> {
    let (Some(now), Some(before)) = (
        &record.components,
        before.and_then(|before| before.components.as_ref()),
    ) else {
        return Vec::new();
    };
    let mut changed: Vec<String> = Vec::new();
    for (pointer, stage) in &record.inputs {
        let at = |components: &Value| components["options"].pointer(pointer).cloned();
        if at(now) != at(before) && !changed.contains(stage) {
            changed.push(stage.clone());
        }
    }
    changed
}
