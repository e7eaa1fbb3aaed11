//! What the engine asks of a tensor library, by topic; monomorphised once per plugin.
//!
//! A backend implements [`Tensors`], about thirty operations, and is complete: the other traits are composed of these.
//! It overrides what pays, one pair of forward and backward at a time. Nothing here knows gradients: the engine's tape
//! (`tape.rs`) owns differentiation and asks for values only. Deliberately absent: random numbers, parameters, optimiser
//! state, files: the engine owns them, so that backends agree and resumed runs are exact.

mod attention;
pub mod choice;
pub mod flow;
pub mod layers;
mod norms;
mod optimiser;
mod sampling;
pub mod tensor;

pub use attention::{Attention, Mask};
pub use layers::{Layers, Window, upsample2};
pub use norms::Norms;
pub(crate) use norms::root_mean_square;
pub use optimiser::{AdamwStep, Optimiser};
pub use sampling::{Recording, Sampling};
pub use tensor::{Binary, Precision, Tensors, Unary};

pub use crate::backend::choice::Truncation;
pub use crate::backend::flow::FlowSolver;

/// A tensor library with all that the engine does with it. Implement the traits it is made of.
pub trait Backend: Layers + Norms + Attention + Optimiser + Sampling {}

impl<B: Layers + Norms + Attention + Optimiser + Sampling> Backend for B {}
