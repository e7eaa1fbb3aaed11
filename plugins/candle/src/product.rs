//! Matrix products on the gemm crate, strided and batched, in an order of summation that depends on nothing but the
//! inner dimension: a row of a product is the same whatever the number of rows and threads.

use gemm::Parallelism;
use rayon::prelude::*;
use retort_engine::error::{Error, Result};
use retort_kernels::skinny::{self, FEW, STRETCH};
use retort_kernels::{Matrix, Rayon};

use crate::T;
use crate::layout::{rows, whole};
use crate::view::{floats, fresh, tensor};

/// c (m, n), its rows `c_row` apart, becomes a (m, k) times b (k, n), or grows by it.
#[derive(Clone, Copy)]
pub struct Product {
    /// Rows of a and c.
    pub m: usize,
    /// Columns of a, rows of b.
    pub k: usize,
    /// Columns of b and c.
    pub n: usize,
    /// Whether c keeps what it holds and grows.
    pub grow: bool,
    /// Whether all threads of the pool take part, or only this one.
    pub parallel: bool,
}

impl Product {
    /// Computes it.
    pub fn run(self, c: &mut [f32], c_row: usize, a: Matrix<'_>, b: Matrix<'_>) {
        let Self { m, k, n, .. } = self;
        if m == 0 || n == 0 {
            return;
        }
        assert!(
            k > 0 && a.holds(m, k) && b.holds(k, n) && (m - 1) * c_row + n <= c.len() && n <= c_row,
            "a matrix product beyond its operands"
        );
        let parallelism = if self.parallel {
            Parallelism::Rayon(0)
        } else {
            Parallelism::None
        };
        // SAFETY: the assertion keeps every element that is read or written inside its slice; c is borrowed mutably and
        // its rows do not overlap (n <= c_row).
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                c_row as isize,
                self.grow,
                a.data.as_ptr(),
                a.column as isize,
                a.row as isize,
                b.data.as_ptr(),
                b.column as isize,
                b.row as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

/// x (.., i) times w (o, i) transposed, plus bias (o). A row is the same whatever the number of rows: the order of
/// summation is spelled out, in stretches that gemm does not divide.
pub fn linear(x: &T, w: &T, bias: Option<&T>) -> Result<T> {
    let x = &whole(x)?;
    let w = &rows(w)?;
    let (mut shape, (o, i)) = (x.dims().to_vec(), (w.dims()[0], w.dims()[1]));
    let n = shape.iter().product::<usize>() / i;
    *shape.last_mut().expect("rank >= 1") = o;
    let w_row = w.stride()[0];
    let bias = bias.map(whole).transpose()?;
    floats!(x, w);
    let mut y = fresh(&[n, o]);
    if let Some(bias) = &bias {
        floats!(bias);
        y.chunks_exact_mut(o)
            .for_each(|y| y.copy_from_slice(&bias[..o]));
    }
    let grow = bias.is_some();
    // For few results gemm switches to inner products, which sum in another order.
    if n <= FEW || o * n <= 256 || (i > 512 && o <= 64 && n < 65) {
        skinny::product(&Rayon, &mut y, x, (w, w_row), [n, i, o], grow);
        return tensor(y, &shape);
    }
    for start in (0..i).step_by(STRETCH) {
        Product {
            m: n,
            k: STRETCH.min(i - start),
            n: o,
            grow: grow || start > 0,
            parallel: true,
        }
        .run(
            &mut y,
            o,
            Matrix::rows(&x[start..], i),
            Matrix {
                data: &w[start..],
                row: w_row,
                column: 1,
            }
            .turned(),
        );
    }
    tensor(y, &shape)
}

/// Product of the last two dimensions, with equal leading ones.
pub fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
    let rank = a.rank();
    let sizes = |x: &T, turn: bool| {
        let d = &x.dims()[x.rank() - 2..];
        if turn { (d[1], d[0]) } else { (d[0], d[1]) }
    };
    let ((m, k), (k2, n)) = (sizes(a, ta), sizes(b, tb));
    let mut shape = a.dims()[..rank - 2].to_vec();
    if k != k2 || b.rank() != rank || b.dims()[..rank - 2] != shape[..] {
        return Err(Error::Backend(format!(
            "matmul: the shapes {:?} and {:?} do not fit",
            a.dims(),
            b.dims()
        )));
    }
    let batch: usize = shape.iter().product();
    let starts_a = starts(&shape, a.stride());
    let starts_b = starts(&shape, b.stride());
    let steps = |x: &T| (x.stride()[rank - 2], x.stride()[rank - 1]);
    let (steps_a, steps_b) = (steps(a), steps(b));
    shape.extend([m, n]);
    floats!(a, b);
    let matrix = |x, start: usize, (row, column), turn| {
        let all: &[f32] = x;
        let matrix = Matrix {
            data: &all[start..],
            row,
            column,
        };
        if turn { matrix.turned() } else { matrix }
    };
    let mut y = fresh(&shape);
    let product = |i: usize, y: &mut [f32], parallel: bool| {
        Product {
            m,
            k,
            n,
            grow: false,
            parallel,
        }
        .run(
            y,
            n,
            matrix(a, starts_a[i], steps_a, ta),
            matrix(b, starts_b[i], steps_b, tb),
        );
    };
    if batch == 1 {
        product(0, &mut y, true);
    } else {
        y.par_chunks_mut(m * n)
            .enumerate()
            .with_min_len((64 * 1024 / (m * n * k)).max(1))
            .for_each(|(i, y)| product(i, y, false));
    }
    tensor(y, &shape)
}

/// The start of each matrix of a batch.
fn starts(batch: &[usize], stride: &[usize]) -> Vec<usize> {
    let mut starts = vec![0];
    for (&n, &step) in batch.iter().zip(stride) {
        starts = starts
            .iter()
            .flat_map(|start| (0..n).map(move |i| start + i * step))
            .collect();
    }
    starts
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::linear;

    /// Numbers without a pattern, as exact as they come.
    fn numbers(seed: u32, n: usize) -> Vec<f32> {
        let mut x = seed;
        let next = |_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / 16_777_216.0 - 0.5
        };
        (0..n).map(next).collect()
    }

    #[test]
    fn a_row_does_not_depend_on_how_many_there_are() {
        let many = 100;
        for (i, o) in [
            (768, 2304),
            (2048, 768),
            (96, 128),
            (1000, 40),
            (700, 3),
            (31, 17),
            (256, 16),
            (257, 65),
        ] {
            let tensor = |seed, shape: &[usize]| {
                let data = numbers(seed, shape.iter().product());
                Tensor::from_vec(data, shape, &Device::Cpu).expect("a tensor")
            };
            let (x, w, bias) = (tensor(1, &[many, i]), tensor(2, &[o, i]), tensor(3, &[o]));
            for bias in [None, Some(&bias)] {
                let rows = |n: usize| -> Vec<Vec<f32>> {
                    let x = x.narrow(0, 0, n).expect("rows");
                    let y = linear(&x, &w, bias).expect("a product");
                    y.to_vec2().expect("floats")
                };
                let all = rows(many);
                for n in [1, 2, 3, 5, 6, 7, 8, 12, 16, 24, 25, 33, 64, 65, 99] {
                    let few = rows(n);
                    for (r, row) in few.iter().enumerate() {
                        let differing = row.iter().zip(&all[r]).filter(|(a, b)| a != b).count();
                        assert_eq!(differing, 0, "row {r} of {n}, {i} to {o}");
                    }
                }
                let x: Vec<f32> = x.flatten_all().expect("flat").to_vec1().expect("floats");
                let w: Vec<f32> = w.flatten_all().expect("flat").to_vec1().expect("floats");
                for (r, c) in [(0, 0), (7, o - 1), (99, o / 2)] {
                    let pairs = x[r * i..][..i].iter().zip(&w[c * i..][..i]);
                    let mut sum: f64 = pairs.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    if let Some(bias) = bias {
                        sum += f64::from(bias.to_vec1::<f32>().expect("floats")[c]);
                    }
                    assert!((sum - f64::from(all[r][c])).abs() < 1e-5 * (i as f64).sqrt());
                }
            }
        }
    }
}
