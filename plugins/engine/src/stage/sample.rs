//! `sample`: images from a teacher, a student, both together, or the independent baseline.
//!
//! Out: a set of samples (`samples.rs`), `grid.png`, and on request a PNG of each image and `samples.npz`. For captions given
//! as text, labels are indices into `captions.json`. Samples are made in shards (`shards.rs`), a batch at a time: memory
//! holds the networks and one batch, however many samples there are.

pub mod drawer;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use retort_abi::{ArtifactMeta, LogLevel, SourceStage, StageResult};
use retort_checkpoint::sample_shards::{MANIFEST, Shard, hash};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::bundle::Bundle;
use crate::captions::{self, ConditioningSource};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::files::{link, resolve, write_json};
use crate::model::{TokenShape, Tokenizer};
use crate::picture::{self, Npz, Pixels};
use crate::sampler;
use crate::samples::{FORMAT, ImagesKept, KeptTensors, Manifest, Samples, ShardWriter, by_class};
use crate::size::Size;
use crate::stage::conditioning::{
    CaptionText, Conditioning, ConditioningOptions, Features, Labels,
};
use crate::stage::noise::{Noise, TensorFile};
use crate::stage::shards::{
    self, PartDir, PlannedShard, SampleRange, ShardProgress, WrittenShards, batches, hashed,
};
use crate::stage::sources::Sources;
use crate::stage::{Stage, batch_memory};
use drawer::{Drawer, Sampler, SamplerContext, drawer};

// `trajectories` has nine of these options too (`range` to `batch`, `noise` to `features`). They are duplicated because serde
// ignores `deny_unknown_fields` with a flattened struct: misspelt options would no longer be refused, and errors inside would
// lose their position. Help texts and defaults differ too.
/// Options of `sample`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Who samples, and how.
    pub sampler: Sampler,
    /// Number of images.
    #[schemars(range(min = 1))]
    pub count: u64,
    /// Images start..end alone, as [start, end], while other machines make others: the output is a part of the set, and a
    /// stage whose `parts` name all parts makes the whole of them.
    #[serde(default)]
    pub range: Option<[u64; 2]>,
    /// Folders of parts made elsewhere with the same networks, seed and options (their manifest.json and shards): these
    /// are reused, the rest is made here.
    #[serde(default)]
    pub parts: Vec<PartDir>,
    /// Images per shard file: the most an interruption loses.
    #[serde(default = "shard_size")]
    #[schemars(range(min = 1))]
    pub shard_size: u64,
    /// Images sampled at a time.
    #[serde(default = "batch")]
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// How images are stored: bytes, f32, or none, which also skips decoding.
    #[serde(default)]
    pub images: ImagesKept,
    /// Side, or [height, width], to which decoded images are brought before they are kept, bicubic as torch's `interpolate`
    /// (LlamaGen's images of 384 x 384 are measured at 256); as they are decoded, if left out.
    #[serde(default)]
    pub resize: Option<Size>,
    /// Whether latents are kept, (n, L, D) in f32.
    #[serde(default)]
    pub latents: bool,
    /// Whether tokens are kept, (n, L). For a sampler that chooses codes.
    #[serde(default)]
    pub tokens: bool,
    /// Noise (count, L, D) from a file instead of the seed.
    #[serde(default)]
    pub noise: Option<TensorFile>,
    /// Classes of the images: `balanced` (the default), `drawn`, a list of numbers or names, a tensor of a file, or
    /// `{images: STAGE}`, in the proportions of real images. For a model of classes.
    #[serde(default)]
    pub labels: Option<Labels>,
    /// Captions of the images, a text, a list of texts or the lines of a file: image i has caption i mod their number. For a
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
    /// Images per class in `grid.png`.
    #[serde(default = "columns")]
    #[schemars(range(min = 1))]
    pub grid_columns: usize,
    /// Whether every image is also written as a PNG file of its own.
    #[serde(default)]
    pub png: bool,
    /// Whether the images are also written as `samples.npz` (uint8, n x H x W x 3), as evaluation suites read it.
    #[serde(default)]
    pub npz: bool,
}

fn shard_size() -> u64 {
    1000
}
fn batch() -> usize {
    500
}
fn columns() -> usize {
    10
}

impl Options {
    fn conditioning_options(&self) -> ConditioningOptions<'_> {
        ConditioningOptions {
            labels: self.labels.as_ref(),
            caption: self.caption.as_ref(),
            text_encoder: self.text_encoder.as_deref(),
            features: self.features.as_ref(),
        }
    }

    fn sample_range(&self) -> SampleRange {
        SampleRange {
            count: self.count,
            range: self.range,
            size: self.shard_size,
        }
    }

    fn kept(&self) -> KeptTensors {
        KeptTensors {
            images: self.images,
            latents: self.latents,
            tokens: self.tokens,
            noise: self.noise.is_some(),
        }
    }
}

/// The stage.
pub struct Sample;

impl<B: Backend> Stage<B> for Sample {
    type Options = Options;
    const KIND: &'static str = "sample";
    const OUTPUT: &'static str = "samples";
    const REVISION: u32 = 6;
    const SUMMARY: &'static str =
        "sample images from a teacher, a student, both, or the independent baseline";
    const DIVISIBLE: bool = true;

    fn check(o: &Options, base: &Path) -> Result<()> {
        o.sample_range().check()?;
        o.conditioning_options().check(base, o.count)?;
        if o.tokens && !o.sampler.chooses() {
            let message = "this sampler makes vectors, not codes: there are no tokens to keep; keep `latents`";
            return Err(Error::option("/tokens", message));
        }
        if o.images == ImagesKept::None {
            let resize = o.resize.is_some();
            for (wanted, pointer) in [(o.png, "/png"), (o.npz, "/npz"), (resize, "/resize")] {
                if wanted {
                    return Err(Error::option(pointer, "`images: none` keeps no images"));
                }
            }
            if !o.latents && !o.tokens {
                let message = "nothing is kept: with `images: none` keep `latents` or `tokens`";
                return Err(Error::option("/images", message));
            }
        }
        o.sampler.check()
    }

    fn check_sources(o: &Options, stages: &BTreeMap<String, SourceStage>) -> Result<()> {
        let sources = Sources::of(stages);
        match sources.steps(o.sampler.source()) {
            Some(steps) => o.sampler.check_steps(steps),
            None => Ok(()),
        }
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let inputs = Inputs::open(context, o)?;
        let planned = inputs.shards(&context.job.base_dir, o)?;
        let (written, times) = inputs.make(context, o, &planned)?;
        let summary = report(context, o, &inputs.shape, &written, &times);
        match context.job.part {
            Some(_) => Ok(StageResult::of_part()),
            None => inputs.publish(context, o, planned, summary),
        }
    }
}

/// The inputs of sampling.
struct Inputs<'a> {
    /// The networks, except an assisting teacher.
    bundle: Bundle<'a>,
    shape: TokenShape,
    conditioning: Conditioning,
    noise: Noise,
    /// The set's manifest, without its shards.
    manifest: Manifest,
}

impl<'a> Inputs<'a> {
    fn open<B: Backend>(context: &Context<'a, B>, o: &Options) -> Result<Self> {
        let bundle = Bundle::open(context.input_dir(o.sampler.source())?)?;
        let network = bundle.network()?;
        let shape = network.token_shape();
        let decoded = (o.images != ImagesKept::None).then_some(&bundle.config.tokenizer);
        let each = batch_memory::sampling(
            o.sampler.has_student(),
            o.sampler.distribution(),
            network,
            decoded,
            &context.job.dtype,
        );
        batch_memory::check(context, "/batch", o.sample_range().at_once(o.batch), each)?;
        // Before the networks are loaded: a text encoder may need the memory.
        let model = (&shape.condition, bundle.config.classes.as_slice());
        let conditioning = o.conditioning_options().resolve(context, model, o.count)?;
        let noise = Noise::open(context.job, o.noise.as_ref(), o.count, &shape)?;
        let [channels, decoded @ ..] = bundle.config.tokenizer.image();
        let [height, width] = o.resize.map_or(decoded, |size| size.sides().into());
        let manifest = Manifest {
            format: FORMAT,
            count: o.count,
            seed: context.job.seed,
            sampler: described(context)?,
            captions: match &conditioning.source {
                ConditioningSource::Classes(_) => None,
                ConditioningSource::Captions(_) => {
                    Some(hash(&context.work_dir()?.join(captions::FILE))?)
                }
            },
            passes: Some(o.sampler.passes(&shape)),
            image: [channels, height, width],
            decoded: Some(decoded).filter(|sides| *sides != [height, width]),
            tokens: shape.count(),
            vocabulary: shape.vocabulary,
            dim: shape.dim,
            labels: conditioning.source.len(),
            kept: o.kept(),
            shards: Vec::new(),
        };
        Ok(Self {
            bundle,
            shape,
            conditioning,
            noise,
            manifest,
        })
    }

    /// The shards of the set, including those that parts already contain.
    fn shards(&self, base: &Path, o: &Options) -> Result<Vec<PlannedShard>> {
        let mut parts: Vec<(PathBuf, Vec<Shard>)> = Vec::new();
        for PartDir(part) in &o.parts {
            let dir = resolve(base, part);
            let shards = self.manifest.of_part(&dir)?;
            parts.push((dir, shards));
        }
        o.sample_range().shards(parts)
    }

    /// Class of some samples, or number of their captions.
    fn labels_of(&self, samples: Range<u64>) -> Vec<u32> {
        self.conditioning.labels.of(samples)
    }

    /// Makes this process's share of the shards. Also returns how long it took.
    fn make<B: Backend>(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        planned: &[PlannedShard],
    ) -> Result<(WrittenShards, SamplingTimes)> {
        // Whether a file contains the samples that this stage would make.
        let check = |path: &Path, shard: &Shard| {
            let (stored, found) = self.manifest.open_shard(path, shard)?;
            let labels = self.labels_of(shard.start..shard.end);
            self.noise
                .check(path, shard, (&stored, &found), &labels, o.batch)
        };
        // Loaded when the first shard has to be made.
        let mut maker = None;
        let written = shards::make(
            context,
            planned,
            "images",
            check,
            |path, shard, progress| {
                let maker = match &mut maker {
                    Some(loaded) => loaded,
                    none => none.insert(ShardMaker::load(context, o, self)?),
                };
                maker.shard(path, shard, progress)
            },
        )?;
        let times = maker.map(|maker| maker.times).unwrap_or_default();
        Ok((written, times))
    }

    /// Writes the artifact: manifest, shards, captions and pictures.
    fn publish<B: Backend>(
        self,
        context: &Context<'_, B>,
        o: &Options,
        planned: Vec<PlannedShard>,
        summary: Value,
    ) -> Result<StageResult> {
        let work = context.work_dir()?;
        let shards = hashed(work, planned)?;
        let texts = &self.conditioning.texts;
        let columns = match texts.len() {
            0 => o.grid_columns,
            // With few images per caption, show all of them.
            n => o.grid_columns.min((o.count as usize / n).max(1)),
        };
        // The title of a row of the picture: its caption, or the name of its class.
        let names = match texts.is_empty() {
            true => &self.bundle.config.classes,
            false => texts,
        };
        let meta = ArtifactMeta {
            preview: (o.images != ImagesKept::None).then(|| "grid.png".into()),
            caption: shown(
                names,
                || self.labels_of(o.sample_range().samples()),
                columns,
            ),
            ..Default::default()
        };
        let manifest = Manifest {
            shards,
            ..self.manifest
        };
        context.finish("samples", meta, summary, |dir| {
            for shard in &manifest.shards {
                link(&work.join(&shard.file), &dir.join(&shard.file))?;
            }
            write_json(&dir.join(MANIFEST), &manifest)?;
            if !texts.is_empty() {
                write_json(&dir.join(CAPTIONS), texts)?;
            }
            match o.images {
                ImagesKept::None => Ok(()),
                _ => write_pictures(context, dir, columns, o),
            }
        })
    }
}

/// Seconds of sampling and decoding.
#[derive(Default)]
struct SamplingTimes {
    sampling: f64,
    decoding: f64,
}

/// Makes shards; its networks are loaded.
struct ShardMaker<'a, 'c, B: Backend> {
    backend: &'a B,
    options: &'a Options,
    inputs: &'a Inputs<'c>,
    tokenizer: Box<dyn Tokenizer<B>>,
    draw: Drawer<'a, B>,
    times: SamplingTimes,
}

impl<'a, 'c, B: Backend> ShardMaker<'a, 'c, B> {
    fn load(
        context: &'a Context<'_, B>,
        options: &'a Options,
        inputs: &'a Inputs<'c>,
    ) -> Result<Self> {
        let tokenizer = inputs.bundle.tokenizer(context.backend)?;
        let setting = SamplerContext {
            backend: context.backend,
            seed: context.job.seed,
            shape: &inputs.shape,
            codebook: tokenizer.codebook()?,
            conditioning: &inputs.conditioning.source,
        };
        let draw = drawer(context, &options.sampler, &inputs.bundle, setting)?;
        Ok(Self {
            backend: context.backend,
            options,
            inputs,
            tokenizer,
            draw,
            times: SamplingTimes::default(),
        })
    }

    /// Writes a shard, batch by batch.
    fn shard(
        &mut self,
        path: &Path,
        shard: &Shard,
        progress: &mut ShardProgress<'_, '_, B>,
    ) -> Result<()> {
        let (o, inputs) = (self.options, self.inputs);
        let (l, d) = (inputs.shape.count(), inputs.shape.dim);
        let [_, height, width] = inputs.manifest.image;
        let count = (shard.end - shard.start) as usize;
        let writer = ShardWriter::create(path, &inputs.manifest, count)?;
        for batch in batches(shard.start..shard.end, o.batch) {
            progress.go_on()?;
            let (start, row) = (batch.start, (batch.start - shard.start) as usize);
            let labels = inputs.labels_of(batch.clone());
            let noise = inputs.noise.read(batch)?;
            let clock = Instant::now();
            let eps = self.backend.floats(&noise, &[labels.len(), l, d])?;
            let drawn = (self.draw)(start, &labels, &eps).map_err(|e| e.of_samples(start))?;
            let latents = B::to_floats(&drawn.latents)?;
            self.times.sampling += clock.elapsed().as_secs_f64();
            finite("latent", &latents, start, l * d)?;
            writer.indices("labels", row, &labels)?;
            writer.floats("latents", row, &latents)?;
            if let (true, Some(ids)) = (o.tokens, &drawn.tokens) {
                writer.indices("tokens", row, &B::to_indices(ids)?)?;
            }
            if inputs.noise.is_given() {
                writer.floats("noise", row, &noise)?;
            }
            if o.images != ImagesKept::None {
                let clock = Instant::now();
                let images = sampler::decode(&*self.tokenizer, &drawn.latents, [height, width])?;
                self.times.decoding += clock.elapsed().as_secs_f64();
                finite("pixel", &images, start, images.len() / labels.len())?;
                writer.floats("images", row, &images)?;
            }
            progress.made(labels.len() as u64);
        }
        Ok(())
    }
}

/// Records the sampling speed, if any samples were made. Returns the summary.
fn report<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    shape: &TokenShape,
    written: &WrittenShards,
    times: &SamplingTimes,
) -> Value {
    let (samples, passes) = (o.sample_range().samples(), o.sampler.passes(shape));
    let mut summary = json!({ "images": samples.end - samples.start, "passes": passes });
    if written.samples == 0 {
        return summary;
    }
    let (host, count, share) = (context.host, written.samples, written.share);
    let SamplingTimes { sampling, decoding } = times;
    let rate = count as f64 / sampling;
    host.metric("sample/images_per_second", share, rate);
    host.metric("sample/sampling_seconds", share, *sampling);
    host.metric("sample/decoding_seconds", share, *decoding);
    host.metric("sample/passes", share, passes as f64);
    let message = format!(
        "{count} images in {passes} passes a batch: sampling {sampling:.2} s ({rate:.0}/s), decoding {decoding:.2} s"
    );
    host.log(LogLevel::Info, &message);
    summary["images_per_second"] = json!(rate);
    summary
}

/// Writes pictures and files for other tools, with one block of images in memory at a time.
fn write_pictures<B: Backend>(
    context: &Context<'_, B>,
    dir: &Path,
    columns: usize,
    o: &Options,
) -> Result<()> {
    let samples = Samples::open_part(dir)?;
    let [c, h, w] = samples.manifest.image;
    let (picks, rows) = by_class(&samples.labels, columns);
    let mut tiles = Vec::with_capacity(picks.len() * c * h * w);
    for pick in picks {
        tiles.extend(samples.images(pick, 1)?);
    }
    picture::write_grid(
        &dir.join("grid.png"),
        &[Pixels::new(&tiles, c, h, w)?],
        rows,
    )?;
    if !o.png && !o.npz {
        return Ok(());
    }
    let folder = dir.join("png");
    if o.png {
        std::fs::create_dir(&folder).map_err(Error::io(&folder))?;
    }
    let mut archive = match o.npz {
        true => Some(Npz::create(
            &dir.join("samples.npz"),
            samples.len(),
            [h, w],
        )?),
        false => None,
    };
    for block in batches(0..samples.len() as u64, BLOCK) {
        context.go_on()?;
        let (first, end) = (block.start as usize, block.end as usize);
        let images = samples.images(first, end - first)?;
        let pixels = Pixels::new(&images, c, h, w)?;
        if o.png {
            let number = samples.samples.start + block.start;
            picture::write_pngs(&folder, pixels, &samples.labels[first..end], number)?;
        }
        if let Some(archive) = &mut archive {
            archive.add(pixels)?;
        }
    }
    archive.map_or(Ok(()), |archive| Ok(archive.finish()?))
}

/// Images per block when pictures are written.
const BLOCK: usize = 64;

/// Refuses non-finite values, naming the sample. A sample has `size` values.
fn finite(what: &str, values: &[f32], first: u64, size: usize) -> Result<()> {
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => {
            let sample = first + (at / size) as u64;
            let message = format!("sample {sample}: a {what} is {}", values[at]);
            Err(Error::Numerical(message))
        }
        None => Ok(()),
    }
}

/// The sampler's options, with the content hashes of the stages that it names.
fn described<B: Backend>(context: &Context<'_, B>) -> Result<Value> {
    let mut sampler = context.job.options["sampler"].clone();
    for name in ["teacher", "student", "trajectories"] {
        if let Some(stage) = sampler[name].as_str() {
            sampler[name] = json!(context.input(stage)?.hash);
        }
    }
    Ok(sampler)
}

/// The picture's caption: the captions of its rows, long ones cut, or the names of their classes. Only for these are the labels
/// of all samples computed.
fn shown(texts: &[String], labels: impl Fn() -> Vec<u32>, columns: usize) -> Option<String> {
    if texts.is_empty() {
        return None;
    }
    let labels = labels();
    let (picks, rows) = by_class(&labels, columns);
    // If no label has enough samples for a row, rows have no titles.
    let length = (picks.len() / rows).max(1);
    let mixed = |row: &[usize]| row.iter().any(|&i| labels[i] != labels[row[0]]);
    if picks.chunks(length).any(mixed) {
        return None;
    }
    let firsts = picks.iter().step_by(picks.len() / rows);
    let quoted: Vec<String> = firsts
        .map(|&i| {
            let text = texts[labels[i] as usize].trim();
            match text.char_indices().nth(SHOWN) {
                Some((end, _)) => format!("\u{201c}{}...\u{201d}", text[..end].trim_end()),
                None => format!("\u{201c}{text}\u{201d}"),
            }
        })
        .collect();
    Some(format!("from the top: {}", quoted.join(", ")))
}

/// Characters of a caption that are shown under a picture.
const SHOWN: usize = 60;

/// Name of the file with the captions, in the order of their numbers.
const CAPTIONS: &str = "captions.json";
