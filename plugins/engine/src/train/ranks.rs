//! What ranks that train together tell each other.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use super::{AdamwMoments, Agreed, TrainingLoop};
use crate::backend::{Backend, Binary};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::tape::{Variable, backward_as_ready, scalar};

/// Gradients that ranks add up at a time: 25 MB.
pub(super) const BUCKET: usize = 25 << 18;

/// Time that ranks spend on adding up the gradients of a step.
pub(super) struct Communication {
    /// Seconds in which gradients were on their way.
    pub seconds: f64,
    /// Those of them in which the backward pass was over already.
    pub waited: f64,
}

/// The gradients of parameters, by number.
type Numbered = Vec<(usize, Vec<f32>)>;

/// Adds up gradients over all ranks in the order in which they come, until there is none, and returns the sums and the
/// seconds that it took. Nothing is returned where the giver is gone before.
fn reduce_buckets(
    ranks: &dyn Collective,
    gradients: &Receiver<Option<(usize, Vec<f32>)>>,
) -> Result<(Numbered, f64)> {
    let (mut sums, mut bucket, mut seconds) = (Numbered::new(), Numbered::new(), 0.0);
    let mut length = 0;
    loop {
        let Ok(next) = gradients.recv() else {
            return Ok((Numbered::new(), seconds));
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

impl<B: Backend> TrainingLoop<'_, B> {
    /// Gradients of a loss, summed over all ranks while the backward pass goes on; `before` has those of the parts before
    /// it, if there are any.
    pub(super) fn gradients_of_all(
        &self,
        loss: Variable<B>,
        params: &[(String, Variable<B>)],
        before: &[B::Tensor],
    ) -> Result<(Vec<B::Tensor>, Communication)> {
        if let Some(device) = self.ranks.on_device() {
            return self.gradients_on_device(loss, params, before, device);
        }
        let (send, receive) = channel();
        let ranks = self.ranks;
        std::thread::scope(|scope| {
            let reducer = scope.spawn(move || reduce_buckets(ranks, &receive));
            let mut ready = |number: usize, gradient: &B::Tensor| {
                let values = match before.get(number) {
                    Some(sum) => B::to_floats(&B::binary(sum, gradient, Binary::Add)?)?,
                    None => B::to_floats(gradient)?,
                };
                // If the thread has ended, its error says more.
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
            let waited = waiting.elapsed().as_secs_f64();
            let mut gradients = own?;
            for (number, values) in sums {
                let shape = B::shape(&gradients[number]);
                gradients[number] = self.backend.floats(&values, &shape)?;
            }
            Ok((gradients, Communication { seconds, waited }))
        })
    }

    /// The same where the sums are taken in the device's memory: the device adds up while it goes on with the backward pass.
    fn gradients_on_device(
        &self,
        loss: Variable<B>,
        params: &[(String, Variable<B>)],
        before: &[B::Tensor],
        device: &dyn Any,
    ) -> Result<(Vec<B::Tensor>, Communication)> {
        let mut begun = None;
        let mut sums: Vec<(Vec<usize>, B::Tensor)> = Vec::new();
        let (mut bucket, mut length) = (Vec::<(usize, B::Tensor)>::new(), 0);
        let mut exchange = |bucket: &mut Vec<(usize, B::Tensor)>| -> Result<()> {
            let numbers = bucket.iter().map(|(number, _)| *number).collect();
            let flat: Vec<&B::Tensor> = bucket.iter().map(|(_, flat)| flat).collect();
            // Values of its own, which nobody else looks at meanwhile.
            let all = B::affine(&B::cat(&flat, 0)?, 1.0, 0.0)?;
            begun.get_or_insert_with(Instant::now);
            B::begin_exchange_(&all, None, device)?;
            sums.push((numbers, all));
            bucket.clear();
            Ok(())
        };
        let mut ready = |number: usize, gradient: &B::Tensor| {
            let own = match before.get(number) {
                Some(sum) => B::binary(sum, gradient, Binary::Add)?,
                None => gradient.clone(),
            };
            let size = B::shape(&own).iter().product();
            bucket.push((number, B::reshape(&own, &[size])?));
            length += size;
            if length >= BUCKET {
                length = 0;
                exchange(&mut bucket)?;
            }
            Ok(())
        };
        let mut gradients = backward_as_ready(loss, params, &mut ready)?;
        if !bucket.is_empty() {
            exchange(&mut bucket)?;
        }
        let waiting = Instant::now();
        B::end_exchanges(device)?;
        let (seconds, waited) = (begun.unwrap_or(waiting).elapsed(), waiting.elapsed());
        for (numbers, all) in &sums {
            let mut at = 0;
            for &number in numbers {
                let shape = B::shape(&gradients[number]);
                let size = shape.iter().product();
                gradients[number] = B::reshape(&B::narrow(all, 0, at, size)?, &shape)?;
                at += size;
            }
        }
        let [seconds, waited] = [seconds, waited].map(|time| time.as_secs_f64());
        Ok((gradients, Communication { seconds, waited }))
    }

    /// Sums over all ranks: loss and figures. Returns what one of them wants all to do.
    pub(super) fn reduce(
        &self,
        loss: &mut B::Tensor,
        figures: &mut [(&'static str, f64)],
        wishes: &Agreed,
    ) -> Result<Agreed> {
        let wishes = [wishes.stop, wishes.save].map(f32::from);
        let mut head = vec![wishes[0], wishes[1], scalar::<B>(loss)? as f32];
        head.extend(figures.iter().map(|(_, figure)| *figure as f32));
        self.ranks.all_reduce(&mut head)?;
        *loss = self.backend.floats(&head[2..3], &B::shape(loss))?;
        for ((_, figure), sum) in figures.iter_mut().zip(&head[3..]) {
            *figure = f64::from(*sum);
        }
        Ok(Agreed {
            stop: head[0] > 0.0,
            save: head[1] > 0.0,
        })
    }

    /// Has all ranks begin with the state of the first.
    pub(super) fn agree(&self, start: u64, moments: &[Option<AdamwMoments<B>>]) -> Result<()> {
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
        // Sharded moments each has from the checkpoint itself.
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
