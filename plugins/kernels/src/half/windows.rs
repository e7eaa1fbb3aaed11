//! Convolutions with stride 1 by tiles: an image's channels stand in pairs, each pair's plane with room for the padding in its
//! lines, so that any place of the kernel reads the image as it is. Gradients of kernels are products along the positions.

use half::bf16;
use rayon::prelude::*;

use super::{BLOCK, DEPTH, Line, Packed, SIDE, Side, Unit};

/// Positions are computed in multiples of this.
pub const POSITIONS: usize = BLOCK;

/// Channels are filled up to multiples of this.
pub const CHANNELS: usize = DEPTH;

/// Kernels (o, c, taps) in tiles of 16 results and 32 channels.
#[derive(Debug)]
pub struct Filters {
    /// For each part, 16 results, tap and 32 channels a tile.
    lines: Vec<Line>,
    rounding: Rounding,
    strips: usize,
    taps: usize,
    blocks: usize,
}

/// How exactly numbers are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To bf16: errors of 2^-9.
    Once,
    /// To the sum of two numbers in bf16: errors of 2^-17, for three times the products. That of both remainders is too small to
    /// count.
    Twice,
}

impl Rounding {
    /// Numbers that stand for one.
    pub fn parts(self) -> usize {
        match self {
            Self::Once => 1,
            Self::Twice => 2,
        }
    }
}

impl Filters {
    /// Packs kernels.
    pub fn new(w: &[f32], [o, c, taps]: [usize; 3], rounding: Rounding) -> Self {
        let (strips, blocks) = (2 * o.div_ceil(BLOCK), c.div_ceil(CHANNELS));
        let of_strip = taps * blocks * SIDE;
        let mut lines = vec![Line([0; SIDE]); rounding.parts() * strips * of_strip];
        let fill = |(at, lines): (usize, &mut [Line])| {
            let (part, strip) = (at / strips, at % strips);
            let rows = w.chunks_exact(c * taps).take(o);
            for (row, w) in rows.skip(strip * SIDE).take(SIDE).enumerate() {
                for (channel, w) in w.chunks_exact(taps).enumerate() {
                    let (block, pair) = (channel / CHANNELS, channel % CHANNELS / 2);
                    let place = 16 * (channel % 2);
                    for (tap, &x) in w.iter().enumerate() {
                        let first = rounded(x);
                        let number = match part {
                            0 => first,
                            _ => rounded(x - f32::from_bits(first << 16)),
                        };
                        lines[(tap * blocks + block) * SIDE + row].0[pair] |= number << place;
                    }
                }
            }
        };
        lines.par_chunks_mut(of_strip).enumerate().for_each(fill);
        Self {
            lines,
            rounding,
            strips,
            taps,
            blocks,
        }
    }

    /// Results, filled up to whole blocks.
    pub fn rows(&self) -> usize {
        self.strips * SIDE
    }

    fn tile(&self, part: usize, strip: usize, tap: usize, block: usize) -> &[Line] {
        let at = ((part * self.strips + strip) * self.taps + tap) * self.blocks + block;
        &self.lines[at * SIDE..][..SIDE]
    }
}

/// The bits of a number in bf16.
fn rounded(x: f32) -> u32 {
    bf16::from_f32(x).to_bits().into()
}

/// Two channels side by side in pairs, `low` below `high`; with a second part what rounding leaves.
///
/// # Panics
/// A slice is shorter than `to`, or the processor has no [`Unit`].
pub fn interleave(low: &[f32], high: Option<&[f32]>, to: &mut [u32], rest: Option<&mut [u32]>) {
    let n = to.len();
    let enough = low.len() >= n
        && high.is_none_or(|high| high.len() >= n)
        && rest.as_ref().is_none_or(|rest| rest.len() >= n);
    assert!(enough && Unit::Pairs.exists(), "pairs of other channels");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the slices have as many elements, and the processor has the instructions.
    unsafe {
        let high = high.map(<[f32]>::as_ptr);
        let rest = rest.map(<[u32]>::as_mut_ptr);
        x86::interleave(low.as_ptr(), high, to, rest);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::vectors::{lowest, pair, round};

    /// # Safety
    /// All have as many elements as `to`; the processor has AVX-512 BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub unsafe fn interleave(
        low: *const f32,
        high: Option<*const f32>,
        to: &mut [u32],
        rest: Option<*mut u32>,
    ) {
        let n = to.len();
        for i in (0..n).step_by(16) {
            let mask = lowest(n - i);
            // SAFETY: elements beyond the last are masked; vectors of pairs and of words have the same bits.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask, low.add(i));
                let high = match high {
                    Some(high) => _mm512_maskz_loadu_ps(mask, high.add(i)),
                    None => _mm512_setzero_ps(),
                };
                let pairs = pair(round(low), round(high));
                _mm512_mask_storeu_epi32(to.as_mut_ptr().add(i).cast(), mask, pairs);
                if let Some(rest) = rest {
                    let below = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                    let above = _mm512_set1_epi32(0xffff_0000u32 as i32);
                    let above = _mm512_castsi512_ps(_mm512_and_si512(pairs, above));
                    let rests = [_mm512_sub_ps(low, below), _mm512_sub_ps(high, above)];
                    let [low, high] = rests.map(|x| round(x));
                    let pairs = pair(low, high);
                    _mm512_mask_storeu_epi32(rest.add(i).cast(), mask, pairs);
                }
            }
        }
    }
}

/// y (rows, n), for all rows of `w`: y[r][q] = sum over channels c and taps of w[r][c][tap] x[c][offsets[tap] + q]. `x` holds the
/// parts of an image, as many as those of `w`, one after the other: planes of `plane` pairs ([`interleave`]), zeros in those beyond
/// its channels.
///
/// # Panics
/// n is no multiple of [`POSITIONS`], a slice is too short, or the processor has no [`Unit::Tiles`].
pub fn correlate(
    (x, plane): (&[u32], usize),
    offsets: &[usize],
    w: &Filters,
    n: usize,
    y: &mut [f32],
) {
    let of_part = (w.blocks * SIDE).saturating_mul(plane);
    let furthest = offsets.iter().max().copied().unwrap_or(0);
    let last = of_part
        .saturating_mul(w.rounding.parts())
        .saturating_sub(plane)
        .saturating_add(furthest)
        .saturating_add(n);
    assert!(
        n.is_multiple_of(POSITIONS)
            && offsets.len() == w.taps
            && last <= x.len()
            && w.rows().saturating_mul(n) <= y.len()
            && Unit::Tiles.exists(),
        "a convolution beyond its image"
    );
    #[cfg(target_arch = "x86_64")]
    {
        use super::amx;
        let _tiles = amx::Tiles::new();
        // The kernels of two strips stay in the cache, and so does the image.
        for strip in (0..w.strips).step_by(2) {
            for q in (0..n).step_by(POSITIONS) {
                // SAFETY: the assertion keeps all that is read and written inside the slices; tiles are configured.
                unsafe {
                    amx::zero();
                    for (tap, offset) in offsets.iter().enumerate() {
                        for block in 0..w.blocks {
                            let kernel = |part: usize| {
                                [strip, strip + 1].map(|s| w.tile(part, s, tap, block).as_ptr())
                            };
                            let image = |part: usize| {
                                let at = part * of_part + block * SIDE * plane + offset + q;
                                let at = x.as_ptr().add(at);
                                [at, at.add(SIDE)]
                            };
                            match w.rounding {
                                Rounding::Once => {
                                    amx::multiply((kernel(0), 1), (image(0), plane));
                                }
                                Rounding::Twice => amx::multiply_twice(
                                    ([kernel(0), kernel(1)], 1),
                                    ([image(0), image(1)], plane),
                                ),
                            }
                        }
                    }
                    amx::store((y.as_mut_ptr().add(strip * SIDE * n + q), n));
                }
            }
        }
    }
}

/// c (32, 32) grows by block `i` of each of `g` times block `j` of the same of `x`, whose elements along the sum begin
/// `2 shift` later.
///
/// # Panics
/// The operands are not packed for these sides, one of x has too few elements, or the processor has no [`Unit::Tiles`].
pub fn grow(
    c: &mut [f32; BLOCK * BLOCK],
    (g, i): (&[Packed], usize),
    (x, j): (&[Packed], usize),
    shift: usize,
) {
    assert!(Unit::Tiles.exists(), "a processor without tiles");
    #[cfg(target_arch = "x86_64")]
    let _tiles = super::amx::Tiles::new();
    for (g, x) in g.iter().zip(x) {
        assert!(
            [g.side(), x.side()] == [Side::Left, Side::Right]
                && g.inner().is_multiple_of(DEPTH)
                && g.inner().saturating_add(2 * shift) <= x.inner(),
            "a gradient beyond its image"
        );
        #[cfg(target_arch = "x86_64")]
        {
            let c = (c.as_mut_ptr(), BLOCK);
            let from = Some((c.0.cast_const(), BLOCK));
            // SAFETY: a strip of x has a line for each two elements, of which those from the shift on are enough.
            unsafe {
                let x = x.block(j).map(|x| x.add(shift));
                super::amx::block(g.block(i), x, g.steps(), from, c);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (&c, i, j);
    }
}
