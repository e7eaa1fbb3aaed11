//! The samplers of recipes: for each, a function that draws a batch.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::{Backend, FlowSolver, Tensors};
use crate::bundle::{self, Bundle};
use crate::captions::ConditioningSource;
use crate::context::Context;
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::model::{
    BatchConditioning, ConditioningShape, PrefixMask, Student, Teacher, TokenShape,
};
use crate::random;
use crate::sampler::{
    self, Assistant, Choice, Distribution, StudentSampler, ascending, autoregressive,
    check_timesteps, skipping,
};

/// Who samples, and how.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Sampler {
    /// The teacher's own AR sampler: the reference.
    Teacher {
        /// The stage that made the teacher.
        #[schemars(extend("x-retort-artifact" = ["teacher"]))]
        teacher: String,
        /// Its distribution.
        #[serde(default)]
        distribution: Distribution,
    },
    /// The teacher's flow map: what the student imitates.
    Flow {
        /// The stage that made the teacher.
        #[schemars(extend("x-retort-artifact" = ["teacher"]))]
        teacher: String,
        /// Its distribution.
        #[serde(default)]
        distribution: Distribution,
        /// Steps of the flow map's solver, an evaluation of the codebook each.
        #[serde(default = "crate::backend::flow::default_steps")]
        #[schemars(range(min = 1))]
        solver_steps: usize,
    },
    /// k-step sampling, one pass per timestep.
    Student {
        /// The stage that distilled the student.
        #[schemars(extend("x-retort-artifact" = ["student"]))]
        student: String,
        /// AR steps from which the passes start, ascending from 0: [0] is one-step sampling.
        timesteps: Vec<usize>,
        /// AR steps whose tokens take the most probable code; later ones use the continuous head. All, if left out.
        #[serde(default)]
        split: Option<usize>,
    },
    /// Student, then teacher, then student.
    Assisted {
        /// The stage that distilled the student.
        #[schemars(extend("x-retort-artifact" = ["student"]))]
        student: String,
        /// The stage that made the teacher.
        #[schemars(extend("x-retort-artifact" = ["teacher"]))]
        teacher: String,
        /// Timesteps of the student's two passes.
        timesteps: [usize; 2],
        /// AR step from which the teacher samples, up to the second timestep.
        teacher_start: usize,
        /// The mask between the tokens that the teacher is given: `causal`, as in training, or `published`, as the
        /// paper's released code has it.
        #[serde(default)]
        prefix: PrefixMask,
        /// AR steps whose tokens take the most probable code; later ones use the continuous head. All, if left out.
        #[serde(default)]
        split: Option<usize>,
        /// The teacher's distribution.
        #[serde(default)]
        distribution: Distribution,
    },
    /// The baseline without the teacher's last AR steps: their tokens are drawn in one pass, each given only the
    /// earlier steps.
    Skip {
        /// The stage that made the teacher.
        #[schemars(extend("x-retort-artifact" = ["teacher"]))]
        teacher: String,
        /// Last AR steps that are drawn in one pass; if all, from the class alone. 1 is the teacher itself, whose last step is
        /// one pass anyway: n steps take n - skip + 1 passes. The paper counts the passes saved, one less: its VAR-skip-1, in
        /// 9 of 10 steps, is `skip: 2` here.
        #[schemars(range(min = 1))]
        skip: usize,
        /// The teacher's distribution.
        #[serde(default)]
        distribution: Distribution,
    },
    /// The baseline without dependence: every token from its own distribution given the class, as a trajectory
    /// dataset has it.
    Independent {
        /// The stage that made the teacher.
        #[schemars(extend("x-retort-artifact" = ["teacher"]))]
        teacher: String,
        /// The stage that built the trajectories.
        #[schemars(extend("x-retort-artifact" = ["trajectories"]))]
        trajectories: String,
    },
}

impl Sampler {
    /// The stage whose output holds the tokenizer.
    pub fn source(&self) -> &str {
        match self {
            Self::Teacher { teacher, .. }
            | Self::Flow { teacher, .. }
            | Self::Skip { teacher, .. }
            | Self::Independent { teacher, .. } => teacher,
            Self::Student { student, .. } | Self::Assisted { student, .. } => student,
        }
    }

    /// Whether it chooses codes for all tokens.
    pub fn chooses(&self) -> bool {
        match self {
            Self::Teacher { .. }
            | Self::Flow { .. }
            | Self::Skip { .. }
            | Self::Independent { .. } => true,
            Self::Student { .. } | Self::Assisted { .. } => false,
        }
    }

    /// Whether its images are a function of noise alone. An assisting teacher draws some of the tokens.
    pub fn maps_noise(&self) -> bool {
        match self {
            Self::Flow { .. } | Self::Student { .. } => true,
            Self::Teacher { .. }
            | Self::Assisted { .. }
            | Self::Skip { .. }
            | Self::Independent { .. } => false,
        }
    }

    /// Whether a student draws, alone or after a teacher.
    pub fn has_student(&self) -> bool {
        matches!(self, Self::Student { .. } | Self::Assisted { .. })
    }

    /// The distribution of the sampling teacher, if there is one.
    pub fn distribution(&self) -> Option<&Distribution> {
        match self {
            Self::Teacher { distribution, .. }
            | Self::Flow { distribution, .. }
            | Self::Assisted { distribution, .. }
            | Self::Skip { distribution, .. } => Some(distribution),
            Self::Student { .. } | Self::Independent { .. } => None,
        }
    }

    /// Network passes per batch: the steps in tables of samplers.
    pub fn passes(&self, shape: &TokenShape) -> usize {
        let steps = shape.steps.len();
        match self {
            Self::Teacher { .. } | Self::Flow { .. } => steps,
            Self::Student { timesteps, .. } => timesteps.len(),
            Self::Assisted {
                timesteps,
                teacher_start,
                ..
            } => {
                let first = usize::from(*teacher_start > 0);
                first + timesteps[1] - teacher_start + 1
            }
            Self::Skip { skip, .. } => steps.saturating_sub(*skip) + 1,
            Self::Independent { .. } => 0,
        }
    }

    /// Refuses invalid timesteps.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Student { timesteps, .. } if !ascending(timesteps) => {
                let message = format!(
                    "timesteps {timesteps:?}: expected ascending AR steps, as in [0] or [0, 6]"
                );
                Err(Error::option("/sampler/timesteps", message))
            }
            Self::Assisted {
                timesteps,
                teacher_start,
                ..
            } if !ascending(timesteps) || *teacher_start >= timesteps[1] => {
                let message = format!(
                    "teacher_start {teacher_start} with timesteps {timesteps:?}: expected ascending timesteps and a start below the second"
                );
                Err(Error::option("/sampler/teacher_start", message))
            }
            _ => Ok(()),
        }
    }

    /// Refuses timesteps, a split or skipped steps beyond the model's AR steps.
    pub fn check_steps(&self, steps: usize) -> Result<()> {
        let pointer = "/sampler/timesteps";
        let (name, given) = match self {
            Self::Student {
                timesteps, split, ..
            } => {
                check_timesteps(timesteps, steps, pointer)?;
                ("split", *split)
            }
            Self::Assisted {
                timesteps, split, ..
            } => {
                check_timesteps(timesteps, steps, pointer)?;
                ("split", *split)
            }
            Self::Skip { skip, .. } => ("skip", Some(*skip)),
            Self::Teacher { .. } | Self::Flow { .. } | Self::Independent { .. } => return Ok(()),
        };
        match given {
            Some(given) if given > steps => {
                let message = format!("{name} {given}: the model has {steps} AR steps");
                Err(Error::option(format!("/sampler/{name}"), message))
            }
            _ => Ok(()),
        }
    }
}

/// A batch's results.
pub struct DrawnBatch<B: Backend> {
    /// Latents (b, L, D).
    pub latents: B::Tensor,
    /// Tokens (b, L), if codes were chosen.
    pub tokens: Option<B::Tensor>,
}

/// The function that draws a batch: (index of the first sample, labels, noise) -> latents.
pub type Drawer<'a, B> =
    Box<dyn FnMut(u64, &[u32], &<B as Tensors>::Tensor) -> Result<DrawnBatch<B>> + 'a>;

/// The context of every sampler.
pub struct SamplerContext<'a, B: Backend> {
    /// The tensor library.
    pub backend: &'a B,
    /// Seed of what is drawn.
    pub seed: u64,
    /// The tokens of a sample.
    pub shape: &'a TokenShape,
    /// Codebook (K, D).
    pub codebook: B::Tensor,
    /// What labels stand for.
    pub conditioning: &'a ConditioningSource,
}

/// The drawer of a sampler, its networks loaded.
pub fn drawer<'a, B: Backend>(
    context: &Context<'_, B>,
    sampler: &'a Sampler,
    bundle: &Bundle<'_>,
    setting: SamplerContext<'a, B>,
) -> Result<Drawer<'a, B>> {
    let (backend, steps) = (context.backend, setting.shape.steps.len());
    sampler.check_steps(steps)?;
    match sampler {
        Sampler::Teacher { distribution, .. } => {
            Ok(setting.teacher(bundle.teacher(backend)?, distribution))
        }
        Sampler::Flow {
            distribution,
            solver_steps,
            ..
        } => Ok(setting.flow(bundle.teacher(backend)?, distribution, *solver_steps)),
        Sampler::Student {
            timesteps, split, ..
        } => {
            let (student, split) = (bundle.student(backend)?, split.unwrap_or(steps));
            Ok(setting.student(student, split, timesteps))
        }
        Sampler::Assisted {
            teacher,
            timesteps,
            teacher_start,
            prefix,
            split,
            distribution,
            ..
        } => {
            let (student, split) = (bundle.student(backend)?, split.unwrap_or(steps));
            let other = Bundle::open(context.input_dir(teacher)?)?;
            same_codebook(&bundle.config, &other.config, teacher)?;
            let assistance = Assistance {
                teacher: other.teacher(backend)?,
                start: *teacher_start,
                distribution,
                mask: *prefix,
            };
            Ok(setting.assisted(student, split, *timesteps, assistance))
        }
        Sampler::Skip {
            skip, distribution, ..
        } => Ok(setting.skip(bundle.teacher(backend)?, distribution, *skip)),
        Sampler::Independent { trajectories, .. } => {
            let dataset = Dataset::open(context.input_dir(trajectories)?)?;
            let marginals = Marginals::open(dataset, setting.shape)?;
            Ok(setting.independent(marginals))
        }
    }
}

/// The loaded assisting teacher.
struct Assistance<'a, B: Backend> {
    teacher: Box<dyn Teacher<B>>,
    start: usize,
    distribution: &'a Distribution,
    mask: PrefixMask,
}

impl<'a, B: Backend> SamplerContext<'a, B> {
    fn batch_conditioning(&self, labels: &[u32]) -> Result<BatchConditioning<B>> {
        self.conditioning.batch(self.backend, labels)
    }

    /// The random numbers for each sample's choice of codes.
    fn choices(&self, first: u64, labels: &[u32]) -> Vec<random::Sequence> {
        sampler::choices(self.seed, first, labels.len())
    }

    /// Chosen codes with their vectors.
    fn of_tokens(&self, ids: B::Tensor) -> Result<DrawnBatch<B>> {
        Ok(DrawnBatch {
            latents: B::rows(&self.codebook, &ids)?,
            tokens: Some(ids),
        })
    }

    fn teacher(
        self,
        teacher: Box<dyn Teacher<B>>,
        distribution: &'a Distribution,
    ) -> Drawer<'a, B> {
        let all = self.shape.steps.len();
        Box::new(move |first, labels, _| {
            let mut sequences = self.choices(first, labels);
            let mut choice = Choice::Random(&mut sequences);
            let wanted = self.batch_conditioning(labels)?;
            let ids = autoregressive(&*teacher, &wanted, distribution, &mut choice, None, all)?;
            self.of_tokens(ids)
        })
    }

    fn flow(
        self,
        teacher: Box<dyn Teacher<B>>,
        distribution: &'a Distribution,
        solver_steps: usize,
    ) -> Drawer<'a, B> {
        let all = self.shape.steps.len();
        let solver = FlowSolver {
            steps: solver_steps,
        };
        Box::new(move |_, labels, noise| {
            let wanted = self.batch_conditioning(labels)?;
            let mut choice = Choice::Flow {
                noise,
                codebook: &self.codebook,
                solver,
            };
            let ids = autoregressive(&*teacher, &wanted, distribution, &mut choice, None, all)?;
            self.of_tokens(ids)
        })
    }

    fn student(
        self,
        student: Box<dyn Student<B>>,
        split: usize,
        timesteps: &'a [usize],
    ) -> Drawer<'a, B> {
        Box::new(move |_, labels, noise| {
            let sampler = StudentSampler {
                student: &*student,
                codebook: &self.codebook,
                split,
            };
            Ok(DrawnBatch {
                latents: sampler.sample(noise, &self.batch_conditioning(labels)?, timesteps)?,
                tokens: None,
            })
        })
    }

    fn assisted(
        self,
        student: Box<dyn Student<B>>,
        split: usize,
        timesteps: [usize; 2],
        assistance: Assistance<'a, B>,
    ) -> Drawer<'a, B> {
        Box::new(move |first, labels, noise| {
            let sampler = StudentSampler {
                student: &*student,
                codebook: &self.codebook,
                split,
            };
            let mut sequences = self.choices(first, labels);
            let mut choice = Choice::Random(&mut sequences);
            let assistant = Assistant {
                teacher: &*assistance.teacher,
                start: assistance.start,
                distribution: assistance.distribution,
                mask: assistance.mask,
            };
            let wanted = self.batch_conditioning(labels)?;
            let (latents, _) =
                sampler.assisted(noise, &wanted, timesteps, &assistant, &mut choice)?;
            Ok(DrawnBatch {
                latents,
                tokens: None,
            })
        })
    }

    fn skip(
        self,
        teacher: Box<dyn Teacher<B>>,
        distribution: &'a Distribution,
        skip: usize,
    ) -> Drawer<'a, B> {
        let steps = self.shape.steps.len() - skip;
        Box::new(move |first, labels, _| {
            let mut sequences = self.choices(first, labels);
            let mut choice = Choice::Random(&mut sequences);
            let wanted = self.batch_conditioning(labels)?;
            let ids = skipping(&*teacher, &wanted, distribution, &mut choice, steps)?;
            self.of_tokens(ids)
        })
    }

    fn independent(self, marginals: Marginals) -> Drawer<'a, B> {
        Box::new(move |first, labels, _| {
            let mut sequences = self.choices(first, labels);
            let ids = marginals.draw(labels, &mut sequences)?;
            let shape = [labels.len(), self.shape.count()];
            self.of_tokens(self.backend.indices(&ids, &shape)?)
        })
    }
}

fn same_codebook(a: &bundle::Config, b: &bundle::Config, stage: &str) -> Result<()> {
    if a.tokenizer == b.tokenizer {
        return Ok(());
    }
    Err(Error::option(
        "/sampler/teacher",
        format!("{stage} has another tokenizer than the student was distilled with"),
    ))
}

/// Every token's distribution given the class, from trajectories: the token of a trajectory of the class, drawn
/// anew for each token.
struct Marginals {
    dataset: Dataset,
    /// Trajectories of each class.
    of_class: Vec<Vec<u32>>,
    tokens: usize,
}

impl Marginals {
    fn open(dataset: Dataset, shape: &TokenShape) -> Result<Self> {
        let ConditioningShape::Classes(classes) = shape.condition else {
            return Err(Error::option(
                "/sampler",
                "the baseline counts the tokens of each class; this model is conditioned on captions",
            ));
        };
        if dataset.shape() != *shape {
            return Err(Error::option(
                "/sampler/trajectories",
                "the trajectories were made with a teacher of another shape",
            ));
        }
        let mut of_class = vec![Vec::new(); classes];
        for (sample, &class) in dataset.labels.iter().enumerate() {
            of_class[class as usize].push(sample as u32);
        }
        Ok(Self {
            dataset,
            of_class,
            tokens: shape.count(),
        })
    }

    /// Tokens (b, L).
    fn draw(&self, classes: &[u32], sequences: &mut [random::Sequence]) -> Result<Vec<u32>> {
        let mut out = Vec::with_capacity(classes.len() * self.tokens);
        for (&class, sequence) in classes.iter().zip(sequences) {
            let samples = &self.of_class[class as usize];
            if samples.is_empty() {
                let message = format!("class {class} has no trajectory to draw from");
                return Err(Error::option("/sampler/trajectories", message));
            }
            for position in 0..self.tokens {
                let sample = samples[sequence.below(samples.len())] as usize;
                out.push(self.dataset.token(sample, position)?);
            }
        }
        Ok(out)
    }
}
