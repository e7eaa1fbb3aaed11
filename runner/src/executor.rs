//! Running a plan: which stage runs when, what is reused, and when to stop.
//!
//! In: a plan, the part of each stage in it ([`Role`]), a store. Out: a run in the store, and a [`RunReport`]. Whether a
//! stage is reused is decided when its inputs are really there. One event loop on one thread; the work is done by worker
//! processes, one per attempt ([`attempt`]). Deliberately absent: planning, and the terminal: what happens is told to a
//! [`Listener`], and what the user wants is heard from [`Control`].

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use retort_abi::Input;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;

use crate::artifact::{ArtifactError, Layout, Work};
use crate::executor::attempt::{AttemptSpec, End, Ended, RunContext, Stop};
use crate::executor::control::Follower;
use crate::executor::handle::Cluster;
use crate::executor::source::Source;
use crate::frame::Progress;
use crate::input::{InputError, Snapshot};
use crate::plan::decision::Role;
use crate::plan::{self, Digest, Plan, PlannedStage};
use crate::store::{
    ArtifactRecord, AttemptId, AttemptState, LogLine, Memory, NewRun, NewStage, Param,
    PluginIdentity, RunId, RunState, StageId, Store, StoreError, Success, SweepPlace,
};

pub mod attempt;
pub mod control;
pub mod gauge;
pub mod handle;
pub mod pause;
pub(crate) mod recorder;
pub mod source;

pub use control::{Control, Signals};

/// How often the run says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How often it is looked whether everything is submitted, so that the runner can leave.
const LEAVE: Duration = Duration::from_millis(500);
/// How often a stage that another process works on is looked at again.
const WAIT_FOR_OTHERS: Duration = Duration::from_millis(300);

/// How to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many stages may run at the same time.
    pub jobs: NonZeroUsize,
    /// Whether stages that do not depend on a failed one still run.
    pub keep_going: bool,
    /// How long a stage may take to reach its next checkpoint when it is to stop.
    pub grace: Duration,
    /// The arguments of the command, for the record.
    pub command: Vec<String>,
    /// Where it runs, for the record.
    pub environment: serde_json::Value,
    /// The run that this one takes up again.
    pub resumed_from: Option<RunId>,
    /// How many runs this process carries out at the same time: they share the cores.
    pub runs: NonZeroUsize,
    /// The point of a sweep that it is.
    pub sweep: Option<SweepPlace>,
    /// Where it is to stop, to be judged.
    pub rung: Option<Rung>,
    /// The cluster whose jobs do the work; none: processes of this machine do.
    pub cluster: Option<Cluster>,
    /// How its jobs are left.
    pub leave: Leave,
    /// What was set for them by flags, for the record.
    pub slurm: Vec<String>,
}

/// How a runner leaves jobs of a cluster.
#[derive(Clone)]
pub enum Leave {
    /// It does not: Ctrl-C cancels them.
    Never,
    /// By itself, when everything is submitted that can be.
    WhenSubmitted,
    /// Ctrl-C asks. A function that waits for an answer; called on a thread of its own.
    Ask(Arc<dyn Fn() -> Choice + Send + Sync>),
}

impl std::fmt::Debug for Leave {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Never => "Never",
            Self::WhenSubmitted => "WhenSubmitted",
            Self::Ask(_) => "Ask",
        })
    }
}

/// What somebody wants who was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The jobs go on without a runner.
    Detach,
    /// They stop at their next checkpoint.
    Cancel,
    /// Nothing.
    GoOn,
}

/// A entry in a run where it is to stop: its first checkpoint after a step of a series.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rung {
    /// The series: `distill/loss`, or `student/distill/loss` with its stage.
    pub series: String,
    /// The step.
    pub step: u64,
}

impl Rung {
    /// Whether a stage's series is meant.
    pub fn is_of(&self, stage: &str, series: &str) -> bool {
        let behind = |stage: &str| self.series.strip_prefix(stage)?.strip_prefix('/');
        self.series == series || behind(stage) == Some(series)
    }
}

/// Is told what happens, on the event loop's thread: must not block.
pub type Listener = Arc<dyn Fn(Event) + Send + Sync>;

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The run is recorded and begins.
    RunBegan {
        /// Its id.
        run: RunId,
    },
    /// A stage's result was in the store.
    Reused {
        /// The stage.
        stage: String,
        /// The run it comes from.
        from: RunId,
    },
    /// Another process is working on the very same stage.
    Waiting {
        /// The stage.
        stage: String,
    },
    /// Slurm has taken a job.
    Submitted {
        /// The stage.
        stage: String,
        /// Slurm's id.
        job: u64,
        /// Elements, where it is an array.
        elements: Option<usize>,
    },
    /// A worker has begun on a stage.
    Began {
        /// The stage.
        stage: String,
        /// The attempt.
        attempt: AttemptId,
        /// The worker's process id.
        pid: u32,
        /// `cpu`, `cuda:0`.
        device: String,
        /// How many processes divide the work; 1 is none.
        workers: usize,
        /// Threads each may use.
        threads: usize,
    },
    /// A stage is so far.
    Progress {
        /// The stage.
        stage: String,
        /// How far.
        progress: Progress,
    },
    /// A stage, or something it uses, wrote a line.
    Line {
        /// The stage.
        stage: String,
        /// The line.
        line: LogLine,
    },
    /// An attempt has ended.
    Ended {
        /// The stage.
        stage: String,
        /// How.
        end: End,
        /// After how long.
        elapsed: Duration,
        /// The last lines of its standard error.
        last_words: Vec<String>,
    },
    /// The user wants the run to stop: workers are asked to, at their next checkpoint.
    Stopping {
        /// How long they have.
        grace: Duration,
        /// How many there are.
        workers: usize,
    },
    /// The user wants the run to stop at once.
    Killing,
    /// Something is odd.
    Warning {
        /// The stage, where there is one.
        stage: Option<String>,
        /// What.
        text: String,
    },
}

impl Event {
    /// The same with another name for its stage.
    pub fn renamed(mut self, name: impl Fn(&str) -> String) -> Self {
        match &mut self {
            Self::Reused { stage, .. }
            | Self::Waiting { stage }
            | Self::Submitted { stage, .. }
            | Self::Began { stage, .. }
            | Self::Progress { stage, .. }
            | Self::Line { stage, .. }
            | Self::Ended { stage, .. }
            | Self::Warning {
                stage: Some(stage), ..
            } => *stage = name(stage),
            Self::RunBegan { .. }
            | Self::Stopping { .. }
            | Self::Killing
            | Self::Warning { stage: None, .. } => {}
        }
        self
    }
}

/// How a run went.
#[derive(Debug)]
pub struct RunReport {
    /// Its id.
    pub run: RunId,
    /// Its state.
    pub state: RunState,
    /// The signal that stopped it.
    pub signal: Option<i32>,
    /// What it had at its rung, where it stopped there.
    pub rung: Option<f64>,
    /// Its stages, in the plan's order, without those left out.
    pub stages: Vec<StageReport>,
    /// How long it took.
    pub elapsed: Duration,
}

/// How a stage went.
#[derive(Debug)]
pub struct StageReport {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// What came of it.
    pub outcome: Outcome,
    /// How long its attempt took; zero without one.
    pub elapsed: Duration,
}

/// What came of a stage.
#[derive(Debug)]
pub enum Outcome {
    /// It ran, and ended like this.
    Ran(End),
    /// Its result was there already.
    Reused {
        /// The run it comes from.
        from: RunId,
    },
    /// It did not run because this stage did not succeed.
    Blocked {
        /// The other stage.
        by: String,
    },
    /// The run ended before its turn.
    NotReached,
}

/// Why a plan could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Something in the store's directory cannot be used.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A file that a stage names cannot be used.
    #[error(transparent)]
    Input(#[from] InputError),
    /// An artifact that the recipe takes by name is not there.
    #[error("the artifact {} that the recipe takes as `{name}` is not in the store", hash.get(..12).unwrap_or(hash))]
    NoArtifact {
        /// Its name in the recipe.
        name: String,
        /// Its hash.
        hash: String,
    },
    /// A stage left out by `--from` is needed and was never made.
    #[error("`{stage}` is left out by --from, but its result is needed and not in the store")]
    Missing {
        /// The stage.
        stage: String,
    },
    /// The operating system refuses something basic.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// Runs a plan, and hears the user meanwhile. `roles` has one entry per stage of the plan ([`plan::decision::select`]).
///
/// That a stage failed is no error but part of the report.
///
/// # Errors
/// [`ExecutorError`]. The run, if it had begun, is recorded as failed where the store still takes it, and no worker is
/// left behind.
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

/// Runs a plan beside others, held by the same control.
///
/// # Errors
/// As [`execute`].
pub async fn execute_beside(
    plan: &Plan,
    roles: &[Role],
    store: Arc<Store>,
    options: &Options,
    listener: Listener,
    control: &Control,
) -> Result<RunReport, ExecutorError> {
    let sources = sources(plan, roles, &store).await?;
    carry_out(plan, roles, sources, store, options, listener, control).await
}

async fn carry_out(
    plan: &Plan,
    roles: &[Role],
    sources: HashMap<String, Vec<Source>>,
    store: Arc<Store>,
    options: &Options,
    listener: Listener,
    control: &Control,
) -> Result<RunReport, ExecutorError> {
    let layout = Layout::new(store.dir()).map_err(|source| ExecutorError::System {
        what: "the store's directory cannot be named",
        source,
    })?;
    for given in &plan.given {
        let known = store.find_artifact(&given.hash).await?;
        if !known.is_some_and(|known| known.kind == given.kind && layout.holds(&known)) {
            return Err(ExecutorError::NoArtifact {
                name: given.name.clone(),
                hash: given.hash.clone(),
            });
        }
    }
    let run = store.begin_run(&new_run(plan, roles, options)).await?;
    let began = Instant::now();
    let paused = control.pauses.total();
    let outcome = async {
        let staging = layout.open_staging(&run.0)?;
        let gauge = gauge::Gauge::new(&layout.staging(&run.0));
        let listener: Listener = Arc::new(move |event| {
            gauge.hear(&event);
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
            cluster: options.cluster.clone(),
        });
        let mut scheduler = Scheduler::open(plan, roles, sources, &run, context, options).await?;
        (scheduler.context.listener)(Event::RunBegan { run: run.clone() });
        scheduler.work(control.follow()).await?;
        Ok::<_, ExecutorError>(scheduler)
    };
    let scheduler = match outcome.await {
        Ok(scheduler) => scheduler,
        Err(error) => {
            // Best effort: a store that took no more does perhaps not take this either; then the run reads as lost.
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

/// Leaves the jobs of a run to the cluster.
async fn detach(mut scheduler: Scheduler<'_>, began: Instant) -> Result<RunReport, ExecutorError> {
    // Nothing is cancelled by that.
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

impl StageReport {
    /// Whether its result is there.
    pub fn is_good(&self) -> bool {
        matches!(
            self.outcome,
            Outcome::Ran(End::Succeeded { .. }) | Outcome::Reused { .. }
        )
    }
}

/// In a line: which stages failed, and how.
fn why(stages: &[StageReport]) -> Option<String> {
    let failed: Vec<String> = stages
        .iter()
        .filter(|stage| !stage.is_good())
        .filter_map(|stage| match &stage.outcome {
            Outcome::Ran(end) => {
                let message = end
                    .message()
                    .map_or_else(String::new, |message| format!(": {message}"));
                Some(format!("{}: {}{message}", stage.name, end.reason()))
            }
            _ => None,
        })
        .collect();
    (!failed.is_empty()).then(|| failed.join("; "))
}

fn new_run(plan: &Plan, roles: &[Role], options: &Options) -> NewRun {
    // Beside the plan itself, what `resume` has to know of the stages' parts.
    let mut resolved = serde_json::to_value(plan).unwrap_or_default();
    let forced = plan
        .stages
        .iter()
        .zip(roles)
        .filter(|(_, role)| **role == Role::Forced);
    if options.cluster.is_some() {
        resolved["executor"] = "slurm".into();
        resolved["slurm"] = options.slurm.clone().into();
    }
    resolved["forced"] = forced.map(|(stage, _)| stage.name.as_str()).collect();
    NewRun {
        recipe_name: plan.name.clone(),
        recipe_path: plan.path.display().to_string(),
        recipe_text: plan.text.clone(),
        resolved,
        params: params(plan),
        seed: plan.seed,
        command: options.command.clone(),
        resumed_from: options.resumed_from.clone(),
        environment: options.environment.clone(),
        sweep: options.sweep.clone(),
    }
}

/// Every resolved value of a plan with its origin, under its path in a recipe.
fn params(plan: &Plan) -> Vec<Param> {
    let mut params = vec![Param {
        path: "seed".into(),
        value: plan.seed.into(),
        origin: seed_origin(plan),
    }];
    for stage in &plan.stages {
        let value = serde_json::to_value(stage).unwrap_or_default();
        for (pointer, origin) in &stage.origins {
            // Options stand beside the reserved keys in a recipe. An origin may belong to what is no field of a
            // planned stage (`plugin` is more than its name there).
            let Some(value) = value.pointer(pointer) else {
                continue;
            };
            let value = match pointer.as_str() {
                "/plugin" => stage.plugin.name.clone().into(),
                "/workers" => stage.workers.len().max(1).into(),
                _ => value.clone(),
            };
            if value.is_object() {
                continue;
            }
            let inner = pointer
                .strip_prefix("/options")
                .unwrap_or(pointer)
                .replace('/', ".");
            params.push(Param {
                path: format!("stages.{}{inner}", stage.name),
                value,
                origin: origin.to_string(),
            });
        }
    }
    params
}

/// Where the recipe's own seed came from, which a plan does not say.
fn seed_origin(plan: &Plan) -> String {
    if plan.set.iter().any(|set| set.starts_with("seed=")) {
        return "--set".into();
    }
    let line = plan.text.lines().position(|line| line.starts_with("seed:"));
    line.map_or_else(|| "default".into(), |line| format!("recipe:{}", line + 1))
}

/// The files that options name, by stage, for the stages that may run.
async fn sources(
    plan: &Plan,
    roles: &[Role],
    store: &Store,
) -> Result<HashMap<String, Vec<Source>>, ExecutorError> {
    let mut known: HashMap<&std::path::Path, Snapshot> = HashMap::new();
    let mut sources: HashMap<String, Vec<Source>> = HashMap::new();
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
                        .snapshot(&file.path, file.kind, Memory::Trusted)
                        .await?
                }
            };
            known.insert(&file.path, snapshot.clone());
            sources.entry(stage.name.clone()).or_default().push(Source {
                pointer: file.pointer.clone(),
                path: file.path.clone(),
                kind: file.kind,
                snapshot,
            });
        }
    }
    Ok(sources)
}

/// The stages of a run on their way.
struct Scheduler<'p> {
    plan: &'p Plan,
    options: &'p Options,
    run: RunId,
    context: Arc<RunContext>,
    sources: HashMap<String, Vec<Source>>,
    entries: Vec<StageEntry<'p>>,
    stop: watch::Sender<Stop>,
    signal: Option<i32>,
    failed: bool,
    /// Whether it has come to its rung, and is being stopped.
    is_judged: bool,
    /// Whether jobs are left to the cluster.
    detached: bool,
    /// Where somebody is asked, the answer.
    answer: Option<oneshot::Receiver<Choice>>,
    workers: JoinSet<(usize, Duration, Result<StageEnd, ExecutorError>)>,
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

/// What is known of a stage once its inputs are there.
struct ResolvedStage {
    digest: Digest,
    inputs: BTreeMap<String, Input>,
}

/// From where a stage is worked on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    /// From nothing, whatever earlier attempts left.
    Anew,
    /// From what an earlier attempt left, if there is any.
    AsLeft,
    /// The same, unless another process has made it in the meantime.
    AsLeftOrReused,
}

/// What came of giving a stage to a worker.
enum StageEnd {
    Made(Ended),
    /// Another process has made it meanwhile.
    Reused(Success),
    /// The run was stopped while it waited.
    Stopped,
}

impl<'p> Scheduler<'p> {
    async fn open(
        plan: &'p Plan,
        roles: &[Role],
        sources: HashMap<String, Vec<Source>>,
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
            stop,
            signal: None,
            failed: false,
            is_judged: false,
            detached: false,
            answer: None,
            workers,
        })
    }

    /// Runs everything that can be run.
    async fn work(&mut self, mut signals: Follower) -> Result<(), ExecutorError> {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.settle().await?;
            self.launch();
            if self.workers.is_empty() || self.detached {
                return Ok(());
            }
            let leaves = matches!(self.options.leave, Leave::WhenSubmitted)
                && self.context.cluster.is_some();
            tokio::select! {
                Ok(choice) = answer(&mut self.answer) => {
                    self.answer = None;
                    match choice {
                        Choice::Detach => self.leave(libc::SIGINT),
                        Choice::Cancel => self.interrupt(libc::SIGINT),
                        Choice::GoOn => {}
                    }
                }
                () = tokio::time::sleep(LEAVE), if leaves && self.signal.is_none() => {
                    if self.context.store.is_submitted(&self.run).await? {
                        self.detached = true;
                    }
                }
                Some(ended) = self.workers.join_next() => self.record_end(ended).await?,
                signal = signals.next() => self.interrupt_or_leave(signal),
                () = self.context.reached.notified(), if !self.is_judged => {
                    self.is_judged = true;
                    // Who is in a hurry already stays so.
                    self.stop.send_if_modified(|stop| {
                        let asks = *stop == Stop::No;
                        *stop = (*stop).max(Stop::AtCheckpoint);
                        asks
                    });
                }
                _ = heartbeat.tick() => {
                    if let Err(error) = self.context.store.heartbeat(&self.run).await {
                        tracing::debug!("heartbeat: {error}");
                    }
                }
            }
        }
    }

    /// Finds out, in the plan's order, which waiting stages are reused, ready or blocked.
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

    /// The inputs of a stage, if they are there.
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
            let Some(source) = self
                .entries
                .iter()
                .find(|entry| entry.stage.name == reference.stage)
            else {
                return Resolution::Blocked(reference.stage.clone());
            };
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
        success: Success,
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

    /// Gives ready stages to workers, in the plan's order, as far as there is room.
    fn launch(&mut self) {
        let stopping =
            self.signal.is_some() || self.is_judged || (self.failed && !self.options.keep_going);
        for index in 0..self.entries.len() {
            if stopping || self.workers.len() >= self.options.jobs.get() {
                return;
            }
            let threads = self.threads(index);
            let entry = &mut self.entries[index];
            let (Some(id), State::Ready(_)) = (entry.id, &entry.state) else {
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
                inputs,
            };
            let (context, stop) = (Arc::clone(&self.context), self.stop.subscribe());
            let start = match (entry.role, &self.options.resumed_from) {
                (Role::Forced, None) => Start::Anew,
                (Role::Forced, Some(_)) => Start::AsLeft,
                _ => Start::AsLeftOrReused,
            };
            self.workers.spawn(async move {
                let (began, paused) = (Instant::now(), context.pauses.total());
                let run_stage = run_stage(&context, &mut spec, stop, start).await;
                (index, context.pauses.worked(began, paused), run_stage)
            });
        }
    }

    /// The threads of a stage: its share among those that may run beside it, which are the unfinished ones that neither
    /// need it nor are needed by it.
    fn threads(&self, index: usize) -> usize {
        let beside = (0..self.entries.len())
            .filter(|&other| {
                matches!(
                    self.entries[other].state,
                    State::Waiting | State::Ready(_) | State::Running
                )
            })
            .filter(|&other| {
                other != index && !self.leads_to(index, other) && !self.leads_to(other, index)
            })
            .count();
        let stages = self.options.jobs.get().min(beside + 1);
        let runs = self.options.runs.get();
        self.entries[index].stage.threads.count(stages * runs)
    }

    /// Whether a stage needs, perhaps through others, what an earlier one makes.
    fn leads_to(&self, earlier: usize, later: usize) -> bool {
        let name = &self.entries[earlier].stage.name;
        self.entries[later]
            .stage
            .references
            .iter()
            .any(|reference| {
                let between = self.entries[..later]
                    .iter()
                    .position(|entry| entry.stage.name == reference.stage);
                reference.stage == *name
                    || between.is_some_and(|between| self.leads_to(earlier, between))
            })
    }

    /// Takes note of what came of a stage.
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
                // Its digest is computed again: it went into the worker's spec.
                match self.resolve_inputs(index) {
                    Resolution::Ready(ready) => self.reuse(index, &ready.digest, success).await?,
                    _ => State::Waiting,
                }
            }
            StageEnd::Made(Ended {
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

    /// Jobs of a cluster need neither this process nor a terminal: where these go, jobs stay. Ctrl-C may mean both.
    fn interrupt_or_leave(&mut self, signal: i32) {
        if self.context.cluster.is_none() || self.signal.is_some() {
            return self.interrupt(signal);
        }
        match (&self.options.leave, signal) {
            (_, libc::SIGHUP | libc::SIGTERM) | (Leave::WhenSubmitted, _) => self.leave(signal),
            // Twice is an answer.
            (Leave::Ask(ask), _) if self.answer.is_none() => {
                let (tell, answer) = oneshot::channel();
                let ask = Arc::clone(ask);
                // A thread that nobody waits for: it may never get an answer.
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

    /// Ctrl-C or its like: the first time workers are asked to stop, the second time they are made to. A closed terminal
    /// is told twice, by the kernel and by the shell, and nobody is impatient there.
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

    fn report(self) -> Vec<StageReport> {
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

fn new_stage(stage: &PlannedStage, position: usize) -> NewStage {
    let plugin = &stage.plugin;
    NewStage {
        name: stage.name.clone(),
        kind: stage.kind.clone(),
        position,
        plugin: PluginIdentity {
            name: plugin.name.clone(),
            version: plugin.version.clone(),
            hash: plugin.hash.clone(),
        },
        device: stage.device.clone(),
        dtype: stage.dtype.clone(),
        seed: stage.seed,
        options: stage.options.clone(),
        inputs: stage
            .references
            .iter()
            .map(|one| (one.pointer.clone(), one.stage.clone()))
            .collect(),
    }
}

/// A successful attempt with this digest whose output is still there.
async fn find_success(context: &RunContext, digest: &str) -> Result<Option<Success>, StoreError> {
    let found = context.store.find_success(digest).await?;
    Ok(found.filter(|success| context.layout.holds(&success.output)))
}

/// Gives a stage to a worker, as soon as no other process works on the same.
async fn run_stage(
    context: &RunContext,
    spec: &mut AttemptSpec,
    mut stop: watch::Receiver<Stop>,
    start: Start,
) -> Result<StageEnd, ExecutorError> {
    let mut told = false;
    let work: Work = loop {
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
            () = tokio::time::sleep(WAIT_FOR_OTHERS) => {}
        }
    };
    // Between the moment when the stage was found to be not there and this one another run may have made it.
    if start == Start::AsLeftOrReused
        && let Some(success) = find_success(context, &spec.digest.hex).await?
    {
        return Ok(StageEnd::Reused(success));
    }
    if start == Start::Anew {
        empty(work.path())?;
    }
    for source in &mut spec.sources {
        if let Err(message) = source.begin(&context.store).await {
            let end = End::InputChanged { message };
            return Ok(StageEnd::Made(attempt::refuse(context, spec, end).await?));
        }
    }
    let ended = attempt::run(context, spec, stop).await?;
    // A checkpoint of other data would be taken up as one of these.
    if ended.tainted || matches!(ended.end, End::Succeeded { .. }) {
        work.remove();
    }
    Ok(StageEnd::Made(ended))
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

/// Waits for an answer; for ever where nobody was asked.
async fn answer(
    asked: &mut Option<oneshot::Receiver<Choice>>,
) -> Result<Choice, oneshot::error::RecvError> {
    match asked {
        Some(asked) => asked.await,
        None => std::future::pending().await,
    }
}
