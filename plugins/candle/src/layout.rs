//! Row-major copies of views, and concatenations, by all threads: candle copies a view element by element on one thread.

use retort_engine::error::Result;

use crate::rows::by_rows;
use crate::view::{fits, floats, fresh, tensor};
use crate::{T, failed};

/// Rows and columns that are copied together, so that each cache line of a transposed view is read once.
const TILE: usize = 8;

/// The same tensor, row-major in memory.
pub fn whole(x: &T) -> Result<T> {
    if fits(&[x]) && !x.is_contiguous() {
        return row_major(x);
    }
    x.contiguous().map_err(failed)
}

/// The same tensor, with adjacent elements in its last dimension and any strides before.
pub fn rows(x: &T) -> Result<T> {
    match x.stride().last() {
        Some(1) => Ok(x.clone()),
        _ => whole(x),
    }
}

/// A copy of a view in row-major order.
fn row_major(x: &T) -> Result<T> {
    let (view, shape) = (View::of(x), x.dims().to_vec());
    floats!(x);
    let mut y = fresh(&shape);
    view.copy(x, &mut y);
    tensor(y, &shape)
}

/// Tensors beside each other along a dimension; their other dimensions are equal.
pub fn cat(xs: &[&T], dim: usize) -> Result<T> {
    let mut shape = xs[0].dims().to_vec();
    shape[dim] = xs.iter().map(|x| x.dims()[dim]).sum();
    let row: usize = shape[dim..].iter().product();
    let mut y = fresh(&shape);
    let mut left = 0;
    for x in xs {
        let x = &whole(x)?;
        let own: usize = x.dims()[dim..].iter().product();
        floats!(x);
        if row == y.len() {
            by_rows(
                &mut y[left..][..own],
                1,
                #[inline(always)]
                |first, out| out.copy_from_slice(&x[first..][..out.len()]),
            );
        } else {
            by_rows(
                &mut y,
                row,
                #[inline(always)]
                |first, out| {
                    for (i, out) in out.chunks_exact_mut(row).enumerate() {
                        out[left..][..own].copy_from_slice(&x[(first + i) * own..][..own]);
                    }
                },
            );
        }
        left += own;
    }
    tensor(y, &shape)
}

/// Sizes of a view and steps in memory, at least two, with neighbouring dimensions merged where one step leads through both.
struct View {
    sizes: Vec<usize>,
    steps: Vec<usize>,
}

impl View {
    fn of(x: &T) -> Self {
        let (mut sizes, mut steps) = (vec![1, 1], vec![0, 0]);
        for (&size, &step) in x.dims().iter().zip(x.stride()) {
            let last = sizes.len() - 1;
            if size == 1 {
                continue;
            }
            if steps[last] == size * step {
                sizes[last] *= size;
                steps[last] = step;
            } else {
                sizes.push(size);
                steps.push(step);
            }
        }
        Self { sizes, steps }
    }

    /// Copies its elements in order.
    fn copy(&self, x: &[f32], out: &mut [f32]) {
        let last = self.sizes.len() - 1;
        let (m, n) = (self.sizes[last - 1], self.sizes[last]);
        let (down, across) = (self.steps[last - 1], self.steps[last]);
        by_rows(
            out,
            n,
            #[inline(always)]
            |first, out| {
                let (mut at, mut rest) = (first, out);
                while !rest.is_empty() {
                    let (matrix, row) = (at / m, at % m);
                    let run = (m - row).min(rest.len() / n);
                    let (own, after) = std::mem::take(&mut rest).split_at_mut(run * n);
                    copy_rows(&x[self.start(matrix) + row * down..], own, n, down, across);
                    (at, rest) = (at + run, after);
                }
            },
        );
    }

    /// Where in memory a matrix of the last two dimensions begins.
    fn start(&self, mut matrix: usize) -> usize {
        let mut start = 0;
        for d in (0..self.sizes.len() - 2).rev() {
            start += matrix % self.sizes[d] * self.steps[d];
            matrix /= self.sizes[d];
        }
        start
    }
}

/// Rows of `n` elements that lie `across` apart; the rows lie `down` apart.
#[inline(always)]
fn copy_rows(x: &[f32], out: &mut [f32], n: usize, down: usize, across: usize) {
    if across == 1 {
        for (i, out) in out.chunks_exact_mut(n).enumerate() {
            out.copy_from_slice(&x[i * down..][..n]);
        }
        return;
    }
    for (top, out) in out.chunks_mut(TILE * n).enumerate() {
        for left in (0..n).step_by(TILE) {
            let right = n.min(left + TILE);
            for (i, out) in out.chunks_exact_mut(n).enumerate() {
                let x = &x[(top * TILE + i) * down..];
                for (j, out) in (left..right).zip(&mut out[left..right]) {
                    *out = x[j * across];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};
    use retort_engine::backend::Tensors;

    use super::*;
    use crate::Candle;

    fn counting(shape: &[usize]) -> T {
        let data: Vec<f32> = (0..shape.iter().product::<usize>())
            .map(|i| i as f32)
            .collect();
        Tensor::from_vec(data, shape, &Device::Cpu).expect("a tensor")
    }

    fn elements(x: &T) -> Vec<f32> {
        x.flatten_all().expect("flat").to_vec1().expect("floats")
    }

    #[test]
    fn a_view_is_copied_as_candle_does() {
        let x = counting(&[3, 37, 5, 29]);
        let large = counting(&[40, 30, 50]);
        let views = [
            x.permute((0, 2, 3, 1)),
            x.permute((3, 1, 0, 2)),
            x.narrow(3, 4, 11),
            x.narrow(1, 30, 7).and_then(|x| x.transpose(2, 3)),
            x.narrow(0, 2, 1).and_then(|x| x.t()),
            counting(&[1, 1]).broadcast_as((7, 3, 5)),
            counting(&[4, 1, 6, 1]).broadcast_as((4, 2, 6, 2)),
            // More than one task, whose borders lie within a matrix.
            large.transpose(1, 2),
            large.t().and_then(|x| x.narrow(1, 7, 33)),
        ];
        for view in views {
            let view = view.expect("a view");
            let copy = row_major(&view).expect("a copy");
            assert!(copy.is_contiguous());
            let plain = view.contiguous().expect("candle's copy");
            assert_eq!(elements(&copy), elements(&plain), "{:?}", view.layout());
        }
    }

    #[test]
    fn pieces_of_any_layout_make_a_row_major_whole() {
        let turned = counting(&[5, 4, 3]).transpose(0, 2).expect("a view");
        let zeros = counting(&[1, 1, 1]).broadcast_as((3, 2, 5));
        let views = [turned, zeros.expect("a view"), counting(&[3, 4, 5])];
        let [turned, zeros, plain] = views.map(crate::tensor::Tensor::from);
        for (pieces, dim) in [
            (vec![&turned, &zeros, &plain], 1),
            (vec![&turned, &plain], 0),
            (vec![&plain, &turned], 2),
            (vec![&turned], 1),
        ] {
            let got = Candle::cat(pieces.as_slice(), dim).expect("a whole");
            assert!(got.is_contiguous(), "along {dim}");
            let raws: Vec<&T> = pieces.iter().map(|x| &x.raw).collect();
            let want = Tensor::cat(&raws, dim).expect("candle's own");
            assert_eq!(got.dims(), want.dims());
            assert_eq!(elements(&got), elements(&want), "along {dim}");
        }
        assert!(Candle::cat(&[&plain, &counting(&[3, 4, 6]).into()], 1).is_err());
    }
}
