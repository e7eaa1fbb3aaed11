//! `retort metrics`.

use crate::cli::{Context, Error, Exit, FormatArgs};

/// Arguments of `metrics`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag.
    #[arg(value_name = "RUN", default_value = "latest")]
    pub run: String,
    /// Print every point of these series (`loss`, or `distill/loss`); without any, the last value of each series.
    #[arg(value_name = "SERIES")]
    pub series: Vec<String>,
    /// Only series of this stage.
    #[arg(long, value_name = "STAGE")]
    pub stage: Option<String>,
    /// How to print.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Prints metric series.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`metrics` is not built yet"))
}
