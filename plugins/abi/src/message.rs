//! The JSON messages that cross the plugin boundary.
//!
//! Everything except metrics and progress is JSON text. It evolves by added fields; both sides ignore unknown ones. No tensor
//! ever crosses; results are files committed as artifacts.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A plugin's description (`describe`): pure, the same at every call, without using a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// The name by which recipes ask for the plugin (`backend: candle`).
    pub name: String,
    /// Version of the plugin (semantic versioning).
    pub version: String,
    /// One line for people.
    #[serde(default)]
    pub summary: String,
    /// SPDX licence expression.
    #[serde(default)]
    pub license: String,
    /// Kinds of device this build can drive: `cpu`, `cuda`. The first is what `auto` falls back to.
    pub devices: Vec<String>,
    /// Element types it computes in: `f32`, `bf16`.
    pub dtypes: Vec<String>,
    /// Libraries it uses, with version and path, for people.
    #[serde(default)]
    pub libraries: Vec<String>,
    /// Model families it knows: `llamagen`, `var`.
    #[serde(default)]
    pub families: Vec<String>,
    /// Kinds of stage it runs.
    pub stages: Vec<StageKind>,
}

/// A kind of stage a plugin can run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageKind {
    /// Name in recipes (`kind: distill`).
    pub kind: String,
    /// One line for people.
    #[serde(default)]
    pub summary: String,
    /// Kind of the artifact that a reference to such a stage yields.
    pub output: String,
    /// Raised when the same options would now give a different result: part of the stage's digest.
    #[serde(default)]
    pub revision: u32,
    /// Whether several processes can share the work ([`StageJob::part`]): recipes may then say `workers: 4`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub divisible: bool,
    /// Whether these processes work on one result and wait for each other (they meet at `MASTER_ADDR` and `MASTER_PORT`), so
    /// that all must run at the same time. Only the first reports metrics and progress.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub together: bool,
    /// JSON Schema (2020-12) of the options: an object schema with `additionalProperties: false`, with `default`s. String
    /// schemas may carry two annotations: `x-retort-artifact: [kinds]` marks the name of another stage whose output is one of
    /// these kinds; `x-retort-file: "file" | "dir" | "images" | "weights"` marks a path (relative to the recipe). Any schema
    /// may carry `x-retort-same-result: true`: another value of that option gives the same output, so its result can be
    /// reused.
    pub schema: Value,
}

/// A device as found by `probe`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// `cpu`, `cuda:0`, ...
    pub name: String,
    /// Model name for people.
    #[serde(default)]
    pub model: String,
    /// Bytes of memory, where known.
    #[serde(default)]
    pub memory: Option<u64>,
    /// Why it cannot be used; `None` when it can.
    #[serde(default)]
    pub unusable: Option<String>,
}

impl Device {
    /// A usable device of which only the name is known.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            model: String::new(),
            memory: None,
            unusable: None,
        }
    }
}

/// One stage to validate or run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageJob {
    /// The stage's name in the recipe.
    pub stage: String,
    /// Its kind.
    pub kind: String,
    /// Options, complete (defaults filled in); references still name stages, paths are as written.
    pub options: Value,
    /// Seed of every random number of the stage.
    pub seed: u64,
    /// `cpu`, `cuda:0`; never `auto`.
    pub device: String,
    /// `f32`, `bf16`.
    pub dtype: String,
    /// Threads the stage may use.
    pub threads: usize,
    /// Directory that relative paths in the options start from.
    pub base_dir: PathBuf,
    /// Directory shared by attempts of the same stage (checkpoints, finished shards). Absent in `validate`.
    #[serde(default)]
    pub work_dir: Option<PathBuf>,
    /// Inputs by the name of the stage that made them. Empty in `validate`.
    #[serde(default)]
    pub inputs: BTreeMap<String, Input>,
    /// In `validate`, the stages on which this one depends, directly or not, by name: what their options say about its inputs
    /// can be checked before anything runs. Of very large recipes some are left out. Empty in `run`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sources: BTreeMap<String, SourceStage>,
    /// Which inputs are data that the options hold themselves, prepared by another stage: the name of that stage by the
    /// option's pointer. A plugin may read the data instead; the result must be the same.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub prepared: BTreeMap<String, String>,
    /// Which part of the work to do, for a divisible kind. A part leaves its output in the work directory and commits no
    /// artifact; a final job without a part makes the artifact from all parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
}

/// A stage on which another depends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceStage {
    /// Its kind. It may be one of another plugin.
    pub kind: String,
    /// Its options, complete.
    pub options: Value,
}

/// A part of a stage's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its number, from 0.
    pub index: usize,
    /// The number of parts.
    pub of: usize,
}

impl Part {
    /// Whether this part makes the piece of this number.
    pub fn takes(self, piece: usize) -> bool {
        piece % self.of == self.index
    }
}

/// An artifact given to a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Input {
    /// Its kind (`teacher`, `trajectories`, ...).
    pub kind: String,
    /// Directory with its files; read-only.
    pub path: PathBuf,
    /// Content hash, hex BLAKE3.
    pub hash: String,
}

/// What a successful stage returns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageResult {
    /// Id (from `artifact_commit`) of the artifact that references to this stage stand for; of a part 0.
    pub output: u64,
    /// Facts worth keeping, free-form; the host takes up to 4 MiB of JSON.
    #[serde(default)]
    pub summary: Value,
}

impl StageResult {
    /// The result of a [`Part`], which makes no artifact.
    pub fn of_part() -> Self {
        Self {
            output: 0,
            summary: Value::Null,
        }
    }
}

/// Facts about an artifact, given at commit. Unknown fields are kept in `extra`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ArtifactMeta {
    /// A table to show when the run ends and in `runs show`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<Table>,
    /// Path inside the artifact of an image to show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<String>,
    /// What that image shows, in a few words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caption: Option<String>,
    /// Anything else.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, Value>,
}

/// A small table: the first column names the rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// Title line.
    pub title: String,
    /// Column heads.
    pub columns: Vec<String>,
    /// Rows of cells: strings, numbers or null.
    pub rows: Vec<Vec<Value>>,
}

impl Table {
    /// A table without rows.
    pub fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        Self {
            title: title.into(),
            columns: columns.iter().map(|&column| column.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row: one cell per column.
    pub fn row(mut self, cells: impl IntoIterator<Item = Value>) -> Self {
        self.rows.push(cells.into_iter().collect());
        self
    }
}

impl From<Table> for ArtifactMeta {
    fn from(table: Table) -> Self {
        Self {
            table: Some(table),
            ..Self::default()
        }
    }
}

/// A finding of `validate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagnostic {
    /// `error` stops the plan, `warning` is shown.
    pub severity: Severity,
    /// JSON pointer into the stage's options (`/schedule/warmup`), empty for the stage as a whole.
    #[serde(default)]
    pub pointer: String,
    /// The error and the expectation.
    pub message: String,
    /// What to do.
    #[serde(default)]
    pub hint: Option<String>,
}

/// Severity of a [`Diagnostic`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The stage cannot run.
    Error,
    /// The stage can run.
    Warning,
}

/// Why a call failed; crosses the boundary as JSON in the error sink.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of failure, for programs.
    pub code: FailureCode,
    /// What happened, where, what was expected.
    pub message: String,
    /// Causes, outermost first.
    #[serde(default)]
    pub chain: Vec<String>,
    /// Whether the same attempt may succeed later.
    #[serde(default)]
    pub retryable: bool,
    /// JSON pointer into the stage's options, where one is at fault.
    #[serde(default)]
    pub pointer: Option<String>,
    /// What to do.
    #[serde(default)]
    pub hint: Option<String>,
}

impl Failure {
    /// Whether a retry may succeed: the failure says so, or contact with another worker was lost.
    pub fn is_retryable(&self) -> bool {
        self.retryable || self.code == FailureCode::WorkerLost
    }
}

/// Kinds of [`Failure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// Options that cannot work.
    InvalidOptions,
    /// A file or artifact is missing.
    MissingInput,
    /// A file or artifact is malformed.
    BadData,
    /// Out of device memory.
    OutOfMemory,
    /// NaN or divergence.
    Numerical,
    /// Reading or writing failed.
    Io,
    /// Stopped because the host asked; work done so far is in the work directory.
    Cancelled,
    /// Another worker of the same training is gone, or timed out. The reason to record is what happened to that one.
    WorkerLost,
    /// The workers of a training no longer hold the same weights.
    WorkersDiffer,
    /// The plugin cannot do this.
    Unsupported,
    /// The plugin panicked.
    Panic,
    /// A bug.
    Internal,
}

impl From<std::io::Error> for Failure {
    /// An error of the operating system; put the path in front of it.
    fn from(error: std::io::Error) -> Self {
        Self::new(FailureCode::Io, error.to_string())
    }
}

impl Failure {
    /// A failure with only a code and a message.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            chain: Vec::new(),
            retryable: false,
            pointer: None,
            hint: None,
        }
    }

    /// Names the option at fault.
    pub fn at(mut self, pointer: impl Into<String>) -> Self {
        self.pointer = Some(pointer.into());
        self
    }

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
