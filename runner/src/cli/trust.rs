//! `retort trust`: allows the commands in a project's `retort.toml`, until the file changes.

use std::path::PathBuf;

use clap::ValueHint;

use crate::cli::{Context, Error, Exit, FormatArgs, output};
use crate::settings::{self, FILE};
use crate::table::Rows;

/// Arguments of `trust`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A `retort.toml`, or a directory that it is in or below.
    #[arg(value_name = "PATH", default_value = ".", value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Records the file as trusted, and prints the commands.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let path = match args.path.is_dir() {
        true => settings::project_file(&args.path).ok_or_else(|| {
            let message = format!("there is no {FILE} in {} or above", args.path.display());
            Error::new(Exit::NothingMatches, message)
        })?,
        false => args.path.clone(),
    };
    let lines = settings::trust_file(&path, context.given().user_dir.as_deref())?;
    let mut rows = Rows::new(&["setting", "runs"]);
    for (name, value) in &lines {
        rows.push([name.as_str().into(), value.as_str().into()]);
    }
    output::print(&rows.render(args.format.style(context)))?;
    if !context.quiet {
        let shown = path.display();
        output::say(&match lines.is_empty() {
            true => format!("{shown} is trusted; it has no lines that run"),
            false => format!("{shown} is trusted until it changes"),
        });
    }
    Ok(())
}
