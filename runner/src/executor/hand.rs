//! Whoever works on a stage or a part of it: a process of this machine, or an element of a job on a cluster.
//!
//! In: a stage about to begin. Out: a [`Hand`] for it and for each part, which all are sent, heard and ended alike.

use std::ffi::OsString;
use std::net::TcpListener;
use std::sync::Arc;

use retort_abi::{Failure, FailureCode, Part};

use crate::cluster::Ended;
use crate::cluster::dispatch::{Assignment, Desk, Element};
use crate::cluster::slurm::Slurm;
use crate::executor::attempt::{Bench, Brief, End};
use crate::frame::{FrameError, ToWorker};
use crate::plan::Threads;
use crate::settings::{Profile, Settings};
use crate::store::{AttemptId, StoreError};
use crate::worker::process::{Heard, Worker};

/// A cluster, and what stages ask of it.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Slurm.
    pub slurm: Arc<Slurm>,
    /// What is set.
    pub settings: Arc<Settings>,
}

/// Whoever works.
#[derive(Debug)]
pub enum Hand {
    /// A process of this machine.
    Process(Box<Worker>),
    /// An element of a job.
    Element(Element),
}

impl Hand {
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
        }
    }

    /// What it does next. Cancel-safe. Not to be called after [`Heard::Exited`].
    pub async fn next(&mut self) -> Heard {
        match self {
            Self::Process(worker) => worker.next().await,
            Self::Element(element) => element.next().await,
        }
    }

    /// Ends it: by this signal, where there are signals.
    pub fn signal(&self, signal: i32) {
        match self {
            Self::Process(worker) => worker.signal(signal),
            Self::Element(element) => element.end(),
        }
    }
}

/// Where a stage is worked on.
pub enum Placement {
    /// On this machine: the process of the whole, and one for each part.
    Here(Hand, Vec<(Part, Hand)>),
    /// On a cluster.
    Cluster(Box<Placed>),
}

/// What a stage asks of a cluster.
pub struct Placed {
    cluster: Cluster,
    profile: Profile,
    cpus: usize,
}

impl Placement {
    /// The process of the whole on this machine, else 0.
    pub fn pid(&self) -> u32 {
        match self {
            Self::Here(Hand::Process(worker), _) => worker.pid(),
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

/// Finds hands for a stage: processes are started at once, that of the whole too, which waits while the parts work.
///
/// # Errors
/// How the attempt has ended before it began.
pub fn place(bench: &Bench, brief: &Brief) -> Result<Placement, End> {
    if let Some(cluster) = &bench.cluster {
        if brief.stage.together {
            return Err(End::Cluster(Ended {
                reason: "not submitted".into(),
                message: "the workers of a training have to run at the same time, which the elements of a job array need not"
                    .into(),
                hint: Some(
                    "leave `workers` out, or run this stage with `--executor local` inside an allocation"
                        .into(),
                ),
            }));
        }
        let profile = cluster.settings.profile(&brief.stage.kind);
        let profile = profile.map_err(|error| {
            End::Cluster(Ended {
                reason: "not submitted".into(),
                message: error.message,
                hint: error.hint,
            })
        })?;
        let fixed = match brief.stage.threads {
            Threads::Fixed(threads) => Some(threads),
            Threads::Share => None,
        };
        return Ok(Placement::Cluster(Box::new(Placed {
            cpus: profile.cpus.or(fixed).unwrap_or(1).max(1),
            cluster: cluster.clone(),
            profile,
        })));
    }
    let hire = || {
        let port = match brief.stage.together {
            true => free_port()?,
            false => 0,
        };
        let spawn = |part: Option<Part>| -> std::io::Result<Hand> {
            let part_of_all = part.filter(|_| brief.stage.together);
            let variables = part_of_all.map_or_else(Vec::new, |part| ranks(part, port));
            let worker = Worker::spawn(brief.threads_of(part), &variables)?;
            Ok(Hand::Process(Box::new(worker)))
        };
        let whole = spawn(None)?;
        let parts = brief.parts().map(|part| Ok((part, spawn(Some(part))?)));
        Ok(Placement::Here(
            whole,
            parts.collect::<std::io::Result<_>>()?,
        ))
    };
    hire().map_err(|error: std::io::Error| {
        let message = format!("a worker process could not be started: {error}");
        End::Failed(Failure {
            retryable: true,
            ..Failure::new(FailureCode::Io, message)
        })
    })
}

/// Where processes of this machine meet, as programs that `torchrun` starts are told.
fn ranks(part: Part, port: u16) -> Vec<(&'static str, OsString)> {
    vec![
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string().into()),
        ("RANK", part.index.to_string().into()),
        ("LOCAL_RANK", part.index.to_string().into()),
        ("WORLD_SIZE", part.of.to_string().into()),
    ]
}

/// A port of this machine that nobody listens at.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

impl Placed {
    /// Opens the desk of an attempt, and gives a hand for the whole and for each part.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn open(
        self,
        bench: &Bench,
        brief: &Brief,
        attempt: AttemptId,
    ) -> Result<(Desk, Hand, Vec<(Part, Hand)>), StoreError> {
        let desk = Desk::open(Assignment {
            store: Arc::clone(&bench.store),
            slurm: self.cluster.slurm,
            listener: Arc::clone(&bench.listener),
            stage: brief.stage.name.clone(),
            attempt,
            digest: brief.digest.hex.clone(),
            work_dir: brief.work_dir.clone(),
            profile: self.profile,
            cpus: self.cpus,
        })
        .await?;
        let whole = Hand::Element(desk.element(None));
        let parts = brief.parts();
        let parts = parts.map(|part| (part, Hand::Element(desk.element(Some(part)))));
        let parts = parts.collect();
        Ok((desk, whole, parts))
    }
}
