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

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Backend, Mask, Unary};
use crate::error::{Error, Result};
use crate::model::continuous::Continuous;
use crate::model::decoding::{Cache, conditional, guide, guided, rows};
use crate::model::msvq::{self, Quantiser};
use crate::model::{
    ConditionShape, Conditions, Generation, Guidance, Prediction, PrefixMask, Student, Teacher,
    TokenShape,
};
use crate::tape::Variable;
use crate::weights::{Init, Loader, Start, numbered};

/// Prefixes of the parameters from which a student's logits alone come.
pub const LOGITS: [&str; 2] = ["head_nm.", "head."];

const NORM_EPS: f64 = 1e-6;
/// Queries are at most this much longer than unit vectors.
const LONGEST_QUERY: f64 = 100.0;
/// Freshly drawn modulation, in parts of what other matrices are drawn with: gammas, by which blocks begin as almost the
/// identity, and scales and shifts.
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
            condition: ConditionShape::Classes(self.classes),
        }
    }

    /// From what a parameter starts in a student with at least as many blocks as this teacher.
    ///
    /// The student has the class as a scale of its own in front, which takes the level and position of the teacher's
    /// first token. Blocks beyond the teacher's are modulated like its last one and add nothing at first.
    pub fn start(&self, name: &str) -> Start {
        match name {
            "pos_1LC" => return Start::Longer(1),
            "lvl_embed.weight" => return Start::Longer(0),
            _ => {}
        }
        let Some((block, part)) = numbered(name, "blocks.") else {
            return Start::Weight(name.to_owned());
        };
        match part {
            _ if block < self.depth => Start::Weight(name.to_owned()),
            "attn.proj.weight" | "attn.proj.bias" | "ffn.fc2.weight" | "ffn.fc2.bias" => {
                Start::Zeros
            }
            _ if part.starts_with("ada_") => {
                Start::Weight(format!("blocks.{}.{part}", self.depth - 1))
            }
            _ => Start::Drawn,
        }
    }

    /// Standard deviation of freshly drawn weights.
    fn deviation(&self) -> f32 {
        (3.0 * self.width as f32).sqrt().recip()
    }

    /// That of a matrix that writes into the residual stream.
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

/// What the class says to every part of the network.
struct Condition<B: Backend> {
    /// Class embedding (b, C).
    embedding: Variable<B>,
    /// SiLU of it (b, C).
    silu: Variable<B>,
    /// The blocks' shared modulation (b, 6 C), where they share it.
    shared: Option<Variable<B>>,
}

/// How a block's modulation follows from the class.
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
    /// Of queries and values; keys have none.
    bias: [Variable<B>; 2],
    /// Logarithm of the queries' length per head, with L2-normalised attention.
    length: Option<Variable<B>>,
    proj: Linear<B>,
    fc1: Linear<B>,
    fc2: Linear<B>,
}

/// Mixes positions: q, k, v (b, l, h, d) and the softmax scale -> (b, l, h, d).
type Attend<'a, B> =
    dyn Fn(&Variable<B>, &Variable<B>, &Variable<B>, f64) -> Result<Variable<B>> + 'a;

impl<B: Backend> Block<B> {
    fn load(loader: &mut Loader<B>, c: &Config, i: usize) -> Result<Self> {
        let (w, std) = (c.width, c.deviation());
        let adaln = AdaLn::load(loader, c, i)?;
        let qkv = format!("blocks.{i}.attn.mat_qkv.weight");
        let qkv = loader.factor(&qkv, &[3 * w, w], Init::Normal(std))?;
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
            bias,
            length,
            proj: linear("attn.proj", [w, w], c.residual_deviation())?,
            fc1: linear("ffn.fc1", [w, 4 * w], std)?,
            fc2: linear("ffn.fc2", [4 * w, w], c.residual_deviation())?,
        })
    }

    /// x (b, l, C) -> (b, l, C); `kinds` (b, l, C) is what a student adds between attention and feed-forward.
    fn forward(
        &self,
        x: &Variable<B>,
        m: &Modulation<B>,
        kinds: Option<&Variable<B>>,
        attend: &Attend<'_, B>,
    ) -> Result<Variable<B>> {
        let y = self.attention(
            &x.modulated_norm(&m.scale[0], &m.shift[0], NORM_EPS)?,
            attend,
        )?;
        let x = x.gated_add(&y, &m.gamma[0], kinds)?;
        let y = x.modulated_norm(&m.scale[1], &m.shift[1], NORM_EPS)?;
        let y = self.fc1.forward(&y)?.unary_factor(Unary::GeluTanh)?;
        x.gated_add(&self.fc2.forward(&y)?, &m.gamma[1], None)
    }

    fn attention(&self, x: &Variable<B>, attend: &Attend<'_, B>) -> Result<Variable<B>> {
        let s = x.shape();
        let (w, h) = (s[2], self.heads);
        // Three products instead of one: cutting the weights moves less than cutting the activations.
        let project = |i: usize, bias: Option<&Variable<B>>| {
            x.linear(&self.qkv.narrow(0, i * w, w)?, bias)?
                .reshape(&[s[0], s[1], h, w / h])
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

    /// The first position (b, 1, C), without its place.
    fn first(&self, condition: &Condition<B>) -> Result<Variable<B>> {
        part(&condition.embedding, 0, condition.embedding.shape()[1])?.add(&self.start)
    }

    /// What every position adds for its place and scale: (1, l, C).
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

/// The bias (l, l), on the device of `beside`, that lets position i see position j where
/// `sees(level of i, level of j, i == j)`.
fn mask<B: Backend>(
    beside: &B::Tensor,
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
    Ok(Mask::Bias(B::of(beside).floats(&bias, &[l, l])?))
}

/// What the teacher's positions see: their own scale and the coarser ones.
fn teachers_mask<B: Backend>(beside: &B::Tensor, steps: &[usize]) -> Result<Mask<B::Tensor>> {
    mask::<B>(beside, steps, |own, other, _| other <= own)
}

/// The AR teacher, with the tokenizer's quantiser, whose feature maps it feeds on.
pub struct Transformer<B: Backend> {
    config: Config,
    stack: Stack<B>,
    mask: Mask<B::Tensor>,
    quantiser: Quantiser<B>,
    tokens: TokenShape,
}

impl<B: Backend> Transformer<B> {
    /// Takes the parameters under their published names; those of the quantiser stay as they are in training.
    pub fn load(loader: &mut Loader<B>, config: &Config, quantiser: Quantiser<B>) -> Result<Self> {
        let tokens = config.token_shape();
        let stack = Stack::load(loader, config, &tokens.steps)?;
        Ok(Self {
            mask: teachers_mask::<B>(stack.start.value(), &tokens.steps)?,
            stack,
            config: config.clone(),
            quantiser,
            tokens,
        })
    }

    /// The input vectors (b, L - 1, D) of all positions after the first, given tokens (b, L).
    pub fn inputs(&self, tokens: &B::Tensor) -> Result<Variable<B>> {
        self.quantiser.coarser(tokens)
    }

    /// Class ids of a batch, with guidance as many times the unconditional row after them.
    fn rows(&self, conditions: &Conditions<B>, guidance: Option<Guidance>) -> Result<B::Tensor> {
        rows::<B>(
            conditions.classes()?,
            self.config.classes,
            guidance.is_some(),
        )
    }

    /// Logits of all positions, given the inputs (b, L - 1, D) of those after the first.
    fn all(&self, condition: &Condition<B>, inputs: &Variable<B>) -> Result<Variable<B>> {
        let stack = &self.stack;
        let seen = stack.word_embed.forward(inputs)?;
        let mut x = Variable::cat(&[&stack.first(condition)?, &seen], 1)?.add(&stack.places()?)?;
        for block in &stack.blocks {
            let attend = |q: &Variable<B>, k: &Variable<B>, v: &Variable<B>, scale| {
                Variable::attention(q, k, v, &self.mask, scale)
            };
            x = block.forward(&x, &block.adaln.modulation(condition)?, None, &attend)?;
        }
        stack.logits(&x, condition)
    }

    /// Logits (b, l, K) of a scale from those of the rows (b or 2b, l, K), so many scales after the first that was chosen.
    fn guide(
        &self,
        logits: &B::Tensor,
        guidance: Option<Guidance>,
        scale: usize,
        after: usize,
    ) -> Result<B::Tensor> {
        let share = scale as f64 / (self.tokens.steps.len() - 1) as f64;
        match (guidance, guided(guidance, after)) {
            // (1 + t) cond - t uncond = uncond + (1 + t) (cond - uncond)
            (_, Some(w)) => guide::<B>(logits, 1.0 + w * share),
            (Some(_), None) => conditional::<B>(logits),
            (None, None) => Ok(logits.clone()),
        }
    }
}

/// VAR's guidance of 0 is none.
fn guiding(guidance: Option<Guidance>) -> Option<Guidance> {
    guidance.filter(|guidance| guidance.scale != 0.0)
}

impl<B: Backend> Teacher<B> for Transformer<B> {
    fn token_shape(&self) -> &TokenShape {
        &self.tokens
    }

    fn forced(&self, conditions: &Conditions<B>, tokens: &B::Tensor) -> Result<Variable<B>> {
        let condition = self.stack.condition(conditions.classes()?)?;
        self.all(&condition, &self.inputs(tokens)?)
    }

    fn generate<'a>(
        &'a self,
        conditions: &Conditions<B>,
        guidance: Option<Guidance>,
    ) -> Result<Box<dyn Generation<B> + 'a>> {
        let (c, stack, guidance) = (&self.config, &self.stack, guiding(guidance));
        let beside = stack.start.value();
        let rows = self.rows(conditions, guidance)?;
        let condition = stack.condition(&rows)?;
        let modulations = stack.blocks.iter().map(|b| b.adaln.modulation(&condition));
        let shape = [
            B::shape(&rows)[0],
            self.tokens.count(),
            c.heads,
            c.width / c.heads,
        ];
        Ok(Box::new(Decoding {
            teacher: self,
            modulations: modulations.collect::<Result<_>>()?,
            condition,
            places: stack.places()?,
            guidance,
            caches: Cache::blocks(beside, c.depth, shape)?,
            map: None,
            step: 0,
            after: 0,
        }))
    }

    /// Later scales see the feature map of the known ones.
    fn at_once(
        &self,
        conditions: &Conditions<B>,
        guidance: Option<Guidance>,
        known: Option<&B::Tensor>,
    ) -> Result<B::Tensor> {
        let guidance = guiding(guidance);
        let rows = self.rows(conditions, guidance)?;
        let b = B::shape(conditions.classes()?)[0];
        let mut inputs = self.quantiser.coarser_of(b, known)?;
        if guidance.is_some() {
            inputs = Variable::cat(&[&inputs, &inputs], 0)?;
        }
        let logits = self.all(&self.stack.condition(&rows)?, &inputs)?;
        let steps = &self.tokens.steps;
        let known = known.map_or(0, |tokens| B::shape(tokens)[1]);
        let first = self.tokens.steps_within(known);
        let parts = (first..steps.len()).map(|k| {
            let own = logits.narrow(1, self.tokens.tokens_before(k), steps[k])?;
            self.guide(own.value(), guidance, k, 0)
        });
        let parts: Vec<B::Tensor> = parts.collect::<Result<_>>()?;
        B::cat(&parts.iter().collect::<Vec<_>>(), 1)
    }
}

/// One generation of the teacher, scale by scale; with guidance the batch holds the conditional rows, then the
/// unconditional ones. At scale k of S, counted from 0, logits are (1 + t) cond - t uncond with t = w k / (S - 1).
struct Decoding<'a, B: Backend> {
    teacher: &'a Transformer<B>,
    condition: Condition<B>,
    modulations: Vec<Modulation<B>>,
    places: Variable<B>,
    guidance: Option<Guidance>,
    caches: Vec<Cache<B>>,
    /// The feature map of the tokens so far (b, D, n, n).
    map: Option<Variable<B>>,
    /// The next scale.
    step: usize,
    /// Scales after the first that was chosen.
    after: usize,
}

impl<B: Backend> Decoding<'_, B> {
    /// The input (b or 2b, n_k^2, C) of scale k, counted from 0, after the tokens (b, n_(k-1)^2), without its places.
    fn input(&mut self, k: usize, tokens: &B::Tensor) -> Result<Variable<B>> {
        let Transformer {
            quantiser, stack, ..
        } = self.teacher;
        let h = quantiser.contribution(k - 1, &quantiser.codebook().rows(tokens)?)?;
        let map = match self.map.take() {
            Some(map) => map.add(&h)?,
            None => h,
        };
        let x = stack.word_embed.forward(&quantiser.view(k, &map)?)?;
        self.map = Some(map);
        match self.guidance {
            Some(_) => Variable::cat(&[&x, &x], 0),
            None => Ok(x),
        }
    }

    /// Guided logits (b, n_k^2, K) of scale k, the last one of the positions from `at` on, x (b or 2b, l, C), which see those
    /// before them and each other as `mask` says.
    fn run(
        &mut self,
        x: &Variable<B>,
        at: usize,
        k: usize,
        mask: &Mask<B::Tensor>,
    ) -> Result<B::Tensor> {
        let Transformer { stack, tokens, .. } = self.teacher;
        let l = x.shape()[1];
        let mut x = x.add(&self.places.narrow(1, at, l)?)?;
        for ((block, cache), m) in stack.blocks.iter().zip(&self.caches).zip(&self.modulations) {
            let attend = |q: &Variable<B>, k: &Variable<B>, v: &Variable<B>, scale| {
                let (k, v) = cache.extend(at, k.value(), v.value())?;
                let y = B::attention(q.value(), &k, &v, mask, scale)?;
                Ok(Variable::constant(y))
            };
            x = block.forward(&x, m, None, &attend)?;
        }
        let own = x.narrow(1, l - tokens.steps[k], tokens.steps[k])?;
        let logits = stack.logits(&own, &self.condition)?; // (b or 2b, n_k^2, K)
        let logits = self
            .teacher
            .guide(logits.value(), self.guidance, k, self.after)?;
        self.step = k + 1;
        self.after += 1;
        Ok(logits)
    }
}

impl<B: Backend> Generation<B> for Decoding<'_, B> {
    fn advance(&mut self, previous: Option<&B::Tensor>) -> Result<B::Tensor> {
        let Transformer { stack, tokens, .. } = self.teacher;
        let x = match previous {
            None => stack.first(&self.condition)?,
            Some(ids) => self.input(self.step, ids)?,
        };
        let at = tokens.tokens_before(self.step);
        self.run(&x, at, self.step, &Mask::Full)
    }

    fn prefill(&mut self, tokens: &B::Tensor, mask: PrefixMask) -> Result<B::Tensor> {
        let Transformer {
            stack,
            tokens: shape,
            ..
        } = self.teacher;
        let known = shape.steps_within(B::shape(tokens)[1]);
        let mut parts = vec![stack.first(&self.condition)?];
        for k in 1..=known {
            let (at, count) = (shape.tokens_before(k - 1), shape.steps[k - 1]);
            parts.push(self.input(k, &B::narrow(tokens, 1, at, count)?)?);
        }
        let x = Variable::cat(&parts.iter().collect::<Vec<_>>(), 1)?;
        let mask = match mask {
            PrefixMask::Causal => teachers_mask::<B>(x.value(), &shape.steps[..=known])?,
            PrefixMask::Published => Mask::Full,
        };
        self.run(&x, 0, known, &mask)
    }
}

/// What a student adds to each position (b, 1+l, C): its row of the embedding of noise and data (2, C), mapped.
fn mapped<B: Backend>(
    map: &Linear<B>,
    own: &Variable<B>,
    kinds: &B::Tensor,
) -> Result<Variable<B>> {
    map.forward(own)?.rows(kinds)
}

/// The Distilled Decoding student.
pub struct TransformerStudent<B: Backend> {
    stack: Stack<B>,
    mask: Mask<B::Tensor>,
    /// Whether the backward pass computes blocks again.
    recompute: bool,
    /// Rows: noise, data; (2, C).
    noise_or_data: Variable<B>,
    /// Maps of that embedding: one per block, and one for the heads.
    layerwise: Vec<Arc<Linear<B>>>,
    continuous: Continuous<B>,
    tokens: TokenShape,
}

impl<B: Backend> TransformerStudent<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, c: &Config) -> Result<Self> {
        let (w, std) = (c.width, c.deviation());
        let tokens = c.token_shape();
        let mut steps = vec![1];
        steps.extend(&tokens.steps);
        let stack = Stack::load(loader, c, &steps)?;
        Ok(Self {
            mask: mask::<B>(stack.start.value(), &steps, |own, other, itself| {
                other < own || itself
            })?,
            stack,
            noise_or_data: loader.get("n_d_embed.weight", &[2, w], Init::Normal(std))?,
            layerwise: (0..=c.depth)
                .map(|i| {
                    let name = format!("layerwise_n_d_embed.{i}");
                    Linear::load(loader, &name, [w, w], std).map(Arc::new)
                })
                .collect::<Result<_>>()?,
            recompute: false,
            continuous: Continuous::load(loader, w, c.codebook_dim, std)?,
            tokens,
        })
    }
}

impl<B: Backend> Student<B> for TransformerStudent<B> {
    fn token_shape(&self) -> &TokenShape {
        &self.tokens
    }

    fn predict(
        &self,
        x: &B::Tensor,
        conditions: &Conditions<B>,
        data: &B::Tensor,
    ) -> Result<Prediction<B>> {
        let (b, l, stack) = (B::shape(x)[0], self.tokens.count(), &self.stack);
        let condition = Arc::new(stack.condition(conditions.classes()?)?);
        // The class token counts as data.
        let ones = B::of(data).indices(&vec![1; b], &[b, 1])?;
        let kinds = B::cat(&[&ones, data], 1)?; // (b, 1+l)
        let x = stack.word_embed.forward(&Variable::constant(x.clone()))?;
        let x = Variable::cat(&[&stack.first(&condition)?, &x], 1)?.add(&stack.places()?)?;
        let mut x = x.add(&self.noise_or_data.rows(&kinds)?)?; // (b, 1+l, C)
        // The embedding has two rows: they are mapped, then spread over the positions.
        for (block, map) in stack.blocks.iter().zip(&self.layerwise) {
            let (block, map, condition) = (block.clone(), map.clone(), condition.clone());
            let (own, kinds) = (self.noise_or_data.clone(), kinds.clone());
            let mask = self.mask.clone();
            x = Variable::segment(self.recompute, move || {
                let attend = |q: &Variable<B>, k: &Variable<B>, v: &Variable<B>, scale| {
                    Variable::attention(q, k, v, &mask, scale)
                };
                let modulation = block.adaln.modulation(&condition)?;
                let kinds = mapped(&map, &own, &kinds)?;
                block.forward(&x, &modulation, Some(&kinds), &attend)
            })?;
        }
        let last = &self.layerwise[stack.blocks.len()];
        let hidden = x.add(&mapped(last, &self.noise_or_data, &kinds)?)?;
        Ok(Prediction {
            logits: stack.logits(&hidden.narrow(1, 1, l)?, &condition)?,
            hidden,
            condition: part(&condition.embedding, 0, condition.embedding.shape()[1])?,
        })
    }

    fn recompute(&mut self, blocks: bool) {
        self.recompute = blocks;
    }

    fn continuous(&self, prediction: &Prediction<B>) -> Result<Variable<B>> {
        self.continuous.forward(prediction)
    }
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
        let check = |name: &str, expected: Start| assert_eq!(config.start(name), expected);
        let weight = |name: &str| Start::Weight(name.to_owned());
        check("pos_1LC", Start::Longer(1));
        check("lvl_embed.weight", Start::Longer(0));
        check("word_embed.weight", weight("word_embed.weight"));
        check("blocks.1.ffn.fc2.weight", weight("blocks.1.ffn.fc2.weight"));
        check("blocks.2.ffn.fc2.weight", Start::Zeros);
        check("blocks.2.ada_gss", weight("blocks.1.ada_gss"));
        check("blocks.2.attn.mat_qkv.weight", Start::Drawn);
    }
}
