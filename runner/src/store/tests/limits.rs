//! Limits of connections to a store that somebody else may have written.

use super::*;

#[test]
fn connections_have_limits_of_their_own() {
    check(|dir| async move {
        let writing = open(&dir).await;
        let reading = Store::open(&dir, Access::ReadOnly).await.unwrap();
        for store in [&writing, &reading] {
            let mut connection = store.pool().acquire().await.unwrap();
            let longer = sqlx::query("select length(zeroblob(201326593))")
                .fetch_one(&mut *connection)
                .await;
            let said = StoreError::from(longer.map(drop).unwrap_err()).to_string();
            assert!(said.contains("longer than 192 MiB"), "{said}");
            sqlx::query("pragma writable_schema = on")
                .execute(&mut *connection)
                .await
                .unwrap();
            for off in ["pragma writable_schema", "pragma trusted_schema"] {
                let value: i64 = sqlx::query_scalar(off)
                    .fetch_one(&mut *connection)
                    .await
                    .unwrap();
                assert_eq!(value, 0, "{off}");
            }
        }
        let heap: i64 = sqlx::query_scalar("pragma hard_heap_limit")
            .fetch_one(reading.pool())
            .await
            .unwrap();
        assert!((1..=1 << 30).contains(&heap), "{heap}");
    });
}

#[test]
fn a_statement_ends_when_nobody_waits_for_it() {
    check(|dir| async move {
        open(&dir).await.close().await;
        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let endless = || {
            let sql = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n";
            sqlx::query(sql).fetch_one(store.pool())
        };
        // As many as there are connections.
        for _ in 0..2 {
            let abandoned = within(Duration::from_secs(600), endless());
            let answer = tokio::time::timeout(Duration::from_millis(50), abandoned).await;
            assert!(answer.is_err());
        }
        let free = store.list_runs(&RunFilter::default()).await;
        free.expect("a connection without a statement");
        let late = within(Duration::from_millis(50), endless()).await;
        let said = StoreError::from(late.map(drop).unwrap_err()).to_string();
        assert!(said.contains("took too long"), "{said}");
    });
}

#[test]
fn a_statement_that_writes_has_no_deadline() {
    check(|dir| async move {
        let counted: i64 = within(Duration::ZERO, async {
            let store = open(&dir).await;
            let long = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 100000) select count(*) from n";
            sqlx::query_scalar(long).fetch_one(store.pool()).await
        })
        .await
        .unwrap();
        assert_eq!(counted, 100_000);
    });
}

/// A history of `runs` runs of the recipe `digits` with a stage `s` each, every other one failed and the last one succeeded.
async fn long_history(store: &Store, runs: u32) {
    let sql = format!(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < {runs})
         insert into runs (id, recipe, recipe_path, seed, command, state, created, finished)
         select printf('z%09d', i), 'digits', '/r.yaml', i, '[]', iif(i % 2, 'failed', 'succeeded'), i, i from n;
         insert into stages
         (run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed, options, inputs, state, digest,
          components)
         select key, 0, 's', 'do', 'faulty', '1', 'x', 'cpu', 'f32', 1, '{{}}', '[]', 'succeeded', 'd', '{{}}' from runs"
    );
    let made = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(store.pool());
    made.await.unwrap();
}

/// Lets statements on every connection of a store take this many steps of SQLite's machine in all.
async fn limit_steps(store: &Store, steps: u64) {
    let mut connections = Vec::new();
    for _ in 0..store.pool().options().get_max_connections() {
        let mut connection = store.pool().acquire().await.unwrap();
        sandbox::limit_steps(&mut connection, steps).await.unwrap();
        connections.push(connection);
    }
}

/// Two runs that pass a filter, in an order.
fn two(filter: &str, sort: &str) -> RunFilter {
    let order = |sort: &str| Sort {
        name: crate::filter::parse_name(sort.trim_start_matches('-')).unwrap(),
        descending: sort.starts_with('-'),
    };
    RunFilter {
        limit: Some(2),
        expr: (!filter.is_empty()).then(|| crate::filter::parse(filter).unwrap()),
        sort: (!sort.is_empty())
            .then(|| order(sort))
            .into_iter()
            .collect(),
        ..RunFilter::default()
    }
}

async fn ids(store: &Store, filter: &RunFilter) -> Vec<String> {
    let found = store.list_runs(filter).await;
    let found = found.unwrap_or_else(|error| panic!("{filter:?}: {error}"));
    found.into_iter().map(|run| run.id.0).collect()
}

#[test]
fn the_newest_execution_is_found_without_the_whole_history() {
    check(|dir| async move {
        let store = open(&dir).await;
        long_history(&store, 10_000).await;
        // One step for each of the runs would be too many.
        limit_steps(&store, 2 * u64::from(sandbox::STEPS.unsigned_abs())).await;
        for _ in 0..3 {
            let last = store.last_execution("digits", "s").await.unwrap();
            assert_eq!(last.unwrap().run.0, "z000010000");
            assert_eq!(store.last_execution("other", "s").await.unwrap(), None);
        }
    });
}

#[test]
fn few_runs_are_listed_without_a_look_at_all() {
    check(|dir| async move {
        let store = open(&dir).await;
        long_history(&store, 10_000).await;
        store
            .tag_run(&RunId("z000000007".to_owned()), "best")
            .await
            .unwrap();
        // All the others began in 1970.
        for (id, created) in [("z000000005", Time::now().0), ("z000000006", -1)] {
            let moved = sqlx::query("update runs set created = ?2 where id = ?1");
            let moved = moved.bind(id).bind(created).execute(store.pool());
            moved.await.unwrap();
        }
        // Five steps for each of the runs would be too many.
        limit_steps(&store, 4 * u64::from(sandbox::STEPS.unsigned_abs())).await;
        for (filter, sort, expected) in [
            ("age < 1h", "", vec!["z000000005"]),
            ("age < 1h", "-started", vec!["z000000005"]),
            ("age < 1h and state = succeeded", "", vec![]),
            ("started > 2020-01-01", "", vec!["z000000005"]),
            ("started < 1970-01-01", "", vec!["z000000006"]),
            ("tag = best", "", vec!["z000000007"]),
            ("tag = best and age < 1h", "", vec![]),
            ("tag = worst", "", vec![]),
        ] {
            let wanted = RunFilter {
                limit: Some(20),
                ..two(filter, sort)
            };
            assert_eq!(ids(&store, &wanted).await, expected, "{filter}");
        }
        // Where there are many, the newest are found as before.
        let found = ids(&store, &two("age > 1h", "")).await;
        assert_eq!(found, ["z000010000", "z000009999"]);
    });
}

/// Gives each run number i of a history a result `loss`, with i % 5000 as its last value, -i as its least and i as its
/// greatest, and a parameter `stages.s.steps` with the value i. Each hundredth run has no result, another has NaN.
async fn with_values(store: &Store) {
    let sql = "insert into names (key, name) values (1001, 'loss'), (1002, 'stages.s.steps');
         insert into results (key, position, points, last, min, max)
         select 1001 << 32 | key, 0, 1, iif(key % 100 = 50, null, key % 5000), -key, key from runs where key % 100 <> 51;
         insert into params (key, value, type, origin)
         select 1002 << 32 | key, key, 'integer', 'default' from runs";
    sqlx::raw_sql(sql).execute(store.pool()).await.unwrap();
}

#[test]
fn a_list_ends_with_its_page() {
    check(|dir| async move {
        let store = open(&dir).await;
        long_history(&store, 10_000).await;
        with_values(&store).await;
        for (filter, sort, expected) in [
            // Of equal values the newest comes first.
            ("", "metrics.loss.last", vec![10_000, 5000]),
            ("", "-params.steps", vec![10_000, 9999]),
            ("state = failed", "params.steps", vec![1, 3]),
            ("state = failed", "started", vec![1, 3]),
            ("recipe = digits", "", vec![10_000, 9999]),
            ("recipe = other", "params.steps", vec![]),
            ("tag = none", "params.steps", vec![]),
            ("metrics.loss.last < 0", "-started", vec![]),
            (
                "recipe ~ digits and metrics.loss.last > 6000",
                "metrics.loss",
                vec![],
            ),
            ("params.steps = 77", "", vec![77]),
            ("params.steps > 9998", "params.steps", vec![9999, 10_000]),
            (
                "metrics.loss.last < 4000 and params.steps >= 2000",
                "metrics.loss.last",
                vec![10_000, 5000],
            ),
        ] {
            // Five steps for each of the runs would be too many.
            limit_steps(&store, 4 * u64::from(sandbox::STEPS.unsigned_abs())).await;
            let found = ids(&store, &two(filter, sort)).await;
            let expected: Vec<_> = expected.iter().map(|run| format!("z{run:09}")).collect();
            assert_eq!(found, expected, "`{filter}` by `{sort}`");
        }
        let digits = RunFilter {
            recipe: Some("digits".to_owned()),
            ..two("", "")
        };
        assert_eq!(ids(&store, &digits).await, ["z000010000", "z000009999"]);
    });
}

#[test]
fn a_filter_may_have_its_most_conditions() {
    check(|dir| async move {
        let store = open(&dir).await;
        long_history(&store, 20).await;
        with_values(&store).await;
        for condition in ["age > 1h", "params.steps > 0", "recipe = digits"] {
            let filter = [condition; 500].join(" and ");
            let found = store.find_runs(&two(&filter, "")).await;
            let found = found.unwrap_or_else(|error| panic!("{condition}: {error}"));
            assert_eq!(found.keys, [20, 19], "{condition}");
        }
    });
}

#[test]
fn every_way_finds_the_same_runs() {
    check(|dir| async move {
        let store = open(&dir).await;
        // More than the first ones that are looked at.
        long_history(&store, 3000).await;
        with_values(&store).await;
        for filter in [
            "state = failed",
            "metrics.loss.last < 100",
            "metrics.loss.max > 2990 and state = failed",
            "metrics.loss.max < 1500 and params.steps > 1495",
            "metrics.loss.max < 1500 and params.steps > 1500",
            "params.steps > 40 and metrics.loss.points = 1",
            "params.steps > 'a'",
            "not metrics.loss",
            "metrics.loss = nan",
            "recipe = digits and params.steps <= 60 and not state = failed",
        ] {
            for sort in [
                "",
                "started",
                "-started",
                "metrics.loss",
                "-metrics.loss.min",
                "-params.steps",
                "seconds",
            ] {
                // Without a limit, and without a condition that a run must pass, all are looked at.
                let all = RunFilter {
                    limit: None,
                    ..two(&format!("({filter}) or ({filter})"), sort)
                };
                let all = store.find_runs(&all).await.unwrap().keys;
                for skip in [0, 3, 2900] {
                    let page = RunFilter {
                        limit: Some(20),
                        skip,
                        ..two(filter, sort)
                    };
                    let found = store.find_runs(&page).await.unwrap().keys;
                    let rest = all.get(skip as usize..).unwrap_or_default();
                    let expected = &rest[..rest.len().min(20)];
                    assert_eq!(found, expected, "`{filter}` by `{sort}` from {skip}");
                    let count = store.count_matching(&page).await.unwrap();
                    assert_eq!(count, all.len() as u64, "{filter}");
                }
            }
        }
    });
}

#[test]
fn a_stage_that_a_recipe_never_had_is_not_searched_for() {
    check(|dir| async move {
        let store = open(&dir).await;
        long_history(&store, 10_000).await;
        let (other, _, _) = begin(&store, "other", "d").await;
        let newest = RunId("z000010000".to_owned());
        let earlier = store.earlier_stage_record(&newest, "s").await.unwrap();
        assert_eq!(earlier.unwrap().run.0, "z000009999");
        let last = store.last_execution("other", "distill").await.unwrap();
        assert_eq!(last.unwrap().run, other);
        // One step for each of the runs would be too many.
        limit_steps(&store, 2 * u64::from(sandbox::STEPS.unsigned_abs())).await;
        for stage in ["new", "distill"] {
            // Only the other recipe has one of these.
            assert_eq!(store.last_execution("digits", stage).await.unwrap(), None);
            let earlier = store.earlier_stage_record(&newest, stage).await.unwrap();
            assert_eq!(earlier, None);
        }
    });
}

#[test]
fn a_curve_reads_the_spans_of_a_long_series() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d").await;
        let first = losses(&[a_point(0, 1.0)]);
        store.append_metrics(attempt, &first).await.unwrap();
        let blocks = "delete from blocks;
             with recursive n(i) as (select 0 union all select i + 1 from n where i < 39999)
             insert into blocks (series, first_step, last_step, points, numbers, sum, min, max, first_at, last_at, pack)
             select (select key from series), i * 10, i * 10 + 9, 10, 9, 1, i, i, i * 10, i * 10 + 9, i from n";
        sqlx::raw_sql(blocks).execute(store.pool()).await.unwrap();
        let key: i64 = sqlx::query_scalar("select key from series")
            .fetch_one(store.pool())
            .await
            .unwrap();
        let mut connection = store.pool().acquire().await.unwrap();
        series::make_spans(&mut connection, key).await.unwrap();
        drop(connection);
        for axis in [Axis::Step, Axis::Time] {
            // Some steps for each block would be a million.
            limit_steps(&store, 40 * u64::from(sandbox::STEPS.unsigned_abs())).await;
            let query = CurveQuery {
                buckets: 1000,
                axis,
                from: 0,
                to: u64::MAX,
            };
            let curve = store.curve(&run, "loss", query).await.unwrap();
            assert!((500..=1000).contains(&curve.len()), "{}", curve.len());
            let points: u64 = curve.iter().map(|bucket| bucket.points).sum();
            let nan: u64 = curve.iter().map(|bucket| bucket.nan).sum();
            assert_eq!((points, nan), (400_000, 40_000));
            let mut next = 0;
            for bucket in &curve {
                assert_eq!(bucket.first_step, next);
                let within = (bucket.first_step / 10, bucket.last_step / 10);
                assert_eq!(bucket.min, Some(within.0 as f64));
                assert_eq!(bucket.max, Some(within.1 as f64));
                next = bucket.last_step + 1;
            }
            assert_eq!(next, 400_000);
        }
    });
}

#[test]
fn the_run_to_resume_is_found_in_one_pass() {
    check(|dir| async move {
        let store = open(&dir).await;
        let runs = 3000;
        long_history(&store, runs).await;
        // Some hundred steps for each run: with a look at all others for each that failed there would be many millions.
        limit_steps(&store, 300 * u64::from(runs)).await;
        assert_eq!(store.run_to_resume(&[]).await.unwrap().0, "z000003000");
        let failed =
            "update runs set state = 'failed' where id = 'z000002999' or id = 'z000003000'";
        sqlx::query(failed).execute(store.pool()).await.unwrap();
        assert_eq!(store.run_to_resume(&[]).await.unwrap().0, "z000003000");
        let resumed = "update runs set resumed_from = 'z000002999' where id = 'z000003000'";
        sqlx::query(resumed).execute(store.pool()).await.unwrap();
        let left = [RunId("z000002999".to_owned())];
        assert_eq!(store.run_to_resume(&left).await.unwrap().0, "z000003000");
        let other = "update runs set state = 'succeeded', recipe_path = '/other.yaml' where id = 'z000003000'";
        sqlx::query(other).execute(store.pool()).await.unwrap();
        // The one before has been resumed, and the recipe has succeeded since all the others.
        assert_eq!(store.run_to_resume(&left).await.unwrap().0, "z000003000");
        let apart = "update runs set resumed_from = null where id = 'z000003000'";
        sqlx::query(apart).execute(store.pool()).await.unwrap();
        assert_eq!(store.run_to_resume(&[]).await.unwrap().0, "z000002999");
    });
}
