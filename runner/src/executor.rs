//! Running a plan: which stage runs when, what is reused, and when to stop.
//!
//! In: a plan, the role of each of its stages ([`Role`]), a store. Out: a run in the store, and a [`RunReport`]. Whether a
//! stage is reused is decided when its inputs exist. There is one event loop on one thread; worker processes do the work
//! ([`attempt`]). Deliberately absent: planning, and the terminal: events go to a [`Listener`], and the user's signals come
//! from [`Control`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::artifact::Layout;
use crate::executor::source::SourceFile;
use crate::executor::spec::RunContext;
use crate::input::FileSnapshot;
use crate::plan::Plan;
use crate::plan::decision::Role;
use crate::store::{AttemptState, HashTrust, RunId, RunState, Store, StoreError};

pub mod attempt;
pub mod control;
mod describe;
pub mod end;
mod error;
pub(crate) mod event;
pub mod handle;
pub mod held_port;
mod options;
pub mod pause;
pub mod progress_file;
pub(crate) mod recorder;
mod report;
mod scheduler;
pub mod source;
pub mod spec;

pub use control::{Control, Signals};
pub use describe::RecordedPlan;
pub use error::ExecutorError;
pub use event::{Event, Listener};
pub use options::{Cluster, DetachAnswer, DetachPolicy, Options, Rung};
pub use report::{Outcome, RunReport, StageReport};

use describe::new_run;
use report::why;
use scheduler::Scheduler;

/// How often a run writes a heartbeat.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How long a detached run's last rows may take.
const LAST_ROWS: Duration = Duration::from_secs(10);

/// Runs a plan, and handles signals. `roles` has one entry per stage of the plan ([`crate::plan::decision::select`]).
///
/// A failed stage is not an error but part of the report.
///
/// # Errors
/// [`ExecutorError`]. The run, if it had begun, is recorded as failed if the store allows it, and no worker is left behind.
pub async fn execute(
    plan: &Plan,
    roles: &[Role],
    store: Arc<Store>,
    options: &Options,
    listener: Listener,
) -> Result<RunReport, ExecutorError> {
    let sources = sources(plan, roles, &store).await?;
    let mut signals = Signals::listen().map_err(|source| ExecutorError::System {
        what: "signals cannot be received",
        source,
    })?;
    let control = Control::default();
    let mut work = std::pin::pin!(carry_out(
        plan, roles, sources, store, options, listener, &control
    ));
    loop {
        tokio::select! {
            report = &mut work => return report,
            signal = signals.next() => control.send(signal),
        }
    }
}

/// Runs a plan concurrently with others, under the same control.
///
/// # Errors
/// As [`execute`]; [`ExecutorError::Interrupted`] if a signal comes while the files of its stages are hashed.
pub async fn execute_beside(
    plan: &Plan,
    roles: &[Role],
    store: Arc<Store>,
    options: &Options,
    listener: Listener,
    control: &Control,
) -> Result<RunReport, ExecutorError> {
    let mut signals = control.follow();
    let sources = tokio::select! {
        biased;
        _ = signals.next() => return Err(ExecutorError::Interrupted),
        sources = sources(plan, roles, &store) => sources?,
    };
    carry_out(plan, roles, sources, store, options, listener, control).await
}

async fn carry_out(
    plan: &Plan,
    roles: &[Role],
    sources: HashMap<String, Vec<SourceFile>>,
    store: Arc<Store>,
    options: &Options,
    listener: Listener,
    control: &Control,
) -> Result<RunReport, ExecutorError> {
    let layout = Layout::new(store.dir()).map_err(|source| ExecutorError::System {
        what: "the store's directory has no path",
        source,
    })?;
    check_given(plan, &layout, &store).await?;
    let run = store.begin_run(&new_run(plan, roles, options)).await?;
    let began = Instant::now();
    let paused = control.pauses.total();
    let outcome = async {
        let staging = layout.open_staging(&run.0)?;
        let progress_file = progress_file::ProgressFile::new(&layout.staging(&run.0));
        let listener: Listener = Arc::new(move |event| {
            progress_file.hear(&event);
            listener(event);
        });
        let grace = options.grace;
        let context = Arc::new(RunContext {
            store: Arc::clone(&store),
            layout,
            staging,
            listener,
            grace,
            pauses: Arc::clone(&control.pauses),
            rung: options.rung.clone(),
            judged: Mutex::new(None),
            reached: Notify::new(),
            leaving: watch::Sender::new(false),
            unsubmitted: Arc::default(),
            cluster: options.cluster.clone(),
            training_board: options.training_board.clone(),
        });
        let mut scheduler = Scheduler::open(plan, roles, sources, &run, context, options).await?;
        (scheduler.context.listener)(Event::RunBegan { run: run.clone() });
        scheduler.work(control.follow()).await?;
        Ok::<_, ExecutorError>(scheduler)
    };
    let outcome = tokio::select! {
        outcome = outcome => outcome,
        taken = heartbeats(&store, &run) => Err(taken),
    };
    let scheduler = match outcome {
        Ok(scheduler) => scheduler,
        Err(error) => {
            // Best effort: a store that refused a write may refuse this one too; then the run shows as lost.
            let _ = store
                .finish_run(&run, RunState::Failed, Some(&error.to_string()))
                .await;
            return Err(error);
        }
    };
    if scheduler.detached {
        return detach(scheduler, began).await;
    }
    let signal = scheduler.signal;
    let rung = scheduler
        .is_judged
        .then(|| scheduler.context.judged())
        .flatten();
    let elapsed = scheduler.context.pauses.worked(began, paused);
    let stages = scheduler.report();
    let failed = |stage: &StageReport| matches!(&stage.outcome, Outcome::Ran(end) if end.state() == AttemptState::Failed);
    let state = match (signal, rung) {
        _ if stages.iter().all(StageReport::is_good) => RunState::Succeeded,
        (Some(_), _) => RunState::Interrupted,
        (None, Some(_)) if !stages.iter().any(failed) => RunState::Interrupted,
        _ => RunState::Failed,
    };
    let rung = rung.filter(|_| state == RunState::Interrupted && signal.is_none());
    let why = match (&options.rung, rung) {
        (Some(Rung { series, step }), Some(_)) => {
            Some(format!("stopped at step {step} of {series}, to be judged"))
        }
        _ => why(&stages),
    };
    store.finish_run(&run, state, why.as_deref()).await?;
    Ok(RunReport {
        run,
        state,
        signal,
        rung,
        stages,
        elapsed,
    })
}

/// The artifacts that a plan takes from the store by their hashes are there, and complete.
async fn check_given(plan: &Plan, layout: &Layout, store: &Store) -> Result<(), ExecutorError> {
    for given in &plan.given {
        let (name, hash) = (given.name.clone(), given.hash.clone());
        let known = store.find_artifact(&hash).await?;
        let Some(known) = known.filter(|known| known.kind == given.kind) else {
            return Err(ExecutorError::NoArtifact { name, hash });
        };
        // An imported run's files may be missing here.
        if !layout.artifact(&hash).exists() {
            return Err(ExecutorError::NoArtifact { name, hash });
        }
        if !layout.holds(&known) {
            return Err(ExecutorError::Damaged { name, hash });
        }
    }
    Ok(())
}

/// Writes heartbeats while the run is under way, whatever its scheduler waits for. Ends only with an error: another machine has
/// taken the history, and nothing that happens here could be recorded.
async fn heartbeats(store: &Store, run: &RunId) -> ExecutorError {
    let mut due = tokio::time::interval_at(tokio::time::Instant::now() + HEARTBEAT, HEARTBEAT);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        match store.heartbeat(run).await {
            Ok(()) => {}
            Err(error @ StoreError::Elsewhere { .. }) => return error.into(),
            Err(error) => tracing::debug!("heartbeat: {error}"),
        }
    }
}

/// Detaches from a run's jobs, which the cluster continues.
async fn detach(mut scheduler: Scheduler<'_>, began: Instant) -> Result<RunReport, ExecutorError> {
    // Attempts write down what they have read. This cancels nothing.
    scheduler.context.leaving.send_replace(true);
    let attempts = async { while scheduler.workers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(LAST_ROWS, attempts).await;
    scheduler.workers.shutdown().await;
    let (store, run) = (Arc::clone(&scheduler.context.store), scheduler.run.clone());
    let elapsed = scheduler.context.pauses.worked(began, Duration::ZERO);
    let signal = scheduler.signal;
    let stages = scheduler.report();
    let open = store.jobs(&run).await?.iter().any(|job| job.over.is_none());
    let state = if open {
        store.leave_to_scheduler(&run).await?;
        RunState::Running
    } else {
        store.finish_run(&run, RunState::Interrupted, None).await?;
        RunState::Interrupted
    };
    Ok(RunReport {
        run,
        state,
        signal,
        rung: None,
        stages,
        elapsed,
    })
}

/// The files named by options, by stage, for the stages that may run.
async fn sources(
    plan: &Plan,
    roles: &[Role],
    store: &Store,
) -> Result<HashMap<String, Vec<SourceFile>>, ExecutorError> {
    let mut known: HashMap<&std::path::Path, FileSnapshot> = HashMap::new();
    let mut sources: HashMap<String, Vec<SourceFile>> = HashMap::new();
    for (stage, _) in plan
        .stages
        .iter()
        .zip(roles)
        .filter(|(_, role)| **role != Role::Skipped)
    {
        for file in &stage.files {
            let snapshot = match known.get(&*file.path) {
                Some(snapshot) => snapshot.clone(),
                None => {
                    store
                        .snapshot(&file.path, file.kind, HashTrust::Trusted)
                        .await?
                }
            };
            known.insert(&file.path, snapshot.clone());
            sources
                .entry(stage.name.clone())
                .or_default()
                .push(SourceFile {
                    pointer: file.pointer.clone(),
                    path: file.path.clone(),
                    kind: file.kind,
                    snapshot,
                });
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::plan::fake;
    use crate::store::{Access, RunFilter};

    #[tokio::test]
    async fn a_signal_while_files_are_hashed_ends_a_run_before_it_begins() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), Access::ReadWrite).await.unwrap();
        let store = Arc::new(store);
        let text = "version: 1\nbackend: fake\nstages:\n  codes: {kind: tokenizer, data: d.csv}\n";
        let plan = fake::plan(text, &[]).unwrap();
        let roles = vec![Role::Wanted; plan.stages.len()];
        let options = Options {
            jobs: NonZeroUsize::MIN,
            keep_going: false,
            grace: Duration::ZERO,
            command: Vec::new(),
            environment: serde_json::Value::Null,
            resumed_from: None,
            runs: NonZeroUsize::MIN,
            sweep: None,
            rung: None,
            cluster: None,
            training_board: None,
            leave: DetachPolicy::Never,
            slurm: Vec::new(),
        };
        let control = Control::default();
        control.send(libc::SIGINT);
        let listener: Listener = Arc::new(|_| {});
        let work = execute_beside(
            &plan,
            &roles,
            Arc::clone(&store),
            &options,
            listener,
            &control,
        );
        let ended = work.await;
        assert!(matches!(ended, Err(ExecutorError::Interrupted)));
        let runs = store.list_runs(&RunFilter::default()).await.unwrap();
        assert!(runs.is_empty());
    }
}
