//! Trajectory datasets on disk: (noise, class, tokens) of the AR flow map, in shards that can be made anywhere and in any
//! order.
//!
//! ```text
//! trajectories/  manifest.json  shard-000000000.safetensors  shard-000010000.safetensors ..  captions.safetensors
//! ```
//!
//! `captions.safetensors` exists if the teacher is conditioned on captions; then `labels` are their numbers. A shard holds
//! `labels` (n) and `tokens` (n, L) in the narrowest unsigned type. Noise is a pure function of the manifest's seed and the
//! sample's index and is not stored, unless it came from a file: then `noise` (n, L, D) is stored with the tokens. This file
//! reads manifests and checks shards against them. Deliberately absent: making samples, and noise.

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sample_shards::{self, MANIFEST, Shard, ShardError, hash, parameters, read_manifest};
use crate::{Checkpoint, Dtype};

/// Name of the captions' file.
pub const CAPTIONS: &str = "captions.safetensors";
/// Version of the layout.
pub const FORMAT: u32 = 1;

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
    /// What its images are conditioned on.
    #[serde(flatten)]
    pub condition: ConditioningShape,
    /// Names of the classes, if they have names; the teacher decides them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub class_names: Vec<String>,
    /// The teacher's distribution: `guidance`, `temperature`, `top_k`, `top_p`.
    #[serde(deserialize_with = "parameters")]
    pub distribution: Value,
    /// Steps of the flow map's solver.
    pub solver_steps: usize,
    /// Content hash of the teacher's artifact.
    pub teacher: String,
    /// Files, in order of their samples.
    pub shards: Vec<Shard>,
}

/// What the images of a model are conditioned on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConditioningShape {
    /// This many classes; the class embedding has an extra row, the unconditional one.
    Classes(usize),
    /// Captions, as features of a text encoder.
    Captions(CaptionShape),
}

/// The shape of a caption's features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptionShape {
    /// Most tokens T of a caption: positions in front of the image.
    pub positions: usize,
    /// Width F of a token's features.
    pub width: usize,
}

impl ConditioningShape {
    /// Number of positions that the conditioning occupies in front of the image's tokens.
    pub fn positions(&self) -> usize {
        match self {
            Self::Classes(_) => 1,
            Self::Captions(shape) => shape.positions,
        }
    }
}

/// A file that holds the samples of its shard.
pub struct OpenShard {
    /// The file.
    pub checkpoint: Checkpoint,
    /// Class of each sample, or number of its caption.
    pub labels: Vec<u32>,
    /// Type of the tokens.
    pub tokens: Dtype,
    /// Whether the file also holds noise.
    pub noise: bool,
}

impl Manifest {
    /// Reads the manifest of a directory.
    ///
    /// # Errors
    /// It is missing, invalid, of another format, or names files elsewhere.
    pub fn read(dir: &Path) -> Result<Self, ShardError> {
        read_manifest(dir, FORMAT, |manifest: &Self| {
            (manifest.format, &manifest.shards)
        })
    }

    /// Opens a file and checks that it contains the samples of a shard: its hash, if known, the number of samples, and the
    /// range of every token and class.
    ///
    /// # Errors
    /// It does not.
    pub fn open_shard(&self, path: &Path, shard: &Shard) -> Result<OpenShard, ShardError> {
        let fault = |message: String| ShardError::new(path, message);
        let bad = |e: crate::Error| ShardError::new(path, e);
        // First, so that a file of the wrong size is refused without being read.
        let opened = self.glance(path, shard)?;
        if let Some(expected) = &shard.hash {
            let found = hash(path)?;
            if found != *expected {
                let message = format!("its content has changed: hash {found}, expected {expected}");
                return Err(fault(message));
            }
        }
        let dictionary = opened.checkpoint.select(None).map_err(bad)?;
        let (n, l) = (opened.labels.len(), self.tokens());
        // Rows at a time: a shard may be large.
        for first in (0..n).step_by(ROWS) {
            let rows = dictionary.get("tokens");
            let rows = rows.and_then(|tokens| tokens.rows(first, ROWS.min(n - first)));
            let rows = rows.ok_or_else(|| fault("tokens are cut off".into()))?;
            let ids = opened.checkpoint.indices(&rows).map_err(bad)?;
            if let Some(at) = ids.iter().position(|&id| id as usize >= self.vocabulary) {
                return Err(fault(format!(
                    "token {} of sample {}, but the codebook has {} codes",
                    ids[at],
                    shard.start as usize + first + at / l,
                    self.vocabulary
                )));
            }
        }
        Ok(opened)
    }

    /// The same without the hash and the tokens, which are not read.
    ///
    /// # Errors
    /// It cannot hold the samples.
    pub fn glance(&self, path: &Path, shard: &Shard) -> Result<OpenShard, ShardError> {
        let fault = |message: String| ShardError::new(path, message);
        let bad = |e: crate::Error| ShardError::new(path, e);
        let checkpoint = Checkpoint::open(path).map_err(bad)?;
        let dictionary = checkpoint.select(None).map_err(bad)?;
        let (n, l) = ((shard.end - shard.start) as usize, self.tokens());
        let of_shape = |name: &str, expected: &[usize]| match dictionary.get(name) {
            Some(tensor) if tensor.shape == expected => Ok(tensor),
            Some(tensor) => Err(fault(format!(
                "{name} of shape {:?}, expected {expected:?}",
                tensor.shape
            ))),
            None => Err(fault(format!("no tensor {name}"))),
        };
        let labels = of_shape("labels", &[n])?;
        let tokens = of_shape("tokens", &[n, l])?.dtype;
        let noise = dictionary.get("noise").is_some();
        if noise {
            of_shape("noise", &[n, l, self.dim])?;
        }
        let labels = checkpoint.indices(labels).map_err(bad)?;
        if let ConditioningShape::Classes(classes) = self.condition
            && let Some(at) = labels.iter().position(|&x| x as usize >= classes)
        {
            return Err(fault(format!(
                "label {} of sample {}, expected labels below {classes}",
                labels[at],
                shard.start as usize + at
            )));
        }
        Ok(OpenShard {
            checkpoint,
            labels,
            tokens,
            noise,
        })
    }

    /// Why another manifest belongs to a different dataset, in words.
    pub fn differs(&self, other: &Self) -> Option<String> {
        let of = |m: &Self| {
            [
                ("count", m.count.to_string()),
                ("seed", m.seed.to_string()),
                ("teacher", m.teacher.clone()),
                ("solver_steps", m.solver_steps.to_string()),
                ("distribution", m.distribution.to_string()),
                (
                    "shape",
                    format!("{:?} of {} codes in {}", m.steps, m.vocabulary, m.dim),
                ),
                ("condition", format!("{:?}", m.condition)),
            ]
        };
        let mut pairs = of(self).into_iter().zip(of(other));
        pairs
            .find(|(own, others)| own != others)
            .map(|((what, own), (_, other))| format!("{what} {other}, expected {own}"))
    }

    /// The shards of a part made elsewhere, by the manifest there.
    ///
    /// # Errors
    /// It cannot be read, or belongs to another dataset.
    pub fn of_part(&self, dir: &Path) -> Result<Vec<Shard>, ShardError> {
        let part = Self::read(dir)?;
        match self.differs(&part) {
            None => Ok(part.shards),
            Some(what) => Err(ShardError::new(
                dir.join(MANIFEST),
                format!("this part belongs to another dataset: {what}"),
            )),
        }
    }

    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.steps
            .iter()
            .fold(0, |sum, step| sum.saturating_add(*step))
    }

    /// The samples that its shards cover, in order, as ranges that do not touch.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        sample_shards::ranges(&self.shards)
    }

    /// The samples of 0..count that no shard holds.
    pub fn gaps(&self) -> Vec<Range<u64>> {
        sample_shards::gaps(&self.shards, self.count)
    }
}

/// Samples whose tokens are checked together.
const ROWS: usize = 1024;
#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(ranges: &[[u64; 2]]) -> Manifest {
        Manifest {
            format: FORMAT,
            seed: 1,
            count: 100,
            steps: vec![1, 4],
            vocabulary: 16,
            dim: 4,
            condition: ConditioningShape::Classes(10),
            class_names: Vec::new(),
            distribution: serde_json::json!({"guidance": 1.5}),
            solver_steps: 64,
            teacher: "t".into(),
            shards: ranges
                .iter()
                .map(|&[start, end]| Shard::of(start..end))
                .collect(),
        }
    }

    #[test]
    fn a_manifest_keeps_to_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        for (file, end) in [("../else", 5), ("a/b", 5), ("", 5), ("shard", 0)] {
            let mut wrong = manifest(&[[0, 5]]);
            (wrong.shards[0].file, wrong.shards[0].end) = (file.into(), end);
            std::fs::write(
                dir.path().join(MANIFEST),
                serde_json::to_string(&wrong).unwrap(),
            )
            .unwrap();
            let error = Manifest::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("not a valid shard"), "{error}");
        }
    }

    #[test]
    fn a_file_is_one_shard() {
        let dir = tempfile::tempdir().unwrap();
        let mut many = manifest(&[]);
        many.shards = (0..100_000)
            .map(|at| Shard {
                file: "shard".into(),
                ..Shard::of(at..at + 1)
            })
            .collect();
        let text = serde_json::to_string(&many).unwrap();
        std::fs::write(dir.path().join(MANIFEST), text).unwrap();
        let error = Manifest::read(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("two shards have the file \"shard\""),
            "{error}"
        );
    }

    #[test]
    fn a_shard_of_another_size_is_not_read_to_be_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard");
        std::fs::write(&path, b"\x02\0\0\0\0\0\0\0{}").unwrap();
        // It would take hours to read and no space on the disk.
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1 << 42).unwrap();
        let manifest = manifest(&[[0, 5]]);
        let shard = Shard {
            hash: Some("0".repeat(64)),
            ..manifest.shards[0].clone()
        };
        let error = manifest.open_shard(&path, &shard).map(drop).unwrap_err();
        assert!(error.message.contains("damaged"), "{error}");
    }

    #[test]
    fn names_and_hashes_in_a_manifest_are_such() {
        let good = Shard::of(0..5);
        assert!(good.is_sound());
        for file in ["a\nerror: b", "\x1b[2J", "..", "a/b", ""] {
            let file = file.to_owned();
            assert!(
                !Shard {
                    file,
                    ..good.clone()
                }
                .is_sound()
            );
        }
        let hash = Some("z".repeat(1 << 20));
        assert!(!Shard { hash, ..good }.is_sound());
    }

    #[test]
    fn other_datasets_are_told_apart() {
        let (one, mut other) = (manifest(&[]), manifest(&[[0, 3]]));
        assert_eq!(one.differs(&other), None);
        other.distribution = serde_json::json!({"guidance": 2.0});
        let said = one.differs(&other).unwrap();
        assert!(said.contains(r#"distribution {"guidance":2.0}"#), "{said}");
    }
}
