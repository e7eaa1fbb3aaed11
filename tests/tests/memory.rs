//! Loading takes one copy of the weights in memory: the model's own.
//!
//! `RETORT_MEMORY_MIB=1024 cargo test --release -p retort-tests --test memory -- --nocapture` for a larger file.

use retort_candle::Candle;
use retort_engine::backend::{Backend, Unary};
use retort_engine::bundle::{Family, NetworkConfig};
use retort_engine::model::{Conditions, Student};
use retort_engine::published::{self, Hints};
use retort_engine::random::noise;
use retort_engine::tape::backward;
use retort_engine::weights::{Init, Loader, Params, Source, Stored, write_each};
use retort_tests::torch::Archive;

const TENSORS: usize = 32;

/// A figure of this process's memory, in KiB.
fn memory(figure: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(figure))
        .expect("the figure");
    line.trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .expect("a number")
}

/// The most it has had.
fn peak() -> usize {
    memory("VmHWM:")
}

/// What it has now.
fn resident() -> usize {
    memory("VmRSS:")
}

#[test]
fn weights_are_loaded_and_written_one_at_a_time() {
    let asked = std::env::var("RETORT_MEMORY_MIB")
        .ok()
        .and_then(|s| s.parse::<usize>().ok());
    let size = asked.unwrap_or(128) << 10; // KiB
    let shape = [size / TENSORS, 256]; // 1 KiB a row
    let dir = tempfile::tempdir().expect("a directory");
    let (torch, safetensors) = (dir.path().join("w.pth"), dir.path().join("w.safetensors"));
    let mut archive = Archive::create(&torch);
    archive.open("model");
    for i in 0..TENSORS {
        archive.tensor(&i.to_string(), &shape, &vec![i as f32; shape[0] * shape[1]]);
    }
    archive.close();
    archive.surroundings();
    archive.finish();

    let names: Vec<String> = (0..TENSORS).map(|i| i.to_string()).collect();
    let (before, clock) = (peak(), std::time::Instant::now());
    let stored = Stored::open(&torch, None).expect("the file");
    let shapes = names
        .iter()
        .map(|name| (name.clone(), shape.to_vec()))
        .collect();
    write_each(&safetensors, shapes, |name| Ok(stored.floats(name)?.into())).expect("a copy");
    let written = peak() - before;
    println!(
        "{size} KiB converted to safetensors: {written} KiB more at the peak, {:?}",
        clock.elapsed()
    );
    assert!(written < size / 4, "{written} KiB beside the weights");

    for path in [torch, safetensors] {
        let (before, clock) = (resident(), std::time::Instant::now());
        let stored = Stored::open(&path, None).expect("the file");
        let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
        let mut loader = Loader::new(
            &backend,
            Source::Files(std::slice::from_ref(&stored)),
            false,
            "the file",
        );
        for name in &names {
            loader
                .get(name, &shape, Init::Constant(0.0))
                .expect("a weight");
        }
        let params = loader.into_params();
        let last = Candle::to_floats(params[TENSORS - 1].1.value()).expect("floats");
        assert_eq!(last[0], (TENSORS - 1) as f32);
        let took = peak() - before;
        println!(
            "{size} KiB loaded: {took} KiB more at the peak, {:?}",
            clock.elapsed()
        );
        // The model, the tensor on its way, and what was compared.
        assert!(
            took < size + size / 4,
            "{took} KiB for {size} KiB of weights"
        );
    }
}

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
    let (l, d) = (student.tokens().tokens(), student.tokens().dim);
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
            .reshape(&[batch * l, student.tokens().vocabulary])?;
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
#[ignore = "a minute and some GB: cargo test --release -p retort-tests --test memory -- --ignored --nocapture"]
fn recomputed_activations_take_less_memory() {
    let mut made = student(Family::Llamagen, "B", 12);
    let mut peaks = Vec::new();
    for (batch, recompute) in [(4, true), (4, false)] {
        made.1.recompute(recompute);
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
