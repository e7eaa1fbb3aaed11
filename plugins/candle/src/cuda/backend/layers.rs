//! `Cuda`: linear maps, convolutions, activations, pooling, softmax and losses.

use candle_core::DType;
use retort_engine::backend::{Binary, Layers, Precision, Tensors, Unary, Window};
use retort_engine::error::{Error, Result};

use crate::cuda::arguments::{four, rows, same, sized};
use crate::cuda::biased::biased;
use crate::cuda::elementwise::unary;
use crate::cuda::kernels;
use crate::cuda::launch::{blocks, counted, launch};
use crate::cuda::product::{operands, product};
use crate::cuda::structures::PoolWindow;
use crate::cuda::sums::sum_columns;
use crate::cuda::tensor::Tensor;
use crate::cuda::tensor::{device, fresh, pointer, whole};
use crate::cuda::{Cuda, convolution};
use crate::failed;

type T = Tensor;

impl Layers for Cuda {
    fn activation(x: &T, f: Unary, precision: Precision) -> Result<T> {
        unary(x, f, x.stored_as(precision))
    }

    fn conv2d_bias(
        x: &T,
        w: &T,
        bias: &T,
        residual: Option<&T>,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<T> {
        let y = convolution::conv2d(x, w, stride, padding)?;
        convolution::add_(&y, bias, residual)?;
        Ok(x.like(y))
    }

    fn conv2d_upsampled(x: &T, w: &T, bias: &T, padding: [usize; 2]) -> Result<T> {
        let y = convolution::conv2d_upsampled(x, w, padding)?;
        convolution::add_(&y, bias, None)?;
        Ok(x.like(y))
    }

    fn unary_backward(x: &T, y: &T, grad: &T, f: Unary) -> Result<T> {
        let (a, g) = (x.single()?, grad.single()?);
        // The others need only the argument, and the result may have been rounded.
        let b = match f {
            Unary::Exp
            | Unary::Sqrt
            | Unary::Recip
            | Unary::Tanh
            | Unary::Sigmoid
            | Unary::Relu => y.single()?,
            _ => a.clone(),
        };
        same(&a, &b)?;
        same(&a, &g)?;
        let device = device(&a)?;
        let to = fresh(&device, a.dims(), DType::F32)?;
        let (kernel, n) = match four(a.elem_count(), &[&a, &b, &g])? {
            true => (kernels::unary_backward_four, a.elem_count() / 4),
            false => (kernels::unary_backward_one, a.elem_count()),
        };
        launch(
            &device,
            kernel,
            blocks(n)?,
            0,
            (
                n as u32,
                f as i32,
                pointer(&a)?,
                pointer(&b)?,
                pointer(&g)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn linear(x: &T, w: &T, bias: Option<&T>) -> Result<T> {
        let (o, i) = w.raw.dims2().map_err(failed)?;
        let mut shape = Self::shape(x);
        let rows = x.raw.elem_count() / i.max(1);
        let flat = Self::reshape(x, &[rows, i])?;
        let (a, b) = operands(&flat.raw, &w.raw, x.half)?;
        *shape.last_mut().expect("linear: rank >= 1") = o;
        if let Some(bias) = bias
            && let Some(y) = biased(&a, &b, &sized(bias, o)?)?
        {
            return x.with(y.reshape(shape));
        }
        let y = x.with(product(&a, &b, false, true)?.reshape(shape))?;
        match bias {
            Some(bias) => Self::binary(&y, bias, Binary::Add),
            None => Ok(y),
        }
    }

    fn linear_backward(x: Option<&T>, w: Option<&T>, grad: &T) -> Result<(Option<T>, Option<T>)> {
        let flat = |x: &T| {
            let last = x.raw.dims()[x.raw.rank() - 1];
            let rows = x.raw.elem_count() / last.max(1);
            Self::reshape(x, &[rows, last])?.operand()
        };
        let g = flat(grad)?;
        let dx = |w: &T| {
            let mut shape = Self::shape(grad);
            *shape.last_mut().expect("linear: rank >= 1") = w.raw.dims()[1];
            let (g, w) = operands(&g, &w.raw, grad.half)?;
            grad.with(product(&g, &w, false, false)?.reshape(shape))
        };
        let dw = |x: &T| Ok::<_, Error>(grad.like(product(&g, &flat(x)?, true, false)?));
        Ok((w.map(dx).transpose()?, x.map(dw).transpose()?))
    }

    fn softmax(x: &T) -> Result<T> {
        let (from, rows, k) = rows(x)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::softmax,
            rows,
            0,
            (k, pointer(&from)?, pointer(&to)?),
        )?;
        Ok(x.like(to))
    }

    fn softmax_backward(y: &T, grad: &T) -> Result<T> {
        let (from, n, k) = rows(y)?;
        let g = grad.single()?;
        same(&from, &g)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::softmax_backward,
            n,
            0,
            (k, pointer(&from)?, pointer(&g)?, pointer(&to)?),
        )?;
        Ok(y.like(to))
    }

    fn gated_add(x: &T, y: &T, gate: &T, added: Option<&T>) -> Result<T> {
        let (from, y) = (x.single()?, y.single()?);
        let added = added.map(|added| added.single()).transpose()?;
        let (b, l, c) = from.dims3().map_err(failed)?;
        let gate = sized(gate, b * c)?;
        let mut all = vec![&from, &y];
        all.extend(&added);
        all.iter().try_for_each(|x| same(&from, x))?;
        all.push(&gate);
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let (kernel, n) = match four(c, &all)? {
            true => (kernels::gated_add_four, from.elem_count() / 4),
            false => (kernels::gated_add_one, from.elem_count()),
        };
        counted(from.elem_count())?;
        launch(
            &device,
            kernel,
            blocks(n)?,
            0,
            (
                n as u32,
                (l * c) as u32,
                c as u32,
                pointer(&from)?,
                pointer(&y)?,
                pointer(&gate)?,
                added.as_ref().map_or(Ok(0), pointer)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn gated_add_backward(y: &T, gate: &T, grad: &T) -> Result<(T, T)> {
        let (from, g) = (y.single()?, grad.single()?);
        same(&from, &g)?;
        let (b, l, c) = from.dims3().map_err(failed)?;
        let dgate = sum_columns(&g, Some(&from), [b, l, c])?;
        let dgate = gate.with(dgate.reshape((b, 1, c)))?;
        Ok((Self::binary(grad, gate, Binary::Mul)?, dgate))
    }

    fn max_pool2d(x: &T, window: Window) -> Result<T> {
        let from = x.single()?;
        let (b, c, h, w) = from.dims4().map_err(failed)?;
        let slide = pooled(window, [h, w]);
        let [high, wide] = slide.windows();
        let device = device(&from)?;
        let to = fresh(&device, &[b, c, high, wide], DType::F32)?;
        let n = to.elem_count();
        launch(
            &device,
            kernels::max_pool,
            blocks(n)?,
            0,
            (n as u32, slide, pointer(&from)?, pointer(&to)?),
        )?;
        Ok(x.like(to))
    }

    fn max_pool2d_backward(x: &T, grad: &T, window: Window) -> Result<T> {
        let (from, g) = (x.single()?, grad.single()?);
        let (_, _, h, w) = from.dims4().map_err(failed)?;
        let slide = pooled(window, [h, w]);
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let n = to.elem_count();
        launch(
            &device,
            kernels::max_pool_backward,
            blocks(n)?,
            0,
            (
                n as u32,
                slide,
                pointer(&from)?,
                pointer(&g)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn swiglu(x: &T) -> Result<T> {
        let from = x.single()?;
        let mut shape = from.dims().to_vec();
        let last = shape.last_mut().expect("swiglu: rank >= 1");
        *last /= 2;
        let d = *last;
        let device = device(&from)?;
        let to = fresh(&device, &shape, x.storage())?;
        let n = to.elem_count();
        let kernel = match x.half {
            true => kernels::swiglu_bf16,
            false => kernels::swiglu_f32,
        };
        launch(
            &device,
            kernel,
            blocks(n)?,
            0,
            (n as u32, d as u32, pointer(&from)?, pointer(&to)?),
        )?;
        Ok(x.like(to))
    }

    fn swiglu_backward(x: &T, grad: &T) -> Result<T> {
        let (from, g) = (x.single()?, grad.single()?);
        let d = g.dims()[g.rank() - 1];
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let n = g.elem_count();
        if 2 * n != from.elem_count() {
            return Err(Error::Backend(format!(
                "swiglu: {:?} with a gradient {:?}",
                from.dims(),
                g.dims()
            )));
        }
        launch(
            &device,
            kernels::swiglu_backward,
            blocks(n)?,
            0,
            (
                n as u32,
                d as u32,
                pointer(&from)?,
                pointer(&g)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn cross_entropy(logits: &T, ids: &T) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        let which = whole(&ids.raw)?;
        let device = device(&from)?;
        let to = fresh(&device, &[n], DType::F32)?;
        launch(
            &device,
            kernels::cross_entropy,
            n,
            0,
            (k, pointer(&from)?, pointer(&which)?, pointer(&to)?),
        )?;
        Ok(logits.like(to))
    }

    fn cross_entropy_backward(logits: &T, ids: &T, grad: &T) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        let (which, g) = (whole(&ids.raw)?, grad.single()?);
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::cross_entropy_backward,
            n,
            0,
            (
                k,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&g)?,
                pointer(&to)?,
            ),
        )?;
        Ok(logits.like(to))
    }
}

fn pooled(window: Window, image: [usize; 2]) -> PoolWindow {
    PoolWindow::new(image, [window.size; 2], window.stride, [window.padding; 2])
}
