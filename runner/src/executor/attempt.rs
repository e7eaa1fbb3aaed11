//! One attempt at a stage: starts a worker, monitors it and, if necessary, stops it.
//!
//! In: a stage whose inputs are known. Out: how the attempt ended ([`End`]); everything it did is in the store. A divided
//! stage has an additional worker for each part. These run first, concurrently; when all have succeeded, the worker of the
//! whole collects their results. Whatever a plugin does to its process becomes an [`End`] with its own reason; only an
//! unwritable store is an error. Deliberately absent: which stage runs when, and reuse.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use retort_abi::LogLevel;
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cluster::dispatch::Dispatcher;
use crate::executor::end::{End, StopOutcome};
use crate::executor::event::Event;
use crate::executor::handle::{self, Placement};
use crate::executor::recorder::Recorder;
use crate::executor::spec::{AttemptSpec, RunContext, Stop, title};
use crate::store::{ArtifactRecord, AttemptEnd, AttemptId, LogLine, StoreError, Usage};
use crate::worker::death::out_of_memory_kills;
use supervisor::{PartProgress, Supervisor};

mod admission;
mod event_handler;
mod event_loop;
mod shrink;
mod shutdown;
mod supervisor;
#[cfg(test)]
mod tests;

/// An attempt that has ended.
#[derive(Debug)]
pub struct AttemptOutcome {
    /// How.
    pub end: End,
    /// Artifacts it made, in order.
    pub artifacts: Vec<ArtifactRecord>,
    /// The last lines it wrote to its standard error.
    pub last_words: Vec<String>,
    /// Whether its inputs may differ from its digest: then its work directory is useless.
    pub tainted: bool,
    /// Workers that were lost, by number.
    pub lost: Vec<usize>,
}

impl AttemptOutcome {
    /// Of an attempt that made nothing.
    fn without_work(end: End) -> Self {
        Self {
            end,
            artifacts: Vec::new(),
            last_words: Vec::new(),
            tainted: false,
            lost: Vec::new(),
        }
    }
}

/// Makes an attempt. When this is dropped half-way, the workers are killed.
///
/// # Errors
/// The store cannot be written to: the attempt could not be recorded, and is ended.
pub async fn run(
    context: &RunContext,
    spec: &AttemptSpec,
    stop: watch::Receiver<Stop>,
) -> Result<AttemptOutcome, StoreError> {
    let paused = context.pauses.total();
    let kills_before = out_of_memory_kills();
    let placement = match handle::place(context, spec) {
        Ok(placement) => placement,
        Err(end) => return refuse(context, spec, end).await,
    };
    let (attempt, recorder) = begin(context, spec, placement.pid()).await?;
    let (cpus, pid) = (placement.cpus(), placement.pid());
    let (dispatcher, whole, parts, _port) = match placement {
        Placement::Here(whole, parts, port) => (None, whole, parts, port),
        Placement::Cluster(placed) => {
            let (dispatcher, whole, parts) = placed.open(context, spec, attempt).await?;
            (Some(dispatcher), whole, parts, None)
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
    let finished = tokio::select! {
        biased;
        finished = supervisor.run_workers(whole, parts) => Some(finished?),
        () = context.left() => None,
    };
    let Some((finished, usage, lost)) = finished else {
        // At once: it would take what nobody reads any more for heard.
        drop(dispatcher);
        recorder.end().await;
        // Nobody is told: the attempt goes on.
        return Ok(AttemptOutcome::without_work(End::Interrupted {
            outcome: StopOutcome::Otherwise,
        }));
    };
    if let Some(dispatcher) = dispatcher {
        Dispatcher::close(dispatcher).await;
    }
    let killed_here = || out_of_memory_kills() > kills_before;
    let out_of_memory = finished.exit.out_of_memory.unwrap_or_else(killed_here);
    let end = finished
        .report
        .judge(finished.exit.status, finished.shutdown, spec, out_of_memory);
    let (end, tainted) = check_sources(context, spec, &recorder, end).await;
    // On a cluster `requeue` has already restarted jobs before the attempt ended.
    let end = match context.cluster {
        None => shrink::tried_again(spec, end),
        Some(_) => end,
    };
    let end = match (&context.training_board, &end) {
        // Whoever started the processes decides their number.
        (Some(_), _) | (_, End::LostWorkers { .. }) => end,
        _ => shrink::lost_workers(spec, end, &lost),
    };
    if let Some(message) = end.message() {
        recorder.line(LogLine::of_runner(
            LogLevel::Error,
            format!("{}{}: {message}", title(finished.part), end.reason()),
        ));
    }
    recorder.end().await;
    let artifacts: Vec<ArtifactRecord> = finished.report.artifacts.into_values().collect();
    context
        .store
        .finish_attempt(
            attempt,
            &recorded(&end, usage, context.pauses.total() - paused),
        )
        .await?;
    let _ = std::fs::remove_dir_all(context.staging.attempt(attempt));
    Ok(AttemptOutcome {
        end,
        artifacts,
        last_words: finished.report.last_words.into(),
        tainted,
        lost: lost.parts,
    })
}

/// Records that an attempt begins, and its inputs. Its output goes to the recorder.
async fn begin(
    context: &RunContext,
    spec: &AttemptSpec,
    pid: u32,
) -> Result<(AttemptId, Recorder), StoreError> {
    let store = &context.store;
    let attempt = store
        .begin_attempt(spec.id, &spec.digest.hex, &spec.digest.components, pid)
        .await?;
    let inputs: Vec<String> = spec
        .inputs
        .values()
        .map(|input| input.hash.clone())
        .collect();
    store.record_lineage(attempt, &inputs).await?;
    let (listener, stage) = (Arc::clone(&context.listener), spec.stage.name.clone());
    let warn = move |text| {
        listener(Event::Warning {
            stage: Some(stage.clone()),
            text,
        })
    };
    let recorder = Recorder::begin(Arc::clone(store), attempt, warn);
    Ok((attempt, recorder))
}

/// Fails an attempt during which a source file changed. Returns the end, and whether a file has changed.
async fn check_sources(
    context: &RunContext,
    spec: &AttemptSpec,
    recorder: &Recorder,
    end: End,
) -> (End, bool) {
    let mut changed = None;
    for source in &spec.sources {
        if let Err(message) = source.end(&context.store).await {
            changed.get_or_insert(message);
        }
    }
    match (end, changed) {
        (End::Succeeded { .. }, Some(message)) => (End::InputChanged { message }, true),
        (end, Some(message)) => {
            recorder.line(LogLine::of_runner(LogLevel::Warn, message));
            (end, true)
        }
        (end, None) => (end, false),
    }
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

/// Records an attempt that ended before any process worked on it.
///
/// # Errors
/// The store cannot be written to.
pub async fn refuse(
    context: &RunContext,
    spec: &AttemptSpec,
    end: End,
) -> Result<AttemptOutcome, StoreError> {
    let attempt = context
        .store
        .begin_attempt(spec.id, &spec.digest.hex, &spec.digest.components, 0)
        .await?;
    context
        .store
        .finish_attempt(attempt, &recorded(&end, Usage::default(), Duration::ZERO))
        .await?;
    Ok(AttemptOutcome::without_work(end))
}
