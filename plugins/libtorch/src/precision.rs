//! How precisely products are computed.

use tch::{Device, Kind, Tensor};

/// The type of the operands of products; their results and everything else are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    Full,
    /// bf16, multiplied by hardware that can.
    Half,
    /// Numbers rounded to bf16 but multiplied in f32, for processors that cannot multiply bf16.
    Emulated,
}

impl Precision {
    /// What `dtype: bf16` means on a device.
    pub(crate) fn half_on(device: Device) -> Self {
        if device.is_cuda() || cpu_multiplies_bf16() {
            Self::Half
        } else {
            Self::Emulated
        }
    }

    /// The type in which weights and caches are kept that only products read.
    pub(crate) fn storage(self) -> Kind {
        match self {
            Self::Full => Kind::Float,
            Self::Half | Self::Emulated => Kind::BFloat16,
        }
    }

    /// A tensor as an operand of a product.
    pub(crate) fn operand(self, x: &Tensor) -> tch::Result<Tensor> {
        match self {
            Self::Full => x.f_to_kind(Kind::Float),
            Self::Half => x.f_to_kind(Kind::BFloat16),
            Self::Emulated => x.f_to_kind(Kind::BFloat16)?.f_to_kind(Kind::Float),
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
