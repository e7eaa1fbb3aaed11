//! The log of a run: the last lines, by level, stage and text. New lines appear while the page is open.

use maud::{Markup, html};

use super::ServedStore;
use super::page;
use super::reply::HttpError;
use super::request::{PageRequest, link};
use crate::store::{LogQuery, LogSource, RunDetail, RunLine};
use crate::terminal;

/// The most lines on a page.
const LINES: u32 = 500;
/// The most characters of a line that are shown.
const LONGEST: usize = 4000;

const LEVELS: [(&str, u32); 5] = [
    ("error", 1),
    ("warn", 2),
    ("info", 3),
    ("debug", 4),
    ("trace", 5),
];

/// The page of a log.
pub async fn content(
    served: &ServedStore,
    detail: &RunDetail,
    request: &PageRequest,
) -> Result<Markup, HttpError> {
    let query = &request.query;
    let level = query.get("level").unwrap_or("trace");
    let known = LEVELS.iter().find(|(name, _)| *name == level);
    let (_, number) =
        known.ok_or_else(|| HttpError::BadRequest(format!("there is no level `{level}`")))?;
    let wish = LogQuery {
        level: *number,
        stage: query.get("stage"),
        text: query.get("text"),
        before: query.number("before"),
    };
    let run = &detail.summary.id;
    let (lines, more) = served.store.log_page(run, &wish, LINES).await?;
    let path = format!("{}/log", page::run_path(&run.0));
    let first = lines.first().map(|line| line.key.to_string());
    Ok(html! {
        form.filter method="get" action=(path) {
            label for="text" { "Search" }
            input #text type="search" name="text" value=(query.get("text").unwrap_or_default()) autocomplete="off" spellcheck="false";
            span.pair {
                label for="stage" { "Stage" }
                select #stage name="stage" {
                    option value="" { "all" }
                    @for stage in &detail.stages { option value=(stage.name) selected[wish.stage == Some(stage.name.as_str())] { (page::name(&stage.name)) } }
                }
            }
            span.pair {
                label for="level" { "Level" }
                select #level name="level" {
                    @for (name, _) in LEVELS { option value=(name) selected[name == level] { (name) } }
                }
            }
            button.primary type="submit" { "Show" }
            @if query.pairs().next().is_some() { a.button href=(path) { "Clear" } }
        }
        @if lines.is_empty() {
            section.empty { h2 { "No such lines" } p { @if query.pairs().next().is_some() { a href=(path) { "The whole log" } } @else { "There are no lines yet." } } }
        } @else {
            @if let Some(first) = first.filter(|_| more) {
                p { a.button href=(query.with("before", &first).link(&path)) { "↑ Earlier lines" } }
            }
            ol.log #log tabindex="0" aria-label="Log" { @for line in &lines { (shown(line)) } }
            @if wish.before.is_some() { p { a.button href=(query.without("before").link(&path)) { "↓ The last lines" } } }
            p.hint { "Times are UTC. " a href=(link(&path, &[("level", "warn")])) { "Only warnings and errors" } }
        }
    })
}

fn shown(line: &RunLine) -> Markup {
    let time = line.line.at.to_string();
    let clock = time.get(11..19).unwrap_or_default();
    let style = match (line.line.level, line.line.source) {
        (1, _) => "error",
        (2, _) => "warn",
        (_, LogSource::Stdout | LogSource::Stderr) => "printed",
        (4.., _) => "printed",
        _ => "said",
    };
    let text = match line.line.text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line.line.text[..end]),
        None => line.line.text.clone(),
    };
    html! {
        li class=(style) {
            time datetime=(time) title=(time) { (clock) } " "
            span.who { (page::name(&line.stage)) } " "
            @if matches!(line.line.level, 1 | 2) { strong { (style) ": " } }
            span.text { (page::name(&terminal::clean_line(&text))) }
        }
    }
}
