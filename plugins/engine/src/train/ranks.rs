//! Exchanges between ranks that train together.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use super::{AdamwMoments, StepDecision, TrainingLoop};
use crate::backend::{Backend, Binary};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::tape::{Variable, backward_as_ready, scalar};

/// Elements of gradients summed in one exchange: 25 MB.
pub(super) const BUCKET: usize = 25 << 18;

/// Time that ranks spend on summing a step's gradients.
pub(super) struct Communication {
    /// Seconds during which gradients were in transit.
    pub seconds: f64,
    /// Those of them after the end of the backward pass.
    pub waited: f64,
}

/// A step's times, as means over ranks: `step` is the seconds from its start to the end of the sums.
pub(super) fn communication_figures(
    seconds: f64,
    waited: f64,
    step: f64,
) -> [(&'static str, f64); 2] {
    let of = |part: f64, whole: f64| match whole > 0.0 {
        // Means were summed in f32.
        true => (part / whole).clamp(0.0, 1.0),
        false => 0.0,
    };
    [
        ("communication_share", of(waited, step)),
        ("overlap", of(seconds - waited, seconds)),
    ]
}

/// The gradients of parameters, by number.
type IndexedGradients = Vec<(usize, Vec<f32>)>;

/// Sums gradients over all ranks in order of arrival until the sender is done, and returns the sums and the seconds it took.
/// None if the sender disappears early.
fn reduce_buckets(
    ranks: &dyn Collective,
    gradients: &Receiver<Option<(usize, Vec<f32>)>>,
) -> Result<(IndexedGradients, f64)> {
    let (mut sums, mut bucket, mut seconds) =
        (IndexedGradients::new(), IndexedGradients::new(), 0.0);
    let mut length = 0;
    loop {
        let Ok(next) = gradients.recv() else {
            return Ok((IndexedGradients::new(), seconds));
        };
        let last = next.is_none();
        if let Some((number, values)) = next {
            length += values.len();
            bucket.push((number, values));
        }
        if length >= BUCKET || (last && length > 0) {
            let begun = Instant::now();
            let mut values: Vec<f32> = Vec::with_capacity(length);
            bucket.iter().for_each(|(_, own)| values.extend(own));
            ranks.all_reduce(&mut values)?;
            let mut rest = values.as_slice();
            for (number, mut own) in bucket.drain(..) {
                let (sum, after) = rest.split_at(own.len());
                own.copy_from_slice(sum);
                sums.push((number, own));
                rest = after;
            }
            length = 0;
            seconds += begun.elapsed().as_secs_f64();
        }
        if last {
            return Ok((sums, seconds));
        }
    }
}

/// The sums for all parameters; all must have arrived.
fn all_of<T>(sums: Vec<Option<T>>) -> Result<Vec<T>> {
    let all: Option<Vec<T>> = sums.into_iter().collect();
    all.ok_or_else(|| Error::Internal("a gradient is missing from the sums".into()))
}

impl<B: Backend> TrainingLoop<'_, B> {
    /// Gradients of a loss, summed over all ranks during the backward pass; `before` has those of earlier parts, if any. A
    /// gradient is dropped as soon as it has been summed.
    pub(super) fn gradients_of_all(
        &self,
        loss: Variable<B>,
        params: &[(String, Variable<B>)],
        before: Vec<B::Tensor>,
    ) -> Result<(Vec<B::Tensor>, Communication)> {
        let mut before: Vec<Option<B::Tensor>> = before.into_iter().map(Some).collect();
        let mut with_before = move |number: usize, own: B::Tensor| match before
            .get_mut(number)
            .and_then(Option::take)
        {
            Some(sum) => B::binary(&sum, &own, Binary::Add),
            None => Ok(own),
        };
        if let Some(device) = self.ranks.on_device() {
            return self.gradients_on_device(loss, params, &mut with_before, device);
        }
        let (send, receive) = channel();
        let ranks = self.ranks;
        std::thread::scope(|scope| {
            let reducer = scope.spawn(move || reduce_buckets(ranks, &receive));
            let mut ready = |number: usize, gradient: B::Tensor| {
                let values = B::to_floats(&with_before(number, gradient)?)?;
                // If the thread has ended, its error is more informative.
                let _ = send.send(Some((number, values)));
                Ok(())
            };
            let own = backward_as_ready(loss, params, &mut ready);
            if own.is_ok() {
                let _ = send.send(None);
            }
            drop(send);
            let waiting = Instant::now();
            let ended = reducer.join();
            let (sums, seconds) =
                ended.map_err(|_| Error::Internal("a thread panicked".into()))??;
            // Filling the last bucket does not count as communication.
            let waited = waiting.elapsed().as_secs_f64().min(seconds);
            own?;
            let mut gradients = vec![None; params.len()];
            for (number, values) in sums {
                let sum = self.backend.floats(&values, &params[number].1.shape())?;
                gradients[number] = Some(sum);
            }
            Ok((all_of(gradients)?, Communication { seconds, waited }))
        })
    }

    /// The same with sums in the device's memory: the device sums while it continues the backward pass.
    fn gradients_on_device(
        &self,
        loss: Variable<B>,
        params: &[(String, Variable<B>)],
        with_before: &mut dyn FnMut(usize, B::Tensor) -> Result<B::Tensor>,
        device: &dyn Any,
    ) -> Result<(Vec<B::Tensor>, Communication)> {
        let mut begun = None;
        let mut sums: Vec<(Vec<usize>, B::Tensor)> = Vec::new();
        let (mut bucket, mut length) = (Vec::<(usize, B::Tensor)>::new(), 0);
        let mut exchange = |bucket: &mut Vec<(usize, B::Tensor)>| -> Result<()> {
            let numbers = bucket.iter().map(|(number, _)| *number).collect();
            let flat: Vec<&B::Tensor> = bucket.iter().map(|(_, flat)| flat).collect();
            // A copy that nobody else reads meanwhile.
            let all = B::affine(&B::cat(&flat, 0)?, 1.0, 0.0)?;
            begun.get_or_insert_with(Instant::now);
            B::begin_exchange_(&all, None, device)?;
            sums.push((numbers, all));
            bucket.clear();
            Ok(())
        };
        let mut ready = |number: usize, gradient: B::Tensor| {
            let own = with_before(number, gradient)?;
            let size = B::shape(&own).iter().product();
            bucket.push((number, B::reshape(&own, &[size])?));
            length += size;
            if length >= BUCKET {
                length = 0;
                exchange(&mut bucket)?;
            }
            Ok(())
        };
        backward_as_ready(loss, params, &mut ready)?;
        if !bucket.is_empty() {
            exchange(&mut bucket)?;
        }
        let waiting = Instant::now();
        B::end_exchanges(device)?;
        let (seconds, waited) = (begun.unwrap_or(waiting).elapsed(), waiting.elapsed());
        let mut gradients = vec![None; params.len()];
        for (numbers, all) in &sums {
            let mut at = 0;
            for &number in numbers {
                let shape = params[number].1.shape();
                let size = shape.iter().product();
                gradients[number] = Some(B::reshape(&B::narrow(all, 0, at, size)?, &shape)?);
                at += size;
            }
        }
        let [seconds, waited] = [seconds, waited].map(|time| time.as_secs_f64());
        Ok((all_of(gradients)?, Communication { seconds, waited }))
    }

    /// Checks that all ranks hold the same weights, bit for bit; all ranks call it at the same time.
    ///
    /// # Errors
    /// They do not: arithmetic differs between their machines, or memory is faulty.
    pub(super) fn are_alike(&self, step: u64) -> Result<()> {
        if !self.ranks.is_shared() {
            return Ok(());
        }
        let mut sum: u64 = 0;
        for (_, p) in self.params {
            for value in B::to_floats(p.value())? {
                sum = sum.rotate_left(5) ^ u64::from(value.to_bits());
                sum = sum.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            }
        }
        match self.unlike(sum)? {
            0.0 => Ok(()),
            count => Err(Error::RanksDiffer(format!(
                "before step {step}, {count} of {} workers have different weights from the first: do all run on processors or \
                 GPUs of the same kind? Work since the last checkpoint is discarded",
                self.ranks.size()
            ))),
        }
    }

    /// How many ranks have another number than the first; all ranks call it at the same time.
    fn unlike(&self, own: u64) -> Result<f32> {
        let own = quarters(own);
        let mut of_the_first = own;
        self.ranks.broadcast(&mut of_the_first, 0)?;
        let mut unlike = [f32::from(own != of_the_first)];
        self.ranks.all_reduce(&mut unlike)?;
        Ok(unlike[0])
    }

    /// Sums loss and figures over all ranks. Returns the requests of any rank.
    pub(super) fn reduce(
        &self,
        loss: &mut B::Tensor,
        figures: &mut [(&'static str, f64)],
        wishes: &StepDecision,
    ) -> Result<StepDecision> {
        let wishes = [wishes.stop, wishes.save].map(f32::from);
        let mut head = vec![wishes[0], wishes[1], scalar::<B>(loss)? as f32];
        head.extend(figures.iter().map(|(_, figure)| *figure as f32));
        self.ranks.all_reduce(&mut head)?;
        *loss = self.backend.floats(&head[2..3], &B::shape(loss))?;
        for ((_, figure), sum) in figures.iter_mut().zip(&head[3..]) {
            *figure = f64::from(*sum);
        }
        Ok(StepDecision {
            stop: head[0] > 0.0,
            save: head[1] > 0.0,
        })
    }

    /// Gives all ranks the initial state of the first.
    pub(super) fn agree(&self, start: u64, moments: &[Option<AdamwMoments<B>>]) -> Result<()> {
        if !self.ranks.is_shared() {
            return Ok(());
        }
        if self.unlike(start)? > 0.0 {
            let message = "the workers of this training have found different checkpoints: they must see the same work directory";
            return Err(Error::Data {
                path: self.path().unwrap_or_default(),
                message: message.into(),
            });
        }
        let own = self.params.iter().map(|(_, p)| p.value());
        // Each rank loads its sharded moments from the checkpoint itself.
        let sharded = self.owners().is_some();
        let states = moments.iter().flatten().filter(|_| !sharded);
        let states = states.flat_map(|state| [&state.m, &state.v]);
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

    /// A figure that all ranks measured: returns the first rank's value.
    pub(super) fn of_the_first(&self, figure: f64) -> Result<f64> {
        if !self.ranks.is_shared() {
            return Ok(figure);
        }
        let mut parts = quarters(figure.to_bits());
        self.ranks.broadcast(&mut parts, 0)?;
        let bits = parts
            .iter()
            .rev()
            .fold(0, |bits, &part| bits << 16 | part as u64);
        Ok(f64::from_bits(bits))
    }
}

/// A number in parts that f32 represents exactly, the lowest bits first.
fn quarters(number: u64) -> [f32; 4] {
    [0, 16, 32, 48].map(|shift| ((number >> shift) & 0xffff) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_communication_are_shares() {
        let of = |seconds, waited, step| {
            communication_figures(seconds, waited, step).map(|(_, share)| share)
        };
        assert_eq!(of(0.5, 0.125, 2.5), [0.05, 0.75]);
        assert_eq!(of(0.5, 0.5, 0.625), [0.8, 0.0]);
        assert_eq!(of(0.5, 0.0, 0.625), [0.0, 1.0]);
        // Rounded, and without any.
        assert_eq!(of(0.5, 0.500_000_1, 0.5), [1.0, 0.0]);
        assert_eq!(of(0.0, 0.0, 0.0), [0.0, 0.0]);
    }
}
