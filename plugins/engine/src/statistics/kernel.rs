//! The kernel distance (Binkowski et al. 2018, arXiv 1801.01401: KID with Inception): the unbiased estimate of the squared
//! maximum mean discrepancy under the kernel (x y / d + 1)^3, as a mean over subsets. Unlike the Frechet distance it is not
//! biased by few samples.

use nalgebra::{DMatrix, DMatrixView};
use rayon::prelude::*;

use super::{StatisticsError, rows};

/// Kernel distance over subsets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelDistance {
    /// Mean over the subsets; it may be negative if the sets are equal up to chance.
    pub mean: f64,
    /// Standard deviation over the subsets (divisor: their number); None for a single subset.
    pub deviation: Option<f64>,
    /// Subsets that were taken.
    pub subsets: usize,
    /// Samples of each set in a subset.
    pub size: usize,
}

/// Kernel distance of `real` (n, d) and `generated` (m, d) over `subsets` pairs of subsets of `size` samples, fewer if a set
/// has fewer; a single pair if subsets are the whole sets. `below(n)` draws a number below n; `go_on` is called for each
/// pair.
pub fn kernel_distance(
    real: &[f32],
    generated: &[f32],
    dim: usize,
    (subsets, size): (usize, usize),
    below: &mut dyn FnMut(usize) -> usize,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<KernelDistance, StatisticsError> {
    let n = rows("real features", real, dim)?;
    let m = rows("generated features", generated, dim)?;
    let size = size.min(n).min(m);
    if size < 2 {
        return Err(StatisticsError::TooFew {
            what: "kernel distance",
            needed: 2,
            found: size,
        });
    }
    let subsets = if size == n && size == m { 1 } else { subsets };
    let mut estimates = Vec::with_capacity(subsets);
    for _ in 0..subsets {
        if !go_on() {
            return Err(StatisticsError::Stopped);
        }
        let a = gather(real, dim, &mut choose(n, size, below));
        let b = gather(generated, dim, &mut choose(m, size, below));
        let within = |x: &[f64]| {
            let pairs = (size * (size - 1)) as f64;
            (kernels(x, x, dim) - diagonal(x, dim)) / pairs
        };
        let across = kernels(&a, &b, dim) / (size * size) as f64;
        estimates.push(within(&a) + within(&b) - 2.0 * across);
    }
    let count = estimates.len() as f64;
    let mean = estimates.iter().sum::<f64>() / count;
    let squares = estimates.iter().map(|x| (x - mean).powi(2));
    Ok(KernelDistance {
        mean,
        deviation: (subsets > 1).then(|| (squares.sum::<f64>() / count).sqrt()),
        subsets,
        size,
    })
}

/// `size` different numbers below n, in drawing order; in ascending order if that is all of them.
fn choose(n: usize, size: usize, below: &mut dyn FnMut(usize) -> usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    if size < n {
        for i in 0..size {
            let other = i + below(n - i);
            all.swap(i, other);
        }
        all.truncate(size);
    }
    all
}

fn gather(set: &[f32], dim: usize, picks: &mut [usize]) -> Vec<f64> {
    let values = picks.iter().flat_map(|&i| &set[i * dim..][..dim]);
    values.map(|&x| f64::from(x)).collect()
}

fn kernel(product: f64, dim: usize) -> f64 {
    (product / dim as f64 + 1.0).powi(3)
}

/// Sum of the kernel over all pairs. In blocks whose sums are added in order.
fn kernels(a: &[f64], b: &[f64], dim: usize) -> f64 {
    let right = DMatrixView::from_slice(b, dim, b.len() / dim);
    let sums: Vec<f64> = a
        .par_chunks(ROWS * dim)
        .map(|block| {
            let left = DMatrixView::from_slice(block, dim, block.len() / dim).transpose();
            let mut products = DMatrix::zeros(left.nrows(), right.ncols());
            products.gemm(1.0, &left, &right, 0.0);
            products.iter().map(|&x| kernel(x, dim)).sum()
        })
        .collect();
    sums.iter().sum()
}

/// Sum of the kernel of each point with itself.
fn diagonal(x: &[f64], dim: usize) -> f64 {
    let points = x.chunks_exact(dim);
    points
        .map(|point| kernel(point.iter().map(|x| x * x).sum(), dim))
        .sum()
}

const ROWS: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::tests::noise;

    /// By the definition, pair by pair.
    fn plain(a: &[f32], b: &[f32], dim: usize) -> f64 {
        let k = |x: &[f32], y: &[f32]| {
            let products = x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y));
            (products.sum::<f64>() / dim as f64 + 1.0).powi(3)
        };
        let (a, b): (Vec<&[f32]>, Vec<&[f32]>) = (a.chunks(dim).collect(), b.chunks(dim).collect());
        let within = |x: &[&[f32]]| {
            let mut sum = 0.0;
            for i in 0..x.len() {
                for j in 0..x.len() {
                    sum += if i == j { 0.0 } else { k(x[i], x[j]) };
                }
            }
            sum / (x.len() * (x.len() - 1)) as f64
        };
        let across: f64 = a.iter().flat_map(|x| b.iter().map(|y| k(x, y))).sum();
        within(&a) + within(&b) - 2.0 * across / (a.len() * b.len()) as f64
    }

    #[test]
    fn it_is_that_of_the_definition() {
        let (dim, n) = (21, ROWS + 7);
        let a = noise(n * dim, 31);
        let b: Vec<f32> = noise(n * dim, 32).iter().map(|x| 0.9 * x + 0.2).collect();
        let found = kernel_distance(&a, &b, dim, (5, 1000), &mut |_| 0, &mut || true).unwrap();
        let expected = plain(&a, &b, dim);
        assert!(
            (found.mean / expected - 1.0).abs() < 1e-9,
            "{found:?}, not {expected}"
        );
        assert_eq!((found.subsets, found.size, found.deviation), (1, n, None));

        // Subsets: those of the numbers drawn.
        let mut draws = vec![3, 0, 1, 0, 2, 2, 5, 5, 5, 1, 1, 1].into_iter();
        let mut below = |n: usize| draws.next().unwrap() % n;
        let found = kernel_distance(&a, &b, dim, (2, 3), &mut below, &mut || true).unwrap();
        let mut draws = vec![3, 0, 1, 0, 2, 2, 5, 5, 5, 1, 1, 1].into_iter();
        let mut below = |n: usize| draws.next().unwrap() % n;
        let mut pick = |set: &[f32]| -> Vec<f32> {
            let picks = choose(n, 3, &mut below);
            assert!(picks[0] != picks[1] && picks[1] != picks[2] && picks[0] != picks[2]);
            picks
                .iter()
                .flat_map(|&i| set[i * dim..][..dim].to_vec())
                .collect()
        };
        let each = [0, 1].map(|_| {
            let (x, y) = (pick(&a), pick(&b));
            plain(&x, &y, dim)
        });
        let mean = (each[0] + each[1]) / 2.0;
        assert!((found.mean - mean).abs() < 1e-9, "{found:?}, not {mean}");
        let deviation = found.deviation.unwrap();
        assert!((deviation - (each[0] - mean).abs()).abs() < 1e-9);
        assert_eq!((found.subsets, found.size), (2, 3));
        let one = kernel_distance(&a[..dim], &b, dim, (2, 3), &mut |_| 0, &mut || true);
        assert!(matches!(one, Err(StatisticsError::TooFew { .. })));
    }
}
