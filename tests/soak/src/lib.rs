//! What tries to break retort: hostile inputs for everything that reads them, and a runner, its workers, its signals and
//! its disk disturbed at random while it works.
//!
//! In: a seed and a time. Out: a [`report::Report`] of what was tried and which promises were broken. `make soak` runs
//! both, the tests of this crate a short part of them. Deliberately absent: what a right result is worth (the other
//! tests' business): here only what must never happen is looked for.

pub mod disturb;
pub mod fuzz;
pub mod random;
pub mod report;
