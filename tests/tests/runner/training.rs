//! Small runs of the real stages and plugin: the remains of interruptions, results independent of batches and threads, and
//! which samplers and losses run to their end.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use retort::store::AttemptState;
use retort_engine::dataset::Dataset;
use retort_tests::digits::Digits;
use serde_json::{Value, json};

use crate::lab::{Lab, wait_for, wait_until_gone};

const INTERRUPT: i32 = 2;
const KILL: i32 = 9;

/// A tokenizer and a teacher that train in seconds, the basis of the tests below.
const TEACHER: Digits<'_> = Digits {
    backend: "candle",
    top: "seed: 3",
    codes: "train: {steps: 40, batch: 32}",
    teacher: "width: 32, depth: 2, heads: 2, train: {steps: 60, batch: 32, ema: 0.9}",
};

/// A dataset and a student on top of it.
pub const STUDENT: &str = "
  pairs:
    kind: trajectories
    teacher: teacher
    count: 4000
    shard_size: 250
    batch: 125
    distribution: {guidance: 1.5}
  student:
    kind: distill
    teacher: teacher
    trajectories: pairs
    depth: 4
    timesteps: [0, 6]
    train: {steps: 400, batch: 32, ema: 0.99, muon: {}}
";

pub fn lab(stages: &str) -> Lab {
    let lab = Lab::new(&[]);
    let text = TEACHER.recipe(stages);
    std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    lab
}

/// The hash and path of a stage's output in the newest run.
pub fn output(lab: &Lab, stage: &str) -> (String, PathBuf) {
    let said = lab
        .retort(&["artifacts", "list", "latest", "--json"])
        .expect(0);
    let all = said.json();
    let found = all
        .as_array()
        .unwrap()
        .iter()
        .find(|artifact| artifact["stage"] == stage);
    let found = found.unwrap_or_else(|| panic!("no output of {stage} in {all:#}"));
    (
        found["hash"].as_str().unwrap().to_owned(),
        found["path"].as_str().unwrap().into(),
    )
}

/// The last value of a series in the newest run; None before its first point.
fn last(lab: &Lab, stage: &str, series: &str) -> Option<Value> {
    let said = lab.retort(&["metrics", "latest", "--stage", stage, "--json"]);
    let all: Value = serde_json::from_str(&said.stdout).ok()?;
    let found = all
        .as_array()?
        .iter()
        .find(|known| known["series"] == series)?;
    Some(found["last"].clone())
}

/// The result of disturbing a running stage. On a busy machine the stage may end before that; then everything is tried again
/// from the beginning.
pub fn caught<T>(disturb: impl Fn() -> Option<T>) -> T {
    let found = (0..10).find_map(|_| disturb());
    found.expect("a stage that is disturbed before it ends")
}

/// Runs a lab's recipe and interrupts it once a training has a point of this series; None if the training had ended.
pub fn interrupted(lab: Lab, stage: &str, series: &str, arguments: &[&str]) -> Option<Lab> {
    let running = lab.start(arguments);
    lab.wait_for_worker(stage);
    wait_for("a point of the series", || last(&lab, stage, series));
    running.signal(INTERRUPT);
    let said = running.end();
    if lab.attempt(stage).state == AttemptState::Succeeded {
        return None;
    }
    said.expect(130).saying(&["retort resume"]);
    Some(lab)
}

#[test]
fn a_training_that_was_interrupted_ends_with_the_same_bits() {
    let undisturbed = lab(STUDENT);
    undisturbed.retort(&["run", "r.yaml"]).expect(0);

    let disturbed = caught(|| interrupted(lab(STUDENT), "student", "distill/loss", &[]));
    disturbed
        .retort(&["resume", "-v"])
        .expect(0)
        .saying(&["distill: continuing from step"]);

    assert_eq!(
        output(&disturbed, "student").0,
        output(&undisturbed, "student").0
    );
}

/// The values of a series of the newest run.
pub fn points(lab: &Lab, stage: &str, series: &str) -> Vec<f64> {
    let said = lab
        .retort(&["metrics", "latest", series, "--stage", stage, "--json"])
        .expect(0);
    let points = said.json();
    points
        .as_array()
        .unwrap()
        .iter()
        .map(|point| point["value"].as_f64().unwrap())
        .collect()
}

#[test]
fn held_out_losses_see_what_training_learns() {
    let lab = lab(STUDENT);
    lab.retort(&["run", "r.yaml"]).expect(0);
    let guessing = 16f64.ln();
    for (stage, series) in [
        ("teacher", "pretrain/held_out_loss"),
        ("student", "distill/held_out_loss"),
    ] {
        let losses = points(&lab, stage, series);
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(
            last < first && last < 0.97 * guessing,
            "{series}: {losses:?}, by guessing {guessing}"
        );
    }
}

#[test]
fn trajectories_lose_at_most_the_open_shard() {
    let recipe = STUDENT
        .replace("steps: 400", "steps: 1")
        .replace("count: 4000", "count: 20000");
    let undisturbed = lab(&recipe);
    undisturbed.retort(&["run", "r.yaml"]).expect(0);

    let (disturbed, before) = killed_among_shards(&recipe, 2);
    disturbed
        .retort(&["run", "r.yaml", "--until", "pairs"])
        .expect(0);
    let hash = output_with(&disturbed, &before);
    assert_eq!(hash, output(&undisturbed, "pairs").0);
}

/// Whether the stage `pairs` is still running when it has made this many shards.
pub fn makes_shards(lab: &Lab, count: usize) -> bool {
    wait_for("some shards", || {
        let works = lab.attempt("pairs").state == AttemptState::Running;
        let enough = shards(lab).len() >= count;
        (enough || !works).then_some(enough)
    })
}

/// Runs a recipe whose stage `pairs` makes eighty shards, and kills the runner at this many. Returns the remaining shards.
pub fn killed_among_shards(recipe: &str, count: usize) -> (Lab, Vec<(PathBuf, SystemTime)>) {
    caught(|| {
        let lab = lab(recipe);
        let running = lab.start(&[]);
        let worker = lab.wait_for_worker("pairs");
        makes_shards(&lab, count).then_some(())?;
        running.signal(KILL);
        let code = running.end().code;
        wait_until_gone(worker);
        let left = shards(&lab);
        (code.is_none() && (1..80).contains(&left.len())).then_some((lab, left))
    })
}

/// The shards that the running stages have made so far, with their times.
pub fn shards(lab: &Lab) -> Vec<(PathBuf, SystemTime)> {
    let work = lab.store_dir().join("work");
    let dirs = std::fs::read_dir(work).into_iter().flatten().flatten();
    let files = dirs.flat_map(|dir| {
        std::fs::read_dir(dir.path())
            .into_iter()
            .flatten()
            .flatten()
    });
    files
        .map(|file| file.path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("shard-") && name.ends_with(".safetensors")
        })
        .map(|path| (path.clone(), written(&path)))
        .collect()
}

fn written(path: &Path) -> SystemTime {
    std::fs::metadata(path).unwrap().modified().unwrap()
}

/// The hash of the output of `pairs`, which contains exactly these shards.
#[track_caller]
pub fn output_with(lab: &Lab, shards: &[(PathBuf, SystemTime)]) -> String {
    let (hash, dir) = output(lab, "pairs");
    for (path, time) in shards {
        let kept = dir.join(path.file_name().unwrap());
        assert_eq!(written(&kept), *time, "{} was made again", kept.display());
    }
    hash
}

#[test]
fn batches_shards_and_threads_do_not_change_a_trajectory() {
    // The same seed, or the noise would differ.
    let lab = lab("
  wide: {kind: trajectories, teacher: teacher, count: 601, seed: 3, batch: 500, threads: 2}
  narrow: {kind: trajectories, teacher: teacher, count: 601, seed: 3, batch: 7, shard_size: 100, threads: 1}
  other: {kind: trajectories, teacher: teacher, count: 601, seed: 3, batch: 64, shard_size: 333, threads: 2}
");
    lab.retort(&["run", "r.yaml"]).expect(0);
    let read = |stage| Dataset::open(&output(&lab, stage).1).unwrap();
    let wide = read("wide");
    for other in [read("narrow"), read("other")] {
        assert_eq!(everything(&wide), everything(&other));
    }
}

/// Labels and tokens of a dataset, and its last noise.
fn everything(dataset: &Dataset) -> (&[u32], Vec<u32>, Vec<f32>) {
    let tokens = (0..dataset.len()).flat_map(|i| dataset.tokens_of(i).unwrap());
    let noise = dataset.noise(dataset.len() - 1).unwrap();
    (&dataset.labels, tokens.collect(), noise)
}

/// The options of datasets that belong together.
const SIXTY_PAIRS: &str =
    "kind: trajectories, teacher: teacher, count: 60, seed: 3, distribution: {guidance: 1.5}";

#[test]
fn datasets_are_shown_checked_and_merged() {
    let lab = lab(&format!(
        "
  head: {{{SIXTY_PAIRS}, range: [0, 25], shard_size: 10}}
  tail: {{{SIXTY_PAIRS}, range: [25, 60]}}
  rest: {{{SIXTY_PAIRS}, range: [40, 60]}}
  others: {{{SIXTY_PAIRS}, range: [25, 60], solver_steps: 70}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    check_dataset_info(&lab);
    check_dataset_merge(&lab);
    // A stage adopts the merged folder without new work.
    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    let joined = format!("  joined: {{{SIXTY_PAIRS}, parts: [whole]}}\n");
    std::fs::write(&recipe, format!("{text}{joined}")).unwrap();
    lab.retort(&["run", "r.yaml"]).expect(0);
    let joined = Dataset::open(&output(&lab, "joined").1).unwrap();
    assert_eq!(joined.len(), 60);
    check_damaged_dataset(&lab);
    lab.retort(&["dataset", "info", "nowhere"]).expect(4);
    lab.retort(&["dataset", "info", "."])
        .expect(4)
        .saying(&["has no manifest.json"]);
}

fn dataset_info(lab: &Lab, reference: &str) -> Value {
    lab.retort(&["dataset", "info", reference, "--json"])
        .expect(0)
        .json()
}

fn check_dataset_info(lab: &Lab) {
    let head = dataset_info(lab, "latest/head");
    for (fact, value) in [
        ("pairs", json!(25)),
        ("of", json!(60)),
        ("samples", json!([[0, 25]])),
        ("missing", json!([[25, 60]])),
        ("ar_steps", json!(16)),
        ("tokens_a_pair", json!(16)),
        ("codes", json!(16)),
        ("code_dimension", json!(4)),
        ("classes", json!(10)),
        ("seed", json!(3)),
        ("guidance", json!(1.5)),
        ("token_type", json!("u8")),
        ("noise", json!("of the seed")),
        ("shards", json!(3)),
    ] {
        assert_eq!(head[fact], value, "{fact} of {head:#}");
    }
    assert_eq!(head["pairs_of_each"]["4"], 3);
    assert_eq!(head["pairs_of_each"]["5"], 2);
    lab.retort(&["dataset", "verify", "latest/head"])
        .expect(0)
        .saying(&[
            "25 pairs in 3 shards verified",
            "25..60 of 60 are missing here",
        ]);
}

/// Merges head and tail into the folder `whole`.
fn check_dataset_merge(lab: &Lab) {
    let dir = lab.dir.path();
    // Complete only if every sample occurs once, from one teacher and the same settings.
    for (parts, saying) in [
        (vec!["latest/head"], "samples 25..60 are missing of 60"),
        (
            vec!["latest/head", "latest/rest"],
            "`range: [25, 40]` makes the first of them",
        ),
        (
            vec!["latest/head", "latest/tail", "latest/rest"],
            "its samples 40..60 overlap with 25..60",
        ),
        (
            vec!["latest/head", "latest/others"],
            "solver_steps 70, expected 96",
        ),
    ] {
        let arguments = [&["dataset", "merge", "-o", "whole"], &parts[..]].concat();
        lab.retort(&arguments).expect(2).saying(&[saying]);
        assert!(!dir.join("whole").exists());
    }
    // Foreign files beside it do not count, whatever their names.
    let kept = ["whole.partial", ".whole", "whole.damaged"].map(|name| dir.join(name));
    for kept in &kept {
        std::fs::create_dir(kept).unwrap();
        std::fs::write(kept.join("precious"), "").unwrap();
    }
    let merge = [
        "dataset",
        "merge",
        "latest/tail",
        "latest/head",
        "-o",
        "whole",
    ];
    lab.retort(&merge)
        .expect(0)
        .saying(&["60 pairs in 4 shards of 2 parts"]);
    lab.retort(&merge)
        .expect(2)
        .saying(&["whole is there already"]);
    assert!(kept.iter().all(|kept| kept.join("precious").exists()));
    assert_eq!(dataset_info(lab, "whole")["missing"], json!([]));
    lab.retort(&["dataset", "verify", "whole"]).expect(0);
}

/// A damaged file of `whole` is named, with what to do.
fn check_damaged_dataset(lab: &Lab) {
    let dir = lab.dir.path();
    let shard = dir.join("whole/shard-000000010.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&shard, &bytes).unwrap();
    std::fs::write(
        dir.join("whole/shard-000000020.safetensors"),
        &bytes[..last],
    )
    .unwrap();
    let said = lab
        .retort(&["dataset", "verify", "whole", "--json"])
        .expect(1);
    let problems = said.json();
    assert_eq!(problems.as_array().unwrap().len(), 2, "{problems:#}");
    assert_eq!(problems[0]["file"], "shard-000000010.safetensors");
    assert_eq!(problems[0]["samples"], "10..20");
    assert!(
        problems[0]["problem"]
            .as_str()
            .unwrap()
            .contains("its content has changed")
    );
    said.saying(&["copy the file again"]);
    lab.retort(&["run", "r.yaml", "--force=joined"])
        .expect(100)
        .saying(&["shard-000000010.safetensors", "its content has changed"]);
}

#[test]
fn parts_of_a_batch_and_recomputation_change_no_student() {
    const STUDENT: &str = "kind: distill, teacher: teacher, trajectories: pairs, seed: 5, depth: 3, timesteps: [0, 6], split: 8, \
                           codebook_distance: 0.5, perceptual: {kind: l2, weight: 0.5}";
    let lab = lab(&format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 100}}
  whole: {{{STUDENT}, train: {{steps: 3, batch: 13}}}}
  again: {{{STUDENT}, recompute: true, train: {{steps: 3, batch: 13}}}}
  parts: {{{STUDENT}, recompute: true, accumulate: 4, train: {{steps: 3, batch: 13}}}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    assert_eq!(output(&lab, "whole").0, output(&lab, "again").0);
    for (series, tolerance) in [
        ("distill/loss", 1e-5),
        ("distill/cross_entropy", 1e-5),
        ("distill/codebook_distance", 1e-5),
        ("distill/perceptual", 1e-5),
        ("distill/gradient_norm", 1e-4),
    ] {
        let [whole, parts] = ["whole", "parts"].map(|stage| points(&lab, stage, series));
        assert!(whole.len() >= 2, "{series}: {whole:?}");
        for (a, b) in whole.iter().zip(&parts) {
            assert!(
                (a - b).abs() < tolerance * a.abs(),
                "{series}: {whole:?}, {parts:?}"
            );
        }
    }
    let wrong = format!("  wrong: {{{STUDENT}, accumulate: 14, train: {{steps: 3, batch: 13}}}}\n");
    let recipe = lab.dir.path().join("r.yaml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    std::fs::write(&recipe, format!("{text}{wrong}")).unwrap();
    lab.retort(&["validate", "r.yaml"])
        .expect(3)
        .saying(&["a batch of 13 has no more parts than samples"]);
}

/// The same for tokenizers and teachers, of both families.
#[test]
fn parts_and_recomputation_change_no_tokenizer_or_teacher() {
    const CODES: &str = "kind: tokenizer, data: '${params.data}', seed: 5, codebook_size: 16, codebook_dim: 4, channels: 8, \
                         multipliers: [1, 2], restart_every: 1";
    const GPT: &str = "kind: pretrain, tokenizer: codes, data: '${params.data}', seed: 5, width: 32, depth: 2, heads: 2, \
                       dropout: 0.2, token_dropout: 0.1, drop_path: 0.3";
    const VAR: &str = "kind: pretrain, family: var, tokenizer: scales, data: '${params.data}', seed: 5, width: 32, depth: 2, heads: 2, \
                       dropout: 0.2, drop_path: 0.3";
    const SHORT: &str = "train: {steps: 3, batch: 13, ema: 0.9}";
    let mut stages = String::from(
        "
  scales: {kind: tokenizer, family: var, scales: [1, 2, 4], data: '${params.data}', codebook_size: 16, codebook_dim: 4, \
         channels: 8, train: {steps: 3, batch: 8}}
",
    );
    let averaged = format!("{CODES}, codebook_ema: 0.9");
    for (name, options) in [
        ("codes", CODES),
        ("averaged", averaged.as_str()),
        ("gpt", GPT),
        ("var", VAR),
    ] {
        for (kind, more) in [
            ("whole", ""),
            ("again", "recompute: true,"),
            ("parts", "recompute: true, accumulate: 4,"),
        ] {
            stages += &format!("  {name}-{kind}: {{{options}, {more} {SHORT}}}\n");
        }
    }
    let lab = lab(&stages);
    lab.retort(&["run", "r.yaml"]).expect(0);
    for (name, prefix, figures) in [
        (
            "codes",
            "tokenizer",
            &["loss", "reconstruction", "codebook_usage"][..],
        ),
        (
            "averaged",
            "tokenizer",
            &["loss", "reconstruction", "perplexity"],
        ),
        ("gpt", "pretrain", &["loss", "gradient_norm"]),
        ("var", "pretrain", &["loss", "gradient_norm"]),
    ] {
        let of = |kind: &str| format!("{name}-{kind}");
        assert_eq!(
            output(&lab, &of("whole")).0,
            output(&lab, &of("again")).0,
            "{name}"
        );
        for figure in figures {
            let series = format!("{prefix}/{figure}");
            let [whole, parts] = ["whole", "parts"].map(|kind| points(&lab, &of(kind), &series));
            assert!(whole.len() >= 2, "{name} {series}: {whole:?}");
            for (a, b) in whole.iter().zip(&parts) {
                assert!(
                    (a - b).abs() < 1e-4 * a.abs(),
                    "{name} {series}: {whole:?}, {parts:?}"
                );
            }
        }
    }
    for stage in ["codes-parts", "gpt-parts"] {
        let setting = format!("{stage}.accumulate=14");
        lab.retort(&["validate", "r.yaml", "--set", &setting])
            .expect(3)
            .saying(&["a batch of 13 has no more parts than samples"]);
    }
}

/// Dropout changes a step, but not the measurement of held-out images.
#[test]
fn what_a_training_leaves_out_is_there_when_it_is_measured() {
    const VARIANTS: [(&str, &str); 4] = [
        ("whole", ""),
        ("entries", "dropout: 0.3,"),
        ("embeddings", "token_dropout: 0.3,"),
        ("branches", "drop_path: 0.9,"),
    ];
    const SCALES: &str = "
  scales: {kind: tokenizer, family: var, scales: [1, 2, 4], data: '${params.data}', codebook_size: 16, codebook_dim: 4, \
         channels: 8, train: {steps: 3, batch: 8}}
  var: {kind: pretrain, family: var, tokenizer: scales, data: '${params.data}', width: 32, depth: 2, heads: 2, \
         train: {steps: 20, batch: 32}}
";
    let mut stages = String::from(SCALES);
    for (family, from) in [
        ("llamagen", "teacher, tokenizer: codes"),
        ("var", "var, tokenizer: scales"),
    ] {
        for (name, option) in VARIANTS {
            if (family, name) != ("var", "embeddings") {
                stages += &format!(
                    "  {family}-{name}: {{kind: pretrain, family: {family}, from: {from}, seed: 5, data: '${{params.data}}', \
                     width: 32, depth: 2, heads: 2, {option} train: {{steps: 1, batch: 16, learning_rate: 1.0e-9, warmup: 0}}}}\n"
                );
            }
        }
    }
    let lab = lab(&stages);
    lab.retort(&["run", "r.yaml"]).expect(0);
    let figure = |stage: &str, series: &str| *points(&lab, stage, series).last().unwrap();
    for family in ["llamagen", "var"] {
        let whole = format!("{family}-whole");
        for (name, _) in &VARIANTS[1..] {
            if (family, *name) == ("var", "embeddings") {
                continue;
            }
            let stage = format!("{family}-{name}");
            let [measured, same] =
                [&stage, &whole].map(|stage| figure(stage, "pretrain/held_out_loss"));
            assert!(
                (measured - same).abs() < 1e-5,
                "{stage}: {measured}, {same}"
            );
            let [loss, other] = [&stage, &whole].map(|stage| figure(stage, "pretrain/loss"));
            assert_ne!(loss, other, "{stage}");
        }
    }
    lab.retort(&["validate", "r.yaml", "--set", "var.token_dropout=0.1"])
        .expect(3)
        .saying(&["not for `family: var`"]);
}

#[test]
fn parts_made_elsewhere_make_the_whole() {
    const OPTIONS: &str = "kind: trajectories, teacher: teacher, count: 601, seed: 3";
    let lab = lab(&format!(
        "
  whole: {{{OPTIONS}}}
  head: {{{OPTIONS}, range: [0, 250], shard_size: 100}}
  tail: {{{OPTIONS}, range: [400, 601], batch: 33}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    let dir = lab.dir.path();
    for part in ["head", "tail"] {
        std::fs::create_dir(dir.join(part)).unwrap();
        for file in std::fs::read_dir(output(&lab, part).1).unwrap().flatten() {
            std::fs::copy(file.path(), dir.join(part).join(file.file_name())).unwrap();
        }
    }
    let whole = output(&lab, "whole").1;

    let recipe = dir.join("r.yaml");
    let begun = std::fs::read_to_string(&recipe).unwrap();
    let with = |stages: &str| std::fs::write(&recipe, format!("{begun}{stages}")).unwrap();
    with(&format!(
        "  joined: {{{OPTIONS}, parts: [tail, head], shard_size: 70}}\n"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    let joined = Dataset::open(&output(&lab, "joined").1).unwrap();
    let whole = Dataset::open(&whole).unwrap();
    assert_eq!(everything(&joined), everything(&whole));
    let starts: Vec<u64> = joined.manifest.shards.iter().map(|s| s.start).collect();
    assert_eq!(starts, [0, 100, 200, 250, 280, 350, 400]);
    assert_eq!(
        std::fs::read(dir.join("tail/shard-000000400.safetensors")).unwrap(),
        std::fs::read(output(&lab, "joined").1.join("shard-000000400.safetensors")).unwrap()
    );

    for (stage, code, saying) in [
        (format!("{OPTIONS}, range: [9, 9]"), 3, "range [9, 9]: expected [start, end] with start < end"),
        (format!("{OPTIONS}, range: [0, 602]"), 3, "end at most 601, the count"),
        (
            format!("{OPTIONS}, parts: [head], labels: [{}]", ["0"; 601].join(", ")),
            100,
            "these samples were made with other labels",
        ),
        (format!("{OPTIONS}, parts: [nowhere]"), 3, "nowhere"),
        (OPTIONS.replace("seed: 3", "seed: 4, parts: [head]"), 100, "seed 3, expected 4"),
        (format!("{OPTIONS}, range: [0, 500], parts: [tail]"), 100, "lie beyond 0..500"),
        (
            "kind: distill, teacher: teacher, trajectories: head, timesteps: [0], train: {steps: 1}".into(),
            100,
            "samples 250 and on are missing of 601",
        ),
    ] {
        with(&format!("  wrong: {{{stage}}}\n"));
        let said = lab.retort(&["run", "r.yaml", "--until", "wrong"]);
        said.expect(code).saying(&[saying]);
    }
}

#[test]
fn every_loss_and_every_sampler_runs_to_its_end() {
    let lab = lab("
  pairs: {kind: trajectories, teacher: teacher, count: 2000, distribution: {guidance: 1.5}}
  features: {kind: classifier, data: '${params.data}', train: {steps: 60, batch: 32}}
  pixels:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0, 6]
    split: 8
    codebook_distance: 1.0
    perceptual: {kind: l2, weight: 1.0}
    train: {steps: 60, batch: 32}
  perceived:
    kind: distill
    teacher: teacher
    trajectories: pairs
    timesteps: [0, 6]
    split: 8
    cross_entropy: 0.5
    perceptual: {kind: classifier, weight: 1.0, classifier: features}
    train: {steps: 60, batch: 32}
  drawn: {kind: sample, count: 40, sampler: {kind: teacher, teacher: teacher, distribution: {top_k: 8, top_p: 0.9}}}
  mixed: {kind: sample, count: 40, png: true, npz: true, sampler: {kind: student, student: pixels, timesteps: [0, 6], split: 8}}
  assisted: {kind: sample, count: 40, sampler: {kind: assisted, student: perceived, teacher: teacher, timesteps: [0, 6], teacher_start: 3}}
  apart: {kind: sample, count: 40, sampler: {kind: independent, teacher: teacher, trajectories: pairs}}
  skipped: {kind: sample, count: 40, sampler: {kind: skip, teacher: teacher, skip: 12}}
  judged:
    kind: evaluate
    data: ${params.data}
    classifier: features
    reference: drawn
    samples: {drawn: drawn, mixed: mixed, assisted: assisted, apart: apart, skipped: skipped}
");
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    for text in [
        "Frechet distance",
        "drawn",
        "mixed",
        "assisted",
        "apart",
        "grid.png",
    ] {
        assert!(
            said.stdout.contains(text),
            "{text} is missing in:\n{}",
            said.stdout
        );
    }
    let judged = std::fs::read_to_string(output(&lab, "judged").1.join("evaluation.json")).unwrap();
    let judged: Value = serde_json::from_str(&judged).unwrap();
    for (set, passes) in [
        ("drawn", 16),
        ("mixed", 2),
        ("assisted", 5),
        ("apart", 0),
        ("skipped", 5),
    ] {
        assert_eq!(judged["sets"][set]["passes"], passes, "{set}");
    }
    // The terms that only the continuous head can lower are lowered.
    for (stage, term) in [
        ("pixels", "codebook_distance"),
        ("pixels", "perceptual"),
        ("perceived", "perceptual"),
    ] {
        let values = points(&lab, stage, &format!("distill/{term}"));
        assert!(values.last() < values.first(), "{stage} {term}: {values:?}");
    }
    let mixed = output(&lab, "mixed").1;
    for file in ["shard-000000000.safetensors", "samples.npz", "grid.png"] {
        assert!(mixed.join(file).is_file(), "{file}");
    }
    assert_eq!(std::fs::read_dir(mixed.join("png")).unwrap().count(), 40);
}

#[test]
fn a_next_scale_teacher_is_distilled() {
    let lab = lab("
  scales: {kind: tokenizer, family: var, data: '${params.data}', scales: [1, 2, 4], codebook_size: 16, codebook_dim: 4, channels: 8, train: {steps: 60, batch: 32}}
  next:
    kind: pretrain
    family: var
    tokenizer: scales
    data: ${params.data}
    width: 32
    depth: 2
    heads: 2
    shared_adaln: true
    token_noise: 0.1
    train: {steps: 60, batch: 32, ema: 0.9}
  pairs: {kind: trajectories, teacher: next, count: 2000, distribution: {guidance: 1.0}}
  student:
    kind: distill
    teacher: next
    trajectories: pairs
    depth: 3
    timesteps: [0, 2]
    split: 2
    codebook_distance: 1.0
    perceptual: {kind: l2, weight: 1.0}
    train: {steps: 60, batch: 32, muon: {}}
  drawn: {kind: sample, count: 40, sampler: {kind: teacher, teacher: next, distribution: {guidance: 1.0}}}
  mixed: {kind: sample, count: 40, sampler: {kind: student, student: student, timesteps: [0, 2], split: 2}}
  assisted: {kind: sample, count: 40, sampler: {kind: assisted, student: student, teacher: next, timesteps: [0, 2], teacher_start: 1}}
  apart: {kind: sample, count: 40, sampler: {kind: independent, teacher: next, trajectories: pairs}}
  skipped: {kind: sample, count: 40, sampler: {kind: skip, teacher: next, skip: 2}}
");
    lab.retort(&["run", "r.yaml"]).expect(0);
    for (stage, series) in [
        ("scales", "tokenizer/reconstruction"),
        ("next", "pretrain/loss"),
        ("student", "distill/cross_entropy"),
        ("student", "distill/codebook_distance"),
    ] {
        let values = points(&lab, stage, series);
        assert!(
            values.last() < values.first(),
            "{stage} {series}: {values:?}"
        );
    }
    let pairs = Dataset::open(&output(&lab, "pairs").1).unwrap();
    assert_eq!(pairs.manifest.steps, [1, 4, 16]);
}

#[test]
fn a_teacher_and_its_tokenizer_are_of_one_family() {
    let lab = lab("
  next: {kind: pretrain, family: var, tokenizer: codes, data: '${params.data}', width: 32, depth: 2, heads: 2}
");
    lab.retort(&["run", "r.yaml", "--until", "next"])
        .expect(100)
        .saying(&["family var, but the tokenizer codes is one of family llamagen"]);
}

/// The image that the perceptual term decodes contains X_t's tokens, like the one that sampling decodes.
#[test]
fn one_unknown_token_changes_the_perceptual_term_little() {
    const STUDENT: &str = "kind: distill, teacher: teacher, trajectories: pairs, seed: 5, timesteps: [0, 15], split: 15, \
                           perceptual: {kind: l2, weight: 1.0}, train: {steps: 1, batch: 64}";
    let lab = lab(&format!(
        "
  pairs: {{kind: trajectories, teacher: teacher, count: 400}}
  noise: {{{STUDENT}, timestep_weights: [1, 0]}}
  nearly: {{{STUDENT}, timestep_weights: [0, 1]}}
"
    ));
    lab.retort(&["run", "r.yaml"]).expect(0);
    let [noise, nearly] =
        ["noise", "nearly"].map(|stage| points(&lab, stage, "distill/perceptual")[0]);
    assert!(nearly > 0.0 && nearly < 0.25 * noise, "{noise}, {nearly}");
}
