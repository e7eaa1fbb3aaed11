//! `classifier`: trains a small convolutional classifier. Its features measure samples (`evaluate`) and may serve as a
//! perceptual loss (`distill`).

use std::path::Path;
use std::sync::Arc;

use retort_abi::{ArtifactMeta, Host, LogLevel, StageResult};
use retort_checkpoint::{json, regular};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::backend::{Backend, Unary};
use crate::bundle::CONFIG_MOST;
use crate::collective::Single;
use crate::data::{Data, Images};
use crate::error::{Error, Result};
use crate::memory;
use crate::stage::tokenizer::{batch_shape, training_feed};
use crate::stage::{Context, Stage, write_json};
use crate::tape::Variable;
use crate::train::{Decay, Fit, HeldOut, StepOutput, TrainOptions};
use crate::weights::{self, Init, Loader, Params, Source, Weights};

/// Options of `classifier`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Images to learn from.
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
/// How a classifier is trained unless a recipe says otherwise.
pub(crate) fn training() -> TrainOptions {
    TrainOptions {
        steps: 600,
        batch: 64,
        learning_rate: 2e-3,
        warmup: 20,
        decay: Decay::Cosine,
        ..Default::default()
    }
}

/// Shape of a classifier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Channels, height and width of the images.
    pub image: [usize; 3],
    /// Number of features.
    pub features: usize,
    /// Number of classes.
    pub classes: usize,
}

/// A convolution and strided convolutions down to a side of at most 2, a layer of features, a linear classifier.
pub struct Net<B: Backend> {
    convs: Vec<(Variable<B>, Variable<B>)>,
    feature: (Variable<B>, Variable<B>),
    output: (Variable<B>, Variable<B>),
    /// Its shape.
    pub config: Config,
}

impl<B: Backend> Net<B> {
    /// Takes the parameters.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let [channels, mut h, mut w] = config.image;
        let mut convs = Vec::new();
        let (mut input, mut output) = (channels, 32);
        while convs.is_empty() || h.max(w) > 2 {
            if !convs.is_empty() {
                (h, w) = (h.div_ceil(2), w.div_ceil(2));
            }
            let name = format!("conv.{}", convs.len());
            let bound = (6.0 / (9 * input) as f32).sqrt();
            let weight = loader.get(
                &format!("{name}.weight"),
                &[output, input, 3, 3],
                Init::Uniform(bound),
            )?;
            convs.push((
                weight,
                loader.get(&format!("{name}.bias"), &[output], Init::Constant(0.0))?,
            ));
            (input, output) = (output, (output * 2).min(64));
        }
        let mut dense = |name: &str, i: usize, o: usize| -> Result<(Variable<B>, Variable<B>)> {
            let weight = loader.get(
                &format!("{name}.weight"),
                &[o, i],
                Init::Uniform((6.0 / i as f32).sqrt()),
            )?;
            Ok((
                weight,
                loader.get(&format!("{name}.bias"), &[o], Init::Constant(0.0))?,
            ))
        };
        let feature = dense("feature", input * h * w, config.features)?;
        let output = dense("output", config.features, config.classes)?;
        Ok(Self {
            convs,
            feature,
            output,
            config: config.clone(),
        })
    }

    /// Features (b, f) of images (b, c, h, w) in [-1, 1]; differentiable.
    pub fn features(&self, images: &Variable<B>) -> Result<Variable<B>> {
        let maps = self.maps(images)?;
        self.features_of(&maps[maps.len() - 1])
    }

    /// The output of each convolution, (b, c', h', w'), finest first; differentiable.
    pub fn maps(&self, images: &Variable<B>) -> Result<Vec<Variable<B>>> {
        let mut maps: Vec<Variable<B>> = Vec::new();
        for (i, (weight, bias)) in self.convs.iter().enumerate() {
            let stride = if i == 0 { 1 } else { 2 };
            let map = maps
                .last()
                .unwrap_or(images)
                .conv2d_bias(weight, bias, None, stride, [1, 1])?
                .unary(Unary::Silu)?;
            maps.push(map);
        }
        Ok(maps)
    }

    /// Features (b, f) of the last of the maps.
    pub fn features_of(&self, x: &Variable<B>) -> Result<Variable<B>> {
        let s = x.shape();
        let flat = x.reshape(&[s[0], s[1] * s[2] * s[3]])?;
        flat.linear(&self.feature.0, Some(&self.feature.1))?
            .unary(Unary::Silu)
    }

    /// Logits (b, classes) of features (b, f).
    pub fn classify(&self, features: &Variable<B>) -> Result<Variable<B>> {
        features.linear(&self.output.0, Some(&self.output.1))
    }

    /// Features and most probable classes of images (n, c, h, w) in [-1, 1] on the host.
    pub fn measure(&self, backend: &B, images: &[f32]) -> Result<(Vec<f32>, Vec<u32>)> {
        let [c, h, w] = self.config.image;
        let (mut features, mut classes) = (Vec::new(), Vec::new());
        for part in images.chunks(500 * c * h * w) {
            let x = backend.floats(part, &[part.len() / (c * h * w), c, h, w])?;
            let f = self.features(&Variable::constant(x))?;
            classes.extend(B::to_indices(&B::argmax_last(self.classify(&f)?.value())?)?);
            features.extend(B::to_floats(f.value())?);
        }
        Ok((features, classes))
    }

    /// Loads from an artifact, as constants.
    pub fn open(backend: &B, dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = regular::read(&path, CONFIG_MOST).map_err(Error::io(&path))?;
        let config: Config = json::parse(&text).map_err(|e| Error::data(&path, e))?;
        let path = dir.join(MODEL);
        let weights = weights::read(&path)?;
        Self::load(
            &mut Loader::new(
                backend,
                Source::Host(&weights),
                false,
                path.display().to_string(),
            ),
            &config,
        )
    }
}

const MODEL: &str = "model.safetensors";

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
    memory::check_batch("/train/batch", options.batch, memory::floats(&config.image))?;
    let (train, held) = images.split(held_out, seed);
    let mut loader = Loader::new(backend, Source::Init(seed), true, "new classifier");
    let net = Net::load(&mut loader, &config)?;
    let params: Params<B> = loader.into_params();
    let fit = Fit {
        host,
        backend,
        work_dir,
        name: "classifier",
        ranks: &Single,
        options,
        params: &params,
        ema: None,
        kept: None,
        adversary: None,
    };
    let mut feed = training_feed(images, &train, options.batch, seed);
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
            write_json(&dir.join("config.json"), &config)?;
            weights::write(&dir.join(MODEL), &weights)
        })
    }
}
