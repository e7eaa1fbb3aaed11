//! A rank of another process, as the runner sees it: like a local worker it gets a task, sends events and is ended.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use retort_abi::Part;

use super::{Board, Place};
use crate::cluster::spool::{self, JobSpec, Reader, SpoolError, SpoolEvent};
use crate::frame::{Task, ToWorker};
use crate::store::Usage;
use crate::worker::death::ExitStatus;
use crate::worker::process::{Exit, WorkerEvent};
use crate::worker::remote::{ClusterEnd, ElementEvent};

/// How often a spool is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// How often a rank writes.
const WRITE: Duration = Duration::from_millis(500);
/// How long a rank that is to end at once may take to say that it has.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// A training, posted for the ranks of other processes.
#[derive(Debug)]
pub struct PostedJob {
    board: Arc<Board>,
    dir: PathBuf,
    name: String,
    threads: usize,
    /// Whether it has been posted.
    posted: Mutex<bool>,
    /// When its ranks were told to end at once.
    ended_at: OnceLock<Instant>,
}

impl PostedJob {
    /// A training whose spool lies in a work directory.
    pub fn new(board: &Arc<Board>, work_dir: &Path, threads: usize) -> Arc<Self> {
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

    /// What ranks call the place where they meet, so that two trainings do not.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where this process stands among the ranks.
    pub fn place(&self) -> &Place {
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
        let order = JobSpec {
            format: spool::FORMAT,
            elements: (0..of).map(|index| Some(Part { index, of })).collect(),
            task: task.clone(),
            threads: self.threads,
            requeue: 0,
            interval: WRITE,
            again: false,
            ranks: true,
            meeting: self.name.clone(),
        };
        spool::write_order(&self.dir, &order).map_err(other)?;
        spool::ask_to_stop(&self.dir, false).map_err(other)?;
        self.board.assign(&self.dir)?;
        *posted = true;
        Ok(())
    }
}

impl Drop for PostedJob {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The runner's end of one rank.
#[derive(Debug)]
pub struct RemoteRank {
    job: Arc<PostedJob>,
    reader: Reader,
    heard: VecDeque<WorkerEvent>,
    exit: Exit,
    over: bool,
}

impl RemoteRank {
    /// Of a training.
    pub fn new(job: &Arc<PostedJob>, rank: usize) -> Self {
        Self {
            reader: Reader::new(spool::element_dir(&job.dir, rank)),
            job: Arc::clone(job),
            heard: VecDeque::new(),
            exit: Exit {
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
            // A file that cannot be written now is written when it is said more firmly.
            ToWorker::CancelAtCheckpoint => drop(spool::ask_to_stop(&self.job.dir, true)),
            ToWorker::CancelNow => drop(spool::ask_to_end(&self.job.dir)),
        }
    }

    /// Ends it: by a word, which is all that reaches it.
    pub fn signal(&self, signal: i32) {
        if signal == libc::SIGKILL {
            let _ = spool::ask_to_end(&self.job.dir);
            self.job.ended_at.get_or_init(Instant::now);
        }
    }

    /// What it does next. Cancel-safe. Not to be called after [`WorkerEvent::Exited`].
    pub async fn next(&mut self) -> WorkerEvent {
        loop {
            if let Some(event) = self.heard.pop_front() {
                return event;
            }
            if self.over {
                return WorkerEvent::Exited(self.exit);
            }
            self.look();
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

    fn look(&mut self) {
        let mut records = Vec::new();
        let looked = self.reader.look(&mut records);
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
                    self.exit = Exit {
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
