//! `trajectories`: the noise -> tokens dataset, by AR flow matching with a teacher (arXiv 2412.17153, section 3.2).
//!
//! Sample i has class i mod classes, or caption i mod captions, and the noise of (seed, i), so that shards may be made in any order, anywhere, with
//! any batch size. A finished shard stays in the work directory: an interruption loses at most the open one. A part of a
//! divided stage makes every so many-th shard there, and the whole takes over all of them.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use retort_abi::{ArtifactMeta, Cancel, LogLevel, StageResult};
use retort_checkpoint::trajectories::{FORMAT, MANIFEST, Manifest, Shard, hash, joined};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, FlowSolver};
use crate::bundle::Bundle;
use crate::captions::{self, Subjects};
use crate::dataset::{open_shard, write_shard};
use crate::error::{Error, Result};
use crate::flow;
use crate::random;
use crate::sampler::{Choice, Distribution, autoregressive};
use crate::stage::condition::{Features, Given, Labels, Made, Texts, Wish};
use crate::stage::{Context, Stage, link, resolve, write_json};
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

/// A folder with a part of a dataset.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Part(#[schemars(extend("x-retort-file" = "dir"))] String);

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
    /// The shards that cover some samples, in order, each with the file that holds it already, if a part does.
    fn shards(
        &self,
        manifest: &Manifest,
        subjects: &Subjects,
        base: &Path,
        range: Range<u64>,
    ) -> Result<Vec<(Shard, Option<PathBuf>)>> {
        let mut parts = Vec::new();
        for Part(part) in &self.parts {
            let dir = resolve(base, part);
            let shards = manifest.of_part(&dir)?;
            let features = dir.join(captions::FILE);
            if let Subjects::Captions(own) = subjects
                && !own.are_in(&features)?
            {
                let message = "these are not the features of this stage's captions; give all parts the same `features`";
                return Err(Error::data(features, message));
            }
            parts.push((dir, shards));
        }
        let (mut shards, mut next) = (Vec::new(), range.start);
        let gap = |samples| cut(samples, self.shard_size).map(|shard| (shard, None));
        for (dir, found) in joined(parts)? {
            let from = dir.join(&found.file);
            if found.start < range.start || found.end > range.end {
                let message = format!(
                    "{}: samples {}..{} lie beyond {}..{}",
                    from.display(),
                    found.start,
                    found.end,
                    range.start,
                    range.end
                );
                return Err(Error::option("/parts", message));
            }
            shards.extend(gap(next..found.start));
            next = found.end;
            let hash = found.hash;
            shards.push((
                Shard {
                    hash,
                    ..Shard::of(found.start..found.end)
                },
                Some(from),
            ));
        }
        shards.extend(gap(next..range.end));
        Ok(shards)
    }

    fn wish(&self) -> Wish<'_> {
        Wish {
            labels: self.labels.as_ref(),
            caption: self.caption.as_ref(),
            text_encoder: self.text_encoder.as_deref(),
            features: self.features.as_ref(),
        }
    }
}

/// Samples cut at the multiples of a size.
fn cut(samples: Range<u64>, size: u64) -> impl Iterator<Item = Shard> {
    let Range { start, end } = samples;
    (start / size..end.div_ceil(size))
        .map(move |i| Shard::of((i * size).max(start)..((i + 1) * size).min(end)))
        .filter(|shard| shard.start < shard.end)
}

/// The stage.
pub struct Trajectories;

impl<B: Backend> Stage<B> for Trajectories {
    type Options = Options;
    const KIND: &'static str = "trajectories";
    const OUTPUT: &'static str = "trajectories";
    const REVISION: u32 = 2;
    const SUMMARY: &'static str = "build the noise -> tokens dataset with a teacher's flow map";
    const DIVISIBLE: bool = true;

    fn check(o: &Options, base: &Path) -> Result<()> {
        if let Some([start, end]) = o.range
            && (start >= end || end > o.count)
        {
            let message = format!(
                "range [{start}, {end}]: expected [start, end] with start < end, and end at most {}, the count",
                o.count
            );
            return Err(Error::option("/range", message));
        }
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
        let noise_of = |i: Range<u64>| match &given {
            Some(all) => all[i.start as usize * l * d..i.end as usize * l * d].to_vec(),
            None => random::noises(seed, i, l, d),
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
        let [first, last] = o.range.unwrap_or([0, o.count]);
        let shards = o.shards(&manifest, &subjects, base, first..last)?;
        let given_of = |shard: &Shard| {
            let within = |x: u64| x as usize * l * d;
            given
                .as_ref()
                .map(|all| &all[within(shard.start)..within(shard.end)])
        };
        let labels_of = |shard: &Shard| &labels[shard.start as usize..shard.end as usize];
        // Whether a file holds the samples that this stage would make.
        let check = |path: &Path, shard: &Shard| -> Result<()> {
            let (stored, found) = open_shard(&manifest, path, shard)?;
            let noise = stored.shape("noise").map(|_| stored.floats("noise"));
            let other = if found != labels_of(shard) {
                "labels"
            } else if noise.transpose()?.as_deref() != given_of(shard) {
                "noise"
            } else {
                return Ok(());
            };
            let message = format!("these samples were made with other {other}");
            Err(Error::data(path, message))
        };
        // Loaded once there is something to make.
        let mut networks = None;
        let own: Vec<&(Shard, Option<PathBuf>)> = match context.job.part {
            None => shards.iter().collect(),
            Some(part) => {
                let open = shards.iter().filter(|(_, from)| from.is_none());
                let numbered = open.enumerate();
                numbered
                    .filter_map(|(number, shard)| part.takes(number).then_some(shard))
                    .collect()
            }
        };
        let total = own.iter().map(|(shard, _)| shard.end - shard.start).sum();
        let (mut done, mut made, clock) = (0, 0, Instant::now());
        if context.job.part.is_some() {
            // What all parts have to do is known once each has said its share.
            host.progress(done, total, "samples");
        }
        for (shard, from) in own {
            let path = work.join(&shard.file);
            let size = shard.end - shard.start;
            if let Some(from) = from {
                check(from, shard)?;
                replace(&path, |partial| {
                    std::fs::copy(from, partial)
                        .map(drop)
                        .map_err(Error::io(from))
                })?;
            }
            if from.is_some() || check(&path, shard).is_ok() {
                done += size;
                host.progress(done, total, "samples");
                continue;
            }
            let (teacher, codebook) = match &mut networks {
                Some(loaded) => loaded,
                none => {
                    let codebook = bundle.tokenizer(backend)?.codebook()?;
                    none.insert((bundle.teacher(backend)?, codebook))
                }
            };
            let mut tokens: Vec<u32> = Vec::with_capacity(size as usize * l);
            let mut start = shard.start;
            while start < shard.end {
                if host.cancelled() != Cancel::Run {
                    return Err(Error::Cancelled);
                }
                let end = (start + o.batch as u64).min(shard.end);
                let n = (end - start) as usize;
                let noise = backend.floats(&noise_of(start..end), &[n, l, d])?;
                let mut choice = Choice::Flow {
                    noise: &noise,
                    codebook,
                    solver,
                };
                let classes = &labels[start as usize..end as usize];
                let ids = autoregressive(
                    &**teacher,
                    &subjects.conditions(backend, classes)?,
                    &o.distribution,
                    &mut choice,
                    None,
                    shape.steps.len(),
                )
                .map_err(|e| e.of_samples(start))?;
                tokens.extend(B::to_indices(&ids)?);
                (start, done, made) = (end, done + n as u64, made + n as u64);
                host.progress(done, total, "samples");
            }
            let noise = given_of(shard).map(|noise| (noise, d));
            replace(&path, |partial| {
                write_shard(partial, labels_of(shard), &tokens, noise)
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
        if context.job.part.is_some() {
            return Ok(StageResult::of_part());
        }
        manifest.shards = shards.into_iter().map(|(shard, _)| shard).collect();
        for shard in &mut manifest.shards {
            shard.hash = Some(hash(&work.join(&shard.file))?);
        }
        context.finish(
            "trajectories",
            ArtifactMeta::default(),
            json!({ "count": last - first }),
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
