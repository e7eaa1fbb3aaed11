//! Sets of samples as pictures: what a set is, the labels of its samples, one sample as a PNG.
//!
//! In: the directory of an artifact, with the files that the store lists for it. Out: numbers and PNGs. A manifest and a
//! shard may be anything: sizes are bounded before something is read, and no file is opened that is not listed. The layout
//! is the engine's (`samples.rs` there). Deliberately absent: pages.

use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use retort_checkpoint::sample_shards::{MANIFEST, Shard, parameters, read_manifest};
use retort_checkpoint::{Checkpoint, Dtype, json};
use serde::Deserialize;
use serde_json::Value;

use super::reply::HttpError;
use crate::artifact;
use crate::store::ArtifactFile;

/// Version of the layout.
const FORMAT: u32 = 1;
/// The most samples of a set that can be shown.
const MOST: usize = 200_000;
/// The most files of a set that are opened; samples in other files cannot be shown.
const MOST_SHARDS: usize = 4096;
/// The most elements of an image, and the most pixels of a side.
const ELEMENTS: usize = 48 << 20;
const SIDE: usize = 8192;
/// The number of cached sets.
const REMEMBERED: usize = 24;
/// The largest file of captions.
const CAPTIONS: u64 = 1 << 20;

/// The relevant part of a manifest.
#[derive(Debug, Deserialize)]
struct Manifest {
    format: u32,
    count: u64,
    seed: u64,
    #[serde(deserialize_with = "parameters")]
    sampler: Value,
    image: [usize; 3],
    tokens: usize,
    dim: usize,
    kept: SampleFiles,
    shards: Vec<Shard>,
}

#[derive(Debug, Deserialize)]
struct SampleFiles {
    images: String,
    #[serde(default)]
    noise: bool,
}

/// A set of samples with images.
#[derive(Debug)]
pub struct Set {
    dir: PathBuf,
    manifest: Manifest,
    /// The label of each sample that can be shown.
    pub labels: Vec<u32>,
    /// The captions that labels stand for, if any.
    pub captions: Vec<String>,
}

/// The most recently shown sets, by hash.
#[derive(Debug, Default)]
pub struct Cache(Mutex<VecDeque<(String, Arc<Set>)>>);

impl Cache {
    /// A cached set.
    pub fn get(&self, hash: &str) -> Option<Arc<Set>> {
        let sets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = sets.iter().find(|(known, _)| known == hash);
        found.map(|(_, set)| Arc::clone(set))
    }

    /// Caches a set.
    pub fn put(&self, hash: &str, set: &Arc<Set>) {
        let mut sets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sets.retain(|(known, _)| known != hash);
        sets.push_front((hash.to_owned(), Arc::clone(set)));
        sets.truncate(REMEMBERED);
    }
}

impl Set {
    /// Opens the set in an artifact's directory, with the files that the store lists.
    pub fn open(dir: PathBuf, files: &[ArtifactFile]) -> Result<Self, HttpError> {
        let bad = |message: String| {
            HttpError::File(format!("this set of samples cannot be read: {message}"))
        };
        let listed: HashSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
        let check = |name: &str| match listed.contains(name) {
            true => artifact::open_inner(&dir, name)
                .map(drop)
                .map_err(|error| bad(error.to_string())),
            false => Err(bad(format!("{name} is not listed"))),
        };
        check(MANIFEST)?;
        let manifest: Manifest = read_manifest(&dir, FORMAT, |manifest: &Manifest| {
            (manifest.format, &manifest.shards)
        })
        .map_err(|error| bad(error.message))?;
        let [c, h, w] = manifest.image;
        let elements = c.checked_mul(h).and_then(|size| size.checked_mul(w));
        let fits = matches!(c, 1 | 3)
            && h.max(w) <= SIDE
            && elements.is_some_and(|size| (1..=ELEMENTS).contains(&size));
        if !fits || !matches!(manifest.kept.images.as_str(), "u8" | "f32") {
            return Err(bad(format!(
                "it has no images to show ({c} x {h} x {w}, {})",
                manifest.kept.images
            )));
        }
        let mut labels = Vec::new();
        let mut next = manifest.shards.first().map_or(0, |shard| shard.start);
        if next != 0 {
            return Err(bad("it is a part of a set".into()));
        }
        for shard in manifest.shards.iter().take(MOST_SHARDS) {
            if labels.len() >= MOST {
                break;
            }
            if shard.start != next || shard.end - shard.start > MOST as u64 {
                return Err(bad(format!("shard {} does not follow", shard.file)));
            }
            next = shard.end;
            check(&shard.file)?;
            let opened =
                Checkpoint::open(&dir.join(&shard.file)).map_err(|error| bad(error.to_string()))?;
            let all = opened
                .select(None)
                .map_err(|error| bad(error.to_string()))?;
            let own = all.get("labels").ok_or_else(|| bad("no labels".into()))?;
            if own.shape != [(shard.end - shard.start) as usize] {
                return Err(bad("other labels than samples".into()));
            }
            labels.extend(
                opened
                    .indices(own)
                    .map_err(|error| bad(error.to_string()))?,
            );
        }
        let captions = match check("captions.json") {
            Ok(()) => retort_checkpoint::regular::read(&dir.join("captions.json"), CAPTIONS)
                .ok()
                .and_then(|text| json::parse(&text).ok())
                .unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        Ok(Self {
            dir,
            manifest,
            labels,
            captions,
        })
    }

    /// The number of samples in the whole set.
    pub fn count(&self) -> u64 {
        self.manifest.count
    }

    /// The height and width of its images.
    pub fn size(&self) -> (usize, usize) {
        (self.manifest.image[1], self.manifest.image[2])
    }

    /// The sampler, in a few words.
    pub fn sampler(&self) -> String {
        let sampler = &self.manifest.sampler;
        let kind = sampler["kind"].as_str().unwrap_or("unknown");
        match sampler["timesteps"].as_array() {
            Some(steps) => {
                let list: Vec<String> = steps.iter().map(Value::to_string).collect();
                format!(
                    "{kind}, {} step{} (t = {})",
                    steps.len(),
                    if steps.len() == 1 { "" } else { "s" },
                    list.join(", ")
                )
            }
            None => kind.to_owned(),
        }
    }

    /// Whether samples with the same number were made from the same noise in both sets.
    pub fn shares_noise(&self, other: &Self) -> bool {
        let of = |set: &Self| (set.manifest.seed, set.manifest.tokens, set.manifest.dim);
        of(self) == of(other) && !self.manifest.kept.noise && !other.manifest.kept.noise
    }

    /// A sample as a PNG.
    pub fn png(&self, sample: usize) -> Result<Vec<u8>, HttpError> {
        let bad =
            |message: String| HttpError::File(format!("sample {sample} cannot be read: {message}"));
        let shards = &self.manifest.shards;
        let shard = shards
            .iter()
            .find(|shard| (shard.start..shard.end).contains(&(sample as u64)));
        let shard =
            shard.ok_or_else(|| HttpError::NotFound(format!("there is no sample {sample}")))?;
        let [c, h, w] = self.manifest.image;
        // It was checked when the set was opened, and may be another file by now.
        drop(artifact::open_inner(&self.dir, &shard.file).map_err(|error| bad(error.to_string()))?);
        let opened = Checkpoint::open(&self.dir.join(&shard.file))
            .map_err(|error| bad(error.to_string()))?;
        let all = opened
            .select(None)
            .map_err(|error| bad(error.to_string()))?;
        let images = all.get("images").ok_or_else(|| bad("no images".into()))?;
        if images.shape != [(shard.end - shard.start) as usize, c, h, w] {
            return Err(bad("images of another size than the manifest says".into()));
        }
        let row = images
            .rows((sample as u64 - shard.start) as usize, 1)
            .ok_or_else(|| bad("no such row".into()))?;
        let planes: Vec<u8> = match images.dtype {
            Dtype::U8 => opened.raw(&row),
            _ => opened.floats(&row).map(|values| {
                values
                    .iter()
                    .map(|value| (value * 255.0).round() as u8)
                    .collect()
            }),
        }
        .map_err(|error| bad(error.to_string()))?;
        // (c, h, w) -> (h, w, c)
        let plane = h * w;
        let pixels: Vec<u8> = (0..plane)
            .flat_map(|at| (0..c).map(move |channel| (channel, at)))
            .map(|(channel, at)| planes[channel * plane + at])
            .collect();
        encode(&pixels, c, h, w).map_err(|error| bad(error.to_string()))
    }
}

fn encode(
    pixels: &[u8],
    channels: usize,
    height: usize,
    width: usize,
) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(if channels == 1 {
        png::ColorType::Grayscale
    } else {
        png::ColorType::Rgb
    });
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}
