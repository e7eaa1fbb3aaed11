//! `retort plan`.

use crate::cli::{Context, Error, Exit, RecipeArgs, SelectionArgs};

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Which stages.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// Print the whole plan as JSON: every resolved value and its origin.
    #[arg(long)]
    pub json: bool,
}

/// Prints what would run and why.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`plan` is not built yet"))
}
