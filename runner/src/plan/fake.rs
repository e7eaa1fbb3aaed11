//! A plugin for tests, with schemas in the form that schemars generates.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use retort_abi::{Description, Device, StageJob, StageKind};
use serde_json::{Value, json};

use super::{Build, DescribeError, Descriptions, Plan, PluginIdentity, plan as settle};
use crate::diagnostic::Report;
use crate::recipe;

/// Plans a recipe's text as if it were in `/base`.
pub fn plan(text: &str, set: &[&str]) -> Result<Plan, Report> {
    let set: Vec<String> = set.iter().map(|change| (*change).to_owned()).collect();
    let recipe = recipe::parse(
        Path::new("r.yaml"),
        PathBuf::from("/base"),
        text.to_owned(),
        &set,
    )?;
    settle(&recipe, &mut Fake)
}

/// Provides the plugins `fake` (CPU only), `gpu` (whose second and third devices work) and `varied` (`fake` with a variant
/// for such devices).
pub struct Fake;

impl Descriptions for Fake {
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError> {
        let mut description = description();
        match plugin {
            "fake" | "varied" => {}
            "gpu" => description.devices.push("cuda".into()),
            _ => {
                return Err(DescribeError {
                    message: format!("plugin `{plugin}` was not found"),
                    hint: Some("did you mean `fake`?".into()),
                });
            }
        }
        let identity = PluginIdentity {
            name: plugin.into(),
            path: format!("/plugins/libretort_{plugin}.so").into(),
            version: "0.1.0".into(),
            hash: "f00d".into(),
        };
        Ok(Build::new(identity, description))
    }

    fn variants(&mut self, plugin: &str) -> Vec<Result<Rc<Build>, DescribeError>> {
        if plugin != "varied" {
            return Vec::new();
        }
        let description = Description {
            devices: vec!["cuda".into()],
            dtypes: vec!["f32".into(), "f16".into()],
            ..description()
        };
        let identity = PluginIdentity {
            name: plugin.into(),
            path: "/plugins/libretort_varied.cuda.so".into(),
            version: "0.1.0".into(),
            hash: "beef".into(),
        };
        vec![Ok(Build::new(identity, description))]
    }

    fn devices(&mut self, _: &PluginIdentity) -> Result<Vec<Device>, DescribeError> {
        let device = |name: &str, unusable: Option<&str>| Device {
            name: name.into(),
            model: String::new(),
            memory: None,
            unusable: unusable.map(str::to_owned),
        };
        Ok(vec![
            device("cpu", None),
            device("cuda:0", Some("too old")),
            device("cuda:1", None),
            device("cuda:2", None),
        ])
    }

    fn validate(
        &mut self,
        _: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<retort_abi::Diagnostic>>, DescribeError> {
        Ok(jobs.iter().map(|_| Vec::new()).collect())
    }

    fn names(&mut self) -> Vec<String> {
        vec!["fake".into()]
    }
}

/// The description of the plugin `fake`.
pub fn description() -> Description {
    let stage = |kind: &str, output: &str| StageKind {
        kind: kind.into(),
        summary: format!("Makes a {output}."),
        output: output.into(),
        revision: 1,
        divisible: kind == "everything",
        together: kind == "pretrain",
        schema: schema(kind),
    };
    Description {
        name: "fake".into(),
        version: "0.1.0".into(),
        summary: String::new(),
        license: String::new(),
        devices: vec!["cpu".into()],
        dtypes: vec!["f32".into(), "bf16".into()],
        families: Vec::new(),
        libraries: Vec::new(),
        stages: vec![
            stage("tokenizer", "tokenizer"),
            stage("pretrain", "teacher"),
            stage("distill", "student"),
            stage("everything", "samples"),
            stage("images", "images"),
            stage("classifier", "classifier"),
        ],
    }
}

/// The schema of a kind's options. `everything` has one of each shape that schemars writes.
pub fn schema(kind: &str) -> Value {
    let schedule = json!({"$ref": "#/$defs/Schedule", "default": {"type": "cosine", "warmup": 100, "rate": 0.001}});
    let (properties, required) = match kind {
        "tokenizer" => (
            json!({"data": {"type": "string", "x-retort-file": "file"}}),
            json!(["data"]),
        ),
        "pretrain" => (
            json!({
                "tokenizer": reference(&["tokenizer"]),
                "steps": steps(),
                "width": {"type": "integer", "default": 64},
                "guidance": {"type": ["number", "null"], "default": null},
                "schedule": schedule
            }),
            json!(["tokenizer"]),
        ),
        "distill" => (
            json!({
                "teacher": reference(&["teacher", "student"]),
                "tokenizer": reference(&["tokenizer"]),
                "steps": steps()
            }),
            json!(["teacher", "tokenizer"]),
        ),
        "images" => (
            json!({
                "data": {"$ref": "#/$defs/Pictures"},
                "quality": {"type": "integer", "default": 90}
            }),
            json!(["data"]),
        ),
        "classifier" => (
            json!({
                "data": {
                    "anyOf": [reference(&["images"]), {"$ref": "#/$defs/Pictures"}],
                    "x-retort-prepared": {"kind": "images", "sources": ["folder"], "own": ["flip"]}
                },
                "from": reference(&["classifier"])
            }),
            json!(["data"]),
        ),
        _ => (properties_of_everything(), json!(["data"])),
    };
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Options",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
        "$defs": definitions()
    })
}

/// What the options refer to.
fn definitions() -> Value {
    json!({
        "Loss": {
            "oneOf": [
                {"type": "string", "const": "l1", "description": "Absolute."},
                {"type": "string", "const": "l2", "description": "Squared."}
            ]
        },
        "Labels": {
            "anyOf": [
                {"oneOf": [{"type": "string", "const": "balanced"}]},
                {"type": "array", "items": {"type": "integer"}},
                {
                    "type": "object",
                    "properties": {"file": {"type": "string", "x-retort-file": "file"}},
                    "required": ["file"],
                    "additionalProperties": false
                }
            ]
        },
        "Codes": reference(&["tokenizer"]),
        "Pictures": {
            "type": "object",
            "properties": {
                "folder": {"type": ["string", "null"], "x-retort-file": "images"},
                "csv": {"type": ["string", "null"], "x-retort-file": "file"},
                "size": {"type": ["integer", "null"]},
                "flip": {"type": "boolean", "default": false}
            },
            "additionalProperties": false
        },
        "Schedule": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "const": "constant"},
                        "rate": {"type": "number", "format": "double", "default": 0.001}
                    },
                    "required": ["type"],
                    "additionalProperties": false
                },
                {
                    "type": "object",
                    "properties": {
                        "type": {"type": "string", "const": "cosine"},
                        "rate": {"type": "number", "format": "double", "default": 0.001},
                        "warmup": {"type": "integer", "format": "uint64", "minimum": 0, "default": 100}
                    },
                    "required": ["type"],
                    "additionalProperties": false
                }
            ]
        },
        "Source": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"stage": reference(&["samples"])},
                    "required": ["stage"],
                    "additionalProperties": false
                },
                {
                    "type": "object",
                    "properties": {"file": {"type": "string", "x-retort-file": "dir"}},
                    "required": ["file"],
                    "additionalProperties": false
                }
            ]
        }
    })
}

/// An option that names a stage with output of one of these kinds.
fn reference(kinds: &[&str]) -> Value {
    json!({"type": "string", "x-retort-artifact": kinds})
}

fn properties_of_everything() -> Value {
    json!({
        "data": {"type": "string", "description": "The images.", "x-retort-file": "file"},
        "steps": steps(),
        "flag": {"type": "boolean", "default": false},
        "times": {"type": "array", "items": {"type": "integer", "minimum": 0}, "default": [0]},
        "guidance": {"type": ["number", "null"], "format": "double", "default": null},
        "loss": {"$ref": "#/$defs/Loss", "description": "Which loss.", "default": "l2"},
        "labels": {"$ref": "#/$defs/Labels", "default": "balanced"},
        "set": {"anyOf": [{"$ref": "#/$defs/Codes"}, {"type": "null"}], "default": null},
        "schedule": {
            "anyOf": [{"$ref": "#/$defs/Schedule"}, {"type": "null"}],
            "default": {"type": "cosine", "warmup": 100, "rate": 0.001}
        },
        "sources": {
            "type": "object", "additionalProperties": {"$ref": "#/$defs/Source"}, "default": {}
        }
    })
}

fn steps() -> Value {
    json!({"type": "integer", "format": "uint64", "minimum": 1, "default": 1000})
}
