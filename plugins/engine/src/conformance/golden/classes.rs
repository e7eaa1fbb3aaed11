//! Teacher, student, samplers and tokenizer of each family, conditioned on classes.

use std::path::Path;

use super::{Numbers, Parts, Suite, TOLERANCE, relative_error};
use crate::backend::{Backend, FlowSolver};
use crate::conformance::Case;
use crate::error::{Error, Result};
use crate::model::autoencoder::Shape;
use crate::model::{
    BatchConditioning, ConditioningShape, PrefixMask, Student, Teacher, Tokenizer, llamagen, msvq,
    var, vq,
};
use crate::sampler::{Assistant, Choice, Distribution, StudentSampler, autoregressive, choices};
use crate::size::Sides;
use crate::tape::Variable;
use crate::weights::{self, Loader, ParameterSource};

/// The networks of a family.
struct Networks<'a, B: Backend> {
    teacher: &'a dyn Teacher<B>,
    student: &'a dyn Student<B>,
    tokenizer: &'a dyn Tokenizer<B>,
    /// Guidance of the trajectories, as in their names.
    guidance: [&'a str; 2],
    /// Whether decoded images are clamped where they are not shown in [0, 1].
    clamps: bool,
}

/// Compares teacher, student, samplers and tokenizer of LlamaGen.
pub(super) fn llamagen<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
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
        map: Sides::square(side),
        condition: ConditioningShape::Classes(numbers.get("num_classes")?),
    };
    let multipliers: Vec<usize> = numbers.get("ch_mult")?;
    let tokenizer = vq::Config {
        autoencoder: Shape {
            image_channels: 3,
            image_size: Sides::square(side << (multipliers.len() - 1)),
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
pub(super) fn var_networks(numbers: &Numbers) -> Result<(var::Config, msvq::Config)> {
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
pub(super) fn var<B: Backend>(backend: &B, dir: &Path) -> Result<Vec<Case>> {
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

/// Compares cases that `var` lacks: blocks with shared modulation against blocks that each have the same one, and generation
/// scale by scale against teacher forcing; both without L2-normalised attention.
pub(super) fn var_variants<B: Backend>(backend: &B) -> Result<Vec<Case>> {
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
    let teacher = |config: &var::Config, source: ParameterSource<'_, B>| {
        let mut loader = Loader::new(backend, ParameterSource::Init(1), false, "quantiser");
        let quantiser = msvq::Quantiser::load(&mut loader, &tokenizer)?;
        let mut loader = Loader::new(backend, source, false, "variant");
        let teacher = var::Transformer::load(&mut loader, config, quantiser)?;
        Ok::<_, Error>((teacher, weights::from_params(&loader.into_params())?))
    };
    let (shared_teacher, mut weights) = teacher(&shared, ParameterSource::Init(2))?;
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
    let (own_teacher, _) = teacher(&own, ParameterSource::Host(&weights))?;

    let shape = own.token_shape();
    let (n, l) = (2, shape.count());
    let ids: Vec<u32> = (0..n * l).map(|i| (i * 7 % 12) as u32).collect();
    let tokens = backend.indices(&ids, &[n, l])?;
    let labels = BatchConditioning::Classes(backend.indices(&[1, 4], &[n])?);
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

/// The comparisons of every family: all tensors of `expected.safetensors`.
fn compare<B: Backend>(
    suite: &mut Suite<'_, B>,
    networks: &Networks<'_, B>,
    numbers: &Numbers,
) -> Result<()> {
    let inputs = Inputs::of(suite, networks)?;
    compare_teacher(suite, networks, &inputs)?;
    compare_student(suite, networks, &inputs, numbers)?;
    compare_sampler(suite, networks, &inputs, numbers)?;
    compare_tokenizer(suite, networks, &inputs)?;
    suite.expected.all_seen(None)
}

/// Inputs of the networks.
struct Inputs<B: Backend> {
    codebook: B::Tensor,
    /// How many samples, and their classes.
    count: usize,
    labels: BatchConditioning<B>,
    tokens: B::Tensor,
    noise: B::Tensor,
}

impl<B: Backend> Inputs<B> {
    fn of(suite: &mut Suite<'_, B>, networks: &Networks<'_, B>) -> Result<Self> {
        let classes = suite.expected.indices("labels")?;
        let count = classes.len();
        Ok(Self {
            codebook: networks.tokenizer.codebook()?,
            count,
            labels: BatchConditioning::Classes(suite.backend.indices(&classes, &[count])?),
            tokens: suite.ids("forced.tokens")?,
            noise: suite.tensor("student.noise")?,
        })
    }
}

impl<B: Backend> Networks<'_, B> {
    /// The images of vectors.
    fn decode(&self, latents: B::Tensor) -> Result<B::Tensor> {
        let images = self.tokenizer.decode(&Variable::constant(latents))?;
        Ok(images.value().clone())
    }
}

/// The most likely tokens.
fn greedy(guidance: f64) -> Distribution {
    Distribution {
        guidance: Some(guidance),
        top_k: 1,
        ..Default::default()
    }
}

/// Teacher-forced logits; greedy generation and trajectories, both with guidance.
fn compare_teacher<B: Backend>(
    suite: &mut Suite<'_, B>,
    networks: &Networks<'_, B>,
    inputs: &Inputs<B>,
) -> Result<()> {
    let (teacher, codebook) = (networks.teacher, &inputs.codebook);
    let (labels, n) = (&inputs.labels, inputs.count);
    let shape = teacher.token_shape();
    let ConditioningShape::Classes(unconditional) = shape.condition else {
        return Err(Error::Internal("a model of classes has none".into()));
    };
    let uncond = vec![unconditional as u32; n];
    let uncond = BatchConditioning::Classes(suite.backend.indices(&uncond, &[n])?);
    suite.floats(
        "forced.logits",
        teacher.forced(labels, &inputs.tokens)?.value(),
    )?;
    suite.floats(
        "forced.logits_uncond",
        teacher.forced(&uncond, &inputs.tokens)?.value(),
    )?;

    suite.chosen = true;
    let steps = shape.steps.len();
    let distribution = greedy(suite.expected.number("greedy.cfg")?);
    let mut sequences = choices(0, 0, n);
    let mut choice = Choice::Random(&mut sequences);
    let ids = autoregressive(teacher, labels, &distribution, &mut choice, None, steps)?;
    suite.tokens("greedy.tokens", &ids)?;
    suite.image("greedy", &networks.decode(B::rows(codebook, &ids)?)?)?;

    for w in networks.guidance {
        let distribution = Distribution {
            guidance: w.parse().ok(),
            ..Default::default()
        };
        let mut choice = Choice::Flow {
            noise: &inputs.noise,
            codebook,
            solver: FlowSolver::default(),
        };
        let ids = autoregressive(teacher, labels, &distribution, &mut choice, None, steps)?;
        suite.tokens(&format!("trajectory.cfg{w}.tokens"), &ids)?;
        let images = networks.decode(B::rows(codebook, &ids)?)?;
        suite.image(&format!("trajectory.cfg{w}"), &images)?;
    }
    Ok(())
}

/// Passes of the student from noise and from known tokens.
fn compare_student<B: Backend>(
    suite: &mut Suite<'_, B>,
    networks: &Networks<'_, B>,
    inputs: &Inputs<B>,
    numbers: &Numbers,
) -> Result<()> {
    let (student, n) = (networks.student, inputs.count);
    let shape = networks.teacher.token_shape();
    let (middle, l): (usize, usize) = (numbers.get("t_mid")?, shape.count());
    suite.chosen = false;
    for t in [0, middle] {
        let x = suite.tensor(&format!("student.t{t}.input"))?;
        let known = shape.tokens_before(t);
        let data: Vec<u32> = (0..n * l).map(|i| u32::from(i % l < known)).collect();
        let data = suite.backend.indices(&data, &[n, l])?;
        let prediction = student.predict(&x, &inputs.labels, &data)?;
        suite.floats(&format!("student.t{t}.logits"), prediction.logits.value())?;
        suite.floats(
            &format!("student.t{t}.continuous"),
            student.continuous(&prediction)?.value(),
        )?;
    }
    Ok(())
}

/// Samples of the student: one step, two steps, two assisted by the teacher.
fn compare_sampler<B: Backend>(
    suite: &mut Suite<'_, B>,
    networks: &Networks<'_, B>,
    inputs: &Inputs<B>,
    numbers: &Numbers,
) -> Result<()> {
    let middle: usize = numbers.get("t_mid")?;
    let (noise, labels) = (&inputs.noise, &inputs.labels);
    let sampler = StudentSampler {
        student: networks.student,
        codebook: &inputs.codebook,
        split: numbers.get("split_t")?,
    };
    suite.chosen = true;
    for (name, timesteps) in [("one_step", vec![0]), ("two_step", vec![0, middle])] {
        let latents = sampler.sample(noise, labels, &timesteps)?;
        suite.floats(&format!("{name}.latents"), &latents)?;
        suite.image(name, &networks.decode(latents)?)?;
    }
    let mut sequences = choices(0, 0, inputs.count);
    let assistant = Assistant {
        teacher: networks.teacher,
        start: numbers.get("t_teacher_start")?,
        distribution: &greedy(2.0),
        mask: PrefixMask::Causal,
    };
    let mut choice = Choice::Random(&mut sequences);
    let (latents, prefix) =
        sampler.assisted(noise, labels, [0, middle], &assistant, &mut choice)?;
    suite.floats("assisted.prefix_latents", &prefix)?;
    suite.floats("assisted.latents", &latents)?;
    suite.image("assisted", &networks.decode(latents)?)
}

/// Tokens of an image, and images of tokens.
fn compare_tokenizer<B: Backend>(
    suite: &mut Suite<'_, B>,
    networks: &Networks<'_, B>,
    inputs: &Inputs<B>,
) -> Result<()> {
    suite.chosen = false;
    let image = suite.tensor("tokenizer.image")?;
    let tokens = networks.tokenizer.encode(&image)?;
    suite.tokens("tokenizer.tokens_of_image", &tokens)?;
    let images = networks.decode(B::rows(&inputs.codebook, &inputs.tokens)?)?;
    let mut pixels = B::to_floats(&images)?;
    if networks.clamps {
        pixels.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
    }
    suite.values("tokenizer.image_of_tokens", &B::shape(&images), &pixels)
}
