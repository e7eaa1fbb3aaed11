//! Resizing images.
//!
//! A value of the result is the average of the source's values under a filter as wide as the distance of two result values,
//! so every source value counts (antialiasing). Rows first, then columns, each rounded to 8 bits: filters and rounding are
//! Pillow's, and so are the results (`tests/peers/pictures.py`).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::raster::{MOST_PIXELS, Raster};

/// How values between pixels are found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// The average of the pixels under each new pixel.
    Box,
    /// A triangle.
    Bilinear,
    /// Keys' cubic, a = -0.5.
    #[default]
    Bicubic,
    /// A sinc over three lobes.
    Lanczos,
}

/// How an image of other proportions comes to the wanted size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// Its middle, as large as fits the proportions; what sticks out is cut off.
    #[default]
    Cover,
    /// All of it, with bars of the background.
    Contain,
    /// All of it, its proportions changed.
    Stretch,
    /// As ADM and, after it, LlamaGen prepare ImageNet: halved by `box` while it is at least twice too large, brought to
    /// the size of its shorter side by `bicubic`, then the middle. Squares only.
    Adm,
}

impl Fit {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cover => "cover",
            Self::Contain => "contain",
            Self::Stretch => "stretch",
            Self::Adm => "adm",
        }
    }
}

impl Filter {
    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Box => "box",
            Self::Bilinear => "bilinear",
            Self::Bicubic => "bicubic",
            Self::Lanczos => "lanczos",
        }
    }

    /// How far from its middle the filter reaches, in steps.
    fn reach(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn at(self, x: f64) -> f64 {
        let far = x.abs();
        let sinc = |x: f64| match x * std::f64::consts::PI {
            0.0 => 1.0,
            x => x.sin() / x,
        };
        match self {
            // If the edge lies between two pixels, only one of them counts.
            Self::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Self::Bilinear => (1.0 - far).max(0.0),
            Self::Bicubic if far < 1.0 => (1.5 * far - 2.5) * far * far + 1.0,
            Self::Bicubic if far < 2.0 => ((-0.5 * far + 2.5) * far - 4.0) * far + 2.0,
            Self::Lanczos if far < 3.0 => sinc(x) * sinc(x / 3.0),
            Self::Bicubic | Self::Lanczos => 0.0,
        }
    }
}

/// Fraction bits of the weights: eight bits of value and two for cancellation leave 22.
const PLACES: u32 = 22;

/// For each new value, the first source value and the weights from there on.
fn weights(
    old: usize,
    (from, to): (f64, f64),
    new: usize,
    filter: Filter,
) -> Vec<(usize, Vec<i32>)> {
    let step = (to - from) / new as f64;
    let width = step.max(1.0);
    let reach = filter.reach() * width;
    let of = |index: usize| {
        let middle = from + (index as f64 + 0.5) * step;
        let first = (middle - reach + 0.5).max(0.0) as usize;
        let end = ((middle + reach + 0.5).max(0.0) as usize).min(old);
        let mut shares: Vec<f64> = (first..end)
            .map(|at| filter.at((at as f64 - middle + 0.5) / width))
            .collect();
        let sum: f64 = shares.iter().sum();
        if sum != 0.0 {
            shares.iter_mut().for_each(|share| *share /= sum);
        }
        let fixed = |share: f64| (share * f64::from(1u32 << PLACES)).round() as i32;
        (first, shares.into_iter().map(fixed).collect())
    };
    (0..new).map(of).collect()
}

/// The part of an image from (left, top) to (right, bottom), in pixels and fractions of them, brought to a size.
fn resample(
    image: &Raster,
    [left, top, right, bottom]: [f64; 4],
    (height, width): (usize, usize),
    filter: Filter,
) -> Raster {
    let across = weights(image.width, (left, right), width, filter);
    let down = weights(image.height, (top, bottom), height, filter);
    // Only the rows that the second pass reads.
    let first = down.first().map_or(0, |(first, _)| *first);
    let end = down
        .last()
        .map_or(0, |(first, weights)| first + weights.len());
    let pixels = match image.channels {
        1 => both_ways::<1>(image, (first, end), &across, &down),
        _ => both_ways::<3>(image, (first, end), &across, &down),
    };
    Raster {
        height,
        width,
        channels: image.channels,
        pixels,
    }
}

fn both_ways<const C: usize>(
    image: &Raster,
    (first, end): (usize, usize),
    across: &[(usize, Vec<i32>)],
    down: &[(usize, Vec<i32>)],
) -> Vec<u8> {
    let (old, _) = image.pixels.as_chunks::<C>();
    let mut rows: Vec<[u8; C]> = Vec::with_capacity((end - first) * across.len());
    for row in old.chunks_exact(image.width).take(end).skip(first) {
        for (from, weights) in across {
            let mut sums = [1i32 << (PLACES - 1); C];
            for (pixel, weight) in row[*from..].iter().zip(weights) {
                for c in 0..C {
                    sums[c] += i32::from(pixel[c]) * weight;
                }
            }
            rows.push(sums.map(|sum| (sum >> PLACES).clamp(0, 255) as u8));
        }
    }
    let width = across.len() * C;
    let rows = rows.as_flattened();
    let mut pixels = Vec::with_capacity(down.len() * width);
    let mut sums = vec![0i32; width];
    for (from, weights) in down {
        sums.fill(1 << (PLACES - 1));
        for (row, weight) in rows.chunks_exact(width).skip(from - first).zip(weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        pixels.extend(sums.iter().map(|sum| (sum >> PLACES).clamp(0, 255) as u8));
    }
    pixels
}

/// Brings an image to (height, width); `background` (as many values as it has channels) fills what it does not cover. An
/// image whose intermediate size exceeds the limit is refused.
pub fn fit(
    image: Raster,
    size: (usize, usize),
    fit: Fit,
    filter: Filter,
    background: &[u8],
) -> Result<Raster, String> {
    let (height, width) = size;
    if (image.height, image.width) == size {
        return Ok(image);
    }
    let (h, w) = (image.height as f64, image.width as f64);
    let wanted = width as f64 / height as f64;
    Ok(match fit {
        Fit::Stretch => resample(&image, [0.0, 0.0, w, h], size, filter),
        Fit::Cover => {
            let (inner_w, inner_h) = match w / h {
                own if own == wanted => (w, h),
                own if own > wanted => (wanted * h, h),
                _ => (w, w / wanted),
            };
            let (left, top) = ((w - inner_w) * 0.5, (h - inner_h) * 0.5);
            resample(
                &image,
                [left, top, left + inner_w, top + inner_h],
                size,
                filter,
            )
        }
        Fit::Contain => {
            let (mut inner_h, mut inner_w) = size;
            if w / h > wanted {
                inner_h = (h / w * width as f64).round_ties_even().max(1.0) as usize;
            } else if w / h < wanted {
                inner_w = (w / h * height as f64).round_ties_even().max(1.0) as usize;
            }
            let inner = resample(&image, [0.0, 0.0, w, h], (inner_h, inner_w), filter);
            let half = |space: usize| (space as f64 * 0.5).round_ties_even() as usize;
            let mut out = background.repeat(height * width);
            let (top, left, c) = (
                half(height - inner_h),
                half(width - inner_w),
                image.channels,
            );
            for (y, row) in inner.pixels.chunks_exact(inner_w * c).enumerate() {
                out[((top + y) * width + left) * c..][..inner_w * c].copy_from_slice(row);
            }
            Raster {
                height,
                width,
                channels: c,
                pixels: out,
            }
        }
        Fit::Adm => {
            let side = height;
            let mut image = image;
            while image.height.min(image.width) >= 2 * side {
                let all = [0.0, 0.0, image.width as f64, image.height as f64];
                image = resample(
                    &image,
                    all,
                    (image.height / 2, image.width / 2),
                    Filter::Box,
                );
            }
            let scale = side as f64 / image.height.min(image.width) as f64;
            let scaled = |old: usize| ((old as f64 * scale).round_ties_even() as usize).max(side);
            let all = [0.0, 0.0, image.width as f64, image.height as f64];
            let whole = (scaled(image.height), scaled(image.width));
            if (whole.0 as u64).saturating_mul(whole.1 as u64) > MOST_PIXELS {
                return Err(format!(
                    "an image of {h} x {w} pixels that `fit: adm` makes {} x {} for its shorter side to be {side}: \
                     expected at most {MOST_PIXELS} pixels",
                    whole.0, whole.1
                ));
            }
            let near = resample(&image, all, whole, Filter::Bicubic);
            let corner = ((near.height - side) / 2, (near.width - side) / 2);
            crop(&near, corner, size)
        }
    })
}

/// The part of an image of a size whose first row and column are given.
pub fn crop(
    image: &Raster,
    (top, left): (usize, usize),
    (height, width): (usize, usize),
) -> Raster {
    let c = image.channels;
    let rows = image
        .pixels
        .chunks_exact(image.width * c)
        .skip(top)
        .take(height);
    Raster {
        height,
        width,
        channels: c,
        pixels: rows
            .flat_map(|row| &row[left * c..][..width * c])
            .copied()
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_not_made_a_sheet() {
        let thread = |height| Raster {
            height,
            width: 1,
            channels: 1,
            pixels: vec![7; height],
        };
        let adm = |height, side| fit(thread(height), (side, side), Fit::Adm, Filter::Box, &[0]);
        assert_eq!(adm(300, 8).unwrap().pixels, [7; 64]);
        assert_eq!(
            adm(65_536, 512).unwrap_err(),
            "an image of 65536 x 1 pixels that `fit: adm` makes 33554432 x 512 for its shorter side to be 512: \
             expected at most 67108864 pixels"
        );
    }
}
