//! Parity with the published PyTorch code: whole networks on a backend against results computed with it.
//!
//! In: an opened backend and a directory as `tests/golden` of the repository, with a folder for each network: its sizes,
//! a rule that makes its weights (`weights.json`), and what the published code made of them on the CPU in float32
//! (`expected.safetensors`). Out: one [`Case`] per tensor. Every tensor must agree within 1e-4 of its largest magnitude,
//! every token exactly; none is left out.

mod prefix;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::Case;
use crate::backend::{Backend, FlowSolver};
use crate::error::{Error, Result};
use crate::model::autoencoder::Shape;
use crate::model::inception::{FEATURES, Inception, Preparation};
use crate::model::lpips::Lpips;
use crate::model::{
    CODEBOOK, CaptionFeatures, CaptionShape, ConditionShape, Conditions, PrefixMask, Student,
    Teacher, Tokenizer, llamagen, msvq, t5, var, vq,
};
use crate::sampler::{Assistant, Choice, Distribution, StudentSampler, autoregressive, choices};
use crate::statistics::neighbours::precision_recall;
use crate::statistics::{Moments, frechet_distance, inception_score};
use crate::tape::{Variable, backward};
use crate::weights::{self, Floats, Loader, Source, Stored, Weights};

/// Largest allowed error, relative to the largest magnitude of the tensor.
pub const TOLERANCE: f64 = 1e-4;

/// Largest difference relative to the largest magnitude expected.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let scale = expected
        .iter()
        .fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
    let differences = found
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from((a - b).abs()));
    // Not `f64::max`, which would not see a NaN.
    differences.fold(0.0, |m, x| if x <= m { m } else { x }) / scale
}

/// Expected tensors of a file, and which of them were looked at.
struct Expected {
    path: PathBuf,
    stored: Stored,
    seen: RefCell<BTreeSet<String>>,
}

impl Expected {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            stored: Stored::open(path, None)?,
            seen: RefCell::default(),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.stored.shape(name).is_some()
    }

    fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let missing = || Error::data(&self.path, format!("no tensor `{name}`"));
        Ok(self.stored.shape(name).ok_or_else(missing)?.to_vec())
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.stored.floats(name)
    }

    fn indices(&self, name: &str) -> Result<Vec<u32>> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.stored.indices(name)
    }

    /// A number: a tensor of one element.
    fn number(&self, name: &str) -> Result<f64> {
        let one = self.floats(name)?.first().copied();
        one.map(f64::from)
            .ok_or_else(|| Error::data(&self.path, format!("`{name}` is empty")))
    }

    /// Refuses a file with tensors that nobody looked at, but for those whose names begin with `spared`: what is left
    /// out has not passed.
    fn all_seen(&self, spared: Option<&str>) -> Result<()> {
        let seen = self.seen.borrow();
        let is_spared = |name: &str| spared.is_some_and(|prefix| name.starts_with(prefix));
        let mut names = self.stored.shapes().map(|(name, _)| name);
        match names.find(|name| !seen.contains(*name) && !is_spared(name)) {
            None => Ok(()),
            Some(name) => Err(Error::data(
                &self.path,
                format!("nothing is compared with `{name}`"),
            )),
        }
    }
}

/// The suite under way.
struct Suite<'b, B: Backend> {
    backend: &'b B,
    network: &'static str,
    expected: Expected,
    /// [`Case::chosen`] of what is compared next.
    chosen: bool,
    cases: Vec<Case>,
}

impl<'b, B: Backend> Suite<'b, B> {
    fn open(backend: &'b B, network: &'static str, expected: &Path) -> Result<Self> {
        Ok(Self {
            backend,
            network,
            expected: Expected::open(expected)?,
            chosen: false,
            cases: Vec::new(),
        })
    }

    fn tensor(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .floats(&self.expected.floats(name)?, &self.expected.shape(name)?)
    }

    fn ids(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .indices(&self.expected.indices(name)?, &self.expected.shape(name)?)
    }

    fn floats(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        self.values(name, &B::shape(found), &B::to_floats(found)?)
    }

    fn values(&mut self, name: &str, shape: &[usize], found: &[f32]) -> Result<()> {
        let wanted = self.expected.shape(name)?;
        let expected = self.expected.floats(name)?;
        let name = format!("{}/{name}", self.network);
        self.record(match shape == wanted {
            true => Case::new(name, relative_error(found, &expected), TOLERANCE),
            false => Case::new(
                format!("{name}: shape {shape:?}, expected {wanted:?}"),
                f64::INFINITY,
                TOLERANCE,
            ),
        });
        Ok(())
    }

    fn record(&mut self, case: Case) {
        let chosen = self.chosen;
        self.cases.push(Case { chosen, ..case });
    }

    fn tokens(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        let (found, expected) = (B::to_indices(found)?, self.expected.indices(name)?);
        let pairs = found.iter().zip(&expected);
        let differing = match found.len() == expected.len() {
            true => pairs.filter(|(a, b)| a != b).count() as f64 / found.len() as f64,
            false => f64::INFINITY,
        };
        let name = format!("{}/{name}", self.network);
        let chosen = true;
        let case = Case::new(name, differing, 0.0);
        self.cases.push(Case { chosen, ..case });
        Ok(())
    }

    /// Compares decoded images: `{name}.image` as the decoder gives them, or `{name}.image01` shown in [0, 1].
    fn image(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        let shown = format!("{name}.image01");
        if !self.expected.has(&shown) {
            return self.floats(&format!("{name}.image"), found);
        }
        let pixels = B::to_floats(found)?;
        let pixels: Vec<f32> = pixels
            .iter()
            .map(|x| ((x + 1.0) / 2.0).clamp(0.0, 1.0))
            .collect();
        self.values(&shown, &B::shape(found), &pixels)
    }
}

/// Compares all networks with what is in `dir`.
///
/// # Errors
/// The backend refuses an operation, or a file is missing or not as it has to be.
pub fn check<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let mut cases = models(backend, dir)?;
    cases.extend(measures(backend, dir)?);
    Ok(cases)
}

/// Compares the networks that make images, and how they are sampled.
///
/// # Errors
/// As [`check`].
pub fn models<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let mut cases = flow(backend, dir)?;
    cases.extend(llamagen(backend, dir)?);
    cases.extend(var(backend, dir)?);
    cases.extend(prefix::check(backend, dir)?);
    cases.extend(var_variants(backend)?);
    cases.extend(captions(backend, dir)?);
    Ok(cases)
}

/// Compares the flow map with the float64 reference on every case of `flow`.
fn flow<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for case in ["small", "llamagen", "topk", "var"] {
        let file = dir.join(format!("flow/flow_{case}.safetensors"));
        let mut suite = Suite::open(backend, "flow", &file)?;
        let [logits, noise, codebook] =
            ["logits", "noise", "codebook"].map(|name| suite.tensor(name));
        let ids = B::flow_map(&logits?, &noise?, &codebook?, &FlowSolver::default())?;
        suite.tokens("token", &ids)?;
        cases.extend(suite.cases.into_iter().map(|known| Case {
            name: format!("flow/{case}/token"),
            chosen: false,
            ..known
        }));
    }
    Ok(cases)
}

/// Sizes of a network, in a file of JSON.
struct Numbers {
    path: PathBuf,
    values: Value,
}

impl Numbers {
    fn open(path: PathBuf) -> Result<Self> {
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let values = serde_json::from_str(&text).map_err(|e| Error::data(&path, e))?;
        Ok(Self { path, values })
    }

    /// A value: of a number `usize`, of a list `Vec<usize>`, of a flag `bool`.
    fn get<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Result<T> {
        T::deserialize(&self.values[name])
            .map_err(|e| Error::data(&self.path, format!("`{name}`: {e}")))
    }

    /// Those of one of several networks.
    fn of(&self, network: &str) -> Self {
        Self {
            path: self.path.clone(),
            values: self.values[network].clone(),
        }
    }
}

/// Weights by the name of the network's part.
struct Parts(PathBuf, BTreeMap<String, Weights>);

impl Parts {
    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("weights.json");
        let parts = procedural_weights(&path)?;
        Ok(Self(path, parts))
    }

    fn get(&self, part: &str) -> Result<&Weights> {
        let missing = || Error::data(&self.0, format!("no part `{part}`"));
        self.1.get(part).ok_or_else(missing)
    }

    fn tensor(&self, part: &str, name: &str) -> Result<&Floats> {
        let missing = || Error::data(&self.0, format!("no tensor `{name}` in `{part}`"));
        self.get(part)?.get(name).ok_or_else(missing)
    }

    fn loader<'b, B: Backend>(&'b self, backend: &'b B, part: &str) -> Result<Loader<'b, B>> {
        let source = Source::Host(self.get(part)?);
        Ok(Loader::new(backend, source, false, part.to_owned()))
    }
}

/// The networks of a family.
struct Networks<'a, B: Backend> {
    teacher: &'a dyn Teacher<B>,
    student: &'a dyn Student<B>,
    tokenizer: &'a dyn Tokenizer<B>,
    /// Guidance of the trajectories, as their names say it.
    guidance: [&'a str; 2],
    /// Whether decoded images are clamped where they are not shown in [0, 1].
    clamps: bool,
}

/// Compares teacher, student, samplers and tokenizer of LlamaGen.
fn llamagen<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let dir = dir.join("llamagen");
    let (numbers, parts) = (Numbers::open(dir.join("config.json"))?, Parts::open(&dir)?);
    let load = |part: &str| parts.loader(backend, part);

    let side = numbers.get::<usize>("block_size")?.isqrt();
    let network = llamagen::Config {
        width: numbers.get("dim")?,
        depth: numbers.get("n_layer")?,
        heads: numbers.get("n_head")?,
        vocabulary: numbers.get("vocab_size")?,
        codebook_dim: numbers.get("codebook_dim")?,
        side,
        condition: ConditionShape::Classes(numbers.get("num_classes")?),
    };
    let multipliers: Vec<usize> = numbers.get("ch_mult")?;
    let tokenizer = vq::Config {
        autoencoder: Shape {
            image_channels: 3,
            image_size: side << (multipliers.len() - 1),
            channels: 128,
            multipliers,
            res_blocks: 2,
            norm_groups: 32,
            z_channels: numbers.get("z_channels")?,
        },
        vocabulary: numbers.get("vocab_size")?,
        codebook_dim: numbers.get("codebook_dim")?,
        l2_norm: true,
    };
    let networks = Networks {
        teacher: &llamagen::Gpt::load(&mut load("gpt")?, &network)?,
        student: &llamagen::GptStudent::load(&mut load("dd")?, &network)?,
        tokenizer: &vq::VqModel::load(&mut load("vq")?, &tokenizer)?,
        guidance: ["1.0", "2.0"],
        clamps: false,
    };
    let mut suite = Suite::open(backend, "llamagen", &dir.join("expected.safetensors"))?;
    compare(&mut suite, &networks, &numbers)?;
    Ok(suite.cases)
}

/// Shapes of VAR's networks and of their tokenizer.
fn var_networks(numbers: &Numbers) -> Result<(var::Config, msvq::Config)> {
    let depth: usize = numbers.get("depth")?;
    let scales: Vec<usize> = numbers.get("patch_nums")?;
    let network = var::Config {
        width: 64 * depth,
        depth,
        heads: depth,
        vocabulary: numbers.get("V")?,
        codebook_dim: numbers.get("Cvae")?,
        scales: scales.clone(),
        classes: numbers.get("num_classes")?,
        shared_adaln: numbers.get("shared_aln")?,
        attn_l2_norm: numbers.get("attn_l2_norm")?,
    };
    let published = msvq::Config::published(&scales);
    let tokenizer = msvq::Config {
        autoencoder: Shape {
            channels: numbers.get("ch")?,
            z_channels: numbers.get("Cvae")?,
            ..published.autoencoder
        },
        vocabulary: numbers.get("V")?,
        phi_convs: numbers.get("share_quant_resi")?,
        scales,
    };
    Ok((network, tokenizer))
}

/// Compares teacher, student, samplers and tokenizer of VAR.
fn var<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let dir = dir.join("var");
    let (numbers, parts) = (Numbers::open(dir.join("config.json"))?, Parts::open(&dir)?);
    let load = |part: &str| parts.loader(backend, part);
    let (network, tokenizer) = var_networks(&numbers)?;
    let quantiser = msvq::Quantiser::load(&mut load("vae")?, &tokenizer)?;
    let teacher = var::Transformer::load(&mut load("var")?, &network, quantiser)?;
    let networks = Networks {
        teacher: &teacher,
        student: &var::TransformerStudent::load(&mut load("dd")?, &network)?,
        tokenizer: &msvq::MultiScaleVq::load(&mut load("vae")?, &tokenizer)?,
        guidance: ["0.0", "1.5"],
        clamps: true,
    };
    let mut suite = Suite::open(backend, "var", &dir.join("expected.safetensors"))?;
    let inputs = teacher.inputs(&suite.ids("forced.tokens")?)?;
    suite.floats("forced.input", inputs.value())?;
    compare(&mut suite, &networks, &numbers)?;
    Ok(suite.cases)
}

/// Compares what `var` does not hold: blocks that share their modulation with blocks that have the same one each,
/// and generation scale by scale with teacher forcing; both without L2-normalised attention.
fn var_variants<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let own = var::Config {
        width: 16,
        depth: 3,
        heads: 2,
        vocabulary: 12,
        codebook_dim: 4,
        scales: vec![1, 2, 3],
        classes: 5,
        shared_adaln: false,
        attn_l2_norm: false,
    };
    let shared = var::Config {
        shared_adaln: true,
        ..own.clone()
    };
    let published = msvq::Config::published(&own.scales);
    let tokenizer = msvq::Config {
        autoencoder: Shape {
            z_channels: own.codebook_dim,
            ..published.autoencoder
        },
        vocabulary: own.vocabulary,
        ..published
    };
    let teacher = |config: &var::Config, source: Source<'_, B>| {
        let mut loader = Loader::new(backend, Source::Init(1), false, "quantiser");
        let quantiser = msvq::Quantiser::load(&mut loader, &tokenizer)?;
        let mut loader = Loader::new(backend, source, false, "variant");
        let teacher = var::Transformer::load(&mut loader, config, quantiser)?;
        Ok::<_, Error>((teacher, weights::from_params(&loader.into_params())?))
    };
    let (shared_teacher, mut weights) = teacher(&shared, Source::Init(2))?;
    for i in 0..own.depth {
        let offset = weights[&format!("blocks.{i}.ada_gss")].data.clone();
        for part in ["weight", "bias"] {
            let mut common = weights[&format!("shared_ada_lin.1.{part}")].clone();
            if part == "bias" {
                let pairs = common.data.iter_mut().zip(&offset);
                pairs.for_each(|(b, o)| *b += o);
            }
            weights.insert(format!("blocks.{i}.ada_lin.1.{part}"), common);
        }
    }
    let (own_teacher, _) = teacher(&own, Source::Host(&weights))?;

    let shape = own.token_shape();
    let (n, l) = (2, shape.count());
    let ids: Vec<u32> = (0..n * l).map(|i| (i * 7 % 12) as u32).collect();
    let tokens = backend.indices(&ids, &[n, l])?;
    let labels = Conditions::Classes(backend.indices(&[1, 4], &[n])?);
    let forced = |teacher: &var::Transformer<B>| {
        let logits = teacher.forced(&labels, &tokens)?;
        Ok::<_, Error>(logits.value().clone())
    };
    let expected = forced(&own_teacher)?;
    let mut generation = shared_teacher.generate(&labels, None)?;
    let (mut previous, mut parts, mut start) = (None, Vec::new(), 0);
    for &count in &shape.steps {
        parts.push(generation.advance(previous.as_ref())?);
        previous = Some(B::narrow(&tokens, 1, start, count)?);
        start += count;
    }
    let generated = B::cat(&parts.iter().collect::<Vec<_>>(), 1)?;

    let expected = B::to_floats(&expected)?;
    let mut cases = Vec::new();
    for (name, found) in [
        ("shared_adaln.logits", forced(&shared_teacher)?),
        ("generated.logits", generated),
    ] {
        let error = relative_error(&B::to_floats(&found)?, &expected);
        cases.push(Case::new(format!("var/{name}"), error, TOLERANCE));
    }
    Ok(cases)
}

/// Compares what is conditioned on captions, the text encoder, and VAR without L2-normalised attention with float64
/// results, with what is in `captions` of `dir`.
fn captions<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let images = Parts::open(&dir.join("llamagen"))?;
    let dir = dir.join("captions");
    let (numbers, parts) = (Numbers::open(dir.join("numbers.json"))?, Parts::open(&dir)?);
    let load = |part: &str| parts.loader(backend, part);
    let mut suite = Suite::open(backend, "captions", &dir.join("expected.safetensors"))?;
    let (config, exact) = (dir.join("config.json"), backend.exact());
    text_encoder(&mut suite, &config, &mut parts.loader(&exact, "t5")?)?;

    let of = numbers.of("gpt");
    let shape = CaptionShape {
        positions: of.get("positions")?,
        width: of.get("features")?,
    };
    let config = llamagen::Config {
        width: of.get("width")?,
        depth: of.get("depth")?,
        heads: of.get("heads")?,
        vocabulary: of.get("vocabulary")?,
        codebook_dim: of.get("codebook_dim")?,
        side: of.get("side")?,
        condition: ConditionShape::Captions(shape),
    };
    let teacher = llamagen::Gpt::load(&mut load("gpt")?, &config)?;
    let student = llamagen::GptStudent::load(&mut load("dd")?, &config)?;
    let codes = images.tensor("vq", CODEBOOK)?;
    let codebook = backend.floats(&codes.data, &codes.shape)?;
    let codebook = Variable::<B>::constant(codebook)
        .l2_normalise()?
        .value()
        .clone();

    // Features come left-padded; the mask says how far.
    let mask = suite.expected.floats("mask")?;
    let padding = mask.chunks_exact(shape.positions);
    let padding: Vec<usize> = padding
        .map(|row| row.iter().filter(|&&x| x == 0.0).count())
        .collect();
    let n = padding.len();
    let given = |features: B::Tensor| {
        Conditions::Captions(CaptionFeatures {
            features,
            padding: padding.clone(),
        })
    };
    let captions = given(suite.tensor("features")?);
    let without = &parts.tensor("gpt", "cls_embedding.uncond_embedding")?.data;
    let without = backend.floats(&without.repeat(n), &[n, shape.positions, shape.width])?;

    let tokens = suite.ids("forced.tokens")?;
    let forced = |conditions: &Conditions<B>| {
        let logits = teacher.forced(conditions, &tokens)?;
        Ok::<_, Error>(logits.value().clone())
    };
    suite.floats("forced.logits", &forced(&captions)?)?;
    suite.floats("forced.logits_uncond", &forced(&given(without))?)?;

    let guidance = Some(numbers.get("guidance")?);
    let steps = teacher.token_shape().steps.len();
    let mut greedy = choices(0, 0, n);
    let distribution = Distribution {
        guidance,
        top_k: 1,
        ..Default::default()
    };
    let mut choice = Choice::Random(&mut greedy);
    let ids = autoregressive(&teacher, &captions, &distribution, &mut choice, None, steps)?;
    suite.tokens("greedy.tokens", &ids)?;
    let noise = suite.tensor("noise")?;
    let mut choice = Choice::Flow {
        noise: &noise,
        codebook: &codebook,
        solver: FlowSolver::default(),
    };
    let distribution = Distribution {
        guidance,
        ..Default::default()
    };
    let path = autoregressive(&teacher, &captions, &distribution, &mut choice, None, steps)?;
    suite.tokens("trajectory.tokens", &path)?;
    let path = suite.ids("trajectory.tokens")?;

    let middle: usize = numbers.get("t_mid")?;
    for t in [0, middle] {
        let known = B::narrow(&B::rows(&codebook, &path)?, 1, 0, t.max(1))?;
        let left = B::narrow(&noise, 1, t, steps - t)?;
        let x = if t == 0 {
            left
        } else {
            B::cat(&[&known, &left], 1)?
        };
        let data: Vec<u32> = (0..n * steps).map(|i| u32::from(i % steps < t)).collect();
        let data = backend.indices(&data, &[n, steps])?;
        let prediction = student.predict(&x, &captions, &data)?;
        suite.floats(&format!("student.t{t}.logits"), prediction.logits.value())?;
        let continuous = student.continuous(&prediction)?;
        suite.floats(&format!("student.t{t}.continuous"), continuous.value())?;
    }
    suite.chosen = true;
    let sampler = StudentSampler {
        student: &student,
        codebook: &codebook,
        split: numbers.get("split_t")?,
    };
    let latents = sampler.sample(&noise, &captions, &[0, middle])?;
    suite.floats("two_step.latents", &latents)?;
    suite.chosen = false;

    plain_var(
        &mut suite,
        &numbers.of("var"),
        &mut load("var")?,
        &mut load("quantiser")?,
    )?;
    // The features of texts are those of the command line.
    suite.expected.all_seen(Some("caption."))?;
    Ok(suite.cases)
}

fn text_encoder<B: Backend>(
    suite: &mut Suite<'_, B>,
    config: &Path,
    loader: &mut Loader<'_, B>,
) -> Result<()> {
    let text = std::fs::read(config).map_err(Error::io(config))?;
    let config: t5::Config = serde_json::from_slice(&text).map_err(|e| Error::data(config, e))?;
    let encoder = t5::Encoder::load(loader, &config, t5::EMBEDDINGS[0])?;
    let texts = (0..3).map(|i| suite.expected.indices(&format!("t5.{i}.ids")));
    let texts: Vec<Vec<u32>> = texts.collect::<Result<_>>()?;
    let ids: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    // Together, and so padded to the longest.
    let found = encoder.forward(loader.backend(), &ids)?;
    for (i, text) in texts.iter().enumerate() {
        let row = B::narrow(&B::narrow(&found, 0, i, 1)?, 1, 0, text.len())?;
        let row = B::reshape(&row, &[text.len(), config.d_model])?;
        suite.floats(&format!("t5.{i}.features"), &row)?;
    }
    Ok(())
}

/// Teacher-forced logits of VAR without L2-normalised attention.
fn plain_var<B: Backend>(
    suite: &mut Suite<'_, B>,
    of: &Numbers,
    weights: &mut Loader<'_, B>,
    quantiser: &mut Loader<'_, B>,
) -> Result<()> {
    let config = var::Config {
        width: of.get("width")?,
        depth: of.get("depth")?,
        heads: of.get("heads")?,
        vocabulary: of.get("vocabulary")?,
        codebook_dim: of.get("dim")?,
        scales: of.get("scales")?,
        classes: of.get("classes")?,
        shared_adaln: false,
        attn_l2_norm: false,
    };
    let published = msvq::Config::published(&config.scales);
    let tokenizer = msvq::Config {
        autoencoder: Shape {
            z_channels: config.codebook_dim,
            ..published.autoencoder
        },
        vocabulary: config.vocabulary,
        phi_convs: of.get("convs")?,
        ..published
    };
    let quantiser = msvq::Quantiser::load(quantiser, &tokenizer)?;
    let teacher = var::Transformer::load(weights, &config, quantiser)?;
    let labels = Conditions::Classes(suite.ids("var.labels")?);
    let logits = teacher.forced(&labels, &suite.ids("var.tokens")?)?;
    suite.floats("var.logits", logits.value())
}

/// What is the same for every family: all tensors of `expected.safetensors`.
fn compare<B: Backend>(
    suite: &mut Suite<'_, B>,
    networks: &Networks<'_, B>,
    numbers: &Numbers,
) -> Result<()> {
    let backend = suite.backend;
    let Networks {
        teacher,
        student,
        tokenizer,
        ..
    } = *networks;
    let shape = teacher.token_shape();
    let codebook = tokenizer.codebook()?;
    let decode = |latents: B::Tensor| -> Result<B::Tensor> {
        Ok(tokenizer
            .decode(&Variable::constant(latents))?
            .value()
            .clone())
    };
    let classes = suite.expected.indices("labels")?;
    let n = classes.len();
    let labels = Conditions::Classes(backend.indices(&classes, &[n])?);
    let ConditionShape::Classes(unconditional) = shape.condition else {
        return Err(Error::Internal("a model of classes has none".into()));
    };
    let uncond = backend.indices(&vec![unconditional as u32; n], &[n])?;
    let uncond = Conditions::Classes(uncond);

    // Teacher-forced logits.
    let tokens = suite.ids("forced.tokens")?;
    suite.floats("forced.logits", teacher.forced(&labels, &tokens)?.value())?;
    suite.floats(
        "forced.logits_uncond",
        teacher.forced(&uncond, &tokens)?.value(),
    )?;

    // Greedy AR generation with guidance.
    suite.chosen = true;
    let steps = shape.steps.len();
    let greedy = |guidance: f64| Distribution {
        guidance: Some(guidance),
        top_k: 1,
        ..Default::default()
    };
    let distribution = greedy(suite.expected.number("greedy.cfg")?);
    let mut sequences = choices(0, 0, n);
    let mut choice = Choice::Random(&mut sequences);
    let ids = autoregressive(teacher, &labels, &distribution, &mut choice, None, steps)?;
    suite.tokens("greedy.tokens", &ids)?;
    suite.image("greedy", &decode(B::rows(&codebook, &ids)?)?)?;

    // Trajectories under guidance.
    let noise = suite.tensor("student.noise")?;
    for w in networks.guidance {
        let distribution = Distribution {
            guidance: w.parse().ok(),
            ..Default::default()
        };
        let mut choice = Choice::Flow {
            noise: &noise,
            codebook: &codebook,
            solver: FlowSolver::default(),
        };
        let ids = autoregressive(teacher, &labels, &distribution, &mut choice, None, steps)?;
        suite.tokens(&format!("trajectory.cfg{w}.tokens"), &ids)?;
        let images = decode(B::rows(&codebook, &ids)?)?;
        suite.image(&format!("trajectory.cfg{w}"), &images)?;
    }

    // Student passes, one and two steps, assisted.
    suite.chosen = false;
    let (middle, l): (usize, usize) = (numbers.get("t_mid")?, shape.count());
    for t in [0, middle] {
        let x = suite.tensor(&format!("student.t{t}.input"))?;
        let known = shape.tokens_before(t);
        let data: Vec<u32> = (0..n * l).map(|i| u32::from(i % l < known)).collect();
        let prediction = student.predict(&x, &labels, &backend.indices(&data, &[n, l])?)?;
        suite.floats(&format!("student.t{t}.logits"), prediction.logits.value())?;
        suite.floats(
            &format!("student.t{t}.continuous"),
            student.continuous(&prediction)?.value(),
        )?;
    }
    let sampler = StudentSampler {
        student,
        codebook: &codebook,
        split: numbers.get("split_t")?,
    };
    suite.chosen = true;
    for (name, timesteps) in [("one_step", vec![0]), ("two_step", vec![0, middle])] {
        let latents = sampler.sample(&noise, &labels, &timesteps)?;
        suite.floats(&format!("{name}.latents"), &latents)?;
        suite.image(name, &decode(latents)?)?;
    }
    let mut sequences = choices(0, 0, n);
    let assistant = Assistant {
        teacher,
        start: numbers.get("t_teacher_start")?,
        distribution: &greedy(2.0),
        mask: PrefixMask::Causal,
    };
    let mut choice = Choice::Random(&mut sequences);
    let (latents, prefix) =
        sampler.assisted(&noise, &labels, [0, middle], &assistant, &mut choice)?;
    suite.floats("assisted.prefix_latents", &prefix)?;
    suite.floats("assisted.latents", &latents)?;
    suite.image("assisted", &decode(latents)?)?;

    // Tokenizer.
    suite.chosen = false;
    let image = suite.tensor("tokenizer.image")?;
    suite.tokens("tokenizer.tokens_of_image", &tokenizer.encode(&image)?)?;
    let images = decode(B::rows(&codebook, &tokens)?)?;
    let mut pixels = B::to_floats(&images)?;
    if networks.clamps {
        pixels.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
    }
    suite.values("tokenizer.image_of_tokens", &B::shape(&images), &pixels)?;
    suite.expected.all_seen(None)
}

/// Compares the networks that measure images, and the figures taken from their features, with pytorch-fid, lpips and
/// torch-fidelity, with what is in `measures` of `dir`.
///
/// # Errors
/// As [`check`].
pub fn measures<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let dir = dir.join("measures");
    let parts = Parts::open(&dir)?;
    let load = |part: &str| parts.loader(backend, part);
    let mut suite = Suite::open(backend, "measures", &dir.join("expected.safetensors"))?;

    let lpips = Lpips::load(&mut load("vgg")?, &mut load("linear")?)?;
    let side = |side: &str| {
        let half = |i: usize| parts.tensor("pairs", &format!("{side}.{i}"));
        let both = [half(0)?, half(1)?];
        let data = both.map(|x| &x.data[..]).concat();
        backend.floats(&data, &[&[2], &both[0].shape[..]].concat())
    };
    let grey = |x: &B::Tensor| Ok::<_, Error>(Variable::constant(B::narrow(x, 1, 0, 1)?));
    let (a, b) = (side("a")?, side("b")?);
    let found = lpips.distance(&grey(&a)?, &grey(&b)?)?;
    suite.floats("lpips.grey", found.value())?;
    let image = Variable::parameter(a);
    let distance = lpips.distance(&image, &Variable::constant(b))?;
    suite.floats("lpips.distance", distance.value())?;
    let sum = distance.sum(&[0])?;
    drop(distance);
    let gradient = backward(sum, &[("image".into(), image)])?;
    suite.floats("lpips.gradient", &gradient[0])?;

    let inception = Inception::load(&mut load("inception")?)?;
    for (name, count) in [("small", 2), ("exact", 2), ("large", 1), ("grey", 1)] {
        let image = |i: usize| parts.tensor("images", &format!("{name}.{i}"));
        let images: Vec<&Floats> = (0..count).map(image).collect::<Result<_>>()?;
        let byte = |x: &f32| (x.clamp(0.0, 1.0) * 255.0 + 0.5).floor() / 255.0;
        let pixels = images.iter().flat_map(|x| x.data.iter().map(byte));
        let shape = [&[count], &images[0].shape[..]].concat();
        let x = backend.floats(&pixels.collect::<Vec<_>>(), &shape)?;
        let x = Variable::constant(x);
        let found = inception.look(&x, Preparation::Pytorch)?;
        for (features, dims) in found.features.iter().zip(FEATURES) {
            suite.floats(&format!("inception.{name}.{dims}"), features.value())?;
        }
        suite.floats(&format!("inception.{name}.spatial"), found.spatial.value())?;
        let found = inception.look(&x, Preparation::Tensorflow)?;
        suite.floats(
            &format!("tensorflow.{name}.2048"),
            found.features[3].value(),
        )?;
        suite.floats(&format!("tensorflow.{name}.logits"), found.logits.value())?;
    }

    let set = |name: &str| parts.tensor("sets", name);
    let moments = |name: &str| -> Result<Moments> {
        let set = set(name)?;
        Ok(Moments::of(&set.data, set.shape[1])?)
    };
    let (real, logits) = (moments("real")?, set("logits")?);
    let score = inception_score(&logits.data, logits.shape[1], 10)?;
    let (images, fakes) = (&set("real")?.data, &set("fake")?.data);
    let both = precision_recall(images, fakes, real.dim(), 3, &mut || true)?;
    let figures = [
        ("fake", frechet_distance(&real, &moments("fake")?)?),
        ("few", frechet_distance(&real, &moments("few")?)?),
        ("inception score", score.mean),
        ("its deviation", score.deviation),
        ("precision", both.precision),
        ("recall", both.recall),
    ];
    let expected = suite.expected.floats("sets.figures")?;
    if expected.len() != figures.len() {
        let message = format!("{} figures, expected {}", expected.len(), figures.len());
        return Err(Error::data(&suite.expected.path, message));
    }
    for ((name, found), expected) in figures.into_iter().zip(expected) {
        let error = (found / f64::from(expected) - 1.0).abs();
        let name = format!("measures/sets.{name}");
        suite.cases.push(Case::new(name, error, 1e-6));
    }
    let shorter = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    for (name, found) in [("mean", &real.mean), ("covariance", &real.covariance)] {
        let name = format!("sets.{name}");
        let shape = suite.expected.shape(&name)?;
        suite.values(&name, &shape, &shorter(found))?;
    }
    suite.expected.all_seen(None)?;
    Ok(suite.cases)
}

/// A tensor in `weights.json`: element i is scale * (2u - 1) + shift, u from SplitMix64 started at the seed.
#[derive(Deserialize)]
struct Recipe {
    name: String,
    shape: Vec<usize>,
    seed: u64,
    scale: f64,
    shift: f64,
}

impl Recipe {
    fn floats(&self) -> Floats {
        let count = self.shape.iter().product::<usize>() as u64;
        let data = (0..count).map(|i| {
            let mut z = self
                .seed
                .wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let u = ((z ^ (z >> 31)) >> 40) as f64 * 2f64.powi(-24);
            (self.scale * (2.0 * u - 1.0) + self.shift) as f32
        });
        Floats {
            data: data.collect(),
            shape: self.shape.clone(),
        }
    }
}

/// The weights of the parts of a network that `weights.json` describes.
///
/// # Errors
/// It cannot be read.
pub fn procedural_weights(path: &Path) -> Result<BTreeMap<String, Weights>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let parts: BTreeMap<String, Vec<Recipe>> =
        serde_json::from_str(&text).map_err(|e| Error::data(path, e))?;
    let named = |recipes: Vec<Recipe>| {
        let each = recipes.into_iter();
        each.map(|recipe| (recipe.name.clone(), recipe.floats()))
            .collect()
    };
    let parts = parts.into_iter();
    Ok(parts
        .map(|(part, recipes)| (part, named(recipes)))
        .collect())
}
