//! Rows of a tensor, shared out among rayon's threads.

use rayon::prelude::*;
use retort_kernels::lanes::widest;

/// Minimum elements of a task; a constant, so that no result depends on the number of threads.
const GRAIN: usize = 16 * 1024;

/// Fills `out`, rows of `width` elements, in parallel: `body`, which is `#[inline(always)]`, gets the number of its first row
/// and its rows.
#[inline(always)]
pub fn by_rows(out: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = (GRAIN / width.max(1)).max(1);
    if out.len() <= rows * width {
        return widest(
            #[inline(always)]
            || body(0, out),
        );
    }
    out.par_chunks_mut(rows * width)
        .enumerate()
        .for_each(|(i, out)| {
            widest(
                #[inline(always)]
                || body(i * rows, out),
            )
        });
}

/// The planes of a result (b, channels, plane) in bands of `part` elements: for each image and band one piece per channel, so
/// that a task can fill the same rows of all channels.
pub fn in_bands(y: &mut [f32], channels: usize, plane: usize, part: usize) -> Vec<Vec<&mut [f32]>> {
    let (images, bands) = (y.len() / (channels * plane), plane.div_ceil(part));
    let mut pieces: Vec<Vec<&mut [f32]>> = (0..images * bands).map(|_| Vec::new()).collect();
    for (i, plane) in y.chunks_exact_mut(plane).enumerate() {
        for (band, piece) in plane.chunks_mut(part).enumerate() {
            pieces[i / channels * bands + band].push(piece);
        }
    }
    pieces
}
