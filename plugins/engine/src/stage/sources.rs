//! What the options of earlier stages say about their results, before anything has run.
//!
//! Every answer is `None` where they do not say it: for published networks, images whose size only their files tell, stages of
//! other plugins. Then the running stage checks it, once its inputs are there.

use std::collections::BTreeMap;

use retort_abi::SourceStage;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::bundle::Family;
use crate::data::{Data, DataOptions};
use crate::size::Sides;
use crate::stage::{images, tokenizer};

/// The stages before one.
pub struct Sources<'a>(&'a BTreeMap<String, SourceStage>);

impl<'a> Sources<'a> {
    /// Those before a stage, by their names.
    pub fn of(stages: &'a BTreeMap<String, SourceStage>) -> Self {
        Self(stages)
    }

    /// The options of a stage, if it is of this kind.
    pub fn options<T: DeserializeOwned>(&self, stage: &str, kind: &str) -> Option<T> {
        let source = self.0.get(stage).filter(|source| source.kind == kind)?;
        serde_json::from_value(source.options.clone()).ok()
    }

    /// AR steps of the network that a stage makes.
    pub fn steps(&self, stage: &str) -> Option<usize> {
        let mut stage = stage;
        // Stages refer to earlier ones alone: there are no circles.
        for _ in 0..self.0.len() {
            let source = self.0.get(stage)?;
            let shaped_by = match source.kind.as_str() {
                "tokenizer" => return self.steps_of_tokenizer(stage),
                "pretrain" => "tokenizer",
                "distill" => "teacher",
                "snapshot" => "student",
                _ => return None,
            };
            stage = source.options.get(shaped_by)?.as_str()?;
        }
        None
    }

    /// The number of pairs that a stage of kind `trajectories` makes.
    pub fn pairs(&self, stage: &str) -> Option<u64> {
        let source = self.0.get(stage)?;
        let is_part = source
            .options
            .get("range")
            .is_some_and(|range| !range.is_null());
        match source.kind == "trajectories" && !is_part {
            true => source.options.get("count").and_then(Value::as_u64),
            false => None,
        }
    }

    fn steps_of_tokenizer(&self, stage: &str) -> Option<usize> {
        let o: tokenizer::Options = self.options(stage, "tokenizer")?;
        match o.family {
            Family::Var => Some(o.scales.len()),
            Family::Llamagen => {
                // The stage may be one of another plugin: nothing limits its options.
                let halvings = o.multipliers.len().saturating_sub(1).min(31);
                let sides = self.sides(&o.data)?;
                // The tokenizer refuses other sides.
                sides
                    .is_multiple_of(1 << halvings)
                    .then(|| sides.halved(halvings).area())
            }
        }
    }

    /// The size of the images that a stage reads.
    fn sides(&self, data: &Data) -> Option<Sides> {
        match data {
            Data::Stage(stage) => self.prepared(stage),
            Data::Source(options) => match (options.crop, &options.images) {
                (Some(crop), _) => Some(crop.into()),
                (None, Some(stage)) => self.prepared(stage),
                (None, None) => written(options),
            },
        }
    }

    /// The size of the images that a stage of kind `images` prepares.
    fn prepared(&self, stage: &str) -> Option<Sides> {
        let o: images::Options = self.options(stage, "images")?;
        written(&o.data)
    }
}

/// The size that is written in the options of a source.
fn written(options: &DataOptions) -> Option<Sides> {
    let of_table = || {
        let (height, width) = options.height.zip(options.width)?;
        Some(Sides { height, width })
    };
    options.size.map(Sides::from).or_else(of_table)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A recipe's stages: name, kind, options.
    fn check(stages: &[(&str, &str, Value)], stage: &str, steps: Option<usize>) {
        let stages = stages.iter().map(|(name, kind, options)| {
            let (kind, options) = ((*kind).to_owned(), options.clone());
            ((*name).to_owned(), SourceStage { kind, options })
        });
        let stages: BTreeMap<String, SourceStage> = stages.collect();
        assert_eq!(Sources(&stages).steps(stage), steps, "{stages:?}");
    }

    fn codes(data: Value, more: Value) -> Value {
        let mut options = json!({"data": data, "codebook_size": 16, "codebook_dim": 4});
        let more = more.as_object().expect("options").clone();
        options.as_object_mut().expect("options").extend(more);
        options
    }

    #[test]
    fn the_sizes_of_images_and_tokenizer_give_the_steps() {
        let prepared = |data: Value| ("pictures", "images", json!({ "data": data }));
        let folder = prepared(json!({"folder": "x", "size": [32, 16]}));
        let three = json!({"multipliers": [1, 1, 2]});
        let of = |data: Value, steps| {
            let tokenizer = ("codes", "tokenizer", codes(data, three.clone()));
            check(&[folder.clone(), tokenizer], "codes", steps);
        };
        of(json!("pictures"), Some(32));
        of(json!({"images": "pictures", "flip": true}), Some(32));
        of(json!({"images": "pictures", "crop": 16}), Some(16));
        of(json!({"folder": "x", "size": 16}), Some(16));
        of(json!({"csv": "x", "height": 8, "width": 8}), Some(4));
        // Known only from the files, or refused.
        of(json!({"csv": "x"}), None);
        of(json!({"folder": "x"}), None);
        of(json!("others"), None);
        of(json!({"folder": "x", "size": 18}), None);
        let var = json!({"family": "var", "scales": [1, 2, 4]});
        let codes = codes(json!({"folder": "x"}), var);
        check(&[("codes", "tokenizer", codes)], "codes", Some(3));
    }

    #[test]
    fn networks_have_the_steps_of_their_tokenizer() {
        let data = json!({"folder": "x", "size": 8});
        let stages = [
            ("codes", "tokenizer", codes(data, json!({}))),
            ("teacher", "pretrain", json!({"tokenizer": "codes"})),
            ("student", "distill", json!({"teacher": "teacher"})),
            ("early", "snapshot", json!({"student": "student"})),
            ("published", "teacher", json!({"tokenizer": "codes"})),
            ("other", "distill", json!({"teacher": "published"})),
        ];
        for stage in ["codes", "teacher", "student", "early"] {
            check(&stages, stage, Some(16));
        }
        for stage in ["published", "other", "none"] {
            check(&stages, stage, None);
        }
    }
}
