//! Imports and exports that are killed or stopped midway: existing content stays, and their remains are removed.

use std::path::PathBuf;
use std::process::Child;

use retort_tests::process::ProcessStat;
use sqlx::Connection;

use crate::imports::{Source, open};
use crate::lab::{Lab, Running, block_on, signal_process, wait_for};
use crate::training::caught;

const KILL: i32 = 9;
const STOP: i32 = 19;
const CONTINUE: i32 = 18;

/// Stops a process, and lets it go on if it is too late for the test.
fn is_stopped_with(process: &mut Child, is_there: impl Fn() -> bool) -> bool {
    signal_process(process.id(), STOP);
    let stopped = wait_for("the process to stop or to end", || {
        match ProcessStat::of(process.id())?.state {
            'T' => Some(true),
            'Z' => Some(false),
            _ => None,
        }
    });
    if stopped && is_there() {
        return true;
    }
    signal_process(process.id(), CONTINUE);
    false
}

#[test]
fn only_leftovers_of_a_killed_import_are_removed() {
    let source = Source::new();
    let there = Lab::new(&["a: {kind: do, text: mine}"]);
    there.run(&[]).expect(0);
    let drafts = || -> Vec<String> {
        let names = there.entries(".").into_iter();
        let mut names: Vec<String> = names
            .filter(|name| name.starts_with(".retort-import"))
            .collect();
        names.sort();
        names
    };
    // Stopped midway; this does not always succeed in time.
    let mut import = wait_for("an import that is caught", || {
        let mut import = there
            .command(&["runs", "import", source.file.to_str().unwrap()])
            .spawn()
            .unwrap();
        while import.try_wait().unwrap().is_none() {
            if drafts().len() == 2 && is_stopped_with(&mut import, || drafts().len() == 2) {
                return Some(Running::new(import));
            }
        }
        there.retort(&["runs", "rm", "latest"]);
        None
    });
    let under_way = drafts();
    assert_eq!(under_way.len(), 2);
    let listed = there.retort(&["gc", "--json"]).expect(0).stdout;
    assert!(!listed.contains(".retort-import"), "{listed}");
    there.retort(&["gc", "--remove"]);
    assert_eq!(drafts(), under_way);
    import.signal(KILL);
    import.child.wait().unwrap();
    assert_eq!(drafts(), under_way);
    let listed = there.retort(&["gc", "--json"]).expect(0).stdout;
    assert!(listed.contains(".retort-import"), "{listed}");
    there.retort(&["gc", "--remove"]).expect(0);
    assert_eq!(drafts(), [""; 0]);
}

/// A killed export leaves the previous file, and a draft. The next one removes the draft, but not while it is being written.
#[test]
fn a_killed_export_leaves_the_old_file() {
    let source = Source::new();
    let there = Lab::new(&["a: {kind: do, text: mine}"]);
    let file = many(&source, 3_000);
    there
        .retort(&["runs", "import", file.to_str().unwrap()])
        .expect(0);
    std::fs::write(there.dir.path().join("out.db"), "as it was").unwrap();
    let drafts = || -> Vec<String> {
        let entries = std::fs::read_dir(there.dir.path()).unwrap().flatten();
        let mut names: Vec<String> = entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| name.starts_with(".retort-export"))
            .collect();
        names.sort();
        names
    };
    let export = ["runs", "export", "--force", "-o", "out.db"];
    let mut killed = wait_for("an export that is caught", || {
        let mut export = there.command(&export).spawn().unwrap();
        while export.try_wait().unwrap().is_none() {
            if !drafts().is_empty() && is_stopped_with(&mut export, || drafts().len() == 2) {
                return Some(Running::new(export));
            }
        }
        std::fs::write(there.dir.path().join("out.db"), "as it was").unwrap();
        None
    });
    let under_way = drafts();
    there
        .retort(&["runs", "export", "-o", "other.db"])
        .expect(0);
    assert_eq!(drafts(), under_way);
    killed.signal(KILL);
    assert!(!killed.child.wait().unwrap().success());
    let kept = std::fs::read(there.dir.path().join("out.db")).unwrap();
    assert_eq!(kept, b"as it was");
    assert_eq!(drafts(), under_way);
    there.retort(&export).expect(0);
    assert_eq!(drafts(), [""; 0]);
    let again = Lab::new(&["a: {kind: do, text: mine}"]);
    let out = there.dir.path().join("out.db");
    again
        .retort(&["runs", "import", out.to_str().unwrap()])
        .expect(0);
}

/// A file with enough runs for several pieces of an import.
fn many(source: &Source, runs: usize) -> PathBuf {
    source.changed(&format!(
        "insert into runs (id, recipe, recipe_path, seed, command, state, created, finished)
         with recursive n(i) as (select 1 union all select i + 1 from n where i < {runs})
         select printf('z%09d', i), 'r', '/r.yaml', i, '[]', 'succeeded', 1700000000000 + i, 1700000005000 + i from n;
         insert into documents select key, 'recipe', '{{}}', '{{}}' from runs where id > 'z';
         insert into tags select key, 'many' from runs where id > 'z'"
    ))
}

/// A store's history.
fn count(there: &Lab, sql: &'static str) -> i64 {
    let history = there.store_dir().join("history.db");
    block_on(async {
        let mut connection = open(&history).await;
        let found = sqlx::query_scalar(sql).fetch_one(&mut connection).await;
        connection.close().await.unwrap();
        found.unwrap()
    })
}

/// A killed import leaves complete runs, and a later one imports the others. Meanwhile others write.
#[test]
fn a_killed_import_leaves_whole_runs_and_can_be_repeated() {
    const RUNS: i64 = 12_000;
    let source = Source::new();
    let file = many(&source, RUNS as usize);
    let imported = "select count(*) from runs where id > 'z'";
    // On a busy machine it may have ended before it is killed.
    let there = caught(|| {
        let there = Lab::new(&["a: {kind: do, text: mine}"]);
        there.run(&[]).expect(0);
        let mut import = there
            .command(&["runs", "import", file.to_str().unwrap()])
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the first piece", || {
            let ended = import.try_wait().unwrap().is_some();
            (ended || count(&there, imported) > 0).then_some(())
        });
        // It goes on, and another command can write.
        there
            .retort(&["runs", "tag", "latest", "meanwhile"])
            .expect(0);
        import.kill().unwrap();
        let killed = import.wait().unwrap().code().is_none();
        killed.then_some(there)
    });
    let count = |sql| count(&there, sql);
    let left = count(imported);
    assert!(left > 0, "{left} runs");
    for sql in [
        "select count(*) from documents d join runs r on r.key = d.run where r.id > 'z'",
        "select count(*) from tags t join runs r on r.key = t.run where r.id > 'z' and t.tag = 'many'",
    ] {
        assert_eq!(count(sql), left, "{sql}");
    }
    there.retort(&["doctor"]).expect(0);

    let again = there.retort(&["runs", "import", file.to_str().unwrap(), "--json"]);
    let again = again.expect(0).json();
    let done = |what: &str| {
        let rows = again.as_array().unwrap().iter();
        rows.filter(|row| row["what"] == "run" && row["done"] == what)
            .count() as i64
    };
    assert_eq!(count(imported), RUNS);
    assert!(done("known already") >= left, "{left}");
    // And the run that the file had before.
    assert_eq!(done("known already") + done("copied"), RUNS + 1);
    there.retort(&["artifacts", "verify"]).expect(0);
}
