//! Stores in trouble: no record is wrong, and the message says what to do.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use retort::store::{Access, RunState, Store};
use retort_tests::skip::{leave_out, skip};

use crate::imports::change;
use crate::lab::{Lab, block_on, fifo, wait_for};

/// Mounts a file system of a given kind on a directory, as long as the value lives; None without the right to mount.
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
            Ok(output) => {
                // Only root may mount, and in some containers nobody may.
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                match said.contains("permission denied") || said.contains("must be superuser") {
                    true => leave_out(&format!("no right to mount a tmpfs: {}", said.trim())),
                    false => skip(&format!("no tmpfs could be mounted: {}", said.trim())),
                }
                None
            }
            Err(error) => {
                skip(&format!("no program `mount`: {error}"));
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
    // Either the stage detects it, or the history; both report it, and neither claims success.
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
    // The stage's space is free again.
    assert_eq!(
        lab.outcomes(&["--set", "b.act=succeed"]),
        ["a reused", "b ran"]
    );
}

#[test]
fn a_full_disk_is_named_and_left_clean() {
    let lab = Lab::new(&["a: {kind: do, act: flood, amount: 20000}"]);
    lab.run(&[]).expect(0);
    let small = lab.store_dir().with_file_name("small");
    let Some(_mount) = Mount::new(&small, "size=128k") else {
        return;
    };
    std::fs::write(small.join("mine"), vec![b'x'; 116 << 10]).unwrap();
    let shown = small.display().to_string();
    for (arguments, path, words) in [
        (&["runs", "export", "-o"][..], "new.retort", "the disk with"),
        (
            &["runs", "export", "--as", "tensorboard", "-o"],
            "events/deeper",
            "No space left",
        ),
        (&["report", "-o"], "report.html", "No space left"),
    ] {
        let target = format!("{shown}/{path}");
        let said = lab.retort(&[arguments, &[&target]].concat());
        let said = said.expect(1).saying(&[target.as_str(), words]);
        assert!(
            !said.stderr.contains("the disk with the store"),
            "{}",
            said.stderr
        );
        let left: Vec<_> = std::fs::read_dir(&small)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["mine"], "{arguments:?}");
    }
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
        // The first run has made one row; the points of others are no JSON either.
        sqlx::query("create index no on packs (json(data)) where key > 1")
            .execute(store.pool())
            .await
            .unwrap();
        store.close().await;
    });
    lab.run(&[]).expect(0).saying(&[
        "metrics cannot be recorded (the stage goes on)",
        "malformed JSON",
    ]);
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

#[test]
fn a_row_longer_than_any_that_retort_writes_is_an_error() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    // Without a log, so that it is written once.
    change(
        &lab.store_dir().join("history.db"),
        "pragma journal_mode = off; pragma synchronous = off;
         update runs set note = cast(zeroblob(202000000) as text)",
    );
    for command in [
        &["runs", "list"] as &[&str],
        &["runs", "show"],
        &["compare", "latest", "latest"],
    ] {
        lab.retort(command)
            .expect(1)
            .saying(&["a row is longer than 192 MiB"]);
    }
}

#[test]
fn a_disk_that_is_full_for_a_while_loses_no_result() {
    let lab = Lab::new(&[
        // Points until it is released, and no file before.
        "a: {kind: do, act: wait, flag: released}",
        "b: {kind: do, act: flood, amount: 50000, input: a}",
    ]);
    let dir = lab.store_dir();
    let Some(_mount) = Mount::new(&dir, "size=8m") else {
        return;
    };
    let fill = dir.join("fill");
    let mut running = lab.start(&[]);
    lab.wait_for_worker("a");
    let stderr = running.child.stderr.take().unwrap();
    let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
    let is_told = &AtomicBool::new(false);
    let mut file = std::fs::File::create(&fill).unwrap();
    let told = std::thread::scope(|scope| {
        // Space that becomes free meanwhile is filled as well.
        scope.spawn(move || {
            while !is_told.load(Ordering::Relaxed) {
                while file.write(&[0; 4096]).is_ok_and(|count| count > 0) {}
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let told = lines.any(|line| line.contains("cannot be recorded"));
        is_told.store(true, Ordering::Relaxed);
        told
    });
    std::fs::remove_file(&fill).unwrap();
    lab.release();
    let rest: Vec<String> = lines.collect();
    assert!(
        !rest.iter().any(|line| line.contains("begin_with")),
        "{rest:?}"
    );
    assert!(told && running.child.wait().unwrap().success(), "{rest:?}");
    assert_eq!(lab.latest().unwrap().summary.state, RunState::Succeeded);
    lab.retort(&["artifacts", "verify"]).expect(0);
    assert_eq!(lab.outcomes(&[]), ["a reused", "b reused"]);
}

/// Foreign files in a store stay there.
#[test]
fn only_what_retort_made_is_removed() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    let store = lab.store_dir();
    let others = [
        "artifacts/mine.txt",
        "artifacts/lost+found/x",
        "work/mine/x",
        ".imports/notes",
        ".important/x",
    ];
    for other in others {
        let path = store.join(other);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "mine").unwrap();
    }
    lab.retort(&["runs", "rm", "latest"]).expect(0);
    let said = lab.retort(&["gc", "--remove"]).expect(0);
    assert!(said.stdout.contains("artifact"), "{}", said.stdout);
    for other in others {
        assert!(store.join(other).exists(), "{other} is gone");
    }
    // The run's artifact is gone.
    assert_eq!(
        std::fs::read_dir(store.join("artifacts")).unwrap().count(),
        2
    );
    // A foreign folder is not an artifact without a history.
    for file in std::fs::read_dir(&store).unwrap().flatten() {
        if file.file_name().to_string_lossy().starts_with("history.db") {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    lab.run(&[]).expect(0);
}

#[test]
fn a_history_that_is_gone_is_not_made_anew_beside_artifacts() {
    let lab = Lab::new(&["a: {kind: do, text: a}", "b: {kind: do, text: b, input: a}"]);
    lab.run(&[]).expect(0);
    let history = lab.store_dir().join("history.db");
    let kept = std::fs::read(&history).unwrap();
    let emptied: [(&str, &dyn Fn()); 3] = [
        ("emptied", &|| std::fs::write(&history, "").unwrap()),
        ("removed", &|| std::fs::remove_file(&history).unwrap()),
        ("replaced", &|| {
            let fresh = Lab::new(&["a: {kind: do, text: a}"]);
            fresh.run(&[]).expect(0);
            fresh.retort(&["runs", "rm", "latest"]).expect(0);
            std::fs::remove_dir_all(fresh.store_dir().join("artifacts")).unwrap();
            fresh.retort(&["gc", "--remove"]).expect(0);
            std::fs::copy(fresh.store_dir().join("history.db"), &history).unwrap();
        }),
    ];
    for (how, empty) in emptied {
        for end in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(lab.store_dir().join(format!("history.db{end}")));
        }
        empty();
        for command in [&["gc"][..], &["gc", "--remove"]] {
            lab.retort(command).expect(1).saying(&[
                "history of this store is gone",
                "2 artifact(s)",
                "retort doctor",
            ]);
        }
        if how != "replaced" {
            for command in [
                &["run", "r.yaml"][..],
                &["runs", "list"],
                &["query", "select 1"],
            ] {
                lab.retort(command)
                    .expect(1)
                    .saying(&["history of this store is gone", "retort doctor"]);
            }
            let doctor = lab.retort(&["doctor", "--json"]).expect(1).stdout;
            assert!(doctor.contains("begin a new store"), "{doctor}");
        }
        assert_eq!(lab.entries("artifacts").len(), 2, "{how}");
    }
    // Once put back, it works as before.
    std::fs::write(&history, kept).unwrap();
    assert_eq!(lab.outcomes(&[]), ["a reused", "b reused"]);
    lab.retort(&["gc", "--remove"]).expect(0);
    assert_eq!(lab.entries("artifacts").len(), 2);
}

#[test]
fn a_history_that_is_no_file_is_never_opened() {
    let lab = Lab::new(&["a: {kind: do, text: a}"]);
    let history = lab.store_dir().join("history.db");
    let beside = lab.store_dir().join("history.db-wal");
    std::fs::create_dir_all(&history).unwrap();
    let check = |said: &str| {
        for command in [
            &["run", "r.yaml"][..],
            &["runs", "list"],
            &["gc"],
            &["log"],
            &["runs", "export", "-o", "x"],
        ] {
            lab.retort(command).expect(1).saying(&[said, "history.db"]);
        }
        lab.retort(&["doctor"]).expect(1);
    };
    check("is a directory");
    std::fs::remove_dir(&history).unwrap();
    fifo(&history);
    check("is a named pipe");
    std::fs::remove_file(&history).unwrap();
    std::os::unix::fs::symlink("/dev/null", &history).unwrap();
    check("is a device");
    std::fs::remove_file(&history).unwrap();
    lab.run(&[]).expect(0);
    let _ = std::fs::remove_file(&beside);
    fifo(&beside);
    check("is a named pipe");
}

#[test]
fn the_name_of_a_store_is_a_directory_whatever_it_looks_like() {
    let lab = Lab::new(&["a: {kind: do, text: a}"]);
    for name in [
        "file:x",
        "file:y?mode=memory",
        ":memory:",
        "file:///z",
        "a%20b#c",
    ] {
        let inside = lab.dir.path().join("work");
        std::fs::create_dir_all(&inside).unwrap();
        let retort = |arguments: &[&str]| {
            let output = Command::new(crate::lab::binary())
                .args(arguments)
                .args(["--store", name])
                .arg("--plugin-dir")
                .arg(crate::lab::plugins())
                .current_dir(&inside)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{name}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        };
        retort(&["run", "../r.yaml"]);
        assert!(inside.join(name).join("history.db").is_file(), "{name}");
        assert!(retort(&["runs", "list", "--format", "csv"]).contains("succeeded"));
        retort(&["runs", "export", "-o", "out.db", "--force"]);
        retort(&["runs", "import", "out.db"]);
    }
    assert!(!Path::new("/z").exists());
}

#[test]
fn a_store_is_its_owners_or_its_groups_alone() {
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (dir, expected) in [
        (None, 0o600),
        (Some(0o755), 0o640),
        (Some(0o770), 0o660),
        (Some(0o777), 0o660),
        (Some(0o700), 0o600),
    ] {
        let lab = Lab::new(&["a: {kind: do, act: wait, flag: released}"]);
        let store = lab.store_dir();
        if let Some(mode) = dir {
            std::fs::create_dir(&store).unwrap();
            std::fs::set_permissions(&store, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        let running = lab.start(&["--set", "a.text=secret"]);
        // While it runs, there is a write-ahead log as well.
        wait_for("the log", || {
            store.join("history.db-wal").exists().then_some(())
        });
        lab.wait_for_worker("a");
        for name in ["history.db", "history.db-wal", "history.db-shm"] {
            assert_eq!(mode(&store.join(name)), expected, "{name} in {dir:?}");
        }
        assert_eq!(mode(&store), dir.unwrap_or(0o700));
        lab.release();
        running.end().expect(0);
        let out = lab.dir.path().join("out.db");
        lab.retort(&["runs", "export", "-o", out.to_str().unwrap()])
            .expect(0);
        assert_eq!(mode(&out), 0o600);
        if dir == Some(0o755) {
            let history = store.join("history.db");
            std::fs::set_permissions(&history, std::fs::Permissions::from_mode(0o644)).unwrap();
            let doctor = lab.retort(&["doctor"]).stdout;
            assert!(doctor.contains("chmod o-rwx"), "{doctor}");
        }
    }
}
