//! `retort metrics`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum, ValueHint};

use crate::chart::{self, Chart, ColumnSummary, Curve};
use crate::cli::{Context, Error, Exit, Format, FormatArgs, output};
use crate::draft;
use crate::store::{Access, Axis, Bucket, CurveQuery, RunId, SeriesSummary, Store};
use crate::table::{Cell, Rows, Style};

/// Arguments of `metrics`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do; without a command, `list`, or `get` if series are named.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Which series.
    #[command(flatten)]
    pub get: GetArgs,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the series of a run with their last, least and greatest values.
    List(ListArgs),
    /// Print the points of series, or a number of buckets.
    Get(GetArgs),
    /// Draw series, in the terminal or into an SVG file.
    Plot(PlotArgs),
}

/// Arguments of `metrics list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Only series of this stage.
    #[arg(long, value_name = "STAGE")]
    pub stage: Option<String>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `metrics get`.
#[derive(Debug, clap::Args)]
pub struct GetArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Series: `loss`, `distill/loss`, or a pattern: `*loss`. Without any, the last value of each series.
    #[arg(value_name = "SERIES")]
    pub series: Vec<String>,
    /// Which part, and how finely.
    #[command(flatten)]
    pub view: ViewArgs,
    /// Summarise neighbouring points in at most N buckets with their least, greatest and mean value.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub buckets: Option<u32>,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `metrics plot`.
#[derive(Debug, clap::Args)]
pub struct PlotArgs {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN")]
    pub run: String,
    /// Series: `loss`, `distill/loss`, or a pattern: `*loss`.
    #[arg(value_name = "SERIES", required = true)]
    pub series: Vec<String>,
    /// Draw the same series of this run too (may be repeated).
    #[arg(long, value_name = "RUN")]
    pub with: Vec<String>,
    /// Which part.
    #[command(flatten)]
    pub view: ViewArgs,
    /// With a logarithmic vertical axis.
    #[arg(long)]
    pub log: bool,
    /// Write an SVG file (`-`: to stdout) instead of drawing in the terminal. Of existing files only a plot is replaced.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with_all = ["format", "json"])]
    pub svg: Option<PathBuf>,
    /// How to print; a table is a plot, the others are its numbers.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Which part of a series.
#[derive(Debug, Clone, clap::Args)]
pub struct ViewArgs {
    /// Only series of this stage.
    #[arg(long, value_name = "STAGE")]
    pub stage: Option<String>,
    /// The horizontal axis.
    #[arg(long, value_name = "AXIS", default_value = "step")]
    pub axis: AxisName,
    /// From this step on.
    #[arg(long, value_name = "STEP", default_value_t = 0)]
    pub from: u64,
    /// Up to this step.
    #[arg(long, value_name = "STEP")]
    pub to: Option<u64>,
}

/// Horizontal axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AxisName {
    /// Steps.
    Step,
    /// Time.
    Time,
}

impl ViewArgs {
    fn query(&self, buckets: u32) -> CurveQuery {
        CurveQuery {
            buckets,
            axis: match self.axis {
                AxisName::Step => Axis::Step,
                AxisName::Time => Axis::Time,
            },
            from: self.from,
            to: self.to.unwrap_or(u64::MAX),
        }
    }
}

/// Prints or draws metric series.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Some(Command::List(args)) => list(&args.run, args.stage.as_deref(), &args.format, context),
        Some(Command::Get(args)) => get(args, context),
        Some(Command::Plot(args)) => plot(args, context),
        None => get(&args.get, context),
    }
}

fn list(
    run: &str,
    stage: Option<&str>,
    format: &FormatArgs,
    context: &Context,
) -> Result<(), Error> {
    let style = format.style(context);
    let series = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(run).await?;
        let series = series_of(&store, &run, stage).await?;
        store.close().await;
        Ok::<_, Error>(series)
    })?;
    let text = match style {
        Style::Json => format!("{:#}\n", serde_json::json!(series)),
        style => summary_rows(&series).render(style),
    };
    Ok(output::print(&text)?)
}

async fn series_of(
    store: &Store,
    run: &RunId,
    stage: Option<&str>,
) -> Result<Vec<SeriesSummary>, Error> {
    let mut series = store.last_metrics(run).await?;
    series.retain(|series| stage.is_none_or(|stage| series.stage == stage));
    Ok(series)
}

/// One row of summary per series.
pub(super) fn summary_rows(series: &[SeriesSummary]) -> Rows {
    let mut rows = Rows::new(&[
        "stage",
        "series",
        "points",
        "last step",
        "last",
        "min",
        "max",
    ]);
    for series in series {
        rows.push([
            series.stage.as_str().into(),
            series.series.as_str().into(),
            series.points.into(),
            series.last_step.into(),
            Cell::number(series.last),
            series.min.map(Cell::number).into(),
            series.max.map(Cell::number).into(),
        ]);
    }
    rows
}

fn get(args: &GetArgs, context: &Context) -> Result<(), Error> {
    if args.series.is_empty() && args.buckets.is_none() {
        return list(&args.run, args.view.stage.as_deref(), &args.format, context);
    }
    let style = args.format.style(context);
    let text = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        let known = series_of(&store, &run, args.view.stage.as_deref()).await?;
        let names = chosen(&args.series, &known, &run)?;
        let text = match args.buckets {
            Some(buckets) => {
                let query = args.view.query(buckets);
                let mut buckets = Vec::new();
                for name in &names {
                    buckets.append(&mut store.curve(&run, name, query).await?);
                }
                match style {
                    Style::Json => format!("{:#}\n", serde_json::json!(buckets)),
                    style => bucket_rows(&[(String::new(), buckets)]).render(style),
                }
            }
            None => points(&store, &run, &names, &args.view, style).await?,
        };
        store.close().await;
        Ok::<_, Error>(text)
    })?;
    Ok(output::print(&text)?)
}

/// The series that match names and patterns, as `stage/series`; without any, all.
fn chosen(names: &[String], known: &[SeriesSummary], run: &RunId) -> Result<Vec<String>, Error> {
    let whole = |series: &SeriesSummary| format!("{}/{}", series.stage, series.series);
    let mut found: Vec<String> = Vec::new();
    for name in names {
        let means = |series: &&SeriesSummary| {
            matches(name, &series.series) || matches(name, &whole(series))
        };
        let before = found.len();
        for series in known.iter().filter(means).map(whole) {
            if !found.contains(&series) {
                found.push(series);
            }
        }
        if found.len() == before && !known.iter().any(|series| means(&series)) {
            return Err(unknown(name, run, known));
        }
    }
    if names.is_empty() {
        found.extend(known.iter().map(whole));
    }
    Ok(found)
}

/// Whether a name matches a pattern, in which `*` matches anything.
fn matches(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let Some(mut rest) = pieces.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut pieces: Vec<&str> = pieces.collect();
    let Some(last) = pieces.pop() else {
        return rest.is_empty();
    };
    for piece in pieces {
        match rest.find(piece) {
            Some(place) => rest = &rest[place + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

async fn points(
    store: &Store,
    run: &RunId,
    names: &[String],
    view: &ViewArgs,
    style: Style,
) -> Result<String, Error> {
    let mut points = Vec::new();
    for name in names {
        points.append(&mut store.metric_series(run, name).await?);
    }
    let range = view.from..=view.to.unwrap_or(u64::MAX);
    points.retain(|point| range.contains(&point.step));
    if style == Style::Json {
        return Ok(format!("{:#}\n", serde_json::json!(points)));
    }
    let mut rows = Rows::new(&["stage", "series", "step", "value", "at"]);
    for point in &points {
        rows.push([
            point.stage.as_str().into(),
            point.series.as_str().into(),
            point.step.into(),
            Cell::number(point.value),
            point.at.to_string().into(),
        ]);
    }
    Ok(rows.render(style))
}

/// One row per bucket, with a column for the run if runs are named.
fn bucket_rows(runs: &[(String, Vec<Bucket>)]) -> Rows {
    let own = [
        "stage",
        "series",
        "from",
        "to",
        "points",
        "min",
        "mean",
        "max",
        "nan",
        "from time",
        "to time",
    ];
    let named = runs.iter().any(|(run, _)| !run.is_empty());
    let heads: Vec<&str> = named.then_some("run").into_iter().chain(own).collect();
    let mut rows = Rows::new(&heads);
    for (run, buckets) in runs {
        for bucket in buckets {
            let own: [Cell; 11] = [
                bucket.stage.as_str().into(),
                bucket.series.as_str().into(),
                bucket.first_step.into(),
                bucket.last_step.into(),
                bucket.points.into(),
                bucket.min.map(Cell::number).into(),
                bucket.mean.map(Cell::number).into(),
                bucket.max.map(Cell::number).into(),
                bucket.nan.into(),
                bucket.first_at.to_string().into(),
                bucket.last_at.to_string().into(),
            ];
            let run = named.then(|| Cell::from(run.as_str()));
            rows.push(run.into_iter().chain(own));
        }
    }
    rows
}

fn plot(args: &PlotArgs, context: &Context) -> Result<(), Error> {
    let size = terminal_size::terminal_size_of(std::io::stdout());
    let (columns, rows) = size.map_or((100, 24), |(width, height)| {
        (usize::from(width.0), usize::from(height.0).clamp(12, 30))
    });
    let format = args.format.get();
    // Two dots per column; more would not be visible.
    let drawn = args.svg.is_none() && format == Format::Table;
    let buckets = if drawn { columns * 2 } else { 1000 };
    let query = args.view.query(buckets as u32);
    let curves = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let mut curves = Vec::new();
        for reference in std::iter::once(&args.run).chain(&args.with) {
            let run = store.resolve_run(reference).await?;
            let known = series_of(&store, &run, args.view.stage.as_deref()).await?;
            for name in chosen(&args.series, &known, &run)? {
                let buckets = store.curve(&run, &name, query).await?;
                curves.push(Plotted {
                    reference: reference.clone(),
                    run: run.clone(),
                    name,
                    buckets,
                });
            }
        }
        store.close().await;
        Ok::<_, Error>(curves)
    })?;
    if format != Format::Table {
        return Ok(output::print(&numbers(curves, args.format.style(context)))?);
    }
    let axis = match query.axis {
        Axis::Step => "step",
        Axis::Time => "seconds",
    };
    let label = |plotted: &Plotted| match args.with.is_empty() {
        true => plotted.name.clone(),
        false => format!("{} {}", plotted.reference, plotted.name),
    };
    let chart = Chart {
        axis: axis.into(),
        log: args.log,
        log_x: false,
        curves: curves
            .iter()
            .map(|plotted| curve(label(plotted), &plotted.buckets, query.axis))
            .collect(),
    };
    match &args.svg {
        None => {
            let text = chart.terminal(columns, rows.saturating_sub(6), context.color_stdout());
            if text.is_empty() {
                return Err(Error::new(
                    Exit::NothingMatches,
                    "there is nothing to draw: no value is finite",
                ));
            }
            output::print(&text)?;
        }
        Some(path) if path.as_os_str() == "-" => output::print(&chart.svg())?,
        Some(path) => draft::write(path, chart::KIND, chart.svg().as_bytes())
            .map_err(|error| Error::unwritten(path, &error))?,
    }
    Ok(())
}

/// A series of a run, to be drawn.
struct Plotted {
    /// The run, as it was named.
    reference: String,
    run: RunId,
    name: String,
    buckets: Vec<Bucket>,
}

/// The drawn data, as numbers.
fn numbers(curves: Vec<Plotted>, style: Style) -> String {
    if style == Style::Json {
        let buckets = curves.iter().flat_map(|plotted| {
            plotted.buckets.iter().map(|bucket| {
                let mut object = serde_json::json!(bucket);
                object["run"] = serde_json::json!(plotted.run);
                object
            })
        });
        return format!("{:#}\n", buckets.collect::<serde_json::Value>());
    }
    let runs: Vec<_> = curves
        .into_iter()
        .map(|plotted| (plotted.run.0, plotted.buckets))
        .collect();
    bucket_rows(&runs).render(style)
}

/// Buckets as a curve.
pub(super) fn curve(label: String, buckets: &[Bucket], axis: Axis) -> Curve {
    let began = buckets.first().map(|bucket| bucket.first_at);
    let place = |bucket: &Bucket| match axis {
        Axis::Step => (bucket.first_step as f64 + bucket.last_step as f64) / 2.0,
        Axis::Time => {
            let middle = i64::midpoint(bucket.first_at.0, bucket.last_at.0);
            (middle - began.map_or(0, |began| began.0)) as f64 / 1000.0
        }
    };
    let value = |value: Option<f64>| value.unwrap_or(f64::NAN);
    let samples = buckets.iter().map(|bucket| ColumnSummary {
        x: place(bucket),
        min: value(bucket.min),
        mean: value(bucket.mean),
        max: value(bucket.max),
    });
    Curve {
        label,
        samples: samples.collect(),
        ..Curve::default()
    }
}

fn unknown(name: &str, run: &RunId, known: &[SeriesSummary]) -> Error {
    let error = Error::new(
        Exit::NothingMatches,
        format!("run {run} has no series `{name}`"),
    );
    let near = |series: &&SeriesSummary| {
        let whole = format!("{}/{}", series.stage, series.series);
        let likeness =
            strsim::jaro_winkler(name, &series.series).max(strsim::jaro_winkler(name, &whole));
        (likeness * 1000.0) as u32
    };
    match known.iter().max_by_key(near) {
        Some(nearest) => error.hint(format!(
            "did you mean `{}/{}`? `retort metrics {run}` lists them all",
            nearest.stage, nearest.series
        )),
        None => error.hint("it has recorded no metrics"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        let check = |pattern: &str, name: &str, expected: bool| {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        };
        check("loss", "loss", true);
        check("loss", "distill/loss", false);
        check("*loss", "distill/loss", true);
        check("*/fd", "evaluate/one_step/fd", true);
        check("*/fd", "fd", false);
        check("e*s*d", "evaluate/one_step/fd", true);
        check("ab*ba", "aba", false);
        check("*", "", true);
    }
}
