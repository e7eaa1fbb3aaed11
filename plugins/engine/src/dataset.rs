//! Using trajectory datasets: writing shards, and reading samples when training needs them.
//!
//! The format on disk is in `retort_checkpoint::trajectories`. Every intermediate state X_t follows from noise and tokens.

use std::path::Path;

use retort_checkpoint::sample_shards::{MANIFEST, Shard, ShardError};
use retort_checkpoint::trajectories::Manifest;
use safetensors::tensor::{Dtype, TensorView};

use crate::captions::{self, CaptionFeatures, ConditioningSource};
use crate::error::{Error, Result};
use crate::model::{ConditioningShape, TokenShape};
use crate::random;
use crate::weights::{self, CheckpointWeights};

/// Opens a file with the samples of a shard, and refuses it if it does not hold them. Returns their labels too.
pub fn open_shard(
    manifest: &Manifest,
    path: &Path,
    shard: &Shard,
) -> Result<(CheckpointWeights, Vec<u32>)> {
    let opened = manifest.open_shard(path, shard)?;
    let dictionary = opened.checkpoint.select(None);
    let dictionary = dictionary.map_err(Error::checkpoint(path))?.clone();
    Ok((
        CheckpointWeights::of(path, opened.checkpoint, dictionary),
        opened.labels,
    ))
}

impl From<ShardError> for Error {
    fn from(fault: ShardError) -> Self {
        Self::data(fault.path, fault.message)
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

/// A dataset on disk: labels are in memory; tokens are read and noise is generated on demand.
pub struct Dataset {
    /// Its manifest.
    pub manifest: Manifest,
    /// Class of each sample, or number of its caption.
    pub labels: Vec<u32>,
    /// The meaning of the labels.
    pub conditioning: ConditioningSource,
    /// The shards, in order of their samples.
    shards: Vec<CheckpointWeights>,
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
            let (stored, own) = open_shard(&manifest, &dir.join(&shard.file), shard)?;
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
        let conditioning = match manifest.condition {
            ConditioningShape::Classes(classes) => ConditioningSource::Classes(classes),
            ConditioningShape::Captions(shape) => ConditioningSource::Captions(
                CaptionFeatures::open(&dir.join(captions::FILE), shape)?.into(),
            ),
        };
        if let Some(&bad) = labels.iter().find(|&&x| x as usize >= conditioning.len()) {
            let message = format!("label {bad}, expected labels below {}", conditioning.len());
            return Err(Error::data(&path, message));
        }
        Ok(Self {
            manifest,
            labels,
            conditioning,
            shards,
        })
    }

    /// Shape of the token sequences.
    pub fn shape(&self) -> TokenShape {
        TokenShape {
            steps: self.manifest.steps.clone(),
            vocabulary: self.manifest.vocabulary,
            dim: self.manifest.dim,
            condition: self.manifest.condition,
        }
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
    fn place(&self, sample: usize) -> (&CheckpointWeights, usize) {
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
        let (l, d) = (self.manifest.tokens(), self.manifest.dim);
        Ok(random::noise(self.manifest.seed, sample as u64, l, d))
    }

    /// Tokens (L) of a sample.
    pub fn tokens_of(&self, sample: usize) -> Result<Vec<u32>> {
        let (shard, row) = self.place(sample);
        shard.index_rows("tokens", row, 1)
    }

    /// One token of a sample.
    pub fn token(&self, sample: usize, position: usize) -> Result<u32> {
        let (shard, row) = self.place(sample);
        shard.index_at("tokens", &[row, position])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1.2 million pairs of VAR: 680 of 4096 codes, and one of 1000 classes.
    #[test]
    fn a_million_pairs_fit_on_a_disk() {
        const PAIRS: usize = 1000;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("shard");
        let labels: Vec<u32> = (0..PAIRS as u32).collect();
        let tokens: Vec<u32> = (0..680 * PAIRS as u32).map(|i| i * 37 % 4096).collect();
        write_shard(&path, &labels, &tokens, None).expect("a shard");
        let bytes = path.metadata().expect("a file").len();
        let million = bytes * 1_200_000 / PAIRS as u64;
        assert!(million < 1_650_000_000, "{million} bytes");
        let stored = CheckpointWeights::open(&path, None).expect("a shard");
        assert_eq!(stored.indices("tokens").expect("tokens"), tokens);
        assert_eq!(stored.indices("labels").expect("labels"), labels);
    }
}
