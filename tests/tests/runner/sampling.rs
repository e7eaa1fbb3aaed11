//! Sampling in shards: the same bytes however the work is divided, the remains of an interruption, parts from several machines,
//! and memory that does not grow with the number of sampled or evaluated images.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use retort_engine::samples::Samples;
use retort_engine::weights::CheckpointWeights;
use retort_tests::memory;

use crate::lab::{Lab, Running, signal_process, wait_until_gone};
use crate::training::{killed_among_shards, lab, output, shards};

const KILL: i32 = 9;

/// A sampling stage that takes some seconds: eighty shards.
const MANY: &str = "
  pairs: {kind: sample, sampler: {kind: flow, teacher: teacher}, count: 20000, shard_size: 250, batch: 125, npz: true}
";

/// Labels and images of a set.
fn everything(dir: &Path) -> (Vec<u32>, Vec<f32>) {
    let samples = Samples::open(dir).unwrap();
    let images = samples.images(0, samples.len()).unwrap();
    (samples.labels, images)
}

fn shard(dir: &Path) -> CheckpointWeights {
    CheckpointWeights::open(&dir.join("shard-000000000.safetensors"), None).unwrap()
}

#[test]
fn workers_batches_and_shards_do_not_change_a_sample() {
    let lab = lab("
  wide: {kind: sample, sampler: {kind: flow, teacher: teacher}, seed: 3, count: 301, npz: true, png: true}
  narrow: {kind: sample, sampler: {kind: flow, teacher: teacher}, seed: 3, count: 301, batch: 7, shard_size: 100, npz: true}
  drawn: {kind: sample, sampler: {kind: teacher, teacher: teacher}, seed: 3, count: 301}
  drawn-apart: {kind: sample, sampler: {kind: teacher, teacher: teacher}, seed: 3, count: 301, batch: 64, shard_size: 33}
");
    lab.retort(&["run", "r.yaml"]).expect(0);
    let dir = |stage: &str| output(&lab, stage).1;
    assert_eq!(everything(&dir("wide")), everything(&dir("narrow")));
    assert_eq!(everything(&dir("drawn")), everything(&dir("drawn-apart")));
    let read = |stage: &str, file: &str| std::fs::read(dir(stage).join(file)).unwrap();
    for file in ["samples.npz", "grid.png"] {
        assert_eq!(read("wide", file), read("narrow", file), "{file}");
    }
    assert_eq!(
        std::fs::read_dir(dir("wide").join("png")).unwrap().count(),
        301
    );
    assert!(dir("wide").join("png/000300-0.png").is_file());

    // The number of workers changes neither the digest nor the bytes.
    let alone = output(&lab, "narrow").0;
    let divided = ["--set", "narrow.workers=3"];
    assert!(lab.outcomes(&divided).contains(&"narrow reused".to_owned()));
    lab.run(&[&divided, ["--force=narrow"].as_slice()].concat())
        .expect(0);
    assert_eq!(output(&lab, "narrow").0, alone);
}

#[test]
fn a_killed_run_loses_the_open_shard_at_most() {
    let undisturbed = lab(MANY);
    undisturbed.retort(&["run", "r.yaml"]).expect(0);
    let (disturbed, before) = killed_among_shards(MANY, 4);
    disturbed.retort(&["resume"]).expect(0);
    let hash = crate::training::output_with(&disturbed, &before);
    assert_eq!(hash, output(&undisturbed, "pairs").0);
    assert_eq!(disturbed.entries("work"), [""; 0]);

    // Bytes on the disk: the images, and the requested archive.
    let dir = output(&disturbed, "pairs").1;
    let shards = std::fs::read_dir(&dir).unwrap().flatten();
    let bytes: u64 = shards
        .filter(|entry| entry.file_name().to_str().unwrap().starts_with("shard"))
        .map(|entry| entry.metadata().unwrap().len())
        .sum();
    let pixels = 20_000 * 8 * 8;
    assert!(
        bytes * 10 <= pixels * 11,
        "{bytes} bytes for {pixels} pixels"
    );
}

#[test]
fn parts_of_several_machines_make_the_whole() {
    let stage =
        "kind: sample, sampler: {kind: flow, teacher: teacher}, seed: 3, count: 60, shard_size: 10";
    let lab = lab(&format!(
        "
  whole: {{{stage}}}
  head: {{{stage}, range: [0, 25]}}
  tail: {{{stage}, range: [25, 60], npz: true, png: true}}
  other: {{{stage}, range: [25, 60], images: f32}}
  judged: {{kind: evaluate, data: '${{params.data}}', samples: {{part: head}}}}
"
    ));
    lab.run(&[])
        .expect(100)
        .saying(&["samples 25..60 are missing of 60", "`range`"]);
    let place = |stage: &str| -> PathBuf { output(&lab, stage).1 };
    let (whole, head, tail, other) = (place("whole"), place("head"), place("tail"), place("other"));
    assert!(
        tail.join("png/000025-5.png").is_file(),
        "numbers are those of the whole"
    );
    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    let with = |parts: &[&Path]| {
        let parts: Vec<&str> = parts.iter().map(|p| p.to_str().unwrap()).collect();
        let parts = parts.join(", ");
        std::fs::write(
            &recipe,
            format!("{text}  joined: {{{stage}, parts: [{parts}]}}\n"),
        )
        .unwrap();
        lab.run(&["--until", "joined"])
    };
    with(&[&head, &tail]).expect(0);
    assert_eq!(everything(&place("joined")), everything(&whole));
    with(&[&head, &other])
        .expect(100)
        .saying(&["this part belongs to another set: kept"]);
    with(&[&head, &head.join("..")])
        .expect(100)
        .saying(&["manifest.json"]);
}

#[test]
fn what_is_kept_is_an_option() {
    let lab = lab("
  bytes: {kind: sample, sampler: {kind: flow, teacher: teacher}, seed: 3, count: 40}
  floats: {kind: sample, sampler: {kind: flow, teacher: teacher}, seed: 3, count: 40, images: f32, latents: true, tokens: true}
  vectors: {kind: sample, sampler: {kind: flow, teacher: teacher}, seed: 3, count: 40, images: none, tokens: true}
  judged: {kind: evaluate, data: '${params.data}', samples: {none: vectors}}
");
    lab.run(&[]).expect(100).saying(&["`images: none`"]);
    let dir = |stage: &str| output(&lab, stage).1;
    let (bytes, floats, vectors) = (dir("bytes"), dir("floats"), dir("vectors"));
    let names = |dir: &Path| -> Vec<String> {
        let stored = shard(dir);
        let mut names: Vec<String> = stored.shapes().map(|(name, _)| name.to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&bytes), ["images", "labels"]);
    assert_eq!(names(&floats), ["images", "labels", "latents", "tokens"]);
    assert_eq!(names(&vectors), ["labels", "tokens"]);
    let exact = everything(&floats).1;
    let rounded: Vec<f32> = exact.iter().map(|x| (x * 255.0).round() / 255.0).collect();
    assert!(exact != rounded, "the case tells nothing");
    assert_eq!(everything(&bytes).1, rounded);
    assert_eq!(
        shard(&floats).indices("tokens").unwrap(),
        shard(&vectors).indices("tokens").unwrap()
    );
    assert!(!vectors.join("grid.png").exists());
    let refused = |change: &[&str], expected: &str| {
        let changes: Vec<&str> = change.iter().flat_map(|c| ["--set", c]).collect();
        lab.retort(&[&["validate", "r.yaml"], changes.as_slice()].concat())
            .expect(3)
            .saying(&[expected]);
    };
    refused(&["vectors.npz=true"], "`images: none` keeps no images");
    refused(&["vectors.tokens=false"], "nothing is kept");
    refused(&["bytes.range=[30, 41]"], "range [30, 41]");
}

/// The peak memory of the worker of `many`, in kB, for this many images of 64 x 64.
fn peak(lab: &Lab, count: usize) -> u64 {
    lab.run(&["--set", &format!("many.count={count}")])
        .expect(0);
    lab.attempt("many").usage.max_rss.unwrap() / 1024
}

/// A worker's peak memory, in kB, until it ended or the check was over.
fn peak_while(worker: u32, mut looks: impl FnMut() -> bool) -> u64 {
    let mut peak = 0;
    while let Some(kib) = memory::peak_of(worker) {
        peak = kib as u64;
        if !looks() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(
        peak > 10_000,
        "{peak} KiB is no worker that was seen at work"
    );
    peak
}

/// A practically random network for images of 64 x 64, and a stage that samples from it.
fn large_images() -> Lab {
    let lab = Lab::new(&[]);
    let pixel = |i: usize| ((i * 2_654_435_761) >> 7) & 255;
    let row = |r: usize| {
        let pixels = (0..64 * 64).map(|i| format!("{},", pixel(r * 4096 + i)));
        format!("{}{}\n", pixels.collect::<String>(), r % 4)
    };
    let rows: String = (0..20).map(row).collect();
    std::fs::write(lab.dir.path().join("noise.csv"), rows).unwrap();
    let recipe = "
version: 1
backend: candle
device: cpu
params:
  data: {csv: noise.csv, height: 64, width: 64, max: 255}
stages:
  codes:
    kind: tokenizer
    family: var
    data: ${params.data}
    codebook_size: 16
    codebook_dim: 4
    channels: 8
    multipliers: [1, 1, 1, 1, 1]
    scales: [1, 2, 4]
    train: {steps: 1, batch: 4}
  teacher:
    kind: pretrain
    family: var
    tokenizer: codes
    data: ${params.data}
    width: 32
    depth: 2
    heads: 2
    train: {steps: 1, batch: 4}
  many:
    kind: sample
    sampler: {kind: teacher, teacher: teacher}
    count: 100
    batch: 50
    shard_size: 200
";
    std::fs::write(lab.dir.path().join("r.yaml"), recipe).unwrap();
    lab.retort(&["run", "r.yaml", "--until", "teacher"])
        .expect(0);
    lab
}

#[test]
fn memory_does_not_grow_with_the_number_of_images() {
    let lab = large_images();
    // 3,000 images are 37 MB as bytes and 147 MB as floats.
    let (few, many) = (peak(&lab, 600), peak(&lab, 3000));
    println!("600 images: {few} kB; 3,000: {many} kB");
    // The images themselves would be 73 MB more. Prefetching threads hold batches; how many depends on timing.
    assert!(
        few > 10_000 && many < few + 24_000,
        "{few} kB and {many} kB"
    );
}

/// The number of published evaluations: made at once, and by a run that is killed after some 30,000 and resumed.
#[test]
#[ignore = "many minutes: make test-long"]
fn memory_of_50000_images_is_that_of_2000() {
    let whole = large_images();
    let (few, many) = (peak(&whole, 2000), peak(&whole, 50_000));
    println!("2,000 images: {few} kB; 50,000: {many} kB");
    assert!(many * 10 <= few * 11, "{few} kB and {many} kB");

    let disturbed = large_images();
    let running = disturbed.start(&["--set", "many.count=50000"]);
    let worker = disturbed.wait_for_worker("many");
    let before = peak_while(worker, || shards(&disturbed).len() < 150);
    signal_process(running.child.id(), KILL);
    assert_eq!(running.end().code, None);
    wait_until_gone(worker);
    let kept = shards(&disturbed);
    assert!(
        (150..250).contains(&kept.len()),
        "killed after {} shards of 250",
        kept.len()
    );
    disturbed.retort(&["resume"]).expect(0);
    let (hash, dir) = output(&disturbed, "many");
    assert_eq!(hash, output(&whole, "many").0);
    for (path, time) in &kept {
        let same = dir.join(path.file_name().unwrap());
        let written = std::fs::metadata(&same).unwrap().modified().unwrap();
        assert_eq!(written, *time, "{} was made again", same.display());
    }
    let stage = disturbed.latest().unwrap().stages;
    let stage = stage.iter().find(|stage| stage.name == "many").unwrap();
    let after = stage.attempts.last().unwrap().usage.max_rss.unwrap() / 1024;
    println!(
        "50,000 images, killed after {}: {before} kB before it and {after} kB after it",
        kept.len() * 200
    );
    for peak in [before, after] {
        assert!(peak * 10 <= few * 11, "{few} kB and {peak} kB");
    }
}

/// Grey images of 176 x 176, 30,976 bytes each: 600 of them are 19 MB, 3,000 are 93 MB.
fn write_images(path: &Path, count: usize) {
    let mut file = retort_engine::numpy::header("|u1", &[count, 176, 176]);
    for i in 0..count * 176 * 176 {
        file.push((i.wrapping_mul(2_654_435_761) >> 13) as u8);
    }
    std::fs::write(path, file).unwrap();
}

#[test]
fn measuring_more_images_takes_no_more_memory() {
    let lab = Lab::new(&[]);
    let recipe = "
version: 1
backend: candle
device: cpu
stages:
  eye: {kind: classifier, data: {arrays: 600.npy, crop: 16}, features: 8, train: {steps: 1, batch: 4}}
  judged: {kind: evaluate, data: {arrays: 600.npy, crop: 16}, classifier: eye, save_statistics: true}
  pictures: {kind: images, data: {arrays: 3000.npy}}
  prepared: {kind: evaluate, data: {images: pictures, crop: 16}, classifier: eye, save_statistics: true}
";
    std::fs::write(lab.dir.path().join("r.yaml"), recipe).unwrap();
    for count in [600, 3000] {
        write_images(&lab.dir.path().join(format!("{count}.npy")), count);
    }
    let peak = |more: &[&str]| {
        lab.run(&[&["--until", "judged"], more].concat()).expect(0);
        lab.attempt("judged").usage.max_rss.unwrap() / 1024
    };
    let few = peak(&[]);
    let many = peak(&["--set", "judged.data.arrays=3000.npy"]);
    println!("600 images: {few} kB; 3,000: {many} kB");
    // The images themselves would be 74 MB more. How many threads work at the same time depends on timing.
    assert!(
        few > 10_000 && many < few + 24_000,
        "{few} kB and {many} kB"
    );
    // Its temporary copy is gone, and had the content of an `images` stage's output.
    assert_eq!(lab.entries("work"), [""; 0]);
    let judged = output(&lab, "judged").1;
    lab.run(&["--until", "prepared"]).expect(0);
    let prepared = output(&lab, "prepared").1;
    for file in ["evaluation.json", "statistics.npz"] {
        let [own, other] = [&judged, &prepared].map(|dir| std::fs::read(dir.join(file)).unwrap());
        assert!(own == other, "{file}");
    }
}

/// In six gigabytes of address space: plenty for these networks, but not for such batches.
#[test]
fn batches_that_do_not_fit_are_named_before_they_are_tried() {
    let most = "batch: 400000000, count: 400000000, shard_size: 400000000";
    let lab = lab(&format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 60}}
  student: {{kind: distill, teacher: teacher, trajectories: pairs, timesteps: [0], train: {{steps: 1, batch: 4}}}}
  trajectories: {{kind: trajectories, teacher: teacher, {most}}}
  flow: {{kind: sample, sampler: {{kind: flow, teacher: teacher}}, {most}}}
  passes: {{kind: sample, sampler: {{kind: student, student: student, timesteps: [0]}}, {most}, images: none, latents: true}}
  distill: {{kind: distill, teacher: teacher, trajectories: pairs, timesteps: [0], train: {{steps: 1, batch: 1000000}}}}
  again: {{kind: distill, teacher: teacher, trajectories: pairs, timesteps: [0], depth: 64, recompute: true, accumulate: 2,
    train: {{steps: 1, batch: 1000000}}}}
  eye: {{kind: classifier, data: '${{params.data}}', features: 4096, train: {{steps: 1, batch: 4}}}}
  few: {{kind: sample, sampler: {{kind: flow, teacher: teacher}}, count: 60}}
  features: {{kind: evaluate, data: {{arrays: half-a-million.npy}}, classifier: eye, samples: {{few: few}}}}
"
    ));
    let header = retort_engine::numpy::header("|u1", &[500_000, 8, 8]);
    let file = std::fs::File::create(lab.dir.path().join("half-a-million.npy")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &header, 0).unwrap();
    file.set_len(header.len() as u64 + 500_000 * 64).unwrap();
    let mut command = lab.command(&["run", "r.yaml", "--keep-going"]);
    let limit = libc::rlimit {
        rlim_cur: 6 << 30,
        rlim_max: 6 << 30,
    };
    // SAFETY: between fork and exec only an async-signal-safe function is called.
    unsafe {
        command.pre_exec(move || match libc::setrlimit(libc::RLIMIT_AS, &limit) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Running::new(child.spawn().unwrap())
        .end()
        .expect(100)
        .saying(&["r.yaml", "a batch of 400000000 needs at least", "are free"]);
    for (stage, pointer) in [
        ("trajectories", "/batch"),
        ("flow", "/batch"),
        ("passes", "/batch"),
        ("distill", "/train/batch"),
        ("again", "/train/batch"),
        ("features", "/neighbours"),
    ] {
        let failure = lab.attempt(stage).failure.unwrap();
        assert_eq!(failure.pointer.as_deref(), Some(pointer), "{stage}");
        assert!(failure.message.contains("of memory"), "{}", failure.message);
    }
}
