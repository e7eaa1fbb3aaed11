//! LlamaGen (Sun et al. 2024, arXiv 2406.06525): a Llama over raster-ordered image tokens, conditioned on classes or
//! captions, and its Distilled Decoding student (arXiv 2412.17153). Parameter names are those of the published checkpoints.
//!
//! ```text
//! teacher    [condition, q_1, .., q_{n-1}] -> blocks -> logits of q_1 .. q_n
//! student    [condition, x_1, .., x_n]     -> blocks -> logits and codebook vectors at the n token positions
//! block      x += wo(attention(rope(wqkv(norm x))));  x += w2(silu(w1 norm x) * w3 norm x)
//! condition  one position of a class, or T positions fc2(gelu(fc1(features))) of a caption
//! ```
//!
//! b batch, l positions, T positions of the condition, C width, h heads, d = C/h. Rotary positions are two-dimensional: the
//! first half of the head dimension is rotated by the row, the second by the column. At the condition the table is zero, and
//! so are q and k. A caption ends at position T; padding before it sees only itself and is hidden from all others. With
//! guidance the unconditional rows have the features `uncond_embedding` and the same padding.
//!
//! No student of captions was published. Here it is the student of classes with T leading positions that count as data, and
//! the mean of the caption's embeddings as the condition of the continuous head.

mod student;
mod teacher;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Mask, Precision, Unary, unpack};
use crate::error::{Error, Result};
use crate::model::decoding::Cache;
use crate::model::dropout::{BlockDropout, Dropout};
use crate::model::{BatchConditioning, ConditioningShape, TokenShape};
use crate::size::Sides;
use crate::tape::Variable;
use crate::weights::{Init, InitialValue, Loader, numbered};

pub use student::GptStudent;
pub use teacher::Gpt;

/// Prefixes of the parameters that affect only a student's logits.
pub const LOGITS: [&str; 2] = ["norm.", "output."];

const NORM_EPS: f64 = 1e-5;
const ROPE_BASE: f64 = 10_000.0;
/// Standard deviation of freshly drawn weights.
const DEVIATION: f32 = 0.02;

/// Name of the parameter with an embedding for each class.
pub const CLASS_EMBEDDING: &str = "cls_embedding.embedding_table.weight";
/// Name of the features that stand for no caption. As published, they are random and never trained.
pub const UNCONDITIONAL: &str = "cls_embedding.uncond_embedding";

/// Shape of a LlamaGen network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Width C.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads; C/heads is a multiple of 4.
    pub heads: usize,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub codebook_dim: usize,
    /// Rows and columns of the map of tokens.
    #[serde(rename = "side")]
    pub map: Sides,
    /// What its images are conditioned on.
    #[serde(flatten)]
    pub condition: ConditioningShape,
}

impl Config {
    /// Refuses shapes that cannot be built.
    pub fn check(&self) -> Result<()> {
        if self.heads == 0
            || !self.width.is_multiple_of(self.heads)
            || !(self.width / self.heads).is_multiple_of(4)
        {
            return Err(Error::option(
                "/heads",
                format!(
                    "width {} over {} heads: the head dimension must be a whole multiple of 4 (two-dimensional rotary positions)",
                    self.width, self.heads
                ),
            ));
        }
        Ok(())
    }

    /// Width of a block's feed-forward layer.
    pub fn hidden(&self) -> usize {
        (2 * 4 * self.width / 3).next_multiple_of(256)
    }

    /// The initial value of a parameter in a student with at least as many blocks as this teacher: token embeddings become a
    /// linear map of codebook vectors and are drawn anew; blocks beyond the teacher's start as the identity.
    pub fn start(&self, name: &str) -> InitialValue {
        if name == "tok_embeddings.weight" {
            return InitialValue::Drawn;
        }
        match numbered(name, "layers.") {
            Some((block, "attention.wo.weight" | "feed_forward.w2.weight"))
                if block >= self.depth =>
            {
                InitialValue::Zeros
            }
            _ => InitialValue::Weight(name.to_owned()),
        }
    }

    /// Shape of its token sequences.
    pub fn token_shape(&self) -> TokenShape {
        TokenShape {
            steps: vec![1; self.map.area()],
            vocabulary: self.vocabulary,
            dim: self.codebook_dim,
            condition: self.condition,
        }
    }
}

struct Block<B: Backend> {
    attention_norm: Variable<B>,
    wqkv: Variable<B>,
    wo: Variable<B>,
    ffn_norm: Variable<B>,
    w1: Variable<B>,
    w3: Variable<B>,
    /// w1 stacked on w3, cached if they are constant.
    w13: Option<Variable<B>>,
    w2: Variable<B>,
}

/// The map from the condition to the leading positions.
enum Embedder<B: Backend> {
    /// Class embeddings; the last row is the unconditional one.
    Classes(Variable<B>),
    /// The map of caption features.
    Captions { fc1: Variable<B>, fc2: Variable<B> },
}

/// The positions in front.
struct PrefixPositions<B: Backend> {
    /// Embeddings (b, T, C); those of a caption are zero before its first token.
    embeddings: Variable<B>,
    /// Hidden positions of each row, if there are any.
    padding: Vec<usize>,
}

/// The part that teacher and student share.
struct Stack<B: Backend> {
    config: Config,
    embedder: Embedder<B>,
    blocks: Vec<Arc<Block<B>>>,
    /// Whether the backward pass recomputes blocks.
    recompute: bool,
    norm: Variable<B>,
    output: Variable<B>,
    /// cos and sin of the rotary positions, each (T + n, d/2).
    rope: (B::Tensor, B::Tensor),
}

impl<B: Backend> Block<B> {
    fn load(loader: &mut Loader<B>, c: &Config, i: usize) -> Result<Self> {
        let (w, h) = (c.width, c.hidden());
        let mut matrix = |name: &str, shape: [usize; 2]| {
            loader.factor(
                &format!("layers.{i}.{name}"),
                &shape,
                Init::Normal(DEVIATION),
            )
        };
        let wqkv = matrix("attention.wqkv.weight", [3 * w, w])?;
        let wo = matrix("attention.wo.weight", [w, w])?;
        let w1 = matrix("feed_forward.w1.weight", [h, w])?;
        let w3 = matrix("feed_forward.w3.weight", [h, w])?;
        let w2 = matrix("feed_forward.w2.weight", [w, h])?;
        let mut norm =
            |name: &str| loader.get(&format!("layers.{i}.{name}"), &[w], Init::Constant(1.0));
        let attention_norm = norm("attention_norm.weight")?;
        let ffn_norm = norm("ffn_norm.weight")?;
        let w13 = if loader.frozen() {
            Some(Variable::cat(&[&w1, &w3], 0)?)
        } else {
            None
        };
        Ok(Self {
            attention_norm,
            wqkv,
            wo,
            ffn_norm,
            w1,
            w3,
            w13,
            w2,
        })
    }

    fn feed_forward(&self, x: &Variable<B>, dropout: BlockDropout) -> Result<Variable<B>> {
        let w13 = match &self.w13 {
            Some(kept) => kept.clone(),
            None => Variable::cat(&[&self.w1, &self.w3], 0)?,
        };
        let inner = x
            .rms_norm(&self.ffn_norm, NORM_EPS, Precision::Factor)?
            .linear(&w13, None)?
            .swiglu()?;
        x.add(&dropout.of_feed_forward(inner.linear(&self.w2, None)?)?)
    }

    /// All positions at once: x (b, l, C).
    fn forward(
        &self,
        x: &Variable<B>,
        heads: usize,
        rope: &(B::Tensor, B::Tensor),
        mask: &Mask<B::Tensor>,
        scale: f64,
        dropout: BlockDropout,
    ) -> Result<Variable<B>> {
        let qkv = x
            .rms_norm(&self.attention_norm, NORM_EPS, Precision::Factor)?
            .linear(&self.wqkv, None)?; // (b, l, 3 C)
        let y = qkv.packed_attention(heads, rope, mask, scale)?; // (b, l, C)
        let y = dropout.of_attention(y.linear(&self.wo, None)?)?;
        self.feed_forward(&x.add(&y)?, dropout)
    }

    /// The first positions of a generation, whose keys and values go into the cache, or position `at`: x (b, l, C).
    fn step(
        &self,
        x: &Variable<B>,
        cache: &Cache<B>,
        seen: &VisiblePositions<'_, B>,
        stack: &Stack<B>,
    ) -> Result<Variable<B>> {
        let shape = x.shape();
        let qkv = x
            .rms_norm(&self.attention_norm, NORM_EPS, Precision::Factor)?
            .linear(&self.wqkv, None)?;
        let [q, k, v] = unpack::<B>(qkv.value(), stack.config.heads)?;
        let (cos, sin) = &stack.rope;
        let y = match seen {
            VisiblePositions::First(mask) => {
                let table = |t: &B::Tensor| B::narrow(t, 0, 0, shape[1]);
                let (q, k, v) =
                    cache.extend_turned(0, [&q, &k, &v], [&table(cos)?, &table(sin)?])?;
                B::attention(&q, &k, &v, mask, stack.scale())?
            }
            VisiblePositions::Before { at, place, hidden } => {
                let (qkv, scale) = ([&q, &k, &v], stack.scale());
                cache.attend_next(qkv, [cos, sin], *at, place, *hidden, scale)?
            }
        };
        let y = Variable::constant(B::reshape(&y, &shape)?);
        let x = x.add(&y.linear(&self.wo, None)?)?;
        self.feed_forward(&x, BlockDropout::default())
    }
}

/// The attention mask of a generation's positions.
enum VisiblePositions<'a, B: Backend> {
    /// The first positions see each other causally.
    First(&'a Mask<B::Tensor>),
    /// A later position, `at` (on the host and as a tensor (1)), sees itself and those before it. `hidden` (b, 1, 1, l) is
    /// added to its scores.
    Before {
        at: usize,
        place: &'a B::Tensor,
        hidden: Option<&'a B::Tensor>,
    },
}

impl<B: Backend> Stack<B> {
    fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        config.check()?;
        let w = config.width;
        Ok(Self {
            embedder: Embedder::load(loader, config)?,
            blocks: (0..config.depth)
                .map(|i| Block::load(loader, config, i).map(Arc::new))
                .collect::<Result<_>>()?,
            recompute: false,
            norm: loader.get("norm.weight", &[w], Init::Constant(1.0))?,
            output: loader.factor(
                "output.weight",
                &[config.vocabulary, w],
                Init::Constant(0.0),
            )?,
            rope: rope_table(loader.backend(), config)?,
            config: config.clone(),
        })
    }

    fn scale(&self) -> f64 {
        ((self.config.width / self.config.heads) as f64)
            .sqrt()
            .recip()
    }

    /// All positions, x (b, l, C); the first ones of each row are padding.
    fn forward(
        &self,
        mut x: Variable<B>,
        padding: &[usize],
        dropout: &Dropout,
    ) -> Result<Variable<B>> {
        let l = x.shape()[1];
        let mask = mask::<B>(x.value(), padding, l)?;
        let rope = (
            B::narrow(&self.rope.0, 0, 0, l)?,
            B::narrow(&self.rope.1, 0, 0, l)?,
        );
        let (heads, scale) = (self.config.heads, self.scale());
        for (i, block) in self.blocks.iter().enumerate() {
            let (block, rope, mask) = (Arc::clone(block), rope.clone(), mask.clone());
            let dropout = dropout.of_block(i, self.blocks.len());
            x = Variable::segment(self.recompute, move || {
                block.forward(&x, heads, &rope, &mask, scale, dropout)
            })?;
        }
        Ok(x)
    }

    fn logits(&self, x: &Variable<B>) -> Result<Variable<B>> {
        x.rms_norm(&self.norm, NORM_EPS, Precision::Factor)?
            .linear(&self.output, None)
    }

    /// The leading positions: (b, T, C).
    fn front(&self, conditioning: &BatchConditioning<B>) -> Result<PrefixPositions<B>> {
        Ok(match &self.embedder {
            Embedder::Classes(table) => {
                let ids = conditioning.classes()?;
                let shape = [B::shape(ids)[0], 1, self.config.width];
                PrefixPositions {
                    embeddings: table.rows(ids)?.reshape(&shape)?,
                    padding: Vec::new(),
                }
            }
            Embedder::Captions { fc1, fc2 } => {
                let captions = conditioning.captions()?;
                let features = Variable::constant(captions.features.clone());
                let inner = features.linear(fc1, None)?.unary(Unary::GeluTanh)?;
                PrefixPositions {
                    embeddings: inner.linear(fc2, None)?,
                    padding: captions.padding.clone(),
                }
            }
        })
    }
}

impl<B: Backend> Embedder<B> {
    fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let (w, normal) = (config.width, Init::Normal(DEVIATION));
        Ok(match config.condition {
            ConditioningShape::Classes(classes) => {
                Self::Classes(loader.get(CLASS_EMBEDDING, &[classes + 1, w], normal)?)
            }
            ConditioningShape::Captions(shape) => Self::Captions {
                fc1: loader.factor(
                    "cls_embedding.cap_proj.fc1.weight",
                    &[w, shape.width],
                    normal,
                )?,
                fc2: loader.factor("cls_embedding.cap_proj.fc2.weight", &[w, w], normal)?,
            },
        })
    }
}

impl<B: Backend> PrefixPositions<B> {
    /// A single embedding of the condition (b, 1, C): for a caption the mean over its tokens.
    fn summary(&self) -> Result<Variable<B>> {
        if self.padding.is_empty() {
            return Ok(self.embeddings.clone());
        }
        let t = self.embeddings.shape()[1];
        let shares = self.padding.iter().map(|p| ((t - p) as f32).recip());
        let shares: Vec<f32> = shares.collect();
        let shape = [shares.len(), 1, 1];
        let shares = B::of(self.embeddings.value()).floats(&shares, &shape)?;
        self.embeddings.sum(&[1])?.mul(&Variable::constant(shares))
    }
}

/// The causal mask of l positions, in which padding is visible only to itself.
fn mask<B: Backend>(like: &B::Tensor, padding: &[usize], l: usize) -> Result<Mask<B::Tensor>> {
    if padding.iter().all(|&p| p == 0) {
        return Ok(Mask::Causal);
    }
    let mut bias = vec![f32::NEG_INFINITY; padding.len() * l * l];
    for (square, &hidden) in bias.chunks_exact_mut(l * l).zip(padding) {
        for (i, row) in square.chunks_exact_mut(l).enumerate() {
            row[hidden.min(i)..=i].fill(0.0);
        }
    }
    let shape = [padding.len(), 1, l, l];
    Ok(Mask::Bias(B::of(like).floats(&bias, &shape)?))
}

/// cos and sin (T + n, d/2): zero at the condition, then the angles of (row, column) in raster order.
fn rope_table<B: Backend>(backend: &B, c: &Config) -> Result<(B::Tensor, B::Tensor)> {
    let pairs = c.width / c.heads / 2;
    let quarter = pairs / 2;
    let angle =
        |position: usize, i: usize| position as f64 / ROPE_BASE.powf(2.0 * i as f64 / pairs as f64);
    let front = c.condition.positions();
    let (mut cos, mut sin) = (vec![0.0; front * pairs], vec![0.0; front * pairs]);
    for cell in 0..c.map.area() {
        let (row, column) = (cell / c.map.width, cell % c.map.width);
        for i in 0..pairs {
            let a = if i < quarter {
                angle(row, i)
            } else {
                angle(column, i - quarter)
            };
            cos.push(a.cos() as f32);
            sin.push(a.sin() as f32);
        }
    }
    let shape = [front + c.map.area(), pairs];
    Ok((backend.floats(&cos, &shape)?, backend.floats(&sin, &shape)?))
}
