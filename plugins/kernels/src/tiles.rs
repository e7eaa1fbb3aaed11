//! Tiles of convolutions with stride 1: sums in registers over images whose lines have room for the padding, so that no image
//! is unfolded and no operand copied.
//!
//! A place of the kernel and a channel together are a tap: an offset into the image at which it is read, as it is. All
//! functions compute positions in multiples of [`STEP`], and may read as far beyond an image.
//!
//! The order of summation, and with it every bit, is the same whatever the instructions: results are summed tap by tap, and
//! products along the positions in [`LANES`] lanes.

use crate::lanes::{LANES, fold};

/// Positions are computed in multiples of this.
pub const STEP: usize = 16;

/// Rows of results that a kernel holds for each tap, side by side; the last block may have half as many.
pub const ROWS: usize = 8;

/// Rows of the gradient of a kernel that a tile sums.
pub const GRADIENTS: usize = 4;

/// Kernels (o, taps) in blocks of [`ROWS`] results: (block, tap, row), the last block filled up with zeros.
pub fn packed(w: &[f32], o: usize) -> Vec<f32> {
    let taps = w.len() / o;
    let mut all = Vec::with_capacity(taps * o.next_multiple_of(ROWS));
    for first in (0..o).step_by(ROWS) {
        let rows = block(o - first);
        for tap in 0..taps {
            let row = |r: usize| match first + r < o {
                true => w[(first + r) * taps + tap],
                false => 0.0,
            };
            all.extend((0..rows).map(row));
        }
    }
    all
}

/// Rows of a block when so many are left.
fn block(left: usize) -> usize {
    if left <= ROWS / 2 { ROWS / 2 } else { ROWS }
}

/// y (rows, n), for all rows of the blocks of `w` ([`packed`]): y[r][q] = sum over taps of w[tap][r] x[offsets[tap] + q].
pub fn correlate(x: &[f32], offsets: &[usize], w: &[f32], n: usize, y: &mut [f32]) {
    let furthest = offsets.iter().max().copied().unwrap_or(0);
    let rows = w.len() / offsets.len().max(1);
    assert!(
        n.is_multiple_of(STEP)
            && furthest.saturating_add(n) <= x.len()
            && rows.saturating_mul(n) <= y.len(),
        "a convolution beyond its image"
    );
    // SAFETY: the assertion keeps all that is read and written inside the slices; the processor has the instructions.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            return avx512::correlate(x, offsets, w, [rows, n], y);
        }
        plain::correlate(x, offsets, w, [rows, n], y);
    }
}

/// Images of both operands of [`products`], one after the other.
#[derive(Clone, Copy)]
pub struct Slots {
    /// Images.
    pub count: usize,
    /// Elements from one to the next, of the gradient.
    pub g: usize,
    /// The same, of the input.
    pub x: usize,
}

/// dw (rows, taps) grows, for at most [`GRADIENTS`] rows:
/// dw[r][tap] += sum over images and q < n of g[r n + q] x[offsets[tap] + q].
pub fn products(g: &[f32], x: &[f32], offsets: &[usize], n: usize, slots: Slots, dw: &mut [f32]) {
    let (taps, furthest) = (offsets.len(), offsets.iter().max().copied().unwrap_or(0));
    let (rows, last) = (dw.len() / taps.max(1), slots.count.saturating_sub(1));
    let end_g = last
        .saturating_mul(slots.g)
        .saturating_add(rows.saturating_mul(n));
    let end_x = last
        .saturating_mul(slots.x)
        .saturating_add(furthest)
        .saturating_add(n);
    assert!(
        n.is_multiple_of(STEP) && rows <= GRADIENTS && end_g <= g.len() && end_x <= x.len(),
        "a gradient beyond its image"
    );
    // SAFETY: as above.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            return avx512::products(g, x, offsets, n, slots, dw);
        }
        plain::products(g, x, offsets, n, slots, dw);
    }
}

/// The tiles for vectors of `$lanes` floats: `$tall` rows by 3 vectors of a result, `$high` rows by `$long` taps of a gradient.
macro_rules! tiles {
    ($(#[$feature:meta])? $lanes:literal, $zero:expr, $load:path, $splat:path, $mul_add:path, $store:path,
     $tall:literal, $high:literal, $long:literal) => {
        const VECTORS: usize = LANES / $lanes;

        $(#[$feature])?
        pub unsafe fn correlate(x: &[f32], offsets: &[usize], w: &[f32], [rows, n]: [usize; 2], y: &mut [f32]) {
            let mut q = 0;
            while q < n {
                let vectors = ((n - q) / $lanes).min(3);
                let mut first = 0;
                while first < rows {
                    let block = block(rows - first);
                    // SAFETY: the blocks before this one have `first` rows.
                    let w = unsafe { w.as_ptr().add(first * offsets.len()) };
                    let mut at = 0;
                    while at < block {
                        // SAFETY: q and the rows are inside, as the caller has made sure.
                        unsafe {
                            let (x, w) = (x.as_ptr().add(q), (w.add(at), block));
                            let y = (y.as_mut_ptr().add((first + at) * n + q), n);
                            match (vectors, block - at >= $tall) {
                                (3, true) => tile::<$tall, 3>(x, offsets, w, y),
                                (2, true) => tile::<$tall, 2>(x, offsets, w, y),
                                (_, true) => tile::<$tall, 1>(x, offsets, w, y),
                                (3, false) => tile::<4, 3>(x, offsets, w, y),
                                (2, false) => tile::<4, 2>(x, offsets, w, y),
                                (_, false) => tile::<4, 1>(x, offsets, w, y),
                            }
                        }
                        at += $tall;
                    }
                    first += block;
                }
                q += vectors * $lanes;
            }
        }

        $(#[$feature])?
        unsafe fn tile<const R: usize, const V: usize>(
            x: *const f32,
            offsets: &[usize],
            (w, block): (*const f32, usize),
            (y, row): (*mut f32, usize),
        ) {
            let mut sums = [[$zero; V]; R];
            for (tap, &offset) in offsets.iter().enumerate() {
                // SAFETY: as in `correlate`.
                unsafe {
                    let mut columns = [$zero; V];
                    for v in 0..V {
                        columns[v] = $load(&*x.add(offset + v * $lanes).cast());
                    }
                    for r in 0..R {
                        let factor = $splat(*w.add(tap * block + r));
                        for v in 0..V {
                            sums[r][v] = $mul_add(factor, columns[v], sums[r][v]);
                        }
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    // SAFETY: as in `correlate`.
                    unsafe {
                        *y.add(r * row + v * $lanes).cast() = $store(sums[r][v]);
                    }
                }
            }
        }

        $(#[$feature])?
        pub unsafe fn products(
            g: &[f32],
            x: &[f32],
            offsets: &[usize],
            n: usize,
            slots: Slots,
            dw: &mut [f32],
        ) {
            let taps = offsets.len();
            let rows = dw.len() / taps;
            let mut tap = 0;
            while tap < taps {
                let long = if taps - tap >= $long { $long } else { 1 };
                let mut r = 0;
                while r < rows {
                    let high = if rows - r >= $high { $high } else { 1 };
                    let offsets = &offsets[tap..tap + long];
                    let g = &g[r * n..];
                    let dw = &mut dw[r * taps + tap..];
                    // SAFETY: the rows and the offsets are inside, as the caller has made sure.
                    unsafe {
                        match (high, long) {
                            ($high, $long) => sum::<$high, $long>(g, x, offsets, n, slots, (dw, taps)),
                            ($high, _) => sum::<$high, 1>(g, x, offsets, n, slots, (dw, taps)),
                            (_, $long) => sum::<1, $long>(g, x, offsets, n, slots, (dw, taps)),
                            _ => sum::<1, 1>(g, x, offsets, n, slots, (dw, taps)),
                        }
                    }
                    r += high;
                }
                tap += long;
            }
        }

        $(#[$feature])?
        unsafe fn sum<const R: usize, const K: usize>(
            g: &[f32],
            x: &[f32],
            offsets: &[usize],
            n: usize,
            slots: Slots,
            (dw, taps): (&mut [f32], usize),
        ) {
            let mut sums = [[[$zero; VECTORS]; K]; R];
            for slot in 0..slots.count {
                let mut windows = [x.as_ptr(); K];
                // SAFETY: as in `products`.
                unsafe {
                    for k in 0..K {
                        windows[k] = x.as_ptr().add(slot * slots.x + offsets[k]);
                    }
                    let g = g.as_ptr().add(slot * slots.g);
                    let mut q = 0;
                    while q < n {
                        for v in 0..VECTORS {
                            let at = q + v * $lanes;
                            let mut factors = [$zero; R];
                            for r in 0..R {
                                factors[r] = $load(&*g.add(r * n + at).cast());
                            }
                            for k in 0..K {
                                let window = $load(&*windows[k].add(at).cast());
                                for r in 0..R {
                                    sums[r][k][v] = $mul_add(factors[r], window, sums[r][k][v]);
                                }
                            }
                        }
                        q += LANES;
                    }
                }
            }
            for r in 0..R {
                for k in 0..K {
                    let mut lanes = [0.0; LANES];
                    for v in 0..VECTORS {
                        lanes[v * $lanes..][..$lanes].copy_from_slice(&$store(sums[r][k][v]));
                    }
                    dw[r * taps + k] += fold(lanes);
                }
            }
        }
    };
}

/// Sixteen floats at a time.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::*;

    // SAFETY: any bits are floats.
    const ZERO: __m512 = unsafe { std::mem::transmute([0.0f32; 16]) };

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(x: &[f32; 16]) -> __m512 {
        // SAFETY: sixteen floats are there to be read.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(x: __m512) -> [f32; 16] {
        // SAFETY: sixteen floats either way.
        unsafe { std::mem::transmute(x) }
    }

    tiles!(
        #[target_feature(enable = "avx512f")]
        16,
        ZERO,
        load,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        store,
        8,
        4,
        6
    );
}

/// Eight floats at a time.
mod plain {
    use super::*;
    use crate::wide::{ZERO, load, mul_add, splat, store};

    tiles!(8, ZERO, load, splat, mul_add, store, 4, 2, 2);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "a convolution beyond its image")]
    fn nothing_is_read_where_an_offset_overflows() {
        correlate(
            &[1.0; 32],
            &[usize::MAX - 8],
            &[1.0; 4],
            STEP,
            &mut [0.0; 64],
        );
    }

    #[test]
    #[should_panic(expected = "a gradient beyond its image")]
    fn nothing_is_summed_where_an_offset_overflows() {
        let slots = Slots {
            count: 1,
            g: 0,
            x: 0,
        };
        let (offsets, mut dw) = ([usize::MAX - 8], [0.0]);
        products(&[1.0; 32], &[1.0; 32], &offsets, STEP, slots, &mut dw);
    }

    #[cfg(target_arch = "x86_64")]
    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        retort_engine::random::noise(seed, 0, 1, n)
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn results_do_not_depend_on_the_width_of_the_vectors() {
        if !std::arch::is_x86_feature_detected!("avx512f") {
            return eprintln!("skipped: this processor has no AVX-512");
        }
        for (taps, o, n) in [(27, 8, 80), (9, 3, 16), (18, 21, 112), (5, 4, 48)] {
            let (x, offsets) = (
                numbers(1, 1000),
                (0..taps).map(|i| 7 * i).collect::<Vec<_>>(),
            );
            let w = packed(&numbers(2, o * taps), o);
            let (rows, mut y) = (w.len() / taps, [vec![0.0; 24 * n], vec![0.0; 24 * n]]);
            let (g, slots) = (
                numbers(3, 700),
                Slots {
                    count: 3,
                    g: 10,
                    x: 20,
                },
            );
            for rows_of_gradient in 1..=GRADIENTS {
                let mut dw = [
                    vec![1.0; rows_of_gradient * taps],
                    vec![1.0; rows_of_gradient * taps],
                ];
                let [narrow, wide] = &mut dw;
                // SAFETY: the processor has AVX-512; the furthest elements are within the slices.
                unsafe {
                    plain::products(&g, &x, &offsets, n, slots, narrow);
                    avx512::products(&g, &x, &offsets, n, slots, wide);
                }
                assert!(narrow == wide && narrow.iter().all(|&x| x != 1.0));
            }
            let [narrow, wide] = &mut y;
            // SAFETY: as above.
            unsafe {
                plain::correlate(&x, &offsets, &w, [rows, n], narrow);
                avx512::correlate(&x, &offsets, &w, [rows, n], wide);
            }
            assert!(narrow == wide && narrow[..o * n].iter().all(|&x| x != 0.0));
        }
    }
}
