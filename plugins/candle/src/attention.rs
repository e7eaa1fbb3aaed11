//! Attention, forward and backward, one head at a time: the scores of a block of queries live in the cache and never
//! in memory, masked keys are skipped, and any view of a packed projection serves as input. Queries and keys may be rotated
//! on their way into the cache.

mod small_product;

use rayon::prelude::*;
use retort_engine::backend::Mask;
use retort_engine::error::{Error, Result};
use retort_kernels::lanes::{add_scaled, dot, widest};

use crate::attention::small_product::{Operand, TILE, tiles};
use crate::layout::{cat, rows, whole};
use crate::rows::by_rows;
use crate::softmax::exponentials;
use crate::view::{floats, fresh, tensor};
use crate::{T, failed};

/// Sequences from which on a task computes whole sequences; with fewer there is a task for each head.
const MANY: usize = 8;

/// Rotates interleaved pairs: x (b, l, h, d), cos and sin (l, d/2).
pub fn rope(x: &T, cos: &T, sin: &T) -> Result<T> {
    let (x, cos, sin) = (&rows(x)?, &whole(cos)?, &whole(sin)?);
    let (_, l, h, d) = x.dims4().map_err(failed)?;
    let (shape, step) = (x.dims().to_vec(), x.stride().to_vec());
    floats!(x, cos, sin);
    let mut y = fresh(&shape);
    by_rows(
        &mut y,
        h * d,
        #[inline(always)]
        |first, out| {
            for (i, out) in out.chunks_exact_mut(h * d).enumerate() {
                let (b, at) = ((first + i) / l, (first + i) % l);
                let (cos, sin) = (&cos[at * d / 2..][..d / 2], &sin[at * d / 2..][..d / 2]);
                for (head, out) in out.chunks_exact_mut(d).enumerate() {
                    let x = &x[b * step[0] + at * step[1] + head * step[2]..][..d];
                    rotate(out, x, cos, sin);
                }
            }
        },
    );
    tensor(y, &shape)
}

#[inline(always)]
fn rotate(out: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32]) {
    let (out, x) = (out.as_chunks_mut::<2>().0, x.as_chunks::<2>().0);
    for ((out, x), (&c, &s)) in out.iter_mut().zip(x).zip(cos.iter().zip(sin)) {
        *out = [x[0].mul_add(c, -(x[1] * s)), x[0].mul_add(s, x[1] * c)];
    }
}

/// The adjoint of [`rotate`], in place: the rotation by the opposite angle.
#[inline(always)]
fn rotate_back(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let x = x.as_chunks_mut::<2>().0;
    for (x, (&c, &s)) in x.iter_mut().zip(cos.iter().zip(sin)) {
        *x = [x[0].mul_add(c, x[1] * s), x[0].mul_add(-s, x[1] * c)];
    }
}

/// softmax(scale q k^T + mask) v: q (b, lq, h, d), k and v (b, lk, h, d) -> (b, lq, h, d).
pub fn attention(q: &T, k: &T, v: &T, mask: &Mask<T>, scale: f64) -> Result<T> {
    attend([q, k, v], None, mask, scale)
}

/// The same of queries and keys that are rotated first, by cos and sin (l, d/2) each; d is even.
pub fn rotated_attention(qkv: [&T; 3], tables: [&T; 2], mask: &Mask<T>, scale: f64) -> Result<T> {
    attend(qkv, Some(tables), mask, scale)
}

fn attend([q, k, v]: [&T; 3], tables: Option<[&T; 2]>, mask: &Mask<T>, scale: f64) -> Result<T> {
    let problem = Problem::new(q, k, v, mask, scale)?;
    let (q, k, v) = (&rows(q)?, &rows(k)?, &rows(v)?);
    let steps = [q, k, v].map(Strides::of);
    let (bias, bias_step) = problem.bias(mask)?;
    let shape = q.dims().to_vec();
    let [cos, sin] = whole_tables(tables)?;
    floats!(q, k, v, bias, cos, sin);
    let half = problem.d / 2;
    let rotation = tables.map(|_| Rotation { cos, sin, half });
    let mut y = fresh(&shape);
    let (wide, heads) = (problem.d * problem.h, problem.h);
    let one = |scratch: &mut Scratch, b: usize, h: usize, y: &mut [f32], y_row: usize| {
        let q = steps[0].head(q, b, h).rotated(rotation);
        let k = steps[1].head(k, b, h).rotated(rotation);
        let v = steps[2].head(v, b, h);
        let bias = &bias[b * bias_step[0] + h * bias_step[1]..];
        widest(
            #[inline(always)]
            || match problem.lq {
                1 if rotation.is_none() => problem.single(scratch, q, k, v, bias, y),
                _ => problem.forward(scratch, q, k, v, bias, y, y_row),
            },
        );
    };
    if problem.b >= MANY {
        y.par_chunks_mut(problem.lq * wide)
            .enumerate()
            .with_min_len(problem.grain())
            .for_each_init(Scratch::default, |scratch, (b, y)| {
                for h in 0..heads {
                    one(scratch, b, h, &mut y[h * problem.d..], wide);
                }
            });
        return tensor(y, &shape);
    }
    // Few sequences: a task per head, each writing its own block.
    y.par_chunks_mut(problem.lq * problem.d)
        .enumerate()
        .for_each_init(Scratch::default, |scratch, (i, y)| {
            one(scratch, i / heads, i % heads, y, problem.d);
        });
    heads_last(y, &problem, problem.lq)
}

/// Gradients of [`attention`] for q, k and v; `y` is its result.
pub fn attention_backward(
    q: &T,
    k: &T,
    v: &T,
    mask: &Mask<T>,
    scale: f64,
    y: &T,
    grad: &T,
) -> Result<(T, T, T)> {
    gradients([q, k, v], None, mask, scale, [y, grad])
}

/// Gradients of [`rotated_attention`] for queries, keys and values, beside each other: (b, l, 3 h d).
pub fn rotated_attention_backward(
    qkv: [&T; 3],
    tables: [&T; 2],
    mask: &Mask<T>,
    scale: f64,
    [y, grad]: [&T; 2],
) -> Result<T> {
    let (b, l, h, d) = qkv[0].dims4().map_err(failed)?;
    if b >= MANY {
        return packed_gradients(qkv, tables, mask, scale, [y, grad]);
    }
    let (dq, dk, dv) = gradients(qkv, Some(tables), mask, scale, [y, grad])?;
    let flat = |x: T| x.reshape((b, l, h * d)).map_err(failed);
    cat(&[&flat(dq)?, &flat(dk)?, &flat(dv)?], 2)
}

/// Gradients for queries, keys and values, each (b, l, h, d).
fn gradients(
    qkv: [&T; 3],
    tables: Option<[&T; 2]>,
    mask: &Mask<T>,
    scale: f64,
    outcome: [&T; 2],
) -> Result<(T, T, T)> {
    let (q_shape, k_shape) = (qkv[0].dims().to_vec(), qkv[1].dims().to_vec());
    let (mut dq, mut dk, mut dv) = (fresh(&q_shape), fresh(&k_shape), fresh(&k_shape));
    let problem = with_heads(qkv, tables, mask, scale, outcome, |problem, one| {
        let (d, heads, is_many) = (problem.d, problem.h, problem.b >= MANY);
        // Many sequences: a task per sequence; else a task per head, each writing its own block.
        let row = if is_many { heads * d } else { d };
        dq.par_chunks_mut(problem.lq * row)
            .zip(
                dk.par_chunks_mut(problem.lk * row)
                    .zip(dv.par_chunks_mut(problem.lk * row)),
            )
            .enumerate()
            .with_min_len(if is_many { problem.grain() } else { 1 })
            .for_each_init(Scratch::default, |scratch, (i, (dq, (dk, dv)))| {
                if is_many {
                    for h in 0..heads {
                        let parts = [&mut dq[h * d..], &mut dk[h * d..], &mut dv[h * d..]];
                        one(scratch, i, h, Gradients::Apart { parts, row });
                    }
                } else {
                    let parts = [dq, dk, dv];
                    let (sequence, h) = (i / heads, i % heads);
                    one(scratch, sequence, h, Gradients::Apart { parts, row });
                }
            });
    })?;
    if problem.b >= MANY {
        return Ok((
            tensor(dq, &q_shape)?,
            tensor(dk, &k_shape)?,
            tensor(dv, &k_shape)?,
        ));
    }
    Ok((
        heads_last(dq, &problem, problem.lq)?,
        heads_last(dk, &problem, problem.lk)?,
        heads_last(dv, &problem, problem.lk)?,
    ))
}

/// Gradients for queries, keys and values of many sequences, beside each other: (b, l, 3 h d).
fn packed_gradients(
    qkv: [&T; 3],
    tables: [&T; 2],
    mask: &Mask<T>,
    scale: f64,
    outcome: [&T; 2],
) -> Result<T> {
    let (b, l, heads, d) = qkv[0].dims4().map_err(failed)?;
    let (part, row, shape) = (heads * d, 3 * heads * d, [b, l, 3 * heads * d]);
    let mut all = fresh(&shape);
    with_heads(qkv, Some(tables), mask, scale, outcome, |problem, one| {
        all.par_chunks_mut(l * row)
            .enumerate()
            .with_min_len(problem.grain())
            .for_each_init(Scratch::default, |scratch, (b, all)| {
                for h in 0..heads {
                    let all = &mut all[h * d..];
                    one(scratch, b, h, Gradients::Packed { all, part, row });
                }
            });
    })?;
    tensor(all, &shape)
}

/// Computes the gradients of a head of a sequence, by their numbers.
type OneHead<'a> = &'a (dyn Fn(&mut Scratch, usize, usize, Gradients<'_>) + Sync);

/// Gives `f` the function that computes one head's gradients; `outcome` are the result of attention and its gradient.
fn with_heads(
    [q, k, v]: [&T; 3],
    tables: Option<[&T; 2]>,
    mask: &Mask<T>,
    scale: f64,
    [y, grad]: [&T; 2],
    f: impl FnOnce(&Problem, OneHead<'_>),
) -> Result<Problem> {
    let problem = Problem::new(q, k, v, mask, scale)?;
    let (q, k, v) = (&rows(q)?, &rows(k)?, &rows(v)?);
    let (y, grad) = (&rows(y)?, &rows(grad)?);
    let steps = [q, k, v, y, grad].map(Strides::of);
    let (bias, bias_step) = problem.bias(mask)?;
    let [cos, sin] = whole_tables(tables)?;
    floats!(q, k, v, y, grad, bias, cos, sin);
    let half = problem.d / 2;
    let rotation = tables.map(|_| Rotation { cos, sin, half });
    f(&problem, &|scratch, b, h, out| {
        let heads = Heads {
            q: steps[0].head(q, b, h).rotated(rotation),
            k: steps[1].head(k, b, h).rotated(rotation),
            v: steps[2].head(v, b, h),
            y: steps[3].head(y, b, h),
            g: steps[4].head(grad, b, h),
        };
        let bias = &bias[b * bias_step[0] + h * bias_step[1]..];
        widest(
            #[inline(always)]
            || problem.backward(scratch, heads, bias, out),
        );
    });
    Ok(problem)
}

/// Tables of rotary positions, row-major; a single dummy element each without them.
fn whole_tables(tables: Option<[&T; 2]>) -> Result<[T; 2]> {
    match tables {
        Some([cos, sin]) => Ok([whole(cos)?, whole(sin)?]),
        None => {
            let none = tensor(vec![0.0], &[1])?;
            Ok([none.clone(), none])
        }
    }
}

/// (b, h, l, d) in memory -> (b, l, h, d)
fn heads_last(data: Vec<f32>, problem: &Problem, l: usize) -> Result<T> {
    let y = tensor(data, &[problem.b, problem.h, l, problem.d])?;
    whole(&y.transpose(1, 2).map_err(failed)?)
}

/// Sizes and mask of one call.
struct Problem {
    b: usize,
    lq: usize,
    lk: usize,
    h: usize,
    d: usize,
    causal: bool,
    biased: bool,
    scale: f32,
}

/// Rotary positions: tables with rows of `half` elements.
#[derive(Clone, Copy)]
struct Rotation<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
}

impl<'a> Rotation<'a> {
    /// cos and sin of a position.
    #[inline(always)]
    fn at(self, i: usize) -> (&'a [f32], &'a [f32]) {
        let row = i * self.half..(i + 1) * self.half;
        (&self.cos[row.clone()], &self.sin[row])
    }
}

/// One head's rows: where they begin and how far apart they are, and by what they are rotated before they are used.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    step: usize,
    rotation: Option<Rotation<'a>>,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn at(self, i: usize, d: usize) -> &'a [f32] {
        &self.data[i * self.step..][..d]
    }

    /// The rows from a number on.
    #[inline(always)]
    fn starting_at(self, first: usize) -> Self {
        let rotation = self.rotation.map(|rotation| Rotation {
            cos: &rotation.cos[first * rotation.half..],
            sin: &rotation.sin[first * rotation.half..],
            ..rotation
        });
        Self {
            data: &self.data[first * self.step..],
            step: self.step,
            rotation,
        }
    }

    /// Rows that lie next to each other.
    #[inline(always)]
    fn packed(data: &'a [f32], step: usize) -> Self {
        let rotation = None;
        Self {
            data,
            step,
            rotation,
        }
    }

    /// The same, rotated.
    fn rotated(self, rotation: Option<Rotation<'a>>) -> Self {
        Self { rotation, ..self }
    }
}

#[derive(Clone, Copy)]
struct Heads<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    y: Rows<'a>,
    g: Rows<'a>,
}

/// Where one head's gradients for queries, keys and values go, rows `row` apart.
enum Gradients<'a> {
    Apart {
        parts: [&'a mut [f32]; 3],
        row: usize,
    },
    /// From one of the three to the next it is `part` elements.
    Packed {
        all: &'a mut [f32],
        part: usize,
        row: usize,
    },
}

impl Gradients<'_> {
    /// Writes row i of one of the three.
    #[inline(always)]
    fn put(&mut self, which: usize, i: usize, x: &[f32]) {
        let to = match self {
            Self::Apart { parts, row } => &mut parts[which][i * *row..],
            Self::Packed { all, part, row } => &mut all[which * *part + i * *row..],
        };
        to[..x.len()].copy_from_slice(x);
    }
}

/// Strides of a (b, l, h, d) tensor.
#[derive(Clone, Copy)]
struct Strides([usize; 3]);

impl Strides {
    fn of(x: &T) -> Self {
        let s = x.stride();
        Self([s[0], s[1], s[2]])
    }

    fn head<'a>(&self, data: &'a [f32], b: usize, h: usize) -> Rows<'a> {
        Rows {
            data: &data[b * self.0[0] + h * self.0[2]..],
            step: self.0[1],
            rotation: None,
        }
    }
}

/// One thread's working memory, kept from head to head.
#[derive(Default)]
struct Scratch {
    /// Scaled queries of a block, padded: (block, dp)
    q: Vec<f32>,
    /// Keys, transposed: (d, lkp)
    kt: Vec<f32>,
    /// Keys: (lk, dp)
    k: Vec<f32>,
    /// Values transposed (d, lkp) backward; values (lk, dp) forward.
    v: Vec<f32>,
    /// Scores, then weights: (block, lkp)
    p: Vec<f32>,
    /// Gradient of the scores: (block, lkp)
    ds: Vec<f32>,
    /// Gradient of the result, padded: (block, dp)
    g: Vec<f32>,
    /// Result of a block: (block, dp)
    y: Vec<f32>,
    /// Gradient of the keys: (lk, dp)
    dk: Vec<f32>,
    /// Gradient of the values: (lk, dp)
    dv: Vec<f32>,
}

impl Problem {
    fn new(q: &T, k: &T, v: &T, mask: &Mask<T>, scale: f64) -> Result<Self> {
        let (b, lq, h, d) = q.dims4().map_err(failed)?;
        let lk = k.dims4().map_err(failed)?.1;
        if k.dims() != [b, lk, h, d] || v.dims() != k.dims() {
            return Err(Error::Backend(format!(
                "attention: q {:?}, k {:?}, v {:?}",
                q.dims(),
                k.dims(),
                v.dims()
            )));
        }
        let causal = matches!(mask, Mask::Causal);
        if causal && lk < lq {
            return Err(Error::Backend(format!(
                "attention: {lq} causal queries, {lk} keys"
            )));
        }
        Ok(Self {
            b,
            lq,
            lk,
            h,
            d,
            causal,
            biased: matches!(mask, Mask::Bias(_)),
            scale: scale as f32,
        })
    }

    /// The bias: a matrix (lq, lk) for each sequence and head that has its own, and the steps between them. A single dummy
    /// element without a bias.
    fn bias(&self, mask: &Mask<T>) -> Result<(T, [usize; 2])> {
        let Mask::Bias(bias) = mask else {
            return Ok((tensor(vec![0.0], &[1])?, [0, 0]));
        };
        let (b, h) = match bias.dims() {
            &[b, h, ..] if bias.rank() == 4 => (b, h),
            _ => (1, 1),
        };
        if ![1, self.b].contains(&b) || ![1, self.h].contains(&h) {
            return Err(Error::Backend(format!(
                "attention: a bias {:?} for {} sequences with {} heads",
                bias.dims(),
                self.b,
                self.h
            )));
        }
        let square = self.lq * self.lk;
        let step = [
            if b == 1 { 0 } else { h * square },
            if h == 1 { 0 } else { square },
        ];
        let bias = bias
            .broadcast_as((b, h, self.lq, self.lk))
            .and_then(|x| x.contiguous())
            .map_err(failed)?;
        Ok((bias, step))
    }

    /// Sequences per task, so that a task is worth its overhead.
    fn grain(&self) -> usize {
        (128 * 1024 / (self.lq * self.lk * self.d * self.h)).clamp(1, 64)
    }

    /// Queries per block: few under a causal mask, because a block computes all keys up to those of its last query.
    fn block(&self) -> usize {
        if self.causal && self.lk <= 128 { 8 } else { 32 }
    }

    /// Keys a query sees.
    #[inline(always)]
    fn seen(&self, query: usize) -> usize {
        if self.causal {
            self.lk - self.lq + query + 1
        } else {
            self.lk
        }
    }

    fn padded(&self) -> (usize, usize) {
        (
            self.lk.next_multiple_of(TILE),
            self.d.next_multiple_of(TILE),
        )
    }

    /// One query (a step of generation): plain inner products without packing.
    #[inline(always)]
    fn single(
        &self,
        scratch: &mut Scratch,
        q: Rows<'_>,
        k: Rows<'_>,
        v: Rows<'_>,
        bias: &[f32],
        y: &mut [f32],
    ) {
        let d = self.d;
        let q = q.at(0, d);
        let p = &mut scratch.p;
        p.clear();
        p.extend((0..self.lk).map(|j| {
            let score = self.scale * dot(q, k.at(j, d));
            if self.biased { score + bias[j] } else { score }
        }));
        let total = exponentials(p);
        let y = &mut y[..d];
        y.fill(0.0);
        for (j, &p) in p.iter().enumerate() {
            add_scaled(y, p, v.at(j, d));
        }
        y.iter_mut().for_each(|y| *y /= total);
    }

    /// All queries of one head.
    #[inline(always)]
    #[expect(
        clippy::too_many_arguments,
        reason = "the inputs of attention, and where to write"
    )]
    fn forward(
        &self,
        scratch: &mut Scratch,
        q: Rows<'_>,
        k: Rows<'_>,
        v: Rows<'_>,
        bias: &[f32],
        out: &mut [f32],
        out_row: usize,
    ) {
        let (lkp, dp) = self.padded();
        let mut k = k;
        if k.rotation.is_some() {
            pack(&mut scratch.k, k, self.lk, self.d, dp, 1.0);
            k = Rows::packed(&scratch.k, dp);
        }
        pack_transposed(&mut scratch.kt, k, self.lk, self.d, lkp);
        pack(&mut scratch.v, v, self.lk, self.d, dp, 1.0);
        for first in (0..self.lq).step_by(self.block()) {
            let n = self.block().min(self.lq - first);
            self.weights(scratch, q, bias, first, n);
            let seen = self.seen(first + n - 1);
            scratch.y.resize(n * dp, 0.0);
            let a = Operand::rows(&scratch.p, lkp);
            tiles::<false>(&mut scratch.y, dp, a, &scratch.v, dp, (n, dp, seen));
            for i in 0..n {
                out[(first + i) * out_row..][..self.d]
                    .copy_from_slice(&scratch.y[i * dp..][..self.d]);
            }
        }
    }

    /// Weights of the queries first..first+n in `scratch.p`, zero where masked.
    #[inline(always)]
    fn weights(&self, scratch: &mut Scratch, q: Rows<'_>, bias: &[f32], first: usize, n: usize) {
        let (lkp, dp) = self.padded();
        pack(
            &mut scratch.q,
            q.starting_at(first),
            n,
            self.d,
            dp,
            self.scale,
        );
        let wide = self.seen(first + n - 1).next_multiple_of(TILE);
        scratch.p.resize(n * lkp, 0.0);
        let a = Operand::rows(&scratch.q, dp);
        tiles::<false>(&mut scratch.p, lkp, a, &scratch.kt, lkp, (n, wide, self.d));
        for i in 0..n {
            let seen = self.seen(first + i);
            let (p, rest) = scratch.p[i * lkp..][..wide].split_at_mut(seen);
            if self.biased {
                add_scaled(p, 1.0, &bias[(first + i) * self.lk..][..seen]);
            }
            let scale = 1.0 / exponentials(p);
            p.iter_mut().for_each(|p| *p *= scale);
            rest.fill(0.0);
        }
    }

    /// Gradients of one head. With p the weights: dv = p^T g, ds = p (g v^T - sum(g y)), dq = scale ds k,
    /// dk = scale ds^T q.
    #[inline(always)]
    fn backward(
        &self,
        scratch: &mut Scratch,
        heads: Heads<'_>,
        bias: &[f32],
        mut out: Gradients<'_>,
    ) {
        let (d, (lkp, dp)) = (self.d, self.padded());
        pack(&mut scratch.k, heads.k, self.lk, d, dp, 1.0);
        let k = Rows::packed(&scratch.k, dp);
        pack_transposed(&mut scratch.kt, k, self.lk, d, lkp);
        pack_transposed(&mut scratch.v, heads.v, self.lk, d, lkp);
        for x in [&mut scratch.dk, &mut scratch.dv] {
            x.clear();
            x.resize(self.lk * dp, 0.0);
        }
        for first in (0..self.lq).step_by(self.block()) {
            let n = self.block().min(self.lq - first);
            self.weights(scratch, heads.q, bias, first, n);
            pack(&mut scratch.g, heads.g.starting_at(first), n, d, dp, 1.0);
            let seen = self.seen(first + n - 1);
            let wide = seen.next_multiple_of(TILE);
            scratch.ds.resize(n * lkp, 0.0);
            let a = Operand::rows(&scratch.g, dp);
            tiles::<false>(&mut scratch.ds, lkp, a, &scratch.v, lkp, (n, wide, d));
            for i in 0..n {
                let along = dot(heads.g.at(first + i, d), heads.y.at(first + i, d));
                let p = &scratch.p[i * lkp..][..wide];
                for (ds, &p) in scratch.ds[i * lkp..][..wide].iter_mut().zip(p) {
                    *ds = p * (*ds - along);
                }
            }
            let p = Operand::transposed(&scratch.p, lkp);
            tiles::<true>(&mut scratch.dv, dp, p, &scratch.g, dp, (seen, dp, n));
            let ds = Operand::transposed(&scratch.ds, lkp);
            tiles::<true>(&mut scratch.dk, dp, ds, &scratch.q, dp, (seen, dp, n));
            scratch.y.resize(n * dp, 0.0);
            let ds = Operand::rows(&scratch.ds, lkp);
            tiles::<false>(&mut scratch.y, dp, ds, &scratch.k, dp, (n, dp, seen));
            for i in 0..n {
                let dq = &mut scratch.y[i * dp..][..d];
                dq.iter_mut().for_each(|dq| *dq *= self.scale);
                if let Some(rotation) = heads.q.rotation {
                    let (cos, sin) = rotation.at(first + i);
                    rotate_back(dq, cos, sin);
                }
                out.put(0, first + i, dq);
            }
        }
        for j in 0..self.lk {
            let dk = &mut scratch.dk[j * dp..][..d];
            if let Some(rotation) = heads.k.rotation {
                let (cos, sin) = rotation.at(j);
                rotate_back(dk, cos, sin);
            }
            out.put(1, j, dk);
            out.put(2, j, &scratch.dv[j * dp..][..d]);
        }
    }
}

/// Copies rows, rotated and scaled, padded with zeros to `width`.
#[inline(always)]
fn pack(to: &mut Vec<f32>, from: Rows<'_>, n: usize, d: usize, width: usize, scale: f32) {
    to.resize(n * width, 0.0);
    for (i, to) in to.chunks_exact_mut(width).enumerate() {
        let (to, rest) = to.split_at_mut(d);
        match from.rotation {
            Some(rotation) => {
                let (cos, sin) = rotation.at(i);
                rotate(to, from.at(i, d), cos, sin);
                to.iter_mut().for_each(|to| *to *= scale);
            }
            None => {
                for (to, &x) in to.iter_mut().zip(from.at(i, d)) {
                    *to = scale * x;
                }
            }
        }
        rest.fill(0.0);
    }
}

/// Copies rows into columns, not rotated: (n, d) -> (d, width), padded with zeros.
#[inline(always)]
fn pack_transposed(to: &mut Vec<f32>, from: Rows<'_>, n: usize, d: usize, width: usize) {
    to.clear();
    to.resize(d * width, 0.0);
    for i in 0..n {
        for (e, &x) in from.at(i, d).iter().enumerate() {
            to[e * width + i] = x;
        }
    }
}

#[cfg(test)]
mod tests {
    use retort_engine::backend::{Attention, Tensors, unpack};

    use super::*;
    use crate::plain::Plain;
    use crate::{Candle, waves};

    fn numbers(x: &T) -> Vec<f32> {
        Plain::to_floats(x).expect("floats")
    }

    #[test]
    fn rotating_within_attention_gives_the_same_numbers() {
        // Many sequences, and few.
        for (b, l, h, d) in [(9, 19, 3, 12), (2, 33, 2, 16)] {
            let packed = waves(0.7, &[b, l, 3 * h * d]);
            let (cos, sin) = (waves(0.31, &[l, d / 2]), waves(0.53, &[l, d / 2]));
            let (tables, mask, scale) = ([&cos, &sin], Mask::Causal, 0.25);
            let (y, kept) = Candle::packed_attention(&packed, h, tables, &mask, scale).expect("y");
            let [q, k, v] = unpack::<Candle>(&packed, h).expect("parts");
            let [q, k] = [q, k].map(|x| rope(&x, &cos, &sin).expect("rotated"));
            let wanted = attention(&q, &k, &v, &Mask::Causal, scale).expect("y");
            assert_eq!(numbers(&y), numbers(&wanted));

            let grad = waves(1.3, &[b, l, h, d]);
            let kept = kept.each_ref();
            let got = Candle::packed_attention_backward(kept, tables, &mask, scale, &y, &grad);
            let (dq, dk, dv) =
                attention_backward(&q, &k, &v, &Mask::Causal, scale, &y, &grad).expect("gradients");
            let back = Candle::affine(&sin, -1.0, 0.0).expect("the opposite angle");
            let [dq, dk] = [dq, dk].map(|x| rope(&x, &cos, &back).expect("rotated"));
            let flat = |x: &T| x.reshape((b, l, h * d)).expect("flat");
            let wanted = Plain::cat(&[&flat(&dq), &flat(&dk), &flat(&dv)], 2).expect("a whole");
            assert_eq!(numbers(&got.expect("a gradient")), numbers(&wanted));
        }
    }
}
