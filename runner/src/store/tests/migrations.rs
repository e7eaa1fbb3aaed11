//! Stores of other schemas, and directories that hold none.

use super::*;

/// The database of a new store as the first version made it.
async fn of_the_first_schema(dir: &Path) -> SqliteConnection {
    let first = &schema::MIGRATIONS[..1];
    schema::migrate(dir, first).await.unwrap();
    connect(&connection::path_of(dir)).await
}

#[test]
fn a_store_of_the_first_schema_is_taken_along() {
    check(|dir| async move {
        let mut old = of_the_first_schema(&dir).await;
        let holder = holder::Holder::this_process();
        sqlx::raw_sql(
            "insert into runs (key, id, recipe, recipe_path, recipe_text, resolved, seed, command, environment, state, created)
                 values (1, 'r1', 'digits', '/r.yaml', 'text', '{\"a\": 1}', 3, '[]', '{\"host\": \"h\"}', 'running', 5);
             insert into params values (1, 'stages.distill.steps', 7, 'integer', 'default');
             insert into stages (key, run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed,
                 options, inputs, state) values (1, 1, 0, 'distill', 'k', 'p', '1', 'h', 'cpu', 'f32', 0, '{}', '[]', 'running');
             insert into attempts (key, stage, number, digest, worker_pid, state, started) values (1, 1, 1, 'd', 1, 'running', 5);
             insert into series (key, attempt, name, base, last_step, last, min, max) values (1, 1, 'loss', 100, 9999, 0.5, 0.5, 1);
             with recursive n(i) as (select 0 union all select i + 1 from n where i < 9999)
             insert into points select 1, i, case when i = 7 then null else i / 8.0 end, i * 3 from n;",
        )
        .execute(&mut old)
        .await
        .unwrap();
        sqlx::query("insert into leases values (1, ?1, ?2, ?3, ?4, ?5, 5)")
            .bind(&holder.host)
            .bind(&holder.boot)
            .bind(&holder.pid_namespace)
            .bind(holder.pid)
            .bind(holder.process_started.cast_signed())
            .execute(&mut old)
            .await
            .unwrap();
        old.close().await.unwrap();

        // An older program is using it.
        let refused = Store::open(&dir, Access::ReadWrite).await.unwrap_err();
        assert!(matches!(refused, StoreError::InUse), "{refused}");
        let mut old = connect(&connection::path_of(&dir)).await;
        sqlx::query("update leases set process_started = process_started + 1")
            .execute(&mut old)
            .await
            .unwrap();
        old.close().await.unwrap();

        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let run = RunId("r1".into());
        let points = store.metric_series(&run, "distill/loss").await.unwrap();
        assert_eq!(points.len(), 10_000);
        assert!(points[7].value.is_nan());
        assert_eq!(
            (points[9].step, points[9].value, points[9].at),
            (9, 9.0 / 8.0, Time(127))
        );
        assert_eq!(store.last_metrics(&run).await.unwrap()[0].points, 10_000);
        let detail = store.run_detail(&run).await.unwrap();
        assert_eq!(
            (detail.recipe_text.as_str(), detail.resolved),
            ("text", json!({"a": 1}))
        );
        assert_eq!(detail.params[0].value, json!(7));
        assert_eq!(detail.summary.state, RunState::Lost);
        let filter = RunFilter {
            expr: Some(
                crate::filter::parse("metrics.loss.last = 0.5 and params.distill.steps = 7")
                    .unwrap(),
            ),
            ..RunFilter::default()
        };
        assert_eq!(store.list_runs(&filter).await.unwrap().len(), 1);
        // Rows go with their run.
        store.close().await;
        let store = open(&dir).await;
        store.remove_runs(&[run]).await.unwrap();
        let left: i64 = sqlx::query_scalar(
            "select (select count(*) from params) + (select count(*) from results) + (select count(*) from packs)",
        )
        .fetch_one(store.pool())
        .await
        .unwrap();
        assert_eq!(left, 0);

        let backup = dir.join("history.schema1.backup.db");
        let mut backup = connect(&backup).await;
        let kept: i64 = sqlx::query_scalar("select count(*) from points")
            .fetch_one(&mut backup)
            .await
            .unwrap();
        assert_eq!(kept, 10_000);
    });
}

/// First and last step, points, sum, least and greatest value, first and last moment.
type Span = (i64, i64, i64, Option<f64>, f64, f64, i64, i64);

#[test]
fn long_series_of_an_older_store_get_spans() {
    check(|dir| async move {
        schema::migrate(&dir, &schema::MIGRATIONS[..9])
            .await
            .unwrap();
        let mut old = connect(&connection::path_of(&dir)).await;
        sqlx::raw_sql(
            "insert into runs (key, id, recipe, recipe_path, seed, command, state, created)
                 values (1, 'r1', 'digits', '/r.yaml', 3, '[]', 'succeeded', 5);
             insert into stages (key, run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed,
                 options, inputs, state) values (1, 1, 0, 'distill', 'k', 'p', '1', 'h', 'cpu', 'f32', 0, '{}', '[]', 'succeeded');
             insert into attempts (key, stage, number, digest, worker_pid, state, started) values (1, 1, 1, 'd', 1, 'succeeded', 5);
             insert into series (key, attempt, name, base, last_step, points)
                 values (1, 1, 'loss', 0, 1999, 2000), (2, 1, 'short', 0, 639, 640);
             with recursive n(i) as (select 0 union all select i + 1 from n where i < 199)
             insert into blocks (series, first_step, last_step, points, numbers, sum, min, max, first_at, last_at, pack)
             select s.key, i * 10, i * 10 + 9, 10, 10, iif(i = 70, null, 1), -i, i, i, i + 1, i
             from n join series s on s.key = 1 or i < 64;",
        )
        .execute(&mut old)
        .await
        .unwrap();
        old.close().await.unwrap();
        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let spans: Vec<Span> = sqlx::query_as(
            "select first_step, last_step, points, sum, min, max, first_at, last_at from spans order by series, first_step",
        )
        .fetch_all(store.pool())
        .await
        .unwrap();
        // The last block may still grow, so the short series has none.
        assert_eq!(
            spans,
            [
                (0, 639, 640, Some(64.0), -63.0, 63.0, 0, 64),
                (640, 1279, 640, None, -127.0, 127.0, 64, 128),
                (1280, 1919, 640, Some(64.0), -191.0, 191.0, 128, 192),
            ]
        );
    });
}

#[test]
fn many_processes_migrate_one_old_store_at_once() {
    check(|dir| async move {
        let mut old = of_the_first_schema(&dir).await;
        sqlx::raw_sql(
            "insert into runs (key, id, recipe, recipe_path, recipe_text, resolved, seed, command, environment, state, created)
                 values (1, 'r1', 'digits', '/r.yaml', 'text', '{}', 3, '[]', '{}', 'succeeded', 5);
             insert into stages (key, run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed,
                 options, inputs, state) values (1, 1, 0, 'distill', 'k', 'p', '1', 'h', 'cpu', 'f32', 0, '{}', '[]', 'succeeded');
             insert into attempts (key, stage, number, digest, worker_pid, state, started) values (1, 1, 1, 'd', 1, 'succeeded', 5);
             insert into series (key, attempt, name, base, last_step, last, min, max) values (1, 1, 'loss', 100, 99999, 0.5, 0.5, 1);
             with recursive n(i) as (select 0 union all select i + 1 from n where i < 99999)
             insert into points select 1, i, i / 8.0, i * 3 from n;",
        )
        .execute(&mut old)
        .await
        .unwrap();
        old.close().await.unwrap();

        assert_eq!(crowd(&dir).await.len(), 81);
        let store = open(&dir).await;
        let points = store.metric_series(&RunId("r1".into()), "loss").await;
        assert_eq!(points.unwrap().len(), 100_000);
        // Copied once, as it was: the second process found the work done.
        let copies = std::fs::read_dir(&dir).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            name.to_string_lossy().contains("backup")
        });
        assert_eq!(copies.count(), 1);
        let mut backup = connect(&dir.join("history.schema1.backup.db")).await;
        let kept: (i64, i64) =
            sqlx::query_as("select (select count(*) from runs), (select count(*) from points)")
                .fetch_one(&mut backup)
                .await
                .unwrap();
        assert_eq!(kept, (1, 100_000));
    });
}

#[test]
fn an_older_schema_is_migrated_and_a_newer_one_refused() {
    check(|dir| async move {
        let mood = "alter table runs add column mood text not null default 'fine'";
        let later = &[schema::MIGRATIONS, &[mood]].concat();
        let store = open(&dir).await;
        let run = store.begin_run(&a_run("digits")).await.unwrap();
        succeed(&store, &run).await;
        store.close().await;
        schema::migrate(&dir, later).await.unwrap();
        schema::migrate(&dir, later).await.unwrap();

        let path = connection::path_of(&dir);
        let mut connection = connect(&path).await;
        let (id, mood): (String, String) = sqlx::query_as("select id, mood from runs")
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!((id, mood), (run.0, "fine".to_owned()));
        let newest = schema::newest(schema::MIGRATIONS);
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let error = Store::open(&dir, access).await.unwrap_err();
            let StoreError::NewerSchema { found, known, .. } = error else {
                panic!("{error}")
            };
            assert_eq!((found, known), (newest + 1, newest));
        }
    });
}

#[test]
fn a_migration_that_fails_leaves_the_store_as_it_was() {
    check(|dir| async move {
        open(&dir).await.close().await;
        let broken = &[
            schema::MIGRATIONS,
            &["drop table logs; drop table no_such_table"],
        ];
        assert!(schema::migrate(&dir, &broken.concat()).await.is_err());
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
        let path = connection::path_of(&dir);
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
