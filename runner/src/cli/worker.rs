//! `retort worker`.

use std::path::{Path, PathBuf};

use clap::ValueHint;

use crate::cli::{Context, Error, Exit};
use crate::cluster::node::{self, ElementIdentity};
use crate::worker::{self, WorkerError};

/// Arguments of `worker`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process id of the runner; the worker ends with it.
    #[arg(long, value_name = "PID", required_unless_present = "spool")]
    pub parent: Option<u32>,
    /// The spool of a cluster job; this process is an element of it.
    #[arg(long, value_name = "DIR", conflicts_with = "parent", value_hint = ValueHint::DirPath)]
    pub spool: Option<PathBuf>,
}

/// Loads a plugin and makes one call; returns only if it is not a worker. On a cluster it supervises one that does.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    if let Some(spool) = &args.spool {
        return watch(spool, context);
    }
    match worker::main(args.parent.unwrap_or_default()) {
        Ok(never) => match never {},
        Err(error @ WorkerError::NotAWorker) => {
            Err(Error::new(Exit::Usage, error.to_string())
                .hint("`retort run RECIPE` runs a recipe"))
        }
        Err(error) => Err(Error::new(Exit::Internal, error.to_string())),
    }
}

/// Runs an element of a job.
fn watch(spool: &Path, context: &Context) -> Result<(), Error> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let Ok(job) = std::env::var("SLURM_JOB_ID") else {
        let message = "SLURM_JOB_ID is not set: this is not a Slurm job";
        return Err(Error::new(Exit::Usage, message)
            .hint("`retort run --executor slurm RECIPE` submits jobs"));
    };
    let shown_job = match ["SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"].map(variable) {
        [array, element] if !array.is_empty() && !element.is_empty() => {
            format!("{array}_{element}")
        }
        _ => job.clone(),
    };
    let place = ElementIdentity {
        spool: spool.to_owned(),
        // Outside an array the rank counts, which is 0 in a job of one process.
        element: ["SLURM_ARRAY_TASK_ID", "SLURM_PROCID"]
            .iter()
            .find_map(|name| variable(name).parse().ok())
            .unwrap_or(0),
        job,
        shown_job,
        node: variable("SLURMD_NODENAME"),
        local_rank: variable("SLURM_LOCALID").parse().unwrap_or(0),
        sees_all_devices: false,
    };
    match context.runtime()?.block_on(node::serve(&place)) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::said(Exit::StageFailed)),
        Err(error) => Err(Error::new(Exit::Internal, error.to_string())),
    }
}
