//! `trajectories`: the noise -> tokens dataset, by AR flow matching with a teacher (arXiv 2412.17153, section 3.2).
//!
//! Sample i has class i mod classes, or caption i mod captions, and the noise of (seed, i), so that shards may be made in any
//! order, anywhere, with any batch size.

use std::path::{Path, PathBuf};

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use retort_checkpoint::sample_shards::{MANIFEST, Shard};
use retort_checkpoint::trajectories::{FORMAT, Manifest};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::flow;
use crate::backend::{Backend, FlowSolver};
use crate::bundle::Bundle;
use crate::captions::{self, ConditioningSource};
use crate::context::Context;
use crate::dataset::{open_shard, write_shard};
use crate::error::{Error, Result};
use crate::files::{link, resolve, write_json};
use crate::memory;
use crate::model::{Teacher, TokenShape};
use crate::sampler::{Choice, Distribution, autoregressive};
use crate::stage::conditioning::labels::SampleLabels;
use crate::stage::conditioning::{
    CaptionText, Conditioning, ConditioningOptions, Features, Labels,
};
use crate::stage::noise::{Noise, TensorFile};
use crate::stage::shards::{
    self, PartDir, PlannedShard, SampleRange, ShardProgress, WrittenShards, batches, hashed,
};
use crate::stage::{Stage, batch_memory};

/// Options of `trajectories`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The stage that made the teacher.
    #[schemars(extend("x-retort-artifact" = ["teacher"]))]
    pub teacher: String,
    /// Number of samples.
    #[schemars(range(min = 1))]
    pub count: u64,
    /// Samples start..end alone, as [start, end], while other machines make others: the output is a part of the dataset,
    /// and a stage whose `parts` name all parts makes the whole of them.
    #[serde(default)]
    pub range: Option<[u64; 2]>,
    /// Folders of parts made elsewhere with the same teacher, seed and options (their manifest.json and shards): these
    /// are reused, the rest is made here.
    #[serde(default)]
    pub parts: Vec<PartDir>,
    /// Samples per shard file.
    #[serde(default = "shard_size")]
    #[schemars(range(min = 1))]
    pub shard_size: u64,
    /// Samples generated at a time.
    #[serde(default = "batch")]
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// The teacher's distribution.
    #[serde(default)]
    pub distribution: Distribution,
    /// Steps of the flow map's solver, an evaluation of the codebook each; from 64 on fewer than one token in a thousand
    /// differs from the exact one, from 96 on those alone that noise changed in its fourth digit would change.
    #[serde(default = "flow::default_steps")]
    #[schemars(range(min = 1, max = 10000))]
    pub solver_steps: usize,
    /// Noise (count, L, D) from a file instead of the seed.
    #[serde(default)]
    pub noise: Option<TensorFile>,
    /// Classes of the samples: `balanced` (the default), `drawn`, a list of numbers or names, a tensor of a file, or
    /// `{images: STAGE}`, in the proportions of real images. For a model of classes.
    #[serde(default)]
    pub labels: Option<Labels>,
    /// Captions of the samples, a text, a list of texts or the lines of a file: sample i has caption i mod their number. For a
    /// model of captions.
    #[serde(default)]
    pub caption: Option<CaptionText>,
    /// Folder of the flan-t5 that encodes captions: config.json, tokenizer.json and its weights.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "dir"))]
    pub text_encoder: Option<String>,
    /// Features of captions from a file, instead of `caption`.
    #[serde(default)]
    pub features: Option<Features>,
}

fn shard_size() -> u64 {
    10_000
}
fn batch() -> usize {
    500
}
impl Options {
    fn sample_range(&self) -> SampleRange {
        SampleRange {
            count: self.count,
            range: self.range,
            size: self.shard_size,
        }
    }

    fn conditioning_options(&self) -> ConditioningOptions<'_> {
        ConditioningOptions {
            labels: self.labels.as_ref(),
            caption: self.caption.as_ref(),
            text_encoder: self.text_encoder.as_deref(),
            features: self.features.as_ref(),
        }
    }
}

/// The stage.
pub struct Trajectories;

impl<B: Backend> Stage<B> for Trajectories {
    type Options = Options;
    const KIND: &'static str = "trajectories";
    const OUTPUT: &'static str = "trajectories";
    const REVISION: u32 = 4;
    const SUMMARY: &'static str = "build the noise -> tokens dataset with a teacher's flow map";
    const DIVISIBLE: bool = true;

    fn check(o: &Options, base: &Path) -> Result<()> {
        o.sample_range().check()?;
        o.conditioning_options().check(base, o.count)
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let inputs = Inputs::open(context, o)?;
        let planned = inputs.shards(&context.job.base_dir, o)?;
        let written = inputs.make(context, o, &planned)?;
        report(context, &written);
        match context.job.part {
            Some(_) => Ok(StageResult::of_part()),
            None => inputs.publish(context, o, planned),
        }
    }
}

/// The inputs of a dataset.
struct Inputs<'a> {
    teacher: Bundle<'a>,
    shape: TokenShape,
    /// Class of each sample, or number of its caption.
    labels: SampleLabels,
    /// The meaning of the labels.
    conditioning: ConditioningSource,
    noise: Noise,
    /// The dataset's manifest, without its shards.
    manifest: Manifest,
}

impl<'a> Inputs<'a> {
    fn open<B: Backend>(context: &Context<'a, B>, o: &Options) -> Result<Self> {
        let input = context.input(&o.teacher)?;
        let teacher = Bundle::open(&input.path)?;
        let network = teacher.network()?;
        let shape = network.token_shape();
        batch_memory::check(
            context,
            "/batch",
            o.sample_range().at_once(o.batch),
            batch_memory::generating(network, &o.distribution, &context.job.dtype),
        )?;
        let each = shape.count().saturating_add(1) as u64;
        memory::check(
            "/shard_size",
            "the tokens and labels of a shard",
            (o.sample_range().at_once(usize::MAX) as u64)
                .checked_mul(4)
                .and_then(|bytes| bytes.checked_mul(each)),
            "make smaller shards",
        )?;
        // Before the networks are loaded: a text encoder may need the memory.
        let model = (&shape.condition, teacher.config.classes.as_slice());
        let Conditioning {
            labels,
            source: conditioning,
            ..
        } = o.conditioning_options().resolve(context, model, o.count)?;
        let noise = Noise::open(context.job, o.noise.as_ref(), o.count, &shape)?;
        let manifest = Manifest {
            format: FORMAT,
            seed: context.job.seed,
            count: o.count,
            steps: shape.steps.clone(),
            vocabulary: shape.vocabulary,
            dim: shape.dim,
            condition: shape.condition,
            class_names: teacher.config.classes.clone(),
            distribution: json!(o.distribution),
            solver_steps: o.solver_steps,
            teacher: input.hash.clone(),
            shards: Vec::new(),
        };
        Ok(Self {
            teacher,
            shape,
            labels,
            conditioning,
            noise,
            manifest,
        })
    }

    /// The shards of the dataset, including those that parts already contain.
    fn shards(&self, base: &Path, o: &Options) -> Result<Vec<PlannedShard>> {
        let part = |PartDir(part): &PartDir| -> Result<(PathBuf, Vec<Shard>)> {
            let dir = resolve(base, part);
            let shards = self.manifest.of_part(&dir)?;
            let features = dir.join(captions::FILE);
            if let ConditioningSource::Captions(own) = &self.conditioning
                && !own.are_in(&features)?
            {
                let message = "these are not the features of this stage's captions; give all parts the same `features`";
                return Err(Error::data(features, message));
            }
            Ok((dir, shards))
        };
        let parts = o.parts.iter().map(part).collect::<Result<_>>()?;
        o.sample_range().shards(parts)
    }

    fn labels_of(&self, shard: &Shard) -> Vec<u32> {
        self.labels.of(shard.start..shard.end)
    }

    /// Makes this process's share of the shards.
    fn make<B: Backend>(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        planned: &[PlannedShard],
    ) -> Result<WrittenShards> {
        // Whether a file contains the samples that this stage would make.
        let check = |path: &Path, shard: &Shard| {
            let (stored, found) = open_shard(&self.manifest, path, shard)?;
            let labels = self.labels_of(shard);
            self.noise
                .check(path, shard, (&stored, &found), &labels, o.batch)
        };
        // Loaded when the first shard has to be made.
        let mut networks = None;
        shards::make(
            context,
            planned,
            "samples",
            check,
            |path, shard, progress| {
                let networks = match &mut networks {
                    Some(loaded) => loaded,
                    none => none.insert(Networks::load(context.backend, &self.teacher)?),
                };
                let tokens = self.tokens(context.backend, o, networks, shard, progress)?;
                let noise = match self.noise.is_given() {
                    true => Some(self.noise.read(shard.start..shard.end)?),
                    false => None,
                };
                let noise = noise.as_deref().map(|noise| (noise, self.shape.dim));
                write_shard(path, &self.labels_of(shard), &tokens, noise)
            },
        )
    }

    /// Tokens (n, L) of the samples of a shard.
    fn tokens<B: Backend>(
        &self,
        backend: &B,
        o: &Options,
        networks: &Networks<B>,
        shard: &Shard,
        progress: &mut ShardProgress<'_, '_, B>,
    ) -> Result<Vec<u32>> {
        let (l, d) = (self.shape.count(), self.shape.dim);
        let solver = FlowSolver {
            steps: o.solver_steps,
        };
        let mut tokens = Vec::with_capacity((shard.end - shard.start) as usize * l);
        for batch in batches(shard.start..shard.end, o.batch) {
            progress.go_on()?;
            let labels = self.labels.of(batch.clone());
            let first = batch.start;
            let noise = backend.floats(&self.noise.read(batch)?, &[labels.len(), l, d])?;
            let mut choice = Choice::Flow {
                noise: &noise,
                codebook: &networks.codebook,
                solver,
            };
            let ids = autoregressive(
                &*networks.teacher,
                &self.conditioning.batch(backend, &labels)?,
                &o.distribution,
                &mut choice,
                None,
                self.shape.steps.len(),
            )
            .map_err(|e| e.of_samples(first))?;
            tokens.extend(B::to_indices(&ids)?);
            progress.made(labels.len() as u64);
        }
        Ok(tokens)
    }

    /// Writes the artifact: manifest, shards and captions.
    fn publish<B: Backend>(
        self,
        context: &Context<'_, B>,
        o: &Options,
        planned: Vec<PlannedShard>,
    ) -> Result<StageResult> {
        let work = context.work_dir()?;
        let manifest = Manifest {
            shards: hashed(work, planned)?,
            ..self.manifest
        };
        let samples = o.sample_range().samples();
        let summary = json!({ "count": samples.end - samples.start });
        let captions =
            matches!(self.conditioning, ConditioningSource::Captions(_)).then_some(captions::FILE);
        context.finish("trajectories", ArtifactMeta::default(), summary, |dir| {
            let shards = manifest.shards.iter().map(|shard| shard.file.as_str());
            for file in shards.chain(captions) {
                link(&work.join(file), &dir.join(file))?;
            }
            write_json(&dir.join(MANIFEST), &manifest)
        })
    }
}

/// Who makes trajectories.
struct Networks<B: Backend> {
    teacher: Box<dyn Teacher<B>>,
    /// Codebook (K, D).
    codebook: B::Tensor,
}

impl<B: Backend> Networks<B> {
    fn load(backend: &B, bundle: &Bundle<'_>) -> Result<Self> {
        let codebook = bundle.tokenizer(backend)?.codebook()?;
        let teacher = bundle.teacher(backend)?;
        Ok(Self { teacher, codebook })
    }
}

/// Records the speed, if any samples were made.
fn report<B: Backend>(context: &Context<'_, B>, written: &WrittenShards) {
    if written.samples == 0 {
        return;
    }
    let (host, count) = (context.host, written.samples);
    let rate = count as f64 / written.seconds;
    host.metric("trajectories/samples_per_second", written.share, rate);
    let message = format!("{count} trajectories, {rate:.0} per second");
    host.log(LogLevel::Info, &message);
}
