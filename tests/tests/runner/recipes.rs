//! Recipes by people and by attackers: checked quickly, in little memory, with a location and a hint.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};

use crate::lab::{CommandOutput, Lab};

const HEAD: &str = "version: 1\nbackend: faulty\n";
const STAGES: &str = "stages:\n  a: {kind: do}\n";

/// A recipe's verdict, reached with at most 200 MB of data and a second of a processor.
fn judge(text: impl AsRef<[u8]>, arguments: &[&str]) -> CommandOutput {
    let lab = Lab::new(&[]);
    fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    judged(&lab, arguments)
}

fn judged(lab: &Lab, arguments: &[&str]) -> CommandOutput {
    let mut command = lab.command(&[&["validate", "r.yaml"], arguments].concat());
    // SAFETY: between fork and exec only an async-signal-safe function is called.
    unsafe {
        command.pre_exec(|| {
            for (what, limit) in [(libc::RLIMIT_DATA, 200_000_000), (libc::RLIMIT_CPU, 1)] {
                let limit = libc::rlimit {
                    rlim_cur: limit,
                    rlim_max: limit,
                };
                if libc::setrlimit(what, &limit) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    // A busy processor may take longer for a while, so the least time counts.
    let judged = (0..20).find_map(|_| {
        let output = command.output().unwrap();
        match output.status.signal() {
            Some(libc::SIGXCPU | libc::SIGKILL) => None,
            _ => Some(output),
        }
    });
    let output = judged.expect("a verdict within a second of a processor");
    CommandOutput {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A list of params, each built from the one before.
fn params(count: usize, first: &str, next: impl Fn(usize) -> String) -> String {
    let mut text = format!("{HEAD}params:\n  a0: {first}\n");
    for number in 1..count {
        text.push_str(&format!("  a{number}: {}\n", next(number - 1)));
    }
    text + STAGES
}

#[test]
fn short_recipes_that_grow() {
    let growing = [
        params(40, "xxxxxxxxxx", |n| {
            format!("\"${{params.a{n}}}${{params.a{n}}}\"")
        }),
        params(40, "1", |n| {
            format!("[\"${{params.a{n}}}\", \"${{params.a{n}}}\"]")
        }),
        params(40, "1", |n| {
            format!("{{x: \"${{params.a{n}}}\", y: \"${{params.a{n}}}\"}}")
        }),
        params(40, "1", |n| {
            format!("{{x: [\"${{params.a{n}}}\"], y: \"${{params.a{n}}}\"}}")
        }),
        params(2, &"x".repeat(100_000), |_| "${params.a0}".repeat(50_000)),
    ];
    for text in growing {
        judge(text, &[]).expect(3).saying(&[
            "the params expand to more than",
            "MB of text",
            "write the values out",
            "r.yaml:",
        ]);
    }
    // Reasonable growth is fine.
    let text = params(9, "xxxxxxxxxx", |n| {
        format!("\"${{params.a{n}}}${{params.a{n}}}\"")
    });
    judge(text, &[]).expect(0);
}

#[test]
fn long_chains_of_params() {
    for count in [60, 8_000, 20_000] {
        let text = params(count, "1", |n| format!("\"${{params.a{n}}}\""));
        judge(text, &[])
            .expect(3)
            .saying(&["refer to each other too deeply"]);
        // Earlier ones are built from later ones.
        let mut text = format!("{HEAD}params:\n");
        for number in 0..count {
            text.push_str(&format!("  a{number}: \"${{params.a{}}}\"\n", number + 1));
        }
        let text = format!("{text}  a{count}: 1\n{STAGES}");
        judge(text, &[])
            .expect(3)
            .saying(&["refer to each other too deeply"]);
    }
    let text = params(40, "1", |n| format!("\"${{params.a{n}}}\""));
    judge(text, &["--set", "a.amount=${params.a39}"]).expect(0);
    let nested = params(45, "1", |n| format!("[[[\"${{params.a{n}}}\"]]]"));
    judge(nested, &[]).expect(3).saying(&["too deeply"]);
    let path = format!("params{}=1", ".a".repeat(20_000));
    judge(format!("{HEAD}{STAGES}"), &["--set", &path])
        .expect(3)
        .saying(&["a path is like `seed`"]);
}

/// Lists of a sweep's values, references to nothing, times without end.
#[test]
fn long_lists_and_long_times() {
    let values: Vec<String> = (0..99_000).map(|i| i.to_string()).collect();
    let values = values.join(", ");
    let head = "version: 1\nbackend: faulty\n";
    judge(
        format!(
            "{head}sweep: {{parameters: {{a.amount: [{values}]}}}}\nstages:\n  a: {{kind: do}}\n"
        ),
        &[],
    )
    .expect(0);
    for time in ["300000000000y", "11y"] {
        judge(
            format!("{head}stages:\n  a: {{kind: do, timeout: {time}}}\n"),
            &[],
        )
        .expect(3)
        .saying(&["longer than ten years"]);
    }
    judge(
        format!("{head}stages:\n  a: {{kind: do}}\n"),
        &["--set", "a.timeout=9y"],
    )
    .expect(0);
}

#[test]
fn deep_and_large_recipes() {
    let with = |params: String| format!("{HEAD}params: {params}\n{STAGES}");
    for text in [
        with(format!(
            "{{a: {}{}}}",
            "[".repeat(100_000),
            "]".repeat(100_000)
        )),
        with(format!("{{a: {}", "[".repeat(100_000))),
        with("{a: ".repeat(100_000)),
        with("- ".repeat(100_000)),
        with("? ".repeat(100_000)),
        with("[{".repeat(100_000)),
        format!(
            "{HEAD}params:\n{}{STAGES}",
            (0..800)
                .map(|n| format!("{}a:\n", " ".repeat(n + 1)))
                .collect::<String>()
        ),
    ] {
        let said = judge(text, &[]).expect(3);
        assert!(said.stderr.len() < 20_000, "{}", said.stderr.len());
    }
    judge(
        with(format!("{{a: {}{}}}", "[".repeat(100), "]".repeat(100))),
        &[],
    )
    .expect(0);
    judge(with(format!("{{a: [{}1]}}", "1,".repeat(400_000))), &[])
        .expect(3)
        .saying(&["too large for a recipe"]);
    judge(format!("# {}\n{HEAD}{STAGES}", "x".repeat(17 << 20)), &[])
        .expect(3)
        .saying(&["too large for a recipe"]);
    judge(
        format!("{HEAD}description: \"{}\"\n{STAGES}", "x".repeat(900_000)),
        &[],
    )
    .expect(0);
    let key = "k".repeat(100_000);
    judge(with(format!("{{{key}: 1}}")), &[])
        .expect(3)
        .saying(&["use shorter keys"]);
    let many = "  a: 1\n".repeat(40_000);
    let said = judge(format!("{HEAD}params:\n{many}{STAGES}"), &[]).expect(3);
    said.saying(&["is here twice (first on line 4)"]);
}

#[test]
fn anchors_that_grow() {
    let mut lists = "  a0: &a0 [x, x]\n".to_owned();
    let mut merges = "  a0: &a0 {k: 1}\n".to_owned();
    for number in 1..40 {
        let before = number - 1;
        lists.push_str(&format!(
            "  a{number}: &a{number} [*a{before}, *a{before}]\n"
        ));
        merges.push_str(&format!(
            "  a{number}: &a{number} {{<<: [*a{before}, *a{before}], l{number}: *a{before}}}\n"
        ));
    }
    for params in [lists, merges] {
        judge(format!("{HEAD}params:\n{params}{STAGES}"), &[])
            .expect(3)
            .saying(&["anchors included"]);
    }
    judge(format!("{HEAD}params: {{a: &a [*a]}}\n{STAGES}"), &[])
        .expect(3)
        .saying(&["cannot contain itself"]);
    judge(
        format!("{HEAD}params: &b {{x: &c {{y: 1}}, z: *c}}\n{STAGES}"),
        &[],
    )
    .expect(0);
}

#[test]
fn many_stages_and_many_faults() {
    let stages = |count: usize, options: &str| -> String {
        let stages = (0..count).map(|n| format!("  s{n}: {{kind: do{options}}}\n"));
        format!("{HEAD}stages:\n{}", stages.collect::<String>())
    };
    judge(stages(1000, ""), &[]).expect(0);
    judge(stages(10_000, ""), &[])
        .expect(3)
        .saying(&["a recipe has at most 1000"]);
    for options in [
        ", bad: 1",
        ", amount: x, input: nowhere",
        ", device: gpu, seed: x",
    ] {
        let said = judge(stages(1000, options), &[]).expect(3);
        assert!(said.stderr.len() < 20_000, "{}", said.stderr.len());
        let said = said.saying(&["... and ", " more", "errors"]);
        assert!(said.stderr.contains("s0"), "{}", said.stderr);
        let said = judge(stages(1000, options), &["--json"]).expect(3);
        assert!(said.stdout.len() < 2_000_000, "{}", said.stdout.len());
        said.json();
    }
    let chain: String = (1..1000)
        .map(|n| format!("  s{n}: {{kind: do, input: s{}}}\n", n - 1))
        .collect();
    judge(format!("{HEAD}stages:\n{chain}  s0: {{kind: do}}\n"), &[]).expect(0);
}

/// Suggestions are searched for only while that is quick.
#[test]
fn many_names_that_are_not_there() {
    let stages = |count: usize, stage: &dyn Fn(usize) -> String| -> String {
        let stages = (0..count).map(|n| format!("  {}\n", stage(n)));
        format!("stages:\n{}", stages.collect::<String>())
    };
    let (long, longer) = ("m".repeat(200), "m".repeat(800));
    let by_stage = stages(900, &|n| {
        format!("n{n}{long}: {{kind: do, input: {longer}}}")
    });
    let near = stages(1000, &|n| {
        format!("n{n:060}: {{kind: do, input: m{n:060}}}")
    });
    let params: String = (0..20_000).map(|n| format!("  a{n}: 1\n")).collect();
    let by_param = stages(1000, &|n| {
        format!("s{n}: {{kind: do, text: \"${{params.b{n}}}\", flag: \"${{params.c{n}}}\"}}")
    });
    for text in [by_stage, near, format!("params:\n{params}{by_param}")] {
        let said = judge(format!("{HEAD}{text}"), &[]).expect(3);
        said.saying(&["... and ", " more", "errors"]);
    }
    // One mistake among many names still gets its hint.
    let text = format!(
        "{HEAD}params:\n{params}stages:\n  s: {{kind: do, text: \"${{params.a19999x}}\"}}\n"
    );
    judge(text, &[])
        .expect(3)
        .saying(&["did you mean `a19999`?"]);
}

#[test]
fn characters_that_look_like_spaces() {
    for odd in [
        "\u{a0}", "\u{3000}", "\u{2003}", "\u{200b}", "\u{202f}", "\u{feff}",
    ] {
        let text = format!("{HEAD}stages:\n  a:\n    kind: do\n    amount: 16\n");
        for (from, to) in [
            ("  a:", format!("{odd} a:")),
            ("    kind", format!("{odd}{odd}kind")),
            ("amount: 16", format!("amount:{odd}16")),
            ("amount: 16", format!("amount: {odd}16")),
            ("amount: 16", format!("amount: 16{odd}")),
        ] {
            let said = judge(text.replace(from, &to), &[]).expect(3);
            let code = format!("U+{:04X}", u32::from(odd.chars().next().unwrap()));
            assert!(
                said.stderr.contains(&code) || odd == "\u{feff}",
                "{to:?}: {}",
                said.stderr
            );
        }
        judge(format!("{text}{odd}x: [1\n"), &[]).expect(3);
        // A comment may contain anything except a byte order mark.
        let code = if odd == "\u{feff}" { 3 } else { 0 };
        judge(format!("# {odd}\n{text}"), &[]).expect(code);
    }
}

#[test]
fn byte_order_marks() {
    judge(format!("\u{feff}{HEAD}{STAGES}"), &[]).expect(0);
    let said = judge(format!("\u{feff}verison: 1\n{HEAD}{STAGES}"), &[]).expect(3);
    said.saying(&["r.yaml:1:1", "1 | verison: 1\n  | ^^^^^^^\n"]);
}

#[test]
fn numbers_of_the_runner() {
    let plan = |text: String, arguments: &[&str]| {
        let lab = Lab::new(&[]);
        fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
        lab.retort(&[&["plan", "r.yaml", "--json"], arguments].concat())
    };
    let check = |recipe: &str, stage: &str, set: &[&str], pointer: &str, expected: u64| {
        let text = format!(
            "{HEAD}{recipe}\nparams: {{n: 1e1, m: 3.0}}\nstages: {{a: {{kind: do{stage}}}}}\n"
        );
        let arguments: Vec<&str> = set.iter().flat_map(|set| ["--set", set]).collect();
        let json = plan(text, &arguments).expect(0).json();
        assert_eq!(
            json["plan"].pointer(pointer),
            Some(&expected.into()),
            "{recipe} {stage} {set:?}"
        );
    };
    for (written, meant) in [
        ("1e3", 1000),
        ("5.0", 5),
        ("0x10", 16),
        ("2.5e1", 25),
        ("1000", 1000),
    ] {
        check(&format!("seed: {written}"), "", &[], "/seed", meant);
        check(
            "",
            &format!(", seed: {written}"),
            &[],
            "/stages/0/seed",
            meant,
        );
        check("", "", &[&format!("seed={written}")], "/seed", meant);
        check(
            "",
            "",
            &[&format!("a.seed={written}")],
            "/stages/0/seed",
            meant,
        );
        check(
            "",
            &format!(", threads: {written}"),
            &[],
            "/stages/0/threads/fixed",
            meant,
        );
        check(
            "",
            "",
            &[&format!("threads={written}")],
            "/stages/0/threads/fixed",
            meant,
        );
    }
    check("", ", seed: \"${params.n}\"", &[], "/stages/0/seed", 10);
    check("seed: \"${params.m}\"", "", &["params.m=7.0"], "/seed", 7);
    judge(
        format!("version: 1.0\nbackend: faulty\n{STAGES}"),
        &["--set", "version=1e0"],
    )
    .expect(0);
    for (key, wrong) in [
        ("seed", "1.5"),
        ("seed", "-1"),
        ("seed", "1e16"),
        ("seed", "1e400"),
        ("threads", "1e9"),
        ("threads", "0.5"),
        ("threads", "1e30"),
        ("seed", "yes"),
    ] {
        let text = format!("{HEAD}{STAGES}");
        judge(&text, &["--set", &format!("{key}={wrong}")])
            .expect(3)
            .saying(&[&format!("`{key}`"), "command line:1:", "^"]);
        judge(format!("{text}{key}: {wrong}\n"), &[])
            .expect(3)
            .saying(&["r.yaml:5:", &format!("5 | {key}: {wrong}")]);
    }
    judge(
        format!("{HEAD}stages: {{a: {{kind: do, workers: 1.5}}}}\n"),
        &[],
    )
    .expect(3)
    .saying(&["expected a whole number, got 1.5"]);
    judge(
        format!("{HEAD}stages: {{a: {{kind: do, workers: 2.0}}}}\n"),
        &[],
    )
    .expect(3)
    .saying(&["cannot be divided among workers"]);
}

#[test]
fn what_is_set_within_a_reference_is_said_to_be_set_there() {
    let text = format!(
        "{HEAD}params: {{images: {{csv: a}}}}\nstages:\n  a: {{kind: do, input: \"${{params.images}}\"}}\n"
    );
    judge(&text, &["--set", "a.input.csv.x=run #2.csv"])
        .expect(3)
        .saying(&[
            "`csv` cannot be set: what it would be in is not a mapping",
            "it is written as `${params.images}`: --set params.images.csv.x=run #2.csv",
        ]);
    judge(&text, &["--set", "backend.x=3"])
        .expect(3)
        .saying(&["`x` cannot be set"]);
}

#[test]
fn counts_beyond_all_workers() {
    for option in ["workers", "min_workers", "retries"] {
        for count in ["4097", "100000000", "9007199254740991"] {
            let text = format!("{HEAD}stages:\n  a: {{kind: do, {option}: {count}}}\n");
            judge(text, &[]).expect(3).saying(&[option]);
        }
    }
}

#[test]
fn texts_are_set_as_typed() {
    let names = [
        "run #2.csv",
        "a: b.csv",
        "@x.csv",
        "*best*.csv",
        "&z",
        "&z x",
        "!w x",
        "%p",
        "`x`",
        " x ",
        "yes",
        "1e3",
        "0x10",
        "010",
        "- x",
        "{a}",
        "[x].csv",
        "? x",
        "| x",
        "> x",
        "# x",
        "---",
        ".inf",
        "a, b",
        "'x' y",
        "x:",
        "true",
        "1.50",
        "2020-01-01",
    ];
    let lab = Lab::new(&["a: {kind: do, act: succeed}"]);
    for name in names {
        fs::write(lab.dir.path().join(name), "x").unwrap();
        for (path, pointer) in [("a.file", "file"), ("stages.a.text", "text")] {
            let json = lab
                .retort(&[
                    "plan",
                    "r.yaml",
                    "--json",
                    "--set",
                    &format!("{path}={name}"),
                ])
                .expect(0)
                .json();
            let option = &json["plan"]["stages"][0]["options"][pointer];
            assert_eq!(option.as_str(), Some(name));
        }
        // Also through a param.
        let json = lab
            .retort(&[
                "plan",
                "r.yaml",
                "--json",
                "--set",
                &format!("params.p={name}"),
                "--set",
                "a.file=${params.p}",
                "--set",
                "a.text=<${params.p}>",
            ])
            .expect(0)
            .json();
        let options = &json["plan"]["stages"][0]["options"];
        assert_eq!(options["file"].as_str(), Some(name));
        assert_eq!(options["text"], format!("<{name}>"));
    }
}

#[test]
fn quoted_texts_and_other_types_are_set_as_yaml() {
    let lab = Lab::new(&["a: {kind: do, act: succeed}"]);
    let json = lab
        .retort(&[
            "plan",
            "r.yaml",
            "--json",
            "--set",
            "a.text=\"a\\tb\" # c",
            "--set",
            "a.amount=5 # five",
        ])
        .expect(0)
        .json();
    let options = &json["plan"]["stages"][0]["options"];
    assert_eq!(
        (options["text"].as_str(), options["amount"].as_f64()),
        (Some("a\tb"), Some(5.0))
    );
    lab.retort(&["plan", "r.yaml", "--set", "a.amount=@5"])
        .expect(3)
        .saying(&[
            "command line:1:16",
            "1 | --set a.amount=@5\n",
            "|                ^^\n",
            "not YAML",
        ]);
    lab.retort(&["plan", "r.yaml", "--set", "a.amuont=5"])
        .expect(3)
        .saying(&[
            "1 | --set a.amuont=5\n  |         ^^^^^^",
            "did you mean `amount`?",
        ]);
    lab.retort(&["plan", "r.yaml", "--set", "b.amount=5"])
        .expect(3)
        .saying(&["1 | --set b.amount=5\n  |       ^"]);
}

#[test]
fn the_home_directory_in_paths() {
    let lab = Lab::new(&["a: {kind: do, file: ~/mine.csv}"]);
    let home = lab.dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("mine.csv"), "x").unwrap();
    let digest = |lab: &Lab, arguments: &[&str]| {
        let output = lab
            .command(&[&["plan", "r.yaml", "--json"], arguments].concat())
            .env("HOME", &home)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("does not exist"), "{said}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let file = json["plan"]["stages"][0]["options"]["file"].clone();
        let file = std::path::Path::new(file.as_str().unwrap());
        assert!(file.is_absolute());
        assert_eq!(
            file.canonicalize().unwrap(),
            home.join("mine.csv").canonicalize().unwrap()
        );
        json["decisions"][0]["digest"].clone()
    };
    let written = digest(&lab, &[]);
    lab.recipe(&["a: {kind: do}"]);
    assert_eq!(digest(&lab, &["--set", "a.file=~/mine.csv"]), written);
    let whole = format!("a.file={}", home.join("mine.csv").display());
    assert_eq!(digest(&lab, &["--set", &whole]), written);
    lab.recipe(&["a: {kind: do, file: '${paths.d}/mine.csv'}"]);
    assert_eq!(digest(&lab, &["--set", "paths.d=~/../home"]), written);
    lab.recipe(&["a: {kind: do}"]);
    lab.run(&["--set", "a.file=~someone/x"])
        .expect(3)
        .saying(&["only a leading `~/` is replaced"]);
    lab.run(&["--set", "a.file=$HOME/x"])
        .expect(3)
        .saying(&["begin it with `~/`"]);
    lab.run(&["--set", "a.file=~/x"])
        .expect(3)
        .saying(&["does not exist"]);
    let said = lab
        .command(&["run", "r.yaml", "--set", "a.file=~/x"])
        .env_remove("HOME")
        .output()
        .unwrap();
    assert!(
        String::from_utf8(said.stderr)
            .unwrap()
            .contains("HOME is not set")
    );
    lab.recipe(&["a: {kind: do, file: ~}"]);
    judged(&lab, &[]).saying(&[
        "`file` is `~`, which is YAML for nothing",
        "begin with `~/`",
    ]);
}

#[test]
fn names_are_kept_as_written() {
    for name in [
        "0x10",
        "010",
        "1e3",
        "yes",
        "null",
        "2020-01-01",
        "true",
        "0o17",
        "10",
    ] {
        let lab = Lab::new(&[
            &format!("{name}: {{kind: do}}"),
            &format!("b: {{kind: do, input: {name}}}"),
        ]);
        let json = lab.retort(&["plan", "r.yaml", "--json"]);
        // Null is not a name of an input, but a stage may have that name.
        if name == "null" {
            json.expect(3)
                .saying(&["`input`: expected a text, got nothing"]);
            lab.recipe(&["null: {kind: do}"]);
            let json = lab.retort(&["plan", "r.yaml", "--json"]).expect(0).json();
            assert_eq!(json["plan"]["stages"][0]["name"], name);
            continue;
        }
        let json = json.expect(0).json();
        assert_eq!(json["plan"]["stages"][0]["name"], name);
        assert_eq!(json["plan"]["stages"][1]["references"][0]["stage"], name);
        lab.retort(&[
            "plan",
            "r.yaml",
            "--set",
            &format!("b.input={name}"),
            "--set",
            &format!("{name}.amount=2"),
        ])
        .expect(0);
    }
    let lab = Lab::new(&["a: {kind: do, text: 'w${params.1.50}', input: 1.50}"]);
    lab.retort(&["plan", "r.yaml", "--set", "params.1=2"])
        .expect(3)
        .saying(&["`1.50`"]);
    let text = format!(
        "{HEAD}params: {{1.50: 1.250, 1e3: 0x10}}\nstages: {{a: {{kind: do, text: 'w${{params.1.50}}-${{params.1e3}}'}}}}\n"
    );
    fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    let text = |arguments: &[&str]| {
        let json = lab
            .retort(&[&["plan", "r.yaml", "--json"], arguments].concat())
            .expect(0)
            .json();
        json["plan"]["stages"][0]["options"]["text"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(text(&[]), "w1.250-0x10");
    assert_eq!(text(&["--set", "params.1.50=2.0"]), "w2.0-0x10");
}

#[test]
fn hints_lead_somewhere() {
    let check = |recipe: &str, stage: &str, hints: &[&str]| {
        let text = format!("{HEAD}{recipe}\nstages: {{a: {{kind: do{stage}}}}}\n");
        let said = judge(text, &[]).expect(3).saying(hints);
        assert!(!said.stderr.contains("quotes"), "{}", said.stderr);
    };
    check(
        "seed: 010",
        "",
        &["write 10; where the octal number is meant, write 0o10 or 8"],
    );
    check("", ", amount: 1e400", &["too large"]);
    check("", ", timeout: 90", &["write `90s`"]);
    check("", ", timeout: 1.5", &["write `1500ms`"]);
    check("", ", timeout: \"90\"", &["write `90s`"]);
    check("name: a/b", "", &["a name has no `/`"]);
    let lab = Lab::new(&["a: {kind: do}"]);
    lab.retort(&["run", "-"])
        .expect(3)
        .saying(&["`-` is not read as standard input", "save the recipe"]);
    judge(format!("{HEAD}name: My Recipe.V2\n{STAGES}"), &[]).expect(0);
}

#[test]
fn any_character_anywhere_is_an_answer() {
    let text = format!(
        "{HEAD}params: {{p: 'x'}}\nstages:\n  a: {{kind: do, text: \"é${{params.p}}\", amount: [1]}} # c\n"
    );
    let odd = [
        "\u{a0}",
        "\u{200b}é",
        "漢\n",
        "🙂: ",
        "\u{2028}[",
        "\r\u{301}",
        "\u{202e}&a ",
        "\u{feff}*a",
    ];
    let lab = Lab::new(&[]);
    let mut names = Vec::new();
    for (at, _) in text.char_indices() {
        let name = format!("r{at}.yaml");
        let odd = odd[at % odd.len()];
        fs::write(
            lab.dir.path().join(&name),
            format!("{}{odd}{}", &text[..at], &text[at..]),
        )
        .unwrap();
        names.push(name);
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let said = lab
        .retort(&[&["validate"], names.as_slice()].concat())
        .expect(3);
    assert_eq!(
        said.stderr
            .lines()
            .filter(|line| line.starts_with('r') && line.contains(".yaml: "))
            .count(),
        names.len()
    );
}
