//! Finding runs: by filters, by references, by statements of the user's own.

use super::*;

/// Four runs: one that failed, two that succeeded, and one without anything.
async fn four_runs(dir: &Path) -> Store {
    let store = open(dir).await;
    for (number, (recipe, steps, loss)) in [
        ("a", json!(1000), 0.5),
        ("b", json!(2000), f64::NAN),
        ("c", json!("many"), 0.25),
    ]
    .into_iter()
    .enumerate()
    {
        let mut new = a_run(recipe);
        for (path, value) in [
            ("stages.distill.steps", steps),
            ("stages.distill.fast", json!(number == 1)),
        ] {
            new.params.push(Param {
                path: path.into(),
                value,
                origin: "default".into(),
            });
        }
        let run = store.begin_run(&new).await.unwrap();
        let stage = store.add_stage(&run, &a_stage("distill")).await.unwrap();
        let attempt = store
            .begin_attempt(stage, "d", &json!({}), 1)
            .await
            .unwrap();
        let points = [a_point(1, 9.0), a_point(2, loss)];
        store
            .append_metrics(attempt, &losses(&points))
            .await
            .unwrap();
        let end = if number == 0 {
            AttemptState::Failed
        } else {
            AttemptState::Succeeded
        };
        store
            .finish_attempt(attempt, &an_end(end, None))
            .await
            .unwrap();
        let state = if number == 0 {
            RunState::Failed
        } else {
            RunState::Succeeded
        };
        store
            .finish_run(&run, state, (number == 0).then_some("it fell over"))
            .await
            .unwrap();
        if number == 2 {
            store.tag_run(&run, "größte Idee").await.unwrap();
            store.note_run(&run, "100 % sure").await.unwrap();
        }
    }
    // One without anything.
    store.begin_run(&a_run("d")).await.unwrap();
    store
}

/// The recipes of the runs that pass a filter, one letter each, the first in the list last.
async fn recipes(store: &Store, filter: &str, sort: &str) -> Result<String, StoreError> {
    let sort = (!sort.is_empty()).then(|| Sort {
        name: crate::filter::parse_name(sort.trim_start_matches('-')).unwrap(),
        descending: sort.starts_with('-'),
    });
    let filter = RunFilter {
        expr: Some(crate::filter::parse(filter).unwrap()),
        sort: sort.into_iter().collect(),
        ..RunFilter::default()
    };
    let found = store.list_runs(&filter).await?;
    Ok(found.iter().rev().map(|run| run.recipe.as_str()).collect())
}

#[test]
fn runs_are_found_by_what_they_were_and_became() {
    check(|dir| async move {
        let store = four_runs(&dir).await;
        for (filter, expected) in [
            ("metrics.loss.last < 3", "ac"),
            ("metrics.distill/loss < 0.3 and state = succeeded", "c"),
            ("metrics.distill.loss = nan", "b"),
            ("metrics.loss.last != nan", "ac"),
            ("metrics.loss.max >= 9", "abc"),
            ("metrics.loss.points = 2", "abc"),
            ("not metrics.loss.last < 0.3", "abd"),
            ("metrics.loss", "abc"),
            ("not metrics.loss", "d"),
            ("params.distill.steps >= 1000", "ab"),
            ("params.distill.steps = many", "c"),
            ("params.distill.steps > 5", "ab"),
            ("params.distill.steps < zzz", "c"),
            ("params.distill.steps > 'a'", "c"),
            ("metrics.loss < abc", ""),
            ("metrics.loss > 'a'", ""),
            ("params.steps > 1500 or metrics.loss < 0.3", "bc"),
            ("params.stages.distill.steps != 1000", "bc"),
            ("params.fast = true", "b"),
            ("recipe in (a, c) and not recipe = a", "c"),
            ("recipe not in (a, c)", "bd"),
            ("status = failed or state = queued", "ad"),
            ("tag = 'größte Idee'", "c"),
            ("tag != 'größte Idee'", "abd"),
            ("tag ~ IDEE", "c"),
            ("tag", "c"),
            ("note ~ '100 %'", "c"),
            ("note ~ '1*sure'", "c"),
            ("error ~ fell", "a"),
            ("not error", "bcd"),
            (
                "stage = distill and kind = distill and plugin = candle and device = cpu",
                "abc",
            ),
            ("stage.distill.state = failed", "a"),
            ("env.host = here", "abcd"),
            ("age < 1h and started > 2020-01-01 and took < 10m", "abcd"),
            ("age > 1h", ""),
            ("not age > 1h", "abcd"),
            ("age >= 1h or not started < 2020-01-01", "abcd"),
            ("finished", "abc"),
            ("stages = 1 and reused = 0", "abc"),
        ] {
            let found = recipes(&store, filter, "")
                .await
                .unwrap_or_else(|error| panic!("{filter}: {error}"));
            assert_eq!(found, expected, "{filter}");
        }
    });
}

#[test]
fn found_runs_are_sorted() {
    check(|dir| async move {
        let store = four_runs(&dir).await;
        let ask = async |filter: &str, sort: &str| recipes(&store, filter, sort).await;
        // Runs without a value come last; here the order is reversed.
        assert_eq!(
            ask("recipe", "metrics.loss.last").await.unwrap(),
            "bdac".chars().collect::<String>()
        );
        assert_eq!(ask("recipe", "-recipe").await.unwrap(), "abcd");
        assert_eq!(ask("metrics.loss", "started").await.unwrap(), "cba");
        assert_eq!(ask("metrics.loss", "-started").await.unwrap(), "abc");
        // Rows of a name are gone through, rows of another looked up.
        assert_eq!(
            ask("metrics.loss and params.steps >= 0", "-params.steps")
                .await
                .unwrap(),
            "ab"
        );
        assert_eq!(
            ask(
                "params.steps and (metrics.loss < 0.3 or not tag)",
                "metrics.loss.max"
            )
            .await
            .unwrap(),
            "abc"
        );
    });
}

#[test]
fn filters_that_make_no_sense_are_explained() {
    check(|dir| async move {
        let store = four_runs(&dir).await;
        for (filter, message, hint, place) in [
            (
                "stats = failed",
                "there is no field `stats`",
                "`state`",
                0..5,
            ),
            (
                "state = faild",
                "unknown run state `faild`",
                "`failed`",
                8..13,
            ),
            (
                "recipe = a and metrics.los < 3",
                "no run has a metric `los`",
                "`loss`",
                15..26,
            ),
            (
                "params.distill.step = 3",
                "no run has a parameter `distill.step`",
                "`distill.steps`",
                0..19,
            ),
            ("started > soon", "expected a date", "age", 10..14),
            ("took < long", "expected seconds", "", 7..11),
            ("tag < a", "expected =", "no order", 6..7),
            (
                "stage.distill.colour = red",
                "there is no column of a stage `colour`",
                "state",
                0..20,
            ),
        ] {
            let Err(StoreError::Filter(error)) = recipes(&store, filter, "").await else {
                panic!("{filter} is understood")
            };
            assert!(
                error.message.starts_with(message),
                "{filter}: {}",
                error.message
            );
            let hinted = error.hint.clone().unwrap_or_default();
            assert!(hinted.contains(hint), "{filter}: {hinted}");
            assert_eq!((&error.at, error.text.as_str()), (&place, filter));
        }
    });
}

#[test]
fn columns_of_found_runs_have_their_values() {
    check(|dir| async move {
        let store = four_runs(&dir).await;
        let columns = ["metrics.loss.min", "params.distill.steps", "tag"];
        let filter = RunFilter {
            columns: columns
                .iter()
                .map(|name| crate::filter::parse_name(name).unwrap())
                .collect(),
            limit: Some(2),
            ..RunFilter::default()
        };
        let found = store.list_runs(&filter).await.unwrap();
        assert_eq!(
            json!(found[0].values),
            json!({columns[0]: null, columns[1]: null, columns[2]: null})
        );
        assert_eq!(
            json!(found[1].values),
            json!({columns[0]: 0.25, columns[1]: "many", columns[2]: "größte Idee"})
        );
    });
}

#[test]
fn names_are_any_text() {
    check(|dir| async move {
        let store = open(&dir).await;
        for name in [
            "größte 損失",
            "it's \"so\", (a) = b | c",
            "two\nlines\tand \\ more",
            "🦀\u{202e}\u{0301}",
            "a.b/c d",
            " ",
            "and",
            "%_*?",
        ] {
            let mut new = a_run(name);
            new.params.push(Param {
                path: format!("stages.{name}.steps"),
                value: json!(name),
                origin: "default".into(),
            });
            let run = store.begin_run(&new).await.unwrap();
            let stage = store.add_stage(&run, &a_stage(name)).await.unwrap();
            let attempt = store
                .begin_attempt(stage, name, &json!({}), 1)
                .await
                .unwrap();
            let batch = Batch {
                series: name.into(),
                points: vec![a_point(7, 0.5)],
            };
            store.append_metrics(attempt, &[batch]).await.unwrap();
            store.tag_run(&run, name).await.unwrap();
            store.note_run(&run, name).await.unwrap();

            // Each piece between double quotes in quotes, and the double quotes in single ones.
            let quoted = format!("\"{}\"", name.replace('"', "\"'\"'\""));
            let filter = format!(
                "recipe = {quoted} and tag = {quoted} and note = {quoted} and metrics.{quoted}.last = 0.5 \
                 and params.stages.{quoted}.steps = {quoted} and stage = {quoted} and stage.{quoted}.state = running"
            );
            let filter = RunFilter {
                expr: Some(crate::filter::parse(&filter).unwrap()),
                ..RunFilter::default()
            };
            let found = store
                .list_runs(&filter)
                .await
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found.len(), 1, "{name}");
            assert_eq!(
                (&found[0].recipe, &found[0].tags, &found[0].note),
                (&name.to_owned(), &vec![name.to_owned()], &name.to_owned())
            );
            let points = store.metric_series(&run, name).await.unwrap();
            assert_eq!((points.len(), points[0].series.as_str()), (1, name));
            if !name.trim().is_empty() {
                assert_eq!(store.resolve_run(name).await.unwrap(), run, "{name}");
            }
        }
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

#[test]
fn a_statement_is_answered_and_cannot_write() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d1").await;
        store
            .append_metrics(
                attempt,
                &losses(&[a_point(1, f64::INFINITY), a_point(2, f64::NAN)]),
            )
            .await
            .unwrap();
        let answer = ask(&store, "select run, stage, step, value, x'00ff' as bytes, null as gap from v_metrics order by step")
            .await
            .unwrap();
        assert_eq!(
            answer.objects(),
            json!([
                {"run": run.0, "stage": "distill", "step": 1, "value": "Infinity", "bytes": "00ff", "gap": null},
                {"run": run.0, "stage": "distill", "step": 2, "value": null, "bytes": "00ff", "gap": null},
            ])
        );
        // A result without rows still has column names.
        let none = ask(&store, "select id, state from v_runs where false")
            .await
            .unwrap();
        assert_eq!(none.render(crate::table::Style::Csv), "id,state\n");

        let elsewhere = dir.join("elsewhere.db").display().to_string();
        for statement in [
            "delete from runs".to_owned(),
            "pragma query_only = off".to_owned(),
            "pragma query_only = off; delete from runs".to_owned(),
            format!("attach database '{elsewhere}' as elsewhere"),
            format!("attach database '{elsewhere}' as elsewhere; create table elsewhere.t (a)"),
            "no sql".to_owned(),
            "select * from no_table".to_owned(),
        ] {
            let answer = ask(&store, &statement).await;
            assert!(
                matches!(
                    answer,
                    Err(StoreError::Sql(_) | StoreError::SeveralStatements { .. })
                ),
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
        let views = ask(&store, "select name from sqlite_schema where type = 'view'")
            .await
            .unwrap();
        assert!(views.len() >= 10);
        for view in views.objects().as_array().unwrap() {
            let view = view["name"].as_str().unwrap();
            ask(&store, &format!("select * from {view}")).await.unwrap();
        }
    });
}

#[test]
fn the_latest_run_is_the_last_one_recorded() {
    check(|dir| async move {
        let store = open(&dir).await;
        let mut runs = Vec::new();
        for _ in 0..3 {
            runs.push(begin(&store, "digits", "d1").await.0);
        }
        // The clock was set back by a day before the last one, and was a day ahead in the second.
        for (run, days) in [(&runs[1], 1_i64), (&runs[2], -1)] {
            let moved = sqlx::query("update runs set created = created + ?2 where id = ?1");
            let moved = moved.bind(&run.0).bind(days * 86_400_000);
            moved.execute(store.pool()).await.unwrap();
        }
        for (reference, run) in [("latest", 2), ("latest~1", 1), ("latest~2", 0)] {
            assert_eq!(store.resolve_run(reference).await.unwrap(), runs[run]);
        }
        for run in &runs {
            store.tag_run(run, "mine").await.unwrap();
        }
        assert_eq!(store.resolve_run("mine").await.unwrap(), runs[2]);
        let listed = store.list_runs(&RunFilter::default()).await.unwrap();
        let listed: Vec<_> = listed.into_iter().map(|run| run.id).rev().collect();
        assert_eq!(listed, runs);
        let last = store.last_execution("digits", "distill").await.unwrap();
        assert_eq!(last.unwrap().run, runs[2]);
        let before = store
            .earlier_stage_record(&runs[2], "distill")
            .await
            .unwrap();
        assert_eq!(before.unwrap().run, runs[1]);
    });
}
