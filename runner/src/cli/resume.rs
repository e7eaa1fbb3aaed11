//! `retort resume`.

use crate::cli::{Context, Error, Exit, run::ExecutionArgs};

/// Arguments of `resume`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// How to run the stages.
    #[command(flatten)]
    pub execution: ExecutionArgs,
}

/// Continues a run with its frozen recipe.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`resume` is not built yet"))
}
