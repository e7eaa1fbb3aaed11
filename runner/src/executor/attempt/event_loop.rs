//! Handles the events of an attempt's workers until each has finished or the time is up.

use std::collections::BTreeSet;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use retort_abi::{FailureCode, Part};
use tokio::sync::watch;
use tokio::time::Instant;

use super::admission;
use super::received::{EventHandler, WorkerReport};
use super::shutdown::{ShutdownSequence, StopReason, sleep_until};
use super::supervisor::Supervisor;
use crate::executor::handle::WorkerHandle;
use crate::executor::spec::Stop;
use crate::frame::ToWorker;
use crate::store::{StoreError, Usage};
use crate::worker::process::{Exit, WorkerEvent};
use crate::worker::remote::ElementEvent;

/// Parts that are gone without having said why, and where all worked.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Which.
    pub(super) parts: Vec<usize>,
    /// Nodes of a cluster, each once.
    pub(super) nodes: BTreeSet<String>,
}

impl Losses {
    fn add(&mut self, finished: &FinishedWorker) {
        self.nodes.extend(finished.received.node.clone());
        if let Some(part) = finished.part
            && finished.received.answer.is_none()
            && finished.shutdown.sent.is_none()
        {
            self.parts.push(part.index);
        }
    }
}

/// A worker that has finished.
pub(super) struct FinishedWorker {
    pub(super) part: Option<Part>,
    pub(super) received: WorkerReport,
    pub(super) shutdown: ShutdownSequence,
    pub(super) exit: Exit,
}

impl FinishedWorker {
    /// Whether the part has been done.
    fn is_done(&self) -> bool {
        matches!(self.received.answer, Some(Ok(_))) && self.received.protocol_error.is_none()
    }

    /// Whether it ended only because another rank of its training did.
    fn was_left_alone(&self) -> bool {
        matches!(&self.received.answer, Some(Err(failure)) if failure.retryable)
    }

    /// Whether it ended by itself.
    fn has_own_fault(&self) -> bool {
        match &self.received.answer {
            Some(Err(failure)) => failure.code != FailureCode::Cancelled && !failure.retryable,
            Some(Ok(_)) => false,
            None => self.shutdown.sent.is_none(),
        }
    }

    /// Whether this explains better than another part why the attempt failed: the first failure is the reason, but not
    /// if this one caused it, and among stopped parts the one that had to be killed.
    pub(super) fn is_graver_than(&self, other: &FinishedWorker) -> bool {
        if other.was_left_alone() && self.has_own_fault() {
            return true;
        }
        let signalled = |finished: &FinishedWorker| finished.shutdown.sent.is_some();
        self.shutdown.cause == other.shutdown.cause && signalled(self) && !signalled(other)
    }
}

impl Supervisor<'_> {
    /// Runs the workers of the parts and then, where all have ended well, that of the whole. Returns the one whose end is
    /// the attempt's, and what all of them took.
    pub(super) async fn run_workers(
        &self,
        whole: WorkerHandle,
        parts: Vec<(Part, WorkerHandle)>,
    ) -> Result<(FinishedWorker, Usage, Losses), StoreError> {
        let (fault, usage, losses) = self.run_parts(parts).await?;
        if let Some(fault) = fault {
            return Ok((fault, usage, losses));
        }
        let no_halt = watch::channel(Stop::No).1;
        let finished = self.supervise(whole, None, no_halt).await?;
        let usage = after(usage, finished.exit.usage);
        Ok((finished, usage, Losses::default()))
    }

    /// Runs the parts, all at the same time. When one fails, the others are stopped, and it is returned.
    async fn run_parts(
        &self,
        parts: Vec<(Part, WorkerHandle)>,
    ) -> Result<(Option<FinishedWorker>, Usage, Losses), StoreError> {
        let halt = watch::Sender::new(Stop::No);
        let mut under_way: FuturesUnordered<_> = parts
            .into_iter()
            .map(|(part, worker)| self.supervise(worker, Some(part), halt.subscribe()))
            .collect();
        let (mut fault, mut usage) = (None::<FinishedWorker>, Usage::default());
        let mut losses = Losses::default();
        while let Some(finished) = under_way.next().await {
            let finished = finished?;
            usage = beside(usage, finished.exit.usage);
            losses.add(&finished);
            if finished.is_done() {
                continue;
            }
            halt.send_replace(Stop::AtCheckpoint);
            if fault
                .as_ref()
                .is_none_or(|fault| finished.is_graver_than(fault))
            {
                fault = Some(finished);
            }
        }
        Ok((fault, usage, losses))
    }

    /// Sends a worker its task, and handles its events to the end. `halt` stops it as the user does.
    async fn supervise(
        &self,
        mut worker: WorkerHandle,
        part: Option<Part>,
        mut halt: watch::Receiver<Stop>,
    ) -> Result<FinishedWorker, StoreError> {
        let sent = worker
            .send(&ToWorker::Start(Box::new(self.task(part))))
            .await;
        let mut handler = EventHandler {
            supervisor: self,
            part,
            received: WorkerReport::default(),
        };
        if let Err(error) = sent {
            let _ = handler.protocol_error(error.to_string());
            worker.signal(libc::SIGKILL);
        }
        let mut shutdown = ShutdownSequence::new(self.context.grace);
        let mut stop = self.stop.clone();
        // On a cluster only running time counts.
        let here = self.cpus.is_none();
        let (mut deadline, mut paused) = (self.deadline.filter(|_| here), self.paused);
        let exit = loop {
            let pause = self.context.pauses.total() - paused;
            (deadline, paused) = (deadline.map(|at| at + pause), paused + pause);
            shutdown.next = shutdown.next.map(|at| at + pause);
            // A timer that goes off during a pause does not know of it.
            let in_time = || self.context.pauses.total() == paused;
            tokio::select! {
                event = self.next_event(&mut worker) => match event {
                    WorkerEvent::Exited(exit) => {
                        break Exit {
                            usage: admission::usage(exit.usage),
                            ..exit
                        };
                    }
                    event => {
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
                Ok(()) = halt.changed() => {
                    let level = *halt.borrow_and_update();
                    shutdown.interrupt(level, &mut worker).await;
                }
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
            received: handler.received,
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
