//! The command line: its arguments, with one file per command under `cli/`.
//!
//! A command gets its parsed arguments and a [`Context`], prints data with [`output::print`], other text with
//! [`output::say`], and returns an [`Error`] that carries its exit code. Deliberately absent: anything except reading
//! arguments and printing.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

pub mod artifacts;
pub mod compare;
pub mod completions;
pub mod dataset;
pub mod detached;
pub mod doctor;
pub mod error;
pub mod event_loop;
pub mod execution;
pub mod gc;
pub mod graph;
pub mod inspect;
pub mod known_results;
pub mod lineage;
pub mod log;
pub mod metrics;
pub mod output;
pub mod plan;
pub mod plugin;
pub mod query;
pub mod ranks;
pub mod report;
pub mod resume;
pub mod run;
pub mod runs;
pub mod sample;
pub mod schema;
pub mod show;
pub mod spooled;
pub mod sweep;
pub mod transfer;
pub mod trust;
pub mod ui;
pub mod validate;
pub mod why;
pub mod worker;

use crate::plan::Plan;
use crate::plan::decision::{self, Role};
use crate::settings::Overrides;
use crate::store::{Access, HashTrust, Store};
use crate::table::Style;
use crate::terminal;

pub use error::{Error, Exit};
use event_loop::EventLoop;

/// What was typed.
#[derive(Debug, Parser)]
#[command(
    name = "retort",
    version,
    about = "Distils image autoregressive models into one-step samplers, from YAML recipes.",
    long_about = "Distils image autoregressive models into one-step samplers.\n\n\
        A recipe (YAML) names stages; retort plans them, runs each in a worker process through a backend plugin, \
        and records every run, metric and artifact in a store (a directory with a SQLite file) that can be \
        queried later. A stage whose result is already in the store is not run again.",
    after_help = "First steps:\n  \
        retort plan recipes/digits.yaml      what would run, and why\n  \
        retort run recipes/digits.yaml       run it\n  \
        retort runs show latest              the results\n\n\
        Run 'retort help <command>' for the options of a command.",
    after_long_help = "First steps:\n  \
        retort plan recipes/digits.yaml      what would run, and why\n  \
        retort run recipes/digits.yaml       run it\n  \
        retort runs show latest              the results\n\n\
        Exit codes:\n  \
        0    success\n  \
        1    internal error, or the store cannot be read or written\n  \
        2    wrong usage of the command line\n  \
        3    invalid recipe\n  \
        4    nothing matches what was asked for\n  \
        5    a plugin is missing or broken\n  \
        75   the store is busy; try again\n  \
        100  a stage failed\n  \
        130  interrupted (143: terminated, 129: the terminal was closed); `retort resume` continues\n\n\
        Environment: RETORT_PLUGIN_PATH (directories with plugins, separated by ':'), RETORT_EXECUTOR and RETORT_SLURM \
        (as --executor and --slurm of `run`), NO_COLOR, RUST_LOG.",
    max_term_width = 110
)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Directory of the store: the history and the artifacts.
    #[arg(long, global = true, value_name = "DIR", default_value = ".retort", value_hint = ValueHint::DirPath)]
    pub store: Vec<PathBuf>,
    /// Look for plugins in this directory first (may be repeated).
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub plugin_dir: Vec<PathBuf>,
    /// Say less: errors only.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more; -vv and -vvv for developers. RUST_LOG overrides.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// When to use colours; NO_COLOR is respected by `auto`.
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: ColorChoice,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    /// On a terminal, unless NO_COLOR is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a recipe; stages whose results are already in the store are reused.
    Run(run::Args),
    /// Check a recipe without running anything.
    Validate(validate::Args),
    /// Show what would run, what would be reused, and why.
    Plan(plan::Args),
    /// Draw the graph of a recipe's stages and their inputs.
    Graph(graph::Args),
    /// Draw images with a student or a teacher, without a recipe.
    Sample(sample::Args),
    /// Continue an interrupted, failed or lost run, or a sweep.
    Resume(resume::Args),
    /// List, show, tag, remove, export and import past runs.
    Runs(runs::Args),
    /// List, show and draw sweeps; `run --sweep` makes one.
    Sweep(sweep::Args),
    /// Show pictures in the terminal.
    Show(show::Args),
    /// Write runs as one HTML page, to share.
    Report(report::Args),
    /// Print or draw the metrics of a run.
    Metrics(metrics::Args),
    /// Print the log of a run.
    Log(log::Args),
    /// Print the last lines of a run's log, and follow it.
    Tail(log::TailArgs),
    /// Say why a stage reran or was reused.
    Why(why::Args),
    /// Show an artifact's ancestors and descendants.
    Lineage(lineage::Args),
    /// List, verify and export artifacts.
    Artifacts(artifacts::Args),
    /// Compare runs: parameters, results, metrics.
    Compare(compare::Args),
    /// Look at the history in a browser: runs, curves, pictures, comparisons.
    Ui(ui::Args),
    /// Query the history (SQL, read-only).
    Query(query::Args),
    /// List a checkpoint file's dictionaries and tensors. No code in it is run.
    Inspect(inspect::Args),
    /// Show, check and merge trajectory datasets.
    Dataset(dataset::Args),
    /// List what no run needs; with --remove, remove it.
    Gc(gc::Args),
    /// List, create, install, test and lock plugins.
    Plugin(plugin::Args),
    /// Allow a project's retort.toml to run commands in your jobs (prologue, sbatch), until it changes.
    Trust(trust::Args),
    /// Check this machine and installation, and suggest repairs.
    Doctor(doctor::Args),
    /// Print the JSON schema of recipes, for editors.
    Schema(schema::Args),
    /// Print a completion script for a shell.
    Completions(completions::Args),
    /// Runs one stage; started by `run`, not by users.
    #[command(hide = true)]
    Worker(worker::Args),
}

/// A recipe and changes to it: the arguments of commands that read a recipe.
#[derive(Debug, Clone, Args)]
pub struct RecipeArgs {
    /// The recipe, a YAML file.
    #[arg(value_name = "RECIPE", value_hint = ValueHint::FilePath)]
    pub recipe: PathBuf,
    /// Set a value of the recipe: a path from its root, or from a stage's name (may be repeated).
    ///
    /// The value is read as YAML; where a text is wanted, it is taken as typed: `--set 'params.data.csv=run #2.csv'`.
    /// Examples: `--set seed=3`, `--set params.distribution.guidance=1.5`, `--set stages.student.train.steps=100`, or
    /// shorter `--set student.train.steps=100`.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub set: Vec<String>,
}

/// Which stages: the arguments of `run` and `plan`.
#[derive(Debug, Clone, Default, Args)]
pub struct SelectionArgs {
    /// Rerun stages even if their results are in the store: all, or those named (`--force=student,sample-1-step`).
    #[arg(
        long,
        value_name = "STAGE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "*",
        value_delimiter = ','
    )]
    pub force: Vec<String>,
    /// Run only this stage and those that depend on it; other inputs must already be in the store.
    #[arg(long, value_name = "STAGE")]
    pub from: Option<String>,
    /// Run only this stage and those that it depends on.
    #[arg(long, value_name = "STAGE")]
    pub until: Option<String>,
    /// Whether files are read again.
    #[command(flatten)]
    pub rehash: RehashArgs,
}

impl SelectionArgs {
    /// The role of each stage of a plan.
    pub fn roles(&self, plan: &Plan) -> Result<Vec<Role>, Error> {
        let (from, until) = (self.from.as_deref(), self.until.as_deref());
        Ok(decision::select(plan, from, until, &self.force)?)
    }
}

/// Whether to trust hashes of earlier commands: an argument of `run`, `resume` and `plan`.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct RehashArgs {
    /// Read every file that the recipe names, even if it seems unchanged since it was last read.
    #[arg(long)]
    pub rehash: bool,
}

impl RehashArgs {
    /// Whether to trust hashes of earlier commands.
    pub fn trust(&self) -> HashTrust {
        match self.rehash {
            true => HashTrust::Distrusted,
            false => HashTrust::Trusted,
        }
    }
}

/// How data is printed.
#[derive(Debug, Clone, Args)]
pub struct FormatArgs {
    /// Output format.
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub format: Format,
    /// Short for --format json.
    #[arg(long, conflicts_with = "format")]
    pub json: bool,
}

impl FormatArgs {
    /// How rows are to be printed on stdout.
    pub fn style(&self, context: &Context) -> Style {
        match self.get() {
            Format::Table => context.table_style(),
            Format::Json => Style::Json,
            Format::Csv => Style::Csv,
            Format::Md => Style::Markdown,
        }
    }

    /// The format asked for.
    pub fn get(&self) -> Format {
        if self.json { Format::Json } else { self.format }
    }
}

/// Formats of printed data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns, for people.
    Table,
    /// One JSON document.
    Json,
    /// Comma-separated values with a header line.
    Csv,
    /// A Markdown table.
    Md,
}

/// The context of every command besides its own arguments.
#[derive(Debug, Clone)]
pub struct Context {
    /// Directory of the store.
    pub store: PathBuf,
    /// Directories of all named stores: only `ui` takes more than one.
    pub stores: Vec<PathBuf>,
    /// Directories to search for plugins first.
    pub plugin_dirs: Vec<PathBuf>,
    /// Say errors only.
    pub quiet: bool,
    /// How often `-v` was given.
    pub verbose: u8,
    /// When to use colours.
    pub color: ColorChoice,
}

impl Context {
    /// Paths are passed to workers and the store as text, so others are refused at once.
    fn check_names(&self, command: &Command) -> Result<(), Error> {
        let recipes: Vec<&PathBuf> = match command {
            Command::Run(args) => vec![&args.recipe.recipe],
            Command::Plan(args) => vec![&args.recipe.recipe],
            Command::Graph(args) => vec![&args.recipe.recipe],
            Command::Validate(args) => args.recipes.iter().collect(),
            // They use neither.
            Command::Inspect(_)
            | Command::Completions(_)
            | Command::Worker(_)
            | Command::Trust(_) => return Ok(()),
            _ => Vec::new(),
        };
        if self.stores.len() > 1 && !matches!(command, Command::Ui(_)) {
            let message = "--store is named more than once: only `retort ui` takes several stores";
            return Err(Error::new(Exit::Usage, message));
        }
        for path in recipes.into_iter().chain(&self.stores) {
            let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            if whole.to_str().is_none() {
                let message = format!("the path {} is not UTF-8", whole.display());
                return Err(Error::new(Exit::Usage, message)
                    .hint("rename it, or work from another directory"));
            }
        }
        Ok(())
    }

    /// The home directory: the meaning of `~/` in recipes' paths.
    pub fn home(&self) -> Option<PathBuf> {
        let home = PathBuf::from(std::env::var_os("HOME")?);
        home.is_absolute().then_some(home)
    }

    /// The settings from environment variables, and the path of the user's file.
    pub fn given(&self) -> Overrides {
        let variable =
            |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
        let config = config.filter(|dir| dir.is_absolute());
        Overrides {
            executor_variable: variable("RETORT_EXECUTOR"),
            slurm_variable: variable("RETORT_SLURM"),
            user_dir: config
                .or_else(|| Some(self.home()?.join(".config")))
                .map(|dir| dir.join("retort")),
            ..Overrides::default()
        }
    }

    /// Whether stdout takes colours.
    pub fn color_stdout(&self) -> bool {
        output::wants_color(self.color, &std::io::stdout())
    }

    /// Whether stderr takes colours.
    pub fn color_stderr(&self) -> bool {
        output::wants_color(self.color, &std::io::stderr())
    }

    /// Tables as wide as the terminal, or of any width in a pipe.
    pub fn table_style(&self) -> Style {
        let size = terminal_size::terminal_size_of(std::io::stdout());
        let width = size.map(|(terminal_size::Width(columns), _)| columns);
        Style::Table {
            width,
            color: self.color_stdout(),
        }
    }

    /// The store for reading, if it exists.
    pub fn known_store(&self, runtime: &tokio::runtime::Runtime) -> Result<Option<Store>, Error> {
        match self.store.join("history.db").exists() {
            true => Ok(Some(
                runtime.block_on(Store::open(&self.store, Access::ReadOnly))?,
            )),
            false => Ok(None),
        }
    }

    /// The event loop for the store and the executor, the only async code.
    pub fn runtime(&self) -> Result<EventLoop, Error> {
        EventLoop::start().map_err(|error| {
            Error::new(Exit::Internal, "the event loop could not start").cause(&error)
        })
    }
}

/// Whether the current thread is one of the database library's, each of which serves a connection.
fn is_thread_of_history() -> bool {
    let thread = std::thread::current();
    let is_of_library = |name: &str| name.starts_with("sqlx-sqlite-worker");
    thread.name().is_some_and(is_of_library)
}

/// The database library's threads panic if a value's copy does not fit in memory. Whoever waits for such a thread might wait
/// forever, or take the rows that it has found for all there are. So the program ends, as when its own memory runs out.
fn end_if_the_history_panics() {
    let others = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let is_of_history = is_thread_of_history();
        // The library's words for it are no use to anybody.
        if !is_of_history || !panic.to_string().contains("allocate memory") {
            others(panic);
        }
        if is_of_history {
            output::say("error: memory ran out while the history was read or written");
            // SAFETY: ends the process at once; the kernel frees its locks, and SQLite undoes open transactions.
            unsafe { libc::_exit(Exit::Internal.code().into()) };
        }
    }));
}

/// Parses the arguments, runs the command, and maps its error to an exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are data (exit code 0), anything else is wrong usage (2); a closed pipe is not an error.
            let text = error.render().to_string();
            if terminal::show(&text) == text {
                let _ = error.print();
            } else {
                // It quotes an argument that could mislead the terminal.
                output::say(text.trim_end());
            }
            return ExitCode::from(
                if error.use_stderr() {
                    Exit::Usage
                } else {
                    Exit::Success
                }
                .code(),
            );
        }
    };
    let context = Context {
        // There is a default.
        store: cli.global.store.first().cloned().unwrap_or_default(),
        stores: cli.global.store,
        plugin_dirs: cli.global.plugin_dir,
        quiet: cli.global.quiet,
        verbose: cli.global.verbose,
        color: cli.global.color,
    };
    output::start_tracing(&context);
    // Makes the limit on the size of files a write error, which has a message, instead of a silent kill. SAFETY: a plain
    // system call; workers inherit it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    end_if_the_history_panics();
    if let Err(error) = context.check_names(&cli.command) {
        error.show(&context);
        return ExitCode::from(error.exit.code());
    }
    let result = match &cli.command {
        Command::Run(args) => run::execute(args, &context),
        Command::Validate(args) => validate::execute(args, &context),
        Command::Plan(args) => plan::execute(args, &context),
        Command::Graph(args) => graph::execute(args, &context),
        Command::Sample(args) => sample::execute(args, &context),
        Command::Resume(args) => resume::execute(args, &context),
        Command::Runs(args) => runs::execute(args, &context),
        Command::Sweep(args) => sweep::execute(args, &context),
        Command::Show(args) => show::execute(args, &context),
        Command::Report(args) => report::execute(args, &context),
        Command::Metrics(args) => metrics::execute(args, &context),
        Command::Log(args) => log::execute(args, &context),
        Command::Tail(args) => log::tail(args, &context),
        Command::Why(args) => why::execute(args, &context),
        Command::Lineage(args) => lineage::execute(args, &context),
        Command::Gc(args) => gc::execute(args, &context),
        Command::Artifacts(args) => artifacts::execute(args, &context),
        Command::Compare(args) => compare::execute(args, &context),
        Command::Ui(args) => ui::execute(args, &context),
        Command::Query(args) => query::execute(args, &context),
        Command::Dataset(args) => dataset::execute(args, &context),
        Command::Inspect(args) => inspect::execute(args, &context),
        Command::Plugin(args) => plugin::execute(args, &context),
        Command::Trust(args) => trust::execute(args, &context),
        Command::Doctor(args) => doctor::execute(args, &context),
        Command::Schema(args) => schema::execute(args, &context),
        Command::Completions(args) => completions::execute(args, &context),
        Command::Worker(args) => worker::execute(args, &context),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.show(&context);
            ExitCode::from(error.exit.code())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn force_takes_no_value_or_stages() {
        let check = |arguments: &[&str], expected: &[&str]| {
            let cli =
                Cli::try_parse_from([&["retort", "run", "r.yaml"], arguments].concat()).unwrap();
            let Command::Run(run) = cli.command else {
                panic!("not run")
            };
            assert_eq!(run.selection.force, expected);
        };
        check(&[], &[]);
        check(&["--force"], &["*"]);
        check(&["--force=a,b", "--store", "s"], &["a", "b"]);
    }
}
