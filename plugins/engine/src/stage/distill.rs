//! `distill`: trains a few-step student on a teacher's trajectories (arXiv 2412.17153, section 3.3).
//!
//! For a sample's noise eps and tokens q, and a timestep t drawn from a small set, the student sees X_t = (q_1 .. q_t,
//! eps_{t+1} .. eps_n) and predicts the final sequence. The loss, whose weights are options:
//!
//! ```text
//! cross-entropy of the logits against q
//! + perceptual distance between decode(sequence) and decode(q)        sequence: X_t's tokens, argmax codes before `split`
//! + squared distance of the continuous head to the codebook vectors   (no gradient), the continuous head after it
//! ```
//!
//! The sequence is assembled by the same function as in sampling ([`crate::splice`]).

mod objective;
mod training_memory;

use std::collections::BTreeMap;
use std::path::Path;

use retort_abi::{ArtifactMeta, LogLevel, SourceStage, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::Backend;
use crate::bundle::{self, Bundle, NetworkConfig};
use crate::context::Context;
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::files::{link, replace};
use crate::memory;
use crate::model::{CONTINUOUS_HEAD, Student, TokenShape, Tokenizer};
use crate::perceptual::{PIXELS_AT_ONCE, Perceptual, PerceptualMetric};
use crate::random::{Sequence, Stream};
use crate::sampler::{check_from_zero, check_timesteps};
use crate::stage::sources::Sources;
use crate::stage::{Stage, batch_memory};
use crate::train::{HeldOut, TrainOptions, TrainingLoop, average, check_parts, one_part, shared};
use crate::weights::{
    self, CheckpointWeights, Loader, ParameterSource, Params, Weights, write_each,
};

use objective::Objective;

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
    /// Blocks of the student; extra ones come after the teacher's and start as the identity. As many as the
    /// teacher, if left out. The map from noise is sequential in the tokens: depth pays.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub depth: Option<usize>,
    /// Timesteps the student learns to start from, in AR steps, ascending from 0.
    pub timesteps: Vec<usize>,
    /// Relative frequency of each timestep in training; equal when empty.
    #[serde(default)]
    pub timestep_weights: Vec<f64>,
    /// AR steps whose tokens come from logits; later ones use the continuous head. All, if left out.
    #[serde(default)]
    pub split: Option<usize>,
    /// Use only this many pairs of the trajectories, from the first; all, if left out.
    #[serde(default, rename = "use")]
    #[schemars(range(min = 1))]
    pub used: Option<usize>,
    /// The stage of a student of the same shape to start from, instead of the teacher's weights.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["student"]))]
    pub from: Option<String>,
    /// Share of the trajectories kept out of training, to measure the loss.
    #[serde(default = "held_out")]
    #[schemars(range(min = 0, max = 0.5))]
    pub held_out: f64,
    /// Weight of the cross-entropy, the only loss of the logits. With 0 (the baseline that predicts embeddings) all
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
    /// Images per pass of the perceptual term: memory holds the activations of this many. Their
    /// gradients add up. As many as have 524,288 pixels (8 of 256 x 256), if left out.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub decode_batch: Option<usize>,
    /// Split a batch into this many parts, computed in turn: memory holds the activations of one, and their gradients
    /// sum to the batch's.
    #[serde(default = "one_part")]
    #[schemars(range(min = 1))]
    pub accumulate: usize,
    /// Whether activations inside the student's blocks are computed again in the backward pass instead of being kept:
    /// memory for about a third more time. The result has the same bits.
    #[serde(default)]
    pub recompute: bool,
    /// Keep the weights every this many steps: a stage of kind `snapshot` takes those of one step as a
    /// student. None are kept, if left out.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub snapshots: Option<u64>,
    /// How to train.
    #[serde(default)]
    pub train: TrainOptions,
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
        check_parts(o.accumulate, o.train.batch)?;
        if o.cross_entropy == 0.0 && o.split != Some(0) {
            return Err(Error::option(
                "/cross_entropy",
                "without cross-entropy the logits do not learn: `split: 0` takes all tokens from the continuous head",
            ));
        }
        if o.cross_entropy == 0.0 && !o.moves_head() {
            return Err(Error::option(
                "/cross_entropy",
                "no loss: set the weight of `codebook_distance` or `perceptual` above 0",
            ));
        }
        if o.from.is_some() && o.depth.is_some() {
            return Err(Error::option(
                "/depth",
                "a student started `from` another must have as many blocks",
            ));
        }
        match o.snapshots {
            Some(every) if every >= o.train.steps => {
                let message = format!(
                    "snapshots {every}: none would be kept, for the training has {} steps; expected fewer than these",
                    o.train.steps
                );
                Err(Error::option("/snapshots", message))
            }
            _ => Ok(()),
        }
    }

    fn check_sources(o: &Options, stages: &BTreeMap<String, SourceStage>) -> Result<()> {
        let sources = Sources::of(stages);
        if let Some(steps) = sources.steps(&o.teacher) {
            check_timesteps(&o.timesteps, steps, "/timesteps")?;
            o.check_split(steps)?;
        }
        match sources.pairs(&o.trajectories) {
            Some(pairs) => o.check_used(pairs),
            None => Ok(()),
        }
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        context.check_share(o.train.batch, o.accumulate)?;
        let inputs = Inputs::open(context, o)?;
        let networks = Networks::load(context, o, &inputs)?;
        let objective = Objective::new(context, o, &inputs)?;
        let Some(mut weights) = train(context, o, &inputs, &networks, &objective)? else {
            return Ok(StageResult::of_part());
        };
        weights.extend(weights::from_params(&networks.idle)?);
        let figures = measure(context, o, &inputs, &networks, &objective)?;
        let work = context.work_dir()?;
        context.finish("student", ArtifactMeta::default(), figures.into(), |dir| {
            let bundle = &inputs.teacher;
            let shown = (o.timesteps.as_slice(), bundle.config.classes.as_slice());
            bundle::write_network(dir, bundle, (&networks.config, &weights), shown)?;
            for step in (1..o.train.steps).filter(|&step| o.keeps(step)) {
                let (file, folder) = (bundle::snapshot(step), dir.join(bundle::SNAPSHOTS));
                std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
                link(&work.join(&file), &dir.join(&file))?;
            }
            Ok(())
        })
    }
}

/// What a student is made from.
struct Inputs<'a, B: Backend> {
    teacher: Bundle<'a>,
    /// The student to start from, and its stage.
    from: Option<(String, Bundle<'a>)>,
    shape: TokenShape,
    dataset: Dataset,
    /// The training pairs, at the beginning of the dataset, and the held-out pairs after them.
    trained: usize,
    held: Vec<usize>,
    tokenizer: Box<dyn Tokenizer<B>>,
    codebook: B::Tensor,
    metric: PerceptualMetric<B>,
}

impl<'a, B: Backend> Inputs<'a, B> {
    /// Opens them and refuses mismatches.
    fn open(context: &Context<'a, B>, o: &Options) -> Result<Self> {
        let made = context.input(&o.teacher)?;
        let teacher = Bundle::open(&made.path)?;
        let shape = teacher.network()?.token_shape();
        check_timesteps(&o.timesteps, shape.steps.len(), "/timesteps")?;
        o.check_split(shape.steps.len())?;
        let dataset = Dataset::open(context.input_dir(&o.trajectories)?)?;
        o.check_used(dataset.len() as u64)?;
        let pairs = o.used.unwrap_or(dataset.len());
        let refuse = |pointer: &str, message: String| Err(Error::option(pointer, message));
        if dataset.shape() != shape {
            let message = format!(
                "{} was built with a teacher of another shape",
                o.trajectories
            );
            return refuse("/trajectories", message);
        }
        if dataset.manifest.teacher != made.hash {
            let message = format!(
                "{} was built with another teacher than {}",
                o.trajectories, o.teacher
            );
            return refuse("/trajectories", message);
        }
        let held = ((pairs as f64 * o.held_out) as usize).min(HELD_OUT_MOST);
        let trained = pairs - held;
        if trained == 0 {
            return refuse("/held_out", "no trajectory is left for training".into());
        }
        let tokenizer = teacher.tokenizer(context.backend)?;
        let codebook = tokenizer.codebook()?;
        let metric = PerceptualMetric::open(context, &o.perceptual)?;
        metric.check(teacher.config.tokenizer.image())?;
        let from = match &o.from {
            None => None,
            Some(stage) => {
                let student = Bundle::open(context.input_dir(stage)?)?;
                let other_images = student.config.tokenizer != teacher.config.tokenizer;
                if student.network()?.token_shape() != shape || other_images {
                    let message =
                        format!("{stage} is a student of another shape than {}", o.teacher);
                    return refuse("/from", message);
                }
                Some((stage.clone(), student))
            }
        };
        Ok(Self {
            teacher,
            from,
            shape,
            dataset,
            trained,
            held: (trained..pairs).collect(),
            tokenizer,
            codebook,
            metric,
        })
    }

    /// The student's network, and the file of its initial weights.
    fn start(&self, o: &Options) -> Result<(NetworkConfig, CheckpointWeights)> {
        match &self.from {
            Some((_, student)) => Ok((student.network()?.clone(), student.network_file()?)),
            None => Ok((
                self.teacher.network()?.deepened(o.depth)?,
                self.teacher.network_file()?,
            )),
        }
    }
}

/// The student in training.
struct Networks<B: Backend> {
    config: NetworkConfig,
    student: Box<dyn Student<B>>,
    /// What it learns.
    params: Params<B>,
    /// Weights without a gradient from any term of the loss.
    idle: Params<B>,
    average: Option<BTreeMap<String, B::Tensor>>,
    /// The final weights: the average, if there is one.
    kept: BTreeMap<String, B::Tensor>,
    /// The student with these.
    measured: Box<dyn Student<B>>,
}

impl<B: Backend> Networks<B> {
    /// Loads them, if there is enough memory for the training.
    fn load(context: &Context<'_, B>, o: &Options, inputs: &Inputs<'_, B>) -> Result<Self> {
        let (host, backend) = (context.host, context.backend);
        let (config, file) = inputs.start(o)?;
        let of_teacher = inputs.teacher.network()?;
        let source = match &inputs.from {
            Some(_) => ParameterSource::Files(std::slice::from_ref(&file)),
            None => ParameterSource::Start {
                file: &file,
                of: &|name| of_teacher.start(name),
                seed: context.job.seed,
            },
        };
        batch_memory::check(
            context,
            "/train/batch",
            o.train.batch.div_ceil(o.accumulate * context.ranks.size()),
            batch_memory::training(&config, o.cross_entropy > 0.0, o.recompute),
        )?;
        let origin = o.from.as_ref().unwrap_or(&o.teacher);
        let mut loader = Loader::new(backend, source, true, origin.as_str());
        let mut student = config.student(&mut loader)?;
        student.recompute(o.recompute);
        let all = loader.into_params();
        let parameters = all
            .iter()
            .map(|(_, p)| p.shape().iter().product::<usize>())
            .sum();
        let needed = training_memory::TrainingMemory::of(
            o,
            &config,
            &inputs.teacher.config.tokenizer,
            parameters,
            context.ranks.size(),
        );
        host.log(
            LogLevel::Info,
            &format!("training needs {}", needed.describe()),
        );
        // The weights are already in memory.
        let free = memory::free_for(backend);
        let free = free.map(|free| free.saturating_add(4 * parameters as u64));
        if let Some(free) = free
            && let Some(message) = needed.refusal(o, free)
        {
            return Err(Error::option("/train/batch", message));
        }
        let idle = |name: &str| {
            !o.moves_head() && name.starts_with(CONTINUOUS_HEAD)
                || o.cross_entropy == 0.0 && config.is_of_logits(name)
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
        let mut kept = shared(&params, average.as_ref());
        kept.extend(shared(&idle, None));
        let measured = config.student(&mut Loader::new(
            backend,
            ParameterSource::Device(&kept),
            false,
            "student",
        ))?;
        Ok(Self {
            config,
            student,
            params,
            idle,
            average,
            kept,
            measured,
        })
    }
}

/// Trains the student: its weights, or None in a worker that shares the training and is not the first.
fn train<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    inputs: &Inputs<'_, B>,
    networks: &Networks<B>,
    objective: &Objective<'_, B>,
) -> Result<Option<Weights>> {
    let (host, seed, ranks) = (context.host, context.job.seed, context.ranks);
    let work = context.work_dir()?;
    let mut epoch = (u64::MAX, Vec::new());
    let (batch, trained) = (o.train.batch as u64, inputs.trained as u64);
    let step = |step: u64, part: usize| {
        if part == 0 && o.keeps(step) {
            // The others wait for the first to write.
            ranks.set_patience(None);
            if ranks.rank() == 0 {
                // Before step n the weights are those after n steps.
                let path = work.join(bundle::snapshot(step));
                std::fs::create_dir_all(work.join(bundle::SNAPSHOTS)).map_err(Error::io(&path))?;
                replace(&path, |partial| write_tensors::<B>(partial, &networks.kept))?;
            }
        }
        let mut choice = Sequence::new(seed, Stream::Step, step);
        let samples: Vec<usize> = (0..batch)
            .map(|i| {
                // Every sample once per epoch, in a different order each time.
                let at = step * batch + i;
                let (number, place) = (at / trained, (at % trained) as usize);
                if epoch.0 != number {
                    epoch = (
                        number,
                        Sequence::new(seed, Stream::Order, number).permutation(inputs.trained),
                    );
                }
                epoch.1[place] as usize
            })
            .collect();
        let timesteps: Vec<usize> = samples.iter().map(|_| o.draw(&mut choice)).collect();
        objective.loss(&*networks.student, &samples, &timesteps, part)
    };
    let term = match o.cross_entropy > 0.0 {
        true => "cross-entropy",
        false => "squared distance",
    };
    let mut measure = || {
        let mut total = 0.0;
        for &t in &o.timesteps {
            let (loss, accuracy) = objective.measure(&*networks.measured, &inputs.held, t)?;
            host.log(
                LogLevel::Info,
                &format!("held out, t = {t}: {term} {loss:.4}, right tokens {accuracy:.4}"),
            );
            total += loss / o.timesteps.len() as f64;
        }
        Ok(total)
    };
    let fit = TrainingLoop {
        host,
        backend: context.backend,
        work_dir: Some(work),
        name: "distill",
        ranks,
        options: &o.train,
        params: &networks.params,
        ema: networks.average.as_ref(),
        kept: None,
        adversary: None,
    };
    let every = (o.train.steps / 10).max(1);
    let held_out = (!inputs.held.is_empty()).then_some(HeldOut {
        every,
        name: "held_out_loss",
        measure: &mut measure,
        keep_best: false,
    });
    let weights = fit.run_in_parts(o.accumulate, step, held_out)?;
    Ok(context.job.part.is_none().then_some(weights))
}

/// Records and returns the held-out pairs' loss and token accuracy at each timestep.
fn measure<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    inputs: &Inputs<'_, B>,
    networks: &Networks<B>,
    objective: &Objective<'_, B>,
) -> Result<serde_json::Map<String, serde_json::Value>> {
    let mut figures = serde_json::Map::new();
    if inputs.held.is_empty() {
        return Ok(figures);
    }
    for &t in &o.timesteps {
        let (loss, accuracy) = objective.measure(&*networks.measured, &inputs.held, t)?;
        let record = |name: &str, value| {
            let series = format!("distill/held_out_{name}_t{t}");
            context.host.metric(&series, o.train.steps, value);
        };
        record("loss", loss);
        record("accuracy", accuracy);
        figures.insert(
            format!("t{t}"),
            json!({ "held_out_loss": loss, "held_out_accuracy": accuracy }),
        );
    }
    Ok(figures)
}

/// The most trajectories that are held out.
const HELD_OUT_MOST: usize = 2000;

/// Writes tensors of the device, copying one to the host at a time.
fn write_tensors<B: Backend>(path: &Path, tensors: &BTreeMap<String, B::Tensor>) -> Result<()> {
    let shapes = tensors.iter().map(|(name, t)| (name.clone(), B::shape(t)));
    write_each(path, shapes.collect(), |name| {
        Ok(B::to_floats(&tensors[name])?.into())
    })
}

impl Options {
    /// Whether a term of the loss trains the continuous head.
    fn moves_head(&self) -> bool {
        self.codebook_distance > 0.0 || self.perceptual.weight() > 0.0
    }

    /// Refuses a split beyond the AR steps, or one that leaves the perceptual term nothing to train.
    fn check_split(&self, steps: usize) -> Result<()> {
        let looks = self.perceptual.weight() > 0.0;
        let split = self.split.unwrap_or(steps);
        let message = match looks {
            true if split >= steps => format!(
                "split {split}: the perceptual term needs tokens of the continuous head, so a split below the teacher's \
                 {steps} AR steps"
            ),
            false if split > steps => format!("split {split}: the teacher has {steps} AR steps"),
            _ => return Ok(()),
        };
        Err(Error::option("/split", message))
    }

    /// Refuses more pairs than there are.
    fn check_used(&self, pairs: u64) -> Result<()> {
        match self.used {
            Some(used) if used as u64 > pairs => {
                let message = format!("use {used}: {} has {pairs} pairs", self.trajectories);
                Err(Error::option("/use", message))
            }
            _ => Ok(()),
        }
    }

    /// Whether the weights after this many steps are kept.
    pub fn keeps(&self, step: u64) -> bool {
        self.snapshots
            .is_some_and(|n| step > 0 && step.is_multiple_of(n))
    }

    /// Draws a timestep by the weights.
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
