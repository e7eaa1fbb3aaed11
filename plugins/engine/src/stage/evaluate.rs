//! `evaluate`: how close sets of samples come to real images.
//!
//! In the features of a classifier trained on the data: the Frechet distance (Heusel et al. 2017, arXiv 1706.08500, with
//! this classifier in the place of Inception), improved precision and recall (Kynkaanniemi et al. 2019,
//! arXiv 1904.06991), and the share of samples that the classifier gives their class.

use std::collections::BTreeMap;
use std::path::Path;

use retort_abi::{ArtifactMeta, StageResult, Table};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::backend::Backend;
use crate::data::{self, DataOptions};
use crate::error::{Error, Result};
use crate::picture::{self, Pixels};
use crate::stage::classifier::{self, Net};
use crate::stage::sample::{by_class, read_images};
use crate::stage::{Context, Stage, write_json};
use crate::statistics::{Moments, class_agreement, frechet_distance, precision_recall};
use crate::weights::{Loader, Source};

/// Options of `evaluate`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// The sample sets: a name for the table, then the stage that sampled it.
    #[schemars(extend("additionalProperties" = { "type": "string", "x-retort-artifact": ["samples"] }))]
    pub samples: BTreeMap<String, String>,
    /// The real images.
    pub data: DataOptions,
    /// The stage that trained the classifier; without it one is trained here.
    #[serde(default)]
    #[schemars(extend("x-retort-artifact" = ["classifier"]))]
    pub classifier: Option<String>,
    /// The set whose Frechet distance the others are divided by; the one named `teacher`, if left out.
    #[serde(default)]
    pub reference: Option<String>,
    /// Neighbours that span the manifolds of precision and recall.
    #[serde(default = "neighbours")]
    #[schemars(range(min = 1))]
    pub neighbours: usize,
    /// Images per class of each set in `grid.png`.
    #[serde(default = "columns")]
    #[schemars(range(min = 1))]
    pub grid_columns: usize,
}

fn neighbours() -> usize {
    3
}
fn columns() -> usize {
    8
}

/// The stage.
pub struct Evaluate;

struct Row {
    name: String,
    count: usize,
    distance: f64,
    agreement: f64,
    precision: f64,
    recall: f64,
}

impl<B: Backend> Stage<B> for Evaluate {
    type Options = Options;
    const KIND: &'static str = "evaluate";
    const OUTPUT: &'static str = "evaluation";
    const REVISION: u32 = 1;
    const SUMMARY: &'static str = "measure sample sets against real images";

    fn check(o: &Options, _: &Path) -> Result<()> {
        o.data
            .check()
            .map_err(|e| Error::option("/data", e.to_string()))?;
        if o.samples.is_empty() {
            return Err(Error::option(
                "/samples",
                "no sample set to measure; expected `name: stage` lines",
            ));
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
        let (host, backend) = (context.host, context.backend);
        let images = data::load(&o.data, &context.job.base_dir)?;
        let net = match &o.classifier {
            Some(stage) => Net::open(backend, context.input_dir(stage)?)?,
            None => {
                let with = (host, backend, context.job.seed);
                let work = Some(context.work_dir()?);
                let (config, weights, _) =
                    classifier::train(with, work, &images, (0.1, 64), &classifier::training())?;
                Net::load(
                    &mut Loader::new(backend, Source::Host(&weights), false, "classifier"),
                    &config,
                )?
            }
        };
        let size = [images.channels, images.height, images.width];
        if net.config.image != size {
            let message = format!(
                "the classifier was made for images of {:?}, found {size:?}",
                net.config.image
            );
            return Err(Error::option("/classifier", message));
        }
        let dim = net.config.features;
        let (real, _) = net.measure(backend, &images.pixels)?;
        let moments = Moments::of(&real, dim)?;

        let mut rows = Vec::new();
        let mut tiles = Vec::new();
        for (i, (name, stage)) in o.samples.iter().enumerate() {
            let (labels, pixels, found) = read_images(context.input_dir(stage)?)?;
            if found != size {
                let message = format!("{stage} has images of {found:?}, the data of {size:?}");
                return Err(Error::option(format!("/samples/{name}"), message));
            }
            let signed: Vec<f32> = pixels.iter().map(|x| 2.0 * x - 1.0).collect();
            let (features, classes) = net.measure(backend, &signed)?;
            let manifold = precision_recall(&real, &features, dim, o.neighbours)?;
            rows.push(Row {
                name: name.clone(),
                count: labels.len(),
                distance: frechet_distance(&Moments::of(&features, dim)?, &moments)?,
                agreement: class_agreement(&classes, &labels)?,
                precision: manifold.precision,
                recall: manifold.recall,
            });
            tiles.push(by_class(&pixels, &labels, o.grid_columns));
            host.progress(i as u64 + 1, o.samples.len() as u64, "sets");
        }
        for row in &rows {
            let metric = |name: &str, value| host.metric(&format!("{}/{name}", row.name), 0, value);
            metric("frechet_distance", row.distance);
            metric("class_agreement", row.agreement);
            metric("precision", row.precision);
            metric("recall", row.recall);
        }
        let reference = o.reference.as_deref().unwrap_or("teacher");
        let base = rows
            .iter()
            .find(|r| r.name == reference)
            .map(|r| r.distance);
        for row in &rows {
            if let Some(base) = base {
                host.metric(
                    &format!("{}/frechet_ratio", row.name),
                    0,
                    row.distance / base,
                );
            }
        }
        let table = table(&rows, base.map(|b| (reference, b)));
        let summary: serde_json::Map<String, Value> = rows
            .iter()
            .map(|r| {
                let figures = json!({
                    "samples": r.count,
                    "frechet_distance": r.distance,
                    "class_agreement": r.agreement,
                    "precision": r.precision,
                    "recall": r.recall,
                });
                (r.name.clone(), figures)
            })
            .collect();
        let names: Vec<&str> = rows.iter().map(|r| r.name.as_str()).collect();
        let mut meta = ArtifactMeta {
            table: Some(table),
            preview: Some("grid.png".into()),
            ..Default::default()
        };
        meta.extra.insert("preview_columns".into(), json!(names));
        context.finish("evaluation", meta, summary.clone().into(), |dir| {
            write_json(
                &dir.join("evaluation.json"),
                &json!({ "sets": summary, "grid_columns": names }),
            )?;
            let height = tiles.iter().map(|t| t.1).min().unwrap_or(1);
            let sets = tiles
                .iter()
                .filter(|t| t.1 == height)
                .map(|t| Pixels::new(&t.0, size[0], size[1], size[2]))
                .collect::<Result<Vec<_>, _>>()?;
            Ok(picture::write_grid(&dir.join("grid.png"), &sets, height)?)
        })
    }
}

fn table(rows: &[Row], base: Option<(&str, f64)>) -> Table {
    let round = |x: f64, digits: i32| json!((x * 10f64.powi(digits)).round() / 10f64.powi(digits));
    let ratio = base.map_or("relative".into(), |(name, _)| format!("x {name}"));
    let heads = [
        "samples",
        "set",
        "Frechet distance",
        &ratio,
        "class agreement",
        "precision",
        "recall",
    ];
    Table {
        title: "samples against real images".into(),
        columns: [heads[1], heads[0]]
            .iter()
            .chain(&heads[2..])
            .map(|h| (*h).to_owned())
            .collect(),
        rows: rows
            .iter()
            .map(|r| {
                vec![
                    json!(r.name),
                    json!(r.count),
                    round(r.distance, 3),
                    base.map_or(Value::Null, |(_, b)| round(r.distance / b, 2)),
                    round(r.agreement, 4),
                    round(r.precision, 4),
                    round(r.recall, 4),
                ]
            })
            .collect(),
    }
}
