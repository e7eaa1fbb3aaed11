//! What is told of runs, on the command line and on pages: what differs between them, why their stages ran.
//!
//! In: what the store knows. Out: facts and sentences. Deliberately absent: how they are shown.

pub mod comparison;
pub mod reasons;
