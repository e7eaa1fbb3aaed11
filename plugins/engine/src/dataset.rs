//! Trajectory datasets: (noise, class, tokens) of the AR flow map, in shards that anyone can make in any order.
//!
//! ```text
//! trajectories/  manifest.json  shard-00000.safetensors  shard-00001.safetensors ..  captions.safetensors
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
    /// Runge-Kutta steps of the flow map.
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

/// A dataset in memory: tokens as 16 or 32 bits would allow, noise regenerated on demand.
pub struct Dataset {
    /// Its manifest.
    pub manifest: Manifest,
    /// Class of each sample, or number of its caption.
    pub labels: Vec<u32>,
    /// What the labels stand for.
    pub subjects: Subjects,
    /// Tokens (n, L), row-major.
    pub tokens: Vec<u32>,
    /// Noise (n, L, D) where it was given.
    noise: Option<Vec<f32>>,
}

impl Dataset {
    /// Reads and checks a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| Error::data(&path, e))?;
        if manifest.format != FORMAT {
            return Err(Error::data(
                &path,
                format!("format {}, expected {FORMAT}", manifest.format),
            ));
        }
        let l = manifest.tokens().tokens();
        let (mut labels, mut tokens) = (Vec::new(), Vec::new());
        let mut noise: Option<Vec<f32>> = None;
        let mut next = 0;
        for shard in &manifest.shards {
            if shard.start != next {
                return Err(Error::data(
                    &path,
                    format!("shards leave samples {next}..{} out", shard.start),
                ));
            }
            next = shard.end;
            let part = read_shard(&dir.join(&shard.file))?;
            let n = (shard.end - shard.start) as usize;
            if part.labels.len() != n || part.tokens.len() != n * l {
                let found = format!(
                    "{} labels and {} tokens",
                    part.labels.len(),
                    part.tokens.len()
                );
                return Err(Error::data(
                    dir.join(&shard.file),
                    format!("{found}, expected {n} and {}", n * l),
                ));
            }
            if let Some(&bad) = part
                .tokens
                .iter()
                .find(|&&t| t as usize >= manifest.vocabulary)
            {
                let message = format!(
                    "token {bad}, but the codebook has {} codes",
                    manifest.vocabulary
                );
                return Err(Error::data(dir.join(&shard.file), message));
            }
            labels.extend(part.labels);
            tokens.extend(part.tokens);
            if let Some(part) = part.noise {
                noise.get_or_insert_default().extend(part);
            }
        }
        if next != manifest.count {
            return Err(Error::data(
                &path,
                format!("shards hold {next} of {} samples", manifest.count),
            ));
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
            tokens,
            noise,
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

    /// Noise (L, D) of a sample.
    pub fn noise(&self, sample: usize) -> Vec<f32> {
        let (l, d) = (self.tokens.len() / self.len(), self.manifest.dim);
        match &self.noise {
            Some(noise) => noise[sample * l * d..(sample + 1) * l * d].to_vec(),
            None => random::noise(self.manifest.seed, sample as u64, l, d),
        }
    }

    /// Tokens (L) of a sample.
    pub fn tokens_of(&self, sample: usize) -> &[u32] {
        let l = self.tokens.len() / self.len();
        &self.tokens[sample * l..(sample + 1) * l]
    }
}

/// The contents of a shard.
pub struct ShardData {
    /// Class of each sample, or number of its caption.
    pub labels: Vec<u32>,
    /// Tokens, row-major.
    pub tokens: Vec<u32>,
    /// Noise, where it was given.
    pub noise: Option<Vec<f32>>,
}

/// Reads one shard.
pub fn read_shard(path: &Path) -> Result<ShardData> {
    let stored = Stored::open(path, None)?;
    let noise = stored.shape("noise").map(|_| stored.floats("noise"));
    Ok(ShardData {
        labels: stored.indices("labels")?,
        tokens: stored.indices("tokens")?,
        noise: noise.transpose()?,
    })
}
