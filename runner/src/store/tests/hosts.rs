//! Two machines and one store: the other one is simulated by its files in `hosts`.

use super::*;

/// Says that another machine has the store, from now on.
fn take(dir: &Path, number: u64) {
    let other = json!({
        "host": "login2", "boot": "another", "pid": 4711, "at": Time::now().0, "free": false
    });
    std::fs::write(dir.join(format!("hosts/{number}")), other.to_string()).unwrap();
}

/// What is written in the database and in its log.
fn written(dir: &Path) -> [Vec<u8>; 2] {
    ["history.db", "history.db-wal"].map(|name| std::fs::read(dir.join(name)).unwrap_or_default())
}

fn is_elsewhere<T: std::fmt::Debug>(result: Result<T, StoreError>) {
    let error = result.unwrap_err();
    assert!(
        matches!(&error, StoreError::Elsewhere { host, .. } if host == "login2"),
        "{error}"
    );
}

#[test]
fn a_machine_that_has_lost_the_store_writes_nothing_more() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, _, attempt) = begin(&store, "digits", "d").await;
        sqlx::raw_sql("update runs set state = 'lost'")
            .execute(store.pool())
            .await
            .unwrap();
        // It was stopped in the middle of a transaction, and another machine has taken the store since.
        let begun = store.write().await.unwrap();
        take(&dir, 7);
        store.host_lock.as_ref().unwrap().disbelieve();
        let before = written(&dir);
        is_elsewhere(begun.commit().await);
        is_elsewhere(store.heartbeat(&run).await);
        is_elsewhere(store.append_log(attempt, &[]).await);
        is_elsewhere(store.finish_run(&run, RunState::Failed, None).await);
        is_elsewhere(store.check_host().await);
        assert!(store.remember_files(&a_folder()).await.is_err());
        store.close().await;
        drop(store);
        assert!(before == written(&dir), "not even when it is closed");
    });
}

fn a_folder() -> std::collections::BTreeMap<String, crate::input::Folder> {
    [("/data".to_owned(), crate::input::Folder::default())].into()
}

#[test]
fn a_heart_beats_where_the_database_takes_nothing() {
    check(|dir| async move {
        let store = open(&dir).await;
        let run = store.begin_run(&a_run("digits")).await.unwrap();
        let beat = || {
            let text = std::fs::read_to_string(dir.join("hosts/0")).unwrap();
            let host: serde_json::Value = serde_json::from_str(text.trim()).unwrap();
            host["at"].as_i64().unwrap()
        };
        let mut other = connect(&dir.join("history.db")).await;
        sqlx::raw_sql("begin immediate")
            .execute(&mut other)
            .await
            .unwrap();
        let before = beat();
        tokio::time::sleep(Duration::from_millis(5)).await;
        // It waits for the other one. It has claimed the store before.
        let mut heartbeat = Box::pin(store.heartbeat(&run));
        let said = async {
            while beat() <= before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            ended = &mut heartbeat => panic!("{ended:?}"),
            () = said => {}
        }
        let waited = tokio::time::timeout(Duration::from_millis(300), heartbeat).await;
        assert!(waited.is_err());
    });
}

#[test]
fn who_reads_writes_nothing_to_a_store_that_another_machine_has() {
    check(|dir| async move {
        let store = open(&dir).await;
        let (run, stage, _) = begin(&store, "digits", "d").await;
        store.close().await;
        drop(store);
        let reader = Store::open(&dir, Access::ReadOnly).await.unwrap();
        let left = DetachedJobs {
            run: run.clone(),
            detached: true,
            jobs: vec![1],
            names: Vec::new(),
        };
        let hosts = || std::fs::read_dir(dir.join("hosts")).unwrap().count();
        let shown = async || {
            let detail = reader.run_detail(&run).await.unwrap();
            let shown = &detail.stages[0];
            assert_eq!(shown.id, stage);
            let waiting = shown.attempts[0].waiting.clone();
            (
                detail.summary.state,
                shown.state,
                waiting,
                detail.summary.error,
            )
        };
        // It may: this machine takes the store for a moment, and only if there is something to write.
        let known = hosts();
        reader
            .scheduler_says(&left, Some("Priority"))
            .await
            .unwrap();
        let queued = (
            RunState::Queued,
            StageState::Queued,
            Some("Priority".to_owned()),
            None,
        );
        assert_eq!(shown().await, queued);
        let noted = hosts();
        assert!(noted > known);
        reader
            .scheduler_says(&left, Some("Priority"))
            .await
            .unwrap();
        assert_eq!(hosts(), noted, "nothing was new");
        reader.check_host().await.unwrap();

        take(&dir, 70);
        let before = written(&dir);
        is_elsewhere(reader.check_host().await);
        is_elsewhere(reader.scheduler_says(&left, None).await);
        let running = (RunState::Running, StageState::Running, None, None);
        assert_eq!(shown().await, running, "it is shown all the same");
        let states = |state| RunFilter {
            states: vec![state],
            ..RunFilter::default()
        };
        let found = reader.list_runs(&states(RunState::Running)).await.unwrap();
        assert_eq!(found.len(), 1);
        is_elsewhere(reader.scheduler_says(&left, Some("Resources")).await);
        let waits = (
            RunState::Queued,
            StageState::Queued,
            Some("Resources".to_owned()),
            None,
        );
        assert_eq!(shown().await, waits);
        is_elsewhere(reader.scheduler_is_done(&left, Some("time limit")).await);
        let (state, stage, _, error) = shown().await;
        assert_eq!((state, stage), (RunState::Interrupted, StageState::Skipped));
        assert!(error.unwrap().contains("have ended (time limit)"));
        let found = reader.list_runs(&states(RunState::Interrupted)).await;
        assert_eq!(found.unwrap().len(), 1);
        assert_eq!(reader.run_to_resume(&[]).await.unwrap(), run);
        is_elsewhere(reader.remember_files(&a_folder()).await);
        assert!(before == written(&dir));
    });
}
