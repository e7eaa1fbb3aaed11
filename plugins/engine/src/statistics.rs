//! Figures that compare sets of images through their features: how far apart, how good, how varied.
//!
//! - Frechet distance: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
//! - Inception score: Salimans et al. 2016, arXiv 1606.03498, section 4.
//! - Precision and recall by k-nearest-neighbour manifolds: Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2.
//!
//! In: features (n, d), row after row, of any network. Out: plain numbers. Deliberately absent: the networks, files.
//! Nothing depends on the number of threads.

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

/// Shares, from 0 to 1, of sets that lie within each other's manifold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionRecall {
    /// Share of generated samples that look like real ones: quality.
    pub precision: f64,
    /// Share of real samples that look like generated ones: variety.
    pub recall: f64,
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
    /// NaN or infinity among the inputs.
    #[error("{what}: value {index} is not finite")]
    NotFinite {
        /// Which array.
        what: &'static str,
        /// Index of the first such value.
        index: usize,
    },
}

impl From<StatisticsError> for Failure {
    fn from(error: StatisticsError) -> Self {
        let code = match &error {
            StatisticsError::Shape { .. } => FailureCode::BadData,
            StatisticsError::TooFew { .. } => FailureCode::InvalidOptions,
            StatisticsError::NotFinite { .. } => FailureCode::Numerical,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<StatisticsError> for crate::Error {
    fn from(error: StatisticsError) -> Self {
        crate::Error::Host(error.into())
    }
}

impl Moments {
    /// Moments of features (n, d), in f64; at least two rows.
    pub fn of(features: &[f32], dim: usize) -> Result<Self, StatisticsError> {
        let count = rows("features", features, dim)?;
        if count < 2 {
            return Err(StatisticsError::TooFew {
                what: "covariance",
                needed: 2,
                found: count,
            });
        }
        let mut mean = vec![0.0; dim];
        for row in features.chunks_exact(dim) {
            for (sum, &value) in mean.iter_mut().zip(row) {
                *sum += f64::from(value);
            }
        }
        mean.iter_mut().for_each(|sum| *sum /= count as f64);

        // Rows in batches, so that the f64 copy stays small; columns of the result in parallel, so that the order of
        // the sums is fixed.
        let mut covariance = vec![0.0; dim * dim];
        for batch in features.chunks(BATCH_ROWS * dim) {
            let centred: Vec<f64> = batch
                .chunks_exact(dim)
                .flat_map(|row| {
                    row.iter()
                        .zip(&mean)
                        .map(|(&value, mean)| f64::from(value) - mean)
                })
                .collect();
            let centred = DMatrixView::from_slice(&centred, dim, batch.len() / dim); // (d, b)
            covariance
                .par_chunks_mut(BLOCK_COLUMNS * dim)
                .enumerate()
                .for_each(|(block, columns)| {
                    let width = columns.len() / dim;
                    let right = centred.rows(block * BLOCK_COLUMNS, width).transpose(); // (b, width)
                    DMatrixViewMut::from_slice(columns, dim, width)
                        .gemm(1.0, &centred, &right, 1.0);
                });
        }
        covariance
            .iter_mut()
            .for_each(|sum| *sum /= (count - 1) as f64);
        Ok(Self { mean, covariance })
    }

    /// Moments known beforehand: `mean` (d) and `covariance` (d, d).
    pub fn new(mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self, StatisticsError> {
        if covariance.len() != mean.len() * mean.len() {
            return Err(StatisticsError::Shape {
                what: "covariance",
                expected: format!("{0} x {0} values", mean.len()),
                found: covariance.len(),
            });
        }
        for (what, values) in [("mean", &mean), ("covariance", &covariance)] {
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                return Err(StatisticsError::NotFinite { what, index });
            }
        }
        Ok(Self { mean, covariance })
    }

    /// Number of features.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }
}

/// Frechet distance of the Gaussians with these moments: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), at least 0.
///
/// The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2), so singular covariances need no offset and
/// no complex number appears.
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
        (&matrix + matrix.transpose()) * 0.5 // symmetric also when read from a file
    };
    let (first, second) = (covariance(a), covariance(b));
    let trace = first.trace() + second.trace();
    let means: f64 = a
        .mean
        .iter()
        .zip(&b.mean)
        .map(|(a, b)| (a - b) * (a - b))
        .sum();

    let mut eigen = first.symmetric_eigen();
    eigen
        .eigenvalues
        .apply(|value| *value = value.max(0.0).sqrt());
    let root = eigen.recompose();
    let product = &root * second * &root;
    let symmetric = (&product + product.transpose()) * 0.5;
    let root_trace: f64 = symmetric
        .symmetric_eigenvalues()
        .iter()
        .map(|value| value.max(0.0).sqrt())
        .sum();
    Ok((means + trace - 2.0 * root_trace).max(0.0))
}

/// Inception score of class probabilities (n, classes), taken in `splits` consecutive parts: exp of the mean divergence
/// from the part's average.
pub fn inception_score(
    probabilities: &[f32],
    classes: usize,
    splits: usize,
) -> Result<InceptionScore, StatisticsError> {
    let count = rows("probabilities", probabilities, classes)?;
    if splits == 0 || count < splits {
        let needed = splits.max(1);
        return Err(StatisticsError::TooFew {
            what: "inception score",
            needed,
            found: count,
        });
    }
    let scores: Vec<f64> = (0..splits)
        .map(|part| {
            let (start, end) = (part * count / splits, (part + 1) * count / splits);
            split_score(&probabilities[start * classes..end * classes], classes)
        })
        .collect();
    let mean = scores.iter().sum::<f64>() / splits as f64;
    let variance = scores
        .iter()
        .map(|score| (score - mean).powi(2))
        .sum::<f64>()
        / splits as f64;
    Ok(InceptionScore {
        mean,
        deviation: variance.sqrt(),
    })
}

/// Precision and recall of `generated` (m, d) against `real` (n, d). The manifold of a set is the union of the balls
/// around its points that reach to the `k`-th nearest other point (3 in the paper). Both sets need more than `k` points.
pub fn precision_recall(
    real: &[f32],
    generated: &[f32],
    dim: usize,
    k: usize,
) -> Result<PrecisionRecall, StatisticsError> {
    for (what, set) in [("real features", real), ("generated features", generated)] {
        let found = rows(what, set, dim)?;
        if k == 0 || found <= k {
            return Err(StatisticsError::TooFew {
                what: "precision and recall",
                needed: k.max(1) + 1,
                found,
            });
        }
    }
    Ok(PrecisionRecall {
        precision: covered(generated, real, &radii(real, dim, k), dim),
        recall: covered(real, generated, &radii(generated, dim, k), dim),
    })
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
/// Points compared with each other while both are in the cache.
const TILE_ROWS: usize = 32;
/// Independent partial sums of a distance: enough for the compiler to use vector registers.
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

fn split_score(probabilities: &[f32], classes: usize) -> f64 {
    let count = (probabilities.len() / classes) as f64;
    let mut average = vec![0.0; classes];
    for row in probabilities.chunks_exact(classes) {
        for (sum, &p) in average.iter_mut().zip(row) {
            *sum += f64::from(p) / count;
        }
    }
    let divergence: f64 = probabilities
        .chunks_exact(classes)
        .flat_map(|row| row.iter().zip(&average))
        .filter(|(p, _)| **p > 0.0) // p ln p -> 0
        .map(|(&p, average)| f64::from(p) * (f64::from(p).ln() - average.ln()))
        .sum();
    (divergence / count).exp()
}

/// Squared distance of each point to its k-th nearest other point of the set.
fn radii(set: &[f32], dim: usize, k: usize) -> Vec<f32> {
    let block = TILE_ROWS * dim;
    set.par_chunks(block)
        .enumerate()
        .flat_map_iter(|(index, points)| {
            let mut nearest = vec![vec![f32::INFINITY; k]; points.len() / dim];
            for (tile, others) in set.chunks(block).enumerate() {
                for (i, point) in points.chunks_exact(dim).enumerate() {
                    for (j, other) in others.chunks_exact(dim).enumerate() {
                        if index * TILE_ROWS + i != tile * TILE_ROWS + j {
                            insert(&mut nearest[i], squared_distance(point, other));
                        }
                    }
                }
            }
            nearest
                .into_iter()
                .map(|nearest| nearest[nearest.len() - 1])
        })
        .collect()
}

/// Keeps the smallest values, ascending.
fn insert(smallest: &mut [f32], value: f32) {
    if value < smallest[smallest.len() - 1] {
        let place = smallest.partition_point(|&kept| kept <= value);
        smallest[place..].rotate_right(1);
        smallest[place] = value;
    }
}

/// Share of `points` within the ball of at least one of `centres`.
fn covered(points: &[f32], centres: &[f32], radii: &[f32], dim: usize) -> f64 {
    let inside = points.par_chunks_exact(dim).filter(|point| {
        let mut balls = centres.chunks_exact(dim).zip(radii);
        balls.any(|(centre, &radius)| squared_distance(point, centre) <= radius)
    });
    inside.count() as f64 / (points.len() / dim) as f64
}

/// From differences, not from norms and a product: the same two points give the same bits in either order, and equal
/// points give 0.
fn squared_distance(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_blocks, b_blocks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = a_blocks
        .remainder()
        .iter()
        .zip(b_blocks.remainder())
        .map(|(a, b)| (a - b) * (a - b))
        .sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..LANES {
            let difference = a[lane] - b[lane];
            lanes[lane] += difference * difference;
        }
    }
    tail + lanes.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in [-1, 1) that look random.
    fn noise(count: usize, seed: u64) -> Vec<f32> {
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
    fn inception_score_of_known_cases() {
        let sure = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0];
        let found = inception_score(&sure, 2, 2).unwrap();
        assert!(
            (found.mean - 2.0).abs() < 1e-12 && found.deviation < 1e-12,
            "{found:?}"
        );
        let unsure = [0.25; 12];
        let found = inception_score(&unsure, 4, 1).unwrap();
        assert!((found.mean - 1.0).abs() < 1e-12, "{found:?}");
        // Two splits of two: one varied (2), one not (1).
        let half = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0];
        let found = inception_score(&half, 2, 2).unwrap();
        assert!((found.mean - 1.5).abs() < 1e-12 && (found.deviation - 0.5).abs() < 1e-12);
    }

    #[test]
    fn precision_and_recall_agree_with_brute_force() {
        let (dim, k) = (19, 3); // 19: vector lanes and a tail
        let real = noise(77 * dim, 1);
        let generated: Vec<f32> = noise(53 * dim, 2).iter().map(|x| 0.8 * x + 0.1).collect();
        let distance = |a: &[f32], b: &[f32]| -> f64 {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| f64::from(a - b).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        let manifold = |set: &[f32]| -> Vec<f64> {
            let points: Vec<_> = set.chunks(dim).collect();
            let kth = |point: &&[f32]| {
                let mut all: Vec<f64> = points.iter().map(|other| distance(point, other)).collect();
                all.sort_by(f64::total_cmp);
                all[k] // all[0] is the point itself
            };
            points.iter().map(kth).collect()
        };
        let share = |points: &[f32], set: &[f32]| {
            let radii = manifold(set);
            let hit = |point: &&[f32]| {
                set.chunks(dim)
                    .zip(&radii)
                    .any(|(c, r)| distance(point, c) <= *r)
            };
            points.chunks(dim).filter(hit).count() as f64 / (points.len() / dim) as f64
        };
        let found = precision_recall(&real, &generated, dim, k).unwrap();
        assert_eq!(found.precision, share(&generated, &real));
        assert_eq!(found.recall, share(&real, &generated));
        assert!(
            found.precision > 0.1 && found.recall < 0.9,
            "a case that tells: {found:?}"
        );
    }

    #[test]
    fn precision_and_recall_at_the_limits() {
        let set = noise(40 * 8, 5);
        let same = precision_recall(&set, &set, 8, 3).unwrap();
        assert_eq!((same.precision, same.recall), (1.0, 1.0));
        let far: Vec<f32> = set.iter().map(|x| x + 100.0).collect();
        let apart = precision_recall(&set, &far, 8, 3).unwrap();
        assert_eq!((apart.precision, apart.recall), (0.0, 0.0));
        // Collapse onto one real point: looks real, covers nothing else.
        let collapsed = set[..8].repeat(10);
        let found = precision_recall(&set, &collapsed, 8, 3).unwrap();
        assert_eq!((found.precision, found.recall), (1.0, 1.0 / 40.0));
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
        assert!(Moments::new(vec![0.0], vec![f64::INFINITY]).is_err());
        let one = diagonal(&[0.0], &[1.0]);
        assert!(frechet_distance(&one, &diagonal(&[0.0; 2], &[1.0; 2])).is_err());
        assert!(precision_recall(&[0.0; 3], &[0.0; 9], 1, 3).is_err());
        assert!(inception_score(&[0.5; 4], 2, 3).is_err());
        assert_eq!(class_agreement(&[1, 2, 3, 4], &[1, 0, 3, 4]), Ok(0.75));
        assert!(class_agreement(&[1], &[1, 2]).is_err());
        assert!(class_agreement(&[], &[]).is_err());
    }
}
