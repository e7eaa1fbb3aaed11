//! Queries in SQL: they only read, and their costs are bounded.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant};

use retort_tests::memory;

use crate::lab::{CommandOutput, Lab, Running, ended, signal_process};

/// A store with two runs.
fn lab() -> Lab {
    let lab = Lab::new(&[
        "a: {kind: do, text: hello}",
        "b: {kind: do, text: second, input: a}",
    ]);
    lab.run(&[]).expect(0);
    lab.run(&["--set", "b.act=abort"]).expect(100);
    lab
}

#[test]
fn a_question_reads_the_history_and_does_nothing_else() {
    let lab = lab();
    let before = std::fs::read_dir(lab.dir.path()).unwrap().count();
    for statement in [
        "vacuum into 'x.db'",
        "vacuum",
        "attach database 'x.db' as x",
        "attach database ':memory:' as x",
        "pragma user_version = 7",
        "pragma journal_mode = delete",
        "pragma temp_store_directory = '.'",
        "pragma writable_schema = on",
        "select load_extension('x.so')",
        "select writefile('x.db', 'x')",
        "select readfile('r.yaml')",
        "select fts3_tokenizer('x')",
        "delete from runs",
        "update runs set note = 'x'",
        "create temp table x (a)",
        "create temp view x as select 1",
        "begin immediate",
        "savepoint x",
        "reindex",
        "analyze",
        "explain delete from runs",
        "select 1; vacuum into 'x.db'",
        "select * from pragma_journal_mode; vacuum into 'x.db'",
        "with x as (select 1) insert into tags select 1, 'x' from x",
    ] {
        lab.retort(&["query", statement])
            .expect(2)
            .saying(&["the statement failed"]);
    }
    assert_eq!(std::fs::read_dir(lab.dir.path()).unwrap().count(), before);
    for statement in [
        "select count(*) from v_metrics",
        "with recursive n(k) as (select 1 union all select k + 1 from n where k < 5) select sum(k) from n",
        "select r.id, json_extract(r.environment, '$.host') from v_runs r join (select run from v_stages) s on s.run = r.id",
        "select name, (select group_concat(name) from pragma_table_info(v.name)) from sqlite_schema v where type = 'view'",
        "select row_number() over (order by seconds), upper(recipe) from v_runs",
        "explain query plan select * from v_runs",
        "values (1), (2)",
    ] {
        lab.retort(&["query", statement]).expect(0);
    }
}

#[test]
fn an_endless_answer_takes_little_memory_and_ends_when_told() {
    let lab = lab();
    let endless = "with recursive n(k) as (select 1 union all select k + 1 from n)
        select k, hex(zeroblob(500)) as zeros from n";
    for format in ["csv", "json"] {
        let mut command = lab.command(&["query", endless, "--format", format]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        // 400 MB of text.
        for _ in 0..400_000 {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0);
        }
        let peak = memory::peak_of(child.id()).unwrap();
        assert!(peak < 150_000, "{peak} kB");
        signal_process(child.id(), 2);
        std::io::copy(&mut lines, &mut std::io::sink()).unwrap();
        assert!(!child.wait().unwrap().success());
    }
    // A closed pipe ends it as well, and is not an error.
    let mut command = lab.command(&["query", endless, "--format", "csv"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 4096];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    assert!(child.wait().unwrap().success());
    // A table has to be complete before it can be printed.
    let said = lab
        .retort(&["query", endless])
        .expect(0)
        .saying(&["only the first 10000 rows", "--format csv"]);
    assert_eq!(said.stdout.lines().count(), 10_001);
    for large in [
        "select zeroblob(1000000000)",
        "select group_concat(hex(zeroblob(1000))) from (with recursive n(k) as
        (select 1 union all select k + 1 from n limit 40000) select k from n)",
    ] {
        lab.retort(&["query", large, "--format", "csv"])
            .expect(2)
            .saying(&["too big"]);
    }
}

/// Longer than any statement that is refused for its size takes.
const REFUSED: &str = "2min";

/// A statement's peak memory in KiB, and its result. It may search for a row this long.
fn weighed(lab: &Lab, statement: &str, timeout: &str) -> (i64, CommandOutput) {
    let before = Instant::now();
    let mut command = lab.command(&["query", statement, "--format", "csv", "--timeout", timeout]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let errors = std::thread::spawn(move || std::io::read_to_string(stderr).unwrap());
    let stdout = std::io::read_to_string(stdout).unwrap();
    let (code, usage) = ended(child);
    assert!(before.elapsed() < Duration::from_secs(100), "{statement}");
    let said = CommandOutput {
        code,
        stdout,
        stderr: errors.join().unwrap(),
    };
    (usage.ru_maxrss, said)
}

#[test]
fn a_statement_that_finds_no_row_ends_by_itself() {
    let lab = lab();
    let numbers = "with recursive n(k) as (select 1 union all select k + 1 from n)";
    for statement in [
        format!("{numbers} select count(*) from n"),
        // So little per row that, on a fast machine, it is not refused for its size first.
        format!("{numbers} select group_concat(k % 2, '') from n"),
        format!("{numbers} select sum(k) over (order by k) from n"),
        format!("{numbers} select k from n where k < 0"),
        format!(
            "{numbers}, m(k) as (select k from n limit 100000)
            select count(*) from m a, m b, m c where a.k + b.k + c.k = -1"
        ),
        // Hours within a single step of SQLite's.
        "with t(a) as (select replace(hex(zeroblob(4000000)), '0', 'a'))
         select instr(a || a, a || 'b') from t"
            .to_owned(),
    ] {
        let (peak, said) = weighed(&lab, &statement, "2s");
        said.expect(2)
            .saying(&["no row was found in 2s", "--timeout"]);
        assert!(peak < 700_000, "{peak} kB: {statement}");
    }
    // It has a separate connection, so the next query works normally.
    lab.retort(&["query", "select count(*) from v_runs"])
        .expect(0);
}

#[test]
fn values_that_grow_without_bound_are_refused() {
    let lab = lab();
    let doubled = (0..40).fold("'x'".to_owned(), |text, _| format!("({text}) || 'x'"));
    let bomb = "with recursive n(k, t) as (select 1, 'x' union all select k + 1, t || t from n)";
    for statement in [
        "select zeroblob(1000000000)",
        "select replace(hex(zeroblob(10000000)), '0', 'xxxxxxxxxx')",
        "select hex(hex(hex(zeroblob(10000000))))",
        "select quote(zeroblob(30000000))",
        &format!("{bomb} select max(length(t)) from n"),
        "with recursive n(k) as (select 1 union all select k + 1 from n limit 100)
         select json_group_array(hex(zeroblob(1000000))) from n",
    ] {
        let (peak, said) = weighed(&lab, statement, REFUSED);
        said.expect(2).saying(&["the statement failed"]);
        assert!(peak < 700_000, "{peak} kB: {statement}");
    }
    // What SQLite does not refuse it leaves out.
    for statement in [
        "select printf('%.*c', 1000000000, 'x')",
        "select printf('%1000000000d', 1)",
    ] {
        let (peak, said) = weighed(&lab, statement, REFUSED);
        assert!(
            said.stdout.len() < 1 << 20 && peak < 400_000,
            "{peak} kB: {statement}"
        );
    }
    // Many values of the greatest size, in one row.
    let wide = vec!["hex(zeroblob(8000000))"; 100].join(", ");
    let (peak, said) = weighed(&lab, &format!("select {wide}"), REFUSED);
    said.expect(2);
    assert!(peak < 900_000, "{peak} kB");
    lab.retort(&["query", &format!("select {doubled}")])
        .expect(0);
}

/// SQLite has memory for the row, but the library has none for its copy: the connection breaks. Several at the same time, and
/// several times, because how it breaks depends on which of its threads runs first.
#[test]
fn a_row_that_breaks_the_connection_is_refused() {
    let lab = lab();
    let twice = vec!["zeroblob(30000000)"; 16].join(", ");
    for _ in 0..8 {
        let asked = [(); 4].map(|()| {
            let mut command = lab.command(&["query", &format!("select {twice}")]);
            let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
            Running::new(command.spawn().unwrap())
        });
        for running in asked {
            running
                .end()
                .expect(2)
                .saying(&["a row of the answer does not fit in memory"]);
        }
    }
    for nothing in ["", " -- nothing"] {
        lab.retort(&["query", nothing]).expect(0);
    }
}

#[test]
fn several_questions_at_once_are_refused() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    for sql in ["select 1; select 2,3", "select * from v_runs; select 1"] {
        lab.retort(&["query", sql])
            .expect(2)
            .saying(&["one statement at a time", "`select`"]);
    }
    for sql in [
        "select 1;",
        ";select 1 ; -- that is all",
        "select ';' /* ; */",
    ] {
        lab.retort(&["query", sql]).expect(0);
    }
}

#[test]
fn filters_of_more_conditions_than_are_looked_at_are_refused() {
    let lab = Lab::new(&["a: {kind: do, text: hello}"]);
    lab.run(&[]).expect(0);
    let any = |count: usize| vec!["state = failed"; count].join(" or ");
    let within = |count: usize| format!("id in ({})", vec!["x"; count].join(", "));
    for filter in [any(500), within(500)] {
        lab.retort(&["runs", "list", "--where", &filter]).expect(0);
    }
    for filter in [any(501), any(5_000), within(501), within(20_000)] {
        lab.retort(&["runs", "list", "--where", &filter])
            .expect(2)
            .saying(&["more than 500 conditions"]);
    }
}
