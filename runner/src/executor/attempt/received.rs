//! A worker's events: they go to the history and the listener, and finally determine how the attempt ended.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use retort_abi::{Failure, FailureCode, LogLevel, Part, StageResult};

use super::admission;
use super::shutdown::ShutdownSequence;
use super::supervisor::Supervisor;
use crate::executor::end::{End, StopOutcome};
use crate::executor::event::Event;
use crate::executor::spec::{AttemptSpec, title};
use crate::frame::{Answer, FromWorker};
use crate::store::{ArtifactRecord, LogLine, LogSource, StoreError, Time};
use crate::worker::death::{Death, ExitStatus};
use crate::worker::process::WorkerEvent;
use crate::worker::remote::{ClusterEnd, ElementEvent};
use crate::worker::shortened;

/// The events received from a worker.
pub(super) struct EventHandler<'a> {
    pub(super) supervisor: &'a Supervisor<'a>,
    pub(super) part: Option<Part>,
    pub(super) received: WorkerReport,
}

#[derive(Default)]
pub(super) struct WorkerReport {
    pub(super) answer: Option<Result<StageResult, Failure>>,
    pub(super) not_loaded: Option<(String, Option<String>)>,
    pub(super) protocol_error: Option<String>,
    pub(super) cluster: Option<ClusterEnd>,
    /// Where it worked, on a cluster.
    pub(super) node: Option<String>,
    pub(super) artifacts: BTreeMap<u64, ArtifactRecord>,
    pub(super) last_words: std::collections::VecDeque<String>,
}

impl EventHandler<'_> {
    pub(super) async fn take(&mut self, event: WorkerEvent) -> Result<ControlFlow<()>, StoreError> {
        let supervisor = self.supervisor;
        match event {
            WorkerEvent::Frame(FromWorker::Metrics(series)) => {
                let series = series.into_iter().filter(|points| !points.steps.is_empty());
                let mut series: Vec<_> = series.map(admission::points).collect();
                // Parts have the same series: each keeps its own. Of ranks, only one reports.
                if let Some(part) = self.part.filter(|_| !supervisor.spec.stage.together) {
                    for points in &mut series {
                        points.series.push_str(&format!("/part-{}", part.index + 1));
                    }
                }
                supervisor.context.judge(&supervisor.spec.stage.name, &series);
                supervisor.recorder.points(series);
            }
            WorkerEvent::Frame(FromWorker::Log(lines)) => {
                for line in lines.into_iter().map(admission::line) {
                    let (level, text) = (line.level, line.text);
                    self.say(LogLine {
                        at: Time(line.at),
                        level,
                        source: LogSource::Plugin,
                        text,
                    });
                }
            }
            WorkerEvent::Line(source, text) => {
                let line = LogLine {
                    at: Time::now(),
                    level: LogLevel::Debug as u32,
                    source,
                    text,
                };
                self.wrote(line);
            }
            WorkerEvent::Remote(news) => match news {
                ElementEvent::Began { node } => {
                    self.received.node = Some(shortened(&node));
                    supervisor.began();
                }
                ElementEvent::Line(line) => self.wrote(LogLine {
                    at: line.at.or_now(),
                    text: shortened(&line.text),
                    ..line
                }),
                ElementEvent::ReadTo {
                    job,
                    element,
                    number,
                } => supervisor.recorder.mark(job, element, number),
                ElementEvent::Ended(end) => self.received.cluster = Some(end),
            },
            WorkerEvent::Frame(FromWorker::Progress(progress)) => {
                (supervisor.context.listener)(Event::Progress {
                    stage: supervisor.spec.stage.name.clone(),
                    progress: supervisor
                        .part_progress
                        .together(self.part, admission::progress(progress)),
                });
            }
            WorkerEvent::Frame(FromWorker::Artifact { id, record }) => {
                return self.take_artifact(id, *record).await;
            }
            WorkerEvent::Frame(FromWorker::Answer(Answer::Result(result))) => {
                if let Err(what) = admission::facts("the stage's summary", &result.summary) {
                    return Ok(self.protocol_error(what));
                }
                self.received.answer = Some(Ok(result));
            }
            WorkerEvent::Frame(FromWorker::Failed(failure)) => {
                self.received.answer = Some(Err(admission::failure(failure)));
            }
            WorkerEvent::Frame(FromWorker::NotLoaded { message, hint }) => {
                let hint = hint.map(|hint| shortened(&hint));
                self.received.not_loaded = Some((shortened(&message), hint));
            }
            WorkerEvent::Frame(FromWorker::Late { calls }) => self.say(LogLine::of_runner(
                LogLevel::Warn,
                format!("the plugin called the host {calls} times after `run` had returned; nobody heard it"),
            )),
            WorkerEvent::Frame(FromWorker::Loaded) => {}
            WorkerEvent::Frame(FromWorker::Answer(_)) => {
                return Ok(self.protocol_error("a mismatched answer".into()));
            }
            WorkerEvent::Malformed(error) => return Ok(self.protocol_error(error.to_string())),
            WorkerEvent::Exited(_) => {}
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Records an artifact, once it is known to be one.
    async fn take_artifact(
        &mut self,
        id: u64,
        record: ArtifactRecord,
    ) -> Result<ControlFlow<()>, StoreError> {
        let supervisor = self.supervisor;
        let refusal = match self.part {
            Some(_) => Some("the worker of a part has made an artifact".to_owned()),
            None if self.received.artifacts.contains_key(&id) => {
                Some(format!("artifact {id} was committed twice"))
            }
            None if self.received.artifacts.len() >= admission::MOST_ARTIFACTS => {
                Some(format!("more than {} artifacts", admission::MOST_ARTIFACTS))
            }
            None => None,
        };
        if let Some(what) = refusal {
            return Ok(self.protocol_error(what));
        }
        let elsewhere = supervisor.cpus.is_some();
        match admission::artifact(&supervisor.context.layout, record, elsewhere).await {
            Ok(record) => {
                let store = &supervisor.context.store;
                store.record_artifact(supervisor.attempt, &record).await?;
                self.received.artifacts.insert(id, record);
                Ok(ControlFlow::Continue(()))
            }
            Err(what) => Ok(self.protocol_error(what)),
        }
    }

    /// Something that the worker, or what it started, wrote.
    fn wrote(&mut self, line: LogLine) {
        if line.source == LogSource::Stderr {
            if self.received.last_words.len() == 8 {
                self.received.last_words.pop_front();
            }
            self.received.last_words.push_back(line.text.clone());
        }
        self.say(line);
    }

    fn say(&self, mut line: LogLine) {
        line.text.insert_str(0, &title(self.part));
        (self.supervisor.context.listener)(Event::Line {
            stage: self.supervisor.spec.stage.name.clone(),
            line: line.clone(),
        });
        self.supervisor.recorder.line(line);
    }

    pub(super) fn protocol_error(&mut self, what: String) -> ControlFlow<()> {
        self.received.protocol_error = Some(format!("the worker sent an invalid message: {what}"));
        ControlFlow::Break(())
    }
}

impl WorkerReport {
    /// How the attempt ended, judged from all its events.
    pub(super) fn judge(
        &self,
        exit: ExitStatus,
        shutdown: ShutdownSequence,
        spec: &AttemptSpec,
        out_of_memory: bool,
    ) -> End {
        if let Some((message, hint)) = &self.not_loaded {
            return End::NotLoaded {
                message: message.clone(),
                hint: hint.clone(),
            };
        }
        if let Some(message) = &self.protocol_error {
            return End::Protocol {
                message: message.clone(),
            };
        }
        // A complete result counts, even if it came while the stage was being stopped, or before a crash at exit.
        if let Some(Ok(result)) = &self.answer {
            return self.judge_result(result, &spec.stage.output_kind);
        }
        if let Some(end) = &self.cluster {
            return End::Cluster(end.clone());
        }
        match (&self.answer, exit, shutdown.cause) {
            (Some(Err(failure)), _, Some(cause)) if failure.code == FailureCode::Cancelled => {
                cause.end(StopOutcome::AtCheckpoint, spec.stage.timeout)
            }
            (Some(Err(failure)), _, _) if failure.code == FailureCode::Panic => {
                End::Panicked(failure.clone())
            }
            (Some(Err(failure)), _, _) => End::Failed(failure.clone()),
            (_, ExitStatus::Signal(signal), Some(cause)) if shutdown.sent == Some(signal) => {
                cause.end(StopOutcome::Signalled(signal), spec.stage.timeout)
            }
            // With a signal of ours on its way, a plugin's own handler may have turned it into an exit.
            (_, ExitStatus::Code(_), Some(cause)) if shutdown.sent.is_some() => {
                cause.end(StopOutcome::Otherwise, spec.stage.timeout)
            }
            _ => {
                let last_words = self.last_words.iter().map(String::as_str);
                End::Died(Death::new(exit, last_words, out_of_memory))
            }
        }
    }

    fn judge_result(&self, result: &StageResult, kind: &str) -> End {
        let message = match self.artifacts.get(&result.output) {
            Some(output) if output.kind == kind => {
                return End::Succeeded {
                    output: Box::new(output.clone()),
                    summary: result.summary.clone(),
                };
            }
            Some(output) => format!(
                "the stage's output is a `{}`, but the plugin's description promises a `{kind}`",
                output.kind
            ),
            None => format!(
                "the stage's output is artifact {}, which was not committed",
                result.output
            ),
        };
        End::Protocol { message }
    }
}
