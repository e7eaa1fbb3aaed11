//! Options with a meaning for the runner: those that name stages (`x-retort-artifact`) and files (`x-retort-file`), and
//! those that change no result (`x-retort-same-result`).

use serde_json::Value;

use super::branch::{branches, each_child};

/// An option with a meaning for the runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotation {
    /// JSON pointer to the value.
    pub pointer: String,
    /// What it names.
    pub target: OptionTarget,
}

/// What an option names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionTarget {
    /// Another stage whose output has one of these kinds (empty: any).
    Artifact(Vec<String>),
    /// A file.
    File,
    /// A directory.
    Dir,
    /// A directory of images: only the files that an image loader reads.
    Images,
    /// Weights of a network: a file, or the folder or index of several.
    Weights,
    /// Nothing: it does not affect results.
    Nothing,
}

/// The options in `value` that name stages or files, including null ones that could, and those that change no result.
pub fn annotations(schema: &Value, value: &Value) -> Vec<Annotation> {
    let mut found = Vec::new();
    // A copy, because `each_child` lends children mutably.
    let mut value = value.clone();
    annotate_node(schema, schema, &mut value, &mut String::new(), &mut found);
    found
}

fn annotate_node(
    root: &Value,
    node: &Value,
    value: &mut Value,
    pointer: &mut String,
    found: &mut Vec<Annotation>,
) {
    for node in branches(root, node, value) {
        if node.get("x-retort-same-result") == Some(&Value::Bool(true)) {
            let annotation = Annotation {
                pointer: pointer.clone(),
                target: OptionTarget::Nothing,
            };
            if !found.contains(&annotation) {
                found.push(annotation);
            }
            continue;
        }
        let target = if let Some(kinds) = node.get("x-retort-artifact") {
            let kinds = kinds
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect();
            Some(OptionTarget::Artifact(kinds))
        } else {
            match node.get("x-retort-file").and_then(Value::as_str) {
                Some("dir") => Some(OptionTarget::Dir),
                Some("images") => Some(OptionTarget::Images),
                Some("weights") => Some(OptionTarget::Weights),
                Some(_) => Some(OptionTarget::File),
                None => None,
            }
        };
        match value {
            Value::String(_) | Value::Null => {
                if let Some(target) = target {
                    let annotation = Annotation {
                        pointer: pointer.clone(),
                        target,
                    };
                    if !found.contains(&annotation) {
                        found.push(annotation);
                    }
                }
            }
            _ => each_child(node, value, pointer, |schema, child, pointer| {
                annotate_node(root, schema, child, pointer, found);
            }),
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
        let found: Vec<(String, OptionTarget)> = annotations(&schema, &value)
            .into_iter()
            .map(|found| (found.pointer, found.target))
            .collect();
        let artifact = |kind: &str| OptionTarget::Artifact(vec![kind.to_owned()]);
        assert_eq!(
            found,
            [
                ("/data".to_owned(), OptionTarget::File),
                ("/set".to_owned(), artifact("tokenizer")),
                ("/sources/a/stage".to_owned(), artifact("samples")),
                ("/sources/b/file".to_owned(), OptionTarget::Dir),
            ]
        );
        let schema = json!({"properties": {"train": {"properties": {
            "zero_stage": {"type": "integer", "x-retort-same-result": true}, "steps": {"type": "integer"}
        }}}});
        let found = annotations(&schema, &json!({"train": {"zero_stage": 1, "steps": 3}}));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pointer, "/train/zero_stage");
        assert_eq!(found[0].target, OptionTarget::Nothing);
    }
}
