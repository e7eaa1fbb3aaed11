//! `retort why`: why a stage of a run ran, or why it did not have to.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::cli::{Context, Error, Exit, FormatArgs, talk};
use crate::plan::decision;
use crate::store::{Access, RunId, StageState, Store, Turn};
use crate::table::{Rows, Style};

/// Arguments of `why`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The stage.
    #[arg(value_name = "STAGE")]
    pub stage: String,
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// What can be said of a stage's turn.
struct Answer {
    stage: String,
    depth: usize,
    state: StageState,
    compared_with: Option<RunId>,
    why: Vec<String>,
}

/// Says why a stage ran or was reused.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let (run, answers) = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        if store.turn(&run, &args.stage).await?.is_none() {
            return Err(no_such_stage(&store, &run, &args.stage).await?);
        }
        let answers = answers(&store, &run, &args.stage).await?;
        store.close().await;
        Ok::<_, Error>((run, answers))
    })?;
    let style = args.format.style(context);
    if style == Style::Json {
        let list: Vec<Value> = answers
            .iter()
            .map(|answer| {
                json!({"run": run, "stage": answer.stage, "depth": answer.depth, "state": answer.state,
                    "compared_with": answer.compared_with, "why": answer.why})
            })
            .collect();
        return Ok(talk::print(&format!("{:#}\n", json!(list)))?);
    }
    let mut rows = Rows::new(&["stage", "state", "why", "compared with"]);
    for answer in &answers {
        let indent = "  ".repeat(answer.depth);
        rows.push([
            format!("{indent}{}", answer.stage).into(),
            answer.state.into(),
            answer.why.join("\n").into(),
            answer
                .compared_with
                .as_ref()
                .map(|run| run.0.as_str())
                .into(),
        ]);
    }
    Ok(talk::print(&rows.render(style))?)
}

async fn no_such_stage(store: &Store, run: &RunId, stage: &str) -> Result<Error, Error> {
    let detail = store.run_detail(run).await?;
    let names: Vec<&str> = detail
        .stages
        .iter()
        .map(|stage| stage.name.as_str())
        .collect();
    Ok(Error::new(
        Exit::NothingMatches,
        format!("run {run} has no stage `{stage}`"),
    )
    .hint(format!("it has {}", names.join(", "))))
}

/// Why a stage had its turn as it did; and, where an input had changed, why that had.
async fn answers(store: &Store, run: &RunId, stage: &str) -> Result<Vec<Answer>, Error> {
    let mut answers = Vec::new();
    let mut told = HashSet::new();
    let mut ahead = vec![(stage.to_owned(), 0)];
    while let Some((stage, depth)) = ahead.pop() {
        if !told.insert(stage.clone()) {
            continue;
        }
        let Some(turn) = store.turn(run, &stage).await? else {
            continue;
        };
        let before = store.turn_before(run, &stage).await?;
        let changed = changed_inputs(&turn, before.as_ref());
        ahead.extend(changed.into_iter().rev().map(|input| (input, depth + 1)));
        answers.push(Answer {
            stage,
            depth,
            state: turn.state,
            why: why(&turn, before.as_ref()),
            compared_with: before.map(|before| before.run),
        });
    }
    Ok(answers)
}

fn why(turn: &Turn, before: Option<&Turn>) -> Vec<String> {
    let Some(components) = &turn.components else {
        let inputs: Vec<&str> = turn
            .inputs
            .iter()
            .map(|(_, stage)| stage.as_str())
            .collect();
        return vec![match inputs.as_slice() {
            [] => "the run ended before its turn".into(),
            inputs => format!(
                "its inputs did not all come: it needs {}",
                inputs.join(", ")
            ),
        }];
    };
    let differences = before
        .and_then(|before| before.components.as_ref())
        .map(|before| decision::differences(before, components));
    let mut why = Vec::new();
    if let Some(from) = &turn.reused_from {
        why.push(format!(
            "run {from} had made the same: nothing that decides its result differs"
        ));
    }
    if turn.forced {
        why.push("it was made to run (--force)".into());
    }
    match (differences, before) {
        (Some(differences), Some(before)) if differences.is_empty() && why.is_empty() => {
            why.push(unchanged(before));
        }
        (Some(differences), Some(_)) => why.extend(differences),
        _ if turn.reused_from.is_none() => why.push("this recipe had not run it before".into()),
        _ => {}
    }
    why
}

/// Why a stage ran although nothing differs from its turn before.
fn unchanged(before: &Turn) -> String {
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

/// The stages whose results went in and were others before.
fn changed_inputs(turn: &Turn, before: Option<&Turn>) -> Vec<String> {
    let (Some(now), Some(before)) = (
        &turn.components,
        before.and_then(|before| before.components.as_ref()),
    ) else {
        return Vec::new();
    };
    let mut changed: Vec<String> = Vec::new();
    for (pointer, stage) in &turn.inputs {
        let at = |components: &Value| components["options"].pointer(pointer).cloned();
        if at(now) != at(before) && !changed.contains(stage) {
            changed.push(stage.clone());
        }
    }
    changed
}
