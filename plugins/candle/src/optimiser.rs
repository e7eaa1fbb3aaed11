//! The optimiser's updates, in place and in one pass over memory.

use rayon::prelude::*;
use retort_engine::backend::AdamwStep;
use retort_engine::error::Result;
use retort_kernels::lanes::widest;

use crate::T;
use crate::rows::by_rows;
use crate::view::{floats, whole, write};

/// One AdamW step on a parameter and its moments.
pub fn adamw_(p: &T, m: &T, v: &T, g: &T, s: &AdamwStep) -> Result<()> {
    let g = &whole(g)?;
    floats!(g);
    write(p, |p| {
        write(m, |m| write(v, |v| adamw(p, m, v, &g[..p.len()], s)))
    })???;
    Ok(())
}

fn adamw(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: &AdamwStep) {
    const BLOCK: usize = 8 * 1024;
    let blocks = p.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK));
    let rest = v.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK));
    blocks.zip(rest).for_each(|((p, m), (v, g))| {
        widest(
            #[inline(always)]
            || adamw_block(p, m, v, g, s),
        )
    });
}

#[inline(always)]
fn adamw_block(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: &AdamwStep) {
    let (beta1, beta2) = (s.beta1 as f32, s.beta2 as f32);
    let (rest1, rest2) = ((1.0 - s.beta1) as f32, (1.0 - s.beta2) as f32);
    let keep = (1.0 - s.lr * s.weight_decay) as f32;
    let rate = (s.lr / s.correction1) as f32;
    let root = s.correction2.sqrt().recip() as f32;
    let (eps, scale) = (s.eps as f32, s.grad_scale as f32);
    for ((p, m), (v, &g)) in p.iter_mut().zip(m).zip(v.iter_mut().zip(g)) {
        let g = g * scale;
        *m = beta1.mul_add(*m, rest1 * g);
        *v = beta2.mul_add(*v, rest2 * g * g);
        *p = keep.mul_add(*p, -rate * *m / v.sqrt().mul_add(root, eps));
    }
}

/// average <- decay * average + (1 - decay) * x
pub fn ema_(average: &T, x: &T, decay: f64) -> Result<()> {
    let x = &whole(x)?;
    floats!(x);
    let (keep, take) = (decay as f32, (1.0 - decay) as f32);
    write(average, |average| {
        by_rows(
            average,
            1,
            #[inline(always)]
            |first, out| {
                for (a, &x) in out.iter_mut().zip(&x[first..]) {
                    *a = keep.mul_add(*a, take * x);
                }
            },
        );
    })
}
