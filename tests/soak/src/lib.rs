//! Tries to break retort: hostile inputs for every reader, and random disturbances of a runner, its workers, its signals and
//! its disk.
//!
//! In: a seed and a time. Out: a [`report::Report`] of what was tried and which promises were broken. `make soak` runs both,
//! the tests of this crate a short part of them. Deliberately absent: checks of results' quality, which other tests do: these
//! look only for things that must never happen.

pub mod disturb;
pub mod fuzz;
pub mod random;
pub mod report;
