//! `retort report`: runs as one HTML page.

use std::io::Write;
use std::path::PathBuf;

use clap::ValueHint;

use crate::artifact::Layout;
use crate::chart::{self, Chart};
use crate::cli::{Context, Error, Exit, metrics, output, show};
use crate::draft;
use crate::report::{self, Curves, Page, Picture};
use crate::store::{Access, Axis, CurveQuery, Store};

/// Charts on a page; other series are in its tables.
const MOST_CHARTS: usize = 60;
/// Runs of a page.
const MOST_RUNS: usize = 50;
/// Bytes of pictures in a page.
const MOST_BYTES: usize = 64 << 20;
/// Points of a curve.
const BUCKETS: u32 = 400;

/// Arguments of `report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The runs: ids or prefixes of them, `latest`, `latest~1`, or tags.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub runs: Vec<String>,
    /// The file to write (`-`: to stdout). Of existing files only a report is replaced.
    #[arg(short, long, value_name = "FILE", default_value = "report.html", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Title of the page.
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,
}

/// Writes the page.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    if args.runs.len() > MOST_RUNS {
        let message = format!("{} runs; a page has at most {MOST_RUNS}", args.runs.len());
        return Err(Error::new(Exit::Usage, message));
    }
    let layout = Layout::new(&context.store)?;
    let (pages, curves) = context.runtime()?.block_on(async {
        let store = Store::open(&context.store, Access::ReadOnly).await?;
        let mut pages: Vec<Page> = Vec::new();
        let mut room = MOST_BYTES;
        for reference in &args.runs {
            let run = store.resolve_run(reference).await?;
            if pages.iter().any(|page| page.detail.summary.id == run) {
                continue;
            }
            let detail = store.run_detail(&run).await?;
            let series = store.last_metrics(&run).await?;
            let pictures = pictures(&detail, &layout, &mut room);
            pages.push(Page {
                detail,
                series,
                pictures,
            });
        }
        let curves = curves(&store, &pages).await?;
        store.close().await;
        Ok::<_, Error>((pages, curves))
    })?;
    let title = args.title.clone().unwrap_or_else(|| {
        let names: Vec<&str> = pages
            .iter()
            .map(|page| page.detail.summary.recipe.as_str())
            .collect();
        let mut names = names;
        names.dedup();
        names.join(", ")
    });
    let page = report::html(&title, &pages, &curves);
    if args.output.as_os_str() == "-" {
        // A document, not terminal output: control characters in it are part of its texts.
        return Ok(output::stdout().write_all(page.as_bytes())?);
    }
    draft::write(&args.output, report::KIND, page.as_bytes())
        .map_err(|error| Error::unwritten(&args.output, &error))?;
    if !context.quiet {
        output::say(&format!("{} is written", args.output.display()));
    }
    Ok(())
}

/// The pictures of a run's artifacts, as long as there is room.
fn pictures(detail: &crate::store::RunDetail, layout: &Layout, room: &mut usize) -> Vec<Picture> {
    let with_picture = detail
        .artifacts
        .iter()
        .filter(|row| row.artifact.meta.preview.is_some());
    with_picture
        .map(|row| {
            let png = match show::read(layout, row) {
                Ok(bytes) if !bytes.starts_with(b"\x89PNG\r\n\x1a\n") => {
                    Err("This picture is no PNG file.".to_owned())
                }
                Ok(bytes) if bytes.len() > *room => {
                    Err("This picture was left out: the page would be too large.".to_owned())
                }
                Ok(bytes) => {
                    *room -= bytes.len();
                    Ok(bytes)
                }
                Err(error) => Err(error.message),
            };
            Picture {
                stage: row.stage.clone(),
                caption: row.artifact.meta.caption.clone(),
                png,
            }
        })
        .collect()
}

/// A chart for each series that has more than one point, with the curves of all runs.
async fn curves(store: &Store, pages: &[Page]) -> Result<Curves, Error> {
    let mut names: Vec<String> = Vec::new();
    for series in pages.iter().flat_map(|page| &page.series) {
        let name = format!("{}/{}", series.stage, series.series);
        if series.points > 1 && !names.contains(&name) {
            names.push(name);
        }
    }
    // The most important series come first and are not left out.
    names.sort_by_key(|name| !chart::is_wanted(name));
    let left_out = names.len().saturating_sub(MOST_CHARTS);
    names.truncate(MOST_CHARTS);
    let query = CurveQuery {
        buckets: BUCKETS,
        axis: Axis::Step,
        from: 0,
        to: u64::MAX,
    };
    let mut charts = Vec::new();
    for name in names {
        let mut curves = Vec::new();
        for page in pages {
            let run = &page.detail.summary.id;
            let known = |series: &&crate::store::SeriesSummary| {
                format!("{}/{}", series.stage, series.series) == name
            };
            if page.series.iter().find(known).is_none() {
                continue;
            }
            let buckets = store.curve(run, &name, query).await?;
            let label = match pages.len() {
                1 => name.clone(),
                _ => run.0.clone(),
            };
            curves.push(metrics::curve(label, &buckets, Axis::Step));
        }
        let chart = Chart {
            axis: "step".into(),
            log: false,
            log_x: false,
            curves,
        };
        charts.push((name, chart));
    }
    Ok(Curves { charts, left_out })
}
