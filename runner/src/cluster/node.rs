//! The compute node's side of a spool: supervises a worker.
//!
//! In: the directory of a job's spool, and Slurm's environment variables. Out: records in the spool. The worker is the same as
//! on the runner's machine and sends the same events; they are recorded here instead of handled. When Slurm signals ahead of
//! the time limit, the worker is asked to stop at its next checkpoint, and Slurm is asked to restart the element.
//! Deliberately absent: the store, which no compute node opens, and the runner's machine, which may be down.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use retort_abi::{FailureCode, Part};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use crate::cluster::slurm::is_unanswered;
use crate::cluster::spool::{
    self, JobSpec, NO_PROGRESS, SavedProgress, SpoolError, SpoolEvent, StartEnd, Writer,
};
use crate::frame::{Call, FromWorker, Points, Task, ToWorker};
use crate::worker::death::{ExitStatus, out_of_memory_kills};
use crate::worker::heartbeat::{self, Heartbeat};
use crate::worker::process::{Worker, WorkerEvent, WorkerExit};

/// How often to look for the file that stops a job.
const STOP_INTERVAL: Duration = Duration::from_secs(2);
/// From SIGTERM to SIGKILL for the worker, once Slurm has announced the end.
const LAST_MOMENTS: Duration = Duration::from_secs(20);
/// How long to retry records that cannot be written.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often a controller that does not answer is asked for a restart.
const REQUEUE_INTERVAL: Duration = Duration::from_secs(5);
/// Bytes that may wait to be written; beyond that, metrics and lines are dropped.
const MOST_PENDING: usize = 64 << 20;

/// This process's identity within its job.
#[derive(Debug, Clone)]
pub struct ElementIdentity {
    /// The directory of the job's spool.
    pub spool: PathBuf,
    /// This element's index in the job.
    pub element: usize,
    /// This element's id in Slurm.
    pub job: String,
    /// The same id as users know it: the array's id and the element's number.
    pub shown_job: String,
    /// The name of the node.
    pub node: String,
    /// Its number among the ranks on this node.
    pub local_rank: usize,
    /// Whether it sees the devices of all ranks on this node, not only its own.
    pub sees_all_devices: bool,
}

/// The variable that names a training's rendezvous when several trainings share an address.
pub const MEETING: &str = "RETORT_MEETING";

/// The variable by which ranks know that nobody but them listens at their address: what a `torchrun` above this process says
/// is about another one.
pub const OWN_ADDRESS: (&str, &str) = ("TORCHELASTIC_USE_AGENT_STORE", "False");

/// A rank's variables, with torchrun's names.
pub fn rank_variables(part: Part, on_this_node: usize) -> [(&'static str, OsString); 3] {
    [
        ("RANK", part.index.to_string().into()),
        ("LOCAL_RANK", on_this_node.to_string().into()),
        ("WORLD_SIZE", part.of.to_string().into()),
    ]
}

/// Why a process does not supervise a worker.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The spool cannot be used.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The job has no such element.
    #[error("{} has no element {element}", spool.display())]
    NoElement {
        /// The spool.
        spool: PathBuf,
        /// The element.
        element: usize,
    },
    /// An error of the operating system.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
}

/// Runs an element. Returns whether it ended by itself.
///
/// # Errors
/// [`NodeError`]: nothing was started, or the events could not be written.
pub async fn serve(place: &ElementIdentity) -> Result<bool, NodeError> {
    let spec = spool::read_job_spec(&place.spool)?;
    let system = |what: &str| {
        let what = what.to_owned();
        move |source| NodeError::System { what, source }
    };
    let Some(&part) = spec.elements.get(place.element) else {
        return Err(NodeError::NoElement {
            spool: place.spool.clone(),
            element: place.element,
        });
    };
    let mut signals = SlurmSignals::listen().map_err(system("signals cannot be received"))?;
    let dir = spool::element_dir(&place.spool, place.element);
    let shown = dir.display().to_string();
    let mut writer = Writer::open(&dir).map_err(system(&format!("cannot write to {shown}")))?;
    writer.push(SpoolEvent::Began {
        job: place.shown_job.clone(),
        node: place.node.clone(),
        pid: std::process::id(),
    });
    // Two starts must not write the same files, so a previous start that Slurm presumed dead gets time to notice this one.
    if writer.supersede() {
        let began = Instant::now();
        while writer.is_followed_too_soon() && began.elapsed() < 5 * STOP_INTERVAL {
            tokio::time::sleep(STOP_INTERVAL / 4).await;
        }
    }
    let reporter = spec.reporter_dir(&place.spool, place.element);
    let earlier = spec.wasted_before(place.element);
    let wasted = spool::wasted_starts(&dir, &reporter, writer.start(), earlier);
    let over = if spool::is_to_stop(&place.spool) {
        StartEnd::Stopped
    } else if wasted > spec.requeue {
        StartEnd::GaveUp
    } else {
        let mut task = spec.task.clone();
        let staging = dir.join(format!("staging-{}", writer.start()));
        if let Call::Run {
            job, staging: at, ..
        } = &mut task.call
        {
            job.part = part;
            if place.sees_all_devices && job.device.starts_with("cuda") {
                job.device = format!("cuda:{}", place.local_rank);
            }
            *at = staging.clone();
        }
        let mut watch = SupervisedWorker {
            place,
            spec: &spec,
            done: SavedProgress::before(&dir, writer.start()),
            writer: &mut writer,
            lost: 0,
            series: HashMap::new(),
            progress: None,
            answer: None,
            cause: None,
            is_silent: false,
        };
        let over = watch
            .over(task, &mut signals, wasted)
            .await
            .map_err(system("a worker process could not be started"))?;
        let _ = std::fs::remove_dir_all(staging);
        over
    };
    let again = matches!(over, StartEnd::TimeLimit { .. } | StartEnd::Again { .. });
    let good = over.is_at_checkpoint() || matches!(over, StartEnd::Done | StartEnd::Stopped);
    writer.push(SpoolEvent::Over(over));
    let began = Instant::now();
    while let Err(source) = writer.close(good) {
        // A runner that has read everything removes the spool, perhaps before the last piece is renamed.
        if source.kind() == std::io::ErrorKind::NotFound && !place.spool.exists() {
            break;
        }
        if began.elapsed() > PATIENCE {
            let what = format!("what happened cannot be written to {shown}");
            return Err(NodeError::System { what, source });
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    if again && spec.again {
        if spec.ranks && place.element > 0 && first_rank_ends(place, writer.start()).await {
            return Ok(good);
        }
        if spec.ranks {
            // Ranks stop at the same step. The others get time to record that.
            tokio::time::sleep(STOP_INTERVAL).await;
        }
        requeue(&place.job).await;
    }
    Ok(good)
}

/// Waits for the end of the first rank's start; false if it does not come in time. The first rank saves the work of all, so
/// only it should ask for the next start: a request of another rank would interrupt it. If the first rank hangs, another one
/// has to ask. The ranks wait for different times, because the first request ends them all.
async fn first_rank_ends(place: &ElementIdentity, start: u32) -> bool {
    let first = spool::element_dir(&place.spool, 0);
    let turns = u32::try_from(place.element).unwrap_or(u32::MAX);
    let until = Instant::now() + LAST_MOMENTS + STOP_INTERVAL * 4 * turns.min(1 << 16);
    while Instant::now() < until {
        if spool::is_over(&first, start) {
            return true;
        }
        tokio::time::sleep(STOP_INTERVAL).await;
    }
    false
}

/// Asks Slurm to restart this job, which ends this process. A controller that does not answer is asked again: there may be no
/// runner. If Slurm refuses, or the time limit comes first, the runner will do it.
async fn requeue(job: &str) {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let asked = tokio::process::Command::new("scontrol")
            .args(["requeue", job])
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .output();
        match tokio::time::timeout(Duration::from_secs(60), asked).await {
            // Gives Slurm time to end this process: exiting first would count as a different end.
            Ok(Ok(output)) if output.status.success() => {
                return tokio::time::sleep(Duration::from_secs(60)).await;
            }
            Ok(Ok(output)) => {
                let said = String::from_utf8_lossy(&output.stderr);
                tracing::warn!("scontrol requeue: {}", said.trim());
                if !is_unanswered(&said) {
                    return;
                }
            }
            Ok(Err(_)) => return,
            Err(_) => {}
        }
        tokio::time::sleep(REQUEUE_INTERVAL).await;
    }
}

/// Why a worker is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopCause {
    User,
    TimeLimit,
    Terminated,
}

/// A supervised worker.
struct SupervisedWorker<'a> {
    place: &'a ElementIdentity,
    spec: &'a JobSpec,
    writer: &'a mut Writer,
    /// The number of dropped frames.
    lost: u64,
    /// Points since the last write, and the last progress, which are written together.
    series: HashMap<String, Points>,
    progress: Option<FromWorker>,
    /// How far this start and earlier ones have come.
    done: SavedProgress,
    answer: Option<WorkerAnswer>,
    cause: Option<StopCause>,
    /// Whether it was killed for missing heartbeats.
    is_silent: bool,
}

/// The worker's answer.
#[derive(Clone, Copy, PartialEq)]
enum WorkerAnswer {
    Result,
    Cancelled,
    Retryable,
    Final,
}

impl SupervisedWorker<'_> {
    /// Runs the task, and returns why this start is over.
    async fn over(
        &mut self,
        task: Task,
        signals: &mut SlurmSignals,
        wasted: u32,
    ) -> std::io::Result<StartEnd> {
        let kills = kills_for_memory();
        let mut variables = Vec::new();
        if self.spec.ranks
            && let Some(part) = self.spec.elements[self.place.element]
        {
            // The rendezvous address comes from the environment.
            variables.extend(rank_variables(part, self.place.local_rank));
            let mut meeting = self.spec.meeting.clone();
            // Jobs of Slurm. Another one may have the same port on this node, and so may an earlier start of this one.
            if self.spec.again && !meeting.is_empty() {
                let start = std::env::var("SLURM_RESTART_COUNT").unwrap_or_default();
                meeting = format!("{meeting}-{start}");
                variables.push((OWN_ADDRESS.0, OWN_ADDRESS.1.into()));
            }
            variables.push((MEETING, meeting.into()));
        }
        // Slurm signals every process of a job. The worker ignores that; it is stopped from here, through its socket.
        let mut worker = Worker::spawn_in_job(self.spec.threads, &variables)?;
        if let Err(error) = worker.send(&ToWorker::Start(Box::new(task))).await {
            return Err(std::io::Error::other(error));
        }
        let mut stop = tokio::time::interval(STOP_INTERVAL);
        let mut write = tokio::time::interval(self.spec.interval);
        write.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut kill_at = None::<Instant>;
        let (mut heartbeat, mut look) = (Heartbeat::default(), heartbeat::looks());
        let exit = loop {
            tokio::select! {
                event = worker.next() => match event {
                    WorkerEvent::Exited(exit) => break exit,
                    WorkerEvent::Frame(FromWorker::Heartbeat) => heartbeat.beat(),
                    event => {
                        heartbeat.heard();
                        self.hear(event, &worker);
                    }
                },
                _ = look.tick(), if self.spec.ranks && self.cause.is_none() && self.answer.is_none() && !self.is_silent => {
                    if heartbeat.look() {
                        self.is_silent = true;
                        let seconds = heartbeat.silence().as_secs();
                        self.say(SpoolEvent::Frame(FromWorker::Silent { seconds }));
                        worker.signal(libc::SIGKILL);
                    }
                }
                cause = signals.next() => {
                    self.ask(cause, &mut worker).await;
                    // The second signal, or the last: no more time is given.
                    if cause == StopCause::Terminated {
                        let at = Instant::now() + LAST_MOMENTS;
                        kill_at = Some(kill_at.map_or(at, |before| before.min(at)));
                    }
                }
                _ = stop.tick() => {
                    if self.cause.is_none() && spool::is_to_stop(&self.place.spool) {
                        self.ask(StopCause::User, &mut worker).await;
                    }
                    if self.cause.is_some() && spool::is_to_end(&self.place.spool) {
                        worker.signal(libc::SIGKILL);
                    }
                    if self.writer.is_superseded() {
                        self.cause = Some(StopCause::Terminated);
                        worker.signal(libc::SIGKILL);
                    }
                }
                _ = write.tick() => self.write(),
                () = until(kill_at) => {
                    worker.signal(libc::SIGKILL);
                    kill_at = None;
                }
            }
        };
        let out_of_memory = kills_for_memory() > kills;
        if self.spec.ranks && self.cause.is_none() && self.answer == Some(WorkerAnswer::Cancelled) {
            // Another rank got Slurm's signal first. This rank gets it now, and with it the cause.
            let heard = tokio::time::timeout(2 * STOP_INTERVAL, signals.next()).await;
            self.cause = heard.ok();
        }
        self.join();
        self.writer.push(SpoolEvent::Exited {
            status: exit.status,
            usage: exit.usage,
            out_of_memory,
        });
        Ok(self.end(exit, out_of_memory, wasted))
    }

    /// Why this start is over. `wasted`: how many starts in a row did not end well before it.
    fn end(&mut self, exit: WorkerExit, out_of_memory: bool, wasted: u32) -> StartEnd {
        if self.answer == Some(WorkerAnswer::Cancelled) && self.done.note_checkpoint() {
            self.write_progress();
        }
        let wasted = match self.has_advanced() {
            true => 0,
            false => wasted,
        };
        self.judge(exit, out_of_memory, wasted)
    }

    /// Writes how far it has come.
    fn write_progress(&self) {
        let dir = spool::element_dir(&self.place.spool, self.place.element);
        // Without it, this start may count as one without progress, and the next one as one with it.
        if let Err(error) = self.done.write(&dir, self.writer.start()) {
            tracing::warn!("its progress cannot be noted in {}: {error}", dir.display());
        }
    }

    /// Whether this start got further than all before it; of ranks, the first says so for all.
    fn has_advanced(&self) -> bool {
        let reporter = self
            .spec
            .reporter_dir(&self.place.spool, self.place.element);
        self.done.has_advanced() || spool::has_advanced(&reporter, self.writer.start())
    }

    fn judge(&self, exit: WorkerExit, out_of_memory: bool, wasted: u32) -> StartEnd {
        let at_checkpoint = self.answer == Some(WorkerAnswer::Cancelled);
        let killed = exit.status == ExitStatus::Signal(libc::SIGKILL);
        // The worker's own answer counts, even if it was asked to stop in the meantime.
        if matches!(
            self.answer,
            Some(WorkerAnswer::Result | WorkerAnswer::Final)
        ) {
            return StartEnd::Done;
        }
        match self.cause {
            Some(StopCause::User) => return StartEnd::Stopped,
            // It would be restarted for ever.
            Some(StopCause::TimeLimit)
                if at_checkpoint
                    && !self.done.has_advanced()
                    && self.spec.again
                    && self.spec.layout().reporter(self.place.element) == self.place.element =>
            {
                let reason = NO_PROGRESS.to_owned();
                return match wasted < self.spec.requeue {
                    true => StartEnd::Again { reason },
                    false => StartEnd::OutOfTries { reason },
                };
            }
            Some(StopCause::TimeLimit) => return StartEnd::TimeLimit { at_checkpoint },
            Some(StopCause::Terminated) => return StartEnd::Terminated { at_checkpoint },
            // Ranks stop together: another rank was asked to stop, for a reason that Slurm knows.
            None if self.spec.ranks && self.spec.again && at_checkpoint => {
                return StartEnd::Terminated { at_checkpoint };
            }
            None => {}
        }
        let reason = match self.answer {
            Some(WorkerAnswer::Retryable) => "failed in a way that may pass",
            None if self.is_silent => "its worker hangs",
            None if killed && !out_of_memory => "its worker was killed by SIGKILL",
            _ => return StartEnd::Done,
        };
        let reason = reason.to_owned();
        match (wasted < self.spec.requeue, self.answer) {
            (true, _) => StartEnd::Again { reason },
            // It has reported why it failed. Without restarts, the way it ended is the reason.
            (false, Some(_)) => StartEnd::Done,
            (false, None) if self.spec.requeue == 0 => StartEnd::Done,
            (false, None) => StartEnd::OutOfTries { reason },
        }
    }

    async fn ask(&mut self, cause: StopCause, worker: &mut Worker) {
        // The first event is the cause. That Slurm then ends everything is its consequence.
        self.cause.get_or_insert(cause);
        // A message without paths can always be encoded.
        let _ = worker.send(&ToWorker::StopAtCheckpoint).await;
    }

    fn hear(&mut self, event: WorkerEvent, worker: &Worker) {
        if let WorkerEvent::Frame(frame) = &event
            && self.done.note(frame)
        {
            self.write_progress();
        }
        match event {
            WorkerEvent::Frame(FromWorker::Metrics(series)) => {
                if self.writer.pending() > MOST_PENDING {
                    self.lost += 1;
                    return;
                }
                for mut points in series {
                    match self.series.get_mut(&points.series) {
                        Some(before) => {
                            before.steps.append(&mut points.steps);
                            before.values.append(&mut points.values);
                            before.at.append(&mut points.at);
                        }
                        None => drop(self.series.insert(points.series.clone(), points)),
                    }
                }
                // Frames have a size limit.
                if self
                    .series
                    .values()
                    .map(|points| points.steps.len())
                    .sum::<usize>()
                    > 1 << 18
                {
                    self.join();
                }
            }
            WorkerEvent::Frame(progress @ FromWorker::Progress(_)) => {
                self.progress = Some(progress);
            }
            WorkerEvent::Frame(frame) => {
                self.answer = match &frame {
                    FromWorker::Answer(_) => Some(WorkerAnswer::Result),
                    FromWorker::Failed(failure) if failure.code == FailureCode::Cancelled => {
                        Some(WorkerAnswer::Cancelled)
                    }
                    FromWorker::Failed(failure) if failure.is_retryable() => {
                        Some(WorkerAnswer::Retryable)
                    }
                    FromWorker::Failed(_) | FromWorker::NotLoaded { .. } => {
                        Some(WorkerAnswer::Final)
                    }
                    _ => self.answer,
                };
                self.say(SpoolEvent::Frame(frame));
            }
            WorkerEvent::Line(source, text) => self.say(SpoolEvent::Line { source, text }),
            WorkerEvent::Malformed(error) => {
                worker.signal(libc::SIGKILL);
                self.answer = Some(WorkerAnswer::Final);
                let message = format!("the worker sent an invalid message: {error}");
                self.say(SpoolEvent::Frame(FromWorker::NotLoaded {
                    message,
                    hint: None,
                }));
            }
            WorkerEvent::Exited(_) | WorkerEvent::Remote(_) => {}
        }
    }

    fn say(&mut self, word: SpoolEvent) {
        let matters = !matches!(
            word,
            SpoolEvent::Line { .. } | SpoolEvent::Frame(FromWorker::Log(_) | FromWorker::Loaded)
        );
        if matters || self.writer.pending() <= MOST_PENDING {
            // Earlier records are written first.
            self.join();
            self.writer.push(word);
        } else {
            self.lost += 1;
        }
    }

    /// Turns the joined points and progress into records.
    fn join(&mut self) {
        let mut series: Vec<Points> = self.series.drain().map(|(_, points)| points).collect();
        if !series.is_empty() {
            series.sort_by(|a, b| a.series.cmp(&b.series));
            self.writer
                .push(SpoolEvent::Frame(FromWorker::Metrics(series)));
        }
        if let Some(progress) = self.progress.take() {
            self.writer.push(SpoolEvent::Frame(progress));
        }
    }

    fn write(&mut self) {
        self.join();
        // After an error, the records are written the next time.
        if self.writer.flush().is_ok() && self.lost > 0 {
            let text = format!(
                "{} frames came while the spool could not be written, and are lost",
                std::mem::take(&mut self.lost)
            );
            self.writer.push(SpoolEvent::Line {
                source: crate::store::LogSource::Runner,
                text,
            });
        }
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Slurm's signals.
struct SlurmSignals {
    ahead: Signal,
    terminate: Signal,
}

impl SlurmSignals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            ahead: signal(SignalKind::user_defined1())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> StopCause {
        tokio::select! {
            _ = self.ahead.recv() => StopCause::TimeLimit,
            _ = self.terminate.recv() => StopCause::Terminated,
        }
    }
}

/// How many processes have been killed for lack of memory: in this job, if its control group tells, otherwise on the whole
/// machine.
fn kills_for_memory() -> u64 {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let counted = groups.lines().find_map(|line| {
        let path = line.strip_prefix("0::/")?;
        // The limit is set on the step's group, or on the job's above it.
        let dirs: Vec<PathBuf> = Path::new("/sys/fs/cgroup")
            .join(path)
            .ancestors()
            .take(4)
            .map(Path::to_owned)
            .collect();
        dirs.iter().find_map(|dir| {
            dir.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("job_"))
                .then(|| std::fs::read_to_string(dir.join("memory.events")).ok())
                .flatten()
        })
    });
    let of_group = counted.and_then(|events| {
        let kills = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))?;
        kills.trim().parse().ok()
    });
    of_group.unwrap_or_else(out_of_memory_kills)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::Progress;
    use crate::store::Usage;

    /// How starts end that have come this far at their time limit, one after the other.
    fn ends(of_ranks: bool, element: usize, starts: &[Option<u64>]) -> Vec<StartEnd> {
        let dir = tempfile::tempdir().unwrap();
        let part = |index| Some(Part { index, of: 2 });
        let spec = JobSpec {
            format: spool::FORMAT,
            elements: vec![part(0), part(1)],
            task: Task {
                plugin: "/p.so".into(),
                hash: None,
                call: Call::Describe,
            },
            threads: 1,
            requeue: 1,
            wasted: Vec::new(),
            interval: Duration::from_millis(250),
            again: true,
            ranks: of_ranks,
            meeting: String::new(),
        };
        let place = ElementIdentity {
            spool: dir.path().to_owned(),
            element,
            job: "1".into(),
            shown_job: "1".into(),
            node: "n1".into(),
            local_rank: 0,
            sees_all_devices: false,
        };
        let exit = WorkerExit {
            status: ExitStatus::Code(0),
            usage: Usage::default(),
            out_of_memory: None,
        };
        let element_dir = spool::element_dir(&place.spool, element);
        let end = |done: &Option<u64>| {
            let mut writer = Writer::open(&element_dir).unwrap();
            let start = writer.start();
            let mut worker = SupervisedWorker {
                place: &place,
                spec: &spec,
                writer: &mut writer,
                lost: 0,
                series: HashMap::new(),
                progress: None,
                done: SavedProgress::before(&element_dir, start),
                answer: Some(WorkerAnswer::Cancelled),
                cause: Some(StopCause::TimeLimit),
                is_silent: false,
            };
            if let Some(done) = *done {
                let (total, unit) = (100, "steps".to_owned());
                let progress = FromWorker::Progress(Progress { done, total, unit });
                if worker.done.note(&progress) {
                    worker.write_progress();
                }
            }
            let wasted = spool::wasted_starts(&element_dir, &element_dir, start, 0);
            let over = worker.end(exit, false, wasted);
            let good = over.is_at_checkpoint();
            writer.close(good).unwrap();
            over
        };
        starts.iter().map(end).collect()
    }

    #[test]
    fn starts_that_get_no_further_are_limited() {
        let good = StartEnd::TimeLimit {
            at_checkpoint: true,
        };
        let reason = || NO_PROGRESS.to_owned();
        let again = StartEnd::Again { reason: reason() };
        let last = StartEnd::OutOfTries { reason: reason() };
        // A week in pieces of four hours needs nobody.
        let pieces: Vec<Option<u64>> = (1..40).map(Some).collect();
        assert_eq!(ends(false, 0, &pieces), vec![good.clone(); 39]);
        // It never gets to its first step.
        assert_eq!(ends(false, 0, &[None, None]), [again.clone(), last.clone()]);
        // It repeats the same steps, and goes on in between.
        let repeats = [5, 5, 6, 6, 7, 7, 7].map(Some);
        let (good, again) = (|| good.clone(), || again.clone());
        let expected = [good(), again(), good(), again(), good(), again(), last];
        assert_eq!(ends(true, 0, &repeats), expected);
        // Other ranks report no progress.
        assert_eq!(ends(true, 1, &[None, None]), [good(), good()]);
        assert_eq!(ends(false, 1, &[None]), [again()]);
    }
}
