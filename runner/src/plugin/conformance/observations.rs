//! Observations of one attempt at a stage: its messages, outputs and end, and faults in them.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use retort_abi::{Failure, FailureCode, StageResult};
use serde_json::Value;

use super::{CheckFailure, CheckResult, ConformanceRunOptions, failed, skipped};
use crate::frame::{Answer, FromWorker, Points, Progress, Task, ToWorker};
use crate::store::ArtifactRecord;
use crate::worker::death::UnexpectedExit;
use crate::worker::process::{Worker, WorkerEvent, WorkerExit};

/// When a stage is asked to stop.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Stopping {
    Never,
    /// As soon as it reports work.
    AtFirstSign,
}

/// The observations of an attempt.
#[derive(Debug, Default)]
pub(super) struct Observations {
    pub(super) answer: Option<Result<Answer, Failure>>,
    pub(super) not_loaded: Option<String>,
    pub(super) artifacts: BTreeMap<u64, ArtifactRecord>,
    pub(super) progress: Vec<Progress>,
    pub(super) points: Vec<Points>,
    pub(super) exit: Option<WorkerExit>,
    pub(super) last_words: Vec<String>,
    /// Calls after `run` had returned.
    pub(super) late: u64,
    /// Killed after exceeding this time.
    pub(super) too_long: Option<Duration>,
    /// From the request to stop to the end.
    pub(super) stopping: Option<Duration>,
    pub(super) took: Duration,
}

pub(super) async fn watch(
    task: Task,
    temporary: &Path,
    stopping: Stopping,
    &ConformanceRunOptions { limit, grace, .. }: &ConformanceRunOptions,
) -> std::io::Result<Observations> {
    let begun = Instant::now();
    let mut worker = Worker::spawn(1, &[("TMPDIR", temporary.into())])?;
    let sent = worker.send(&ToWorker::Start(Box::new(task))).await;
    sent.map_err(std::io::Error::other)?;
    let mut seen = Observations::default();
    let mut asked: Option<Instant> = None;
    let mut allowed = limit;
    let mut deadline = tokio::time::Instant::now() + limit;
    loop {
        let heard = tokio::select! {
            heard = worker.next() => heard,
            () = tokio::time::sleep_until(deadline), if seen.too_long.is_none() => {
                seen.too_long = Some(allowed);
                worker.signal(libc::SIGKILL);
                continue;
            }
        };
        let mut sign = false;
        match heard {
            WorkerEvent::Frame(FromWorker::Answer(answer)) => seen.answer = Some(Ok(answer)),
            WorkerEvent::Frame(FromWorker::Failed(failure)) => seen.answer = Some(Err(failure)),
            WorkerEvent::Frame(FromWorker::NotLoaded { message, .. }) => {
                seen.not_loaded = Some(message)
            }
            WorkerEvent::Frame(FromWorker::Artifact { id, record }) => {
                seen.artifacts.insert(id, *record);
            }
            WorkerEvent::Frame(FromWorker::Progress(progress)) => {
                sign = true;
                seen.progress.push(progress);
            }
            WorkerEvent::Frame(FromWorker::Metrics(points)) => {
                sign = true;
                seen.points.extend(points);
            }
            WorkerEvent::Frame(FromWorker::Late { calls }) => seen.late = calls,
            WorkerEvent::Frame(
                FromWorker::Loaded
                | FromWorker::Heartbeat
                | FromWorker::Silent { .. }
                | FromWorker::Log(_),
            )
            | WorkerEvent::Remote(_) => {}
            WorkerEvent::Malformed(error) => seen.last_words.push(error.to_string()),
            WorkerEvent::Line(_, line) => {
                seen.last_words.push(line);
                let surplus = seen.last_words.len().saturating_sub(8);
                seen.last_words.drain(..surplus);
            }
            WorkerEvent::Exited(exit) => {
                seen.exit = Some(exit);
                break;
            }
        }
        if sign && stopping == Stopping::AtFirstSign && asked.is_none() {
            asked = Some(Instant::now());
            (allowed, deadline) = (grace, tokio::time::Instant::now() + grace);
            // A message without paths can be written.
            let _ = worker.send(&ToWorker::StopAtCheckpoint).await;
        }
    }
    seen.stopping = asked.map(|asked| asked.elapsed());
    seen.took = begun.elapsed();
    Ok(seen)
}

impl Observations {
    /// The output and the summary of a successful stage.
    pub(super) fn result(&self, kind: &str) -> Result<(ArtifactRecord, Value), CheckFailure> {
        let result = self.answered()?;
        match self.artifacts.get(&result.output) {
            Some(record) if record.kind == kind => Ok((record.clone(), result.summary.clone())),
            Some(record) => failed(format!(
                "its output is a `{}`, its description promises a `{kind}`",
                record.kind
            )),
            None => failed("its output was not committed"),
        }
    }

    /// The answer of a job that succeeded.
    pub(super) fn answered(&self) -> Result<&StageResult, CheckFailure> {
        if let Some(message) = &self.not_loaded {
            return failed(message);
        }
        if let Some(limit) = self.too_long {
            return failed(format!("it exceeded {} s", limit.as_secs()));
        }
        match &self.answer {
            Some(Ok(Answer::Result(result))) => Ok(result),
            Some(Ok(_)) => failed("the worker answered another question"),
            Some(Err(failure)) => failed(format!("it failed: {}", failure.message)),
            None => failed(self.died()),
        }
    }

    fn died(&self) -> String {
        let Some(exit) = self.exit else {
            return "it ended its process".into();
        };
        let last_words = self.last_words.iter().map(String::as_str);
        let death = UnexpectedExit::new(exit.status, last_words, false);
        let written = match self.last_words.last() {
            Some(line) => format!("; the last line it wrote: {}", line.trim()),
            None => String::new(),
        };
        format!("{}: {}{written}", death.reason(), death.message())
    }

    pub(super) fn progress_is_monotonic(&self) -> CheckResult {
        for pair in self.progress.windows(2) {
            if pair[0].unit == pair[1].unit && pair[1].done < pair[0].done {
                return failed(format!(
                    "it fell from {} to {} {}",
                    pair[0].done, pair[1].done, pair[1].unit
                ));
            }
        }
        if let Some(beyond) = self
            .progress
            .iter()
            .find(|p| p.total > 0 && p.done > p.total)
        {
            return failed(format!(
                "{} of {} {}",
                beyond.done, beyond.total, beyond.unit
            ));
        }
        match self.progress.last() {
            Some(last) => Ok(format!("{} of {} {}", last.done, last.total, last.unit)),
            None => skipped("it sent none"),
        }
    }

    pub(super) fn steps_are_monotonic(&self) -> CheckResult {
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        let mut count = 0;
        for points in &self.points {
            for &step in &points.steps {
                let before = last.insert(&points.series, step);
                if let Some(before) = before.filter(|&before| before > step) {
                    return failed(format!(
                        "`{}` went from step {before} back to {step}",
                        points.series
                    ));
                }
                count += 1;
            }
        }
        match last.is_empty() {
            true => skipped("it has no metrics"),
            false => Ok(format!("{count} points in {} series", last.len())),
        }
    }

    /// Whether it stopped when asked to.
    pub(super) fn stopped(&self, grace: Duration) -> CheckResult {
        if self.too_long.is_some() && self.stopping.is_some() {
            return failed(format!("it did not stop within {} s", grace.as_secs_f64()));
        }
        match (&self.answer, self.stopping) {
            (Some(Ok(_)), _) => skipped("it was done before it could be stopped"),
            (Some(Err(failure)), Some(time)) if failure.code == FailureCode::Cancelled => {
                Ok(format!("within {:.1} s", time.as_secs_f64()))
            }
            (Some(Err(failure)), _) => failed(format!(
                "it failed instead, without the code `cancelled`: {}",
                failure.message
            )),
            (None, _) => failed(self.died()),
        }
    }
}

pub(super) fn same(first: &ArtifactRecord, second: &ArtifactRecord) -> CheckResult {
    if first.hash == second.hash {
        return Ok("the same bytes".into());
    }
    let differs = first.files.iter().find(|file| !second.files.contains(file));
    match differs {
        Some(file) => failed(format!("{} has other bytes", file.path)),
        None => failed("there are more files"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(series: &str, steps: &[u64]) -> Points {
        Points {
            series: series.into(),
            steps: steps.to_vec(),
            values: vec![0.0; steps.len()],
            at: vec![0; steps.len()],
        }
    }

    fn progress(done: u64) -> Progress {
        Progress {
            done,
            total: 9,
            unit: "steps".into(),
        }
    }

    #[test]
    fn order_is_judged_within_a_series() {
        let seen = |points: Vec<Points>| Observations {
            points,
            ..Observations::default()
        };
        let good = seen(vec![
            points("a", &[3]),
            points("b", &[1, 2]),
            points("a", &[3, 4]),
        ]);
        assert!(good.steps_are_monotonic().is_ok());
        for bad in [
            vec![points("a", &[3, 2])],
            vec![points("a", &[3]), points("b", &[1]), points("a", &[2])],
        ] {
            assert!(matches!(
                seen(bad).steps_are_monotonic(),
                Err(CheckFailure::Failed(_))
            ));
        }
    }

    #[test]
    fn progress_neither_falls_nor_exceeds_its_total() {
        let seen = |done: &[u64]| Observations {
            progress: done.iter().map(|&done| progress(done)).collect(),
            ..Observations::default()
        };
        assert!(seen(&[1, 1, 9]).progress_is_monotonic().is_ok());
        assert!(matches!(
            seen(&[2, 1]).progress_is_monotonic(),
            Err(CheckFailure::Failed(_))
        ));
        assert!(matches!(
            seen(&[1, 10]).progress_is_monotonic(),
            Err(CheckFailure::Failed(_))
        ));
        assert!(matches!(
            seen(&[]).progress_is_monotonic(),
            Err(CheckFailure::Skipped(_))
        ));
    }
}
