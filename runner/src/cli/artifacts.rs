//! `retort artifacts`.

use clap::Subcommand;

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `artifacts`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List artifacts, the newest first.
    List(ListArgs),
    /// Hash the files of artifacts again and compare.
    Verify(VerifyArgs),
}

/// Arguments of `artifacts list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Only those of this run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Only those of this kind (`teacher`, `samples`).
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `artifacts verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// Beginnings of hashes; without any, all artifacts.
    #[arg(value_name = "HASH")]
    pub hash: Vec<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Lists or verifies artifacts.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`artifacts` is not built yet"))
}
