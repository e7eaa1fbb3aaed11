//! diversity: a plugin with a metric of its own, as a third party would write it.
//!
//! In: sets of samples from any `sample` stage, of whatever backend. Out: `diversity.json` and a table: for each set,
//! how far apart the images of one class are (mean distance of pairs, root mean square over pixels, 0 to 1) and how many
//! images have a twin closer than a threshold. A student that has learnt one picture per class has good single images
//! and no diversity.
//!
//! The artifact's format is the runner's documentation: a `manifest.json` that names shards, safetensors with `labels` (n)
//! and `images` (n, c, H, W), as bytes or as f32 in [0, 1]. One shard is in memory at a time. A set may come from anybody, so
//! both are read with retort's own reader of such files, within its limits.

use std::collections::BTreeMap;
use std::path::Path;

use retort_abi::*;
use retort_checkpoint::regular;
use retort_checkpoint::sample_shards::{Shard, read_manifest};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

struct Diversity;

/// As the schema says.
#[derive(Deserialize)]
struct Options {
    samples: BTreeMap<String, String>,
    twin: f64,
    max: usize,
}

fn schema() -> Value {
    json!({
        "type": "object",
        "additionalProperties": false,
        "required": ["samples"],
        "properties": {
            "samples": {
                "description": "The sets to measure: a name for the table, and the stage that made the set.",
                "type": "object",
                "minProperties": 1,
                "additionalProperties": {"type": "string", "x-retort-artifact": ["samples"]}
            },
            "twin": {
                "description": "Distance below which two images are twins.",
                "type": "number", "minimum": 0, "maximum": 1, "default": 0.02
            },
            "max": {
                "description": "Images of each class to compare.",
                "type": "integer", "minimum": 2, "default": 200
            }
        }
    })
}

impl Plugin for Diversity {
    fn describe(&self) -> Description {
        Description {
            name: "diversity".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            summary: "measures how diverse sets of samples are".into(),
            license: env!("CARGO_PKG_LICENSE").into(),
            devices: vec!["cpu".into()],
            dtypes: vec!["f32".into()],
            families: Vec::new(),
            libraries: Default::default(),
            stages: vec![StageKind {
                kind: "diversity".into(),
                summary: "distances within classes, and twins".into(),
                output: "diversity".into(),
                revision: 1,
                divisible: false,
                together: false,
                schema: schema(),
            }],
        }
    }

    fn probe(&self, _host: &dyn Host) -> Result<Vec<Device>, Failure> {
        Ok(vec![Device::named("cpu")])
    }

    fn validate(&self, _host: &dyn Host, job: &StageJob) -> Result<Vec<Diagnostic>, Failure> {
        let options = read_options(job)?;
        let mut seen = BTreeMap::new();
        let mut findings = Vec::new();
        for (name, stage) in &options.samples {
            if let Some(other) = seen.insert(stage, name) {
                findings.push(Diagnostic {
                    severity: Severity::Warning,
                    pointer: format!("/samples/{}", name.replace('~', "~0").replace('/', "~1")),
                    message: format!("`{name}` and `{other}` are the same set"),
                    hint: None,
                });
            }
        }
        Ok(findings)
    }

    fn run(&self, host: &dyn Host, job: &StageJob) -> Result<StageResult, Failure> {
        let options = read_options(job)?;
        let mut table = Table::new(
            "Diversity within classes",
            &["set", "images", "mean distance", "twins"],
        );
        let mut results = BTreeMap::new();
        let total = options.samples.len() as u64;
        for (done, (name, stage)) in options.samples.iter().enumerate() {
            host.check_cancelled()?;
            let input = job.inputs.get(stage).ok_or_else(|| {
                Failure::new(FailureCode::MissingInput, format!("no output of `{stage}`"))
            })?;
            let measured = measure(&read_classes(&input.path, options.max)?, options.twin);
            host.metric(&format!("distance/{name}"), 0, measured.mean_distance);
            host.progress(done as u64 + 1, total, "sets");
            table.rows.push(vec![
                name.as_str().into(),
                measured.images.into(),
                measured.mean_distance.into(),
                measured.twins.into(),
            ]);
            results.insert(name, measured);
        }
        let draft = ArtifactDraft::begin(host, "diversity", &job.stage)?;
        std::fs::write(
            draft.path().join("diversity.json"),
            format!("{:#}\n", json!(results)),
        )?;
        let output = draft.commit(&ArtifactMeta::from(table))?;
        let summary = json!(results);
        Ok(StageResult { output, summary })
    }
}

export_plugin!(Diversity);

fn read_options(job: &StageJob) -> Result<Options, Failure> {
    serde_json::from_value(job.options.clone())
        .map_err(|error| Failure::new(FailureCode::InvalidOptions, error.to_string()).at(""))
}

/// What is said of a set.
#[derive(Debug, PartialEq, Serialize)]
struct Measured {
    images: usize,
    mean_distance: f64,
    twins: usize,
}

/// Images of each class, each a row of pixels.
type Classes = BTreeMap<i64, Vec<Vec<f32>>>;

fn measure(classes: &Classes, twin: f64) -> Measured {
    let (mut sum, mut pairs, mut twins) = (0.0, 0u64, 0);
    for images in classes.values() {
        let mut nearest = vec![f64::INFINITY; images.len()];
        for (i, a) in images.iter().enumerate() {
            for (j, b) in images.iter().enumerate().skip(i + 1) {
                let distance = distance(a, b);
                sum += distance;
                pairs += 1;
                nearest[i] = nearest[i].min(distance);
                nearest[j] = nearest[j].min(distance);
            }
        }
        twins += nearest.iter().filter(|&&nearest| nearest < twin).count();
    }
    Measured {
        images: classes.values().map(Vec::len).sum(),
        mean_distance: if pairs == 0 { 0.0 } else { sum / pairs as f64 },
        twins,
    }
}

/// Root mean square of the differences of pixels.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
    (a.iter().zip(b).map(square).sum::<f64>() / a.len() as f64).sqrt()
}

/// What is read of `manifest.json`.
#[derive(Deserialize)]
struct Manifest {
    format: u32,
    shards: Vec<Shard>,
}

/// The version of the format.
const FORMAT: u32 = 1;
/// The most bytes of a shard: a thousand images of 1024 x 1024 in f32 take less.
const LONGEST_SHARD: u64 = 16 << 30;
/// The most bytes of its header, which has an entry for each of a few tensors.
const LONGEST_HEADER: u64 = 1 << 20;

/// The first `max` images of each class of a sample artifact.
fn read_classes(dir: &Path, max: usize) -> Result<Classes, Failure> {
    let manifest = read_manifest(dir, FORMAT, |manifest: &Manifest| {
        (manifest.format, &manifest.shards)
    });
    let manifest =
        manifest.map_err(|error| Failure::new(FailureCode::BadData, error.to_string()))?;
    let mut classes = Classes::new();
    for shard in &manifest.shards {
        read_shard(&dir.join(&shard.file), max, &mut classes)?;
    }
    Ok(classes)
}

fn bad(path: &Path, what: String) -> Failure {
    Failure::new(FailureCode::BadData, format!("{}: {what}", path.display()))
}

/// Adds the images of a shard to their classes, up to `max` of each.
fn read_shard(path: &Path, max: usize, classes: &mut Classes) -> Result<(), Failure> {
    let bad = |what: String| bad(path, what);
    let bytes = regular::read(path, LONGEST_SHARD).map_err(|error| bad(error.to_string()))?;
    let length = bytes
        .first_chunk()
        .map_or(0, |length| u64::from_le_bytes(*length));
    if length > LONGEST_HEADER {
        return Err(bad(format!(
            "a header of {length} bytes, expected at most {LONGEST_HEADER}"
        )));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|error| bad(error.to_string()))?;
    let tensor = |name: &str| file.tensor(name).map_err(|error| bad(error.to_string()));
    let (labels, images) = (tensor("labels")?, tensor("images")?);
    let &[count, channels, height, width] = images.shape() else {
        return Err(bad(format!(
            "images of shape {:?}, expected (n, c, H, W)",
            images.shape()
        )));
    };
    if labels.shape() != [count] {
        return Err(bad(format!(
            "{:?} labels for {count} images",
            labels.shape()
        )));
    }
    // Unsigned, in the narrowest type that holds all of them.
    let width_of = match labels.dtype() {
        Dtype::U8 => 1,
        Dtype::U16 => 2,
        Dtype::U32 => 4,
        other => {
            return Err(bad(format!(
                "labels are {other:?}, expected u8, u16 or u32"
            )));
        }
    };
    let label = |bytes: &[u8]| {
        let digits = bytes.iter().rev();
        digits.fold(0, |label, &byte| label << 8 | i64::from(byte))
    };
    let pixel_bytes = match images.dtype() {
        Dtype::U8 => 1,
        Dtype::F32 => 4,
        other => return Err(bad(format!("images are {other:?}, expected u8 or f32"))),
    };
    let pixels = |bytes: &[u8]| -> Vec<f32> {
        match pixel_bytes {
            1 => bytes.iter().map(|&x| f32::from(x) / 255.0).collect(),
            _ => {
                let floats = bytes.as_chunks::<4>().0.iter();
                floats.map(|&x| f32::from_le_bytes(x)).collect()
            }
        }
    };
    let size = channels * height * width * pixel_bytes;
    let labels = labels.data().chunks_exact(width_of).map(label);
    for (label, image) in labels.zip(images.data().chunks_exact(size.max(1))) {
        let members = classes.entry(label).or_default();
        if members.len() < max {
            members.push(pixels(image));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_pairs_within_a_class() {
        let classes = Classes::from([
            (0, vec![vec![0.0, 0.0], vec![1.0, 1.0], vec![0.0, 0.0]]),
            (1, vec![vec![0.5, 0.5]]),
        ]);
        let measured = measure(&classes, 0.1);
        // Of the three pairs of class 0 two are 1 apart and one is 0; its ends are twins.
        assert_eq!((measured.images, measured.twins), (4, 2));
        assert!((measured.mean_distance - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn one_image_has_no_distance() {
        let measured = measure(&Classes::from([(0, vec![vec![0.5]])]), 0.1);
        assert_eq!((measured.mean_distance, measured.twins), (0.0, 0));
    }

    /// What is said of a set with these files.
    fn refused(files: &[(&str, &[u8])]) -> String {
        let dir = std::env::temp_dir().join(format!("diversity-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
        let said = read_classes(&dir, 2).unwrap_err().message;
        std::fs::remove_dir_all(&dir).unwrap();
        said
    }

    #[test]
    fn sets_are_read_within_limits() {
        let shards = |shards: &str| format!("{{\"format\": 1, \"shards\": [{shards}]}}");
        let elsewhere = shards("{\"file\": \"../s\", \"start\": 0, \"end\": 1}");
        let said = refused(&[("manifest.json", elsewhere.as_bytes())]);
        assert!(said.contains("not a valid shard"), "{said}");
        let heavy = shards(&"{\"\":0},".repeat(1 << 20));
        let said = refused(&[("manifest.json", heavy.as_bytes())]);
        assert!(said.contains("MiB of memory"), "{said}");
        let one = shards("{\"file\": \"s\", \"start\": 0, \"end\": 1}");
        let header = (2_u64 << 20).to_le_bytes();
        let said = refused(&[("manifest.json", one.as_bytes()), ("s", &header)]);
        assert!(said.contains("a header of 2097152 bytes"), "{said}");
    }
}
