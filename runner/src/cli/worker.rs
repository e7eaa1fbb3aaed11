//! `retort worker`.

use crate::cli::{Context, Error, Exit};

/// Arguments of `worker`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Loads a plugin and runs one stage, speaking frames over descriptor 3.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`worker` is not built yet"))
}
