//! Figures that compare sets of images through their features: how far apart, how good, how varied.
//!
//! - Frechet distance: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
//! - Inception score (`score.rs`), precision and recall (`neighbours.rs`), and the kernel distance (`kernel.rs`).
//!
//! In: features (n, d) of any network, row-major. Out: plain numbers. Deliberately absent: the networks, files. Results do
//! not depend on the number of threads.

pub mod kernel;
pub mod neighbours;
mod score;

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut};
use rayon::prelude::*;
use retort_abi::{Failure, FailureCode};

pub use score::{InceptionScore, RunningScore, inception_score, is_sorted_by_class};

/// Mean and covariance of a set of features: all that the Frechet distance needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Mean of each feature, (d).
    pub mean: Vec<f64>,
    /// Covariance with divisor n - 1, (d, d).
    pub covariance: Vec<f64>,
}

/// Why a figure cannot be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatisticsError {
    /// Lengths that do not match.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// Which array.
        what: &'static str,
        /// The length or multiple expected.
        expected: String,
        /// The length found.
        found: usize,
    },
    /// Too few samples for the figure.
    #[error("{what}: at least {needed} samples are needed, found {found}")]
    TooFew {
        /// Which figure.
        what: &'static str,
        /// The minimum number of samples.
        needed: usize,
        /// Samples given.
        found: usize,
    },
    /// It was asked to stop.
    #[error("stopped")]
    Stopped,
    /// NaN or infinity among the inputs.
    #[error("{what}: value {index} is not finite")]
    NotFinite {
        /// Which array.
        what: &'static str,
        /// Index of the first such value.
        index: usize,
    },
    /// An invalid covariance: the element, and why.
    #[error("covariance: {0}")]
    Covariance(String),
}

impl From<StatisticsError> for Failure {
    fn from(error: StatisticsError) -> Self {
        let code = match &error {
            StatisticsError::Shape { .. } | StatisticsError::Covariance(_) => FailureCode::BadData,
            StatisticsError::TooFew { .. } => FailureCode::InvalidOptions,
            StatisticsError::Stopped => FailureCode::Cancelled,
            StatisticsError::NotFinite { .. } => FailureCode::Numerical,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<StatisticsError> for crate::Error {
    fn from(error: StatisticsError) -> Self {
        match error {
            StatisticsError::Stopped => crate::Error::Cancelled,
            error => crate::Error::Host(error.into()),
        }
    }
}

impl Moments {
    /// Moments of features (n, d), in f64; at least two rows.
    pub fn of(features: &[f32], dim: usize) -> Result<Self, StatisticsError> {
        let mut running = RunningMoments::new(dim);
        running.add(features)?;
        running.finish()
    }

    /// Given moments: `mean` (d) and `covariance` (d, d), which must be symmetric up to rounding, without negative variances.
    pub fn new(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self, StatisticsError> {
        if covariance.len() != mean.len() * mean.len() {
            return Err(StatisticsError::Shape {
                what: "covariance",
                expected: format!("{0} x {0} values", mean.len()),
                found: covariance.len(),
            });
        }
        if let Some(index) = mean.iter().position(|value| !value.is_finite()) {
            let what = "mean";
            return Err(StatisticsError::NotFinite { what, index });
        }
        check_covariance(&covariance, mean.len())?;
        Ok(Self { mean, covariance })
    }

    /// Number of features.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }
}

/// The largest allowed asymmetry of a covariance, relative to its largest element: more than the rounding of f32.
const ASYMMETRY: f64 = 1e-6;

/// Refuses an invalid covariance (d, d), naming the first bad element.
fn check_covariance(values: &[f64], dim: usize) -> Result<(), StatisticsError> {
    let refuse = |message: String| Err(StatisticsError::Covariance(message));
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let (row, column) = (at / dim, at % dim);
        return refuse(format!("element ({row}, {column}) is {}", values[at]));
    }
    if let Some(i) = (0..dim).find(|i| values[i * (dim + 1)] < 0.0) {
        let variance = values[i * (dim + 1)];
        return refuse(format!(
            "element ({i}, {i}) is {variance}, and no variance is below 0"
        ));
    }
    let largest = values.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let mut pairs = (0..dim).flat_map(|i| (0..i).map(move |j| (i, j)));
    let apart = pairs.find(|(i, j)| {
        let difference = values[i * dim + j] - values[j * dim + i];
        difference.abs() > ASYMMETRY * largest
    });
    match apart {
        None => Ok(()),
        Some((i, j)) => refuse(format!(
            "element ({i}, {j}) is {}, and element ({j}, {i}) {}: a covariance is symmetric",
            values[i * dim + j],
            values[j * dim + i]
        )),
    }
}

/// Moments of features that arrive in parts. The result is bit-identical however they are divided, and memory does not grow
/// with their number.
#[derive(Debug, Clone)]
pub struct RunningMoments {
    dim: usize,
    /// Rows in the sums.
    count: usize,
    /// Mean of the first batch: close to all rows, so that their products do not cancel.
    origin: Vec<f64>,
    /// Sum of x - origin, (d).
    sum: Vec<f64>,
    /// Sum of (x - origin) (x - origin)^T, (d, d): blocks of columns, each from its diagonal down.
    products: Vec<f64>,
    /// Rows short of a batch.
    pending: Vec<f32>,
}

impl RunningMoments {
    /// Of no rows yet.
    pub fn new(dim: usize) -> Self {
        Self {
            dim,
            count: 0,
            origin: Vec::new(),
            sum: vec![0.0; dim],
            products: vec![0.0; dim * dim],
            pending: Vec::new(),
        }
    }

    /// Adds rows (n, d).
    pub fn add(&mut self, features: &[f32]) -> Result<(), StatisticsError> {
        rows("features", features, self.dim)?;
        for row in features.chunks_exact(self.dim) {
            self.pending.extend_from_slice(row);
            if self.pending.len() == BATCH_ROWS * self.dim {
                self.flush();
            }
        }
        Ok(())
    }

    /// The moments of all rows; at least two.
    pub fn finish(mut self) -> Result<Moments, StatisticsError> {
        if !self.pending.is_empty() {
            self.flush();
        }
        let Self { dim, count, .. } = self;
        if count < 2 {
            return Err(StatisticsError::TooFew {
                what: "covariance",
                needed: 2,
                found: count,
            });
        }
        let n = count as f64;
        let offset: Vec<f64> = self.sum.iter().map(|sum| sum / n).collect();
        let mut covariance = self.products;
        for i in 0..dim {
            for j in 0..=i {
                let mut value = (covariance[j * dim + i] - n * offset[i] * offset[j]) / (n - 1.0);
                if i == j {
                    value = value.max(0.0); // rounding, if nothing varies
                }
                covariance[j * dim + i] = value;
                covariance[i * dim + j] = value;
            }
        }
        let mean = self
            .origin
            .iter()
            .zip(&offset)
            .map(|(o, d)| o + d)
            .collect();
        Ok(Moments { mean, covariance })
    }

    /// Takes the pending rows into the sums. Blocks of columns in parallel, so that the order of the sums is fixed.
    fn flush(&mut self) {
        let dim = self.dim;
        let count = self.pending.len() / dim;
        if self.origin.is_empty() {
            self.origin = vec![0.0; dim];
            for row in self.pending.chunks_exact(dim) {
                let sums = self.origin.iter_mut().zip(row);
                sums.for_each(|(sum, &x)| *sum += f64::from(x));
            }
            self.origin.iter_mut().for_each(|sum| *sum /= count as f64);
        }
        let origin = &self.origin;
        let centred = |row: &[f32]| -> Vec<f64> {
            let pairs = row.iter().zip(origin);
            pairs.map(|(&x, origin)| f64::from(x) - origin).collect()
        };
        let batch: Vec<f64> = self
            .pending
            .par_chunks_exact(dim)
            .flat_map_iter(centred)
            .collect();
        for row in batch.chunks_exact(dim) {
            self.sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        let batch = DMatrixView::from_slice(&batch, dim, count); // (d, b)
        self.products
            .par_chunks_mut(BLOCK_COLUMNS * dim)
            .enumerate()
            .for_each(|(block, columns)| {
                let (first, width) = (block * BLOCK_COLUMNS, columns.len() / dim);
                let right = batch.rows(first, width).transpose(); // (b, width)
                DMatrixViewMut::from_slice(columns, dim, width)
                    .rows_mut(first, dim - first)
                    .gemm(1.0, &batch.rows(first, dim - first), &right, 1.0);
            });
        self.pending.clear();
        self.count += count;
    }
}

/// Frechet distance of the Gaussians with these moments: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0.
///
/// With S1 = F F^T the eigenvalues of S1 S2 are those of the symmetric F^T S2 F, and zeros. So no matrix root is needed,
/// singular covariances need no offset, and no complex numbers appear.
pub fn frechet_distance(a: &Moments, b: &Moments) -> Result<f64, StatisticsError> {
    let dim = a.dim();
    if b.dim() != dim {
        let expected = format!("{dim} features as in the first set");
        return Err(StatisticsError::Shape {
            what: "second set",
            expected,
            found: b.dim(),
        });
    }
    let covariance = |moments: &Moments| {
        let matrix = DMatrix::from_column_slice(dim, dim, &moments.covariance);
        (&matrix + matrix.transpose()) * 0.5 // symmetric to the last bit
    };
    let (first, second) = (covariance(a), covariance(b));
    let trace = first.trace() + second.trace();
    let means: f64 = a
        .mean
        .iter()
        .zip(&b.mean)
        .map(|(a, b)| (a - b) * (a - b))
        .sum();

    let factor = factor(&first);
    let inner = product(&factor.transpose(), &product(&second, &factor));
    let symmetric = (&inner + inner.transpose()) * 0.5;
    let root_trace: f64 = match symmetric.is_empty() {
        true => 0.0,
        false => symmetric
            .symmetric_eigenvalues()
            .iter()
            .map(|value| value.max(0.0).sqrt())
            .sum(),
    };
    Ok((means + trace - 2.0 * root_trace).max(0.0))
}

/// F (d, rank) with F F^T = S for a symmetric S without negative eigenvalues: the Cholesky factor with pivoting on the
/// greatest remaining diagonal element, up to the rank that rounding leaves. Its rows are in the order of S.
fn factor(matrix: &DMatrix<f64>) -> DMatrix<f64> {
    let dim = matrix.nrows();
    let mut left: Vec<f64> = matrix.diagonal().iter().copied().collect();
    let least = left.iter().copied().fold(0.0, f64::max) * dim as f64 * f64::EPSILON;
    let mut rows = vec![0.0; dim * dim]; // row i of F from i * dim on
    let mut rank = 0;
    while rank < dim {
        let pivot = (0..dim).fold(0, |best, i| if left[i] > left[best] { i } else { best });
        if left[pivot] <= least {
            break;
        }
        let root = left[pivot].sqrt();
        let own = rows[pivot * dim..][..rank].to_vec();
        rows.par_chunks_mut(dim)
            .zip(left.par_iter_mut())
            .enumerate()
            .with_min_len(BLOCK_COLUMNS)
            .for_each(|(i, (row, left))| {
                let value = (matrix[(i, pivot)] - dot(&row[..rank], &own)) / root;
                row[rank] = value;
                *left -= value * value;
            });
        left[pivot] = 0.0;
        rank += 1;
    }
    DMatrix::from_fn(dim, rank, |i, j| rows[i * dim + j])
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    rest + lanes.iter().sum::<f64>()
}

/// A matrix product, blocks of columns in parallel.
fn product(a: &DMatrix<f64>, b: &DMatrix<f64>) -> DMatrix<f64> {
    let rows = a.nrows();
    let mut c = DMatrix::zeros(rows, b.ncols());
    if !c.is_empty() {
        c.as_mut_slice()
            .par_chunks_mut(BLOCK_COLUMNS * rows)
            .enumerate()
            .for_each(|(block, columns)| {
                let width = columns.len() / rows;
                let b = b.columns(block * BLOCK_COLUMNS, width);
                DMatrixViewMut::from_slice(columns, rows, width).gemm(1.0, a, &b, 0.0);
            });
    }
    c
}

/// Share, from 0 to 1, of samples whose predicted class is the requested one.
pub fn class_agreement(predicted: &[u32], wanted: &[u32]) -> Result<f64, StatisticsError> {
    if predicted.len() != wanted.len() {
        return Err(StatisticsError::Shape {
            what: "predicted classes",
            expected: format!("{} as classes were asked for", wanted.len()),
            found: predicted.len(),
        });
    }
    if wanted.is_empty() {
        return Err(StatisticsError::TooFew {
            what: "class agreement",
            needed: 1,
            found: 0,
        });
    }
    let equal = predicted
        .iter()
        .zip(wanted)
        .filter(|(predicted, wanted)| predicted == wanted);
    Ok(equal.count() as f64 / wanted.len() as f64)
}

const BATCH_ROWS: usize = 1024;
const BLOCK_COLUMNS: usize = 64;
/// Independent partial sums: enough for the compiler to use vector registers.
const LANES: usize = 16;

/// Number of rows of an array (n, dim), all of whose values must be finite.
fn rows(what: &'static str, values: &[f32], dim: usize) -> Result<usize, StatisticsError> {
    if dim == 0 || !values.len().is_multiple_of(dim) {
        let expected = format!("a multiple of {dim} values");
        return Err(StatisticsError::Shape {
            what,
            expected,
            found: values.len(),
        });
    }
    match values.par_iter().position_first(|value| !value.is_finite()) {
        Some(index) => Err(StatisticsError::NotFinite { what, index }),
        None => Ok(values.len() / dim),
    }
}

#[cfg(test)]
pub(crate) mod tests;
