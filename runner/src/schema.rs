//! The JSON schema of recipes, and checks of values by a schema.
//!
//! In: descriptions of plugins. Out: the schema for editors ([`recipe_schema`]), errors of a value in plain words
//! ([`check`]), the value with defaults ([`settle`]) and the options that name stages and files ([`annotations`]).
//! Deliberately absent: positions in the text, and relations between stages.
//!
//! Plugins generate their schemas with schemars from Rust types. So, beyond plain validation, this module understands the
//! forms that schemars generates: `$ref` into `$defs` with siblings, `anyOf` with null for `Option`, `oneOf` of constants or
//! of objects with a constant tag for enums, `default` beside each property.

use std::cell::Cell;
use std::time::{Duration, Instant};

use retort_abi::{Description, StageKind};
use serde_json::{Map, Value, json};

use crate::sweep;

mod annotation;
mod branch;
mod defaults;
mod option;
mod text;
mod violation;

pub use annotation::{Annotation, OptionTarget, annotations};
pub use defaults::{settle, settle_numbers};
pub use option::{OptionText, options};
pub use text::take_texts;
use violation::type_name;
pub use violation::{Checker, Violation, WRITE_A_VALUE, check};

/// Keys of a stage that the runner reads; all others are options of the stage's kind.
pub const RESERVED: [&str; 11] = [
    "kind",
    "plugin",
    "device",
    "dtype",
    "seed",
    "threads",
    "workers",
    "min_workers",
    "retries",
    "timeout",
    "description",
];

/// Names of stages.
pub const NAME_PATTERN: &str = "^[a-z0-9][a-z0-9_-]*$";

/// Names of recipes: any file name, because a recipe without a name takes its file's.
pub const RECIPE_NAME_PATTERN: &str =
    r"^[^\s/\x00-\x1f\x7f-\x9f]([^/\x00-\x1f\x7f-\x9f]*[^\s/\x00-\x1f\x7f-\x9f])?$";

/// More threads than any machine has.
const MAX_THREADS: usize = 4096;

/// Maximum workers of a stage: more elements than most clusters allow in an array. Processes on one machine are fewer:
/// [`MAX_PROCESSES`].
pub const MAX_WORKERS: usize = 4096;

/// Maximum automatic restarts of a training.
const MAX_RETRIES: usize = 1000;

/// Workers of a stage on one machine.
pub const MAX_PROCESSES: usize = 256;

/// A reference (`${params.width}`) is valid for every option in the editor's schema.
const REFERENCE_PATTERN: &str = r"^\$\{[^}]+\}$";

/// The schema of recipes for editors: the runner's part and the stages of these plugins.
pub fn recipe_schema(plugins: &[Description]) -> Value {
    let mut definitions = Map::new();
    let mut kinds: Vec<(&str, &str)> = Vec::new();
    for stage in plugins.iter().flat_map(|plugin| &plugin.stages) {
        if !kinds.iter().any(|(kind, _)| *kind == stage.kind) {
            kinds.push((&stage.kind, &stage.summary));
        }
    }
    let mut conditions = Vec::new();
    for (kind, summary) in &kinds {
        // Plugins that share an engine have the same schema; if they differ, either may apply.
        let mut schemas: Vec<&Value> = Vec::new();
        for stage in plugins
            .iter()
            .flat_map(|plugin| &plugin.stages)
            .filter(|stage| stage.kind == *kind)
        {
            if !schemas.contains(&&stage.schema) {
                schemas.push(&stage.schema);
            }
        }
        let count = schemas.len();
        let mut variants = Vec::new();
        for (index, schema) in schemas.into_iter().enumerate() {
            let prefix = if count == 1 {
                format!("stage.{kind}")
            } else {
                format!("stage.{kind}.{index}")
            };
            let mut stages = plugins.iter().flat_map(|plugin| &plugin.stages);
            let divisible = |stage: &StageKind| stage.kind == *kind && stage.divisible;
            let together = stages
                .clone()
                .any(|stage| divisible(stage) && stage.together);
            let divisible = stages.any(divisible);
            let keys = RESERVED.into_iter().filter(|key| match *key {
                "workers" => divisible,
                "min_workers" | "retries" => together,
                _ => true,
            });
            let definition = stage_schema(schema, &prefix, (kind, summary), keys, &mut definitions);
            definitions.insert(prefix.clone(), definition);
            variants.push(json!({"$ref": format!("#/$defs/{prefix}")}));
        }
        let then = if variants.len() == 1 {
            variants.remove(0)
        } else {
            json!({"anyOf": variants})
        };
        conditions.push(json!({
            "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": then,
        }));
    }
    let mut stage = open_stage_schema();
    if !kinds.is_empty() {
        let names: Vec<&str> = kinds.iter().map(|(kind, _)| *kind).collect();
        let summaries: Vec<&str> = kinds.iter().map(|(_, summary)| *summary).collect();
        stage["properties"]["kind"]["enum"] = json!(names);
        stage["properties"]["kind"]["enumDescriptions"] = json!(summaries);
        stage["allOf"] = json!(conditions);
    }
    let mut schema = runner_schema();
    if !plugins.is_empty() {
        let names: Vec<&str> = plugins.iter().map(|plugin| plugin.name.as_str()).collect();
        schema["properties"]["backend"]["examples"] = json!(names);
        stage["properties"]["plugin"]["examples"] = json!(names);
    }
    definitions.values_mut().for_each(allow_references);
    // Keys that select the schema cannot be `${...}`; the other keys can.
    let open = |schema: &mut Value, fixed: &[&str]| {
        let properties = schema["properties"].as_object_mut().into_iter().flatten();
        let free = properties.filter(|(key, _)| !fixed.contains(&key.as_str()));
        free.for_each(|(_, property)| allow_references(property));
    };
    open(&mut stage, &["kind"]);
    open(
        &mut schema,
        &[
            "version",
            "name",
            "params",
            "paths",
            "artifacts",
            "sweep",
            "stages",
        ],
    );
    definitions.insert("stage".to_owned(), stage);
    schema["$defs"] = Value::Object(definitions);
    schema["properties"]["stages"]["additionalProperties"] = json!({"$ref": "#/$defs/stage"});
    schema
}

/// The runner's part of the schema: stages are objects with a kind and any options.
pub fn runner_schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "retort recipe",
        "description": "Stages that distil an autoregressive image model into a one-step sampler.",
        "type": "object",
        "required": ["version", "stages"],
        "additionalProperties": false,
        "properties": {
            "version": {"type": "integer", "const": 1, "description": "Version of the recipe format: 1."},
            "name": {
                "type": "string", "pattern": RECIPE_NAME_PATTERN, "maxLength": 200,
                "description": "Name under which runs of this recipe are found. Default: the file's name."
            },
            "description": {"type": "string", "description": "What the recipe is for."},
            "seed": {
                "type": "integer", "minimum": 0, "maximum": 9_007_199_254_740_991_u64, "default": 0,
                "description": "Seed from which every stage's own seed is derived."
            },
            "backend": {
                "type": "string",
                "description": "Plugin that runs the stages; a stage may name another with `plugin`."
            },
            "device": device_schema("Where to compute: `cpu`, `cuda`, `cuda:1`, or `auto`, the first usable GPU of the plugin, else the CPU."),
            "dtype": {"type": "string", "description": "Element type of the computation: `f32`, `bf16`. Default: the plugin's first."},
            "threads": {
                "type": "integer", "minimum": 1, "maximum": MAX_THREADS,
                "description": "Threads of a stage. Default: all cores, divided among stages that run at the same time."
            },
            "params": {
                "type": "object",
                "description": "Values used elsewhere as `${params.name}`."
            },
            "paths": {
                "type": "object", "additionalProperties": {"type": "string"},
                "description": "Paths used elsewhere as `${paths.name}`; relative ones start from the recipe's directory."
            },
            "artifacts": {
                "type": "object", "propertyNames": {"pattern": NAME_PATTERN},
                "description": "Artifacts of the store that stages take by these names, like outputs of stages.",
                "additionalProperties": {
                    "type": "object", "additionalProperties": false, "required": ["hash", "kind"],
                    "properties": {
                        "hash": {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "Its full hash, from `retort artifacts list --json`."},
                        "kind": {"type": "string", "description": "Its kind: `student`, `teacher`."}
                    }
                }
            },
            "sweep": sweep::schema(),
            "stages": {
                "type": "object", "minProperties": 1,
                "propertyNames": {"pattern": NAME_PATTERN},
                "description": "The stages by name. A stage takes another's output by naming it.",
                "additionalProperties": open_stage_schema()
            }
        }
    })
}

/// Maximum characters of a name that is compared with others.
const LONGEST_COMPARED: usize = 64;
/// Maximum pairs of characters that a thread compares per second: a recipe may have thousands of mistakes with thousands of
/// candidate names each.
const COMPARED_PER_SECOND: usize = 2_000_000;

/// Whether this many pairs of characters may be compared.
fn may_compare(pairs: usize) -> bool {
    thread_local! {
        static COMPARED: Cell<Option<(Instant, usize)>> = const { Cell::new(None) };
    }
    let now = Instant::now();
    let (since, count) = COMPARED
        .get()
        .filter(|(since, _)| now.duration_since(*since) < Duration::from_secs(1))
        .unwrap_or((now, 0));
    COMPARED.set(Some((since, count.saturating_add(pairs))));
    count < COMPARED_PER_SECOND
}

/// The nearest of `known` to `name`, if it is near enough.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = name.chars().take(LONGEST_COMPARED + 1).count();
    if length > LONGEST_COMPARED || !may_compare(0) {
        return None;
    }
    let name = name.to_lowercase();
    let mut best: Option<(usize, &str)> = None;
    for other in known {
        let other_length = other.chars().take(2 * LONGEST_COMPARED).count();
        let most = (length.max(other_length) / 3).max(1);
        if length.abs_diff(other_length) > most {
            continue;
        }
        if !may_compare(length * other_length) {
            break;
        }
        let lower = other.to_lowercase();
        let distance = match name == lower {
            true => 0,
            false => strsim::damerau_levenshtein(&name, &lower).max(1),
        };
        if distance <= most && best.is_none_or(|best| (distance, other) < best) {
            best = Some((distance, other));
        }
    }
    best.map(|(_, other)| other)
}

/// "did you mean" the nearest, or the list of names.
pub fn suggest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    match nearest(name, known.iter().copied()) {
        Some(near) => Some(format!("did you mean `{near}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known: {}", list(&known))),
    }
}

/// Names in quotes, the first of them.
pub fn list(names: &[&str]) -> String {
    const MOST: usize = 30;
    let mut text = names
        .iter()
        .take(MOST)
        .map(|name| format!("`{name}`"))
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > MOST {
        text.push_str(&format!(" and {} more", names.len() - MOST));
    }
    text
}

/// A value in YAML.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// A stage with any options.
fn open_stage_schema() -> Value {
    let mut properties = json!({
        "kind": {"type": "string", "description": "What the stage does."},
        "plugin": {"type": "string", "description": "Plugin that runs this stage. Default: the recipe's `backend`."},
        "device": device_schema("Where this stage computes. Default: the recipe's `device`."),
        "dtype": {"type": "string", "description": "Element type of this stage. Default: the recipe's `dtype`."},
        "seed": {
            "type": "integer", "minimum": 0, "maximum": 9_007_199_254_740_991_u64,
            "description": "Seed of this stage. Default: derived from the recipe's seed and the stage's name."
        },
        "threads": {"type": "integer", "minimum": 1, "maximum": MAX_THREADS, "description": "Threads of this stage."},
        "workers": {
            "type": "integer", "minimum": 1, "maximum": MAX_WORKERS,
            "description": "Worker processes that divide this stage's work at the same time, if its kind can be divided. They share its threads and, where no GPU is named by its number, all usable GPUs. Default: 1."
        },
        "min_workers": {
            "type": "integer", "minimum": 1, "maximum": MAX_WORKERS,
            "description": "The least number of workers with which a training continues by itself, from the last checkpoint, when others are lost. Default: all; then only `retort resume` continues it."
        },
        "retries": {
            "type": "integer", "minimum": 0, "maximum": MAX_RETRIES,
            "description": "How often a training with several workers restarts all of them by itself, from the last checkpoint, when one is lost. On Slurm `requeue` says how often. Default: 0; then only `retort resume` continues it."
        },
        "timeout": {
            "type": "string",
            "description": "When to end an attempt of this stage (`90s`, `30m`, `2h 30m`). Default: never."
        },
        "description": {"type": "string", "description": "What the stage is for."}
    });
    // The recipe's value comes first, so `auto` is not this key's default.
    properties["device"]
        .as_object_mut()
        .map(|device| device.remove("default"));
    json!({"type": "object", "required": ["kind"], "properties": properties})
}

fn device_schema(description: &str) -> Value {
    json!({"type": "string", "pattern": r"^(auto|cpu|cuda(:[0-9]+)?)$", "default": "auto", "description": description})
}

/// The closed schema of a stage of one kind: the plugin's options beside these reserved keys. Its definitions go to
/// `definitions` under names that begin with `prefix`.
fn stage_schema(
    schema: &Value,
    prefix: &str,
    (kind, summary): (&str, &str),
    keys: impl Iterator<Item = &'static str>,
    definitions: &mut Map<String, Value>,
) -> Value {
    let mut schema = schema.clone();
    rename_references(&mut schema, prefix);
    let Some(object) = schema.as_object_mut() else {
        return schema;
    };
    if let Some(Value::Object(own)) = object.remove("$defs") {
        for (name, definition) in own {
            definitions.insert(format!("{prefix}.{name}"), definition);
        }
    }
    object.remove("$schema");
    object.insert("title".to_owned(), json!(kind));
    if !summary.is_empty() {
        object.insert("description".to_owned(), json!(summary));
    }
    let reserved = open_stage_schema();
    let mut properties = Map::new();
    for key in keys {
        properties.insert(key.to_owned(), reserved["properties"][key].clone());
    }
    properties["kind"]["const"] = json!(kind);
    if let Some(Value::Object(own)) = object.remove("properties") {
        properties.extend(own);
    }
    object.insert("properties".to_owned(), Value::Object(properties));
    let mut required = vec![json!("kind")];
    if let Some(Value::Array(own)) = object.remove("required") {
        required.extend(own);
    }
    object.insert("required".to_owned(), Value::Array(required));
    schema
}

/// `#/$defs/X` -> `#/$defs/<prefix>.X`
fn rename_references(schema: &mut Value, prefix: &str) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                match value
                    .as_str()
                    .and_then(|text| text.strip_prefix("#/$defs/"))
                {
                    Some(name) if key == "$ref" => {
                        *value = json!(format!("#/$defs/{prefix}.{name}"))
                    }
                    _ => rename_references(value, prefix),
                }
            }
        }
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| rename_references(item, prefix)),
        _ => {}
    }
}

/// Allows `${...}` for any value in the editor's schema. A pattern applies only to texts, so adding the type string is
/// enough; alternatives get one more alternative.
fn allow_references(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    for key in ["properties", "$defs"] {
        if let Some(Value::Object(children)) = map.get_mut(key) {
            children.values_mut().for_each(allow_references);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(child) = map.get_mut(key) {
            allow_references(child);
        }
    }
    // `oneOf` would refuse a text that several alternatives now accept.
    if let Some(alternatives) = map.remove("oneOf") {
        map.insert("anyOf".to_owned(), alternatives);
    }
    for key in ["anyOf", "allOf", "prefixItems"] {
        if let Some(Value::Array(children)) = map.get_mut(key) {
            children.iter_mut().for_each(allow_references);
        }
    }
    let reference = json!({"type": "string", "pattern": REFERENCE_PATTERN});
    if let Some(Value::Array(alternatives)) = map.get_mut("anyOf") {
        alternatives.push(reference);
        return;
    }
    // A constant is a tag or one of alternatives; a stage is a mapping.
    if map.contains_key("const") || map.contains_key("allOf") || map.contains_key("title") {
        return;
    }
    if let Some(choices) = map.remove("enum") {
        map.remove("type");
        map.insert("anyOf".to_owned(), json!([{"enum": choices}, reference]));
        return;
    }
    if map.get("type") == Some(&json!("string")) {
        if let Some(pattern) = map.remove("pattern") {
            map.insert("anyOf".to_owned(), json!([{"pattern": pattern}, reference]));
        }
        return;
    }
    let types = match map.get("type") {
        Some(Value::String(kind)) => vec![json!(kind)],
        Some(Value::Array(kinds)) if !kinds.contains(&json!("string")) => kinds.clone(),
        _ => return,
    };
    let wanted: Vec<String> = types
        .iter()
        .filter_map(Value::as_str)
        .filter(|name| *name != "null")
        .map(type_name)
        .collect();
    map.insert(
        "type".to_owned(),
        Value::Array(types.into_iter().chain([json!("string")]).collect()),
    );
    map.insert("pattern".to_owned(), json!(REFERENCE_PATTERN));
    // The editors' message instead of "does not match the pattern".
    let message = format!("Expected {}, or ${{params.name}}.", wanted.join(" or "));
    map.insert("patternErrorMessage".to_owned(), json!(message));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake;

    #[test]
    fn the_editors_schema_holds_recipes() {
        let schema = recipe_schema(&[fake::description()]);
        let validator = jsonschema::validator_for(&schema).unwrap();
        let check = |stage: Value, valid: bool| {
            let recipe = json!({"version": 1, "backend": "fake", "stages": {"s": stage}});
            let errors: Vec<String> = validator
                .iter_errors(&recipe)
                .map(|error| error.to_string())
                .collect();
            assert_eq!(errors.is_empty(), valid, "{recipe}: {errors:?}");
        };
        let ok = json!({"kind": "everything", "data": "d", "schedule": {"type": "cosine"}, "timeout": "3m"});
        check(ok, true);
        check(
            json!({"kind": "everything", "data": "d", "steps": "${params.n}", "loss": "${params.l}"}),
            true,
        );
        check(
            json!({"kind": "everything", "data": "d", "steps": "many"}),
            false,
        );
        check(
            json!({"kind": "everything", "data": "d", "stpes": 1}),
            false,
        );
        check(json!({"kind": "everything"}), false);
        check(
            json!({"kind": "everything", "data": "d", "workers": 2}),
            true,
        );
        check(
            json!({"kind": "tokenizer", "data": "d", "workers": 2}),
            false,
        );
        check(json!({"kind": "nothing"}), false);
        let definition = &schema["$defs"]["stage.everything"];
        assert_eq!(definition["properties"]["steps"]["default"], 1000);
        assert_eq!(
            definition["properties"]["data"]["description"],
            "The images."
        );
    }

    #[test]
    fn near_names_are_found() {
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(
                nearest(name, ["steps", "seed", "teacher", "tokenizer"]),
                expected,
                "{name}"
            );
        };
        check("stpes", Some("steps"));
        check("Steps", Some("steps"));
        check("taecher", Some("teacher"));
        check("tokeniser", Some("tokenizer"));
        check("width", None);
    }
}
