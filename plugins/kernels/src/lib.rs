//! Loops over floats in host memory, for every backend with tensors there.
//!
//! Slices in, slices out: this crate knows no tensor library and no stage. Work is distributed by the [`Pool`] of the
//! caller's library, so that a process has one set of threads. No result depends on their number.

pub mod flow;
pub mod half;
pub mod lanes;
mod matrix;
mod pool;
pub mod skinny;
pub mod tiles;
pub mod wide;

pub use matrix::Matrix;
pub use pool::{Alone, Pool, Rayon};
