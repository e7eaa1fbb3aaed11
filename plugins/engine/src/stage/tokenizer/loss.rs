//! The loss of a tokenizer: the distance of reconstructions from images, by pixels, a perceptual metric and an adversary.
//!
//! ```text
//! loss = pixels + w_p perceptual + lambda w_a adversarial                     (VQGAN, Esser et al. 2021, arXiv 2012.09841)
//! adversarial = - mean D(reconstruction)
//! lambda = min(|d (pixels + w_p perceptual) / d W| / (|d adversarial / d W| + 1e-4), cap)
//! loss of D = mean(max(0, 1 - D(image)) + max(0, 1 + D(reconstruction))) / 2                                      (hinge)
//! ```
//!
//! W is the kernel of the decoder's last convolution. Each term is differentiated once, up to the reconstructions; from there
//! the sum goes back through the tokenizer.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::{Backend, Binary, Unary};
use crate::collective::{Collective, SingleRank};
use crate::error::{Error, Result};
use crate::model::LastConvolution;
use crate::model::discriminator::Discriminator;
use crate::perceptual::PerceptualMetric;
use crate::tape::{Variable, backward, scalar};
use crate::train::{TrainOptions, shared};
use crate::weights::{Loader, ParameterSource, Params};

/// The part of a batch computed at a time: this rank's share, or a piece of it.
#[derive(Clone, Copy)]
pub struct BatchPart<'a> {
    /// The ranks that compute the batch.
    pub ranks: &'a dyn Collective,
    /// The part's share of the batch's images.
    pub fraction: f64,
}

impl BatchPart<'_> {
    /// All of it.
    pub const WHOLE: Self = BatchPart {
        ranks: &SingleRank,
        fraction: 1.0,
    };

    /// The mean over all ranks' current parts of a tensor that is a mean over a part's images.
    fn mean<B: Backend>(&self, of_part: B::Tensor) -> Result<B::Tensor> {
        if !self.ranks.is_shared() {
            return Ok(of_part);
        }
        let share = self.fraction as f32;
        let mut values = B::to_floats(&of_part)?;
        values.iter_mut().for_each(|x| *x *= share);
        values.push(share);
        self.ranks.all_reduce(&mut values)?;
        let all = values.pop().unwrap_or(1.0);
        values.iter_mut().for_each(|x| *x /= all);
        B::of(&of_part).floats(&values, &B::shape(&of_part))
    }

    /// The norm of a loss's gradient at the last convolution's kernel, given its gradient for the part's images.
    fn pull<B: Backend>(&self, last: &LastConvolution<B>, images: &B::Tensor) -> Result<f64> {
        let gradient = self.mean::<B>(last.gradient(images)?)?;
        let square = B::unary(&gradient, Unary::Square)?;
        let sum = B::to_floats(&B::sum(&square, &[0, 1, 2, 3])?)?;
        Ok(f64::from(sum[0]).sqrt())
    }
}

/// How pixels are compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PixelLoss {
    /// Mean of squares.
    #[default]
    L2,
    /// Mean of absolute values: edges stay sharper.
    L1,
}

/// A discriminator of patches (PatchGAN) that learns beside the tokenizer to tell images from reconstructions.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Adversarial {
    /// Its weight in the loss.
    #[serde(default = "weight")]
    #[schemars(range(min = 0))]
    pub weight: f64,
    /// The step from which it learns and counts: earlier reconstructions are too poor to judge by.
    pub start: u64,
    /// The largest factor by which its weight is scaled to match the other terms' gradient at the last layer.
    #[serde(default = "cap")]
    #[schemars(range(min = 0))]
    pub cap: f64,
    /// Channels of its first convolution.
    #[serde(default = "channels")]
    #[schemars(range(min = 1, max = 4096))]
    pub channels: usize,
    /// Its strided convolutions: 3 judge patches of 70 x 70 pixels, 2 of 34 x 34, 1 of 16 x 16.
    #[serde(default = "layers")]
    #[schemars(range(min = 1, max = 8))]
    pub layers: usize,
    /// Its peak learning rate; the tokenizer's, if left out.
    #[serde(default)]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: Option<f64>,
}

fn weight() -> f64 {
    0.5
}
fn cap() -> f64 {
    1e4
}
fn channels() -> usize {
    64
}
fn layers() -> usize {
    3
}

/// The prefix of the adversary's parameter names.
pub const PREFIX: &str = "discriminator.";

impl Adversarial {
    /// How it is trained beside a tokenizer.
    pub fn training(&self, tokenizer: &TrainOptions) -> TrainOptions {
        TrainOptions {
            steps: tokenizer.steps - self.start,
            learning_rate: self.learning_rate.unwrap_or(tokenizer.learning_rate),
            muon: None,
            ..tokenizer.clone()
        }
    }
}

/// The adversary in training.
pub struct Adversary<B: Backend> {
    options: Adversarial,
    /// Its network, which learns.
    learning: Discriminator<B>,
    /// The same with constant weights, for the tokenizer's gradient.
    judging: Discriminator<B>,
}

impl<B: Backend> Adversary<B> {
    /// A new adversary for images with this many channels, and its parameters.
    pub fn new(
        backend: &B,
        seed: u64,
        channels: usize,
        options: &Adversarial,
    ) -> Result<(Self, Params<B>)> {
        let shape = (options.channels, options.layers);
        let mut loader = Loader::new(
            backend,
            ParameterSource::Init(seed),
            true,
            "new discriminator",
        );
        let learning = Discriminator::load(&mut loader, PREFIX, channels, shape)?;
        let params = loader.into_params();
        let tensors = shared(&params, None);
        let mut loader = Loader::new(
            backend,
            ParameterSource::Device(&tensors),
            false,
            "discriminator",
        );
        let judging = Discriminator::load(&mut loader, PREFIX, channels, shape)?;
        let own = Self {
            options: options.clone(),
            learning,
            judging,
        };
        Ok((own, params))
    }

    /// The hinge loss from which it learns.
    fn hinge(&self, images: &B::Tensor, reconstructions: &B::Tensor) -> Result<Variable<B>> {
        let side = |x: &B::Tensor, sign: f64| {
            let logits = self.learning.forward(&Variable::constant(x.clone()))?;
            let short = logits.affine(sign, 1.0)?.unary(Unary::Relu)?;
            short.mean_all()?.affine(0.5, 0.0)
        };
        side(images, -1.0)?.add(&side(reconstructions, 1.0)?)
    }
}

/// The loss of reconstructions.
pub struct Criterion<'a, B: Backend> {
    /// How pixels are compared.
    pub pixels: PixelLoss,
    /// The perceptual metric and its weight.
    pub metric: Option<(&'a PerceptualMetric<B>, f64)>,
    /// The adversary.
    pub adversary: Option<Adversary<B>>,
    /// Images per pass of the metric.
    pub at_once: usize,
}

/// A scalar and its gradient for some images.
struct Term<B: Backend> {
    value: B::Tensor,
    gradient: B::Tensor,
}

impl<B: Backend> Term<B> {
    fn of(images: &B::Tensor, f: impl FnOnce(&Variable<B>) -> Result<Variable<B>>) -> Result<Self> {
        let leaf = Variable::parameter(images.clone());
        let scalar = f(&leaf)?;
        let value = scalar.value().clone();
        let mut gradients = backward(scalar, &[("images".into(), leaf)])?;
        Ok(Self {
            value,
            gradient: gradients.remove(0),
        })
    }

    fn plus(self, other: &Self, weight: f64) -> Result<Self> {
        let add = |a, b: &B::Tensor| B::binary(a, &B::affine(b, weight, 0.0)?, Binary::Add);
        Ok(Self {
            value: add(&self.value, &other.value)?,
            gradient: add(&self.gradient, &other.gradient)?,
        })
    }
}

impl<B: Backend> Criterion<'_, B> {
    /// The loss of reconstructions of a part's images (b, c, h, w) at a step, and its terms.
    pub fn loss(
        &self,
        reconstructions: Variable<B>,
        images: &B::Tensor,
        last: &LastConvolution<B>,
        step: u64,
        part: &BatchPart<'_>,
    ) -> Result<(Variable<B>, Vec<(&'static str, f64)>)> {
        let made = reconstructions.value().clone();
        let target = Variable::constant(images.clone());
        let mut sum = Term::of(&made, |made| self.pixels.distance(made, &target))?;
        let mut figures = vec![("reconstruction", scalar::<B>(&sum.value)?)];
        if let Some((metric, weight)) = self.metric {
            let count = B::shape(images)[0];
            let term = Term::of(&made, |made| {
                made.sum_of_pieces(self.at_once, |piece, place| {
                    let target = B::narrow(images, 0, place.start, place.len())?;
                    let distance = metric.distance(piece, &Variable::constant(target))?;
                    distance.affine(place.len() as f64 / count as f64, 0.0)
                })
            })?;
            figures.push(("perceptual", scalar::<B>(&term.value)?));
            sum = sum.plus(&term, weight)?;
        }
        let acting = self.adversary.as_ref();
        let Some(adversary) = acting.filter(|own| step >= own.options.start) else {
            return Ok((reconstructions.known(sum.value, sum.gradient), figures));
        };
        let term = Term::of(&made, |made| {
            adversary
                .judging
                .forward(made)?
                .mean_all()?
                .affine(-1.0, 0.0)
        })?;
        let pulls = (
            part.pull(last, &sum.gradient)?,
            part.pull(last, &term.gradient)?,
        );
        let adaptive = (pulls.0 / (pulls.1 + 1e-4)).min(adversary.options.cap);
        figures.push(("adversarial", scalar::<B>(&term.value)?));
        figures.push(("adaptive_weight", adaptive));
        sum = sum.plus(&term, adaptive * adversary.options.weight)?;
        let hinge = adversary.hinge(images, &made)?;
        figures.push(("discriminator", scalar::<B>(hinge.value())?));
        let loss = reconstructions.known(sum.value, sum.gradient).add(&hinge)?;
        Ok((loss, figures))
    }
}

impl PixelLoss {
    /// The distance of images.
    fn distance<B: Backend>(self, a: &Variable<B>, b: &Variable<B>) -> Result<Variable<B>> {
        let difference = a.sub(b)?;
        match self {
            Self::L2 => difference.unary(Unary::Square)?.mean_all(),
            Self::L1 => {
                let above = difference.unary(Unary::Relu)?;
                let below = difference.affine(-1.0, 0.0)?.unary(Unary::Relu)?;
                above.add(&below)?.mean_all()
            }
        }
    }
}

/// The entropy term (Yu et al. 2023, arXiv 2310.05737, eq. 3): each vector should be sure of its code, and all codes should
/// be used. It is low when the choices (n, K) of softmax(-|z - c|^2 / temperature) are individually certain but evenly
/// distributed overall.
pub fn entropy<B: Backend>(
    z: &Variable<B>,
    codes: &Variable<B>,
    temperature: f64,
    part: &BatchPart<'_>,
) -> Result<Variable<B>> {
    let (n, k) = (z.shape()[0], codes.shape()[0]);
    let lengths = |x: &Variable<B>| x.unary(Unary::Square)?.sum(&[1]);
    // -|z - c|^2 = 2 <z, c> - |z|^2 - |c|^2
    let near = z
        .matmul(codes, true)?
        .affine(2.0, 0.0)?
        .sub(&lengths(z)?.reshape(&[n, 1])?)?
        .sub(&lengths(codes)?.reshape(&[1, k])?)?;
    let choice = near.affine(1.0 / temperature, 0.0)?.softmax()?;
    let information = |p: &Variable<B>| p.mul(&p.affine(1.0, 1e-10)?.unary(Unary::Log)?);
    let each = information(&choice)?.sum(&[1])?.mean_all()?;
    // Evenness is a property of all ranks' choices together, not a mean over ranks.
    let own = choice.mean(&[0])?;
    let whole = part.mean::<B>(own.value().clone())?;
    let even = Term::of(&whole, |whole| information(whole)?.sum(&[0, 1]))?;
    let shape = each.shape();
    own.known(even.value, even.gradient)
        .reshape(&shape)?
        .sub(&each)
}

/// Refuses weights with which nothing would be learned, or nothing from the adversary.
pub fn check(adversarial: Option<&Adversarial>, steps: u64) -> Result<()> {
    match adversarial {
        Some(own) if own.start >= steps => {
            let message = format!(
                "the adversary begins at step {}, and the training has {steps}: it would never act",
                own.start
            );
            Err(Error::option("/adversarial/start", message))
        }
        _ => Ok(()),
    }
}
