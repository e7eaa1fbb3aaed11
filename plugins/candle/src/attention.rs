//! Attention, forward and backward, one head at a time: the scores of a block of queries live in the cache and never
//! in memory, masked keys are skipped, and any view of a packed projection serves as input.

use rayon::prelude::*;
use retort_engine::backend::Mask;
use retort_engine::error::{Error, Result};
use retort_kernels::lanes::{add_scaled, dot, exp, max, sum, widest};

use crate::rows::by_rows;
use crate::softmax::exponentials;
use crate::view::{floats, fresh, rows, tensor, whole};
use crate::{T, failed};

/// Width of the narrowest tile: keys and head sizes are padded to it.
const TILE: usize = 8;

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

/// softmax(scale q k^T + mask) v: q (b, lq, h, d), k and v (b, lk, h, d) -> (b, lq, h, d).
pub fn attention(q: &T, k: &T, v: &T, mask: &Mask<T>, scale: f64) -> Result<T> {
    let problem = Problem::new(q, k, v, mask, scale)?;
    let (q, k, v) = (&rows(q)?, &rows(k)?, &rows(v)?);
    let steps = [q, k, v].map(Strides::of);
    let (bias, bias_step) = problem.bias(mask)?;
    let shape = q.dims().to_vec();
    floats!(q, k, v, bias);
    let mut y = fresh(&shape);
    let (wide, heads) = (problem.d * problem.h, problem.h);
    let one = |scratch: &mut Scratch, b: usize, h: usize, y: &mut [f32], y_row: usize| {
        let q = steps[0].head(q, b, h);
        let k = steps[1].head(k, b, h);
        let v = steps[2].head(v, b, h);
        let bias = &bias[b * bias_step[0] + h * bias_step[1]..];
        widest(
            #[inline(always)]
            || match problem.lq {
                1 => problem.single(scratch, q, k, v, bias, y),
                _ => problem.forward(scratch, q, k, v, bias, y, y_row),
            },
        );
    };
    if problem.b >= 8 {
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
    let problem = Problem::new(q, k, v, mask, scale)?;
    let (q, k, v) = (&rows(q)?, &rows(k)?, &rows(v)?);
    let (y, grad) = (&rows(y)?, &rows(grad)?);
    let steps = [q, k, v, y, grad].map(Strides::of);
    let (bias, bias_step) = problem.bias(mask)?;
    let (q_shape, k_shape) = (q.dims().to_vec(), k.dims().to_vec());
    floats!(q, k, v, y, grad, bias);
    let (mut dq, mut dk, mut dv) = (fresh(&q_shape), fresh(&k_shape), fresh(&k_shape));
    let (wide, heads) = (problem.d * problem.h, problem.h);
    let one = |scratch: &mut Scratch, b: usize, h: usize, out: Gradients<'_>| {
        let heads = Heads {
            q: steps[0].head(q, b, h),
            k: steps[1].head(k, b, h),
            v: steps[2].head(v, b, h),
            y: steps[3].head(y, b, h),
            g: steps[4].head(grad, b, h),
        };
        let bias = &bias[b * bias_step[0] + h * bias_step[1]..];
        widest(
            #[inline(always)]
            || problem.backward(scratch, heads, bias, out),
        );
    };
    let (q_size, k_size) = if problem.b >= 8 {
        (problem.lq * wide, problem.lk * wide)
    } else {
        (problem.lq * problem.d, problem.lk * problem.d)
    };
    dq.par_chunks_mut(q_size)
        .zip(dk.par_chunks_mut(k_size).zip(dv.par_chunks_mut(k_size)))
        .enumerate()
        .with_min_len(if problem.b >= 8 { problem.grain() } else { 1 })
        .for_each_init(Scratch::default, |scratch, (i, (dq, (dk, dv)))| {
            if problem.b >= 8 {
                for h in 0..heads {
                    let (dq, dk, dv) = (
                        &mut dq[h * problem.d..],
                        &mut dk[h * problem.d..],
                        &mut dv[h * problem.d..],
                    );
                    let row = wide;
                    one(scratch, i, h, Gradients { dq, dk, dv, row });
                }
            } else {
                let row = problem.d;
                one(scratch, i / heads, i % heads, Gradients { dq, dk, dv, row });
            }
        });
    if problem.b >= 8 {
        Ok((
            tensor(dq, &q_shape)?,
            tensor(dk, &k_shape)?,
            tensor(dv, &k_shape)?,
        ))
    } else {
        Ok((
            heads_last(dq, &problem, problem.lq)?,
            heads_last(dk, &problem, problem.lk)?,
            heads_last(dv, &problem, problem.lk)?,
        ))
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

/// One head's rows: where they begin and how far apart they are.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    step: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn at(self, i: usize, d: usize) -> &'a [f32] {
        &self.data[i * self.step..][..d]
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

/// Where one head's gradients go, rows `row` apart.
struct Gradients<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    row: usize,
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
        if self.causal && self.lk <= 64 { 8 } else { 32 }
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
        pack_turned(&mut scratch.kt, k, self.lk, self.d, lkp);
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
        let block = Rows {
            data: &q.data[first * q.step..],
            step: q.step,
        };
        pack(&mut scratch.q, block, n, self.d, dp, self.scale);
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
            let top = max(p);
            p.iter_mut().for_each(|p| *p = exp(*p - top));
            let scale = 1.0 / sum(p, |p| p);
            p.iter_mut().for_each(|p| *p *= scale);
            rest.fill(0.0);
        }
    }

    /// Gradients of one head. With p the weights: dv = p^T g, ds = p (g v^T - sum(g y)), dq = scale ds k,
    /// dk = scale ds^T q.
    #[inline(always)]
    fn backward(&self, scratch: &mut Scratch, heads: Heads<'_>, bias: &[f32], out: Gradients<'_>) {
        let (d, (lkp, dp)) = (self.d, self.padded());
        pack_turned(&mut scratch.kt, heads.k, self.lk, d, lkp);
        pack_turned(&mut scratch.v, heads.v, self.lk, d, lkp);
        pack(&mut scratch.k, heads.k, self.lk, d, dp, 1.0);
        for x in [&mut scratch.dk, &mut scratch.dv] {
            x.clear();
            x.resize(self.lk * dp, 0.0);
        }
        for first in (0..self.lq).step_by(self.block()) {
            let n = self.block().min(self.lq - first);
            self.weights(scratch, heads.q, bias, first, n);
            let block = Rows {
                data: &heads.g.data[first * heads.g.step..],
                step: heads.g.step,
            };
            pack(&mut scratch.g, block, n, d, dp, 1.0);
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
            let p = Operand::turned(&scratch.p, lkp);
            tiles::<true>(&mut scratch.dv, dp, p, &scratch.g, dp, (seen, dp, n));
            let ds = Operand::turned(&scratch.ds, lkp);
            tiles::<true>(&mut scratch.dk, dp, ds, &scratch.q, dp, (seen, dp, n));
            scratch.y.resize(n * dp, 0.0);
            let ds = Operand::rows(&scratch.ds, lkp);
            tiles::<false>(&mut scratch.y, dp, ds, &scratch.k, dp, (n, dp, seen));
            for i in 0..n {
                let dq = &mut out.dq[(first + i) * out.row..][..d];
                for (dq, &y) in dq.iter_mut().zip(&scratch.y[i * dp..]) {
                    *dq = self.scale * y;
                }
            }
        }
        for j in 0..self.lk {
            out.dk[j * out.row..][..d].copy_from_slice(&scratch.dk[j * dp..][..d]);
            out.dv[j * out.row..][..d].copy_from_slice(&scratch.dv[j * dp..][..d]);
        }
    }
}

/// Copies rows, scaled, padded with zeros to `width`.
#[inline(always)]
fn pack(to: &mut Vec<f32>, from: Rows<'_>, n: usize, d: usize, width: usize, scale: f32) {
    to.resize(n * width, 0.0);
    for (i, to) in to.chunks_exact_mut(width).enumerate() {
        let (to, rest) = to.split_at_mut(d);
        for (to, &x) in to.iter_mut().zip(from.at(i, d)) {
            *to = scale * x;
        }
        rest.fill(0.0);
    }
}

/// Copies rows into columns: (n, d) -> (d, width), padded with zeros.
#[inline(always)]
fn pack_turned(to: &mut Vec<f32>, from: Rows<'_>, n: usize, d: usize, width: usize) {
    to.clear();
    to.resize(d * width, 0.0);
    for i in 0..n {
        for (e, &x) in from.at(i, d).iter().enumerate() {
            to[e * width + i] = x;
        }
    }
}

/// The left operand of a small product: element (i, p) at i * row + p * column.
#[derive(Clone, Copy)]
struct Operand<'a> {
    data: &'a [f32],
    row: usize,
    column: usize,
}

impl<'a> Operand<'a> {
    fn rows(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row: width,
            column: 1,
        }
    }

    fn turned(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            row: 1,
            column: width,
        }
    }
}

/// c (m, n) = or += a (m, k) b (k, n), n a multiple of [`TILE`]; small enough for the cache, so nothing is packed.
#[inline(always)]
fn tiles<const GROW: bool>(
    c: &mut [f32],
    c_row: usize,
    a: Operand<'_>,
    b: &[f32],
    b_row: usize,
    (m, n, k): (usize, usize, usize),
) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(
        n % TILE == 0
            && (m - 1) * c_row + n <= c.len()
            && (m - 1) * a.row + (k - 1) * a.column < a.data.len()
            && (k - 1) * b_row + n <= b.len(),
        "a small product beyond its operands"
    );
    let mut j = 0;
    while j < n {
        let wide = n - j >= 2 * TILE;
        let mut i = 0;
        while i < m {
            let high = m - i >= 4;
            // SAFETY: rows i.. and columns j.. of this tile lie within (m, n), which the assertion keeps inside the slices.
            unsafe {
                let c = c.as_mut_ptr().add(i * c_row + j);
                let a = (a.data.as_ptr().add(i * a.row), a.row, a.column);
                let b = b.as_ptr().add(j);
                match (high, wide) {
                    (true, true) => tile::<4, 16, GROW>(c, c_row, a, b, b_row, k),
                    (true, false) => tile::<4, 8, GROW>(c, c_row, a, b, b_row, k),
                    (false, true) => tile::<1, 16, GROW>(c, c_row, a, b, b_row, k),
                    (false, false) => tile::<1, 8, GROW>(c, c_row, a, b, b_row, k),
                }
            }
            i += if high { 4 } else { 1 };
        }
        j += if wide { 2 * TILE } else { TILE };
    }
}

/// R rows and W columns of a product, summed in registers.
///
/// # Safety
/// For all r < R and p < k: `c + r c_row` is valid for reads and writes of W elements, `a + r row + p column` for a read
/// of one and `b + p b_row` for reads of W.
#[inline(always)]
unsafe fn tile<const R: usize, const W: usize, const GROW: bool>(
    c: *mut f32,
    c_row: usize,
    (a, row, column): (*const f32, usize, usize),
    b: *const f32,
    b_row: usize,
    k: usize,
) {
    let mut total = [[0.0f32; W]; R];
    for p in 0..k {
        // SAFETY: p < k, and an array of f32 has the alignment of f32; see above.
        let b = unsafe { &*b.add(p * b_row).cast::<[f32; W]>() };
        for (r, total) in total.iter_mut().enumerate() {
            // SAFETY: r < R and p < k; see above.
            let a = unsafe { *a.add(r * row + p * column) };
            for w in 0..W {
                total[w] = a.mul_add(b[w], total[w]);
            }
        }
    }
    for (r, total) in total.iter().enumerate() {
        // SAFETY: r < R; see above.
        let c = unsafe { &mut *c.add(r * c_row).cast::<[f32; W]>() };
        for w in 0..W {
            c[w] = if GROW { c[w] + total[w] } else { total[w] };
        }
    }
}
