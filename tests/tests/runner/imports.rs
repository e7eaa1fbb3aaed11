//! Files from elsewhere: what is wrong with one is said of it, and nothing of the store changes.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use crate::lab::{Lab, block_on, fifo, wait_for};

const KILL: i32 = 9;
const STOP: i32 = 19;

/// A store with artifacts and metrics, and a file that it was exported into.
pub struct Source {
    pub lab: Lab,
    pub file: PathBuf,
}

impl Source {
    pub fn new() -> Self {
        let lab = Lab::new(&[
            "a: {kind: do, text: hello}",
            "b: {kind: do, act: flood, amount: 3000, input: a}",
        ]);
        lab.run(&[]).expect(0);
        let file = lab.dir.path().join("good.db");
        lab.retort(&["runs", "export", "--files", "-o", file.to_str().unwrap()])
            .expect(0);
        Self { lab, file }
    }

    /// The file, changed by these statements.
    pub fn changed(&self, statements: &str) -> PathBuf {
        let file = self.lab.dir.path().join("changed.db");
        std::fs::copy(&self.file, &file).unwrap();
        change(&file, statements);
        file
    }
}

pub fn change(file: &Path, statements: &str) {
    block_on(async {
        let mut connection = open(file).await;
        let done = sqlx::raw_sql(AssertSqlSafe(statements.to_owned()))
            .execute(&mut connection)
            .await;
        done.unwrap_or_else(|error| panic!("{statements}: {error}"));
        connection.close().await.unwrap();
    });
}

async fn open(file: &Path) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(file)
        .foreign_keys(false)
        .connect()
        .await
        .unwrap()
}

/// Everything in a directory but what SQLite keeps beside the database while it works: paths, with the bytes of files.
pub fn contents(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            // Which machine has the store is no part of it.
            let own = ["history.db", "hosts"].contains(&name);
            if name.ends_with("-wal") || name.ends_with("-shm") || own {
                continue;
            }
            if path.is_dir() {
                waiting.push(path.clone());
                found.insert(path, None);
            } else {
                found.insert(path.clone(), Some(std::fs::read(path).unwrap()));
            }
        }
    }
    found
}

/// Imports a file into a store that has the same artifacts, and expects that nothing changes.
#[track_caller]
fn check_refused(source: &Source, file: &Path, said: &[&str]) {
    let there = Lab::new(&[
        "a: {kind: do, text: hello}",
        "c: {kind: do, text: own, input: a}",
    ]);
    there.run(&[]).expect(0);
    let before = contents(&there.store_dir());
    let runs = there.retort(&["runs", "list", "--json"]).stdout;
    there
        .retort(&["runs", "import", file.to_str().unwrap()])
        .expect(2)
        .saying(&[&[file.to_str().unwrap(), "nothing was imported"], said].concat());
    assert_eq!(contents(&there.store_dir()), before);
    let after = there.retort(&["runs", "list", "--json"]).stdout;
    let stable = |text: &str| {
        let lines = text.lines().filter(|line| !line.contains("\"seconds\""));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(stable(&after), stable(&runs));
    there.retort(&["gc"]).expect(0);
    let beside = std::fs::read_dir(source.lab.dir.path()).unwrap();
    assert!(
        !beside
            .flatten()
            .any(|entry| entry.file_name().to_str().unwrap().starts_with(".retort"))
    );
}

#[test]
fn a_file_with_other_tables_is_refused() {
    let source = Source::new();
    let endless = "with recursive n(k) as (select 1 union all select k + 1 from n)";
    for (statements, said) in [
        (
            format!("drop view v_metrics; drop table tags; create view tags as {endless} select k as run, 'x' as tag from n"),
            "`tags`",
        ),
        (
            format!(
                "drop table exported_files; create view exported_files as {endless}
                 select k as artifact, 'x' as path, 0 as part, x'00' as data from n"
            ),
            "`exported_files`",
        ),
        (
            "create trigger evil after insert on runs begin delete from runs; end".into(),
            "trigger `evil`",
        ),
        ("create table more (a)".into(), "table `more`"),
        (
            "pragma writable_schema = on;
             with recursive n(k) as (select 1 union all select k + 1 from n limit 8000)
             insert into sqlite_schema select 'table', 'more' || k, 'more' || k, 2, 'create table more' || k || ' (a)' from n"
                .into(),
            "far longer than its size explains",
        ),
        ("create index more on logs (abs(at))".into(), "index `more`"),
        ("create virtual table more using fts5(a)".into(), "`more"),
        (
            "drop table tags; create table tags (run integer not null, tag text not null,
             more text generated always as (hex(tag)) virtual, primary key (tag, run)) strict, without rowid".into(),
            "`tags`",
        ),
        ("alter table logs add column more text".into(), "`logs`"),
        ("drop index logs_of_attempt".into(), "`logs_of_attempt` of a retort history is missing"),
        ("pragma user_version = 999".into(), "newer retort"),
        ("pragma user_version = 0".into(), "unknown schema"),
        ("pragma user_version = -5".into(), "unknown schema"),
        ("pragma user_version = 1".into(), "is not that of a retort history"),
        ("pragma application_id = 7".into(), "not a retort history"),
    ] {
        check_refused(&source, &source.changed(&statements), &[said]);
    }
}

#[test]
fn a_file_with_values_that_no_store_writes_is_refused() {
    let source = Source::new();
    let long = "x".repeat(2000);
    for (statements, said) in [
        (
            "update runs set id = '../../../x'",
            "`id` of its table `runs`",
        ),
        ("update runs set id = 'latest'", "`id` of its table `runs`"),
        ("update runs set id = upper(id)", "`id` of its table `runs`"),
        ("update runs set created = -1", "`created`"),
        ("update runs set created = 9223372036854775807", "`created`"),
        ("update runs set command = '{}'", "`command`"),
        ("update runs set recipe = char(27) || '[2J'", "`recipe`"),
        ("update documents set environment = 'null'", "`environment`"),
        (
            "update documents set resolved = printf('%.*c', 200000, '[')",
            "`resolved`",
        ),
        (
            "update stages set name = '..' || char(10) where name = 'a'",
            "`name`",
        ),
        (&format!("update stages set kind = '{long}'"), "`kind`"),
        ("update stages set plugin_hash = 'zz'", "`plugin_hash`"),
        ("update stages set options = '[1]'", "`options`"),
        ("update stages set inputs = '[3]'", "`inputs`"),
        ("update stages set position = -1", "`position`"),
        ("update attempts set digest = '../x'", "`digest`"),
        ("update attempts set failure = '3'", "`failure`"),
        (
            "update attempts set stage = 77 where key = (select min(key) from attempts)",
            "refers to one of `stages`",
        ),
        (
            "update outputs set artifact = printf('%064d', 7)",
            "refers to one of `artifacts`",
        ),
        (
            "update outputs set meta = '{\"preview\": \"../../../etc/passwd\"}'",
            "`meta`",
        ),
        ("update artifacts set size = size + 1", "not of its size"),
        (
            "update artifacts set files = '[]', size = 0",
            "not what its hash says",
        ),
        (
            "update artifacts set files = replace(files, 'thing.txt', '/etc/hostname')",
            "is not a path within an artifact",
        ),
        (
            "update artifacts set files = replace(files, 'thing.txt', 'thing2.txt')",
            "not what its hash says",
        ),
        (
            "update packs set data = x'03ffffffffffffffff7f'",
            "cannot be unpacked",
        ),
        (
            "update blocks set points = points + 1",
            "another number of points",
        ),
        ("update blocks set pack = 77", "has no points"),
        ("update series set base = 1 << 60", "`base`"),
        (
            "insert into logs (attempt, at, level, source, text) select key, 5, 3, 'elsewhere', '' from attempts",
            "`source`",
        ),
        (
            "update params set value = x'00'",
            "`value` of its table `params`",
        ),
        (
            "update names set name = char(155) || 'x' || key",
            "`name` of its table `names`",
        ),
        ("insert into tags select key, char(27) from runs", "`tag`"),
        ("update runs set note = cast(x'ff' as text)", "UTF-8"),
    ] {
        check_refused(&source, &source.changed(statements), &[said]);
    }
}

#[test]
fn types_are_checked_again_where_a_file_lies_about_them() {
    let source = Source::new();
    // What SQLite checks when it writes is not checked when it reads: a file may hold it all the same.
    let file = source.changed(
        "pragma writable_schema = on;
         update sqlite_schema set sql = replace(sql, ') strict', ')') where name = 'logs'",
    );
    change(
        &file,
        "update logs set at = 'soon';
         insert into logs (attempt, at, level, source, text) select key, 'soon', 'high', 'plugin', x'00' from attempts;
         pragma writable_schema = on;
         update sqlite_schema set sql = sql || ' strict' where name = 'logs'",
    );
    check_refused(&source, &file, &["table `logs`"]);
}

#[test]
fn values_that_share_their_pages_do_not_fill_the_disk() {
    let source = Source::new();
    let file = source.changed(&format!(
        "drop table exported_files;
         with recursive n(k) as (select 1 union all select k + 1 from n where k < 300)
         insert into logs (attempt, at, level, source, text)
         select (select min(key) from attempts), 5, 3, 'stdout',
             printf('%.*c', case k when 1 then {LONG} else {SHORT} end, 'x') from n"
    ));
    assert_eq!(share_pages(&file), 299);
    assert!(std::fs::metadata(&file).unwrap().len() < 8 << 20);
    let all = "select sum(length(text)) / 1000000 from logs";
    let claimed: i64 = block_on(async {
        let mut connection = open(&file).await;
        let sum = sqlx::query_scalar(all).fetch_one(&mut connection);
        sum.await.unwrap()
    });
    assert!(claimed > 300, "{claimed} MB");
    check_refused(&source, &file, &["several times the file's size"]);
}

/// Lengths of two texts whose rows begin alike: they need whole further pages more or less.
const SHORT: usize = 16_400;
const LONG: usize = SHORT + 252 * (4096 - 4);

/// Has the rows with short texts claim to be as long as the one with a long text, and to go on in its pages; how many.
fn share_pages(file: &Path) -> usize {
    const PAGE: usize = 4096;
    let mut bytes = std::fs::read(file).unwrap();
    // (where the cell begins, where the row's payload does, how long that is)
    let mut cells = Vec::new();
    for at in (PAGE..bytes.len())
        .step_by(PAGE)
        .filter(|&at| bytes[at] == 0x0d)
    {
        let two = |place: usize| usize::from(u16::from_be_bytes([bytes[place], bytes[place + 1]]));
        let count = two(at + 3);
        // Further pages may look like leaves of tables.
        if count > 100 || bytes[at + 7] != 0 {
            continue;
        }
        for cell in (0..count).map(|cell| at + two(at + 8 + 2 * cell)) {
            let mut place = cell;
            let mut number = || {
                let mut value = 0;
                loop {
                    let byte = bytes[place];
                    place += 1;
                    value = value << 7 | usize::from(byte & 0x7f);
                    if byte < 0x80 {
                        return value;
                    }
                }
            };
            let (length, _key) = (number(), number());
            cells.push((cell, place, length));
        }
    }
    let of = |text: usize| {
        let fits = move |(_, _, length): &(usize, usize, usize)| (text..text + 50).contains(length);
        cells.iter().copied().filter(fits)
    };
    let (_, payload, length) = of(LONG).next().expect("the long row");
    let least = (PAGE - 12) * 32 / 255 - 23;
    let here = least + (length - least) % (PAGE - 4);
    let here = if here <= PAGE - 35 { here } else { least };
    let pages: [u8; 4] = bytes[payload + here..][..4].try_into().unwrap();
    let three = |number: usize| {
        [
            0x80 | number >> 14,
            0x80 | number >> 7 & 0x7f,
            number & 0x7f,
        ]
        .map(|byte| byte as u8)
    };
    let short: Vec<_> = of(SHORT).collect();
    for (cell, payload, length) in &short {
        bytes[*cell..][..3].copy_from_slice(&three(length - SHORT + LONG));
        // The type of the last column ends the row's head: twice the length of the text, and 13.
        let head = usize::from(bytes[*payload]);
        bytes[payload + head - 3..][..3].copy_from_slice(&three(2 * LONG + 13));
        bytes[payload + here..][..4].copy_from_slice(&pages);
    }
    std::fs::write(file, &bytes).unwrap();
    short.len()
}

#[test]
fn files_that_are_not_what_their_hash_says_stay_out_and_touch_nothing() {
    let source = Source::new();
    for statements in [
        // Files of an artifact that the store has, under a name that it has not.
        "update exported_files set artifact = '0000' || substr(artifact, 5)",
        "update exported_files set artifact = '../pwned' || artifact",
        "update exported_files set data = cast(data || 'x' as blob)",
        "update exported_files set data = x''",
        "update exported_files set data = x'78'",
        "update exported_files set part = part + 1",
        "update exported_files set path = '../../pwned'",
        "update exported_files set path = '/tmp/pwned-by-import'",
        "delete from exported_files where path = 'thing.txt'; insert into exported_files
         select hash, 'other', 0, x'00' from artifacts",
    ] {
        for there in [
            Lab::new(&["a: {kind: do, text: hello}"]),
            Lab::new(&["a: {kind: do, text: another}"]),
        ] {
            there.run(&[]).expect(0);
            let before = there.entries("artifacts");
            let file = source.changed(statements);
            let said = there.retort(&["runs", "import", file.to_str().unwrap()]);
            assert!(
                matches!(said.code, Some(0 | 1)),
                "{statements}: {}",
                said.stderr
            );
            assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
            assert_eq!(there.entries("artifacts"), before, "{statements}");
            there.retort(&["artifacts", "verify"]);
            let left = contents(&there.store_dir());
            assert!(
                !left
                    .keys()
                    .any(|path| path.to_str().unwrap().contains(".retort-")),
                "{left:?}"
            );
            assert!(!there.dir.path().join("pwned").exists());
        }
        assert!(!Path::new("/tmp/pwned-by-import").exists());
    }
}

#[test]
fn a_run_that_had_not_ended_is_lost_when_it_comes_from_elsewhere() {
    let source = Source::new();
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let began = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(19)
        .unwrap()
        .to_owned();
    let read = |path: &str| std::fs::read_to_string(path).unwrap().trim().to_owned();
    // A lease of a process that lives, here, and was heard of in the far future.
    let file = source.changed(&format!(
        "update runs set state = 'running', finished = null; update stages set state = 'running';
         update attempts set state = 'running', finished = null;
         delete from leases;
         insert into leases (run, host, boot, pid_namespace, pid, process_started, heartbeat) select key, '{}', '{}', '{}', {}, {began}, 1 << 60 from runs",
        read("/proc/sys/kernel/hostname"),
        read("/proc/sys/kernel/random/boot_id"),
        std::fs::read_link("/proc/self/ns/pid").unwrap().display(),
        std::process::id(),
    ));
    let there = Lab::new(&["a: {kind: do, text: hello}"]);
    there.run(&[]).expect(0);
    there
        .retort(&["runs", "import", file.to_str().unwrap()])
        .expect(0);
    let runs = there.retort(&["runs", "list", "--json"]).expect(0).json();
    assert_eq!(runs[0]["state"], "lost", "{runs}");
    assert!(runs[0]["finished"].is_string(), "{runs}");
    there.retort(&["gc", "--remove"]).expect(0);
    there.retort(&["runs", "rm", "latest"]).expect(0);
}

#[test]
fn time_that_a_stage_was_stopped_goes_along() {
    let source = Source::new();
    let dir = source.lab.store_dir();
    change(
        &dir.join("history.db"),
        "update attempts set finished = started + 90000, paused = 70000",
    );
    let seconds = |lab: &Lab| {
        let sql = "select stage, seconds from v_attempts order by stage";
        let rows = lab.retort(&["query", sql, "--json"]).expect(0).json();
        assert_eq!(rows[0]["seconds"], 20.0, "{rows}");
        assert_eq!(rows.as_array().unwrap().len(), 2);
    };
    seconds(&source.lab);
    let file = source.lab.dir.path().join("paused.db");
    let file = file.to_str().unwrap();
    source.lab.retort(&["runs", "export", "-o", file]).expect(0);
    let there = Lab::new(&["a: {kind: do}"]);
    there.run(&[]).expect(0);
    there.retort(&["runs", "import", file]).expect(0);
    there.retort(&["runs", "rm", "latest~1"]).expect(0);
    seconds(&there);
}

#[test]
fn what_is_no_file_to_import_is_said_of_it() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    let dir = lab.dir.path();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    std::fs::create_dir(path("folder")).unwrap();
    std::fs::write(path("empty"), "").unwrap();
    std::fs::write(
        path("text"),
        "no database, and long enough to be looked at".repeat(99),
    )
    .unwrap();
    fifo(&dir.join("pipe"));
    symlink("/dev/zero", path("device")).unwrap();
    symlink("/nowhere", path("dangling")).unwrap();
    let good = Source::new();
    let bytes = std::fs::read(&good.file).unwrap();
    std::fs::write(path("cut"), &bytes[..bytes.len() / 2]).unwrap();
    let mut damaged = bytes.clone();
    for page in (8..bytes.len() / 4096).step_by(2) {
        damaged[page * 4096..][..4096].fill(0xa5);
    }
    std::fs::write(path("damaged"), damaged).unwrap();
    std::fs::write(path("piped"), &bytes).unwrap();
    fifo(&dir.join("piped-journal"));
    for (name, said) in [
        ("nowhere", "No such file"),
        ("dangling", "No such file"),
        ("folder", "a directory"),
        ("empty", "not a retort history"),
        ("text", "not a retort history"),
        ("pipe", "a named pipe"),
        ("device", "a device"),
        ("piped", "a named pipe"),
        ("cut", "malformed"),
        ("damaged", ""),
    ] {
        lab.retort(&["runs", "import", &path(name)])
            .expect(2)
            .saying(&[&path(name), "cannot be imported", said]);
    }
    assert_eq!(lab.entries("artifacts").len(), 1);
    let left = lab.entries(".");
    assert!(
        !left.iter().any(|name| name.starts_with(".retort")),
        "{left:?}"
    );
}

#[test]
fn what_a_killed_import_left_is_removed_and_one_under_way_is_not() {
    let source = Source::new();
    let there = Lab::new(&["a: {kind: do, text: mine}"]);
    there.run(&[]).expect(0);
    let drafts = || -> Vec<String> {
        let names = there.entries(".").into_iter();
        names
            .filter(|name| name.starts_with(".retort-import"))
            .collect()
    };
    // Stopped in the middle: it is not always fast enough to be caught.
    let mut import = wait_for("an import that is caught", || {
        let mut import = there
            .command(&["runs", "import", source.file.to_str().unwrap()])
            .spawn()
            .unwrap();
        while import.try_wait().unwrap().is_none() {
            if drafts().len() == 2 {
                crate::lab::signal_process(import.id(), STOP);
                return Some(import);
            }
        }
        there.retort(&["runs", "rm", "latest"]);
        None
    });
    let under_way = drafts();
    if under_way.len() == 2 {
        let listed = there.retort(&["gc", "--json"]).expect(0).stdout;
        assert!(!listed.contains(".retort-import"), "{listed}");
        there.retort(&["gc", "--remove"]);
        assert_eq!(drafts(), under_way);
    }
    crate::lab::signal_process(import.id(), KILL);
    import.wait().unwrap();
    if !drafts().is_empty() {
        let listed = there.retort(&["gc", "--json"]).expect(0).stdout;
        assert!(listed.contains(".retort-import"), "{listed}");
        there.retort(&["gc", "--remove"]).expect(0);
    }
    assert_eq!(drafts(), [""; 0]);
}

/// A file with so many runs that an import of it takes several pieces.
fn many(source: &Source, runs: usize) -> PathBuf {
    source.changed(&format!(
        "insert into runs (id, recipe, recipe_path, seed, command, state, created, finished)
         with recursive n(i) as (select 1 union all select i + 1 from n where i < {runs})
         select printf('z%09d', i), 'r', '/r.yaml', i, '[]', 'succeeded', 1700000000000 + i, 1700000005000 + i from n;
         insert into documents select key, 'recipe', '{{}}', '{{}}' from runs where id > 'z';
         insert into tags select key, 'many' from runs where id > 'z'"
    ))
}

/// A killed import leaves whole runs, and a later one takes the others over. Meanwhile others write.
#[test]
fn a_killed_import_leaves_whole_runs_and_goes_on_when_it_is_repeated() {
    const RUNS: i64 = 12_000;
    let source = Source::new();
    let file = many(&source, RUNS as usize);
    let there = Lab::new(&["a: {kind: do, text: mine}"]);
    there.run(&[]).expect(0);
    let history = there.store_dir().join("history.db");
    let count = |sql: &'static str| -> i64 {
        block_on(async {
            let mut connection = open(&history).await;
            let found = sqlx::query_scalar(sql).fetch_one(&mut connection).await;
            connection.close().await.unwrap();
            found.unwrap()
        })
    };
    let imported = "select count(*) from runs where id > 'z'";
    let mut import = there
        .command(&["runs", "import", file.to_str().unwrap()])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut ended = false;
    wait_for("the first piece", || {
        ended = import.try_wait().unwrap().is_some();
        (ended || count(imported) > 0).then_some(())
    });
    // It goes on, and another command has its turn.
    there
        .retort(&["runs", "tag", "latest", "meanwhile"])
        .expect(0);
    import.kill().unwrap();
    import.wait().unwrap();
    let left = count(imported);
    assert!(left > 0 && !ended, "{left} runs; ended by itself: {ended}");
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
    // And the one run that the file had before.
    assert_eq!(done("known already") + done("copied"), RUNS + 1);
    there.retort(&["artifacts", "verify"]).expect(0);
}

/// What an import costs follows from what is in the file. Counted in bytes that are written, because a machine's time is
/// shared: each of a few hundred statements about a run would otherwise note dozens of pages down.
#[test]
fn many_runs_are_imported_in_proportion() {
    let source = Source::new();
    let file = source.changed(
        "insert into runs (id, recipe, recipe_path, seed, command, state, created, finished)
         with recursive n(i) as (select 1 union all select i + 1 from n where i < 2000)
         select printf('z%09d', i), 'r', '/r.yaml', i, '[]', 'succeeded', 1700000000000 + i, 1700000005000 + i from n;
         insert into documents
         select key, printf('%.2000c', 'x'), '{}', '{}' from runs where id > 'z';
         insert into names (name)
         with recursive n(i) as (select 1 union all select i + 1 from n where i < 20)
         select printf('option%d', i) from n;
         insert into params (key, value, type, origin)
         select n.key << 32 | r.key, r.key, 'integer', 'default' from names n, runs r
         where n.name like 'option%' and r.id > 'z' order by n.key, r.key;
         insert into results (key, position, points, last, min, max)
         select n.key << 32 | r.key, 0, 100, 1, 0, 2 from names n, runs r
         where n.name in ('option1', 'option2') and r.id > 'z' order by n.key, r.key",
    );
    let there = Lab::new(&["a: {kind: do, text: hello}"]);
    there.run(&[]).expect(0);
    // The shell's figures have those of the command that it has waited for.
    let mut shell = std::process::Command::new("sh");
    let script = "\"$@\" > /dev/null && cat /proc/$$/io";
    let import = there.command(&["runs", "import", file.to_str().unwrap()]);
    let output = shell
        .args(["-c", script, "sh"])
        .arg(import.get_program())
        .args(import.get_args())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let written: u64 = said
        .lines()
        .find_map(|line| line.strip_prefix("wchar: ")?.parse().ok())
        .unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    let size = std::fs::metadata(&file).unwrap().len();
    // A draft, the log, and the database; twice as much for what a page holds beside the rows.
    assert!(written < 8 * size, "{written} bytes for a file of {size}");
    let asked = "select count(*) runs, (select count(*) from v_params) params,
         (select sum(value) from v_params where path = 'option7' and run = 'z000001000') one,
         (select length(recipe_text) from documents join runs on key = run where id = 'z000002000') text from v_runs";
    let rows = there.retort(&["query", "--json", asked]).expect(0).json();
    let row = &rows[0];
    assert_eq!(
        (&row["runs"], &row["text"]),
        (&2002.into(), &2000.into()),
        "{row}"
    );
    assert!(row["params"].as_i64() >= Some(40_000), "{row}");
    let key = block_on(async {
        let mut connection = open(&file).await;
        let key = sqlx::query_scalar("select key from runs where id = 'z000001000'");
        key.fetch_one(&mut connection).await.unwrap()
    });
    let key: i64 = key;
    assert_eq!(row["one"], key, "{row}");
}

#[test]
fn an_imported_run_is_resumed_by_name_only() {
    let other = Lab::new(&["a: {kind: do, act: fail_unless_flag, flag: there}"]);
    other.run(&[]).expect(100);
    let file = other.dir.path().join("theirs.db");
    let export = ["runs", "export", "-o", file.to_str().unwrap()];
    other.retort(&export).expect(0);
    // As it is recorded where it ran in Slurm.
    change(
        &file,
        "update documents set resolved = json_set(resolved, '$.executor', 'slurm', '$.slurm',
             json('[\"prologue=touch pwned\"]'))",
    );
    let theirs = other.latest().unwrap().summary.id.0;

    let lab = Lab::new(&["a: {kind: do, act: fail_unless_flag, flag: there}"]);
    let import = ["runs", "import", file.to_str().unwrap()];
    lab.retort(&import).expect(0);
    lab.retort(&["resume"]).expect(4).saying(&[
        "no run to resume: 1 run(s) here come from another store",
        "retort resume RUN",
    ]);
    // One of its own, older than what is imported next. An older one was made up for.
    lab.run(&[]).expect(100);
    lab.run(&["--set", "a.act=succeed"]).expect(0);
    let done = lab.latest().unwrap().summary.id.0;
    lab.retort(&["resume"])
        .expect(0)
        .saying(&[&format!("resuming run {done}")]);
    lab.run(&["--set", "a.text=again"]).expect(100);
    let own = lab.latest().unwrap().summary.id.0;
    let another = Lab::new(&["a: {kind: do, act: fail}"]);
    another.run(&[]).expect(100);
    let last = another.dir.path().join("last.db");
    another
        .retort(&["runs", "export", "-o", last.to_str().unwrap()])
        .expect(0);
    lab.retort(&["runs", "import", last.to_str().unwrap()])
        .expect(0);
    std::fs::write(lab.dir.path().join("there"), "").unwrap();
    let said = lab.retort(&["resume"]).expect(0);
    said.saying(&[&format!("resuming run {own}")]);
    // It has been continued: the latest is meant.
    let latest = lab.latest().unwrap().summary.id.0;
    lab.retort(&["resume"])
        .expect(0)
        .saying(&[&format!("resuming run {latest}")]);
    // By its name, and without what its owner told Slurm.
    lab.retort(&["resume", &theirs])
        .saying(&[&format!("resuming run {theirs}")]);
    let resumed = lab.latest().unwrap();
    assert_eq!(resumed.summary.resumed_from.unwrap().0, theirs);
    let of_slurm = ["executor", "slurm"].map(|name| resumed.resolved[name].is_null());
    assert_eq!(of_slurm, [true; 2]);
}

#[test]
fn what_is_named_often_costs_what_it_costs_once_or_is_refused() {
    let source = Source::new();
    let many = |count: usize, rest: &str| {
        format!(
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < {count}) {rest}"
        )
    };
    let outputs = many(
        120_000,
        "insert into outputs (attempt, artifact, kind, name, meta, created)
         select o.attempt, o.artifact, o.kind, o.name, '{\"x\": \"' || printf('%.*c', 500, 'y') || '\"}', o.created
         from n, (select * from outputs limit 1) o",
    );
    let stages = many(
        100_000,
        "insert into stages (run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed, options,
             inputs, state, reused_from)
         select s.run, 10 + i, 'x' || i, s.kind, s.plugin, s.plugin_version, s.plugin_hash, s.device, s.dtype, s.seed, '{}',
             '[]', 'reused', (select max(key) from attempts) from n, (select * from stages limit 1) s",
    );
    for statements in [outputs, stages] {
        let file = source.changed(&statements);
        let lab = Lab::new(&[]);
        lab.retort(&["runs", "import", file.to_str().unwrap()])
            .expect(2)
            .saying(&["names so many artifacts and series, or so often"]);
    }
}

#[test]
fn a_sweep_that_no_recipe_describes_is_refused() {
    let source = Lab::new(&["a: {kind: do, rate: 1}"]);
    source.run(&["--sweep", "a.rate=1,2"]).expect(0);
    let file = source.dir.path().join("sweep.db");
    let path = file.to_str().unwrap();
    source.retort(&["runs", "export", "-o", path]).expect(0);
    Lab::new(&[]).retort(&["runs", "import", path]).expect(0);
    change(
        &file,
        "update sweeps set points = 10001;
         with recursive n(i) as (select 3 union all select i + 1 from n where i < 10001)
         insert into sweep_points (sweep, point, settings) select 1, i, '[]' from n",
    );
    Lab::new(&[])
        .retort(&["runs", "import", path])
        .expect(2)
        .saying(&["has more than the 10000 points that a sweep may have"]);
}
