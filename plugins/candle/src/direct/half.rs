//! The same in bf16, by the processor's tiles ([`retort_kernels::half::windows`]).

use rayon::prelude::*;
use retort_kernels::half::windows::{self, CHANNELS, Filters, POSITIONS, Rounding, interleave};
use retort_kernels::half::{BLOCK, Packed, Side, Unit};
use retort_kernels::{Alone, Matrix};

use super::{BAND, Direct, Piece};

/// Channels from which on tiles, which have 32 of them, are faster than f32.
const MANY: usize = 12;

/// Pieces of images that a kernel's gradient is summed over at a time.
const SLOTS: usize = 16;

impl Direct {
    /// Whether this processor has tiles, and they are faster.
    pub fn has_tiles(&self) -> bool {
        self.c >= MANY && self.o >= MANY && Unit::best() == Some(Unit::Tiles)
    }

    /// The same as [`Direct::forward`], of numbers that are rounded to bf16.
    pub fn forward_half(
        &self,
        rounding: Rounding,
        x: &[f32],
        w: &[f32],
        bias: &[f32],
        residual: Option<&[f32]>,
        b: usize,
    ) -> Vec<f32> {
        let taps = self.kernel[0] * self.kernel[1];
        let kernel = &w[..self.o * self.c * taps];
        let filters = Filters::new(kernel, [self.o, self.c, taps], rounding);
        // Beside the copy, the results and the kernels of two strips are in the cache.
        let (rows, line) = (self.rows_of_a_band(BAND / 2, b), self.line());
        let offsets: Vec<usize> = (0..taps).map(|tap| self.place(tap)).collect();
        let plane = self.plane(rows);
        let planes = self.c.next_multiple_of(CHANNELS) / 2 * plane;
        let positions = |rows: usize| (rows * line).next_multiple_of(POSITIONS);
        self.by_bands(
            [b, rows, filters.rows() * positions(rows)],
            bias,
            residual,
            || vec![0; rounding.parts() * planes + self.kernel[1] + POSITIONS],
            |copy: &mut Vec<u32>, piece, sums| {
                let (first, rest) = copy.split_at_mut(planes);
                let rest = (rounding == Rounding::Twice).then_some(rest);
                self.copy_pairs(self.of_image(x, piece), piece, plane, first, rest);
                let n = positions(piece.rows);
                windows::correlate((copy, plane), &offsets, &filters, n, sums);
                n
            },
        )
    }

    /// Copies an image (c, h, w), as far as a piece needs it, in pairs of channels, and what rounding leaves to `rest`. All else in
    /// both is zero and stays so.
    fn copy_pairs(
        &self,
        x: &[f32],
        piece: Piece,
        plane: usize,
        to: &mut [u32],
        mut rest: Option<&mut [u32]>,
    ) {
        let ([h, w], [above, left]) = (self.image, self.padding);
        for (pair, x) in x.chunks(2 * h * w).enumerate() {
            for i in 0..piece.rows + self.kernel[0] - 1 {
                let at = pair * plane + i * self.line() + left;
                let to = &mut to[at..][..w];
                let rest = rest.as_mut().map(|rest| &mut rest[at..][..w]);
                match (piece.first + i).checked_sub(above).filter(|&y| y < h) {
                    Some(y) => {
                        let high = x.get(h * w + y * w..).filter(|high| !high.is_empty());
                        interleave(&x[y * w..], high, to, rest);
                    }
                    None => {
                        to.fill(0);
                        if let Some(rest) = rest {
                            rest.fill(0);
                        }
                    }
                }
            }
        }
    }

    /// The same as [`Direct::kernel_gradient`], of numbers that are rounded to bf16.
    pub fn kernel_gradient_half(&self, x: &[f32], grad: &[f32], b: usize) -> Vec<f32> {
        let (rows, line) = (self.rows_of_a_sum(), self.line());
        let n = (rows * line).next_multiple_of(POSITIONS);
        let (plane, taps) = (self.plane(rows), self.kernel[0] * self.kernel[1]);
        // Both ways of pairing positions, for places at even and at odd distances.
        let there = n + self.place(taps - 1);
        let of_x = self.c * plane + there.saturating_sub(plane) + 1;
        let pieces = self.pieces(b, rows);
        let blocks = [self.o, self.c].map(|size| size.div_ceil(BLOCK));
        let mut sums = vec![[0.0; BLOCK * BLOCK]; blocks[0] * blocks[1] * taps];
        for pieces in pieces.chunks(SLOTS) {
            let copies = pieces.par_iter().map_init(
                || (vec![0.0; of_x], vec![0.0; self.o * n]),
                |(copy, g), &piece| {
                    self.copy_image(
                        self.of_image(x, piece),
                        piece,
                        plane,
                        &mut copy[..self.c * plane],
                    );
                    self.copy_gradient(grad, piece, n, g);
                    let g = Packed::new(&Alone, Side::Left, Matrix::rows(g, n), [self.o, n]);
                    let of_pairs = |first: usize| {
                        let x = Matrix::rows(&copy[first..], plane).turned();
                        Packed::new(&Alone, Side::Right, x, [self.c, there])
                    };
                    (g, (of_pairs(0), of_pairs(1)))
                },
            );
            let (gs, (even, odd)): (Vec<_>, (Vec<_>, Vec<_>)) = copies.collect();
            sums.par_iter_mut().enumerate().for_each(|(at, sums)| {
                let (block, tap) = (at / taps, at % taps);
                let (i, j) = (block / blocks[1], block % blocks[1]);
                let offset = self.place(tap);
                let xs = if offset.is_multiple_of(2) {
                    &even
                } else {
                    &odd
                };
                windows::grow(sums, (&gs, i), (xs, j), offset / 2);
            });
        }
        let mut dw = vec![0.0; self.o * self.c * taps];
        let of_row = self.c * taps;
        let fill = |(o, dw): (usize, &mut [f32])| {
            for (c, dw) in dw.chunks_exact_mut(taps).enumerate() {
                let block = (o / BLOCK * blocks[1] + c / BLOCK) * taps;
                let place = o % BLOCK * BLOCK + c % BLOCK;
                for (dw, sums) in dw.iter_mut().zip(&sums[block..]) {
                    *dw = sums[place];
                }
            }
        };
        dw.par_chunks_exact_mut(of_row).enumerate().for_each(fill);
        dw
    }
}
