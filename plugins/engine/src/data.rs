//! Labelled images for training or evaluation.
//!
//! In: a folder of image files, a table of them, a tar archive, Parquet files, NumPy's arrays, a CSV file of grey values, or
//! the artifact of an `images` stage. Out: [`Images`], bytes in memory or in files, converted to f32 in [-1, 1] a batch at a
//! time. An error in an input is a [`DataError`] that names the file and, in a table, line and column. Deliberately absent:
//! colour management.

pub mod archived_images;
pub mod arrays;
pub mod cache;
pub mod class;
pub mod content;
mod decoded;
mod decoding_cost;
pub mod error;
pub mod feed;
pub mod file;
pub mod folder;
mod inspection;
pub mod item;
mod jpeg;
mod memory_pool;
pub mod options;
mod parquet;
pub mod prepared;
pub mod raster;
pub mod resample;
pub mod source;
pub mod table;
mod tiff;
pub mod values;

use std::ops::Range;
use std::path::Path;

pub use error::DataError;
pub use options::{Data, DataOptions, Sizing};

use crate::error::Result;
use crate::random::{Sequence, Stream};
use cache::ImageCache;
use prepared::Prepared;
use source::Source;

/// Labelled images of one size.
pub struct Images {
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
    /// Class of each image, below `classes`.
    pub labels: Vec<u32>,
    /// Number of classes; each has at least one image.
    pub classes: usize,
    /// Name of each class.
    pub names: Vec<String>,
    /// Stored height and width, from which images of `height` and `width` are cropped.
    stored: (usize, usize),
    /// How they were resized, if they were.
    sizing: Option<Sizing>,
    /// Whether half of them are mirrored in training.
    flip: bool,
    /// Their captions, if these are in memory.
    captions: Vec<Option<Box<str>>>,
    /// The value in [-1, 1] of each byte.
    values: Box<[f32; 256]>,
    bytes: Bytes,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape = (self.shape(), &self.names);
        write!(f, "{} images {shape:?}", self.len())
    }
}

/// Values of all images, (n, height, width, channels).
enum Bytes {
    Memory(Vec<u8>),
    Files(Prepared),
}

/// The augmentation of training images: a function of the seed, the epoch and the image alone.
#[derive(Debug, Clone, Copy)]
pub struct Augment {
    /// Seed of the stage.
    pub seed: u64,
    /// How many times training has seen all images.
    pub epoch: u64,
}

/// The part of a stored image that is seen, of the size of the images: its first row and column, and whether it is mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct View {
    top: usize,
    left: usize,
    mirrored: bool,
}

/// Reads the images of `data`; `stage` is the output of its `images` stage, if it names one. `accept` gets the number of
/// images before any is decoded.
pub fn load(
    data: &Data,
    stage: Option<&Path>,
    cache: &ImageCache<'_>,
    accept: impl FnOnce(usize) -> Result<()>,
) -> Result<Images> {
    let whole = DataOptions::default();
    let options = match data {
        Data::Stage(_) => &whole,
        Data::Source(options) => options,
    };
    let images = match stage {
        Some(dir) => {
            let images = Images::of(Prepared::open(dir)?);
            accept(images.len())?;
            images
        }
        None => cache.read(options, accept)?,
    };
    Ok(images.seen_as(options)?)
}

impl Images {
    fn new(
        (channels, height, width): (usize, usize, usize),
        white: f32,
        names: Vec<String>,
        labels: Vec<u32>,
        bytes: Bytes,
    ) -> Self {
        Self {
            channels,
            height,
            width,
            labels,
            classes: names.len(),
            names,
            stored: (height, width),
            sizing: None,
            flip: false,
            captions: Vec::new(),
            values: Box::new(std::array::from_fn(|byte| byte as f32 / white * 2.0 - 1.0)),
            bytes,
        }
    }

    fn of(prepared: Prepared) -> Self {
        let d = &prepared.description;
        let (shape, white, names) = ((d.channels, d.height, d.width), d.white, d.classes.clone());
        let (labels, sizing) = (prepared.labels.clone(), d.sizing);
        Self {
            sizing,
            ..Self::new(shape, white, names, labels, Bytes::Files(prepared))
        }
    }

    /// Reads a source into memory; also returns the damaged files that were left out. `progress` says whether to go on.
    pub fn read(
        source: Source,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(Self, Vec<content::Damaged>)> {
        let shape = (source.channels, source.height, source.width);
        let (white, names, sizing) = (source.white, source.names.clone(), source.sizing);
        let (mut bytes, mut labels, mut captions) = (Vec::new(), Vec::new(), Vec::new());
        bytes.reserve_exact(source.count() * shape.0 * shape.1 * shape.2);
        let damaged = source.read(progress, &mut |image| {
            bytes.extend_from_slice(image.pixels);
            labels.push(image.label);
            captions.push(image.caption.map(Into::into));
            Ok(())
        })?;
        let images = Self {
            sizing,
            captions,
            ..Self::new(shape, white, names, labels, Bytes::Memory(bytes))
        };
        Ok((images, damaged))
    }

    /// The same images, cropped and mirrored as the options say.
    fn seen_as(mut self, options: &DataOptions) -> Result<Self, DataError> {
        if let Some((h, w)) = options.crop.map(crate::size::Size::sides) {
            if h > self.height || w > self.width {
                let message = format!(
                    "data: `crop` {h} x {w} is larger than the images, {} x {}",
                    self.height, self.width
                );
                return Err(DataError::Options(message));
            }
            (self.height, self.width) = (h, w);
        }
        self.flip = options.flip;
        Ok(self)
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is no image; never so after [`load`].
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Their captions.
    ///
    /// # Errors
    /// One has no caption.
    pub fn captions(&self) -> Result<Vec<String>> {
        let captions = match &self.bytes {
            Bytes::Memory(_) => self.captions.clone(),
            Bytes::Files(prepared) => prepared.captions()?,
        };
        let absent = captions.iter().filter(|caption| caption.is_none()).count();
        if let Some(first) = captions.iter().position(Option::is_none) {
            let message = format!(
                "{absent} of {} images have no caption, image {first} is the first: give one in `metadata.jsonl` \
                 (`file_name`, `caption`), in a `.txt` file beside each image of an archive, or in a column `text` of Parquet \
                 files",
                self.len()
            );
            return Err(crate::Error::option("/data", message));
        }
        Ok(captions.into_iter().flatten().map(String::from).collect())
    }

    /// Channels, height and width.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }

    /// How the options resized them, if they did, for people.
    pub fn sizing(&self) -> Option<String> {
        let cut = (self.height, self.width) != self.stored;
        let cut = cut.then(|| format!("cut to {} x {}", self.height, self.width));
        let sizing = self.sizing.map(|sizing| sizing.to_string());
        let both: Vec<String> = sizing.into_iter().chain(cut).collect();
        (!both.is_empty()).then(|| both.join(", "))
    }

    /// Values of one image: channels x height x width.
    pub fn stride(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Pixels (b, channels, height, width) in [-1, 1] and labels (b) of the images at `indices`, in that order; the middle if
    /// they are cropped.
    pub fn gather(&self, indices: &[usize]) -> Result<(Vec<f32>, Vec<u32>)> {
        self.gather_augmented(indices, None)
    }

    /// The views of each image for a training that computes something once for each view: the middle, then the corners if
    /// images are cropped, and the same mirrored if they are mirrored. Cropped and mirrored images have ten, as in LlamaGen's
    /// training.
    pub fn views(&self) -> Vec<View> {
        let (down, across) = (self.stored.0 - self.height, self.stored.1 - self.width);
        let places = [
            (down / 2, across / 2),
            (0, 0),
            (0, across),
            (down, 0),
            (down, across),
        ];
        let mut views = Vec::new();
        for mirrored in [false, true] {
            for (top, left) in places {
                let view = View {
                    top,
                    left,
                    mirrored,
                };
                if (self.flip || !mirrored) && !views.contains(&view) {
                    views.push(view);
                }
            }
        }
        views
    }

    /// As [`Images::gather`], all of them in this view.
    pub fn gather_view(&self, indices: &[usize], view: View) -> Result<(Vec<f32>, Vec<u32>)> {
        self.gather_seen(indices, |_| view)
    }

    /// As [`Images::gather`], augmented for training.
    pub fn gather_augmented(
        &self,
        indices: &[usize],
        augment: Option<Augment>,
    ) -> Result<(Vec<f32>, Vec<u32>)> {
        self.gather_seen(indices, |index| self.view(index, augment))
    }

    fn gather_seen(
        &self,
        indices: &[usize],
        view: impl Fn(usize) -> View,
    ) -> Result<(Vec<f32>, Vec<u32>)> {
        let mut pixels = Vec::with_capacity(indices.len() * self.stride());
        let mut buffer = Vec::new();
        for &index in indices {
            let image = self.stored_image(index, &mut buffer)?;
            self.convert(image, view(index), &mut pixels);
        }
        let labels = indices.iter().map(|&index| self.labels[index]).collect();
        Ok((pixels, labels))
    }

    /// Bytes of an image as stored, perhaps read into `buffer`.
    fn stored_image<'a>(&'a self, index: usize, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let stride = self.stored.0 * self.stored.1 * self.channels;
        match &self.bytes {
            Bytes::Memory(bytes) => Ok(&bytes[index * stride..][..stride]),
            Bytes::Files(prepared) => {
                buffer.resize(stride, 0);
                prepared.read(index, buffer)?;
                Ok(buffer)
            }
        }
    }

    /// The view of an image after augmentation.
    fn view(&self, index: usize, augment: Option<Augment>) -> View {
        let (down, across) = (self.stored.0 - self.height, self.stored.1 - self.width);
        match augment {
            Some(Augment { seed, epoch }) if self.flip || down > 0 || across > 0 => {
                let mut drawn = Sequence::new(seed, Stream::Augment, (epoch << 32) | index as u64);
                View {
                    top: drawn.below(down + 1),
                    left: drawn.below(across + 1),
                    mirrored: self.flip && drawn.below(2) == 1,
                }
            }
            _ => View {
                top: down / 2,
                left: across / 2,
                mirrored: false,
            },
        }
    }

    /// Appends the cropped part of a stored image (height, width, channels) as (channels, height, width).
    fn convert(&self, image: &[u8], view: View, out: &mut Vec<f32>) {
        let c = self.channels;
        for channel in 0..c {
            for row in image
                .chunks_exact(self.stored.1 * c)
                .skip(view.top)
                .take(self.height)
            {
                let row = &row[view.left * c..][..self.width * c];
                let line = row.iter().skip(channel).step_by(c);
                let value = |byte: &u8| self.values[usize::from(*byte)];
                match view.mirrored {
                    true => out.extend(line.rev().map(value)),
                    false => out.extend(line.map(value)),
                }
            }
        }
    }

    /// Splits the indices into (training, held out), each ascending. The share `held_out`, taken as 0 to 1, holds for
    /// every class (rounded; a class keeps at least one image for training). A pure function of labels and arguments.
    pub fn split(&self, held_out: f64, seed: u64) -> (Vec<usize>, Vec<usize>) {
        let mut by_class = vec![Vec::new(); self.classes];
        for (index, &label) in self.labels.iter().enumerate() {
            by_class[label as usize].push(index);
        }
        let (mut train, mut held) = (Vec::new(), Vec::new());
        for mut members in by_class {
            let share = (members.len() as f64 * held_out.clamp(0.0, 1.0)).round() as usize;
            let share = share.min(members.len().saturating_sub(1));
            members.sort_by_key(|&index| (scramble(seed, index as u64), index));
            held.extend_from_slice(&members[..share]);
            train.extend_from_slice(&members[share..]);
        }
        train.sort_unstable();
        held.sort_unstable();
        (train, held)
    }
}

/// A range in pieces of a size; the last may be smaller.
pub(crate) fn pieces(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = range;
    let starts = (start..end).step_by(size);
    starts.map(move |first| first..first.saturating_add(size).min(end))
}

/// SplitMix64's output function of both numbers: a pseudo-random order of the indices that never changes.
fn scramble(seed: u64, index: u64) -> u64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    mix(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_add(index))
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
