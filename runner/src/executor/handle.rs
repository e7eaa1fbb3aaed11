//! A worker of a stage or of a part: a local process, or an element of a cluster job.
//!
//! In: a stage about to start. Out: a [`WorkerHandle`] for the whole and for each part, all with the same interface.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use retort_abi::{Failure, FailureCode, Part};

use crate::cluster::dispatch::{DispatchEvent, Dispatcher, Element, StageSubmission};
use crate::cluster::node::{MEETING, OWN_ADDRESS, rank_variables};
use crate::cluster::torchrun::{PostedTraining, RemoteRank};
use crate::executor::end::End;
use crate::executor::event::Event;
use crate::executor::held_port::HeldPort;
use crate::executor::options::Cluster;
use crate::executor::spec::{AttemptSpec, RunContext};
use crate::frame::{FrameError, ToWorker};
use crate::plan::Threads;
use crate::settings::Profile;
use crate::store::{AttemptId, StoreError, Time};
use crate::worker::process::{Worker, WorkerEvent};
use crate::worker::remote::ClusterEnd;

/// A worker.
#[derive(Debug)]
pub enum WorkerHandle {
    /// A process of this machine.
    Process(Box<Worker>),
    /// An element of a job.
    Element(Element),
    /// A rank in an externally started process.
    Rank(Box<RemoteRank>),
}

impl WorkerHandle {
    /// Sends a message.
    ///
    /// # Errors
    /// It cannot be written, because a path in it is not UTF-8.
    pub async fn send(&mut self, message: &ToWorker) -> Result<(), FrameError> {
        match self {
            Self::Process(worker) => worker.send(message).await,
            Self::Element(element) => {
                element.send(message);
                Ok(())
            }
            Self::Rank(rank) => {
                rank.send(message);
                Ok(())
            }
        }
    }

    /// Its next event. Cancel-safe. Not to be called after [`WorkerEvent::Exited`].
    pub async fn next(&mut self) -> WorkerEvent {
        match self {
            Self::Process(worker) => worker.next().await,
            Self::Element(element) => element.next().await,
            Self::Rank(rank) => rank.next().await,
        }
    }

    /// Ends it: by this signal, if it can receive signals.
    pub fn signal(&self, signal: i32) {
        match self {
            Self::Process(worker) => worker.signal(signal),
            Self::Element(element) => element.end(),
            Self::Rank(rank) => rank.signal(signal),
        }
    }
}

/// Where a stage's workers run.
pub enum Placement {
    /// On this machine: the process of the whole, and one for each part; the port at which ranks meet, to be held meanwhile.
    Here(WorkerHandle, Vec<(Part, WorkerHandle)>, Option<HeldPort>),
    /// On a cluster.
    Cluster(Box<ClusterPlacement>),
}

/// A stage's requirements of a cluster.
pub struct ClusterPlacement {
    cluster: Cluster,
    profile: Profile,
    cpus: usize,
}

impl Placement {
    /// The process of the whole on this machine, else 0.
    pub fn pid(&self) -> u32 {
        match self {
            Self::Here(WorkerHandle::Process(worker), ..) => worker.pid(),
            _ => 0,
        }
    }

    /// Threads of each worker on a cluster.
    pub fn cpus(&self) -> Option<usize> {
        match self {
            Self::Here(..) => None,
            Self::Cluster(placed) => Some(placed.cpus),
        }
    }
}

/// Creates workers for a stage. Processes are started at once, including that of the whole, which waits while the parts work.
///
/// # Errors
/// The end of the attempt, if it failed to start.
pub fn place(context: &RunContext, spec: &AttemptSpec) -> Result<Placement, End> {
    if let Some(cluster) = &context.cluster {
        let profile = cluster.settings.profile(&spec.stage.kind);
        let profile = profile.map_err(|error| {
            End::Cluster(ClusterEnd {
                reason: "not submitted".into(),
                message: error.message,
                hint: error.hint,
            })
        })?;
        let fixed = match spec.stage.threads {
            Threads::Fixed(threads) => Some(threads),
            Threads::Share => None,
        };
        return Ok(Placement::Cluster(Box::new(ClusterPlacement {
            cpus: profile.cpus.or(fixed).unwrap_or(1).max(1),
            cluster: cluster.clone(),
            profile,
        })));
    }
    let training_board = context
        .training_board
        .as_ref()
        .filter(|_| spec.stage.together);
    let posted = training_board.map(|training_board| {
        let threads = spec.threads_of(Some(Part {
            index: 0,
            of: spec.stage.workers.len(),
        }));
        PostedTraining::new(training_board, &spec.work_dir, threads)
    });
    let start = || {
        let port = match spec.stage.together && posted.is_none() {
            true => Some(HeldPort::take()?),
            false => None,
        };
        let number = port.as_ref().map_or(0, HeldPort::number);
        let meeting = meeting();
        let spawn = |part: Option<Part>| -> std::io::Result<WorkerHandle> {
            let part_of_all = part.filter(|_| spec.stage.together);
            let variables = match (part_of_all, &posted) {
                (None, _) => Vec::new(),
                (Some(part), None) => ranks(part, number, &meeting),
                (Some(part), Some(posted)) if part.index > 0 => {
                    let rank = RemoteRank::new(posted, part.index);
                    return Ok(WorkerHandle::Rank(Box::new(rank)));
                }
                // The environment says where they meet.
                (Some(part), Some(posted)) => {
                    let local_rank = posted.place().local_rank;
                    let mut variables = rank_variables(part, local_rank).to_vec();
                    variables.push((MEETING, posted.name().into()));
                    variables
                }
            };
            let worker = Worker::spawn(spec.threads_of(part), &variables)?;
            Ok(WorkerHandle::Process(Box::new(worker)))
        };
        let whole = spawn(None)?;
        let parts = spec.parts().map(|part| Ok((part, spawn(Some(part))?)));
        Ok(Placement::Here(
            whole,
            parts.collect::<std::io::Result<_>>()?,
            port,
        ))
    };
    start().map_err(|error: std::io::Error| {
        let message = format!("a worker process could not be started: {error}");
        End::Failed(Failure {
            retryable: true,
            ..Failure::new(FailureCode::Io, message)
        })
    })
}

/// The rendezvous of local processes, in the variables of `torchrun`.
fn ranks(part: Part, port: u16, meeting: &str) -> Vec<(&'static str, OsString)> {
    let mut variables = vec![
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string().into()),
        (MEETING, meeting.into()),
        (OWN_ADDRESS.0, OWN_ADDRESS.1.into()),
    ];
    variables.extend(rank_variables(part, part.index));
    variables
}

/// A name that no other training has, in case that a rank of another one comes to the port.
fn meeting() -> String {
    static TRAININGS: AtomicU64 = AtomicU64::new(0);
    let number = TRAININGS.fetch_add(1, Ordering::Relaxed);
    format!("{}-{}-{number}", std::process::id(), Time::now().0)
}

/// Converts an event of a stage's jobs to one of the run.
fn event(stage: &str, dispatched: DispatchEvent) -> Event {
    let stage = stage.to_owned();
    match dispatched {
        DispatchEvent::Submitted { job, elements } => Event::Submitted {
            stage,
            job,
            elements,
        },
        DispatchEvent::Warning(text) => Event::Warning {
            stage: Some(stage),
            text,
        },
    }
}

impl ClusterPlacement {
    /// Opens the dispatcher of an attempt, and returns a handle for the whole and for each part.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn open(
        self,
        context: &RunContext,
        spec: &AttemptSpec,
        attempt: AttemptId,
    ) -> Result<(Dispatcher, WorkerHandle, Vec<(Part, WorkerHandle)>), StoreError> {
        let (listener, stage) = (Arc::clone(&context.listener), spec.stage.name.clone());
        let dispatcher = Dispatcher::open(StageSubmission {
            store: Arc::clone(&context.store),
            slurm: self.cluster.slurm,
            unsubmitted: Arc::clone(&context.unsubmitted),
            listener: Box::new(move |dispatched| listener(event(&stage, dispatched))),
            attempt,
            digest: spec.digest.hex.clone(),
            work_dir: spec.work_dir.clone(),
            profile: self.profile,
            cpus: self.cpus,
            together: spec.stage.together,
            shrinks: spec
                .stage
                .min_workers
                .is_some_and(|least| least < spec.stage.workers.len()),
        })
        .await?;
        let whole = WorkerHandle::Element(dispatcher.element(None));
        let parts = spec.parts();
        let parts = parts.map(|part| (part, WorkerHandle::Element(dispatcher.element(Some(part)))));
        let parts = parts.collect();
        Ok((dispatcher, whole, parts))
    }
}
