//! `Cuda` as the engine's backend: views by candle, products by cuBLAS, everything else in kernels of its own.

use candle_core::{CudaDevice, DType};
use retort_engine::backend::{
    AdamwStep, Backend, Binary, FlowSolver, Mask, Recording, Truncation, Unary, Window,
};
use retort_engine::error::{Error, Result};

use crate::cuda::biased::biased;
use crate::cuda::launch::{Adamw, Places, Slide, Steps, blocks, counted, launch, warps};
use crate::cuda::product::{operands, product};
use crate::cuda::tensor::{
    Raw, Tensor, convert, copy, dense_last, device, fresh, pointer, to_host, whole,
};
use crate::cuda::{Cuda, attention, convolution, flow, graph};
use crate::failed;

type T = Tensor;

/// Elements of a row that a warp alone looks at.
const SHORT: u32 = 256;
/// Elements of a row that the threads of a block hold.
const HELD: usize = 8192;

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
        unary(x, f, DType::F32)
    }

    fn unary_factor(x: &T, f: Unary) -> Result<T> {
        unary(x, f, x.storage())
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
        let (dims, steps) = (shape.dims(), [left.stride(), right.stride()]);
        let fours = match together(&[&left, &right])? {
            true => Places::fours(dims, steps[0], steps[1])?,
            false => None,
        };
        let (name, n, places) = match fours {
            Some(places) => ("binary_four", n / 4, places),
            None => ("binary_one", n, Places::new(dims, steps[0], steps[1])?),
        };
        launch!(
            device,
            name,
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
        let (a, g) = (x.single()?, grad.single()?);
        // Of the others the argument is enough, and the result may have been rounded.
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
        let (name, n) = match four(a.elem_count(), &[&a, &b, &g])? {
            true => ("unary_backward_four", a.elem_count() / 4),
            false => ("unary_backward_one", a.elem_count()),
        };
        launch!(
            device,
            name,
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
        let m = Modulated::new(x, scale)?;
        let shift = sized(shift, m.b * m.d)?;
        let device = device(&m.x)?;
        let to = fresh(&device, m.x.dims(), x.storage())?;
        let name = match (four(m.d, &[&m.x, &m.scale, &shift])?, x.half) {
            (true, true) => "modulated_norm_four_bf16",
            (true, false) => "modulated_norm_four_f32",
            (false, true) => "modulated_norm_one_bf16",
            (false, false) => "modulated_norm_one_f32",
        };
        launch!(
            device,
            name,
            m.b * m.l,
            0,
            [
                m.l as u32,
                m.d as u32,
                eps as f32,
                pointer(&m.x)?,
                pointer(&m.scale)?,
                pointer(&shift)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn modulated_norm_backward(x: &T, scale: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        let m = Modulated::new(x, scale)?;
        let g = grad.single()?;
        same(&m.x, &g)?;
        let device = device(&m.x)?;
        let dx = fresh(&device, m.x.dims(), DType::F32)?;
        let moments = fresh(&device, &[m.b * m.l, 2], DType::F32)?;
        let name = match four(m.d, &[&m.x, &m.scale, &g])? {
            true => "modulated_norm_backward_four",
            false => "modulated_norm_backward_one",
        };
        launch!(
            device,
            name,
            m.b * m.l,
            0,
            [
                m.l as u32,
                m.d as u32,
                eps as f32,
                pointer(&m.x)?,
                pointer(&m.scale)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&moments)?
            ]
        )?;
        let part = part_of(m.l, m.b * m.d);
        let parts = m.l.div_ceil(part);
        let some = fresh(&device, &[2 * m.b, parts, m.d], DType::F32)?;
        launch!(
            device,
            "sum_modulation",
            blocks(m.b * parts * m.d)?,
            0,
            [
                m.b as u32,
                m.l as u32,
                m.d as u32,
                part as u32,
                pointer(&m.x)?,
                pointer(&g)?,
                pointer(&moments)?,
                pointer(&some)?
            ]
        )?;
        let both = sum_columns(&some, None, [2 * m.b, parts, m.d])?;
        let half = |at: usize| {
            let own = both.narrow(0, at * m.b, m.b);
            own.and_then(|own| own.reshape((m.b, 1, m.d)))
        };
        Ok((x.like(dx), scale.with(half(0))?, scale.with(half(1))?))
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
        let (name, n) = match four(c, &all)? {
            true => ("gated_add_four", from.elem_count() / 4),
            false => ("gated_add_one", from.elem_count()),
        };
        counted(from.elem_count())?;
        launch!(
            device,
            name,
            blocks(n)?,
            0,
            [
                n as u32,
                (l * c) as u32,
                c as u32,
                pointer(&from)?,
                pointer(&y)?,
                pointer(&gate)?,
                added.as_ref().map_or(Ok(0), pointer)?,
                pointer(&to)?
            ]
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

    fn unit(x: &T, length: Option<&T>) -> Result<T> {
        let (from, rows, d) = rows(x)?;
        let (h, lengths) = lengths(&from, length)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), x.storage())?;
        let name = match x.half {
            true => "unit_bf16",
            false => "unit_f32",
        };
        launch!(
            device,
            name,
            warps(rows)?,
            0,
            [
                rows as u32,
                h as u32,
                d,
                pointer(&from)?,
                lengths.as_ref().map_or(Ok(0), pointer)?,
                pointer(&to)?
            ]
        )?;
        Ok(x.like(to))
    }

    fn unit_backward(x: &T, length: Option<&T>, grad: &T) -> Result<(T, Option<T>)> {
        let (from, rows, d) = rows(x)?;
        let g = grad.single()?;
        same(&from, &g)?;
        let (h, lengths) = lengths(&from, length)?;
        let device = device(&from)?;
        let dx = fresh(&device, from.dims(), DType::F32)?;
        let parts = fresh(&device, &[rows / h, h], DType::F32)?;
        launch!(
            device,
            "unit_backward",
            warps(rows)?,
            0,
            [
                rows as u32,
                h as u32,
                d,
                pointer(&from)?,
                lengths.as_ref().map_or(Ok(0), pointer)?,
                pointer(&g)?,
                pointer(&dx)?,
                pointer(&parts)?
            ]
        )?;
        let dlength = |length: &T| {
            let all = sum_columns(&parts, None, [1, rows / h, h])?;
            length.with(all.reshape(length.raw.shape()))
        };
        Ok((x.like(dx), length.map(dlength).transpose()?))
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
        let (l, seen) = (q.raw.dims4().map_err(failed)?.1, |x: &T| x.raw.dims()[1]);
        let cached = |x: &T| Self::narrow(x, 1, at, l.min(seen(x).saturating_sub(at)));
        turned(
            [q, k, v],
            [cos, sin],
            [&cached(keys)?, &cached(values)?],
            None,
        )
    }

    fn attend_next(
        qkv: [&T; 3],
        rope: [&T; 2],
        caches: [&T; 2],
        at: usize,
        place: &T,
        hidden: Option<&T>,
        scale: f64,
    ) -> Result<T> {
        let q = turned(qkv, rope, caches, Some((at, place)))?;
        let mask = hidden.map_or(Mask::Full, |hidden| Mask::Bias(hidden.clone()));
        attention::next(&q, caches, place, &mask, scale)
    }

    fn repeat(
        kept: &mut Recording,
        inputs: &[&T],
        step: &mut dyn FnMut(&[&T]) -> Result<T>,
    ) -> Result<T> {
        graph::repeat(kept, inputs, step)
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
        y: &T,
        grad: &T,
    ) -> Result<(T, T, T)> {
        let [dq, dk, dv] = attention::attention_backward(q, k, v, mask, scale, y, grad)?;
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

/// Turns q and k (b, l, h, d) and puts k and v into their caches, which begin with the first of these positions; or, with a
/// place, at the row of the tables (n, d/2) and of the caches (b, n, h, d) that it holds.
fn turned(
    [q, k, v]: [&T; 3],
    [cos, sin]: [&T; 2],
    [keys, values]: [&T; 2],
    place: Option<(usize, &T)>,
) -> Result<T> {
    let [from, k, v] = [q, k, v].map(|x| dense_last(&x.floats()?));
    let (from, k, v) = (from?, k?, v?);
    let (b, l, h, d) = from.dims4().map_err(failed)?;
    let (cosines, sines) = (cos.single()?, sin.single()?);
    let (keys, values) = (&keys.raw, &values.raw);
    let rows = keys.dims().get(1).copied().unwrap_or(0);
    let kept =
        |x: &Raw| x.dims() == [b, rows, h, d] && x.stride()[3] == 1 && x.dtype() == keys.dtype();
    let there = match place {
        None => rows == l,
        Some((at, place)) => l == 1 && at < rows && place.raw.elem_count() == 1,
    };
    if !there
        || ![&k, &v].into_iter().all(|x| x.dims() == [b, l, h, d])
        || ![keys, values].into_iter().all(kept)
        || ![&cosines, &sines]
            .into_iter()
            .all(|x| x.dims() == [rows, d / 2])
    {
        return Err(Error::Backend(format!(
            "rope of {:?}, {:?} and {:?} into {:?} {:?} and {:?} {:?}, with {:?} and {:?}",
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
    let place = place.map(|(_, place)| pointer(&place.raw)).transpose()?;
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
            steps(keys),
            steps(values),
            pointer(&from)?,
            pointer(&k)?,
            pointer(&v)?,
            pointer(&cosines)?,
            pointer(&sines)?,
            pointer(&to)?,
            pointer(keys)?,
            pointer(values)?,
            place.unwrap_or(0)
        ]
    )?;
    Ok(q.like(to))
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
    // Many rows, added up column by column.
    let together = dims.windows(2).all(|pair| pair[1] == pair[0] + 1);
    let columns: usize = dims
        .last()
        .map_or(1, |&d| x.dims()[d + 1..].iter().product());
    if together && x.is_contiguous() && columns >= 8 && terms >= 64 {
        let all = sum_columns(x, None, [n / columns, terms, columns])?;
        return all.reshape(shape).map_err(failed);
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

/// Rows of so many that one thread adds up, where there are so many sums: there is work for all, and few parts.
fn part_of(rows: usize, sums: usize) -> usize {
    let parts = (65536 / sums.max(1)).clamp(1, (rows / 16).max(1));
    rows.div_ceil(parts).max(1)
}

/// Sums over the rows of row-major (outer, rows, columns): -> (outer, columns); of the products with another tensor, if
/// there is one. First some of the rows each, then these.
fn sum_columns(x: &Raw, by: Option<&Raw>, [outer, rows, columns]: [usize; 3]) -> Result<Raw> {
    let device = device(x)?;
    let part = part_of(rows, outer * columns);
    let parts = rows.div_ceil(part);
    let once = |from: &Raw, by: Option<&Raw>, rows: usize, part: usize| {
        let to = fresh(&device, &[outer, rows.div_ceil(part), columns], DType::F32)?;
        launch!(
            device,
            "sum_columns",
            blocks(to.elem_count())?,
            0,
            [
                outer as u32,
                rows as u32,
                columns as u32,
                part as u32,
                pointer(from)?,
                by.map_or(Ok(0), pointer)?,
                pointer(&to)?
            ]
        )?;
        Ok::<_, Error>(to)
    };
    let some = once(x, by, rows, part)?;
    let all = match parts {
        1 => some,
        _ => once(&some, None, parts, parts)?,
    };
    all.reshape((outer, columns)).map_err(failed)
}

/// A function of each element, in a type.
fn unary(x: &T, f: Unary, dtype: DType) -> Result<T> {
    let from = x.single()?;
    let device = device(&from)?;
    let to = fresh(&device, from.dims(), dtype)?;
    let four = four(from.elem_count(), &[&from])?;
    let name = match (four, dtype) {
        (true, DType::BF16) => "unary_four_bf16",
        (true, _) => "unary_four_f32",
        (false, DType::BF16) => "unary_bf16",
        (false, _) => "unary_f32",
    };
    let n = from.elem_count() / if four { 4 } else { 1 };
    launch!(
        device,
        name,
        blocks(n)?,
        0,
        [n as u32, f as i32, pointer(&from)?, pointer(&to)?]
    )?;
    Ok(x.like(to))
}

/// Whether rows of f32 can be read four elements at a time, in tensors that are row-major.
fn four(n: usize, all: &[&Raw]) -> Result<bool> {
    Ok(n.is_multiple_of(4) && together(all)?)
}

/// Whether tensors of f32 begin where four elements may be read at once.
fn together(all: &[&Raw]) -> Result<bool> {
    for x in all {
        if !pointer(x)?.is_multiple_of(16) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What a modulated norm works on.
struct Modulated {
    x: Raw,
    scale: Raw,
    b: usize,
    l: usize,
    d: usize,
}

impl Modulated {
    fn new(x: &T, scale: &T) -> Result<Self> {
        let (x, _, _) = rows(x)?;
        let (b, l, d) = x.dims3().map_err(failed)?;
        if d > HELD {
            let message = format!("a norm of rows of {d} elements: at most {HELD}");
            return Err(Error::Backend(message));
        }
        let scale = sized(scale, b * d)?;
        Ok(Self { x, scale, b, l, d })
    }
}

/// Heads of x (b, l, h, d), and their lengths.
fn lengths(x: &Raw, length: Option<&T>) -> Result<(usize, Option<Raw>)> {
    let h = x.dims4().map_err(failed)?.2;
    Ok((h, length.map(|length| sized(length, h)).transpose()?))
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
