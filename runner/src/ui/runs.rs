//! The list of runs: filtered, ordered, with chosen columns, in pages or in groups.

use maud::{Markup, html};
use serde_json::Value;

use super::page::{self, Page, Section};
use super::reply::{HttpError, Reply};
use super::request::{Fields, PageRequest, segment};
use super::{ServedStore, ServerState};
use crate::filter::{self, Expr, Filter, Name};
use crate::store::{Group, RunFilter, RunSummary, Sort, StoreError};
use crate::table;

/// Runs on a page.
const PAGE: u32 = 100;
/// Groups on a page, and runs shown per group.
const GROUPS: u32 = 25;
const OF_GROUP: u32 = 10;
/// The most parameters and metrics to choose from.
const NAMES: u32 = 500;
/// The most columns.
const COLUMNS: usize = 24;

/// The request's parameters.
struct ListQuery {
    filter: Option<Filter>,
    sort: Vec<Sort>,
    columns: Vec<Name>,
    page: u32,
}

/// The page.
pub async fn answer(site: &ServerState, request: &PageRequest) -> Result<Reply, HttpError> {
    let number: usize = request.query.number("store").unwrap_or(1);
    let served = site
        .stores
        .get(number.wrapping_sub(1))
        .ok_or_else(|| HttpError::NotFound(format!("there is no store number {number}")))?;
    let found = content(site, served, request).await;
    let status = found.as_ref().err().map_or(200, HttpError::status);
    let names = served.store.field_names(NAMES).await?;
    let body = html! {
        (page::stores(site, served))
        h1.visually-hidden { "Runs" }
        (controls(request, &names))
        div #list data-live="" {
            @match &found {
                Ok(content) => (content),
                Err(problem) => (page::explained(problem)),
            }
        }
    };
    let reply = Page {
        title: "Runs",
        place: Section::Runs,
        runs: &[],
        pinned: false,
        live: Some(""),
        body,
    }
    .reply(site);
    Ok(reply.status(status))
}

/// The chosen columns: one field may name several, as with `--show`.
fn chosen(query: &Fields) -> impl Iterator<Item = &str> {
    query
        .all("show")
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
}

fn query(query: &Fields) -> Result<ListQuery, HttpError> {
    let filter = query.get("where").filter(|text| !text.trim().is_empty());
    let sort = query
        .all("sort")
        .flat_map(|list| list.split(','))
        .map(|text| {
            let (name, descending) = match text.strip_prefix('-') {
                Some(name) => (name, true),
                None => (text, false),
            };
            Ok(Sort {
                name: filter::parse_name(name)?,
                descending,
            })
        });
    let mut columns = Vec::new();
    for text in chosen(query).take(COLUMNS) {
        let name = filter::parse_name(text)?;
        if !columns.contains(&name) {
            columns.push(name);
        }
    }
    Ok(ListQuery {
        filter: filter.map(filter::parse).transpose()?,
        sort: sort.collect::<Result<_, HttpError>>()?,
        columns,
        page: query.number("page").unwrap_or(1).max(1),
    })
}

async fn content(
    site: &ServerState,
    served: &ServedStore,
    request: &PageRequest,
) -> Result<Markup, HttpError> {
    let query = query(&request.query)?;
    let baseline = baseline(site, request, &query).await;
    let list = match request.query.get("group") {
        Some(by @ ("tag" | "sweep")) => {
            groups(served, request, &query, baseline.as_ref(), by).await?
        }
        Some(other) => {
            return Err(HttpError::BadRequest(format!(
                "runs have no groups by {other}"
            )));
        }
        None => whole(served, request, &query, baseline.as_ref()).await?,
    };
    let gone = request.query.get("baseline").filter(|_| baseline.is_none());
    Ok(html! {
        @if let Some(id) = gone {
            p.hint { "The pinned baseline " span.mono { (page::name(id)) } " is gone. " (unpin(id)) }
        }
        (list)
    })
}

/// The button to unpin; only for scripts, which remember the pin.
fn unpin(id: &str) -> Markup {
    html! { button type="button" data-pin=(id) hidden { "Unpin" } }
}

/// The baseline run, from any store; ignored if it no longer exists.
async fn baseline(
    site: &ServerState,
    request: &PageRequest,
    query: &ListQuery,
) -> Option<RunSummary> {
    let id = request.query.get("baseline")?;
    let (served, run) = site.find_run(id).await.ok()?;
    if run.0 != id {
        return None;
    }
    let filter = RunFilter {
        limit: Some(1),
        expr: Some(filter::parse(&format!("id = \"{run}\"")).ok()?),
        columns: query.columns.clone(),
        ..RunFilter::default()
    };
    let mut found = served.store.list_runs(&filter).await;
    // A column unknown to its store is empty.
    if let Err(StoreError::Filter(_)) = found {
        let plain = RunFilter {
            columns: Vec::new(),
            ..filter
        };
        found = served.store.list_runs(&plain).await;
    }
    found.ok()?.pop()
}

async fn whole(
    served: &ServedStore,
    request: &PageRequest,
    query: &ListQuery,
    baseline: Option<&RunSummary>,
) -> Result<Markup, HttpError> {
    let filter = RunFilter {
        limit: Some(PAGE),
        skip: (query.page - 1).saturating_mul(PAGE),
        expr: query.filter.clone(),
        sort: query.sort.clone(),
        columns: query.columns.clone(),
        ..RunFilter::default()
    };
    let listed = served.store.list_runs(&filter);
    let counted = served.store.count_matching(&filter);
    let (runs, count) = match query.sort.is_empty() {
        // Both scan all runs, so they run concurrently.
        false => tokio::try_join!(listed, counted)?,
        true => {
            let runs = listed.await?;
            let count = match runs.len() {
                // The list ends here, so its length is known without counting.
                found @ 1.. if found < PAGE as usize => u64::from(filter.skip) + found as u64,
                0 if query.page == 1 => 0,
                _ => counted.await?,
            };
            (runs, count)
        }
    };
    let (first, last) = (
        u64::from(filter.skip) + 1,
        u64::from(filter.skip) + runs.len() as u64,
    );
    Ok(html! {
        @if runs.is_empty() && count == 0 {
            (nothing(query.filter.is_some()))
        } @else {
            (table(&runs, query, request, baseline, "runs"))
            nav.pages aria-label="Parts of the list" {
                span.num #count { @if runs.is_empty() { "no more rows of " } @else { (grouped(first)) "–" (grouped(last)) " of " } (grouped(count)) }
                @if query.page > 1 {
                    a.button href=(request.query.with("page", &(query.page - 1).to_string()).link("/")) rel="prev" { "← Newer" }
                }
                @if last < count && !runs.is_empty() {
                    a.button href=(request.query.with("page", &(query.page + 1).to_string()).link("/")) rel="next" { "Older →" }
                }
            }
        }
    })
}

/// `100,000`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn nothing(filtered: bool) -> Markup {
    html! {
        section.empty {
            @if filtered {
                h2 { "No run passes this filter" }
                p { a href="/" { "Show all runs" } }
            } @else {
                h2 { "No runs yet" }
                p { "The first one appears here as soon as it begins:" }
                pre { "retort run recipes/digits.yaml" }
            }
        }
    }
}

/// The newest sweeps, with their numbers of points.
async fn sweeps(served: &ServedStore) -> Result<Vec<Group>, HttpError> {
    let sweeps = served.store.list_sweeps().await?;
    let groups = sweeps.into_iter().take(GROUPS as usize).map(|sweep| Group {
        name: sweep.id.0,
        runs: u64::from(sweep.points),
    });
    Ok(groups.collect())
}

async fn groups(
    served: &ServedStore,
    request: &PageRequest,
    query: &ListQuery,
    baseline: Option<&RunSummary>,
    by: &str,
) -> Result<Markup, HttpError> {
    let groups = match by {
        "sweep" => sweeps(served).await?,
        _ => served.store.tag_groups(GROUPS).await?,
    };
    let mut shown = Vec::new();
    for group in groups {
        let quote = if group.name.contains('"') { '\'' } else { '"' };
        let condition = format!("{by} = {quote}{}{quote}", group.name);
        // A name with both kinds of quotes cannot be written in a filter.
        let Ok(own) = filter::parse(&condition) else {
            continue;
        };
        let expr = match &query.filter {
            Some(given) => Filter {
                text: given.text.clone(),
                expr: Expr::And(vec![given.expr.clone(), own.expr]),
            },
            None => own,
        };
        let filter = RunFilter {
            limit: Some(OF_GROUP),
            expr: Some(expr),
            sort: query.sort.clone(),
            columns: query.columns.clone(),
            ..RunFilter::default()
        };
        let runs = served.store.list_runs(&filter).await?;
        if !runs.is_empty() {
            shown.push((group, condition, runs));
        }
    }
    Ok(html! {
        @if shown.is_empty() {
            section.empty {
                @if by == "sweep" {
                    h2 { "No sweeps here" }
                    p { "One makes many runs of a recipe: " code { "retort run RECIPE --sweep PATH=VALUE,VALUE" } }
                } @else {
                    h2 { "No tags here" }
                    p { "Runs are put together by tags: " code { "retort runs tag RUN TAG" } }
                }
            }
        }
        @for (number, (group, condition, runs)) in shown.iter().enumerate() {
            @let all = match request.query.get("where") {
                Some(given) => format!("({given}) and {condition}"),
                None => condition.clone(),
            };
            details.group open[number < 5] {
                summary {
                    span.tag { (page::name(&group.name)) }
                    @if by == "sweep" { " " a href=(format!("/sweep/{}", segment(&group.name))) { "its points" } }
                    span.dim.num { " " (grouped(group.runs)) (if by == "sweep" { " points" } else { " runs" }) } }
                (table(runs, query, request, baseline, &format!("group-{number}")))
                // A point may have had several runs.
                @if group.runs > runs.len() as u64 || (by == "sweep" && runs.len() == OF_GROUP as usize) {
                    p { a href=(request.query.without("group").without("page").with("where", &all).link("/")) { "All of them" } }
                }
            }
        }
    })
}

/// The form for filter, columns and groups; it works without scripts.
fn controls(request: &PageRequest, names: &[String]) -> Markup {
    let query = &request.query;
    let kept = query.without("where").without("page").without("add");
    let columns: Vec<&str> = chosen(query).collect();
    let group = query.get("group");
    html! {
        search {
            form.filter method="get" action="/" {
                @for (name, value) in kept.pairs() { input type="hidden" name=(name) value=(value); }
                label for="where" { "Filter" }
                input #where type="search" name="where" value=(query.get("where").unwrap_or_default()) list="fields"
                    autocomplete="off" autocapitalize="off" spellcheck="false" aria-describedby="where-help"
                    placeholder="metrics.1-step.frechet_distance < 20 and state = succeeded";
                button.primary type="submit" { "Filter" }
                @if query.get("where").is_some() { a.button href=(kept.link("/")) { "Clear" } }
            }
            div.bar {
                form.inline method="get" action="/" {
                    @for (name, value) in query.without("page").pairs() { input type="hidden" name=(name) value=(value); }
                    label for="show" { "Column" }
                    input #show type="text" name="show" list="fields" placeholder="metrics.student/loss.last" autocomplete="off"
                        autocapitalize="off" spellcheck="false";
                    button type="submit" { "Add" }
                }
                @for column in &columns {
                    @let left = columns.iter().filter(|other| other != &column);
                    @let left = left.fold(query.without("show").without("page"), |mut fields, one| { fields.push("show", one); fields });
                    a.chip href=(left.link("/")) title="Remove this column" { (page::name(column)) span aria-hidden="true" { " ×" } }
                }
                span.spacer {}
                span.segments role="group" aria-label="Groups" {
                    a href=(query.without("group").without("page").link("/")) aria-current=[group.is_none().then_some("true")] { "List" }
                    a href=(query.with("group", "tag").without("page").link("/")) aria-current=[(group == Some("tag")).then_some("true")] { "By tag" }
                    a href=(query.with("group", "sweep").without("page").link("/")) aria-current=[(group == Some("sweep")).then_some("true")] { "By sweep" }
                }
            }
            datalist #fields {
                @for own in ["state", "recipe", "started", "age", "seconds", "seed", "tag", "stage", "kind", "device", "note", "error"] { option value=(own) {} }
                @for name in names { option value=(name) {} }
            }
            p.hint #where-help {
                "As in " code { "retort runs list --where" } ": " code { "=" } " " code { "!=" } " " code { "<" } " " code { ">" } " " code { "~" } " (contains) " code { "in (a, b)" }
                ", joined by " code { "and" } ", " code { "or" } ", " code { "not" } "; durations are written 10m or 7d."
            }
        }
    }
}

fn table(
    runs: &[RunSummary],
    query: &ListQuery,
    request: &PageRequest,
    baseline: Option<&RunSummary>,
    id: &str,
) -> Markup {
    let head =
        |text: &str, field: Option<&str>, class: &str| head(text, field, class, query, request);
    html! {
        form.picks method="get" action="/compare" {
            @if let Some(baseline) = baseline { input type="hidden" name="baseline" value=(baseline.id.0); }
            div.scroll {
                table.runs id=(id) {
                    thead { tr {
                        th scope="col" { span.visually-hidden { "Selected" } }
                        (head("Run", Some("id"), ""))
                        (head("State", Some("state"), ""))
                        (head("Recipe", Some("recipe"), ""))
                        (head("Started", Some("started"), ""))
                        (head("Took", Some("seconds"), "num"))
                        @for column in &query.columns { (head(&column.text, Some(&column.text), "num chosen")) }
                        (head("Stages", None, ""))
                        (head("Tags and note", None, ""))
                    } }
                    tbody {
                        @if let Some(baseline) = baseline { (row(baseline, query, Some(baseline), true)) }
                        @for run in runs.iter().filter(|run| baseline.is_none_or(|baseline| baseline.id != run.id)) {
                            (row(run, query, baseline, false))
                        }
                    }
                }
            }
            div.picked {
                button.primary type="submit" { "Compare" }
                button type="submit" formaction="/curves" { "Curves" }
                button type="submit" formaction="/pictures" { "Pictures" }
                span.dim { " of the selected runs" }
            }
        }
    }
}

/// The last part of a field's name, which says most, and the part before it.
fn short(field: &str) -> (&str, &str) {
    let statistics = [".last", ".min", ".max", ".points"];
    let cut = statistics.iter().find_map(|end| field.strip_suffix(end));
    let whole = cut.unwrap_or(field);
    match whole.rfind(['/', '.']) {
        Some(place) => (&field[place + 1..], &field[..place]),
        None => (field, ""),
    }
}

fn head(
    text: &str,
    field: Option<&str>,
    class: &str,
    query: &ListQuery,
    request: &PageRequest,
) -> Markup {
    let Some(field) = field else {
        return html! { th scope="col" class=(class) { (page::name(text)) } };
    };
    let (short, rest) = match class.contains("chosen") {
        true => short(text),
        false => (text, ""),
    };
    let sorted = query.sort.first().filter(|sort| sort.name.text == field);
    let (sort, aria, mark) = match sorted {
        Some(sort) if sort.descending => (field.to_owned(), Some("descending"), "↓"),
        Some(_) => (format!("-{field}"), Some("ascending"), "↑"),
        None if field == "started" && query.sort.is_empty() => {
            (field.to_owned(), Some("descending"), "↓")
        }
        None => (field.to_owned(), None, ""),
    };
    html! {
        th scope="col" class=(class) aria-sort=[aria] {
            a href=(request.query.with("sort", &sort).without("page").link("/")) title=[(!rest.is_empty()).then_some(text)] {
                (page::name(short)) span.arrow aria-hidden="true" { (mark) }
                @if !rest.is_empty() { br; span.context { (page::name(rest)) } }
            }
        }
    }
}

fn row(run: &RunSummary, query: &ListQuery, baseline: Option<&RunSummary>, pinned: bool) -> Markup {
    html! {
        tr.pinned[pinned] data-run=(run.id.0) {
            td.pick { input type="checkbox" name="run" value=(run.id.0) aria-label=(format!("Select {}", run.id)); }
            td.id { (page::run_link(&run.id)) @if pinned { span.badge { "baseline" } " " (unpin(&run.id.0)) } }
            td { (page::run_state(run.state)) }
            td.recipe { (page::name(&run.recipe)) }
            td.dim data-label="started" { (page::ago(run.started)) }
            td.num data-label="took" { (table::duration(run.seconds)) }
            @for column in &query.columns {
                @let value = run.values.get(&column.text).unwrap_or(&Value::Null);
                td.num data-label=(short(&column.text).0) {
                    @match page::as_number(value) {
                        Some(number) => {
                            (page::number(number))
                            @if let Some(other) = baseline.filter(|_| !pinned).and_then(|one| page::as_number(one.values.get(&column.text)?)) {
                                (page::delta(number, other))
                            }
                        }
                        None => (page::value(value)),
                    }
                }
            }
            td.dim data-label="stages" { (run.stages.in_words()) }
            td.note { (page::tags(run)) @if !run.note.is_empty() { span.dim { (page::name(&run.note)) } } @else if let Some(error) = &run.error { span.bad.clip title=(error) { (page::name(error)) } } }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_end_of_a_name_says_most() {
        let check = |field: &str, expected: (&str, &str)| assert_eq!(super::short(field), expected);
        check(
            "metrics.student/loss.last",
            ("loss.last", "metrics.student"),
        );
        check(
            "params.student.train.steps",
            ("steps", "params.student.train"),
        );
        check("seed", ("seed", ""));
    }

    #[test]
    fn thousands_are_told_apart() {
        let check = |number: u64, text: &str| assert_eq!(super::grouped(number), text);
        check(0, "0");
        check(999, "999");
        check(1000, "1,000");
        check(100_000, "100,000");
        check(1_234_567, "1,234,567");
    }
}
