//! Plans: recipes with everything resolved.
//!
//! In: a [`crate::recipe::Recipe`] and the plugins' descriptions ([`Descriptions`]). Out: stages in execution order, with
//! complete options, a device, a seed and the plugin's identity, and, once the hashes of inputs and files are known, the
//! digest that identifies a stage's result ([`digest`]). `plan/decision.rs` decides what would run and why. Deliberately
//! absent: running, and reading the store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use retort_abi::{Device, Severity, StageJob};
use retort_checkpoint::regular::{self, Extent};
use retort_checkpoint::signature;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::{Cause, Finding, Position, Report};
use crate::input::{FileKind, mostly_holes};
use crate::recipe::{self, ArtifactInput, Recipe};
use crate::terminal;
use crate::yaml::{EntryPart, escape, odd_space};

mod build;
pub mod decision;
mod dependencies;
mod digest;
#[cfg(test)]
pub(crate) mod fake;
mod planner;
mod prepared;
mod sources;
#[cfg(test)]
mod tests;

pub use build::Build;
pub use digest::{Digest, digest};

pub(crate) use dependencies::Dependencies;
pub(crate) use sources::{Sources, StageSources};

/// How long archives are checked before they are hashed: most faults are found by then, and a longer check, as on a slow
/// disk, does not pay.
const QUICK: Duration = Duration::from_millis(250);

/// A recipe with everything resolved. A run stores it serialised, and `resume` continues it.
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
    /// Where that came from.
    #[serde(default)]
    pub seed_origin: Origin,
    /// Artifacts of the store that stages take by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given: Vec<ArtifactInput>,
    /// The stages, each after all that it refers to.
    pub stages: Vec<PlannedStage>,
    /// Warnings met on the way.
    pub warnings: Vec<Finding>,
    /// Choices made by the plan.
    pub notes: Vec<String>,
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
    /// Devices of the worker processes that divide its work, one each; empty if one process does all of it.
    #[serde(default)]
    pub workers: Vec<String>,
    /// Whether these work on one result and wait for each other.
    #[serde(default)]
    pub together: bool,
    /// The minimum number of workers with which it may continue after others are lost for good; None: all are needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_workers: Option<usize>,
    /// How often it restarts with all of them, from the last checkpoint, when some are lost on one machine.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: usize,
    /// Seed of all its random numbers; below 2^53, so that JSON readers keep it.
    pub seed: u64,
    /// When to end an attempt; `None` is never.
    #[serde(with = "seconds")]
    pub timeout: Option<Duration>,
    /// Options, complete; references are names of stages, paths as written.
    pub options: Value,
    /// The options that name other stages.
    pub references: Vec<Reference>,
    /// The options that name files.
    pub files: Vec<FileOption>,
    /// The options that change no result.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub free: Vec<String>,
    /// Kind of the artifact that references to this stage stand for.
    pub output_kind: String,
    /// Revision of the stage's kind: part of the digest.
    pub revision: u32,
    /// Where each value came from, by JSON pointer into the stage (`/options/steps`, `/device`).
    pub origins: BTreeMap<String, Origin>,
    /// The stage's position in the recipe.
    pub position: Option<Position>,
    /// The stages that read what this one prepares, if the plan has added it for them; empty for a stage of the recipe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added_for: Vec<String>,
}

impl PlannedStage {
    /// The kind of its device: `cuda` for `cuda:1`.
    pub(crate) fn device_kind(&self) -> &str {
        self.device.split(':').next().unwrap_or_default()
    }

    /// The stages that prepare data of its options, by the pointers of these options.
    pub fn prepared(&self) -> BTreeMap<String, String> {
        let references = self.references.iter();
        references
            .filter(|reference| reference.prepared)
            .map(|reference| (reference.pointer.clone(), reference.stage.clone()))
            .collect()
    }
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
    /// Whether the option holds the data itself, which that stage prepares: no part of the digest.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prepared: bool,
}

/// An option that names a file or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOption {
    /// JSON pointer into the options.
    pub pointer: String,
    /// The path, absolute (joined to the recipe's directory); it may not exist.
    pub path: PathBuf,
    /// What has to be there.
    pub kind: FileKind,
}

impl FileOption {
    /// Why it cannot be read, in words.
    pub fn problem(&self) -> Option<String> {
        self.absent().or_else(|| self.hollow())
    }

    /// Why the path does not exist as this kind; opens nothing.
    fn absent(&self) -> Option<String> {
        let shown = self.path.display();
        let what = match self.kind {
            FileKind::File | FileKind::Weights => "file",
            FileKind::Dir | FileKind::Images => "directory",
        };
        let Ok(found) = std::fs::metadata(&self.path) else {
            return Some(format!("the {what} {shown} does not exist"));
        };
        let there = match self.kind {
            FileKind::File => found.is_file(),
            FileKind::Dir | FileKind::Images => found.is_dir(),
            // A folder's reader checks its content.
            FileKind::Weights => found.is_file() || found.is_dir(),
        };
        let kind = regular::kind(found.file_type());
        (!there).then(|| format!("{shown} is {kind}, not a {what}"))
    }

    /// Why reading it would be slow although it is nearly empty.
    fn hollow(&self) -> Option<String> {
        let found = std::fs::metadata(&self.path).ok()?;
        let extent = Extent::of(&found);
        let hollow = found.is_file() && extent.is_hollow();
        (hollow && regular::has_hole(&self.path).unwrap_or(false))
            .then(|| mostly_holes(&self.path, extent))
    }
}

/// The origin of a value. As text: `recipe:14`, `--set`, `params`, `default`, `derived`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Origin {
    /// Written in the recipe, on this line.
    Recipe(usize),
    /// `--set`.
    Set,
    /// `${params...}` or `${paths...}`.
    Params,
    /// The default of the schema or of the runner.
    #[default]
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

/// Descriptions of plugins. The runner's plugin search is one implementation, tests bring another.
pub trait Descriptions {
    /// The plugin of that name and its description, from a cache where possible.
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError>;

    /// The other builds of that plugin, which differ only in devices and dtypes. Called only if the device is not plainly one
    /// of the plugin's own.
    fn variants(&mut self, plugin: &str) -> Vec<Result<Rc<Build>, DescribeError>>;

    /// The devices really present. Starts a worker; called only if the device is not plainly `cpu`.
    fn devices(&mut self, plugin: &PluginIdentity) -> Result<Vec<Device>, DescribeError>;

    /// The devices of the machine on which stages of this kind will run, if that is not this one.
    fn devices_elsewhere(&self, _kind: &str) -> Option<Vec<Device>> {
        None
    }

    /// The plugin's own checks of complete options; one list of findings per job. Starts a worker.
    fn validate(
        &mut self,
        plugin: &str,
        jobs: &[StageJob],
    ) -> Result<Vec<Vec<retort_abi::Diagnostic>>, DescribeError>;

    /// Names of all plugins found: for hints and for `retort schema`.
    fn names(&mut self) -> Vec<String>;
}

/// Why a plugin has no description. Exit code 5.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct DescribeError {
    /// What happened: not found (with the searched directories), not loadable, not a plugin.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Resolves a recipe. All independent mistakes are reported at once.
pub fn plan(recipe: &Recipe, plugins: &mut dyn Descriptions) -> Result<Plan, Report> {
    let (stages, mut findings, notes) = planner::settle(recipe, plugins);
    if findings
        .iter()
        .any(|finding| finding.severity == Severity::Error)
    {
        findings.dedup();
        return Err(Report {
            path: recipe.source.path.clone(),
            text: recipe.source.text.clone(),
            findings,
        });
    }
    let plan = Plan {
        name: recipe.name.clone(),
        description: recipe.description.clone(),
        path: std::path::absolute(&recipe.source.path)
            .unwrap_or_else(|_| recipe.source.path.clone()),
        text: recipe.source.text.clone(),
        set: recipe.source.set.clone(),
        base_dir: recipe.source.base_dir.clone(),
        seed: recipe.seed.unwrap_or(0),
        seed_origin: match recipe.seed {
            Some(_) => planner::origin(&recipe.source, "/seed", Origin::Default),
            None => Origin::Default,
        },
        given: recipe.given.clone(),
        stages,
        warnings: Vec::new(),
        notes,
    };
    let missing = plan.missing_files().into_iter();
    findings.extend(missing.map(|finding| Finding {
        severity: Severity::Warning,
        ..finding
    }));
    Ok(Plan {
        warnings: findings,
        ..plan
    })
}

impl Plan {
    /// Hashes of the given artifacts, by name.
    pub fn given_hashes(&self) -> BTreeMap<String, String> {
        let given = self.given.iter();
        given
            .map(|given| (given.name.clone(), given.hash.clone()))
            .collect()
    }

    /// The stage of that name.
    pub fn stage(&self, name: &str) -> Option<&PlannedStage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// Files named by options that are missing, or whose first bytes contradict their names, as errors: nothing
    /// can run without them. Checked before hashing.
    pub fn missing_files(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let until = Instant::now() + QUICK;
        // The files of an added stage are those of the stages that it was added for.
        let written = self
            .stages
            .iter()
            .filter(|stage| stage.added_for.is_empty());
        for stage in written {
            for file in &stage.files {
                let finding = |problem: String| {
                    let message = format!("stage `{}`: {problem}", stage.name);
                    let pointer = format!("/stages/{}{}", escape(&stage.name), file.pointer);
                    Finding::error(pointer, message)
                };
                if let Some(problem) = file.absent() {
                    let written = stage.options.pointer(&file.pointer).and_then(Value::as_str);
                    let hint = self.path_hint(written.unwrap_or_default());
                    findings.push(finding(problem).hint(hint));
                    continue;
                }
                if let Some(problem) = file.hollow() {
                    findings.push(finding(problem));
                    continue;
                }
                let broken = match file.kind {
                    FileKind::File => {
                        signature::broken(&file.path, until).map(|why| (file.path.clone(), why))
                    }
                    FileKind::Images => signature::broken_in(&file.path, until),
                    FileKind::Dir | FileKind::Weights => None,
                };
                if let Some((path, why)) = broken {
                    findings.push(finding(format!("{}: {why}", path.display())));
                }
            }
        }
        self.place(findings)
    }

    /// Possible reasons why a path does not exist.
    fn path_hint(&self, written: &str) -> String {
        if let Some(odd) = written.chars().find(|&c| terminal::is_odd_space(c)) {
            return odd_space(odd);
        }
        if written.starts_with("~/") || written == "~" {
            return "`~/` is not replaced: HOME is not set to a directory".to_owned();
        }
        if written.starts_with('~') {
            return "only a leading `~/` is replaced, by your home directory; write other home directories in full"
                .to_owned();
        }
        if written.contains('$') {
            return "environment variables are not replaced in recipes; write the path in full, begin it with `~/`, or use ${params.name}"
                .to_owned();
        }
        let base = self.base_dir.display();
        format!("relative paths start from the recipe's directory, {base}")
    }

    /// A stage option that proved wrong at run time.
    pub fn option_at_fault(&self, stage: &str, pointer: &str, message: &str) -> Vec<Finding> {
        // The options of an added stage are written in those that it was added for.
        let reader = self
            .stage(stage)
            .and_then(|stage| stage.added_for.first())
            .map_or(stage, String::as_str);
        let pointer = format!("/stages/{}{pointer}", escape(reader));
        let message = format!("stage `{stage}`: {message}");
        self.place(vec![Finding::error(pointer, message)])
    }

    /// Gives findings their positions in the recipe's text.
    fn place(&self, findings: Vec<Finding>) -> Vec<Finding> {
        if findings.is_empty() {
            return findings;
        }
        match recipe::parse(
            &self.path,
            self.base_dir.clone(),
            self.text.clone(),
            &self.set,
        ) {
            Ok(recipe) => findings
                .into_iter()
                .map(|finding| recipe.source.place(finding, EntryPart::Value))
                .collect(),
            // Impossible: the plan was made from this text.
            Err(_) => findings,
        }
    }

    /// A stage's job for validation or running, without work directory and inputs.
    pub fn job(&self, stage: &PlannedStage, threads: usize) -> StageJob {
        StageJob {
            stage: stage.name.clone(),
            kind: stage.kind.clone(),
            options: stage.options.clone(),
            seed: stage.seed,
            device: stage.device.clone(),
            dtype: stage.dtype.clone(),
            threads,
            base_dir: self.base_dir.clone(),
            work_dir: None,
            inputs: BTreeMap::new(),
            sources: BTreeMap::new(),
            prepared: stage.prepared(),
            part: None,
        }
    }

    /// The plugins' own checks of the complete options, beyond their schemas. Starts a worker per plugin.
    pub fn validate(&self, plugins: &mut dyn Descriptions) -> Vec<Finding> {
        let mut sources = Sources::new(&self.stages);
        let sources = self.stages.iter().map(|stage| sources.of(stage)).collect();
        self.validate_with(sources, plugins)
    }

    /// The same, given the stages before each stage, which need not be in this plan.
    pub(crate) fn validate_with(
        &self,
        sources: Vec<StageSources>,
        plugins: &mut dyn Descriptions,
    ) -> Vec<Finding> {
        let mut names: Vec<&str> = Vec::new();
        for stage in &self.stages {
            if !names.contains(&stage.plugin.name.as_str()) {
                names.push(&stage.plugin.name);
            }
        }
        let mut findings = Vec::new();
        // The options of an added stage are checked where they are written.
        let mut open: Vec<(&PlannedStage, StageSources)> = self
            .stages
            .iter()
            .zip(sources)
            .filter(|(stage, _)| stage.added_for.is_empty())
            .collect();
        for name in names {
            let (own, others): (Vec<_>, Vec<_>) = open
                .into_iter()
                .partition(|(stage, _)| stage.plugin.name == name);
            open = others;
            let (stages, jobs): (Vec<&PlannedStage>, Vec<StageJob>) = own
                .into_iter()
                .map(|(stage, sources)| {
                    let job = self.job(stage, stage.threads.count(1));
                    (stage, StageJob { sources, ..job })
                })
                .unzip();
            match plugins.validate(name, &jobs) {
                Ok(answers) => {
                    for (stage, answers) in stages.iter().zip(answers) {
                        findings.extend(answers.into_iter().map(|answer| {
                            let pointer =
                                format!("/stages/{}{}", escape(&stage.name), answer.pointer);
                            let message = format!("stage `{}`: {}", stage.name, answer.message);
                            let finding = Finding::error(pointer, message);
                            Finding {
                                severity: answer.severity,
                                hint: answer.hint,
                                ..finding
                            }
                        }));
                    }
                }
                Err(error) => findings.push(Finding {
                    cause: Cause::Plugin,
                    hint: error.hint,
                    ..Finding::error("/backend", error.message)
                }),
            }
        }
        self.place(findings)
    }
}

impl Threads {
    /// The number of threads when up to `parallel` stages run at the same time.
    pub fn count(self, parallel: usize) -> usize {
        match self {
            Threads::Fixed(count) => count,
            Threads::Share => {
                let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
                (cores / parallel.max(1)).max(1)
            }
        }
    }
}

fn is_zero(count: &usize) -> bool {
    *count == 0
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
