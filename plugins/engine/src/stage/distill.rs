//! `distill`: trains a few-step student on a teacher's trajectories (arXiv 2412.17153, section 3.3).
//!
//! For a sample's noise eps and tokens q, and a timestep t drawn from a small set, the student sees
//! X_t = (q_1 .. q_t, eps_{t+1} .. eps_n) and predicts the final sequence. Loss, weights by option:
//!
//! ```text
//! cross-entropy of the logits against q
//! + perceptual distance between decode(sequence) and decode(q)        sequence: X_t's tokens, argmax codes before `split`
//! + squared distance of the continuous head to the codebook vectors   (no gradient), the continuous head after it
//! ```
//!
//! The sequence is made by the function that samples with the student ([`crate::splice`]).

mod need;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;
use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, Unary};
use crate::bundle::{self, Bundle};
use crate::collective::Collective;
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::memory;
use crate::model::vq::nearest;
use crate::model::{CONTINUOUS_HEAD, Conditions, Student, TokenShape, Tokenizer};
use crate::perceptual::{self, Eye, PIXELS_AT_ONCE, Perceptual};
use crate::random::{Sequence, Stream};
use crate::sampler::{check_from_zero, check_timesteps};
use crate::splice::State;
use crate::stage::{Context, Stage, link, room};
use crate::tape::Variable;
use crate::train::{Fit, HeldOut, StepOutput, TrainOptions, average, replace, scalar, shared};
use crate::weights::{Loader, Source, write_each};

/// Options of `distill`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The stage that made the teacher: the student has its shape and starts from its weights.
    #[schemars(extend("x-retort-artifact" = ["teacher"]))]
    pub teacher: String,
    /// The stage that built the trajectories.
    #[schemars(extend("x-retort-artifact" = ["trajectories"]))]
    pub trajectories: String,
    /// Blocks of the student; those beyond the teacher's come after them and start as the identity. As many as the
    /// teacher, if left out. The map from noise is sequential in the tokens: depth pays.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub depth: Option<usize>,
    /// Timesteps the student learns to start from, in AR steps, ascending from 0.
    pub timesteps: Vec<usize>,
    /// Relative frequency of each timestep in training; equal when empty.
    #[serde(default)]
    pub timestep_weights: Vec<f64>,
    /// AR steps whose tokens come from the logits; later ones from the continuous head. All, if left out.
    #[serde(default)]
    pub split: Option<usize>,
    /// How many pairs of the trajectories are used, from the first on; all, if left out.
    #[serde(default, rename = "use")]
    #[schemars(range(min = 1))]
    pub used: Option<usize>,
    /// The stage that made a student to go on from, instead of the teacher's weights. It has the same shape.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["student"]))]
    pub from: Option<String>,
    /// Share of the trajectories kept out of training, to measure the loss.
    #[serde(default = "held_out")]
    #[schemars(range(min = 0, max = 0.5))]
    pub held_out: f64,
    /// Weight of the cross-entropy, from which alone the logits learn. With 0 (the baseline that predicts embeddings) all
    /// tokens come from the continuous head: `split: 0`, here and in sampling.
    #[serde(default = "one")]
    #[schemars(range(min = 0))]
    pub cross_entropy: f64,
    /// Whether the loss covers the tokens that X_t already holds.
    #[serde(default)]
    pub known_tokens: bool,
    /// Weight of the squared distance between the continuous head and the codebook vectors.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub codebook_distance: f64,
    /// The perceptual term: distance between decoded images. It moves the continuous head only, so it needs a `split` below
    /// the number of AR steps.
    #[serde(default)]
    pub perceptual: Perceptual,
    /// Images that the perceptual term decodes and looks at together: memory holds the activations of so many. Their
    /// gradients add up. As many as have 524,288 pixels (8 of 256 x 256), if left out.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub decode_batch: Option<usize>,
    /// Parts of a batch that are computed one after the other: memory holds the activations of one, and their gradients
    /// add up to those of the batch.
    #[serde(default = "one_part")]
    #[schemars(range(min = 1))]
    pub accumulate: usize,
    /// Whether activations inside the student's blocks are computed again in the backward pass instead of being kept:
    /// memory for about a third more time. The result has the same bits.
    #[serde(default)]
    pub recompute: bool,
    /// Steps after which the weights are kept, again and again: a stage of kind `snapshot` takes those of one step as a
    /// student. None are kept, if left out.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub snapshots: Option<u64>,
    /// How to train.
    #[serde(default)]
    pub train: TrainOptions,
}

fn one_part() -> usize {
    1
}

fn held_out() -> f64 {
    0.02
}
fn one() -> f64 {
    1.0
}

/// The stage.
pub struct Distill;

impl<B: Backend> Stage<B> for Distill {
    type Options = Options;
    const KIND: &'static str = "distill";
    const OUTPUT: &'static str = "student";
    const REVISION: u32 = 2;
    const TOGETHER: bool = true;
    const SUMMARY: &'static str = "train a few-step student on a teacher's trajectories";

    fn check(o: &Options, _: &Path) -> Result<()> {
        check_from_zero(&o.timesteps, "/timesteps")?;
        let weights = &o.timestep_weights;
        if !weights.is_empty() && weights.len() != o.timesteps.len() {
            let message = format!(
                "{} weights for {} timesteps",
                weights.len(),
                o.timesteps.len()
            );
            return Err(Error::option("/timestep_weights", message));
        }
        if weights.iter().any(|w| *w < 0.0)
            || (!weights.is_empty() && weights.iter().sum::<f64>() <= 0.0)
        {
            return Err(Error::option(
                "/timestep_weights",
                "expected weights of at least 0, not all 0",
            ));
        }
        if o.perceptual.weight() > 0.0 && o.split.is_none() {
            return Err(Error::option(
                "/perceptual",
                "the perceptual term moves the continuous head only: give a `split` below the number of AR steps",
            ));
        }
        if o.accumulate > o.train.batch {
            let message = format!(
                "accumulate {}: a batch of {} has no more parts than samples",
                o.accumulate, o.train.batch
            );
            return Err(Error::option("/accumulate", message));
        }
        if o.cross_entropy == 0.0 && o.split != Some(0) {
            return Err(Error::option(
                "/cross_entropy",
                "without cross-entropy no logits learn: give `split: 0`, by which all tokens come from the continuous head",
            ));
        }
        if o.cross_entropy == 0.0 && !o.moves_head() {
            return Err(Error::option(
                "/cross_entropy",
                "no loss is left: give `codebook_distance` or `perceptual` a weight above 0",
            ));
        }
        if o.from.is_some() && o.depth.is_some() {
            return Err(Error::option(
                "/depth",
                "a student that goes on `from` another has as many blocks as that",
            ));
        }
        Ok(())
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let (host, backend, seed) = (context.host, context.backend, context.job.seed);
        let ranks = context.ranks;
        context.check_share(o.train.batch, o.accumulate)?;
        let teacher = context.input(&o.teacher)?;
        let bundle = Bundle::open(&teacher.path)?;
        let network_of_teacher = bundle.network()?;
        let shape = network_of_teacher.token_shape();
        check_timesteps(&o.timesteps, &shape, "/timesteps")?;
        let steps = shape.steps.len();
        let split = o.split.unwrap_or(steps);
        if split > steps || split == steps && o.perceptual.weight() > 0.0 {
            let message = match o.perceptual.weight() > 0.0 {
                true => format!(
                    "split {split}: the perceptual term needs tokens of the continuous head, so a split below the teacher's \
                     {steps} AR steps"
                ),
                false => format!("split {split}: the teacher has {steps} AR steps"),
            };
            return Err(Error::option("/split", message));
        }
        let dataset = Dataset::open(context.input_dir(&o.trajectories)?)?;
        let pairs = o.used.unwrap_or(dataset.len());
        if pairs > dataset.len() {
            let message = format!(
                "use {pairs}: {} has {} pairs",
                o.trajectories,
                dataset.len()
            );
            return Err(Error::option("/use", message));
        }
        if dataset.shape() != shape {
            let message = format!(
                "{} was built with a teacher of another shape",
                o.trajectories
            );
            return Err(Error::option("/trajectories", message));
        }
        if dataset.manifest.teacher != teacher.hash {
            let message = format!(
                "{} was built with another teacher than {}",
                o.trajectories, o.teacher
            );
            return Err(Error::option("/trajectories", message));
        }
        let tokenizer = bundle.tokenizer(backend)?;
        let codebook = tokenizer.codebook()?;
        let eye = Eye::open(context, &o.perceptual)?;
        eye.check(bundle.config.tokenizer.image())?;

        let from = match &o.from {
            Some(stage) => Some((stage, Bundle::open(context.input_dir(stage)?)?)),
            None => None,
        };
        let (network, file) = match &from {
            Some((stage, student)) => {
                let network = student.network()?.clone();
                if network.token_shape() != shape
                    || student.config.tokenizer != bundle.config.tokenizer
                {
                    let message =
                        format!("{stage} is a student of another shape than {}", o.teacher);
                    return Err(Error::option("/from", message));
                }
                (network, student.network_file()?)
            }
            None => (
                network_of_teacher.deepened(o.depth)?,
                bundle.network_file()?,
            ),
        };
        let start = match &from {
            Some(_) => Source::Files(std::slice::from_ref(&file)),
            None => Source::Start {
                file: &file,
                of: &|name| network_of_teacher.start(name),
                seed,
            },
        };
        room::check(
            context,
            "/train/batch",
            o.train.batch.div_ceil(o.accumulate * ranks.size()),
            room::training(&network, o.cross_entropy > 0.0, o.recompute),
        )?;
        let origin = o.from.as_ref().unwrap_or(&o.teacher);
        let mut loader = Loader::new(backend, start, true, origin.as_str());
        let mut student = network.student(&mut loader)?;
        student.recompute(o.recompute);
        let all = loader.into_params();
        let parameters = all
            .iter()
            .map(|(_, p)| p.shape().iter().product::<usize>())
            .sum();
        let needed = need::Need::of(o, &network, &bundle.config.tokenizer, parameters);
        host.log(
            LogLevel::Info,
            &format!("training needs {}", needed.describe()),
        );
        // The weights are there already.
        let free = memory::free().map(|free| free.saturating_add(4 * parameters as u64));
        if let (true, Some(free)) = (context.on_host(), free)
            && let Some(message) = needed.refusal(o, free)
        {
            return Err(Error::option("/train/batch", message));
        }
        let idle = |name: &str| {
            !o.moves_head() && name.starts_with(CONTINUOUS_HEAD)
                || o.cross_entropy == 0.0 && network.is_of_logits(name)
        };
        let (idle, params): (Vec<_>, Vec<_>) = all.into_iter().partition(|(name, _)| idle(name));
        if !idle.is_empty() {
            let head = if o.moves_head() {
                "logits"
            } else {
                "continuous head"
            };
            let message = format!("no loss term reaches the {head}: its weights stay as they are");
            host.log(LogLevel::Info, &message);
        }
        let average = average(backend, &o.train, &params)?;
        let mut tensors = shared(&params, average.as_ref());
        tensors.extend(shared(&idle, None));
        let measured = network.student(&mut Loader::new(
            backend,
            Source::Device(&tensors),
            false,
            "student",
        ))?;

        let held = ((pairs as f64 * o.held_out) as usize).min(HELD_OUT_MOST);
        let train = pairs - held;
        if train == 0 {
            return Err(Error::option(
                "/held_out",
                "no trajectory is left for training",
            ));
        }
        let objective = Objective {
            options: o,
            backend,
            dataset: &dataset,
            codebook_host: B::to_floats(&codebook)?,
            codebook: &codebook,
            tokenizer: &*tokenizer,
            eye,
            decode_batch: o.decode_batch(bundle.config.tokenizer.image()),
            shape: &shape,
            boundary: shape.tokens_before(split),
            ranks,
            begun: Cell::new((Instant::now(), 0.0)),
        };
        let mut epoch = (u64::MAX, Vec::new());
        let batch = o.train.batch;
        let work = context.work_dir()?;
        let kept = |step: u64| {
            o.snapshots
                .is_some_and(|n| step > 0 && step.is_multiple_of(n))
        };
        let step = |step: u64, part: usize| {
            if part == 0 && ranks.rank() == 0 && kept(step) {
                // Before step n the weights are those after n steps.
                let path = work.join(bundle::snapshot(step));
                std::fs::create_dir_all(work.join(bundle::SNAPSHOTS)).map_err(Error::io(&path))?;
                replace(&path, |partial| write_tensors::<B>(partial, &tensors))?;
            }
            let mut choice = Sequence::new(seed, Stream::Step, step);
            let samples: Vec<usize> = (0..batch as u64)
                .map(|i| {
                    // Every sample once per epoch, in an order of its own.
                    let at = step * batch as u64 + i;
                    let (number, place) = (at / train as u64, (at % train as u64) as usize);
                    if epoch.0 != number {
                        epoch = (
                            number,
                            Sequence::new(seed, Stream::Order, number).permutation(train),
                        );
                    }
                    epoch.1[place] as usize
                })
                .collect();
            let timesteps: Vec<usize> = samples.iter().map(|_| o.draw(&mut choice)).collect();
            objective.loss(&*student, &samples, &timesteps, part)
        };
        let held: Vec<usize> = (train..pairs).collect();
        let term = match o.cross_entropy > 0.0 {
            true => "cross-entropy",
            false => "squared distance",
        };
        let mut measure = || {
            let mut total = 0.0;
            for &t in &o.timesteps {
                let (loss, accuracy) = objective.measure(&*measured, &held, t)?;
                host.log(
                    LogLevel::Info,
                    &format!("held out, t = {t}: {term} {loss:.4}, right tokens {accuracy:.4}"),
                );
                total += loss / o.timesteps.len() as f64;
            }
            Ok(total)
        };
        let fit = Fit {
            host,
            backend,
            work_dir: Some(work),
            name: "distill",
            ranks,
            options: &o.train,
            params: &params,
            ema: average.as_ref(),
            kept: None,
            adversary: None,
        };
        let every = (o.train.steps / 10).max(1);
        let held_out = (!held.is_empty()).then_some(HeldOut {
            every,
            name: "held_out_loss",
            measure: &mut measure,
            keep_best: false,
        });
        let mut weights = fit.run_in_parts(o.accumulate, step, held_out)?;
        if context.job.part.is_some() {
            return Ok(StageResult::of_part());
        }
        weights.extend(crate::weights::from_params(&idle)?);
        let mut figures = serde_json::Map::new();
        if !held.is_empty() {
            for &t in &o.timesteps {
                let (loss, accuracy) = objective.measure(&*measured, &held, t)?;
                host.metric(&format!("distill/held_out_loss_t{t}"), o.train.steps, loss);
                host.metric(
                    &format!("distill/held_out_accuracy_t{t}"),
                    o.train.steps,
                    accuracy,
                );
                figures.insert(
                    format!("t{t}"),
                    json!({ "held_out_loss": loss, "held_out_accuracy": accuracy }),
                );
            }
        }
        context.finish("student", ArtifactMeta::default(), figures.into(), |dir| {
            let shown = (o.timesteps.as_slice(), bundle.config.classes.as_slice());
            bundle::write_network(dir, &bundle, (&network, &weights), shown)?;
            for step in (1..o.train.steps).filter(|&step| kept(step)) {
                let (file, folder) = (bundle::snapshot(step), dir.join(bundle::SNAPSHOTS));
                std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
                link(&work.join(&file), &dir.join(&file))?;
            }
            Ok(())
        })
    }
}

/// Most logits that are held to measure the loss.
const MEASURED_AT_ONCE: usize = 1 << 26;
/// Most trajectories that are held out.
const HELD_OUT_MOST: usize = 2000;

/// Writes tensors of the device, with one on the host at a time.
fn write_tensors<B: Backend>(path: &Path, tensors: &BTreeMap<String, B::Tensor>) -> Result<()> {
    let shapes = tensors.iter().map(|(name, t)| (name.clone(), B::shape(t)));
    write_each(path, shapes.collect(), |name| {
        Ok(B::to_floats(&tensors[name])?.into())
    })
}

impl Options {
    /// Whether a term of the loss moves the continuous head.
    fn moves_head(&self) -> bool {
        self.codebook_distance > 0.0 || self.perceptual.weight() > 0.0
    }

    /// A timestep by the weights.
    fn draw(&self, choice: &mut Sequence) -> usize {
        if self.timestep_weights.is_empty() {
            return self.timesteps[choice.below(self.timesteps.len())];
        }
        let mut left = choice.uniform() * self.timestep_weights.iter().sum::<f64>();
        for (&t, &w) in self.timesteps.iter().zip(&self.timestep_weights) {
            left -= w;
            if left < 0.0 {
                return t;
            }
        }
        self.timesteps[self.timesteps.len() - 1]
    }
}

/// The training loss and what it needs.
struct Objective<'a, B: Backend> {
    options: &'a Options,
    backend: &'a B,
    dataset: &'a Dataset,
    codebook_host: Vec<f32>,
    codebook: &'a B::Tensor,
    tokenizer: &'a dyn Tokenizer<B>,
    eye: Eye<B>,
    /// Images decoded together.
    decode_batch: usize,
    shape: &'a TokenShape,
    /// Tokens before `split`.
    boundary: usize,
    /// Who shares each batch.
    ranks: &'a dyn Collective,
    /// When the last step began, and for how many seconds it waited for its data.
    begun: Cell<(Instant, f64)>,
}

/// X_t of some samples, on the device, and what is known of them.
struct Batch<B: Backend> {
    state: State<B>,
    conditions: Conditions<B>,
    /// Tokens (b L).
    tokens: B::Tensor,
    /// Weight of each token in the loss (b L), of mean 1.
    weights: Vec<f32>,
}

impl<B: Backend> Objective<'_, B> {
    fn batch(&self, samples: &[usize], timesteps: &[usize]) -> Result<Batch<B>> {
        let (n, l, d) = (samples.len(), self.shape.count(), self.shape.dim);
        let mut x = Vec::with_capacity(n * l * d);
        let mut tokens = Vec::with_capacity(n * l);
        let known = |&t: &usize| self.shape.tokens_before(t);
        let known: Vec<usize> = timesteps.iter().map(known).collect();
        let noises = samples.par_iter().map(|&sample| self.dataset.noise(sample));
        let noises: Vec<Vec<f32>> = noises.collect::<Result<_>>()?;
        for ((&sample, &known), noise) in samples.iter().zip(&known).zip(&noises) {
            let ids = self.dataset.tokens_of(sample)?;
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
        let labels: Vec<u32> = samples.iter().map(|&s| self.dataset.labels[s]).collect();
        Ok(Batch {
            state: State {
                x: self.backend.floats(&x, &[n, l, d])?,
                known,
            },
            conditions: self.dataset.subjects.conditions(self.backend, &labels)?,
            tokens: self.backend.indices(&tokens, &[n * l])?,
            weights,
        })
    }

    /// Tokens of samples that the loss covers.
    fn counted(&self, timesteps: &[usize]) -> usize {
        let l = self.shape.count();
        let known = |&t: &usize| match self.options.known_tokens {
            true => 0,
            false => self.shape.tokens_before(t),
        };
        timesteps.iter().map(|t| l - known(t)).sum()
    }

    /// The loss of a part of a batch, in the measure in which it has part in that of the batch.
    fn loss(
        &self,
        student: &dyn Student<B>,
        samples: &[usize],
        timesteps: &[usize],
        part: usize,
    ) -> Result<StepOutput<B>> {
        let o = self.options;
        let begun = Instant::now();
        let own = self.ranks.share(samples.len(), part, o.accumulate);
        let parts = o.accumulate * self.ranks.size();
        let of_images = own.len() as f64 / samples.len() as f64;
        let of_tokens =
            self.counted(&timesteps[own.clone()]) as f64 / self.counted(timesteps).max(1) as f64;
        let (samples, timesteps) = (&samples[own.clone()], &timesteps[own]);
        let b = self.batch(samples, timesteps)?;
        let data_seconds = begun.elapsed().as_secs_f64();
        let (n, l, k, d) = (
            samples.len(),
            self.shape.count(),
            self.shape.vocabulary,
            self.shape.dim,
        );
        let prediction = student.predict(&b.state.x, &b.conditions, &b.state.kinds()?)?;
        let weights = Variable::constant(self.backend.floats(&b.weights, &[n * l])?);
        let mean = |term: Variable<B>, share: f64| match parts {
            1 => Ok(term),
            _ => term.affine(share, 0.0),
        };
        let mut terms = Vec::new();
        if o.cross_entropy > 0.0 {
            let logits = prediction.logits.reshape(&[n * l, k])?;
            let rows = logits.cross_entropy_rows(&b.tokens)?.mul(&weights)?;
            terms.push((
                "cross_entropy",
                mean(rows.mean_all()?, of_tokens)?,
                o.cross_entropy,
            ));
        }
        if o.moves_head() {
            let continuous = student.continuous(&prediction)?; // (b, L, D)
            let target = B::reshape(&B::rows(self.codebook, &b.tokens)?, &[n, l, d])?;
            if o.codebook_distance > 0.0 {
                let square = continuous
                    .sub(&Variable::constant(target.clone()))?
                    .unary(Unary::Square)?;
                let weighted = square.mul(&weights.reshape(&[n, l, 1])?)?;
                terms.push((
                    "codebook_distance",
                    mean(weighted.mean_all()?, of_tokens)?,
                    o.codebook_distance,
                ));
            }
            if o.perceptual.weight() > 0.0 {
                let logits = prediction.logits.value();
                let head = || Ok(continuous);
                let sequence = b.state.finish(logits, head, self.codebook, self.boundary)?;
                let most = self.decode_batch;
                let distance =
                    perceptual::distance(self.tokenizer, &self.eye, most, &sequence, &target)?;
                terms.push((
                    "perceptual",
                    mean(distance, of_images)?,
                    o.perceptual.weight(),
                ));
            }
        }
        let figures = terms
            .iter()
            .map(|(name, term, _)| Ok((*name, scalar::<B>(term.value())?)));
        let mut figures = figures.collect::<Result<Vec<_>>>()?;
        // Of the time since the last part began.
        let last = self.begun.replace((begun, data_seconds));
        let step = (begun - last.0).as_secs_f64();
        let waited = if step > 0.0 { last.1 / step } else { 0.0 };
        figures.push(("data_wait", waited / parts as f64));
        let mut loss: Option<Variable<B>> = None;
        for (_, term, weight) in terms {
            let term = term.affine(weight, 0.0)?;
            loss = Some(match loss {
                Some(sum) => sum.add(&term)?,
                None => term,
            });
        }
        let loss = loss.ok_or_else(|| Error::Internal("a loss without terms".into()))?;
        Ok(StepOutput::new(loss, figures))
    }

    /// The loss from timestep t, and the share of right tokens, over the tokens after t: cross-entropy and most probable codes
    /// of the logits; where these do not learn, squared distance and nearest codes of the continuous head.
    fn measure(&self, student: &dyn Student<B>, samples: &[usize], t: usize) -> Result<(f64, f64)> {
        let (l, k, d, known) = (
            self.shape.count(),
            self.shape.vocabulary,
            self.shape.dim,
            self.shape.tokens_before(t),
        );
        let (mut sum, mut right) = (0.0, 0usize);
        let o = self.options;
        let a_step = o.train.batch.div_ceil(o.accumulate);
        for part in samples.chunks((MEASURED_AT_ONCE / (l * k)).clamp(1, a_step)) {
            let b = self.batch(part, &vec![t; part.len()])?;
            let prediction = student.predict(&b.state.x, &b.conditions, &b.state.kinds()?)?;
            let (losses, chosen) = if self.options.cross_entropy > 0.0 {
                let flat = B::reshape(prediction.logits.value(), &[part.len() * l, k])?;
                (B::cross_entropy(&flat, &b.tokens)?, B::argmax_last(&flat)?)
            } else {
                let head = student
                    .continuous(&prediction)?
                    .reshape(&[part.len() * l, d])?;
                let target = Variable::constant(B::rows(self.codebook, &b.tokens)?);
                let square = head.sub(&target)?.unary(Unary::Square)?.mean(&[1])?;
                (
                    square.value().clone(),
                    nearest::<B>(head.value(), self.codebook)?,
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
