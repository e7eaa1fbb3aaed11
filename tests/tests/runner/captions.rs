//! Text to image through the command line: a flan-t5 in a folder, a teacher of captions in a torch file, and the results of
//! `peers/captions.py`.

use std::path::{Path, PathBuf};

use retort_engine::dataset::Dataset;
use retort_engine::numpy;
use retort_engine::weights::{self, CheckpointWeights, Weights};
use retort_tests::golden::procedural_weights;
use retort_tests::torch::Archive;
use serde_json::Value;

use crate::images::every_format;
use crate::lab::Lab;
use crate::training::{caught, interrupted, output, points};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

fn expected() -> CheckpointWeights {
    CheckpointWeights::open(&golden("captions").join("expected.safetensors"), None).unwrap()
}

/// Writes teacher, tokenizer, text encoder and features.
fn write_files(dir: &Path) {
    let parts = procedural_weights(&golden("captions").join("weights.json")).unwrap();
    let images = procedural_weights(&golden("llamagen").join("weights.json")).unwrap();
    write_torch(&dir.join("vq.pt"), "", &images["vq"]);
    // As saved from `DataParallel`.
    write_torch(&dir.join("t2i.pt"), "module.", &parts["gpt"]);

    // One text encoder in a safetensors file, one in two torch files.
    for folder in ["t5", "t5-parts"] {
        let folder = dir.join(folder);
        std::fs::create_dir(&folder).unwrap();
        for file in ["config.json", "tokenizer.json"] {
            std::fs::copy(golden("captions").join(file), folder.join(file)).unwrap();
        }
    }
    weights::write(&dir.join("t5/model.safetensors"), &parts["t5"]).unwrap();
    let (first, second): (Weights, Weights) = parts["t5"]
        .clone()
        .into_iter()
        .partition(|(name, _)| name.contains("block.0"));
    let mut map = serde_json::Map::new();
    for (file, part) in [("a.bin", &first), ("b.bin", &second)] {
        write_torch(&dir.join("t5-parts").join(file), "", part);
        map.extend(part.keys().map(|name| (name.clone(), file.into())));
    }
    map.insert(
        "decoder.final_layer_norm.weight".into(),
        "absent.bin".into(),
    );
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    let path = dir.join("t5-parts/pytorch_model.bin.index.json");
    std::fs::write(path, index.to_string()).unwrap();

    // Features from a text encoder: with padding at the end.
    let stored = expected();
    let shape = stored.shape("features").unwrap().to_vec();
    let (features, mask) = (
        stored.floats("features").unwrap(),
        stored.floats("mask").unwrap(),
    );
    let (mut turned, mut turned_mask) = (Vec::new(), Vec::new());
    let width = shape[2];
    for (features, mask) in features
        .chunks_exact(shape[1] * width)
        .zip(mask.chunks_exact(shape[1]))
    {
        let before = mask.iter().filter(|&&x| x == 0.0).count();
        turned.extend(&features[before * width..]);
        // Masked values are not used.
        turned.extend(vec![7.0; before * width]);
        turned_mask.extend(mask.iter().rev());
    }
    write_npy(&dir.join("features.npy"), &shape, &turned);
    write_npy(&dir.join("mask.npy"), &shape[..2], &turned_mask);
    write_npy(
        &dir.join("narrow.npy"),
        &[3, 12, 16],
        &vec![1.0; 3 * 12 * 16],
    );
}

fn write_torch(path: &Path, prefix: &str, weights: &Weights) {
    let mut archive = Archive::create(path);
    archive.open("model");
    for (name, w) in weights {
        archive.tensor(&format!("{prefix}{name}"), &w.shape, &w.data);
    }
    archive.close();
    archive.finish();
}

fn write_npy(path: &Path, shape: &[usize], data: &[f32]) {
    let mut file = numpy::header("<f4", shape);
    file.extend(weights::le_bytes(data));
    std::fs::write(path, file).unwrap();
}

const TEACHER: &str = "teacher: {kind: teacher, family: llamagen, model: t2i.pt, tokenizer: vq.pt, heads: 2, image_size: 8}";

fn texts() -> String {
    let numbers = std::fs::read_to_string(golden("captions").join("numbers.json")).unwrap();
    let numbers: Value = serde_json::from_str(&numbers).unwrap();
    numbers["texts"].to_string()
}

/// Writes a recipe with the teacher and these stages.
fn recipe(lab: &Lab, stages: &[&str]) {
    let mut text = format!("version: 1\nbackend: candle\ndevice: cpu\nstages:\n  {TEACHER}\n");
    stages
        .iter()
        .for_each(|stage| text.push_str(&format!("  {stage}\n")));
    std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
}

/// Tokens or latents in a stage's artifact.
fn artifact(lab: &Lab, stage: &str, file: &str) -> PathBuf {
    let list = lab.retort(&["artifacts", "list", "latest", "--json"]);
    let list = list.expect(0).json();
    let mut rows = list.as_array().unwrap().iter();
    let row = rows.find(|row| row["stage"] == stage).unwrap();
    lab.dir
        .path()
        .join(row["path"].as_str().unwrap())
        .join(file)
}

#[test]
fn captions_become_the_expected_tokens() {
    let lab = Lab::new(&[]);
    write_files(lab.dir.path());
    let (texts, noise) = (texts(), golden("captions").join("expected.safetensors"));
    let noise = format!("noise: {{file: {}, tensor: noise}}", noise.display());
    let pairs = format!(
        "kind: trajectories, teacher: teacher, count: 3, distribution: {{guidance: 2.0}}, {noise}, \
         caption: {texts}, text_encoder: t5"
    );
    let greedy = "count: 3, tokens: true, sampler: {kind: teacher, teacher: teacher, distribution: {guidance: 2.0, top_k: 1}}";
    recipe(
        &lab,
        &[
            &format!("greedy: {{kind: sample, {greedy}, caption: {texts}, text_encoder: t5}}"),
            &format!("parts: {{kind: sample, {greedy}, caption: {texts}, text_encoder: t5-parts}}"),
            &format!(
                "given: {{kind: sample, {greedy}, features: {{file: features.npy, mask_file: mask.npy}}}}"
            ),
            &format!("trajectories: {{{pairs}}}"),
            &format!("divided: {{{pairs}, shard_size: 1, workers: 3}}"),
            "student: {kind: distill, teacher: teacher, trajectories: trajectories, timesteps: [0, 6], split: 10, \
             held_out: 0, codebook_distance: 1.0, train: {steps: 3, batch: 3}}",
            "two-step: {kind: sample, sampler: {kind: student, student: student, timesteps: [0, 6], split: 10}, count: 4, images: f32, \
             caption: [a red cat, two tables], text_encoder: t5}",
            "assisted: {kind: sample, sampler: {kind: assisted, student: student, teacher: teacher, timesteps: [0, 6], \
             teacher_start: 3}, count: 2, caption: one dog, text_encoder: t5}",
        ],
    );
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    // The captions are under the pictures.
    let shown = format!("{}{}", said.stdout, said.stderr);
    assert!(
        shown.contains("from the top: \u{201c}a red cat\u{201d}, \u{201c}two tables\u{201d}"),
        "{shown}"
    );

    let expected = expected();
    for stage in ["greedy", "parts", "given"] {
        let samples =
            CheckpointWeights::open(&artifact(&lab, stage, "shard-000000000.safetensors"), None)
                .unwrap();
        assert_eq!(
            samples.indices("tokens").unwrap(),
            expected.indices("greedy.tokens").unwrap(),
            "{stage}"
        );
        assert_eq!(samples.indices("labels").unwrap(), [0, 1, 2]);
    }
    let shard = artifact(&lab, "trajectories", "shard-000000000.safetensors");
    assert_eq!(
        CheckpointWeights::open(&shard, None)
            .unwrap()
            .indices("tokens")
            .unwrap(),
        expected.indices("trajectory.tokens").unwrap()
    );
    let divided = Dataset::open(&artifact(&lab, "divided", "")).unwrap();
    let tokens = (0..3).flat_map(|i| divided.tokens_of(i).unwrap());
    assert_eq!(
        tokens.collect::<Vec<u32>>(),
        expected.indices("trajectory.tokens").unwrap()
    );
    let kept = CheckpointWeights::open(
        &artifact(&lab, "trajectories", "captions.safetensors"),
        None,
    )
    .unwrap();
    let lengths: Vec<u32> = (0..3)
        .map(|i| expected.indices(&format!("caption.{i}.ids")).unwrap().len() as u32)
        .collect();
    assert_eq!(kept.indices("lengths").unwrap(), lengths);
    let written = std::fs::read_to_string(artifact(&lab, "two-step", "captions.json")).unwrap();
    let written: Vec<String> = serde_json::from_str(&written).unwrap();
    assert_eq!(written, ["a red cat", "two tables"]);
    let drawn = CheckpointWeights::open(
        &artifact(&lab, "two-step", "shard-000000000.safetensors"),
        None,
    )
    .unwrap();
    assert_eq!(drawn.indices("labels").unwrap(), [0, 1, 0, 1]);
    let images = drawn.floats("images").unwrap();
    assert!(images.iter().all(|x| (0.0..=1.0).contains(x)));
}

/// Where `check_sample` puts its stage.
const PLACE: &str = "r.yaml:6:";

/// Runs a command on a recipe that samples with these options.
fn check_sample(lab: &Lab, (command, code): (&str, i32), options: &str, expected: &[&str]) {
    let sampler = "sampler: {kind: teacher, teacher: teacher}";
    recipe(
        lab,
        &[&format!(
            "s: {{kind: sample, count: 2, {sampler}, {options}}}"
        )],
    );
    lab.retort(&[command, "r.yaml"])
        .expect(code)
        .saying(expected);
}

#[test]
fn captions_that_do_not_fit_are_refused() {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    write_files(dir);
    let check = |command: &str, code: i32, options: &str, expected: &[&str]| {
        check_sample(&lab, (command, code), options, expected);
    };
    for (options, expected) in [
        ("caption: a cat", "a caption needs a `text_encoder`"),
        ("text_encoder: t5", "no `caption` to encode"),
        (
            "caption: a cat, text_encoder: t5, labels: [1, 2]",
            "give `labels` or captions, not both",
        ),
        (
            "caption: a cat, text_encoder: t5, features: {file: features.npy}",
            "captions and features exclude each other",
        ),
        (
            "caption: [a cat, ''], text_encoder: t5",
            "caption 2 is empty",
        ),
        ("caption: [], text_encoder: t5", "no caption"),
        (
            "caption: a cat, text_encoder: .",
            "config.json: No such file or directory",
        ),
        (
            "features: {file: features.npy, mask: mask}",
            "`mask` names a tensor of a safetensors file",
        ),
        (
            "features: {file: vq.pt, tensor: features}",
            "no tensor features",
        ),
    ] {
        check("validate", 3, options, &[PLACE, expected]);
    }
    // Missing files are mentioned, and are an error once they are needed.
    let absent = "caption: a cat, text_encoder: flan-t5-xl";
    check("validate", 0, absent, &["flan-t5-xl", "does not exist"]);
    check("run", 3, absent, &["flan-t5-xl", "does not exist"]);

    // Properties that only the teacher has.
    for (options, expected) in [
        (
            "labels: [0, 1]",
            "this model is conditioned on captions: give `caption` and `text_encoder`, or `features`",
        ),
        ("grid_columns: 1", "this model is conditioned on captions"),
        (
            "features: {file: narrow.npy}",
            "features of width 16, the model takes up to 12 tokens of width 32",
        ),
    ] {
        check("run", 100, options, &[PLACE, expected]);
    }
}

#[test]
fn text_encoders_that_do_not_fit_are_refused() {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    write_files(dir);
    let check = |command: &str, code: i32, expected: &[&str]| {
        let options = "caption: a cat, text_encoder: t5";
        check_sample(&lab, (command, code), options, expected);
    };
    let config = dir.join("t5/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let change = |from: &str, to: &str| std::fs::write(&config, text.replace(from, to)).unwrap();
    change("gated-gelu", "relu");
    check(
        "validate",
        3,
        &[PLACE, "feed_forward_proj \"relu\", expected \"gated-gelu\""],
    );
    change("\"d_model\": 32", "\"d_model\": 40");
    check(
        "run",
        100,
        &[
            PLACE,
            "a text encoder of width 40, the model takes features of width 32",
        ],
    );
    change("\"d_ff\": 40", "\"d_ff\": 41");
    check(
        "run",
        100,
        &[
            "t5: weight ",
            "DenseReluDense.wi_0.weight has shape [40, 32], expected [41, 32]",
        ],
    );
}

#[test]
fn captions_for_a_model_of_classes_are_refused() {
    let lab = Lab::new(&[]);
    write_files(lab.dir.path());
    let images = procedural_weights(&golden("llamagen").join("weights.json")).unwrap();
    write_torch(&lab.dir.path().join("t2i.pt"), "", &images["gpt"]);
    recipe(
        &lab,
        &[
            "s: {kind: sample, count: 2, sampler: {kind: teacher, teacher: teacher}, caption: a cat, text_encoder: t5}",
        ],
    );
    lab.retort(&["run", "r.yaml"]).expect(100).saying(&[
        "r.yaml:6:",
        "this model is conditioned on classes: give `labels`",
    ]);
}

/// A teacher that learns captions of pictures in a few seconds.
const LEARNT: &str = "
version: 1
seed: 3
backend: candle
device: cpu
stages:
  pictures: {kind: images, data: {folder: mix, size: 16}}
  codes:
    kind: tokenizer
    data: pictures
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {steps: 20, batch: 12}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: pictures
    CAPTIONS
    caption_tokens: 12
    label_dropout: 0.2
    width: 32
    depth: 2
    heads: 2
    held_out: 0
    train: {steps: STEPS, batch: 12, ema: 0.9}
";

/// A folder of pictures with captions, and a lab with a training on them.
fn pictures(captions: &str, steps: u64) -> Lab {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    write_files(dir);
    every_format(&dir.join("mix"));
    let mut table = String::new();
    for class in ["cats", "dogs"] {
        let folder = std::fs::read_dir(dir.join("mix").join(class)).unwrap();
        let mut files: Vec<_> = folder.map(|entry| entry.unwrap().file_name()).collect();
        files.sort();
        for (i, file) in files.iter().enumerate() {
            let file = format!("{class}/{}", file.to_str().unwrap());
            // Some captions belong to several pictures.
            let caption = format!("one of {class} beside {}", i / 2);
            let row = serde_json::json!({ "file_name": file, "caption": caption });
            table.push_str(&format!("{row}\n"));
        }
    }
    std::fs::write(dir.join("mix/metadata.jsonl"), table).unwrap();
    let text = LEARNT
        .replace("CAPTIONS", captions)
        .replace("STEPS", &steps.to_string());
    std::fs::write(dir.join("r.yaml"), text).unwrap();
    lab
}

/// The unconditional features of the newest teacher.
fn unconditional(lab: &Lab) -> Vec<f32> {
    let path = output(lab, "teacher").1.join("model.safetensors");
    let stored = CheckpointWeights::open(&path, None).unwrap();
    stored.floats("cls_embedding.uncond_embedding").unwrap()
}

#[test]
fn a_teacher_learns_captions_of_pictures() {
    let lab = pictures("text_encoder: t5", 120);
    lab.retort(&["run", "r.yaml"]).expect(0);
    let losses = points(&lab, "teacher", "pretrain/held_out_loss");
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.9 * first, "{losses:?}");

    // Sampled like a published one.
    let path = lab.dir.path().join("r.yaml");
    let drawn = "  drawn: {kind: sample, count: 2, tokens: true, text_encoder: t5, caption: [one of cats beside 0, one of dogs beside 2], \
                 sampler: {kind: teacher, teacher: teacher, distribution: {guidance: 2.0}}}\n";
    let text = std::fs::read_to_string(&path).unwrap() + drawn;
    std::fs::write(&path, text).unwrap();
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    let shown = format!("{}{}", said.stdout, said.stderr);
    assert!(shown.contains("one of cats beside 0"), "{shown}");

    // Training does not change the unconditional features.
    let short = pictures("text_encoder: t5", 1);
    short.retort(&["run", "r.yaml"]).expect(0);
    assert_eq!(unconditional(&lab), unconditional(&short));
    assert_ne!(output(&lab, "teacher").0, output(&short, "teacher").0);
}

/// The recipe for captioned images, on few of them and with tiny networks.
#[test]
fn the_recipe_of_captions_runs_to_its_end() {
    const SMALL: [&str; 18] = [
        "codes.channels=8",
        "codes.train.steps=2",
        "codes.train.batch=4",
        "teacher.width=16",
        "teacher.depth=1",
        "teacher.heads=2",
        "teacher.caption_tokens=12",
        "teacher.train.steps=2",
        "teacher.train.batch=4",
        "trajectories.count=16",
        "student.train.steps=2",
        "student.train.batch=4",
        "one-step.count=8",
        "two-step.count=8",
        "by-teacher.count=8",
        "prompts.count=2",
        "features.features=8",
        "features.train.steps=2",
    ];
    let lab = pictures("text_encoder: t5", 1);
    let dir = lab.dir.path();
    let captions = "one of cats beside 0\none of dogs beside 2\n";
    std::fs::write(dir.join("captions.txt"), captions).unwrap();
    let place = |name: &str, path: &str| format!("params.{name}={}", dir.join(path).display());
    let places = [
        place("folder", "mix"),
        place("captions", "captions.txt"),
        place("text_encoder", "t5"),
    ];
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/captions.yaml");
    let sets = places.iter().map(String::as_str).chain(SMALL);
    let sets = sets.flat_map(|set| ["--set", set]);
    let command = ["run", recipe.to_str().unwrap()].into_iter().chain(sets);
    lab.retort(&command.collect::<Vec<_>>()).expect(0);

    let report = output(&lab, "evaluation").1.join("evaluation.json");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(report).unwrap()).unwrap();
    let sets = &report["sets"];
    for set in ["teacher", "1-step", "2-step"] {
        assert!(sets[set]["frechet_distance"].is_number(), "{set}: {sets:#}");
        // Numbers of captions are not classes.
        assert!(sets[set]["class_agreement"].is_null(), "{set}: {sets:#}");
    }
    assert!(sets["reconstruction"]["class_agreement"].is_number());
}

#[test]
fn an_interrupted_training_on_captions_ends_with_the_same_bits() {
    let undisturbed = pictures("text_encoder: t5", 400);
    undisturbed.retort(&["run", "r.yaml"]).expect(0);
    let lab = || pictures("text_encoder: t5", 400);
    let disturbed = caught(|| interrupted(lab(), "teacher", "pretrain/loss", &[]));
    disturbed
        .retort(&["resume", "-v"])
        .expect(0)
        .saying(&["pretrain: continuing from step"]);
    let [a, b] = [&undisturbed, &disturbed].map(|lab| output(lab, "teacher").0);
    assert_eq!(a, b);
}

#[test]
fn training_captions_are_those_of_the_images() {
    // Precomputed features, one per picture.
    let lab = pictures("features: {file: own.npy}", 5);
    let features: Vec<f32> = (0..12 * 12 * 6).map(|i| (i % 7) as f32 - 3.5).collect();
    write_npy(&lab.dir.path().join("own.npy"), &[12, 12, 6], &features);
    lab.retort(&["run", "r.yaml"]).expect(0);
    write_npy(&lab.dir.path().join("own.npy"), &[6, 12, 12], &features);
    lab.retort(&["run", "r.yaml"])
        .expect(100)
        .saying(&["features of 6 captions for 12 images"]);

    let lab = pictures("text_encoder: t5", 5);
    let table = lab.dir.path().join("mix/metadata.jsonl");
    let text = std::fs::read_to_string(&table).unwrap();
    std::fs::write(&table, text.replacen("caption", "remark", 1)).unwrap();
    lab.retort(&["run", "r.yaml"])
        .expect(100)
        .saying(&["1 of 12 images have no caption, image 0 is the first"]);

    for (captions, expected) in [
        (
            "family: var\n    text_encoder: t5",
            "teachers of `family: var` know classes alone",
        ),
        (
            "text_encoder: t5\n    features: {file: features.npy}",
            "keep one of `text_encoder` and `features`",
        ),
    ] {
        let lab = pictures(captions, 5);
        lab.retort(&["validate", "r.yaml"])
            .expect(3)
            .saying(&[expected]);
    }
}
