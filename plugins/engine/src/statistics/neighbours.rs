//! Precision and recall by k-nearest-neighbour manifolds: Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2.
//!
//! Distances are computed in blocks of points, so that features dominate memory. A block's distances first come from norms
//! and a matrix product, which is fast, with a bound on the rounding. Only where that does not decide is the distance
//! computed from differences. So the figures equal those of the plain definition.

use std::sync::atomic::{AtomicBool, Ordering};

use nalgebra::{DMatrix, DMatrixView};
use rayon::prelude::*;

use super::{LANES, StatisticsError, rows};

/// Shares, from 0 to 1, of sets that lie within each other's manifold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrecisionRecall {
    /// Share of generated samples that look like real ones: quality.
    pub precision: f64,
    /// Share of real samples that look like generated ones: variety.
    pub recall: f64,
}

/// Precision and recall of `generated` (m, d) against `real` (n, d). The manifold of a set is the union of the balls
/// around its points that reach to the `k`-th nearest other point (3 in the paper). Both sets need more than `k` points.
/// `go_on` is asked every few seconds.
pub fn precision_recall(
    real: &[f32],
    generated: &[f32],
    dim: usize,
    k: usize,
    go_on: &mut dyn FnMut() -> bool,
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
    let (real, generated) = (Set::new(real, dim), Set::new(generated, dim));
    let real_radii = by_block(&real, go_on, |block| radii(&real, block, k))?;
    let generated_radii = by_block(&generated, go_on, |block| radii(&generated, block, k))?;
    let recalled: Vec<AtomicBool> = real_radii.iter().map(|_| AtomicBool::new(false)).collect();
    let precise = by_block(&generated, go_on, |block| {
        let mut precise = vec![false; generated.block(block).1.len()];
        compare(&generated, block, &real, |i, j, distance| {
            let own = block * ROWS + i;
            if !precise[i] {
                precise[i] = distance.within(real_radii[j]);
            }
            if !recalled[j].load(Ordering::Relaxed) && distance.within(generated_radii[own]) {
                recalled[j].store(true, Ordering::Relaxed);
            }
        });
        precise
    })?;
    let share = |hits: usize, all: usize| hits as f64 / all as f64;
    let recalled_count = recalled.iter().filter(|hit| hit.load(Ordering::Relaxed));
    Ok(PrecisionRecall {
        precision: share(precise.iter().filter(|&&hit| hit).count(), precise.len()),
        recall: share(recalled_count.count(), recalled.len()),
    })
}

/// Points per block; blocks are compared pairwise.
const ROWS: usize = 256;
/// Blocks between two calls of `go_on`.
const GROUP: usize = 8;

/// Points with their squared norms.
struct Set<'a> {
    points: &'a [f32],
    dim: usize,
    norms: Vec<f32>,
}

impl<'a> Set<'a> {
    fn new(points: &'a [f32], dim: usize) -> Self {
        let norm = |point: &[f32]| {
            let squares = point.iter().map(|&x| f64::from(x) * f64::from(x));
            squares.sum::<f64>() as f32
        };
        Self {
            points,
            dim,
            norms: points.par_chunks_exact(dim).map(norm).collect(),
        }
    }

    fn blocks(&self) -> usize {
        self.norms.len().div_ceil(ROWS)
    }

    /// Points and norms of a block.
    fn block(&self, number: usize) -> (&[f32], &[f32]) {
        let (first, end) = (number * ROWS, ((number + 1) * ROWS).min(self.norms.len()));
        let points = &self.points[first * self.dim..end * self.dim];
        (points, &self.norms[first..end])
    }
}

/// Computes a result for each point of a set, block by block on all threads.
fn by_block<T: Send>(
    set: &Set<'_>,
    go_on: &mut dyn FnMut() -> bool,
    find: impl Fn(usize) -> Vec<T> + Sync,
) -> Result<Vec<T>, StatisticsError> {
    let mut out = Vec::with_capacity(set.norms.len());
    for first in (0..set.blocks()).step_by(GROUP) {
        if !go_on() {
            return Err(StatisticsError::Stopped);
        }
        let group = first..(first + GROUP).min(set.blocks());
        let found: Vec<Vec<T>> = group.into_par_iter().map(&find).collect();
        out.extend(found.into_iter().flatten());
    }
    Ok(out)
}

/// The squared distance of two points: approximate, and exact on demand.
struct Distance<'a> {
    nearly: f32,
    /// The error bound of `nearly`.
    bound: f32,
    points: (&'a [f32], &'a [f32]),
}

impl Distance<'_> {
    fn exact(&self) -> f32 {
        squared_distance(self.points.0, self.points.1)
    }

    /// Whether it is at most a radius. If the norms overflow f32, only the exact distance decides.
    fn within(&self, radius: f32) -> bool {
        if self.nearly - self.bound > radius {
            false
        } else if self.nearly + self.bound <= radius {
            true
        } else {
            self.exact() <= radius
        }
    }
}

/// Calls back with the distances of a block's points to all points of another set: (index in the block, index in the other
/// set, distance).
fn compare(
    set: &Set<'_>,
    block: usize,
    others: &Set<'_>,
    mut show: impl FnMut(usize, usize, Distance<'_>),
) {
    let dim = set.dim;
    let (points, norms) = set.block(block);
    let turned = DMatrixView::from_slice(points, dim, norms.len()).transpose(); // (b, d)
    // Rounding of a sum of d products, and of the exact distance, with room to spare.
    let slack = (2 * dim + 64) as f32 * f32::EPSILON;
    let mut products = DMatrix::zeros(norms.len(), ROWS);
    for tile in 0..others.blocks() {
        let (tile_points, tile_norms) = others.block(tile);
        let right = DMatrixView::from_slice(tile_points, dim, tile_norms.len());
        let mut out = products.columns_mut(0, tile_norms.len());
        out.gemm(1.0, &turned, &right, 0.0);
        for (j, other_norm) in tile_norms.iter().enumerate() {
            for (i, norm) in norms.iter().enumerate() {
                let distance = Distance {
                    nearly: norm + other_norm - 2.0 * out[(i, j)],
                    bound: slack * (norm + other_norm),
                    points: (&points[i * dim..][..dim], &tile_points[j * dim..][..dim]),
                };
                show(i, tile * ROWS + j, distance);
            }
        }
    }
}

/// Squared distance of each point of a block to its k-th nearest other point of the set.
fn radii(set: &Set<'_>, block: usize, k: usize) -> Vec<f32> {
    let mut nearest = vec![vec![f32::INFINITY; k]; set.block(block).1.len()];
    compare(set, block, set, |i, j, distance| {
        // Skip distances that are certainly larger than all of them.
        let farther = distance.nearly - distance.bound >= nearest[i][k - 1];
        if block * ROWS + i != j && !farther {
            insert(&mut nearest[i], distance.exact());
        }
    });
    nearest.into_iter().map(|nearest| nearest[k - 1]).collect()
}

/// Keeps the smallest values, ascending.
fn insert(smallest: &mut [f32], value: f32) {
    if value < smallest[smallest.len() - 1] {
        let place = smallest.partition_point(|&kept| kept <= value);
        smallest[place..].rotate_right(1);
        smallest[place] = value;
    }
}

/// From differences, not from norms and a product: bit-identical in either order of the points, and 0 for equal points.
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
    use crate::statistics::tests::noise;

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
        let found = precision_recall(&real, &generated, dim, k, &mut || true).unwrap();
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
        let same = precision_recall(&set, &set, 8, 3, &mut || true).unwrap();
        assert_eq!((same.precision, same.recall), (1.0, 1.0));
        let far: Vec<f32> = set.iter().map(|x| x + 100.0).collect();
        let apart = precision_recall(&set, &far, 8, 3, &mut || true).unwrap();
        assert_eq!((apart.precision, apart.recall), (0.0, 0.0));
        // Collapse onto one real point: precise, but covers nothing else.
        let collapsed = set[..8].repeat(10);
        let found = precision_recall(&set, &collapsed, 8, 3, &mut || true).unwrap();
        assert_eq!((found.precision, found.recall), (1.0, 1.0 / 40.0));
    }

    /// More than a block of points, far from the origin, so that norms are great and distances small.
    #[test]
    fn blocks_do_not_change_a_decision() {
        let (dim, k) = (24, 2);
        let far = |count: usize, seed: u64| -> Vec<f32> {
            noise(count * dim, seed).iter().map(|x| 40.0 + x).collect()
        };
        let (mut real, mut generated) = (far(2 * ROWS + 5, 21), far(ROWS + 30, 22));
        // The same point in both sets, and twice in one.
        generated[..dim].copy_from_slice(&real[..dim]);
        real.copy_within(..dim, dim);
        let plain_radii = |set: &[f32]| -> Vec<f32> {
            let points: Vec<&[f32]> = set.chunks(dim).collect();
            let radius = |i: usize| {
                let others = (0..points.len()).filter(|&j| j != i);
                let mut all: Vec<f32> = others
                    .map(|j| squared_distance(points[i], points[j]))
                    .collect();
                all.sort_by(f32::total_cmp);
                all[k - 1]
            };
            (0..points.len()).map(radius).collect()
        };
        let plain = |points: &[f32], centres: &[f32]| {
            let radii = plain_radii(centres);
            let hit = |point: &&[f32]| {
                let mut balls = centres.chunks(dim).zip(&radii);
                balls.any(|(c, r)| squared_distance(point, c) <= *r)
            };
            points.chunks(dim).filter(hit).count() as f64 / (points.len() / dim) as f64
        };
        let found = precision_recall(&real, &generated, dim, k, &mut || true).unwrap();
        assert_eq!(found.precision, plain(&generated, &real));
        assert_eq!(found.recall, plain(&real, &generated));
        assert!(found.precision > 0.0 && found.precision < 1.0, "{found:?}");
        let stopped = precision_recall(&real, &generated, dim, k, &mut || false);
        assert_eq!(stopped, Err(StatisticsError::Stopped));
        assert!(precision_recall(&[0.0; 3], &[0.0; 9], 1, 3, &mut || true).is_err());
    }

    /// The size of published figures.
    #[test]
    #[ignore = "minutes: make test-long"]
    fn precision_and_recall_of_50000() {
        let (count, dim) = (50_000, 2048);
        let (real, generated) = (noise(count * dim, 1), noise(count * dim, 2));
        let clock = std::time::Instant::now();
        let found = precision_recall(&real, &generated, dim, 3, &mut || true).unwrap();
        println!("{found:?}: {:.0} s", clock.elapsed().as_secs_f64());
    }
}
