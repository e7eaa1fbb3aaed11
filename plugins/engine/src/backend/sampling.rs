//! Operations for sampling: recorded and replayed steps, and choosing codes.

use std::any::Any;

use crate::backend::choice::{self, Truncation};
use crate::backend::flow::{self, FlowSolver};
use crate::backend::layers::Layers;
use crate::error::Result;

/// What [`Sampling::repeat`] keeps between calls: private to the backend, initially empty.
#[derive(Default)]
pub struct Recording(pub Option<Box<dyn Any>>);

/// Recorded steps, truncation of logits, drawing of codes, and the flow map.
pub trait Sampling: Layers {
    /// The result of `step` on the inputs. It must do the same operations on each call with what was `kept`, on
    /// tensors of the same shapes, all but the inputs those of the last time; so a backend may note them at one call and
    /// have them done at the next without calling it (a CUDA graph). Positions reach it as inputs. It moves nothing
    /// between host and device. What it returns is overwritten at the next call.
    fn repeat(
        _kept: &mut Recording,
        inputs: &[&Self::Tensor],
        step: &mut dyn FnMut(&[&Self::Tensor]) -> Result<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        step(inputs)
    }

    /// Logits (n, k) over the temperature, -inf where a code is excluded; equal ones go by their index. The default asks the
    /// host.
    fn truncate(logits: &Self::Tensor, truncation: &Truncation) -> Result<Self::Tensor> {
        choice::truncate::<Self>(logits, truncation)
    }

    /// The code of each row of logits (n, k) at which the cumulative probability passes a number in [0, 1): -> ids (n).
    /// The default asks the host.
    fn categorical(logits: &Self::Tensor, uniforms: &[f64]) -> Result<Self::Tensor> {
        choice::categorical::<Self>(logits, uniforms)
    }

    /// AR flow matching (`flow.rs` has the mathematics): logits (n, k) after guidance and truncation
    /// (-inf where excluded), noise (n, d), codebook (k, d) -> ids (n).
    fn flow_map(
        logits: &Self::Tensor,
        noise: &Self::Tensor,
        codebook: &Self::Tensor,
        solver: &FlowSolver,
    ) -> Result<Self::Tensor> {
        flow::composed::<Self>(logits, noise, codebook, solver)
    }
}
