//! A cluster: the work of stages done by jobs of Slurm, on machines that share the store's directory.
//!
//! In: tasks, as a worker of this machine gets them. Out: the same [`WorkerEvent`](crate::worker::process::WorkerEvent)
//! events, and [`ElementEvent`](crate::worker::remote::ElementEvent)s that only a cluster has. A divisible stage is a job
//! array, an element of it a part; another stage one job. Workers' events come through a [`spool`], so neither the runner's
//! machine nor the runner has to be up: another one takes the job up from its spool. Compute nodes never open the history.
//!
//! [`dispatch`] is the runner's end, [`node`] the end on compute nodes, [`slurm`] the interface to Slurm. Ranks that others
//! have started ([`torchrun`]) use the same spools.

pub mod devices;
pub mod dispatch;
pub mod node;
pub mod slurm;
pub mod spool;
pub mod torchrun;
