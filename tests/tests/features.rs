//! What the figures of 50,000 images cost by the features of Inception, as `evaluate` takes them: FID, sFID, inception score,
//! precision and recall, and the kernel distance.

use std::time::Instant;

use retort_engine::model::inception::{CLASSES, SPATIAL_FEATURES};
use retort_engine::random::noise;
use retort_engine::statistics::kernel::kernel_distance;
use retort_engine::statistics::neighbours::precision_recall;
use retort_engine::statistics::{Moments, RunningMoments, RunningScore, frechet_distance};
use retort_tests::memory::peak;

/// The number of features behind published figures.
const DIM: usize = 2048;
/// The network's batch size.
const BATCH: usize = 500;

/// Features (n, `dim`) that are correlated, like those of networks.
fn features(seed: u64, dim: usize, first: usize, n: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(n * dim);
    for i in first..first + n {
        let own = noise(seed, i as u64, dim, 1);
        let mut before = 0.0;
        out.extend(own.iter().map(|x| {
            before = 0.7 * before + x;
            before
        }));
    }
    out
}

/// Seconds by purpose.
#[derive(Default)]
struct Clocks(Vec<(&'static str, f64)>);

impl Clocks {
    fn time<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let clock = Instant::now();
        let result = work();
        let seconds = clock.elapsed().as_secs_f64();
        match self.0.iter_mut().find(|(known, _)| *known == what) {
            Some((_, sum)) => *sum += seconds,
            None => self.0.push((what, seconds)),
        }
        result
    }
}

/// What `evaluate` keeps about a set.
struct Set {
    features: Vec<f32>,
    moments: Moments,
    spatial: Moments,
}

/// Processes a set batch by batch. Sets' seeds are ten apart.
fn look(seed: u64, count: usize, scores: bool, clocks: &mut Clocks) -> Set {
    let mut kept = Vec::new();
    kept.reserve_exact(count * DIM);
    let mut moments = RunningMoments::new(DIM);
    let mut spatial = RunningMoments::new(SPATIAL_FEATURES);
    let mut score = scores.then(|| RunningScore::new(count, CLASSES, 10).expect("a score"));
    for first in (0..count).step_by(BATCH) {
        let n = BATCH.min(count - first);
        let own = features(seed, DIM, first, n);
        clocks.time("moments of both sets", || {
            moments.add(&own).expect("moments")
        });
        let maps = features(seed + 1, SPATIAL_FEATURES, first, n);
        clocks.time("spatial moments of both sets", || {
            spatial.add(&maps).expect("moments")
        });
        if let Some(score) = &mut score {
            let logits = features(seed + 2, CLASSES, first, n);
            clocks.time("inception score", || score.add(&logits).expect("a score"));
        }
        kept.extend(own);
    }
    if let Some(score) = score {
        clocks.time("inception score", || score.finish().expect("a score"));
    }
    Set {
        features: kept,
        moments: clocks.time("moments of both sets", || {
            moments.finish().expect("moments")
        }),
        spatial: clocks.time("spatial moments of both sets", || {
            spatial.finish().expect("moments")
        }),
    }
}

/// Prints the seconds of each figure and the peak of memory. `RETORT_IMAGES` says how many images a set has; 50,000, if it is
/// not there.
#[test]
#[ignore = "many minutes and 2 GiB: make test-long"]
fn figures_of_50000_images_fit_into_two_gigabytes() {
    let count: usize =
        std::env::var("RETORT_IMAGES").map_or(50_000, |text| text.parse().expect("a number"));
    let mut clocks = Clocks::default();
    let real = look(10, count, false, &mut clocks);
    let made = look(20, count, true, &mut clocks);
    clocks.time("FID", || {
        frechet_distance(&real.moments, &made.moments).expect("a distance")
    });
    clocks.time("sFID", || {
        frechet_distance(&real.spatial, &made.spatial).expect("a distance")
    });
    clocks.time("precision and recall", || {
        let (real, made) = (&real.features, &made.features);
        precision_recall(real, made, DIM, 3, &mut || true).expect("shares")
    });
    // Before the last figure, which few ask for.
    let most = peak();
    let mut state = 1usize;
    let below = &mut |n: usize| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    clocks.time("kernel distance", || {
        let (real, made) = (&real.features, &made.features);
        kernel_distance(real, made, DIM, (100, 1000), below, &mut || true).expect("a distance")
    });
    println!("{count} images a set:");
    for (what, seconds) in &clocks.0 {
        println!("{what}: {seconds:.1} s");
    }
    println!(
        "at the peak: {} MiB, {} with the kernel distance",
        most >> 10,
        peak() >> 10
    );
    assert!(peak() <= 2 << 20, "{} KiB", peak());
}
