//! The networks in whose features images are compared, and what they say of a set of images, a batch at a time.

use std::sync::Arc;

use retort_abi::LogLevel;

use super::Options;
use crate::backend::Backend;
use crate::context::Context;
use crate::data::Images;
use crate::error::{Error, Result};
use crate::files::resolve;
use crate::model::classifier::{MODEL, Net};
use crate::model::inception::{self, Inception, Preparation};
use crate::random::{Sequence, Stream};
use crate::stage::classifier;
use crate::statistics::{
    InceptionScore, Moments, RunningMoments, RunningScore, StatisticsError, class_agreement,
    is_sorted_by_class,
};
use crate::tape::Variable;
use crate::weights::{self, Loader, Source as Weights, Stored};

/// The network in whose features images are compared.
pub struct Network<B: Backend> {
    /// What it is.
    pub kind: NetworkKind<B>,
    /// Hash of its weights: features of others are others.
    pub hash: blake3::Hash,
}

/// Features of the classifier that is trained where none is given.
pub const CLASSIFIER_FEATURES: usize = 64;

/// What a network is that measures.
pub enum NetworkKind<B: Backend> {
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

/// Hash of weights by name.
fn hash_of(weights: &weights::Weights) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for (name, floats) in weights {
        let shape = &floats.shape;
        hasher.update(format!("{name} {shape:?}\n").as_bytes());
        for part in floats.data.chunks(1 << 16) {
            hasher.update(&weights::le_bytes(part));
        }
    }
    hasher.finalize()
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
                let network = Box::new(Inception::load(&mut loader)?);
                Self {
                    kind: NetworkKind::Inception {
                        network,
                        depth: depth.unwrap_or(inception::FEATURES.len() - 1),
                    },
                    hash: hash_of(&weights::from_params(&loader.into_params())?),
                }
            }
            (None, Some(stage), _) => {
                let dir = context.input_dir(stage)?;
                Self {
                    kind: NetworkKind::Classifier(Net::open(backend, dir)?),
                    hash: hash_of(&weights::read(&dir.join(MODEL))?),
                }
            }
            (None, None, Some(images)) => {
                let with = (context.host, backend, context.job.seed);
                let work = Some(context.work_dir()?);
                let (config, weights, _) = classifier::train(
                    with,
                    work,
                    images,
                    (0.1, CLASSIFIER_FEATURES),
                    &classifier::training(),
                )?;
                let source = Weights::Host(&weights);
                let mut loader = Loader::new(backend, source, false, "classifier");
                Self {
                    kind: NetworkKind::Classifier(Net::load(&mut loader, &config)?),
                    hash: hash_of(&weights),
                }
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
        match &self.kind {
            NetworkKind::Classifier(net) if net.config.image != image => Err(format!(
                "images of {image:?}; the classifier was made for {:?}",
                net.config.image
            )),
            NetworkKind::Inception { .. } if !matches!(image[0], 1 | 3) => {
                Err(format!("images of {} channels, expected 1 or 3", image[0]))
            }
            _ => Ok(()),
        }
    }

    /// Number of features.
    pub fn dim(&self) -> usize {
        match &self.kind {
            NetworkKind::Classifier(net) => net.config.features,
            NetworkKind::Inception { depth, .. } => inception::FEATURES[*depth],
        }
    }

    /// Whether it is Inception, which has spatial features, and preparations of images.
    pub fn is_inception(&self) -> bool {
        matches!(self.kind, NetworkKind::Inception { .. })
    }

    /// Its name, for people.
    pub fn describe(&self) -> String {
        match self.is_inception() {
            false => "classifier".into(),
            true => format!("inception-2015-12-05, {} features", self.dim()),
        }
    }

    /// How images come to it, where figures depend on that, for people; `sizes` says how they came to theirs before.
    pub fn pipeline(&self, preparations: &[Preparation], sizes: Vec<String>) -> Option<String> {
        let mut ways = Vec::new();
        if self.is_inception() {
            ways.push("pixels rounded to the nearest of 256 values".to_owned());
            ways.extend(preparations.iter().map(|p| p.describe()));
        }
        ways.extend(sizes);
        (!ways.is_empty()).then(|| ways.join("; "))
    }

    /// Looks at images (n, c, h, w) in [-1, 1]; Inception, after a preparation.
    fn look(
        &self,
        backend: &B,
        images: &[f32],
        [c, h, w]: [usize; 3],
        preparation: Preparation,
    ) -> Result<ImageFeatures> {
        match &self.kind {
            NetworkKind::Classifier(net) => {
                let (features, classes) = net.measure(backend, images)?;
                Ok(ImageFeatures {
                    features,
                    classes,
                    spatial: Vec::new(),
                    logits: Vec::new(),
                })
            }
            NetworkKind::Inception { network, depth } => {
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
pub struct SetMeasurements {
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
    /// Their classes, one an image, where these were asked for.
    pub labels: Option<&'a [u32]>,
    /// Reads images, from an index on, so many, in [-1, 1].
    pub read: Box<dyn FnMut(usize, usize) -> Result<Vec<f32>> + 'a>,
}

/// Measures one set after the other.
pub struct SetMeasurer<'a, 'b, B: Backend> {
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

impl<B: Backend> SetMeasurer<'_, '_, B> {
    /// Measures a set, for Inception after a preparation.
    pub fn measure(
        &mut self,
        source: Source<'_>,
        preparation: Preparation,
    ) -> Result<SetMeasurements> {
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
        if self.network.is_inception() {
            spatial = Some(RunningMoments::new(inception::SPATIAL_FEATURES));
            score = labels.map(|labels| score_of(labels, self.splits));
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
        let agreement = match (labels, &self.network.kind) {
            (Some(labels), NetworkKind::Classifier(_)) => Some(class_agreement(&classes, labels)?),
            _ => None,
        };
        Ok(SetMeasurements {
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

/// The inception score of rows with these labels, in parts: consecutive rows, and where classes stand together, so that such a
/// part would have few of them, rows that are dealt by a fixed permutation.
fn score_of(labels: &[u32], splits: usize) -> Result<RunningScore, StatisticsError> {
    let score = RunningScore::new(labels.len(), inception::CLASSES, splits)?;
    Ok(match is_sorted_by_class(labels) {
        true => score.dealt(Sequence::new(0, Stream::Subset, 1).permutation(labels.len())),
        false => score,
    })
}

/// A figure for which there are too few samples is none; whatever else is wrong ends the stage.
pub fn had<T>(figure: std::result::Result<T, StatisticsError>) -> Result<Measurement<T>> {
    match figure {
        Ok(figure) => Ok(Ok(figure)),
        Err(few @ StatisticsError::TooFew { .. }) => Ok(Err(few.to_string())),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Floats;

    #[test]
    fn the_hash_of_weights_is_that_of_names_shapes_and_values() {
        let of = |name: &str, shape: &[usize], data: &[f32]| {
            let (shape, data) = (shape.to_vec(), data.to_vec());
            hash_of(&[(name.to_owned(), Floats { shape, data })].into())
        };
        let own = of("conv.weight", &[2, 1], &[1.0, 2.0]);
        assert_eq!(own, of("conv.weight", &[2, 1], &[1.0, 2.0]));
        assert_ne!(own, of("conv.bias", &[2, 1], &[1.0, 2.0]));
        assert_ne!(own, of("conv.weight", &[1, 2], &[1.0, 2.0]));
        assert_ne!(own, of("conv.weight", &[2, 1], &[1.0, 2.5]));
    }

    /// Images of ten classes in the order of folders, of which the network is sure.
    #[test]
    fn the_score_of_sorted_classes_is_that_of_mixed_ones() {
        let labels: Vec<u32> = (0..2000).map(|i| i / 200).collect();
        let logits: Vec<f32> = labels
            .iter()
            .flat_map(|&l| {
                (0..inception::CLASSES as u32).map(move |c| [0.0, 30.0][usize::from(c == l)])
            })
            .collect();
        let mut score = score_of(&labels, 10).unwrap();
        score.add(&logits).unwrap();
        let found = score.finish().unwrap();
        assert!(found.mean > 9.0 && found.mean <= 10.0, "{found:?}");
        // In the order in which they come each part is one class.
        let mut plain = RunningScore::new(labels.len(), inception::CLASSES, 10).unwrap();
        plain.add(&logits).unwrap();
        assert!(plain.finish().unwrap().mean < 1.1);
    }
}
