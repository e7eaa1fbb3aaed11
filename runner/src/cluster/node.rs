//! The compute node's side of a spool: supervises a worker.
//!
//! In: the directory of a job's spool, and Slurm's environment variables. Out: records in the spool. The worker is the same as
//! on the runner's machine and sends the same events; they are recorded here instead of handled. When Slurm signals ahead of
//! the time limit, the worker is asked to stop at its next checkpoint, and Slurm is asked for another life.
//! Deliberately absent: the store, which no compute node opens, and the runner's machine, which may be down.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use retort_abi::{FailureCode, Part};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use crate::cluster::spool::{self, JobSpec, LifeEnd, SpoolError, SpoolEvent, Writer};
use crate::frame::{Call, FromWorker, Points, Task, ToWorker};
use crate::worker::death::{ExitStatus, out_of_memory_kills};
use crate::worker::heartbeat::{self, Heartbeat};
use crate::worker::process::{Exit, Worker, WorkerEvent};

/// How often to look for the file that stops a job.
const STOP_INTERVAL: Duration = Duration::from_secs(2);
/// From SIGTERM to SIGKILL for the worker, once Slurm has announced the end.
const LAST_MOMENTS: Duration = Duration::from_secs(20);
/// How long to retry records that cannot be written.
const PATIENCE: Duration = Duration::from_secs(600);
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
    /// The same id as people know it: the array's id, and the element's number in it.
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
    /// The operating system refused.
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
    let order = spool::read_order(&place.spool)?;
    let system = |what: &str| {
        let what = what.to_owned();
        move |source| NodeError::System { what, source }
    };
    let Some(&part) = order.elements.get(place.element) else {
        return Err(NodeError::NoElement {
            spool: place.spool.clone(),
            element: place.element,
        });
    };
    let mut signals = Signals::listen().map_err(system("signals cannot be received"))?;
    let dir = spool::element_dir(&place.spool, place.element);
    let shown = dir.display().to_string();
    let mut writer = Writer::open(&dir).map_err(system(&format!("cannot write to {shown}")))?;
    writer.push(SpoolEvent::Began {
        job: place.shown_job.clone(),
        node: place.node.clone(),
        pid: std::process::id(),
    });
    // Two lives would write the same files, so a life that Slurm presumed dead gets time to notice.
    if writer.supersede() {
        let began = Instant::now();
        while writer.is_followed_too_soon() && began.elapsed() < 5 * STOP_INTERVAL {
            tokio::time::sleep(STOP_INTERVAL / 4).await;
        }
    }
    let wasted = order
        .wasted_before(place.element)
        .saturating_add(spool::wasted_lives(&dir, writer.life()));
    let over = if spool::is_to_stop(&place.spool) {
        LifeEnd::Stopped
    } else if wasted > order.requeue {
        LifeEnd::GaveUp
    } else {
        let mut task = order.task.clone();
        let staging = dir.join(format!("staging-{}", writer.life()));
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
        let mut watch = WatchedWorker {
            place,
            order: &order,
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
    let again = matches!(over, LifeEnd::TimeLimit { .. } | LifeEnd::Again { .. });
    let good = match &over {
        LifeEnd::TimeLimit { at_checkpoint } | LifeEnd::Terminated { at_checkpoint } => {
            *at_checkpoint
        }
        LifeEnd::Again { .. } | LifeEnd::OutOfTries { .. } | LifeEnd::GaveUp => false,
        LifeEnd::Done | LifeEnd::Stopped => true,
    };
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
    if again && order.again {
        if order.ranks && place.element > 0 && first_rank_ends(place, writer.life()).await {
            return Ok(good);
        }
        if order.ranks {
            // They leave at the same step, and record it.
            tokio::time::sleep(STOP_INTERVAL).await;
        }
        requeue(&place.job).await;
    }
    Ok(good)
}

/// Whether the first rank's life ends soon. The first rank asks for the next life, because it saves the work of all, and the
/// others would interrupt that. If it hangs it does not ask, and another rank has to. The ranks wait for different times,
/// because the first request ends them all.
async fn first_rank_ends(place: &ElementIdentity, life: u32) -> bool {
    let first = spool::element_dir(&place.spool, 0);
    let turns = u32::try_from(place.element).unwrap_or(u32::MAX);
    let until = Instant::now() + LAST_MOMENTS + STOP_INTERVAL * 4 * turns.min(1 << 16);
    while Instant::now() < until {
        if spool::is_over(&first, life) {
            return true;
        }
        tokio::time::sleep(STOP_INTERVAL).await;
    }
    false
}

/// Asks Slurm to restart this job, which ends this process. If that fails the runner will do it.
async fn requeue(job: &str) {
    let asked = tokio::process::Command::new("scontrol")
        .args(["requeue", job])
        .stdin(Stdio::null())
        .status();
    match tokio::time::timeout(Duration::from_secs(60), asked).await {
        // Gives Slurm time to end this process: exiting first would count as a different end.
        Ok(Ok(status)) if status.success() => tokio::time::sleep(Duration::from_secs(60)).await,
        _ => {}
    }
}

/// Why a worker is being stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NodeStopReason {
    User,
    TimeLimit,
    Terminated,
}

/// A supervised worker.
struct WatchedWorker<'a> {
    place: &'a ElementIdentity,
    order: &'a JobSpec,
    writer: &'a mut Writer,
    /// Frames that did not fit.
    lost: u64,
    /// Points since the last write, and the last progress, which are written together.
    series: HashMap<String, Points>,
    progress: Option<FromWorker>,
    answer: Option<WorkerAnswer>,
    cause: Option<NodeStopReason>,
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

impl WatchedWorker<'_> {
    /// Runs the task, and returns why this life is over.
    async fn over(
        &mut self,
        task: Task,
        signals: &mut Signals,
        wasted: u32,
    ) -> std::io::Result<LifeEnd> {
        let kills = kills_for_memory();
        let mut variables = Vec::new();
        if self.order.ranks
            && let Some(part) = self.order.elements[self.place.element]
        {
            // The rendezvous address comes from the environment.
            variables.extend(rank_variables(part, self.place.local_rank));
            variables.push((MEETING, self.order.meeting.clone().into()));
        }
        // Slurm signals every process of a job. The worker ignores that; it is stopped from here, through its socket.
        let mut worker = Worker::spawn_in_job(self.order.threads, &variables)?;
        if let Err(error) = worker.send(&ToWorker::Start(Box::new(task))).await {
            return Err(std::io::Error::other(error));
        }
        let mut stop = tokio::time::interval(STOP_INTERVAL);
        let mut write = tokio::time::interval(self.order.interval);
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
                _ = look.tick(), if self.order.ranks && self.cause.is_none() && self.answer.is_none() && !self.is_silent => {
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
                    if cause == NodeStopReason::Terminated {
                        let at = Instant::now() + LAST_MOMENTS;
                        kill_at = Some(kill_at.map_or(at, |before| before.min(at)));
                    }
                }
                _ = stop.tick() => {
                    if self.cause.is_none() && spool::is_to_stop(&self.place.spool) {
                        self.ask(NodeStopReason::User, &mut worker).await;
                    }
                    if self.cause.is_some() && spool::is_to_end(&self.place.spool) {
                        worker.signal(libc::SIGKILL);
                    }
                    if self.writer.is_superseded() {
                        self.cause = Some(NodeStopReason::Terminated);
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
        if self.order.ranks && self.cause.is_none() && self.answer == Some(WorkerAnswer::Cancelled)
        {
            // Another rank got the signal before this one, which learns the reason now.
            let heard = tokio::time::timeout(2 * STOP_INTERVAL, signals.next()).await;
            self.cause = heard.ok();
        }
        self.join();
        self.writer.push(SpoolEvent::Exited {
            status: exit.status,
            usage: exit.usage,
            out_of_memory,
        });
        Ok(self.judge(exit, out_of_memory, wasted))
    }

    fn judge(&self, exit: Exit, out_of_memory: bool, wasted: u32) -> LifeEnd {
        let at_checkpoint = self.answer == Some(WorkerAnswer::Cancelled);
        let killed = exit.status == ExitStatus::Signal(libc::SIGKILL);
        // The worker's own answer counts, whatever was asked of it meanwhile.
        if matches!(
            self.answer,
            Some(WorkerAnswer::Result | WorkerAnswer::Final)
        ) {
            return LifeEnd::Done;
        }
        match self.cause {
            Some(NodeStopReason::User) => return LifeEnd::Stopped,
            Some(NodeStopReason::TimeLimit) => return LifeEnd::TimeLimit { at_checkpoint },
            Some(NodeStopReason::Terminated) => return LifeEnd::Terminated { at_checkpoint },
            // Ranks stop together: another one was asked to, for a reason that Slurm knows.
            None if self.order.ranks && self.order.again && at_checkpoint => {
                return LifeEnd::Terminated { at_checkpoint };
            }
            None => {}
        }
        let reason = match self.answer {
            Some(WorkerAnswer::Retryable) => "failed in a way that may pass",
            None if self.is_silent => "its worker hangs",
            None if killed && !out_of_memory => "its worker was killed by SIGKILL",
            _ => return LifeEnd::Done,
        };
        let reason = reason.to_owned();
        match (wasted < self.order.requeue, self.answer) {
            (true, _) => LifeEnd::Again { reason },
            // It has reported why it failed; and without restarts, the way it ended is the reason.
            (false, Some(_)) => LifeEnd::Done,
            (false, None) if self.order.requeue == 0 => LifeEnd::Done,
            (false, None) => LifeEnd::OutOfTries { reason },
        }
    }

    async fn ask(&mut self, cause: NodeStopReason, worker: &mut Worker) {
        // The first event is the reason; that Slurm then ends the rest follows from it.
        self.cause.get_or_insert(cause);
        // A message without paths can always be encoded.
        let _ = worker.send(&ToWorker::StopAtCheckpoint).await;
    }

    fn hear(&mut self, event: WorkerEvent, worker: &Worker) {
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
                self.progress = Some(progress)
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
        // What cannot be written now is written the next time.
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
struct Signals {
    ahead: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            ahead: signal(SignalKind::user_defined1())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> NodeStopReason {
        tokio::select! {
            _ = self.ahead.recv() => NodeStopReason::TimeLimit,
            _ = self.terminate.recv() => NodeStopReason::Terminated,
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
