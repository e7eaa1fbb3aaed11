//! Parity with the published PyTorch code: one suite for every backend.
//!
//! `golden/` holds results computed with the published code on the CPU in float32; the weights are procedural and are
//! made here. Every tensor must agree within 1e-4 of its largest magnitude, every token exactly.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use retort_engine::backend::{Backend, FlowSolver};
use retort_engine::model::autoencoder::Shape;
use retort_engine::model::inception::{FEATURES, Inception, Preparation};
use retort_engine::model::lpips::Lpips;
use retort_engine::model::{
    CODEBOOK, CaptionFeatures, CaptionShape, ConditionShape, Conditions, Student, Teacher,
    Tokenizer, llamagen, msvq, t5, var, vq,
};
use retort_engine::sampler::{Choice, Distribution, StudentSampler, autoregressive, choices};
use retort_engine::statistics::{Moments, frechet_distance, inception_score, precision_recall};
use retort_engine::tape::{Var, backward};
use retort_engine::weights::{self, Floats, Loader, Source, Stored, Weights};
use retort_engine::{Error, Result};
use serde_json::Value;

/// Largest allowed error, relative to the largest magnitude of the tensor.
pub const TOLERANCE: f64 = 1e-4;

/// One compared tensor.
#[derive(Debug)]
pub struct Row {
    /// Network and tensor.
    pub name: String,
    /// Largest difference relative to the largest magnitude; for tokens, the share that differs.
    pub error: f64,
    /// Largest allowed error.
    pub tolerance: f64,
}

/// Prints the table and says whether every row is within its tolerance.
pub fn report(backend: &str, rows: &[Row]) -> bool {
    for row in rows {
        let verdict = if row.error <= row.tolerance {
            "ok"
        } else {
            "FAILED"
        };
        println!(
            "{backend:<10} {:<44} {:>10.2e} {verdict}",
            row.name, row.error
        );
    }
    !rows.is_empty() && rows.iter().all(|row| row.error <= row.tolerance)
}

/// Largest difference relative to the largest magnitude expected.
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
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

/// Where cargo says that this crate is; where it was built otherwise.
fn folder(name: &str) -> PathBuf {
    let own = std::env::var("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    Path::new(&own).join("golden").join(name)
}

/// Expected tensors of a file, and which of them were looked at.
struct Expected {
    stored: Stored,
    seen: RefCell<BTreeSet<String>>,
}

impl Expected {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            stored: Stored::open(path, None)?,
            seen: RefCell::default(),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.stored.shape(name).is_some()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.stored.shape(name).expect(name).to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.stored.floats(name).expect("floats")
    }

    fn indices(&self, name: &str) -> Vec<u32> {
        self.seen.borrow_mut().insert(name.to_owned());
        self.stored.indices(name).expect("indices")
    }

    /// Tensors that nobody looked at.
    fn left(&self) -> Vec<String> {
        let (seen, names) = (self.seen.borrow(), self.stored.shapes());
        let names = names.map(|(name, _)| name.to_owned());
        names.filter(|name| !seen.contains(name)).collect()
    }
}

/// The suite under way.
struct Suite<'b, B: Backend> {
    backend: &'b B,
    network: &'static str,
    expected: Expected,
    rows: Vec<Row>,
}

impl<B: Backend> Suite<'_, B> {
    fn tensor(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .floats(&self.expected.floats(name), &self.expected.shape(name))
    }

    fn ids(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .indices(&self.expected.indices(name), &self.expected.shape(name))
    }

    fn floats(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        self.values(name, &B::shape(found), &B::to_floats(found)?);
        Ok(())
    }

    fn values(&mut self, name: &str, shape: &[usize], found: &[f32]) {
        assert_eq!(shape, self.expected.shape(name), "shape of {name}");
        let error = relative_error(found, &self.expected.floats(name));
        self.rows.push(Row {
            name: format!("{}/{name}", self.network),
            error,
            tolerance: TOLERANCE,
        });
    }

    fn tokens(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        let (found, expected) = (B::to_indices(found)?, self.expected.indices(name));
        assert_eq!(found.len(), expected.len(), "number of {name}");
        let differing = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        let error = differing as f64 / found.len() as f64;
        self.rows.push(Row {
            name: format!("{}/{name}", self.network),
            error,
            tolerance: 0.0,
        });
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
        self.values(&shown, &B::shape(found), &pixels);
        Ok(())
    }
}

/// Compares everything there is.
pub fn suite<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let mut rows = flow(backend)?;
    rows.extend(llamagen(backend)?);
    rows.extend(var(backend)?);
    rows.extend(var_variants(backend)?);
    rows.extend(captions(backend)?);
    Ok(rows)
}

/// Compares the flow map with the float64 reference on every case of `golden/flow`.
pub fn flow<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for case in ["small", "llamagen", "topk", "var"] {
        let expected = Expected::open(&folder("flow").join(format!("flow_{case}.safetensors")))?;
        let mut suite = Suite {
            backend,
            network: "flow",
            expected,
            rows: Vec::new(),
        };
        let [logits, noise, codebook] =
            ["logits", "noise", "codebook"].map(|name| suite.tensor(name));
        let ids = B::flow_map(&logits?, &noise?, &codebook?, &FlowSolver::default())?;
        suite.tokens("token", &ids)?;
        rows.extend(suite.rows.into_iter().map(|r| Row {
            name: format!("flow/{case}/token"),
            ..r
        }));
    }
    Ok(rows)
}

/// `config.json` of a network.
struct Numbers(Value);

impl Numbers {
    fn open(dir: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(dir.join("config.json")).map_err(Error::io(dir))?;
        let config = serde_json::from_str(&text).map_err(|e| Error::data(dir, e))?;
        Ok(Self(config))
    }

    fn one(&self, name: &str) -> usize {
        self.0[name].as_u64().expect(name) as usize
    }

    fn flag(&self, name: &str) -> bool {
        self.0[name].as_bool().expect(name)
    }

    fn list(&self, name: &str) -> Vec<usize> {
        let sizes = self.0[name].as_array().expect(name).iter();
        sizes
            .map(|x| x.as_u64().expect("a size") as usize)
            .collect()
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
pub fn llamagen<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let dir = folder("llamagen");
    let numbers = Numbers::open(&dir)?;
    let all = procedural_weights(&dir.join("weights.json"))?;
    let load = |part: &str| Loader::new(backend, Source::Host(&all[part]), false, part.to_owned());

    let side = numbers.one("block_size").isqrt();
    let network = llamagen::Config {
        width: numbers.one("dim"),
        depth: numbers.one("n_layer"),
        heads: numbers.one("n_head"),
        vocabulary: numbers.one("vocab_size"),
        codebook_dim: numbers.one("codebook_dim"),
        side,
        condition: ConditionShape::Classes(numbers.one("num_classes")),
    };
    let multipliers = numbers.list("ch_mult");
    let tokenizer = vq::Config {
        autoencoder: Shape {
            image_channels: 3,
            image_size: side << (multipliers.len() - 1),
            channels: 128,
            multipliers,
            res_blocks: 2,
            norm_groups: 32,
            z_channels: numbers.one("z_channels"),
        },
        vocabulary: numbers.one("vocab_size"),
        codebook_dim: numbers.one("codebook_dim"),
        l2_norm: true,
    };
    let networks = Networks {
        teacher: &llamagen::Gpt::load(&mut load("gpt"), &network)?,
        student: &llamagen::GptStudent::load(&mut load("dd"), &network)?,
        tokenizer: &vq::VqModel::load(&mut load("vq"), &tokenizer)?,
        guidance: ["1.0", "2.0"],
        clamps: false,
    };
    let mut suite = Suite {
        backend,
        network: "llamagen",
        expected: Expected::open(&dir.join("expected.safetensors"))?,
        rows: Vec::new(),
    };
    compare(&mut suite, &networks, &numbers)?;
    Ok(suite.rows)
}

/// Compares teacher, student, samplers and tokenizer of VAR.
pub fn var<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let dir = folder("var");
    let numbers = Numbers::open(&dir)?;
    let all = procedural_weights(&dir.join("weights.json"))?;
    let load = |part: &str| Loader::new(backend, Source::Host(&all[part]), false, part.to_owned());

    let (depth, scales) = (numbers.one("depth"), numbers.list("patch_nums"));
    let network = var::Config {
        width: 64 * depth,
        depth,
        heads: depth,
        vocabulary: numbers.one("V"),
        codebook_dim: numbers.one("Cvae"),
        scales: scales.clone(),
        classes: numbers.one("num_classes"),
        shared_adaln: numbers.flag("shared_aln"),
        attn_l2_norm: numbers.flag("attn_l2_norm"),
    };
    let published = msvq::Config::published(&scales);
    let tokenizer = msvq::Config {
        autoencoder: Shape {
            channels: numbers.one("ch"),
            z_channels: numbers.one("Cvae"),
            ..published.autoencoder
        },
        vocabulary: numbers.one("V"),
        phi_convs: numbers.one("share_quant_resi"),
        scales,
    };
    let quantiser = msvq::Quantiser::load(&mut load("vae"), &tokenizer)?;
    let teacher = var::Transformer::load(&mut load("var"), &network, quantiser)?;
    let networks = Networks {
        teacher: &teacher,
        student: &var::TransformerStudent::load(&mut load("dd"), &network)?,
        tokenizer: &msvq::MultiScaleVq::load(&mut load("vae"), &tokenizer)?,
        guidance: ["0.0", "1.5"],
        clamps: true,
    };
    let mut suite = Suite {
        backend,
        network: "var",
        expected: Expected::open(&dir.join("expected.safetensors"))?,
        rows: Vec::new(),
    };
    let inputs = teacher.inputs(&suite.ids("forced.tokens")?)?;
    suite.floats("forced.input", inputs.value())?;
    compare(&mut suite, &networks, &numbers)?;
    Ok(suite.rows)
}

/// Compares what `golden/var` does not hold: blocks that share their modulation with blocks that have the same one each,
/// and generation scale by scale with teacher forcing; both without L2-normalised attention.
pub fn var_variants<B: Backend>(backend: &B) -> Result<Vec<Row>> {
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
    let teacher = |config: &var::Config, weights: &Weights| {
        let mut loader = Loader::new(backend, Source::Init(1), false, "quantiser");
        let quantiser = msvq::Quantiser::load(&mut loader, &tokenizer)?;
        let source = Source::HostOrInit(weights, 2);
        let mut loader = Loader::new(backend, source, false, "variant");
        let teacher = var::Transformer::load(&mut loader, config, quantiser)?;
        Ok::<_, Error>((teacher, weights::from_params(&loader.into_params())?))
    };
    let (shared_teacher, weights) = teacher(&shared, &Weights::new())?;
    let mut each = weights.clone();
    let common = |name: &str| weights[&format!("shared_ada_lin.1.{name}")].clone();
    for i in 0..own.depth {
        let mut bias = common("bias");
        let offset = &weights[&format!("blocks.{i}.ada_gss")].data;
        bias.data.iter_mut().zip(offset).for_each(|(b, o)| *b += o);
        each.insert(format!("blocks.{i}.ada_lin.1.bias"), bias);
        each.insert(format!("blocks.{i}.ada_lin.1.weight"), common("weight"));
    }
    let (own_teacher, _) = teacher(&own, &each)?;

    let shape = own.token_shape();
    let (n, l) = (2, shape.tokens());
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
    let mut rows = Vec::new();
    for (name, found) in [
        ("shared_adaln.logits", forced(&shared_teacher)?),
        ("generated.logits", generated),
    ] {
        rows.push(Row {
            name: format!("var/{name}"),
            error: relative_error(&B::to_floats(&found)?, &expected),
            tolerance: TOLERANCE,
        });
    }
    Ok(rows)
}

/// Compares what is conditioned on captions, the text encoder, and VAR without L2-normalised attention with float64
/// results (`peers/captions.py` writes `golden/captions`).
pub fn captions<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let dir = folder("captions");
    let parts = procedural_weights(&dir.join("weights.json"))?;
    let load =
        |part: &str| Loader::new(backend, Source::Host(&parts[part]), false, part.to_owned());
    let path = dir.join("numbers.json");
    let numbers = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let numbers: Value = serde_json::from_str(&numbers).map_err(|e| Error::data(&path, e))?;
    let mut suite = Suite {
        backend,
        network: "captions",
        expected: Expected::open(&dir.join("expected.safetensors"))?,
        rows: Vec::new(),
    };
    text_encoder(&mut suite, &mut load("t5"))?;

    let of = Numbers(numbers["gpt"].clone());
    let shape = CaptionShape {
        positions: of.one("positions"),
        width: of.one("features"),
    };
    let config = llamagen::Config {
        width: of.one("width"),
        depth: of.one("depth"),
        heads: of.one("heads"),
        vocabulary: of.one("vocabulary"),
        codebook_dim: of.one("codebook_dim"),
        side: of.one("side"),
        condition: ConditionShape::Captions(shape),
    };
    let teacher = llamagen::Gpt::load(&mut load("gpt"), &config)?;
    let student = llamagen::GptStudent::load(&mut load("dd"), &config)?;
    let images = procedural_weights(&folder("llamagen").join("weights.json"))?;
    let codes = &images["vq"][CODEBOOK];
    let codebook = backend.floats(&codes.data, &codes.shape)?;
    let codebook = Var::<B>::constant(codebook).l2_normalise()?.value().clone();

    // Features come left-padded; the mask says how far.
    let mask = suite.expected.floats("mask");
    let padding = mask.chunks_exact(shape.positions);
    let padding: Vec<usize> = padding
        .map(|row| row.iter().filter(|&&x| x == 0.0).count())
        .collect();
    let n = padding.len();
    assert!(padding.contains(&0) && padding.iter().any(|&p| p > 0));
    let given = |features: B::Tensor| {
        Conditions::Captions(CaptionFeatures {
            features,
            padding: padding.clone(),
        })
    };
    let captions = given(suite.tensor("features")?);
    let without = &parts["gpt"]["cls_embedding.uncond_embedding"].data;
    let without = backend.floats(&without.repeat(n), &[n, shape.positions, shape.width])?;

    let tokens = suite.ids("forced.tokens")?;
    let forced = |conditions: &Conditions<B>| {
        let logits = teacher.forced(conditions, &tokens)?;
        Ok::<_, Error>(logits.value().clone())
    };
    suite.floats("forced.logits", &forced(&captions)?)?;
    suite.floats("forced.logits_uncond", &forced(&given(without))?)?;

    let guidance = numbers["guidance"].as_f64();
    let steps = teacher.tokens().steps.len();
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

    let number = |name: &str| numbers[name].as_u64().expect(name) as usize;
    let (middle, split) = (number("t_mid"), number("split_t"));
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
    let sampler = StudentSampler {
        student: &student,
        codebook: &codebook,
        split,
    };
    let latents = sampler.sample(&noise, &captions, &[0, middle])?;
    suite.floats("two_step.latents", &latents)?;

    let of = Numbers(numbers["var"].clone());
    plain_var(&mut suite, &of, &mut load("var"), &mut load("quantiser"))?;
    // Those of the texts are for the command line.
    let left = suite.expected.left();
    assert!(
        left.iter().all(|name| name.starts_with("caption.")),
        "tensors not compared: {left:?}"
    );
    Ok(suite.rows)
}

fn text_encoder<B: Backend>(suite: &mut Suite<'_, B>, loader: &mut Loader<'_, B>) -> Result<()> {
    let path = folder("captions").join("config.json");
    let config = std::fs::read(&path).map_err(Error::io(&path))?;
    let config: t5::Config = serde_json::from_slice(&config).map_err(|e| Error::data(&path, e))?;
    let encoder = t5::Encoder::load(loader, &config, t5::EMBEDDINGS[0])?;
    let texts = (0..3).map(|i| suite.expected.indices(&format!("t5.{i}.ids")));
    let texts: Vec<Vec<u32>> = texts.collect();
    let ids: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    // Together, and so padded to the longest.
    let found = encoder.forward(suite.backend, &ids)?;
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
        width: of.one("width"),
        depth: of.one("depth"),
        heads: of.one("heads"),
        vocabulary: of.one("vocabulary"),
        codebook_dim: of.one("dim"),
        scales: of.list("scales"),
        classes: of.one("classes"),
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
        phi_convs: of.one("convs"),
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
    let shape = teacher.tokens();
    let codebook = tokenizer.codebook()?;
    let decode = |latents: B::Tensor| -> Result<B::Tensor> {
        Ok(tokenizer.decode(&Var::constant(latents))?.value().clone())
    };
    let classes = suite.expected.indices("labels");
    let n = classes.len();
    let labels = Conditions::Classes(backend.indices(&classes, &[n])?);
    let ConditionShape::Classes(unconditional) = shape.condition else {
        panic!("a model of classes");
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
    let steps = shape.steps.len();
    let greedy = |guidance: f64| Distribution {
        guidance: Some(guidance),
        top_k: 1,
        ..Default::default()
    };
    let distribution = greedy(f64::from(suite.expected.floats("greedy.cfg")[0]));
    let mut sequences = choices(0, 0, n);
    let mut choice = Choice::Random(&mut sequences);
    let ids = autoregressive(teacher, &labels, &distribution, &mut choice, None, steps)?;
    suite.tokens("greedy.tokens", &ids)?;
    suite.image("greedy", &decode(B::rows(&codebook, &ids)?)?)?;

    // Trajectories under guidance.
    let noise = suite.tensor("student.noise")?;
    for w in networks.guidance {
        let distribution = Distribution {
            guidance: Some(w.parse().expect("a number")),
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
    let (middle, l) = (numbers.one("t_mid"), shape.tokens());
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
        split: numbers.one("split_t"),
    };
    for (name, timesteps) in [("one_step", vec![0]), ("two_step", vec![0, middle])] {
        let latents = sampler.sample(&noise, &labels, &timesteps)?;
        suite.floats(&format!("{name}.latents"), &latents)?;
        suite.image(name, &decode(latents)?)?;
    }
    let mut sequences = choices(0, 0, n);
    let (latents, prefix) = sampler.assisted(
        &noise,
        &labels,
        [0, middle],
        teacher,
        numbers.one("t_teacher_start"),
        &greedy(2.0),
        &mut Choice::Random(&mut sequences),
    )?;
    suite.floats("assisted.prefix_latents", &prefix)?;
    suite.floats("assisted.latents", &latents)?;
    suite.image("assisted", &decode(latents)?)?;

    // Tokenizer.
    let image = suite.tensor("tokenizer.image")?;
    suite.tokens("tokenizer.tokens_of_image", &tokenizer.encode(&image)?)?;
    let images = decode(B::rows(&codebook, &tokens)?)?;
    let mut pixels = B::to_floats(&images)?;
    if networks.clamps {
        pixels.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
    }
    suite.values("tokenizer.image_of_tokens", &B::shape(&images), &pixels);
    assert_eq!(suite.expected.left(), [""; 0], "tensors not compared");
    Ok(())
}

/// Procedural weights of a measuring network: `inception`, `vgg` or `linear`.
pub fn measuring_weights(part: &str) -> Result<Weights> {
    let mut parts = procedural_weights(&folder("measures").join("weights.json"))?;
    Ok(parts.remove(part).expect("a part of weights.json"))
}

/// Compares the networks that measure images, and the figures taken from their features, with pytorch-fid, lpips and
/// torch-fidelity (`peers/measures.py` writes `golden/measures`).
pub fn measures<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let dir = folder("measures");
    let parts = procedural_weights(&dir.join("weights.json"))?;
    let load =
        |part: &str| Loader::new(backend, Source::Host(&parts[part]), false, part.to_owned());
    let mut suite = Suite {
        backend,
        network: "measures",
        expected: Expected::open(&dir.join("expected.safetensors"))?,
        rows: Vec::new(),
    };

    let lpips = Lpips::load(&mut load("vgg"), &mut load("linear"))?;
    let side = |side: &str| {
        let both = [0, 1].map(|i| &parts["pairs"][&format!("{side}.{i}")]);
        let data = both.map(|x| &x.data[..]).concat();
        backend.floats(&data, &[&[2], &both[0].shape[..]].concat())
    };
    let grey = |x: &B::Tensor| Ok::<_, Error>(Var::constant(B::narrow(x, 1, 0, 1)?));
    let (a, b) = (side("a")?, side("b")?);
    let found = lpips.distance(&grey(&a)?, &grey(&b)?)?;
    suite.floats("lpips.grey", found.value())?;
    let image = Var::parameter(a);
    let distance = lpips.distance(&image, &Var::constant(b))?;
    suite.floats("lpips.distance", distance.value())?;
    let sum = distance.sum(&[0])?;
    drop(distance);
    let gradient = backward(sum, &[("image".into(), image)])?;
    suite.floats("lpips.gradient", &gradient[0])?;

    let inception = Inception::load(&mut load("inception"))?;
    for (name, count) in [("small", 2), ("exact", 2), ("large", 1), ("grey", 1)] {
        let images = (0..count).map(|i| &parts["images"][&format!("{name}.{i}")]);
        let images: Vec<&Floats> = images.collect();
        let byte = |x: &f32| (x.clamp(0.0, 1.0) * 255.0 + 0.5).floor() / 255.0;
        let pixels = images.iter().flat_map(|x| x.data.iter().map(byte));
        let shape = [&[count], &images[0].shape[..]].concat();
        let x = backend.floats(&pixels.collect::<Vec<_>>(), &shape)?;
        let x = Var::constant(x);
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

    let set = |name: &str| &parts["sets"][name];
    let moments = |name: &str| Moments::of(&set(name).data, set(name).shape[1]);
    let real = moments("real")?;
    let score = inception_score(&set("logits").data, set("logits").shape[1], 10)?;
    let both = precision_recall(&set("real").data, &set("fake").data, real.dim(), 3)?;
    let figures = [
        ("fake", frechet_distance(&real, &moments("fake")?)?),
        ("few", frechet_distance(&real, &moments("few")?)?),
        ("inception score", score.mean),
        ("its deviation", score.deviation),
        ("precision", both.precision),
        ("recall", both.recall),
    ];
    let expected = suite.expected.floats("sets.figures");
    assert_eq!(expected.len(), figures.len(), "number of figures");
    for ((name, found), expected) in figures.into_iter().zip(expected) {
        suite.rows.push(Row {
            name: format!("measures/sets.{name}"),
            error: (found / f64::from(expected) - 1.0).abs(),
            tolerance: 1e-6,
        });
    }
    let shorter = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    for (name, found) in [("mean", &real.mean), ("covariance", &real.covariance)] {
        let name = format!("sets.{name}");
        let shape = suite.expected.shape(&name);
        suite.values(&name, &shape, &shorter(found));
    }
    assert_eq!(suite.expected.left(), [""; 0], "tensors not compared");
    Ok(suite.rows)
}

/// Weights by their recipe: element i is scale * (2u - 1) + shift, u from SplitMix64 started at the seed.
pub fn procedural_weights(path: &Path) -> Result<BTreeMap<String, Weights>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let parts: BTreeMap<String, Vec<Value>> =
        serde_json::from_str(&text).map_err(|e| Error::data(path, e))?;
    let floats = |spec: &Value| {
        let shape: Vec<usize> = spec["shape"]
            .as_array()
            .expect("shape")
            .iter()
            .map(|x| x.as_u64().expect("a size") as usize)
            .collect();
        let seed = spec["seed"].as_u64().expect("seed");
        let (scale, shift) = (
            spec["scale"].as_f64().expect("scale"),
            spec["shift"].as_f64().expect("shift"),
        );
        let data = (0..shape.iter().product::<usize>() as u64).map(|i| {
            let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let u = ((z ^ (z >> 31)) >> 40) as f64 * 2f64.powi(-24);
            (scale * (2.0 * u - 1.0) + shift) as f32
        });
        Floats {
            data: data.collect(),
            shape,
        }
    };
    let named = |specs: &Vec<Value>| {
        specs
            .iter()
            .map(|s| (s["name"].as_str().expect("name").to_owned(), floats(s)))
            .collect()
    };
    Ok(parts
        .iter()
        .map(|(part, specs)| (part.clone(), named(specs)))
        .collect())
}
