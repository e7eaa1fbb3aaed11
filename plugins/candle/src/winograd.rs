//! Three by three convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3) (Lavin and Gray 2015, arXiv
//! 1509.09308). A tile of 4 x 4 results comes from 6 x 6 elements around it,
//!
//! ```text
//! Y = A^T ( (G g G^T) . (B^T d B) ) A
//! ```
//!
//! and the product in the middle, over all channels, is a matrix product for each of the 36 places. Its rounding errors
//! are some times those of the direct sum: the test has both beside float64. For maps large enough that transforming the
//! kernel is soon paid for; the choice depends on nothing but the sizes of one image.

use rayon::prelude::*;

use crate::product::{Matrix, Product};
use crate::view::fresh;
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
}

impl Convolution {
    /// Whether this is faster than the direct way.
    pub fn pays(&self) -> bool {
        self.h * self.w >= 1024 && self.w >= 8 && self.c >= 32 && self.o >= 32
    }

    /// Images x (b, c, h, w) and kernel w (o, c, 3, 3), plus a bias (o) -> (b, o, h, w).
    pub fn forward(&self, x: &[f32], w: &[f32], bias: &[f32], b: usize) -> Vec<f32> {
        let Self { c, o, h, w: width } = *self;
        let kernel = self.kernel(w);
        let (high, broad) = (h.div_ceil(4), width.div_ceil(4));
        // Rows of tiles are padded to whole vectors.
        let row = broad.next_multiple_of(8);
        let rows = (TILES / row).clamp(1, high);
        let mut y = fresh(&[b, o, h * width]);
        // Bands of rows of one image: what a task writes lies in pieces, one per channel.
        let bands = high.div_ceil(rows);
        let mut pieces: Vec<Vec<&mut [f32]>> = (0..b * bands).map(|_| Vec::new()).collect();
        for (i, plane) in y.chunks_exact_mut(h * width).enumerate() {
            for (band, piece) in plane.chunks_mut(4 * rows * width).enumerate() {
                pieces[i / o * bands + band].push(piece);
            }
        }
        pieces.into_par_iter().enumerate().for_each_init(
            || (Vec::new(), Vec::new()),
            |(from, to), (i, mut pieces)| {
                let (image, first) = (i / bands, i % bands * rows);
                let n = rows.min(high - first) * row;
                from.resize(PLACES * c * n, 0.0);
                to.resize(PLACES * o * n, 0.0);
                let x = &x[image * c * h * width..][..c * h * width];
                for (channel, plane) in x.chunks_exact(h * width).enumerate() {
                    self.spread(
                        plane,
                        first,
                        row,
                        n,
                        |place| (place * c + channel) * n,
                        from,
                    );
                }
                for place in 0..PLACES {
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
                    self.gather(to, row, n, |place| (place * o + channel) * n, bias, piece);
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

    /// B^T d B of the tiles of some rows of a plane; `at` says where the tiles of a place begin.
    fn spread(
        &self,
        plane: &[f32],
        first: usize,
        row: usize,
        n: usize,
        at: impl Fn(usize) -> usize,
        to: &mut [f32],
    ) {
        let width = self.w;
        // A line with a zero before it and zeros behind, and its elements by their column in a tile.
        let mut line = vec![0.0f32; 4 * row + 2];
        let mut columns = vec![0.0f32; 6 * row];
        let mut half = vec![[0.0f32; 8]; 6 * 6 * row / 8];
        for band in 0..n / row {
            let top = 4 * (first + band);
            for r in 0..6 {
                line.fill(0.0);
                if let Some(y) = (top + r).checked_sub(1).filter(|&y| y < self.h) {
                    line[1..=width].copy_from_slice(&plane[y * width..][..width]);
                }
                for (e, column) in columns.chunks_exact_mut(row).enumerate() {
                    let from = line[e..].iter().step_by(4);
                    column
                        .iter_mut()
                        .zip(from)
                        .for_each(|(to, &from)| *to = from);
                }
                let columns = columns.as_chunks::<8>().0;
                for j in 0..row / 8 {
                    let d = std::array::from_fn(|e| wide::load(&columns[e * row / 8 + j]));
                    for (e, v) in tile_part(d).into_iter().enumerate() {
                        half[(r * 6 + e) * row / 8 + j] = wide::store(v);
                    }
                }
            }
            for e in 0..6 {
                for j in 0..row / 8 {
                    let d = std::array::from_fn(|r| wide::load(&half[(r * 6 + e) * row / 8 + j]));
                    for (r, v) in tile_part(d).into_iter().enumerate() {
                        let to = &mut to[at(6 * r + e) + band * row + 8 * j..][..8];
                        to.copy_from_slice(&wide::store(v));
                    }
                }
            }
        }
    }

    /// A^T m A of tiles, plus the bias, into rows of a plane.
    fn gather(
        &self,
        from: &[f32],
        row: usize,
        n: usize,
        at: impl Fn(usize) -> usize,
        bias: f32,
        to: &mut [f32],
    ) {
        let (width, height) = (self.w, to.len() / self.w);
        let bias = wide::splat(bias);
        for band in 0..n / row {
            for j in 0..row / 8 {
                let place = |p: usize| -> Wide {
                    let from = &from[at(p) + band * row + 8 * j..];
                    wide::load(from.first_chunk().expect("whole vectors"))
                };
                let columns: [[Wide; 4]; 6] =
                    std::array::from_fn(|e| result_part(std::array::from_fn(|r| place(6 * r + e))));
                let half: [[Wide; 6]; 4] = std::array::from_fn(|y| columns.map(|c| c[y]));
                for (y, half) in half.into_iter().enumerate().take(height - 4 * band) {
                    let out = result_part(half).map(|y| wide::store(axpy(1.0, y, bias)));
                    let line = &mut to[(4 * band + y) * width..][..width];
                    let Some(line) = line.get_mut(32 * j..) else {
                        continue;
                    };
                    for (t, tile) in line.chunks_mut(4).take(8).enumerate() {
                        for (x, y) in tile.iter_mut().enumerate() {
                            *y = out[x][t];
                        }
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
            let found = Convolution { c, o, h, w }.forward(&x, &kernel, &bias, b);
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
