//! One attempt at a stage: a worker is started, heard and, when its time has come, ended.
//!
//! In: a stage whose inputs are known. Out: how the attempt ended ([`End`]), with everything it did in the store. A stage
//! that is divided has a worker more for each part: these work first, at the same time; when all have ended well, the
//! worker of the whole takes over what they made. Whatever a plugin does to its process arrives here as an [`End`] with a
//! reason of its own; only a store that cannot be written to is an error. Deliberately absent: which stage runs when, and
//! reuse.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use retort_abi::{Failure, FailureCode, Input, LogLevel, Part, StageJob, StageResult};
use serde_json::Value;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::artifact::{Layout, Staging};
use crate::cluster::dispatch::Dispatcher;
use crate::cluster::{ElementEvent, Ended as ClusterEnd};
use crate::executor::handle::{self, Cluster, Placement, WorkerHandle};
use crate::executor::pause::Pauses;
use crate::executor::recorder::{Recorder, own_line};
use crate::executor::source::Source;
use crate::executor::{Event, Listener, Rung};
use crate::frame::{Answer, Call, FromWorker, Points, Progress, Task, ToWorker};
use crate::plan::{Digest, PlannedStage};
use crate::store::{
    ArtifactRecord, AttemptEnd, AttemptId, AttemptState, LogLine, LogSource, StageId, Store,
    StoreError, Time, Usage,
};
use crate::worker::death::Death;
use crate::worker::process::{Exit, ExitStatus, WorkerEvent, signal_name};

/// From SIGTERM to SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(5);

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
    pub pauses: Arc<Pauses>,
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

/// How an attempt ended: each way is a reason of its own in the history.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// It made what it was to make.
    Succeeded {
        /// The artifact that references to the stage stand for.
        output: Box<ArtifactRecord>,
        /// Facts it returned.
        summary: Value,
    },
    /// The plugin says why not.
    Failed(Failure),
    /// The plugin panicked, and said so.
    Panicked(Failure),
    /// The plugin could not be loaded.
    NotLoaded {
        /// Why.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// The process finished without a result, or a signal ended it that we did not send.
    Died(Death),
    /// A file that it reads changed.
    InputChanged {
        /// Which, and when.
        message: String,
    },
    /// It took longer than the recipe allows.
    TimedOut {
        /// So long.
        limit: Duration,
        /// How it stopped.
        manner: Manner,
    },
    /// The user stopped it.
    Interrupted {
        /// How it stopped.
        manner: Manner,
    },
    /// Something happened to it that only happens on a cluster.
    Cluster(ClusterEnd),
    /// What it sent makes no sense.
    Protocol {
        /// What.
        message: String,
    },
}

/// How an attempt that was told to stop did so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// By itself, having saved its work.
    AtCheckpoint,
    /// By this signal.
    Signalled(i32),
    /// It ended in some other way just then.
    Otherwise,
}

impl End {
    /// In one word.
    pub fn state(&self) -> AttemptState {
        match self {
            Self::Succeeded { .. } => AttemptState::Succeeded,
            Self::Interrupted { .. } => AttemptState::Interrupted,
            _ => AttemptState::Failed,
        }
    }

    /// Precisely, in few words; stable, to be searched for.
    pub fn reason(&self) -> String {
        match self {
            Self::Succeeded { .. } => "succeeded".into(),
            Self::Failed(failure) => format!("failed: {}", code_name(failure.code)),
            Self::Panicked(_) => "panic".into(),
            Self::NotLoaded { .. } => "plugin not loaded".into(),
            Self::Died(death) => death.reason(),
            Self::InputChanged { .. } => "input changed".into(),
            Self::TimedOut { .. } => "timeout".into(),
            Self::Interrupted { .. } => "interrupted".into(),
            Self::Cluster(end) => end.reason.clone(),
            Self::Protocol { .. } => "protocol error".into(),
        }
    }

    /// What happened, for people; `None` when it went well.
    pub fn message(&self) -> Option<String> {
        Some(match self {
            Self::Succeeded { .. } => return None,
            Self::Failed(failure) | Self::Panicked(failure) => {
                let place = failure
                    .pointer
                    .as_deref()
                    .filter(|pointer| !pointer.is_empty());
                let place = place.map_or_else(String::new, |pointer| format!("option {pointer}: "));
                let chain = failure
                    .chain
                    .iter()
                    .map(|cause| format!("; because {cause}"))
                    .collect::<String>();
                format!("{place}{}{chain}", failure.message)
            }
            Self::NotLoaded { message, .. }
            | Self::InputChanged { message }
            | Self::Protocol { message } => message.clone(),
            Self::Cluster(end) => end.message.clone(),
            Self::Died(death) => death.message().into(),
            Self::TimedOut { limit, manner } => {
                format!(
                    "it took longer than its timeout of {}, and {manner}",
                    humantime::format_duration(*limit)
                )
            }
            Self::Interrupted { manner } => format!("interrupted; it {manner}"),
        })
    }

    /// What to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Failed(failure) | Self::Panicked(failure) => failure.hint.clone(),
            Self::NotLoaded { hint, .. } => hint.clone(),
            Self::Cluster(end) => end.hint.clone(),
            Self::Died(death) => death.hint().map(str::to_owned),
            Self::InputChanged { .. } => Some(
                "run again once nothing writes to it; nothing that this stage made is used".into(),
            ),
            Self::TimedOut { .. } => Some(
                "raise the stage's `timeout`; `retort resume` continues from its last checkpoint"
                    .into(),
            ),
            _ => None,
        }
    }
}

impl std::fmt::Display for Manner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtCheckpoint => f.write_str("stopped at a checkpoint"),
            Self::Signalled(signal) => {
                write!(
                    f,
                    "was ended with {}; what it did since its last checkpoint is lost",
                    signal_name(*signal)
                )
            }
            Self::Otherwise => f.write_str("ended without a result"),
        }
    }
}

/// The code of a failure as it is written in JSON.
fn code_name(code: FailureCode) -> String {
    serde_json::to_value(code)
        .ok()
        .and_then(|name| Some(name.as_str()?.to_owned()))
        .unwrap_or_default()
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

/// What two processes took that ran at the same time.
fn beside(one: Usage, other: Usage) -> Usage {
    Usage {
        cpu_seconds: sum(one.cpu_seconds, other.cpu_seconds),
        max_rss: sum(one.max_rss, other.max_rss),
    }
}

/// What two processes took of which one ran after the other.
fn after(one: Usage, other: Usage) -> Usage {
    Usage {
        cpu_seconds: sum(one.cpu_seconds, other.cpu_seconds),
        max_rss: one.max_rss.max(other.max_rss),
    }
}

/// Of what is known.
fn sum<T: std::ops::Add<Output = T>>(one: Option<T>, other: Option<T>) -> Option<T> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one + other),
        (one, other) => one.or(other),
    }
}

/// An attempt under way.
struct Supervisor<'a> {
    context: &'a RunContext,
    spec: &'a AttemptSpec,
    attempt: AttemptId,
    recorder: &'a Recorder,
    stop: watch::Receiver<Stop>,
    deadline: Option<Instant>,
    /// How long the run had been stopped when the attempt began.
    paused: Duration,
    part_progress: PartProgress,
    /// Threads of each worker on a cluster; none on this machine.
    cpus: Option<usize>,
    /// The process of the whole on this machine, else 0.
    pid: u32,
    /// Whether it has been told that a worker is at work.
    began: AtomicBool,
}

/// A worker that has finished.
struct FinishedWorker {
    part: Option<Part>,
    received: Received,
    shutdown: ShutdownSequence,
    exit: Exit,
}

impl FinishedWorker {
    /// Whether the part has been done.
    fn is_done(&self) -> bool {
        matches!(self.received.answer, Some(Ok(_))) && self.received.protocol_error.is_none()
    }

    /// Whether it ended only because another one did, with which it worked together.
    fn was_left_alone(&self) -> bool {
        matches!(&self.received.answer, Some(Err(failure)) if failure.retryable)
    }

    /// Whether it ended by itself.
    fn has_own_fault(&self) -> bool {
        match &self.received.answer {
            Some(Err(failure)) => failure.code != FailureCode::Cancelled && !failure.retryable,
            Some(Ok(_)) => false,
            None => self.shutdown.sent.is_none(),
        }
    }

    /// Whether this says more than another part about why the attempt failed: the first to fail is the reason, but not
    /// where it was left alone by this one, and of those that were told to stop the one that had to be made to.
    fn is_graver_than(&self, other: &FinishedWorker) -> bool {
        if other.was_left_alone() && self.has_own_fault() {
            return true;
        }
        let signalled = |finished: &FinishedWorker| finished.shutdown.sent.is_some();
        self.shutdown.cause == other.shutdown.cause && signalled(self) && !signalled(other)
    }
}

impl Supervisor<'_> {
    /// Tells, once, that a worker is at work.
    fn began(&self) {
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

    /// Has the parts done, all at the same time. When one fails, the others are stopped, and it is returned.
    async fn run_parts(
        &self,
        parts: Vec<(Part, WorkerHandle)>,
    ) -> Result<(Option<FinishedWorker>, Usage), StoreError> {
        let halt = watch::Sender::new(Stop::No);
        let mut under_way: FuturesUnordered<_> = parts
            .into_iter()
            .map(|(part, worker)| self.supervise(worker, Some(part), halt.subscribe()))
            .collect();
        let (mut fault, mut usage) = (None::<FinishedWorker>, Usage::default());
        while let Some(finished) = under_way.next().await {
            let finished = finished?;
            usage = beside(usage, finished.exit.usage);
            if finished.is_done() {
                continue;
            }
            halt.send_replace(Stop::AtCheckpoint);
            if fault
                .as_ref()
                .is_none_or(|fault| finished.is_graver_than(fault))
            {
                fault = Some(finished);
            }
        }
        Ok((fault, usage))
    }

    /// Tells a worker what to do, and hears it until it has finished. `halt` stops it as the user does.
    async fn supervise(
        &self,
        mut worker: WorkerHandle,
        part: Option<Part>,
        mut halt: watch::Receiver<Stop>,
    ) -> Result<FinishedWorker, StoreError> {
        let sent = worker
            .send(&ToWorker::Start(Box::new(self.task(part))))
            .await;
        let mut handler = EventHandler {
            supervisor: self,
            part,
            received: Received::default(),
        };
        if let Err(error) = sent {
            let _ = handler.protocol_error(error.to_string());
            worker.signal(libc::SIGKILL);
        }
        let mut shutdown = ShutdownSequence::new(self.context.grace);
        let mut stop = self.stop.clone();
        // On a cluster it is time at work that counts.
        let here = self.cpus.is_none();
        let (mut deadline, mut paused) = (self.deadline.filter(|_| here), self.paused);
        let exit = loop {
            let pause = self.context.pauses.total() - paused;
            (deadline, paused) = (deadline.map(|at| at + pause), paused + pause);
            shutdown.next = shutdown.next.map(|at| at + pause);
            // A timer that goes off during a pause does not know of it.
            let in_time = || self.context.pauses.total() == paused;
            tokio::select! {
                event = self.next_event(&mut worker) => match event {
                    WorkerEvent::Exited(exit) => break exit,
                    event => {
                        if let (WorkerEvent::Remote(ElementEvent::Began), Some(limit)) = (&event, self.spec.stage.timeout) {
                            deadline = Some(Instant::now() + limit);
                        }
                        if handler.take(event).await? .is_break() {
                            worker.signal(libc::SIGKILL);
                        }
                    }
                },
                Ok(()) = stop.changed() => {
                    let level = *stop.borrow_and_update();
                    shutdown.interrupt(level, &mut worker).await;
                }
                Ok(()) = halt.changed() => {
                    let level = *halt.borrow_and_update();
                    shutdown.interrupt(level, &mut worker).await;
                }
                () = sleep_until(deadline), if shutdown.cause.is_none() => if in_time() {
                    shutdown.begin(Cause::Timeout, &mut worker).await;
                },
                () = sleep_until(shutdown.next) => if in_time() {
                    shutdown.escalate(&worker);
                },
            }
        };
        Ok(FinishedWorker {
            part,
            received: handler.received,
            shutdown,
            exit,
        })
    }

    /// What a worker does next, once there is room for what it may have to record.
    async fn next_event(&self, worker: &mut WorkerHandle) -> WorkerEvent {
        self.recorder.room().await;
        worker.next().await
    }

    /// What a worker is told to do.
    fn task(&self, part: Option<Part>) -> Task {
        let (stage, spec) = (&self.spec.stage, self.spec);
        let job = StageJob {
            stage: stage.name.clone(),
            kind: stage.kind.clone(),
            options: stage.options.clone(),
            seed: stage.seed,
            // A job has devices of its own, which begin with the first.
            device: match self.cpus {
                Some(_) => stage.device.clone(),
                None => spec.device_of(part).to_owned(),
            },
            dtype: stage.dtype.clone(),
            threads: self.cpus.unwrap_or_else(|| spec.threads_of(part)),
            base_dir: spec.base_dir.clone(),
            work_dir: Some(spec.work_dir.clone()),
            inputs: spec.inputs.clone(),
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

/// What each part said last of its progress.
#[derive(Default)]
struct PartProgress(Mutex<BTreeMap<usize, Progress>>);

impl PartProgress {
    /// How far the stage is when one of its workers is so far. Parts add up; the whole begins where they ended.
    fn together(&self, part: Option<Part>, mut progress: Progress) -> Progress {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = part {
            told.insert(part.index, progress.clone());
            (progress.done, progress.total) = (0, 0);
        }
        let alike = told.values().filter(|other| other.unit == progress.unit);
        let (done, total) = alike.fold((0, 0), |(done, total), other| {
            (done + other.done, total + other.total)
        });
        progress.done = progress.done.max(done);
        progress.total = progress.total.max(total);
        progress
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

/// What has been heard so far from a worker.
struct EventHandler<'a> {
    supervisor: &'a Supervisor<'a>,
    part: Option<Part>,
    received: Received,
}

#[derive(Default)]
struct Received {
    answer: Option<Result<StageResult, Failure>>,
    not_loaded: Option<(String, Option<String>)>,
    protocol_error: Option<String>,
    cluster: Option<ClusterEnd>,
    artifacts: BTreeMap<u64, ArtifactRecord>,
    last_words: std::collections::VecDeque<String>,
}

impl EventHandler<'_> {
    async fn take(&mut self, event: WorkerEvent) -> Result<ControlFlow<()>, StoreError> {
        let supervisor = self.supervisor;
        match event {
            WorkerEvent::Frame(FromWorker::Metrics(mut series)) => {
                // Parts have the same series: each keeps its own. Of those that work together one tells.
                if let Some(part) = self.part.filter(|_| !supervisor.spec.stage.together) {
                    for points in &mut series {
                        points.series.push_str(&format!("/part-{}", part.index + 1));
                    }
                }
                supervisor.context.judge(&supervisor.spec.stage.name, &series);
                supervisor.recorder.points(series);
            }
            WorkerEvent::Frame(FromWorker::Log(lines)) => {
                for line in lines {
                    let (level, text) = (line.level, line.text);
                    self.say(LogLine {
                        at: Time(line.at),
                        level,
                        source: LogSource::Plugin,
                        text,
                    });
                }
            }
            WorkerEvent::Line(source, text) => {
                let line = LogLine {
                    at: Time::now(),
                    level: LogLevel::Debug as u32,
                    source,
                    text,
                };
                self.wrote(line);
            }
            WorkerEvent::Remote(news) => match news {
                ElementEvent::Began => supervisor.began(),
                ElementEvent::Line(line) => self.wrote(line),
                ElementEvent::ReadTo {
                    job,
                    element,
                    number,
                } => supervisor.recorder.mark(job, element, number),
                ElementEvent::Ended(end) => self.received.cluster = Some(end),
            },
            WorkerEvent::Frame(FromWorker::Progress(progress)) => {
                (supervisor.context.listener)(Event::Progress {
                    stage: supervisor.spec.stage.name.clone(),
                    progress: supervisor.part_progress.together(self.part, progress),
                });
            }
            WorkerEvent::Frame(FromWorker::Artifact { id, record }) => {
                let store = &supervisor.context.store;
                store.record_artifact(supervisor.attempt, &record).await?;
                self.received.artifacts.insert(id, *record);
            }
            WorkerEvent::Frame(FromWorker::Answer(Answer::Result(result))) => {
                self.received.answer = Some(Ok(result))
            }
            WorkerEvent::Frame(FromWorker::Failed(failure)) => self.received.answer = Some(Err(failure)),
            WorkerEvent::Frame(FromWorker::NotLoaded { message, hint }) => {
                self.received.not_loaded = Some((message, hint))
            }
            WorkerEvent::Frame(FromWorker::Late { calls }) => self.say(own_line(
                LogLevel::Warn,
                format!("the plugin called the host {calls} times after `run` had returned; nobody heard it"),
            )),
            WorkerEvent::Frame(FromWorker::Loaded) => {}
            WorkerEvent::Frame(FromWorker::Answer(_)) => {
                return Ok(self.protocol_error("an answer to another question".into()));
            }
            WorkerEvent::Malformed(error) => return Ok(self.protocol_error(error.to_string())),
            WorkerEvent::Exited(_) => {}
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Something that the worker, or what it started, wrote.
    fn wrote(&mut self, line: LogLine) {
        if line.source == LogSource::Stderr {
            if self.received.last_words.len() == 8 {
                self.received.last_words.pop_front();
            }
            self.received.last_words.push_back(line.text.clone());
        }
        self.say(line);
    }

    fn say(&self, mut line: LogLine) {
        line.text.insert_str(0, &title(self.part));
        (self.supervisor.context.listener)(Event::Line {
            stage: self.supervisor.spec.stage.name.clone(),
            line: line.clone(),
        });
        self.supervisor.recorder.line(line);
    }

    fn protocol_error(&mut self, what: String) -> ControlFlow<()> {
        self.received.protocol_error = Some(format!("the worker sent what makes no sense: {what}"));
        ControlFlow::Break(())
    }
}

impl Received {
    /// How the attempt ended, from everything that was seen of it.
    fn judge(
        &self,
        exit: ExitStatus,
        shutdown: ShutdownSequence,
        spec: &AttemptSpec,
        out_of_memory: bool,
    ) -> End {
        if let Some((message, hint)) = &self.not_loaded {
            return End::NotLoaded {
                message: message.clone(),
                hint: hint.clone(),
            };
        }
        if let Some(message) = &self.protocol_error {
            return End::Protocol {
                message: message.clone(),
            };
        }
        // A whole result counts, even when it came while the stage was being stopped, or just before a crash on leaving.
        if let Some(Ok(result)) = &self.answer {
            return self.judge_result(result, &spec.stage.output_kind);
        }
        if let Some(end) = &self.cluster {
            return End::Cluster(end.clone());
        }
        match (&self.answer, exit, shutdown.cause) {
            (Some(Err(failure)), _, Some(cause)) if failure.code == FailureCode::Cancelled => {
                cause.end(Manner::AtCheckpoint, spec.stage.timeout)
            }
            (Some(Err(failure)), _, _) if failure.code == FailureCode::Panic => {
                End::Panicked(failure.clone())
            }
            (Some(Err(failure)), _, _) => End::Failed(failure.clone()),
            (_, ExitStatus::Signal(signal), Some(cause)) if shutdown.sent == Some(signal) => {
                cause.end(Manner::Signalled(signal), spec.stage.timeout)
            }
            // With a signal of ours on its way, a plugin's own handler may have turned it into an exit.
            (_, ExitStatus::Code(_), Some(cause)) if shutdown.sent.is_some() => {
                cause.end(Manner::Otherwise, spec.stage.timeout)
            }
            _ => {
                let last_words = self.last_words.iter().map(String::as_str);
                End::Died(Death::new(exit, last_words, out_of_memory))
            }
        }
    }

    fn judge_result(&self, result: &StageResult, kind: &str) -> End {
        let message = match self.artifacts.get(&result.output) {
            Some(output) if output.kind == kind => {
                return End::Succeeded {
                    output: Box::new(output.clone()),
                    summary: result.summary.clone(),
                };
            }
            Some(output) => format!(
                "the stage's output is a `{}`, but the plugin's description promises a `{kind}`",
                output.kind
            ),
            None => format!(
                "the stage's output is artifact {}, which was not committed",
                result.output
            ),
        };
        End::Protocol { message }
    }
}

/// Why a worker is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The user wants it, or another part has failed.
    Interrupt,
    /// It takes too long.
    Timeout,
}

impl Cause {
    fn end(self, manner: Manner, limit: Option<Duration>) -> End {
        match self {
            Self::Interrupt => End::Interrupted { manner },
            Self::Timeout => End::TimedOut {
                limit: limit.unwrap_or_default(),
                manner,
            },
        }
    }
}

/// Stopping a worker, step by step: it is asked, then SIGTERM, then SIGKILL.
#[derive(Debug, Clone, Copy)]
struct ShutdownSequence {
    grace: Duration,
    cause: Option<Cause>,
    /// The last signal sent.
    sent: Option<i32>,
    /// When to take the next step.
    next: Option<Instant>,
}

impl ShutdownSequence {
    fn new(grace: Duration) -> Self {
        Self {
            grace,
            cause: None,
            sent: None,
            next: None,
        }
    }

    /// The first step: asks the plugin to stop at its next checkpoint.
    async fn begin(&mut self, cause: Cause, worker: &mut WorkerHandle) {
        if self.cause.is_none() {
            self.cause = Some(cause);
            self.next = Some(Instant::now() + self.grace);
            // A message without paths can be written.
            let _ = worker.send(&ToWorker::CancelAtCheckpoint).await;
        }
    }

    /// What the user wants.
    async fn interrupt(&mut self, level: Stop, worker: &mut WorkerHandle) {
        match level {
            Stop::No => {}
            Stop::AtCheckpoint => self.begin(Cause::Interrupt, worker).await,
            Stop::Now => {
                self.cause.get_or_insert(Cause::Interrupt);
                self.signal(libc::SIGKILL, worker);
            }
        }
    }

    /// The next step.
    fn escalate(&mut self, worker: &WorkerHandle) {
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

/// Sleeps until a moment; for ever without one.
async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// How often the kernel has killed a process because memory ran out, since it started; 0 where that is not known.
pub(crate) fn out_of_memory_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{PluginIdentity, Threads};
    use serde_json::json;

    fn spec() -> AttemptSpec {
        AttemptSpec {
            stage: PlannedStage {
                name: "s".into(),
                kind: "make".into(),
                description: None,
                plugin: PluginIdentity {
                    name: "p".into(),
                    path: PathBuf::new(),
                    version: "1".into(),
                    hash: String::new(),
                },
                device: "cpu".into(),
                dtype: "f32".into(),
                threads: Threads::Share,
                workers: Vec::new(),
                together: false,
                seed: 0,
                timeout: Some(Duration::from_secs(60)),
                options: json!({}),
                references: Vec::new(),
                files: Vec::new(),
                output_kind: "thing".into(),
                revision: 0,
                origins: BTreeMap::new(),
                position: None,
            },
            id: StageId(1),
            digest: Digest {
                hex: String::new(),
                components: json!({}),
            },
            base_dir: PathBuf::new(),
            threads: 1,
            inputs: BTreeMap::new(),
            sources: Vec::new(),
            work_dir: PathBuf::new(),
        }
    }

    fn shutdown(cause: Option<Cause>, sent: Option<i32>) -> ShutdownSequence {
        ShutdownSequence {
            cause,
            sent,
            ..ShutdownSequence::new(Duration::ZERO)
        }
    }

    #[track_caller]
    fn check(
        received: Received,
        exit: ExitStatus,
        shutdown: ShutdownSequence,
        reason: &str,
        message: &str,
    ) {
        let end = received.judge(exit, shutdown, &spec(), false);
        assert_eq!(end.reason(), reason);
        assert!(
            end.message().unwrap_or_default().contains(message),
            "{:?}",
            end.message()
        );
    }

    fn failed(code: FailureCode) -> Received {
        Received {
            answer: Some(Err(Failure::new(code, "why"))),
            ..Received::default()
        }
    }

    fn made(kind: &str, output: u64) -> Received {
        let record = ArtifactRecord {
            hash: "h".into(),
            kind: kind.into(),
            name: "n".into(),
            size: 0,
            files: Vec::new(),
            meta: Default::default(),
        };
        Received {
            answer: Some(Ok(StageResult {
                output,
                summary: Value::Null,
            })),
            artifacts: BTreeMap::from([(1, record)]),
            ..Received::default()
        }
    }

    #[test]
    fn every_end_has_its_own_reason() {
        use ExitStatus::{Code, Signal};
        let free = shutdown(None, None);
        check(made("thing", 1), Code(0), free, "succeeded", "");
        check(
            made("thing", 1),
            Signal(libc::SIGSEGV),
            free,
            "succeeded",
            "",
        );
        check(
            made("thing", 2),
            Code(0),
            free,
            "protocol error",
            "artifact 2, which was not committed",
        );
        check(
            made("other", 1),
            Code(0),
            free,
            "protocol error",
            "promises a `thing`",
        );
        check(
            failed(FailureCode::BadData),
            Code(0),
            free,
            "failed: bad_data",
            "why",
        );
        check(failed(FailureCode::Panic), Code(0), free, "panic", "why");
        check(
            failed(FailureCode::Cancelled),
            Code(0),
            free,
            "failed: cancelled",
            "why",
        );
        check(
            Received::default(),
            Signal(libc::SIGSEGV),
            free,
            "killed by SIGSEGV",
            "memory that is not its own",
        );
        check(
            Received::default(),
            Signal(libc::SIGABRT),
            free,
            "killed by SIGABRT",
            "abort",
        );
        check(
            Received::default(),
            Signal(libc::SIGKILL),
            free,
            "killed by SIGKILL",
            "memory runs out",
        );
        check(
            Received::default(),
            Code(3),
            free,
            "exited with code 3",
            "without a result",
        );
    }

    #[test]
    fn being_stopped_is_told_from_failing() {
        use ExitStatus::{Code, Signal};
        for (cause, reason) in [
            (Cause::Interrupt, "interrupted"),
            (Cause::Timeout, "timeout"),
        ] {
            let asked = shutdown(Some(cause), None);
            check(
                failed(FailureCode::Cancelled),
                Code(0),
                asked,
                reason,
                "stopped at a checkpoint",
            );
            check(
                failed(FailureCode::BadData),
                Code(0),
                asked,
                "failed: bad_data",
                "why",
            );
            check(
                Received::default(),
                Signal(libc::SIGSEGV),
                asked,
                "killed by SIGSEGV",
                "",
            );
            let signalled = shutdown(Some(cause), Some(libc::SIGTERM));
            check(
                Received::default(),
                Signal(libc::SIGTERM),
                signalled,
                reason,
                "was ended with SIGTERM",
            );
            check(
                Received::default(),
                Code(143),
                signalled,
                reason,
                "ended without a result",
            );
        }
    }

    fn part(index: usize) -> Option<Part> {
        Some(Part { index, of: 2 })
    }

    #[test]
    fn parts_share_threads_and_devices() {
        let mut spec = spec();
        spec.threads = 5;
        assert_eq!(spec.parts().count(), 0);
        spec.stage.workers = vec!["cpu".into(), "cuda:1".into()];
        let parts: Vec<Option<Part>> = spec.parts().map(Some).collect();
        assert_eq!(parts, [part(0), part(1)]);
        let of = |part| (spec.threads_of(part), spec.device_of(part));
        assert_eq!(of(part(0)), (2, "cpu"));
        assert_eq!(of(part(1)), (2, "cuda:1"));
        assert_eq!(of(None), (5, "cpu"));
        assert_eq!(spec.devices(), "cpu, cuda:1");
        spec.threads = 1;
        assert_eq!(spec.threads_of(part(0)), 1);
    }

    #[test]
    fn progress_of_parts_adds_up_and_does_not_fall_back() {
        let told = PartProgress::default();
        let check = |part, (done, total, unit): (u64, u64, &str), expected| {
            let unit = unit.to_owned();
            let shown = told.together(part, Progress { done, total, unit });
            assert_eq!((shown.done, shown.total), expected);
        };
        check(part(0), (0, 60, "samples"), (0, 60));
        check(part(1), (3, 7, "captions"), (3, 7));
        check(part(0), (20, 60, "samples"), (20, 60));
        check(part(1), (0, 40, "samples"), (20, 100));
        check(part(1), (40, 40, "samples"), (60, 100));
        check(part(0), (60, 60, "samples"), (100, 100));
        check(None, (50, 100, "samples"), (100, 100));
        check(None, (1, 2, "files"), (1, 2));
    }

    #[test]
    fn the_part_that_says_most_is_the_reason() {
        let finished = |index, cause, sent| FinishedWorker {
            part: part(index),
            received: Received::default(),
            shutdown: shutdown(cause, sent),
            exit: Exit {
                status: ExitStatus::Signal(libc::SIGKILL),
                usage: Usage::default(),
                out_of_memory: None,
            },
        };
        let died = finished(0, None, None);
        let asked = finished(0, Some(Cause::Interrupt), None);
        let made_to = finished(1, Some(Cause::Interrupt), Some(libc::SIGTERM));
        assert!(!made_to.is_graver_than(&died), "it was stopped for that");
        assert!(made_to.is_graver_than(&asked));
        assert!(!asked.is_graver_than(&made_to));
    }
}
