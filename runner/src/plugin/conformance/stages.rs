//! Examines the stages of a recipe: each is run to its end, run again, stopped, resumed and divided.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_abi::{Description, Input, Part, StageJob};

use super::observations::{Observations, Stopping, same};
use super::side_effects::{WatchedFiles, strays};
use super::{CheckFailure, ConformanceRun, LINGER, OPERATIONS, failed, skipped};
use crate::artifact;
use crate::plan::{Plan, PlannedStage};

/// The number of parts for divisible kinds.
const PARTS: usize = 2;

impl ConformanceRun<'_> {
    /// Reports that there is no recipe for running stages.
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

    /// Runs the stages of a plan, and examines those of this plugin.
    pub fn check_stages(&mut self, description: &Description, plan: &Plan) {
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
            // Here one process runs at a time, so processes that work together would wait forever.
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

    /// Examines one stage; returns its output, if it made one.
    fn examine_stage(&mut self, tested: &StageUnderTest<'_>, divisible: bool) -> Option<Input> {
        let name = &tested.stage.name;
        let mut first = None;
        let outside = WatchedFiles::of(&tested.plan.base_dir);
        self.check("runs", name, |exam| {
            let seen = exam.run(tested, "first", Stopping::Never, LINGER)?;
            let (record, _) = seen.result(&tested.stage.output_kind)?;
            let said = format!(
                "{} of {} in {:.1} s",
                record.kind,
                size_text(record.size),
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
            outside.compare(&tested.plan.base_dir, &tested.inputs)
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
            seen.stopped(exam.options.grace)
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

    /// Runs a part of a stage, of which only the work directory is kept.
    fn run_part(
        &self,
        tested: &StageUnderTest<'_>,
        take: &str,
        part: Part,
    ) -> Result<(), CheckFailure> {
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
    ) -> Result<Observations, CheckFailure> {
        let place = tested.place.join(take);
        let job = tested.job(&place);
        self.attempt(&tested.stage.plugin.path, job, &place, stopping, linger)
    }
}

/// A stage under test, its inputs and a directory for its files.
pub(super) struct StageUnderTest<'a> {
    pub(super) plan: &'a Plan,
    pub(super) stage: &'a PlannedStage,
    pub(super) inputs: BTreeMap<String, Input>,
    pub(super) place: PathBuf,
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

fn size_text(bytes: u64) -> String {
    crate::table::bytes(bytes)
}
