//! A GPU's throughput at published shapes, with random weights: the output of `make gpu-bench`.
//!
//! Images (pairs, steps) per second of each phase at several batches, the share of the GPU's own rate in a large bf16
//! product, and PyTorch's figures for the same shapes on the same GPU (`tests/peers/speed.py`), eager and compiled, in the mode
//! that COMPILE names: `max-autotune`, or `reduce-overhead`, which takes less time, or `none`. Unlike `speed.rs`, which waits
//! after each part to time it separately, a phase here runs as in a stage, without waiting before its end.

use std::collections::BTreeMap;

use retort_engine::backend::{Backend, FlowSolver};
use retort_engine::bundle::Family;
use retort_engine::error::{Error, Result};
use retort_engine::random::{noise, noises};
use retort_engine::sampler::{Choice, Distribution, StudentSampler, autoregressive, choices};
use retort_engine::tape::Variable;
use retort_engine::weights::{Loader, ParameterSource};

use crate::speed::{BackendRun, Drawn, Peer, Phase, Reference, least};

const BATCHES: [usize; 3] = [1, 16, 64];
const SOLVER: FlowSolver = FlowSolver {
    steps: retort_engine::backend::flow::STEPS,
};
/// The side of the matrices whose product measures the GPU's rate.
const SIDE: usize = 8192;

/// A phase, which parts of `speed.rs` it runs how often, and PyTorch's name for it.
struct TimedPhase {
    name: &'static str,
    unit: &'static str,
    work: (Phase, f64),
    peer: Option<&'static str>,
    seconds: f64,
}

/// Prints the table of a backend that computes products in bf16, of the shapes whose title ("VAR-d16, batch 16") holds
/// `only`. `python` names a Python with torch on the same GPU.
pub fn report<B: Backend>(backend: B, python: Option<&str>, only: &str) -> Result<()> {
    let on = BackendRun {
        name: "cuda".into(),
        backend,
    };
    let rate = peak(&on)?;
    println!(
        "{:.0} TFLOP/s in a bf16 product of {SIDE} x {SIDE} matrices",
        rate / 1e12
    );
    println!(
        "{:<44}{:>12}{:>12}{:>8}{:>12}{:>10}{:>12}{:>10}",
        "", "per second", "seconds", "peak", "PyTorch", "faster", "compiled", "faster"
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
            let peers = match python {
                Some(python) => peers(python, key, batch),
                None => Default::default(),
            };
            for t in &timed {
                let flop = reference.work(t.work.0).0 * t.work.1;
                let others = peers.each_ref().map(|peer| {
                    let other = t.peer.and_then(|key| peer.get(key));
                    other.map_or_else(
                        || format!("{:>12}{:>10}", "-", "-"),
                        |other| format!("{other:>12.4}{:>9.2}x", other / t.seconds),
                    )
                });
                println!(
                    "{:<44}{:>12.2}{:>12.4}{:>7.1}%{}",
                    format!("{title}: {} ({})", t.name, t.unit),
                    match t.unit {
                        "steps" => 1.0 / t.seconds,
                        _ => batch as f64 / t.seconds,
                    },
                    t.seconds,
                    100.0 * flop / t.seconds / rate,
                    others.concat()
                );
            }
            if let Some(seconds) = peers[1].get("compile") {
                println!("{title}: PyTorch took {seconds:.0} s to compile");
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
fn peak<B: Backend>(on: &BackendRun<B>) -> Result<f64> {
    // Random numbers: constant ones take less power, and so less time.
    let x = on.backend.floats(&noise(4, 0, SIDE, SIDE), &[SIDE, SIDE])?;
    let x = B::factor(&x)?;
    let seconds = least(|| {
        let mut y = B::linear(&x, &x, None)?;
        for _ in 1..10 {
            y = B::linear(&x, &x, None)?;
        }
        BackendRun::<B>::wait(&y)
    })?;
    Ok(10.0 * 2.0 * (SIDE as f64).powi(3) / seconds)
}

fn phases<B: Backend>(on: &BackendRun<B>, r: &Reference, drawn: &Drawn) -> Result<Vec<TimedPhase>> {
    let frozen = |weights| Loader::new(&on.backend, ParameterSource::Host(weights), false, "drawn");
    let tokenizer = r.tokenizer.build(&mut frozen(&drawn.tokenizer))?;
    let codebook = tokenizer.codebook()?;
    let (eps, labels, _) = on.inputs(r)?;
    let (b, shape) = (r.batch, r.network.token_shape());
    let (steps, half) = (shape.steps.len(), shape.steps.len() / 2);
    let distribution = Distribution {
        guidance: Some(2.0),
        ..Default::default()
    };
    let mut timed = Vec::new();
    let mut time = |name, unit, work, peer, seconds| {
        timed.push(TimedPhase {
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
                &noises(2, 0..b as u64, shape.count(), shape.dim),
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
            let seconds = least(|| BackendRun::<B>::wait(&sampler.sample(&eps, &labels, &times)?))?;
            let peer = (passes == 1.0).then_some("student");
            time(name, "images", (Phase::Student, passes), peer, seconds);
        }
    }
    let latents = Variable::constant(eps.clone());
    let decoding = least(|| BackendRun::<B>::wait(tokenizer.decode(&latents)?.value()))?;
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

/// Seconds of PyTorch by phase, in bf16 by autocast: eager, and compiled. None if it fails, with a message.
fn peers(python: &str, family: &str, batch: usize) -> [BTreeMap<String, f64>; 2] {
    let mode = std::env::var("COMPILE").unwrap_or_else(|_| "max-autotune".into());
    let seconds = |compile: Option<String>| {
        let peer = Peer {
            python: python.into(),
            dtype: "bf16",
            threads: 8,
            compile,
        };
        let phases = ["teacher", "student", "decode", "train"];
        let times = peer.run("cuda", family, batch, &phases);
        times.unwrap_or_else(|why| {
            eprintln!("PyTorch: {family}, batch {batch}: {why}");
            BTreeMap::new()
        })
    };
    let compiled = match mode.as_str() {
        "none" => BTreeMap::new(),
        _ => seconds(Some(mode)),
    };
    [seconds(None), compiled]
}
