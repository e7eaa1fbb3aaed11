//! Products of a weight matrix with few rows, as AR steps have them. They are bound by the memory that the weights come
//! from, so each weight is read once, where it lies; the general product would first rearrange them all.
//!
//! The order of summation is that of `product::linear` for many rows: one fused multiply-add after the other along the
//! inner dimension, in stretches whose sums are added up.

use rayon::prelude::*;

use crate::wide;

/// Inner elements that are summed up apart.
pub const STRETCH: usize = 256;

/// Columns of the result that are computed together: two AVX2 registers.
const PANEL: usize = 16;

/// Columns of the result per task.
const TASK: usize = 4 * PANEL;

/// Rows whose sums stay in registers.
const BLOCK: usize = 6;

/// y (n, o) = x (n, i) times w (o, i) transposed, plus what y holds if `grow`; the rows of w are `w_row` apart.
pub fn product(
    y: &mut [f32],
    x: &[f32],
    (w, w_row): (&[f32], usize),
    [n, i, o]: [usize; 3],
    grow: bool,
) {
    let block = n.div_ceil(n.div_ceil(BLOCK));
    // Per block of rows (i, rows): the rows' elements that meet the same weights lie together.
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
    // Column after column while it is computed, so that a task's results lie together.
    let mut turned = vec![0.0; n * o];
    if grow {
        for (r, y) in y.chunks_exact(o).take(n).enumerate() {
            let to = turned[r..].iter_mut().step_by(n);
            to.zip(y).for_each(|(to, &y)| *to = y);
        }
    }
    turned.par_chunks_mut(n * TASK).enumerate().for_each_init(
        || vec![0.0; STRETCH * PANEL],
        |panel, (task, out)| {
            for (at, out) in out.chunks_mut(n * PANEL).enumerate() {
                let w = &w[(task * TASK + at * PANEL) * w_row..];
                for start in (0..i).step_by(STRETCH) {
                    let depth = STRETCH.min(i - start);
                    let panel = &mut panel[..depth * PANEL];
                    // What comes next: the same rows' next stretch, or the next rows' first.
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
        },
    );
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

/// Transposes `width` rows of w, at most [`PANEL`], into columns: (depth, [`PANEL`]). What lies beyond is left as it is
/// and never read. Meanwhile the rows of `next` begin to come from memory.
#[inline(always)]
fn fill(panel: &mut [f32], (w, w_row): (&[f32], usize), width: usize, next: &[f32]) {
    let depth = panel.len() / PANEL;
    let mut done = 0;
    #[cfg(all(target_arch = "x86_64", target_feature = "avx"))]
    if width == PANEL {
        for k in (0..depth / 8 * 8).step_by(8) {
            for half in [0, 8] {
                if k % 16 == 0 {
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
            panel[k * PANEL + l] = row[k];
        }
    }
}

/// Asks for a line of each of eight rows; those beyond the end are asked for in vain.
#[cfg(all(target_arch = "x86_64", target_feature = "avx"))]
#[inline(always)]
fn prefetch(x: &[f32], at: usize, row: usize) {
    use std::arch::x86_64::*;
    for r in 0..8 {
        let line = x.as_ptr().wrapping_add(at + r * row);
        // SAFETY: a prefetch reads nothing and never faults, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

/// Transposes eight by eight elements: rows `row` apart become rows [`PANEL`] apart.
#[cfg(all(target_arch = "x86_64", target_feature = "avx"))]
#[inline(always)]
fn turn_square(to: &mut [f32], from: &[f32], row: usize) {
    use std::arch::x86_64::*;
    assert!(from.len() >= 7 * row + 8 && to.len() >= 7 * PANEL + 8);
    // SAFETY: the assertion keeps all eight loads and stores of eight floats inside their slices, and AVX is there as
    // this function is only compiled with it.
    unsafe {
        let load = |r: usize| _mm256_loadu_ps(from.as_ptr().add(r * row));
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
    use candle_core::{Device, Tensor};

    use crate::product::linear;

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
