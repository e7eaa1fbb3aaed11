//! Networks whose products round to bf16, beside the same networks in f32.

use retort_engine::Result;
use retort_engine::backend::{Backend, Unary};
use retort_engine::model::{BatchConditioning, ConditioningShape, Student, llamagen};
use retort_engine::random::noise;
use retort_engine::size::Sides;
use retort_engine::tape::backward;
use retort_engine::weights::{Loader, ParameterSource, Weights};

use crate::agreement::drawn;

const BATCH: usize = 4;

fn config() -> llamagen::Config {
    llamagen::Config {
        width: 64,
        depth: 4,
        heads: 4,
        vocabulary: 100,
        codebook_dim: 8,
        map: Sides::square(6),
        condition: ConditioningShape::Classes(10),
    }
}

/// Relative distances between the results of two precisions.
#[derive(Debug, Clone, Copy)]
pub struct Apart {
    /// Of the logits.
    pub logits: f64,
    /// Of the gradients of the parameter for which it is largest.
    pub worst_gradient: f64,
}

impl Apart {
    /// Asserts that something was rounded, and not too much. bf16 has 8 bits: single products are off by 2^-9, a network of this
    /// depth by a few of them.
    pub fn check(self) {
        assert!(self.logits > 1e-4, "nothing was rounded: {self:?}");
        assert!(
            self.logits < 1e-2 && self.worst_gradient < 5e-2,
            "too far apart: {self:?}"
        );
    }
}

/// How far a student's logits and gradients with rounded products are from those without.
pub fn student<B: Backend>(full: &B, rounded: &B) -> Result<Apart> {
    let weights = drawn(full, |loader: &mut Loader<'_, B>| {
        llamagen::GptStudent::load(loader, &config())
    })?;
    let (logits, gradients) = results(full, &weights)?;
    let (rounded_logits, rounded_gradients) = results(rounded, &weights)?;
    let pairs = gradients.iter().zip(&rounded_gradients);
    Ok(Apart {
        logits: distance(&logits, &rounded_logits),
        worst_gradient: pairs.map(|(x, y)| distance(x, y)).fold(0.0, f64::max),
    })
}

/// Logits of a student with constant weights, and the gradients of a step with trainable ones.
fn results<B: Backend>(backend: &B, weights: &Weights) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let c = config();
    let (l, d) = (c.map.area(), c.codebook_dim);
    let eps: Vec<f32> = (0..BATCH as u64).flat_map(|i| noise(5, i, l, d)).collect();
    let eps = backend.floats(&eps, &[BATCH, l, d])?;
    let labels = BatchConditioning::Classes(backend.indices(&[1, 2, 3, 4], &[BATCH])?);
    let kinds = backend.indices(&vec![0; BATCH * l], &[BATCH, l])?;
    let ids: Vec<u32> = (0..BATCH * l).map(|i| i as u32 * 7 % 100).collect();
    let ids = backend.indices(&ids, &[BATCH * l])?;

    let mut loader = Loader::new(backend, ParameterSource::Host(weights), false, "drawn");
    let network = llamagen::GptStudent::load(&mut loader, &c)?;
    let logits = network.predict(&eps, &labels, &kinds)?.logits;
    let logits = B::to_floats(logits.value())?;

    let mut loader = Loader::new(backend, ParameterSource::Host(weights), true, "drawn");
    let network = llamagen::GptStudent::load(&mut loader, &c)?;
    let params = loader.into_params();
    let prediction = network.predict(&eps, &labels, &kinds)?;
    let far = network
        .continuous(&prediction)?
        .unary(Unary::Square)?
        .mean_all()?;
    let loss = prediction
        .logits
        .reshape(&[BATCH * l, c.vocabulary])?
        .cross_entropy(&ids)?
        .add(&far)?;
    drop((prediction, far, network));
    let gradients = backward(loss, &params)?;
    let gradients = gradients.iter().map(B::to_floats);
    Ok((logits, gradients.collect::<Result<_>>()?))
}

fn distance(x: &[f32], y: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let between: f64 = x.iter().zip(y).map(|(x, y)| square(x - y)).sum();
    let own: f64 = x.iter().map(|&x| square(x)).sum();
    (between / own).sqrt()
}
