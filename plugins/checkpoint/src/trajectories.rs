//! Trajectory datasets on disk: (noise, class, tokens) of the AR flow map, in shards that anyone can make in any order.
//!
//! ```text
//! trajectories/  manifest.json  shard-000000000.safetensors  shard-000010000.safetensors ..  captions.safetensors
//! ```
//!
//! `captions.safetensors` is there where the teacher is conditioned on captions; `labels` number these then. A shard holds
//! `labels` (n) and `tokens` (n, L) in the narrowest unsigned type. Noise is a pure function of the
//! manifest's seed and the sample's index and is not stored, unless it was given from a file: then `noise` (n, L, D)
//! stands beside the tokens. Here: what a manifest says, whether a file holds what it says, and which shards make a whole.
//! Deliberately absent: making samples, and noise.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Checkpoint, Dtype, regular};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// Name of the captions' file.
pub const CAPTIONS: &str = "captions.safetensors";
/// Version of the layout.
pub const FORMAT: u32 = 1;

/// What is wrong with a file of a dataset.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct Fault {
    /// The file.
    pub path: PathBuf,
    /// What is wrong, and what was expected.
    pub message: String,
}

impl Fault {
    fn new(path: impl Into<PathBuf>, message: impl std::fmt::Display) -> Self {
        Self {
            path: path.into(),
            message: message.to_string(),
        }
    }
}

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
    /// The teacher's distribution: `guidance`, `temperature`, `top_k`, `top_p`.
    pub distribution: Value,
    /// Steps of the flow map's solver.
    pub solver_steps: usize,
    /// Content hash of the teacher's artifact.
    pub teacher: String,
    /// Files, in order of their samples.
    pub shards: Vec<Shard>,
}

/// What the images of a model are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConditionShape {
    /// Classes, so many of them; the class embedding has one row more, the unconditional one.
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

impl ConditionShape {
    /// Positions of the sequence that the condition takes, in front of the image's tokens.
    pub fn positions(&self) -> usize {
        match self {
            Self::Classes(_) => 1,
            Self::Captions(shape) => shape.positions,
        }
    }
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
    /// Hex BLAKE3 of the file; unknown of one that is still to be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
}

impl Shard {
    /// The shard of some samples, under the name that it has everywhere.
    pub fn of(samples: Range<u64>) -> Self {
        Self {
            file: format!("shard-{:09}.safetensors", samples.start),
            start: samples.start,
            end: samples.end,
            hash: None,
        }
    }
}

/// A file that holds the samples of its shard.
pub struct Opened {
    /// The file.
    pub checkpoint: Checkpoint,
    /// Class of each sample, or number of its caption.
    pub labels: Vec<u32>,
    /// Type of the tokens.
    pub tokens: Dtype,
    /// Whether noise stands beside them.
    pub noise: bool,
}

impl Manifest {
    /// Reads that of a directory.
    ///
    /// # Errors
    /// It is missing, no manifest, of another format, or names files elsewhere.
    pub fn read(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join(MANIFEST);
        let text = regular::read(&path, LONGEST_MANIFEST).map_err(|e| Fault::new(&path, e))?;
        let manifest: Self = serde_json::from_slice(&text).map_err(|e| Fault::new(&path, e))?;
        let wrong = if manifest.format != FORMAT {
            format!("format {}, expected {FORMAT}", manifest.format)
        } else if let Some(bad) = manifest.shards.iter().find(|shard| !shard.is_sound()) {
            format!(
                "samples {}..{} in `{}`: no shard",
                bad.start, bad.end, bad.file
            )
        } else {
            return Ok(manifest);
        };
        Err(Fault::new(path, wrong))
    }

    /// Opens a file and looks whether it holds the samples of a shard: its hash, where that is known, the number of
    /// samples, and that every token and every class is one.
    ///
    /// # Errors
    /// It does not.
    pub fn open_shard(&self, path: &Path, shard: &Shard) -> Result<Opened, Fault> {
        let fault = |message: String| Fault::new(path, message);
        let bad = |e: crate::Error| Fault::new(path, e);
        if let Some(expected) = &shard.hash {
            let found = hash(path)?;
            if found != *expected {
                let message = format!("its content has changed: hash {found}, expected {expected}");
                return Err(fault(message));
            }
        }
        let opened = self.glance(path, shard)?;
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

    /// The same, but for the hash and the tokens, which are not read.
    ///
    /// # Errors
    /// It cannot hold the samples.
    pub fn glance(&self, path: &Path, shard: &Shard) -> Result<Opened, Fault> {
        let fault = |message: String| Fault::new(path, message);
        let bad = |e: crate::Error| Fault::new(path, e);
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
        if let ConditionShape::Classes(classes) = self.condition
            && let Some(at) = labels.iter().position(|&x| x as usize >= classes)
        {
            return Err(fault(format!(
                "label {} of sample {}, expected labels below {classes}",
                labels[at],
                shard.start as usize + at
            )));
        }
        Ok(Opened {
            checkpoint,
            labels,
            tokens,
            noise,
        })
    }

    /// What makes another manifest one of another dataset, in words.
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
    /// It cannot be read, or is that of another dataset.
    pub fn of_part(&self, dir: &Path) -> Result<Vec<Shard>, Fault> {
        let part = Self::read(dir)?;
        match self.differs(&part) {
            None => Ok(part.shards),
            Some(what) => Err(Fault::new(
                dir.join(MANIFEST),
                format!("this is no part of the same dataset: {what}"),
            )),
        }
    }

    /// Tokens of a sample.
    pub fn tokens(&self) -> usize {
        self.steps.iter().sum()
    }

    /// The samples that its shards cover, in order, as ranges that do not touch.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut shards: Vec<&Shard> = self.shards.iter().collect();
        shards.sort_by_key(|shard| shard.start);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for shard in shards {
            match ranges.last_mut() {
                Some(last) if last.end >= shard.start => last.end = last.end.max(shard.end),
                _ => ranges.push(shard.start..shard.end),
            }
        }
        ranges
    }

    /// The samples of 0..count that no shard holds.
    pub fn gaps(&self) -> Vec<Range<u64>> {
        let ranges = self.ranges();
        let ends = [0].into_iter().chain(ranges.iter().map(|range| range.end));
        let starts = ranges.iter().map(|range| range.start).chain([self.count]);
        ends.zip(starts)
            .map(|(from, to)| from..to)
            .filter(|gap| gap.start < gap.end)
            .collect()
    }
}

/// Samples whose tokens are looked at together.
const ROWS: usize = 1024;
/// Bytes of the longest manifest that is read: half a million shards.
const LONGEST_MANIFEST: u64 = 64 << 20;

impl Shard {
    fn is_sound(&self) -> bool {
        let name = Path::new(&self.file);
        self.start < self.end && name.file_name().is_some_and(|own| own == name.as_os_str())
    }
}

/// Shards of several parts in the order of their samples, each with its folder. The same samples made twice are taken once.
///
/// # Errors
/// Two overlap.
pub fn joined(parts: Vec<(PathBuf, Vec<Shard>)>) -> Result<Vec<(PathBuf, Shard)>, Fault> {
    let mut all: Vec<(PathBuf, Shard)> = parts
        .into_iter()
        .flat_map(|(dir, shards)| shards.into_iter().map(move |shard| (dir.clone(), shard)))
        .collect();
    all.sort_by_key(|(_, shard)| (shard.start, shard.end));
    all.dedup_by_key(|(_, shard)| (shard.start, shard.end));
    for pair in all.windows(2) {
        let [(one, a), (other, b)] = pair else {
            continue;
        };
        if b.start < a.end {
            let message = format!(
                "its samples {}..{} overlap with {}..{} of {}",
                b.start,
                b.end,
                a.start,
                a.end,
                one.join(&a.file).display()
            );
            return Err(Fault::new(other.join(&b.file), message));
        }
    }
    Ok(all)
}

/// Hex BLAKE3 of a file.
///
/// # Errors
/// It cannot be read.
pub fn hash(path: &Path) -> Result<String, Fault> {
    let read = || -> std::io::Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(regular::open(path)?)?;
        Ok(hasher.finalize().to_hex().to_string())
    };
    read().map_err(|e| Fault::new(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn manifest(ranges: &[[u64; 2]]) -> Manifest {
        Manifest {
            format: FORMAT,
            seed: 1,
            count: 100,
            steps: vec![1, 4],
            vocabulary: 16,
            dim: 4,
            condition: ConditionShape::Classes(10),
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
    fn ranges_and_gaps() {
        let ends = |ranges: Vec<Range<u64>>| -> Vec<[u64; 2]> {
            ranges.iter().map(|r| [r.start, r.end]).collect()
        };
        let whole = manifest(&[[0, 40], [40, 100]]);
        assert_eq!(ends(whole.ranges()), [[0, 100]]);
        assert!(whole.gaps().is_empty());
        let parts = manifest(&[[50, 60], [10, 20], [20, 30]]);
        assert_eq!(ends(parts.ranges()), [[10, 30], [50, 60]]);
        assert_eq!(ends(parts.gaps()), [[0, 10], [30, 50], [60, 100]]);
        assert_eq!(ends(manifest(&[]).gaps()), [[0, 100]]);
    }

    #[test]
    fn parts_are_joined_in_order_and_must_not_overlap() {
        let part = |name: &str, ranges: &[[u64; 2]]| (name.into(), manifest(ranges).shards);
        let all = joined(vec![
            part("b", &[[20, 40], [0, 20]]),
            part("a", &[[40, 50], [0, 20]]),
        ])
        .unwrap();
        let found: Vec<(u64, u64)> = all.iter().map(|(_, s)| (s.start, s.end)).collect();
        assert_eq!(found, [(0, 20), (20, 40), (40, 50)]);
        let error = joined(vec![part("a", &[[0, 20]]), part("b", &[[10, 30]])]).unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("b/shard-000000010.safetensors: its samples 10..30 overlap"),
            "{said}"
        );
        assert!(
            said.contains("0..20 of a/shard-000000000.safetensors"),
            "{said}"
        );
    }

    #[test]
    fn a_manifest_keeps_to_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        for (file, end) in [("../else", 5), ("a/b", 5), ("", 5), ("shard", 0)] {
            let mut wrong = manifest(&[[0, 5]]);
            (wrong.shards[0].file, wrong.shards[0].end) = (file.into(), end);
            fs::write(
                dir.path().join(MANIFEST),
                serde_json::to_string(&wrong).unwrap(),
            )
            .unwrap();
            let error = Manifest::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("no shard"), "{error}");
        }
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
