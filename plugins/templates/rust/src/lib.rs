//! hello: a plugin with one kind of stage, which estimates pi from random points.
use retort_abi::*;
use serde_json::json;

struct Points;

impl Plugin for Points {
    fn describe(&self) -> Description {
        let options = json!({
            "rounds": {"type": "integer", "minimum": 1, "default": 100, "description": "rounds of 100000 points each"}
        });
        let schema =
            json!({"type": "object", "additionalProperties": false, "properties": options});
        let about = json!({
            "name": "hello", "version": env!("CARGO_PKG_VERSION"), "license": "MIT",
            "summary": "estimates pi from random points", "devices": ["cpu"], "dtypes": ["f32"],
            "stages": [{"kind": "hello", "summary": "estimates pi", "output": "number", "schema": schema}]
        });
        serde_json::from_value(about).expect("a description")
    }
    fn probe(&self, _host: &dyn Host) -> Result<Vec<Device>, Failure> {
        Ok(vec![Device::named("cpu")])
    }
    fn validate(&self, _host: &dyn Host, _job: &StageJob) -> Result<Vec<Diagnostic>, Failure> {
        Ok(Vec::new()) // checks that the schema cannot express belong here
    }
    fn run(&self, host: &dyn Host, job: &StageJob) -> Result<StageResult, Failure> {
        let rounds = job.options["rounds"].as_u64().unwrap_or(100);
        let (mut inside, mut pi) = (0, 0.0);
        for round in 0..rounds {
            host.check_cancelled()?;
            let points = (round * 100_000..(round + 1) * 100_000)
                .map(|i| (uniform(job.seed, 2 * i), uniform(job.seed, 2 * i + 1)));
            inside += points.filter(|(x, y)| x * x + y * y < 1.0).count();
            pi = 4.0 * inside as f64 / (100_000 * (round + 1)) as f64;
            host.metric("pi", round, pi);
            host.progress(round + 1, rounds, "rounds");
        }
        let draft = ArtifactDraft::begin(host, "number", "pi")?;
        std::fs::write(
            draft.path().join("number.json"),
            json!({"pi": pi}).to_string(),
        )?;
        let table = Table::new("An estimate", &["name", "value"]).row(["pi".into(), pi.into()]);
        let output = draft.commit(&ArtifactMeta::from(table))?;
        let summary = json!({"pi": pi});
        Ok(StageResult { output, summary })
    }
}

/// A number in [0, 1) that depends on seed and index alone (splitmix64): equal seeds give equal results.
fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

export_plugin!(Points);
