//! Compares every backend with the results of the published code.

use retort_candle::Candle;
use retort_tests::golden;

#[test]
fn candle_agrees_with_the_published_code() {
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let cases = golden::check(&backend).expect("a comparison");
    assert!(golden::report("candle", &cases), "see the table above");
}

#[test]
fn candle_agrees_with_the_published_code_in_bf16() {
    let backend = Candle::open("cpu", "bf16", 2).expect("a CPU");
    let cases = golden::published_rounded(&backend).expect("a comparison");
    assert!(golden::report("candle bf16", &cases), "see the table above");
}
