//! Recipes as written.
//!
//! In: a file and the changes of `--set`. Out: a [`Recipe`]: the text's values, with `${params.x}` replaced
//! (`recipe/interpolation.rs`), and all mistakes. Defaults, devices and references between stages are resolved by
//! [`crate::plan`].
//!
//! A recipe with mistakes is still a recipe: its valid parts are read, so that planning can report further mistakes. Only a
//! file that is not a YAML mapping is an error here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::diagnostic::{Finding, Position, Report, Severity};
use crate::schema::{self, Checker, RESERVED};
use crate::sweep::{self, Sweep};
use crate::yaml::{self, Document, EntryPart, YamlError};

mod interpolation;
mod setting;
#[cfg(test)]
mod tests;

use interpolation::Interpolation;
use setting::Setting;

/// The runner's part of the schema of recipes, compiled once because a sweep reads the recipe for each point.
static RUNNER_SCHEMA: LazyLock<(Value, Checker)> = LazyLock::new(|| {
    let schema = schema::runner_schema();
    let checker = Checker::new(&schema);
    (schema, checker)
});

/// Stages of a recipe.
pub const MAX_STAGES: usize = 1000;

/// A recipe as written: everything optional may be `None`.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Where it was read from.
    pub source: RecipeSource,
    /// Name of the recipe: as written, else the file's.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// Seed from which stages' seeds are derived.
    pub seed: Option<u64>,
    /// Plugin of all stages.
    pub backend: Option<String>,
    /// Device of all stages: `auto`, `cpu`, `cuda`, `cuda:1`.
    pub device: Option<String>,
    /// Element type of all stages.
    pub dtype: Option<String>,
    /// Threads of every stage.
    pub threads: Option<usize>,
    /// The stages in the order of the text.
    pub stages: Vec<RecipeStage>,
    /// Artifacts of the store, used like the outputs of stages.
    pub given: Vec<ArtifactInput>,
    /// What a sweep varies.
    pub sweep: Option<Sweep>,
    /// Mistakes and warnings.
    pub findings: Vec<Finding>,
}

/// A stage as written.
#[derive(Debug, Clone, Default)]
pub struct RecipeStage {
    /// Its name.
    pub name: String,
    /// Its kind; `None` only if the findings report it.
    pub kind: Option<String>,
    /// Plugin that runs it.
    pub plugin: Option<String>,
    /// Its device.
    pub device: Option<String>,
    /// Its element type.
    pub dtype: Option<String>,
    /// Its seed.
    pub seed: Option<u64>,
    /// Its threads.
    pub threads: Option<usize>,
    /// Worker processes that divide its work.
    pub workers: Option<usize>,
    /// The minimum number of workers, as written.
    pub min_workers: Option<usize>,
    /// How often it restarts when some are lost.
    pub retries: Option<usize>,
    /// When to end an attempt, as written.
    pub timeout: Option<String>,
    /// What it is for.
    pub description: Option<String>,
    /// All other keys.
    pub options: Map<String, Value>,
}

/// An artifact of the store that stages use like a stage's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactInput {
    /// The name.
    pub name: String,
    /// The artifact's hash.
    pub hash: String,
    /// Its kind.
    pub kind: String,
}

/// The source of a recipe, and the position of each value in it.
#[derive(Debug, Clone)]
pub struct RecipeSource {
    /// The file, as typed.
    pub path: PathBuf,
    /// The directory that relative paths start from, absolute.
    pub base_dir: PathBuf,
    /// The text.
    pub text: String,
    /// Changes of `--set`, as typed.
    pub set: Vec<String>,
    /// The meaning of `~/` in paths; only the command line knows it.
    pub home: Option<PathBuf>,
    document: Document,
    /// Changes, by their pointer.
    set_at: BTreeMap<String, Setting>,
    /// Values with `${...}` in the text, with the referenced pointer if the value is a single reference.
    interpolated: BTreeMap<String, Option<String>>,
}

/// How a value came into the recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueSource {
    /// It is in the text, at this line.
    Line(usize),
    /// It is in the text as `${...}`.
    Interpolated,
    /// It was set.
    Set,
    /// It is not in the recipe.
    Absent,
}

impl RecipeSource {
    /// The position of the key or value at a pointer; `None` if it was set with `--set`.
    pub fn locate(&self, pointer: &str, part: EntryPart) -> Option<Position> {
        match self.setting(pointer) {
            Some(_) => None,
            None => self.position(pointer, part, 0),
        }
    }

    /// How the value at a pointer came into the recipe.
    pub fn written(&self, pointer: &str) -> ValueSource {
        if self.setting(pointer).is_some() {
            return ValueSource::Set;
        }
        if above(pointer).any(|pointer| self.interpolated.contains_key(pointer)) {
            return ValueSource::Interpolated;
        }
        match self
            .document
            .contains(pointer)
            .then(|| self.document.locate(pointer, EntryPart::Key))
        {
            Some(Some(position)) => ValueSource::Line(position.line),
            _ => ValueSource::Absent,
        }
    }

    /// Gives a finding its position: in the text, or in the argument that set the value.
    pub fn place(&self, mut finding: Finding, part: EntryPart) -> Finding {
        match self.setting(&finding.pointer) {
            Some((at, setting)) => {
                let inside = finding.pointer[at.len()..].to_owned();
                setting.mark(&mut finding, &inside, part);
            }
            None => {
                finding.position = self.position(&finding.pointer, part, 0);
                let origin = self.interpolated.get(&finding.pointer);
                if finding.hint.as_deref() == Some(schema::WRITE_A_VALUE)
                    && let Some(Some(origin)) = origin
                {
                    let name = origin[1..].replace('/', ".");
                    finding.hint = Some(format!("give `{name}` a value"));
                }
            }
        }
        finding
    }

    /// How a non-text value was written, if that differs from its value: `1.50`, `0x10`; for `--set`, everything typed.
    pub fn as_written(&self, pointer: &str) -> Option<&str> {
        self.written_as(pointer, 0)
    }

    /// How null is written at a pointer of the text: `~`, `null`.
    pub fn written_null(&self, pointer: &str) -> Option<&str> {
        match self.setting(pointer) {
            Some(_) => None,
            None => self.document.written(pointer),
        }
    }

    fn written_as(&self, pointer: &str, depth: usize) -> Option<&str> {
        let around =
            above(pointer).find_map(|above| Some((above, self.interpolated.get(above)?.as_ref())));
        match around {
            Some((use_of, Some(origin))) if depth < 16 => {
                let origin = format!("{origin}{}", &pointer[use_of.len()..]);
                self.written_as(&origin, depth + 1)
            }
            Some(_) => None,
            None => match self.setting(pointer) {
                Some((at, setting)) => setting.as_written(&pointer[at.len()..]),
                None => self.document.written(pointer),
            },
        }
    }

    /// The position in the text; for values inside a `${params.x}`, the position of the param.
    fn position(&self, pointer: &str, part: EntryPart, depth: usize) -> Option<Position> {
        let around = above(pointer)
            .skip(1)
            .find_map(|above| Some((above, self.interpolated.get(above)?.as_ref()?)));
        match around {
            // Params that refer to each other in a circle are among the findings.
            Some((use_of, origin)) if depth < 16 => {
                let origin = format!("{origin}{}", &pointer[use_of.len()..]);
                self.position(&origin, part, depth + 1)
            }
            _ => self.document.locate(pointer, part),
        }
    }

    /// The setting at a pointer or above it, and its pointer.
    fn setting<'p>(&self, pointer: &'p str) -> Option<(&'p str, &Setting)> {
        above(pointer).find_map(|above| Some((above, self.set_at.get(above)?)))
    }
}

/// A pointer and those above it, without the root.
fn above(pointer: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(pointer), |pointer| Some(pointer.rsplit_once('/')?.0))
        .filter(|pointer| !pointer.is_empty())
}

impl Recipe {
    /// How many of its findings are errors.
    pub fn errors(&self) -> usize {
        let is_error = |finding: &&Finding| finding.severity == Severity::Error;
        self.findings.iter().filter(is_error).count()
    }

    /// Its findings, with its text.
    pub fn report(&self) -> Report {
        Report {
            path: self.source.path.clone(),
            text: self.source.text.clone(),
            findings: self.findings.clone(),
        }
    }
}

/// Reads a recipe and applies the changes of `--set`. `home` is the meaning of `~/`.
pub fn read(path: &Path, set: &[String], home: Option<PathBuf>) -> Result<Recipe, Report> {
    let text = yaml::read(path).map_err(|error| {
        let mut finding = Finding::error("", error.to_string());
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            finding.message.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        match error {
            yaml::ReadError::Missing(_) if path == Path::new("-") => {
                finding.message = "`-` is not read as standard input".to_owned();
                finding.hint = Some(
                    "save the recipe to a file and name it: relative paths in a recipe start from its directory"
                        .to_owned(),
                );
            }
            yaml::ReadError::Missing(_) => finding.hint = neighbour(path),
            yaml::ReadError::NotAFile(_) => finding.hint = Some(content(path)),
            yaml::ReadError::TooLarge(_) => {
                finding.hint = Some("put data into files that the recipe names".to_owned());
            }
            yaml::ReadError::NotUtf8 { position, .. } => {
                finding.hint = Some("save the file as UTF-8".to_owned());
                finding.position = Some(position);
            }
            yaml::ReadError::Io { .. } => {}
        }
        Report {
            path: path.to_owned(),
            text: String::new(),
            findings: vec![finding],
        }
    })?;
    let base_dir = std::path::absolute(path)
        .ok()
        .and_then(|path| path.parent().map(Path::to_owned))
        .unwrap_or_default();
    let mut recipe = parse(path, base_dir, text, set)?;
    recipe.source.home = home;
    Ok(recipe)
}

/// Parses a recipe's text and applies the changes of `--set`. `path` is for messages and the default name.
pub fn parse(
    path: &Path,
    base_dir: PathBuf,
    text: String,
    set: &[String],
) -> Result<Recipe, Report> {
    let (mut document, mut findings) = match read_document(&text) {
        Ok(read) => read,
        Err(finding) => {
            return Err(Report {
                path: path.to_owned(),
                text,
                findings: vec![finding],
            });
        }
    };
    let mut value = std::mem::take(&mut document.value);
    let set_at = apply_settings(&mut value, set, &mut findings);
    let mut source = RecipeSource {
        path: path.to_owned(),
        base_dir,
        text,
        set: set.to_vec(),
        home: None,
        document,
        set_at,
        interpolated: BTreeMap::new(),
    };
    let mut value = match interpolate(&value, &mut source, &mut findings) {
        Some(value) if !has_too_many_stages(&value, &source, &mut findings) => value,
        _ => {
            return Err(Report {
                path: path.to_owned(),
                text: source.text,
                findings,
            });
        }
    };
    check_against_schema(&mut value, &source, &mut findings);
    let sweep = read_sweep(&value, &source, &mut findings);
    Ok(extract(source, &value, sweep, findings))
}

/// The mapping, with problems that leave the text readable, or the error that makes it unreadable.
#[expect(
    clippy::result_large_err,
    reason = "once for a recipe: its size costs nothing"
)]
fn read_document(text: &str) -> Result<(yaml::Document, Vec<Finding>), Finding> {
    let finding_of = |error: YamlError| {
        let finding = Finding::error(error.pointer, error.message).at(error.position);
        Finding {
            hint: error.hint,
            ..finding
        }
    };
    let mut document = yaml::parse(text).map_err(finding_of)?;
    if !document.value.is_object() {
        let message = "a recipe is a mapping: lines of `key: value`";
        return Err(Finding::error("", message)
            .at(document.locate("", EntryPart::Value))
            .hint("it has at least `version: 1` and `stages:`"));
    }
    let problems = std::mem::take(&mut document.problems);
    Ok((document, problems.into_iter().map(finding_of).collect()))
}

/// Applies `--set`, in order. Returns the effective settings by pointer.
fn apply_settings(
    value: &mut Value,
    set: &[String],
    findings: &mut Vec<Finding>,
) -> BTreeMap<String, Setting> {
    let names = setting::names(value);
    let mut set_at: BTreeMap<String, Setting> = BTreeMap::new();
    for change in set {
        match setting::apply(value, change) {
            Ok((pointer, setting)) => {
                let below = format!("{pointer}/");
                set_at.retain(|earlier, _| !earlier.starts_with(&below));
                set_at.insert(pointer, setting);
            }
            Err(finding) => findings.push(finding),
        }
    }
    let unasked = set_at
        .iter()
        .filter_map(|(pointer, setting)| setting::unasked(pointer, setting, value, &names));
    findings.extend(unasked);
    set_at
}

/// The value with every `${...}` replaced; None if there are too many.
fn interpolate(
    value: &Value,
    source: &mut RecipeSource,
    findings: &mut Vec<Finding>,
) -> Option<Value> {
    let replaced = Interpolation::new(value, source).replace();
    source.interpolated = replaced.interpolated;
    findings.extend(
        replaced
            .problems
            .into_iter()
            .map(|finding| source.place(finding, EntryPart::Value)),
    );
    replaced.complete.then_some(replaced.value)
}

fn has_too_many_stages(value: &Value, source: &RecipeSource, findings: &mut Vec<Finding>) -> bool {
    let stages = value.get("stages").and_then(Value::as_object);
    let Some(stages) = stages.filter(|stages| stages.len() > MAX_STAGES) else {
        return false;
    };
    let message = format!("{} stages; a recipe has at most {MAX_STAGES}", stages.len());
    let finding = Finding::error("/stages", message).hint("divide it into several recipes");
    findings.push(source.place(finding, EntryPart::Key));
    true
}

/// Checks the runner's keys, and converts their values to the schema's types.
fn check_against_schema(value: &mut Value, source: &RecipeSource, findings: &mut Vec<Finding>) {
    let (runner_schema, checker) = &*RUNNER_SCHEMA;
    schema::take_texts(runner_schema, value, |pointer| source.as_written(pointer));
    let broken: BTreeSet<String> = findings
        .iter()
        .map(|finding| finding.pointer.clone())
        .collect();
    for violation in checker.check(value, "key") {
        // A failed `${...}` causes no second error.
        if broken.contains(&violation.pointer) {
            continue;
        }
        let mut finding = Finding::error(violation.pointer, violation.message);
        finding.hint = violation.hint;
        if finding.pointer == "/version" {
            finding.hint =
                Some("this retort reads version 1; a newer recipe needs a newer retort".to_owned());
        } else if finding.message == "the key `version` is missing" {
            finding.hint = Some("begin the recipe with `version: 1`".to_owned());
        }
        findings.push(source.place(finding, violation.part));
    }
    // `1e3` is accepted where a whole number is expected.
    schema::settle_numbers(runner_schema, value);
}

/// The `sweep:` section, unless it has known faults.
fn read_sweep(value: &Value, source: &RecipeSource, findings: &mut Vec<Finding>) -> Option<Sweep> {
    let section = value.get("sweep")?;
    if findings
        .iter()
        .any(|finding| finding.pointer.starts_with("/sweep"))
    {
        return None;
    }
    let typed = |pointer: &str, value: &Value| {
        let written = source.as_written(pointer).filter(|_| !value.is_string());
        setting::typed(value, written)
    };
    match sweep::section(section, &typed) {
        Ok(sweep) => Some(sweep),
        Err(faults) => {
            let placed = faults.into_iter();
            findings.extend(placed.map(|finding| source.place(finding, EntryPart::Key)));
            None
        }
    }
}

/// The valid parts of a value whose mistakes are already known.
fn extract(
    source: RecipeSource,
    value: &Value,
    sweep: Option<Sweep>,
    findings: Vec<Finding>,
) -> Recipe {
    let text = |value: &Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
    let count = |value: &Value, key: &str| {
        value
            .get(key)?
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
    };
    let stage = |(name, value): (&String, &Value)| RecipeStage {
        name: name.clone(),
        kind: text(value, "kind"),
        plugin: text(value, "plugin"),
        device: text(value, "device"),
        dtype: text(value, "dtype"),
        seed: value.get("seed").and_then(Value::as_u64),
        threads: count(value, "threads"),
        workers: count(value, "workers"),
        min_workers: count(value, "min_workers"),
        retries: count(value, "retries"),
        timeout: text(value, "timeout"),
        description: text(value, "description"),
        options: value
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, _)| !RESERVED.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
    };
    let stem = || {
        source
            .path
            .file_stem()
            .map_or("recipe".into(), |stem| stem.to_string_lossy().into_owned())
    };
    Recipe {
        name: text(value, "name").unwrap_or_else(stem),
        description: text(value, "description"),
        seed: value.get("seed").and_then(Value::as_u64),
        backend: text(value, "backend"),
        device: text(value, "device"),
        dtype: text(value, "dtype"),
        threads: count(value, "threads"),
        stages: value
            .get("stages")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(stage)
            .collect(),
        given: value
            .get("artifacts")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter_map(|(name, given)| {
                Some(ArtifactInput {
                    name: name.clone(),
                    hash: text(given, "hash")?,
                    kind: text(given, "kind")?,
                })
            })
            .collect(),
        sweep,
        findings,
        source,
    }
}

/// The YAML file probably meant by a missing path.
fn neighbour(path: &Path) -> Option<String> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let names = yaml_files(directory);
    // Without extensions, which are always similar.
    let stem = |name: &str| {
        Path::new(name)
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let stems: Vec<String> = names.iter().map(|name| stem(name)).collect();
    let near = schema::nearest(
        &stem(&path.to_string_lossy()),
        stems.iter().map(String::as_str),
    )?;
    let name = &names[stems.iter().position(|stem| stem == near)?];
    Some(format!(
        "did you mean {}?",
        path.with_file_name(name).display()
    ))
}

/// A suggestion instead of a directory.
fn content(directory: &Path) -> String {
    match yaml_files(directory).as_slice() {
        [] => "name a YAML file".to_owned(),
        names => format!("name a file in it: {}", names.join(", ")),
    }
}

/// The first YAML files of a directory, by name.
fn yaml_files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".yaml") || name.ends_with(".yml"))
        .collect();
    names.sort();
    names.truncate(100);
    names
}
