//! `evaluate`: how close sets of samples come to real images.
//!
//! Images are compared in the features of a network: of a classifier trained on the data, or of the Inception network
//! with which published figures are made. Figures: the Frechet distance (Heusel et al. 2017, arXiv 1706.08500: FID with
//! Inception), improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991); with a classifier, the share
//! of samples that it gives their class; with Inception, its score (Salimans et al. 2016, arXiv 1606.03498) and the
//! Frechet distance of its spatial features (Nash et al. 2021, arXiv 2103.03841: sFID).
//!
//! For few samples: the kernel distance (Binkowski et al. 2018, arXiv 1801.01401: KID). For sets made from the same noise:
//! LPIPS between their images.
//!
//! Real images and samples are read a batch at a time; of all images at most their features are kept, as f32.
//!
//! Out: `evaluation.json`, `grid.png`, and on request `statistics.npz` of the real images (mu, sigma; mu_s, sigma_s of
//! the spatial features), as pytorch-fid and ADM's evaluation suite write them and as this stage reads them.

pub mod figure;
pub mod measure;
pub mod reference;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use retort_abi::{ArtifactMeta, Cancel, LogLevel, StageResult};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::backend::Backend;
use crate::bundle::Bundle;
use crate::context::Context;
use crate::data::{Data, Images};
use crate::error::{Error, Result};
use crate::files::{resolve, write_json};
use crate::model::Tokenizer;
use crate::model::inception::{self, Preparation};
use crate::model::lpips::{self, Lpips};
use crate::picture::{self, Pixels};
use crate::random::{Sequence, Stream};
use crate::samples::{Samples, by_class};
use crate::stage::Stage;
use crate::stage::tokenizer::batch as batch_of;
use crate::statistics::frechet_distance;
use crate::statistics::kernel::kernel_distance;
use crate::statistics::neighbours::precision_recall;
use crate::tape::Variable;
use crate::weights::{Loader, Stored};
use figure::{Figure, Row, relate, table};
use measure::{Had, Measured, Meter, Network, Source, had};
use reference::{Given, of_archive, save, statistics};

/// Options of `evaluate`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The sample sets: a name for the table, then the stage that sampled it. None, to save statistics only.
    #[serde(default)]
    #[schemars(extend("additionalProperties" = { "type": "string", "x-retort-artifact": ["samples"] }))]
    pub samples: BTreeMap<String, String>,
    /// Tokenizers whose reconstructions of the images of `data` are measured like sets of samples: what no sampler of their
    /// tokens can better. A name for the table, then the stage that made the tokenizer.
    #[serde(default)]
    #[schemars(extend("additionalProperties" = { "type": "string", "x-retort-artifact": ["tokenizer"] }))]
    pub tokenizers: BTreeMap<String, String>,
    /// The real images. May be left out when `real` or `statistics` stand for them.
    #[serde(default)]
    pub data: Option<Data>,
    /// A set of samples in the place of real images.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["samples"]))]
    pub real: Option<String>,
    /// Statistics of the real images, for the Frechet distances: a `.npz` or torch file with `mu` and `sigma` (or `m` and `s`), and
    /// `mu_s` and `sigma_s` for the spatial features. A `.npz` may hold images too, `arr_0`, uint8 (n, height, width, 3), as
    /// ADM's reference files do: with them alone, or beside the statistics, it stands for `data`.
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
    /// own; or a list, for the figures of both in one table. Statistics must have been made in the same way.
    #[serde(default)]
    pub preparation: Preparations,
    /// Consecutive parts of a set over which the inception score is averaged.
    #[serde(default = "splits")]
    #[schemars(range(min = 1))]
    pub splits: usize,
    /// The set whose Frechet distance the others are divided by; the one named `teacher`, if left out.
    #[serde(default)]
    pub reference: Option<String>,
    /// Neighbours that span the manifolds of precision and recall; 0 leaves these two out. They take time that grows with
    /// the product of the numbers of samples and of real images, and need images and not statistics alone.
    #[serde(default = "neighbours")]
    pub neighbours: usize,
    /// Also measures the kernel distance, which serves where samples are few. It needs images and not statistics alone.
    #[serde(default)]
    pub kernel: Option<KernelOptions>,
    /// Also measures how far the images of each set are from those of another one made from the same noise.
    #[serde(default)]
    pub lpips: Option<LpipsOptions>,
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

/// How the kernel distance is taken.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KernelOptions {
    /// Pairs of subsets over which it is averaged.
    #[schemars(range(min = 1))]
    pub subsets: usize,
    /// Samples of a subset; all, where a set has fewer.
    #[schemars(range(min = 2))]
    pub size: usize,
}

impl Default for KernelOptions {
    fn default() -> Self {
        Self {
            subsets: 100,
            size: 1000,
        }
    }
}

/// LPIPS on VGG-16 between two sets.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LpipsOptions {
    /// Weights of VGG-16 under torchvision's names: `vgg16-*.pth`.
    #[schemars(extend("x-retort-file" = "file"))]
    pub vgg: String,
    /// Weights of its linear layers: `vgg.pth` of the published implementation.
    #[schemars(extend("x-retort-file" = "file"))]
    pub linear: String,
    /// The set that the others are compared with, as `samples` names it.
    pub beside: String,
}

/// One preparation, or several.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Preparations {
    /// One.
    One(Preparation),
    /// Several, each with rows of its own in the table.
    Several(Vec<Preparation>),
}

impl Default for Preparations {
    fn default() -> Self {
        Self::One(Preparation::default())
    }
}

impl Preparations {
    fn all(&self) -> &[Preparation] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        }
    }
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
    const REVISION: u32 = 3;
    const SUMMARY: &'static str = "measure sample sets against real images";

    fn check(o: &Options, _: &Path) -> Result<()> {
        if let Some(data) = &o.data {
            data.check_fixed()
                .map_err(|e| Error::option("/data", e.to_string()))?;
            if o.real.is_some() {
                let message =
                    "`data` and `real` exclude each other: both stand for the real images";
                return Err(Error::option("/real", message));
            }
        } else if o.real.is_none() && o.statistics.is_none() {
            let message = "nothing to measure against: give `data`, `real` or `statistics`";
            return Err(Error::option("/data", message));
        } else if o.real.is_none() && o.save_statistics {
            let message = "no real images whose statistics could be saved: give `data` or `real`";
            return Err(Error::option("/save_statistics", message));
        } else if o.inception.is_none() && o.classifier.is_none() {
            let message =
                "no images to train a classifier with: give `data`, `classifier` or `inception`";
            return Err(Error::option("/data", message));
        }
        let preparations = o.preparation.all();
        if preparations.is_empty()
            || (1..preparations.len()).any(|i| preparations[..i].contains(&preparations[i]))
        {
            let message = "expected one preparation, or different ones";
            return Err(Error::option("/preparation", message));
        }
        if preparations.len() > 1 && (o.statistics.is_some() || o.save_statistics) {
            let message = "statistics are those of one preparation: name it, and leave the others to another stage";
            return Err(Error::option("/preparation", message));
        }
        if preparations.len() > 1 && o.inception.is_none() {
            let message = "a preparation is one of `inception`: give that, or no preparation";
            return Err(Error::option("/preparation", message));
        }
        let named = [
            ("/lpips/beside", o.lpips.as_ref().map(|lpips| &lpips.beside)),
            ("/reference", o.reference.as_ref()),
        ];
        for (pointer, name) in named {
            if let Some(name) = name
                && !o.samples.contains_key(name)
            {
                let known: Vec<&str> = o.samples.keys().map(String::as_str).collect();
                let message = format!("no set {name}; expected one of {}", known.join(", "));
                return Err(Error::option(pointer, message));
            }
        }
        if o.samples.is_empty() && o.tokenizers.is_empty() && !o.save_statistics {
            return Err(Error::option(
                "/samples",
                "no sample set to measure; expected `name: stage` lines",
            ));
        }
        if !o.tokenizers.is_empty() && o.data.is_none() {
            let message = "a tokenizer reconstructs images: give them as `data`";
            return Err(Error::option("/tokenizers", message));
        }
        if let Some(name) = o
            .tokenizers
            .keys()
            .find(|name| o.samples.contains_key(*name))
        {
            let message = format!("{name} is a set of samples already: give it another name");
            return Err(Error::option("/tokenizers", message));
        }
        if o.inception.is_some() && o.classifier.is_some() {
            let message = "two networks to measure with: give `classifier` or `inception`";
            return Err(Error::option("/inception", message));
        }
        if !inception::FEATURES.contains(&o.dims) {
            let message = format!("dims {}: expected 64, 192, 768 or 2048", o.dims);
            return Err(Error::option("/dims", message));
        }
        Ok(())
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        // Figures are compared with other people's: they never depend on `dtype`.
        let context = &Context {
            backend: &context.backend.exact(),
            ..*context
        };
        let inputs = Inputs::open(context, o)?;
        let (rows, measured) = inputs.measure(context, o)?;
        for row in &rows {
            for figure in &row.figures {
                let name = format!("{}/{}", row.name, figure.key);
                match &figure.value {
                    Ok(value) => context.host.metric(&name, 0, *value),
                    Err(reason) => context.host.log(
                        LogLevel::Warn,
                        &format!("{name} is not available: {reason}"),
                    ),
                }
            }
        }
        inputs.publish(context, o, &rows, measured.as_ref())
    }
}

/// What is compared, and with what.
struct Inputs<'o, B: Backend> {
    data: Option<Arc<Images>>,
    network: Network<B>,
    sets: Vec<(&'o str, Samples)>,
    /// The file of statistics, and what it holds.
    given: Option<(PathBuf, Given)>,
}

impl<'o, B: Backend> Inputs<'o, B> {
    fn open(context: &Context<'_, B>, o: &'o Options) -> Result<Self> {
        let data = match &o.data {
            Some(data) => Some(Arc::new(context.images(data)?)),
            None => None,
        };
        let network = Network::open(context, o, data.as_ref())?;
        let mut sets = Vec::new();
        for (name, stage) in &o.samples {
            let set = open_set(context, &network, stage, &format!("/samples/{name}"))?;
            sets.push((name.as_str(), set));
        }
        let given = match &o.statistics {
            Some(file) => {
                let path = resolve(&context.job.base_dir, file);
                let given = statistics(&path, &network)?;
                if given.moments.is_none() && given.images.is_none() {
                    let message =
                        "no arrays `mu` and `sigma`, nor `m` and `s`, and no images `arr_0`";
                    return Err(Error::data(&path, message));
                }
                Some((path, given))
            }
            None => None,
        };
        Ok(Self {
            data,
            network,
            sets,
            given,
        })
    }

    fn real(&self, context: &Context<'_, B>, o: &Options) -> Result<Real<'_>> {
        if let Some(images) = &self.data {
            return Ok(Real::Data(images));
        }
        if let Some(stage) = &o.real {
            let set = open_set(context, &self.network, stage, "/real")?;
            return Ok(Real::Samples(Box::new(set)));
        }
        if let Some((path, given)) = &self.given
            && let Some(images) = given.images
        {
            self.network
                .accepts(images.1)
                .map_err(|message| Error::data(path, message))?;
            return Ok(Real::Archive(path, images));
        }
        Ok(Real::None)
    }

    /// What sets are measured against, given what was measured of the real images.
    fn against<'a>(&'a self, measured: Option<&'a Measured>) -> Result<Against<'a>> {
        let given = self.given.as_ref().map(|(_, given)| given);
        let moments = given.and_then(|given| given.moments.as_ref());
        let spatial = given.and_then(|given| given.spatial.as_ref());
        Ok(Against {
            moments: match (moments, measured) {
                (Some(moments), _) => Ok(moments),
                (None, Some(real)) => real.moments.as_ref().map_err(of_real),
                (None, None) => return Err(Error::Internal("no reference".into())),
            },
            spatial: match (spatial, measured) {
                (Some(own), _) => Ok(own),
                // Statistics that were given beside images are those of more images.
                (None, Some(real)) if moments.is_none() => match &real.spatial {
                    Some(own) => own.as_ref().map_err(of_real),
                    None => Err("the network has no spatial features".to_owned()),
                },
                _ => Err("the statistics hold no mu_s and sigma_s".to_owned()),
            },
            images: measured,
        })
    }

    /// The rows of the table, and what was measured of the real images last, if they were looked at.
    fn measure(
        &self,
        context: &Context<'_, B>,
        o: &Options,
    ) -> Result<(Vec<Row>, Option<Measured>)> {
        let (real, sets) = (self.real(context, o)?, &self.sets);
        let is_given = matches!(&self.given, Some((_, given)) if given.moments.is_some());
        let compares = o.neighbours > 0 || o.kernel.is_some();
        // Given statistics leave only comparisons of single images.
        let looks = real.count() > 0 && (!is_given || compares || o.save_statistics);
        let preparations = o.preparation.all();
        let mut images = sets.iter().map(|(_, set)| set.len()).sum::<usize>();
        images += real.count() * (usize::from(looks) + o.tokenizers.len());
        let mut meter = Meter {
            context,
            network: &self.network,
            batch: o.batch,
            splits: o.splits,
            keep: compares && real.count() > 0,
            done: 0,
            total: (images * preparations.len()) as u64,
        };
        let lpips = lpips_distances(context, o, sets)?;
        let mut rows = Vec::new();
        let mut last = None;
        for &preparation in preparations {
            let label = |name: &str| match preparations.len() {
                1 => name.to_owned(),
                _ => format!("{name}/{}", preparation.name()),
            };
            let measured = match looks {
                true => Some(meter.measure(real.source()?, preparation)?),
                false => None,
            };
            let against = self.against(measured.as_ref())?;
            let mut own = Vec::new();
            let mut add = |name: &str, count, passes, seen: &Measured, lpips: Option<Had<f64>>| {
                let mut figures = figures(context, o, &against, seen)?;
                figures.extend(lpips.map(|value| Figure::new("lpips", "LPIPS", 4, value)));
                own.push(Row {
                    name: label(name),
                    count,
                    passes,
                    figures,
                });
                Ok::<_, Error>(())
            };
            for (number, (name, set)) in sets.iter().enumerate() {
                let seen = meter.measure(samples_source(name, set), preparation)?;
                let lpips = lpips.get(number).cloned();
                add(name, set.len(), set.manifest.passes, &seen, lpips)?;
            }
            for (name, stage) in &o.tokenizers {
                let images = self
                    .data
                    .as_deref()
                    .ok_or_else(|| Error::Internal("no images".into()))?;
                let bundle = Bundle::open(context.input_dir(stage)?)?;
                let tokenizer = bundle.tokenizer(context.backend)?;
                let source = reconstructions(context.backend, &*tokenizer, images, name);
                let seen = meter.measure(source, preparation)?;
                let lpips = o.lpips.as_ref();
                let lpips = lpips.map(|_| Err("reconstructions have no noise".to_owned()));
                add(name, images.len(), None, &seen, lpips)?;
            }
            relate(&mut own, &label(o.reference()));
            rows.extend(own);
            last = measured;
        }
        Ok((rows, last))
    }

    /// Writes the artifact: the figures, a picture of the sets, and the statistics of the real images where they are wanted.
    fn publish(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        rows: &[Row],
        measured: Option<&Measured>,
    ) -> Result<StageResult> {
        let summary: Map<String, Value> = rows
            .iter()
            .map(|row| (row.name.clone(), row.summary()))
            .collect();
        // A picture of sets of one size, each with as many classes.
        let mut tiles = Vec::new();
        for (name, set) in &self.sets {
            let (picks, height) = by_class(&set.labels, o.grid_columns);
            let mut pixels = Vec::new();
            for pick in picks {
                pixels.extend(set.images(pick, 1)?);
            }
            tiles.push((*name, pixels, (height, set.manifest.image)));
        }
        let first = tiles.first().map(|tile| tile.2);
        tiles.retain(|tile| Some(tile.2) == first);
        let names: Vec<&str> = tiles.iter().map(|tile| tile.0).collect();
        let pipeline = self.network.pipeline(o.preparation.all());
        let mut meta = ArtifactMeta::default();
        if !rows.is_empty() {
            let title = match &pipeline {
                Some(pipeline) => format!("samples against real images; {pipeline}"),
                None => "samples against real images".to_owned(),
            };
            meta.table = Some(table(title, rows, o.reference()));
            meta.preview = Some("grid.png".into());
            meta.caption = Some(format!("from the left: {}", names.join(", ")));
        }
        let mut report = json!({
            "network": self.network.describe(),
            "sets": summary,
            "grid_columns": names,
        });
        if let Some(pipeline) = &pipeline {
            report["pipeline"] = json!(pipeline);
        }
        if let Some(kernel) = &o.kernel {
            report["kernel"] = json!({ "subsets": kernel.subsets, "size": kernel.size });
        }
        context.finish("evaluation", meta, summary.clone().into(), |dir| {
            write_json(&dir.join("evaluation.json"), &report)?;
            if let (true, Some(real)) = (o.save_statistics, measured) {
                save(&dir.join("statistics.npz"), real)?;
            }
            let Some((height, [c, h, w])) = first else {
                return Ok(());
            };
            let sets = tiles.iter().map(|tile| Pixels::new(&tile.1, c, h, w));
            let sets = sets.collect::<Result<Vec<_>, _>>()?;
            Ok(picture::write_grid(&dir.join("grid.png"), &sets, height)?)
        })
    }
}

impl Options {
    /// The set that the others are related to.
    fn reference(&self) -> &str {
        self.reference.as_deref().unwrap_or("teacher")
    }
}

fn of_real(reason: &String) -> String {
    format!("real images: {reason}")
}

/// Opens a set of samples whose images the network sees.
fn open_set<B: Backend>(
    context: &Context<'_, B>,
    network: &Network<B>,
    stage: &str,
    pointer: &str,
) -> Result<Samples> {
    let set = Samples::open(context.input_dir(stage)?)?;
    set.check_images()?;
    network
        .accepts(set.manifest.image)
        .map_err(|message| Error::option(pointer, format!("{stage}: {message}")))?;
    Ok(set)
}

/// The images that samples are measured against.
enum Real<'a> {
    Data(&'a Images),
    Samples(Box<Samples>),
    Archive(&'a Path, (usize, [usize; 3])),
    /// Statistics stand for them.
    None,
}

impl Real<'_> {
    fn count(&self) -> usize {
        match self {
            Self::Data(images) => images.len(),
            Self::Samples(set) => set.len(),
            Self::Archive(_, (count, _)) => *count,
            Self::None => 0,
        }
    }

    fn source(&self) -> Result<Source<'_>> {
        match self {
            Self::Data(images) => Ok(Source {
                name: "real images".into(),
                count: images.len(),
                image: images.shape(),
                labels: None,
                read: Box::new(|first, n| {
                    let picks: Vec<usize> = (first..first + n).collect();
                    Ok(images.gather(&picks)?.0)
                }),
            }),
            Self::Samples(set) => Ok(Source {
                labels: None,
                ..samples_source("real images", set)
            }),
            Self::Archive(path, images) => of_archive(path, *images),
            Self::None => Err(Error::Internal("no real images".into())),
        }
    }
}

fn samples_source<'a>(name: &str, set: &'a Samples) -> Source<'a> {
    Source {
        name: name.to_owned(),
        count: set.len(),
        image: set.manifest.image,
        labels: Some(&set.labels),
        read: Box::new(|first, n| {
            let mut pixels = set.images(first, n)?;
            pixels.iter_mut().for_each(|x| *x = 2.0 * *x - 1.0);
            Ok(pixels)
        }),
    }
}

/// What a tokenizer makes of images.
fn reconstructions<'a, B: Backend>(
    backend: &'a B,
    tokenizer: &'a dyn Tokenizer<B>,
    images: &'a Images,
    name: &str,
) -> Source<'a> {
    Source {
        name: name.to_owned(),
        count: images.len(),
        image: images.shape(),
        labels: Some(&images.labels),
        read: Box::new(move |first, n| {
            let picks: Vec<usize> = (first..first + n).collect();
            let made = tokenizer.reconstruct(&batch_of(backend, images, &picks)?)?;
            let mut pixels = B::to_floats(made.images.value())?;
            pixels.iter_mut().for_each(|x| *x = x.clamp(-1.0, 1.0));
            Ok(pixels)
        }),
    }
}

/// What a set is measured against.
struct Against<'a> {
    moments: Had<&'a crate::statistics::Moments>,
    spatial: Had<&'a crate::statistics::Moments>,
    /// The real images, where these were looked at.
    images: Option<&'a Measured>,
}

/// The figures of a set.
fn figures<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    real: &Against<'_>,
    set: &Measured,
) -> Result<Vec<Figure>> {
    let go_on = &mut || context.host.cancelled() == Cancel::Run;
    let distance = |real: &Had<&crate::statistics::Moments>,
                    own: &Had<crate::statistics::Moments>|
     -> Result<Had<f64>> {
        match (real, own) {
            (Ok(real), Ok(own)) => Ok(Ok(frechet_distance(real, own)?)),
            (Err(reason), _) | (_, Err(reason)) => Ok(Err(reason.clone())),
        }
    };
    let value = distance(&real.moments, &set.moments)?;
    let mut figures = vec![Figure::new(
        "frechet_distance",
        "Frechet distance",
        3,
        value,
    )];
    let mut add = |key, title, digits, value| figures.push(Figure::new(key, title, digits, value));
    if let Some(own) = &set.spatial {
        let value = distance(&real.spatial, own)?;
        add("spatial_frechet_distance", "spatial", 3, value);
    }
    if let Some(score) = &set.score {
        let of = |figure: fn(&crate::statistics::InceptionScore) -> f64| match score {
            Ok(score) => Ok(figure(score)),
            Err(reason) => Err(reason.clone()),
        };
        add("inception_score", "inception score", 3, of(|s| s.mean));
        add("inception_score_deviation", "+-", 3, of(|s| s.deviation));
    }
    if let Some(agreement) = set.agreement {
        add("class_agreement", "class agreement", 4, Ok(agreement));
    }
    let dim = match &set.moments {
        Ok(moments) => moments.dim(),
        Err(_) => 0,
    };
    let pairs = match (real.images, &set.moments) {
        (None, _) => Err("statistics stand for the real images".to_owned()),
        (_, Err(reason)) => Err(reason.clone()),
        (Some(real), _) => Ok((&real.features, &set.features)),
    };
    if o.neighbours > 0 {
        let both = match &pairs {
            Ok((real, own)) => had(precision_recall(real, own, dim, o.neighbours, go_on))?,
            Err(reason) => Err(reason.clone()),
        };
        let of = |figure: fn(&crate::statistics::neighbours::PrecisionRecall) -> f64| match &both {
            Ok(both) => Ok(figure(both)),
            Err(reason) => Err(reason.clone()),
        };
        add("precision", "precision", 4, of(|both| both.precision));
        add("recall", "recall", 4, of(|both| both.recall));
    }
    if let Some(kernel) = &o.kernel {
        // The same subsets whatever the seed of the run: figures of several runs are compared.
        let mut sequence = Sequence::new(0, Stream::Subset, 0);
        let below = &mut |n| sequence.below(n);
        let sizes = (kernel.subsets, kernel.size);
        let found = match &pairs {
            Ok((real, own)) => had(kernel_distance(real, own, dim, sizes, below, go_on))?,
            Err(reason) => Err(reason.clone()),
        };
        let of = |figure: fn(&crate::statistics::kernel::KernelDistance) -> f64| match &found {
            Ok(found) => Ok(figure(found)),
            Err(reason) => Err(reason.clone()),
        };
        add("kernel_distance", "kernel distance", 5, of(|k| k.mean));
        add("kernel_distance_deviation", "+-", 5, of(|k| k.deviation));
    }
    Ok(figures)
}

/// Mean LPIPS of each set's images to those of the set that `lpips` names.
fn lpips_distances<B: Backend>(
    context: &Context<'_, B>,
    o: &Options,
    sets: &[(&str, Samples)],
) -> Result<Vec<Had<f64>>> {
    let Some(options) = &o.lpips else {
        return Ok(Vec::new());
    };
    let base = &context.job.base_dir;
    let [vgg, linear] = [&options.vgg, &options.linear].map(|file| resolve(base, file));
    let (trunk, layers) = (Stored::open(&vgg, None)?, Stored::open(&linear, None)?);
    let loader = |weights, path: &Path| {
        let origin = path.display().to_string();
        let source = crate::weights::Source::Files(std::slice::from_ref(weights));
        Loader::new(context.backend, source, false, origin)
    };
    let lpips = Lpips::load(&mut loader(&trunk, &vgg), &mut loader(&layers, &linear))?;
    let find = |name: &str| sets.iter().find(|(own, _)| *own == name);
    let (_, beside) = find(&options.beside)
        .ok_or_else(|| Error::Internal(format!("no set {}", options.beside)))?;
    let mut out = Vec::new();
    for (name, set) in sets {
        if *name == options.beside {
            out.push(Err(
                "it is the set that the others are compared with".to_owned()
            ));
            continue;
        }
        out.push(match unlike(set, beside, o.batch)? {
            Some(reason) => Err(format!("{reason} than {}", options.beside)),
            None => Ok(mean_lpips(context, &lpips, set, beside, o.batch)?),
        });
    }
    Ok(out)
}

/// Why images of two sets do not belong together one by one, if so.
fn unlike(a: &Samples, b: &Samples, batch: usize) -> Result<Option<&'static str>> {
    let (own, other) = (&a.manifest, &b.manifest);
    let [_, h, w] = own.image;
    Ok(if own.image != other.image {
        Some("images of another size")
    } else if h.min(w) < lpips::LEAST_SIDE {
        Some("images too small for it, as small")
    } else if a.labels != b.labels {
        Some("other classes or captions, or another number of samples,")
    } else if own.kept.noise != other.kept.noise
        || (!own.kept.noise && own.seed != other.seed)
        || (own.kept.noise && !same_noise(a, b, batch)?)
    {
        Some("made from other noise")
    } else {
        None
    })
}

fn same_noise(a: &Samples, b: &Samples, batch: usize) -> Result<bool> {
    for first in (0..a.len()).step_by(batch) {
        let n = batch.min(a.len() - first);
        if a.noise(first, n)? != b.noise(first, n)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn mean_lpips<B: Backend>(
    context: &Context<'_, B>,
    lpips: &Lpips<B>,
    a: &Samples,
    b: &Samples,
    batch: usize,
) -> Result<f64> {
    let [c, h, w] = a.manifest.image;
    let mut sum = 0.0;
    for first in (0..a.len()).step_by(batch) {
        context.go_on()?;
        let n = batch.min(a.len() - first);
        let images = |set: &Samples| -> Result<Variable<B>> {
            let pixels: Vec<f32> = set
                .images(first, n)?
                .iter()
                .map(|x| 2.0 * x - 1.0)
                .collect();
            Ok(Variable::constant(
                context.backend.floats(&pixels, &[n, c, h, w])?,
            ))
        };
        let distances = lpips.distance(&images(a)?, &images(b)?)?;
        let distances = B::to_floats(distances.value())?;
        sum += distances.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    Ok(sum / a.len() as f64)
}
