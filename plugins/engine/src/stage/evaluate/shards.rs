//! Networks' outputs for images, stored in the work directory by the parts of a divided stage: a file for every few images.
//!
//! With n parts each makes every n-th file; the worker of the whole reads all of them, and computes the missing ones. Files
//! start at batch boundaries, so the network gets the same batches for any number of parts, and figures are bit-identical. On
//! disk an image takes its features in f32, 20 kB with Inception, until the stage ends.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use retort_abi::Part;

use crate::backend::Backend;
use crate::context::Context;
use crate::data::pieces;
use crate::error::Result;
use crate::files::replace;
use crate::weights::{self, Floats, Weights};

/// Minimum images of a file.
const IMAGES: usize = 512;

/// The files of all sets in order. Parts and the worker of the whole process the sets in the same order.
pub struct FeatureShards {
    work: Option<PathBuf>,
    /// What files are called.
    name: String,
    part: Option<Part>,
    /// Images of a file.
    size: usize,
    sets: usize,
    files: usize,
}

/// A file and its images.
pub struct FeatureShard {
    path: Option<PathBuf>,
    /// The images, by number in the set.
    pub images: Range<usize>,
    /// Whether this process makes it: a part makes some, the whole none.
    pub own: bool,
}

impl FeatureShards {
    /// Files with this name prefix, for a batch size of the network.
    pub fn new<B: Backend>(context: &Context<'_, B>, name: &str, batch: usize) -> Self {
        Self {
            work: context.job.work_dir.clone(),
            name: name.to_owned(),
            part: context.job.part,
            size: IMAGES.div_ceil(batch).saturating_mul(batch),
            sets: 0,
            files: 0,
        }
    }

    /// How many images this process measures, given the sizes of sets: a part its share, the whole all.
    pub fn share(mut self, counts: &[usize]) -> u64 {
        let whole = self.part.is_none();
        let shards = counts.iter().flat_map(|&count| self.next(count));
        let own = shards.filter(|shard| shard.own || whole);
        own.map(|shard| shard.images.len() as u64).sum()
    }

    /// The files of the next set, which has this many images.
    pub fn next(&mut self, count: usize) -> Vec<FeatureShard> {
        let (set, first) = (self.sets, self.files);
        let file = |start| format!("{}-{set:03}-{start:09}.safetensors", self.name);
        let shard = |(number, images): (usize, Range<usize>)| FeatureShard {
            path: (self.work.as_ref()).map(|work| work.join(file(images.start))),
            images,
            own: self.part.is_some_and(|part| part.takes(first + number)),
        };
        let images = pieces(0..count, self.size);
        let shards: Vec<_> = images.enumerate().map(shard).collect();
        self.sets += 1;
        self.files += shards.len();
        shards
    }
}

impl FeatureShard {
    /// The file's arrays, if it exists; their first dimension is the images.
    pub fn read(&self) -> Option<BTreeMap<String, Vec<f32>>> {
        let path = self.path.as_ref().filter(|path| path.exists())?;
        let stored = weights::read(path).ok()?;
        let rows = |floats: &Floats| floats.shape.first() == Some(&self.images.len());
        let whole = !stored.is_empty() && stored.values().all(rows);
        whole.then(|| {
            let arrays = stored.into_iter();
            arrays.map(|(name, floats)| (name, floats.data)).collect()
        })
    }

    /// Writes arrays whose first dimension is the images; empty ones are left out.
    pub fn write(&self, arrays: BTreeMap<String, Vec<f32>>) -> Result<()> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let rows = self.images.len();
        let filled = arrays.into_iter().filter(|(_, data)| !data.is_empty());
        let stored: Weights = filled
            .map(|(name, data)| {
                let shape = vec![rows, data.len() / rows];
                (name, Floats { shape, data })
            })
            .collect();
        replace(path, |partial| weights::write(partial, &stored))
    }
}
