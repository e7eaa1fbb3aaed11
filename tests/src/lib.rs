//! Shared code of the integration tests.

pub mod agreement;
pub mod clock;
pub mod digits;
pub mod examination;
pub mod golden;
pub mod gpu;
pub mod memory;
pub mod patience;
pub mod port;
pub mod precision;
pub mod process;
pub mod program;
pub mod ranks;
pub mod scale;
pub mod skip;
pub mod small;
pub mod speed;
pub mod threads;
pub mod throughput;
pub mod torch;
