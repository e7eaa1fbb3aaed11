//! What the integration tests share.

pub mod agreement;
pub mod golden;
pub mod speed;
pub mod torch;
