//! Results of sweeps: tables and pictures.

use serde_json::{Value, json};

use crate::account::plot::{self, Axis, PlottedPoint};
use crate::account::results::Results;
use crate::chart::{self, Chart, ColumnSummary, Curve};
use crate::cli::sweep::{BestArgs, ListArgs, PlotArgs, ReferenceArgs, ShowArgs, objective};
use crate::cli::{Context, Error, Exit, output};
use crate::draft;
use crate::store::{Access, RunState, Store, StoreError, SweepDetail, SweepPoint};
use crate::sweep::Objective;
use crate::table::{Cell, CellStyle, Rows, Style};

/// One row per point, optionally the best first.
pub(super) fn rows(results: &Results, sort: bool) -> Rows {
    let definition = &results.detail.plan.definition;
    let names = short_names(definition.parameters.iter().map(|one| one.path.as_str()));
    let mut heads: Vec<&str> = vec!["point", "run", "state"];
    heads.extend(names.iter().map(String::as_str));
    if definition.asha.is_some() {
        heads.push("rungs");
    }
    heads.extend(
        results
            .objective
            .iter()
            .map(|objective| objective.metric.as_str()),
    );
    heads.extend(["took", "stages"]);
    let mut rows = Rows::new(&heads);
    let ranked: Vec<u32> = results
        .ranked()
        .iter()
        .map(|(point, _)| point.number)
        .collect();
    let mut points: Vec<&SweepPoint> = results.detail.points.iter().collect();
    if sort {
        let rank = |number: u32| ranked.iter().position(|&one| one == number);
        points.sort_by_cached_key(|point| rank(point.number).unwrap_or(usize::MAX));
    }
    let best = results.best().map(|(point, _)| point.number);
    for point in points {
        rows.push(row(results, point, best == Some(point.number)));
    }
    rows
}

fn row(results: &Results, point: &SweepPoint, is_best: bool) -> Vec<Cell> {
    let run = results.run(point);
    let state = match &point.run {
        None => Cell::from("to come").style(CellStyle::Dim),
        Some((_, RunState::Interrupted)) if !point.rungs.is_empty() => {
            Cell::from("stopped").style(CellStyle::Warning)
        }
        Some((_, state)) => (*state).into(),
    };
    let mut row = vec![
        Cell::from(u64::from(point.number)),
        point.run.as_ref().map(|(run, _)| run.0.as_str()).into(),
        state,
    ];
    row.extend(point.settings.iter().map(|setting| value_of(setting)));
    if results.detail.plan.definition.asha.is_some() {
        row.push((point.rungs.len() as u64).into());
    }
    if results.objective.is_some() {
        row.push(match results.value(point) {
            Some(value) if is_best => Cell::number(value).marked(" *").style(CellStyle::Ok),
            Some(value) => Cell::number(value),
            None => Cell::none(),
        });
    }
    row.push(run.map(|run| Cell::seconds(run.seconds)).into());
    row.push(run.map(|run| run.stages.in_words()).into());
    row
}

/// Notes below tables.
pub(super) fn say(results: &Results) {
    if let Some(why) = &results.unknown {
        output::say(&format!("the objective has no values: {why}"));
    }
}

/// Everything, for programs.
pub(super) fn document(results: &Results) -> Value {
    let mut document = json!(results.detail);
    let best = results.best().map(|(point, _)| point.number);
    document["best"] = json!(best);
    document["objective"] = json!(results.objective);
    for (shown, point) in document["points"]
        .as_array_mut()
        .into_iter()
        .flatten()
        .zip(&results.detail.points)
    {
        let run = point.run.as_ref();
        shown["run"] = json!(run.map(|(run, _)| run));
        shown["state"] = json!(run.map(|(_, state)| state));
        shown["objective"] = json!(results.value(point).filter(|value| value.is_finite()));
        shown["seconds"] = json!(results.run(point).map(|run| run.seconds));
        shown["stages"] = json!(results.run(point).map(|run| run.stages));
        shown["command"] = command(&results.detail, point).into();
    }
    document
}

/// The shortest endings of paths that distinguish them.
pub(super) fn short_names<'a>(paths: impl Iterator<Item = &'a str> + Clone) -> Vec<String> {
    let ending = |path: &str, steps: usize| -> String {
        let parts: Vec<&str> = path.split('.').collect();
        parts[parts.len().saturating_sub(steps)..].join(".")
    };
    let all: Vec<&str> = paths.collect();
    let short = |path: &&str| {
        let steps = path.split('.').count();
        (1..=steps)
            .map(|count| ending(path, count))
            .zip(1..)
            .find(|(short, count)| {
                let same = |other: &&&str| ending(other, *count) == *short;
                all.iter().filter(same).count() == 1
            })
            .map_or_else(|| (*path).to_owned(), |(short, _)| short)
    };
    all.iter().map(short).collect()
}

/// The value of `path=value`, as a number where it is one.
pub(super) fn value_of(setting: &str) -> Cell {
    let text = plot::value_of(setting);
    match text.parse::<i64>() {
        Ok(number) => Cell::new(text, number),
        Err(_) => match text.parse::<f64>() {
            Ok(number) if number.is_finite() => Cell::new(text, number),
            _ => Cell::from(text),
        },
    }
}

/// The command that runs a point again.
fn command(detail: &SweepDetail, point: &SweepPoint) -> String {
    let path = std::path::Path::new(&detail.plan.recipe_path);
    let here = std::env::current_dir().ok();
    let path = here
        .and_then(|here| path.strip_prefix(here).ok())
        .unwrap_or(path);
    let mut command = format!("retort run {}", quoted(&path.display().to_string()));
    for setting in detail.plan.settings.iter().chain(&point.settings) {
        command.push_str(&format!(" --set {}", quoted(setting)));
    }
    for key in ["from", "until"] {
        if let Some(stage) = detail.plan.selection[key].as_str() {
            command.push_str(&format!(" --{key} {}", quoted(stage)));
        }
    }
    command
}

/// Quotes a word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=:,+@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

async fn results(args: &ReferenceArgs, context: &Context) -> Result<Results, Error> {
    let store = Store::open(&context.store, Access::ReadOnly).await?;
    let id = store.resolve_sweep(&args.sweep).await?;
    let detail = store.sweep_detail(&id).await?;
    let other = args.objective.as_deref().map(objective);
    let is_asked = other.is_some();
    let results = Results::of(&store, detail, other).await?;
    store.close().await;
    match &results.unknown {
        Some(why) if is_asked => Err(Error::new(Exit::NothingMatches, why.clone())),
        _ => Ok(results),
    }
}

pub(super) fn list(args: &ListArgs, context: &Context) -> Result<(), Error> {
    let sweeps = context.runtime()?.block_on(async {
        let store = match Store::open(&context.store, Access::ReadOnly).await {
            Ok(store) => store,
            Err(StoreError::Missing { .. }) => return Ok(Vec::new()),
            Err(error) => return Err(Error::from(error)),
        };
        let sweeps = store.list_sweeps().await?;
        store.close().await;
        Ok(sweeps)
    })?;
    let style = args.format.style(context);
    if style == Style::Json {
        return Ok(output::print(&format!("{:#}\n", json!(sweeps)))?);
    }
    let mut rows = Rows::new(&[
        "sweep",
        "recipe",
        "started",
        "points",
        "succeeded",
        "running",
        "failed",
        "stopped",
        "objective",
    ]);
    for sweep in &sweeps {
        let metric = sweep.objective.as_ref();
        let metric = metric.and_then(|objective| objective["metric"].as_str());
        rows.push([
            Cell::from(sweep.id.0.as_str()),
            sweep.recipe.as_str().into(),
            sweep.started.into(),
            u64::from(sweep.points).into(),
            u64::from(sweep.succeeded).into(),
            u64::from(sweep.running).into(),
            u64::from(sweep.failed).into(),
            u64::from(sweep.stopped).into(),
            metric.into(),
        ]);
    }
    if !(sweeps.is_empty() && matches!(style, Style::Table { .. })) {
        output::print(&rows.render(style))?;
    }
    if sweeps.is_empty() && !context.quiet {
        output::say(&format!("no sweeps in {}", context.store.display()));
    }
    Ok(())
}

pub(super) fn show(args: &ShowArgs, context: &Context) -> Result<(), Error> {
    let results = context
        .runtime()?
        .block_on(results(&args.reference, context))?;
    let text = match args.format.style(context) {
        Style::Json => format!("{:#}\n", document(&results)),
        style => rows(&results, args.sort).render(style),
    };
    output::print(&text)?;
    if !context.quiet {
        let detail = &results.detail;
        output::say(&format!(
            "sweep {} of {}, {}: {} of {} succeeded",
            detail.id,
            detail.plan.recipe,
            detail.started,
            results.succeeded(),
            output::count(detail.points.len(), "point")
        ));
        say(&results);
    }
    Ok(())
}

pub(super) fn best(args: &BestArgs, context: &Context) -> Result<(), Error> {
    let results = context
        .runtime()?
        .block_on(results(&args.reference, context))?;
    let Some(objective) = &results.objective else {
        return Err(Error::new(
            Exit::Usage,
            format!("sweep {} has no objective", results.detail.id),
        )
        .hint("name the objective: --objective evaluation/1-step/frechet_distance"));
    };
    let ranked: Vec<(&SweepPoint, f64)> = results
        .ranked()
        .into_iter()
        .filter(|(_, value)| !value.is_nan())
        .take(args.number as usize)
        .collect();
    if ranked.is_empty() {
        let why = results
            .unknown
            .clone()
            .unwrap_or_else(|| "no point got there yet".to_owned());
        return Err(Error::new(
            Exit::NothingMatches,
            format!("no point has a value of `{}`: {why}", objective.metric),
        ));
    }
    if args.command {
        let (point, _) = ranked[0];
        return Ok(output::print(&format!(
            "{}\n",
            command(&results.detail, point)
        ))?);
    }
    let style = args.format.style(context);
    if style == Style::Json {
        let mut document = document(&results);
        let numbers: Vec<u32> = ranked.iter().map(|(point, _)| point.number).collect();
        let points = document["points"].take();
        let points = points.as_array().cloned().unwrap_or_default();
        let chosen = numbers
            .iter()
            .filter_map(|&number| points.get(number as usize - 1).cloned());
        return Ok(output::print(&format!(
            "{:#}\n",
            chosen.collect::<Value>()
        ))?);
    }
    let definition = &results.detail.plan.definition;
    let mut heads: Vec<&str> = vec!["point", "run", objective.metric.as_str()];
    heads.extend(definition.parameters.iter().map(|one| one.path.as_str()));
    let mut rows = Rows::new(&heads);
    for (point, value) in &ranked {
        let mut row = vec![
            Cell::from(u64::from(point.number)),
            point.run.as_ref().map(|(run, _)| run.0.as_str()).into(),
            Cell::number(*value),
        ];
        row.extend(point.settings.iter().map(|setting| value_of(setting)));
        rows.push(row);
    }
    output::print(&rows.render(style))?;
    if !context.quiet && matches!(style, Style::Table { .. }) {
        let (point, _) = ranked[0];
        output::say(&format!("again: {}", command(&results.detail, point)));
    }
    Ok(())
}

pub(super) fn plot(args: &PlotArgs, context: &Context) -> Result<(), Error> {
    let results = context
        .runtime()?
        .block_on(results(&args.reference, context))?;
    let nothing = || {
        Error::new(
            Exit::NothingMatches,
            "there is nothing to draw: no point has a value of the objective",
        )
        .hint("`retort sweep show` has the points; --objective names another metric")
    };
    let Some(objective) = results.objective.clone() else {
        return Err(nothing());
    };
    let (axes, lines) = results.drawn();
    if lines.is_empty() {
        return Err(nothing());
    }
    let Some(file) = &args.svg else {
        return slices(&axes, &lines, &objective, args.log, context);
    };
    let svg = plot::svg(&axes, &lines, &objective);
    if file.as_os_str() == "-" {
        return Ok(output::print(&svg)?);
    }
    draft::write(file, chart::KIND, svg.as_bytes()).map_err(|error| Error::unwritten(file, &error))
}

/// The objective over each parameter, as dots in the terminal.
fn slices(
    axes: &[Axis],
    lines: &[PlottedPoint],
    objective: &Objective,
    log: bool,
    context: &Context,
) -> Result<(), Error> {
    let size = terminal_size::terminal_size_of(std::io::stdout());
    let columns = size.map_or(100, |(width, _)| usize::from(width.0));
    for axis in axes {
        let samples = axis
            .places
            .iter()
            .zip(lines)
            .map(|(&x, line)| ColumnSummary {
                x,
                min: line.value,
                mean: line.value,
                max: line.value,
            });
        let chart = Chart {
            axis: axis.caption(),
            log,
            log_x: false,
            curves: vec![Curve {
                label: format!("{} over {}", objective.metric, axis.path),
                samples: samples.collect(),
                ..Curve::default()
            }],
        };
        let text = chart.dots(columns, 10, context.color_stdout());
        output::print(&format!("{text}\n"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_short_as_they_can_be() {
        let check = |paths: &[&str], expected: &[&str]| {
            assert_eq!(short_names(paths.iter().copied()), expected);
        };
        check(&["a.train.steps", "seed"], &["steps", "seed"]);
        check(
            &["a.train.steps", "b.train.steps", "b.x"],
            &["a.train.steps", "b.train.steps", "x"],
        );
        check(&["steps", "a.steps"], &["steps", "a.steps"]);
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("a.b=1e-3,x"), "a.b=1e-3,x");
        assert_eq!(quoted("a=[0, 6]"), "'a=[0, 6]'");
        assert_eq!(quoted("a=it's"), r"'a=it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
