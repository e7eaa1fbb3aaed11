//! The part of a stage resolved from its own text: plugin, kind, options, and their references.

use std::path::Path;
use std::rc::Rc;

use retort_abi::StageKind;
use serde_json::Value;

use super::Planner;
use crate::diagnostic::{Cause, Finding};
use crate::input::FileKind;
use crate::plan::{Build, FileOption, Reference};
use crate::recipe::RecipeStage;
use crate::schema::{self, OptionTarget};
use crate::yaml::{EntryPart, escape};

/// A stage before its references are resolved.
pub(super) struct UnresolvedStage<'a> {
    pub(super) stage: &'a RecipeStage,
    /// `/stages/<name>`
    pub(super) pointer: String,
    pub(super) plugin: Option<Rc<Build>>,
    /// Options with defaults; as written if they are invalid.
    pub(super) options: Value,
    /// Pointers of defaults.
    pub(super) filled: Vec<String>,
    pub(super) references: Vec<Reference>,
    pub(super) files: Vec<FileOption>,
    /// Pointers of options that change no result.
    pub(super) free: Vec<String>,
}

impl UnresolvedStage<'_> {
    /// Its kind, as its plugin describes it.
    pub(super) fn kind(&self) -> Option<&StageKind> {
        let kind = self.stage.kind.as_ref()?;
        self.plugin
            .as_ref()?
            .description
            .stages
            .iter()
            .find(|known| known.kind == *kind)
    }
}

impl<'a> Planner<'a> {
    /// Resolves the stage from its own text.
    pub(super) fn unresolved(&mut self, stage: &'a RecipeStage) -> UnresolvedStage<'a> {
        let pointer = format!("/stages/{}", escape(&stage.name));
        let mut unresolved = UnresolvedStage {
            stage,
            plugin: self.plugin_of(stage, &pointer),
            pointer,
            options: Value::Object(stage.options.clone()),
            filled: Vec::new(),
            references: Vec::new(),
            files: Vec::new(),
            free: Vec::new(),
        };
        let (Some(build), Some(kind)) = (unresolved.plugin.clone(), &stage.kind) else {
            return unresolved;
        };
        let mut kinds = build.description.stages.iter();
        let Some(known) = kinds.find(|known| known.kind == *kind) else {
            self.report_kind(&unresolved, &build, kind);
            return unresolved;
        };
        if let Some(least) = stage.min_workers {
            self.check_least(&unresolved, least, known);
        }
        if stage.retries.is_some() && !known.together {
            self.report_alone(&unresolved, "retries", known);
        }
        let mut options = Value::Object(stage.options.clone());
        let source = self.source;
        let place = unresolved.pointer.clone();
        schema::take_texts(&known.schema, &mut options, |pointer| {
            source.as_written(&format!("{place}{pointer}"))
        });
        if self.check_options(&unresolved, &build, known, &options) {
            unresolved.filled = schema::settle(&known.schema, &mut options);
        }
        self.refer(&mut unresolved, known, &mut options);
        unresolved.options = options;
        unresolved
    }

    /// Reports that the plugin has no such kind.
    fn report_kind(&mut self, unresolved: &UnresolvedStage<'_>, build: &Build, kind: &str) {
        let kinds = build.description.stages.iter();
        let message = format!(
            "stage `{}`: plugin `{}` has no stage kind `{kind}`",
            unresolved.stage.name, build.identity.name
        );
        let finding = Finding::error(format!("{}/kind", unresolved.pointer), message);
        let hint = schema::suggest(kind, kinds.map(|known| known.kind.as_str()));
        self.report(Finding { hint, ..finding }, EntryPart::Value);
    }

    /// Reports that workers cannot share a stage of this kind.
    pub(super) fn report_workers(
        &mut self,
        unresolved: &UnresolvedStage<'_>,
        build: &Build,
        known: &StageKind,
    ) {
        let (stage, kind, plugin) = (&unresolved.stage.name, &known.kind, &build.identity.name);
        let message = match known.together {
            true => format!(
                "stage `{stage}`: plugin `{plugin}` cannot sum gradients over the workers of a `{kind}`"
            ),
            false => {
                format!("stage `{stage}`: the work of a `{kind}` cannot be divided among workers")
            }
        };
        let stages = build.description.stages.iter();
        let divisible: Vec<&str> = stages
            .filter(|known| known.divisible)
            .map(|known| known.kind.as_str())
            .collect();
        let hint = match divisible.as_slice() {
            _ if known.together => {
                "use a plugin that can: `backend: libtorch`, or candle on GPUs; or omit `workers`"
                    .into()
            }
            [] => format!("plugin `{plugin}` has no kind that can be"),
            kinds => format!("kinds that can be: `{}`", kinds.join("`, `")),
        };
        let finding = Finding::error(format!("{}/workers", unresolved.pointer), message);
        self.report(finding.hint(hint), EntryPart::Value);
    }

    /// Reports a meaningless minimum number of workers.
    fn check_least(&mut self, unresolved: &UnresolvedStage<'_>, least: usize, known: &StageKind) {
        let (stage, workers) = (
            &unresolved.stage.name,
            unresolved.stage.workers.unwrap_or(1),
        );
        if !known.together {
            return self.report_alone(unresolved, "min_workers", known);
        }
        if least <= workers {
            return;
        }
        let message =
            format!("stage `{stage}`: `min_workers: {least}` is more than its {workers} workers");
        let hint = format!("write at most {workers}, or raise `workers`");
        let finding = Finding::error(format!("{}/min_workers", unresolved.pointer), message);
        self.report(finding.hint(hint), EntryPart::Value);
    }

    /// Reports a key that is only for workers that depend on each other.
    fn report_alone(&mut self, unresolved: &UnresolvedStage<'_>, key: &str, known: &StageKind) {
        let (stage, kind) = (&unresolved.stage.name, &known.kind);
        let message = format!("stage `{stage}`: workers of a `{kind}` do not need each other");
        let finding = Finding::error(format!("{}/{key}", unresolved.pointer), message);
        let hint = format!("omit `{key}`: it is for trainings");
        self.report(finding.hint(hint), EntryPart::Value);
    }

    /// Checks options against the kind's schema, and reports errors.
    fn check_options(
        &mut self,
        unresolved: &UnresolvedStage<'_>,
        build: &Build,
        known: &StageKind,
        options: &Value,
    ) -> bool {
        let violations: Vec<_> = build
            .checker(known)
            .check(options, "option")
            .into_iter()
            // Failed interpolations have been reported.
            .filter(|violation| {
                let pointer = format!("{}{}", unresolved.pointer, violation.pointer);
                !self
                    .findings
                    .iter()
                    .any(|finding| finding.pointer == pointer)
            })
            .collect();
        let stage = &unresolved.stage.name;
        for violation in &violations {
            let pointer = format!("{}{}", unresolved.pointer, violation.pointer);
            let message = match violation.message.strip_prefix("unknown option") {
                Some(rest) => format!("stage `{stage}`: unknown option{rest} of `{}`", known.kind),
                None => format!("stage `{stage}`: {}", violation.message),
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
        violations.is_empty()
    }

    /// Collects the stages and files that options name, and expands paths in the home directory.
    fn refer(
        &mut self,
        unresolved: &mut UnresolvedStage<'_>,
        known: &StageKind,
        options: &mut Value,
    ) {
        for annotation in schema::annotations(&known.schema, options) {
            let pointer = annotation.pointer;
            if annotation.target == OptionTarget::Nothing {
                unresolved.free.push(pointer);
                continue;
            }
            let Some(text) = options.pointer(&pointer).and_then(Value::as_str) else {
                self.warn_of_null(unresolved, &pointer, &annotation.target);
                continue;
            };
            match annotation.target {
                OptionTarget::Artifact(kinds) => {
                    unresolved.references.push(Reference {
                        stage: text.to_owned(),
                        pointer,
                        kinds,
                        prepared: false,
                    });
                }
                target => {
                    let text = self.at_home(text);
                    unresolved.files.push(FileOption {
                        path: self.source.base_dir.join(&text),
                        pointer: pointer.clone(),
                        kind: match target {
                            OptionTarget::Dir => FileKind::Dir,
                            OptionTarget::Images => FileKind::Images,
                            OptionTarget::Weights => FileKind::Weights,
                            _ => FileKind::File,
                        },
                    });
                    if let Some(option) = options.pointer_mut(&pointer) {
                        *option = Value::String(text);
                    }
                }
            }
        }
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

    /// `csv: ~` may be meant as the home directory, but it is null in YAML.
    fn warn_of_null(
        &mut self,
        unresolved: &UnresolvedStage<'_>,
        pointer: &str,
        target: &OptionTarget,
    ) {
        let at = format!("{}{pointer}", unresolved.pointer);
        if matches!(target, OptionTarget::Artifact(_)) || self.source.written_null(&at) != Some("~")
        {
            return;
        }
        let message = format!(
            "stage `{}`: `{}` is `~`, which is YAML for nothing",
            unresolved.stage.name,
            pointer[1..].replace('/', ".")
        );
        let finding = Finding::warning(at, message)
            .hint("paths in the home directory begin with `~/`; if null is meant, remove the key");
        self.report(finding, EntryPart::Value);
    }

    /// The plugin that runs a stage; problems are reported once.
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
                self.report(finding.hint(hint), EntryPart::Key);
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
                self.report(finding, EntryPart::Value);
                None
            }
        };
        self.known.insert(name.clone(), answer.clone());
        answer
    }
}
