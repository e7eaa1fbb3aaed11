//! LlamaGen's VQ tokenizer (VQ-16, VQ-8; after VQGAN, Esser et al. 2021, arXiv 2012.09841): a convolutional encoder
//! and decoder with a codebook between. Parameter names are those of the published checkpoints.
//!
//! ```text
//! image (b, 3, H, W) -> encoder -> quant_conv -> z (b, D, H/f, W/f) -> nearest code -> tokens (b, L), raster order
//! codes (b, L, D) -> post_quant_conv -> decoder -> image
//! ```
//!
//! With `l2_norm` codes and z are L2-normalised, for the look-up and for decoding. f = 2^(levels - 1).

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Mask, Unary};
use crate::error::Result;
use crate::model::Tokenizer;
use crate::tape::Var;
use crate::weights::{Init, Loader};

const EPS: f64 = 1e-6;

/// Shape of a VQ tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Channels of the images: 1 or 3.
    pub image_channels: usize,
    /// Sides of the images (height = width).
    pub image_size: usize,
    /// Base number of channels.
    pub channels: usize,
    /// Multiplier of the channels per level, finest first.
    pub multipliers: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub res_blocks: usize,
    /// Groups of the group normalisation.
    pub norm_groups: usize,
    /// Channels between the encoder and `quant_conv`.
    pub z_channels: usize,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub codebook_dim: usize,
    /// Whether codes are L2-normalised.
    pub l2_norm: bool,
}

impl Config {
    /// Tokens along a side of the map.
    pub fn side(&self) -> usize {
        self.image_size >> (self.multipliers.len() - 1)
    }
}

struct Conv<B: Backend> {
    weight: Var<B>,
    bias: Var<B>,
    stride: usize,
    padding: usize,
}

impl<B: Backend> Conv<B> {
    /// A k x k kernel that keeps the size.
    fn load(
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

    fn forward(&self, x: &Var<B>) -> Result<Var<B>> {
        x.conv2d(
            &self.weight,
            Some(&self.bias),
            self.stride,
            [self.padding; 2],
        )
    }
}

struct Norm<B: Backend> {
    weight: Var<B>,
    bias: Var<B>,
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

    fn forward(&self, x: &Var<B>) -> Result<Var<B>> {
        x.group_norm(self.groups, &self.weight, &self.bias, EPS)
    }

    fn silu(&self, x: &Var<B>) -> Result<Var<B>> {
        self.forward(x)?.unary(Unary::Silu)
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

    fn forward(&self, x: &Var<B>) -> Result<Var<B>> {
        let y = self.conv1.forward(&self.norm1.silu(x)?)?;
        let y = self.conv2.forward(&self.norm2.silu(&y)?)?;
        match &self.shortcut {
            Some(conv) => conv.forward(x)?.add(&y),
            None => x.add(&y),
        }
    }
}

/// Single-head self-attention over the positions of a feature map.
struct AttnBlock<B: Backend> {
    norm: Norm<B>,
    q: Conv<B>,
    k: Conv<B>,
    v: Conv<B>,
    proj_out: Conv<B>,
}

impl<B: Backend> AttnBlock<B> {
    fn load(loader: &mut Loader<B>, name: &str, channels: usize, groups: usize) -> Result<Self> {
        let norm = Norm::load(loader, &format!("{name}.norm"), channels, groups)?;
        let mut conv =
            |part: &str| Conv::load(loader, &format!("{name}.{part}"), channels, channels, 1);
        Ok(Self {
            norm,
            q: conv("q")?,
            k: conv("k")?,
            v: conv("v")?,
            proj_out: conv("proj_out")?,
        })
    }

    fn forward(&self, x: &Var<B>) -> Result<Var<B>> {
        let s = x.shape();
        let normal = self.norm.forward(x)?;
        // (b, c, h, w) -> (b, h w, 1, c)
        let positions = |conv: &Conv<B>| {
            conv.forward(&normal)?
                .reshape(&[s[0], s[1], s[2] * s[3], 1])?
                .permute(&[0, 2, 3, 1])
        };
        let scale = (s[1] as f64).sqrt().recip();
        let y = Var::attention(
            &positions(&self.q)?,
            &positions(&self.k)?,
            &positions(&self.v)?,
            &Mask::Full,
            scale,
        )?;
        let y = y.permute(&[0, 3, 1, 2])?.reshape(&s)?;
        x.add(&self.proj_out.forward(&y)?)
    }
}

/// A level of either half: residual blocks, attention at the coarsest level, then a change of size.
struct Level<B: Backend> {
    res: Vec<ResBlock<B>>,
    attn: Vec<AttnBlock<B>>,
    resize: Option<Conv<B>>,
}

impl<B: Backend> Level<B> {
    fn forward(&self, x: &Var<B>) -> Result<Var<B>> {
        let mut x = x.clone();
        for (i, res) in self.res.iter().enumerate() {
            x = res.forward(&x)?;
            if let Some(attn) = self.attn.get(i) {
                x = attn.forward(&x)?;
            }
        }
        Ok(x)
    }
}

struct Middle<B: Backend> {
    first: ResBlock<B>,
    attn: AttnBlock<B>,
    last: ResBlock<B>,
}

impl<B: Backend> Middle<B> {
    fn load(loader: &mut Loader<B>, name: &str, channels: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            first: ResBlock::load(loader, &format!("{name}.0"), channels, channels, groups)?,
            attn: AttnBlock::load(loader, &format!("{name}.1"), channels, groups)?,
            last: ResBlock::load(loader, &format!("{name}.2"), channels, channels, groups)?,
        })
    }

    fn forward(&self, x: &Var<B>) -> Result<Var<B>> {
        self.last
            .forward(&self.attn.forward(&self.first.forward(x)?)?)
    }
}

/// Either half of the tokenizer.
struct Half<B: Backend> {
    conv_in: Conv<B>,
    levels: Vec<Level<B>>,
    mid: Middle<B>,
    norm_out: Norm<B>,
    conv_out: Conv<B>,
}

impl<B: Backend> Half<B> {
    fn load_encoder(loader: &mut Loader<B>, c: &Config) -> Result<Self> {
        let conv_in = Conv::load(loader, "encoder.conv_in", c.image_channels, c.channels, 3)?;
        let mut width = c.channels;
        let last = c.multipliers.len() - 1;
        let mut levels = Vec::new();
        for (i, multiplier) in c.multipliers.iter().enumerate() {
            let name = format!("encoder.conv_blocks.{i}");
            let output = c.channels * multiplier;
            let mut level = load_level(
                loader,
                &name,
                width,
                output,
                c.res_blocks,
                i == last,
                c.norm_groups,
            )?;
            width = output;
            if i != last {
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
            mid: Middle::load(loader, "encoder.mid", width, c.norm_groups)?,
            norm_out: Norm::load(loader, "encoder.norm_out", width, c.norm_groups)?,
            conv_out: Conv::load(loader, "encoder.conv_out", width, c.z_channels, 3)?,
        })
    }

    fn load_decoder(loader: &mut Loader<B>, c: &Config) -> Result<Self> {
        let last = c.multipliers.len() - 1;
        let mut width = c.channels * c.multipliers[last];
        let conv_in = Conv::load(loader, "decoder.conv_in", c.z_channels, width, 3)?;
        let mid = Middle::load(loader, "decoder.mid", width, c.norm_groups)?;
        let mut levels = Vec::new();
        for (i, multiplier) in c.multipliers.iter().rev().enumerate() {
            let name = format!("decoder.conv_blocks.{i}");
            let output = c.channels * multiplier;
            let mut level = load_level(
                loader,
                &name,
                width,
                output,
                c.res_blocks + 1,
                i == 0,
                c.norm_groups,
            )?;
            width = output;
            if i != last {
                level.resize = Some(Conv::load(
                    loader,
                    &format!("{name}.upsample.conv"),
                    width,
                    width,
                    3,
                )?);
            }
            levels.push(level);
        }
        Ok(Self {
            conv_in,
            levels,
            mid,
            norm_out: Norm::load(loader, "decoder.norm_out", width, c.norm_groups)?,
            conv_out: Conv::load(loader, "decoder.conv_out", width, c.image_channels, 3)?,
        })
    }

    fn encode(&self, image: &Var<B>) -> Result<Var<B>> {
        let mut x = self.conv_in.forward(image)?;
        for level in &self.levels {
            x = level.forward(&x)?;
            if let Some(conv) = &level.resize {
                x = conv.forward(&pad_right_bottom(&x)?)?;
            }
        }
        self.conv_out
            .forward(&self.norm_out.silu(&self.mid.forward(&x)?)?)
    }

    fn decode(&self, z: &Var<B>) -> Result<Var<B>> {
        let mut x = self.mid.forward(&self.conv_in.forward(z)?)?;
        for level in &self.levels {
            x = level.forward(&x)?;
            if let Some(conv) = &level.resize {
                x = conv.forward(&x.upsample2()?)?;
            }
        }
        self.conv_out.forward(&self.norm_out.silu(&x)?)
    }
}

fn load_level<B: Backend>(
    loader: &mut Loader<B>,
    name: &str,
    input: usize,
    output: usize,
    blocks: usize,
    attends: bool,
    groups: usize,
) -> Result<Level<B>> {
    let mut level = Level {
        res: Vec::new(),
        attn: Vec::new(),
        resize: None,
    };
    for i in 0..blocks {
        let width = if i == 0 { input } else { output };
        level.res.push(ResBlock::load(
            loader,
            &format!("{name}.res.{i}"),
            width,
            output,
            groups,
        )?);
        if attends {
            level.attn.push(AttnBlock::load(
                loader,
                &format!("{name}.attn.{i}"),
                output,
                groups,
            )?);
        }
    }
    Ok(level)
}

/// Adds a row of zeros below and a column of zeros at the right.
fn pad_right_bottom<B: Backend>(x: &Var<B>) -> Result<Var<B>> {
    let s = x.shape();
    let zeros = |shape: [usize; 4]| -> Result<Var<B>> {
        Ok(Var::constant(B::floats_beside(
            x.value(),
            &vec![0.0; shape.iter().product()],
            &shape,
        )?))
    };
    let wide = Var::cat(&[x, &zeros([s[0], s[1], s[2], 1])?], 3)?;
    Var::cat(&[&wide, &zeros([s[0], s[1], 1, s[3] + 1])?], 2)
}

/// x / |x| over the last dimension.
fn l2_normalise<B: Backend>(x: &Var<B>) -> Result<Var<B>> {
    let last = x.shape().len() - 1;
    let square = x.unary(Unary::Square)?.sum(&[last])?;
    // torch's F.normalize divides by max(|x|, 1e-12); the floor keeps a zero vector finite.
    x.mul(
        &square
            .affine(1.0, 1e-24)?
            .unary(Unary::Sqrt)?
            .unary(Unary::Recip)?,
    )
}

/// What one pass of training yields.
pub struct Reconstruction<B: Backend> {
    /// Images (b, c, h, w).
    pub images: Var<B>,
    /// Encoder outputs (b L, D), normalised where codes are.
    pub z: Var<B>,
    /// Mean squared distance of the codes to the encoder's outputs, moving the codes.
    pub codebook_loss: Var<B>,
    /// The same, moving the encoder.
    pub commitment_loss: Var<B>,
    /// Token ids (b L).
    pub tokens: B::Tensor,
}

/// The VQ tokenizer.
pub struct VqModel<B: Backend> {
    config: Config,
    encoder: Half<B>,
    decoder: Half<B>,
    quant_conv: Conv<B>,
    post_quant_conv: Conv<B>,
    embedding: Var<B>,
}

/// Name of the codebook parameter.
pub const CODEBOOK: &str = "quantize.embedding.weight";

impl<B: Backend> VqModel<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let c = config;
        let bound = (c.vocabulary as f32).recip();
        Ok(Self {
            encoder: Half::load_encoder(loader, c)?,
            decoder: Half::load_decoder(loader, c)?,
            embedding: loader.get(
                CODEBOOK,
                &[c.vocabulary, c.codebook_dim],
                Init::Uniform(bound),
            )?,
            quant_conv: Conv::load(loader, "quant_conv", c.z_channels, c.codebook_dim, 1)?,
            post_quant_conv: Conv::load(
                loader,
                "post_quant_conv",
                c.codebook_dim,
                c.z_channels,
                1,
            )?,
            config: c.clone(),
        })
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn codes(&self) -> Result<Var<B>> {
        if self.config.l2_norm {
            l2_normalise(&self.embedding)
        } else {
            Ok(self.embedding.clone())
        }
    }

    /// Encoder outputs (b L, D), normalised where codes are.
    fn project(&self, images: &Var<B>) -> Result<Var<B>> {
        let z = self.quant_conv.forward(&self.encoder.encode(images)?)?; // (b, D, h, w)
        let s = z.shape();
        let z = z
            .permute(&[0, 2, 3, 1])?
            .reshape(&[s[0] * s[2] * s[3], s[1]])?;
        if self.config.l2_norm {
            l2_normalise(&z)
        } else {
            Ok(z)
        }
    }

    /// One pass with straight-through gradients (van den Oord et al. 2017, arXiv 1711.00937).
    pub fn reconstruct(&self, images: &B::Tensor) -> Result<Reconstruction<B>> {
        let z = self.project(&Var::constant(images.clone()))?;
        let codes = self.codes()?;
        let tokens = nearest::<B>(z.value(), codes.value())?;
        let chosen = codes.rows(&tokens)?;
        let distance = |a: &Var<B>, b: &Var<B>| a.sub(b)?.unary(Unary::Square)?.mean_all();
        let codebook_loss = distance(&chosen, &z.detach())?;
        let commitment_loss = distance(&z, &chosen.detach())?;
        // z + (chosen - z) without gradient: forward the codes, backward as if they were z.
        let through = z.add(&chosen.detach().sub(&z.detach())?)?;
        let b = B::shape(images)[0];
        let s = z.shape();
        let images = self.decode(&through.reshape(&[b, s[0] / b, s[1]])?)?;
        Ok(Reconstruction {
            images,
            z,
            codebook_loss,
            commitment_loss,
            tokens,
        })
    }
}

impl<B: Backend> Tokenizer<B> for VqModel<B> {
    fn codebook(&self) -> Result<B::Tensor> {
        Ok(self.codes()?.value().clone())
    }

    fn encode(&self, images: &B::Tensor) -> Result<B::Tensor> {
        let z = self.project(&Var::constant(images.clone()))?;
        let b = B::shape(images)[0];
        B::reshape(
            &nearest::<B>(z.value(), self.codes()?.value())?,
            &[b, z.shape()[0] / b],
        )
    }

    fn decode(&self, latents: &Var<B>) -> Result<Var<B>> {
        let (s, side) = (latents.shape(), self.config.side());
        let z = latents
            .reshape(&[s[0], side, side, s[2]])?
            .permute(&[0, 3, 1, 2])?;
        self.decoder.decode(&self.post_quant_conv.forward(&z)?)
    }
}

/// Ids (n) of the rows of a codebook (k, d) nearest to vectors (n, d) in Euclidean distance.
pub fn nearest<B: Backend>(x: &B::Tensor, codebook: &B::Tensor) -> Result<B::Tensor> {
    // argmin |x - c|^2 = argmax <x, c> - |c|^2 / 2
    let k = B::shape(codebook)[0];
    let half = B::affine(
        &B::sum(&B::unary(codebook, Unary::Square)?, &[1])?,
        -0.5,
        0.0,
    )?;
    let score = B::binary(
        &B::matmul(x, codebook, false, true)?,
        &B::reshape(&half, &[1, k])?,
        crate::backend::Binary::Add,
    )?;
    B::argmax_last(&score)
}
