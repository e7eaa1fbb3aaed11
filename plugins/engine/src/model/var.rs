//! VAR (Tian et al. 2024, arXiv 2404.02905): a class-conditional transformer that predicts all tokens of a scale at once,
//! and its Distilled Decoding student (arXiv 2412.17153). Parameter names are those of the published checkpoints.
//!
//! ```text
//! teacher  [class | what scale 2 sees of scale 1 | what scale 3 sees of scales 1, 2 | ..] -> blocks -> logits
//!          a position sees its own scale and the coarser ones
//! student  [class | x_1 | x_2 .. x_5 | ..] -> blocks -> logits and codebook vectors at the token positions
//!          a position sees itself and the coarser scales, the class being the coarsest
//! block    x += gamma1 attention(LN(x) (1 + scale1) + shift1);  student: x += e_block
//!          x += gamma2 ffn(LN(x) (1 + scale2) + shift2)
//! ```
//!
//! gamma, scale and shift are linear in SiLU(class embedding), per block or, with `shared_adaln`, once for all blocks
//! plus an offset per block. b batch, l positions, C width, h heads, d = C/h, D codebook dimension, K codes.

mod student;
mod teacher;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Mask, Precision, Unary};
use crate::error::{Error, Result};
use crate::model::dropout::BlockDropout;
use crate::model::msvq;
use crate::model::{ConditioningShape, TokenShape};
use crate::tape::Variable;
use crate::weights::{Init, InitialValue, Loader, numbered};

pub use student::TransformerStudent;
pub use teacher::Transformer;

/// Prefixes of the parameters that affect only a student's logits.
pub const LOGITS: [&str; 2] = ["head_nm.", "head."];

const NORM_EPS: f64 = 1e-6;
/// Queries are at most this much longer than unit vectors.
const LONGEST_QUERY: f64 = 100.0;
/// Standard deviations of freshly drawn modulation, relative to those of other matrices: of gammas, so that blocks start
/// close to the identity, and of scales and shifts.
const FIRST_GAMMA: f32 = 1e-5;
const FIRST_MODULATION: f32 = 0.5;

/// Name of the parameter with an embedding for each class.
pub const CLASS_EMBEDDING: &str = "class_emb.weight";

/// Shape of a VAR network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Width C.
    pub width: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub codebook_dim: usize,
    /// Sides of the token maps, coarse to fine (published as `patch_nums`).
    pub scales: Vec<usize>,
    /// Number of classes.
    pub classes: usize,
    /// Whether the blocks share the map from the class embedding to their modulation (published as `shared_aln`).
    pub shared_adaln: bool,
    /// Whether queries and keys are L2-normalised, with a learned length per head.
    pub attn_l2_norm: bool,
}

impl Config {
    /// A published size: `d16`, `d20`, `d24`, `d30` for 256 x 256 pixels, `d36` for 512 x 512.
    pub fn published(name: &str) -> Option<Self> {
        let depth = match name {
            "d16" => 16,
            "d20" => 20,
            "d24" => 24,
            "d30" => 30,
            "d36" => 36,
            _ => return None,
        };
        let scales: [usize; 10] = match depth {
            36 => [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
            _ => [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
        };
        Some(Self {
            width: 64 * depth,
            depth,
            heads: depth,
            vocabulary: 4096,
            codebook_dim: 32,
            scales: scales.to_vec(),
            classes: 1000,
            shared_adaln: depth == 36,
            attn_l2_norm: true,
        })
    }

    /// Refuses shapes that cannot be built.
    pub fn check(&self) -> Result<()> {
        if self.heads == 0 || !self.width.is_multiple_of(self.heads) {
            let message = format!(
                "width {} over {} heads: expected a whole head dimension",
                self.width, self.heads
            );
            return Err(Error::option("/heads", message));
        }
        msvq::check_scales(&self.scales, "/scales")
    }

    /// Shape of its token sequences.
    pub fn token_shape(&self) -> TokenShape {
        TokenShape {
            steps: self.scales.iter().map(|n| n * n).collect(),
            vocabulary: self.vocabulary,
            dim: self.codebook_dim,
            condition: ConditioningShape::Classes(self.classes),
        }
    }

    /// The initial value of a parameter in a student with at least as many blocks as this teacher.
    ///
    /// The student has the class as a separate first scale, which takes the level and position of the teacher's first token.
    /// Blocks beyond the teacher's are modulated like its last one and start as the identity.
    pub fn start(&self, name: &str) -> InitialValue {
        match name {
            "pos_1LC" => return InitialValue::Longer(1),
            "lvl_embed.weight" => return InitialValue::Longer(0),
            _ => {}
        }
        let Some((block, part)) = numbered(name, "blocks.") else {
            return InitialValue::Weight(name.to_owned());
        };
        match part {
            _ if block < self.depth => InitialValue::Weight(name.to_owned()),
            "attn.proj.weight" | "attn.proj.bias" | "ffn.fc2.weight" | "ffn.fc2.bias" => {
                InitialValue::Zeros
            }
            _ if part.starts_with("ada_") => {
                InitialValue::Weight(format!("blocks.{}.{part}", self.depth - 1))
            }
            _ => InitialValue::Drawn,
        }
    }

    /// Standard deviation of freshly drawn weights.
    fn deviation(&self) -> f32 {
        (3.0 * self.width as f32).sqrt().recip()
    }

    /// The standard deviation of a matrix that writes into the residual stream.
    fn residual_deviation(&self) -> f32 {
        self.deviation() / (2.0 * self.depth as f32).sqrt()
    }
}

/// A matrix with bias.
struct Linear<B: Backend> {
    weight: Variable<B>,
    bias: Variable<B>,
}

impl<B: Backend> Linear<B> {
    fn load(loader: &mut Loader<B>, name: &str, sizes: [usize; 2], deviation: f32) -> Result<Self> {
        Self::drawn(loader, name, sizes, Init::Normal(deviation))
    }

    fn drawn(
        loader: &mut Loader<B>,
        name: &str,
        [input, output]: [usize; 2],
        init: Init,
    ) -> Result<Self> {
        Ok(Self {
            weight: loader.factor(&format!("{name}.weight"), &[output, input], init)?,
            bias: loader.get(&format!("{name}.bias"), &[output], Init::Constant(0.0))?,
        })
    }

    fn forward(&self, x: &Variable<B>) -> Result<Variable<B>> {
        x.linear(&self.weight, Some(&self.bias))
    }
}

/// The class conditioning of all parts of the network.
struct Condition<B: Backend> {
    /// Class embedding (b, C).
    embedding: Variable<B>,
    /// SiLU of it (b, C).
    silu: Variable<B>,
    /// The blocks' shared modulation (b, 6 C), if they share it.
    shared: Option<Variable<B>>,
}

/// A block's map from the class to its modulation.
enum AdaLn<B: Backend> {
    Own(Linear<B>),
    /// Offset (6 C) to the shared one.
    Shared(Variable<B>),
}

/// A block's modulation, each (b, 1, C); `scale` already with 1 added.
struct Modulation<B: Backend> {
    gamma: [Variable<B>; 2],
    scale: [Variable<B>; 2],
    shift: [Variable<B>; 2],
}

/// Part i of (b, n C) as (b, 1, C).
fn part<B: Backend>(x: &Variable<B>, i: usize, width: usize) -> Result<Variable<B>> {
    let b = x.shape()[0];
    x.narrow(1, i * width, width)?.reshape(&[b, 1, width])
}

impl<B: Backend> AdaLn<B> {
    fn load(loader: &mut Loader<B>, c: &Config, i: usize) -> Result<Self> {
        let w = c.width;
        let drawn = |deviation: f32| Init::Modulation {
            gamma: FIRST_GAMMA * deviation,
            others: FIRST_MODULATION * deviation,
        };
        Ok(if c.shared_adaln {
            let init = drawn((w as f32).sqrt().recip());
            let offset = loader.get(&format!("blocks.{i}.ada_gss"), &[1, 1, 6, w], init)?;
            Self::Shared(offset)
        } else {
            let (name, init) = (format!("blocks.{i}.ada_lin.1"), drawn(c.deviation()));
            Self::Own(Linear::drawn(loader, &name, [w, 6 * w], init)?)
        })
    }

    fn modulation(&self, condition: &Condition<B>) -> Result<Modulation<B>> {
        let width = condition.silu.shape()[1];
        let all = match (self, &condition.shared) {
            (Self::Own(linear), _) => linear.forward(&condition.silu)?,
            (Self::Shared(offset), Some(shared)) => shared.add(&offset.reshape(&[6 * width])?)?,
            (Self::Shared(_), None) => {
                return Err(Error::Internal("no shared modulation".into()));
            }
        }; // (b, 6 C)
        let part = |i| part(&all, i, width);
        let scale = |i| part(i)?.affine(1.0, 1.0);
        Ok(Modulation {
            gamma: [part(0)?, part(1)?],
            scale: [scale(2)?, scale(3)?],
            shift: [part(4)?, part(5)?],
        })
    }
}

struct Block<B: Backend> {
    heads: usize,
    adaln: AdaLn<B>,
    qkv: Variable<B>,
    /// The weights of queries, keys and values apart, if they never change.
    parts: Option<[Variable<B>; 3]>,
    /// Of queries and values; keys have none.
    bias: [Variable<B>; 2],
    /// Logarithm of the queries' length per head, with L2-normalised attention.
    length: Option<Variable<B>>,
    proj: Linear<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
}

/// The attention: q, k, v (b, l, h, d) and the softmax scale -> (b, l, h, d).
type Attend<'a, B> =
    dyn Fn(&Variable<B>, &Variable<B>, &Variable<B>, f64) -> Result<Variable<B>> + 'a;

impl<B: Backend> Block<B> {
    fn load(loader: &mut Loader<B>, c: &Config, i: usize) -> Result<Self> {
        let (w, std) = (c.width, c.deviation());
        let adaln = AdaLn::load(loader, c, i)?;
        let qkv = format!("blocks.{i}.attn.mat_qkv.weight");
        let qkv = loader.factor(&qkv, &[3 * w, w], Init::Normal(std))?;
        let part = |i: usize| qkv.narrow(0, i * w, w);
        let parts = match loader.frozen() {
            true => Some([part(0)?, part(1)?, part(2)?]),
            false => None,
        };
        let mut get = |name: &str, shape: &[usize], init| {
            loader.get(&format!("blocks.{i}.attn.{name}"), shape, init)
        };
        let zero = Init::Constant(0.0);
        let bias = [get("q_bias", &[w], zero)?, get("v_bias", &[w], zero)?];
        let length = if c.attn_l2_norm {
            let four = Init::Constant(4.0f32.ln());
            Some(get("scale_mul_1H11", &[1, c.heads, 1, 1], four)?)
        } else {
            None
        };
        let mut linear = |name: &str, sizes, std| {
            Linear::load(loader, &format!("blocks.{i}.{name}"), sizes, std)
        };
        Ok(Self {
            heads: c.heads,
            adaln,
            qkv,
            parts,
            bias,
            length,
            proj: linear("attn.proj", [w, w], c.residual_deviation())?,
            fc1: linear("ffn.fc1", [w, 4 * w], std)?,
            fc2: linear("ffn.fc2", [4 * w, w], c.residual_deviation())?,
        })
    }

    /// x (b, l, C) -> (b, l, C); `kinds` (b, l, C) is added between attention and feed-forward in a student.
    fn forward(
        &self,
        x: &Variable<B>,
        m: &Modulation<B>,
        kinds: Option<&Variable<B>>,
        attend: &Attend<'_, B>,
        dropout: BlockDropout,
    ) -> Result<Variable<B>> {
        let y = self.attention(
            &x.modulated_norm(&m.scale[0], &m.shift[0], NORM_EPS)?,
            attend,
        )?;
        let y = dropout.of_attention(y)?;
        let x = x.gated_add(&y, &m.gamma[0], kinds)?;
        let y = x.modulated_norm(&m.scale[1], &m.shift[1], NORM_EPS)?;
        let y = self
            .fc1
            .forward(&y)?
            .activation(Unary::GeluTanh, Precision::Factor)?;
        let y = dropout.of_feed_forward(self.fc2.forward(&y)?)?;
        x.gated_add(&y, &m.gamma[1], None)
    }

    fn attention(&self, x: &Variable<B>, attend: &Attend<'_, B>) -> Result<Variable<B>> {
        let s = x.shape();
        let (w, h) = (s[2], self.heads);
        // Three products instead of one: slicing the weights copies less than slicing the activations.
        let project = |i: usize, bias: Option<&Variable<B>>| {
            let y = match &self.parts {
                Some(parts) => x.linear(&parts[i], bias)?,
                None => x.linear(&self.qkv.narrow(0, i * w, w)?, bias)?,
            };
            y.reshape(&[s[0], s[1], h, w / h])
        };
        let (mut q, mut k) = (project(0, Some(&self.bias[0]))?, project(1, None)?);
        let v = project(2, Some(&self.bias[1]))?;
        let scale = match &self.length {
            Some(length) => {
                q = q.unit(Some(&query_length(length, h)?))?;
                k = k.unit(None)?;
                1.0
            }
            None => 0.25 / ((w / h) as f64).sqrt(),
        };
        self.proj.forward(&attend(&q, &k, &v, scale)?.reshape(&s)?)
    }
}

/// exp(min(length, log 100)) of (1, h, 1, 1) as (h).
fn query_length<B: Backend>(length: &Variable<B>, heads: usize) -> Result<Variable<B>> {
    // min(x, m) = m - relu(m - x)
    let most = LONGEST_QUERY.ln();
    let below = length.affine(-1.0, most)?.unary(Unary::Relu)?;
    below
        .affine(-1.0, most)?
        .unary(Unary::Exp)?
        .reshape(&[heads])
}

/// The part that teacher and student share.
struct Stack<B: Backend> {
    class_embedding: Variable<B>,
    start: Variable<B>,
    word_embed: Linear<B>,
    /// Position embeddings (1, l, C).
    positions: Variable<B>,
    /// Scale embeddings, one row per step.
    levels: Variable<B>,
    /// The scale of each position (l).
    level_of: B::Tensor,
    shared_adaln: Option<Linear<B>>,
    blocks: Vec<Arc<Block<B>>>,
    head_norm: Linear<B>,
    head: Linear<B>,
}

impl<B: Backend> Stack<B> {
    /// For positions in steps of these sizes.
    fn load(loader: &mut Loader<B>, c: &Config, steps: &[usize]) -> Result<Self> {
        c.check()?;
        let (w, std) = (c.width, c.deviation());
        let l = steps.iter().sum();
        let normal = Init::Normal(std);
        let level_of = loader.backend().indices(&level_of(steps), &[l])?;
        let shared_adaln = if c.shared_adaln {
            let linear = Linear::load(loader, "shared_ada_lin.1", [w, 6 * w], std)?;
            Some(linear)
        } else {
            None
        };
        Ok(Self {
            class_embedding: loader.get(CLASS_EMBEDDING, &[c.classes + 1, w], normal)?,
            start: loader.get("pos_start", &[1, 1, w], normal)?,
            word_embed: Linear::load(loader, "word_embed", [c.codebook_dim, w], std)?,
            positions: loader.get("pos_1LC", &[1, l, w], normal)?,
            levels: loader.get("lvl_embed.weight", &[steps.len(), w], normal)?,
            level_of,
            shared_adaln,
            blocks: (0..c.depth)
                .map(|i| Block::load(loader, c, i).map(Arc::new))
                .collect::<Result<_>>()?,
            head_norm: Linear::load(
                loader,
                "head_nm.ada_lin.1",
                [w, 2 * w],
                FIRST_MODULATION * std,
            )?,
            head: Linear::load(loader, "head", [w, c.vocabulary], 0.02 * std)?,
        })
    }

    fn condition(&self, labels: &B::Tensor) -> Result<Condition<B>> {
        let embedding = self.class_embedding.rows(labels)?;
        let silu = embedding.unary(Unary::Silu)?;
        let shared = self.shared_adaln.as_ref();
        Ok(Condition {
            shared: shared.map(|linear| linear.forward(&silu)).transpose()?,
            embedding,
            silu,
        })
    }

    /// The first position (b, 1, C), without its position embedding.
    fn first(&self, condition: &Condition<B>) -> Result<Variable<B>> {
        part(&condition.embedding, 0, condition.embedding.shape()[1])?.add(&self.start)
    }

    /// The embeddings of every position's place and scale: (1, l, C).
    fn places(&self) -> Result<Variable<B>> {
        self.positions.add(&self.levels.rows(&self.level_of)?)
    }

    /// Logits (b, l, K) of the stack's output (b, l, C).
    fn logits(&self, x: &Variable<B>, condition: &Condition<B>) -> Result<Variable<B>> {
        let (all, width) = (self.head_norm.forward(&condition.silu)?, x.shape()[2]);
        let scale = part(&all, 0, width)?.affine(1.0, 1.0)?;
        self.head
            .forward(&x.modulated_norm(&scale, &part(&all, 1, width)?, NORM_EPS)?)
    }
}

/// The step of each position, for steps of these sizes.
fn level_of(steps: &[usize]) -> Vec<u32> {
    let each = steps.iter().enumerate();
    each.flat_map(|(k, &n)| std::iter::repeat_n(k as u32, n))
        .collect()
}

/// The bias (l, l), on the device of `like`, that lets position i see position j where
/// `sees(level of i, level of j, i == j)`.
fn mask<B: Backend>(
    like: &B::Tensor,
    steps: &[usize],
    sees: impl Fn(u32, u32, bool) -> bool,
) -> Result<Mask<B::Tensor>> {
    let levels = level_of(steps);
    let l = levels.len();
    let bias: Vec<f32> = (0..l * l)
        .map(|at| {
            let (i, j) = (at / l, at % l);
            if sees(levels[i], levels[j], i == j) {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    Ok(Mask::Bias(B::of(like).floats(&bias, &[l, l])?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes() {
        let d16 = Config::published("d16").expect("a size");
        assert_eq!(
            (d16.width, d16.heads, d16.token_shape().count()),
            (1024, 16, 680)
        );
        assert!(!d16.shared_adaln);
        let d36 = Config::published("d36").expect("a size");
        assert_eq!((d36.width, d36.token_shape().count()), (2304, 2240));
        assert!(d36.shared_adaln);
        assert!(Config::published("d17").is_none());
    }

    #[test]
    fn a_deeper_student_starts_from_the_teacher() {
        let config = Config {
            depth: 2,
            ..Config::published("d16").expect("a size")
        };
        let check = |name: &str, expected: InitialValue| assert_eq!(config.start(name), expected);
        let weight = |name: &str| InitialValue::Weight(name.to_owned());
        check("pos_1LC", InitialValue::Longer(1));
        check("lvl_embed.weight", InitialValue::Longer(0));
        check("word_embed.weight", weight("word_embed.weight"));
        check("blocks.1.ffn.fc2.weight", weight("blocks.1.ffn.fc2.weight"));
        check("blocks.2.ffn.fc2.weight", InitialValue::Zeros);
        check("blocks.2.ada_gss", weight("blocks.1.ada_gss"));
        check("blocks.2.attn.mat_qkv.weight", InitialValue::Drawn);
    }
}
