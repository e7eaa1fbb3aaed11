//! Which parts of a schema apply to a value: through `$ref`, `allOf`, and the intended alternative of `anyOf` and `oneOf`.
//! Every descent into values along a schema starts here.

use serde_json::Value;

use crate::yaml::escape;

/// The schemas without alternatives that apply to `value` at `node`: the node itself, its references, and the matching
/// alternative. If none matches (the value is invalid), all without a contradicting tag.
pub(super) fn branches<'s>(root: &'s Value, node: &'s Value, value: &Value) -> Vec<&'s Value> {
    fn gather<'s>(
        root: &'s Value,
        node: &'s Value,
        value: &Value,
        depth: usize,
        found: &mut Vec<&'s Value>,
    ) {
        // A schema that refers to itself without descending.
        if depth > 32 {
            return;
        }
        found.push(node);
        if let Some(target) = resolve(root, node) {
            gather(root, target, value, depth + 1, found);
        }
        for part in node
            .get("allOf")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            gather(root, part, value, depth + 1, found);
        }
        for key in ["anyOf", "oneOf"] {
            let alternatives: Vec<&Value> = node
                .get(key)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .collect();
            let fit = |strict: bool| {
                alternatives
                    .iter()
                    .copied()
                    .filter(move |part| fits(root, part, value, strict, 0))
            };
            match fit(true).next() {
                Some(part) => gather(root, part, value, depth + 1, found),
                None => fit(false).for_each(|part| gather(root, part, value, depth + 1, found)),
            }
        }
    }
    let mut found = Vec::new();
    gather(root, node, value, 0, &mut found);
    found
}

/// The definition that a `$ref` of this node names.
pub(super) fn resolve<'s>(root: &'s Value, node: &Value) -> Option<&'s Value> {
    root.pointer(node.get("$ref")?.as_str()?.strip_prefix('#')?)
}

/// Whether `value` is meant for an alternative, judged by type, constants and, if strict, by its keys.
pub(super) fn fits(root: &Value, node: &Value, value: &Value, strict: bool, depth: usize) -> bool {
    if depth > 32 {
        return true;
    }
    if resolve(root, node).is_some_and(|target| !fits(root, target, value, strict, depth + 1)) {
        return false;
    }
    for key in ["anyOf", "oneOf"] {
        let fits_one = |parts: &Vec<Value>| {
            parts
                .iter()
                .any(|part| fits(root, part, value, strict, depth + 1))
        };
        if !node.get(key).and_then(Value::as_array).is_none_or(fits_one) {
            return false;
        }
    }
    let of_type = |kind: &Value| match kind.as_str() {
        Some("integer") => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        Some("null") => value.is_null(),
        _ => true,
    };
    let type_fits = match node.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(of_type),
        Some(kind) => of_type(kind),
        None => true,
    };
    let constant_fits = |node: &Value, value: &Value| {
        node.get("const").is_none_or(|constant| constant == value)
            && node
                .get("enum")
                .and_then(Value::as_array)
                .is_none_or(|options| options.contains(value))
    };
    if !type_fits || !constant_fits(node, value) {
        return false;
    }
    let Some(entries) = value.as_object() else {
        return true;
    };
    let properties = node.get("properties").and_then(Value::as_object);
    let tags_fit = properties.into_iter().flatten().all(|(key, schema)| {
        entries
            .get(key)
            .is_none_or(|value| schema.get("const").is_none_or(|constant| constant == value))
    });
    if !strict {
        return tags_fit;
    }
    let complete = node
        .get("required")
        .and_then(Value::as_array)
        .is_none_or(|required| {
            required
                .iter()
                .filter_map(Value::as_str)
                .all(|key| entries.contains_key(key))
        });
    let closed = node.get("additionalProperties") == Some(&Value::Bool(false));
    let known = !closed
        || entries
            .keys()
            .all(|key| properties.is_some_and(|known| known.contains_key(key)));
    tags_fit && complete && known
}

pub(super) fn child<'v>(value: &'v Value, step: &str) -> Option<&'v Value> {
    match value {
        Value::Object(map) => map.get(step),
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        _ => None,
    }
}

/// Calls `visit` for the properties or items of `value` that have a schema at `node`: with that schema, the child and its
/// JSON pointer. `pointer` is that of `value`.
pub(super) fn each_child<'s>(
    node: &'s Value,
    value: &mut Value,
    pointer: &mut String,
    mut visit: impl FnMut(&'s Value, &mut Value, &mut String),
) {
    let length = pointer.len();
    let mut go = |step: &str, child: &mut Value| {
        if let Some(schema) = child_schema(node, step) {
            pointer.push('/');
            pointer.push_str(&escape(step));
            visit(schema, child, pointer);
            pointer.truncate(length);
        }
    };
    match value {
        Value::Object(entries) => entries.iter_mut().for_each(|(key, child)| go(key, child)),
        Value::Array(items) => {
            for (index, child) in items.iter_mut().enumerate() {
                go(&index.to_string(), child);
            }
        }
        _ => {}
    }
}

/// The schema of a property or item.
pub(super) fn child_schema<'s>(node: &'s Value, step: &str) -> Option<&'s Value> {
    let property = node
        .get("properties")
        .and_then(|properties| properties.get(step));
    let item = || {
        let index = step.parse::<usize>().ok()?;
        node.get("prefixItems")
            .and_then(|items| items.get(index))
            .or_else(|| node.get("items"))
    };
    property
        .or_else(|| {
            node.get("additionalProperties")
                .filter(|schema| schema.is_object())
        })
        .or_else(item)
}
