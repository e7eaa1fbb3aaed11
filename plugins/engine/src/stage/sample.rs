//! `sample`: images from a teacher, a student, both together, or the independent baseline.
//!
//! Out: `samples.safetensors` with labels (n), noise (n, L, D), tokens (n, L; where codes were chosen), latents
//! (n, L, D) and images (n, c, H, W) in [0, 1], and `grid.png`. Labels number the captions of `captions.json`, where these
//! were given as text.

use std::path::Path;
use std::time::Instant;

use retort_abi::{ArtifactMeta, Cancel, LogLevel, StageResult};
use safetensors::tensor::{Dtype, TensorView};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

use crate::backend::{Backend, FlowSolver};
use crate::bundle::Bundle;
use crate::captions::Subjects;
use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::model::{ConditionShape, Conditions, TokenShape};
use crate::picture::{self, Pixels};
use crate::random;
use crate::sampler::{
    self, Choice, Distribution, StudentSampler, ascending, autoregressive, check_timesteps,
};
use crate::stage::condition::{Features, Given, Labels, Made, Texts, Wish};
use crate::stage::trajectories::solver_steps;
use crate::stage::{Context, Stage, write_json};
use crate::weights::{self, Stored};

/// Options of `sample`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Who samples, and how.
    pub sampler: Sampler,
    /// Number of images.
    #[schemars(range(min = 1))]
    pub count: u64,
    /// Images sampled at a time.
    #[serde(default = "batch")]
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Noise (count, L, D) from a file instead of the seed.
    #[serde(default)]
    pub noise: Option<Given>,
    /// Classes of the images: `balanced` (the default), a list, or a tensor of a file. For a model of classes.
    #[serde(default)]
    pub labels: Option<Labels>,
    /// Captions of the images, a text, a list of texts or the lines of a file: image i has caption i mod their number. For a
    /// model of captions.
    #[serde(default)]
    pub caption: Option<Texts>,
    /// Folder of the flan-t5 that makes features of captions: config.json, tokenizer.json and its weights.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "dir"))]
    pub text_encoder: Option<String>,
    /// Features of captions from a file, instead of `caption`.
    #[serde(default)]
    pub features: Option<Features>,
    /// Images per class in `grid.png`.
    #[serde(default = "columns")]
    #[schemars(range(min = 1))]
    pub grid_columns: usize,
    /// Whether every image is also written as a PNG file of its own.
    #[serde(default)]
    pub png: bool,
    /// Whether the images are also written as `samples.npz` (uint8, n x H x W x 3), as evaluation suites read it.
    #[serde(default)]
    pub npz: bool,
}

fn batch() -> usize {
    500
}
fn columns() -> usize {
    10
}

impl Options {
    fn wish(&self) -> Wish<'_> {
        Wish {
            labels: self.labels.as_ref(),
            caption: self.caption.as_ref(),
            text_encoder: self.text_encoder.as_deref(),
            features: self.features.as_ref(),
        }
    }
}

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
        #[serde(default = "solver_steps")]
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
        /// AR steps whose tokens take the most probable code; later ones take the continuous head. All, if left out.
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
        /// AR steps whose tokens take the most probable code; later ones take the continuous head. All, if left out.
        #[serde(default)]
        split: Option<usize>,
        /// The teacher's distribution.
        #[serde(default)]
        distribution: Distribution,
    },
    /// The baseline that forgets all dependence: every token from its own distribution given the class, as counted in a
    /// trajectory dataset; with `after`, the teacher samples the first AR steps.
    Independent {
        /// The stage that made the teacher.
        #[schemars(extend("x-retort-artifact" = ["teacher"]))]
        teacher: String,
        /// The stage that built the trajectories.
        #[schemars(extend("x-retort-artifact" = ["trajectories"]))]
        trajectories: String,
        /// AR steps that the teacher samples first.
        #[serde(default)]
        after: usize,
        /// The teacher's distribution.
        #[serde(default)]
        distribution: Distribution,
    },
}

impl Sampler {
    /// The stage whose output holds the tokenizer.
    fn source(&self) -> &str {
        match self {
            Self::Teacher { teacher, .. }
            | Self::Flow { teacher, .. }
            | Self::Independent { teacher, .. } => teacher,
            Self::Student { student, .. } | Self::Assisted { student, .. } => student,
        }
    }
}

/// The stage.
pub struct Sample;

/// A batch's results.
struct Drawn<B: Backend> {
    latents: B::Tensor,
    tokens: Option<B::Tensor>,
}

impl<B: Backend> Stage<B> for Sample {
    type Options = Options;
    const KIND: &'static str = "sample";
    const OUTPUT: &'static str = "samples";
    const REVISION: u32 = 2;
    const SUMMARY: &'static str =
        "sample images from a teacher, a student, both, or the independent baseline";

    fn check(o: &Options, base: &Path) -> Result<()> {
        o.wish().check(base)?;
        match &o.sampler {
            Sampler::Student { timesteps, .. } if !ascending(timesteps) => {
                let message = format!(
                    "timesteps {timesteps:?}: expected ascending AR steps, as in [0] or [0, 6]"
                );
                Err(Error::option("/sampler/timesteps", message))
            }
            Sampler::Assisted {
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

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        let (host, backend, base) = (context.host, context.backend, &context.job.base_dir);
        let bundle = Bundle::open(context.input_dir(o.sampler.source())?)?;
        let shape = bundle.network()?.tokens();
        let image = bundle.config.tokenizer.image();
        // Before the networks are loaded: a text encoder may need the memory.
        let Made {
            labels,
            subjects,
            texts,
        } = o.wish().resolve(context, &shape.condition, o.count)?;
        let tokenizer = bundle.tokenizer(backend)?;
        let codebook = tokenizer.codebook()?;
        let (l, d) = (shape.tokens(), shape.dim);
        let noise = match &o.noise {
            Some(given) => given.floats(base, &[o.count as usize, l, d])?,
            None => random::noises(context.job.seed, 0..o.count, l, d),
        };
        let mut draw = drawer(context, &o.sampler, &bundle, &shape, codebook, &subjects)?;

        let (mut latents, mut images, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sampling, mut decoding) = (0.0, 0.0);
        for (i, classes) in labels.chunks(o.batch).enumerate() {
            if host.cancelled() != Cancel::Run {
                return Err(Error::Cancelled);
            }
            let (start, n) = (i * o.batch, classes.len());
            let eps = backend.floats(&noise[start * l * d..(start + n) * l * d], &[n, l, d])?;
            let clock = Instant::now();
            let drawn =
                draw(start as u64, classes, &eps).map_err(|e| e.of_samples(start as u64))?;
            latents.extend(B::to_floats(&drawn.latents)?);
            sampling += clock.elapsed().as_secs_f64();
            if let Some(ids) = &drawn.tokens {
                tokens.extend(B::to_indices(ids)?);
            }
            let clock = Instant::now();
            images.extend(sampler::decode(&*tokenizer, &drawn.latents)?);
            decoding += clock.elapsed().as_secs_f64();
            host.progress((start + n) as u64, o.count, "images");
        }
        drop(draw);
        let rate = o.count as f64 / sampling;
        host.metric("sample/images_per_second", 0, rate);
        host.metric("sample/sampling_seconds", 0, sampling);
        host.metric("sample/decoding_seconds", 0, decoding);
        host.log(
            LogLevel::Info,
            &format!(
                "{} images: sampling {sampling:.2} s ({rate:.0}/s), decoding {decoding:.2} s",
                o.count
            ),
        );

        let columns = match texts.len() {
            0 => o.grid_columns,
            // Few images of each caption: all of them.
            n => o.grid_columns.min((o.count as usize / n).max(1)),
        };
        let meta = ArtifactMeta {
            preview: Some("grid.png".into()),
            caption: shown(&texts, &labels, columns),
            ..Default::default()
        };
        let summary = json!({ "images": o.count, "images_per_second": rate });
        context.finish("samples", meta, summary, |dir| {
            let set = Samples {
                labels,
                noise,
                tokens,
                latents,
                images,
                image,
                shape,
            };
            set.write(&dir.join(SAMPLES))?;
            let pixels = Pixels::new(&set.images, image[0], image[1], image[2])?;
            let (tiles, rows) = set.by_class(columns);
            picture::write_grid(
                &dir.join("grid.png"),
                &[Pixels::new(&tiles, image[0], image[1], image[2])?],
                rows,
            )?;
            if !texts.is_empty() {
                write_json(&dir.join(CAPTIONS), &texts)?;
            }
            if o.png {
                let folder = dir.join("png");
                std::fs::create_dir(&folder).map_err(Error::io(&folder))?;
                picture::write_pngs(&folder, pixels, &set.labels)?;
            }
            if o.npz {
                picture::write_npz(&dir.join("samples.npz"), pixels)?;
            }
            Ok(())
        })
    }
}

/// What the picture shows: the captions of its rows, the longer ones cut.
fn shown(texts: &[String], labels: &[u32], columns: usize) -> Option<String> {
    if texts.is_empty() {
        return None;
    }
    let (picks, rows) = by_class(labels, columns);
    let firsts = picks.iter().step_by(picks.len() / rows);
    let quoted: Vec<String> = firsts
        .map(|&i| {
            let text = texts[labels[i] as usize].trim();
            match text.char_indices().nth(SHOWN) {
                Some((end, _)) => format!("\u{201c}{}...\u{201d}", text[..end].trim_end()),
                None => format!("\u{201c}{text}\u{201d}"),
            }
        })
        .collect();
    Some(format!("from the top: {}", quoted.join(", ")))
}

/// Characters of a caption that are shown under a picture.
const SHOWN: usize = 60;

type Drawer<'a, B> = Box<dyn FnMut(u64, &[u32], &<B as Backend>::Tensor) -> Result<Drawn<B>> + 'a>;

/// The function that draws a batch: (index of the first sample, labels, noise) -> latents.
fn drawer<'a, B: Backend>(
    context: &'a Context<'_, B>,
    sampler: &'a Sampler,
    bundle: &Bundle<'_>,
    shape: &'a TokenShape,
    codebook: B::Tensor,
    subjects: &'a Subjects,
) -> Result<Drawer<'a, B>> {
    let (backend, seed) = (context.backend, context.job.seed);
    let of_tokens = |codebook: &B::Tensor, ids: B::Tensor| -> Result<Drawn<B>> {
        Ok(Drawn {
            latents: B::rows(codebook, &ids)?,
            tokens: Some(ids),
        })
    };
    let conditions =
        |labels: &[u32]| -> Result<Conditions<B>> { subjects.conditions(backend, labels) };
    let all = shape.steps.len();
    let split = |split: Option<usize>| match split {
        Some(s) if s > all => Err(Error::option(
            "/sampler/split",
            format!("split {s}: the model has {all} AR steps"),
        )),
        s => Ok(s.unwrap_or(all)),
    };
    Ok(match sampler {
        Sampler::Teacher { distribution, .. } => {
            let teacher = bundle.teacher(backend)?;
            Box::new(move |first, labels, _| {
                let mut sequences = sampler::choices(seed, first, labels.len());
                let mut choice = Choice::Random(&mut sequences);
                let wanted = conditions(labels)?;
                of_tokens(
                    &codebook,
                    autoregressive(&*teacher, &wanted, distribution, &mut choice, None, all)?,
                )
            })
        }
        Sampler::Flow {
            distribution,
            solver_steps,
            ..
        } => {
            let teacher = bundle.teacher(backend)?;
            let solver = FlowSolver {
                steps: *solver_steps,
            };
            Box::new(move |_, labels, noise| {
                let wanted = conditions(labels)?;
                let mut choice = Choice::Flow {
                    noise,
                    codebook: &codebook,
                    solver,
                };
                of_tokens(
                    &codebook,
                    autoregressive(&*teacher, &wanted, distribution, &mut choice, None, all)?,
                )
            })
        }
        Sampler::Student {
            timesteps,
            split: s,
            ..
        } => {
            check_timesteps(timesteps, shape, "/sampler/timesteps")?;
            let (student, split) = (bundle.student(backend)?, split(*s)?);
            Box::new(move |_, labels, noise| {
                let sampler = StudentSampler {
                    student: &*student,
                    codebook: &codebook,
                    split,
                };
                Ok(Drawn {
                    latents: sampler.sample(noise, &conditions(labels)?, timesteps)?,
                    tokens: None,
                })
            })
        }
        Sampler::Assisted {
            teacher,
            timesteps,
            teacher_start,
            split: s,
            distribution,
            ..
        } => {
            check_timesteps(timesteps, shape, "/sampler/timesteps")?;
            let (student, split) = (bundle.student(backend)?, split(*s)?);
            let other = Bundle::open(context.input_dir(teacher)?)?;
            same_codebook(&bundle.config, &other.config, teacher)?;
            let teacher = other.teacher(backend)?;
            Box::new(move |first, labels, noise| {
                let sampler = StudentSampler {
                    student: &*student,
                    codebook: &codebook,
                    split,
                };
                let mut sequences = sampler::choices(seed, first, labels.len());
                let mut choice = Choice::Random(&mut sequences);
                let (latents, _) = sampler.assisted(
                    noise,
                    &conditions(labels)?,
                    *timesteps,
                    &*teacher,
                    *teacher_start,
                    distribution,
                    &mut choice,
                )?;
                Ok(Drawn {
                    latents,
                    tokens: None,
                })
            })
        }
        Sampler::Independent {
            trajectories,
            after,
            distribution,
            ..
        } => {
            let teacher = bundle.teacher(backend)?;
            let marginals =
                Marginals::count(&Dataset::open(context.input_dir(trajectories)?)?, shape)?;
            Box::new(move |first, classes, _| {
                let mut sequences = sampler::choices(seed, first, classes.len());
                let known = match after {
                    0 => None,
                    _ => {
                        let mut choice = Choice::Random(&mut sequences);
                        let ids = autoregressive(
                            &*teacher,
                            &conditions(classes)?,
                            distribution,
                            &mut choice,
                            None,
                            *after,
                        )?;
                        Some(B::to_indices(&ids)?)
                    }
                };
                let ids = marginals.draw(classes, known.as_deref(), &mut sequences);
                of_tokens(
                    &codebook,
                    backend.indices(&ids, &[classes.len(), shape.tokens()])?,
                )
            })
        }
    })
}

fn same_codebook(a: &crate::bundle::Config, b: &crate::bundle::Config, stage: &str) -> Result<()> {
    if a.tokenizer == b.tokenizer {
        return Ok(());
    }
    Err(Error::option(
        "/sampler/teacher",
        format!("{stage} has another tokenizer than the student was distilled with"),
    ))
}

/// How often each code stands at each position, per class.
struct Marginals {
    /// Running sums (class, position, code).
    cumulative: Vec<u64>,
    tokens: usize,
    vocabulary: usize,
}

impl Marginals {
    fn count(dataset: &Dataset, shape: &TokenShape) -> Result<Self> {
        let (l, k) = (shape.tokens(), shape.vocabulary);
        let ConditionShape::Classes(classes) = shape.condition else {
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
        let mut counts = vec![0u64; classes * l * k];
        for (sample, &class) in dataset.labels.iter().enumerate() {
            for (position, token) in dataset.tokens_of(sample)?.into_iter().enumerate() {
                counts[(class as usize * l + position) * k + token as usize] += 1;
            }
        }
        for row in counts.chunks_exact_mut(k) {
            row.iter_mut().fold(0, |sum, count| {
                *count += sum;
                *count
            });
            if row[k - 1] == 0 {
                return Err(Error::option(
                    "/sampler/trajectories",
                    "a class has no trajectory to count",
                ));
            }
        }
        Ok(Self {
            cumulative: counts,
            tokens: l,
            vocabulary: k,
        })
    }

    /// Tokens (b, L); the first ones are `known` (b, l'), where given.
    fn draw(
        &self,
        classes: &[u32],
        known: Option<&[u32]>,
        sequences: &mut [random::Sequence],
    ) -> Vec<u32> {
        let (l, k) = (self.tokens, self.vocabulary);
        let given = known.map_or(0, |ids| ids.len() / classes.len());
        let mut out = Vec::with_capacity(classes.len() * l);
        for (i, (&class, sequence)) in classes.iter().zip(sequences).enumerate() {
            out.extend(
                known
                    .into_iter()
                    .flat_map(|ids| &ids[i * given..(i + 1) * given]),
            );
            for position in given..l {
                let row = &self.cumulative[(class as usize * l + position) * k..][..k];
                let at = sequence.below(row[k - 1] as usize) as u64;
                out.push(row.partition_point(|&sum| sum <= at) as u32);
            }
        }
        out
    }
}

/// Name of the file with the captions, in the order of their numbers.
const CAPTIONS: &str = "captions.json";
/// Name of the file with the samples.
pub const SAMPLES: &str = "samples.safetensors";

/// A set of samples on the host.
pub struct Samples {
    /// Class of each image, or number of its caption.
    pub labels: Vec<u32>,
    noise: Vec<f32>,
    tokens: Vec<u32>,
    latents: Vec<f32>,
    /// Pixels (n, c, H, W) in [0, 1].
    pub images: Vec<f32>,
    /// Channels, height, width.
    pub image: [usize; 3],
    shape: TokenShape,
}

impl Samples {
    fn write(&self, path: &Path) -> Result<()> {
        let (n, l, d) = (self.labels.len(), self.shape.tokens(), self.shape.dim);
        let [c, h, w] = self.image;
        let ids =
            |x: &[u32]| -> Vec<u8> { x.iter().flat_map(|&x| i64::from(x).to_le_bytes()).collect() };
        let mut tensors = vec![
            ("labels", Dtype::I64, vec![n], ids(&self.labels)),
            (
                "noise",
                Dtype::F32,
                vec![n, l, d],
                weights::le_bytes(&self.noise),
            ),
            (
                "latents",
                Dtype::F32,
                vec![n, l, d],
                weights::le_bytes(&self.latents),
            ),
            (
                "images",
                Dtype::F32,
                vec![n, c, h, w],
                weights::le_bytes(&self.images),
            ),
        ];
        if !self.tokens.is_empty() {
            tensors.push(("tokens", Dtype::I64, vec![n, l], ids(&self.tokens)));
        }
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes)
                .map(|view| (*name, view))
                .map_err(|e| Error::data(path, e))
        });
        let views: Vec<_> = views.collect::<Result<_>>()?;
        safetensors::serialize_to_file(views, None, path).map_err(|e| Error::data(path, e))
    }

    /// The images of the first samples of each class, class by class, and the number of rows they fill.
    fn by_class(&self, columns: usize) -> (Vec<f32>, usize) {
        let size = self.image.iter().product::<usize>();
        let (picks, rows) = by_class(&self.labels, columns);
        let images = picks.iter().flat_map(|&i| &self.images[i * size..][..size]);
        (images.copied().collect(), rows)
    }
}

/// The first `columns` samples of each class, class by class (at most 16 classes), and the number of rows they fill:
/// classes with fewer samples are left out unless none has enough.
pub fn by_class(labels: &[u32], columns: usize) -> (Vec<usize>, usize) {
    let mut classes: Vec<u32> = labels.to_vec();
    classes.sort_unstable();
    classes.dedup();
    let (mut out, mut rows) = (Vec::new(), 0);
    for class in classes {
        let members = (0..labels.len()).filter(|&i| labels[i] == class);
        let members: Vec<usize> = members.take(columns).collect();
        if members.len() == columns && rows < 16 {
            out.extend(members);
            rows += 1;
        }
    }
    if rows == 0 {
        return ((0..labels.len().min(64)).collect(), 1);
    }
    (out, rows)
}

/// The labels and images of a sample artifact; images stay in the file until they are asked for.
pub struct SampleFile {
    /// Class of each image.
    pub labels: Vec<u32>,
    /// Channels, height, width.
    pub image: [usize; 3],
    stored: Stored,
}

impl SampleFile {
    /// Opens a sample artifact.
    pub fn open(dir: &Path) -> Result<Self> {
        let stored = Stored::open(&dir.join(SAMPLES), None)?;
        let shape = stored.shape("images").unwrap_or_default();
        let &[n, c, h, w] = shape else {
            let message = format!("images of shape {shape:?}, expected (n, c, H, W)");
            return Err(Error::data(stored.path(), message));
        };
        let labels = stored.indices("labels")?;
        if labels.len() != n {
            let message = format!("{} labels for {n} images", labels.len());
            return Err(Error::data(stored.path(), message));
        }
        Ok(Self {
            labels,
            image: [c, h, w],
            stored,
        })
    }

    /// `count` images from the one with index `first` on, in [0, 1].
    pub fn read(&self, first: usize, count: usize) -> Result<Vec<f32>> {
        self.stored.rows("images", first, count)
    }
}
