//! The store as its users see it.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use sqlx::ConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;

use super::*;

/// Runs a test's async body against a fresh store directory.
fn check<F: Future<Output = ()>>(body: impl FnOnce(PathBuf) -> F) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(body(dir.path().join("store")));
}

async fn open(dir: &Path) -> Store {
    Store::open(dir, Access::ReadWrite).await.expect("a store")
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
        plugin: PluginIdentity {
            name: "candle".into(),
            version: "1.0.0".into(),
            hash: "ab".into(),
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
    }
}

fn a_point(step: u64, value: f64) -> MetricPoint {
    MetricPoint {
        series: "loss".into(),
        step,
        value,
        at: Time(1_800_000_000_000 + step.cast_signed()),
    }
}

/// A run with one stage and one attempt under way.
async fn begin(store: &Store, recipe: &str, digest: &str) -> (RunId, StageId, AttemptId) {
    let run = store.begin_run(&a_run(recipe)).await.expect("a run");
    let stage = store
        .add_stage(&run, &a_stage("distill"))
        .await
        .expect("a stage");
    let attempt = store
        .begin_attempt(stage, digest, &json!({"seed": "3"}), 1)
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
        store
            .finish_run(&run, RunState::Succeeded, None)
            .await
            .unwrap();
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
        assert_eq!(store.find_success("d1").await.unwrap(), None);

        let (first, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .record_artifact(attempt, &an_artifact("h1"))
            .await
            .unwrap();
        store
            .append_metrics(attempt, &[a_point(1, 0.5)])
            .await
            .unwrap();
        store
            .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some("h1")))
            .await
            .unwrap();
        let success = store.find_success("d1").await.unwrap().expect("a success");
        assert_eq!((success.attempt, &success.run), (attempt, &first));
        assert_eq!(success.output, an_artifact("h1"));

        let second = store.begin_run(&a_run("digits")).await.unwrap();
        let stage = store.add_stage(&second, &a_stage("distill")).await.unwrap();
        store
            .stage_reused(stage, "d1", &json!({"seed": "4"}), attempt)
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

#[test]
fn nan_and_infinities_are_values() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        let values = [
            0.5,
            f64::NAN,
            f64::NEG_INFINITY,
            3.0,
            f64::INFINITY,
            f64::NAN,
        ];
        let points: Vec<_> = (0..)
            .zip(values)
            .map(|(step, value)| a_point(step, value))
            .collect();
        store.append_metrics(attempt, &points).await.unwrap();
        let read = store.metric_series(&run, "distill/loss").await.unwrap();
        assert_eq!(
            format!(
                "{:?}",
                read.iter().map(|point| point.value).collect::<Vec<_>>()
            ),
            format!("{values:?}")
        );
        assert_eq!(read[3].at, points[3].at);
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert!(summary.last.is_nan());
        assert_eq!(
            (summary.min, summary.max),
            (Some(f64::NEG_INFINITY), Some(f64::INFINITY))
        );
        let shown = serde_json::to_value(summary).unwrap();
        assert_eq!(
            (&shown["last"], &shown["min"]),
            (&json!("NaN"), &json!("-Infinity"))
        );
    });
}

#[test]
fn a_later_point_at_a_step_replaces_the_earlier() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .append_metrics(attempt, &[a_point(0, f64::NAN)])
            .await
            .unwrap();
        // More than one statement's worth, twice.
        for round in [0.0, 1000.0] {
            let points: Vec<_> = (0..600_u32)
                .map(|step| a_point(step.into(), round + f64::from(step)))
                .collect();
            store.append_metrics(attempt, &points).await.unwrap();
        }
        store
            .append_metrics(attempt, &[a_point(7, -1.0)])
            .await
            .unwrap();
        let read = store.metric_series(&run, "loss").await.unwrap();
        assert_eq!(read.len(), 600);
        assert_eq!((read[7].value, read[599].value), (-1.0, 1599.0));
        let summary = &store.last_metrics(&run).await.unwrap()[0];
        assert_eq!((summary.last_step, summary.last), (599, 1599.0));
        assert_eq!((summary.min, summary.max), (Some(-1.0), Some(1599.0)));
    });
}

#[test]
fn references_resolve() {
    check(|dir| async move {
        let store = open(&dir).await;
        assert!(matches!(
            store.resolve_run("latest").await,
            Err(StoreError::NoRun { runs: 0, .. })
        ));
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(store.begin_run(&a_run("digits")).await.unwrap());
        }
        store.tag_run(&ids[0], "best").await.unwrap();
        store.tag_run(&ids[1], "best").await.unwrap();
        let whole = ids[0].0.to_uppercase();
        for (reference, expected) in [
            ("latest", 2),
            ("latest~", 1),
            ("latest~1", 1),
            ("latest~2", 0),
            ("best", 1),
            (&whole, 0),
        ] {
            assert_eq!(
                store.resolve_run(reference).await.unwrap(),
                ids[expected],
                "{reference}"
            );
        }
        for reference in ["latest~3", "latest~x", "", "%", "zzzz", "né"] {
            assert!(
                matches!(
                    store.resolve_run(reference).await,
                    Err(StoreError::NoRun { .. })
                ),
                "{reference}"
            );
        }
        // The ids of one moment begin alike.
        let shared = &ids[0].0[..3];
        let Err(StoreError::AmbiguousRun { candidates, .. }) = store.resolve_run(shared).await
        else {
            panic!("{shared} is ambiguous")
        };
        assert_eq!(candidates.len(), 3);
    });
}

#[test]
fn lists_are_filtered() {
    check(|dir| async move {
        let store = open(&dir).await;
        for (recipe, state) in [
            ("a", RunState::Succeeded),
            ("b", RunState::Failed),
            ("a", RunState::Failed),
        ] {
            let run = store.begin_run(&a_run(recipe)).await.unwrap();
            store.finish_run(&run, state, None).await.unwrap();
        }
        let count = async |filter: RunFilter| store.list_runs(&filter).await.unwrap().len();
        assert_eq!(count(RunFilter::default()).await, 3);
        assert_eq!(
            count(RunFilter {
                limit: Some(2),
                ..RunFilter::default()
            })
            .await,
            2
        );
        assert_eq!(
            count(RunFilter {
                states: vec![RunState::Failed],
                ..RunFilter::default()
            })
            .await,
            2
        );
        let both = RunFilter {
            states: vec![RunState::Failed],
            recipe: Some("a".into()),
            ..RunFilter::default()
        };
        assert_eq!(count(both).await, 1);
    });
}

/// Not a test of its own: the runner of a run, in a process that the test below can kill.
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
        // And it is written down, not only shown.
        let stored: String = sqlx::query_scalar("select state from v_runs")
            .fetch_one(reader.pool())
            .await
            .unwrap();
        assert_eq!(stored, "lost");

        // Somebody was mistaken: the holder was only slow.
        let store = open(&dir).await;
        store.heartbeat(&lost.id).await.unwrap();
        let stored: String = sqlx::query_scalar("select state from v_runs")
            .fetch_one(store.pool())
            .await
            .unwrap();
        assert_eq!(stored, "running");
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

#[test]
fn a_statement_is_answered_and_cannot_write() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .append_metrics(attempt, &[a_point(1, f64::INFINITY), a_point(2, f64::NAN)])
            .await
            .unwrap();
        let answer = store
            .query("select run, stage, step, value, x'00ff' as bytes, null as gap from v_metrics order by step")
            .await
            .unwrap();
        assert_eq!(
            answer.objects(),
            json!([
                {"run": run.0, "stage": "distill", "step": 1, "value": "Infinity", "bytes": "00ff", "gap": null},
                {"run": run.0, "stage": "distill", "step": 2, "value": null, "bytes": "00ff", "gap": null},
            ])
        );
        // No rows still have heads.
        let none = store
            .query("select id, state from v_runs where false")
            .await
            .unwrap();
        assert_eq!(none.render(crate::table::Style::Csv), "id,state\n");

        let elsewhere = dir.join("elsewhere.db").display().to_string();
        for statement in [
            "delete from runs".to_owned(),
            "pragma query_only = off; delete from runs".to_owned(),
            format!("attach database '{elsewhere}' as elsewhere; create table elsewhere.t (a)"),
            "no sql".to_owned(),
            "select * from no_table".to_owned(),
        ] {
            let answer = store.query(&statement).await;
            assert!(
                matches!(answer, Err(StoreError::Sql(_))),
                "{statement}: {answer:?}"
            );
        }
        assert!(!Path::new(&elsewhere).exists());
        assert_eq!(
            store.list_runs(&RunFilter::default()).await.unwrap().len(),
            1
        );
    });
}

#[test]
fn every_view_can_be_asked() {
    check(|dir| async move {
        let store = open(&dir).await;
        begin(&store, "digits", "d1").await;
        let views = store
            .query("select name from sqlite_schema where type = 'view'")
            .await
            .unwrap();
        assert!(views.len() >= 10);
        for view in views.objects().as_array().unwrap() {
            let view = view["name"].as_str().unwrap();
            store.query(&format!("select * from {view}")).await.unwrap();
        }
    });
}

#[test]
fn many_processes_open_one_new_store_at_once() {
    check(|dir| async move {
        let mut children: Vec<_> = (0..16)
            .map(|_| {
                Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "store::tests::child_that_begins_a_run"])
                    .env("RETORT_TEST_CHILD_STORE", &dir)
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .spawn()
                    .expect("this very program")
            })
            .collect();
        // And as many tasks of this process.
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let dir = dir.clone();
            tasks.spawn(async move { open(&dir).await.begin_run(&a_run("task")).await.unwrap() });
        }
        let mut ids: HashSet<_> = tasks.join_all().await.into_iter().collect();
        assert_eq!(ids.len(), 16);
        for child in &mut children {
            assert!(child.wait().unwrap().success());
        }
        ids.extend(
            open(&dir)
                .await
                .list_runs(&RunFilter::default())
                .await
                .unwrap()
                .into_iter()
                .map(|run| run.id),
        );
        assert_eq!(ids.len(), 32);
    });
}

#[test]
fn an_older_schema_is_migrated_and_a_newer_one_refused() {
    check(|dir| async move {
        let first: &'static str = schema::MIGRATIONS[0];
        let later: &[&'static str] = &[
            first,
            "alter table runs add column mood text not null default 'fine'",
        ];
        let store = open(&dir).await;
        let run = store.begin_run(&a_run("digits")).await.unwrap();
        store.close().await;
        schema::migrate(&dir, later).await.unwrap();
        schema::migrate(&dir, later).await.unwrap();

        let path = schema::path_of(&dir);
        let mut connection = SqliteConnectOptions::new()
            .filename(&path)
            .connect()
            .await
            .unwrap();
        let (id, mood): (String, String) = sqlx::query_as("select id, mood from runs")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!((id, mood), (run.0, "fine".to_owned()));
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(
                matches!(
                    error,
                    StoreError::NewerSchema {
                        found: 2,
                        known: 1,
                        ..
                    }
                ),
                "{error}"
            );
        }
    });
}

#[test]
fn a_migration_that_fails_leaves_the_store_as_it_was() {
    check(|dir| async move {
        open(&dir).await.close().await;
        let broken: &[&'static str] = &[
            schema::MIGRATIONS[0],
            "drop table logs; drop table no_such_table",
        ];
        assert!(schema::migrate(&dir, broken).await.is_err());
        let store = open(&dir).await;
        assert_eq!(store.log(AttemptId(1)).await.unwrap(), []);
    });
}

#[test]
fn what_is_no_store_is_told_apart() {
    check(|dir| async move {
        let missing = Store::open(&dir, Access::ReadOnly).await.unwrap_err();
        assert!(matches!(missing, StoreError::Missing { .. }), "{missing}");
        assert!(!dir.exists(), "reading makes nothing");

        std::fs::create_dir(&dir).unwrap();
        let path = schema::path_of(&dir);
        std::fs::write(
            &path,
            "no database, but long enough to be taken for one by its size. ".repeat(40),
        )
        .unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
        }

        std::fs::remove_file(&path).unwrap();
        let foreign = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true);
        let mut connection = foreign.connect().await.unwrap();
        sqlx::query("create table cooking_recipes (name text)")
            .execute(&mut connection)
            .await
            .unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(matches!(error, StoreError::NotAStore { .. }), "{error}");
        }
    });
}

#[test]
fn a_file_in_the_place_of_the_directory_is_named() {
    check(|dir| async move {
        std::fs::write(&dir, "a file").unwrap();
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            assert!(
                matches!(error, StoreError::Io { .. } | StoreError::Missing { .. }),
                "{error}"
            );
            assert!(error.to_string().contains("store"), "{error}");
        }
    });
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
