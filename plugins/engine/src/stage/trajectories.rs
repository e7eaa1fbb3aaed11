//! `trajectories`: the noise -> tokens dataset, by AR flow matching with a teacher (arXiv 2412.17153, section 3.2).
//!
//! Sample i has class i mod classes, or caption i mod captions, and the noise of (seed, i), so that shards may be made in any
//! order, anywhere, with any batch size.

use std::ops::Range;
use std::path::{Path, PathBuf};

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
use retort_checkpoint::pieces::{MANIFEST, Shard};
use retort_checkpoint::trajectories::{FORMAT, Manifest};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, FlowSolver};
use crate::bundle::Bundle;
use crate::captions::{self, Subjects};
use crate::context::Context;
use crate::dataset::{open_shard, write_shard};
use crate::error::{Error, Result};
use crate::files::{link, resolve, write_json};
use crate::flow;
use crate::random;
use crate::sampler::{Choice, Distribution, autoregressive};
use crate::stage::condition::{
    ConditionOptions, Conditioning, Features, Given, Labels, Texts, same_noise,
};
use crate::stage::shards::{self, Division, Part, batches, hashed};
use crate::stage::{Stage, room};

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
    /// Folders of parts made elsewhere with the same teacher, seed and options (their manifest.json and shards): what they
    /// hold is taken over, the rest is made here.
    #[serde(default)]
    pub parts: Vec<Part>,
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
    #[serde(default = "solver_steps")]
    #[schemars(range(min = 1, max = 10000))]
    pub solver_steps: usize,
    /// Noise (count, L, D) from a file instead of the seed.
    #[serde(default)]
    pub noise: Option<Given>,
    /// Classes of the samples: `balanced` (the default), `drawn`, a list of numbers or names, a tensor of a file, or
    /// `{images: STAGE}`, in the proportions of real images. For a model of classes.
    #[serde(default)]
    pub labels: Option<Labels>,
    /// Captions of the samples, a text, a list of texts or the lines of a file: sample i has caption i mod their number. For a
    /// model of captions.
    #[serde(default)]
    pub caption: Option<Texts>,
    /// Folder of the flan-t5 that makes features of captions: config.json, tokenizer.json and its weights.
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
/// Steps of the flow map's solver unless a recipe says otherwise.
pub(crate) fn solver_steps() -> usize {
    flow::STEPS
}

impl Options {
    fn division(&self) -> Division {
        Division {
            count: self.count,
            range: self.range,
            size: self.shard_size,
        }
    }

    /// What the parts hold.
    fn parts(
        &self,
        manifest: &Manifest,
        subjects: &Subjects,
        base: &Path,
    ) -> Result<Vec<(PathBuf, Vec<Shard>)>> {
        let part = |Part(part): &Part| {
            let dir = resolve(base, part);
            let shards = manifest.of_part(&dir)?;
            let features = dir.join(captions::FILE);
            if let Subjects::Captions(own) = subjects
                && !own.are_in(&features)?
            {
                let message = "these are not the features of this stage's captions; give all parts the same `features`";
                return Err(Error::data(features, message));
            }
            Ok((dir, shards))
        };
        self.parts.iter().map(part).collect()
    }

    fn wish(&self) -> ConditionOptions<'_> {
        ConditionOptions {
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
    const REVISION: u32 = 3;
    const SUMMARY: &'static str = "build the noise -> tokens dataset with a teacher's flow map";
    const DIVISIBLE: bool = true;

    fn check(o: &Options, base: &Path) -> Result<()> {
        o.division().check()?;
        o.wish().check(base)
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let (host, backend, seed) = (context.host, context.backend, context.job.seed);
        let input = context.input(&o.teacher)?;
        let bundle = Bundle::open(&input.path)?;
        let network = bundle.network()?;
        let shape = network.token_shape();
        room::check(
            context,
            "/batch",
            o.division().at_once(o.batch),
            room::generating(network, &o.distribution, &context.job.dtype),
        )?;
        // Before the networks are loaded: a text encoder may need the memory.
        let Conditioning {
            labels, subjects, ..
        } = o
            .wish()
            .resolve(context, (&shape.condition, &bundle.config.classes), o.count)?;
        let solver = FlowSolver {
            steps: o.solver_steps,
        };
        let base = &context.job.base_dir;
        let (l, d) = (shape.count(), shape.dim);
        let given = match &o.noise {
            Some(given) => Some(given.rows(base, &[o.count as usize, l, d])?),
            None => None,
        };
        let noise_of = |i: Range<u64>| match &given {
            Some(given) => given.read(i),
            None => Ok(random::noises(seed, i, l, d)),
        };

        let mut manifest = Manifest {
            format: FORMAT,
            seed,
            count: o.count,
            steps: shape.steps.clone(),
            vocabulary: shape.vocabulary,
            dim: d,
            condition: shape.condition,
            distribution: json!(o.distribution),
            solver_steps: o.solver_steps,
            teacher: input.hash.clone(),
            shards: Vec::new(),
        };
        let work = context.work_dir()?;
        let division = o.division();
        let shards = division.shards(o.parts(&manifest, &subjects, base)?)?;
        let labels_of = |shard: &Shard| &labels[shard.start as usize..shard.end as usize];
        // Whether a file holds the samples that this stage would make.
        let check = |path: &Path, shard: &Shard| -> Result<()> {
            let (stored, found) = open_shard(&manifest, path, shard)?;
            let other = if found != labels_of(shard) {
                "labels"
            } else if !same_noise(given.as_ref(), &stored, shard, o.batch)? {
                "noise"
            } else {
                return Ok(());
            };
            let message = format!("these samples were made with other {other}");
            Err(Error::data(path, message))
        };
        // Loaded once there is something to make.
        let mut networks = None;
        let made = shards::make(context, &shards, "samples", check, |path, shard, line| {
            let (teacher, codebook) = match &mut networks {
                Some(loaded) => loaded,
                none => {
                    let codebook = bundle.tokenizer(backend)?.codebook()?;
                    none.insert((bundle.teacher(backend)?, codebook))
                }
            };
            let mut tokens: Vec<u32> = Vec::with_capacity((shard.end - shard.start) as usize * l);
            for batch in batches(shard.start..shard.end, o.batch) {
                line.go_on()?;
                let classes = &labels[batch.start as usize..batch.end as usize];
                let first = batch.start;
                let noise = backend.floats(&noise_of(batch)?, &[classes.len(), l, d])?;
                let mut choice = Choice::Flow {
                    noise: &noise,
                    codebook,
                    solver,
                };
                let ids = autoregressive(
                    &**teacher,
                    &subjects.conditions(backend, classes)?,
                    &o.distribution,
                    &mut choice,
                    None,
                    shape.steps.len(),
                )
                .map_err(|e| e.of_samples(first))?;
                tokens.extend(B::to_indices(&ids)?);
                line.made(classes.len() as u64);
            }
            let noise = match &given {
                Some(given) => Some(given.read(shard.start..shard.end)?),
                None => None,
            };
            let noise = noise.as_deref().map(|noise| (noise, d));
            write_shard(path, labels_of(shard), &tokens, noise)
        })?;
        if made.samples > 0 {
            let rate = made.samples as f64 / made.seconds;
            host.metric("trajectories/samples_per_second", made.share, rate);
            let count = made.samples;
            let message = format!("{count} trajectories, {rate:.0} per second");
            host.log(LogLevel::Info, &message);
        }
        if context.job.part.is_some() {
            return Ok(StageResult::of_part());
        }
        manifest.shards = hashed(work, shards)?;
        let samples = division.samples();
        context.finish(
            "trajectories",
            ArtifactMeta::default(),
            json!({ "count": samples.end - samples.start }),
            |dir| {
                let captions = matches!(subjects, Subjects::Captions(_)).then_some(captions::FILE);
                let shards = manifest.shards.iter().map(|shard| shard.file.as_str());
                for file in shards.chain(captions) {
                    link(&work.join(file), &dir.join(file))?;
                }
                write_json(&dir.join(MANIFEST), &manifest)
            },
        )
    }
}
