//! The boundary between the retort runner and its backend plugins: messages, the host's services, the C table.
//!
//! `retort_plugin.h` is the source of truth of the binary interface. This crate mirrors it, and wraps the plugin's
//! side so that a Rust plugin is an `impl Plugin` and one [`export_plugin!`] line. Deliberately absent: tensors,
//! anything about recipes, and the loading of plugins (the runner's).

pub mod export;
pub mod ffi;
pub mod host;
pub mod message;

pub use host::{ArtifactDraft, Cancel, Host, LogLevel};
pub use message::*;

/// A backend plugin, seen from Rust. Implement it and export it with [`export_plugin!`].
pub trait Plugin: Send + Sync + 'static {
    /// Its description; pure.
    fn describe(&self) -> Description;
    /// Devices really present.
    fn probe(&self, host: &dyn Host) -> Result<Vec<Device>, Failure>;
    /// Checks a stage's options beyond their schema; uses no device, reads no artifact.
    fn validate(&self, host: &dyn Host, job: &StageJob) -> Result<Vec<Diagnostic>, Failure>;
    /// Runs a stage.
    fn run(&self, host: &dyn Host, job: &StageJob) -> Result<StageResult, Failure>;
}
