//! The options of a kind of stage as rows of text, for reading.

use serde_json::{Value, json};

use super::branch::resolve;
use super::plain;

/// How deep options inside options are listed: enough for people, and an end for schemas that hold themselves.
const DEPTH: usize = 4;

/// An option for reading: everything as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptionText {
    /// Path from the stage: `schedule.warmup`.
    pub name: String,
    /// What can be written.
    pub kind: String,
    /// The default, or `required`; empty if the parts have their own.
    pub default: String,
    /// What it does.
    pub description: String,
}

/// The options of a kind of stage, options inside options after the one they are in.
pub fn options(schema: &Value) -> Vec<OptionText> {
    let mut found = Vec::new();
    list_options(schema, schema, "", 0, &mut found);
    found
}

fn list_options(root: &Value, node: &Value, path: &str, depth: usize, found: &mut Vec<OptionText>) {
    if depth > DEPTH {
        return;
    }
    let node = resolve(root, node).unwrap_or(node);
    let required = node
        .get("required")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    for (key, option) in node
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        // The tag is shown in the type of the enclosing option.
        if option.get("const").is_some() {
            continue;
        }
        let name = if path.is_empty() {
            key.clone()
        } else {
            format!("{path}.{key}")
        };
        let said = |key: &str| option.get(key).or_else(|| resolve(root, option)?.get(key));
        let description = said("description")
            .and_then(Value::as_str)
            .unwrap_or_default();
        found.push(OptionText {
            name: name.clone(),
            kind: type_text(root, option, 0),
            default: match said("default") {
                Some(Value::Null) => "none".to_owned(),
                // Its parts follow, each with its own.
                Some(Value::Object(parts)) if !parts.is_empty() => String::new(),
                Some(default) => plain(default),
                None if required.contains(&json!(key)) => "required".to_owned(),
                None => String::new(),
            },
            description: brief(description),
        });
        list_inside(root, option, &name, depth + 1, found);
    }
}

/// The options inside one: its own, those of its alternatives, of its items and of its named entries.
fn list_inside(
    root: &Value,
    option: &Value,
    name: &str,
    depth: usize,
    found: &mut Vec<OptionText>,
) {
    let target = resolve(root, option).unwrap_or(option);
    list_options(root, target, name, depth, found);
    for part in alternatives(root, option, 0) {
        if let Some(tag) = tag(part) {
            let description = part.get("description").and_then(Value::as_str);
            found.push(OptionText {
                name: format!("{name}: {tag}"),
                description: brief(description.unwrap_or_default()),
                ..OptionText::default()
            });
        }
        list_options(root, part, name, depth, found);
    }
    if depth < DEPTH {
        for (key, step) in [("items", "[]"), ("additionalProperties", ".<name>")] {
            if let Some(inner) = target.get(key).filter(|inner| inner.is_object()) {
                list_inside(root, inner, &format!("{name}{step}"), depth + 1, found);
            }
        }
    }
}

/// The alternatives of a schema, those inside alternatives in their place.
fn alternatives<'s>(root: &'s Value, node: &'s Value, depth: usize) -> Vec<&'s Value> {
    if depth > DEPTH {
        return Vec::new();
    }
    let node = resolve(root, node).unwrap_or(node);
    let parts = ["anyOf", "oneOf"]
        .iter()
        .filter_map(|key| node.get(key)?.as_array())
        .flatten();
    parts
        .flat_map(|part| {
            let inside = alternatives(root, part, depth + 1);
            if inside.is_empty() {
                vec![resolve(root, part).unwrap_or(part)]
            } else {
                inside
            }
        })
        .collect()
}

/// The tag of a tagged enum's alternative: `{kind: student}`.
fn tag(node: &Value) -> Option<String> {
    let properties = node.get("properties")?.as_object()?;
    properties
        .iter()
        .find_map(|(key, tag)| Some(format!("{{{key}: {}}}", plain(tag.get("const")?))))
}

/// The first paragraph on one line.
fn brief(description: &str) -> String {
    description
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .replace('\n', " ")
}

/// The values that this schema allows.
fn type_text(root: &Value, node: &Value, depth: usize) -> String {
    if depth > 8 {
        return "...".to_owned();
    }
    if let Some(kinds) = node.get("x-retort-artifact").and_then(Value::as_array) {
        let kinds: Vec<&str> = kinds.iter().filter_map(Value::as_str).collect();
        return format!("stage that makes {}", kinds.join(" or "));
    }
    match node.get("x-retort-file").and_then(Value::as_str) {
        Some("dir" | "images") => return "directory".to_owned(),
        Some("weights") => return "file or directory".to_owned(),
        Some(_) => return "file".to_owned(),
        None => {}
    }
    if let Some(target) = resolve(root, node) {
        return type_text(root, target, depth + 1);
    }
    if let Some(constant) = node.get("const") {
        return plain(constant);
    }
    let joined = |parts: Vec<String>| {
        let mut kept: Vec<String> = Vec::new();
        for part in parts {
            if part != "null" && !kept.contains(&part) {
                kept.push(part);
            }
        }
        kept.join(" | ")
    };
    if let Some(choices) = node.get("enum").and_then(Value::as_array) {
        return joined(choices.iter().map(plain).collect());
    }
    for key in ["anyOf", "oneOf"] {
        if let Some(parts) = node.get(key).and_then(Value::as_array) {
            return joined(
                parts
                    .iter()
                    .map(|part| type_text(root, part, depth + 1))
                    .collect(),
            );
        }
    }
    let word = |kind: &str| match kind {
        "integer" => "whole number".to_owned(),
        "string" => "text".to_owned(),
        "boolean" => "true | false".to_owned(),
        "array" => match node
            .get("items")
            .map(|items| type_text(root, items, depth + 1))
        {
            Some(items) if !items.is_empty() => format!("list of {items}"),
            _ => "list".to_owned(),
        },
        "object" => tag(node).unwrap_or_else(|| "mapping".to_owned()),
        other => other.to_owned(),
    };
    match node.get("type") {
        Some(Value::Array(kinds)) => {
            joined(kinds.iter().filter_map(Value::as_str).map(word).collect())
        }
        Some(Value::String(kind)) => word(kind),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake;

    #[test]
    fn options_are_listed_for_reading() {
        let lines: Vec<String> = options(&fake::schema("everything"))
            .into_iter()
            .map(|option| {
                format!(
                    "{} ({}) [{}] {}",
                    option.name, option.kind, option.default, option.description
                )
            })
            .collect();
        assert_eq!(
            lines,
            [
                "data (file) [required] The images.",
                "steps (whole number) [1000] ",
                "flag (true | false) [false] ",
                "times (list of whole number) [[0]] ",
                "guidance (number) [none] ",
                "loss (l1 | l2) [l2] Which loss.",
                "labels (balanced | list of whole number | mapping) [balanced] ",
                "labels.file (file) [required] ",
                "set (stage that makes tokenizer) [none] ",
                "schedule ({type: constant} | {type: cosine}) [] ",
                "schedule: {type: constant} () [] ",
                "schedule.rate (number) [0.001] ",
                "schedule: {type: cosine} () [] ",
                "schedule.rate (number) [0.001] ",
                "schedule.warmup (whole number) [100] ",
                "sources (mapping) [{}] ",
                "sources.<name>.stage (stage that makes samples) [required] ",
                "sources.<name>.file (directory) [required] ",
            ]
        );
    }
}
