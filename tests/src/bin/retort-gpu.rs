//! The CUDA variant of the candle plugin on a GPU: `retort-gpu check` examines it, `retort-gpu bench` times it.
//!
//! Built by `make gpu-check`, here or on another machine; on the GPU's machine it needs nothing but the libraries of CUDA
//! and, to compare speeds, a Python with torch (named by PYTHON). Where there is no GPU both say so and succeed, unless
//! RETORT_GPU says that there has to be one.

use std::process::ExitCode;

use retort_candle::{Candle, Cuda};
use retort_engine::backend::Backend;
use retort_engine::conformance::{self, Case};
use retort_engine::error::{Error, Result};
use retort_tests::golden::{self, TOLERANCE};
use retort_tests::{agreement, throughput};

/// Largest errors of tensors, relative to their largest magnitude.
const SINGLE: f64 = 1e-3;
const HALF: f64 = 2e-2;
/// Share of tokens that may be others than on the CPU.
const TOKENS: f64 = 0.01;

fn main() -> ExitCode {
    let command = std::env::args().nth(1).unwrap_or_default();
    match open("f32") {
        Ok(_) => {}
        Err(why) if std::env::var_os("RETORT_GPU").is_none() => {
            eprintln!("retort-gpu {command}: skipped, nothing ran on a GPU: {why}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("retort-gpu {command}: {why}");
            return ExitCode::FAILURE;
        }
    }
    let done = match command.as_str() {
        "check" => check(),
        "bench" => {
            let python = std::env::var("PYTHON").ok();
            open("bf16").and_then(|gpu| throughput::report(gpu, python.as_deref()).map(|()| true))
        }
        _ => {
            eprintln!("usage: retort-gpu check|bench");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("retort-gpu {command}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn open(dtype: &str) -> Result<Cuda> {
    Cuda::open("cuda", dtype, 0)
}

/// Runs every examination and says whether all were passed.
fn check() -> Result<bool> {
    let cpu = Candle::open("cpu", "f32", 0)?;
    let mut passed = true;
    let mut examine = |what: &str, cases: Vec<Case>| {
        let good = golden::report(what, &cases);
        println!("{} {what}", if good { "passed" } else { "FAILED" });
        passed &= good;
    };
    let (single, half) = (open("f32")?, open("bf16")?);
    examine("operations in f32", conformance::check(&single));
    let rounding = 2f64.powi(-8);
    examine(
        "operations in bf16",
        conformance::check_rounded(&half, rounding),
    );
    for (what, gpu, tolerance) in [("f32", &single, SINGLE), ("bf16", &half, HALF)] {
        let mut cases = conformance::golden::models(gpu, &golden::folder())?;
        if what == "bf16" {
            // Tokens of rounded logits are others where two are close: the CPU's are compared below.
            cases.retain(|case| case.tolerance > 0.0);
        }
        for case in &mut cases {
            if case.tolerance == TOLERANCE {
                *case = Case::new(std::mem::take(&mut case.name), case.error, tolerance);
            }
        }
        examine(&format!("published results in {what}"), cases);
    }
    let measures = conformance::golden::measures(&single, &golden::folder())?;
    examine("measuring networks", measures);
    examine("agreement with the CPU", agreement::compare(&cpu, &single)?);
    examine(
        "tokens of trajectories",
        vec![agreement::tokens(&cpu, &single, TOKENS)?],
    );
    examine("want of memory", vec![memory(&single)?]);
    Ok(passed)
}

/// More memory than there is is an error that names itself, after which the GPU goes on as before.
fn memory(gpu: &Cuda) -> Result<Case> {
    let mut kept = Vec::new();
    let refused = loop {
        match gpu.full(&[1 << 28], 1.0) {
            Ok(x) => kept.push(x),
            Err(error) => break error,
        }
    };
    println!("refused after {} GiB: {refused}", kept.len());
    drop(kept);
    let again = gpu.full(&[1 << 20], 1.0).and_then(|x| Cuda::to_floats(&x));
    let good = matches!(refused, Error::OutOfMemory(_))
        && again.is_ok_and(|x| x.iter().all(|&x| x == 1.0));
    let error = if good { 0.0 } else { 1.0 };
    Ok(Case::new("refused, and goes on".into(), error, 0.0))
}
