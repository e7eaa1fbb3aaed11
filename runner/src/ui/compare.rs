//! Comparison of runs: differences, the best value of each metric, curves and pictures.

use std::collections::BTreeSet;

use maud::{Markup, html};
use serde_json::Value;

use super::curves;
use super::page::{self, Page, Section};
use super::pictures::{self, Preview};
use super::reply::{HttpError, Reply};
use super::request::{PageRequest, link};
use super::{ServedStore, ServerState};
use crate::account::comparison::{ComparedValue, best, facts, side_by_side};
use crate::store::{RunDetail, RunId, SeriesSummary};
use crate::table;

/// The most runs in a comparison, and the most curves of shared series.
const RUNS: usize = 12;
const CURVES: usize = 8;
/// The most rows of one kind.
const ROWS: usize = 1000;

struct Column<'s> {
    served: &'s ServedStore,
    detail: RunDetail,
    series: Vec<SeriesSummary>,
}

/// The page.
pub async fn answer(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let named = site.named_runs(&request.query, RUNS).await?;
    if let Some(settled) = named.settled {
        return Ok(Reply::see(&settled.link("/compare")));
    }
    let mut columns: Vec<Column> = Vec::new();
    for (served, id) in named.runs {
        let detail = served.store.run_detail(&id).await?;
        let series = served.store.last_metrics(&id).await?;
        columns.push(Column {
            served,
            detail,
            series,
        });
    }
    let runs: Vec<String> = columns
        .iter()
        .map(|column| column.detail.summary.id.0.clone())
        .collect();
    let pinned = request.query.get("baseline").is_some();
    let body = match columns.len() {
        0 | 1 => html! {
            section.empty {
                h1 { "Compare" }
                p { @if columns.is_empty() { "Tick two or more runs in the " } @else { "One run is chosen. Tick more in the " } a href="/" { "list of runs" } " and press Compare." }
                form.inline method="get" action="/compare" {
                    @for (place, run) in runs.iter().enumerate() { input type="hidden" name=(page::field(place, pinned)) value=(run); }
                    @if columns.is_empty() { label { "Run " input type="text" name="run" value="latest" required autocomplete="off"; } }
                    label { "with " input type="text" name="run" value="latest~1" required autocomplete="off"; }
                    button.primary type="submit" { "Compare" }
                }
            }
        },
        _ => content(request, &columns, &runs),
    };
    Ok(Page {
        title: "Compare",
        place: Section::Compare,
        runs: &runs,
        pinned,
        live: None,
        body,
    }
    .reply(site))
}

fn content(request: &PageRequest, columns: &[Column], runs: &[String]) -> Markup {
    let all = request.query.get("all").is_some();
    let told: Vec<(RunId, Vec<(ComparedValue, Value)>)> = columns
        .iter()
        .map(|column| {
            (
                column.detail.summary.id.clone(),
                facts(&column.detail, &column.series, column.served.dir()),
            )
        })
        .collect();
    let rows = side_by_side(&told, all);
    let of = |about: &str| -> Vec<&(&ComparedValue, Vec<Option<&Value>>)> {
        rows.iter()
            .filter(|(fact, _)| fact.about == about)
            .take(ROWS)
            .collect()
    };
    let pinned = request.query.get("baseline").is_some();
    let sections = [
        (
            "metric",
            "Metrics",
            "The best of a row is marked where it is known which is better.",
        ),
        ("parameter", "Parameters", ""),
        ("run", "Runs", ""),
        ("environment", "Environment", ""),
    ];
    html! {
        h1.visually-hidden { "Compare" }
        div.bar {
            span.dim { (columns.len()) " runs" }
            span.spacer {}
            span.segments role="group" aria-label="Rows" {
                a href=(request.query.without("all").link("/compare")) aria-current=[(!all).then_some("true")] { "What differs" }
                a href=(request.query.with("all", "1").link("/compare")) aria-current=[all.then_some("true")] { "Everything" }
            }
        }
        div.scroll { table.compare {
            thead { tr {
                th scope="col" { span.visually-hidden { "What" } }
                @for (place, column) in columns.iter().enumerate() { (head(request, column, place, pinned)) }
            } }
            @for (about, title, hint) in sections {
                @let some = of(about);
                tbody {
                    tr.section { th scope="rowgroup" colspan=(columns.len() + 1) { (title) @if some.is_empty() { span.dim { ": no difference" } } @else if !hint.is_empty() { span.hint { " " (hint) } } } }
                    @for (fact, values) in some {
                        (row(fact, values, pinned))
                    }
                }
            }
        } }
        (overlaid(columns, runs))
        (aligned(columns, runs))
    }
}

fn head(request: &PageRequest, column: &Column, place: usize, pinned: bool) -> Markup {
    let run = &column.detail.summary;
    let others = request
        .query
        .pairs()
        .filter(|(name, value)| !(matches!(*name, "run" | "baseline") && *value == run.id.0));
    let mut left = super::request::Fields::default();
    others.for_each(|(name, value)| left.push(name, value));
    html! {
        th scope="col" {
            span class=(format!("swatch c{}", place % 8)) aria-hidden="true" {} " "
            (page::run_link(&run.id)) " "
            a.quiet href=(left.link("/compare")) aria-label=(format!("Leave run {} out", run.id)) title="Leave it out" { "×" }
            @if place == 0 && pinned { " " span.badge { "baseline" } }
            br; (page::name(&run.recipe)) br; (page::run_state(run.state)) " " span.dim.num { (table::duration(run.seconds)) }
            @if !run.tags.is_empty() { br; (page::tags(run)) }
        }
    }
}

fn row(fact: &ComparedValue, values: &[Option<&Value>], pinned: bool) -> Markup {
    let best = best(fact, values);
    let base = values
        .first()
        .copied()
        .flatten()
        .and_then(page::as_number)
        .filter(|_| pinned);
    let numeric = values
        .iter()
        .copied()
        .flatten()
        .any(|value| page::as_number(value).is_some());
    html! {
        tr {
            th scope="row" { (page::fact(fact)) }
            @for (place, shown) in values.iter().enumerate() {
                @let number = shown.and_then(page::as_number);
                td.num[numeric].best[best.contains(&place)] {
                    @match shown {
                        None => span.dim { "–" },
                        Some(value) => { @match number { Some(number) => (page::number(number)), None => span.wrap { (page::value(value)) } } }
                    }
                    @if best.contains(&place) { span.star title="best of the row" { " ★" span.visually-hidden { "best" } } }
                    @if let (Some(number), Some(base), true) = (number, base, place > 0) { (page::delta(number, base)) }
                }
            }
        }
    }
}

/// Curves of series that several runs share.
fn overlaid(columns: &[Column], runs: &[String]) -> Markup {
    let names = |column: &Column| -> Vec<String> {
        let curved = column.series.iter().filter(|one| one.points > 1);
        curved
            .map(|one| format!("{}/{}", one.stage, one.series))
            .collect()
    };
    let mut seen = BTreeSet::new();
    let mut shared: Vec<String> = Vec::new();
    for name in columns.iter().flat_map(names) {
        if !seen.insert(name.clone()) && !shared.contains(&name) {
            shared.push(name);
        }
    }
    let mut fields = super::request::Fields::default();
    runs.iter().for_each(|run| fields.push("run", run));
    html! {
        @if !shared.is_empty() {
            section {
                h2 { "Curves" }
                div.charts { @for name in shared.iter().take(CURVES) { (curves::figure(runs, name, &Default::default())) } }
                p { a href=(fields.link("/curves")) { "All curves of these runs" } }
            }
        }
    }
}

/// The pictures of stages with the same name, side by side.
fn aligned(columns: &[Column], runs: &[String]) -> Markup {
    let of: Vec<Vec<Preview>> = columns
        .iter()
        .map(|column| pictures::previews(&column.detail))
        .collect();
    let mut stages: Vec<&str> = Vec::new();
    for preview in of.iter().flatten() {
        if !stages.contains(&preview.stage()) {
            stages.push(preview.stage());
        }
    }
    let several: Vec<(&str, &str)> = runs.iter().map(|run| ("run", run.as_str())).collect();
    html! {
        @if !stages.is_empty() {
            section {
                h2 { "Pictures" }
                div.scroll { table.aligned {
                    thead { tr { th scope="col" { "Stage" } @for column in columns { th scope="col" { (page::run_link(&column.detail.summary.id)) } } } }
                    tbody { @for stage in &stages {
                        tr {
                            @let pairs = of.iter().flatten().any(|preview| preview.stage() == *stage && preview.is_of_pairs());
                            th scope="row" { (page::jointed(stage)) @if pairs { br; span.dim { (pictures::ROWS_OF_PAIRS) } } }
                            @for previews in &of {
                                td { @match previews.iter().find(|preview| preview.stage() == *stage) {
                                    Some(preview) => a.zoom href=(preview.address()) { img.pixels src=(preview.address()) loading="lazy" alt=(preview.said()); },
                                    None => span.dim { "–" },
                                } }
                            }
                        }
                    } }
                } }
                p { a href=(link("/pictures", &several)) { "Single samples of the same noise, side by side" } }
            }
        }
    }
}
