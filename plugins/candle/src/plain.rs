//! The required operations in candle's own terms, on tensors of f32 in host memory.
//!
//! The fused operations keep the engine's composed definitions here, so [`Plain`] serves shapes without a kernel, and is the
//! reference for the kernels.

use candle_core::{Device, Tensor};
use retort_engine::backend::{
    Attention, Binary, Exchange, Layers, Norms, Optimiser, Sampling, Tensors, Unary,
};
use retort_engine::error::{Error, Result};

use crate::{T, failed};

/// Every operation as plain candle calls, nothing fused.
#[derive(Debug, Clone)]
pub struct Plain;

impl Tensors for Plain {
    type Tensor = Tensor;

    fn of(_: &T) -> Self {
        Self
    }

    fn exact(&self) -> Self {
        Self
    }

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        Tensor::from_slice(data, shape, &Device::Cpu).map_err(failed)
    }

    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        Tensor::from_slice(data, shape, &Device::Cpu).map_err(failed)
    }

    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        // Candle broadcasts one element; a tensor that is written in place needs its own memory.
        Tensor::full(value, shape, &Device::Cpu)
            .and_then(|x| x.contiguous())
            .map_err(failed)
    }

    fn to_floats(x: &T) -> Result<Vec<f32>> {
        x.flatten_all().and_then(|x| x.to_vec1()).map_err(failed)
    }

    fn to_indices(x: &T) -> Result<Vec<u32>> {
        x.flatten_all().and_then(|x| x.to_vec1()).map_err(failed)
    }

    fn shape(x: &T) -> Vec<usize> {
        x.dims().to_vec()
    }

    fn reshape(x: &T, shape: &[usize]) -> Result<T> {
        x.reshape(shape).map_err(failed)
    }

    fn permute(x: &T, dims: &[usize]) -> Result<T> {
        x.permute(dims).map_err(failed)
    }

    fn narrow(x: &T, dim: usize, start: usize, len: usize) -> Result<T> {
        x.narrow(dim, start, len).map_err(failed)
    }

    fn cat(xs: &[&T], dim: usize) -> Result<T> {
        Tensor::cat(xs, dim).map_err(failed)
    }

    fn expand(x: &T, shape: &[usize]) -> Result<T> {
        x.broadcast_as(shape).map_err(failed)
    }

    fn unary(x: &T, f: Unary) -> Result<T> {
        match f {
            Unary::Exp => x.exp(),
            Unary::Log => x.log(),
            Unary::Sqrt => x.sqrt(),
            Unary::Square => x.sqr(),
            Unary::Recip => x.recip(),
            Unary::Tanh => x.tanh(),
            Unary::Sigmoid => x
                .neg()
                .and_then(|x| x.exp())
                .and_then(|e| e.affine(1.0, 1.0))
                .and_then(|e| e.recip()),
            Unary::Erf => x.erf(),
            Unary::Silu => x.silu(),
            Unary::GeluTanh => x.gelu(),
            Unary::GeluErf => x.gelu_erf(),
            Unary::Relu => x.relu(),
        }
        .map_err(failed)
    }

    fn binary(a: &T, b: &T, f: Binary) -> Result<T> {
        match f {
            Binary::Add => a.broadcast_add(b),
            Binary::Sub => a.broadcast_sub(b),
            Binary::Mul => a.broadcast_mul(b),
            Binary::Div => a.broadcast_div(b),
            Binary::Max => a.broadcast_maximum(b),
        }
        .map_err(failed)
    }

    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        x.affine(mul, add).map_err(failed)
    }

    fn sum(x: &T, dims: &[usize]) -> Result<T> {
        x.sum_keepdim(dims).map_err(failed)
    }

    fn max_last(x: &T) -> Result<T> {
        x.max_keepdim(x.rank() - 1).map_err(failed)
    }

    fn argmax_last(x: &T) -> Result<T> {
        // Candle returns the first of equal values on the CPU and promises nothing elsewhere, so the lowest index is computed
        // explicitly: the minimum over the index where x is the maximum, and a larger number elsewhere.
        let search = || {
            let last = x.rank() - 1;
            let n = x.dims()[last];
            let ids = Tensor::arange(0, n as u32, x.device())?.broadcast_as(x.shape())?;
            let beyond = ids.zeros_like()?.affine(1.0, n as f64)?;
            let top = x.broadcast_eq(&x.max_keepdim(last)?)?;
            top.where_cond(&ids, &beyond)?.min(last)
        };
        search().map_err(failed)
    }

    fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
        // Candle supports any strides within a matrix and one stride over the batch; anything else is copied.
        let turned = |x: &T, turn: bool| {
            let x = if turn { x.t()? } else { x.clone() };
            let lead = x.rank() - 2;
            let one_step = (1..lead).all(|d| x.stride()[d - 1] == x.dims()[d] * x.stride()[d]);
            if one_step { Ok(x) } else { x.contiguous() }
        };
        let product = || turned(a, ta)?.matmul(&turned(b, tb)?);
        product().map_err(failed)
    }

    fn rows(table: &T, ids: &T) -> Result<T> {
        let gather = || {
            let mut shape = ids.dims().to_vec();
            shape.push(table.dims()[1]);
            table
                .contiguous()?
                .index_select(&ids.flatten_all()?, 0)?
                .reshape(shape)
        };
        gather().map_err(failed)
    }

    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let scatter = || {
            let d = grad.dims()[grad.rank() - 1];
            let grad = grad.contiguous()?.reshape((ids.elem_count(), d))?;
            Tensor::zeros((k, d), grad.dtype(), grad.device())?.index_add(
                &ids.flatten_all()?,
                &grad,
                0,
            )
        };
        scatter().map_err(failed)
    }

    fn pick(x: &T, ids: &T) -> Result<T> {
        let last = x.rank() - 1;
        let gather = || {
            x.contiguous()?
                .gather(&ids.unsqueeze(last)?.contiguous()?, last)?
                .squeeze(last)
        };
        gather().map_err(failed)
    }

    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let last = grad.rank();
        let scatter = || {
            let mut shape = grad.dims().to_vec();
            shape.push(k);
            Tensor::zeros(shape, grad.dtype(), grad.device())?.scatter_add(
                &ids.unsqueeze(last)?.contiguous()?,
                &grad.unsqueeze(last)?.contiguous()?,
                last,
            )
        };
        scatter().map_err(failed)
    }

    fn conv2d(x: &T, w: &T, stride: usize, padding: [usize; 2]) -> Result<T> {
        let run = || padded(x, padding)?.conv2d(&w.contiguous()?, 0, stride, 1, 1);
        run().map_err(failed)
    }

    fn conv2d_backward(
        x: &T,
        w: &T,
        grad: &T,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<T>, Option<T>)> {
        let input = || {
            let size = |d: usize| x.dims()[d] + 2 * padding[d - 2];
            let missing = |d: usize| size(d) - ((grad.dims()[d] - 1) * stride + w.dims()[d]);
            // Candle takes one number for both sides: use the larger one and cut off the excess.
            let dx = grad.contiguous()?.conv_transpose2d(
                &w.contiguous()?,
                0,
                missing(2).max(missing(3)),
                stride,
                1,
            )?;
            dx.narrow(2, padding[0], x.dims()[2])?
                .narrow(3, padding[1], x.dims()[3])
        };
        let kernel = || {
            // dw[o, c] is the correlation of x[:, c] with grad[:, o], whose pixels lie `stride` apart.
            let dw = padded(&x.transpose(0, 1)?, padding)?.conv2d(
                &grad.transpose(0, 1)?.contiguous()?,
                0,
                1,
                stride,
                1,
            )?;
            dw.narrow(2, 0, w.dims()[2])?
                .narrow(3, 0, w.dims()[3])?
                .transpose(0, 1)?
                .contiguous()
        };
        Ok((
            want.0.then(input).transpose().map_err(failed)?,
            want.1.then(kernel).transpose().map_err(failed)?,
        ))
    }

    fn write_(x: &T, dim: usize, start: usize, src: &T) -> Result<()> {
        src.contiguous()
            .and_then(|src| x.slice_set(&src, dim, start))
            .map_err(failed)
    }

    fn assign_(x: &T, src: &T) -> Result<()> {
        if x.dims() != src.dims() {
            return Err(Error::Backend(format!(
                "assign: the shapes {:?} and {:?} differ",
                x.dims(),
                src.dims()
            )));
        }
        if x.rank() == 0 {
            return Self::assign_(
                &x.reshape(1).map_err(failed)?,
                &src.reshape(1).map_err(failed)?,
            );
        }
        Self::write_(x, 0, 0, src)
    }
}

impl Layers for Plain {}
impl Norms for Plain {}
impl Attention for Plain {}
impl Optimiser for Plain {}
impl Exchange for Plain {}
impl Sampling for Plain {}

/// Images (b, c, h, w) padded with zeros, because candle's convolutions take one padding for both directions.
fn padded(x: &T, [high, wide]: [usize; 2]) -> candle_core::Result<T> {
    let pad = |x: T, d: usize, n: usize| match n {
        0 => Ok(x),
        n => x.pad_with_zeros(d, n, n),
    };
    pad(pad(x.contiguous()?, 2, high)?, 3, wide)?.contiguous()
}
