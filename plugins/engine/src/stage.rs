//! The kinds of stage a recipe can name, one file each, and what they share.

mod batch_memory;
pub mod classifier;
pub mod conditioning;
pub mod conformance;
pub mod distill;
pub mod evaluate;
pub mod images;
pub mod noise;
pub mod pretrain;
pub mod sample;
pub mod shards;
pub mod snapshot;
pub mod sources;
pub mod teacher;
pub mod tokenizer;
pub mod trajectories;

use std::collections::BTreeMap;
use std::path::Path;

use retort_abi::{Diagnostic, Severity, SourceStage, StageJob, StageKind, StageResult};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::backend::Backend;
use crate::context::Context;
use crate::error::{Error, Result};

/// A kind of stage.
pub trait Stage<B: Backend> {
    /// Its options.
    type Options: DeserializeOwned + JsonSchema;
    /// Name in recipes.
    const KIND: &'static str;
    /// Kind of its output.
    const OUTPUT: &'static str;
    /// Raise it when equal options give a different result.
    const REVISION: u32;
    /// One line for people.
    const SUMMARY: &'static str;
    /// Whether jobs may be divided into parts.
    const DIVISIBLE: bool = false;
    /// Whether ranks can work on it together, if the backend has a [`Collective`].
    const TOGETHER: bool = false;

    /// Checks options beyond their schema. Touches no device and no artifact.
    fn check(options: &Self::Options, base_dir: &Path) -> Result<()>;
    /// Checks them against the options of earlier stages, by their names, before any of these has run.
    fn check_sources(
        _options: &Self::Options,
        _stages: &BTreeMap<String, SourceStage>,
    ) -> Result<()> {
        Ok(())
    }
    /// Does the work.
    fn run(context: &Context<'_, B>, options: &Self::Options) -> Result<StageResult>;
}

/// A [`Stage`] behind one type.
pub struct StageEntry<B: Backend> {
    /// Its entry in `describe`.
    pub describe: fn() -> StageKind,
    /// Checks options.
    pub check: fn(&StageJob) -> Vec<Diagnostic>,
    /// Runs.
    pub run: fn(&Context<'_, B>) -> Result<StageResult>,
}

/// All kinds of stage.
pub fn all<B: Backend>() -> Vec<StageEntry<B>> {
    vec![
        register::<B, images::Images>(),
        register::<B, tokenizer::TokenizerStage>(),
        register::<B, pretrain::Pretrain>(),
        register::<B, teacher::TeacherStage>(),
        register::<B, teacher::StudentStage>(),
        register::<B, trajectories::Trajectories>(),
        register::<B, classifier::Classifier>(),
        register::<B, distill::Distill>(),
        register::<B, snapshot::Snapshot>(),
        register::<B, sample::Sample>(),
        register::<B, evaluate::Evaluate>(),
        register::<B, conformance::Conformance>(),
    ]
}

fn register<B: Backend, S: Stage<B>>() -> StageEntry<B> {
    StageEntry {
        describe: || StageKind {
            kind: S::KIND.into(),
            summary: S::SUMMARY.into(),
            output: S::OUTPUT.into(),
            revision: S::REVISION,
            divisible: S::DIVISIBLE,
            together: S::TOGETHER,
            schema: schemars::schema_for!(S::Options).to_value(),
        },
        check: |job| {
            let outcome = parse::<S::Options>(job).and_then(|options| {
                S::check(&options, &job.base_dir)?;
                S::check_sources(&options, &job.sources)
            });
            outcome.err().map(diagnostic).into_iter().collect()
        },
        run: |context| {
            let options = parse::<S::Options>(context.job)?;
            S::check(&options, &context.job.base_dir)?;
            S::run(context, &options)
        },
    }
}

fn parse<T: DeserializeOwned>(job: &StageJob) -> Result<T> {
    serde_json::from_value(job.options.clone())
        .map_err(|e| Error::option("", format!("{}: {e}", job.kind)))
}

fn diagnostic(error: Error) -> Diagnostic {
    let pointer = match &error {
        Error::Options { pointer, .. } => pointer.clone(),
        _ => String::new(),
    };
    Diagnostic {
        severity: Severity::Error,
        pointer,
        message: error.to_string(),
        hint: None,
    }
}
