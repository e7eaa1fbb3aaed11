//! `retort plugin test` on a plugin that is built: every kind of stage that a recipe can train from nothing, twice,
//! stopped and resumed; every operation of the backend, and every network with results of the published code.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::golden;

/// All kinds of stage but those that read published files, each in a second or two.
const RECIPE: &str = "
version: 1
seed: 3
backend: PLUGIN
device: cpu
params:
  data: {csv: DATA, height: 8, width: 8, max: 16}
stages:
  codes:
    kind: tokenizer
    data: ${params.data}
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {steps: 200, batch: 16}
  prior:
    kind: pretrain
    tokenizer: codes
    data: ${params.data}
    width: 16
    depth: 1
    heads: 2
    train: {steps: 300, batch: 16, ema: 0.9}
  pairs:
    kind: trajectories
    teacher: prior
    count: 1000
    shard_size: 250
    batch: 125
  student:
    kind: distill
    teacher: prior
    trajectories: pairs
    timesteps: [0, 6]
    train: {steps: 400, batch: 16, ema: 0.9, muon: {}}
  taught: {kind: sample, sampler: {kind: teacher, teacher: prior}, count: 40}
  learnt: {kind: sample, sampler: {kind: student, student: student, timesteps: [0]}, count: 40}
  features: {kind: classifier, data: \"${params.data}\", train: {steps: 60}}
  evaluation:
    kind: evaluate
    data: ${params.data}
    classifier: features
    samples: {teacher: taught, student: learnt}
";

/// Examines the plugin of this name beside the binary of this build; panics with the report over a check that failed.
/// Returns the report's rows.
///
/// # Panics
/// A check failed, or one that has to be made was not.
pub fn check(plugin: &str) -> Vec<Value> {
    let binary = binary(plugin);
    let dir = tempfile::tempdir().expect("a directory");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    let data = data.canonicalize().expect("the digits");
    let recipe = RECIPE.replace("DATA", &data.display().to_string());
    std::fs::write(dir.path().join("r.yaml"), recipe.replace("PLUGIN", plugin)).expect("a recipe");
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

    let passed: BTreeSet<(&str, &str)> = rows
        .filter(|row| row["verdict"] == "passed")
        .map(|row| (text(&row["check"]), text(&row["of"])))
        .collect();
    println!("{said}");
    let stages = [
        "codes",
        "prior",
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
    // These are long enough to be stopped on any machine.
    for stage in ["codes", "prior", "student"] {
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

/// The binary, beside the plugin; tests lie one directory below.
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
