//! `Cuda` as the engine's backend: views by candle, products by cuBLAS, everything else in kernels of its own.

mod layers;
mod norms;

use std::any::Any;

use candle_core::DType;
use retort_engine::backend::{
    AdamwStep, Attention, Binary, Exchange, FlowSolver, Mask, Optimiser, ReplayState, Sampling,
    Tensors, Truncation, Unary,
};
use retort_engine::error::{Error, Result};

use crate::cuda::arguments::{in_place, rows, together};
use crate::cuda::elementwise::unary;
use crate::cuda::kernels;
use crate::cuda::launch::{blocks, counted, launch};
use crate::cuda::product::{operands, product};
use crate::cuda::structures::{Adamw, Steps, StridedDims};
use crate::cuda::sums::{full, sum};
use crate::cuda::tensor::{Raw, Tensor, copy, dense_last, device, fresh, pointer, to_host, whole};
use crate::cuda::{Cuda, Nccl, attention, convolution, flow, free_memory, graph};
use crate::failed;

type T = Tensor;

/// The NCCL communicator behind the engine's `ranks`.
fn ranks_of(ranks: &dyn Any) -> Result<&Nccl> {
    let other = || {
        Error::Internal("expected ranks that exchange by NCCL, got those of another library".into())
    };
    ranks.downcast_ref().ok_or_else(other)
}

impl Cuda {
    fn put<D: candle_core::WithDType>(&self, data: &[D], shape: &[usize]) -> Result<T> {
        let raw = Raw::from_slice(data, shape, &self.device).map_err(failed)?;
        Ok(Tensor {
            raw,
            half: self.half,
        })
    }
}

impl Tensors for Cuda {
    type Tensor = Tensor;

    fn of(x: &T) -> Self {
        Self {
            device: x.raw.device().clone(),
            half: x.half,
        }
    }

    fn exact(&self) -> Self {
        Self {
            half: false,
            ..self.clone()
        }
    }

    fn free_memory(&self) -> Option<u64> {
        free_memory(&self.device)
    }

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        self.put(data, shape)
    }

    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        self.put(data, shape)
    }

    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        let candle_core::Device::Cuda(device) = &self.device else {
            return Err(Error::Internal(
                "expected a CUDA device, got the host".into(),
            ));
        };
        Ok(Tensor {
            raw: full(device, shape, value)?,
            half: self.half,
        })
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
            .ok_or_else(|| Error::Internal("cat: expected at least one tensor, got none".into()))?;
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
            true => StridedDims::fours(dims, steps[0], steps[1])?,
            false => None,
        };
        let (kernel, n, places) = match fours {
            Some(places) => (kernels::binary_four, n / 4, places),
            None => (
                kernels::binary_one,
                n,
                StridedDims::new(dims, steps[0], steps[1])?,
            ),
        };
        launch(
            &device,
            kernel,
            blocks(n)?,
            0,
            (
                n as u32,
                f as i32,
                places,
                pointer(&left)?,
                pointer(&right)?,
                pointer(&to)?,
            ),
        )?;
        Ok(a.like(to))
    }

    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        let from = x.single()?;
        let (device, n) = (device(&from)?, from.elem_count());
        let to = fresh(&device, from.dims(), DType::F32)?;
        launch(
            &device,
            kernels::affine,
            blocks(n)?,
            0,
            (
                n as u32,
                mul as f32,
                add as f32,
                pointer(&from)?,
                pointer(&to)?,
            ),
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
        launch(
            &device,
            kernels::max_last,
            rows,
            0,
            (k, pointer(&from)?, pointer(&to)?),
        )?;
        Ok(x.like(to))
    }

    fn argmax_last(x: &T) -> Result<T> {
        let (from, rows, k) = rows(x)?;
        let device = device(&from)?;
        let to = fresh(&device, &from.dims()[..from.rank() - 1], DType::U32)?;
        launch(
            &device,
            kernels::argmax_last,
            rows,
            0,
            (k, pointer(&from)?, pointer(&to)?),
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
        let kernel = match from.dtype() {
            DType::BF16 => kernels::rows_bf16,
            _ => kernels::rows_f32,
        };
        launch(
            &device,
            kernel,
            blocks(n)?,
            0,
            (
                n as u32,
                d as u32,
                k as u32,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?,
            ),
        )?;
        Ok(table.like(to))
    }

    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let (from, which) = (grad.single()?, whole(&ids.raw)?);
        let d = from.dims()[from.rank() - 1];
        let (device, n) = (device(&from)?, which.elem_count());
        // A small table has few blocks, so the gradients are divided among more of them.
        let part = match k <= 64 {
            true => n.clamp(1, 256),
            false => n.max(1),
        };
        let parts = n.div_ceil(part).max(1);
        let to = fresh(&device, &[parts, k, d], DType::F32)?;
        launch(
            &device,
            kernels::rows_adjoint,
            counted(parts * k)?,
            0,
            (
                n as u32,
                k as u32,
                d as u32,
                part as u32,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?,
            ),
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
        launch(
            &device,
            kernels::pick,
            blocks(n)?,
            0,
            (
                n as u32,
                k,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?,
            ),
        )?;
        Ok(x.like(to))
    }

    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let (from, which) = (grad.single()?, whole(&ids.raw)?);
        let (device, n) = (device(&from)?, from.elem_count() * k);
        let mut shape = from.dims().to_vec();
        shape.push(k);
        let to = fresh(&device, &shape, DType::F32)?;
        launch(
            &device,
            kernels::pick_adjoint,
            blocks(n)?,
            0,
            (
                n as u32,
                k as u32,
                pointer(&from)?,
                pointer(&which)?,
                pointer(&to)?,
            ),
        )?;
        Ok(grad.like(to))
    }

    fn conv2d(x: &T, w: &T, stride: usize, padding: [usize; 2]) -> Result<T> {
        Ok(x.like(convolution::conv2d(x, w, stride, padding)?))
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
}

impl Attention for Cuda {
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
        launch(
            &device,
            kernels::rope,
            blocks(n)?,
            0,
            (
                n as u32,
                l as u32,
                h as u32,
                (d / 2) as u32,
                Steps::new(&from.stride()[..3]),
                pointer(&from)?,
                pointer(&cosines)?,
                pointer(&sines)?,
                pointer(&to)?,
            ),
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
}

impl Exchange for Cuda {
    fn begin_exchange_(x: &T, root: Option<usize>, ranks: &dyn Any) -> Result<()> {
        ranks_of(ranks)?.begin(&x.raw, root)
    }

    fn end_exchanges(ranks: &dyn Any) -> Result<()> {
        ranks_of(ranks)?.end()
    }
}

impl Optimiser for Cuda {
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
        launch(
            &device,
            kernels::adamw,
            blocks(n)?,
            0,
            (
                n as u32,
                numbers,
                pointer(&p.raw)?,
                pointer(&m.raw)?,
                pointer(&v.raw)?,
                pointer(&g)?,
            ),
        )
    }

    fn ema_(average: &T, x: &T, decay: f64) -> Result<()> {
        let n = in_place(&[average], x)?;
        let x = x.single()?;
        let device = device(&x)?;
        let (keep, rest) = (decay as f32, (1.0 - decay) as f32);
        launch(
            &device,
            kernels::ema,
            blocks(n)?,
            0,
            (n as u32, keep, rest, pointer(&average.raw)?, pointer(&x)?),
        )
    }
}

impl Sampling for Cuda {
    fn repeat(
        kept: &mut ReplayState,
        inputs: &[&T],
        step: &mut dyn FnMut(&[&T]) -> Result<T>,
    ) -> Result<T> {
        graph::repeat(kept, inputs, step)
    }

    fn truncate(logits: &T, truncation: &Truncation) -> Result<T> {
        let (from, n, k) = rows(logits)?;
        let device = device(&from)?;
        let to = fresh(&device, from.dims(), DType::F32)?;
        let keep = match truncation.top_k {
            0 => k,
            keep => keep.min(k as usize) as u32,
        };
        launch(
            &device,
            kernels::truncate,
            n,
            0,
            (
                k,
                truncation.temperature as f32,
                keep,
                truncation.top_p,
                pointer(&from)?,
                pointer(&to)?,
            ),
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
        launch(
            &device,
            kernels::categorical,
            n,
            0,
            (k, pointer(&from)?, pointer(&uniforms)?, pointer(&to)?),
        )?;
        Ok(logits.like(to))
    }

    fn flow_map(logits: &T, noise: &T, codebook: &T, solver: &FlowSolver) -> Result<T> {
        match flow::flow_map(logits, noise, codebook, solver)? {
            Some(ids) => Ok(logits.like(ids)),
            // Codes too long for the kernel: plain operations, also on the GPU.
            None => retort_engine::backend::flow::composed::<Self>(logits, noise, codebook, solver),
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
    let kernel = match keys.dtype() {
        DType::BF16 => kernels::rope_cached_bf16,
        _ => kernels::rope_cached_f32,
    };
    let place = place.map(|(_, place)| pointer(&place.raw)).transpose()?;
    let steps = |x: &Raw| Steps::new(&x.stride()[..3]);
    launch(
        &device,
        kernel,
        blocks(n)?,
        0,
        (
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
            place.unwrap_or(0),
        ),
    )?;
    Ok(q.like(to))
}
