//! One element as the runner sees it: its task, its job, and its events so far.

use std::path::PathBuf;

use retort_abi::{Failure, FailureCode, LogLevel, Part};
use tokio::sync::mpsc;

use crate::cluster::spool::{LifeEnd, Reader, Record, SpoolEvent, SpoolReading};
use crate::frame::{Answer, FromWorker, Task};
use crate::store::{ElementUpdate, JobKey, LogLine, Time, Usage};
use crate::worker::death::ExitStatus;
use crate::worker::process::{Exit, WorkerEvent};
use crate::worker::remote::{ClusterEnd, ElementEvent};
use crate::worker::shortened;

/// How a life ended that did not say so, where Slurm does not say either.
pub const LOST: &str = "node failed, or preempted";

/// An element's phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It has no job.
    New,
    /// Its job waits, or will be started again.
    Queued,
    /// A life of it has begun.
    Running,
    /// Its end has been told.
    Over,
}

/// The executor's stop request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopLevel {
    GoOn,
    /// To stop at the next checkpoint.
    Checkpoint,
    /// To end at once.
    Now,
    /// The same, and Slurm has been told.
    Ending,
}

/// A life's report of its end, kept until it is known whether another follows.
#[derive(Debug, Default)]
pub struct PendingEnd {
    pub frames: Vec<FromWorker>,
    /// Files of the artifacts among them.
    files: usize,
    pub exit: Option<Exit>,
}

/// Frames that the end of a life may have, and files of artifacts in them.
const MOST_FRAMES: usize = 5000;
const MOST_FILES: usize = 1 << 20;

impl PendingEnd {
    /// Keeps a frame, unless there are too many.
    fn hold(&mut self, frame: FromWorker) -> bool {
        match &frame {
            FromWorker::Artifact { record, .. } => self.files += record.files.len(),
            // Of several answers the last counts.
            FromWorker::Answer(_) => self
                .frames
                .retain(|held| !matches!(held, FromWorker::Answer(_))),
            _ => {}
        }
        self.frames.push(frame);
        self.frames.len() <= MOST_FRAMES && self.files <= MOST_FILES
    }

    pub fn has_result(&self) -> bool {
        let result = |frame: &FromWorker| matches!(frame, FromWorker::Answer(Answer::Result(_)));
        self.frames.iter().any(result)
    }
}

#[derive(Debug)]
pub struct Slot {
    pub part: Option<Part>,
    pub task: Task,
    tell: mpsc::Sender<WorkerEvent>,
    pub phase: Phase,
    pub level: StopLevel,
    /// Why it waits.
    pub why: String,
    /// Its job, and which element of it this is.
    pub job: Option<(JobKey, usize)>,
    pub reader: Option<Reader>,
    /// Records below this number have been taken over by another runner.
    mark: u64,
    pub held: PendingEnd,
    /// The life that has begun and not ended.
    pub life: Option<u32>,
    /// How the last life ended, by its own words.
    pub over: Option<LifeEnd>,
    /// Why its records cannot be true.
    pub broken: Option<&'static str>,
    /// How often it was submitted again.
    pub tries: u32,
    /// How often Slurm has said that it is over while it had not said so itself.
    pub absent: u32,
    /// Whether Slurm says that it runs.
    pub expected: bool,
    /// Whether Slurm has been asked not to let it wait.
    pub hurried: bool,
    begun: bool,
}

impl Slot {
    pub fn new(part: Option<Part>, task: Task, tell: mpsc::Sender<WorkerEvent>) -> Self {
        Self {
            part,
            task,
            tell,
            phase: Phase::New,
            level: StopLevel::GoOn,
            why: String::new(),
            job: None,
            reader: None,
            mark: 0,
            held: PendingEnd::default(),
            life: None,
            over: None,
            broken: None,
            tries: 0,
            absent: 0,
            expected: false,
            hurried: false,
            begun: false,
        }
    }

    /// It has a job.
    pub fn place(&mut self, job: (JobKey, usize), reader: Reader, mark: u64) {
        self.job = Some(job);
        self.reader = Some(reader);
        self.mark = mark;
        self.held = PendingEnd::default();
        (self.life, self.over, self.absent) = (None, None, 0);
        (self.expected, self.hurried) = (false, false);
        self.phase = Phase::Queued;
        self.why = "submitted".into();
    }

    /// It has none any more, and is to be submitted again.
    pub fn again(&mut self) {
        self.phase = Phase::New;
        (self.job, self.reader) = (None, None);
    }

    /// Whether it ran once, and waits now.
    pub fn waits_again(&self) -> bool {
        self.begun && self.phase == Phase::Queued
    }

    /// Whether there may be something to read.
    pub fn is_heard(&self) -> bool {
        self.reader.is_some() && (self.phase == Phase::Running || self.expected)
    }

    async fn send(&self, heard: WorkerEvent) {
        // Nobody hears an attempt that was dropped.
        let _ = self.tell.send(heard).await;
    }

    pub async fn note(&self, level: LogLevel, text: String) {
        self.send(note(level, text)).await;
    }

    /// Handles its events.
    pub async fn take(
        &mut self,
        records: Vec<Record>,
        news: &mut Vec<(JobKey, usize, ElementUpdate)>,
    ) {
        let Some((key, element)) = self.job else {
            return;
        };
        let Some(last) = records.last().map(|record| record.number) else {
            return;
        };
        for Record { number, at, word } in records {
            if self.phase == Phase::Over {
                // It has a final result or failure: another life is useless.
                break;
            }
            let fresh = number >= self.mark;
            match word {
                SpoolEvent::Began { job, node, pid } => {
                    let (job, node) = (short(job), short(node));
                    let life = (number >> 32) as u32;
                    if self.life.is_some_and(|before| before != life) {
                        // Nobody was there to ask Slurm.
                        self.life_ended(LOST, at, news);
                    }
                    news.push((
                        key,
                        element,
                        ElementUpdate::Began {
                            life,
                            node: node.clone(),
                            at,
                        },
                    ));
                    self.held = PendingEnd::default();
                    (self.life, self.over, self.absent) = (Some(life), None, 0);
                    self.phase = Phase::Running;
                    self.why.clear();
                    if !std::mem::replace(&mut self.begun, true) {
                        let node = node.clone();
                        self.send(WorkerEvent::Remote(ElementEvent::Began { node }))
                            .await;
                    }
                    if fresh {
                        let text = format!("job {job} began on {node} (process {pid})");
                        self.note(LogLevel::Debug, text).await;
                    }
                }
                SpoolEvent::Frame(
                    frame @ (FromWorker::Artifact { .. }
                    | FromWorker::Answer(_)
                    | FromWorker::Failed(_)
                    | FromWorker::NotLoaded { .. }),
                ) => {
                    if !self.held.hold(frame) {
                        self.broken = Some("its spool tells of more artifacts than a stage makes");
                        break;
                    }
                }
                SpoolEvent::Frame(frame) => {
                    if fresh || matches!(frame, FromWorker::Progress(_)) {
                        self.send(WorkerEvent::Frame(frame)).await;
                    }
                }
                SpoolEvent::Line { source, text } => {
                    if fresh {
                        let line = LogLine {
                            at: Time(at),
                            level: LogLevel::Debug as u32,
                            source,
                            text,
                        };
                        self.send(WorkerEvent::Remote(ElementEvent::Line(line)))
                            .await;
                    }
                }
                SpoolEvent::Exited {
                    status,
                    usage,
                    out_of_memory,
                } => {
                    self.held.exit = Some(Exit {
                        status,
                        usage,
                        out_of_memory: Some(out_of_memory),
                    });
                }
                SpoolEvent::Over(over) => self.life_over(over, at, fresh, news).await,
            }
        }
        self.send(WorkerEvent::Remote(ElementEvent::ReadTo {
            job: key,
            element,
            number: last.saturating_add(1),
        }))
        .await;
    }

    /// A life is over, by its own words.
    async fn life_over(
        &mut self,
        over: LifeEnd,
        at: i64,
        fresh: bool,
        news: &mut Vec<(JobKey, usize, ElementUpdate)>,
    ) {
        let (reason, goes_on) = match &over {
            LifeEnd::Done if self.held.has_result() => ("succeeded", false),
            LifeEnd::Done => ("failed", false),
            LifeEnd::Stopped => ("stopped", false),
            LifeEnd::GaveUp => ("started too often", false),
            LifeEnd::TimeLimit {
                at_checkpoint: true,
            } => ("time limit, at a checkpoint", true),
            LifeEnd::TimeLimit { .. } => ("time limit", true),
            LifeEnd::Again { reason } => (reason.as_str(), true),
            // Why, Slurm says.
            LifeEnd::Terminated { .. } => ("", true),
        };
        let reason = shortened(reason);
        if !reason.is_empty() {
            self.life_ended(&reason, at, news);
            if goes_on && fresh {
                let text = format!("{reason}; it is started again");
                self.note(LogLevel::Warn, text).await;
            }
        }
        self.over = Some(over);
        if goes_on {
            self.phase = Phase::Queued;
            self.why = "to be started again".into();
        } else if self.over == Some(LifeEnd::GaveUp) {
            self.end(ClusterEnd {
                reason: "started too often".into(),
                message: "it failed after all restarts that `requeue` allows".into(),
                hint: Some(
                    "`retort log` says how each start ended; `retort resume` tries again".into(),
                ),
            })
            .await;
        } else {
            self.deliver().await;
        }
    }

    /// Notes for the history how the present life ended.
    pub fn life_ended(
        &mut self,
        reason: &str,
        at: i64,
        news: &mut Vec<(JobKey, usize, ElementUpdate)>,
    ) {
        if let (Some((key, element)), Some(life)) = (self.job, self.life.take()) {
            let reason = reason.to_owned();
            news.push((key, element, ElementUpdate::Ended { life, reason, at }));
        }
    }

    /// Tells the end that the last life has told of.
    pub async fn deliver(&mut self) {
        for frame in std::mem::take(&mut self.held.frames) {
            self.send(WorkerEvent::Frame(frame)).await;
        }
        let left = Exit {
            status: ExitStatus::Code(0),
            usage: Usage::default(),
            out_of_memory: Some(false),
        };
        let exit = self.held.exit.unwrap_or(left);
        self.send(WorkerEvent::Exited(exit)).await;
        self.phase = Phase::Over;
    }

    /// Tells that it was stopped before it had begun, or between two lives.
    pub async fn cancelled(&mut self) {
        self.held = PendingEnd {
            frames: vec![cancelled()],
            ..PendingEnd::default()
        };
        self.deliver().await;
    }

    /// Tells that Slurm has ended it, as it was asked to.
    pub async fn killed(&mut self) {
        self.held.frames.clear();
        match self.level {
            StopLevel::Ending | StopLevel::Now => {
                self.held.exit = Some(Exit {
                    status: ExitStatus::Signal(libc::SIGKILL),
                    usage: self.held.exit.map(|exit| exit.usage).unwrap_or_default(),
                    out_of_memory: Some(false),
                });
                self.deliver().await;
            }
            _ => self.cancelled().await,
        }
    }

    /// Tells an end that only a cluster has.
    pub async fn end(&mut self, ended: ClusterEnd) {
        if self.phase == Phase::Over {
            return;
        }
        self.send(WorkerEvent::Remote(ElementEvent::Ended(ended)))
            .await;
        self.held.frames.clear();
        self.deliver().await;
    }
}

/// Whether what an element has said so far may lead to a result; `goes_on`: whether Slurm still has it.
pub fn is_worth_taking(dir: &std::path::Path, goes_on: bool) -> bool {
    let mut reader = Reader::new(PathBuf::from(dir));
    let (mut held, mut over) = (PendingEnd::default(), None);
    loop {
        let mut records = Vec::new();
        let seen = reader.look(&mut records);
        for record in records {
            match record.word {
                SpoolEvent::Began { .. } => (held, over) = (PendingEnd::default(), None),
                SpoolEvent::Frame(frame @ FromWorker::Answer(_)) => held.frames = vec![frame],
                SpoolEvent::Over(last) => over = Some(last),
                _ => {}
            }
        }
        match seen {
            Ok(SpoolReading::More) => {}
            Ok(_) if reader.turn() => {}
            Ok(_) => break,
            Err(_) => return false,
        }
    }
    match over {
        Some(LifeEnd::Done) => held.has_result(),
        Some(LifeEnd::Stopped | LifeEnd::GaveUp) => false,
        _ => goes_on || held.has_result(),
    }
}

/// The name of a node, or a job's id, which a spool might make as long as it likes.
fn short(name: String) -> String {
    match name.len() {
        0..=256 => name,
        _ => name.chars().take(256).collect(),
    }
}

/// What a worker says that was stopped before it began.
fn cancelled() -> FromWorker {
    FromWorker::Failed(Failure::new(FailureCode::Cancelled, "it had not begun"))
}

/// A line about an element, for the log.
fn note(level: LogLevel, text: String) -> WorkerEvent {
    WorkerEvent::Remote(ElementEvent::Line(LogLine::of_runner(level, text)))
}
