//! Vectors of 16 numbers and of 16 pairs.

use std::arch::x86_64::*;

/// The lowest bits, as many as there are elements, 16 at most.
pub fn lowest(count: usize) -> u16 {
    ((1u32 << count.min(16)) - 1) as u16
}

/// Numbers rounded to bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn round(x: __m512) -> __m256i {
    // SAFETY: both types have 256 bits.
    unsafe { std::mem::transmute(_mm512_cvtneps_pbh(x)) }
}

/// Pairs of numbers, `low` below `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub fn pair(low: __m256i, high: __m256i) -> __m512i {
    let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
    _mm512_or_si512(_mm512_cvtepu16_epi32(low), high)
}
