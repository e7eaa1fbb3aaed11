//! The perceptual term of a training loss: the distance of images by a metric. A student's:
//!
//! ```text
//! term = mean over the batch of metric(decode(sequence), decode(tokens))
//! metric: pixels, a classifier's features, or LPIPS
//! ```
//!
//! In: final sequences (b, L, D) from [`crate::splice`]. Only these get gradients: decoder and metric are constants. A few
//! images are processed at a time. A tokenizer's term compares images and their reconstructions.

use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::{Backend, Unary};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::files::resolve;
use crate::model::Tokenizer;
use crate::model::classifier::Net;
use crate::model::lpips::{self, Lpips};
use crate::tape::Variable;
use crate::weights::{CheckpointWeights, Loader, ParameterSource};

/// Distance between images.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Perceptual {
    /// None.
    #[default]
    None,
    /// Mean squared distance of pixels.
    L2 {
        /// Its weight.
        weight: f64,
    },
    /// Mean squared distance of a classifier's features.
    Classifier {
        /// Its weight.
        weight: f64,
        /// Whether the maps of its convolutions are compared too, each pixel's channels made a unit vector, as LPIPS does.
        #[serde(default)]
        maps: bool,
        /// The stage that trained the classifier.
        #[schemars(extend("x-retort-artifact" = ["classifier"]))]
        classifier: String,
    },
    /// LPIPS on VGG-16 (arXiv 1801.03924, version 0.1), for images of at least 16 x 16 pixels.
    Lpips {
        /// Its weight.
        weight: f64,
        /// Weights of VGG-16 under torchvision's names: `vgg16-*.pth`.
        #[schemars(extend("x-retort-file" = "file"))]
        vgg: String,
        /// Weights of its linear layers: `vgg.pth` of the published implementation.
        #[schemars(extend("x-retort-file" = "file"))]
        linear: String,
    },
}

impl Perceptual {
    /// Its weight in the loss; 0 for none.
    pub fn weight(&self) -> f64 {
        match self {
            Self::None => 0.0,
            Self::L2 { weight } | Self::Classifier { weight, .. } | Self::Lpips { weight, .. } => {
                *weight
            }
        }
    }
}

/// Pixels of the images processed together, unless a recipe sets the number of images.
pub const PIXELS_AT_ONCE: usize = 1 << 19;

/// A metric of decoded images.
pub enum PerceptualMetric<B: Backend> {
    /// Their pixels as they are.
    Pixels,
    /// The features of a classifier, and optionally its maps.
    Classifier(Net<B>, bool),
    /// LPIPS.
    Lpips(Lpips<B>),
}

impl<B: Backend> PerceptualMetric<B> {
    /// Loads the network that the options name.
    pub fn open(context: &Context<'_, B>, perceptual: &Perceptual) -> Result<Self> {
        let (backend, base) = (context.backend, &context.job.base_dir);
        Ok(match perceptual {
            Perceptual::None | Perceptual::L2 { .. } => Self::Pixels,
            Perceptual::Classifier {
                classifier, maps, ..
            } => Self::Classifier(Net::open(backend, context.input_dir(classifier)?)?, *maps),
            Perceptual::Lpips { vgg, linear, .. } => {
                let [vgg, linear] = [vgg, linear].map(|file| resolve(base, file));
                let (trunk, layers) = (
                    CheckpointWeights::open(&vgg, None)?,
                    CheckpointWeights::open(&linear, None)?,
                );
                let loader = |weights, path: &Path| {
                    let origin = path.display().to_string();
                    Loader::new(
                        backend,
                        ParameterSource::Files(std::slice::from_ref(weights)),
                        false,
                        origin,
                    )
                };
                Self::Lpips(Lpips::load(
                    &mut loader(&trunk, &vgg),
                    &mut loader(&layers, &linear),
                )?)
            }
        })
    }

    /// Refuses images (c, h, w) that the metric cannot process.
    pub fn check(&self, image: [usize; 3]) -> Result<()> {
        let refuse = |message: String| Err(Error::option("/perceptual", message));
        let side = image[1].min(image[2]);
        match self {
            Self::Classifier(net, _) if net.config.image != image => refuse(format!(
                "images of {image:?}; the classifier was made for {:?}",
                net.config.image
            )),
            Self::Lpips(_) if side < lpips::LEAST_SIDE => refuse(format!(
                "LPIPS needs images of at least {0} x {0} pixels, the tokenizer decodes to {side}",
                lpips::LEAST_SIDE
            )),
            _ => Ok(()),
        }
    }

    /// Mean distance of images (b, c, h, w) in [-1, 1].
    pub fn distance(&self, a: &Variable<B>, b: &Variable<B>) -> Result<Variable<B>> {
        let (a, b) = match self {
            Self::Pixels => (a.clone(), b.clone()),
            Self::Classifier(net, false) => (net.features(a)?, net.features(b)?),
            Self::Classifier(net, true) => {
                let (a, b) = (net.maps(a)?, net.maps(b)?);
                let (last, own) = (&a[a.len() - 1], &b[b.len() - 1]);
                let mut sum = mean_square(&net.features_of(last)?, &net.features_of(own)?)?;
                for (a, b) in a.iter().zip(&b) {
                    // For unit vectors: the mean over pixels of the squared difference.
                    let channels = a.shape()[1] as f64;
                    let term = mean_square(&lpips::unit(a)?, &lpips::unit(b)?)?;
                    sum = sum.add(&term.affine(channels, 0.0)?)?;
                }
                return Ok(sum);
            }
            Self::Lpips(lpips) => return lpips.distance(a, b)?.mean_all(),
        };
        mean_square(&a, &b)
    }
}

fn mean_square<B: Backend>(a: &Variable<B>, b: &Variable<B>) -> Result<Variable<B>> {
    a.sub(b)?.unary(Unary::Square)?.mean_all()
}

/// Mean distance of the images of sequences (b, L, D) to those of others, of which at most `most` are decoded at once.
pub fn distance<B: Backend>(
    tokenizer: &dyn Tokenizer<B>,
    metric: &PerceptualMetric<B>,
    most: usize,
    sequences: &Variable<B>,
    targets: &B::Tensor,
) -> Result<Variable<B>> {
    let b = B::shape(targets)[0];
    sequences.sum_of_pieces(most, |piece, place| {
        let target = B::narrow(targets, 0, place.start, place.len())?;
        let target = tokenizer.decode(&Variable::constant(target))?;
        let distance = metric.distance(&tokenizer.decode(piece)?, &target)?;
        match place.len() {
            all if all == b => Ok(distance),
            some => distance.affine(some as f64 / b as f64, 0.0),
        }
    })
}
