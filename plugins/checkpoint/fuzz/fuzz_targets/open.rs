//! Every byte string gives tensors or an error. From plugins/checkpoint, with seeds in a folder `corpus`:
//!
//! ```text
//! cargo +nightly fuzz run open corpus
//! ```
//!
//! A stable compiler will do, too, from the folder `fuzz`:
//!
//! ```text
//! RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks \
//!   -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
//!   -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares" \
//!   cargo build --release --target x86_64-unknown-linux-gnu
//! target/x86_64-unknown-linux-gnu/release/open corpus -rss_limit_mb=1024 -timeout=20 -max_len=65536
//! ```
#![no_main]

#[path = "../exercise.rs"]
mod exercise;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    exercise::exercise(bytes);
});
