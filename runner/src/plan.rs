//! Plans: recipes with everything settled.
//!
//! In: a [`crate::recipe::Recipe`] and what the plugins say of themselves ([`Descriptions`]). Out: stages in an order
//! in which they can run, with complete options, a device, a seed and the plugin's identity, and, once the hashes of
//! inputs and files are known, the digest under which a stage's result is found again ([`digest`]). What would run
//! and why is `plan/decision.rs`. Deliberately absent: running, and reading the store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use retort_abi::{Device, Severity, StageJob};
use retort_checkpoint::{regular, sign};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::diagnostic::{Cause, Finding, Position, Report};
use crate::recipe::{self, Given, Recipe};
use crate::terminal;
use crate::yaml::{Part, escape, odd_space};

mod build;
pub mod decision;
mod digest;
#[cfg(test)]
pub(crate) mod fake;
mod planner;

pub use build::Build;
pub use digest::{Digest, digest};

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
    /// Artifacts of the store that stages take by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given: Vec<Given>,
    /// The stages, each after all that it refers to.
    pub stages: Vec<PlannedStage>,
    /// Warnings met on the way.
    pub warnings: Vec<Finding>,
    /// What the plan chose by itself and somebody may want to know.
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
    /// Devices of the worker processes that divide its work, one each; empty where one process does all of it.
    #[serde(default)]
    pub workers: Vec<String>,
    /// Whether these work on the same thing and wait for each other.
    #[serde(default)]
    pub together: bool,
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

impl FileOption {
    /// Why it cannot be read, in words; nothing is opened for that.
    pub fn problem(&self) -> Option<String> {
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
            // What a folder holds, whoever reads it says.
            FileKind::Weights => found.is_file() || found.is_dir(),
        };
        let kind = regular::kind(found.file_type());
        (!there).then(|| format!("{shown} is {kind}, not a {what}"))
    }
}

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// One file.
    File,
    /// A directory, with everything in it.
    Dir,
    /// A directory, with the files in it that a loader of images reads.
    Images,
    /// Weights of a network: a file, or the folder or index of several.
    Weights,
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

/// What plugins say of themselves. The runner's plugin search is one implementation, tests bring another.
pub trait Descriptions {
    /// The plugin of that name and its description, from a cache where possible.
    fn describe(&mut self, plugin: &str) -> Result<Rc<Build>, DescribeError>;

    /// The other builds of that plugin, for other devices: alike but for devices and dtypes. Asked only where the device
    /// is not plainly one of the plugin's own.
    fn variants(&mut self, plugin: &str) -> Vec<Result<Rc<Build>, DescribeError>>;

    /// The devices really present. Starts a worker; asked only where the device is not plainly `cpu`.
    fn devices(&mut self, plugin: &PluginIdentity) -> Result<Vec<Device>, DescribeError>;

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

/// Settles a recipe. All mistakes that can be told apart are reported at once.
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
    /// Hashes of the artifacts that are given, by name.
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

    /// Files that options name and that are not there, or by their first bytes not what their names say, as errors: nothing
    /// can run without them. Asked before anything is hashed.
    pub fn missing_files(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for stage in &self.stages {
            for file in &stage.files {
                let finding = |problem: String| {
                    let message = format!("stage `{}`: {problem}", stage.name);
                    let pointer = format!("/stages/{}{}", escape(&stage.name), file.pointer);
                    Finding::error(pointer, message)
                };
                if let Some(problem) = file.problem() {
                    let written = stage.options.pointer(&file.pointer).and_then(Value::as_str);
                    let hint = self.path_hint(written.unwrap_or_default());
                    findings.push(finding(problem).hint(hint));
                    continue;
                }
                let broken = match file.kind {
                    FileKind::File => sign::broken(&file.path).map(|why| (file.path.clone(), why)),
                    FileKind::Images => sign::broken_in(&file.path),
                    FileKind::Dir | FileKind::Weights => None,
                };
                if let Some((path, why)) = broken {
                    findings.push(finding(format!("{}: {why}", path.display())));
                }
            }
        }
        self.place(findings)
    }

    /// What may be wrong with a path that leads nowhere.
    fn path_hint(&self, written: &str) -> String {
        if let Some(odd) = written.chars().find(|&c| terminal::is_odd_space(c)) {
            return odd_space(odd);
        }
        if written.starts_with("~/") || written == "~" {
            return "`~/` is not replaced: HOME is not set to a directory".to_owned();
        }
        if written.starts_with('~') {
            return "of paths that begin with `~` only `~/` is replaced, by your home directory; write the path of another out"
                .to_owned();
        }
        if written.contains('$') {
            return "variables of the environment are not replaced in recipes; write the path out, begin it with `~/`, or use ${params.name}"
                .to_owned();
        }
        let base = self.base_dir.display();
        format!("relative paths start from the recipe's directory, {base}")
    }

    /// An option of a stage that the work on it found to be wrong.
    pub fn option_at_fault(&self, stage: &str, pointer: &str, message: &str) -> Vec<Finding> {
        let pointer = format!("/stages/{}{pointer}", escape(stage));
        let message = format!("stage `{stage}`: {message}");
        self.place(vec![Finding::error(pointer, message)])
    }

    /// Gives findings their places in the recipe's text.
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
                .map(|finding| recipe.source.place(finding, Part::Value))
                .collect(),
            // Cannot be: the plan was made from this text.
            Err(_) => findings,
        }
    }

    /// What a stage is given to validate or run; without work directory and inputs.
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
            part: None,
        }
    }

    /// The plugins' own checks of the complete options, beyond their schemas. Starts a worker per plugin.
    pub fn validate(&self, plugins: &mut dyn Descriptions) -> Vec<Finding> {
        let mut names: Vec<&str> = Vec::new();
        for stage in &self.stages {
            if !names.contains(&stage.plugin.name.as_str()) {
                names.push(&stage.plugin.name);
            }
        }
        let mut findings = Vec::new();
        for name in names {
            let stages: Vec<&PlannedStage> = self
                .stages
                .iter()
                .filter(|stage| stage.plugin.name == name)
                .collect();
            let jobs: Vec<StageJob> = stages
                .iter()
                .map(|stage| self.job(stage, stage.threads.count(1)))
                .collect();
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::planner::derived_seed;
    use super::*;

    const HEAD: &str =
        "version: 1\nbackend: fake\nstages:\n  codes: {kind: tokenizer, data: d.csv}\n";

    /// Plans a recipe and compares the findings: line, column, part of what is said; in order of places.
    fn check(text: &str, expected: &[(usize, usize, &str)]) {
        let report = fake::plan(text, &[]).unwrap_err();
        let mut found: Vec<(usize, usize, String)> = report
            .findings
            .iter()
            .map(|finding| {
                let at = finding.position.unwrap_or(Position { line: 0, column: 0 });
                (
                    at.line,
                    at.column,
                    format!(
                        "{} / {}",
                        finding.message,
                        finding.hint.clone().unwrap_or_default()
                    ),
                )
            })
            .collect();
        found.sort();
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for ((line, column, said), (at_line, at_column, part)) in found.iter().zip(expected) {
            assert!(
                (line, column) == (at_line, at_column) && said.contains(part),
                "{found:#?}\nnot {part}"
            );
        }
    }

    #[test]
    fn everything_is_settled() {
        let text = format!(
            "seed: 7\nparams: {{w: 96}}\n{HEAD}  teacher:\n    kind: pretrain\n    tokenizer: codes\n    width: ${{params.w}}\n    timeout: 90s\n"
        );
        let plan = fake::plan(&text, &["teacher.steps=5", "threads=3"]).unwrap();
        let teacher = plan.stage("teacher").unwrap();
        assert_eq!(
            teacher.options,
            json!({
                "tokenizer": "codes", "width": 96, "steps": 5, "guidance": null,
                "schedule": {"type": "cosine", "warmup": 100, "rate": 0.001}
            })
        );
        assert_eq!(teacher.device, "cpu");
        assert_eq!(teacher.dtype, "f32");
        assert_eq!(teacher.threads, Threads::Fixed(3));
        assert_eq!(teacher.seed, derived_seed(7, "teacher"));
        assert_eq!(teacher.timeout, Some(Duration::from_secs(90)));
        assert_eq!(teacher.output_kind, "teacher");
        let origins: BTreeMap<&str, String> = teacher
            .origins
            .iter()
            .map(|(pointer, origin)| (pointer.as_str(), origin.to_string()))
            .collect();
        let expected = [
            ("/device", "derived"),
            ("/dtype", "default"),
            ("/kind", "recipe:8"),
            ("/options/guidance", "default"),
            ("/options/schedule/rate", "default"),
            ("/options/schedule/type", "default"),
            ("/options/schedule/warmup", "default"),
            ("/options/steps", "--set"),
            ("/options/tokenizer", "recipe:9"),
            ("/options/width", "params"),
            ("/seed", "derived"),
            ("/threads", "--set"),
            ("/timeout", "recipe:11"),
        ];
        assert_eq!(
            origins,
            expected
                .map(|(pointer, origin)| (pointer, origin.to_owned()))
                .into()
        );
        let frozen: Plan = serde_json::from_value(serde_json::to_value(&plan).unwrap()).unwrap();
        assert_eq!(frozen, plan);
    }

    #[test]
    fn missing_files_are_warnings_of_the_plan() {
        let plan = fake::plan(HEAD, &[]).unwrap();
        let [warning] = plan.warnings.as_slice() else {
            panic!("{:?}", plan.warnings)
        };
        assert_eq!(warning.severity, Severity::Warning);
        assert_eq!(
            warning.position,
            Some(Position {
                line: 4,
                column: 34
            })
        );
        assert!(warning.message.contains("/base/d.csv does not exist"));
    }

    #[test]
    fn stages_come_after_their_inputs() {
        let text = "version: 1\nbackend: fake\nstages:\n  b: {kind: pretrain, tokenizer: a}\n  z: {kind: tokenizer, data: d}\n  a: {kind: tokenizer, data: d}\n";
        let plan = fake::plan(text, &[]).unwrap();
        let names: Vec<&str> = plan
            .stages
            .iter()
            .map(|stage| stage.name.as_str())
            .collect();
        assert_eq!(names, ["z", "a", "b"]);
    }

    #[test]
    fn independent_mistakes_are_reported_together() {
        check(
            &format!(
                "seed: -1\n{HEAD}  a: {{kind: pretrain, tokenizer: code, stpes: 3}}\n  b: {{kind: pretrian}}\n  c: {{kind: pretrain, tokenizer: codes, steps: many, schedule: {{type: cosin}}}}\n  d: {{kind: pretrain, tokenizer: a}}\n"
            ),
            &[
                (1, 7, "at least 0"),
                (
                    6,
                    34,
                    "`tokenizer` names the stage `code`, which is not in the recipe / did you mean `codes`?",
                ),
                (
                    6,
                    40,
                    "unknown option `stpes` of `pretrain` / did you mean `steps`?",
                ),
                (7, 13, "no stage kind `pretrian` / did you mean `pretrain`?"),
                (
                    8,
                    48,
                    "`steps`: expected a whole number, got the text \"many\"",
                ),
                (
                    8,
                    71,
                    "`schedule.type`: expected one of `constant`, `cosine`, got \"cosin\" / did you mean `cosine`?",
                ),
                (
                    9,
                    34,
                    "wants `tokenizer`, but stage `a` (pretrain) makes `teacher` / stages that make `tokenizer`: `codes`",
                ),
            ],
        );
    }

    #[test]
    fn cycles_are_named_in_full() {
        let stage = |name: &str, teacher: &str| {
            format!("  {name}: {{kind: distill, tokenizer: codes, teacher: {teacher}}}\n")
        };
        check(
            &format!(
                "{HEAD}{}{}{}",
                stage("a", "b"),
                stage("b", "c"),
                stage("c", "a")
            ),
            &[(5, 49, "in a circle: a -> b -> c -> a")],
        );
        check(
            &format!("{HEAD}{}", stage("a", "a")),
            &[(5, 49, "`a` needs itself")],
        );
    }

    #[test]
    fn duplicate_stages_are_one_mistake() {
        check(
            &format!("{HEAD}  codes: {{kind: nothing}}\n"),
            &[(5, 3, "a second stage `codes` (first on line 4)")],
        );
    }

    #[test]
    fn plugins_at_fault_are_told_apart() {
        let missing = HEAD.replace("fake", "torch");
        check(&missing, &[(2, 10, "plugin `torch` was not found")]);
        assert!(fake::plan(&missing, &[]).unwrap_err().only_plugins());
        check(
            &HEAD.replace("backend: fake\n", ""),
            &[(1, 1, "`backend` is missing / write `backend: fake`")],
        );
    }

    #[test]
    fn devices_and_times_are_checked() {
        let with = |line: &str| format!("{line}\n{HEAD}");
        check(&with("device: gpu"), &[(1, 9, "expected `auto`, `cpu`")]);
        check(
            &with("device: cuda:7").replace("fake", "gpu"),
            &[(
                1,
                9,
                "there is no device `cuda:7` on this machine / usable here: `cpu`, `cuda:1`",
            )],
        );
        check(
            &with("device: cuda:0").replace("fake", "gpu"),
            &[(1, 9, "device `cuda:0` cannot be used: too old")],
        );
        check(&with("dtype: f64"), &[(1, 8, "does not compute in `f64`")]);
        check(
            &format!("{HEAD}  b: {{kind: tokenizer, data: d, timeout: soon}}\n"),
            &[(5, 42, "write a time like")],
        );
        let device = |set: &str| fake::plan(HEAD, &[set]).unwrap().stages[0].device.clone();
        assert_eq!(device("device=auto"), "cpu");
        assert_eq!(device("backend=gpu"), "cuda:1");
        assert_eq!(
            device("codes={kind: tokenizer, data: d, plugin: gpu, device: cuda}"),
            "cuda:1"
        );
    }

    #[test]
    fn the_device_chooses_the_variant() {
        let varied = HEAD.replace("fake", "varied");
        let planned = |set: &[&str]| {
            let plan = fake::plan(&varied, set).unwrap();
            let stage = plan.stages[0].clone();
            (stage.plugin.hash, stage.device, plan.notes)
        };
        let on_gpu = ("beef".to_owned(), "cuda:1".to_owned());
        let (hash, device, notes) = planned(&[]);
        assert_eq!((hash, device), on_gpu);
        assert_eq!(notes, ["device `auto` is cuda:1"]);
        let (hash, device, notes) = planned(&["device=cuda", "dtype=f16"]);
        assert_eq!((hash, device), on_gpu);
        assert!(notes.is_empty());
        let (hash, device, _) = planned(&["device=cpu"]);
        assert_eq!((hash.as_str(), device.as_str()), ("f00d", "cpu"));
        check(
            &format!("device: cpu\ndtype: f16\n{varied}"),
            &[(2, 8, "does not compute in `f16`")],
        );
        check(
            &format!("device: cuda:0\n{varied}"),
            &[(1, 9, "device `cuda:0` cannot be used: too old")],
        );
    }

    #[test]
    fn workers_divide_what_can_be_divided() {
        let text =
            "version: 1\nbackend: fake\nstages:\n  a: {kind: everything, data: d, workers: 3}\n";
        let planned = |text: &str, set: &[&str]| {
            let plan = fake::plan(text, set).unwrap();
            (plan.stages[0].clone(), plan.notes)
        };
        let (stage, notes) = planned(text, &[]);
        assert_eq!((stage.workers, notes), (vec!["cpu".to_owned(); 3], vec![]));
        assert!(planned(text, &["a.workers=1"]).0.workers.is_empty());
        let (stage, notes) = planned(text, &["backend=gpu", "device=cuda"]);
        assert_eq!(stage.device, "cuda:1");
        assert_eq!(stage.workers, ["cuda:1", "cuda:2", "cuda:1"]);
        assert_eq!(notes, ["stage `a`: its workers are on cuda:1, cuda:2"]);
        let (stage, notes) = planned(text, &["backend=gpu", "device=cuda:2"]);
        assert_eq!(
            (stage.workers, notes),
            (vec!["cuda:2".to_owned(); 3], vec![])
        );
        check(
            &format!("{HEAD}  b: {{kind: tokenizer, data: d, workers: 2}}\n"),
            &[(
                5,
                42,
                "stage `b`: the work of a `tokenizer` cannot be divided among workers / kinds that can be: `everything`",
            )],
        );
        check(
            &format!("{HEAD}  b: {{kind: pretrain, tokenizer: codes, workers: 2}}\n"),
            &[(
                5,
                50,
                "stage `b`: plugin `fake` has no way for the workers of a `pretrain` to add up gradients / take a plugin that \
                 can: `backend: libtorch`; or leave `workers` out",
            )],
        );
        check(
            &format!("{HEAD}  b: {{kind: everything, data: d, workers: 0}}\n"),
            &[(5, 43, "at least 1")],
        );
    }
}
