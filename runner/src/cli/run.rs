//! `retort run`.

use std::num::NonZeroUsize;
use std::time::Duration;

use crate::cli::{Context, Error, Exit, RecipeArgs, SelectionArgs};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Which stages.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// How to run them.
    #[command(flatten)]
    pub execution: ExecutionArgs,
}

/// How stages are run: shared by `run` and `resume`.
#[derive(Debug, Clone, clap::Args)]
pub struct ExecutionArgs {
    /// How many stages may run at the same time.
    #[arg(short, long, value_name = "N", default_value_t = NonZeroUsize::MIN)]
    pub jobs: NonZeroUsize,
    /// After a failure, go on with the stages that do not depend on the failed one.
    #[arg(long)]
    pub keep_going: bool,
    /// How long a stage may take to reach its next checkpoint after Ctrl-C before it is ended.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    pub grace: Duration,
}

/// Plans the recipe and runs what has to run.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`run` is not built yet"))
}
