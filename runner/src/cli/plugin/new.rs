//! `retort plugin new`: a project for a new plugin.

use std::path::PathBuf;

use clap::{ValueEnum, ValueHint};

use crate::cli::{Context, Error, Exit, output};
use crate::plugin::project::{self, ProjectError, Sources, Template};

/// Arguments of `plugin new`.
#[derive(Debug, clap::Args)]
#[command(after_help = "A first run:\n  \
    retort plugin new hello --lang c\n  \
    cd hello\n  \
    make\n  \
    retort plugin install .\n  \
    retort run recipe.yaml")]
pub struct Args {
    /// Name of the plugin, as recipes will use it.
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Language to write it in.
    #[arg(long, value_name = "LANG", default_value = "rust")]
    pub lang: Language,
    /// What to create: a kind of stage, or a tensor backend that inherits every stage of the engine (Rust).
    #[arg(long, value_name = "KIND", default_value = "stage")]
    pub kind: Kind,
    /// Directory to make; by default the plugin's name.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub into: Option<PathBuf>,
    /// The sources of retort to build against (Rust): a clone, or its URL for git; by default those that this program
    /// was built from.
    #[arg(long, value_name = "DIR|URL", value_hint = ValueHint::DirPath)]
    pub retort: Option<String>,
}

/// Languages with a template.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// Rust, on the crate retort-abi.
    Rust,
    /// C11, on retort_plugin.h.
    C,
    /// C++17, on retort_plugin.h.
    Cpp,
}

/// What a plugin brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// A kind of stage of its own.
    Stage,
    /// A tensor library for the engine's stages.
    Backend,
}

/// Makes the project.
pub fn execute(args: &Args, _context: &Context) -> Result<(), Error> {
    let template = match (args.kind, args.lang) {
        (Kind::Stage, Language::Rust) => Template::Rust,
        (Kind::Stage, Language::C) => Template::C,
        (Kind::Stage, Language::Cpp) => Template::Cpp,
        (Kind::Backend, Language::Rust) => Template::Backend,
        (Kind::Backend, _) => {
            return Err(Error::new(
                Exit::Usage,
                "a backend of the engine is written in Rust: tensors do not cross the C interface",
            )
            .hint("call a C or C++ library from Rust, or begin with --kind stage and write a whole stage"));
        }
    };
    let dir = args
        .into
        .clone()
        .unwrap_or_else(|| PathBuf::from(&args.name));
    let sources = match &args.retort {
        Some(text) => Some(Sources::parse(text)),
        None => project::own_sources(),
    };
    project::create(template, &args.name, &dir, sources.as_ref()).map_err(refused)?;
    let build = if template.needs_sources() {
        "cargo build --release"
    } else {
        "make"
    };
    output::say(&format!(
        "{} is ready. Next:\n  cd {}\n  {build}\n  retort plugin install .\n  retort run recipe.yaml\n  retort plugin test .",
        dir.display(),
        dir.display()
    ));
    Ok(())
}

fn refused(error: ProjectError) -> Error {
    let exit = match error {
        ProjectError::Io { .. } => Exit::Internal,
        _ => Exit::Usage,
    };
    let hint = error.hint().map(str::to_owned);
    Error {
        hint,
        ..Error::new(exit, error.to_string())
    }
}
