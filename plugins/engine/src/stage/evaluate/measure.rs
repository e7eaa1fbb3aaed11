//! The networks in whose features images are compared, and their measurements of a set of images, a batch at a time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use retort_abi::LogLevel;

use super::Options;
use super::shards::FeatureShards;
use crate::backend::Backend;
use crate::context::Context;
use crate::data::{Images, pieces};
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
use crate::weights::{self, CheckpointWeights, Loader, ParameterSource};

/// The network in whose features images are compared.
pub struct Network<B: Backend> {
    /// What it is.
    pub kind: NetworkKind<B>,
    /// Hash of its weights: features of different networks are not comparable.
    pub hash: blake3::Hash,
}

/// The kinds of measuring network.
pub enum NetworkKind<B: Backend> {
    /// A classifier of the data.
    Classifier(Net<B>),
    /// Inception, and which of its features are compared.
    Inception {
        /// The network.
        network: Box<Inception<B>>,
        /// Which of its features, by index in [`inception::FEATURES`].
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

/// A network's outputs for some images, on the host.
#[derive(Default)]
struct ImageFeatures {
    features: Vec<f32>,
    /// Inception's spatial features and logits.
    spatial: Vec<f32>,
    logits: Vec<f32>,
    /// A classifier's most probable classes.
    classes: Vec<u32>,
}

impl ImageFeatures {
    /// That of further images.
    fn extend(&mut self, more: Self) {
        self.features.extend(more.features);
        self.spatial.extend(more.spatial);
        self.logits.extend(more.logits);
        self.classes.extend(more.classes);
    }

    /// As stored in a file: f32 represents all class numbers.
    fn into_arrays(self) -> BTreeMap<String, Vec<f32>> {
        let classes = self.classes.iter().map(|&class| class as f32).collect();
        let arrays = [
            ("features", self.features),
            ("spatial", self.spatial),
            ("logits", self.logits),
            ("classes", classes),
        ];
        arrays.map(|(name, data)| (name.to_owned(), data)).into()
    }

    fn of_arrays(mut arrays: BTreeMap<String, Vec<f32>>) -> Self {
        let mut take = |name: &str| arrays.remove(name).unwrap_or_default();
        Self {
            features: take("features"),
            spatial: take("spatial"),
            logits: take("logits"),
            classes: take("classes").iter().map(|&class| class as u32).collect(),
        }
    }
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
                let weights = CheckpointWeights::open(&path, None)?;
                let origin = path.display().to_string();
                let mut loader = Loader::new(
                    backend,
                    ParameterSource::Files(std::slice::from_ref(&weights)),
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
            (None, Some(stage), _) => Self::of_classifier(backend, context.input_dir(stage)?)?,
            (None, None, Some(images)) => match classifier::trained_for_parts(context, images)? {
                Some(dir) => Self::of_classifier(backend, &dir)?,
                None => {
                    let (config, weights) =
                        classifier::train_for_figures(context, context.work_dir()?, images)?;
                    let source = ParameterSource::Host(&weights);
                    let mut loader = Loader::new(backend, source, false, "classifier");
                    Self {
                        kind: NetworkKind::Classifier(Net::load(&mut loader, &config)?),
                        hash: hash_of(&weights),
                    }
                }
            },
            (None, None, None) => return Err(Error::Internal("no network".into())),
        };
        if let Some(images) = images {
            network
                .accepts(images.shape())
                .map_err(|message| Error::option("/classifier", message))?;
        }
        Ok(network)
    }

    /// The classifier in a directory.
    fn of_classifier(backend: &B, dir: &Path) -> Result<Self> {
        Ok(Self {
            kind: NetworkKind::Classifier(Net::open(backend, dir)?),
            hash: hash_of(&weights::read(&dir.join(MODEL))?),
        })
    }

    /// Checks that it accepts images of a shape.
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

    /// How images are prepared for it, if figures depend on that, for people; `sizes` describes earlier resizing.
    pub fn pipeline(&self, preparations: &[Preparation], sizes: Vec<String>) -> Option<String> {
        let mut ways = Vec::new();
        if self.is_inception() {
            ways.push("pixels rounded to the nearest of 256 values".to_owned());
            ways.extend(preparations.iter().map(|p| p.describe()));
        }
        ways.extend(sizes);
        (!ways.is_empty()).then(|| ways.join("; "))
    }

    /// Runs the network on images (n, c, h, w) in [-1, 1]; Inception after a preparation.
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
                // Published figures are measured on image files with 256 values per pixel.
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

/// A figure, or why it is not available.
pub type Measurement<T> = std::result::Result<T, String>;

/// The measurements of a set of images.
pub struct SetMeasurements {
    /// Moments of its features.
    pub moments: Measurement<Moments>,
    /// Moments of its spatial features; None if the network has none.
    pub spatial: Option<Measurement<Moments>>,
    /// Inception score, if requested.
    pub score: Option<Measurement<InceptionScore>>,
    /// Share of images assigned to their class, by a classifier.
    pub agreement: Option<f64>,
    /// Features (n, d), if images are compared in pairs.
    pub features: Vec<f32>,
}

/// Images to measure, read in order a batch at a time.
pub struct ImageReader<'a> {
    /// Its name, for people.
    pub name: String,
    /// Number of images.
    pub count: usize,
    /// Channels, height, width.
    pub image: [usize; 3],
    /// Their classes or the numbers of their captions, if these were requested.
    pub labels: Option<&'a [u32]>,
    /// Whether labels are classes.
    pub by_class: bool,
    /// Reads this many images from an index on, in [-1, 1].
    pub read: Box<dyn FnMut(usize, usize) -> Result<Vec<f32>> + 'a>,
}

/// Measures one set after the other.
pub struct SetMeasurer<'a, 'b, B: Backend> {
    /// The stage.
    pub context: &'a Context<'b, B>,
    /// The network.
    pub network: &'a Network<B>,
    /// Images per batch of the network.
    pub batch: usize,
    /// Parts of the inception score.
    pub splits: usize,
    /// Whether features are kept, (n, d) as f32.
    pub keep: bool,
    /// Features computed by parts of the stage.
    pub shards: FeatureShards,
    /// Images seen so far.
    pub done: u64,
    /// Images to be seen.
    pub total: u64,
}

impl<B: Backend> SetMeasurer<'_, '_, B> {
    /// Measures this part's share of a set's images, for Inception after a preparation.
    pub fn look_at_share(
        &mut self,
        mut source: ImageReader<'_>,
        preparation: Preparation,
    ) -> Result<()> {
        for shard in self.shards.next(source.count) {
            if !shard.own {
                continue;
            }
            if shard.read().is_none() {
                let mut seen = ImageFeatures::default();
                for images in pieces(shard.images.clone(), self.batch) {
                    seen.extend(self.look(&mut source, images, preparation)?);
                }
                shard.write(seen.into_arrays())?;
            }
            self.seen(shard.images.len());
        }
        Ok(())
    }

    /// Measures a set, for Inception after a preparation.
    pub fn measure(
        &mut self,
        mut source: ImageReader<'_>,
        preparation: Preparation,
    ) -> Result<SetMeasurements> {
        let (dim, host, labels) = (self.network.dim(), self.context.host, source.labels);
        let meant_classes = labels.filter(|_| source.by_class);
        let mut moments = RunningMoments::new(dim);
        let (mut spatial, mut score) = (None, None);
        if self.network.is_inception() {
            spatial = Some(RunningMoments::new(inception::SPATIAL_FEATURES));
            score = labels.map(|labels| score_of(labels, self.splits));
        }
        if source.count <= dim {
            let message = format!(
                "{}: {} images for {dim} features: the Frechet distance is far too large with so few",
                source.name, source.count
            );
            host.log(LogLevel::Warn, &message);
        }
        let mut features = Vec::new();
        if self.keep {
            features.reserve_exact(source.count * dim);
        }
        let (mut classes, keeps) = (Vec::new(), self.keep);
        let mut add = |seen: ImageFeatures| -> Result<()> {
            moments.add(&seen.features)?;
            if let Some(spatial) = &mut spatial {
                spatial.add(&seen.spatial)?;
            }
            if let Some(Ok(score)) = &mut score {
                score.add(&seen.logits)?;
            }
            classes.extend(seen.classes);
            if keeps {
                features.extend(seen.features);
            }
            Ok(())
        };
        for shard in self.shards.next(source.count) {
            if let Some(seen) = shard.read() {
                self.context.go_on()?;
                add(ImageFeatures::of_arrays(seen))?;
                self.seen(shard.images.len());
                continue;
            }
            for images in pieces(shard.images.clone(), self.batch) {
                let count = images.len();
                add(self.look(&mut source, images, preparation)?)?;
                self.seen(count);
            }
        }
        let agreement = match (meant_classes, &self.network.kind) {
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

    /// The network's outputs for some images of a set.
    fn look(
        &self,
        source: &mut ImageReader<'_>,
        images: Range<usize>,
        preparation: Preparation,
    ) -> Result<ImageFeatures> {
        self.context.go_on()?;
        let (first, n) = (images.start, images.len());
        let pixels = (source.read)(first, n)?;
        if let Some(at) = pixels.iter().position(|x| !x.is_finite()) {
            let index = first + at / (pixels.len() / n);
            let name = &source.name;
            let message = format!("{name}: image {index} holds a pixel that is not finite");
            return Err(Error::Numerical(message));
        }
        self.network
            .look(self.context.backend, &pixels, source.image, preparation)
    }

    fn seen(&mut self, images: usize) {
        self.done += images as u64;
        self.context.host.progress(self.done, self.total, "images");
    }
}

/// The inception score of rows with these labels, in parts. Parts are consecutive rows; if the rows are sorted by class, so
/// that such parts would have few classes, a fixed permutation distributes the rows.
fn score_of(labels: &[u32], splits: usize) -> Result<RunningScore, StatisticsError> {
    let score = RunningScore::new(labels.len(), inception::CLASSES, splits)?;
    Ok(match is_sorted_by_class(labels) {
        true => score.dealt(Sequence::new(0, Stream::Subset, 1).permutation(labels.len())),
        false => score,
    })
}

/// Too few samples make a figure unavailable; any other error ends the stage.
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

    /// Images of ten classes in folder order, classified with certainty.
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
        // In their order each part is one class.
        let mut plain = RunningScore::new(labels.len(), inception::CLASSES, 10).unwrap();
        plain.add(&logits).unwrap();
        assert!(plain.finish().unwrap().mean < 1.1);
    }
}
