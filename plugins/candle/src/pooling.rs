//! Maximum of sliding windows: first over the lines of a window, then along the line.

use rayon::prelude::*;
use retort_engine::backend::Window;
use retort_engine::error::Result;
use retort_kernels::lanes::greater;

use crate::T;
use crate::layout::whole;
use crate::view::{floats, fresh, tensor, zeros};

/// (b, c, h, w) -> (b, c, h', w')
pub fn max_pool2d(x: &T, window: Window) -> Result<T> {
    let x = &whole(x)?;
    let (d, size) = (x.dims().to_vec(), Size::of(x, window));
    floats!(x);
    let shape = [d[0], d[1], size.out_h, size.out_w];
    let mut y = fresh(&shape);
    y.par_chunks_mut(size.out_h * size.out_w)
        .zip(x.par_chunks_exact(size.h * size.w))
        .for_each_init(Vec::new, |line, (y, x)| size.forward(x, y, line));
    tensor(y, &shape)
}

/// Gradient of [`max_pool2d`].
pub fn max_pool2d_backward(x: &T, grad: &T, window: Window) -> Result<T> {
    let (x, grad) = (&whole(x)?, &whole(grad)?);
    let (d, size) = (x.dims().to_vec(), Size::of(x, window));
    floats!(x, grad);
    let mut dx = zeros(&d);
    dx.par_chunks_mut(size.h * size.w)
        .zip(x.par_chunks_exact(size.h * size.w))
        .zip(grad.par_chunks_exact(size.out_h * size.out_w))
        .for_each(|((dx, x), g)| size.backward(x, g, dx));
    tensor(dx, &d)
}

/// Whether images and windows fit: each window covers at least one pixel.
pub fn pooled(x: &T, window: Window) -> bool {
    x.rank() == 4
        && window.padding < window.size
        && window.stride > 0
        && x.dims()[2..]
            .iter()
            .all(|n| n + 2 * window.padding >= window.size)
}

struct Size {
    h: usize,
    w: usize,
    out_h: usize,
    out_w: usize,
    window: Window,
}

impl Size {
    fn of(x: &T, window: Window) -> Self {
        let (h, w) = (x.dims()[2], x.dims()[3]);
        Self {
            h,
            w,
            out_h: window.count(h),
            out_w: window.count(w),
            window,
        }
    }

    /// The pixels that window `i` covers along a side of `n`.
    fn seen(&self, i: usize, n: usize) -> std::ops::Range<usize> {
        let first = i * self.window.stride;
        let end = (first + self.window.size - self.window.padding).min(n);
        first.saturating_sub(self.window.padding).min(end)..end
    }

    fn forward(&self, x: &[f32], y: &mut [f32], line: &mut Vec<f32>) {
        for (i, y) in y.chunks_exact_mut(self.out_w).enumerate() {
            line.clear();
            line.resize(self.w, f32::NEG_INFINITY);
            for row in self.seen(i, self.h) {
                let row = &x[row * self.w..][..self.w];
                line.iter_mut()
                    .zip(row)
                    .for_each(|(m, &x)| *m = greater(*m, x));
            }
            for (i, y) in y.iter_mut().enumerate() {
                let seen = &line[self.seen(i, self.w)];
                *y = seen.iter().copied().fold(f32::NEG_INFINITY, greater);
            }
        }
    }

    fn backward(&self, x: &[f32], g: &[f32], dx: &mut [f32]) {
        for (i, g) in g.chunks_exact(self.out_w).enumerate() {
            for (j, &g) in g.iter().enumerate() {
                let (mut greatest, mut at) = (f32::NEG_INFINITY, None);
                for row in self.seen(i, self.h) {
                    for place in self.seen(j, self.w).map(|column| row * self.w + column) {
                        if at.is_none() || x[place] > greatest {
                            (greatest, at) = (x[place], Some(place));
                        }
                    }
                }
                if let Some(at) = at {
                    dx[at] += g;
                }
            }
        }
    }
}
