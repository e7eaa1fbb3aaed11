//! The CUDA variant of the candle plugin on a GPU: see [`retort_tests::gpu`].

use std::process::ExitCode;

use retort_candle::Cuda;

fn main() -> ExitCode {
    retort_tests::gpu::main(|dtype| Cuda::open("cuda", dtype, 0), retort_candle::meet)
}
