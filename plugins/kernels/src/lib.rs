//! Loops over floats in the memory of the host, for every backend that has tensors there.
//!
//! Slices go in, slices come out: no tensor library is known here, and no stage. Work is shared out by the [`Pool`] of
//! the caller's library, so that a process keeps one set of threads. No result depends on their number.

pub mod flow;
pub mod lanes;
mod pool;
pub mod skinny;
pub mod wide;

pub use pool::{Pool, Rayon};
