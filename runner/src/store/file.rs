//! The cache of file hashes, so that a large file is read once and not at every command.
//!
//! A row is a folder, or a single file; its content ([`Folder`]) is packed, because a folder may hold a million files. The
//! cache is optional: missing entries are hashed again.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;
use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Row};

use super::{Access, Store, StoreError, sandbox};
use crate::input::FileKind;
use crate::input::{FileSnapshot, Folder, InputError, Listing};

/// Most bytes of a row: a little less than a connection may read.
const LONGEST_ROW: usize = sandbox::LONGEST as usize - 4096;

/// Whether to trust hashes of earlier commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashTrust {
    /// If the file system reports no change of the file.
    Trusted,
    /// Never: every file is read.
    Distrusted,
}

impl Store {
    /// The content of a file or folder; it is read only if it is not in the cache, and then cached.
    ///
    /// # Errors
    /// [`InputError`]. An unreadable or unwritable store is only slower.
    pub async fn snapshot(
        &self,
        path: &Path,
        kind: FileKind,
        trust: HashTrust,
    ) -> Result<FileSnapshot, InputError> {
        let at = path.to_owned();
        let listing = tokio::task::spawn_blocking(move || Listing::of(&at, kind)).await;
        let listing = listing.unwrap_or_else(|error| Err(InputError::interrupted(path, error)))?;
        let known = match trust {
            HashTrust::Distrusted => BTreeMap::new(),
            HashTrust::Trusted => {
                let known = self.remembered_files(&listing.folders()).await;
                known.unwrap_or_else(|error| {
                    tracing::debug!("hashes of files are not remembered: {error}");
                    BTreeMap::new()
                })
            }
        };
        // After Ctrl-C nobody waits for the thread, which would otherwise read to the end of its files.
        let waiting = Arc::new(());
        let waiter = Arc::downgrade(&waiting);
        let hashed = tokio::task::spawn_blocking(move || {
            listing.hashed_while(&|| waiter.strong_count() > 0, &known)
        })
        .await;
        drop(waiting);
        let hashed = hashed.unwrap_or_else(|error| Err(InputError::interrupted(path, error)));
        let (snapshot, anew) = hashed?;
        if let Err(error) = self.remember_files(&anew).await {
            tracing::debug!("hashes of files cannot be remembered: {error}");
        }
        Ok(snapshot)
    }

    /// The cache entries of these folders.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn remembered_files(
        &self,
        folders: &[String],
    ) -> Result<BTreeMap<String, Folder>, StoreError> {
        let wanted = serde_json::Value::from(folders).to_string();
        let rows = sqlx::query(
            "select path, files from file_hashes where path in (select value from json_each(?1))",
        );
        // Row by row: all of them may take half a gigabyte.
        let mut rows = rows.bind(wanted).fetch(self.pool());
        let mut folders = BTreeMap::new();
        while let Some(row) = rows.try_next().await? {
            let files: &[u8] = row.try_get("files")?;
            folders.insert(row.try_get("path")?, Folder::unpack(files));
        }
        Ok(folders)
    }

    /// Caches the entries of these folders, all at once; also through a store opened for reading.
    ///
    /// # Errors
    /// The store cannot be written to: then the files are read again the next time.
    pub async fn remember_files(
        &self,
        folders: &BTreeMap<String, Folder>,
    ) -> Result<(), StoreError> {
        if folders.is_empty() {
            return Ok(());
        }
        if self.access == Access::ReadWrite {
            let mut write = self.write().await?;
            put_files(&mut write, folders).await?;
            return write.commit().await;
        }
        let mut lease = self.take_write_lease().await?;
        let noted = async {
            let mut write = lease.connection().begin_with("begin immediate").await?;
            put_files(&mut write, folders).await?;
            Ok(write.commit().await?)
        };
        let noted = noted.await;
        lease.close().await;
        noted
    }
}

async fn put_files(
    connection: &mut SqliteConnection,
    folders: &BTreeMap<String, Folder>,
) -> Result<(), sqlx::Error> {
    for (path, files) in folders {
        let packed = files.pack();
        if path.len() + packed.len() > LONGEST_ROW {
            tracing::debug!(path, "too many files to be remembered");
            continue;
        }
        let query = sqlx::query(
            "insert into file_hashes (path, files) values (?1, ?2)
             on conflict (path) do update set files = excluded.files",
        );
        query
            .bind(path)
            .bind(packed)
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}
