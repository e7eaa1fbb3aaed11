//! What can be timed: columns of the table. A backend runs phases on its tensors, and stages as its plugin does.

use retort_engine::backend::Backend;
use retort_engine::collective::SingleRank;
use retort_engine::context::Context;
use retort_engine::error::{Error, Result};
use retort_engine::model::classifier::{Config, Net};
use retort_engine::samples::Samples;
use retort_engine::weights::{Loader, ParameterSource};

use super::clock::least;
use super::loader;
use super::phases::BackendRun;
use super::ratio::Side;
use super::reference::{Drawn, Phase, Reference};
use super::stage_clock::{StageClock, run, shortest, steps};
use super::stage_row::{FEATURES, RowFiles, SAMPLED, StageRow, Task};

/// An implementation that can be timed.
pub trait Timed {
    /// The head of its column.
    fn name(&self) -> &str;
    /// What it is.
    fn side(&self) -> Side;
    /// Seconds of a reference's phases, in order, each the least of several repetitions; None if it cannot run.
    fn times(
        &mut self,
        reference: &Reference,
        drawn: &Drawn,
        phases: &[Phase],
    ) -> Result<Vec<Option<f64>>>;
    /// Seconds of a stage's row, the least of several repetitions; None if it cannot run.
    fn stage_seconds(&mut self, row: &StageRow, files: &RowFiles) -> Result<Option<f64>>;
}

impl<B: Backend> Timed for BackendRun<B> {
    fn name(&self) -> &str {
        &self.name
    }

    fn side(&self) -> Side {
        Side::Plugin
    }

    fn times(
        &mut self,
        r: &Reference,
        drawn: &Drawn,
        phases: &[Phase],
    ) -> Result<Vec<Option<f64>>> {
        let seconds = self.phases(r, drawn, phases)?;
        Ok(seconds.into_iter().map(Some).collect())
    }

    fn stage_seconds(&mut self, row: &StageRow, files: &RowFiles) -> Result<Option<f64>> {
        let backend = &self.backend;
        let seconds = match row.task {
            Task::Step => {
                let clock = StageClock::measuring(files.dir.path());
                shortest(&steps(backend, &files.job, &clock)?)
            }
            Task::Load => {
                let job = files.without_work();
                least(|| {
                    let host = StageClock::to_the_end(files.dir.path());
                    loader::read(&Context {
                        host: &host,
                        job: &job,
                        backend,
                        ranks: &SingleRank,
                    })
                })?
            }
            Task::Sample => {
                let [channels, height, width] = row.networks.tokenizer.image();
                let config = Config {
                    image: [channels, height, width],
                    features: FEATURES,
                    classes: row.networks.network.classes().unwrap_or(1),
                };
                let mut drawn = Loader::new(backend, ParameterSource::Init(1), false, "drawn");
                let net = Net::load(&mut drawn, &config)?;
                least(|| sample(backend, &net, files))?
            }
        };
        Ok(Some(seconds))
    }
}

/// Samples images with the stage, and measures features of those that it has written.
fn sample<B: Backend>(backend: &B, net: &Net<B>, files: &RowFiles) -> Result<()> {
    // Shards in a work directory would be used again.
    let (job, place) = files.with_new_work()?;
    let clock = StageClock::to_the_end(place.path());
    run(backend, &job, &clock)?;
    let mut images = Samples::open(&clock.artifact())?.images(0, SAMPLED)?;
    images.iter_mut().for_each(|x| *x = 2.0 * *x - 1.0);
    let (features, _) = net.measure(backend, &images)?;
    match features.len() == SAMPLED * FEATURES {
        true => Ok(()),
        false => Err(Error::Internal(format!("{} features", features.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::stage_row::{digits, sampling};
    use super::*;
    use retort_candle::Candle;

    #[test]
    fn samples_are_made_and_measured() {
        let row = sampling(digits(2, 500));
        let files = row.files().expect("files");
        let mut run = BackendRun {
            name: "candle".into(),
            backend: Candle::open("cpu", "f32", 2).expect("a CPU"),
        };
        let seconds = run.stage_seconds(&row, &files).expect("seconds");
        assert!(seconds.expect("a time") > 0.0);
    }
}
