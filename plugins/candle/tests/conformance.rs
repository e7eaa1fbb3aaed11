//! Both faces of the plugin against the engine's definitions: the plain operations and the fused kernels.

use retort_candle::Candle;
use retort_candle::plain::Plain;
use retort_engine::conformance;

fn open() -> Candle {
    Candle::open("cpu", "f32", 2).expect("the CPU opens")
}

#[test]
fn plain() {
    conformance::verify(&Plain);
}

#[test]
fn fused() {
    conformance::verify(&open());
}
