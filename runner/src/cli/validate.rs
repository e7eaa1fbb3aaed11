//! `retort validate`.

use crate::cli::{Context, Error, Exit, RecipeArgs};

/// Arguments of `validate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Print the findings as JSON on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Checks recipes and reports everything that is wrong with them.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`validate` is not built yet"))
}
