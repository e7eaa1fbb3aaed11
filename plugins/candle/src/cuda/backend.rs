//! `Cuda` as the engine's backend: views by candle, products by cuBLAS, everything else in kernels of its own.

use candle_core::{CudaDevice, DType};
use retort_engine::backend::{
    AdamwStep, Backend, Binary, FlowSolver, Mask, Truncation, Unary, Window,
};
use retort_engine::error::{Error, Result};

use crate::cuda::launch::{Adamw, Places, Slide, Steps, blocks, counted, launch, warps};
use crate::cuda::product::{operands, product};
use crate::cuda::tensor::{
    Raw, Tensor, convert, copy, dense_last, device, fresh, pointer, to_host, whole,
};
use crate::cuda::{Cuda, attention, convolution, flow};
use crate::failed;

type T = Tensor;

/// Elements of a row that a warp alone looks at.
const SHORT: u32 = 256;

impl Cuda {
    fn put<D: candle_core::WithDType>(&self, data: &[D], shape: &[usize]) -> Result<T> {
        let raw = Raw::from_slice(data, shape, &self.device).map_err(failed)?;
        Ok(Tensor {
            raw,
            half: self.half,
        })
    }
}

impl Backend for Cuda {
    type Tensor = Tensor;

    fn exact(&self) -> Self {
        Self {
            half: false,
            ..self.clone()
        }
    }

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        self.put(data, shape)
    }

    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        self.put(data, shape)
    }

    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        let candle_core::Device::Cuda(device) = &self.device else {
            return Err(Error::Internal("the backend of GPUs is on none".into()));
        };
        Ok(Tensor {
            raw: full(device, shape, value)?,
            half: self.half,
        })
    }

    fn floats_beside(other: &T, data: &[f32], shape: &[usize]) -> Result<T> {
        other.with(Raw::from_slice(data, shape, other.raw.device()))
    }

    fn full_beside(other: &T, shape: &[usize], value: f32) -> Result<T> {
        Ok(other.like(full(&device(&other.raw)?, shape, value)?))
    }

    fn indices_beside(other: &T, data: &[u32], shape: &[usize]) -> Result<T> {
        other.with(Raw::from_slice(data, shape, other.raw.device()))
    }

    fn factor(x: &T) -> Result<T> {
        Ok(x.like(x.operand()?))
    }

    fn to_floats(x: &T) -> Result<Vec<f32>> {
        to_host(&x.floats()?)
    }

    fn to_indices(x: &T) -> Result<Vec<u32>> {
        to_host(&x.raw)
    }

    fn shape(x: &T) -> Vec<usize> {
        x.raw.dims().to_vec()
    }

    fn reshape(x: &T, shape: &[usize]) -> Result<T> {
        x.with(whole(&x.raw)?.reshape(shape))
    }

    fn permute(x: &T, dims: &[usize]) -> Result<T> {
        x.with(x.raw.permute(dims))
    }

    fn narrow(x: &T, dim: usize, start: usize, len: usize) -> Result<T> {
        x.with(x.raw.narrow(dim, start, len))
    }

    fn cat(xs: &[&T], dim: usize) -> Result<T> {
        let first = xs
            .first()
            .ok_or_else(|| Error::Internal("cat of nothing".into()))?;
        let mut shape = Self::shape(first);
        shape[dim] = xs.iter().map(|x| x.raw.dims()[dim]).sum();
        let to = fresh(&device(&first.raw)?, &shape, first.raw.dtype())?;
        let mut start = 0;
        for x in xs {
            let len = x.raw.dims()[dim];
            copy(&x.raw, &to.narrow(dim, start, len).map_err(failed)?)?;
            start += len;
        }
        Ok(first.like(to))
    }

    fn expand(x: &T, shape: &[usize]) -> Result<T> {
        x.with(x.raw.broadcast_as(shape))
    }

    fn unary(x: &T, f: Unary) -> Result<T> {
        let from = x.single()?;
        let (device, n) = (device(&from)?, from.elem_count());
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "unary",
            blocks(n)?,
            0,
            [n as u32, f as i32, pointer(&from)?, pointer(&to)?]
        )?;
        Ok(x.like(to))
    }

    fn binary(a: &T, b: &T, f: Binary) -> Result<T> {
        let (left, right) = (a.floats()?, b.floats()?);
        let shape = left
            .shape()
            .broadcast_shape_binary_op(right.shape(), "binary")
            .map_err(failed)?;
        let left = left.broadcast_as(&shape).map_err(failed)?;
        let right = right.broadcast_as(&shape).map_err(failed)?;
        let (device, n) = (device(&left)?, shape.elem_count());
        let to = fresh(&device, shape.dims(), DType::F32)?;
        let places = Places::new(shape.dims(), left.stride(), right.stride())?;
        launch!(
            device,
            "binary",
            blocks(n)?,
            0,
            [
                n as u32,
                f as i32,
                places,
                pointer(&left)?,
                pointer(&right)?,
                pointer(&to)?
            ]
        )?;
        Ok(a.like(to))
    }

    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        let from = x.single()?;
        let (device, n) = (device(&from)?, from.elem_count());
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "affine",
            blocks(n)?,
            0,
            [
                n as u32,
                mul as f32,
                add as f32,
                pointer(&from)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn sum(x: &T, dims: &[usize]) -> Result<T> {
        Ok(x.like(sum(&x.floats()?, dims)?))
    }

    fn max_last(x: &T) -> Result<T> {
        let (from, rows, k) = rows(x)?;
        let device = device(&from)?;
        let mut shape = Self::shape(x);
        *shape.last_mut().expect("max_last: rank >= 1") = 1;
        let to = fresh(&device, &shape, DType::F32)?;
        launch!(
            device,
            "max_last",
            rows,
            0,
            [k, pointer(&from)?, pointer(&to)?]
        )?;
        Ok(x.like(to))
    }

    fn argmax_last(x: &T) -> Result<T> {
        let (from, rows, k) = rows(x)?;
        let device = device(&from)?;
        let to = fresh(&device, &from.dims()[..from.rank() - 1], DType::U32)?;
        launch!(
            device,
            "argmax_last",
            rows,
            0,
            [k, pointer(&from)?, pointer(&to)?]
        )?;
        Ok(x.like(to))
    }

    fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
        let (left, right) = operands(&a.raw, &b.raw, false)?;
        Ok(a.like(product(&left, &right, ta, tb)?))
    }

    fn rows(table: &T, ids: &T) -> Result<T> {
        let from = whole(&table.raw)?;
        let which = whole(&ids.raw)?;
        let (k, d) = from.dims2().map_err(failed)?;
        let (device, mut shape) = (device(&from)?, ids.raw.dims().to_vec());
        shape.push(d);
        let n: usize = shape.iter().product();
        let to = fresh(&device, &shape, DType::F32)?;
        let name = match from.dtype() {
            DType::BF16 => "rows_bf16",
            _ => "rows_f32",
        };
        launch!(
            device,
            name,
            blocks(n)?,
            0,
            [
                n as u32,
                d as u32,
                k as u32,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?
            ]
        )?;
        Ok(table.like(to))
    }

    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let (from, which) = (grad.single()?, whole(&ids.raw)?);
        let d = from.dims()[from.rank() - 1];
        let (device, n) = (device(&from)?, which.elem_count());
        // A small table has few blocks, so each looks at some of the gradients only.
        let part = match k <= 64 {
            true => n.clamp(1, 256),
            false => n.max(1),
        };
        let parts = n.div_ceil(part).max(1);
        let to = fresh(&device, &[parts, k, d], DType::F32)?;
        launch!(
            device,
            "rows_adjoint",
            counted(parts * k)?,
            0,
            [
                n as u32,
                k as u32,
                d as u32,
                part as u32,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?
            ]
        )?;
        let all = match parts {
            1 => to,
            _ => sum(&to, &[0])?,
        };
        grad.with(all.reshape((k, d)))
    }

    fn pick(x: &T, ids: &T) -> Result<T> {
        let (from, n, k) = rows(x)?;
        let which = whole(&ids.raw)?;
        let device = device(&from)?;
        let to = fresh(&device, &from.dims()[..from.rank() - 1], DType::F32)?;
        launch!(
            device,
            "pick",
            blocks(n)?,
            0,
            [
                n as u32,
                k,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let (from, which) = (grad.single()?, whole(&ids.raw)?);
        let (device, n) = (device(&from)?, from.elem_count() * k);
        let mut shape = from.dims().to_vec();
        shape.push(k);
        let to = fresh(&device, &shape, DType::F32)?;
        launch!(
            device,
            "pick_adjoint",
            blocks(n)?,
            0,
            [
                n as u32,
                k as u32,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?
            ]
        )?;
        Ok(grad.like(to))
    }

    fn conv2d(x: &T, w: &T, stride: usize, padding: [usize; 2]) -> Result<T> {
        Ok(x.like(convolution::conv2d(x, w, stride, padding)?))
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

    fn conv2d_backward(
        x: &T,
        w: &T,
        grad: &T,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<T>, Option<T>)> {
        let (dx, dw) = convolution::conv2d_backward(x, w, grad, stride, padding, want)?;
        Ok((dx.map(|dx| x.like(dx)), dw.map(|dw| w.like(dw))))
    }

    fn write_(x: &T, dim: usize, start: usize, src: &T) -> Result<()> {
        let len = src.raw.dims()[dim];
        copy(&src.raw, &x.raw.narrow(dim, start, len).map_err(failed)?)
    }

    fn assign_(x: &T, src: &T) -> Result<()> {
        copy(&src.raw, &x.raw)
    }

    fn adamw_(p: &T, m: &T, v: &T, g: &T, s: &AdamwStep) -> Result<()> {
        let n = in_place(&[p, m, v], g)?;
        let g = g.single()?;
        let device = device(&g)?;
        let numbers = Adamw {
            beta1: s.beta1 as f32,
            beta2: s.beta2 as f32,
            eps: s.eps as f32,
            grad_scale: s.grad_scale as f32,
            root: s.correction2.sqrt().recip() as f32,
            rate: (s.lr / s.correction1) as f32,
            keep: (1.0 - s.lr * s.weight_decay) as f32,
        };
        launch!(
            device,
            "adamw",
            blocks(n)?,
            0,
            [
                n as u32,
                numbers,
                pointer(&p.raw)?,
                pointer(&m.raw)?,
                pointer(&v.raw)?,
                pointer(&g)?
            ]
        )
    }

    fn ema_(average: &T, x: &T, decay: f64) -> Result<()> {
        let n = in_place(&[average], x)?;
        let x = x.single()?;
        let device = device(&x)?;
        let (keep, rest) = (decay as f32, (1.0 - decay) as f32);
        launch!(
            device,
            "ema",
            blocks(n)?,
            0,
            [n as u32, keep, rest, pointer(&average.raw)?, pointer(&x)?]
        )
    }

    fn unary_backward(x: &T, y: &T, grad: &T, f: Unary) -> Result<T> {
        let (a, b, g) = (x.single()?, y.single()?, grad.single()?);
        same(&a, &b)?;
        same(&a, &g)?;
        let (device, n) = (device(&a)?, a.elem_count());
        let to = fresh(&device, a.dims(), DType::F32)?;
        launch!(
            device,
            "unary_backward",
            blocks(n)?,
            0,
            [
                n as u32,
                f as i32,
                pointer(&a)?,
                pointer(&b)?,
                pointer(&g)?,
                pointer(&to)?
            ]
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
        launch!(
            device,
            "softmax",
            rows,
            0,
            [k, pointer(&from)?, pointer(&to)?]
        )?;
        Ok(x.like(to))
    }

    fn softmax_backward(y: &T, grad: &T) -> Result<T> {
        let (from, n, k) = rows(y)?;
        let g = grad.single()?;
        same(&from, &g)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "softmax_backward",
            n,
            0,
            [k, pointer(&from)?, pointer(&g)?, pointer(&to)?]
        )?;
        Ok(y.like(to))
    }

    fn rms_norm(x: &T, w: &T, eps: f64) -> Result<T> {
        rms_norm(x, w, eps, DType::F32)
    }

    fn rms_norm_factor(x: &T, w: &T, eps: f64) -> Result<T> {
        rms_norm(x, w, eps, x.storage())
    }

    fn rms_norm_backward(x: &T, w: &T, grad: &T, eps: f64) -> Result<(T, T)> {
        let (from, n, d) = rows(x)?;
        let (scale, g) = (sized(w, d as usize)?, grad.single()?);
        same(&from, &g)?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        let parts = fresh(&device, &[n, d as usize], DType::F32)?;
        let (name, blocks) = match d <= SHORT {
            true => ("rms_norm_short_backward", warps(n)?),
            false => ("rms_norm_backward", n),
        };
        launch!(
            device,
            name,
            blocks,
            0,
            [
                n as u32,
                d,
                eps as f32,
                pointer(&from)?,
                pointer(&scale)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&parts)?
            ]
        )?;
        let dw = sum(&parts, &[0])?.reshape(w.raw.shape());
        Ok((x.like(dx), w.with(dw)?))
    }

    fn layer_norm(x: &T, eps: f64) -> Result<T> {
        let (from, n, d) = rows(x)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "group_norm",
            n,
            0,
            [
                d,
                1u32,
                1u32,
                eps as f32,
                0i32,
                pointer(&from)?,
                0u64,
                0u64,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn layer_norm_backward(x: &T, grad: &T, eps: f64) -> Result<T> {
        let (from, n, d) = rows(x)?;
        let g = grad.single()?;
        same(&from, &g)?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "group_norm_backward",
            n,
            0,
            [
                d,
                1u32,
                1u32,
                eps as f32,
                pointer(&from)?,
                0u64,
                pointer(&g)?,
                pointer(&dx)?,
                0u64
            ]
        )?;
        Ok(x.like(dx))
    }

    fn modulated_norm(x: &T, scale: &T, shift: &T, eps: f64) -> Result<T> {
        let (from, n, d) = rows(x)?;
        let (b, l, _) = from.dims3().map_err(failed)?;
        let (scale, shift) = (sized(scale, b * d as usize)?, sized(shift, b * d as usize)?);
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), x.storage())?;
        let name = match x.half {
            true => "modulated_norm_bf16",
            false => "modulated_norm_f32",
        };
        launch!(
            device,
            name,
            n,
            0,
            [
                l as u32,
                d,
                eps as f32,
                pointer(&from)?,
                pointer(&scale)?,
                pointer(&shift)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn group_norm(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        group_norm(x, groups, w, bias, eps, false)
    }

    fn group_norm_silu(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        group_norm(x, groups, w, bias, eps, true)
    }

    fn group_norm_backward(x: &T, groups: usize, w: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        let (from, g) = (x.single()?, grad.single()?);
        same(&from, &g)?;
        let [rows, n, area] = grouped(&from, groups)?;
        let scale = sized(w, from.dims()[1])?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        let parts = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "group_norm_backward",
            rows,
            0,
            [
                n as u32,
                area as u32,
                groups as u32,
                eps as f32,
                pointer(&from)?,
                pointer(&scale)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&parts)?
            ]
        )?;
        let dw = sum(&parts, &[0, 2, 3])?.reshape(w.raw.shape());
        let db = sum(&g, &[0, 2, 3])?.reshape(w.raw.shape());
        Ok((x.like(dx), w.with(dw)?, w.with(db)?))
    }

    fn max_pool2d(x: &T, window: Window) -> Result<T> {
        let from = x.single()?;
        let (b, c, h, w) = from.dims4().map_err(failed)?;
        let slide = pooled(window, [h, w]);
        let [high, wide] = slide.windows();
        let device = device(&from)?;
        let to = fresh(&device, &[b, c, high, wide], DType::F32)?;
        let n = to.elem_count();
        launch!(
            device,
            "max_pool",
            blocks(n)?,
            0,
            [n as u32, slide, pointer(&from)?, pointer(&to)?]
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
        launch!(
            device,
            "max_pool_backward",
            blocks(n)?,
            0,
            [
                n as u32,
                slide,
                pointer(&from)?,
                pointer(&g)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn rope(x: &T, cos: &T, sin: &T) -> Result<T> {
        let from = dense_last(&x.floats()?)?;
        let (b, l, h, d) = from.dims4().map_err(failed)?;
        let (cosines, sines) = (cos.single()?, sin.single()?);
        if cosines.dims() != [l, d / 2] || sines.dims() != [l, d / 2] {
            return Err(Error::Backend(format!(
                "rope: {:?} with tables {:?} and {:?}",
                from.dims(),
                cosines.dims(),
                sines.dims()
            )));
        }
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let n = b * l * h * (d / 2);
        launch!(
            device,
            "rope",
            blocks(n)?,
            0,
            [
                n as u32,
                l as u32,
                h as u32,
                (d / 2) as u32,
                Steps::new(&from.stride()[..3]),
                pointer(&from)?,
                pointer(&cosines)?,
                pointer(&sines)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn rope_cached(
        q: &T,
        k: &T,
        v: &T,
        cos: &T,
        sin: &T,
        keys: &T,
        values: &T,
        at: usize,
    ) -> Result<T> {
        let [from, k, v] = [q, k, v].map(|x| dense_last(&x.floats()?));
        let (from, k, v) = (from?, k?, v?);
        let (b, l, h, d) = from.dims4().map_err(failed)?;
        let (cosines, sines) = (cos.single()?, sin.single()?);
        let cached = |x: &T| x.raw.narrow(1, at, l).map_err(failed);
        let (keys, values) = (cached(keys)?, cached(values)?);
        let fits = |x: &Raw| x.dims() == [b, l, h, d];
        let kept = |x: &Raw| fits(x) && x.stride()[3] == 1 && x.dtype() == keys.dtype();
        let table = |x: &Raw| x.dims() == [l, d / 2];
        if ![&k, &v].into_iter().all(fits)
            || ![&keys, &values].into_iter().all(kept)
            || ![&cosines, &sines].into_iter().all(table)
        {
            return Err(Error::Backend(format!(
                "rope of {:?}, {:?} and {:?} into {:?} {:?} and {:?} {:?} at {at}, with {:?} and {:?}",
                from.dims(),
                k.dims(),
                v.dims(),
                keys.dims(),
                keys.dtype(),
                values.dims(),
                values.dtype(),
                cosines.dims(),
                sines.dims()
            )));
        }
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let n = b * l * h * (d / 2);
        let name = match keys.dtype() {
            DType::BF16 => "rope_cached_bf16",
            _ => "rope_cached_f32",
        };
        let steps = |x: &Raw| Steps::new(&x.stride()[..3]);
        launch!(
            device,
            name,
            blocks(n)?,
            0,
            [
                n as u32,
                l as u32,
                h as u32,
                (d / 2) as u32,
                steps(&from),
                steps(&k),
                steps(&v),
                steps(&keys),
                steps(&values),
                pointer(&from)?,
                pointer(&k)?,
                pointer(&v)?,
                pointer(&cosines)?,
                pointer(&sines)?,
                pointer(&to)?,
                pointer(&keys)?,
                pointer(&values)?
            ]
        )?;
        Ok(q.like(to))
    }

    fn attention(q: &T, k: &T, v: &T, mask: &Mask<T>, scale: f64) -> Result<T> {
        Ok(q.like(attention::attention(q, k, v, mask, scale)?))
    }

    fn attention_backward(
        q: &T,
        k: &T,
        v: &T,
        mask: &Mask<T>,
        scale: f64,
        _: &T,
        grad: &T,
    ) -> Result<(T, T, T)> {
        let [dq, dk, dv] = attention::attention_backward(q, k, v, mask, scale, grad)?;
        Ok((q.like(dq), k.like(dk), v.like(dv)))
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
        let name = match x.half {
            true => "swiglu_bf16",
            false => "swiglu_f32",
        };
        launch!(
            device,
            name,
            blocks(n)?,
            0,
            [n as u32, d as u32, pointer(&from)?, pointer(&to)?]
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
        launch!(
            device,
            "swiglu_backward",
            blocks(n)?,
            0,
            [
                n as u32,
                d as u32,
                pointer(&from)?,
                pointer(&g)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn cross_entropy(logits: &T, ids: &T) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        let which = whole(&ids.raw)?;
        let device = device(&from)?;
        let to = fresh(&device, &[n], DType::F32)?;
        launch!(
            device,
            "cross_entropy",
            n,
            0,
            [k, pointer(&from)?, pointer(&which)?, pointer(&to)?]
        )?;
        Ok(logits.like(to))
    }

    fn cross_entropy_backward(logits: &T, ids: &T, grad: &T) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        let (which, g) = (whole(&ids.raw)?, grad.single()?);
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch!(
            device,
            "cross_entropy_backward",
            n,
            0,
            [
                k,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&g)?,
                pointer(&to)?
            ]
        )?;
        Ok(logits.like(to))
    }

    fn truncate(logits: &T, truncation: &Truncation) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let keep = match truncation.top_k {
            0 => k,
            keep => keep.min(k as usize) as u32,
        };
        launch!(
            device,
            "truncate",
            n,
            0,
            [
                k,
                truncation.temperature as f32,
                keep,
                truncation.top_p,
                pointer(&from)?,
                pointer(&to)?
            ]
        )?;
        Ok(logits.like(to))
    }

    fn categorical(logits: &T, uniforms: &[f64]) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        if uniforms.len() != n {
            return Err(Error::Backend(format!(
                "{} numbers for {n} rows",
                uniforms.len()
            )));
        }
        let device = device(&from)?;
        let uniforms = Raw::from_slice(uniforms, n, from.device()).map_err(failed)?;
        let to = fresh(&device, &[n], DType::U32)?;
        launch!(
            device,
            "categorical",
            n,
            0,
            [k, pointer(&from)?, pointer(&uniforms)?, pointer(&to)?]
        )?;
        Ok(logits.like(to))
    }

    fn flow_map(logits: &T, noise: &T, codebook: &T, solver: &FlowSolver) -> Result<T> {
        match flow::flow_map(logits, noise, codebook, solver)? {
            Some(ids) => Ok(logits.like(ids)),
            // Codes too long for the kernel: the same in plain operations, on the GPU too.
            None => retort_engine::flow::composed::<Self>(logits, noise, codebook, solver),
        }
    }
}

/// x / sqrt(mean(x^2) + eps) * w over the last dimension, in a type.
fn rms_norm(x: &T, w: &T, eps: f64, dtype: DType) -> Result<T> {
    let (from, n, d) = rows(x)?;
    let scale = sized(w, d as usize)?;
    let device = device(&from)?;
    let to = fresh(&device, from.dims(), dtype)?;
    let (name, blocks) = match (dtype, d <= SHORT) {
        (DType::BF16, true) => ("rms_norm_short_bf16", warps(n)?),
        (DType::BF16, false) => ("rms_norm_bf16", n),
        (_, true) => ("rms_norm_short_f32", warps(n)?),
        (_, false) => ("rms_norm_f32", n),
    };
    launch!(
        device,
        name,
        blocks,
        0,
        [
            n as u32,
            d,
            eps as f32,
            pointer(&from)?,
            pointer(&scale)?,
            pointer(&to)?
        ]
    )?;
    Ok(x.like(to))
}

/// Group normalisation of (b, c, h, w) with scale and shift (c), then silu if `active`.
fn group_norm(x: &T, groups: usize, w: &T, bias: &T, eps: f64, active: bool) -> Result<T> {
    let from = x.single()?;
    let [rows, n, area] = grouped(&from, groups)?;
    let channels = from.dims()[1];
    let (scale, shift) = (sized(w, channels)?, sized(bias, channels)?);
    let device = device(&from)?;
    let to = fresh(&device, from.dims(), DType::F32)?;
    launch!(
        device,
        "group_norm",
        rows,
        0,
        [
            n as u32,
            area as u32,
            groups as u32,
            eps as f32,
            i32::from(active),
            pointer(&from)?,
            pointer(&scale)?,
            pointer(&shift)?,
            pointer(&to)?
        ]
    )?;
    Ok(x.like(to))
}

/// Floats, all `value`.
fn full(device: &CudaDevice, shape: &[usize], value: f32) -> Result<Raw> {
    let to = fresh(device, shape, DType::F32)?;
    fill(&to, value)?;
    Ok(to)
}

/// Sets all elements of a row-major tensor.
pub fn fill(x: &Raw, value: f32) -> Result<()> {
    let (device, n) = (device(x)?, x.elem_count());
    let name = match x.dtype() {
        DType::BF16 => "fill_bf16",
        _ => "fill_f32",
    };
    launch!(device, name, blocks(n)?, 0, [n as u32, value, pointer(x)?])
}

/// Sums of an f32 tensor over dimensions, which stay with size 1.
pub fn sum(x: &Raw, dims: &[usize]) -> Result<Raw> {
    let device = device(x)?;
    let part = |gone: bool| -> [Vec<usize>; 2] {
        let of = |all: &[usize]| {
            let own = all.iter().enumerate();
            own.filter(|(d, _)| dims.contains(d) == gone)
                .map(|(_, &n)| n)
                .collect()
        };
        [of(x.dims()), of(x.stride())]
    };
    let [kept, kept_steps] = part(false);
    let [gone, gone_steps] = part(true);
    let (n, terms): (usize, usize) = (kept.iter().product(), gone.iter().product());
    let mut shape = x.dims().to_vec();
    dims.iter().for_each(|&d| shape[d] = 1);
    counted(x.elem_count())?;
    if n == 0 || terms == 0 {
        let to = fresh(&device, &shape, DType::F32)?;
        fill(&to, 0.0)?;
        return Ok(to);
    }
    // Many rows, added up column by column: first some of them each, so that there is work for all.
    let together = dims.windows(2).all(|pair| pair[1] == pair[0] + 1);
    let columns: usize = dims
        .last()
        .map_or(1, |&d| x.dims()[d + 1..].iter().product());
    if together && x.is_contiguous() && columns >= 32 && terms >= 64 {
        let outer = n / columns;
        let parts = (65536 / n).clamp(1, terms / 16);
        let part = terms.div_ceil(parts);
        let parts = terms.div_ceil(part);
        let some = fresh(&device, &[outer, parts, columns], DType::F32)?;
        let to = fresh(&device, &shape, DType::F32)?;
        for (rows, part, from, to) in [(terms, part, x, &some), (parts, parts, &some, &to)] {
            let all = outer * rows.div_ceil(part) * columns;
            launch!(
                device,
                "sum_columns",
                blocks(all)?,
                0,
                [
                    outer as u32,
                    rows as u32,
                    columns as u32,
                    part as u32,
                    pointer(from)?,
                    pointer(to)?
                ]
            )?;
        }
        return Ok(to);
    }
    let to = fresh(&device, &shape, DType::F32)?;
    let kept = Places::new(&kept, &kept_steps, &kept_steps)?;
    let gone = Places::new(&gone, &gone_steps, &gone_steps)?;
    if terms < 64 {
        launch!(
            device,
            "sum_few",
            blocks(n)?,
            0,
            [
                n as u32,
                terms as u32,
                kept,
                gone,
                pointer(x)?,
                pointer(&to)?
            ]
        )?;
    } else {
        launch!(
            device,
            "sum",
            n,
            0,
            [terms as u32, kept, gone, pointer(x)?, pointer(&to)?]
        )?;
    }
    Ok(to)
}

/// A tensor row by row: itself in f32, how many rows, and their length.
fn rows(x: &T) -> Result<(Raw, usize, u32)> {
    let from = x.single()?;
    let (n, last) = (from.elem_count(), from.dims().last().copied().unwrap_or(0));
    if n == 0 {
        return Err(Error::Backend(format!("{:?}: no rows", from.dims())));
    }
    counted(n)?;
    Ok((from, n / last, last as u32))
}

/// A parameter of so many elements.
fn sized(w: &T, n: usize) -> Result<Raw> {
    if w.raw.elem_count() != n {
        return Err(Error::Backend(format!(
            "a parameter {:?}, expected {n} elements",
            w.raw.dims()
        )));
    }
    convert(&w.raw, DType::F32)
}

/// Rows of a group norm, their length, and the pixels of a channel.
fn grouped(x: &Raw, groups: usize) -> Result<[usize; 3]> {
    let (b, c, h, w) = x.dims4().map_err(failed)?;
    if groups == 0 || c % groups != 0 || x.elem_count() == 0 {
        return Err(Error::Backend(format!(
            "group norm: {:?} in {groups} groups",
            x.dims()
        )));
    }
    counted(x.elem_count())?;
    Ok([b * groups, c / groups * h * w, h * w])
}

fn pooled(window: Window, image: [usize; 2]) -> Slide {
    Slide::new(image, [window.size; 2], window.stride, [window.padding; 2])
}

fn same(a: &Raw, b: &Raw) -> Result<()> {
    if a.dims() == b.dims() {
        return Ok(());
    }
    Err(Error::Backend(format!(
        "the shapes {:?} and {:?} differ",
        a.dims(),
        b.dims()
    )))
}

/// Elements of tensors that are written in place beside one that is read.
fn in_place(written: &[&T], read: &T) -> Result<usize> {
    for x in written {
        same(&x.raw, &read.raw)?;
        if x.raw.dtype() != DType::F32 || !x.raw.is_contiguous() {
            return Err(Error::Backend(
                "written in place: f32 and row-major only".into(),
            ));
        }
    }
    Ok(read.raw.elem_count())
}
