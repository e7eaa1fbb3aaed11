//! Processes that exchange gradients on a GPU like the ranks of a training: this program again, once per rank.

use std::process::{Command, ExitCode};

use retort_abi::Part;
use retort_engine::backend::Backend;
use retort_engine::collective::Collective;
use retort_engine::conformance::Case;
use retort_engine::error::{Error, Result};

use crate::port::HeldPort;

/// Connects to the other ranks.
pub type Join<B> = fn(&B, Part) -> Result<Box<dyn Collective>>;

/// One process alone, and two that share the GPU. A real NCCL may refuse the latter, which is reported, and is not a failure.
pub(crate) fn cases() -> Result<Vec<Case>> {
    let emulated = std::env::var("RETORT_GPU").is_ok_and(|gpu| gpu == "emulated");
    let mut cases = Vec::new();
    for size in [1, 2] {
        match together(size)? {
            None => cases.push(Case::new(format!("{size} ranks"), 0.0, 0.0)),
            Some(why) if size > 1 && !emulated => {
                println!("{size} ranks do not share this GPU: {why}");
            }
            Some(why) => {
                println!("{size} ranks: {why}");
                cases.push(Case::new(format!("{size} ranks"), 1.0, 0.0));
            }
        }
    }
    Ok(cases)
}

/// Runs `size` ranks; the error has their output.
fn together(size: usize) -> Result<Option<String>> {
    let system =
        |error: std::io::Error| Error::Internal(format!("ranks cannot be started: {error}"));
    let port = HeldPort::take();
    let program = std::env::current_exe().map_err(system)?;
    let mut ranks = Vec::new();
    for index in 0..size {
        let rank = Command::new(&program)
            .args(["rank", &index.to_string(), &size.to_string()])
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.number().to_string())
            .env("RETORT_RANK_TIMEOUT", "60")
            .stderr(std::process::Stdio::piped())
            .spawn();
        ranks.push(rank.map_err(system)?);
    }
    let mut faults = Vec::new();
    for rank in ranks {
        let output = rank.wait_with_output().map_err(system)?;
        if !output.status.success() {
            faults.push(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
    }
    Ok((!faults.is_empty()).then(|| faults.join("; ")))
}

/// The program of one rank: its part of the exchange.
pub(crate) fn rank<B: Backend>(
    open: impl Fn(&str) -> Result<B>,
    join: Join<B>,
    mut arguments: impl Iterator<Item = String>,
) -> ExitCode {
    let mut number = || arguments.next().and_then(|text| text.parse().ok());
    let (Some(index), Some(of)) = (number(), number()) else {
        eprintln!("usage: rank INDEX SIZE");
        return ExitCode::from(2);
    };
    let part = Part { index, of };
    match open("f32").and_then(|gpu| exchange(&gpu, &*join(&gpu, part)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rank {index}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn exchange<B: Backend>(gpu: &B, ranks: &dyn Collective) -> Result<()> {
    let (rank, size) = (ranks.rank(), ranks.size());
    let is =
        |what: &str, found: &[f32], wanted: f32| match found.iter().all(|&value| value == wanted) {
            true => Ok(()),
            false => Err(Error::Internal(format!(
                "{what}: {found:?}, and not {wanted}"
            ))),
        };
    // More than is exchanged at a time.
    const MANY: usize = 100_000;
    let own = (rank + 1) as f32;
    let sum = (size * (size + 1) / 2) as f32;
    let mut values = vec![own; MANY];
    ranks.all_reduce(&mut values)?;
    is("a sum", &values, sum)?;
    values.fill(own);
    ranks.broadcast(&mut values, size - 1)?;
    is("a broadcast", &values, size as f32)?;
    ranks.barrier()?;
    let device = ranks.on_device();
    let device = device.ok_or_else(|| Error::Internal("nothing is exchanged on the GPU".into()))?;
    // One after the other without waiting, of results that are still being computed.
    let tensors = (0..4)
        .map(|_| B::affine(&gpu.full(&[MANY], own)?, 2.0, 0.0))
        .collect::<Result<Vec<_>>>()?;
    for (number, x) in tensors.iter().enumerate() {
        let root = (number % 2 == 1).then_some(0);
        B::begin_exchange_(x, root, device)?;
    }
    B::end_exchanges(device)?;
    for (number, x) in tensors.iter().enumerate() {
        let wanted = if number % 2 == 1 { 2.0 } else { 2.0 * sum };
        is("a tensor", &B::to_floats(x)?, wanted)?;
    }
    Ok(())
}
