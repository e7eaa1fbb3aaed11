//! Tests whether a plugin conforms to `retort_plugin.h`, as far as a program can, in worker processes.
//!
//! In: a plugin's file and, for its stages, a plan that uses them. Out: one [`CheckOutcome`] per check. A stage is run up to
//! four times: to its end, again with the same seed, until a request to stop, and resumed from there; and in parts, if its
//! kind is divisible. Whatever the plugin does in its process is an outcome and never ends the run. Deliberately
//! absent: the presentation of outcomes, and reference values of backends (the engine's, reached through the stage kind
//! `conformance`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use retort_abi::{Description, Device, FailureCode, Severity, StageJob, ffi};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::frame::{Answer, Call, Task};
use crate::plan::DescribeError;
use crate::plugin;
use crate::schema;
use crate::trust;
use description::{OF_THE_LINKER, names_a_place, provocations, shown};
use observations::{Observations, Stopping, watch};

mod description;
mod observations;
mod side_effects;
mod stages;

pub use description::{exports, inconsistencies};

/// Kind of stage by which a backend of the engine examines its own operations.
const OPERATIONS: &str = "conformance";
/// Time limit of a call other than a run.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to listen for late calls after a run.
const LINGER: Duration = Duration::from_millis(300);
/// A check and its outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckOutcome {
    /// The check: `exports`, `same seed`.
    pub check: &'static str,
    /// Its subject: a stage, a kind of stage, a device; empty for the plugin.
    pub subject: String,
    /// How it went.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// How long it took.
    pub time: Duration,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As it has to be.
    Passed,
    /// Not as it has to be.
    Failed,
    /// The check was impossible.
    Skipped,
}

impl Verdict {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// A check's result: a detail, or why it failed or was skipped.
type CheckResult = Result<String, CheckFailure>;

enum CheckFailure {
    Failed(String),
    Skipped(String),
}

fn failed<T>(text: impl Into<String>) -> Result<T, CheckFailure> {
    Err(CheckFailure::Failed(text.into()))
}

fn skipped<T>(text: impl Into<String>) -> Result<T, CheckFailure> {
    Err(CheckFailure::Skipped(text.into()))
}

/// The parameters of a conformance run.
#[derive(Debug, Clone)]
pub struct ConformanceRunOptions {
    /// How long a stage may take to stop.
    pub grace: Duration,
    /// How long a stage may run.
    pub limit: Duration,
    /// Results of the published code, which the networks of a backend are compared with.
    pub golden: Option<PathBuf>,
}

/// A run of the checks against one plugin.
pub struct ConformanceRun<'a> {
    runtime: &'a Runtime,
    path: PathBuf,
    options: ConformanceRunOptions,
    outcomes: Vec<CheckOutcome>,
    tell: &'a dyn Fn(&CheckOutcome),
}

impl<'a> ConformanceRun<'a> {
    /// Examines the plugin in this file. `tell` gets each outcome as soon as it is known.
    pub fn new(
        runtime: &'a Runtime,
        path: &Path,
        options: ConformanceRunOptions,
        tell: &'a dyn Fn(&CheckOutcome),
    ) -> Self {
        Self {
            runtime,
            path: path.to_owned(),
            options,
            outcomes: Vec::new(),
            tell,
        }
    }

    /// Everything found.
    pub fn outcomes(self) -> Vec<CheckOutcome> {
        self.outcomes
    }

    fn check(
        &mut self,
        check: &'static str,
        subject: &str,
        look: impl FnOnce(&Self) -> CheckResult,
    ) -> bool {
        let begun = Instant::now();
        let (verdict, detail) = match look(self) {
            Ok(detail) => (Verdict::Passed, detail),
            Err(CheckFailure::Failed(detail)) => (Verdict::Failed, detail),
            Err(CheckFailure::Skipped(detail)) => (Verdict::Skipped, detail),
        };
        let outcome = CheckOutcome {
            check,
            subject: subject.to_owned(),
            verdict,
            detail,
            time: begun.elapsed(),
        };
        (self.tell)(&outcome);
        self.outcomes.push(outcome);
        verdict == Verdict::Passed
    }

    /// Checks the file and the plugin's answers; returns its description, if there is one.
    pub fn check_plugin(&mut self) -> Option<Description> {
        self.check("trusted", "", |exam| {
            trust::check_owner(&exam.path)
                .map_err(|error| CheckFailure::Failed(error.to_string()))?;
            Ok("nobody else can change it".into())
        });
        self.check("exports", "", |exam| {
            let exports = exports(&exam.path).map_err(CheckFailure::Failed)?;
            let others: Vec<&str> = exports
                .iter()
                .map(String::as_str)
                .filter(|name| *name != ffi::ENTRY && !OF_THE_LINKER.contains(name))
                .collect();
            if !exports.iter().any(|name| name == ffi::ENTRY) {
                return failed(format!("`{}` is not exported", ffi::ENTRY));
            }
            match others.as_slice() {
                [] => Ok(format!("`{}` and nothing else", ffi::ENTRY)),
                [one] => failed(format!(
                    "it exports `{one}` too, which can clash with a symbol of others"
                )),
                [first, ..] => failed(format!(
                    "it exports {} more symbols, such as `{first}`, which can clash with those of others",
                    others.len()
                )),
            }
        });
        let mut description = None;
        self.check("describes itself", "", |exam| {
            let first = exam.describe()?;
            description = Some(first.clone());
            if exam.describe()? != first {
                return failed("it describes itself differently when it is asked twice");
            }
            Ok(format!("{} {}, twice the same", first.name, first.version))
        });
        let description = description?;
        self.check("description", "", |exam| {
            let mut problems = inconsistencies(&description);
            let file = exam.path.file_name().unwrap_or_default();
            let expected = plugin::file_name(&description.name);
            let own = file.to_str().and_then(plugin::name_of);
            let found = own.is_some_and(|(name, _)| plugin::file_name(&name) == expected);
            if !found {
                problems.push(format!(
                    "it is not found by its name `{}`: the file has to be {expected}",
                    description.name
                ));
            }
            match problems.is_empty() {
                true => Ok(match description.stages.len() {
                    1 => "1 kind of stage".into(),
                    count => format!("{count} kinds of stage"),
                }),
                false => failed(problems.join("; ")),
            }
        });
        let mut devices = Vec::new();
        self.check("devices", "", |exam| {
            devices = exam.probe()?;
            let usable = usable(&devices);
            match usable.is_empty() {
                true => failed("none of its devices can be used"),
                false => Ok(usable.join(", ")),
            }
        });
        for kind in &description.stages {
            self.check("bad options", &kind.kind, |exam| {
                exam.provoke(&description, &kind.kind, &kind.schema)
            });
        }
        let mut kinds = description.stages.iter();
        if kinds.any(|kind| kind.kind == OPERATIONS) {
            self.examine_backend(&description, &devices);
        }
        Some(description)
    }

    /// What a backend computes: operations on each device in each dtype, networks on each device.
    fn examine_backend(&mut self, about: &Description, devices: &[Device]) {
        let listed = |kind: &&String| {
            let is_one = |device: &Device| device.name.split(':').next() == Some(kind.as_str());
            devices.iter().any(is_one)
        };
        let missing = about.devices.iter().filter(|kind| !listed(kind));
        let missing = missing.map(|kind| Device {
            unusable: Some("`probe` lists no such device".into()),
            ..Device::named(kind)
        });
        let all: Vec<Device> = devices.iter().cloned().chain(missing).collect();
        for Device { name, unusable, .. } in &all {
            for dtype in &about.dtypes {
                self.check("operations", &format!("{name} {dtype}"), |exam| {
                    unusable.as_ref().map_or(Ok(()), skipped)?;
                    let cases = exam.compare(name, dtype, json!({}))?;
                    Ok(format!("{cases} comparisons with reference values"))
                });
            }
            // In the engine's own precision, whatever the dtype.
            let dtype = about.dtypes.first().map_or("f32", String::as_str);
            self.check("networks", name, |exam| {
                unusable.as_ref().map_or(Ok(()), skipped)?;
                let Some(dir) = &exam.options.golden else {
                    return skipped(
                        "--golden DIR compares them, with tests/golden of the repository",
                    );
                };
                let cases = exam.compare(name, dtype, json!({"golden": dir}))?;
                Ok(format!("{cases} results as the published code has them"))
            });
        }
    }

    fn ask(&self, call: Call) -> Result<Answer, CheckFailure> {
        let task = Task {
            plugin: self.path.clone(),
            hash: None,
            call,
        };
        let asked = self.runtime.block_on(crate::worker::process::ask(
            task,
            PATIENCE.min(self.options.limit),
        ));
        asked.map_err(|error| CheckFailure::Failed(error.to_string()))
    }

    fn describe(&self) -> Result<Description, CheckFailure> {
        match self.ask(Call::Describe)? {
            Answer::Description(description) => Ok(*description),
            _ => failed("the worker's answer does not match"),
        }
    }

    fn probe(&self) -> Result<Vec<Device>, CheckFailure> {
        match self.ask(Call::Probe)? {
            Answer::Devices(devices) => Ok(devices),
            _ => failed("the worker's answer does not match"),
        }
    }

    /// Gives wrong options of every sort to a kind of stage: each must be refused with a message, or accepted, without a
    /// crash.
    fn provoke(&self, about: &Description, kind: &str, schema: &Value) -> CheckResult {
        let provocations = provocations(schema);
        let jobs: Vec<StageJob> = provocations
            .iter()
            .map(|options| StageJob {
                stage: "provoked".into(),
                kind: kind.to_owned(),
                options: options.clone(),
                seed: 1,
                device: about.devices.first().cloned().unwrap_or_default(),
                dtype: about.dtypes.first().cloned().unwrap_or_default(),
                threads: 1,
                base_dir: PathBuf::from("/nonexistent"),
                work_dir: None,
                inputs: BTreeMap::new(),
                sources: BTreeMap::new(),
                prepared: BTreeMap::new(),
                part: None,
            })
            .collect();
        let answers = match self.ask(Call::Provoke(jobs.clone())) {
            Ok(Answer::Provoked(answers)) => answers,
            Ok(_) => return failed("the worker's answer does not match"),
            Err(CheckFailure::Failed(how)) => {
                let options = shown(&provocations[self.first_fatal(&jobs)]);
                return failed(format!("the options {options}: {how}"));
            }
            Err(skipped) => return Err(skipped),
        };
        let (mut by_schema, mut by_plugin) = (0, 0);
        for (options, answer) in provocations.iter().zip(answers) {
            by_schema += usize::from(!schema::check(schema, options, "option").is_empty());
            let (pointers, refused) = match answer {
                Ok(findings) => {
                    let refused = findings.iter().any(|f| f.severity == Severity::Error);
                    (findings.into_iter().map(|f| f.pointer).collect(), refused)
                }
                Err(failure) => (failure.pointer.into_iter().collect::<Vec<_>>(), true),
            };
            by_plugin += usize::from(refused);
            if let Some(pointer) = pointers
                .iter()
                .find(|pointer| !names_a_place(pointer, options))
            {
                return failed(format!(
                    "the options {}: a finding points to `{pointer}`, which is no place in them",
                    shown(options)
                ));
            }
        }
        Ok(format!(
            "{} tried; the schema refuses {by_schema}, the plugin {by_plugin}",
            provocations.len()
        ))
    }

    /// The first job that ends a worker.
    fn first_fatal(&self, jobs: &[StageJob]) -> usize {
        // Bounds of a binary search: a worker survives this many jobs, but not that many.
        let (mut good, mut bad) = (0, jobs.len());
        while bad - good > 1 {
            let middle = usize::midpoint(good, bad);
            match self.ask(Call::Provoke(jobs[..middle].to_vec())) {
                Ok(_) => good = middle,
                Err(_) => bad = middle,
            }
        }
        bad - 1
    }

    /// Runs the engine's own conformance tests of a backend; returns how many comparisons passed, if all did.
    fn compare(&self, device: &str, dtype: &str, options: Value) -> Result<u64, CheckFailure> {
        let place = tempfile::tempdir().map_err(|error| CheckFailure::Failed(error.to_string()))?;
        let job = StageJob {
            stage: "operations".into(),
            kind: OPERATIONS.into(),
            options,
            seed: 1,
            device: device.into(),
            dtype: dtype.into(),
            threads: 1,
            base_dir: place.path().to_owned(),
            work_dir: Some(place.path().join("work")),
            inputs: BTreeMap::new(),
            sources: BTreeMap::new(),
            prepared: BTreeMap::new(),
            part: None,
        };
        let seen = self.attempt(
            &self.path,
            job,
            place.path(),
            Stopping::Never,
            Duration::ZERO,
        )?;
        match &seen.answer {
            Some(Err(failure)) if failure.code == FailureCode::Unsupported => {
                return skipped(failure.message.clone());
            }
            _ => {}
        }
        let summary = seen.result(OPERATIONS)?.1;
        let count = |name: &str| summary[name].as_u64();
        match (count("cases"), count("failed")) {
            (Some(cases), Some(0)) => Ok(cases),
            (Some(cases), Some(wrong)) => {
                let names = summary["failures"].as_array().into_iter().flatten();
                let names: Vec<&str> = names.filter_map(Value::as_str).collect();
                let more = if wrong > names.len() as u64 {
                    "; ..."
                } else {
                    ""
                };
                failed(format!(
                    "{wrong} of {cases} comparisons failed: {}{more}",
                    names.join("; ")
                ))
            }
            _ => failed("its summary has no `cases` and `failed`"),
        }
    }

    /// Runs a job in a worker and records everything it does.
    fn attempt(
        &self,
        plugin: &Path,
        job: StageJob,
        place: &Path,
        stopping: Stopping,
        linger: Duration,
    ) -> Result<Observations, CheckFailure> {
        let temporary = place.join(TEMPORARY);
        for dir in job.work_dir.iter().chain([&temporary]) {
            fs::create_dir_all(dir).map_err(|error| CheckFailure::Failed(error.to_string()))?;
        }
        let task = Task {
            plugin: plugin.to_owned(),
            hash: None,
            call: Call::Run {
                job: Box::new(job),
                staging: place.join("staging"),
                artifacts: place.join("artifacts"),
                linger,
            },
        };
        let watched = watch(task, &temporary, stopping, &self.options);
        self.runtime.block_on(watched).map_err(|error| {
            CheckFailure::Failed(format!("a worker could not be started: {error}"))
        })
    }
}

/// The name of an attempt's directory for temporary files.
const TEMPORARY: &str = "temporary";

fn usable(devices: &[Device]) -> Vec<&str> {
    devices
        .iter()
        .filter(|device| device.unusable.is_none())
        .map(|device| device.name.as_str())
        .collect()
}

impl From<DescribeError> for CheckFailure {
    fn from(error: DescribeError) -> Self {
        Self::Failed(error.message)
    }
}
