//! A run's progress: bars with rate and remaining time on a terminal, plain lines elsewhere.
//!
//! In: the executor's [`Event`]s. Out: lines, through a function given by the command line, and bars on stderr. Deliberately
//! absent: data; the command prints the results of a run.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use retort_abi::LogLevel;

use crate::executor::Event;
use crate::executor::end::End;
use crate::frame::Progress;
use crate::store::{LogLine, LogSource};
use crate::terminal;

/// Time between two plain lines of one stage.
const INTERVAL: Duration = Duration::from_secs(10);

/// What to print, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verbosity {
    /// Whether bars can be drawn.
    pub bars: bool,
    /// Whether lines take colours.
    pub color: bool,
    /// Say errors only.
    pub quiet: bool,
    /// 0: plugins' warnings; 1: their informational messages too; 2: everything they write.
    pub verbose: u8,
}

/// Prints a run's events.
pub struct ProgressReporter {
    manner: Verbosity,
    bars: MultiProgress,
    say: Box<dyn Fn(&str) + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    meters: HashMap<String, Meter>,
    /// Stages whose reuse has not been reported yet: if nothing runs at all, the summary reports it.
    reused: Vec<String>,
}

/// A running stage.
struct Meter {
    bar: Option<ProgressBar>,
    began: Instant,
    said: Instant,
    /// The first reported progress, from which this attempt resumed.
    first: Option<(Instant, u64)>,
}

impl ProgressReporter {
    /// A reporter with this verbosity; `say` writes an escaped line to stderr, above the bars.
    pub fn new(manner: Verbosity, say: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self {
            manner,
            bars: MultiProgress::new(),
            say: Box::new(say),
            state: Mutex::default(),
        }
    }

    /// The bars; other messages must be written above them.
    pub fn bars(&self) -> Option<MultiProgress> {
        self.draws().then(|| self.bars.clone())
    }

    /// Tells an event.
    pub fn hear(&self, event: Event) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::RunBegan { run } => self.say(&format!("run {run}")),
            Event::Reused { stage, .. } => state.reused.push(stage),
            Event::Waiting { stage } => {
                self.say(&format!(
                    "{stage}: another run works on the same stage; waiting for it"
                ));
            }
            Event::Submitted {
                stage,
                job,
                elements,
            } => {
                let of = elements.map_or_else(String::new, |count| format!(" of {count} elements"));
                self.say(&format!("{stage}: submitted as job {job}{of}"));
            }
            Event::Began {
                stage,
                device,
                workers,
                threads,
                ..
            } => {
                if !state.reused.is_empty() {
                    self.say(&format!(
                        "reused: {}",
                        std::mem::take(&mut state.reused).join(", ")
                    ));
                }
                let bar = self.draws().then(|| self.bar(&stage));
                let mut hands = if threads == 1 {
                    "1 thread".into()
                } else {
                    format!("{threads} threads")
                };
                if workers > 1 {
                    hands = format!("{workers} workers of {hands}");
                }
                if bar.is_none() {
                    self.say(&format!("{stage}: started ({device}, {hands})"));
                }
                let now = Instant::now();
                state.meters.insert(
                    stage,
                    Meter {
                        bar,
                        began: now,
                        said: now,
                        first: None,
                    },
                );
            }
            Event::Progress { stage, progress } => {
                if let Some(meter) = state.meters.get_mut(&stage) {
                    self.advance(&stage, meter, &progress);
                }
            }
            Event::Line { stage, line } => self.line(&stage, &line),
            Event::Ended {
                stage,
                end,
                elapsed,
                last_words,
            } => {
                if let Some(Meter { bar: Some(bar), .. }) = state.meters.remove(&stage) {
                    bar.finish_and_clear();
                }
                self.ended(&stage, &end, elapsed, &last_words);
            }
            Event::Stopping { grace, workers } => {
                let grace = humantime::format_duration(grace);
                let whom = if workers == 1 {
                    "the running stage".into()
                } else {
                    format!("{workers} running stages")
                };
                self.say(&format!(
                    "stopping: {whom} may take up to {grace} to reach a checkpoint; press Ctrl-C again to end at once"
                ));
            }
            Event::Killing => self.say("ending the running stages at once"),
            Event::GoingOn => self.say("going on"),
            Event::Warning { stage, text } => {
                let stage = stage.map_or_else(String::new, |stage| format!("{stage}: "));
                self.say(&format!("{}: {stage}{text}", self.paint("warning", "33")));
            }
        }
    }

    fn draws(&self) -> bool {
        self.manner.bars && !self.manner.quiet
    }

    fn say(&self, line: &str) {
        if !self.manner.quiet {
            (self.say)(line);
        }
    }

    fn paint(&self, text: &str, color: &str) -> String {
        terminal::paint(text, &format!("1;{color}"), self.manner.color)
    }

    fn bar(&self, stage: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::no_length());
        bar.set_style(waiting_style());
        // Bars write to the terminal directly.
        bar.set_prefix(terminal::clean_line(stage));
        bar.enable_steady_tick(Duration::from_millis(200));
        bar
    }

    fn advance(&self, stage: &str, meter: &mut Meter, progress: &Progress) {
        let now = Instant::now();
        let first = meter.first.is_none();
        let (since, from) = *meter.first.get_or_insert((now, progress.done));
        if let Some(bar) = &meter.bar {
            if progress.total > 0 && bar.length() != Some(progress.total) {
                bar.set_length(progress.total);
                bar.set_style(running_style());
            }
            bar.set_message(terminal::clean_line(&progress.unit));
            bar.set_position(progress.done);
            if first {
                // An earlier attempt's work does not count for the rate.
                bar.reset_eta();
            }
        } else if now.duration_since(meter.said) >= INTERVAL {
            meter.said = now;
            let rate = rate(
                progress.done.saturating_sub(from),
                now.duration_since(since),
            );
            self.say(&format!(
                "{stage}: {}",
                describe(progress, rate, now.duration_since(meter.began))
            ));
        }
    }

    fn line(&self, stage: &str, line: &LogLine) {
        let wanted = match line.source {
            LogSource::Plugin => match self.manner.verbose {
                0 => LogLevel::Warn as u32,
                1 => LogLevel::Info as u32,
                _ => LogLevel::Trace as u32,
            },
            _ if self.manner.verbose >= 2 => LogLevel::Trace as u32,
            _ => 0,
        };
        if line.level > wanted || (self.manner.quiet && line.level > LogLevel::Error as u32) {
            return;
        }
        let label = match line.level {
            1 => format!("{}: ", self.paint("error", "31")),
            2 => format!("{}: ", self.paint("warning", "33")),
            _ => String::new(),
        };
        let text = line.text.replace('\n', " ");
        (self.say)(&format!("{stage}: {label}{text}"));
    }

    fn ended(&self, stage: &str, end: &End, elapsed: Duration, last_words: &[String]) {
        let took = duration(elapsed);
        match end {
            End::Succeeded { .. } => {
                self.say(&format!("{stage}: {} in {took}", self.paint("done", "32")))
            }
            End::Interrupted { .. } => {
                let message = end.message().unwrap_or_default();
                self.say(&format!(
                    "{stage}: {} after {took}: {message}",
                    self.paint("interrupted", "33")
                ));
            }
            end => {
                let label = self.paint("error", "31");
                let mut text = format!(
                    "{label}: stage `{stage}` ended after {took}: {}",
                    end.reason()
                );
                if let Some(message) = end.message() {
                    let _ = write!(text, "\n  {}", message.replace('\n', "\n  "));
                }
                // A dying process's output is often more informative than its exit; a panic has been printed already.
                if matches!(end, End::Died(_)) && !last_words.is_empty() {
                    text.push_str("\n  the last lines it wrote:");
                    for line in last_words {
                        let _ = write!(text, "\n    {line}");
                    }
                }
                if let Some(hint) = end.hint() {
                    let _ = write!(text, "\n  {}: {hint}", self.paint("help", "36"));
                }
                (self.say)(&text);
            }
        }
    }
}

/// Units per second; `None` before any progress.
fn rate(done: u64, during: Duration) -> Option<f64> {
    (done > 0 && during > Duration::ZERO).then(|| done as f64 / during.as_secs_f64())
}

/// `40% (400/1000 steps, 12.3 steps/s, 49s left)`.
fn describe(progress: &Progress, rate: Option<f64>, elapsed: Duration) -> String {
    let Progress { done, total, unit } = progress;
    let speed = rate.map_or_else(String::new, |rate| {
        let digits = usize::from(rate < 100.0);
        format!(", {rate:.digits$} {unit}/s")
    });
    if *total == 0 {
        return format!("{done} {unit}{speed}, {} so far", duration(elapsed));
    }
    let percent = 100 * u128::from(*done) / u128::from(*total);
    let left = rate
        .and_then(|rate| {
            Duration::try_from_secs_f64(total.saturating_sub(*done) as f64 / rate).ok()
        })
        .map_or_else(String::new, |left| format!(", {} left", duration(left)));
    format!("{percent}% ({done}/{total} {unit}{speed}{left})")
}

/// `0.4s`, `12s`, `3m05s`, `2h01m`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.1}s", duration.as_secs_f64()),
        10..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

fn waiting_style() -> ProgressStyle {
    template("{prefix:>14} {spinner} {elapsed} {pos} {msg}")
}

fn running_style() -> ProgressStyle {
    template("{prefix:>14} [{bar:28}] {percent:>3}% {pos}/{len} {msg}, {rate}/s, {left} left")
        .progress_chars("=> ")
        .with_key(
            "rate",
            |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                let rate = state.per_sec();
                let digits = usize::from(rate < 100.0);
                let _ = write!(text, "{rate:.digits$}");
            },
        )
        .with_key(
            "left",
            |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                let known = state.per_sec() > 0.0;
                let left = known.then(|| duration(state.eta()));
                let _ = text.write_str(left.as_deref().unwrap_or("?"));
            },
        )
}

/// The templates are constant and valid; an invalid one would still show a bar.
fn template(text: &str) -> ProgressStyle {
    ProgressStyle::with_template(text).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{AttemptId, RunId, Time};
    use std::sync::Arc;

    /// The lines printed for the events.
    fn said(manner: Verbosity, events: Vec<Event>) -> Vec<String> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&lines);
        let teller = ProgressReporter::new(manner, move |line| {
            heard
                .lock()
                .unwrap()
                .push(crate::terminal::show(line).into_owned())
        });
        events.into_iter().for_each(|event| teller.hear(event));
        lines.lock().unwrap().clone()
    }

    const PLAIN: Verbosity = Verbosity {
        bars: false,
        color: false,
        quiet: false,
        verbose: 0,
    };

    fn line(level: u32, source: LogSource, text: &str) -> Event {
        Event::Line {
            stage: "s".into(),
            line: LogLine {
                at: Time(0),
                level,
                source,
                text: text.into(),
            },
        }
    }

    #[test]
    fn reuse_is_told_once_something_runs() {
        let reused = |stage: &str| Event::Reused {
            stage: stage.into(),
            from: RunId("r".into()),
        };
        let began = |workers| Event::Began {
            stage: "c".into(),
            attempt: AttemptId(1),
            pid: 1,
            device: "cpu".into(),
            workers,
            threads: 2,
        };
        assert_eq!(said(PLAIN, vec![reused("a"), reused("b")]), [""; 0]);
        assert_eq!(
            said(PLAIN, vec![reused("a"), reused("b"), began(1)]),
            ["reused: a, b", "c: started (cpu, 2 threads)"]
        );
        assert_eq!(
            said(PLAIN, vec![began(3)]),
            ["c: started (cpu, 3 workers of 2 threads)"]
        );
    }

    #[track_caller]
    fn check_lines(manner: Verbosity, expected: &[&str]) {
        let events = vec![
            line(1, LogSource::Plugin, "bad\x1b[2J"),
            line(2, LogSource::Plugin, "odd"),
            line(3, LogSource::Plugin, "well"),
            line(4, LogSource::Stdout, "printed"),
        ];
        assert_eq!(said(manner, events), expected);
    }

    #[test]
    fn lines_are_shown_by_their_weight() {
        check_lines(
            Verbosity {
                quiet: true,
                ..PLAIN
            },
            &["s: error: bad\\u001b[2J"],
        );
        check_lines(PLAIN, &["s: error: bad\\u001b[2J", "s: warning: odd"]);
        check_lines(
            Verbosity {
                verbose: 1,
                ..PLAIN
            },
            &["s: error: bad\\u001b[2J", "s: warning: odd", "s: well"],
        );
        check_lines(
            Verbosity {
                verbose: 2,
                ..PLAIN
            },
            &[
                "s: error: bad\\u001b[2J",
                "s: warning: odd",
                "s: well",
                "s: printed",
            ],
        );
    }

    #[test]
    fn progress_in_words() {
        let progress = |done, total| Progress {
            done,
            total,
            unit: "steps".into(),
        };
        let check = |progress: Progress, rate, text: &str| {
            assert_eq!(describe(&progress, rate, Duration::from_secs(65)), text);
        };
        check(
            progress(400, 1000),
            Some(12.34),
            "40% (400/1000 steps, 12.3 steps/s, 48s left)",
        );
        check(
            progress(400, 1000),
            Some(1234.5),
            "40% (400/1000 steps, 1234 steps/s, 0.5s left)",
        );
        check(progress(0, 1000), None, "0% (0/1000 steps)");
        check(progress(7, 0), None, "7 steps, 1m05s so far");
    }

    #[test]
    fn durations_are_short() {
        let check = |millis, text: &str| assert_eq!(duration(Duration::from_millis(millis)), text);
        check(449, "0.4s");
        check(12_900, "12s");
        check(185_000, "3m05s");
        check(7_260_000, "2h01m");
    }
}
