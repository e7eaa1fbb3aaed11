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
//! s runs from 0 (noise) upwards; the token is the argmax of w as s grows. Each evaluation of dz/ds reads the whole codebook,
//! so none is wasted: an Adams method predicts z from previous slopes, the codebook is evaluated there, and the new slope
//! corrects the step (Adams-Bashforth 4, Adams-Moulton 5, one evaluation per step). Steps are dense where the posterior
//! sharpens: uniform in asinh(s sigma), with sigma the spread of the codebook, hence uniform in s at first and in log s
//! later, for any scale of the codes. In: logits (n, k), -inf where a code is excluded; noise (n, d); codebook (k, d). Out:
//! ids (n). Here: the composed form that every backend can run, and a float64 reference with a different method.

use crate::backend::layers::Layers;
use crate::backend::tensor::{Binary, Unary};
use crate::error::Result;

/// Default number of steps. At published shapes fewer than one token in a thousand then differs from float64
/// (`tests/tests/flow.rs`).
pub const STEPS: usize = 96;

/// [`STEPS`], for options that name none.
pub fn default_steps() -> usize {
    STEPS
}

/// The numbers of the AR flow map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlowSolver {
    /// Steps of the Adams method, an evaluation of the codebook each ([`steps`]).
    pub steps: usize,
}

impl Default for FlowSolver {
    fn default() -> Self {
        Self { steps: STEPS }
    }
}

/// How many slopes a prediction uses. A correction also uses the newest.
pub const ORDER: usize = 4;

/// The last s, in units of 1 / spread: there the posterior is decided, unless two codes are nearly equal.
const END: f64 = 60.0;

/// An evaluation of dz/ds, and the weights of its step.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Where it is evaluated.
    pub s: f64,
    /// Prediction: z is z at the previous step plus these times the previous slopes, the newest first.
    pub predictor: Vec<f64>,
    /// Correction: z is z at the previous step plus these times the slopes, the new one first.
    pub corrector: Vec<f64>,
}

/// The same for slopes in a ring buffer of [`ORDER`] + 1 entries, with the slope of evaluation i in entry i mod [`ORDER`] +
/// 1: for each step the weights of all entries that lead to z after it, and from z before it to the next evaluation point.
pub fn moves(steps: &[Step]) -> impl Iterator<Item = [[f32; ORDER + 1]; 2]> {
    steps.iter().enumerate().map(|(i, step)| {
        let place = |age: usize| (i + ORDER + 1 - age) % (ORDER + 1);
        let mut z = [0.0; ORDER + 1];
        for (age, &weight) in step.corrector.iter().enumerate() {
            z[place(age)] += weight;
        }
        let mut ahead = z;
        let next = steps.get(i + 1).map_or(&[][..], |next| &next.predictor);
        for (age, &weight) in next.iter().enumerate() {
            ahead[place(age)] += weight;
        }
        [z, ahead].map(|weights| weights.map(|weight| weight as f32))
    })
}

/// All evaluations for a codebook (k, d) on the host.
pub fn steps_for(codebook: &[f32], d: usize, solver: &FlowSolver) -> Vec<Step> {
    let (mut sums, mut squares) = (vec![0.0; d], vec![0.0; d]);
    for code in codebook.chunks_exact(d) {
        for ((sum, square), &c) in sums.iter_mut().zip(&mut squares).zip(code) {
            let c = f64::from(c);
            *sum += c;
            *square += c * c;
        }
    }
    let k = (codebook.len() / d) as f64;
    let square_of_mean = sums.iter().map(|sum| (sum / k).powi(2)).sum();
    let mean_square = squares.iter().sum::<f64>() / k;
    steps(solver, spread(mean_square, square_of_mean, d))
}

/// All evaluations, the first at s = 0, for a codebook of a spread ([`spread`]).
pub fn steps(solver: &FlowSolver, spread: f64) -> Vec<Step> {
    let grid = grid(solver.steps, spread);
    (0..grid.len())
        .map(|i| {
            let newest_first = |n: usize| grid[..=i].iter().rev().copied().take(n).collect();
            let (slopes, before): (Vec<f64>, _) = (newest_first(ORDER + 1), i.saturating_sub(1));
            let older = &slopes[1..];
            Step {
                s: grid[i],
                predictor: integrals(older, grid[before], grid[i]),
                corrector: integrals(&slopes, grid[before], grid[i]),
            }
        })
        .collect()
}

/// n + 1 values of s, the first 0, uniform in asinh(s spread).
fn grid(n: usize, spread: f64) -> Vec<f64> {
    let n = n.max(1);
    (0..=n)
        .map(|i| (END.asinh() * i as f64 / n as f64).sinh() / spread)
        .collect()
}

/// The integrals from a to b of the polynomials that are 1 at one node and 0 at the others.
fn integrals(nodes: &[f64], a: f64, b: f64) -> Vec<f64> {
    let others = |i: usize| nodes.iter().enumerate().filter(move |(j, _)| *j != i);
    (0..nodes.len())
        .map(|i| {
            // Coefficients of the polynomial in x - a.
            let mut p = vec![1.0];
            for (_, node) in others(i) {
                p.push(0.0);
                for q in (0..p.len()).rev() {
                    let lower = if q > 0 { p[q - 1] } else { 0.0 };
                    p[q] = (lower - (node - a) * p[q]) / (nodes[i] - node);
                }
            }
            let h = b - a;
            p.iter()
                .rev()
                .zip((1..=p.len()).rev())
                .fold(0.0, |sum, (p, q)| sum * h + p / q as f64)
                * h
        })
        .collect()
}

/// The spread of a codebook: the root mean square deviation of a coordinate, from the mean |c|^2 over its codes, the squared
/// length of their mean, and D. 1 if it is 0.
pub fn spread(mean_square: f64, square_of_mean: f64, d: usize) -> f64 {
    let spread = ((mean_square - square_of_mean) / d as f64).sqrt();
    // With equal codes, rounding leaves a small residue.
    let some = spread.is_finite() && spread > 1e-4 * (mean_square / d as f64).sqrt();
    if some { spread } else { 1.0 }
}

/// The flow map in plain tensor operations: the default of `Sampling::flow_map`.
pub fn composed<B: Layers>(
    logits: &B::Tensor,
    noise: &B::Tensor,
    codebook: &B::Tensor,
    solver: &FlowSolver,
) -> Result<B::Tensor> {
    let [k, d] = B::shape(codebook)[..] else {
        unreachable!("a codebook has rows and columns")
    };
    let squares = B::sum(&B::unary(codebook, Unary::Square)?, &[1])?;
    let half_square = B::reshape(&B::affine(&squares, 0.5, 0.0)?, &[1, k])?;
    let mean = |total: f32| f64::from(total) / k as f64;
    let squares = B::to_floats(&B::sum(&squares, &[0])?)?;
    let centre = B::to_floats(&B::sum(codebook, &[0])?)?;
    let square_of_mean = centre.iter().map(|&x| mean(x) * mean(x)).sum();
    let spread = spread(mean(squares[0]), square_of_mean, d);

    let posterior = |z: &B::Tensor, s: f64| -> Result<B::Tensor> {
        let along = B::affine(&B::matmul(z, codebook, false, true)?, s, 0.0)?;
        let energy = B::binary(&along, &B::affine(&half_square, s * s, 0.0)?, Binary::Sub)?;
        B::binary(logits, &energy, Binary::Add)
    };
    let moved = |z: &B::Tensor, weights: &[f64], slopes: &[B::Tensor]| {
        weights
            .iter()
            .zip(slopes)
            .try_fold(z.clone(), |z, (&weight, slope)| {
                B::binary(&z, &B::affine(slope, weight, 0.0)?, Binary::Add)
            })
    };

    let (mut z, mut slopes) = (noise.clone(), Vec::new());
    let mut weights = logits.clone();
    for step in steps(solver, spread) {
        weights = posterior(&moved(&z, &step.predictor, &slopes)?, step.s)?;
        let slope = B::matmul(&B::softmax(&weights)?, codebook, false, false)?;
        slopes.insert(0, slope);
        slopes.truncate(ORDER + 1);
        z = moved(&z, &step.corrector, &slopes)?;
    }
    B::argmax_last(&weights)
}

/// Log weight, relative to the greatest, below which the reference drops a code: all dropped codes together then have less
/// than 1e-20.
const FORGOTTEN: f64 = 60.0;

/// The flow map of one position in float64, by the classic fourth-order Runge-Kutta method with this many steps; `codebook`
/// row-major (k, d). With a hundred steps it is the reference for tests. Returns the token and its posterior probability at
/// the last s.
pub fn reference(logits: &[f32], noise: &[f32], codebook: &[f32], steps: usize) -> (usize, f64) {
    let mut codes = Codes::new(logits, codebook, noise.len());
    let step = |z: &[f64], v: &[f64], h: f64| -> Vec<f64> {
        z.iter().zip(v).map(|(z, v)| z + h * v).collect()
    };
    let mut z: Vec<f64> = noise.iter().map(|&x| f64::from(x)).collect();
    let grid = grid(steps, codes.spread());
    for pair in grid.windows(2) {
        let (s, h) = (pair[0], pair[1] - pair[0]);
        let k1 = codes.velocity(&z, s);
        codes.forget();
        if codes.ids.len() == 1 {
            break;
        }
        let k2 = codes.velocity(&step(&z, &k1, h / 2.0), s + h / 2.0);
        let k3 = codes.velocity(&step(&z, &k2, h / 2.0), s + h / 2.0);
        let k4 = codes.velocity(&step(&z, &k3, h), s + h);
        for (i, z) in z.iter_mut().enumerate() {
            *z += h / 6.0 * (k1[i] + 2.0 * (k2[i] + k3[i]) + k4[i]);
        }
    }
    codes.velocity(&z, grid[grid.len() - 1]);
    let first = (0, f64::NEG_INFINITY);
    let (at, weight) = codes
        .weights
        .iter()
        .copied()
        .enumerate()
        .fold(first, |best, (i, w)| if w > best.1 { (i, w) } else { best });
    (codes.ids[at], weight)
}

/// The codes that the reference still considers.
struct Codes {
    ids: Vec<usize>,
    logits: Vec<f64>,
    /// A row for each coordinate.
    coordinates: Vec<Vec<f64>>,
    half_squares: Vec<f64>,
    /// What was found last.
    weights: Vec<f64>,
}

impl Codes {
    fn new(logits: &[f32], codebook: &[f32], d: usize) -> Self {
        let column = |e: usize| codebook.iter().skip(e).step_by(d).map(|&c| f64::from(c));
        let coordinates: Vec<Vec<f64>> = (0..d).map(|e| column(e).collect()).collect();
        let mut half_squares = vec![0.0; logits.len()];
        for row in &coordinates {
            let squares = half_squares.iter_mut().zip(row);
            squares.for_each(|(square, c)| *square += 0.5 * c * c);
        }
        Self {
            ids: (0..logits.len()).collect(),
            logits: logits.iter().map(|&x| f64::from(x)).collect(),
            coordinates,
            half_squares,
            weights: Vec::new(),
        }
    }

    fn spread(&self) -> f64 {
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let square_of_mean = self.coordinates.iter().map(|row| mean(row).powi(2)).sum();
        spread(
            2.0 * mean(&self.half_squares),
            square_of_mean,
            self.coordinates.len(),
        )
    }

    /// dz/ds
    fn velocity(&mut self, z: &[f64], s: f64) -> Vec<f64> {
        let mut along = vec![0.0; self.ids.len()];
        for (row, &z) in self.coordinates.iter().zip(z) {
            along.iter_mut().zip(row).for_each(|(a, c)| *a += z * c);
        }
        let known = self.logits.iter().zip(&self.half_squares);
        self.weights.clear();
        self.weights.extend(
            along
                .iter()
                .zip(known)
                .map(|(a, (logit, half))| logit + s * (a - s * half)),
        );
        let top = self
            .weights
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        self.weights.iter_mut().for_each(|w| *w = (*w - top).exp());
        let total: f64 = self.weights.iter().sum();
        self.weights.iter_mut().for_each(|w| *w /= total);
        let product = |row: &Vec<f64>| row.iter().zip(&self.weights).map(|(c, w)| c * w).sum();
        self.coordinates.iter().map(product).collect()
    }

    /// Drops codes without weight, once they are half of the remaining ones.
    fn forget(&mut self) {
        let top = self.weights.iter().copied().fold(0.0, f64::max);
        let least = top * (-FORGOTTEN).exp();
        let kept: Vec<bool> = self.weights.iter().map(|&w| w > least).collect();
        let left = kept.iter().filter(|&&kept| kept).count();
        if left == 0 || 2 * left > kept.len() {
            return;
        }
        let rows = self.coordinates.iter_mut();
        for row in rows.chain([&mut self.logits, &mut self.half_squares, &mut self.weights]) {
            keep(row, &kept);
        }
        keep(&mut self.ids, &kept);
    }
}

fn keep<T>(all: &mut Vec<T>, kept: &[bool]) {
    let mut kept = kept.iter();
    all.retain(|_| kept.next().is_some_and(|&kept| kept));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step is exact for polynomial slopes whose degree is at most the number of known slopes.
    #[test]
    fn steps_are_exact_for_polynomials() {
        for (predicts, degree) in [(true, ORDER - 1), (false, ORDER)] {
            let slope = |s: f64| (0..=degree).map(|q| s.powi(q as i32)).sum::<f64>();
            let z = |s: f64| {
                let of = |q: usize| s.powi(q as i32 + 1) / (q + 1) as f64;
                (0..=degree).map(of).sum::<f64>()
            };
            let steps = steps(&FlowSolver { steps: 20 }, 0.7);
            for (i, step) in steps.iter().enumerate().skip(ORDER) {
                let weights = if predicts {
                    &step.predictor
                } else {
                    &step.corrector
                };
                let from = i + 1 - usize::from(predicts);
                let slopes = steps[..from].iter().rev().map(|step| slope(step.s));
                let moved: f64 = weights.iter().zip(slopes).map(|(w, v)| w * v).sum();
                let want = z(step.s) - z(steps[i - 1].s);
                assert!(
                    (moved - want).abs() < 1e-9 * want,
                    "step {i}: {moved}, {want}"
                );
            }
        }
    }

    #[test]
    fn the_first_evaluation_moves_nothing() {
        let first = &steps(&FlowSolver::default(), 1.0)[0];
        assert_eq!(first.s, 0.0);
        assert!(first.predictor.is_empty());
        assert_eq!(first.corrector, [0.0]);
    }

    #[test]
    fn a_codebook_of_equal_codes_has_a_spread() {
        assert_eq!(spread(9.0, 9.0, 3), 1.0);
        assert_eq!(spread(0.0, 0.0, 3), 1.0);
        assert_eq!(spread(f64::NAN, 1.0, 3), 1.0);
        assert_eq!(spread(12.0, 0.0, 3), 2.0);
    }
}
