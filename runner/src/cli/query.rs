//! `retort query`.

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `query`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One SQL statement; without it, the tables and their columns are printed.
    #[arg(value_name = "SQL")]
    pub sql: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Runs a read-only SQL query on the history.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`query` is not built yet"))
}
