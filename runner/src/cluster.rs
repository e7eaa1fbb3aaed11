//! Runs stages as Slurm jobs, on machines that share the store's directory.
//!
//! In: the same tasks as for local workers. Out: the same [`WorkerEvent`](crate::worker::process::WorkerEvent)s, and
//! [`ElementEvent`](crate::worker::remote::ElementEvent)s, which only a cluster has. A divisible stage becomes a job array
//! with one element per part; any other stage becomes one job. Workers send their events through a [`spool`], so neither the
//! runner nor its machine has to stay up: another runner takes over the job from its spool. Compute nodes never open the
//! history.
//!
//! [`dispatch`] is the runner's side, [`node`] the side on compute nodes, [`slurm`] the interface to Slurm. Externally started
//! ranks ([`torchrun`]) use the same spools.

pub mod devices;
pub mod dispatch;
pub mod node;
pub mod slurm;
pub mod spool;
pub mod torchrun;
