//! The encoder of T5 (Raffel et al. 2020, arXiv 1910.10683), version 1.1, as in flan-t5: tokens of a text to features.
//! Parameter names are those of the checkpoints on Hugging Face.
//!
//! ```text
//! block    x += o(attention(norm x));  x += wo(gelu(wi_0 norm x) * wi_1 norm x)
//! scores   q k^T + bias[bucket(j - i)], not scaled; the first block's bias serves all
//! ```
//!
//! b texts, l positions, C width, h heads, d their size (C need not be h d). Norms are RMS norms; nothing has a bias of
//! its own. Deliberately absent: the decoder, training.

use serde::Deserialize;

use crate::backend::{Backend, Binary, Mask, Precision, Unary};
use crate::error::{Error, Result};
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// The encoder's part of `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    /// Width C.
    pub d_model: usize,
    /// Size d of a head.
    pub d_kv: usize,
    /// Width between the maps of the feed-forward part.
    pub d_ff: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Buckets of relative positions.
    #[serde(default = "buckets")]
    pub relative_attention_num_buckets: usize,
    /// Distance from which all positions share a bucket.
    #[serde(default = "max_distance")]
    pub relative_attention_max_distance: usize,
    /// Added to the mean square in norms.
    #[serde(default = "epsilon")]
    pub layer_norm_epsilon: f64,
    /// The feed-forward part; only `gated-gelu` is supported.
    #[serde(default = "feed_forward_proj")]
    pub feed_forward_proj: String,
}

fn buckets() -> usize {
    32
}
fn max_distance() -> usize {
    128
}
fn epsilon() -> f64 {
    1e-6
}
fn feed_forward_proj() -> String {
    "relu".into()
}

impl Config {
    /// Refuses other kinds of encoder.
    pub fn check(&self) -> Result<(), String> {
        if self.feed_forward_proj != "gated-gelu" {
            return Err(format!(
                "feed_forward_proj {:?}, expected \"gated-gelu\", as flan-t5 has it",
                self.feed_forward_proj
            ));
        }
        let (buckets, most) = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        );
        if !buckets.is_multiple_of(4) || buckets == 0 || most <= buckets / 4 {
            return Err(format!(
                "relative_attention_num_buckets {buckets}, relative_attention_max_distance {most}: expected a multiple \
                 of 4, and more than a quarter of it"
            ));
        }
        let sizes = [
            self.d_model,
            self.d_kv,
            self.d_ff,
            self.num_layers,
            self.num_heads,
        ];
        match sizes.contains(&0) {
            true => Err("a size of 0".into()),
            false => Ok(()),
        }
    }

    /// The bucket of a key this many positions after the query (Raffel et al., section 2.1). Half of the buckets are for each
    /// direction; half of those are exact, and the others grow exponentially up to the greatest distance.
    fn bucket(&self, offset: isize) -> usize {
        let half = self.relative_attention_num_buckets / 2;
        let (exact, distance) = (half / 2, offset.unsigned_abs());
        let side = if offset > 0 { half } else { 0 };
        if distance < exact {
            return side + distance;
        }
        // In f32, as published: a bucket ends where the quotient reaches a whole number.
        let range = (self.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
        let place = (distance as f32 / exact as f32).ln() / range * (half - exact) as f32;
        side + (exact + place as usize).min(half - 1)
    }
}

/// Names of the token embeddings, in order of preference.
pub const EMBEDDINGS: [&str; 2] = ["shared.weight", "encoder.embed_tokens.weight"];

struct Block<B: Backend> {
    attention_norm: Variable<B>,
    q: Variable<B>,
    k: Variable<B>,
    v: Variable<B>,
    o: Variable<B>,
    norm: Variable<B>,
    wi_0: Variable<B>,
    wi_1: Variable<B>,
    wo: Variable<B>,
}

/// The encoder.
pub struct Encoder<B: Backend> {
    config: Config,
    embeddings: Variable<B>,
    /// Bias of each bucket and head (buckets, h).
    positions: Variable<B>,
    blocks: Vec<Block<B>>,
    norm: Variable<B>,
}

impl<B: Backend> Encoder<B> {
    /// Takes the parameters under their published names; `embeddings` is one of [`EMBEDDINGS`].
    pub fn load(loader: &mut Loader<B>, config: &Config, embeddings: &str) -> Result<Self> {
        let c = config.clone();
        let (w, inner, normal) = (c.d_model, c.num_heads * c.d_kv, Init::Normal(0.05));
        let mut block = |i: usize| -> Result<Block<B>> {
            let at = |part: &str| format!("encoder.block.{i}.layer.{part}.weight");
            let mut matrix =
                |part: &str, shape: [usize; 2]| loader.factor(&at(part), &shape, normal);
            let q = matrix("0.SelfAttention.q", [inner, w])?;
            let k = matrix("0.SelfAttention.k", [inner, w])?;
            let v = matrix("0.SelfAttention.v", [inner, w])?;
            let o = matrix("0.SelfAttention.o", [w, inner])?;
            let wi_0 = matrix("1.DenseReluDense.wi_0", [c.d_ff, w])?;
            let wi_1 = matrix("1.DenseReluDense.wi_1", [c.d_ff, w])?;
            let wo = matrix("1.DenseReluDense.wo", [w, c.d_ff])?;
            let mut norm = |part: &str| loader.get(&at(part), &[w], Init::Constant(1.0));
            Ok(Block {
                attention_norm: norm("0.layer_norm")?,
                norm: norm("1.layer_norm")?,
                q,
                k,
                v,
                o,
                wi_0,
                wi_1,
                wo,
            })
        };
        let blocks = (0..c.num_layers).map(&mut block).collect::<Result<_>>()?;
        let table = [c.relative_attention_num_buckets, c.num_heads];
        let positions = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        Ok(Self {
            embeddings: loader.get(embeddings, &[c.vocab_size, w], normal)?,
            positions: loader.get(positions, &table, normal)?,
            blocks,
            norm: loader.get("encoder.final_layer_norm.weight", &[w], Init::Constant(1.0))?,
            config: c,
        })
    }

    /// Features (b, l, C) of texts of these token ids, l the longest text's; beyond a text's end they say nothing.
    pub fn forward(&self, backend: &B, texts: &[&[u32]]) -> Result<B::Tensor> {
        let l = texts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        if l == 0 {
            return Err(Error::Internal("texts without a token".into()));
        }
        let (b, c) = (texts.len(), &self.config);
        let mut ids = vec![0; b * l];
        let mut hidden = vec![f32::NEG_INFINITY; b * l];
        for ((ids, hidden), text) in ids
            .chunks_exact_mut(l)
            .zip(hidden.chunks_exact_mut(l))
            .zip(texts)
        {
            ids[..text.len()].copy_from_slice(text);
            hidden[..text.len()].fill(0.0);
        }
        let hidden = backend.floats(&hidden, &[b, 1, 1, l])?;
        let bias = B::binary(&self.bias(backend, l)?, &hidden, Binary::Add)?; // (b, h, l, l)
        let mask = Mask::Bias(bias);
        let (h, d, eps) = (c.num_heads, c.d_kv, c.layer_norm_epsilon);
        let mut x = self.embeddings.rows(&backend.indices(&ids, &[b, l])?)?; // (b, l, C)
        for block in &self.blocks {
            let y = x.rms_norm(&block.attention_norm, eps, Precision::Storage)?;
            let head = |w: &Variable<B>| y.linear(w, None)?.reshape(&[b, l, h, d]);
            let (q, k, v) = (head(&block.q)?, head(&block.k)?, head(&block.v)?);
            let y = Variable::attention(&q, &k, &v, &mask, 1.0)?.reshape(&[b, l, h * d])?;
            x = x.add(&y.linear(&block.o, None)?)?;
            let y = x.rms_norm(&block.norm, eps, Precision::Storage)?;
            let gate = y.linear(&block.wi_0, None)?.unary(Unary::GeluTanh)?;
            let y = gate.mul(&y.linear(&block.wi_1, None)?)?;
            x = x.add(&y.linear(&block.wo, None)?)?;
        }
        Ok(x.rms_norm(&self.norm, eps, Precision::Storage)?
            .value()
            .clone())
    }

    /// The bias of relative positions: (1, h, l, l).
    fn bias(&self, backend: &B, l: usize) -> Result<B::Tensor> {
        let buckets: Vec<u32> = (0..l * l)
            .map(|at| self.config.bucket((at % l) as isize - (at / l) as isize) as u32)
            .collect();
        let bias = B::rows(self.positions.value(), &backend.indices(&buckets, &[l, l])?)?; // (l, l, h)
        let bias = B::permute(&bias, &[2, 0, 1])?;
        B::reshape(&bias, &[1, self.config.num_heads, l, l])
    }
}
