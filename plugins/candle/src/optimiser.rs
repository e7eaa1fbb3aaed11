//! The optimiser's updates, in place and in one pass over memory.

use rayon::prelude::*;
use retort_engine::backend::AdamwStep;
use retort_engine::error::Result;
use retort_kernels::lanes::{sum, widest};

use crate::T;
use crate::layout::whole;
use crate::rows::by_rows;
use crate::view::{floats, tensor, write};

/// Elements of a task; a constant, so that no result depends on the number of threads.
const BLOCK: usize = 8 * 1024;

/// One AdamW step of a parameter and its moments; then, if given with its decay, the parameter's average follows.
pub fn adamw_(p: &T, m: &T, v: &T, g: &T, s: &AdamwStep, average: Option<(&T, f64)>) -> Result<()> {
    let g = &whole(g)?;
    floats!(g);
    let step = |p: &mut [f32], m: &mut [f32], v: &mut [f32]| {
        let g = &g[..p.len()];
        match average {
            None => {
                adamw(p, m, v, g, s);
                Ok(())
            }
            Some((average, decay)) => write(average, |average| {
                adamw_averaged(p, m, v, g, s, average, decay)
            }),
        }
    };
    write(p, |p| write(m, |m| write(v, |v| step(p, m, v))))???
}

fn adamw_averaged(
    p: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    g: &[f32],
    s: &AdamwStep,
    average: &mut [f32],
    decay: f64,
) {
    let blocks = p.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK));
    let rest = v.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK));
    let all = blocks.zip(rest).zip(average.par_chunks_mut(BLOCK));
    all.for_each(|(((p, m), (v, g)), average)| {
        widest(
            #[inline(always)]
            || {
                adamw_block(p, m, v, g, s);
                ema_block(average, p, decay);
            },
        )
    });
}

fn adamw(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], s: &AdamwStep) {
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
    write(average, |average| {
        by_rows(
            average,
            1,
            #[inline(always)]
            |first, out| ema_block(out, &x[first..], decay),
        );
    })
}

#[inline(always)]
fn ema_block(average: &mut [f32], x: &[f32], decay: f64) {
    let (keep, take) = (decay as f32, (1.0 - decay) as f32);
    for (a, &x) in average.iter_mut().zip(x) {
        *a = keep.mul_add(*a, take * x);
    }
}

/// The sum of the squares of all elements: (1).
pub fn sum_of_squares(x: &T) -> Result<T> {
    let x = &whole(x)?;
    let count = x.elem_count();
    floats!(x);
    let share = |x: &[f32]| {
        widest(
            #[inline(always)]
            || sum(x, |x| x * x),
        )
    };
    let shares: Vec<f32> = x[..count].par_chunks(BLOCK).map(share).collect();
    tensor(vec![sum(&shares, |share| share)], &[1])
}

#[cfg(test)]
mod tests {
    use retort_engine::backend::{Optimiser, Tensors, Unary};

    use super::*;
    use crate::{Candle, waves};

    #[test]
    fn squares_of_several_tasks_are_summed() {
        for count in [1, BLOCK, 5 * BLOCK + 77] {
            // Cut out of the middle of its memory.
            let x = Candle::narrow(&waves(0.7, &[count + 20]), 0, 9, count).expect("a view");
            let values = Candle::to_floats(&x).expect("floats");
            let want: f64 = values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            let got = Candle::to_floats(&Candle::sum_of_squares(&x).expect("a sum"));
            let got = f64::from(got.expect("floats")[0]);
            assert!((got / want - 1.0).abs() < 1e-6, "{got}, not {want}");
        }
    }

    #[test]
    fn a_step_with_the_average_gives_the_bits_of_two_passes() {
        let count = 2 * BLOCK + 5;
        let numbers = AdamwStep {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.05,
            correction1: 0.1,
            correction2: 0.05,
            grad_scale: 0.5,
        };
        let run = |is_fused: bool| {
            let [p, m, average] = [0.3, 0.5, 0.7].map(|step| waves(step, &[count]));
            let v = Candle::unary(&waves(0.9, &[count]), Unary::Square);
            let (v, g) = (v.expect("squares"), waves(1.1, &[count]));
            if is_fused {
                Candle::adamw_averaged_(&p, &m, &v, &g, &numbers, &average, 0.9).expect("a step");
            } else {
                Candle::adamw_(&p, &m, &v, &g, &numbers).expect("a step");
                Candle::ema_(&average, &p, 0.9).expect("an average");
            }
            [p, m, v, average].map(|x| Candle::to_floats(&x).expect("floats"))
        };
        assert_eq!(run(true), run(false));
    }
}
