//! From a recipe to settled stages: plugin, options, references, order, device.
//!
//! A mistake in one stage does not hide those of others: each step goes on with what is right, and what one mistake
//! causes elsewhere is not reported again.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use retort_abi::{Description, Device, StageKind};
use serde_json::Value;

use super::{
    Build, Descriptions, FileKind, FileOption, Origin, PlannedStage, PluginIdentity, Reference,
    Threads,
};
use crate::diagnostic::{Cause, Finding};
use crate::recipe::{Recipe, RecipeStage, Source, Written};
use crate::schema::{self, Target};
use crate::yaml::{Part, escape};

/// The stages of a recipe in an order in which they can run, and everything found on the way. Stages with mistakes are
/// left out. The last are notes on what the plan chose by itself.
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
    let drafts: Vec<Draft<'_>> = recipe
        .stages
        .iter()
        .map(|stage| planner.draft(stage))
        .collect();
    planner.check_references(&drafts);
    let order = planner.order(&drafts);
    let stages = order
        .into_iter()
        .filter_map(|index| planner.settle(&drafts[index]))
        .collect();
    (stages, planner.findings, planner.notes)
}

/// What is known of a stage before its references are.
struct Draft<'a> {
    stage: &'a RecipeStage,
    /// `/stages/<name>`
    pointer: String,
    plugin: Option<Rc<Build>>,
    /// Options with defaults; as written where they are invalid.
    options: Value,
    /// Pointers of defaults.
    filled: Vec<String>,
    references: Vec<Reference>,
    files: Vec<FileOption>,
}

impl Draft<'_> {
    fn kind(&self) -> Option<&StageKind> {
        let kind = self.stage.kind.as_ref()?;
        self.plugin
            .as_ref()?
            .description
            .stages
            .iter()
            .find(|known| known.kind == *kind)
    }
}

struct Planner<'a> {
    recipe: &'a Recipe,
    source: &'a Source,
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

impl<'a> Planner<'a> {
    fn report(&mut self, finding: Finding, part: Part) {
        let placed = self.source.place(finding, part);
        // One mistake in a param is one, however many stages use it.
        let same = |other: &Finding| {
            let together = other.position.is_some() && other.position == placed.position;
            *other == placed
                || together && other.hint == placed.hint && !in_place(self.source, &placed)
        };
        if !self.findings.iter().any(same) {
            self.findings.push(placed);
        }
    }

    /// Settles what a stage's own text decides.
    fn draft(&mut self, stage: &'a RecipeStage) -> Draft<'a> {
        let pointer = format!("/stages/{}", escape(&stage.name));
        let mut draft = Draft {
            stage,
            plugin: self.plugin_of(stage, &pointer),
            pointer,
            options: Value::Object(stage.options.clone()),
            filled: Vec::new(),
            references: Vec::new(),
            files: Vec::new(),
        };
        let (Some(build), Some(kind)) = (draft.plugin.clone(), &stage.kind) else {
            return draft;
        };
        let (identity, description) = (&build.identity, &build.description);
        let Some(known) = description.stages.iter().find(|known| known.kind == *kind) else {
            let kinds = description.stages.iter().map(|known| known.kind.as_str());
            let message = format!(
                "stage `{}`: plugin `{}` has no stage kind `{kind}`",
                stage.name, identity.name
            );
            let finding = Finding::error(format!("{}/kind", draft.pointer), message);
            let hint = schema::suggest(kind, kinds);
            self.report(Finding { hint, ..finding }, Part::Value);
            return draft;
        };
        if stage.workers.is_some_and(|workers| workers > 1) && !known.divisible {
            let message = match known.together {
                true => format!(
                    "stage `{}`: plugin `{}` has no way for the workers of a `{kind}` to add up gradients",
                    stage.name, identity.name
                ),
                false => format!(
                    "stage `{}`: the work of a `{kind}` cannot be divided among workers",
                    stage.name
                ),
            };
            let divisible: Vec<&str> = description
                .stages
                .iter()
                .filter(|known| known.divisible)
                .map(|known| known.kind.as_str())
                .collect();
            let hint = match divisible.as_slice() {
                _ if known.together => {
                    "take a plugin that can: `backend: libtorch`; or leave `workers` out".into()
                }
                [] => format!("plugin `{}` has no kind that can be", identity.name),
                kinds => format!("kinds that can be: `{}`", kinds.join("`, `")),
            };
            let finding = Finding::error(format!("{}/workers", draft.pointer), message);
            self.report(finding.hint(hint), Part::Value);
        }
        let mut options = Value::Object(stage.options.clone());
        let source = self.source;
        let place = draft.pointer.clone();
        schema::take_texts(&known.schema, &mut options, |pointer| {
            source.as_written(&format!("{place}{pointer}"))
        });
        let violations: Vec<_> = build
            .checker(known)
            .check(&options, "option")
            .into_iter()
            // What could not be replaced has been reported.
            .filter(|violation| {
                let pointer = format!("{}{}", draft.pointer, violation.pointer);
                !self
                    .findings
                    .iter()
                    .any(|finding| finding.pointer == pointer)
            })
            .collect();
        for violation in &violations {
            let pointer = format!("{}{}", draft.pointer, violation.pointer);
            let message = match violation.message.strip_prefix("unknown option") {
                Some(rest) => format!("stage `{}`: unknown option{rest} of `{kind}`", stage.name),
                None => format!("stage `{}`: {}", stage.name, violation.message),
            };
            let finding = Finding::error(pointer, message);
            self.report(
                Finding {
                    hint: violation.hint.clone(),
                    ..finding
                },
                violation.part,
            );
        }
        if violations.is_empty() {
            draft.filled = schema::settle(&known.schema, &mut options);
        }
        for annotation in schema::annotations(&known.schema, &options) {
            let pointer = annotation.pointer;
            let Some(text) = options.pointer(&pointer).and_then(Value::as_str) else {
                self.warn_of_null(&draft, &pointer, &annotation.target);
                continue;
            };
            match annotation.target {
                Target::Artifact(kinds) => {
                    draft.references.push(Reference {
                        stage: text.to_owned(),
                        pointer,
                        kinds,
                    });
                }
                target => {
                    let text = self.at_home(text);
                    draft.files.push(FileOption {
                        path: self.source.base_dir.join(&text),
                        pointer: pointer.clone(),
                        kind: match target {
                            Target::Dir => FileKind::Dir,
                            Target::Images => FileKind::Images,
                            Target::Weights => FileKind::Weights,
                            _ => FileKind::File,
                        },
                    });
                    if let Some(option) = options.pointer_mut(&pointer) {
                        *option = Value::String(text);
                    }
                }
            }
        }
        draft.options = options;
        draft
    }

    /// A path as written, `~/` replaced by the home directory.
    fn at_home(&self, path: &str) -> String {
        let home = self.source.home.as_deref().and_then(Path::to_str);
        match (path.strip_prefix('~'), home) {
            (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
                format!("{}{rest}", home.trim_end_matches('/'))
            }
            _ => path.to_owned(),
        }
    }

    /// Who writes `csv: ~` may mean the home directory, and has written "nothing".
    fn warn_of_null(&mut self, draft: &Draft<'_>, pointer: &str, target: &Target) {
        let at = format!("{}{pointer}", draft.pointer);
        if matches!(target, Target::Artifact(_)) || self.source.written_null(&at) != Some("~") {
            return;
        }
        let message = format!(
            "stage `{}`: `{}` is `~`, which is YAML for nothing",
            draft.stage.name,
            pointer[1..].replace('/', ".")
        );
        let finding = Finding::warning(at, message).hint(
            "paths in the home directory begin with `~/`; where nothing is meant, remove the key",
        );
        self.report(finding, Part::Value);
    }

    /// The plugin that runs a stage; what stands in the way is reported once.
    fn plugin_of(&mut self, stage: &RecipeStage, pointer: &str) -> Option<Rc<Build>> {
        let (name, place) = match (&stage.plugin, &self.recipe.backend) {
            (Some(name), _) => (name, format!("{pointer}/plugin")),
            (None, Some(name)) => (name, "/backend".to_owned()),
            (None, None) => {
                let finding =
                    Finding::error("", "no plugin is named: the key `backend` is missing");
                let hint = match self.plugins.names().as_slice() {
                    [] => {
                        "no plugin was found; `retort plugin list` says where they are looked for"
                            .to_owned()
                    }
                    names => format!("write `backend: {}`", names.join("` or `backend: ")),
                };
                self.report(finding.hint(hint), Part::Key);
                return None;
            }
        };
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        let answer = match self.plugins.describe(name) {
            Ok(build) => Some(build),
            Err(error) => {
                let finding = Finding {
                    cause: Cause::Plugin,
                    hint: error.hint,
                    ..Finding::error(place, error.message)
                };
                self.report(finding, Part::Value);
                None
            }
        };
        self.known.insert(name.clone(), answer.clone());
        answer
    }

    /// Reports references to stages that are not there or make something else.
    fn check_references(&mut self, drafts: &[Draft<'_>]) {
        let by_name = indices(drafts);
        for given in &self.recipe.given {
            if by_name.contains_key(given.name.as_str()) {
                let message = format!("`{}` is a stage too", given.name);
                let pointer = format!("/artifacts/{}", escape(&given.name));
                let finding = Finding::error(pointer, message);
                self.report(finding.hint("give one of them another name"), Part::Key);
            }
        }
        for draft in drafts {
            for reference in &draft.references {
                let at = format!("{}{}", draft.pointer, reference.pointer);
                // A `${...}` that could not be replaced.
                if self.findings.iter().any(|finding| finding.pointer == at) {
                    continue;
                }
                let option = reference.pointer[1..].replace('/', ".");
                let fits = |output: &str| {
                    reference.kinds.is_empty() || reference.kinds.iter().any(|kind| kind == output)
                };
                let fitting = || -> Vec<&str> {
                    drafts
                        .iter()
                        .filter(|other| other.stage.name != draft.stage.name)
                        .filter(|other| other.kind().is_some_and(|kind| fits(&kind.output)))
                        .map(|other| other.stage.name.as_str())
                        .collect()
                };
                let wanted = match reference.kinds.as_slice() {
                    [] => "an artifact".to_owned(),
                    kinds => format!("`{}`", kinds.join("` or `")),
                };
                let fitting_hint = || match fitting().as_slice() {
                    [] => format!("no stage of this recipe makes {wanted}"),
                    names => format!("stages that make {wanted}: {}", schema::list(names)),
                };
                let mut given = self.recipe.given.iter();
                if let Some(given) = given.find(|given| given.name == reference.stage) {
                    if !fits(&given.kind) {
                        let message = format!(
                            "stage `{}`: `{option}` wants {wanted}, but the artifact `{}` is a `{}`",
                            draft.stage.name, given.name, given.kind
                        );
                        self.report(
                            Finding::error(at, message).hint(fitting_hint()),
                            Part::Value,
                        );
                    }
                    continue;
                }
                let target = by_name.get(reference.stage.as_str());
                let Some(target) = target.map(|&index| &drafts[index]) else {
                    let message = format!(
                        "stage `{}`: `{option}` names the stage `{}`, which is not in the recipe",
                        draft.stage.name, reference.stage
                    );
                    let names = drafts.iter().map(|other| other.stage.name.as_str());
                    let hint = match schema::nearest(&reference.stage, names) {
                        Some(near) => format!("did you mean `{near}`?"),
                        None => fitting_hint(),
                    };
                    self.report(Finding::error(at, message).hint(hint), Part::Value);
                    continue;
                };
                // An unknown kind has been reported.
                let Some(kind) = target.kind() else { continue };
                if !fits(&kind.output) {
                    let message = format!(
                        "stage `{}`: `{option}` wants {wanted}, but stage `{}` ({}) makes `{}`",
                        draft.stage.name, reference.stage, kind.kind, kind.output
                    );
                    self.report(
                        Finding::error(at, message).hint(fitting_hint()),
                        Part::Value,
                    );
                }
            }
        }
    }

    /// Indices of the stages, each after all that it refers to, otherwise as in the recipe. Cycles are reported.
    fn order(&mut self, drafts: &[Draft<'_>]) -> Vec<usize> {
        let by_name = indices(drafts);
        let inputs: Vec<Vec<usize>> = drafts
            .iter()
            .map(|draft| {
                let stages = draft.references.iter().map(|reference| &reference.stage);
                stages
                    .filter_map(|name| by_name.get(name.as_str()).copied())
                    .collect()
            })
            .collect();
        let mut order = Vec::new();
        let mut placed = vec![false; drafts.len()];
        // Quadratic, for recipes of a few dozen stages and at most a thousand.
        while let Some(next) = (0..drafts.len())
            .find(|&stage| !placed[stage] && inputs[stage].iter().all(|&input| placed[input]))
        {
            placed[next] = true;
            order.push(next);
        }
        let Some(start) = placed.iter().position(|placed| !placed) else {
            return order;
        };
        // Every stage left has an unplaced input: following those must come back to a stage already seen.
        let mut path = vec![start];
        let cycle = loop {
            let last = path[path.len() - 1];
            let Some(&next) = inputs[last].iter().find(|&&input| !placed[input]) else {
                return order;
            };
            if let Some(first) = path.iter().position(|&stage| stage == next) {
                break path[first..].to_vec();
            }
            path.push(next);
        };
        let name = |stage: usize| drafts[stage].stage.name.as_str();
        let mut names: Vec<&str> = cycle.iter().map(|&stage| name(stage)).collect();
        names.push(names[0]);
        let first = &drafts[cycle[0]];
        let wants = |reference: &&Reference| reference.stage == names[1];
        let pointer = first
            .references
            .iter()
            .find(wants)
            .map_or("", |reference| reference.pointer.as_str());
        let message = match cycle.as_slice() {
            [only] => format!("stage `{}` needs itself", name(*only)),
            _ => format!("stages need each other in a circle: {}", names.join(" -> ")),
        };
        let finding = Finding::error(format!("{}{pointer}", first.pointer), message)
            .hint("an arrow means \"takes the output of\"; remove one of these references");
        self.report(finding, Part::Value);
        order
    }

    /// Settles device, dtype, seed, threads and timeout; `None` where something about the stage has been reported.
    fn settle(&mut self, draft: &Draft<'_>) -> Option<PlannedStage> {
        let stage = draft.stage;
        let mut origins = BTreeMap::new();
        let mut origin_of = |key: &str, own: bool, shared: bool, fallback: Origin| {
            let pointer = match (own, shared) {
                (true, _) => Some(format!("{}/{key}", draft.pointer)),
                (false, true) => Some(format!("/{key}")),
                (false, false) => None,
            };
            let origin =
                pointer.map_or(fallback, |pointer| origin(self.source, &pointer, fallback));
            origins.insert(format!("/{key}"), origin);
        };
        origin_of("seed", stage.seed.is_some(), false, Origin::Derived);
        origin_of(
            "threads",
            stage.threads.is_some(),
            self.recipe.threads.is_some(),
            Origin::Default,
        );
        origin_of(
            "dtype",
            stage.dtype.is_some(),
            self.recipe.dtype.is_some(),
            Origin::Default,
        );
        origin_of(
            "device",
            stage.device.is_some(),
            self.recipe.device.is_some(),
            Origin::Default,
        );
        origin_of("timeout", stage.timeout.is_some(), false, Origin::Default);
        origin_of("kind", true, false, Origin::Default);
        if stage.workers.is_some() {
            origin_of("workers", true, false, Origin::Default);
        }

        let timeout = match stage.timeout.as_deref().map(humantime::parse_duration) {
            None => None,
            Some(Ok(timeout)) if !timeout.is_zero() => Some(timeout),
            Some(wrong) => {
                let written = stage.timeout.as_deref().unwrap_or_default();
                let why = wrong
                    .err()
                    .map_or("it is zero".to_owned(), |error| error.to_string());
                let message = format!(
                    "stage `{}`: `timeout` cannot be `{written}`: {why}",
                    stage.name
                );
                let finding = Finding::error(format!("{}/timeout", draft.pointer), message);
                self.report(finding.hint(time_hint(written)), Part::Value);
                return None;
            }
        };
        let kind = draft.kind()?;
        let place = self.place(draft, draft.plugin.as_ref()?)?;
        let dtype = self.dtype(draft, &place.build.description)?;
        if place.chosen {
            origins.insert("/device".to_owned(), Origin::Derived);
        }
        option_origins(self.source, draft, &draft.options, "", &mut origins);
        let workers = match stage.workers {
            Some(count) if count > 1 => place.devices.iter().cycle().take(count).cloned().collect(),
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
            workers,
            seed: stage
                .seed
                .unwrap_or_else(|| derived_seed(self.recipe.seed.unwrap_or(0), &stage.name)),
            timeout,
            options: draft.options.clone(),
            references: draft.references.clone(),
            files: draft.files.clone(),
            output_kind: kind.output.clone(),
            revision: kind.revision,
            origins,
            position: self.source.locate(&draft.pointer, Part::Key),
        })
    }

    /// The pointer of a setting that a stage may have or take from the recipe.
    fn setting(&self, draft: &Draft<'_>, key: &str, own: bool) -> String {
        if own {
            format!("{}/{key}", draft.pointer)
        } else {
            format!("/{key}")
        }
    }

    fn dtype(&mut self, draft: &Draft<'_>, description: &Description) -> Option<String> {
        let known: Vec<&str> = description.dtypes.iter().map(String::as_str).collect();
        let Some(written) = draft.stage.dtype.as_ref().or(self.recipe.dtype.as_ref()) else {
            return Some((*known.first().unwrap_or(&"f32")).to_owned());
        };
        if known.contains(&written.as_str()) {
            return Some(written.clone());
        }
        let pointer = self.setting(draft, "dtype", draft.stage.dtype.is_some());
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
            Part::Value,
        );
        None
    }

    /// Which build of the plugin runs the stage, and where.
    fn place(&mut self, draft: &Draft<'_>, base: &Rc<Build>) -> Option<Placement> {
        let written = draft
            .stage
            .device
            .as_ref()
            .or(self.recipe.device.as_ref())
            .map_or("auto", String::as_str);
        let pointer = self.setting(draft, "device", draft.stage.device.is_some());
        let knows = |build: &Build, kind: &str| {
            build
                .description
                .devices
                .iter()
                .any(|device| device == kind)
        };
        let placed = |build: &Rc<Build>, device: &str, chosen| Placement {
            build: Rc::clone(build),
            device: device.to_owned(),
            devices: vec![device.to_owned()],
            chosen,
        };
        let kind = written.split(':').next().unwrap_or_default();
        if kind == "cpu" && knows(base, kind) {
            return Some(placed(base, "cpu", false));
        }
        let mut builds = vec![Rc::clone(base)];
        builds.extend(self.variants_of(&base.identity.name));
        let driving = |kind: &str| builds.iter().find(|build| knows(build, kind));
        let fallback = base
            .description
            .devices
            .first()
            .map_or("cpu", String::as_str);
        let wanted = if written == "auto" { "cuda" } else { kind };
        let Some(build) = driving(wanted) else {
            if written == "auto" {
                return Some(placed(base, fallback, true));
            }
            // Something that is no device at all has been reported by the schema.
            if matches!(kind, "cpu" | "cuda") {
                let message = format!("plugin `{}` cannot drive `{kind}`", base.identity.name);
                let known: Vec<&str> = builds
                    .iter()
                    .flat_map(|build| build.description.devices.iter().map(String::as_str))
                    .collect();
                let finding = Finding::error(pointer, message)
                    .hint(format!("it was built for `{}`", known.join("`, `")));
                self.report(finding, Part::Value);
            }
            return None;
        };
        if wanted == "cpu" {
            return Some(placed(build, "cpu", false));
        }
        let devices = self.devices_of(&build.identity, &pointer)?;
        let gpus: Vec<&Device> = devices
            .iter()
            .filter(|device| device.name.starts_with("cuda"))
            .collect();
        let usable = gpus.iter().find(|device| device.unusable.is_none());
        let spread = |place| Placement {
            devices: gpus
                .iter()
                .filter(|device| device.unusable.is_none())
                .map(|device| device.name.clone())
                .collect(),
            ..place
        };
        let why = || gpus.iter().find_map(|device| device.unusable.as_deref());
        match (written, usable) {
            ("auto", Some(device)) => {
                let named = [device.name.as_str(), device.model.as_str()].join(" ");
                self.note(format!("device `auto` is {}", named.trim_end()));
                return Some(spread(placed(build, &device.name, true)));
            }
            ("auto", None) if let Some(other) = driving("cpu") => {
                if let Some(why) = why() {
                    self.note(format!("device `auto` is cpu: no GPU can be used ({why})"));
                }
                return Some(placed(other, "cpu", true));
            }
            // As precise as `cuda:0`, so that a plan names one device.
            ("cuda", Some(device)) => return Some(spread(placed(build, &device.name, true))),
            _ => {}
        }
        let found = gpus
            .iter()
            .find(|device| device.name == written || matches!(written, "cuda" | "auto"));
        if usable.is_some() && found.is_some_and(|device| device.unusable.is_none()) {
            return Some(placed(build, written, false));
        }
        let message = match found.and_then(|device| device.unusable.as_deref()) {
            Some(why) => format!("device `{written}` cannot be used: {why}"),
            None => format!("there is no device `{written}` on this machine"),
        };
        let cpu = driving("cpu").map(|_| "cpu");
        let usable: Vec<&str> = cpu
            .into_iter()
            .chain(
                gpus.iter()
                    .filter(|device| device.unusable.is_none())
                    .map(|device| device.name.as_str()),
            )
            .collect();
        let hint = match usable.as_slice() {
            [] => "no device can be used here".to_owned(),
            names => format!("usable here: `{}`", names.join("`, `")),
        };
        self.report(Finding::error(pointer, message).hint(hint), Part::Value);
        None
    }

    /// Says something once.
    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// The other builds of a plugin; one that cannot be asked is told of and left out.
    fn variants_of(&mut self, plugin: &str) -> Vec<Rc<Build>> {
        if let Some(known) = self.variants.get(plugin) {
            return known.clone();
        }
        let mut found = Vec::new();
        for answer in self.plugins.variants(plugin) {
            match answer {
                Ok(variant) => found.push(variant),
                Err(error) => self.note(format!("a variant of `{plugin}` is left out: {error}")),
            }
        }
        self.variants.insert(plugin.to_owned(), found.clone());
        found
    }

    fn devices_of(&mut self, identity: &PluginIdentity, pointer: &str) -> Option<Vec<Device>> {
        if let Some(known) = self.devices.get(&identity.path) {
            return known.clone();
        }
        let answer = match self.plugins.devices(identity) {
            Ok(devices) => Some(devices),
            Err(error) => {
                let finding = Finding::error(pointer, error.message);
                self.report(
                    Finding {
                        cause: Cause::Plugin,
                        hint: error.hint,
                        ..finding
                    },
                    Part::Value,
                );
                None
            }
        };
        self.devices.insert(identity.path.clone(), answer.clone());
        answer
    }
}

/// What to write instead of a wrong time: a number without a unit means seconds.
fn time_hint(written: &str) -> String {
    let seconds = written.trim().parse::<f64>();
    match seconds.map(std::time::Duration::try_from_secs_f64) {
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

/// The stages by name.
fn indices<'a>(drafts: &[Draft<'a>]) -> HashMap<&'a str, usize> {
    drafts
        .iter()
        .enumerate()
        .map(|(index, draft)| (draft.stage.name.as_str(), index))
        .collect()
}

/// Where a stage runs.
struct Placement {
    build: Rc<Build>,
    device: String,
    /// The devices that workers are spread over: it alone where the recipe names it, else all that could have been chosen.
    devices: Vec<String>,
    /// Whether the plan chose the device.
    chosen: bool,
}

/// Whether a finding is shown at its own place in the text, not at that of a param.
fn in_place(source: &Source, finding: &Finding) -> bool {
    source.written(&finding.pointer) != Written::Interpolated
}

/// Where a value of the recipe came from.
fn origin(source: &Source, pointer: &str, fallback: Origin) -> Origin {
    match source.written(pointer) {
        Written::Line(line) => Origin::Recipe(line),
        Written::Interpolated => Origin::Params,
        Written::Set => Origin::Set,
        Written::Absent => fallback,
    }
}

/// Notes where every value without values inside came from.
fn option_origins(
    source: &Source,
    draft: &Draft<'_>,
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
                .any(|pointer| draft.filled.iter().any(|filled| filled == pointer));
        let written = match filled {
            true => Origin::Default,
            false => origin(
                source,
                &format!("{}{pointer}", draft.pointer),
                Origin::Default,
            ),
        };
        origins.insert(format!("/options{pointer}"), written);
    }
    for (step, child) in children {
        option_origins(source, draft, child, &format!("{pointer}/{step}"), origins);
    }
}

/// The seed of a stage that names none: the first 8 bytes of a hash, below 2^53 so that JSON readers keep it.
pub(super) fn derived_seed(recipe_seed: u64, stage: &str) -> u64 {
    let hash = blake3::hash(format!("{recipe_seed}/{stage}").as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes) & ((1 << 53) - 1)
}
