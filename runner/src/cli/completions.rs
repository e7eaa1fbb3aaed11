//! `retort completions`: scripts that complete commands and flags.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::{Cli, Context, Error, output};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    retort completions bash > ~/.local/share/bash-completion/completions/retort\n  \
    retort completions zsh > ~/.zfunc/_retort\n  \
    retort completions fish > ~/.config/fish/completions/retort.fish")]
pub struct Args {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// Prints the script.
pub fn execute(args: &Args, _context: &Context) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "retort", &mut script);
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(())
}
