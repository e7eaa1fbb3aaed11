//! What a GPU gets done at published shapes, with random weights: what `make gpu-bench` prints.
//!
//! Images (pairs, steps) per second of each phase at several batches, the share of the GPU's own rate in a large bf16
//! product, and PyTorch's figures for the same shapes on the same GPU (`tests/peers/speed.py`). Unlike `speed.rs`, which
//! waits after each part to tell them apart, a phase here runs as it does in a stage: nobody waits before it is done.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use retort_engine::backend::{Backend, FlowSolver};
use retort_engine::bundle::Family;
use retort_engine::error::{Error, Result};
use retort_engine::random::{noise, noises};
use retort_engine::sampler::{Choice, Distribution, StudentSampler, autoregressive, choices};
use retort_engine::tape::Var;
use retort_engine::weights::{Loader, Source};

use crate::golden;
use crate::speed::{Drawn, On, Phase, Reference, least};

const BATCHES: [usize; 3] = [1, 16, 64];
const SOLVER: FlowSolver = FlowSolver {
    steps: retort_engine::flow::STEPS,
};
/// Side of the matrices whose product measures the GPU's rate.
const SIDE: usize = 8192;

/// A phase, what of `speed.rs` it does how often, and PyTorch's name for that.
struct Timed {
    name: &'static str,
    unit: &'static str,
    work: (Phase, f64),
    peer: Option<&'static str>,
    seconds: f64,
}

/// Prints the table of a backend that computes products in bf16, of the shapes whose title ("VAR-d16, batch 16") holds
/// `only`. `python` names a Python with torch on the same GPU.
pub fn report<B: Backend>(backend: B, python: Option<&str>, only: &str) -> Result<()> {
    let on = On {
        name: "cuda".into(),
        backend,
    };
    let rate = peak(&on)?;
    println!(
        "{:.0} TFLOP/s in a bf16 product of {SIDE} x {SIDE} matrices",
        rate / 1e12
    );
    println!(
        "{:<44}{:>12}{:>12}{:>8}{:>12}{:>10}",
        "", "per second", "seconds", "peak", "PyTorch", "faster"
    );
    for (family, name, size, key) in [
        (Family::Llamagen, "LlamaGen-L", "L", "llamagen-L"),
        (Family::Var, "VAR-d16", "d16", "var"),
    ] {
        let title = |batch: usize| format!("{name}, batch {batch}");
        let batches: Vec<usize> = BATCHES
            .into_iter()
            .filter(|&batch| title(batch).contains(only))
            .collect();
        if batches.is_empty() {
            continue;
        }
        let drawn = Drawn::new(&Reference::new(family, name, size, 1)?)?;
        for batch in batches {
            let title = title(batch);
            let reference = Reference::new(family, name, size, batch)?;
            let timed = match phases(&on, &reference, &drawn) {
                Ok(timed) => timed,
                Err(Error::OutOfMemory(why)) => {
                    println!("{title}: out of memory ({why})");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let peer = match python {
                Some(python) => peer(python, key, batch)?,
                None => BTreeMap::new(),
            };
            for t in &timed {
                let flop = reference.work(t.work.0).0 * t.work.1;
                let other = t.peer.and_then(|key| peer.get(key));
                let other = other.map_or(["-".to_owned(), "-".to_owned()], |other| {
                    [format!("{other:.4}"), format!("{:.2}x", other / t.seconds)]
                });
                println!(
                    "{:<44}{:>12.2}{:>12.4}{:>7.1}%{:>12}{:>10}",
                    format!("{title}: {} ({})", t.name, t.unit),
                    match t.unit {
                        "steps" => 1.0 / t.seconds,
                        _ => batch as f64 / t.seconds,
                    },
                    t.seconds,
                    100.0 * flop / t.seconds / rate,
                    other[0],
                    other[1]
                );
            }
            println!(
                "{title}: one step is {:.0} times as fast as the teacher",
                timed[0].seconds / timed[2].seconds
            );
        }
    }
    Ok(())
}

/// Operations per second in a large product of bf16 matrices.
fn peak<B: Backend>(on: &On<B>) -> Result<f64> {
    // Numbers at random: constant ones take less power, and so less time.
    let x = on.backend.floats(&noise(4, 0, SIDE, SIDE), &[SIDE, SIDE])?;
    let x = B::factor(&x)?;
    let seconds = least(|| {
        let mut y = B::linear(&x, &x, None)?;
        for _ in 1..10 {
            y = B::linear(&x, &x, None)?;
        }
        On::<B>::wait(&y)
    })?;
    Ok(10.0 * 2.0 * (SIDE as f64).powi(3) / seconds)
}

fn phases<B: Backend>(on: &On<B>, r: &Reference, drawn: &Drawn) -> Result<Vec<Timed>> {
    let frozen = |weights| Loader::new(&on.backend, Source::Host(weights), false, "drawn");
    let tokenizer = r.tokenizer.build(&mut frozen(&drawn.tokenizer))?;
    let codebook = tokenizer.codebook()?;
    let (eps, labels, _) = on.inputs(r)?;
    let (b, shape) = (r.batch, r.network.tokens());
    let (steps, half) = (shape.steps.len(), shape.steps.len() / 2);
    let distribution = Distribution {
        guidance: Some(2.0),
        ..Default::default()
    };
    let mut timed = Vec::new();
    let mut time = |name, unit, work, peer, seconds| {
        timed.push(Timed {
            name,
            unit,
            work,
            peer,
            seconds,
        });
    };
    {
        let codes = (&r.tokenizer, &mut frozen(&drawn.tokenizer));
        let teacher = r.network.teacher(&mut frozen(&drawn.teacher), codes)?;
        let drawing = least(|| {
            let mut sequences = choices(1, 0, b);
            let mut choice = Choice::Random(&mut sequences);
            let ids = autoregressive(&*teacher, &labels, &distribution, &mut choice, None, steps)?;
            B::to_indices(&ids).map(drop)
        })?;
        time(
            "teacher",
            "images",
            (Phase::Teacher, 1.0),
            Some("teacher"),
            drawing,
        );
        let pairing = least(|| {
            let fresh = on.backend.floats(
                &noises(2, 0..b as u64, shape.tokens(), shape.dim),
                &B::shape(&eps),
            )?;
            let mut choice = Choice::Flow {
                noise: &fresh,
                codebook: &codebook,
                solver: SOLVER,
            };
            let ids = autoregressive(&*teacher, &labels, &distribution, &mut choice, None, steps)?;
            B::to_indices(&ids).map(drop)
        })?;
        time(
            "trajectories",
            "pairs",
            (Phase::Teacher, 1.0),
            None,
            pairing,
        );
    }
    {
        let student = r.network.student(&mut frozen(&drawn.student))?;
        let sampler = StudentSampler {
            student: &*student,
            codebook: &codebook,
            split: half,
        };
        for (name, times, passes) in [("1 step", vec![0], 1.0), ("2 steps", vec![0, half], 2.0)] {
            let seconds = least(|| On::<B>::wait(&sampler.sample(&eps, &labels, &times)?))?;
            let peer = (passes == 1.0).then_some("student");
            time(name, "images", (Phase::Student, passes), peer, seconds);
        }
    }
    let latents = Var::constant(eps.clone());
    let decoding = least(|| On::<B>::wait(tokenizer.decode(&latents)?.value()))?;
    time(
        "decode",
        "images",
        (Phase::Decode, 1.0),
        Some("decode"),
        decoding,
    );
    let training = on.train(r, drawn)?;
    time(
        "training step",
        "steps",
        (Phase::Train, 1.0),
        Some("train"),
        training,
    );
    Ok(timed)
}

/// Seconds of PyTorch by phase, in bf16 by autocast.
fn peer(python: &str, family: &str, batch: usize) -> Result<BTreeMap<String, f64>> {
    let script = golden::folder().with_file_name("peers").join("speed.py");
    let output = Command::new(python)
        .arg(&script)
        .args([family, "bf16", &batch.to_string(), "8"])
        .args(["teacher", "student", "decode", "train"])
        .env("DEVICE", "cuda")
        .stderr(Stdio::inherit())
        .output()
        .map_err(Error::io(Path::new(python)))?;
    if !output.status.success() {
        eprintln!("PyTorch: {family}, batch {batch}: {}", output.status);
        return Ok(BTreeMap::new());
    }
    serde_json::from_slice(&output.stdout).map_err(|e| Error::data(&script, e.to_string()))
}
