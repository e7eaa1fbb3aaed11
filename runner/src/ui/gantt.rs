//! When the attempts of a run's stages ran: a row per stage, a bar per attempt.

use maud::{Markup, html};

use super::page;
use crate::store::{AttemptState, RunDetail, Time};
use crate::table;

/// SVG units of a bar.
const WIDTH: f64 = 1000.0;

/// The chart; empty without attempts.
pub fn chart(detail: &RunDetail) -> Markup {
    let attempts = || detail.stages.iter().flat_map(|stage| &stage.attempts);
    let Some(first) = attempts().map(|attempt| attempt.started).min() else {
        return html! {};
    };
    let now = Time::now();
    let end = |attempt: &crate::store::AttemptDetail| match (attempt.finished, attempt.state) {
        (Some(finished), _) => finished,
        (None, AttemptState::Running) => now,
        (None, _) => detail.summary.finished.unwrap_or(attempt.started),
    };
    let last = attempts().map(end).max().unwrap_or(first);
    let whole = first.seconds_to(last).max(0.001);
    let place = |time: Time| (first.seconds_to(time) / whole * WIDTH).clamp(0.0, WIDTH);
    html! {
        div.gantt role="list" aria-label="When the attempts at stages were under way" {
            @for stage in &detail.stages {
                div.lane role="listitem" {
                    span.who { (page::name(&stage.name)) }
                    svg.bars viewBox="0 0 1000 12" preserveAspectRatio="none" aria-hidden="true" {
                        rect.track x="0" y="5.5" width="1000" height="1" {}
                        @for attempt in &stage.attempts {
                            @let (from, to) = (place(attempt.started), place(end(attempt)));
                            rect class=(style(attempt.state)) x=(format!("{from:.1}")) y="1" width=(format!("{:.1}", (to - from).max(2.0))) height="10" rx="1.5" {
                                title { (attempt.state.name()) ", " (table::duration(attempt.started.seconds_to(end(attempt)))) }
                            }
                        }
                    }
                    span.took.num {
                        @match (&stage.reused_from, stage.attempts.last()) {
                            (Some(_), _) => { span.dim { "reused" } }
                            (None, Some(attempt)) => {
                                (table::duration(attempt.seconds.unwrap_or_else(|| attempt.started.seconds_to(end(attempt)))))
                                @if stage.attempts.len() > 1 { span.dim { " (attempt " (attempt.number) ")" } }
                            }
                            (None, None) => { span.dim { (stage.state.name()) } }
                        }
                    }
                }
            }
            div.lane aria-hidden="true" {
                span.who {}
                span.scale { span { "0" } span { (table::duration(whole / 2.0)) } span { (table::duration(whole)) } }
                span.took {}
            }
        }
    }
}

fn style(state: AttemptState) -> &'static str {
    match state {
        AttemptState::Succeeded => "good",
        AttemptState::Running => "now",
        AttemptState::Interrupted => "odd",
        AttemptState::Failed | AttemptState::Lost => "bad",
    }
}
