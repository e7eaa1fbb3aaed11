//! Training, once for every network: AdamW, warm-up and decay, clipping, EMA, checkpoints and exact resume.
//!
//! A stage passes its parameters and a closure that builds the loss of a step; [`fit`] does the rest. Everything random in a
//! step must be a pure function of (seed, step), so a run continued from a checkpoint equals an uninterrupted one, bit for
//! bit on the CPU. Checkpoints (parameters, both moments, EMA, best weights so far; all f32) are one safetensors file in the
//! stage's work directory, replaced atomically.

mod checkpoint;
mod options;
mod patience;
mod ranks;
mod sharding;
mod step;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use retort_abi::{Cancel, Host, LogLevel};

use crate::backend::Backend;
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::tape::Variable;
use crate::weights::{self, Floats, Params, Weights};

use self::patience::Patience;

pub use options::{Decay, TrainOptions};
pub(crate) use options::{check_parts, one_part};

/// A step's output: the loss to minimise, and figures to record.
pub struct StepOutput<B: Backend> {
    /// A scalar.
    pub loss: Variable<B>,
    /// Named figures.
    pub figures: Vec<(&'static str, f64)>,
    /// A parameter and rows that the step replaced: their moments and average are reset.
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

/// Parameters with a separate optimiser within the same training: those of an adversary. They share only the step and the
/// checkpoint with the others.
pub struct SecondOptimiser<'a> {
    /// Their name prefix. They come after all others.
    pub prefix: &'static str,
    /// How they are trained: rates, decays and clipping.
    pub options: &'a TrainOptions,
    /// The step from which the loss depends on them.
    pub from: u64,
}

/// A regular measurement of the weights on held-out data.
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

/// A mean of figures that arrive in pieces; how they are divided changes at most the last digit of an f64.
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

/// The parameters of a training.
pub struct TrainingLoop<'a, B: Backend> {
    /// Services of the host.
    pub host: &'a dyn Host,
    /// The tensor library.
    pub backend: &'a B,
    /// Directory of the checkpoint; `None`: none is written.
    pub work_dir: Option<&'a Path>,
    /// Prefix of the metric names and of the checkpoint.
    pub name: &'a str,
    /// The ranks that train together: steps return the loss of this rank's share of a batch, weighted by its size relative to
    /// the whole batch.
    pub ranks: &'a dyn Collective,
    /// How.
    pub options: &'a TrainOptions,
    /// What is trained.
    pub params: &'a Params<B>,
    /// The moving average, if there is one: device tensors by parameter name, updated in place.
    pub ema: Option<&'a BTreeMap<String, B::Tensor>>,
    /// Additional state between steps, if any; it is part of checkpoints.
    pub kept: Option<&'a RefCell<Vec<f32>>>,
    /// The adversary among the parameters, if there is one.
    pub adversary: Option<SecondOptimiser<'a>>,
}

/// Storage for the moving average of parameters, if the options want one: copies on the device.
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

/// The tensors that a second network shares with a training, so that it can be measured at any step: the moving average if
/// there is one, else the parameters themselves.
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

/// Steps that were skipped because their loss or gradient was not finite.
#[derive(Default)]
struct SkippedSteps {
    /// In the whole training.
    all: u64,
    /// The current consecutive ones.
    in_a_row: u64,
    /// The fault of the last step that this process skipped.
    fault: Option<String>,
}

struct AdamwMoments<B: Backend> {
    m: B::Tensor,
    v: B::Tensor,
}

/// Requests that ranks exchanged with a step's sums, to act on before the next step.
#[derive(Default)]
struct StepDecision {
    /// Stop: one of them has been asked to.
    stop: bool,
    /// To save a checkpoint.
    save: bool,
}

/// The state of a training besides its parameters, for checkpoints.
struct TrainingState<B: Backend> {
    /// For each parameter that this rank updates.
    moments: Vec<Option<AdamwMoments<B>>>,
    /// The lowest figure on held-out data, and its weights.
    best: Option<(f64, Weights)>,
    skipped: SkippedSteps,
}

impl<B: Backend> TrainingLoop<'_, B> {
    /// Trains, from the checkpoint if there is one, and returns the weights to keep.
    pub fn run(
        &self,
        mut step_fn: impl FnMut(u64) -> Result<StepOutput<B>>,
        held_out: Option<HeldOut<'_>>,
    ) -> Result<Weights> {
        self.run_in_parts(1, |step, _| step_fn(step), held_out)
    }

    /// The same if the loss of a step is a sum of parts, computed one at a time: gradients are summed, and memory holds one
    /// part. The parts' figures are summed too.
    pub fn run_in_parts(
        &self,
        parts: usize,
        mut part_fn: impl FnMut(u64, usize) -> Result<StepOutput<B>>,
        mut held_out: Option<HeldOut<'_>>,
    ) -> Result<Weights> {
        let o = self.options;
        let (mut state, start) = self.begin()?;
        let mut agreed = StepDecision::default();
        let mut saved = Instant::now();
        let mut patience = Patience::default();
        let due = |saved: Instant| saved.elapsed() >= Duration::from_secs(o.checkpoint_seconds);
        for step in start..o.steps {
            self.go_on(step, &state, agreed.stop)?;
            let saves = match self.ranks.is_shared() {
                true => agreed.save,
                false => due(saved),
            };
            if saves {
                self.are_alike(step)?;
                self.save(step, &state)?;
                saved = Instant::now();
                patience.unsettle();
            }
            let wishes = StepDecision {
                stop: self.host.cancelled() != Cancel::Run,
                save: due(saved) && self.ranks.rank() == 0,
            };
            let before = self.kept.map(|kept| kept.borrow().clone());
            self.ranks.set_patience(patience.of_the_next());
            let began = Instant::now();
            let taken = self.step(
                step,
                &state.moments,
                parts,
                &mut part_fn,
                wishes,
                &mut agreed,
            );
            patience.note(began.elapsed());
            self.ranks.set_patience(None);
            // A skipped step leaves no changes.
            if let (Some(kept), Some(before), false) =
                (self.kept, before, matches!(taken, Ok(None)))
            {
                *kept.borrow_mut() = before;
            }
            if let Err(Error::Rank(_)) = taken
                && self.owners().is_none()
            {
                // The weights do not contain the step yet. Sharded state is incomplete on every rank.
                self.save(step, &state)?;
            }
            match taken? {
                None => state.skipped.in_a_row = 0,
                Some(fault) => self.skip(step, fault, &mut state)?,
            }
            self.host.progress(step + 1, o.steps, "steps");
            if let Some(h) = &mut held_out
                && ((step + 1).is_multiple_of(h.every) || step + 1 == o.steps)
            {
                self.measure(step, h, &mut state)?;
                patience.unsettle();
            }
        }
        if self.ranks.is_shared() {
            // The process that makes the artifact reads it from there.
            self.are_alike(o.steps)?;
            self.save(o.steps, &state)?;
            self.ranks.barrier()?;
        }
        self.end(state)
    }

    /// The initial state, from the checkpoint if there is one, and the first step.
    fn begin(&self) -> Result<(TrainingState<B>, u64)> {
        let zeros = |p: &Variable<B>| self.backend.full(&p.shape(), 0.0);
        let owners = self.owners();
        let own = self.ranks.rank();
        let moments = self.params.iter().enumerate().map(|(at, (_, p))| {
            let moved_here = owners.as_ref().is_none_or(|owners| owners[at] == own);
            let zeros = || {
                Ok(AdamwMoments {
                    m: zeros(p)?,
                    v: zeros(p)?,
                })
            };
            moved_here.then(zeros).transpose()
        });
        let moments = moments.collect::<Result<_>>()?;
        let mut state = TrainingState {
            moments,
            best: None,
            skipped: SkippedSteps::default(),
        };
        let (start, ranks) = self.restore(&mut state)?;
        if start > 0 {
            let (name, steps, now) = (self.name, self.options.steps, self.ranks.size());
            let others = match ranks {
                ranks if ranks == now => String::new(),
                ranks => format!("; workers until now: {ranks}, from here on: {now}"),
            };
            let message = format!("{name}: continuing from step {start} of {steps}{others}");
            self.host.log(LogLevel::Info, &message);
        }
        self.agree(start, &state.moments)?;
        Ok((state, start))
    }

    /// Ends the training before a step if it has been asked to stop; `stop`: if one of the ranks has.
    fn go_on(&self, step: u64, state: &TrainingState<B>, stop: bool) -> Result<()> {
        match self.host.cancelled() {
            // All ranks stop at the same step, when all know of the request.
            Cancel::AtCheckpoint | Cancel::Run if self.ranks.is_shared() && !stop => Ok(()),
            Cancel::Run if !stop => Ok(()),
            Cancel::AtCheckpoint | Cancel::Run => {
                self.save(step, state)?;
                Err(Error::Cancelled)
            }
            Cancel::Now => Err(Error::Cancelled),
        }
    }

    /// Records a skipped step, and ends the training after too many.
    fn skip(&self, step: u64, fault: String, state: &mut TrainingState<B>) -> Result<()> {
        let (name, most) = (self.name, self.options.skip_at_most);
        state.skipped.all += 1;
        state.skipped.in_a_row += 1;
        if state.skipped.in_a_row == 1 {
            let message = format!("{name}: {fault}: the step is skipped");
            self.host.log(LogLevel::Warn, &message);
        }
        let series = format!("{name}/skipped_steps");
        self.host.metric(&series, step, state.skipped.all as f64);
        if state.skipped.in_a_row > most {
            // A resumed training continues after these steps.
            state.skipped.in_a_row = 0;
            self.save(step + 1, state)?;
            let message = format!(
                "{name}: {fault}; {} steps in a row were skipped, and `skip_at_most` is {most}",
                most + 1
            );
            return Err(Error::Numerical(message));
        }
        state.skipped.fault = Some(fault);
        Ok(())
    }

    /// Measures the weights after a step, and keeps them if they are the best.
    fn measure(
        &self,
        step: u64,
        held_out: &mut HeldOut<'_>,
        state: &mut TrainingState<B>,
    ) -> Result<()> {
        let figure = self.of_the_first((held_out.measure)()?)?;
        let series = format!("{}/{}", self.name, held_out.name);
        self.host.metric(&series, step + 1, figure);
        let lowest = state.best.as_ref().map(|(lowest, _)| *lowest);
        let better = figure.is_finite() && lowest.is_none_or(|lowest| figure < lowest);
        if held_out.keep_best && better {
            state.best = Some((figure, self.weights()?));
        }
        Ok(())
    }

    /// The weights to keep, unless the training failed.
    fn end(&self, state: TrainingState<B>) -> Result<Weights> {
        let TrainingState { best, skipped, .. } = state;
        let (name, steps) = (self.name, self.options.steps);
        // A short training may end before `skip_at_most` is exceeded. It fails if it skipped more steps at the end than were
        // taken in all.
        if let Some(fault) = skipped.fault
            && skipped.in_a_row > steps - skipped.all
        {
            return Err(Error::Numerical(format!(
                "{name}: {fault}; the last {} of its {steps} steps were skipped, more than were taken",
                skipped.in_a_row
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
            Some((weight, _)) => Err(Error::Numerical(format!(
                "{name}: the last steps made weights of {weight} NaN or infinite"
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

    /// Number of parameters that are not the adversary's.
    fn own(&self) -> usize {
        match &self.adversary {
            Some(SecondOptimiser { prefix, .. }) => self
                .params
                .partition_point(|(name, _)| !name.starts_with(prefix)),
            None => self.params.len(),
        }
    }
}
