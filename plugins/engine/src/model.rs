//! The networks, once each, generic over the backend, and the interface of every family.
//!
//! A family provides a [`Tokenizer`], a [`Teacher`] and a [`Student`]. An image's tokens are generated in AR steps; a step
//! yields one token (LlamaGen) or all tokens of a scale (VAR). Code outside this folder uses only steps and tokens and does
//! not know families.

pub mod autoencoder;
pub mod classifier;
mod continuous;
mod decoding;
pub mod discriminator;
pub mod dropout;
pub mod inception;
pub mod llamagen;
pub mod lpips;
pub mod msvq;
pub mod resize;
pub mod t5;
pub mod var;
pub mod vq;

pub use continuous::CONTINUOUS_HEAD;

pub use retort_checkpoint::trajectories::{CaptionShape, ConditioningShape};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tape::Variable;
use dropout::Dropout;

/// The shape of a model's token sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenShape {
    /// Tokens yielded by each AR step, in order.
    pub steps: Vec<usize>,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub dim: usize,
    /// Its conditioning.
    pub condition: ConditioningShape,
}

/// The conditioning of a batch, one entry per image.
#[derive(Debug, Clone)]
pub enum BatchConditioning<B: Backend> {
    /// Class ids (b).
    Classes(B::Tensor),
    /// Captions.
    Captions(CaptionBatch<B>),
}

/// Features of a batch's captions, each at the end of its positions.
#[derive(Debug, Clone)]
pub struct CaptionBatch<B: Backend> {
    /// Features (b, T, F), zero before a caption's first token.
    pub features: B::Tensor,
    /// Positions before the first token of each caption; fewer than T.
    pub padding: Vec<usize>,
    /// In training: which captions are replaced by the unconditional features, after the same padding; none if empty.
    pub dropped: Vec<bool>,
}

impl<B: Backend> BatchConditioning<B> {
    /// The class ids, for a family without captions.
    fn classes(&self) -> Result<&B::Tensor> {
        match self {
            Self::Classes(ids) => Ok(ids),
            Self::Captions(_) => Err(Error::Internal(
                "captions for a class-conditional model".into(),
            )),
        }
    }

    /// The captions, for a model of captions.
    fn captions(&self) -> Result<&CaptionBatch<B>> {
        match self {
            Self::Captions(captions) => Ok(captions),
            Self::Classes(_) => Err(Error::Internal(
                "classes for a text-conditional model".into(),
            )),
        }
    }
}

impl TokenShape {
    /// Tokens of an image.
    pub fn count(&self) -> usize {
        self.steps.iter().sum()
    }

    /// Number of AR steps that this many tokens fill.
    pub fn steps_within(&self, tokens: usize) -> usize {
        let mut left = tokens;
        let fits = |&&count: &&usize| {
            let fits = count <= left;
            left = left.saturating_sub(count);
            fits
        };
        self.steps.iter().take_while(fits).count()
    }

    /// Number of tokens in the first `step` AR steps.
    pub fn tokens_before(&self, step: usize) -> usize {
        self.steps[..step.min(self.steps.len())].iter().sum()
    }
}

/// Images to tokens and back.
pub trait Tokenizer<B: Backend> {
    /// Codebook vectors (K, D) as the flow map and the student use them.
    fn codebook(&self) -> Result<B::Tensor>;
    /// Token ids (b, L) of images (b, c, h, w) in [-1, 1].
    fn encode(&self, images: &B::Tensor) -> Result<B::Tensor>;
    /// Images (b, c, h, w), about [-1, 1], of codebook vectors (b, L, D); differentiable.
    fn decode(&self, latents: &Variable<B>) -> Result<Variable<B>>;
    /// Images (b, c, h, w) in [-1, 1], encoded and decoded, with the tensors that training needs.
    fn reconstruct(&self, images: &B::Tensor) -> Result<Reconstruction<B>>;
    /// Whether the activations inside residual and attention blocks are computed again in the backward pass instead of
    /// being kept ([`Variable::segment`]).
    fn recompute(&mut self, blocks: bool);
}

/// The output of a tokenizer's training pass.
pub struct Reconstruction<B: Backend> {
    /// Images (b, c, h, w).
    pub images: Variable<B>,
    /// The vectors for which codes were looked up (b L, D).
    pub z: Variable<B>,
    /// Mean squared distance of the codes to the encoder's outputs, moving the codes.
    pub codebook_loss: Variable<B>,
    /// The same, moving the encoder.
    pub commitment_loss: Variable<B>,
    /// Ids of all tokens, in any shape.
    pub tokens: B::Tensor,
    /// The codebook (K, D) used for the look-up, through which gradients flow, as through `z`.
    pub codes: Option<Variable<B>>,
    /// The input and the kernel of the decoder's last convolution, at which losses compare their gradients.
    pub last: LastConvolution<B>,
}

/// The last convolution, with stride 1, which makes images of the same size.
pub struct LastConvolution<B: Backend> {
    /// Its input (b, C, h, w).
    pub input: B::Tensor,
    /// Its kernel (c, C, k, k).
    pub kernel: B::Tensor,
}

impl<B: Backend> LastConvolution<B> {
    /// Gradient of its kernel, given that of the images.
    pub fn gradient(&self, images: &B::Tensor) -> Result<B::Tensor> {
        let padding = [B::shape(&self.kernel)[2] / 2; 2];
        let (_, gradient) =
            B::conv2d_backward(&self.input, &self.kernel, images, 1, padding, (false, true))?;
        gradient.ok_or_else(|| Error::Internal("no gradient of a kernel".into()))
    }
}

/// Parameters of more than one dimension without weight decay in VAR's published training: lengths of queries, embeddings of
/// positions, offsets of modulations.
const SPARED: [&str; 5] = ["scale_mul", "pos_1LC", "pos_start", "lvl_embed", "ada_gss"];

/// Whether weight decay acts on a parameter: on matrices and other embeddings, as in the published trainings.
pub fn decays(name: &str, shape: &[usize]) -> bool {
    shape.len() > 1 && !name.ends_with("bias") && !SPARED.iter().any(|part| name.contains(part))
}

/// Name of the codebook parameter of every tokenizer.
pub const CODEBOOK: &str = "quantize.embedding.weight";

/// An AR model of tokens.
pub trait Teacher<B: Backend> {
    /// Shape of its token sequences.
    fn token_shape(&self) -> &TokenShape;
    /// Teacher-forced logits (b, L, K) of tokens (b, L); differentiable.
    fn forced(
        &self,
        conditioning: &BatchConditioning<B>,
        tokens: &B::Tensor,
    ) -> Result<Variable<B>> {
        self.forced_with(conditioning, tokens, &Dropout::default())
    }
    /// The same, with some of the network left out.
    fn forced_with(
        &self,
        conditioning: &BatchConditioning<B>,
        tokens: &B::Tensor,
        dropout: &Dropout,
    ) -> Result<Variable<B>>;
    /// Whether the activations inside blocks are computed again in the backward pass instead of being kept
    /// ([`Variable::segment`]).
    fn recompute(&mut self, blocks: bool);
    /// Starts generating.
    fn generate<'a>(
        &'a self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
    ) -> Result<Box<dyn Generation<B> + 'a>>;
    /// Guided logits (b, L - l', K) of all tokens after the known ones (b, l'), which fill whole AR steps, in one pass: each
    /// conditioned only on the known ones.
    fn at_once(
        &self,
        conditioning: &BatchConditioning<B>,
        guidance: Option<Guidance>,
        known: Option<&B::Tensor>,
    ) -> Result<B::Tensor>;
}

/// Classifier-free guidance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance {
    /// Its strength, by the family's definition.
    pub scale: f64,
    /// The last guided AR step, counted from 0 at the step after the first chosen one; all are guided if None. As LlamaGen's
    /// `cfg_interval`.
    pub interval: Option<usize>,
}

/// The mask between the tokens of a generation's prefix.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PrefixMask {
    /// Tokens see their own AR step and the earlier ones, as in training.
    #[default]
    Causal,
    /// As in the released code of the paper. VAR: all scales of the prefix and the first scale after it see each other.
    /// LlamaGen: the same as `causal`.
    Published,
}

/// A generation under way: holds the KV cache.
pub trait Generation<B: Backend> {
    /// Guided logits (b, l, K) of the next AR step, given the tokens (b, l') of the previous one (none at first).
    fn advance(&mut self, previous: Option<&B::Tensor>) -> Result<B::Tensor>;
    /// The same after the tokens (b, l') of the first AR steps, fewer than all, in one pass; instead of the first `advance`.
    fn prefill(&mut self, tokens: &B::Tensor, mask: PrefixMask) -> Result<B::Tensor>;
}

/// A student's prediction.
pub struct Prediction<B: Backend> {
    /// Logits over the codebook (b, L, K).
    pub logits: Variable<B>,
    /// The stack's output, input of the continuous head; (b, condition + L, C).
    hidden: Variable<B>,
    /// Embedding of the condition (b, 1, C).
    condition: Variable<B>,
}

/// A one-pass model from X_t to the final tokens.
pub trait Student<B: Backend> {
    /// Shape of its token sequences.
    fn token_shape(&self) -> &TokenShape;
    /// Predicts from X_t (b, L, D); `data` (b, L) is 1 where X_t holds a token's vector and 0 where it holds noise.
    fn predict(
        &self,
        x: &B::Tensor,
        conditioning: &BatchConditioning<B>,
        data: &B::Tensor,
    ) -> Result<Prediction<B>>;
    /// Whether the activations inside blocks are computed again in the backward pass instead of being kept
    /// ([`Variable::segment`]).
    fn recompute(&mut self, blocks: bool);
    /// The continuous head's codebook vectors (b, L, D).
    fn continuous(&self, prediction: &Prediction<B>) -> Result<Variable<B>>;
}
