//! The loss of a student's training, and its measurement on held-out pairs.

use std::cell::Cell;
use std::time::Instant;

use rayon::prelude::*;

use super::{Inputs, Options};
use crate::backend::{Backend, Unary};
use crate::collective::Collective;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::model::vq::nearest;
use crate::model::{BatchConditioning, Student};
use crate::perceptual;
use crate::splice::TrajectoryState;
use crate::tape::{Variable, scalar};
use crate::train::StepOutput;

/// The most logits in memory while the loss is measured.
const MEASURED_AT_ONCE: usize = 1 << 26;

/// The training loss and its inputs.
pub struct Objective<'a, B: Backend> {
    options: &'a Options,
    backend: &'a B,
    inputs: &'a Inputs<'a, B>,
    codebook_host: Vec<f32>,
    /// Images decoded together.
    decode_batch: usize,
    /// Tokens before `split`.
    boundary: usize,
    /// Who shares each batch.
    ranks: &'a dyn Collective,
    /// The start of the last step, and the seconds that it waited for data.
    begun: Cell<(Instant, f64)>,
}

/// X_t of some samples, on the device, with their targets.
struct SplicedBatch<B: Backend> {
    state: TrajectoryState<B>,
    conditioning: BatchConditioning<B>,
    /// Tokens (b L).
    tokens: B::Tensor,
    /// Weight of each token in the loss (b L), of mean 1.
    weights: Vec<f32>,
}

/// A term of the loss.
struct Term<B: Backend> {
    name: &'static str,
    value: Variable<B>,
    weight: f64,
}

/// The part of a batch that is computed at a time.
struct BatchFraction {
    /// Number of parts of the batch.
    parts: usize,
    /// Its share of the batch's images, and of the tokens in the loss.
    of_images: f64,
    of_tokens: f64,
}

impl BatchFraction {
    /// The weight of a mean over this part in the mean over the batch.
    fn of<B: Backend>(&self, mean: Variable<B>, share: f64) -> Result<Variable<B>> {
        match self.parts {
            1 => Ok(mean),
            _ => mean.affine(share, 0.0),
        }
    }
}

impl<'a, B: Backend> Objective<'a, B> {
    /// From matching inputs.
    pub fn new(
        context: &Context<'a, B>,
        options: &'a Options,
        inputs: &'a Inputs<'a, B>,
    ) -> Result<Self> {
        let steps = inputs.shape.steps.len();
        let split = options.split.unwrap_or(steps);
        Ok(Self {
            options,
            backend: context.backend,
            inputs,
            codebook_host: B::to_floats(&inputs.codebook)?,
            decode_batch: options.decode_batch(inputs.teacher.config.tokenizer.image()),
            boundary: inputs.shape.tokens_before(split),
            ranks: context.ranks,
            begun: Cell::new((Instant::now(), 0.0)),
        })
    }

    fn batch(&self, samples: &[usize], timesteps: &[usize]) -> Result<SplicedBatch<B>> {
        let (n, l, d) = (
            samples.len(),
            self.inputs.shape.count(),
            self.inputs.shape.dim,
        );
        let mut x = Vec::with_capacity(n * l * d);
        let mut tokens = Vec::with_capacity(n * l);
        let known = |&t: &usize| self.inputs.shape.tokens_before(t);
        let known: Vec<usize> = timesteps.iter().map(known).collect();
        let dataset = &self.inputs.dataset;
        let noises = samples.par_iter().map(|&sample| dataset.noise(sample));
        let noises: Vec<Vec<f32>> = noises.collect::<Result<_>>()?;
        for ((&sample, &known), noise) in samples.iter().zip(&known).zip(&noises) {
            let ids = self.inputs.dataset.tokens_of(sample)?;
            for &id in &ids[..known] {
                x.extend_from_slice(&self.codebook_host[id as usize * d..(id as usize + 1) * d]);
            }
            x.extend_from_slice(&noise[known * d..]);
            tokens.extend(ids);
        }
        let weight = (n * l) as f32 / self.counted(timesteps) as f32;
        let first = |&known: &usize| if self.options.known_tokens { 0 } else { known };
        let weights = known
            .iter()
            .map(first)
            .flat_map(|first| (0..l).map(move |i| if i < first { 0.0 } else { weight }));
        let weights = weights.collect();
        let labels: Vec<u32> = samples
            .iter()
            .map(|&s| self.inputs.dataset.labels[s])
            .collect();
        Ok(SplicedBatch {
            state: TrajectoryState {
                x: self.backend.floats(&x, &[n, l, d])?,
                known,
            },
            conditioning: self
                .inputs
                .dataset
                .conditioning
                .batch(self.backend, &labels)?,
            tokens: self.backend.indices(&tokens, &[n * l])?,
            weights,
        })
    }

    /// Tokens of samples that the loss covers.
    fn counted(&self, timesteps: &[usize]) -> usize {
        let l = self.inputs.shape.count();
        let known = |&t: &usize| match self.options.known_tokens {
            true => 0,
            false => self.inputs.shape.tokens_before(t),
        };
        timesteps.iter().map(|t| l - known(t)).sum()
    }

    /// The loss of a part of a batch, weighted by its share of the batch.
    pub fn loss(
        &self,
        student: &dyn Student<B>,
        samples: &[usize],
        timesteps: &[usize],
        part: usize,
    ) -> Result<StepOutput<B>> {
        let begun = Instant::now();
        let cut = self.options.accumulate;
        let own = self.ranks.share(samples.len(), part, cut);
        let counted = self.counted(&timesteps[own.clone()]) as f64;
        let share = BatchFraction {
            parts: cut * self.ranks.size(),
            of_images: own.len() as f64 / samples.len() as f64,
            of_tokens: counted / self.counted(timesteps).max(1) as f64,
        };
        let batch = self.batch(&samples[own.clone()], &timesteps[own])?;
        let data_seconds = begun.elapsed().as_secs_f64();
        let terms = self.terms(student, &batch, &share)?;
        let figures = terms
            .iter()
            .map(|term| Ok((term.name, scalar::<B>(term.value.value())?)));
        let mut figures = figures.collect::<Result<Vec<_>>>()?;
        // Relative to the time since the last part began.
        let last = self.begun.replace((begun, data_seconds));
        let step = (begun - last.0).as_secs_f64();
        let waited = if step > 0.0 { last.1 / step } else { 0.0 };
        figures.push(("data_wait", waited / share.parts as f64));
        let mut loss: Option<Variable<B>> = None;
        for Term { value, weight, .. } in terms {
            let term = value.affine(weight, 0.0)?;
            loss = Some(match loss {
                Some(sum) => sum.add(&term)?,
                None => term,
            });
        }
        let loss = loss.ok_or_else(|| Error::Internal("a loss without terms".into()))?;
        Ok(StepOutput::new(loss, figures))
    }

    /// The terms of the loss of a part of a batch.
    fn terms(
        &self,
        student: &dyn Student<B>,
        b: &SplicedBatch<B>,
        share: &BatchFraction,
    ) -> Result<Vec<Term<B>>> {
        let (o, shape) = (self.options, &self.inputs.shape);
        let (n, l, d) = (b.state.known.len(), shape.count(), shape.dim);
        let prediction = student.predict(&b.state.x, &b.conditioning, &b.state.kinds()?)?;
        let weights = Variable::constant(self.backend.floats(&b.weights, &[n * l])?);
        let mut terms = Vec::new();
        if o.cross_entropy > 0.0 {
            let logits = prediction.logits.reshape(&[n * l, shape.vocabulary])?;
            let rows = logits.cross_entropy_rows(&b.tokens)?.mul(&weights)?;
            terms.push(Term {
                name: "cross_entropy",
                value: share.of(rows.mean_all()?, share.of_tokens)?,
                weight: o.cross_entropy,
            });
        }
        if !o.moves_head() {
            return Ok(terms);
        }
        let continuous = student.continuous(&prediction)?; // (b, L, D)
        let target = B::reshape(&B::rows(&self.inputs.codebook, &b.tokens)?, &[n, l, d])?;
        if o.codebook_distance > 0.0 {
            let target = Variable::constant(target.clone());
            let square = continuous.sub(&target)?.unary(Unary::Square)?;
            let weighted = square.mul(&weights.reshape(&[n, l, 1])?)?;
            terms.push(Term {
                name: "codebook_distance",
                value: share.of(weighted.mean_all()?, share.of_tokens)?,
                weight: o.codebook_distance,
            });
        }
        if o.perceptual.weight() > 0.0 {
            let (logits, codebook) = (prediction.logits.value(), &self.inputs.codebook);
            let head = || Ok(continuous);
            let sequence = b.state.finish(logits, head, codebook, self.boundary)?;
            let distance = perceptual::distance(
                &*self.inputs.tokenizer,
                &self.inputs.metric,
                self.decode_batch,
                &sequence,
                &target,
            )?;
            terms.push(Term {
                name: "perceptual",
                value: share.of(distance, share.of_images)?,
                weight: o.perceptual.weight(),
            });
        }
        Ok(terms)
    }

    /// Loss and token accuracy from timestep t, over the tokens after t: cross-entropy and most probable codes of the logits,
    /// or, if those are not trained, squared distance and nearest codes of the continuous head.
    pub fn measure(
        &self,
        student: &dyn Student<B>,
        samples: &[usize],
        t: usize,
    ) -> Result<(f64, f64)> {
        let (l, k, d, known) = (
            self.inputs.shape.count(),
            self.inputs.shape.vocabulary,
            self.inputs.shape.dim,
            self.inputs.shape.tokens_before(t),
        );
        let (mut sum, mut right) = (0.0, 0usize);
        let o = self.options;
        let a_step = o.train.batch.div_ceil(o.accumulate);
        for part in samples.chunks((MEASURED_AT_ONCE / (l * k)).clamp(1, a_step)) {
            let b = self.batch(part, &vec![t; part.len()])?;
            let prediction = student.predict(&b.state.x, &b.conditioning, &b.state.kinds()?)?;
            let (losses, chosen) = if self.options.cross_entropy > 0.0 {
                let flat = B::reshape(prediction.logits.value(), &[part.len() * l, k])?;
                (B::cross_entropy(&flat, &b.tokens)?, B::argmax_last(&flat)?)
            } else {
                let head = student
                    .continuous(&prediction)?
                    .reshape(&[part.len() * l, d])?;
                let target = Variable::constant(B::rows(&self.inputs.codebook, &b.tokens)?);
                let square = head.sub(&target)?.unary(Unary::Square)?.mean(&[1])?;
                (
                    square.value().clone(),
                    nearest::<B>(head.value(), &self.inputs.codebook)?,
                )
            };
            let (losses, chosen) = (B::to_floats(&losses)?, B::to_indices(&chosen)?);
            let tokens = B::to_indices(&b.tokens)?;
            for i in (0..losses.len()).filter(|i| i % l >= known) {
                sum += f64::from(losses[i]);
                right += usize::from(chosen[i] == tokens[i]);
            }
        }
        let count = (samples.len() * (l - known)) as f64;
        Ok((sum / count, right as f64 / count))
    }
}
