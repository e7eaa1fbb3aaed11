//! Planning for machines that cannot be asked: a compute node has the devices that its jobs ask for.

use std::rc::Rc;

use retort_abi::{Device, Diagnostic, StageJob};

use crate::plan::{Build, DescribeError, Descriptions, PluginIdentity};

/// Descriptions of plugins, for nodes with GPUs: what drives GPUs finds one there.
pub struct NodeDescriptions<'a>(pub &'a mut dyn Descriptions);

impl Descriptions for NodeDescriptions<'_> {
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError> {
        self.0.describe(plugin)
    }

    fn variants(&mut self, plugin: &str) -> Vec<Result<Rc<Build>, DescribeError>> {
        self.0.variants(plugin)
    }

    fn devices(&mut self, _plugin: &PluginIdentity) -> Result<Vec<Device>, DescribeError> {
        // The first of those that Slurm gives to a job.
        Ok(vec![Device::named("cuda:0")])
    }

    fn validate(
        &mut self,
        plugin: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<Diagnostic>>, DescribeError> {
        self.0.validate(plugin, jobs)
    }

    fn names(&mut self) -> Vec<String> {
        self.0.names()
    }
}
