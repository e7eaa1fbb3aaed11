//! A backend as a plugin: the part shared by all backends.

use retort_abi::{
    Description, Device, Diagnostic, Failure, FailureCode, Host, Part, Plugin, StageJob,
    StageResult,
};

use crate::backend::Backend;
use crate::collective::{Collective, QuietHost, SingleRank};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::stage::{self};

/// A plugin's description, apart from the engine's stages.
#[derive(Debug, Clone, Copy)]
pub struct PluginInfo {
    /// Name by which recipes ask for it.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// One line for people.
    pub summary: &'static str,
    /// SPDX licence expression.
    pub license: &'static str,
    /// Kinds of device this build drives.
    pub devices: &'static [&'static str],
    /// Element types it computes in.
    pub dtypes: &'static [&'static str],
    /// Libraries that it needs and users install, with version and path.
    pub libraries: &'static [&'static str],
}

/// A [`Backend`] with all stages of the engine, as a [`Plugin`].
pub struct EnginePlugin<B: Backend> {
    /// What it is.
    pub about: PluginInfo,
    /// Opens a device (`cpu`, `cuda:0`) for an element type (`f32`) and a number of threads.
    pub open: fn(&str, &str, usize) -> Result<B>,
    /// Devices really present.
    pub devices: fn() -> Vec<Device>,
    /// Connects to the other ranks of a stage, if the library supports it.
    pub collective: Option<fn(&B, Part) -> Result<Box<dyn Collective>>>,
}

impl<B: Backend> Plugin for EnginePlugin<B> {
    fn describe(&self) -> Description {
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        Description {
            name: self.about.name.into(),
            version: self.about.version.into(),
            summary: self.about.summary.into(),
            license: self.about.license.into(),
            devices: own(self.about.devices),
            dtypes: own(self.about.dtypes),
            libraries: own(self.about.libraries),
            families: own(&["llamagen", "var"]),
            stages: stage::all::<B>()
                .iter()
                .map(|s| {
                    let mut kind = (s.describe)();
                    kind.divisible |= kind.together && self.collective.is_some();
                    kind
                })
                .collect(),
        }
    }

    fn probe(&self, _: &dyn Host) -> Result<Vec<Device>, Failure> {
        Ok((self.devices)())
    }

    fn validate(&self, _: &dyn Host, job: &StageJob) -> Result<Vec<Diagnostic>, Failure> {
        Ok((find::<B>(job)?.check)(job))
    }

    fn run(&self, host: &dyn Host, job: &StageJob) -> Result<StageResult, Failure> {
        let kind = find::<B>(job)?;
        let backend = (self.open)(&job.device, &job.dtype, job.threads)?;
        let ranks: Box<dyn Collective> = match (self.collective, job.part) {
            (Some(meet), Some(part)) if (kind.describe)().together => meet(&backend, part)?,
            _ => Box::new(SingleRank),
        };
        let quiet = QuietHost(host);
        let context = Context {
            host: if ranks.rank() == 0 { host } else { &quiet },
            job,
            backend: &backend,
            ranks: &*ranks,
        };
        // Run inside the pool: kernels started from a pool thread need no hand-over.
        rayon::scope(|_| (kind.run)(&context)).map_err(|error| match error {
            Error::OutOfMemory(_) => Failure::from(error).hint(smaller(job)),
            error => error.into(),
        })
    }
}

/// The batch size to try if a stage runs out of memory.
fn smaller(job: &StageJob) -> String {
    let batches = ["/train/batch", "/batch"]
        .into_iter()
        .filter_map(|pointer| {
            let batch = job.options.pointer(pointer)?.as_u64()?;
            Some((pointer[1..].replace('/', "."), batch))
        });
    // A stage with two batch sizes trains with one and evaluates with the other: the larger is the likelier cause.
    match batches.max_by_key(|(_, batch)| *batch) {
        Some((option, batch)) if batch > 1 => format!(
            "try half its batch of {batch}: --set stages.{}.{option}={}",
            job.stage,
            batch / 2
        ),
        Some(_) => "its batch is 1 already: it needs a device with more memory".into(),
        None => "it needs a device with more memory".into(),
    }
}

fn find<B: Backend>(job: &StageJob) -> Result<stage::StageEntry<B>, Failure> {
    let unknown = || {
        Failure::new(
            FailureCode::Unsupported,
            format!("no stage kind {}", job.kind),
        )
    };
    stage::all::<B>()
        .into_iter()
        .find(|s| (s.describe)().kind == job.kind)
        .ok_or_else(unknown)
}

/// Model name of the processor, for people; empty if unknown.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned()))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(options: Value, said: &str) {
        let job = StageJob {
            stage: "student".into(),
            kind: "distill".into(),
            options,
            seed: 0,
            device: "cuda:0".into(),
            dtype: "f32".into(),
            threads: 1,
            base_dir: "/".into(),
            work_dir: None,
            inputs: Default::default(),
            sources: Default::default(),
            prepared: Default::default(),
            part: None,
        };
        assert_eq!(smaller(&job), said);
    }

    #[test]
    fn want_of_memory_names_the_batch_to_try() {
        check(
            json!({"train": {"batch": 64}, "batch": 8}),
            "try half its batch of 64: --set stages.student.train.batch=32",
        );
        check(
            json!({"batch": 25}),
            "try half its batch of 25: --set stages.student.batch=12",
        );
        check(
            json!({"batch": 1}),
            "its batch is 1 already: it needs a device with more memory",
        );
        check(json!({}), "it needs a device with more memory");
    }
}
