//! Teacher, student, samplers and tokenizer of each family, conditioned on classes.

use std::path::Path;

use super::{Numbers, Parts, Suite, TOLERANCE, relative_error};
use crate::backend::{Backend, FlowSolver};
use crate::conformance::Case;
use crate::error::{Error, Result};
use crate::model::autoencoder::Shape;
use crate::model::{
    ConditionShape, Conditions, PrefixMask, Student, Teacher, Tokenizer, llamagen, msvq, var, vq,
};
use crate::sampler::{Assistant, Choice, Distribution, StudentSampler, autoregressive, choices};
use crate::tape::Variable;
use crate::weights::{self, Loader, Source};

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

/// Compares what `var` does not hold: blocks that share their modulation with blocks that have the same one each,
/// and generation scale by scale with teacher forcing; both without L2-normalised attention.
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
