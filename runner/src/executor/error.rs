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
    /// Something in the store's directory cannot be used.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// A file that a stage names cannot be used.
    #[error(transparent)]
    Input(#[from] InputError),
    /// An artifact that the recipe takes by name is not there.
    #[error("the artifact {} that the recipe takes as `{name}` is not in the store", hash.get(..12).unwrap_or(hash))]
    NoArtifact {
        /// Its name in the recipe.
        name: String,
        /// Its hash.
        hash: String,
    },
    /// An artifact that the recipe takes by name is known, and its files are not what it was made of.
    #[error(
        "the artifact {} that the recipe takes as `{name}` is damaged: files are missing, or not of their size",
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
    /// The operating system refuses something basic.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}
