//! The JSON schema of recipes, and what follows from a schema for a value.
//!
//! In: descriptions of plugins. Out: the schema that editors read ([`recipe_schema`]), what is wrong with a value in
//! words of people ([`check`]), the value with defaults filled in ([`settle`]) and the options that name stages and
//! files ([`annotations`]). Deliberately absent: places in the text, and anything about how stages hang together.
//!
//! Plugins make their schemas with schemars from Rust types. So what is understood beyond plain validation is what
//! schemars writes: `$ref` into `$defs` with siblings, `anyOf` with null for `Option`, `oneOf` of constants or of
//! objects with a constant tag for enums, `default` beside each property.

use jsonschema::ValidationError;
use jsonschema::error::{TypeKind, ValidationErrorKind};
use retort_abi::Description;
use serde_json::{Map, Value, json};

use crate::yaml::{Part, escape};

/// Keys of a stage that the runner reads; all others are options of the stage's kind.
pub const RESERVED: [&str; 8] = [
    "kind",
    "plugin",
    "device",
    "dtype",
    "seed",
    "threads",
    "timeout",
    "description",
];

/// Names of stages and recipes.
pub const NAME_PATTERN: &str = "^[a-z0-9][a-z0-9_-]*$";

/// A value that stands for another (`${params.width}`) fits every option in the editor's schema.
const REFERENCE_PATTERN: &str = r"^\$\{[^}]+\}$";

/// What is wrong with a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// JSON pointer to the value at fault.
    pub pointer: String,
    /// Whether its key or its value is at fault.
    pub part: Part,
    /// What is wrong and what was expected.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

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
}

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
        // Plugins that share an engine have the same schema; where they differ, either may be meant.
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
            let definition = stage_schema(schema, &prefix, kind, summary, &mut definitions);
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
    // What a kind decides is not written as `${...}`; the other keys may be.
    let open = |schema: &mut Value, fixed: &[&str]| {
        let properties = schema["properties"].as_object_mut().into_iter().flatten();
        let free = properties.filter(|(key, _)| !fixed.contains(&key.as_str()));
        free.for_each(|(_, property)| allow_references(property));
    };
    open(&mut stage, &["kind"]);
    open(
        &mut schema,
        &["version", "name", "params", "paths", "stages"],
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
        "description": "Stages that distil an image autoregressive model into a one-step sampler.",
        "type": "object",
        "required": ["version", "stages"],
        "additionalProperties": false,
        "properties": {
            "version": {"type": "integer", "const": 1, "description": "Version of the recipe format: 1."},
            "name": {
                "type": "string", "pattern": NAME_PATTERN,
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
                "type": "integer", "minimum": 1,
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
            "stages": {
                "type": "object", "minProperties": 1,
                "propertyNames": {"pattern": NAME_PATTERN},
                "description": "The stages by name. A stage takes another's output by naming it.",
                "additionalProperties": open_stage_schema()
            }
        }
    })
}

/// What is wrong with `value`, each independent mistake once. `noun` is what a key is called: `key`, `option`.
pub fn check(schema: &Value, value: &Value, noun: &str) -> Vec<Violation> {
    let validator = match jsonschema::options().offline().build(schema) {
        Ok(validator) => validator,
        // A plugin's mistake, which `plugin check` reports in full.
        Err(error) => {
            return vec![Violation {
                pointer: String::new(),
                part: Part::Key,
                message: format!("the plugin's schema of this stage is invalid: {error}"),
                hint: Some("`retort plugin check` says more".to_owned()),
            }];
        }
    };
    let errors: Vec<ValidationError<'_>> = validator.iter_errors(value).collect();
    let explainer = Explainer {
        root: schema,
        value,
        noun,
    };
    let mut violations: Vec<Violation> = errors
        .iter()
        .flat_map(|error| explainer.explain(error))
        .collect();
    // A misspelt required key is one mistake, not two.
    let guesses: Vec<String> = violations
        .iter()
        .filter_map(|violation| violation.hint.clone())
        .collect();
    violations.retain(|violation| {
        let missing = violation
            .message
            .strip_suffix(" is missing")
            .and_then(|text| text.rsplit_once(' '));
        !missing.is_some_and(|(_, name)| guesses.contains(&format!("did you mean {name}?")))
    });
    violations.dedup();
    violations
}

/// Fills in the defaults and gives numbers their schema's type (`1` where a real number is expected becomes `1.0`, so
/// that equal settings are equal texts). Returns pointers to what was filled in.
pub fn settle(schema: &Value, value: &mut Value) -> Vec<String> {
    let mut filled = Vec::new();
    settle_node(schema, schema, value, "", &mut filled);
    filled
}

/// The options in `value` that name stages or files.
pub fn annotations(schema: &Value, value: &Value) -> Vec<Annotation> {
    let mut found = Vec::new();
    annotate_node(schema, schema, value, "", &mut found);
    found
}

/// The options of a kind of stage, options inside options after the one they are in.
pub fn options(schema: &Value) -> Vec<OptionText> {
    let mut found = Vec::new();
    list_options(schema, schema, "", 0, &mut found);
    found
}

/// The nearest of `known` to `name`, if it is near enough to be meant.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |other: &str| {
        let (name, other) = (name.to_lowercase(), other.to_lowercase());
        if name == other {
            0
        } else {
            strsim::damerau_levenshtein(&name, &other).max(1)
        }
    };
    known
        .into_iter()
        .map(|other| (distance(other), other))
        .filter(|(distance, other)| {
            *distance <= (name.chars().count().max(other.chars().count()) / 3).max(1)
        })
        .min()
        .map(|(_, other)| other)
}

/// "did you mean" the nearest, or what there is.
pub fn suggest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    match nearest(name, known.iter().copied()) {
        Some(near) => Some(format!("did you mean `{near}`?")),
        None if known.is_empty() => None,
        None => Some(format!("known: {}", list(&known))),
    }
}

fn list(names: &[&str]) -> String {
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

fn device_schema(description: &str) -> Value {
    json!({"type": "string", "pattern": r"^(auto|cpu|cuda(:[0-9]+)?)$", "default": "auto", "description": description})
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
        "threads": {"type": "integer", "minimum": 1, "description": "Threads of this stage."},
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

/// The closed schema of a stage of one kind: the plugin's options beside the reserved keys. Its definitions go to
/// `definitions` under names that begin with `prefix`.
fn stage_schema(
    schema: &Value,
    prefix: &str,
    kind: &str,
    summary: &str,
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
    for key in RESERVED {
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

/// Lets `${...}` stand for any value in the editor's schema. A pattern judges texts only, so where a type is named
/// one more type is enough; alternatives get one more alternative.
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
    // `oneOf` would refuse a text that several alternatives now take.
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
    map.insert(
        "type".to_owned(),
        Value::Array(types.into_iter().chain([json!("string")]).collect()),
    );
    map.insert("pattern".to_owned(), json!(REFERENCE_PATTERN));
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

/// Says in words what a validation error means.
struct Explainer<'a> {
    root: &'a Value,
    value: &'a Value,
    noun: &'a str,
}

impl Explainer<'_> {
    fn explain(&self, error: &ValidationError<'_>) -> Vec<Violation> {
        let pointer = error.instance_path().as_str().to_owned();
        let found = error.instance();
        let name = self.name(&pointer);
        let one = |message: String, hint: Option<String>| {
            vec![Violation {
                pointer: pointer.clone(),
                part: Part::Value,
                message,
                hint,
            }]
        };
        match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected }
            | ValidationErrorKind::UnevaluatedProperties { unexpected } => {
                let known = self.properties(&pointer);
                unexpected
                    .iter()
                    .map(|key| Violation {
                        pointer: format!("{pointer}/{}", escape(key)),
                        part: Part::Key,
                        message: match pointer.as_str() {
                            "" => format!("unknown {} `{key}`", self.noun),
                            _ => format!("unknown key `{key}` in {name}"),
                        },
                        hint: suggest(key, known.iter().map(|(name, _)| name.as_str())),
                    })
                    .collect()
            }
            ValidationErrorKind::Required { property } => {
                let key = property.as_str().unwrap_or_default();
                let known = self.properties(&pointer);
                let description = known
                    .iter()
                    .find(|(name, _)| name == key)
                    .and_then(|(_, schema)| schema.get("description")?.as_str())
                    .map(|text| format!("`{key}`: {}", text.lines().next().unwrap_or_default()));
                let owner = if pointer.is_empty() {
                    String::new()
                } else {
                    format!("{name}: ")
                };
                let message = format!(
                    "{owner}the {} `{key}` is missing",
                    if pointer.is_empty() { self.noun } else { "key" }
                );
                vec![Violation {
                    pointer,
                    part: Part::Key,
                    message,
                    hint: description,
                }]
            }
            ValidationErrorKind::Type { kind } => {
                let expected = match kind {
                    TypeKind::Single(one) => vec![type_name(&one.to_string())],
                    TypeKind::Multiple(set) => {
                        set.iter().map(|one| type_name(&one.to_string())).collect()
                    }
                };
                self.wrong_type(&pointer, &expected, found)
            }
            ValidationErrorKind::Enum { options } => {
                let options = options.as_array().cloned().unwrap_or_default();
                self.wrong_choice(&pointer, &options, found)
            }
            ValidationErrorKind::Constant { expected_value } => {
                self.wrong_choice(&pointer, std::slice::from_ref(expected_value), found)
            }
            ValidationErrorKind::AnyOf { context }
            | ValidationErrorKind::OneOfNotValid { context } => {
                self.explain_branches(&pointer, context, found)
            }
            ValidationErrorKind::Minimum { limit } => one(
                format!("{name} is {found}; at least {limit} was expected"),
                None,
            ),
            ValidationErrorKind::Maximum { limit } => one(
                format!("{name} is {found}; at most {limit} was expected"),
                None,
            ),
            ValidationErrorKind::ExclusiveMinimum { limit } => one(
                format!("{name} is {found}; more than {limit} was expected"),
                None,
            ),
            ValidationErrorKind::ExclusiveMaximum { limit } => one(
                format!("{name} is {found}; less than {limit} was expected"),
                None,
            ),
            ValidationErrorKind::MinItems { limit } => one(
                format!("{name} has too few items; at least {limit} expected"),
                None,
            ),
            ValidationErrorKind::MaxItems { limit } => one(
                format!("{name} has too many items; at most {limit} expected"),
                None,
            ),
            ValidationErrorKind::MinProperties { .. } => one(format!("{name} is empty"), None),
            ValidationErrorKind::PropertyNames { error } => {
                let key = error.instance().as_str().unwrap_or_default().to_owned();
                vec![Violation {
                    pointer: format!("{pointer}/{}", escape(&key)),
                    part: Part::Key,
                    message: format!("`{key}` cannot be a name in {name}"),
                    hint: Some(match error.kind() {
                        ValidationErrorKind::Pattern { pattern } => pattern_hint(pattern),
                        _ => error.to_string(),
                    }),
                }]
            }
            ValidationErrorKind::Pattern { pattern } => one(
                format!("{name} cannot be {}", show(found)),
                Some(pattern_hint(pattern)),
            ),
            _ => one(format!("{name}: {error}"), None),
        }
    }

    /// What is wrong with a value that fits none of several schemas: the mistake in the one that was meant.
    fn explain_branches(
        &self,
        pointer: &str,
        branches: &[Vec<ValidationError<'static>>],
        found: &Value,
    ) -> Vec<Violation> {
        let here = |error: &ValidationError<'_>| error.instance_path().as_str() == pointer;
        let types = |branch: &[ValidationError<'static>]| -> Option<Vec<String>> {
            branch
                .iter()
                .find(|error| here(error))
                .and_then(|error| match error.kind() {
                    ValidationErrorKind::Type {
                        kind: TypeKind::Single(one),
                    } => Some(vec![type_name(&one.to_string())]),
                    ValidationErrorKind::Type {
                        kind: TypeKind::Multiple(set),
                    } => Some(set.iter().map(|one| type_name(&one.to_string())).collect()),
                    _ => None,
                })
        };
        let fitting: Vec<&Vec<ValidationError<'static>>> = branches
            .iter()
            .filter(|branch| types(branch).is_none())
            .collect();
        if fitting.is_empty() {
            let expected: Vec<String> = branches
                .iter()
                .filter_map(|branch| types(branch))
                .flatten()
                .collect();
            return self.wrong_type(pointer, &expected, found);
        }
        if let [only] = fitting.as_slice() {
            return only.iter().flat_map(|error| self.explain(error)).collect();
        }
        // An enum: constants all the way down.
        let mut constants = Vec::new();
        if fitting.iter().all(|branch| {
            branch
                .iter()
                .all(|error| here(error) && collect_constants(error, &mut constants))
        }) {
            return self.wrong_choice(pointer, &constants, found);
        }
        // A tagged enum: the branch whose tag is right, else the tags that there are.
        let mut tags: Vec<(String, Value)> = Vec::new();
        let mut tagged = Vec::new();
        for branch in &fitting {
            let mut wrong = false;
            for error in branch.iter().filter(|error| !here(error)) {
                let path = error.instance_path().as_str();
                let child = path
                    .strip_prefix(pointer)
                    .is_some_and(|rest| rest.matches('/').count() == 1);
                let mut values = Vec::new();
                if child
                    && matches!(
                        error.kind(),
                        ValidationErrorKind::Constant { .. } | ValidationErrorKind::Enum { .. }
                    )
                    && collect_constants(error, &mut values)
                {
                    wrong = true;
                    tags.extend(values.into_iter().map(|value| (path.to_owned(), value)));
                }
            }
            if !wrong {
                tagged.push(*branch);
            }
        }
        if tagged.is_empty() && !tags.is_empty() && tags.iter().all(|(path, _)| *path == tags[0].0)
        {
            let path = tags[0].0.clone();
            let options: Vec<Value> = tags.into_iter().map(|(_, value)| value).collect();
            let found = self.value.pointer(&path).unwrap_or(&Value::Null);
            return self.wrong_choice(&path, &options, found);
        }
        let candidates = if tagged.is_empty() { fitting } else { tagged };
        let best = candidates.into_iter().min_by_key(|branch| branch.len());
        best.into_iter()
            .flatten()
            .flat_map(|error| self.explain(error))
            .collect()
    }

    fn wrong_type(&self, pointer: &str, expected: &[String], found: &Value) -> Vec<Violation> {
        let mut expected = expected.to_vec();
        expected.dedup();
        // `null` means "leave it out": not what somebody who wrote something meant.
        if expected.len() > 1 {
            expected.retain(|name| name != "null");
        }
        let wants = |name: &str| expected.iter().any(|expected| expected == name);
        let hint = match found {
            Value::String(text) if wants("a number") || wants("a whole number") => {
                let plain = text.replace(['_', ' ', ','], "");
                match plain.parse::<f64>() {
                    Ok(_) if plain == *text => Some(format!("remove the quotes: {plain}")),
                    Ok(_) => Some(format!("write it without separators: {plain}")),
                    Err(_) => None,
                }
            }
            Value::String(text)
                if wants("true or false")
                    && matches!(
                        text.to_lowercase().as_str(),
                        "yes" | "no" | "on" | "off" | "y" | "n" | "true" | "false"
                    ) =>
            {
                Some("write `true` or `false`".to_owned())
            }
            Value::Number(_) | Value::Bool(_) if wants("a text") => {
                Some(format!("put it in quotes: \"{found}\""))
            }
            Value::Null => Some("write a value after the `:`, or remove the key".to_owned()),
            found if wants("a list") && !found.is_object() => {
                Some(format!("write a list: [{}]", plain(found)))
            }
            _ => None,
        };
        let message = format!(
            "{}: expected {}, got {}",
            self.name(pointer),
            expected.join(" or "),
            describe(found)
        );
        vec![Violation {
            pointer: pointer.to_owned(),
            part: Part::Value,
            message,
            hint,
        }]
    }

    fn wrong_choice(&self, pointer: &str, options: &[Value], found: &Value) -> Vec<Violation> {
        let names: Vec<String> = options
            .iter()
            .filter(|option| !option.is_null())
            .map(plain)
            .collect();
        let known: Vec<&str> = names.iter().map(String::as_str).collect();
        let message = match known.as_slice() {
            [only] => format!(
                "{}: expected `{only}`, got {}",
                self.name(pointer),
                show(found)
            ),
            _ => format!(
                "{}: expected one of {}, got {}",
                self.name(pointer),
                list(&known),
                show(found)
            ),
        };
        let hint = found
            .as_str()
            .and_then(|text| nearest(text, known.iter().copied()))
            .map(|near| format!("did you mean `{near}`?"));
        vec![Violation {
            pointer: pointer.to_owned(),
            part: Part::Value,
            message,
            hint,
        }]
    }

    /// `/schedule/warmup` -> `schedule.warmup`
    fn name(&self, pointer: &str) -> String {
        if pointer.is_empty() {
            return "this".to_owned();
        }
        format!(
            "`{}`",
            pointer[1..]
                .replace('/', ".")
                .replace("~1", "/")
                .replace("~0", "~")
        )
    }

    /// The properties that the schema knows at a place in the value.
    fn properties(&self, pointer: &str) -> Vec<(String, &Value)> {
        let mut nodes = branches(self.root, self.root, self.value);
        let mut value = self.value;
        for step in pointer.split('/').skip(1) {
            let step = step.replace("~1", "/").replace("~0", "~");
            let Some(child) = child(value, &step) else {
                return Vec::new();
            };
            nodes = nodes
                .into_iter()
                .filter_map(|node| child_schema(node, &step))
                .flat_map(|node| branches(self.root, node, child))
                .collect();
            value = child;
        }
        let mut properties: Vec<(String, &Value)> = Vec::new();
        for (name, schema) in nodes
            .iter()
            .filter_map(|node| node.get("properties")?.as_object())
            .flatten()
        {
            if !properties.iter().any(|(known, _)| known == name) {
                properties.push((name.clone(), schema));
            }
        }
        properties
    }
}

/// Adds the constants that an error asks for; false when it asks for something else.
fn collect_constants(error: &ValidationError<'_>, constants: &mut Vec<Value>) -> bool {
    match error.kind() {
        ValidationErrorKind::Constant { expected_value } => {
            constants.push((**expected_value).clone());
            true
        }
        ValidationErrorKind::Enum { options } => {
            constants.extend(options.as_array().into_iter().flatten().cloned());
            true
        }
        ValidationErrorKind::AnyOf { context } | ValidationErrorKind::OneOfNotValid { context } => {
            context
                .iter()
                .flatten()
                .all(|error| collect_constants(error, constants))
        }
        // Next to an enum of texts, `null` and the like say nothing.
        _ => false,
    }
}

fn pattern_hint(pattern: &str) -> String {
    match pattern {
        NAME_PATTERN => "names consist of lower-case letters, digits, `-` and `_`, and begin with a letter or digit".to_owned(),
        pattern if pattern.contains("auto|cpu") => "expected `auto`, `cpu`, `cuda` or `cuda:N`".to_owned(),
        pattern => format!("it has to match {pattern}"),
    }
}

fn type_name(name: &str) -> String {
    match name {
        "integer" => "a whole number",
        "number" => "a number",
        "string" => "a text",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a mapping",
        other => other,
    }
    .to_owned()
}

/// A value with the name of its type.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(_) => format!("the text {}", show(value)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a mapping".to_owned(),
    }
}

/// A value, not too long.
fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// A value as it is written in YAML.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

fn child<'v>(value: &'v Value, step: &str) -> Option<&'v Value> {
    match value {
        Value::Object(map) => map.get(step),
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        _ => None,
    }
}

/// The schema of a property or item.
fn child_schema<'s>(node: &'s Value, step: &str) -> Option<&'s Value> {
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

/// The schemas without alternatives that hold for `value` at `node`: the node itself, what it refers to, and of
/// alternatives the one that fits. Where none fits (the value is invalid), all whose tag does not contradict.
fn branches<'s>(root: &'s Value, node: &'s Value, value: &Value) -> Vec<&'s Value> {
    fn gather<'s>(
        root: &'s Value,
        node: &'s Value,
        value: &Value,
        depth: usize,
        found: &mut Vec<&'s Value>,
    ) {
        // A schema that refers to itself without going down.
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
fn resolve<'s>(root: &'s Value, node: &Value) -> Option<&'s Value> {
    root.pointer(node.get("$ref")?.as_str()?.strip_prefix('#')?)
}

/// Whether an alternative is meant by `value`, judged by type, constants and, when strict, by the keys present.
fn fits(root: &Value, node: &Value, value: &Value, strict: bool, depth: usize) -> bool {
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

fn settle_node(
    root: &Value,
    node: &Value,
    value: &mut Value,
    pointer: &str,
    filled: &mut Vec<String>,
) {
    // Filling in defaults never changes which alternative fits: it adds what that one allows.
    for node in branches(root, node, value) {
        let is = |name: &str| match node.get("type") {
            Some(Value::Array(kinds)) => kinds.iter().any(|kind| kind == name),
            Some(kind) => kind == name,
            None => false,
        };
        match value {
            Value::Object(entries) => {
                for (key, schema) in node
                    .get("properties")
                    .and_then(Value::as_object)
                    .into_iter()
                    .flatten()
                {
                    let path = format!("{pointer}/{}", escape(key));
                    if !entries.contains_key(key) {
                        let own = schema.get("default");
                        let Some(default) = own.or_else(|| resolve(root, schema)?.get("default"))
                        else {
                            continue;
                        };
                        entries.insert(key.clone(), default.clone());
                        filled.push(path.clone());
                    }
                    settle_node(root, schema, &mut entries[key.as_str()], &path, filled);
                }
                if let Some(rest) = node
                    .get("additionalProperties")
                    .filter(|rest| rest.is_object())
                {
                    let known = node.get("properties").and_then(Value::as_object);
                    for (key, value) in entries.iter_mut() {
                        if !known.is_some_and(|known| known.contains_key(key)) {
                            settle_node(
                                root,
                                rest,
                                value,
                                &format!("{pointer}/{}", escape(key)),
                                filled,
                            );
                        }
                    }
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    if let Some(schema) = child_schema(node, &index.to_string()) {
                        settle_node(root, schema, item, &format!("{pointer}/{index}"), filled);
                    }
                }
            }
            Value::Number(number) => {
                let real = number.as_f64().unwrap_or(0.0);
                // 2^53: every whole number up to it is exact.
                if is("integer")
                    && number.is_f64()
                    && real.fract() == 0.0
                    && real.abs() <= 9_007_199_254_740_992.0
                {
                    *value = json!(real as i64);
                } else if is("number") && !is("integer") && !number.is_f64() {
                    *value = json!(real);
                }
            }
            _ => {}
        }
    }
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
                Some(_) => Some(Target::File),
                None => None,
            }
        };
        match value {
            Value::String(_) => {
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
    use super::*;
    use crate::plan::fake;

    fn check_value(value: Value, expected: &[(&str, &str)]) {
        let schema = fake::schema("everything");
        let found: Vec<(String, String)> = check(&schema, &value, "option")
            .into_iter()
            .map(|violation| {
                (
                    violation.pointer,
                    format!(
                        "{} / {}",
                        violation.message,
                        violation.hint.unwrap_or_default()
                    ),
                )
            })
            .collect();
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (pointer, part) in expected {
            assert!(
                found
                    .iter()
                    .any(|(at, said)| at == pointer && said.contains(part)),
                "{found:#?}\nlacks {pointer} {part}"
            );
        }
    }

    #[test]
    fn mistakes_are_said_in_words() {
        check_value(json!({"data": "d"}), &[]);
        check_value(
            json!({}),
            &[("", "the option `data` is missing / `data`: The images.")],
        );
        // Misspelt and therefore missing: one mistake.
        check_value(
            json!({"dta": "d"}),
            &[("/dta", "unknown option `dta` / did you mean `data`?")],
        );
        let with = |key: &str, value: Value, expected: &[(&str, &str)]| {
            let mut options = json!({"data": "d"});
            options[key] = value;
            check_value(options, expected);
        };
        with(
            "steps",
            json!("1_000"),
            &[("/steps", "without separators: 1000")],
        );
        with(
            "steps",
            json!(1.5),
            &[("/steps", "expected a whole number, got 1.5")],
        );
        with(
            "steps",
            json!(0),
            &[("/steps", "`steps` is 0; at least 1 was expected")],
        );
        with(
            "flag",
            json!("yes"),
            &[("/flag", "write `true` or `false`")],
        );
        with("data", json!(5), &[("/data", "put it in quotes: \"5\"")]);
        with("times", json!(3), &[("/times", "write a list: [3]")]);
        with(
            "times",
            json!([1, "x"]),
            &[("/times/1", "expected a whole number")],
        );
        // Option<f64>: null is not offered.
        with(
            "guidance",
            json!("x"),
            &[(
                "/guidance",
                "`guidance`: expected a number, got the text \"x\"",
            )],
        );
        // An enum with described variants.
        with(
            "loss",
            json!("l3"),
            &[(
                "/loss",
                "expected one of `l1`, `l2`, got \"l3\" / did you mean",
            )],
        );
        // A tagged enum, optional.
        with(
            "schedule",
            json!({"type": "cosine", "wramup": 3}),
            &[(
                "/schedule/wramup",
                "unknown key `wramup` in `schedule` / did you mean `warmup`?",
            )],
        );
        with(
            "schedule",
            json!({"type": "constant", "rate": "x"}),
            &[("/schedule/rate", "expected a number")],
        );
        with(
            "schedule",
            json!({"type": "linear"}),
            &[("/schedule/type", "expected one of `constant`, `cosine`")],
        );
        with(
            "schedule",
            json!({"warmup": 1}),
            &[("/schedule", "the key `type` is missing")],
        );
        with(
            "schedule",
            json!(3),
            &[("/schedule", "expected a mapping, got 3")],
        );
    }

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
                "data": "d", "steps": 1000, "flag": false, "times": [0], "guidance": null, "loss": "l2", "set": null,
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
        let (value, _) = settled(json!({"data": "d", "schedule": {"type": "cosine", "rate": 0.5}}));
        assert_eq!(value["schedule"]["warmup"], 100);
    }

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
        check(json!({"kind": "nothing"}), false);
        let definition = &schema["$defs"]["stage.everything"];
        assert_eq!(definition["properties"]["steps"]["default"], 1000);
        assert_eq!(
            definition["properties"]["data"]["description"],
            "The images."
        );
    }

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
