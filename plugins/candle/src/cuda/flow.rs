//! The AR flow map on a GPU: a block per token, or for several (`kernels.cu`), with the thresholds of the host's kernel.

use candle_core::DType;
use retort_engine::backend::FlowSolver;
use retort_engine::backend::flow;
use retort_engine::error::{Error, Result};
use retort_kernels::flow::{DROPPED, UNDECIDED};

use crate::cuda::kernels::{self, Kernel};
use crate::cuda::launch::launch;
use crate::cuda::structures::Flow;
use crate::cuda::sums::fill;
use crate::cuda::tensor::{Raw, Tensor, copy, device, fresh, pointer};
use crate::failed;

/// Arguments: tokens, codes, the numbers; logits, noise, codes, steps, kept log weights with their codes, ids.
type FlowKernel = Kernel<(u32, u32, Flow, u64, u64, u64, u64, u64, u64, u64)>;

/// Code dimensions that kernels are compiled for (shorter codes are padded with zeros); the kernel with one token per block,
/// the one with several, and how many.
const KERNELS: [(usize, FlowKernel, FlowKernel, usize); 4] = [
    (4, kernels::flow_4, kernels::flow_together_4, 4),
    (8, kernels::flow_8, kernels::flow_together_8, 4),
    (16, kernels::flow_16, kernels::flow_together_16, 4),
    (32, kernels::flow_32, kernels::flow_together_32, 2),
];
/// From this many tokens on, several per block still keep the whole GPU busy. Results are the same either way.
const MANY: usize = 512;
/// Maximum log weights in memory at once.
const KEPT: usize = 1 << 27;

/// logits (n, k), noise (n, d), codebook (k, d) -> ids (n); `None` if codes are too long for every kernel.
pub fn flow_map(
    logits: &Tensor,
    noise: &Tensor,
    codebook: &Tensor,
    solver: &FlowSolver,
) -> Result<Option<Raw>> {
    let (n, k) = logits.raw.dims2().map_err(failed)?;
    let (_, d) = noise.raw.dims2().map_err(failed)?;
    if noise.raw.dims() != [n, d] || codebook.raw.dims() != [k, d] || n * k == 0 {
        return Err(Error::Backend(format!(
            "flow map: logits {:?}, noise {:?}, codebook {:?}",
            logits.raw.dims(),
            noise.raw.dims(),
            codebook.raw.dims()
        )));
    }
    let found = KERNELS.iter().find(|(wide, ..)| d <= *wide);
    let Some(&(wide, alone, together, several)) = found else {
        return Ok(None);
    };
    let (kernel, each) = match n >= MANY {
        true => (together, several),
        false => (alone, 1),
    };
    let logits = logits.single()?;
    let device = device(&logits)?;
    let codes = codebook.raw.t().map_err(failed)?;
    let codes = padded(&codes, [wide, k], 0)?;
    let noise = padded(&noise.raw, [n, wide], 1)?;
    // s and the weights, which are integrals over s, scale with the inverse of the spread, so nothing has to leave the GPU.
    let steps = flow::steps(solver, 1.0);
    let table = table(&steps);
    let unit = Raw::from_slice(&table, table.len(), logits.device()).map_err(failed)?;
    let points = fresh(&device, &[table.len()], DType::F32)?;
    // Two numbers of 64 bits per coordinate.
    let parts = fresh(&device, &[4 * d], DType::F32)?;
    launch(
        &device,
        kernels::spread_parts,
        d,
        0,
        (k as u32, pointer(&codes)?, pointer(&parts)?),
    )?;
    launch(
        &device,
        kernels::spread_steps,
        1,
        0,
        (
            d as u32,
            table.len() as u32,
            pointer(&parts)?,
            pointer(&unit)?,
            pointer(&points)?,
        ),
    )?;
    let numbers = Flow {
        points: steps.len() as i32,
        dropped: DROPPED,
        undecided: UNDECIDED,
    };
    let some = (KEPT / k).clamp(1, n);
    let kept = fresh(&device, &[some, k], DType::F32)?;
    let list = fresh(&device, &[some, k], DType::U32)?;
    let ids = fresh(&device, &[n], DType::U32)?;
    for first in (0..n).step_by(some) {
        let count = some.min(n - first);
        let part = |x: &Raw| pointer(&x.narrow(0, first, count).map_err(failed)?);
        launch(
            &device,
            kernel,
            count.div_ceil(each),
            0,
            (
                count as u32,
                k as u32,
                numbers,
                part(&logits)?,
                part(&noise)?,
                pointer(&codes)?,
                pointer(&points)?,
                pointer(&kept)?,
                pointer(&list)?,
                part(&ids)?,
            ),
        )?;
    }
    Ok(Some(ids))
}

/// The kernel's table of steps: for each step s, the weights of the slopes to z, and those from z before the step to the next
/// evaluation point.
fn table(steps: &[flow::Step]) -> Vec<f32> {
    let both = steps.iter().zip(flow::moves(steps));
    both.flat_map(|(step, [z, ahead])| [&[step.s as f32], &z[..], &ahead[..]].concat())
        .collect()
}

/// x as row-major f32, padded with zeros to a shape.
fn padded(x: &Raw, shape: [usize; 2], dim: usize) -> Result<Raw> {
    let to = fresh(&device(x)?, &shape, DType::F32)?;
    let own = x.dims()[dim];
    if own < shape[dim] {
        fill(&to, 0.0)?;
    }
    copy(x, &to.narrow(dim, 0, own).map_err(failed)?)?;
    Ok(to)
}
