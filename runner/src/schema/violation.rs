//! Validation errors in plain words.
//!
//! In: a schema and a value. Out: each independent mistake once, with a JSON pointer. jsonschema finds the errors; the
//! wording is ours, because "is not valid under any of the schemas listed in 'oneOf'" helps nobody. If alternatives fail, the
//! intended one (by its type or its tag) provides the error.

#[cfg(test)]
mod tests;

use jsonschema::ValidationError;
use jsonschema::error::{TypeKind, ValidationErrorKind};
use serde_json::Value;

use super::branch::{branches, child, child_schema};
use super::defaults::EXACT;
use super::{NAME_PATTERN, RECIPE_NAME_PATTERN, list, nearest, plain, suggest};
use crate::terminal;
use crate::yaml::{EntryPart, escape, odd_space};

/// Advice for a YAML key without a value.
pub const WRITE_A_VALUE: &str = "write a value after the `:`, or remove the key";

/// An error in a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// JSON pointer to the value at fault.
    pub pointer: String,
    /// Whether its key or its value is at fault.
    pub part: EntryPart,
    /// The error and the expectation.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// Errors of `value`, each independent one once. `noun` is the word for a key: `key`, `option`.
pub fn check(schema: &Value, value: &Value, noun: &str) -> Vec<Violation> {
    Checker::new(schema).check(value, noun)
}

/// A compiled schema, for checking many values.
pub struct Checker {
    schema: Value,
    /// Or the error in the schema.
    validator: Result<jsonschema::Validator, String>,
}

impl Checker {
    /// Of a schema.
    pub fn new(schema: &Value) -> Self {
        let validator = jsonschema::options().offline().build(schema);
        Self {
            schema: schema.clone(),
            validator: validator.map_err(|error| error.to_string()),
        }
    }

    /// As [`check`].
    pub fn check(&self, value: &Value, noun: &str) -> Vec<Violation> {
        match &self.validator {
            Ok(validator) => violations(validator, &self.schema, value, noun),
            // A plugin's error, which `plugin check` details.
            Err(error) => vec![Violation {
                pointer: String::new(),
                part: EntryPart::Key,
                message: format!("the plugin's schema of this stage is invalid: {error}"),
                hint: Some("`retort plugin check` says more".to_owned()),
            }],
        }
    }
}

fn violations(
    validator: &jsonschema::Validator,
    schema: &Value,
    value: &Value,
    noun: &str,
) -> Vec<Violation> {
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

/// Explains a validation error in words.
struct Explainer<'a> {
    root: &'a Value,
    value: &'a Value,
    noun: &'a str,
}

impl Explainer<'_> {
    fn explain(&self, error: &ValidationError<'_>) -> Vec<Violation> {
        let pointer = error.instance_path().as_str();
        let found = error.instance();
        let (message, hint) = match error.kind() {
            ValidationErrorKind::AdditionalProperties { unexpected }
            | ValidationErrorKind::UnevaluatedProperties { unexpected } => {
                return self.unknown_keys(pointer, unexpected);
            }
            ValidationErrorKind::Required { property } => {
                return vec![self.missing_key(pointer, property)];
            }
            ValidationErrorKind::Type { kind } => {
                let expected = match kind {
                    TypeKind::Single(one) => vec![type_name(&one.to_string())],
                    TypeKind::Multiple(set) => {
                        set.iter().map(|one| type_name(&one.to_string())).collect()
                    }
                };
                return self.wrong_type(pointer, &expected, found);
            }
            ValidationErrorKind::Enum { options } => {
                let options = options.as_array().cloned().unwrap_or_default();
                return self.wrong_choice(pointer, &options, found);
            }
            ValidationErrorKind::Constant { expected_value } => {
                return self.wrong_choice(pointer, std::slice::from_ref(expected_value), found);
            }
            ValidationErrorKind::AnyOf { context }
            | ValidationErrorKind::OneOfNotValid { context } => {
                return self.explain_branches(pointer, context, found);
            }
            ValidationErrorKind::PropertyNames { error } => {
                return vec![self.wrong_name(pointer, error)];
            }
            ValidationErrorKind::Pattern { pattern } => (
                format!("{} cannot be {}", self.name(pointer), show(found)),
                Some(pattern_hint(pattern)),
            ),
            _ => (self.beyond_limit(pointer, error), None),
        };
        vec![Violation {
            pointer: pointer.to_owned(),
            part: EntryPart::Value,
            message,
            hint,
        }]
    }

    /// Keys that the schema does not have.
    fn unknown_keys(&self, pointer: &str, unexpected: &[String]) -> Vec<Violation> {
        let name = self.name(pointer);
        let known = self.properties(pointer);
        unexpected
            .iter()
            .map(|key| Violation {
                pointer: format!("{pointer}/{}", escape(key)),
                part: EntryPart::Key,
                message: match pointer {
                    "" => format!("unknown {} `{key}`", self.noun),
                    _ => format!("unknown key `{key}` in {name}"),
                },
                hint: suggest(key, known.iter().map(|(name, _)| name.as_str())),
            })
            .collect()
    }

    /// A missing required key; its description is the hint.
    fn missing_key(&self, pointer: &str, property: &Value) -> Violation {
        let key = property.as_str().unwrap_or_default();
        let known = self.properties(pointer);
        let description = known
            .iter()
            .find(|(name, _)| name == key)
            .and_then(|(_, schema)| schema.get("description")?.as_str())
            .map(|text| format!("`{key}`: {}", text.lines().next().unwrap_or_default()));
        Violation {
            pointer: pointer.to_owned(),
            part: EntryPart::Key,
            message: match pointer {
                "" => format!("the {} `{key}` is missing", self.noun),
                _ => format!("{}: the key `{key}` is missing", self.name(pointer)),
            },
            hint: description,
        }
    }

    /// A key that cannot be one.
    fn wrong_name(&self, pointer: &str, error: &ValidationError<'_>) -> Violation {
        let key = error.instance().as_str().unwrap_or_default();
        Violation {
            pointer: format!("{pointer}/{}", escape(key)),
            part: EntryPart::Key,
            message: format!("`{key}` cannot be a name in {}", self.name(pointer)),
            hint: Some(match error.kind() {
                ValidationErrorKind::Pattern { pattern } => pattern_hint(pattern),
                _ => error.to_string(),
            }),
        }
    }

    /// The message about a value that is too small, too large, or wrong in a way without a message of ours.
    fn beyond_limit(&self, pointer: &str, error: &ValidationError<'_>) -> String {
        let (name, found) = (self.name(pointer), error.instance());
        match error.kind() {
            ValidationErrorKind::Minimum { limit } => {
                format!("{name} is {found}; at least {limit} was expected")
            }
            ValidationErrorKind::Maximum { limit } => {
                format!("{name} is {found}; at most {limit} was expected")
            }
            ValidationErrorKind::ExclusiveMinimum { limit } => {
                format!("{name} is {found}; more than {limit} was expected")
            }
            ValidationErrorKind::ExclusiveMaximum { limit } => {
                format!("{name} is {found}; less than {limit} was expected")
            }
            ValidationErrorKind::MinItems { limit } => {
                format!("{name} has too few items; at least {limit} expected")
            }
            ValidationErrorKind::MaxItems { limit } => {
                format!("{name} has too many items; at most {limit} expected")
            }
            ValidationErrorKind::MinProperties { .. } => format!("{name} is empty"),
            _ => format!("{name}: {error}"),
        }
    }

    /// The error in a value that matches none of several schemas: the mistake in the intended one.
    fn explain_branches(
        &self,
        pointer: &str,
        branches: &[Vec<ValidationError<'static>>],
        found: &Value,
    ) -> Vec<Violation> {
        let here = |error: &ValidationError<'_>| error.instance_path().as_str() == pointer;
        let fitting: Vec<&Vec<ValidationError<'static>>> = branches
            .iter()
            .filter(|branch| expected(branch, pointer).is_none())
            .collect();
        if fitting.is_empty() {
            let expected: Vec<String> = branches
                .iter()
                .filter_map(|branch| expected(branch, pointer))
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
        // A tagged enum: the branch with the matching tag, else the list of tags.
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
        // `null` means "leave it out", so a given value was not meant for it.
        if expected.len() > 1 {
            expected.retain(|name| name != "null");
        }
        let wants = |name: &str| expected.iter().any(|expected| expected == name);
        let hint = match found {
            Value::String(text) if wants("a number") || wants("a whole number") => {
                number_hint(text)
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
            Value::Null => Some(WRITE_A_VALUE.to_owned()),
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
            part: EntryPart::Value,
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
            part: EntryPart::Value,
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

    /// The properties in the schema at a pointer into the value.
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

/// A suggestion instead of a text where a number is expected.
fn number_hint(text: &str) -> Option<String> {
    let odd = text.chars().find(|&c| terminal::is_odd_space(c));
    let plain: String = text
        .chars()
        .filter(|&c| !matches!(c, '_' | ' ' | ',') && !terminal::is_odd_space(c))
        .collect();
    let number: f64 = plain.parse().ok()?;
    let unsigned = plain.trim_start_matches(['-', '+']);
    let sign = if plain.starts_with('-') { "-" } else { "" };
    let whole = unsigned.bytes().all(|byte| byte.is_ascii_digit());
    let bare = unsigned.trim_start_matches('0');
    if !number.is_finite() {
        return unsigned
            .starts_with(|c: char| c.is_ascii_digit() || c == '.')
            .then(|| "it is too large: numbers go up to 1.8e308".to_owned());
    }
    if whole && bare.len() > 16 {
        return Some(format!("it is too large: whole numbers go up to {EXACT}"));
    }
    if whole && unsigned.len() > 1 && unsigned.starts_with('0') {
        let decimal = if bare.is_empty() { "0" } else { bare };
        let octal = match i64::from_str_radix(unsigned, 8) {
            Ok(octal) if octal > 7 => {
                format!("; where the octal number is meant, write 0o{bare} or {octal}")
            }
            _ => String::new(),
        };
        return Some(format!("write {sign}{decimal}{octal}"));
    }
    Some(match odd {
        Some(odd) => format!("write {plain}: {}", odd_space(odd)),
        None if plain == text => format!("remove the quotes: {plain}"),
        None => format!("write it without separators: {plain}"),
    })
}

/// The type that a branch expects at `pointer`; `None` if the value's type is right.
fn expected(branch: &[ValidationError<'_>], pointer: &str) -> Option<Vec<String>> {
    let here = |error: &&ValidationError<'_>| error.instance_path().as_str() == pointer;
    let mut types = None;
    for error in branch.iter().filter(here) {
        match error.kind() {
            ValidationErrorKind::Type {
                kind: TypeKind::Single(one),
            } => {
                types = Some(vec![type_name(&one.to_string())]);
            }
            ValidationErrorKind::Type {
                kind: TypeKind::Multiple(set),
            } => {
                types = Some(set.iter().map(|one| type_name(&one.to_string())).collect());
            }
            ValidationErrorKind::AnyOf { context }
            | ValidationErrorKind::OneOfNotValid { context } => {
                let inner: Option<Vec<Vec<String>>> = context
                    .iter()
                    .map(|branch| expected(branch, pointer))
                    .collect();
                types = types.or(inner.map(|inner| inner.concat()));
            }
            _ => {}
        }
    }
    // For a text that must be one of a few, these are the better message.
    let mut constants = Vec::new();
    for error in branch.iter().filter(here) {
        if matches!(
            error.kind(),
            ValidationErrorKind::Constant { .. } | ValidationErrorKind::Enum { .. }
        ) {
            collect_constants(error, &mut constants);
        }
    }
    match (types, constants.is_empty()) {
        (Some(_), false) => Some(
            constants
                .iter()
                .map(|constant| format!("`{}`", plain(constant)))
                .collect(),
        ),
        (types, _) => types,
    }
}

/// Adds the constants that an error expects; returns false if it expects something else.
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
        // Beside an enum of texts, `null` and the like are not informative.
        _ => false,
    }
}

fn pattern_hint(pattern: &str) -> String {
    match pattern {
        RECIPE_NAME_PATTERN => {
            "a name has no `/` and no control characters, and neither begins nor ends with a space".to_owned()
        }
        NAME_PATTERN => "names consist of lower-case letters, digits, `-` and `_`, and begin with a letter or digit".to_owned(),
        pattern if pattern.contains("auto|cpu") => "expected `auto`, `cpu`, `cuda` or `cuda:N`".to_owned(),
        pattern => format!("it has to match {pattern}"),
    }
}

/// A JSON type in plain words.
pub(super) fn type_name(name: &str) -> String {
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
