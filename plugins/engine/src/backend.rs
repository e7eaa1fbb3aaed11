//! What the engine needs from a tensor library, by topic; monomorphised once per plugin.
//!
//! A backend that implements the thirty or so operations of [`Tensors`] is complete: the other traits have defaults composed
//! of these. It overrides pairs of forward and backward where a kernel is faster. Nothing here records gradients: the
//! engine's tape (`tape.rs`) owns differentiation and asks only for values. Deliberately absent: random numbers, parameters,
//! optimiser state, files: the engine owns them, so that backends agree and resumed runs are exact.

mod attention;
pub mod choice;
mod exchange;
pub mod flow;
pub mod layers;
mod norms;
mod optimiser;
mod sampling;
pub mod tensor;

pub use attention::{Attention, Mask, unpack};
pub use exchange::Exchange;
pub use layers::{Layers, Window, composed_linear_backward, upsample2};
pub use norms::Norms;
pub(crate) use norms::root_mean_square;
pub use optimiser::{AdamwStep, Optimiser};
pub use sampling::{ReplayState, Sampling};
pub use tensor::{Binary, Precision, Tensors, Unary};

pub use crate::backend::choice::Truncation;
pub use crate::backend::flow::FlowSolver;

/// A tensor library with everything that the engine does with it. Implement its supertraits.
pub trait Backend: Layers + Norms + Attention + Optimiser + Exchange + Sampling {}

impl<B: Layers + Norms + Attention + Optimiser + Exchange + Sampling> Backend for B {}
