//! One attempt at a stage: a worker is started, heard and, when its time has come, ended.
//!
//! In: a stage whose inputs are known. Out: how the attempt ended ([`End`]), with everything it did in the store. A stage
//! that is divided has a worker more for each part: these work first, at the same time; when all have ended well, the
//! worker of the whole takes over what they made. Whatever a plugin does to its process arrives here as an [`End`] with a
//! reason of its own; only a store that cannot be written to is an error. Deliberately absent: which stage runs when, and
//! reuse.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use retort_abi::{Input, LogLevel, Part};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::artifact::{Layout, Staging};
use crate::cluster::dispatch::Dispatcher;
use crate::executor::handle::{self, Cluster, Placement};
use crate::executor::pause::PauseClock;
use crate::executor::recorder::{Recorder, own_line};
use crate::executor::source::Source;
use crate::executor::{Event, Listener, Rung};
use crate::frame::Points;
use crate::plan::{Digest, PlannedStage};
use crate::store::{ArtifactRecord, AttemptEnd, StageId, Store, StoreError, Usage};
use supervisor::{PartProgress, Supervisor, after};

mod end;
mod received;
mod shutdown;
mod supervisor;
#[cfg(test)]
mod tests;
pub use end::{End, Manner};

/// What attempts of a run share.
pub struct RunContext {
    /// The store.
    pub store: Arc<Store>,
    /// Where things lie in it.
    pub layout: Layout,
    /// The run's staging directory.
    pub staging: Staging,
    /// Who is told.
    pub listener: Listener,
    /// How long a stage may take to reach its next checkpoint when it is to stop.
    pub grace: Duration,
    /// How long the run has been stopped.
    pub pauses: Arc<PauseClock>,
    /// Where the run is to stop, to be judged.
    pub rung: Option<Rung>,
    /// What it is judged by there.
    pub judged: Mutex<Option<f64>>,
    /// Notified once it is there.
    pub reached: Notify,
    /// The cluster whose jobs do the work; without one, this machine's processes do.
    pub cluster: Option<Cluster>,
}

impl RunContext {
    /// What the run is judged by; none before it is at its rung.
    pub fn judged(&self) -> Option<f64> {
        *self.judged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for the rung among points of a stage that are to be recorded.
    fn judge(&self, stage: &str, batches: &[Points]) {
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

/// What an attempt needs to know.
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
    /// Its inputs, by the name of the stage that made them.
    pub inputs: BTreeMap<String, Input>,
    /// Files and folders that its options name.
    pub sources: Vec<Source>,
    /// What survives attempts.
    pub work_dir: PathBuf,
}

impl AttemptSpec {
    /// The parts that its work is divided into; none where one process does all of it.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + use<> {
        let of = self.stage.workers.len();
        (0..of).map(move |index| Part { index, of })
    }

    pub(super) fn threads_of(&self, part: Option<Part>) -> usize {
        (self.threads / part.map_or(1, |part| part.of)).max(1)
    }

    fn device_of(&self, part: Option<Part>) -> &str {
        part.map_or(&self.stage.device, |part| &self.stage.workers[part.index])
    }

    /// The devices that are computed on, each once.
    fn devices(&self) -> String {
        let mut names = vec![self.stage.device.as_str()];
        for name in &self.stage.workers {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        names.join(", ")
    }
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    /// Go on.
    No,
    /// Stop at the next checkpoint.
    AtCheckpoint,
    /// Stop at once.
    Now,
}

/// An attempt that has ended.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub end: End,
    /// Artifacts it made, in order.
    pub artifacts: Vec<ArtifactRecord>,
    /// The last lines it wrote to its standard error.
    pub last_words: Vec<String>,
    /// Whether it may have read something else than its digest says: what it left is worth nothing.
    pub tainted: bool,
}

/// Makes an attempt. When this is dropped half-way, the workers are killed.
///
/// # Errors
/// The store cannot be written to: then nothing true could be said about the attempt, and it is ended.
pub async fn run(
    context: &RunContext,
    spec: &AttemptSpec,
    stop: watch::Receiver<Stop>,
) -> Result<Ended, StoreError> {
    let name = &spec.stage.name;
    let paused = context.pauses.total();
    let kills_before = out_of_memory_kills();
    let placement = match handle::place(context, spec) {
        Ok(placement) => placement,
        Err(end) => return refuse(context, spec, end).await,
    };
    let attempt = context
        .store
        .begin_attempt(
            spec.id,
            &spec.digest.hex,
            &spec.digest.components,
            placement.pid(),
        )
        .await?;
    let inputs: Vec<String> = spec
        .inputs
        .values()
        .map(|input| input.hash.clone())
        .collect();
    context.store.record_lineage(attempt, &inputs).await?;
    let recorder = {
        let (listener, stage) = (Arc::clone(&context.listener), name.clone());
        let warn = move |text| {
            listener(Event::Warning {
                stage: Some(stage.clone()),
                text,
            })
        };
        Recorder::begin(Arc::clone(&context.store), attempt, warn)
    };
    let (cpus, pid) = (placement.cpus(), placement.pid());
    let (dispatcher, whole, parts) = match placement {
        Placement::Here(whole, parts) => (None, whole, parts),
        Placement::Cluster(placed) => {
            let (dispatcher, whole, parts) = placed.open(context, spec, attempt).await?;
            (Some(dispatcher), whole, parts)
        }
    };
    let supervisor = Supervisor {
        context,
        spec,
        attempt,
        recorder: &recorder,
        stop,
        deadline: spec.stage.timeout.map(|limit| Instant::now() + limit),
        paused,
        part_progress: PartProgress::default(),
        cpus,
        pid,
        began: AtomicBool::new(false),
    };
    if dispatcher.is_none() {
        supervisor.began();
    }
    let (fault, mut usage) = supervisor.run_parts(parts).await?;
    let finished = match fault {
        Some(fault) => fault,
        None => {
            let finished = supervisor
                .supervise(whole, None, watch::channel(Stop::No).1)
                .await?;
            usage = after(usage, finished.exit.usage);
            finished
        }
    };
    if let Some(dispatcher) = dispatcher {
        Dispatcher::close(dispatcher).await;
    }
    let here = || out_of_memory_kills() > kills_before;
    let out_of_memory = finished.exit.out_of_memory.unwrap_or_else(here);
    let end = finished
        .received
        .judge(finished.exit.status, finished.shutdown, spec, out_of_memory);
    let mut changed = None;
    for source in &spec.sources {
        if let Err(message) = source.end(&context.store).await {
            changed.get_or_insert(message);
        }
    }
    let tainted = changed.is_some();
    let end = match (end, changed) {
        (End::Succeeded { .. }, Some(message)) => End::InputChanged { message },
        (end, Some(message)) => {
            recorder.line(own_line(LogLevel::Warn, message));
            end
        }
        (end, None) => end,
    };
    if let Some(message) = end.message() {
        recorder.line(own_line(
            LogLevel::Error,
            format!("{}{}: {message}", title(finished.part), end.reason()),
        ));
    }
    recorder.end().await;
    let artifacts: Vec<ArtifactRecord> = finished.received.artifacts.into_values().collect();
    context
        .store
        .finish_attempt(
            attempt,
            &recorded(&end, usage, context.pauses.total() - paused),
        )
        .await?;
    let _ = std::fs::remove_dir_all(context.staging.attempt(attempt));
    Ok(Ended {
        end,
        artifacts,
        last_words: finished.received.last_words.into(),
        tainted,
    })
}

/// How lines about a part begin; those about the whole of a stage have no such beginning.
fn title(part: Option<Part>) -> String {
    part.map_or_else(String::new, |part| {
        format!("part {} of {}: ", part.index + 1, part.of)
    })
}

fn recorded(end: &End, usage: Usage, paused: Duration) -> AttemptEnd {
    let (summary, output_artifact) = match end {
        End::Succeeded { output, summary } => (summary.clone(), Some(output.hash.clone())),
        _ => (Value::Null, None),
    };
    let failure = match end {
        End::Failed(failure) | End::Panicked(failure) => Some(failure.clone()),
        _ => None,
    };
    AttemptEnd {
        state: end.state(),
        reason: end.reason(),
        message: end.message(),
        failure,
        summary,
        output_artifact,
        usage,
        paused,
    }
}

/// Records an attempt that ended before a process worked on it.
///
/// # Errors
/// The store cannot be written to.
pub async fn refuse(
    context: &RunContext,
    spec: &AttemptSpec,
    end: End,
) -> Result<Ended, StoreError> {
    let attempt = context
        .store
        .begin_attempt(spec.id, &spec.digest.hex, &spec.digest.components, 0)
        .await?;
    context
        .store
        .finish_attempt(attempt, &recorded(&end, Usage::default(), Duration::ZERO))
        .await?;
    Ok(Ended {
        end,
        artifacts: Vec::new(),
        last_words: Vec::new(),
        tainted: false,
    })
}

/// How often the kernel has killed a process because memory ran out, since it started; 0 where that is not known.
pub(crate) fn out_of_memory_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or_default()
}
