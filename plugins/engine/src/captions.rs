//! What samples are conditioned on: classes, or captions as features of a text encoder, which are in a separate file.
//!
//! ```text
//! captions.safetensors   lengths (n): tokens of each caption
//!                        features (sum of lengths, F): those of all captions, one after the other
//! ```
//!
//! Padding is not stored, and only the captions of a batch are read.

use std::path::Path;

/// Name of the file in an artifact.
pub use retort_checkpoint::trajectories::CAPTIONS as FILE;
use safetensors::tensor::Dtype;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::{BatchConditioning, CaptionBatch, CaptionShape};
use crate::weights::{CheckpointWeights, Writer};

/// The meaning of samples' labels.
pub enum ConditioningSource {
    /// Class ids, so many.
    Classes(usize),
    /// Numbers of captions.
    Captions(Box<CaptionFeatures>),
}

impl ConditioningSource {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Classes(classes) => *classes,
            Self::Captions(captions) => captions.starts.len() - 1,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The conditioning of a batch with these labels. The labels are below [`ConditioningSource::len`].
    pub fn batch<B: Backend>(&self, backend: &B, labels: &[u32]) -> Result<BatchConditioning<B>> {
        self.batch_with_dropout(backend, labels, &[])
    }

    /// The same with some entries dropped for guidance, according to `dropped`; none if that is empty.
    pub fn batch_with_dropout<B: Backend>(
        &self,
        backend: &B,
        labels: &[u32],
        dropped: &[bool],
    ) -> Result<BatchConditioning<B>> {
        match self {
            Self::Classes(classes) => {
                let mut labels = labels.to_vec();
                for (label, _) in labels
                    .iter_mut()
                    .zip(dropped)
                    .filter(|(_, dropped)| **dropped)
                {
                    *label = *classes as u32;
                }
                let shape = [labels.len()];
                Ok(BatchConditioning::Classes(
                    backend.indices(&labels, &shape)?,
                ))
            }
            Self::Captions(captions) => captions.batch(backend, labels, dropped),
        }
    }
}

/// Captions in a file.
pub struct CaptionFeatures {
    stored: CheckpointWeights,
    /// First row of each caption, and one past the last row of all.
    starts: Vec<usize>,
    shape: CaptionShape,
}

impl CaptionFeatures {
    /// Opens a file that [`write`] has written for a model with captions of this shape.
    pub fn open(path: &Path, shape: CaptionShape) -> Result<Self> {
        let stored = CheckpointWeights::open(path, None)?;
        let lengths = stored.indices("lengths")?;
        let mut starts = vec![0];
        for &length in &lengths {
            if length == 0 || length as usize > shape.positions {
                let message = format!(
                    "a caption of {length} tokens, expected 1 to {}",
                    shape.positions
                );
                return Err(Error::data(path, message));
            }
            starts.push(starts[starts.len() - 1] + length as usize);
        }
        let expected = [starts[lengths.len()], shape.width];
        match stored.shape("features") {
            Some(found) if found == expected => Ok(Self {
                stored,
                starts,
                shape,
            }),
            found => Err(Error::data(
                path,
                format!("features of shape {found:?}, expected {expected:?}"),
            )),
        }
    }

    /// Whether another file holds the same features of the same captions.
    pub fn are_in(&self, path: &Path) -> Result<bool> {
        let other = Self::open(path, self.shape)?;
        if self.starts != other.starts {
            return Ok(false);
        }
        for pair in self.starts.windows(2) {
            let (first, count) = (pair[0], pair[1] - pair[0]);
            let rows = |captions: &Self| captions.stored.rows("features", first, count);
            if rows(self)? != rows(&other)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn batch<B: Backend>(
        &self,
        backend: &B,
        numbers: &[u32],
        dropped: &[bool],
    ) -> Result<BatchConditioning<B>> {
        let CaptionShape { positions, width } = self.shape;
        let mut features = vec![0.0; numbers.len() * positions * width];
        let mut padding = Vec::with_capacity(numbers.len());
        for (rows, &number) in features.chunks_exact_mut(positions * width).zip(numbers) {
            let (start, end) = (
                self.starts[number as usize],
                self.starts[number as usize + 1],
            );
            let before = positions - (end - start);
            let found = self.stored.rows("features", start, end - start)?;
            rows[before * width..].copy_from_slice(&found);
            padding.push(before);
        }
        let shape = [numbers.len(), positions, width];
        Ok(BatchConditioning::Captions(CaptionBatch {
            features: backend.floats(&features, &shape)?,
            padding,
            dropped: dropped.to_vec(),
        }))
    }
}

/// Writes a file of captions with these numbers of tokens; `each` passes their features to its argument, in order and in
/// pieces of any size.
pub fn write(
    path: &Path,
    lengths: &[u32],
    width: usize,
    each: impl FnOnce(&mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let rows = lengths.iter().map(|&n| n as usize).sum();
    let mut writer = Writer::create(
        path,
        vec![
            ("lengths".into(), Dtype::U32, vec![lengths.len()]),
            ("features".into(), Dtype::F32, vec![rows, width]),
        ],
    )?;
    let bytes: Vec<u8> = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
    writer.bytes(&bytes)?;
    each(&mut |features| writer.floats(features))?;
    writer.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_as_written_and_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let data: Vec<f32> = (0..8).map(|x| x as f32).collect();
        write(&path, &[1, 3], 2, |give| {
            give(&data[..3])?;
            give(&data[3..])
        })
        .unwrap();
        let shape = |positions, width| CaptionShape { positions, width };
        let captions = CaptionFeatures::open(&path, shape(4, 2)).unwrap();
        assert_eq!(captions.starts, [0, 1, 4]);
        assert_eq!(captions.stored.rows("features", 1, 3).unwrap(), data[2..]);
        let other = dir.path().join("other");
        for (lengths, last, same) in [
            ([1, 3], 7.0, true),
            ([1, 3], 8.0, false),
            ([2, 2], 7.0, false),
        ] {
            let data = [&data[..7], &[last]].concat();
            write(&other, &lengths, 2, |give| give(&data)).unwrap();
            assert_eq!(captions.are_in(&other).unwrap(), same, "{lengths:?} {last}");
        }
        for (shape, expected) in [
            (shape(2, 2), "a caption of 3 tokens, expected 1 to 2"),
            (
                shape(4, 3),
                "features of shape Some([4, 2]), expected [4, 3]",
            ),
        ] {
            let error = CaptionFeatures::open(&path, shape)
                .err()
                .unwrap()
                .to_string();
            assert!(error.contains(expected), "{error}");
        }
        let short = write(&path, &[2], 2, |give| give(&data[..3])).unwrap_err();
        assert!(short.to_string().contains("4 bytes are missing"), "{short}");
    }
}
