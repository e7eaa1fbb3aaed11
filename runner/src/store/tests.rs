//! The store as its users see it.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};

use super::*;
use crate::table::{Cell, Rows};

mod filters;
mod hosts;
mod limits;
mod migrations;
mod points;
mod transfer;

/// Runs a test's async body against a fresh store directory.
fn check<F: Future<Output = ()>>(body: impl FnOnce(PathBuf) -> F) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(body(dir.path().join("store")));
}

pub(crate) async fn open(dir: &Path) -> Store {
    Store::open(dir, Access::ReadWrite).await.expect("a store")
}

/// A plain connection to a database, without the guarantees of a store.
async fn connect(path: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(path);
    options.connect().await.unwrap()
}

async fn succeed(store: &Store, run: &RunId) {
    let finished = store.finish_run(run, RunState::Succeeded, None);
    finished.await.unwrap();
}

/// The answer to a statement, all of it.
async fn ask(store: &Store, sql: &str) -> Result<Rows, StoreError> {
    let mut rows = Rows::default();
    let taken = store.query(sql, Duration::from_secs(60), |answer| {
        match answer {
            QueryPiece::Heads(heads) => rows = Rows::new(heads),
            QueryPiece::Row(row) => rows.push(row.into_iter().map(Cell::from)),
        }
        std::ops::ControlFlow::Continue(())
    });
    taken.await.map(|()| rows)
}

/// A hash, made distinct by a word.
fn hash(word: &str) -> String {
    blake3::hash(word.as_bytes()).to_hex().to_string()
}

fn a_run(recipe: &str) -> NewRun {
    NewRun {
        recipe_name: recipe.into(),
        seed: u64::MAX,
        environment: json!({"host": "here"}),
        ..NewRun::default()
    }
}

fn a_stage(name: &str) -> NewStage {
    NewStage {
        name: name.into(),
        kind: "distill".into(),
        position: 0,
        plugin: RecordedPlugin {
            name: "candle".into(),
            version: "1.0.0".into(),
            hash: hash("a plugin"),
        },
        device: "cpu".into(),
        dtype: "f32".into(),
        seed: 3,
        options: json!({"steps": 10}),
        inputs: vec![("/teacher".into(), "teacher".into())],
    }
}

fn an_artifact(hash: &str) -> ArtifactRecord {
    ArtifactRecord {
        hash: hash.into(),
        kind: "student".into(),
        name: "student".into(),
        size: 3,
        files: vec![ArtifactFile {
            path: "a".into(),
            size: 3,
            hash: "cd".into(),
        }],
        meta: retort_abi::ArtifactMeta {
            preview: Some("grid.png".into()),
            ..Default::default()
        },
    }
}

fn an_end(state: AttemptState, output: Option<&str>) -> AttemptEnd {
    AttemptEnd {
        state,
        reason: state.to_string(),
        message: None,
        failure: None,
        summary: json!({"steps": 10}),
        output_artifact: output.map(Into::into),
        usage: Usage {
            cpu_seconds: Some(1.5),
            max_rss: Some(1 << 20),
        },
        paused: Duration::ZERO,
    }
}

/// Points of the series `loss`.
fn losses(points: &[MetricPoint]) -> [Batch; 1] {
    [Batch {
        series: "loss".into(),
        points: points.to_vec(),
    }]
}

fn a_point(step: u64, value: f64) -> MetricPoint {
    MetricPoint {
        step,
        value,
        at: Time(1_800_000_000_000 + step.cast_signed()),
    }
}

/// A run with one stage and one attempt under way.
pub(crate) async fn begin(
    store: &Store,
    recipe: &str,
    digest: &str,
) -> (RunId, StageId, AttemptId) {
    let run = store.begin_run(&a_run(recipe)).await.expect("a run");
    let stage = store
        .add_stage(&run, &a_stage("distill"))
        .await
        .expect("a stage");
    let attempt = store
        .begin_attempt(stage, &hash(digest), &json!({"seed": "3"}), 1)
        .await
        .expect("an attempt");
    (run, stage, attempt)
}

#[test]
fn what_was_recorded_is_read_back() {
    check(|dir| async move {
        let store = open(&dir).await;
        let mut new = a_run("digits");
        new.params = vec![
            Param {
                path: "a.flag".into(),
                value: json!(true),
                origin: "default".into(),
            },
            Param {
                path: "a.list".into(),
                value: json!([1, "x"]),
                origin: "recipe:3".into(),
            },
            Param {
                path: "a.none".into(),
                value: json!(null),
                origin: "default".into(),
            },
            Param {
                path: "a.rate".into(),
                value: json!(1e-3),
                origin: "--set".into(),
            },
            Param {
                path: "a.steps".into(),
                value: json!(10),
                origin: "params".into(),
            },
            Param {
                path: "a.text".into(),
                value: json!("10"),
                origin: "derived".into(),
            },
        ];
        let run = store.begin_run(&new).await.unwrap();
        let stage = store.add_stage(&run, &a_stage("distill")).await.unwrap();
        store.add_stage(&run, &a_stage("never")).await.unwrap();
        let attempt = store
            .begin_attempt(stage, "d1", &json!({"seed": "3"}), 77)
            .await
            .unwrap();
        store
            .record_artifact(attempt, &an_artifact("h0"))
            .await
            .unwrap();
        store.record_lineage(attempt, &["h0".into()]).await.unwrap();
        let line = LogLine {
            at: Time(5),
            level: 2,
            source: LogSource::Stderr,
            text: "odd".into(),
        };
        store
            .append_log(attempt, std::slice::from_ref(&line))
            .await
            .unwrap();
        store
            .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some("h0")))
            .await
            .unwrap();
        succeed(&store, &run).await;
        store.tag_run(&run, "größte").await.unwrap();

        let detail = store.run_detail(&run).await.unwrap();
        assert_eq!(detail.summary.state, RunState::Succeeded);
        assert_eq!(detail.summary.seed, u64::MAX);
        assert_eq!(detail.summary.tags, ["größte"]);
        assert_eq!(
            detail.summary.stages,
            StageCounts {
                total: 2,
                ran: 1,
                reused: 0,
                failed: 0
            }
        );
        assert_eq!(detail.params, new.params);
        assert_eq!(detail.stages[0].state, StageState::Succeeded);
        assert_eq!(detail.stages[0].inputs, a_stage("distill").inputs);
        assert_eq!(detail.stages[0].attempts[0].usage.max_rss, Some(1 << 20));
        assert_eq!(detail.stages[1].state, StageState::Skipped);
        assert_eq!(detail.artifacts[0].artifact, an_artifact("h0"));
        assert_eq!(detail.artifacts[0].made_from, ["h0"]);
        assert!(detail.artifacts[0].is_output);
        assert_eq!(store.log(attempt).await.unwrap(), [line]);
    });
}

#[test]
fn a_success_is_found_by_its_digest_and_reused() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (_, _, failed) = begin(&store, "digits", "d1").await;
        store
            .finish_attempt(failed, &an_end(AttemptState::Failed, None))
            .await
            .unwrap();
        assert_eq!(store.find_success(&hash("d1")).await.unwrap(), None);

        let (first, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .record_artifact(attempt, &an_artifact("h1"))
            .await
            .unwrap();
        store
            .append_metrics(attempt, &losses(&[a_point(1, 0.5)]))
            .await
            .unwrap();
        store
            .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some("h1")))
            .await
            .unwrap();
        let success = store
            .find_success(&hash("d1"))
            .await
            .unwrap()
            .expect("a success");
        assert_eq!((success.attempt, &success.run), (attempt, &first));
        assert_eq!(success.output, an_artifact("h1"));

        let second = store.begin_run(&a_run("digits")).await.unwrap();
        let stage = store.add_stage(&second, &a_stage("distill")).await.unwrap();
        store
            .stage_reused(stage, &hash("d1"), &json!({"seed": "4"}), attempt)
            .await
            .unwrap();
        let detail = store.run_detail(&second).await.unwrap();
        assert_eq!(detail.stages[0].state, StageState::Reused);
        assert_eq!(
            detail.stages[0]
                .reused_from
                .as_ref()
                .map(|source| &source.run),
            Some(&success.run)
        );
        assert_eq!(detail.artifacts.len(), 1);
        assert!(detail.artifacts[0].reused);
        assert_eq!(store.last_metrics(&second).await.unwrap()[0].last, 0.5);
        assert_eq!(store.list_artifacts(None).await.unwrap().len(), 1);
        let hash = &detail.artifacts[0].artifact.hash;
        let made = store.newest_with_hash(hash).await.unwrap().unwrap();
        assert_eq!((made.run, made.reused), (success.run, false));
        assert!(store.newest_with_hash("absent").await.unwrap().is_none());

        let last = store
            .last_execution("digits", "distill")
            .await
            .unwrap()
            .expect("an execution");
        assert_eq!((last.run, last.components), (second, json!({"seed": "4"})));
        assert_eq!(
            store.last_execution("other", "distill").await.unwrap(),
            None
        );
    });
}

/// Not a test by itself: the runner of a run, in a process that the test below can kill.
#[test]
fn child_that_begins_a_run() {
    let Some(dir) = std::env::var_os("RETORT_TEST_CHILD_STORE") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let store = open(Path::new(&dir)).await;
        begin(&store, "digits", "d1").await;
    });
    writeln!(std::io::stdout(), "begun").expect("a parent that listens");
    // Until killed, or until the test that started it is gone.
    let _ = std::io::Read::read(&mut std::io::stdin(), &mut [0]);
}

fn start_child(dir: &Path) -> std::process::Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "store::tests::child_that_begins_a_run",
            "--nocapture",
        ])
        .env("RETORT_TEST_CHILD_STORE", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this very program");
    let mut said = std::io::BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("begun") {
        line.clear();
        assert_ne!(
            std::io::BufRead::read_line(&mut said, &mut line).unwrap(),
            0,
            "the child ended early"
        );
    }
    child
}

/// As in a damaged store: otherwise `tail` would follow it forever.
#[test]
fn a_run_without_a_lease_is_lost() {
    check(|dir| async move {
        let mut child = start_child(&dir);
        let writer = Store::open(&dir, Access::ReadWrite).await.unwrap();
        sqlx::query("delete from leases")
            .execute(writer.pool())
            .await
            .unwrap();
        let lost = &writer.list_runs(&RunFilter::default()).await.unwrap()[0];
        assert_eq!(lost.state, RunState::Lost);
        child.kill().unwrap();
        child.wait().unwrap();
    });
}

#[test]
fn the_run_of_a_killed_runner_is_lost() {
    check(|dir| async move {
        let mut child = start_child(&dir);
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        assert_eq!(
            reader.list_runs(&RunFilter::default()).await.unwrap()[0].state,
            RunState::Running
        );
        child.kill().unwrap();
        child.wait().unwrap();

        let lost = &reader.list_runs(&RunFilter::default()).await.unwrap()[0];
        assert_eq!(lost.state, RunState::Lost);
        assert!(lost.finished.is_some());
        let detail = reader.run_detail(&lost.id).await.unwrap();
        assert_eq!(detail.stages[0].state, StageState::Lost);
        assert_eq!(detail.stages[0].attempts[0].state, AttemptState::Lost);
        // And it is recorded, not only shown.
        let stored: String = sqlx::query_scalar("select state from v_runs")
            .fetch_one(reader.pool())
            .await
            .unwrap();
        assert_eq!(stored, "lost");

        // That was a mistake: the holder was only slow.
        let store = open(&dir).await;
        store.heartbeat(&lost.id).await.unwrap();
        let stored = async || -> String {
            let state = sqlx::query_scalar("select state from v_runs");
            state.fetch_one(store.pool()).await.unwrap()
        };
        assert_eq!(stored().await, "running");
        // The same holds for a run of which nothing has begun.
        sqlx::raw_sql("delete from attempts; update stages set state = 'queued'; update runs set state = 'lost'")
            .execute(store.pool())
            .await
            .unwrap();
        store.heartbeat(&lost.id).await.unwrap();
        assert_eq!(stored().await, "queued");
    });
}

#[test]
fn a_run_is_running_when_slurm_says_so() {
    check(|dir| async move {
        let store = open(&dir).await;
        let run = store.begin_run(&a_run("digits")).await.unwrap();
        let stage = store.add_stage(&run, &a_stage("a")).await.unwrap();
        let (digest, components) = (hash("d"), json!({}));
        let attempt = store.begin_attempt(stage, &digest, &components, 1);
        let attempt = attempt.await.unwrap();
        let states = async || {
            let detail = store.run_detail(&run).await.unwrap();
            (detail.summary.state, detail.stages[0].state)
        };
        // It was killed while its job waited.
        let waiting = store.attempt_waits(attempt, Some("Priority"));
        waiting.await.unwrap();
        assert_eq!(states().await, (RunState::Queued, StageState::Queued));
        let left = DetachedJobs {
            run: run.clone(),
            detached: false,
            jobs: vec![1],
            names: Vec::new(),
        };
        store.scheduler_says(&left, None).await.unwrap();
        assert_eq!(states().await, (RunState::Running, StageState::Running));
        store.scheduler_says(&left, Some("Priority")).await.unwrap();
        assert_eq!(states().await, (RunState::Queued, StageState::Queued));
        // A heartbeat says no more than the stages do.
        sqlx::raw_sql("update runs set state = 'lost'")
            .execute(store.pool())
            .await
            .unwrap();
        store.heartbeat(&run).await.unwrap();
        assert_eq!(states().await, (RunState::Queued, StageState::Queued));
    });
}

#[test]
fn a_lost_run_is_shown_where_it_cannot_be_written_down() {
    check(|dir| async move {
        let mut child = start_child(&dir);
        child.kill().unwrap();
        child.wait().unwrap();
        // Another writer keeps the store locked.
        let writer = open(&dir).await;
        let locked = writer.write().await.unwrap();
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let lost = RunFilter {
            states: vec![RunState::Lost],
            ..RunFilter::default()
        };
        let running = RunFilter {
            states: vec![RunState::Running],
            ..RunFilter::default()
        };
        let found = reader.list_runs(&lost).await.unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].finished.is_some());
        assert_eq!(reader.list_runs(&running).await.unwrap(), []);
        drop(locked);
    });
}

#[test]
fn a_reader_reads_beside_a_writer_and_cannot_write() {
    check(|dir| async move {
        let writer = open(&dir).await;
        writer.begin_run(&a_run("digits")).await.unwrap();
        let mut open_transaction = writer.write().await.unwrap();
        sqlx::query("delete from runs")
            .execute(&mut *open_transaction)
            .await
            .unwrap();
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        assert_eq!(
            reader.list_runs(&RunFilter::default()).await.unwrap().len(),
            1
        );
        assert!(matches!(
            reader.begin_run(&a_run("x")).await,
            Err(StoreError::ReadOnly { .. })
        ));
        assert!(
            sqlx::query("delete from runs")
                .execute(reader.pool())
                .await
                .is_err()
        );
    });
}

/// 64 processes and 16 tasks of this one open a store at once, and begin a run each.
async fn crowd(dir: &Path) -> HashSet<RunId> {
    let mut children: Vec<_> = (0..64)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::tests::child_that_begins_a_run"])
                .env("RETORT_TEST_CHILD_STORE", dir)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .expect("this very program")
        })
        .collect();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let dir = dir.to_owned();
        tasks.spawn(async move { open(&dir).await.begin_run(&a_run("task")).await.unwrap() });
    }
    let mut ids: HashSet<_> = tasks.join_all().await.into_iter().collect();
    assert_eq!(ids.len(), 16);
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let runs = open(dir).await.list_runs(&RunFilter::default()).await;
    ids.extend(runs.unwrap().into_iter().map(|run| run.id));
    ids
}

#[test]
fn many_processes_open_one_new_store_at_once() {
    check(|dir| async move { assert_eq!(crowd(&dir).await.len(), 80) });
}

#[test]
fn descriptions_are_kept_by_the_hash_of_the_plugin() {
    check(|dir| async move {
        let store = open(&dir).await;
        let description = retort_abi::Description {
            name: "candle".into(),
            version: "1.0.0".into(),
            summary: String::new(),
            license: String::new(),
            devices: vec!["cpu".into()],
            dtypes: vec!["f32".into()],
            families: Vec::new(),
            libraries: Vec::new(),
            stages: Vec::new(),
        };
        store.cache_description("ab", &description).await.unwrap();
        assert_eq!(
            store.cached_description("ab").await.unwrap(),
            Some(description)
        );
        assert_eq!(store.cached_description("cd").await.unwrap(), None);
    });
}

#[test]
fn a_full_disk_ends_neither_a_connection_nor_what_comes_after() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, stage, attempt) = begin(&store, "digits", "d1").await;
        let limit = async |pages: i64| {
            // A limit is of a connection: each of the pool gets it.
            let mut all = Vec::new();
            for _ in 0..4 {
                all.push(store.pool().acquire().await.unwrap());
            }
            for connection in &mut all {
                let limit = format!("pragma max_page_count = {pages}");
                let limit = sqlx::query(sqlx::AssertSqlSafe(limit));
                limit.execute(&mut **connection).await.unwrap();
            }
            // They return to the pool a little later. Before that, a new one without a limit would be opened.
            let limited = all.len();
            drop(all);
            while store.pool().num_idle() < limited {
                tokio::task::yield_now().await;
            }
        };
        limit(1).await;
        let line = |text: String| LogLine {
            at: Time(5),
            level: 3,
            source: LogSource::Plugin,
            text,
        };
        for _ in 0..4 {
            let long = [line("x".repeat(200_000))];
            let full = store.append_log(attempt, &long).await;
            assert!(matches!(full, Err(StoreError::Full)), "{full:?}");
        }
        // These are new connections, and none of them takes itself to be in a transaction.
        for _ in 0..8 {
            store
                .append_log(attempt, &[line("short".into())])
                .await
                .unwrap();
            store.heartbeat(&run).await.unwrap();
        }
        store
            .finish_attempt(attempt, &an_end(AttemptState::Failed, None))
            .await
            .unwrap();
        store
            .begin_attempt(stage, "d2", &json!({}), 1)
            .await
            .unwrap();
        assert_eq!(store.run_log(&run, 0, 99).await.unwrap().len(), 8);
        assert_eq!(store.problems().await.unwrap(), [""; 0]);
    });
}

#[test]
fn a_transaction_that_ends_early_leaves_nothing() {
    check(|dir| async move {
        let store = open(&dir).await;
        for _ in 0..10 {
            let mut write = store.write().await.unwrap();
            let broken = sqlx::query("insert into runs (key) values (1)").execute(&mut *write);
            assert!(broken.await.is_err());
            drop(write);
            let mut write = store.write().await.unwrap();
            // As SQLite does by itself when the disk fails.
            sqlx::query("rollback").execute(&mut *write).await.unwrap();
            assert!(write.commit().await.is_err());
        }
        begin(&store, "digits", "d1").await;
        assert_eq!(
            store.list_runs(&RunFilter::default()).await.unwrap().len(),
            1
        );
    });
}
