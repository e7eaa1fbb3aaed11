//! The options of a kind of stage as rows of text, for reading.

use serde_json::Value;

use super::branch::resolve;
use super::plain;

/// An option for reading: everything as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionText {
    /// Path from the stage: `schedule.warmup`.
    pub name: String,
    /// What can be written.
    pub kind: String,
    /// What holds when nothing is written; empty where something has to be.
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
    // Deep enough for people, and an end for schemas that hold themselves.
    if depth > 4 {
        return;
    }
    let node = resolve(root, node).unwrap_or(node);
    for (key, option) in node
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        // The tag is in the type of the option around it.
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
                Some(default) => plain(default),
                None => String::new(),
            },
            description: description
                .split("\n\n")
                .next()
                .unwrap_or_default()
                .replace('\n', " "),
        });
        let target = resolve(root, option).unwrap_or(option);
        list_options(root, target, &name, depth + 1, found);
        for alternatives in ["anyOf", "oneOf"] {
            for part in option
                .get(alternatives)
                .or(target.get(alternatives))
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                let inner = resolve(root, part).unwrap_or(part);
                let parts = inner
                    .get("oneOf")
                    .and_then(Value::as_array)
                    .cloned()
                    .unwrap_or_else(|| vec![inner.clone()]);
                for part in &parts {
                    let before = found.len();
                    list_options(root, part, &name, depth + 1, found);
                    // What several alternatives share is listed once.
                    let mut index = before;
                    while index < found.len() {
                        if found[..index].contains(&found[index]) {
                            found.remove(index);
                        } else {
                            index += 1;
                        }
                    }
                }
            }
        }
    }
}

/// What can be written where this schema holds.
fn type_text(root: &Value, node: &Value, depth: usize) -> String {
    if depth > 8 {
        return "...".to_owned();
    }
    if let Some(kinds) = node.get("x-retort-artifact").and_then(Value::as_array) {
        let kinds: Vec<&str> = kinds.iter().filter_map(Value::as_str).collect();
        return format!("stage that makes {}", kinds.join(" or "));
    }
    match node.get("x-retort-file").and_then(Value::as_str) {
        Some("dir") => return "directory".to_owned(),
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
        "object" => {
            let tags = node
                .get("properties")
                .and_then(Value::as_object)
                .into_iter()
                .flatten();
            let tag = tags
                .into_iter()
                .find_map(|(key, tag)| Some(format!("{{{key}: {}}}", plain(tag.get("const")?))));
            tag.unwrap_or_else(|| "mapping".to_owned())
        }
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
                "data (file) [] The images.",
                "steps (whole number) [1000] ",
                "flag (true | false) [false] ",
                "times (list of whole number) [[0]] ",
                "guidance (number) [none] ",
                "loss (l1 | l2) [l2] Which loss.",
                "set (stage that makes tokenizer) [none] ",
                r#"schedule ({type: constant} | {type: cosine}) [{"type":"cosine","warmup":100,"rate":0.001}] "#,
                "schedule.rate (number) [0.001] ",
                "schedule.warmup (whole number) [100] ",
                "sources (mapping) [{}] ",
            ]
        );
    }
}
