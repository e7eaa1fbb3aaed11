//! Samples in files that can be made anywhere and in any order: which samples a file contains, how ranges are divided, and
//! when a set is complete. Trajectories and sets of samples are stored this way. Deliberately absent: what a sample is.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::{json, regular};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// The most shards of a set: the manifest of more is not read.
pub const MOST_SHARDS: u64 = 100_000;
/// Bytes of the longest manifest that is read; one of more than [`MOST_SHARDS`] shards is refused for its memory.
const LONGEST_MANIFEST: u64 = 64 << 20;
/// The most bytes of a manifest's parameters, as text: they are copied and compared.
const LONGEST_PARAMETERS: usize = 256 << 10;

/// An error in a file of a dataset.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct ShardError {
    /// The file.
    pub path: PathBuf,
    /// The error and the expectation.
    pub message: String,
}

impl ShardError {
    /// An error about a file.
    pub fn new(path: impl Into<PathBuf>, message: impl std::fmt::Display) -> Self {
        Self {
            path: path.into(),
            message: message.to_string(),
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
    /// Hex BLAKE3 of the file; None while it has not been made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
}

impl Shard {
    /// The shard of some samples, with its standard name.
    pub fn of(samples: Range<u64>) -> Self {
        Self {
            file: format!("shard-{:09}.safetensors", samples.start),
            start: samples.start,
            end: samples.end,
            hash: None,
        }
    }

    /// Whether it is not empty and its file is within the directory.
    pub fn is_sound(&self) -> bool {
        let name = Path::new(&self.file);
        let is_plain = |c: char| !c.is_control();
        self.start < self.end
            && self.file.chars().all(is_plain)
            && self.hash.as_ref().is_none_or(|hash| hash.len() == 64)
            && name.file_name().is_some_and(|own| own == name.as_os_str())
    }
}

/// Samples divided at multiples of a size.
pub fn cut(samples: Range<u64>, size: u64) -> impl Iterator<Item = Shard> {
    let Range { start, end } = samples;
    (start / size..end.div_ceil(size))
        .map(move |i| Shard::of((i * size).max(start)..((i + 1) * size).min(end)))
        .filter(|shard| shard.start < shard.end)
}

/// The samples that shards cover, in order, as ranges that do not touch.
pub fn ranges(shards: &[Shard]) -> Vec<Range<u64>> {
    let mut shards: Vec<&Shard> = shards.iter().collect();
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
pub fn gaps(shards: &[Shard], count: u64) -> Vec<Range<u64>> {
    let ranges = ranges(shards);
    let ends = [0].into_iter().chain(ranges.iter().map(|range| range.end));
    let starts = ranges.iter().map(|range| range.start).chain([count]);
    ends.zip(starts)
        .map(|(from, to)| from..to)
        .filter(|gap| gap.start < gap.end)
        .collect()
}

/// Reads the manifest of a directory; `shards` and `format` access its fields.
///
/// # Errors
/// It is missing, invalid, of another format, or names files elsewhere.
pub fn read_manifest<M: DeserializeOwned>(
    dir: &Path,
    format: u32,
    of: impl Fn(&M) -> (u32, &[Shard]),
) -> Result<M, ShardError> {
    let path = dir.join(MANIFEST);
    let text = regular::read(&path, LONGEST_MANIFEST).map_err(|e| ShardError::new(&path, e))?;
    let manifest: M = json::parse(&text).map_err(|e| ShardError::new(&path, e))?;
    let (found, shards) = of(&manifest);
    let wrong = if found != format {
        format!("format {found}, expected {format}")
    } else if let Some(bad) = shards.iter().find(|shard| !shard.is_sound()) {
        let Shard {
            start, end, file, ..
        } = bad;
        let file: String = file.chars().take(255).collect();
        format!("samples {start}..{end} in {file:?}: not a valid shard")
    } else if let Some(twice) = named_twice(shards) {
        format!("two shards have the file {twice:?}: expected one for each")
    } else {
        return Ok(manifest);
    };
    Err(ShardError::new(path, wrong))
}

/// Reads a manifest's parameters of any form: for `#[serde(deserialize_with)]`.
///
/// # Errors
/// They are not JSON, or too long.
pub fn parameters<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    let value = Value::deserialize(deserializer)?;
    match value.to_string().len() {
        ..=LONGEST_PARAMETERS => Ok(value),
        length => Err(D::Error::custom(format!(
            "parameters of {length} bytes, expected at most {LONGEST_PARAMETERS}"
        ))),
    }
}

/// One file for several shards: reading it for each of them would take unbounded time.
fn named_twice(shards: &[Shard]) -> Option<&str> {
    let mut seen = HashSet::with_capacity(shards.len());
    let mut files = shards.iter().map(|shard| shard.file.as_str());
    files.find(|file| !seen.insert(*file))
}

/// Shards of several parts in the order of their samples, each with its folder. The same samples made twice are taken once.
///
/// # Errors
/// Two overlap.
pub fn joined(parts: Vec<(PathBuf, Vec<Shard>)>) -> Result<Vec<(PathBuf, Shard)>, ShardError> {
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
            return Err(ShardError::new(other.join(&b.file), message));
        }
    }
    Ok(all)
}

/// Hex BLAKE3 of a file.
///
/// # Errors
/// It cannot be read.
pub fn hash(path: &Path) -> Result<String, ShardError> {
    let read = || -> std::io::Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(regular::open(path)?)?;
        Ok(hasher.finalize().to_hex().to_string())
    };
    read().map_err(|e| ShardError::new(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(ranges: &[[u64; 2]]) -> Vec<Shard> {
        let all = ranges.iter();
        all.map(|&[start, end]| Shard::of(start..end)).collect()
    }

    #[test]
    fn ranges_and_gaps() {
        let ends = |ranges: Vec<Range<u64>>| -> Vec<[u64; 2]> {
            ranges.iter().map(|r| [r.start, r.end]).collect()
        };
        let whole = shards(&[[0, 40], [40, 100]]);
        assert_eq!(ends(ranges(&whole)), [[0, 100]]);
        assert!(gaps(&whole, 100).is_empty());
        let parts = shards(&[[50, 60], [10, 20], [20, 30]]);
        assert_eq!(ends(ranges(&parts)), [[10, 30], [50, 60]]);
        assert_eq!(ends(gaps(&parts, 100)), [[0, 10], [30, 50], [60, 100]]);
        assert_eq!(ends(gaps(&[], 100)), [[0, 100]]);
    }

    #[test]
    fn a_manifest_that_is_large_in_memory_is_refused() {
        #[derive(Debug, Deserialize)]
        struct Manifest {
            #[serde(deserialize_with = "parameters")]
            sampler: Value,
            #[serde(default)]
            shards: Vec<Shard>,
        }

        let dir = tempfile::tempdir().unwrap();
        let read = |sampler: &str| {
            let text = format!("{{\"sampler\": {sampler}}}");
            std::fs::write(dir.path().join(MANIFEST), text).unwrap();
            read_manifest(dir.path(), 1, |manifest: &Manifest| (1, &manifest.shards))
        };
        let values = |count: usize| format!("[{}7]", "{},".repeat(count));
        let said = |sampler: &str| read(sampler).unwrap_err().to_string();
        assert!(said(&values(1 << 20)).contains("manifest.json: so many values"));
        assert!(said(&values(100_000)).contains("expected at most 262144"));
        let few = read("{\"kind\": \"ar\"}").unwrap();
        assert_eq!(few.sampler["kind"], "ar");
    }

    #[test]
    fn parts_are_joined_in_order_and_must_not_overlap() {
        let part = |name: &str, ranges: &[[u64; 2]]| (name.into(), shards(ranges));
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
    fn samples_are_cut_at_multiples() {
        let ends = |from: u64, to: u64| -> Vec<[u64; 2]> {
            cut(from..to, 10).map(|s| [s.start, s.end]).collect()
        };
        assert_eq!(ends(0, 25), [[0, 10], [10, 20], [20, 25]]);
        assert_eq!(ends(7, 12), [[7, 10], [10, 12]]);
        assert_eq!(ends(5, 5), [[0u64; 2]; 0]);
    }
}
