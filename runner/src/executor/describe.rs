//! The record of a run before it starts: the recipe, the plan and each value with its origin.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::executor::options::Options;
use crate::plan::decision::Role;
use crate::plan::{Plan, PlannedStage};
use crate::settings::Executor;
use crate::store::{NewRun, NewStage, Param, RecordedPlugin, StageState};

/// The history's data for resuming a run, flattened with the plan's own fields.
#[derive(Debug, Serialize, Deserialize)]
pub struct RecordedPlan {
    /// The plan.
    #[serde(flatten)]
    pub plan: Plan,
    /// The role of each stage in the run, by name; empty in runs of earlier versions.
    #[serde(default)]
    pub roles: BTreeMap<String, Role>,
    /// Forced stages, in the format of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    forced: Vec<String>,
    /// The executor of its stages, if not this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executor: Option<Executor>,
    /// Words of `--slurm`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slurm: Vec<String>,
}

impl RecordedPlan {
    /// The role of a stage in the resumed run, given its state and role in the original one: a skipped stage stays skipped, a
    /// forced one that did not finish is still forced.
    pub fn role(&self, stage: &str, ended: Option<StageState>) -> Role {
        let Some(ended) = ended else {
            return Role::Skipped;
        };
        let was_forced = self.forced.iter().any(|forced| forced == stage);
        let earlier = match was_forced {
            true => Role::Forced,
            false => Role::Wanted,
        };
        match self.roles.get(stage).copied().unwrap_or(earlier) {
            Role::Forced if ended == StageState::Succeeded => Role::Wanted,
            role => role,
        }
    }
}

pub(super) fn new_run(plan: &Plan, roles: &[Role], options: &Options) -> NewRun {
    let on_slurm = options.cluster.is_some();
    let names = plan.stages.iter().map(|stage| stage.name.clone());
    let recorded = RecordedPlan {
        plan: plan.clone(),
        roles: names.zip(roles.iter().copied()).collect(),
        forced: Vec::new(),
        executor: match (on_slurm, &options.training_board) {
            (true, _) => Some(Executor::Slurm),
            (false, Some(_)) => Some(Executor::Torchrun),
            (false, None) => None,
        },
        slurm: match on_slurm {
            true => options.slurm.clone(),
            false => Vec::new(),
        },
    };
    let resolved = serde_json::to_value(recorded).unwrap_or_default();
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
        origin: plan.seed_origin.to_string(),
    }];
    for stage in &plan.stages {
        let value = serde_json::to_value(stage).unwrap_or_default();
        for (pointer, origin) in &stage.origins {
            // In a recipe, options are siblings of the reserved keys. An origin may have no corresponding field in a planned
            // stage (`plugin` is more than a name there).
            let Some(value) = value.pointer(pointer) else {
                continue;
            };
            let value = match pointer.as_str() {
                "/plugin" => stage.plugin.name.clone().into(),
                "/workers" => stage.workers.len().max(1).into(),
                "/min_workers" => stage.min_workers.into(),
                "/retries" => stage.retries.into(),
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

pub(super) fn new_stage(stage: &PlannedStage, position: usize) -> NewStage {
    let plugin = &stage.plugin;
    NewStage {
        name: stage.name.clone(),
        kind: stage.kind.clone(),
        position,
        plugin: RecordedPlugin {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_stages_come_back_as_they_were() {
        let plan: Plan = serde_json::from_value(serde_json::json!({
            "name": "r", "description": null, "path": "/r.yaml", "text": "", "set": [], "base_dir": "/", "seed": 1,
            "stages": [], "warnings": [], "notes": [],
        }))
        .unwrap();
        let roles = [
            ("wanted", Role::Wanted),
            ("forced", Role::Forced),
            ("needed", Role::Needed),
            ("skipped", Role::Skipped),
        ];
        let recorded = RecordedPlan {
            plan,
            roles: roles.map(|(name, role)| (name.to_owned(), role)).into(),
            forced: Vec::new(),
            executor: None,
            slurm: Vec::new(),
        };
        let mut text = serde_json::to_value(&recorded).unwrap();
        let read: RecordedPlan = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(read.plan, recorded.plan);
        for (name, role) in roles {
            assert_eq!(read.role(name, Some(StageState::Interrupted)), role);
        }
        assert_eq!(
            read.role("forced", Some(StageState::Succeeded)),
            Role::Wanted
        );
        assert_eq!(read.role("wanted", None), Role::Skipped);

        // The format of earlier versions.
        text.as_object_mut().unwrap().remove("roles");
        text["forced"] = serde_json::json!(["forced"]);
        let read: RecordedPlan = serde_json::from_value(text).unwrap();
        assert_eq!(read.role("forced", Some(StageState::Failed)), Role::Forced);
        assert_eq!(read.role("wanted", Some(StageState::Failed)), Role::Wanted);
        assert_eq!(read.role("skipped", None), Role::Skipped);
    }
}
