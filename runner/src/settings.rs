//! Settings for running stages: `retort.toml` beside the recipe or above it, the user's own, the environment, flags.
//!
//! In: files, and values read by the command line. Out: an executor, and a [`Profile`] for a kind of stage, with the origin
//! of each value. Precedence, highest first: flag, environment, project file, user's file, default; within each, a setting
//! for a kind of stage overrides one for all. Settings do not affect results, so they are not part of a digest.
//!
//! A file contains commands (`prologue`, `sbatch`), so a file that somebody else could change is refused, like a plugin. A
//! project's file may have come from somebody else: its commands run only after the user has trusted its current content
//! ([`trust_file`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_checkpoint::regular;
use serde::{Deserialize, Serialize};

use crate::diagnostic::{Finding, Report};
use crate::duration;
use crate::trust::{self, TrustError};

mod trusted;

pub use trusted::trust_file;

/// The name of the project's file, and of the user's.
pub const FILE: &str = "retort.toml";
/// Bytes of the longest file that is read.
const LONGEST_FILE: u64 = 64 << 10;

/// What runs stages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Executor {
    /// Processes of this machine.
    #[default]
    Local,
    /// Jobs of a Slurm cluster.
    Slurm,
    /// The processes started by `torchrun`, including this one.
    Torchrun,
}

impl Executor {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Slurm => "slurm",
            Self::Torchrun => "torchrun",
        }
    }
}

/// Slurm settings for a kind of stage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Partition.
    pub partition: Option<String>,
    /// Account.
    pub account: Option<String>,
    /// Quality of service.
    pub qos: Option<String>,
    /// Time limit, as Slurm writes it.
    pub time: Option<String>,
    /// Generic resources: `gpu:1`.
    pub gres: Option<String>,
    /// Processors of a worker.
    pub cpus: Option<usize>,
    /// Memory of a worker, as Slurm writes it.
    pub memory: Option<String>,
    /// Maximum concurrent elements of an array.
    pub array_limit: Option<usize>,
    /// Further options of `sbatch`.
    pub sbatch: Vec<String>,
    /// Lines of bash that run before the worker.
    pub prologue: String,
    /// How often a failed element is restarted.
    pub requeue: u32,
    /// How long before the time limit a worker gets a signal.
    pub signal: Duration,
    /// How often Slurm is asked.
    pub poll: Duration,
    /// How long a training that can continue with fewer workers waits for all of them to restart.
    pub shrink_after: Duration,
}

/// The values of a profile from one origin.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Partial {
    partition: Option<String>,
    account: Option<String>,
    qos: Option<String>,
    time: Option<Text>,
    gres: Option<String>,
    cpus: Option<usize>,
    memory: Option<Text>,
    #[serde(alias = "array_limit")]
    array_limit: Option<usize>,
    sbatch: Option<Vec<String>>,
    prologue: Option<String>,
    requeue: Option<u32>,
    signal: Option<String>,
    poll: Option<String>,
    #[serde(alias = "shrink_after")]
    shrink_after: Option<String>,
    /// By kind of stage; only at the top.
    #[serde(default)]
    kinds: BTreeMap<String, Partial>,
}

/// A text, or a number, which stands for its digits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Text {
    Text(String),
    Number(u64),
}

impl Text {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
        }
    }
}

/// A file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    executor: Option<Executor>,
    #[serde(default)]
    slurm: Partial,
}

/// What one origin says.
#[derive(Debug)]
struct Layer {
    origin: String,
    /// Whether its commands may run.
    is_trusted: bool,
    executor: Option<Executor>,
    slurm: Partial,
}

/// The settings of all origins.
#[derive(Debug, Default)]
pub struct Settings {
    /// Strongest first.
    layers: Vec<Layer>,
}

/// Input from the command line.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--executor`.
    pub executor: Option<Executor>,
    /// `--slurm`, each `KEY=VALUE` or `KIND.KEY=VALUE`.
    pub slurm: Vec<String>,
    /// `RETORT_EXECUTOR`.
    pub executor_variable: Option<String>,
    /// `RETORT_SLURM`: the same as `--slurm`, separated by white space.
    pub slurm_variable: Option<String>,
    /// The directory of the user's file.
    pub user_dir: Option<PathBuf>,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SettingsError {
    /// What is wrong, and where.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
    /// The same with the faulty line of the file, if known.
    pub report: Option<Box<Report>>,
}

impl SettingsError {
    /// The same in the form of a finding.
    pub fn into_report(self, recipe: &Path) -> Report {
        match self.report {
            Some(report) => *report,
            None => Report {
                path: recipe.to_owned(),
                text: String::new(),
                findings: vec![Finding {
                    hint: self.hint,
                    ..Finding::error("", self.message)
                }],
            },
        }
    }
}

fn wrong(message: impl Into<String>) -> SettingsError {
    SettingsError {
        message: message.into(),
        hint: None,
        report: None,
    }
}

/// An error in a file's TOML.
fn not_toml(path: &Path, text: String, error: &toml::de::Error) -> SettingsError {
    let shown = path.display();
    let finding = Finding::error("", error.message());
    let Some(bytes) = error.span() else {
        return wrong(format!("{shown}: {}", error.to_string().trim_end()));
    };
    let finding = finding.at_bytes(&text, bytes);
    let place = finding.position.map_or_else(String::new, |at| {
        format!(" line {}, column {}:", at.line, at.column)
    });
    SettingsError {
        report: Some(Box::new(Report {
            path: path.to_owned(),
            text,
            findings: vec![finding],
        })),
        ..wrong(format!("{shown}:{place} {}", error.message()))
    }
}

const DEFAULT_REQUEUE: u32 = 3;
const DEFAULT_SIGNAL: &str = "120s";
const DEFAULT_POLL: &str = "10s";
const DEFAULT_SHRINK_AFTER: &str = "10m";
/// Options of `sbatch` that retort sets itself.
const OWN: [&str; 15] = [
    "--array",
    "-a",
    "--output",
    "-o",
    "--error",
    "-e",
    "--job-name",
    "-J",
    "--chdir",
    "-D",
    "--wrap",
    "--signal",
    "--parsable",
    "--wait",
    "-W",
];
/// Options of `sbatch` that would submit a job to a cluster other than the one that retort queries.
const OTHER_CLUSTER: [&str; 2] = ["--clusters", "-M"];

impl Settings {
    /// Reads all settings for a recipe in `dir`.
    ///
    /// # Errors
    /// A file cannot be read, is invalid, or could be changed by others.
    pub fn read(dir: &Path, given: &Overrides) -> Result<Self, SettingsError> {
        let mut layers = vec![Layer {
            origin: "flag".into(),
            is_trusted: true,
            executor: given.executor,
            slurm: partial(given.slurm.iter().map(String::as_str), "--slurm")?,
        }];
        let executor = given
            .executor_variable
            .as_deref()
            .filter(|name| !name.is_empty());
        let executor = executor.map(|name| match name {
            "local" => Ok(Executor::Local),
            "slurm" => Ok(Executor::Slurm),
            "torchrun" => Ok(Executor::Torchrun),
            other => Err(wrong(format!(
                "RETORT_EXECUTOR is `{other}`; it can be `local`, `slurm` or `torchrun`"
            ))),
        });
        let words = given.slurm_variable.as_deref().unwrap_or_default();
        layers.push(Layer {
            origin: "environment".into(),
            is_trusted: true,
            executor: executor.transpose()?,
            slurm: partial(words.split_whitespace(), "RETORT_SLURM")?,
        });
        let project = project_file(dir);
        let user = given
            .user_dir
            .iter()
            .map(|dir| dir.join(FILE))
            .find(is_there);
        if user != project
            && let Some(path) = project
        {
            let (mut layer, hash) = file(&path)?;
            if layer.slurm.runs_something() {
                layer.is_trusted = trusted::is_trusted(&path, &hash, given.user_dir.as_deref())?;
            }
            layers.push(layer);
        }
        if let Some(path) = user {
            layers.push(file(&path)?.0);
        }
        Ok(Self { layers })
    }

    /// The executor, and its origin.
    pub fn executor(&self) -> (Executor, &str) {
        let set = self
            .layers
            .iter()
            .find_map(|layer| Some((layer.executor?, layer.origin.as_str())));
        set.unwrap_or((Executor::default(), "default"))
    }

    /// Slurm settings for a kind of stage.
    ///
    /// # Errors
    /// A value is invalid.
    pub fn profile(&self, kind: &str) -> Result<Profile, SettingsError> {
        let time = |name, default, pick: fn(&Partial) -> Option<&String>| {
            let found = self.pick(kind, pick);
            let (text, origin) = found.map_or((default, "default"), |(text, origin)| {
                (text.as_str(), origin)
            });
            match duration::parse(text) {
                Ok(time) if time >= Duration::from_millis(100) => Ok(time),
                _ => Err(wrong(format!(
                    "{origin}: slurm.{name} is `{text}`; expected a time such as `60s`"
                ))),
            }
        };
        let text = |pick: fn(&Partial) -> Option<&String>| {
            self.pick(kind, pick).map(|(text, _)| text.clone())
        };
        let written = |pick: fn(&Partial) -> Option<&Text>| {
            self.pick(kind, pick).map(|(text, _)| text.text())
        };
        let sbatch = self.pick(kind, |partial| partial.sbatch.as_ref());
        if let Some((options, origin)) = sbatch {
            for option in options {
                check_option(option, origin)?;
            }
        }
        let signal = time("signal", DEFAULT_SIGNAL, |partial| partial.signal.as_ref())?;
        if let Some((limit, origin)) = self.pick(kind, |partial| partial.time.as_ref())
            && seconds(&limit.text()).is_some_and(|limit| limit <= signal.as_secs())
        {
            return Err(wrong(format!(
                "{origin}: slurm.time is `{}`, not more than slurm.signal ({} s): a job would be asked to stop as soon as it starts",
                limit.text(),
                signal.as_secs()
            )));
        }
        self.check_trusted(kind, "sbatch", |partial| partial.sbatch.is_some())?;
        self.check_trusted(kind, "prologue", |partial| partial.prologue.is_some())?;
        Ok(Profile {
            partition: text(|partial| partial.partition.as_ref()),
            account: text(|partial| partial.account.as_ref()),
            qos: text(|partial| partial.qos.as_ref()),
            time: written(|partial| partial.time.as_ref()),
            gres: text(|partial| partial.gres.as_ref()),
            cpus: self.number(kind, "cpus", |partial| partial.cpus)?,
            memory: written(|partial| partial.memory.as_ref()),
            array_limit: self.number(kind, "array-limit", |partial| partial.array_limit)?,
            sbatch: sbatch
                .map(|(options, _)| options.clone())
                .unwrap_or_default(),
            prologue: text(|partial| partial.prologue.as_ref()).unwrap_or_default(),
            requeue: self
                .pick(kind, |partial| partial.requeue.as_ref())
                .map_or(DEFAULT_REQUEUE, |(count, _)| *count),
            signal,
            poll: time("poll", DEFAULT_POLL, |partial| partial.poll.as_ref())?,
            shrink_after: time("shrink-after", DEFAULT_SHRINK_AFTER, |partial| {
                partial.shrink_after.as_ref()
            })?,
        })
    }

    /// Refuses commands from an untrusted project file.
    fn check_trusted(
        &self,
        kind: &str,
        name: &str,
        says: impl Fn(&Partial) -> bool,
    ) -> Result<(), SettingsError> {
        let says =
            |layer: &&Layer| layer.slurm.kinds.get(kind).is_some_and(&says) || says(&layer.slurm);
        match self.layers.iter().find(says) {
            Some(layer) if !layer.is_trusted => Err(SettingsError {
                message: format!(
                    "{}: slurm.{name} runs in your jobs, and you have not trusted this file as it is now",
                    layer.origin
                ),
                hint: Some(format!(
                    "read {}, then run `retort trust` in its directory; or set slurm.{name} yourself, in your own {FILE} or with --slurm",
                    layer.origin
                )),
                report: None,
            }),
            _ => Ok(()),
        }
    }

    /// Project files whose commands do not run because the user has not trusted them.
    pub fn untrusted(&self) -> impl Iterator<Item = &str> {
        let layers = self.layers.iter().filter(|layer| !layer.is_trusted);
        layers.map(|layer| layer.origin.as_str())
    }

    /// Whether jobs for a kind of stage request GPUs. Untrusted files are read for this too, but nothing in them is run.
    pub fn asks_for_gpus(&self, kind: &str) -> bool {
        let gres = self.pick(kind, |partial| partial.gres.as_ref());
        let sbatch = self.pick(kind, |partial| partial.sbatch.as_ref());
        let asks = |option: &String| {
            let name = option.split(['=', ' ']).next().unwrap_or_default();
            let names_gpus = name.starts_with("--gpus") || name.starts_with("-G");
            let names_resources = name == "--gres" || name.starts_with("--tres");
            names_gpus || (names_resources && has_gpus(option))
        };
        gres.is_some_and(|(gres, _)| has_gpus(gres))
            || sbatch.is_some_and(|(options, _)| options.iter().any(asks))
    }

    /// The value with the highest precedence, and its origin.
    fn pick<'a, T>(
        &'a self,
        kind: &str,
        pick: impl Fn(&'a Partial) -> Option<T>,
    ) -> Option<(T, &'a str)> {
        self.layers.iter().find_map(|layer| {
            let of_kind = layer.slurm.kinds.get(kind).and_then(&pick);
            let value = of_kind.or_else(|| pick(&layer.slurm))?;
            Some((value, layer.origin.as_str()))
        })
    }

    /// A number above zero.
    fn number(
        &self,
        kind: &str,
        name: &str,
        pick: fn(&Partial) -> Option<usize>,
    ) -> Result<Option<usize>, SettingsError> {
        match self.pick(kind, pick) {
            Some((0, origin)) => Err(wrong(format!("{origin}: slurm.{name} is 0"))),
            found => Ok(found.map(|(number, _)| number)),
        }
    }

    /// The effective settings, for people: name, value, origin. Slurm's defaults are left out if another executor is set. For
    /// a kind of stage only its own settings are listed; the rest is as for all.
    pub fn list(&self) -> Vec<(String, String, String)> {
        let (executor, origin) = self.executor();
        let mut list = vec![(
            "executor".to_owned(),
            executor.name().to_owned(),
            origin.to_owned(),
        )];
        for (key, default) in DEFAULTS {
            let found = self.pick(EVERY_KIND, |partial| partial.value(key));
            if found.is_none() && executor != Executor::Slurm {
                continue;
            }
            let (value, origin) = found.unwrap_or((default.to_owned(), "default"));
            list.push((format!("slurm.{key}"), value, origin.to_owned()));
        }
        let kinds = self.layers.iter().flat_map(|layer| &layer.slurm.kinds);
        let mut named: BTreeMap<&str, Vec<&Partial>> = BTreeMap::new();
        for (kind, partial) in kinds {
            named.entry(kind).or_default().push(partial);
        }
        for (kind, partials) in named {
            for (key, _) in DEFAULTS {
                let is_named = |partial: &&Partial| partial.value(key).is_some();
                if partials.iter().any(is_named)
                    && let Some((value, origin)) = self.pick(kind, |partial| partial.value(key))
                {
                    let name = format!("slurm.kinds.{kind}.{key}");
                    list.push((name, value, origin.to_owned()));
                }
            }
        }
        list
    }
}

/// A placeholder that is not the name of any kind of stage.
const EVERY_KIND: &str = "";

/// The keys of a profile, and their defaults, for people.
const DEFAULTS: [(&str, &str); 14] = [
    ("partition", "the cluster's"),
    ("account", "the cluster's"),
    ("qos", "the cluster's"),
    ("time", "the cluster's"),
    ("gres", "none"),
    ("cpus", "the stage's threads, else 1"),
    ("memory", "the cluster's"),
    ("array-limit", "no limit"),
    ("sbatch", "none"),
    ("prologue", "none"),
    ("requeue", "3"),
    ("signal", DEFAULT_SIGNAL),
    ("poll", DEFAULT_POLL),
    ("shrink-after", DEFAULT_SHRINK_AFTER),
];

/// The seconds of a time limit as Slurm writes it: minutes, `m:s`, `h:m:s`, `d-h`, `d-h:m`, `d-h:m:s`. None for a word, such
/// as `UNLIMITED`, and for what only Slurm can judge.
fn seconds(limit: &str) -> Option<u64> {
    let (days, clock) = match limit.trim().split_once('-') {
        Some((days, clock)) => (Some(days.parse::<u64>().ok()?), clock),
        None => (None, limit.trim()),
    };
    let parts: Vec<u64> = clock
        .split(':')
        .map(|part| part.parse().ok())
        .collect::<Option<_>>()?;
    let (hours, minutes, seconds) = match (days, parts.as_slice()) {
        (Some(_), &[hours]) => (hours, 0, 0),
        (Some(_), &[hours, minutes]) => (hours, minutes, 0),
        (None, &[minutes]) => (0, minutes, 0),
        (None, &[minutes, seconds]) => (0, minutes, seconds),
        (_, &[hours, minutes, seconds]) => (hours, minutes, seconds),
        _ => return None,
    };
    let hours = days.unwrap_or(0).checked_mul(24)?.checked_add(hours)?;
    let minutes = hours.checked_mul(60)?.checked_add(minutes)?;
    // Slurm takes 0 for no limit.
    let all = minutes.checked_mul(60)?.checked_add(seconds)?;
    (all > 0).then_some(all)
}

/// Whether Slurm resources are GPUs, or shares of them.
fn has_gpus(resources: &str) -> bool {
    ["gpu", "shard", "mps"]
        .iter()
        .any(|name| resources.contains(name))
}

/// Refuses invalid or reserved options of `sbatch`.
fn check_option(option: &str, origin: &str) -> Result<(), SettingsError> {
    if !option.starts_with('-') || option.contains(['\n', '\0']) {
        return Err(wrong(format!(
            "{origin}: slurm.sbatch has `{option}`; expected an option such as `--constraint=a100`"
        )));
    }
    let name = option.split(['=', ' ']).next().unwrap_or_default();
    // `-Mother`, and abbreviations of a long name, are equivalent.
    let is = |own: &&str| match own.starts_with("--") {
        true => name.len() > 3 && own.starts_with(name),
        false => !name.starts_with("--") && name.starts_with(*own),
    };
    if OTHER_CLUSTER.iter().any(&is) {
        return Err(SettingsError {
            message: format!(
                "{origin}: slurm.sbatch has `{name}`, but jobs are looked for on this machine's cluster only"
            ),
            hint: Some("run retort on a machine that submits to the other cluster".to_owned()),
            report: None,
        });
    }
    match OWN.iter().any(is) {
        true => Err(wrong(format!(
            "{origin}: slurm.sbatch has `{name}`, which retort sets itself"
        ))),
        false => Ok(()),
    }
}

impl Partial {
    /// Whether it has commands.
    fn runs_something(&self) -> bool {
        let own = self.prologue.is_some() || self.sbatch.is_some();
        own || self.kinds.values().any(Self::runs_something)
    }

    /// Its value of a key, in a line.
    fn value(&self, key: &str) -> Option<String> {
        let number = |value: Option<usize>| value.map(|value| value.to_string());
        match key {
            "partition" => self.partition.clone(),
            "account" => self.account.clone(),
            "qos" => self.qos.clone(),
            "time" => self.time.as_ref().map(Text::text),
            "gres" => self.gres.clone(),
            "cpus" => number(self.cpus),
            "memory" => self.memory.as_ref().map(Text::text),
            "array-limit" => number(self.array_limit),
            "sbatch" => Some(self.sbatch.as_ref()?.join(" ")),
            "prologue" => Some(self.prologue.as_ref()?.trim().replace('\n', "; ")),
            "requeue" => Some(self.requeue?.to_string()),
            "signal" => self.signal.clone(),
            "poll" => self.poll.clone(),
            "shrink-after" => self.shrink_after.clone(),
            _ => None,
        }
    }
}

/// Of `KEY=VALUE` and `KIND.KEY=VALUE`.
fn partial<'a>(
    words: impl Iterator<Item = &'a str>,
    origin: &str,
) -> Result<Partial, SettingsError> {
    let mut all = toml::Table::new();
    for word in words {
        let Some((path, value)) = word.split_once('=') else {
            return Err(wrong(format!(
                "{origin}: `{word}` is not a setting; expected KEY=VALUE, as in partition=gpu"
            )));
        };
        let (table, key) = match path.split_once('.') {
            None => (&mut all, path),
            Some((kind, key)) => {
                let kinds = all
                    .entry("kinds")
                    .or_insert_with(|| toml::Table::new().into());
                let of_kind = kinds.as_table_mut().map(|kinds| {
                    kinds
                        .entry(kind)
                        .or_insert_with(|| toml::Table::new().into())
                });
                let Some(table) = of_kind.and_then(toml::Value::as_table_mut) else {
                    return Err(wrong(format!("{origin}: `{word}` is not a setting")));
                };
                (table, key)
            }
        };
        match key {
            "sbatch" => {
                let lines = table
                    .entry(key)
                    .or_insert_with(|| Vec::<toml::Value>::new().into());
                if let Some(lines) = lines.as_array_mut() {
                    lines.push(value.into());
                }
            }
            "cpus" | "array-limit" | "array_limit" | "requeue" => {
                let number: i64 = value.parse().map_err(|_| {
                    wrong(format!("{origin}: {path} is `{value}`; expected a number"))
                })?;
                table.insert(key.to_owned(), number.into());
            }
            _ => drop(table.insert(key.to_owned(), value.into())),
        }
    }
    let read: Result<Partial, _> = all.try_into();
    let read = read.map_err(|error| wrong(format!("{origin}: {}", error.to_string().trim())))?;
    checked(read, origin)
}

/// Kinds cannot be nested, and the second line of a value would be ignored.
fn checked(partial: Partial, origin: &str) -> Result<Partial, SettingsError> {
    for (kind, of_kind) in &partial.kinds {
        if !of_kind.kinds.is_empty() {
            return Err(wrong(format!(
                "{origin}: slurm.kinds.{kind} has kinds of its own"
            )));
        }
        if kind == EVERY_KIND {
            return Err(wrong(format!("{origin}: a kind of stage has no name")));
        }
    }
    for partial in partial.kinds.values().chain([&partial]) {
        for (key, _) in DEFAULTS {
            let value = partial.value(key).unwrap_or_default();
            if value.contains('\0') || (key != "prologue" && value.contains('\n')) {
                return Err(wrong(format!("{origin}: slurm.{key} is more than a line")));
            }
        }
    }
    Ok(partial)
}

/// A broken link does not count as a missing file.
fn is_there(path: &PathBuf) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}

/// The project's file for a recipe in `dir`: there, or in a directory above.
pub fn project_file(dir: &Path) -> Option<PathBuf> {
    // A bare `r.yaml` is in the working directory; an empty path has no parents.
    let dir = dir.join(".");
    let dir = std::path::absolute(&dir).unwrap_or(dir);
    dir.ancestors().map(|dir| dir.join(FILE)).find(is_there)
}

/// A file's settings, and its hash.
fn file(path: &Path) -> Result<(Layer, String), SettingsError> {
    let shown = path.display();
    trust::check_owner(path).map_err(|error| distrusted(path, error))?;
    let unread = |error| wrong(format!("cannot read {shown}: {error}"));
    let bytes = regular::read(path, LONGEST_FILE).map_err(unread)?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    let text = String::from_utf8(bytes).map_err(|error| unread(std::io::Error::other(error)))?;
    let document: Document = toml::from_str(&text).map_err(|error| not_toml(path, text, &error))?;
    let layer = Layer {
        executor: document.executor,
        slurm: checked(document.slurm, &shown.to_string())?,
        origin: shown.to_string(),
        is_trusted: true,
    };
    Ok((layer, hash))
}

fn distrusted(file: &Path, error: TrustError) -> SettingsError {
    let shown = file.display();
    match error {
        TrustError::Writable {
            path,
            problem,
            repair,
            ..
        } => SettingsError {
            message: format!(
                "{shown} is not used: {} {problem}, who could change what it runs",
                path.display()
            ),
            hint: Some(match problem.starts_with("belongs") {
                true => "move the recipe to where nobody else can put files above it".to_owned(),
                false => repair,
            }),
            report: None,
        },
        error => wrong(error.to_string()),
    }
}

#[cfg(test)]
mod tests;
