//! The published measuring networks in stages: files under their published names, with procedural weights.

use std::path::Path;

use retort_engine::arrays::Arrays;
use retort_engine::weights;
use retort_tests::{digits, golden};
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
fn inception_compares_with_images_and_statistics() {
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
    let digits = std::fs::read_to_string(digits::file()).unwrap();
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

    // The statistics give the same distances, but no figure that needs the images.
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

    // With other features than the network's, and with another preparation: detected before anything runs.
    for (setting, expected) in [
        ("again.dims=192", "of shape [64], expected [192]"),
        (
            "again.preparation=tensorflow",
            "were made with `preparation: pytorch`",
        ),
    ] {
        lab.retort(&["run", "r.yaml", "--set", setting])
            .expect(3)
            .saying(&["statistics.npz", expected]);
    }
}

/// From two classifiers with the same number of features.
#[test]
fn statistics_are_those_of_one_network() {
    let lab = lab("
  eye: {kind: classifier, data: '${params.data}', features: 8, train: {steps: 3, batch: 8}}
  other-eye: {kind: classifier, seed: 9, data: '${params.data}', features: 8, train: {steps: 3, batch: 8}}
  drawn: {kind: sample, count: 24, sampler: {kind: teacher, teacher: teacher}}
  judged: {kind: evaluate, data: '${params.data}', classifier: eye, neighbours: 0, save_statistics: true, samples: {drawn: drawn}}
");
    lab.retort(&["run", "r.yaml"]).expect(0);
    let first = output(&lab, "judged").1;
    let statistics = lab.dir.path().join("statistics.npz");
    std::fs::copy(first.join("statistics.npz"), statistics).unwrap();
    add(
        &lab,
        "
  again: {kind: evaluate, statistics: statistics.npz, classifier: eye, samples: {drawn: drawn}}
",
    );
    lab.retort(&["run", "r.yaml"]).expect(0);
    let again = output(&lab, "again").1;
    let [a, b] = [first, again].map(|dir| figures(&dir)["frechet_distance"].as_f64().unwrap());
    assert!((a / b - 1.0).abs() < 1e-9, "{a} and {b}");
    lab.retort(&["run", "r.yaml", "--set", "again.classifier=other-eye"])
        .expect(100)
        .saying(&["statistics.npz", "the features of another network"]);
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

    // The same digits at 16 x 16, each pixel four times; another level keeps the 16 tokens.
    let digits = std::fs::read_to_string(digits::file()).unwrap();
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
    let recipe = recipe.replace("z_channels: 8", "z_channels: 8, multipliers: [1, 1, 1]");
    std::fs::write(&path, recipe).unwrap();
    lab.retort(&["run", "r.yaml"]).expect(0);
    let values = points(&lab, "student", "distill/perceptual");
    assert!(
        values.last() < values.first() && values.iter().all(|x| *x > 0.0),
        "{values:?}"
    );
}

/// An array as NumPy pickles it for `torch.save`, protocol 2: bytes are written as text with one character per byte.
fn pickled(data: &[f64], shape: &[usize]) -> Vec<u8> {
    let text: String = data
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .map(char::from)
        .collect();
    let mut out = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85c_codecs\nencode\nX\x01\0\0\0bX\x06\0\0\0latin1\
        \x86R\x87R(K\x01"
        .to_vec();
    for &n in shape {
        out.push(b'J');
        out.extend((n as u32).to_le_bytes());
    }
    out.push(if shape.len() == 1 { 0x85 } else { 0x86 });
    out.extend(b"cnumpy\ndtype\nX\x02\0\0\0f8\x89\x88\x87R(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89c_codecs\nencode\nX");
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
    out.extend(b"X\x06\0\0\0latin1\x86Rtb");
    out
}

/// A file in the format of the paper authors' statistics: `m` and `s`.
fn write_statistic(path: &Path, from: &Path, dim: usize) {
    use std::io::Write;
    let arrays = Arrays::open(from).unwrap();
    let mut pickle = b"\x80\x02}(".to_vec();
    for (name, own, shape) in [("mu", "m", vec![dim]), ("sigma", "s", vec![dim, dim])] {
        let data = arrays.read(name, &shape).unwrap().unwrap();
        pickle.extend(b"X\x01\0\0\0");
        pickle.extend(own.as_bytes());
        pickle.extend(pickled(&data, &shape));
    }
    pickle.extend(b"u.");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let options =
        zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("statistic/data.pkl", options).unwrap();
    zip.write_all(&pickle).unwrap();
    zip.finish().unwrap();
}

/// The reference: images in a folder, ADM's array, the authors' statistics, another set of samples.
#[test]
fn real_images_are_read_as_people_have_them() {
    let lab = lab("
  drawn: {kind: sample, seed: 5, count: 10, png: true, npz: true, resize: 16, sampler: {kind: teacher, teacher: teacher}}
  other: {kind: sample, seed: 5, count: 10, resize: 16, sampler: {kind: flow, teacher: teacher}}
  sure: {kind: sample, seed: 5, count: 10, resize: 16, sampler: {kind: flow, teacher: teacher, distribution: {top_k: 1}}}
  apart: {kind: sample, seed: 6, count: 10, resize: 16, sampler: {kind: flow, teacher: teacher}}
  set:
    kind: evaluate
    real: drawn
    inception: inception.safetensors
    dims: 64
    splits: 100
    preparation: [pytorch, tensorflow]
    kernel: {subsets: 3, size: 8}
    lpips: {vgg: vgg.safetensors, linear: linear.safetensors, beside: other}
    samples: {drawn: drawn, other: other, sure: sure, apart: apart}
");
    for part in ["inception", "vgg", "linear"] {
        network(&lab, part);
    }
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    for text in [
        "n/a: inception score: at least 100",
        "other/tensorflow",
        "LPIPS",
        "passes",
    ] {
        assert!(said.stdout.contains(text), "{text} in {}", said.stdout);
    }
    let ways = check_sets(&report(&lab, "set"));
    check_other_forms(&lab, ways);
    check_authors_statistics(&lab, ways[0]);
}

/// The report of an `evaluate` stage.
fn report(lab: &Lab, stage: &str) -> Value {
    let dir = output(lab, stage).1;
    let text = std::fs::read_to_string(dir.join("evaluation.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Appends an `evaluate` stage against other real images.
fn add_evaluation(lab: &Lab, name: &str, real: &str) {
    let options = "inception: inception.safetensors, dims: 64, splits: 2, neighbours: 2";
    let samples = "samples: {drawn: drawn, other: other}";
    add(
        lab,
        &format!("\n  {name}: {{kind: evaluate, {real}, {options}, {samples}}}\n"),
    );
}

/// Returns the distance of `other` from the real images, by both preparations.
fn check_sets(report: &Value) -> [f64; 2] {
    let row = |name: &str| report["sets"][name].clone();
    let value = |name: &str, figure: &str| {
        let found = row(name)[figure].as_f64();
        found.unwrap_or_else(|| panic!("{figure} of {name} in {report:#}"))
    };
    // The same images, and different ones.
    assert!(value("drawn/pytorch", "frechet_distance") < 1e-6);
    assert!(value("other/pytorch", "frechet_distance") > 1e-3);
    let ways = ["other/pytorch", "other/tensorflow"].map(|name| value(name, "frechet_distance"));
    assert!(ways[0] != ways[1], "{ways:?}");
    assert!(value("other/pytorch", "kernel_distance") > value("drawn/pytorch", "kernel_distance"));
    // Only samples from the same noise can be compared image by image.
    assert!(value("sure/pytorch", "lpips") > 0.0);
    for (name, figure, expected) in [
        ("other/pytorch", "lpips", "it is the set"),
        (
            "drawn/pytorch",
            "lpips",
            "the images of drawn were not made from noise: a sampler of kind `teacher`",
        ),
        ("apart/pytorch", "lpips", "made from other noise than other"),
        ("other/pytorch", "inception_score", "at least 100"),
    ] {
        let reason = row(name)["not_available"][figure].clone();
        let reason = reason.as_str().unwrap_or_default();
        assert!(reason.contains(expected), "{figure} in {report:#}");
    }
    assert_eq!(row("other/pytorch")["passes"], 16);
    let kernel = serde_json::json!({"subsets": 3, "size": 8});
    assert_eq!(row("other/pytorch")["kernel"], kernel);
    for expected in [
        "nearest of 256 values",
        "pytorch: resized",
        "tensorflow: resized",
        "real images: decoded at 8 x 8, brought to 16 x 16",
        "sure: decoded at 8 x 8, brought to 16 x 16",
    ] {
        let pipeline = report["pipeline"].as_str().unwrap();
        assert!(pipeline.contains(expected), "{expected} in {pipeline}");
    }
    ways
}

/// The same images as a folder and as ADM's array; `ways` is the distance of `other`.
fn check_other_forms(lab: &Lab, ways: [f64; 2]) {
    let drawn = output(lab, "drawn").1;
    let folder = lab.dir.path().join("real/0");
    std::fs::create_dir_all(&folder).unwrap();
    for image in std::fs::read_dir(drawn.join("png")).unwrap() {
        let image = image.unwrap();
        std::fs::copy(image.path(), folder.join(image.file_name())).unwrap();
    }
    std::fs::copy(drawn.join("samples.npz"), lab.dir.path().join("adm.npz")).unwrap();
    add_evaluation(
        lab,
        "folder",
        "data: {folder: real}, save_statistics: true, kernel: {}",
    );
    add_evaluation(lab, "adm", "statistics: adm.npz");
    // Each preparation of images separately.
    add_evaluation(
        lab,
        "both",
        "statistics: adm.npz, preparation: [pytorch, tensorflow]",
    );
    add_evaluation(
        lab,
        "smaller",
        "data: {folder: real, size: 8, fit: stretch}",
    );
    lab.retort(&["run", "r.yaml"])
        .expect(0)
        .saying(&["drawn: images of 16 x 16, real images of 8 x 8"]);
    let [folder, both, smaller] = ["folder", "both", "smaller"].map(|stage| report(lab, stage));
    // All samples together are one estimate.
    let other = &folder["sets"]["other"];
    assert_eq!(
        other["kernel"],
        serde_json::json!({"subsets": 1, "size": 10})
    );
    assert!(other["kernel_distance"].is_number(), "{other:#}");
    assert!(other["kernel_distance_deviation"].is_null(), "{other:#}");
    for (way, expected) in ["pytorch", "tensorflow"].into_iter().zip(ways) {
        let found = &both["sets"][format!("other/{way}")]["frechet_distance"];
        let found = found.as_f64().unwrap();
        assert!(
            (found / expected - 1.0).abs() < 1e-6,
            "{way}: {found} and {expected}"
        );
    }
    let pipeline = smaller["pipeline"].as_str().unwrap();
    let sized = "real images: brought to 8 x 8 by `fit: stretch` and `filter: bicubic`";
    assert!(pipeline.contains(sized), "{pipeline}");
}

/// The statistics of the folder in the authors' form; `expected` is the distance of `other`.
fn check_authors_statistics(lab: &Lab, expected: f64) {
    let statistics = output(lab, "folder").1.join("statistics.npz");
    write_statistic(&lab.dir.path().join("statistic.pth"), &statistics, 64);
    add_evaluation(lab, "authors", "statistics: statistic.pth");
    lab.retort(&["run", "r.yaml"]).expect(0);
    for stage in ["folder", "adm", "authors"] {
        let all = report(lab, stage);
        let other = &all["sets"]["other"];
        let distance = other["frechet_distance"].as_f64().unwrap();
        assert!(
            (distance / expected - 1.0).abs() < 1e-6,
            "{stage}: {distance} and {expected}"
        );
        // Figures of single images cannot be computed from statistics.
        let precision = other["precision"].is_number();
        assert_eq!(precision, stage != "authors", "{stage}: {other:#}");
        let spatial = other["spatial_frechet_distance"].is_number();
        assert_eq!(spatial, stage != "authors", "{stage}: {other:#}");
    }
}
