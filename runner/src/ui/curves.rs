//! Curves: any series of any runs side by side. A page with a figure for each series, the numbers behind it as JSON in as many
//! buckets as it has room for, and the same as SVG and CSV.
//!
//! However many points a series has, a curve is at most [`BUCKETS`] buckets: zooming in asks for finer ones.

use maud::{Markup, html};
use serde_json::{Value, json};

use super::page::{self, Page, Section};
use super::reply::{HttpError, JSON, Reply};
use super::request::{Fields, PageRequest};
use super::{ServedStore, ServerState};
use crate::chart::{self, Chart, ColumnSummary, Curve};
use crate::store::{Axis, Bucket, CurveQuery, RunId, SeriesSummary, Time};
use crate::table::{Cell, Rows, Style};

/// The most buckets of a curve, and the default.
const BUCKETS: u32 = 4000;
const USUAL: u32 = 800;
/// The most runs on a page, figures on a page, and series to choose from.
pub const RUNS: usize = 24;
const FIGURES: usize = 24;
const OFFERED: usize = 2000;

/// A run whose curves are shown.
struct CurveRun<'s> {
    served: &'s ServedStore,
    id: RunId,
    recipe: String,
    under_way: bool,
    series: Vec<SeriesSummary>,
}

/// A curve.
struct FoundCurve<'s> {
    run: &'s CurveRun<'s>,
    stage: String,
    series: String,
    /// When its very first point was measured.
    began: Time,
    buckets: Vec<Bucket>,
}

async fn curve_runs(named: Vec<(&ServedStore, RunId)>) -> Result<Vec<CurveRun<'_>>, HttpError> {
    let mut curve_runs: Vec<CurveRun> = Vec::new();
    for (served, id) in named {
        let series = served.store.last_metrics(&id).await?;
        let by_id = crate::store::RunFilter {
            limit: Some(1),
            expr: Some(crate::filter::parse(&format!(
                "id = \"{}\"",
                id.0.replace('"', "")
            ))?),
            ..Default::default()
        };
        let summary = served.store.list_runs(&by_id).await?.pop();
        let under_way = summary.as_ref().is_some_and(|run| run.state.is_under_way());
        curve_runs.push(CurveRun {
            served,
            id,
            recipe: summary.map_or_else(String::new, |run| run.recipe),
            under_way,
            series,
        });
    }
    Ok(curve_runs)
}

/// The page.
pub async fn answer(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let named = site.named_runs(&request.query, RUNS).await?;
    if let Some(settled) = named.settled {
        return Ok(Reply::see(&settled.link("/curves")));
    }
    let curve_runs = curve_runs(named.runs).await?;
    let runs: Vec<String> = curve_runs.iter().map(|run| run.id.0.clone()).collect();
    let live = curve_runs.iter().any(|run| run.under_way);
    let body = match curve_runs.is_empty() {
        true => html! {
            section.empty {
                h1 { "Curves" }
                p { "Choose runs first: tick them in the " a href="/" { "list of runs" } " and press Curves." }
                p { a.button href="/curves?run=latest" { "Curves of the latest run" } }
            }
        },
        false => content(&curve_runs, &runs, request),
    };
    Ok(Page {
        title: "Curves",
        place: Section::Curves,
        runs: &runs,
        pinned: request.query.get("baseline").is_some(),
        live: live.then_some(""),
        body,
    }
    .reply(site))
}

fn content(curve_runs: &[CurveRun], runs: &[String], request: &PageRequest) -> Markup {
    let pinned = request.query.get("baseline").is_some();
    let offered = offered(curve_runs);
    let wished: Vec<&str> = request.query.all("series").collect();
    let chosen: Vec<&str> = match wished.is_empty() {
        false => wished.clone(),
        true => offered
            .iter()
            .filter(|one| one.curved)
            .map(|one| one.name.as_str())
            .take(6)
            .collect(),
    };
    html! {
        h1.visually-hidden { "Curves" }
        div.split {
            aside {
                form.stack #choice method="get" action="/curves" {
                    @for (name, value) in request.query.pairs().filter(|(name, _)| !matches!(*name, "series" | "run" | "baseline" | "from" | "to")) { input type="hidden" name=(name) value=(value); }
                    fieldset {
                        legend { "Runs" }
                        ul.choices { @for (number, run) in curve_runs.iter().enumerate() {
                            li { label {
                                input type="checkbox" name=(page::field(number, pinned)) value=(run.id.0) checked;
                                " " span class=(format!("swatch c{}", number % 8)) aria-hidden="true" {} " "
                                (page::name(&run.recipe)) " " a.mono href=(page::run_path(&run.id.0)) { (page::name(&run.id.0)) }
                            } }
                        } }
                    }
                    fieldset {
                        legend { "Series" }
                        p data-needs-script="" hidden { input type="search" data-searches="series-choices" aria-label="Search series" placeholder="Search" autocomplete="off"; }
                        ul.choices.tall #series-choices { @for one in &offered {
                            li { label { input type="checkbox" name="series" value=(one.name) checked[chosen.contains(&one.name.as_str())]; " " (page::name(&one.name)) @if !one.curved { span.dim { " one point" } } } }
                        } }
                    }
                    button.primary type="submit" { "Show" }
                }
            }
            div {
                div.bar.knobs #knobs hidden {
                    span.segments role="group" aria-label="Horizontal axis" {
                        button type="button" data-knob="axis" data-value="step" { "Step" }
                        button type="button" data-knob="axis" data-value="time" { "Time" }
                    }
                    label { input type="checkbox" data-knob="logy"; " log y" }
                    label { input type="checkbox" data-knob="logx"; " log x" }
                    label { input type="checkbox" data-knob="band"; " range" }
                    label { "Smoothing " input type="range" min="0" max="0.99" step="0.01" value="0" data-knob="smooth"; " " output.num { "0" } }
                    span.spacer {}
                    button type="button" data-knob="reset" hidden { "Whole range" }
                }
                @if chosen.is_empty() {
                    section.empty { h2 { "No curves" } p { "These runs have recorded no series of more than one point." } }
                }
                div.charts #charts {
                    @for name in chosen.iter().take(FIGURES) { (figure(runs, name, &request.query)) }
                }
                @if chosen.len() > FIGURES { p.dim { "The first " (FIGURES) " of " (chosen.len()) " are drawn." } }
            }
        }
    }
}

struct SeriesChoices {
    name: String,
    curved: bool,
}

/// The series of any of the runs, those with curves first.
fn offered(curve_runs: &[CurveRun]) -> Vec<SeriesChoices> {
    let mut offered: Vec<SeriesChoices> = Vec::new();
    for series in curve_runs.iter().flat_map(|run| &run.series) {
        let name = format!("{}/{}", series.stage, series.series);
        let curved = series.points > 1;
        match offered.iter().position(|known| known.name == name) {
            Some(place) => offered[place].curved |= curved,
            None if offered.len() < OFFERED => offered.push(SeriesChoices { name, curved }),
            None => {}
        }
    }
    offered.sort_by_key(|one| (!one.curved, !chart::is_wanted(&one.name)));
    offered
}

/// The placeholder of a curve, which scripts fill; without scripts it is a picture.
pub fn figure(runs: &[String], series: &str, query: &Fields) -> Markup {
    let mut fields = Fields::default();
    for run in runs {
        fields.push("run", run);
    }
    fields.push("series", series);
    for name in ["axis", "from", "to"] {
        fields.push(name, query.get(name).unwrap_or_default());
    }
    let data = fields.link("/curves/data.json");
    let svg = ["logy", "logx", "band", "smooth"]
        .into_iter()
        .fold(fields.clone(), |svg, name| {
            svg.with(name, query.get(name).unwrap_or_default())
        });
    html! {
        figure.chart data-chart=(data) data-series=(series) {
            figcaption {
                span.title { (page::name(series)) }
                span.links {
                    a data-save="svg" href=(svg.link("/curves/curves.svg")) download="curves.svg" { "SVG" } " "
                    a data-save="csv" href=(fields.link("/curves/curves.csv")) download="curves.csv" { "CSV" }
                }
            }
            div.plot { noscript { img src=(svg.link("/curves/curves.svg")) alt=(format!("Curve of {series}")); } }
        }
    }
}

fn window(query: &Fields) -> Result<CurveQuery, HttpError> {
    let axis = match query.get("axis") {
        None | Some("step") => Axis::Step,
        Some("time") => Axis::Time,
        Some(other) => {
            return Err(HttpError::BadRequest(format!(
                "the axis is step or time, and not {other}"
            )));
        }
    };
    Ok(CurveQuery {
        buckets: query.number("buckets").unwrap_or(USUAL).clamp(1, BUCKETS),
        axis,
        from: query.number("from").unwrap_or(0),
        to: query.number("to").unwrap_or(u64::MAX),
    })
}

async fn find<'s>(
    curve_runs: &'s [CurveRun<'s>],
    query: &Fields,
    window: CurveQuery,
) -> Result<Vec<FoundCurve<'s>>, HttpError> {
    let mut found: Vec<FoundCurve> = Vec::new();
    for name in query.all("series").take(FIGURES) {
        for run in curve_runs {
            // Series with the same name in several stages become separate curves.
            let stages: Vec<&SeriesSummary> = run
                .series
                .iter()
                .filter(|one| {
                    one.series == *name || format!("{}/{}", one.stage, one.series) == *name
                })
                .collect();
            for summary in stages {
                let whole = format!("{}/{}", summary.stage, summary.series);
                let buckets = run.served.store.curve(&run.id, &whole, window).await?;
                let Some(first) = buckets.first() else {
                    continue;
                };
                let began = match window.from {
                    0 => first.first_at,
                    _ => {
                        let began = run.served.store.series_began(&run.id, &whole);
                        began.await?.unwrap_or(first.first_at)
                    }
                };
                found.push(FoundCurve {
                    run,
                    stage: summary.stage.clone(),
                    series: summary.series.clone(),
                    began,
                    buckets,
                });
            }
        }
    }
    Ok(found)
}

impl FoundCurve<'_> {
    fn label(&self, alone: bool) -> String {
        let name = format!("{}/{}", self.stage, self.series);
        match alone {
            true => name,
            false => format!("{} {}", self.run.id, name),
        }
    }

    fn place(&self, bucket: &Bucket, axis: Axis) -> f64 {
        match axis {
            Axis::Step => (bucket.first_step as f64 + bucket.last_step as f64) / 2.0,
            Axis::Time => {
                let middle = i64::midpoint(bucket.first_at.0, bucket.last_at.0);
                (middle - self.began.0) as f64 / 1000.0
            }
        }
    }

    fn data(&self, axis: Axis) -> Value {
        let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
        let points = self.buckets.iter().map(|bucket| {
            json!([
                self.place(bucket, axis),
                finite(bucket.min),
                finite(bucket.mean),
                finite(bucket.max),
                bucket.first_step,
                bucket.last_step,
                bucket.points
            ])
        });
        json!({
            "run": self.run.id, "recipe": self.run.recipe, "stage": self.stage, "series": self.series,
            "points": points.collect::<Vec<_>>(),
        })
    }
}

/// The numbers behind a figure.
pub async fn data(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let window = window(&request.query)?;
    let curve_runs = curve_runs(site.named_runs(&request.query, RUNS).await?.runs).await?;
    let found = find(&curve_runs, &request.query, window).await?;
    let curves: Vec<Value> = found.iter().map(|one| one.data(window.axis)).collect();
    let columns = [
        "x",
        "min",
        "mean",
        "max",
        "first_step",
        "last_step",
        "points",
    ];
    Ok(Reply::new(
        JSON,
        json!({"columns": columns, "curves": curves}).to_string(),
    ))
}

/// The same as a picture.
pub async fn svg(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let window = window(&request.query)?;
    let curve_runs = curve_runs(site.named_runs(&request.query, RUNS).await?.runs).await?;
    let found = find(&curve_runs, &request.query, window).await?;
    let value = |value: Option<f64>| value.unwrap_or(f64::NAN);
    let band = request.query.get("band") != Some("0");
    let weight = request.query.number("smooth").unwrap_or(0.0);
    let chart = Chart {
        axis: if window.axis == Axis::Step {
            "step"
        } else {
            "seconds"
        }
        .into(),
        log: request.query.get("logy").is_some(),
        log_x: request.query.get("logx").is_some(),
        curves: found
            .iter()
            .map(|one| Curve {
                label: one.label(curve_runs.len() == 1),
                samples: one
                    .buckets
                    .iter()
                    .map(|bucket| ColumnSummary {
                        x: one.place(bucket, window.axis),
                        min: value(if band { bucket.min } else { bucket.mean }),
                        mean: value(bucket.mean),
                        max: value(if band { bucket.max } else { bucket.mean }),
                    })
                    .collect(),
                smoothing: weight,
            })
            .collect(),
    };
    Ok(Reply::new("image/svg+xml", chart.svg()))
}

/// The same as rows.
pub async fn csv(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let window = window(&request.query)?;
    let curve_runs = curve_runs(site.named_runs(&request.query, RUNS).await?.runs).await?;
    let found = find(&curve_runs, &request.query, window).await?;
    let mut rows = Rows::new(&[
        "run",
        "stage",
        "series",
        "from_step",
        "to_step",
        "from_time",
        "to_time",
        "points",
        "nan",
        "min",
        "mean",
        "max",
    ]);
    for one in &found {
        for bucket in &one.buckets {
            rows.push([
                one.run.id.0.as_str().into(),
                one.stage.as_str().into(),
                one.series.as_str().into(),
                bucket.first_step.into(),
                bucket.last_step.into(),
                bucket.first_at.to_string().into(),
                bucket.last_at.to_string().into(),
                bucket.points.into(),
                bucket.nan.into(),
                bucket.min.map(Cell::number).into(),
                bucket.mean.map(Cell::number).into(),
                bucket.max.map(Cell::number).into(),
            ]);
        }
    }
    Ok(Reply::new(
        "text/csv; charset=utf-8",
        rows.render(Style::Csv),
    ))
}
