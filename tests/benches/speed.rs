//! Times of training, distillation and sampling on candle:
//!
//!     cargo bench -p retort-tests --bench speed [-- PART OF A LINE [COLUMN,COLUMN..]]
//!
//! `-- "tokenizer 32"` measures one row in seconds.
//! The libtorch plugin's bench of the same name compares candle, libtorch and PyTorch.

use retort_candle::Candle;
use retort_tests::speed::{BackendRun, report};

fn main() {
    let backend = Candle::open("cpu", "f32", 0).expect("a CPU");
    let candle = BackendRun {
        name: "candle".into(),
        backend,
    };
    report(vec![Box::new(candle)]).expect("a table");
}
