//! Networks conditioned on captions, the text encoder, and VAR without L2-normalised attention.

use std::path::Path;

use super::{Numbers, Parts, Suite};
use crate::backend::{Backend, FlowSolver};
use crate::conformance::Case;
use crate::error::{Error, Result};
use crate::model::autoencoder::Shape;
use crate::model::{
    BatchConditioning, CODEBOOK, CaptionBatch, CaptionShape, ConditioningShape, Student, Teacher,
    llamagen, msvq, t5, var,
};
use crate::sampler::{Choice, Distribution, StudentSampler, autoregressive, choices};
use crate::size::Sides;
use crate::tape::Variable;
use crate::weights::Loader;

/// Compares networks conditioned on captions, the text encoder, and VAR without L2-normalised attention with the float64
/// results in `captions` of `dir`.
pub(super) fn check<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
    let images = Parts::open(&dir.join("llamagen"))?;
    let dir = dir.join("captions");
    let (numbers, parts) = (Numbers::open(dir.join("numbers.json"))?, Parts::open(&dir)?);
    let load = |part: &str| parts.loader(backend, part);
    let mut suite = Suite::open(backend, "captions", &dir.join("expected.safetensors"))?;
    let (config, exact) = (dir.join("config.json"), backend.exact());
    text_encoder(&mut suite, &config, &mut parts.loader(&exact, "t5")?)?;

    let (config, shape) = network(&numbers.of("gpt"))?;
    let teacher = llamagen::Gpt::load(&mut load("gpt")?, &config)?;
    let student = llamagen::GptStudent::load(&mut load("dd")?, &config)?;
    let inputs = Inputs::of(&suite, shape, &images)?;
    let without = &parts.tensor("gpt", "cls_embedding.uncond_embedding")?.data;
    let repeated = without.repeat(inputs.padding.len());
    let without = backend.floats(
        &repeated,
        &[inputs.padding.len(), shape.positions, shape.width],
    )?;
    teacher_on_captions(&mut suite, &teacher, &inputs, without, &numbers)?;
    student_on_captions(&mut suite, &student, &inputs, &numbers)?;

    plain_var(
        &mut suite,
        &numbers.of("var"),
        &mut load("var")?,
        &mut load("quantiser")?,
    )?;
    // Text features are computed as by the command line.
    suite.expected.all_seen(Some("caption."))?;
    Ok(suite.cases)
}

/// The networks conditioned on captions, and the shape of these.
fn network(of: &Numbers) -> Result<(llamagen::Config, CaptionShape)> {
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
        map: Sides::square(of.get("side")?),
        condition: ConditioningShape::Captions(shape),
    };
    Ok((config, shape))
}

/// Inputs of the networks.
struct Inputs<B: Backend> {
    codebook: B::Tensor,
    /// Features are left-padded; the padding of each caption.
    padding: Vec<usize>,
    features: B::Tensor,
    noise: B::Tensor,
}

impl<B: Backend> Inputs<B> {
    fn of(suite: &Suite<'_, B>, shape: CaptionShape, images: &Parts) -> Result<Self> {
        let codes = images.tensor("vq", CODEBOOK)?;
        let codebook = suite.backend.floats(&codes.data, &codes.shape)?;
        let codebook = Variable::<B>::constant(codebook).l2_normalise()?;
        let mask = suite.expected.floats("mask")?;
        let padding = mask
            .chunks_exact(shape.positions)
            .map(|row| row.iter().filter(|&&x| x == 0.0).count());
        Ok(Self {
            codebook: codebook.value().clone(),
            padding: padding.collect(),
            features: suite.tensor("features")?,
            noise: suite.tensor("noise")?,
        })
    }

    /// Captions of these features.
    fn given(&self, features: B::Tensor) -> BatchConditioning<B> {
        BatchConditioning::Captions(CaptionBatch {
            dropped: Vec::new(),
            features,
            padding: self.padding.clone(),
        })
    }
}

/// Teacher-forced logits, with captions and `without`; greedy generation and a trajectory, both with guidance.
fn teacher_on_captions<B: Backend>(
    suite: &mut Suite<'_, B>,
    teacher: &llamagen::Gpt<B>,
    inputs: &Inputs<B>,
    without: B::Tensor,
    numbers: &Numbers,
) -> Result<()> {
    let captions = inputs.given(inputs.features.clone());
    let tokens = suite.ids("forced.tokens")?;
    let forced = |conditioning: &BatchConditioning<B>| {
        let logits = teacher.forced(conditioning, &tokens)?;
        Ok::<_, Error>(logits.value().clone())
    };
    suite.floats("forced.logits", &forced(&captions)?)?;
    suite.floats("forced.logits_uncond", &forced(&inputs.given(without))?)?;

    let guidance = Some(numbers.get("guidance")?);
    let steps = teacher.token_shape().steps.len();
    let mut greedy = choices(0, 0, inputs.padding.len());
    let distribution = Distribution {
        guidance,
        top_k: 1,
        ..Default::default()
    };
    let mut choice = Choice::Random(&mut greedy);
    let ids = autoregressive(teacher, &captions, &distribution, &mut choice, None, steps)?;
    suite.tokens("greedy.tokens", &ids)?;
    let mut choice = Choice::Flow {
        noise: &inputs.noise,
        codebook: &inputs.codebook,
        solver: FlowSolver::default(),
    };
    let distribution = Distribution {
        guidance,
        ..Default::default()
    };
    let path = autoregressive(teacher, &captions, &distribution, &mut choice, None, steps)?;
    suite.tokens("trajectory.tokens", &path)
}

/// Passes of the student over the trajectory, and its samples in two steps.
fn student_on_captions<B: Backend>(
    suite: &mut Suite<'_, B>,
    student: &llamagen::GptStudent<B>,
    inputs: &Inputs<B>,
    numbers: &Numbers,
) -> Result<()> {
    let (noise, codebook) = (&inputs.noise, &inputs.codebook);
    let captions = inputs.given(inputs.features.clone());
    let (n, steps) = (inputs.padding.len(), student.token_shape().steps.len());
    let path = suite.ids("trajectory.tokens")?;
    let middle: usize = numbers.get("t_mid")?;
    for t in [0, middle] {
        let known = B::narrow(&B::rows(codebook, &path)?, 1, 0, t.max(1))?;
        let left = B::narrow(noise, 1, t, steps - t)?;
        let x = if t == 0 {
            left
        } else {
            B::cat(&[&known, &left], 1)?
        };
        let data: Vec<u32> = (0..n * steps).map(|i| u32::from(i % steps < t)).collect();
        let data = suite.backend.indices(&data, &[n, steps])?;
        let prediction = student.predict(&x, &captions, &data)?;
        suite.floats(&format!("student.t{t}.logits"), prediction.logits.value())?;
        let continuous = student.continuous(&prediction)?;
        suite.floats(&format!("student.t{t}.continuous"), continuous.value())?;
    }
    suite.chosen = true;
    let sampler = StudentSampler {
        student,
        codebook,
        split: numbers.get("split_t")?,
    };
    let latents = sampler.sample(noise, &captions, &[0, middle])?;
    suite.floats("two_step.latents", &latents)?;
    suite.chosen = false;
    Ok(())
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
    // Together, hence padded to the longest.
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
    let labels = BatchConditioning::Classes(suite.ids("var.labels")?);
    let logits = teacher.forced(&labels, &suite.ids("var.tokens")?)?;
    suite.floats("var.logits", logits.value())
}
