//! `retort doctor`.

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Checks the machine and the installation.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`doctor` is not built yet"))
}
