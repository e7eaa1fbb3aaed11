//! Text from plugins, files and arguments reaches the terminal only as visible text.

use std::fs;

use crate::lab::{CommandOutput, Lab};

/// What no output may contain. `colors`: retort's own sequences are allowed.
#[track_caller]
fn check_clean(said: &CommandOutput, colors: bool) {
    for text in [&said.stdout, &said.stderr] {
        let without = match colors {
            true => without_own_colors(text),
            false => text.clone(),
        };
        let bad = without.chars().find(|&c| {
            (c.is_control() && c != '\n' && c != '\t')
                || ('\u{200b}'..='\u{200f}').contains(&c)
                || ('\u{2028}'..='\u{202e}').contains(&c)
                || ('\u{2060}'..='\u{206f}').contains(&c)
                || c == '\u{feff}'
        });
        assert_eq!(bad, None, "in {without:?}");
    }
}

/// Removes retort's own sequences: `ESC [ numbers m`.
fn without_own_colors(text: &str) -> String {
    let mut pieces = text.split("\x1b[");
    let mut rest = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (code, after) = piece.split_once('m').unwrap_or_default();
        assert!(
            code.split(';')
                .all(|part| part.parse::<u8>().is_ok_and(|part| part < 98 && part != 8)),
            "no colour of ours: {code:?}"
        );
        rest.push_str(after);
    }
    rest
}

#[test]
fn what_a_plugin_says() {
    let lab = Lab::new(&[
        "good: {kind: do, act: trick, amount: 1, text: \"\\e[2J\\u202e\"}",
        "bad: {kind: do, act: trick, amount: 0, description: \"\\e[2J\\u009b\"}",
    ]);
    for color in ["never", "always"] {
        let said = lab
            .run(&["--keep-going", "--force", "-vv", "--color", color])
            .expect(100);
        assert!(said.stderr.contains("evil"), "{}", said.stderr);
        assert!(said.stderr.contains(r"\u001b[2J"), "{}", said.stderr);
        check_clean(&said, color == "always");
    }
    let commands: &[&[&str]] = &[
        &["log"],
        &["log", "--format", "md"],
        &["log", "--format", "csv"],
        &["log", "--json"],
        &["tail"],
        &["tail", "--json"],
        &["runs", "list"],
        &["runs", "show"],
        &["runs", "show", "--json"],
        &["metrics"],
        &["metrics", "--json"],
        &["metrics", "plot", "latest", "*"],
        &["metrics", "plot", "latest", "*", "--svg", "-"],
        &["why", "bad"],
        &["compare", "latest", "latest~1"],
        &["artifacts", "list"],
        &["query", "select * from v_attempts"],
        &[
            "query",
            "select text, text as \"a\u{9b}\" from v_logs",
            "--format",
            "csv",
        ],
        &["plan", "r.yaml", "-v"],
        &["plan", "r.yaml", "--json"],
        &["graph", "r.yaml"],
        &["graph", "r.yaml", "--format", "dot"],
        &["lineage", "latest/good"],
        &["query", "select * from v_logs", "--json"],
        &["query", "select * from v_logs", "--format", "md"],
        &["plugin", "check", "faulty"],
        &["gc"],
        &["doctor"],
    ];
    for command in commands {
        for color in ["never", "always"] {
            let said = lab.retort(&[command, &["--color", color][..]].concat());
            // The machine's properties do not matter here.
            let said = match command[0] {
                "doctor" => said,
                _ => said.expect(0),
            };
            check_clean(&said, color == "always");
            if command.contains(&"--json") && command[0] != "tail" {
                assert!(said.json().to_string().len() > 2);
            }
        }
    }
    // JSON keeps the original text.
    let log = lab.retort(&["log", "--json"]).expect(0).json().to_string();
    assert!(
        log.contains("evil\\u001b[2J") && log.contains('\u{202e}'),
        "{log}"
    );
}

#[test]
fn what_the_history_is_told() {
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.run(&[]).expect(0);
    lab.retort(&[
        "runs",
        "note",
        "latest",
        "evil\x1b[2J\u{9b}\u{202e}\u{2067}\u{200b}",
    ])
    .expect(0);
    for command in [
        &["runs", "note", "latest"][..],
        &["runs", "show"],
        &["runs", "list"],
    ] {
        let said = lab.retort(command).expect(0);
        check_clean(&said, false);
    }
}

#[test]
fn what_recipes_files_and_arguments_are_called() {
    let lab = Lab::new(&["a: {kind: do}"]);
    let odd = "x\x1b[2J\u{9b}\u{202e}\u{2028}.yaml";
    for text in [
        "version: 1\n\u{202e}zzz\u{2066}: \"\\e[2J\" # \u{202e}\n",
        "version: 1\nbackend: faulty\nname: \"a\\e[2J\\u009b\"\nstages: {\"a\\e]0;x\\a\": {kind: do}}\n",
        "version: 1\nbackend: \"\\e[2J\"\nstages: {a: {kind: \"\\u009b2J\", device: \"\\u202e\"}}\n",
        "version: 1\nbackend: faulty\nstages: {a: {kind: do, file: \"\\e[2J\\u2066\", input: \"\\e[1m\"}}\n",
        "version: 1\nx: [ # \u{2028}\u{200b}\n",
    ] {
        fs::write(lab.dir.path().join(odd), text).unwrap();
        for command in ["validate", "plan", "run", "graph"] {
            let said = lab.retort(&[command, odd, "--color", "always"]);
            assert_ne!(said.code, Some(101), "{}", said.stderr);
            check_clean(&said, true);
        }
    }
    for arguments in [
        &["run", "r.yaml", "--set", "a.text\x1b[2J=\u{9b}"][..],
        &["run", "r.yaml", "--set", "nowhere\u{202e}=\x1b[2J"],
        &["run", "r.yaml", "--\x1b[2Jnothing"],
        &["runs", "show", "\x1b[2J\u{202e}"],
        &["runs", "list", "--where", "x = '\u{9b}"],
        &["query", "select '\x1b[2J' as '\u{202e}' from"],
        &["inspect", odd],
        &["inspect", "\x1b]0;x\x07"],
        &["\u{9b}2J"],
    ] {
        let said = lab.retort(arguments);
        assert_ne!(said.code, Some(101), "{}", said.stderr);
        check_clean(&said, false);
    }
}

#[test]
fn what_is_in_a_checkpoint() {
    let lab = Lab::new(&["a: {kind: do}"]);
    let name = "w\\u001b[2J\\u009b\\u202e";
    let header = format!(
        "{{\"__metadata__\":{{\"\\u001b[2J\":\"x\"}},\"{name}\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}}}"
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend([0; 4]);
    fs::write(lab.dir.path().join("e\u{9b}.safetensors"), file).unwrap();
    for format in ["table", "md", "csv", "json"] {
        let said = lab
            .retort(&["inspect", "e\u{9b}.safetensors", "--format", format])
            .expect(0);
        assert!(said.stdout.contains(r"\u009b"), "{}", said.stdout);
        check_clean(&said, false);
    }
}
