//! Cost against size, each as a curve with its exponent: `cargo bench -p retort-tests --bench scale [-- [--full] PART...]`.
//!
//! Each PART selects the curves whose names hold it; without any, all are measured. The default sizes take a few minutes
//! on two cores and 2 GB in the temporary directory (TMPDIR). `--full` goes up to a million runs, a thousand million points
//! and a million files: an hour and 10 GB. Times of programs are processor time, the least of several; times of queries are by
//! the clock, because those are promised. Everything that is made here is removed at the end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use retort::filter::{parse, parse_name};
use retort::store::{Access, Axis, CurveQuery, RunFilter, RunState, Sort, Store};
use retort_tests::clock::Clock;
use retort_tests::memory;
use retort_tests::scale::{Bound, Curve, trajectories};

#[path = "../tests/runner/lab.rs"]
#[allow(
    dead_code,
    reason = "the tests use all of it, the bench its plugin and its binary"
)]
mod lab;

#[path = "history/store.rs"]
#[allow(dead_code, reason = "the bench `history` uses the rest")]
mod store;

use lab::{Lab, binary, block_on, plugins};
use store::{best, fill, open, series};

/// What was asked for.
struct Wanted {
    parts: Vec<String>,
    full: bool,
}

impl Wanted {
    fn has(&self, name: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|part| name.contains(part.as_str()))
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.has(name))
    }

    /// The usual sizes, and with `--full` the others too.
    fn sizes(&self, usual: &[u64], others: &[u64]) -> Vec<u64> {
        match self.full {
            true => [usual, others].concat(),
            false => usual.to_vec(),
        }
    }

    /// Prints those of the curves that were asked for.
    fn show(&self, curves: &[Curve]) {
        for curve in curves.iter().filter(|curve| self.has(curve.name)) {
            println!("{}", curve.table());
        }
    }
}

fn main() {
    let wanted = Wanted {
        parts: std::env::args()
            .skip(1)
            .filter(|part| !part.starts_with('-'))
            .collect(),
        full: std::env::args().any(|part| part == "--full"),
    };
    tokens_and_codes(&wanted);
    block_on(runs(&wanted));
    block_on(points(&wanted));
    stages(&wanted);
    chains(&wanted);
    files(&wanted);
    rates(&wanted);
}

fn curve(name: &'static str, size: &'static str, unit: &'static str, bound: Bound) -> Curve {
    Curve {
        name,
        size,
        unit,
        points: Vec::new(),
        bound,
    }
}

fn tokens_and_codes(wanted: &Wanted) {
    let names = [
        "trajectories, by tokens (4096 codes)",
        "trajectories, by codes (64 tokens)",
    ];
    let mut tokens = curve(names[0], "tokens", "ms/sample", Bound::Exponent(1.25));
    let mut codes = curve(names[1], "codes", "ms/sample", Bound::Exponent(1.05));
    let milliseconds = |side, codes| 1e3 * trajectories::seconds(side, codes).expect("tokens");
    if wanted.has(names[0]) {
        for side in [8, 12, 16, 24, 32] {
            let count = (side * side) as u64;
            tokens.points.push((count, milliseconds(side, 4096)));
        }
    }
    if wanted.has(names[1]) {
        for count in [1024, 2048, 4096, 8192, 16384] {
            codes.points.push((count as u64, milliseconds(8, count)));
        }
    }
    wanted.show(&[tokens, codes]);
}

/// Runs in one store, with parameters and results.
async fn runs(wanted: &Wanted) {
    let at_most = |name, cost| curve(name, "runs", "ms", Bound::Cost(cost));
    let mut curves = [
        at_most("history by runs: a store opened for reading", 20.0),
        at_most("history by runs: a store opened for writing", 20.0),
        at_most("history by runs: the first 20 listed", 50.0),
        at_most("history by runs: listed by a state", 50.0),
        at_most(
            "history by runs: listed by age, where none is so young",
            50.0,
        ),
        at_most("history by runs: listed by two values, sorted", 50.0),
        at_most("history by runs: listed where no run passes", 50.0),
        at_most("history by runs: one of them shown", 50.0),
        at_most("history by runs: plan of a recipe that never ran", 50.0),
    ];
    if !wanted.any(&curves.each_ref().map(|curve| curve.name)) {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (store, run, _) = open(dir.path()).await;
    let ended = store.finish_run(&run, RunState::Succeeded, None).await;
    ended.expect("room");
    let recipe = new_recipe(dir.path());
    let mut filled = 0;
    for size in wanted.sizes(&[1000, 10_000, 30_000, 100_000], &[300_000, 1_000_000]) {
        while filled < size {
            // A transaction's pages are in the write-ahead log as well.
            let next = (filled + 50_000).min(size);
            fill(&store, filled + 1..=next).await;
            filled = next;
        }
        let reader = Store::open(dir.path(), Access::ReadOnly).await;
        let reader = reader.expect("a store");
        let list = async |filter: &str, sort: &str| {
            let filter = listing(filter, sort);
            let timing = best(async || drop(reader.list_runs(&filter).await.expect("runs"))).await;
            1e3 * timing.wall
        };
        let values = "metrics.fd.last < 3 and params.distill.steps >= 2000";
        let nothing = "recipe ~ digits and metrics.loss.max < 0";
        let costs = [
            1e3 * opened(dir.path(), Access::ReadOnly).await,
            1e3 * opened(dir.path(), Access::ReadWrite).await,
            list("", "").await,
            list("state = failed", "").await,
            list("age < 1h", "").await,
            list(values, "metrics.fd.last").await,
            list(nothing, "-started").await,
            1e3 * best(async || drop(reader.run_detail(&run).await.expect("a run")))
                .await
                .wall,
            planned(&recipe, dir.path()),
        ];
        for (curve, cost) in curves.iter_mut().zip(costs) {
            curve.points.push((size, cost));
        }
        reader.close().await;
    }
    store.close().await;
    wanted.show(&curves);
}

/// Seconds until a store can be queried, the least of several.
async fn opened(dir: &Path, access: Access) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..10 {
        let clock = Clock::start();
        let store = Store::open(dir, access).await.expect("a store");
        // It connects at the first query.
        drop(store.pool().acquire().await.expect("a connection"));
        least = least.min(clock.stop().wall);
        store.close().await;
    }
    least
}

/// An empty store: without one nothing is remembered between commands.
async fn make_store(dir: &Path) {
    let store = Store::open(dir, Access::ReadWrite).await;
    store.expect("a store").close().await;
}

/// The first 20 runs that pass a filter, in an order.
fn listing(filter: &str, sort: &str) -> RunFilter {
    let order = |sort: &str| Sort {
        name: parse_name(sort.trim_start_matches('-')).expect("a field"),
        descending: sort.starts_with('-'),
    };
    RunFilter {
        limit: Some(20),
        expr: (!filter.is_empty()).then(|| parse(filter).expect("a filter")),
        sort: (!sort.is_empty())
            .then(|| order(sort))
            .into_iter()
            .collect(),
        ..RunFilter::default()
    }
}

/// A recipe of ten stages that no run knows, in a directory.
fn new_recipe(dir: &Path) -> PathBuf {
    let path = dir.join("never-run.yaml");
    fs::write(&path, recipe_of(&chain(10))).expect("a recipe");
    path
}

/// Stages of which each but the first takes its predecessor's result.
fn chain(count: usize) -> Vec<String> {
    (0..count)
        .map(|number| match number {
            0 => "s0: {kind: do, act: work}".to_owned(),
            number => format!("s{number}: {{kind: do, act: work, input: s{}}}", number - 1),
        })
        .collect()
}

fn recipe_of(stages: &[String]) -> String {
    let stages: String = stages.iter().map(|stage| format!("  {stage}\n")).collect();
    format!("version: 1\nbackend: faulty\nstages:\n{stages}")
}

/// Milliseconds of processor time of `retort plan`, the least of five after the first.
fn planned(recipe: &Path, store: &Path) -> f64 {
    let mut least = f64::INFINITY;
    for turn in 0..6 {
        let cost = planned_once(recipe, store);
        if turn > 0 {
            least = least.min(cost);
        }
    }
    least
}

fn planned_once(recipe: &Path, store: &Path) -> f64 {
    let clock = Clock::of_children();
    let status = plan_command(recipe, store)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.expect("the binary").success(), "a plan");
    1e3 * clock.stop().cpu
}

fn plan_command(recipe: &Path, store: &Path) -> Command {
    let mut command = Command::new(binary());
    command.arg("plan").arg(recipe);
    command.arg("--store").arg(store);
    command.arg("--plugin-dir").arg(plugins());
    command
}

/// Points of one long series, and a short one beside it.
async fn points(wanted: &Wanted) {
    let at_most = |name, cost| curve(name, "points", "ms", Bound::Cost(cost));
    let mut curves = [
        at_most("history by points: the curve of all in one series", 50.0),
        at_most("history by points: the same by time", 50.0),
        at_most("history by points: a tenth of it", 50.0),
        at_most(
            "history by points: the curve of another, short series",
            50.0,
        ),
        at_most("history by points: a store opened for reading", 20.0),
    ];
    if !wanted.any(&curves.each_ref().map(|curve| curve.name)) {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (store, run, attempt) = open(dir.path()).await;
    let short = series("short", 0..100_000, false);
    let appended = store.append_metrics(attempt, &[short]).await;
    appended.expect("room");
    let mut filled = 0;
    let million = 1_000_000;
    let usual = [million, 4 * million, 16 * million, 64 * million];
    for size in wanted.sizes(&usual, &[250 * million, 1000 * million]) {
        while filled < size {
            let next = (filled + (1 << 20)).min(size);
            let batch = series("loss", filled..next, true);
            let appended = store.append_metrics(attempt, &[batch]).await;
            appended.expect("room");
            filled = next;
        }
        let reader = Store::open(dir.path(), Access::ReadOnly).await;
        let reader = reader.expect("a store");
        let draw = async |name: &str, axis, from, to| {
            let query = CurveQuery {
                buckets: 1000,
                axis,
                from,
                to,
            };
            let drawn = async || drop(reader.curve(&run, name, query).await.expect("a curve"));
            1e3 * best(drawn).await.wall
        };
        let costs = [
            draw("loss", Axis::Step, 0, u64::MAX).await,
            draw("loss", Axis::Time, 0, u64::MAX).await,
            draw("loss", Axis::Step, size / 2, size / 2 + size / 10).await,
            draw("short", Axis::Step, 0, u64::MAX).await,
            1e3 * opened(dir.path(), Access::ReadOnly).await,
        ];
        for (curve, cost) in curves.iter_mut().zip(costs) {
            curve.points.push((size, cost));
        }
        reader.close().await;
    }
    store.close().await;
    wanted.show(&curves);
}

fn stages(wanted: &Wanted) {
    let bound = Bound::Exponent(1.2);
    let mut chained = curve(
        "plan by stages: each reads the one before",
        "stages",
        "ms",
        bound,
    );
    let mut single = curve("plan by stages: all read the first", "stages", "ms", bound);
    if !wanted.any(&[chained.name, single.name]) {
        return;
    }
    for count in [125, 250, 500, 1000] {
        let dir = tempfile::tempdir().expect("a directory");
        block_on(make_store(dir.path()));
        let recipe = dir.path().join("r.yaml");
        fs::write(&recipe, recipe_of(&chain(count))).expect("a recipe");
        chained
            .points
            .push((count as u64, planned(&recipe, dir.path())));
        let mut all = vec!["s0: {kind: do, act: work}".to_owned()];
        all.extend((1..count).map(|i| format!("s{i}: {{kind: do, act: work, input: s0}}")));
        fs::write(&recipe, recipe_of(&all)).expect("a recipe");
        single
            .points
            .push((count as u64, planned(&recipe, dir.path())));
    }
    wanted.show(&[chained, single]);
}

/// A run of stages that do nothing, each with a worker: the processor time of all processes.
fn chains(wanted: &Wanted) {
    let name = "run by stages: a chain of stages that do nothing";
    let mut curve = curve(name, "stages", "ms", Bound::Exponent(1.2));
    if !wanted.has(name) {
        return;
    }
    for count in wanted.sizes(&[25, 50, 100, 200], &[500, 1000]) {
        let stages: Vec<String> = chain(count as usize)
            .iter()
            .map(|stage| stage.replace("act: work", "act: succeed"))
            .collect();
        let stages: Vec<&str> = stages.iter().map(String::as_str).collect();
        let lab = Lab::new(&stages);
        let clock = Clock::of_children();
        lab.run(&["--quiet"]).expect(0);
        curve.points.push((count, 1e3 * clock.stop().cpu));
    }
    wanted.show(&[curve]);
}

/// Files of a few bytes in folders of a thousand, as a folder of images.
fn files(wanted: &Wanted) {
    let bound = Bound::Exponent(1.1);
    let mut fresh = curve(
        "plan by files: read for the first time",
        "files",
        "ms",
        bound,
    );
    let mut known = curve(
        "plan by files: their hashes remembered",
        "files",
        "ms",
        bound,
    );
    let mut peak = curve("plan by files: peak memory", "files", "MB", bound);
    if !wanted.any(&[fresh.name, known.name, peak.name]) {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let recipe = dir.path().join("r.yaml");
    let stage = "a: {kind: do, act: work, pictures: pictures}".to_owned();
    fs::write(&recipe, recipe_of(&[stage])).expect("a recipe");
    let mut made = 0;
    for size in wanted.sizes(&[1000, 10_000, 30_000, 100_000], &[300_000, 1_000_000]) {
        while made < size {
            let folder = dir.path().join(format!("pictures/{:04}", made / 1000));
            fs::create_dir_all(&folder).expect("a folder");
            for number in made..made + 1000 {
                let name = format!("{number:07}.png");
                fs::write(folder.join(name), number.to_string()).expect("a file");
            }
            made += 1000;
        }
        // Files written a moment ago are not remembered.
        sleep(Duration::from_secs(3));
        let store = tempfile::tempdir().expect("a directory");
        block_on(make_store(store.path()));
        fresh
            .points
            .push((size, planned_once(&recipe, store.path())));
        known.points.push((size, planned(&recipe, store.path())));
        let command = plan_command(&recipe, store.path());
        peak.points.push((size, peak_of(command)));
    }
    wanted.show(&[fresh, known, peak]);
}

/// The runner's memory while a stage logs points of eight series at a steady rate for three seconds, and as fast as it can.
fn rates(wanted: &Wanted) {
    let bound = Bound::Cost(100.0);
    let name = "runner's peak memory by points logged per second";
    let mut curve = curve(name, "points/s", "MB", bound);
    if !wanted.has(name) {
        return;
    }
    for rate in wanted.sizes(&[1000, 10_000, 100_000, 500_000], &[1_000_000]) {
        let amount = 3 * rate;
        let stage = format!("a: {{kind: do, act: flood, amount: {amount}, rate: {rate}}}");
        let lab = Lab::new(&[&stage]);
        curve
            .points
            .push((rate, peak_of(lab.command(&["run", "r.yaml"]))));
    }
    wanted.show(&[curve]);
}

/// The peak memory of a command's own process in MB, without its workers. Asked every few milliseconds, until it ends.
fn peak_of(mut command: Command) -> f64 {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().expect("the binary");
    let mut peak = 0;
    loop {
        peak = memory::peak_of(child.id()).unwrap_or_default().max(peak);
        if let Some(status) = child.try_wait().expect("a child") {
            assert!(status.success(), "{command:?}");
            return peak as f64 * 1024.0 / 1e6;
        }
        sleep(Duration::from_millis(5));
    }
}
