//! Options with a meaning for the runner: those that name stages (`x-retort-artifact`) and files (`x-retort-file`).

use serde_json::Value;

use super::branch::{branches, child_schema};
use crate::yaml::escape;

/// An option with a meaning for the runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotation {
    /// JSON pointer to the value.
    pub pointer: String,
    /// What it names.
    pub target: Target,
}

/// What an option names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Another stage whose output is one of these kinds (empty: any).
    Artifact(Vec<String>),
    /// A file.
    File,
    /// A directory.
    Dir,
    /// A directory of images: of its files only those that a loader of images reads.
    Images,
    /// Weights of a network: a file, or the folder or index of several.
    Weights,
}

/// The options in `value` that name stages or files, or could and are null.
pub fn annotations(schema: &Value, value: &Value) -> Vec<Annotation> {
    let mut found = Vec::new();
    annotate_node(schema, schema, value, "", &mut found);
    found
}

fn annotate_node(
    root: &Value,
    node: &Value,
    value: &Value,
    pointer: &str,
    found: &mut Vec<Annotation>,
) {
    for node in branches(root, node, value) {
        let target = if let Some(kinds) = node.get("x-retort-artifact") {
            let kinds = kinds
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect();
            Some(Target::Artifact(kinds))
        } else {
            match node.get("x-retort-file").and_then(Value::as_str) {
                Some("dir") => Some(Target::Dir),
                Some("images") => Some(Target::Images),
                Some("weights") => Some(Target::Weights),
                Some(_) => Some(Target::File),
                None => None,
            }
        };
        match value {
            Value::String(_) | Value::Null => {
                if let Some(target) = target {
                    let annotation = Annotation {
                        pointer: pointer.to_owned(),
                        target,
                    };
                    if !found.contains(&annotation) {
                        found.push(annotation);
                    }
                }
            }
            Value::Object(entries) => {
                for (key, value) in entries {
                    if let Some(schema) = child_schema(node, key) {
                        annotate_node(
                            root,
                            schema,
                            value,
                            &format!("{pointer}/{}", escape(key)),
                            found,
                        );
                    }
                }
            }
            Value::Array(items) => {
                for (index, value) in items.iter().enumerate() {
                    if let Some(schema) = child_schema(node, &index.to_string()) {
                        annotate_node(root, schema, value, &format!("{pointer}/{index}"), found);
                    }
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plan::fake;

    #[test]
    fn stages_and_files_are_found_wherever_they_are() {
        let schema = fake::schema("everything");
        let value = json!({
            "data": "d.csv", "set": "codes", "sources": {"a": {"stage": "x"}, "b": {"file": "f"}}, "guidance": null
        });
        let found: Vec<(String, Target)> = annotations(&schema, &value)
            .into_iter()
            .map(|found| (found.pointer, found.target))
            .collect();
        let artifact = |kind: &str| Target::Artifact(vec![kind.to_owned()]);
        assert_eq!(
            found,
            [
                ("/data".to_owned(), Target::File),
                ("/set".to_owned(), artifact("tokenizer")),
                ("/sources/a/stage".to_owned(), artifact("samples")),
                ("/sources/b/file".to_owned(), Target::Dir),
            ]
        );
    }
}
