//! Stopping a worker: a request, then SIGTERM, then SIGKILL.

use std::time::Duration;

use tokio::time::Instant;

use crate::executor::end::{End, StopOutcome};
use crate::executor::handle::WorkerHandle;
use crate::executor::spec::Stop;
use crate::frame::ToWorker;

/// From SIGTERM to SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why a worker is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopReason {
    /// The user asked for it, or another part failed.
    Interrupt,
    /// A timeout.
    Timeout,
}

impl StopReason {
    pub(super) fn end(self, outcome: StopOutcome, limit: Option<Duration>) -> End {
        match self {
            Self::Interrupt => End::Interrupted { outcome },
            Self::Timeout => End::TimedOut {
                limit: limit.unwrap_or_default(),
                outcome,
            },
        }
    }
}

/// The steps of stopping a worker: a request, then SIGTERM, then SIGKILL.
#[derive(Debug, Clone, Copy)]
pub(super) struct ShutdownSequence {
    pub(super) grace: Duration,
    pub(super) cause: Option<StopReason>,
    /// The last signal sent.
    pub(super) sent: Option<i32>,
    /// When to take the next step.
    pub(super) next: Option<Instant>,
}

impl ShutdownSequence {
    pub(super) fn new(grace: Duration) -> Self {
        Self {
            grace,
            cause: None,
            sent: None,
            next: None,
        }
    }

    /// The first step: asks the plugin to stop at its next checkpoint.
    pub(super) async fn begin(&mut self, cause: StopReason, worker: &mut WorkerHandle) {
        if self.cause.is_none() {
            self.cause = Some(cause);
            self.next = Some(Instant::now() + self.grace);
            // A message without paths can always be encoded.
            let _ = worker.send(&ToWorker::StopAtCheckpoint).await;
        }
    }

    /// What the user wants.
    pub(super) async fn interrupt(&mut self, level: Stop, worker: &mut WorkerHandle) {
        match level {
            Stop::No => {}
            Stop::AtCheckpoint => self.begin(StopReason::Interrupt, worker).await,
            Stop::Now => {
                self.cause.get_or_insert(StopReason::Interrupt);
                self.signal(libc::SIGKILL, worker);
            }
        }
    }

    /// The next step.
    pub(super) fn escalate(&mut self, worker: &WorkerHandle) {
        match self.sent {
            None => self.signal(libc::SIGTERM, worker),
            Some(_) => self.signal(libc::SIGKILL, worker),
        }
    }

    fn signal(&mut self, signal: i32, worker: &WorkerHandle) {
        worker.signal(signal);
        self.sent = Some(signal);
        self.next = (signal == libc::SIGTERM).then(|| Instant::now() + LAST_WORDS);
    }
}

/// Sleeps until an instant; forever without one.
pub(super) async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
