//! Checks of a plugin's file and description: its symbols, its schemas, and provocations.

use std::path::Path;

use retort_abi::Description;
use retort_checkpoint::regular;
use serde_json::{Value, json};

use crate::schema;

/// Symbols that linkers add.
pub(super) const OF_THE_LINKER: [&str; 5] = ["_init", "_fini", "__bss_start", "_edata", "_end"];

/// The largest plugin whose symbols are read.
const LONGEST_PLUGIN: u64 = 1 << 30;

/// Names of the symbols that a shared object exports.
///
/// # Errors
/// It cannot be read, or is none.
pub fn exports(path: &Path) -> Result<Vec<String>, String> {
    use object::read::elf::ElfFile64;
    use object::read::{NameOrOrdinal, Object};
    let bytes = regular::read(path, LONGEST_PLUGIN).map_err(|error| error.to_string())?;
    let file: ElfFile64<'_, object::Endianness> =
        ElfFile64::parse(&*bytes).map_err(|error| error.to_string())?;
    let mut names = Vec::new();
    for export in file.exports().map_err(|error| error.to_string())? {
        let export = export.map_err(|error| error.to_string())?;
        if let NameOrOrdinal::Name(name) = export.name() {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    }
    Ok(names)
}

/// The errors in a readable description.
pub fn inconsistencies(description: &Description) -> Vec<String> {
    let mut problems = Vec::new();
    let mut need = |good: bool, problem: &str| {
        if !good {
            problems.push(problem.to_owned());
        }
    };
    need(!description.name.is_empty(), "it has no name");
    need(!description.version.is_empty(), "it has no version");
    need(
        !description.devices.is_empty(),
        "it names no kind of device",
    );
    need(!description.dtypes.is_empty(), "it names no dtype");
    need(!description.stages.is_empty(), "it runs no kind of stage");
    for stage in &description.stages {
        let kind = &stage.kind;
        let same = |other: &&retort_abi::StageKind| other.kind == *kind;
        if description.stages.iter().filter(same).count() > 1 {
            problems.push(format!("stage kind `{kind}` appears more than once"));
        }
        if stage.output.is_empty() {
            problems.push(format!("stage kind `{kind}` names no kind of output"));
        }
        if let Err(error) = jsonschema::validator_for(&stage.schema) {
            problems.push(format!("the schema of `{kind}` is no JSON schema: {error}"));
            continue;
        }
        if stage.schema["additionalProperties"] != false {
            problems.push(format!(
                "the schema of `{kind}` lets unknown options pass (`additionalProperties: false`)"
            ));
        }
        let mut defaults = json!({});
        schema::settle(&stage.schema, &mut defaults);
        // Missing values come from the recipe; existing ones are defaults.
        let violations = schema::check(&stage.schema, &defaults, "option");
        let wrong = violations.iter().find(|violation| {
            let value = defaults.pointer(&violation.pointer);
            value.is_some_and(|value| !value.is_object())
        });
        if let Some(wrong) = wrong {
            problems.push(format!(
                "the default of `{}` does not fit the schema of `{kind}`: {}",
                wrong.pointer, wrong.message
            ));
        }
    }
    problems
}

/// Wrong options of every sort: none at all, unknown ones, and each known one with values of other types and sizes.
pub(super) fn provocations(schema: &Value) -> Vec<Value> {
    let mut defaults = json!({});
    schema::settle(schema, &mut defaults);
    let mut all = vec![json!(null), json!([]), json!("options"), json!({})];
    let mut with = |key: &str, value: Value| {
        let mut options = defaults.clone();
        options[key] = value;
        all.push(options);
    };
    with("no such option", json!(1));
    let deep = (0..64).fold(json!(1), |inner, _| json!([inner]));
    let wrong = [
        json!(null),
        json!(""),
        json!("\u{0}\u{1F600} no value"),
        json!("x".repeat(100_000)),
        json!(-1),
        json!(0),
        json!(u64::MAX),
        json!(1e308),
        json!(true),
        json!([]),
        json!({}),
        deep,
    ];
    let keys = schema["properties"].as_object().into_iter().flatten();
    for (key, _) in keys {
        wrong.iter().for_each(|value| with(key, value.clone()));
    }
    all
}

/// Whether a pointer names an existing or possible value of the options.
pub(super) fn names_a_place(pointer: &str, options: &Value) -> bool {
    let parent = pointer.rsplit_once('/').map(|(parent, _)| parent);
    pointer.is_empty()
        || options.pointer(pointer).is_some()
        || parent.is_some_and(|parent| options.pointer(parent).is_some())
}

/// Options for people, cut.
pub(super) fn shown(options: &Value) -> String {
    let text = options.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_name_places_in_the_options() {
        let options = json!({"train": {"steps": 3}});
        for (pointer, good) in [
            ("", true),
            ("/train/steps", true),
            ("/train/missing", true),
            ("/missing", true),
            ("/missing/deep", false),
            ("train", false),
        ] {
            assert_eq!(names_a_place(pointer, &options), good, "{pointer}");
        }
    }
}
