//! `retort runs`.

use clap::Subcommand;

use serde_json::Value;

use crate::cli::{
    Context, Error, Exit, FormatArgs, artifacts, detached, metrics, output, transfer,
};
use crate::filter;
use crate::store::{
    Access, JobRow, RunDetail, RunFilter, RunState, RunSummary, SeriesSummary, Sort, StageDetail,
    StageState, Store, StoreError, Time, is_tag,
};
use crate::table::{self, Cell, CellStyle, Rows, Style};

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
    /// Add tags to a run, to refer to it by, or remove them.
    Tag(TagArgs),
    /// Set a note on a run.
    Note(NoteArgs),
    /// Remove runs from the history; `gc` then removes the files that no other run needs.
    Rm(RemoveArgs),
    /// Write runs into one file, for another store; salvages a damaged store.
    Export(transfer::ExportArgs),
    /// Import the runs of an exported file that this store lacks.
    ///
    /// The whole file is checked first. Then its runs are copied piece by piece, so that other commands can write in
    /// between. An interrupted import leaves whole runs; repeat it to continue.
    Import(transfer::ImportArgs),
}

/// Arguments of `runs tag`.
#[derive(Debug, clap::Args)]
pub struct TagArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN")]
    pub run: String,
    /// The tags: any text.
    #[arg(value_name = "TAG", required = true)]
    pub tags: Vec<String>,
    /// Remove the tags instead.
    #[arg(long)]
    pub remove: bool,
}

/// Arguments of `runs note`.
#[derive(Debug, clap::Args)]
pub struct NoteArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN")]
    pub run: String,
    /// The new note, which replaces the previous one; without it, the note is printed.
    #[arg(value_name = "TEXT")]
    pub text: Option<String>,
}

/// Arguments of `runs rm`.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    /// The runs: ids or prefixes of them, `latest`, `latest~1`, or tags.
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<String>,
    /// Only say what would be removed.
    #[arg(long)]
    pub dry_run: bool,
    /// Remove even if other runs reuse their stages; those forget where the results came from.
    #[arg(long)]
    pub force: bool,
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
    /// Only runs that pass this filter: `metrics.1-step.frechet_distance < 20 and params.student.train.steps >= 900`.
    ///
    /// Compares fields with values by = != < <= > >=, ~ (contains; `*` and `?` make it a pattern), `in (a, b)`; a
    /// field alone asks whether a run has it. Joined by `and`, `or`, `not` and parentheses. Fields: id, state, recipe,
    /// path, started, finished, seconds (or took), age, seed, error, note, tag, stage, kind, plugin, device, stages,
    /// reused, sweep, point; params.PATH; metrics.SERIES with .last, .min, .max or .points; stage.NAME with .state,
    /// .seconds, .kind, .plugin or .device; env.NAME. Durations are written 10m or 7d, dates 2026-01-31.
    #[arg(short = 'w', long = "where", value_name = "FILTER")]
    pub filter: Option<String>,
    /// Order by these fields (separated by commas), smallest first; the greatest first with a minus before the name.
    #[arg(
        long,
        value_name = "FIELD",
        allow_hyphen_values = true,
        value_delimiter = ','
    )]
    pub sort: Vec<String>,
    /// Also print these fields (separated by commas): `metrics.1-step.frechet_distance`, `params.student.train.steps`.
    #[arg(long, value_name = "FIELD", value_delimiter = ',')]
    pub show: Vec<String>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `runs show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or shows runs.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Command::List(args) => list(args, context),
        Command::Show(args) => show(args, context),
        Command::Tag(args) => tag(args, context),
        Command::Note(args) => note(args, context),
        Command::Rm(args) => remove(args, context),
        Command::Export(args) => transfer::export(args, context),
        Command::Import(args) => transfer::import(args, context),
    }
}

fn list(args: &ListArgs, context: &Context) -> Result<(), Error> {
    let states = args
        .state
        .as_deref()
        .map(states)
        .transpose()?
        .unwrap_or_default();
    let expr = args.filter.as_deref().map(filter::parse).transpose()?;
    let sort = args.sort.iter().map(|text| sort(text));
    let sort = sort.collect::<Result<Vec<_>, _>>()?;
    let columns = args.show.iter().map(|text| filter::parse_name(text));
    let columns = columns.collect::<Result<Vec<_>, _>>()?;
    let style = args.format.style(context);
    let (runs, more) = context.runtime()?.block_on(async {
        let store = match Store::open(&context.store, Access::ReadOnly).await {
            Ok(store) => store,
            // For scripts an empty list is a valid answer.
            Err(StoreError::Missing { .. }) => return Ok((Vec::new(), false)),
            Err(error) => return Err(Error::from(error)),
        };
        let limit = (args.limit > 0).then_some(args.limit);
        // One extra row tells whether there are more.
        let recipe = args.recipe.clone();
        let filter = RunFilter {
            limit: limit.map(|limit| limit.saturating_add(1)),
            skip: 0,
            states,
            recipe,
            expr,
            sort,
            columns,
        };
        detached::refresh(&store, context).await?;
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
        Style::Csv => complete_rows(&runs, &args.show).render(style),
        Style::Table { .. } | Style::Markdown => brief_rows(&runs, &args.show).render(style),
    };
    output::print(&text)?;
    if runs.is_empty() && !context.quiet {
        let which = if args.state.is_some() || args.recipe.is_some() || args.filter.is_some() {
            "such "
        } else {
            ""
        };
        output::say(&format!("no {which}runs in {}", context.store.display()));
    }
    if more && !context.quiet {
        output::say(&format!(
            "the {} {} are shown; `--limit 0` shows all",
            if args.sort.is_empty() {
                "newest"
            } else {
                "first"
            },
            args.limit
        ));
    }
    Ok(())
}

fn sort(text: &str) -> Result<Sort, Error> {
    let (name, descending) = match text.strip_prefix('-') {
        Some(name) => (name, true),
        None => (text, false),
    };
    let name = filter::parse_name(name)?;
    Ok(Sort { name, descending })
}

fn states(text: &str) -> Result<Vec<RunState>, Error> {
    let state = |name: &str| {
        RunState::ALL
            .into_iter()
            .find(|state| state.name() == name)
            .ok_or_else(|| {
                let names = RunState::ALL.map(RunState::name).join(", ");
                Error::new(Exit::Usage, format!("unknown run state `{name}`: {names}"))
            })
    };
    text.split(',').map(|name| state(name.trim())).collect()
}

fn brief_rows(runs: &[RunSummary], columns: &[String]) -> Rows {
    let own = [
        "run", "state", "recipe", "started", "took", "stages", "tags",
    ];
    rows(runs, &own, columns, |run| {
        vec![
            run.id.0.as_str().into(),
            run.state.into(),
            run.recipe.as_str().into(),
            run.started.into(),
            Cell::seconds(run.seconds),
            run.stages.in_words().into(),
            run.tags.join(" ").into(),
        ]
    })
}

/// One row per run: its cells under `heads`, then its values of `columns`.
fn rows(
    runs: &[RunSummary],
    heads: &[&str],
    columns: &[String],
    cells: impl Fn(&RunSummary) -> Vec<Cell>,
) -> Rows {
    let asked_for = columns.iter().map(String::as_str);
    let mut rows = Rows::new(&heads.iter().copied().chain(asked_for).collect::<Vec<_>>());
    for run in runs {
        rows.push(cells(run).into_iter().chain(values(run, columns)));
    }
    rows
}

fn values(run: &RunSummary, columns: &[String]) -> impl Iterator<Item = Cell> {
    columns.iter().map(|column| match &run.values[column] {
        Value::Number(number) if number.is_f64() => {
            Cell::number(number.as_f64().unwrap_or(f64::NAN))
        }
        value => Cell::json(value),
    })
}

fn complete_rows(runs: &[RunSummary], columns: &[String]) -> Rows {
    let own = [
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
        "note",
        "error",
    ];
    rows(runs, &own, columns, |run| {
        vec![
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
            run.note.as_str().into(),
            run.error.as_deref().into(),
        ]
    })
}

/// Opens an existing store for writing.
async fn open_to_change(context: &Context) -> Result<Store, Error> {
    // Open for reading first, so that a missing store is not created.
    drop(Store::open(&context.store, Access::ReadOnly).await?);
    Ok(Store::open(&context.store, Access::ReadWrite).await?)
}

fn tag(args: &TagArgs, context: &Context) -> Result<(), Error> {
    context.runtime()?.block_on(async {
        let store = open_to_change(context).await?;
        let run = store.resolve_run(&args.run).await?;
        for tag in &args.tags {
            if args.remove {
                if !store.untag_run(&run, tag).await? {
                    return Err(Error::new(
                        Exit::NothingMatches,
                        format!("run {run} has no tag `{tag}`"),
                    ));
                }
                continue;
            }
            // It could never be found, because references are tried in this order.
            if !is_tag(tag) {
                return Err(Error::new(
                    Exit::Usage,
                    format!("`{tag}` cannot be a tag: it is empty, or means something else (`latest`, a run's id)"),
                ));
            }
            store.tag_run(&run, tag).await?;
        }
        store.close().await;
        Ok(())
    })
}

fn note(args: &NoteArgs, context: &Context) -> Result<(), Error> {
    let note = context.runtime()?.block_on(async {
        let Some(text) = &args.text else {
            let store = Store::open(&context.store, Access::ReadOnly).await?;
            let run = store.resolve_run(&args.run).await?;
            return Ok::<_, Error>(Some(store.run_detail(&run).await?.summary.note));
        };
        let store = open_to_change(context).await?;
        let run = store.resolve_run(&args.run).await?;
        store.note_run(&run, text).await?;
        store.close().await;
        Ok(None)
    })?;
    match note {
        Some(note) if !note.is_empty() => Ok(output::print(&format!("{note}\n"))?),
        _ => Ok(()),
    }
}

fn remove(args: &RemoveArgs, context: &Context) -> Result<(), Error> {
    let runs = context.runtime()?.block_on(async {
        let store = open_to_change(context).await?;
        let mut runs = Vec::new();
        for reference in &args.runs {
            let run = store.resolve_run(reference).await?;
            if !runs.contains(&run) {
                runs.push(run);
            }
        }
        let dependents = store.dependents(&runs).await?;
        if !dependents.is_empty() && !args.force {
            let ids: Vec<&str> = dependents.iter().map(|run| run.0.as_str()).collect();
            return Err(Error::new(
                Exit::Usage,
                format!("stages of these runs are reused by {}", ids.join(", ")),
            )
            .hint(
                "remove those too, or use --force: they then forget where the results came from",
            ));
        }
        if !args.dry_run {
            store.remove_runs(&runs).await?;
        }
        store.close().await;
        Ok::<_, Error>(runs)
    })?;
    if !context.quiet {
        let ids: Vec<&str> = runs.iter().map(|run| run.0.as_str()).collect();
        let said = if args.dry_run {
            "would be removed"
        } else {
            "removed; `retort gc` shows files that are no longer needed"
        };
        output::say(&format!("{} {said}", ids.join(", ")));
    }
    Ok(())
}

fn show(args: &ShowArgs, context: &Context) -> Result<(), Error> {
    let (detail, metrics, jobs) = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        detached::refresh(&store, context).await?;
        let run = store.resolve_run(&args.run).await?;
        let detail = store.run_detail(&run).await?;
        let metrics = store.last_metrics(&run).await?;
        let jobs = store.jobs(&run).await?;
        store.close().await;
        Ok::<_, Error>((detail, metrics, jobs))
    })?;
    let style = args.format.style(context);
    let text = match style {
        Style::Json => format!("{:#}\n", complete(&detail, &metrics, &jobs, context)),
        Style::Csv => stage_rows(&detail).render(style),
        Style::Table { .. } | Style::Markdown => {
            let sections = sections(&detail, &metrics, &jobs, context);
            let texts = sections
                .iter()
                .filter(|rows| !rows.is_empty())
                .map(|rows| rows.render(style));
            texts.collect::<Vec<_>>().join("\n")
        }
    };
    Ok(output::print(&text)?)
}

/// Everything about a run, for programs.
fn complete(
    detail: &RunDetail,
    metrics: &[SeriesSummary],
    jobs: &[JobRow],
    context: &Context,
) -> Value {
    let mut complete = serde_json::json!(detail);
    complete["metrics"] = serde_json::json!(metrics);
    complete["jobs"] = serde_json::json!(jobs);
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

/// Everything about a run, for people: the results last, so that they are visible.
fn sections(
    detail: &RunDetail,
    series: &[SeriesSummary],
    jobs: &[JobRow],
    context: &Context,
) -> Vec<Rows> {
    let mut sections = vec![
        facts(detail),
        stage_rows(detail).titled("Stages"),
        attempt_rows(detail).titled("Attempts"),
        job_rows(jobs).titled("Jobs"),
        param_rows(detail),
    ];
    sections.push(metrics::summary_rows(series).titled("Metrics"));
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
    let mut add =
        |name: &str, value: Cell| rows.push([Cell::from(name).style(CellStyle::Dim), value]);
    add("run", run.id.0.as_str().into());
    add("state", run.state.into());
    add(
        "recipe",
        format!("{} ({})", run.recipe, run.recipe_path).into(),
    );
    let since = table::ago(run.started.seconds_to(Time::now()));
    add("started", format!("{} ({since})", run.started).into());
    add("took", Cell::seconds(run.seconds));
    add("command", run.command.join(" ").into());
    if let Some(earlier) = &run.resumed_from {
        add("resumes", earlier.0.as_str().into());
    }
    if let Some(place) = &run.sweep {
        add(
            "sweep",
            format!("{}, point {}", place.id, place.point).into(),
        );
    }
    if !run.tags.is_empty() {
        add("tags", run.tags.join(" ").into());
    }
    if !run.note.is_empty() {
        add("note", run.note.as_str().into());
    }
    if let Some(error) = &run.error {
        add("error", Cell::from(error.as_str()).style(CellStyle::Error));
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
            stage.digest.as_deref().map(Cell::hash).into(),
            output.map(|row| Cell::hash(&row.artifact.hash)).into(),
            why(stage).into(),
        ]);
    }
    rows
}

/// Attempts, if a stage needed more than one.
fn attempt_rows(detail: &RunDetail) -> Rows {
    let mut rows = Rows::new(&["stage", "attempt", "state", "started", "took", "why"]);
    let repeated = detail
        .stages
        .iter()
        .filter(|stage| stage.attempts.len() > 1);
    for (stage, attempt) in
        repeated.flat_map(|stage| stage.attempts.iter().map(move |one| (stage, one)))
    {
        let why = [attempt.reason.as_deref(), attempt.message.as_deref()];
        rows.push([
            stage.name.as_str().into(),
            u64::from(attempt.number).into(),
            attempt.state.name().into(),
            attempt.started.into(),
            attempt.seconds.map(Cell::seconds).into(),
            why.into_iter()
                .flatten()
                .collect::<Vec<_>>()
                .join(": ")
                .into(),
        ]);
    }
    rows
}

/// Jobs of a cluster.
fn job_rows(jobs: &[JobRow]) -> Rows {
    let mut rows = Rows::new(&[
        "stage",
        "cluster",
        "job",
        "elements",
        "queued",
        "running",
        "submitted",
        "over",
        "ends",
    ]);
    for job in jobs {
        let ends = job.ends.iter().map(|(reason, count)| match count {
            1 => reason.clone(),
            count => format!("{reason} ({count})"),
        });
        rows.push([
            job.stage.as_str().into(),
            Some(job.cluster.as_str())
                .filter(|name| !name.is_empty())
                .map(Cell::from)
                .into(),
            job.job.map(Cell::from).into(),
            u64::from(job.elements.max(1)).into(),
            u64::from(job.queued).into(),
            u64::from(job.running).into(),
            job.submitted.into(),
            job.over.into(),
            ends.collect::<Vec<_>>().join(", ").into(),
        ]);
    }
    rows
}

/// How a stage ended, or the origin of its result.
fn why(stage: &StageDetail) -> String {
    if let Some(source) = &stage.reused_from {
        return format!("from run {}", source.run);
    }
    let Some(attempt) = stage.attempts.last() else {
        return String::new();
    };
    if let Some(waiting) = attempt
        .waiting
        .as_deref()
        .filter(|_| stage.state == StageState::Queued)
    {
        return format!("in Slurm: {waiting}");
    }
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
            Cell::from(param.origin.as_str()).style(CellStyle::Dim),
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
        rows.push([Cell::from(name.as_str()).style(CellStyle::Dim), shown]);
    }
    rows
}
