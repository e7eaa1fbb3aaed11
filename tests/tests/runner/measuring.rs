//! The published measuring networks in stages: files under their published names, with procedural weights.

use std::path::Path;

use retort_engine::weights;
use retort_tests::golden;
use serde_json::Value;

use crate::lab::Lab;
use crate::training::{lab, output, points};

/// Writes the weights of a network into the lab's directory.
fn network(lab: &Lab, part: &str) {
    let weights_of = golden::measuring_weights(part).unwrap();
    let path = lab.dir.path().join(format!("{part}.safetensors"));
    weights::write(&path, &weights_of).unwrap();
}

/// Appends stages to the lab's recipe.
fn add(lab: &Lab, stages: &str) {
    let path = lab.dir.path().join("r.yaml");
    let recipe = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, recipe + stages).unwrap();
}

fn figures(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("evaluation.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    all["sets"]["drawn"].clone()
}

#[test]
fn inception_measures_against_images_and_against_their_statistics() {
    let lab = lab("
  drawn: {kind: sample, count: 24, sampler: {kind: teacher, teacher: teacher}}
  judged:
    kind: evaluate
    data: {csv: few.csv, height: 8, width: 8, max: 16}
    inception: inception.safetensors
    dims: 64
    splits: 2
    save_statistics: true
    samples: {drawn: drawn}
");
    network(&lab, "inception");
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    let digits = std::fs::read_to_string(digits).unwrap();
    let few: String = digits.split_inclusive('\n').take(30).collect();
    std::fs::write(lab.dir.path().join("few.csv"), few).unwrap();
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    assert!(said.stdout.contains("inception score"), "{}", said.stdout);
    let judged = output(&lab, "judged").1;
    let first = figures(&judged);
    for figure in [
        "frechet_distance",
        "spatial_frechet_distance",
        "inception_score",
        "inception_score_deviation",
        "precision",
        "recall",
    ] {
        let value = first[figure].as_f64();
        assert!(value.is_some_and(|x| x >= 0.0), "{figure} in {first:#}");
    }

    // The statistics alone give the same distances, and nothing that needs the images.
    let statistics = lab.dir.path().join("statistics.npz");
    std::fs::copy(judged.join("statistics.npz"), statistics).unwrap();
    add(
        &lab,
        "
  again:
    kind: evaluate
    statistics: statistics.npz
    inception: inception.safetensors
    dims: 64
    splits: 2
    samples: {drawn: drawn}
",
    );
    lab.retort(&["run", "r.yaml"]).expect(0);
    let again = figures(&output(&lab, "again").1);
    for figure in ["frechet_distance", "spatial_frechet_distance"] {
        let [a, b] = [&first, &again].map(|x| x[figure].as_f64().unwrap());
        assert!((a / b - 1.0).abs() < 1e-9, "{figure}: {a} and {b}");
    }
    assert_eq!(again["inception_score"], first["inception_score"]);
    assert_eq!(again["precision"], Value::Null);

    // Of other features than the network's.
    lab.retort(&["run", "r.yaml", "--set", "again.dims=192"])
        .expect(100)
        .saying(&["statistics.npz", "of shape [64], expected [192]"]);
}

#[test]
fn lpips_moves_the_continuous_head() {
    let lab = lab("
  pairs: {kind: trajectories, teacher: teacher, count: 500, distribution: {guidance: 1.5}}
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0]
    split: 8
    cross_entropy: 0.1
    perceptual: {kind: lpips, weight: 1.0, vgg: vgg.safetensors, linear: linear.safetensors}
    train: {steps: 40, batch: 8}
");
    network(&lab, "vgg");
    network(&lab, "linear");
    lab.retort(&["run", "r.yaml"])
        .expect(100)
        .saying(&["LPIPS needs images of at least 16 x 16 pixels, the tokenizer decodes to 8"]);

    // The same digits at 16 x 16, each pixel four times; a level more keeps the 16 tokens.
    let digits = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/data/digits.csv");
    let digits = std::fs::read_to_string(digits).unwrap();
    let mut large = String::new();
    for line in digits.lines().take(600) {
        let cells: Vec<&str> = line.split(',').collect();
        for pixel in 0..256 {
            large.push_str(cells[pixel / 32 * 8 + pixel % 16 / 2]);
            large.push(',');
        }
        large.push_str(cells[64]);
        large.push('\n');
    }
    std::fs::write(lab.dir.path().join("large.csv"), large).unwrap();
    let path = lab.dir.path().join("r.yaml");
    let recipe = std::fs::read_to_string(&path).unwrap();
    let start = recipe.find("{csv:").unwrap();
    let end = start + recipe[start..].find('}').unwrap();
    let recipe = format!(
        "{}{{csv: large.csv, height: 16, width: 16, max: 16{}",
        &recipe[..start],
        &recipe[end..]
    );
    let recipe = recipe.replace("z_channels: 8", "z_channels: 8\n    multipliers: [1, 1, 1]");
    std::fs::write(&path, recipe).unwrap();
    lab.retort(&["run", "r.yaml"]).expect(0);
    let values = points(&lab, "student", "distill/perceptual");
    assert!(
        values.last() < values.first() && values.iter().all(|x| *x > 0.0),
        "{values:?}"
    );
}
