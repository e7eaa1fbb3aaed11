//! Both faces of the plugin against the engine's definitions: the plain operations and the fused kernels.

use retort_candle::Candle;
use retort_candle::plain::Plain;
use retort_engine::backend::Backend;
use retort_engine::conformance;

fn check<B: Backend>(backend: &B) {
    let cases = conformance::check(backend);
    for case in &cases {
        println!(
            "{} {:<60} {:9.2e} of {:8.1e}",
            if case.passed { "  " } else { "! " },
            case.name,
            case.error,
            case.tolerance
        );
    }
    let failed: Vec<&str> = cases
        .iter()
        .filter(|case| !case.passed)
        .map(|case| case.name.as_str())
        .collect();
    assert!(
        failed.is_empty(),
        "{} of {} cases: {failed:#?}",
        failed.len(),
        cases.len()
    );
}

fn open() -> Candle {
    Candle::open("cpu", "f32", 2).expect("the CPU opens")
}

#[test]
fn plain() {
    check(&Plain(open()));
}

#[test]
fn fused() {
    check(&open());
}
