//! What a run's record says of it before it begins: the recipe, the plan and each value with its origin.

use crate::executor::options::Options;
use crate::plan::decision::Role;
use crate::plan::{Plan, PlannedStage};
use crate::store::{NewRun, NewStage, Param, PluginIdentity};

pub(super) fn new_run(plan: &Plan, roles: &[Role], options: &Options) -> NewRun {
    // Beside the plan itself, what `resume` has to know of the stages' parts.
    let mut resolved = serde_json::to_value(plan).unwrap_or_default();
    let forced = plan
        .stages
        .iter()
        .zip(roles)
        .filter(|(_, role)| **role == Role::Forced);
    if options.cluster.is_some() {
        resolved["executor"] = "slurm".into();
        resolved["slurm"] = options.slurm.clone().into();
    }
    resolved["forced"] = forced.map(|(stage, _)| stage.name.as_str()).collect();
    NewRun {
        recipe_name: plan.name.clone(),
        recipe_path: plan.path.display().to_string(),
        recipe_text: plan.text.clone(),
        resolved,
        params: params(plan),
        seed: plan.seed,
        command: options.command.clone(),
        resumed_from: options.resumed_from.clone(),
        environment: options.environment.clone(),
        sweep: options.sweep.clone(),
    }
}

/// Every resolved value of a plan with its origin, under its path in a recipe.
fn params(plan: &Plan) -> Vec<Param> {
    let mut params = vec![Param {
        path: "seed".into(),
        value: plan.seed.into(),
        origin: seed_origin(plan),
    }];
    for stage in &plan.stages {
        let value = serde_json::to_value(stage).unwrap_or_default();
        for (pointer, origin) in &stage.origins {
            // Options stand beside the reserved keys in a recipe. An origin may belong to what is no field of a
            // planned stage (`plugin` is more than its name there).
            let Some(value) = value.pointer(pointer) else {
                continue;
            };
            let value = match pointer.as_str() {
                "/plugin" => stage.plugin.name.clone().into(),
                "/workers" => stage.workers.len().max(1).into(),
                _ => value.clone(),
            };
            if value.is_object() {
                continue;
            }
            let inner = pointer
                .strip_prefix("/options")
                .unwrap_or(pointer)
                .replace('/', ".");
            params.push(Param {
                path: format!("stages.{}{inner}", stage.name),
                value,
                origin: origin.to_string(),
            });
        }
    }
    params
}

/// Where the recipe's own seed came from, which a plan does not say.
fn seed_origin(plan: &Plan) -> String {
    if plan.set.iter().any(|set| set.starts_with("seed=")) {
        return "--set".into();
    }
    let line = plan.text.lines().position(|line| line.starts_with("seed:"));
    line.map_or_else(|| "default".into(), |line| format!("recipe:{}", line + 1))
}

pub(super) fn new_stage(stage: &PlannedStage, position: usize) -> NewStage {
    let plugin = &stage.plugin;
    NewStage {
        name: stage.name.clone(),
        kind: stage.kind.clone(),
        position,
        plugin: PluginIdentity {
            name: plugin.name.clone(),
            version: plugin.version.clone(),
            hash: plugin.hash.clone(),
        },
        device: stage.device.clone(),
        dtype: stage.dtype.clone(),
        seed: stage.seed,
        options: stage.options.clone(),
        inputs: stage
            .references
            .iter()
            .map(|one| (one.pointer.clone(), one.stage.clone()))
            .collect(),
    }
}
