//! Inner products of pairs.

use std::arch::x86_64::*;

use super::{BLOCK, Line, Rows, SIDE};

/// A block of the result in registers, eight rows at a time.
///
/// # Safety
/// The operands have `steps` tiles, `from` can be read and `to` written with these steps between rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub unsafe fn block(
    a: [*const Line; 2],
    b: [*const Line; 2],
    steps: usize,
    from: Option<Rows<*const f32>>,
    (to, row): Rows<*mut f32>,
) {
    const ROWS: usize = 8;
    for first in (0..BLOCK).step_by(ROWS) {
        let strip = a[first / SIDE];
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        // SAFETY: rows and columns are those of a block.
        unsafe {
            if let Some((from, row)) = from {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (h, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm512_loadu_ps(from.add((first + r) * row + SIDE * h));
                    }
                }
            }
            for step in 0..steps {
                for p in 0..SIDE {
                    let columns = b.map(|b| *b.add(step * SIDE + p).cast::<__m512bh>());
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let pair = *strip
                            .add(step * SIDE + first % SIDE + r)
                            .cast::<i32>()
                            .add(p);
                        let pair: __m512bh = std::mem::transmute(_mm512_set1_epi32(pair));
                        for h in 0..2 {
                            sums[h] = _mm512_dpbf16_ps(sums[h], pair, columns[h]);
                        }
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (h, &sum) in sums.iter().enumerate() {
                    _mm512_storeu_ps(to.add((first + r) * row + SIDE * h), sum);
                }
            }
        }
    }
}
