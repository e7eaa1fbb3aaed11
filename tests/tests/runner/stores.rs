//! Stores in trouble: nothing is claimed that is not so, and the message says what to do.

use std::path::Path;
use std::process::Command;

use retort::store::{Access, RunState, Store};

use crate::lab::{Lab, block_on};

/// A file system of a given kind on a directory, as long as the value lives; none without the right to mount.
struct Mount<'p>(&'p Path);

impl<'p> Mount<'p> {
    fn new(dir: &'p Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(dir).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(dir)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(dir)),
            _ => {
                eprintln!(
                    "SKIPPED: no right to mount a tmpfs; run as root to try full and read-only disks"
                );
                None
            }
        }
    }

    fn read_only(&self) {
        let status = Command::new("mount")
            .args(["-o", "remount,ro"])
            .arg(self.0)
            .status()
            .unwrap();
        assert!(status.success());
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_full_disk() {
    let lab = Lab::new(&[
        "a: {kind: do, text: a}",
        "b: {kind: do, act: fill, input: a}",
    ]);
    let dir = lab.store_dir();
    let Some(_mount) = Mount::new(&dir, "size=4m") else {
        return;
    };
    let said = lab.run(&[]);
    // Either the stage notices, or the history does; both say it, and neither claims success.
    assert!(
        matches!(said.code, Some(100 | 1)),
        "{:?} {}",
        said.code,
        said.stderr
    );
    assert!(
        said.stderr.contains("No space left")
            || said.stderr.contains("disk with the store is full"),
        "{}",
        said.stderr
    );
    let detail = lab.latest().unwrap();
    assert!(
        matches!(detail.summary.state, RunState::Failed | RunState::Lost),
        "{:?}",
        detail.summary.state
    );
    // The space that the stage had taken is free again.
    assert_eq!(
        lab.outcomes(&["--set", "b.act=succeed"]),
        ["a reused", "b ran"]
    );
}

#[test]
fn no_space_at_all() {
    let lab = Lab::new(&["a: {kind: do, text: a}"]);
    let dir = lab.store_dir();
    let Some(_mount) = Mount::new(&dir, "size=16k") else {
        return;
    };
    lab.run(&[]).expect(1).saying(&["full"]);
}

#[test]
fn a_read_only_disk() {
    let lab = Lab::new(&["a: {kind: do, text: a}"]);
    let dir = lab.store_dir();
    let Some(mount) = Mount::new(&dir, "size=16m") else {
        return;
    };
    lab.run(&[]).expect(0);
    mount.read_only();
    lab.run(&[])
        .expect(1)
        .saying(&["cannot be written to", "--store"]);
    assert_eq!(
        lab.latest().unwrap().summary.state,
        RunState::Succeeded,
        "it can still be read"
    );
}

#[test]
fn a_store_of_a_newer_retort() {
    let lab = Lab::new(&["a: {kind: do, text: a}"]);
    lab.run(&[]).expect(0);
    block_on(async {
        let store = Store::open(&lab.store_dir(), Access::ReadWrite)
            .await
            .unwrap();
        sqlx::query("pragma user_version = 9999")
            .execute(store.pool())
            .await
            .unwrap();
        store.close().await;
    });
    lab.run(&[])
        .expect(1)
        .saying(&["newer retort", "update retort"]);
}

#[test]
fn something_else_under_the_name_of_the_store() {
    let lab = Lab::new(&["a: {kind: do, text: a}"]);
    std::fs::create_dir_all(lab.store_dir()).unwrap();
    std::fs::write(
        lab.store_dir().join("history.db"),
        "these are my notes, not a database, and they are long enough",
    )
    .unwrap();
    lab.run(&[]).expect(1).saying(&["not a retort history"]);
    lab.retort(&["doctor"]).expect(1);
}

#[test]
fn metrics_that_cannot_be_written_fail_nothing() {
    let lab = Lab::new(&["a: {kind: do, act: flood, amount: 1000}"]);
    lab.run(&["--set", "a.act=succeed"]).expect(0);
    block_on(async {
        let store = Store::open(&lab.store_dir(), Access::ReadWrite)
            .await
            .unwrap();
        sqlx::query(
            "create trigger no before insert on packs begin select raise(abort, 'no more'); end",
        )
        .execute(store.pool())
        .await
        .unwrap();
        store.close().await;
    });
    lab.run(&[])
        .expect(0)
        .saying(&["metrics cannot be recorded (the stage goes on)", "no more"]);
}

#[test]
fn a_reader_does_not_keep_a_run_waiting() {
    let lab = Lab::new(&["a: {kind: do, act: flood, amount: 50000}"]);
    lab.run(&["--set", "a.act=succeed"]).expect(0);
    block_on(async {
        let reader = Store::open(&lab.store_dir(), Access::ReadOnly)
            .await
            .unwrap();
        let mut reading = reader.pool().begin().await.unwrap();
        let count = async |reading: &mut sqlx::SqliteConnection| -> i64 {
            let count = sqlx::query_scalar("select count(*) from runs");
            count.fetch_one(reading).await.unwrap()
        };
        assert_eq!(count(&mut reading).await, 1);
        lab.run(&[]).expect(0);
        assert_eq!(
            count(&mut reading).await,
            1,
            "it reads what was there when it began"
        );
    });
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
}

#[test]
fn a_damaged_store_is_told_and_what_is_left_is_saved() {
    let lab = Lab::new(&["a: {kind: do, act: flood, amount: 200000}"]);
    for seed in 0..4 {
        lab.run(&["--set", &format!("a.seed={seed}")]).expect(0);
    }
    let path = lab.store_dir().join("history.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let pages = bytes.len() / 4096;
    for page in (pages / 2..pages).step_by(3) {
        bytes[page * 4096..][..4096].fill(0xa5);
    }
    std::fs::write(&path, bytes).unwrap();
    let doctor = lab.retort(&["doctor"]).expect(1).stdout;
    for text in ["damaged", "what can be saved", "retort runs export"] {
        assert!(doctor.contains(text), "`{text}` is missing in:\n{doctor}");
    }
    let saved = lab.dir.path().join("saved.db");
    lab.retort(&["runs", "export", "-o", saved.to_str().unwrap()])
        .expect(1)
        .saying(&["could not be read"]);
    let fresh = Lab::new(&[]);
    fresh
        .retort(&["runs", "import", saved.to_str().unwrap()])
        .expect(0);
    let runs = fresh.retort(&["runs", "list", "--json"]).expect(0).json();
    assert!(!runs.as_array().unwrap().is_empty());
}
