//! The networks, once each, generic over the backend, and what stages may expect of any family.
//!
//! A family brings a [`Tokenizer`], a [`Teacher`] and a [`Student`]. Tokens of an image are generated in AR steps;
//! a step yields one token (LlamaGen) or all tokens of a scale (VAR). Everything outside this folder speaks of steps
//! and tokens only and does not know families.

pub mod autoencoder;
mod continuous;
mod decoding;
pub mod inception;
pub mod llamagen;
pub mod lpips;
pub mod msvq;
mod resize;
pub mod var;
pub mod vq;

pub use continuous::CONTINUOUS_HEAD;

use crate::backend::Backend;
use crate::error::Result;
use crate::tape::Var;

/// The shape of a model's token sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenShape {
    /// Tokens yielded by each AR step, in order.
    pub steps: Vec<usize>,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub dim: usize,
    /// Number of classes; the class embedding has one row more, the unconditional one.
    pub classes: usize,
}

impl TokenShape {
    /// Tokens of an image.
    pub fn tokens(&self) -> usize {
        self.steps.iter().sum()
    }

    /// Number of tokens in the first `step` AR steps.
    pub fn tokens_before(&self, step: usize) -> usize {
        self.steps[..step.min(self.steps.len())].iter().sum()
    }
}

/// Images to tokens and back.
pub trait Tokenizer<B: Backend> {
    /// Codebook vectors (K, D) as the flow map and the student see them.
    fn codebook(&self) -> Result<B::Tensor>;
    /// Token ids (b, L) of images (b, c, h, w) in [-1, 1].
    fn encode(&self, images: &B::Tensor) -> Result<B::Tensor>;
    /// Images (b, c, h, w), about [-1, 1], of codebook vectors (b, L, D); differentiable.
    fn decode(&self, latents: &Var<B>) -> Result<Var<B>>;
    /// Images (b, c, h, w) in [-1, 1], encoded and decoded, with what training needs.
    fn reconstruct(&self, images: &B::Tensor) -> Result<Reconstruction<B>>;
}

/// What a pass of a tokenizer in training yields.
pub struct Reconstruction<B: Backend> {
    /// Images (b, c, h, w).
    pub images: Var<B>,
    /// The vectors for which codes were looked up (b L, D).
    pub z: Var<B>,
    /// Mean squared distance of the codes to the encoder's outputs, moving the codes.
    pub codebook_loss: Var<B>,
    /// The same, moving the encoder.
    pub commitment_loss: Var<B>,
    /// Ids of all tokens, in any shape.
    pub tokens: B::Tensor,
}

/// Name of the codebook parameter of every tokenizer.
pub const CODEBOOK: &str = "quantize.embedding.weight";

/// An AR model of tokens.
pub trait Teacher<B: Backend> {
    /// Shape of its token sequences.
    fn tokens(&self) -> &TokenShape;
    /// Teacher-forced logits (b, L, K) of tokens (b, L) for class ids (b); differentiable.
    fn forced(&self, labels: &B::Tensor, tokens: &B::Tensor) -> Result<Var<B>>;
    /// Starts generating for class ids; with a classifier-free guidance scale, which means what the family means by it.
    fn generate<'a>(
        &'a self,
        labels: &[u32],
        guidance: Option<f64>,
    ) -> Result<Box<dyn Generation<B> + 'a>>;
}

/// A generation under way: holds the KV cache.
pub trait Generation<B: Backend> {
    /// Guided logits (b, l, K) of the next AR step, given the tokens (b, l') of the previous one (none at first).
    fn advance(&mut self, previous: Option<&B::Tensor>) -> Result<B::Tensor>;
}

/// What a student says of X_t.
pub struct Prediction<B: Backend> {
    /// Logits over the codebook (b, L, K).
    pub logits: Var<B>,
    /// The stack's output from which the continuous head predicts; (b, L + condition, C).
    hidden: Var<B>,
    /// Class embedding (b, 1, C).
    condition: Var<B>,
}

/// A one-pass model from X_t to the final tokens.
pub trait Student<B: Backend> {
    /// Shape of its token sequences.
    fn tokens(&self) -> &TokenShape;
    /// Predicts from X_t (b, L, D) for class ids (b); `data` (b, L) is 1 where X_t holds a token's vector and 0 where
    /// it holds noise.
    fn predict(&self, x: &B::Tensor, labels: &B::Tensor, data: &B::Tensor)
    -> Result<Prediction<B>>;
    /// The continuous head's codebook vectors (b, L, D).
    fn continuous(&self, prediction: &Prediction<B>) -> Result<Var<B>>;
}
