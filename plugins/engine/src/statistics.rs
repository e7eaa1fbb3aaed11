//! Figures that compare sets of images through their features: how far apart, how good, how varied.
//!
//! - Frechet distance: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
//! - Inception score: Salimans et al. 2016, arXiv 1606.03498, section 4.
//! - Precision and recall (`neighbours.rs`), and the kernel distance (`kernel.rs`).
//!
//! In: features (n, d), row after row, of any network. Out: plain numbers. Deliberately absent: the networks, files.
//! Nothing depends on the number of threads.

pub mod kernel;
pub mod neighbours;

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut};
use rayon::prelude::*;
use retort_abi::{Failure, FailureCode};

/// Mean and covariance of a set of features: all that the Frechet distance sees of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Mean of each feature, (d).
    pub mean: Vec<f64>,
    /// Covariance with divisor n - 1, (d, d).
    pub covariance: Vec<f64>,
}

/// Mean and spread of the inception score over its splits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InceptionScore {
    /// Mean over the splits, from 1 to the number of classes.
    pub mean: f64,
    /// Standard deviation over the splits (divisor: number of splits).
    pub deviation: f64,
}

/// Why a figure cannot be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatisticsError {
    /// Lengths that do not fit each other.
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
        /// The least number of samples.
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
    /// What no covariance is: the element, and why.
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

    /// Moments known beforehand: `mean` (d) and `covariance` (d, d), which must be symmetric up to rounding, without a
    /// negative variance.
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

/// Most by which an element of a covariance may differ from the one across the diagonal, in the largest of all: more than the
/// rounding of f32.
const ASYMMETRY: f64 = 1e-6;

/// Refuses what is no covariance (d, d), by its first element that shows it.
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

/// Moments of features that arrive in parts. How they are cut does not change a bit of the result; what is held does not
/// grow with their number.
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

    /// The moments of all rows, of which there must be two.
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
                    value = value.max(0.0); // rounding, where nothing varies
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
/// With S1 = F F^T the eigenvalues of S1 S2 are those of the symmetric F^T S2 F, and zeros. So no root of a matrix is
/// taken, singular covariances need no offset, and no complex number appears.
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

/// F (d, rank) with F F^T = S for a symmetric S without negative eigenvalues: Cholesky's factor, the greatest remaining
/// diagonal element first, up to where rounding leaves nothing. Its rows are in the order of S.
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

/// Whether all rows of a class stand together, of several classes: consecutive parts of them have few classes each.
pub fn is_sorted_by_class(labels: &[u32]) -> bool {
    let runs = labels.chunk_by(|a, b| a == b).count();
    let mut classes = labels.to_vec();
    classes.sort_unstable();
    classes.dedup();
    (2..labels.len()).contains(&runs) && runs == classes.len()
}

/// Inception score of logits (n, classes), taken in `splits` consecutive parts.
pub fn inception_score(
    logits: &[f32],
    classes: usize,
    splits: usize,
) -> Result<InceptionScore, StatisticsError> {
    let count = rows("logits", logits, classes)?;
    let mut running = RunningScore::new(count, classes, splits)?;
    running.add(logits)?;
    running.finish()
}

/// The inception score of logits that arrive in parts, of which only sums are held: the score of a split is
/// exp(mean of sum p ln p - sum q ln q), q the mean of its probabilities p.
#[derive(Debug, Clone)]
pub struct RunningScore {
    count: usize,
    classes: usize,
    /// Rows so far.
    seen: usize,
    /// The place of each row among those that are split; its own, if none.
    places: Option<Vec<u32>>,
    /// Per split: its rows so far, the sum of p ln p, and the sums of p.
    splits: Vec<(usize, f64, Vec<f64>)>,
}

impl RunningScore {
    /// Of `count` rows to come.
    pub fn new(count: usize, classes: usize, splits: usize) -> Result<Self, StatisticsError> {
        if splits == 0 || count < splits {
            return Err(StatisticsError::TooFew {
                what: "inception score",
                needed: splits.max(1),
                found: count,
            });
        }
        Ok(Self {
            count,
            classes,
            seen: 0,
            places: None,
            splits: vec![(0, 0.0, vec![0.0; classes]); splits],
        })
    }

    /// The same, of rows that are dealt to the splits in another order than they come in: each has its place, a number below
    /// their count that no other has.
    pub fn dealt(self, places: Vec<u32>) -> Self {
        Self {
            places: Some(places),
            ..self
        }
    }

    /// Adds logits (n, classes).
    pub fn add(&mut self, logits: &[f32]) -> Result<(), StatisticsError> {
        rows("logits", logits, self.classes)?;
        for row in logits.chunks_exact(self.classes) {
            // Split k begins at place k count / splits, rounded down.
            let place = match &self.places {
                Some(places) => places.get(self.seen).map_or(self.count, |&at| at as usize),
                None => self.seen,
            };
            let split = ((place + 1) * self.splits.len() - 1) / self.count;
            let Some((rows, entropy, sums)) = self.splits.get_mut(split) else {
                break; // more rows than announced: `finish` says so
            };
            let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let total: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
            for (sum, &x) in sums.iter_mut().zip(row) {
                let log = f64::from(x) - max - total.ln();
                *sum += log.exp();
                *entropy += log.exp() * log;
            }
            *rows += 1;
            self.seen += 1;
        }
        Ok(())
    }

    /// The score of all rows.
    pub fn finish(self) -> Result<InceptionScore, StatisticsError> {
        if self.seen != self.count {
            return Err(StatisticsError::Shape {
                what: "logits",
                expected: format!("{} rows", self.count),
                found: self.seen,
            });
        }
        let scores: Vec<f64> = self
            .splits
            .iter()
            .map(|(rows, entropy, sums)| {
                let n = *rows as f64;
                let means = sums.iter().map(|sum| sum / n).filter(|q| *q > 0.0);
                (entropy / n - means.map(|q| q * q.ln()).sum::<f64>()).exp()
            })
            .collect();
        let n = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / n;
        let variance = scores
            .iter()
            .map(|score| (score - mean).powi(2))
            .sum::<f64>()
            / n;
        Ok(InceptionScore {
            mean,
            deviation: variance.sqrt(),
        })
    }
}

/// Share, from 0 to 1, of samples whose predicted class is the one asked for.
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

/// Number of rows of an array that must be finite and (n, dim).
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
pub(crate) mod tests {
    use super::*;

    /// Numbers in [-1, 1) that look random.
    pub fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn diagonal(mean: &[f64], deviations: &[f64]) -> Moments {
        let dim = mean.len();
        let mut covariance = vec![0.0; dim * dim];
        for (i, deviation) in deviations.iter().enumerate() {
            covariance[i * dim + i] = deviation * deviation;
        }
        Moments::new(mean.to_vec(), covariance).unwrap()
    }

    fn check(a: &Moments, b: &Moments, expected: f64) {
        for (a, b) in [(a, b), (b, a)] {
            let found = frechet_distance(a, b).unwrap();
            assert!(
                (found - expected).abs() <= 1e-6 * (1.0 + expected),
                "{found}, not {expected}"
            );
        }
    }

    #[test]
    fn frechet_distance_of_gaussians() {
        // Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2.
        let a = diagonal(&[0.0, 1.0, 2.0], &[1.0, 2.0, 0.5]);
        check(
            &a,
            &diagonal(&[1.0, 1.0, 0.0], &[3.0, 2.0, 1.0]),
            5.0 + 4.0 + 0.25,
        );
        check(&a, &a, 0.0);
        check(&a, &diagonal(&[0.0, 1.0, 2.0], &[1.0, 0.0, 0.0]), 4.25); // singular
        check(
            &diagonal(&[0.0; 2], &[0.0; 2]),
            &diagonal(&[3.0, 4.0], &[0.0; 2]),
            25.0,
        );
        // Not commuting: the trace of (S1 S2)^(1/2) of 2 x 2 matrices is sqrt(tr S1 S2 + 2 sqrt(det S1 S2)).
        let s1 = Moments::new(vec![0.0; 2], vec![2.0, 1.0, 1.0, 2.0]).unwrap(); // det 3
        let s2 = Moments::new(vec![0.0; 2], vec![1.0, 0.0, 0.0, 5.0]).unwrap(); // det 5
        check(
            &s1,
            &s2,
            4.0 + 6.0 - 2.0 * (12.0 + 2.0 * 15f64.sqrt()).sqrt(),
        );
    }

    #[test]
    fn moments_are_those_of_the_definition() {
        let dim = 70; // more than a block of columns
        let count = BATCH_ROWS + 7; // more than a batch of rows
        let features = noise(count * dim, 3);
        let moments = Moments::of(&features, dim).unwrap();
        let column = |i: usize| features.iter().skip(i).step_by(dim).map(|&x| f64::from(x));
        for (i, j) in [(0, 0), (3, 66), (66, 3), (69, 69)] {
            let (mi, mj) = (
                column(i).sum::<f64>() / count as f64,
                column(j).sum::<f64>() / count as f64,
            );
            let sum: f64 = column(i)
                .zip(column(j))
                .map(|(x, y)| (x - mi) * (y - mj))
                .sum();
            assert!((moments.mean[i] - mi).abs() < 1e-12);
            let found = moments.covariance[i * dim + j];
            assert!((found - sum / (count - 1) as f64).abs() < 1e-12, "{i} {j}");
        }
        let same = Moments::of(&features, dim).unwrap();
        check(&moments, &same, 0.0);
        let moved: Vec<f32> = features.iter().map(|x| x + 0.5).collect();
        check(
            &moments,
            &Moments::of(&moved, dim).unwrap(),
            0.25 * dim as f64,
        );
        // Fewer samples than features: singular, and still 0 from itself.
        let few = Moments::of(&features[..dim * 5], dim).unwrap();
        check(&few, &few, 0.0);
    }

    #[test]
    fn parts_do_not_change_the_moments() {
        let dim = 70;
        let features = noise((2 * BATCH_ROWS + 9) * dim, 4);
        let mut running = RunningMoments::new(dim);
        for part in features.chunks(37 * dim) {
            running.add(part).unwrap();
        }
        let whole = Moments::of(&features, dim).unwrap();
        assert_eq!(running.finish().unwrap(), whole);
        assert!(RunningMoments::new(dim).finish().is_err());
    }

    #[test]
    fn the_distance_is_that_of_roots_by_eigenvectors() {
        let dim = 40;
        for (rows, seed) in [(300, 7), (25, 8)] {
            // Correlated features; with 25 rows both covariances are singular.
            let mix = noise(dim * dim, seed + 100);
            let features = |seed, offset: f32| -> Vec<f32> {
                let plain = noise(rows * dim, seed);
                let mixed = |row: &[f32]| -> Vec<f32> {
                    let weights = mix.chunks_exact(dim);
                    weights
                        .map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum::<f32>() + offset)
                        .collect()
                };
                plain.chunks_exact(dim).flat_map(mixed).collect()
            };
            let a = Moments::of(&features(seed, 0.0), dim).unwrap();
            let b = Moments::of(&features(seed + 1, 0.3), dim).unwrap();
            let root = |m: &[f64]| {
                let mut eigen = DMatrix::from_column_slice(dim, dim, m).symmetric_eigen();
                eigen.eigenvalues.apply(|x| *x = x.max(0.0).sqrt());
                eigen.recompose()
            };
            let s2 = DMatrix::from_column_slice(dim, dim, &b.covariance);
            let inner = root(&a.covariance) * &s2 * root(&a.covariance);
            let trace = |m: &[f64]| (0..dim).map(|i| m[i * (dim + 1)]).sum::<f64>();
            let means: f64 = a
                .mean
                .iter()
                .zip(&b.mean)
                .map(|(a, b)| (a - b).powi(2))
                .sum();
            let expected = means + trace(&a.covariance) + trace(&b.covariance)
                - 2.0 * root(inner.as_slice()).trace();
            check(&a, &b, expected);
        }
        // Nothing varies in one set.
        let still = Moments::new(vec![1.0; 2], vec![0.0; 4]).unwrap();
        check(&still, &diagonal(&[1.0, 3.0], &[1.0, 2.0]), 9.0);
    }

    /// The size of published figures: 2048 features, of fewer samples than that in one set.
    #[test]
    #[ignore = "a minute: make test-long"]
    fn the_distance_of_2048_features() {
        let dim = 2048;
        let clock = std::time::Instant::now();
        let a = Moments::of(&noise(3000 * dim, 11), dim).unwrap();
        let b = Moments::of(&noise(1500 * dim, 12), dim).unwrap();
        println!(
            "moments of 4500 rows: {:.1} s",
            clock.elapsed().as_secs_f64()
        );
        let clock = std::time::Instant::now();
        let distance = frechet_distance(&a, &b).unwrap();
        println!(
            "distance {distance:.6}: {:.1} s",
            clock.elapsed().as_secs_f64()
        );
        assert!((frechet_distance(&b, &a).unwrap() / distance - 1.0).abs() < 1e-6);
        assert!(frechet_distance(&a, &a).unwrap() < 1e-6 * distance);
    }

    #[test]
    fn inception_score_of_known_cases() {
        let logits = |p: &[f32]| -> Vec<f32> { p.iter().map(|p| p.ln().max(-1e4)).collect() };
        let sure = logits(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]);
        let found = inception_score(&sure, 2, 2).unwrap();
        assert!(
            (found.mean - 2.0).abs() < 1e-12 && found.deviation < 1e-12,
            "{found:?}"
        );
        let unsure = [0.25; 12];
        let found = inception_score(&unsure, 4, 1).unwrap();
        assert!((found.mean - 1.0).abs() < 1e-12, "{found:?}");
        // Two splits of two: one varied (2), one not (1).
        let half = logits(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]);
        let found = inception_score(&half, 2, 2).unwrap();
        assert!((found.mean - 1.5).abs() < 1e-12 && (found.deviation - 0.5).abs() < 1e-12);
        // By the definition, in splits of 2, 2 and 3 rows.
        let (rows, classes, splits) = (7, 5, 3);
        let random: Vec<f32> = noise(rows * classes, 9).iter().map(|x| 3.0 * x).collect();
        let p: Vec<Vec<f64>> = random
            .chunks(classes)
            .map(|row| {
                let e: Vec<f64> = row.iter().map(|&x| f64::from(x).exp()).collect();
                e.iter().map(|x| x / e.iter().sum::<f64>()).collect()
            })
            .collect();
        let scores = [0..2, 2..4, 4..7].map(|part| {
            let n = part.len() as f64;
            let q: Vec<f64> = (0..classes)
                .map(|c| p[part.clone()].iter().map(|p| p[c]).sum::<f64>() / n)
                .collect();
            let kl = |p: &Vec<f64>| p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
            (p[part.clone()].iter().map(kl).sum::<f64>() / n).exp()
        });
        let found = inception_score(&random, classes, splits).unwrap();
        let mean = scores.iter().sum::<f64>() / 3.0;
        assert!((found.mean - mean).abs() < 1e-12, "{found:?} {scores:?}");
        assert!(RunningScore::new(7, 5, 3).unwrap().finish().is_err());
    }

    #[test]
    fn rows_of_sorted_classes_are_dealt_to_the_splits() {
        let (classes, each, splits) = (10, 50, 10);
        let count = classes * each;
        let sure = |class: usize| (0..classes).map(move |c| if c == class { 20.0 } else { 0.0 });
        let sorted: Vec<u32> = (0..count).map(|i| (i / each) as u32).collect();
        let mixed: Vec<u32> = (0..count).map(|i| (i % classes) as u32).collect();
        let logits = |labels: &[u32]| -> Vec<f32> {
            labels.iter().flat_map(|&l| sure(l as usize)).collect()
        };
        // Each split has one class alone, of which nothing can be told apart.
        let apart = inception_score(&logits(&sorted), classes, splits).unwrap();
        assert!((apart.mean - 1.0).abs() < 1e-3, "{apart:?}");
        let best = inception_score(&logits(&mixed), classes, splits).unwrap();
        assert!((best.mean - 10.0).abs() < 1e-3, "{best:?}");
        // A place is that of a deal of 49 apart, which reaches every split from every class.
        let places: Vec<u32> = (0..count).map(|i| (i * 49 % count) as u32).collect();
        let running = RunningScore::new(count, classes, splits).unwrap();
        let mut running = running.dealt(places);
        for part in logits(&sorted).chunks(7 * classes) {
            running.add(part).unwrap();
        }
        let dealt = running.finish().unwrap();
        assert!((dealt.mean - best.mean).abs() < 0.5, "{dealt:?}");

        assert!(is_sorted_by_class(&sorted) && !is_sorted_by_class(&mixed));
        assert!(is_sorted_by_class(&[3, 3, 1, 1, 1]));
        assert!(!is_sorted_by_class(&[1, 1, 3, 3, 1]));
        // One class, and one row of each.
        assert!(!is_sorted_by_class(&[1, 1, 1]) && !is_sorted_by_class(&[0, 1, 2]));
        assert!(!is_sorted_by_class(&[]));
    }

    #[test]
    fn what_is_no_covariance_is_refused() {
        let whole = vec![4.0, 1.0, 0.5, 1.0, 3.0, -2.0, 0.5, -2.0, 2.0];
        let of = |changes: &[(usize, f64)]| {
            let mut covariance = whole.clone();
            changes
                .iter()
                .for_each(|(at, value)| covariance[*at] = *value);
            let made = Moments::new(vec![0.0; 3], covariance);
            made.map(drop).map_err(|e| e.to_string())
        };
        let said = |text: &str| Err(format!("covariance: {text}"));
        assert_eq!(of(&[]), Ok(()));
        // `numpy.tril` of it.
        let lower = of(&[(1, 0.0), (2, 0.0), (5, 0.0)]);
        let expected = "element (1, 0) is 1, and element (0, 1) 0: a covariance is symmetric";
        assert_eq!(lower, said(expected));
        // Rounding is none; what is more is.
        assert_eq!(of(&[(5, -2.0 + 3e-6)]), Ok(()));
        assert!(of(&[(5, -2.0 + 5e-6)]).is_err());
        let expected = "element (1, 1) is -0.001, and no variance is below 0";
        assert_eq!(of(&[(4, -0.001)]), said(expected));
        assert_eq!(of(&[(8, 0.0)]), Ok(()));
        for (value, text) in [(f64::NAN, "NaN"), (f64::NEG_INFINITY, "-inf")] {
            let expected = format!("element (1, 2) is {text}");
            assert_eq!(of(&[(5, value)]), said(&expected));
        }
        // A feature that does not vary has a variance of 0, whatever is rounded.
        let still: Vec<f32> = (0..6000).map(|i| [0.1, i as f32][i % 2]).collect();
        let moments = Moments::of(&still, 2).unwrap();
        Moments::new(moments.mean, moments.covariance).unwrap();
    }

    #[test]
    fn unusable_input_is_refused() {
        assert!(matches!(
            Moments::of(&[1.0; 5], 2),
            Err(StatisticsError::Shape { .. })
        ));
        assert!(matches!(
            Moments::of(&[1.0; 2], 2),
            Err(StatisticsError::TooFew { .. })
        ));
        let error = Moments::of(&[1.0, 1.0, f32::NAN, 1.0], 2).unwrap_err();
        assert_eq!(error.to_string(), "features: value 2 is not finite");
        assert!(Moments::new(vec![0.0; 2], vec![0.0; 3]).is_err());
        let error = Moments::new(vec![0.0, f64::NAN], vec![0.0; 4]).unwrap_err();
        assert_eq!(error.to_string(), "mean: value 1 is not finite");
        let one = diagonal(&[0.0], &[1.0]);
        assert!(frechet_distance(&one, &diagonal(&[0.0; 2], &[1.0; 2])).is_err());
        assert!(inception_score(&[0.5; 4], 2, 3).is_err());
        assert_eq!(class_agreement(&[1, 2, 3, 4], &[1, 0, 3, 4]), Ok(0.75));
        assert!(class_agreement(&[1], &[1, 2]).is_err());
        assert!(class_agreement(&[], &[]).is_err());
    }
}
