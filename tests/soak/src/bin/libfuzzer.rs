//! The targets of the soak, led by coverage: the environment variable TARGET names one. From this folder, with a stable
//! compiler:
//!
//! ```text
//! RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks \
//!   -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
//!   -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares" \
//!   cargo build --release --target x86_64-unknown-linux-gnu
//! mkdir -p found
//! TARGET=recipe target/x86_64-unknown-linux-gnu/release/target found ../corpus/recipe \
//!   -rss_limit_mb=1024 -timeout=20 -max_len=65536
//! ```
//!
//! What it finds belongs into the corpus.
#![no_main]

use std::sync::OnceLock;

use retort_soak::fuzz::Target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("TARGET").expect("TARGET names a target");
        Target::named(&name).expect("there is such a target")
    });
    (target.exercise)(bytes);
});
