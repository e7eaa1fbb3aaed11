//! Times of training, distillation and sampling on candle:
//!
//!     cargo bench -p retort-tests --bench speed [-- PART OF A LINE [COLUMN,COLUMN..]]
//!
//! `-- "tokenizer 32"` measures one row in seconds.
//! The libtorch plugin's bench of the same name compares candle, libtorch and PyTorch.

use retort_candle::Candle;
use retort_tests::speed::{BackendRun, Timed, report};

fn main() {
    let candle = |name: &str, dtype| BackendRun {
        name: name.into(),
        backend: Candle::open("cpu", dtype, 0).expect("a CPU"),
    };
    let columns = [("candle", "f32"), ("candle bf16", "bf16")];
    let columns = columns.map(|(name, dtype)| Box::new(candle(name, dtype)) as Box<dyn Timed>);
    report(columns.into()).expect("a table");
}
