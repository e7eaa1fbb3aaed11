//! Attention, in three ways: a few queries against a cache in one kernel; many queries in bf16 tile by tile; many in f32 as
//! products, with the scores of a few sequences in memory at a time.

use candle_core::{CudaDevice, DType};
use retort_engine::backend::Mask;
use retort_engine::error::{Error, Result};

use crate::cuda::CAPABILITY;
use crate::cuda::kernels::{self, Kernel};
use crate::cuda::launch::{SHARED, counted, launch, warps};
use crate::cuda::product::{F32Products, product, product_into};
use crate::cuda::structures::{Heads, Steps, VisibleKeys};
use crate::cuda::tensor::{Raw, Tensor, convert, dense_last, device, fresh, pointer};
use crate::failed;

/// Maximum queries of a sequence for the few-queries kernel.
const FEW: usize = 4;
/// Maximum scores in memory at once.
const SCORES: usize = 1 << 28;
/// Rows that stay in a block of the tile kernels.
const STAY: usize = 128;
/// Side of the squares of queries and keys by which masks are classified.
const GROUP: usize = 16;

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
            Mask::Causal => {
                return Err(Error::Backend(format!(
                    "causal attention of {} queries to {} keys: expected no more queries than keys",
                    s.lq, s.lk
                )));
            }
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

    /// Strides of the bias, and its start for a sequence; null without a bias.
    fn arguments(&self, first: usize) -> Result<(Steps, u64)> {
        match &self.bias {
            None => Ok((Steps::default(), 0)),
            Some(bias) => {
                let rest = bias.narrow(0, first, 1).map_err(failed)?;
                Ok((Steps::new(bias.stride()), pointer(&rest)?))
            }
        }
    }

    /// The kinds of the bias, where it is the same for all sequences and heads.
    fn kinds(&self, device: &CudaDevice, s: Sizes) -> Result<Option<Raw>> {
        let same = |bias: &&Raw| {
            let steps = bias.stride();
            (s.b == 1 || steps[0] == 0) && (s.h == 1 || steps[1] == 0)
        };
        if self.bias.as_ref().filter(same).is_none() {
            return Ok(None);
        }
        let kinds = [s.lq.div_ceil(GROUP), s.lk.div_ceil(GROUP)];
        let to = fresh(device, &kinds, DType::U32)?;
        let n = to.elem_count();
        launch(
            device,
            kernels::mask_kinds,
            warps(n)?,
            0,
            (n as u32, self.seen(s, None)?, pointer(&to)?),
        )?;
        Ok(Some(to))
    }

    fn seen(&self, s: Sizes, kinds: Option<&Raw>) -> Result<VisibleKeys> {
        let (steps, bias) = self.arguments(0)?;
        Ok(VisibleKeys {
            lq: s.lq as u32,
            lk: s.lk as u32,
            causal: self.causal,
            bias,
            steps,
            kinds: kinds.map_or(Ok(0), pointer)?,
        })
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
    let (masked, scale) = (Masked::new(mask, s)?, scale as f32);
    if s.lq <= FEW && shared(s) <= SHARED {
        return few(q, k, v, s, &masked, scale, 0);
    }
    match tiled(q, s) {
        Some(tiled) => tiled.forward([q, k, v], &masked, scale),
        None => products(q, k, v, s, &masked, scale),
    }
}

/// Gradients for q, k and v; `y` is the result.
pub fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask<Tensor>,
    scale: f64,
    y: &Tensor,
    grad: &Tensor,
) -> Result<[Raw; 3]> {
    let s = sizes(q, k, v)?;
    let (masked, scale) = (Masked::new(mask, s)?, scale as f32);
    match tiled(q, s) {
        Some(tiled) => tiled.backward([q, k, v, y, grad], &masked, scale),
        None => products_backward([q, k, v, grad], s, &masked, scale),
    }
}

/// Kernels for heads of up to so many dimensions. Their arguments are the heads, their dimensions, the scale, q, k, v and the
/// mask, then the other inputs and outputs.
struct Kernels {
    forward: Kernel<(u32, u32, f32, Heads, Heads, Heads, VisibleKeys, u64)>,
    /// The gradient for q. The result and its gradient lie beside q, k and v.
    dq: Kernel<(
        u32,
        u32,
        f32,
        Heads,
        Heads,
        Heads,
        Heads,
        Heads,
        VisibleKeys,
        u64,
        u64,
        u64,
    )>,
    /// Those for k and v. The gradient of the result lies beside q, k and v.
    dkv: Kernel<(
        u32,
        u32,
        f32,
        Heads,
        Heads,
        Heads,
        Heads,
        VisibleKeys,
        u64,
        u64,
        u64,
        u64,
    )>,
}

/// An attention in bf16, tile by tile.
struct Tiled {
    s: Sizes,
    kernels: Kernels,
    /// Rows of a tile.
    tile: usize,
    /// Bytes of shared memory for two tiles of two tensors.
    shared: usize,
}

/// Heads of more than 128 dimensions, which no model has, use products in f32. So does a GPU without bf16 tensor cores.
fn tiled(q: &Tensor, s: Sizes) -> Option<Tiled> {
    let able = CAPABILITY.parse().is_ok_and(|least: u32| least >= 80);
    if !q.half || !able {
        return None;
    }
    let (d, tile, kernels) = match s.d {
        1..=32 => (
            32,
            64,
            Kernels {
                forward: kernels::attention_32,
                dq: kernels::attention_dq_32,
                dkv: kernels::attention_dkv_32,
            },
        ),
        33..=64 => (
            64,
            64,
            Kernels {
                forward: kernels::attention_64,
                dq: kernels::attention_dq_64,
                dkv: kernels::attention_dkv_64,
            },
        ),
        65..=128 => (
            128,
            32,
            Kernels {
                forward: kernels::attention_128,
                dq: kernels::attention_dq_128,
                dkv: kernels::attention_dkv_128,
            },
        ),
        _ => return None,
    };
    Some(Tiled {
        s,
        kernels,
        tile,
        shared: 4 * tile * (d + 8) * 2,
    })
}

impl Tiled {
    fn blocks(&self, l: usize) -> Result<usize> {
        counted(self.s.b * self.s.h * l.div_ceil(STAY))
    }

    fn forward(&self, x: [&Tensor; 3], masked: &Masked, scale: f32) -> Result<Raw> {
        let s = self.s;
        let [q, k, v] = heads(x)?;
        let device = device(&q.0)?;
        let kinds = masked.kinds(&device, s)?;
        let to = fresh(&device, &[s.b, s.lq, s.h, s.d], DType::BF16)?;
        launch(
            &device,
            self.kernels.forward,
            self.blocks(s.lq)?,
            self.shared,
            (
                s.h as u32,
                s.d as u32,
                scale,
                q.1,
                k.1,
                v.1,
                masked.seen(s, kinds.as_ref())?,
                pointer(&to)?,
            ),
        )?;
        Ok(to)
    }

    fn backward(&self, x: [&Tensor; 5], masked: &Masked, scale: f32) -> Result<[Raw; 3]> {
        let s = self.s;
        if x[3].raw.dims() != x[0].raw.dims() || x[4].raw.dims() != x[0].raw.dims() {
            return Err(Error::Backend(format!(
                "attention: a result {:?} with a gradient {:?}",
                x[3].raw.dims(),
                x[4].raw.dims()
            )));
        }
        let [q, k, v, y, g] = heads(x)?;
        let device = device(&q.0)?;
        let kinds = masked.kinds(&device, s)?;
        let seen = masked.seen(s, kinds.as_ref())?;
        let made = |shape: &[usize]| fresh(&device, shape, DType::F32);
        let (logs, backs) = (made(&[s.b, s.h, s.lq])?, made(&[s.b, s.h, s.lq])?);
        let dq = made(&[s.b, s.lq, s.h, s.d])?;
        let (dk, dv) = (made(&[s.b, s.lk, s.h, s.d])?, made(&[s.b, s.lk, s.h, s.d])?);
        launch(
            &device,
            self.kernels.dq,
            self.blocks(s.lq)?,
            self.shared,
            (
                s.h as u32,
                s.d as u32,
                scale,
                q.1,
                k.1,
                v.1,
                y.1,
                g.1,
                seen,
                pointer(&logs)?,
                pointer(&backs)?,
                pointer(&dq)?,
            ),
        )?;
        launch(
            &device,
            self.kernels.dkv,
            self.blocks(s.lk)?,
            // Plus two numbers for each query.
            self.shared + 2 * 2 * 4 * self.tile,
            (
                s.h as u32,
                s.d as u32,
                scale,
                q.1,
                k.1,
                v.1,
                g.1,
                seen,
                pointer(&logs)?,
                pointer(&backs)?,
                pointer(&dk)?,
                pointer(&dv)?,
            ),
        )?;
        Ok([dq, dk, dv])
    }
}

/// Tensors with their strides for the kernels; each keeps its memory alive.
fn heads<const N: usize>(x: [&Tensor; N]) -> Result<[(Raw, Heads); N]> {
    let one = |x: &Tensor| {
        let x = dense_last(&x.raw)?;
        let (start, half) = (pointer(&x)?, x.dtype() == DType::BF16);
        let steps = &x.stride()[..3];
        let fours = x.dims()[3].is_multiple_of(4)
            && start.is_multiple_of(4 * x.dtype().size_in_bytes() as u64)
            && steps.iter().all(|step| step.is_multiple_of(4));
        let heads = Heads {
            start,
            steps: [steps[0] as i64, steps[1] as i64, steps[2] as i64],
            half: half.into(),
            fours: fours.into(),
        };
        Ok::<_, Error>((x, heads))
    };
    let all: Vec<_> = x.into_iter().map(one).collect::<Result<_>>()?;
    all.try_into()
        .map_err(|_| Error::Internal("heads: their number has changed".into()))
}

fn products(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    s: Sizes,
    masked: &Masked,
    scale: f32,
) -> Result<Raw> {
    let to = fresh(&device(&q.raw)?, &[s.b, s.h, s.lq, s.d], DType::F32)?;
    for (first, count) in parts(s) {
        let own = |x: &Tensor| heads_first(x, first, count);
        let p = weights(&own(q)?, &own(k)?, first, s, masked, scale)?;
        let part = to.narrow(0, first, count).map_err(failed)?;
        product_into(&p, &own(v)?, false, false, &part, 0.0, F32Products::Exact)?;
    }
    to.permute((0, 2, 1, 3)).map_err(failed)
}

fn products_backward(x: [&Tensor; 4], s: Sizes, masked: &Masked, scale: f32) -> Result<[Raw; 3]> {
    let device = device(&x[0].raw)?;
    let made = |l: usize| fresh(&device, &[s.b, s.h, l, s.d], DType::F32);
    let (dq, dk, dv) = (made(s.lq)?, made(s.lk)?, made(s.lk)?);
    for (first, count) in parts(s) {
        let own = |x: &Tensor| heads_first(x, first, count);
        let part = |x: &Raw| x.narrow(0, first, count).map_err(failed);
        let (q, k, v, g) = (own(x[0])?, own(x[1])?, own(x[2])?, own(x[3])?);
        let into = |a: &Raw, b: &Raw, turned: bool, to: &Raw| {
            product_into(a, b, turned, false, &part(to)?, 0.0, F32Products::Exact)
        };
        let p = weights(&q, &k, first, s, masked, scale)?;
        into(&p, &g, true, &dv)?;
        let dp = product(&g, &v, false, true)?;
        let ds = fresh(&device, dp.dims(), DType::F32)?;
        let rows = count * s.h * s.lq;
        launch(
            &device,
            kernels::weights_backward,
            warps(rows)?,
            0,
            (
                rows as u32,
                s.lk as u32,
                scale,
                pointer(&p)?,
                pointer(&dp)?,
                pointer(&ds)?,
            ),
        )?;
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
    convert(&some, DType::F32)
}

/// Attention weights (n, h, lq, lk) of sequences from `first` on.
fn weights(q: &Raw, k: &Raw, first: usize, s: Sizes, masked: &Masked, scale: f32) -> Result<Raw> {
    let scores = product(q, k, false, true)?;
    let device = device(q)?;
    let to = fresh(&device, scores.dims(), DType::F32)?;
    let rows = scores.elem_count() / s.lk;
    let (steps, bias) = masked.arguments(first)?;
    launch(
        &device,
        kernels::weights,
        warps(rows)?,
        0,
        (
            rows as u32,
            s.h as u32,
            s.lq as u32,
            s.lk as u32,
            scale,
            masked.causal,
            steps,
            bias,
            pointer(&scores)?,
            pointer(&to)?,
        ),
    )?;
    Ok(to)
}

/// Bytes of shared memory of the kernel for few queries.
fn shared(s: Sizes) -> usize {
    // One thread for each partial sum.
    4 * (s.lk + s.d + 256)
}

/// Attention of the last query of each sequence, q (b, 1, h, d), to caches (b, n, h, d) up to the row in `place` (1).
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
            "a cache of {} positions exceeds the number of scores that the kernel holds",
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

/// `place`: address of the last visible row, or null.
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
    let kernel = match k.dtype() {
        DType::BF16 => kernels::attend_bf16,
        _ => kernels::attend_f32,
    };
    let walk = |x: &Raw| Steps::new(&x.stride()[..3]);
    launch(
        &device,
        kernel,
        s.b * s.lq * s.h,
        shared(s),
        (
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
            place,
        ),
    )?;
    Ok(to)
}
