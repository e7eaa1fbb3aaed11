//! Recipes as written.
//!
//! In: a file and the changes of `--set`. Out: a [`Recipe`]: what is written, with `${params.x}` replaced, and with
//! every mistake found on the way. Defaults, devices and references between stages are settled by [`crate::plan`].
//!
//! A recipe with mistakes is still a recipe: what can be read is, so that the plan can report the other mistakes
//! too. Only a file that is no YAML mapping at all is an error here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::diagnostic::{Finding, Position, Report};
use crate::schema::{self, RESERVED};
use crate::yaml::{self, Document, Part, YamlError, escape};

/// A recipe as written: everything that may be left out may be `None`.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// Where it was read from.
    pub source: Source,
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
    /// Mistakes and warnings.
    pub findings: Vec<Finding>,
}

/// A stage as written.
#[derive(Debug, Clone, Default)]
pub struct RecipeStage {
    /// Its name.
    pub name: String,
    /// Its kind; `None` only where that is among the findings.
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
    /// When to end an attempt, as written.
    pub timeout: Option<String>,
    /// What it is for.
    pub description: Option<String>,
    /// All other keys.
    pub options: Map<String, Value>,
}

/// Where a recipe comes from, and where in it each value does.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file, as people named it.
    pub path: PathBuf,
    /// The directory that relative paths start from, absolute.
    pub base_dir: PathBuf,
    /// The text.
    pub text: String,
    /// Changes of `--set`, as typed.
    pub set: Vec<String>,
    document: Document,
    /// What was set: pointer -> the change as typed.
    set_at: BTreeMap<String, String>,
    /// Values that have `${...}` in the text, and where the value comes from if that is all there is.
    interpolated: BTreeMap<String, Option<String>>,
}

/// How a value came into the recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is in the text, at this line.
    Line(usize),
    /// It is in the text as `${...}`.
    Interpolated,
    /// It was set.
    Set,
    /// It is not in the recipe.
    Absent,
}

impl Source {
    /// Where the key or value at a pointer is in the text; `None` for what was set.
    pub fn locate(&self, pointer: &str, part: Part) -> Option<Position> {
        match self.setting(pointer) {
            Some(_) => None,
            None => self.position(pointer, part, 0),
        }
    }

    /// How the value at a pointer came into the recipe.
    pub fn written(&self, pointer: &str) -> Written {
        if self.setting(pointer).is_some() {
            return Written::Set;
        }
        if above(pointer).any(|pointer| self.interpolated.contains_key(pointer)) {
            return Written::Interpolated;
        }
        match self
            .document
            .contains(pointer)
            .then(|| self.document.locate(pointer, Part::Key))
        {
            Some(Some(position)) => Written::Line(position.line),
            _ => Written::Absent,
        }
    }

    /// Gives a finding its place.
    pub fn place(&self, mut finding: Finding, part: Part) -> Finding {
        match self.setting(&finding.pointer) {
            Some(setting) => finding
                .message
                .push_str(&format!(" (from `--set {setting}`)")),
            None => finding.position = self.position(&finding.pointer, part, 0),
        }
        finding
    }

    /// The place in the text; of what is inside a `${params.x}`, the place where the param is written.
    fn position(&self, pointer: &str, part: Part, depth: usize) -> Option<Position> {
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

    fn setting(&self, pointer: &str) -> Option<&String> {
        above(pointer).find_map(|pointer| self.set_at.get(pointer))
    }
}

/// A pointer and those above it, without the root.
fn above(pointer: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(pointer), |pointer| Some(pointer.rsplit_once('/')?.0))
        .filter(|pointer| !pointer.is_empty())
}

/// Reads a recipe and applies the changes of `--set`.
pub fn read(path: &Path, set: &[String]) -> Result<Recipe, Report> {
    let text = yaml::read(path).map_err(|error| {
        let mut finding = Finding::error("", error.to_string());
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            finding.message.push_str(&format!(": {cause}"));
            source = cause.source();
        }
        match error {
            yaml::ReadError::Missing(_) => finding.hint = neighbour(path),
            yaml::ReadError::NotAFile(_) => finding.hint = Some(content(path)),
            yaml::ReadError::TooLarge(_) => {
                finding.hint = Some("data belongs into files that the recipe names".to_owned());
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
    parse(path, base_dir, text, set)
}

/// Parses a recipe's text and applies the changes of `--set`. `path` is for messages and the default name.
pub fn parse(
    path: &Path,
    base_dir: PathBuf,
    text: String,
    set: &[String],
) -> Result<Recipe, Report> {
    let finding_of = |error: YamlError| {
        let finding = Finding::error(error.pointer, error.message).at(error.position);
        Finding {
            hint: error.hint,
            ..finding
        }
    };
    let mut document = match yaml::parse(&text) {
        Ok(document) => document,
        Err(error) => {
            let findings = vec![finding_of(error)];
            return Err(Report {
                path: path.to_owned(),
                text,
                findings,
            });
        }
    };
    if !document.value.is_object() {
        let message = "a recipe is a mapping: lines of `key: value`";
        let finding = Finding::error("", message)
            .at(document.locate("", Part::Value))
            .hint("it has at least `version: 1` and `stages:`");
        return Err(Report {
            path: path.to_owned(),
            text,
            findings: vec![finding],
        });
    }
    let mut findings: Vec<Finding> = std::mem::take(&mut document.problems)
        .into_iter()
        .map(finding_of)
        .collect();
    let mut value = std::mem::take(&mut document.value);
    let mut set_at = BTreeMap::new();
    for change in set {
        match apply(&mut value, change) {
            Ok(pointer) => {
                set_at.insert(pointer, change.clone());
            }
            Err(finding) => findings.push(finding),
        }
    }
    let mut source = Source {
        path: path.to_owned(),
        base_dir,
        text,
        set: set.to_vec(),
        document,
        set_at,
        interpolated: BTreeMap::new(),
    };
    let mut interpolation = Interpolation {
        root: &value,
        interpolated: BTreeMap::new(),
        problems: Vec::new(),
    };
    let value = interpolation.replace(&value, "", &mut Vec::new());
    let Interpolation {
        interpolated,
        problems,
        ..
    } = interpolation;
    source.interpolated = interpolated;
    findings.extend(
        problems
            .into_iter()
            .map(|finding| source.place(finding, Part::Value)),
    );

    let broken: BTreeSet<String> = findings
        .iter()
        .map(|finding| finding.pointer.clone())
        .collect();
    for violation in schema::check(&schema::runner_schema(), &value, "key") {
        // What a failed `${...}` leaves behind is no second mistake.
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
    Ok(extract(source, &value, findings))
}

/// What can be read of a value whose mistakes are known already.
fn extract(source: Source, value: &Value, findings: Vec<Finding>) -> Recipe {
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
        findings,
        source,
    }
}

/// The YAML file that was meant by a path at which there is none.
fn neighbour(path: &Path) -> Option<String> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let names = yaml_files(directory);
    // Without the endings, which are always near to each other.
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

/// What to name instead of a directory.
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

/// Applies one `--set path=value` and returns the pointer of what was set.
fn apply(recipe: &mut Value, change: &str) -> Result<String, Finding> {
    let refuse = |message: String| Finding::error("", format!("`--set {change}`: {message}"));
    let Some((path, text)) = change.split_once('=') else {
        return Err(refuse("a `=` is missing".to_owned())
            .hint("write --set path=value, for example --set seed=3"));
    };
    let value = match yaml::parse(text) {
        Ok(document) if document.problems.is_empty() => document.value,
        Ok(document) => return Err(refuse(document.problems[0].message.clone())),
        Err(_) if text.trim().is_empty() => Value::Null,
        Err(error) => {
            return Err(refuse(format!("the value is not YAML: {}", error.message)));
        }
    };
    let mut steps: Vec<&str> = path.trim().split('.').collect();
    if steps.iter().any(|step| step.is_empty()) {
        return Err(refuse(format!("`{path}` is not a path"))
            .hint("a path is like `seed` or `teacher.steps`"));
    }
    let schema = schema::runner_schema();
    let top: Vec<&str> = schema["properties"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .collect();
    if !top.contains(&steps[0]) {
        let stages: Vec<&str> = recipe
            .get("stages")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(name, _)| name.as_str())
            .collect();
        if !stages.contains(&steps[0]) {
            let finding = refuse(format!(
                "`{}` is neither a key of recipes nor a stage",
                steps[0]
            ));
            let hint = schema::suggest(steps[0], top.into_iter().chain(stages));
            return Err(Finding { hint, ..finding });
        }
        steps.insert(0, "stages");
    }
    // A new stage would only be a misspelt one.
    if let ["stages", stage, ..] = steps.as_slice() {
        let stages = recipe.get("stages").and_then(Value::as_object);
        if !stages.is_some_and(|stages| stages.contains_key(*stage)) {
            let finding = refuse(format!("there is no stage `{stage}`"));
            let names = stages.into_iter().flatten().map(|(name, _)| name.as_str());
            return Err(Finding {
                hint: schema::suggest(stage, names),
                ..finding
            });
        }
    }
    let mut place = recipe;
    let mut pointer = String::new();
    for step in steps {
        pointer.push_str(&format!("/{}", escape(step)));
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        place = match place {
            Value::Object(entries) => entries.entry(step).or_insert(Value::Null),
            Value::Array(items) => {
                let length = items.len();
                match step
                    .parse::<usize>()
                    .ok()
                    .and_then(|index| items.get_mut(index))
                {
                    Some(item) => item,
                    None => {
                        return Err(refuse(format!(
                            "`{step}` is not an item of a list of {length} (the first is 0)"
                        )));
                    }
                }
            }
            _ => {
                return Err(refuse(format!(
                    "there is nothing inside what `{step}` would be in"
                )));
            }
        };
    }
    *place = value;
    Ok(pointer)
}

/// Replaces `${params.x}` and `${paths.x}`; `$${` stands for `${`.
struct Interpolation<'a> {
    root: &'a Value,
    interpolated: BTreeMap<String, Option<String>>,
    problems: Vec<Finding>,
}

impl Interpolation<'_> {
    /// The value with everything replaced. `open` are the references being followed, against cycles.
    fn replace(&mut self, value: &Value, pointer: &str, open: &mut Vec<String>) -> Value {
        match value {
            Value::Object(entries) => entries
                .iter()
                .map(|(key, value)| {
                    let inside = format!("{pointer}/{}", escape(key));
                    (key.clone(), self.replace(value, &inside, open))
                })
                .collect(),
            Value::Array(items) => items
                .iter()
                .enumerate()
                .map(|(index, item)| self.replace(item, &format!("{pointer}/{index}"), open))
                .collect(),
            Value::String(text) if text.contains("${") => {
                let whole = text
                    .strip_prefix("${")
                    .and_then(|rest| rest.strip_suffix('}'));
                let origin = whole.filter(|name| !name.contains("${")).map(|name| {
                    name.trim()
                        .split('.')
                        .map(|step| format!("/{}", escape(step)))
                        .collect()
                });
                self.interpolated.insert(pointer.to_owned(), origin);
                match self.text(text, open) {
                    Ok(value) => value,
                    Err(finding) => {
                        // A mistake in a param is reported where it is written, not at each use.
                        if open.is_empty() {
                            self.problems.push(Finding {
                                pointer: pointer.to_owned(),
                                ..finding
                            });
                        }
                        value.clone()
                    }
                }
            }
            other => other.clone(),
        }
    }

    fn text(&mut self, text: &str, open: &mut Vec<String>) -> Result<Value, Finding> {
        let mut result = String::new();
        let mut rest = text;
        while let Some(start) = rest.find("${") {
            let (before, from) = rest.split_at(start);
            if let Some(before) = before.strip_suffix('$') {
                result.push_str(before);
                result.push_str("${");
                rest = &from[2..];
                continue;
            }
            let Some(end) = from.find('}') else {
                return Err(Finding::error("", format!("`{from}` has no `}}`"))
                    .hint("write ${params.name}, or $${ for the characters themselves"));
            };
            let name = from[2..end].trim();
            let value = self.look_up(name, open)?;
            if before.is_empty() && result.is_empty() && end + 1 == from.len() {
                return Ok(value);
            }
            result.push_str(before);
            match value {
                Value::String(text) => result.push_str(&text),
                Value::Number(_) | Value::Bool(_) => result.push_str(&value.to_string()),
                _ => {
                    let message = format!(
                        "`${{{name}}}` is not a text or number and cannot be part of a text"
                    );
                    return Err(Finding::error("", message).hint("use it as the whole value"));
                }
            }
            rest = &from[end + 1..];
        }
        result.push_str(rest);
        Ok(Value::String(result))
    }

    fn look_up(&mut self, name: &str, open: &mut Vec<String>) -> Result<Value, Finding> {
        if open.iter().any(|other| other == name) {
            let cycle = format!("{} -> {name}", open.join(" -> "));
            return Err(Finding::error(
                "",
                format!("params refer to each other in a circle: {cycle}"),
            )
            .hint("give one of them a value"));
        }
        let mut steps = name.split('.');
        let first = steps.next().unwrap_or_default();
        if !matches!(first, "params" | "paths") || name == first {
            return Err(Finding::error("", format!("`${{{name}}}` is not known"))
                .hint("only ${params.name} and ${paths.name} are replaced; write $${ for the characters themselves"));
        }
        let mut value = self.root.get(first).unwrap_or(&Value::Null);
        let mut pointer = format!("/{first}");
        for step in steps {
            let child = match value {
                Value::Object(entries) => entries.get(step),
                Value::Array(items) => step
                    .parse::<usize>()
                    .ok()
                    .and_then(|index| items.get(index)),
                _ => None,
            };
            let Some(child) = child else {
                let finding = Finding::error(
                    "",
                    format!(
                        "`${{{name}}}`: there is no `{step}` in `{}`",
                        pointer[1..].replace('/', ".")
                    ),
                );
                let known = value
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(key, _)| key.as_str());
                return Err(Finding {
                    hint: schema::suggest(step, known),
                    ..finding
                });
            };
            value = child;
            pointer.push_str(&format!("/{}", escape(step)));
        }
        open.push(name.to_owned());
        let problems = self.problems.len();
        let value = self.replace_strictly(value, open);
        open.pop();
        debug_assert_eq!(problems, self.problems.len());
        value
    }

    /// Like [`Self::replace`] of a value that is referred to: the first mistake in it is an error.
    fn replace_strictly(
        &mut self,
        value: &Value,
        open: &mut Vec<String>,
    ) -> Result<Value, Finding> {
        match value {
            Value::Object(entries) => entries
                .iter()
                .map(|(key, value)| Ok((key.clone(), self.replace_strictly(value, open)?)))
                .collect::<Result<Map<_, _>, _>>()
                .map(Value::Object),
            Value::Array(items) => items
                .iter()
                .map(|item| self.replace_strictly(item, open))
                .collect::<Result<_, _>>()
                .map(Value::Array),
            Value::String(text) if text.contains("${") => self.text(text, open),
            other => Ok(other.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str, set: &[&str]) -> Recipe {
        let set: Vec<String> = set.iter().map(|change| (*change).to_owned()).collect();
        parse(Path::new("r.yaml"), PathBuf::new(), text.to_owned(), &set).unwrap()
    }

    const HEAD: &str = "version: 1\nparams: {w: 96, deep: {x: [1, 2]}, again: '${params.w}'}\npaths: {data: d}\nstages:\n";

    #[test]
    fn references_to_params_are_replaced() {
        let check = |written: &str, expected: Value| {
            let recipe = read(&format!("{HEAD}  s: {{kind: k, o: {written}}}\n"), &[]);
            assert_eq!(recipe.findings, []);
            assert_eq!(recipe.stages[0].options["o"], expected, "{written}");
        };
        check("'${params.w}'", json!(96));
        check("'${params.again}'", json!(96));
        check("'${ params.deep }'", json!({"x": [1, 2]}));
        check("'${params.deep.x.1}'", json!(2));
        check("'${paths.data}/a${params.w}.csv'", json!("d/a96.csv"));
        check("'$${params.w} $x'", json!("${params.w} $x"));
    }

    #[test]
    fn wrong_references_are_findings() {
        let check = |written: &str, part: &str| {
            let recipe = read(&format!("{HEAD}  s: {{kind: k, o: {written}}}\n"), &[]);
            let [finding] = recipe.findings.as_slice() else {
                panic!("{:?}", recipe.findings)
            };
            let said = format!(
                "{} / {}",
                finding.message,
                finding.hint.clone().unwrap_or_default()
            );
            assert!(said.contains(part), "{said}");
            assert_eq!(finding.position.map(|at| at.line), Some(5));
        };
        check("'${params.v}'", "did you mean `w`?");
        check("'${param.w}'", "only ${params.name}");
        check("'${params.w'", "no `}`");
        check("'a${params.deep}'", "cannot be part of a text");
    }

    #[test]
    fn params_in_a_circle_are_named() {
        let recipe = read(
            "version: 1\nparams: {a: '${params.b}', b: '${params.a}'}\nstages: {s: {kind: k}}\n",
            &[],
        );
        assert!(
            recipe.findings[0]
                .message
                .contains("params.b -> params.a -> params.b"),
            "{:?}",
            recipe.findings
        );
    }

    #[test]
    fn set_changes_values() {
        let text = format!("{HEAD}  s: {{kind: k, list: [1, 2], o: {{p: 1}}}}\n");
        let check = |set: &str, pointer: &str, expected: Value| {
            let recipe = read(&text, &[set]);
            assert_eq!(recipe.findings, [], "{set}");
            assert_eq!(
                Value::Object(recipe.stages[0].options.clone()).pointer(pointer),
                Some(&expected),
                "{set}"
            );
        };
        check("s.list.1=5", "/list/1", json!(5));
        check("stages.s.o.p=[a, 1.5]", "/o/p", json!(["a", 1.5]));
        check("s.new.deep=true", "/new/deep", json!(true));
        check("s.o=${params.w}", "/o", json!(96));
        let recipe = read(&text, &["seed=3", "s.seed=4"]);
        assert_eq!((recipe.seed, recipe.stages[0].seed), (Some(3), Some(4)));
        assert_eq!(recipe.source.written("/stages/s/seed"), Written::Set);
        assert_eq!(recipe.source.written("/stages/s/o"), Written::Line(5));
        // A mistake inside a param is shown where the param is written.
        let recipe = read(
            &format!("{HEAD}  s: {{kind: k, o: '${{params.deep}}'}}\n"),
            &[],
        );
        let place = recipe.source.locate("/stages/s/o/x/1", Part::Value);
        assert_eq!(
            place,
            Some(Position {
                line: 2,
                column: 31
            })
        );
    }

    #[test]
    fn wrong_settings_are_findings() {
        let check = |set: &str, part: &str| {
            let recipe = read(
                &format!("{HEAD}  teacher: {{kind: k, list: [1]}}\n"),
                &[set],
            );
            let [finding] = recipe.findings.as_slice() else {
                panic!("{set}: {:?}", recipe.findings)
            };
            let said = format!(
                "{} / {}",
                finding.message,
                finding.hint.clone().unwrap_or_default()
            );
            assert!(said.contains(part), "{said}");
        };
        check("seed", "`=` is missing");
        check("seed=[", "not YAML");
        check("seed=x", "(from `--set seed=x`)");
        check("taecher.x=1", "did you mean `teacher`?");
        check("stages.taecher.x=1", "did you mean `teacher`?");
        check("teacher.list.7=1", "not an item");
        check("teacher.kind.x=1", "nothing inside");
        check("a..b=1", "not a path");
    }

    #[test]
    fn mistakes_in_the_runners_part() {
        let check = |text: &str, expected: &[(usize, usize, &str)]| {
            let recipe = read(text, &[]);
            let mut found: Vec<_> = recipe
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
                    "{found:#?}"
                );
            }
        };
        check(
            "version: 2\nstages: {s: {kind: k}}\n",
            &[(1, 10, "newer retort")],
        );
        check(
            "stages: {s: {kind: k}}\n",
            &[(1, 1, "begin the recipe with")],
        );
        check("version: 1\nstages: {}\n", &[(2, 1, "is empty")]);
        check(
            "verison: 1\nstages: {s: {kind: k}}\n",
            &[(1, 1, "did you mean `version`?")],
        );
        check(
            "version: 1\nseed: '3'\ndevice: gpu\nstages:\n  S: {kind: k}\n  t: {kin: k}\n  u: 3\n",
            &[
                (2, 7, "remove the quotes: 3"),
                (3, 9, "expected `auto`, `cpu`"),
                (5, 3, "lower-case"),
                (6, 3, "the key `kind` is missing"),
                (7, 6, "expected a mapping, got 3"),
            ],
        );
    }
}
