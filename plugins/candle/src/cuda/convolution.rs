//! Convolutions as products: the pixels under each window are laid out as a matrix, a few images at a time.
//!
//! With `dtype: bf16` operands are more precise than bf16 here: a decoder is some forty convolutions deep, and in bf16 its
//! images would be off by a twentieth of their range. Windows and kernels become fp16, whose significand is as long as TF32's
//! in half the bytes; reading and writing windows is most of a convolution's cost. Values beyond fp16's range are clamped
//! (65504), and a weight below 6e-5 is off by up to 3e-8. All gradients may be that small, so the backward pass uses TF32. So
//! does a kernel of one pixel, whose windows are the images themselves.

use candle_core::DType;
use retort_engine::error::{Error, Result};

use crate::cuda::kernels;
use crate::cuda::launch::{blocks, launch};
use crate::cuda::product::{F32Products, product_into};
use crate::cuda::structures::PoolWindow;
use crate::cuda::sums::fill;
use crate::cuda::tensor::{Raw, Tensor, convert, device, fresh, pointer};
use crate::failed;

/// Maximum elements of the window matrix in memory at once.
const UNFOLDED: usize = 1 << 28;

/// The sizes of one convolution.
struct Sizes {
    images: usize,
    /// Channels times pixels of a window.
    window: usize,
    slide: PoolWindow,
    /// Whether windows are single pixels, so that the images are the window matrix.
    pixels: bool,
    /// Whether windows of 3 x 3 keep the size of the image.
    same: bool,
    /// Images at a time.
    some: usize,
}

impl Sizes {
    fn new(x: &Raw, w: &Raw, stride: usize, padding: [usize; 2]) -> Result<Self> {
        Self::scaled(x, w, stride, padding, 1)
    }

    /// The same for images that are first enlarged `scale` times in both directions.
    fn scaled(x: &Raw, w: &Raw, stride: usize, padding: [usize; 2], scale: usize) -> Result<Self> {
        let (images, channels, high, wide) = x.dims4().map_err(failed)?;
        let (_, input, kh, kw) = w.dims4().map_err(failed)?;
        if channels != input || stride == 0 {
            return Err(Error::Backend(format!(
                "convolution of {:?} with {:?}",
                x.dims(),
                w.dims()
            )));
        }
        let slide = PoolWindow::new([high, wide].map(|n| scale * n), [kh, kw], stride, padding);
        let slide = if scale == 2 { slide.halved() } else { slide };
        let [oh, ow] = slide.windows();
        let window = channels * kh * kw;
        Ok(Self {
            images,
            window,
            slide,
            pixels: kh * kw * stride * scale == 1 && padding == [0, 0],
            same: [kh, kw, stride] == [3, 3, 1] && padding == [1, 1],
            some: (UNFOLDED / (window * oh * ow).max(1)).clamp(1, images.max(1)),
        })
    }

    fn area(&self) -> usize {
        self.slide.windows().iter().product()
    }

    /// Parts of the images: first and how many.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.images)
            .step_by(self.some)
            .map(|first| (first, self.some.min(self.images - first)))
    }

    /// Windows of row-major images (b, c, h, w) in f32 or fp16: (b, c kh kw, windows).
    fn unfold(&self, x: &Raw, dtype: DType) -> Result<Raw> {
        let b = x.dims()[0];
        let shape = [b, self.window, self.area()];
        if self.pixels {
            return x.reshape(&shape[..]).map_err(failed);
        }
        let device = device(x)?;
        let to = fresh(&device, &shape, dtype)?;
        let (all, row, from) = (to.elem_count(), self.slide.windows()[1], pointer(x)?);
        let (kernel, n) = match dtype {
            DType::F16 if row % 8 == 0 && self.same && from.is_multiple_of(16) => {
                (kernels::unfold_3x3_f16, all / 72)
            }
            DType::F16 if row % 8 == 0 => (kernels::unfold_eight_f16, all / 8),
            DType::F16 => (kernels::unfold_one_f16, all),
            _ if row % 4 == 0 => (kernels::unfold_four_f32, all / 4),
            _ => (kernels::unfold_one_f32, all),
        };
        launch(
            &device,
            kernel,
            blocks(n)?,
            0,
            (n as u32, self.slide, from, pointer(&to)?),
        )?;
        Ok(to)
    }
}

/// The precision of f32 operands in a convolution of images.
fn rounding(x: &Tensor) -> F32Products {
    match x.half {
        true => F32Products::Tf32,
        false => F32Products::Exact,
    }
}

/// (b, c, h, w) with (o, c, kh, kw) -> (b, o, h', w').
pub fn conv2d(x: &Tensor, w: &Tensor, stride: usize, padding: [usize; 2]) -> Result<Raw> {
    convolved(x, w, &Sizes::new(&x.raw, &w.raw, stride, padding)?)
}

/// Stride 1 over images enlarged twofold; the enlarged images are never in memory.
pub fn conv2d_upsampled(x: &Tensor, w: &Tensor, padding: [usize; 2]) -> Result<Raw> {
    convolved(x, w, &Sizes::scaled(&x.raw, &w.raw, 1, padding, 2)?)
}

fn convolved(x: &Tensor, w: &Tensor, sizes: &Sizes) -> Result<Raw> {
    let (images, o) = (x.single()?, w.raw.dims()[0]);
    let [oh, ow] = sizes.slide.windows();
    let dtype = match x.half && !sizes.pixels {
        true => DType::F16,
        false => DType::F32,
    };
    let kernel = convert(&w.single()?, dtype)?;
    let kernel = kernel.reshape((o, sizes.window)).map_err(failed)?;
    let to = fresh(&device(&images)?, &[sizes.images, o, oh * ow], DType::F32)?;
    if to.elem_count() > 0 {
        for (first, count) in sizes.parts() {
            let part = |x: &Raw| x.narrow(0, first, count).map_err(failed);
            let windows = sizes.unfold(&part(&images)?, dtype)?;
            let to = part(&to)?;
            product_into(&kernel, &windows, false, false, &to, 0.0, rounding(x))?;
        }
    }
    to.reshape((sizes.images, o, oh, ow)).map_err(failed)
}

/// Adds a bias (o) and, where there is one, a residual of the same shape to row-major images (b, o, h, w).
pub fn add_(y: &Raw, bias: &Tensor, residual: Option<&Tensor>) -> Result<()> {
    let (_, o, h, w) = y.dims4().map_err(failed)?;
    let (bias, residual) = (bias.single()?, residual.map(Tensor::single).transpose()?);
    let fits = |residual: &Raw| residual.dims() == y.dims();
    if bias.elem_count() != o || !residual.as_ref().is_none_or(fits) {
        return Err(Error::Backend(format!(
            "convolution: a bias {:?} and a residual {:?} to add to {:?}",
            bias.dims(),
            residual.as_ref().map(|x| x.dims()),
            y.dims()
        )));
    }
    let start = residual.as_ref().map_or(Ok(0), pointer)?;
    let (kernel, n) = match h * w % 4 == 0 && start.is_multiple_of(16) {
        true => (kernels::plus_four, y.elem_count() / 4),
        false => (kernels::plus_one, y.elem_count()),
    };
    launch(
        &device(y)?,
        kernel,
        blocks(n)?,
        0,
        (
            n as u32,
            (h * w) as u32,
            o as u32,
            pointer(&bias)?,
            start,
            pointer(y)?,
        ),
    )
}

/// Gradients for the images and for the kernel.
pub fn conv2d_backward(
    x: &Tensor,
    w: &Tensor,
    grad: &Tensor,
    stride: usize,
    padding: [usize; 2],
    want: (bool, bool),
) -> Result<(Option<Raw>, Option<Raw>)> {
    let (images, sizes) = (x.single()?, Sizes::new(&x.raw, &w.raw, stride, padding)?);
    let o = w.raw.dims()[0];
    let g = grad.single()?.reshape((sizes.images, o, sizes.area()));
    let g = g.map_err(failed)?;
    let kernel = w.single()?.reshape((o, sizes.window)).map_err(failed)?;
    let device = device(&images)?;
    let dx = want.0.then(|| fresh(&device, images.dims(), DType::F32));
    let dx = dx.transpose()?;
    let dw = want.1.then(|| {
        let dw = fresh(&device, &[o, sizes.window], DType::F32)?;
        fill(&dw, 0.0)?;
        Ok::<_, Error>(dw)
    });
    let dw = dw.transpose()?;
    for (first, count) in sizes.parts() {
        let part = |x: &Raw| x.narrow(0, first, count).map_err(failed);
        let g = part(&g)?;
        if let Some(dx) = &dx {
            let windows = fresh(&device, &[count, sizes.window, sizes.area()], DType::F32)?;
            product_into(&kernel, &g, true, false, &windows, 0.0, rounding(x))?;
            let to = part(dx)?;
            let n = to.elem_count();
            launch(
                &device,
                kernels::fold,
                blocks(n)?,
                0,
                (n as u32, sizes.slide, pointer(&windows)?, pointer(&to)?),
            )?;
        }
        if let Some(dw) = &dw {
            let windows = sizes.unfold(&part(&images)?, DType::F32)?;
            for image in 0..count {
                let one = |x: &Raw| x.get(image).map_err(failed);
                let (g, windows) = (one(&g)?, one(&windows)?);
                product_into(&g, &windows, false, true, dw, 1.0, rounding(x))?;
            }
        }
    }
    let dw = dw.map(|dw| dw.reshape(w.raw.shape()).map_err(failed));
    Ok((dx, dw.transpose()?))
}
