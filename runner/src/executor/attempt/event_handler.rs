//! Handles a worker's events: passes them to the history and the listener, and finally determines how the attempt ended.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use retort_abi::{Failure, FailureCode, LogLevel, Part, StageResult};

use super::admission;
use super::shutdown::ShutdownSequence;
use super::supervisor::Supervisor;
use crate::executor::end::{End, Hang, StopOutcome};
use crate::executor::event::Event;
use crate::executor::spec::{AttemptSpec, title};
use crate::frame::{Answer, FromWorker, Points};
use crate::store::{ArtifactRecord, LogLine, LogSource, ReadMark, StoreError, Time};
use crate::worker::death::{ExitStatus, UnexpectedExit};
use crate::worker::process::WorkerEvent;
use crate::worker::remote::{ClusterEnd, ElementEvent};
use crate::worker::shortened;

/// The events received from a worker.
pub(super) struct EventHandler<'a> {
    pub(super) supervisor: &'a Supervisor<'a>,
    pub(super) part: Option<Part>,
    pub(super) report: WorkerReport,
}

#[derive(Default)]
pub(super) struct WorkerReport {
    pub(super) answer: Option<Result<StageResult, Failure>>,
    pub(super) not_loaded: Option<(String, Option<String>)>,
    pub(super) protocol_error: Option<String>,
    pub(super) cluster: Option<ClusterEnd>,
    /// How it was known to hang.
    pub(super) hang: Option<Hang>,
    /// Its node, on a cluster.
    pub(super) node: Option<String>,
    pub(super) artifacts: BTreeMap<u64, ArtifactRecord>,
    pub(super) last_words: std::collections::VecDeque<String>,
}

impl EventHandler<'_> {
    pub(super) async fn take(&mut self, event: WorkerEvent) -> Result<ControlFlow<()>, StoreError> {
        let supervisor = self.supervisor;
        let (event, mark) = match event {
            WorkerEvent::Remote(ElementEvent::Frame(frame, mark)) => {
                (WorkerEvent::Frame(frame), Some(mark))
            }
            event => (event, None),
        };
        match event {
            WorkerEvent::Frame(FromWorker::Metrics(series)) => self.take_points(series, mark),
            WorkerEvent::Frame(FromWorker::Log(lines)) => {
                let lines = lines.into_iter().map(admission::line).map(|line| LogLine {
                    at: Time(line.at),
                    level: line.level,
                    source: LogSource::Plugin,
                    text: line.text,
                });
                self.say_all(lines.collect(), mark);
            }
            WorkerEvent::Line(source, text) => {
                let line = LogLine {
                    at: Time::now(),
                    level: LogLevel::Debug as u32,
                    source,
                    text,
                };
                self.wrote(line, None);
            }
            WorkerEvent::Remote(news) => match news {
                ElementEvent::Began { node } => {
                    self.report.node = Some(shortened(&node));
                    supervisor.began();
                }
                ElementEvent::Line(line, mark) => {
                    let line = LogLine {
                        at: line.at.or_now(),
                        text: shortened(&line.text),
                        ..line
                    };
                    self.wrote(line, mark);
                }
                ElementEvent::ReadTo(mark) => supervisor.recorder.record([], [], Some(mark)),
                ElementEvent::Frame(..) => {}
                ElementEvent::Ended(end) => self.report.cluster = Some(end),
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
                self.report.answer = Some(Ok(result));
            }
            WorkerEvent::Frame(FromWorker::Failed(failure)) => {
                self.report.answer = Some(Err(admission::failure(failure)));
            }
            WorkerEvent::Frame(FromWorker::NotLoaded { message, hint }) => {
                let hint = hint.map(|hint| shortened(&hint));
                self.report.not_loaded = Some((shortened(&message), hint));
            }
            WorkerEvent::Frame(FromWorker::Late { calls }) => self.say(LogLine::of_runner(
                LogLevel::Warn,
                format!("the plugin called the host {calls} times after `run` had returned, which had no effect; a plugin's threads have to end before `run` returns"),
            )),
            WorkerEvent::Frame(FromWorker::Silent { seconds }) => {
                self.report.hang = self.part.map(|part| Hang::silent(part, seconds));
            }
            WorkerEvent::Frame(FromWorker::Loaded | FromWorker::Heartbeat) => {}
            WorkerEvent::Frame(FromWorker::Answer(_)) => {
                return Ok(self.protocol_error("it answered a call that it was not given".into()));
            }
            WorkerEvent::Malformed(error) => return Ok(self.protocol_error(error.to_string())),
            WorkerEvent::Exited(_) => {}
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Records an artifact after checking it.
    async fn take_artifact(
        &mut self,
        id: u64,
        record: ArtifactRecord,
    ) -> Result<ControlFlow<()>, StoreError> {
        let supervisor = self.supervisor;
        let refusal = match self.part {
            Some(_) => Some("the worker of a part has made an artifact, which only the worker of the whole stage may".to_owned()),
            None if self.report.artifacts.contains_key(&id) => {
                Some(format!("artifact {id} was committed twice"))
            }
            None if self.report.artifacts.len() >= admission::MOST_ARTIFACTS => {
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
                self.report.artifacts.insert(id, record);
                Ok(ControlFlow::Continue(()))
            }
            Err(what) => Ok(self.protocol_error(what)),
        }
    }

    fn take_points(&self, series: Vec<Points>, mark: Option<ReadMark>) {
        let supervisor = self.supervisor;
        let series = series.into_iter().filter(|points| !points.steps.is_empty());
        let mut series: Vec<_> = series.map(admission::points).collect();
        // Parts have the same series names, so each gets its own series. Of ranks only one reports.
        if let Some(part) = self.part.filter(|_| !supervisor.spec.stage.together) {
            for points in &mut series {
                points.series.push_str(&format!("/part-{}", part.index + 1));
            }
        }
        supervisor
            .context
            .judge(&supervisor.spec.stage.name, &series);
        supervisor.recorder.record(series, [], mark);
    }

    /// Output of the worker, or of its children.
    fn wrote(&mut self, line: LogLine, mark: Option<ReadMark>) {
        if line.source == LogSource::Stderr {
            if self.report.last_words.len() == 8 {
                self.report.last_words.pop_front();
            }
            self.report.last_words.push_back(line.text.clone());
        }
        self.say_all(vec![line], mark);
    }

    fn say(&self, line: LogLine) {
        self.say_all(vec![line], None);
    }

    /// Reports lines to the listener, and records them with a mark.
    fn say_all(&self, mut lines: Vec<LogLine>, mark: Option<ReadMark>) {
        for line in &mut lines {
            line.text.insert_str(0, &title(self.part));
            (self.supervisor.context.listener)(Event::Line {
                stage: self.supervisor.spec.stage.name.clone(),
                line: line.clone(),
            });
        }
        self.supervisor.recorder.record([], lines, mark);
    }

    pub(super) fn protocol_error(&mut self, what: String) -> ControlFlow<()> {
        self.report.protocol_error = Some(format!("the worker sent an invalid message: {what}"));
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
        // A complete result counts, even if it arrived while the stage was being stopped, or before a crash at exit.
        if let Some(Ok(result)) = &self.answer {
            return self.judge_result(result, &spec.stage.output_kind);
        }
        if let Some(end) = &self.cluster {
            return End::Cluster(end.clone());
        }
        if let (Some(hang), None) = (&self.hang, &self.answer) {
            return End::Hung(hang.clone());
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
            // If we sent a signal, the plugin's own handler may have turned it into an exit.
            (_, ExitStatus::Code(_), Some(cause)) if shutdown.sent.is_some() => {
                cause.end(StopOutcome::Otherwise, spec.stage.timeout)
            }
            _ => {
                let last_words = self.last_words.iter().map(String::as_str);
                End::Died(UnexpectedExit::new(exit, last_words, out_of_memory))
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
