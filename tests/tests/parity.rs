//! Compares every backend with the results of the published code.

use retort_candle::Candle;
use retort_tests::golden;

#[test]
fn candle_agrees_with_the_published_code() {
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let cases = golden::check(&backend).expect("a comparison");
    assert!(golden::report("candle", &cases), "see the table above");
}
