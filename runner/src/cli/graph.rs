//! `retort graph`.

use clap::ValueEnum;

use crate::cli::{Context, Error, Exit, RecipeArgs};

/// Arguments of `graph`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The language of the drawing.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub format: GraphFormat,
}

/// Languages of the drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GraphFormat {
    /// Indented lines.
    Text,
    /// Graphviz: `retort graph r.yaml --format dot | dot -Tsvg > r.svg`.
    Dot,
    /// Mermaid, for Markdown.
    Mermaid,
}

/// Prints the graph of stages.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`graph` is not built yet"))
}
