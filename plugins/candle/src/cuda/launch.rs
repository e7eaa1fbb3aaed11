//! Starting the kernels of `kernels.cu`, and what limits them.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use retort_engine::error::{Error, Result};

use crate::cuda::kernels::{Arguments, Kernel, SOURCE};
use crate::failed;

/// Threads of a block.
const BLOCK: usize = 256;
/// Bytes of shared memory that a kernel may have without asking for more.
pub const SHARED: usize = 48 * 1024;
/// Elements of a row that a warp alone looks at.
pub const SHORT: u32 = 256;
/// Elements of a row that the threads of a block hold.
pub const HELD: usize = 8192;
/// Elements that one launch may look at: kernels count them in 32 bits.
const MOST: usize = 1 << 31;

/// Puts a kernel on the device's stream, with so many blocks and bytes of shared memory. No blocks, nothing to do.
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
    // SAFETY: the arguments have the types that the kernel takes, and pointers lead to as many elements as its sizes say.
    // Memory goes back on the same stream, hence after the kernel.
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

/// Blocks for `n` elements, of which a thread may get several.
pub fn blocks(n: usize) -> Result<usize> {
    counted(n)?;
    Ok(n.div_ceil(BLOCK).min(1 << 16))
}

/// Blocks for rows that a warp each looks at.
pub fn warps(rows: usize) -> Result<usize> {
    counted(rows)?;
    Ok(rows.div_ceil(BLOCK / 32))
}

/// A number of elements that kernels can count.
pub fn counted(n: usize) -> Result<usize> {
    if n < MOST {
        return Ok(n);
    }
    // Half of it will do, so this is as if there were less memory.
    Err(Error::OutOfMemory(format!(
        "{n} elements at once are more than a kernel looks at ({MOST})"
    )))
}
