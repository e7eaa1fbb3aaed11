//! Plans: recipes with everything settled.
//!
//! In: a [`crate::recipe::Recipe`] and what the plugins say of themselves ([`Descriptions`]). Out: stages in an order
//! in which they can run, with complete options, a device, a seed and the plugin's identity, and, once the hashes of
//! inputs and files are known, the digest under which a stage's result is found again ([`digest`]). What would run
//! and why is `plan/decision.rs`. Deliberately absent: running, and reading the store.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use retort_abi::{Description, Device, Severity, StageJob, StageKind};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::diagnostic::{Cause, Finding, Position, Report};
use crate::recipe::{self, Recipe, RecipeStage, Source, Written};
use crate::schema::{self, Target};
use crate::yaml::{Part, escape};

pub mod decision;
#[cfg(test)]
pub(crate) mod fake;

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

/// Settles a recipe. All mistakes that can be told apart are reported at once.
pub fn plan(recipe: &Recipe, plugins: &mut dyn Descriptions) -> Result<Plan, Report> {
    let mut planner = Planner {
        recipe,
        source: &recipe.source,
        plugins,
        known: BTreeMap::new(),
        devices: BTreeMap::new(),
        findings: recipe.findings.clone(),
    };
    let drafts: Vec<Draft<'_>> = recipe
        .stages
        .iter()
        .map(|stage| planner.draft(stage))
        .collect();
    planner.check_references(&drafts);
    let order = planner.order(&drafts);
    let mut stages: Vec<PlannedStage> = Vec::new();
    for index in order {
        let stage = planner.settle(&drafts[index]);
        stages.extend(stage);
    }
    let mut findings = planner.findings;
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
        stages,
        warnings: Vec::new(),
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
    /// The stage of that name.
    pub fn stage(&self, name: &str) -> Option<&PlannedStage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// Files that options name and that are not there, as errors: nothing can run without them.
    pub fn missing_files(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        for stage in &self.stages {
            for file in &stage.files {
                let (there, what) = match file.kind {
                    FileKind::File => (file.path.is_file(), "file"),
                    FileKind::Dir => (file.path.is_dir(), "directory"),
                };
                if there {
                    continue;
                }
                let shown = file.path.display();
                let message = match file.path.exists() {
                    true => format!("stage `{}`: {shown} is not a {what}", stage.name),
                    false => format!("stage `{}`: the {what} {shown} does not exist", stage.name),
                };
                let pointer = format!("/stages/{}{}", escape(&stage.name), file.pointer);
                findings.push(Finding::error(pointer, message).hint(format!(
                    "relative paths start from the recipe's directory, {}",
                    self.base_dir.display()
                )));
            }
        }
        self.place(findings)
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

/// The seed of a stage that names none: the first 8 bytes of a hash, below 2^53 so that JSON readers keep it.
pub fn derived_seed(recipe_seed: u64, stage: &str) -> u64 {
    let hash = blake3::hash(format!("{recipe_seed}/{stage}").as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes) & ((1 << 53) - 1)
}

/// What is known of a stage before its references are.
struct Draft<'a> {
    stage: &'a RecipeStage,
    /// `/stages/<name>`
    pointer: String,
    plugin: Option<(PluginIdentity, Description)>,
    /// Options with defaults; as written where they are invalid.
    options: Value,
    /// Pointers of defaults.
    filled: Vec<String>,
    references: Vec<Reference>,
    files: Vec<FileOption>,
}

impl Draft<'_> {
    fn kind(&self) -> Option<&StageKind> {
        let kind = self.stage.kind.as_ref()?;
        self.plugin
            .as_ref()?
            .1
            .stages
            .iter()
            .find(|known| known.kind == *kind)
    }
}

struct Planner<'a> {
    recipe: &'a Recipe,
    source: &'a Source,
    plugins: &'a mut dyn Descriptions,
    /// Plugins asked so far; `None` where that failed and has been reported.
    known: BTreeMap<String, Option<(PluginIdentity, Description)>>,
    devices: BTreeMap<String, Option<Vec<Device>>>,
    findings: Vec<Finding>,
}

impl<'a> Planner<'a> {
    fn report(&mut self, finding: Finding, part: Part) {
        let placed = self.source.place(finding, part);
        if !self.findings.contains(&placed) {
            self.findings.push(placed);
        }
    }

    /// Settles what a stage's own text decides.
    fn draft(&mut self, stage: &'a RecipeStage) -> Draft<'a> {
        let pointer = format!("/stages/{}", escape(&stage.name));
        let mut draft = Draft {
            stage,
            plugin: self.plugin_of(stage, &pointer),
            pointer,
            options: Value::Object(stage.options.clone()),
            filled: Vec::new(),
            references: Vec::new(),
            files: Vec::new(),
        };
        let (Some((identity, description)), Some(kind)) = (&draft.plugin, &stage.kind) else {
            return draft;
        };
        let Some(known) = description.stages.iter().find(|known| known.kind == *kind) else {
            let kinds = description.stages.iter().map(|known| known.kind.as_str());
            let message = format!(
                "stage `{}`: plugin `{}` has no stage kind `{kind}`",
                stage.name, identity.name
            );
            let finding = Finding::error(format!("{}/kind", draft.pointer), message);
            let hint = schema::suggest(kind, kinds);
            self.report(Finding { hint, ..finding }, Part::Value);
            return draft;
        };
        let mut options = Value::Object(stage.options.clone());
        let violations: Vec<_> = schema::check(&known.schema, &options, "option")
            .into_iter()
            // What could not be replaced has been reported.
            .filter(|violation| {
                let pointer = format!("{}{}", draft.pointer, violation.pointer);
                !self
                    .findings
                    .iter()
                    .any(|finding| finding.pointer == pointer)
            })
            .collect();
        for violation in &violations {
            let pointer = format!("{}{}", draft.pointer, violation.pointer);
            let message = match violation.message.strip_prefix("unknown option") {
                Some(rest) => format!("stage `{}`: unknown option{rest} of `{kind}`", stage.name),
                None => format!("stage `{}`: {}", stage.name, violation.message),
            };
            let finding = Finding::error(pointer, message);
            self.report(
                Finding {
                    hint: violation.hint.clone(),
                    ..finding
                },
                violation.part,
            );
        }
        if violations.is_empty() {
            draft.filled = schema::settle(&known.schema, &mut options);
        }
        for annotation in schema::annotations(&known.schema, &options) {
            let Some(text) = options.pointer(&annotation.pointer).and_then(Value::as_str) else {
                continue;
            };
            let pointer = annotation.pointer;
            match annotation.target {
                Target::Artifact(kinds) => {
                    draft.references.push(Reference {
                        pointer,
                        stage: text.to_owned(),
                        kinds,
                    });
                }
                target => draft.files.push(FileOption {
                    path: self.source.base_dir.join(text),
                    pointer,
                    kind: if target == Target::Dir {
                        FileKind::Dir
                    } else {
                        FileKind::File
                    },
                }),
            }
        }
        draft.options = options;
        draft
    }

    /// The plugin that runs a stage; what stands in the way is reported once.
    fn plugin_of(
        &mut self,
        stage: &RecipeStage,
        pointer: &str,
    ) -> Option<(PluginIdentity, Description)> {
        let (name, place) = match (&stage.plugin, &self.recipe.backend) {
            (Some(name), _) => (name, format!("{pointer}/plugin")),
            (None, Some(name)) => (name, "/backend".to_owned()),
            (None, None) => {
                let finding =
                    Finding::error("", "no plugin is named: the key `backend` is missing");
                let hint = match self.plugins.names().as_slice() {
                    [] => {
                        "no plugin was found; `retort plugin list` says where they are looked for"
                            .to_owned()
                    }
                    names => format!("write `backend: {}`", names.join("` or `backend: ")),
                };
                self.report(finding.hint(hint), Part::Key);
                return None;
            }
        };
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        let answer = match self.plugins.describe(name) {
            Ok(answer) => Some(answer),
            Err(error) => {
                let finding = Finding {
                    cause: Cause::Plugin,
                    hint: error.hint,
                    ..Finding::error(place, error.message)
                };
                self.report(finding, Part::Value);
                None
            }
        };
        self.known.insert(name.clone(), answer.clone());
        answer
    }

    /// Reports references to stages that are not there or make something else.
    fn check_references(&mut self, drafts: &[Draft<'_>]) {
        for draft in drafts {
            for reference in &draft.references {
                let at = format!("{}{}", draft.pointer, reference.pointer);
                // A `${...}` that could not be replaced.
                if self.findings.iter().any(|finding| finding.pointer == at) {
                    continue;
                }
                let option = reference.pointer[1..].replace('/', ".");
                let fits = |output: &str| {
                    reference.kinds.is_empty() || reference.kinds.iter().any(|kind| kind == output)
                };
                let fitting: Vec<&str> = drafts
                    .iter()
                    .filter(|other| other.stage.name != draft.stage.name)
                    .filter(|other| other.kind().is_some_and(|kind| fits(&kind.output)))
                    .map(|other| other.stage.name.as_str())
                    .collect();
                let wanted = match reference.kinds.as_slice() {
                    [] => "an artifact".to_owned(),
                    kinds => format!("`{}`", kinds.join("` or `")),
                };
                let fitting_hint = || match fitting.as_slice() {
                    [] => format!("no stage of this recipe makes {wanted}"),
                    names => format!("stages that make {wanted}: `{}`", names.join("`, `")),
                };
                let Some(target) = drafts
                    .iter()
                    .find(|other| other.stage.name == reference.stage)
                else {
                    let message = format!(
                        "stage `{}`: `{option}` names the stage `{}`, which is not in the recipe",
                        draft.stage.name, reference.stage
                    );
                    let names = drafts.iter().map(|other| other.stage.name.as_str());
                    let hint = match schema::nearest(&reference.stage, names) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => fitting_hint(),
                    };
                    self.report(Finding::error(at, message).hint(hint), Part::Value);
                    continue;
                };
                // An unknown kind has been reported.
                let Some(kind) = target.kind() else { continue };
                if !fits(&kind.output) {
                    let message = format!(
                        "stage `{}`: `{option}` wants {wanted}, but stage `{}` ({}) makes `{}`",
                        draft.stage.name, reference.stage, kind.kind, kind.output
                    );
                    self.report(
                        Finding::error(at, message).hint(fitting_hint()),
                        Part::Value,
                    );
                }
            }
        }
    }

    /// Indices of the stages, each after all that it refers to, otherwise as in the recipe. Cycles are reported.
    fn order(&mut self, drafts: &[Draft<'_>]) -> Vec<usize> {
        let inputs: Vec<Vec<usize>> = drafts
            .iter()
            .map(|draft| {
                let stages = draft.references.iter().map(|reference| &reference.stage);
                stages
                    .filter_map(|name| drafts.iter().position(|other| other.stage.name == *name))
                    .collect()
            })
            .collect();
        let mut order = Vec::new();
        let mut placed = vec![false; drafts.len()];
        // Quadratic, for recipes of a few dozen stages.
        while let Some(next) = (0..drafts.len())
            .find(|&stage| !placed[stage] && inputs[stage].iter().all(|&input| placed[input]))
        {
            placed[next] = true;
            order.push(next);
        }
        let Some(start) = placed.iter().position(|placed| !placed) else {
            return order;
        };
        // Every stage left has an unplaced input: following those must come back to a stage already seen.
        let mut path = vec![start];
        let cycle = loop {
            let last = path[path.len() - 1];
            let Some(&next) = inputs[last].iter().find(|&&input| !placed[input]) else {
                return order;
            };
            if let Some(first) = path.iter().position(|&stage| stage == next) {
                break path[first..].to_vec();
            }
            path.push(next);
        };
        let name = |stage: usize| drafts[stage].stage.name.as_str();
        let mut names: Vec<&str> = cycle.iter().map(|&stage| name(stage)).collect();
        names.push(names[0]);
        let first = &drafts[cycle[0]];
        let wants = |reference: &&Reference| reference.stage == names[1];
        let pointer = first
            .references
            .iter()
            .find(wants)
            .map_or("", |reference| reference.pointer.as_str());
        let message = match cycle.as_slice() {
            [only] => format!("stage `{}` needs itself", name(*only)),
            _ => format!("stages need each other in a circle: {}", names.join(" -> ")),
        };
        let finding = Finding::error(format!("{}{pointer}", first.pointer), message)
            .hint("an arrow means \"takes the output of\"; remove one of these references");
        self.report(finding, Part::Value);
        order
    }

    /// Settles device, dtype, seed, threads and timeout; `None` where something about the stage has been reported.
    fn settle(&mut self, draft: &Draft<'_>) -> Option<PlannedStage> {
        let stage = draft.stage;
        let mut origins = BTreeMap::new();
        let mut origin_of = |key: &str, own: bool, shared: bool, fallback: Origin| {
            let pointer = match (own, shared) {
                (true, _) => Some(format!("{}/{key}", draft.pointer)),
                (false, true) => Some(format!("/{key}")),
                (false, false) => None,
            };
            let origin =
                pointer.map_or(fallback, |pointer| origin(self.source, &pointer, fallback));
            origins.insert(format!("/{key}"), origin);
        };
        origin_of("seed", stage.seed.is_some(), false, Origin::Derived);
        origin_of(
            "threads",
            stage.threads.is_some(),
            self.recipe.threads.is_some(),
            Origin::Default,
        );
        origin_of(
            "dtype",
            stage.dtype.is_some(),
            self.recipe.dtype.is_some(),
            Origin::Default,
        );
        origin_of(
            "device",
            stage.device.is_some(),
            self.recipe.device.is_some(),
            Origin::Default,
        );
        origin_of("timeout", stage.timeout.is_some(), false, Origin::Default);
        origin_of("kind", true, false, Origin::Default);

        let timeout = match stage.timeout.as_deref().map(humantime::parse_duration) {
            None => None,
            Some(Ok(timeout)) if !timeout.is_zero() => Some(timeout),
            Some(wrong) => {
                let written = stage.timeout.as_deref().unwrap_or_default();
                let why = wrong
                    .err()
                    .map_or("it is zero".to_owned(), |error| error.to_string());
                let message = format!(
                    "stage `{}`: `timeout` cannot be `{written}`: {why}",
                    stage.name
                );
                let finding = Finding::error(format!("{}/timeout", draft.pointer), message);
                self.report(
                    finding.hint("write a time like `90s`, `30m` or `2h 30m`"),
                    Part::Value,
                );
                return None;
            }
        };
        let (identity, description) = draft.plugin.as_ref()?;
        let kind = draft.kind()?;
        let dtype = self.dtype(draft, description)?;
        let device = self.device(draft, identity, description)?;
        if device.1 {
            origins.insert("/device".to_owned(), Origin::Derived);
        }
        option_origins(self.source, draft, &draft.options, "", &mut origins);
        Some(PlannedStage {
            name: stage.name.clone(),
            kind: kind.kind.clone(),
            description: stage.description.clone(),
            plugin: identity.clone(),
            device: device.0,
            dtype,
            threads: stage
                .threads
                .or(self.recipe.threads)
                .map_or(Threads::Share, Threads::Fixed),
            seed: stage
                .seed
                .unwrap_or_else(|| derived_seed(self.recipe.seed.unwrap_or(0), &stage.name)),
            timeout,
            options: draft.options.clone(),
            references: draft.references.clone(),
            files: draft.files.clone(),
            output_kind: kind.output.clone(),
            revision: kind.revision,
            origins,
            position: self.source.locate(&draft.pointer, Part::Key),
        })
    }

    /// The pointer of a setting that a stage may have or take from the recipe.
    fn setting(&self, draft: &Draft<'_>, key: &str, own: bool) -> String {
        if own {
            format!("{}/{key}", draft.pointer)
        } else {
            format!("/{key}")
        }
    }

    fn dtype(&mut self, draft: &Draft<'_>, description: &Description) -> Option<String> {
        let known: Vec<&str> = description.dtypes.iter().map(String::as_str).collect();
        let Some(written) = draft.stage.dtype.as_ref().or(self.recipe.dtype.as_ref()) else {
            return Some((*known.first().unwrap_or(&"f32")).to_owned());
        };
        if known.contains(&written.as_str()) {
            return Some(written.clone());
        }
        let pointer = self.setting(draft, "dtype", draft.stage.dtype.is_some());
        let message = format!(
            "plugin `{}` does not compute in `{written}`",
            description.name
        );
        let finding = Finding::error(pointer, message);
        self.report(
            Finding {
                hint: schema::suggest(written, known),
                ..finding
            },
            Part::Value,
        );
        None
    }

    /// The device, and whether the plan chose it.
    fn device(
        &mut self,
        draft: &Draft<'_>,
        identity: &PluginIdentity,
        description: &Description,
    ) -> Option<(String, bool)> {
        let own = draft.stage.device.is_some();
        let written = draft
            .stage
            .device
            .as_ref()
            .or(self.recipe.device.as_ref())
            .map_or("auto", String::as_str);
        let knows = |kind: &str| description.devices.iter().any(|device| device == kind);
        let fallback = description.devices.first().map_or("cpu", String::as_str);
        if written == "auto" && !knows("cuda") {
            return Some((fallback.to_owned(), true));
        }
        let kind = written.split(':').next().unwrap_or_default();
        let pointer = self.setting(draft, "device", own);
        if written != "auto" && !knows(kind) {
            // Something that is no device at all has been reported by the schema.
            if matches!(kind, "cpu" | "cuda") {
                let message = format!("plugin `{}` cannot drive `{kind}`", identity.name);
                let known = description.devices.join("`, `");
                let finding =
                    Finding::error(pointer, message).hint(format!("it was built for `{known}`"));
                self.report(finding, Part::Value);
            }
            return None;
        }
        if kind == "cpu" {
            return Some(("cpu".to_owned(), false));
        }
        let devices = self.devices_of(identity, &pointer)?;
        let gpus: Vec<&Device> = devices
            .iter()
            .filter(|device| device.name.starts_with("cuda"))
            .collect();
        let usable = gpus.iter().find(|device| device.unusable.is_none());
        match written {
            "auto" => Some((
                usable.map_or("cpu".to_owned(), |device| device.name.clone()),
                true,
            )),
            // As precise as `cuda:0`, so that a plan names one device.
            "cuda" if usable.is_some() => usable.map(|device| (device.name.clone(), true)),
            _ => {
                let found = gpus
                    .iter()
                    .find(|device| device.name == written || written == "cuda");
                if written != "cuda" && found.is_some_and(|device| device.unusable.is_none()) {
                    return Some((written.to_owned(), false));
                }
                let why = match found.and_then(|device| device.unusable.as_deref()) {
                    Some(why) => format!("device `{written}` cannot be used: {why}"),
                    None => format!("there is no device `{written}` on this machine"),
                };
                let usable: Vec<&str> = devices
                    .iter()
                    .filter(|device| device.unusable.is_none())
                    .map(|device| device.name.as_str())
                    .collect();
                let hint = format!("usable here: `{}`", usable.join("`, `"));
                self.report(Finding::error(pointer, why).hint(hint), Part::Value);
                None
            }
        }
    }

    fn devices_of(&mut self, identity: &PluginIdentity, pointer: &str) -> Option<Vec<Device>> {
        if let Some(known) = self.devices.get(&identity.name) {
            return known.clone();
        }
        let answer = match self.plugins.devices(&identity.name) {
            Ok(devices) => Some(devices),
            Err(error) => {
                let finding = Finding::error(pointer, error.message);
                self.report(
                    Finding {
                        cause: Cause::Plugin,
                        hint: error.hint,
                        ..finding
                    },
                    Part::Value,
                );
                None
            }
        };
        self.devices.insert(identity.name.clone(), answer.clone());
        answer
    }
}

/// Where a value of the recipe came from.
fn origin(source: &Source, pointer: &str, fallback: Origin) -> Origin {
    match source.written(pointer) {
        Written::Line(line) => Origin::Recipe(line),
        Written::Interpolated => Origin::Params,
        Written::Set => Origin::Set,
        Written::Absent => fallback,
    }
}

/// Notes where every value without values inside came from.
fn option_origins(
    source: &Source,
    draft: &Draft<'_>,
    value: &Value,
    pointer: &str,
    origins: &mut BTreeMap<String, Origin>,
) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| (escape(key), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(index, item)| (index.to_string(), item))
            .collect(),
        _ => Vec::new(),
    };
    if children.is_empty() && !pointer.is_empty() {
        let filled =
            std::iter::successors(Some(pointer), |pointer| Some(pointer.rsplit_once('/')?.0))
                .any(|pointer| draft.filled.iter().any(|filled| filled == pointer));
        let written = match filled {
            true => Origin::Default,
            false => origin(
                source,
                &format!("{}{pointer}", draft.pointer),
                Origin::Default,
            ),
        };
        origins.insert(format!("/options{pointer}"), written);
    }
    for (step, child) in children {
        option_origins(source, draft, child, &format!("{pointer}/{step}"), origins);
    }
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

#[cfg(test)]
mod tests {
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
    fn the_digest_holds_what_decides_the_result() {
        let plan = fake::plan(
            &format!("{HEAD}  teacher: {{kind: pretrain, tokenizer: codes}}\n"),
            &[],
        )
        .unwrap();
        let stage = plan.stage("teacher").unwrap();
        let inputs = BTreeMap::from([("codes".to_owned(), "abc".to_owned())]);
        let hex =
            |stage: &PlannedStage, inputs| digest(stage, inputs, &BTreeMap::new()).unwrap().hex;
        let first = hex(stage, &inputs);
        let mut same = stage.clone();
        (same.name, same.threads, same.timeout) = (
            "other".into(),
            Threads::Fixed(9),
            Some(Duration::from_secs(1)),
        );
        assert_eq!(hex(&same, &inputs), first);
        type Change = fn(&mut PlannedStage);
        let changes: [Change; 6] = [
            |stage| stage.seed += 1,
            |stage| stage.device = "cuda:0".into(),
            |stage| stage.dtype = "bf16".into(),
            |stage| stage.revision += 1,
            |stage| stage.plugin.hash.push('x'),
            |stage| stage.options["steps"] = json!(3),
        ];
        for change in changes {
            let mut other = stage.clone();
            change(&mut other);
            assert_ne!(hex(&other, &inputs), first);
        }
        assert_ne!(
            hex(
                stage,
                &BTreeMap::from([("codes".to_owned(), "abd".to_owned())])
            ),
            first
        );
        assert_eq!(digest(stage, &BTreeMap::new(), &BTreeMap::new()), None);
    }
}
