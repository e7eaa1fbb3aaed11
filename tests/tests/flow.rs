//! Properties that any implementation of the flow map must have, on every backend.

use rayon::prelude::*;
use retort_candle::Candle;
use retort_engine::backend::flow;
use retort_engine::backend::{Backend, FlowSolver};
use retort_engine::random::noise;

/// Steps of the float64 reference.
const EXACT: usize = 96;

fn map<B: Backend>(
    b: &B,
    logits: &[f32],
    eps: &[f32],
    codebook: &[f32],
    d: usize,
    composed: bool,
) -> Vec<u32> {
    let solver = FlowSolver::default();
    let (n, k) = (eps.len() / d, codebook.len() / d);
    let rows: Vec<f32> = if logits.len() == k {
        logits.repeat(n)
    } else {
        logits.to_vec()
    };
    let logits = b.floats(&rows, &[n, k]).expect("logits");
    let eps = b.floats(eps, &[n, d]).expect("noise");
    let codebook = b.floats(codebook, &[k, d]).expect("codebook");
    let ids = if composed {
        flow::composed::<B>(&logits, &eps, &codebook, &solver)
    } else {
        B::flow_map(&logits, &eps, &codebook, &solver)
    };
    B::to_indices(&ids.expect("the flow map")).expect("ids")
}

fn backend() -> Candle {
    Candle::open("cpu", "f32", 2).expect("a CPU")
}

/// The 99.99 % quantile of chi-square with many degrees of freedom (Wilson and Hilferty).
fn chi_square_limit(degrees: f64) -> f64 {
    let a = 2.0 / (9.0 * degrees);
    degrees * (1.0 - a + 3.719 * a.sqrt()).powi(3)
}

#[test]
fn the_pushforward_of_noise_is_the_distribution() {
    let (k, d, n) = (24, 4, 20_000);
    let codebook = noise(1, 0, k, d);
    let logits: Vec<f32> = noise(2, 0, k, 1).iter().map(|x| 1.2 * x).collect();
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let eps: Vec<f32> = (0..n).flat_map(|i| noise(3, i, 1, d)).collect();
    for composed in [false, true] {
        let mut counts = vec![0.0; k];
        for id in map(&backend(), &logits, &eps, &codebook, d, composed) {
            counts[id as usize] += 1.0;
        }
        let statistic: f64 = logits
            .iter()
            .zip(&counts)
            .map(|(&x, &count)| {
                let expected = f64::from(x).exp() / total * n as f64;
                (count - expected) * (count - expected) / expected
            })
            .sum();
        let limit = chi_square_limit((k - 1) as f64);
        assert!(
            statistic < limit,
            "chi-square {statistic:.1} over {limit:.1} (composed: {composed})"
        );
    }
}

#[test]
fn excluded_codes_are_never_chosen_and_a_certain_code_always_is() {
    let (k, d, n) = (40, 8, 500);
    let codebook = noise(4, 0, k, d);
    let eps: Vec<f32> = (0..n).flat_map(|i| noise(5, i, 1, d)).collect();
    let mut logits = noise(6, 0, k, 1);
    for (i, x) in logits.iter_mut().enumerate() {
        if i % 3 != 0 {
            *x = f32::NEG_INFINITY;
        }
    }
    let mut certain = vec![f32::NEG_INFINITY; k];
    certain[17] = 0.3;
    for composed in [false, true] {
        assert!(
            map(&backend(), &logits, &eps, &codebook, d, composed)
                .iter()
                .all(|id| id % 3 == 0)
        );
        assert!(
            map(&backend(), &certain, &eps, &codebook, d, composed)
                .iter()
                .all(|&id| id == 17)
        );
    }
}

/// Tokens from random logits and noise at a shape, compared with float64.
struct Shape {
    name: &'static str,
    codes: usize,
    dim: usize,
    /// The length of a code, and whether all codes have exactly this length.
    length: f32,
    normalised: bool,
}

impl Shape {
    fn codebook(&self) -> Vec<f32> {
        let mut codebook = noise(1, 0, self.codes, self.dim);
        for code in codebook.chunks_exact_mut(self.dim) {
            let own = code.iter().map(|x| x * x).sum::<f32>().sqrt();
            let by = if self.normalised {
                own
            } else {
                (self.dim as f32).sqrt()
            };
            code.iter_mut().for_each(|x| *x *= self.length / by);
        }
        codebook
    }

    /// How many of `n` tokens differ from the reference. All that do have to be ties: where moving the noise by a 1e-4 of
    /// its size leads the reference itself to the other token.
    fn differing(&self, n: usize) -> usize {
        let (k, d, codebook) = (self.codes, self.dim, self.codebook());
        let batch = n.min(250);
        let mut differing = 0;
        for first in (0..n).step_by(batch) {
            let tokens = first as u64..(first + batch) as u64;
            let eps: Vec<f32> = tokens.clone().flat_map(|i| noise(2, i, 1, d)).collect();
            // From nearly uniform to nearly certain distributions.
            let spread = |i: u64| 0.5 + (i % 8) as f32;
            let logits: Vec<f32> = tokens
                .flat_map(|i| noise(3, i, 1, k).into_iter().map(move |x| spread(i) * x))
                .collect();
            let found = map(&backend(), &logits, &eps, &codebook, d, false);
            let of = |i: usize, eps: &[f32]| {
                flow::reference(&logits[i * k..][..k], eps, &codebook, EXACT).0 as u32
            };
            let wrong: Vec<usize> = (0..batch)
                .into_par_iter()
                .filter(|&i| of(i, &eps[i * d..][..d]) != found[i])
                .collect();
            differing += wrong.len();
            for i in wrong {
                let flips = |sample: u64| {
                    let way = noise(4, sample, 1, d);
                    let moved = way.iter().zip(&eps[i * d..][..d]);
                    let moved: Vec<f32> = moved.map(|(way, eps)| eps + TIE * way).collect();
                    of(i, &moved) == found[i]
                };
                assert!(
                    (0..64).into_par_iter().any(flips),
                    "{}: token {} is {}, and is no tie",
                    self.name,
                    first + i,
                    found[i]
                );
            }
        }
        eprintln!(
            "{}: {differing} of {n} tokens differ from float64",
            self.name
        );
        differing
    }
}

/// For noise with elements around 1: the accuracy of f32 after some dozens of steps.
const TIE: f32 = 1e-4;

#[test]
fn tokens_are_those_of_float64() {
    let shape = |name, codes, dim, length, normalised| Shape {
        name,
        codes,
        dim,
        length,
        normalised,
    };
    for shape in [
        shape("unit codes", 1024, 8, 1.0, true),
        shape("long codes", 512, 32, 5.6, false),
        shape("few codes", 48, 4, 2.0, false),
        shape("short codes", 300, 5, 0.05, false),
    ] {
        assert_eq!(shape.differing(300), 0, "{}", shape.name);
    }
}

#[test]
#[ignore = "ten minutes: make test-long"]
fn ten_thousand_tokens_at_published_shapes_are_those_of_float64() {
    let llamagen = Shape {
        name: "LlamaGen",
        codes: 16384,
        dim: 8,
        length: 1.0,
        normalised: true,
    };
    let var = Shape {
        name: "VAR",
        codes: 4096,
        dim: 32,
        length: 2.0,
        normalised: false,
    };
    for shape in [var, llamagen] {
        assert!(shape.differing(10_000) <= 10, "{}", shape.name);
    }
}

#[test]
fn fused_and_composed_agree() {
    let (k, d, n) = (96, 8, 200);
    let codebook = noise(7, 0, k, d);
    let eps: Vec<f32> = (0..n).flat_map(|i| noise(8, i, 1, d)).collect();
    let logits: Vec<f32> = (0..n).flat_map(|i| noise(9, i, k, 1)).collect();
    let of = |composed| map(&backend(), &logits, &eps, &codebook, d, composed);
    assert_eq!(of(false), of(true));
}

#[test]
fn the_batch_does_not_matter() {
    let (k, d, n) = (64, 4, 300);
    let codebook = noise(10, 0, k, d);
    let eps: Vec<f32> = (0..n).flat_map(|i| noise(11, i, 1, d)).collect();
    let logits: Vec<f32> = (0..n).flat_map(|i| noise(12, i, k, 1)).collect();
    let whole = map(&backend(), &logits, &eps, &codebook, d, false);
    let parts: Vec<u32> = (0..n as usize)
        .flat_map(|i| {
            map(
                &backend(),
                &logits[i * k..(i + 1) * k],
                &eps[i * d..(i + 1) * d],
                &codebook,
                d,
                false,
            )
        })
        .collect();
    assert_eq!(whole, parts);
}
