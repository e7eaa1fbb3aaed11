//! Why a start ended without a report although Slurm keeps its element: Slurm only says that a restarted job is waiting.
//!
//! Sources, in order: Slurm's accounts, if any; the state of the node; the records of other ranks and of the start itself.

use std::collections::BTreeSet;

use retort_abi::LogLevel;

use super::DispatchLoop;
use super::slot::{LostStart, Phase};
use crate::cluster::slurm::{Layout, PastStart};
use crate::store::{ElementUpdate, JobKey};

/// The reason for a start that ended without a report, if nothing else is known.
const LOST: &str = "node failed, or preempted";

impl DispatchLoop {
    /// Finds out why starts ended that have not reported it, and records the reasons.
    pub(super) async fn explain(&mut self) {
        let mut lost = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            lost.extend(slot.lost.drain(..).map(|start| (index, start)));
        }
        if lost.is_empty() {
            return;
        }
        let ids: BTreeSet<u64> = lost
            .iter()
            .filter_map(|(_, start)| Some(self.job(start.job.0)?.id))
            .collect();
        let ids: Vec<u64> = ids.into_iter().collect();
        let past = self.to.slurm.past_starts(&ids).await.unwrap_or_default();
        let nodes: BTreeSet<&str> = lost
            .iter()
            .flat_map(|(_, start)| self.nodes(start, &lost))
            .collect();
        let down = self.to.slurm.failed_nodes(&nodes).await.unwrap_or_default();
        let reasons: Vec<&str> = lost
            .iter()
            .map(|(_, start)| {
                let failed = self.nodes(start, &lost).any(|node| down.contains(node));
                self.in_accounts(start, &past)
                    .unwrap_or_else(|| reason(failed, self.another_asked(start), start.terminated))
            })
            .collect();
        for ((index, lost), reason) in lost.iter().zip(reasons) {
            let (key, element) = lost.job;
            let ended = ElementUpdate::Ended {
                start: lost.start,
                reason: reason.to_owned(),
                at: lost.at,
            };
            let slot = &mut self.slots[*index];
            // The element's state since then.
            let now = match slot.phase {
                Phase::Running => ElementUpdate::Running,
                Phase::Over => ElementUpdate::Over,
                Phase::New | Phase::Queued => ElementUpdate::Queued(slot.why.clone()),
            };
            self.news
                .extend([ended, now].map(|update| (key, element, update)));
            if lost.is_news {
                slot.note(LogLevel::Warn, format!("{reason}; Slurm starts it again"))
                    .await;
            }
        }
    }

    fn is_of_ranks(&self, key: JobKey) -> bool {
        self.job(key)
            .is_some_and(|job| matches!(job.layout, Layout::Ranks(_)))
    }

    /// The nodes whose failure would have ended a start: its own, or those of all ranks.
    fn nodes<'a>(
        &'a self,
        lost: &'a LostStart,
        all: &'a [(usize, LostStart)],
    ) -> impl Iterator<Item = &'a str> {
        let (key, _) = lost.job;
        let ranks = self.is_of_ranks(key);
        let others = all
            .iter()
            .map(|(_, other)| (other.job, other.node.as_str()));
        let present = self
            .slots
            .iter()
            .filter_map(|slot| Some((slot.job?, slot.node.as_str())));
        let others = others.chain(present);
        let others = others.filter(move |((job, _), _)| ranks && *job == key);
        std::iter::once(lost.node.as_str()).chain(others.map(|(_, node)| node))
    }

    /// The reason according to Slurm's accounts.
    fn in_accounts(&self, lost: &LostStart, past: &[PastStart]) -> Option<&'static str> {
        let (key, element) = lost.job;
        let job = self.job(key)?;
        let place = (job.id, job.layout.element(element));
        // One that ended before this start began is an earlier start. Of the others, the first to end is this one.
        let later = |start: &&PastStart| start.place == place && start.ended > lost.began / 1000;
        past.iter()
            .filter(later)
            .min_by_key(|start| start.ended)?
            .state
            .fault()
    }

    /// Whether another rank of the job has asked for a restart since the start began, which ended it.
    fn another_asked(&self, lost: &LostStart) -> bool {
        let (key, element) = lost.job;
        let others = self.slots.iter().filter(|slot| {
            slot.job
                .is_some_and(|(job, other)| job == key && other != element)
        });
        self.is_of_ranks(key)
            && others
                .filter_map(|slot| slot.asked)
                .any(|at| at >= lost.began)
    }
}

/// The reason without Slurm's accounts.
fn reason(node_failed: bool, another_asked: bool, terminated: bool) -> &'static str {
    match (node_failed, another_asked, terminated) {
        (true, _, _) => "node failed",
        (_, true, _) => "ended with another worker",
        (_, _, true) => "preempted",
        (false, false, false) => LOST,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_an_end_is_its_reason() {
        assert_eq!(reason(true, true, true), "node failed");
        assert_eq!(reason(false, true, true), "ended with another worker");
        assert_eq!(reason(false, false, true), "preempted");
        assert_eq!(reason(false, false, false), "node failed, or preempted");
    }
}
