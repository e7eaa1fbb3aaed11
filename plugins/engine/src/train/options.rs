//! Training options, and the resulting learning rate.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::muon::Muon;

/// How to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainOptions {
    /// Optimiser steps.
    #[schemars(range(min = 1))]
    pub steps: u64,
    /// Samples per step.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub batch: usize,
    /// Peak learning rate.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub learning_rate: f64,
    /// Steps over which the learning rate rises linearly from 0.
    pub warmup: u64,
    /// How the learning rate falls after the warm-up.
    pub decay: Decay,
    /// The learning rate at the last step, as a fraction of the peak.
    #[schemars(range(min = 0, max = 1))]
    pub final_fraction: f64,
    /// Decoupled weight decay of matrices. Vectors have none, nor have VAR's places, scales, lengths of queries and offsets of
    /// modulation, as in the published trainings.
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Decay of AdamW's first moment.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    #[schemars(range(min = 0), extend("exclusiveMaximum" = 1))]
    pub beta2: f64,
    /// Largest global norm of the gradient; 0 switches clipping off.
    #[schemars(range(min = 0))]
    pub clip: f64,
    /// Decay of the moving average of the weights, which is what gets saved; 0 switches it off. It rises to its
    /// value as (1 + step) / (10 + step), so that the average forgets the start.
    #[schemars(range(min = 0, max = 1))]
    pub ema: f64,
    /// Muon for the matrices inside the blocks, AdamW for the rest; AdamW for all, if left out.
    pub muon: Option<Muon>,
    /// How many steps in a row may have a NaN or infinite loss or gradient. Each is skipped, and counted by the
    /// series `skipped_steps`; one more fails the training.
    pub skip_at_most: u64,
    /// How far several workers divide what they hold (ZeRO): 0, not at all; 1, the optimiser's moments, so that each worker
    /// keeps an equal part of them. Results and checkpoints are the same.
    #[schemars(range(max = 1), extend("x-retort-same-result" = true))]
    pub zero_stage: u8,
    /// Seconds between checkpoints.
    #[schemars(range(min = 1))]
    pub checkpoint_seconds: u64,
}

/// A batch in one part.
pub(crate) fn one_part() -> usize {
    1
}

/// Refuses more parts of a batch than it has samples.
pub(crate) fn check_parts(parts: usize, batch: usize) -> Result<()> {
    if parts <= batch {
        return Ok(());
    }
    let message = format!("accumulate {parts}: a batch of {batch} has no more parts than samples");
    Err(Error::option("/accumulate", message))
}

/// How a learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// Not at all.
    Constant,
    /// In a straight line.
    Linear,
    /// Along half a cosine.
    Cosine,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            steps: 1000,
            batch: 64,
            learning_rate: 1e-3,
            warmup: 100,
            decay: Decay::Cosine,
            final_fraction: 0.0,
            weight_decay: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            clip: 1.0,
            ema: 0.0,
            muon: None,
            skip_at_most: 10,
            zero_stage: 0,
            checkpoint_seconds: 60,
        }
    }
}

impl TrainOptions {
    /// The learning rate of a step (counted from 0).
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.learning_rate * (step + 1) as f64 / self.warmup as f64;
        }
        let span = (self.steps.saturating_sub(self.warmup)).max(1) as f64;
        let done = ((step - self.warmup) as f64 / span).min(1.0);
        let left = match self.decay {
            Decay::Constant => return self.learning_rate,
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        };
        self.learning_rate * (self.final_fraction + (1.0 - self.final_fraction) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls() {
        let o = TrainOptions {
            steps: 100,
            warmup: 10,
            learning_rate: 1.0,
            final_fraction: 0.1,
            ..Default::default()
        };
        assert!((o.rate(0) - 0.1).abs() < 1e-12 && (o.rate(9) - 1.0).abs() < 1e-12);
        assert!((o.rate(55) - 0.55).abs() < 1e-12);
        assert!((10..99).all(|s| o.rate(s) >= o.rate(s + 1)));
        assert!((o.rate(100) - 0.1).abs() < 1e-12);
    }
}
