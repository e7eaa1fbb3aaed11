//! Attention: a few queries against a cache in one kernel; many queries as products with the scores in memory, a few
//! sequences at a time.

use candle_core::DType;
use retort_engine::backend::Mask;
use retort_engine::error::{Error, Result};

use crate::cuda::launch::{SHARED, Steps, counted, launch};
use crate::cuda::product::product;
use crate::cuda::tensor::{Raw, Tensor, convert, dense_last, device, fresh, pointer};
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
    Ok(Sizes { b, h, lq, lk, d })
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
        return few(q, k, v, s, &masked, scale as f32);
    }
    let to = fresh(&device(&q.raw)?, &[s.b, s.h, s.lq, s.d], DType::F32)?;
    for (first, count) in parts(s) {
        let own = |x: &Tensor| heads_first(x, first, count);
        let p = weights(
            &own(q)?,
            &own(k)?,
            first,
            s,
            &masked,
            scale as f32,
            q.storage(),
        )?;
        let part = to.narrow(0, first, count).map_err(failed)?;
        crate::cuda::product::product_into(&p, &own(v)?, false, false, &part, 0.0)?;
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
    let (dq, dk, dv) = (made(s.lq)?, made(s.lk)?, made(s.lk)?);
    for (first, count) in parts(s) {
        let own = |x: &Tensor| heads_first(x, first, count);
        let part = |x: &Raw| x.narrow(0, first, count).map_err(failed);
        let (q, k, v, g) = (own(q)?, own(k)?, own(v)?, own(grad)?);
        let into = |a: &Raw, b: &Raw, turned: bool, to: &Raw| {
            crate::cuda::product::product_into(a, b, turned, false, &part(to)?, 0.0)
        };
        let p = weights(&q, &k, first, s, &masked, scale as f32, DType::F32)?;
        into(&convert(&p, dtype)?, &g, true, &dv)?;
        let dp = product(&g, &v, false, true)?;
        let ds = fresh(&device, dp.dims(), DType::F32)?;
        let rows = count * s.h * s.lq;
        launch!(
            device,
            "softmax_backward",
            rows,
            0,
            [
                s.lk as u32,
                scale as f32,
                pointer(&p)?,
                pointer(&dp)?,
                pointer(&ds)?
            ]
        )?;
        let ds = convert(&ds, dtype)?;
        into(&ds, &k, false, &dq)?;
        into(&ds, &q, true, &dk)?;
    }
    let back = |x: Raw| x.permute((0, 2, 1, 3)).map_err(failed);
    Ok([back(dq)?, back(dk)?, back(dv)?])
}

/// Parts of the batch whose scores fit: first sequence and how many.
fn parts(s: Sizes) -> impl Iterator<Item = (usize, usize)> {
    let some = (SCORES / (s.h * s.lq * s.lk)).clamp(1, s.b);
    (0..s.b)
        .step_by(some)
        .map(move |first| (first, some.min(s.b - first)))
}

/// Some sequences of (b, l, h, d) as operands (n, h, l, d).
fn heads_first(x: &Tensor, first: usize, count: usize) -> Result<Raw> {
    let some = x.raw.narrow(0, first, count);
    let some = some.and_then(|x| x.permute((0, 2, 1, 3))).map_err(failed)?;
    convert(&some, x.storage())
}

/// Attention weights (n, h, lq, lk) of sequences from `first` on.
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
    let rows = counted(scores.elem_count())? / s.lk;
    let (steps, bias) = masked.arguments(first)?;
    let name = match dtype {
        DType::BF16 => "weights_bf16",
        _ => "weights_f32",
    };
    launch!(
        device,
        name,
        rows,
        0,
        [
            s.h as u32,
            s.lq as u32,
            s.lk as u32,
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

fn few(q: &Tensor, k: &Tensor, v: &Tensor, s: Sizes, masked: &Masked, scale: f32) -> Result<Raw> {
    let queries = dense_last(&q.floats()?)?;
    let kept = |x: &Tensor| match x.raw.dtype() == q.storage() {
        true => dense_last(&x.raw),
        false => convert(&x.raw, q.storage()),
    };
    let (k, v) = (kept(k)?, kept(v)?);
    let device = device(&queries)?;
    let to = fresh(&device, &[s.b, s.lq, s.h, s.d], DType::F32)?;
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
            pointer(&to)?
        ]
    )?;
    Ok(to)
}
