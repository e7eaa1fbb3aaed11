//! Checks networks' outputs while samples are made: NaN and infinity are an error that names the sample. Otherwise backends
//! could choose any code from such logits.
//!
//! Each tensor (b, ..) is reduced to one sum per sample on the device; the sums are checked once, at the end.

use crate::backend::Backend;
use crate::error::{Error, Result};

/// The sums of checked values.
pub struct FiniteCheck<B: Backend> {
    /// Whose tensors they are, for messages.
    whose: &'static str,
    /// The AR step of each, and its sums (b, 1).
    sums: Vec<(usize, B::Tensor)>,
}

impl<B: Backend> FiniteCheck<B> {
    /// A check without any tensors yet, for outputs described as in "the teacher's logits".
    pub fn new(whose: &'static str) -> Self {
        let sums = Vec::new();
        Self { whose, sums }
    }

    /// Adds a tensor (b, ..) of an AR step, all of whose elements must be finite.
    pub fn watch(&mut self, step: usize, x: &B::Tensor) -> Result<()> {
        let shape = B::shape(x);
        let all: Vec<usize> = (1..shape.len()).collect();
        let sums = B::reshape(&B::sum(x, &all)?, &[shape[0], 1])?;
        self.sums.push((step, sums));
        Ok(())
    }

    /// An error that names the first sample of the batch, and its first AR step, whose elements were not all finite.
    pub fn check(self) -> Result<()> {
        let sums: Vec<&B::Tensor> = self.sums.iter().map(|(_, sums)| sums).collect();
        if sums.is_empty() {
            return Ok(());
        }
        let floats = B::to_floats(&B::cat(&sums, 1)?)?;
        let Some(at) = floats.iter().position(|x| !x.is_finite()) else {
            return Ok(());
        };
        let (sample, step) = (at / sums.len(), self.sums[at % sums.len()].0);
        let message = format!("{} at AR step {step} are not finite", self.whose);
        Err(Error::NotFinite {
            sample: sample as u64,
            message,
        })
    }
}
