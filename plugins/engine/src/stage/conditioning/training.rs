//! Captions of a teacher's training images: from the images' source, or as precomputed features.

use std::collections::HashMap;
use std::path::Path;

use super::{Features, encode};
use crate::backend::Backend;
use crate::captions::{self, CaptionFeatures};
use crate::context::Context;
use crate::data::Images;
use crate::error::{Error, Result};
use crate::files::{make_once, resolve};
use crate::model::CaptionShape;
use crate::text::TextEncoder;

/// The default of `caption_tokens`: as published.
pub const POSITIONS: usize = 120;

/// Options of a training on captions.
#[derive(Clone, Copy)]
pub struct TrainingCaptions<'o> {
    /// `text_encoder`
    pub text_encoder: Option<&'o str>,
    /// `features`
    pub features: Option<&'o Features>,
    /// `caption_tokens`
    pub positions: usize,
}

/// Captions, and their assignment to images.
pub struct ImageCaptions {
    /// Their features.
    pub captions: CaptionFeatures,
    /// The shape of captions in the model.
    pub shape: CaptionShape,
    /// Number of the caption of each image.
    pub numbers: Vec<u32>,
}

impl TrainingCaptions<'_> {
    /// Whether a training is on captions.
    pub fn are_given(&self) -> bool {
        self.text_encoder.is_some() || self.features.is_some()
    }

    /// Refuses contradictions; files that exist already must be valid.
    pub fn check(&self, base: &Path) -> Result<()> {
        if self.text_encoder.is_some() && self.features.is_some() {
            let message = "a text encoder makes features of the images' captions: keep one of `text_encoder` and `features`";
            return Err(Error::option("/features", message));
        }
        if !self.are_given() && self.positions != POSITIONS {
            let message = "there are no captions without `text_encoder` or `features`";
            return Err(Error::option("/caption_tokens", message));
        }
        let existing = |path: &str| Some(resolve(base, path)).filter(|path| path.exists());
        if let Some(folder) = self.text_encoder.and_then(existing) {
            TextEncoder::open(&folder)
                .map_err(|e| Error::option("/text_encoder", e.to_string()))?;
        }
        if let Some(features) = self.features
            && features.files().all(|file| existing(file).is_some())
        {
            let opened = features.open(base);
            opened.map_err(|e| Error::option("/features", e.to_string()))?;
        }
        Ok(())
    }

    /// The captions of images. Their features are computed once, in a file of the work directory.
    pub fn resolve<B: Backend>(
        &self,
        context: &Context<'_, B>,
        images: &Images,
    ) -> Result<Option<ImageCaptions>> {
        if !self.are_given() {
            return Ok(None);
        }
        let (base, positions) = (&context.job.base_dir, self.positions);
        let path = context.work_dir()?.join(captions::FILE);
        // One of several workers makes the file; the others wait for it.
        let lock = context.lock(captions::FILE)?;
        let (width, numbers) = match (self.text_encoder, self.features) {
            (Some(folder), _) => {
                let (texts, numbers) = distinct(images.captions()?);
                let encoder = TextEncoder::open(&resolve(base, folder))?;
                let width = encoder.width();
                if !path.exists() {
                    encode(context, encoder, &texts, positions, &path, &lock)?;
                }
                (width, numbers)
            }
            (None, Some(features)) => {
                let mut table = features.open(base)?;
                let [count, _, width] = table.shape;
                if count != images.len() {
                    let message = format!(
                        "features of {count} captions for {} images: expected those of image i in place i",
                        images.len()
                    );
                    return Err(Error::option("/features", message));
                }
                if !path.exists() {
                    let shape = CaptionShape { positions, width };
                    make_once(&path, &lock, |partial| table.copy(shape, partial))?;
                }
                (width, (0..count as u32).collect())
            }
            (None, None) => return Ok(None),
        };
        let shape = CaptionShape { positions, width };
        let captions = CaptionFeatures::open(&path, shape)?;
        Ok(Some(ImageCaptions {
            captions,
            shape,
            numbers,
        }))
    }
}

/// The distinct texts in order of first occurrence, and each image's index into them.
fn distinct(texts: Vec<String>) -> (Vec<String>, Vec<u32>) {
    let mut known: HashMap<String, u32> = HashMap::new();
    let (mut once, mut numbers) = (Vec::new(), Vec::with_capacity(texts.len()));
    for text in texts {
        let next = once.len() as u32;
        numbers.push(match known.get(&text) {
            Some(number) => *number,
            None => {
                known.insert(text.clone(), next);
                once.push(text);
                next
            }
        });
    }
    (once, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_many_images_have_is_encoded_once() {
        let texts = ["a", "b", "a", "c", "b"].map(str::to_owned);
        let (once, numbers) = distinct(texts.to_vec());
        assert_eq!(once, ["a", "b", "c"]);
        assert_eq!(numbers, [0, 1, 0, 2, 1]);
    }
}
