//! The AR teacher: all positions in one pass, or token by token.

use super::{Config, DEVIATION, PrefixPositions, Stack, UNCONDITIONAL, VisiblePositions, mask};
use crate::backend::{Backend, ReplayState};
use crate::error::Result;
use crate::model::decoding::{Cache, conditional, guide, guided, rows};
use crate::model::dropout::Dropout;
use crate::model::{
    BatchConditioning, CaptionBatch, ConditioningShape, Generation, Guidance, PrefixMask, Teacher,
    TokenShape,
};
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// The unconditional input.
enum Unconditional<B: Backend> {
    /// A row of the class embedding.
    Class(usize),
    /// Features (T, F).
    Features(Variable<B>),
}

/// The AR teacher.
pub struct Gpt<B: Backend> {
    stack: Stack<B>,
    embedding: Variable<B>,
    without: Unconditional<B>,
    tokens: TokenShape,
}

impl<B: Backend> Gpt<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let stack = Stack::load(loader, config)?;
        let shape = [config.vocabulary, config.width];
        let without = match config.condition {
            ConditioningShape::Classes(classes) => Unconditional::Class(classes),
            ConditioningShape::Captions(c) => {
                let normal = Init::Normal((c.width as f32).sqrt().recip());
                let shape = [c.positions, c.width];
                Unconditional::Features(loader.get(UNCONDITIONAL, &shape, normal)?)
            }
        };
        Ok(Self {
            embedding: loader.get("tok_embeddings.weight", &shape, Init::Normal(DEVIATION))?,
            stack,
            without,
            tokens: config.token_shape(),
        })
    }

    /// The leading positions: with guidance those of the conditioning, then the unconditional ones.
    fn front(
        &self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
    ) -> Result<PrefixPositions<B>> {
        match guidance {
            Some(_) => self.stack.front(&self.doubled(conditioning)?),
            None => self.stack.front(conditioning),
        }
    }

    /// Embeddings (b or 2b, l, C) of tokens (b, l).
    fn embedded(&self, ids: &B::Tensor, guidance: Option<Guidance>) -> Result<Variable<B>> {
        match guidance {
            Some(_) => self.embedding.rows(&B::cat(&[ids, ids], 0)?),
            None => self.embedding.rows(ids),
        }
    }

    /// The conditioning, with dropped captions replaced by the unconditional features.
    fn without_dropped(
        &self,
        conditioning: &BatchConditioning<B>,
    ) -> Result<Option<BatchConditioning<B>>> {
        let (BatchConditioning::Captions(captions), Unconditional::Features(none)) =
            (conditioning, &self.without)
        else {
            return Ok(None);
        };
        if !captions.dropped.contains(&true) {
            return Ok(None);
        }
        let shape = B::shape(&captions.features);
        let rows = [shape[0], 1, 1];
        let share = |kept: f32, dropped: f32| -> Result<Variable<B>> {
            let shares = captions
                .dropped
                .iter()
                .map(|&d| if d { dropped } else { kept });
            let shares: Vec<f32> = shares.collect();
            let shares = B::of(&captions.features).floats(&shares, &rows)?;
            Ok(Variable::constant(shares))
        };
        let none = B::reshape(none.value(), &[1, shape[1], shape[2]])?;
        let none = Variable::constant(B::expand(&none, &shape)?);
        let kept = Variable::constant(captions.features.clone()).mul(&share(1.0, 0.0)?)?;
        Ok(Some(BatchConditioning::Captions(CaptionBatch {
            features: kept.add(&none.mul(&share(0.0, 1.0)?)?)?.value().clone(),
            padding: captions.padding.clone(),
            dropped: Vec::new(),
        })))
    }

    /// The conditioning, then the same number of unconditional rows.
    fn doubled(&self, conditioning: &BatchConditioning<B>) -> Result<BatchConditioning<B>> {
        Ok(match &self.without {
            Unconditional::Class(row) => {
                BatchConditioning::Classes(rows::<B>(conditioning.classes()?, *row, true)?)
            }
            Unconditional::Features(none) => {
                let captions = conditioning.captions()?;
                let shape = B::shape(&captions.features);
                let none = B::reshape(none.value(), &[1, shape[1], shape[2]])?;
                let none = B::expand(&none, &shape)?;
                BatchConditioning::Captions(CaptionBatch {
                    features: B::cat(&[&captions.features, &none], 0)?,
                    padding: captions.padding.repeat(2),
                    dropped: Vec::new(),
                })
            }
        })
    }
}

impl<B: Backend> Teacher<B> for Gpt<B> {
    fn token_shape(&self) -> &TokenShape {
        &self.tokens
    }

    fn forced_with(
        &self,
        conditioning: &BatchConditioning<B>,
        tokens: &B::Tensor,
        dropout: &Dropout,
    ) -> Result<Variable<B>> {
        let l = self.tokens.count();
        let kept = self.without_dropped(conditioning)?;
        let front = self.stack.front(kept.as_ref().unwrap_or(conditioning))?;
        let embedded = self.embedding.rows(&B::narrow(tokens, 1, 0, l - 1)?)?; // (b, l-1, C)
        let x = Variable::cat(&[&front.embeddings, &embedded], 1)?; // (b, T+l-1, C)
        let x = dropout.of_embeddings(x)?;
        let x = self.stack.forward(x, &front.padding, dropout)?;
        let last = self.tokens.condition.positions() - 1;
        self.stack.logits(&x.narrow(1, last, l)?)
    }

    fn recompute(&mut self, blocks: bool) {
        self.stack.recompute = blocks;
    }

    fn generate<'a>(
        &'a self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
    ) -> Result<Box<dyn Generation<B> + 'a>> {
        let c = &self.stack.config;
        let guidance = guiding(guidance);
        let front = self.front(conditioning, guidance)?;
        let all = c.condition.positions() + self.tokens.count();
        let batch = front.embeddings.shape()[0];
        let shape = [batch, all, c.heads, c.width / c.heads];
        Ok(Box::new(Decoding {
            gpt: self,
            hidden: hidden::<B>(front.embeddings.value(), &front.padding, all)?,
            front,
            guidance,
            caches: Cache::blocks(self.embedding.value(), c.depth, shape)?,
            replay: ReplayState::default(),
            at: 0,
            after: 0,
        }))
    }

    /// There is no input for an unknown token: use the mean of all tokens' embeddings.
    fn at_once(
        &self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
        known: Option<&B::Tensor>,
    ) -> Result<B::Tensor> {
        let (l, guidance) = (self.tokens.count(), guiding(guidance));
        let front = self.front(conditioning, guidance)?;
        let given = known.map_or(0, |tokens| B::shape(tokens)[1]);
        let batch = front.embeddings.shape()[0];
        let mut parts = vec![front.embeddings.clone()];
        if let Some(tokens) = known {
            parts.push(self.embedded(tokens, guidance)?);
        }
        let unknown = (l - given).saturating_sub(1);
        if unknown > 0 {
            let mean = self.embedding.mean(&[0])?; // (1, C)
            let shape = [batch, unknown, self.stack.config.width];
            let mean = B::expand(&B::reshape(mean.value(), &[1, 1, shape[2]])?, &shape)?;
            parts.push(Variable::constant(mean));
        }
        let x = Variable::cat(&parts.iter().collect::<Vec<_>>(), 1)?; // (b or 2b, T+l-1, C)
        let x = self.stack.forward(x, &front.padding, &Dropout::default())?;
        let last = self.tokens.condition.positions() - 1 + given;
        let logits = self.stack.logits(&x.narrow(1, last, l - given)?)?;
        if guidance.is_none() {
            return Ok(logits.value().clone());
        }
        // Token k is k steps after the first chosen one.
        let mut runs: Vec<(Option<f64>, usize)> = Vec::new();
        for own in (given..l).map(|k| guided(guidance, k)) {
            match runs.last_mut() {
                Some((scale, count)) if *scale == own => *count += 1,
                _ => runs.push((own, 1)),
            }
        }
        let mut at = 0;
        let parts = runs.into_iter().map(|(scale, count)| {
            let own = B::narrow(logits.value(), 1, at, count)?;
            at += count;
            match scale {
                Some(s) => guide::<B>(&own, s),
                None => conditional::<B>(&own),
            }
        });
        let parts: Vec<B::Tensor> = parts.collect::<Result<_>>()?;
        B::cat(&parts.iter().collect::<Vec<_>>(), 1)
    }
}

/// The published sampler applies guidance only above 1.
fn guiding(guidance: Option<Guidance>) -> Option<Guidance> {
    guidance.filter(|guidance| guidance.scale > 1.0)
}

/// The bias of the scores of positions after the condition: (b, 1, 1, l), -inf at the padding; None without padding.
fn hidden<B: Backend>(like: &B::Tensor, padding: &[usize], l: usize) -> Result<Option<B::Tensor>> {
    if padding.iter().all(|&p| p == 0) {
        return Ok(None);
    }
    let mut bias = vec![0.0; padding.len() * l];
    for (row, &hidden) in bias.chunks_exact_mut(l).zip(padding) {
        row[..hidden].fill(f32::NEG_INFINITY);
    }
    B::of(like)
        .floats(&bias, &[padding.len(), 1, 1, l])
        .map(Some)
}

/// One generation of the teacher; with guidance the batch holds the conditional rows, then the unconditional ones.
struct Decoding<'a, B: Backend> {
    gpt: &'a Gpt<B>,
    front: PrefixPositions<B>,
    hidden: Option<B::Tensor>,
    guidance: Option<Guidance>,
    caches: Vec<Cache<B>>,
    /// The steps after the first.
    replay: ReplayState,
    /// Positions so far.
    at: usize,
    /// Steps since the first chosen one.
    after: usize,
}

impl<B: Backend> Decoding<'_, B> {
    /// Guided logits (b, 1, K) from the embeddings of the latest positions (b or 2b, l, C).
    fn logits(&self, mut x: Variable<B>, seen: &VisiblePositions<'_, B>) -> Result<B::Tensor> {
        let stack = &self.gpt.stack;
        for (block, cache) in stack.blocks.iter().zip(&self.caches) {
            x = block.step(&x, cache, seen, stack)?;
        }
        let last = x.shape()[1] - 1;
        let logits = stack.logits(&x.narrow(1, last, 1)?)?; // (b or 2b, 1, K)
        match (self.guidance, guided(self.guidance, self.after)) {
            (_, Some(s)) => guide::<B>(logits.value(), s),
            (Some(_), None) => conditional::<B>(logits.value()),
            (None, None) => Ok(logits.value().clone()),
        }
    }

    /// The same from the leading positions and those of given tokens.
    fn first(&mut self, x: Variable<B>) -> Result<B::Tensor> {
        self.at = x.shape()[1];
        let mask = mask::<B>(x.value(), &self.front.padding, self.at)?;
        self.logits(x, &VisiblePositions::First(&mask))
    }

    /// The same after tokens (b, 1) at a position, on the host and as a tensor (1).
    fn after(&self, ids: &B::Tensor, at: usize, place: &B::Tensor) -> Result<B::Tensor> {
        let x = self.gpt.embedded(ids, self.guidance)?;
        let hidden = self.hidden.as_ref();
        self.logits(x, &VisiblePositions::Before { at, place, hidden })
    }
}

impl<B: Backend> Generation<B> for Decoding<'_, B> {
    fn advance(&mut self, previous: Option<&B::Tensor>) -> Result<B::Tensor> {
        let Some(ids) = previous else {
            return self.first(self.front.embeddings.clone());
        };
        let at = self.at;
        let before = guided(self.guidance, self.after);
        self.after += 1;
        if guided(self.guidance, self.after) != before {
            // From here on the steps differ from the recorded ones.
            self.replay = ReplayState::default();
        }
        let place = B::of(ids).indices(&[at as u32], &[1])?;
        // Hundreds of steps that differ only in these two.
        let mut kept = std::mem::take(&mut self.replay);
        let logits = B::repeat(&mut kept, &[ids, &place], &mut |inputs| {
            self.after(inputs[0], at, inputs[1])
        })?;
        self.replay = kept;
        self.at += 1;
        Ok(logits)
    }

    fn prefill(&mut self, tokens: &B::Tensor, _: PrefixMask) -> Result<B::Tensor> {
        let embedded = self.gpt.embedded(tokens, self.guidance)?;
        self.first(Variable::cat(&[&self.front.embeddings, &embedded], 1)?)
    }
}
