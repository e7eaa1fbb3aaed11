//! Operands in tiles.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::vectors;
use super::{DEPTH, Line, SIDE, Unit};
use crate::{Matrix, Pool};

/// A type of operands.
pub trait Element: Copy + Sync {
    /// The first of 16 elements in memory, rounded to bf16, and zeros for those whose bit in `mask` is zero.
    ///
    /// # Safety
    /// Elements whose bit is set can be read; the processor has AVX-512 BF16.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(from: *const Self, mask: u16) -> std::arch::x86_64::__m256i;
}

/// The side of a product on which an operand stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its rows are those of the result.
    Left,
    /// Its columns are those of the result.
    Right,
}

/// An operand in tiles: 16 of its rows (on the left) or columns (on the right) and 32 inner elements each.
#[derive(Debug)]
pub struct Packed {
    lines: Vec<Line>,
    side: Side,
    /// Rows or columns.
    outer: usize,
    /// Elements that are summed.
    inner: usize,
}

impl Packed {
    /// Packs a matrix of `outer` rows (on the left) or columns (on the right) and `inner` columns or rows.
    ///
    /// # Panics
    /// The matrix is smaller than that, neither of its steps is 1, a size is 0, or the processor has no [`Unit`].
    pub fn new<E: Element>(
        pool: &impl Pool,
        side: Side,
        from: Matrix<'_, E>,
        [outer, inner]: [usize; 2],
    ) -> Self {
        let from = match side {
            Side::Left => from,
            Side::Right => from.turned(),
        };
        let (step, inner_step) = (from.row, from.column);
        assert!(outer > 0 && inner > 0, "an operand without elements");
        assert!(
            (step == 1 || inner_step == 1) && from.holds(outer, inner) && Unit::Pairs.exists(),
            "an operand beyond its memory"
        );
        // Whole blocks of two tiles.
        let strips = 2 * outer.div_ceil(2 * SIDE);
        let steps = inner.div_ceil(DEPTH);
        let count = strips * steps * SIDE;
        let mut lines: Vec<Line> = Vec::with_capacity(count);
        let to = Target(lines.as_mut_ptr());
        let to = &to;
        #[cfg(target_arch = "x86_64")]
        pool.each(strips, &|strip: usize| {
            let here = outer.saturating_sub(SIDE * strip).min(SIDE);
            for s in 0..steps {
                let deep = (inner - s * DEPTH).min(DEPTH);
                let at = (SIDE * strip * step).wrapping_add(s * DEPTH * inner_step);
                // SAFETY: the first `here` rows or columns and `deep` inner elements from there on are inside the slice; the
                // tile is inside the vector's memory and nobody else's; the processor has the instructions.
                unsafe {
                    let tile = to.0.add((strip * steps + s) * SIDE);
                    let from = from.data.as_ptr().wrapping_add(at);
                    tiles::pack(from, [step, inner_step], [here, deep], tile, side);
                }
            }
        });
        // SAFETY: every line of every strip has been written.
        unsafe { lines.set_len(count) };
        Self {
            lines,
            side,
            outer,
            inner,
        }
    }

    /// Rows or columns.
    pub fn outer(&self) -> usize {
        self.outer
    }

    /// Elements that are summed.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// The side that it is packed for.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Tiles along the dimension that is summed.
    pub(super) fn steps(&self) -> usize {
        self.inner.div_ceil(DEPTH)
    }

    /// The tiles of both strips of a block.
    pub(super) fn block(&self, block: usize) -> [*const Line; 2] {
        let strip = self.steps() * SIDE;
        let both = &self.lines[2 * block * strip..][..2 * strip];
        [both.as_ptr(), both[strip..].as_ptr()]
    }
}

/// Memory that tasks write in disjoint parts.
struct Target(*mut Line);

// SAFETY: each task writes lines of its own.
unsafe impl Sync for Target {}

#[cfg(target_arch = "x86_64")]
impl Element for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn sixteen(from: *const Self, mask: u16) -> std::arch::x86_64::__m256i {
        // SAFETY: masked elements are not read.
        vectors::round(unsafe { std::arch::x86_64::_mm512_maskz_loadu_ps(mask, from) })
    }
}

#[cfg(target_arch = "x86_64")]
impl Element for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn sixteen(from: *const Self, mask: u16) -> std::arch::x86_64::__m256i {
        // SAFETY: masked elements are not read.
        unsafe { std::arch::x86_64::_mm256_maskz_loadu_epi16(mask, from.cast()) }
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl Element for f32 {}

#[cfg(not(target_arch = "x86_64"))]
impl Element for bf16 {}

/// Packing of a tile.
#[cfg(target_arch = "x86_64")]
mod tiles {
    use std::arch::x86_64::*;

    use super::super::vectors::{self, lowest};
    use super::{Element, Line, SIDE, Side};

    /// Copies up to 16 rows (or columns) of up to 32 inner elements into a tile, and zeros for the rest.
    ///
    /// # Safety
    /// They can be read with these steps, one of which is 1, and the tile's lines written; the processor has AVX-512 BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn pack<E: Element>(
        from: *const E,
        [step, inner_step]: [usize; 2],
        [outer, inner]: [usize; 2],
        to: *mut Line,
        side: Side,
    ) {
        let mut lines = [_mm512_setzero_si512(); SIDE];
        // SAFETY: only elements that can be read are, the others are masked.
        let by_pair = unsafe {
            match inner_step {
                1 => {
                    let masks = [lowest(inner), lowest(inner.saturating_sub(SIDE))];
                    for (i, line) in lines.iter_mut().enumerate().take(outer) {
                        let from = from.add(i * step);
                        let low = E::sixteen(from, masks[0]);
                        let high = E::sixteen(from.wrapping_add(SIDE), masks[1]);
                        *line = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
                    }
                    false
                }
                _ => {
                    let mask = lowest(outer);
                    for (p, pair) in lines.iter_mut().enumerate().take(inner.div_ceil(2)) {
                        let low = E::sixteen(from.wrapping_add(2 * p * inner_step), mask);
                        let there = if 2 * p + 1 < inner { mask } else { 0 };
                        let high = from.wrapping_add((2 * p + 1) * inner_step);
                        *pair = vectors::pair(low, E::sixteen(high, there));
                    }
                    true
                }
            }
        };
        if by_pair != (side == Side::Right) {
            transpose(&mut lines);
        }
        for (i, line) in lines.into_iter().enumerate() {
            // SAFETY: the tile has as many lines, which are aligned.
            unsafe { _mm512_store_si512(to.add(i).cast(), line) };
        }
    }

    /// Transposes 16 by 16 words.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn transpose(x: &mut [__m512i; SIDE]) {
        let mut t = [_mm512_setzero_si512(); SIDE];
        // Within each quarter of 128 bits: pairs of rows, then pairs of pairs.
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
        }
        for i in 0..4 {
            for h in 0..2 {
                x[4 * i + 2 * h] = _mm512_unpacklo_epi64(t[4 * i + h], t[4 * i + 2 + h]);
                x[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(t[4 * i + h], t[4 * i + 2 + h]);
            }
        }
        // Now x[4 i + c] holds, of rows 4 i to 4 i + 3, column c in its first quarter, column 4 + c in its second, and so on.
        for c in 0..4 {
            let even = _mm512_shuffle_i32x4::<0x88>(x[c], x[4 + c]);
            let odd = _mm512_shuffle_i32x4::<0xdd>(x[c], x[4 + c]);
            let even_below = _mm512_shuffle_i32x4::<0x88>(x[8 + c], x[12 + c]);
            let odd_below = _mm512_shuffle_i32x4::<0xdd>(x[8 + c], x[12 + c]);
            t[c] = _mm512_shuffle_i32x4::<0x88>(even, even_below);
            t[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_below);
            t[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_below);
            t[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_below);
        }
        *x = t;
    }
}
