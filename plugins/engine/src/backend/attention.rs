//! Attention and rotary positions: of whole sequences, with gradients, and of the next position of a generation.

use crate::backend::layers::Layers;
use crate::backend::tensor::{Binary, Tensors};
use crate::error::Result;

/// Which keys a query may see.
#[derive(Debug, Clone)]
pub enum Mask<T> {
    /// All.
    Full,
    /// Query i of lq sees keys 0..=(lk - lq + i).
    Causal,
    /// Added to the scores before the softmax: (lq, lk), or of rank 4 and broadcast to (b, h, lq, lk).
    Bias(T),
}

/// Attention over keys and values, and rotary positions.
pub trait Attention: Layers {
    /// Rotates interleaved pairs: x (b, l, h, d), cos and sin (l, d/2).
    fn rope(x: &Self::Tensor, cos: &Self::Tensor, sin: &Self::Tensor) -> Result<Self::Tensor> {
        let s = Self::shape(x);
        let half = [s[0], s[1], s[2], s[3] / 2, 1];
        let pairs = Self::reshape(x, &[s[0], s[1], s[2], s[3] / 2, 2])?;
        let (a, b) = (
            Self::narrow(&pairs, 4, 0, 1)?,
            Self::narrow(&pairs, 4, 1, 1)?,
        );
        let table = |t: &Self::Tensor| Self::reshape(t, &[1, half[1], 1, half[3], 1]);
        let (cos, sin) = (table(cos)?, table(sin)?);
        let mul = |a: &Self::Tensor, b: &Self::Tensor| Self::binary(a, b, Binary::Mul);
        let re = Self::binary(&mul(&a, &cos)?, &mul(&b, &sin)?, Binary::Sub)?;
        let im = Self::binary(&mul(&a, &sin)?, &mul(&b, &cos)?, Binary::Add)?;
        Self::reshape(&Self::cat(&[&re, &im], 4)?, &s)
    }

    /// Prepares the positions of a generation step: q, k, v (b, l, h, d). Rotates q and k by cos and sin (l, d/2), writes
    /// keys and values into caches (b, l', h, d) at position `at`, and returns the queries.
    #[expect(clippy::too_many_arguments, reason = "one pass over them all")]
    fn rope_cached(
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        cos: &Self::Tensor,
        sin: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        at: usize,
    ) -> Result<Self::Tensor> {
        Self::write_(keys, 1, at, &Self::rope(k, cos, sin)?)?;
        Self::write_(values, 1, at, v)?;
        Self::rope(q, cos, sin)
    }

    /// softmax(scale q k^T + mask) v: q (b, lq, h, d), k and v (b, lk, h, d) -> (b, lq, h, d) as a
    /// [`Precision::Factor`](crate::backend::Precision::Factor).
    fn attention(
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        mask: &Mask<Self::Tensor>,
        scale: f64,
    ) -> Result<Self::Tensor> {
        let p = attention_weights::<Self>(q, k, mask, scale)?;
        Self::permute(
            &Self::matmul(&p, &heads_first::<Self>(v)?, false, false)?,
            &[0, 2, 1, 3],
        )
    }

    /// Gradients of [`Attention::attention`] for q, k and v; `y` is its result.
    fn attention_backward(
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        mask: &Mask<Self::Tensor>,
        scale: f64,
        y: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let _ = y; // for fused implementations
        let p = attention_weights::<Self>(q, k, mask, scale)?; // (b, h, lq, lk)
        let g = heads_first::<Self>(grad)?;
        let dv = Self::matmul(&p, &g, true, false)?;
        let dp = Self::matmul(&g, &heads_first::<Self>(v)?, false, true)?;
        let ds = Self::affine(&Self::softmax_backward(&p, &dp)?, scale, 0.0)?;
        let dq = Self::matmul(&ds, &heads_first::<Self>(k)?, false, false)?;
        let dk = Self::matmul(&ds, &heads_first::<Self>(q)?, true, false)?;
        let back = |x: Self::Tensor| Self::permute(&x, &[0, 2, 1, 3]);
        Ok((back(dq)?, back(dk)?, back(dv)?))
    }

    /// Self-attention from the packed projection (b, l, 3 h d), with rotary positions cos and sin, (l, d/2) each: -> (b, l, h,
    /// d) as in [`Attention::attention`], and what the backward pass reads in place of the projection.
    fn packed_attention(
        qkv: &Self::Tensor,
        heads: usize,
        [cos, sin]: [&Self::Tensor; 2],
        mask: &Mask<Self::Tensor>,
        scale: f64,
    ) -> Result<(Self::Tensor, [Self::Tensor; 3])> {
        let [q, k, v] = unpack::<Self>(qkv, heads)?;
        let (q, k) = (Self::rope(&q, cos, sin)?, Self::rope(&k, cos, sin)?);
        Ok((Self::attention(&q, &k, &v, mask, scale)?, [q, k, v]))
    }

    /// Gradient of [`Attention::packed_attention`] for the projection (b, l, 3 h d), from both results and the gradient (b, l,
    /// h, d) of the first.
    fn packed_attention_backward(
        [q, k, v]: [&Self::Tensor; 3],
        [cos, sin]: [&Self::Tensor; 2],
        mask: &Mask<Self::Tensor>,
        scale: f64,
        y: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<Self::Tensor> {
        let (dq, dk, dv) = Self::attention_backward(q, k, v, mask, scale, y, grad)?;
        // The adjoint of a rotation is the rotation by the opposite angle (and zero stays zero).
        let back = Self::affine(sin, -1.0, 0.0)?;
        let s = Self::shape(q);
        let flat = |x: &Self::Tensor| Self::reshape(x, &[s[0], s[1], s[2] * s[3]]);
        let dq = flat(&Self::rope(&dq, cos, &back)?)?;
        let dk = flat(&Self::rope(&dk, cos, &back)?)?;
        Self::cat(&[&dq, &dk, &flat(&dv)?], 2)
    }

    /// Attention of position `at` of each sequence, q, k and v (b, 1, h, d). Rotates q and k by row `at` of cos and sin (n,
    /// d/2), writes k and v into their caches (b, n, h, d) at `at`, and attends with q to the caches up to there, with
    /// `hidden` (b, 1, 1, n) added to the scores: -> (b, 1, h, d).
    ///
    /// `place` also contains `at`, as indices (1), for a backend that replays the step with another position
    /// ([`Sampling::repeat`](crate::backend::Sampling::repeat)).
    fn attend_next(
        [q, k, v]: [&Self::Tensor; 3],
        [cos, sin]: [&Self::Tensor; 2],
        [keys, values]: [&Self::Tensor; 2],
        at: usize,
        _place: &Self::Tensor,
        hidden: Option<&Self::Tensor>,
        scale: f64,
    ) -> Result<Self::Tensor> {
        let row = |table| Self::narrow(table, 0, at, 1);
        let q = Self::rope_cached(q, k, v, &row(cos)?, &row(sin)?, keys, values, at)?;
        let seen = |cache| Self::narrow(cache, 1, 0, at + 1);
        let mask = match hidden {
            None => Mask::Full,
            Some(hidden) => Mask::Bias(Self::narrow(hidden, 3, 0, at + 1)?),
        };
        Self::attention(&q, &seen(keys)?, &seen(values)?, &mask, scale)
    }
}

/// q, k, v, each (b, l, h, d), of a packed projection (b, l, 3 h d): views, no copies.
pub fn unpack<B: Tensors>(qkv: &B::Tensor, heads: usize) -> Result<[B::Tensor; 3]> {
    let s = B::shape(qkv);
    let all = B::reshape(qkv, &[s[0], s[1], 3 * heads, s[2] / (3 * heads)])?;
    let part = |i: usize| B::narrow(&all, 2, i * heads, heads);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// (b, l, h, d) -> (b, h, l, d)
fn heads_first<B: Tensors>(x: &B::Tensor) -> Result<B::Tensor> {
    B::permute(x, &[0, 2, 1, 3])
}

/// Attention weights (b, h, lq, lk).
fn attention_weights<B: Layers>(
    q: &B::Tensor,
    k: &B::Tensor,
    mask: &Mask<B::Tensor>,
    scale: f64,
) -> Result<B::Tensor> {
    let scores = B::affine(
        &B::matmul(&heads_first::<B>(q)?, &heads_first::<B>(k)?, false, true)?,
        scale,
        0.0,
    )?;
    let scores = match mask {
        Mask::Full => scores,
        Mask::Causal => B::binary(&scores, &causal_bias::<B>(&scores)?, Binary::Add)?,
        Mask::Bias(bias) => B::binary(&scores, bias, Binary::Add)?,
    };
    B::softmax(&scores)
}

/// 0 where a query may see a key, -inf elsewhere: (lq, lk) of the scores (b, h, lq, lk).
fn causal_bias<B: Tensors>(scores: &B::Tensor) -> Result<B::Tensor> {
    let s = B::shape(scores);
    let (lq, lk) = (s[2], s[3]);
    let bias: Vec<f32> = (0..lq * lk)
        .map(|i| {
            if i % lk <= i / lk + lk - lq {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    B::of(scores).floats(&bias, &[lq, lk])
}
