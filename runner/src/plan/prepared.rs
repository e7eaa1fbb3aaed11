//! Data that several stages read in the same form: one stage prepares it for all of them.
//!
//! A plugin marks an option that holds data as `x-retort-prepared`. If several stages have the same data there, the plan adds a
//! stage that prepares it, unless a stage of the recipe does already. The digests of the stages that read it stay those of the
//! data itself, so no result depends on which stage decoded its images.

use std::collections::BTreeMap;
use std::rc::Rc;

use retort_abi::StageKind;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Build, Origin, PlannedStage, PluginIdentity, Reference};
use crate::recipe::MAX_STAGES;
use crate::schema;

/// What a schema says of an option whose data a stage can prepare.
#[derive(Debug, Deserialize)]
struct Annotation {
    /// The kind of stage that prepares it, in its option of the same name.
    kind: String,
    /// Options of the data: where one of them is given, preparing the data pays.
    sources: Vec<String>,
    /// Options of the data that concern only the stage that reads it.
    own: Vec<String>,
}

/// Data of one or several stages.
struct SharedData<'a> {
    plugin: String,
    /// The kind that prepares it.
    kind: &'a StageKind,
    /// The option that holds it, in all these stages.
    option: String,
    /// What the preparing stage has to know.
    data: Map<String, Value>,
    /// Indices of the stages that read it, in the plan's order.
    readers: Vec<usize>,
    /// Index of the recipe's stage that prepares it.
    written: Option<usize>,
}

/// Where an added stage runs.
pub(super) struct AddedPlace {
    pub(super) plugin: PluginIdentity,
    pub(super) device: String,
    pub(super) dtype: String,
}

/// Lets stages with the same data read the output of one stage, which is added if the recipe has none; also returns a note on
/// each such stage. `given` are the names of the recipe's artifacts. `place` says where a stage of some kind runs that is added
/// for another stage, if it can run anywhere. Where none can be added, the stages read their data themselves.
pub(super) fn share(
    mut stages: Vec<PlannedStage>,
    given: &[&str],
    builds: &BTreeMap<String, Option<Rc<Build>>>,
    place: &mut dyn FnMut(&PlannedStage, &str) -> Option<AddedPlace>,
) -> (Vec<PlannedStage>, Vec<String>) {
    let shared = find(&stages, builds);
    // Where each stage comes: at its own index, or just before the first stage that reads it.
    let mut places: Vec<(usize, bool)> = (0..stages.len()).map(|index| (index, true)).collect();
    let (mut added, mut notes) = (Vec::<PlannedStage>::new(), Vec::new());
    for shared in &shared {
        let first = shared.readers[0];
        let name = match shared.written {
            Some(index) => {
                places[index] = places[index].min((first, false));
                stages[index].name.clone()
            }
            None => {
                // A run has no more stages than a recipe may have.
                if stages.len() + added.len() >= MAX_STAGES {
                    continue;
                }
                let Some(place) = place(&stages[first], &shared.kind.kind) else {
                    continue;
                };
                let is_taken = |name: &str| {
                    let mut others = stages.iter().chain(&added);
                    given.contains(&name) || others.any(|stage| stage.name == name)
                };
                let name = shared.name(&stages[first], &is_taken);
                added.push(shared.stage(&stages, name.clone(), place));
                places.push((first, false));
                name
            }
        };
        notes.push(format!(
            "`{name}` prepares the data of {} once",
            quoted(&shared.names(&stages))
        ));
        for &reader in &shared.readers {
            stages[reader].references.push(Reference {
                pointer: format!("/{}", shared.option),
                stage: name.clone(),
                kinds: vec![shared.kind.output.clone()],
                prepared: true,
            });
        }
    }
    stages.extend(added);
    let mut placed: Vec<((usize, bool), PlannedStage)> = places.into_iter().zip(stages).collect();
    placed.sort_by_key(|(place, _)| *place);
    (placed.into_iter().map(|(_, stage)| stage).collect(), notes)
}

/// The data that several stages read, or that a stage of the recipe prepares.
fn find<'a>(
    stages: &[PlannedStage],
    builds: &'a BTreeMap<String, Option<Rc<Build>>>,
) -> Vec<SharedData<'a>> {
    let mut all: Vec<SharedData<'a>> = Vec::new();
    for (index, stage) in stages.iter().enumerate() {
        let build = builds.get(&stage.plugin.name).and_then(Option::as_ref);
        let kinds = build.map(|build| build.description.stages.as_slice());
        let kinds = kinds.unwrap_or_default();
        for (annotation, option, data) in data_of(stage, kinds) {
            // No stage prepares its own data.
            let can_prepare = |kind: &&StageKind| {
                kind.kind == annotation.kind
                    && kind.kind != stage.kind
                    && has_option(&kind.schema, &option)
            };
            let Some(kind) = kinds.iter().find(can_prepare) else {
                continue;
            };
            let same = |known: &&mut SharedData<'_>| {
                known.plugin == stage.plugin.name
                    && known.kind.kind == kind.kind
                    && known.option == option
                    && known.data == data
            };
            if let Some(known) = all.iter_mut().find(same) {
                known.readers.push(index);
                continue;
            }
            let prepares = |other: &PlannedStage| {
                let prepared = other.options.get(&option).and_then(Value::as_object);
                other.kind == kind.kind
                    && other.plugin.name == stage.plugin.name
                    && other.references.is_empty()
                    && prepared.is_some_and(|prepared| to_prepare(prepared, &annotation) == data)
                    && beside(&other.options, &option)
                        == beside(&complete(kind, &option, &data).0, &option)
            };
            all.push(SharedData {
                plugin: stage.plugin.name.clone(),
                kind,
                written: stages.iter().position(prepares),
                option,
                data,
                readers: vec![index],
            });
        }
    }
    all.retain(|data| data.readers.len() > 1 || data.written.is_some());
    all
}

/// The options of a stage whose data could be prepared: what the schema says of each, its name, and the data.
fn data_of(
    stage: &PlannedStage,
    kinds: &[StageKind],
) -> Vec<(Annotation, String, Map<String, Value>)> {
    let known = kinds.iter().find(|kind| kind.kind == stage.kind);
    let properties = known.and_then(|kind| kind.schema.get("properties")?.as_object());
    let mut found = Vec::new();
    for (option, schema) in properties.into_iter().flatten() {
        let marked = schema.get("x-retort-prepared");
        let Some(Ok(annotation)) = marked.map(Annotation::deserialize) else {
            continue;
        };
        let Some(data) = stage.options.get(option).and_then(Value::as_object) else {
            continue;
        };
        let given = |source: &String| data.get(source).is_some_and(|value| !value.is_null());
        let refers = |reference: &Reference| is_inside(&reference.pointer, option);
        if annotation.sources.iter().any(given) && !stage.references.iter().any(refers) {
            let data = to_prepare(data, &annotation);
            found.push((annotation, option.clone(), data));
        }
    }
    found
}

/// The data without what concerns only the stage that reads it.
fn to_prepare(data: &Map<String, Value>, annotation: &Annotation) -> Map<String, Value> {
    let mut data = data.clone();
    data.retain(|key, value| !annotation.own.contains(key) && !value.is_null());
    data
}

/// Whether a schema has this option.
fn has_option(schema: &Value, option: &str) -> bool {
    let properties = schema.get("properties");
    properties.is_some_and(|properties| properties.get(option).is_some())
}

/// All options of a stage that prepares this data, and the pointers of those that have their default.
fn complete(kind: &StageKind, option: &str, data: &Map<String, Value>) -> (Value, Vec<String>) {
    let mut options = json!({});
    options[option] = Value::Object(data.clone());
    let filled = schema::settle(&kind.schema, &mut options);
    (options, filled)
}

/// The other options.
fn beside(options: &Value, option: &str) -> Map<String, Value> {
    let mut others = options.as_object().cloned().unwrap_or_default();
    others.remove(option);
    others
}

/// Whether a pointer leads into the option of that name.
fn is_inside(pointer: &str, option: &str) -> bool {
    let rest = pointer.strip_prefix('/');
    let rest = rest.and_then(|rest| rest.strip_prefix(option));
    rest.is_some_and(|rest| rest.starts_with('/'))
}

/// Names in a sentence.
fn quoted(names: &[String]) -> String {
    format!("`{}`", names.join("` and `"))
}

impl SharedData<'_> {
    /// The stage that prepares it, before any has a reference to it. It draws no random numbers, so its seed is that of no
    /// recipe: recipes in one store share its result.
    fn stage(&self, stages: &[PlannedStage], name: String, place: AddedPlace) -> PlannedStage {
        let first = &stages[self.readers[0]];
        let names = self.names(stages);
        let (options, filled) = complete(self.kind, &self.option, &self.data);
        let mut origins = BTreeMap::from([
            ("/kind".to_owned(), Origin::Derived),
            ("/seed".to_owned(), Origin::Derived),
            ("/timeout".to_owned(), Origin::Default),
        ]);
        for (pointer, origin) in &first.origins {
            let is_setting = matches!(pointer.as_str(), "/threads" | "/dtype" | "/device");
            let option = pointer.strip_prefix("/options");
            let is_option = option.is_some_and(|pointer| options.pointer(pointer).is_some());
            if is_setting || is_option {
                origins.insert(pointer.clone(), *origin);
            }
        }
        for pointer in filled {
            origins.insert(format!("/options{pointer}"), Origin::Default);
        }
        if place.device != first.device {
            origins.insert("/device".to_owned(), Origin::Derived);
        }
        if place.dtype != first.dtype {
            origins.insert("/dtype".to_owned(), Origin::Derived);
        }
        let files = first.files.iter();
        let free = first.free.iter();
        PlannedStage {
            name,
            kind: self.kind.kind.clone(),
            plugin: place.plugin,
            device: place.device,
            dtype: place.dtype,
            description: Some(format!("the data of {}, prepared once", quoted(&names))),
            workers: Vec::new(),
            together: false,
            min_workers: None,
            retries: 0,
            seed: 0,
            timeout: None,
            options,
            references: Vec::new(),
            files: files
                .filter(|file| is_inside(&file.pointer, &self.option))
                .cloned()
                .collect(),
            free: free
                .filter(|pointer| is_inside(pointer, &self.option))
                .cloned()
                .collect(),
            output_kind: self.kind.output.clone(),
            revision: self.kind.revision,
            origins,
            position: None,
            added_for: names,
            ..first.clone()
        }
    }

    fn names(&self, stages: &[PlannedStage]) -> Vec<String> {
        let readers = self.readers.iter();
        readers.map(|&reader| stages[reader].name.clone()).collect()
    }

    /// A name that nothing else has, after the first stage that reads the data.
    fn name(&self, first: &PlannedStage, is_taken: &dyn Fn(&str) -> bool) -> String {
        let plain = format!("{}-of-{}", self.kind.kind, first.name);
        let (mut name, mut number) = (plain.clone(), 1);
        while is_taken(&name) {
            number += 1;
            name = format!("{plain}-{number}");
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::decision::{Role, select};
    use crate::plan::{Plan, digest, fake};

    fn plan(stages: &str) -> Plan {
        fake::plan(
            &format!("version: 1\nbackend: fake\nstages:\n{stages}"),
            &[],
        )
        .unwrap()
    }

    /// The stages in order, each with the stage that prepares its data.
    fn check(stages: &str, expected: &[(&str, Option<&str>)]) {
        let plan = plan(stages);
        let found: Vec<(&str, Option<String>)> = plan
            .stages
            .iter()
            .map(|stage| (stage.name.as_str(), stage.prepared().remove("/data")))
            .collect();
        let expected: Vec<(&str, Option<String>)> = expected
            .iter()
            .map(|(stage, prepared)| (*stage, prepared.map(str::to_owned)))
            .collect();
        assert_eq!(found, expected);
    }

    const TWO: &str = "  eye: {kind: classifier, data: {folder: d, size: 8}}\n  \
                       other: {kind: classifier, data: {size: 8, folder: d, flip: true}}\n";

    #[test]
    fn the_same_data_is_prepared_once() {
        let eye = Some("images-of-eye");
        check(
            TWO,
            &[("images-of-eye", None), ("eye", eye), ("other", eye)],
        );
        // A stage alone, other options of the data, and what is cheap to read.
        check(
            "  a: {kind: classifier, data: {folder: d}}\n  b: {kind: classifier, data: {folder: d, size: 8}}\n  \
             c: {kind: classifier, data: {csv: t}}\n  d: {kind: classifier, data: {csv: t}}\n",
            &[("a", None), ("b", None), ("c", None), ("d", None)],
        );
        // A stage of the recipe may prepare it already, and then comes first; its name may be taken.
        let written = Some("z");
        check(
            &format!("{TWO}  z: {{kind: images, data: {{folder: d, size: 8}}}}\n"),
            &[("z", None), ("eye", written), ("other", written)],
        );
        let second = Some("images-of-eye-2");
        check(
            &format!("{TWO}  images-of-eye: {{kind: tokenizer, data: d.csv}}\n"),
            &[
                ("images-of-eye-2", None),
                ("eye", second),
                ("other", second),
                ("images-of-eye", None),
            ],
        );
    }

    #[test]
    fn an_added_stage_prepares_what_its_readers_would_read() {
        let plan = plan(TWO);
        let added = plan.stage("images-of-eye").unwrap();
        assert_eq!(added.kind, "images");
        assert_eq!(
            added.options,
            json!({"data": {"folder": "d", "size": 8, "flip": false}, "quality": 90})
        );
        assert_eq!(added.files[0].pointer, "/data/folder");
        assert_eq!(added.files.len(), 1);
        assert_eq!(added.added_for, ["eye", "other"]);
        assert_eq!(
            plan.notes,
            ["`images-of-eye` prepares the data of `eye` and `other` once"]
        );
        // Planning says what does not exist once for each stage of the recipe.
        let missing = plan.missing_files();
        assert!(
            missing
                .iter()
                .all(|finding| !finding.message.contains("images-of"))
        );
        assert_eq!(missing.len(), 2);
        let fault = plan.option_at_fault("images-of-eye", "/data/size", "too large");
        assert_eq!(fault[0].pointer, "/stages/eye/data/size");
        assert!(fault[0].position.is_some());
    }

    #[test]
    fn a_stage_that_does_more_than_prepare_the_data_is_no_substitute() {
        let with = |quality: u32| {
            format!(
                "{TWO}  z: {{kind: images, data: {{folder: d, size: 8}}, quality: {quality}}}\n"
            )
        };
        // The default.
        let written = Some("z");
        check(
            &with(90),
            &[("z", None), ("eye", written), ("other", written)],
        );
        let added = Some("images-of-eye");
        check(
            &with(80),
            &[
                ("images-of-eye", None),
                ("eye", added),
                ("other", added),
                ("z", None),
            ],
        );
    }

    #[test]
    fn a_run_has_no_more_stages_than_a_recipe_may_have() {
        let with = |others: usize| {
            let alone = |number| format!("  s{number}: {{kind: tokenizer, data: d.csv}}\n");
            let others: String = (0..others).map(alone).collect();
            plan(&format!("{TWO}{others}")).stages.len()
        };
        assert_eq!(with(MAX_STAGES - 3), MAX_STAGES);
        assert_eq!(with(MAX_STAGES - 2), MAX_STAGES);
    }

    #[test]
    fn another_reader_does_not_change_a_digest() {
        let files = BTreeMap::from([("/data/folder".to_owned(), "f00d".to_owned())]);
        let of = |stages: &str| {
            let plan = plan(stages);
            let stage = plan.stage("eye").unwrap();
            digest(stage, &BTreeMap::new(), &files).unwrap().hex
        };
        let alone = TWO.lines().next().unwrap();
        assert_eq!(of(&format!("{alone}\n")), of(TWO));
    }

    #[test]
    fn data_is_prepared_for_stages_that_run() {
        use Role::{Forced, Needed, Skipped, Wanted};
        let text = format!(
            "{TWO}  drawn: {{kind: classifier, from: eye, data: {{folder: d, size: 8}}}}\n"
        );
        let plan = plan(&text);
        let names: Vec<&str> = plan
            .stages
            .iter()
            .map(|stage| stage.name.as_str())
            .collect();
        assert_eq!(names, ["images-of-eye", "eye", "other", "drawn"]);
        let check = |from: Option<&str>, until: Option<&str>, force: &[&str], roles: [Role; 4]| {
            let force: Vec<String> = force.iter().map(|&name| name.to_owned()).collect();
            assert_eq!(select(&plan, from, until, &force).unwrap(), roles);
        };
        check(None, None, &[], [Wanted; 4]);
        check(None, None, &["*"], [Forced; 4]);
        check(None, Some("eye"), &[], [Wanted, Wanted, Skipped, Skipped]);
        check(
            None,
            Some("images-of-eye"),
            &["images-of-eye"],
            [Forced, Skipped, Skipped, Skipped],
        );
        // `eye` has to be in the store, and so needs no data.
        check(Some("drawn"), None, &[], [Wanted, Needed, Skipped, Wanted]);
        check(Some("images-of-eye"), None, &[], [Wanted; 4]);
    }
}
