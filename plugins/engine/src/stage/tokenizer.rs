//! `tokenizer`: trains a VQ image tokenizer, of one scale or many, so that a run needs nothing downloaded.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, Unary};
use crate::bundle::{self, Family, TokenizerConfig};
use crate::data::feed::Feed;
use crate::data::{Augment, Data, Images};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::autoencoder::Shape;
use crate::model::{CODEBOOK, msvq, vq};
use crate::random::{Sequence, Stream};
use crate::stage::{Context, Stage, room};
use crate::tape::Var;
use crate::train::{Fit, HeldOut, Mean, StepOutput, TrainOptions, average, scalar, shared};
use crate::weights::{Loader, Source};

/// Options of `tokenizer`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The family whose tokens it makes: `llamagen`, a map of tokens in raster order, or `var`, the same map scale by
    /// scale.
    #[serde(default)]
    pub family: Family,
    /// Images to learn from.
    pub data: Data,
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
    /// Weight of the commitment loss.
    #[serde(default = "commitment")]
    #[schemars(range(min = 0))]
    pub commitment: f64,
    /// Steps between restarts of codes that no image used since the last one; 0: never.
    #[serde(default = "restart_every")]
    pub restart_every: u64,
    /// How to train.
    #[serde(default)]
    pub train: TrainOptions,
}

impl Options {
    /// What a step of training holds of an image at least: its pixels, before and after, and in each residual block of
    /// encoder and decoder the input of both norms and both convolutions.
    fn bytes_of_an_image(&self, images: &Images) -> Option<u64> {
        let pixels = memory::floats(&[2, images.channels, images.height, images.width])?;
        let levels = self.multipliers.iter().enumerate();
        levels
            .map(|(level, &multiplier)| {
                let side = |n: usize| (n >> level).max(1);
                let (blocks, width) = (2 * self.res_blocks + 1, self.channels * multiplier);
                memory::floats(&[4, blocks, width, side(images.height), side(images.width)])
            })
            .try_fold(pixels, |sum, level| sum.checked_add(level?))
    }

    fn phi_convs(&self) -> usize {
        self.phi_convs.unwrap_or(self.scales.len().min(4))
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
pub struct Tokenizer;

impl<B: Backend> Stage<B> for Tokenizer {
    type Options = Options;
    const KIND: &'static str = "tokenizer";
    const OUTPUT: &'static str = "tokenizer";
    const REVISION: u32 = 2;
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
        let (backend, seed) = (context.backend, context.job.seed);
        let images = Arc::new(context.images(&o.data)?);
        let config = config(o, &images)?;
        room::check(
            context,
            "/train/batch",
            o.train.batch,
            o.bytes_of_an_image(&images),
        )?;
        let (train, held) = images.split(o.held_out, seed);
        let mut loader = Loader::new(backend, Source::Init(seed), true, "new tokenizer");
        let model = config.build(&mut loader)?;
        let params = loader.into_params();
        let codebook = params
            .iter()
            .find(|(name, _)| name == CODEBOOK)
            .map(|(_, p)| p.clone());
        let codebook = codebook.ok_or_else(|| Error::Internal("no codebook".into()))?;

        let average = average(backend, &o.train, &params)?;
        let shared = shared(&params, average.as_ref());
        let source = Source::Device(&shared);
        let measured = config.build(&mut Loader::new(backend, source, false, "tokenizer"))?;
        // Codes that were used since the last restart: 1.
        let used = RefCell::new(vec![0.0; o.codebook_size]);
        let fit = Fit {
            host: context.host,
            backend,
            work_dir: Some(context.work_dir()?),
            name: "tokenizer",
            options: &o.train,
            params: &params,
            ema: average.as_ref(),
            kept: Some(&used),
        };
        let mut feed = training_feed(&images, &train, o.train.batch, seed);
        let step = |step: u64| {
            let seen = feed.take(step)?;
            let x = backend.floats(&seen.pixels, &batch_shape(&images, o.train.batch))?;
            let r = model.reconstruct(&x)?;
            let error = r
                .images
                .sub(&Var::constant(x))?
                .unary(Unary::Square)?
                .mean_all()?;
            let figures = vec![("reconstruction", scalar::<B>(error.value())?), feed.wait()];
            let loss = error
                .add(&r.codebook_loss)?
                .add(&r.commitment_loss.affine(o.commitment, 0.0)?)?;
            let mut used = used.borrow_mut();
            for id in B::to_indices(&r.tokens)? {
                used[id as usize] = 1.0;
            }
            if o.restart_every > 0
                && (step + 1).is_multiple_of(o.restart_every)
                && step < o.train.steps / 2
            {
                restart::<B>(codebook.value(), r.z.value(), &used, seed, step)?;
                used.fill(0.0);
            }
            Ok(StepOutput { loss, figures })
        };
        let measured_on = if held.is_empty() { &train } else { &held };
        let mut measure = || {
            let mut errors = Mean::default();
            // What a step of training takes, whatever the number of images.
            for picks in measured_on.chunks(o.train.batch) {
                let x = batch(backend, &images, picks)?;
                let r = measured.reconstruct(&x)?;
                let error = r.images.sub(&Var::constant(x))?.unary(Unary::Square)?;
                errors.add(&B::to_floats(error.value())?);
            }
            Ok(errors.value())
        };
        let every = (o.train.steps / 10).max(1);
        let held_out = HeldOut {
            every,
            name: "held_out_error",
            measure: &mut measure,
            keep_best: false,
        };
        let weights = fit.run(step, Some(held_out))?;
        let error = measure()?;
        context.host.log(
            LogLevel::Info,
            &format!("mean squared error of held-out images in [-1, 1]: {error:.5}"),
        );
        let summary = json!({ "held_out_error": error });
        context.finish("tokenizer", ArtifactMeta::default(), summary, |dir| {
            bundle::write_tokenizer(dir, &config, &weights)
        })
    }
}

fn config(o: &Options, images: &Images) -> Result<TokenizerConfig> {
    let (size, factor) = (images.height, 1 << (o.multipliers.len() - 1));
    if images.width != size {
        let message = format!(
            "images of {} x {}: these networks take squares; say `size: {}`",
            images.height,
            images.width,
            images.height.max(images.width)
        );
        return Err(Error::option("/data", message));
    }
    if !size.is_multiple_of(factor) {
        return Err(Error::option(
            "/multipliers",
            format!(
                "images of {} x {}: expected sides that are a multiple of {factor} for {} levels",
                images.height,
                images.width,
                o.multipliers.len()
            ),
        ));
    }
    let autoencoder = Shape {
        image_channels: images.channels,
        image_size: size,
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

/// The batches of a training: at each step images drawn from `train`, with every draw anew.
pub(crate) fn training_feed(
    images: &Arc<Images>,
    train: &[usize],
    batch: usize,
    seed: u64,
) -> Feed {
    let (train, size) = (train.to_vec(), train.len() as u64);
    let picks = move |step: u64| {
        let mut choice = Sequence::new(seed, Stream::Step, step);
        (0..batch)
            .map(|_| train[choice.below(train.len())])
            .collect()
    };
    let augment = move |step: u64| Augment {
        seed,
        epoch: step * batch as u64 / size,
    };
    Feed::new(Arc::clone(images), picks, augment)
}

/// Moves codes that were not used onto random vectors (n, D) of those for which codes were looked up.
fn restart<B: Backend>(
    codebook: &B::Tensor,
    z: &B::Tensor,
    used: &[f32],
    seed: u64,
    step: u64,
) -> Result<()> {
    if used.iter().all(|&u| u > 0.0) {
        return Ok(());
    }
    let d = B::shape(codebook)[1];
    let (mut codes, z) = (B::to_floats(codebook)?, B::to_floats(z)?);
    let mut choice = Sequence::new(seed, Stream::Restart, step);
    for (code, _) in codes
        .chunks_exact_mut(d)
        .zip(used)
        .filter(|(_, used)| **used == 0.0)
    {
        let row = choice.below(z.len() / d);
        code.copy_from_slice(&z[row * d..(row + 1) * d]);
    }
    B::assign_(
        codebook,
        &B::floats_beside(codebook, &codes, &B::shape(codebook))?,
    )
}
