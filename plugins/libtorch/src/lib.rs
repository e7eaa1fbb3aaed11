//! libtorch as a backend of retort, through tch.
//!
//! [`Libtorch`] is what the engine runs on. Nothing here records gradients: libtorch's autograd stays idle, and the engine's
//! tape asks only for values. All tensors are f32 except operands of products: with `dtype: bf16` linear maps, attention and,
//! on CPUs, convolutions take operands in bf16 ([`ProductPrecision`] has the details). Everything else, including sums, norms
//! and optimiser steps, stays in f32.
//!
//! In host memory the flow map and products with few rows use kernels shared with the candle plugin (`retort-kernels`), on
//! libtorch's threads.

mod aten;
mod attention;
mod backend;
mod choice;
mod collective;
pub mod cuda;
mod flow;
mod host;
mod plugin;
mod precision;

use retort_engine::error::{Error, Result};
use tch::{Device, TchError};

pub use collective::{meet, meet_at};
pub use precision::ProductPrecision;

/// The backend: where tensors live and how precisely products are computed.
#[derive(Debug, Clone, Copy)]
pub struct Libtorch {
    device: Device,
    precision: ProductPrecision,
}

/// A tensor of libtorch and the precision of its products.
#[derive(Debug)]
pub struct Tensor {
    inner: tch::Tensor,
    precision: ProductPrecision,
}

// SAFETY: the handle is a pointer with an atomic count, and libtorch lets any number of threads read a tensor at once.
// Writes in place go through methods of the engine's trait, whose caller has no reader elsewhere while it writes.
unsafe impl Sync for Tensor {}

impl Clone for Tensor {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.shallow_clone(),
            precision: self.precision,
        }
    }
}

impl Libtorch {
    /// Opens a device: `cpu`, or `cuda:N`; `dtype` is `f32` or `bf16`; `threads` is the number of threads that
    /// operations share (0: as many as there are cores).
    ///
    /// # Errors
    /// The device or the type is unknown or cannot be used here.
    pub fn open(device: &str, dtype: &str, threads: usize) -> Result<Self> {
        let place = match device.split_once(':').unwrap_or((device, "0")) {
            ("cpu", "0") => Device::Cpu,
            ("cuda", index) => {
                let index: usize = index.parse().map_err(|_| {
                    Error::option("/device", format!("{device}: expected cuda or cuda:N"))
                })?;
                let gpus = cuda::devices().map_err(|why| {
                    Error::option("/device", format!("{device} cannot be used: {why}"))
                })?;
                let count = gpus.len();
                if index >= count {
                    let message = format!("{device}: this machine has {count} CUDA devices");
                    return Err(Error::option("/device", message));
                }
                aten::no_tf32()?;
                Device::Cuda(index)
            }
            _ => {
                let message = format!("{device}: expected cpu or cuda:N");
                return Err(Error::option("/device", message));
            }
        };
        let precision = match dtype {
            "f32" => ProductPrecision::Full,
            "bf16" => ProductPrecision::half_on(place),
            _ => {
                let message = format!("{dtype}: expected f32 or bf16");
                return Err(Error::option("/dtype", message));
            }
        };
        Ok(Self::with(place, precision, threads))
    }

    /// A device that is known to exist, with an explicit precision of products.
    pub fn with(device: Device, precision: ProductPrecision, threads: usize) -> Self {
        if threads > 0 {
            tch::set_num_threads(threads.try_into().unwrap_or(i32::MAX));
        }
        // The engine's own loops over samples; they never run at the same time as an operation of libtorch. An error means
        // that the pool already exists, with the size that its creator chose.
        let _ = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global();
        Self { device, precision }
    }
}

/// Folds tch's errors into the engine's.
fn failed(error: TchError) -> Error {
    match error {
        TchError::Torch(text) => failure(&text),
        other => Error::Backend(other.to_string()),
    }
}

/// libtorch's message without its backtrace. Running out of memory is a separate error, because the user can act on it.
fn failure(text: &str) -> Error {
    let end = text.find("\nException raised from").unwrap_or(text.len());
    let message = text[..end].trim().to_owned();
    let lower = message.to_lowercase();
    let wants_memory = [
        "out of memory",
        "not enough memory",
        "can't allocate memory",
    ];
    if wants_memory.iter().any(|phrase| lower.contains(phrase)) {
        Error::OutOfMemory(message)
    } else {
        Error::Backend(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_short_and_memory_is_a_kind_of_its_own() {
        let text = "shapes differ\nException raised from here at there.cpp:1\nframe #0";
        assert!(matches!(failure(text), Error::Backend(message) if message == "shapes differ"));
        // More than any machine has: the allocator refuses before touching memory.
        let refused = tch::Tensor::f_zeros([1i64 << 50], (tch::Kind::Float, Device::Cpu));
        let error = failed(refused.expect_err("a petabyte"));
        assert!(matches!(error, Error::OutOfMemory(_)), "{error:?}");
    }

    #[test]
    fn unusable_settings_are_refused() {
        for (device, dtype) in [
            ("tpu", "f32"),
            ("cpu:1", "f32"),
            ("cuda:x", "f32"),
            ("cpu", "f64"),
        ] {
            let refused = Libtorch::open(device, dtype, 1);
            assert!(
                matches!(refused, Err(Error::Options { .. })),
                "{device} {dtype}"
            );
        }
    }
}
