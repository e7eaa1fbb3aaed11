//! Launching the kernels of `kernels.cu`, and their limits.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use retort_engine::error::{Error, Result};

use crate::cuda::kernels::{Arguments, Kernel, SOURCE};
use crate::failed;

/// Threads of a block.
const BLOCK: usize = 256;
/// Bytes of shared memory that a kernel may use without requesting more.
pub const SHARED: usize = 48 * 1024;
/// Maximum elements of a row that a single warp processes.
pub const SHORT: u32 = 256;
/// Maximum elements of a row that the threads of a block can hold.
pub const HELD: usize = 8192;
/// Maximum elements of one launch: kernels count them in 32 bits.
const MOST: usize = 1 << 31;

/// Enqueues a kernel on the device's stream, with this many blocks and bytes of shared memory. Without blocks it does
/// nothing.
pub fn launch<A: Arguments>(
    device: &CudaDevice,
    kernel: Kernel<A>,
    blocks: usize,
    shared: usize,
    arguments: A,
) -> Result<()> {
    if blocks == 0 {
        return Ok(());
    }
    let function = device
        .get_or_load_custom_func(kernel.name, "retort", SOURCE)
        .map_err(failed)?;
    let mut builder = function.builder();
    arguments.push(&mut builder);
    // SAFETY: the arguments have the types of the kernel's parameters, and pointers lead to as many elements as its sizes
    // say. Memory is freed on the same stream, hence after the kernel.
    unsafe { builder.launch(config(blocks, shared)) }
        .map(drop)
        .map_err(|error| failed(candle_core::Error::wrap(error)))
}

/// So many blocks.
fn config(blocks: usize, shared: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (BLOCK as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    }
}

/// Blocks for `n` elements; a thread may process several.
pub fn blocks(n: usize) -> Result<usize> {
    counted(n)?;
    Ok(n.div_ceil(BLOCK).min(1 << 16))
}

/// Blocks for rows that are processed by one warp each.
pub fn warps(rows: usize) -> Result<usize> {
    counted(rows)?;
    Ok(rows.div_ceil(BLOCK / 32))
}

/// Refuses more elements than kernels can count.
pub fn counted(n: usize) -> Result<usize> {
    if n < MOST {
        return Ok(n);
    }
    // Half of the batch would work, so report it like a lack of memory.
    Err(Error::OutOfMemory(format!(
        "{n} elements at once exceed the limit of a kernel ({MOST})"
    )))
}
