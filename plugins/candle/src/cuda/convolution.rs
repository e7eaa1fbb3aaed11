//! Convolutions as products: the pixels under each window are laid out as a matrix, a few images at a time.
//!
//! `dtype: bf16` rounds operands to TF32 here: a decoder is some forty convolutions deep, and with bf16 its images would be
//! off by a twentieth of their range.

use candle_core::DType;
use retort_engine::error::{Error, Result};

use crate::cuda::backend::fill;
use crate::cuda::launch::{Slide, blocks, launch};
use crate::cuda::product::{Single, product_into};
use crate::cuda::tensor::{Raw, Tensor, device, fresh, pointer};
use crate::failed;

/// Elements of the matrix of windows that are in memory at once.
const UNFOLDED: usize = 1 << 28;

/// Sizes that belong together.
struct Sizes {
    images: usize,
    /// Channels times pixels of a window.
    window: usize,
    slide: Slide,
    /// Whether a window is a pixel and the images are their own matrix.
    pixels: bool,
    /// Images at a time.
    some: usize,
}

impl Sizes {
    fn new(x: &Raw, w: &Raw, stride: usize, padding: [usize; 2]) -> Result<Self> {
        let (images, channels, high, wide) = x.dims4().map_err(failed)?;
        let (_, input, kh, kw) = w.dims4().map_err(failed)?;
        if channels != input || stride == 0 {
            return Err(Error::Backend(format!(
                "convolution of {:?} with {:?}",
                x.dims(),
                w.dims()
            )));
        }
        let slide = Slide::new([high, wide], [kh, kw], stride, padding);
        let [oh, ow] = slide.windows();
        let window = channels * kh * kw;
        Ok(Self {
            images,
            window,
            slide,
            pixels: kh * kw == 1 && stride == 1 && padding == [0, 0],
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

    /// Windows of row-major images (b, c, h, w): (b, c kh kw, windows).
    fn unfold(&self, x: &Raw) -> Result<Raw> {
        let b = x.dims()[0];
        let shape = [b, self.window, self.area()];
        if self.pixels {
            return x.reshape(&shape[..]).map_err(failed);
        }
        let device = device(x)?;
        let to = fresh(&device, &shape, DType::F32)?;
        let (name, n) = match self.slide.windows()[1] % 4 {
            0 => ("unfold_four", to.elem_count() / 4),
            _ => ("unfold_one", to.elem_count()),
        };
        launch!(
            device,
            name,
            blocks(n)?,
            0,
            [n as u32, self.slide, pointer(x)?, pointer(&to)?]
        )?;
        Ok(to)
    }
}

/// What a convolution of images does to its operands.
fn rounding(x: &Tensor) -> Single {
    match x.half {
        true => Single::Tf32,
        false => Single::Exact,
    }
}

/// (b, c, h, w) with (o, c, kh, kw) -> (b, o, h', w').
pub fn conv2d(x: &Tensor, w: &Tensor, stride: usize, padding: [usize; 2]) -> Result<Raw> {
    let (images, sizes) = (x.single()?, Sizes::new(&x.raw, &w.raw, stride, padding)?);
    let o = w.raw.dims()[0];
    let [oh, ow] = sizes.slide.windows();
    let kernel = w.single()?.reshape((o, sizes.window)).map_err(failed)?;
    let to = fresh(&device(&images)?, &[sizes.images, o, oh * ow], DType::F32)?;
    if to.elem_count() > 0 {
        for (first, count) in sizes.parts() {
            let part = |x: &Raw| x.narrow(0, first, count).map_err(failed);
            let windows = sizes.unfold(&part(&images)?)?;
            let to = part(&to)?;
            product_into(&kernel, &windows, false, false, &to, 0.0, rounding(x))?;
        }
    }
    to.reshape((sizes.images, o, oh, ow)).map_err(failed)
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
            launch!(
                device,
                "fold",
                blocks(n)?,
                0,
                [n as u32, sizes.slide, pointer(&windows)?, pointer(&to)?]
            )?;
        }
        if let Some(dw) = &dw {
            let windows = sizes.unfold(&part(&images)?)?;
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
