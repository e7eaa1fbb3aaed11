//! Files from elsewhere: problems are reported, and the store does not change.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use retort_tests::process::ProcessStat;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use crate::lab::{Lab, block_on, fifo};

/// A store with artifacts and metrics, and its export.
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

pub async fn open(file: &Path) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(file)
        .foreign_keys(false)
        .connect()
        .await
        .unwrap()
}

/// All paths and contents in a directory, except SQLite's temporary files beside the database.
pub fn contents(dir: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            // Without the record of the owning machine.
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
        ("update artifacts set size = size + 1", "add up to"),
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
        ("update attempts set number = 9223372036854775807", "`number`"),
        ("update attempts set paused = 9223372036854775807", "`paused`"),
        (
            "create temp table c as select * from stages limit 1;
             with recursive n(i) as (select 1 union all select i + 1 from n where i < 1001)
             insert into stages (run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed, options,
                                 inputs, state)
             select c.run, 100 + i, 's' || i, c.kind, c.plugin, c.plugin_version, c.plugin_hash, c.device, c.dtype, c.seed,
                    c.options, c.inputs, c.state from n, c",
            "more than 1000 stages",
        ),
        ("update runs set note = cast(x'ff' as text)", "UTF-8"),
        (
            "update documents set resolved = '{\"a\":[' || replace(printf('%.*c', 400000, '-'), '-', '[0],') || '0]}'",
            "`resolved` of its table `documents`: it would take more than 96 MiB",
        ),
        (
            "update params set type = 'array', value = '[' || replace(printf('%.*c', 900000, '-'), '-', '7,') || '0]'",
            "`value` of its table `params`: it would take more than 96 MiB",
        ),
        // One value alone is small enough.
        (
            "update documents set (resolved, environment) =
                 (select a, a from (select '{\"a\":[' || replace(printf('%.*c', 150000, '-'), '-', '[0],') || '0]}' as a))",
            "so many values that they would take more than 96 MiB",
        ),
    ] {
        check_refused(&source, &source.changed(statements), &[said]);
    }
}

#[test]
fn types_are_checked_again_where_a_file_lies_about_them() {
    let source = Source::new();
    // SQLite checks constraints only when writing, so a file may violate them.
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

/// Lengths of two texts whose rows begin with the same bytes: they differ by whole overflow pages.
const SHORT: usize = 16_400;
const LONG: usize = SHORT + 252 * (4096 - 4);

/// Makes rows with short texts claim the length and the overflow pages of the row with a long text. Returns how many.
fn share_pages(file: &Path) -> usize {
    const PAGE: usize = 4096;
    let mut bytes = std::fs::read(file).unwrap();
    // (start of the cell, start of the row's payload, its length)
    let mut cells = Vec::new();
    for at in (PAGE..bytes.len())
        .step_by(PAGE)
        .filter(|&at| bytes[at] == 0x0d)
    {
        let two = |place: usize| usize::from(u16::from_be_bytes([bytes[place], bytes[place + 1]]));
        let count = two(at + 3);
        // Overflow pages may look like leaves of tables.
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
        // The type of the last column ends the row's header: twice the text's length, plus 13.
        let head = usize::from(bytes[*payload]);
        bytes[payload + head - 3..][..3].copy_from_slice(&three(2 * LONG + 13));
        bytes[payload + here..][..4].copy_from_slice(&pages);
    }
    std::fs::write(file, &bytes).unwrap();
    short.len()
}

#[test]
fn files_with_a_wrong_hash_stay_out() {
    let source = Source::new();
    for statements in [
        // Files of an artifact in the store, under an unknown name.
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
fn an_imported_run_that_had_not_ended_is_lost() {
    let source = Source::new();
    let began = ProcessStat::of(std::process::id()).unwrap().started;
    let read = |path: &str| std::fs::read_to_string(path).unwrap().trim().to_owned();
    // A lease of a live process on this machine, with a heartbeat in the far future.
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
    // A draft, the log, and the database; doubled for the overhead of pages.
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
fn an_imported_tag_takes_nothing_from_the_runs_that_were_there() {
    let lab = Lab::new(&["a: {kind: do, text: mine}"]);
    lab.run(&[]).expect(0);
    let own = lab.latest().unwrap().summary.id.0;
    lab.retort(&["runs", "tag", &own, "best"]).expect(0);
    let source = Source::new();
    let file = source.changed(&format!(
        "insert into tags select key, '{own}' from runs; insert into tags select key, 'best' from runs"
    ));
    lab.retort(&["runs", "import", file.to_str().unwrap()])
        .expect(0);
    for reference in [own.as_str(), "best"] {
        let shown = lab.retort(&["runs", "show", reference, "--json"]).json();
        assert_eq!(shown["id"], own.as_str(), "{reference}");
    }
    for tag in ["0123456789", "latest", "latest~1", " "] {
        lab.retort(&["runs", "tag", &own, tag])
            .expect(2)
            .saying(&["cannot be a tag"]);
    }
    lab.retort(&["runs", "tag", &own, "production"]).expect(0);
}

#[test]
fn an_imported_run_is_resumed_by_name_only() {
    let other = Lab::new(&["a: {kind: do, act: fail_unless_flag, flag: there}"]);
    other.run(&[]).expect(100);
    let file = other.dir.path().join("theirs.db");
    let export = ["runs", "export", "-o", file.to_str().unwrap()];
    other.retort(&export).expect(0);
    // As recorded by a run in Slurm.
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
    // A local run, older than the next imported one.
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
    for relative in ["latest", "latest~0"] {
        lab.retort(&["resume", relative]).expect(2).saying(&[
            "which comes from another store",
            "continues it, if you trust its recipe",
        ]);
    }
    std::fs::write(lab.dir.path().join("there"), "").unwrap();
    let said = lab.retort(&["resume"]).expect(0);
    said.saying(&[&format!("resuming run {own}")]);
    // It has been continued, so the latest counts.
    let latest = lab.latest().unwrap().summary.id.0;
    lab.retort(&["resume"])
        .expect(0)
        .saying(&[&format!("resuming run {latest}")]);
    // By its name, and without its owner's Slurm settings.
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
    let named = "names so many artifacts and series, or so often";
    for (statements, said) in [(outputs, named), (stages, "more than 1000 stages")] {
        let file = source.changed(&statements);
        let lab = Lab::new(&[]);
        lab.retort(&["runs", "import", file.to_str().unwrap()])
            .expect(2)
            .saying(&[said]);
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
