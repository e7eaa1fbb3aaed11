//! PatchGAN (Isola et al. 2017, arXiv 1611.07004), as VQGAN and LlamaGen train their tokenizers against it: strided
//! convolutions that say of each patch of an image whether it is real. Parameter names are those of the published code.
//!
//! ```text
//! image (b, c, H, W) -> conv/2, leaky -> n - 1 times (conv/2, norm, leaky) -> conv, norm, leaky -> conv -> (b, 1, h, w)
//! ```
//!
//! Kernels are 4 x 4, padded by 1; norms are batch norms over one pass. It is used only in training, so there are no running
//! statistics.

use crate::backend::{Backend, Unary};
use crate::error::{Error, Result};
use crate::tape::Variable;
use crate::weights::{Init, Loader};

const EPS: f64 = 1e-5;
/// Slope below zero.
const LEAK: f64 = 0.2;

/// The network.
pub struct Discriminator<B: Backend> {
    first: (Variable<B>, Variable<B>),
    middle: Vec<Normed<B>>,
    last: (Variable<B>, Variable<B>),
}

/// A convolution without bias, and its norm.
struct Normed<B: Backend> {
    weight: Variable<B>,
    stride: usize,
    scale: Variable<B>,
    shift: Variable<B>,
}

/// Refuses more strided convolutions than images with this side allow.
pub fn check(side: usize, layers: usize, pointer: &str) -> Result<()> {
    // Each of the last two convolutions removes a pixel.
    if side >> layers > 2 {
        return Ok(());
    }
    let most = (0..layers)
        .rev()
        .find(|&layers| layers > 0 && side >> layers > 2);
    let message = format!(
        "{layers} layers halve images of {side} x {side} to less than 3 x 3: {}",
        match most {
            Some(most) => format!("at most {most}"),
            None => "they are too small for an adversary".into(),
        }
    );
    Err(Error::option(pointer, message))
}

impl<B: Backend> Discriminator<B> {
    /// Loads the parameters, whose names begin with `prefix`: this many strided convolutions, the first one to `width`
    /// channels.
    pub fn load(
        loader: &mut Loader<B>,
        prefix: &str,
        channels: usize,
        (width, layers): (usize, usize),
    ) -> Result<Self> {
        let name = |index: usize, part: &str| format!("{prefix}main.{index}.{part}");
        let drawn = Init::Normal(0.02);
        let mut biased = |index: usize, input: usize, output: usize| -> Result<_> {
            Ok((
                loader.get(&name(index, "weight"), &[output, input, 4, 4], drawn)?,
                loader.get(&name(index, "bias"), &[output], Init::Constant(0.0))?,
            ))
        };
        let first = biased(0, channels, width)?;
        let multiplier = |layer: usize| width * (1 << layer.min(3));
        let end = 3 * layers + 2;
        let last = biased(end, multiplier(layers), 1)?;
        let middle = (1..=layers).map(|layer| {
            let index = 3 * layer - 1;
            let (input, output) = (multiplier(layer - 1), multiplier(layer));
            Ok(Normed {
                weight: loader.get(&name(index, "weight"), &[output, input, 4, 4], drawn)?,
                stride: if layer < layers { 2 } else { 1 },
                scale: loader.get(&name(index + 1, "weight"), &[output], Init::Constant(1.0))?,
                shift: loader.get(&name(index + 1, "bias"), &[output], Init::Constant(0.0))?,
            })
        });
        Ok(Self {
            first,
            middle: middle.collect::<Result<_>>()?,
            last,
        })
    }

    /// Logits (b, 1, h, w) of images (b, c, H, W) in [-1, 1]: above 0 for what looks real.
    pub fn forward(&self, images: &Variable<B>) -> Result<Variable<B>> {
        let (weight, bias) = &self.first;
        let mut x = leaky(&images.conv2d_bias(weight, bias, None, 2, [1, 1])?)?;
        for layer in &self.middle {
            let y = x.conv2d(&layer.weight, layer.stride, [1, 1])?;
            x = leaky(&batch_norm(&y, &layer.scale, &layer.shift)?)?;
        }
        let (weight, bias) = &self.last;
        x.conv2d_bias(weight, bias, None, 1, [1, 1])
    }
}

fn leaky<B: Backend>(x: &Variable<B>) -> Result<Variable<B>> {
    let above = x.unary(Unary::Relu)?.affine(1.0 - LEAK, 0.0)?;
    x.affine(LEAK, 0.0)?.add(&above)
}

/// Each channel of (b, c, h, w) with mean 0 and variance 1 over b, h and w; then scale and shift (c).
fn batch_norm<B: Backend>(
    x: &Variable<B>,
    scale: &Variable<B>,
    shift: &Variable<B>,
) -> Result<Variable<B>> {
    let s = x.shape();
    let (b, c) = (s[0], s[1]);
    // One image with this many channels, each its own group.
    let channels = x
        .permute(&[1, 0, 2, 3])?
        .reshape(&[1, c, b * s[2], s[3]])?
        .group_norm(c, scale, shift, EPS)?;
    channels
        .reshape(&[c, b, s[2], s[3]])?
        .permute(&[1, 0, 2, 3])
}
