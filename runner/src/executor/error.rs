//! Why a plan could not be run.

use crate::artifact::ArtifactError;
use crate::input::InputError;
use crate::store::StoreError;

/// Why a plan could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file or directory of the store cannot be used.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A file that a stage names cannot be used.
    #[error(transparent)]
    Input(#[from] InputError),
    /// An artifact that the recipe takes by name is missing.
    #[error("the artifact {} that the recipe takes as `{name}` is not in the store", hash.get(..12).unwrap_or(hash))]
    NoArtifact {
        /// Its name in the recipe.
        name: String,
        /// Its hash.
        hash: String,
    },
    /// An artifact that the recipe takes by name is damaged.
    #[error(
        "the artifact {} that the recipe takes as `{name}` is damaged: files are missing, or have other sizes than were recorded",
        hash.get(..12).unwrap_or(hash)
    )]
    Damaged {
        /// Its name in the recipe.
        name: String,
        /// Its hash.
        hash: String,
    },
    /// A stage left out by `--from` is needed and was never made.
    #[error("`{stage}` is left out by --from, but its result is needed and not in the store")]
    Missing {
        /// The stage.
        stage: String,
    },
    /// A signal ended it while files were read that its stages name.
    #[error("interrupted before the run began")]
    Interrupted,
    /// A basic operation of the operating system failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}
