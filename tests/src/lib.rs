//! What the integration tests share.

pub mod agreement;
pub mod examination;
pub mod golden;
pub mod gpu;
pub mod memory;
pub mod ranks;
pub mod skip;
pub mod small;
pub mod speed;
pub mod throughput;
pub mod torch;
