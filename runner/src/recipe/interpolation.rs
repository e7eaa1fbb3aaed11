//! Replaces `${params.x}` and `${paths.x}` by their values; `$${` stands for `${`.
//!
//! Each param is resolved once. Expansion is limited, and so is the depth of references between params: a few lines that
//! double forty times are a mistake or an attack.

#![expect(
    clippy::result_large_err,
    reason = "a finding ends a reading: it is made once, its size costs nothing"
)]

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::RecipeSource;
use super::setting::key_of;
use crate::diagnostic::Finding;
use crate::schema;
use crate::yaml::{MAX_DEPTH, escape};

/// Maximum values that references may add to a recipe; each 64 bytes of a text count as one more.
const MAX_COPIES: usize = 200_000;

/// Maximum length of a chain of params.
const MAX_LINKS: usize = 50;

/// Levels of values and references inside each other while a param is resolved.
const MAX_NESTING: usize = 200;

/// Maximum bytes between `${` and `}`.
const MAX_NAME: usize = 1000;

/// Replaces the references of a recipe.
pub(super) struct Interpolation<'a> {
    root: &'a Value,
    source: &'a RecipeSource,
    interpolated: BTreeMap<String, Option<String>>,
    problems: Vec<Finding>,
    /// Resolved names.
    resolved: BTreeMap<String, Result<Resolved, Finding>>,
    /// The references being followed, against cycles.
    open: Vec<String>,
    nesting: usize,
    /// What may still be added.
    room: usize,
    /// Whether the limit has been reported.
    full: bool,
}

/// A recipe without references.
pub(super) struct Interpolated {
    pub(super) value: Value,
    /// The pointers with references; for a value that is a single reference, also the referenced pointer.
    pub(super) interpolated: BTreeMap<String, Option<String>>,
    /// What is wrong.
    pub(super) problems: Vec<Finding>,
    /// Whether everything was within the limit.
    pub(super) complete: bool,
}

/// A name's value.
#[derive(Clone)]
struct Resolved {
    value: Value,
    /// Its form inside a text.
    text: Option<String>,
    size: usize,
    levels: usize,
    links: usize,
}

impl<'a> Interpolation<'a> {
    /// For this value, at `source`.
    pub(super) fn new(root: &'a Value, source: &'a RecipeSource) -> Self {
        Self {
            root,
            source,
            interpolated: BTreeMap::new(),
            problems: Vec::new(),
            resolved: BTreeMap::new(),
            open: Vec::new(),
            nesting: 0,
            room: MAX_COPIES,
            full: false,
        }
    }

    /// Replaces everything.
    pub(super) fn replace(mut self) -> Interpolated {
        Interpolated {
            value: self.replaced(self.root, &mut String::new(), 0),
            interpolated: self.interpolated,
            problems: self.problems,
            complete: !self.full,
        }
    }

    fn replaced(&mut self, value: &Value, pointer: &mut String, depth: usize) -> Value {
        let length = pointer.len();
        match value {
            Value::Object(entries) => entries
                .iter()
                .map(|(key, value)| {
                    pointer.push('/');
                    pointer.push_str(&escape(key));
                    let value = self.replaced(value, pointer, depth + 1);
                    pointer.truncate(length);
                    (key.clone(), value)
                })
                .collect(),
            Value::Array(items) => items
                .iter()
                .enumerate()
                .map(|(index, item)| {
                    pointer.push_str(&format!("/{index}"));
                    let item = self.replaced(item, pointer, depth + 1);
                    pointer.truncate(length);
                    item
                })
                .collect(),
            Value::String(text) if text.contains("${") => {
                let answer = match self.text(text) {
                    Ok(found) if depth + found.levels > MAX_DEPTH => Err(too_far()),
                    answer => answer,
                };
                let origin = whole(text).map(|name| self.pointer_of(name));
                self.interpolated.insert(pointer.clone(), origin);
                match answer {
                    Ok(found) => found.value,
                    Err(finding) => {
                        self.report(Finding {
                            pointer: pointer.clone(),
                            ..finding
                        });
                        value.clone()
                    }
                }
            }
            other => other.clone(),
        }
    }

    /// Exceeding the limit is one mistake, however often.
    fn report(&mut self, finding: Finding) {
        let full = self.room == 0;
        if !(full && std::mem::replace(&mut self.full, full)) {
            self.problems.push(finding);
        }
    }

    /// A text with all references replaced.
    fn text(&mut self, text: &str) -> Result<Resolved, Finding> {
        if let Some(name) = whole(text) {
            let size = self.look_up(name)?.size;
            self.take(size)?;
            return Ok(self.look_up(name)?.clone());
        }
        let mut result = String::new();
        let mut links = 0;
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
            let found = self.look_up(name)?;
            links = links.max(found.links);
            let (size, written) = (found.size, found.text.clone());
            self.take(size)?;
            result.push_str(before);
            match written {
                Some(written) => result.push_str(&written),
                None => {
                    let message = format!(
                        "`${{{name}}}` is not a text or number and cannot be part of a text"
                    );
                    return Err(Finding::error("", message).hint("use it as the whole value"));
                }
            }
            rest = &from[end + 1..];
        }
        result.push_str(rest);
        Ok(Resolved {
            size: 1 + result.len() / 64,
            text: Some(result.clone()),
            value: Value::String(result),
            levels: 0,
            links,
        })
    }

    /// Makes room for a copy.
    fn take(&mut self, size: usize) -> Result<(), Finding> {
        match self.room.checked_sub(size) {
            Some(room) if room > 0 => {
                self.room = room;
                Ok(())
            }
            _ => {
                self.room = 0;
                let message = format!(
                    "the params expand to more than {MAX_COPIES} values or {} MB of text",
                    MAX_COPIES * 64 / 1_000_000
                );
                Err(Finding::error("", message).hint(
                    "params that repeat each other grow with every step; write the values out",
                ))
            }
        }
    }

    /// A name's value. Each is resolved once.
    fn look_up(&mut self, name: &str) -> Result<&Resolved, Finding> {
        if !self.resolved.contains_key(name) {
            let answer = self.resolve(name);
            // A cycle or an overlong chain is reported at its first member.
            self.resolved.insert(name.to_owned(), answer);
        }
        match &self.resolved[name] {
            Ok(found) if self.open.len() + found.links > MAX_LINKS => Err(too_far()),
            Ok(found) => Ok(found),
            Err(finding) => Err(finding.clone()),
        }
    }

    fn resolve(&mut self, name: &str) -> Result<Resolved, Finding> {
        if let Some(first) = self.open.iter().position(|other| other == name) {
            let cycle = format!("{} -> {name}", self.open[first..].join(" -> "));
            return Err(Finding::error(
                "",
                format!("params refer to each other in a cycle: {cycle}"),
            )
            .hint("give one of them a value"));
        }
        if self.open.len() >= MAX_LINKS || self.nesting >= MAX_NESTING {
            return Err(too_far());
        }
        let (value, pointer) = self.find(name)?;
        self.open.push(name.to_owned());
        let answer = self.resolved_value(value, &pointer);
        self.open.pop();
        let mut found = answer?;
        found.links += 1;
        self.take(found.size)?;
        Ok(found)
    }

    /// The value of a name as written, and its pointer.
    fn find(&self, name: &str) -> Result<(&'a Value, String), Finding> {
        let steps: Vec<&str> = name.split('.').collect();
        let first = steps[0];
        if !matches!(first, "params" | "paths") || steps.len() < 2 || name.len() > MAX_NAME {
            return Err(Finding::error("", format!("`${{{name}}}` is not known"))
                .hint("only ${params.name} and ${paths.name} are replaced; write $${ for the characters themselves"));
        }
        let mut value = self.root.get(first).unwrap_or(&Value::Null);
        let mut pointer = format!("/{first}");
        let mut rest = &steps[1..];
        while !rest.is_empty() {
            let (step, used) = match value {
                Value::Object(entries) => key_of(entries, rest),
                _ => (rest[0].to_owned(), 1),
            };
            let child = match value {
                Value::Object(entries) => entries.get(&step),
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
                    hint: schema::suggest(&step, known),
                    ..finding
                });
            };
            value = child;
            pointer.push_str(&format!("/{}", escape(&step)));
            rest = &rest[used..];
        }
        Ok((value, pointer))
    }

    /// The pointer of a name; for an unknown name one that does not exist.
    fn pointer_of(&self, name: &str) -> String {
        match self.find(name) {
            Ok((_, pointer)) => pointer,
            Err(_) => format!("/{}", escape(name)),
        }
    }

    /// A referenced value with all references replaced: its first mistake is an error.
    fn resolved_value(&mut self, value: &Value, pointer: &str) -> Result<Resolved, Finding> {
        self.nesting += 1;
        let answer = match self.nesting {
            ..=MAX_NESTING => self.resolved_parts(value, pointer),
            _ => Err(too_far()),
        };
        self.nesting -= 1;
        answer
    }

    fn resolved_parts(&mut self, value: &Value, pointer: &str) -> Result<Resolved, Finding> {
        let mut whole = Resolved {
            value: Value::Null,
            text: self.source.as_written(pointer).map(str::to_owned),
            size: 1,
            levels: 0,
            links: 0,
        };
        let mut add = |part: Resolved| {
            whole.size += part.size;
            whole.levels = whole.levels.max(part.levels + 1);
            whole.links = whole.links.max(part.links);
            part.value
        };
        whole.value = match value {
            Value::Object(entries) => {
                let mut replaced = Map::new();
                for (key, value) in entries {
                    let inside = format!("{pointer}/{}", escape(key));
                    replaced.insert(key.clone(), add(self.resolved_value(value, &inside)?));
                }
                Value::Object(replaced)
            }
            Value::Array(items) => {
                let mut replaced = Vec::new();
                for (index, item) in items.iter().enumerate() {
                    let inside = format!("{pointer}/{index}");
                    replaced.push(add(self.resolved_value(item, &inside)?));
                }
                Value::Array(replaced)
            }
            Value::String(text) if text.contains("${") => return self.text(text),
            Value::String(text) => {
                whole.size += text.len() / 64;
                whole.text = Some(text.clone());
                value.clone()
            }
            Value::Number(_) | Value::Bool(_) => {
                whole.text = whole.text.or_else(|| Some(value.to_string()));
                value.clone()
            }
            Value::Null => {
                whole.text = None;
                Value::Null
            }
        };
        Ok(whole)
    }
}

/// The name in a text that is a single reference.
fn whole(text: &str) -> Option<&str> {
    let name = text.strip_prefix("${")?.strip_suffix('}')?;
    (!name.contains(['{', '}'])).then(|| name.trim())
}

fn too_far() -> Finding {
    Finding::error(
        "",
        format!(
            "params refer to each other too deeply: at most {MAX_LINKS} one after the other, at most {MAX_DEPTH} levels"
        ),
    )
    .hint("give a param its value instead of a reference to a reference")
}
