//! `retort plugin`.

use clap::Subcommand;

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `plugin`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the plugins found, where they are and what they can do.
    List(ListArgs),
    /// Load a plugin in a worker process and check its answers and devices.
    Check(CheckArgs),
}

/// Arguments of `plugin list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `plugin check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Name of the plugin, or the path of its shared object.
    #[arg(value_name = "PLUGIN")]
    pub plugin: String,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or checks plugins.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`plugin` is not built yet"))
}
