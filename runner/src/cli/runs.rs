//! `retort runs`.

use clap::Subcommand;

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `runs`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List runs, the newest first.
    List(ListArgs),
    /// Show a run: its stages, results, tables and pictures.
    Show(ShowArgs),
}

/// Arguments of `runs list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// At most this many.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
    pub limit: u32,
    /// Only runs of the recipe with this name.
    #[arg(long, value_name = "NAME")]
    pub recipe: Option<String>,
    /// Only runs in this state: queued, running, succeeded, failed, interrupted, lost.
    #[arg(long, value_name = "STATE")]
    pub state: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `runs show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or shows runs.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`runs` is not built yet"))
}
