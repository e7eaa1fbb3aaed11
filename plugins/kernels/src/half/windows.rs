//! Convolutions with stride 1 by tiles: an image's channels stand in pairs, each pair's plane with room for the padding in its
//! lines, so that any place of the kernel reads the image as it is. Gradients of kernels are products along the positions.

use super::{BLOCK, DEPTH, Line, Packed, SIDE, Side, Unit};
use crate::lanes::widest;

/// Positions are computed in multiples of this.
pub const POSITIONS: usize = BLOCK;

/// Channels are filled up to multiples of this.
pub const CHANNELS: usize = DEPTH;

/// Kernels (o, c, taps) in tiles of 16 results and 32 channels.
#[derive(Debug)]
pub struct Filters {
    /// For each part, 16 results, tap and 32 channels a tile.
    lines: Vec<Line>,
    strips: usize,
    taps: usize,
    blocks: usize,
}

/// How exactly numbers are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To bf16: errors of 2^-9.
    Once,
    /// To the sum of two numbers in bf16: errors of 2^-17, for three times the products.
    Twice,
}

impl Rounding {
    fn parts(self) -> usize {
        match self {
            Self::Once => 1,
            Self::Twice => 2,
        }
    }

    /// The parts of the image and of the kernel that are multiplied; the product of both remainders is too small to count.
    fn products(self) -> &'static [[usize; 2]] {
        match self {
            Self::Once => &[[0, 0]],
            Self::Twice => &[[0, 0], [1, 0], [0, 1]],
        }
    }
}

impl Filters {
    /// Packs kernels.
    pub fn new(w: &[f32], [o, c, taps]: [usize; 3], rounding: Rounding) -> Self {
        let (strips, blocks) = (2 * o.div_ceil(BLOCK), c.div_ceil(CHANNELS));
        let mut lines = Vec::with_capacity(rounding.parts() * strips * taps * blocks * SIDE);
        for part in 0..rounding.parts() {
            let number = |row: usize, channel: usize, tap: usize| {
                if row >= o || channel >= c {
                    return 0;
                }
                let x = w[(row * c + channel) * taps + tap];
                let first = rounded(x);
                match part {
                    0 => first,
                    _ => rounded(x - f32::from_bits(first << 16)),
                }
            };
            for strip in 0..strips {
                for tap in 0..taps {
                    for block in 0..blocks {
                        lines.extend((strip * SIDE..(strip + 1) * SIDE).map(|row| {
                            Line(std::array::from_fn(|pair| {
                                let channel = block * CHANNELS + 2 * pair;
                                number(row, channel, tap) | number(row, channel + 1, tap) << 16
                            }))
                        }));
                    }
                }
            }
        }
        Self {
            lines,
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

/// The bits of a number in bf16, rounded to the nearest and ties to even.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    if is_nan { bits >> 16 | 0x40 } else { up }
}

/// Two channels side by side in pairs, `low` below `high`; with a second part what rounding leaves.
#[inline]
pub fn interleave(low: &[f32], high: Option<&[f32]>, to: &mut [u32], rest: Option<&mut [u32]>) {
    let n = to.len();
    let low = &low[..n];
    widest(
        #[inline(always)]
        || match high {
            Some(high) => {
                let high = &high[..n];
                for i in 0..n {
                    to[i] = rounded(low[i]) | rounded(high[i]) << 16;
                }
                if let Some(rest) = rest {
                    let rest = &mut rest[..n];
                    for i in 0..n {
                        let first = to[i];
                        let below = low[i] - f32::from_bits(first << 16);
                        let above = high[i] - f32::from_bits(first & 0xffff_0000);
                        rest[i] = rounded(below) | rounded(above) << 16;
                    }
                }
            }
            None => {
                for i in 0..n {
                    to[i] = rounded(low[i]);
                }
                if let Some(rest) = rest {
                    let rest = &mut rest[..n];
                    for i in 0..n {
                        rest[i] = rounded(low[i] - f32::from_bits(to[i] << 16));
                    }
                }
            }
        },
    );
}

/// y (rows, n), for all rows of `w`: y[r][q] = sum over channels c and taps of w[r][c][tap] x[c][offsets[tap] + q]. `x` holds the
/// parts of an image, one after the other: planes of `plane` pairs ([`interleave`]), zeros in those beyond its channels.
///
/// # Panics
/// n is no multiple of [`POSITIONS`], a slice is too short, or the processor has no [`Unit::Tiles`].
pub fn correlate(
    rounding: Rounding,
    (x, plane): (&[u32], usize),
    offsets: &[usize],
    w: &Filters,
    n: usize,
    y: &mut [f32],
) {
    let of_part = w.blocks * SIDE * plane;
    let furthest = offsets.iter().max().copied().unwrap_or(0);
    let last = (rounding.parts() * of_part)
        .saturating_sub(plane)
        .saturating_add(furthest)
        .saturating_add(n);
    assert!(
        n.is_multiple_of(POSITIONS)
            && offsets.len() == w.taps
            && w.lines.len() == rounding.parts() * w.strips * w.taps * w.blocks * SIDE
            && last <= x.len()
            && w.rows().saturating_mul(n) <= y.len()
            && Unit::Tiles.exists(),
        "a convolution beyond its image"
    );
    #[cfg(target_arch = "x86_64")]
    {
        use super::amx;
        let _tiles = amx::Tiles::new();
        for q in (0..n).step_by(POSITIONS) {
            for strip in (0..w.strips).step_by(2) {
                // SAFETY: the assertion keeps all that is read and written inside the slices; tiles are configured.
                unsafe {
                    amx::zero();
                    for &[image, kernel] in rounding.products() {
                        for (tap, offset) in offsets.iter().enumerate() {
                            for block in 0..w.blocks {
                                let a = [strip, strip + 1]
                                    .map(|strip| w.tile(kernel, strip, tap, block).as_ptr());
                                let from = image * of_part + block * SIDE * plane + offset + q;
                                let b = x.as_ptr().add(from);
                                amx::multiply((a, 1), ([b, b.add(SIDE)], plane));
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
