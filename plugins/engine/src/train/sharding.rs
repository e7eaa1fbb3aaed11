//! ZeRO-1 (Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models"): each rank holds
//! the moments of some parameters, updates these, and sends their new values to the others.
//!
//! Gradients are summed on all ranks as usual, and each parameter belongs to one rank as a whole: so values are
//! bit-identical, and Muon gets whole matrices. All ranks keep the moving average, because all measure it.

use super::ranks::BUCKET;
use super::{AdamwMoments, TrainingLoop};
use crate::backend::Backend;
use crate::error::Result;
use crate::tape::Variable;

/// Divides parameters of these sizes evenly among ranks; returns the rank of each.
fn dealt(sizes: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    // The largest first, each to the rank with the least.
    order.sort_by_key(|&at| std::cmp::Reverse(sizes[at]));
    let (mut owners, mut load) = (vec![0; sizes.len()], vec![0; ranks]);
    for at in order {
        let least = (0..ranks).min_by_key(|&rank| load[rank]).unwrap_or(0);
        owners[at] = least;
        load[least] += sizes[at];
    }
    owners
}

impl<B: Backend> TrainingLoop<'_, B> {
    /// Which rank updates each parameter; None if all update all.
    pub(super) fn owners(&self) -> Option<Vec<usize>> {
        if self.options.zero_stage == 0 || !self.ranks.is_shared() {
            return None;
        }
        let size = |(_, p): &(String, Variable<B>)| p.shape().iter().product();
        let sizes: Vec<usize> = self.params.iter().map(size).collect();
        Some(dealt(&sizes, self.ranks.size()))
    }

    /// Sends all parameters from their owners to all ranks.
    pub(super) fn spread(&self, params: &[(String, Variable<B>)], owners: &[usize]) -> Result<()> {
        if let Some(device) = self.ranks.on_device() {
            for ((_, p), &owner) in params.iter().zip(owners) {
                B::begin_exchange_(p.value(), Some(owner), device)?;
            }
            return B::end_exchanges(device);
        }
        for owner in 0..self.ranks.size() {
            let own = params.iter().zip(owners).filter(|(_, of)| **of == owner);
            let mut bucket = Vec::new();
            let mut length = 0;
            for ((_, p), _) in own {
                length += p.shape().iter().product::<usize>();
                bucket.push(p.value());
                if length >= BUCKET {
                    self.hand_out(&std::mem::take(&mut bucket), length, owner)?;
                    length = 0;
                }
            }
            if !bucket.is_empty() {
                self.hand_out(&bucket, length, owner)?;
            }
        }
        Ok(())
    }

    /// Copies one rank's values of some tensors to all ranks.
    fn hand_out(&self, tensors: &[&B::Tensor], length: usize, owner: usize) -> Result<()> {
        let mut values = Vec::with_capacity(length);
        let own = self.ranks.rank() == owner;
        match own {
            true => {
                for tensor in tensors {
                    values.extend(B::to_floats(tensor)?);
                }
            }
            false => values.resize(length, 0.0),
        }
        self.ranks.broadcast(&mut values, owner)?;
        let mut rest = values.as_slice();
        for tensor in tensors.iter().filter(|_| !own) {
            let shape = B::shape(tensor);
            let (values, after) = rest.split_at(shape.iter().product());
            B::assign_(tensor, &self.backend.floats(values, &shape)?)?;
            rest = after;
        }
        Ok(())
    }

    /// Both moments of a parameter, for the first rank, which writes the checkpoint; all ranks call it at the same time.
    pub(super) fn moments_of(
        &self,
        at: usize,
        held: Option<&AdamwMoments<B>>,
        owners: Option<&[usize]>,
    ) -> Result<[Vec<f32>; 2]> {
        let mut both = match held {
            Some(held) => [B::to_floats(&held.m)?, B::to_floats(&held.v)?],
            None => {
                let size = self.params[at].1.shape().iter().product();
                [vec![0.0; size], vec![0.0; size]]
            }
        };
        if let Some(owner) = owners.map(|owners| owners[at])
            && owner != 0
        {
            for values in &mut both {
                self.ranks.broadcast(values, owner)?;
            }
        }
        Ok(both)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_dealt_evenly() {
        let sizes = [50, 10, 10, 10, 10, 10, 3, 0];
        let owners = dealt(&sizes, 2);
        let of = |rank| {
            let own = sizes
                .iter()
                .zip(&owners)
                .filter(|(_, owner)| **owner == rank);
            own.map(|(size, _)| size).sum::<usize>()
        };
        assert_eq!((of(0), of(1)), (53, 50));
        assert_eq!(dealt(&[4, 4, 4], 1), [0, 0, 0]);
        // More ranks than parameters: some have nothing to do.
        assert_eq!(dealt(&[1, 2], 4).len(), 2);
    }
}
