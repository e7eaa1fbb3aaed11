//! `evaluate`: how close sets of samples come to real images.
//!
//! Images are compared in the features of a network: of a classifier trained on the data, or of the Inception network
//! with which published figures are made. Figures: the Frechet distance (Heusel et al. 2017, arXiv 1706.08500: FID with
//! Inception), improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991); with a classifier, the share
//! of samples that it gives their class; with Inception, its score (Salimans et al. 2016, arXiv 1606.03498) and the
//! Frechet distance of its spatial features (Nash et al. 2021, arXiv 2103.03841: sFID).
//!
//! Out: `evaluation.json`, `grid.png`, and on request `statistics.npz` of the real images (mu, sigma; mu_s, sigma_s of
//! the spatial features), as pytorch-fid and ADM's evaluation suite write them and as this stage reads them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use retort_abi::{ArtifactMeta, Cancel, LogLevel, StageResult, Table};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::arrays::Arrays;
use crate::backend::Backend;
use crate::data::{Data, Images};
use crate::error::{Error, Result};
use crate::model::inception::{self, Inception, Preparation};
use crate::numpy;
use crate::picture::{self, Pixels};
use crate::stage::classifier::{self, Net};
use crate::stage::sample::{SampleFile, by_class};
use crate::stage::{Context, Stage, resolve, write_json};
use crate::statistics::{
    Moments, RunningMoments, RunningScore, class_agreement, frechet_distance, precision_recall,
};
use crate::tape::Var;
use crate::weights::{Loader, Source, Stored};

/// Options of `evaluate`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The sample sets: a name for the table, then the stage that sampled it. None, to save statistics only.
    #[serde(default)]
    #[schemars(extend("additionalProperties" = { "type": "string", "x-retort-artifact": ["samples"] }))]
    pub samples: BTreeMap<String, String>,
    /// The real images. May be left out when `statistics` stand for them.
    #[serde(default)]
    pub data: Option<Data>,
    /// Statistics of the real images, for the Frechet distances: a `.npz` or torch file with `mu` and `sigma` (or `m` and
    /// `s`), and `mu_s` and `sigma_s` for the spatial features. Precision and recall need `data`.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "file"))]
    pub statistics: Option<String>,
    /// The stage that trained the classifier; without it and without `inception` one is trained here.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["classifier"]))]
    pub classifier: Option<String>,
    /// Weights of the Inception network, `pt_inception-2015-12-05-*.pth`: published figures are made with it.
    #[serde(default)]
    #[schemars(extend("x-retort-file" = "file"))]
    pub inception: Option<String>,
    /// Inception features to compare: 2048 for published figures; 64, 192 or 768, of earlier layers, for fewer samples
    /// than features.
    #[serde(default = "dims")]
    #[schemars(extend("enum" = [64, 192, 768, 2048]))]
    pub dims: usize,
    /// How images are brought to Inception: as pytorch-fid does it, or as ADM's evaluation suite, for figures beside its
    /// own. Statistics must have been made in the same way.
    #[serde(default)]
    pub preparation: Preparation,
    /// Consecutive parts of a set over which the inception score is averaged.
    #[serde(default = "splits")]
    #[schemars(range(min = 1))]
    pub splits: usize,
    /// The set whose Frechet distance the others are divided by; the one named `teacher`, if left out.
    #[serde(default)]
    pub reference: Option<String>,
    /// Neighbours that span the manifolds of precision and recall; 0 leaves these two out. They take time and memory
    /// that grow with the product of the numbers of samples and of real images.
    #[serde(default = "neighbours")]
    pub neighbours: usize,
    /// Images that the network sees at a time.
    #[serde(default = "batch")]
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Whether the statistics of the real images are written as `statistics.npz`.
    #[serde(default)]
    pub save_statistics: bool,
    /// Images per class of each set in `grid.png`.
    #[serde(default = "columns")]
    #[schemars(range(min = 1))]
    pub grid_columns: usize,
}

fn dims() -> usize {
    2048
}
fn splits() -> usize {
    10
}
fn neighbours() -> usize {
    3
}
fn batch() -> usize {
    64
}
fn columns() -> usize {
    8
}

/// The stage.
pub struct Evaluate;

impl<B: Backend> Stage<B> for Evaluate {
    type Options = Options;
    const KIND: &'static str = "evaluate";
    const OUTPUT: &'static str = "evaluation";
    const REVISION: u32 = 2;
    const SUMMARY: &'static str = "measure sample sets against real images";

    fn check(o: &Options, _: &Path) -> Result<()> {
        if let Some(data) = &o.data {
            data.check_fixed()
                .map_err(|e| Error::option("/data", e.to_string()))?;
        } else if o.statistics.is_none() {
            let message = "nothing to measure against: give `data`, or `statistics`";
            return Err(Error::option("/data", message));
        } else if o.save_statistics {
            let message = "no real images whose statistics could be saved: give `data`";
            return Err(Error::option("/save_statistics", message));
        } else if o.inception.is_none() && o.classifier.is_none() {
            let message =
                "no images to train a classifier with: give `data`, `classifier` or `inception`";
            return Err(Error::option("/data", message));
        }
        if o.samples.is_empty() && !o.save_statistics {
            return Err(Error::option(
                "/samples",
                "no sample set to measure; expected `name: stage` lines",
            ));
        }
        if o.inception.is_some() && o.classifier.is_some() {
            let message = "two networks to measure with: give `classifier` or `inception`";
            return Err(Error::option("/inception", message));
        }
        if !inception::FEATURES.contains(&o.dims) {
            let message = format!("dims {}: expected 64, 192, 768 or 2048", o.dims);
            return Err(Error::option("/dims", message));
        }
        match &o.reference {
            Some(name) if !o.samples.contains_key(name) => {
                let known: Vec<&str> = o.samples.keys().map(String::as_str).collect();
                Err(Error::option(
                    "/reference",
                    format!("no set {name}; expected one of {}", known.join(", ")),
                ))
            }
            _ => Ok(()),
        }
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        // Figures are compared with other people's: they never depend on `dtype`.
        let context = &Context {
            backend: &context.backend.exact(),
            ..*context
        };
        let images = match &o.data {
            Some(data) => Some(Arc::new(context.images(data)?)),
            None => None,
        };
        let network = Network::open(context, o, images.as_ref())?;
        let mut sets = Vec::new();
        for (name, stage) in &o.samples {
            let file = SampleFile::open(context.input_dir(stage)?)?;
            network.accepts(file.image).map_err(|message| {
                Error::option(format!("/samples/{name}"), format!("{stage}: {message}"))
            })?;
            sets.push((name, file));
        }
        let mut meter = Meter {
            context,
            options: o,
            network: &network,
            done: 0,
            total: (images.as_ref().map_or(0, |i| i.labels.len())
                + sets
                    .iter()
                    .map(|(_, file)| file.labels.len())
                    .sum::<usize>()) as u64,
        };

        let real = match &images {
            // Given statistics leave only the neighbours to be measured.
            Some(images) if o.statistics.is_none() || o.neighbours > 0 || o.save_statistics => {
                let read = &mut |first: usize, n: usize| {
                    let picks: Vec<usize> = (first..first + n).collect();
                    Ok(images.gather(&picks)?.0)
                };
                let of = (images.len(), images.shape());
                Some(meter.measure("real images", of, None, read)?)
            }
            _ => None,
        };
        let given = match &o.statistics {
            Some(file) => Some(statistics(&resolve(&context.job.base_dir, file), &network)?),
            None => None,
        };
        let (moments, spatial) = match (&given, &real) {
            (Some((moments, spatial)), _) => (moments, spatial.as_ref()),
            (None, Some(real)) => (&real.moments, real.spatial.as_ref()),
            (None, None) => return Err(Error::Internal("no reference".into())),
        };
        if given.is_some() && spatial.is_none() && matches!(network, Network::Inception { .. }) {
            context.host.log(
                LogLevel::Warn,
                "the statistics hold no mu_s and sigma_s: no spatial Frechet distance",
            );
        }

        let mut rows = Vec::new();
        let mut tiles = Vec::new();
        for (name, file) in &sets {
            let (count, image) = (file.labels.len(), file.image);
            let read = &mut |first: usize, n: usize| {
                let pixels = file.read(first, n)?;
                Ok(pixels.iter().map(|x| 2.0 * x - 1.0).collect())
            };
            let set = meter.measure(name, (count, image), Some(&file.labels), read)?;
            let mut figures = vec![Figure::new(
                "frechet_distance",
                "Frechet distance",
                3,
                frechet_distance(moments, &set.moments)?,
            )];
            if let (Some(real), Some(own)) = (spatial, &set.spatial) {
                let distance = frechet_distance(real, own)?;
                figures.push(Figure::new(
                    "spatial_frechet_distance",
                    "spatial",
                    3,
                    distance,
                ));
            }
            if let Some(score) = set.score {
                figures.push(Figure::new(
                    "inception_score",
                    "inception score",
                    3,
                    score.mean,
                ));
                figures.push(Figure::new(
                    "inception_score_deviation",
                    "+-",
                    3,
                    score.deviation,
                ));
            }
            if let Some(agreement) = set.agreement {
                figures.push(Figure::new(
                    "class_agreement",
                    "class agreement",
                    4,
                    agreement,
                ));
            }
            if let (Some(real), true) = (&real, o.neighbours > 0) {
                let dim = set.moments.dim();
                let both = precision_recall(&real.features, &set.features, dim, o.neighbours)?;
                figures.push(Figure::new("precision", "precision", 4, both.precision));
                figures.push(Figure::new("recall", "recall", 4, both.recall));
            }
            let (picks, height) = by_class(&file.labels, o.grid_columns);
            let mut pixels = Vec::new();
            for pick in picks {
                pixels.extend(file.read(pick, 1)?);
            }
            tiles.push((pixels, height, image));
            rows.push(Row {
                name: (*name).clone(),
                count,
                figures,
            });
        }

        let reference = o.reference.as_deref().unwrap_or("teacher");
        relate(&mut rows, reference);
        for row in &rows {
            for figure in &row.figures {
                let name = format!("{}/{}", row.name, figure.key);
                context.host.metric(&name, 0, figure.value);
            }
        }
        let summary: Map<String, Value> = rows
            .iter()
            .map(|row| {
                let mut figures = Map::from_iter([("samples".to_owned(), json!(row.count))]);
                figures.extend(
                    row.figures
                        .iter()
                        .map(|f| (f.key.to_owned(), json!(f.value))),
                );
                (row.name.clone(), figures.into())
            })
            .collect();
        // A picture of sets of one size, each with as many classes.
        let first = tiles.first().map(|t| (t.1, t.2));
        let alike: Vec<usize> = (0..tiles.len())
            .filter(|&i| Some((tiles[i].1, tiles[i].2)) == first)
            .collect();
        let names: Vec<&str> = alike.iter().map(|&i| rows[i].name.as_str()).collect();
        let mut meta = ArtifactMeta::default();
        if !rows.is_empty() {
            meta.table = Some(table(&rows, reference));
            meta.preview = Some("grid.png".into());
            meta.caption = Some(format!("from the left: {}", names.join(", ")));
        }
        context.finish("evaluation", meta, summary.clone().into(), |dir| {
            write_json(
                &dir.join("evaluation.json"),
                &json!({ "network": network.describe(), "sets": summary, "grid_columns": names }),
            )?;
            if let (true, Some(real)) = (o.save_statistics, &real) {
                save(&dir.join("statistics.npz"), real)?;
            }
            let Some((height, [c, h, w])) = first else {
                return Ok(());
            };
            let sets = alike.iter().map(|&i| Pixels::new(&tiles[i].0, c, h, w));
            let sets = sets.collect::<Result<Vec<_>, _>>()?;
            Ok(picture::write_grid(&dir.join("grid.png"), &sets, height)?)
        })
    }
}

/// The network in whose features images are compared.
enum Network<B: Backend> {
    /// A classifier of the data.
    Classifier(Net<B>),
    /// Inception, and which of its features are compared.
    Inception {
        network: Box<Inception<B>>,
        depth: usize,
        preparation: Preparation,
    },
}

/// What a network says of some images, on the host.
struct Seen {
    features: Vec<f32>,
    /// Spatial features and logits: of Inception.
    spatial: Vec<f32>,
    logits: Vec<f32>,
    /// Most probable classes: of a classifier.
    classes: Vec<u32>,
}

impl<B: Backend> Network<B> {
    fn open(context: &Context<'_, B>, o: &Options, images: Option<&Arc<Images>>) -> Result<Self> {
        let backend = context.backend;
        let network = match (&o.inception, &o.classifier, images) {
            (Some(file), _, _) => {
                let path = resolve(&context.job.base_dir, file);
                let weights = Stored::open(&path, None)?;
                let origin = path.display().to_string();
                let mut loader = Loader::new(
                    backend,
                    Source::Files(std::slice::from_ref(&weights)),
                    false,
                    origin,
                );
                let depth = inception::FEATURES.iter().position(|&d| d == o.dims);
                Self::Inception {
                    network: Box::new(Inception::load(&mut loader)?),
                    depth: depth.unwrap_or(inception::FEATURES.len() - 1),
                    preparation: o.preparation,
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
                let source = Source::Host(&weights);
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
    fn accepts(&self, image: [usize; 3]) -> Result<(), String> {
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
    fn dim(&self) -> usize {
        match self {
            Self::Classifier(net) => net.config.features,
            Self::Inception { depth, .. } => inception::FEATURES[*depth],
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Classifier(_) => "classifier".into(),
            Self::Inception { .. } => format!("inception-2015-12-05, {} features", self.dim()),
        }
    }

    /// Looks at images (n, c, h, w) in [-1, 1].
    fn look(&self, backend: &B, images: &[f32], [c, h, w]: [usize; 3]) -> Result<Seen> {
        match self {
            Self::Classifier(net) => {
                let (features, classes) = net.measure(backend, images)?;
                Ok(Seen {
                    features,
                    classes,
                    spatial: Vec::new(),
                    logits: Vec::new(),
                })
            }
            Self::Inception {
                network,
                depth,
                preparation,
            } => {
                // Published figures are taken from image files: of 256 values a pixel can have.
                let bytes: Vec<f32> = images
                    .iter()
                    .map(|x| ((x * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round() / 255.0)
                    .collect();
                let x = backend.floats(&bytes, &[images.len() / (c * h * w), c, h, w])?;
                let outputs = network.look(&Var::constant(x), *preparation)?;
                Ok(Seen {
                    features: B::to_floats(outputs.features[*depth].value())?,
                    spatial: B::to_floats(outputs.spatial.value())?,
                    logits: B::to_floats(outputs.logits.value())?,
                    classes: Vec::new(),
                })
            }
        }
    }
}

/// What is known of a set of images.
struct Measured {
    moments: Moments,
    spatial: Option<Moments>,
    score: Option<crate::statistics::InceptionScore>,
    agreement: Option<f64>,
    /// Features (n, d); none unless neighbours are searched among them.
    features: Vec<f32>,
}

/// Measures one set after the other.
struct Meter<'a, 'b, B: Backend> {
    context: &'a Context<'b, B>,
    options: &'a Options,
    network: &'a Network<B>,
    done: u64,
    total: u64,
}

impl<B: Backend> Meter<'_, '_, B> {
    /// Measures `count` images, which `read` gives from an index on, in [-1, 1], with their classes if they were asked
    /// for.
    fn measure(
        &mut self,
        name: &str,
        (count, image): (usize, [usize; 3]),
        labels: Option<&[u32]>,
        read: &mut dyn FnMut(usize, usize) -> Result<Vec<f32>>,
    ) -> Result<Measured> {
        let (o, dim, host) = (self.options, self.network.dim(), self.context.host);
        let mut moments = RunningMoments::new(dim);
        let (mut spatial, mut score) = (None, None);
        if let Network::Inception { .. } = self.network {
            spatial = Some(RunningMoments::new(inception::SPATIAL_FEATURES));
            if labels.is_some() {
                score = Some(RunningScore::new(count, inception::CLASSES, o.splits)?);
            }
        }
        if count <= dim {
            let message = format!(
                "{name}: {count} images for {dim} features: the Frechet distance is far too great with so few"
            );
            host.log(LogLevel::Warn, &message);
        }
        let keep = o.neighbours > 0 && o.data.is_some();
        let (mut features, mut classes) = (Vec::new(), Vec::new());
        for first in (0..count).step_by(o.batch) {
            if host.cancelled() != Cancel::Run {
                return Err(Error::Cancelled);
            }
            let n = o.batch.min(count - first);
            let pixels = read(first, n)?;
            if let Some(at) = pixels.iter().position(|x| !x.is_finite()) {
                let index = first + at / (pixels.len() / n);
                let message = format!("{name}: image {index} holds a pixel that is not finite");
                return Err(Error::Numerical(message));
            }
            let seen = self.network.look(self.context.backend, &pixels, image)?;
            moments.add(&seen.features)?;
            if let Some(spatial) = &mut spatial {
                spatial.add(&seen.spatial)?;
            }
            if let Some(score) = &mut score {
                score.add(&seen.logits)?;
            }
            classes.extend(seen.classes);
            if keep {
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
            moments: moments.finish()?,
            spatial: spatial.map(RunningMoments::finish).transpose()?,
            score: score.map(RunningScore::finish).transpose()?,
            agreement,
            features,
        })
    }
}

/// Reads moments of the network's features, and of its spatial features where they are given.
fn statistics<B: Backend>(path: &Path, network: &Network<B>) -> Result<(Moments, Option<Moments>)> {
    let arrays = Arrays::open(path)?;
    let moments = |mean: &str, covariance: &str, dim: usize| {
        let found = arrays.read(mean, &[dim])?;
        let found = found.zip(arrays.read(covariance, &[dim, dim])?);
        let moments = found.map(|(mean, covariance)| Moments::new(mean, covariance));
        moments.transpose().map_err(|e| Error::data(path, e))
    };
    let own = match moments("mu", "sigma", network.dim())? {
        None => moments("m", "s", network.dim())?,
        found => found,
    };
    let own =
        own.ok_or_else(|| Error::data(path, "no arrays `mu` and `sigma`, nor `m` and `s`"))?;
    let spatial = match network {
        Network::Inception { .. } => moments("mu_s", "sigma_s", inception::SPATIAL_FEATURES)?,
        Network::Classifier(_) => None,
    };
    Ok((own, spatial))
}

/// Writes moments as [`statistics`] reads them.
fn save(path: &Path, real: &Measured) -> Result<()> {
    let dim = real.moments.dim();
    let shapes = [[dim], [inception::SPATIAL_FEATURES]];
    let squares = shapes.map(|[d]| [d, d]);
    let mut arrays = vec![
        ("mu", &shapes[0][..], &real.moments.mean[..]),
        ("sigma", &squares[0][..], &real.moments.covariance[..]),
    ];
    if let Some(spatial) = &real.spatial {
        arrays.push(("mu_s", &shapes[1][..], &spatial.mean[..]));
        arrays.push(("sigma_s", &squares[1][..], &spatial.covariance[..]));
    }
    numpy::write_archive(path, &arrays)
}

/// A figure of a set.
struct Figure {
    /// Name in metrics and files.
    key: &'static str,
    /// Head of its column.
    title: &'static str,
    /// Digits shown behind the point.
    digits: i32,
    value: f64,
}

impl Figure {
    fn new(key: &'static str, title: &'static str, digits: i32, value: f64) -> Self {
        Self {
            key,
            title,
            digits,
            value,
        }
    }
}

/// The figures of a set, the Frechet distance first.
struct Row {
    name: String,
    count: usize,
    figures: Vec<Figure>,
}

/// Adds the ratio of each Frechet distance to that of the set `reference`, if there is such a set.
fn relate(rows: &mut [Row], reference: &str) {
    let base = rows.iter().find(|row| row.name == reference);
    if let Some(base) = base.map(|row| row.figures[0].value) {
        for row in rows {
            let ratio = row.figures[0].value / base;
            row.figures
                .insert(1, Figure::new("frechet_ratio", RATIO, 2, ratio));
        }
    }
}

/// Head of the column of ratios; the table names the set.
const RATIO: &str = "x";

fn table(rows: &[Row], reference: &str) -> Table {
    let round = |x: f64, digits: i32| json!((x * 10f64.powi(digits)).round() / 10f64.powi(digits));
    let head = |figure: &Figure| match figure.title {
        RATIO => format!("x {reference}"),
        title => title.to_owned(),
    };
    let figures = rows[0].figures.iter().map(head);
    Table {
        title: "samples against real images".into(),
        columns: ["set", "samples"]
            .map(str::to_owned)
            .into_iter()
            .chain(figures)
            .collect(),
        rows: rows
            .iter()
            .map(|row| {
                let figures = row.figures.iter().map(|f| round(f.value, f.digits));
                [json!(row.name), json!(row.count)]
                    .into_iter()
                    .chain(figures)
                    .collect()
            })
            .collect(),
    }
}
