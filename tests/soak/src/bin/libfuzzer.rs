//! The targets of the soak, led by coverage: the environment variable TARGET names one. `make libfuzzer` builds it with the
//! flags of a fuzzer and runs it; without them nothing leads it.
#![no_main]

use std::sync::OnceLock;

use retort_soak::fuzz::Target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        // libFuzzer's own ends the process at a panic that a reader catches: decoders of images may panic on damage.
        // One that nobody catches still ends it.
        drop(std::panic::take_hook());
        let name = std::env::var("TARGET").expect("TARGET names a target");
        Target::named(&name).expect("there is such a target")
    });
    (target.exercise)(bytes);
});
