//! Normalisations, in pairs of forward and backward, composed of tensor operations.

use crate::backend::layers::Layers;
use crate::backend::tensor::{Binary, Precision, Tensors, Unary};
use crate::error::Result;

/// Root mean square, layer and group norms, with the operations that the networks do around them.
pub trait Norms: Layers {
    /// x / sqrt(mean(x^2) + eps) * w over the last dimension; w (d).
    fn rms_norm(
        x: &Self::Tensor,
        w: &Self::Tensor,
        eps: f64,
        _: Precision,
    ) -> Result<Self::Tensor> {
        Self::binary(
            &Self::binary(x, &inverse_rms::<Self>(x, eps)?, Binary::Mul)?,
            w,
            Binary::Mul,
        )
    }

    /// Gradients of [`Norms::rms_norm`] for x and w.
    fn rms_norm_backward(
        x: &Self::Tensor,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        let last = Self::shape(x).len() - 1;
        let d = Self::shape(x)[last] as f64;
        let r = inverse_rms::<Self>(x, eps)?;
        let n = Self::binary(x, &r, Binary::Mul)?;
        let gw = Self::binary(grad, w, Binary::Mul)?;
        let inner = Self::affine(
            &Self::sum(&Self::binary(&gw, &n, Binary::Mul)?, &[last])?,
            1.0 / d,
            0.0,
        )?;
        let dx = Self::binary(
            &Self::binary(&gw, &Self::binary(&n, &inner, Binary::Mul)?, Binary::Sub)?,
            &r,
            Binary::Mul,
        )?;
        let all: Vec<usize> = (0..last).collect();
        let dw = Self::reshape(
            &Self::sum(&Self::binary(grad, &n, Binary::Mul)?, &all)?,
            &Self::shape(w),
        )?;
        Ok((dx, dw))
    }

    /// The same; the gradient for x is added to what other uses of x have given so far.
    fn rms_norm_backward_adding(
        x: &Self::Tensor,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
        added: Option<&Self::Tensor>,
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        let (dx, dw) = Self::rms_norm_backward(x, w, grad, eps)?;
        Ok((plus::<Self>(added, dx)?, dw))
    }

    /// x / |x| of x (b, l, h, d) over the last dimension, times an optional length per head (h), as a [`Precision::Factor`].
    /// Zeros stay zeros.
    fn unit(x: &Self::Tensor, length: Option<&Self::Tensor>) -> Result<Self::Tensor> {
        let y = unit::<Self>(x)?;
        match length {
            Some(length) => Self::binary(&y, &of_heads::<Self>(length)?, Binary::Mul),
            None => Ok(y),
        }
    }

    /// Gradients of [`Norms::unit`] for x and the lengths.
    fn unit_backward(
        x: &Self::Tensor,
        length: Option<&Self::Tensor>,
        grad: &Self::Tensor,
    ) -> Result<(Self::Tensor, Option<Self::Tensor>)> {
        let (scale, eps) = root_mean_square::<Self>(x)?;
        let Some(length) = length else {
            return Ok((Self::rms_norm_backward(x, &scale, grad, eps)?.0, None));
        };
        let along = Self::binary(grad, &unit::<Self>(x)?, Binary::Mul)?;
        let dlength = Self::reshape(&Self::sum(&along, &[0, 1, 3])?, &Self::shape(length))?;
        let grad = Self::binary(grad, &of_heads::<Self>(length)?, Binary::Mul)?;
        let dx = Self::rms_norm_backward(x, &scale, &grad, eps)?.0;
        Ok((dx, Some(dlength)))
    }

    /// (x - mean) / sqrt(var + eps) over the last dimension, without affine part.
    fn layer_norm(x: &Self::Tensor, eps: f64) -> Result<Self::Tensor> {
        Ok(standardise::<Self>(x, eps)?.0)
    }

    /// Gradient of [`Norms::layer_norm`].
    fn layer_norm_backward(
        x: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        let (y, r) = standardise::<Self>(x, eps)?;
        standardise_backward::<Self>(&y, &r, grad)
    }

    /// [`Norms::layer_norm`] of x (b, l, c) times scale plus shift, (b, 1, c) each, as a [`Precision::Factor`].
    fn modulated_norm(
        x: &Self::Tensor,
        scale: &Self::Tensor,
        shift: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        let y = Self::layer_norm(x, eps)?;
        Self::binary(&Self::binary(&y, scale, Binary::Mul)?, shift, Binary::Add)
    }

    /// Gradients of [`Norms::modulated_norm`] for x, scale and shift.
    fn modulated_norm_backward(
        x: &Self::Tensor,
        scale: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let along = Self::binary(grad, &Self::layer_norm(x, eps)?, Binary::Mul)?;
        let (dscale, dshift) = (Self::sum(&along, &[1])?, Self::sum(grad, &[1])?);
        let grad = Self::binary(grad, scale, Binary::Mul)?;
        Ok((Self::layer_norm_backward(x, &grad, eps)?, dscale, dshift))
    }

    /// The same; the gradient for x is added to what other uses of x have given so far.
    fn modulated_norm_backward_adding(
        x: &Self::Tensor,
        scale: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
        added: Option<&Self::Tensor>,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let (dx, dscale, dshift) = Self::modulated_norm_backward(x, scale, grad, eps)?;
        Ok((plus::<Self>(added, dx)?, dscale, dshift))
    }

    /// Group normalisation of (b, c, h, w) with scale and shift (c).
    fn group_norm(
        x: &Self::Tensor,
        groups: usize,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        let s = Self::shape(x);
        let grouped = Self::reshape(
            x,
            &[s[0] * groups, s.iter().product::<usize>() / (s[0] * groups)],
        )?;
        let y = Self::reshape(&standardise::<Self>(&grouped, eps)?.0, &s)?;
        let (w, bias) = (
            Self::reshape(w, &[s[1], 1, 1])?,
            Self::reshape(bias, &[s[1], 1, 1])?,
        );
        Self::binary(&Self::binary(&y, &w, Binary::Mul)?, &bias, Binary::Add)
    }

    /// [`Norms::group_norm`], then [`Unary::Silu`], as before every convolution of a decoder.
    fn group_norm_silu(
        x: &Self::Tensor,
        groups: usize,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f64,
    ) -> Result<Self::Tensor> {
        Self::unary(&Self::group_norm(x, groups, w, bias, eps)?, Unary::Silu)
    }

    /// Gradients of [`Norms::group_norm`] for x, scale and shift.
    fn group_norm_backward(
        x: &Self::Tensor,
        groups: usize,
        w: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let s = Self::shape(x);
        let flat = [s[0] * groups, s.iter().product::<usize>() / (s[0] * groups)];
        let (y, r) = standardise::<Self>(&Self::reshape(x, &flat)?, eps)?;
        let normal = Self::reshape(&y, &s)?;
        let dw = Self::reshape(
            &Self::sum(&Self::binary(grad, &normal, Binary::Mul)?, &[0, 2, 3])?,
            &[s[1]],
        )?;
        let db = Self::reshape(&Self::sum(grad, &[0, 2, 3])?, &[s[1]])?;
        let gw = Self::binary(grad, &Self::reshape(w, &[s[1], 1, 1])?, Binary::Mul)?;
        let dx = standardise_backward::<Self>(&y, &r, &Self::reshape(&gw, &flat)?)?;
        Ok((Self::reshape(&dx, &s)?, dw, db))
    }

    /// Gradients of [`Norms::group_norm_silu`] for x, scale and shift; `y` is its result. The gradient for x is added to what
    /// other uses of x have given so far.
    fn group_norm_silu_backward(
        x: &Self::Tensor,
        groups: usize,
        [w, bias]: [&Self::Tensor; 2],
        y: &Self::Tensor,
        grad: &Self::Tensor,
        eps: f64,
        added: Option<&Self::Tensor>,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)> {
        let normal = Self::group_norm(x, groups, w, bias, eps)?;
        let grad = Self::unary_backward(&normal, y, grad, Unary::Silu)?;
        let (dx, dw, db) = Self::group_norm_backward(x, groups, w, &grad, eps)?;
        Ok((plus::<Self>(added, dx)?, dw, db))
    }
}

/// The scale (d) by which a root mean square norm is smaller than x / |x|, and an epsilon as small as in torch's F.normalize,
/// which keeps a zero vector finite.
pub(crate) fn root_mean_square<B: Tensors>(x: &B::Tensor) -> Result<(B::Tensor, f64)> {
    let shape = B::shape(x);
    let d = shape[shape.len() - 1];
    let scale = B::of(x).full(&[d], (d as f32).sqrt().recip())?;
    Ok((scale, 1e-24 / d as f64))
}

/// A gradient added to what is known of it.
fn plus<B: Tensors>(known: Option<&B::Tensor>, gradient: B::Tensor) -> Result<B::Tensor> {
    match known {
        Some(known) => B::binary(known, &gradient, Binary::Add),
        None => Ok(gradient),
    }
}

/// x / |x| over the last dimension.
fn unit<B: Norms>(x: &B::Tensor) -> Result<B::Tensor> {
    let (scale, eps) = root_mean_square::<B>(x)?;
    B::rms_norm(x, &scale, eps, Precision::Storage)
}

/// Numbers per head (h) as (h, 1).
fn of_heads<B: Tensors>(x: &B::Tensor) -> Result<B::Tensor> {
    B::reshape(x, &[B::shape(x)[0], 1])
}

fn inverse_rms<B: Tensors>(x: &B::Tensor, eps: f64) -> Result<B::Tensor> {
    let last = B::shape(x).len() - 1;
    let d = B::shape(x)[last] as f64;
    let mean = B::affine(
        &B::sum(&B::unary(x, Unary::Square)?, &[last])?,
        1.0 / d,
        eps,
    )?;
    B::unary(&B::unary(&mean, Unary::Sqrt)?, Unary::Recip)
}

/// The standardised x over the last dimension and the reciprocal of its deviation.
fn standardise<B: Tensors>(x: &B::Tensor, eps: f64) -> Result<(B::Tensor, B::Tensor)> {
    let last = B::shape(x).len() - 1;
    let d = B::shape(x)[last] as f64;
    let mean = B::affine(&B::sum(x, &[last])?, 1.0 / d, 0.0)?;
    let centred = B::binary(x, &mean, Binary::Sub)?;
    let variance = B::affine(
        &B::sum(&B::unary(&centred, Unary::Square)?, &[last])?,
        1.0 / d,
        eps,
    )?;
    let r = B::unary(&B::unary(&variance, Unary::Sqrt)?, Unary::Recip)?;
    Ok((B::binary(&centred, &r, Binary::Mul)?, r))
}

/// Gradient through [`standardise`]: r (g - mean(g) - y mean(g y)).
fn standardise_backward<B: Tensors>(
    y: &B::Tensor,
    r: &B::Tensor,
    grad: &B::Tensor,
) -> Result<B::Tensor> {
    let last = B::shape(y).len() - 1;
    let d = B::shape(y)[last] as f64;
    let mean = B::affine(&B::sum(grad, &[last])?, 1.0 / d, 0.0)?;
    let along = B::affine(
        &B::sum(&B::binary(grad, y, Binary::Mul)?, &[last])?,
        1.0 / d,
        0.0,
    )?;
    let g = B::binary(
        &B::binary(grad, &mean, Binary::Sub)?,
        &B::binary(y, &along, Binary::Mul)?,
        Binary::Sub,
    )?;
    B::binary(&g, r, Binary::Mul)
}
