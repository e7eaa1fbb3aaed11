//! Published checkpoint files through the command line: loaded, sampled, and compared with the published code's results.

use std::path::{Path, PathBuf};

use retort_engine::weights::CheckpointWeights;
use retort_tests::golden::{TOLERANCE, procedural_weights};
use retort_tests::torch::Archive;
use serde_json::Value;

use crate::imports::change;
use crate::lab::Lab;

/// A family and how its files are published.
struct Family {
    name: &'static str,
    /// Parts of `weights.json`, and the dictionary that each has in a published file.
    tokenizer: (&'static str, &'static [&'static str]),
    teacher: (&'static str, &'static [&'static str]),
    student: (&'static str, &'static [&'static str]),
    /// A second dictionary in the student's file: weights that are not the average.
    beside: &'static [&'static str],
    /// Options for a network without a published size.
    hints: &'static str,
    /// Guidance of the trajectories, as in the tensor's name.
    guidance: &'static str,
}

const LLAMAGEN: Family = Family {
    name: "llamagen",
    tokenizer: ("vq", &["model"]),
    teacher: ("gpt", &["module"]),
    student: ("dd", &["ema"]),
    beside: &["model"],
    hints: "heads: 2, image_size: 8",
    guidance: "2.0",
};

const VAR: Family = Family {
    name: "var",
    tokenizer: ("vae", &[]),
    teacher: ("var", &[]),
    student: ("dd", &["trainer", "ema_parameters"]),
    beside: &["trainer", "var_wo_ddp"],
    hints: "scales: [1, 2, 3, 4]",
    guidance: "1.5",
};

impl Family {
    fn golden(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden")
            .join(self.name)
    }

    /// Writes the golden weights as they are published.
    fn write_files(&self, dir: &Path) {
        let weights = procedural_weights(&self.golden().join("weights.json")).unwrap();
        for (file, (part, place)) in [
            ("tokenizer.pth", self.tokenizer),
            ("teacher.pth", self.teacher),
            ("student.pth", self.student),
        ] {
            let mut archive = Archive::create(&dir.join(file));
            place.iter().for_each(|name| archive.open(name));
            archive.weights(&weights[part]);
            // A buffer, and an unknown weight.
            archive.tensor("freqs_cis", &[2], &[0.0; 2]);
            archive.tensor("stranger.weight", &[1], &[1.0]);
            if file == "student.pth" {
                let common = place.len() - 1;
                archive.close();
                self.beside[common..]
                    .iter()
                    .for_each(|name| archive.open(name));
                for (name, w) in &weights[part] {
                    archive.tensor(name, &w.shape, &vec![0.5; w.data.len()]);
                }
            }
            place.iter().for_each(|_| archive.close());
            if !place.is_empty() {
                archive.surroundings();
            }
            archive.finish();
        }
    }

    /// A recipe that processes the files like the published code.
    fn recipe(&self) -> String {
        let folder = self.golden();
        let expected = folder.join("expected.safetensors");
        let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        let (middle, split) = (&config["t_mid"], &config["split_t"]);
        let start = &config["t_teacher_start"];
        let stored = CheckpointWeights::open(&expected, None).unwrap();
        let greedy = stored.floats("greedy.cfg").unwrap()[0];
        let count = stored.shape("labels").unwrap()[0];
        let Self {
            name,
            hints,
            guidance,
            ..
        } = self;
        let file = expected.display();
        let given = format!(
            "count: {count}, noise: {{file: {file}, tensor: student.noise}}, labels: {{file: {file}, tensor: labels}}"
        );
        let kept = "images: f32, latents: true";
        format!(
            "version: 1
backend: candle
device: cpu
stages:
  teacher: {{kind: teacher, family: {name}, model: teacher.pth, tokenizer: tokenizer.pth, {hints}}}
  student: {{kind: student, family: {name}, model: student.pth, tokenizer: tokenizer.pth, timesteps: [0, {middle}], {hints}}}
  trajectories: {{kind: trajectories, teacher: teacher, distribution: {{guidance: {guidance}}}, {given}}}
  greedy: {{kind: sample, sampler: {{kind: teacher, teacher: teacher, distribution: {{guidance: {greedy}, top_k: 1}}}}, tokens: true, {kept}, {given}}}
  one_step: {{kind: sample, sampler: {{kind: student, student: student, timesteps: [0], split: {split}}}, {kept}, {given}}}
  two_step: {{kind: sample, sampler: {{kind: student, student: student, timesteps: [0, {middle}], split: {split}}}, {kept}, {given}}}
  assisted:
    kind: sample
    sampler: {{kind: assisted, student: student, teacher: teacher, timesteps: [0, {middle}], teacher_start: {start}, split: {split}, distribution: {{guidance: 2.0, top_k: 1}}}}
    {}
    {}
",
            kept.replace(", ", "\n    "),
            given.replace(", noise", "\n    noise").replace(", labels", "\n    labels")
        )
    }
}

/// The history's record of a stage's artifact in the latest run.
fn row(lab: &Lab, stage: &str) -> Value {
    let list = lab.retort(&["artifacts", "list", "latest", "--json"]);
    let list = list.expect(0).json();
    let mut rows = list.as_array().unwrap().iter();
    rows.find(|row| row["stage"] == stage).unwrap().clone()
}

/// The directory of a stage's artifact in the latest run.
fn artifact(lab: &Lab, stage: &str) -> PathBuf {
    lab.dir
        .path()
        .join(row(lab, stage)["path"].as_str().unwrap())
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // Not the maximum of the differences: that would not see a NaN.
    let worst = differences.fold(0.0f32, |m, x| if x <= m { m } else { x });
    let error = f64::from(worst / scale);
    println!("{what}: {error:.1e}");
    assert!(
        error <= TOLERANCE,
        "{what}: {error:e} of the largest magnitude"
    );
}

fn agrees(family: &Family) {
    let lab = Lab::new(&[]);
    family.write_files(lab.dir.path());
    std::fs::write(lab.dir.path().join("r.yaml"), family.recipe()).unwrap();
    lab.retort(&["run", "r.yaml", "-v"])
        .expect(0)
        .saying(&["stranger.weight"]);
    let source = &row(&lab, "student")["meta"]["sources"]["model"];
    assert_eq!(source["file"], "student.pth");
    assert_eq!(source["dictionary"], family.student.1.join("."));
    assert_eq!(source["blake3"].as_str().unwrap().len(), 64);
    let expected =
        CheckpointWeights::open(&family.golden().join("expected.safetensors"), None).unwrap();

    let shard = artifact(&lab, "trajectories").join("shard-000000000.safetensors");
    let name = format!("trajectory.cfg{}.tokens", family.guidance);
    let tokens = CheckpointWeights::open(&shard, None)
        .unwrap()
        .indices("tokens")
        .unwrap();
    assert_eq!(tokens, expected.indices(&name).unwrap(), "{name}");

    for stage in ["greedy", "one_step", "two_step", "assisted"] {
        let samples = artifact(&lab, stage).join("shard-000000000.safetensors");
        let samples = CheckpointWeights::open(&samples, None).unwrap();
        if stage == "greedy" {
            let tokens = samples.indices("tokens").unwrap();
            assert_eq!(
                tokens,
                expected.indices("greedy.tokens").unwrap(),
                "greedy.tokens"
            );
        } else {
            let name = format!("{stage}.latents");
            assert_close(
                &name,
                &samples.floats("latents").unwrap(),
                &expected.floats(&name).unwrap(),
            );
        }
        let shown = |raw: Vec<f32>| {
            raw.iter()
                .map(|x| ((x + 1.0) / 2.0).clamp(0.0, 1.0))
                .collect()
        };
        let images: Vec<f32> = expected
            .floats(&format!("{stage}.image01"))
            .or_else(|_| expected.floats(&format!("{stage}.image")).map(shown))
            .unwrap();
        assert_close(
            &format!("{stage}.image"),
            &samples.floats("images").unwrap(),
            &images,
        );
    }
}

#[test]
fn llamagen_files_give_the_published_results() {
    agrees(&LLAMAGEN);
}

#[test]
fn var_files_give_the_published_results() {
    agrees(&VAR);
}

/// Networks exported for the published scripts, and loaded again: the same artifacts.
fn exports(family: &Family, buffers: [&[&str]; 3]) {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    family.write_files(dir);
    let recipe = |file: &str, with: [&str; 3]| {
        let [teacher, student, tokenizer] = with;
        let Family { name, hints, .. } = family;
        let text = format!(
            "version: 1
backend: candle
device: cpu
stages:
  teacher: {{kind: teacher, family: {name}, model: {teacher}, tokenizer: {tokenizer}, {hints}}}
  student: {{kind: student, family: {name}, model: {student}, tokenizer: {tokenizer}, timesteps: [0, 2], {hints}}}
"
        );
        std::fs::write(dir.join(file), text).unwrap();
    };
    recipe("in.yaml", ["teacher.pth", "student.pth", "tokenizer.pth"]);
    lab.retort(&["run", "in.yaml"]).expect(0);
    let hashes = || ["teacher", "student"].map(|stage| row(&lab, stage)["hash"].clone());
    let before = hashes();
    let export = |more: &[&str]| {
        let command = ["artifacts", "export", "--as", "published"];
        lab.retort(&[&command[..], more].concat())
    };
    let said = export(&["latest/teacher", "-o", "t.pth"]).expect(0);
    assert_eq!(said.stdout, "t.pth\n");
    export(&["latest/student", "-o", "s.pth"]).expect(0);
    export(&["latest/student", "--network", "tokenizer", "-o", "k.pth"]).expect(0);
    recipe("out.yaml", ["t.pth", "s.pth", "k.pth"]);
    lab.retort(&["run", "out.yaml"]).expect(0);
    assert_eq!(hashes(), before);

    // Every weight of the published network, and the buffers that its scripts require.
    let weights = procedural_weights(&family.golden().join("weights.json")).unwrap();
    let places = [family.teacher.1, family.student.1, family.tokenizer.1];
    let parts = [family.teacher.0, family.student.0, family.tokenizer.0];
    let published = match family.name {
        "llamagen" => [&["model"][..], places[1], places[2]],
        _ => places,
    };
    for (i, file) in ["t.pth", "s.pth", "k.pth"].into_iter().enumerate() {
        let place = published[i].join(".");
        let stored = CheckpointWeights::open(&dir.join(file), Some(&place)).unwrap();
        let mut found: Vec<&str> = stored.shapes().map(|(name, _)| name).collect();
        let mut expected: Vec<&str> = weights[parts[i]].keys().map(String::as_str).collect();
        expected.extend(buffers[i]);
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "{file}");
    }
    // The average takes the place of the other weights.
    let beside =
        CheckpointWeights::open(&dir.join("s.pth"), Some(&family.beside.join("."))).unwrap();
    let own =
        CheckpointWeights::open(&dir.join("s.pth"), Some(&family.student.1.join("."))).unwrap();
    let name = "final_layer_conti.linear.bias";
    assert_eq!(beside.floats(name).unwrap(), own.floats(name).unwrap());

    export(&["latest/teacher", "-o", "t.pth"])
        .expect(2)
        .saying(&["t.pth is there already", "--force"]);
    export(&["latest/teacher", "-o", "t.pth", "--force"]).expect(0);
    export(&["latest/nothing", "-o", "n.pth"]).expect(4);
    assert!(!dir.join("n.pth").exists());

    // Without -o the stage's name is used, which may be somebody else's.
    change(
        &lab.store_dir().join("history.db"),
        "update stages set name = '../deeper/outside' where name = 'teacher'",
    );
    export(&["latest/../deeper/outside"]).expect(0);
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    let mut names = entries.map(|entry| entry.file_name().into_string().unwrap());
    assert!(names.any(|name| name.contains("outside") && name.ends_with(".pth")));
    assert!(!dir.parent().unwrap().join("deeper").exists());
}

#[test]
fn llamagen_networks_go_out_and_in() {
    exports(&LLAMAGEN, [&[], &[], &["quantize.codebook_used"]]);
}

#[test]
fn var_networks_go_out_and_in() {
    const BUFFERS: [&str; 4] = [
        "attn_bias_for_masking",
        "lvl_1L",
        "blocks.0.attn.zero_k_bias",
        "blocks.1.attn.zero_k_bias",
    ];
    exports(&VAR, [&BUFFERS, &BUFFERS, &["quantize.ema_vocab_hit_SV"]]);
}

#[test]
fn files_that_do_not_fit_are_refused_before_work_starts() {
    let lab = Lab::new(&[]);
    LLAMAGEN.write_files(lab.dir.path());
    let check = |teacher: &str, expected: &str| {
        let text = format!(
            "version: 1\nbackend: candle\ndevice: cpu\nstages:\n  t: {{kind: teacher, {teacher}}}\n"
        );
        std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
        lab.retort(&["validate", "r.yaml"])
            .expect(3)
            .saying(&[expected]);
    };
    check(
        "family: llamagen, model: tokenizer.pth, tokenizer: tokenizer.pth",
        "this looks like a LlamaGen tokenizer; expected the weights of a llamagen teacher",
    );
    check(
        "family: llamagen, model: student.pth, tokenizer: tokenizer.pth",
        "this looks like a LlamaGen student; expected the weights of a llamagen teacher",
    );
    check(
        "family: var, model: teacher.pth, tokenizer: tokenizer.pth",
        "this looks like a LlamaGen teacher; expected the weights of a var teacher",
    );
    check(
        "family: llamagen, model: teacher.pth, tokenizer: tokenizer.pth, select: ema",
        "no tensors under `ema`; there are `module`",
    );
    check(
        "family: llamagen, size: Z, random: true",
        "llamagen was published as B, L, XL, XXL, 3B",
    );
    check("family: llamagen, random: true", "need a published `size`");
    check(
        "family: llamagen, model: teacher.pth",
        "`tokenizer` is missing",
    );
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    LLAMAGEN.write_files(dir);
    let weights = procedural_weights(&LLAMAGEN.golden().join("weights.json")).unwrap();
    let text = format!(
        "version: 1\nbackend: candle\ndevice: cpu\nstages:\n  t: {{kind: teacher, family: llamagen, model: changed.pth, \
         tokenizer: tokenizer.pth, {}}}\n",
        LLAMAGEN.hints
    );
    std::fs::write(dir.join("r.yaml"), text).unwrap();
    let check = |change: &dyn Fn(&mut retort_engine::weights::Weights), code, expected: &str| {
        let mut changed = weights["gpt"].clone();
        change(&mut changed);
        let mut archive = Archive::create(&dir.join("changed.pth"));
        archive.weights(&changed);
        archive.finish();
        lab.retort(&["run", "r.yaml"])
            .expect(code)
            .saying(&["changed.pth", expected]);
    };
    let name = "layers.1.feed_forward.w2.weight";
    check(
        &|w| drop(w.remove(name)),
        100,
        "weight layers.1.feed_forward.w2.weight with shape [64, 256] is missing",
    );
    check(
        &|w| w.get_mut(name).unwrap().shape = vec![256, 64],
        100,
        "weight layers.1.feed_forward.w2.weight has shape [256, 64], expected [64, 256]",
    );
    check(
        &|w| w.get_mut(name).unwrap().data[7] = f32::NAN,
        100,
        "weight layers.1.feed_forward.w2.weight holds NaN at element 7",
    );
    check(
        &|w| {
            let output = w.get_mut("output.weight").unwrap();
            output.shape[0] = 63;
            output.data.truncate(63 * 64);
        },
        100,
        "codebook of 63 codes in 8 dimensions, but the tokenizer",
    );
    std::fs::remove_file(dir.join("changed.pth")).unwrap();
    lab.retort(&["validate", "r.yaml"])
        .expect(0)
        .saying(&["changed.pth does not exist"]);
    lab.retort(&["run", "r.yaml"])
        .expect(3)
        .saying(&["changed.pth", "does not exist"]);
}

/// One class of a student gives NaN: so do its samples, and no others.
#[test]
fn a_student_that_overflows_names_the_sample() {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    LLAMAGEN.write_files(dir);
    let weights = procedural_weights(&LLAMAGEN.golden().join("weights.json")).unwrap();
    let mut changed = weights["dd"].clone();
    let classes = changed
        .get_mut("cls_embedding.embedding_table.weight")
        .unwrap();
    let width = classes.shape[1];
    classes.data[3 * width..4 * width].fill(f32::MAX);
    let mut archive = Archive::create(&dir.join("changed.pth"));
    archive.weights(&changed);
    archive.finish();
    // The continuous head adds the embedding of the class.
    let text = format!(
        "version: 1\nbackend: candle\ndevice: cpu\nstages:\n  \
         student: {{kind: student, family: llamagen, model: changed.pth, tokenizer: tokenizer.pth, timesteps: [0], {}}}\n  \
         s: {{kind: sample, count: 6, batch: 2, sampler: {{kind: student, student: student, timesteps: [0], split: 0}}}}\n",
        LLAMAGEN.hints
    );
    std::fs::write(dir.join("r.yaml"), text).unwrap();
    lab.retort(&["run", "r.yaml"])
        .expect(100)
        .saying(&["sample 3: the student's predictions at AR step 0 are not finite"]);
    lab.retort(&["run", "r.yaml", "--set", "s.count=3"])
        .expect(0);
}

#[test]
fn requests_beyond_a_network_are_refused_at_their_place() {
    let lab = Lab::new(&[]);
    LLAMAGEN.write_files(lab.dir.path());
    let files = "family: llamagen, tokenizer: tokenizer.pth, heads: 2, image_size: 8";
    let check = |command: &str, code, stage: &str, expected: &str| {
        let text = format!(
            "version: 1\nbackend: candle\ndevice: cpu\nstages:\n  \
             teacher: {{kind: teacher, model: teacher.pth, {files}}}\n  \
             student: {{kind: student, model: student.pth, timesteps: [0, 6], {files}}}\n  \
             pairs: {{kind: trajectories, teacher: teacher, count: 4}}\n  s: {{{stage}}}\n"
        );
        std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
        lab.retort(&[command, "r.yaml"])
            .expect(code)
            .saying(&["r.yaml:8:", expected]);
    };
    let sample = |options: &str| format!("kind: sample, count: 2, {options}");
    let teacher = "sampler: {kind: teacher, teacher: teacher}";
    let student = |options: &str| {
        sample(&format!(
            "sampler: {{kind: student, student: student, {options}}}"
        ))
    };
    let distill =
        |options: &str| format!("kind: distill, teacher: teacher, trajectories: pairs, {options}");

    // Errors that need no network.
    for (stage, expected) in [
        (
            student("timesteps: [6, 0]"),
            "timesteps [6, 0]: expected ascending AR steps",
        ),
        (
            student("timesteps: []"),
            "timesteps []: expected ascending AR steps",
        ),
        (
            sample(
                "sampler: {kind: assisted, student: student, teacher: teacher, timesteps: [0, 6], teacher_start: 6}",
            ),
            "teacher_start 6 with timesteps [0, 6]",
        ),
        (
            distill("timesteps: [0, 6, 6]"),
            "timesteps [0, 6, 6]: expected ascending AR steps from 0",
        ),
        (
            sample(&format!("{teacher}, labels: [0, 1, 2]")),
            "3 labels for 2 samples: expected 1 to 2, which samples take in turn",
        ),
        (
            sample(&format!("{teacher}, labels: []")),
            "0 labels for 2 samples",
        ),
    ] {
        check("validate", 3, &stage, expected);
    }
    // Errors from the network, before any work.
    for (stage, expected) in [
        (
            sample(&format!("{teacher}, labels: [0, 10]")),
            "class 10: the model has the classes 0 to 9",
        ),
        (
            student("timesteps: [0, 16]"),
            "timesteps [0, 16]: expected ascending AR steps, each below 16",
        ),
        (
            student("timesteps: [0], split: 17"),
            "split 17: the model has 16 AR steps",
        ),
        (
            distill("timesteps: [0, 16]"),
            "timesteps [0, 16]: expected ascending AR steps, each below 16",
        ),
        (
            distill("timesteps: [0], split: 17"),
            "split 17: the teacher has 16 AR steps",
        ),
        (
            "kind: trajectories, teacher: teacher, count: 2, labels: [3, 11]".into(),
            "class 11: the model has the classes 0 to 9",
        ),
    ] {
        check("run", 100, &stage, expected);
    }
}

/// The hash of the artifact of stage `t`, a LlamaGen teacher with weights from `model`, and the output.
fn teacher(lab: &Lab, model: &str) -> (Value, String) {
    let text = format!(
        "version: 1\nbackend: candle\ndevice: cpu\nstages:\n  t: {{kind: teacher, family: llamagen, model: {model}, \
         tokenizer: tokenizer.pth, {}}}\n",
        LLAMAGEN.hints
    );
    std::fs::write(lab.dir.path().join("r.yaml"), text).unwrap();
    lab.retort(&["run", "r.yaml"]).expect(0);
    let log = lab.retort(&["log", "latest"]).expect(0).stdout;
    (row(lab, "t")["hash"].clone(), log)
}

#[test]
fn what_stands_in_front_of_all_names_is_taken_off_and_said() {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    LLAMAGEN.write_files(dir);
    let weights = procedural_weights(&LLAMAGEN.golden().join("weights.json")).unwrap();
    let (plain, _) = teacher(&lab, "teacher.pth");
    let write = |file: &str, prefixes: &[&str], beside: &str| {
        let mut all = retort_engine::weights::Weights::new();
        for prefix in prefixes {
            let own = weights["gpt"].iter();
            all.extend(own.map(|(name, w)| (format!("{prefix}{name}"), w.clone())));
        }
        if !beside.is_empty() {
            let some = weights["gpt"].values().next().unwrap().clone();
            all.insert(beside.into(), some);
        }
        retort_engine::weights::write(&dir.join(file), &all).unwrap();
    };
    for (prefix, beside) in [
        ("model.", ""),
        ("ema_model.module.", ""),
        ("_orig_mod.module.a-b.", ""),
        ("gpt.", "loss.discriminator.0.weight"),
    ] {
        write("other.safetensors", &[prefix], beside);
        let (hash, said) = teacher(&lab, "other.safetensors");
        assert_eq!(hash, plain, "{prefix}");
        assert!(said.contains(&format!("begin with `{prefix}`")), "{said}");
    }
    write("other.safetensors", &["a.", "b."], "");
    lab.retort(&["validate", "r.yaml"]).expect(3).saying(&[
        "no known network under the top level; expected the weights of a llamagen teacher; there are `a.",
        "several networks lie under `a.`, `b.`",
    ]);
    let names = ["zebra.one", "zebra.two"];
    let odd = names.map(|name| {
        (
            name.to_owned(),
            weights["gpt"].values().next().unwrap().clone(),
        )
    });
    retort_engine::weights::write(&dir.join("other.safetensors"), &odd.into()).unwrap();
    lab.retort(&["validate", "r.yaml"])
        .expect(3)
        .saying(&["there are `zebra.one`, `zebra.two`"]);
}

#[test]
fn a_network_in_several_files_is_one() {
    let lab = Lab::new(&[]);
    let dir = lab.dir.path();
    LLAMAGEN.write_files(dir);
    let weights = procedural_weights(&LLAMAGEN.golden().join("weights.json")).unwrap();
    let (plain, _) = teacher(&lab, "teacher.pth");
    // As in a cache, a folder of links.
    let (blobs, folder) = (dir.join("blobs"), dir.join("snapshot"));
    std::fs::create_dir(&blobs).unwrap();
    std::fs::create_dir(&folder).unwrap();
    let mut map = serde_json::Map::new();
    for number in 0..2usize {
        let file = format!("model-0000{}-of-00002.safetensors", number + 1);
        let all = weights["gpt"].iter().enumerate();
        let own: retort_engine::weights::Weights = all
            .filter(|(i, _)| i % 2 == number)
            .map(|(_, (name, w))| (name.clone(), w.clone()))
            .collect();
        map.extend(own.keys().map(|name| (name.clone(), file.clone().into())));
        retort_engine::weights::write(&blobs.join(number.to_string()), &own).unwrap();
        std::os::unix::fs::symlink(format!("../blobs/{number}"), folder.join(file)).unwrap();
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    for model in ["snapshot", "snapshot/model.safetensors.index.json"] {
        assert_eq!(teacher(&lab, model).0, plain, "{model}");
    }
    let said = lab.retort(&["run", "r.yaml"]).expect(0);
    assert!(said.stdout.contains("nothing to do"), "{}", said.stdout);
    lab.retort(&["inspect", "snapshot"])
        .expect(0)
        .saying(&["safetensors in 2 files"]);
    // The content of a shard counts, even if nobody named the shard.
    let changed = blobs.join("1");
    let mut bytes = std::fs::read(&changed).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&0.25f32.to_le_bytes());
    std::fs::write(&changed, bytes).unwrap();
    assert_ne!(teacher(&lab, "snapshot").0, plain);
    let lone = "snapshot/model-00001-of-00002.safetensors";
    let text = std::fs::read_to_string(dir.join("r.yaml")).unwrap();
    std::fs::write(
        dir.join("r.yaml"),
        text.replace("model: snapshot", &format!("model: {lone}")),
    )
    .unwrap();
    lab.retort(&["validate", "r.yaml"]).expect(3).saying(&[
        "file 1 of the 2 that a network lies in",
        "snapshot/model.safetensors.index.json",
    ]);
}
