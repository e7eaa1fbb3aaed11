//! What would run, what would be reused, and why.
//!
//! In: a plan, the roles of its stages, and earlier results ([`KnownResults`]). Out: a [`Decision`] per stage. The executor
//! decides again with the same functions, stage by stage, once the inputs exist.

use std::collections::BTreeMap;
use std::error::Error as StdError;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Dependencies, Digest, Plan, PlannedStage, digest};
use crate::schema;

/// The role of each stage in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Run or reused, according to its digest.
    Wanted,
    /// Run even if its result is in the store.
    Forced,
    /// Outside `--from`, but needed by a stage inside: its result must be in the store.
    Needed,
    /// Left out.
    Skipped,
}

/// Why stages could not be selected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// A flag names an unknown stage.
    #[error("`{flag} {stage}`: there is no such stage in the recipe")]
    NoSuchStage {
        /// The flag.
        flag: &'static str,
        /// The name given.
        stage: String,
        /// The existing names, or the likely one.
        hint: Option<String>,
    },
    /// `--from` and `--until` have nothing between them.
    #[error(
        "`--from {from} --until {until}` selects nothing: `{until}` does not depend on `{from}`"
    )]
    Nothing {
        /// First stage.
        from: String,
        /// Last stage.
        until: String,
    },
}

/// What happens to a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It runs.
    Run,
    /// It runs unless its inputs turn out unchanged.
    RunInputChanges,
    /// Its result is in the store.
    Reuse,
    /// It is left out.
    Skip,
    /// Its result must be in the store but is missing.
    Missing,
}

/// What happens to a stage, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Decision {
    /// The stage.
    pub stage: String,
    /// What happens.
    pub action: Action,
    /// Reasons, by component.
    pub why: Vec<String>,
    /// Its digest; `None` while inputs or files are not known.
    pub digest: Option<String>,
    /// Hash of the result that is reused.
    pub output: Option<String>,
}

/// Earlier results. The store is one implementation, tests bring another.
pub trait KnownResults {
    /// Content hash of the output of a successful attempt with this digest, if it is still there.
    fn find_success(&mut self, digest: &str) -> Result<Option<String>, Box<dyn StdError>>;

    /// Components of the digest of this stage's latest execution in runs of this recipe.
    fn last_components(
        &mut self,
        recipe: &str,
        stage: &str,
    ) -> Result<Option<Value>, Box<dyn StdError>>;

    /// Content hashes of the files named by the stage's options, by pointer; missing files are left out.
    fn file_hashes(
        &mut self,
        stage: &PlannedStage,
    ) -> Result<BTreeMap<String, String>, Box<dyn StdError>>;
}

/// The role of each stage (in the plan's order) under `--from`, `--until` and `--force`. `force` holds names, or `*`.
pub fn select(
    plan: &Plan,
    from: Option<&str>,
    until: Option<&str>,
    force: &[String],
) -> Result<Vec<Role>, SelectError> {
    let dependencies = Dependencies::of(plan);
    let index = |flag: &'static str, name: &str| {
        dependencies
            .position(name)
            .ok_or_else(|| SelectError::NoSuchStage {
                flag,
                stage: name.to_owned(),
                hint: schema::suggest(name, plan.stages.iter().map(|stage| stage.name.as_str())),
            })
    };
    let count = plan.stages.len();
    let mut wanted = vec![true; count];
    if let Some(name) = from {
        let after = dependencies.after(index("--from", name)?);
        wanted
            .iter_mut()
            .zip(after)
            .for_each(|(wanted, after)| *wanted &= after);
    }
    if let Some(name) = until {
        let before = dependencies.before(&[index("--until", name)?]);
        wanted
            .iter_mut()
            .zip(before)
            .for_each(|(wanted, before)| *wanted &= before);
    }
    let chosen: Vec<usize> = (0..count).filter(|&stage| wanted[stage]).collect();
    if let (true, Some(from), Some(until)) = (chosen.is_empty(), from, until) {
        return Err(SelectError::Nothing {
            from: from.to_owned(),
            until: until.to_owned(),
        });
    }
    // A stage whose result is in the store needs no data.
    let needed = Dependencies::by(plan, |reference| !reference.prepared).before(&chosen);
    let mut roles: Vec<Role> = (0..count)
        .map(|stage| match (wanted[stage], needed[stage]) {
            (true, _) => Role::Wanted,
            (false, true) => Role::Needed,
            (false, false) => Role::Skipped,
        })
        .collect();
    prepare_data(plan, &dependencies, &mut roles);
    for name in force {
        let forced = if name == "*" {
            chosen.clone()
        } else {
            vec![index("--force", name)?]
        };
        for stage in forced {
            if roles[stage] == Role::Wanted {
                roles[stage] = Role::Forced;
            }
        }
    }
    Ok(roles)
}

/// Lets the stages run that prepare data of stages that run, also outside `--from`.
fn prepare_data(plan: &Plan, dependencies: &Dependencies<'_>, roles: &mut [Role]) {
    for reader in 0..roles.len() {
        if roles[reader] != Role::Wanted {
            continue;
        }
        for name in plan.stages[reader].prepared().values() {
            let input = dependencies.position(name);
            if let Some(input) = input.filter(|&input| roles[input] == Role::Skipped) {
                roles[input] = Role::Wanted;
            }
        }
    }
}

/// Decides for every stage of the plan, in its order. `roles` come from [`select`].
pub fn decide(
    plan: &Plan,
    roles: &[Role],
    known: &mut dyn KnownResults,
) -> Result<Vec<Decision>, Box<dyn StdError>> {
    let mut outputs = plan.given_hashes();
    let mut decisions = Vec::new();
    for (stage, &role) in plan.stages.iter().zip(roles) {
        let mut decision = Decision {
            stage: stage.name.clone(),
            action: Action::Skip,
            why: Vec::new(),
            digest: None,
            output: None,
        };
        if role == Role::Skipped {
            decision
                .why
                .push("left out by --from or --until".to_owned());
            decisions.push(decision);
            continue;
        }
        let files = known.file_hashes(stage)?;
        let absent: Vec<String> = stage
            .files
            .iter()
            .filter(|file| !files.contains_key(&file.pointer))
            .map(|file| {
                let gone = || format!("{} does not exist", file.path.display());
                file.problem().unwrap_or_else(gone)
            })
            .collect();
        let waiting = inputs_to_come(stage, &outputs);
        let digest = digest(stage, &outputs, &files);
        let found = match &digest {
            Some(digest) => known.find_success(&digest.hex)?,
            None => None,
        };
        let last = known.last_components(&plan.name, &stage.name)?;
        decision.action = match (role, &found) {
            (Role::Forced, _) => {
                decision.why.push("--force".to_owned());
                Action::Run
            }
            (_, Some(_)) => {
                decision.why.push("nothing has changed".to_owned());
                Action::Reuse
            }
            (Role::Needed, None) => {
                decision
                    .why
                    .push("its result is not in the store".to_owned());
                Action::Missing
            }
            (_, None) => {
                let now = match &digest {
                    Some(digest) => digest.components.clone(),
                    None => provisional(stage, &outputs, &files),
                };
                let own = last.as_ref().map(|last| differences(last, &now));
                decision.why.extend(absent.iter().cloned());
                match &own {
                    None => decision.why.push("it has not run before".to_owned()),
                    Some(own) if own.is_empty() && waiting.is_empty() && absent.is_empty() => {
                        decision
                            .why
                            .push("it has not succeeded before, or its result is gone".to_owned());
                    }
                    Some(own) => decision.why.extend(own.iter().cloned()),
                }
                if own.is_some() && !waiting.is_empty() {
                    let verb = if waiting.len() == 1 { "runs" } else { "run" };
                    decision
                        .why
                        .push(format!("`{}` {verb} first", waiting.join("` and `")));
                }
                let only_inputs = own.as_ref().is_some_and(Vec::is_empty) && absent.is_empty();
                if only_inputs && !waiting.is_empty() {
                    Action::RunInputChanges
                } else {
                    Action::Run
                }
            }
        };
        if decision.action == Action::Reuse {
            if let Some(hash) = &found {
                outputs.insert(stage.name.clone(), hash.clone());
            }
            decision.output = found;
        }
        decision.digest = digest.map(|digest| digest.hex);
        decisions.push(decision);
    }
    Ok(decisions)
}

/// Why a stage runs, from the components of its latest execution and of its digest now: one line per difference.
pub fn explain(last: Option<&Value>, now: &Digest) -> Vec<String> {
    match last {
        None => vec!["it has not run before".to_owned()],
        Some(last) => match differences(last, &now.components) {
            same if same.is_empty() => {
                vec!["it has not succeeded before, or its result is gone".to_owned()]
            }
            differences => differences,
        },
    }
}

/// Names of the stages whose output is not known yet.
fn inputs_to_come(stage: &PlannedStage, outputs: &BTreeMap<String, String>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    // A stage could read its data itself.
    for reference in stage.references.iter().filter(|one| !one.prepared) {
        if !outputs.contains_key(&reference.stage) && !names.contains(&reference.stage) {
            names.push(reference.stage.clone());
        }
    }
    names
}

/// A placeholder for an unknown input or file; equal to anything.
const UNKNOWN: &str = "?";

/// The components of a digest whose inputs are partly unknown.
fn provisional(
    stage: &PlannedStage,
    outputs: &BTreeMap<String, String>,
    files: &BTreeMap<String, String>,
) -> Value {
    let mut outputs = outputs.clone();
    for reference in &stage.references {
        outputs
            .entry(reference.stage.clone())
            .or_insert_with(|| UNKNOWN.to_owned());
    }
    let mut files = files.clone();
    for file in &stage.files {
        files
            .entry(file.pointer.clone())
            .or_insert_with(|| UNKNOWN.to_owned());
    }
    digest(stage, &outputs, &files).map_or(Value::Null, |digest| digest.components)
}

/// The differences between the components of two digests, one line each.
pub fn differences(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    let (old_kind, new_kind) = (&old["kind"], &new["kind"]);
    if old_kind["name"] != new_kind["name"] {
        lines.push(format!(
            "kind: {} -> {}",
            short(&old_kind["name"]),
            short(&new_kind["name"])
        ));
    } else if old_kind["revision"] != new_kind["revision"] {
        lines.push(format!(
            "`{}` stages have changed (revision {} -> {})",
            short(&new_kind["name"]),
            old_kind["revision"],
            new_kind["revision"]
        ));
    }
    option_differences(&old["options"], &new["options"], "", &mut lines);
    for key in ["seed", "device", "dtype"] {
        if old[key] != new[key] {
            lines.push(format!(
                "{key}: {} -> {}",
                short(&old[key]),
                short(&new[key])
            ));
        }
    }
    let (old, new) = (&old["plugin"], &new["plugin"]);
    if old["name"] != new["name"] {
        lines.push(format!(
            "plugin: {} -> {}",
            short(&old["name"]),
            short(&new["name"])
        ));
    } else if old["version"] != new["version"] {
        lines.push(format!(
            "plugin {}: version {} -> {}",
            short(&new["name"]),
            short(&old["version"]),
            short(&new["version"])
        ));
    } else if old["hash"] != new["hash"] {
        lines.push(format!(
            "plugin {}: its file has changed (rebuilt)",
            short(&new["name"])
        ));
    }
    lines
}

fn option_differences(old: &Value, new: &Value, path: &str, lines: &mut Vec<String>) {
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        let inside = |key: &str| {
            if path.is_empty() {
                key.to_owned()
            } else {
                format!("{path}.{key}")
            }
        };
        for (key, new) in new {
            option_differences(
                old.get(key).unwrap_or(&Value::Null),
                new,
                &inside(key),
                lines,
            );
        }
        for (key, old) in old.iter().filter(|(key, _)| !new.contains_key(*key)) {
            option_differences(old, &Value::Null, &inside(key), lines);
        }
        return;
    }
    if old == new {
        return;
    }
    let content = |value: &Value, prefix: &str| {
        value
            .as_str()
            .and_then(|text| text.strip_prefix(prefix))
            .map(str::to_owned)
    };
    for (prefix, noun) in [("artifact:", "input"), ("file:", "file")] {
        if let (Some(old), Some(new)) = (content(old, prefix), content(new, prefix)) {
            if old != UNKNOWN && new != UNKNOWN {
                lines.push(format!(
                    "{noun} `{path}` has changed ({} -> {})",
                    start_of(&old),
                    start_of(&new)
                ));
            }
            return;
        }
    }
    lines.push(format!("`{path}`: {} -> {}", short(old), short(new)));
}

/// The first characters of a hash; an imported one may be any text.
fn start_of(hash: &str) -> &str {
    hash.char_indices()
        .nth(8)
        .map_or(hash, |(end, _)| &hash[..end])
}

/// A shortened value.
fn short(value: &Value) -> String {
    let text = match value {
        Value::Null => "nothing".to_owned(),
        Value::String(text) => match text.split_once(':') {
            Some(("artifact", _)) => "another stage's output".to_owned(),
            Some(("file", _)) => "a file".to_owned(),
            _ => text.clone(),
        },
        // As people write it: 3, not 3.0.
        Value::Number(number) if number.is_f64() => number.as_f64().unwrap_or(f64::NAN).to_string(),
        other => other.to_string(),
    };
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::fake;

    /// A history of successes by digest, with the components of the latest execution.
    #[derive(Default)]
    struct FakeKnownResults {
        successes: BTreeMap<String, String>,
        last: BTreeMap<String, Value>,
        missing_files: bool,
    }

    impl KnownResults for FakeKnownResults {
        fn find_success(&mut self, digest: &str) -> Result<Option<String>, Box<dyn StdError>> {
            Ok(self.successes.get(digest).cloned())
        }

        fn last_components(
            &mut self,
            _: &str,
            stage: &str,
        ) -> Result<Option<Value>, Box<dyn StdError>> {
            Ok(self.last.get(stage).cloned())
        }

        fn file_hashes(
            &mut self,
            stage: &PlannedStage,
        ) -> Result<BTreeMap<String, String>, Box<dyn StdError>> {
            let files = stage.files.iter().filter(|_| !self.missing_files);
            Ok(files
                .map(|file| (file.pointer.clone(), "content".to_owned()))
                .collect())
        }
    }

    impl FakeKnownResults {
        /// Everything in the plan has succeeded; a stage's output has its digest as hash.
        fn after(plan: &Plan) -> Self {
            let mut known = Self::default();
            let mut outputs = BTreeMap::new();
            for stage in &plan.stages {
                let files = known.file_hashes(stage).unwrap();
                let digest = digest(stage, &outputs, &files).unwrap();
                outputs.insert(stage.name.clone(), digest.hex.clone());
                known.successes.insert(digest.hex.clone(), digest.hex);
                known.last.insert(stage.name.clone(), digest.components);
            }
            known
        }
    }

    const RECIPE: &str = "\
version: 1
backend: fake
stages:
  codes: {kind: tokenizer, data: d.csv}
  teacher: {kind: pretrain, tokenizer: codes, steps: 10}
  student: {kind: distill, teacher: teacher, tokenizer: codes}
";

    /// Decides for the recipe, changed by `set`, after the unchanged recipe has run.
    fn check(set: &[&str], from: Option<&str>, force: &[&str], expected: &[(&str, Action, &str)]) {
        let mut known = FakeKnownResults::after(&fake::plan(RECIPE, &[]).unwrap());
        let plan = fake::plan(RECIPE, set).unwrap();
        let force: Vec<String> = force.iter().map(|name| (*name).to_owned()).collect();
        let roles = select(&plan, from, None, &force).unwrap();
        let decisions = decide(&plan, &roles, &mut known).unwrap();
        let found: Vec<(&str, Action, String)> = decisions
            .iter()
            .map(|decision| {
                (
                    decision.stage.as_str(),
                    decision.action,
                    decision.why.join("; "),
                )
            })
            .collect();
        let expected: Vec<(&str, Action, String)> = expected
            .iter()
            .map(|(stage, action, why)| (*stage, *action, (*why).to_owned()))
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn stages_run_for_what_has_changed() {
        use Action::{Reuse, Run, RunInputChanges, Skip};
        let same = "nothing has changed";
        check(
            &[],
            None,
            &[],
            &[
                ("codes", Reuse, same),
                ("teacher", Reuse, same),
                ("student", Reuse, same),
            ],
        );
        check(
            &["teacher.steps=20"],
            None,
            &[],
            &[
                ("codes", Reuse, same),
                ("teacher", Run, "`steps`: 10 -> 20"),
                ("student", RunInputChanges, "`teacher` runs first"),
            ],
        );
        check(
            &["codes.seed=3", "student.steps=7"],
            None,
            &[],
            &[
                ("codes", Run, "seed: 4893503193497213 -> 3"),
                ("teacher", RunInputChanges, "`codes` runs first"),
                (
                    "student",
                    Run,
                    "`steps`: 1000 -> 7; `teacher` and `codes` run first",
                ),
            ],
        );
        check(
            &[],
            None,
            &["teacher"],
            &[
                ("codes", Reuse, same),
                ("teacher", Run, "--force"),
                ("student", RunInputChanges, "`teacher` runs first"),
            ],
        );
        check(
            &["student.steps=7"],
            Some("student"),
            &[],
            &[
                ("codes", Reuse, same),
                ("teacher", Reuse, same),
                ("student", Run, "`steps`: 1000 -> 7"),
            ],
        );
        let left_out = "left out by --from or --until";
        let plan = fake::plan(RECIPE, &[]).unwrap();
        let roles = select(&plan, None, Some("codes"), &[]).unwrap();
        let decisions = decide(
            &plan,
            &roles,
            &mut FakeKnownResults {
                missing_files: true,
                ..FakeKnownResults::default()
            },
        )
        .unwrap();
        assert_eq!(
            decisions[0].why.join("; "),
            "the file /base/d.csv does not exist; it has not run before"
        );
        assert_eq!(
            (decisions[1].action, decisions[1].why.join("; ")),
            (Skip, left_out.to_owned())
        );
    }

    #[test]
    fn what_is_needed_has_to_be_there() {
        let plan = fake::plan(RECIPE, &[]).unwrap();
        let roles = select(&plan, Some("student"), None, &[]).unwrap();
        assert_eq!(roles, [Role::Needed, Role::Needed, Role::Wanted]);
        let decisions = decide(&plan, &roles, &mut FakeKnownResults::default()).unwrap();
        assert_eq!(decisions[0].action, Action::Missing);
        let wrong = |from, until, force: &[String]| {
            select(&plan, from, until, force).unwrap_err().to_string()
        };
        assert!(wrong(Some("studnet"), None, &[]).contains("no such stage"));
        assert!(wrong(None, None, &["x".to_owned()]).contains("--force x"));
        assert!(wrong(Some("student"), Some("codes"), &[]).contains("selects nothing"));
    }

    #[test]
    fn differences_are_named_one_by_one() {
        let plan = fake::plan(RECIPE, &[]).unwrap();
        let stage = plan.stage("codes").unwrap();
        let file = |hash: &str| BTreeMap::from([("/data".to_owned(), hash.to_owned())]);
        let old = digest(stage, &BTreeMap::new(), &file("0123456789"))
            .unwrap()
            .components;
        let mut changed = stage.clone();
        changed.plugin.hash = "other".to_owned();
        changed.device = "cuda:1".to_owned();
        changed.revision += 1;
        let now = digest(&changed, &BTreeMap::new(), &file("9876543210")).unwrap();
        assert_eq!(
            explain(Some(&old), &now),
            [
                "`tokenizer` stages have changed (revision 1 -> 2)",
                "file `data` has changed (01234567 -> 98765432)",
                "device: cpu -> cuda",
                "plugin fake: its file has changed (rebuilt)",
            ]
        );
    }

    /// The components of an imported run may be anything.
    #[test]
    fn hashes_of_other_letters_are_cut_between_them() {
        assert_eq!(start_of("0123456789"), "01234567");
        assert_eq!(start_of("€€€"), "€€€");
        assert_eq!(start_of("€€€€€€€€€"), "€€€€€€€€");
    }
}
