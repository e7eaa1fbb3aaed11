//! The soak's targets, guided by coverage: the environment variable TARGET names one. `make libfuzzer` builds it with a
//! fuzzer's flags and runs it; without them it is not guided.
#![no_main]

use std::sync::OnceLock;

use retort_soak::fuzz::Target;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        // libFuzzer's panic hook would end the process even if a reader catches the panic: image decoders may panic on damage.
        // An uncaught panic still ends it.
        drop(std::panic::take_hook());
        let name = std::env::var("TARGET").expect("TARGET names a target");
        Target::named(&name).expect("there is such a target")
    });
    (target.exercise)(bytes);
});
