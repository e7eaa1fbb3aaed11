//! The runner's handle of a rank in another process: like a local worker, it gets a task, sends events and is stopped.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use retort_abi::Part;
use tokio::task::JoinHandle;

use super::{LaunchedRank, TrainingBoard};
use crate::cluster::spool::{self, JobSpec, Reader, Record, SpoolError, SpoolEvent, SpoolReading};
use crate::frame::{Task, ToWorker};
use crate::store::Usage;
use crate::worker::death::ExitStatus;
use crate::worker::process::{WorkerEvent, WorkerExit};
use crate::worker::remote::{ClusterEnd, ElementEvent};

/// How often a spool is read.
const LOOK: Duration = Duration::from_millis(250);
/// How often a rank writes.
const WRITE: Duration = Duration::from_millis(500);
/// How long a rank that must end at once may take to report its end.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// A training that is posted for the ranks in other processes.
#[derive(Debug)]
pub struct PostedTraining {
    board: Arc<TrainingBoard>,
    dir: PathBuf,
    name: String,
    threads: usize,
    /// Whether it has been posted.
    posted: Mutex<bool>,
    /// When its ranks were asked to end at once.
    ended_at: OnceLock<Instant>,
}

impl PostedTraining {
    /// A training with its spool in a work directory.
    pub fn new(board: &Arc<TrainingBoard>, work_dir: &Path, threads: usize) -> Arc<Self> {
        let name = board.name_of_next();
        Arc::new(Self {
            board: Arc::clone(board),
            dir: work_dir.join(spool::FOLDER).join(&name),
            name,
            threads,
            posted: Mutex::new(false),
            ended_at: OnceLock::new(),
        })
    }

    /// The name of the ranks' rendezvous, which keeps two trainings apart.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// This process's rank.
    pub fn place(&self) -> &LaunchedRank {
        self.board.place()
    }

    fn post(&self, task: &Task) -> io::Result<()> {
        let mut posted = self.posted.lock().unwrap_or_else(PoisonError::into_inner);
        if *posted {
            return Ok(());
        }
        let of = self.board.place().size;
        let other = |error: SpoolError| io::Error::other(error.to_string());
        spool::make_dir(&self.dir)?;
        let spec = JobSpec {
            format: spool::FORMAT,
            elements: (0..of).map(|index| Some(Part { index, of })).collect(),
            task: task.clone(),
            threads: self.threads,
            requeue: 0,
            wasted: Vec::new(),
            interval: WRITE,
            again: false,
            ranks: true,
            meeting: self.name.clone(),
        };
        spool::write_job_spec(&self.dir, &spec).map_err(other)?;
        spool::ask_to_stop(&self.dir, false).map_err(other)?;
        self.board.assign(&self.dir)?;
        *posted = true;
        Ok(())
    }
}

impl Drop for PostedTraining {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A reader, the records that it read, and the outcome.
type SpoolRead = (Reader, Vec<Record>, Result<SpoolReading, SpoolError>);

/// The runner's handle of one rank.
#[derive(Debug)]
pub struct RemoteRank {
    job: Arc<PostedTraining>,
    /// None while it is reading.
    reader: Option<Reader>,
    looking: Option<JoinHandle<SpoolRead>>,
    heard: VecDeque<WorkerEvent>,
    exit: WorkerExit,
    over: bool,
}

impl RemoteRank {
    /// Of a training.
    pub fn new(job: &Arc<PostedTraining>, rank: usize) -> Self {
        Self {
            reader: Some(Reader::new(spool::element_dir(&job.dir, rank))),
            looking: None,
            job: Arc::clone(job),
            heard: VecDeque::new(),
            exit: WorkerExit {
                status: ExitStatus::Signal(libc::SIGKILL),
                usage: Usage::default(),
                out_of_memory: Some(false),
            },
            over: false,
        }
    }

    /// Sends a message.
    pub fn send(&mut self, message: &ToWorker) {
        match message {
            ToWorker::Start(task) => {
                if let Err(error) = self.job.post(task) {
                    self.lose(
                        "not started",
                        format!("the spool for ranks cannot be made: {error}"),
                    );
                }
            }
            // If the file cannot be written now, the next, firmer request writes it.
            ToWorker::StopAtCheckpoint => drop(spool::ask_to_stop(&self.job.dir, true)),
            ToWorker::StopNow => drop(spool::ask_to_end(&self.job.dir)),
        }
    }

    /// Ends it, by a message: no signal reaches it.
    pub fn signal(&self, signal: i32) {
        if signal == libc::SIGKILL {
            let _ = spool::ask_to_end(&self.job.dir);
            self.job.ended_at.get_or_init(Instant::now);
        }
    }

    /// Its next event. Cancel-safe. Must not be called after [`WorkerEvent::Exited`].
    pub async fn next(&mut self) -> WorkerEvent {
        loop {
            if let Some(event) = self.heard.pop_front() {
                return event;
            }
            if self.over {
                return WorkerEvent::Exited(self.exit);
            }
            self.look().await;
            if !self.heard.is_empty() || self.over {
                continue;
            }
            let ended = self.job.ended_at.get();
            self.over = ended.is_some_and(|at| at.elapsed() > LAST_WORDS);
            if !self.over {
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    /// Reads new records on another thread, because a hanging file system must not block everything else. Cancel-safe: an
    /// abandoned read is awaited the next time.
    async fn look(&mut self) {
        if let Some(mut reader) = self.reader.take() {
            self.looking = Some(tokio::task::spawn_blocking(move || {
                let mut records = Vec::new();
                let looked = reader.look(&mut records);
                (reader, records, looked)
            }));
        }
        let Some(looking) = &mut self.looking else {
            return;
        };
        let looked = looking.await;
        self.looking = None;
        let (reader, records, looked) = match looked {
            Ok(looked) => looked,
            Err(error) => return self.lose("spool not read", error.to_string()),
        };
        self.reader = Some(reader);
        for record in records {
            match record.word {
                SpoolEvent::Began { .. } => {}
                SpoolEvent::Frame(frame) => self.heard.push_back(WorkerEvent::Frame(frame)),
                SpoolEvent::Line { source, text } => {
                    self.heard.push_back(WorkerEvent::Line(source, text))
                }
                SpoolEvent::Exited {
                    status,
                    usage,
                    out_of_memory,
                } => {
                    self.exit = WorkerExit {
                        status,
                        usage,
                        out_of_memory: Some(out_of_memory),
                    };
                }
                SpoolEvent::Over(_) => self.over = true,
            }
        }
        match looked {
            Ok(_) | Err(SpoolError::Io { .. }) => {}
            Err(error @ SpoolError::Damaged { .. }) => {
                self.lose("spool damaged", error.to_string())
            }
        }
    }

    fn lose(&mut self, reason: &str, message: String) {
        let end = ClusterEnd {
            reason: reason.to_owned(),
            message,
            hint: None,
        };
        let event = WorkerEvent::Remote(ElementEvent::Ended(end));
        self.heard.push_back(event);
        self.over = true;
    }
}
