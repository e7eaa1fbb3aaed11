//! `retort plugin test` on a built plugin: every kind of stage that a recipe can train from scratch, twice, stopped and
//! resumed; every operation of the backend, and every network with results of the published code.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::digits::Digits;
use crate::golden;

/// All kinds of stage except those that read published files, each in a second or two.
const STAGES: &str = "
  pairs:
    kind: trajectories
    teacher: teacher
    count: 1000
    shard_size: 250
    batch: 125
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0, 6]
    train: {steps: 400, batch: 16, ema: 0.9, muon: {}}
  taught: {kind: sample, sampler: {kind: teacher, teacher: teacher}, count: 40}
  learnt: {kind: sample, sampler: {kind: student, student: student, timesteps: [0]}, count: 40}
  features: {kind: classifier, data: \"${params.data}\", train: {steps: 60}}
  evaluation:
    kind: evaluate
    data: ${params.data}
    classifier: features
    samples: {teacher: taught, student: learnt}
";

/// Examines the plugin with this name beside this build's binary. Returns the report's rows.
///
/// # Panics
/// A check failed, or a required check was not made. The panic shows the report.
pub fn check(plugin: &str) -> Vec<Value> {
    // On a busy machine a training may end before it is stopped; then longer ones are tried.
    let mut reports = [1, 4, 16].into_iter().map(|times| examine(plugin, times));
    let in_time = reports.find(|rows| !rows.iter().any(ended_too_soon));
    in_time.expect("trainings that are stopped before they end")
}

/// Whether a training ended before it could be stopped.
fn ended_too_soon(row: &Value) -> bool {
    let is_training = TRAININGS.contains(&text(&row["of"]));
    is_training && row["check"] == "stops" && row["verdict"] == "skipped"
}

/// Stages that are stopped and resumed.
const TRAININGS: [&str; 3] = ["codes", "teacher", "student"];

/// Examines it with trainings of `times` the steps.
fn examine(plugin: &str, times: u32) -> Vec<Value> {
    let binary = binary(plugin);
    let dir = tempfile::tempdir().expect("a directory");
    let codes = format!("train: {{steps: {}, batch: 16}}", 200 * times);
    let teacher = format!(
        "width: 16, depth: 1, heads: 2, train: {{steps: {}, batch: 16, ema: 0.9}}",
        300 * times
    );
    let recipe = Digits {
        backend: plugin,
        top: "seed: 3\ndevice: cpu",
        codes: &codes,
        teacher: &teacher,
    };
    let stages = STAGES.replace("steps: 400", &format!("steps: {}", 400 * times));
    std::fs::write(dir.path().join("r.yaml"), recipe.recipe(&stages)).expect("a recipe");
    let output = Command::new(&binary)
        .args(["plugin", "test", plugin, "--recipe", "r.yaml", "--json"])
        .arg("--golden")
        .arg(golden::folder())
        .current_dir(dir.path())
        .env_remove("RETORT_PLUGIN_PATH")
        .output()
        .expect("the binary runs");
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let rows = report.as_array().into_iter().flatten();
    let failed: Vec<&Value> = rows
        .clone()
        .filter(|row| row["verdict"] == "failed")
        .collect();
    assert!(output.status.success(), "{said}{failed:#?}");
    if rows.clone().any(ended_too_soon) {
        return rows.cloned().collect();
    }

    let passed: BTreeSet<(&str, &str)> = rows
        .filter(|row| row["verdict"] == "passed")
        .map(|row| (text(&row["check"]), text(&row["of"])))
        .collect();
    println!("{said}");
    let stages = [
        "codes",
        "teacher",
        "pairs",
        "student",
        "taught",
        "learnt",
        "features",
        "evaluation",
    ];
    let of_plugin = [
        "trusted",
        "exports",
        "describes itself",
        "description",
        "devices",
    ];
    let mut needed: BTreeSet<(&str, &str)> = of_plugin.map(|check| (check, "")).into();
    needed.extend([("operations", "cpu f32"), ("networks", "cpu")]);
    for stage in stages {
        needed.extend(["runs", "stays inside", "ends", "same seed"].map(|check| (check, stage)));
    }
    for stage in TRAININGS {
        needed.extend(["progress", "steps", "stops", "resumes"].map(|check| (check, stage)));
    }
    needed.insert(("divides", "pairs"));
    // In every dtype.
    let all = report.as_array().expect("rows").iter();
    let of_rows = all.map(|row| (text(&row["check"]), text(&row["of"])));
    needed.extend(of_rows.filter(|(check, of)| *check == "operations" && of.starts_with("cpu ")));
    let missing: Vec<_> = needed.difference(&passed).collect();
    assert!(missing.is_empty(), "not passed: {missing:?}\n{said}");
    report.as_array().expect("rows").clone()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The binary, beside the plugin; tests are one directory below.
fn binary(plugin: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let dir = test.ancestors().nth(2).expect("target/release");
    for file in ["retort".into(), format!("libretort_{plugin}.so")] {
        assert!(
            dir.join(&file).exists(),
            "{} is not built: `make test` builds it, `make libtorch` what is of libtorch",
            dir.join(&file).display()
        );
    }
    dir.join("retort")
}
