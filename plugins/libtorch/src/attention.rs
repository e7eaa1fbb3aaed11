//! Attention and rotary positions with libtorch's fused kernels; on GPUs the backward pass is composed of products.

use retort_engine::backend::{Attention, Mask};
use retort_engine::error::Result;
use tch::Kind;

use crate::backend::{Raw, T, TchResult};
use crate::{Libtorch, failed};

impl Attention for Libtorch {
    fn rope(x: &T, cos: &T, sin: &T) -> Result<T> {
        let run = || {
            let s = x.sizes();
            let pairs = x.inner.f_reshape([s[0], s[1], s[2], s[3] / 2, 2])?;
            // A pair can be viewed as a complex number if it is contiguous in memory at an even offset; otherwise it is
            // copied.
            let complex = match pairs.f_view_as_complex() {
                Ok(complex) => complex,
                Err(_) => pairs
                    .f_contiguous()?
                    .f_to_dtype(Kind::Float, false, true)?
                    .f_view_as_complex()?,
            };
            let turn = Raw::f_complex(&cos.wide()?, &sin.wide()?)?.f_unsqueeze(1)?; // (l, 1, d/2)
            complex.f_mul(&turn)?.f_view_as_real()?.f_reshape(s)
        };
        x.with(run())
    }

    fn attention(q: &T, k: &T, v: &T, mask: &Mask<T>, scale: f64) -> Result<T> {
        let run = || {
            let heads = Heads::new(q, k, v, mask)?;
            Raw::f_scaled_dot_product_attention(
                &heads.q,
                &heads.k,
                &heads.v,
                heads.bias.as_ref(),
                0.0,
                heads.causal,
                scale,
                false,
            )?
            .f_permute([0, 2, 1, 3])
        };
        q.with(run())
    }

    fn attention_backward(
        q: &T,
        k: &T,
        v: &T,
        mask: &Mask<T>,
        scale: f64,
        _y: &T,
        grad: &T,
    ) -> Result<(T, T, T)> {
        let run = || {
            let heads = Heads::new(q, k, v, mask)?;
            let grad = heads_first(&grad.inner.f_to_kind(heads.q.kind())?)?;
            if heads.q.device().is_cuda() {
                heads.composed_backward(&grad, scale)
            } else {
                heads.flash_backward(&grad, scale)
            }
        };
        let back = |x: Raw| {
            q.with(
                x.f_permute([0, 2, 1, 3])
                    .and_then(|x| x.f_to_kind(Kind::Float)),
            )
        };
        let (dq, dk, dv) = run().map_err(failed)?;
        Ok((back(dq)?, back(dk)?, back(dv)?))
    }
}

/// Operands of attention with the heads first, (b, h, l, d), and the mask in libtorch's form.
struct Heads {
    q: Raw,
    k: Raw,
    v: Raw,
    bias: Option<Raw>,
    causal: bool,
}

/// Maximum queries for which a CPU attends in f32: see [`crate::ProductPrecision::Half`].
const FEW: i64 = 4;

impl Heads {
    fn new(q: &T, k: &T, v: &T, mask: &Mask<T>) -> TchResult<Self> {
        let (lq, lk) = (q.sizes()[1], k.sizes()[1]);
        let place = |x: &T| match lq <= FEW && !x.inner.device().is_cuda() {
            true => heads_first(&x.wide()?),
            false => heads_first(&x.operand()?),
        };
        let q = place(q)?;
        let (bias, causal) = match mask {
            Mask::Full => (None, false),
            // A single query sees all keys.
            Mask::Causal if lq == 1 => (None, false),
            Mask::Causal if lq == lk => (None, true),
            // libtorch aligns its causal mask with the first key, not with the last.
            Mask::Causal => {
                let hidden = Raw::f_full([lq, lk], f64::NEG_INFINITY, (q.kind(), q.device()))?;
                (Some(hidden.f_triu(lk - lq + 1)?), false)
            }
            Mask::Bias(bias) => (Some(bias.inner.f_to_kind(q.kind())?), false),
        };
        Ok(Self {
            k: place(k)?,
            v: place(v)?,
            q,
            bias,
            causal,
        })
    }

    /// It never stores the (lq, lk) weights. It needs the softmax's normaliser, so the forward pass is recomputed.
    fn flash_backward(&self, grad: &Raw, scale: f64) -> TchResult<(Raw, Raw, Raw)> {
        let (y, normaliser) = Raw::f_internal_scaled_dot_product_flash_attention_for_cpu(
            &self.q,
            &self.k,
            &self.v,
            0.0,
            self.causal,
            self.bias.as_ref(),
            scale,
        )?;
        Raw::f_internal_scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            &self.q,
            &self.k,
            &self.v,
            &y,
            &normaliser,
            0.0,
            self.causal,
            self.bias.as_ref(),
            scale,
        )
    }

    /// Composed of matrix products, with the softmax in f32.
    fn composed_backward(&self, grad: &Raw, scale: f64) -> TchResult<(Raw, Raw, Raw)> {
        let kind = self.q.kind();
        let turned = |x: &Raw| x.f_transpose(-2, -1);
        let mut scores = self
            .q
            .f_matmul(&turned(&self.k)?)?
            .f_to_kind(Kind::Float)?
            .f_mul_scalar_(scale)?;
        if self.causal {
            let l = self.q.size()[2];
            let options = (Kind::Float, scores.device());
            scores = scores.f_add_(&Raw::f_full([l, l], f64::NEG_INFINITY, options)?.f_triu(1)?)?;
        }
        if let Some(bias) = &self.bias {
            scores = scores.f_add_(bias)?;
        }
        let weights = scores.f_softmax(-1, Kind::Float)?; // (b, h, lq, lk)
        let dv = turned(&weights.f_to_kind(kind)?)?.f_matmul(grad)?;
        let dweights = grad.f_matmul(&turned(&self.v)?)?.f_to_kind(Kind::Float)?;
        let dscores = Raw::f_internal_softmax_backward_data(&dweights, &weights, -1, Kind::Float)?
            .f_mul_scalar_(scale)?
            .f_to_kind(kind)?;
        let dq = dscores.f_matmul(&self.k)?;
        let dk = turned(&dscores)?.f_matmul(&self.q)?;
        Ok((dq, dk, dv))
    }
}

/// (b, l, h, d) -> (b, h, l, d), with contiguous vectors: the fused kernels assume this without checking. GPU kernels read
/// sixteen bytes at a time, and refuse vectors with other alignment.
fn heads_first(x: &Raw) -> TchResult {
    let strides = x.stride();
    let begins =
        strides[..3].iter().all(|s| s % 8 == 0) && (x.data_ptr() as usize).is_multiple_of(16);
    let x = match strides[3] == 1 && (begins || !x.device().is_cuda()) {
        true => x.shallow_clone(),
        false => x.f_contiguous()?,
    };
    x.f_permute([0, 2, 1, 3])
}
