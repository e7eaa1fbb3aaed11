//! Operations for sampling: recorded and replayed steps, and choosing codes.

use std::any::Any;

use crate::backend::choice::{self, Truncation};
use crate::backend::flow::{self, FlowSolver};
use crate::backend::layers::Layers;
use crate::error::Result;

/// The state of [`Sampling::repeat`] between calls: private to the backend, initially empty.
#[derive(Default)]
pub struct ReplayState(pub Option<Box<dyn Any>>);

/// Recorded steps, truncation of logits, drawing codes, and the flow map.
pub trait Sampling: Layers {
    /// The result of `step` on the inputs. With the same `kept`, every call must do the same operations on tensors of the
    /// same shapes, and on the same tensors except for the inputs. So a backend may record one call and replay it in the next
    /// without calling `step` (a CUDA graph). Positions must be inputs, and `step` must not copy between host and device. The
    /// next call overwrites the result.
    fn repeat(
        _kept: &mut ReplayState,
        inputs: &[&Self::Tensor],
        step: &mut dyn FnMut(&[&Self::Tensor]) -> Result<Self::Tensor>,
    ) -> Result<Self::Tensor> {
        step(inputs)
    }

    /// Logits (n, k) over the temperature, -inf where a code is excluded; equal ones in order of their index. By default on
    /// the host.
    fn truncate(logits: &Self::Tensor, truncation: &Truncation) -> Result<Self::Tensor> {
        choice::truncate::<Self>(logits, truncation)
    }

    /// The code of each row of logits (n, k) at which the cumulative probability passes a number in [0, 1): -> ids (n). By
    /// default on the host.
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
