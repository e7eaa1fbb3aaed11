//! One run: its stages, metrics, parameters, reasons, log, artifacts and environment, each under a separate address.

use maud::{Markup, html};

use super::graph::{self, Node};
use super::page::{self, Page, Section};
use super::reply::{HttpError, Reply};
use super::request::{PageRequest, link, segment};
use super::{ServedStore, ServerState, curves, gantt, lineage, live, pictures, run_log};
use crate::account::reasons;
use crate::chart;
use crate::store::{AttemptDetail, RunDetail, SeriesSummary, StageDetail};
use crate::table;

/// The most rows and columns of a plugin's table.
const ROWS: usize = 200;
const COLUMNS: usize = 40;
/// The most curves beside the list of series.
const CURVES: usize = 6;

const TABS: [(&str, &str); 7] = [
    ("", "Overview"),
    ("metrics", "Metrics"),
    ("params", "Parameters"),
    ("why", "Why"),
    ("log", "Log"),
    ("artifacts", "Artifacts"),
    ("environment", "Environment"),
];

/// The first page of a run.
pub async fn overview(
    site: &ServerState,
    request: &PageRequest,
    reference: &str,
) -> Result<Reply, HttpError> {
    tab(site, request, reference, "").await
}

/// A page of a run.
pub async fn tab(
    site: &ServerState,
    request: &PageRequest,
    reference: &str,
    tab: &str,
) -> Result<Reply, HttpError> {
    let (served, run) = site.find_run(reference).await?;
    let base = page::run_path(&run.0);
    if run.0 != reference {
        // A name like `latest` changes its meaning; a saved link keeps showing the same run.
        let path = match tab {
            "" => base,
            tab => format!("{base}/{}", segment(tab)),
        };
        return Ok(Reply::see(&request.query.link(&path)));
    }
    let detail = served.store.run_detail(&run).await?;
    let content = match tab {
        "" => stages(served, &detail),
        "metrics" => metrics(&detail, &served.store.last_metrics(&run).await?),
        "params" => params(&detail),
        "why" => why(served, &detail).await?,
        "log" => run_log::content(served, &detail, request).await?,
        "artifacts" => artifacts(&detail),
        "environment" => environment(&detail),
        _ => return Err(HttpError::NotFound("a run has no such page".into())),
    };
    let summary = &detail.summary;
    let under_way = summary.state.is_under_way();
    let body = html! {
        (head(site, served, &detail))
        nav.tabs aria-label="Of this run" {
            @for (path, name) in TABS {
                @let href = if path.is_empty() { base.clone() } else { format!("{base}/{path}") };
                a href=(href) aria-current=[(path == tab).then_some("page")] { (name) }
            }
        }
        div #tab data-live="" { (content) }
    };
    let title = format!("{} {} {}", summary.recipe, run, summary.state);
    let runs = [run.0.clone()];
    let page = Page {
        title: &title,
        place: Section::Run,
        runs: &runs,
        pinned: false,
        live: under_way.then_some(run.0.as_str()),
        body,
    };
    Ok(page.reply(site))
}

fn head(site: &ServerState, served: &ServedStore, detail: &RunDetail) -> Markup {
    let run = &detail.summary;
    let id = run.id.0.as_str();
    html! {
        header.run-head #run-head data-live="" data-run=(id) {
            div {
                h1 { (page::name(&run.recipe)) " " span.mono.dim { (page::name(id)) } }
                p.line {
                    (page::run_state(run.state)) " "
                    span { "began " (page::ago(run.started)) } " "
                    span.num { (table::duration(run.seconds)) } " "
                    span { (run.stages.in_words()) } " "
                    (page::tags(run))
                }
                @if let Some(error) = &run.error { p.alert { (page::name(error)) } }
                @if !run.note.is_empty() { p.note { (page::name(&run.note)) } }
                @if let Some(place) = &run.sweep {
                    p.dim { "point " (place.point) " of sweep " a.mono href=(format!("/sweep/{}", segment(&place.id.0))) { (page::name(&place.id.0)) } }
                }
                @if let Some(earlier) = &run.resumed_from { p.dim { "takes up " (page::run_link(earlier)) } }
            }
            div.actions {
                a.button href=(link("/curves", &[("run", id)])) { "Curves" }
                a.button href=(link("/pictures", &[("run", id)])) { "Pictures" }
                a.button href=(link("/compare", &[("run", id)])) { "Compare" }
                button #pin type="button" data-pin=(id) hidden aria-pressed="false" { "Pin as baseline" }
            }
        }
        @if site.write { (forms(site, served, detail)) }
    }
}

fn forms(site: &ServerState, _: &ServedStore, detail: &RunDetail) -> Markup {
    let run = &detail.summary;
    let hidden = html! {
        input type="hidden" name="seal" value=(site.guard.seal());
        input type="hidden" name="run" value=(run.id.0);
    };
    html! {
        details.change {
            summary { "Change" }
            div.forms {
                form.inline method="post" action="/change/tag" {
                    (hidden)
                    label for="tag" { "Tag" }
                    input #tag type="text" name="tag" required maxlength="200" autocomplete="off";
                    button type="submit" { "Add" }
                }
                @for tag in &run.tags {
                    form.inline method="post" action="/change/untag" {
                        (hidden)
                        input type="hidden" name="tag" value=(tag);
                        button.chip type="submit" title="Remove this tag" { (page::name(tag)) " ×" }
                    }
                }
                form.inline method="post" action="/change/note" {
                    (hidden)
                    label for="note" { "Note" }
                    input #note.wide type="text" name="note" value=(run.note) maxlength="20000" autocomplete="off";
                    button type="submit" { "Save" }
                }
                a.button.danger href=(link("/change/remove", &[("run", &run.id.0)])) { "Remove…" }
            }
        }
    }
}

fn stages(served: &ServedStore, detail: &RunDetail) -> Markup {
    let previews = pictures::previews(detail);
    html! {
        (live::progress(served, detail))
        section {
            h2 { "Stages" }
            (drawing(detail))
            (gantt::chart(detail))
            (table_of_stages(detail))
        }
        @for artifact in &detail.artifacts {
            @if let Some(table) = &artifact.artifact.meta.table {
                section { h2 { (page::name(if table.title.is_empty() { &artifact.stage } else { &table.title })) } (given_table(table)) }
            }
        }
        @if !previews.is_empty() {
            (pictures::grids(&previews)) p { a href=(link("/pictures", &[("run", &detail.summary.id.0)])) { "Single samples, side by side" } }
        }
    }
}

/// The graph of the stages, and of the given artifacts.
fn drawing(detail: &RunDetail) -> Markup {
    let given = detail.resolved["given"].as_array();
    let given = given.into_iter().flatten().filter_map(|given| {
        let text = |key: &str| given[key].as_str();
        let (hash, kind) = (text("hash")?, text("kind")?);
        let node = Node {
            title: text("name")?.to_owned(),
            text: format!("{kind} in the store"),
            style: "old",
            link: Some(format!("/artifact/{}", segment(hash))),
        };
        Some(node)
    });
    let stages = detail.stages.iter().map(|stage| Node {
        title: stage.name.clone(),
        text: match stage.attempts.last().and_then(|attempt| attempt.seconds) {
            Some(seconds) => format!("{} {}", stage.state, table::duration(seconds)),
            None => stage.state.to_string(),
        },
        style: page::stage_style(stage.state),
        link: Some(link(
            &format!("{}/log", page::run_path(&detail.summary.id.0)),
            &[("stage", &stage.name)],
        )),
    });
    let nodes: Vec<Node> = given.chain(stages).collect();
    let place = |name: &str| nodes.iter().position(|node| node.title == name);
    let edges = detail.stages.iter().flat_map(|stage| {
        let to = place(&stage.name);
        let edge = move |(_, from): &(String, String)| Some((place(from)?, to?));
        stage.inputs.iter().filter_map(edge)
    });
    graph::svg(
        "The stages and what each takes from which",
        &nodes,
        &edges.collect::<Vec<_>>(),
    )
}

fn table_of_stages(detail: &RunDetail) -> Markup {
    let missing = || html! { span.dim { "–" } };
    html! {
        div.scroll { table {
            thead { tr {
                th scope="col" { "Stage" } th scope="col" { "Kind" } th scope="col" { "State" } th.num scope="col" { "Took" } th.num scope="col" { "CPU" }
                th.num scope="col" { "Memory" } th scope="col" { "Device" } th scope="col" { "How it ended" }
            } }
            tbody {
                @for stage in &detail.stages {
                    @let last = stage.attempts.last();
                    tr {
                        th scope="row" { (page::name(&stage.name)) }
                        td { (page::name(&stage.kind)) }
                        td { (page::stage_state(stage.state)) }
                        td.num { @match last.and_then(|attempt| attempt.seconds) { Some(seconds) => (table::duration(seconds)), None => (missing()) } }
                        td.num { @match last.and_then(|attempt| attempt.usage.cpu_seconds) { Some(seconds) => (table::duration(seconds)), None => (missing()) } }
                        td.num { @match last.and_then(|attempt| attempt.usage.max_rss) { Some(bytes) => (table::bytes(bytes)), None => (missing()) } }
                        td { (page::name(&stage.device)) " " span.dim { (page::name(&stage.dtype)) } }
                        td { (ending(stage, last)) }
                    }
                }
            }
        } }
    }
}

fn ending(stage: &StageDetail, last: Option<&AttemptDetail>) -> Markup {
    if let Some(source) = &stage.reused_from {
        return html! { "from " (page::run_link(&source.run)) };
    }
    let Some(attempt) = last else { return html! {} };
    let reason = attempt
        .reason
        .as_deref()
        .filter(|reason| *reason != stage.state.name());
    html! {
        @if let Some(reason) = reason { (page::name(reason)) }
        @if let Some(message) = &attempt.message { @if reason.is_some() { ": " } span.bad { (page::name(message)) } }
        @if attempt.number > 1 { span.dim { " attempt " (attempt.number) } }
    }
}

/// A table from a plugin.
pub fn given_table(given: &retort_abi::Table) -> Markup {
    let numeric = |place: usize| {
        given
            .rows
            .iter()
            .filter_map(|row| row.get(place))
            .any(serde_json::Value::is_number)
    };
    let heads: Vec<(usize, &String)> = given.columns.iter().take(COLUMNS).enumerate().collect();
    html! {
        div.scroll { table.given {
            thead { tr { @for (place, head) in &heads { th.num[numeric(*place)] scope="col" { (page::name(head)) } } } }
            tbody {
                @for row in given.rows.iter().take(ROWS) {
                    tr { @for (place, _) in &heads { td.num[numeric(*place)] { (page::value(row.get(*place).unwrap_or(&serde_json::Value::Null))) } } }
                }
            }
        } }
    }
}

fn metrics(detail: &RunDetail, series: &[SeriesSummary]) -> Markup {
    let id = detail.summary.id.0.as_str();
    let mut curved: Vec<&SeriesSummary> = series.iter().filter(|one| one.points > 1).collect();
    curved.sort_by_key(|one| !chart::is_wanted(&one.series));
    let number = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), page::number);
    html! {
        @if series.is_empty() {
            section.empty { h2 { "No metrics" } p { "Stages report them while they run." } }
        } @else {
            @if !curved.is_empty() {
                div.charts {
                    @for one in curved.iter().take(CURVES) {
                        (curves::figure(&[id.to_owned()], &format!("{}/{}", one.stage, one.series), &Default::default()))
                    }
                }
                @if curved.len() > CURVES { p { a href=(link("/curves", &[("run", id)])) { "All " (curved.len()) " curves" } } }
            }
            form method="get" action="/curves" {
                input type="hidden" name="run" value=(id);
                div.scroll { table {
                    thead { tr {
                        th scope="col" { span.visually-hidden { "Selected" } } th scope="col" { "Stage" } th scope="col" { "Series" } th.num scope="col" { "Points" }
                        th.num scope="col" { "Last step" } th.num scope="col" { "Last" } th.num scope="col" { "Least" } th.num scope="col" { "Greatest" }
                    } }
                    tbody {
                        @for one in series {
                            @let whole = format!("{}/{}", one.stage, one.series);
                            tr {
                                td.pick { input type="checkbox" name="series" value=(whole) aria-label=(format!("Select {whole}")); }
                                td { (page::name(&one.stage)) @if one.reused { span.dim { " reused" } } }
                                th scope="row" { a href=(link("/curves", &[("run", id), ("series", &whole)])) { (page::name(&one.series)) } }
                                td.num { (one.points) } td.num { (one.last_step) }
                                td.num { (page::number(one.last)) } td.num { (number(one.min)) } td.num { (number(one.max)) }
                            }
                        }
                    }
                } }
                p { button type="submit" { "Curves of the selected series" } }
            }
        }
    }
}

fn params(detail: &RunDetail) -> Markup {
    html! {
        (search("params-search", "Search parameters", "params-table"))
        div.scroll { table #params-table {
            thead { tr { th scope="col" { "Parameter" } th scope="col" { "Value" } th scope="col" { "Origin" } } }
            tbody {
                @for param in &detail.params {
                    tr { th.mono scope="row" { (page::jointed(&param.path)) } td.mono.wrap { (page::value(&param.value)) } td.dim { (page::name(&param.origin)) } }
                }
            }
        } }
    }
}

/// A search field for a table's rows, which needs scripts.
fn search(id: &str, label: &str, table: &str) -> Markup {
    html! {
        p.filter data-needs-script="" hidden {
            label for=(id) { (label) }
            input id=(id) type="search" data-searches=(table) autocomplete="off" spellcheck="false";
        }
    }
}

async fn why(served: &ServedStore, detail: &RunDetail) -> Result<Markup, HttpError> {
    let mut answers = Vec::new();
    for stage in &detail.stages {
        if let Some((answer, _)) =
            reasons::of_turn(&served.store, &detail.summary.id, &stage.name).await?
        {
            answers.push(answer);
        }
    }
    Ok(html! {
        p.hint { "Why each stage ran or was reused: the inputs and options that decide its result, compared with its last turn in an earlier run of this recipe." }
        div.scroll { table.reasons {
            thead { tr { th scope="col" { "Stage" } th scope="col" { "State" } th scope="col" { "Why" } th scope="col" { "Compared with" } } }
            tbody {
                @for answer in &answers {
                    tr {
                        th scope="row" { (page::name(&answer.stage)) }
                        td { (page::stage_state(answer.state)) }
                        td.why { @for line in &answer.why { p.wrap { (page::name(line)) } } }
                        td { @if let Some(run) = &answer.compared_with { (page::run_link(run)) } }
                    }
                }
            }
        } }
    })
}

fn artifacts(detail: &RunDetail) -> Markup {
    html! {
        @if detail.artifacts.is_empty() {
            section.empty { h2 { "No artifacts" } p { "They appear as stages end." } }
        } @else {
            section { h2 { "Lineage" } (lineage::of_run(&detail.artifacts)) }
            section {
                h2 { "Artifacts" }
                div.scroll { table {
                    thead { tr { th scope="col" { "Stage" } th scope="col" { "Kind" } th scope="col" { "Hash" } th.num scope="col" { "Size" } th.num scope="col" { "Files" } th scope="col" { "Made" } } }
                    tbody {
                        @for row in &detail.artifacts {
                            tr {
                                th scope="row" { (page::name(&row.stage)) @if !row.is_output { "/" (page::name(&row.artifact.name)) } @if row.reused { span.dim { " reused" } } }
                                td { (page::name(&row.artifact.kind)) }
                                td { a href=(format!("/artifact/{}", segment(&row.artifact.hash))) { (page::hash(&row.artifact.hash)) } }
                                td.num { (table::bytes(row.artifact.size)) }
                                td.num { (row.artifact.files.len()) }
                                td.dim { (page::ago(row.created)) }
                            }
                        }
                    }
                } }
            }
        }
    }
}

fn environment(detail: &RunDetail) -> Markup {
    let run = &detail.summary;
    html! {
        section {
            h2 { "Command" }
            pre.wrap { (crate::terminal::clean(&run.command.join(" "))) }
            dl.facts {
                dt { "recipe" } dd.mono.wrap { (page::name(&run.recipe_path)) }
                dt { "seed" } dd.num { (run.seed) }
            }
        }
        section {
            h2 { "Where it ran" }
            dl.facts {
                @for (key, value) in detail.environment.as_object().into_iter().flatten() {
                    dt { (page::name(key)) }
                    dd.wrap { @match (key.as_str(), value.as_u64()) { ("memory", Some(size)) => (table::bytes(size)), _ => (page::value(value)) } }
                }
            }
            div.scroll { table {
                thead { tr { th scope="col" { "Stage" } th scope="col" { "Plugin" } th scope="col" { "Version" } th scope="col" { "Hash" } th scope="col" { "Device" } th.num scope="col" { "Seed" } th scope="col" { "Digest" } } }
                tbody {
                    @for stage in &detail.stages {
                        tr {
                            th scope="row" { (page::name(&stage.name)) }
                            td { (page::name(&stage.plugin.name)) } td { (page::name(&stage.plugin.version)) } td { (page::hash(&stage.plugin.hash)) }
                            td { (page::name(&stage.device)) " " (page::name(&stage.dtype)) } td.num { (stage.seed) }
                            td { @if let Some(digest) = &stage.digest { (page::hash(digest)) } }
                        }
                    }
                }
            } }
        }
        section { h2 { "Recipe" } pre.code tabindex="0" { (crate::terminal::clean(&detail.recipe_text)) } }
    }
}
