//! Arithmetic with broadcasting, and sums.

use rayon::prelude::*;
use retort_engine::backend::Binary;
use retort_engine::error::Result;
use retort_kernels::lanes::{greater, sum as sum_of, widest};

use crate::T;
use crate::layout::whole;
use crate::rows::by_rows;
use crate::view::{floats, fresh, tensor};

/// A function of pairs, if one argument has the result's shape and the other repeats regularly; otherwise None.
pub fn binary(a: &T, b: &T, f: Binary) -> Option<Result<T>> {
    if let Some(repeat) = Repeat::of(a.dims(), b.dims()) {
        return Some(apply(a, b, repeat, f, false));
    }
    let repeat = Repeat::of(b.dims(), a.dims())?;
    Some(apply(b, a, repeat, f, true))
}

/// x * mul + add
pub fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
    let x = &whole(x)?;
    let shape = x.dims().to_vec();
    let (mul, add) = (mul as f32, add as f32);
    floats!(x);
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        1,
        #[inline(always)]
        |first, out| {
            for (y, &x) in out.iter_mut().zip(&x[first..]) {
                *y = x.mul_add(mul, add);
            }
        },
    );
    tensor(y, &shape)
}

/// Sum over dimensions, which stay with size 1.
pub fn sum(x: &T, dims: &[usize]) -> Result<T> {
    let mut y = whole(x)?;
    let mut over = vec![false; x.rank()];
    dims.iter().for_each(|&d| over[d] = true);
    // Adjacent dimensions are summed together; groups of them one after the other, the last first.
    let mut end = over.len();
    while let Some(last) = over[..end].iter().rposition(|&o| o) {
        let first = over[..last].iter().rposition(|&o| !o).map_or(0, |d| d + 1);
        y = sum_group(&y, first, last)?;
        end = first;
    }
    Ok(y)
}

/// How the repeated argument is read for a result of full shape. Its element for position i is (i / run) % period, in block i
/// / (run period turns) of `period` elements.
#[derive(Clone, Copy)]
struct Repeat {
    run: usize,
    period: usize,
    turns: usize,
}

impl Repeat {
    fn of(full: &[usize], small: &[usize]) -> Option<Self> {
        let lead = full.len().checked_sub(small.len())?;
        let padded = |d: usize| if d < lead { 1 } else { small[d - lead] };
        let (mut run, mut period, mut turns, mut d) = (1, 1, 1, full.len());
        while d > 0 && padded(d - 1) == 1 {
            d -= 1;
            run *= full[d];
        }
        while d > 0 && padded(d - 1) == full[d - 1] {
            d -= 1;
            period *= full[d];
        }
        while d > 0 && padded(d - 1) == 1 {
            d -= 1;
            turns *= full[d];
        }
        (0..d)
            .all(|d| padded(d) == full[d])
            .then_some(Self { run, period, turns })
    }
}

fn apply(a: &T, b: &T, repeat: Repeat, f: Binary, swapped: bool) -> Result<T> {
    match (f, swapped) {
        (Binary::Add, _) => zip(a, b, repeat, |a, b| a + b),
        (Binary::Mul, _) => zip(a, b, repeat, |a, b| a * b),
        (Binary::Max, _) => zip(a, b, repeat, greater),
        (Binary::Sub, false) => zip(a, b, repeat, |a, b| a - b),
        (Binary::Sub, true) => zip(a, b, repeat, |a, b| b - a),
        (Binary::Div, false) => zip(a, b, repeat, |a, b| a / b),
        (Binary::Div, true) => zip(a, b, repeat, |a, b| b / a),
    }
}

fn zip(a: &T, b: &T, repeat: Repeat, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<T> {
    let (a, b) = (&whole(a)?, &whole(b)?);
    let shape = a.dims().to_vec();
    let Repeat { run, period, turns } = repeat;
    floats!(a, b);
    let mut y = fresh(&shape);
    if run == 1 && period == y.len() {
        by_rows(
            &mut y,
            1,
            #[inline(always)]
            |first, out| {
                for (y, (&a, &b)) in out.iter_mut().zip(a[first..].iter().zip(&b[first..])) {
                    *y = f(a, b);
                }
            },
        );
    } else if run == 1 {
        by_rows(
            &mut y,
            period,
            #[inline(always)]
            |first, out| {
                for (i, out) in out.chunks_exact_mut(period).enumerate() {
                    let a = &a[(first + i) * period..][..period];
                    let b = &b[(first + i) / turns * period..][..period];
                    for (y, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
                        *y = f(a, b);
                    }
                }
            },
        );
    } else {
        by_rows(
            &mut y,
            run,
            #[inline(always)]
            |first, out| {
                for (i, out) in out.chunks_exact_mut(run).enumerate() {
                    let a = &a[(first + i) * run..][..run];
                    let row = first + i;
                    let b = b[row / (period * turns) * period + row % period];
                    for (y, &a) in out.iter_mut().zip(a) {
                        *y = f(a, b);
                    }
                }
            },
        );
    }
    tensor(y, &shape)
}

/// Sum over the dimensions first..=last of a whole tensor.
fn sum_group(x: &T, first: usize, last: usize) -> Result<T> {
    let mut shape = x.dims().to_vec();
    let count: usize = shape[first..=last].iter().product();
    let inner: usize = shape[last + 1..].iter().product();
    shape[first..=last].fill(1);
    floats!(x);
    let mut y = fresh(&shape);
    if inner == 1 {
        // A few rows of results per task, each the sum of `count` neighbours.
        let rows = (16 * 1024 / count).max(1);
        y.par_chunks_mut(rows).enumerate().for_each(|(i, out)| {
            widest(
                #[inline(always)]
                || {
                    let x = &x[i * rows * count..][..out.len() * count];
                    if count == 2 {
                        // The halves of enlarged pixels: too few for lanes.
                        for (y, [a, b]) in out.iter_mut().zip(x.as_chunks::<2>().0) {
                            *y = a + b;
                        }
                        return;
                    }
                    for (y, x) in out.iter_mut().zip(x.chunks_exact(count)) {
                        *y = sum_of(x, |x| x);
                    }
                },
            );
        });
    } else {
        // Columns in blocks: every block walks all rows, so the order of a sum never depends on the threads.
        let width = inner.min(256);
        y.par_chunks_mut(inner).enumerate().for_each(|(o, out)| {
            let block = |(c, out): (usize, &mut [f32])| {
                widest(
                    #[inline(always)]
                    || {
                        out.fill(0.0);
                        for r in 0..count {
                            let row = &x[(o * count + r) * inner + c * width..][..out.len()];
                            for (y, &x) in out.iter_mut().zip(row) {
                                *y += x;
                            }
                        }
                    },
                );
            };
            if count * inner > 64 * 1024 {
                out.par_chunks_mut(width).enumerate().for_each(block);
            } else {
                out.chunks_mut(width).enumerate().for_each(block);
            }
        });
    }
    tensor(y, &shape)
}
