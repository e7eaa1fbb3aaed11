//! Completes values: fills in the schema's defaults, and converts numbers to the schema's types.

use serde_json::{Map, Value, json};

use super::branch::{branches, each_child, resolve};
use crate::yaml::escape;

/// 2^53: every whole number up to it is exact as a float.
pub(super) const EXACT: f64 = 9_007_199_254_740_992.0;

/// Fills in the defaults and gives numbers their schema's type (`1` where a real number is expected becomes `1.0`, so that
/// equal settings are equal texts). Returns pointers to the filled-in values.
pub fn settle(schema: &Value, value: &mut Value) -> Vec<String> {
    let mut filled = Vec::new();
    settle_node(
        schema,
        schema,
        value,
        &mut String::new(),
        &mut Some(&mut filled),
    );
    filled
}

/// Converts numbers to their schema's type without filling in defaults.
pub fn settle_numbers(schema: &Value, value: &mut Value) {
    settle_node(schema, schema, value, &mut String::new(), &mut None);
}

fn settle_node(
    root: &Value,
    node: &Value,
    value: &mut Value,
    pointer: &mut String,
    filled: &mut Option<&mut Vec<String>>,
) {
    // Defaults never change the matching alternative: they only add keys that it allows.
    for node in branches(root, node, value) {
        let is = |name: &str| match node.get("type") {
            Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == name),
            Some(kind) => kind == name,
            None => false,
        };
        match value {
            Value::Object(entries) => {
                if let Some(filled) = filled {
                    fill_in(root, node, entries, pointer, filled);
                }
            }
            Value::Number(number) => {
                let real = number.as_f64().unwrap_or(0.0);
                if is("integer") && number.is_f64() && real.fract() == 0.0 && real.abs() <= EXACT {
                    *value = json!(real as i64);
                } else if is("number") && !is("integer") && !number.is_f64() {
                    *value = json!(real);
                }
            }
            _ => {}
        }
        each_child(node, value, pointer, |schema, child, pointer| {
            settle_node(root, schema, child, pointer, filled);
        });
    }
}

/// Adds the properties that are missing and have a default, and their pointers to `filled`.
fn fill_in(
    root: &Value,
    node: &Value,
    entries: &mut Map<String, Value>,
    pointer: &str,
    filled: &mut Vec<String>,
) {
    let properties = node.get("properties").and_then(Value::as_object);
    for (key, schema) in properties.into_iter().flatten() {
        if entries.contains_key(key) {
            continue;
        }
        let own = schema.get("default");
        if let Some(default) = own.or_else(|| resolve(root, schema)?.get("default")) {
            entries.insert(key.clone(), default.clone());
            filled.push(format!("{pointer}/{}", escape(key)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake;

    #[test]
    fn defaults_are_filled_in_at_every_depth() {
        let schema = fake::schema("everything");
        let settled = |mut value: Value| {
            let filled = settle(&schema, &mut value);
            assert!(jsonschema::is_valid(&schema, &value), "{value}");
            (value, filled)
        };
        let (value, filled) = settled(json!({"data": "d"}));
        assert_eq!(
            value,
            json!({
                "data": "d", "steps": 1000, "flag": false, "times": [0], "guidance": null, "loss": "l2", "labels": "balanced", "set": null,
                "schedule": {"type": "cosine", "warmup": 100, "rate": 0.001}, "sources": {}
            })
        );
        assert!(filled.contains(&"/schedule".to_owned()) && !filled.contains(&"/data".to_owned()));
        let (value, _) = settled(
            json!({"data": "d", "schedule": {"type": "constant", "rate": 1}, "steps": 2.0}),
        );
        assert_eq!(
            value["schedule"].to_string(),
            r#"{"type":"constant","rate":1.0}"#
        );
        assert_eq!(value["steps"].to_string(), "2");
        let mut value = json!({"data": "d", "steps": 1e3, "guidance": 2});
        settle_numbers(&schema, &mut value);
        assert_eq!(
            value.to_string(),
            r#"{"data":"d","steps":1000,"guidance":2.0}"#
        );
        let (value, _) = settled(json!({"data": "d", "schedule": {"type": "cosine", "rate": 0.5}}));
        assert_eq!(value["schedule"]["warmup"], 100);
    }
}
