//! The AR flow map on the host: one token at a time, all of its state in the cache.
//!
//! `retort_engine::flow` has the mathematics. Here, per token: excluded codes are left out from the start, the rest lie
//! transposed so that a vector holds the same coordinate of neighbouring codes, and the integration ends as soon as no
//! code can overtake the leading one.

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use retort_engine::backend::FlowSolver;
use retort_engine::error::{Error, Result};
use retort_engine::flow::grid;

use crate::lanes::{LANES, exp, max, sum};
use crate::view::{floats, whole};
use crate::{T, failed};

/// Probability that may still go to other codes when a token counts as decided.
const UNDECIDED: f32 = 1e-6;

/// logits (n, k), -inf where excluded; noise (n, d); codebook (k, d) -> ids (n).
pub fn flow_map(logits: &T, noise: &T, codebook: &T, solver: &FlowSolver) -> Result<T> {
    let ((n, k), (_, d)) = (
        logits.dims2().map_err(failed)?,
        noise.dims2().map_err(failed)?,
    );
    if noise.dims() != [n, d] || codebook.dims() != [k, d] {
        return Err(Error::Backend(format!(
            "flow map: logits {:?}, noise {:?}, codebook {:?}",
            logits.dims(),
            noise.dims(),
            codebook.dims()
        )));
    }
    let (logits, noise, codebook) = (&whole(logits)?, &whole(noise)?, &whole(codebook)?);
    floats!(logits, noise, codebook);
    let grid: Vec<f32> = grid(solver).iter().map(|&s| s as f32).collect();
    let ids: Vec<u32> = (0..n)
        .into_par_iter()
        .with_min_len((64 * 1024 / (k * d * grid.len())).clamp(1, 64))
        .map_init(Token::default, |token, i| {
            let (logits, noise) = (&logits[i * k..][..k], &noise[i * d..][..d]);
            {
                token.prepare(logits, noise, &codebook[..k * d]);
                token.solve(&grid)
            }
        })
        .collect();
    Tensor::from_vec(ids, n, &Device::Cpu).map_err(failed)
}

/// One position's state, kept as working memory from token to token.
#[derive(Default)]
struct Token {
    /// The codes that remain.
    ids: Vec<u32>,
    /// Their logits, padded with -inf to a multiple of [`LANES`].
    logits: Vec<f32>,
    /// Their coordinates: (d, padded), zeros beyond.
    codes: Vec<f32>,
    /// Half their squared lengths.
    half_squares: Vec<f32>,
    /// Working memory: log weights, then weights.
    weights: Vec<f32>,
    /// z = x/(1-t)
    z: Vec<f32>,
    /// z at the stages of a step, and the velocities there.
    stage: Vec<f32>,
    slopes: [Vec<f32>; 4],
}

impl Token {
    #[inline(always)]
    fn prepare(&mut self, logits: &[f32], noise: &[f32], codebook: &[f32]) {
        let d = noise.len();
        self.ids.clear();
        self.ids
            .extend((0..logits.len() as u32).filter(|&j| logits[j as usize] > f32::NEG_INFINITY));
        let wide = self.ids.len().next_multiple_of(LANES);
        for buffer in [&mut self.half_squares, &mut self.weights] {
            buffer.clear();
            buffer.resize(wide, 0.0);
        }
        self.logits.clear();
        self.logits.resize(wide, f32::NEG_INFINITY);
        self.codes.clear();
        self.codes.resize(d * wide, 0.0);
        for (at, &j) in self.ids.iter().enumerate() {
            let code = &codebook[j as usize * d..][..d];
            self.logits[at] = logits[j as usize];
            for (e, &c) in code.iter().enumerate() {
                self.codes[e * wide + at] = c;
                self.half_squares[at] += 0.5 * c * c;
            }
        }
        self.z.clear();
        self.z.extend_from_slice(noise);
        for x in self.slopes.iter_mut().chain([&mut self.stage]) {
            x.resize(d, 0.0);
        }
    }

    /// Classic Runge-Kutta steps over the grid of s, then the code of greatest posterior weight.
    #[inline(always)]
    fn solve(&mut self, grid: &[f32]) -> u32 {
        if self.ids.len() <= 1 {
            return self.ids.first().copied().unwrap_or(0);
        }
        for (&s, &end) in grid.iter().zip(&grid[1..]) {
            let h = end - s;
            self.stage.copy_from_slice(&self.z);
            let top = self.velocity(0, s);
            if let Some(leader) = self.decided(top, s) {
                return self.ids[leader];
            }
            self.advance(0, h / 2.0);
            self.velocity(1, s + h / 2.0);
            self.advance(1, h / 2.0);
            self.velocity(2, s + h / 2.0);
            self.advance(2, h);
            self.velocity(3, end);
            for (i, z) in self.z.iter_mut().enumerate() {
                let [k1, k2, k3, k4] = [0, 1, 2, 3].map(|k| self.slopes[k][i]);
                *z += h / 6.0 * (k1 + k4 + 2.0 * (k2 + k3));
            }
        }
        self.stage.copy_from_slice(&self.z);
        self.log_weights(grid[grid.len() - 1]);
        self.ids[leader(&self.weights)]
    }

    /// Moves the stage: z + h slope.
    #[inline(always)]
    fn advance(&mut self, slope: usize, h: f32) {
        for ((stage, &z), &v) in self.stage.iter_mut().zip(&self.z).zip(&self.slopes[slope]) {
            *stage = h.mul_add(v, z);
        }
    }

    /// log p_j + s <z, c_j> - s^2 |c_j|^2 / 2 at the stage.
    #[inline(always)]
    fn log_weights(&mut self, s: f32) {
        let wide = self.weights.len();
        for (block, w) in self
            .weights
            .as_chunks_mut::<LANES>()
            .0
            .iter_mut()
            .enumerate()
        {
            let at = block * LANES;
            let mut along = [0.0f32; LANES];
            for (e, &z) in self.stage.iter().enumerate() {
                let c = &self.codes[e * wide + at..][..LANES];
                for i in 0..LANES {
                    along[i] = z.mul_add(c[i], along[i]);
                }
            }
            let logits = &self.logits[at..][..LANES];
            let squares = &self.half_squares[at..][..LANES];
            for i in 0..LANES {
                w[i] = s.mul_add((-s).mul_add(squares[i], along[i]), logits[i]);
            }
        }
    }

    /// dz/ds at the stage into a slope; returns the total of the weights relative to the greatest.
    #[inline(always)]
    fn velocity(&mut self, slope: usize, s: f32) -> f32 {
        self.log_weights(s);
        let wide = self.weights.len();
        let top = max(&self.weights);
        self.weights.iter_mut().for_each(|w| *w = exp(*w - top));
        let total = sum(&self.weights, |w| w);
        let scale = 1.0 / total;
        for (e, v) in self.slopes[slope].iter_mut().enumerate() {
            *v = scale * crate::lanes::dot(&self.weights, &self.codes[e * wide..][..wide]);
        }
        total
    }

    /// The leading code, once the others together can never again get more than [`UNDECIDED`].
    ///
    /// While z moves along the leader's code c_i, its lead over c_j is a parabola in s. With a = c_i - c_j the slope is
    /// <z, a> + s <c_i, a> - s (|c_i|^2 - |c_j|^2) and the curvature |a|^2 > 0, so the lead falls by at most
    /// slope^2 / (2 |a|^2) before it grows for good.
    #[inline(always)]
    fn decided(&mut self, total: f32, s: f32) -> Option<usize> {
        // Weights are relative to the greatest, which is 1.
        if total - 1.0 > UNDECIDED {
            return None;
        }
        let (i, wide, d) = (leader(&self.weights), self.weights.len(), self.z.len());
        self.weights[i] = 0.0;
        let mut rest = [0.0f32; LANES];
        for at in (0..wide).step_by(LANES) {
            let [mut along, mut own, mut square] = [[0.0f32; LANES]; 3];
            for e in 0..d {
                let (z, ci) = (self.stage[e], self.codes[e * wide + i]);
                let cj = &self.codes[e * wide + at..][..LANES];
                for l in 0..LANES {
                    let a = ci - cj[l];
                    along[l] = z.mul_add(a, along[l]);
                    own[l] = ci.mul_add(a, own[l]);
                    square[l] = a.mul_add(a, square[l]);
                }
            }
            let squares = &self.half_squares[at..][..LANES];
            let weights = &self.weights[at..][..LANES];
            let logits = &self.logits[at..][..LANES];
            for l in 0..LANES {
                let lift = 2.0 * s * (self.half_squares[i] - squares[l]);
                let slope = s.mul_add(own[l], along[l] - lift);
                let fall = if slope < 0.0 { slope } else { 0.0 };
                let fall = 0.5 * fall * fall / (square[l] + f32::MIN_POSITIVE);
                // A weight of 0 may hide how small it is: too great a fall leaves the matter open.
                let open = fall > 60.0 && logits[l] > f32::NEG_INFINITY;
                let bound = weights[l] * exp(if fall > 60.0 { 60.0 } else { fall });
                rest[l] += if open { 1.0 } else { bound };
            }
        }
        (rest.iter().sum::<f32>() <= UNDECIDED).then_some(i)
    }
}

/// The index of the greatest, the lowest among equals.
fn leader(weights: &[f32]) -> usize {
    let top = max(weights);
    weights.iter().position(|&w| w == top).unwrap_or(0)
}
