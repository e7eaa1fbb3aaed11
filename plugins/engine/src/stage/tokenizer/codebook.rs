//! A codebook in training: usage of codes, restarts of unused ones, and codes as moving averages of the vectors assigned to
//! them (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1) instead of following a gradient.

use std::cell::RefCell;
use std::ops::Range;

use crate::backend::Backend;
use crate::collective::Collective;
use crate::error::Result;
use crate::random::{Sequence, Stream};

/// The decay per step of a code's usage count.
const FADING: f64 = 0.98;
/// The remainder of one use after 150 steps.
const FADED: f32 = 0.048;
/// A codebook counts as collapsed below this share of used codes.
pub const COLLAPSED: f64 = 0.05;

/// A codebook in training. The state for later steps is one list, for the checkpoint: K flags of use since the last restart
/// (0 or 1), K decaying usage counts, and with averages K weights and K x D sums.
pub struct Codebook<'a, B: Backend> {
    backend: &'a B,
    /// (K, D), which the tokenizer in training holds too.
    tensor: B::Tensor,
    size: usize,
    dim: usize,
    /// Decay of the averages, if the codes are averages.
    decay: Option<f64>,
    /// The numbers.
    pub kept: RefCell<Vec<f32>>,
    /// The look-ups of the step's parts so far.
    lookups: RefCell<Lookups>,
}

/// The look-ups of a batch's images.
#[derive(Debug, Default)]
pub struct Lookups {
    /// Ids of tokens.
    pub tokens: Vec<u32>,
    /// The vectors (n, D) for which codes were looked up, if needed.
    pub z: Vec<f32>,
}

impl<'a, B: Backend> Codebook<'a, B> {
    /// That of a new tokenizer.
    pub fn new(backend: &'a B, tensor: B::Tensor, decay: Option<f64>) -> Result<Self> {
        let shape = B::shape(&tensor);
        let (size, dim) = (shape[0], shape[1]);
        let mut kept = vec![0.0; 2 * size];
        if decay.is_some() {
            kept.extend(vec![1.0; size]);
            kept.extend(B::to_floats(&tensor)?);
        }
        Ok(Self {
            backend,
            tensor,
            size,
            dim,
            decay,
            kept: RefCell::new(kept),
            lookups: RefCell::default(),
        })
    }

    /// Sets the codes to their averages, if they are averages.
    pub fn settle(&self) -> Result<()> {
        if self.decay.is_none() {
            return Ok(());
        }
        let kept = self.kept.borrow();
        let (weights, sums) = kept[2 * self.size..].split_at(self.size);
        let (total, few) = (weights.iter().sum::<f32>(), 1e-5);
        let mut codes = sums.to_vec();
        for (code, weight) in codes.chunks_exact_mut(self.dim).zip(weights) {
            // No weight is quite 0.
            let weight = (weight + few) / (total + self.size as f32 * few) * total;
            code.iter_mut().for_each(|x| *x /= weight);
        }
        let codes = self.backend.floats(&codes, &[self.size, self.dim])?;
        B::assign_(&self.tensor, &codes)
    }

    /// Adds the look-ups of a part of a batch: ids of tokens, and their vectors (n, D) if the step needs them.
    pub fn look_up(&self, tokens: &B::Tensor, z: Option<&B::Tensor>) -> Result<()> {
        let mut lookups = self.lookups.borrow_mut();
        lookups.tokens.extend(B::to_indices(tokens)?);
        if let Some(z) = z {
            lookups.z.extend(B::to_floats(z)?);
        }
        Ok(())
    }

    /// Updates the state with the look-ups of all parts of a step and all ranks, and returns them. This rank has those of
    /// images `own` of `all`.
    pub fn note(&self, ranks: &dyn Collective, own: Range<usize>, all: usize) -> Result<Lookups> {
        let mut lookups = std::mem::take(&mut *self.lookups.borrow_mut());
        if ranks.is_shared() {
            let of_all = |values: &[f32]| match values.len() / own.len() {
                0 => Ok(Vec::new()),
                each => ranks.gather(values, own.start * each, all * each),
            };
            // Ids are below 2^24, so f32 represents them exactly.
            let tokens: Vec<f32> = lookups.tokens.iter().map(|&token| token as f32).collect();
            lookups.tokens = of_all(&tokens)?.iter().map(|&token| token as u32).collect();
            lookups.z = of_all(&lookups.z)?;
        }
        self.count(&lookups);
        Ok(lookups)
    }

    fn count(&self, Lookups { tokens, z }: &Lookups) {
        let mut kept = self.kept.borrow_mut();
        let (used, rest) = kept.split_at_mut(self.size);
        let (uses, averages) = rest.split_at_mut(self.size);
        uses.iter_mut().for_each(|x| *x *= FADING as f32);
        for &token in tokens {
            used[token as usize] = 1.0;
            uses[token as usize] += 1.0;
        }
        let Some(decay) = self.decay else { return };
        // The step will be skipped: its changes must not remain.
        if !z.iter().all(|x| x.is_finite()) {
            return;
        }
        let decay = decay as f32;
        averages.iter_mut().for_each(|x| *x *= decay);
        let (weights, sums) = averages.split_at_mut(self.size);
        for (&token, z) in tokens.iter().zip(z.chunks_exact(self.dim)) {
            let token = token as usize;
            weights[token] += 1.0 - decay;
            let sum = &mut sums[token * self.dim..(token + 1) * self.dim];
            for (sum, x) in sum.iter_mut().zip(z) {
                *sum += (1.0 - decay) * x;
            }
        }
    }

    /// Share of recently used codes, and the perplexity of their use: the number of evenly used codes that would be as hard
    /// to predict.
    pub fn use_lately(&self) -> (f64, f64) {
        let kept = self.kept.borrow();
        let uses = &kept[self.size..2 * self.size];
        let total: f64 = uses.iter().map(|&x| f64::from(x)).sum();
        let used = uses.iter().filter(|x| **x > FADED).count();
        let entropy = uses.iter().filter(|x| **x > 0.0).map(|&x| {
            let share = f64::from(x) / total;
            -share * share.ln()
        });
        (used as f64 / self.size as f64, entropy.sum::<f64>().exp())
    }

    /// Moves codes unused since the last restart onto random ones of the looked-up vectors (n, D). Returns their ids.
    pub fn restart(&self, z: &[f32], seed: u64, step: u64) -> Result<Vec<usize>> {
        if !z.iter().all(|x| x.is_finite()) {
            return Ok(Vec::new());
        }
        let mut kept = self.kept.borrow_mut();
        let idle: Vec<usize> = (0..self.size).filter(|&code| kept[code] == 0.0).collect();
        kept[..self.size].fill(0.0);
        if idle.is_empty() {
            return Ok(idle);
        }
        let d = self.dim;
        let mut codes = B::to_floats(&self.tensor)?;
        let mut choice = Sequence::new(seed, Stream::Restart, step);
        for &code in &idle {
            let row = choice.below(z.len() / d);
            let z = &z[row * d..(row + 1) * d];
            codes[code * d..(code + 1) * d].copy_from_slice(z);
            if self.decay.is_some() {
                kept[2 * self.size + code] = 1.0;
                let sums = 3 * self.size + code * d;
                kept[sums..sums + d].copy_from_slice(z);
            }
        }
        let codes = self.backend.floats(&codes, &[self.size, d])?;
        B::assign_(&self.tensor, &codes)?;
        Ok(idle)
    }
}
