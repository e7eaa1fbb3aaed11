//! `retort schema`.

use crate::cli::{Context, Error, Exit};

/// Arguments of `schema`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Plugins whose stages the schema knows (may be repeated); without any, every plugin found.
    #[arg(long, value_name = "PLUGIN")]
    pub plugin: Vec<String>,
    /// Print only the schema of the options of this kind of stage.
    #[arg(long, value_name = "KIND")]
    pub kind: Option<String>,
}

/// Prints the schema.
pub fn execute(_args: &Args, _context: &Context) -> Result<(), Error> {
    Err(Error::new(Exit::Internal, "`schema` is not built yet"))
}
