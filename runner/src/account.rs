//! Explanations of runs, for the command line and pages: how they differ, why their stages ran.
//!
//! In: records of the store. Out: facts and sentences. Deliberately absent: presentation.

pub mod comparison;
pub mod plot;
pub mod reasons;
pub mod results;
