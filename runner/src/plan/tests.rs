//! Resolved values, and messages about mistakes.

use serde_json::json;

use super::planner::derived_seed;
use super::*;

const HEAD: &str = "version: 1\nbackend: fake\nstages:\n  codes: {kind: tokenizer, data: d.csv}\n";

/// Plans a recipe and compares the findings: line, column, part of the message; in order of position.
fn check(text: &str, expected: &[(usize, usize, &str)]) {
    let report = fake::plan(text, &[]).unwrap_err();
    crate::diagnostic::expect(&report.findings, expected);
}

#[test]
fn everything_is_settled() {
    let text = format!(
        "seed: 7\nparams: {{w: 96}}\n{HEAD}  teacher:\n    kind: pretrain\n    tokenizer: codes\n    width: ${{params.w}}\n    timeout: 90s\n"
    );
    let plan = fake::plan(&text, &["teacher.steps=5", "threads=3"]).unwrap();
    let teacher = plan.stage("teacher").unwrap();
    assert_eq!(
        teacher.options,
        json!({
            "tokenizer": "codes", "width": 96, "steps": 5, "guidance": null,
            "schedule": {"type": "cosine", "warmup": 100, "rate": 0.001}
        })
    );
    assert_eq!(teacher.device, "cpu");
    assert_eq!(teacher.dtype, "f32");
    assert_eq!(teacher.threads, Threads::Fixed(3));
    assert_eq!(teacher.seed, derived_seed(7, "teacher"));
    assert_eq!(teacher.timeout, Some(Duration::from_secs(90)));
    assert_eq!(teacher.output_kind, "teacher");
    let origins: BTreeMap<&str, String> = teacher
        .origins
        .iter()
        .map(|(pointer, origin)| (pointer.as_str(), origin.to_string()))
        .collect();
    let expected = [
        ("/device", "derived"),
        ("/dtype", "default"),
        ("/kind", "recipe:8"),
        ("/options/guidance", "default"),
        ("/options/schedule/rate", "default"),
        ("/options/schedule/type", "default"),
        ("/options/schedule/warmup", "default"),
        ("/options/steps", "--set"),
        ("/options/tokenizer", "recipe:9"),
        ("/options/width", "params"),
        ("/seed", "derived"),
        ("/threads", "--set"),
        ("/timeout", "recipe:11"),
    ];
    assert_eq!(
        origins,
        expected
            .map(|(pointer, origin)| (pointer, origin.to_owned()))
            .into()
    );
    let frozen: Plan = serde_json::from_value(serde_json::to_value(&plan).unwrap()).unwrap();
    assert_eq!(frozen, plan);
}

#[test]
fn the_origin_of_the_seed_is_known_however_it_is_written() {
    let flow =
        "{version: 1, backend: fake, seed: 7, stages: {codes: {kind: tokenizer, data: d.csv}}}";
    for (text, set, expected) in [
        (format!("seed: 7\n{HEAD}"), None, "recipe:1"),
        (format!("{HEAD}\"seed\": 7\n"), None, "recipe:5"),
        (flow.to_owned(), None, "recipe:1"),
        (
            format!("seed: ${{params.s}}\nparams: {{s: 7}}\n{HEAD}"),
            None,
            "params",
        ),
        (HEAD.to_owned(), Some("seed=7"), "--set"),
        (format!("# seed: 3\n{HEAD}"), None, "default"),
    ] {
        let plan = fake::plan(&text, &Vec::from_iter(set)).unwrap();
        assert_eq!(plan.seed_origin.to_string(), expected, "{text}");
        assert_eq!(plan.seed, if expected == "default" { 0 } else { 7 });
    }
}

#[test]
fn missing_files_are_warnings_of_the_plan() {
    let plan = fake::plan(HEAD, &[]).unwrap();
    let [warning] = plan.warnings.as_slice() else {
        panic!("{:?}", plan.warnings)
    };
    assert_eq!(warning.severity, Severity::Warning);
    assert_eq!(
        warning.position,
        Some(Position {
            line: 4,
            column: 34
        })
    );
    assert!(warning.message.contains("/base/d.csv does not exist"));
}

#[test]
fn stages_come_after_their_inputs() {
    let text = "version: 1\nbackend: fake\nstages:\n  b: {kind: pretrain, tokenizer: a}\n  z: {kind: tokenizer, data: d}\n  a: {kind: tokenizer, data: d}\n";
    let plan = fake::plan(text, &[]).unwrap();
    let names: Vec<&str> = plan
        .stages
        .iter()
        .map(|stage| stage.name.as_str())
        .collect();
    assert_eq!(names, ["z", "a", "b"]);
}

#[test]
fn independent_mistakes_are_reported_together() {
    check(
        &format!(
            "seed: -1\n{HEAD}  a: {{kind: pretrain, tokenizer: code, stpes: 3}}\n  b: {{kind: pretrian}}\n  c: {{kind: pretrain, tokenizer: codes, steps: many, schedule: {{type: cosin}}}}\n  d: {{kind: pretrain, tokenizer: a}}\n"
        ),
        &[
            (1, 7, "at least 0"),
            (
                6,
                34,
                "`tokenizer` names the stage `code`, which is not in the recipe / did you mean `codes`?",
            ),
            (
                6,
                40,
                "unknown option `stpes` of `pretrain` / did you mean `steps`?",
            ),
            (7, 13, "no stage kind `pretrian` / did you mean `pretrain`?"),
            (
                8,
                48,
                "`steps`: expected a whole number, got the text \"many\"",
            ),
            (
                8,
                71,
                "`schedule.type`: expected one of `constant`, `cosine`, got \"cosin\" / did you mean `cosine`?",
            ),
            (
                9,
                34,
                "wants `tokenizer`, but stage `a` (pretrain) makes `teacher` / stages that make `tokenizer`: `codes`",
            ),
        ],
    );
}

#[test]
fn cycles_are_named_in_full() {
    let stage = |name: &str, teacher: &str| {
        format!("  {name}: {{kind: distill, tokenizer: codes, teacher: {teacher}}}\n")
    };
    check(
        &format!(
            "{HEAD}{}{}{}",
            stage("a", "b"),
            stage("b", "c"),
            stage("c", "a")
        ),
        &[(5, 49, "in a cycle: a -> b -> c -> a")],
    );
    check(
        &format!("{HEAD}{}", stage("a", "a")),
        &[(5, 49, "`a` needs itself")],
    );
}

#[test]
fn duplicate_stages_are_one_mistake() {
    check(
        &format!("{HEAD}  codes: {{kind: nothing}}\n"),
        &[(5, 3, "a second stage `codes` (first on line 4)")],
    );
}

#[test]
fn plugins_at_fault_are_told_apart() {
    let missing = HEAD.replace("fake", "torch");
    check(&missing, &[(2, 10, "plugin `torch` was not found")]);
    assert!(fake::plan(&missing, &[]).unwrap_err().only_plugins());
    check(
        &HEAD.replace("backend: fake\n", ""),
        &[(1, 1, "`backend` is missing / write `backend: fake`")],
    );
}

#[test]
fn devices_and_times_are_checked() {
    let with = |line: &str| format!("{line}\n{HEAD}");
    check(&with("device: gpu"), &[(1, 9, "expected `auto`, `cpu`")]);
    check(
        &with("device: cuda:7").replace("fake", "gpu"),
        &[(
            1,
            9,
            "there is no device `cuda:7` on this machine / usable here: `cpu`, `cuda:1`",
        )],
    );
    check(
        &with("device: cuda:0").replace("fake", "gpu"),
        &[(1, 9, "device `cuda:0` cannot be used: too old")],
    );
    check(&with("dtype: f64"), &[(1, 8, "does not compute in `f64`")]);
    check(
        &format!("{HEAD}  b: {{kind: tokenizer, data: d, timeout: soon}}\n"),
        &[(5, 42, "write a time like")],
    );
    let device = |set: &str| fake::plan(HEAD, &[set]).unwrap().stages[0].device.clone();
    assert_eq!(device("device=auto"), "cpu");
    assert_eq!(device("backend=gpu"), "cuda:1");
    assert_eq!(
        device("codes={kind: tokenizer, data: d, plugin: gpu, device: cuda}"),
        "cuda:1"
    );
}

#[test]
fn the_device_chooses_the_variant() {
    let varied = HEAD.replace("fake", "varied");
    let planned = |set: &[&str]| {
        let plan = fake::plan(&varied, set).unwrap();
        let stage = plan.stages[0].clone();
        (stage.plugin.hash, stage.device, plan.notes)
    };
    let on_gpu = ("beef".to_owned(), "cuda:1".to_owned());
    let (hash, device, notes) = planned(&[]);
    assert_eq!((hash, device), on_gpu);
    assert_eq!(notes, ["device `auto` is cuda:1"]);
    let (hash, device, notes) = planned(&["device=cuda", "dtype=f16"]);
    assert_eq!((hash, device), on_gpu);
    assert!(notes.is_empty());
    let (hash, device, _) = planned(&["device=cpu"]);
    assert_eq!((hash.as_str(), device.as_str()), ("f00d", "cpu"));
    check(
        &format!("device: cpu\ndtype: f16\n{varied}"),
        &[(2, 8, "does not compute in `f16`")],
    );
    check(
        &format!("device: cuda:0\n{varied}"),
        &[(1, 9, "device `cuda:0` cannot be used: too old")],
    );
}

#[test]
fn workers_divide_what_can_be_divided() {
    let text = "version: 1\nbackend: fake\nstages:\n  a: {kind: everything, data: d, workers: 3}\n";
    let planned = |text: &str, set: &[&str]| {
        let plan = fake::plan(text, set).unwrap();
        (plan.stages[0].clone(), plan.notes)
    };
    let (stage, notes) = planned(text, &[]);
    assert_eq!((stage.workers, notes), (vec!["cpu".to_owned(); 3], vec![]));
    assert!(planned(text, &["a.workers=1"]).0.workers.is_empty());
    let (stage, notes) = planned(text, &["backend=gpu", "device=cuda"]);
    assert_eq!(stage.device, "cuda:1");
    assert_eq!(stage.workers, ["cuda:1", "cuda:2", "cuda:1"]);
    assert_eq!(notes, ["stage `a`: its workers are on cuda:1, cuda:2"]);
    let (stage, notes) = planned(text, &["backend=gpu", "device=cuda:2"]);
    assert_eq!(
        (stage.workers, notes),
        (vec!["cuda:2".to_owned(); 3], vec![])
    );
    check(
        &format!("{HEAD}  b: {{kind: tokenizer, data: d, workers: 2}}\n"),
        &[(
            5,
            42,
            "stage `b`: the work of a `tokenizer` cannot be divided among workers / kinds that can be: `everything`",
        )],
    );
    check(
        &format!("{HEAD}  b: {{kind: pretrain, tokenizer: codes, workers: 2}}\n"),
        &[(
            5,
            50,
            "stage `b`: plugin `fake` cannot sum gradients over the workers of a `pretrain` / use a plugin that can: \
                 `backend: libtorch`, or candle on GPUs; or omit `workers`",
        )],
    );
    check(
        &format!("{HEAD}  b: {{kind: everything, data: d, workers: 0}}\n"),
        &[(5, 43, "at least 1")],
    );
}
