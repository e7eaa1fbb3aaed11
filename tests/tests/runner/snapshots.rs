//! Exact outputs: tables, plans, and every kind of error with a marked line.
//!
//! The texts are in `snapshots/`. `INSTA_UPDATE=always cargo test --release -p retort-tests --test runner snapshots` rewrites
//! them; review the difference like that of any other file.

use std::fmt::Write as _;
use std::fs;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use crate::lab::{Lab, block_on};

/// Variable parts of outputs, and their placeholders.
const VARYING: [(&str, &str); 9] = [
    (r"/[^\s`'\x22]*/\.tmp[A-Za-z0-9]{6}", "LAB"),
    (r"/[^\s`'\x22]*/tmp/(installed/retort|plugins)", "BUILD"),
    (r"/[^\s`'\x22]*/(target|release)/[^\s`'\x22]*", "BUILD"),
    (r"\b[0-9a-f]{64}\b", "HASH"),
    (r"\b[0-9]{4} days ago", "DAYS days ago"),
    (
        r"(?m)^(retort|host|os|kernel|arch|cpu|cores|memory)  .*$",
        "$1  ...",
    ),
    // A column whose width comes from a path; not what stands before a mark under a line.
    (r"(?m)^([^|\n]+?) {60,}", "$1  "),
    (r":[0-9]{2}\.[0-9]{3}Z", ":SS.MMMZ"),
    (r" +\n", "\n"),
];

#[track_caller]
fn check(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for (pattern, word) in VARYING {
        settings.add_filter(pattern, word);
    }
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// Appends a command as typed, its output, and its exit code.
fn tell(text: &mut String, lab: &Lab, arguments: &[&str]) {
    let said = lab.retort(arguments);
    assert!(!said.stderr.contains("panicked at"), "{}", said.stderr);
    let typed: Vec<String> = arguments
        .iter()
        .map(
            |argument| match argument.is_empty() || argument.contains([' ', '<', '>', '$', '*']) {
                true => format!("'{argument}'"),
                false => (*argument).to_owned(),
            },
        )
        .collect();
    let _ = writeln!(text, "$ retort {}", typed.join(" "));
    text.push_str(&said.stdout);
    text.push_str(&said.stderr);
    let code = said.code.expect("it was not killed");
    let _ = writeln!(text, "[exit {code}]\n");
}

/// The verdict on each of these recipes.
fn verdicts(recipes: &[&str]) -> String {
    let mut text = String::new();
    for recipe in recipes {
        let lab = Lab::new(&[]);
        fs::write(lab.dir.path().join("r.yaml"), recipe).unwrap();
        tell(&mut text, &lab, &["validate", "r.yaml"]);
    }
    text
}

/// A recipe for the fixture plugin with these lines after its head.
macro_rules! recipe {
    ($($line:literal),* $(,)?) => {
        concat!("version: 1\nbackend: faulty\n", $($line, "\n"),*)
    };
}

#[test]
fn faults_of_yaml() {
    let deep = format!(
        "version: 1\nparams: {}{}\n",
        "[".repeat(130),
        "]".repeat(130)
    );
    let large = format!("version: 1\nparams: {{a: [{}]}}\n", "[1],".repeat(60_000));
    let long = format!("version: 1\nparams: {{{}: 1}}\n", "a".repeat(1100));
    check(
        "yaml",
        &verdicts(&[
            "",
            "# only a comment\n",
            "version: 1\nstages:\n\ta: {kind: do}\n",
            "version: 1\nstages:\n  a: {kind: do\n",
            "version: 1\nstages:\n  a: {kind: \"do}\n",
            "version: 1\nversion: 1\n",
            "version: 1\n---\nversion: 1\n",
            "version: 1\nstages: !run {a: {kind: do}}\n",
            "version: 1\nstages: *nothing\n",
            "version: 1\nstages: &a {a: *a}\n",
            "version: 1\nname: \"\u{7}\"\n",
            "- version: 1\n",
            "version: 1\n1: 2\n? [a]\n: 3\n",
            "version: 1\nname: a: b\n",
            "version: 1\nstages:\n  a: {kind: do}\n   b: {kind: do}\n",
            "version: 1\nstages:\n  a:\n    kind do\n    text: x\n",
            "version: 1\nname\nstages: {}\n",
            "version: 1\nstages: {a: {kind: do}}}\n",
            "%name\nversion: 1\n",
            "version: 1\nname: %d\n",
            "version: 1\nname: @me\n",
            "version: 1\nname: \"\\q\"\n",
            "version: 1\nname: |x\n  a\n",
            "version: 1\n- a\n",
            "version: 1\nname:\u{a0}x\nstages: {}\n",
            "version: 1\n<<: 3\n",
            "version: 1\nparams: {a: !!int x}\n",
            recipe!["stages:", "\u{a0} a: {kind: do}"],
            recipe!["stages:", "  a: {kind: do, te\u{a0}xt: x}"],
            recipe!["stages:", "  a: {kind: do, : x}"],
            recipe!["stages:", "  a: {kind: do}", "  a: {kind: do}"],
            recipe!["params: {a: .inf}", "stages:", "  a: {kind: do}"],
            &deep,
            &large,
            &long,
        ]),
    );
}

#[test]
fn faults_of_recipes() {
    let stages: String = (0..1001)
        .map(|stage| format!("  s{stage}: {{kind: do}}\n"))
        .collect();
    let many = format!("version: 1\nbackend: faulty\nstages:\n{stages}");
    check(
        "recipes",
        &verdicts(&[
            "backend: faulty\nstages:\n  a: {kind: do}\n",
            "version: 2\nbackend: faulty\nstages:\n  a: {kind: do}\n",
            "version: 1\nstages:\n  a: {kind: do}\n",
            recipe!["stage:", "  a: {kind: do}"],
            recipe!["stages: {}"],
            recipe!["stages:", "  a: do"],
            recipe!["stages:", "  a: {text: x}"],
            recipe!["stages:", "  a: {kind: di}"],
            recipe!["stages:", "  a: {kind: do, txet: x}"],
            recipe!["stages:", "  a: {kind: do, amount: many}"],
            recipe!["stages:", "  a: {kind: do, amount: 1e400}"],
            recipe!["stages:", "  a: {kind: do, text: [x]}"],
            recipe!["stages:", "  a: {kind: do, act: nothing}"],
            recipe!["stages:", "  a/b: {kind: do}"],
            recipe!["stages:", "  a: {kind: do, device: gpu}"],
            recipe!["stages:", "  a: {kind: do, device: cuda:1}"],
            recipe!["stages:", "  a: {kind: do, dtype: f8}"],
            recipe!["stages:", "  a: {kind: do, backend: torch}"],
            recipe!["stages:", "  a: {kind: do, timeout: 90}"],
            recipe!["stages:", "  a: {kind: do, timeout: 0s}"],
            recipe!["stages:", "  a: {kind: do, workers: 2}"],
            recipe!["stages:", "  a: {kind: do, seed: 1.5}"],
            recipe!["seed: 010", "stages:", "  a: {kind: do}"],
            recipe!["stages:", "  a: {kind: do, file: no-such-file.csv}"],
            recipe!["stages:", "  a: {kind: do, folder: r.yaml}"],
            recipe!["stages:", "  a: {kind: do, pictures: .}"],
            recipe!["stages:", "  a: {kind: do, min_workers: 2}"],
            recipe!["stages:", "  a: {kind: do, file: ~}"],
            recipe!["stages:", "  a: {kind: do, file: ~root/x}"],
            recipe!["stages:", "  a: {kind: do, file: $HOME/x}"],
            recipe!["stages:", "  a: {kind: do, file: \"a\u{a0}b\"}"],
            recipe!["stages:", "  a: {kind: do, amount: \"3\"}"],
            recipe!["stages:", "  a: {kind: do, amount: 1_000}"],
            recipe!["stages:", "  a: {kind: do, amount: }"],
            recipe!["stages:", "  a: {kind: do, seed: 18446744073709551616}"],
            recipe!["stages:", "  a: {kind: do, seed: \"17\u{a0}000\"}"],
            recipe!["stages:", "  a: {kind: do, seed: 0100}"],
            recipe!["stages:", "  a: {kind: do, seed: -1}"],
            recipe!["stages:", "  a: {kind: do, threads: 100000}"],
            recipe!["name: a/b", "stages:", "  a: {kind: do}"],
            "version: 1\nbackend: ../x\nstages:\n  a: {kind: do}\n",
            recipe![
                "artifacts: {b: {kind: thing, hash: abc}}",
                "stages:",
                "  a: {kind: do}"
            ],
            &many,
        ]),
    );
}

#[test]
fn faults_of_references() {
    let recipe = |params: &[String]| {
        let params: String = params
            .iter()
            .enumerate()
            .map(|(number, value)| format!("  p{number}: {value}\n"))
            .collect();
        format!("version: 1\nbackend: faulty\nparams:\n{params}stages:\n  a: {{kind: do}}\n")
    };
    let chain = |first: &str, count: usize, times: usize| -> Vec<String> {
        let next = |number: usize| format!("${{params.p{number}}}").repeat(times);
        [first.to_owned()]
            .into_iter()
            .chain((0..count - 1).map(next))
            .collect()
    };
    let long = recipe(&chain("x", 52, 1));
    let growing = recipe(&chain(&"x".repeat(63), 17, 2));
    check(
        "references",
        &verdicts(&[
            recipe![
                "stages:",
                "  first: {kind: do}",
                "  b: {kind: do, input: frist}"
            ],
            recipe!["stages:", "  a: {kind: do, input: a}"],
            recipe![
                "stages:",
                "  a: {kind: do, input: b}",
                "  b: {kind: do, input: a}"
            ],
            recipe!["stages:", "  a: {kind: do, text: \"${params.x}\"}"],
            recipe![
                "params: {size: 3}",
                "stages:",
                "  a: {kind: do, text: \"${params.sise}\"}"
            ],
            recipe![
                "params: {a: 1}",
                "stages:",
                "  a: {kind: do, text: \"${param.a}\"}"
            ],
            recipe![
                "params: {a: 1}",
                "stages:",
                "  a: {kind: do, text: \"${params.a\"}"
            ],
            recipe![
                "params: {a: [1]}",
                "stages:",
                "  a: {kind: do, text: \"x${params.a}\"}"
            ],
            recipe![
                "params: {a: \"${params.b}\", b: \"${params.a}\"}",
                "stages:",
                "  a: {kind: do}"
            ],
            recipe![
                "paths: {p: nowhere}",
                "stages:",
                "  a: {kind: do, file: \"${paths.p}/x\"}"
            ],
            recipe!["stages:", "  a: {kind: do, input: something-else}"],
            recipe![
                "artifacts: {b: {kind: thing, hash: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa}}",
                "stages:",
                "  a: {kind: do, input: b}",
                "  b: {kind: do}"
            ],
            recipe![
                "artifacts: {b: {kind: other, hash: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa}}",
                "stages:",
                "  a: {kind: do, input: b}"
            ],
            &long,
            &growing,
        ]),
    );
}

/// Stages for the candle plugin with these lines, in which `DATA` stands for a folder of images.
fn of_candle(stages: &[&str]) -> String {
    let stages: String = stages
        .iter()
        .map(|stage| format!("  {}\n", stage.replace("DATA", "{folder: ., size: 16}")))
        .collect();
    format!("version: 1\nbackend: candle\ndevice: cpu\nstages:\n{stages}")
}

/// Most of these are refused by the plugin itself, not by its schema.
#[test]
fn faults_of_options() {
    let codes =
        "codes: {kind: tokenizer, data: DATA, codebook_size: 16, codebook_dim: 4}".to_owned();
    let teacher =
        "teacher: {kind: pretrain, data: DATA, tokenizer: codes, width: 32, depth: 2, heads: 2}";
    let pairs = "pairs: {kind: trajectories, teacher: teacher, count: 100}";
    let tokenizer = |option: &str| codes.replace("dim: 4", &format!("dim: 4, {option}"));
    let made = |stage: &str| of_candle(&[&codes, teacher, pairs, stage]);
    let recipes = [
        of_candle(&[&tokenizer("train: {steps: 0}")]),
        of_candle(&[&tokenizer("workers: 2, min_workers: 3")]),
        of_candle(&[&tokenizer("norm_groups: 7")]),
        of_candle(&[&tokenizer("scales: [1, 2]")]),
        of_candle(&[&codes, &teacher.replace("heads: 2", "heads: 3")]),
        of_candle(&[
            &codes,
            teacher,
            &pairs.replace("teacher: teacher", "teacher: codes"),
        ]),
        of_candle(&[
            &codes,
            teacher,
            &pairs.replace("100", "100, range: [50, 200]"),
        ]),
        made("student: {kind: distill, teacher: teacher, trajectories: pairs, timesteps: [2, 0]}"),
        made("drawn: {kind: sample, sampler: {kind: teachr, teacher: teacher}, count: 10}"),
        made(
            "drawn: {kind: sample, sampler: {kind: teacher, teacher: teacher}, count: 10, png: yes}",
        ),
        made(
            "drawn: {kind: sample, sampler: {kind: teacher, teacher: teacher}, count: 10, images: none}",
        ),
        made(
            "drawn: {kind: sample, sampler: {kind: teacher, teacher: teacher}, count: 10, images: none, npz: true}",
        ),
        of_candle(&["pictures: {kind: images, data: {folder: ., csv: r.yaml, size: 16}}"]),
        of_candle(&["pictures: {kind: images, data: {folder: ., size: [16]}}"]),
        of_candle(&["measured: {kind: evaluate}"]),
        of_candle(&["measured: {kind: evaluate, data: DATA}"]),
        of_candle(&["measured: {kind: evaluate, data: DATA, preparation: [pytorch, tensorflow]}"]),
    ];
    let recipes: Vec<&str> = recipes.iter().map(String::as_str).collect();
    check("options", &verdicts(&recipes));
}

#[test]
fn faults_of_settings() {
    let lab = Lab::new(&[]);
    let recipe = recipe![
        "params: {width: 3, list: [1, 2]}",
        "stages:",
        "  first: {kind: do, amount: \"${params.width}\"}",
        "  last: {kind: do, input: first}",
    ];
    fs::write(lab.dir.path().join("r.yaml"), recipe).unwrap();
    let mut text = String::new();
    for setting in [
        "first.amount",
        "=3",
        "first.amount=many",
        "first.amuont=3",
        "frist.amount=3",
        "first.amount=[",
        "seed=1.5",
        "first.text={a: b}",
        "first.text=",
        "first.text=null",
        "first.amount=~",
        "first.text=\"\"",
        "params.wdth=1",
        "paths.x=1",
        "a..b=1",
        "params.list.5=1",
        "params.width.x=1",
        "first.amount.x=1",
        "first.amount=\"3",
    ] {
        tell(&mut text, &lab, &["validate", "r.yaml", "--set", setting]);
    }
    for arguments in [
        &["--from", "lats"][..],
        &["--until", "nothing"],
        &["--from", "last", "--until", "first"],
        &["--force=x", "-q"],
        &["--from=", "-q"],
        &["--sweep", "first.amount"],
        &["--sweep", "=1,2"],
        &["--sweep", "first.amuont=1,2"],
        &["--sweep", "first.amount=9..1"],
        &["--sweep", "first.amount=1,,2"],
        &["--sweep", "first.amount=1,1"],
        &["--sweep", "first.amount=log:1,2"],
        &["--sweep", "first.amount=log:a..b"],
        &["--sweep", "first.amount=log:0..5"],
        &["--sweep", "first.amount=0..5/x"],
        &["--sweep", "first.amount=0.1..0.5/1"],
        &["--sweep", "first.amount=0.5..0.1/3"],
        &["--sweep", "first.amount=0..inf/3"],
        &["--sweep", "first.amount=0.1..0.5"],
        &["--sweep", "first.amount=1..20000"],
        &[
            "--sweep",
            "first.amount=1..3000",
            "--sweep",
            "last.amount=1..3000",
        ],
        &["--sweep", "first.amount=1,2", "--sweep", "first.amount=3,4"],
        &["--sweep", "first.amount=1..3", "--sample", "20000"],
        &["--sweep"],
    ] {
        tell(&mut text, &lab, &[&["run", "r.yaml"], arguments].concat());
    }
    check("settings", &text);
}

#[test]
fn faults_of_filters() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    let mut text = String::new();
    for filter in [
        "",
        "state =",
        "state = failed and",
        "(state = failed",
        "state = failed)",
        "state = faild",
        "stat = failed",
        "stage.a = failed",
        "stage.state = failed",
        "stage.a.stat = failed",
        "age > soon",
        "seed = 'x",
        "seed = = 3",
        "metrics.a/b <",
        "größe = 3 oder x",
        "tag < a",
        "tag in (a",
        "params.a.amount < null",
        "params.a.amuont = 3",
        "metrics.tock > 3",
        "took < long",
        "seed = nan",
    ] {
        tell(&mut text, &lab, &["runs", "list", "--where", filter]);
    }
    for sort in ["metrics.", "-", "state,,"] {
        tell(
            &mut text,
            &lab,
            &["runs", "list", &format!("--sort={sort}")],
        );
    }
    check("filters", &text);
}

#[test]
fn faults_of_sweeps() {
    let stages = "stages:\n  a: {kind: do, act: work, amount: 1}\n";
    let recipes = [
        "{}",
        "{parameters: {}}",
        "{parameters: {a.amount: []}}",
        "{parameters: {a.amuont: [1, 2]}}",
        "{parameters: {a.amount: 1..}}",
        "{parameters: {a.amount: {min: 1, max: 3}}}",
        "{parameters: {a.amount: {min: 3, max: 1, count: 2}}}",
        "{parameters: {a.amount: {min: 0, max: 1, log: true, count: 3}}}",
        "{parameters: {a.amount: [1, 2]}, sample: 0}",
        "{parameters: {a.amount: [1, 2]}, objective: {goal: min}}",
        "{parameters: {a.amount: [1, 2]}, objective: {metric: a/tick, goal: most}}",
        "{parameters: {a.amount: [1, many]}}",
        "{parameters: {a.amount: [1, 1]}}",
        "{parameters: {a.amount: {choice: []}}}",
        "{parameters: {a.amount: {choice: [1, 2], count: 2}}}",
        "{parameters: {a.amount: {min: 1}}}",
        "{parameters: {a.amount: {min: 1, max: 3, int: true, count: 2}}}",
        "{parameters: {a.amount: {min: 0.5, max: 3, int: true}}}",
        "{parameters: {a.amount: {min: 3, max: 1, int: true}}}",
        "{parameters: {a.amount: {min: 0, max: 1, count: 1}}}",
        "{parameters: {a.amount: [1, 2]}, sample: 20000}",
        "{parameters: {a.amount: [1, 2]}, asha: {metric: a/tick, rungs: []}}",
        "{parameters: {a.amount: [1, 2]}, asha: {metric: a/tick, rungs: [4, 2]}}",
    ];
    let mut text = String::new();
    for sweep in recipes {
        let lab = Lab::new(&[]);
        let recipe = format!("version: 1\nbackend: faulty\nsweep: {sweep}\n{stages}");
        fs::write(lab.dir.path().join("r.yaml"), recipe).unwrap();
        tell(&mut text, &lab, &["run", "r.yaml", "--sweep"]);
    }
    check("sweeps", &text);
}

#[test]
fn faults_of_project_files() {
    let mut text = String::new();
    for settings in [
        "executor = \"slrum\"\n",
        "[slurm]\npartitoin = \"p\"\n",
        "[slurm]\ncpus = \"four\"\n",
        "executor = \"local\n",
        "[slurm.kinds.distill]\nrequeue = -1\n",
        "[slurm.kinds.do.kinds.do]\ncpus = 1\n",
        "[slurm.kinds.\"\"]\ncpus = 1\n",
        "[slurm]\npartition = \"a\\nb\"\n",
        "executor = \"slurm\"\n[slurm]\nprologue = \"true\"\n",
        "executor = \"slurm\"\n[slurm]\nsignal = \"soon\"\n",
        "executor = \"slurm\"\n[slurm]\ncpus = 0\n",
    ] {
        let lab = Lab::new(&["a: {kind: do}"]);
        fs::write(lab.dir.path().join("retort.toml"), settings).unwrap();
        tell(&mut text, &lab, &["run", "r.yaml"]);
    }
    let lab = Lab::new(&["a: {kind: do}"]);
    for setting in [
        "gpu",
        "partitoin=gpu",
        "do.a.b=3",
        "cpus=four",
        "kinds=3",
        "sbatch=constraint",
        "sbatch=--array=0-3",
        "sbatch=--clusters=other",
    ] {
        let arguments = ["run", "r.yaml", "--executor", "slurm", "--slurm", setting];
        tell(&mut text, &lab, &arguments);
    }
    check("project-files", &text);
}

/// Two runs: one of three stages, and one that reused one of them and failed. Ids, times and sizes are fixed.
fn history() -> Lab {
    let lab = Lab::new(&[
        "codes: {kind: do, text: one}",
        "student: {kind: do, act: work, amount: 3, input: codes}",
        "table: {kind: do, text: two, input: student}",
    ]);
    lab.run(&[]).expect(0);
    lab.retort(&["runs", "tag", "latest", "baseline"]).expect(0);
    lab.run(&["--set", "student.amount=4", "--set", "table.act=refuse"])
        .expect(100);
    settle(&lab);
    lab
}

/// Replaces ids, times and sizes with fixed ones.
fn settle(lab: &Lab) {
    block_on(async {
        let options = SqliteConnectOptions::new().filename(lab.store_dir().join("history.db"));
        let mut connection = options.connect().await.unwrap();
        let statements = "
            update sweeps set id = printf('sweep%05d', key), created = 1700000000000 + key * 60000;
            update runs set id = printf('run%07d', key), created = 1700000000000 + key * 60000,
                finished = 1700000009000 + key * 60000;
            update attempts set worker_pid = 100, cpu_seconds = key, max_rss = key * 1000000,
                started = 1700000000000 + key * 1000, finished = 1700000000000 + key * 3000;
            update artifacts set created = 1700000000000;
            update outputs set created = 1700000000000;
            update series set base = 1700000000000;
            update logs set at = 1700000000000 + key";
        sqlx::raw_sql(AssertSqlSafe(statements.to_owned()))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
    });
}

#[test]
fn tables_of_sweeps() {
    let lab = Lab::new(&["a: {kind: do, act: work, amount: 1}"]);
    let sweep = ["--sweep", "a.amount=1..3", "--objective", "max:a/tick"];
    lab.run(&sweep).expect(0);
    settle(&lab);
    let mut text = String::new();
    for arguments in [
        &["sweep", "list"][..],
        &["sweep", "show"],
        &["sweep", "show", "--format", "csv"],
        &["sweep", "best", "-n", "2"],
        &["sweep", "show", "nothing"],
        &["runs", "list"],
    ] {
        tell(&mut text, &lab, arguments);
    }
    check("sweep-tables", &text);
}

#[test]
fn formats() {
    let lab = history();
    let mut text = String::new();
    for format in ["table", "json", "csv", "md"] {
        tell(&mut text, &lab, &["runs", "list", "--format", format]);
    }
    tell(&mut text, &lab, &["artifacts", "verify"]);
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/checkpoints");
    for file in [
        "expected.safetensors",
        "flat.pth",
        "hostile_reduce.pth",
        "hostile_truncated_zip.pth",
    ] {
        tell(&mut text, &lab, &["inspect", &format!("{golden}/{file}")]);
    }
    check("formats", &text.replace(golden, "GOLDEN"));
}

#[test]
fn tables() {
    let lab = history();
    let mut text = String::new();
    for arguments in [
        &["runs", "list"][..],
        &["runs", "list", "--show", "params.student.amount,state"],
        &["runs", "list", "--where", "state = failed"],
        &["runs", "list", "--where", "state = lost"],
        &["runs", "show", "run0000001"],
        &["runs", "show", "run0000002"],
        &["runs", "show", "run0000003"],
        &["artifacts", "list"],
        &["metrics", "list", "run0000001"],
        &["metrics", "get", "run0000001", "student/tick"],
        &["log", "run0000001"],
        &["compare", "run0000001", "run0000002"],
        &["why", "student", "run0000002"],
        &["why", "codes", "run0000002"],
        &["lineage", "run0000001/table"],
        &["plan", "r.yaml"],
        &["plan", "r.yaml", "--set", "codes.text=other"],
        &["plan", "r.yaml", "--until", "student", "--force=codes"],
        &["graph", "r.yaml"],
        &["gc"],
        &["query", "select stage, state from v_stages"],
        &["query", "select x from v_stages"],
    ] {
        tell(&mut text, &lab, arguments);
    }
    // They depend on the plugin's compiler.
    let digests = lab.retort(&[
        "query",
        "select digest from v_attempts order by stage, run",
        "--json",
    ]);
    for (number, row) in digests.json().as_array().unwrap().iter().enumerate() {
        let digest = row["digest"].as_str().unwrap();
        text = text.replace(&digest[..12], &format!("digest-{number:05}"));
    }
    check("tables", &text);
}
