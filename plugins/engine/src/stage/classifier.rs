//! `classifier`: trains a small convolutional classifier. Its features evaluate samples (`evaluate`) and can be a
//! perceptual loss (`distill`, `tokenizer`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use retort_abi::{ArtifactMeta, Host, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::collective::SingleRank;
use crate::context::Context;
use crate::data::{Data, Images};
use crate::error::{Error, Result};
use crate::files::{machine, make_once, remove, write_json};
use crate::memory;
use crate::model::classifier::{Config, MODEL, Net};
use crate::stage::Stage;
use crate::stage::tokenizer::{batch_shape, training_feed};
use crate::tape::Variable;
use crate::train::{Decay, HeldOut, StepOutput, TrainOptions, TrainingLoop};
use crate::weights::{self, Loader, ParameterSource, Params, Weights};

/// Options of `classifier`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Images to learn from.
    #[schemars(extend("x-retort-prepared" = Data::prepared_by()))]
    pub data: Data,
    /// Share of each class kept out of training, to measure the accuracy.
    #[serde(default = "held_out")]
    #[schemars(range(min = 0, max = 0.9))]
    pub held_out: f64,
    /// Number of features.
    #[serde(default = "features")]
    #[schemars(range(min = 2, max = 65536))]
    pub features: usize,
    /// How to train.
    #[serde(default = "training")]
    pub train: TrainOptions,
}

fn held_out() -> f64 {
    0.1
}
fn features() -> usize {
    64
}
/// Default training of a classifier.
fn training() -> TrainOptions {
    TrainOptions {
        steps: 600,
        batch: 64,
        learning_rate: 2e-3,
        warmup: 20,
        decay: Decay::Cosine,
        ..Default::default()
    }
}

/// Trains a classifier and returns it with its held-out accuracy.
pub fn train<B: Backend>(
    (host, backend, seed): (&dyn Host, &B, u64),
    work_dir: Option<&Path>,
    images: &Arc<Images>,
    (held_out, features): (f64, usize),
    options: &TrainOptions,
) -> Result<(Config, Weights, f64)> {
    let config = Config {
        image: images.shape(),
        features,
        classes: images.classes,
    };
    memory::check_batch(
        "/train/batch",
        options.batch,
        memory::floats(&config.image),
        memory::free_for(backend),
    )?;
    let (train, held) = images.split(held_out, seed);
    let mut loader = Loader::new(backend, ParameterSource::Init(seed), true, "new classifier");
    let net = Net::load(&mut loader, &config)?;
    let params: Params<B> = loader.into_params();
    let fit = TrainingLoop {
        host,
        backend,
        work_dir,
        name: "classifier",
        ranks: &SingleRank,
        options,
        params: &params,
        ema: None,
        kept: None,
        adversary: None,
    };
    let mut feed = training_feed(images, &train, (options.batch, 0..options.batch), seed);
    let step = |step: u64| {
        let seen = feed.take(step)?;
        let x = backend.floats(&seen.pixels, &batch_shape(images, options.batch))?;
        let features = net.features(&Variable::constant(x))?;
        let loss = net
            .classify(&features)?
            .cross_entropy(&backend.indices(&seen.labels, &[options.batch])?)?;
        Ok(StepOutput::new(loss, vec![feed.wait()]))
    };
    let measured_on = if held.is_empty() { &train } else { &held };
    let mut measure = || {
        let mut wrong = 0;
        for picks in measured_on.chunks(options.batch) {
            let (pixels, labels) = images.gather(picks)?;
            let (_, classes) = net.measure(backend, &pixels)?;
            wrong += classes.iter().zip(&labels).filter(|(a, b)| a != b).count();
        }
        Ok(wrong as f64 / measured_on.len() as f64)
    };
    let every = (options.steps / 10).max(1);
    let held_out = HeldOut {
        every,
        name: "held_out_error",
        measure: &mut measure,
        keep_best: false,
    };
    let weights = fit.run(step, Some(held_out))?;
    let accuracy = 1.0 - measure()?;
    host.log(
        LogLevel::Info,
        &format!(
            "classifier: {:.2} % of held-out images right",
            100.0 * accuracy
        ),
    );
    Ok((config, weights, accuracy))
}

/// Features of the classifier that is trained for figures if none is given.
pub const FEATURES_FOR_FIGURES: usize = 64;

/// Trains a classifier for figures.
pub fn train_for_figures<B: Backend>(
    context: &Context<'_, B>,
    work_dir: &Path,
    images: &Arc<Images>,
) -> Result<(Config, Weights)> {
    let with = (context.host, context.backend, context.job.seed);
    let shape = (0.1, FEATURES_FOR_FIGURES);
    let (config, weights, _) = train(with, Some(work_dir), images, shape, &training())?;
    Ok((config, weights))
}

/// The folder of that classifier, shared by a stage's parts: the first of them on this machine trains it. The worker of the
/// whole uses it if it exists.
pub fn trained_for_parts<B: Backend>(
    context: &Context<'_, B>,
    images: &Arc<Images>,
) -> Result<Option<PathBuf>> {
    let Some(work) = &context.job.work_dir else {
        return Ok(None);
    };
    let folder = work.join("classifier");
    if context.job.part.is_some() && !folder.exists() {
        let lock = context.lock("classifier")?;
        if !folder.exists() {
            // Its checkpoints, separate for each machine.
            let own = work.join(format!("classifier.{}", machine()));
            std::fs::create_dir_all(&own).map_err(Error::io(&own))?;
            let (config, weights) = train_for_figures(context, &own, images)?;
            make_once(&folder, &lock, |partial| {
                std::fs::create_dir(partial).map_err(Error::io(partial))?;
                write(partial, &config, &weights)
            })?;
            remove(&own)?;
        }
    }
    Ok(folder.exists().then_some(folder))
}

fn write(dir: &Path, config: &Config, weights: &Weights) -> Result<()> {
    write_json(&dir.join("config.json"), config)?;
    weights::write(&dir.join(MODEL), weights)
}

/// The stage.
pub struct Classifier;

impl<B: Backend> Stage<B> for Classifier {
    type Options = Options;
    const KIND: &'static str = "classifier";
    const OUTPUT: &'static str = "classifier";
    const REVISION: u32 = 1;
    const SUMMARY: &'static str = "train a small classifier whose features measure samples";

    fn check(o: &Options, _: &Path) -> Result<()> {
        o.data
            .check()
            .map_err(|e| Error::option("/data", e.to_string()))
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let images = Arc::new(context.images(&o.data)?);
        if images.classes == 1 {
            let message = "all images are of one class: the features of such a classifier cannot tell images apart";
            context.host.log(LogLevel::Warn, message);
        }
        let with = (context.host, context.backend, context.job.seed);
        let (config, weights, accuracy) = train(
            with,
            Some(context.work_dir()?),
            &images,
            (o.held_out, o.features),
            &o.train,
        )?;
        let summary = json!({ "held_out_accuracy": accuracy });
        context.finish("classifier", ArtifactMeta::default(), summary, |dir| {
            write(dir, &config, &weights)
        })
    }
}
