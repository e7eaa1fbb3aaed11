//! The progress of a running run's stages.

use maud::{Markup, html};

use super::{ServedStore, page};
use crate::executor::progress_file;
use crate::store::{RunDetail, StageState, Time};
use crate::table;

/// A bar for each running stage; empty if none is running.
pub fn progress(served: &ServedStore, detail: &RunDetail) -> Markup {
    if !detail.summary.state.is_under_way() {
        return html! {};
    }
    let readings = progress_file::read(&served.layout.staging(&detail.summary.id.0));
    let now = Time::now();
    let done = detail
        .stages
        .iter()
        .filter(|stage| matches!(stage.state, StageState::Succeeded | StageState::Reused));
    let under_way = || {
        detail
            .stages
            .iter()
            .filter(|stage| stage.state == StageState::Running)
    };
    html! {
        section.progress aria-label="Progress" {
            p.dim.num { (done.count()) " of " (detail.stages.len()) " stages done" }
            @for stage in under_way() {
                @let reading = readings.get(&stage.name);
                div.meter {
                    span.who { (page::name(&stage.name)) }
                    @match reading.filter(|reading| reading.progress.total > 0) {
                        Some(reading) => {
                            @let (done, total) = (reading.progress.done, reading.progress.total);
                            progress max=(total) value=(done) aria-label=(format!("Progress of {}", stage.name)) {}
                            span.num {
                                (done) " of " (total) " " (page::name(&reading.progress.unit))
                                @if let Some(left) = reading.left(now) { span.dim { " · " (table::duration(left)) " left" } }
                            }
                        }
                        None => {
                            progress aria-label=(format!("Progress of {}, of unknown length", stage.name)) {}
                            span.num.dim {
                                @match stage.attempts.last().and_then(|attempt| attempt.seconds) {
                                    Some(seconds) => { "for " (table::duration(seconds)) }
                                    None => { "begins" }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
