//! The phases of distillation on a backend.

use std::time::Instant;

use retort_engine::backend::{AdamwStep, Backend, Unary, flow};
use retort_engine::error::Result;
use retort_engine::model::{BatchConditioning, Guidance, Teacher};
use retort_engine::random::noise;
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{Loader, ParameterSource};

use super::clock::{least, repetitions};
use super::reference::{Drawn, Phase, Reference, SOLVER};

/// Guidance scale of the teachers: two rows of the batch per image.
const GUIDANCE: f64 = 2.0;

/// A backend under a name.
pub struct BackendRun<B: Backend> {
    /// The head of its column.
    pub name: String,
    /// The backend.
    pub backend: B,
}

impl<B: Backend> BackendRun<B> {
    /// Waits until a tensor is computed.
    pub(crate) fn wait(x: &B::Tensor) -> Result<()> {
        let rank = B::shape(x).len();
        let first = (0..rank).try_fold(x.clone(), |x, d| B::narrow(&x, d, 0, 1))?;
        B::to_floats(&first).map(drop)
    }

    /// Seconds of the teacher and of the flow map in one generation.
    fn generation(
        &self,
        teacher: &dyn Teacher<B>,
        codebook: &B::Tensor,
        batch: usize,
    ) -> Result<[f64; 2]> {
        let shape = teacher.token_shape();
        let labels: Vec<u32> = (0..batch as u32).collect();
        let labels = BatchConditioning::Classes(self.backend.indices(&labels, &[batch])?);
        let guidance = Guidance {
            scale: GUIDANCE,
            interval: None,
        };
        let mut generation = teacher.generate(&labels, Some(guidance))?;
        let (mut seconds, mut previous, mut sample) = ([0.0; 2], None, 0);
        for &count in &shape.steps {
            let eps: Vec<f32> = noise(5, sample, batch * count, shape.dim);
            let eps = self.backend.floats(&eps, &[batch * count, shape.dim])?;
            sample += 1;
            let clock = Instant::now();
            let logits = generation.advance(previous.as_ref())?;
            Self::wait(&logits)?;
            seconds[0] += clock.elapsed().as_secs_f64();
            let clock = Instant::now();
            let logits = B::reshape(&logits, &[batch * count, shape.vocabulary])?;
            let ids = B::flow_map(&logits, &eps, codebook, &SOLVER)?;
            previous = Some(B::reshape(&ids, &[batch, count])?);
            B::to_indices(&ids)?;
            seconds[1] += clock.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }

    /// Seconds of the flow map of `n` tokens, fused or in plain operations.
    fn map(&self, r: &Reference, n: usize, plain: bool) -> Result<f64> {
        let (k, d) = r.tokenizer.codebook();
        let floats = |seed, rows, scale: f32| {
            let data: Vec<f32> = noise(seed, 0, rows, d).iter().map(|x| scale * x).collect();
            self.backend.floats(&data, &[rows, d])
        };
        // Codes of about unit length, like LlamaGen's.
        let codebook = floats(1, k, (d as f32).sqrt().recip())?;
        let eps = floats(2, n, 1.0)?;
        let logits: Vec<f32> = noise(3, 0, n, k).iter().map(|x| 2.0 * x).collect();
        let logits = self.backend.floats(&logits, &[n, k])?;
        least(|| {
            let ids = if plain {
                flow::composed::<B>(&logits, &eps, &codebook, &SOLVER)?
            } else {
                B::flow_map(&logits, &eps, &codebook, &SOLVER)?
            };
            B::to_indices(&ids).map(drop)
        })
    }

    /// Seconds of a training step of the student.
    pub(crate) fn train(&self, r: &Reference, drawn: &Drawn) -> Result<f64> {
        let mut loader = Loader::new(
            &self.backend,
            ParameterSource::Host(&drawn.student),
            true,
            "drawn",
        );
        let student = r.network.student(&mut loader)?;
        let params = loader.into_params();
        let zeros = |(_, p): &(String, Variable<B>)| self.backend.full(&p.shape(), 0.0);
        let first: Vec<_> = params.iter().map(zeros).collect::<Result<_>>()?;
        let second: Vec<_> = params.iter().map(zeros).collect::<Result<_>>()?;
        let numbers = AdamwStep {
            lr: 1e-5,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.01,
            correction1: 0.1,
            correction2: 0.05,
            grad_scale: 1.0,
        };
        let (b, shape) = (r.batch, r.network.token_shape());
        let (l, k) = (shape.count(), shape.vocabulary);
        let (eps, labels, kinds) = self.inputs(r)?;
        let targets: Vec<u32> = (0..b * l).map(|i| (i * 37 % k) as u32).collect();
        let targets = self.backend.indices(&targets, &[b * l])?;
        least(|| {
            let prediction = student.predict(&eps, &labels, &kinds)?;
            let continuous = student.continuous(&prediction)?;
            let loss = prediction
                .logits
                .reshape(&[b * l, k])?
                .cross_entropy(&targets)?
                .add(&continuous.unary(Unary::Square)?.mean_all()?)?;
            drop((prediction, continuous));
            let gradients = backward(loss, &params)?;
            for ((((_, p), m), v), g) in params.iter().zip(&first).zip(&second).zip(&gradients) {
                B::adamw_(p.value(), m, v, g, &numbers)?;
            }
            Self::wait(params[0].1.value())
        })
    }

    /// Noise (b, L, D), class ids (b), and that all of it is noise (b, L).
    pub(crate) fn inputs(
        &self,
        r: &Reference,
    ) -> Result<(B::Tensor, BatchConditioning<B>, B::Tensor)> {
        let (b, shape) = (r.batch, r.network.token_shape());
        let l = shape.count();
        let labels: Vec<u32> = (0..b as u32).collect();
        Ok((
            self.backend
                .floats(&noise(5, 0, b * l, shape.dim), &[b, l, shape.dim])?,
            BatchConditioning::Classes(self.backend.indices(&labels, &[b])?),
            self.backend.indices(&vec![0; b * l], &[b, l])?,
        ))
    }

    /// Seconds of a reference's phases, in order.
    pub(super) fn phases(
        &self,
        r: &Reference,
        drawn: &Drawn,
        phases: &[Phase],
    ) -> Result<Vec<f64>> {
        let frozen = |weights| {
            Loader::new(
                &self.backend,
                ParameterSource::Host(weights),
                false,
                "drawn",
            )
        };
        let tokenizer = r.tokenizer.build(&mut frozen(&drawn.tokenizer))?;
        let wanted = |phase| phases.contains(&phase);
        let generation = if wanted(Phase::Teacher) || wanted(Phase::Flow) {
            let codes = (&r.tokenizer, &mut frozen(&drawn.tokenizer));
            let teacher = r.network.teacher(&mut frozen(&drawn.teacher), codes)?;
            let codebook = tokenizer.codebook()?;
            let mut least = self.generation(&*teacher, &codebook, r.batch)?;
            for _ in 1..repetitions(least[0]) {
                let next = self.generation(&*teacher, &codebook, r.batch)?;
                least = [least[0].min(next[0]), least[1].min(next[1])];
            }
            least
        } else {
            [0.0; 2]
        };
        let mut all = Vec::with_capacity(phases.len());
        for &phase in phases {
            all.push(match phase {
                Phase::Teacher => generation[0],
                Phase::Flow => generation[1],
                Phase::Student => {
                    let student = r.network.student(&mut frozen(&drawn.student))?;
                    let (eps, labels, kinds) = self.inputs(r)?;
                    least(|| {
                        let prediction = student.predict(&eps, &labels, &kinds)?;
                        Self::wait(prediction.logits.value())?;
                        Self::wait(student.continuous(&prediction)?.value())
                    })?
                }
                Phase::Decode => {
                    let latents = Variable::constant(self.inputs(r)?.0.clone());
                    least(|| Self::wait(tokenizer.decode(&latents)?.value()))?
                }
                Phase::Train => self.train(r, drawn)?,
                Phase::Map(n) => self.map(r, n, false)?,
                Phase::Plain(n) => self.map(r, n, true)?,
            });
        }
        Ok(all)
    }
}
