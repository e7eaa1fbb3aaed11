//! Activations that are computed again in the backward pass: the same gradients, less memory.

use retort_candle::Candle;
use retort_engine::backend::{Tensors, Unary};
use retort_engine::bundle::{Family, NetworkConfig};
use retort_engine::model::lpips::Lpips;
use retort_engine::model::msvq::{Config, MultiScaleVq};
use retort_engine::model::{Conditions, Student};
use retort_engine::perceptual::{self, PerceptualMetric};
use retort_engine::published::{self, Hints};
use retort_engine::random::noise;
use retort_engine::tape::{Variable, backward};
use retort_engine::weights::{Loader, Params, Source};
use retort_tests::memory::{peak, resident};

/// A student of a published size with so many blocks, and its parameters.
fn student(
    family: Family,
    size: &str,
    depth: usize,
) -> (Candle, Box<dyn Student<Candle>>, Params<Candle>) {
    let hints = Hints {
        size: Some(size.into()),
        ..Default::default()
    };
    let (_, mut network) = published::published(family, &hints).expect("a size");
    match &mut network {
        NetworkConfig::Llamagen(c) => c.depth = depth,
        NetworkConfig::Var(c) => c.depth = depth,
    }
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let mut loader = Loader::new(&backend, Source::Init(1), true, "drawn");
    let student = network.student(&mut loader).expect("a student");
    let params = loader.into_params();
    (backend, student, params)
}

/// Gradients of the mean square of what a student predicts.
fn gradients(
    (backend, student, params): &(Candle, Box<dyn Student<Candle>>, Params<Candle>),
    batch: usize,
) -> Vec<Vec<f32>> {
    let (l, d) = (student.token_shape().count(), student.token_shape().dim);
    let x = backend.floats(&noise(5, 0, batch * l, d), &[batch, l, d]);
    let labels: Vec<u32> = (0..batch as u32).collect();
    let labels = Conditions::Classes(backend.indices(&labels, &[batch]).expect("labels"));
    let kinds = backend.indices(&vec![0; batch * l], &[batch, l]);
    let of = || {
        let prediction = student.predict(&x?, &labels, &kinds?)?;
        let continuous = student.continuous(&prediction)?;
        let ids = backend.indices(&vec![7; batch * l], &[batch * l])?;
        let logits = prediction
            .logits
            .reshape(&[batch * l, student.token_shape().vocabulary])?;
        let square = continuous.unary(Unary::Square)?.mean_all()?;
        let loss = logits.cross_entropy(&ids)?.add(&square)?;
        drop(square);
        drop((prediction, continuous, logits));
        backward(loss, params)
    };
    let all = of().expect("gradients");
    all.iter()
        .map(|g| Candle::to_floats(g).expect("floats"))
        .collect()
}

#[test]
fn recomputed_activations_give_the_same_bits() {
    for (family, size) in [(Family::Llamagen, "B"), (Family::Var, "d16")] {
        let mut made = student(family, size, 2);
        let kept = gradients(&made, 1);
        made.1.recompute(true);
        let recomputed = gradients(&made, 1);
        for ((name, _), (a, b)) in made.2.iter().zip(kept.iter().zip(&recomputed)) {
            let same = a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{family}: {name}");
        }
    }
}

/// What activations take at a published size.
#[test]
#[ignore = "a minute and some GB: make test-long"]
fn recomputed_activations_take_less_memory() {
    let mut made = student(Family::Llamagen, "B", 12);
    let mut peaks = Vec::new();
    for (batch, recompute) in [(4, true), (4, false)] {
        made.1.recompute(recompute);
        // SAFETY: gives what the pass before has freed back to the system, which counts it as used until then.
        unsafe { libc::malloc_trim(0) };
        std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
        let (before, clock) = (resident(), std::time::Instant::now());
        gradients(&made, batch);
        let took = peak() - before;
        println!(
            "LlamaGen-B, batch {batch}, recompute {recompute}: {} MiB more at the peak, {:.1?}",
            took >> 10,
            clock.elapsed()
        );
        peaks.push(took);
    }
    assert!(peaks[0] < peaks[1], "{peaks:?}");
}

/// What decoder and LPIPS take for the perceptual term, at the widths that were published.
#[test]
#[ignore = "minutes and some GB: make test-long"]
fn images_decoded_a_few_at_a_time_take_less_memory() {
    const BATCH: usize = 4;
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let mut loader = Loader::new(&backend, Source::Init(1), false, "drawn");
    // 128 x 128 pixels.
    let tokenizer = MultiScaleVq::load(&mut loader, &Config::published(&[1, 2, 4, 8]));
    let tokenizer = tokenizer.expect("a tokenizer");
    let mut linear = Loader::new(&backend, Source::Init(2), false, "drawn");
    let metric = PerceptualMetric::Lpips(Lpips::load(&mut loader, &mut linear).expect("LPIPS"));
    let shape = [BATCH, 85, 32];
    let draw = |seed| backend.floats(&noise(seed, 0, BATCH * 85, 32), &shape);
    let target = draw(2).expect("latents");
    let mut peaks = Vec::new();
    for most in [1, BATCH] {
        let latents = Variable::parameter(draw(1).expect("latents"));
        // SAFETY: as above.
        unsafe { libc::malloc_trim(0) };
        std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
        let (before, clock) = (resident(), std::time::Instant::now());
        let distance = perceptual::distance(&tokenizer, &metric, most, &latents, &target);
        backward(distance.expect("a distance"), &[("x".into(), latents)]).expect("a gradient");
        let took = peak() - before;
        println!(
            "{BATCH} images of 128 x 128, {most} at once: {} MiB more at the peak, {:.1?}",
            took >> 10,
            clock.elapsed()
        );
        peaks.push(took);
    }
    assert!(2 * peaks[0] < peaks[1], "{peaks:?}");
}
