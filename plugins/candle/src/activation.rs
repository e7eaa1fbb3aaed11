//! Element-wise functions and gated units in one pass each.

use retort_engine::backend::Unary;
use retort_engine::error::Result;
use retort_kernels::lanes::{exp, greater, normal, sigmoid};

use crate::T;
use crate::layout::whole;
use crate::rows::by_rows;
use crate::view::{floats, fresh, tensor};

/// sqrt(2/pi) and the cubic's share, of GELU's tanh form: tanh(ROOT (x + CUBE x^3)).
const ROOT: f32 = 0.797_884_6;
const CUBE: f32 = 0.044_715;

/// A function of each element. None for functions without a vector form here (log, tanh, erf): use candle's scalar loop.
pub fn unary(x: &T, f: Unary) -> Option<Result<T>> {
    Some(match f {
        Unary::Exp => map(x, exp),
        Unary::Sqrt => map(x, f32::sqrt),
        Unary::Square => map(x, |x| x * x),
        Unary::Recip => map(x, |x| 1.0 / x),
        Unary::Sigmoid => map(x, sigmoid),
        Unary::Silu => map(x, silu),
        // 1/2 (1 + tanh u) is the sigmoid of 2 u.
        Unary::GeluTanh => map(x, |x| x * sigmoid(gelu_argument(x))),
        Unary::GeluErf => map(x, |x| x * normal(x).0),
        Unary::Relu => map(x, |x| greater(x, 0.0)),
        Unary::Log | Unary::Tanh | Unary::Erf => return None,
    })
}

/// Gradient of [`unary`], from the argument and the result.
pub fn unary_backward(x: &T, y: &T, grad: &T, f: Unary) -> Option<Result<T>> {
    Some(match f {
        Unary::Exp => map2(y, grad, |y, g| g * y),
        Unary::Sqrt => map2(y, grad, |y, g| 0.5 * g / y),
        Unary::Square => map2(x, grad, |x, g| 2.0 * g * x),
        Unary::Recip => map2(y, grad, |y, g| -g * y * y),
        Unary::Sigmoid => map2(y, grad, |y, g| g * y * (1.0 - y)),
        Unary::Tanh => map2(y, grad, |y, g| g * (1.0 - y * y)),
        Unary::Silu => map2(x, grad, |x, g| g * silu_slope(x, sigmoid(x))),
        Unary::GeluTanh => map2(x, grad, |x, g| {
            let s = sigmoid(gelu_argument(x));
            let slope = 2.0 * ROOT * (3.0 * CUBE * x).mul_add(x, 1.0);
            g * (x * s * (1.0 - s)).mul_add(slope, s)
        }),
        Unary::GeluErf => map2(x, grad, |x, g| {
            let (below, density) = normal(x);
            g * x.mul_add(density, below)
        }),
        Unary::Relu => map2(y, grad, |y, g| if y > 0.0 { g } else { 0.0 }),
        Unary::Log | Unary::Erf => return None,
    })
}

/// silu(a) * b where rows hold a then b.
pub fn swiglu(x: &T) -> Result<T> {
    let x = &whole(x)?;
    let mut shape = x.dims().to_vec();
    let d = halve(&mut shape);
    floats!(x);
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        d,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                let (a, b) = x[(first + i) * 2 * d..][..2 * d].split_at(d);
                for (y, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
                    *y = silu(a) * b;
                }
            }
        },
    );
    tensor(y, &shape)
}

/// Gradient of [`swiglu`].
pub fn swiglu_backward(x: &T, grad: &T) -> Result<T> {
    let (x, grad) = (&whole(x)?, &whole(grad)?);
    let shape = x.dims().to_vec();
    let d = halve(&mut shape.clone());
    floats!(x, grad);
    let mut dx = fresh(&shape);
    by_rows(
        &mut dx,
        2 * d,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(2 * d).enumerate() {
                let (a, b) = x[(first + i) * 2 * d..][..2 * d].split_at(d);
                let g = &grad[(first + i) * d..][..d];
                let (da, db) = out.split_at_mut(d);
                for j in 0..d {
                    let s = sigmoid(a[j]);
                    da[j] = g[j] * b[j] * silu_slope(a[j], s);
                    db[j] = g[j] * a[j] * s;
                }
            }
        },
    );
    tensor(dx, &shape)
}

/// Halves the last dimension and returns its new size.
fn halve(shape: &mut [usize]) -> usize {
    let last = shape.len() - 1;
    shape[last] /= 2;
    shape[last]
}

/// x s(x) where s is the sigmoid.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// 2 u of GELU's tanh form.
#[inline(always)]
fn gelu_argument(x: f32) -> f32 {
    2.0 * ROOT * x * (CUBE * x).mul_add(x, 1.0)
}

/// Slope of [`silu`], given s(x).
#[inline(always)]
pub fn silu_slope(x: f32, s: f32) -> f32 {
    s * x.mul_add(1.0 - s, 1.0)
}

fn map(x: &T, f: impl Fn(f32) -> f32 + Sync) -> Result<T> {
    let x = &whole(x)?;
    let shape = x.dims().to_vec();
    floats!(x);
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        1,
        #[inline(always)]
        |first, out| {
            for (y, &x) in out.iter_mut().zip(&x[first..]) {
                *y = f(x);
            }
        },
    );
    tensor(y, &shape)
}

fn map2(x: &T, grad: &T, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<T> {
    let (x, grad) = (&whole(x)?, &whole(grad)?);
    let shape = x.dims().to_vec();
    floats!(x, grad);
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        1,
        #[inline(always)]
        |first, out| {
            for (y, (&x, &g)) in out.iter_mut().zip(x[first..].iter().zip(&grad[first..])) {
                *y = f(x, g);
            }
        },
    );
    tensor(y, &shape)
}
