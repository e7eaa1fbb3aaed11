//! The way of somebody who writes a plugin: from an empty directory to a run, and what the examination says of it.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::lab::{Lab, compile};

/// Where the plugins of the workspace lie that these tests depend on.
fn built() -> PathBuf {
    std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .to_owned()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Builds a project, and shows what went wrong otherwise.
#[track_caller]
fn build(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

/// The checks that failed, and the whole report.
fn failures(lab: &Lab, arguments: &[&str]) -> (BTreeSet<String>, String) {
    let said = lab.retort(&[&["plugin", "test", "--json"], arguments].concat());
    let report = said.json();
    let failed = report
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["verdict"] == "failed")
        .map(|row| row["check"].as_str().unwrap().to_owned())
        .collect::<BTreeSet<_>>();
    said.expect(if failed.is_empty() { 0 } else { 5 });
    (failed, format!("{report:#}"))
}

/// Installs what a project has built, runs its recipe and examines it.
#[track_caller]
fn install_and_run(lab: &Lab, plugin: &str) {
    let installed = lab.retort(&["plugin", "install", plugin]).expect(0);
    installed.saying(&["hello 0.1.0 is installed", ".local/share/retort/plugins"]);
    let said = lab
        .retort(&["run", "hello/recipe.yaml", "--json"])
        .expect(0)
        .json();
    assert_eq!(said["stages"][0]["outcome"], "ran", "{said:#}");
    let pi = said["tables"][0]["rows"][0][1].as_f64().unwrap();
    assert!((pi - std::f64::consts::PI).abs() < 0.01, "{said:#}");
    let metric = lab
        .retort(&["metrics", "latest", "--json"])
        .expect(0)
        .json();
    let last = metric[0]["last"].as_f64().unwrap();
    assert!((last - std::f64::consts::PI).abs() < 0.01, "{metric:#}");
    let options = [
        "--recipe",
        "hello/recipe.yaml",
        "--set",
        "estimate.rounds=400",
    ];
    let (failed, report) = failures(lab, &[&[plugin], &options[..]].concat());
    assert!(failed.is_empty(), "{report}");
    // Everything was looked at, an interruption too.
    for check in ["exports", "bad options", "same seed", "stops", "resumes"] {
        let passed = format!("\"check\": \"{check}\"");
        assert!(report.contains(&passed), "{check} in {report}");
    }
}

#[test]
fn from_nothing_to_a_run_in_c_and_cpp() {
    for (language, source) in [("c", "plugin.c"), ("cpp", "plugin.cpp")] {
        let lab = Lab::new(&[]);
        lab.retort(&["plugin", "new", "hello", "--lang", language])
            .expect(0);
        let project = lab.dir.path().join("hello");
        assert!(project.join(source).is_file());
        build(Command::new("make").arg("-C").arg(&project));
        install_and_run(&lab, "hello");
    }
}

/// Cargo in a new project, with the crates that this workspace has: nothing is downloaded. What it builds of them is
/// kept for the next time.
fn cargo(project: &Path, arguments: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::fs::copy(root.join("Cargo.lock"), project.join("Cargo.lock")).unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("project");
    build(
        Command::new(std::env::var("CARGO").unwrap_or("cargo".into()))
            .args(arguments)
            .args(["--release", "--offline"])
            .env("CARGO_TARGET_DIR", &target)
            .env_remove("CARGO_BUILD_TARGET_DIR")
            .current_dir(project),
    );
    target.join("release")
}

#[test]
fn from_nothing_to_a_run_in_rust() {
    let lab = Lab::new(&[]);
    lab.retort(&["plugin", "new", "hello"])
        .expect(0)
        .saying(&["cargo build"]);
    let project = lab.dir.path().join("hello");
    let plugin = cargo(&project, &["build"]).join("libretort_hello.so");
    install_and_run(&lab, path(&plugin));

    // The same plugin with a mistake: its panic has a reason of its own, and its place.
    let source = project.join("src/lib.rs");
    let text = std::fs::read_to_string(&source).unwrap();
    let worse = text.replace("host.check_cancelled()?;", "panic!(\"on purpose\");");
    assert_ne!(text, worse);
    std::fs::write(source, worse).unwrap();
    let dir = cargo(&project, &["build"]);
    let said = lab.retort(&["run", "hello/recipe.yaml", "--plugin-dir", path(&dir)]);
    assert_eq!(said.code, Some(100));
    said.saying(&[": panic", "src/lib.rs:", "on purpose"]);
}

#[test]
#[ignore = "compiles the engine anew, for minutes: cargo test --release -p retort-tests --test runner -- --ignored backend"]
fn from_nothing_to_a_run_with_a_backend() {
    let lab = Lab::new(&[]);
    lab.retort(&["plugin", "new", "my-own", "--kind", "backend"])
        .expect(0);
    let project = lab.dir.path().join("my-own");
    // The project's own test: every operation.
    cargo(&project, &["test"]);
    let plugin = cargo(&project, &["build"]).join("libretort_my_own.so");
    lab.retort(&["plugin", "install", path(&plugin)])
        .expect(0)
        .saying(&["my-own 0.1.0 is installed"]);
    lab.retort(&["run", "my-own/recipe.yaml"]).expect(0);
    let (failed, report) = failures(&lab, &["my-own", "--recipe", "my-own/recipe.yaml"]);
    assert!(failed.is_empty(), "{report}");
}

#[test]
fn a_backend_of_plain_loops_passes() {
    let lab = Lab::new(&[]);
    let recipe =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../plugins/templates/backend/recipe.yaml");
    let plugin = lab.dir.path().join("libretort_abacus.so");
    std::fs::copy(built().join("libtemplate_backend.so"), &plugin).unwrap();
    let (failed, report) = failures(&lab, &[path(&plugin), "--recipe", path(&recipe)]);
    assert!(failed.is_empty(), "{report}");
    assert!(
        report.contains("comparisons with reference values"),
        "{report}"
    );
}

#[test]
fn candle_is_as_a_plugin_has_to_be() {
    retort_tests::examination::check("candle");
}

#[test]
fn a_backend_is_not_begun_in_c() {
    let lab = Lab::new(&[]);
    lab.retort(&["plugin", "new", "x", "--lang", "c", "--kind", "backend"])
        .expect(2)
        .saying(&["is written in Rust", "--kind stage"]);
    lab.retort(&["plugin", "new", "X"])
        .expect(2)
        .saying(&["no name for a plugin"]);
}

/// A recipe of a small teacher on candle, its samples, and the example's metric of them.
const MIXED: &str = "
version: 1
seed: 3
backend: candle
params:
  data: {csv: DIGITS, height: 8, width: 8, max: 16}
stages:
  codes:
    kind: tokenizer
    data: ${params.data}
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {steps: 4, batch: 8}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: ${params.data}
    width: 16
    depth: 1
    heads: 2
    train: {steps: 4, batch: 8}
  drawn:
    kind: sample
    sampler: {kind: teacher, teacher: teacher}
    count: 24
  spread:
    kind: diversity
    plugin: diversity
    samples: {teacher: drawn}
";

#[test]
fn a_stage_of_a_third_party_measures_what_another_plugin_made() {
    let lab = Lab::new(&[]);
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    let text = MIXED.replace("DIGITS", path(&digits.canonicalize().unwrap()));
    let recipe = lab.dir.path().join("r.yaml");
    let dir = built();
    let dir = ["--plugin-dir", path(&dir)];

    // Its options are checked at their line, before anything runs.
    let wrong = text.replace("teacher: drawn}", "teacher: drawn}\n    twin: 3");
    std::fs::write(&recipe, wrong).unwrap();
    lab.run(&dir)
        .expect(3)
        .saying(&["r.yaml:32", "twin: 3", "at most 1"]);
    std::fs::write(&recipe, text.replace("teacher: drawn}", "teacher: codes}")).unwrap();
    lab.run(&dir).expect(3).saying(&["r.yaml:31", "samples"]);
    // What no schema can say comes from the plugin, at its place.
    let twice = "teacher: drawn, again: drawn}";
    std::fs::write(&recipe, text.replace("teacher: drawn}", twice)).unwrap();
    lab.retort(&[&["validate", "r.yaml"], &dir[..]].concat())
        .expect(0)
        .saying(&["are the same set", "r.yaml:31"]);

    std::fs::write(&recipe, text).unwrap();
    let said = lab.run(&dir).expect(0);
    assert!(
        said.stdout.contains("Diversity within classes"),
        "{}",
        said.stdout
    );
    let detail = lab.latest().unwrap();
    let (drawn, spread) = (&detail.stages[2], &detail.stages[3]);
    assert_eq!(
        (drawn.plugin.name.as_str(), spread.plugin.name.as_str()),
        ("candle", "diversity")
    );
    let distance = lab.attempt("spread").summary.unwrap_or_default()["teacher"]["mean_distance"]
        .as_f64()
        .unwrap();
    assert!(distance > 0.0 && distance < 1.0, "{distance}");

    // The history knows the file that ran.
    let hash = |name: &str| {
        let file = built().join(format!("libretort_{name}.so"));
        retort::artifact::file_hash(&file).unwrap()
    };
    assert_eq!(spread.plugin.hash, hash("diversity"));
    assert_eq!(drawn.plugin.hash, hash("candle"));

    let schema = [&["schema", "--kind", "diversity", "--table"], &dir[..]].concat();
    let said = lab.retort(&schema).expect(0);
    assert!(
        said.stdout.contains("twin") && said.stdout.contains("0.02"),
        "{}",
        said.stdout
    );

    // And the examination of it, on the same recipe.
    let plugin = built().join("libretort_diversity.so");
    let (failed, report) = failures(&lab, &[path(&plugin), "--recipe", "r.yaml"]);
    assert!(failed.is_empty(), "{report}");
}

/// A lab with the fixture plugin in a directory of its own.
fn with_plugin(flags: &[&str]) -> (Lab, PathBuf) {
    let lab = Lab::new(&["a: {kind: do}"]);
    let dir = lab.dir.path().join("own");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    compile("faulty.c", flags, &dir.join("libretort_faulty.so"));
    (lab, dir)
}

#[test]
fn a_plugin_that_others_can_change_is_refused() {
    let (lab, dir) = with_plugin(&[]);
    let plugin = dir.join("libretort_faulty.so");
    let set = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let run = || lab.run(&["--plugin-dir", path(&dir)]);
    set(&plugin, 0o666);
    run()
        .expect(5)
        .saying(&["is writable by everybody", "chmod o-w"]);
    set(&plugin, 0o644);
    set(&dir, 0o777);
    run()
        .expect(5)
        .saying(&["its directory", "is writable by everybody"]);
    let check = lab.retort(&["plugin", "check", path(&plugin)]);
    check.expect(5).saying(&["is writable by everybody"]);
    assert!(lab.latest().is_none(), "nothing was begun");
    set(&dir, 0o755);
    run().expect(0);
}

#[test]
fn a_lock_gives_what_it_lists_and_nothing_else() {
    let (lab, dir) = with_plugin(&[]);
    let run = || lab.run(&["--plugin-dir", path(&dir)]);
    lab.retort(&["plugin", "lock", path(&dir)])
        .expect(0)
        .saying(&["allows 1 plugin"]);
    run().expect(0);
    // The same source with another symbol is another file.
    compile(
        "faulty.c",
        &["-DFAULTY_LEAKY"],
        &dir.join("libretort_faulty.so"),
    );
    run().expect(5).saying(&[
        "plugins.lock",
        "allows it with the hash",
        "retort plugin lock",
    ]);
    // Installing is allowing.
    let other = lab.dir.path().join("libretort_faulty.so");
    compile("faulty.c", &[], &other);
    lab.retort(&["plugin", "install", path(&other), "--into", path(&dir)])
        .expect(0);
    run().expect(0);
    lab.retort(&["plugin", "lock", "--remove", path(&dir)])
        .expect(0);
    assert!(!dir.join("plugins.lock").exists());
}

/// A plugin built with these flags, and one that does this, fails these checks and no other.
#[track_caller]
fn check_broken(flags: &[&str], act: &str, expected: &[&str]) {
    let (lab, dir) = with_plugin(flags);
    lab.recipe(&[&format!("a: {{kind: do, act: {act}, text: x, amount: 5}}")]);
    let plugin = dir.join("libretort_faulty.so");
    let junit = lab.dir.path().join("report.xml");
    let options = [
        "--recipe",
        "r.yaml",
        "--grace",
        "1500ms",
        "--junit",
        path(&junit),
    ];
    let (failed, report) = failures(&lab, &[&[path(&plugin)], &options[..]].concat());
    let expected: BTreeSet<String> = expected.iter().map(|&check| check.to_owned()).collect();
    assert_eq!(failed, expected, "{report}");
    let rows: Value = serde_json::from_str(&report).unwrap();
    let xml = std::fs::read_to_string(junit).unwrap();
    let tests = rows.as_array().unwrap().len();
    assert!(
        xml.contains(&format!("tests=\"{tests}\" failures=\"{}\"", count(&rows))),
        "{xml}"
    );
}

fn count(rows: &Value) -> usize {
    let rows = rows.as_array().unwrap().iter();
    rows.filter(|row| row["verdict"] == "failed").count()
}

#[test]
fn a_good_plugin_fails_nothing() {
    check_broken(&[], "work", &[]);
}

#[test]
fn a_second_symbol_is_seen() {
    check_broken(&["-DFAULTY_LEAKY"], "work", &["exports"]);
}

#[test]
fn a_description_that_changes_is_seen() {
    check_broken(&["-DFAULTY_IMPURE"], "work", &["describes itself"]);
}

#[test]
fn a_default_that_does_not_fit_is_seen() {
    check_broken(&["-DFAULTY_DEFAULT=\"7\""], "work", &["description"]);
}

#[test]
fn crashing_over_options_is_seen() {
    check_broken(&["-DFAULTY_FRAGILE"], "work", &["bad options"]);
}

#[test]
fn pointing_nowhere_is_seen() {
    check_broken(&["-DFAULTY_POINTLESS"], "work", &["bad options"]);
}

#[test]
fn progress_that_falls_is_seen() {
    check_broken(&[], "backwards", &["progress"]);
}

#[test]
fn steps_that_go_back_are_seen() {
    check_broken(&[], "steps_back", &["steps"]);
}

#[test]
fn not_stopping_is_seen() {
    check_broken(&[], "deaf", &["stops"]);
}

#[test]
fn failing_instead_of_stopping_is_seen() {
    check_broken(&[], "sulk", &["stops"]);
}

#[test]
fn writing_elsewhere_is_seen() {
    check_broken(&[], "outside", &["stays inside"]);
}

#[test]
fn results_that_ignore_the_seed_are_seen() {
    check_broken(&[], "unseeded", &["same seed", "resumes"]);
}

#[test]
fn forgetting_at_an_interruption_is_seen() {
    check_broken(&[], "forgetful", &["resumes"]);
}

#[test]
fn not_running_is_seen() {
    for act in ["fail", "abort", "segfault", "exit", "promise", "babble"] {
        check_broken(&[], act, &["runs"]);
    }
}
