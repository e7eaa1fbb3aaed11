//! Images to be measured, real or sampled, read in batches.

use std::path::Path;

use super::measure::{ImageReader, Network};
use super::reference::{ImageShape, of_archive};
use crate::backend::Backend;
use crate::context::Context;
use crate::data::Images;
use crate::error::{Error, Result};
use crate::model::Tokenizer;
use crate::samples::Samples;
use crate::stage::tokenizer::batch as batch_of;

/// The real images, the reference for samples.
pub enum ReferenceImages<'a> {
    /// Those of a data set.
    Data(&'a Images),
    /// A set of samples.
    Samples(Box<Samples>),
    /// Those of an archive.
    Archive(&'a Path, ImageShape),
    /// Replaced by statistics.
    None,
}

impl ReferenceImages<'_> {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Data(images) => images.len(),
            Self::Samples(set) => set.len(),
            Self::Archive(_, (count, _)) => *count,
            Self::None => 0,
        }
    }

    /// Their channels, height and width, if they are measured.
    pub fn image(&self) -> Option<[usize; 3]> {
        match self {
            Self::Data(images) => Some(images.shape()),
            Self::Samples(set) => Some(set.manifest.image),
            Self::Archive(_, (_, image)) => Some(*image),
            Self::None => None,
        }
    }

    /// How they were resized, if known, for people.
    pub fn sizing(&self) -> Option<String> {
        match self {
            Self::Data(images) => {
                let how = images.sizing()?;
                Some(format!("real images: {how}"))
            }
            Self::Samples(set) => sizing("real images", set),
            Self::Archive(..) | Self::None => None,
        }
    }

    /// A reader of them, for measuring.
    pub fn source(&self) -> Result<ImageReader<'_>> {
        match self {
            Self::Data(images) => Ok(ImageReader {
                name: "real images".into(),
                count: images.len(),
                image: images.shape(),
                labels: None,
                by_class: false,
                read: Box::new(|first, n| {
                    let picks: Vec<usize> = (first..first + n).collect();
                    Ok(images.gather(&picks)?.0)
                }),
            }),
            Self::Samples(set) => Ok(ImageReader {
                labels: None,
                ..samples_source("real images", set)
            }),
            Self::Archive(path, images) => of_archive(path, *images),
            Self::None => Err(Error::Internal("no real images".into())),
        }
    }
}

/// Opens a set of samples and checks that the network accepts its images.
pub fn open_set<B: Backend>(
    context: &Context<'_, B>,
    network: &Network<B>,
    stage: &str,
    pointer: &str,
) -> Result<Samples> {
    let set = Samples::open(context.input_dir(stage)?)?;
    set.check_images()?;
    network
        .accepts(set.manifest.image)
        .map_err(|message| Error::option(pointer, format!("{stage}: {message}")))?;
    Ok(set)
}

/// How the images of a set were resized after decoding, if they were, for people.
pub fn sizing(name: &str, set: &Samples) -> Option<String> {
    let ([_, h, w], [height, width]) = (set.manifest.image, set.manifest.decoded?);
    Some(format!(
        "{name}: decoded at {height} x {width}, brought to {h} x {w} (bicubic)"
    ))
}

/// The images of a set of samples.
pub fn samples_source<'a>(name: &str, set: &'a Samples) -> ImageReader<'a> {
    ImageReader {
        name: name.to_owned(),
        count: set.len(),
        image: set.manifest.image,
        labels: Some(&set.labels),
        by_class: set.manifest.captions.is_none(),
        read: Box::new(|first, n| {
            let mut pixels = set.images(first, n)?;
            pixels.iter_mut().for_each(|x| *x = 2.0 * *x - 1.0);
            Ok(pixels)
        }),
    }
}

/// A tokenizer's reconstructions of images.
pub fn reconstructions<'a, B: Backend>(
    backend: &'a B,
    tokenizer: &'a dyn Tokenizer<B>,
    images: &'a Images,
    name: &str,
) -> ImageReader<'a> {
    ImageReader {
        name: name.to_owned(),
        count: images.len(),
        image: images.shape(),
        labels: Some(&images.labels),
        by_class: true,
        read: Box::new(move |first, n| {
            let picks: Vec<usize> = (first..first + n).collect();
            let made = tokenizer.reconstruct(&batch_of(backend, images, &picks)?)?;
            let mut pixels = B::to_floats(made.images.value())?;
            pixels.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
            Ok(pixels)
        }),
    }
}
