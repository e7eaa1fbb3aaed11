//! `cargo +nightly fuzz run open ../../tests/golden/checkpoints`, from plugins/checkpoint.
#![no_main]

#[path = "../exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    exercise::exercise(bytes);
});
