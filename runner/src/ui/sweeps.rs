//! A sweep: its points with what they change and what came of them, as parallel coordinates and slices.

use std::collections::HashMap;

use maud::html;
use serde_json::Value;

use super::page::{self, Page, Place};
use super::reply::{Problem, Reply};
use super::request::{Ask, link, segment};
use super::{Shelf, Site};
use crate::filter;
use crate::store::{RunFilter, StoreError, SweepDetail, SweepPoint};
use crate::sweep::Objective;
use crate::sweep::plot;

/// Most points that are shown.
const MOST: usize = 2000;

/// A sweep with the value of each point's run.
struct Found<'s> {
    shelf: &'s Shelf,
    detail: SweepDetail,
    values: HashMap<String, f64>,
}

async fn find<'s>(site: &'s Site, reference: &str) -> Result<Found<'s>, Problem> {
    let mut first = None;
    for shelf in &site.shelves {
        let id = match shelf.store.resolve_sweep(reference).await {
            Ok(id) => id,
            Err(error @ (StoreError::NoSweep { .. } | StoreError::AmbiguousSweep { .. })) => {
                first = first.or(Some(Problem::NotFound(error.to_string())));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let detail = shelf.store.sweep_detail(&id).await?;
        let values = match &detail.plan.definition.objective {
            Some(objective) => values(shelf, &id.0, objective).await,
            None => HashMap::new(),
        };
        return Ok(Found {
            shelf,
            detail,
            values,
        });
    }
    Err(first.unwrap_or_else(|| Problem::NotFound("there is no such sweep".into())))
}

/// The objective's value of each run; nothing while no run has it.
async fn values(shelf: &Shelf, sweep: &str, objective: &Objective) -> HashMap<String, f64> {
    let column = format!("metrics.{}", objective.metric);
    let (Ok(own), Ok(name)) = (
        filter::parse(&format!("sweep = \"{sweep}\"")),
        filter::parse_name(&column),
    ) else {
        return HashMap::new();
    };
    let filter = RunFilter {
        expr: Some(own),
        columns: vec![name],
        ..RunFilter::default()
    };
    let runs = shelf.store.list_runs(&filter).await.unwrap_or_default();
    let value = |values: &serde_json::Map<String, Value>| page::as_number(values.get(&column)?);
    runs.into_iter()
        .filter_map(|run| Some((run.id.0, value(&run.values)?)))
        .collect()
}

impl Found<'_> {
    fn value(&self, point: &SweepPoint) -> Option<f64> {
        let (run, _) = point.run.as_ref()?;
        self.values.get(&run.0).copied()
    }

    /// Points with a value, the best first.
    fn ranked(&self, objective: &Objective) -> Vec<(&SweepPoint, f64)> {
        let points = self.detail.points.iter().take(MOST);
        let mut ranked: Vec<_> = points
            .filter_map(|point| Some((point, self.value(point).filter(|value| value.is_finite())?)))
            .collect();
        ranked.sort_by(|one, other| objective.goal.order(one.1, other.1));
        ranked
    }
}

/// The picture: `/sweep/ID/plot.svg`.
pub async fn svg(site: &Site, reference: &str) -> Result<Reply, Problem> {
    let found = find(site, reference).await?;
    let Some(objective) = &found.detail.plan.definition.objective else {
        return Err(Problem::NotFound("this sweep has no objective".into()));
    };
    let ranked = found.ranked(objective);
    let drawn = ranked
        .iter()
        .map(|(point, value)| (point.number, point.settings.as_slice(), *value));
    let (axes, lines) = plot::of_points(&found.detail.plan.definition.parameters, drawn);
    Ok(Reply::new(
        "image/svg+xml",
        plot::svg(&axes, &lines, objective),
    ))
}

/// The page.
pub async fn answer(site: &Site, _: &Ask, reference: &str) -> Result<Reply, Problem> {
    let found = find(site, reference).await?;
    let (detail, definition) = (&found.detail, &found.detail.plan.definition);
    let id = detail.id.0.as_str();
    let ranked = definition
        .objective
        .as_ref()
        .map(|objective| found.ranked(objective))
        .unwrap_or_default();
    let best = ranked.first().map(|(point, _)| point.number);
    let runs: Vec<String> = ranked
        .iter()
        .take(8)
        .filter_map(|(point, _)| Some(point.run.as_ref()?.0.0.clone()))
        .collect();
    let kept: Vec<(&str, &str)> = runs.iter().map(|run| ("run", run.as_str())).collect();
    let condition = format!("sweep = {id}");
    let store = found.shelf.number(site).to_string();
    let done = detail.points.iter().filter(|point| point.is_done()).count();
    let body = html! {
        header.run-head #sweep-head data-live="" {
            div {
                h1 { (page::name(&detail.plan.recipe)) " " span.mono.dim { (page::name(id)) } }
                p.line {
                    span { "sweep of " (detail.points.len()) " points" } " " span { (done) " succeeded" } " " span { "began " (page::ago(detail.started)) }
                    @if let Some(objective) = &definition.objective { " " span { "looks for the " (if objective.goal == crate::sweep::Goal::Min { "least " } else { "greatest " }) span.mono { (page::name(&objective.metric)) } } }
                }
            }
            div.actions {
                a.button href=(link("/", &[("where", &condition), ("store", &store)])) { "Its runs" }
                @if runs.len() > 1 { a.button href=(link("/compare", &kept)) { "Compare the best" } a.button href=(link("/curves", &kept)) { "Curves of the best" } }
            }
        }
        div #sweep data-live="" {
            @if ranked.len() > 1 {
                figure.grid { img.plain src=(format!("/sweep/{}/plot.svg?{}", segment(id), ranked.len())) alt="Parallel coordinates of the parameters and the objective, and the objective over each parameter; the table has the same numbers"; }
            }
            div.scroll { table {
                thead { tr {
                    th.num scope="col" { "Point" } th scope="col" { "Run" } th scope="col" { "State" }
                    @for parameter in &definition.parameters { th.num scope="col" { (page::name(&parameter.path)) } }
                    @if let Some(objective) = &definition.objective { th.num scope="col" { (page::name(&objective.metric)) } }
                } }
                tbody {
                    @for point in detail.points.iter().take(MOST) {
                        tr data-run=[point.run.as_ref().map(|(run, _)| &run.0)] {
                            td.num { (point.number) }
                            @match &point.run {
                                Some((run, state)) => { td.id { (page::run_link(run)) } td { (page::run_state(*state)) } }
                                None => { td.dim { "–" } td { (page::pill("dim", "not begun")) } }
                            }
                            @for setting in &point.settings { td.num { (page::name(plot::value_of(setting))) } }
                            @if definition.objective.is_some() {
                                td.num.best[best == Some(point.number)] {
                                    @match found.value(point) { Some(value) => (page::number(value)), None => span.dim { "–" } }
                                    @if best == Some(point.number) { span.star title="the best" { " ★" span.visually-hidden { "best" } } }
                                }
                            }
                        }
                    }
                }
            } }
        }
    };
    let title = format!("sweep {id}");
    Ok(Page {
        title: &title,
        place: Place::Other,
        runs: &runs,
        live: Some(""),
        body,
    }
    .reply(site))
}
