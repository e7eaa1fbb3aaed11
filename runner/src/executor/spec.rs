//! The specification of an attempt, and the context shared by a run's attempts.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use retort_abi::{Input, Part};
use tokio::sync::{Notify, watch};

use crate::artifact::{Layout, Staging};
use crate::cluster::torchrun::TrainingBoard;
use crate::executor::event::Listener;
use crate::executor::options::{Cluster, Rung};
use crate::executor::pause::PauseClock;
use crate::executor::source::SourceFile;
use crate::frame::Points;
use crate::plan::{Digest, PlannedStage};
use crate::store::{StageId, Store};

/// The context shared by a run's attempts.
pub struct RunContext {
    /// The store.
    pub store: Arc<Store>,
    /// Where things lie in it.
    pub layout: Layout,
    /// The run's staging directory.
    pub staging: Staging,
    /// Receives events.
    pub listener: Listener,
    /// How long a stage may take to reach its next checkpoint when asked to stop.
    pub grace: Duration,
    /// How long the run has been stopped.
    pub pauses: Arc<PauseClock>,
    /// The rung at which the run stops.
    pub rung: Option<Rung>,
    /// Its value at the rung.
    pub judged: Mutex<Option<f64>>,
    /// Notified on arrival.
    pub reached: Notify,
    /// Whether the run is being left to the cluster.
    pub leaving: watch::Sender<bool>,
    /// Elements of stages that have no job yet.
    pub unsubmitted: Arc<AtomicUsize>,
    /// The cluster whose jobs do the work; None for local processes.
    pub cluster: Option<Cluster>,
    /// The trainings for ranks that `torchrun` started.
    pub training_board: Option<Arc<TrainingBoard>>,
}

impl RunContext {
    /// The value by which the run is judged; None before its rung.
    pub fn judged(&self) -> Option<f64> {
        *self.judged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the run is left to the cluster. Cancel-safe.
    pub(in crate::executor) async fn left(&self) {
        let mut leaving = self.leaving.subscribe();
        if leaving.wait_for(|leaving| *leaving).await.is_err() {
            std::future::pending().await
        }
    }

    /// Checks a stage's new points for the rung.
    pub(in crate::executor) fn judge(&self, stage: &str, batches: &[Points]) {
        let Some(rung) = &self.rung else { return };
        let there = batches
            .iter()
            .filter(|points| rung.is_of(stage, &points.series))
            .flat_map(|points| points.steps.iter().zip(&points.values))
            .find(|(step, _)| **step >= rung.step);
        if let Some((_, &value)) = there {
            let mut judged = self.judged.lock().unwrap_or_else(PoisonError::into_inner);
            if judged.is_none() {
                *judged = Some(value);
                self.reached.notify_one();
            }
        }
    }
}

/// The specification of an attempt.
pub struct AttemptSpec {
    /// The stage, planned.
    pub stage: PlannedStage,
    /// The stage, recorded.
    pub id: StageId,
    /// Its digest.
    pub digest: Digest,
    /// Directory of the recipe.
    pub base_dir: PathBuf,
    /// Threads it may use; its parts share them.
    pub threads: usize,
    /// Remaining restarts with all workers after some are lost.
    pub retries: usize,
    /// Its inputs, by the name of the stage that made them.
    pub inputs: BTreeMap<String, Input>,
    /// Files and folders named by its options.
    pub sources: Vec<SourceFile>,
    /// Shared by all attempts.
    pub work_dir: PathBuf,
}

impl AttemptSpec {
    /// The parts of its work; empty if one process does all of it.
    pub(in crate::executor) fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        let of = self.stage.workers.len();
        (0..of).map(move |index| Part { index, of })
    }

    /// Continues with this many workers, dropping the lost ones, because their devices may be at fault.
    pub(in crate::executor) fn do_without(&mut self, lost: &[usize], left: usize) {
        let all = std::mem::take(&mut self.stage.workers)
            .into_iter()
            .enumerate();
        let (gone, there): (Vec<_>, Vec<_>) = all.partition(|(index, _)| lost.contains(index));
        let devices = there.into_iter().chain(gone).map(|(_, device)| device);
        // One alone needs no part.
        if left > 1 {
            self.stage.workers = devices.take(left).collect();
        }
        self.stage.together = left > 1;
    }

    pub(in crate::executor) fn threads_of(&self, part: Option<Part>) -> usize {
        (self.threads / part.map_or(1, |part| part.of)).max(1)
    }

    pub(in crate::executor) fn device_of(&self, part: Option<Part>) -> &str {
        part.map_or(&self.stage.device, |part| &self.stage.workers[part.index])
    }

    /// The distinct devices in use.
    pub(in crate::executor) fn devices(&self) -> String {
        let mut names = vec![self.stage.device.as_str()];
        for name in &self.stage.workers {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names.join(", ")
    }
}

/// A stop request. `ToWorker` carries it to a worker, whose plugin queries it through the ABI's `cancelled`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Go on.
    No,
    /// Stop at the next checkpoint.
    AtCheckpoint,
    /// Stop at once.
    Now,
}

/// The prefix of lines about a part; lines about the whole stage have none.
pub fn title(part: Option<Part>) -> String {
    part.map_or_else(String::new, |part| {
        format!("part {} of {}: ", part.index + 1, part.of)
    })
}
