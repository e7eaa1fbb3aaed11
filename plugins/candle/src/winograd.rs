//! Three by three convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) (Lavin and Gray 2015, arXiv
//! 1509.09308). A tile of 4 x 4 results comes from 6 x 6 elements around it,
//!
//! ```text
//! Y = A^T ( (G g G^T) . (B^T d B) ) A
//! ```
//!
//! and the product in the middle, over all channels, is a matrix product for each of the 36 positions. Its rounding errors
//! are a few times those of the direct sum; the test compares both with float64. It is used for maps that are large enough to
//! amortise the transformed kernel; the choice depends only on the sizes of one image.

use rayon::prelude::*;

use crate::product::Product;
use crate::rows::in_bands;
use crate::view::fresh;
use retort_kernels::Matrix;
use retort_kernels::wide::{self, Wide};

/// Places of a transformed tile.
const PLACES: usize = 36;

/// Tiles of a task, about: their transforms stay in the cache, and the products are large enough.
const TILES: usize = 64;

/// A convolution with a 3 x 3 kernel, stride 1 and one row or column of zeros all around.
#[derive(Clone, Copy)]
pub struct Convolution {
    /// Channels of the input.
    pub c: usize,
    /// Channels of the output.
    pub o: usize,
    /// Height of both.
    pub h: usize,
    /// Width of both.
    pub w: usize,
    /// 2 if the input is given at half the height and width, each pixel standing for a block of 2 x 2; else 1.
    pub scale: usize,
}

impl Convolution {
    /// Whether this is faster than direct convolution.
    pub fn pays(&self) -> bool {
        self.h * self.w >= 1024 && self.w >= 8 && self.c >= 48 && self.o >= 48
    }

    /// Images x (b, c, h, w) and kernel w (o, c, 3, 3), plus a bias (o) and a residual (b, o, h, w) -> (b, o, h, w).
    pub fn forward(
        &self,
        x: &[f32],
        w: &[f32],
        bias: &[f32],
        residual: Option<&[f32]>,
        b: usize,
    ) -> Vec<f32> {
        let Self {
            c,
            o,
            h,
            w: width,
            scale,
        } = *self;
        let given = c * (h / scale) * (width / scale);
        let kernel = self.kernel(w);
        let (high, broad) = (h.div_ceil(4), width.div_ceil(4));
        // Rows of tiles are padded to whole vectors.
        let row = broad.next_multiple_of(8);
        let rows = (TILES / row).clamp(1, high);
        let mut y = fresh(&[b, o, h * width]);
        let bands = high.div_ceil(rows);
        let pieces = in_bands(&mut y, o, h * width, 4 * rows * width);
        pieces.into_par_iter().enumerate().for_each_init(
            || (Vec::new(), Vec::new(), Vec::new()),
            |(lines, from, to), (i, mut pieces)| {
                let (image, first) = (i / bands, i % bands * rows);
                let n = rows.min(high - first) * row;
                from.resize(PLACES * c * n, 0.0);
                to.resize(PLACES * o * n, 0.0);
                let x = &x[image * given..][..given];
                for (channel, plane) in x.chunks_exact(given / c).enumerate() {
                    self.spread(
                        plane,
                        first,
                        row,
                        n,
                        |place| (place * c + channel) * n,
                        lines,
                        from,
                    );
                }
                for place in 0..PLACES {
                    // With an enlarged input the third component of a transformed tile is zero.
                    if scale == 2 && (place / 6 == 2 || place % 6 == 2) {
                        to[place * o * n..][..o * n].fill(0.0);
                        continue;
                    }
                    let kernel = Matrix {
                        data: &kernel[place * c..],
                        row: PLACES * c,
                        column: 1,
                    };
                    let columns = Matrix::rows(&from[place * c * n..][..c * n], n);
                    let product = Product {
                        m: o,
                        k: c,
                        n,
                        grow: false,
                        parallel: false,
                    };
                    product.run(&mut to[place * o * n..][..o * n], n, kernel, columns);
                }
                for (channel, (piece, &bias)) in pieces.iter_mut().zip(bias).enumerate() {
                    let at = |place| (place * o + channel) * n;
                    let start = (image * o + channel) * h * width + 4 * first * width;
                    let residual = residual.map(|r| &r[start..][..piece.len()]);
                    self.gather(to, row, n, at, bias, residual, piece);
                }
            },
        );
        y
    }

    /// G g G^T of every kernel: (o, 36, c).
    fn kernel(&self, w: &[f32]) -> Vec<f32> {
        let c = self.c;
        let mut all = fresh(&[self.o, PLACES, c]);
        all.par_chunks_mut(PLACES * c)
            .zip(w.par_chunks_exact(9 * c))
            .for_each(|(all, w)| {
                for (channel, g) in w.as_chunks::<9>().0.iter().enumerate() {
                    // Columns first: (6, 3), then rows: (6, 6).
                    let mut half = [[0.0f32; 3]; 6];
                    for x in 0..3 {
                        let column = kernel_part([g[x], g[3 + x], g[6 + x]]);
                        (0..6).for_each(|y| half[y][x] = column[y]);
                    }
                    for (y, half) in half.into_iter().enumerate() {
                        for (x, v) in kernel_part(half).into_iter().enumerate() {
                            all[(6 * y + x) * c + channel] = v;
                        }
                    }
                }
            });
        all
    }

    /// B^T d B of the tiles of some rows of a plane; `at` gives the start of the tiles of a position.
    #[expect(clippy::too_many_arguments, reason = "one pass over them all")]
    fn spread(
        &self,
        plane: &[f32],
        first: usize,
        row: usize,
        n: usize,
        at: impl Fn(usize) -> usize,
        lines: &mut Vec<f32>,
        to: &mut [f32],
    ) {
        let width = self.w;
        // Six lines, each with a zero before it and zeros behind.
        let long = 4 * row + 4;
        lines.clear();
        lines.resize(6 * long, 0.0);
        for band in 0..n / row {
            let top = 4 * (first + band);
            for (r, line) in lines.chunks_exact_mut(long).enumerate() {
                let line = &mut line[1..=width];
                match (top + r).checked_sub(1).filter(|&y| y < self.h) {
                    Some(y) if self.scale == 2 => {
                        let from = &plane[y / 2 * (width / 2)..];
                        let pairs = line.as_chunks_mut::<2>().0.iter_mut().zip(from);
                        pairs.for_each(|(pair, &pixel)| *pair = [pixel; 2]);
                    }
                    Some(y) => line.copy_from_slice(&plane[y * width..][..width]),
                    None => line.fill(0.0),
                }
            }
            for j in 0..row / 8 {
                let rows: [[Wide; 6]; 6] = std::array::from_fn(|r| {
                    let line = &lines[r * long + 32 * j..][..36];
                    let tiles =
                        |from: usize| wide::apart(line[from..].first_chunk().expect("eight tiles"));
                    let ([a, b, c, d], [e, f, ..]) = (tiles(0), tiles(4));
                    tile_part([a, b, c, d, e, f])
                });
                for e in 0..6 {
                    for (r, v) in tile_part(rows.map(|row| row[e])).into_iter().enumerate() {
                        let to = &mut to[at(6 * r + e) + band * row + 8 * j..][..8];
                        to.copy_from_slice(&wide::store(v));
                    }
                }
            }
        }
    }

    /// A^T m A of tiles, plus the bias and the residual of the same places, into rows of a plane.
    #[expect(clippy::too_many_arguments, reason = "one pass over them all")]
    fn gather(
        &self,
        from: &[f32],
        row: usize,
        n: usize,
        at: impl Fn(usize) -> usize,
        bias: f32,
        residual: Option<&[f32]>,
        to: &mut [f32],
    ) {
        let (width, height) = (self.w, to.len() / self.w);
        let bias = wide::splat(bias);
        for band in 0..n / row {
            for j in 0..row / 8 {
                if 32 * j >= width {
                    break;
                }
                let place = |p: usize| -> Wide {
                    let from = &from[at(p) + band * row + 8 * j..];
                    wide::load(from.first_chunk().expect("whole vectors"))
                };
                let columns: [[Wide; 4]; 6] =
                    std::array::from_fn(|e| result_part(std::array::from_fn(|r| place(6 * r + e))));
                let half: [[Wide; 6]; 4] = std::array::from_fn(|y| columns.map(|c| c[y]));
                for (y, half) in half.into_iter().enumerate().take(height - 4 * band) {
                    let sums = result_part(half).map(|y| axpy(1.0, y, bias));
                    let sums = wide::interleaved(sums);
                    let (start, len) = ((4 * band + y) * width + 32 * j, 32.min(width - 32 * j));
                    let line = &mut to[start..][..len];
                    match residual {
                        Some(residual) => {
                            let both = line.iter_mut().zip(&residual[start..][..len]);
                            both.zip(sums).for_each(|((y, &r), sum)| *y = sum + r);
                        }
                        None => line.copy_from_slice(&sums[..len]),
                    }
                }
            }
        }
    }
}

/// G g
fn kernel_part([a, b, c]: [f32; 3]) -> [f32; 6] {
    let even = (a + c) / 6.0;
    let odd = b / 6.0;
    let wide_even = a / 24.0 + c / 6.0;
    let wide_odd = b / 12.0;
    [
        a / 4.0,
        -even - odd,
        odd - even,
        wide_even + wide_odd,
        wide_even - wide_odd,
        c,
    ]
}

/// a x + y
#[inline(always)]
fn axpy(a: f32, x: Wide, y: Wide) -> Wide {
    wide::mul_add(wide::splat(a), x, y)
}

/// B^T d
#[inline(always)]
fn tile_part(d: [Wide; 6]) -> [Wide; 6] {
    let (p, q) = (axpy(-4.0, d[2], d[4]), axpy(-4.0, d[1], d[3]));
    let (r, s) = (axpy(-1.0, d[2], d[4]), axpy(-1.0, d[1], d[3]));
    [
        axpy(4.0, d[0], axpy(-5.0, d[2], d[4])),
        axpy(1.0, q, p),
        axpy(-1.0, q, p),
        axpy(2.0, s, r),
        axpy(-2.0, s, r),
        axpy(4.0, d[1], axpy(-5.0, d[3], d[5])),
    ]
}

/// A^T m
#[inline(always)]
fn result_part(m: [Wide; 6]) -> [Wide; 4] {
    let (p, q) = (axpy(1.0, m[1], m[2]), axpy(-1.0, m[2], m[1]));
    let (r, s) = (axpy(1.0, m[3], m[4]), axpy(-1.0, m[4], m[3]));
    [
        axpy(1.0, m[0], axpy(1.0, p, r)),
        axpy(2.0, s, q),
        axpy(4.0, r, p),
        axpy(8.0, s, axpy(1.0, q, m[5])),
    ]
}

#[cfg(test)]
mod tests {
    use retort_engine::random::noise;

    use super::*;

    #[test]
    fn results_are_those_of_float64() {
        for (b, c, o, h, w) in [
            (2, 32, 48, 32, 32),
            (1, 33, 35, 30, 37),
            (1, 40, 32, 130, 8),
            (1, 256, 32, 32, 32),
            (3, 32, 32, 33, 35),
        ] {
            let (x, kernel) = (noise(1, 0, b * c, h * w), noise(2, 0, o * c, 9));
            let bias = noise(3, 0, 1, o);
            let residual = noise(4, 0, b * o, h * w);
            let tiles = Convolution {
                c,
                o,
                h,
                w,
                scale: 1,
            };
            let found = tiles.forward(&x, &kernel, &bias, Some(&residual), b);
            let bare = tiles.forward(&x, &kernel, &bias, None, b);
            let sums = bare.iter().zip(&residual).map(|(y, r)| y + r);
            assert!(sums.eq(found.iter().copied()), "a residual is added last");
            let found = bare;
            if h % 2 == 0 && w % 2 == 0 {
                let small = noise(5, 0, b * c, h * w / 4);
                let pixel =
                    |i: usize| (i / (h * w) * (h / 2) + i / w % h / 2) * (w / 2) + i % w / 2;
                let large: Vec<f32> = (0..b * c * h * w).map(|i| small[pixel(i)]).collect();
                let whole = tiles.forward(&large, &kernel, &bias, None, b);
                let half = Convolution { scale: 2, ..tiles };
                let half = half.forward(&small, &kernel, &bias, None, b);
                assert!(half == whole, "images twice as high and wide");
            }
            let (mut most, mut error, mut direct) = (0.0f64, 0.0f64, 0.0f64);
            for i in (0..b * o * h * w).step_by(17) {
                let (image, channel, y, column) =
                    (i / (o * h * w), i / (h * w) % o, i / w % h, i % w);
                let (mut sum, mut float) = (f64::from(bias[channel]), bias[channel]);
                for k in 0..9 * c {
                    let (from, dy, dx) = (k / 9, k % 9 / 3, k % 3);
                    if (1..=h).contains(&(y + dy)) && (1..=w).contains(&(column + dx)) {
                        let at = ((image * c + from) * h + y + dy - 1) * w + column + dx - 1;
                        let weight = kernel[channel * c * 9 + k];
                        sum += f64::from(x[at]) * f64::from(weight);
                        float = x[at].mul_add(weight, float);
                    }
                }
                most = most.max(sum.abs());
                error = error.max((sum - f64::from(found[i])).abs());
                direct = direct.max((sum - f64::from(float)).abs());
            }
            assert!(
                error < 1e-5 * most && error < 10.0 * direct,
                "{error:.1e}, and {direct:.1e} in a direct sum, of {most:.1} at {c} to {o}, {h} x {w}"
            );
        }
    }
}
