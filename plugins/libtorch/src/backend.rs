//! `Libtorch` as the engine's backend: the required operations, and the fused ones that libtorch has.

use std::any::Any;

use retort_engine::backend::{
    self, AdamwStep, Binary, Exchange, FlowSolver, Layers, Norms, Optimiser, Sampling, Tensors,
    Truncation, Unary, Window,
};
use retort_engine::error::{Error, Result};
use tch::{Kind, Reduction};

use crate::collective::Ranks;
use crate::{Libtorch, ProductPrecision, Tensor, aten, choice, cuda, failed, flow, host};

pub(crate) type T = Tensor;
pub(crate) type Raw = tch::Tensor;
pub(crate) type TchResult<T = Raw> = tch::Result<T>;

/// No tensor, for libtorch's optional arguments.
const NONE: Option<&Raw> = None;

impl Tensor {
    /// The result of an operation on this tensor.
    pub(crate) fn with(&self, result: TchResult) -> Result<Self> {
        Ok(self.like(result.map_err(failed)?))
    }

    fn like(&self, inner: Raw) -> Self {
        Self {
            inner,
            precision: self.precision,
        }
    }

    /// In f32, the type of everything except products.
    pub(crate) fn wide(&self) -> TchResult {
        match self.inner.kind() {
            Kind::BFloat16 => self.inner.f_to_kind(Kind::Float),
            _ => Ok(self.inner.shallow_clone()),
        }
    }

    /// As an operand of a product.
    pub(crate) fn operand(&self) -> TchResult {
        self.precision.operand(&self.inner)
    }

    /// As an operand of a convolution. GPUs compute these in f32: a decoder is some forty of them deep, and with bf16 its
    /// images would be off by a twentieth of their range.
    fn of_windows(&self) -> TchResult {
        match self.inner.device().is_cuda() {
            true => self.wide(),
            false => self.operand(),
        }
    }

    /// Sizes of the dimensions, as libtorch takes them.
    pub(crate) fn sizes(&self) -> Vec<i64> {
        self.inner.size()
    }
}

impl Libtorch {
    fn put(&self, x: TchResult, shape: &[usize]) -> Result<T> {
        let placed = || x?.f_to_device(self.device)?.f_view(&signed(shape)[..]);
        Ok(Tensor {
            inner: placed().map_err(failed)?,
            precision: self.precision,
        })
    }
}

impl Tensors for Libtorch {
    type Tensor = Tensor;

    fn of(x: &T) -> Self {
        Self {
            device: x.inner.device(),
            precision: x.precision,
        }
    }

    fn exact(&self) -> Self {
        Self {
            precision: ProductPrecision::Full,
            ..*self
        }
    }

    /// The device's total memory: how much others use, and how much libtorch caches, is unknown.
    fn free_memory(&self) -> Option<u64> {
        let tch::Device::Cuda(index) = self.device else {
            return None;
        };
        Some(cuda::devices().ok()?.get(index)?.memory)
    }

    fn floats(&self, data: &[f32], shape: &[usize]) -> Result<T> {
        self.put(Raw::f_from_slice(data), shape)
    }

    fn indices(&self, data: &[u32], shape: &[usize]) -> Result<T> {
        self.put(Raw::f_from_slice(&long(data)), shape)
    }

    fn full(&self, shape: &[usize], value: f32) -> Result<T> {
        let empty = Raw::f_empty(signed(shape), (Kind::Float, self.device));
        self.put(empty.and_then(|mut x| x.f_fill_(f64::from(value))), shape)
    }

    fn factor(x: &T) -> Result<T> {
        x.with(x.precision.factor(&x.inner))
    }

    fn to_floats(x: &T) -> Result<Vec<f32>> {
        let copy = || {
            let wide = x.wide()?;
            let mut data = vec![0.0; wide.numel()];
            wide.f_copy_data(&mut data, wide.numel())?;
            Ok(data)
        };
        copy().map_err(failed)
    }

    fn to_indices(x: &T) -> Result<Vec<u32>> {
        let mut data = vec![0i64; x.inner.numel()];
        x.inner
            .f_copy_data(&mut data, x.inner.numel())
            .map_err(failed)?;
        Ok(data.into_iter().map(|id| id as u32).collect())
    }

    fn shape(x: &T) -> Vec<usize> {
        x.sizes().into_iter().map(|n| n as usize).collect()
    }

    fn reshape(x: &T, shape: &[usize]) -> Result<T> {
        x.with(x.inner.f_reshape(signed(shape)))
    }

    fn permute(x: &T, dims: &[usize]) -> Result<T> {
        x.with(x.inner.f_permute(signed(dims)))
    }

    fn narrow(x: &T, dim: usize, start: usize, len: usize) -> Result<T> {
        x.with(x.inner.f_narrow(dim as i64, start as i64, len as i64))
    }

    fn cat(xs: &[&T], dim: usize) -> Result<T> {
        let raw: Vec<&Raw> = xs.iter().map(|x| &x.inner).collect();
        let first = xs
            .first()
            .ok_or_else(|| Error::Internal("cat of nothing".into()))?;
        first.with(Raw::f_cat(&raw, dim as i64))
    }

    fn expand(x: &T, shape: &[usize]) -> Result<T> {
        x.with(x.inner.f_expand(signed(shape), false))
    }

    fn unary(x: &T, f: Unary) -> Result<T> {
        let run = || {
            let x = x.wide()?;
            match f {
                Unary::Exp => x.f_exp(),
                Unary::Log => x.f_log(),
                Unary::Sqrt => x.f_sqrt(),
                Unary::Square => x.f_square(),
                Unary::Recip => x.f_reciprocal(),
                Unary::Tanh => x.f_tanh(),
                Unary::Sigmoid => x.f_sigmoid(),
                Unary::Erf => x.f_erf(),
                Unary::Silu => x.f_silu(),
                Unary::GeluTanh => x.f_gelu("tanh"),
                Unary::GeluErf => x.f_gelu("none"),
                Unary::Relu => x.f_relu(),
            }
        };
        x.with(run())
    }

    fn binary(a: &T, b: &T, f: Binary) -> Result<T> {
        let run = || {
            let (a, b) = (a.wide()?, b.wide()?);
            match f {
                Binary::Add => a.f_add(&b),
                Binary::Sub => a.f_sub(&b),
                Binary::Mul => a.f_mul(&b),
                Binary::Div => a.f_div(&b),
                Binary::Max => a.f_maximum(&b),
            }
        };
        a.with(run())
    }

    fn affine(x: &T, mul: f64, add: f64) -> Result<T> {
        let run = || {
            let x = x.wide()?;
            match (mul, add) {
                (1.0, add) => x.f_add(&number(add)),
                (mul, 0.0) => x.f_mul(&number(mul)),
                (mul, add) => x.f_mul(&number(mul))?.f_add_scalar_(add),
            }
        };
        x.with(run())
    }

    fn sum(x: &T, dims: &[usize]) -> Result<T> {
        let run = || {
            x.inner
                .f_sum_dim_intlist(&signed(dims)[..], true, Kind::Float)
        };
        x.with(run())
    }

    fn max_last(x: &T) -> Result<T> {
        x.with(x.wide().and_then(|x| x.f_amax([-1], true)))
    }

    fn argmax_last(x: &T) -> Result<T> {
        x.with(x.wide().and_then(|x| x.f_argmax(-1, false)))
    }

    fn matmul(a: &T, b: &T, ta: bool, tb: bool) -> Result<T> {
        let turned = |x: &T, turn: bool| match turn {
            true => x.wide()?.f_transpose(-2, -1),
            false => x.wide(),
        };
        a.with(turned(a, ta).and_then(|a| a.f_matmul(&turned(b, tb)?)))
    }

    fn rows(table: &T, ids: &T) -> Result<T> {
        let found = table.with(Raw::f_embedding(&table.inner, &ids.inner, -1, false, false))?;
        found.with(found.wide())
    }

    fn rows_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        grad.with(Raw::f_embedding_dense_backward(
            &grad.inner,
            &ids.inner,
            k as i64,
            -1,
            false,
        ))
    }

    fn pick(x: &T, ids: &T) -> Result<T> {
        let run = || {
            x.wide()?
                .f_gather(-1, &ids.inner.f_unsqueeze(-1)?, false)?
                .f_squeeze_dim(-1)
        };
        x.with(run())
    }

    fn pick_adjoint(grad: &T, ids: &T, k: usize) -> Result<T> {
        let run = || {
            let mut shape = grad.sizes();
            shape.push(k as i64);
            Raw::f_zeros(shape, (Kind::Float, grad.inner.device()))?.f_scatter_(
                -1,
                &ids.inner.f_unsqueeze(-1)?,
                &grad.inner.f_unsqueeze(-1)?,
            )
        };
        grad.with(run())
    }

    fn conv2d(x: &T, w: &T, stride: usize, padding: [usize; 2]) -> Result<T> {
        x.with(convolved(x, w, NONE, stride, padding))
    }

    fn conv2d_backward(
        x: &T,
        w: &T,
        grad: &T,
        stride: usize,
        padding: [usize; 2],
        want: (bool, bool),
    ) -> Result<(Option<T>, Option<T>)> {
        let operand = |x: &T| x.of_windows().map_err(failed);
        let (dx, dw) = aten::conv2d_backward(
            &operand(x)?,
            &operand(w)?,
            &operand(grad)?,
            stride,
            padding,
            want,
        )?;
        let single = |y: Option<Raw>| y.map(|y| x.with(y.f_to_kind(Kind::Float))).transpose();
        Ok((single(dx)?, single(dw)?))
    }

    fn write_(x: &T, dim: usize, start: usize, src: &T) -> Result<()> {
        let len = Self::shape(src)[dim] as i64;
        x.inner
            .f_narrow(dim as i64, start as i64, len)
            .and_then(|mut part| part.f_copy_(&src.inner))
            .map_err(failed)
    }

    fn assign_(x: &T, src: &T) -> Result<()> {
        if x.sizes() != src.sizes() {
            return Err(Error::Backend(format!(
                "assign: the shapes {:?} and {:?} differ",
                x.sizes(),
                src.sizes()
            )));
        }
        x.inner.shallow_clone().f_copy_(&src.inner).map_err(failed)
    }
}

impl Layers for Libtorch {
    fn conv2d_bias(
        x: &T,
        w: &T,
        bias: &T,
        residual: Option<&T>,
        stride: usize,
        padding: [usize; 2],
    ) -> Result<T> {
        let bias = bias.wide().and_then(|bias| bias.f_reshape([-1]));
        let bias = bias.map_err(failed)?;
        let y = convolved(x, w, Some(&bias), stride, padding);
        // In place: nobody else has seen the result.
        x.with(match residual {
            Some(residual) => y.and_then(|mut y| y.f_add_(&residual.inner)),
            None => y,
        })
    }

    fn max_pool2d(x: &T, window: Window) -> Result<T> {
        x.with(pool(&x.inner, window).map(|(y, _)| y))
    }

    fn max_pool2d_backward(x: &T, grad: &T, window: Window) -> Result<T> {
        let run = || {
            let [size, stride, padding] = sides(window);
            let (_, places) = pool(&x.inner, window)?;
            x.inner.f_max_pool2d_with_indices_backward(
                &grad.inner,
                size,
                stride,
                padding,
                [1, 1],
                false,
                &places,
            )
        };
        x.with(run())
    }

    fn unary_backward(x: &T, y: &T, grad: &T, f: Unary) -> Result<T> {
        let g = &grad.inner;
        let run = || match f {
            Unary::Exp => g.f_mul(&y.inner),
            Unary::Log => g.f_div(&x.wide()?),
            Unary::Sqrt => g.f_div(&y.inner)?.f_mul_scalar_(0.5),
            Unary::Square => g.f_mul(&x.wide()?)?.f_mul_scalar_(2.0),
            Unary::Recip => g.f_mul(&y.inner.f_square()?)?.f_neg_(),
            Unary::Tanh => Raw::f_tanh_backward(g, &y.inner),
            Unary::Sigmoid => Raw::f_sigmoid_backward(g, &y.inner),
            Unary::Erf => {
                let bell = x.wide()?.f_square()?.f_neg_()?.f_exp()?;
                bell.f_mul(g)?
                    .f_mul_scalar_(2.0 / std::f64::consts::PI.sqrt())
            }
            Unary::Silu => x.wide()?.f_silu_backward(g),
            Unary::GeluTanh => x.wide()?.f_gelu_backward(g, "tanh"),
            Unary::GeluErf => x.wide()?.f_gelu_backward(g, "none"),
            Unary::Relu => y.inner.f_threshold_backward(g, 0.0),
        };
        x.with(run())
    }

    fn linear(x: &T, w: &T, bias: Option<&T>) -> Result<T> {
        if let Some(y) = host::linear(&x.inner, &w.inner, bias.map(|b| &b.inner)) {
            return Ok(x.like(y?));
        }
        let run = || {
            let (a, b) = (x.operand()?, w.operand()?);
            if a.kind() == Kind::Float {
                return a.f_linear(&b, bias.map(|b| b.wide()).transpose()?.as_ref());
            }
            let mut shape = x.sizes();
            let y = rounded(&a.f_reshape([-1, b.size()[1]])?, &b.f_transpose(0, 1)?)?;
            if let Some(last) = shape.last_mut() {
                *last = b.size()[0];
            }
            let y = y.f_reshape(shape)?;
            match bias {
                Some(bias) => { y }.f_add_(&bias.inner),
                None => Ok(y),
            }
        };
        x.with(run())
    }

    fn linear_backward(x: Option<&T>, w: Option<&T>, grad: &T) -> Result<(Option<T>, Option<T>)> {
        let flat = |x: &T| {
            let last = x.sizes()[x.sizes().len() - 1];
            x.operand()?.f_reshape([-1, last])
        };
        let g = flat(grad).map_err(failed)?;
        let dx = |w: &T| {
            let mut shape = grad.sizes();
            let end = shape.len() - 1;
            shape[end] = w.sizes()[1];
            rounded(&g, &w.operand()?)?.f_reshape(shape)
        };
        let dw = |x: &T| rounded(&g.f_transpose(0, 1)?, &flat(x)?);
        Ok((
            w.map(|w| grad.with(dx(w))).transpose()?,
            x.map(|x| grad.with(dw(x))).transpose()?,
        ))
    }

    fn softmax(x: &T) -> Result<T> {
        x.with(x.inner.f_softmax(-1, Kind::Float))
    }

    fn softmax_backward(y: &T, grad: &T) -> Result<T> {
        y.with(Raw::f_internal_softmax_backward_data(
            &grad.inner,
            &y.inner,
            -1,
            Kind::Float,
        ))
    }

    fn swiglu(x: &T) -> Result<T> {
        let run = || {
            let (a, b) = halves(&x.inner)?;
            a.f_silu()?.f_mul_(&b)
        };
        x.with(run())
    }

    fn swiglu_backward(x: &T, grad: &T) -> Result<T> {
        let run = || {
            let (a, b) = halves(&x.inner)?;
            let out = Raw::f_empty(x.sizes(), (Kind::Float, x.inner.device()))?;
            let (da, db) = halves(&out)?;
            let _ = grad.inner.f_mul_out(&db, &a.f_silu()?)?;
            let _ = a.f_silu_backward_grad_input(&da, &grad.inner.f_mul(&b)?)?;
            Ok(out)
        };
        x.with(run())
    }

    fn cross_entropy(logits: &T, ids: &T) -> Result<T> {
        logits.with(
            logits
                .inner
                .f_cross_entropy_loss(&ids.inner, NONE, Reduction::None, -100, 0.0),
        )
    }

    fn cross_entropy_backward(logits: &T, ids: &T, grad: &T) -> Result<T> {
        // (softmax - 1 at the id) times the row's gradient
        let run = || {
            let ids = ids.inner.f_unsqueeze(1)?;
            let less = Raw::f_full([1, 1], -1.0, (Kind::Float, grad.inner.device()))?
                .f_expand(ids.size(), false)?;
            logits
                .inner
                .f_softmax(-1, Kind::Float)?
                .f_scatter_add_(1, &ids, &less)?
                .f_mul_(&grad.inner.f_unsqueeze(1)?)
        };
        logits.with(run())
    }
}

impl Norms for Libtorch {
    fn rms_norm(x: &T, w: &T, eps: f64, _: backend::Precision) -> Result<T> {
        let run = || x.wide()?.f_rms_norm(w.sizes(), Some(w.wide()?), eps);
        x.with(run())
    }

    fn rms_norm_backward(x: &T, w: &T, grad: &T, eps: f64) -> Result<(T, T)> {
        let run = || {
            let (g, w) = (&grad.inner, w.wide()?);
            let d = w.numel();
            let r = x
                .inner
                .f_norm_scalaropt_dim(2.0, [-1], true)?
                .f_square_()?
                .f_mul_scalar_(1.0 / d as f64)?
                .f_add_scalar_(eps)?
                .f_rsqrt_()?; // (.., 1)
            let normal = x.inner.f_mul(&r)?;
            let along = g.f_mul(&normal)?;
            let rows: Vec<i64> = (0..along.dim() as i64 - 1).collect();
            let dw = along.f_sum_dim_intlist(&rows[..], false, Kind::Float)?;
            // r (g w - n mean(g w n))
            let mean = along
                .f_matmul(&w)?
                .f_mul_scalar_(-1.0 / d as f64)?
                .f_unsqueeze(-1)?;
            let dx = g.f_mul(&w)?.f_addcmul_(&normal, &mean)?.f_mul_(&r)?;
            Ok((dx, dw))
        };
        let (dx, dw) = run().map_err(failed)?;
        Ok((x.like(dx), x.like(dw)))
    }

    fn layer_norm(x: &T, eps: f64) -> Result<T> {
        let run = || {
            let x = x.wide()?;
            let last = x.size()[x.dim() - 1];
            x.f_layer_norm([last], NONE, NONE, eps, true)
        };
        x.with(run())
    }

    fn layer_norm_backward(x: &T, grad: &T, eps: f64) -> Result<T> {
        Ok(x.like(aten::layer_norm_backward(&x.inner, &grad.inner, eps)?))
    }

    fn group_norm(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        let run = || {
            let (w, bias) = (w.wide()?, bias.wide()?);
            x.wide()?
                .f_group_norm(groups as i64, Some(w), Some(bias), eps, true)
        };
        x.with(run())
    }

    fn group_norm_silu(x: &T, groups: usize, w: &T, bias: &T, eps: f64) -> Result<T> {
        let mut normal = Self::group_norm(x, groups, w, bias, eps)?;
        x.with(normal.inner.f_silu_())
    }

    fn group_norm_backward(x: &T, groups: usize, w: &T, grad: &T, eps: f64) -> Result<(T, T, T)> {
        let w = w.wide().map_err(failed)?;
        let [dx, dw, db] = aten::group_norm_backward(&x.inner, groups, &w, &grad.inner, eps)?;
        Ok((x.like(dx), x.like(dw), x.like(db)))
    }
}

impl Exchange for Libtorch {
    fn begin_exchange_(x: &T, root: Option<usize>, ranks: &dyn Any) -> Result<()> {
        ranks_of(ranks)?.begin(&x.inner, root)
    }

    fn end_exchanges(ranks: &dyn Any) -> Result<()> {
        ranks_of(ranks)?.end()
    }
}

impl Optimiser for Libtorch {
    fn adamw_(p: &T, m: &T, v: &T, g: &T, s: &AdamwStep) -> Result<()> {
        let [mut p, mut m, mut v] = [p, m, v].map(|x| x.inner.shallow_clone());
        let mut run = || {
            let g = match s.grad_scale {
                1.0 => g.inner.shallow_clone(),
                scale => g.inner.f_mul(&number(scale))?,
            };
            let _ = m.f_lerp_(&g, 1.0 - s.beta1)?;
            let _ = v.f_lerp_(&g.f_square()?, 1.0 - s.beta2)?;
            let denominator = v
                .f_sqrt()?
                .f_mul_scalar_(s.correction2.sqrt().recip())?
                .f_add_scalar_(s.eps)?;
            if s.weight_decay != 0.0 {
                let _ = p.f_mul_scalar_(1.0 - s.lr * s.weight_decay)?;
            }
            let scaled = m.f_mul(&number(-s.lr / s.correction1))?;
            p.f_addcdiv_(&scaled, &denominator).map(drop)
        };
        run().map_err(failed)
    }

    fn ema_(average: &T, x: &T, decay: f64) -> Result<()> {
        let mut average = average.inner.shallow_clone();
        average
            .f_lerp_(&x.inner, 1.0 - decay)
            .map(drop)
            .map_err(failed)
    }
}

impl Sampling for Libtorch {
    fn truncate(logits: &T, truncation: &Truncation) -> Result<T> {
        logits.with(choice::truncate(&logits.inner, truncation))
    }

    fn categorical(logits: &T, uniforms: &[f64]) -> Result<T> {
        logits.with(choice::categorical(&logits.inner, uniforms))
    }

    fn flow_map(logits: &T, noise: &T, codebook: &T, solver: &FlowSolver) -> Result<T> {
        if let Some(ids) = host::flow_map(&logits.inner, &noise.inner, &codebook.inner, solver) {
            return Ok(logits.like(ids?));
        }
        let run = || flow::flow_map(&logits.inner, &noise.wide()?, &codebook.wide()?, solver);
        logits.with(run())
    }
}

/// A convolution in f32, plus a bias (o), which is not rounded.
fn convolved(x: &T, w: &T, bias: Option<&Raw>, stride: usize, padding: [usize; 2]) -> TchResult {
    let (x, w) = (x.of_windows()?, w.of_windows()?);
    let (stride, padding) = ([stride as i64; 2], padding.map(|n| n as i64));
    let convolve = |bias: Option<&Raw>| x.f_conv2d(&w, bias, stride, padding, [1, 1], 1);
    match bias {
        Some(bias) if x.kind() != Kind::Float => convolve(NONE)?
            .f_to_kind(Kind::Float)?
            .f_add_(&bias.f_view([-1, 1, 1])?),
        bias => convolve(bias)?.f_to_kind(Kind::Float),
    }
}

/// A product of operands, (n, i) and (i, o), with an f32 result. GPUs accumulate in f32 and need not round it first.
fn rounded(a: &Raw, b: &Raw) -> TchResult {
    match a.device().is_cuda() && a.kind() != Kind::Float {
        true => a.f_mm_dtype(b, Kind::Float),
        false => a.f_mm(b)?.f_to_kind(Kind::Float),
    }
}

/// A number as a tensor, because the variants that take a number panic in tch when memory is short.
fn number(x: f64) -> Raw {
    Raw::from(x)
}

/// The maximum of each window, and its position.
fn pool(x: &Raw, window: Window) -> TchResult<(Raw, Raw)> {
    let [size, stride, padding] = sides(window);
    x.f_max_pool2d_with_indices(size, stride, padding, [1, 1], false)
}

fn sides(window: Window) -> [[i64; 2]; 3] {
    [window.size, window.stride, window.padding].map(|n| [n as i64; 2])
}

/// Both halves of the last dimension.
fn halves(x: &Raw) -> TchResult<(Raw, Raw)> {
    let half = x.size()[x.dim() - 1] / 2;
    Ok((x.f_narrow(-1, 0, half)?, x.f_narrow(-1, half, half)?))
}

/// The process group behind the engine's `ranks`.
fn ranks_of(ranks: &dyn Any) -> Result<&Ranks> {
    let other = || Error::Internal("ranks of another library".into());
    ranks.downcast_ref().ok_or_else(other)
}

fn signed(sizes: &[usize]) -> Vec<i64> {
    sizes.iter().map(|&n| n as i64).collect()
}

fn long(ids: &[u32]) -> Vec<i64> {
    ids.iter().map(|&id| i64::from(id)).collect()
}
