//! Trajectory datasets: (noise, class, tokens) of the AR flow map, in shards that anyone can make in any order.
//!
//! ```text
//! trajectories/  manifest.json  shard-000000000.safetensors  shard-000010000.safetensors ..  captions.safetensors
//! ```
//!
//! `captions.safetensors` is there where the teacher is conditioned on captions; `labels` number these then. A shard holds
//! `labels` (n) and `tokens` (n, L) in the narrowest unsigned type. Noise is a pure function of the
//! manifest's seed and the sample's index and is not stored, unless it was given from a file: then `noise` (n, L, D)
//! stands beside the tokens. Every intermediate state X_t follows from noise and tokens.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use crate::captions::{self, Captions, Subjects};
use crate::error::{Error, Result};
use crate::model::{ConditionShape, TokenShape};
use crate::random;
use crate::sampler::Distribution;
use crate::weights::{self, Stored};

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// Seed of the noise.
    pub seed: u64,
    /// Number of samples.
    pub count: u64,
    /// Tokens of each AR step.
    pub steps: Vec<usize>,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub dim: usize,
    /// What its images were made for.
    #[serde(flatten)]
    pub condition: ConditionShape,
    /// The teacher's distribution.
    pub distribution: Distribution,
    /// Steps of the flow map's solver.
    pub solver_steps: usize,
    /// Content hash of the teacher's artifact.
    pub teacher: String,
    /// Files, in order of their samples.
    pub shards: Vec<Shard>,
}

/// A file of samples `start..end`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    /// Name beside the manifest.
    pub file: String,
    /// First sample.
    pub start: u64,
    /// One past the last sample.
    pub end: u64,
}

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// Version of the layout.
pub const FORMAT: u32 = 1;

impl Manifest {
    /// Reads that of a directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let manifest: Self = serde_json::from_str(&text).map_err(|e| Error::data(&path, e))?;
        if manifest.format != FORMAT {
            let message = format!("format {}, expected {FORMAT}", manifest.format);
            return Err(Error::data(&path, message));
        }
        Ok(manifest)
    }

    /// Opens a file with the samples of a shard, and refuses it if it does not hold them. Returns their labels too.
    pub fn open_shard(&self, path: &Path, shard: &Shard) -> Result<(Stored, Vec<u32>)> {
        let stored = Stored::open(path, None)?;
        let (n, l) = ((shard.end - shard.start) as usize, self.tokens().tokens());
        let (labels, tokens) = (stored.indices("labels")?, stored.indices("tokens")?);
        if labels.len() != n || tokens.len() != n * l {
            let message = format!(
                "{} labels and {} tokens, expected {n} and {}",
                labels.len(),
                tokens.len(),
                n * l
            );
            return Err(Error::data(path, message));
        }
        if let Some(bad) = tokens.iter().find(|&&t| t as usize >= self.vocabulary) {
            let message = format!(
                "token {bad}, but the codebook has {} codes",
                self.vocabulary
            );
            return Err(Error::data(path, message));
        }
        Ok((stored, labels))
    }

    /// What differs between two parts that ought to be of one dataset, in words.
    fn differs(&self, other: &Self) -> Option<String> {
        let pairs = [
            ("count", self.count.to_string(), other.count.to_string()),
            ("seed", self.seed.to_string(), other.seed.to_string()),
            ("teacher", self.teacher.clone(), other.teacher.clone()),
            (
                "solver_steps",
                self.solver_steps.to_string(),
                other.solver_steps.to_string(),
            ),
            (
                "distribution",
                format!("{:?}", self.distribution),
                format!("{:?}", other.distribution),
            ),
            (
                "shape",
                format!("{:?}", self.tokens()),
                format!("{:?}", other.tokens()),
            ),
        ];
        let mut differing = pairs.into_iter().filter(|(_, own, others)| own != others);
        differing
            .next()
            .map(|(what, own, other)| format!("{what} {other}, expected {own}"))
    }

    /// The shards of a part made elsewhere, by the manifest there.
    pub fn of_part(&self, dir: &Path) -> Result<Vec<Shard>> {
        let part = Self::read(dir)?;
        match self.differs(&part) {
            None => Ok(part.shards),
            Some(what) => {
                let message = format!("this is no part of the same dataset: {what}");
                Err(Error::data(dir.join(MANIFEST), message))
            }
        }
    }

    /// Shape of the token sequences.
    pub fn tokens(&self) -> TokenShape {
        TokenShape {
            steps: self.steps.clone(),
            vocabulary: self.vocabulary,
            dim: self.dim,
            condition: self.condition,
        }
    }
}

/// Writes one shard; `noise` (n, L, D) only when it was given.
pub fn write_shard(
    path: &Path,
    labels: &[u32],
    tokens: &[u32],
    noise: Option<(&[f32], usize)>,
) -> Result<()> {
    let n = labels.len();
    let l = tokens.len() / n;
    let (labels, labels_type) = narrow(labels);
    let (tokens, tokens_type) = narrow(tokens);
    let noise = noise.map(|(x, dim)| (weights::le_bytes(x), vec![n, l, dim]));
    let view = |dtype, shape: Vec<usize>, bytes| {
        TensorView::new(dtype, shape, bytes).map_err(|e| Error::data(path, e))
    };
    let mut views = vec![
        ("labels", view(labels_type, vec![n], &labels)?),
        ("tokens", view(tokens_type, vec![n, l], &tokens)?),
    ];
    if let Some((bytes, shape)) = &noise {
        views.push(("noise", view(Dtype::F32, shape.clone(), bytes)?));
    }
    safetensors::serialize_to_file(views, None, path).map_err(|e| Error::data(path, e))
}

/// The narrowest unsigned type that holds all values.
fn narrow(values: &[u32]) -> (Vec<u8>, Dtype) {
    match values.iter().max().copied().unwrap_or(0) {
        0..=0xff => (values.iter().map(|&x| x as u8).collect(), Dtype::U8),
        0x100..=0xffff => (
            values
                .iter()
                .flat_map(|&x| (x as u16).to_le_bytes())
                .collect(),
            Dtype::U16,
        ),
        _ => (
            values.iter().flat_map(|&x| x.to_le_bytes()).collect(),
            Dtype::U32,
        ),
    }
}

/// A dataset on disk: labels are in memory, tokens are read and noise is made when they are asked for.
pub struct Dataset {
    /// Its manifest.
    pub manifest: Manifest,
    /// Class of each sample, or number of its caption.
    pub labels: Vec<u32>,
    /// What the labels stand for.
    pub subjects: Subjects,
    /// The shards, in order of their samples.
    shards: Vec<Stored>,
}

impl Dataset {
    /// Opens a directory and checks all of it, a shard at a time.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let path = dir.join(MANIFEST);
        let (mut labels, mut shards) = (Vec::new(), Vec::new());
        let mut next = 0;
        for shard in &manifest.shards {
            if shard.start != next {
                break;
            }
            next = shard.end;
            let (stored, own) = manifest.open_shard(&dir.join(&shard.file), shard)?;
            labels.extend(own);
            shards.push(stored);
        }
        if next != manifest.count {
            let message = format!(
                "samples {next} and on are missing of {}: a part, made with `range`? A trajectories stage whose `parts` name \
                 all parts makes the whole",
                manifest.count
            );
            return Err(Error::data(&path, message));
        }
        let subjects = match manifest.condition {
            ConditionShape::Classes(classes) => Subjects::Classes(classes),
            ConditionShape::Captions(shape) => {
                Subjects::Captions(Captions::open(&dir.join(captions::FILE), shape)?.into())
            }
        };
        if let Some(&bad) = labels.iter().find(|&&x| x as usize >= subjects.len()) {
            let message = format!("label {bad}, expected labels below {}", subjects.len());
            return Err(Error::data(&path, message));
        }
        Ok(Self {
            manifest,
            labels,
            subjects,
            shards,
        })
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no sample.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The shard that holds a sample, and its row there.
    fn place(&self, sample: usize) -> (&Stored, usize) {
        let known = &self.manifest.shards;
        let at = known.partition_point(|shard| shard.end <= sample as u64);
        (&self.shards[at], sample - known[at].start as usize)
    }

    /// Noise (L, D) of a sample.
    pub fn noise(&self, sample: usize) -> Result<Vec<f32>> {
        let (shard, row) = self.place(sample);
        if shard.shape("noise").is_some() {
            return shard.rows("noise", row, 1);
        }
        let (l, d) = (self.manifest.tokens().tokens(), self.manifest.dim);
        Ok(random::noise(self.manifest.seed, sample as u64, l, d))
    }

    /// Tokens (L) of a sample.
    pub fn tokens_of(&self, sample: usize) -> Result<Vec<u32>> {
        let (shard, row) = self.place(sample);
        shard.index_rows("tokens", row, 1)
    }
}
