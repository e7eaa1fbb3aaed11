//! Running a stage in this process, as its plugin does, with a clock for its steps.
//!
//! A training reports each step to its host, so the time between two reports is a step: the stage's own loss, optimiser,
//! averages and data. The clock stops the stage when it has seen enough.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use retort_abi::{
    ArtifactMeta, Cancel, Failure, FailureCode, Host, LogLevel, StageJob, StageResult,
};
use retort_engine::backend::Backend;
use retort_engine::collective::SingleRank;
use retort_engine::context::Context;
use retort_engine::error::{Error, Result};
use retort_engine::stage;

/// The host of a stage: notes when its steps end, and keeps its artifacts in a folder.
pub(super) struct StageClock<'a> {
    /// The folder.
    dir: &'a Path,
    ends: Mutex<Vec<Instant>>,
    /// Called after each step with the number of steps so far.
    between: &'a (dyn Fn(usize) + Sync),
    /// Whether these seconds of steps suffice.
    suffices: &'a (dyn Fn(&[f64]) -> bool + Sync),
}

impl<'a> StageClock<'a> {
    /// A clock that lets a stage run to its end; its artifact gets the name `artifact` in this folder.
    pub(super) fn to_the_end(dir: &'a Path) -> Self {
        Self::new(dir, &unobserved, &never)
    }

    /// A clock that stops a training when its shortest step is known well enough.
    pub(super) fn measuring(dir: &'a Path) -> Self {
        Self::new(dir, &unobserved, &enough)
    }

    /// A clock that stops a training when the seconds of its steps suffice.
    pub(super) fn new(
        dir: &'a Path,
        between: &'a (dyn Fn(usize) + Sync),
        suffices: &'a (dyn Fn(&[f64]) -> bool + Sync),
    ) -> Self {
        Self {
            dir,
            ends: Mutex::default(),
            between,
            suffices,
        }
    }

    /// The folder of the artifact.
    pub(super) fn artifact(&self) -> PathBuf {
        self.dir.join("artifact")
    }

    /// Seconds of all steps but the first, in order.
    fn seconds(&self) -> Vec<f64> {
        let ends = self.ends.lock().expect("no panic");
        ends.windows(2)
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect()
    }
}

impl Host for StageClock<'_> {
    fn log(&self, level: LogLevel, message: &str) {
        if level <= LogLevel::Warn {
            eprintln!("{message}");
        }
    }
    fn metric(&self, _: &str, _: u64, _: f64) {}
    fn progress(&self, done: u64, _: u64, unit: &str) {
        if unit == "steps" {
            (self.between)(done as usize);
            self.ends.lock().expect("no panic").push(Instant::now());
        }
    }
    fn cancelled(&self) -> Cancel {
        match (self.suffices)(&self.seconds()) {
            true => Cancel::Now,
            false => Cancel::Run,
        }
    }
    fn artifact_begin(&self, _: &str, _: &str) -> Result<(u64, PathBuf), Failure> {
        let path = self.artifact();
        std::fs::create_dir(&path)
            .map_err(|e| Failure::new(FailureCode::Internal, format!("{}: {e}", path.display())))?;
        Ok((0, path))
    }
    fn artifact_commit(&self, _: u64, _: &ArtifactMeta) -> Result<(), Failure> {
        Ok(())
    }
    fn artifact_abort(&self, _: u64) {
        std::fs::remove_dir_all(self.artifact()).ok();
    }
}

fn unobserved(_: usize) {}

fn never(_: &[f64]) -> bool {
    false
}

/// Runs a stage.
pub(super) fn run<B: Backend>(backend: &B, job: &StageJob, host: &dyn Host) -> Result<StageResult> {
    let missing = || Error::Internal(format!("no stage kind {}", job.kind));
    let kind = stage::all::<B>()
        .into_iter()
        .find(|kind| (kind.describe)().kind == job.kind)
        .ok_or_else(missing)?;
    let context = Context {
        host,
        job,
        backend,
        ranks: &SingleRank,
    };
    // In the pool, as in a worker.
    rayon::scope(|_| (kind.run)(&context))
}

/// Seconds of the steps of a stage that trains, without the first.
pub(super) fn steps<B: Backend>(
    backend: &B,
    job: &StageJob,
    clock: &StageClock<'_>,
) -> Result<Vec<f64>> {
    match run(backend, job, clock) {
        Err(Error::Cancelled) => Ok(clock.seconds()),
        Err(error) => Err(error),
        Ok(_) => Err(Error::Internal(format!(
            "{} ended before it was measured",
            job.stage
        ))),
    }
}

/// Whether steps of these seconds suffice: five that take three seconds, or fewer if they are slow.
fn enough(seconds: &[f64]) -> bool {
    let total: f64 = seconds.iter().sum();
    (seconds.len() >= 5 && total >= 3.0) || (seconds.len() >= 2 && total >= 20.0)
}

/// The shortest.
pub(super) fn shortest(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}
