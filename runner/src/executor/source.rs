//! The files and folders that a stage reads beside its inputs, watched while it reads them.
//!
//! A digest covers their content when the run began. A stage that reads other content would be recorded under the wrong
//! digest and wrongly reused from then on. So they are checked before and after the stage; if the file system reports no
//! change, nothing is read.

use std::path::PathBuf;

use crate::input::FileKind;
use crate::input::{FileSnapshot, InputError, Listing};
use crate::store::{HashTrust, Store};

/// A file or folder that a stage reads.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// Pointer of the option that names it.
    pub pointer: String,
    /// Where it is.
    pub path: PathBuf,
    /// What it is.
    pub kind: FileKind,
    /// The hash of its content in the stage's digest.
    pub snapshot: FileSnapshot,
}

impl SourceFile {
    /// Checks before the stage begins that the content still matches the digest; from then on the file must not be written.
    ///
    /// # Errors
    /// The problem, in words.
    pub async fn begin(&mut self, store: &Store) -> Result<(), String> {
        let said = |error: InputError| error.to_string();
        if self.listing().await.map_err(said)?.is_as(&self.snapshot) && !self.snapshot.is_young() {
            return Ok(());
        }
        let now = store
            .snapshot(&self.path, self.kind, HashTrust::Trusted)
            .await;
        let now = now.map_err(said)?;
        if now.hash != self.snapshot.hash {
            return Err(self.changed("has changed since the run began").await);
        }
        self.snapshot = now;
        Ok(())
    }

    /// Whether nothing was written since [`SourceFile::begin`].
    ///
    /// # Errors
    /// What was written, in words.
    pub async fn end(&self, store: &Store) -> Result<(), String> {
        let said = |error: InputError| error.to_string();
        let mut same = self.listing().await.map_err(said)?.is_as(&self.snapshot);
        if same && self.snapshot.is_young() {
            let now = store
                .snapshot(&self.path, self.kind, HashTrust::Trusted)
                .await;
            same = now.map_err(said)?.hash == self.snapshot.hash;
        }
        match same {
            true => Ok(()),
            false => Err(self.changed("was written while the stage ran").await),
        }
    }

    /// Checking many files takes long, so not on the event loop.
    async fn listing(&self) -> Result<Listing, InputError> {
        let (path, kind) = (self.path.clone(), self.kind);
        let listing = tokio::task::spawn_blocking(move || Listing::of(&path, kind)).await;
        listing.unwrap_or_else(|error| Err(InputError::interrupted(&self.path, error)))
    }

    async fn changed(&self, what: &str) -> String {
        let newest = self.listing().await.map(|listing| listing.newest());
        let path = newest.unwrap_or_else(|_| self.path.clone());
        let of = match path == self.path {
            true => String::new(),
            false => format!(", or something else in {},", self.path.display()),
        };
        format!("{}{of} {what} (option {})", path.display(), self.pointer)
    }
}
