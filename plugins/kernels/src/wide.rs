//! Eight floats at a time, for kernels that keep many sums in registers: the compiler keeps those of [`crate::lanes`] there
//! only if they are few.

pub use instructions::{Wide, ZERO, apart, interleaved, load, load_half, mul_add, splat, store};

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

    /// The first of each of four, then the second of each, and so on.
    #[inline(always)]
    pub fn interleaved([a, b, c, d]: [Wide; 4]) -> [f32; 32] {
        // SAFETY: AVX is there, as this module is only compiled with it; thirty-two floats either way.
        unsafe {
            let (p, q) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (r, s) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            let (w, x) = (
                _mm256_shuffle_ps::<0x44>(p, q),
                _mm256_shuffle_ps::<0xee>(p, q),
            );
            let (y, z) = (
                _mm256_shuffle_ps::<0x44>(r, s),
                _mm256_shuffle_ps::<0xee>(r, s),
            );
            std::mem::transmute([
                _mm256_permute2f128_ps::<0x20>(w, x),
                _mm256_permute2f128_ps::<0x20>(y, z),
                _mm256_permute2f128_ps::<0x31>(w, x),
                _mm256_permute2f128_ps::<0x31>(y, z),
            ])
        }
    }

    /// The inverse: every fourth element, from each of the first four on.
    #[inline(always)]
    pub fn apart(x: &[f32; 32]) -> [Wide; 4] {
        let (x, _) = x.as_chunks::<8>();
        let [k, l, m, n] = [0, 1, 2, 3].map(|i| load(&x[i]));
        // SAFETY: AVX is there, as this module is only compiled with it.
        unsafe {
            let (w, x) = (
                _mm256_permute2f128_ps::<0x20>(k, m),
                _mm256_permute2f128_ps::<0x31>(k, m),
            );
            let (y, z) = (
                _mm256_permute2f128_ps::<0x20>(l, n),
                _mm256_permute2f128_ps::<0x31>(l, n),
            );
            let (p, q) = (_mm256_unpacklo_ps(w, x), _mm256_unpacklo_ps(y, z));
            let (r, s) = (_mm256_unpackhi_ps(w, x), _mm256_unpackhi_ps(y, z));
            [
                _mm256_shuffle_ps::<0x44>(p, q),
                _mm256_shuffle_ps::<0xee>(p, q),
                _mm256_shuffle_ps::<0x44>(r, s),
                _mm256_shuffle_ps::<0xee>(r, s),
            ]
        }
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

    /// The first of each of four, then the second of each, and so on.
    #[inline(always)]
    pub fn interleaved(x: [Wide; 4]) -> [f32; 32] {
        std::array::from_fn(|i| x[i % 4][i / 4])
    }

    /// The inverse: every fourth element, from each of the first four on.
    #[inline(always)]
    pub fn apart(x: &[f32; 32]) -> [Wide; 4] {
        std::array::from_fn(|e| std::array::from_fn(|t| x[4 * t + e]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_apart_is_interleaved_again() {
        let x: [f32; 32] = std::array::from_fn(|i| i as f32);
        let parts = apart(&x);
        for (e, part) in parts.into_iter().enumerate() {
            assert_eq!(store(part), std::array::from_fn(|t| (4 * t + e) as f32));
        }
        assert_eq!(interleaved(parts), x);
    }
}
