//! VAR's multi-scale VQ tokenizer (Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2): tokens of one codebook describe a
//! feature map scale by scale, each scale the residual of the coarser ones. Parameter names are those of the published
//! checkpoint.
//!
//! ```text
//! encode  z = quant_conv(encoder(image));  for each scale k: q_k = nearest codes of area(z, n_k);  z -= h_k
//! decode  f = sum_k h_k;  image = decoder(post_quant_conv(f))
//!         h_k = phi_k(bicubic(codes of q_k, n_S)),  phi(h) = h/2 + conv(h)/2
//! ```
//!
//! Scale k has n_k x n_k tokens, n_S = side of z; `area` and `bicubic` resize a map. Tokens of all scales are concatenated,
//! coarse to fine: L = sum of n_k^2. b batch, D codebook dimension, K codes.

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Binary, Unary};
use crate::error::{Error, Result};
use crate::model::autoencoder::{Conv, Decoder, Encoder, Names, Shape};
use crate::model::vq::nearest;
use crate::model::{CODEBOOK, Reconstruction, Tokenizer, resize};
use crate::size::Sides;
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// Shape of a multi-scale VQ tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Encoder and decoder; their `z_channels` are the codebook dimension D.
    #[serde(flatten)]
    pub autoencoder: Shape,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Sides n_k of the token maps, coarse to fine (published as `patch_nums`); the last is the side of z.
    pub scales: Vec<usize>,
    /// Convolutions phi that the scales share (published as `share_quant_resi`).
    pub phi_convs: usize,
}

impl Config {
    /// The published tokenizer `vae_ch160v4096z32` at the resolution that the scales make: 16 pixels a token.
    pub fn published(scales: &[usize]) -> Self {
        Self {
            autoencoder: Shape {
                image_channels: 3,
                image_size: Sides::square(16 * scales.last().copied().unwrap_or(1)),
                channels: 160,
                multipliers: vec![1, 1, 2, 2, 4],
                res_blocks: 2,
                norm_groups: 32,
                z_channels: 32,
            },
            vocabulary: 4096,
            scales: scales.to_vec(),
            phi_convs: 4,
        }
    }

    /// Refuses shapes that cannot be built; `pointer` names the option with the scales.
    pub fn check(&self, pointer: &str) -> Result<()> {
        check_scales(&self.scales, pointer)?;
        let (last, map) = (self.scales[self.scales.len() - 1], self.autoencoder.map());
        if Sides::square(last) == map {
            return Ok(());
        }
        let message = format!(
            "scales {:?}: the last must be {}, the side of the feature map (images of {}, {} levels)",
            self.scales,
            map.height,
            self.autoencoder.image_size,
            self.autoencoder.multipliers.len()
        );
        Err(Error::option(pointer, message))
    }
}

/// Refuses scales that do not grow from a single token.
pub fn check_scales(scales: &[usize], pointer: &str) -> Result<()> {
    if scales.len() >= 2 && scales[0] == 1 && scales.windows(2).all(|w| w[0] < w[1]) {
        return Ok(());
    }
    let message =
        format!("scales {scales:?}: expected growing sides of token maps from 1, as in [1, 2, 4]");
    Err(Error::option(pointer, message))
}

/// Refuses more shared convolutions than the scales would use.
pub fn check_sharing(scales: usize, convs: usize, pointer: &str) -> Result<()> {
    let used = ticks(scales, convs);
    if (0..convs).all(|conv| used.contains(&conv)) {
        return Ok(());
    }
    let message = format!(
        "{convs} convolutions for {scales} scales: not all would be used; try one fewer, or one per scale"
    );
    Err(Error::option(pointer, message))
}

/// Turns tokens into feature maps: the codebook, the resizes and phi. These maps are the input of VAR's transformer.
pub struct Quantiser<B: Backend> {
    scales: Vec<usize>,
    codebook: Variable<B>,
    phi: Vec<Conv<B>>,
    /// The convolution of `phi` at each scale.
    ticks: Vec<usize>,
    /// Matrices of the resize from each scale to the side of the map, and back; None if the sizes are equal.
    up: Vec<Option<Variable<B>>>,
    down: Vec<Option<Variable<B>>>,
}

/// A feature map, scale by scale.
struct Scales<B: Backend> {
    /// The sum of contributions after each scale (b, D, n, n).
    sums: Vec<Variable<B>>,
    /// Tokens (b, L).
    tokens: B::Tensor,
    /// The vectors looked up (b L, D).
    looked_up: B::Tensor,
}

impl<B: Backend> Quantiser<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, c: &Config) -> Result<Self> {
        check_scales(&c.scales, "/scales")?;
        let (side, d) = (c.scales[c.scales.len() - 1], c.autoencoder.z_channels);
        let backend = loader.backend();
        let matrix = |from: usize, to: usize, resize: fn(usize, usize) -> Vec<f32>| {
            if from == to {
                return Ok(None);
            }
            let matrix = backend.floats(&resize(from, to), &[to * to, from * from])?;
            Ok(Some(Variable::constant(matrix)))
        };
        let up = c.scales.iter().map(|&n| matrix(n, side, resize::bicubic));
        let down = c.scales.iter().map(|&n| matrix(side, n, resize::area));
        let (up, down) = (up.collect::<Result<_>>()?, down.collect::<Result<_>>()?);
        let bound = Init::Uniform((c.vocabulary as f32).recip());
        Ok(Self {
            codebook: loader.get(CODEBOOK, &[c.vocabulary, d], bound)?,
            phi: (0..c.phi_convs)
                .map(|i| {
                    Conv::load(
                        loader,
                        &format!("quantize.quant_resi.qresi_ls.{i}"),
                        d,
                        d,
                        3,
                    )
                })
                .collect::<Result<_>>()?,
            ticks: ticks(c.scales.len(), c.phi_convs),
            scales: c.scales.clone(),
            up,
            down,
        })
    }

    /// Codebook (K, D).
    pub fn codebook(&self) -> &Variable<B> {
        &self.codebook
    }

    /// h_k (b, D, n, n) of scale k's codebook vectors (b, n_k^2, D).
    pub fn contribution(&self, k: usize, codes: &Variable<B>) -> Result<Variable<B>> {
        let (s, n) = (codes.shape(), self.scales[self.scales.len() - 1]);
        let mut h = codes.permute(&[0, 2, 1])?; // (b, D, n_k^2)
        if let Some(matrix) = &self.up[k] {
            h = h.linear(matrix, None)?;
        }
        let h = h.reshape(&[s[0], s[2], n, n])?;
        let conv = self.phi[self.ticks[k]].forward(&h)?;
        h.add(&conv)?.affine(0.5, 0.0)
    }

    /// A map (b, D, n, n) resized for scale k: (b, n_k^2, D).
    pub fn view(&self, k: usize, map: &Variable<B>) -> Result<Variable<B>> {
        let s = map.shape();
        let mut x = map.reshape(&[s[0], s[1], s[2] * s[3]])?;
        if let Some(matrix) = &self.down[k] {
            x = x.linear(matrix, None)?;
        }
        x.permute(&[0, 2, 1])
    }

    /// Position of the first token of each scale, and L.
    fn starts(&self) -> Vec<usize> {
        let mut starts = vec![0];
        starts.extend(self.scales.iter().scan(0, |sum, n| {
            *sum += n * n;
            Some(*sum)
        }));
        starts
    }

    /// The map (b, D, n, n) of codebook vectors (b, L, D).
    pub fn map(&self, latents: &Variable<B>) -> Result<Variable<B>> {
        let starts = self.starts();
        let of = |k: usize| {
            let codes = latents.narrow(1, starts[k], starts[k + 1] - starts[k])?;
            self.contribution(k, &codes)
        };
        let mut map = of(0)?;
        for k in 1..self.scales.len() {
            map = map.add(&of(k)?)?;
        }
        Ok(map)
    }

    /// The input of each token position after the first scale, from the coarser scales, given tokens (b, L): (b, L - 1, D).
    pub fn coarser(&self, tokens: &B::Tensor) -> Result<Variable<B>> {
        self.coarser_of(B::shape(tokens)[0], Some(tokens))
    }

    /// The same for a batch of b, given only the tokens (b, l') of the first scales.
    pub fn coarser_of(&self, b: usize, tokens: Option<&B::Tensor>) -> Result<Variable<B>> {
        let starts = self.starts();
        let known = tokens.map_or(0, |tokens| B::shape(tokens)[1]);
        let mut map: Option<Variable<B>> = None;
        let mut views = Vec::new();
        for k in 0..self.scales.len() - 1 {
            let sum = if let Some(tokens) = tokens.filter(|_| starts[k + 1] <= known) {
                let ids = B::narrow(tokens, 1, starts[k], starts[k + 1] - starts[k])?;
                let h = self.contribution(k, &self.codebook.rows(&ids)?)?;
                match map {
                    Some(map) => map.add(&h)?,
                    None => h,
                }
            } else if let Some(map) = map {
                map
            } else {
                let (codebook, side) = (self.codebook.value(), self.scales[self.scales.len() - 1]);
                let shape = [b, B::shape(codebook)[1], side, side];
                Variable::constant(B::of(codebook).full(&shape, 0.0)?)
            };
            views.push(self.view(k + 1, &sum)?);
            map = Some(sum);
        }
        Variable::cat(&views.iter().collect::<Vec<_>>(), 1)
    }

    /// Quantises a map (b, D, n, n), coarse to fine.
    fn quantise(&self, z: &B::Tensor) -> Result<Scales<B>> {
        let (b, d) = (B::shape(z)[0], B::shape(z)[1]);
        let mut left = Variable::constant(z.clone());
        let (mut sums, mut tokens, mut looked_up) =
            (Vec::<Variable<B>>::new(), Vec::new(), Vec::new());
        for k in 0..self.scales.len() {
            let cells = self.scales[k] * self.scales[k];
            let x = self.view(k, &left)?.reshape(&[b * cells, d])?;
            let ids = B::reshape(
                &nearest::<B>(x.value(), self.codebook.value())?,
                &[b, cells],
            )?;
            let h = self.contribution(k, &self.codebook.rows(&ids)?)?;
            left = left.sub(&h.detach())?;
            sums.push(match sums.last() {
                Some(sum) => sum.add(&h)?,
                None => h,
            });
            tokens.push(ids);
            looked_up.push(x.value().clone());
        }
        Ok(Scales {
            sums,
            tokens: B::cat(&tokens.iter().collect::<Vec<_>>(), 1)?,
            looked_up: B::cat(&looked_up.iter().collect::<Vec<_>>(), 0)?,
        })
    }
}

/// Which of `convs` convolutions each of the `scales` scales uses: the one whose tick is nearest to k/(scales - 1).
///
/// Ties occur (k = 2 and 7 of 10 scales lie half-way between ticks) and rounding decides them, so the ticks are computed in
/// float64 exactly as in the published code (NumPy's `linspace`; the first of equals wins).
fn ticks(scales: usize, convs: usize) -> Vec<usize> {
    let share = if convs == 4 { 3.0 } else { 2.0 };
    let edge = 1.0 / share / convs as f64;
    let (first, last) = (edge, 1.0 - edge);
    let step = (last - first) / (convs - 1).max(1) as f64;
    let tick = |i: usize| match i {
        0 => first,
        i if i + 1 == convs => last,
        i => i as f64 * step + first,
    };
    let nearest = |k: usize| {
        let at = k as f64 / (scales - 1) as f64;
        let away = |i: usize| (tick(i) - at).abs();
        (1..convs).fold(0, |best, i| if away(i) < away(best) { i } else { best })
    };
    (0..scales).map(nearest).collect()
}

/// The multi-scale VQ tokenizer.
pub struct MultiScaleVq<B: Backend> {
    encoder: Encoder<B>,
    decoder: Decoder<B>,
    quant_conv: Conv<B>,
    post_quant_conv: Conv<B>,
    quantiser: Quantiser<B>,
}

impl<B: Backend> MultiScaleVq<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, c: &Config) -> Result<Self> {
        c.check("/scales")?;
        let (shape, d) = (&c.autoencoder, c.autoencoder.z_channels);
        Ok(Self {
            encoder: Encoder::load(loader, shape, Names::Var)?,
            decoder: Decoder::load(loader, shape, Names::Var)?,
            quant_conv: Conv::load(loader, "quant_conv", d, d, 3)?,
            post_quant_conv: Conv::load(loader, "post_quant_conv", d, d, 3)?,
            quantiser: Quantiser::load(loader, c)?,
        })
    }

    fn decode_map(&self, map: &Variable<B>) -> Result<Variable<B>> {
        self.decoder.forward(&self.post_quant_conv.forward(map)?)
    }

    /// Images (b, c, h, w) -> z (b, D, n, n).
    fn project(&self, images: &B::Tensor) -> Result<Variable<B>> {
        let z = self.encoder.forward(&Variable::constant(images.clone()))?;
        self.quant_conv.forward(&z)
    }
}

impl<B: Backend> Tokenizer<B> for MultiScaleVq<B> {
    fn codebook(&self) -> Result<B::Tensor> {
        Ok(self.quantiser.codebook.value().clone())
    }

    fn encode(&self, images: &B::Tensor) -> Result<B::Tensor> {
        Ok(self
            .quantiser
            .quantise(self.project(images)?.value())?
            .tokens)
    }

    fn decode(&self, latents: &Variable<B>) -> Result<Variable<B>> {
        self.decode_map(&self.quantiser.map(latents)?)
    }

    fn recompute(&mut self, blocks: bool) {
        self.encoder.recompute = blocks;
        self.decoder.recompute = blocks;
    }

    /// With straight-through gradients around the whole quantisation; both losses are means over the scales' sums.
    fn reconstruct(&self, images: &B::Tensor) -> Result<Reconstruction<B>> {
        let z = self.project(images)?;
        let scales = self.quantiser.quantise(z.value())?;
        let count = scales.sums.len();
        let mean = |distance: &dyn Fn(&Variable<B>) -> Result<Variable<B>>| -> Result<Variable<B>> {
            let mut total = distance(&scales.sums[0])?;
            for sum in &scales.sums[1..] {
                total = total.add(&distance(sum)?)?;
            }
            total.affine(1.0 / count as f64, 0.0)
        };
        let square = |a: &Variable<B>, b: &Variable<B>| a.sub(b)?.unary(Unary::Square)?.mean_all();
        let codebook_loss = mean(&|sum| square(sum, &z.detach()))?;
        let commitment_loss = mean(&|sum| square(&z, &sum.detach()))?;
        // z + (sum - z) without gradient: forward the quantised map, backward as if it were z.
        let gap = B::binary(scales.sums[count - 1].value(), z.value(), Binary::Sub)?;
        let through = z.add(&Variable::constant(gap))?;
        let latents = self.post_quant_conv.forward(&through)?;
        let (images, last) = self.decoder.forward_seen(&latents)?;
        let tokens = scales.tokens.clone();
        Ok(Reconstruction {
            images,
            z: Variable::constant(scales.looked_up.clone()),
            codebook_loss,
            commitment_loss,
            tokens,
            codes: None,
            last,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_share_convolutions_by_the_nearest_tick() {
        // Ten scales, four convolutions: the published tokenizer, with its ties.
        assert_eq!(ticks(10, 4), [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]);
        assert_eq!(ticks(4, 4), [0, 1, 2, 3]);
        assert_eq!(ticks(5, 1), [0; 5]);
        assert_eq!(ticks(4, 2), [0, 0, 1, 1]);
    }

    #[test]
    fn no_convolution_is_left_unused() {
        assert!(check_sharing(10, 4, "/phi_convs").is_ok());
        assert!((2..40).all(|scales| check_sharing(scales, scales.min(4), "/phi_convs").is_ok()));
        assert!(check_sharing(3, 4, "/phi_convs").is_err());
        assert!(check_sharing(7, 6, "/phi_convs").is_err());
    }

    #[test]
    fn scales_must_grow() {
        assert!(check_scales(&[1, 2, 4], "/scales").is_ok());
        for bad in [&[][..], &[1], &[0, 2], &[2, 4], &[1, 1], &[1, 4, 2]] {
            assert!(check_scales(bad, "/scales").is_err(), "{bad:?}");
        }
    }
}
