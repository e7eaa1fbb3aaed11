//! Everything numerical of retort, written once and generic over a tensor [`backend::Backend`].
//!
//! A backend plugin is an `impl Tensors` and one export line. This crate provides the rest: the models, the flow map,
//! training, sampling, evaluation, and the stages of recipes. Deliberately absent: recipes, the store, the command line (the
//! runner's), and any tensor library.

pub mod arrays;
pub mod backend;
pub mod bundle;
pub mod captions;
pub mod collective;
pub mod conformance;
pub mod context;
pub mod data;
pub mod dataset;
pub mod error;
pub mod files;
pub mod finite;
pub mod memory;
pub mod model;
pub mod muon;
pub mod numpy;
pub mod perceptual;
pub mod picture;
pub mod plugin;
pub mod published;
pub mod random;
pub mod sampler;
pub mod samples;
pub mod size;
pub mod splice;
pub mod stage;
pub mod statistics;
pub mod tape;
pub mod text;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
