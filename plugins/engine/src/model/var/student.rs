//! The Distilled Decoding student: all positions in one pass.

use std::sync::Arc;

use super::{Config, Linear, Stack, mask, part};
use crate::backend::{Backend, Mask};
use crate::error::Result;
use crate::model::continuous::Continuous;
use crate::model::dropout::BlockDropout;
use crate::model::{BatchConditioning, Prediction, Student, TokenShape};
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// A student's additional input at each position (b, 1+l, C): the mapped embedding of noise or data (2, C).
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
    /// Whether the backward pass recomputes blocks.
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
        conditioning: &BatchConditioning<B>,
        data: &B::Tensor,
    ) -> Result<Prediction<B>> {
        let (b, l, stack) = (B::shape(x)[0], self.tokens.count(), &self.stack);
        let condition = Arc::new(stack.condition(conditioning.classes()?)?);
        // The class token counts as data.
        let ones = B::of(data).indices(&vec![1; b], &[b, 1])?;
        let kinds = B::cat(&[&ones, data], 1)?; // (b, 1+l)
        let x = stack.word_embed.forward(&Variable::constant(x.clone()))?;
        let x = Variable::cat(&[&stack.first(&condition)?, &x], 1)?.add(&stack.places()?)?;
        let mut x = x.add(&self.noise_or_data.rows(&kinds)?)?; // (b, 1+l, C)
        // Map the embedding's two rows first, then distribute them over the positions.
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
                block.forward(
                    &x,
                    &modulation,
                    Some(&kinds),
                    &attend,
                    BlockDropout::default(),
                )
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
