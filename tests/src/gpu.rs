//! A backend on a GPU: the checks of `make gpu-check` and the times of `make gpu-bench`, as a program for each plugin.

use std::process::ExitCode;

use retort_candle::Candle;
use retort_engine::backend::Backend;
use retort_engine::conformance::{self, Case};
use retort_engine::error::{Error, Result};

use crate::golden;
use crate::{agreement, ranks, throughput};

/// Largest errors of tensors, relative to their largest magnitude.
const SINGLE: f64 = 1e-3;
/// The share of tokens that may differ from the CPU's.
const TOKENS: f64 = 0.01;

/// The program: `check [PART]` runs the examinations whose name holds PART, `bench [PART]` the lines of the table that
/// begin with shapes whose title holds PART.
///
/// `open` opens the GPU with a dtype. On the GPU's machine nothing else is needed but the libraries of CUDA and, to
/// compare speeds, a Python with torch (named by PYTHON). Where there is no GPU it says so and succeeds, unless
/// RETORT_GPU says that there has to be one. `join` lets processes exchange gradients: `rank INDEX SIZE` is one of them, which
/// `check` starts.
pub fn main<B: Backend>(open: impl Fn(&str) -> Result<B>, join: ranks::Join<B>) -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    if command == "rank" {
        return ranks::rank(open, join, arguments);
    }
    if !matches!(command.as_str(), "check" | "bench") {
        eprintln!("usage: check [PART OF A NAME] | bench [PART OF A TITLE]");
        return ExitCode::from(2);
    }
    let only = arguments.next().unwrap_or_default();
    let single = match open("f32") {
        Ok(gpu) => gpu,
        Err(why) if std::env::var_os("RETORT_GPU").is_none() => {
            eprintln!("{command}: skipped, nothing ran on a GPU: {why}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("{command}: {why}");
            return ExitCode::FAILURE;
        }
    };
    let done = open("bf16").and_then(|half| match command.as_str() {
        "check" => check(&single, &half, &only),
        _ => {
            let python = std::env::var("PYTHON").ok();
            throughput::report(half, python.as_deref(), &only).map(|()| true)
        }
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{command}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the examinations whose name contains `only`. Returns whether all passed.
fn check<B: Backend>(single: &B, half: &B, only: &str) -> Result<bool> {
    let (mut passed, mut ran) = (true, 0);
    let mut examine = |what: &str, cases: &dyn Fn() -> Result<Vec<Case>>| {
        if !what.contains(only) {
            return;
        }
        ran += 1;
        let good = match cases() {
            Ok(cases) => golden::report(what, &cases),
            Err(error) => {
                println!("{what}: {error}");
                false
            }
        };
        println!("{} {what}", if good { "passed" } else { "FAILED" });
        passed &= good;
    };
    let cpu = || Candle::open("cpu", "f32", 0);
    let rounding = 2f64.powi(-8);
    examine("operations in f32", &|| Ok(conformance::check(single)));
    examine("operations in bf16", &|| {
        Ok(conformance::check_rounded(half, rounding))
    });
    examine("published results in f32", &|| {
        golden::published(single, SINGLE)
    });
    examine("published results in bf16", &|| {
        golden::published_rounded(half)
    });
    examine("measuring networks", &|| {
        conformance::golden::measures(single, &golden::folder())
    });
    examine("agreement with the CPU", &|| {
        agreement::compare(&cpu()?, single)
    });
    examine("tokens of trajectories", &|| {
        Ok(vec![agreement::tokens(&cpu()?, single, TOKENS)?])
    });
    examine("ranks that exchange gradients", &ranks::cases);
    examine("running out of memory", &|| Ok(vec![memory(single)?]));
    if ran == 0 {
        return Err(Error::option(
            "",
            format!("no examination has {only:?} in its name"),
        ));
    }
    Ok(passed)
}

/// Allocating more memory than available gives a clear error, after which the GPU works as before. The backend knew how much
/// was available.
fn memory<B: Backend>(gpu: &B) -> Result<Case> {
    let free = gpu.free_memory();
    let mut kept = Vec::new();
    let refused = loop {
        match gpu.full(&[1 << 28], 1.0) {
            Ok(x) => kept.push(x),
            Err(error) => break error,
        }
    };
    println!(
        "refused after {} GiB of {free:?} bytes: {refused}",
        kept.len()
    );
    let known = free.is_some_and(|free| free > 0 && kept.len() as u64 <= free >> 30);
    drop(kept);
    let again = gpu.full(&[1 << 20], 1.0).and_then(|x| B::to_floats(&x));
    let good = known
        && matches!(refused, Error::OutOfMemory(_))
        && again.is_ok_and(|x| x.iter().all(|&x| x == 1.0));
    let error = if good { 0.0 } else { 1.0 };
    Ok(Case::new("refused, and goes on".into(), error, 0.0))
}
