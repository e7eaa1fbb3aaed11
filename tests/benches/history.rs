//! Speed and size of the history: `cargo bench -p retort-tests --bench history [-- PART...]`.
//!
//! Parts: `stage`, `append`, `curve`, `list`, `start`, `peers`; all without any. Each line gives wall-clock time and,
//! because machines are busy, processor time (user + system) of this process or of the ones it started. `POINTS` sets
//! how many points the large store of `curve` has (100,000,000, all appended as a runner appends them), `RUNS` how many
//! runs that of `list` has (100,000). `PEERS` names a Python with mlflow and trackio: `peers` then lets
//! `tests/peers/history.py` do the same with them, and a table of all is printed.

use std::path::Path;
use std::process::{Command, Stdio};

use retort::filter::{parse, parse_name};
use retort::store::{Axis, Batch, CurveQuery, RunFilter, RunState, Sort};
use retort_tests::clock::{Clock, Timing};
use serde_json::Value;

#[path = "../tests/runner/lab.rs"]
#[allow(
    dead_code,
    reason = "the tests use all of it, the bench its plugin and its binary"
)]
mod lab;

#[path = "history/store.rs"]
mod store;

use lab::{Lab, binary};
use store::{best, fill, open, points, series};

fn main() {
    let parts: Vec<String> = std::env::args()
        .skip(1)
        .filter(|part| !part.starts_with('-'))
        .collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut figures = Figures::default();
    if wanted("stage") {
        stage(&mut figures);
    }
    if wanted("append") {
        runtime.block_on(append(&mut figures));
    }
    if wanted("curve") {
        runtime.block_on(curve(&mut figures));
    }
    if wanted("list") {
        runtime.block_on(list());
    }
    if wanted("start") {
        start(&mut figures);
    }
    if wanted("peers") {
        peers(&figures);
    }
}

/// Our figures for comparison with the peers'.
#[derive(Default)]
struct Figures(Vec<(&'static str, f64)>);

/// A stage that logs points of eight series, as fast as it can and at a steady rate: its worker, its runner and the
/// database together, from the start of the command to its end.
fn stage(figures: &mut Figures) {
    for (amount, rate) in [(3_000_000, 0), (3_000_000, 500_000), (20_000, 1000)] {
        let lab = Lab::new(&[&format!(
            "a: {{kind: do, act: flood, amount: {amount}, rate: {rate}}}"
        )]);
        let clock = Clock::of_children();
        lab.run(&[]).expect(0);
        let took = clock.stop();
        let facts = lab.attempt("a").summary.expect("facts");
        let sql = "select sum(points) as points from v_series";
        let recorded = lab.retort(&["query", sql, "--json"]).expect(0).json()[0]["points"].clone();
        let count = recorded.as_f64().unwrap_or(f64::NAN);
        let asked = match rate {
            0 => "as fast as it can".to_owned(),
            rate => format!("{rate} a second, {} s late in all", facts["late"]),
        };
        let call = &facts["microseconds"];
        println!(
            "stage, {asked}: {recorded} of {amount} points recorded, {:.0} points/s by the clock, {:.0} by processor \
             time; a logging call in microseconds: {call}",
            count / took.wall,
            count / took.cpu,
        );
        if rate == 0 {
            figures.note("points_per_second", count / took.wall);
            figures.note("points_per_cpu_second", count / took.cpu);
            figures.note(
                "call_microseconds",
                call["median"].as_f64().unwrap_or(f64::NAN),
            );
        }
    }
}

/// Points of eight series, in the batches that a runner writes four times a second at half a million a second.
async fn append(figures: &mut Figures) {
    for (what, narrow) in [("64-bit values", false), ("32-bit values", true)] {
        let dir = tempfile::tempdir().expect("a directory");
        let (store, _, attempt) = open(dir.path()).await;
        let (batches, size) = (40, 125_000_u64);
        let made: Vec<Vec<Batch>> = (0..batches)
            .map(|batch| points(batch * size, size, narrow))
            .collect();
        let clock = Clock::start();
        for batch in &made {
            store.append_metrics(attempt, batch).await.expect("room");
        }
        let took = clock.stop();
        store.close().await;
        let count = (batches * size) as f64;
        let bytes = std::fs::metadata(dir.path().join("history.db"))
            .expect("a file")
            .len() as f64;
        println!(
            "append, {what}: {:.0} points/s by the clock, {:.0} by processor time; {:.2} bytes a point",
            count / took.wall,
            count / took.cpu,
            bytes / count
        );
        if !narrow {
            figures.note("bytes_per_point", bytes / count);
        }
    }
    // Occasional points, as in a training.
    let dir = tempfile::tempdir().expect("a directory");
    let (store, _, attempt) = open(dir.path()).await;
    let (batches, size) = (400, 800_u64);
    let clock = Clock::start();
    for batch in 0..batches {
        store
            .append_metrics(attempt, &points(batch * size, size, false))
            .await
            .expect("room");
    }
    let took = clock.stop();
    store.close().await;
    let bytes = std::fs::metadata(dir.path().join("history.db"))
        .expect("a file")
        .len() as f64;
    println!(
        "append, 100 points of 8 series at a time: {:.2} ms a time, {:.2} ms of processor time; {:.2} bytes a point",
        1e3 * took.wall / batches as f64,
        1e3 * took.cpu / batches as f64,
        bytes / (batches * size) as f64
    );
}

/// A curve of one series with a hundred million points, and of one with three million.
async fn curve(figures: &mut Figures) {
    let count = number("POINTS", 100_000_000);
    let dir = tempfile::tempdir().expect("a directory");
    let (store, run, attempt) = open(dir.path()).await;
    let clock = Clock::start();
    for start in (0..count).step_by(1 << 20) {
        let end = (start + (1 << 20)).min(count);
        let mut batch = vec![series("loss", start..end, true)];
        if start < 3_000_000 {
            batch.push(series("short", start..end.min(3_000_000), false));
        }
        store.append_metrics(attempt, &batch).await.expect("room");
    }
    let took = clock.stop();
    println!(
        "curve: a store of {count} points made in {:.1} s ({:.1} s of processor time)",
        took.wall, took.cpu
    );
    for (name, axis) in [
        ("loss", Axis::Step),
        ("loss", Axis::Time),
        ("short", Axis::Step),
    ] {
        let query = CurveQuery {
            buckets: 1000,
            axis,
            from: 0,
            to: u64::MAX,
        };
        let mut buckets = 0;
        let took =
            best(async || buckets = store.curve(&run, name, query).await.expect("a curve").len())
                .await;
        println!("curve of `{name}` over {axis:?}: {buckets} buckets in {took}");
    }
    // The same amount as for the peers.
    let few = series("few", 0..40_000, false);
    store.append_metrics(attempt, &[few]).await.expect("room");
    let mut points = 0;
    let took = best(async || {
        points = store
            .metric_series(&run, "few")
            .await
            .expect("a series")
            .len()
    })
    .await;
    println!("a series of {points} points read whole in {took}");
    figures.note("series_milliseconds", 1e3 * took.cpu);
}

/// The first twenty of a hundred thousand runs, filtered and ordered.
async fn list() {
    let count = number("RUNS", 100_000);
    let dir = tempfile::tempdir().expect("a directory");
    let (store, run, _) = open(dir.path()).await;
    store
        .finish_run(&run, RunState::Succeeded, None)
        .await
        .expect("room");
    fill(&store, 1..=count).await;
    let bytes = std::fs::metadata(dir.path().join("history.db"))
        .expect("a file")
        .len();
    println!(
        "list: a store of {count} runs, {:.0} MB",
        bytes as f64 / 1e6
    );
    for (filter, sort) in [
        ("", ""),
        ("state = failed", ""),
        (
            "metrics.fd.last < 3 and params.distill.steps >= 2000",
            "metrics.fd.last",
        ),
        (
            "metrics.fd.last < 3 or not params.distill.steps >= 2000",
            "-metrics.fd.last",
        ),
        (
            "recipe ~ digits and not tag = baseline and metrics.loss.min < 0.5",
            "-started",
        ),
        ("metrics.fd.last", "metrics.fd.last"),
        ("recipe ~ digits and metrics.loss.max < 0", "-started"),
    ] {
        let wanted = RunFilter {
            limit: Some(20),
            expr: (!filter.is_empty()).then(|| parse(filter).expect("a filter")),
            sort: (!sort.is_empty())
                .then(|| Sort {
                    name: parse_name(sort.trim_start_matches('-')).expect("a field"),
                    descending: sort.starts_with('-'),
                })
                .into_iter()
                .collect(),
            ..RunFilter::default()
        };
        let took = best(async || drop(store.list_runs(&wanted).await.expect("runs"))).await;
        println!("list `{filter}` by `{sort}`: {took}");
        let mut times = Vec::new();
        for _ in 0..10 {
            let mut command = Command::new(binary());
            command.args(["runs", "list", "--quiet", "--store"]);
            command.arg(dir.path()).stdout(Stdio::null());
            if !filter.is_empty() {
                command.args(["--where", filter]);
            }
            if !sort.is_empty() {
                command.args(["--sort", sort]);
            }
            let clock = Clock::of_children();
            assert!(command.status().expect("the binary").success());
            times.push(clock.stop());
        }
        times.sort_by(|a, b| a.cpu.total_cmp(&b.cpu));
        println!("    as a command, from start to end: {}", times[0]);
    }
}

/// `retort runs list` on a small store, from the start of the process to its end.
fn start(figures: &mut Figures) {
    let dir = tempfile::tempdir().expect("a directory");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (store, run, _) = open(dir.path()).await;
        store
            .finish_run(&run, RunState::Succeeded, None)
            .await
            .expect("room");
        fill(&store, 1..=20).await;
        store.close().await;
    });
    let mut times: Vec<Timing> = (0..40)
        .map(|_| {
            let clock = Clock::of_children();
            let status = Command::new(binary())
                .args(["runs", "list", "--quiet", "--store"])
                .arg(dir.path())
                .stdout(Stdio::null())
                .status();
            assert!(status.expect("the binary").success());
            clock.stop()
        })
        .collect();
    times.sort_by(|a, b| a.wall.total_cmp(&b.wall));
    println!(
        "start: `retort runs list`, least of 40: {}; median: {}",
        times[0], times[20]
    );
    figures.note("start_milliseconds", 1e3 * times[0].cpu);
}

/// MLflow's and trackio's figures, and a table of all.
fn peers(figures: &Figures) {
    let Some(python) = std::env::var_os("PEERS") else {
        println!("SKIPPED: peers; PEERS names no Python that has mlflow and trackio");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/history.py");
    let output = Command::new(python)
        .arg(script)
        .args(["bench", "--json"])
        .stderr(Stdio::inherit())
        .output()
        .expect("a Python");
    let found: Value = serde_json::from_slice(&output.stdout).expect("figures");
    let found = found.as_array().cloned().unwrap_or_default();
    let row = |name: &str, cells: &mut dyn Iterator<Item = String>| {
        println!("| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    row(
        "",
        &mut std::iter::once("retort".to_owned()).chain(found.iter().map(|one| text(&one["name"]))),
    );
    row("---", &mut (0..=found.len()).map(|_| "---:".to_owned()));
    for (key, name) in [
        (
            "points_per_second",
            "points recorded per second, by the clock",
        ),
        (
            "points_per_cpu_second",
            "points recorded per second of processor time",
        ),
        ("bytes_per_point", "bytes a point on disk"),
        ("call_microseconds", "a logging call, microseconds"),
        (
            "series_milliseconds",
            "40,000 points read, milliseconds of processor time",
        ),
        (
            "start_milliseconds",
            "runs listed from the command line, milliseconds of processor time",
        ),
    ] {
        let number = |value: f64| match value {
            value if value >= 1000.0 => format!("{value:.0}"),
            value => format!("{value:.2}"),
        };
        let ours = figures.0.iter().find(|(known, _)| *known == key);
        let ours = ours.map_or(String::new(), |(_, value)| number(*value));
        let theirs = found
            .iter()
            .map(|one| one[key].as_f64().map_or(String::new(), number));
        row(name, &mut std::iter::once(ours).chain(theirs));
    }
}

impl Figures {
    fn note(&mut self, name: &'static str, value: f64) {
        self.0.push((name, value));
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
