//! A store like after real runs, made quickly: two different runs of digits, and one in which every name is hostile.

use std::path::Path;

use retort::artifact::{self, Layout};
use retort::store::{
    Access, ArtifactRecord, AttemptEnd, AttemptId, AttemptState, Batch, LogLine, LogSource,
    MetricPoint, NewRun, NewStage, Param, RecordedPlugin, RunId, RunState, Store, SweepId,
    SweepPlace, SweepPlan, Time, Usage,
};
use retort_abi::{ArtifactMeta, Table};
use serde_json::{Value, json};

/// Text that could do harm on a page if it were not escaped.
pub const HOSTILE: &str =
    "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>\u{202e}&amp;";

/// The created runs.
pub struct FixtureRuns {
    pub first: RunId,
    pub second: RunId,
    pub hostile: RunId,
    /// The hash of a set of samples of the first run.
    pub samples: String,
}

struct Writer<'s> {
    store: &'s Store,
    layout: Layout,
    run: RunId,
    position: usize,
}

/// A stage and its results.
struct Stage<'a> {
    name: &'a str,
    kind: &'a str,
    options: Value,
    inputs: &'a [(&'a str, &'a str)],
}

/// Makes the store in a directory.
pub async fn make(dir: &Path) -> FixtureRuns {
    let store = Store::open(dir, Access::ReadWrite).await.unwrap();
    let (first, samples) = digits(&store, dir, 1000, 1.0).await;
    let (second, _) = digits(&store, dir, 2000, 0.7).await;
    store.tag_run(&first, "baseline").await.unwrap();
    store
        .note_run(&second, "twice as many steps")
        .await
        .unwrap();
    let hostile = hostile(&store, dir).await;
    store.close().await;
    FixtureRuns {
        first,
        second,
        hostile,
        samples,
    }
}

/// A sweep of four points: one has not started, and one that is running is ahead of the finished ones.
pub async fn sweep(dir: &Path) -> (SweepId, Vec<RunId>) {
    let store = Store::open(dir, Access::ReadWrite).await.unwrap();
    let definition = json!({
        "parameters": [{"path": "student.train.learning_rate", "choice": ["0.001", "0.002", "0.004", "0.008"]}],
        "objective": {"metric": "student/loss", "goal": "min"},
        "sample": null,
        "asha": null,
    });
    let plan = SweepPlan {
        recipe: "digits".into(),
        recipe_path: "/recipes/digits.yaml".into(),
        recipe_text: "version: 1\n".into(),
        settings: Vec::new(),
        definition: serde_json::from_value(definition).unwrap(),
        selection: json!({}),
    };
    let points = ["0.001", "0.002", "0.004", "0.008"];
    let points = points.map(|value| vec![format!("student.train.learning_rate={value}")]);
    let id = store.begin_sweep(&plan, &points).await.unwrap();
    let mut runs = Vec::new();
    for (point, (loss, state)) in (1..).zip([
        (0.5, RunState::Succeeded),
        (0.1, RunState::Interrupted),
        (0.25, RunState::Succeeded),
    ]) {
        let place = SweepPlace {
            id: id.clone(),
            point,
        };
        let mut writer = Writer::begin_at(&store, dir, "digits", &[], Some(place)).await;
        let stage = Stage {
            name: "student",
            kind: "distill",
            options: json!({}),
            inputs: &[],
        };
        let attempt = writer.stage(&stage).await;
        writer.curve(attempt, "loss", 20, |_| loss).await;
        writer.end(attempt, None).await;
        store.finish_run(&writer.run, state, None).await.unwrap();
        runs.push(writer.run);
    }
    store.close().await;
    (id, runs)
}

async fn digits(store: &Store, dir: &Path, steps: u64, scale: f64) -> (RunId, String) {
    let params = [
        ("seed", json!(1), "recipe:7"),
        ("stages.student.train.steps", json!(steps), "--set"),
        ("stages.student.depth", json!(8), "default"),
    ];
    let mut writer = Writer::begin(store, dir, "digits", &params).await;
    let codes = writer
        .stage(&Stage {
            name: "codes",
            kind: "tokenizer",
            options: json!({}),
            inputs: &[],
        })
        .await;
    let reconstructions = ArtifactMeta {
        preview: Some("reconstructions.png".into()),
        caption: Some("each row of held-out images, and below it their reconstructions".into()),
        ..ArtifactMeta::default()
    };
    writer
        .artifact(codes, "tokenizer", reconstructions, |folder| {
            grid(&folder.join("reconstructions.png"), (steps / 1000) as u8);
        })
        .await;
    let student = Stage {
        name: "student",
        kind: "distill",
        options: json!({"train": {"steps": steps}}),
        inputs: &[("/tokenizer", "codes")],
    };
    let student = writer.stage(&student).await;
    writer
        .curve(student, "loss", 3000, |step| {
            scale * 2.0 * (-(step as f64) / 700.0).exp()
                + 0.1 * scale
                + 0.03 * (step as f64).sin().abs()
        })
        .await;
    writer
        .curve(student, "images_per_second", 300, |step| {
            900.0 + (step % 7) as f64
        })
        .await;
    writer
        .log(
            student,
            &[
                (3, "depth 8, 1.2 M parameters"),
                (2, "the learning rate is high"),
                (3, "step 1000: loss 0.4"),
                (1, "one sample was not finite"),
            ],
        )
        .await;
    let names: Vec<String> = (0..10).map(|class| format!("digit {class}")).collect();
    let config = json!({"format": 1, "classes": names, "steps": steps});
    let drawer = writer
        .artifact(student, "student", ArtifactMeta::default(), |folder| {
            std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        })
        .await;
    let snapshot = Stage {
        name: "half-way",
        kind: "snapshot",
        options: json!({"student": "student", "step": steps / 2}),
        inputs: &[("/student", "student")],
    };
    let snapshot = writer.stage(&snapshot).await;
    writer.end(snapshot, None).await;
    let hash = sample_stages(&mut writer, &drawer, steps).await;
    evaluation_stage(&mut writer, steps, scale).await;
    store
        .finish_run(&writer.run, RunState::Succeeded, None)
        .await
        .unwrap();
    (writer.run, hash)
}

/// Four sets of samples. Returns the hash of the student's.
async fn sample_stages(writer: &mut Writer<'_>, drawer: &str, steps: u64) -> String {
    let mut hash = String::new();
    // All with one seed, except the last.
    for (name, sampler, seed, shade) in [
        ("sample-teacher", json!({"kind": "teacher"}), 5, 0),
        (
            "sample-1-step",
            json!({"kind": "student", "student": "student", "timesteps": [0]}),
            5,
            40,
        ),
        (
            "sample-half-way",
            json!({"kind": "student", "student": "half-way", "timesteps": [0]}),
            5,
            90,
        ),
        ("sample-independent", json!({"kind": "independent"}), 6, 140),
    ] {
        let inputs = [("/sampler/student", "student")];
        let attempt = writer
            .stage(&Stage {
                name,
                kind: "sample",
                options: json!({"sampler": sampler}),
                inputs: &inputs,
            })
            .await;
        writer
            .store
            .record_lineage(attempt, &[drawer.to_owned()])
            .await
            .unwrap();
        // Another run has different samples.
        let made = writer
            .samples(attempt, &sampler, seed, shade + (steps / 1000) as u8)
            .await;
        if name == "sample-1-step" {
            hash = made;
        }
    }
    hash
}

async fn evaluation_stage(writer: &mut Writer<'_>, steps: u64, scale: f64) {
    let evaluation = writer
        .stage(&Stage {
            name: "evaluation",
            kind: "evaluate",
            options: json!({}),
            inputs: &[("/samples/1-step", "sample-1-step")],
        })
        .await;
    writer
        .curve(evaluation, "1-step/frechet_distance", 1, |_| 8.5 * scale)
        .await;
    let mut table = Table::new(
        "samples against real images",
        &["sampler", "frechet_distance", "agreement"],
    );
    for (name, value) in [("teacher", 3.25), ("1-step", 8.5 * scale)] {
        table = table.row([json!(name), json!(value), json!(0.97)]);
    }
    let meta = ArtifactMeta {
        table: Some(table),
        ..ArtifactMeta::default()
    };
    writer
        .artifact(evaluation, "evaluation", meta, |folder| {
            std::fs::write(
                folder.join("evaluation.json"),
                format!("{{\"steps\": {steps}}}"),
            )
            .unwrap()
        })
        .await;
}

async fn hostile(store: &Store, dir: &Path) -> RunId {
    let params = [(HOSTILE, json!(HOSTILE), HOSTILE)];
    let mut writer = Writer::begin(store, dir, HOSTILE, &params).await;
    let attempt = writer
        .stage(&Stage {
            name: HOSTILE,
            kind: HOSTILE,
            options: json!({HOSTILE: HOSTILE}),
            inputs: &[(HOSTILE, HOSTILE)],
        })
        .await;
    writer.curve(attempt, HOSTILE, 50, |step| step as f64).await;
    writer
        .log(
            attempt,
            &[(1, HOSTILE), (3, "</pre></li></ol><h1>not a heading</h1>")],
        )
        .await;
    let meta = ArtifactMeta {
        table: Some(Table::new(HOSTILE, &[HOSTILE]).row([json!(HOSTILE)])),
        preview: Some("grid.png".into()),
        caption: Some(HOSTILE.into()),
        ..ArtifactMeta::default()
    };
    writer
        .artifact(attempt, HOSTILE, meta, |folder| {
            grid(&folder.join("grid.png"), 9)
        })
        .await;
    store
        .finish_run(&writer.run, RunState::Failed, Some(HOSTILE))
        .await
        .unwrap();
    store.tag_run(&writer.run, HOSTILE).await.unwrap();
    store.note_run(&writer.run, HOSTILE).await.unwrap();
    writer.run
}

impl<'s> Writer<'s> {
    async fn begin(
        store: &'s Store,
        dir: &Path,
        name: &str,
        params: &[(&str, Value, &str)],
    ) -> Self {
        Self::begin_at(store, dir, name, params, None).await
    }

    async fn begin_at(
        store: &'s Store,
        dir: &Path,
        name: &str,
        params: &[(&str, Value, &str)],
        sweep: Option<SweepPlace>,
    ) -> Self {
        let params = params.iter().map(|(path, value, origin)| Param {
            path: (*path).into(),
            value: value.clone(),
            origin: (*origin).into(),
        });
        let new = NewRun {
            recipe_name: name.into(),
            recipe_path: format!("/recipes/{name}.yaml"),
            recipe_text: format!("version: 1\nname: {name}\n"),
            params: params.collect(),
            command: vec!["retort".into(), "run".into(), name.into()],
            environment: json!({"host": name, "memory": 8_000_000_000_u64, "commit": "0123456789abcdef"}),
            sweep,
            ..NewRun::default()
        };
        let run = store.begin_run(&new).await.unwrap();
        Self {
            store,
            layout: Layout::new(dir).unwrap(),
            run,
            position: 0,
        }
    }

    async fn stage(&mut self, stage: &Stage<'_>) -> AttemptId {
        let inputs = stage
            .inputs
            .iter()
            .map(|(pointer, name)| ((*pointer).to_owned(), (*name).to_owned()));
        let new = NewStage {
            name: stage.name.into(),
            kind: stage.kind.into(),
            position: self.position,
            plugin: RecordedPlugin {
                name: "candle".into(),
                version: "0.1.0".into(),
                hash: "ab".repeat(32),
            },
            device: "cpu".into(),
            dtype: "f32".into(),
            seed: 1,
            options: stage.options.clone(),
            inputs: inputs.collect(),
        };
        self.position += 1;
        let id = self.store.add_stage(&self.run, &new).await.unwrap();
        let digest = format!("{:?}{}", self.run, stage.name);
        self.store
            .begin_attempt(id, &digest, &json!({"options": stage.options}), 1)
            .await
            .unwrap()
    }

    async fn curve(
        &self,
        attempt: AttemptId,
        series: &str,
        points: u64,
        value: impl Fn(u64) -> f64,
    ) {
        let began = Time::now().0;
        let points = (0..points).map(|step| MetricPoint {
            step,
            value: value(step),
            at: Time(began + step.cast_signed() * 20),
        });
        let batch = Batch {
            series: series.into(),
            points: points.collect(),
        };
        self.store.append_metrics(attempt, &[batch]).await.unwrap();
    }

    async fn log(&self, attempt: AttemptId, lines: &[(u32, &str)]) {
        let lines = lines.iter().map(|(level, text)| LogLine {
            at: Time::now(),
            level: *level,
            source: LogSource::Plugin,
            text: (*text).into(),
        });
        self.store
            .append_log(attempt, &lines.collect::<Vec<_>>())
            .await
            .unwrap();
    }

    async fn samples(&self, attempt: AttemptId, sampler: &Value, seed: u64, shade: u8) -> String {
        const COUNT: usize = 40;
        let meta = ArtifactMeta {
            preview: Some("grid.png".into()),
            ..ArtifactMeta::default()
        };
        self.artifact(attempt, "samples", meta, |folder| {
            let shard = "shard-000000000.safetensors";
            let manifest = json!({
                "format": 1,
                "count": COUNT,
                "seed": seed,
                "sampler": sampler,
                "captions": null,
                "image": [1, 8, 8],
                "tokens": 16,
                "vocabulary": 32,
                "dim": 4,
                "labels": 10,
                "kept": {"images": "u8", "latents": false, "tokens": false, "noise": false},
                "shards": [{"file": shard, "start": 0, "end": COUNT}],
            });
            std::fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
            let header = json!({
                "labels": {"dtype": "U8", "shape": [COUNT], "data_offsets": [0, COUNT]},
                "images": {"dtype": "U8", "shape": [COUNT, 1, 8, 8], "data_offsets": [COUNT, COUNT * 65]},
            });
            let header = header.to_string();
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend((0..COUNT).map(|number| (number % 10) as u8));
            bytes.extend((0..COUNT * 64).map(|at| pixel(at, shade)));
            std::fs::write(folder.join(shard), bytes).unwrap();
            grid(&folder.join("grid.png"), shade);
        })
        .await
    }

    async fn artifact(
        &self,
        attempt: AttemptId,
        kind: &str,
        meta: ArtifactMeta,
        fill: impl FnOnce(&Path),
    ) -> String {
        let folder = tempfile::tempdir_in(self.store.dir()).unwrap().keep();
        fill(&folder);
        let contents = artifact::commit(&folder, &self.layout.artifacts()).unwrap();
        let record = ArtifactRecord {
            hash: contents.hash.clone(),
            kind: kind.into(),
            name: kind.into(),
            size: contents.size,
            files: contents.files,
            meta,
        };
        self.store.record_artifact(attempt, &record).await.unwrap();
        self.end(attempt, Some(contents.hash.clone())).await;
        contents.hash
    }

    async fn end(&self, attempt: AttemptId, output: Option<String>) {
        let end = AttemptEnd {
            state: AttemptState::Succeeded,
            reason: "succeeded".into(),
            message: None,
            failure: None,
            summary: json!({}),
            output_artifact: output,
            usage: Usage {
                cpu_seconds: Some(1.5),
                max_rss: Some(120_000_000),
            },
            paused: std::time::Duration::ZERO,
        };
        self.store.finish_attempt(attempt, &end).await.unwrap();
    }
}

/// Varied values.
fn pixel(at: usize, shade: u8) -> u8 {
    ((at * 7 % 256) as u8).saturating_add(shade)
}

fn grid(path: &Path, shade: u8) {
    const SIDE: u32 = 40;
    let file = std::fs::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(std::io::BufWriter::new(file), SIDE, SIDE);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    let pixels: Vec<u8> = (0..(SIDE * SIDE) as usize)
        .map(|at| pixel(at, shade))
        .collect();
    encoder
        .write_header()
        .unwrap()
        .write_image_data(&pixels)
        .unwrap();
}
