//! A running attempt: its workers, and the task of each.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use retort_abi::{Part, StageJob};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::executor::event::Event;
use crate::executor::recorder::Recorder;
use crate::executor::spec::{AttemptSpec, RunContext, Stop};
use crate::frame::{Call, Progress, Task};
use crate::store::AttemptId;

/// An attempt under way.
pub(super) struct Supervisor<'a> {
    pub(super) context: &'a RunContext,
    pub(super) spec: &'a AttemptSpec,
    pub(super) attempt: AttemptId,
    pub(super) recorder: &'a Recorder,
    pub(super) stop: watch::Receiver<Stop>,
    pub(super) deadline: Option<Instant>,
    /// How long the run had been stopped when the attempt began.
    pub(super) paused: Duration,
    pub(super) part_progress: PartProgress,
    /// Threads of each worker on a cluster; none on this machine.
    pub(super) cpus: Option<usize>,
    /// Process id of the worker of the whole if it is local, else 0.
    pub(super) pid: u32,
    /// Whether the start of work has been reported.
    pub(super) began: AtomicBool,
}

impl Supervisor<'_> {
    /// Reports, once, that work has started.
    pub(super) fn began(&self) {
        if self.began.swap(true, Ordering::Relaxed) {
            return;
        }
        let spec = self.spec;
        (self.context.listener)(Event::Began {
            stage: spec.stage.name.clone(),
            attempt: self.attempt,
            pid: self.pid,
            device: match self.cpus {
                Some(_) => spec.stage.device.clone(),
                None => spec.devices(),
            },
            workers: spec.parts().count().max(1),
            threads: self
                .cpus
                .unwrap_or_else(|| spec.threads_of(spec.parts().next())),
        });
    }

    /// A worker's task.
    pub(super) fn task(&self, part: Option<Part>) -> Task {
        let (stage, spec) = (&self.spec.stage, self.spec);
        let job = StageJob {
            stage: stage.name.clone(),
            kind: stage.kind.clone(),
            options: stage.options.clone(),
            seed: stage.seed,
            // A job numbers its own devices from 0.
            device: match self.cpus {
                Some(_) => stage.device.clone(),
                None => spec.device_of(part).to_owned(),
            },
            dtype: stage.dtype.clone(),
            threads: self.cpus.unwrap_or_else(|| spec.threads_of(part)),
            base_dir: spec.base_dir.clone(),
            work_dir: Some(spec.work_dir.clone()),
            inputs: spec.inputs.clone(),
            sources: BTreeMap::new(),
            prepared: stage.prepared(),
            part,
        };
        Task {
            plugin: stage.plugin.path.clone(),
            hash: Some(stage.plugin.hash.clone()),
            call: Call::Run {
                job: Box::new(job),
                staging: self.context.staging.attempt(self.attempt),
                artifacts: self.context.layout.artifacts(),
                linger: Duration::ZERO,
            },
        }
    }
}

/// The last progress of each part.
#[derive(Default)]
pub(super) struct PartProgress(Mutex<BTreeMap<usize, Progress>>);

impl PartProgress {
    /// The stage's progress, given one worker's. Parts are summed; the whole starts where they ended.
    pub(super) fn together(&self, part: Option<Part>, mut progress: Progress) -> Progress {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = part {
            told.insert(part.index, progress.clone());
            (progress.done, progress.total) = (0, 0);
        }
        let alike = told.values().filter(|other| other.unit == progress.unit);
        let (done, total) = alike.fold((0_u64, 0_u64), |(done, total), other| {
            (
                done.saturating_add(other.done),
                total.saturating_add(other.total),
            )
        });
        progress.done = progress.done.max(done);
        progress.total = progress.total.max(total);
        progress
    }
}
