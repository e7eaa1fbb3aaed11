//! A running stage as its parts see it: the job, the host, the tensor library, the other ranks.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use retort_abi::{ArtifactDraft, ArtifactMeta, Cancel, Host, Input, StageJob, StageResult};

use crate::backend::Backend;
use crate::collective::Collective;
use crate::data::kept::{self, Place};
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
        self.images_unless(data, |_| Ok(()))
    }

    /// The same, unless `accept` refuses their number; it is asked before any is decoded.
    pub fn images_unless(
        &self,
        data: &Data,
        accept: impl FnOnce(usize) -> Result<()>,
    ) -> Result<Images> {
        let stage = match data {
            Data::Stage(stage) => Some(stage),
            Data::Source(options) => options.images.as_ref(),
        };
        let dir = stage.map(|stage| self.input_dir(stage)).transpose()?;
        let place = Place {
            host: self.host,
            base_dir: &self.job.base_dir,
            folder: self
                .job
                .work_dir
                .as_ref()
                .map(|work| work.join(kept::FOLDER)),
            // Only the parts of a divided stage share a work directory.
            turn: &|| {
                let divided = self.job.part.is_some();
                divided.then(|| self.lock(kept::FOLDER)).transpose()
            },
        };
        data::load(data, dir, &place, accept)
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
