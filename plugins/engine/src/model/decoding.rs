//! Generation in any family: the KV cache and classifier-free guidance.

use crate::backend::{Backend, Binary};
use crate::error::Result;
use crate::model::Guidance;

/// The keys and values of a block so far: (b, l, h, d), allocated in full and written in place.
pub(super) struct Cache<B: Backend> {
    k: B::Tensor,
    v: B::Tensor,
}

impl<B: Backend> Cache<B> {
    /// One empty cache per block, on the device of `like`; `shape` (b, l, h, d) for all positions.
    pub(super) fn blocks(like: &B::Tensor, depth: usize, shape: [usize; 4]) -> Result<Vec<Self>> {
        let empty = || B::factor(&B::of(like).full(&shape, 0.0)?);
        (0..depth)
            .map(|_| {
                Ok(Self {
                    k: empty()?,
                    v: empty()?,
                })
            })
            .collect()
    }

    /// Adds keys and values (b, l, h, d) at position `at` and returns all up to them.
    pub(super) fn extend(
        &self,
        at: usize,
        k: &B::Tensor,
        v: &B::Tensor,
    ) -> Result<(B::Tensor, B::Tensor)> {
        B::write_(&self.k, 1, at, k)?;
        B::write_(&self.v, 1, at, v)?;
        self.until(at + B::shape(k)[1])
    }

    /// The same for queries, keys and values, the former two rotated by cos and sin: returns the rotated queries, all keys
    /// and all values.
    pub(super) fn extend_turned(
        &self,
        at: usize,
        [q, k, v]: [&B::Tensor; 3],
        [cos, sin]: [&B::Tensor; 2],
    ) -> Result<(B::Tensor, B::Tensor, B::Tensor)> {
        let q = B::rope_cached(q, k, v, cos, sin, &self.k, &self.v, at)?;
        let (k, v) = self.until(at + B::shape(k)[1])?;
        Ok((q, k, v))
    }

    /// Attention of position `at` to all positions up to it (b, 1, h, d): its queries and keys are rotated by row `at` of cos
    /// and sin; `place` (1) also contains `at`; `hidden` (b, 1, 1, l) is added to the scores.
    pub(super) fn attend_next(
        &self,
        qkv: [&B::Tensor; 3],
        rope: [&B::Tensor; 2],
        at: usize,
        place: &B::Tensor,
        hidden: Option<&B::Tensor>,
        scale: f64,
    ) -> Result<B::Tensor> {
        B::attend_next(qkv, rope, [&self.k, &self.v], at, place, hidden, scale)
    }

    fn until(&self, end: usize) -> Result<(B::Tensor, B::Tensor)> {
        Ok((
            B::narrow(&self.k, 1, 0, end)?,
            B::narrow(&self.v, 1, 0, end)?,
        ))
    }
}

/// Class ids (b) of a batch. With guidance the labels, followed by the same number of the unconditional row, number
/// `classes`.
pub(super) fn rows<B: Backend>(
    labels: &B::Tensor,
    classes: usize,
    guided: bool,
) -> Result<B::Tensor> {
    if !guided {
        return Ok(labels.clone());
    }
    let n = B::shape(labels)[0];
    let without = B::of(labels).indices(&vec![classes as u32; n], &[n])?;
    B::cat(&[labels, &without], 0)
}

/// The guidance of a step, given the number of steps since the first chosen one.
pub(super) fn guided(guidance: Option<Guidance>, after: usize) -> Option<f64> {
    let guidance = guidance?;
    let ended = guidance
        .interval
        .is_some_and(|last| after.saturating_sub(1) > last);
    (!ended).then_some(guidance.scale)
}

/// The conditional rows of logits (2 b, l, K).
pub(super) fn conditional<B: Backend>(logits: &B::Tensor) -> Result<B::Tensor> {
    B::narrow(logits, 0, 0, B::shape(logits)[0] / 2)
}

/// uncond + s (cond - uncond) of logits (2 b, l, K): conditional rows, then unconditional ones.
pub(super) fn guide<B: Backend>(logits: &B::Tensor, s: f64) -> Result<B::Tensor> {
    let batch = B::shape(logits)[0] / 2;
    let conditional = conditional::<B>(logits)?;
    let unconditional = B::narrow(logits, 0, batch, batch)?;
    let difference = B::binary(&conditional, &unconditional, Binary::Sub)?;
    B::binary(
        &unconditional,
        &B::affine(&difference, s, 0.0)?,
        Binary::Add,
    )
}
