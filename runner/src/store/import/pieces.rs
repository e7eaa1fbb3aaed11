//! Copies the draft into the store in pieces: transactions of whole runs, between which others can write.
//!
//! A run is imported with everything that belongs to it, including the files of its artifacts, or not at all. So an interrupted
//! import leaves whole runs, and the next one continues after them, because known runs are skipped.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;

use super::Staged;
use crate::artifact;
use crate::store::StoreError;
use crate::store::transfer::{self, Copied, Copy, Transfer};

/// Approximate duration of a piece: it ends with the current run.
pub(super) const PIECE: Duration = Duration::from_millis(250);
/// The pause between two pieces, in which others can write: SQLite's longest polling interval.
pub(super) const PAUSE: Duration = Duration::from_millis(100);
/// The longest extension of a piece: it goes on until it has the runs whose stages its own runs reuse. A later piece adds
/// what is missing after that.
const LONGEST: Duration = Duration::from_secs(2);

/// Copies all runs of the database attached as `source`, which has been checked, into `main`, and files of artifacts to their
/// places. `between` is called while nothing is locked.
pub(super) async fn copy_all(
    connection: &mut SqliteConnection,
    mut staged: Staged,
    artifacts: &Path,
    piece: Duration,
    mut between: impl AsyncFnMut() -> Result<(), StoreError>,
) -> Result<Transfer, StoreError> {
    let mut lost = Vec::new();
    let runs = transfer::all_runs(connection, &mut lost).await;
    let mut files: HashMap<String, PathBuf> = staged.files.drain(..).collect();
    let mut copied = Copied::default();
    let mut runs = runs.iter();
    while !runs.as_slice().is_empty() {
        let began = Instant::now();
        let mut transaction = connection.begin_with("begin immediate").await?;
        let mut copy = Copy::new(&mut transaction, &mut copied, true);
        let mut published = Vec::new();
        for run in runs.by_ref() {
            copy.run(run).await?;
            let hashes = match files.is_empty() && staged.there.is_empty() {
                true => Vec::new(),
                false => copy.artifacts(run).await?,
            };
            for hash in hashes {
                match files.remove(&hash) {
                    Some(staging) => {
                        publish(&staging, &hash, artifacts)?;
                        published.push(hash);
                    }
                    // Until now no run needed them.
                    None if staged.there.remove(&hash) && !artifacts.join(&hash).exists() => {
                        staged.lost.push(format!(
                            "artifact {hash}: its files were removed meanwhile; import once more"
                        ));
                    }
                    None => {}
                }
            }
            let whole = copy.connect_reused().await?;
            let taken = began.elapsed();
            if taken >= piece && (whole || taken >= LONGEST) {
                break;
            }
        }
        // Last: no artifact of a run may be missing once the run is there. Until then no other process removes them.
        transaction.commit().await?;
        copied.done.artifacts.append(&mut published);
        if !runs.as_slice().is_empty() {
            between().await?;
        }
    }
    let mut transfer = copied.done;
    transfer.artifacts.sort();
    transfer.lost.append(&mut lost);
    transfer.lost.append(&mut staged.lost);
    Ok(transfer)
}

/// Moves the files of an artifact to their place.
fn publish(staging: &Path, hash: &str, artifacts: &Path) -> Result<(), StoreError> {
    artifact::publish(staging, hash, artifacts).map_err(|error| match error {
        artifact::ArtifactError::Io { path, source, .. } => StoreError::refused(&path, source),
        error => StoreError::Io {
            path: artifacts.to_owned(),
            source: std::io::Error::other(error),
        },
    })
}
