//! The perceptual term of a student's training loss: how far decoded images are apart.
//!
//! ```text
//! term = mean over the batch of eye(decode(sequence), decode(tokens))        eye: pixels, a classifier's features, or LPIPS
//! ```
//!
//! In: final sequences (b, L, D) as [`crate::splice`] makes them. It differentiates them alone: decoder and eye are constants. Images
//! go through a few at a time.

use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::backend::{Backend, Unary};
use crate::error::{Error, Result};
use crate::model::Tokenizer;
use crate::model::lpips::{self, Lpips};
use crate::stage::classifier::Net;
use crate::stage::{Context, resolve};
use crate::tape::Var;
use crate::weights::{Loader, Source, Stored};

/// Distance between decoded images; it moves the continuous head only, so it needs a `split` below the number of AR
/// steps.
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

/// What compares decoded images.
pub enum Eye<B: Backend> {
    /// Their pixels as they are.
    Pixels,
    /// The features of a classifier.
    Classifier(Net<B>),
    /// LPIPS.
    Lpips(Lpips<B>),
}

impl<B: Backend> Eye<B> {
    /// Loads what the options name.
    pub fn open(context: &Context<'_, B>, perceptual: &Perceptual) -> Result<Self> {
        let (backend, base) = (context.backend, &context.job.base_dir);
        Ok(match perceptual {
            Perceptual::None | Perceptual::L2 { .. } => Self::Pixels,
            Perceptual::Classifier { classifier, .. } => {
                Self::Classifier(Net::open(backend, context.input_dir(classifier)?)?)
            }
            Perceptual::Lpips { vgg, linear, .. } => {
                let [vgg, linear] = [vgg, linear].map(|file| resolve(base, file));
                let (trunk, layers) = (Stored::open(&vgg, None)?, Stored::open(&linear, None)?);
                let loader = |weights, path: &Path| {
                    let origin = path.display().to_string();
                    Loader::new(
                        backend,
                        Source::Files(std::slice::from_ref(weights)),
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

    /// Mean distance of images (b, c, h, w) in [-1, 1].
    pub fn distance(&self, a: &Var<B>, b: &Var<B>) -> Result<Var<B>> {
        let (a, b) = match self {
            Self::Pixels => (a.clone(), b.clone()),
            Self::Classifier(net) => (net.features(a)?, net.features(b)?),
            Self::Lpips(lpips) => {
                let side = a.shape()[2].min(a.shape()[3]);
                if side < lpips::LEAST_SIDE {
                    let message = format!(
                        "LPIPS needs images of at least {0} x {0} pixels, the tokenizer decodes to {side}",
                        lpips::LEAST_SIDE
                    );
                    return Err(Error::option("/perceptual", message));
                }
                return lpips.distance(a, b)?.mean_all();
            }
        };
        a.sub(&b)?.unary(Unary::Square)?.mean_all()
    }
}

/// Mean distance of the images of sequences (b, L, D) to those of others, of which at most `most` are decoded at once.
pub fn distance<B: Backend>(
    tokenizer: &dyn Tokenizer<B>,
    eye: &Eye<B>,
    most: usize,
    sequences: &Var<B>,
    targets: &B::Tensor,
) -> Result<Var<B>> {
    let b = B::shape(targets)[0];
    sequences.sum_of_pieces(most, |piece, place| {
        let target = B::narrow(targets, 0, place.start, place.len())?;
        let target = tokenizer.decode(&Var::constant(target))?;
        let distance = eye.distance(&tokenizer.decode(piece)?, &target)?;
        match place.len() {
            all if all == b => Ok(distance),
            some => distance.affine(some as f64 / b as f64, 0.0),
        }
    })
}
