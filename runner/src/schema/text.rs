//! If a schema expects a text, the written form is the text: `0x10`, `1.50` and `yes` are valid names.

use serde_json::Value;

use super::branch::{branches, each_child, resolve};

/// Replaces values by their written form if the schema accepts a text but not their type. `as_written` returns the written
/// form at a pointer, if known.
pub fn take_texts<'w>(
    schema: &Value,
    value: &mut Value,
    as_written: impl Fn(&str) -> Option<&'w str>,
) {
    take(schema, schema, value, &mut String::new(), &as_written);
}

fn take<'w>(
    root: &Value,
    node: &Value,
    value: &mut Value,
    pointer: &mut String,
    as_written: &dyn Fn(&str) -> Option<&'w str>,
) {
    let mut types = Vec::new();
    gather_types(root, node, 0, &mut types);
    if types.contains(&"string") && !types.iter().any(|kind| is_of(kind, value)) {
        let plain = match value {
            Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
            _ => None,
        };
        if let Some(text) = as_written(pointer).map(str::to_owned).or(plain) {
            *value = Value::String(text);
        }
        return;
    }
    for node in branches(root, node, value) {
        each_child(node, value, pointer, |schema, child, pointer| {
            take(root, schema, child, pointer, as_written);
        });
    }
}

/// The types that a schema accepts, in all its alternatives.
fn gather_types<'s>(root: &'s Value, node: &'s Value, depth: usize, types: &mut Vec<&'s str>) {
    // A schema that refers to itself without descending.
    if depth > 32 {
        return;
    }
    match node.get("type") {
        Some(Value::String(kind)) => types.push(kind),
        Some(Value::Array(kinds)) => types.extend(kinds.iter().filter_map(Value::as_str)),
        _ => {}
    }
    let constants = node.get("enum").and_then(Value::as_array);
    let constants = constants.into_iter().flatten().chain(node.get("const"));
    if node.get("type").is_none() {
        types.extend(constants.map(|constant| match constant {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        }));
    }
    if let Some(target) = resolve(root, node) {
        gather_types(root, target, depth + 1, types);
    }
    for key in ["allOf", "anyOf", "oneOf"] {
        let parts = node.get(key).and_then(Value::as_array);
        for part in parts.into_iter().flatten() {
            gather_types(root, part, depth + 1, types);
        }
    }
}

/// Whether a value is of a type; texts and nothing are as they are meant.
fn is_of(kind: &str, value: &Value) -> bool {
    match value {
        Value::Null | Value::String(_) => true,
        Value::Bool(_) => kind == "boolean",
        Value::Number(_) => matches!(kind, "integer" | "number"),
        Value::Array(_) => kind == "array",
        Value::Object(_) => kind == "object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plan::fake;

    #[test]
    fn texts_are_as_written_where_a_text_is_wanted() {
        let schema = fake::schema("everything");
        let check = |pointer: &str, written: &str, value: Value, expected: Value| {
            let mut options =
                json!({"data": "d", "sources": {"a": {"file": "f"}}, "labels": {"file": "f"}});
            *options.pointer_mut(pointer).unwrap_or(&mut Value::Null) = Value::Null;
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            options.pointer_mut(parent).unwrap()[key] = value;
            take_texts(&schema, &mut options, |at| {
                (at == pointer).then_some(written)
            });
            assert_eq!(options.pointer(pointer), Some(&expected), "{pointer}");
        };
        check("/data", "0x10", json!(16), json!("0x10"));
        check("/data", "a: b", json!({"a": "b"}), json!("a: b"));
        check("/set", "1.50", json!(1.5), json!("1.50"));
        check("/sources/a/file", "1e3", json!(1000.0), json!("1e3"));
        check("/labels/file", "010", json!(8), json!("010"));
        // Known lists and mappings are kept.
        check("/labels", "[1]", json!([1]), json!([1]));
        check("/loss", "True", json!(true), json!("True"));
        check("/steps", "1e1", json!(10.0), json!(10.0));
        check("/data", "~", json!(null), json!(null));
    }
}
