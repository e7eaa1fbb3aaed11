//! What the figures of 50,000 images with 2048 features cost, the published number of both.

use std::time::Instant;

use retort_engine::random::noise;
use retort_engine::statistics::kernel::kernel_distance;
use retort_engine::statistics::neighbours::precision_recall;
use retort_engine::statistics::{RunningMoments, RunningScore, frechet_distance};
use retort_tests::memory::peak;

const DIM: usize = 2048;
const CLASSES: usize = 1008;
const BATCH: usize = 500;

/// Features (n, DIM) that are not independent, as networks' are not.
fn features(seed: u64, first: usize, n: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(n * DIM);
    for i in first..first + n {
        let own = noise(seed, i as u64, DIM, 1);
        let mut before = 0.0;
        out.extend(own.iter().map(|x| {
            before = 0.7 * before + x;
            before
        }));
    }
    out
}

/// Prints the seconds of each figure and the peak of memory. `RETORT_IMAGES` says how many images; 50,000, if it is not there.
#[test]
#[ignore = "many minutes and 2 GiB: make test-long"]
fn figures_of_50000_images_fit_into_two_gigabytes() {
    let count: usize =
        std::env::var("RETORT_IMAGES").map_or(50_000, |text| text.parse().expect("a number"));
    let timed = |what: &str, clock: Instant| {
        let seconds = clock.elapsed().as_secs_f64();
        println!("{what}: {seconds:.1} s, {} MiB at the peak", peak() >> 10);
    };
    let (mut all, mut moments) = (Vec::new(), Vec::new());
    for seed in [1, 2] {
        let clock = Instant::now();
        let mut kept = Vec::with_capacity(count * DIM);
        let mut running = RunningMoments::new(DIM);
        let mut score = RunningScore::new(count, CLASSES, 10).expect("a score");
        for first in (0..count).step_by(BATCH) {
            let n = BATCH.min(count - first);
            let own = features(seed, first, n);
            running.add(&own).expect("moments");
            let logits: Vec<f32> = own
                .chunks_exact(DIM)
                .flat_map(|row| row[..CLASSES].iter().copied())
                .collect();
            score.add(&logits).expect("a score");
            kept.extend(own);
        }
        moments.push(running.finish().expect("moments"));
        score.finish().expect("a score");
        all.push(kept);
        timed(
            "features, their moments and the inception score of a set",
            clock,
        );
    }
    let clock = Instant::now();
    frechet_distance(&moments[0], &moments[1]).expect("a distance");
    timed("Frechet distance", clock);
    let clock = Instant::now();
    let mut state = 1usize;
    let below = &mut |n: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    kernel_distance(&all[0], &all[1], DIM, (100, 1000), below, &mut || true).expect("a distance");
    timed("kernel distance", clock);
    let clock = Instant::now();
    precision_recall(&all[0], &all[1], DIM, 3, &mut || true).expect("shares");
    timed("precision and recall", clock);
    assert!(peak() < 2 << 20, "{} KiB", peak());
}
