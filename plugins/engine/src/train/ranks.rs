//! What ranks that train together tell each other.

use std::collections::BTreeMap;

use retort_abi::Cancel;

use super::{Fit, Moments};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tape::scalar;

/// Gradients that ranks add up at a time: 25 MB.
const BUCKET: usize = 25 << 18;

impl<B: Backend> Fit<'_, B> {
    /// Sums over all ranks: gradients, loss and figures. Returns whether one of them has been asked to stop.
    pub(super) fn reduce(
        &self,
        gradients: &mut [B::Tensor],
        loss: &mut B::Tensor,
        figures: &mut [(&'static str, f64)],
    ) -> Result<bool> {
        let stop = self.host.cancelled() != Cancel::Run;
        let mut head = vec![f32::from(stop), scalar::<B>(loss)? as f32];
        head.extend(figures.iter().map(|(_, figure)| *figure as f32));
        self.ranks.all_reduce(&mut head)?;
        *loss = self.backend.floats(&head[1..2], &B::shape(loss))?;
        for ((_, figure), sum) in figures.iter_mut().zip(&head[2..]) {
            *figure = f64::from(*sum);
        }
        let stop = head[0] > 0.0;
        let (mut bucket, mut first) = (Vec::new(), 0);
        for last in 0..gradients.len() {
            bucket.extend(B::to_floats(&gradients[last])?);
            if bucket.len() < BUCKET && last + 1 < gradients.len() {
                continue;
            }
            self.ranks.all_reduce(&mut bucket)?;
            let mut sums = bucket.as_slice();
            for gradient in &mut gradients[first..=last] {
                let shape = B::shape(gradient);
                let (own, rest) = sums.split_at(shape.iter().product());
                *gradient = self.backend.floats(own, &shape)?;
                sums = rest;
            }
            bucket.clear();
            first = last + 1;
        }
        Ok(stop)
    }

    /// Has all ranks begin with the state of the first.
    pub(super) fn agree(&self, start: u64, moments: &[Moments<B>]) -> Result<()> {
        if !self.ranks.is_shared() {
            return Ok(());
        }
        let halves = [(start >> 20) as f32, (start & 0xf_ffff) as f32];
        let mut of_the_first = halves;
        self.ranks.broadcast(&mut of_the_first, 0)?;
        let mut unlike = [f32::from(halves != of_the_first)];
        self.ranks.all_reduce(&mut unlike)?;
        if unlike[0] > 0.0 {
            let message = "the workers of this training have found different checkpoints: they must see the same work directory";
            return Err(Error::Data {
                path: self.path().unwrap_or_default(),
                message: message.into(),
            });
        }
        let own = self.params.iter().map(|(_, p)| p.value());
        let states = moments.iter().flat_map(|state| [&state.m, &state.v]);
        let average = self.ema.into_iter().flat_map(BTreeMap::values);
        for tensor in own.chain(states).chain(average) {
            let mut data = B::to_floats(tensor)?;
            self.ranks.broadcast(&mut data, 0)?;
            if self.ranks.rank() > 0 {
                B::assign_(tensor, &self.backend.floats(&data, &B::shape(tensor))?)?;
            }
        }
        Ok(())
    }

    /// A figure that all have measured, as the first has.
    pub(super) fn of_the_first(&self, figure: f64) -> Result<f64> {
        if !self.ranks.is_shared() {
            return Ok(figure);
        }
        let bits = figure.to_bits();
        let mut parts = [0, 16, 32, 48].map(|shift| ((bits >> shift) & 0xffff) as f32);
        self.ranks.broadcast(&mut parts, 0)?;
        let bits = parts
            .iter()
            .rev()
            .fold(0, |bits, &part| bits << 16 | part as u64);
        Ok(f64::from_bits(bits))
    }
}
