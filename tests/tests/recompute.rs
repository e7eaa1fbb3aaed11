//! Recomputation of activations in the backward pass: the same gradients, less memory.

use retort_candle::Candle;
use retort_engine::Result;
use retort_engine::backend::{Tensors, Unary};
use retort_engine::bundle::{Family, NetworkConfig};
use retort_engine::model::lpips::Lpips;
use retort_engine::model::msvq::{Config, MultiScaleVq};
use retort_engine::model::{BatchConditioning, Student};
use retort_engine::perceptual::{self, PerceptualMetric};
use retort_engine::published::{self, ShapeHints};
use retort_engine::random::noise;
use retort_engine::tape::{Variable, backward, backward_as_ready};
use retort_engine::weights::{Loader, ParameterSource, Params};
use retort_tests::memory::{peak, resident};

/// A student of a published size with this many blocks, and its parameters.
fn student(family: Family, size: &str, depth: usize) -> LoadedStudent {
    let hints = ShapeHints {
        size: Some(size.into()),
        ..Default::default()
    };
    let (_, mut network) = published::published(family, &hints).expect("a size");
    match &mut network {
        NetworkConfig::Llamagen(c) => c.depth = depth,
        NetworkConfig::Var(c) => c.depth = depth,
    }
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let mut loader = Loader::new(&backend, ParameterSource::Init(1), true, "drawn");
    let student = network.student(&mut loader).expect("a student");
    let params = loader.into_params();
    (backend, student, params)
}

/// A student, and its parameters.
type LoadedStudent = (Candle, Box<dyn Student<Candle>>, Params<Candle>);

/// The mean square of a student's predictions, and its cross-entropy.
fn loss((backend, student, _): &LoadedStudent, batch: usize) -> Result<Variable<Candle>> {
    let (l, d) = (student.token_shape().count(), student.token_shape().dim);
    let x = backend.floats(&noise(5, 0, batch * l, d), &[batch, l, d])?;
    let labels: Vec<u32> = (0..batch as u32).collect();
    let labels = BatchConditioning::Classes(backend.indices(&labels, &[batch])?);
    let kinds = backend.indices(&vec![0; batch * l], &[batch, l])?;
    let prediction = student.predict(&x, &labels, &kinds)?;
    let square = student
        .continuous(&prediction)?
        .unary(Unary::Square)?
        .mean_all()?;
    let ids = backend.indices(&vec![7; batch * l], &[batch * l])?;
    let shape = [batch * l, student.token_shape().vocabulary];
    let entropy = prediction.logits.reshape(&shape)?.cross_entropy(&ids)?;
    entropy.add(&square)
}

/// Its gradients.
fn gradients(made: &LoadedStudent, batch: usize) -> Vec<Vec<f32>> {
    let all = loss(made, batch).and_then(|loss| backward(loss, &made.2));
    all.expect("gradients")
        .iter()
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

/// Each gradient is passed on once, when complete; those of later blocks come before those of earlier ones.
#[test]
fn gradients_are_handed_on_as_soon_as_they_are_complete() {
    for (family, size, blocks) in [
        (Family::Llamagen, "B", ["layers.0.", "layers.1."]),
        (Family::Var, "d16", ["blocks.0.", "blocks.1."]),
    ] {
        for recompute in [false, true] {
            let mut made = student(family, size, 2);
            made.1.recompute(recompute);
            let expected = gradients(&made, 1);
            let mut told: Vec<(usize, Vec<f32>)> = Vec::new();
            let mut ready = |number: usize, gradient: <Candle as Tensors>::Tensor| {
                told.push((number, Candle::to_floats(&gradient)?));
                Ok(())
            };
            let loss = loss(&made, 1).expect("a loss");
            backward_as_ready(loss, &made.2, &mut ready).expect("gradients");
            assert_eq!(told.len(), made.2.len());
            for (number, gradient) in &told {
                assert_eq!(gradient, &expected[*number], "{}", made.2[*number].0);
            }
            let place = |prefix: &str, last: bool| {
                let mut places =
                    (0..told.len()).filter(|&i| made.2[told[i].0].0.starts_with(prefix));
                if last {
                    places.next_back()
                } else {
                    places.next()
                }
                .expect("its parameters")
            };
            assert!(
                place(blocks[1], true) < place(blocks[0], false),
                "{family}, recompute {recompute}: the last block first"
            );
        }
    }
}

#[test]
fn a_parameter_that_is_the_loss_is_handed_on() {
    let backend = Candle::open("cpu", "f32", 1).expect("a CPU");
    let value = backend.floats(&[3.0], &[1]).expect("a tensor");
    let parameter = Variable::<Candle>::parameter(value);
    let params = vec![("a".to_owned(), parameter.clone())];
    let mut told = Vec::new();
    let mut ready = |number: usize, gradient: <Candle as Tensors>::Tensor| {
        told.push((number, Candle::to_floats(&gradient)?));
        Ok(())
    };
    backward_as_ready(parameter, &params, &mut ready).expect("a gradient");
    assert_eq!(told, [(0, vec![1.0])]);
}

#[test]
fn an_empty_slice_takes_nothing_from_one_with_the_same_start() {
    let backend = Candle::open("cpu", "f32", 1).expect("a CPU");
    let value = backend.floats(&[3.0, 5.0, 7.0], &[3]).expect("a tensor");
    let parameter = Variable::<Candle>::parameter(value);
    let params = vec![("a".to_owned(), parameter.clone())];
    let sum = || {
        // The gradient of the longer slice is known first.
        let (empty, rest) = (parameter.narrow(0, 1, 0)?, parameter.narrow(0, 1, 2)?);
        Variable::cat(&[&empty, &rest], 0)?.sum(&[0])
    };
    let gradients = sum().and_then(|sum| backward(sum, &params));
    let gradient = Candle::to_floats(&gradients.expect("gradients")[0]);
    assert_eq!(gradient.expect("floats"), [0.0, 1.0, 1.0]);
}

/// The memory of activations at a published size.
#[test]
#[ignore = "a minute and some GB: make test-long"]
fn recomputed_activations_take_less_memory() {
    let mut made = student(Family::Llamagen, "B", 12);
    let mut peaks = Vec::new();
    for (batch, recompute) in [(4, true), (4, false)] {
        made.1.recompute(recompute);
        // SAFETY: returns memory that the previous pass freed to the system, which would count it as used.
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

/// The memory of decoder and LPIPS for the perceptual term, at the published widths.
#[test]
#[ignore = "minutes and some GB: make test-long"]
fn images_decoded_a_few_at_a_time_take_less_memory() {
    const BATCH: usize = 4;
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let mut loader = Loader::new(&backend, ParameterSource::Init(1), false, "drawn");
    // 128 x 128 pixels.
    let tokenizer = MultiScaleVq::load(&mut loader, &Config::published(&[1, 2, 4, 8]));
    let tokenizer = tokenizer.expect("a tokenizer");
    let mut linear = Loader::new(&backend, ParameterSource::Init(2), false, "drawn");
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
