//! candle as a backend of retort.
//!
//! [`Candle`] is what the engine runs on. [`plain::Plain`] implements every operation with candle's own. `Candle` uses a fused
//! CPU kernel where one applies and otherwise falls back to `Plain`, that is to the engine's composed definitions. Both hold
//! f32 in host memory; a tensor of `Candle` also knows the precision of its products, and if that is bf16, weights that never
//! change are held in it. candle's own differentiation is never
//! used: the engine's tape asks only for values.
//! With the feature `cuda` this is another plugin of the same name, the variant for NVIDIA GPUs.

mod activation;
mod arithmetic;
mod attention;
mod backend;
mod convolution;
#[cfg(feature = "cuda")]
mod cuda;
mod direct;
mod flow;
mod half;
mod layout;
mod modulation;
mod norm;
mod optimiser;
pub mod plain;
#[cfg(not(feature = "cuda"))]
mod plugin;
mod pooling;
mod product;
mod rows;
mod softmax;
mod tensor;
mod view;
mod winograd;

use retort_engine::error::{Error, Result};

#[cfg(feature = "cuda")]
pub use cuda::{Cuda, Nccl, meet};

/// The backend: the host, and how precisely products are computed on it.
#[derive(Debug, Clone)]
pub struct Candle {
    half: bool,
}

impl Candle {
    /// Opens a device, `cpu`; `dtype` is `f32` or `bf16`; `threads` is the size of the pool all kernels share (0: as many as
    /// there are cores). The pool is made once per process, so a second call's `threads` has no effect.
    pub fn open(device: &str, dtype: &str, threads: usize) -> Result<Self> {
        if !matches!(device, "cpu" | "cpu:0") {
            return Err(Error::option("/device", format!("{device}: expected cpu")));
        }
        let half = match dtype {
            "f32" => false,
            "bf16" => true,
            _ => {
                let message = format!("{dtype}: expected f32 or bf16");
                return Err(Error::option("/dtype", message));
            }
        };
        // An error here means that the pool exists already; whoever made it chose its size.
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global();
        keep_memory();
        Ok(Self { half })
    }
}

/// Makes the C library keep freed memory: tensors live for an operation or two, and memory fresh from the kernel is cleared
/// page by page on first touch, which took a fifth of a decoder's time.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: both only set options of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Folds candle's errors into the engine's: running out of memory is a kind of its own, because the user can act on it.
fn failed(error: candle_core::Error) -> Error {
    let text = match error {
        // A backtrace belongs in a crash log, not in a message.
        candle_core::Error::WithBacktrace { inner, .. } => inner.to_string(),
        other => other.to_string(),
    };
    let lower = text.to_lowercase();
    if ["out of memory", "out_of_memory", "alloc_failed"]
        .iter()
        .any(|phrase| lower.contains(phrase))
    {
        Error::OutOfMemory(text)
    } else {
        Error::Backend(text)
    }
}

/// The tensors of the kernels.
type T = tensor::Raw;

/// Numbers for tests, of both signs.
#[cfg(test)]
fn waves(step: f32, shape: &[usize]) -> tensor::Tensor {
    let count: usize = shape.iter().product();
    let data: Vec<f32> = (0..count).map(|i| (i as f32 * step).sin()).collect();
    view::tensor(data, shape).expect("a tensor").into()
}
