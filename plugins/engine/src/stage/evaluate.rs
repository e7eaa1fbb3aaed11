//! `evaluate`: how close sets of samples come to real images.
//!
//! Images are compared in the features of a network: a classifier trained on the data, or the Inception network of published
//! results. Metrics: the Frechet distance (Heusel et al. 2017, arXiv 1706.08500: FID with Inception), improved precision and
//! recall (Kynkaanniemi et al. 2019, arXiv 1904.06991); with a classifier, the share of samples that it assigns to their
//! class; with Inception, its score (Salimans et al. 2016, arXiv 1606.03498) and the Frechet distance of its spatial features
//! (Nash et al. 2021, arXiv 2103.03841: sFID).
//!
//! For few samples: the kernel distance (Binkowski et al. 2018, arXiv 1801.01401: KID). For sets made from the same noise:
//! LPIPS between their images.
//!
//! Real images and samples are read a batch at a time; at most their features are kept, as f32.
//!
//! Out: `evaluation.json`, `grid.png`, and on request `statistics.npz` of the real images (mu, sigma; mu_s, sigma_s of the
//! spatial features), in the format of pytorch-fid and ADM's evaluation suite, which this stage also reads, with the hash of
//! the network's weights and the preparation.

mod comparison;
mod feature_memory;
pub mod measure;
pub mod metric;
mod pairs;
pub mod reference;
mod shards;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use retort_abi::{ArtifactMeta, LogLevel, StageResult};
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
use crate::picture::{self, Pixels};
use crate::samples::{Samples, by_class};
use crate::stage::Stage;
use crate::stage::classifier::FEATURES_FOR_FIGURES;
use comparison::{ReferenceMeasurements, metrics};
use measure::{Measurement, Network, SetMeasurements, SetMeasurer};
use metric::{Metric, SetMetrics, relate, table};
use pairs::lpips_distances;
use reference::{ReferenceStatistics, StatisticsFile, save};
use shards::FeatureShards;
use source::{ReferenceImages, open_set, reconstructions, samples_source, sizing};

/// Options of `evaluate`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The sample sets: a name for the table, then the stage that sampled it. None, to save statistics only.
    #[serde(default)]
    #[schemars(extend("additionalProperties" = { "type": "string", "x-retort-artifact": ["samples"] }))]
    pub samples: BTreeMap<String, String>,
    /// Tokenizers whose reconstructions of `data` are measured like sets of samples: the limit of any sampler of their
    /// tokens. A name for the table, then the stage that made the tokenizer.
    #[serde(default)]
    #[schemars(extend("additionalProperties" = { "type": "string", "x-retort-artifact": ["tokenizer"] }))]
    pub tokenizers: BTreeMap<String, String>,
    /// The real images. May be left out when `real` or `statistics` stand for them.
    #[serde(default)]
    #[schemars(extend("x-retort-prepared" = Data::prepared_by()))]
    pub data: Option<Data>,
    /// A set of samples used as the real images.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["samples"]))]
    pub real: Option<String>,
    /// Statistics of the real images, for the Frechet distances: a `.npz` or torch file with `mu` and `sigma` (or `m` and
    /// `s`), and `mu_s` and `sigma_s` for the spatial features. A `.npz` may hold images too, `arr_0`, uint8 (n, height,
    /// width, 3), as ADM's reference files do: with them alone, or beside the statistics, it stands for `data`. Statistics
    /// that say of which network and preparation they are, as those that this stage saves, are refused for others.
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
    /// How images are resized for Inception: as in pytorch-fid, or as in ADM's evaluation suite, for comparison with its
    /// results; or a list, for both in one table. Statistics must have been made in the same way: they belong to one.
    #[serde(default)]
    pub preparation: Preparations,
    /// Parts of a set over which the inception score is averaged: consecutive images, or, where a set is sorted by class,
    /// images that a fixed permutation deals to the parts.
    #[serde(default = "splits")]
    #[schemars(range(min = 1))]
    pub splits: usize,
    /// The set by whose Frechet distance the others are divided; `teacher`, if left out.
    #[serde(default)]
    pub reference: Option<String>,
    /// Neighbours for the manifolds of precision and recall; 0 skips these two. They take time that grows with
    /// the product of the numbers of samples and of real images, and need images and not statistics alone.
    #[serde(default = "neighbours")]
    pub neighbours: usize,
    /// Also measures the kernel distance, which suits small sample sets. It needs images and not statistics alone.
    #[serde(default)]
    pub kernel: Option<KernelOptions>,
    /// Also measures how far the images of each set are from those of another one made from the same noise, image by image: for
    /// samplers that map noise to images, which a flow map and a student do, with the same `seed` in both stages.
    #[serde(default)]
    pub lpips: Option<LpipsOptions>,
    /// Images per batch of the network.
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

/// Options of the kernel distance.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KernelOptions {
    /// Pairs of subsets over which it is averaged; one, where a subset is the whole of each set.
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
    /// Several, each with its own rows in the table.
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
    const REVISION: u32 = 5;
    const SUMMARY: &'static str = "measure sample sets against real images";
    const DIVISIBLE: bool = true;

    fn check(o: &Options, base: &Path) -> Result<()> {
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
            let message = "expected one or more different ones";
            return Err(Error::option("/preparation", message));
        }
        if preparations.len() > 1 && o.save_statistics {
            let message = "statistics belong to one preparation: name only that, and use another stage for others";
            return Err(Error::option("/preparation", message));
        }
        if preparations.len() > 1 && o.inception.is_none() {
            let message = "`preparation` needs `inception`: add it, or remove `preparation`";
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
            let message = format!("{name} is the name of a sample set: give it another name");
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
        o.check_statistics(base)
    }

    fn run(context: &Context<'_, B>, o: &Options) -> Result<StageResult> {
        // Metrics are compared with other people's, so they never depend on `dtype`.
        let context = &Context {
            backend: &context.backend.exact(),
            ..*context
        };
        let inputs = Inputs::open(context, o)?;
        let mut plan = inputs.plan(context, o)?;
        if context.job.part.is_some() {
            inputs.look_at_share(context, o, &mut plan)?;
            return Ok(StageResult::of_part());
        }
        let (rows, measured) = inputs.measure(context, o, plan)?;
        for row in &rows {
            for metric in &row.metrics {
                let name = format!("{}/{}", row.name, metric.key);
                match &metric.value {
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

/// What is measured, and by which measurer.
struct MeasurementPlan<'a, 'b, B: Backend> {
    real: ReferenceImages<'a>,
    /// Whether the real images are measured.
    looks: bool,
    measurer: SetMeasurer<'a, 'b, B>,
}

/// The inputs of the comparison.
struct Inputs<'o, B: Backend> {
    data: Option<Arc<Images>>,
    network: Network<B>,
    sets: Vec<(&'o str, Samples)>,
    /// The file of statistics, and its contents.
    given: Option<(PathBuf, ReferenceStatistics)>,
    /// How the images of sets were resized, for people.
    sizes: Vec<String>,
}

impl<'o, B: Backend> Inputs<'o, B> {
    fn open(context: &Context<'_, B>, o: &'o Options) -> Result<Self> {
        let data = match &o.data {
            Some(data) => {
                let images =
                    context.images_unless(data, |count| feature_memory::check_real(o, count))?;
                Some(Arc::new(images))
            }
            None => None,
        };
        let network = Network::open(context, o, data.as_ref())?;
        let mut sets = Vec::new();
        for (name, stage) in &o.samples {
            let set = open_set(context, &network, stage, &format!("/samples/{name}"))?;
            sets.push((name.as_str(), set));
        }
        let own = sets.iter().filter_map(|(name, set)| sizing(name, set));
        let sizes = own.collect();
        let given = match &o.statistics {
            Some(file) => {
                let path = resolve(&context.job.base_dir, file);
                let file = StatisticsFile::open(&path, Some(network.dim()), network.is_inception());
                let file = file?;
                if let Some(warning) = file.warning(o) {
                    context.host.log(LogLevel::Warn, &warning);
                }
                let given = file.read(&network)?;
                Some((path, given))
            }
            None => None,
        };
        Ok(Self {
            data,
            network,
            sets,
            given,
            sizes,
        })
    }

    fn real(&self, context: &Context<'_, B>, o: &Options) -> Result<ReferenceImages<'_>> {
        if let Some(images) = &self.data {
            return Ok(ReferenceImages::Data(images));
        }
        if let Some(stage) = &o.real {
            let set = open_set(context, &self.network, stage, "/real")?;
            return Ok(ReferenceImages::Samples(Box::new(set)));
        }
        if let Some((path, given)) = &self.given
            && let Some(images) = given.images
        {
            self.network
                .accepts(images.1)
                .map_err(|message| Error::data(path, message))?;
            return Ok(ReferenceImages::Archive(path, images));
        }
        Ok(ReferenceImages::None)
    }

    /// Warns if Inception, which accepts any size, sees samples of another size than the real images.
    fn compare_sizes(&self, context: &Context<'_, B>, real: &ReferenceImages<'_>) {
        let Some([_, height, width]) = real.image() else {
            return;
        };
        for (name, set) in &self.sets {
            let [_, h, w] = set.manifest.image;
            if [h, w] != [height, width] {
                let message = format!(
                    "{name}: images of {h} x {w}, real images of {height} x {width}: Inception takes any size, so the \
                     size difference shows up as a quality difference; use one size, by `resize` in the `sample` stage or by \
                     `size` in `data`"
                );
                context.host.log(LogLevel::Warn, &message);
            }
        }
    }

    /// The reference for sets, from the measurements of the real images.
    fn reference_measurements<'a>(
        &'a self,
        measured: Option<&'a SetMeasurements>,
    ) -> Result<ReferenceMeasurements<'a>> {
        let given = self.given.as_ref().map(|(_, given)| given);
        let moments = given.and_then(|given| given.moments.as_ref());
        let spatial = given.and_then(|given| given.spatial.as_ref());
        Ok(ReferenceMeasurements {
            moments: match (moments, measured) {
                (Some(moments), _) => Ok(moments),
                (None, Some(real)) => real.moments.as_ref().map_err(of_real),
                (None, None) => return Err(Error::Internal("no reference".into())),
            },
            spatial: match (spatial, measured) {
                (Some(own), _) => Ok(own),
                // Given statistics take precedence over images: they are based on more of them.
                (None, Some(real)) if moments.is_none() => match &real.spatial {
                    Some(own) => own.as_ref().map_err(of_real),
                    None => Err("the network has no spatial features".to_owned()),
                },
                _ => Err("the statistics hold no mu_s and sigma_s".to_owned()),
            },
            images: measured,
        })
    }

    /// What is measured, and by which measurer.
    fn plan<'a, 'b>(
        &'a self,
        context: &'a Context<'b, B>,
        o: &Options,
    ) -> Result<MeasurementPlan<'a, 'b, B>> {
        let (real, sets) = (self.real(context, o)?, &self.sets);
        if context.job.part.is_none() {
            self.compare_sizes(context, &real);
        }
        let is_given = matches!(&self.given, Some((_, given)) if given.moments.is_some());
        let compares = o.neighbours > 0 || o.kernel.is_some();
        // With given statistics, images are only needed for comparisons of single images.
        let looks = real.count() > 0 && (!is_given || compares || o.save_statistics);
        let mut counts = vec![real.count(); usize::from(looks)];
        counts.extend(sets.iter().map(|(_, set)| set.len()));
        counts.extend(o.tokenizers.iter().map(|_| real.count()));
        let name = format!("features-{}", &self.network.hash.to_hex()[..16]);
        let shards = || FeatureShards::new(context, &name, o.batch);
        let measurer = SetMeasurer {
            context,
            network: &self.network,
            batch: o.batch,
            splits: o.splits,
            keep: feature_memory::keeps(o) && real.count() > 0,
            shards: shards(),
            done: 0,
            total: shards().share(&counts.repeat(o.preparation.all().len())),
        };
        if measurer.keep {
            // Those of one set at a time, and of the real images.
            let reconstructed = if o.tokenizers.is_empty() {
                0
            } else {
                real.count()
            };
            let most = sets.iter().map(|(_, set)| set.len()).max();
            let most = most.unwrap_or(0).max(reconstructed);
            feature_memory::check(o, self.network.dim(), real.count(), most)?;
        }
        Ok(MeasurementPlan {
            real,
            looks,
            measurer,
        })
    }

    /// Measures this part's share of the images, in the same order as `measure`.
    fn look_at_share(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        plan: &mut MeasurementPlan<'_, '_, B>,
    ) -> Result<()> {
        let MeasurementPlan {
            real,
            looks,
            measurer,
        } = plan;
        lpips_distances(context, o, &self.sets)?;
        for &preparation in o.preparation.all() {
            if *looks {
                measurer.look_at_share(real.source()?, preparation)?;
            }
            for (name, set) in &self.sets {
                measurer.look_at_share(samples_source(name, set), preparation)?;
            }
            for (name, stage) in &o.tokenizers {
                let (images, tokenizer) = self.reconstructed(context, stage)?;
                let source = reconstructions(context.backend, &*tokenizer, images, name);
                measurer.look_at_share(source, preparation)?;
            }
        }
        let message = format!("measured {} images", measurer.done);
        context.host.log(LogLevel::Info, &message);
        Ok(())
    }

    /// The images that a tokenizer reconstructs, and the tokenizer.
    fn reconstructed(
        &self,
        context: &Context<'_, B>,
        stage: &str,
    ) -> Result<(&Images, Box<dyn Tokenizer<B>>)> {
        let images = self
            .data
            .as_deref()
            .ok_or_else(|| Error::Internal("no images".into()))?;
        let bundle = Bundle::open(context.input_dir(stage)?)?;
        Ok((images, bundle.tokenizer(context.backend)?))
    }

    /// The rows of the table, and the last measurements of the real images, if they were measured.
    fn measure(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        plan: MeasurementPlan<'_, '_, B>,
    ) -> Result<(Vec<SetMetrics>, Option<SetMeasurements>)> {
        let MeasurementPlan {
            real,
            looks,
            mut measurer,
        } = plan;
        let (sets, preparations) = (&self.sets, o.preparation.all());
        let lpips = lpips_distances(context, o, sets)?;
        let mut rows = Vec::new();
        let mut last = None;
        for &preparation in preparations {
            let label = |name: &str| match preparations.len() {
                1 => name.to_owned(),
                _ => format!("{name}/{}", preparation.name()),
            };
            // One preparation at a time.
            drop(last.take());
            let measured = match looks {
                true => Some(measurer.measure(real.source()?, preparation)?),
                false => None,
            };
            let reference = self.reference_measurements(measured.as_ref())?;
            let mut own = Vec::new();
            let mut add = |name: &str,
                           count,
                           passes,
                           seen: &SetMeasurements,
                           lpips: Option<Measurement<f64>>| {
                let (mut metrics, kernel) = metrics(context, o, &reference, seen)?;
                metrics.extend(lpips.map(|value| Metric::new("lpips", "LPIPS", 4, value)));
                own.push(SetMetrics {
                    name: label(name),
                    count,
                    passes,
                    metrics,
                    kernel,
                });
                Ok::<_, Error>(())
            };
            for (number, (name, set)) in sets.iter().enumerate() {
                let seen = measurer.measure(samples_source(name, set), preparation)?;
                let lpips = lpips.get(number).cloned();
                add(name, set.len(), set.manifest.passes, &seen, lpips)?;
            }
            for (name, stage) in &o.tokenizers {
                let (images, tokenizer) = self.reconstructed(context, stage)?;
                let source = reconstructions(context.backend, &*tokenizer, images, name);
                let seen = measurer.measure(source, preparation)?;
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

    /// Writes the artifact: the metrics, a picture of the sets, and the statistics of the real images if requested.
    fn publish(
        &self,
        context: &Context<'_, B>,
        o: &Options,
        rows: &[SetMetrics],
        measured: Option<&SetMeasurements>,
    ) -> Result<StageResult> {
        let summary: Map<String, Value> = rows
            .iter()
            .map(|row| (row.name.clone(), row.summary()))
            .collect();
        // A picture of sets of the same image size and number of classes.
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
        let mut sizes: Vec<String> = self.real(context, o)?.sizing().into_iter().collect();
        sizes.extend_from_slice(&self.sizes);
        let pipeline = self.network.pipeline(o.preparation.all(), sizes);
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
        context.finish("evaluation", meta, summary.clone().into(), |dir| {
            write_json(&dir.join("evaluation.json"), &report)?;
            if let (true, Some(real)) = (o.save_statistics, measured) {
                let preparation = o.preparation.all().first().copied();
                let preparation = preparation.filter(|_| self.network.is_inception());
                let of = (&self.network.hash, preparation);
                save(&dir.join("statistics.npz"), real, of)?;
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
    /// Refuses an existing file of statistics that is unsuitable, before anything is computed.
    fn check_statistics(&self, base: &Path) -> Result<()> {
        let Some(path) = self.statistics.as_ref().map(|file| resolve(base, file)) else {
            return Ok(());
        };
        // The runner reports missing files.
        if !path.exists() {
            return Ok(());
        }
        let dim = match (&self.inception, &self.classifier) {
            (Some(_), _) => Some(self.dims),
            // The classifier knows it.
            (None, Some(_)) => None,
            (None, None) => Some(FEATURES_FOR_FIGURES),
        };
        let file = StatisticsFile::open(&path, dim, self.inception.is_some())
            .map_err(|e| Error::option("/statistics", e.to_string()))?;
        file.check(self)
    }

    /// The reference set of the ratios.
    fn reference(&self) -> &str {
        self.reference.as_deref().unwrap_or("teacher")
    }
}

fn of_real(reason: &String) -> String {
    format!("real images: {reason}")
}
