//! Choosing a code from a row of logits, on the host: the default of backends, and the reference for their own versions.
//!
//! In: logits, the truncation (temperature, top-k, top-p), a number in [0, 1). Out: logits with excluded codes at -inf, or an
//! index.

use rayon::prelude::*;

use crate::backend::tensor::Tensors;
use crate::error::Result;

/// Which codes of a row of logits remain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truncation {
    /// Logits are divided by this.
    pub temperature: f64,
    /// Only this many of the most probable codes stay; 0 keeps all.
    pub top_k: usize,
    /// Of these only the most probable stay whose probabilities sum to this, including the one that exceeds it; 1 keeps all.
    pub top_p: f64,
}

/// `Sampling::truncate` on the host.
pub fn truncate<B: Tensors>(logits: &B::Tensor, truncation: &Truncation) -> Result<B::Tensor> {
    let shape = B::shape(logits);
    let mut host = B::to_floats(logits)?;
    host.par_chunks_mut(shape[1])
        .for_each(|row| truncate_row(row, truncation));
    B::of(logits).floats(&host, &shape)
}

/// `Sampling::categorical` on the host.
pub fn categorical<B: Tensors>(logits: &B::Tensor, uniforms: &[f64]) -> Result<B::Tensor> {
    let shape = B::shape(logits);
    let host = B::to_floats(logits)?;
    let ids: Vec<u32> = host
        .par_chunks(shape[1])
        .zip(uniforms)
        .map(|(row, &u)| categorical_row(row, u))
        .collect();
    B::of(logits).indices(&ids, &shape[..1])
}

/// Applies temperature, top-k and top-p to a row of logits; excluded codes become -inf.
pub fn truncate_row(row: &mut [f32], truncation: &Truncation) {
    let t = truncation.temperature as f32;
    row.iter_mut().for_each(|x| *x /= t);
    let Truncation { top_k, top_p, .. } = *truncation;
    let keeps_all = (top_k == 0 || top_k >= row.len()) && top_p >= 1.0;
    if keeps_all {
        return;
    }
    // Codes in descending order; equal ones by index, so that the result is deterministic.
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
    let mut keep = if top_k == 0 {
        row.len()
    } else {
        top_k.min(row.len())
    };
    // As in torch, codes equal to the last one stay too.
    let last = row[order[keep - 1] as usize];
    keep += order[keep..]
        .iter()
        .take_while(|&&i| row[i as usize] == last)
        .count();
    if top_p < 1.0 {
        let max = row[order[0] as usize];
        let weight = |&i: &u32| f64::from(row[i as usize] - max).exp();
        let total: f64 = order[..keep].iter().map(weight).sum();
        let mut sum = 0.0;
        keep = order[..keep]
            .iter()
            .position(|i| {
                sum += weight(i);
                sum > top_p * total
            })
            .map_or(keep, |last| last + 1);
    }
    for &i in &order[keep..] {
        row[i as usize] = f32::NEG_INFINITY;
    }
}

/// The code at which the cumulative probability passes u in [0, 1).
pub fn categorical_row(logits: &[f32], u: f64) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |x: f32| f64::from(x - max).exp();
    let total: f64 = logits.iter().map(|&x| weight(x)).sum();
    let mut left = u * total;
    let mut last = 0;
    for (i, &x) in logits.iter().enumerate() {
        let w = weight(x);
        if w > 0.0 {
            last = i;
            left -= w;
            if left < 0.0 {
                break;
            }
        }
    }
    last as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Truncation = Truncation {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
    };

    fn kept(truncation: Truncation, logits: &[f32]) -> Vec<usize> {
        let mut row = logits.to_vec();
        truncate_row(&mut row, &truncation);
        row.iter()
            .enumerate()
            .filter(|(_, x)| x.is_finite())
            .map(|(i, _)| i)
            .collect()
    }

    #[test]
    fn truncation_keeps_the_probable() {
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        assert_eq!(kept(ALL, &logits), [0, 1, 2, 3]);
        assert_eq!(kept(Truncation { top_k: 2, ..ALL }, &logits), [1, 3]);
        // Codes equal to the last one stay.
        let two = Truncation { top_k: 2, ..ALL };
        assert_eq!(kept(two, &[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]), [1, 2, 3, 4]);
        // 0.4 + 0.3 = 0.7 is over 0.5: the code that passes the threshold stays.
        assert_eq!(kept(Truncation { top_p: 0.5, ..ALL }, &logits), [1, 3]);
        assert_eq!(kept(Truncation { top_p: 0.3, ..ALL }, &logits), [1]);
        let one = Truncation {
            top_k: 1,
            temperature: 5.0,
            ..ALL
        };
        assert_eq!(kept(one, &logits), [1]);
    }

    #[test]
    fn categorical_follows_the_probabilities() {
        let logits = [
            f32::NEG_INFINITY,
            0.25f32.ln(),
            0.75f32.ln(),
            f32::NEG_INFINITY,
        ];
        assert_eq!(categorical_row(&logits, 0.0), 1);
        assert_eq!(categorical_row(&logits, 0.2499), 1);
        assert_eq!(categorical_row(&logits, 0.2501), 2);
        assert_eq!(categorical_row(&logits, 1.0 - f64::EPSILON), 2);
    }
}
