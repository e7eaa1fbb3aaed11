//! Every backend against the results of the published code.

use retort_candle::Candle;
use retort_tests::golden;

#[test]
fn candle_agrees_with_the_published_code() {
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let rows = golden::suite(&backend).expect("a comparison");
    assert!(golden::report("candle", &rows), "see the table above");
}

#[test]
fn candle_measures_as_the_packages_do() {
    let backend = Candle::open("cpu", "f32", 2).expect("a CPU");
    let rows = golden::measures(&backend).expect("the measuring networks");
    assert!(golden::report("candle", &rows), "see the table above");
}
