//! Normalisations, each forward and backward in one pass over its rows.

use rayon::prelude::*;
use retort_engine::error::Result;
use retort_kernels::lanes::{add_scaled, dot, sigmoid, sum, widest};

use crate::T;
use crate::activation::silu_slope;
use crate::layout::whole;
use crate::rows::{by_rows, by_sequences, total};
use crate::view::{floats, fresh, tensor};

/// x / sqrt(mean(x^2) + eps) * w over the last dimension.
pub fn rms_norm(x: &T, w: &T, eps: f64) -> Result<T> {
    let (x, w) = (&whole(x)?, &whole(w)?);
    let shape = x.dims().to_vec();
    floats!(x, w);
    let d = shape[shape.len() - 1];
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        d,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(d).enumerate() {
                let x = &x[(first + i) * d..][..d];
                let r = inverse_root(dot(x, x) / d as f32, eps);
                for (y, (&x, &w)) in out.iter_mut().zip(x.iter().zip(w)) {
                    *y = x * r * w;
                }
            }
        },
    );
    tensor(y, &shape)
}

/// Gradients of [`rms_norm`] for x and w; the one for x is added to `added`.
pub fn rms_norm_backward(x: &T, w: &T, grad: &T, eps: f64, added: Option<&T>) -> Result<(T, T)> {
    let (x, w, grad) = (&whole(x)?, &whole(w)?, &whole(grad)?);
    let (shape, adds) = (x.dims().to_vec(), added.is_some());
    // Not read if there is nothing to add to.
    let added = &whole(added.unwrap_or(grad))?;
    floats!(x, w, grad, added);
    let d = shape[shape.len() - 1];
    let mut dx = fresh(&shape);
    // All rows have the same parameters, like those of one sequence.
    let rows = dx.len() / d;
    let dw = by_sequences(
        &mut dx,
        (rows, d),
        d,
        #[inline(always)]
        |first, dx, share| {
            for (i, dx) in dx.chunks_exact_mut(d).enumerate() {
                let at = (first + i) * d;
                rms_row_backward(dx, share, &x[at..][..d], w, &grad[at..][..d], eps);
                if adds {
                    add_scaled(dx, 1.0, &added[at..][..d]);
                }
            }
        },
    );
    Ok((tensor(dx, &shape)?, tensor(dw, &[d])?))
}

/// With r = 1/rms: dx = r (g w - x r^2 mean(g w x)); the share of dw grows by g x r.
#[inline(always)]
fn rms_row_backward(dx: &mut [f32], share: &mut [f32], x: &[f32], w: &[f32], g: &[f32], eps: f64) {
    let d = x.len() as f32;
    for (dx, (&g, &w)) in dx.iter_mut().zip(g.iter().zip(w)) {
        *dx = g * w;
    }
    let r = inverse_root(dot(x, x) / d, eps);
    let along = dot(dx, x) / d * r * r;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = r * x.mul_add(-along, *dx);
    }
    for (share, (&g, &x)) in share.iter_mut().zip(g.iter().zip(x)) {
        *share = (g * r).mul_add(x, *share);
    }
}

/// (x - mean) / sqrt(var + eps) over the last dimension.
pub fn layer_norm(x: &T, eps: f64) -> Result<T> {
    standardised(x, eps, |_, _| {})
}

/// [`layer_norm`] of (b, l, c), times scale plus shift, (b, 1, c) each.
pub fn modulated_norm(x: &T, scale: &T, shift: &T, eps: f64) -> Result<T> {
    let (scale, shift, l) = (&whole(scale)?, &whole(shift)?, x.dims()[1]);
    floats!(scale, shift);
    standardised(x, eps, |row, y| {
        let own = row / l * y.len();
        let (scale, shift) = (&scale[own..], &shift[own..]);
        for (y, (&scale, &shift)) in y.iter_mut().zip(scale.iter().zip(shift)) {
            *y = y.mul_add(scale, shift);
        }
    })
}

/// Rows minus their means, divided by their deviations; `then` gets each row with its number while it is in the cache.
fn standardised(x: &T, eps: f64, then: impl Fn(usize, &mut [f32]) + Sync) -> Result<T> {
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
                let x = &x[(first + i) * d..][..d];
                standardise_row(out, x, eps);
                then(first + i, out);
            }
        },
    );
    tensor(y, &shape)
}

/// Gradient of [`layer_norm`].
pub fn layer_norm_backward(x: &T, grad: &T, eps: f64) -> Result<T> {
    let (x, grad) = (&whole(x)?, &whole(grad)?);
    let shape = x.dims().to_vec();
    floats!(x, grad);
    let d = shape[shape.len() - 1];
    let mut dx = fresh(&shape);
    by_rows(
        &mut dx,
        d,
        #[inline(always)]
        |first, out| {
            for (i, dx) in out.chunks_exact_mut(d).enumerate() {
                let at = (first + i) * d;
                let (x, g) = (&x[at..][..d], &grad[at..][..d]);
                let r = standardise_row(dx, x, eps);
                standardise_row_backward(dx, g, r);
            }
        },
    );
    tensor(dx, &shape)
}

/// y = (x - mean) r of a row; returns r, its reciprocal deviation.
#[inline(always)]
pub fn standardise_row(y: &mut [f32], x: &[f32], eps: f64) -> f32 {
    let (mean, r) = moments(x, eps);
    for (y, &x) in y.iter_mut().zip(x) {
        *y = (x - mean) * r;
    }
    r
}

/// dx = r (g - mean(g) - y mean(g y)) with y and r of [`standardise_row`]; `dx` holds y first.
#[inline(always)]
pub fn standardise_row_backward(dx: &mut [f32], g: &[f32], r: f32) {
    let n = g.len() as f32;
    let level = sum(g, |g| g) / n;
    let along = dot(g, dx) / n;
    for (dx, &g) in dx.iter_mut().zip(g) {
        *dx = r * (*dx).mul_add(-along, g - level);
    }
}

/// Group normalisation of (b, c, h, w) with scale and shift (c), then a function of each element.
pub fn group_norm(
    x: &T,
    groups: usize,
    w: &T,
    bias: &T,
    eps: f64,
    f: impl Fn(f32) -> f32 + Sync,
) -> Result<T> {
    let (x, w, bias) = (&whole(x)?, &whole(w)?, &whole(bias)?);
    let shape = x.dims().to_vec();
    floats!(x, w, bias);
    let (plane, per) = (shape[2] * shape[3], shape[1] / groups);
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        per * plane,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(per * plane).enumerate() {
                let group = (first + i) % groups;
                let x = &x[(first + i) * per * plane..][..per * plane];
                let (mean, r) = moments(x, eps);
                for (c, (y, x)) in out
                    .chunks_exact_mut(plane)
                    .zip(x.chunks_exact(plane))
                    .enumerate()
                {
                    let scale = r * w[group * per + c];
                    let shift = bias[group * per + c] - mean * scale;
                    for (y, &x) in y.iter_mut().zip(x) {
                        *y = f(x.mul_add(scale, shift));
                    }
                }
            }
        },
    );
    tensor(y, &shape)
}

/// Gradients of [`group_norm`] for x, scale and shift; with the shift in `silu`, those of the function followed by silu. The
/// one for x is added to `added`.
pub fn group_norm_backward(
    x: &T,
    groups: usize,
    w: &T,
    silu: Option<&T>,
    grad: &T,
    eps: f64,
    added: Option<&T>,
) -> Result<(T, T, T)> {
    let (x, w, grad) = (&whole(x)?, &whole(w)?, &whole(grad)?);
    let (shape, is_silu, adds) = (x.dims().to_vec(), silu.is_some(), added.is_some());
    // What is missing is not read.
    let (bias, added) = (&whole(silu.unwrap_or(w))?, &whole(added.unwrap_or(grad))?);
    floats!(x, w, grad, bias, added);
    let (channels, plane) = (shape[1], shape[2] * shape[3]);
    let per = channels / groups;
    let image = channels * plane;
    let mut dx = fresh(&shape);
    // One share of both parameters' gradients per image, summed in the order of the images.
    let mut shares = vec![0.0; shape[0] * 2 * channels];
    dx.par_chunks_mut(image)
        .zip(shares.par_chunks_mut(2 * channels))
        .enumerate()
        .for_each(|(b, (out, share))| {
            widest(
                #[inline(always)]
                || {
                    let (dw, db) = share.split_at_mut(channels);
                    for (group, dx) in out.chunks_exact_mut(per * plane).enumerate() {
                        let at = b * image + group * per * plane;
                        let own = group * per..(group + 1) * per;
                        let inputs = Group {
                            x: &x[at..][..per * plane],
                            w: &w[own.clone()],
                            silu: is_silu.then_some(&bias[own.clone()]),
                            g: &grad[at..][..per * plane],
                        };
                        inputs.backward(dx, &mut dw[own.clone()], &mut db[own], eps);
                        if adds {
                            add_scaled(dx, 1.0, &added[at..][..per * plane]);
                        }
                    }
                },
            );
        });
    let mut dw = total(&shares, 2 * channels);
    let db = dw.split_off(channels);
    Ok((
        tensor(dx, &shape)?,
        tensor(dw, &[channels])?,
        tensor(db, &[channels])?,
    ))
}

/// A group's part of the inputs.
struct Group<'a> {
    x: &'a [f32],
    w: &'a [f32],
    /// The shift, if silu follows.
    silu: Option<&'a [f32]>,
    g: &'a [f32],
}

impl Group<'_> {
    #[inline(always)]
    fn backward(&self, dx: &mut [f32], dw: &mut [f32], db: &mut [f32], eps: f64) {
        let Self { x, w, silu, g } = *self;
        let (plane, n) = (x.len() / w.len(), x.len() as f32);
        let (mean, r) = moments(x, eps);
        let (mut level, mut along) = (0.0, 0.0);
        for c in 0..w.len() {
            let (x, g) = (&x[c * plane..][..plane], &g[c * plane..][..plane]);
            // The gradient of the normalised values, while this plane is in the cache.
            let dx = &mut dx[c * plane..][..plane];
            match silu {
                Some(bias) => {
                    let scale = r * w[c];
                    let shift = bias[c] - mean * scale;
                    for (dx, (&x, &g)) in dx.iter_mut().zip(x.iter().zip(g)) {
                        let normal = x.mul_add(scale, shift);
                        *dx = g * silu_slope(normal, sigmoid(normal));
                    }
                }
                None => dx.copy_from_slice(g),
            }
            let flat = sum(dx, |g| g);
            // sum(g y) with y = (x - mean) r
            let weighted = (dot(dx, x) - mean * flat) * r;
            db[c] = flat;
            dw[c] = weighted;
            level += w[c] * flat / n;
            along += w[c] * weighted / n;
        }
        for c in 0..w.len() {
            let (x, dx) = (&x[c * plane..][..plane], &mut dx[c * plane..][..plane]);
            for (dx, &x) in dx.iter_mut().zip(x) {
                let y = (x - mean) * r;
                *dx = r * y.mul_add(-along, *dx * w[c] - level);
            }
        }
    }
}

/// Mean and reciprocal deviation, in two passes: the difference of two large sums would lose precision.
#[inline(always)]
fn moments(x: &[f32], eps: f64) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x, |x| x) / n;
    let variance = sum(x, |x| (x - mean) * (x - mean)) / n;
    (mean, inverse_root(variance, eps))
}

#[inline(always)]
fn inverse_root(mean_square: f32, eps: f64) -> f32 {
    1.0 / (mean_square + eps as f32).sqrt()
}

#[cfg(test)]
mod tests {
    use retort_engine::backend::{Binary, Layers, Norms, Tensors, Unary};

    use crate::tensor::Tensor;
    use crate::{Candle, waves};

    fn bits(x: &Tensor) -> Vec<u32> {
        let x = Candle::to_floats(x).expect("floats");
        x.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn one_pass_gives_the_bits_of_several() {
        let (shape, groups, eps) = ([3, 8, 9, 7], 4, 1e-6);
        let [x, grad, known] = [0.7, 0.9, 1.1].map(|step| waves(step, &shape));
        let [w, bias] = [1.3, 1.7].map(|step| waves(step, &[8]));
        let y = Candle::group_norm_silu(&x, groups, &w, &bias, eps).expect("a result");
        let normal = Candle::group_norm(&x, groups, &w, &bias, eps).expect("a result");
        let of_normal = Candle::unary_backward(&normal, &y, &grad, Unary::Silu).expect("a slope");
        let (dx, dw, db) =
            Candle::group_norm_backward(&x, groups, &w, &of_normal, eps).expect("gradients");
        let dx = Candle::binary(&known, &dx, Binary::Add).expect("a sum");
        let one =
            Candle::group_norm_silu_backward(&x, groups, [&w, &bias], &y, &grad, eps, Some(&known));
        let one = one.expect("gradients");
        assert_eq!(bits(&one.0), bits(&dx));
        assert_eq!(bits(&one.1), bits(&dw));
        assert_eq!(bits(&one.2), bits(&db));

        let [x, grad, known] = [0.7, 0.9, 1.1].map(|step| waves(step, &[5, 31, 37]));
        let w = waves(1.3, &[37]);
        let (dx, dw) = Candle::rms_norm_backward(&x, &w, &grad, eps).expect("gradients");
        let dx = Candle::binary(&known, &dx, Binary::Add).expect("a sum");
        let one = Candle::rms_norm_backward_adding(&x, &w, &grad, eps, Some(&known));
        let one = one.expect("gradients");
        assert_eq!(bits(&one.0), bits(&dx));
        assert_eq!(bits(&one.1), bits(&dw));
    }
}
