//! The Distilled Decoding student: all positions in one pass.

use super::{Config, DEVIATION, Stack};
use crate::backend::Backend;
use crate::error::Result;
use crate::model::continuous::Continuous;
use crate::model::dropout::Dropout;
use crate::model::{BatchConditioning, Prediction, Student, TokenShape};
use crate::tape::Variable;
use crate::weights::{Init, Loader};

/// The Distilled Decoding student.
pub struct GptStudent<B: Backend> {
    stack: Stack<B>,
    embedding: Variable<B>,
    embedding_bias: Variable<B>,
    noise_or_data: Variable<B>,
    continuous: Continuous<B>,
    tokens: TokenShape,
}

impl<B: Backend> GptStudent<B> {
    /// Takes the parameters under their published names.
    pub fn load(loader: &mut Loader<B>, config: &Config) -> Result<Self> {
        let (w, d) = (config.width, config.codebook_dim);
        let stack = Stack::load(loader, config)?;
        let normal = Init::Normal(DEVIATION);
        Ok(Self {
            stack,
            embedding: loader.factor("tok_embeddings.weight", &[w, d], normal)?,
            embedding_bias: loader.get("tok_embeddings.bias", &[w], Init::Constant(0.0))?,
            noise_or_data: loader.get("n_d_embed.weight", &[2, w], normal)?,
            continuous: Continuous::load(loader, w, d, DEVIATION)?,
            tokens: config.token_shape(),
        })
    }
}

impl<B: Backend> Student<B> for GptStudent<B> {
    fn token_shape(&self) -> &TokenShape {
        &self.tokens
    }

    fn predict(
        &self,
        x: &B::Tensor,
        conditioning: &BatchConditioning<B>,
        data: &B::Tensor,
    ) -> Result<Prediction<B>> {
        let (b, l) = (B::shape(x)[0], self.tokens.count());
        let front = self.stack.front(conditioning)?;
        let t = self.tokens.condition.positions();
        let x =
            Variable::constant(x.clone()).linear(&self.embedding, Some(&self.embedding_bias))?; // (b, l, C)
        let x = Variable::cat(&[&front.embeddings, &x], 1)?; // (b, T+l, C)
        // The condition counts as data.
        let ones = B::of(data).indices(&vec![1; b * t], &[b, t])?;
        let kinds = self.noise_or_data.rows(&B::cat(&[&ones, data], 1)?)?;
        let hidden = self
            .stack
            .forward(x.add(&kinds)?, &front.padding, &Dropout::default())?;
        let logits = self.stack.logits(&hidden.narrow(1, t, l)?)?;
        Ok(Prediction {
            logits,
            hidden,
            condition: front.summary()?,
        })
    }

    fn recompute(&mut self, blocks: bool) {
        self.stack.recompute = blocks;
    }

    fn continuous(&self, prediction: &Prediction<B>) -> Result<Variable<B>> {
        self.continuous.forward(prediction)
    }
}
