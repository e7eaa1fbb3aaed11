//! `trajectories`: the noise -> tokens dataset, by AR flow matching with a teacher (arXiv 2412.17153, section 3.2).
//!
//! Sample i has class i mod classes, or caption i mod captions, and the noise of (seed, i), so that shards may be made in any order, anywhere, with
//! any batch size. A finished shard stays in the work directory: an interruption loses at most the open one.

use std::path::Path;
use std::time::Instant;

use retort_abi::{ArtifactMeta, Cancel, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, FlowSolver};
use crate::bundle::Bundle;
use crate::captions::{self, Subjects};
use crate::dataset::{FORMAT, MANIFEST, Manifest, Shard, read_shard, write_shard};
use crate::error::{Error, Result};
use crate::random;
use crate::sampler::{Choice, Distribution, autoregressive};
use crate::stage::condition::{Features, Given, Labels, Made, Texts, Wish};
use crate::stage::{Context, Stage, link, write_json};
use crate::train::replace;

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
    /// Steps of the fourth-order Runge-Kutta solver of the flow map, four evaluations each.
    #[serde(default = "solver_steps")]
    #[schemars(range(min = 1, max = 10000))]
    pub solver_steps: usize,
    /// Noise (count, L, D) from a file instead of the seed.
    #[serde(default)]
    pub noise: Option<Given>,
    /// Classes of the samples: `balanced` (the default), a list, or a tensor of a file. For a model of classes.
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
    16
}

impl Options {
    fn wish(&self) -> Wish<'_> {
        Wish {
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
    const REVISION: u32 = 1;
    const SUMMARY: &'static str = "build the noise -> tokens dataset with a teacher's flow map";

    fn check(o: &Options, base: &Path) -> Result<()> {
        o.wish().check(base)
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let (host, backend, seed) = (context.host, context.backend, context.job.seed);
        let input = context.input(&o.teacher)?;
        let bundle = Bundle::open(&input.path)?;
        let shape = bundle.network()?.tokens();
        // Before the networks are loaded: a text encoder may need the memory.
        let Made {
            labels, subjects, ..
        } = o.wish().resolve(context, &shape.condition, o.count)?;
        let teacher = bundle.teacher(backend)?;
        let codebook = bundle.tokenizer(backend)?.codebook()?;
        let solver = FlowSolver {
            steps: o.solver_steps,
        };
        let base = &context.job.base_dir;
        let (l, d) = (shape.tokens(), shape.dim);
        let given = o
            .noise
            .as_ref()
            .map(|g| g.floats(base, &[o.count as usize, l, d]))
            .transpose()?;
        let noise_of = |i: u64| match &given {
            Some(all) => all[i as usize * l * d..(i as usize + 1) * l * d].to_vec(),
            None => random::noise(seed, i, l, d),
        };

        let work = context.work_dir()?;
        let shards: Vec<Shard> = (0..o.count.div_ceil(o.shard_size))
            .map(|i| Shard {
                file: format!("shard-{i:05}.safetensors"),
                start: i * o.shard_size,
                end: ((i + 1) * o.shard_size).min(o.count),
            })
            .collect();
        let (mut done, mut made, clock) = (0, 0, Instant::now());
        for shard in &shards {
            let path = work.join(&shard.file);
            let size = shard.end - shard.start;
            if read_shard(&path).is_ok_and(|found| found.labels.len() as u64 == size) {
                done += size;
                host.progress(done, o.count, "samples");
                continue;
            }
            let mut tokens: Vec<u32> = Vec::with_capacity(size as usize * l);
            let mut start = shard.start;
            while start < shard.end {
                if host.cancelled() != Cancel::Run {
                    return Err(Error::Cancelled);
                }
                let end = (start + o.batch as u64).min(shard.end);
                let n = (end - start) as usize;
                let noise: Vec<f32> = (start..end).flat_map(noise_of).collect();
                let noise = backend.floats(&noise, &[n, l, d])?;
                let mut choice = Choice::Flow {
                    noise: &noise,
                    codebook: &codebook,
                    solver,
                };
                let classes = &labels[start as usize..end as usize];
                let ids = autoregressive(
                    &*teacher,
                    &subjects.conditions(backend, classes)?,
                    &o.distribution,
                    &mut choice,
                    None,
                    shape.steps.len(),
                )?;
                tokens.extend(B::to_indices(&ids)?);
                (start, done, made) = (end, done + n as u64, made + n as u64);
                host.progress(done, o.count, "samples");
            }
            let classes = &labels[shard.start as usize..shard.end as usize];
            let noise = given.as_ref().map(|all| {
                (
                    &all[shard.start as usize * l * d..shard.end as usize * l * d],
                    d,
                )
            });
            replace(&path, |partial| {
                write_shard(partial, classes, &tokens, noise)
            })?;
        }
        if made > 0 {
            let rate = made as f64 / clock.elapsed().as_secs_f64();
            host.metric("trajectories/samples_per_second", done, rate);
            host.log(
                LogLevel::Info,
                &format!("{made} trajectories, {rate:.0} per second"),
            );
        }
        let manifest = Manifest {
            format: FORMAT,
            seed,
            count: o.count,
            steps: shape.steps.clone(),
            vocabulary: shape.vocabulary,
            dim: d,
            condition: shape.condition,
            distribution: o.distribution,
            solver_steps: o.solver_steps,
            teacher: input.hash.clone(),
            shards,
        };
        context.finish(
            "trajectories",
            ArtifactMeta::default(),
            json!({ "count": o.count }),
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
