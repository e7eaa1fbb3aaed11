//! The host's services to a running stage. The C table `retort_host` is one implementation; tests bring another.

use std::path::{Path, PathBuf};

use crate::message::{ArtifactMeta, Failure, FailureCode};

/// Severity of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum LogLevel {
    /// Something failed.
    Error = 1,
    /// Something is odd.
    Warn = 2,
    /// Progress in words.
    Info = 3,
    /// For developers.
    Debug = 4,
    /// For developers, in detail.
    Trace = 5,
}

/// Whether a stage should go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Cancel {
    /// Go on.
    Run = 0,
    /// Save the work and stop at the next point from which it can resume.
    AtCheckpoint = 1,
    /// Stop at once.
    Now = 2,
}

/// Services of the host, callable from any thread until `run` returns.
pub trait Host: Send + Sync {
    /// Writes a line to the run's log.
    fn log(&self, level: LogLevel, message: &str);
    /// Appends a point to a metric series. NaN and infinities are values. Cheap; never blocks.
    fn metric(&self, name: &str, step: u64, value: f64);
    /// Reports progress: `done` of `total` (0 when unknown) `unit`s ("steps", "samples").
    fn progress(&self, done: u64, total: u64, unit: &str);
    /// Whether to continue; cheap enough for every step.
    fn cancelled(&self) -> Cancel;
    /// Fails with code `cancelled` if the stage must stop: for `?` in a loop that has nothing to save.
    fn check_cancelled(&self) -> Result<(), Failure> {
        match self.cancelled() {
            Cancel::Run => Ok(()),
            _ => Err(Failure::new(FailureCode::Cancelled, "stopped as asked")),
        }
    }
    /// Opens a staging directory for a new artifact; returns its id and path.
    fn artifact_begin(&self, kind: &str, name: &str) -> Result<(u64, PathBuf), Failure>;
    /// Publishes the staged files as an artifact: synced, hashed and moved to its directory.
    fn artifact_commit(&self, id: u64, meta: &ArtifactMeta) -> Result<(), Failure>;
    /// Drops the staged files.
    fn artifact_abort(&self, id: u64);
}

/// An artifact being written: if dropped without [`ArtifactDraft::commit`], it leaves nothing.
pub struct ArtifactDraft<'h> {
    host: &'h dyn Host,
    id: u64,
    path: PathBuf,
    open: bool,
}

impl<'h> ArtifactDraft<'h> {
    /// Opens a staging directory.
    pub fn begin(host: &'h dyn Host, kind: &str, name: &str) -> Result<Self, Failure> {
        let (id, path) = host.artifact_begin(kind, name)?;
        Ok(Self {
            host,
            id,
            path,
            open: true,
        })
    }

    /// The staging directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Publishes the files as an artifact and returns its id.
    pub fn commit(mut self, meta: &ArtifactMeta) -> Result<u64, Failure> {
        self.open = false;
        self.host.artifact_commit(self.id, meta)?;
        Ok(self.id)
    }
}

impl Drop for ArtifactDraft<'_> {
    fn drop(&mut self) {
        if self.open {
            self.host.artifact_abort(self.id);
        }
    }
}
