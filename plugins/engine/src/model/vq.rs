//! LlamaGen's VQ tokenizer (VQ-16, VQ-8): an encoder and a decoder with a codebook between. Parameter names are those
//! of the published checkpoints.
//!
//! ```text
//! image (b, 3, H, W) -> encoder -> quant_conv -> z (b, D, H/f, W/f) -> nearest code -> tokens (b, L), raster order
//! codes (b, L, D) -> post_quant_conv -> decoder -> image
//! ```
//!
//! With `l2_norm` codes and z are L2-normalised, for the look-up and for decoding.

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Binary, Unary};
use crate::error::Result;
use crate::model::autoencoder::{Conv, Decoder, Encoder, Names, Shape};
use crate::model::{CODEBOOK, Reconstruction, Tokenizer};
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// Shape of a VQ tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Encoder and decoder.
    #[serde(flatten)]
    pub autoencoder: Shape,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub codebook_dim: usize,
    /// Whether codes are L2-normalised.
    pub l2_norm: bool,
}

/// The VQ tokenizer.
pub struct VqModel<B: Backend> {
    config: Config,
    encoder: Encoder<B>,
    decoder: Decoder<B>,
    quant_conv: Conv<B>,
    post_quant_conv: Conv<B>,
    embedding: Variable<B>,
}

impl<B: Backend> VqModel<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let (c, shape) = (config, &config.autoencoder);
        let bound = (c.vocabulary as f32).recip();
        Ok(Self {
            encoder: Encoder::load(loader, shape, Names::Llamagen)?,
            decoder: Decoder::load(loader, shape, Names::Llamagen)?,
            embedding: loader.get(
                CODEBOOK,
                &[c.vocabulary, c.codebook_dim],
                Init::Uniform(bound),
            )?,
            quant_conv: Conv::load(loader, "quant_conv", shape.z_channels, c.codebook_dim, 1)?,
            post_quant_conv: Conv::load(
                loader,
                "post_quant_conv",
                c.codebook_dim,
                shape.z_channels,
                1,
            )?,
            config: c.clone(),
        })
    }

    fn codes(&self) -> Result<Variable<B>> {
        if self.config.l2_norm {
            self.embedding.l2_normalise()
        } else {
            Ok(self.embedding.clone())
        }
    }

    /// Encoder outputs (b L, D), normalised if codes are.
    fn project(&self, images: &Variable<B>) -> Result<Variable<B>> {
        let z = self.quant_conv.forward(&self.encoder.forward(images)?)?; // (b, D, h, w)
        let s = z.shape();
        let z = z
            .permute(&[0, 2, 3, 1])?
            .reshape(&[s[0] * s[2] * s[3], s[1]])?;
        if self.config.l2_norm {
            z.l2_normalise()
        } else {
            Ok(z)
        }
    }
}

impl<B: Backend> Tokenizer<B> for VqModel<B> {
    fn codebook(&self) -> Result<B::Tensor> {
        Ok(self.codes()?.value().clone())
    }

    fn encode(&self, images: &B::Tensor) -> Result<B::Tensor> {
        let z = self.project(&Variable::constant(images.clone()))?;
        let b = B::shape(images)[0];
        B::reshape(
            &nearest::<B>(z.value(), self.codes()?.value())?,
            &[b, z.shape()[0] / b],
        )
    }

    fn decode(&self, latents: &Variable<B>) -> Result<Variable<B>> {
        let (s, map) = (latents.shape(), self.config.autoencoder.map());
        let z = latents
            .reshape(&[s[0], map.height, map.width, s[2]])?
            .permute(&[0, 3, 1, 2])?;
        self.decoder.forward(&self.post_quant_conv.forward(&z)?)
    }

    fn recompute(&mut self, blocks: bool) {
        self.encoder.recompute = blocks;
        self.decoder.recompute = blocks;
    }

    /// With straight-through gradients (van den Oord et al. 2017, arXiv 1711.00937).
    fn reconstruct(&self, images: &B::Tensor) -> Result<Reconstruction<B>> {
        let z = self.project(&Variable::constant(images.clone()))?;
        let codes = self.codes()?;
        let tokens = nearest::<B>(z.value(), codes.value())?;
        let chosen = codes.rows(&tokens)?;
        let distance =
            |a: &Variable<B>, b: &Variable<B>| a.sub(b)?.unary(Unary::Square)?.mean_all();
        let codebook_loss = distance(&chosen, &z.detach())?;
        let commitment_loss = distance(&z, &chosen.detach())?;
        // z + (chosen - z) without gradient: forward the codes, backward as if they were z.
        let through = z.add(&chosen.detach().sub(&z.detach())?)?;
        let b = B::shape(images)[0];
        let (s, map) = (z.shape(), self.config.autoencoder.map());
        let through = through
            .reshape(&[b, map.height, map.width, s[1]])?
            .permute(&[0, 3, 1, 2])?;
        let latents = self.post_quant_conv.forward(&through)?;
        let (images, last) = self.decoder.forward_seen(&latents)?;
        Ok(Reconstruction {
            images,
            z,
            codebook_loss,
            commitment_loss,
            tokens,
            codes: Some(codes),
            last,
        })
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
        Binary::Add,
    )?;
    B::argmax_last(&score)
}
