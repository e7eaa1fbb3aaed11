//! Images for the loader's row: JPEG files as photographs make them, and the time to read and resize them all.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;
use rayon::prelude::*;
use retort_engine::backend::Backend;
use retort_engine::context::Context;
use retort_engine::data::{Data, DataOptions};
use retort_engine::error::{Error, Result};
use retort_engine::random::{Sequence, Stream};
use retort_engine::size::Size;

/// Number of files.
pub(super) const COUNT: usize = 256;
/// Their side, and that to which they are brought.
pub(super) const SIDE: usize = 256;
pub(super) const RESIZED: usize = 128;
/// Their folder.
pub(super) const FOLDER: &str = "jpegs";
/// Images converted to floats at a time.
const BATCH: usize = 32;
/// Of the JPEGs: about a bit and a half a pixel, as in ImageNet.
const QUALITY: u8 = 90;

/// Writes the files.
pub(super) fn write_jpegs(folder: &Path) -> Result<()> {
    std::fs::create_dir(folder).map_err(Error::io(folder))?;
    (0..COUNT).into_par_iter().try_for_each(|number| {
        let path = folder.join(format!("{number:03}.jpg"));
        let file = File::create(&path).map_err(Error::io(&path))?;
        let mut encoder = JpegEncoder::new_with_quality(BufWriter::new(file), QUALITY);
        let side = SIDE as u32;
        encoder
            .encode(&picture(number as u64), side, side, ExtendedColorType::Rgb8)
            .map_err(|e| Error::data(&path, e))
    })
}

/// Waves of several lengths with some noise, (height, width, 3).
fn picture(number: u64) -> Vec<u8> {
    let mut random = Sequence::new(7, Stream::Init, number);
    let waves: Vec<[f32; 4]> = (0..4)
        .map(|wave| {
            let steep = 0.02 * (1 << (2 * wave)) as f32;
            let angle = random.uniform() as f32 * std::f32::consts::TAU;
            let [height, shift] = [60.0 / (1 << wave) as f32, 6.0 * random.uniform() as f32];
            [steep * angle.cos(), steep * angle.sin(), height, shift]
        })
        .collect();
    let mut noise = vec![0.0; SIDE * SIDE * 3];
    random.normals(&mut noise);
    let value = |(at, noise): (usize, &f32)| {
        let (x, y) = (at / 3 % SIDE, at / 3 / SIDE);
        let colour = (at % 3) as f32;
        let sum: f32 = waves
            .iter()
            .map(|[across, down, height, shift]| {
                height * (across * x as f32 + down * y as f32 + shift * (1.0 + colour)).sin()
            })
            .sum();
        (128.0 + sum + 3.0 * noise) as u8
    };
    noise.iter().enumerate().map(value).collect()
}

/// Reads all files as a stage does, resizes them, and converts them to floats a batch at a time.
pub(super) fn read<B: Backend>(context: &Context<'_, B>) -> Result<()> {
    let images = context.images(&Data::Source(Box::new(DataOptions {
        folder: Some(FOLDER.into()),
        size: Some(Size::Side(RESIZED)),
        ..DataOptions::default()
    })))?;
    let all: Vec<usize> = (0..images.len()).collect();
    if all.len() != COUNT {
        let message = format!("{} images, expected {COUNT}", all.len());
        return Err(Error::Internal(message));
    }
    all.chunks(BATCH)
        .try_for_each(|picks| images.gather(picks).map(drop))
}
