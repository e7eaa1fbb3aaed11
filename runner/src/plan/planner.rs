//! Resolves a recipe's stages: plugin, options, references, order, device.
//!
//! A mistake in one stage does not hide others: each step continues with the valid rest, and follow-up errors are not
//! reported.

mod device;
mod order;
mod unresolved;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use retort_abi::{Description, Device};
use serde_json::Value;

use super::{Build, Descriptions, Origin, PlannedStage, Threads, prepared};
use crate::diagnostic::Finding;
use crate::duration;
use crate::recipe::{Recipe, RecipeSource, ValueSource};
use crate::schema;
use crate::yaml::{EntryPart, escape};
use unresolved::UnresolvedStage;

/// The stages of a recipe in an order in which they can run, and all findings. Stages with mistakes are left out. The last
/// element contains notes on the plan's own choices.
pub(super) fn settle(
    recipe: &Recipe,
    plugins: &mut dyn Descriptions,
) -> (Vec<PlannedStage>, Vec<Finding>, Vec<String>) {
    let mut planner = Planner {
        recipe,
        source: &recipe.source,
        plugins,
        known: BTreeMap::new(),
        variants: BTreeMap::new(),
        devices: BTreeMap::new(),
        findings: recipe.findings.clone(),
        notes: Vec::new(),
    };
    let unresolved_stages: Vec<UnresolvedStage<'_>> = recipe
        .stages
        .iter()
        .map(|stage| planner.unresolved(stage))
        .collect();
    planner.check_references(&unresolved_stages);
    let order = planner.order(&unresolved_stages);
    let stages = order
        .into_iter()
        .filter_map(|index| planner.settle(&unresolved_stages[index]))
        .collect();
    let given: Vec<&str> = recipe
        .given
        .iter()
        .map(|given| given.name.as_str())
        .collect();
    let known = planner.known.clone();
    let (stages, notes) = prepared::share(stages, &given, &known, &mut |first, kind| {
        planner.place_added(first, kind)
    });
    planner.notes.extend(notes);
    (stages, planner.findings, planner.notes)
}

struct Planner<'a> {
    recipe: &'a Recipe,
    source: &'a RecipeSource,
    plugins: &'a mut dyn Descriptions,
    /// Plugins asked so far; `None` where that failed and has been reported.
    known: BTreeMap<String, Option<Rc<Build>>>,
    /// Builds of plugins for other devices.
    variants: BTreeMap<String, Vec<Rc<Build>>>,
    /// By the plugin's file.
    devices: BTreeMap<PathBuf, Option<Vec<Device>>>,
    findings: Vec<Finding>,
    notes: Vec<String>,
}

impl Planner<'_> {
    fn report(&mut self, finding: Finding, part: EntryPart) {
        let placed = self.source.place(finding, part);
        // A mistake in a param is reported once for all stages.
        let same = |other: &Finding| {
            let together = other.position.is_some() && other.position == placed.position;
            *other == placed
                || together && other.hint == placed.hint && !in_place(self.source, &placed)
        };
        if !self.findings.iter().any(same) {
            self.findings.push(placed);
        }
    }

    /// Resolves device, dtype, seed, threads and timeout; `None` if an error of the stage has been reported.
    fn settle(&mut self, unresolved: &UnresolvedStage<'_>) -> Option<PlannedStage> {
        let stage = unresolved.stage;
        let timeout = match timeout(unresolved) {
            Ok(timeout) => timeout,
            Err(finding) => {
                self.report(finding, EntryPart::Value);
                return None;
            }
        };
        let kind = unresolved.kind()?;
        let place = self.place(unresolved, unresolved.plugin.as_ref()?)?;
        // Whether workers are supported may depend on the device.
        let kinds = &place.build.description.stages;
        if let Some(known) = kinds.iter().find(|known| known.kind == kind.kind)
            && stage.workers.is_some_and(|workers| workers > 1)
            && !known.divisible
        {
            self.report_workers(unresolved, &place.build, known);
            return None;
        }
        let dtype = self.dtype(unresolved, &place.build.description)?;
        let mut origins = self.origins(unresolved);
        if place.chosen {
            origins.insert("/device".to_owned(), Origin::Derived);
        }
        let workers = match stage.workers {
            Some(count) if count > 1 => {
                // The schema refuses larger values.
                let count = count.min(schema::MAX_WORKERS);
                place.devices.iter().cycle().take(count).cloned().collect()
            }
            _ => Vec::new(),
        };
        let spread = place.devices.len().min(workers.len());
        if spread > 1 {
            let devices = place.devices[..spread].join(", ");
            self.note(format!(
                "stage `{}`: its workers are on {devices}",
                stage.name
            ));
        }
        Some(PlannedStage {
            name: stage.name.clone(),
            kind: kind.kind.clone(),
            description: stage.description.clone(),
            plugin: place.build.identity.clone(),
            device: place.device,
            dtype,
            threads: stage
                .threads
                .or(self.recipe.threads)
                .map_or(Threads::Share, Threads::Fixed),
            together: kind.together && !workers.is_empty(),
            min_workers: stage.min_workers.filter(|_| !workers.is_empty()),
            retries: stage.retries.unwrap_or(0),
            workers,
            seed: stage
                .seed
                .unwrap_or_else(|| derived_seed(self.recipe.seed.unwrap_or(0), &stage.name)),
            timeout,
            options: unresolved.options.clone(),
            references: unresolved.references.clone(),
            files: unresolved.files.clone(),
            free: unresolved.free.clone(),
            output_kind: kind.output.clone(),
            revision: kind.revision,
            origins,
            position: self.source.locate(&unresolved.pointer, EntryPart::Key),
            added_for: Vec::new(),
        })
    }

    /// The origins of a stage's values: of its keys and of its options.
    fn origins(&self, unresolved: &UnresolvedStage<'_>) -> BTreeMap<String, Origin> {
        let (stage, recipe) = (unresolved.stage, self.recipe);
        let mut origins = BTreeMap::new();
        let mut add = |key: &str, own: bool, shared: bool, fallback: Origin| {
            let pointer = match (own, shared) {
                (true, _) => Some(format!("{}/{key}", unresolved.pointer)),
                (false, true) => Some(format!("/{key}")),
                (false, false) => None,
            };
            let origin =
                pointer.map_or(fallback, |pointer| origin(self.source, &pointer, fallback));
            origins.insert(format!("/{key}"), origin);
        };
        add("seed", stage.seed.is_some(), false, Origin::Derived);
        let settings = [
            ("threads", stage.threads.is_some(), recipe.threads.is_some()),
            ("dtype", stage.dtype.is_some(), recipe.dtype.is_some()),
            ("device", stage.device.is_some(), recipe.device.is_some()),
            ("timeout", stage.timeout.is_some(), false),
            ("kind", true, false),
        ];
        for (key, own, shared) in settings {
            add(key, own, shared, Origin::Default);
        }
        if stage.workers.is_some() {
            add("workers", true, false, Origin::Default);
        }
        if stage.min_workers.is_some() {
            add("min_workers", true, false, Origin::Default);
        }
        if stage.retries.is_some() {
            add("retries", true, false, Origin::Default);
        }
        option_origins(
            self.source,
            unresolved,
            &unresolved.options,
            "",
            &mut origins,
        );
        origins
    }

    /// The pointer of a setting that a stage may have or take from the recipe.
    fn setting(&self, unresolved: &UnresolvedStage<'_>, key: &str, own: bool) -> String {
        if own {
            format!("{}/{key}", unresolved.pointer)
        } else {
            format!("/{key}")
        }
    }

    fn dtype(
        &mut self,
        unresolved: &UnresolvedStage<'_>,
        description: &Description,
    ) -> Option<String> {
        let known: Vec<&str> = description.dtypes.iter().map(String::as_str).collect();
        let Some(written) = unresolved
            .stage
            .dtype
            .as_ref()
            .or(self.recipe.dtype.as_ref())
        else {
            return Some((*known.first().unwrap_or(&"f32")).to_owned());
        };
        if known.contains(&written.as_str()) {
            return Some(written.clone());
        }
        let pointer = self.setting(unresolved, "dtype", unresolved.stage.dtype.is_some());
        let message = format!(
            "plugin `{}` does not compute in `{written}`",
            description.name
        );
        let finding = Finding::error(pointer, message);
        self.report(
            Finding {
                hint: schema::suggest(written, known),
                ..finding
            },
            EntryPart::Value,
        );
        None
    }

    /// Says something once.
    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// A stage's timeout, or the error in it.
#[expect(
    clippy::result_large_err,
    reason = "once for a stage: its size costs nothing"
)]
fn timeout(unresolved: &UnresolvedStage<'_>) -> Result<Option<Duration>, Finding> {
    let Some(written) = unresolved.stage.timeout.as_deref() else {
        return Ok(None);
    };
    let why = match duration::parse(written) {
        Ok(timeout) if !timeout.is_zero() => return Ok(Some(timeout)),
        Ok(_) => "it is zero".to_owned(),
        Err(why) => why,
    };
    let name = &unresolved.stage.name;
    let message = format!("stage `{name}`: `timeout` cannot be `{written}`: {why}");
    let finding = Finding::error(format!("{}/timeout", unresolved.pointer), message);
    Err(finding.hint(time_hint(written)))
}

/// A correction for an invalid duration: a number without a unit means seconds.
fn time_hint(written: &str) -> String {
    let seconds = written.trim().parse::<f64>();
    match seconds.map(Duration::try_from_secs_f64) {
        Ok(Ok(time)) if !time.is_zero() && time.subsec_nanos() == 0 => {
            format!(
                "write `{}s`: a time has a unit (`90s`, `30m`, `2h 30m`)",
                time.as_secs()
            )
        }
        Ok(Ok(time)) if time.as_millis() > 0 => {
            format!(
                "write `{}ms`: a time has a unit (`90s`, `30m`, `2h 30m`)",
                time.as_millis()
            )
        }
        _ => "write a time like `90s`, `30m` or `2h 30m`".to_owned(),
    }
}

/// Whether a finding is shown at its own position in the text rather than at a param's.
fn in_place(source: &RecipeSource, finding: &Finding) -> bool {
    source.written(&finding.pointer) != ValueSource::Interpolated
}

/// Where a value of the recipe came from.
pub(super) fn origin(source: &RecipeSource, pointer: &str, fallback: Origin) -> Origin {
    match source.written(pointer) {
        ValueSource::Line(line) => Origin::Recipe(line),
        ValueSource::Interpolated => Origin::Params,
        ValueSource::Set => Origin::Set,
        ValueSource::Absent => fallback,
    }
}

/// Records the origin of every leaf value.
fn option_origins(
    source: &RecipeSource,
    unresolved: &UnresolvedStage<'_>,
    value: &Value,
    pointer: &str,
    origins: &mut BTreeMap<String, Origin>,
) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(entries) => entries
            .iter()
            .map(|(key, value)| (escape(key), value))
            .collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(index, item)| (index.to_string(), item))
            .collect(),
        _ => Vec::new(),
    };
    if children.is_empty() && !pointer.is_empty() {
        let filled =
            std::iter::successors(Some(pointer), |pointer| Some(pointer.rsplit_once('/')?.0))
                .any(|pointer| unresolved.filled.iter().any(|filled| filled == pointer));
        let written = match filled {
            true => Origin::Default,
            false => origin(
                source,
                &format!("{}{pointer}", unresolved.pointer),
                Origin::Default,
            ),
        };
        origins.insert(format!("/options{pointer}"), written);
    }
    for (step, child) in children {
        option_origins(
            source,
            unresolved,
            child,
            &format!("{pointer}/{step}"),
            origins,
        );
    }
}

/// The seed of a stage that names none: the first 8 bytes of a hash, below 2^53 so that JSON readers keep it.
pub(super) fn derived_seed(recipe_seed: u64, stage: &str) -> u64 {
    let hash = blake3::hash(format!("{recipe_seed}/{stage}").as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes) & ((1 << 53) - 1)
}
