//! The AR flow map; `retort_engine::backend::flow` has the mathematics.
//!
//! A token's state is small and the codebook is large, so a few tokens go through the codebook together, a tile at a time;
//! log weights, weights and velocity are computed while the tile is in the cache. The codebook is stored transposed, so that
//! a vector holds the same coordinate of adjacent codes.
//!
//! A token leaves its group as soon as few codes matter to it and continues with a copy of those; it ends as soon as no code
//! can overtake the leading one. Its result does not depend on the other tokens.

use std::sync::Mutex;

use retort_engine::backend::FlowSolver;
use retort_engine::backend::flow;

use crate::lanes::{LANES, exp, max, sum};
use crate::pool::chunks;
use crate::{Pool, wide};

/// Probability that may still go to other codes when a token counts as decided.
pub const UNDECIDED: f32 = 1e-6;

/// A code whose posterior is e^-30 of the greatest is dropped: all 16384 codes of a large codebook together would then have
/// less than 2e-9. The posterior is a martingale along the path, so a dropped code turns out to be the token about that
/// rarely; a test compares tokens with and without dropping.
pub const DROPPED: f32 = 30.0;

/// Codes per tile.
const TILE: usize = 256;

/// Tokens per group.
const GROUP: usize = 4;

/// logits (n, k), -inf where excluded; noise (n, d); codebook (k, d) -> ids (n).
pub fn flow_map(
    pool: &impl Pool,
    logits: &[f32],
    noise: &[f32],
    codebook: &[f32],
    d: usize,
    solver: &FlowSolver,
) -> Vec<u32> {
    solve(pool, logits, noise, codebook, d, solver, DROPPED)
}

fn solve(
    pool: &impl Pool,
    logits: &[f32],
    noise: &[f32],
    codebook: &[f32],
    d: usize,
    solver: &FlowSolver,
    dropped: f32,
) -> Vec<u32> {
    let (n, k) = (noise.len() / d, codebook.len() / d);
    let all = Codes::new(codebook, d);
    let steps = flow::steps_for(codebook, d, solver).into_iter();
    let steps: &[Step] = &steps.map(Step::from).collect::<Vec<_>>();
    let kept = steps
        .iter()
        .map(|step| step.corrector.len())
        .max()
        .unwrap_or(0);
    let group = n.div_ceil(pool.threads()).clamp(1, GROUP);
    // Groups per task: a small group alone is not worth a task.
    let groups = (256 * 1024 / (group * k * d * steps.len())).clamp(1, 64);
    let mut ids = vec![0; n];
    // Working memory that tasks reuse.
    let spare: Mutex<Vec<(Vec<Token>, Vec<f32>)>> = Mutex::default();
    chunks(pool, &mut ids, groups * group, |task, ids| {
        let found = spare.lock().ok().and_then(|mut spare| spare.pop());
        let mut working =
            found.unwrap_or_else(|| (vec![Token::default(); group], vec![0.0; GROUP * TILE]));
        let (tokens, tiles) = &mut working;
        for (i, ids) in ids.chunks_mut(group).enumerate() {
            let tokens = &mut tokens[..ids.len()];
            for (g, token) in tokens.iter_mut().enumerate() {
                let at = (task * groups + i) * group + g;
                token.begin(&logits[at * k..][..k], &noise[at * d..][..d], kept);
            }
            together(tokens, &all, steps, dropped, tiles);
            for (id, token) in ids.iter_mut().zip(tokens) {
                *id = token.finish(steps, dropped, tiles);
            }
        }
        if let Ok(mut spare) = spare.lock() {
            spare.push(working);
        }
    });
    ids
}

/// [`flow::Step`] in f32.
struct Step {
    s: f32,
    predictor: Vec<f32>,
    corrector: Vec<f32>,
}

impl From<flow::Step> for Step {
    fn from(step: flow::Step) -> Self {
        let narrow = |weights: Vec<f64>| weights.into_iter().map(|w| w as f32).collect();
        Self {
            s: step.s as f32,
            predictor: narrow(step.predictor),
            corrector: narrow(step.corrector),
        }
    }
}

/// Codes with derived values, padded to a multiple of [`LANES`].
#[derive(Clone, Default)]
struct Codes {
    /// Their coordinates (d, padded); zeros beyond.
    coordinates: Vec<f32>,
    /// Half their squared lengths.
    half_squares: Vec<f32>,
    /// Their numbers in the codebook, without padding.
    ids: Vec<u32>,
}

impl Codes {
    /// All rows of a codebook (k, d).
    fn new(codebook: &[f32], d: usize) -> Self {
        let padded = (codebook.len() / d).next_multiple_of(LANES);
        let mut codes = Self {
            coordinates: vec![0.0; d * padded],
            half_squares: vec![0.0; padded],
            ids: (0..(codebook.len() / d) as u32).collect(),
        };
        // A few codes at a time, because one coordinate of all of them would touch as many cache lines.
        for (block, some) in codebook.chunks(d * LANES).enumerate() {
            let at = block * LANES;
            for e in 0..d {
                let from = some[e..].iter().step_by(d);
                let to = &mut codes.coordinates[e * padded + at..][..LANES];
                to.iter_mut().zip(from).for_each(|(to, &c)| *to = c);
            }
            let squares = &mut codes.half_squares[at..][..LANES];
            for (square, code) in squares.iter_mut().zip(some.chunks_exact(d)) {
                *square = code.iter().fold(0.0, |sum, c| sum + 0.5 * c * c);
            }
        }
        codes
    }

    /// Some of them.
    fn only(&self, places: &[usize], d: usize) -> Self {
        let (from, to) = (self.padded(), places.len().next_multiple_of(LANES));
        let mut coordinates = vec![0.0; d * to];
        for (to, from) in coordinates
            .chunks_exact_mut(to)
            .zip(self.coordinates.chunks_exact(from))
        {
            to.iter_mut()
                .zip(places)
                .for_each(|(to, &at)| *to = from[at]);
        }
        let mut half_squares = vec![0.0; to];
        half_squares
            .iter_mut()
            .zip(places)
            .for_each(|(to, &at)| *to = self.half_squares[at]);
        let ids = places.iter().map(|&at| self.ids[at]).collect();
        Self {
            coordinates,
            half_squares,
            ids,
        }
    }

    fn padded(&self) -> usize {
        self.half_squares.len()
    }
}

/// One position's state, reused for the next token.
#[derive(Clone, Default)]
struct Token {
    /// Logits of the remaining codes, padded with -inf.
    logits: Vec<f32>,
    /// Their log weights at the last evaluation.
    log_weights: Vec<f32>,
    /// z = x/(1-t)
    z: Vec<f32>,
    /// z at the evaluation points, and the velocities there, the newest first.
    ahead: Vec<f32>,
    slopes: Vec<Vec<f32>>,
    /// Sums of weights times coordinates so far, in eight lanes each: (d, 8).
    sums: Vec<f32>,
    /// Greatest log weight, and the total of the weights relative to it.
    top: f32,
    total: f32,
    /// Which step comes next.
    step: usize,
    /// The codes that it has just kept.
    taken: Option<Codes>,
    /// The token, once it is known.
    found: Option<u32>,
}

/// Runs tokens through the steps until each has left the group, or to the end.
fn together(tokens: &mut [Token], all: &Codes, steps: &[Step], dropped: f32, tiles: &mut [f32]) {
    let mut open: Vec<&mut Token> = tokens.iter_mut().collect();
    for step in steps {
        advance(&mut open, all, step, tiles);
        for token in &mut open {
            token.leave(all, step.s, dropped);
        }
        open.retain(|token| token.found.is_none() && token.taken.is_none());
        if open.is_empty() {
            return;
        }
    }
    for token in open {
        token.found = Some(all.ids[leader(&token.log_weights)]);
    }
}

/// A step of tokens: predict, evaluate, correct.
fn advance(tokens: &mut [&mut Token], codes: &Codes, step: &Step, tiles: &mut [f32]) {
    for token in tokens.iter_mut() {
        token.ahead.copy_from_slice(&token.z);
        move_along(&mut token.ahead, &step.predictor, &token.slopes);
        token.slopes.rotate_right(1);
    }
    evaluate(tokens, codes, step.s, tiles);
    for token in tokens {
        move_along(&mut token.z, &step.corrector, &token.slopes);
        token.step += 1;
    }
}

/// Adds weights times slopes.
fn move_along(z: &mut [f32], weights: &[f32], slopes: &[Vec<f32>]) {
    for (&weight, slope) in weights.iter().zip(slopes) {
        for (z, &slope) in z.iter_mut().zip(slope) {
            *z = weight.mul_add(slope, *z);
        }
    }
}

/// Computes dz/ds of tokens as their newest slope, with the log weights, their maximum and the total of the weights.
fn evaluate(tokens: &mut [&mut Token], codes: &Codes, s: f32, tiles: &mut [f32]) {
    match tokens {
        [a] => group([&mut **a], codes, s, tiles),
        [a, b] => group([&mut **a, &mut **b], codes, s, tiles),
        [a, b, c] => group([&mut **a, &mut **b, &mut **c], codes, s, tiles),
        [a, b, c, d] => {
            let four = [&mut **a, &mut **b, &mut **c, &mut **d];
            group(four, codes, s, tiles);
        }
        more => unreachable!("{} tokens in a group", more.len()),
    }
}

#[inline(always)]
fn group<const G: usize>(mut tokens: [&mut Token; G], codes: &Codes, s: f32, tiles: &mut [f32]) {
    let (padded, d) = (codes.padded(), tokens[0].z.len());
    for token in &mut tokens {
        token.sums.fill(0.0);
        (token.top, token.total) = (f32::NEG_INFINITY, 0.0);
    }
    for start in (0..padded).step_by(TILE) {
        let width = TILE.min(padded - start);
        for at in (0..width).step_by(LANES) {
            let mut along = [[wide::ZERO; 2]; G];
            for e in 0..d {
                let c = wide::pair(lanes(&codes.coordinates[e * padded + start + at..]));
                for g in 0..G {
                    let z = wide::splat(tokens[g].ahead[e]);
                    along[g] = [0, 1].map(|i| wide::mul_add(z, c[i], along[g][i]));
                }
            }
            let squares = lanes(&codes.half_squares[start + at..]);
            for g in 0..G {
                let along = wide::sixteen(along[g]);
                let token = &mut *tokens[g];
                let logits = lanes(&token.logits[start + at..]);
                let out = &mut token.log_weights[start + at..][..LANES];
                for i in 0..LANES {
                    out[i] = s.mul_add((-s).mul_add(squares[i], along[i]), logits[i]);
                }
            }
        }
        for (g, token) in tokens.iter_mut().enumerate() {
            token.weigh(start, &mut tiles[g * TILE..][..width]);
        }
        let mut e = 0;
        while e + 2 <= d {
            weighted_sums::<G, 2>(&mut tokens, codes, [e, start, width], tiles);
            e += 2;
        }
        if e < d {
            weighted_sums::<G, 1>(&mut tokens, codes, [e, start, width], tiles);
        }
    }
    for token in &mut tokens {
        let scale = 1.0 / token.total;
        for (v, lanes) in token.slopes[0]
            .iter_mut()
            .zip(token.sums.as_chunks::<8>().0)
        {
            let [a, b, c, d, e, f, g, h] = lanes;
            *v = scale * (((a + e) + (c + g)) + ((b + f) + (d + h)));
        }
    }
}

/// Adds the weights of a tile times coordinates e to e + E of its codes.
#[inline(always)]
fn weighted_sums<const G: usize, const E: usize>(
    tokens: &mut [&mut Token; G],
    codes: &Codes,
    [e, start, width]: [usize; 3],
    tiles: &[f32],
) {
    let padded = codes.padded();
    let mut sums = [[wide::ZERO; E]; G];
    for g in 0..G {
        let before = tokens[g].sums.as_chunks::<8>().0;
        sums[g] = std::array::from_fn(|i| wide::load(&before[e + i]));
    }
    let coordinates: [&[[f32; 8]]; E] = std::array::from_fn(|i| {
        codes.coordinates[(e + i) * padded + start..][..width]
            .as_chunks()
            .0
    });
    let weights: [&[[f32; 8]]; G] =
        std::array::from_fn(|g| tiles[g * TILE..][..width].as_chunks().0);
    for at in 0..width / 8 {
        let c: [_; E] = std::array::from_fn(|i| wide::load(&coordinates[i][at]));
        for g in 0..G {
            let w = wide::load(&weights[g][at]);
            for i in 0..E {
                sums[g][i] = wide::mul_add(w, c[i], sums[g][i]);
            }
        }
    }
    for g in 0..G {
        let to = tokens[g].sums.as_chunks_mut::<8>().0;
        for i in 0..E {
            to[e + i] = wide::store(sums[g][i]);
        }
    }
}

fn lanes(x: &[f32]) -> &[f32; LANES] {
    x.first_chunk().expect("padded to whole lanes")
}

impl Token {
    fn begin(&mut self, logits: &[f32], noise: &[f32], kept: usize) {
        let d = noise.len();
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let padded = logits.len().next_multiple_of(LANES);
        self.logits.resize(padded, f32::NEG_INFINITY);
        self.log_weights.resize(padded, 0.0);
        for x in [&mut self.z, &mut self.ahead] {
            x.clear();
            x.extend_from_slice(noise);
        }
        self.slopes.resize(kept, Vec::new());
        self.slopes.iter_mut().for_each(|x| x.resize(d, 0.0));
        self.sums.resize(8 * d, 0.0);
        (self.step, self.taken, self.found) = (0, None, None);
    }

    /// Weights of the codes from `start` on, relative to the greatest so far; earlier sums are rescaled.
    #[inline(always)]
    fn weigh(&mut self, start: usize, weights: &mut [f32]) {
        let log_weights = &self.log_weights[start..][..weights.len()];
        let top = max(log_weights);
        if top > self.top {
            let scale = exp(self.top - top);
            self.total *= scale;
            self.sums.iter_mut().for_each(|x| *x *= scale);
            self.top = top;
        }
        // Only excluded codes so far: any finite number will do.
        let top = if self.top == f32::NEG_INFINITY {
            0.0
        } else {
            self.top
        };
        let pairs = weights.iter_mut().zip(log_weights);
        pairs.for_each(|(w, &log)| *w = exp(log - top));
        self.total += sum(weights, |w| w);
    }

    /// After an evaluation: ends if the token is decided, and keeps only the codes that still matter if most do not.
    fn leave(&mut self, codes: &Codes, s: f32, dropped: f32) {
        let least = self.top - dropped;
        let log_weights = self.log_weights.iter();
        let left = log_weights.map(|&w| u32::from(w > least)).sum::<u32>() as usize;
        if left <= 1 {
            let at = leader(&self.log_weights);
            self.found = Some(codes.ids.get(at).copied().unwrap_or(0));
        } else if let Some(at) = self.decided(codes, s) {
            self.found = Some(codes.ids[at]);
        } else if 2 * left <= codes.padded() {
            let places = 0..codes.ids.len();
            let places: Vec<usize> = places.filter(|&at| self.log_weights[at] > least).collect();
            let codes = codes.only(&places, self.z.len());
            for x in [&mut self.logits, &mut self.log_weights] {
                *x = places.iter().map(|&at| x[at]).collect();
                x.resize(codes.padded(), f32::NEG_INFINITY);
            }
            self.taken = Some(codes);
        }
    }

    /// The remaining steps after it left its group.
    fn finish(&mut self, steps: &[Step], dropped: f32, tiles: &mut [f32]) -> u32 {
        let mut codes = Codes::default();
        while self.found.is_none() {
            if let Some(fewer) = self.taken.take() {
                codes = fewer;
            }
            let Some(step) = steps.get(self.step) else {
                self.found = Some(codes.ids[leader(&self.log_weights)]);
                break;
            };
            advance(&mut [self], &codes, step, tiles);
            self.leave(&codes, step.s, dropped);
        }
        self.found.unwrap_or(0)
    }

    /// The leading code, once the others together can never exceed [`UNDECIDED`].
    ///
    /// While z moves along the leader's code c_i, its lead over c_j is a parabola in s. With a = c_i - c_j the slope is
    /// <z, a> + s <c_i, a> - s (|c_i|^2 - |c_j|^2) and the curvature |a|^2 > 0, so the lead falls by at most
    /// slope^2 / (2 |a|^2) before it grows for good.
    fn decided(&self, codes: &Codes, s: f32) -> Option<usize> {
        // Weights are relative to the greatest, which is 1.
        if self.total - 1.0 > UNDECIDED {
            return None;
        }
        let (i, wide, d) = (leader(&self.log_weights), codes.padded(), self.ahead.len());
        let mut rest = [0.0f32; LANES];
        for at in (0..wide).step_by(LANES) {
            let [mut along, mut own, mut square] = [[0.0f32; LANES]; 3];
            for e in 0..d {
                let (z, ci) = (self.ahead[e], codes.coordinates[e * wide + i]);
                let cj = lanes(&codes.coordinates[e * wide + at..]);
                for l in 0..LANES {
                    let a = ci - cj[l];
                    along[l] = z.mul_add(a, along[l]);
                    own[l] = ci.mul_add(a, own[l]);
                    square[l] = a.mul_add(a, square[l]);
                }
            }
            let squares = lanes(&codes.half_squares[at..]);
            let log_weights = lanes(&self.log_weights[at..]);
            for l in 0..LANES {
                let lift = 2.0 * s * (codes.half_squares[i] - squares[l]);
                let slope = s.mul_add(own[l], along[l] - lift);
                let fall = if slope < 0.0 { slope } else { 0.0 };
                let fall = 0.5 * fall * fall / (square[l] + f32::MIN_POSITIVE);
                let bound = exp(log_weights[l] - self.top + fall);
                rest[l] += if at + l == i { 0.0 } else { bound };
            }
        }
        (rest.iter().sum::<f32>() <= UNDECIDED).then_some(i)
    }
}

/// The index of the maximum, the lowest among equals.
fn leader(weights: &[f32]) -> usize {
    let top = max(weights);
    weights.iter().position(|&w| w == top).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use retort_engine::random::noise;

    use super::*;
    use crate::Rayon;

    /// Codebooks and logits like the families': (codes, dimension, length of a code, spread of the logits).
    const CASES: [(usize, usize, f32, f32); 4] = [
        (2048, 8, 1.0, 3.0),
        (2048, 8, 1.0, 0.5),
        (1024, 32, 3.0, 2.0),
        (37, 5, 1.5, 1.0),
    ];

    fn case((k, d, length, spread): (usize, usize, f32, f32), n: usize) -> [Vec<f32>; 3] {
        let scale = length / (d as f32).sqrt();
        [
            noise(3, 0, n, k).iter().map(|x| spread * x).collect(),
            noise(2, 0, n, d),
            noise(1, 0, k, d).iter().map(|x| scale * x).collect(),
        ]
    }

    const SOLVER: FlowSolver = FlowSolver { steps: flow::STEPS };

    #[test]
    fn dropping_codes_changes_no_token() {
        for shape in CASES {
            let [logits, noise, codebook] = case(shape, 400);
            let all = |dropped| {
                solve(
                    &Rayon, &logits, &noise, &codebook, shape.1, &SOLVER, dropped,
                )
            };
            assert_eq!(all(DROPPED), all(f32::INFINITY), "{shape:?}");
        }
    }

    #[test]
    fn a_token_does_not_depend_on_those_beside_it() {
        for shape in CASES {
            let (k, d) = (shape.0, shape.1);
            let [logits, noise, codebook] = case(shape, 23);
            let whole = flow_map(&Rayon, &logits, &noise, &codebook, d, &SOLVER);
            for (i, id) in whole.iter().enumerate() {
                let (logits, noise) = (&logits[i * k..][..k], &noise[i * d..][..d]);
                let alone = flow_map(&Rayon, logits, noise, &codebook, d, &SOLVER);
                assert_eq!(alone, [*id], "token {i} of {shape:?}");
            }
        }
    }
}
