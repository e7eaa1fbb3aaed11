//! LlamaGen (Sun et al. 2024, arXiv 2406.06525): a class-conditional Llama over raster-ordered image tokens, and its
//! Distilled Decoding student (arXiv 2412.17153). Parameter names are those of the published checkpoints.
//!
//! ```text
//! teacher  [class, q_1, .., q_{n-1}] -> blocks -> logits of q_1 .. q_n
//! student  [class, x_1, .., x_n]     -> blocks -> logits and codebook vectors at the n token positions
//! block    x += wo(attention(rope(wqkv(norm x))));  x += w2(silu(w1 norm x) * w3 norm x)
//! ```
//!
//! b batch, l positions, C width, h heads, d = C/h. Rotary positions are two-dimensional: the first half of the head
//! dimension turns by the row, the second by the column; at the condition the table is zero, and so q and k are.

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Mask};
use crate::error::{Error, Result};
use crate::model::continuous::Continuous;
use crate::model::decoding::{Cache, guide, rows};
use crate::model::{Generation, Prediction, Student, Teacher, TokenShape};
use crate::tape::{Var, unpack};
use crate::weights::{Floats, Init, Loader, Weights};

const NORM_EPS: f64 = 1e-5;
const ROPE_BASE: f64 = 10_000.0;

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
    /// Tokens along each side of the square map.
    pub side: usize,
    /// Number of classes.
    pub classes: usize,
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

    fn hidden(&self) -> usize {
        (2 * 4 * self.width / 3).next_multiple_of(256)
    }

    /// The student of a teacher of this shape with at least as many blocks: its shape, and the weights it starts from.
    ///
    /// Token embeddings become a linear map of codebook vectors and are drawn anew; blocks beyond the teacher's add
    /// nothing at first.
    pub fn student_start(&self, depth: usize, mut weights: Weights) -> (Self, Weights) {
        weights.remove("tok_embeddings.weight");
        for i in self.depth..depth {
            let silent = [
                ("attention.wo.weight", [self.width, self.width]),
                ("feed_forward.w2.weight", [self.width, self.hidden()]),
            ];
            for (name, shape) in silent {
                let data = vec![0.0; shape.iter().product()];
                let shape = shape.to_vec();
                weights.insert(format!("layers.{i}.{name}"), Floats { shape, data });
            }
        }
        let student = Self {
            depth,
            ..self.clone()
        };
        (student, weights)
    }

    /// Shape of its token sequences.
    pub fn token_shape(&self) -> TokenShape {
        TokenShape {
            steps: vec![1; self.side * self.side],
            vocabulary: self.vocabulary,
            dim: self.codebook_dim,
            classes: self.classes,
        }
    }
}

struct Block<B: Backend> {
    attention_norm: Var<B>,
    wqkv: Var<B>,
    wo: Var<B>,
    ffn_norm: Var<B>,
    w1: Var<B>,
    w3: Var<B>,
    /// w1 above w3, kept when they do not change.
    w13: Option<Var<B>>,
    w2: Var<B>,
}

/// The part that teacher and student share.
struct Stack<B: Backend> {
    config: Config,
    blocks: Vec<Block<B>>,
    norm: Var<B>,
    output: Var<B>,
    class_embedding: Var<B>,
    /// cos and sin of the rotary positions, each (1 + side^2, d/2).
    rope: (B::Tensor, B::Tensor),
}

impl<B: Backend> Block<B> {
    fn load(loader: &mut Loader<B>, c: &Config, i: usize) -> Result<Self> {
        let (w, h) = (c.width, c.hidden());
        let mut matrix = |name: &str, shape: [usize; 2]| {
            loader.factor(&format!("layers.{i}.{name}"), &shape, Init::Normal(0.02))
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
            Some(Var::cat(&[&w1, &w3], 0)?)
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

    fn feed_forward(&self, x: &Var<B>) -> Result<Var<B>> {
        let w13 = match &self.w13 {
            Some(kept) => kept.clone(),
            None => Var::cat(&[&self.w1, &self.w3], 0)?,
        };
        let inner = x
            .rms_norm(&self.ffn_norm, NORM_EPS)?
            .linear(&w13, None)?
            .swiglu()?;
        x.add(&inner.linear(&self.w2, None)?)
    }

    /// All positions at once: x (b, l, C).
    fn forward(
        &self,
        x: &Var<B>,
        heads: usize,
        rope: &(B::Tensor, B::Tensor),
        scale: f64,
    ) -> Result<Var<B>> {
        let qkv = x
            .rms_norm(&self.attention_norm, NORM_EPS)?
            .linear(&self.wqkv, None)?; // (b, l, 3 C)
        let y = qkv.packed_attention(heads, rope, &Mask::Causal, scale)?; // (b, l, C)
        self.feed_forward(&x.add(&y.linear(&self.wo, None)?)?)
    }

    /// The positions from `at` on, given the keys and values before them: x (b, l, C).
    fn step(&self, x: &Var<B>, at: usize, cache: &Cache<B>, stack: &Stack<B>) -> Result<Var<B>> {
        let (shape, heads) = (x.shape(), stack.config.heads);
        let l = shape[1];
        let qkv = x
            .rms_norm(&self.attention_norm, NORM_EPS)?
            .linear(&self.wqkv, None)?;
        let [q, k, v] = unpack::<B>(qkv.value(), heads)?;
        let table = |t: &B::Tensor| B::narrow(t, 0, at, l);
        let (cos, sin) = (table(&stack.rope.0)?, table(&stack.rope.1)?);
        let (k, v) = cache.extend(at, &B::rope(&k, &cos, &sin)?, &v)?;
        let q = B::rope(&q, &cos, &sin)?;
        let y = B::attention(&q, &k, &v, &Mask::Causal, stack.scale())?;
        let y = Var::constant(B::reshape(&y, &shape)?);
        self.feed_forward(&x.add(&y.linear(&self.wo, None)?)?)
    }
}

impl<B: Backend> Stack<B> {
    fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        config.check()?;
        let (w, normal) = (config.width, Init::Normal(0.02));
        Ok(Self {
            class_embedding: loader.get(
                "cls_embedding.embedding_table.weight",
                &[config.classes + 1, w],
                normal,
            )?,
            blocks: (0..config.depth)
                .map(|i| Block::load(loader, config, i))
                .collect::<Result<_>>()?,
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

    fn forward(&self, mut x: Var<B>) -> Result<Var<B>> {
        let l = x.shape()[1];
        let rope = (
            B::narrow(&self.rope.0, 0, 0, l)?,
            B::narrow(&self.rope.1, 0, 0, l)?,
        );
        for block in &self.blocks {
            x = block.forward(&x, self.config.heads, &rope, self.scale())?;
        }
        Ok(x)
    }

    fn logits(&self, x: &Var<B>) -> Result<Var<B>> {
        x.rms_norm(&self.norm, NORM_EPS)?.linear(&self.output, None)
    }

    /// Class embeddings (b, 1, C) of class ids (b).
    fn condition(&self, labels: &B::Tensor) -> Result<Var<B>> {
        let b = B::shape(labels)[0];
        self.class_embedding
            .rows(labels)?
            .reshape(&[b, 1, self.config.width])
    }
}

/// cos and sin (1 + side^2, d/2): zero at the condition, then the angles of (row, column) in raster order.
fn rope_table<B: Backend>(backend: &B, c: &Config) -> Result<(B::Tensor, B::Tensor)> {
    let pairs = c.width / c.heads / 2;
    let quarter = pairs / 2;
    let angle =
        |position: usize, i: usize| position as f64 / ROPE_BASE.powf(2.0 * i as f64 / pairs as f64);
    let (mut cos, mut sin) = (vec![0.0; pairs], vec![0.0; pairs]);
    for cell in 0..c.side * c.side {
        let (row, column) = (cell / c.side, cell % c.side);
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
    let shape = [1 + c.side * c.side, pairs];
    Ok((backend.floats(&cos, &shape)?, backend.floats(&sin, &shape)?))
}

/// The AR teacher.
pub struct Gpt<B: Backend> {
    stack: Stack<B>,
    embedding: Var<B>,
    tokens: TokenShape,
}

impl<B: Backend> Gpt<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let stack = Stack::load(loader, config)?;
        let shape = [config.vocabulary, config.width];
        let embedding = loader.get("tok_embeddings.weight", &shape, Init::Normal(0.02))?;
        Ok(Self {
            stack,
            embedding,
            tokens: config.token_shape(),
        })
    }
}

impl<B: Backend> Teacher<B> for Gpt<B> {
    fn tokens(&self) -> &TokenShape {
        &self.tokens
    }

    fn forced(&self, labels: &B::Tensor, tokens: &B::Tensor) -> Result<Var<B>> {
        let l = self.tokens.tokens();
        let embedded = self.embedding.rows(&B::narrow(tokens, 1, 0, l - 1)?)?; // (b, l-1, C)
        let x = Var::cat(&[&self.stack.condition(labels)?, &embedded], 1)?; // (b, l, C)
        self.stack.logits(&self.stack.forward(x)?)
    }

    fn generate<'a>(
        &'a self,
        labels: &[u32],
        guidance: Option<f64>,
    ) -> Result<Box<dyn Generation<B> + 'a>> {
        let c = &self.stack.config;
        let guidance = guidance.filter(|&s| s != 1.0);
        let beside = self.embedding.value();
        let rows = rows::<B>(beside, labels, c.classes, guidance.is_some())?;
        let shape = [
            B::shape(&rows)[0],
            self.tokens.tokens(),
            c.heads,
            c.width / c.heads,
        ];
        Ok(Box::new(Decoding {
            gpt: self,
            labels: rows,
            guidance,
            caches: Cache::blocks(beside, c.depth, shape)?,
            at: 0,
        }))
    }
}

/// One generation of the teacher; with guidance the batch holds the conditional rows, then the unconditional ones.
struct Decoding<'a, B: Backend> {
    gpt: &'a Gpt<B>,
    labels: B::Tensor,
    guidance: Option<f64>,
    caches: Vec<Cache<B>>,
    at: usize,
}

impl<B: Backend> Generation<B> for Decoding<'_, B> {
    fn advance(&mut self, previous: Option<&B::Tensor>) -> Result<B::Tensor> {
        let stack = &self.gpt.stack;
        let mut x = match previous {
            None => stack.condition(&self.labels)?,
            Some(ids) if self.guidance.is_some() => {
                self.gpt.embedding.rows(&B::cat(&[ids, ids], 0)?)?
            }
            Some(ids) => self.gpt.embedding.rows(ids)?,
        };
        for (block, cache) in stack.blocks.iter().zip(&self.caches) {
            x = block.step(&x, self.at, cache, stack)?;
        }
        self.at += x.shape()[1];
        let logits = stack.logits(&x)?; // (b or 2b, 1, K)
        match self.guidance {
            Some(s) => guide::<B>(logits.value(), s),
            None => Ok(logits.value().clone()),
        }
    }
}

/// The Distilled Decoding student.
pub struct GptStudent<B: Backend> {
    stack: Stack<B>,
    embedding: Var<B>,
    embedding_bias: Var<B>,
    noise_or_data: Var<B>,
    continuous: Continuous<B>,
    tokens: TokenShape,
}

impl<B: Backend> GptStudent<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let (w, d) = (config.width, config.codebook_dim);
        let stack = Stack::load(loader, config)?;
        let bound = (d as f32).sqrt().recip();
        Ok(Self {
            stack,
            embedding: loader.factor("tok_embeddings.weight", &[w, d], Init::Uniform(bound))?,
            embedding_bias: loader.get("tok_embeddings.bias", &[w], Init::Uniform(bound))?,
            noise_or_data: loader.get("n_d_embed.weight", &[2, w], Init::Normal(0.02))?,
            continuous: Continuous::load(loader, w, d)?,
            tokens: config.token_shape(),
        })
    }
}

impl<B: Backend> Student<B> for GptStudent<B> {
    fn tokens(&self) -> &TokenShape {
        &self.tokens
    }

    fn predict(
        &self,
        x: &B::Tensor,
        labels: &B::Tensor,
        data: &B::Tensor,
    ) -> Result<Prediction<B>> {
        let (b, l) = (B::shape(x)[0], self.tokens.tokens());
        let condition = self.stack.condition(labels)?; // (b, 1, C)
        let x = Var::constant(x.clone()).linear(&self.embedding, Some(&self.embedding_bias))?; // (b, l, C)
        let x = Var::cat(&[&condition, &x], 1)?; // (b, 1+l, C)
        // The class token counts as data.
        let ones = B::indices_beside(data, &vec![1; b], &[b, 1])?;
        let kinds = self.noise_or_data.rows(&B::cat(&[&ones, data], 1)?)?;
        let hidden = self.stack.forward(x.add(&kinds)?)?;
        let logits = self.stack.logits(&hidden.narrow(1, 1, l)?)?;
        Ok(Prediction {
            logits,
            hidden,
            condition,
        })
    }

    fn continuous(&self, prediction: &Prediction<B>) -> Result<Var<B>> {
        self.continuous.forward(prediction)
    }
}
