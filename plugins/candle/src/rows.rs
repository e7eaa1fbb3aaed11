//! Rows of a tensor, shared out among rayon's threads.

use rayon::prelude::*;
use retort_kernels::lanes::{add_scaled, widest};

/// Minimum elements of a task; a constant, so that no result depends on the number of threads.
const GRAIN: usize = 16 * 1024;

/// Rows whose contributions to a parameter's gradient one task sums. Fixed, so that the order of summation is fixed.
pub const BLOCK: usize = 64;

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

/// Fills `out`, sequences of l rows of c elements, and returns `width` sums for each sequence: `body` gets the number of its
/// first row, rows of one sequence, and zeros to add their shares to. The order of summation is fixed.
#[inline(always)]
pub fn by_sequences(
    out: &mut [f32],
    (l, c): (usize, usize),
    width: usize,
    body: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    let own = l.div_ceil(BLOCK) * width;
    let mut shares = vec![0.0; out.len() / (l * c) * own];
    out.par_chunks_mut(l * c)
        .zip(shares.par_chunks_mut(own))
        .enumerate()
        .for_each(|(b, (out, shares))| {
            out.par_chunks_mut(BLOCK * c)
                .zip(shares.par_chunks_mut(width))
                .enumerate()
                .for_each(|(block, (out, share))| {
                    widest(
                        #[inline(always)]
                        || body(b * l + block * BLOCK, out, share),
                    );
                });
        });
    let sums = shares.chunks_exact(own).map(|own| total(own, width));
    sums.collect::<Vec<_>>().concat()
}

/// The sum of the shares, in order.
pub fn total(shares: &[f32], width: usize) -> Vec<f32> {
    let mut sum = vec![0.0; width];
    for share in shares.chunks_exact(width) {
        add_scaled(&mut sum, 1.0, share);
    }
    sum
}
