//! A step: gradients of a loss, and the updates by AdamW and Muon.

use std::collections::BTreeMap;
use std::time::Instant;

use super::ranks::communication_figures;
use super::{AdamwMoments, SecondOptimiser, StepDecision, StepOutput, TrainOptions, TrainingLoop};
use crate::backend::{AdamwStep, Backend, Binary};
use crate::error::{Error, Result};
use crate::model::decays;
use crate::muon;
use crate::tape::{Variable, backward};

/// Steps between points of the training curves.
const LOG_EVERY: u64 = 10;

impl<B: Backend> TrainingLoop<'_, B> {
    /// Takes a step. If its loss or its gradient is not finite, nothing changes and the fault is returned.
    pub(super) fn step(
        &self,
        step: u64,
        moments: &[Option<AdamwMoments<B>>],
        parts: usize,
        part_fn: &mut impl FnMut(u64, usize) -> Result<StepOutput<B>>,
        wishes: StepDecision,
        agreed: &mut StepDecision,
    ) -> Result<Option<String>> {
        let o = self.options;
        let log = step.is_multiple_of(LOG_EVERY) || step + 1 == o.steps;
        let params = &self.params[..match &self.adversary {
            Some(adversary) if step < adversary.from => self.own(),
            _ => self.params.len(),
        }];
        let Sums {
            gradients,
            value,
            figures,
            anew,
        } = self.sums(step, params, parts, part_fn, &wishes, agreed)?;
        let (norms, loss) = norms_and_loss::<B>(&gradients, &value, self.own())?;
        if !norms.iter().all(|norm| norm.is_finite()) || !loss.is_finite() {
            let norm = norms[0].hypot(norms[1]);
            let fault = format!("at step {step} the loss is {loss} and the gradient's norm {norm}");
            return Ok(Some(fault));
        }
        if let Some((name, rows)) = &anew {
            self.begin_rows_anew(name, rows, moments)?;
        }
        let numbers = adamw(o, step, norms[0]);
        let ema_decay = o.ema.min((1 + step) as f64 / (10 + step) as f64);
        let owners = self.owners();
        // Averages of what other ranks own follow when it has arrived.
        let averages = match &owners {
            None => self.ema.map(|averages| (averages, ema_decay)),
            Some(_) => None,
        };
        let all = params.iter().zip(moments).zip(&gradients);
        for ((param, state), g) in all.clone().take(self.own()) {
            // Parameters of other ranks come from those.
            let Some(state) = state else { continue };
            self.update(param, state, g, numbers, averages)?;
        }
        if let Some(SecondOptimiser { options, from, .. }) = &self.adversary {
            for (((name, p), state), g) in all.skip(self.own()) {
                let Some(state) = state else { continue };
                let mut numbers = adamw(options, step - from, norms[1]);
                if decays(name, &p.shape()) {
                    numbers.weight_decay = options.weight_decay;
                }
                B::adamw_(p.value(), &state.m, &state.v, g, &numbers)?;
            }
        }
        if let Some(owners) = &owners {
            self.spread(params, owners)?;
            if let Some(averages) = self.ema {
                for (name, p) in params.iter().take(self.own()) {
                    B::ema_(&averages[name], p.value(), ema_decay)?;
                }
            }
        }
        if log {
            let metric = |name: &str, value| {
                self.host
                    .metric(&format!("{}/{name}", self.name), step, value)
            };
            metric("loss", loss);
            metric("gradient_norm", norms[0]);
            if self.adversary.is_some() {
                metric("adversary_gradient_norm", norms[1]);
            }
            metric("learning_rate", numbers.lr);
            for (name, value) in figures {
                metric(name, value);
            }
        }
        Ok(None)
    }

    /// Updates a parameter by AdamW or Muon, then its average; `averages` holds those of all parameters, and their decay.
    fn update(
        &self,
        (name, p): &(String, Variable<B>),
        state: &AdamwMoments<B>,
        g: &B::Tensor,
        numbers: AdamwStep,
        averages: Option<(&BTreeMap<String, B::Tensor>, f64)>,
    ) -> Result<()> {
        let (o, shape) = (self.options, p.shape());
        let average = averages.map(|(averages, decay)| (&averages[name], decay));
        let weight_decay = match decays(name, &shape) {
            true => o.weight_decay,
            false => 0.0,
        };
        if let Some(m) = &o.muon
            && muon::applies(name, &shape)
        {
            let lr = numbers.lr * m.learning_rate / o.learning_rate;
            let of = (name.as_str(), p.value(), &state.m);
            muon::step::<B>(of, g, m, lr, weight_decay, numbers.grad_scale)?;
            return match average {
                Some((average, decay)) => B::ema_(average, p.value(), decay),
                None => Ok(()),
            };
        }
        let numbers = AdamwStep {
            weight_decay,
            ..numbers
        };
        let (p, m, v) = (p.value(), &state.m, &state.v);
        match average {
            Some((average, decay)) => B::adamw_averaged_(p, m, v, g, &numbers, average, decay),
            None => B::adamw_(p, m, v, g, &numbers),
        }
    }

    /// Sums the parts of a step over the ranks, with the ranks' requests.
    fn sums(
        &self,
        step: u64,
        params: &[(String, Variable<B>)],
        parts: usize,
        part_fn: &mut impl FnMut(u64, usize) -> Result<StepOutput<B>>,
        wishes: &StepDecision,
        agreed: &mut StepDecision,
    ) -> Result<Sums<B>> {
        let begun = Instant::now();
        let mut sums: Option<Sums<B>> = None;
        let mut communication = None;
        for part in 0..parts {
            let StepOutput {
                loss,
                figures,
                anew,
            } = part_fn(step, part)?;
            let value = loss.value().clone();
            let before = sums
                .as_mut()
                .map(|sums| std::mem::take(&mut sums.gradients));
            let before = before.unwrap_or_default();
            // The last part carries the accumulated sum.
            let of_all = self.ranks.is_shared() && part + 1 == parts;
            let gradients = match of_all {
                true => {
                    let (gradients, took) = self.gradients_of_all(loss, params, before)?;
                    communication = Some(took);
                    gradients
                }
                false => {
                    let mut gradients = backward(loss, params)?;
                    for (g, sum) in gradients.iter_mut().zip(&before) {
                        *g = B::binary(sum, g, Binary::Add)?;
                    }
                    gradients
                }
            };
            sums = Some(match sums {
                None => Sums {
                    gradients,
                    value,
                    figures,
                    anew,
                },
                Some(before) => Sums {
                    gradients,
                    value: B::binary(&before.value, &value, Binary::Add)?,
                    figures: added(before.figures, figures),
                    anew: anew.or(before.anew),
                },
            });
        }
        let mut sums = sums.ok_or_else(|| Error::Internal("a step without parts".into()))?;
        if let Some(took) = communication {
            let share = (self.ranks.size() as f64).recip();
            let own = sums.figures.len();
            sums.figures.extend([
                ("communication", took.seconds * share),
                ("communication_wait", took.waited * share),
                ("step_seconds", begun.elapsed().as_secs_f64() * share),
            ]);
            *agreed = self.reduce(&mut sums.value, &mut sums.figures, wishes)?;
            let [seconds, waited, step] = [0, 1, 2].map(|at| sums.figures[own + at].1);
            sums.figures
                .extend(communication_figures(seconds, waited, step));
        }
        Ok(sums)
    }

    /// Resets the moments and the average of some rows of a parameter.
    fn begin_rows_anew(
        &self,
        name: &str,
        rows: &[usize],
        moments: &[Option<AdamwMoments<B>>],
    ) -> Result<()> {
        let missing = || Error::Internal(format!("no parameter {name}"));
        let at = self.params.iter().position(|(own, _)| own == name);
        let at = at.ok_or_else(missing)?;
        let p = self.params[at].1.value();
        let shape = B::shape(p);
        let width = shape[1..].iter().product::<usize>();
        let now = B::to_floats(p)?;
        let average = self.ema.and_then(|average| average.get(name));
        let held = moments[at].as_ref();
        let changed = [
            (held.map(|held| &held.m), None),
            (held.map(|held| &held.v), None),
            (average, Some(&now)),
        ];
        for (tensor, values) in changed {
            let Some(tensor) = tensor else { continue };
            let mut data = B::to_floats(tensor)?;
            for row in rows.iter().map(|row| row * width..(row + 1) * width) {
                match values {
                    Some(values) => data[row.clone()].copy_from_slice(&values[row]),
                    None => data[row].fill(0.0),
                }
            }
            B::assign_(tensor, &self.backend.floats(&data, &shape)?)?;
        }
        Ok(())
    }
}

/// The sum of a step's parts.
struct Sums<B: Backend> {
    /// Of each parameter.
    gradients: Vec<B::Tensor>,
    /// The loss.
    value: B::Tensor,
    figures: Vec<(&'static str, f64)>,
    anew: Option<(&'static str, Vec<usize>)>,
}

/// Adds figures of the same names.
fn added(
    mut sums: Vec<(&'static str, f64)>,
    more: Vec<(&'static str, f64)>,
) -> Vec<(&'static str, f64)> {
    for ((_, sum), (_, figure)) in sums.iter_mut().zip(more) {
        *sum += figure;
    }
    sums
}

/// AdamW at a step, without weight decay.
fn adamw(o: &TrainOptions, step: u64, norm: f64) -> AdamwStep {
    AdamwStep {
        lr: o.rate(step),
        beta1: o.beta1,
        beta2: o.beta2,
        eps: 1e-8,
        weight_decay: 0.0,
        correction1: 1.0 - o.beta1.powf((step + 1) as f64),
        correction2: 1.0 - o.beta2.powf((step + 1) as f64),
        grad_scale: if o.clip > 0.0 && norm > o.clip {
            o.clip / norm
        } else {
            1.0
        },
    }
}

/// The norms of the first `own` gradients and of the others, and the loss, in one read from the device.
fn norms_and_loss<B: Backend>(
    gradients: &[B::Tensor],
    loss: &B::Tensor,
    own: usize,
) -> Result<([f64; 2], f64)> {
    let squares = gradients
        .iter()
        .map(B::sum_of_squares)
        .collect::<Result<Vec<_>>>()?;
    let loss = B::reshape(loss, &[1])?;
    let all: Vec<&B::Tensor> = [&loss].into_iter().chain(&squares).collect();
    let read = B::to_floats(&B::cat(&all, 0)?)?;
    let root = |squares: &[f32]| squares.iter().map(|&x| f64::from(x)).sum::<f64>().sqrt();
    let (first, rest) = read[1..].split_at(own.min(read.len() - 1));
    Ok(([root(first), root(rest)], f64::from(read[0])))
}
