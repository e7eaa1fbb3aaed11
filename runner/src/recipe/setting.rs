//! Changes from the command line: `--set path=value`.
//!
//! A value is read as YAML, but a plain text is taken as typed: `--set codes.data.csv=run #2.csv` means a file of that name.
//! So plain texts, and invalid YAML, are kept literally; for everything else (`a: b`, `1e3`, `yes`) the typed text is also
//! kept, and used if the schema expects a text.

#![expect(
    clippy::result_large_err,
    reason = "a finding ends a reading: it is made once, its size costs nothing"
)]

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::diagnostic::{Argument, Finding, Position};
use crate::schema;
use crate::yaml::{self, Document, EntryPart, MAX_DEPTH, escape};

/// One value that was set.
#[derive(Debug, Clone)]
pub(super) struct Setting {
    /// The change as typed: `path=value`.
    change: String,
    /// The value as YAML; `None` if it is a literal text.
    document: Option<Document>,
    /// Why the value is no YAML.
    not_yaml: Option<String>,
}

impl Setting {
    /// Sets a finding's position in the argument. `rest` is its pointer inside the set value.
    pub(super) fn mark(&self, finding: &mut Finding, rest: &str, part: EntryPart) {
        let (path, typed) = self.change.split_once('=').unwrap_or((&self.change, ""));
        let last_step = path.rfind('.').map_or(0, |dot| dot + 1);
        let position = match (rest.is_empty(), part, &self.document) {
            (true, EntryPart::Key, _) => in_path(path, last_step),
            (true, EntryPart::Value, _) | (_, _, None) => {
                in_value(path, typed, Position { line: 1, column: 1 })
            }
            (false, part, Some(document)) => in_value(
                path,
                typed,
                document
                    .locate(rest, part)
                    .unwrap_or(Position { line: 1, column: 1 }),
            ),
        };
        finding.argument = Some(argument(&self.change, position));
        if let (true, Some(why)) = (rest.is_empty(), &self.not_yaml) {
            finding.hint = Some(format!("the value is not YAML: {why}"));
        }
        if rest.is_empty() && finding.hint.as_deref() == Some(schema::WRITE_A_VALUE) {
            let empty = match finding.message.contains("expected a text") {
                true => format!("; an empty text is written --set '{path}=\"\"'"),
                false => String::new(),
            };
            finding.hint = Some(format!("write a value after the `=`{empty}"));
        }
    }

    /// The typed text of the value at a pointer inside the set value, if it differs from the value.
    pub(super) fn as_written(&self, inside: &str) -> Option<&str> {
        let document = self.document.as_ref()?;
        match inside {
            // With references, the value itself is meant.
            "" => Some(self.change.split_once('=')?.1).filter(|typed| !typed.contains("${")),
            inside => document.written(inside),
        }
    }
}

/// Applies one change and returns its pointer.
pub(super) fn apply(recipe: &mut Value, change: &str) -> Result<(String, Setting), Finding> {
    let refuse = |message: String, position: Position| Finding {
        argument: Some(argument(change, position)),
        ..Finding::error("", message)
    };
    let Some((path, text)) = change.split_once('=') else {
        let message = format!("`--set {change}`: a `=` is missing");
        return Err(refuse(message, in_path(change, 0))
            .hint("write --set path=value, for example --set seed=3"));
    };
    let (value, setting) = read(change, text)
        .map_err(|(message, place)| refuse(message, in_value(path, text, place)))?;
    let mut steps: Vec<&str> = path.trim().split('.').collect();
    if steps.iter().any(|step| step.is_empty()) || steps.len() > MAX_DEPTH {
        let message = format!("`{path}` is not a path");
        return Err(
            refuse(message, in_path(path, 0)).hint("a path is like `seed` or `teacher.steps`")
        );
    }
    let schema = schema::runner_schema();
    let top: Vec<&str> = schema["properties"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .collect();
    let stages: Vec<String> = recipe
        .get("stages")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(name, _)| name.clone())
        .collect();
    let names = || stages.iter().map(String::as_str);
    if !top.contains(&steps[0]) {
        if !names().any(|name| name == steps[0]) {
            let message = format!("`{}` is neither a key of recipes nor a stage", steps[0]);
            let hint = schema::suggest(steps[0], top.into_iter().chain(names()));
            let finding = refuse(message, in_path(path, 0));
            return Err(Finding { hint, ..finding });
        }
        steps.insert(0, "stages");
    }
    // A new stage is probably a typo.
    if let ["stages", stage, ..] = steps.as_slice()
        && !names().any(|name| name == *stage)
    {
        let hint = schema::suggest(stage, names());
        let finding = refuse(format!("there is no stage `{stage}`"), in_path(path, 7));
        return Err(Finding { hint, ..finding });
    }
    let mut place = recipe;
    let mut pointer = String::new();
    let mut rest = steps.as_slice();
    while !rest.is_empty() {
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        let (step, used) = match &*place {
            Value::Object(entries) => key_of(entries, rest),
            _ => (rest[0].to_owned(), 1),
        };
        rest = &rest[used..];
        pointer.push_str(&format!("/{}", escape(&step)));
        place = match place {
            Value::Object(entries) => entries.entry(step).or_insert(Value::Null),
            Value::Array(items) => {
                let length = items.len();
                let index = step.parse::<usize>().ok();
                match index.and_then(|index| items.get_mut(index)) {
                    Some(item) => item,
                    None => {
                        let message = format!(
                            "`{step}` is not an item of a list of {length} (the first is 0)"
                        );
                        return Err(refuse(message, in_path(path, 0)));
                    }
                }
            }
            other => {
                let message =
                    format!("`{step}` cannot be set: what it would be in is not a mapping");
                let mut finding = refuse(message, in_path(path, 0));
                finding.hint = reference(other).map(|name| {
                    let inside: Vec<&str> = [step.as_str()]
                        .into_iter()
                        .chain(rest.iter().copied())
                        .collect();
                    format!(
                        "it is written as `${{{name}}}`: --set {name}.{}={text}",
                        inside.join(".")
                    )
                });
                return Err(finding);
            }
        };
    }
    *place = value;
    Ok((pointer, setting))
}

/// The target of a text that is a single `${params.name}`.
fn reference(value: &Value) -> Option<&str> {
    let name = value
        .as_str()?
        .trim()
        .strip_prefix("${")?
        .strip_suffix('}')?
        .trim();
    (!name.contains(['$', '{', '}'])).then_some(name)
}

/// The params and paths that a recipe has, as pointers.
pub(super) fn names(recipe: &Value) -> BTreeSet<String> {
    let groups = ["params", "paths"].map(|group| (group, recipe[group].as_object()));
    let entries = groups.into_iter().flat_map(|(group, entries)| {
        entries
            .into_iter()
            .flatten()
            .map(move |entry| (group, entry))
    });
    entries
        .map(|(group, (name, _))| format!("/{group}/{}", escape(name)))
        .collect()
}

/// The error for a set param or path that is neither among the `names` in the recipe nor used in it.
pub(super) fn unasked(
    pointer: &str,
    setting: &Setting,
    recipe: &Value,
    names: &BTreeSet<String>,
) -> Option<Finding> {
    let (group, rest) = pointer.strip_prefix('/')?.split_once('/')?;
    if !matches!(group, "params" | "paths") {
        return None;
    }
    let name = rest.split('/').next()?;
    let known = names.contains(&format!("/{group}/{name}"));
    if known || asks(recipe, &format!("${{{group}.{name}")) {
        return None;
    }
    let mut finding = Finding::error(pointer, format!("the recipe has no `{name}` in `{group}`"));
    setting.mark(&mut finding, "", EntryPart::Key);
    let known = recipe[group].as_object().into_iter().flatten();
    let known = known
        .map(|(key, _)| key.as_str())
        .filter(|key| *key != name);
    finding.hint = schema::suggest(name, known)
        .or_else(|| Some(format!("nothing in it asks for `${{{group}.{name}}}`")));
    Some(finding)
}

/// Whether any text in a recipe contains these words.
fn asks(value: &Value, words: &str) -> bool {
    match value {
        Value::String(text) => text.contains(words),
        Value::Array(items) => items.iter().any(|item| asks(item, words)),
        Value::Object(entries) => entries.values().any(|value| asks(value, words)),
        _ => false,
    }
}

/// The key of a mapping named by a path's next steps, and how many steps it takes: a key may contain dots (`1.50`).
pub(super) fn key_of(entries: &Map<String, Value>, steps: &[&str]) -> (String, usize) {
    let mut key = String::new();
    for (index, step) in steps.iter().enumerate() {
        key.push_str(if index == 0 { "" } else { "." });
        key.push_str(step);
        if entries.contains_key(&key) {
            return (key, index + 1);
        }
    }
    (steps.first().copied().unwrap_or_default().to_owned(), 1)
}

/// Whether the typed value is null in any of YAML's forms.
fn is_nothing(typed: &str) -> bool {
    matches!(typed.trim(), "" | "~" | "null" | "Null" | "NULL")
}

/// Interprets a typed value. An error is a message and its position in the value.
fn read(change: &str, typed: &str) -> Result<(Value, Setting), (String, Position)> {
    let setting = |document, not_yaml| Setting {
        change: change.to_owned(),
        document,
        not_yaml,
    };
    let literal = |why| (Value::String(typed.to_owned()), setting(None, why));
    if is_nothing(typed) {
        return Ok((Value::Null, setting(None, None)));
    }
    let quoted = typed.trim_start().starts_with(['"', '\'']);
    match yaml::parse(typed) {
        Ok(document) if !document.problems.is_empty() => {
            let problem = &document.problems[0];
            let place = problem.position.unwrap_or(Position { line: 1, column: 1 });
            // `.inf` may be the name of a file.
            match document.value {
                Value::Null => Ok(literal(Some(problem.message.clone()))),
                _ => Err((problem.message.clone(), place)),
            }
        }
        Ok(document) => Ok(match &document.value {
            Value::String(text) if quoted => (Value::String(text.clone()), setting(None, None)),
            Value::String(_) | Value::Null => literal(None),
            value => (value.clone(), setting(Some(document.clone()), None)),
        }),
        Err(error) => Ok(literal(Some(error.message))),
    }
}

/// How to type a value after `path=` so that it is read as this value. `written` is its form in a text.
pub(super) fn typed(value: &Value, written: Option<&str>) -> String {
    match value {
        Value::String(text) => match read("", text) {
            Ok((Value::String(same), _)) if same == *text => text.clone(),
            _ => value.to_string(),
        },
        Value::Null => String::new(),
        // Also YAML.
        value => written.map_or_else(|| value.to_string(), str::to_owned),
    }
}

fn argument(change: &str, position: Position) -> Argument {
    Argument {
        text: format!("--set {change}"),
        position,
    }
}

/// A position in the path, in bytes.
fn in_path(path: &str, bytes: usize) -> Position {
    behind(path.get(..bytes).unwrap_or_default())
}

/// A place in the value.
fn in_value(path: &str, typed: &str, place: Position) -> Position {
    let begin = behind(&format!("{path}="));
    let last = typed.chars().count().max(1);
    match place.line {
        1 => Position {
            line: begin.line,
            // If the text ends too early, its last character is marked.
            column: begin.column + place.column.min(last) - 1,
        },
        line => Position {
            line: begin.line + line - 1,
            column: place.column,
        },
    }
}

/// The position in the argument after this many characters of the change.
fn behind(text: &str) -> Position {
    let argument = format!("--set {text}");
    let line = yaml::lines(&argument).count().max(1);
    let column = yaml::lines(&argument)
        .last()
        .unwrap_or_default()
        .chars()
        .count()
        + 1;
    Position { line, column }
}
