//! `retort run`: plans a recipe, runs what has to run, prints the results.

use std::path::Path;

use crate::cli::execution::{ExecutionArgs, PlannedRun, store_if_there};
use crate::cli::sweep::{self, SweepArgs};
use crate::cli::{Context, Error, RecipeArgs, SelectionArgs, ranks};
use crate::cluster::devices;
use crate::plugin::{Plugins, search_dirs};
use crate::recipe;

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
    /// Which values to vary.
    #[command(flatten)]
    pub sweep: SweepArgs,
}

/// Plans the recipe and runs what has to run.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let dir = args.recipe.recipe.parent().unwrap_or(Path::new(""));
    let settings = args.execution.settings(dir, context)?;
    let place = args.execution.place(&settings)?;
    if let Some(place) = place.as_ref().filter(|place| place.rank > 0) {
        return ranks::follow(place, context);
    }
    let recipe = recipe::read(&args.recipe.recipe, &args.recipe.set, context.home())?;
    if args.sweep.is_given() {
        return sweep::points::run(
            &args.sweep,
            &args.selection,
            &args.execution,
            recipe,
            context,
        );
    }
    let runtime = context.runtime()?;
    // A new store is created only after the recipe has been found valid.
    let known = store_if_there(&runtime, &context.store)?;
    let mut plugins = Plugins::new(
        search_dirs(&context.plugin_dirs),
        &runtime,
        known.as_deref(),
    );
    let mut plan = devices::plan(&recipe, &mut plugins, &settings)?;
    if let Some(place) = &place {
        ranks::spread(&mut plan, &mut plugins, place)?;
    }
    let roles = args.selection.roles(&plan)?;
    let planned = PlannedRun {
        plan,
        roles,
        shown_path: args.recipe.recipe.clone(),
        resumed_from: None,
        sweep: None,
    };
    let trust = args.selection.rehash.trust();
    let store = planned.prepare(&runtime, known.as_ref(), trust, &mut plugins, context)?;
    planned
        .carry_out(&runtime, &store, &args.execution, context)
        .map(drop)
}
