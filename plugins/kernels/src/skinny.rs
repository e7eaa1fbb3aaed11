//! Products of a weight matrix with few rows, as in AR steps. They are bound by memory bandwidth, so each weight is read
//! once, in place; a general product would first repack all of them. Weights in bf16 are half the bytes.
//!
//! The order of summation: one fused multiply-add after the other in f32 along the inner dimension, in stretches whose sums
//! are then added.

use half::bf16;

use crate::Pool;
use crate::pool::chunks;
use crate::wide;

/// Inner elements per stretch.
pub const STRETCH: usize = 256;

/// Columns of the result that are computed together: two AVX2 registers.
const PANEL: usize = 16;

/// Columns of the result per task.
const TASK: usize = 4 * PANEL;

/// Maximum rows whose sums stay in registers.
const BLOCK: usize = 6;

/// Up to this many rows of x a product is bound by reading its weights.
pub const FEW: usize = 24;

/// An element of a weight matrix.
pub trait Weight: Copy + Sync {
    /// As a float.
    fn widen(self) -> f32;
    /// Eight of them.
    fn eight(x: &[Self; 8]) -> wide::Wide;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn eight(x: &[Self; 8]) -> wide::Wide {
        wide::load(x)
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn eight(x: &[Self; 8]) -> wide::Wide {
        wide::load_half(x)
    }
}

/// y (n, o) = x (n, i) times w (o, i) transposed, added to y if `grow`; the rows of w are `w_row` apart.
///
/// # Panics
/// The slices are shorter than the sizes say.
pub fn product<W: Weight>(
    pool: &impl Pool,
    y: &mut [f32],
    x: &[f32],
    (w, w_row): (&[W], usize),
    [n, i, o]: [usize; 3],
    grow: bool,
) {
    let block = n.div_ceil(n.div_ceil(BLOCK));
    // x in blocks of rows (i, rows): elements that are multiplied by the same weights are adjacent.
    let mut columns_of_x = vec![0.0; n * i];
    for (x, to) in x.chunks(block * i).zip(columns_of_x.chunks_mut(block * i)) {
        let rows = to.len() / i;
        for (r, x) in x.chunks_exact(i).take(rows).enumerate() {
            to[r..]
                .iter_mut()
                .step_by(rows)
                .zip(x)
                .for_each(|(to, &x)| *to = x);
        }
    }
    // Column-major during computation, so that a task's results are contiguous.
    let mut turned = vec![0.0; n * o];
    if grow {
        for (r, y) in y.chunks_exact(o).take(n).enumerate() {
            let to = turned[r..].iter_mut().step_by(n);
            to.zip(y).for_each(|(to, &y)| *to = y);
        }
    }
    chunks(pool, &mut turned, n * TASK, |task, out| {
        let mut panel = [0.0; STRETCH * PANEL];
        for (at, out) in out.chunks_mut(n * PANEL).enumerate() {
            let w = &w[(task * TASK + at * PANEL) * w_row..];
            for start in (0..i).step_by(STRETCH) {
                let depth = STRETCH.min(i - start);
                let panel = &mut panel[..depth * PANEL];
                // The next stretch to prefetch: of the same rows, or the first of the next rows.
                let next = match start + STRETCH {
                    next if next < i => next,
                    _ => PANEL * w_row,
                };
                fill(
                    panel,
                    (&w[start..], w_row),
                    out.len() / n,
                    &w[next.min(w.len())..],
                );
                for (b, x) in columns_of_x.chunks(block * i).enumerate() {
                    let rows = x.len() / i;
                    let (x, first) = (&x[start * rows..][..depth * rows], start == 0 && !grow);
                    let out = (&mut out[b * block..], n);
                    match rows {
                        1 => sums::<1>(out, x, panel, first),
                        2 => sums::<2>(out, x, panel, first),
                        3 => sums::<3>(out, x, panel, first),
                        4 => sums::<4>(out, x, panel, first),
                        5 => sums::<5>(out, x, panel, first),
                        _ => sums::<BLOCK>(out, x, panel, first),
                    }
                }
            }
        }
    });
    for (r, y) in y.chunks_exact_mut(o).take(n).enumerate() {
        for (y, &sum) in y.iter_mut().zip(turned[r..].iter().step_by(n)) {
            *y = sum;
        }
    }
}

/// Adds a stretch to the sums of `R` rows, or begins them if it is the first; `out` holds one column after the other,
/// `n` apart.
#[inline(always)]
fn sums<const R: usize>((out, n): (&mut [f32], usize), x: &[f32], panel: &[f32], first: bool) {
    let mut sums = [[wide::ZERO; 2]; R];
    for (w, x) in panel
        .as_chunks::<PANEL>()
        .0
        .iter()
        .zip(x.as_chunks::<R>().0)
    {
        let [low, high] = wide::pair(w);
        for r in 0..R {
            let x = wide::splat(x[r]);
            sums[r][0] = wide::mul_add(x, low, sums[r][0]);
            sums[r][1] = wide::mul_add(x, high, sums[r][1]);
        }
    }
    let sums = sums.map(wide::sixteen);
    for (l, out) in out.chunks_mut(n).enumerate() {
        for r in 0..R {
            out[r] = if first {
                sums[r][l]
            } else {
                out[r] + sums[r][l]
            };
        }
    }
}

/// Transposes `width` rows of w, at most [`PANEL`], into columns: (depth, [`PANEL`]). The rest is left untouched and never
/// read. Meanwhile the rows of `next` are prefetched.
#[inline(always)]
fn fill<W: Weight>(panel: &mut [f32], (w, w_row): (&[W], usize), width: usize, next: &[W]) {
    let depth = panel.len() / PANEL;
    let mut done = 0;
    #[cfg(all(target_arch = "x86_64", target_feature = "avx2"))]
    if width == PANEL {
        for k in (0..depth / 8 * 8).step_by(8) {
            for half in [0, 8] {
                if k % (64 / size_of::<W>()) == 0 {
                    prefetch(next, half * w_row + k, w_row);
                }
                let corner = &w[half * w_row + k..][..7 * w_row + 8];
                turn_square(
                    &mut panel[k * PANEL + half..][..7 * PANEL + 8],
                    corner,
                    w_row,
                );
            }
        }
        done = depth / 8 * 8;
    }
    for l in 0..width {
        let row = &w[l * w_row..][..depth];
        for k in done..depth {
            panel[k * PANEL + l] = row[k].widen();
        }
    }
}

/// Prefetches a cache line of each of eight rows; addresses beyond the end have no effect.
#[cfg(all(target_arch = "x86_64", target_feature = "avx2"))]
#[inline(always)]
fn prefetch<W>(x: &[W], at: usize, row: usize) {
    use std::arch::x86_64::*;
    for r in 0..8 {
        let line = x.as_ptr().wrapping_add(at + r * row);
        // SAFETY: a prefetch reads nothing and never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

/// Transposes eight by eight elements: rows `row` apart become rows [`PANEL`] apart.
#[cfg(all(target_arch = "x86_64", target_feature = "avx2"))]
#[inline(always)]
fn turn_square<W: Weight>(to: &mut [f32], from: &[W], row: usize) {
    use std::arch::x86_64::*;
    assert!(from.len() >= 7 * row + 8 && to.len() >= 7 * PANEL + 8);
    // SAFETY: the assertion keeps all eight loads and stores of eight elements inside their slices, and AVX is there as
    // this function is only compiled with it.
    unsafe {
        let load = |r: usize| W::eight(&*from.as_ptr().add(r * row).cast());
        let pairs = [0, 2, 4, 6].map(|r| {
            let (a, b) = (load(r), load(r + 1));
            [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)]
        });
        // Four rows of four columns each, in either half of a register.
        let [tops, bottoms] = [(0, 1), (2, 3)].map(|(p, q)| {
            let ([a, b], [c, d]) = (pairs[p], pairs[q]);
            [
                _mm256_shuffle_ps::<0x44>(a, c),
                _mm256_shuffle_ps::<0xee>(a, c),
                _mm256_shuffle_ps::<0x44>(b, d),
                _mm256_shuffle_ps::<0xee>(b, d),
            ]
        });
        for (c, (top, bottom)) in tops.into_iter().zip(bottoms).enumerate() {
            let at = to.as_mut_ptr();
            _mm256_storeu_ps(
                at.add(c * PANEL),
                _mm256_permute2f128_ps::<0x20>(top, bottom),
            );
            _mm256_storeu_ps(
                at.add((c + 4) * PANEL),
                _mm256_permute2f128_ps::<0x31>(top, bottom),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rayon;

    /// Pseudo-random numbers.
    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        retort_engine::random::noise(seed, 0, 1, n)
    }

    /// Compares every sum with f64, and checks that rows do not depend on their number.
    fn check<W: Weight>(convert: impl Fn(f32) -> W) {
        for (i, o) in [(768, 96), (257, 65), (31, 17), (1000, 40), (8, 1)] {
            let (x, y) = (numbers(1, 30 * i), numbers(3, 30 * o));
            let w: Vec<W> = numbers(2, o * (i + 3)).into_iter().map(&convert).collect();
            for grow in [false, true] {
                let rows = |n: usize| {
                    let mut y = y[..n * o].to_vec();
                    product(&Rayon, &mut y, &x[..n * i], (&w, i + 3), [n, i, o], grow);
                    y
                };
                let all = rows(30);
                for n in [1, 2, 5, 6, 7, 24] {
                    assert_eq!(rows(n), all[..n * o], "{n} rows, {i} to {o}");
                }
                for (at, found) in all.iter().enumerate() {
                    let (r, c) = (at / o, at % o);
                    let pairs = x[r * i..][..i].iter().zip(&w[c * (i + 3)..]);
                    let products = pairs.map(|(&x, w)| f64::from(x) * f64::from(w.widen()));
                    let before = if grow { f64::from(y[at]) } else { 0.0 };
                    let sum = products.sum::<f64>() + before;
                    let error = (sum - f64::from(*found)).abs();
                    assert!(
                        error < 2e-6 * (i as f64).sqrt() + 1e-6,
                        "{error:e} in {i} to {o}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_are_those_of_float64_for_both_types_of_weights() {
        check(|x| x);
        check(bf16::from_f32);
    }
}
