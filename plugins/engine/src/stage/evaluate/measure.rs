//! The networks in whose features images are compared, and what they say of a set of images, a batch at a time.

use std::sync::Arc;

use retort_abi::LogLevel;

use super::Options;
use crate::backend::Backend;
use crate::context::Context;
use crate::data::Images;
use crate::error::{Error, Result};
use crate::files::resolve;
use crate::model::classifier::Net;
use crate::model::inception::{self, Inception, Preparation};
use crate::stage::classifier;
use crate::statistics::{
    InceptionScore, Moments, RunningMoments, RunningScore, StatisticsError, class_agreement,
};
use crate::tape::Variable;
use crate::weights::{Loader, Source as Weights, Stored};

/// The network in whose features images are compared.
pub enum Network<B: Backend> {
    /// A classifier of the data.
    Classifier(Net<B>),
    /// Inception, and which of its features are compared.
    Inception {
        /// The network.
        network: Box<Inception<B>>,
        /// Which of its features, by their place in [`inception::FEATURES`].
        depth: usize,
    },
}

/// What a network says of some images, on the host.
struct ImageFeatures {
    features: Vec<f32>,
    /// Spatial features and logits: of Inception.
    spatial: Vec<f32>,
    logits: Vec<f32>,
    /// Most probable classes: of a classifier.
    classes: Vec<u32>,
}

impl<B: Backend> Network<B> {
    /// Opens the network of a stage's options, or trains a classifier.
    pub fn open(
        context: &Context<'_, B>,
        o: &Options,
        images: Option<&Arc<Images>>,
    ) -> Result<Self> {
        let backend = context.backend;
        let network = match (&o.inception, &o.classifier, images) {
            (Some(file), _, _) => {
                let path = resolve(&context.job.base_dir, file);
                let weights = Stored::open(&path, None)?;
                let origin = path.display().to_string();
                let mut loader = Loader::new(
                    backend,
                    Weights::Files(std::slice::from_ref(&weights)),
                    false,
                    origin,
                );
                let depth = inception::FEATURES.iter().position(|&d| d == o.dims);
                Self::Inception {
                    network: Box::new(Inception::load(&mut loader)?),
                    depth: depth.unwrap_or(inception::FEATURES.len() - 1),
                }
            }
            (None, Some(stage), _) => {
                Self::Classifier(Net::open(backend, context.input_dir(stage)?)?)
            }
            (None, None, Some(images)) => {
                let with = (context.host, backend, context.job.seed);
                let work = Some(context.work_dir()?);
                let (config, weights, _) =
                    classifier::train(with, work, images, (0.1, 64), &classifier::training())?;
                let source = Weights::Host(&weights);
                Self::Classifier(Net::load(
                    &mut Loader::new(backend, source, false, "classifier"),
                    &config,
                )?)
            }
            (None, None, None) => return Err(Error::Internal("no network".into())),
        };
        if let Some(images) = images {
            network
                .accepts(images.shape())
                .map_err(|message| Error::option("/classifier", message))?;
        }
        Ok(network)
    }

    /// Whether it sees images of a size; else why not.
    pub fn accepts(&self, image: [usize; 3]) -> Result<(), String> {
        match self {
            Self::Classifier(net) if net.config.image != image => Err(format!(
                "images of {image:?}; the classifier was made for {:?}",
                net.config.image
            )),
            Self::Inception { .. } if !matches!(image[0], 1 | 3) => {
                Err(format!("images of {} channels, expected 1 or 3", image[0]))
            }
            _ => Ok(()),
        }
    }

    /// Number of features.
    pub fn dim(&self) -> usize {
        match self {
            Self::Classifier(net) => net.config.features,
            Self::Inception { depth, .. } => inception::FEATURES[*depth],
        }
    }

    /// Its name, for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Classifier(_) => "classifier".into(),
            Self::Inception { .. } => format!("inception-2015-12-05, {} features", self.dim()),
        }
    }

    /// How images come to it, where figures depend on that, for people.
    pub fn pipeline(&self, preparations: &[Preparation]) -> Option<String> {
        let Self::Inception { .. } = self else {
            return None;
        };
        let ways: Vec<String> = preparations.iter().map(|p| p.describe()).collect();
        let ways = ways.join("; ");
        Some(format!(
            "pixels rounded to the nearest of 256 values; {ways}"
        ))
    }

    /// Looks at images (n, c, h, w) in [-1, 1]; Inception, after a preparation.
    fn look(
        &self,
        backend: &B,
        images: &[f32],
        [c, h, w]: [usize; 3],
        preparation: Preparation,
    ) -> Result<ImageFeatures> {
        match self {
            Self::Classifier(net) => {
                let (features, classes) = net.measure(backend, images)?;
                Ok(ImageFeatures {
                    features,
                    classes,
                    spatial: Vec::new(),
                    logits: Vec::new(),
                })
            }
            Self::Inception { network, depth } => {
                // Published figures are taken from image files: of 256 values a pixel can have.
                let bytes: Vec<f32> = images
                    .iter()
                    .map(|x| ((x * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round() / 255.0)
                    .collect();
                let x = backend.floats(&bytes, &[images.len() / (c * h * w), c, h, w])?;
                let outputs = network.look(&Variable::constant(x), preparation)?;
                Ok(ImageFeatures {
                    features: B::to_floats(outputs.features[*depth].value())?,
                    spatial: B::to_floats(outputs.spatial.value())?,
                    logits: B::to_floats(outputs.logits.value())?,
                    classes: Vec::new(),
                })
            }
        }
    }
}

/// A figure, or why it cannot be had.
pub type Measurement<T> = std::result::Result<T, String>;

/// What is known of a set of images.
pub struct Measured {
    /// Moments of its features.
    pub moments: Measurement<Moments>,
    /// Of its spatial features; none unless the network has them.
    pub spatial: Option<Measurement<Moments>>,
    /// Inception score; none unless it was asked for.
    pub score: Option<Measurement<InceptionScore>>,
    /// Share of images that have their class; none unless a classifier says so.
    pub agreement: Option<f64>,
    /// Features (n, d); none unless pairs of images are compared.
    pub features: Vec<f32>,
}

/// Images that are measured, read a batch at a time from the first to the last.
pub struct Source<'a> {
    /// Its name, for people.
    pub name: String,
    /// Number of images.
    pub count: usize,
    /// Channels, height, width.
    pub image: [usize; 3],
    /// Their classes, where these were asked for.
    pub labels: Option<&'a [u32]>,
    /// Reads images, from an index on, so many, in [-1, 1].
    pub read: Box<dyn FnMut(usize, usize) -> Result<Vec<f32>> + 'a>,
}

/// Measures one set after the other.
pub struct Meter<'a, 'b, B: Backend> {
    /// The stage.
    pub context: &'a Context<'b, B>,
    /// The network.
    pub network: &'a Network<B>,
    /// Images that the network sees at a time.
    pub batch: usize,
    /// Parts of the inception score.
    pub splits: usize,
    /// Whether features are kept, (n, d) as f32.
    pub keep: bool,
    /// Images seen so far.
    pub done: u64,
    /// Images to be seen.
    pub total: u64,
}

impl<B: Backend> Meter<'_, '_, B> {
    /// Measures a set, for Inception after a preparation.
    pub fn measure(&mut self, source: Source<'_>, preparation: Preparation) -> Result<Measured> {
        let (dim, host) = (self.network.dim(), self.context.host);
        let Source {
            name,
            count,
            image,
            labels,
            mut read,
        } = source;
        let mut moments = RunningMoments::new(dim);
        let (mut spatial, mut score) = (None, None);
        if let Network::Inception { .. } = self.network {
            spatial = Some(RunningMoments::new(inception::SPATIAL_FEATURES));
            if labels.is_some() {
                score = Some(RunningScore::new(count, inception::CLASSES, self.splits));
            }
        }
        if count <= dim {
            let message = format!(
                "{name}: {count} images for {dim} features: the Frechet distance is far too great with so few"
            );
            host.log(LogLevel::Warn, &message);
        }
        let mut features = Vec::new();
        if self.keep {
            features.reserve_exact(count * dim);
        }
        let mut classes = Vec::new();
        for first in (0..count).step_by(self.batch) {
            self.context.go_on()?;
            let n = self.batch.min(count - first);
            let pixels = read(first, n)?;
            if let Some(at) = pixels.iter().position(|x| !x.is_finite()) {
                let index = first + at / (pixels.len() / n);
                let message = format!("{name}: image {index} holds a pixel that is not finite");
                return Err(Error::Numerical(message));
            }
            let seen = self
                .network
                .look(self.context.backend, &pixels, image, preparation)?;
            moments.add(&seen.features)?;
            if let Some(spatial) = &mut spatial {
                spatial.add(&seen.spatial)?;
            }
            if let Some(Ok(score)) = &mut score {
                score.add(&seen.logits)?;
            }
            classes.extend(seen.classes);
            if self.keep {
                features.extend(seen.features);
            }
            self.done += n as u64;
            host.progress(self.done, self.total, "images");
        }
        let agreement = match (labels, self.network) {
            (Some(labels), Network::Classifier(_)) => Some(class_agreement(&classes, labels)?),
            _ => None,
        };
        Ok(Measured {
            moments: had(moments.finish())?,
            spatial: spatial.map(|spatial| had(spatial.finish())).transpose()?,
            score: match score {
                Some(score) => Some(had(score.and_then(RunningScore::finish))?),
                None => None,
            },
            agreement,
            features,
        })
    }
}

/// A figure for which there are too few samples is none; whatever else is wrong ends the stage.
pub fn had<T>(figure: std::result::Result<T, StatisticsError>) -> Result<Measurement<T>> {
    match figure {
        Ok(figure) => Ok(Ok(figure)),
        Err(few @ StatisticsError::TooFew { .. }) => Ok(Err(few.to_string())),
        Err(error) => Err(error.into()),
    }
}
