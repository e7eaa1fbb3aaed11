//! Tokenizers in practice: trained against an adversary, continued, and with class names.

use std::fs;

use serde_json::Value;

use crate::images::every_format;
use crate::lab::Lab;
use crate::training::{caught, interrupted, lab, output, points};

/// Two networks and two optimisers, averaged codes, restarts: everything that a checkpoint has to contain.
const ADVERSARY: &str = "
  against:
    kind: tokenizer
    data: ${params.data}
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    z_channels: 8
    pixels: l1
    perceptual: {kind: l2, weight: 0.5}
    codebook_ema: 0.9
    restart_every: 20
    adversarial: {start: 40, channels: 8, layers: 1}
    train: {steps: 300, batch: 16, ema: 0.9, checkpoint_seconds: 1}
";

#[test]
fn an_adversary_that_was_interrupted_ends_with_the_same_bits() {
    let undisturbed = lab(ADVERSARY);
    undisturbed
        .retort(&["run", "r.yaml", "--until", "against"])
        .expect(0);
    let loss = "tokenizer/discriminator";
    let until = ["--until", "against"];
    let disturbed = caught(|| interrupted(lab(ADVERSARY), "against", loss, &until));
    disturbed
        .retort(&["resume", "-v"])
        .expect(0)
        .saying(&["tokenizer: continuing from step"]);
    let [a, b] = [&undisturbed, &disturbed].map(|lab| output(lab, "against"));
    assert_eq!(a.0, b.0);

    // Only the tokenizer is kept; its training is in the history.
    let file = fs::read(a.1.join("tokenizer.safetensors")).unwrap();
    let header = String::from_utf8_lossy(&file[..1 << 14]).into_owned();
    assert!(header.contains("quantize.embedding.weight") && !header.contains("discriminator"));
    assert!(a.1.join("reconstructions.png").is_file());
    for series in [
        "perceptual",
        "adversarial",
        "adaptive_weight",
        "adversary_gradient_norm",
        "codebook_usage",
        "perplexity",
        "held_out_psnr",
        "held_out_ssim",
    ] {
        let values = points(&undisturbed, "against", &format!("tokenizer/{series}"));
        assert!(!values.is_empty(), "{series}");
    }
    let errors = points(&undisturbed, "against", "tokenizer/held_out_error");
    assert!(errors.last() < errors.first(), "{errors:?}");
}

#[test]
fn losses_that_cannot_be_are_refused_before_anything_runs() {
    for (change, said) in [
        ("adversarial.start=300", "it would never act"),
        ("family=var", "not for `family: var`"),
        ("entropy={weight: 0.1}", "averaged codes follow no gradient"),
        // Decays of 1, with which nothing would ever move.
        ("codebook_ema=1", "less than 1 was expected"),
        ("train.beta1=1.0", "less than 1 was expected"),
        ("train.beta2=1", "less than 1 was expected"),
    ] {
        let lab = lab(ADVERSARY);
        let change = format!("against.{change}");
        lab.retort(&["validate", "r.yaml", "--set", &change])
            .expect(3)
            .saying(&[said]);
    }
    // Errors that depend on the images, once these are known.
    lab(ADVERSARY)
        .retort(&[
            "run",
            "r.yaml",
            "--until",
            "against",
            "--set",
            "against.adversarial.layers=2",
        ])
        .expect(100)
        .saying(&["at most 1"]);
}

/// Two classes of small images of many formats, prepared, and networks on them.
const PICTURES: &str = "version: 1
seed: 3
backend: candle
stages:
  pictures: {kind: images, data: {folder: mix, size: 16, fit: contain}}
  codes:
    kind: tokenizer
    data: pictures
    held_out: 0
    codebook_size: 8
    codebook_dim: 4
    channels: 8
    z_channels: 8
    entropy: {weight: 0.1}
    train: {steps: 4, batch: 8}
  teacher: {kind: pretrain, tokenizer: codes, data: pictures, held_out: 0, width: 16, depth: 1, heads: 2, train: {steps: 4, batch: 8}}
";

fn pictures(stages: &str) -> Lab {
    let lab = Lab::new(&[]);
    fs::write(lab.dir.path().join("r.yaml"), format!("{PICTURES}{stages}")).unwrap();
    every_format(&lab.dir.path().join("mix"));
    lab
}

/// All images together have 768 tokens.
#[test]
fn a_codebook_that_is_hardly_used_is_a_warning() {
    let lab = pictures(
        "
  many: {kind: tokenizer, data: pictures, held_out: 0, codebook_size: 32768, codebook_dim: 4, channels: 8, z_channels: 8,
         train: {steps: 2, batch: 4}}
",
    );
    lab.retort(&["run", "r.yaml", "--until", "many"])
        .expect(0)
        .saying(&["of 32768 codes are in use", "the codebook has collapsed"]);
}

#[test]
fn trainings_go_on_from_others() {
    let lab = pictures(
        "
  longer: {kind: tokenizer, data: pictures, held_out: 0, from: codes, codebook_size: 8, codebook_dim: 4, channels: 8, z_channels: 8,
           train: {steps: 1, batch: 8, learning_rate: 1.0e-9, warmup: 0}}
  again: {kind: pretrain, from: teacher, tokenizer: codes, data: pictures, held_out: 0, width: 16, depth: 1, heads: 2,
          train: {steps: 1, batch: 8, learning_rate: 1.0e-9, warmup: 0}}
  three: {kind: images, data: {folder: more, size: 16, fit: contain}}
  other: {kind: pretrain, from: teacher, tokenizer: codes, data: three, width: 16, depth: 1, heads: 2,
          train: {steps: 1, batch: 8}}
",
    );
    let more = lab.dir.path().join("more");
    every_format(&more);
    fs::create_dir(more.join("birds")).unwrap();
    fs::copy(more.join("cats/rgb.png"), more.join("birds/rgb.png")).unwrap();
    lab.retort(&["run", "r.yaml", "-v"])
        .expect(0)
        .saying(&["the embedding of the 3 here is made anew"]);
    // A step without any change gives the network that it started from. Nothing is held out, because each stage would do that
    // by a different seed.
    let figure = |stage: &str, series: &str| *points(&lab, stage, series).last().unwrap();
    for (first, second, series) in [
        ("codes", "longer", "tokenizer/held_out_error"),
        ("teacher", "again", "pretrain/held_out_loss"),
    ] {
        let (first, second) = (figure(first, series), figure(second, series));
        assert!((first - second).abs() < 1e-3 * first, "{first} {second}");
    }
    for (change, said) in [
        ("longer.codebook_size=4", "vocabulary 4 here, 8 there"),
        ("again.depth=2", "depth 2 here, 1 there"),
    ] {
        lab.retort(&["run", "r.yaml", "--set", change])
            .expect(100)
            .saying(&[said]);
    }
    // A teacher that also sees mirror images is a different one.
    let before = output(&lab, "teacher").0;
    let flipped = "teacher.data={images: pictures, flip: true}";
    lab.retort(&["run", "r.yaml", "--until", "teacher", "--set", flipped])
        .expect(0);
    assert_ne!(output(&lab, "teacher").0, before);
    // The same shape with different codes.
    let text = fs::read_to_string(lab.dir.path().join("r.yaml")).unwrap();
    let text = text.replace(
        "from: teacher, tokenizer: codes, data: pictures",
        "from: teacher, tokenizer: longer, data: pictures",
    );
    let text = text.replace(
        "learning_rate: 1.0e-9, warmup: 0}}\n  again",
        "learning_rate: 1.0e-1, warmup: 0}}\n  again",
    );
    fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    lab.retort(&["run", "r.yaml"])
        .expect(100)
        .saying(&["another codebook"]);
}

/// Tables of trajectories and of prepared images name the classes.
fn check_named_datasets(lab: &Lab) {
    let named = [
        ("pairs", "pairs_of_each", [3, 2], "cats 3, dogs 2"),
        ("pictures", "images_of_each", [6, 6], "cats 6, dogs 6"),
    ];
    for (stage, fact, counts, told) in named {
        let dir = output(lab, stage).1;
        for dataset in [format!("latest/{stage}"), dir.display().to_string()] {
            let info = ["dataset", "info", dataset.as_str()];
            let table = lab.retort(&info).expect(0).stdout;
            assert!(
                table.contains("cats, dogs") && table.contains(told),
                "{table}"
            );
            let facts = lab.retort(&[&info[..], &["--json"]].concat()).expect(0);
            let facts = facts.json();
            assert_eq!(facts["class_names"], serde_json::json!(["cats", "dogs"]));
            assert_eq!(
                facts[fact],
                serde_json::json!({"0": counts[0], "1": counts[1]})
            );
        }
    }
    let facts = lab.retort(&["dataset", "info", "latest/pictures", "--json"]);
    let facts = facts.expect(0).json();
    assert_eq!(facts["images"], 12, "{facts:#}");
    // Only trajectories can be verified as such.
    lab.retort(&["dataset", "verify", "latest/pictures"])
        .expect(4)
        .saying(&["is not a trajectory dataset"]);
}

#[test]
fn classes_keep_the_names_of_their_folders() {
    let lab = pictures(
        "
  named: {kind: sample, count: 2, labels: [dogs, cats], grid_columns: 1, sampler: {kind: teacher, teacher: teacher}}
  turns: {kind: sample, count: 5, labels: [dogs, cats], shard_size: 2, sampler: {kind: teacher, teacher: teacher}}
  like: {kind: sample, count: 6, labels: {images: pictures}, sampler: {kind: teacher, teacher: teacher}}
  pairs: {kind: trajectories, teacher: teacher, count: 5}
  eye: {kind: classifier, data: pictures, features: 8, train: {steps: 4, batch: 8}}
  judged: {kind: evaluate, data: pictures, classifier: eye, samples: {like: like}, tokenizers: {reconstruction: codes}}
",
    );
    lab.retort(&["run", "r.yaml"]).expect(0);
    let labels = |stage: &str| {
        let dir = output(&lab, stage).1;
        let samples = retort_engine::samples::Samples::open(&dir).unwrap();
        samples.labels
    };
    assert_eq!(labels("named"), [1, 0]);
    assert_eq!(labels("turns"), [1, 0, 1, 0, 1]);
    assert_eq!(labels("like"), [0, 0, 0, 1, 1, 1]);
    let all = lab
        .retort(&["artifacts", "list", "latest", "--json"])
        .expect(0)
        .stdout;
    assert!(all.contains("cats") && all.contains("dogs"), "{all}");

    check_named_datasets(&lab);

    let text = fs::read_to_string(output(&lab, "judged").1.join("evaluation.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["sets"]["reconstruction"]["samples"], 12);
    assert!(report["sets"]["reconstruction"]["frechet_distance"].is_number());

    // They have names without a recipe as well.
    lab.retort(&[
        "sample",
        "latest/teacher",
        "-n",
        "3",
        "--labels",
        "dogs,cats",
        "-o",
        "out",
    ])
    .expect(0)
    .saying(&["4 pictures in out"]);
    for file in ["000000-1.png", "000001-0.png", "000002-1.png"] {
        assert!(lab.dir.path().join("out").join(file).is_file(), "{file}");
    }
    lab.retort(&["sample", "latest~1/teacher", "--labels", "cows"])
        .expect(100)
        .saying(&["no class cows; the model has cats, dogs"]);

    lab.retort(&["run", "r.yaml", "--set", "named.labels=[dogs, cows]"])
        .expect(100)
        .saying(&["no class cows; the model has cats, dogs"]);
}
