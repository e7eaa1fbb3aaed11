//! `retort resume`: continues a run, with its frozen plan.

use std::path::Path;
use std::rc::Rc;

use tokio::runtime::Runtime;

use crate::cli::execution::{ExecutionArgs, PlannedRun, known_results, open_store};
use crate::cli::{Context, Error, Exit, RehashArgs, detached, output, ranks, sweep};
use crate::executor::RecordedPlan;
use crate::plan::{Build, DescribeError, Descriptions, Plan, PlannedStage};
use crate::plugin::{Plugins, search_dirs};
use crate::store::{
    Access, DetachedJobs, RunDetail, RunId, RunState, StageState, Store, StoreError, SweepId,
    SweepPlace,
};

/// Arguments of `resume`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run: an id or a prefix of one, `latest`, `latest~1`, or a tag; or a sweep: its missing points are run.
    /// Without it, the latest run that failed, was interrupted or was lost; if that is a point of a sweep, the sweep.
    /// Imported runs are resumed by name only.
    #[arg(value_name = "RUN")]
    pub run: Option<String>,
    /// Whether files are read again.
    #[command(flatten)]
    pub rehash: RehashArgs,
    /// How to run the stages.
    #[command(flatten)]
    pub execution: ExecutionArgs,
}

/// Continues a run with its frozen recipe.
pub fn execute(args: &Args, context: &Context) -> Result<(), Error> {
    let settings = args.execution.settings(Path::new(""), context)?;
    let place = args.execution.place(&settings)?;
    if let Some(place) = place.as_ref().filter(|place| place.rank > 0) {
        return ranks::follow(place, context);
    }
    if place.is_none() && args.execution.executor.is_none() {
        ranks::check_is_first()?;
    }
    let runtime = context.runtime()?;
    // Open for reading first, so that a missing store is not created.
    drop(runtime.block_on(Store::open(&context.store, Access::ReadOnly))?);
    let store = open_store(&runtime, &context.store)?;
    let left = runtime.block_on(detached::refresh(&store, context))?;
    let run = match target(args, &left, &runtime, &store)? {
        Target::Run(run) => run,
        Target::Sweep(sweep) => {
            return sweep::points::resume(&sweep, &runtime, &store, &args.execution, context);
        }
    };
    let left = left.into_iter().find(|left| left.run == run);
    let detail = runtime.block_on(store.run_detail(&run))?;
    check_ended(&run, &detail, left.as_ref())?;
    let recorded = recorded_plan(&run, &detail)?;
    let mut plan = recorded.plan.clone();
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, Some(&store));
    renew_plugins(&mut plan, &mut plugins, context)?;
    // Options of an imported run could contain commands that would run in jobs here.
    let execution = match runtime.block_on(store.is_imported(&run))? {
        true => args.execution.clone(),
        false => args.execution.or_as_recorded(&recorded),
    };
    let settings = execution.settings(&plan.base_dir, context)?;
    let told = place.is_some();
    if let Some(place) = execution.place(&settings)? {
        // The other ranks could not know it before the history was open.
        if !told && place.size > 1 {
            return Err(ranks::not_told(&place));
        }
        ranks::spread(&mut plan, &mut plugins, &place)?;
    }
    let roles = plan
        .stages
        .iter()
        .map(|stage| recorded.role(&stage.name, state_of(&detail, &stage.name)))
        .collect();
    if !context.quiet {
        output::say(&format!("resuming run {run} of {}", plan.name));
    }
    let planned = PlannedRun {
        roles,
        shown_path: plan.path.clone(),
        plan,
        resumed_from: Some(run.clone()),
        sweep: detail.summary.sweep.clone(),
    };
    let known = &mut known_results(&runtime, &store, args.rehash.trust())?;
    planned.check(&mut plugins, known, context)?;
    // Running jobs are taken over unchanged.
    if let Some(left) = left {
        runtime.block_on(store.take_up(&left))?;
    }
    planned
        .carry_out(&runtime, &store, &execution, context)
        .map(drop)
}

/// What is resumed.
enum Target {
    Run(RunId),
    /// Its missing points.
    Sweep(SweepId),
}

/// Finds what the arguments name. `left` are the runs whose jobs go on in Slurm.
fn target(
    args: &Args,
    left: &[DetachedJobs],
    runtime: &Runtime,
    store: &Store,
) -> Result<Target, Error> {
    let Some(reference) = &args.run else {
        let left: Vec<RunId> = left.iter().map(|left| left.run.clone()).collect();
        let run = runtime.block_on(store.run_to_resume(&left))?;
        let place = runtime.block_on(store.run_detail(&run))?.summary.sweep;
        return Ok(match place {
            Some(SweepPlace { id, .. }) => Target::Sweep(id),
            None => Target::Run(run),
        });
    };
    let run = match runtime.block_on(store.resolve_run(reference)) {
        Err(StoreError::NoRun { .. }) if reference.starts_with(['s', 'S']) => {
            let sweep = runtime.block_on(store.resolve_sweep(reference));
            // If neither exists, a run was probably meant.
            let sweep = sweep.map_err(|error| match error {
                StoreError::NoSweep { .. } => StoreError::NoRun {
                    reference: reference.to_owned(),
                    runs: 1,
                },
                error => error,
            })?;
            return Ok(Target::Sweep(sweep));
        }
        run => run?,
    };
    if Store::is_relative(reference) && runtime.block_on(store.is_imported(&run))? {
        let message = format!("`{reference}` is run {run}, which comes from another store");
        return Err(Error::new(Exit::Usage, message).hint(format!(
            "`retort resume {run}` continues it, if you trust its recipe; `retort resume` the latest of your own"
        )));
    }
    Ok(Target::Run(run))
}

/// A run that is still alive can be resumed only if it left its jobs to Slurm.
fn check_ended(run: &RunId, detail: &RunDetail, left: Option<&DetachedJobs>) -> Result<(), Error> {
    let state = detail.summary.state;
    let is_alive = matches!(state, RunState::Running | RunState::Queued);
    if is_alive && left.is_none() {
        let message = format!("run {run} is still {state}");
        return Err(Error::new(Exit::Usage, message).hint("a run can be resumed once it has ended"));
    }
    Ok(())
}

/// The plan with which a run began.
fn recorded_plan(run: &RunId, detail: &RunDetail) -> Result<RecordedPlan, Error> {
    serde_json::from_value(detail.resolved.clone()).map_err(|error| {
        Error::new(
            Exit::Internal,
            format!("run {run} is from another version of retort and cannot be resumed"),
        )
        .cause(&error)
        .hint(format!(
            "`retort run {}` runs its recipe anew",
            detail.summary.recipe_path
        ))
    })
}

/// Rebuilt plugins are used in their current form, and their stages run again.
fn renew_plugins(
    plan: &mut Plan,
    plugins: &mut Plugins<'_>,
    context: &Context,
) -> Result<(), Error> {
    let mut told: Vec<String> = Vec::new();
    for stage in &mut plan.stages {
        let build = build_for(stage, plugins)?;
        let (identity, description) = (&build.identity, &build.description);
        if identity.hash != stage.plugin.hash && !told.contains(&identity.name) {
            if !context.quiet {
                output::say(&format!(
                    "plugin {} has changed since that run: its stages run again",
                    identity.name
                ));
            }
            told.push(identity.name.clone());
        }
        let kind = description
            .stages
            .iter()
            .find(|kind| kind.kind == stage.kind)
            .ok_or_else(|| {
                Error::new(
                    Exit::Plugin,
                    format!(
                        "plugin {} has no stage kind `{}` any more",
                        identity.name, stage.kind
                    ),
                )
            })?;
        (stage.revision, stage.output_kind) = (kind.revision, kind.output.clone());
        stage.plugin = identity.clone();
    }
    Ok(())
}

/// The build of a stage's plugin that drives its device.
fn build_for(
    stage: &PlannedStage,
    plugins: &mut dyn Descriptions,
) -> Result<Rc<Build>, DescribeError> {
    let drives = |build: &Rc<Build>| build.drives(stage.device_kind());
    let base = plugins.describe(&stage.plugin.name)?;
    if drives(&base) {
        return Ok(base);
    }
    let mut variants = plugins.variants(&stage.plugin.name).into_iter().flatten();
    Ok(variants.find(drives).unwrap_or(base))
}

/// The final state of a run's stage.
fn state_of(detail: &RunDetail, stage: &str) -> Option<StageState> {
    let stage = detail.stages.iter().find(|recorded| recorded.name == stage);
    stage.map(|stage| stage.state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake::{self, Fake};

    #[test]
    fn a_stage_goes_on_with_the_build_for_its_device() {
        let text =
            "version: 1\nbackend: varied\nstages:\n  codes: {kind: tokenizer, data: d.csv}\n";
        for (device, hash) in [("cpu", "f00d"), ("cuda:1", "beef")] {
            let plan = fake::plan(text, &[&format!("device={device}")]).unwrap();
            let stage = &plan.stages[0];
            assert_eq!(
                (stage.device.as_str(), stage.plugin.hash.as_str()),
                (device, hash)
            );
            let build = build_for(stage, &mut Fake).unwrap();
            assert_eq!(build.identity, stage.plugin);
        }
    }
}
