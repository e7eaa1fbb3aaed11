//! A sweep: its points with their settings and results, as parallel coordinates and slices.

use maud::{Markup, PreEscaped, html};

use super::page::{self, Page, Section};
use super::reply::{HttpError, Reply};
use super::request::{PageRequest, link, segment};
use super::{ServedStore, ServerState};
use crate::account::plot;
use crate::account::results::Results;
use crate::store::{RunState, StoreError, SweepPoint};

/// The most points in the table.
const MOST: usize = 2000;

async fn find<'s>(
    site: &'s ServerState,
    reference: &str,
) -> Result<(&'s ServedStore, Results), HttpError> {
    let mut first = None;
    for served in &site.stores {
        let id = match served.store.resolve_sweep(reference).await {
            Ok(id) => id,
            Err(error @ (StoreError::NoSweep { .. } | StoreError::AmbiguousSweep { .. })) => {
                first = first.or(Some(HttpError::NotFound(error.to_string())));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let detail = served.store.sweep_detail(&id).await?;
        return Ok((served, Results::of(&served.store, detail, None).await?));
    }
    Err(first.unwrap_or_else(|| HttpError::NotFound("there is no such sweep".into())))
}

/// The picture: `/sweep/ID/plot.svg`.
pub async fn svg(site: &ServerState, reference: &str) -> Result<Reply, HttpError> {
    let (_, results) = find(site, reference).await?;
    let Some(objective) = &results.objective else {
        return Err(HttpError::NotFound("this sweep has no objective".into()));
    };
    let (axes, lines) = results.drawn();
    Ok(Reply::new(
        "image/svg+xml",
        plot::svg(&axes, &lines, objective),
    ))
}

/// Parallel coordinates and slices, in the page's colours; each point's title has its values.
fn pictures(results: &Results, id: &str) -> Markup {
    let Some(objective) = &results.objective else {
        return html! {};
    };
    let (axes, lines) = results.drawn();
    html! {
        figure.swept tabindex="0" aria-label="Parallel coordinates" { (PreEscaped(plot::parallel(&axes, &lines, objective))) }
        div.slices { @for axis in &axes { figure.swept { (PreEscaped(plot::slice(axis, &lines, objective))) } } }
        p.hint {
            "Blue is the best, orange the worst; the thick line is the best point. "
            a href=(format!("/sweep/{}/plot.svg", segment(id))) download="sweep.svg" { "SVG" }
        }
    }
}

/// A point's result so far.
fn state(point: &SweepPoint) -> Markup {
    match &point.run {
        None => page::pill("dim", "to come"),
        // The step at which successive halving stopped it.
        Some((_, RunState::Interrupted)) if !point.rungs.is_empty() => page::pill("odd", "stopped"),
        Some((_, state)) => page::run_state(*state),
    }
}

/// The page.
pub async fn answer(
    site: &ServerState,
    _: &PageRequest,
    reference: &str,
) -> Result<Reply, HttpError> {
    let (served, results) = find(site, reference).await?;
    let (detail, definition) = (&results.detail, &results.detail.plan.definition);
    let id = detail.id.0.as_str();
    let mut ranked = results.ranked();
    ranked.retain(|(_, value)| !value.is_nan());
    let best = results.best().map(|(point, _)| point.number);
    let drawn = ranked.iter().filter(|(_, value)| value.is_finite()).count();
    let runs: Vec<String> = ranked
        .iter()
        .take(8)
        .filter_map(|(point, _)| Some(point.run.as_ref()?.0.0.clone()))
        .collect();
    let kept: Vec<(&str, &str)> = runs.iter().map(|run| ("run", run.as_str())).collect();
    let condition = format!("sweep = {id}");
    let store = served.number(site).to_string();
    let body = html! {
        header.run-head #sweep-head data-live="" {
            div {
                h1 { (page::name(&detail.plan.recipe)) " " span.mono.dim { (page::name(id)) } }
                p.line {
                    span { "sweep of " (detail.points.len()) " points" } " " span { (results.succeeded()) " succeeded" } " " span { "began " (page::ago(detail.started)) }
                    @if let Some(objective) = &results.objective { " " span { "looks for the " (if objective.goal == crate::sweep::Goal::Min { "least " } else { "greatest " }) span.mono { (page::name(&objective.metric)) } } }
                }
            }
            div.actions {
                a.button href=(link("/", &[("where", &condition), ("store", &store)])) { "Its runs" }
                @if runs.len() > 1 { a.button href=(link("/compare", &kept)) { "Compare the best" } a.button href=(link("/curves", &kept)) { "Curves of the best" } }
            }
        }
        div #sweep data-live="" {
            @if let Some(why) = &results.unknown { p.hint { "The objective has no values: " (page::name(why)) } }
            @if drawn > 1 { (pictures(&results, id)) }
            div.scroll { table {
                thead { tr {
                    th.num scope="col" { "Point" } th scope="col" { "Run" } th scope="col" { "State" }
                    @for parameter in &definition.parameters { th.num scope="col" { (page::name(&parameter.path)) } }
                    @if let Some(objective) = &results.objective { th.num scope="col" { (page::name(&objective.metric)) } }
                } }
                tbody {
                    @for point in detail.points.iter().take(MOST) {
                        tr data-run=[point.run.as_ref().map(|(run, _)| &run.0)] {
                            td.num { (point.number) }
                            @match &point.run {
                                Some((run, _)) => td.id { (page::run_link(run)) },
                                None => td.dim { "–" },
                            }
                            td { (state(point)) }
                            @for setting in &point.settings { td.num { (page::name(plot::value_of(setting))) } }
                            @if results.objective.is_some() {
                                td.num.best[best == Some(point.number)] {
                                    @match results.value(point) { Some(value) => (page::number(value)), None => span.dim { "–" } }
                                    @if best == Some(point.number) { span.star title="the best" { " ★" span.visually-hidden { "best" } } }
                                }
                            }
                        }
                    }
                }
            } }
            @if detail.points.len() > MOST {
                p.hint { "The first " (MOST) " points; " code { "retort sweep show " (id) } " has all." }
            }
        }
    };
    let title = format!("sweep {id}");
    Ok(Page {
        title: &title,
        place: Section::Other,
        runs: &runs,
        pinned: false,
        live: Some(""),
        body,
    }
    .reply(site))
}
