//! The forecast of a sweep, before anything runs: the stages it would run, and those that points share.

use std::collections::HashSet;

use retort_abi::StageJob;

use crate::cli::execution::is_left_out;
use crate::cli::sweep::recipe::SweepRecipe;
use crate::cli::{Context, Error, output};
use crate::diagnostic::{Finding, Report, Severity};
use crate::executor::ExecutorError;
use crate::plan::decision::{KnownResults, Role};
use crate::plan::{self, Plan, PlannedStage, Sources, StageSources};
use crate::plugin::Plugins;

/// The forecast of a sweep.
#[derive(Debug, Default)]
pub struct SweepForecast {
    /// The forecast of each point, in order.
    pub points: Vec<PointForecast>,
    /// Warnings of all points, each once.
    warnings: Vec<Finding>,
    /// Notes on the plans' own choices, each once.
    notes: Vec<String>,
    /// Digests that a point makes.
    made: HashSet<String>,
    /// Jobs that plugins still have to check.
    unchecked: Option<Plan>,
    /// The stages before each of these, in its own point.
    sources: Vec<StageSources>,
    /// Bytes of these jobs, as JSON.
    held: usize,
    /// Hashes of the jobs already checked or queued.
    checked: HashSet<blake3::Hash>,
}

/// What a point would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PointForecast {
    /// Stages that it is the first point to run.
    pub run: usize,
    /// Stages that an earlier point runs.
    pub shared: usize,
    /// Stages whose results are in the store.
    pub stored: usize,
}

impl PointForecast {
    /// Whether all its results are in the store.
    pub fn is_done(self) -> bool {
        self.run == 0 && self.shared == 0
    }
}

/// Jobs that plugins check per call.
const MOST_JOBS: usize = 1000;
/// The most bytes of jobs, as JSON, that are checked together with the stages before them; further ones are checked alone.
const MOST_BYTES: usize = 16 << 20;

impl SweepForecast {
    /// Plans all points in order, and has plugins check their jobs.
    pub fn of(
        source: &SweepRecipe,
        points: &[Vec<String>],
        plugins: &mut Plugins<'_>,
        known: &mut dyn KnownResults,
    ) -> Result<Self, Error> {
        let mut forecast = Self::default();
        for (number, settings) in (1..).zip(points) {
            forecast
                .add(source, settings, plugins, known)
                .map_err(|error| of_point(error, number, points))?;
        }
        forecast.validate(source, points, plugins)?;
        Ok(forecast)
    }

    fn add(
        &mut self,
        source: &SweepRecipe,
        settings: &[String],
        plugins: &mut Plugins<'_>,
        known: &mut dyn KnownResults,
    ) -> Result<(), Error> {
        let (plan, roles) = source.plan(settings, plugins)?;
        let wanted = |finding: &Finding| !is_left_out(finding, &plan, &roles);
        let missing: Vec<Finding> = plan.missing_files().into_iter().filter(wanted).collect();
        if !missing.is_empty() {
            return Err(source.report(missing).into());
        }
        for finding in plan.warnings.iter().filter(|finding| wanted(finding)) {
            self.warn(finding.clone());
        }
        for note in &plan.notes {
            if !self.notes.contains(note) {
                self.notes.push(note.clone());
            }
        }
        let (ahead, to_run) = self.look_ahead(&plan, &roles, known)?;
        self.points.push(ahead);
        let (unknown, sources) = self.unknown(&plan, to_run);
        if !unknown.is_empty() {
            let all = self.unchecked.get_or_insert_with(|| Plan {
                stages: Vec::new(),
                ..plan
            });
            all.stages.extend(unknown);
            self.sources.extend(sources);
        }
        Ok(())
    }

    /// Keeps a warning, once.
    fn warn(&mut self, finding: Finding) {
        let same = |known: &Finding| known.message == finding.message;
        if !self.warnings.iter().any(same) {
            self.warnings.push(finding);
        }
    }

    /// Those stages whose jobs no earlier point has, and the stages before each: the same options may be right at one point,
    /// and wrong at another, whose earlier stages differ.
    fn unknown<'p>(
        &mut self,
        plan: &'p Plan,
        to_run: Vec<&'p PlannedStage>,
    ) -> (Vec<PlannedStage>, Vec<StageSources>) {
        let mut all = Sources::new(&plan.stages);
        let mut unknown = (Vec::new(), Vec::new());
        for stage in to_run {
            let mut job = StageJob {
                sources: all.of(stage),
                ..plan.job(stage, 1)
            };
            let mut text = serde_json::to_string(&job).unwrap_or_default();
            if self.held + text.len() > MOST_BYTES {
                job.sources.clear();
                text = serde_json::to_string(&job).unwrap_or_default();
            }
            if self.checked.insert(blake3::hash(text.as_bytes())) {
                self.held += text.len();
                unknown.0.push(stage.clone());
                unknown.1.push(job.sources);
            }
        }
        unknown
    }

    /// Decides each stage of a point; returns the stages that it runs. A missing result is represented by the digest of the
    /// stage that makes it.
    fn look_ahead<'p>(
        &mut self,
        plan: &'p Plan,
        roles: &[Role],
        known: &mut dyn KnownResults,
    ) -> Result<(PointForecast, Vec<&'p PlannedStage>), Error> {
        let mut ahead = PointForecast::default();
        let mut outputs = plan.given_hashes();
        let mut to_come: HashSet<&str> = HashSet::new();
        let mut to_run = Vec::new();
        for (stage, role) in plan.stages.iter().zip(roles) {
            if *role == Role::Skipped {
                continue;
            }
            let files = known.file_hashes(stage).map_err(Error::of_history)?;
            let Some(digest) = plan::digest(stage, &outputs, &files) else {
                continue;
            };
            let inputs = stage.references.iter();
            let is_open = inputs
                .filter(|reference| !reference.prepared)
                .map(|reference| reference.stage.as_str())
                .any(|input| to_come.contains(input));
            let found = match is_open {
                true => None,
                false => known.find_success(&digest.hex).map_err(Error::of_history)?,
            };
            if let Some(hash) = found {
                ahead.stored += 1;
                outputs.insert(stage.name.clone(), hash);
                continue;
            }
            if *role == Role::Needed {
                let stage = stage.name.clone();
                return Err(ExecutorError::Missing { stage }.into());
            }
            match self.made.insert(digest.hex.clone()) {
                true => {
                    ahead.run += 1;
                    to_run.push(stage);
                }
                false => ahead.shared += 1,
            }
            to_come.insert(&stage.name);
            outputs.insert(stage.name.clone(), digest.hex);
        }
        Ok((ahead, to_run))
    }

    /// The plugins' own checks, once for every distinct stage.
    fn validate(
        &mut self,
        source: &SweepRecipe,
        points: &[Vec<String>],
        plugins: &mut Plugins<'_>,
    ) -> Result<(), Error> {
        let Some(all) = self.unchecked.take() else {
            return Ok(());
        };
        let is_error = |finding: &Finding| finding.severity == Severity::Error;
        let sources = std::mem::take(&mut self.sources);
        let parts = all.stages.chunks(MOST_JOBS);
        for (stages, sources) in parts.zip(sources.chunks(MOST_JOBS)) {
            let part = Plan {
                stages: stages.to_vec(),
                ..all.clone()
            };
            let found = part.validate_with(sources.to_vec(), plugins);
            if !found.iter().any(is_error) {
                found.into_iter().for_each(|finding| self.warn(finding));
                continue;
            }
            // Only the point's own plan knows the position in the text.
            for (number, settings) in (1..).zip(points) {
                let (plan, roles) = source.plan(settings, plugins)?;
                let wanted = |finding: &Finding| !is_left_out(finding, &plan, &roles);
                let found: Vec<Finding> =
                    plan.validate(plugins).into_iter().filter(wanted).collect();
                if found.iter().any(is_error) {
                    let error = source.report(found).into();
                    return Err(of_point(error, number, points));
                }
            }
            return Err(source.report(found).into());
        }
        Ok(())
    }

    /// The messages before the sweep begins.
    pub fn show_warnings(&self, source: &SweepRecipe, context: &Context) {
        if context.quiet {
            return;
        }
        if !self.warnings.is_empty() {
            let report = source.report(self.warnings.clone());
            output::say(&report.render(context.color_stderr()));
        }
        self.notes.iter().for_each(|note| output::say(note));
    }

    /// `24 runs, 31 stages to run, 89 shared`, of these points.
    pub fn sum(&self, of: impl Fn(usize) -> bool) -> String {
        let chosen = self.points.iter().enumerate();
        let chosen: Vec<&PointForecast> = chosen
            .filter(|(place, _)| of(*place))
            .map(|(_, ahead)| ahead)
            .collect();
        let total =
            |count: fn(&PointForecast) -> usize| chosen.iter().map(|ahead| count(ahead)).sum();
        let run: usize = total(|ahead| ahead.run);
        let shared: usize = total(|ahead| ahead.shared);
        let stored: usize = total(|ahead| ahead.stored);
        let there = match stored {
            0 => String::new(),
            stored => format!(" ({stored} of them are in the store)"),
        };
        format!(
            "{}, {} to run, {} shared{there}",
            output::count(chosen.len(), "run"),
            output::count(run, "stage"),
            shared + stored
        )
    }
}

impl SweepRecipe {
    /// Findings with their text.
    pub(super) fn report(&self, findings: Vec<Finding>) -> Report {
        Report {
            path: self.shown_path.clone(),
            text: self.text.clone(),
            findings,
        }
    }
}

/// An error in a recipe, with the point that it is in.
fn of_point(mut error: Error, number: usize, points: &[Vec<String>]) -> Error {
    if error.report.is_some() {
        let values = points[number - 1].join(", ");
        let whole = format!("this is point {number} of {} ({values})", points.len());
        error.message = match error.message.is_empty() {
            true => whole,
            false => format!("{}; {whole}", error.message),
        };
    }
    error
}
