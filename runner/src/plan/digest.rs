//! The key of a stage's result.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::PlannedStage;

/// Digest of a stage: equal digests mean that a result can be reused.
#[derive(Debug, Clone, PartialEq)]
pub struct Digest {
    /// BLAKE3 of the components' canonical JSON, hex.
    pub hex: String,
    /// The components by name, with sorted keys.
    pub components: Value,
}

/// Digest of a stage from the content hashes of its inputs (by name of the stage that made them) and of its files (by pointer
/// into the options). `None` while one of them is unknown.
///
/// In it: kind and revision, options with references and paths replaced by content hashes, seed, kind of device,
/// dtype, plugin name, version and file hash. Not in it: names of stages, threads, workers, timeout, description,
/// paths, options that change no result, and who prepares its data.
pub fn digest(
    stage: &PlannedStage,
    input_hashes: &BTreeMap<String, String>,
    file_hashes: &BTreeMap<String, String>,
) -> Option<Digest> {
    let mut options = stage.options.clone();
    for reference in stage.references.iter().filter(|one| !one.prepared) {
        let hash = input_hashes.get(&reference.stage)?;
        *options.pointer_mut(&reference.pointer)? = Value::String(format!("artifact:{hash}"));
    }
    for file in &stage.files {
        let hash = file_hashes.get(&file.pointer)?;
        *options.pointer_mut(&file.pointer)? = Value::String(format!("file:{hash}"));
    }
    for pointer in &stage.free {
        let (parent, key) = pointer.rsplit_once('/')?;
        if let Some(Value::Object(options)) = options.pointer_mut(parent) {
            options.remove(key);
        }
    }
    let components = sorted(json!({
        "device": stage.device_kind(),
        "dtype": stage.dtype,
        "kind": {"name": stage.kind, "revision": stage.revision},
        "options": options,
        "plugin": {"hash": stage.plugin.hash, "name": stage.plugin.name, "version": stage.plugin.version},
        "seed": stage.seed,
    }));
    let hex = blake3::hash(components.to_string().as_bytes())
        .to_hex()
        .to_string();
    Some(Digest { hex, components })
}

/// The value with the keys of all objects sorted, so that equal values have equal texts.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let entries: BTreeMap<String, Value> = map
                .into_iter()
                .map(|(key, value)| (key, sorted(value)))
                .collect();
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::plan::{Threads, fake};

    #[test]
    fn the_digest_holds_what_decides_the_result() {
        let plan = fake::plan(
            "version: 1\nbackend: fake\nstages:\n  codes: {kind: tokenizer, data: d.csv}\n  teacher: {kind: pretrain, tokenizer: codes}\n",
            &[],
        )
        .unwrap();
        let stage = plan.stage("teacher").unwrap();
        let inputs = BTreeMap::from([("codes".to_owned(), "abc".to_owned())]);
        let hex =
            |stage: &PlannedStage, inputs| digest(stage, inputs, &BTreeMap::new()).unwrap().hex;
        let first = hex(stage, &inputs);
        let mut same = stage.clone();
        (same.name, same.threads, same.workers, same.timeout) = (
            "other".into(),
            Threads::Fixed(9),
            vec!["cpu".into(); 3],
            Some(Duration::from_secs(1)),
        );
        assert_eq!(hex(&same, &inputs), first);
        same.options["zero_stage"] = json!(1);
        assert_ne!(hex(&same, &inputs), first);
        same.free = vec!["/zero_stage".into()];
        assert_eq!(hex(&same, &inputs), first);
        type Change = fn(&mut PlannedStage);
        let changes: [Change; 6] = [
            |stage| stage.seed += 1,
            |stage| stage.device = "cuda:0".into(),
            |stage| stage.dtype = "bf16".into(),
            |stage| stage.revision += 1,
            |stage| stage.plugin.hash.push('x'),
            |stage| stage.options["steps"] = json!(3),
        ];
        for change in changes {
            let mut other = stage.clone();
            change(&mut other);
            assert_ne!(hex(&other, &inputs), first);
        }
        assert_ne!(
            hex(
                stage,
                &BTreeMap::from([("codes".to_owned(), "abd".to_owned())])
            ),
            first
        );
        assert_eq!(digest(stage, &BTreeMap::new(), &BTreeMap::new()), None);
    }
}
