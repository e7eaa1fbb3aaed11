//! Files of artifacts in an exported file.

use std::io::Read;
use std::path::Path;

use sqlx::sqlite::SqliteConnection;

use crate::artifact::{self, ArtifactFile};
use crate::store::StoreError;

/// Bytes of a file in one row.
pub(in crate::store) const PART: usize = 1 << 20;

/// Files of artifacts in an exported file. Not part of a store's schema: a store keeps them as files.
pub(in crate::store) const FILES: &str = "create table exported_files (artifact text not null, path text not null, part integer not null,
    data blob not null, primary key (artifact, path, part)) strict";

/// Adds the files of an artifact to the exported file: all of them, as in its record, or none.
pub(super) async fn put_files(
    connection: &mut SqliteConnection,
    artifacts: &Path,
    hash: &str,
) -> Result<(), StoreError> {
    let files: String = sqlx::query_scalar("select files from main.artifacts where hash = ?1")
        .bind(hash)
        .fetch_one(&mut *connection)
        .await?;
    let damaged = |message: String| StoreError::Damaged { message };
    let files: Vec<ArtifactFile> =
        serde_json::from_str(&files).map_err(|error| damaged(error.to_string()))?;
    // The record may come from another person, and no path may lead outside. The hash of the list guarantees that.
    if artifact::list_hash(&files) != hash {
        return Err(damaged("its files are not what its hash says".to_owned()));
    }
    for file in files {
        put_file(connection, &artifacts.join(hash), hash, &file).await?;
    }
    Ok(())
}

async fn put_file(
    connection: &mut SqliteConnection,
    dir: &Path,
    hash: &str,
    file: &ArtifactFile,
) -> Result<(), StoreError> {
    let path = dir.join(&file.path);
    let io = |source| StoreError::Io {
        path: path.clone(),
        source,
    };
    let changed = || StoreError::Damaged {
        message: format!(
            "the content of `{}` has changed since it was written",
            file.path
        ),
    };
    let mut reader = artifact::open_inner(dir, &file.path).map_err(io)?;
    let mut hasher = blake3::Hasher::new();
    let (mut part, mut size) = (0_i64, 0_u64);
    loop {
        let mut bytes = Vec::with_capacity(PART);
        std::io::Read::by_ref(&mut reader)
            .take(PART as u64)
            .read_to_end(&mut bytes)
            .map_err(io)?;
        // An empty file has one empty part.
        if bytes.is_empty() && part > 0 {
            break;
        }
        hasher.update(&bytes);
        size += bytes.len() as u64;
        if size > file.size {
            return Err(changed());
        }
        let last = bytes.len() < PART;
        sqlx::query(
            "insert into main.exported_files (artifact, path, part, data) values (?1, ?2, ?3, ?4)",
        )
        .bind(hash)
        .bind(&file.path)
        .bind(part)
        .bind(bytes)
        .execute(&mut *connection)
        .await?;
        part += 1;
        if last {
            break;
        }
    }
    match hasher.finalize().to_hex().as_str() == file.hash {
        true => Ok(()),
        false => Err(changed()),
    }
}
