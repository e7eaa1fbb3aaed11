//! Softmax, its logarithm's loss, and the maximum of rows.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use retort_engine::error::{Error, Result};
use retort_kernels::lanes::{dot, exp, max, sum, widest};

use crate::layout::whole;
use crate::rows::by_rows;
use crate::view::{floats, fresh, ids as host_ids, tensor};
use crate::{T, failed};

/// Softmax over the last dimension.
pub fn softmax(x: &T) -> Result<T> {
    let x = &whole(x)?;
    let shape = x.dims().to_vec();
    floats!(x);
    let d = shape[shape.len() - 1];
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        d,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                out.copy_from_slice(&x[(first + i) * d..][..d]);
                let total = exponentials(out);
                out.iter_mut().for_each(|y| *y /= total);
            }
        },
    );
    tensor(y, &shape)
}

/// Gradient of [`softmax`] from its result.
pub fn softmax_backward(y: &T, grad: &T) -> Result<T> {
    let (y, grad) = (&whole(y)?, &whole(grad)?);
    let shape = y.dims().to_vec();
    floats!(y, grad);
    let d = shape[shape.len() - 1];
    let mut dx = fresh(&shape);
    by_rows(
        &mut dx,
        d,
        #[inline(always)]
        |first, out| {
            for (i, dx) in out.chunks_exact_mut(d).enumerate() {
                let at = (first + i) * d;
                let (y, g) = (&y[at..][..d], &grad[at..][..d]);
                let along = dot(y, g);
                for (dx, (&y, &g)) in dx.iter_mut().zip(y.iter().zip(g)) {
                    *dx = y * (g - along);
                }
            }
        },
    );
    tensor(dx, &shape)
}

/// -log softmax(logits)[id] per row: logits (n, k), ids (n) -> (n).
pub fn cross_entropy(logits: &T, ids: &T) -> Result<T> {
    let (x, (n, k), ids) = prepare(logits, ids)?;
    let x = &x;
    floats!(x);
    let mut loss = fresh(&[n]);
    let rows = (16 * 1024 / k).max(1);
    loss.par_chunks_mut(rows).enumerate().for_each(|(c, out)| {
        widest(
            #[inline(always)]
            || {
                for (i, loss) in out.iter_mut().enumerate() {
                    let row = c * rows + i;
                    let x = &x[row * k..][..k];
                    let top = max(x);
                    let total = sum(x, |x| exp(x - top));
                    *loss = total.ln() + top - x[ids[row] as usize];
                }
            },
        );
    });
    tensor(loss, &[n])
}

/// Gradient of [`cross_entropy`] for the logits: grad (n).
pub fn cross_entropy_backward(logits: &T, ids: &T, grad: &T) -> Result<T> {
    let (x, (n, k), ids) = prepare(logits, ids)?;
    let (x, grad) = (&x, &whole(grad)?);
    floats!(x, grad);
    let mut dx = fresh(&[n, k]);
    by_rows(
        &mut dx,
        k,
        #[inline(always)]
        |first, out| {
            for (i, dx) in out.chunks_exact_mut(k).enumerate() {
                let row = first + i;
                dx.copy_from_slice(&x[row * k..][..k]);
                let scale = grad[row] / exponentials(dx);
                dx.iter_mut().for_each(|dx| *dx *= scale);
                dx[ids[row] as usize] -= grad[row];
            }
        },
    );
    tensor(dx, &[n, k])
}

/// Index of the maximum over the last dimension, the lowest among equals.
pub fn argmax_last(x: &T) -> Result<T> {
    let x = &whole(x)?;
    let shape = x.dims().to_vec();
    floats!(x);
    let d = shape[shape.len() - 1];
    let count = shape.iter().product::<usize>() / d;
    let ids: Vec<u32> = (0..count)
        .into_par_iter()
        .with_min_len((16 * 1024 / d).max(1))
        .map(|i| {
            let x = &x[i * d..][..d];
            let top = max(x);
            x.iter().position(|&x| x == top).unwrap_or(0) as u32
        })
        .collect();
    Tensor::from_vec(ids, &shape[..shape.len() - 1], &Device::Cpu).map_err(failed)
}

/// Turns a row into e^(x - max) and returns their sum.
#[inline(always)]
pub fn exponentials(x: &mut [f32]) -> f32 {
    let top = max(x);
    x.iter_mut().for_each(|x| *x = exp(*x - top));
    sum(x, |x| x)
}

/// The row-major logits, their shape, and the ids on the host, checked to be in range.
fn prepare(logits: &T, ids: &T) -> Result<(T, (usize, usize), Vec<u32>)> {
    let (n, k) = logits.dims2().map_err(failed)?;
    let ids = host_ids(ids)?;
    if ids.len() != n || ids.iter().any(|&id| id as usize >= k) {
        return Err(Error::Backend(format!(
            "cross entropy: {} ids for {n} rows of {k} logits, or an id out of range",
            ids.len()
        )));
    }
    Ok((whole(logits)?, (n, k), ids))
}
