//! `retort worker`.

use crate::cli::{Context, Error, Exit};
use crate::worker::{self, WorkerError};

/// Arguments of `worker`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Process id of the runner; the worker ends with it.
    #[arg(long, value_name = "PID")]
    pub parent: u32,
}

/// Loads a plugin and makes one call; comes back only when it is no worker.
pub fn execute(args: &Args, _context: &Context) -> Result<(), Error> {
    match worker::main(args.parent) {
        Ok(never) => match never {},
        Err(error @ WorkerError::NotAWorker) => {
            Err(Error::new(Exit::Usage, error.to_string())
                .hint("`retort run RECIPE` runs a recipe"))
        }
        Err(error) => Err(Error::new(Exit::Internal, error.to_string())),
    }
}
