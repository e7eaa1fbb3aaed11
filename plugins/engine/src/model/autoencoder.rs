//! The convolutional encoder and decoder of a VQ tokenizer (after VQGAN, Esser et al. 2021, arXiv 2012.09841), shared by
//! LlamaGen and VAR, which differ in the names of parameters.
//!
//! ```text
//! image (b, c, H, W) -> conv -> levels, each halving the sides but the last -> middle -> norm, conv -> z (b, Z, H/f, W/f)
//! z -> conv -> middle -> levels, coarsest first, each doubling the sides but the last -> norm, conv -> image
//! ```
//!
//! f = 2^(levels - 1). The coarsest level and the middle attend.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::Result;
use crate::model::LastConvolution;
use crate::size::Sides;
use crate::tape::Variable;
use crate::weights::{Init, Loader};

const EPS: f64 = 1e-6;

/// Shape of the encoder and the decoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Channels of the images: 1 or 3.
    pub image_channels: usize,
    /// Sides of the images.
    pub image_size: Sides,
    /// Base number of channels.
    pub channels: usize,
    /// Multiplier of the channels per level, finest first.
    pub multipliers: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub res_blocks: usize,
    /// Groups of the group normalisation.
    pub norm_groups: usize,
    /// Channels Z between encoder and quantiser.
    pub z_channels: usize,
}

impl Shape {
    /// Sides of the feature map between encoder and decoder.
    pub fn map(&self) -> Sides {
        self.image_size
            .halved(self.multipliers.len().saturating_sub(1))
    }
}

/// How a family names the parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// `conv_blocks.{i}.res.{j}`, `mid.0`; q, k and v apart; the decoder counts from the coarsest level.
    Llamagen,
    /// `down.{i}.block.{j}`, `up.{i}.block.{j}`, `mid.block_1`; q, k and v in one; both count from the finest level.
    Var,
}

impl Names {
    /// Level i of `count`, in the order of the data, of the encoder or the decoder.
    fn level(self, half: &str, i: usize, count: usize) -> String {
        match (self, half) {
            (Self::Llamagen, _) => format!("{half}.conv_blocks.{i}"),
            (Self::Var, "encoder") => format!("{half}.down.{i}"),
            (Self::Var, _) => format!("{half}.up.{}", count - 1 - i),
        }
    }

    fn res(self) -> &'static str {
        match self {
            Self::Llamagen => "res",
            Self::Var => "block",
        }
    }

    /// The three parts of the middle.
    fn middle(self) -> [&'static str; 3] {
        match self {
            Self::Llamagen => ["0", "1", "2"],
            Self::Var => ["block_1", "attn_1", "block_2"],
        }
    }
}

/// A convolution with bias.
pub(super) struct Conv<B: Backend> {
    weight: Variable<B>,
    bias: Variable<B>,
    stride: usize,
    padding: usize,
}

impl<B: Backend> Conv<B> {
    /// A k x k kernel that keeps the size.
    pub(super) fn load(
        loader: &mut Loader<B>,
        name: &str,
        input: usize,
        output: usize,
        k: usize,
    ) -> Result<Self> {
        let bound = ((input * k * k) as f32).sqrt().recip();
        Ok(Self {
            weight: loader.get(
                &format!("{name}.weight"),
                &[output, input, k, k],
                Init::Uniform(bound),
            )?,
            bias: loader.get(&format!("{name}.bias"), &[output], Init::Uniform(bound))?,
            stride: 1,
            padding: k / 2,
        })
    }

    /// (b, input, h, w) -> (b, output, h', w')
    pub(super) fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        self.run(x, None)
    }

    /// The same plus a residual of the result's shape.
    fn forward_plus(&self, x: &Variable<B>, residual: &Variable<B>) -> Result<Variable<B>> {
        self.run(x, Some(residual))
    }

    /// The same on images enlarged twofold, with a kernel that keeps the size.
    fn forward_upsampled(&self, x: &Variable<B>) -> Result<Variable<B>> {
        x.conv2d_upsampled(&self.weight, &self.bias, [self.padding; 2])
    }

    fn run(&self, x: &Variable<B>, residual: Option<&Variable<B>>) -> Result<Variable<B>> {
        x.conv2d_bias(
            &self.weight,
            &self.bias,
            residual,
            self.stride,
            [self.padding; 2],
        )
    }
}

struct Norm<B: Backend> {
    weight: Variable<B>,
    bias: Variable<B>,
    groups: usize,
}

impl<B: Backend> Norm<B> {
    fn load(loader: &mut Loader<B>, name: &str, channels: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            weight: loader.get(&format!("{name}.weight"), &[channels], Init::Constant(1.0))?,
            bias: loader.get(&format!("{name}.bias"), &[channels], Init::Constant(0.0))?,
            groups,
        })
    }

    fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        x.group_norm(self.groups, &self.weight, &self.bias, EPS)
    }

    fn silu(&self, x: &Variable<B>) -> Result<Variable<B>> {
        x.group_norm_silu(self.groups, &self.weight, &self.bias, EPS)
    }
}

struct ResBlock<B: Backend> {
    norm1: Norm<B>,
    conv1: Conv<B>,
    norm2: Norm<B>,
    conv2: Conv<B>,
    shortcut: Option<Conv<B>>,
}

impl<B: Backend> ResBlock<B> {
    fn load(
        loader: &mut Loader<B>,
        name: &str,
        input: usize,
        output: usize,
        groups: usize,
    ) -> Result<Self> {
        Ok(Self {
            norm1: Norm::load(loader, &format!("{name}.norm1"), input, groups)?,
            conv1: Conv::load(loader, &format!("{name}.conv1"), input, output, 3)?,
            norm2: Norm::load(loader, &format!("{name}.norm2"), output, groups)?,
            conv2: Conv::load(loader, &format!("{name}.conv2"), output, output, 3)?,
            shortcut: (input != output)
                .then(|| Conv::load(loader, &format!("{name}.nin_shortcut"), input, output, 1))
                .transpose()?,
        })
    }

    fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        let y = self.conv1.forward(&self.norm1.silu(x)?)?;
        let y = self.norm2.silu(&y)?;
        match &self.shortcut {
            Some(conv) => self.conv2.forward_plus(&y, &conv.forward(x)?),
            None => self.conv2.forward_plus(&y, x),
        }
    }
}

/// Queries, keys and values of a feature map.
enum Projection<B: Backend> {
    Apart([Conv<B>; 3]),
    Packed(Conv<B>),
}

impl<B: Backend> Projection<B> {
    fn load(loader: &mut Loader<B>, name: &str, c: usize, names: Names) -> Result<Self> {
        let mut conv =
            |part: &str, output| Conv::load(loader, &format!("{name}.{part}"), c, output, 1);
        Ok(match names {
            Names::Llamagen => Self::Apart([conv("q", c)?, conv("k", c)?, conv("v", c)?]),
            Names::Var => Self::Packed(conv("qkv", 3 * c)?),
        })
    }

    /// (b, c, h, w) -> three of (b, h w, c)
    fn forward(&self, x: &Variable<B>) -> Result<[Variable<B>; 3]> {
        let s = x.shape();
        let positions = |y: Variable<B>| y.reshape(&[s[0], s[1], s[2] * s[3]])?.permute(&[0, 2, 1]);
        match self {
            Self::Apart([q, k, v]) => Ok([
                positions(q.forward(x)?)?,
                positions(k.forward(x)?)?,
                positions(v.forward(x)?)?,
            ]),
            Self::Packed(conv) => {
                let all = conv.forward(x)?; // (b, 3 c, h, w)
                let part = |i: usize| positions(all.narrow(1, i * s[1], s[1])?);
                Ok([part(0)?, part(1)?, part(2)?])
            }
        }
    }
}

/// Single-head self-attention over the positions of a feature map.
struct AttnBlock<B: Backend> {
    norm: Norm<B>,
    qkv: Projection<B>,
    proj_out: Conv<B>,
}

impl<B: Backend> AttnBlock<B> {
    fn load(
        loader: &mut Loader<B>,
        name: &str,
        channels: usize,
        groups: usize,
        names: Names,
    ) -> Result<Self> {
        Ok(Self {
            norm: Norm::load(loader, &format!("{name}.norm"), channels, groups)?,
            qkv: Projection::load(loader, name, channels, names)?,
            proj_out: Conv::load(loader, &format!("{name}.proj_out"), channels, channels, 1)?,
        })
    }

    fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        let s = x.shape();
        let [q, k, v] = self.qkv.forward(&self.norm.forward(x)?)?;
        let scale = (s[1] as f64).sqrt().recip();
        // A few positions and one wide head: unlike in a transformer, rounding would gain nothing here.
        let weights = q.affine(scale, 0.0)?.matmul(&k, true)?.softmax()?;
        let y = weights.matmul(&v, false)?; // (b, h w, c)
        let y = y.permute(&[0, 2, 1])?.reshape(&s)?;
        self.proj_out.forward_plus(&y, x)
    }
}

/// A level of either half: residual blocks, attention at the coarsest level, then a change of size.
struct Level<B: Backend> {
    res: Vec<Arc<ResBlock<B>>>,
    attn: Vec<Arc<AttnBlock<B>>>,
    resize: Option<Conv<B>>,
}

impl<B: Backend> Level<B> {
    fn load(
        loader: &mut Loader<B>,
        name: &str,
        [input, output]: [usize; 2],
        (blocks, attends): (usize, bool),
        c: &Shape,
        names: Names,
    ) -> Result<Self> {
        let mut level = Self {
            res: Vec::new(),
            attn: Vec::new(),
            resize: None,
        };
        for i in 0..blocks {
            let width = if i == 0 { input } else { output };
            let res = format!("{name}.{}.{i}", names.res());
            let res = ResBlock::load(loader, &res, width, output, c.norm_groups)?;
            level.res.push(Arc::new(res));
            if attends {
                let attn = format!("{name}.attn.{i}");
                let attn = AttnBlock::load(loader, &attn, output, c.norm_groups, names)?;
                level.attn.push(Arc::new(attn));
            }
        }
        Ok(level)
    }

    fn forward(&self, mut x: Variable<B>, recompute: bool) -> Result<Variable<B>> {
        for (i, res) in self.res.iter().enumerate() {
            let res = Arc::clone(res);
            x = Variable::segment(recompute, move || res.forward(&x))?;
            if let Some(attn) = self.attn.get(i) {
                let attn = Arc::clone(attn);
                x = Variable::segment(recompute, move || attn.forward(&x))?;
            }
        }
        Ok(x)
    }
}

struct MidBlock<B: Backend> {
    first: Arc<ResBlock<B>>,
    attn: Arc<AttnBlock<B>>,
    last: Arc<ResBlock<B>>,
}

impl<B: Backend> MidBlock<B> {
    fn load(
        loader: &mut Loader<B>,
        half: &str,
        channels: usize,
        groups: usize,
        names: Names,
    ) -> Result<Self> {
        let [first, attn, last] = names.middle().map(|part| format!("{half}.mid.{part}"));
        Ok(Self {
            first: Arc::new(ResBlock::load(loader, &first, channels, channels, groups)?),
            attn: Arc::new(AttnBlock::load(loader, &attn, channels, groups, names)?),
            last: Arc::new(ResBlock::load(loader, &last, channels, channels, groups)?),
        })
    }

    fn forward(&self, x: Variable<B>, recompute: bool) -> Result<Variable<B>> {
        let (first, attn, last) = (self.first.clone(), self.attn.clone(), self.last.clone());
        let x = Variable::segment(recompute, move || first.forward(&x))?;
        let x = Variable::segment(recompute, move || attn.forward(&x))?;
        Variable::segment(recompute, move || last.forward(&x))
    }
}

/// The encoder.
pub(super) struct Encoder<B: Backend> {
    conv_in: Conv<B>,
    levels: Vec<Level<B>>,
    mid: MidBlock<B>,
    norm_out: Norm<B>,
    conv_out: Conv<B>,
    /// Whether the backward pass recomputes blocks.
    pub(super) recompute: bool,
}

impl<B: Backend> Encoder<B> {
    pub(super) fn load(loader: &mut Loader<B>, c: &Shape, names: Names) -> Result<Self> {
        let conv_in = Conv::load(loader, "encoder.conv_in", c.image_channels, c.channels, 3)?;
        let mut width = c.channels;
        let count = c.multipliers.len();
        let mut levels = Vec::new();
        for (i, multiplier) in c.multipliers.iter().enumerate() {
            let name = names.level("encoder", i, count);
            let output = c.channels * multiplier;
            let blocks = (c.res_blocks, i + 1 == count);
            let mut level = Level::load(loader, &name, [width, output], blocks, c, names)?;
            width = output;
            if i + 1 < count {
                let conv = Conv::load(loader, &format!("{name}.downsample.conv"), width, width, 3)?;
                level.resize = Some(Conv {
                    stride: 2,
                    padding: 0,
                    ..conv
                });
            }
            levels.push(level);
        }
        Ok(Self {
            conv_in,
            levels,
            mid: MidBlock::load(loader, "encoder", width, c.norm_groups, names)?,
            norm_out: Norm::load(loader, "encoder.norm_out", width, c.norm_groups)?,
            conv_out: Conv::load(loader, "encoder.conv_out", width, c.z_channels, 3)?,
            recompute: false,
        })
    }

    /// z (b, Z, h, w) of images (b, c, H, W).
    pub(super) fn forward(&self, images: &Variable<B>) -> Result<Variable<B>> {
        let mut x = self.conv_in.forward(images)?;
        for level in &self.levels {
            x = level.forward(x, self.recompute)?;
            if let Some(conv) = &level.resize {
                x = conv.forward(&pad_right_bottom(&x)?)?;
            }
        }
        let x = self.mid.forward(x, self.recompute)?;
        self.conv_out.forward(&self.norm_out.silu(&x)?)
    }
}

/// The decoder.
pub(super) struct Decoder<B: Backend> {
    conv_in: Conv<B>,
    mid: MidBlock<B>,
    levels: Vec<Level<B>>,
    norm_out: Norm<B>,
    conv_out: Conv<B>,
    /// Whether the backward pass recomputes blocks.
    pub(super) recompute: bool,
}

impl<B: Backend> Decoder<B> {
    pub(super) fn load(loader: &mut Loader<B>, c: &Shape, names: Names) -> Result<Self> {
        let count = c.multipliers.len();
        let mut width = c.channels * c.multipliers[count - 1];
        let conv_in = Conv::load(loader, "decoder.conv_in", c.z_channels, width, 3)?;
        let mid = MidBlock::load(loader, "decoder", width, c.norm_groups, names)?;
        let mut levels = Vec::new();
        for (i, multiplier) in c.multipliers.iter().rev().enumerate() {
            let name = names.level("decoder", i, count);
            let output = c.channels * multiplier;
            let blocks = (c.res_blocks + 1, i == 0);
            let mut level = Level::load(loader, &name, [width, output], blocks, c, names)?;
            width = output;
            if i + 1 < count {
                let name = format!("{name}.upsample.conv");
                level.resize = Some(Conv::load(loader, &name, width, width, 3)?);
            }
            levels.push(level);
        }
        Ok(Self {
            conv_in,
            mid,
            levels,
            norm_out: Norm::load(loader, "decoder.norm_out", width, c.norm_groups)?,
            conv_out: Conv::load(loader, "decoder.conv_out", width, c.image_channels, 3)?,
            recompute: false,
        })
    }

    /// Images (b, c, H, W) of z (b, Z, h, w).
    pub(super) fn forward(&self, z: &Variable<B>) -> Result<Variable<B>> {
        self.conv_out.forward(&self.body(z)?)
    }

    /// The same with the last convolution's input.
    pub(super) fn forward_seen(
        &self,
        z: &Variable<B>,
    ) -> Result<(Variable<B>, LastConvolution<B>)> {
        let x = self.body(z)?;
        let last = LastConvolution {
            input: x.value().clone(),
            kernel: self.conv_out.weight.value().clone(),
        };
        Ok((self.conv_out.forward(&x)?, last))
    }

    /// The last convolution's input.
    fn body(&self, z: &Variable<B>) -> Result<Variable<B>> {
        let mut x = self.mid.forward(self.conv_in.forward(z)?, self.recompute)?;
        for level in &self.levels {
            x = level.forward(x, self.recompute)?;
            if let Some(conv) = &level.resize {
                x = conv.forward_upsampled(&x)?;
            }
        }
        self.norm_out.silu(&x)
    }
}

/// Adds a row of zeros below and a column of zeros at the right.
fn pad_right_bottom<B: Backend>(x: &Variable<B>) -> Result<Variable<B>> {
    let s = x.shape();
    let zeros = |shape: [usize; 4]| -> Result<Variable<B>> {
        Ok(Variable::constant(
            B::of(x.value()).floats(&vec![0.0; shape.iter().product()], &shape)?,
        ))
    };
    let wide = Variable::cat(&[x, &zeros([s[0], s[1], s[2], 1])?], 3)?;
    Variable::cat(&[&wide, &zeros([s[0], s[1], 1, s[3] + 1])?], 2)
}
