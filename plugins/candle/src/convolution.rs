//! Convolutions, in bf16 by the processor's tiles where it has them and the precision is enough, else in f32 by the fastest of
//! four ways, which depends only on the sizes of one image: large 3 x 3 convolutions by Winograd's tiles ([`crate::winograd`]),
//! others with stride 1 directly ([`crate::direct`]), a 1 x 1 kernel as a matrix product over the image, and the rest as matrix
//! products over unfolded images, a tile of output rows at a time, so that the unfolded tile stays in the cache. Gradients of
//! kernels never use Winograd's tiles.

use rayon::prelude::*;
use retort_engine::error::{Error, Result};
use retort_kernels::Matrix;
use retort_kernels::half::windows::Rounding;

use crate::direct::Direct;
use crate::layout::whole;
use crate::product::Product;
use crate::view::{floats, fresh, tensor, zeros};
use crate::winograd::Convolution;
use crate::{T, failed};

/// Elements of an unfolded tile: 1 MiB, the second-level cache of the target processors.
const UNFOLDED: usize = 256 * 1024;

/// Images whose contributions to the kernel's gradient one task sums. Fixed, so that the order of summation is fixed.
const BLOCK: usize = 8;

/// (b, c, h, w) with (o, c, kh, kw) -> (b, o, h', w'), plus a bias (o) and a residual of the result's shape
pub fn conv2d(
    x: &T,
    w: &T,
    bias: Option<&T>,
    residual: Option<&T>,
    stride: usize,
    padding: [usize; 2],
    rounding: Option<Rounding>,
) -> Result<T> {
    let shape = Shape::new(x, w, stride, padding, rounding)?;
    let none = vec![0.0; shape.o];
    let bias = match bias {
        Some(bias) => &whole(bias)?,
        None => &tensor(none, &[shape.o])?,
    };
    let (x, w) = (&whole(x)?, &whole(w)?);
    floats!(x, w, bias);
    let (bias, dims) = (
        &bias[..shape.o],
        [shape.b, shape.o, shape.out_h, shape.out_w],
    );
    let y = match residual {
        Some(residual) if residual.dims() != dims => {
            return Err(Error::Backend(format!(
                "conv2d: a residual {:?} of a result {dims:?}",
                residual.dims()
            )));
        }
        Some(residual) => {
            let residual = &whole(residual)?;
            floats!(residual);
            shape.forward(x, w, bias, Some(residual))
        }
        None => shape.forward(x, w, bias, None),
    };
    tensor(y, &dims)
}

/// Stride 1 over images enlarged twofold, if that is possible without materialising the enlarged image.
pub fn conv2d_upsampled(x: &T, w: &T, bias: &T, padding: [usize; 2]) -> Result<Option<T>> {
    let (b, c, h, wide) = x.dims4().map_err(failed)?;
    let shape = Shape::of([b, c, 2 * h, 2 * wide], w, 1, padding, None)?;
    let Some(tiles) = shape.winograd() else {
        return Ok(None);
    };
    let tiles = Convolution { scale: 2, ..tiles };
    let (x, w, bias) = (&whole(x)?, &whole(w)?, &whole(bias)?);
    floats!(x, w, bias);
    let y = tiles.forward(x, w, &bias[..shape.o], None, b);
    tensor(y, &[b, shape.o, shape.out_h, shape.out_w]).map(Some)
}

/// Gradients of [`conv2d`] for its input and its kernel.
pub fn conv2d_backward(
    x: &T,
    w: &T,
    grad: &T,
    stride: usize,
    padding: [usize; 2],
    rounding: Option<Rounding>,
    want: (bool, bool),
) -> Result<(Option<T>, Option<T>)> {
    let shape = Shape::new(x, w, stride, padding, rounding)?;
    if grad.dims() != [shape.b, shape.o, shape.out_h, shape.out_w] {
        return Err(Error::Backend(format!(
            "conv2d: a gradient {:?} for {} images",
            grad.dims(),
            shape.b
        )));
    }
    let (x_shape, w_shape) = (x.dims().to_vec(), w.dims().to_vec());
    let (x, w, grad) = (&whole(x)?, &whole(w)?, &whole(grad)?);
    floats!(x, w, grad);
    let dx = want
        .0
        .then(|| tensor(shape.input_gradient(w, grad), &x_shape));
    let dw = want
        .1
        .then(|| tensor(shape.kernel_gradient(x, grad), &w_shape));
    Ok((dx.transpose()?, dw.transpose()?))
}

/// Sizes of one convolution.
#[derive(Clone, Copy)]
struct Shape {
    b: usize,
    c: usize,
    h: usize,
    w: usize,
    o: usize,
    kh: usize,
    kw: usize,
    out_h: usize,
    out_w: usize,
    stride: usize,
    /// Zeros above and below, left and right.
    padding: [usize; 2],
    /// How numbers are rounded to bf16 where that is faster.
    rounding: Option<Rounding>,
}

impl Shape {
    fn new(
        x: &T,
        w: &T,
        stride: usize,
        padding: [usize; 2],
        rounding: Option<Rounding>,
    ) -> Result<Self> {
        let (b, c, h, wide) = x.dims4().map_err(failed)?;
        Self::of([b, c, h, wide], w, stride, padding, rounding)
    }

    fn of(
        x: [usize; 4],
        w: &T,
        stride: usize,
        padding: [usize; 2],
        rounding: Option<Rounding>,
    ) -> Result<Self> {
        let [b, c, h, wide] = x;
        let (o, c2, kh, kw) = w.dims4().map_err(failed)?;
        let [high, broad] = [h + 2 * padding[0], wide + 2 * padding[1]];
        if c != c2 || stride == 0 || high < kh || broad < kw {
            return Err(Error::Backend(format!(
                "conv2d: {x:?} with a kernel {:?}, stride {stride}, padding {padding:?}",
                w.dims()
            )));
        }
        Ok(Self {
            b,
            c,
            h,
            w: wide,
            o,
            kh,
            kw,
            out_h: (high - kh) / stride + 1,
            out_w: (broad - kw) / stride + 1,
            stride,
            padding,
            rounding,
        })
    }

    /// Rows of the unfolded image: one per channel and place in the kernel.
    fn deep(&self) -> usize {
        self.c * self.kh * self.kw
    }

    /// Positions of the output.
    fn plane(&self) -> usize {
        self.out_h * self.out_w
    }

    /// Whether an image is its own unfolding.
    fn flat(&self) -> bool {
        self.kh == 1 && self.kw == 1 && self.stride == 1 && self.padding == [0, 0]
    }

    /// Output rows per tile.
    fn tile(&self) -> usize {
        (UNFOLDED / (self.deep() * self.out_w)).clamp(1, self.out_h)
    }

    /// The same with Winograd's tiles, if that is faster.
    fn winograd(&self) -> Option<Convolution> {
        let tiles = Convolution {
            c: self.c,
            o: self.o,
            h: self.h,
            w: self.w,
            scale: 1,
        };
        let fits = [self.kh, self.kw] == [3, 3] && self.stride == 1 && self.padding == [1, 1];
        (fits && tiles.pays()).then_some(tiles)
    }

    /// The same without unfolding.
    fn direct(&self) -> Option<Direct> {
        self.windows().filter(|_| !self.flat())
    }

    /// The same by tiles of bf16, if that is wanted and faster.
    fn half(&self) -> Option<(Direct, Rounding)> {
        let rounding = self.rounding?;
        // Exact numbers by Winograd's tiles take no longer than numbers in two parts.
        if rounding == Rounding::Twice && self.winograd().is_some() {
            return None;
        }
        let direct = self.windows().filter(Direct::has_tiles)?;
        Some((direct, rounding))
    }

    /// The same over windows of the image itself, if it has stride 1.
    fn windows(&self) -> Option<Direct> {
        let direct = Direct {
            c: self.c,
            image: [self.h, self.w],
            o: self.o,
            result: [self.out_h, self.out_w],
            kernel: [self.kh, self.kw],
            padding: self.padding,
        };
        self.turns().then_some(direct)
    }

    /// Whether the gradient of the input is a convolution with the turned kernel.
    fn turns(&self) -> bool {
        self.stride == 1 && self.kh > self.padding[0] && self.kw > self.padding[1]
    }

    fn forward(&self, x: &[f32], w: &[f32], bias: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        if let Some((direct, rounding)) = self.half() {
            return direct.forward_half(rounding, x, w, bias, residual, self.b);
        }
        if let Some(tiles) = self.winograd() {
            return tiles.forward(x, w, bias, residual, self.b);
        }
        if let Some(direct) = self.direct() {
            return direct.forward(x, w, bias, residual, self.b);
        }
        let (deep, plane, tile) = (self.deep(), self.plane(), self.tile());
        let kernel = Matrix::rows(w, deep);
        let mut y = fresh(&[self.b, self.o, plane]);
        let image = self.c * self.h * self.w;
        let one = |unfolded: &mut Vec<f32>, b: usize, y: &mut [f32], parallel: bool| {
            let x = &x[b * image..][..image];
            for first in (0..self.out_h).step_by(tile) {
                let n = tile.min(self.out_h - first) * self.out_w;
                let columns = if self.flat() {
                    Matrix::rows(&x[first * self.out_w..], plane)
                } else {
                    self.unfold(x, first, n, unfolded);
                    Matrix::rows(unfolded, n)
                };
                Product {
                    m: self.o,
                    k: deep,
                    n,
                    grow: false,
                    parallel,
                }
                .run(&mut y[first * self.out_w..], plane, kernel, columns);
                // While it is in the cache.
                for (o, (line, &bias)) in y.chunks_exact_mut(plane).zip(bias).enumerate() {
                    let at = first * self.out_w;
                    let line = &mut line[at..][..n];
                    match residual {
                        Some(residual) => {
                            let residual = &residual[(b * self.o + o) * plane + at..];
                            line.iter_mut()
                                .zip(residual)
                                .for_each(|(y, &r)| *y += bias + r);
                        }
                        None => line.iter_mut().for_each(|y| *y += bias),
                    }
                }
            }
        };
        if self.b >= rayon::current_num_threads() {
            y.par_chunks_mut(self.o * plane)
                .enumerate()
                .for_each_init(Vec::new, |unfolded, (b, y)| one(unfolded, b, y, false));
        } else {
            let mut unfolded = Vec::new();
            for (b, y) in y.chunks_mut(self.o * plane).enumerate() {
                one(&mut unfolded, b, y, true);
            }
        }
        y
    }

    /// dx: for stride 1 the correlation of the gradient with the turned kernel, else the adjoint of unfolding.
    fn input_gradient(&self, w: &[f32], grad: &[f32]) -> Vec<f32> {
        let (kh, kw) = (self.kh, self.kw);
        if self.turns() {
            let turned = self.turn(w);
            let back = Self {
                c: self.o,
                h: self.out_h,
                w: self.out_w,
                o: self.c,
                out_h: self.h,
                out_w: self.w,
                padding: [kh - 1 - self.padding[0], kw - 1 - self.padding[1]],
                ..*self
            };
            return back.forward(grad, &turned, &vec![0.0; self.c], None);
        }
        let (deep, plane, tile) = (self.deep(), self.plane(), self.tile());
        let kernel = Matrix::rows(w, deep).turned();
        let image = self.c * self.h * self.w;
        let mut dx = zeros(&[self.b, image]);
        dx.par_chunks_mut(image).enumerate().for_each_init(
            Vec::new,
            |unfolded: &mut Vec<f32>, (b, dx)| {
                let g = &grad[b * self.o * plane..][..self.o * plane];
                for first in (0..self.out_h).step_by(tile) {
                    let n = tile.min(self.out_h - first) * self.out_w;
                    unfolded.resize(deep * n, 0.0);
                    Product {
                        m: deep,
                        k: self.o,
                        n,
                        grow: false,
                        parallel: false,
                    }
                    .run(
                        unfolded,
                        n,
                        kernel,
                        Matrix::rows(&g[first * self.out_w..], plane),
                    );
                    self.fold(unfolded, first, n, dx);
                }
            },
        );
        dx
    }

    /// dw = sum over images of g times the unfolded image transposed.
    fn kernel_gradient(&self, x: &[f32], grad: &[f32]) -> Vec<f32> {
        if let Some((direct, _)) = self.half() {
            return direct.kernel_gradient_half(x, grad, self.b);
        }
        if let Some(direct) = self.direct() {
            return direct.kernel_gradient(x, grad, self.b);
        }
        let (deep, plane, tile) = (self.deep(), self.plane(), self.tile());
        let image = self.c * self.h * self.w;
        let size = self.o * deep;
        let mut shares = vec![0.0; self.b.div_ceil(BLOCK) * size];
        shares.par_chunks_mut(size).enumerate().for_each_init(
            Vec::new,
            |unfolded: &mut Vec<f32>, (block, dw)| {
                for b in block * BLOCK..((block + 1) * BLOCK).min(self.b) {
                    let x = &x[b * image..][..image];
                    let g = &grad[b * self.o * plane..][..self.o * plane];
                    for first in (0..self.out_h).step_by(tile) {
                        let n = tile.min(self.out_h - first) * self.out_w;
                        let columns = if self.flat() {
                            Matrix::rows(&x[first * self.out_w..], plane)
                        } else {
                            self.unfold(x, first, n, unfolded);
                            Matrix::rows(unfolded, n)
                        };
                        Product {
                            m: self.o,
                            k: n,
                            n: deep,
                            grow: true,
                            parallel: false,
                        }
                        .run(
                            dw,
                            deep,
                            Matrix::rows(&g[first * self.out_w..], plane),
                            columns.turned(),
                        );
                    }
                }
            },
        );
        let mut blocks = shares.chunks_exact(size);
        let mut dw = blocks.next().map(<[f32]>::to_vec).unwrap_or_default();
        for share in blocks {
            dw.iter_mut().zip(share).for_each(|(dw, &s)| *dw += s);
        }
        dw
    }

    /// The kernel (o, c, kh, kw) as (c, o, kh, kw), each plane rotated by 180 degrees.
    fn turn(&self, w: &[f32]) -> Vec<f32> {
        let area = self.kh * self.kw;
        let mut turned = vec![0.0; w.len().min(self.o * self.c * area)];
        let fill = |(c, turned): (usize, &mut [f32])| {
            for (o, to) in turned.chunks_exact_mut(area).enumerate() {
                let from = &w[(o * self.c + c) * area..][..area];
                to.iter_mut()
                    .zip(from.iter().rev())
                    .for_each(|(t, &f)| *t = f);
            }
        };
        let planes = turned.par_chunks_exact_mut(self.o * area);
        planes.enumerate().for_each(fill);
        turned
    }

    /// The n output positions from row `first` on as columns: (c kh kw, n).
    fn unfold(&self, x: &[f32], first: usize, n: usize, to: &mut Vec<f32>) {
        to.resize(self.deep() * n, 0.0);
        for (row, to) in to.chunks_exact_mut(n).enumerate() {
            let (c, dy, dx) = self.place(row);
            let plane = &x[c * self.h * self.w..][..self.h * self.w];
            for (i, to) in to.chunks_exact_mut(self.out_w).enumerate() {
                let Some(y) = ((first + i) * self.stride + dy)
                    .checked_sub(self.padding[0])
                    .filter(|&y| y < self.h)
                else {
                    to.fill(0.0);
                    continue;
                };
                let line = &plane[y * self.w..][..self.w];
                let (low, high) = self.inside(dx);
                to[..low].fill(0.0);
                to[high..].fill(0.0);
                if low < high {
                    let from = low * self.stride + dx - self.padding[1];
                    if self.stride == 1 {
                        to[low..high].copy_from_slice(&line[from..][..high - low]);
                    } else {
                        let line = line[from..].iter().step_by(self.stride);
                        to[low..high]
                            .iter_mut()
                            .zip(line)
                            .for_each(|(t, &f)| *t = f);
                    }
                }
            }
        }
    }

    /// Adjoint of [`Shape::unfold`].
    fn fold(&self, from: &[f32], first: usize, n: usize, x: &mut [f32]) {
        for (row, from) in from.chunks_exact(n).enumerate() {
            let (c, dy, dx) = self.place(row);
            let plane = &mut x[c * self.h * self.w..][..self.h * self.w];
            for (i, from) in from.chunks_exact(self.out_w).enumerate() {
                let Some(y) = ((first + i) * self.stride + dy)
                    .checked_sub(self.padding[0])
                    .filter(|&y| y < self.h)
                else {
                    continue;
                };
                let (low, high) = self.inside(dx);
                if low < high {
                    let start = y * self.w + low * self.stride + dx - self.padding[1];
                    let line = plane[start..].iter_mut().step_by(self.stride);
                    line.zip(&from[low..high]).for_each(|(x, &f)| *x += f);
                }
            }
        }
    }

    /// Channel and place in the kernel of a row of the unfolded image.
    fn place(&self, row: usize) -> (usize, usize, usize) {
        let area = self.kh * self.kw;
        (row / area, row % area / self.kw, row % self.kw)
    }

    /// The output columns low..high whose input column lies inside the image.
    fn inside(&self, dx: usize) -> (usize, usize) {
        let low = self.padding[1].saturating_sub(dx).div_ceil(self.stride);
        let high = (self.w + self.padding[1])
            .saturating_sub(dx)
            .div_ceil(self.stride);
        let high = high.min(self.out_w);
        (low.min(high), high)
    }
}
