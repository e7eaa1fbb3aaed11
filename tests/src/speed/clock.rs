//! Measuring: the least of several repetitions, and this machine's limits.

use std::time::Instant;

use rayon::prelude::*;
use retort_candle::Candle;
use retort_engine::backend::Tensors;
use retort_engine::error::Result;

/// How often a phase is repeated; the shortest time counts.
pub(super) fn repetitions(first: f64) -> usize {
    if first > 5.0 { 2 } else { 3 }
}

/// The shortest of several repetitions.
pub(crate) fn least(mut once: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut time = || -> Result<f64> {
        let clock = Instant::now();
        once()?;
        Ok(clock.elapsed().as_secs_f64())
    };
    let mut best = time()?;
    for _ in 1..repetitions(best) {
        best = best.min(time()?);
    }
    Ok(best)
}

/// This machine's limits: operations per second in a large product, bytes read per second.
pub fn machine() -> Result<[f64; 2]> {
    let backend = Candle::open("cpu", "f32", 0)?;
    let n = 1536;
    let x = backend.full(&[n, n], 1.0)?;
    let product = least(|| Candle::matmul(&x, &x, false, false).map(drop))?;
    let long = vec![1.0f32; 1 << 27];
    let read = least(|| {
        let sums: f32 = long
            .par_chunks(1 << 20)
            .map(|part| {
                let mut lanes = [0.0f32; 32];
                for x in part.as_chunks::<32>().0 {
                    (0..32).for_each(|i| lanes[i] += x[i]);
                }
                lanes.iter().sum::<f32>()
            })
            .sum();
        assert!(sums > 0.0);
        Ok(())
    })?;
    Ok([
        2.0 * (n as f64).powi(3) / product,
        4.0 * long.len() as f64 / read,
    ])
}
