//! Ablations of a student's training: fewer pairs, earlier steps, another start, no cross-entropy; what is refused beforehand.

use std::path::Path;

use serde_json::Value;

use crate::lab::Lab;
use crate::training::{caught, interrupted, lab, output, points};

/// The shared part of the students here.
const STUDENT: &str = "kind: distill, teacher: teacher, seed: 5, timesteps: [0, 6]";

#[test]
fn the_first_pairs_of_a_data_set_are_a_data_set() {
    let train = "train: {steps: 12, batch: 16, ema: 0.9}";
    let lab = lab(&format!(
        "
  many: {{kind: trajectories, teacher: teacher, count: 300, seed: 3}}
  few: {{kind: trajectories, teacher: teacher, count: 100, seed: 3}}
  of-few: {{{STUDENT}, trajectories: few, {train}}}
  of-many: {{{STUDENT}, trajectories: many, {train}}}
  of-first: {{{STUDENT}, trajectories: many, use: 100, {train}}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    let [few, many, first] = ["of-few", "of-many", "of-first"].map(|stage| output(&lab, stage).0);
    assert_eq!(first, few);
    assert_ne!(first, many);
    let wrong = format!("  wrong: {{{STUDENT}, trajectories: many, use: 301, {train}}}\n");
    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    std::fs::write(&recipe, format!("{text}{wrong}")).unwrap();
    lab.retort(&["run", "r.yaml", "--until", "wrong"])
        .expect(3)
        .saying(&["use 301: many has 300 pairs"]);
}

/// The weights of a student.
fn weights(lab: &Lab, stage: &str) -> Vec<u8> {
    std::fs::read(output(lab, stage).1.join("model.safetensors")).unwrap()
}

#[test]
fn snapshots_are_students_and_students_are_starts() {
    let rate = "learning_rate: 1.0e-3, warmup: 1, decay: constant, ema: 0.9, batch: 16";
    let lab = lab(&format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 200}}
  whole: {{{STUDENT}, trajectories: pairs, depth: 3, snapshots: 4, train: {{steps: 11, {rate}}}}}
  part: {{{STUDENT}, trajectories: pairs, depth: 3, train: {{steps: 8, {rate}}}}}
  after-4: {{kind: snapshot, student: whole, step: 4}}
  after-8: {{kind: snapshot, student: whole, step: 8}}
  drawn: {{kind: sample, count: 20, sampler: {{kind: student, student: after-4, timesteps: [0, 6]}}}}
  further: {{{STUDENT}, trajectories: pairs, from: after-8, train: {{steps: 6, {rate}}}}}
  anew: {{{STUDENT}, trajectories: pairs, depth: 3, train: {{steps: 6, {rate}}}}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    // A snapshot equals the student of a training that ends there.
    assert_eq!(weights(&lab, "after-8"), weights(&lab, "part"));
    assert_ne!(weights(&lab, "after-4"), weights(&lab, "part"));
    assert_ne!(weights(&lab, "whole"), weights(&lab, "part"));
    let kept = std::fs::read_dir(output(&lab, "whole").1.join("snapshots")).unwrap();
    assert_eq!(kept.count(), 2);
    assert!(!output(&lab, "after-8").1.join("snapshots").exists());
    // A training that continues a student starts with a lower loss than a fresh one.
    let [further, anew] =
        ["further", "anew"].map(|stage| points(&lab, stage, "distill/cross_entropy")[0]);
    assert!(further < anew, "{further}, {anew}");

    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    for (stage, code, saying) in [
        (
            "kind: snapshot, student: whole, step: 5".to_owned(),
            3,
            "whole has no snapshot of step 5: it keeps one every 4 steps, below 11",
        ),
        (
            "kind: snapshot, student: whole, step: 12".to_owned(),
            3,
            "whole has no snapshot of step 12",
        ),
        (
            "kind: snapshot, student: part, step: 4".to_owned(),
            3,
            "`snapshots: n` in its stage",
        ),
        (
            format!("{STUDENT}, trajectories: pairs, snapshots: 8, train: {{steps: 8}}"),
            3,
            "snapshots 8: none would be kept, for the training has 8 steps",
        ),
        (
            format!("{STUDENT}, trajectories: pairs, from: part, depth: 4, train: {{steps: 1}}"),
            3,
            "must have as many blocks",
        ),
    ] {
        std::fs::write(&recipe, format!("{text}  wrong: {{{stage}}}\n")).unwrap();
        lab.retort(&["run", "r.yaml", "--until", "wrong"])
            .expect(code)
            .saying(&[saying]);
    }
}

#[test]
fn snapshots_outlive_an_interruption() {
    let recipe = format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 400}}
  student: {{{STUDENT}, trajectories: pairs, depth: 3, snapshots: 10, train: {{steps: 200, batch: 32}}}}
"
    );
    let undisturbed = lab(&recipe);
    undisturbed.retort(&["run", "r.yaml"]).expect(0);
    let disturbed = caught(|| interrupted(lab(&recipe), "student", "distill/loss", &[]));
    disturbed.retort(&["resume"]).expect(0);
    let [a, b] = [&undisturbed, &disturbed].map(|lab| output(lab, "student").0);
    assert_eq!(a, b);
}

#[test]
fn a_student_can_predict_embeddings_alone() {
    let lab = lab(&format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 1000}}
  embeddings: {{{STUDENT}, trajectories: pairs, split: 0, cross_entropy: 0, codebook_distance: 1, train: {{steps: 60, batch: 32}}}}
  drawn: {{kind: sample, count: 20, sampler: {{kind: student, student: embeddings, timesteps: [0], split: 0}}}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    let log = lab.retort(&["log", "latest"]).expect(0).stdout;
    assert!(log.contains("squared distance"), "{log}");
    for series in ["distill/codebook_distance", "distill/held_out_loss"] {
        let values = points(&lab, "embeddings", series);
        assert!(values.last() < values.first(), "{series}: {values:?}");
    }
    let all: Value = lab
        .retort(&["metrics", "latest", "--stage", "embeddings", "--json"])
        .expect(0)
        .json();
    let known = |name: &str| all.as_array().unwrap().iter().any(|s| s["series"] == name);
    assert!(!known("distill/cross_entropy") && known("distill/loss"));

    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    for (options, code, saying) in [
        (
            "cross_entropy: 0, codebook_distance: 1",
            3,
            "without cross-entropy the logits do not learn",
        ),
        (
            "cross_entropy: 0, codebook_distance: 1, split: 3",
            3,
            "`split: 0` takes",
        ),
        ("cross_entropy: 0, split: 0", 3, "no loss: set"),
        (
            "split: 16, perceptual: {kind: l2, weight: 1}",
            3,
            "the perceptual term needs tokens of the continuous head",
        ),
    ] {
        let wrong = format!(
            "  wrong: {{{STUDENT}, trajectories: pairs, {options}, train: {{steps: 1}}}}\n"
        );
        std::fs::write(&recipe, format!("{text}{wrong}")).unwrap();
        lab.retort(&["run", "r.yaml", "--until", "wrong"])
            .expect(code)
            .saying(&[saying]);
    }
}

/// What follows from the sizes of images and tokenizer is known before any stage runs.
#[test]
fn timesteps_beyond_the_tokens_are_refused_before_anything_runs() {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/own-images.yaml");
    let recipe = recipe.to_str().unwrap();
    let lab = Lab::new(&[]);
    let check = |settings: &[&str], code: i32, said: &[&str]| {
        let sets = settings.iter().flat_map(|set| ["--set", *set]);
        let command: Vec<&str> = ["validate", recipe].into_iter().chain(sets).collect();
        lab.retort(&command).expect(code).saying(said);
    };
    let below = "timesteps [0, 24]: expected ascending AR steps, each below 16, as in [0, 8]";
    let stages = ["stage `student`", "stage `two-step`", below];
    check(&["params.size=16"], 3, &stages);
    check(&["params.size=[16, 32]"], 0, &[]);
    check(&["params.size=16", "params.second=6"], 0, &[]);
    check(&[], 0, &[]);
    let split = ["two-step.sampler.split=65", "params.size=32"];
    check(&split, 3, &["split 65: the model has 64 AR steps"]);
    // Only the files tell how many tokens there are.
    check(&["pictures.data={folder: x}", "params.second=99"], 0, &[]);
}

/// The same student fits the teacher of one point and not that of another.
#[test]
fn each_point_of_a_sweep_is_checked_against_its_own_stages() {
    let lab = lab(&format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 300}}
  student: {{{STUDENT}, trajectories: pairs, train: {{steps: 4}}}}
"
    ));
    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    let text = text
        .replace(
            "params:\n",
            "params:\n  shape: {levels: [1, 2], second: 6}\n",
        )
        .replace(
            "codebook_dim: 4,",
            "codebook_dim: 4, multipliers: \"${params.shape.levels}\",",
        )
        .replace(
            "timesteps: [0, 6]",
            "timesteps: [0, \"${params.shape.second}\"]",
        );
    std::fs::write(&recipe, text).unwrap();
    // Three levels leave 4 of the 16 tokens.
    let plan = |sweep: &str| lab.retort(&["plan", "r.yaml", "--sweep", sweep]);
    plan("params.shape.levels=[1, 1, 2],[1, 2]")
        .expect(3)
        .saying(&["each below 4", "this is point 1 of 2"]);
    plan("params.shape={levels: [1, 2], second: 6},{levels: [1, 1, 2], second: 2}").expect(0);
}
