//! Sets of samples on disk, in shards that can be made anywhere and in any order.
//!
//! ```text
//! samples/  manifest.json  shard-000000000.safetensors  shard-000001000.safetensors ..  grid.png  captions.json
//! ```
//!
//! A shard holds `labels` (n) in the narrowest unsigned type, and on request: `images` (n, c, H, W), as bytes or as f32 in
//! [0, 1]; `latents` (n, L, D) in f32; `tokens` (n, L), if codes were chosen. Noise is a pure function of the manifest's seed
//! and the sample's index and is not stored, unless it came from a file: `noise` (n, L, D). Shards are written batch by batch
//! and read block by block. Deliberately absent: making samples.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use retort_checkpoint::sample_shards::{
    MANIFEST, Shard, ShardError, gaps, hash, parameters, read_manifest,
};
use safetensors::tensor::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::weights::{self, CheckpointWeights};

/// Version of the layout.
pub const FORMAT: u32 = 1;

/// What is kept of the images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImagesKept {
    /// Bytes, each the nearest of 256 values: what evaluations see.
    #[default]
    U8,
    /// Every digit, four times as large.
    F32,
    /// None: latents are not decoded.
    None,
}

/// The tensors kept for every sample in addition to its label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptTensors {
    /// Images.
    pub images: ImagesKept,
    /// Latents.
    pub latents: bool,
    /// Tokens.
    pub tokens: bool,
    /// Noise, which was given.
    pub noise: bool,
}

/// `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// Number of samples.
    pub count: u64,
    /// Seed of noise and choices.
    pub seed: u64,
    /// The sampler and its parameters, with content hashes of its inputs.
    #[serde(deserialize_with = "parameters")]
    pub sampler: Value,
    /// Hash of the captions' features that labels refer to; None if labels are classes.
    pub captions: Option<String>,
    /// Network passes per sample; None if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passes: Option<usize>,
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Height and width of the decoded images, if they were resized afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decoded: Option<[usize; 2]>,
    /// Tokens L of a sample.
    pub tokens: usize,
    /// Codebook size K.
    pub vocabulary: usize,
    /// Codebook dimension D.
    pub dim: usize,
    /// One past the highest label.
    pub labels: usize,
    /// What shards hold.
    pub kept: KeptTensors,
    /// Files, in order of their samples.
    pub shards: Vec<Shard>,
}

impl Manifest {
    /// Reads that of a directory.
    pub fn read(dir: &Path) -> Result<Self> {
        if !dir.join(MANIFEST).exists() && dir.join("samples.safetensors").exists() {
            let message =
                "a set of samples in one file, as earlier versions wrote it: sample it again";
            return Err(Error::data(dir, message));
        }
        Ok(read_manifest(dir, FORMAT, |manifest: &Self| {
            (manifest.format, &manifest.shards)
        })?)
    }

    /// The shards of a part made elsewhere, by the manifest there.
    pub fn of_part(&self, dir: &Path) -> Result<Vec<Shard>> {
        let part = Self::read(dir)?;
        let of = |manifest: &Self| -> Result<Value> {
            let own = Self {
                shards: Vec::new(),
                ..manifest.clone()
            };
            serde_json::to_value(own).map_err(|e| Error::Internal(e.to_string()))
        };
        let (own, other) = (of(self)?, of(&part)?);
        let fields = own.as_object().into_iter().flatten();
        let differing = fields
            .filter(|(name, value)| other.get(name.as_str()) != Some(value))
            .map(|(name, value)| {
                let found = other.get(name.as_str()).unwrap_or(&Value::Null);
                format!("{name} {found}, expected {value}")
            })
            .next();
        match differing {
            None => Ok(part.shards),
            Some(what) => {
                let message = format!("this part belongs to another set: {what}");
                Err(ShardError::new(dir.join(MANIFEST), message).into())
            }
        }
    }

    /// Name, type and shape of the tensors in a shard of n samples.
    fn tensors(&self, n: usize) -> Vec<(String, Dtype, Vec<usize>)> {
        let ([c, h, w], l, d) = (self.image, self.tokens, self.dim);
        let all = [
            (true, "labels", narrowest(self.labels), vec![n]),
            (
                self.kept.images != ImagesKept::None,
                "images",
                match self.kept.images {
                    ImagesKept::F32 => Dtype::F32,
                    _ => Dtype::U8,
                },
                vec![n, c, h, w],
            ),
            (self.kept.latents, "latents", Dtype::F32, vec![n, l, d]),
            (
                self.kept.tokens,
                "tokens",
                narrowest(self.vocabulary),
                vec![n, l],
            ),
            (self.kept.noise, "noise", Dtype::F32, vec![n, l, d]),
        ];
        all.into_iter()
            .filter(|(kept, ..)| *kept)
            .map(|(_, name, dtype, shape)| (name.to_owned(), dtype, shape))
            .collect()
    }

    /// Opens a file and refuses it if it cannot hold the samples of a shard. Returns their labels too.
    pub fn open_shard(&self, path: &Path, shard: &Shard) -> Result<(CheckpointWeights, Vec<u32>)> {
        let refuse = |message: String| Err(Error::data(path, message));
        let stored = CheckpointWeights::open(path, None)?;
        for (name, _, shape) in self.tensors((shard.end - shard.start) as usize) {
            match stored.shape(&name) {
                Some(found) if found == shape => {}
                Some(found) => {
                    return refuse(format!("{name} of shape {found:?}, expected {shape:?}"));
                }
                None => return refuse(format!("no tensor {name}")),
            }
        }
        let labels = stored.indices("labels")?;
        if let Some(at) = labels.iter().position(|&x| x as usize >= self.labels) {
            return refuse(format!(
                "label {} of sample {}, expected labels below {}",
                labels[at],
                shard.start as usize + at,
                self.labels
            ));
        }
        // Last, so that a file of the wrong size is refused without being read.
        if let Some(expected) = &shard.hash {
            let found = hash(path)?;
            if found != *expected {
                return refuse(format!(
                    "its content has changed: hash {found}, expected {expected}"
                ));
            }
        }
        Ok((stored, labels))
    }
}

/// The narrowest unsigned type of values below a bound.
fn narrowest(bound: usize) -> Dtype {
    match bound {
        0..=0x100 => Dtype::U8,
        0x101..=0x1_0000 => Dtype::U16,
        _ => Dtype::U32,
    }
}

/// A writer of a shard: rows are written in place, so only one batch is in memory.
pub struct ShardWriter {
    path: PathBuf,
    file: File,
    /// Name, type, offset and bytes of a row.
    tensors: Vec<(String, Dtype, u64, u64)>,
}

impl ShardWriter {
    /// Starts the file of n samples.
    pub fn create(path: &Path, manifest: &Manifest, n: usize) -> Result<Self> {
        let tensors = manifest.tensors(n);
        let (header, mut end) = weights::header(tensors.clone())?;
        end += header.len();
        let file = File::create(path).map_err(Error::io(path))?;
        file.write_all_at(&header, 0)
            .and_then(|()| file.set_len(end as u64))
            .map_err(Error::io(path))?;
        let mut offset = header.len() as u64;
        let place = |(name, dtype, shape): (String, Dtype, Vec<usize>)| {
            let row = (dtype.bitsize() / 8 * shape[1..].iter().product::<usize>()) as u64;
            let start = offset;
            offset += row * n as u64;
            (name, dtype, start, row)
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            tensors: tensors.into_iter().map(place).collect(),
        })
    }

    /// Writes bytes of a tensor from a row on; does nothing if the tensor is not kept.
    fn write(&self, name: &str, first: usize, bytes: impl Fn(Dtype) -> Vec<u8>) -> Result<()> {
        let Some((_, dtype, start, row)) = self.tensors.iter().find(|(own, ..)| own == name) else {
            return Ok(());
        };
        let place = start + row * first as u64;
        self.file
            .write_all_at(&bytes(*dtype), place)
            .map_err(Error::io(&self.path))
    }

    /// Writes labels or tokens.
    pub fn indices(&self, name: &str, first: usize, values: &[u32]) -> Result<()> {
        self.write(name, first, |dtype| match dtype {
            Dtype::U8 => values.iter().map(|&x| x as u8).collect(),
            Dtype::U16 => values
                .iter()
                .flat_map(|&x| (x as u16).to_le_bytes())
                .collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        })
    }

    /// Writes floats; as bytes, values in [0, 1] become the nearest of 256.
    pub fn floats(&self, name: &str, first: usize, values: &[f32]) -> Result<()> {
        self.write(name, first, |dtype| match dtype {
            Dtype::U8 => values.iter().map(|x| (x * 255.0).round() as u8).collect(),
            _ => weights::le_bytes(values),
        })
    }
}

/// The labels and images of a set of samples; images are read from their files on demand.
pub struct Samples {
    /// What the set is.
    pub manifest: Manifest,
    /// Label of each sample that is there, in order.
    pub labels: Vec<u32>,
    /// Indices of these samples in the whole set.
    pub samples: Range<u64>,
    dir: PathBuf,
    /// The shard read last, by its number: only one file is open at a time.
    open: RefCell<Option<(usize, CheckpointWeights)>>,
}

impl Samples {
    /// Opens a whole set.
    pub fn open(dir: &Path) -> Result<Self> {
        let samples = Self::open_part(dir)?;
        let manifest = &samples.manifest;
        if let Some(gap) = gaps(&manifest.shards, manifest.count).first() {
            let message = format!(
                "samples {}..{} are missing of {}: a part, made with `range`? A sample stage whose `parts` name all parts \
                 makes the whole",
                gap.start, gap.end, manifest.count
            );
            return Err(Error::data(dir.join(MANIFEST), message));
        }
        Ok(samples)
    }

    /// Opens a set, or a part of one made with `range`.
    pub fn open_part(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let mut labels = Vec::new();
        let start = manifest.shards.first().map_or(0, |shard| shard.start);
        let mut next = start;
        for shard in &manifest.shards {
            if shard.start != next {
                let message = format!(
                    "shard {} begins at sample {}, expected {next}",
                    shard.file, shard.start
                );
                return Err(Error::data(dir.join(MANIFEST), message));
            }
            next = shard.end;
            labels.extend(open(&manifest, dir, shard)?.1);
        }
        Ok(Self {
            manifest,
            labels,
            samples: start..next,
            dir: dir.to_owned(),
            open: RefCell::new(None),
        })
    }

    /// Refuses a set without images.
    pub fn check_images(&self) -> Result<()> {
        match self.manifest.kept.images {
            ImagesKept::None => {
                let message = "no images: the set was sampled with `images: none`";
                Err(Error::data(self.dir.join(MANIFEST), message))
            }
            _ => Ok(()),
        }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// `count` images from the one at `first` on, in [0, 1].
    pub fn images(&self, first: usize, count: usize) -> Result<Vec<f32>> {
        self.rows(first, count, |stored, first, count| {
            match self.manifest.kept.images {
                ImagesKept::F32 => stored.rows("images", first, count),
                ImagesKept::U8 => {
                    let bytes = stored.index_rows("images", first, count)?;
                    Ok(bytes.iter().map(|&x| x as f32 / 255.0).collect())
                }
                ImagesKept::None => self.check_images().map(|()| Vec::new()),
            }
        })
    }

    /// Noise (count, L, D) of samples, where it was given.
    pub fn noise(&self, first: usize, count: usize) -> Result<Vec<f32>> {
        self.rows(first, count, |stored, first, count| {
            stored.rows("noise", first, count)
        })
    }

    /// Rows that may lie in several shards.
    fn rows(
        &self,
        first: usize,
        count: usize,
        read: impl Fn(&CheckpointWeights, usize, usize) -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let (mut next, end) = (first as u64 + self.samples.start, (first + count) as u64);
        let end = end + self.samples.start;
        let known = &self.manifest.shards;
        let mut at = known.partition_point(|shard| shard.end <= next);
        let mut out = Vec::new();
        while next < end {
            let shard = known.get(at).ok_or_else(|| {
                Error::Internal(format!("samples {first} and {count} more are asked for"))
            })?;
            let to = shard.end.min(end);
            let (row, rows) = ((next - shard.start) as usize, (to - next) as usize);
            let mut last = self.open.borrow_mut();
            let own = match &*last {
                Some((number, stored)) if *number == at => read(stored, row, rows)?,
                _ => {
                    let (stored, _) = open(&self.manifest, &self.dir, shard)?;
                    read(&last.insert((at, stored)).1, row, rows)?
                }
            };
            match out.is_empty() {
                true => out = own,
                false => out.extend(own),
            }
            (next, at) = (to, at + 1);
        }
        Ok(out)
    }
}

/// Opens a shard of an artifact, whose content the store guarantees.
fn open(manifest: &Manifest, dir: &Path, shard: &Shard) -> Result<(CheckpointWeights, Vec<u32>)> {
    let unhashed = Shard {
        hash: None,
        ..shard.clone()
    };
    manifest.open_shard(&dir.join(&shard.file), &unhashed)
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
        if members.len() == columns {
            out.extend(members);
            rows += 1;
        }
        if rows == ROWS {
            break;
        }
    }
    if rows == 0 {
        return ((0..labels.len().min(64)).collect(), 1);
    }
    (out, rows)
}

/// Most rows of a grid.
const ROWS: usize = 16;
