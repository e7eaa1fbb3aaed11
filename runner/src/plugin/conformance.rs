//! Is a plugin as `retort_plugin.h` says? Everything a program can find out about a file, in worker processes.
//!
//! In: a plugin's file and, for its stages, a plan that uses them. Out: one [`Outcome`] per thing looked at. A stage is
//! run up to four times: to its end, again with the same seed, up to a request to stop, and on from there; and in parts,
//! if its kind is divisible. Whatever the plugin does in its process is an outcome, never the end of the examination. Deliberately absent: how outcomes are
//! shown; what a backend's operations should give (the engine's, reached through the stage kind `conformance`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use retort_abi::{
    Description, Device, Failure, FailureCode, Input, Part, Severity, StageJob, StageResult, ffi,
};
use retort_checkpoint::regular;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::artifact;
use crate::frame::{Answer, Call, FromWorker, Points, Progress, Task, ToWorker};
use crate::plan::{DescribeError, Plan, PlannedStage};
use crate::plugin::{self, trust};
use crate::schema;
use crate::store::ArtifactRecord;
use crate::worker::death::Death;
use crate::worker::process::{Exit, Worker, WorkerEvent};

/// Kind of stage by which a backend of the engine examines its own operations.
const OPERATIONS: &str = "conformance";
/// How long one call that is no run may take, where a run may take longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a plugin is listened to after a run: whoever goes on by itself is heard in this time.
const LINGER: Duration = Duration::from_millis(300);
/// Symbols that linkers add.
const OF_THE_LINKER: [&str; 5] = ["_init", "_fini", "__bss_start", "_edata", "_end"];

/// Something that was looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What: `exports`, `same seed`.
    pub check: &'static str,
    /// Of what: a stage, a kind of stage, a device; empty: the plugin.
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
    /// It could not be found out.
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

/// What a check finds: what to say of it, or why it fails, or why it says nothing.
type Found = Result<String, Bad>;

enum Bad {
    Failed(String),
    Skipped(String),
}

fn failed<T>(text: impl Into<String>) -> Result<T, Bad> {
    Err(Bad::Failed(text.into()))
}

fn skipped<T>(text: impl Into<String>) -> Result<T, Bad> {
    Err(Bad::Skipped(text.into()))
}

/// What an examination goes by.
#[derive(Debug, Clone)]
pub struct Terms {
    /// How long a stage may take to stop.
    pub grace: Duration,
    /// How long a stage may run.
    pub limit: Duration,
    /// Results of the published code, which the networks of a backend are compared with.
    pub golden: Option<PathBuf>,
}

/// An examination under way.
pub struct Examination<'a> {
    runtime: &'a Runtime,
    path: PathBuf,
    terms: Terms,
    outcomes: Vec<Outcome>,
    tell: &'a dyn Fn(&Outcome),
}

impl<'a> Examination<'a> {
    /// Of the plugin in this file. `tell` hears each outcome when it is known.
    pub fn new(
        runtime: &'a Runtime,
        path: &Path,
        terms: Terms,
        tell: &'a dyn Fn(&Outcome),
    ) -> Self {
        Self {
            runtime,
            path: path.to_owned(),
            terms,
            outcomes: Vec::new(),
            tell,
        }
    }

    /// Everything found.
    pub fn outcomes(self) -> Vec<Outcome> {
        self.outcomes
    }

    fn check(
        &mut self,
        check: &'static str,
        subject: &str,
        look: impl FnOnce(&Self) -> Found,
    ) -> bool {
        let begun = Instant::now();
        let (verdict, detail) = match look(self) {
            Ok(detail) => (Verdict::Passed, detail),
            Err(Bad::Failed(detail)) => (Verdict::Failed, detail),
            Err(Bad::Skipped(detail)) => (Verdict::Skipped, detail),
        };
        let outcome = Outcome {
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

    /// The file itself, and what the plugin says when it is asked; its description, if there is one.
    pub fn examine_plugin(&mut self) -> Option<Description> {
        self.check("trusted", "", |exam| {
            trust::check_owner(&exam.path).map_err(|error| Bad::Failed(error.to_string()))?;
            Ok("nobody else can change it".into())
        });
        self.check("exports", "", |exam| {
            let exports = exports(&exam.path).map_err(Bad::Failed)?;
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
                let Some(dir) = &exam.terms.golden else {
                    return skipped(
                        "--golden DIR compares them, with tests/golden of the repository",
                    );
                };
                let cases = exam.compare(name, dtype, json!({"golden": dir}))?;
                Ok(format!("{cases} results as the published code has them"))
            });
        }
    }

    fn ask(&self, call: Call) -> Result<Answer, Bad> {
        let task = Task {
            plugin: self.path.clone(),
            hash: None,
            call,
        };
        let asked = self.runtime.block_on(crate::worker::process::ask(
            task,
            PATIENCE.min(self.terms.limit),
        ));
        asked.map_err(|error| Bad::Failed(error.to_string()))
    }

    fn describe(&self) -> Result<Description, Bad> {
        match self.ask(Call::Describe)? {
            Answer::Description(description) => Ok(*description),
            _ => failed("the worker answered another question"),
        }
    }

    fn probe(&self) -> Result<Vec<Device>, Bad> {
        match self.ask(Call::Probe)? {
            Answer::Devices(devices) => Ok(devices),
            _ => failed("the worker answered another question"),
        }
    }

    /// Gives options of every wrong sort to a kind of stage: each is refused in words, or taken; nothing crashes.
    fn provoke(&self, about: &Description, kind: &str, schema: &Value) -> Found {
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
                part: None,
            })
            .collect();
        let answers = match self.ask(Call::Provoke(jobs.clone())) {
            Ok(Answer::Provoked(answers)) => answers,
            Ok(_) => return failed("the worker answered another question"),
            Err(Bad::Failed(how)) => {
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

    /// The first of the jobs with which a worker does not come to its end.
    fn first_fatal(&self, jobs: &[StageJob]) -> usize {
        // Of so many jobs a worker survives all, of so many it does not.
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

    /// The engine's own examination of a backend: how many comparisons passed, if all did.
    fn compare(&self, device: &str, dtype: &str, options: Value) -> Result<u64, Bad> {
        let place = tempfile::tempdir().map_err(|error| Bad::Failed(error.to_string()))?;
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

    /// Says that there is no recipe to run stages of.
    pub fn skip_stages(&mut self, description: &Description) {
        for kind in description
            .stages
            .iter()
            .filter(|kind| kind.kind != OPERATIONS)
        {
            self.check("runs", &kind.kind, |_| {
                skipped("without a recipe that has a stage of this kind: --recipe FILE")
            });
        }
    }

    /// Runs the stages of a plan; looks closely at those of this plugin.
    pub fn examine_stages(&mut self, description: &Description, plan: &Plan) {
        let mut made: BTreeMap<String, Input> = BTreeMap::new();
        let Ok(place) = tempfile::tempdir() else {
            return;
        };
        for (index, stage) in plan.stages.iter().enumerate() {
            let missing = stage
                .references
                .iter()
                .find(|reference| !made.contains_key(&reference.stage));
            if let Some(reference) = missing {
                self.check("runs", &stage.name, |_| {
                    skipped(format!("`{}` did not succeed", reference.stage))
                });
                continue;
            }
            let inputs: BTreeMap<String, Input> = stage
                .references
                .iter()
                .map(|reference| (reference.stage.clone(), made[&reference.stage].clone()))
                .collect();
            let place = place.path().join(index.to_string());
            let tested = StageUnderTest {
                plan,
                stage,
                inputs,
                place,
            };
            let kind = description
                .stages
                .iter()
                .find(|kind| kind.kind == stage.kind);
            // Processes that work together would wait for each other here, where one works at a time.
            let divisible = kind.is_some_and(|kind| kind.divisible && !kind.together);
            if let Some(output) = self.examine_stage(&tested, divisible) {
                made.insert(stage.name.clone(), output);
            }
        }
        for kind in &description.stages {
            let of_plan = plan.stages.iter();
            let mut used = of_plan.filter(|stage| stage.kind == kind.kind && self.is_own(stage));
            if used.next().is_none() && kind.kind != OPERATIONS {
                self.check("runs", &kind.kind, |_| {
                    skipped("no stage of the recipe is of this kind")
                });
            }
        }
    }

    fn is_own(&self, stage: &PlannedStage) -> bool {
        stage.plugin.path == self.path
    }

    /// One stage; its output, if it made one.
    fn examine_stage(&mut self, tested: &StageUnderTest<'_>, divisible: bool) -> Option<Input> {
        let name = &tested.stage.name;
        let mut first = None;
        let outside = Surroundings::of(tested);
        self.check("runs", name, |exam| {
            let seen = exam.run(tested, "first", Stopping::Never, LINGER)?;
            let (record, _) = seen.result(&tested.stage.output_kind)?;
            let said = format!(
                "{} of {} in {:.1} s",
                record.kind,
                talk_size(record.size),
                seen.took.as_secs_f64()
            );
            first = Some((record, seen));
            Ok(said)
        });
        let (record, seen) = first?;
        let output = Input {
            kind: record.kind.clone(),
            path: tested.place.join("first/artifacts").join(&record.hash),
            hash: record.hash.clone(),
        };
        if !self.is_own(tested.stage) {
            return Some(output);
        }
        self.check("progress", name, |_| seen.progress_is_monotonic());
        self.check("steps", name, |_| seen.steps_are_monotonic());
        self.check("stays inside", name, |_| {
            strays(&tested.place.join("first"))?;
            outside.compare(tested)
        });
        self.check("ends", name, |_| {
            if seen.late > 0 {
                return failed("it goes on calling the host after `run` has returned");
            }
            let now = artifact::contents(&output.path);
            match now.is_ok_and(|now| now.hash == output.hash) {
                true => Ok("nothing comes after `run`".into()),
                false => failed("what it made was changed after it had been committed"),
            }
        });
        let exact = tested.stage.device == "cpu";
        self.check("same seed", name, |exam| {
            if !exact {
                return skipped("only promised on a CPU");
            }
            let again = exam.run(tested, "second", Stopping::Never, Duration::ZERO)?;
            same(&record, &again.result(&tested.stage.output_kind)?.0)
        });
        let mut stopped = false;
        self.check("stops", name, |exam| {
            let seen = exam.run(tested, "third", Stopping::AtFirstSign, Duration::ZERO)?;
            stopped = true;
            seen.stopped(exam.terms.grace)
        });
        if stopped {
            self.check("resumes", name, |exam| {
                let resumed = exam.run(tested, "third", Stopping::Never, Duration::ZERO)?;
                let (record_again, _) = resumed.result(&tested.stage.output_kind)?;
                match exact {
                    true => same(&record, &record_again),
                    false => Ok("to an end".into()),
                }
            });
        }
        if divisible {
            self.check("divides", name, |exam| {
                for index in 0..PARTS {
                    exam.run_part(tested, "fourth", Part { index, of: PARTS })?;
                }
                let whole = exam.run(tested, "fourth", Stopping::Never, Duration::ZERO)?;
                let (record_again, _) = whole.result(&tested.stage.output_kind)?;
                match exact {
                    true => same(&record, &record_again),
                    false => Ok("to an end".into()),
                }
            });
        }
        Some(output)
    }

    /// A part of a stage, after which nothing but its work directory is left.
    fn run_part(&self, tested: &StageUnderTest<'_>, take: &str, part: Part) -> Result<(), Bad> {
        let place = tested.place.join(take);
        let job = StageJob {
            part: Some(part),
            ..tested.job(&place)
        };
        let plugin = &tested.stage.plugin.path;
        self.attempt(plugin, job, &place, Stopping::Never, Duration::ZERO)?
            .answered()
            .map(drop)
    }

    fn run(
        &self,
        tested: &StageUnderTest<'_>,
        take: &str,
        stopping: Stopping,
        linger: Duration,
    ) -> Result<Seen, Bad> {
        let place = tested.place.join(take);
        let job = tested.job(&place);
        self.attempt(&tested.stage.plugin.path, job, &place, stopping, linger)
    }

    /// Runs a job in a worker and takes down all it does.
    fn attempt(
        &self,
        plugin: &Path,
        job: StageJob,
        place: &Path,
        stopping: Stopping,
        linger: Duration,
    ) -> Result<Seen, Bad> {
        let temporary = place.join(TEMPORARY);
        for dir in job.work_dir.iter().chain([&temporary]) {
            fs::create_dir_all(dir).map_err(|error| Bad::Failed(error.to_string()))?;
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
        let watched = watch(task, &temporary, stopping, &self.terms);
        self.runtime
            .block_on(watched)
            .map_err(|error| Bad::Failed(format!("a worker could not be started: {error}")))
    }
}

/// The parts in which a stage is done whose kind is divisible.
const PARTS: usize = 2;

/// Where an attempt has its temporary files, in its directory.
const TEMPORARY: &str = "temporary";

/// A stage to be examined, its inputs and a directory for all that comes of it.
struct StageUnderTest<'a> {
    plan: &'a Plan,
    stage: &'a PlannedStage,
    inputs: BTreeMap<String, Input>,
    place: PathBuf,
}

impl StageUnderTest<'_> {
    /// The stage's job in a directory of its own.
    fn job(&self, place: &Path) -> StageJob {
        StageJob {
            work_dir: Some(place.join("work")),
            inputs: self.inputs.clone(),
            ..self.plan.job(self.stage, 1)
        }
    }
}

/// When a stage is asked to stop.
#[derive(Clone, Copy, PartialEq)]
enum Stopping {
    Never,
    /// As soon as it is seen to work.
    AtFirstSign,
}

/// What was seen of an attempt.
#[derive(Debug, Default)]
struct Seen {
    answer: Option<Result<Answer, Failure>>,
    not_loaded: Option<String>,
    artifacts: BTreeMap<u64, ArtifactRecord>,
    progress: Vec<Progress>,
    points: Vec<Points>,
    exit: Option<Exit>,
    last_words: Vec<String>,
    /// Calls after `run` had returned.
    late: u64,
    /// Ended by us: it ran longer than this.
    too_long: Option<Duration>,
    /// From the request to stop to the end.
    stopping: Option<Duration>,
    took: Duration,
}

async fn watch(
    task: Task,
    temporary: &Path,
    stopping: Stopping,
    &Terms { limit, grace, .. }: &Terms,
) -> std::io::Result<Seen> {
    let begun = Instant::now();
    let mut worker = Worker::spawn(1, &[("TMPDIR", temporary.into())])?;
    let sent = worker.send(&ToWorker::Start(Box::new(task))).await;
    sent.map_err(std::io::Error::other)?;
    let mut seen = Seen::default();
    let mut asked: Option<Instant> = None;
    let mut allowed = limit;
    let mut deadline = tokio::time::Instant::now() + limit;
    loop {
        let heard = tokio::select! {
            heard = worker.next() => heard,
            () = tokio::time::sleep_until(deadline), if seen.too_long.is_none() => {
                seen.too_long = Some(allowed);
                worker.signal(libc::SIGKILL);
                continue;
            }
        };
        let mut sign = false;
        match heard {
            WorkerEvent::Frame(FromWorker::Answer(answer)) => seen.answer = Some(Ok(answer)),
            WorkerEvent::Frame(FromWorker::Failed(failure)) => seen.answer = Some(Err(failure)),
            WorkerEvent::Frame(FromWorker::NotLoaded { message, .. }) => {
                seen.not_loaded = Some(message)
            }
            WorkerEvent::Frame(FromWorker::Artifact { id, record }) => {
                seen.artifacts.insert(id, *record);
            }
            WorkerEvent::Frame(FromWorker::Progress(progress)) => {
                sign = true;
                seen.progress.push(progress);
            }
            WorkerEvent::Frame(FromWorker::Metrics(points)) => {
                sign = true;
                seen.points.extend(points);
            }
            WorkerEvent::Frame(FromWorker::Late { calls }) => seen.late = calls,
            WorkerEvent::Frame(FromWorker::Loaded | FromWorker::Log(_))
            | WorkerEvent::Remote(_) => {}
            WorkerEvent::Malformed(error) => seen.last_words.push(error.to_string()),
            WorkerEvent::Line(_, line) => {
                seen.last_words.push(line);
                let surplus = seen.last_words.len().saturating_sub(8);
                seen.last_words.drain(..surplus);
            }
            WorkerEvent::Exited(exit) => {
                seen.exit = Some(exit);
                break;
            }
        }
        if sign && stopping == Stopping::AtFirstSign && asked.is_none() {
            asked = Some(Instant::now());
            (allowed, deadline) = (grace, tokio::time::Instant::now() + grace);
            // A message without paths can be written.
            let _ = worker.send(&ToWorker::CancelAtCheckpoint).await;
        }
    }
    seen.stopping = asked.map(|asked| asked.elapsed());
    seen.took = begun.elapsed();
    Ok(seen)
}

impl Seen {
    /// The output and the summary of a stage that succeeded.
    fn result(&self, kind: &str) -> Result<(ArtifactRecord, Value), Bad> {
        let result = self.answered()?;
        match self.artifacts.get(&result.output) {
            Some(record) if record.kind == kind => Ok((record.clone(), result.summary.clone())),
            Some(record) => failed(format!(
                "its output is a `{}`, its description promises a `{kind}`",
                record.kind
            )),
            None => failed("its output was not committed"),
        }
    }

    /// The answer of a job that succeeded.
    fn answered(&self) -> Result<&StageResult, Bad> {
        if let Some(message) = &self.not_loaded {
            return failed(message);
        }
        if let Some(limit) = self.too_long {
            return failed(format!("it ran longer than {} s", limit.as_secs()));
        }
        match &self.answer {
            Some(Ok(Answer::Result(result))) => Ok(result),
            Some(Ok(_)) => failed("the worker answered another question"),
            Some(Err(failure)) => failed(format!("it failed: {}", failure.message)),
            None => failed(self.died()),
        }
    }

    fn died(&self) -> String {
        let Some(exit) = self.exit else {
            return "it ended its process".into();
        };
        let last_words = self.last_words.iter().map(String::as_str);
        let death = Death::new(exit.status, last_words, false);
        let written = match self.last_words.last() {
            Some(line) => format!("; the last line it wrote: {}", line.trim()),
            None => String::new(),
        };
        format!("{}: {}{written}", death.reason(), death.message())
    }

    fn progress_is_monotonic(&self) -> Found {
        for pair in self.progress.windows(2) {
            if pair[0].unit == pair[1].unit && pair[1].done < pair[0].done {
                return failed(format!(
                    "it fell from {} to {} {}",
                    pair[0].done, pair[1].done, pair[1].unit
                ));
            }
        }
        if let Some(beyond) = self
            .progress
            .iter()
            .find(|p| p.total > 0 && p.done > p.total)
        {
            return failed(format!(
                "{} of {} {}",
                beyond.done, beyond.total, beyond.unit
            ));
        }
        match self.progress.last() {
            Some(last) => Ok(format!("{} of {} {}", last.done, last.total, last.unit)),
            None => skipped("it told none"),
        }
    }

    fn steps_are_monotonic(&self) -> Found {
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        let mut count = 0;
        for points in &self.points {
            for &step in &points.steps {
                let before = last.insert(&points.series, step);
                if let Some(before) = before.filter(|&before| before > step) {
                    return failed(format!(
                        "`{}` went from step {before} back to {step}",
                        points.series
                    ));
                }
                count += 1;
            }
        }
        match last.is_empty() {
            true => skipped("it has no metrics"),
            false => Ok(format!("{count} points in {} series", last.len())),
        }
    }

    /// Whether it stopped when it was asked to.
    fn stopped(&self, grace: Duration) -> Found {
        if self.too_long.is_some() && self.stopping.is_some() {
            return failed(format!("it did not stop within {} s", grace.as_secs_f64()));
        }
        match (&self.answer, self.stopping) {
            (Some(Ok(_)), _) => skipped("it was done before it could be stopped"),
            (Some(Err(failure)), Some(time)) if failure.code == FailureCode::Cancelled => {
                Ok(format!("within {:.1} s", time.as_secs_f64()))
            }
            (Some(Err(failure)), _) => failed(format!(
                "it failed instead, without the code `cancelled`: {}",
                failure.message
            )),
            (None, _) => failed(self.died()),
        }
    }
}

fn same(first: &ArtifactRecord, second: &ArtifactRecord) -> Found {
    if first.hash == second.hash {
        return Ok("the same bytes".into());
    }
    let differs = first.files.iter().find(|file| !second.files.contains(file));
    match differs {
        Some(file) => failed(format!("{} has other bytes", file.path)),
        None => failed("there are more files"),
    }
}

/// Whether an attempt has left anything in its directory but what it may.
fn strays(place: &Path) -> Result<(), Bad> {
    let names = |dir: &Path| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let own = ["artifacts", "staging", "work", TEMPORARY].map(|name| place.join(name));
    if let Some(path) = names(place).iter().find(|path| !own.contains(path)) {
        return failed(format!("it wrote {}", path.display()));
    }
    match names(&place.join(TEMPORARY)).first() {
        Some(path) => failed(format!(
            "it left {} in the directory for temporary files",
            path.file_name().unwrap_or_default().display()
        )),
        None => Ok(()),
    }
}

/// What a stage must not touch: the recipe's directory, the working directory and its inputs.
struct Surroundings(BTreeMap<PathBuf, (u64, Option<SystemTime>)>);

impl Surroundings {
    fn of(tested: &StageUnderTest<'_>) -> Self {
        let mut files = BTreeMap::new();
        let mut dirs = vec![tested.plan.base_dir.clone()];
        dirs.extend(std::env::current_dir());
        for dir in dirs {
            list(&dir, 3, &mut files);
        }
        Self(files)
    }

    fn compare(&self, tested: &StageUnderTest<'_>) -> Found {
        let now = Self::of(tested).0;
        let changed = now
            .iter()
            .find(|(path, state)| self.0.get(*path) != Some(*state));
        let gone = self.0.keys().find(|path| !now.contains_key(*path));
        if let Some(path) = changed.map(|(path, _)| path).or(gone) {
            return failed(format!("it changed {}", path.display()));
        }
        for input in tested.inputs.values() {
            let found = artifact::contents(&input.path);
            if found.is_ok_and(|found| found.hash != input.hash) {
                return failed(format!("it changed its input {}", input.path.display()));
            }
        }
        Ok(format!("{} files around it are as they were", now.len()))
    }
}

/// Files below a directory, a few levels deep; stores and build outputs are other programs' business.
fn list(dir: &Path, depth: usize, files: &mut BTreeMap<PathBuf, (u64, Option<SystemTime>)>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(found) = fs::symlink_metadata(&path) else {
            continue;
        };
        if !found.is_dir() {
            files.insert(path, (found.len(), found.modified().ok()));
        } else if depth > 0 && name != "target" && !name.to_string_lossy().starts_with('.') {
            list(&path, depth - 1, files);
        }
    }
}

fn usable(devices: &[Device]) -> Vec<&str> {
    devices
        .iter()
        .filter(|device| device.unusable.is_none())
        .map(|device| device.name.as_str())
        .collect()
}

fn talk_size(bytes: u64) -> String {
    crate::table::bytes(bytes)
}

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

/// What is wrong with a description, beyond being readable.
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
        // What is missing is the recipe's to give; what is there comes from the defaults.
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

/// Options of every wrong sort: none at all, unknown ones, and each known one with values of other types and sizes.
fn provocations(schema: &Value) -> Vec<Value> {
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

/// Whether a pointer names a value of the options, or one that could be there.
fn names_a_place(pointer: &str, options: &Value) -> bool {
    let parent = pointer.rsplit_once('/').map(|(parent, _)| parent);
    pointer.is_empty()
        || options.pointer(pointer).is_some()
        || parent.is_some_and(|parent| options.pointer(parent).is_some())
}

/// Options for people, cut.
fn shown(options: &Value) -> String {
    let text = options.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl From<DescribeError> for Bad {
    fn from(error: DescribeError) -> Self {
        Self::Failed(error.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(series: &str, steps: &[u64]) -> Points {
        Points {
            series: series.into(),
            steps: steps.to_vec(),
            values: vec![0.0; steps.len()],
            at: vec![0; steps.len()],
        }
    }

    fn progress(done: u64) -> Progress {
        Progress {
            done,
            total: 9,
            unit: "steps".into(),
        }
    }

    #[test]
    fn order_is_judged_within_a_series() {
        let seen = |points: Vec<Points>| Seen {
            points,
            ..Seen::default()
        };
        let good = seen(vec![
            points("a", &[3]),
            points("b", &[1, 2]),
            points("a", &[3, 4]),
        ]);
        assert!(good.steps_are_monotonic().is_ok());
        for bad in [
            vec![points("a", &[3, 2])],
            vec![points("a", &[3]), points("b", &[1]), points("a", &[2])],
        ] {
            assert!(matches!(
                seen(bad).steps_are_monotonic(),
                Err(Bad::Failed(_))
            ));
        }
    }

    #[test]
    fn progress_neither_falls_nor_exceeds_its_total() {
        let seen = |done: &[u64]| Seen {
            progress: done.iter().map(|&done| progress(done)).collect(),
            ..Seen::default()
        };
        assert!(seen(&[1, 1, 9]).progress_is_monotonic().is_ok());
        assert!(matches!(
            seen(&[2, 1]).progress_is_monotonic(),
            Err(Bad::Failed(_))
        ));
        assert!(matches!(
            seen(&[1, 10]).progress_is_monotonic(),
            Err(Bad::Failed(_))
        ));
        assert!(matches!(
            seen(&[]).progress_is_monotonic(),
            Err(Bad::Skipped(_))
        ));
    }

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
