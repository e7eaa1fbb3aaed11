//! `snapshot`: a student at an earlier step of its training, as a separate artifact.

use std::collections::BTreeMap;
use std::path::Path;

use retort_abi::{ArtifactMeta, SourceStage, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::bundle::{self, Bundle};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::stage::sources::Sources;
use crate::stage::{Stage, distill};

/// Options of `snapshot`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The `distill` stage that trained the student, with `snapshots`.
    #[schemars(extend("x-retort-artifact" = ["student"]))]
    pub student: String,
    /// The step: a multiple of the training's `snapshots`, below its number of steps.
    #[schemars(range(min = 1))]
    pub step: u64,
}

/// What there is of a student that was trained without.
const NONE: &str = "it has none; `snapshots: n` in its stage keeps one every n steps";

/// The stage.
pub struct Snapshot;

impl<B: Backend> Stage<B> for Snapshot {
    type Options = Options;
    const KIND: &'static str = "snapshot";
    const OUTPUT: &'static str = "student";
    const REVISION: u32 = 1;
    const SUMMARY: &'static str = "take a student from an earlier step of its training";

    fn check(_: &Options, _: &Path) -> Result<()> {
        Ok(())
    }

    fn check_sources(o: &Options, stages: &BTreeMap<String, SourceStage>) -> Result<()> {
        let sources = Sources::of(stages);
        let Some(training) = sources.options::<distill::Options>(&o.student, "distill") else {
            return Ok(());
        };
        let (steps, student) = (training.train.steps, &o.student);
        if o.step < steps && training.keeps(o.step) {
            return Ok(());
        }
        let there = match training.snapshots {
            None => NONE.to_owned(),
            Some(every) => format!("it keeps one every {every} steps, below {steps}"),
        };
        let message = format!("{student} has no snapshot of step {}: {there}", o.step);
        Err(Error::option("/step", message))
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let student = Bundle::open(context.input_dir(&o.student)?)?;
        let kept = student.snapshots()?;
        if !kept.contains(&o.step) {
            let there = match kept.is_empty() {
                true => NONE.to_owned(),
                false => format!("it has those of the steps {kept:?}"),
            };
            let message = format!("{} has no snapshot of step {}: {there}", o.student, o.step);
            return Err(Error::option("/step", message));
        }
        let (meta, summary) = (ArtifactMeta::default(), json!({ "step": o.step }));
        context.finish("student", meta, summary, |dir| {
            bundle::write_snapshot(dir, &student, o.step)
        })
    }
}
