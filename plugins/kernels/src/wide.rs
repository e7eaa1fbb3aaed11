//! Eight floats at a time, for the kernels in which many sums stay in registers: the compiler keeps those of
//! [`crate::lanes`] there only while they are few.

pub use instructions::{Wide, ZERO, load, load_half, mul_add, splat, store};

/// Two times eight.
#[inline(always)]
pub fn pair(x: &[f32; 16]) -> [Wide; 2] {
    let (halves, _) = x.as_chunks::<8>();
    [load(&halves[0]), load(&halves[1])]
}

/// Two times eight, back in memory.
#[inline(always)]
pub fn sixteen(x: [Wide; 2]) -> [f32; 16] {
    let halves = x.map(store);
    std::array::from_fn(|i| halves[i / 8][i % 8])
}

#[cfg(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "fma"
))]
mod instructions {
    use std::arch::x86_64::*;

    use half::bf16;

    /// Eight floats.
    pub type Wide = __m256;

    // SAFETY: any bits are floats.
    /// Zeros.
    pub const ZERO: Wide = unsafe { std::mem::transmute([0.0f32; 8]) };

    /// From memory.
    #[inline(always)]
    pub fn load(x: &[f32; 8]) -> Wide {
        // SAFETY: eight floats are there to be read, and AVX is there, as this module is only compiled with it.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }

    /// From bf16 in memory, which is the upper half of an f32.
    #[inline(always)]
    pub fn load_half(x: &[bf16; 8]) -> Wide {
        // SAFETY: sixteen bytes are there to be read, and AVX2 is there, as this module is only compiled with it.
        unsafe {
            let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
        }
    }

    /// Eight times the same.
    #[inline(always)]
    pub fn splat(x: f32) -> Wide {
        // SAFETY: AVX is there, as this module is only compiled with it.
        unsafe { _mm256_set1_ps(x) }
    }

    /// a b + c, rounded once.
    #[inline(always)]
    pub fn mul_add(a: Wide, b: Wide, c: Wide) -> Wide {
        // SAFETY: FMA is there, as this module is only compiled with it.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    /// Back in memory.
    #[inline(always)]
    pub fn store(x: Wide) -> [f32; 8] {
        // SAFETY: eight floats either way.
        unsafe { std::mem::transmute(x) }
    }
}

/// The same in plain loops.
#[cfg(not(all(
    target_arch = "x86_64",
    target_feature = "avx2",
    target_feature = "fma"
)))]
mod instructions {
    use half::bf16;

    /// Eight floats.
    pub type Wide = [f32; 8];

    /// Zeros.
    pub const ZERO: Wide = [0.0; 8];

    /// From memory.
    #[inline(always)]
    pub fn load(x: &[f32; 8]) -> Wide {
        *x
    }

    /// From bf16 in memory.
    #[inline(always)]
    pub fn load_half(x: &[bf16; 8]) -> Wide {
        x.map(bf16::to_f32)
    }

    /// Eight times the same.
    #[inline(always)]
    pub fn splat(x: f32) -> Wide {
        [x; 8]
    }

    /// a b + c, rounded once.
    #[inline(always)]
    pub fn mul_add(a: Wide, b: Wide, c: Wide) -> Wide {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    /// Back in memory.
    #[inline(always)]
    pub fn store(x: Wide) -> [f32; 8] {
        x
    }
}
