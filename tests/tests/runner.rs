//! The runner, through its real binary: runs, reuse, faults, interruptions, stores in trouble, checkpoint files.
//!
//! The stages come from a plugin in C (`fixtures/faulty.c`) whose options control its behaviour; in `training`, `ablations`,
//! `dividing` and `measuring` they come from candle.

#[path = "runner/abi.rs"]
mod abi;
#[path = "runner/ablations.rs"]
mod ablations;
#[path = "runner/authoring.rs"]
mod authoring;
#[path = "runner/captions.rs"]
mod captions;
#[path = "runner/checkpoints.rs"]
mod checkpoints;
#[path = "runner/cluster.rs"]
mod cluster;
#[path = "runner/dividing.rs"]
mod dividing;
#[path = "runner/exports.rs"]
mod exports;
#[path = "runner/faults.rs"]
mod faults;
#[path = "runner/history.rs"]
mod history;
#[path = "runner/images.rs"]
mod images;
#[path = "runner/imports.rs"]
mod imports;
#[path = "runner/interrupted_transfers.rs"]
mod interrupted_transfers;
#[path = "runner/interruptions.rs"]
mod interruptions;
#[path = "runner/lab.rs"]
mod lab;
#[path = "runner/measuring.rs"]
mod measuring;
#[path = "runner/plugins.rs"]
mod plugins;
#[path = "runner/published.rs"]
mod published;
#[path = "runner/questions.rs"]
mod questions;
#[path = "runner/recipes.rs"]
mod recipes;
#[path = "runner/report.rs"]
mod report;
#[path = "runner/runs.rs"]
mod runs;
#[path = "runner/sampling.rs"]
mod sampling;
#[path = "runner/show.rs"]
mod show;
#[path = "runner/snapshots.rs"]
mod snapshots;
#[path = "runner/sources.rs"]
mod sources;
#[path = "runner/stores.rs"]
mod stores;
#[path = "runner/sweeps.rs"]
mod sweeps;
#[path = "runner/terminal.rs"]
mod terminal;
#[path = "runner/tokenizers.rs"]
mod tokenizers;
#[path = "runner/training.rs"]
mod training;
#[path = "runner/tricks.rs"]
mod tricks;
