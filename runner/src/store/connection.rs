//! Connections to the database file of a store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::ConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteSynchronous};

use super::{BUSY_TIMEOUT, StoreError};

/// The database of a store.
pub(super) fn path_of(dir: &Path) -> PathBuf {
    dir.join("history.db")
}

/// How a database is opened.
pub(super) fn options(path: &Path) -> SqliteConnectOptions {
    // Absolute: SQLite would take `file:x` for a URI, and `:memory:` for no file at all.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    SqliteConnectOptions::new()
        .filename(path)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        // With a write-ahead log: a crash of the machine may lose the last moments, never the database.
        .synchronous(SqliteSynchronous::Normal)
        // Up to 64 MB, as far as they are used: filters over many runs visit the same pages again and again.
        .pragma("cache_size", "-65536")
        .disable_statement_logging()
}

/// A connection that may write to an existing, current store.
pub(super) async fn connect_for_writing(dir: &Path) -> Result<SqliteConnection, StoreError> {
    let path = path_of(dir);
    // A reader makes up its mind quickly; what it cannot note down now, the next one will.
    let options = options(&path).busy_timeout(Duration::from_millis(200));
    options
        .connect()
        .await
        .map_err(|error| StoreError::from(error).at(&path))
}
