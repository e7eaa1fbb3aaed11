//! libtorch against the results of the published code, and against candle.

use retort_candle::Candle;
use retort_libtorch::Libtorch;
use retort_tests::{agreement, golden};

fn libtorch() -> Libtorch {
    Libtorch::open("cpu", "f32", 2).expect("a CPU")
}

#[test]
fn libtorch_agrees_with_the_published_code() {
    let cases = golden::check(&libtorch()).expect("a comparison");
    assert!(golden::report("libtorch", &cases), "see the table above");
}

#[test]
fn libtorch_agrees_with_candle() {
    let candle = Candle::open("cpu", "f32", 2).expect("a CPU");
    let cases = agreement::compare(&candle, &libtorch()).expect("both compute");
    assert!(golden::report("both", &cases), "see the table above");
}
