//! Properties that any implementation of the flow map must have, on every backend.

use retort_candle::Candle;
use retort_engine::backend::{Backend, FlowSolver};
use retort_engine::flow;
use retort_engine::random::noise;

const SOLVER: FlowSolver = FlowSolver { steps: 16 };

fn map<B: Backend>(
    b: &B,
    logits: &[f32],
    eps: &[f32],
    codebook: &[f32],
    d: usize,
    composed: bool,
) -> Vec<u32> {
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
        flow::composed::<B>(&logits, &eps, &codebook, &SOLVER)
    } else {
        B::flow_map(&logits, &eps, &codebook, &SOLVER)
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

#[test]
fn fused_and_composed_agree_with_the_float64_reference() {
    let (k, d, n) = (96, 8, 200);
    let codebook = noise(7, 0, k, d);
    let eps: Vec<f32> = (0..n).flat_map(|i| noise(8, i, 1, d)).collect();
    let logits: Vec<f32> = (0..n).flat_map(|i| noise(9, i, k, 1)).collect();
    let truth: Vec<u32> = (0..n as usize)
        .map(|i| {
            flow::reference(
                &logits[i * k..(i + 1) * k],
                &eps[i * d..(i + 1) * d],
                &codebook,
                200,
            )
            .0 as u32
        })
        .collect();
    for composed in [false, true] {
        let found = map(&backend(), &logits, &eps, &codebook, d, composed);
        let equal = found.iter().zip(&truth).filter(|(a, b)| a == b).count();
        // A noise near the border of two codes' basins may fall to either side by the solver's error.
        assert!(
            equal >= n as usize - 1,
            "{equal} of {n} tokens (composed: {composed})"
        );
    }
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
