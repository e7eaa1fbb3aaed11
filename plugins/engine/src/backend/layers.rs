//! Layers and losses composed of tensor operations, in pairs of forward and backward. A backend overrides a pair where one
//! kernel is faster than several operations.

use crate::backend::tensor::{Binary, Precision, Tensors, Unary};
use crate::error::Result;

/// Square windows that slide over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Side of the window.
    pub size: usize,
    /// Step to the next window, in both directions.
    pub stride: usize,
    /// Positions beyond the image on each side, which are never the maximum.
    pub padding: usize,
}

impl Window {
    /// Number of windows along a side of `n` pixels.
    pub fn count(&self, n: usize) -> usize {
        match (n + 2 * self.padding).checked_sub(self.size) {
            Some(beyond) => beyond / self.stride + 1,
            None => 0,
        }
    }
}

/// Linear maps, convolutions, activations, pooling, softmax and cross-entropy.
pub trait Layers: Tensors {
    /// [`Tensors::conv2d`](crate::backend::Tensors::conv2d) plus a bias (o) and, optionally, a residual of the result's
    /// shape.
    fn conv2d_bias(
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        residual: Option<&Self::Tensor>,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<Self::Tensor> {
        let y = Self::conv2d(x, w, stride, padding)?;
        let bias = Self::reshape(bias, &[Self::shape(&y)[1], 1, 1])?;
        let y = Self::binary(&y, &bias, Binary::Add)?;
        match residual {
            Some(residual) => Self::binary(&y, residual, Binary::Add),
            None => Ok(y),
        }
    }

    /// [`Layers::conv2d_bias`] with stride 1, on images enlarged twofold ([`upsample2`]).
    fn conv2d_upsampled(
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: &Self::Tensor,
        padding: [usize; 2],
    ) -> Result<Self::Tensor> {
        Self::conv2d_bias(&upsample2::<Self>(x)?, w, bias, None, 1, padding)
    }

    /// [`Tensors::unary`](crate::backend::Tensors::unary), in a precision.
    fn activation(x: &Self::Tensor, f: Unary, _: Precision) -> Result<Self::Tensor> {
        Self::unary(x, f)
    }

    /// Gradient of [`Tensors::unary`](crate::backend::Tensors::unary): `x` its argument, `y` its result.
    fn unary_backward(
        x: &Self::Tensor,
        y: &Self::Tensor,
        grad: &Self::Tensor,
        f: Unary,
    ) -> Result<Self::Tensor> {
        let mul = |a: &Self::Tensor, b: &Self::Tensor| Self::binary(a, b, Binary::Mul);
        match f {
            Unary::Exp => mul(grad, y),
            Unary::Log => Self::binary(grad, x, Binary::Div),
            Unary::Sqrt => Self::affine(&Self::binary(grad, y, Binary::Div)?, 0.5, 0.0),
            Unary::Square => Self::affine(&mul(grad, x)?, 2.0, 0.0),
            Unary::Recip => Self::affine(&mul(grad, &Self::unary(y, Unary::Square)?)?, -1.0, 0.0),
            Unary::Tanh => mul(
                grad,
                &Self::affine(&Self::unary(y, Unary::Square)?, -1.0, 1.0)?,
            ),
            Unary::Sigmoid => mul(grad, &mul(y, &Self::affine(y, -1.0, 1.0)?)?),
            Unary::Silu => {
                // s (1 + x (1 - s))
                let s = Self::unary(x, Unary::Sigmoid)?;
                let inner = Self::affine(&mul(x, &Self::affine(&s, -1.0, 1.0)?)?, 1.0, 1.0)?;
                mul(grad, &mul(&s, &inner)?)
            }
            Unary::GeluTanh => {
                // y = x/2 (1 + tanh u), u = c (x + a x^3)
                let (c, a) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044715);
                let x2 = Self::unary(x, Unary::Square)?;
                let u = mul(x, &Self::affine(&x2, c * a, c)?)?;
                let t = Self::unary(&u, Unary::Tanh)?;
                let dt = Self::affine(&Self::unary(&t, Unary::Square)?, -0.5, 0.5)?;
                let du = Self::affine(&x2, 3.0 * c * a, c)?;
                let d = Self::binary(
                    &Self::affine(&t, 0.5, 0.5)?,
                    &mul(&mul(x, &dt)?, &du)?,
                    Binary::Add,
                )?;
                mul(grad, &d)
            }
            Unary::GeluErf => {
                // y = x Phi(x), y' = Phi(x) + x phi(x)
                let phi = Self::affine(
                    &Self::unary(&Self::affine(x, 0.5f64.sqrt(), 0.0)?, Unary::Erf)?,
                    0.5,
                    0.5,
                )?;
                let bell = Self::unary(
                    &Self::affine(&Self::unary(x, Unary::Square)?, -0.5, 0.0)?,
                    Unary::Exp,
                )?;
                let density =
                    Self::affine(&bell, (2.0 * std::f64::consts::PI).sqrt().recip(), 0.0)?;
                mul(grad, &Self::binary(&phi, &mul(x, &density)?, Binary::Add)?)
            }
            Unary::Erf => {
                let bell = Self::unary(
                    &Self::affine(&Self::unary(x, Unary::Square)?, -1.0, 0.0)?,
                    Unary::Exp,
                )?;
                mul(
                    grad,
                    &Self::affine(&bell, 2.0 / std::f64::consts::PI.sqrt(), 0.0)?,
                )
            }
            Unary::Relu => {
                // y/|y| is 1 where y > 0: y / max(y, tiny)
                let tiny = Self::affine(y, 0.0, f32::MIN_POSITIVE as f64)?;
                mul(
                    grad,
                    &Self::binary(y, &Self::binary(y, &tiny, Binary::Max)?, Binary::Div)?,
                )
            }
        }
    }

    /// x (.., i) times w (o, i) transposed, plus bias (o): -> (.., o).
    fn linear(
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let (mut shape, wide) = (Self::shape(x), Self::shape(w));
        let rows = shape.iter().product::<usize>() / wide[1];
        let y = Self::matmul(&Self::reshape(x, &[rows, wide[1]])?, w, false, true)?;
        let y = match bias {
            Some(b) => Self::binary(&y, b, Binary::Add)?,
            None => y,
        };
        *shape.last_mut().expect("linear: rank >= 1") = wide[0];
        Self::reshape(&y, &shape)
    }

    /// Gradients of [`Layers::linear`] for its input, given w, and for its weight, given x.
    fn linear_backward(
        x: Option<&Self::Tensor>,
        w: Option<&Self::Tensor>,
        grad: &Self::Tensor,
    ) -> Result<(Option<Self::Tensor>, Option<Self::Tensor>)> {
        composed_linear_backward::<Self>(x, w, grad)
    }

    /// Softmax over the last dimension.
    fn softmax(x: &Self::Tensor) -> Result<Self::Tensor> {
        let last = Self::shape(x).len() - 1;
        let e = Self::unary(
            &Self::binary(x, &Self::max_last(x)?, Binary::Sub)?,
            Unary::Exp,
        )?;
        Self::binary(&e, &Self::sum(&e, &[last])?, Binary::Div)
    }

    /// Gradient of [`Layers::softmax`] from its result.
    fn softmax_backward(y: &Self::Tensor, grad: &Self::Tensor) -> Result<Self::Tensor> {
        let last = Self::shape(y).len() - 1;
        let inner = Self::sum(&Self::binary(y, grad, Binary::Mul)?, &[last])?;
        Self::binary(y, &Self::binary(grad, &inner, Binary::Sub)?, Binary::Mul)
    }

    /// x + y gate (+ added): x, y and added (b, l, c), gate (b, 1, c).
    fn gated_add(
        x: &Self::Tensor,
        y: &Self::Tensor,
        gate: &Self::Tensor,
        added: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let sum = Self::binary(x, &Self::binary(y, gate, Binary::Mul)?, Binary::Add)?;
        match added {
            Some(added) => Self::binary(&sum, added, Binary::Add),
            None => Ok(sum),
        }
    }

    /// Gradients of [`Layers::gated_add`] for y and the gate; those for x and `added` are `grad` itself.
    fn gated_add_backward(
        y: &Self::Tensor,
        gate: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor)> {
        let dgate = Self::sum(&Self::binary(grad, y, Binary::Mul)?, &[1])?;
        Ok((Self::binary(grad, gate, Binary::Mul)?, dgate))
    }

    /// The greatest value of each window of (b, c, h, w): -> (b, c, h', w').
    fn max_pool2d(x: &Self::Tensor, window: Window) -> Result<Self::Tensor> {
        let all = windows::<Self>(x, window)?;
        let s = Self::shape(&all);
        Self::reshape(&Self::max_last(&all)?, &s[..4])
    }

    /// Gradient of [`Layers::max_pool2d`]: it goes to the first of a window's greatest values, row by row.
    fn max_pool2d_backward(
        x: &Self::Tensor,
        grad: &Self::Tensor,
        window: Window,
    ) -> Result<Self::Tensor> {
        let all = windows::<Self>(x, window)?;
        let first = Self::argmax_last(&all)?;
        let spread = Self::pick_adjoint(grad, &first, window.size * window.size)?;
        windows_adjoint::<Self>(&spread, &Self::shape(x), window)
    }

    /// silu(a) * b where x (.., 2 d) holds a then b: -> (.., d) as a [`Precision::Factor`].
    fn swiglu(x: &Self::Tensor) -> Result<Self::Tensor> {
        let (a, b) = halves::<Self>(x)?;
        Self::binary(&Self::unary(&a, Unary::Silu)?, &b, Binary::Mul)
    }

    /// Gradient of [`Layers::swiglu`].
    fn swiglu_backward(x: &Self::Tensor, grad: &Self::Tensor) -> Result<Self::Tensor> {
        let (a, b) = halves::<Self>(x)?;
        let s = Self::unary(&a, Unary::Silu)?;
        let da = Self::unary_backward(&a, &s, &Self::binary(grad, &b, Binary::Mul)?, Unary::Silu)?;
        let db = Self::binary(grad, &s, Binary::Mul)?;
        Self::cat(&[&da, &db], Self::shape(x).len() - 1)
    }

    /// -log softmax(logits)[id] per row: logits (n, k), ids (n) -> (n).
    fn cross_entropy(logits: &Self::Tensor, ids: &Self::Tensor) -> Result<Self::Tensor> {
        let shifted = Self::binary(logits, &Self::max_last(logits)?, Binary::Sub)?;
        let total = Self::unary(
            &Self::sum(&Self::unary(&shifted, Unary::Exp)?, &[1])?,
            Unary::Log,
        )?;
        let n = Self::shape(logits)[0];
        Self::binary(
            &Self::reshape(&total, &[n])?,
            &Self::pick(&shifted, ids)?,
            Binary::Sub,
        )
    }

    /// Gradient of [`Layers::cross_entropy`] for the logits; grad (n).
    fn cross_entropy_backward(
        logits: &Self::Tensor,
        ids: &Self::Tensor,
        grad: &Self::Tensor,
    ) -> Result<Self::Tensor> {
        let s = Self::shape(logits);
        let spread = Self::binary(
            &Self::softmax(logits)?,
            &Self::reshape(grad, &[s[0], 1])?,
            Binary::Mul,
        )?;
        Self::binary(&spread, &Self::pick_adjoint(grad, ids, s[1])?, Binary::Sub)
    }
}

/// [`Layers::linear_backward`] by two matrix products.
pub fn composed_linear_backward<B: Tensors>(
    x: Option<&B::Tensor>,
    w: Option<&B::Tensor>,
    grad: &B::Tensor,
) -> Result<(Option<B::Tensor>, Option<B::Tensor>)> {
    let flat = |x: &B::Tensor| {
        let shape = B::shape(x);
        let last = shape[shape.len() - 1];
        B::reshape(x, &[shape.iter().product::<usize>() / last, last])
    };
    let g = flat(grad)?;
    let dx = |w: &B::Tensor| {
        let mut shape = B::shape(grad);
        *shape.last_mut().expect("linear: rank >= 1") = B::shape(w)[1];
        B::reshape(&B::matmul(&g, w, false, false)?, &shape)
    };
    let dw = |x: &B::Tensor| B::matmul(&g, &flat(x)?, true, false);
    Ok((w.map(dx).transpose()?, x.map(dw).transpose()?))
}

/// Each pixel of (b, c, h, w) becomes a block of 2 x 2 (nearest neighbour): (b, c, 2 h, 2 w).
pub fn upsample2<B: Tensors>(x: &B::Tensor) -> Result<B::Tensor> {
    let s = B::shape(x);
    let pixels = B::reshape(x, &[s[0], s[1], s[2], 1, s[3], 1])?;
    let blocks = B::expand(&pixels, &[s[0], s[1], s[2], 2, s[3], 2])?;
    B::reshape(&blocks, &[s[0], s[1], 2 * s[2], 2 * s[3]])
}

fn halves<B: Tensors>(x: &B::Tensor) -> Result<(B::Tensor, B::Tensor)> {
    let shape = B::shape(x);
    let last = shape.len() - 1;
    let d = shape[last] / 2;
    Ok((B::narrow(x, last, 0, d)?, B::narrow(x, last, d, d)?))
}

/// The values of each window in its last dimension: (b, c, h, w) -> (b, c, h', w', size^2).
fn windows<B: Tensors>(x: &B::Tensor, window: Window) -> Result<B::Tensor> {
    let s = B::shape(x);
    let Window {
        size,
        stride,
        padding,
    } = window;
    // A border of the lowest float, wide enough for whole steps from every position of the window.
    let mut framed = x.clone();
    for d in [2, 3] {
        let all = size - 1 + window.count(s[d]) * stride;
        framed = frame::<B>(&framed, d, padding, all, f32::MIN)?;
    }
    let (high, wide) = (window.count(s[2]), window.count(s[3]));
    let mut places = Vec::with_capacity(size * size);
    for (dy, dx) in (0..size).flat_map(|dy| (0..size).map(move |dx| (dy, dx))) {
        let place = B::narrow(&framed, 2, dy, high * stride)?;
        let place = B::narrow(&place, 3, dx, wide * stride)?;
        let place = B::reshape(&place, &[s[0], s[1], high, stride, wide, stride])?;
        let place = B::narrow(&B::narrow(&place, 3, 0, 1)?, 5, 0, 1)?;
        places.push(B::reshape(&place, &[s[0], s[1], high, wide, 1])?);
    }
    B::cat(&places.iter().collect::<Vec<_>>(), 4)
}

/// Adjoint of [`windows`] for images of a shape.
fn windows_adjoint<B: Tensors>(
    grad: &B::Tensor,
    shape: &[usize],
    window: Window,
) -> Result<B::Tensor> {
    let Window {
        size,
        stride,
        padding,
    } = window;
    let (high, wide) = (window.count(shape[2]), window.count(shape[3]));
    let sides = [high, wide].map(|n| size - 1 + n * stride);
    let mut sum: Option<B::Tensor> = None;
    for place in 0..size * size {
        let g = B::narrow(grad, 4, place, 1)?;
        let g = B::reshape(&g, &[shape[0], shape[1], high, 1, wide, 1])?;
        let g = frame::<B>(&frame::<B>(&g, 3, 0, stride, 0.0)?, 5, 0, stride, 0.0)?;
        let g = B::reshape(&g, &[shape[0], shape[1], high * stride, wide * stride])?;
        let g = frame::<B>(&g, 2, place / size, sides[0], 0.0)?;
        let g = frame::<B>(&g, 3, place % size, sides[1], 0.0)?;
        sum = Some(match sum {
            Some(sum) => B::binary(&sum, &g, Binary::Add)?,
            None => g,
        });
    }
    let mut dx = sum.expect("a window has at least one place");
    for d in [2, 3] {
        // Pixels beyond the last window have no gradient.
        dx = frame::<B>(&dx, d, 0, padding + shape[d], 0.0)?;
        dx = B::narrow(&dx, d, padding, shape[d])?;
    }
    Ok(dx)
}

/// Pads a dimension to at least `all` elements: `before` elements of a value, then x, then that value again.
fn frame<B: Tensors>(
    x: &B::Tensor,
    dim: usize,
    before: usize,
    all: usize,
    value: f32,
) -> Result<B::Tensor> {
    let mut shape = B::shape(x);
    let after = all.saturating_sub(before + shape[dim]);
    let one = B::of(x).floats(&[value], &vec![1; shape.len()])?;
    let mut side = |n: usize| {
        shape[dim] = n;
        B::expand(&one, &shape)
    };
    let (left, right) = (side(before)?, side(after)?);
    let mut parts = Vec::with_capacity(3);
    if before > 0 {
        parts.push(&left);
    }
    parts.push(x);
    if after > 0 {
        parts.push(&right);
    }
    B::cat(&parts, dim)
}
