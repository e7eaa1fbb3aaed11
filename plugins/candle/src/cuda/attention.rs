//! Attention: a few queries against a cache in one kernel; many queries as products with the scores in memory, a few
//! sequences at a time.

use candle_core::DType;
use retort_engine::backend::Mask;
use retort_engine::error::{Error, Result};

use crate::cuda::backend::fill;
use crate::cuda::launch::{SHARED, Steps, launch, warps};
use crate::cuda::product::{Single, product, product_into};
use crate::cuda::tensor::{Raw, Tensor, convert, copy, dense_last, device, fresh, pointer};
use crate::failed;

/// Queries of a sequence that the kernel for few takes.
const FEW: usize = 4;
/// Scores that are in memory at once.
const SCORES: usize = 1 << 28;

/// Sizes of an attention.
#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    h: usize,
    lq: usize,
    lk: usize,
    d: usize,
    /// Keys with the zeros behind them that products in bf16 want: rows that begin where 16 bytes do.
    span: usize,
}

/// The mask as the kernels take it.
struct Masked {
    causal: i32,
    bias: Option<Raw>,
}

impl Masked {
    fn new(mask: &Mask<Tensor>, s: Sizes) -> Result<Self> {
        Ok(match mask {
            Mask::Full => Self {
                causal: 0,
                bias: None,
            },
            Mask::Causal if s.lq <= s.lk => Self {
                causal: 1,
                bias: None,
            },
            Mask::Causal => return Err(Error::Backend("more queries than keys".into())),
            Mask::Bias(bias) => {
                let bias = bias.floats()?;
                let bias = bias.broadcast_as((s.b, s.h, s.lq, s.lk)).map_err(failed)?;
                Self {
                    causal: 0,
                    bias: Some(bias),
                }
            }
        })
    }

    /// Steps and start of the bias from a sequence on; null without one.
    fn arguments(&self, first: usize) -> Result<(Steps, u64)> {
        match &self.bias {
            None => Ok((Steps::default(), 0)),
            Some(bias) => {
                let rest = bias.narrow(0, first, 1).map_err(failed)?;
                Ok((Steps::new(bias.stride()), pointer(&rest)?))
            }
        }
    }
}

fn sizes(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Sizes> {
    let (b, lq, h, d) = q.raw.dims4().map_err(failed)?;
    let lk = k.raw.dims4().map_err(failed)?.1;
    if k.raw.dims() != [b, lk, h, d]
        || v.raw.dims() != [b, lk, h, d]
        || q.raw.elem_count() * lk == 0
    {
        return Err(Error::Backend(format!(
            "attention of {:?}, {:?}, {:?}",
            q.raw.dims(),
            k.raw.dims(),
            v.raw.dims()
        )));
    }
    let span = match q.half {
        true => lk.next_multiple_of(8),
        false => lk,
    };
    Ok(Sizes {
        b,
        h,
        lq,
        lk,
        d,
        span,
    })
}

/// softmax(scale q k^T + mask) v: q (b, lq, h, d), k and v (b, lk, h, d) -> (b, lq, h, d).
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask<Tensor>,
    scale: f64,
) -> Result<Raw> {
    let s = sizes(q, k, v)?;
    let masked = Masked::new(mask, s)?;
    if s.lq <= FEW && shared(s) <= SHARED {
        return few(q, k, v, s, &masked, scale as f32, 0);
    }
    let to = fresh(&device(&q.raw)?, &[s.b, s.h, s.lq, s.d], q.storage())?;
    for (first, count) in parts(s) {
        let p = weights(
            &heads_first(q, first, count, s.lq)?,
            &heads_first(k, first, count, s.span)?,
            first,
            s,
            &masked,
            scale as f32,
            q.storage(),
        )?;
        let v = heads_first(v, first, count, s.span)?;
        let part = to.narrow(0, first, count).map_err(failed)?;
        product_into(&p, &v, false, false, &part, 0.0, Single::Exact)?;
    }
    to.permute((0, 2, 1, 3)).map_err(failed)
}

/// Gradients for q, k and v.
pub fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask<Tensor>,
    scale: f64,
    grad: &Tensor,
) -> Result<[Raw; 3]> {
    let s = sizes(q, k, v)?;
    let masked = Masked::new(mask, s)?;
    let (device, dtype) = (device(&q.raw)?, q.storage());
    let made = |l: usize| fresh(&device, &[s.b, s.h, l, s.d], DType::F32);
    let (dq, dk, dv) = (made(s.lq)?, made(s.span)?, made(s.span)?);
    for (first, count) in parts(s) {
        let own = |x: &Tensor, l: usize| heads_first(x, first, count, l);
        let part = |x: &Raw| x.narrow(0, first, count).map_err(failed);
        let (q, k) = (own(q, s.lq)?, own(k, s.span)?);
        let (v, g) = (own(v, s.span)?, own(grad, s.lq)?);
        let into = |a: &Raw, b: &Raw, turned: bool, to: &Raw| {
            product_into(a, b, turned, false, &part(to)?, 0.0, Single::Exact)
        };
        let p = weights(&q, &k, first, s, &masked, scale as f32, DType::F32)?;
        into(&convert(&p, dtype)?, &g, true, &dv)?;
        let dp = product(&g, &v, false, true)?;
        let ds = fresh(&device, dp.dims(), dtype)?;
        let rows = count * s.h * s.lq;
        let name = match dtype {
            DType::BF16 => "weights_backward_bf16",
            _ => "weights_backward_f32",
        };
        launch!(
            device,
            name,
            warps(rows)?,
            0,
            [
                rows as u32,
                s.span as u32,
                scale as f32,
                pointer(&p)?,
                pointer(&dp)?,
                pointer(&ds)?
            ]
        )?;
        into(&ds, &k, false, &dq)?;
        into(&ds, &q, true, &dk)?;
    }
    let back = |x: Raw, l: usize| {
        let own = x.narrow(2, 0, l).and_then(|x| x.permute((0, 2, 1, 3)));
        own.map_err(failed)
    };
    Ok([back(dq, s.lq)?, back(dk, s.lk)?, back(dv, s.lk)?])
}

/// Parts of the batch whose scores fit: first sequence and how many.
fn parts(s: Sizes) -> impl Iterator<Item = (usize, usize)> {
    let some = (SCORES / (s.h * s.lq * s.span)).clamp(1, s.b);
    (0..s.b)
        .step_by(some)
        .map(move |first| (first, some.min(s.b - first)))
}

/// Some sequences of (b, l, h, d) as operands (n, h, span, d), with zeros behind.
fn heads_first(x: &Tensor, first: usize, count: usize, span: usize) -> Result<Raw> {
    let some = x.raw.narrow(0, first, count);
    let some = some.and_then(|x| x.permute((0, 2, 1, 3))).map_err(failed)?;
    let (n, h, l, d) = some.dims4().map_err(failed)?;
    if l == span {
        return convert(&some, x.storage());
    }
    let to = fresh(&device(&some)?, &[n, h, span, d], x.storage())?;
    fill(&to, 0.0)?;
    copy(&some, &to.narrow(2, 0, l).map_err(failed)?)?;
    Ok(to)
}

/// Attention weights (n, h, lq, span) of sequences from `first` on.
fn weights(
    q: &Raw,
    k: &Raw,
    first: usize,
    s: Sizes,
    masked: &Masked,
    scale: f32,
    dtype: DType,
) -> Result<Raw> {
    let scores = product(q, k, false, true)?;
    let device = device(q)?;
    let to = fresh(&device, scores.dims(), dtype)?;
    let rows = scores.elem_count() / s.span;
    let (steps, bias) = masked.arguments(first)?;
    let name = match dtype {
        DType::BF16 => "weights_bf16",
        _ => "weights_f32",
    };
    launch!(
        device,
        name,
        warps(rows)?,
        0,
        [
            rows as u32,
            s.h as u32,
            s.lq as u32,
            s.lk as u32,
            s.span as u32,
            scale,
            masked.causal,
            steps,
            bias,
            pointer(&scores)?,
            pointer(&to)?
        ]
    )?;
    Ok(to)
}

/// Bytes of shared memory of the kernel for few queries.
fn shared(s: Sizes) -> usize {
    // A thread each for the partial sums.
    4 * (s.lk + s.d + 256)
}

/// What the last query of each sequence, q (b, 1, h, d), sees of caches (b, n, h, d) up to the row in `place` (1).
pub fn next(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    place: &Tensor,
    mask: &Mask<Tensor>,
    scale: f64,
) -> Result<Tensor> {
    let s = sizes(q, k, v)?;
    if shared(s) > SHARED {
        return Err(Error::Backend(format!(
            "a cache of {} positions is more than the kernel holds the scores of",
            s.lk
        )));
    }
    let masked = Masked::new(mask, s)?;
    Ok(q.like(few(
        q,
        k,
        v,
        s,
        &masked,
        scale as f32,
        pointer(&place.raw)?,
    )?))
}

/// `place`: where the row up to which is seen stands, or null.
fn few(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    s: Sizes,
    masked: &Masked,
    scale: f32,
    place: u64,
) -> Result<Raw> {
    let queries = dense_last(&q.floats()?)?;
    let kept = |x: &Tensor| match x.raw.dtype() == q.storage() {
        true => dense_last(&x.raw),
        false => convert(&x.raw, q.storage()),
    };
    let (k, v) = (kept(k)?, kept(v)?);
    let device = device(&queries)?;
    let to = fresh(&device, &[s.b, s.lq, s.h, s.d], q.storage())?;
    let (steps, bias) = masked.arguments(0)?;
    let name = match k.dtype() {
        DType::BF16 => "attend_bf16",
        _ => "attend_f32",
    };
    let walk = |x: &Raw| Steps::new(&x.stride()[..3]);
    launch!(
        device,
        name,
        s.b * s.lq * s.h,
        shared(s),
        [
            s.h as u32,
            s.lq as u32,
            s.lk as u32,
            s.d as u32,
            scale,
            masked.causal,
            walk(&queries),
            walk(&k),
            walk(&v),
            steps,
            bias,
            pointer(&queries)?,
            pointer(&k)?,
            pointer(&v)?,
            pointer(&to)?,
            place
        ]
    )?;
    Ok(to)
}
