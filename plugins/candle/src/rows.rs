//! Rows of a tensor, shared out among rayon's threads.

use rayon::prelude::*;

/// Minimum elements of a task; a constant, so that no result depends on the number of threads.
const GRAIN: usize = 16 * 1024;

/// Fills `out`, rows of `width` elements, in parallel: `body` gets the number of its first row and its rows.
pub fn by_rows(out: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = (GRAIN / width.max(1)).max(1);
    if out.len() <= rows * width {
        return body(0, out);
    }
    out.par_chunks_mut(rows * width)
        .enumerate()
        .for_each(|(i, out)| body(i * rows, out));
}
