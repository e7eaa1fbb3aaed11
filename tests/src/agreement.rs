//! Two backends on the same networks: what one computes, the other must compute.
//!
//! The networks are small and have random weights, drawn by the engine, so both backends hold the same numbers. Outputs
//! agree within 1e-4 of their largest magnitude, tokens exactly, and the loss and every gradient of a training step
//! within 1e-3.

use std::collections::BTreeMap;

use retort_engine::Result;
use retort_engine::backend::{Backend, FlowSolver, Unary};
use retort_engine::conformance::Case;
use retort_engine::model::autoencoder::Shape;
use retort_engine::model::{
    BatchConditioning, ConditioningShape, Student, Teacher, Tokenizer, llamagen, vq,
};
use retort_engine::random::{Sequence, Stream, noise};
use retort_engine::sampler::{Choice, Distribution, autoregressive};
use retort_engine::size::Sides;
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{self, Loader, ParameterSource, Params, Weights};

/// Images per batch.
const BATCH: usize = 6;

/// A backend's results.
struct Found {
    data: Vec<f32>,
    /// The largest difference from another backend, relative to `scale`.
    tolerance: f64,
    /// The largest magnitude.
    scale: f64,
}

type Results = BTreeMap<String, Found>;

/// Computes everything on both backends and compares.
pub fn compare<A: Backend, B: Backend>(a: &A, b: &B) -> Result<Vec<Case>> {
    let (first, second) = (results(a)?, results(b)?);
    assert!(
        first.keys().eq(second.keys()),
        "the same things were computed"
    );
    Ok(first
        .into_iter()
        .map(|(name, x)| {
            let y = &second[&name];
            assert_eq!(x.data.len(), y.data.len(), "size of {name}");
            assert!(x.scale > 0.0, "{name} says something");
            let pairs = x.data.iter().zip(&y.data);
            let difference = pairs.fold(0.0f64, |m, (x, y)| m.max(f64::from((x - y).abs())));
            Case::new(name, difference / x.scale, x.tolerance)
        })
        .collect())
}

/// The share of tokens that differ between the trajectories of two backends, of 1600.
pub fn tokens<A: Backend, B: Backend>(a: &A, b: &B, allowed: f64) -> Result<Case> {
    fn path<B: Backend>(backend: &B, weights: &[Weights; 2]) -> Result<Vec<u32>> {
        let (c, count) = (network(), 64);
        let constant =
            |weights| Loader::new(backend, ParameterSource::Host(weights), false, "drawn");
        let teacher = llamagen::Gpt::load(&mut constant(&weights[0]), &c)?;
        let codebook = vq::VqModel::load(&mut constant(&weights[1]), &images())?.codebook()?;
        let (_, ids) = trajectories(backend, &teacher, &codebook, 9, count)?;
        B::to_indices(&ids)
    }
    let weights = [
        drawn(a, |l| llamagen::Gpt::load(l, &network()).map(drop))?,
        drawn(a, |l| vq::VqModel::load(l, &images()).map(drop))?,
    ];
    let (first, second) = (path(a, &weights)?, path(b, &weights)?);
    let others = first.iter().zip(&second).filter(|(x, y)| x != y).count();
    let name = format!("{} tokens", first.len());
    Ok(Case::new(name, others as f64 / first.len() as f64, allowed))
}

/// Noise (b, L, D), and a ten-class teacher's tokens (b, L) for it.
fn trajectories<B: Backend>(
    backend: &B,
    teacher: &dyn Teacher<B>,
    codebook: &B::Tensor,
    seed: u64,
    count: usize,
) -> Result<(B::Tensor, B::Tensor)> {
    let shape = teacher.token_shape();
    let (l, d) = (shape.count(), shape.dim);
    let eps: Vec<f32> = (0..count as u64)
        .flat_map(|i| noise(seed, i, l, d))
        .collect();
    let eps = backend.floats(&eps, &[count, l, d])?;
    let classes: Vec<u32> = (0..count as u32).map(|i| i % 10).collect();
    let labels = BatchConditioning::Classes(backend.indices(&classes, &[count])?);
    let mut choice = Choice::Flow {
        noise: &eps,
        codebook,
        solver: FlowSolver::default(),
    };
    let distribution = Distribution {
        guidance: Some(1.5),
        ..Default::default()
    };
    let steps = shape.steps.len();
    let ids = autoregressive(teacher, &labels, &distribution, &mut choice, None, steps)?;
    Ok((eps, ids))
}

fn network() -> llamagen::Config {
    llamagen::Config {
        width: 48,
        depth: 3,
        heads: 4,
        vocabulary: 50,
        codebook_dim: 5,
        map: Sides::square(5),
        condition: ConditioningShape::Classes(10),
    }
}

fn images() -> vq::Config {
    vq::Config {
        autoencoder: Shape {
            image_channels: 3,
            image_size: Sides::square(10),
            channels: 16,
            multipliers: vec![1, 2],
            res_blocks: 1,
            norm_groups: 8,
            z_channels: 12,
        },
        vocabulary: 50,
        codebook_dim: 5,
        l2_norm: true,
    }
}

/// A tokenizer with maps large enough for a backend's special code for large maps.
fn large_images() -> vq::Config {
    let small = images();
    vq::Config {
        autoencoder: Shape {
            image_size: Sides::square(72),
            channels: 32,
            res_blocks: 2,
            ..small.autoencoder
        },
        ..small
    }
}

/// Weights of a network: as it draws them, but none of them constant.
pub fn drawn<B: Backend, M>(
    backend: &B,
    build: impl Fn(&mut Loader<'_, B>) -> Result<M>,
) -> Result<Weights> {
    let mut loader = Loader::new(backend, ParameterSource::Init(7), true, "drawn");
    build(&mut loader)?;
    let mut all = weights::from_params(&loader.into_params())?;
    for (i, w) in all.values_mut().enumerate() {
        let mut more = vec![0.0; w.data.len()];
        Sequence::new(11, Stream::Init, i as u64).normals(&mut more);
        w.data
            .iter_mut()
            .zip(more)
            .for_each(|(w, m)| *w += 0.05 * m);
    }
    Ok(all)
}

fn results<B: Backend>(backend: &B) -> Result<Results> {
    let (c, v) = (network(), images());
    let l = c.map.area();
    let mut found = Results::new();
    let [teacher_weights, student_weights, image_weights] = [
        drawn(backend, |l| llamagen::Gpt::load(l, &c).map(drop))?,
        drawn(backend, |l| llamagen::GptStudent::load(l, &c).map(drop))?,
        drawn(backend, |l| vq::VqModel::load(l, &v).map(drop))?,
    ];
    let constant = |weights| Loader::new(backend, ParameterSource::Host(weights), false, "drawn");
    let teacher = llamagen::Gpt::load(&mut constant(&teacher_weights), &c)?;
    let tokenizer = vq::VqModel::load(&mut constant(&image_weights), &v)?;
    let codebook = tokenizer.codebook()?;

    let classes: Vec<u32> = (0..BATCH as u32).map(|i| i % 10).collect();
    let labels = BatchConditioning::Classes(backend.indices(&classes, &[BATCH])?);
    let mut choice = Sequence::new(3, Stream::Choice, 0);
    let ids: Vec<u32> = (0..BATCH * l).map(|_| choice.below(50) as u32).collect();
    let tokens = backend.indices(&ids, &[BATCH, l])?;
    keep::<B>(
        &mut found,
        "teacher/logits",
        teacher.forced(&labels, &tokens)?.value(),
        1e-4,
    )?;

    // Trajectories, and their tokens' images.
    let (eps, path) = trajectories(backend, &teacher, &codebook, 5, BATCH)?;
    let same: Vec<f32> = B::to_indices(&path)?.iter().map(|&id| id as f32).collect();
    keep::<B>(
        &mut found,
        "trajectories/tokens",
        &backend.floats(&same, &[BATCH * l])?,
        0.0,
    )?;
    let latents = Variable::constant(B::rows(&codebook, &path)?);
    let decoded = tokenizer.decode(&latents)?;
    keep::<B>(&mut found, "tokenizer/images", decoded.value(), 1e-4)?;
    let again = tokenizer.encode(decoded.value())?;
    let again: Vec<f32> = B::to_indices(&again)?.iter().map(|&id| id as f32).collect();
    keep::<B>(
        &mut found,
        "tokenizer/tokens",
        &backend.floats(&again, &[BATCH * l])?,
        0.0,
    )?;

    // A training step of the student, from an intermediate timestep.
    let known = 7;
    let kinds: Vec<u32> = (0..BATCH * l).map(|i| u32::from(i % l < known)).collect();
    let kinds = backend.indices(&kinds, &[BATCH, l])?;
    let mut loader = Loader::new(
        backend,
        ParameterSource::Host(&student_weights),
        true,
        "drawn",
    );
    let student = llamagen::GptStudent::load(&mut loader, &c)?;
    let params = loader.into_params();
    let prediction = student.predict(&eps, &labels, &kinds)?;
    let continuous = student.continuous(&prediction)?;
    keep::<B>(
        &mut found,
        "student/logits",
        prediction.logits.value(),
        1e-4,
    )?;
    keep::<B>(&mut found, "student/continuous", continuous.value(), 1e-4)?;
    let flat = B::reshape(&path, &[BATCH * l])?;
    let image_loss = distance(&tokenizer.decode(&continuous)?, &decoded)?;
    let loss = prediction
        .logits
        .reshape(&[BATCH * l, 50])?
        .cross_entropy(&flat)?
        .add(&image_loss)?;
    drop((prediction, continuous, image_loss, student));
    keep::<B>(&mut found, "student/loss", loss.value(), 1e-3)?;
    gradients(&mut found, loss, &params)?;

    large_image(&mut found, backend)?;
    tokenizer_step(&mut found, backend, &image_weights, &decoded)?;
    Ok(found)
}

/// Decodes an image of 36 x 36 tokens.
fn large_image<B: Backend>(found: &mut Results, backend: &B) -> Result<()> {
    let large = large_images();
    let weights = drawn(backend, |l| vq::VqModel::load(l, &large).map(drop))?;
    let mut loader = Loader::new(backend, ParameterSource::Host(&weights), false, "drawn");
    let tokenizer = vq::VqModel::load(&mut loader, &large)?;
    let (l, d) = (36 * 36, large.codebook_dim);
    let latents = backend.floats(&noise(6, 0, l, d), &[1, l, d])?;
    let images = tokenizer.decode(&Variable::constant(latents))?;
    keep::<B>(found, "tokenizer/large", images.value(), 1e-4)
}

/// A training step of the tokenizer.
fn tokenizer_step<B: Backend>(
    found: &mut Results,
    backend: &B,
    weights: &Weights,
    target: &Variable<B>,
) -> Result<()> {
    let mut loader = Loader::new(backend, ParameterSource::Host(weights), true, "drawn");
    let trained = vq::VqModel::load(&mut loader, &images())?;
    let params = loader.into_params();
    let result = trained.reconstruct(target.value())?;
    let loss = distance(&result.images, target)?
        .add(&result.codebook_loss)?
        .add(&result.commitment_loss)?;
    drop((result, trained));
    keep::<B>(found, "tokenizer/loss", loss.value(), 1e-3)?;
    gradients(found, loss, &params)
}

/// Stores a result.
fn keep<B: Backend>(found: &mut Results, name: &str, x: &B::Tensor, tolerance: f64) -> Result<()> {
    let data = B::to_floats(x)?;
    let scale = magnitude(&data);
    let result = Found {
        data,
        tolerance,
        scale,
    };
    found.insert(name.into(), result);
    Ok(())
}

/// Mean squared distance.
fn distance<B: Backend>(a: &Variable<B>, b: &Variable<B>) -> Result<Variable<B>> {
    a.sub(b)?.unary(Unary::Square)?.mean_all()
}

/// Stores the gradients of a loss. Some are zero in exact arithmetic (a shift of all keys) and only rounding in floats, so none
/// is compared more finely than a thousandth of the largest.
fn gradients<B: Backend>(found: &mut Results, loss: Variable<B>, params: &Params<B>) -> Result<()> {
    let all = backward(loss, params)?
        .iter()
        .map(B::to_floats)
        .collect::<Result<Vec<_>>>()?;
    let largest = all.iter().fold(0.0f64, |m, g| m.max(magnitude(g)));
    for ((name, _), data) in params.iter().zip(all) {
        let scale = magnitude(&data).max(1e-3 * largest);
        let result = Found {
            data,
            tolerance: 1e-3,
            scale,
        };
        found.insert(format!("gradient/{name}"), result);
    }
    Ok(())
}

fn magnitude(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |m, x| m.max(f64::from(x.abs())))
}
