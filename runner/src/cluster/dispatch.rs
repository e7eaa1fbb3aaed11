//! The runner's end of a stage on a cluster: submits its elements, reads their spools, and restarts those that
//! failed.
//!
//! In: tasks of a stage and its parts, and the level to stop them. Out: events for each ([`Element::next`]), news of jobs in
//! the store. One [`Dispatcher`] per attempt, a task of its own: it gathers what is to be submitted, reads the spools of all
//! elements in turn and polls Slurm. Jobs submitted earlier, by a runner that is gone, are taken over.
//! Deliberately absent: what an end means for the stage (the executor's), and how Slurm's programs are called.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use retort_abi::Part;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::cluster::dispatch::slot::{Phase, Slot, StopLevel};
use crate::cluster::slurm::{Layout, NewJob, Slurm, SlurmError};
use crate::cluster::spool::{self, JobSpec, Reader, SpoolError};
use crate::frame::{Task, ToWorker};
use crate::settings::Profile;
use crate::store::{AttemptId, ElementUpdate, JobKey, Store, StoreError, Usage};
use crate::worker::death::ExitStatus;
use crate::worker::process::{Exit, WorkerEvent};
use crate::worker::remote::ClusterEnd;

mod script;
mod slot;
mod watch;

/// How long tasks are gathered before they are submitted together.
const GATHER: Duration = Duration::from_millis(50);
/// The shortest time between two looks at spools, and how many elements are looked at in a second.
const LOOK: Duration = Duration::from_millis(250);
const LOOKS_PER_SECOND: usize = 500;
/// How soon Slurm is asked again about elements that it says are over.
const SETTLE: Duration = Duration::from_secs(2);
/// How often a full queue is tried again, at first and at last.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// What a dispatcher tells while jobs run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Slurm has taken a job.
    Submitted {
        /// Slurm's id.
        job: u64,
        /// Elements, where it is an array.
        elements: Option<usize>,
    },
    /// Something is odd.
    Warning(String),
}

/// What jobs of a stage need to know.
pub struct Assignment {
    /// The store.
    pub store: Arc<Store>,
    /// Slurm.
    pub slurm: Arc<Slurm>,
    /// Receives notices.
    pub listener: Box<dyn Fn(Notice) + Send + Sync>,
    /// The stage's name.
    pub stage: String,
    /// The attempt.
    pub attempt: AttemptId,
    /// The stage's digest.
    pub digest: String,
    /// The stage's work directory.
    pub work_dir: PathBuf,
    /// What it asks of Slurm.
    pub profile: Profile,
    /// Processors, and threads, of each element.
    pub cpus: usize,
    /// Whether its parts have to run at the same time: they are ranks of one job then.
    pub together: bool,
    /// Whether these can go on with fewer, where Slurm has no nodes for all of them any more.
    pub shrinks: bool,
}

/// A stage's jobs.
pub struct Dispatcher {
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<()>,
}

impl Drop for Dispatcher {
    /// The jobs go on: their end is for whoever takes them up.
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The runner's end of an element: like a local worker, it gets a task, sends events and is signalled.
#[derive(Debug)]
pub struct Element {
    part: Option<Part>,
    commands: mpsc::UnboundedSender<Command>,
    heard: mpsc::Receiver<WorkerEvent>,
    tell: mpsc::Sender<WorkerEvent>,
}

#[derive(Debug)]
enum Command {
    Submit {
        part: Option<Part>,
        task: Box<Task>,
        tell: mpsc::Sender<WorkerEvent>,
    },
    Stop {
        part: Option<Part>,
        level: StopLevel,
    },
    Close(oneshot::Sender<()>),
}

impl Element {
    /// Sends a message.
    pub fn send(&mut self, message: &ToWorker) {
        let part = self.part;
        let command = match message {
            ToWorker::Start(task) => Command::Submit {
                part,
                task: task.clone(),
                tell: self.tell.clone(),
            },
            ToWorker::CancelAtCheckpoint => Command::Stop {
                part,
                level: StopLevel::Checkpoint,
            },
            ToWorker::CancelNow => Command::Stop {
                part,
                level: StopLevel::Now,
            },
        };
        // A dispatcher that is gone tells of its end.
        let _ = self.commands.send(command);
    }

    /// Ends it: the only signal between machines.
    pub fn end(&self) {
        let _ = self.commands.send(Command::Stop {
            part: self.part,
            level: StopLevel::Now,
        });
    }

    /// What it does next. Cancel-safe.
    pub async fn next(&mut self) -> WorkerEvent {
        self.heard.recv().await.unwrap_or(WorkerEvent::Exited(Exit {
            status: ExitStatus::Code(-1),
            usage: Usage::default(),
            out_of_memory: None,
        }))
    }
}

impl Dispatcher {
    /// Opens the dispatcher of a stage, and finds what was submitted for it before.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(assignment: Assignment) -> Result<Self, StoreError> {
        let (commands, orders) = mpsc::unbounded_channel();
        let mut dispatch = DispatchLoop::new(assignment);
        let waiting = dispatch.waiting.as_deref();
        dispatch
            .to
            .store
            .attempt_waits(dispatch.to.attempt, waiting)
            .await?;
        dispatch.recall().await?;
        let task = tokio::spawn(dispatch.run(orders));
        Ok(Self { commands, task })
    }

    /// Closes the jobs: all ends have been told.
    pub async fn close(dispatcher: Self) {
        let (done, closed) = oneshot::channel();
        if dispatcher.commands.send(Command::Close(done)).is_ok() {
            let _ = closed.await;
        }
    }

    /// An element, to which nothing has been sent.
    pub fn element(&self, part: Option<Part>) -> Element {
        let (tell, heard) = mpsc::channel(64);
        Element {
            part,
            commands: self.commands.clone(),
            heard,
            tell,
        }
    }
}

/// A job that has been submitted.
struct Job {
    key: JobKey,
    /// Slurm's id.
    id: u64,
    dir: PathBuf,
    /// What its elements do.
    elements: Vec<Option<Part>>,
    layout: Layout,
    /// Slots of its elements, where they are this runner's.
    slots: Vec<Option<usize>>,
    /// How far each was taken over by another runner.
    marks: Vec<u64>,
    /// Whether its elements have been asked to stop.
    stopping: bool,
    over: bool,
}

struct DispatchLoop {
    to: Assignment,
    jobs: Vec<Job>,
    slots: Vec<Slot>,
    /// ElementEvent for the history, written together.
    news: Vec<(JobKey, usize, ElementUpdate)>,
    /// When Slurm is asked next.
    ask_at: Instant,
    /// When elements without a job are submitted, and how long that is put off when the queue is full.
    submit_at: Instant,
    put_off: Duration,
    /// Elements of one array at most; none before Slurm has been asked.
    chunk: Option<usize>,
    /// Why nothing runs, as it is recorded.
    waiting: Option<String>,
    /// Whether it has been said that Slurm does not answer.
    silent: bool,
    submitted: u32,
    /// Which elements are heard first.
    heard_from: usize,
    /// Since when ranks that have run wait.
    waits_since: Option<Instant>,
}

impl DispatchLoop {
    fn new(to: Assignment) -> Self {
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
            submitted: 0,
            heard_from: 0,
            waits_since: None,
        }
    }

    fn spools(&self) -> PathBuf {
        self.to.work_dir.join(spool::FOLDER)
    }

    fn warn(&self, text: impl Into<String>) {
        (self.to.listener)(Notice::Warning(text.into()));
    }

    /// Finds the jobs that another runner has left.
    async fn recall(&mut self) -> Result<(), StoreError> {
        for open in self.to.store.open_jobs(&self.to.digest).await? {
            let dir = self.spools().join(&open.name);
            let id = match open.job {
                Some(id) => Some(id),
                // It ended between submitting it and writing its id down.
                None => found(&self.to.slurm, &open.name)
                    .await
                    .map_err(|error| unknown(&dir, error))?,
            };
            let order = match spool::read_order(&dir) {
                Ok(order) => Some(order),
                Err(SpoolError::Damaged { .. }) => None,
                Err(SpoolError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => None,
                // A job whose order cannot be read now may be at work.
                Err(error) => return Err(unknown(&dir, error)),
            };
            let (Some(id), Some(order)) = (id, order) else {
                match id {
                    Some(id) => {
                        let _ = self.to.slurm.cancel(id, &[None], false).await;
                        self.to.store.job_over(open.key).await?;
                    }
                    None => self.to.store.job_refused(open.key).await?,
                }
                let _ = std::fs::remove_dir_all(&dir);
                continue;
            };
            if open.job.is_none() {
                self.to.store.job_submitted(open.key, id, "").await?;
            }
            let mut marks = vec![0; order.elements.len()];
            for (element, mark) in open.imported {
                if let Some(place) = marks.get_mut(element) {
                    *place = mark;
                }
            }
            self.jobs.push(Job {
                key: open.key,
                id,
                dir,
                slots: vec![None; order.elements.len()],
                layout: order.layout(),
                elements: order.elements,
                marks,
                stopping: false,
                over: false,
            });
        }
        Ok(())
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Command>) {
        loop {
            let tick = self.next_look();
            tokio::select! {
                command = orders.recv() => match command {
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
                () = tokio::time::sleep_until(tick) => {
                    if let Err(error) = self.turn().await {
                        self.fail(&error).await;
                    }
                }
            }
        }
    }

    /// Writes what is still pending.
    async fn close(&mut self) -> Result<(), StoreError> {
        let news = std::mem::take(&mut self.news);
        self.to.store.note_elements(&news).await?;
        for job in self.jobs.iter_mut().filter(|job| !job.over) {
            job.over = true;
            self.to.store.job_over(job.key).await?;
        }
        Ok(())
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { part, task, tell } => {
                self.slots.push(Slot::new(part, *task, tell));
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

    /// When there is something to do next.
    fn next_look(&self) -> Instant {
        let now = Instant::now();
        if self.slots.iter().all(|slot| slot.phase == Phase::Over) {
            return now + Duration::from_secs(3600);
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
    async fn turn(&mut self) -> Result<(), StoreError> {
        self.stop().await;
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

    /// Whether all ranks have run, and wait now, and fewer could go on.
    fn ranks_wait_again(&self) -> bool {
        let mut ranks = self.slots.iter().filter(|slot| slot.part.is_some());
        self.to.shrinks && ranks.clone().next().is_some() && ranks.all(Slot::waits_again)
    }

    /// Gives up ranks that have run and wait too long to run again, where fewer can go on.
    async fn shrink(&mut self) {
        if !self.ranks_wait_again() {
            self.waits_since = None;
            return;
        }
        let since = *self.waits_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.to.profile.shrink_after {
            return;
        }
        for id in self.open_jobs() {
            let _ = self.to.slurm.cancel(id, &[None], false).await;
        }
        let ended = ClusterEnd {
            reason: "no nodes".into(),
            message: format!(
                "its job waits since {} s to be started again",
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

    /// Writes down what happened, and closes jobs of which nothing is left.
    async fn settle(&mut self) -> Result<(), StoreError> {
        let news = std::mem::take(&mut self.news);
        self.to.store.note_elements(&news).await?;
        for job in &mut self.jobs {
            let done = |slot: &Option<usize>| {
                slot.is_none_or(|slot| {
                    let slot = &self.slots[slot];
                    slot.phase == Phase::Over || slot.job.is_none_or(|(at, _)| at != job.key)
                })
            };
            // Those that nobody has asked for yet may still be.
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

    /// The store cannot be written to: nothing true could be said any more.
    async fn fail(&mut self, error: &StoreError) {
        let ended = ClusterEnd {
            reason: "history not written".into(),
            message: error.to_string(),
            hint: Some("`retort resume` takes up the jobs, which go on".into()),
        };
        for slot in &mut self.slots {
            slot.end(ended.clone()).await;
        }
    }

    /// Stops what is to be stopped.
    async fn stop(&mut self) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.phase == Phase::New && slot.level > StopLevel::GoOn {
                slot.cancelled().await;
            }
        }
        let slots = &self.slots;
        for job in &mut self.jobs {
            let wish_of = |index: &Option<usize>| match index.map(|index| &slots[index]) {
                Some(slot) if slot.phase != Phase::Over => Some(slot.level),
                _ => None,
            };
            let wishes = job.slots.iter().map(wish_of).collect::<Vec<_>>();
            if wishes
                .iter()
                .flatten()
                .all(|level| *level == StopLevel::GoOn)
            {
                continue;
            }
            let wanted = |level: StopLevel| -> Vec<Option<usize>> {
                let some = wishes.iter().enumerate();
                let some = some.filter(|(_, found)| **found == Some(level));
                let mut names: Vec<_> = some
                    .map(|(element, _)| job.layout.element(element))
                    .collect();
                names.dedup(); // ranks have one
                names
            };
            if !std::mem::replace(&mut job.stopping, true) {
                let _ = spool::ask_to_stop(&job.dir, true);
                let _ = self
                    .to
                    .slurm
                    .cancel(job.id, &wanted(StopLevel::Checkpoint), true)
                    .await;
            }
            let now = wanted(StopLevel::Now);
            if !now.is_empty() {
                let _ = self.to.slurm.cancel(job.id, &now, false).await;
            }
            self.ask_at = self.ask_at.min(Instant::now() + Duration::from_secs(1));
        }
        for slot in &mut self.slots {
            // Once is enough; what comes of it Slurm says.
            if slot.level == StopLevel::Now {
                slot.level = StopLevel::Ending;
            }
        }
    }

    /// Slurm's ids of jobs of which something is left to do.
    fn open_jobs(&self) -> Vec<u64> {
        let open = self.jobs.iter().filter(|job| !job.over);
        open.map(|job| job.id).collect()
    }

    /// Finds elements that another runner has submitted, for those that have no job.
    async fn adopt(&mut self) -> Result<(), StoreError> {
        let new = |slot: &Slot| slot.phase == Phase::New && slot.level == StopLevel::GoOn;
        let unclaimed = |job: &Job| !job.over && job.slots.iter().all(Option::is_none);
        if !self.slots.iter().any(new) || !self.jobs.iter().any(unclaimed) {
            return Ok(());
        }
        let known = self.to.slurm.look(&self.open_jobs()).await;
        let mut taken = BTreeSet::new();
        for index in 0..self.slots.len() {
            if !new(&self.slots[index]) {
                continue;
            }
            let part = self.slots[index].part;
            // The newest first.
            for at in (0..self.jobs.len()).rev() {
                let job = &self.jobs[at];
                let element = job.elements.iter().position(|known| *known == part);
                let Some(element) = element.filter(|element| job.slots[*element].is_none()) else {
                    continue;
                };
                if job.over {
                    continue;
                }
                let dir = spool::element_dir(&job.dir, element);
                let said = known.as_ref().map(|known| {
                    let key = (job.id, job.layout.element(element));
                    known.get(&key).is_some_and(|said| !said.state.is_final())
                });
                let goes_on = said.unwrap_or(true);
                if !slot::is_worth_taking(&dir, goes_on) {
                    // It ended while nobody was there.
                    let key = (job.id, job.layout.element(element));
                    let said = known.as_ref().ok().and_then(|known| known.get(&key));
                    let reason = said.map_or("gone from Slurm", |said| watch::reason(said.state));
                    let reason = reason.to_owned();
                    self.news
                        .push((job.key, element, ElementUpdate::Lost { reason }));
                    continue;
                }
                let (key, mark) = (job.key, job.marks[element]);
                self.jobs[at].slots[element] = Some(index);
                self.slots[index].place((key, element), Reader::new(dir), mark);
                taken.insert(key);
                break;
            }
        }
        for key in taken {
            self.to.store.job_taken(key, self.to.attempt).await?;
        }
        let taken: usize = self
            .jobs
            .iter()
            .flat_map(|job| &job.slots)
            .flatten()
            .count();
        if taken > 0 {
            self.warn(format!(
                "{taken} of {} elements were submitted before and are taken up",
                self.slots.len()
            ));
        }
        self.ask_at = Instant::now();
        // Of other numbers of parts, or ended without a result: they would be in the way.
        let whole = self.slots.iter().all(|slot| slot.part.is_none());
        for job in &mut self.jobs {
            let of_parts = job.elements.iter().any(Option::is_some);
            if job.over || job.slots.iter().any(Option::is_some) || (of_parts == whole) {
                continue;
            }
            job.over = true;
            let _ = self.to.slurm.cancel(job.id, &[None], false).await;
            self.to.store.job_over(job.key).await?;
        }
        Ok(())
    }

    /// Submits what has no job.
    async fn submit(&mut self) -> Result<(), StoreError> {
        let new: Vec<usize> = (0..self.slots.len())
            .filter(|index| {
                let slot = &self.slots[*index];
                slot.phase == Phase::New && slot.level == StopLevel::GoOn
            })
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        // The whole of a stage is no part of an array.
        let (mut parts, wholes): (Vec<usize>, Vec<usize>) = new
            .into_iter()
            .partition(|index| self.slots[*index].part.is_some());
        // The first of several ranks is on the node where all meet.
        parts.sort_by_key(|index| self.slots[*index].part.map(|part| part.index));
        let Some(chunk) = self.chunk_of(&parts).await else {
            return Ok(());
        };
        let arrays = parts.chunks(chunk).map(<[usize]>::to_vec);
        let singles = wholes.into_iter().map(|index| vec![index]);
        for slots in arrays.chain(singles).collect::<Vec<_>>() {
            match self.submit_some(&slots).await? {
                Ok(()) => self.put_off = RETRY.0,
                Err(SlurmError::Full { said }) => {
                    self.full(&slots, &said);
                    return Ok(());
                }
                Err(error @ SlurmError::Silent { .. }) => {
                    self.is_silent(&error);
                    self.submit_at = Instant::now() + self.to.profile.poll;
                    return Ok(());
                }
                Err(error) => {
                    let hint = match &error {
                        SlurmError::Refused { hint, .. } => Some(format!(
                            "{hint} (in retort.toml or with --slurm; `retort doctor` shows what is set)"
                        )),
                        _ => None,
                    };
                    let ended = ClusterEnd {
                        reason: "not submitted".into(),
                        message: error.to_string(),
                        hint,
                    };
                    for index in slots {
                        self.slots[index].end(ended.clone()).await;
                    }
                }
            }
        }
        Ok(())
    }

    /// How many of these parts a job may have; none where they have to wait for others.
    async fn chunk_of(&mut self, parts: &[usize]) -> Option<usize> {
        if !self.to.together {
            let chunk = match self.chunk {
                Some(chunk) => chunk,
                None => self.to.slurm.array_size().await,
            };
            self.chunk = Some(chunk);
            return Some(chunk);
        }
        // Ranks run at the same time or not at all: those that are to be submitted again wait for the others.
        let all = self.slots.iter().filter(|slot| slot.part.is_some());
        let (over, others): (Vec<_>, Vec<_>) = all
            .filter(|slot| slot.phase != Phase::New)
            .partition(|slot| slot.phase == Phase::Over);
        let Some(part) = parts.first().and_then(|index| self.slots[*index].part) else {
            // The whole comes alone.
            return Some(1);
        };
        if over.is_empty() && others.is_empty() && parts.len() >= part.of {
            return Some(parts.len());
        }
        if others.is_empty() && !over.is_empty() {
            for &index in parts {
                let ended = ClusterEnd {
                    reason: "not submitted again".into(),
                    message: "other workers of this training have ended, and one cannot go on without them".into(),
                    hint: Some("`retort resume` goes on from the last checkpoint with all of them".into()),
                };
                self.slots[index].end(ended).await;
            }
        }
        self.submit_at = Instant::now() + SETTLE;
        None
    }

    /// The queue is full: fewer elements may find room, and later all will.
    fn full(&mut self, slots: &[usize], said: &str) {
        if self.put_off == RETRY.0 {
            self.warn(format!(
                "Slurm's queue is full ({said}); trying again until there is room"
            ));
        }
        for &index in slots {
            self.slots[index].why = format!("the queue is full: {said}");
        }
        if slots.len() > 1 && !self.to.together {
            self.chunk = Some(slots.len().div_ceil(2));
        }
        self.submit_at = Instant::now() + self.put_off;
        self.put_off = (self.put_off * 2).min(RETRY.1);
    }

    fn is_silent(&mut self, error: &SlurmError) {
        if !std::mem::replace(&mut self.silent, true) {
            self.warn(format!("{error}; trying again"));
        }
    }

    /// Submits a job whose elements do the work of these slots.
    async fn submit_some(&mut self, slots: &[usize]) -> Result<Result<(), SlurmError>, StoreError> {
        self.submitted += 1;
        let name = format!(
            "retort-{}-{}-{}-{}",
            self.to.digest.get(..12).unwrap_or(&self.to.digest),
            self.to.attempt,
            std::process::id(),
            self.submitted
        );
        let dir = self.spools().join(&name);
        let script = dir.join("batch.sh");
        let order = self.order(slots);
        if let Err(message) = self.make_spool(&dir, &script, &order) {
            let ended = ClusterEnd {
                reason: "not submitted".into(),
                message: format!("the spool in {} cannot be made: {message}", dir.display()),
                hint: None,
            };
            for &index in slots {
                self.slots[index].end(ended.clone()).await;
            }
            return Ok(Ok(()));
        }
        let to = &self.to;
        let layout = order.layout();
        let key = to
            .store
            .begin_job(to.attempt, &to.digest, &name, layout.elements())
            .await?;
        let job = NewJob {
            name: &name,
            script: &script,
            spool: &dir,
            layout,
            cpus: to.cpus,
            profile: &to.profile,
        };
        let (id, cluster) = match submit(&to.slurm, &job).await {
            Ok(taken) => taken,
            Err(error) => {
                to.store.job_refused(key).await?;
                let _ = std::fs::remove_dir_all(&dir);
                return Ok(Err(error));
            }
        };
        to.store.job_submitted(key, id, &cluster).await?;
        (to.listener)(Notice::Submitted {
            job: id,
            elements: layout.elements(),
        });
        for (element, &index) in slots.iter().enumerate() {
            let reader = Reader::new(spool::element_dir(&dir, element));
            self.slots[index].place((key, element), reader, 0);
        }
        self.jobs.push(Job {
            key,
            id,
            dir,
            layout,
            slots: slots.iter().copied().map(Some).collect(),
            marks: vec![0; order.elements.len()],
            elements: order.elements,
            stopping: false,
            over: false,
        });
        self.ask_at = self.ask_at.min(Instant::now() + Duration::from_secs(1));
        Ok(Ok(()))
    }

    /// What the elements of a job for these slots are told.
    fn order(&self, slots: &[usize]) -> JobSpec {
        let to = &self.to;
        let elements: Vec<Option<Part>> =
            slots.iter().map(|index| self.slots[*index].part).collect();
        JobSpec {
            format: spool::FORMAT,
            task: self.slots[slots[0]].task.clone(),
            threads: to.cpus,
            requeue: slots
                .iter()
                .map(|index| to.profile.requeue - self.slots[*index].tries.min(to.profile.requeue))
                .max()
                .unwrap_or(0),
            interval: LOOK
                .max(Duration::from_millis(5) * u32::try_from(elements.len()).unwrap_or(u32::MAX)),
            again: true,
            ranks: to.together && elements[0].is_some(),
            meeting: String::new(),
            elements,
        }
    }

    /// Makes the directory of a job's spool, with its order and its script; why not, where that fails.
    fn make_spool(&self, dir: &Path, script: &Path, order: &JobSpec) -> Result<(), String> {
        spool::make_dir(dir).map_err(|error| error.to_string())?;
        spool::write_order(dir, order).map_err(|error| error.to_string())?;
        spool::ask_to_stop(dir, false).map_err(|error| error.to_string())?;
        let text = script::text(dir, &self.to.profile, order.layout())?;
        spool::put(script, text.as_bytes()).map_err(|error| error.to_string())
    }
}

/// Submits a job; its id and cluster.
async fn submit(slurm: &Slurm, job: &NewJob<'_>) -> Result<(u64, String), SlurmError> {
    let taken = slurm.submit(job).await;
    // Slurm may have taken it all the same.
    if matches!(
        taken,
        Err(SlurmError::Silent { .. } | SlurmError::Full { .. })
    ) && let Ok(Some(id)) = found(slurm, job.name).await
    {
        return Ok((id, String::new()));
    }
    taken
}

/// The job of a name, if there is one. Asked again for a while where Slurm does not answer: a job that it has and nobody
/// knows would work beside the next one.
async fn found(slurm: &Slurm, name: &str) -> Result<Option<u64>, SlurmError> {
    const TRIES: usize = 15;
    for _ in 1..TRIES {
        if let Ok(found) = slurm.find(name).await {
            return Ok(found);
        }
        tokio::time::sleep(RETRY.0).await;
    }
    slurm.find(name).await
}

/// That a job left by another runner cannot be taken up, nor be given up.
fn unknown(dir: &Path, error: impl std::error::Error) -> StoreError {
    let message = format!("what became of the job of this spool is not known now: {error}");
    StoreError::refused(dir, std::io::Error::other(message))
}
