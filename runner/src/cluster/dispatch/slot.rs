//! The runner's record of one element: its task, its job, and its events so far.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use retort_abi::{Failure, FailureCode, LogLevel, Part};
use tokio::sync::mpsc;

use crate::cluster::spool::{self, NO_PROGRESS, Reader, Record, SpoolError, SpoolEvent, StartEnd};
use crate::frame::{Answer, FromWorker, Task};
use crate::store::{ElementUpdate, JobKey, LogLine, LogSource, ReadMark, Time, Usage};
use crate::worker::death::ExitStatus;
use crate::worker::process::{WorkerEvent, WorkerExit};
use crate::worker::remote::{ClusterEnd, ElementEvent};
use crate::worker::shortened;

/// An element's phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It has no job.
    New,
    /// Its job is waiting, or will be restarted.
    Queued,
    /// It has been started.
    Running,
    /// Its end has been reported.
    Over,
}

/// The executor's stop request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopRequest {
    GoOn,
    /// Stop at the next checkpoint.
    Checkpoint,
    /// End at once.
    Now,
    /// The same, and Slurm has been asked to cancel it.
    Ending,
}

/// A start's report of its end, held back until it is known whether another start follows.
#[derive(Debug, Default)]
pub struct PendingEnd {
    pub frames: Vec<FromWorker>,
    /// Number of files in their artifacts.
    files: usize,
    pub exit: Option<WorkerExit>,
}

/// The most frames in a start's final report, and files of artifacts in them.
const MOST_FRAMES: usize = 5000;
const MOST_FILES: usize = 1 << 20;

impl PendingEnd {
    /// Holds a frame. Returns false if there are too many.
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

/// A start that ended without giving a reason, while Slurm still has its element.
#[derive(Debug, Clone)]
pub struct LostStart {
    pub job: (JobKey, usize),
    pub start: u32,
    /// Its node.
    pub node: String,
    /// When it began, and when its end was noticed.
    pub began: i64,
    pub at: i64,
    /// Whether Slurm had sent it SIGTERM.
    pub terminated: bool,
    /// Whether its end is still to be reported.
    pub is_news: bool,
}

/// Counts an element while it has no job.
#[derive(Debug)]
pub struct Unsubmitted {
    count: Arc<AtomicUsize>,
    is_counted: bool,
}

impl Unsubmitted {
    pub fn new(count: &Arc<AtomicUsize>) -> Self {
        let mut new = Self {
            count: Arc::clone(count),
            is_counted: false,
        };
        new.set(true);
        new
    }

    pub fn set(&mut self, unsubmitted: bool) {
        let before = std::mem::replace(&mut self.is_counted, unsubmitted);
        if unsubmitted && !before {
            self.count.fetch_add(1, Ordering::Relaxed);
        } else if before && !unsubmitted {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Unsubmitted {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[derive(Debug)]
pub struct Slot {
    pub part: Option<Part>,
    pub task: Task,
    tell: mpsc::Sender<WorkerEvent>,
    pub unsubmitted: Unsubmitted,
    pub phase: Phase,
    pub level: StopRequest,
    /// Why it waits.
    pub why: String,
    /// Its job, and which element of it this is.
    pub job: Option<(JobKey, usize)>,
    pub reader: Option<Reader>,
    /// Another runner has processed the records below this number.
    mark: u64,
    pub held: PendingEnd,
    /// The current start.
    pub start: Option<u32>,
    /// The node of the last start, and when it began.
    pub node: String,
    began_at: i64,
    /// Starts that ended without a reason, about which Slurm has not been asked yet.
    pub lost: Vec<LostStart>,
    /// When it last asked Slurm for a restart.
    pub asked: Option<i64>,
    /// How the last start ended, by its own report.
    pub over: Option<StartEnd>,
    /// Why its records are inconsistent, if they are.
    pub broken: Option<&'static str>,
    /// How many starts of earlier jobs have been wasted in a row; a job in which none began counts as one.
    pub wasted: u32,
    /// The spool of its last job, if that was lost.
    pub earlier: Option<PathBuf>,
    /// How often Slurm has reported it as over without a report from itself.
    pub absent: u32,
    /// Whether Slurm reports it as running.
    pub expected: bool,
    /// Whether Slurm has been asked to start it without delay.
    pub hurried: bool,
    /// How often it was released in a row after Slurm could not launch it; its spool knows too.
    pub released: u32,
    begun: bool,
}

impl Slot {
    pub fn new(
        part: Option<Part>,
        task: Task,
        tell: mpsc::Sender<WorkerEvent>,
        unsubmitted: Unsubmitted,
    ) -> Self {
        Self {
            part,
            task,
            tell,
            unsubmitted,
            phase: Phase::New,
            level: StopRequest::GoOn,
            why: String::new(),
            job: None,
            reader: None,
            mark: 0,
            held: PendingEnd::default(),
            start: None,
            node: String::new(),
            began_at: 0,
            lost: Vec::new(),
            asked: None,
            over: None,
            broken: None,
            wasted: 0,
            earlier: None,
            absent: 0,
            expected: false,
            hurried: false,
            released: 0,
            begun: false,
        }
    }

    /// Assigns a job to it.
    pub fn place(&mut self, job: (JobKey, usize), reader: Reader, mark: u64) {
        self.unsubmitted.set(false);
        self.job = Some(job);
        self.reader = Some(reader);
        self.mark = mark;
        self.held = PendingEnd::default();
        (self.start, self.over, self.absent) = (None, None, 0);
        (self.expected, self.hurried) = (false, false);
        self.phase = Phase::Queued;
        self.why = "submitted".into();
    }

    /// Takes its job away, so that it is submitted again.
    pub fn again(&mut self) {
        self.phase = Phase::New;
        self.unsubmitted.set(true);
        self.earlier = self.reader.as_ref().map(|reader| reader.dir().to_owned());
        (self.job, self.reader) = (None, None);
    }

    /// Whether it has no job and has not been asked to stop.
    pub fn is_new(&self) -> bool {
        self.phase == Phase::New && self.level == StopRequest::GoOn
    }

    /// Whether it ran before and is waiting now.
    pub fn waits_again(&self) -> bool {
        self.begun && self.phase == Phase::Queued
    }

    /// Whether Slurm holds it because it could not launch it, by the reason for which it waits. Slurm may forget that reason.
    pub fn is_held(&self, reason: &str) -> bool {
        let reason = reason.replace('_', " ").to_lowercase();
        reason.contains("launch failed") || (reason == "jobheldadmin" && self.released > 0)
    }

    /// Whether there may be records to read.
    pub fn is_heard(&self) -> bool {
        let may_write = self.phase == Phase::Running || self.expected;
        self.reader.is_some() && may_write && self.phase != Phase::Over
    }

    /// Whether its end, and everything before it, has been received: then its records are no longer only in its spool.
    pub fn is_told(&self) -> bool {
        self.phase == Phase::Over && self.tell.is_closed()
    }

    async fn send(&self, heard: WorkerEvent) {
        // Nobody listens to a dropped attempt.
        let _ = self.tell.send(heard).await;
    }

    pub async fn note(&self, level: LogLevel, text: String) {
        self.note_at(LogLine::of_runner(level, text), None).await;
    }

    /// Adds a record's message to the log, at its time.
    async fn note_read(&self, level: LogLevel, text: String, at: i64, mark: Option<ReadMark>) {
        let line = LogLine {
            at: Time(at),
            ..LogLine::of_runner(level, text)
        };
        self.note_at(line, mark).await;
    }

    async fn note_at(&self, line: LogLine, mark: Option<ReadMark>) {
        self.send(WorkerEvent::Remote(ElementEvent::Line(line, mark)))
            .await;
    }

    /// Handles new records.
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
                // It has a final result or failure, so another start would be useless.
                break;
            }
            let fresh = number >= self.mark;
            // This mark is stored together with what the record says.
            let read = ReadMark::after(key, element, number);
            match word {
                SpoolEvent::Began { job, node, pid } => {
                    let (job, node) = (short(job), short(node));
                    let start = (number >> 32) as u32;
                    let text = spool::begins(&job, &node, pid);
                    let began = ElementUpdate::Began {
                        start,
                        node: node.clone(),
                        at,
                    };
                    news.push((key, element, began));
                    self.begin(start, node, at, fresh).await;
                    if fresh {
                        self.note_read(LogLevel::Debug, text, at, Some(read)).await;
                    }
                }
                SpoolEvent::Frame(
                    frame @ (FromWorker::Artifact { .. }
                    | FromWorker::Silent { .. }
                    | FromWorker::Answer(_)
                    | FromWorker::Failed(_)
                    | FromWorker::NotLoaded { .. }),
                ) => {
                    if !self.held.hold(frame) {
                        self.broken = Some("its spool tells of more artifacts than a stage makes");
                        break;
                    }
                }
                SpoolEvent::Frame(frame @ FromWorker::Progress(_)) => {
                    self.send(WorkerEvent::Frame(frame)).await;
                }
                SpoolEvent::Frame(frame) => {
                    if fresh {
                        self.send(WorkerEvent::Remote(ElementEvent::Frame(frame, read)))
                            .await;
                    }
                }
                SpoolEvent::Line { source, text } => {
                    if fresh {
                        let line = line(source, text, at);
                        self.send(WorkerEvent::Remote(ElementEvent::Line(line, Some(read))))
                            .await;
                    }
                }
                SpoolEvent::Exited {
                    status,
                    usage,
                    out_of_memory,
                } => {
                    self.held.exit = Some(WorkerExit {
                        status,
                        usage,
                        out_of_memory: Some(out_of_memory),
                    });
                }
                SpoolEvent::Over(over) => {
                    self.end_reported(over, at, fresh.then_some(read), news)
                        .await;
                }
            }
        }
        self.send(WorkerEvent::Remote(ElementEvent::ReadTo(ReadMark {
            job: key,
            element,
            number: last.saturating_add(1).max(self.mark),
        })))
        .await;
    }

    /// A start has begun. An earlier one whose end was not reported is lost.
    async fn begin(&mut self, start: u32, node: String, at: i64, fresh: bool) {
        if self.start.is_some_and(|before| before != start) {
            self.lose_start(at, fresh);
        }
        (self.node, self.began_at) = (node.clone(), at);
        self.held = PendingEnd::default();
        (self.start, self.over, self.absent) = (Some(start), None, 0);
        self.phase = Phase::Running;
        self.why.clear();
        if fresh {
            // Slurm can launch it again.
            self.released = 0;
        }
        if !std::mem::replace(&mut self.begun, true) {
            self.send(WorkerEvent::Remote(ElementEvent::Began { node }))
                .await;
        }
    }

    /// Passes on what an element wrote that ended without a result while no runner was there: its metrics, lines and starts
    /// belong to the history. Nothing else of it is used.
    ///
    /// # Errors
    /// Its spool cannot be read at the moment. What a damaged one has before the damage is passed on.
    pub async fn read_out(
        &mut self,
        (key, element): (JobKey, usize),
        mut reader: Reader,
        mark: u64,
        news: &mut Vec<(JobKey, usize, ElementUpdate)>,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        loop {
            // The file system may hang.
            let looked = tokio::task::spawn_blocking(move || {
                let mut records = Vec::new();
                let more = reader.look_on(&mut records);
                (reader, records, more)
            });
            let (back, records, more) = looked.await?;
            reader = back;
            for Record { number, at, word } in records {
                if number < mark {
                    continue;
                }
                let start = (number >> 32) as u32;
                let read = ReadMark::after(key, element, number);
                match word {
                    SpoolEvent::Began { job, node, pid } => {
                        let (job, node) = (short(job), short(node));
                        let text = spool::begins(&job, &node, pid);
                        self.note_read(LogLevel::Debug, text, at, Some(read)).await;
                        let began = ElementUpdate::Began { start, node, at };
                        news.push((key, element, began));
                    }
                    SpoolEvent::Frame(frame @ (FromWorker::Metrics(_) | FromWorker::Log(_))) => {
                        self.send(WorkerEvent::Remote(ElementEvent::Frame(frame, read)))
                            .await;
                    }
                    SpoolEvent::Line { source, text } => {
                        let line = line(source, text, at);
                        self.send(WorkerEvent::Remote(ElementEvent::Line(line, Some(read))))
                            .await;
                    }
                    SpoolEvent::Over(over) => {
                        let reason = shortened(reported(&over, false).0);
                        if !reason.is_empty() {
                            let ended = ElementUpdate::Ended { start, reason, at };
                            news.push((key, element, ended));
                        }
                    }
                    SpoolEvent::Frame(_) | SpoolEvent::Exited { .. } => {}
                }
            }
            match more {
                Ok(true) => {}
                Ok(false) | Err(SpoolError::Damaged { .. }) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A start has reported its end. `fresh`: the mark of that record, unless it was processed before.
    async fn end_reported(
        &mut self,
        over: StartEnd,
        at: i64,
        fresh: Option<ReadMark>,
        news: &mut Vec<(JobKey, usize, ElementUpdate)>,
    ) {
        let (reason, goes_on) = reported(&over, self.held.has_result());
        let reason = shortened(reason);
        if !reason.is_empty() {
            self.start_ended(&reason, at, news);
            if goes_on && fresh.is_some() {
                let text = spool::goes_on(&reason);
                self.note_read(LogLevel::Warn, text, at, fresh).await;
            }
        }
        if goes_on {
            self.phase = Phase::Queued;
            self.why = "to be started again".into();
            if !matches!(over, StartEnd::Terminated { .. }) {
                self.asked = Some(at);
            }
        } else {
            match &over {
                StartEnd::OutOfTries { reason } => self.end(too_often(reason)).await,
                StartEnd::GaveUp => self.end(too_often("it failed each time")).await,
                _ => self.deliver().await,
            }
        }
        self.over = Some(over);
    }

    /// Records in the history how the current start ended.
    pub fn start_ended(
        &mut self,
        reason: &str,
        at: i64,
        news: &mut Vec<(JobKey, usize, ElementUpdate)>,
    ) {
        if let (Some((key, element)), Some(start)) = (self.job, self.start.take()) {
            let reason = reason.to_owned();
            news.push((key, element, ElementUpdate::Ended { start, reason, at }));
        }
    }

    /// The current start is over, for a reason that is still to be found out. `is_news`: whether to report it.
    pub fn lose_start(&mut self, at: i64, is_news: bool) {
        if let (Some(job), Some(start)) = (self.job, self.start.take()) {
            self.lost.push(LostStart {
                job,
                start,
                node: self.node.clone(),
                began: self.began_at,
                at,
                terminated: matches!(self.over, Some(StartEnd::Terminated { .. })),
                is_news,
            });
        }
    }

    /// Passes on the last start's report of its end.
    pub async fn deliver(&mut self) {
        for frame in std::mem::take(&mut self.held.frames) {
            self.send(WorkerEvent::Frame(frame)).await;
        }
        let left = WorkerExit {
            status: ExitStatus::Code(0),
            usage: Usage::default(),
            out_of_memory: Some(false),
        };
        let exit = self.held.exit.unwrap_or(left);
        self.send(WorkerEvent::Exited(exit)).await;
        self.phase = Phase::Over;
        self.unsubmitted.set(false);
    }

    /// Reports that it was stopped before its start, or between two starts.
    pub async fn cancelled(&mut self) {
        self.held = PendingEnd {
            frames: vec![cancelled()],
            ..PendingEnd::default()
        };
        self.deliver().await;
    }

    /// Reports that Slurm has cancelled it as requested.
    pub async fn killed(&mut self) {
        self.held.frames.clear();
        match self.level {
            StopRequest::Ending | StopRequest::Now => {
                self.held.exit = Some(WorkerExit {
                    status: ExitStatus::Signal(libc::SIGKILL),
                    usage: self.held.exit.map(|exit| exit.usage).unwrap_or_default(),
                    out_of_memory: Some(false),
                });
                self.deliver().await;
            }
            _ => self.cancelled().await,
        }
    }

    /// Reports an end that only happens on a cluster.
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

/// The reason for the history that a start gives for its end, and whether the element goes on. If it gives none, Slurm has one.
fn reported(over: &StartEnd, has_result: bool) -> (&str, bool) {
    match over {
        StartEnd::Done if has_result => ("succeeded", false),
        StartEnd::Done => ("failed", false),
        StartEnd::Stopped => ("stopped", false),
        StartEnd::GaveUp => ("started too often", false),
        StartEnd::OutOfTries { reason } => (reason.as_str(), false),
        StartEnd::TimeLimit { .. } | StartEnd::Again { .. } | StartEnd::Terminated { .. } => {
            (over.why_again().unwrap_or_default(), true)
        }
    }
}

/// A line that a worker has printed.
fn line(source: LogSource, text: String, at: i64) -> LogLine {
    LogLine {
        at: Time(at),
        level: LogLevel::Debug as u32,
        source,
        text,
    }
}

/// The end of an element that has used up its restarts.
pub fn too_often(last: &str) -> ClusterEnd {
    let hint = match last == NO_PROGRESS {
        true => {
            "each start ended where the one before it did: raise `time` or lower `signal` (in retort.toml or with \
             --slurm), or save more often (`checkpoint_seconds`, `shard_size`); `retort resume` tries again"
        }
        false => "`retort log` says how each start ended; `retort resume` tries again",
    };
    ClusterEnd {
        reason: "started too often".into(),
        message: format!(
            "{}, after all restarts that `requeue` allows",
            shortened(last)
        ),
        hint: Some(hint.into()),
    }
}

/// Whether an element's records may still lead to a result. `goes_on`: whether Slurm still has it.
///
/// # Errors
/// Its spool cannot be read at the moment. A damaged spool is not an error: it gives no result.
pub fn is_worth_taking(dir: &Path, goes_on: bool) -> Result<bool, SpoolError> {
    let mut reader = Reader::new(PathBuf::from(dir));
    let (mut held, mut over) = (PendingEnd::default(), None);
    loop {
        let mut records = Vec::new();
        let more = reader.look_on(&mut records);
        for record in records {
            match record.word {
                SpoolEvent::Began { .. } => (held, over) = (PendingEnd::default(), None),
                SpoolEvent::Frame(frame @ FromWorker::Answer(_)) => held.frames = vec![frame],
                SpoolEvent::Over(last) => over = Some(last),
                _ => {}
            }
        }
        match more {
            Ok(true) => {}
            Ok(false) => break,
            Err(SpoolError::Damaged { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(match over {
        Some(StartEnd::Done) => held.has_result(),
        Some(StartEnd::Stopped | StartEnd::OutOfTries { .. } | StartEnd::GaveUp) => false,
        _ => goes_on || held.has_result(),
    })
}

/// Slurm's id of the job that wrote this spool, from its first element that has begun.
///
/// # Errors
/// A file cannot be read at the moment.
pub fn job_of(spool: &Path, elements: usize) -> Result<Option<u64>, SpoolError> {
    for element in 0..elements {
        let mut records = Vec::new();
        match Reader::new(spool::element_dir(spool, element)).look(&mut records) {
            Ok(_) | Err(SpoolError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        let id = records.iter().find_map(|record| match &record.word {
            SpoolEvent::Began { job, .. } => job.split('_').next()?.parse().ok(),
            _ => None,
        });
        if id.is_some() {
            return Ok(id);
        }
    }
    Ok(None)
}

/// Cuts the name of a node or a job's id: a spool may contain one of any length.
fn short(name: String) -> String {
    match name.len() {
        0..=256 => name,
        _ => name.chars().take(256).collect(),
    }
}

/// The answer of a worker that was stopped before it began.
fn cancelled() -> FromWorker {
    FromWorker::Failed(Failure::new(FailureCode::Cancelled, "it had not begun"))
}
