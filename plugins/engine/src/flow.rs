//! AR flow matching: the deterministic map from noise to a token (Distilled Decoding, arXiv 2412.17153, section 3).
//!
//! For one position with token probabilities p_j and codebook vectors c_j in R^D, the linear path from noise to data,
//! x_t = (1-t) x_0 + t x_1, has the velocity v(x,t) = (sum_j w_j c_j - x) / (1-t), which is singular at t = 1. With
//! s = t/(1-t) and z = x/(1-t) = x_0 + s x_1 it becomes regular:
//!
//! ```text
//! dz/ds = sum_j w_j c_j,   w_j = softmax_j( log p_j + s <z, c_j> - s^2 |c_j|^2 / 2 ),   z(0) = noise
//! ```
//!
//! s runs from 0 (noise) upwards; the token is the argmax of w as s grows. Solved with the classic fourth-order
//! Runge-Kutta method on a grid uniform in t. In: logits (n, k), -inf where a code is excluded; noise (n, d);
//! codebook (k, d). Out: ids (n). Here: the composed form every backend can run, and a float64 reference.

use crate::backend::{Backend, Binary, FlowSolver, Unary};
use crate::error::Result;

/// The values of s between which the solver steps: s = t/(1-t) at t = 0, 1/n, .., (n-1)/n, then s = 2n, that is
/// t = 1 - 1/(2n+1), where the posterior is decided.
pub fn grid(solver: &FlowSolver) -> Vec<f64> {
    let n = solver.steps.max(1);
    let mut s: Vec<f64> = (0..n).map(|i| i as f64 / (n - i) as f64).collect();
    s.push(2.0 * n as f64);
    s
}

/// The flow map in plain tensor operations: the default of [`Backend::flow_map`].
pub fn composed<B: Backend>(
    logits: &B::Tensor,
    noise: &B::Tensor,
    codebook: &B::Tensor,
    solver: &FlowSolver,
) -> Result<B::Tensor> {
    let k = B::shape(codebook)[0];
    let half_square = B::sum(&B::unary(codebook, Unary::Square)?, &[1])?;
    let half_square = B::reshape(&B::affine(&half_square, 0.5, 0.0)?, &[1, k])?;
    let posterior = |z: &B::Tensor, s: f64| -> Result<B::Tensor> {
        let along = B::affine(&B::matmul(z, codebook, false, true)?, s, 0.0)?;
        let energy = B::binary(&along, &B::affine(&half_square, s * s, 0.0)?, Binary::Sub)?;
        B::binary(logits, &energy, Binary::Add)
    };
    let velocity =
        |z: &B::Tensor, s: f64| B::matmul(&B::softmax(&posterior(z, s)?)?, codebook, false, false);
    let step =
        |z: &B::Tensor, v: &B::Tensor, h: f64| B::binary(z, &B::affine(v, h, 0.0)?, Binary::Add);

    let mut z = noise.clone();
    let grid = grid(solver);
    for pair in grid.windows(2) {
        let (s, h) = (pair[0], pair[1] - pair[0]);
        let k1 = velocity(&z, s)?;
        let k2 = velocity(&step(&z, &k1, h / 2.0)?, s + h / 2.0)?;
        let k3 = velocity(&step(&z, &k2, h / 2.0)?, s + h / 2.0)?;
        let k4 = velocity(&step(&z, &k3, h)?, s + h)?;
        let middle = B::affine(&B::binary(&k2, &k3, Binary::Add)?, 2.0, 0.0)?;
        let sum = B::binary(&B::binary(&k1, &k4, Binary::Add)?, &middle, Binary::Add)?;
        z = step(&z, &sum, h / 6.0)?;
    }
    B::argmax_last(&posterior(&z, grid[grid.len() - 1])?)
}

/// The flow map of one position in float64 with `steps` Runge-Kutta steps; `codebook` row-major (k, d). The truth for
/// tests when `steps` is some hundreds. Returns the token and its posterior probability at the last s.
pub fn reference(logits: &[f32], noise: &[f32], codebook: &[f32], steps: usize) -> (usize, f64) {
    let d = noise.len();
    let codes: Vec<&[f32]> = codebook.chunks_exact(d).collect();
    let posterior = |z: &[f64], s: f64| -> Vec<f64> {
        let mut w: Vec<f64> = codes
            .iter()
            .zip(logits)
            .map(|(c, &logit)| {
                let (dot, square) = c.iter().zip(z).fold((0.0, 0.0), |(dot, square), (&c, &z)| {
                    (dot + f64::from(c) * z, square + f64::from(c) * f64::from(c))
                });
                f64::from(logit) + s * dot - 0.5 * s * s * square
            })
            .collect();
        let max = w.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = w
            .iter_mut()
            .map(|a| {
                *a = (*a - max).exp();
                *a
            })
            .sum();
        w.iter_mut().for_each(|a| *a /= total);
        w
    };
    let velocity = |z: &[f64], s: f64| -> Vec<f64> {
        let mut v = vec![0.0; d];
        for (w, c) in posterior(z, s).iter().zip(&codes) {
            v.iter_mut()
                .zip(*c)
                .for_each(|(v, &c)| *v += w * f64::from(c));
        }
        v
    };
    let step = |z: &[f64], v: &[f64], h: f64| -> Vec<f64> {
        z.iter().zip(v).map(|(z, v)| z + h * v).collect()
    };
    let mut z: Vec<f64> = noise.iter().map(|&x| f64::from(x)).collect();
    let grid = grid(&FlowSolver { steps });
    for pair in grid.windows(2) {
        let (s, h) = (pair[0], pair[1] - pair[0]);
        let k1 = velocity(&z, s);
        let k2 = velocity(&step(&z, &k1, h / 2.0), s + h / 2.0);
        let k3 = velocity(&step(&z, &k2, h / 2.0), s + h / 2.0);
        let k4 = velocity(&step(&z, &k3, h), s + h);
        for i in 0..d {
            z[i] += h / 6.0 * (k1[i] + 2.0 * (k2[i] + k3[i]) + k4[i]);
        }
    }
    let w = posterior(&z, grid[grid.len() - 1]);
    w.iter()
        .copied()
        .enumerate()
        .fold((0, f64::NEG_INFINITY), |best, (i, w)| {
            if w > best.1 { (i, w) } else { best }
        })
}
