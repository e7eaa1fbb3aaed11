//! The kinds of stage a recipe can name, one file each, and what they share.

pub mod classifier;
pub mod condition;
pub mod conformance;
pub mod distill;
pub mod evaluate;
pub mod images;
pub mod pretrain;
mod room;
pub mod sample;
pub mod shards;
pub mod snapshot;
pub mod teacher;
pub mod tokenizer;
pub mod trajectories;

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_abi::{
    ArtifactDraft, ArtifactMeta, Cancel, Diagnostic, Host, Input, Severity, StageJob, StageKind,
    StageResult,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::backend::Backend;
use crate::collective::Collective;
use crate::data::{self, Data, Images};
use crate::error::{Error, Result};

/// How often a lock that another part has is tried again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A running stage: its job, its host and the tensor library.
pub struct Context<'a, B: Backend> {
    /// Services of the host.
    pub host: &'a dyn Host,
    /// What to do.
    pub job: &'a StageJob,
    /// The tensor library.
    pub backend: &'a B,
    /// The other ranks.
    pub ranks: &'a dyn Collective,
}

impl<'a, B: Backend> Context<'a, B> {
    /// The output of the stage that an option names.
    pub fn input(&self, stage: &str) -> Result<&'a Input> {
        self.job
            .inputs
            .get(stage)
            .ok_or_else(|| Error::Internal(format!("the host gave no output of stage {stage}")))
    }

    /// Directory of the output of the stage that an option names.
    pub fn input_dir(&self, stage: &str) -> Result<&'a Path> {
        Ok(&self.input(stage)?.path)
    }

    /// The images that an option names.
    pub fn images(&self, data: &Data) -> Result<Images> {
        let stage = match data {
            Data::Stage(stage) => Some(stage),
            Data::Source(options) => options.images.as_ref(),
        };
        let dir = stage.map(|stage| self.input_dir(stage)).transpose()?;
        data::load(data, dir, &self.job.base_dir, self.host)
    }

    /// Whether tensors lie in the host's memory.
    pub fn on_host(&self) -> bool {
        self.job.device.starts_with("cpu")
    }

    /// Directory that survives attempts.
    pub fn work_dir(&self) -> Result<&'a Path> {
        let missing = || Error::Internal("the host gave no work directory".into());
        self.job.work_dir.as_deref().ok_or_else(missing)
    }

    /// Ends the stage when it has been asked to stop. For the time between pieces of work.
    pub fn go_on(&self) -> Result<()> {
        match self.host.cancelled() {
            Cancel::Run => Ok(()),
            _ => Err(Error::Cancelled),
        }
    }

    /// What a batch is cut into that ranks share: as many pieces as there are ranks, and each into `parts`.
    ///
    /// # Errors
    /// There are more pieces than samples.
    pub(crate) fn check_share(&self, batch: usize, parts: usize) -> Result<()> {
        let ranks = self.ranks.size();
        if ranks * parts <= batch {
            return Ok(());
        }
        let each = match parts {
            1 => String::new(),
            _ => format!(", each with {parts} parts of a step (`accumulate`)"),
        };
        let message = format!("a batch of {batch} is too small for {ranks} workers{each}");
        Err(Error::option("/train/batch", message))
    }

    /// Waits until no other part of the stage has what this name stands for in hand; until the lock is dropped, none gets it.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.work_dir()?.join(name).with_extension("lock");
        let file = File::create(&path).map_err(Error::io(&path))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
                Err(TryLockError::WouldBlock) if self.host.cancelled() != Cancel::Run => {
                    return Err(Error::Cancelled);
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Writes the stage's output and ends the stage.
    pub fn finish(
        &self,
        kind: &str,
        meta: ArtifactMeta,
        summary: serde_json::Value,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<StageResult> {
        let draft = ArtifactDraft::begin(self.host, kind, &self.job.stage)?;
        write(draft.path())?;
        let output = draft.commit(&meta)?;
        Ok(StageResult { output, summary })
    }
}

/// A kind of stage.
pub trait Stage<B: Backend> {
    /// Its options.
    type Options: DeserializeOwned + JsonSchema;
    /// Name in recipes.
    const KIND: &'static str;
    /// Kind of its output.
    const OUTPUT: &'static str;
    /// Raised when equal options would now give another result.
    const REVISION: u32;
    /// One line for people.
    const SUMMARY: &'static str;
    /// Whether it does the part of the work that a job names.
    const DIVISIBLE: bool = false;
    /// Whether ranks can do it together, where the backend has a [`Collective`].
    const TOGETHER: bool = false;

    /// Refuses options that no schema can refuse. Touches no device and no artifact.
    fn check(options: &Self::Options, base_dir: &Path) -> Result<()>;
    /// Does the work.
    fn run(context: &Context<'_, B>, options: &Self::Options) -> Result<StageResult>;
}

/// A [`Stage`] behind one type.
pub struct Registered<B: Backend> {
    /// What `describe` says of it.
    pub describe: fn() -> StageKind,
    /// Checks options.
    pub check: fn(&StageJob) -> Vec<Diagnostic>,
    /// Runs.
    pub run: fn(&Context<'_, B>) -> Result<StageResult>,
}

/// All kinds of stage.
pub fn all<B: Backend>() -> Vec<Registered<B>> {
    vec![
        register::<B, images::Images>(),
        register::<B, tokenizer::Tokenizer>(),
        register::<B, pretrain::Pretrain>(),
        register::<B, teacher::Teacher>(),
        register::<B, teacher::Student>(),
        register::<B, trajectories::Trajectories>(),
        register::<B, classifier::Classifier>(),
        register::<B, distill::Distill>(),
        register::<B, snapshot::Snapshot>(),
        register::<B, sample::Sample>(),
        register::<B, evaluate::Evaluate>(),
        register::<B, conformance::Conformance>(),
    ]
}

fn register<B: Backend, S: Stage<B>>() -> Registered<B> {
    Registered {
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
            let outcome =
                parse::<S::Options>(job).and_then(|options| S::check(&options, &job.base_dir));
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

/// Pretty JSON into a file.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Internal(e.to_string()))?;
    std::fs::write(path, text + "\n").map_err(Error::io(path))
}

/// A copy under another name, by hard link where the file system can.
pub(crate) fn link(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to)
        .or_else(|_| std::fs::copy(from, to).map(drop))
        .map_err(Error::io(from))
}

/// A path as written in a recipe.
pub(crate) fn resolve(base: &Path, path: &str) -> PathBuf {
    base.join(path)
}
