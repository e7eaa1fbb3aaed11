//! Stopping: the executor's requests to elements, and cancellations of jobs that are of no use. What Slurm does not take is
//! tried again.

use std::time::Duration;

use tokio::time::Instant;

use super::slot::{Phase, StopRequest};
use super::{DispatchLoop, SETTLE};
use crate::cluster::slurm::SlurmError;
use crate::cluster::spool;

impl DispatchLoop {
    /// Carries out stop requests.
    pub(super) async fn stop(&mut self) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.phase == Phase::New && slot.level > StopRequest::GoOn {
                slot.cancelled().await;
            }
        }
        if Instant::now() < self.cancel_at {
            return;
        }
        let (mut done, mut silent) = (Vec::new(), None);
        let slots = &self.slots;
        for job in self.jobs.iter_mut().filter(|job| !job.results_only) {
            let wish_of = |index: &Option<usize>| match index.map(|index| &slots[index]) {
                Some(slot) if slot.phase != Phase::Over => Some(slot.level),
                _ => None,
            };
            let wishes = job.slots.iter().map(wish_of).collect::<Vec<_>>();
            if wishes
                .iter()
                .flatten()
                .all(|level| *level == StopRequest::GoOn)
            {
                continue;
            }
            let wanted = |level: StopRequest| -> Vec<Option<usize>> {
                let some = wishes.iter().enumerate();
                let some = some.filter(|(_, found)| **found == Some(level));
                let mut names: Vec<_> = some
                    .map(|(element, _)| job.layout.element(element))
                    .collect();
                names.dedup(); // ranks share one job
                names
            };
            if !job.stopping {
                if !spool::is_to_stop(&job.dir) {
                    let _ = spool::ask_to_stop(&job.dir, true);
                }
                let waiting = wanted(StopRequest::Checkpoint);
                let cancelled = self.to.slurm.cancel(job.id, &waiting, true).await;
                job.stopping = cancelled.is_ok();
                silent = cancelled.err().or(silent);
            }
            let now = wanted(StopRequest::Now);
            if !now.is_empty() {
                match self.to.slurm.cancel(job.id, &now, false).await {
                    Ok(()) => done.push(job.key),
                    Err(error) => {
                        silent = Some(error);
                        let mut wishes = wishes.iter().flatten();
                        if wishes.all(|level| *level >= StopRequest::Now) {
                            let _ = spool::ask_to_end(&job.dir);
                        }
                    }
                }
            }
            self.ask_at = self.ask_at.min(Instant::now() + Duration::from_secs(1));
        }
        for slot in &mut self.slots {
            // Once is enough; Slurm reports the outcome.
            let is_done = slot.job.is_some_and(|(key, _)| done.contains(&key));
            if slot.level == StopRequest::Now && is_done {
                slot.level = StopRequest::Ending;
            }
        }
        if let Some(error) = silent {
            self.is_not_cancelled(&error);
        }
    }

    /// Slurm has not taken a cancellation: it is tried again.
    pub(super) fn is_not_cancelled(&mut self, error: &SlurmError) {
        self.is_silent(error);
        self.cancel_at = Instant::now() + SETTLE;
    }

    /// Cancels the jobs of other runners that are of no use.
    pub(super) async fn cancel_left(&mut self) {
        while let Some(&job) = self.to_cancel.last() {
            if Instant::now() < self.cancel_at {
                return;
            }
            match self.to.slurm.cancel(job, &[None], false).await {
                Ok(()) => {
                    self.to_cancel.pop();
                }
                Err(error) => self.is_not_cancelled(&error),
            }
        }
    }
}
