//! A tokenizer's quality: reconstructions, and their similarity to the images by peak signal-to-noise ratio and structural
//! similarity (Wang et al. 2004, "Image quality assessment", eq. 13) with a Gaussian window of 11 x 11 pixels and deviation
//! 1.5, where it fits inside.
//!
//! In: images (channels, height, width) in [-1, 1], converted to [0, 1] and clipped.

use serde_json::{Value, json};

use super::batch_shape;
use crate::backend::Backend;
use crate::data::Images;
use crate::error::Result;
use crate::model::Tokenizer;
use crate::train::Mean;

/// Images in the picture, and per row.
const SHOWN: usize = 48;
const ROW: usize = 16;

/// How good a tokenizer is.
pub struct Quality {
    /// Mean squared error in [-1, 1].
    error: f64,
    psnr: f64,
    ssim: f64,
    /// Share of the codes that these images use, and their perplexity.
    usage: f64,
    perplexity: f64,
    /// Rows of images in [0, 1], each followed by a row of their reconstructions.
    pub picture: Vec<f32>,
    /// Rows of the picture.
    pub rows: usize,
}

impl Quality {
    /// The figures by name.
    pub fn summary(&self) -> Value {
        json!({
            "held_out_error": self.error,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "codebook_usage": self.usage,
            "perplexity": self.perplexity,
        })
    }
}

impl std::fmt::Display for Quality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "held-out images: mean squared error {:.5} in [-1, 1], PSNR {:.2} dB, SSIM {:.4}; {:.1} % of the codes, \
             perplexity {:.1}",
            self.error,
            self.psnr,
            self.ssim,
            100.0 * self.usage,
            self.perplexity
        )
    }
}

/// Measures a tokenizer on images, this many at a time.
pub fn look<B: Backend>(
    backend: &B,
    model: &dyn Tokenizer<B>,
    images: &Images,
    picks: &[usize],
    at_once: usize,
) -> Result<Quality> {
    let stride = images.stride();
    let shown: Vec<usize> = match picks.len() {
        n if n <= SHOWN => (0..n).collect(),
        n => (0..SHOWN).map(|i| i * n / SHOWN).collect(),
    };
    let mut uses = vec![0usize; B::shape(&model.codebook()?)[0]];
    let (mut errors, mut decibels, mut likeness) = (Mean::default(), 0.0, 0.0);
    let (mut above, mut below) = (Vec::new(), Vec::new());
    for (number, part) in picks.chunks(at_once).enumerate() {
        let pixels = images.gather(part)?.0;
        let r = model.reconstruct(&backend.floats(&pixels, &batch_shape(images, part.len()))?)?;
        let made = B::to_floats(r.images.value())?;
        for token in B::to_indices(&r.tokens)? {
            uses[token as usize] += 1;
        }
        let pairs = pixels.chunks_exact(stride).zip(made.chunks_exact(stride));
        for (i, (a, b)) in pairs.enumerate() {
            let squares: Vec<f32> = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).collect();
            errors.add(&squares);
            decibels += psnr(a, b);
            likeness += ssim(a, b, images.shape());
            if shown.binary_search(&(number * at_once + i)).is_ok() {
                above.extend(a.iter().map(|x| x * 0.5 + 0.5));
                below.extend(b.iter().map(|x| x * 0.5 + 0.5));
            }
        }
    }
    let mut picture = Vec::new();
    let mut rows = 0;
    let row = (ROW.min(shown.len())) * stride;
    for (a, b) in above.chunks_exact(row).zip(below.chunks_exact(row)) {
        picture.extend_from_slice(a);
        picture.extend_from_slice(b);
        rows += 2;
    }
    let (n, total) = (picks.len() as f64, uses.iter().sum::<usize>() as f64);
    let shares = uses.iter().filter(|&&n| n > 0).map(|&n| n as f64 / total);
    let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
    Ok(Quality {
        error: errors.value(),
        psnr: decibels / n,
        ssim: likeness / n,
        usage: uses.iter().filter(|&&n| n > 0).count() as f64 / uses.len() as f64,
        perplexity: entropy.exp(),
        picture,
        rows,
    })
}

/// The maximum ratio: equal images have no noise.
const MOST_DECIBELS: f64 = 100.0;
const WINDOW: usize = 11;
const DEVIATION: f64 = 1.5;
const C1: f64 = 0.01 * 0.01;
const C2: f64 = 0.03 * 0.03;

fn unit(x: f32) -> f64 {
    (f64::from(x) * 0.5 + 0.5).clamp(0.0, 1.0)
}

/// Peak signal-to-noise ratio of two images in decibels.
pub fn psnr(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(&a, &b)| (unit(a) - unit(b)).powi(2));
    let error = squares.sum::<f64>() / a.len() as f64;
    // Not `min`, which would turn NaN into a perfect ratio.
    (-10.0 * error.log10()).clamp(f64::NEG_INFINITY, MOST_DECIBELS)
}

/// Structural similarity of two images, the mean over channels. For a side of fewer than 11 pixels the window is the largest
/// odd number that fits.
pub fn ssim(a: &[f32], b: &[f32], [channels, height, width]: [usize; 3]) -> f64 {
    let (down, across) = (window(height), window(width));
    let plane = height * width;
    let filtered = |values: &[f64]| filter(values, [height, width], &down, &across);
    let of = |channel: usize| {
        let part = channel * plane..(channel + 1) * plane;
        let a: Vec<f64> = a[part.clone()].iter().map(|&x| unit(x)).collect();
        let b: Vec<f64> = b[part].iter().map(|&x| unit(x)).collect();
        let product =
            |x: &[f64], y: &[f64]| -> Vec<f64> { x.iter().zip(y).map(|(x, y)| x * y).collect() };
        let means = [filtered(&a), filtered(&b)];
        let squares = [
            filtered(&product(&a, &a)),
            filtered(&product(&b, &b)),
            filtered(&product(&a, &b)),
        ];
        let places = means[0].len();
        let sum: f64 = (0..places)
            .map(|i| {
                let (ma, mb) = (means[0][i], means[1][i]);
                let (va, vb) = (squares[0][i] - ma * ma, squares[1][i] - mb * mb);
                let both = squares[2][i] - ma * mb;
                (2.0 * ma * mb + C1) * (2.0 * both + C2)
                    / ((ma * ma + mb * mb + C1) * (va + vb + C2))
            })
            .sum();
        sum / places as f64
    };
    (0..channels).map(of).sum::<f64>() / channels as f64
}

/// The window along a side.
fn window(side: usize) -> Vec<f64> {
    let size = WINDOW.min(side - (1 - side % 2));
    let middle = (size / 2) as f64;
    let weight = |i: usize| (-((i as f64 - middle) / DEVIATION).powi(2) / 2.0).exp();
    let weights: Vec<f64> = (0..size).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// Weighted means of the windows inside a plane.
fn filter(values: &[f64], [height, width]: [usize; 2], down: &[f64], across: &[f64]) -> Vec<f64> {
    let kept = width + 1 - across.len();
    let rows: Vec<f64> = (0..height)
        .flat_map(|y| {
            let row = &values[y * width..(y + 1) * width];
            (0..kept).map(move |x| across.iter().zip(&row[x..]).map(|(w, v)| w * v).sum())
        })
        .collect();
    (0..=height - down.len())
        .flat_map(|y| {
            let rows = &rows;
            (0..kept).map(move |x| {
                let column = down.iter().enumerate();
                column.map(|(i, w)| w * rows[(y + i) * kept + x]).sum()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::psnr;

    #[test]
    fn an_image_that_is_not_a_number_has_no_ratio() {
        assert_eq!(psnr(&[0.5, -0.5], &[0.5, -0.5]), 100.0);
        assert!((psnr(&[1.0], &[0.8]) - 20.0).abs() < 1e-4);
        assert!(psnr(&[0.5, f32::NAN], &[0.5, -0.5]).is_nan());
    }
}
