//! The runner's side of a stage on a cluster: submits elements, reads their spools, and restarts those that failed.
//!
//! In: tasks of a stage and its parts, and stop requests. Out: events of each element ([`Element::next`]), and records of jobs
//! in the store. Each attempt has one [`Dispatcher`], a separate async task: it batches submissions, reads the spools of all
//! elements in turn and polls Slurm. It takes over jobs that an earlier runner submitted.
//! Deliberately absent: what an end means for the stage (see the executor), and how Slurm's programs are called.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use retort_abi::Part;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cluster::dispatch::slot::{Phase, Slot, StopRequest, Unsubmitted};
use crate::cluster::slurm::{Layout, Slurm};
use crate::cluster::spool::{self, JobSpec, SpoolError};
use crate::frame::{Task, ToWorker};
use crate::settings::Profile;
use crate::store::{AttemptId, ElementUpdate, JobKey, Store, StoreError, Usage};
use crate::worker::death::ExitStatus;
use crate::worker::process::{WorkerEvent, WorkerExit};
use crate::worker::remote::ClusterEnd;

mod adopt;
mod lost_start;
mod script;
mod slot;
mod stopping;
mod submission;
mod watch;

/// How long tasks are collected before they are submitted together.
const GATHER: Duration = Duration::from_millis(50);
/// The shortest time between two reads of spools, and how many elements are read per second, which is how many write per
/// second (`JobSpec::interval`).
const LOOK: Duration = Duration::from_millis(250);
const LOOKS_PER_SECOND: usize = 200;
/// How soon Slurm is asked again about elements that it reports as over.
const SETTLE: Duration = Duration::from_secs(2);
/// The first and the longest delay before a full queue is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// What a dispatcher reports while jobs run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DispatchEvent {
    /// Slurm has accepted a job.
    Submitted {
        /// The job's id in Slurm.
        job: u64,
        /// Number of elements, for an array.
        elements: Option<usize>,
    },
    /// Something unexpected.
    Warning(String),
}

/// A stage to be submitted.
pub struct StageSubmission {
    /// The store.
    pub store: Arc<Store>,
    /// Slurm.
    pub slurm: Arc<Slurm>,
    /// Counts elements that have no job yet.
    pub unsubmitted: Arc<AtomicUsize>,
    /// Receives its events.
    pub listener: Box<dyn Fn(DispatchEvent) + Send + Sync>,
    /// The attempt.
    pub attempt: AttemptId,
    /// The stage's digest.
    pub digest: String,
    /// The stage's work directory.
    pub work_dir: PathBuf,
    /// What its jobs request from Slurm.
    pub profile: Profile,
    /// Processors and threads per element.
    pub cpus: usize,
    /// Whether its parts have to run at the same time, as ranks of one job.
    pub together: bool,
    /// Whether the ranks can go on with fewer when Slurm no longer has nodes for all of them.
    pub shrinks: bool,
}

/// A stage's jobs.
pub struct Dispatcher {
    commands: mpsc::UnboundedSender<Command>,
    unsubmitted: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for Dispatcher {
    /// The jobs go on, until another runner takes them over.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The runner's handle of an element: like a local worker, it gets a task, sends events and is signalled.
#[derive(Debug)]
pub struct Element {
    part: Option<Part>,
    commands: mpsc::UnboundedSender<Command>,
    unsubmitted: Arc<AtomicUsize>,
    heard: mpsc::Receiver<WorkerEvent>,
    /// The other end of `heard`, until the task is sent. Then only the dispatcher has it, so that its end is noticed.
    tell: Option<mpsc::Sender<WorkerEvent>>,
}

#[derive(Debug)]
enum Command {
    Submit {
        part: Option<Part>,
        task: Box<Task>,
        tell: mpsc::Sender<WorkerEvent>,
        unsubmitted: Unsubmitted,
    },
    Stop {
        part: Option<Part>,
        level: StopRequest,
    },
    Close(oneshot::Sender<()>),
}

impl Element {
    /// Sends a message.
    pub fn send(&mut self, message: &ToWorker) {
        let part = self.part;
        let command = match message {
            ToWorker::Start(task) => {
                let Some(tell) = self.tell.take() else { return };
                Command::Submit {
                    part,
                    task: task.clone(),
                    tell,
                    unsubmitted: Unsubmitted::new(&self.unsubmitted),
                }
            }
            ToWorker::StopAtCheckpoint => Command::Stop {
                part,
                level: StopRequest::Checkpoint,
            },
            ToWorker::StopNow => Command::Stop {
                part,
                level: StopRequest::Now,
            },
        };
        // If the dispatcher is gone, `next` reports its end.
        let _ = self.commands.send(command);
    }

    /// Ends it: no other signal reaches another machine.
    pub fn end(&self) {
        let _ = self.commands.send(Command::Stop {
            part: self.part,
            level: StopRequest::Now,
        });
    }

    /// Its next event. Cancel-safe.
    pub async fn next(&mut self) -> WorkerEvent {
        self.heard
            .recv()
            .await
            .unwrap_or(WorkerEvent::Exited(WorkerExit {
                status: ExitStatus::Code(-1),
                usage: Usage::default(),
                out_of_memory: None,
            }))
    }
}

impl Dispatcher {
    /// Opens the dispatcher of a stage, and finds jobs that were submitted for it before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(submission: StageSubmission) -> Result<Self, StoreError> {
        let (commands, requests) = mpsc::unbounded_channel();
        let unsubmitted = Arc::clone(&submission.unsubmitted);
        let mut dispatch = DispatchLoop::new(submission);
        let waiting = dispatch.waiting.as_deref();
        dispatch
            .to
            .store
            .attempt_waits(dispatch.to.attempt, waiting)
            .await?;
        dispatch.recall().await?;
        let task = tokio::spawn(dispatch.run(requests));
        Ok(Self {
            commands,
            unsubmitted,
            task,
        })
    }

    /// Closes the jobs, after all ends have been reported.
    pub async fn close(dispatcher: Self) {
        let (done, closed) = oneshot::channel();
        if dispatcher.commands.send(Command::Close(done)).is_ok() {
            let _ = closed.await;
        }
    }

    /// A new element, without a task yet.
    pub fn element(&self, part: Option<Part>) -> Element {
        let (tell, heard) = mpsc::channel(64);
        Element {
            part,
            commands: self.commands.clone(),
            unsubmitted: Arc::clone(&self.unsubmitted),
            heard,
            tell: Some(tell),
        }
    }
}

/// A submitted job.
struct Job {
    key: JobKey,
    /// The job's id in Slurm.
    id: u64,
    dir: PathBuf,
    /// The work of its elements.
    elements: Vec<Option<Part>>,
    layout: Layout,
    /// The slots of those elements that this runner manages.
    slots: Vec<Option<usize>>,
    /// The number of starts in earlier jobs that have been wasted in a row, per element.
    wasted: Vec<u32>,
    /// How far another runner has read each element's records.
    marks: Vec<u64>,
    /// Which elements were found to have ended without a result while no runner was there.
    given_up: Vec<bool>,
    /// Whether its elements have been asked to stop.
    stopping: bool,
    /// Whether it was over before this runner came: only results in its spool are of use.
    results_only: bool,
    over: bool,
}

impl Job {
    /// The spools that decide whether an element is taken. Ranks work together: results of some of them are of no use. The
    /// first that was taken was judged for all.
    fn needed_spools(&self, element: usize) -> Vec<PathBuf> {
        match (self.results_only, self.layout) {
            (true, Layout::Ranks(_)) if self.slots.iter().any(Option::is_some) => Vec::new(),
            (true, Layout::Ranks(ranks)) => (0..ranks)
                .map(|rank| spool::element_dir(&self.dir, rank))
                .collect(),
            _ => vec![spool::element_dir(&self.dir, element)],
        }
    }
}

struct DispatchLoop {
    to: StageSubmission,
    jobs: Vec<Job>,
    slots: Vec<Slot>,
    /// Events for the history, written together.
    news: Vec<(JobKey, usize, ElementUpdate)>,
    /// When to poll Slurm next.
    ask_at: Instant,
    /// When to submit elements without a job, and the delay when the queue is full.
    submit_at: Instant,
    put_off: Duration,
    /// The most elements of one array since the queue was full; None before.
    chunk: Option<usize>,
    /// Why nothing runs, as recorded.
    waiting: Option<String>,
    /// Whether the user has been warned that Slurm does not answer.
    silent: bool,
    /// When to cancel again after Slurm did not answer, and the jobs of other runners for which that is still to be done.
    cancel_at: Instant,
    to_cancel: Vec<u64>,
    submitted: u32,
    /// The element to read first.
    heard_from: usize,
    /// Since when ranks that ran before have been waiting.
    waits_since: Option<Instant>,
}

impl DispatchLoop {
    fn new(to: StageSubmission) -> Self {
        let now = Instant::now();
        Self {
            to,
            jobs: Vec::new(),
            slots: Vec::new(),
            news: Vec::new(),
            ask_at: now,
            submit_at: now,
            put_off: RETRY.0,
            chunk: None,
            waiting: Some("not submitted".into()),
            silent: false,
            cancel_at: now,
            to_cancel: Vec::new(),
            submitted: 0,
            heard_from: 0,
            waits_since: None,
        }
    }

    fn spools(&self) -> PathBuf {
        self.to.work_dir.join(spool::FOLDER)
    }

    fn warn(&self, text: impl Into<String>) {
        (self.to.listener)(DispatchEvent::Warning(text.into()));
    }

    /// Finds the jobs that another runner left behind.
    async fn recall(&mut self) -> Result<(), StoreError> {
        for open in self.to.store.open_jobs(&self.to.digest).await? {
            let dir = self.spools().join(&open.name);
            let spec = match spool::read_job_spec(&dir) {
                Ok(spec) => Some(spec),
                Err(SpoolError::Damaged { .. }) => None,
                Err(SpoolError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
                // A job whose specification cannot be read now may be running.
                Err(error) => return Err(unknown(&dir, error)),
            };
            if open.over && spec.is_none() {
                continue;
            }
            let id = match open.job {
                Some(id) => Some(id),
                // The runner ended after submitting it and before recording its id.
                None => self.id_of(&open.name, &dir, spec.as_ref()).await?,
            };
            let (Some(id), Some(spec)) = (id, spec) else {
                match id {
                    Some(id) => {
                        self.to_cancel.push(id);
                        self.to.store.job_over(open.key).await?;
                    }
                    None => self.to.store.job_refused(open.key).await?,
                }
                let _ = std::fs::remove_dir_all(&dir);
                continue;
            };
            if open.job.is_none() {
                let cluster = self.to.slurm.cluster().await.name;
                let store = &self.to.store;
                store.job_submitted(open.key, id, &cluster).await?;
            }
            let slots = spec.elements.len();
            let mut marks = vec![0; slots];
            for (element, mark) in open.imported {
                if let Some(place) = marks.get_mut(element) {
                    *place = mark;
                }
            }
            self.jobs.push(Job {
                key: open.key,
                id,
                dir,
                slots: vec![None; slots],
                layout: spec.layout(),
                wasted: (0..slots)
                    .map(|element| spec.wasted_before(element))
                    .collect(),
                // The result of a whole stage whose attempt has ended was seen, and was not enough.
                given_up: (spec.elements.iter())
                    .map(|part| open.over && open.ended && part.is_none())
                    .collect(),
                elements: spec.elements,
                marks,
                stopping: false,
                results_only: open.over,
                over: false,
            });
        }
        Ok(())
    }

    /// The id of the job that was submitted under this name, if any: from Slurm or, if Slurm has forgotten it, from the
    /// records of its elements.
    async fn id_of(
        &self,
        name: &str,
        dir: &Path,
        spec: Option<&JobSpec>,
    ) -> Result<Option<u64>, StoreError> {
        let found = submission::found(&self.to.slurm, name).await;
        if let Some(id) = found.map_err(|error| unknown(dir, error))? {
            return Ok(Some(id));
        }
        let Some(spec) = spec else { return Ok(None) };
        let (spool, elements) = (dir.to_owned(), spec.elements.len());
        let began = tokio::task::spawn_blocking(move || slot::job_of(&spool, elements)).await;
        match began.map_err(|error| unknown(dir, error))? {
            Ok(Some(id)) => Ok(Some(id)),
            Ok(None) => Ok(self.to.slurm.find_ended(name).await),
            Err(error) => Err(unknown(dir, error)),
        }
    }

    async fn run(mut self, mut requests: mpsc::UnboundedReceiver<Command>) {
        loop {
            let due = self.next_look();
            tokio::select! {
                command = requests.recv() => match command {
                    Some(Command::Close(done)) => {
                        if let Err(error) = self.close().await {
                            tracing::debug!("jobs: {error}");
                        }
                        let _ = done.send(());
                        return;
                    }
                    Some(command) => self.take(command),
                    None => return,
                },
                () = tokio::time::sleep_until(due) => {
                    if let Err(error) = self.tick().await {
                        self.fail(&error).await;
                    }
                }
            }
        }
    }

    /// Writes pending events.
    async fn close(&mut self) -> Result<(), StoreError> {
        let news = std::mem::take(&mut self.news);
        self.to.store.note_elements(&news).await?;
        let open = |job: &&mut Job| !job.over && !job.results_only;
        for job in self.jobs.iter_mut().filter(open) {
            // Left by another runner, and of no use to this attempt.
            if job.slots.iter().all(Option::is_none) {
                let _ = spool::ask_to_end(&job.dir);
                self.to_cancel.push(job.id);
            }
            job.over = true;
            self.to.store.job_over(job.key).await?;
        }
        self.cancel_at = Instant::now();
        self.cancel_left().await;
        for job in &self.to_cancel {
            self.warn(format!(
                "job {job}, which is of no use any more, could not be cancelled: `scancel {job}` does it"
            ));
        }
        Ok(())
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit {
                part,
                task,
                tell,
                unsubmitted,
            } => {
                self.slots.push(Slot::new(part, *task, tell, unsubmitted));
                self.submit_at = self.submit_at.min(Instant::now() + GATHER);
                self.submit_at = self.submit_at.max(Instant::now() + GATHER / 2);
            }
            Command::Stop { part, level } => {
                let slot = self.slots.iter_mut().find(|slot| slot.part == part);
                if let Some(slot) = slot {
                    slot.level = slot.level.max(level);
                }
            }
            Command::Close(_) => {}
        }
    }

    /// When the next round is due.
    fn next_look(&self) -> Instant {
        let now = Instant::now();
        if self.slots.iter().all(|slot| slot.phase == Phase::Over) {
            let settled = |job: &Job| job.over || job.slots.iter().all(Option::is_none);
            return match self.jobs.iter().all(settled) {
                true => now + Duration::from_secs(3600),
                false => now + LOOK,
            };
        }
        let heard = self.slots.iter().filter(|slot| slot.is_heard()).count();
        let look = LOOK.max(Duration::from_millis(
            u64::try_from(1000 * heard / LOOKS_PER_SECOND).unwrap_or(u64::MAX),
        ));
        let mut next = (now + look).min(self.ask_at);
        if self.slots.iter().any(|slot| slot.phase == Phase::New) {
            next = next.min(self.submit_at);
        }
        next.max(now)
    }

    /// A round: stop, submit, read, poll.
    async fn tick(&mut self) -> Result<(), StoreError> {
        self.stop().await;
        self.cancel_left().await;
        if Instant::now() >= self.submit_at {
            self.adopt().await?;
            self.submit().await?;
        }
        self.hear().await?;
        if Instant::now() >= self.ask_at {
            let pause = match self.ask().await? {
                true => SETTLE.min(self.to.profile.poll),
                false => self.to.profile.poll,
            };
            self.ask_at = Instant::now() + pause;
        }
        self.shrink().await;
        self.settle().await
    }

    /// Whether all ranks ran before and are waiting now, and fewer could go on.
    fn ranks_wait_again(&self) -> bool {
        let mut ranks = self.slots.iter().filter(|slot| slot.part.is_some());
        self.to.shrinks && ranks.clone().next().is_some() && ranks.all(Slot::waits_again)
    }

    /// Gives up ranks that ran before and have waited too long for a restart, if fewer can go on.
    async fn shrink(&mut self) {
        if !self.ranks_wait_again() {
            self.waits_since = None;
            return;
        }
        let since = *self.waits_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.to.profile.shrink_after {
            return;
        }
        if Instant::now() < self.cancel_at {
            return;
        }
        for id in self.open_jobs() {
            if let Err(error) = self.to.slurm.cancel(id, &[None], false).await {
                return self.is_not_cancelled(&error);
            }
        }
        let ended = ClusterEnd {
            reason: "no nodes".into(),
            message: format!(
                "its job has been waiting {} s to be restarted",
                since.elapsed().as_secs()
            ),
            hint: None,
        };
        for slot in &mut self.slots {
            if slot.part.is_some() {
                slot.end(ended.clone()).await;
            }
        }
    }

    /// Records what happened, and closes finished jobs.
    async fn settle(&mut self) -> Result<(), StoreError> {
        let news = std::mem::take(&mut self.news);
        self.to.store.note_elements(&news).await?;
        for job in &mut self.jobs {
            let done = |slot: &Option<usize>| {
                slot.is_none_or(|slot| {
                    let slot = &self.slots[slot];
                    slot.is_told() || slot.job.is_none_or(|(at, _)| at != job.key)
                })
            };
            // Elements that the executor has not requested yet may still be wanted.
            if !job.over && job.slots.iter().any(Option::is_some) && job.slots.iter().all(done) {
                job.over = true;
                self.to.store.job_over(job.key).await?;
            }
        }
        self.say_whether_it_waits().await
    }

    async fn say_whether_it_waits(&mut self) -> Result<(), StoreError> {
        let at_work = |slot: &Slot| matches!(slot.phase, Phase::Running | Phase::Over);
        let waiting = match self.slots.iter().any(at_work) {
            true => None,
            false => {
                let why = self.slots.iter().find(|slot| !slot.why.is_empty());
                why.map(|slot| slot.why.clone())
                    .or_else(|| self.waiting.clone())
            }
        };
        if waiting != self.waiting {
            self.to
                .store
                .attempt_waits(self.to.attempt, waiting.as_deref())
                .await?;
            self.waiting = waiting;
        }
        Ok(())
    }

    /// Fails all elements: the store cannot be written to, so reports could no longer be trusted.
    async fn fail(&mut self, error: &StoreError) {
        let ended = ClusterEnd {
            reason: "history not written".into(),
            message: error.to_string(),
            hint: Some("`retort resume` takes up the jobs, which go on".into()),
        };
        for slot in &mut self.slots {
            slot.end(ended.clone()).await;
        }
        // They are not recorded as over.
        for job in &mut self.jobs {
            job.over = true;
        }
    }

    /// Slurm's ids of unfinished jobs.
    fn open_jobs(&self) -> Vec<u64> {
        let open = self.jobs.iter();
        let open = open.filter(|job| !job.over && !job.results_only);
        open.map(|job| job.id).collect()
    }
}

/// A job that another runner left behind can neither be taken over nor given up.
fn unknown(dir: &Path, error: impl std::fmt::Display) -> StoreError {
    let message =
        format!("the state of this spool's job cannot be determined at the moment: {error}");
    StoreError::refused(dir, std::io::Error::other(message))
}
