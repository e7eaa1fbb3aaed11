//! Rows of the table that are work of a stage: training steps of tokenizers, teachers and students, the reading of images, and
//! sampling with what follows. A backend runs the stage itself; PyTorch gets the same description (`tests/peers/stages.py`).

use std::collections::BTreeMap;
use std::path::Path;

use retort_abi::{Input, StageJob};
use retort_candle::Candle;
use retort_engine::bundle::{self, Bundle, Family, NetworkConfig, TokenizerConfig};
use retort_engine::error::{Error, Result};
use retort_engine::model::autoencoder::Shape;
use retort_engine::model::lpips::Lpips;
use retort_engine::model::{ConditioningShape, llamagen, vq};
use retort_engine::numpy;
use retort_engine::random::{Sequence, Stream};
use retort_engine::size::Sides;
use retort_engine::weights::{self, Loader, ParameterSource, Weights};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::loader;
use super::reference::{Drawn, Phase, Reference, draw, draw_tokenizer};
use super::stage_clock::{StageClock, run};
use super::work::{Cost, classifier, decoder, discriminator, encoder, step_bytes, vgg};

/// More steps than are ever measured: the stage is stopped when enough have been.
const STEPS: u64 = 1_000_000;
/// Decay of the moving average where a recipe has one.
const AVERAGE: f64 = 0.99;
/// Images in the training data of small networks.
const IMAGES: usize = 64;
/// Images that are sampled, decoded and measured.
pub(super) const SAMPLED: usize = 1000;
/// Features of a classifier.
pub(super) const FEATURES: usize = 64;

/// What a row does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Steps of a stage that trains.
    Step,
    /// Reading and resizing images.
    Load,
    /// Sampling, decoding, features.
    Sample,
}

/// A row.
pub struct StageRow {
    /// Its line in the table.
    pub title: String,
    /// Operations, and bytes that are read or written at least.
    pub work: (f64, f64),
    /// Images, where images per second are printed.
    pub images: Option<usize>,
    pub(super) task: Task,
    /// The stage's kind and options.
    kind: &'static str,
    options: Value,
    /// The networks, and the batch.
    pub(super) networks: Reference,
    /// Images of the training data.
    count: usize,
}

/// The files of a row, for all columns.
pub struct RowFiles {
    pub(super) dir: TempDir,
    /// The stage's job.
    pub(super) job: StageJob,
}

impl RowFiles {
    /// The job without a work directory: images stay in memory.
    pub(super) fn without_work(&self) -> StageJob {
        StageJob {
            work_dir: None,
            ..self.job.clone()
        }
    }

    /// The job with a work directory of its own, in a folder that lives as long as it is needed.
    pub(super) fn with_new_work(&self) -> Result<(StageJob, TempDir)> {
        let place = tempfile::tempdir_in(self.dir.path()).map_err(Error::io(self.dir.path()))?;
        let work = place.path().join("work");
        std::fs::create_dir(&work).map_err(Error::io(&work))?;
        let job = StageJob {
            work_dir: Some(work),
            ..self.job.clone()
        };
        Ok((job, place))
    }
}

impl StageRow {
    /// Its description for PyTorch.
    pub(super) fn description(&self, files: &RowFiles) -> Result<Value> {
        let network = serde_json::to_value(&self.networks.network);
        let tokenizer = serde_json::to_value(&self.networks.tokenizer);
        let lost = |e: serde_json::Error| Error::Internal(e.to_string());
        Ok(json!({
            "kind": self.kind,
            "options": self.options,
            "batch": self.networks.batch,
            "network": network.map_err(lost)?,
            "tokenizer": tokenizer.map_err(lost)?,
            "features": FEATURES,
            "count": SAMPLED,
            "folder": files.dir.path().join(loader::FOLDER),
            "side": loader::RESIZED,
        }))
    }

    /// Writes what the stage reads: images, networks with random weights, trajectories.
    pub(super) fn files(&self) -> Result<RowFiles> {
        let dir = tempfile::tempdir().map_err(Error::io(Path::new("a temporary directory")))?;
        let mut inputs: BTreeMap<String, Input> = BTreeMap::new();
        match self.kind {
            "images" => loader::write_jpegs(&dir.path().join(loader::FOLDER))?,
            "tokenizer" => {
                self.write_images(dir.path())?;
                if self.options.get("perceptual").is_some() {
                    write_lpips(dir.path())?;
                }
            }
            "pretrain" => {
                self.write_images(dir.path())?;
                let codes = folder(dir.path(), "codes")?;
                let weights = draw_tokenizer(&self.networks)?;
                bundle::write_tokenizer(&codes.path, &self.networks.tokenizer, &weights)?;
                inputs.insert("codes".into(), codes);
            }
            "distill" => {
                let (teacher, drawn) = self.write_networks(dir.path())?;
                write_network(dir.path(), &teacher, &self.networks.network, &drawn.teacher)?;
                inputs.insert("teacher".into(), teacher);
                let options = json!({ "teacher": "teacher", "count": 2 * self.networks.batch });
                let job = self.job(dir.path(), "trajectories", inputs.clone(), options);
                inputs.insert("trajectories".into(), make(dir.path(), &job)?);
            }
            _ => {
                let (student, drawn) = self.write_networks(dir.path())?;
                write_network(dir.path(), &student, &self.networks.network, &drawn.student)?;
                inputs.insert("student".into(), student);
            }
        }
        let job = self.job(dir.path(), self.kind, inputs, self.options.clone());
        std::fs::create_dir(dir.path().join("work")).map_err(Error::io(dir.path()))?;
        Ok(RowFiles { dir, job })
    }

    fn job(
        &self,
        dir: &Path,
        kind: &str,
        inputs: BTreeMap<String, Input>,
        options: Value,
    ) -> StageJob {
        StageJob {
            stage: kind.into(),
            kind: kind.into(),
            options,
            seed: 1,
            device: "cpu".into(),
            dtype: "f32".into(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            base_dir: dir.into(),
            work_dir: Some(dir.join("work")),
            inputs,
            sources: BTreeMap::new(),
            prepared: BTreeMap::new(),
            part: None,
        }
    }

    /// Random pixels, and classes in turn.
    fn write_images(&self, dir: &Path) -> Result<()> {
        let [channels, height, width] = self.networks.tokenizer.image();
        let classes = self.networks.network.classes().unwrap_or(1).min(self.count);
        let shape = [self.count, height, width, channels];
        let dims = if channels == 1 { 3 } else { 4 };
        let mut pixels = numpy::header("|u1", &shape[..dims]);
        let mut random = Sequence::new(1, Stream::Init, 0);
        pixels.extend((0..shape.iter().product::<usize>()).map(|_| random.below(256) as u8));
        let mut labels = numpy::header("|u1", &[self.count]);
        labels.extend((0..self.count).map(|image| (image % classes) as u8));
        for (name, bytes) in [("images.npy", pixels), ("labels.npy", labels)] {
            let path = dir.join(name);
            std::fs::write(&path, bytes).map_err(Error::io(&path))?;
        }
        Ok(())
    }

    /// A folder for a network with its tokenizer in it, and random weights.
    fn write_networks(&self, dir: &Path) -> Result<(Input, Drawn)> {
        let drawn = Drawn::new(&self.networks)?;
        let codes = folder(dir, "codes")?;
        bundle::write_tokenizer(&codes.path, &self.networks.tokenizer, &drawn.tokenizer)?;
        Ok((folder(dir, "network")?, drawn))
    }
}

/// A new folder as the output of a stage.
fn folder(dir: &Path, name: &str) -> Result<Input> {
    let path = dir.join(name);
    std::fs::create_dir(&path).map_err(Error::io(&path))?;
    Ok(Input {
        kind: name.into(),
        path,
        hash: "drawn".into(),
    })
}

/// Writes a teacher or student, with the tokenizer of the folder `codes`.
fn write_network(dir: &Path, to: &Input, config: &NetworkConfig, weights: &Weights) -> Result<()> {
    let codes = dir.join("codes");
    let codes = Bundle::open(&codes)?;
    bundle::write_network(&to.path, &codes, (config, weights), (&[], &[]))
}

/// Runs a stage on candle and returns its output.
fn make(dir: &Path, job: &StageJob) -> Result<Input> {
    let made = folder(dir, &job.kind)?;
    let work_dir = folder(dir, "making")?.path;
    let job = StageJob {
        work_dir: Some(work_dir),
        ..job.clone()
    };
    let clock = StageClock::to_the_end(&made.path);
    run(&Candle::open("cpu", "f32", 0)?, &job, &clock)?;
    Ok(Input {
        path: clock.artifact(),
        ..made
    })
}

/// Random weights of LPIPS in two files, as it is published.
fn write_lpips(dir: &Path) -> Result<()> {
    let all = draw(|loader| {
        let source = ParameterSource::Init(2);
        let mut linear = Loader::new(loader.backend(), source, true, "drawn");
        Lpips::load(loader, &mut linear)?;
        let linear = weights::from_params(&linear.into_params())?;
        weights::write(&dir.join("linear.safetensors"), &linear)
    })?;
    weights::write(&dir.join("vgg.safetensors"), &all)
}

fn training(batch: usize, ema: f64) -> Value {
    json!({
        "steps": STEPS,
        "batch": batch,
        "learning_rate": 1e-4,
        "ema": ema,
        "checkpoint_seconds": 86_400,
    })
}

fn data() -> Value {
    json!({ "arrays": "images.npy", "labels": "labels.npy" })
}

/// A LlamaGen tokenizer of these images, channels and multipliers, with K codes in D dimensions.
fn vq_of(
    [image_channels, side]: [usize; 2],
    channels: usize,
    multipliers: &[usize],
    (vocabulary, codebook_dim): (usize, usize),
) -> vq::Config {
    vq::Config {
        autoencoder: Shape {
            image_channels,
            image_size: Sides::square(side),
            channels,
            multipliers: multipliers.to_vec(),
            res_blocks: 1,
            norm_groups: 8,
            z_channels: channels,
        },
        vocabulary,
        codebook_dim,
        l2_norm: true,
    }
}

/// A tokenizer with a LlamaGen network of this depth and width over its tokens.
fn small(
    name: &'static str,
    tokenizer: vq::Config,
    (width, depth): (usize, usize),
    classes: usize,
    batch: usize,
) -> Reference {
    let network = llamagen::Config {
        width,
        depth,
        heads: 4,
        vocabulary: tokenizer.vocabulary,
        codebook_dim: tokenizer.codebook_dim,
        map: tokenizer.autoencoder.map(),
        condition: ConditioningShape::Classes(classes),
    };
    Reference {
        family: Family::Llamagen,
        name,
        batch,
        tokenizer: TokenizerConfig::Vq(tokenizer),
        network: NetworkConfig::Llamagen(network),
    }
}

/// The networks of recipes/digits.yaml, with a batch.
pub(super) fn digits(depth: usize, batch: usize) -> Reference {
    small(
        "digits",
        vq_of([1, 8], 24, &[1, 1], (32, 4)),
        (96, depth),
        10,
        batch,
    )
}

/// The networks of recipes/emoji.yaml, with a batch.
fn emoji(batch: usize) -> Reference {
    small(
        "emoji",
        vq_of([3, 32], 32, &[1, 1, 2], (256, 8)),
        (96, 6),
        9,
        batch,
    )
}

/// All rows.
pub(super) fn all() -> Result<Vec<StageRow>> {
    let plain = small(
        "32 x 32",
        vq_of([3, 32], 32, &[1, 2, 2], (256, 8)),
        (96, 1),
        1,
        32,
    );
    let mut published = vq_of([3, 64], 128, &[1, 1, 2, 2, 4], (16_384, 8));
    published.autoencoder.res_blocks = 2;
    published.autoencoder.norm_groups = 32;
    published.autoencoder.z_channels = 256;
    let vq16 = || small("VQ-16 at 64 x 64", published.clone(), (96, 1), 1, 4);
    let mut rows = vec![
        tokenizer(plain, false, 0.0),
        tokenizer(vq16(), false, 0.0),
        tokenizer(vq16(), true, 0.0),
        tokenizer(digits(4, 64), false, AVERAGE),
    ];
    for mut r in Reference::all()? {
        r.network = r.network.with_classes(1);
        rows.push(pretrain(r, 4, 0.0));
    }
    rows.extend([
        pretrain(digits(4, 64), IMAGES, AVERAGE),
        pretrain(emoji(64), IMAGES, AVERAGE),
        distill(digits(4, 64), 8, 6),
        distill(emoji(32), 6, 24),
        loading(),
        sampling(emoji(500)),
    ]);
    Ok(rows)
}

fn tokenizer(r: Reference, terms: bool, ema: f64) -> StageRow {
    let (shape, (codes, dim)) = (r.autoencoder(), r.tokenizer.codebook());
    let mut options = json!({
        "data": data(),
        "held_out": 0.0,
        "codebook_size": codes,
        "codebook_dim": dim,
        "channels": shape.channels,
        "multipliers": shape.multipliers,
        "res_blocks": shape.res_blocks,
        "norm_groups": shape.norm_groups,
        "z_channels": shape.z_channels,
        "train": training(r.batch, ema),
    });
    let (side, images) = (shape.image_size.height, r.batch as f64);
    let learned = encoder(shape).plus(decoder(shape));
    // Gradients cost twice a forward pass; each vector is compared with each code.
    let vectors = (shape.map().area() * codes * dim) as f64;
    let mut operations = 3.0 * learned.operations + 2.0 * vectors;
    let mut weights = learned.weights + (codes * dim) as f64;
    let mut with = "";
    if terms {
        with = " with GAN and LPIPS";
        options["perceptual"] = json!({
            "kind": "lpips", "weight": 1.0, "vgg": "vgg.safetensors", "linear": "linear.safetensors",
        });
        options["adversarial"] = json!({ "start": 0 });
        let judge = discriminator(side, 64, 3);
        // Constants have no gradients of their own: reconstructions forward and backward, and images. The adversary judges,
        // and learns from both.
        operations += 3.0 * vgg(side).operations + (2.0 + 2.0 * 3.0) * judge.operations;
        weights += judge.weights;
    }
    StageRow {
        title: format!(
            "tokenizer {}, batch {}{with}: training step",
            r.name, r.batch
        ),
        work: (images * operations, step_bytes(weights, ema > 0.0)),
        images: None,
        task: Task::Step,
        kind: "tokenizer",
        options,
        networks: r,
        count: IMAGES,
    }
}

fn pretrain(r: Reference, count: usize, ema: f64) -> StageRow {
    let (depth, width) = r.network.size();
    let heads = match &r.network {
        NetworkConfig::Llamagen(c) => c.heads,
        NetworkConfig::Var(c) => c.heads,
    };
    StageRow {
        title: format!("{}, batch {}: pretraining step", r.name, r.batch),
        work: training_work(&r, ema),
        images: None,
        task: Task::Step,
        kind: "pretrain",
        options: json!({
            "family": r.family,
            "tokenizer": "codes",
            "data": data(),
            "held_out": 0.0,
            "width": width,
            "depth": depth,
            "heads": heads,
            "train": training(r.batch, ema),
        }),
        networks: r,
        count,
    }
}

/// A student with `depth` blocks, whose second pass starts at `second`.
fn distill(r: Reference, depth: usize, second: usize) -> StageRow {
    let student = with_depth(&r, depth);
    StageRow {
        title: format!("{}, batch {}: student step", r.name, r.batch),
        work: training_work(&student, AVERAGE),
        images: None,
        task: Task::Step,
        kind: "distill",
        options: json!({
            "teacher": "teacher",
            "trajectories": "trajectories",
            "depth": depth,
            "timesteps": [0, second],
            "train": training(r.batch, AVERAGE),
        }),
        networks: r,
        count: 0,
    }
}

/// The same networks with another depth.
fn with_depth(r: &Reference, depth: usize) -> Reference {
    let mut other = r.clone();
    match &mut other.network {
        NetworkConfig::Llamagen(c) => c.depth = depth,
        NetworkConfig::Var(c) => c.depth = depth,
    }
    other
}

/// That of a training step, teacher-forced or a student's: a pass over all tokens, its gradients, the optimiser.
fn training_work(r: &Reference, ema: f64) -> (f64, f64) {
    let (operations, bytes) = r.work(Phase::Train);
    let averaged = step_bytes(1.0, ema > 0.0) / step_bytes(1.0, false);
    (operations, bytes * averaged)
}

fn loading() -> StageRow {
    let (count, side) = (loader::COUNT, loader::RESIZED);
    StageRow {
        title: format!(
            "loader: {count} JPEGs of {0} x {0} to {side} x {side}",
            loader::SIDE
        ),
        // The decoded pixels and the resized floats are written.
        work: (
            0.0,
            (count * 3 * (loader::SIDE.pow(2) + 4 * side * side)) as f64,
        ),
        images: Some(count),
        task: Task::Load,
        kind: "images",
        options: json!({}),
        networks: digits(1, 1),
        count: 0,
    }
}

pub(super) fn sampling(r: Reference) -> StageRow {
    let all = Reference {
        batch: SAMPLED,
        ..r.clone()
    };
    let seen: Cost = classifier(r.tokenizer.image(), FEATURES);
    let (passes, bytes) = all.work(Phase::Student);
    let (decoded, _) = all.work(Phase::Decode);
    StageRow {
        title: format!("{}: {SAMPLED} images sampled, decoded, features", r.name),
        work: (passes + decoded + SAMPLED as f64 * seen.operations, bytes),
        images: Some(SAMPLED),
        task: Task::Sample,
        kind: "sample",
        options: json!({
            "sampler": { "kind": "student", "student": "student", "timesteps": [0] },
            "count": SAMPLED,
            "batch": r.batch,
        }),
        networks: r,
        count: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::stage_clock::steps;
    use super::*;

    #[test]
    fn stages_take_steps_on_the_files_of_their_rows() {
        let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
        let colours = small(
            "32 x 32",
            vq_of([3, 32], 8, &[1, 1], (16, 4)),
            (96, 1),
            1,
            2,
        );
        for row in [
            tokenizer(digits(4, 64), false, AVERAGE),
            tokenizer(colours, true, 0.0),
            pretrain(digits(4, 64), IMAGES, AVERAGE),
            distill(digits(4, 64), 8, 6),
        ] {
            let files = row.files().expect("files");
            let (between, suffices) = (|_: usize| (), |seconds: &[f64]| seconds.len() >= 2);
            let clock = StageClock::new(files.dir.path(), &between, &suffices);
            let seconds = steps(&backend, &files.job, &clock).expect("steps");
            assert_eq!(seconds.len(), 2, "{}", row.title);
            let text = row.description(&files).expect("a description").to_string();
            assert!(text.contains("vocabulary") && row.work.0 > 0.0, "{text}");
        }
    }
}
