//! A sweep's points: planning, forecast, and execution.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::cli::execution::{ExecutionArgs, known_results, open_store, store_if_there};
use crate::cli::known_results::{EmptyHistory, History};
use crate::cli::sweep::SweepArgs;
use crate::cli::sweep::execution::{self, SweepExecution};
use crate::cli::sweep::forecast::{PointForecast, SweepForecast};
use crate::cli::sweep::recipe::SweepRecipe;
use crate::cli::{Context, Error, Exit, SelectionArgs, output};
use crate::plugin::{Plugins, search_dirs};
use crate::recipe::Recipe;
use crate::settings::Settings;
use crate::store::{HashTrust, RunState, Store, SweepId, SweepPlan};
use crate::sweep::Sweep;
use crate::table::{Cell, CellStyle, Rows};

/// `retort run --sweep`.
pub fn run(
    args: &SweepArgs,
    selection: &SelectionArgs,
    execution: &ExecutionArgs,
    recipe: Recipe,
    context: &Context,
) -> Result<(), Error> {
    check_stays(execution)?;
    let (definition, points) = define(args, selection, &recipe, context)?;
    let placement = execution.settings(&recipe.source.base_dir, context)?;
    let source = SweepRecipe::of(&recipe, selection, placement);
    let runtime = context.runtime()?;
    let known = store_if_there(&runtime, &context.store)?;
    let mut plugins = Plugins::new(
        search_dirs(&context.plugin_dirs),
        &runtime,
        known.as_deref(),
    );
    let forecast = match &known {
        Some(store) => {
            let results = &mut known_results(&runtime, store, selection.rehash.trust())?;
            SweepForecast::of(&source, &points, &mut plugins, results)?
        }
        None => SweepForecast::of(&source, &points, &mut plugins, &mut EmptyHistory::default())?,
    };
    forecast.show_warnings(&source, context);
    let store = match &known {
        Some(store) => Arc::clone(store),
        None => open_store(&runtime, &context.store)?,
    };
    plugins.remember(&store);
    let plan = SweepPlan {
        recipe: recipe.name.clone(),
        recipe_path: std::path::absolute(&source.shown_path)
            .unwrap_or_else(|_| source.shown_path.clone())
            .display()
            .to_string(),
        recipe_text: source.text.clone(),
        settings: source.set.clone(),
        definition,
        selection: selection_value(selection),
    };
    let id = match runtime.block_on(store.find_sweep(&plan))? {
        Some(id) => id,
        None => runtime.block_on(store.begin_sweep(&plan, &points))?,
    };
    go_on(&id, &source, forecast, &runtime, &store, execution, context)
}

/// `retort resume SWEEP`.
pub fn resume(
    id: &SweepId,
    runtime: &Runtime,
    store: &Arc<Store>,
    execution: &ExecutionArgs,
    context: &Context,
) -> Result<(), Error> {
    check_stays(execution)?;
    let detail = runtime.block_on(store.sweep_detail(id))?;
    let path = PathBuf::from(&detail.plan.recipe_path);
    let base_dir = path.parent().map(Path::to_owned).unwrap_or_default();
    let selection = |key: &str| detail.plan.selection[key].as_str().map(str::to_owned);
    let source = SweepRecipe {
        placement: execution.settings(&base_dir, context)?,
        base_dir,
        shown_path: path,
        text: detail.plan.recipe_text.clone(),
        home: context.home(),
        set: detail.plan.settings.clone(),
        selection: SelectionArgs {
            from: selection("from"),
            until: selection("until"),
            ..SelectionArgs::default()
        },
    };
    let points: Vec<Vec<String>> = detail
        .points
        .iter()
        .map(|point| point.settings.clone())
        .collect();
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), runtime, Some(store));
    let results = &mut known_results(runtime, store, HashTrust::Trusted)?;
    let forecast = SweepForecast::of(&source, &points, &mut plugins, results)?;
    forecast.show_warnings(&source, context);
    go_on(id, &source, forecast, runtime, store, execution, context)
}

/// Runs the missing points.
fn go_on(
    id: &SweepId,
    source: &SweepRecipe,
    forecast: SweepForecast,
    runtime: &Runtime,
    store: &Arc<Store>,
    execution: &ExecutionArgs,
    context: &Context,
) -> Result<(), Error> {
    let detail = runtime.block_on(store.sweep_detail(id))?;
    let is_alive = |state: &RunState| matches!(state, RunState::Running | RunState::Queued);
    if let Some(run) = detail.points.iter().find_map(|point| {
        let (run, state) = point.run.as_ref()?;
        is_alive(state).then_some(run)
    }) {
        return Err(Error::new(
            Exit::Usage,
            format!("sweep {id} is under way: its run {run} has not ended"),
        )
        .hint("a sweep can continue once nothing else runs it"));
    }
    // Stages affected by later changes (a plugin, a file) run again.
    let is_done = |place: usize| {
        detail
            .points
            .get(place)
            .is_some_and(|point| point.is_done())
            && forecast
                .points
                .get(place)
                .is_some_and(|ahead| ahead.is_done())
    };
    let done = (0..detail.points.len())
        .filter(|&place| is_done(place))
        .count();
    if !context.quiet {
        let begun = detail.points.iter().any(|point| point.run.is_some());
        if begun {
            let total = output::count(detail.points.len(), "point");
            output::say(&format!("continuing sweep {id}: {done} of {total} done"));
        } else {
            output::say(&format!("sweep {id}"));
        }
        if done < detail.points.len() {
            output::say(&forecast.sum(|place| !is_done(place)));
        }
    }
    let done = (0..detail.points.len()).map(is_done).collect();
    let sweeping = SweepExecution {
        source,
        detail,
        done,
        runtime,
        store,
    };
    execution::run(sweeping, execution, context)
}

/// `retort plan --sweep`.
pub fn plan(
    args: &SweepArgs,
    selection: &SelectionArgs,
    as_json: bool,
    recipe: Recipe,
    context: &Context,
) -> Result<(), Error> {
    let (definition, points) = define(args, selection, &recipe, context)?;
    let placement = Settings::read(&recipe.source.base_dir, &context.given())?;
    let source = SweepRecipe::of(&recipe, selection, placement);
    let runtime = context.runtime()?;
    let store = context.known_store(&runtime)?;
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, store.as_ref());
    let forecast = match &store {
        Some(store) => {
            let layout = crate::artifact::Layout::new(&context.store)?;
            let mut results = History::new(&runtime, store, layout, selection.rehash.trust());
            SweepForecast::of(&source, &points, &mut plugins, &mut results)?
        }
        None => SweepForecast::of(&source, &points, &mut plugins, &mut EmptyHistory::default())?,
    };
    if as_json {
        let points = points.iter().zip(&forecast.points).map(|(settings, ahead)| {
            json!({"settings": settings, "run": ahead.run, "shared": ahead.shared, "stored": ahead.stored})
        });
        let document = json!({"sweep": definition, "points": points.collect::<Value>()});
        output::print(&format!("{document:#}\n"))?;
    } else {
        let text = rows(&definition, &points, &forecast.points).render(context.table_style());
        output::print(&format!("{text}\n{}\n", forecast.sum(|_| true)))?;
    }
    forecast.show_warnings(&source, context);
    if let (Some(asha), false) = (&definition.asha, context.quiet) {
        let rungs: Vec<String> = asha.rungs.iter().map(u64::to_string).collect();
        output::say(&format!(
            "at most: points are stopped at steps {} of {}, and one of {} goes on",
            rungs.join(", "),
            asha.metric,
            asha.reduction_factor
        ));
    }
    Ok(())
}

/// A sweep starts runs as others end, so the command has to stay.
fn check_stays(execution: &ExecutionArgs) -> Result<(), Error> {
    match execution.detach {
        false => Ok(()),
        true => Err(Error::new(
            Exit::Usage,
            "--detach and a sweep exclude each other: a sweep begins its runs as others end",
        )
        .hint(
            "leave it in `tmux` without --detach, or submit each point by a `retort run --detach --set ..` of its own",
        )),
    }
}

fn define(
    args: &super::SweepArgs,
    selection: &SelectionArgs,
    recipe: &Recipe,
    context: &Context,
) -> Result<(Sweep, Vec<Vec<String>>), Error> {
    if !selection.force.is_empty() {
        return Err(Error::new(
            Exit::Usage,
            "--force and --sweep exclude each other: every point would rerun the stages that they share",
        )
        .hint("run those stages once, with --force, before the sweep"));
    }
    let definition = args.definition(recipe)?;
    let points = definition.points()?;
    if let (Some(shortage), false) = (definition.shortage(points.len()), context.quiet) {
        output::say(&shortage);
    }
    Ok((definition, points))
}

fn selection_value(selection: &SelectionArgs) -> Value {
    json!({"from": selection.from, "until": selection.until})
}

/// The points of a plan, a row each.
fn rows(definition: &Sweep, points: &[Vec<String>], ahead: &[PointForecast]) -> Rows {
    let names = super::show::short_names(definition.parameters.iter().map(|one| one.path.as_str()));
    let heads: Vec<&str> = std::iter::once("point")
        .chain(names.iter().map(String::as_str))
        .chain(["to run", "shared", "in the store"])
        .collect();
    let mut rows = Rows::new(&heads);
    for ((number, settings), ahead) in (1_u64..).zip(points).zip(ahead) {
        let counts = [ahead.run, ahead.shared, ahead.stored];
        let mut row = vec![Cell::from(number)];
        row.extend(
            settings
                .iter()
                .map(|setting| super::show::value_of(setting)),
        );
        row.extend(counts.map(|count| {
            let cell_style = if count == 0 {
                CellStyle::Dim
            } else {
                CellStyle::Plain
            };
            Cell::from(count as u64).style(cell_style)
        }));
        rows.push(row);
    }
    rows
}
