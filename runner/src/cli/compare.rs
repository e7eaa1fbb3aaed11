//! `retort compare`.

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Two or more runs: ids or beginnings of them, `latest`, `latest~1`, or tags.
    #[arg(value_name = "RUN", num_args = 2.., required = true)]
    pub runs: Vec<String>,
    /// Only what differs.
    #[arg(long)]
    pub changed: bool,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Compares runs.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`compare` is not built yet"))
}
