//! `tokenizer`: trains a VQ image tokenizer, of one scale or many, so that a run needs no downloads.
//!
//! Out: the tokenizer, and `reconstructions.png`: held-out images, and below each row their reconstructions.

pub mod codebook;
pub mod loss;
pub mod quality;
mod training;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::Backend;
use crate::bundle::{self, Bundle, Family, TokenizerConfig};
use crate::context::Context;
use crate::data::feed::Feed;
use crate::data::{Augment, Data, Images};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::autoencoder::Shape;
use crate::model::{msvq, vq};
use crate::perceptual::{Perceptual, PerceptualMetric};
use crate::picture::{self, Pixels};
use crate::random::{Sequence, Stream};
use crate::size::Sides;
use crate::stage::{Stage, batch_memory};
use crate::train::{TrainOptions, check_parts, one_part};
use crate::weights::{CheckpointWeights, Loader, ParameterSource, Weights};
use loss::{Adversarial, PixelLoss};
use quality::{Quality, look};
use training::{Networks, train};

/// Options of `tokenizer`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The family whose tokens it makes: `llamagen`, a map of tokens in raster order, or `var`, the same map scale by
    /// scale.
    #[serde(default)]
    pub family: Family,
    /// Images to learn from.
    #[schemars(extend("x-retort-prepared" = Data::prepared_by()))]
    pub data: Data,
    /// The stage of a tokenizer to start from, or of a published teacher, with its tokenizer; of the same shape.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["tokenizer", "teacher"]))]
    pub from: Option<String>,
    /// Share of each class kept out of training, to measure the reconstruction.
    #[serde(default = "held_out")]
    #[schemars(range(min = 0, max = 0.9))]
    pub held_out: f64,
    /// Codebook size K.
    #[schemars(range(min = 2, max = 65536))]
    pub codebook_size: usize,
    /// Codebook dimension D.
    #[schemars(range(min = 1, max = 256))]
    pub codebook_dim: usize,
    /// Channels of the finest level.
    #[serde(default = "channels")]
    #[schemars(range(min = 1, max = 65536))]
    pub channels: usize,
    /// Multiplier of the channels per level, finest first; each further level halves the sides.
    #[serde(default = "multipliers")]
    #[schemars(length(min = 1, max = 8), inner(range(min = 1, max = 1024)))]
    pub multipliers: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    #[serde(default = "res_blocks")]
    #[schemars(range(min = 1, max = 1024))]
    pub res_blocks: usize,
    /// Groups of the group normalisation; divides the channels of every level.
    #[serde(default = "norm_groups")]
    #[schemars(range(min = 1))]
    pub norm_groups: usize,
    /// LlamaGen: channels between the convolutions and the projection to the codebook's dimension; 32, if left out. VAR
    /// has no such projection.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65536))]
    pub z_channels: Option<usize>,
    /// VAR: sides of its token maps, coarse to fine, as in [1, 2, 4]; the last is the side of the images, halved at every
    /// level but the finest.
    #[serde(default)]
    pub scales: Vec<usize>,
    /// VAR: convolutions that smooth what the scales add, shared by neighbouring scales; 4, or one per scale where there
    /// are fewer, if left out.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub phi_convs: Option<usize>,
    /// How pixels of images and reconstructions are compared.
    #[serde(default)]
    pub pixels: PixelLoss,
    /// The perceptual term: distance between images and reconstructions.
    #[serde(default)]
    pub perceptual: Perceptual,
    /// An adversary in the loss; none, if left out.
    #[serde(default)]
    pub adversarial: Option<Adversarial>,
    /// LlamaGen: an entropy term in the loss, for even use of the codes; none, if left out.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// LlamaGen: decay of the moving averages of vectors per code, which then are the codes. If left out, codes
    /// follow the gradient of their squared distance.
    #[serde(default)]
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub codebook_ema: Option<f64>,
    /// Weight of the commitment loss.
    #[serde(default = "commitment")]
    #[schemars(range(min = 0))]
    pub commitment: f64,
    /// Steps between restarts of codes unused since the last one, in the first half of the training; 0: never.
    #[serde(default = "restart_every")]
    pub restart_every: u64,
    /// Parts of a batch that are computed one after the other: memory holds the activations of one, and their gradients
    /// add up to those of the batch. The entropy term and the adversary's weight are then those of each part.
    #[serde(default = "one_part")]
    #[schemars(range(min = 1))]
    pub accumulate: usize,
    /// Whether activations inside residual and attention blocks are computed again in the backward pass instead of being
    /// kept: memory for about a third more time. The result has the same bits.
    #[serde(default)]
    pub recompute: bool,
    /// How to train.
    #[serde(default)]
    pub train: TrainOptions,
}

/// The entropy term of a tokenizer's loss.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Its weight.
    #[schemars(range(min = 0))]
    pub weight: f64,
    /// Temperature of the choices among codes, in squared distances.
    #[serde(default = "temperature")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

fn temperature() -> f64 {
    0.01
}

impl Options {
    /// The minimum memory per image in a training step: its pixels before and after; in each residual block of encoder and
    /// decoder the inputs of both norms and both convolutions, or only the block's input if the rest is recomputed; and the
    /// attention.
    fn bytes_of_an_image(&self, images: &Images) -> Option<u64> {
        let pixels = memory::floats(&[2, images.channels, images.height, images.width])?;
        let side = |n: usize, level: usize| (n >> level).max(1);
        let coarsest = self.multipliers.len().saturating_sub(1);
        let positions = side(images.height, coarsest).checked_mul(side(images.width, coarsest))?;
        let pixels = pixels.checked_add(batch_memory::attention(positions)?)?;
        let levels = self.multipliers.iter().enumerate();
        levels
            .map(|(level, &multiplier)| {
                let (blocks, width) = (2 * self.res_blocks + 1, self.channels * multiplier);
                let kept = if self.recompute { 1 } else { 4 };
                memory::floats(&[
                    kept,
                    blocks,
                    width,
                    side(images.height, level),
                    side(images.width, level),
                ])
            })
            .try_fold(pixels, |sum, level| sum.checked_add(level?))
    }

    fn phi_convs(&self) -> usize {
        self.phi_convs.unwrap_or(self.scales.len().min(4))
    }

    /// Whether unused codes are restarted after a step.
    fn restarts_after(&self, step: u64) -> bool {
        self.restart_every > 0
            && (step + 1).is_multiple_of(self.restart_every)
            && step < self.train.steps / 2
    }
}

fn held_out() -> f64 {
    0.1
}
fn channels() -> usize {
    32
}
fn multipliers() -> Vec<usize> {
    vec![1, 1]
}
fn res_blocks() -> usize {
    1
}
fn norm_groups() -> usize {
    8
}
fn commitment() -> f64 {
    0.25
}
fn restart_every() -> u64 {
    50
}

/// The stage.
pub struct TokenizerStage;

impl<B: Backend> Stage<B> for TokenizerStage {
    type Options = Options;
    const KIND: &'static str = "tokenizer";
    const OUTPUT: &'static str = "tokenizer";
    const REVISION: u32 = 3;
    const TOGETHER: bool = true;
    const SUMMARY: &'static str = "train a VQ image tokenizer on images";

    fn check(o: &Options, _base_dir: &Path) -> Result<()> {
        o.data
            .check()
            .map_err(|e| Error::option("/data", e.to_string()))?;
        if let Some(m) = o
            .multipliers
            .iter()
            .find(|&&m| m == 0 || !(o.channels * m).is_multiple_of(o.norm_groups))
        {
            let width = o.channels * m;
            let message = format!(
                "{width} channels cannot be divided into {} groups",
                o.norm_groups
            );
            return Err(Error::option("/norm_groups", message));
        }
        check_parts(o.accumulate, o.train.batch)?;
        loss::check(o.adversarial.as_ref(), o.train.steps)?;
        if o.entropy.is_some() && o.codebook_ema.is_some() {
            let message =
                "averaged codes follow no gradient: keep only one of `entropy` and `codebook_ema`";
            return Err(Error::option("/entropy", message));
        }
        let of_llamagen = [
            ("/entropy", o.entropy.is_some()),
            ("/codebook_ema", o.codebook_ema.is_some()),
        ];
        if let (Family::Var, Some((pointer, _))) =
            (o.family, of_llamagen.iter().find(|(_, given)| *given))
        {
            let message = "not for `family: var`: its scales share the codes and smooth them before summing, so no vector can \
                           be attributed to one code";
            return Err(Error::option(*pointer, message));
        }
        match o.family {
            Family::Llamagen if !o.scales.is_empty() => Err(Error::option(
                "/scales",
                "only tokenizers of `family: var` have scales",
            )),
            Family::Llamagen => Ok(()),
            Family::Var if o.z_channels.is_some() => Err(Error::option(
                "/z_channels",
                "tokenizers of `family: var` have the codebook's dimension here: leave it out",
            )),
            Family::Var => {
                msvq::check_scales(&o.scales, "/scales")?;
                msvq::check_sharing(o.scales.len(), o.phi_convs(), "/phi_convs")
            }
        }
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        context.check_share(o.train.batch, o.accumulate)?;
        let inputs = Inputs::open(context, o)?;
        let networks = Networks::load(context, o, &inputs)?;
        let Some(trained) = train(context, o, &inputs, &networks)? else {
            return Ok(StageResult::of_part());
        };
        let quality = measure(context, o, &inputs, &trained)?;
        publish(context, &inputs, &trained, &quality)
    }
}

/// The inputs of a tokenizer's training.
struct Inputs<B: Backend> {
    config: TokenizerConfig,
    images: Arc<Images>,
    /// Training images, and held-out images.
    train: Vec<usize>,
    held: Vec<usize>,
    metric: PerceptualMetric<B>,
    /// The weights to start from.
    from: Option<CheckpointWeights>,
}

impl<B: Backend> Inputs<B> {
    /// Opens them and checks that they match.
    fn open(context: &Context<'_, B>, o: &Options) -> Result<Self> {
        let images = Arc::new(context.images(&o.data)?);
        let config = config(o, &images)?;
        batch_memory::check(
            context,
            "/train/batch",
            o.train.batch.div_ceil(o.accumulate * context.ranks.size()),
            o.bytes_of_an_image(&images),
        )?;
        let (train, held) = images.split(o.held_out, context.job.seed);
        let metric = PerceptualMetric::open(context, &o.perceptual)?;
        metric.check(images.shape())?;
        let from = match &o.from {
            Some(stage) => Some(start_from(context, stage, &config)?),
            None => None,
        };
        Ok(Self {
            config,
            images,
            train,
            held,
            metric,
            from,
        })
    }

    /// The images on which a tokenizer is measured.
    fn measured_on(&self) -> &[usize] {
        match self.held.is_empty() {
            true => &self.train,
            false => &self.held,
        }
    }
}

/// Records and returns the quality of the trained tokenizer.
fn measure<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    inputs: &Inputs<B>,
    trained: &Weights,
) -> Result<Quality> {
    let (host, backend) = (context.host, context.backend);
    let mut loader = Loader::new(backend, ParameterSource::Host(trained), false, "tokenizer");
    let made = inputs.config.build(&mut loader)?;
    let (images, picks) = (&inputs.images, inputs.measured_on());
    let quality = look(backend, &*made, images, picks, o.train.batch)?;
    host.log(LogLevel::Info, &quality.to_string());
    for (name, value) in quality.summary().as_object().into_iter().flatten() {
        if let (Some(value), true) = (value.as_f64(), name != "held_out_error") {
            let name = format!("tokenizer/held_out_{name}");
            host.metric(&name, o.train.steps, value);
        }
    }
    Ok(quality)
}

/// Writes the artifact: the tokenizer, and a picture of its reconstructions.
fn publish<B: Backend>(
    context: &Context<'_, B>,
    inputs: &Inputs<B>,
    trained: &Weights,
    quality: &Quality,
) -> Result<StageResult> {
    let meta = ArtifactMeta {
        preview: Some(PICTURE.into()),
        caption: Some("each row of held-out images, and below it their reconstructions".into()),
        ..ArtifactMeta::default()
    };
    context.finish("tokenizer", meta, quality.summary(), |dir| {
        let [c, h, w] = inputs.images.shape();
        let pixels = Pixels::new(&quality.picture, c, h, w)?;
        picture::write_grid(&dir.join(PICTURE), &[pixels], quality.rows)?;
        bundle::write_tokenizer(dir, &inputs.config, trained)
    })
}
/// The weights of the tokenizer to start from, which must have this shape.
fn start_from<B: Backend>(
    context: &Context<'_, B>,
    stage: &str,
    config: &TokenizerConfig,
) -> Result<CheckpointWeights> {
    let bundle = Bundle::open(context.input_dir(stage)?)?;
    if bundle.config.tokenizer != *config {
        let what = bundle::differences(config, &bundle.config.tokenizer);
        let message = format!("{stage} has a tokenizer of another shape: {what}");
        return Err(Error::option("/from", message));
    }
    bundle.tokenizer_file()
}

const PICTURE: &str = "reconstructions.png";

fn config(o: &Options, images: &Images) -> Result<TokenizerConfig> {
    let factor = 1 << (o.multipliers.len() - 1);
    let sides = Sides {
        height: images.height,
        width: images.width,
    };
    if o.family == Family::Var && sides.height != sides.width {
        let message = format!(
            "images of {sides}: the scales of `family: var` are squares; say `size: {}`, or `family: llamagen`",
            sides.height.max(sides.width)
        );
        return Err(Error::option("/data", message));
    }
    if !sides.is_multiple_of(factor) {
        return Err(Error::option(
            "/multipliers",
            format!(
                "images of {sides}: expected sides that are a multiple of {factor} for {} levels",
                o.multipliers.len()
            ),
        ));
    }
    let autoencoder = Shape {
        image_channels: images.channels,
        image_size: sides,
        channels: o.channels,
        multipliers: o.multipliers.clone(),
        res_blocks: o.res_blocks,
        norm_groups: o.norm_groups,
        z_channels: match o.family {
            Family::Llamagen => o.z_channels.unwrap_or(32),
            Family::Var => o.codebook_dim,
        },
    };
    match o.family {
        Family::Llamagen => Ok(TokenizerConfig::Vq(vq::Config {
            autoencoder,
            vocabulary: o.codebook_size,
            codebook_dim: o.codebook_dim,
            l2_norm: true,
        })),
        Family::Var => {
            let config = msvq::Config {
                autoencoder,
                vocabulary: o.codebook_size,
                scales: o.scales.clone(),
                phi_convs: o.phi_convs(),
            };
            config.check("/scales")?;
            Ok(TokenizerConfig::Msvq(config))
        }
    }
}

/// Images (b, c, h, w) in [-1, 1] on the device.
pub(crate) fn batch<B: Backend>(
    backend: &B,
    images: &Images,
    picks: &[usize],
) -> Result<B::Tensor> {
    backend.floats(&images.gather(picks)?.0, &batch_shape(images, picks.len()))
}

/// Shape of so many images.
pub(crate) fn batch_shape(images: &Images, count: usize) -> [usize; 4] {
    let [c, h, w] = images.shape();
    [count, c, h, w]
}

/// The batches of a training: at each step images drawn from `train` with replacement; returns one share of the batch.
pub(crate) fn training_feed(
    images: &Arc<Images>,
    train: &[usize],
    (batch, share): (usize, Range<usize>),
    seed: u64,
) -> Feed {
    let (train, size) = (train.to_vec(), train.len() as u64);
    let picks = move |step: u64| {
        let mut choice = Sequence::new(seed, Stream::Step, step);
        let all = (0..batch).map(|_| train[choice.below(train.len())]);
        all.skip(share.start).take(share.len()).collect()
    };
    let augment = move |step: u64| Augment {
        seed,
        epoch: step * batch as u64 / size,
    };
    Feed::new(Arc::clone(images), picks, augment)
}
