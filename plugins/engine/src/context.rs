//! The context of a running stage: the job, the host, the tensor library, the other ranks.

use std::path::Path;

use retort_abi::{ArtifactDraft, ArtifactMeta, Cancel, Host, Input, StageJob, StageResult};

use crate::backend::Backend;
use crate::collective::Collective;
use crate::data::cache::{self, ImageCache};
use crate::data::{self, Data, Images};
use crate::error::{Error, Result};
use crate::files::MakeLock;

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
        self.images_unless(data, |_| Ok(()))
    }

    /// The same, unless `accept` refuses their number; it is called before any is decoded.
    pub fn images_unless(
        &self,
        data: &Data,
        accept: impl FnOnce(usize) -> Result<()>,
    ) -> Result<Images> {
        let stage = match data {
            Data::Stage(stage) => Some(stage),
            Data::Source(options) => options.images.as_ref().or_else(|| self.prepared()),
        };
        let dir = stage.map(|stage| self.input_dir(stage)).transpose()?;
        let cache = ImageCache {
            host: self.host,
            base_dir: &self.job.base_dir,
            folder: self
                .job
                .work_dir
                .as_ref()
                .map(|work| work.join(cache::FOLDER)),
            // Only parts of a divided stage share a work directory.
            lock: &|| match self.job.part {
                Some(_) => self.lock(cache::FOLDER),
                None => Ok(MakeLock::undisputed()),
            },
        };
        data::load(data, dir, &cache, accept)
    }

    /// The stage that has prepared the images of the option `data`, which says where they come from.
    fn prepared(&self) -> Option<&'a String> {
        let stage = self.job.prepared.get("/data")?;
        self.job.inputs.contains_key(stage).then_some(stage)
    }

    /// Directory that survives attempts.
    pub fn work_dir(&self) -> Result<&'a Path> {
        let missing = || Error::Internal("the host gave no work directory".into());
        self.job.work_dir.as_deref().ok_or_else(missing)
    }

    /// Ends the stage if it has been asked to stop; called between pieces of work.
    pub fn go_on(&self) -> Result<()> {
        match self.host.cancelled() {
            Cancel::Run => Ok(()),
            _ => Err(Error::Cancelled),
        }
    }

    /// How a batch is divided: into a share for each rank, and each share into `parts`.
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

    /// Takes the lock of this name among the parts of the stage on this machine; it is released when the result is dropped.
    pub fn lock(&self, name: &str) -> Result<MakeLock> {
        let path = self.work_dir()?.join(name).with_extension("lock");
        MakeLock::wait(&path, || self.go_on())
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
