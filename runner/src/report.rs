//! Runs as one HTML page for sharing: it needs no server, no script and no other files.
//!
//! In: runs with their series and pictures. Out: HTML. Everything from the store is text: maud escapes it, pictures are
//! `data:` URLs, and the page's content policy allows nothing else. Deliberately absent: reading the store.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use crate::chart::Chart;
use crate::draft::OutputKind;
use crate::store::{RunDetail, RunState, SeriesSummary, StageDetail};
use crate::table::{self, Cell};

/// A run's content.
#[derive(Debug)]
pub struct Page {
    /// The run.
    pub detail: RunDetail,
    /// Its series in brief.
    pub series: Vec<SeriesSummary>,
    /// Its pictures.
    pub pictures: Vec<Picture>,
}

/// A picture of a stage.
#[derive(Debug)]
pub struct Picture {
    /// The stage.
    pub stage: String,
    /// What it shows.
    pub caption: Option<String>,
    /// The PNG file, or why it is missing.
    pub png: Result<Vec<u8>, String>,
}

/// Curves of all runs.
#[derive(Debug)]
pub struct Curves {
    /// A title and a chart each.
    pub charts: Vec<(String, Chart)>,
    /// Series that have no chart, because there are too many.
    pub left_out: usize,
}

const STYLE: &str = "\
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfd; --line: #d4d4d8; --soft: #f1f1f4; --dim: #5b5b66;
  --good: #0a6b3d; --bad: #a3170f; --odd: #7a5200; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e7ec; --paper: #17171b; --line: #3a3a44; --soft: #222229;
  --dim: #a5a5b2; --good: #6fd6a1; --bad: #ff9d94; --odd: #f0c26b; }
  figure svg { filter: invert(0.9) hue-rotate(180deg); } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0; }
th, td { text-align: left; padding: 0.15rem 0.7rem 0.15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.dim { color: var(--dim); } .succeeded { color: var(--good); } .failed, .lost { color: var(--bad); }
.interrupted { color: var(--odd); }
figure { margin: 1rem 0; } figure img { max-width: 100%; image-rendering: pixelated; background: var(--soft); }
figure svg { max-width: 100%; height: auto; }
.pictures { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); gap: 0 1.5rem; }
pre { background: var(--soft); padding: 0.7rem; overflow-x: auto; }
summary { cursor: pointer; }";

/// A report as a file.
pub const KIND: OutputKind = OutputKind {
    name: "a report of retort",
    head: "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"generator\" content=\"retort\">",
};

/// The page.
pub fn html(title: &str, pages: &[Page], curves: &Curves) -> String {
    let several = pages.len() > 1;
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="generator" content="retort";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy"
                    content="default-src 'none'; img-src data:; style-src 'unsafe-inline'";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                @if several {
                    nav { ul { @for page in pages {
                        li { a href={ "#" (page.detail.summary.id) } { "run " (page.detail.summary.id) }
                            " of " (page.detail.summary.recipe) }
                    } } }
                }
                @for page in pages { (results(page)) }
                @if several { (compared(pages)) }
                @if !curves.charts.is_empty() {
                    h2 { "Curves" }
                    div.curves { @for (title, chart) in &curves.charts {
                        figure { figcaption { (title) } (PreEscaped(chart.svg())) }
                    } }
                    @if curves.left_out > 0 {
                        p.dim { (curves.left_out) " more series are in the tables only." }
                    }
                }
                @for page in pages { (more(page, several)) }
                p.dim { "Written by retort " (env!("CARGO_PKG_VERSION")) "." }
            }
        }
    }
    .into_string()
}

/// Parameters that differ between runs, and last values of all series.
fn compared(pages: &[Page]) -> Markup {
    let value = |page: &Page, path: &str| {
        let mut params = page.detail.params.iter();
        params
            .find(|param| param.path == path)
            .map(|param| param.value.clone())
    };
    let mut paths: Vec<&str> = pages
        .iter()
        .flat_map(|page| page.detail.params.iter().map(|param| param.path.as_str()))
        .collect();
    paths.sort_unstable();
    paths.dedup();
    paths.retain(|path| {
        let first = value(&pages[0], path);
        pages.iter().any(|page| value(page, path) != first)
    });
    let names = |series: &SeriesSummary| format!("{}/{}", series.stage, series.series);
    let mut metrics: Vec<String> = pages
        .iter()
        .flat_map(|page| page.series.iter().map(names))
        .collect();
    metrics.sort_unstable();
    metrics.dedup();
    let last = |page: &Page, name: &str| {
        let mut series = page.series.iter();
        series
            .find(|series| names(series) == name)
            .map(|series| series.last)
    };
    html! {
        h2 { "What differs, and results" }
        div.wide { table {
            thead { tr { th { } @for page in pages { th { (page.detail.summary.id) } } } }
            tbody {
                @for path in paths {
                    tr { td { (path) } @for page in pages {
                        td.number { @if let Some(value) = value(page, path) { (shown(&value)) } }
                    } }
                }
                @for name in &metrics {
                    tr { td { (name) } @for page in pages {
                        td.number { @if let Some(last) = last(page, name) { (table::number(last)) } }
                    } }
                }
            }
        } }
    }
}

/// A run's results, which readers want first: the run, its tables and its pictures.
fn results(page: &Page) -> Markup {
    let detail = &page.detail;
    let run = &detail.summary;
    html! {
        section {
            h2 id=(run.id) { "Run " (run.id) " of " (run.recipe) }
            table { tbody {
                tr { th { "state" } td class=(run.state.name()) { (run.state.name()) } }
                tr { th { "started" } td { (run.started) } }
                tr { th { "took" } td { (table::duration(run.seconds)) } }
                tr { th { "command" } td { code { (run.command.join(" ")) } } }
                @if let Some(place) = &run.sweep {
                    tr { th { "sweep" } td { (place.id) ", point " (place.point) } }
                }
                @if !run.tags.is_empty() { tr { th { "tags" } td { (run.tags.join(" ")) } } }
                @if !run.note.is_empty() { tr { th { "note" } td { (run.note) } } }
                @if let Some(error) = &run.error { tr { th { "error" } td class=(RunState::Failed.name()) { (error) } } }
            } }
            @for artifact in &detail.artifacts {
                @if let Some(table) = &artifact.artifact.meta.table {
                    h3 { (if table.title.is_empty() { &artifact.stage } else { &table.title }) }
                    div.wide { table {
                        thead { tr { @for column in &table.columns { th { (column) } } } }
                        tbody { @for row in &table.rows { tr { @for value in row {
                            td class=[value.is_number().then_some("number")] { (shown(value)) }
                        } } } }
                    } }
                }
            }
            div.pictures { @for picture in &page.pictures { (figure(picture)) } }
        }
    }
}

/// How a run came to that.
fn more(page: &Page, several: bool) -> Markup {
    let detail = &page.detail;
    html! {
        section {
            h2 { "Stages and metrics" @if several { " of run " (detail.summary.id) } }
            div.wide { (stages(&detail.stages)) }
            @if !page.series.is_empty() {
                h3 { "Metrics" }
                div.wide { (metrics(&page.series)) }
            }
            details {
                summary { (detail.params.len()) " parameters" }
                div.wide { table {
                    thead { tr { th { "parameter" } th { "value" } th { "from" } } }
                    tbody { @for param in &detail.params { tr {
                        td { (param.path) } td { (shown(&param.value)) } td.dim { (param.origin) }
                    } } }
                } }
            }
            details {
                summary { "Environment" }
                table { tbody { @for (name, value) in detail.environment.as_object().into_iter().flatten() {
                    tr { th { (name) } td { (shown(value)) } }
                } } }
            }
            details { summary { "Recipe" } pre { (detail.recipe_text) } }
        }
    }
}

fn figure(picture: &Picture) -> Markup {
    html! {
        figure {
            figcaption {
                (picture.stage)
                @if let Some(caption) = &picture.caption { ": " (caption) }
            }
            @match &picture.png {
                Ok(png) => img alt=(picture.caption.as_deref().unwrap_or(&picture.stage))
                    src={ "data:image/png;base64," (STANDARD.encode(png)) };,
                Err(why) => p.dim { (why) },
            }
        }
    }
}

fn stages(stages: &[StageDetail]) -> Markup {
    html! {
        table {
            thead { tr { th { "stage" } th { "kind" } th { "state" } th.number { "took" } th { "device" } th { "plugin" } th { "why" } } }
            tbody { @for stage in stages {
                @let last = stage.attempts.last();
                tr {
                    td { (stage.name) } td { (stage.kind) }
                    td class=(stage.state.name()) { (stage.state.name()) }
                    td.number { @if let Some(seconds) = last.and_then(|last| last.seconds) { (table::duration(seconds)) } }
                    td { (stage.device) " " (stage.dtype) }
                    td { (stage.plugin.name) " " (stage.plugin.version) }
                    td {
                        @if let Some(source) = &stage.reused_from { "from run " (source.run) }
                        @else if let Some(message) = last.and_then(|last| last.message.as_deref()) { (message) }
                    }
                }
            } }
        }
    }
}

fn metrics(series: &[SeriesSummary]) -> Markup {
    html! {
        table {
            thead { tr { th { "stage" } th { "series" } th.number { "points" } th.number { "last" } th.number { "least" } th.number { "greatest" } } }
            tbody { @for series in series { tr {
                td { (series.stage) } td { (series.series) } td.number { (series.points) }
                td.number { (table::number(series.last)) }
                td.number { @if let Some(min) = series.min { (table::number(min)) } }
                td.number { @if let Some(max) = series.max { (table::number(max)) } }
            } } }
        }
    }
}

/// A value as tables show it.
fn shown(value: &Value) -> String {
    Cell::json(value).text().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chart::{ColumnSummary, Curve};

    #[test]
    fn whatever_a_name_is_it_is_text() {
        let hostile = "</title><script>alert(1)</script>\"'><img src=x onerror=y>";
        let sample = |x: f64| ColumnSummary {
            x,
            min: x,
            mean: x,
            max: x,
        };
        let curves = Curves {
            charts: vec![(
                hostile.into(),
                Chart {
                    axis: hostile.into(),
                    log: false,
                    log_x: false,
                    curves: vec![Curve {
                        label: hostile.into(),
                        samples: vec![sample(1.0), sample(2.0)],
                        ..Curve::default()
                    }],
                },
            )],
            left_out: 1,
        };
        let page = html(hostile, &[], &curves);
        for tag in ["<script", "<img", "</title><script"] {
            assert!(!page.contains(tag), "{page}");
        }
        assert!(page.contains("&lt;script&gt;") && page.contains("<svg"));
        assert!(page.starts_with(KIND.head), "{page}");
    }
}
