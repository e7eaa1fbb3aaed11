//! Handles the events of an attempt's workers until each has finished or the time is up.

use std::collections::BTreeSet;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use retort_abi::{FailureCode, Part};
use tokio::sync::watch;
use tokio::time::Instant;

use super::admission;
use super::event_handler::{EventHandler, WorkerReport};
use super::shutdown::{ShutdownSequence, StopReason, sleep_until};
use super::supervisor::Supervisor;
use crate::executor::end::Hang;
use crate::executor::handle::WorkerHandle;
use crate::executor::spec::Stop;
use crate::frame::{FromWorker, ToWorker};
use crate::store::{StoreError, Usage};
use crate::worker::heartbeat::{self, Heartbeat};
use crate::worker::process::{WorkerEvent, WorkerExit};
use crate::worker::remote::ElementEvent;

/// Parts that are gone without a reason, and the nodes of all parts.
#[derive(Debug, Default)]
pub(super) struct LostWorkers {
    /// Which.
    pub(super) parts: Vec<usize>,
    /// Nodes of a cluster, each once.
    pub(super) nodes: BTreeSet<String>,
}

impl LostWorkers {
    fn add(&mut self, finished: &FinishedWorker) {
        self.nodes.extend(finished.report.node.clone());
        if let Some(part) = finished.part
            && finished.report.answer.is_none()
            && (finished.shutdown.sent.is_none() || finished.report.hang.is_some())
        {
            self.parts.push(part.index);
        }
    }
}

/// A worker that has finished.
pub(super) struct FinishedWorker {
    pub(super) part: Option<Part>,
    pub(super) report: WorkerReport,
    pub(super) shutdown: ShutdownSequence,
    pub(super) exit: WorkerExit,
}

impl FinishedWorker {
    /// Whether the part has succeeded.
    fn is_done(&self) -> bool {
        matches!(self.report.answer, Some(Ok(_))) && self.report.protocol_error.is_none()
    }

    /// Whether it ended only because another rank of its training did.
    fn was_left_alone(&self) -> bool {
        matches!(&self.report.answer, Some(Err(failure)) if failure.is_retryable())
    }

    /// Whether it had to be killed because it did not stop when asked to.
    fn was_unresponsive(&self) -> bool {
        self.report.answer.is_none() && self.shutdown.sent.is_some()
    }

    /// Whether it ended by itself.
    fn has_own_fault(&self) -> bool {
        match &self.report.answer {
            Some(Err(failure)) => failure.code != FailureCode::Cancelled && !failure.is_retryable(),
            Some(Ok(_)) => false,
            None => self.shutdown.sent.is_none(),
        }
    }

    /// Whether this is a better reason for the attempt's failure than another part: the first failure is the reason, unless
    /// this one caused it; among stopped parts it is the one that had to be killed.
    pub(super) fn is_graver_than(&self, other: &FinishedWorker) -> bool {
        if other.was_left_alone() && self.has_own_fault() {
            return true;
        }
        let signalled = |finished: &FinishedWorker| finished.shutdown.sent.is_some();
        self.shutdown.cause == other.shutdown.cause && signalled(self) && !signalled(other)
    }
}

impl Supervisor<'_> {
    /// Runs the workers of the parts and then, if all have succeeded, that of the whole. Returns the worker whose end is the
    /// attempt's, and the total usage.
    pub(super) async fn run_workers(
        &self,
        whole: WorkerHandle,
        parts: Vec<(Part, WorkerHandle)>,
    ) -> Result<(FinishedWorker, Usage, LostWorkers), StoreError> {
        let (fault, usage, lost) = self.run_parts(parts).await?;
        if let Some(fault) = fault {
            return Ok((fault, usage, lost));
        }
        let never = watch::channel(Stop::No).1;
        let finished = self.supervise(whole, None, never).await?;
        let usage = after(usage, finished.exit.usage);
        Ok((finished, usage, LostWorkers::default()))
    }

    /// Runs all parts concurrently. When one fails, the others are stopped, and it is returned.
    async fn run_parts(
        &self,
        parts: Vec<(Part, WorkerHandle)>,
    ) -> Result<(Option<FinishedWorker>, Usage, LostWorkers), StoreError> {
        let parts_stop = watch::Sender::new(Stop::No);
        let mut under_way: FuturesUnordered<_> = parts
            .into_iter()
            .map(|(part, worker)| self.supervise(worker, Some(part), parts_stop.subscribe()))
            .collect();
        let (mut fault, mut usage) = (None::<FinishedWorker>, Usage::default());
        let mut lost = LostWorkers::default();
        let mut unresponsive = Vec::new();
        while let Some(finished) = under_way.next().await {
            let finished = finished?;
            usage = beside(usage, finished.exit.usage);
            lost.add(&finished);
            if finished.is_done() {
                continue;
            }
            parts_stop.send_replace(Stop::AtCheckpoint);
            if fault
                .as_ref()
                .is_none_or(|fault| finished.is_graver_than(fault))
            {
                fault = Some(finished);
            } else if finished.was_unresponsive() {
                unresponsive.push(finished);
            }
        }
        // All others timed out waiting for the one that did not stop.
        if fault.as_ref().is_some_and(FinishedWorker::was_left_alone)
            && unresponsive.len() == 1
            && let Some(mut hanging) = unresponsive.pop()
        {
            hanging.report.hang = hanging.part.map(Hang::unresponsive);
            lost.add(&hanging);
            fault = Some(hanging);
        }
        Ok((fault, usage, lost))
    }

    /// Sends a worker its task, and handles its events until it ends. `parts_stop` stops it like a user's request.
    async fn supervise(
        &self,
        mut worker: WorkerHandle,
        part: Option<Part>,
        mut parts_stop: watch::Receiver<Stop>,
    ) -> Result<FinishedWorker, StoreError> {
        let sent = worker
            .send(&ToWorker::Start(Box::new(self.task(part))))
            .await;
        let mut handler = EventHandler {
            supervisor: self,
            part,
            report: WorkerReport::default(),
        };
        if let Err(error) = sent {
            let _ = handler.protocol_error(error.to_string());
            worker.signal(libc::SIGKILL);
        }
        let mut shutdown = ShutdownSequence::new(self.context.grace);
        let mut stop = self.stop.clone();
        // Otherwise it is monitored by whoever started it.
        let is_watched = self.spec.stage.together
            && part.is_some()
            && matches!(worker, WorkerHandle::Process(_));
        let (mut heartbeat, mut look) = (Heartbeat::default(), heartbeat::looks());
        // On a cluster only running time counts.
        let here = self.cpus.is_none();
        let (mut deadline, mut paused) = (self.deadline.filter(|_| here), self.paused);
        let exit = loop {
            let pause = self.context.pauses.total() - paused;
            (deadline, paused) = (deadline.map(|at| at + pause), paused + pause);
            shutdown.next = shutdown.next.map(|at| at + pause);
            // A timer that expires during a pause does not account for it.
            let in_time = || self.context.pauses.total() == paused;
            tokio::select! {
                event = self.next_event(&mut worker) => match event {
                    WorkerEvent::Exited(exit) => {
                        break WorkerExit {
                            usage: admission::usage(exit.usage),
                            ..exit
                        };
                    }
                    event => {
                        match &event {
                            WorkerEvent::Frame(FromWorker::Heartbeat) => heartbeat.beat(),
                            _ => heartbeat.heard(),
                        }
                        if let (WorkerEvent::Remote(ElementEvent::Began { .. }), Some(limit)) = (&event, self.spec.stage.timeout) {
                            deadline = Some(Instant::now() + limit);
                        }
                        if handler.take(event).await? .is_break() {
                            worker.signal(libc::SIGKILL);
                        }
                    }
                },
                Ok(()) = stop.changed() => {
                    let level = *stop.borrow_and_update();
                    shutdown.interrupt(level, &mut worker).await;
                }
                Ok(()) = parts_stop.changed() => {
                    let level = *parts_stop.borrow_and_update();
                    shutdown.interrupt(level, &mut worker).await;
                }
                _ = look.tick(), if is_watched && shutdown.cause.is_none() && handler.report.answer.is_none() => {
                    if !self.recorder.has_room() {
                        // Its messages are not read for the moment.
                        heartbeat.heard();
                    } else if heartbeat.look() && handler.report.hang.is_none() {
                        let seconds = heartbeat.silence().as_secs();
                        handler.report.hang = part.map(|part| Hang::silent(part, seconds));
                        worker.signal(libc::SIGKILL);
                    }
                },
                () = sleep_until(deadline), if shutdown.cause.is_none() => if in_time() {
                    shutdown.begin(StopReason::Timeout, &mut worker).await;
                },
                () = sleep_until(shutdown.next) => if in_time() {
                    shutdown.escalate(&worker);
                },
            }
        };
        Ok(FinishedWorker {
            part,
            report: handler.report,
            shutdown,
            exit,
        })
    }

    /// A worker's next event, once there is room to record it.
    async fn next_event(&self, worker: &mut WorkerHandle) -> WorkerEvent {
        self.recorder.room().await;
        worker.next().await
    }
}

/// The usage of two processes that ran concurrently.
fn beside(one: Usage, other: Usage) -> Usage {
    Usage {
        cpu_seconds: either(one.cpu_seconds, other.cpu_seconds, |a, b| a + b),
        max_rss: either(one.max_rss, other.max_rss, u64::saturating_add),
    }
}

/// The usage of two processes that ran one after the other.
fn after(one: Usage, other: Usage) -> Usage {
    Usage {
        cpu_seconds: either(one.cpu_seconds, other.cpu_seconds, |a, b| a + b),
        max_rss: one.max_rss.max(other.max_rss),
    }
}

/// Of what is known.
fn either<T>(one: Option<T>, other: Option<T>, both: fn(T, T) -> T) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(both(one, other)),
        (one, other) => one.or(other),
    }
}
