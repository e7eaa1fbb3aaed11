//! The frame of all pages, and their building blocks. Everything put into a page through these is escaped; in texts from a
//! store, invisible and reordering characters are escaped too ([`name`]).

use maud::{DOCTYPE, Markup, html};
use serde_json::Value;

use super::reply::{HTML, HttpError, Reply};
use super::request::{link, segment};
use super::{ServedStore, ServerState};
use crate::account::comparison::ComparedValue;
use crate::store::{RunId, RunState, RunSummary, StageState, StoreError, Time};
use crate::table;
use crate::terminal;

/// A page's section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// The list of runs.
    Runs,
    /// A run.
    Run,
    /// Curves.
    Curves,
    /// Pictures.
    Pictures,
    /// A comparison.
    Compare,
    /// Something else.
    Other,
}

/// A page's metadata.
pub struct Page<'a> {
    /// The title, without the program's name.
    pub title: &'a str,
    /// Its section.
    pub place: Section,
    /// The runs that it shows: links to other pages keep them.
    pub runs: &'a [String],
    /// Whether the first of them is the baseline.
    pub pinned: bool,
    /// Whether it may change while it is open; with the run whose progress it shows.
    pub live: Option<&'a str>,
    /// The page.
    pub body: Markup,
}

impl Page<'_> {
    /// The whole document.
    pub fn reply(self, site: &ServerState) -> Reply {
        let tabs = [
            (Section::Runs, "Runs", "/"),
            (Section::Curves, "Curves", "/curves"),
            (Section::Pictures, "Pictures", "/pictures"),
            (Section::Compare, "Compare", "/compare"),
        ];
        let kept: Vec<(&str, &str)> = (0..)
            .zip(self.runs)
            .map(|(place, run)| (field(place, self.pinned), run.as_str()))
            .collect();
        let document = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (terminal::clean(self.title)) " · retort" }
                    link rel="icon" href="/assets/icon.svg" type="image/svg+xml";
                    link rel="stylesheet" href="/assets/style.css";
                    script src="/assets/theme.js" {}
                    script type="module" src="/assets/app.js" {}
                }
                body data-live=[self.live] data-place=(format!("{:?}", self.place)) {
                    a.skip href="#main" { "Skip to the content" }
                    header.top {
                        a.brand href="/" aria-label="retort, all runs" {
                            (mark()) span { "retort" }
                        }
                        nav aria-label="Pages" {
                            @for (place, text, path) in tabs {
                                @let here = place == self.place || (place == Section::Runs && self.place == Section::Run);
                                @let href = if place == Section::Runs { path.to_owned() } else { link(path, &kept) };
                                a href=(href) aria-current=[here.then_some("page")] { (text) }
                            }
                        }
                        div.tools {
                            @if self.live.is_some() {
                                span.pulse #pulse role="status" title="This page follows what happens" { "live" }
                            }
                            button.ghost #theme type="button" title="Light or dark (t)" aria-label="Light or dark" hidden { "◐" }
                            button.ghost #keys type="button" title="Keys (?)" aria-label="Show the keys" hidden { "?" }
                        }
                    }
                    main #main tabindex="-1" { (self.body) }
                    footer.foot {
                        span {
                            @for (number, served) in site.stores.iter().enumerate() {
                                @if number > 0 { " · " }
                                span.mono { (name(&served.label)) }
                            }
                        }
                        span { (if site.write { "changes allowed" } else { "read-only" }) " · retort " (env!("CARGO_PKG_VERSION")) }
                    }
                    dialog #help aria-labelledby="help-title" {
                        h2 #help-title { "Keys" }
                        dl.keys {
                            @for (keys, what) in KEYS { dt { @for key in keys.split(' ') { kbd { (key) } " " } } dd { (what) } }
                        }
                        form method="dialog" { button { "Close" } }
                    }
                }
            }
        };
        Reply::new(HTML, document.into_string())
    }
}

/// The query field that names one of several runs.
pub fn field(place: usize, pinned: bool) -> &'static str {
    match place == 0 && pinned {
        true => "baseline",
        false => "run",
    }
}

const KEYS: [(&str, &str); 13] = [
    ("j k", "next, previous row"),
    ("Enter", "open the row's run"),
    ("x", "select the row's run"),
    ("c", "compare the selected runs"),
    ("p", "pin the row's run as the baseline"),
    ("/", "go to the filter or search"),
    ("g r", "runs"),
    ("g c", "curves"),
    ("g p", "pictures"),
    ("g v", "compare"),
    ("t", "light or dark"),
    ("Esc", "close, leave a field, undo a zoom"),
    ("?", "this list"),
];

fn mark() -> Markup {
    html! {
        svg.mark viewBox="0 0 24 24" width="22" height="22" aria-hidden="true" {
            path d="M9 3h6M10 3v6.2L4.6 18.4A1.8 1.8 0 0 0 6.2 21h11.6a1.8 1.8 0 0 0 1.6-2.6L14 9.2V3" fill="none" stroke="currentColor" stroke-width="1.7" stroke-linecap="round" stroke-linejoin="round" {}
            path d="M7.3 15.5h9.4l1.5 2.7a.9.9 0 0 1-.8 1.3H6.6a.9.9 0 0 1-.8-1.3z" fill="currentColor" opacity=".85" {}
        }
    }
}

/// An error page.
pub fn problem(site: &ServerState, problem: &HttpError) -> Reply {
    let status = problem.status();
    let body = html! {
        section.empty {
            h1 { (if status == 404 { "Not here" } else { "This failed" }) }
            (explained(problem))
            p { a href="/" { "All runs" } }
        }
    };
    Page {
        title: "Not here",
        place: Section::Other,
        runs: &[],
        pinned: false,
        live: None,
        body,
    }
    .reply(site)
    .status(status)
}

/// An error message in a box.
pub fn explained(problem: &HttpError) -> Markup {
    match problem {
        HttpError::Filter(error) => html! {
            div.alert role="alert" {
                p { strong { (error.to_string()) } }
                pre { (terminal::clean(&error.marked())) }
                @if let Some(hint) = &error.hint { p { (name(hint)) } }
            }
        },
        HttpError::Store(error) => html! {
            div.alert role="alert" {
                p { (name(&error.to_string())) }
                @if let StoreError::AmbiguousRun { candidates, .. } = error {
                    ul { @for id in candidates.iter().take(50) { li { a.mono href=(run_path(id)) { (name(id)) } } } }
                }
            }
        },
        problem => html! { div.alert role="alert" { p { (name(&problem.to_string())) } } },
    }
}

/// A text from a store: direction marks and invisible characters are written out, and the rest cannot reorder the text around
/// it.
pub fn name(text: &str) -> Markup {
    html! { bdi { (terminal::clean(text)) } }
}

/// The address of a run's page.
pub fn run_path(id: &str) -> String {
    format!("/run/{}", segment(id))
}

/// A link to a run.
pub fn run_link(id: &RunId) -> Markup {
    html! { a.mono href=(run_path(&id.0)) { (name(&id.0)) } }
}

/// The first characters of a hash.
pub fn hash(hash: &str) -> Markup {
    html! { span.mono title=(hash) { (name(hash.get(..12).unwrap_or(hash))) } }
}

/// The state of a run, as a mark and a word.
pub fn run_state(state: RunState) -> Markup {
    let style = match state {
        RunState::Succeeded => "good",
        RunState::Failed | RunState::Lost => "bad",
        RunState::Interrupted => "odd",
        RunState::Running => "now",
        RunState::Queued => "dim",
    };
    pill(style, state.name())
}

/// The state of a stage, as a mark and a word.
pub fn stage_state(state: StageState) -> Markup {
    pill(stage_style(state), state.name())
}

/// The class for the colour of a stage's state.
pub fn stage_style(state: StageState) -> &'static str {
    match state {
        StageState::Succeeded => "good",
        StageState::Reused => "old",
        StageState::Failed | StageState::Lost => "bad",
        StageState::Interrupted => "odd",
        StageState::Running => "now",
        StageState::Queued | StageState::Skipped => "dim",
    }
}

/// A word with a coloured mark.
pub fn pill(style: &str, word: &str) -> Markup {
    html! { span class=(format!("pill {style}")) { span.dot aria-hidden="true" {} (word) } }
}

/// A time, readable and exact.
pub fn ago(time: Time) -> Markup {
    html! { time datetime=(time.to_string()) title=(time.to_string()) { (table::ago(time.seconds_to(Time::now()))) } }
}

/// A number, aligned in its column.
pub fn number(value: f64) -> String {
    table::number(value)
}

/// A JSON value in brief.
pub fn value(value: &Value) -> Markup {
    match value {
        Value::Null => html! { span.dim { "–" } },
        Value::Number(own) if own.is_f64() => html! { (number(own.as_f64().unwrap_or(f64::NAN))) },
        Value::String(text) => name(text),
        value => name(&value.to_string()),
    }
}

/// A value in a filter's column: numbers that JSON cannot represent come as texts.
pub fn as_number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// The difference of a value from the baseline's.
pub fn delta(value: f64, baseline: f64) -> Markup {
    let by = value - baseline;
    match by.is_finite() && by != 0.0 {
        true => {
            html! { span.delta title="against the baseline" { (if by > 0.0 { "+" } else { "−" }) (number(by.abs())) } }
        }
        false => html! {},
    }
}

/// The tags of a run.
pub fn tags(run: &RunSummary) -> Markup {
    html! { @for tag in &run.tags { span.tag { (name(tag)) } " " } }
}

/// The name of a row in a comparison.
pub fn fact(fact: &ComparedValue) -> Markup {
    html! { span.mono { (jointed(&fact.name)) } }
}

/// Like [`name`], for a name that may have to wrap: it does so after the separators of its parts.
pub fn jointed(text: &str) -> Markup {
    let text = terminal::clean(text);
    let joints = ['/', '.', '_', '-'];
    html! { bdi { @for part in text.split_inclusive(joints) { (part) @if part.ends_with(joints) { wbr; } } } }
}

/// Links to choose a store, if there are several.
pub fn stores(site: &ServerState, here: &ServedStore) -> Markup {
    html! {
        @if site.stores.len() > 1 {
            nav.stores aria-label="Stores" {
                @for (number, served) in site.stores.iter().enumerate() {
                    @let current = served.dir() == here.dir();
                    a.chip href=(link("/", &[("store", &(number + 1).to_string())])) aria-current=[current.then_some("page")] {
                        (name(&served.label))
                    }
                }
            }
        }
    }
}
