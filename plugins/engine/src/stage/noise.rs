//! The noise of samples for `sample` and `trajectories`: drawn from the seed, or read from a file.

use std::ops::Range;
use std::path::Path;

use retort_abi::StageJob;
use retort_checkpoint::sample_shards::Shard;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::resolve;
use crate::model::TokenShape;
use crate::random;
use crate::stage::shards::batches;
use crate::weights::CheckpointWeights;

/// A tensor of a safetensors file.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TensorFile {
    /// The file.
    #[schemars(extend("x-retort-file" = "file"))]
    pub file: String,
    /// The tensor's name.
    pub tensor: String,
}

impl TensorFile {
    fn open(&self, base: &Path) -> Result<CheckpointWeights> {
        CheckpointWeights::open(&resolve(base, &self.file), None)
    }

    /// Its floats, of a shape, read on demand.
    fn rows(&self, base: &Path, shape: &[usize]) -> Result<ExternalNoise> {
        let (stored, tensor) = (self.open(base)?, self.tensor.clone());
        match stored.shape(&tensor) {
            Some(found) if found == shape => Ok(ExternalNoise { stored, tensor }),
            Some(found) => {
                let message = format!("tensor {tensor}: shape {found:?}, expected {shape:?}");
                Err(Error::data(stored.path(), message))
            }
            None => Err(Error::data(stored.path(), format!("no tensor {tensor}"))),
        }
    }

    /// Its indices.
    pub fn indices(&self, base: &Path) -> Result<Vec<u32>> {
        self.open(base)?.indices(&self.tensor)
    }
}

/// A tensor of a file, one row a sample.
struct ExternalNoise {
    stored: CheckpointWeights,
    tensor: String,
}

impl ExternalNoise {
    /// The floats of some samples.
    fn read(&self, samples: Range<u64>) -> Result<Vec<f32>> {
        let (first, end) = (samples.start as usize, samples.end as usize);
        self.stored.rows(&self.tensor, first, end - first)
    }
}

/// The noise (L, D) of every sample.
pub struct Noise {
    given: Option<ExternalNoise>,
    seed: u64,
    tokens: usize,
    dim: usize,
}

impl Noise {
    /// The noise of `count` samples of a shape.
    pub fn open(
        job: &StageJob,
        given: Option<&TensorFile>,
        count: u64,
        shape: &TokenShape,
    ) -> Result<Self> {
        let (tokens, dim) = (shape.count(), shape.dim);
        let given = match given {
            Some(given) => Some(given.rows(&job.base_dir, &[count as usize, tokens, dim])?),
            None => None,
        };
        Ok(Self {
            given,
            seed: job.seed,
            tokens,
            dim,
        })
    }

    /// The noise of some samples (n, L, D).
    pub fn read(&self, samples: Range<u64>) -> Result<Vec<f32>> {
        match &self.given {
            Some(given) => given.read(samples),
            None => Ok(random::noises(self.seed, samples, self.tokens, self.dim)),
        }
    }

    /// Whether it comes from a file: then it cannot be regenerated and is stored with the samples.
    pub fn is_given(&self) -> bool {
        self.given.is_some()
    }

    /// Refuses a file whose samples were made with other labels or other noise. Compares `batch` samples at a time.
    pub fn check(
        &self,
        path: &Path,
        shard: &Shard,
        (stored, found): (&CheckpointWeights, &[u32]),
        labels: &[u32],
        batch: usize,
    ) -> Result<()> {
        let other = if found != labels {
            "labels"
        } else if !self.is_in(stored, shard, batch)? {
            "noise"
        } else {
            return Ok(());
        };
        let message = format!("these samples were made with other {other}");
        Err(Error::data(path, message))
    }

    /// Whether a shard contains the given noise, or none if none was given.
    fn is_in(&self, stored: &CheckpointWeights, shard: &Shard, batch: usize) -> Result<bool> {
        let Some(given) = &self.given else {
            return Ok(stored.shape("noise").is_none());
        };
        if stored.shape("noise").is_none() {
            return Ok(false);
        }
        for rows in batches(shard.start..shard.end, batch) {
            let (first, count) = (rows.start - shard.start, rows.end - rows.start);
            if given.read(rows)? != stored.rows("noise", first as usize, count as usize)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
