//! The AR teacher: all positions in one pass, or scale by scale.

use std::sync::Arc;

use super::{Condition, Config, Modulation, Stack, mask};
use crate::backend::{Backend, Mask};
use crate::error::Result;
use crate::model::decoding::{Cache, conditional, guide, guided, rows};
use crate::model::dropout::{BlockDropout, Dropout};
use crate::model::msvq::Quantiser;
use crate::model::{BatchConditioning, Generation, Guidance, PrefixMask, Teacher, TokenShape};
use crate::tape::Variable;
use crate::weights::Loader;

/// The teacher's mask: positions see their own scale and the coarser ones.
fn teachers_mask<B: Backend>(like: &B::Tensor, steps: &[usize]) -> Result<Mask<B::Tensor>> {
    mask::<B>(like, steps, |own, other, _| other <= own)
}

/// The AR teacher, with the tokenizer's quantiser, whose feature maps are its input.
pub struct Transformer<B: Backend> {
    config: Config,
    stack: Stack<B>,
    mask: Mask<B::Tensor>,
    quantiser: Quantiser<B>,
    tokens: TokenShape,
    /// Whether the backward pass recomputes blocks.
    recompute: bool,
}

impl<B: Backend> Transformer<B> {
    /// Takes the parameters under their published names; those of the quantiser are not trained.
    pub fn load(loader: &mut Loader<B>, config: &Config, quantiser: Quantiser<B>) -> Result<Self> {
        let tokens = config.token_shape();
        let stack = Stack::load(loader, config, &tokens.steps)?;
        Ok(Self {
            mask: teachers_mask::<B>(stack.start.value(), &tokens.steps)?,
            stack,
            config: config.clone(),
            quantiser,
            tokens,
            recompute: false,
        })
    }

    /// The input vectors (b, L - 1, D) of all positions after the first, given tokens (b, L).
    pub fn inputs(&self, tokens: &B::Tensor) -> Result<Variable<B>> {
        self.quantiser.coarser(tokens)
    }

    /// Class ids of a batch, with guidance followed by the same number of unconditional ones.
    fn rows(
        &self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
    ) -> Result<B::Tensor> {
        rows::<B>(
            conditioning.classes()?,
            self.config.classes,
            guidance.is_some(),
        )
    }

    /// Logits of all positions, given the inputs (b, L - 1, D) of those after the first.
    fn all(
        &self,
        condition: Condition<B>,
        inputs: &Variable<B>,
        dropout: &Dropout,
    ) -> Result<Variable<B>> {
        let (stack, condition) = (&self.stack, Arc::new(condition));
        let seen = stack.word_embed.forward(inputs)?;
        let mut x = Variable::cat(&[&stack.first(&condition)?, &seen], 1)?.add(&stack.places()?)?;
        for (i, block) in stack.blocks.iter().enumerate() {
            let (block, condition) = (Arc::clone(block), Arc::clone(&condition));
            let mask = self.mask.clone();
            let dropout = dropout.of_block(i, stack.blocks.len());
            x = Variable::segment(self.recompute, move || {
                let attend = |q: &Variable<B>, k: &Variable<B>, v: &Variable<B>, scale| {
                    Variable::attention(q, k, v, &mask, scale)
                };
                let modulation = block.adaln.modulation(&condition)?;
                block.forward(&x, &modulation, None, &attend, dropout)
            })?;
        }
        stack.logits(&x, &condition)
    }

    /// Logits (b, l, K) of a scale from those of the rows (b or 2b, l, K), given the number of scales since the first chosen
    /// one.
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

/// In VAR guidance 0 means none.
fn guiding(guidance: Option<Guidance>) -> Option<Guidance> {
    guidance.filter(|guidance| guidance.scale != 0.0)
}

impl<B: Backend> Teacher<B> for Transformer<B> {
    fn token_shape(&self) -> &TokenShape {
        &self.tokens
    }

    fn forced_with(
        &self,
        conditioning: &BatchConditioning<B>,
        tokens: &B::Tensor,
        dropout: &Dropout,
    ) -> Result<Variable<B>> {
        let condition = self.stack.condition(conditioning.classes()?)?;
        self.all(condition, &self.inputs(tokens)?, dropout)
    }

    fn recompute(&mut self, blocks: bool) {
        self.recompute = blocks;
    }

    fn generate<'a>(
        &'a self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
    ) -> Result<Box<dyn Generation<B> + 'a>> {
        let (c, stack, guidance) = (&self.config, &self.stack, guiding(guidance));
        let like = stack.start.value();
        let rows = self.rows(conditioning, guidance)?;
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
            caches: Cache::blocks(like, c.depth, shape)?,
            map: None,
            step: 0,
            after: 0,
        }))
    }

    /// Later scales see the feature map of the known ones.
    fn at_once(
        &self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
        known: Option<&B::Tensor>,
    ) -> Result<B::Tensor> {
        let guidance = guiding(guidance);
        let rows = self.rows(conditioning, guidance)?;
        let b = B::shape(conditioning.classes()?)[0];
        let mut inputs = self.quantiser.coarser_of(b, known)?;
        if guidance.is_some() {
            inputs = Variable::cat(&[&inputs, &inputs], 0)?;
        }
        let logits = self.all(self.stack.condition(&rows)?, &inputs, &Dropout::default())?;
        let steps = &self.tokens.steps;
        let known = known.map_or(0, |tokens| B::shape(tokens)[1]);
        let first = self.tokens.steps_within(known);
        let parts = (first..steps.len()).map(|k| {
            let own = logits.narrow(1, self.tokens.tokens_before(k), steps[k])?;
            // Scale k is k scales after the first chosen one.
            self.guide(own.value(), guidance, k, k)
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
    /// Scales since the first chosen one.
    after: usize,
}

impl<B: Backend> Decoding<'_, B> {
    /// The input (b or 2b, n_k^2, C) of scale k, counted from 0, after the tokens (b, n_(k-1)^2), without position
    /// embeddings.
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

    /// Guided logits (b, n_k^2, K) of scale k, the last scale of the positions from `at` on, x (b or 2b, l, C), which see
    /// those before them and, according to `mask`, each other.
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
            x = block.forward(&x, m, None, &attend, BlockDropout::default())?;
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
