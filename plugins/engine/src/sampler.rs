//! Sampling, as in Distilled Decoding (arXiv 2412.17153, section 3 and its released inference): the teacher's own AR
//! sampler, its flow map, k-step sampling with a student, and the teacher-assisted mixture.
//!
//! b samples, L tokens, K codes of dimension D. Random choices are drawn on the host, one sequence per sample, so a sample
//! does not depend on its batch.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::{Backend, FlowSolver, Truncation};
use crate::error::{Error, Result};
use crate::finite::FiniteCheck;
use crate::model::resize::bicubic_planes;
use crate::model::{
    BatchConditioning, Guidance, PrefixMask, Student, Teacher, TokenShape, vq::nearest,
};
use crate::random::{Sequence, Stream};
use crate::splice::TrajectoryState;
use crate::tape::Variable;

/// How an AR teacher's distribution is formed before a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Distribution {
    /// Strength of classifier-free guidance, as each family defines it; none, if left out. LlamaGen: s in
    /// uncond + s (cond - uncond), where 1 or less is none. VAR: w, by which the logits of scale k of S, counted from 0, are
    /// (1 + t) cond - t uncond with t = w k / (S - 1), where 0 is none.
    pub guidance: Option<f64>,
    /// Number of the last guided AR step, counted from 0 at the one after the first that the teacher samples: later ones have
    /// no guidance. All are guided, if left out. As LlamaGen's `cfg_interval`, where -1 leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cfg_interval: Option<usize>,
    /// Logits are divided by this.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
    /// Only the k most probable codes stay, and those that are as probable as the last of them; 0 keeps all.
    pub top_k: usize,
    /// Only the most probable codes whose probabilities sum to this stay, the first over the sum included; 1 keeps all.
    #[schemars(range(min = 0, max = 1))]
    pub top_p: f64,
}

impl Default for Distribution {
    fn default() -> Self {
        Self {
            guidance: None,
            cfg_interval: None,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
        }
    }
}

impl Distribution {
    fn truncates(&self, vocabulary: usize) -> bool {
        self.temperature != 1.0 || (1..vocabulary).contains(&self.top_k) || self.top_p < 1.0
    }

    /// Its guidance, in the form that teachers use.
    pub fn guided(&self) -> Option<Guidance> {
        self.guidance.map(|scale| Guidance {
            scale,
            interval: self.cfg_interval,
        })
    }

    /// Its truncation of a row of logits.
    fn truncation(&self) -> Truncation {
        Truncation {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        }
    }
}

/// How tokens are chosen from logits.
pub enum Choice<'a, B: Backend> {
    /// Drawn at random: one sequence per sample of the batch.
    Random(&'a mut [Sequence]),
    /// By the flow map from noise (b, L, D).
    Flow {
        /// Noise (b, L, D).
        noise: &'a B::Tensor,
        /// Codebook (K, D).
        codebook: &'a B::Tensor,
        /// The solver's numbers.
        solver: FlowSolver,
    },
}

/// Sequences of random choices for samples `first..first + count`.
pub fn choices(seed: u64, first: u64, count: usize) -> Vec<Sequence> {
    (first..first + count as u64)
        .map(|i| Sequence::new(seed, Stream::Choice, i))
        .collect()
}

/// Tokens from which a teacher continues.
pub struct Prefix<'a, B: Backend> {
    /// Tokens of the first AR steps (b, L_p).
    pub tokens: &'a B::Tensor,
    /// The mask between them.
    pub mask: PrefixMask,
}

/// The teacher's AR sampler: tokens (b, L'), where L' are the tokens of the AR steps before `end`.
///
/// A prefix is processed in the pass that yields the first token after it, so there are as many passes as AR steps whose
/// tokens are chosen. Logits that are not finite are an error that names the sample.
pub fn autoregressive<B: Backend>(
    teacher: &dyn Teacher<B>,
    conditioning: &BatchConditioning<B>,
    distribution: &Distribution,
    choice: &mut Choice<'_, B>,
    prefix: Option<Prefix<'_, B>>,
    end: usize,
) -> Result<B::Tensor> {
    let shape = teacher.token_shape();
    let given = prefix.as_ref().map_or(0, |p| B::shape(p.tokens)[1]);
    let mut generation = teacher.generate(conditioning, distribution.guided())?;
    let mut chosen: Vec<B::Tensor> = Vec::with_capacity(end);
    let (mut start, mut finite) = (given, FiniteCheck::<B>::new("the teacher's logits"));
    for step in shape.steps_within(given)..end.min(shape.steps.len()) {
        let logits = match &prefix {
            Some(prefix) if chosen.is_empty() => generation.prefill(prefix.tokens, prefix.mask)?,
            _ => generation.advance(chosen.last())?,
        }; // (b, count, K)
        finite.watch(step, &logits)?;
        chosen.push(choose::<B>(&logits, shape, distribution, choice, start)?);
        start += shape.steps[step];
    }
    finite.check()?;
    let given = prefix.iter().map(|prefix| prefix.tokens);
    B::cat(&given.chain(&chosen).collect::<Vec<_>>(), 1)
}

/// Tokens (b, L): the teacher's AR sampler up to the step `end`, then all others in one pass, each conditioned only on those
/// and guided as at its own step.
pub fn skipping<B: Backend>(
    teacher: &dyn Teacher<B>,
    conditioning: &BatchConditioning<B>,
    distribution: &Distribution,
    choice: &mut Choice<'_, B>,
    end: usize,
) -> Result<B::Tensor> {
    let shape = teacher.token_shape();
    let known = match end {
        0 => None,
        end => Some(autoregressive(
            teacher,
            conditioning,
            distribution,
            choice,
            None,
            end,
        )?),
    };
    if end >= shape.steps.len()
        && let Some(all) = known
    {
        return Ok(all);
    }
    let logits = teacher.at_once(conditioning, distribution.guided(), known.as_ref())?;
    let mut finite = FiniteCheck::<B>::new("the teacher's logits");
    finite.watch(end, &logits)?;
    finite.check()?;
    let start = shape.tokens_before(end);
    let rest = choose::<B>(&logits, shape, distribution, choice, start)?;
    match known {
        Some(known) => B::cat(&[&known, &rest], 1),
        None => Ok(rest),
    }
}

/// Ids (b, l) from logits (b, l, K) of the tokens from `start` on.
fn choose<B: Backend>(
    logits: &B::Tensor,
    shape: &TokenShape,
    distribution: &Distribution,
    choice: &mut Choice<'_, B>,
    start: usize,
) -> Result<B::Tensor> {
    let s = B::shape(logits);
    let (b, l, k) = (s[0], s[1], s[2]);
    let mut rows = B::reshape(logits, &[b * l, k])?;
    if distribution.truncates(k) {
        rows = B::truncate(&rows, &distribution.truncation())?;
    }
    let ids = match choice {
        Choice::Random(sequences) => {
            let uniforms: Vec<f64> = sequences
                .iter_mut()
                .flat_map(|s| (0..l).map(|_| s.uniform()).collect::<Vec<_>>())
                .collect();
            B::categorical(&rows, &uniforms)?
        }
        Choice::Flow {
            noise,
            codebook,
            solver,
        } => {
            let noise = B::reshape(&B::narrow(noise, 1, start, l)?, &[b * l, shape.dim])?;
            B::flow_map(&rows, &noise, codebook, solver)?
        }
    };
    B::reshape(&ids, &[b, l])
}

/// A student with its sampler's parameters.
pub struct StudentSampler<'a, B: Backend> {
    /// The student.
    pub student: &'a dyn Student<B>,
    /// Codebook (K, D).
    pub codebook: &'a B::Tensor,
    /// AR steps whose tokens are the argmax codes; later ones come from the continuous head.
    pub split: usize,
}

impl<B: Backend> StudentSampler<'_, B> {
    /// k-step sampling: latents (b, L, D) from noise (b, L, D), one pass per timestep; `timesteps` in AR steps,
    /// ascending.
    pub fn sample(
        &self,
        noise: &B::Tensor,
        conditioning: &BatchConditioning<B>,
        timesteps: &[usize],
    ) -> Result<B::Tensor> {
        let mut latents = noise.clone();
        for &t in timesteps {
            latents = self.pass(&latents, noise, conditioning, t)?;
        }
        Ok(latents)
    }

    /// One pass from timestep t: positions before it are kept, the others predicted from X_t.
    pub fn pass(
        &self,
        latents: &B::Tensor,
        noise: &B::Tensor,
        conditioning: &BatchConditioning<B>,
        t: usize,
    ) -> Result<B::Tensor> {
        let shape = self.student.token_shape();
        let (b, l, known) = (B::shape(noise)[0], shape.count(), shape.tokens_before(t));
        let x = match known {
            0 => noise.clone(),
            at if at == l => latents.clone(),
            at => {
                let held = B::narrow(latents, 1, 0, at)?;
                B::cat(&[&held, &B::narrow(noise, 1, at, l - at)?], 1)?
            }
        };
        let state = TrajectoryState {
            x,
            known: vec![known; b],
        };
        let prediction = self
            .student
            .predict(&state.x, conditioning, &state.kinds()?)?;
        let boundary = shape.tokens_before(self.split);
        let head = || self.student.continuous(&prediction);
        let sequence = state.finish(prediction.logits.value(), head, self.codebook, boundary)?;
        let mut finite = FiniteCheck::<B>::new("the student's predictions");
        finite.watch(t, prediction.logits.value())?;
        finite.watch(t, sequence.value())?;
        finite.check()?;
        Ok(sequence.value().clone())
    }

    /// Teacher-assisted sampling: the student's first pass from the first timestep, its tokens kept up to the assistant's
    /// start, the teacher's choices up to the second timestep, and the student's last pass from there.
    pub fn assisted(
        &self,
        noise: &B::Tensor,
        conditioning: &BatchConditioning<B>,
        timesteps: [usize; 2],
        assistant: &Assistant<'_, B>,
        choice: &mut Choice<'_, B>,
    ) -> Result<(B::Tensor, B::Tensor)> {
        let &Assistant {
            teacher,
            start: teacher_start,
            distribution,
            mask,
        } = assistant;
        let shape = self.student.token_shape();
        let (b, l) = (B::shape(noise)[0], shape.count());
        let kept = shape.tokens_before(teacher_start);
        // If the teacher starts at 0, nothing of the first pass would remain, so it is skipped.
        let prefix = if kept == 0 {
            None
        } else {
            let first = self.pass(noise, noise, conditioning, timesteps[0])?;
            let kept_vectors = B::narrow(&first, 1, 0, kept)?;
            let flat = B::reshape(&kept_vectors, &[b * kept, shape.dim])?;
            let tokens = nearest::<B>(&flat, self.codebook)?;
            Some(B::reshape(&tokens, &[b, kept])?)
        };
        let tokens = autoregressive(
            teacher,
            conditioning,
            distribution,
            choice,
            prefix.as_ref().map(|tokens| Prefix { tokens, mask }),
            timesteps[1],
        )?;
        let known = B::rows(self.codebook, &tokens)?; // (b, l', D)
        let done = B::shape(&known)[1];
        let latents = if done == l {
            known
        } else {
            B::cat(&[&known, &B::narrow(noise, 1, done, l - done)?], 1)?
        };
        let last = self.pass(&latents, noise, conditioning, timesteps[1])?;
        Ok((last, latents))
    }
}

/// A teacher that samples some of the tokens between a student's passes.
pub struct Assistant<'a, B: Backend> {
    /// The teacher.
    pub teacher: &'a dyn Teacher<B>,
    /// The AR step from which it samples.
    pub start: usize,
    /// Its distribution.
    pub distribution: &'a Distribution,
    /// The mask between the tokens of its prefix.
    pub mask: PrefixMask,
}

/// Whether timesteps are valid for a sampler: at least one, each later than the previous.
pub fn ascending(timesteps: &[usize]) -> bool {
    !timesteps.is_empty() && timesteps.windows(2).all(|w| w[0] < w[1])
}

/// Refuses timesteps for training a student unless they ascend from 0.
pub fn check_from_zero(timesteps: &[usize], pointer: &str) -> Result<()> {
    if timesteps.first() == Some(&0) && ascending(timesteps) {
        return Ok(());
    }
    let message =
        format!("timesteps {timesteps:?}: expected ascending AR steps from 0, as in [0, 6]");
    Err(Error::option(pointer, message))
}

/// Refuses timesteps that are not ascending or lie beyond the AR steps of the sequence.
pub fn check_timesteps(timesteps: &[usize], steps: usize, pointer: &str) -> Result<()> {
    if !ascending(timesteps) || timesteps.iter().any(|&t| t >= steps) {
        return Err(Error::option(
            pointer,
            format!(
                "timesteps {timesteps:?}: expected ascending AR steps, each below {steps}, as in [0, {}]",
                steps / 2
            ),
        ));
    }
    Ok(())
}

/// Images (b, c, h, w) in [0, 1] on the host from latents (b, L, D), resized to a height and width in pixels.
pub fn decode<B: Backend>(
    tokenizer: &dyn crate::model::Tokenizer<B>,
    latents: &B::Tensor,
    sides: [usize; 2],
) -> Result<Vec<f32>> {
    let images = tokenizer.decode(&Variable::constant(latents.clone()))?;
    let (shape, mut pixels) = (images.shape(), B::to_floats(images.value())?);
    let decoded = [shape[2], shape[3]];
    if decoded != sides {
        pixels = bicubic_planes(&pixels, decoded, sides);
    }
    Ok(pixels
        .into_iter()
        .map(|x| ((x + 1.0) / 2.0).clamp(0.0, 1.0))
        .collect())
}
