//! Convolutions with stride 1 without an unfolded image: [`retort_kernels::tiles`] reads the image itself, copied a band of
//! rows at a time into lines that leave room for the padding, so that the copy stays in the cache.
//!
//! A line begins with as many zeros as there are to the left of the image; the next line's are those to the right of it.
//! Results are computed for whole lines, so a few between the lines are not used.

mod half;

use rayon::prelude::*;
use retort_kernels::tiles::{self, GRADIENTS, ROWS, STEP, Slots};

use crate::rows::in_bands;
use crate::view::fresh;

/// Elements of a band: 1 MiB, the second-level cache of the target processors.
const BAND: usize = 256 * 1024;

/// Positions that a kernel's gradient is summed over at a time: a tile's share of the gradients stays in that cache, and the
/// sum of its lanes takes a few per cent of the time.
const POSITIONS: usize = 6 * 1024;

/// A convolution with stride 1 and less padding than the kernel has places.
#[derive(Clone, Copy)]
pub struct Direct {
    /// Channels of the input.
    pub c: usize,
    /// Height and width of the input.
    pub image: [usize; 2],
    /// Channels of the output.
    pub o: usize,
    /// Height and width of the output.
    pub result: [usize; 2],
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Zeros above and below, left and right.
    pub padding: [usize; 2],
}

/// Some rows of the result of one image.
#[derive(Clone, Copy)]
struct Piece {
    image: usize,
    first: usize,
    rows: usize,
}

impl Direct {
    /// Elements from one line of a copy to the next.
    fn line(&self) -> usize {
        self.image[1] + self.padding[1]
    }

    /// Elements of a channel of a copy that `rows` rows of the result need.
    fn plane(&self, rows: usize) -> usize {
        (rows + self.kernel[0] - 1) * self.line()
    }

    /// Elements of a copy, with what is read beyond it.
    fn copy(&self, rows: usize) -> usize {
        self.c * self.plane(rows) + self.kernel[1] + STEP
    }

    /// Positions that are computed for `rows` rows of the result.
    fn positions(&self, rows: usize) -> usize {
        (rows * self.line()).next_multiple_of(STEP)
    }

    /// Where a place of the kernel begins to read a channel of a copy.
    fn place(&self, tap: usize) -> usize {
        tap / self.kernel[1] * self.line() + tap % self.kernel[1]
    }

    /// Where each place of each channel's kernel begins to read a copy.
    fn offsets(&self, rows: usize) -> Vec<usize> {
        let [high, broad] = self.kernel;
        let taps = 0..self.c * high * broad;
        taps.map(|i| i / (high * broad) * self.plane(rows) + self.place(i % (high * broad)))
            .collect()
    }

    /// Copies an image (c, h, w), as far as a piece needs it; all else in `to` is zero and stays so.
    fn copy_image(&self, x: &[f32], piece: Piece, plane: usize, to: &mut [f32]) {
        let ([h, w], [above, left]) = (self.image, self.padding);
        for (x, to) in x.chunks_exact(h * w).zip(to.chunks_mut(plane)) {
            let lines = to.chunks_exact_mut(self.line());
            for (i, line) in lines.take(piece.rows + self.kernel[0] - 1).enumerate() {
                let line = &mut line[left..];
                match (piece.first + i).checked_sub(above).filter(|&y| y < h) {
                    Some(y) => line.copy_from_slice(&x[y * w..][..w]),
                    None => line.fill(0.0),
                }
            }
        }
    }

    /// Images x (b, c, h, w) and kernel w (o, c, kh, kw), plus a bias (o) and a residual of the result's shape ->
    /// (b, o, h', w').
    pub fn forward(
        &self,
        x: &[f32],
        w: &[f32],
        bias: &[f32],
        residual: Option<&[f32]>,
        b: usize,
    ) -> Vec<f32> {
        let rows = self.rows_of_a_band(BAND, b);
        let offsets = self.offsets(rows);
        // A kernel may be the beginning of a larger tensor.
        let kernel = tiles::packed(&w[..self.o * offsets.len()], self.o);
        let sums = self.o.next_multiple_of(ROWS) * self.positions(rows);
        self.by_bands(
            [b, rows, sums],
            bias,
            residual,
            || vec![0.0; self.copy(rows)],
            |copy, piece, sums| {
                self.copy_image(self.of_image(x, piece), piece, self.plane(rows), copy);
                let n = self.positions(piece.rows);
                tiles::correlate(copy, &offsets, &kernel, n, sums);
                n
            },
        )
    }

    /// Rows of the result that a task computes from so many elements.
    fn rows_of_a_band(&self, elements: usize, b: usize) -> usize {
        let share = self.result[0].div_ceil(rayon::current_num_threads().div_ceil(b));
        let rows = (elements / (self.c * self.line())).saturating_sub(self.kernel[0] - 1);
        rows.clamp(1, share)
    }

    /// The result (b, o, h', w'), bands of rows at a time: `sum` writes a piece without bias and residual to the last slice,
    /// `sums` elements at most, and returns how many positions it computed for each channel.
    fn by_bands<S>(
        &self,
        [b, rows, sums]: [usize; 3],
        bias: &[f32],
        residual: Option<&[f32]>,
        scratch: impl Fn() -> S + Sync + Send,
        sum: impl Fn(&mut S, Piece, &mut [f32]) -> usize + Sync + Send,
    ) -> Vec<f32> {
        let [high, broad] = self.result;
        let mut y = fresh(&[b, self.o, high * broad]);
        let bands = high.div_ceil(rows);
        let parts = in_bands(&mut y, self.o, high * broad, rows * broad);
        parts.into_par_iter().enumerate().for_each_init(
            || (scratch(), fresh(&[sums + STEP])),
            |(scratch, sums), (i, parts)| {
                let sums = aligned(sums);
                let first = i % bands * rows;
                let piece = Piece {
                    image: i / bands,
                    first,
                    rows: rows.min(high - first),
                };
                let n = sum(scratch, piece, sums);
                for (o, (part, &bias)) in parts.into_iter().zip(bias).enumerate() {
                    let residual = residual.map(|residual| {
                        &residual[((piece.image * self.o + o) * high + first) * broad..]
                    });
                    for (row, line) in part.chunks_exact_mut(broad).enumerate() {
                        let sums = &sums[o * n + row * self.line()..];
                        match residual {
                            Some(residual) => {
                                let both = sums.iter().zip(&residual[row * broad..]);
                                let sums = line.iter_mut().zip(both);
                                sums.for_each(|(y, (&sum, &r))| *y = sum + bias + r);
                            }
                            None => {
                                let sums = line.iter_mut().zip(sums);
                                sums.for_each(|(y, &sum)| *y = sum + bias);
                            }
                        }
                    }
                }
            },
        );
        y
    }

    /// dw (o, c, kh, kw) of images x and gradients of the result: some images at a time, one after the other, and their sums
    /// in parallel.
    pub fn kernel_gradient(&self, x: &[f32], grad: &[f32], b: usize) -> Vec<f32> {
        let rows = self.rows_of_a_sum();
        let (n, offsets) = (self.positions(rows), self.offsets(rows));
        let pieces = self.pieces(b, rows);
        let (of_x, of_g) = (self.copy(rows), self.o * n);
        let slots = (POSITIONS / n).clamp(1, pieces.len());
        let (mut xs, mut gs) = (vec![0.0; slots * of_x], vec![0.0; slots * of_g + STEP]);
        let gs = aligned(&mut gs);
        let mut dw = vec![0.0; self.o * offsets.len()];
        for pieces in pieces.chunks(slots) {
            let copies = xs.par_chunks_mut(of_x).zip(gs.par_chunks_mut(of_g));
            copies.zip(pieces).for_each(|((to, g), &piece)| {
                self.copy_image(self.of_image(x, piece), piece, self.plane(rows), to);
                self.copy_gradient(grad, piece, n, g);
            });
            let slots = Slots {
                count: pieces.len(),
                g: of_g,
                x: of_x,
            };
            dw.par_chunks_mut(GRADIENTS * offsets.len())
                .enumerate()
                .for_each(|(i, dw)| {
                    let g = &gs[i * GRADIENTS * n..];
                    tiles::products(g, &xs, &offsets, n, slots, dw);
                });
        }
        dw
    }

    /// Rows of the result whose positions a kernel's gradient is summed over at a time: bands of equal heights.
    fn rows_of_a_sum(&self) -> usize {
        let high = self.result[0];
        let bands = high.div_ceil((POSITIONS / self.line()).max(1));
        high.div_ceil(bands)
    }

    /// The results of all images in pieces of some rows.
    fn pieces(&self, b: usize, rows: usize) -> Vec<Piece> {
        let high = self.result[0];
        let of_image = |image: usize| {
            (0..high).step_by(rows).map(move |first| Piece {
                image,
                first,
                rows: rows.min(high - first),
            })
        };
        (0..b).flat_map(of_image).collect()
    }

    /// The image of a piece, of all images.
    fn of_image<'a>(&self, x: &'a [f32], piece: Piece) -> &'a [f32] {
        let image = self.c * self.image[0] * self.image[1];
        &x[piece.image * image..][..image]
    }

    /// Copies a piece of the gradients of the results into lines as those of an image's copy: (o, n), zeros after them. What is
    /// between the lines is left as it is.
    fn copy_gradient(&self, grad: &[f32], piece: Piece, n: usize, to: &mut [f32]) {
        let [high, broad] = self.result;
        let of_result = self.o * high * broad;
        let grad = &grad[piece.image * of_result..][..of_result];
        for (grad, g) in grad.chunks_exact(high * broad).zip(to.chunks_exact_mut(n)) {
            let (lines, rest) = g.split_at_mut(piece.rows * self.line());
            let grad = &grad[piece.first * broad..];
            let pairs = lines
                .chunks_exact_mut(self.line())
                .zip(grad.chunks_exact(broad));
            pairs.for_each(|(line, grad)| line[..broad].copy_from_slice(grad));
            rest.fill(0.0);
        }
    }
}

/// The elements from the beginning of one of the processor's lines on, so that vectors are whole lines; at most [`STEP`] are
/// left out.
fn aligned(x: &mut [f32]) -> &mut [f32] {
    let start = x.as_ptr().align_offset(64).min(STEP);
    &mut x[start..]
}

#[cfg(test)]
mod tests {
    use retort_engine::random::noise;
    use retort_kernels::half::Unit;
    use retort_kernels::half::windows::Rounding;

    use super::*;

    /// Output position, tap and input position of every product of a convolution, for all channels.
    fn products(d: &Direct, mut each: impl FnMut(usize, usize, usize)) {
        let ([h, w], [high, broad], [kh, kw]) = (d.image, d.result, d.kernel);
        for at in 0..high * broad {
            for tap in 0..kh * kw {
                let y = (at / broad + tap / kw).checked_sub(d.padding[0]);
                let x = (at % broad + tap % kw).checked_sub(d.padding[1]);
                if let (Some(y), Some(x)) = (y.filter(|&y| y < h), x.filter(|&x| x < w)) {
                    each(at, tap, y * w + x);
                }
            }
        }
    }

    #[test]
    fn results_and_gradients_are_those_of_float64() {
        for (b, c, o, image, kernel, padding) in [
            (3, 3, 32, [32, 32], [3, 3], [1, 1]),
            (2, 32, 3, [16, 8], [3, 3], [1, 1]),
            (1, 5, 7, [9, 11], [3, 3], [1, 1]),
            (9, 4, 12, [8, 8], [4, 4], [1, 1]),
            (1, 6, 9, [5, 70], [1, 7], [0, 3]),
            (2, 3, 17, [6, 6], [3, 3], [0, 0]),
            (2, 2, 1, [7, 5], [2, 3], [1, 2]),
            (1, 40, 4, [130, 120], [3, 3], [1, 1]),
            (19, 33, 34, [8, 8], [1, 1], [0, 0]),
        ] {
            let side = |i: usize| image[i] + 2 * padding[i] - kernel[i] + 1;
            let d = Direct {
                c,
                image,
                o,
                result: [side(0), side(1)],
                kernel,
                padding,
            };
            let (places, taps) = (image[0] * image[1], kernel[0] * kernel[1]);
            let results = d.result[0] * d.result[1];
            let (x, w) = (noise(1, 0, b * c, places), noise(2, 0, o * c, taps));
            let (bias, grad) = (noise(3, 0, 1, o), noise(4, 0, b * o, results));
            let residual = noise(5, 0, b * o, results);
            let expected = |convert: fn(&f32) -> f64| {
                let (x, w): (Vec<f64>, Vec<f64>) = (
                    x.iter().map(convert).collect(),
                    w.iter().map(convert).collect(),
                );
                let grad: Vec<f64> = grad.iter().map(convert).collect();
                let mut y: Vec<f64> = residual.iter().map(|&r| f64::from(r)).collect();
                let mut dw = vec![0.0; o * c * taps];
                for i in 0..b * o * c {
                    let (image, row, channel) = (i / (o * c), i / c % o, i % c);
                    if channel == 0 {
                        let line = &mut y[(image * o + row) * results..][..results];
                        line.iter_mut().for_each(|y| *y += f64::from(bias[row]));
                    }
                    products(&d, |at, tap, place| {
                        let x = x[(image * c + channel) * places + place];
                        let at = (image * o + row) * results + at;
                        let tap = (row * c + channel) * taps + tap;
                        y[at] += x * w[tap];
                        dw[tap] += x * grad[at];
                    });
                }
                (y, dw)
            };
            let check = |name, want: &[f64], found: Vec<f32>, bound: f64| {
                assert_eq!(want.len(), found.len());
                let most = want.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                let pairs = want.iter().zip(&found);
                let error = pairs
                    .map(|(a, &b)| (a - f64::from(b)).abs())
                    .fold(0.0, f64::max);
                assert!(
                    error < bound * most,
                    "{name}: {error:.1e} of {most:.1} at {c} to {o}, {image:?}, {kernel:?}, {padding:?}"
                );
            };
            let (y, dw) = expected(|&x| f64::from(x));
            let residual = Some(&residual[..]);
            check("results", &y, d.forward(&x, &w, &bias, residual, b), 2e-6);
            check("gradients", &dw, d.kernel_gradient(&x, &grad, b), 2e-6);
            if Unit::best() != Some(Unit::Tiles) {
                eprintln!("skipped: this processor has no tiles");
                continue;
            }
            let half = |rounding| d.forward_half(rounding, &x, &w, &bias, residual, b);
            check("results of twice rounded", &y, half(Rounding::Twice), 1e-5);
            let (y, dw) = expected(|&x| ::half::bf16::from_f32(x).to_f64());
            check("results of rounded", &y, half(Rounding::Once), 2e-6);
            let found = d.kernel_gradient_half(&x, &grad, b);
            check("gradients of rounded", &dw, found, 2e-6);
        }
    }

    #[test]
    fn an_image_alone_gives_what_it_gives_among_others() {
        let d = Direct {
            c: 8,
            image: [40, 24],
            o: 10,
            result: [40, 24],
            kernel: [3, 3],
            padding: [1, 1],
        };
        let (x, w) = (noise(1, 0, 5 * 8, 40 * 24), noise(2, 0, 10 * 8, 9));
        let all = d.forward(&x, &w, &[0.0; 10], None, 5);
        for (x, y) in x
            .chunks_exact(8 * 40 * 24)
            .zip(all.chunks_exact(10 * 40 * 24))
        {
            assert!(d.forward(x, &w, &[0.0; 10], None, 1) == y);
        }
    }

    #[test]
    fn a_kernel_may_be_the_beginning_of_a_larger_one() {
        let d = Direct {
            c: 2,
            image: [6, 5],
            o: 3,
            result: [6, 5],
            kernel: [3, 3],
            padding: [1, 1],
        };
        let (x, w) = (noise(1, 0, 2, 30), noise(2, 0, 4 * 2, 9));
        let [of_all, own] = [&w[..], &w[..3 * 2 * 9]].map(|w| d.forward(&x, w, &[0.0; 3], None, 1));
        assert!(of_all == own);
    }
}
