//! `tokenizer`: trains a VQ image tokenizer, of one scale or many, so that a run needs nothing downloaded.
//!
//! Out: the tokenizer, and `reconstructions.png`: held-out images, and below each row what the tokenizer makes of them.

pub mod codebook;
pub mod loss;
pub mod quality;

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, Unary};
use crate::bundle::{self, Bundle, Family, TokenizerConfig};
use crate::collective::Single;
use crate::context::Context;
use crate::data::feed::Feed;
use crate::data::{Augment, Data, Images};
use crate::error::{Error, Result};
use crate::memory;
use crate::model::autoencoder::Shape;
use crate::model::{CODEBOOK, Reconstruction, Tokenizer as Model, discriminator, msvq, vq};
use crate::perceptual::{Eye, PIXELS_AT_ONCE, Perceptual};
use crate::picture::{self, Pixels};
use crate::random::{Sequence, Stream};
use crate::stage::{Stage, room};
use crate::tape::{Variable, scalar};
use crate::train::{self, Fit, HeldOut, Mean, StepOutput, TrainOptions, average, shared};
use crate::weights::{self, Loader, Source, Stored};
use codebook::{COLLAPSED, Codebook};
use loss::{Adversarial, Adversary, Criterion, PixelLoss};

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
    /// The stage of a tokenizer to go on from, or of a published teacher, with its tokenizer; of the same shape.
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
    /// LlamaGen: decay of moving averages of what each code is looked up for, which then are the codes. If left out, codes
    /// follow the gradient of their squared distance.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1))]
    pub codebook_ema: Option<f64>,
    /// Weight of the commitment loss.
    #[serde(default = "commitment")]
    #[schemars(range(min = 0))]
    pub commitment: f64,
    /// Steps between restarts of codes that no image used since the last one, in the first half of the training; 0: never.
    #[serde(default = "restart_every")]
    pub restart_every: u64,
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
    /// What a step of training holds of an image at least: its pixels, before and after, in each residual block of encoder
    /// and decoder the input of both norms and both convolutions, and the attention between these.
    fn bytes_of_an_image(&self, images: &Images) -> Option<u64> {
        let pixels = memory::floats(&[2, images.channels, images.height, images.width])?;
        let side = |n: usize, level: usize| (n >> level).max(1);
        let coarsest = self.multipliers.len().saturating_sub(1);
        let positions = side(images.height, coarsest).checked_mul(side(images.width, coarsest))?;
        let pixels = pixels.checked_add(room::attention(positions)?)?;
        let levels = self.multipliers.iter().enumerate();
        levels
            .map(|(level, &multiplier)| {
                let (blocks, width) = (2 * self.res_blocks + 1, self.channels * multiplier);
                memory::floats(&[
                    4,
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
    const REVISION: u32 = 3;
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
        loss::check(o.adversarial.as_ref(), o.train.steps)?;
        if o.entropy.is_some() && o.codebook_ema.is_some() {
            let message = "codes that are averages follow no gradient: keep one of `entropy` and `codebook_ema`";
            return Err(Error::option("/entropy", message));
        }
        let of_llamagen = [
            ("/entropy", o.entropy.is_some()),
            ("/codebook_ema", o.codebook_ema.is_some()),
        ];
        if let (Family::Var, Some((pointer, _))) =
            (o.family, of_llamagen.iter().find(|(_, given)| *given))
        {
            let message = "not for `family: var`: its scales share the codes and smooth them before they add up, so that no \
                           code can be told from what it was looked up for";
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
        let eye = Eye::open(context, &o.perceptual)?;
        eye.check(images.shape())?;
        let from = match &o.from {
            Some(stage) => Some(start_from(context, stage, &config)?),
            None => None,
        };
        let start = match &from {
            Some(file) => Source::Files(std::slice::from_ref(file)),
            None => Source::Init(seed),
        };
        let origin = o.from.as_deref().unwrap_or("new tokenizer");
        let mut loader = Loader::new(backend, start, true, origin);
        let model = config.build(&mut loader)?;
        let all = loader.into_params();
        let codebook = all.iter().find(|(name, _)| name == CODEBOOK);
        let codebook = codebook.ok_or_else(|| Error::Internal("no codebook".into()))?;
        let codebook = codebook.1.value().clone();
        let codebook = Codebook::new(backend, &codebook, o.codebook_ema)?;
        // Codes that are averages are no parameters.
        let averaged = |name: &str| o.codebook_ema.is_some() && name == CODEBOOK;
        let (still, own): (Vec<_>, Vec<_>) = all.into_iter().partition(|(name, _)| averaged(name));

        let average = average(backend, &o.train, &own)?;
        let mut tensors = shared(&own, average.as_ref());
        tensors.extend(shared(&still, None));
        let source = Source::Device(&tensors);
        let measured = config.build(&mut Loader::new(backend, source, false, "tokenizer"))?;

        let mut params = own;
        let against = o.adversarial.as_ref().map(|own| own.training(&o.train));
        let mut criterion = Criterion {
            pixels: o.pixels,
            eye: (o.perceptual.weight() > 0.0).then_some((eye, o.perceptual.weight())),
            adversary: None,
            at_once: (PIXELS_AT_ONCE / (images.height * images.width)).max(1),
        };
        if let Some(own) = &o.adversarial {
            let side = images.height.min(images.width);
            discriminator::check(side, own.layers, "/adversarial/layers")?;
            let (adversary, its) = Adversary::new(backend, seed, images.channels, own)?;
            criterion.adversary = Some(adversary);
            params.extend(its);
        }
        let fit = Fit {
            host: context.host,
            backend,
            work_dir: Some(context.work_dir()?),
            name: "tokenizer",
            ranks: &Single,
            options: &o.train,
            params: &params,
            ema: average.as_ref(),
            kept: Some(&codebook.kept),
            adversary: o
                .adversarial
                .as_ref()
                .zip(against.as_ref())
                .map(|(own, options)| train::Adversary {
                    prefix: loss::PREFIX,
                    options,
                    from: own.start,
                }),
        };
        let mut feed = training_feed(&images, &train, o.train.batch, seed);
        let step = |step: u64| {
            let seen = feed.take(step)?;
            codebook.settle()?;
            let x = backend.floats(&seen.pixels, &batch_shape(&images, o.train.batch))?;
            let Reconstruction {
                images: made,
                z,
                codebook_loss,
                commitment_loss,
                tokens,
                codes,
                last,
            } = model.reconstruct(&x)?;
            let looked_up = z.value().clone();
            let (mut loss, mut figures) = criterion.loss(made, &x, &last, step)?;
            if o.codebook_ema.is_none() {
                loss = loss.add(&codebook_loss)?;
            }
            loss = loss.add(&commitment_loss.affine(o.commitment, 0.0)?)?;
            if let (
                Some(Entropy {
                    weight,
                    temperature,
                }),
                Some(codes),
            ) = (o.entropy, codes)
            {
                let term = loss::entropy(&z, &codes, temperature)?;
                figures.push(("entropy", scalar::<B>(term.value())?));
                loss = loss.add(&term.affine(weight, 0.0)?)?;
            }
            codebook.note(&B::to_indices(&tokens)?, &looked_up)?;
            let (used, perplexity) = codebook.use_lately();
            figures.extend([("codebook_usage", used), ("perplexity", perplexity)]);
            figures.push(feed.wait());
            let mut output = StepOutput::new(loss, figures);
            if o.restart_every > 0
                && (step + 1).is_multiple_of(o.restart_every)
                && step < o.train.steps / 2
            {
                let anew = codebook.restart(&looked_up, seed, step)?;
                if !anew.is_empty() && o.codebook_ema.is_none() {
                    output.anew = Some((CODEBOOK, anew));
                }
            }
            Ok(output)
        };
        let measured_on = if held.is_empty() { &train } else { &held };
        let warned = Cell::new(false);
        let mut measure = || {
            let mut errors = Mean::default();
            // What a step of training takes, whatever the number of images.
            for picks in measured_on.chunks(o.train.batch) {
                let x = batch(backend, &images, picks)?;
                let r = measured.reconstruct(&x)?;
                let error = r.images.sub(&Variable::constant(x))?.unary(Unary::Square)?;
                errors.add(&B::to_floats(error.value())?);
            }
            let (used, perplexity) = codebook.use_lately();
            if used < COLLAPSED && !warned.replace(true) {
                let message = format!(
                    "{:.0} of {} codes are in use (perplexity {perplexity:.1}): the codebook has collapsed; try another \
                     seed, a lower learning rate, `restart_every` or fewer codes",
                    used * o.codebook_size as f64,
                    o.codebook_size
                );
                context.host.log(LogLevel::Warn, &message);
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
        let mut trained = fit.run(step, Some(held_out))?;
        codebook.settle()?;
        trained.extend(weights::from_params(&still)?);
        let source = Source::Host(&trained);
        let made = config.build(&mut Loader::new(backend, source, false, "tokenizer"))?;
        let quality = look(backend, &*made, &images, measured_on, o.train.batch)?;
        context.host.log(LogLevel::Info, &quality.to_string());
        let summary = json!({
            "held_out_error": quality.error,
            "psnr": quality.psnr,
            "ssim": quality.ssim,
            "codebook_usage": quality.usage,
            "perplexity": quality.perplexity,
        });
        for (name, value) in summary.as_object().into_iter().flatten() {
            if let (Some(value), true) = (value.as_f64(), name != "held_out_error") {
                let name = format!("tokenizer/held_out_{name}");
                context.host.metric(&name, o.train.steps, value);
            }
        }
        let meta = ArtifactMeta {
            preview: Some(PICTURE.into()),
            caption: Some("each row of held-out images, and below it their reconstructions".into()),
            ..ArtifactMeta::default()
        };
        context.finish("tokenizer", meta, summary, |dir| {
            let [c, h, w] = images.shape();
            let pixels = Pixels::new(&quality.picture, c, h, w)?;
            picture::write_grid(&dir.join(PICTURE), &[pixels], quality.rows)?;
            bundle::write_tokenizer(dir, &config, &trained)
        })
    }
}

/// The weights of the tokenizer to go on from, if it has this shape.
fn start_from<B: Backend>(
    context: &Context<'_, B>,
    stage: &str,
    config: &TokenizerConfig,
) -> Result<Stored> {
    let bundle = Bundle::open(context.input_dir(stage)?)?;
    if bundle.config.tokenizer != *config {
        let what = bundle::differences(config, &bundle.config.tokenizer);
        let message = format!("{stage} has a tokenizer of another shape: {what}");
        return Err(Error::option("/from", message));
    }
    bundle.tokenizer_file()
}

const PICTURE: &str = "reconstructions.png";
/// Images of the picture, and how many of them make a row.
const SHOWN: usize = 48;
const ROW: usize = 16;

/// How good a tokenizer is.
struct Quality {
    /// Mean squared error in [-1, 1].
    error: f64,
    psnr: f64,
    ssim: f64,
    /// Share of the codes that these images use, and their perplexity.
    usage: f64,
    perplexity: f64,
    /// Rows of images in [0, 1], each followed by a row of their reconstructions.
    picture: Vec<f32>,
    rows: usize,
}

impl std::fmt::Display for Quality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "held-out images: mean squared error {:.5} in [-1, 1], PSNR {:.2} dB, SSIM {:.4}; {:.1} % of the codes, \
             perplexity {:.1}",
            self.error,
            self.psnr,
            self.ssim,
            100.0 * self.usage,
            self.perplexity
        )
    }
}

/// Looks at images and what a tokenizer makes of them, so many at a time.
fn look<B: Backend>(
    backend: &B,
    model: &dyn Model<B>,
    images: &Images,
    picks: &[usize],
    at_once: usize,
) -> Result<Quality> {
    let stride = images.stride();
    let shown: Vec<usize> = match picks.len() {
        n if n <= SHOWN => (0..n).collect(),
        n => (0..SHOWN).map(|i| i * n / SHOWN).collect(),
    };
    let mut uses = vec![0usize; B::shape(&model.codebook()?)[0]];
    let (mut errors, mut psnr, mut ssim) = (Mean::default(), 0.0, 0.0);
    let (mut above, mut below) = (Vec::new(), Vec::new());
    for (number, part) in picks.chunks(at_once).enumerate() {
        let pixels = images.gather(part)?.0;
        let r = model.reconstruct(&backend.floats(&pixels, &batch_shape(images, part.len()))?)?;
        let made = B::to_floats(r.images.value())?;
        for token in B::to_indices(&r.tokens)? {
            uses[token as usize] += 1;
        }
        let pairs = pixels.chunks_exact(stride).zip(made.chunks_exact(stride));
        for (i, (a, b)) in pairs.enumerate() {
            let squares: Vec<f32> = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).collect();
            errors.add(&squares);
            psnr += quality::psnr(a, b);
            ssim += quality::ssim(a, b, images.shape());
            if shown.binary_search(&(number * at_once + i)).is_ok() {
                above.extend(a.iter().map(|x| x * 0.5 + 0.5));
                below.extend(b.iter().map(|x| x * 0.5 + 0.5));
            }
        }
    }
    let mut picture = Vec::new();
    let mut rows = 0;
    let row = (ROW.min(shown.len())) * stride;
    for (a, b) in above.chunks_exact(row).zip(below.chunks_exact(row)) {
        picture.extend_from_slice(a);
        picture.extend_from_slice(b);
        rows += 2;
    }
    let (n, total) = (picks.len() as f64, uses.iter().sum::<usize>() as f64);
    let shares = uses.iter().filter(|&&n| n > 0).map(|&n| n as f64 / total);
    let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
    Ok(Quality {
        error: errors.value(),
        psnr: psnr / n,
        ssim: ssim / n,
        usage: uses.iter().filter(|&&n| n > 0).count() as f64 / uses.len() as f64,
        perplexity: entropy.exp(),
        picture,
        rows,
    })
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
