//! Both plugins in one recipe, through the real binary: each reads the other's artifacts, and both train alike. In bf16 this
//! plugin trains as in f32.

use std::path::Path;
use std::process::Command;

use retort_tests::digits::Digits;
use serde_json::Value;

const STAGES: &str = "
  on-candle: {kind: trajectories, seed: 5, teacher: teacher, count: 500}
  on-libtorch: {kind: trajectories, plugin: libtorch, seed: 5, teacher: teacher, count: 500}
  student-candle:
    kind: distill
    seed: 6
    teacher: teacher
    trajectories: on-candle
    timesteps: [0, 6]
    held_out: 0.2
    train: {steps: 200, batch: 32, warmup: 20, ema: 0.95}
  student-libtorch:
    kind: distill
    plugin: libtorch
    seed: 6
    teacher: teacher
    trajectories: on-candle
    timesteps: [0, 6]
    held_out: 0.2
    train: {steps: 200, batch: 32, warmup: 20, ema: 0.95}
  student-bf16:
    kind: distill
    plugin: libtorch
    dtype: bf16
    seed: 6
    teacher: teacher
    trajectories: on-candle
    timesteps: [0, 6]
    held_out: 0.2
    train: {steps: 200, batch: 32, warmup: 20, ema: 0.95}
  samples: {kind: sample, sampler: {kind: student, student: student-libtorch, timesteps: [0]}, count: 32}
  samples-libtorch:
    kind: sample
    plugin: libtorch
    sampler: {kind: teacher, teacher: teacher}
    count: 32
";

#[test]
fn a_recipe_may_change_plugins_between_its_stages() {
    let dir = tempfile::tempdir().expect("a directory");
    let small = Digits {
        backend: "candle",
        top: "seed: 4\ndevice: cpu",
        codes: "train: {steps: 100, batch: 32}",
        teacher: "width: 32, depth: 2, heads: 2, train: {steps: 100, batch: 32}",
    };
    std::fs::write(dir.path().join("r.yaml"), small.recipe(STAGES)).expect("a recipe");
    let ran = retort(dir.path(), &["run", "r.yaml"]);
    let stages = ran["stages"].as_array().expect("stages");
    assert!(stages.iter().all(|s| s["outcome"] == "ran"), "{ran:#}");

    // The flow map gives equal tokens, so both artifacts are the same bytes and share a hash.
    let output = |name: &str| {
        let stage = stages.iter().find(|s| s["name"] == name);
        stage.map(|s| s["output"]["hash"].clone())
    };
    assert_eq!(
        output("on-candle"),
        output("on-libtorch"),
        "the trajectories of both plugins"
    );

    // The first step has the same loss and gradient, and with equal data the loss falls alike.
    let points = |stage: &str, series: &str| points(dir.path(), stage, series);
    for (series, first, last) in [
        ("distill/loss", 1e-3, 0.02),
        ("distill/gradient_norm", 1e-3, f64::INFINITY),
        ("distill/held_out_loss", 0.02, 0.02),
    ] {
        let candle = points("student-candle", series);
        for (stage, first) in [("student-libtorch", first), ("student-bf16", 0.02)] {
            let other = points(stage, series);
            let apart = |i: usize| (other[i] / candle[i] - 1.0).abs();
            let end = candle.len() - 1;
            println!(
                "{series}: candle {:.5} .. {:.5}, {stage} {:.5} .. {:.5}",
                candle[0], candle[end], other[0], other[end]
            );
            assert!(
                apart(0) < first,
                "{stage}: {series} begins {} apart",
                apart(0)
            );
            assert!(
                apart(end) < last,
                "{stage}: {series} ends {} apart",
                apart(end)
            );
        }
    }
}

/// With the adversary, parts of batches and recomputation, so that these run in bf16 too.
const TOKENIZER: &str = "seed: 5, pixels: l1, perceptual: {kind: l2, weight: 0.5}, accumulate: 2, recompute: true, \
                         adversarial: {start: 25, channels: 8, layers: 1}, train: {steps: 30, batch: 32, ema: 0.9}";
const TEACHER: &str = "seed: 6, width: 32, depth: 2, heads: 2, accumulate: 2, recompute: true, \
                       train: {steps: 30, batch: 32, ema: 0.9}";

#[test]
fn tokenizers_and_teachers_train_in_bf16_as_in_f32() {
    for backend in ["libtorch", "candle"] {
        trains_in_bf16_as_in_f32(backend);
    }
}

fn trains_in_bf16_as_in_f32(backend: &'static str) {
    let dir = tempfile::tempdir().expect("a directory");
    let in_f32 = Digits {
        backend,
        top: "seed: 4\ndevice: cpu\nthreads: 1",
        codes: TOKENIZER,
        teacher: TEACHER,
    };
    // The second teacher has the first tokenizer, so that both see the same tokens.
    let rounded = format!(
        "
  codes-bf16: {{kind: tokenizer, dtype: bf16, data: \"${{params.data}}\", codebook_size: 16, codebook_dim: 4, channels: 8,
               z_channels: 8, {TOKENIZER}}}
  teacher-bf16: {{kind: pretrain, dtype: bf16, tokenizer: codes, data: \"${{params.data}}\", {TEACHER}}}
"
    );
    std::fs::write(dir.path().join("r.yaml"), in_f32.recipe(&rounded)).expect("a recipe");
    retort(dir.path(), &["run", "r.yaml"]);

    let multiplies_bf16 =
        std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|found| found.contains("avx512_bf16"));
    for (stage, series) in [
        ("codes", "tokenizer/loss"),
        ("codes", "tokenizer/gradient_norm"),
        ("codes", "tokenizer/held_out_error"),
        ("teacher", "pretrain/loss"),
        ("teacher", "pretrain/gradient_norm"),
        ("teacher", "pretrain/held_out_loss"),
    ] {
        let [full, rounded] = [stage.to_owned(), format!("{stage}-bf16")]
            .map(|stage| points(dir.path(), &stage, series));
        println!("{stage} {series}: {full:?}, in bf16 {rounded:?}");
        assert_eq!(full.len(), rounded.len(), "{stage} {series}");
        for (a, b) in full.iter().zip(&rounded) {
            assert!(
                (a - b).abs() < 0.05 * a.abs(),
                "{stage} {series}: {full:?}, in bf16 {rounded:?}"
            );
        }
        // Where the processor has no such products, only weights that do not change are rounded. candle computes convolutions
        // of so few channels in f32.
        if multiplies_bf16 && (backend == "libtorch" || stage == "teacher") {
            assert_ne!(full, rounded, "{stage} {series}");
        }
    }
    let errors = points(dir.path(), "codes-bf16", "tokenizer/held_out_error");
    let losses = points(dir.path(), "teacher-bf16", "pretrain/held_out_loss");
    for values in [errors, losses] {
        assert!(values.last() < values.first(), "{values:?}");
    }
}

/// The values of a series of a stage.
fn points(dir: &Path, stage: &str, series: &str) -> Vec<f64> {
    let found = retort(dir, &["metrics", "latest", series, "--stage", stage]);
    let found = found.as_array().expect("points").iter();
    found
        .map(|p| p["value"].as_f64().expect("a number"))
        .collect()
}

/// What a command of the real binary prints as JSON.
fn retort(dir: &Path, arguments: &[&str]) -> Value {
    let output = Command::new(crate::binary())
        .args(arguments)
        .args(["--json", "--store"])
        .arg(dir.join("store"))
        .current_dir(dir)
        .env_remove("RETORT_PLUGIN_PATH")
        .output()
        .expect("the binary runs");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}
