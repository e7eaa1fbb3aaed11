//! Real-world images in the real stages: every format and size, prepared once or read in place, damaged, or with wrong classes.

use std::fs;
use std::path::{Path, PathBuf};

use crate::lab::Lab;
use crate::training::{output, points};

/// The start of every recipe here.
const HEAD: &str = "version: 1\nseed: 3\nbackend: candle\nstages:\n";

/// A tokenizer with a few steps on DATA.
const CODES: &str = "
  codes:
    kind: tokenizer
    data: DATA
    codebook_size: 8
    codebook_dim: 4
    channels: 8
    z_channels: 8
    train: {steps: 4, batch: 8}
";

fn lab(stages: &str, data: &str) -> Lab {
    let lab = Lab::new(&[]);
    write(&lab, stages, data);
    lab
}

fn write(lab: &Lab, stages: &str, data: &str) {
    let text = format!("{HEAD}{stages}").replace("DATA", data);
    fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
}

fn format_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../plugins/engine/fixtures/images/formats")
        .join(name)
}

/// Two classes of small images of every format.
pub fn every_format(dir: &Path) {
    let classes = [
        (
            "cats",
            &[
                "rgb.png",
                "rgba.png",
                "grey.jpg",
                "cmyk.jpg",
                "turned-6.jpg",
                "progressive.jpg",
            ],
        ),
        (
            "dogs",
            &[
                "lossless.webp",
                "frames.gif",
                "rgb.bmp",
                "packed.tiff",
                "palette-clear.png",
                "sixteen.png",
            ],
        ),
    ];
    for (class, files) in classes {
        fs::create_dir_all(dir.join(class)).unwrap();
        for file in files {
            fs::copy(format_file(file), dir.join(class).join(file)).unwrap();
        }
    }
}

#[test]
fn prepared_images_train_the_same_networks() {
    let stages = "
  pictures: {kind: images, data: {folder: mix, size: 16, fit: contain}}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: OTHER
    width: 16
    depth: 1
    heads: 2
    train: {steps: 4, batch: 8}
  eye: {kind: classifier, data: DATA, features: 8, train: {steps: 4, batch: 8}}
  drawn: {kind: sample, count: 4, sampler: {kind: teacher, teacher: teacher}}
  judged: {kind: evaluate, data: OTHER, classifier: eye, samples: {drawn: drawn}}
";
    let stages = format!("{CODES}{stages}");
    let prepared = lab(
        &stages.replace("OTHER", "pictures"),
        "{images: pictures, crop: 12, flip: true}",
    );
    let prepared_whole = stages.replace("OTHER", "{images: pictures, crop: 12}");
    write(
        &prepared,
        &prepared_whole,
        "{images: pictures, crop: 12, flip: true}",
    );
    every_format(&prepared.dir.path().join("mix"));
    // The middle and the four corners.
    prepared
        .retort(&["run", "r.yaml", "-v"])
        .expect(0)
        .saying(&["teacher: tokens of 12 images, in 5 views each"]);
    let picture = |crop: &str| format!("{{folder: mix, size: 16, fit: contain, {crop}}}");
    let mut apart = stages
        .replace("OTHER", &picture("crop: 12"))
        .replace("DATA", &picture("crop: 12, flip: true"));
    // Stages with the same options would read the output of `pictures`.
    for folder in ["./mix", "mix/", "./mix/", "././mix"] {
        let other = format!("{{folder: {folder}, size: 16, fit: contain, crop");
        apart = apart.replacen("{folder: mix, size: 16, fit: contain, crop", &other, 1);
    }
    let in_place = lab(&apart, "");
    every_format(&in_place.dir.path().join("mix"));
    in_place.retort(&["run", "r.yaml"]).expect(0);
    for stage in ["codes", "teacher", "eye", "pictures", "judged"] {
        assert_eq!(
            output(&prepared, stage).0,
            output(&in_place, stage).0,
            "{stage}"
        );
    }
    let pictures = output(&prepared, "pictures").1;
    let manifest = fs::read_to_string(pictures.join("manifest.jsonl")).unwrap();
    assert_eq!(manifest.lines().count(), 12);
    assert!(
        manifest.contains(r#""file":"dogs/frames.gif","label":1"#),
        "{manifest}"
    );
    let described = fs::read_to_string(pictures.join("images.json")).unwrap();
    assert!(
        described.contains("\"cats\",") && described.contains("\"channels\": 3"),
        "{described}"
    );
    assert!(!points(&prepared, "codes", "tokenizer/data_wait").is_empty());
    // Another seed augments them differently.
    prepared
        .retort(&["run", "r.yaml", "--set", "eye.seed=9"])
        .expect(0);
    assert_ne!(output(&prepared, "eye").0, output(&in_place, "eye").0);
}

/// A classifier on the folder `mix`, which `path` names.
fn eye_on(path: &str) -> String {
    format!(
        "  eye: {{kind: classifier, data: {{folder: {path}, size: 16, flip: true}}, features: 8, \
         train: {{steps: 4, batch: 8}}}}\n"
    )
}

#[test]
fn stages_with_the_same_data_decode_it_once() {
    let data = "{folder: mix, size: 16}";
    let decoded = "RGB, classes: 2";
    let apart = lab(&format!("{CODES}{}", eye_on("./mix")), data);
    every_format(&apart.dir.path().join("mix"));
    let said = apart.retort(&["run", "r.yaml", "-v"]).expect(0);
    assert_eq!(said.stderr.matches(decoded).count(), 2, "{}", said.stderr);

    let lab = lab(CODES, data);
    every_format(&lab.dir.path().join("mix"));
    assert_eq!(lab.outcomes(&[]), ["codes ran"]);
    write(&lab, &format!("{CODES}{}", eye_on("mix")), data);
    let planned = lab.retort(&["plan", "r.yaml"]).expect(0);
    assert!(
        planned.stdout.contains("images-of-codes"),
        "{}",
        planned.stdout
    );
    let said = lab.retort(&["run", "r.yaml", "-v"]).expect(0);
    assert_eq!(said.stderr.matches(decoded).count(), 1, "{}", said.stderr);
    said.saying(&["`images-of-codes` prepares the data of `codes` and `eye` once"]);
    // Another stage with the same data is no reason to train a network again.
    let latest = lab.retort(&["runs", "show", "latest", "--json"]).expect(0);
    let stages = latest.json()["stages"].clone();
    let codes = stages
        .as_array()
        .unwrap()
        .iter()
        .find(|stage| stage["name"] == "codes");
    assert!(!codes.unwrap()["reused_from"].is_null(), "{stages:#}");
    let all = |first: &str| {
        let rest = ["codes reused", "eye reused"].map(str::to_owned);
        [vec![format!("images-of-codes {first}")], rest.to_vec()].concat()
    };
    assert_eq!(lab.outcomes(&[]), all("reused"));
    for stage in ["codes", "eye"] {
        assert_eq!(output(&lab, stage).0, output(&apart, stage).0, "{stage}");
    }
    let prepared = output(&lab, "images-of-codes").1;
    assert!(prepared.join("images.json").exists());
    assert_eq!(lab.outcomes(&["--force=images-of-codes"]), all("ran"));

    // A file that cannot be read is found before any network is trained.
    fs::write(lab.dir.path().join("mix/cats/cut.png"), "").unwrap();
    let said = lab.retort(&["run", "r.yaml"]);
    assert_ne!(said.code, Some(0));
    said.saying(&["images-of-codes", "cats/cut.png", "skip_damaged: true"]);
}

/// All stages on images of 12 x 20, and what is impossible with them.
#[test]
fn images_need_not_be_squares() {
    let stages = "
  pictures: {kind: images, data: {folder: mix, size: [12, 20]}}
  eye: {kind: classifier, data: pictures, features: 8, train: {steps: 4, batch: 8}}
  teacher:
    kind: pretrain
    tokenizer: codes
    data: {images: pictures, flip: true}
    width: 16
    depth: 1
    heads: 2
    train: {steps: 4, batch: 8}
  pairs: {kind: trajectories, teacher: teacher, count: 64}
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0, 20]
    split: 30
    perceptual: {kind: classifier, weight: 1.0, classifier: eye}
    train: {steps: 4, batch: 8}
  drawn: {kind: sample, count: 6, npz: true, sampler: {kind: teacher, teacher: teacher}}
  small: {kind: sample, count: 6, resize: [6, 10], npz: true, sampler: {kind: student, student: student, timesteps: [0, 20]}}
  judged: {kind: evaluate, data: pictures, classifier: eye, tokenizers: {codes: codes}, samples: {drawn: drawn}}
";
    let codes = CODES
        .replace("DATA", "{images: pictures, flip: true}")
        .replace(
            "codebook_size: 8",
            "multipliers: [1, 2]\n    perceptual: {kind: classifier, classifier: eye, maps: true, weight: 0.1}\n    \
             adversarial: {layers: 2, start: 2}\n    codebook_size: 8",
        );
    let lab = lab(&format!("{codes}{stages}"), "");
    every_format(&lab.dir.path().join("mix"));
    lab.retort(&["run", "r.yaml"]).expect(0);
    for (stage, height, width) in [("drawn", 12, 20), ("small", 6, 10)] {
        let dir = output(&lab, stage).1;
        let manifest = fs::read_to_string(dir.join("manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
        assert_eq!(manifest["image"], serde_json::json!([3, height, width]));
        // 6 x 10 tokens.
        assert_eq!(manifest["tokens"], 60);
    }
    let config = output(&lab, "student").1.join("config.json");
    let config = fs::read_to_string(config).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        config["tokenizer"]["image_size"],
        serde_json::json!([12, 20])
    );
    assert_eq!(config["network"]["side"], serde_json::json!([6, 10]));
    // VAR's scales are square.
    let scales = codes.replace("z_channels: 8", "family: var\n    scales: [1, 2, 6]");
    write(&lab, &format!("{scales}{stages}"), "");
    let until = ["run", "r.yaml", "--until", "codes"];
    lab.retort(&until).expect(100).saying(&[
        "images of 12 x 20: the scales of `family: var` are squares",
        "size: 20",
    ]);
}

#[test]
fn damaged_files_are_told_at_once_before_anything_is_trained() {
    let lab = lab(CODES, "{folder: mix, size: 16}");
    let mix = lab.dir.path().join("mix");
    every_format(&mix);
    let whole = fs::read(mix.join("cats/rgb.png")).unwrap();
    fs::write(mix.join("cats/cut.png"), &whole[..60]).unwrap();
    fs::write(mix.join("dogs/empty.webp"), "").unwrap();
    let jpeg = fs::read(mix.join("cats/progressive.jpg")).unwrap();
    fs::write(mix.join("dogs/half.jpg"), &jpeg[..jpeg.len() / 2]).unwrap();
    fs::write(
        mix.join("dogs/notes.txt"),
        "not an image, and none promised",
    )
    .unwrap();
    let said = lab.retort(&["run", "r.yaml"]);
    assert_ne!(said.code, Some(0));
    let said = said.saying(&[
        "3 of 15 images are damaged",
        "cats/cut.png",
        "dogs/empty.webp",
        "dogs/half.jpg: a truncated JPEG",
        "skip_damaged: true",
    ]);
    assert!(!said.stderr.contains("panicked"));
    let lenient = ["run", "r.yaml", "--set", "codes.data.skip_damaged=true"];
    lab.retort(&lenient).expect(0);
    let said = lab.retort(&["log", "latest"]).expect(0);
    let log = format!("{}{}", said.stdout, said.stderr);
    assert!(
        log.contains("3 damaged images were left out") && log.contains(".txt 1"),
        "{log}"
    );
}

#[test]
fn the_log_counts_the_damaged_files_that_it_does_not_name() {
    let stage = "  pictures: {kind: images, data: {folder: mix, size: 16, skip_damaged: true}}\n";
    let lab = lab(stage, "");
    let mix = lab.dir.path().join("mix");
    every_format(&mix);
    for number in 0..23 {
        fs::write(mix.join(format!("cats/{number}.png")), "").unwrap();
    }
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    assert_eq!(said.stderr.matches("found an empty file").count(), 20);
    said.saying(&["left out: 3 more; manifest.jsonl beside the images lists all 23"]);
    let manifest = fs::read_to_string(output(&lab, "pictures").1.join("manifest.jsonl")).unwrap();
    assert_eq!(manifest.matches("\"damaged\":").count(), 23);
}

#[test]
fn what_cannot_be_meant_is_refused_with_what_to_do() {
    let lab = lab(CODES, "{folder: mix}");
    let mix = lab.dir.path().join("mix");
    every_format(&mix);
    lab.retort(&["run", "r.yaml"]).saying(&[
        "images of 2 sizes",
        "12 x 16 (11)",
        "16 x 12 (1)",
        "size: [12, 16]",
    ]);
    let set = |value: &str| lab.retort(&["run", "r.yaml", "--set", value]);
    set("codes.data.size=[12, 15]")
        .saying(&["images of 12 x 15: expected sides that are a multiple of 2"]);
    fs::create_dir(mix.join("0")).unwrap();
    fs::rename(mix.join("cats"), mix.join("00")).unwrap();
    fs::copy(format_file("rgb.png"), mix.join("0/a.png")).unwrap();
    fs::rename(mix.join("dogs"), mix.join("1")).unwrap();
    set("codes.data.size=16").saying(&["folders `0` and `00` both mean class 0"]);
    fs::remove_dir_all(mix.join("00")).unwrap();
    fs::create_dir(mix.join("2")).unwrap();
    set("codes.data.size=16").saying(&["mix/2: expected image files", "found none"]);
    // An option of another source is not silently ignored.
    set("codes.data.max=3").saying(&["`max` belongs to `csv` or `arrays`, not to `folder`"]);
}

#[test]
fn one_class_and_one_image_without_an_ending_are_enough() {
    let lab = lab(CODES, "{folder: flat}");
    let dir = lab.dir.path();
    fs::create_dir_all(dir.join("flat")).unwrap();
    fs::copy(format_file("rgb.png"), dir.join("flat/one")).unwrap();
    lab.retort(&["run", "r.yaml", "--set", "codes.data.size=16"])
        .expect(0);
    fs::copy(format_file("grey.png"), dir.join("flat/b.png")).unwrap();
    lab.retort(&[
        "run",
        "r.yaml",
        "--set",
        "codes.data={folder: flat, size: 16, channels: 1}",
    ])
    .expect(0);
}

#[test]
fn what_is_no_image_beside_images_decides_nothing() {
    let lab = lab(CODES, "{folder: img, size: 8}");
    let folder = lab.dir.path().join("img");
    every_format(&folder);
    lab.run(&[]).expect(0);
    for name in ["README.txt", "LICENSE", "cats/notes.txt"] {
        fs::write(folder.join(name), "about these images").unwrap();
    }
    assert_eq!(lab.outcomes(&[]), ["codes reused"]);
    let images = fs::read_dir(folder.join("cats")).unwrap().flatten();
    let some = images.map(|entry| entry.path()).find(|path| {
        let ending = path.extension().unwrap_or_default();
        ending == "png"
    });
    // The content alone identifies an image.
    fs::copy(some.unwrap(), folder.join("cats/one-more")).unwrap();
    assert_eq!(lab.outcomes(&[]), ["codes ran"]);
}
