//! `retort runs`.

use clap::Subcommand;

use serde_json::Value;

use crate::cli::{Context, Error, Exit, FormatArgs, artifacts, talk};
use crate::store::{
    Access, RunDetail, RunFilter, RunState, RunSummary, SeriesSummary, StageDetail, Store,
    StoreError, Time,
};
use crate::table::{self, Cell, Rows, Style, Tone};

/// Arguments of `runs`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List runs, the newest first.
    List(ListArgs),
    /// Show a run: its stages, results, tables and pictures.
    Show(ShowArgs),
}

/// Arguments of `runs list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// At most this many; 0: all.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    pub limit: u32,
    /// Only runs of the recipe with this name.
    #[arg(long, value_name = "NAME")]
    pub recipe: Option<String>,
    /// Only runs in these states (separated by commas): queued, running, succeeded, failed, interrupted, lost.
    #[arg(long, value_name = "STATE")]
    pub state: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `runs show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or shows runs.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Command::List(args) => list(args, context),
        Command::Show(args) => show(args, context),
    }
}

fn list(args: &ListArgs, context: &Context) -> Result<(), Error> {
    let states = args
        .state
        .as_deref()
        .map(states)
        .transpose()?
        .unwrap_or_default();
    let style = args.format.style(context);
    let (runs, more) = context.runtime()?.block_on(async {
        let store = match Store::open(&context.store, Access::ReadOnly).await {
            Ok(store) => store,
            // An empty list is a truthful answer, and what scripts expect.
            Err(StoreError::Missing { .. }) => return Ok((Vec::new(), false)),
            Err(error) => return Err(Error::from(error)),
        };
        let limit = (args.limit > 0).then_some(args.limit);
        // One more than asked for tells whether there are more.
        let recipe = args.recipe.clone();
        let filter = RunFilter {
            limit: limit.map(|limit| limit.saturating_add(1)),
            states,
            recipe,
        };
        let mut runs = store.list_runs(&filter).await?;
        store.close().await;
        let more = limit.is_some_and(|limit| runs.len() as u64 > u64::from(limit));
        runs.truncate(limit.map_or(runs.len(), |limit| limit as usize));
        Ok((runs, more))
    })?;
    let text = match style {
        // People are told in words.
        Style::Table { .. } if runs.is_empty() => String::new(),
        Style::Json => format!("{:#}\n", serde_json::json!(runs)),
        Style::Csv => complete_rows(&runs).render(style),
        Style::Table { .. } | Style::Markdown => brief_rows(&runs).render(style),
    };
    talk::print(&text)?;
    if runs.is_empty() && !context.quiet {
        let which = if args.state.is_some() || args.recipe.is_some() {
            "such "
        } else {
            ""
        };
        talk::say(&format!("no {which}runs in {}", context.store.display()));
    }
    if more && !context.quiet {
        talk::say(&format!(
            "the newest {} are shown; `--limit 0` shows all",
            args.limit
        ));
    }
    Ok(())
}

fn states(text: &str) -> Result<Vec<RunState>, Error> {
    const ALL: [RunState; 6] = [
        RunState::Queued,
        RunState::Running,
        RunState::Succeeded,
        RunState::Failed,
        RunState::Interrupted,
        RunState::Lost,
    ];
    let state = |name: &str| {
        ALL.into_iter()
            .find(|state| state.name() == name)
            .ok_or_else(|| {
                let names = ALL.map(RunState::name).join(", ");
                Error::new(
                    Exit::Usage,
                    format!("`{name}` is no state of a run: {names}"),
                )
            })
    };
    text.split(',').map(|name| state(name.trim())).collect()
}

fn brief_rows(runs: &[RunSummary]) -> Rows {
    let mut rows = Rows::new(&[
        "run", "state", "recipe", "started", "took", "stages", "tags",
    ]);
    for run in runs {
        rows.push([
            run.id.0.as_str().into(),
            run.state.into(),
            run.recipe.as_str().into(),
            run.started.into(),
            Cell::seconds(run.seconds),
            stages_in_words(run).into(),
            run.tags.join(" ").into(),
        ]);
    }
    rows
}

fn stages_in_words(run: &RunSummary) -> String {
    let counts = run.stages;
    let named = [
        (counts.ran, "ran"),
        (counts.reused, "reused"),
        (counts.failed, "failed"),
    ];
    let parts = named
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, name)| format!("{count} {name}"));
    let parts = parts.collect::<Vec<_>>().join(", ");
    if counts.ran + counts.reused < counts.total {
        let rest = if parts.is_empty() {
            String::new()
        } else {
            format!("{parts} ")
        };
        format!("{rest}of {}", counts.total)
    } else {
        parts
    }
}

fn complete_rows(runs: &[RunSummary]) -> Rows {
    let mut rows = Rows::new(&[
        "id",
        "state",
        "recipe",
        "started",
        "finished",
        "seconds",
        "stages",
        "ran",
        "reused",
        "failed",
        "tags",
        "seed",
        "recipe_path",
        "resumed_from",
        "error",
    ]);
    for run in runs {
        rows.push([
            run.id.0.as_str().into(),
            run.state.into(),
            run.recipe.as_str().into(),
            run.started.into(),
            run.finished.into(),
            Cell::number(run.seconds),
            u64::from(run.stages.total).into(),
            u64::from(run.stages.ran).into(),
            u64::from(run.stages.reused).into(),
            u64::from(run.stages.failed).into(),
            run.tags.join(" ").into(),
            run.seed.into(),
            run.recipe_path.as_str().into(),
            run.resumed_from.as_ref().map(|id| id.0.as_str()).into(),
            run.error.as_deref().into(),
        ]);
    }
    rows
}

fn show(args: &ShowArgs, context: &Context) -> Result<(), Error> {
    let (detail, metrics) = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        let detail = store.run_detail(&run).await?;
        let metrics = store.last_metrics(&run).await?;
        store.close().await;
        Ok::<_, Error>((detail, metrics))
    })?;
    let style = args.format.style(context);
    let text = match style {
        Style::Json => format!("{:#}\n", complete(&detail, &metrics, context)),
        Style::Csv => stage_rows(&detail).render(style),
        Style::Table { .. } | Style::Markdown => {
            let sections = sections(&detail, context);
            let texts = sections
                .iter()
                .filter(|rows| !rows.is_empty())
                .map(|rows| rows.render(style));
            texts.collect::<Vec<_>>().join("\n")
        }
    };
    Ok(talk::print(&text)?)
}

/// Everything about a run, for programs.
fn complete(detail: &RunDetail, metrics: &[SeriesSummary], context: &Context) -> Value {
    let mut complete = serde_json::json!(detail);
    complete["metrics"] = serde_json::json!(metrics);
    for (shown, row) in complete["artifacts"]
        .as_array_mut()
        .into_iter()
        .flatten()
        .zip(&detail.artifacts)
    {
        shown["path"] = artifacts::path(row, context).into();
    }
    complete
}

/// Everything about a run, for people: the results last, where they are seen.
fn sections(detail: &RunDetail, context: &Context) -> Vec<Rows> {
    let mut sections = vec![
        facts(detail),
        stage_rows(detail).titled("Stages"),
        param_rows(detail),
    ];
    sections.push(environment_rows(detail));
    sections.push(artifacts::rows(&detail.artifacts, context).titled("Artifacts"));
    for artifact in &detail.artifacts {
        if let Some(table) = &artifact.artifact.meta.table {
            let rows = Rows::from(table);
            let title = if table.title.is_empty() {
                &artifact.stage
            } else {
                &table.title
            };
            sections.push(rows.titled(title));
        }
    }
    sections
}

fn facts(detail: &RunDetail) -> Rows {
    let run = &detail.summary;
    let mut rows = Rows::new(&["", ""]);
    let mut add = |name: &str, value: Cell| rows.push([Cell::from(name).tone(Tone::Dim), value]);
    add("run", run.id.0.as_str().into());
    add("state", run.state.into());
    add(
        "recipe",
        format!("{} ({})", run.recipe, run.recipe_path).into(),
    );
    let since = table::ago(Time::now().since(run.started).as_secs_f64());
    add("started", format!("{} ({since})", run.started).into());
    add("took", Cell::seconds(run.seconds));
    add("command", run.command.join(" ").into());
    if let Some(earlier) = &run.resumed_from {
        add("resumes", earlier.0.as_str().into());
    }
    if !run.tags.is_empty() {
        add("tags", run.tags.join(" ").into());
    }
    if let Some(error) = &run.error {
        add("error", Cell::from(error.as_str()).tone(Tone::Bad));
    }
    rows
}

fn stage_rows(detail: &RunDetail) -> Rows {
    let mut rows = Rows::new(&[
        "stage", "kind", "state", "took", "cpu", "memory", "device", "digest", "output", "why",
    ]);
    for stage in &detail.stages {
        let last = stage.attempts.last();
        let output = detail
            .artifacts
            .iter()
            .find(|row| row.is_output && row.stage == stage.name);
        rows.push([
            stage.name.as_str().into(),
            stage.kind.as_str().into(),
            stage.state.into(),
            last.and_then(|attempt| attempt.seconds)
                .map(Cell::seconds)
                .into(),
            last.and_then(|attempt| attempt.usage.cpu_seconds)
                .map(Cell::seconds)
                .into(),
            last.and_then(|attempt| attempt.usage.max_rss)
                .map(Cell::bytes)
                .into(),
            format!("{} {}", stage.device, stage.dtype).into(),
            stage.digest.as_deref().map(hash).into(),
            output.map(|row| hash(&row.artifact.hash)).into(),
            why(stage).into(),
        ]);
    }
    rows
}

/// How a stage ended, or where its result was taken from.
fn why(stage: &StageDetail) -> String {
    if let Some(source) = &stage.reused_from {
        return format!("from run {}", source.run);
    }
    let Some(attempt) = stage.attempts.last() else {
        return String::new();
    };
    let reason = attempt
        .reason
        .as_deref()
        .filter(|reason| *reason != stage.state.name());
    let parts = [reason, attempt.message.as_deref()];
    parts.into_iter().flatten().collect::<Vec<_>>().join(": ")
}

fn param_rows(detail: &RunDetail) -> Rows {
    let mut rows = Rows::new(&["parameter", "value", "origin"]).titled("Parameters");
    for param in &detail.params {
        rows.push([
            param.path.as_str().into(),
            Cell::json(&param.value),
            Cell::from(param.origin.as_str()).tone(Tone::Dim),
        ]);
    }
    rows
}

fn environment_rows(detail: &RunDetail) -> Rows {
    let mut rows = Rows::new(&["", ""]).titled("Environment");
    for (name, value) in detail.environment.as_object().into_iter().flatten() {
        let shown = match (name.as_str(), value.as_u64()) {
            ("memory", Some(bytes)) => Cell::bytes(bytes),
            _ => Cell::json(value),
        };
        rows.push([Cell::from(name.as_str()).tone(Tone::Dim), shown]);
    }
    rows
}

/// A hash: its beginning is enough for people.
pub(super) fn hash(hash: &str) -> Cell {
    Cell::new(hash.get(..12).unwrap_or(hash), hash)
}
