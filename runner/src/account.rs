//! Explanations of runs, for the command line and pages: their differences, why their stages ran.
//!
//! In: what the store knows. Out: facts and sentences. Deliberately absent: how they are shown.

pub mod comparison;
pub mod plot;
pub mod reasons;
pub mod results;
