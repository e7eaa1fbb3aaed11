//! Stores merged, pruned and rescued.

use super::*;

/// A store with two runs, of which the second reuses a stage of the first.
async fn a_pair(store: &Store) -> (RunId, RunId) {
    let (first, _, attempt) = begin(store, "digits", "d1").await;
    let file = artifact_file(store, "some bytes");
    store.record_artifact(attempt, &file).await.unwrap();
    store
        .append_metrics(attempt, &losses(&[a_point(1, f64::NAN), a_point(2, 0.5)]))
        .await
        .unwrap();
    let line = LogLine {
        at: Time(5),
        level: 2,
        source: LogSource::Stderr,
        text: "odd".into(),
    };
    store.append_log(attempt, &[line]).await.unwrap();
    store
        .finish_attempt(attempt, &an_end(AttemptState::Succeeded, Some(&file.hash)))
        .await
        .unwrap();
    succeed(store, &first).await;
    store.tag_run(&first, "best").await.unwrap();
    let mut new = a_run("digits");
    new.params.push(Param {
        path: "seed".into(),
        value: json!(3),
        origin: "default".into(),
    });
    let second = store.begin_run(&new).await.unwrap();
    let stage = store.add_stage(&second, &a_stage("again")).await.unwrap();
    store
        .stage_reused(stage, &hash("d1"), &json!({}), attempt)
        .await
        .unwrap();
    succeed(store, &second).await;
    (first, second)
}

/// An artifact whose files are in place.
fn artifact_file(store: &Store, text: &str) -> ArtifactRecord {
    let staging = store.dir().join("draft");
    std::fs::create_dir_all(&staging).unwrap();
    std::fs::write(staging.join("a"), text).unwrap();
    let contents = crate::artifact::commit(&staging, &store.dir().join("artifacts")).unwrap();
    ArtifactRecord {
        hash: contents.hash,
        size: contents.size,
        files: contents.files,
        ..an_artifact("")
    }
}

#[test]
fn two_stores_are_merged_by_way_of_a_file() {
    check(|dir| async move {
        let (here, there) = (
            open(&dir.join("here")).await,
            open(&dir.join("there")).await,
        );
        let (first, second) = a_pair(&here).await;
        let own = a_pair(&there).await;
        let file = dir.join("odd name % #1?.db");
        // The named run, and the one from which it reuses a stage.
        let runs = std::slice::from_ref(&second);
        let done = export(here.dir(), Some(runs), &file, true).await.unwrap();
        assert_eq!(done.runs, [first.clone(), second.clone()]);
        assert_eq!((done.artifacts.len(), done.lost.len()), (1, 0));

        std::fs::remove_dir_all(there.dir().join("artifacts")).unwrap();
        let done = there.import(&file).await.unwrap();
        assert_eq!(
            (done.runs.len(), done.known.len(), done.artifacts.len()),
            (2, 0, 1)
        );
        let again = there.import(&file).await.unwrap();
        assert_eq!(
            (again.runs.len(), again.known.len(), again.lost.len()),
            (0, 2, 0)
        );
        assert_eq!(
            there.list_runs(&RunFilter::default()).await.unwrap().len(),
            4
        );

        for run in [&first, &second] {
            // The keys differ, but everything that is shown is the same.
            let shown = async |store: &Store| {
                let mut detail =
                    serde_json::to_value(store.run_detail(run).await.unwrap()).unwrap();
                for stage in detail["stages"].as_array_mut().unwrap() {
                    stage["id"] = 0.into();
                    if stage["reused_from"].is_object() {
                        stage["reused_from"]["attempt"] = 0.into();
                    }
                    for attempt in stage["attempts"].as_array_mut().unwrap() {
                        attempt["id"] = 0.into();
                    }
                }
                for artifact in detail["artifacts"].as_array_mut().unwrap() {
                    artifact["attempt"] = 0.into();
                }
                detail
            };
            assert_eq!(shown(&here).await, shown(&there).await);
            let points = async |store: &Store| {
                format!("{:?}", store.metric_series(run, "loss").await.unwrap())
            };
            assert_eq!(points(&here).await, points(&there).await);
            assert!(points(&there).await.contains("NaN"));
        }
        assert_eq!(there.run_log(&first, 0, 9).await.unwrap().len(), 1);
        let hash = &here.list_artifacts(None).await.unwrap()[0].artifact;
        assert_eq!(
            crate::artifact::verify(&there.dir().join("artifacts").join(&hash.hash), hash),
            []
        );
        let filter = RunFilter {
            expr: Some(crate::filter::parse("metrics.again/loss.last = 0.5").unwrap()),
            ..RunFilter::default()
        };
        assert_eq!(there.list_runs(&filter).await.unwrap().len(), 2);
        // A whole store can be imported as well.
        let third = open(&dir.join("third")).await;
        there.close().await;
        let done = third
            .import(&connection::path_of(there.dir()))
            .await
            .unwrap();
        assert_eq!(done.runs.len(), 4);
        assert!(done.runs.contains(&own.0));
    });
}

/// Checks that each run is imported with everything that belongs to it, or not at all.
async fn whole_runs(store: &Store, of: &Store) -> usize {
    let runs = store.list_runs(&RunFilter::default()).await.unwrap();
    for run in &runs {
        let (detail, there) = (
            store.run_detail(&run.id).await.unwrap(),
            of.run_detail(&run.id).await.unwrap(),
        );
        assert_eq!(detail.stages.len(), there.stages.len());
        assert_eq!(detail.artifacts.len(), there.artifacts.len());
        for (stage, other) in detail.stages.iter().zip(&there.stages) {
            assert_eq!(stage.reused_from.is_some(), other.reused_from.is_some());
        }
        for row in &detail.artifacts {
            let place = store.dir().join("artifacts").join(&row.artifact.hash);
            assert_eq!(crate::artifact::verify(&place, &row.artifact), []);
        }
        let points = store.metric_series(&run.id, "loss").await;
        let expected = of.metric_series(&run.id, "loss").await;
        assert_eq!(
            points.map_or(0, |points| points.len()),
            expected.map_or(0, |points| points.len())
        );
    }
    runs.len()
}

#[test]
fn an_import_lets_others_write_and_leaves_whole_runs() {
    check(|dir| async move {
        let (here, there) = (
            open(&dir.join("here")).await,
            open(&dir.join("there")).await,
        );
        for _ in 0..3 {
            a_pair(&here).await;
        }
        // One reuses a stage of a run that began after it: the two come together.
        let early = here.begin_run(&a_run("digits")).await.unwrap();
        let reusing = here.add_stage(&early, &a_stage("again")).await.unwrap();
        let (last, _, attempt) = begin(&here, "digits", "d7").await;
        let made = artifact_file(&here, "other bytes");
        here.record_artifact(attempt, &made).await.unwrap();
        let end = an_end(AttemptState::Succeeded, Some(&made.hash));
        here.finish_attempt(attempt, &end).await.unwrap();
        here.stage_reused(reusing, &hash("d7"), &json!({}), attempt)
            .await
            .unwrap();
        succeed(&here, &early).await;
        succeed(&here, &last).await;
        let file = dir.join("file.db");
        export(here.dir(), None, &file, true).await.unwrap();
        let (mine, other) = a_pair(&there).await;
        std::fs::remove_dir_all(there.dir().join("artifacts")).unwrap();

        // Pieces of one run. Between them another process has the store to itself.
        let neighbour = open(there.dir()).await;
        let mut seen = Vec::new();
        let ended = there
            .import_by(&file, Duration::ZERO, async || {
                neighbour.note_run(&mine, "meanwhile").await?;
                seen.push(neighbour.list_runs(&RunFilter::default()).await?.len());
                match seen.len() {
                    3 => Err(StoreError::InUse),
                    _ => Ok(()),
                }
            })
            .await;
        assert!(matches!(ended, Err(StoreError::InUse)), "{ended:?}");
        assert_eq!(seen, [3, 4, 5]);
        let noted = there.run_detail(&mine).await.unwrap();
        assert_eq!(noted.summary.note, "meanwhile");
        neighbour.remove_runs(&[mine, other]).await.unwrap();
        assert_eq!(whole_runs(&there, &here).await, 3);

        let mut pauses = 0;
        let again = there
            .import_by(&file, Duration::ZERO, async || {
                pauses += 1;
                assert!(neighbour.problems().await?.is_empty());
                whole_runs(&neighbour, &here).await;
                Ok(())
            })
            .await
            .unwrap();
        assert_eq!((again.known.len(), again.runs.len(), pauses), (3, 5, 6));
        let all = (vec![made.hash.clone()], vec![]);
        assert_eq!((again.artifacts, again.lost), all);
        assert_eq!(whole_runs(&there, &here).await, 8);

        // Files that were not needed until then are collected at the same time.
        let third = open(&dir.join("third")).await;
        artifact_file(&third, "other bytes");
        let place = third.dir().join("artifacts").join(&made.hash);
        let done = third
            .import_by(&file, Duration::ZERO, async || {
                let _ = std::fs::remove_dir_all(&place);
                Ok(())
            })
            .await
            .unwrap();
        let said = format!("artifact {}: its files were removed meanwhile", made.hash);
        assert!(done.lost.len() == 1 && done.lost[0].starts_with(&said));
        let done = third.import(&file).await.unwrap();
        assert_eq!((done.artifacts, done.lost), all);
        assert_eq!(whole_runs(&third, &here).await, 8);
    });
}

#[test]
fn runs_are_removed_with_everything_that_only_they_have() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (first, second) = a_pair(&store).await;
        assert_eq!(
            store
                .dependents(std::slice::from_ref(&first))
                .await
                .unwrap(),
            std::slice::from_ref(&second)
        );
        assert_eq!(
            store
                .dependents(&[first.clone(), second.clone()])
                .await
                .unwrap(),
            []
        );
        assert_eq!(store.garbage().await.unwrap().artifacts, [""; 0]);
        store.remove_runs(&[first.clone(), second]).await.unwrap();
        for table in [
            "runs",
            "documents",
            "stages",
            "attempts",
            "series",
            "blocks",
            "spans",
            "packs",
            "logs",
            "results",
            "params",
        ] {
            let sql = format!("select count(*) from {table}");
            let left: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql))
                .fetch_one(store.pool())
                .await
                .unwrap();
            assert_eq!(left, 0, "{table}");
        }
        let garbage = store.garbage().await.unwrap();
        assert_eq!(garbage.artifacts.len(), 1);
        store
            .collect_garbage(|garbage| {
                std::fs::remove_dir_all(dir.join("artifacts")).unwrap();
                garbage.artifacts.clone()
            })
            .await
            .unwrap();
        assert_eq!(store.garbage().await.unwrap().artifacts.len(), 0);

        let (alive, _, _) = begin(&store, "digits", "d2").await;
        assert!(matches!(
            store.remove_runs(&[alive]).await,
            Err(StoreError::InUse)
        ));
        let collected = store
            .collect_garbage(|_| panic!("not while a run is under way"))
            .await;
        assert!(matches!(collected, Err(StoreError::InUse)));
    });
}

#[test]
fn what_is_left_of_a_damaged_store_is_saved() {
    check(|dir| async move {
        let store = open(&dir).await;
        for number in 0..60 {
            let (run, _, attempt) = begin(&store, &format!("recipe {number}"), "d").await;
            let points: Vec<_> = (0..500)
                .map(|step| a_point(step, f64::from(number) + 0.1))
                .collect();
            store
                .append_metrics(attempt, &losses(&points))
                .await
                .unwrap();
            succeed(&store, &run).await;
        }
        store.close().await;
        let path = connection::path_of(&dir);
        let mut bytes = std::fs::read(&path).unwrap();
        // Every fifth page of the later half: in the earlier one is the schema, without which nothing can be read.
        let pages = bytes.len() / 4096;
        for page in (pages / 2..pages).step_by(5) {
            bytes[page * 4096..][..4096].fill(0xa5);
        }
        std::fs::write(&path, bytes).unwrap();

        let store = Store::open(&dir, Access::ReadOnly).await.unwrap();
        assert!(
            !store
                .problems()
                .await
                .unwrap_or(vec!["unreadable".into()])
                .is_empty()
        );
        store.close().await;
        let saved = dir.with_extension("saved");
        let done = export(&dir, None, &saved, false).await.unwrap();
        assert!(!done.lost.is_empty() && done.runs.len() > 10, "{done:?}");
        let fresh = open(&dir.with_extension("fresh")).await;
        let taken = fresh.import(&saved).await.unwrap();
        assert_eq!((taken.runs.len(), taken.lost.len()), (done.runs.len(), 0));
        assert_eq!(fresh.problems().await.unwrap(), [""; 0]);
        let runs = fresh.list_runs(&RunFilter::default()).await.unwrap();
        let mut points = 0;
        for run in &runs {
            fresh.run_detail(&run.id).await.unwrap();
            points += fresh.metric_series(&run.id, "loss").await.unwrap().len();
        }
        assert!(points > 500 * 10, "{points}");
    });
}
