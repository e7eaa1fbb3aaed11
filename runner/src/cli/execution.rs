//! Running a plan, for all commands: options, executor and results.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use retort_abi::FailureCode;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::artifact::Layout;
use crate::cli::known_results::{EmptyHistory, History};
use crate::cli::{Context, Error, Exit, output};
use crate::cluster::torchrun::{LaunchedRank, TrainingBoard};
use crate::diagnostic::{Finding, Report, Severity};
use crate::environment;
use crate::executor::Cluster;
use crate::executor::end::End;
use crate::executor::{
    self, DetachAnswer, DetachPolicy, ExecutorError, Options, Outcome, RecordedPlan, RunReport,
    StageReport,
};
use crate::plan::decision::{self, Action, KnownResults, Role};
use crate::plan::{Plan, PlannedStage};
use crate::plugin::Plugins;
use crate::progress::{self, ProgressReporter, Verbosity};
use crate::schema::MAX_PROCESSES;
use crate::settings::{Executor, Overrides, Settings};
use crate::store::{Access, ArtifactRow, HashTrust, RunId, RunState, Store, SweepPlace};
use crate::table::{Cell, CellStyle, Rows};

/// How stages are run: shared by `run` and `resume`.
#[derive(Debug, Clone, clap::Args)]
pub struct ExecutionArgs {
    /// How many stages may run at the same time; in a sweep, how many runs [default: 1; on a cluster 64].
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<NonZeroUsize>,
    /// What runs the stages: processes of this machine, jobs of a Slurm cluster that shares the store's directory, or, for
    /// trainings, the processes that `torchrun --no-python retort run ..` has started [default: what retort.toml says, else
    /// local].
    #[arg(long, value_name = "EXECUTOR")]
    pub executor: Option<Executor>,
    /// Set Slurm options, for all stages or for a kind: `--slurm partition=gpu`, `--slurm distill.time=4:00:00` (may be
    /// repeated). Keys: partition, account, qos, time, gres, cpus, memory, array-limit, sbatch, prologue, requeue, signal,
    /// poll, shrink-after.
    #[arg(long, value_name = "KEY=VALUE")]
    pub slurm: Vec<String>,
    /// Submit the stages whose inputs exist to Slurm, and exit; `retort resume` continues the run. Not for sweeps.
    #[arg(long)]
    pub detach: bool,
    /// After a failure, go on with the stages that do not depend on the failed one.
    #[arg(long)]
    pub keep_going: bool,
    /// How long a stage may take, after Ctrl-C, to reach its next checkpoint before it is killed.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = crate::duration::parse)]
    pub grace: Duration,
    /// Print the result of the run as one JSON document.
    #[arg(long)]
    pub json: bool,
}

/// Default number of stages submitted at the same time.
const MOST_ON_A_CLUSTER: usize = 64;

impl ExecutionArgs {
    /// How many stages, or runs of a sweep, run at the same time; and the cluster that runs stages of these kinds, if not
    /// this machine.
    pub fn placement<'a>(
        &self,
        dir: &Path,
        kinds: impl IntoIterator<Item = &'a str>,
        context: &Context,
    ) -> Result<(NonZeroUsize, Option<Cluster>), Error> {
        let settings = self.settings(dir, context)?;
        let (most, cluster) = match settings.executor().0 {
            Executor::Local | Executor::Torchrun => (1, None),
            Executor::Slurm => {
                for kind in kinds {
                    settings.profile(kind)?;
                }
                let cluster = Cluster {
                    slurm: Arc::default(),
                    settings: Arc::new(settings),
                };
                (MOST_ON_A_CLUSTER, Some(cluster))
            }
        };
        let most = NonZeroUsize::new(most).unwrap_or(NonZeroUsize::MIN);
        Ok((self.jobs.unwrap_or(most), cluster))
    }

    /// These options, completed with those of the resumed run.
    pub fn or_as_recorded(&self, recorded: &RecordedPlan) -> Self {
        let mut these = self.clone();
        these.executor = these.executor.or(recorded.executor);
        if these.slurm.is_empty() {
            these.slurm.clone_from(&recorded.slurm);
        }
        these
    }

    /// This process's rank among those started by `torchrun`, if they run the trainings.
    pub fn place(&self, settings: &Settings) -> Result<Option<LaunchedRank>, Error> {
        if settings.executor().0 != Executor::Torchrun {
            return Ok(None);
        }
        let place = LaunchedRank::read(|name| std::env::var(name).ok());
        place.map(Some).map_err(|error| {
            Error::new(Exit::Usage, format!("--executor torchrun: {error}")).hint(
                "torchrun --nproc-per-node 4 --no-python retort run RECIPE --executor torchrun",
            )
        })
    }

    /// All settings for a recipe in `dir`.
    pub fn settings(&self, dir: &Path, context: &Context) -> Result<Settings, Error> {
        let given = Overrides {
            executor: self.executor,
            slurm: self.slurm.clone(),
            ..context.given()
        };
        Ok(Settings::read(dir, &given)?)
    }
}

/// Opens the store for a run.
pub(super) fn open_store(runtime: &Runtime, dir: &Path) -> Result<Arc<Store>, Error> {
    Ok(Arc::new(
        runtime.block_on(Store::open(dir, Access::ReadWrite))?,
    ))
}

/// The store, unless it does not exist yet.
pub(super) fn store_if_there(runtime: &Runtime, dir: &Path) -> Result<Option<Arc<Store>>, Error> {
    match dir.join("history.db").exists() {
        true => open_store(runtime, dir).map(Some),
        false => Ok(None),
    }
}

/// The store's earlier results.
pub(super) fn known_results<'a>(
    runtime: &'a Runtime,
    store: &'a Store,
    trust: HashTrust,
) -> Result<History<'a>, Error> {
    let layout = Layout::new(store.dir())?;
    Ok(History::new(runtime, store, layout, trust))
}

/// Shows progress on standard error from now on; other messages are printed above it.
pub(super) fn teller(context: &Context) -> Arc<ProgressReporter> {
    let manner = Verbosity {
        bars: std::io::stderr().is_terminal(),
        color: context.color_stderr(),
        quiet: context.quiet,
        verbose: context.verbose,
    };
    let teller = Arc::new(ProgressReporter::new(manner, output::say));
    output::attach(teller.bars());
    teller
}

/// A plan about to be run.
pub(super) struct PlannedRun {
    /// The plan.
    pub plan: Plan,
    /// The role of each of its stages.
    pub roles: Vec<Role>,
    /// The recipe's file, as typed.
    pub shown_path: PathBuf,
    /// The run that is resumed.
    pub resumed_from: Option<RunId>,
    /// Its point of a sweep, if any.
    pub sweep: Option<SweepPlace>,
}

impl PlannedRun {
    /// Runs the plan and prints its results; the run.
    pub fn carry_out(
        self,
        runtime: &Runtime,
        store: &Arc<Store>,
        execution: &ExecutionArgs,
        context: &Context,
    ) -> Result<RunId, Error> {
        let layout = Layout::new(store.dir())?;
        let teller = teller(context);
        let kinds = self.plan.stages.iter().map(|stage| &*stage.kind);
        let (jobs, cluster) = execution.placement(&self.plan.base_dir, kinds, context)?;
        let settings = execution.settings(&self.plan.base_dir, context)?;
        let place = execution.place(&settings)?;
        if cluster.is_none() && place.is_none() {
            fits_one_machine(&self.plan)?;
        }
        let open = |place| {
            TrainingBoard::open(store.dir(), place).map_err(|error| {
                let message = "work cannot be sent to the other ranks: the store's `torchrun` folder is not usable";
                Error::new(Exit::Internal, message).cause(&error)
            })
        };
        let training_board = place.map(open).transpose()?.map(Arc::new);
        let options = Options {
            jobs,
            cluster,
            training_board: training_board.clone(),
            leave: match (execution.detach, std::io::stdin().is_terminal()) {
                (true, _) => DetachPolicy::WhenSubmitted,
                (false, true) => DetachPolicy::Ask(Arc::new(ask_how_to_leave)),
                (false, false) => DetachPolicy::Never,
            },
            slurm: execution.slurm.clone(),
            keep_going: execution.keep_going,
            grace: execution.grace,
            command: std::env::args().collect(),
            environment: environment::collect(&self.plan.base_dir),
            resumed_from: self.resumed_from,
            runs: NonZeroUsize::MIN,
            sweep: self.sweep,
            rung: None,
        };
        let listener = Arc::new(move |event| teller.hear(event));
        let outcome = runtime.block_on(executor::execute(
            &self.plan,
            &self.roles,
            Arc::clone(store),
            &options,
            listener,
        ));
        output::attach(None);
        drop(options);
        if let Some(training_board) = training_board.and_then(Arc::into_inner) {
            let good = |report: &RunReport| report.state == RunState::Succeeded;
            training_board.close(outcome.as_ref().is_ok_and(good));
        }
        let report = outcome?;
        let artifacts = runtime.block_on(store.list_artifacts(Some(&report.run)))?;
        runtime.block_on(store.close());
        let run_output = RunOutput {
            report: &report,
            artifacts: &artifacts,
            layout: &layout,
            plan: &self.plan,
        };
        let printed = output::print(&match execution.json {
            true => format!("{:#}\n", run_output.document()),
            false => run_output.text(context),
        });
        let wrong = run_output.options_at_fault();
        if !wrong.is_empty() {
            let wrong = Report {
                path: self.shown_path,
                text: self.plan.text.clone(),
                findings: wrong,
            };
            output::say(&wrong.render(context.color_stderr()));
        }
        // The exit code follows the run's result, even if its output cannot be written.
        run_output.conclude(context)?;
        printed?;
        Ok(report.run)
    }

    /// Checks the plan against the existing store, if there is one, and creates a new store only for a valid plan.
    pub fn prepare(
        &self,
        runtime: &Runtime,
        known: Option<&Arc<Store>>,
        trust: HashTrust,
        plugins: &mut Plugins<'_>,
        context: &Context,
    ) -> Result<Arc<Store>, Error> {
        let store = match known {
            Some(store) => {
                let known = &mut known_results(runtime, store, trust)?;
                self.check(plugins, known, context)?;
                Arc::clone(store)
            }
            None => {
                self.check(plugins, &mut EmptyHistory::default(), context)?;
                open_store(runtime, &context.store)?
            }
        };
        plugins.remember(&store);
        Ok(store)
    }

    /// Checks everything that can be checked before any work is done, and shows warnings.
    pub fn check(
        &self,
        plugins: &mut Plugins<'_>,
        known: &mut dyn KnownResults,
        context: &Context,
    ) -> Result<(), Error> {
        let mut errors = self.of_wanted(self.plan.missing_files());
        let mut warnings = self.of_wanted(self.plan.warnings.clone());
        if errors.is_empty() {
            let decisions =
                decision::decide(&self.plan, &self.roles, known).map_err(Error::of_history)?;
            let action = |wanted: &[Action]| {
                decisions
                    .iter()
                    .find(|decision| wanted.contains(&decision.action))
            };
            if let Some(missing) = action(&[Action::Missing]) {
                let stage = missing.stage.clone();
                return Err(ExecutorError::Missing { stage }.into());
            }
            // If nothing will run, no process has to be started: the options have been checked before.
            if action(&[Action::Run, Action::RunInputChanges]).is_some() {
                let found = self.of_wanted(self.plan.validate(plugins)).into_iter();
                let (grave, light): (Vec<_>, Vec<_>) =
                    found.partition(|finding| finding.severity == Severity::Error);
                (errors, warnings) = (grave, [warnings, light].concat());
            }
        }
        let report = |findings| Report {
            path: self.shown_path.clone(),
            text: self.plan.text.clone(),
            findings,
        };
        if !errors.is_empty() {
            return Err(report(errors).into());
        }
        if !warnings.is_empty() && !context.quiet {
            output::say(&report(warnings).render(context.color_stderr()));
        }
        if !context.quiet {
            self.plan.notes.iter().for_each(|note| output::say(note));
        }
        Ok(())
    }

    /// The findings without those about stages that are left out.
    fn of_wanted(&self, findings: Vec<Finding>) -> Vec<Finding> {
        findings
            .into_iter()
            .filter(|finding| !is_left_out(finding, &self.plan, &self.roles))
            .collect()
    }
}

/// Refuses more workers than one machine may run of a stage.
pub(super) fn fits_one_machine(plan: &Plan) -> Result<(), Error> {
    let many = |stage: &&PlannedStage| stage.workers.len() > MAX_PROCESSES;
    match plan.stages.iter().find(many) {
        None => Ok(()),
        Some(stage) => Err(Error::new(
            Exit::Usage,
            format!(
                "stage `{}`: {} workers are too many for one machine, which has at most {MAX_PROCESSES}",
                stage.name,
                stage.workers.len()
            ),
        )
        .hint("name fewer, or run them as jobs: --executor slurm")),
    }
}

/// Whether a finding is about a stage that is left out.
pub(super) fn is_left_out(finding: &Finding, plan: &Plan, roles: &[Role]) -> bool {
    let path = finding.pointer.strip_prefix("/stages/");
    let name = path.and_then(|path| path.split('/').next());
    let mut stages = plan.stages.iter().zip(roles);
    stages.any(|(stage, role)| Some(&*stage.name) == name && *role == Role::Skipped)
}

/// The output and the exit code of a finished run.
struct RunOutput<'a> {
    report: &'a RunReport,
    artifacts: &'a [ArtifactRow],
    layout: &'a Layout,
    plan: &'a Plan,
}

impl<'a> RunOutput<'a> {
    /// How many stages were reused, if nothing ran at all.
    fn idle(&self) -> Option<usize> {
        let stages = &self.report.stages;
        let idle = !stages.is_empty()
            && stages
                .iter()
                .all(|stage| matches!(stage.outcome, Outcome::Reused { .. }));
        idle.then_some(stages.len())
    }

    /// Options whose mistakes only a run of the stage can reveal.
    fn options_at_fault(&self) -> Vec<Finding> {
        let of = |stage: &StageReport| match &stage.outcome {
            Outcome::Ran(End::Failed(failure)) if failure.code == FailureCode::InvalidOptions => {
                let pointer = failure.pointer.as_deref().unwrap_or_default();
                self.plan
                    .option_at_fault(&stage.name, pointer, &failure.message)
            }
            _ => Vec::new(),
        };
        self.report.stages.iter().flat_map(of).collect()
    }

    /// As text: stages, tables, pictures.
    fn text(&self, context: &Context) -> String {
        let style = context.table_style();
        let mut text = match self.idle() {
            Some(count) => format!("nothing to do: {count} of {count} stages reused\n"),
            None => self.stages().render(style),
        };
        for row in self.outputs() {
            if let Some(table) = &row.artifact.meta.table {
                text.push_str(&format!("\n{}", Rows::from(table).render(style)));
            }
        }
        let pictures = self.pictures();
        if !pictures.is_empty() {
            text.push('\n');
        }
        for PreviewFile {
            stage,
            path,
            caption,
        } in pictures
        {
            let caption = caption.map_or(String::new(), |caption| format!(" ({caption})"));
            text.push_str(&format!("{stage}: {}{caption}\n", shown(&path).display()));
        }
        text
    }

    fn stages(&self) -> Rows {
        let mut rows = Rows::new(&["stage", "kind", "outcome", "time", "detail"]);
        for stage in &self.report.stages {
            let (outcome, cell_style, detail) = describe(stage);
            let time = match stage.outcome {
                Outcome::Ran(_) => Cell::new(
                    progress::duration(stage.elapsed),
                    stage.elapsed.as_secs_f64(),
                ),
                _ => Cell::none(),
            };
            let outcome = Cell::from(outcome).style(cell_style);
            rows.push([
                stage.name.as_str().into(),
                stage.kind.as_str().into(),
                outcome,
                time,
                Cell::from(detail),
            ]);
        }
        rows
    }

    /// As one JSON document.
    fn document(&self) -> Value {
        let outputs: BTreeMap<&str, &ArtifactRow> = self
            .artifacts
            .iter()
            .filter(|row| row.is_output)
            .map(|row| (row.stage.as_str(), row))
            .collect();
        let stages = self.report.stages.iter().map(|stage| {
            let (outcome, _, _) = describe(stage);
            let (reason, message, from) = match &stage.outcome {
                Outcome::Ran(end) => (Some(end.reason()), end.message(), None),
                Outcome::Reused { from } => (None, None, Some(from.0.clone())),
                Outcome::Blocked { by } => (Some(format!("needs {by}")), None, None),
                Outcome::NotReached => (None, None, None),
            };
            let output = outputs.get(stage.name.as_str()).map(|row| {
                json!({"hash": row.artifact.hash, "kind": row.artifact.kind,
                    "path": self.layout.artifact(&row.artifact.hash)})
            });
            json!({"name": stage.name, "kind": stage.kind, "outcome": outcome, "reason": reason, "message": message,
                "seconds": stage.elapsed.as_secs_f64(), "reused_from": from, "output": output})
        });
        let tables = self.outputs().filter_map(|row| {
            let table = row.artifact.meta.table.as_ref()?;
            Some(json!({"stage": row.stage, "title": table.title, "columns": table.columns, "rows": table.rows}))
        });
        let previews = self
            .pictures()
            .into_iter()
            .map(|p| json!({"stage": p.stage, "path": p.path, "caption": p.caption}));
        json!({
            "run": self.report.run, "recipe": self.plan.name, "state": self.report.state,
            "seconds": self.report.elapsed.as_secs_f64(), "stages": stages.collect::<Value>(),
            "tables": tables.collect::<Value>(), "previews": previews.collect::<Value>(),
        })
    }

    fn outputs(&self) -> impl Iterator<Item = &'a ArtifactRow> {
        // Failed attempts may have made artifacts too; they are not the run's results.
        let good = |name: &str| {
            self.report
                .stages
                .iter()
                .any(|stage| stage.name == name && stage.is_good())
        };
        self.artifacts.iter().filter(move |row| good(&row.stage))
    }

    /// Images worth looking at.
    fn pictures(&self) -> Vec<PreviewFile<'a>> {
        let picture = |row: &'a ArtifactRow| {
            let meta = &row.artifact.meta;
            let directory = self.layout.artifact(&row.artifact.hash);
            Some(PreviewFile {
                stage: &row.stage,
                path: directory.join(meta.preview.as_ref()?),
                caption: meta.caption.as_deref(),
            })
        };
        self.outputs().filter_map(picture).collect()
    }

    /// The last line, and the exit code.
    fn conclude(&self, context: &Context) -> Result<(), Error> {
        let RunReport {
            run,
            state,
            signal,
            stages,
            elapsed,
            ..
        } = self.report;
        let took = progress::duration(*elapsed);
        let failed = stages
            .iter()
            .filter(|stage| matches!(&stage.outcome, Outcome::Ran(_)) && !stage.is_good())
            .count();
        let error = match (state, signal) {
            (RunState::Succeeded, _) => {
                if !context.quiet {
                    output::say(&format!(
                        "run {run} succeeded in {took}; `retort runs show {run}` has the details"
                    ));
                }
                return Ok(());
            }
            (RunState::Running, signal) => {
                let text = format!("run {run} is left to Slurm after {took}");
                let hint = format!(
                    "`retort runs show {run}` shows its progress, `retort resume {run}` continues it"
                );
                return match signal.map(exit_of) {
                    None | Some(Exit::Interrupted) => {
                        if !context.quiet {
                            output::say(&format!("{text}; {hint}"));
                        }
                        Ok(())
                    }
                    Some(exit) => Err(Error::new(exit, text).hint(hint)),
                };
            }
            (RunState::Interrupted, Some(signal)) => {
                let exit = exit_of(*signal);
                Error::new(exit, format!("run {run} was interrupted after {took}"))
            }
            _ => Error::new(
                Exit::StageFailed,
                format!(
                    "{failed} of {} stages failed; run {run} ended after {took}",
                    stages.len()
                ),
            ),
        };
        Err(error.hint(format!(
            "`retort runs show {run}` has the details, `retort resume {run}` continues it"
        )))
    }
}

/// The exit code of a run ended by this signal.
fn exit_of(signal: i32) -> Exit {
    match signal {
        libc::SIGINT => Exit::Interrupted,
        libc::SIGHUP => Exit::HungUp,
        _ => Exit::Terminated,
    }
}

/// Asks on the terminal what to do with jobs; waits for an answer.
fn ask_how_to_leave() -> DetachAnswer {
    output::say(
        "Slurm jobs are under way: [d]etach and leave them to Slurm, [c]ancel them, or [g]o on?",
    );
    let mut answer = String::new();
    let _ = std::io::stdin().read_line(&mut answer);
    match answer
        .trim()
        .chars()
        .next()
        .map(|first| first.to_ascii_lowercase())
    {
        Some('d') => DetachAnswer::Detach,
        Some('c') => DetachAnswer::Cancel,
        _ => DetachAnswer::GoOn,
    }
}

/// An image worth looking at.
struct PreviewFile<'a> {
    stage: &'a str,
    path: PathBuf,
    caption: Option<&'a str>,
}

/// A stage's outcome: in a word, how good that is, and further details.
fn describe(stage: &StageReport) -> (&'static str, CellStyle, String) {
    match &stage.outcome {
        Outcome::Ran(end) => match end.state() {
            crate::store::AttemptState::Succeeded => ("ran", CellStyle::Ok, String::new()),
            crate::store::AttemptState::Interrupted => {
                ("interrupted", CellStyle::Warning, String::new())
            }
            _ => ("failed", CellStyle::Error, end.reason()),
        },
        Outcome::Reused { from } => ("reused", CellStyle::Dim, format!("from run {from}")),
        Outcome::Blocked { by } => ("skipped", CellStyle::Dim, format!("needs {by}")),
        Outcome::NotReached => ("not reached", CellStyle::Dim, String::new()),
    }
}

/// A path in its shortest form: relative if it is below the working directory.
fn shown(path: &Path) -> &Path {
    std::env::current_dir()
        .ok()
        .and_then(|here| path.strip_prefix(here).ok())
        .unwrap_or(path)
}
