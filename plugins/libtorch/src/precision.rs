//! The precision of products.

use tch::{Device, Kind, Tensor};

/// The type of the operands of products; their results and everything else are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProductPrecision {
    /// f32.
    Full,
    /// bf16, multiplied by hardware support. On GPUs this includes a generation's caches. On CPUs caches are f32, because a
    /// step has few queries, and converting all keys for the hardware takes longer than it saves.
    Half,
    /// bf16 for the weights of linear maps that do not change, f32 for all else: for processors without bf16 multiplication,
    /// which still gain half the memory and half the time for reading the weights.
    Weights,
}

impl ProductPrecision {
    /// What `dtype: bf16` means on a device.
    pub(crate) fn half_on(device: Device) -> Self {
        if device.is_cuda() || cpu_multiplies_bf16() {
            Self::Half
        } else {
            Self::Weights
        }
    }

    /// The storage type of a weight or cache that only products read.
    pub(crate) fn factor(self, x: &Tensor) -> tch::Result<Tensor> {
        match self {
            Self::Half if x.dim() == 2 || x.device().is_cuda() => x.f_to_kind(Kind::BFloat16),
            Self::Weights if x.dim() == 2 => x.f_to_kind(Kind::BFloat16),
            _ => x.f_to_kind(Kind::Float),
        }
    }

    /// A tensor as an operand of a product.
    pub(crate) fn operand(self, x: &Tensor) -> tch::Result<Tensor> {
        match self {
            Self::Half => x.f_to_kind(Kind::BFloat16),
            Self::Weights | Self::Full => x.f_to_kind(Kind::Float),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_multiplies_bf16() -> bool {
    std::arch::is_x86_feature_detected!("avx512bf16")
}

#[cfg(target_arch = "aarch64")]
fn cpu_multiplies_bf16() -> bool {
    std::arch::is_aarch64_feature_detected!("bf16")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_multiplies_bf16() -> bool {
    false
}
