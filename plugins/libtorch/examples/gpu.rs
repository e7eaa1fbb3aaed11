//! libtorch on a GPU: see [`retort_tests::gpu`].

use std::process::ExitCode;

use retort_libtorch::{Libtorch, meet};

fn main() -> ExitCode {
    retort_tests::gpu::main(|dtype| Libtorch::open("cuda", dtype, 0), meet)
}
