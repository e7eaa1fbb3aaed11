//! Parity with the published PyTorch code: one suite for every backend.
//!
//! `golden/` holds results computed with the published code on the CPU in float32; the weights are procedural and are
//! made here. Every tensor must agree within 1e-4 of its largest magnitude, every token exactly.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use retort_engine::backend::{Backend, FlowSolver};
use retort_engine::model::{Student, Teacher, Tokenizer, llamagen, vq};
use retort_engine::sampler::{Choice, Distribution, StudentSampler, autoregressive, choices};
use retort_engine::tape::Var;
use retort_engine::weights::{self, Floats, Loader, Source, Weights};
use retort_engine::{Error, Result};
use safetensors::SafeTensors;
use serde_json::Value;

/// Largest allowed error, relative to the largest magnitude of the tensor.
pub const TOLERANCE: f64 = 1e-4;

/// One compared tensor.
#[derive(Debug)]
pub struct Row {
    /// Network and tensor.
    pub name: String,
    /// Largest difference relative to the largest magnitude; for tokens, the share that differs.
    pub error: f64,
    /// Largest allowed error.
    pub tolerance: f64,
}

/// Prints the table and says whether every row is within its tolerance.
pub fn report(backend: &str, rows: &[Row]) -> bool {
    for row in rows {
        let verdict = if row.error <= row.tolerance {
            "ok"
        } else {
            "FAILED"
        };
        println!(
            "{backend:<10} {:<44} {:>10.2e} {verdict}",
            row.name, row.error
        );
    }
    !rows.is_empty() && rows.iter().all(|row| row.error <= row.tolerance)
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(name)
}

/// Expected tensors of a file.
struct Expected {
    bytes: Vec<u8>,
}

impl Expected {
    fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            bytes: std::fs::read(path).map_err(Error::io(path))?,
        })
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("a safetensors file")
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).expect(name).shape().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        weights::floats(&self.file().tensor(name).expect(name)).expect("floats")
    }

    fn indices(&self, name: &str) -> Vec<u32> {
        weights::indices(&self.file().tensor(name).expect(name)).expect("indices")
    }
}

/// The suite under way.
struct Suite<'b, B: Backend> {
    backend: &'b B,
    network: &'static str,
    expected: Expected,
    rows: Vec<Row>,
}

impl<B: Backend> Suite<'_, B> {
    fn tensor(&self, name: &str) -> Result<B::Tensor> {
        self.backend
            .floats(&self.expected.floats(name), &self.expected.shape(name))
    }

    fn floats(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        assert_eq!(
            B::shape(found),
            self.expected.shape(name),
            "shape of {name}"
        );
        let (found, expected) = (B::to_floats(found)?, self.expected.floats(name));
        let scale = expected
            .iter()
            .fold(0.0f64, |m, x| m.max(f64::from(x.abs())));
        let difference = found
            .iter()
            .zip(&expected)
            .fold(0.0f64, |m, (a, b)| m.max(f64::from((a - b).abs())));
        self.rows.push(Row {
            name: format!("{}/{name}", self.network),
            error: difference / scale,
            tolerance: TOLERANCE,
        });
        Ok(())
    }

    fn tokens(&mut self, name: &str, found: &B::Tensor) -> Result<()> {
        let (found, expected) = (B::to_indices(found)?, self.expected.indices(name));
        assert_eq!(found.len(), expected.len(), "number of {name}");
        let differing = found.iter().zip(&expected).filter(|(a, b)| a != b).count();
        let error = differing as f64 / found.len() as f64;
        self.rows.push(Row {
            name: format!("{}/{name}", self.network),
            error,
            tolerance: 0.0,
        });
        Ok(())
    }
}

/// Compares the flow map with the float64 reference on every case of `golden/flow`.
pub fn flow<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for case in ["small", "llamagen", "topk", "var"] {
        let expected = Expected::open(&folder("flow").join(format!("flow_{case}.safetensors")))?;
        let mut suite = Suite {
            backend,
            network: "flow",
            expected,
            rows: Vec::new(),
        };
        let [logits, noise, codebook] =
            ["logits", "noise", "codebook"].map(|name| suite.tensor(name));
        let ids = B::flow_map(&logits?, &noise?, &codebook?, &FlowSolver { steps: 16 })?;
        suite.tokens("token", &ids)?;
        rows.extend(suite.rows.into_iter().map(|r| Row {
            name: format!("flow/{case}/token"),
            ..r
        }));
    }
    Ok(rows)
}

/// Compares teacher, student, samplers and tokenizer of LlamaGen.
pub fn llamagen<B: Backend>(backend: &B) -> Result<Vec<Row>> {
    let dir = folder("llamagen");
    let text = std::fs::read_to_string(dir.join("config.json")).map_err(Error::io(&dir))?;
    let config: Value = serde_json::from_str(&text).map_err(|e| Error::data(&dir, e))?;
    let number = |name: &str| config[name].as_u64().expect(name) as usize;
    let list = |name: &str| -> Vec<usize> {
        let sizes = config[name].as_array().expect(name).iter();
        sizes
            .map(|x| x.as_u64().expect("a size") as usize)
            .collect()
    };
    let all = procedural_weights(&dir.join("weights.json"))?;
    let load = |part: &str| Loader::new(backend, Source::Host(&all[part]), false, part.to_owned());

    let side = number("block_size").isqrt();
    let network = llamagen::Config {
        width: number("dim"),
        depth: number("n_layer"),
        heads: number("n_head"),
        vocabulary: number("vocab_size"),
        codebook_dim: number("codebook_dim"),
        side,
        classes: number("num_classes"),
    };
    let multipliers = list("ch_mult");
    let tokenizer = vq::Config {
        image_channels: 3,
        image_size: side << (multipliers.len() - 1),
        channels: 128,
        multipliers,
        res_blocks: 2,
        norm_groups: 32,
        z_channels: number("z_channels"),
        vocabulary: number("vocab_size"),
        codebook_dim: number("codebook_dim"),
        l2_norm: true,
    };
    let teacher = llamagen::Gpt::load(&mut load("gpt"), &network)?;
    let student = llamagen::GptStudent::load(&mut load("dd"), &network)?;
    let tokenizer = vq::VqModel::load(&mut load("vq"), &tokenizer)?;
    let codebook = tokenizer.codebook()?;

    let expected = Expected::open(&dir.join("expected.safetensors"))?;
    let mut suite = Suite {
        backend,
        network: "llamagen",
        expected,
        rows: Vec::new(),
    };
    let classes = suite.expected.indices("labels");
    let n = classes.len();
    let labels = backend.indices(&classes, &[n])?;
    let uncond = backend.indices(&vec![network.classes as u32; n], &[n])?;
    let decode = |latents: B::Tensor| tokenizer.decode(&Var::constant(latents));

    // Teacher-forced logits.
    let shape = suite.expected.shape("forced.tokens");
    let tokens = backend.indices(&suite.expected.indices("forced.tokens"), &shape)?;
    suite.floats("forced.logits", teacher.forced(&labels, &tokens)?.value())?;
    suite.floats(
        "forced.logits_uncond",
        teacher.forced(&uncond, &tokens)?.value(),
    )?;

    // Greedy AR generation with guidance.
    let steps = teacher.tokens().steps.len();
    let guidance = f64::from(suite.expected.floats("greedy.cfg")[0]);
    let greedy = Distribution {
        guidance,
        top_k: 1,
        ..Default::default()
    };
    let mut sequences = choices(0, 0, n);
    let ids = autoregressive(
        &teacher,
        &classes,
        &greedy,
        &mut Choice::Random(&mut sequences),
        None,
        steps,
    )?;
    suite.tokens("greedy.tokens", &ids)?;
    suite.floats("greedy.image", decode(B::rows(&codebook, &ids)?)?.value())?;

    // Trajectories under guidance.
    let noise = suite.tensor("student.noise")?;
    for w in ["1.0", "2.0"] {
        let distribution = Distribution {
            guidance: w.parse().expect("a number"),
            ..Default::default()
        };
        let solver = FlowSolver { steps: 16 };
        let mut choice = Choice::Flow {
            noise: &noise,
            codebook: &codebook,
            solver,
        };
        let ids = autoregressive(&teacher, &classes, &distribution, &mut choice, None, steps)?;
        suite.tokens(&format!("trajectory.cfg{w}.tokens"), &ids)?;
        suite.floats(
            &format!("trajectory.cfg{w}.image"),
            decode(B::rows(&codebook, &ids)?)?.value(),
        )?;
    }

    // Student passes, one and two steps, assisted.
    let middle = number("t_mid");
    let l = student.tokens().tokens();
    for t in [0, middle] {
        let x = suite.tensor(&format!("student.t{t}.input"))?;
        let data: Vec<u32> = (0..n * l).map(|i| u32::from(i % l < t)).collect();
        let prediction = student.predict(&x, &labels, &backend.indices(&data, &[n, l])?)?;
        suite.floats(&format!("student.t{t}.logits"), prediction.logits.value())?;
        suite.floats(
            &format!("student.t{t}.continuous"),
            student.continuous(&prediction)?.value(),
        )?;
    }
    let split = number("split_t");
    let sampler = StudentSampler {
        student: &student,
        codebook: &codebook,
        split,
    };
    for (name, timesteps) in [("one_step", vec![0]), ("two_step", vec![0, middle])] {
        let latents = sampler.sample(&noise, &labels, &timesteps)?;
        suite.floats(&format!("{name}.latents"), &latents)?;
        suite.floats(&format!("{name}.image"), decode(latents)?.value())?;
    }
    let greedy = Distribution {
        guidance: 2.0,
        top_k: 1,
        ..Default::default()
    };
    let mut sequences = choices(0, 0, n);
    let start = number("t_teacher_start");
    let both = (&labels, classes.as_slice());
    let mut choice = Choice::Random(&mut sequences);
    let (latents, prefix) = sampler.assisted(
        &noise,
        both,
        [0, middle],
        &teacher,
        start,
        &greedy,
        &mut choice,
    )?;
    suite.floats("assisted.prefix_latents", &prefix)?;
    suite.floats("assisted.latents", &latents)?;
    suite.floats("assisted.image", decode(latents)?.value())?;

    // Tokenizer.
    let image = suite.tensor("tokenizer.image")?;
    let ids = tokenizer.encode(&image)?;
    suite.tokens("tokenizer.tokens_of_image", &ids)?;
    suite.floats(
        "tokenizer.image_of_tokens",
        decode(B::rows(&codebook, &tokens)?)?.value(),
    )?;
    Ok(suite.rows)
}

/// Weights by their recipe: element i is scale * (2u - 1) + shift, u from SplitMix64 started at the seed.
fn procedural_weights(path: &Path) -> Result<BTreeMap<String, Weights>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let parts: BTreeMap<String, Vec<Value>> =
        serde_json::from_str(&text).map_err(|e| Error::data(path, e))?;
    let floats = |spec: &Value| {
        let shape: Vec<usize> = spec["shape"]
            .as_array()
            .expect("shape")
            .iter()
            .map(|x| x.as_u64().expect("a size") as usize)
            .collect();
        let seed = spec["seed"].as_u64().expect("seed");
        let (scale, shift) = (
            spec["scale"].as_f64().expect("scale"),
            spec["shift"].as_f64().expect("shift"),
        );
        let data = (0..shape.iter().product::<usize>() as u64).map(|i| {
            let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let u = ((z ^ (z >> 31)) >> 40) as f64 * 2f64.powi(-24);
            (scale * (2.0 * u - 1.0) + shift) as f32
        });
        Floats {
            data: data.collect(),
            shape,
        }
    };
    let named = |specs: &Vec<Value>| {
        specs
            .iter()
            .map(|s| (s["name"].as_str().expect("name").to_owned(), floats(s)))
            .collect()
    };
    Ok(parts
        .iter()
        .map(|(part, specs)| (part.clone(), named(specs)))
        .collect())
}
