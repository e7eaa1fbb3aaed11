//! `retort metrics`.

use crate::cli::{Context, Error, Exit, FormatArgs, talk};
use crate::store::{Access, RunId, SeriesSummary, Store};
use crate::table::{Cell, Rows, Style};

/// Arguments of `metrics`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Print every point of these series (`loss`, or `distill/loss`); without any, the last value of each series.
    #[arg(value_name = "SERIES")]
    pub series: Vec<String>,
    /// Only series of this stage.
    #[arg(long, value_name = "STAGE")]
    pub stage: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Prints metric series.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let style = args.format.style(context);
    let text = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let run = store.resolve_run(&args.run).await?;
        let mut series = store.last_metrics(&run).await?;
        if let Some(stage) = &args.stage {
            series.retain(|series| series.stage == *stage);
        }
        let text = if args.series.is_empty() {
            brief(&series, style)
        } else {
            points(&store, &run, args, &series, style).await?
        };
        store.close().await;
        Ok::<_, Error>(text)
    })?;
    Ok(talk::print(&text)?)
}

fn brief(series: &[SeriesSummary], style: Style) -> String {
    if style == Style::Json {
        return format!("{:#}\n", serde_json::json!(series));
    }
    let mut rows = Rows::new(&["stage", "series", "last step", "last", "min", "max"]);
    for series in series {
        rows.push([
            series.stage.as_str().into(),
            series.series.as_str().into(),
            series.last_step.into(),
            Cell::number(series.last),
            series.min.map(Cell::number).into(),
            series.max.map(Cell::number).into(),
        ]);
    }
    rows.render(style)
}

async fn points(
    store: &Store,
    run: &RunId,
    args: &Args,
    known: &[SeriesSummary],
    style: Style,
) -> Result<String, Error> {
    let mut points = Vec::new();
    for name in &args.series {
        let mut found = store.metric_series(run, name).await?;
        found.retain(|point| {
            args.stage
                .as_ref()
                .is_none_or(|stage| point.stage == *stage)
        });
        if found.is_empty() {
            return Err(unknown(name, run, known));
        }
        points.append(&mut found);
    }
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
