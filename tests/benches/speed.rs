//! Times of the phases of distillation on candle: `cargo bench -p retort-tests --bench speed [-- PART OF A LINE
//! [COLUMN,COLUMN..]]`.
//!
//! The libtorch plugin's bench of the same name has candle, libtorch and PyTorch side by side.

use retort_candle::Candle;
use retort_tests::speed::{On, report};

fn main() {
    let backend = Candle::open("cpu", "f32", 0).expect("a CPU");
    let candle = On {
        name: "candle".into(),
        backend,
    };
    report(vec![Box::new(candle)]).expect("a table");
}
