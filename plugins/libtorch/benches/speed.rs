//! Times of training, distillation and sampling on candle, libtorch and PyTorch, side by side:
//!
//!     cargo bench -p retort-libtorch --bench speed [-- PART OF A LINE [COLUMN,COLUMN..]]
//!
//! Both compute in f32 and in bf16. `PYTHON` names a Python with torch for the last columns, eager and compiled; without
//! it they are left out. Compiling takes minutes. `-- "tokenizer 32" candle,PyTorch` measures one row in two columns.

use retort_candle::Candle;
use retort_libtorch::Libtorch;
use retort_tests::speed::{BackendRun, Peer, Timed, report};

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let candle = |dtype| Candle::open("cpu", dtype, threads).expect("a CPU");
    let libtorch = |dtype| Libtorch::open("cpu", dtype, threads).expect("a CPU");
    let mut all: Vec<Box<dyn Timed>> = vec![
        Box::new(BackendRun {
            name: "candle".into(),
            backend: candle("f32"),
        }),
        Box::new(BackendRun {
            name: "candle bf16".into(),
            backend: candle("bf16"),
        }),
        Box::new(BackendRun {
            name: "libtorch".into(),
            backend: libtorch("f32"),
        }),
        Box::new(BackendRun {
            name: "libtorch bf16".into(),
            backend: libtorch("bf16"),
        }),
    ];
    if let Ok(python) = std::env::var("PYTHON") {
        for compile in [None, Some("default")] {
            for dtype in ["f32", "bf16"] {
                all.push(Box::new(Peer {
                    python: python.clone(),
                    dtype,
                    threads,
                    compile: compile.map(Into::into),
                }));
            }
        }
    }
    report(all).expect("a table");
}
