//! `retort resume`: takes a run up again, with its frozen plan.

use crate::cli::execution::{ExecutionArgs, Job, open_store, past};
use crate::cli::{Context, Error, Exit, RehashArgs, left, sweep, talk};
use crate::executor::RecordedPlan;
use crate::plan::{Descriptions, Plan};
use crate::plugin::{Plugins, search_dirs};
use crate::store::{Access, RunDetail, RunState, StageState, Store, StoreError, SweepPlace};

/// Arguments of `resume`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run: an id or the beginning of one, `latest`, `latest~1`, or a tag; or a sweep, whose missing points are run.
    /// Without it, the latest run, or the sweep it belongs to.
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
    let runtime = context.runtime()?;
    // Reading first: a store that is not there is not to be made.
    drop(runtime.block_on(Store::open(&context.store, Access::ReadOnly))?);
    let store = open_store(&runtime, &context.store)?;
    let reference = args.run.as_deref().unwrap_or("latest");
    let run = match runtime.block_on(store.resolve_run(reference)) {
        Err(StoreError::NoRun { .. }) if reference.starts_with(['s', 'S']) => {
            let sweep = runtime.block_on(store.resolve_sweep(reference));
            // Of two things that are not there, the run is the likelier one.
            let sweep = sweep.map_err(|error| match error {
                StoreError::NoSweep { .. } => StoreError::NoRun {
                    reference: reference.to_owned(),
                    runs: 1,
                },
                error => error,
            })?;
            return sweep::points::resume(&sweep, &runtime, &store, &args.execution, context);
        }
        run => run?,
    };
    if args.run.is_none() {
        let place = runtime.block_on(store.run_detail(&run))?.summary.sweep;
        if let Some(SweepPlace { id, .. }) = place {
            return sweep::points::resume(&id, &runtime, &store, &args.execution, context);
        }
    }
    let left = runtime.block_on(left::refresh(&store, context))?;
    let left = left.into_iter().find(|left| left.run == run);
    let detail = runtime.block_on(store.run_detail(&run))?;
    let alive = matches!(detail.summary.state, RunState::Running | RunState::Queued);
    if alive && left.is_none() {
        return Err(Error::new(
            Exit::Usage,
            format!("run {run} is still {}", detail.summary.state),
        )
        .hint("a run is taken up again once it has ended"));
    }
    let recorded: RecordedPlan =
        serde_json::from_value(detail.resolved.clone()).map_err(|error| {
            Error::new(
                Exit::Internal,
                format!("run {run} was recorded by another retort and cannot be taken up again"),
            )
            .cause(&error)
            .hint(format!(
                "`retort run {}` runs its recipe anew",
                detail.summary.recipe_path
            ))
        })?;
    let mut plan = recorded.plan.clone();
    let mut plugins = Plugins::new(search_dirs(&context.plugin_dirs), &runtime, Some(&store));
    renew_plugins(&mut plan, &mut plugins, context)?;
    let roles = plan
        .stages
        .iter()
        .map(|stage| recorded.role(&stage.name, state_of(&detail, &stage.name)))
        .collect();
    if !context.quiet {
        talk::say(&format!("resuming run {run} of {}", plan.name));
    }
    let job = Job {
        roles,
        shown_path: plan.path.clone(),
        plan,
        resumed_from: Some(run),
        sweep: detail.summary.sweep.clone(),
    };
    let past = &mut past(&runtime, &store, args.rehash.memory())?;
    job.check(&mut plugins, past, context)?;
    // The jobs that still run are taken up as they are.
    if let Some(left) = left {
        runtime.block_on(store.take_up(&left))?;
    }
    let execution = args.execution.or_as_recorded(&recorded);
    job.carry_out(&runtime, &store, &execution, context)
        .map(drop)
}

/// Plugins that have been built anew since are used as they are now; what they made before is made again.
fn renew_plugins(
    plan: &mut Plan,
    plugins: &mut Plugins<'_>,
    context: &Context,
) -> Result<(), Error> {
    let mut told: Vec<String> = Vec::new();
    for stage in &mut plan.stages {
        let build = plugins.describe(&stage.plugin.name)?;
        let (identity, description) = (&build.identity, &build.description);
        if identity.hash != stage.plugin.hash && !told.contains(&identity.name) {
            if !context.quiet {
                talk::say(&format!(
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

/// The state in which a stage of a run ended.
fn state_of(detail: &RunDetail, stage: &str) -> Option<StageState> {
    let stage = detail.stages.iter().find(|recorded| recorded.name == stage);
    stage.map(|stage| stage.state)
}
