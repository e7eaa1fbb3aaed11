//! Training, once for every network: AdamW, warm-up and decay, clipping, EMA, checkpoints and exact resume.
//!
//! A stage gives its parameters and a closure that builds the loss of a step; [`fit`] does the rest. Everything random
//! in a step must be a pure function of (seed, step), so a run continued from a checkpoint is the run that was never
//! interrupted, bit for bit on the CPU. Checkpoints (parameters, both moments, EMA, best weights so far; all f32) are
//! one safetensors file in the stage's work directory, replaced atomically.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use retort_abi::{Cancel, Host, LogLevel};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::{AdamwStep, Backend, Binary, Unary};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::files::replace;
use crate::model::decays;
use crate::muon::{self, Muon};
use crate::tape::{Variable, backward, scalar};
use crate::weights::{self, Floats, Params, Weights};

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
    #[schemars(range(min = 0, max = 1))]
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    #[schemars(range(min = 0, max = 1))]
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
    /// Steps one after the other whose loss or gradient may be NaN or infinite. Each is left out, and counted by the
    /// series `skipped_steps`; one more fails the training.
    pub skip_at_most: u64,
    /// Seconds between checkpoints.
    #[schemars(range(min = 1))]
    pub checkpoint_seconds: u64,
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

/// What a step gives: the loss to descend and figures to record beside it.
pub struct StepOutput<B: Backend> {
    /// A scalar.
    pub loss: Variable<B>,
    /// Named figures.
    pub figures: Vec<(&'static str, f64)>,
    /// A parameter and rows of it that the step wrote anew: their moments begin again, and their average with them.
    pub anew: Option<(&'static str, Vec<usize>)>,
}

impl<B: Backend> StepOutput<B> {
    /// A loss and figures.
    pub fn new(loss: Variable<B>, figures: Vec<(&'static str, f64)>) -> Self {
        Self {
            loss,
            figures,
            anew: None,
        }
    }
}

/// Parameters that an optimiser of their own moves within the same training: those of an adversary. They share step and
/// checkpoint with the others and nothing else.
pub struct Adversary<'a> {
    /// What their names begin with. They stand behind all others.
    pub prefix: &'static str,
    /// How they are trained: rates, decays and clipping.
    pub options: &'a TrainOptions,
    /// The step from which on the loss reaches them.
    pub from: u64,
}

/// Measures the weights now and then on held-out data.
pub struct HeldOut<'a> {
    /// Steps between measurements.
    pub every: u64,
    /// The figure's name.
    pub name: &'static str,
    /// Measures; lower is better.
    pub measure: &'a mut dyn FnMut() -> Result<f64>,
    /// Whether the weights with the lowest figure are the result, instead of the last.
    pub keep_best: bool,
}

/// A mean of figures that come in pieces: how they are cut does not change it beyond the last digit of an f64.
#[derive(Debug, Default)]
pub struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    /// Adds figures.
    pub fn add(&mut self, figures: &[f32]) {
        self.sum += figures.iter().map(|&x| f64::from(x)).sum::<f64>();
        self.count += figures.len();
    }

    /// The mean of all.
    pub fn value(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// Where and how a training runs.
pub struct Fit<'a, B: Backend> {
    /// Services of the host.
    pub host: &'a dyn Host,
    /// The tensor library.
    pub backend: &'a B,
    /// Directory of the checkpoint; `None`: none is written.
    pub work_dir: Option<&'a Path>,
    /// Prefix of the metric names and of the checkpoint.
    pub name: &'a str,
    /// Who trains it together: the steps give losses of this rank's share of a batch, in the measure in which it has part
    /// in that of the batch.
    pub ranks: &'a dyn Collective,
    /// How.
    pub options: &'a TrainOptions,
    /// What is trained.
    pub params: &'a Params<B>,
    /// The moving average, where there is one: device tensors by parameter name, updated in place.
    pub ema: Option<&'a BTreeMap<String, B::Tensor>>,
    /// What steps leave for later ones besides, if anything: a checkpoint keeps it.
    pub kept: Option<&'a RefCell<Vec<f32>>>,
    /// The adversary among the parameters, if there is one.
    pub adversary: Option<Adversary<'a>>,
}

/// Where the moving average of parameters is held, if the options want one: copies on the device.
pub fn average<B: Backend>(
    backend: &B,
    options: &TrainOptions,
    params: &Params<B>,
) -> Result<Option<BTreeMap<String, B::Tensor>>> {
    if options.ema == 0.0 {
        return Ok(None);
    }
    let copy = |(name, p): &(String, Variable<B>)| {
        let copy = backend.floats(&B::to_floats(p.value())?, &p.shape())?;
        Ok((name.clone(), copy))
    };
    params.iter().map(copy).collect::<Result<_>>().map(Some)
}

/// The tensors that a second network shares with a training, so as to be measured at any step: the moving average,
/// where there is one, else the parameters themselves.
pub fn shared<B: Backend>(
    params: &Params<B>,
    average: Option<&BTreeMap<String, B::Tensor>>,
) -> BTreeMap<String, B::Tensor> {
    let own = |(name, p): &(String, Variable<B>)| (name.clone(), p.value().clone());
    match average {
        Some(tensors) => tensors.clone(),
        None => params.iter().map(own).collect(),
    }
}

/// Steps that were left out because their loss or gradient was not finite.
#[derive(Default)]
struct Skipped {
    /// In the whole training.
    all: u64,
    /// One after the other, up to now.
    in_a_row: u64,
}

struct Moments<B: Backend> {
    m: B::Tensor,
    v: B::Tensor,
}

/// Gradients that ranks add up at a time: 25 MB.
const BUCKET: usize = 25 << 18;
/// Steps between points of the training curves.
const LOG_EVERY: u64 = 10;

impl<B: Backend> Fit<'_, B> {
    /// Trains, from the checkpoint where there is one, and returns the weights to keep.
    pub fn run(
        &self,
        mut step_fn: impl FnMut(u64) -> Result<StepOutput<B>>,
        held_out: Option<HeldOut<'_>>,
    ) -> Result<Weights> {
        self.run_in_parts(1, |step, _| step_fn(step), held_out)
    }

    /// The same where the loss of a step is a sum of parts, computed one after the other: gradients add up, and memory
    /// holds one part at a time. The figures of the parts are added too.
    pub fn run_in_parts(
        &self,
        parts: usize,
        mut part_fn: impl FnMut(u64, usize) -> Result<StepOutput<B>>,
        mut held_out: Option<HeldOut<'_>>,
    ) -> Result<Weights> {
        let o = self.options;
        let zeros = |p: &Variable<B>| self.backend.full(&p.shape(), 0.0);
        let moments: Vec<Moments<B>> = self
            .params
            .iter()
            .map(|(_, p)| {
                Ok(Moments {
                    m: zeros(p)?,
                    v: zeros(p)?,
                })
            })
            .collect::<Result<_>>()?;
        let mut best: Option<(f64, Weights)> = None;
        let mut skipped = Skipped::default();
        let start = self.restore(&moments, &mut best, &mut skipped)?;
        if start > 0 {
            self.host.log(
                LogLevel::Info,
                &format!("{}: continuing from step {start} of {}", self.name, o.steps),
            );
        }
        self.agree(start, &moments)?;
        let mut stop = false;
        let mut saved = Instant::now();
        let mut last_fault = None;
        for step in start..o.steps {
            match self.host.cancelled() {
                // Ranks stop at the same step: the one that all know of.
                Cancel::AtCheckpoint | Cancel::Run if self.ranks.is_shared() && !stop => {}
                Cancel::Run if stop => {
                    self.save(step, &moments, best.as_ref(), &skipped)?;
                    return Err(Error::Cancelled);
                }
                Cancel::Run => {}
                Cancel::AtCheckpoint => {
                    self.save(step, &moments, best.as_ref(), &skipped)?;
                    return Err(Error::Cancelled);
                }
                Cancel::Now => return Err(Error::Cancelled),
            }
            if saved.elapsed() >= Duration::from_secs(o.checkpoint_seconds) {
                self.save(step, &moments, best.as_ref(), &skipped)?;
                saved = Instant::now();
            }
            let taken = self.step(step, &moments, parts, &mut part_fn, &mut stop);
            if let Err(Error::Rank(_)) = taken {
                // Nothing of the step is in the weights.
                self.save(step, &moments, best.as_ref(), &skipped)?;
            }
            match taken? {
                None => skipped.in_a_row = 0,
                Some(fault) => {
                    skipped.all += 1;
                    skipped.in_a_row += 1;
                    self.skip(step, &fault, &skipped)?;
                    if skipped.in_a_row > o.skip_at_most {
                        // Whoever resumes goes on after these steps.
                        skipped.in_a_row = 0;
                        self.save(step + 1, &moments, best.as_ref(), &skipped)?;
                        return Err(Error::Numerical(format!(
                            "{}: {fault}; {} steps in a row were so, and `skip_at_most` is {}",
                            self.name,
                            o.skip_at_most + 1,
                            o.skip_at_most
                        )));
                    }
                    last_fault = Some(fault);
                }
            }
            self.host.progress(step + 1, o.steps, "steps");
            if let Some(h) = &mut held_out
                && ((step + 1).is_multiple_of(h.every) || step + 1 == o.steps)
            {
                let figure = self.of_the_first((h.measure)()?)?;
                self.host
                    .metric(&format!("{}/{}", self.name, h.name), step + 1, figure);
                let finite = figure.is_finite();
                if h.keep_best && finite && best.as_ref().is_none_or(|(lowest, _)| figure < *lowest)
                {
                    best = Some((figure, self.weights()?));
                }
            }
        }
        if self.ranks.is_shared() {
            // Whoever makes the artifact takes it from there.
            self.save(o.steps, &moments, best.as_ref(), &skipped)?;
            self.ranks.barrier()?;
        }
        // A short training ends before it fails: what it learned in fewer steps than it then left out is nothing.
        if let Some(fault) = last_fault
            && skipped.in_a_row > o.steps - skipped.all
        {
            return Err(Error::Numerical(format!(
                "{}: {fault}; so were the last {} of its {} steps, more than it took",
                self.name, skipped.in_a_row, o.steps
            )));
        }
        let weights = match best {
            Some((_, weights)) => weights,
            None => self.weights()?,
        };
        match weights
            .iter()
            .find(|(_, w)| !w.data.iter().all(|x| x.is_finite()))
        {
            None => Ok(weights),
            Some((name, _)) => Err(Error::Numerical(format!(
                "{}: the last steps made weights of {name} NaN or infinite",
                self.name
            ))),
        }
    }

    /// The weights to keep if training ended now.
    fn weights(&self) -> Result<Weights> {
        match self.ema {
            None => weights::from_params(&self.params[..self.own()]),
            Some(average) => average
                .iter()
                .map(|(name, t)| {
                    Ok((
                        name.clone(),
                        Floats {
                            shape: B::shape(t),
                            data: B::to_floats(t)?,
                        },
                    ))
                })
                .collect(),
        }
    }

    /// Records that a step was left out.
    fn skip(&self, step: u64, fault: &str, skipped: &Skipped) -> Result<()> {
        if skipped.in_a_row == 1 {
            let message = format!("{}: {fault}: the step is left out", self.name);
            self.host.log(LogLevel::Warn, &message);
        }
        let name = format!("{}/skipped_steps", self.name);
        self.host.metric(&name, step, skipped.all as f64);
        Ok(())
    }

    /// Takes a step. If its loss or its gradient is not finite, nothing changes and what was wrong is returned.
    fn step(
        &self,
        step: u64,
        moments: &[Moments<B>],
        parts: usize,
        part_fn: &mut impl FnMut(u64, usize) -> Result<StepOutput<B>>,
        stop: &mut bool,
    ) -> Result<Option<String>> {
        let o = self.options;
        let log = step.is_multiple_of(LOG_EVERY) || step + 1 == o.steps;
        let StepOutput {
            loss,
            mut figures,
            anew,
        } = part_fn(step, 0)?;
        let mut value = loss.value().clone();
        let params = &self.params[..match &self.adversary {
            Some(adversary) if step < adversary.from => self.own(),
            _ => self.params.len(),
        }];
        let mut gradients = backward(loss, params)?;
        for part in 1..parts {
            let more = part_fn(step, part)?;
            value = B::binary(&value, more.loss.value(), Binary::Add)?;
            for (sum, g) in gradients.iter_mut().zip(backward(more.loss, params)?) {
                *sum = B::binary(sum, &g, Binary::Add)?;
            }
            for ((_, sum), (_, figure)) in figures.iter_mut().zip(more.figures) {
                *sum += figure;
            }
        }
        if self.ranks.is_shared() {
            *stop = self.reduce(&mut gradients, &mut value, &mut figures)?;
        }
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
        let all = params.iter().zip(moments).zip(&gradients);
        for (((name, p), state), g) in all.clone().take(self.own()) {
            let weight_decay = match decays(name, &p.shape()) {
                true => o.weight_decay,
                false => 0.0,
            };
            match &o.muon {
                Some(m) if muon::applies(name, &p.shape()) => {
                    let lr = numbers.lr * m.learning_rate / o.learning_rate;
                    let of = (name.as_str(), p.value(), &state.m);
                    muon::step::<B>(of, g, m, lr, weight_decay, numbers.grad_scale)?;
                }
                _ => {
                    let numbers = AdamwStep {
                        weight_decay,
                        ..numbers
                    };
                    B::adamw_(p.value(), &state.m, &state.v, g, &numbers)?;
                }
            }
            if let Some(average) = self.ema {
                B::ema_(&average[name], p.value(), ema_decay)?;
            }
        }
        if let Some(Adversary { options, from, .. }) = &self.adversary {
            for (((name, p), state), g) in all.skip(self.own()) {
                let mut numbers = adamw(options, step - from, norms[1]);
                if decays(name, &p.shape()) {
                    numbers.weight_decay = options.weight_decay;
                }
                B::adamw_(p.value(), &state.m, &state.v, g, &numbers)?;
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

    /// Sums over all ranks: gradients, loss and figures. Returns whether one of them has been asked to stop.
    fn reduce(
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
    fn agree(&self, start: u64, moments: &[Moments<B>]) -> Result<()> {
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
    fn of_the_first(&self, figure: f64) -> Result<f64> {
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

    /// Number of parameters that are not the adversary's.
    fn own(&self) -> usize {
        match &self.adversary {
            Some(Adversary { prefix, .. }) => self
                .params
                .partition_point(|(name, _)| !name.starts_with(prefix)),
            None => self.params.len(),
        }
    }

    /// Forgets what led to the former values of some rows of a parameter.
    fn begin_rows_anew(&self, name: &str, rows: &[usize], moments: &[Moments<B>]) -> Result<()> {
        let missing = || Error::Internal(format!("no parameter {name}"));
        let at = self.params.iter().position(|(own, _)| own == name);
        let at = at.ok_or_else(missing)?;
        let p = self.params[at].1.value();
        let shape = B::shape(p);
        let width = shape[1..].iter().product::<usize>();
        let now = B::to_floats(p)?;
        let average = self.ema.and_then(|average| average.get(name));
        let changed = [
            (Some(&moments[at].m), None),
            (Some(&moments[at].v), None),
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

    fn path(&self) -> Option<PathBuf> {
        self.work_dir.map(|dir| {
            dir.join(format!(
                "{}.checkpoint.safetensors",
                self.name.replace('/', "-")
            ))
        })
    }

    fn save(
        &self,
        step: u64,
        moments: &[Moments<B>],
        best: Option<&(f64, Weights)>,
        skipped: &Skipped,
    ) -> Result<()> {
        let Some(path) = self.path().filter(|_| self.ranks.rank() == 0) else {
            return Ok(());
        };
        let mut all = Weights::new();
        let mut put = |name: String, t: &B::Tensor| -> Result<()> {
            all.insert(
                name,
                Floats {
                    shape: B::shape(t),
                    data: B::to_floats(t)?,
                },
            );
            Ok(())
        };
        for ((name, p), state) in self.params.iter().zip(moments) {
            put(format!("param.{name}"), p.value())?;
            put(format!("m.{name}"), &state.m)?;
            put(format!("v.{name}"), &state.v)?;
        }
        for (name, t) in self.ema.into_iter().flatten() {
            put(format!("ema.{name}"), t)?;
        }
        // f32 holds whole numbers exactly up to 2^24 only: the counters travel as two halves.
        let halves = [step, skipped.all, skipped.in_a_row]
            .into_iter()
            .flat_map(|x| [(x >> 20) as f32, (x & 0xf_ffff) as f32]);
        all.insert(
            "step".into(),
            Floats {
                shape: vec![6],
                data: halves.collect(),
            },
        );
        if let Some(kept) = self.kept {
            let data = kept.borrow().clone();
            let shape = vec![data.len()];
            all.insert("kept".into(), Floats { shape, data });
        }
        if let Some((figure, weights)) = best {
            let bits = figure.to_bits();
            let parts = (0..4)
                .map(|i| ((bits >> (16 * i)) & 0xffff) as f32)
                .collect();
            all.insert(
                "best".into(),
                Floats {
                    shape: vec![4],
                    data: parts,
                },
            );
            all.extend(
                weights
                    .iter()
                    .map(|(name, w)| (format!("best.{name}"), w.clone())),
            );
        }
        replace(&path, |partial| weights::write(partial, &all))
    }

    /// Takes up the checkpoint and returns the next step.
    fn restore(
        &self,
        moments: &[Moments<B>],
        best: &mut Option<(f64, Weights)>,
        skipped: &mut Skipped,
    ) -> Result<u64> {
        let Some(path) = self.path().filter(|p| p.exists()) else {
            return Ok(0);
        };
        let damaged =
            |message: &str| Error::data(&path, format!("{message}; delete it to start anew"));
        let all = weights::read(&path).map_err(|error| match error {
            Error::Data { message, .. } => damaged(&message),
            other => other,
        })?;
        let unfit = |name: &str| damaged(&format!("checkpoint without a fitting {name}"));
        let put = |name: String, t: &B::Tensor| -> Result<()> {
            let shape = B::shape(t);
            let found = all
                .get(&name)
                .filter(|w| w.shape == shape)
                .ok_or_else(|| unfit(&name))?;
            B::assign_(t, &self.backend.floats(&found.data, &shape)?)
        };
        for ((name, p), state) in self.params.iter().zip(moments) {
            put(format!("param.{name}"), p.value())?;
            put(format!("m.{name}"), &state.m)?;
            put(format!("v.{name}"), &state.v)?;
        }
        for (name, t) in self.ema.into_iter().flatten() {
            put(format!("ema.{name}"), t)?;
        }
        if let Some(kept) = self.kept {
            let mut kept = kept.borrow_mut();
            let found = all.get("kept").map(|found| &found.data);
            let found = found.filter(|found| found.len() == kept.len());
            kept.clone_from(found.ok_or_else(|| unfit("kept"))?);
        }
        if let Some(parts) = all.get("best") {
            let bits = parts
                .data
                .iter()
                .enumerate()
                .fold(0, |bits, (i, &p)| bits | (p as u64) << (16 * i));
            let weights = all
                .iter()
                .filter_map(|(name, w)| Some((name.strip_prefix("best.")?.to_owned(), w.clone())));
            *best = Some((f64::from_bits(bits), weights.collect()));
        }
        let counters = all
            .get("step")
            .filter(|s| s.data.len() == 6)
            .ok_or_else(|| unfit("step"))?;
        let counter =
            |i: usize| ((counters.data[2 * i] as u64) << 20) | counters.data[2 * i + 1] as u64;
        (skipped.all, skipped.in_a_row) = (counter(1), counter(2));
        Ok(counter(0))
    }
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

/// Roots of the sums of squares over the first `own` gradients and over the others, and the loss: read at once.
fn norms_and_loss<B: Backend>(
    gradients: &[B::Tensor],
    loss: &B::Tensor,
    own: usize,
) -> Result<([f64; 2], f64)> {
    let squares = gradients
        .iter()
        .map(|g| {
            let dims: Vec<usize> = (0..B::shape(g).len()).collect();
            B::reshape(&B::sum(&B::unary(g, Unary::Square)?, &dims)?, &[1])
        })
        .collect::<Result<Vec<_>>>()?;
    let loss = B::reshape(loss, &[1])?;
    let all: Vec<&B::Tensor> = [&loss].into_iter().chain(&squares).collect();
    let read = B::to_floats(&B::cat(&all, 0)?)?;
    let root = |squares: &[f32]| squares.iter().map(|&x| f64::from(x)).sum::<f64>().sqrt();
    let (first, rest) = read[1..].split_at(own.min(read.len() - 1));
    Ok(([root(first), root(rest)], f64::from(read[0])))
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
