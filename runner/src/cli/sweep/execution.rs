//! A running sweep: which point runs next, its messages, and its final result.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::account::results::Results;
use crate::cli::execution::{ExecutionArgs, fits_one_machine, teller};
use crate::cli::sweep::recipe::SweepRecipe;
use crate::cli::sweep::show;
use crate::cli::{Context, Error, Exit, output};
use crate::environment;
use crate::executor::Cluster;
use crate::executor::{
    Control, DetachPolicy, Event, ExecutorError, Listener, Options, RunReport, Rung, Signals,
    execute_beside,
};
use crate::plugin::{Plugins, search_dirs};
use crate::progress::{self, ProgressReporter};
use crate::store::{RunId, RunState, Store, SweepDetail, SweepPlace};
use crate::sweep::halving::{Halving, NextRung, PointProgress};

/// A sweep ready for execution.
pub struct SweepExecution<'a> {
    /// The recipe shared by its points.
    pub source: &'a SweepRecipe,
    /// The sweep, with its points' results so far.
    pub detail: SweepDetail,
    /// Which points have nothing left to do, in order.
    pub done: Vec<bool>,
    /// Where async code runs.
    pub runtime: &'a Runtime,
    /// Where runs are recorded.
    pub store: &'a Arc<Store>,
}

/// Which point runs when.
enum Schedule {
    InOrder(VecDeque<NextRung>),
    Halving(Halving),
}

impl Schedule {
    fn of(sweeping: &SweepExecution<'_>) -> Self {
        let points = sweeping.detail.points.iter().zip(&sweeping.done);
        match &sweeping.detail.plan.definition.asha {
            None => {
                let missing = points.filter(|(_, done)| !**done);
                let first = missing.map(|(point, _)| NextRung {
                    point: point.number,
                    number: 0,
                });
                Self::InOrder(first.collect())
            }
            Some(asha) => {
                let courses: BTreeMap<u32, PointProgress> = points
                    .map(|(point, &done)| {
                        let value = |value: &Option<f64>| value.unwrap_or(f64::NAN);
                        let rungs: Vec<f64> = point.rungs.iter().map(value).collect();
                        let course = PointProgress {
                            begun: rungs.len(),
                            rungs,
                            done,
                        };
                        (point.number, course)
                    })
                    .collect();
                Self::Halving(Halving::new(asha.clone(), courses))
            }
        }
    }

    fn next(&mut self, idle: bool) -> Option<NextRung> {
        match self {
            Self::InOrder(left) => left.pop_front(),
            Self::Halving(halving) => halving.next(idle),
        }
    }

    fn target(&self, next: NextRung) -> Option<u64> {
        match self {
            Self::InOrder(_) => None,
            Self::Halving(halving) => halving.target(next),
        }
    }
}

/// The outcomes of points so far.
#[derive(Debug, Default)]
struct Counts {
    succeeded: usize,
    failed: usize,
}

/// Runs the missing points, and prints the results.
pub fn run(
    sweeping: SweepExecution<'_>,
    execution: &ExecutionArgs,
    context: &Context,
) -> Result<(), Error> {
    let began = Instant::now();
    let teller = teller(context);
    let control = Control::default();
    let (jobs, cluster) = execution.placement(&sweeping.source.base_dir, [], context)?;
    let settings = execution.settings(&sweeping.source.base_dir, context)?;
    if execution.place(&settings)?.is_some() {
        let message = "a sweep does not run in processes that `torchrun` has started";
        return Err(Error::new(Exit::Usage, message)
            .hint("run its points one after the other, each by a `retort run` of its own"));
    }
    let mut floor = SweepScheduler {
        schedule: Schedule::of(&sweeping),
        counts: Counts::default(),
        before: unfinished(&sweeping.detail),
        environment: environment::collect(&sweeping.source.base_dir),
        teller,
        sweeping: &sweeping,
        execution,
        jobs,
        cluster,
        context,
        control: &control,
    };
    let worked = floor.work();
    output::attach(None);
    let Counts { succeeded, failed } = floor.counts;
    let stopped = match &floor.schedule {
        Schedule::InOrder(_) => 0,
        Schedule::Halving(halving) => halving.stopped(),
    };
    worked?;
    let (runtime, store) = (sweeping.runtime, sweeping.store);
    let id = &sweeping.detail.id;
    let detail = runtime.block_on(store.sweep_detail(id))?;
    let results = runtime.block_on(Results::of(store, detail, None))?;
    runtime.block_on(store.close());
    let printed = output::print(&match execution.json {
        true => format!("{:#}\n", show::document(&results)),
        false => show::rows(&results, false).render(context.table_style()),
    });
    if !context.quiet {
        show::say(&results);
    }
    let took = progress::duration(began.elapsed());
    let total = output::count(sweeping.done.len(), "point");
    let again = format!("`retort sweep show {id}` has the details, `retort resume {id}` goes on");
    if let Some(signal) = control.first() {
        let exit = match signal {
            libc::SIGINT => Exit::Interrupted,
            libc::SIGHUP => Exit::HungUp,
            _ => Exit::Terminated,
        };
        let done = results.succeeded();
        let message = format!("sweep {id} was interrupted after {took}: {done} of {total} done");
        return Err(Error::new(exit, message).hint(again));
    }
    if failed > 0 {
        let message = format!("{failed} of {total} failed; sweep {id} ended after {took}");
        return Err(Error::new(Exit::StageFailed, message).hint(again));
    }
    if !context.quiet {
        let early = match stopped {
            0 => String::new(),
            count => format!(", {count} stopped early"),
        };
        output::say(&match succeeded {
            0 => {
                let done = results.succeeded();
                format!("sweep {id}: nothing to do: {done} of {total} done{early}")
            }
            ran => {
                // Points of earlier executions count too.
                let done = results.succeeded();
                let now = match done == ran {
                    true => String::new(),
                    false => format!(" ({ran} of them now)"),
                };
                format!("sweep {id}: {done} of {total} succeeded{now} in {took}{early}")
            }
        });
    }
    Ok(printed?)
}

/// The newest runs of points that did not succeed.
fn unfinished(detail: &SweepDetail) -> BTreeMap<u32, RunId> {
    let points = detail.points.iter().filter(|point| !point.is_done());
    points
        .filter_map(|point| Some((point.number, point.run.clone()?.0)))
        .collect()
}

/// Runs on their way.
type ActiveRuns<'a> = FuturesUnordered<
    Pin<Box<dyn Future<Output = (NextRung, Result<RunReport, ExecutorError>)> + 'a>>,
>;

struct SweepScheduler<'a> {
    sweeping: &'a SweepExecution<'a>,
    schedule: Schedule,
    counts: Counts,
    /// Runs of points that did not succeed: their next ones take them up again.
    before: BTreeMap<u32, RunId>,
    environment: Value,
    teller: Arc<ProgressReporter>,
    execution: &'a ExecutionArgs,
    jobs: NonZeroUsize,
    cluster: Option<Cluster>,
    context: &'a Context,
    control: &'a Control,
}

impl<'a> SweepScheduler<'a> {
    /// Runs points to their next rungs, as many at a time as allowed, until none remain or the user stops it.
    fn work(&mut self) -> Result<(), Error> {
        let runtime = self.sweeping.runtime;
        let mut signals = runtime
            .block_on(async { Signals::listen() })
            .map_err(|error| {
                Error::new(Exit::Internal, "signals cannot be received").cause(&error)
            })?;
        let mut plugins = Plugins::new(
            search_dirs(&self.context.plugin_dirs),
            runtime,
            Some(self.sweeping.store),
        );
        let mut under_way: ActiveRuns<'a> = FuturesUnordered::new();
        let mut ended: VecDeque<(NextRung, Result<RunReport, ExecutorError>)> = VecDeque::new();
        loop {
            while let Some((next, report)) = ended.pop_front() {
                // It had not begun.
                if matches!(report, Err(ExecutorError::Interrupted)) {
                    continue;
                }
                let taken = self.take_back(next, report?);
                runtime.block_on(beside(&mut under_way, &mut ended, taken))?;
            }
            while self.control.first().is_none()
                && under_way.len() < self.jobs.get()
                && let Some(next) = self.schedule.next(under_way.is_empty())
            {
                match self.begin(next, &mut plugins) {
                    Ok(run) => under_way.push(run),
                    Err(error) => {
                        // For example, a missing file: other points may not need it.
                        self.counts.failed += 1;
                        output::say(&format!("point {}: cannot be run", next.point));
                        error.show(self.context);
                    }
                }
            }
            if under_way.is_empty() {
                return Ok(());
            }
            // Planning, above, is blocking code that waits for the store itself; current runs pause meanwhile.
            let signal = runtime.block_on(async {
                tokio::select! {
                    run = under_way.next() => {
                        ended.extend(run);
                        None
                    }
                    signal = signals.next() => Some(signal),
                }
            });
            if let Some(signal) = signal {
                self.interrupt(signal, under_way.len());
            }
        }
    }

    /// Ctrl-C and similar signals: passed on to all runs, and reported once.
    fn interrupt(&self, signal: i32, workers: usize) {
        let is_first = self.control.first().is_none();
        // A pause must be counted on the event loop's thread, which is this one.
        self.control.send(signal);
        match (is_first, signal) {
            (_, libc::SIGTSTP) => {}
            (true, _) => self.teller.hear(Event::Stopping {
                grace: self.execution.grace,
                workers,
            }),
            // A hang-up is signalled twice.
            (false, libc::SIGHUP) => {}
            (false, _) => self.teller.hear(Event::Killing),
        }
    }

    /// Plans a point with the current files and plugins, and starts its run.
    fn begin(
        &self,
        next: NextRung,
        plugins: &mut Plugins<'_>,
    ) -> Result<
        Pin<Box<dyn Future<Output = (NextRung, Result<RunReport, ExecutorError>)> + 'a>>,
        Error,
    > {
        let SweepExecution {
            source,
            detail,
            store,
            ..
        } = self.sweeping;
        let place = next.point as usize - 1;
        let settings = detail.points[place].settings.as_slice();
        let (plan, roles) = source.plan(settings, plugins)?;
        let missing = plan.missing_files();
        if !missing.is_empty() {
            return Err(source.report(missing).into());
        }
        let series = detail.plan.definition.asha.as_ref();
        let rung = self.schedule.target(next).zip(series);
        match &self.cluster {
            Some(cluster) => {
                for stage in &plan.stages {
                    cluster.settings.profile(&stage.kind)?;
                }
            }
            None => fits_one_machine(&plan)?,
        }
        let options = Options {
            jobs: NonZeroUsize::MIN,
            keep_going: self.execution.keep_going,
            grace: self.execution.grace,
            command: std::env::args().collect(),
            environment: self.environment.clone(),
            resumed_from: self.before.get(&next.point).cloned(),
            runs: self.jobs,
            cluster: self.cluster.clone(),
            training_board: None,
            leave: DetachPolicy::Never,
            slurm: self.execution.slurm.clone(),
            sweep: Some(SweepPlace {
                id: detail.id.clone(),
                point: next.point,
            }),
            rung: rung.map(|(step, asha)| Rung {
                series: asha.metric.clone(),
                step,
            }),
        };
        let listener = self.listener(next, settings);
        let (store, control) = (Arc::clone(store), self.control);
        Ok(Box::pin(async move {
            let work = execute_beside(&plan, &roles, store, &options, listener, control);
            (next, work.await)
        }))
    }

    /// Reports the events of a point's run, with the point's number before its stages.
    fn listener(&self, next: NextRung, settings: &[String]) -> Listener {
        let (point, total) = (next.point, self.sweeping.done.len());
        let (settings, quiet) = (settings.join(", "), self.context.quiet);
        let rung = self
            .schedule
            .target(next)
            .map_or_else(String::new, |step| format!(" up to step {step}"));
        let teller = Arc::clone(&self.teller);
        Arc::new(move |event| match event {
            Event::RunBegan { run } if !quiet => {
                output::say(&format!(
                    "point {point} of {total}{rung}: run {run} ({settings})"
                ));
            }
            // Said once for all.
            Event::Stopping { .. } | Event::Killing | Event::GoingOn => {}
            event => teller.hear(event.renamed(|stage| format!("{point}/{stage}"))),
        })
    }

    async fn take_back(&mut self, next: NextRung, report: RunReport) -> Result<(), Error> {
        let store = self.sweeping.store;
        let place = SweepPlace {
            id: self.sweeping.detail.id.clone(),
            point: next.point,
        };
        let number = next.number as u32;
        self.before.insert(next.point, report.run.clone());
        let took = progress::duration(report.elapsed);
        let said = match (report.state, report.rung) {
            (RunState::Succeeded, _) => {
                self.counts.succeeded += 1;
                format!("succeeded in {took}")
            }
            (RunState::Interrupted, Some(value)) => {
                format!(
                    "stopped after {took}, judged by {}",
                    crate::table::number(value)
                )
            }
            (RunState::Interrupted, None) => format!("interrupted after {took}"),
            _ => {
                self.counts.failed += 1;
                format!("failed after {took}")
            }
        };
        if !self.context.quiet {
            output::say(&format!("point {}: {said}", next.point));
        }
        let Schedule::Halving(halving) = &mut self.schedule else {
            return Ok(());
        };
        if report.state == RunState::Succeeded {
            halving.finished(next.point);
        }
        let judged = match (report.state, report.rung) {
            (RunState::Interrupted, Some(value)) => Some(value),
            // It ended before the rung, or everything was reused: its final value counts.
            (RunState::Succeeded, _) if halving.target(next).is_some() => {
                let asha = self.sweeping.detail.plan.definition.asha.as_ref();
                let series = store.last_metrics(&report.run).await?;
                let found = asha.and_then(|asha| {
                    let rung = Rung {
                        series: asha.metric.clone(),
                        step: 0,
                    };
                    series
                        .iter()
                        .rfind(|known| rung.is_of(&known.stage, &known.series))
                        .map(|known| known.last)
                });
                Some(found.unwrap_or(f64::NAN))
            }
            _ => None,
        };
        if let Some(value) = judged {
            store.record_rung(&place, number, value).await?;
            halving.reached(next, value);
        }
        Ok(())
    }
}

/// Does something while runs go on; notes those that end. If they paused, one of them could keep what it waits for: the turn
/// to write to the store.
async fn beside<R: Future, T>(
    under_way: &mut FuturesUnordered<R>,
    ended: &mut VecDeque<R::Output>,
    work: impl Future<Output = T>,
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some(run) = under_way.next() => ended.push_back(run),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn a_run_that_is_writing_goes_on_while_the_sweep_writes() {
        let turn = Mutex::new(());
        let run = |turns: usize| {
            let turn = &turn;
            async move {
                for _ in 0..turns {
                    let _turn = turn.lock().await;
                    tokio::task::yield_now().await;
                }
                turns
            }
        };
        let mut under_way: FuturesUnordered<_> = [1, 2, 3].into_iter().map(run).collect();
        // The first run to end leaves the turn to another one.
        assert_eq!(under_way.next().await, Some(1));
        let mut ended = VecDeque::new();
        let written = beside(&mut under_way, &mut ended, turn.lock());
        let written = tokio::time::timeout(Duration::from_secs(60), written).await;
        assert!(written.is_ok(), "nobody gave up its turn");
    }
}
