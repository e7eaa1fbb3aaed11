//! Plans: recipes with everything settled.
//!
//! In: a [`crate::recipe::Recipe`] and what the plugins say of themselves ([`Descriptions`]). Out: stages in an order
//! in which they can run, with complete options, a device, a seed and the plugin's identity, and, once the hashes of
//! inputs and files are known, the digest under which a stage's result is found again ([`digest`]). Deliberately
//! absent: running, and asking the history.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use retort_abi::{Description, Device, StageJob};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::diagnostic::{Finding, Position};

/// A recipe with everything settled. Serialised, it is what a run freezes and `resume` continues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Name of the recipe.
    pub name: String,
    /// What it is for, as written.
    pub description: Option<String>,
    /// The recipe's file, absolute.
    pub path: PathBuf,
    /// The recipe's text, as read.
    pub text: String,
    /// Changes from `--set`, as typed.
    pub set: Vec<String>,
    /// Directory that relative paths in options start from: the recipe's, absolute.
    pub base_dir: PathBuf,
    /// The recipe's seed, from which stages' seeds are derived.
    pub seed: u64,
    /// The stages, each after all that it refers to.
    pub stages: Vec<PlannedStage>,
    /// Warnings met on the way.
    pub warnings: Vec<Finding>,
}

/// One stage of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Its name in the recipe.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// What it is for, as written.
    pub description: Option<String>,
    /// The plugin that runs it.
    pub plugin: PluginIdentity,
    /// `cpu`, `cuda:0`; never `auto`.
    pub device: String,
    /// `f32`, `bf16`.
    pub dtype: String,
    /// Threads it may use.
    pub threads: Threads,
    /// Seed of all its random numbers; below 2^53, so that JSON readers keep it.
    pub seed: u64,
    /// When to end an attempt; `None` is never.
    #[serde(with = "seconds")]
    pub timeout: Option<Duration>,
    /// Options, complete; references are names of stages, paths as written.
    pub options: Value,
    /// Where in the options other stages are named.
    pub references: Vec<Reference>,
    /// Where in the options files are named.
    pub files: Vec<FileOption>,
    /// Kind of the artifact that references to this stage stand for.
    pub output_kind: String,
    /// Revision of the stage's kind: part of the digest.
    pub revision: u32,
    /// Where each value came from, by JSON pointer into the stage (`/options/steps`, `/device`).
    pub origins: BTreeMap<String, Origin>,
    /// Where the stage stands in the recipe.
    pub position: Option<Position>,
}

/// Which plugin exactly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PluginIdentity {
    /// Name in recipes.
    pub name: String,
    /// Its shared object.
    pub path: PathBuf,
    /// Its version.
    pub version: String,
    /// BLAKE3 of the shared object, hex.
    pub hash: String,
}

/// How many threads a stage may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Threads {
    /// As the recipe says.
    Fixed(usize),
    /// An equal part of the machine's cores among the stages that may run at the same time.
    Share,
}

/// An option that names another stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// JSON pointer into the options.
    pub pointer: String,
    /// The stage named.
    pub stage: String,
    /// Kinds of artifact the option accepts; empty: any.
    pub kinds: Vec<String>,
}

/// An option that names a file or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOption {
    /// JSON pointer into the options.
    pub pointer: String,
    /// The path, absolute (joined to the recipe's directory); not necessarily there.
    pub path: PathBuf,
    /// What has to be there.
    pub kind: FileKind,
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// One file.
    File,
    /// A directory, with everything in it.
    Dir,
}

/// Where a value came from. As text: `recipe:14`, `--set`, `params`, `default`, `derived`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Origin {
    /// Written in the recipe, on this line.
    Recipe(usize),
    /// `--set`.
    Set,
    /// `${params...}` or `${paths...}`.
    Params,
    /// The default of the schema or of the runner.
    Default,
    /// Computed: a stage's seed from the recipe's, a device from `auto`.
    Derived,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Recipe(line) => write!(f, "recipe:{line}"),
            Origin::Set => f.write_str("--set"),
            Origin::Params => f.write_str("params"),
            Origin::Default => f.write_str("default"),
            Origin::Derived => f.write_str("derived"),
        }
    }
}

impl From<Origin> for String {
    fn from(origin: Origin) -> Self {
        origin.to_string()
    }
}

impl TryFrom<String> for Origin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "--set" => Ok(Origin::Set),
            "params" => Ok(Origin::Params),
            "default" => Ok(Origin::Default),
            "derived" => Ok(Origin::Derived),
            other => other
                .strip_prefix("recipe:")
                .and_then(|line| line.parse().ok())
                .map(Origin::Recipe)
                .ok_or_else(|| format!("unknown origin `{other}`")),
        }
    }
}

/// Digest of a stage: equal digests mean that a result can be reused.
#[derive(Debug, Clone, PartialEq)]
pub struct Digest {
    /// BLAKE3 of the components' canonical JSON, hex.
    pub hex: String,
    /// What went in, each component under its own name, keys sorted.
    pub components: Value,
}

/// What plugins say of themselves. The runner's plugin search is one implementation, tests bring another.
pub trait Descriptions {
    /// The plugin of that name and its description, from a cache where possible.
    fn describe(&mut self, plugin: &str) -> Result<(PluginIdentity, Description), DescribeError>;

    /// The devices really present. Starts a worker; asked only where the device is not plainly `cpu`.
    fn devices(&mut self, plugin: &str) -> Result<Vec<Device>, DescribeError>;

    /// The plugin's own checks of complete options; one list of findings per job. Starts a worker.
    fn validate(
        &mut self,
        plugin: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<retort_abi::Diagnostic>>, DescribeError>;

    /// Names of all plugins found: for hints and for `retort schema`.
    fn names(&mut self) -> Vec<String>;
}

/// Why a plugin could not be described. Exit code 5.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DescribeError {
    /// What happened: not found (and where it was looked for), not loadable, no plugin at all.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Digest of a stage from the content hashes of its inputs (by name of the stage that made them) and of its files (by
/// pointer into the options). `None` while one of them is not known.
///
/// In it: kind and revision, options with references and paths replaced by content hashes, seed, kind of device,
/// dtype, plugin name, version and file hash. Not in it: names of stages, threads, timeout, description, paths.
pub fn digest(
    stage: &PlannedStage,
    input_hashes: &BTreeMap<String, String>,
    file_hashes: &BTreeMap<String, String>,
) -> Option<Digest> {
    let mut options = stage.options.clone();
    for reference in &stage.references {
        let hash = input_hashes.get(&reference.stage)?;
        *options.pointer_mut(&reference.pointer)? = Value::String(format!("artifact:{hash}"));
    }
    for file in &stage.files {
        let hash = file_hashes.get(&file.pointer)?;
        *options.pointer_mut(&file.pointer)? = Value::String(format!("file:{hash}"));
    }
    let device_kind = stage.device.split(':').next().unwrap_or_default();
    let components = sorted(json!({
        "device": device_kind,
        "dtype": stage.dtype,
        "kind": {"name": stage.kind, "revision": stage.revision},
        "options": options,
        "plugin": {"hash": stage.plugin.hash, "name": stage.plugin.name, "version": stage.plugin.version},
        "seed": stage.seed,
    }));
    let hex = blake3::hash(components.to_string().as_bytes())
        .to_hex()
        .to_string();
    Some(Digest { hex, components })
}

/// The value with the keys of all its objects sorted: equal values get equal texts.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let entries: BTreeMap<String, Value> = map
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect();
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Durations as seconds in JSON.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(
        duration: &Option<Duration>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        duration
            .map(|duration| duration.as_secs_f64())
            .serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Duration>, D::Error> {
        let seconds = Option::<f64>::deserialize(deserializer)?;
        seconds
            .map(|seconds| Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom))
            .transpose()
    }
}
