//! The retort runner: recipe -> plan -> stages executed in worker processes -> history.
//!
//! No tensors here: plugins compute, and a plugin is loaded only in a worker process. The modules follow the glossary: a
//! [`recipe`] is the user's text, a [`plan`] is that recipe with every default, device and reference resolved. Only [`cli`]
//! touches the terminal.

// A closed stdout or stderr must not panic: everything printed goes through `cli::output`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod account;
pub mod artifact;
pub mod chart;
pub mod cli;
pub mod cluster;
pub mod diagnostic;
pub mod draft;
pub mod duration;
pub mod environment;
pub mod executor;
pub mod filter;
pub mod frame;
pub mod input;
pub mod plan;
pub mod plugin;
pub mod progress;
pub mod recipe;
pub mod report;
pub mod schema;
pub mod settings;
pub mod store;
pub mod sweep;
pub mod table;
pub mod tensorboard;
pub mod terminal;
pub mod trust;
pub mod ui;
pub mod worker;
pub mod yaml;
