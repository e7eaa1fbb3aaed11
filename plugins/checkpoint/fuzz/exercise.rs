//! What fuzzing calls: everything that this crate does with bytes it was given.

use retort_checkpoint::Checkpoint;

/// Opens the bytes and reads every tensor. Returns what an attentive fuzzer may want to see vary.
pub fn exercise(bytes: &[u8]) -> String {
    let checkpoint = match Checkpoint::from_bytes(bytes.to_vec()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return error.to_string(),
    };
    let mut outcome = format!(
        "{:?} {}",
        checkpoint.container(),
        checkpoint.strangers().len()
    );
    let selected = checkpoint.select(None).map(|d| d.path.clone());
    outcome.push_str(&selected.unwrap_or_else(|error| error.to_string()));
    let mut left: u64 = 256 << 20;
    for dictionary in checkpoint.dictionaries() {
        for (name, tensor) in dictionary.tensors() {
            assert_eq!(dictionary.get(name).map(|t| &t.shape), Some(&tensor.shape));
            // A file may name one storage thousands of times: enough is enough.
            if tensor.bytes() > left {
                continue;
            }
            left -= tensor.bytes();
            match checkpoint.raw(tensor) {
                Ok(raw) => assert_eq!(raw.len() as u64, tensor.bytes()),
                Err(error) => outcome.push_str(&error.to_string()),
            }
            if let Ok(floats) = checkpoint.floats(tensor) {
                assert_eq!(floats.len() as u64, tensor.elements());
            }
            if let Ok(indices) = checkpoint.indices(tensor) {
                assert_eq!(indices.len() as u64, tensor.elements());
            }
        }
    }
    outcome
}
