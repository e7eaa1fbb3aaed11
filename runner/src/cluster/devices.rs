//! Planning for machines that cannot be queried: a compute node is assumed to have the devices that its jobs request.

use std::rc::Rc;

use retort_abi::{Device, Diagnostic, StageJob};

use crate::diagnostic::Report;
use crate::plan::{self, Build, DescribeError, Descriptions, Plan, PluginIdentity};
use crate::recipe::Recipe;
use crate::settings::{Executor, Settings};

/// Resolves a recipe whose stages run where these settings say.
///
/// # Errors
/// All problems of the recipe.
pub fn plan(
    recipe: &Recipe,
    plugins: &mut dyn Descriptions,
    settings: &Settings,
) -> Result<Plan, Report> {
    plan::plan(recipe, &mut NodeDescriptions { plugins, settings })
}

/// Descriptions of plugins, with the devices of compute nodes if the stages run there.
struct NodeDescriptions<'a> {
    plugins: &'a mut dyn Descriptions,
    settings: &'a Settings,
}

impl Descriptions for NodeDescriptions<'_> {
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError> {
        self.plugins.describe(plugin)
    }

    fn variants(&mut self, plugin: &str) -> Vec<Result<Rc<Build>, DescribeError>> {
        self.plugins.variants(plugin)
    }

    fn devices(&mut self, plugin: &PluginIdentity) -> Result<Vec<Device>, DescribeError> {
        self.plugins.devices(plugin)
    }

    fn devices_elsewhere(&self, kind: &str) -> Option<Vec<Device>> {
        if self.settings.executor().0 != Executor::Slurm {
            return None;
        }
        // The first of the devices that Slurm gives a job.
        let mut gpu = Device::named("cuda:0");
        if !self.settings.asks_for_gpus(kind) {
            let why =
                "its jobs ask Slurm for no GPU, which `gres` or `--gpus` in retort.toml would";
            gpu.unusable = Some(why.to_owned());
        }
        Some(vec![Device::named("cpu"), gpu])
    }

    fn validate(
        &mut self,
        plugin: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<Diagnostic>>, DescribeError> {
        self.plugins.validate(plugin, jobs)
    }

    fn names(&mut self) -> Vec<String> {
        self.plugins.names()
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::plan::fake::Fake;
    use crate::recipe;
    use crate::settings::Overrides;

    /// The devices for which a recipe's stages are planned, and notes.
    fn devices(
        executor: Executor,
        slurm: &[&str],
        device: &str,
    ) -> Result<(Vec<String>, String), Report> {
        let stages = "  codes: {kind: tokenizer, data: d.csv}\n  teacher: {kind: pretrain, tokenizer: codes}\n";
        devices_of(executor, slurm, device, stages)
    }

    /// The same for these stages.
    fn devices_of(
        executor: Executor,
        slurm: &[&str],
        device: &str,
        stages: &str,
    ) -> Result<(Vec<String>, String), Report> {
        let text = format!("version: 1\nbackend: varied\ndevice: {device}\nstages:\n{stages}");
        let recipe = recipe::parse(Path::new("r.yaml"), PathBuf::from("/base"), text, &[])?;
        let root = tempfile::tempdir().unwrap();
        let given = Overrides {
            executor: Some(executor),
            slurm: slurm.iter().map(|&word| word.to_owned()).collect(),
            ..Overrides::default()
        };
        let settings = Settings::read(root.path(), &given).unwrap();
        let plan = plan(&recipe, &mut Fake, &settings)?;
        let devices = plan.stages.iter().map(|stage| stage.device.clone());
        Ok((devices.collect(), plan.notes.join("; ")))
    }

    #[test]
    fn only_kinds_whose_jobs_ask_for_gpus_are_planned_for_them() {
        let (found, notes) = devices(Executor::Slurm, &["pretrain.gres=gpu:1"], "auto").unwrap();
        assert_eq!(found, ["cpu", "cuda:0"]);
        assert!(notes.contains("ask Slurm for no GPU"), "{notes}");
        let (found, _) = devices(Executor::Slurm, &["gres=gpu:1"], "cuda").unwrap();
        assert_eq!(found, ["cuda:0", "cuda:0"]);
        let (found, _) = devices(Executor::Slurm, &[], "auto").unwrap();
        assert_eq!(found, ["cpu", "cpu"]);
        // This machine has different devices.
        let (found, _) = devices(Executor::Local, &["gres=gpu:1"], "auto").unwrap();
        assert_eq!(found, ["cuda:1", "cuda:1"]);
    }

    #[test]
    fn an_added_stage_is_planned_for_the_devices_of_its_own_jobs() {
        let stages = "  a: {kind: classifier, data: {folder: d}}\n  b: {kind: classifier, data: {folder: d}}\n";
        for (executor, slurm, expected) in [
            (Executor::Slurm, "classifier.gres=gpu:1", ["cpu", "cuda:0"]),
            (Executor::Slurm, "gres=gpu:1", ["cuda:0", "cuda:0"]),
            (Executor::Slurm, "images.gres=gpu:1", ["cpu", "cpu"]),
            (Executor::Local, "gres=gpu:1", ["cuda:1", "cuda:1"]),
        ] {
            let (found, notes) = devices_of(executor, &[slurm], "auto", stages).unwrap();
            assert_eq!(found[..2], expected, "{slurm}: {notes}");
            assert!(notes.contains("`images-of-a` prepares"), "{slurm}: {notes}");
            assert_eq!(found.len(), 3);
        }
    }

    #[test]
    fn a_gpu_that_jobs_do_not_ask_for_is_an_error() {
        let report = devices(Executor::Slurm, &["pretrain.gres=gpu:1"], "cuda").unwrap_err();
        let [finding] = report.findings.as_slice() else {
            panic!("{report:?}");
        };
        assert!(
            finding.message.contains("ask Slurm for no GPU"),
            "{finding:?}"
        );
    }
}
