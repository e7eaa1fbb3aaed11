//! The stages of a run in progress: which is ready, reused or blocked, and which gets a worker next.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use retort_abi::Input;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::artifact::{ArtifactError, WorkDir};
use crate::executor::attempt::{self, AttemptOutcome};
use crate::executor::control::Follower;
use crate::executor::describe::new_stage;
use crate::executor::end::End;
use crate::executor::error::ExecutorError;
use crate::executor::event::Event;
use crate::executor::options::{DetachAnswer, DetachPolicy, Options};
use crate::executor::report::{Outcome, StageReport};
use crate::executor::source::SourceFile;
use crate::executor::spec::{AttemptSpec, RunContext, Stop};
use crate::plan::decision::Role;
use crate::plan::{self, Dependencies, Digest, Plan, PlannedStage};
use crate::store::{ArtifactRecord, ReusableAttempt, RunId, StageId, StoreError};

/// How often to check whether everything has been submitted, so that the runner can exit.
const LEAVE: Duration = Duration::from_millis(500);

/// How often to check a stage that another process is running.
const WAIT_FOR_OTHERS: Duration = Duration::from_millis(300);

/// The state of a run's stages.
pub(super) struct Scheduler<'p> {
    plan: &'p Plan,
    options: &'p Options,
    pub(super) run: RunId,
    pub(super) context: Arc<RunContext>,
    sources: HashMap<String, Vec<SourceFile>>,
    entries: Vec<StageEntry<'p>>,
    dependencies: Dependencies<'p>,
    stop: watch::Sender<Stop>,
    pub(super) signal: Option<i32>,
    failed: bool,
    /// Whether it has reached its rung, and is being stopped.
    pub(super) is_judged: bool,
    /// Whether jobs are left to the cluster.
    pub(super) detached: bool,
    /// The user's answer, if asked.
    answer: Option<oneshot::Receiver<DetachAnswer>>,
    pub(super) workers: JoinSet<(usize, Duration, Result<StageEnd, ExecutorError>)>,
}

/// A stage on its way.
struct StageEntry<'p> {
    stage: &'p PlannedStage,
    role: Role,
    id: Option<StageId>,
    state: State,
    elapsed: Duration,
}

enum State {
    LeftOut,
    Waiting,
    Ready(Box<ResolvedStage>),
    Running,
    Done {
        output: Box<ArtifactRecord>,
        reused_from: Option<RunId>,
    },
    Ended(End),
    Blocked {
        by: String,
    },
}

/// A stage's resolved inputs and digest.
struct ResolvedStage {
    digest: Digest,
    inputs: BTreeMap<String, Input>,
}

/// The starting point of a stage.
#[derive(Clone, Copy, PartialEq, Eq)]
enum StartFrom {
    /// From scratch, ignoring earlier attempts.
    Scratch,
    /// From an earlier attempt's work directory, if there is one.
    Checkpoint,
    /// The same, unless another process has made it in the meantime.
    CheckpointOrReuse,
}

/// The outcome of starting a stage.
pub(super) enum StageEnd {
    /// A worker had it.
    Attempted(AttemptOutcome),
    /// Another process has made it meanwhile.
    Reused(ReusableAttempt),
    /// The run was stopped while it waited.
    Stopped,
}

impl<'p> Scheduler<'p> {
    pub(super) async fn open(
        plan: &'p Plan,
        roles: &[Role],
        sources: HashMap<String, Vec<SourceFile>>,
        run: &RunId,
        context: Arc<RunContext>,
        options: &'p Options,
    ) -> Result<Self, ExecutorError> {
        let mut entries = Vec::new();
        for (position, (stage, &role)) in plan.stages.iter().zip(roles).enumerate() {
            let (state, id) = match role {
                Role::Skipped => (State::LeftOut, None),
                _ => (
                    State::Waiting,
                    Some(
                        context
                            .store
                            .add_stage(run, &new_stage(stage, position))
                            .await?,
                    ),
                ),
            };
            entries.push(StageEntry {
                stage,
                role,
                id,
                state,
                elapsed: Duration::ZERO,
            });
        }
        let (stop, _) = watch::channel(Stop::No);
        let workers = JoinSet::new();
        Ok(Self {
            plan,
            options,
            run: run.clone(),
            context,
            sources,
            entries,
            dependencies: Dependencies::of(plan),
            stop,
            signal: None,
            failed: false,
            is_judged: false,
            detached: false,
            answer: None,
            workers,
        })
    }

    /// Runs all stages that can run.
    pub(super) async fn work(&mut self, mut signals: Follower) -> Result<(), ExecutorError> {
        loop {
            self.settle().await?;
            self.launch();
            if self.workers.is_empty() || self.detached {
                return Ok(());
            }
            let leaves = matches!(self.options.leave, DetachPolicy::WhenSubmitted)
                && self.context.cluster.is_some();
            tokio::select! {
                Ok(choice) = answer(&mut self.answer) => {
                    self.answer = None;
                    match choice {
                        DetachAnswer::Detach => self.leave(libc::SIGINT),
                        DetachAnswer::Cancel => self.interrupt(libc::SIGINT),
                        DetachAnswer::GoOn => (self.context.listener)(Event::GoingOn),
                    }
                }
                () = tokio::time::sleep(LEAVE), if leaves && self.signal.is_none() => {
                    let is_complete = self.context.unsubmitted.load(Ordering::Relaxed) == 0;
                    if is_complete && self.context.store.is_submitted(&self.run).await? {
                        self.detached = true;
                    }
                }
                Some(ended) = self.workers.join_next() => self.record_end(ended).await?,
                signal = signals.next() => self.interrupt_or_leave(signal),
                () = self.context.reached.notified(), if !self.is_judged => {
                    self.is_judged = true;
                    // An immediate stop is not weakened.
                    self.stop.send_if_modified(|stop| {
                        let asks = *stop == Stop::No;
                        *stop = (*stop).max(Stop::AtCheckpoint);
                        asks
                    });
                }
            }
        }
    }

    /// Determines, in the plan's order, which waiting stages are reused, ready or blocked.
    async fn settle(&mut self) -> Result<(), ExecutorError> {
        for index in 0..self.entries.len() {
            if !matches!(self.entries[index].state, State::Waiting) {
                continue;
            }
            let state = match self.resolve_inputs(index) {
                Resolution::NotYet => continue,
                Resolution::Blocked(by) => State::Blocked { by },
                Resolution::Ready(ready) => self.reuse_or_keep(index, ready).await?,
            };
            self.entries[index].state = state;
        }
        Ok(())
    }

    /// The inputs of a stage, if they all exist.
    fn resolve_inputs(&self, index: usize) -> Resolution {
        let stage = self.entries[index].stage;
        let (mut inputs, mut hashes) = (BTreeMap::new(), BTreeMap::new());
        for reference in &stage.references {
            let mut given = self.plan.given.iter();
            if let Some(given) = given.find(|given| given.name == reference.stage) {
                let input = Input {
                    kind: given.kind.clone(),
                    path: self.context.layout.artifact(&given.hash),
                    hash: given.hash.clone(),
                };
                hashes.insert(reference.stage.clone(), given.hash.clone());
                inputs.insert(reference.stage.clone(), input);
                continue;
            }
            // A plan's other references name stages of the plan.
            let Some(position) = self.dependencies.position(&reference.stage) else {
                return Resolution::Blocked(reference.stage.clone());
            };
            let source = &self.entries[position];
            match &source.state {
                State::Done { output, .. } => {
                    let path = self.context.layout.artifact(&output.hash);
                    let input = Input {
                        kind: output.kind.clone(),
                        path,
                        hash: output.hash.clone(),
                    };
                    hashes.insert(reference.stage.clone(), output.hash.clone());
                    inputs.insert(reference.stage.clone(), input);
                }
                // Its result has to be in the store, so it reads no data.
                State::LeftOut if reference.prepared => {}
                State::Ended(_) | State::Blocked { .. } | State::LeftOut => {
                    return Resolution::Blocked(reference.stage.clone());
                }
                State::Waiting | State::Ready(_) | State::Running => return Resolution::NotYet,
            }
        }
        let files = self.sources.get(&stage.name).into_iter().flatten();
        let files = files
            .map(|source| (source.pointer.clone(), source.snapshot.hash.clone()))
            .collect();
        match plan::digest(stage, &hashes, &files) {
            Some(digest) => Resolution::Ready(Box::new(ResolvedStage { digest, inputs })),
            None => Resolution::NotYet,
        }
    }

    async fn reuse_or_keep(
        &self,
        index: usize,
        ready: Box<ResolvedStage>,
    ) -> Result<State, ExecutorError> {
        let entry = &self.entries[index];
        if entry.role == Role::Forced {
            return Ok(State::Ready(ready));
        }
        match find_success(&self.context, &ready.digest.hex).await? {
            Some(success) => self.reuse(index, &ready.digest, success).await,
            None if entry.role == Role::Needed => Err(ExecutorError::Missing {
                stage: entry.stage.name.clone(),
            }),
            None => Ok(State::Ready(ready)),
        }
    }

    async fn reuse(
        &self,
        index: usize,
        digest: &Digest,
        success: ReusableAttempt,
    ) -> Result<State, ExecutorError> {
        let entry = &self.entries[index];
        if let Some(id) = entry.id {
            self.context
                .store
                .stage_reused(id, &digest.hex, &digest.components, success.attempt)
                .await?;
        }
        (self.context.listener)(Event::Reused {
            stage: entry.stage.name.clone(),
            from: success.run.clone(),
        });
        Ok(State::Done {
            output: Box::new(success.output),
            reused_from: Some(success.run),
        })
    }

    /// Starts ready stages, in the plan's order, up to the limit of concurrency.
    fn launch(&mut self) {
        let stopping =
            self.signal.is_some() || self.is_judged || (self.failed && !self.options.keep_going);
        for index in 0..self.entries.len() {
            if stopping || self.workers.len() >= self.options.jobs.get() {
                return;
            }
            // Only of ready ones: this looks at all stages.
            if !matches!(self.entries[index].state, State::Ready(_)) {
                continue;
            }
            let threads = self.threads(index);
            let entry = &mut self.entries[index];
            let Some(id) = entry.id else {
                continue;
            };
            let State::Ready(ready) = std::mem::replace(&mut entry.state, State::Running) else {
                continue;
            };
            let ResolvedStage { digest, inputs } = *ready;
            let mut spec = AttemptSpec {
                stage: entry.stage.clone(),
                sources: self
                    .sources
                    .get(&entry.stage.name)
                    .cloned()
                    .unwrap_or_default(),
                id,
                work_dir: self.context.layout.work(&digest.hex),
                digest,
                base_dir: self.plan.base_dir.clone(),
                threads,
                retries: entry.stage.retries,
                inputs,
            };
            let (context, stop) = (Arc::clone(&self.context), self.stop.subscribe());
            let start = match (entry.role, &self.options.resumed_from) {
                (Role::Forced, None) => StartFrom::Scratch,
                (Role::Forced, Some(_)) => StartFrom::Checkpoint,
                _ => StartFrom::CheckpointOrReuse,
            };
            self.workers.spawn(async move {
                let (began, paused) = (Instant::now(), context.pauses.total());
                let run_stage = run_stage(&context, &mut spec, stop, start).await;
                (index, context.pauses.worked(began, paused), run_stage)
            });
        }
    }

    /// The threads of a stage: its share among the stages that may run concurrently, which are the unfinished ones that
    /// neither depend on it nor are needed by it.
    fn threads(&self, index: usize) -> usize {
        let related = self.dependencies.related(index);
        let beside = self.entries.iter().zip(related).filter(|(entry, related)| {
            let unfinished = matches!(
                entry.state,
                State::Waiting | State::Ready(_) | State::Running
            );
            unfinished && !related
        });
        let beside = beside.count();
        let stages = self.options.jobs.get().min(beside + 1);
        let runs = self.options.runs.get();
        let stage = self.entries[index].stage;
        let threads = stage.threads.count(stages * runs);
        // Workers share these threads; externally started ones may be on other machines.
        match &self.options.training_board {
            Some(training_board) if stage.together => {
                threads * stage.workers.len() / training_board.place().local_size
            }
            _ => threads,
        }
    }

    /// Records the outcome of a stage.
    async fn record_end(
        &mut self,
        ended: Result<(usize, Duration, Result<StageEnd, ExecutorError>), tokio::task::JoinError>,
    ) -> Result<(), ExecutorError> {
        let (index, elapsed, run_stage) = ended.map_err(|error| ExecutorError::System {
            what: "a stage could not be watched",
            source: std::io::Error::other(error),
        })?;
        self.entries[index].elapsed = elapsed;
        let stage = self.entries[index].stage.name.clone();
        self.entries[index].state = match run_stage? {
            // It will not have another turn in this run.
            StageEnd::Stopped => State::Waiting,
            StageEnd::Reused(success) => {
                // Its digest is recomputed, because it was moved into the worker's spec.
                match self.resolve_inputs(index) {
                    Resolution::Ready(ready) => self.reuse(index, &ready.digest, success).await?,
                    _ => State::Waiting,
                }
            }
            StageEnd::Attempted(AttemptOutcome {
                end, last_words, ..
            }) => {
                (self.context.listener)(Event::Ended {
                    stage,
                    end: end.clone(),
                    elapsed,
                    last_words,
                });
                match end {
                    End::Succeeded { output, .. } => State::Done {
                        output,
                        reused_from: None,
                    },
                    end => {
                        self.failed = true;
                        State::Ended(end)
                    }
                }
            }
        };
        Ok(())
    }

    /// A cluster's jobs need neither this process nor a terminal, so they survive both. Ctrl-C may mean either.
    fn interrupt_or_leave(&mut self, signal: i32) {
        if self.context.cluster.is_none() || self.signal.is_some() {
            return self.interrupt(signal);
        }
        match (&self.options.leave, signal) {
            (_, libc::SIGHUP | libc::SIGTERM) | (DetachPolicy::WhenSubmitted, _) => {
                self.leave(signal)
            }
            // Twice is an answer.
            (DetachPolicy::Ask(ask), _) if self.answer.is_none() => {
                let (tell, answer) = oneshot::channel();
                let ask = Arc::clone(ask);
                // A detached thread: it may never get an answer.
                std::thread::spawn(move || tell.send(ask()));
                self.answer = Some(answer);
            }
            _ => self.interrupt(signal),
        }
    }

    fn leave(&mut self, signal: i32) {
        self.signal = Some(signal);
        self.detached = true;
    }

    /// Ctrl-C or a similar signal: the first asks workers to stop, the second stops them at once. A closed terminal signals
    /// twice, once from the kernel and once from the shell, which counts as one.
    fn interrupt(&mut self, signal: i32) {
        if self.signal.is_none() {
            self.signal = Some(signal);
            let (grace, workers) = (self.options.grace, self.workers.len());
            (self.context.listener)(Event::Stopping { grace, workers });
            self.stop.send_replace(Stop::AtCheckpoint);
        } else if signal != libc::SIGHUP {
            (self.context.listener)(Event::Killing);
            self.stop.send_replace(Stop::Now);
        }
    }

    pub(super) fn report(self) -> Vec<StageReport> {
        let stages = self.entries.into_iter().filter_map(|entry| {
            let outcome = match entry.state {
                State::LeftOut => return None,
                State::Done {
                    reused_from: Some(from),
                    ..
                } => Outcome::Reused { from },
                State::Done {
                    output,
                    reused_from: None,
                } => Outcome::Ran(End::Succeeded {
                    output,
                    summary: serde_json::Value::Null,
                }),
                State::Ended(end) => Outcome::Ran(end),
                State::Blocked { by } => Outcome::Blocked { by },
                State::Waiting | State::Ready(_) | State::Running => Outcome::NotReached,
            };
            let (name, kind) = (entry.stage.name.clone(), entry.stage.kind.clone());
            Some(StageReport {
                name,
                kind,
                outcome,
                elapsed: entry.elapsed,
            })
        });
        stages.collect()
    }
}

enum Resolution {
    NotYet,
    Blocked(String),
    Ready(Box<ResolvedStage>),
}

/// A successful attempt with this digest whose output still exists.
async fn find_success(
    context: &RunContext,
    digest: &str,
) -> Result<Option<ReusableAttempt>, StoreError> {
    let Some(success) = context.store.find_success(digest).await? else {
        return Ok(None);
    };
    // It asks for the size of each file. That may take long, and heartbeats are due meanwhile.
    let layout = context.layout.clone();
    let held = tokio::task::spawn_blocking(move || {
        let is_held = layout.holds(&success.output);
        is_held.then_some(success)
    });
    Ok(held.await.unwrap_or(None))
}

/// Starts a stage as soon as no other process is running the same.
async fn run_stage(
    context: &RunContext,
    spec: &mut AttemptSpec,
    mut stop: watch::Receiver<Stop>,
    start: StartFrom,
) -> Result<StageEnd, ExecutorError> {
    let mut told = false;
    let work: WorkDir = loop {
        if let Some(work) = context.layout.open_work(&spec.digest.hex)? {
            break work;
        }
        if !std::mem::replace(&mut told, true) {
            (context.listener)(Event::Waiting {
                stage: spec.stage.name.clone(),
            });
        }
        tokio::select! {
            _ = stop.changed() => return Ok(StageEnd::Stopped),
            () = context.left() => return Ok(StageEnd::Stopped),
            () = tokio::time::sleep(WAIT_FOR_OTHERS) => {}
        }
    };
    // Another run may have made the result since the stage was found missing.
    if start == StartFrom::CheckpointOrReuse
        && let Some(success) = find_success(context, &spec.digest.hex).await?
    {
        return Ok(StageEnd::Reused(success));
    }
    if start == StartFrom::Scratch {
        empty(work.path())?;
    }
    for source in &mut spec.sources {
        let begun = tokio::select! {
            begun = source.begin(&context.store) => begun,
            _ = stop.changed() => return Ok(StageEnd::Stopped),
            () = context.left() => return Ok(StageEnd::Stopped),
        };
        if let Err(message) = begun {
            let end = End::InputChanged { message };
            return Ok(StageEnd::Attempted(
                attempt::refuse(context, spec, end).await?,
            ));
        }
    }
    let ended = loop {
        let ended = attempt::run(context, spec, stop.clone()).await?;
        let End::LostWorkers { left, .. } = ended.end else {
            break ended;
        };
        if ended.tainted || *stop.borrow() != Stop::No {
            break ended;
        }
        (context.listener)(Event::Warning {
            stage: Some(spec.stage.name.clone()),
            text: ended.end.message().unwrap_or_default(),
        });
        match left == spec.stage.workers.len() {
            true => spec.retries = spec.retries.saturating_sub(1),
            false => spec.do_without(&ended.lost, left),
        }
    };
    // Otherwise a checkpoint made from other data would be resumed.
    if ended.tainted || matches!(ended.end, End::Succeeded { .. }) {
        work.remove();
    }
    Ok(StageEnd::Attempted(ended))
}

fn empty(dir: &std::path::Path) -> Result<(), ExecutorError> {
    let failed = |source| ArtifactError::Io {
        action: "empty",
        path: dir.to_owned(),
        source,
    };
    std::fs::remove_dir_all(dir)
        .and_then(|()| std::fs::create_dir(dir))
        .map_err(failed)?;
    Ok(())
}

/// Waits for an answer; forever if nobody was asked.
async fn answer(
    asked: &mut Option<oneshot::Receiver<DetachAnswer>>,
) -> Result<DetachAnswer, oneshot::error::RecvError> {
    match asked {
        Some(asked) => asked.await,
        None => std::future::pending().await,
    }
}
