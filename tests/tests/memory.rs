//! Loading needs a single copy of the weights in memory, the model's. The only test here, because others would allocate
//! meanwhile.
//!
//! `RETORT_MEMORY_MIB=1024 cargo test --release -p retort-tests --test memory -- --nocapture` for a larger file.

use retort_candle::Candle;
use retort_engine::backend::Tensors;
use retort_engine::weights::{CheckpointWeights, Init, Loader, ParameterSource, write_each};
use retort_tests::memory::{peak, resident};
use retort_tests::torch::Archive;

const TENSORS: usize = 32;

#[test]
fn weights_are_loaded_and_written_one_at_a_time() {
    let asked = std::env::var("RETORT_MEMORY_MIB")
        .ok()
        .and_then(|s| s.parse::<usize>().ok());
    let size = asked.unwrap_or(128) << 10; // KiB
    let shape = [size / TENSORS, 256]; // 1 KiB per row
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
    let stored = CheckpointWeights::open(&torch, None).expect("the file");
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
        let stored = CheckpointWeights::open(&path, None).expect("the file");
        let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
        let mut loader = Loader::new(
            &backend,
            ParameterSource::Files(std::slice::from_ref(&stored)),
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
        // The model, the tensor being loaded, and the copy for comparison.
        assert!(
            took < size + size / 4,
            "{took} KiB for {size} KiB of weights"
        );
    }
}
