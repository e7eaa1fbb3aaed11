//! Both faces of the plugin against the engine's definitions: the plain operations and the fused kernels.

use retort_candle::Candle;
use retort_candle::plain::Plain;
use retort_engine::backend::Tensors;
use retort_engine::conformance;

fn open(dtype: &str) -> Candle {
    Candle::open("cpu", dtype, 2).expect("the CPU opens")
}

#[test]
fn plain() {
    conformance::verify(&Plain);
}

#[test]
fn fused() {
    conformance::verify(&open("f32"));
}

#[test]
fn fused_in_bf16() {
    let cases = conformance::check_rounded(&open("bf16"), 2f64.powi(-8));
    let failed: Vec<String> = cases
        .iter()
        .filter(|case| !case.passed)
        .map(|case| format!("{}: {:.1e} > {:.1e}", case.name, case.error, case.tolerance))
        .collect();
    assert!(failed.is_empty() && !cases.is_empty(), "{failed:#?}");
    conformance::verify(&open("bf16").exact());
}
