//! `retort sweep`, and the options of `run` and `plan` that make one.

use clap::{Subcommand, ValueHint};
use std::path::PathBuf;

use crate::cli::{Context, Error, Exit, FormatArgs};
use crate::recipe::Recipe;
use crate::sweep::{
    Asha, Goal, Objective, Parameter, RandomSearch, SpaceError, Sweep, goal_and_metric,
};

pub mod execution;
mod forecast;
pub mod points;
mod recipe;
mod show;

/// Arguments of `sweep`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List sweeps, the newest first.
    List(ListArgs),
    /// Show the points of a sweep: what they change, their progress and their results.
    Show(ShowArgs),
    /// Show the best points of a sweep, and how to run them again.
    Best(BestArgs),
    /// Draw a sweep: the objective over each parameter; as SVG, parallel coordinates too.
    Plot(PlotArgs),
}

/// Arguments of `sweep list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Which sweep, and its objective.
#[derive(Debug, clap::Args)]
pub struct ReferenceArgs {
    /// The sweep: its id or a prefix of it, `latest`, `latest~1`.
    #[arg(value_name = "SWEEP", default_value = "latest")]
    pub sweep: String,
    /// Look for this metric instead of the sweep's own objective: `evaluation/1-step/recall`, `max:recall`.
    #[arg(long, value_name = "[max:]METRIC")]
    pub objective: Option<String>,
}

/// Arguments of `sweep show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The sweep.
    #[command(flatten)]
    pub reference: ReferenceArgs,
    /// The best first.
    #[arg(long)]
    pub sort: bool,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `sweep best`.
#[derive(Debug, clap::Args)]
pub struct BestArgs {
    /// The sweep.
    #[command(flatten)]
    pub reference: ReferenceArgs,
    /// How many points to show.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub number: u32,
    /// Print the command that runs the best point again, and nothing else.
    #[arg(long, conflicts_with_all = ["format", "json", "number"])]
    pub command: bool,
    /// Output format.
    #[command(flatten)]
    pub format: FormatArgs,
}

/// Arguments of `sweep plot`.
#[derive(Debug, clap::Args)]
pub struct PlotArgs {
    /// The sweep.
    #[command(flatten)]
    pub reference: ReferenceArgs,
    /// Write an SVG file (`-`: to stdout) instead of drawing in the terminal. Of existing files only a plot is replaced.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub svg: Option<PathBuf>,
    /// With a logarithmic axis for the objective, in the terminal.
    #[arg(long)]
    pub log: bool,
}

/// The arguments of `run` and `plan` that make a sweep.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Sweeps")]
pub struct SweepArgs {
    /// Run the recipe once for each value: `seed=1..5`, `student.train.learning_rate=1e-3,2e-3` (may be repeated).
    ///
    /// Values are those of `--set`, separated by commas; commas in brackets or quotes belong to a value. `1..5` are whole
    /// numbers, `0.1..0.5/3` three numbers, `log:1e-4..1e-2/3` three with even logarithms; without `/3` a range is for
    /// --sample. Several make a grid. `--sweep` alone runs the recipe's own `sweep:` section.
    #[arg(
        long,
        value_name = "PATH=VALUES",
        num_args = 0..=1,
        default_missing_value = ""
    )]
    pub sweep: Vec<String>,
    /// Draw N points at random instead of running all combinations.
    #[arg(long, value_name = "N", requires = "sweep")]
    pub sample: Option<u32>,
    /// Seed of the drawn points.
    #[arg(long, value_name = "SEED", requires = "sweep")]
    pub sample_seed: Option<u64>,
    /// The metric to minimise, or with `max:` to maximise.
    #[arg(long, value_name = "[max:]METRIC", requires = "sweep")]
    pub objective: Option<String>,
    /// Stop the worse points early: at each rung only those with the least values of this series (`distill/loss`) go on, or
    /// with `max:` those with the greatest.
    #[arg(long, value_name = "[max:]SERIES", requires = "rungs")]
    pub asha: Option<String>,
    /// The steps of that series at which points are judged: 200,400.
    #[arg(
        long,
        value_name = "STEPS",
        value_delimiter = ',',
        requires = "sweep",
        requires = "asha"
    )]
    pub rungs: Vec<u64>,
    /// Keep one in N points at each rung.
    #[arg(long, value_name = "N", requires = "asha", value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub reduction_factor: Option<u32>,
}

impl SweepArgs {
    /// Whether a sweep is requested.
    pub fn is_given(&self) -> bool {
        !self.sweep.is_empty()
    }

    /// The requested sweep. A bare `--sweep` uses the recipe's own section, changed by further parameters on the command
    /// line; with only parameters, exactly these are varied.
    pub fn definition(&self, recipe: &Recipe) -> Result<Sweep, Error> {
        let whole = self.sweep.iter().any(String::is_empty);
        let mut sweep = match (&recipe.sweep, whole) {
            (Some(section), true) => section.clone(),
            (None, true) if recipe.errors() > 0 => return Err(recipe.report().into()),
            (None, true) => {
                return Err(Error::new(
                    Exit::Usage,
                    format!("{} has no `sweep:` section", recipe.source.path.display()),
                )
                .hint("name what to vary: --sweep student.train.learning_rate=1e-3,2e-3"));
            }
            (section, false) => Sweep {
                parameters: Vec::new(),
                objective: section
                    .as_ref()
                    .and_then(|section| section.objective.clone()),
                sample: None,
                asha: None,
            },
        };
        let mut named: Vec<Parameter> = Vec::new();
        for text in self.sweep.iter().filter(|text| !text.is_empty()) {
            let parameter = Parameter::parse(text)?;
            sweep
                .parameters
                .retain(|known| known.path != parameter.path);
            named.push(parameter);
        }
        sweep.parameters.append(&mut named);
        if let Some(count) = self.sample {
            let seed = sweep.sample.map_or(0, |sample| sample.seed);
            sweep.sample = Some(RandomSearch { count, seed });
        }
        match (&mut sweep.sample, self.sample_seed) {
            (Some(sample), Some(seed)) => sample.seed = seed,
            (None, Some(_)) => {
                return Err(
                    Error::new(Exit::Usage, "--sample-seed is for points that are drawn")
                        .hint("say how many with --sample 20"),
                );
            }
            (_, None) => {}
        }
        if let Some(text) = &self.objective {
            sweep.objective = Some(objective(text));
        }
        if let Some(text) = &self.asha {
            sweep.asha = Some(self.asha(text)?);
        }
        Ok(sweep)
    }

    fn asha(&self, text: &str) -> Result<Asha, Error> {
        let (goal, metric) = goal_and_metric(text);
        if self.rungs.contains(&0) || !self.rungs.is_sorted_by(|a, b| a < b) {
            return Err(Error::new(Exit::Usage, "--rungs must rise from above 0"));
        }
        if self.rungs.len() > 20 {
            return Err(Error::new(Exit::Usage, "there are at most 20 rungs"));
        }
        Ok(Asha {
            metric: metric.to_owned(),
            goal,
            rungs: self.rungs.clone(),
            reduction_factor: self.reduction_factor.unwrap_or(2),
        })
    }
}

/// An objective as typed.
fn objective(text: &str) -> Objective {
    let (goal, metric): (Goal, &str) = goal_and_metric(text);
    Objective {
        metric: metric.to_owned(),
        goal,
    }
}

impl From<SpaceError> for Error {
    fn from(error: SpaceError) -> Self {
        Self::new(Exit::Usage, error.message).hint(error.hint)
    }
}

/// Lists, shows or draws sweeps.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    match &args.command {
        Command::List(args) => show::list(args, context),
        Command::Show(args) => show::show(args, context),
        Command::Best(args) => show::best(args, context),
        Command::Plot(args) => show::plot(args, context),
    }
}
