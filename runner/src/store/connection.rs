//! Connections to the database file of a store.

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteSynchronous};
use sqlx::{ConnectOptions, QueryBuilder, Sqlite};

use super::{BUSY_TIMEOUT, StoreError, sandbox};

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
        // Up to 64 MB, if needed: filters over many runs visit the same pages repeatedly.
        .pragma("cache_size", "-65536")
        // The file may have been damaged, or written by somebody else.
        .pragma("trusted_schema", "off")
        .pragma("cell_size_check", "on")
        .disable_statement_logging()
}

/// Opens a connection, with the limits that every one has.
pub(super) async fn connect(
    options: &SqliteConnectOptions,
) -> Result<SqliteConnection, sqlx::Error> {
    let mut connection = options.connect().await?;
    sandbox::protect(&mut connection).await?;
    Ok(connection)
}

/// A connection that may write to an existing, current store.
pub(super) async fn connect_for_writing(dir: &Path) -> Result<SqliteConnection, StoreError> {
    let path = path_of(dir);
    // A reader does not wait long: what it cannot record now, the next one will.
    let options = options(&path).busy_timeout(Duration::from_millis(200));
    connect(&options)
        .await
        .map_err(|error| StoreError::from(error).at(&path))
}

/// The most rows of a statement: a block has eleven values, and a statement takes at most 32,766.
pub(super) const ROWS_AT_ONCE: usize = 1000;

/// Runs a statement for a number of rows. Its length varies, so it is not cached.
pub(super) async fn run_once(
    mut statement: QueryBuilder<Sqlite>,
    connection: &mut SqliteConnection,
) -> Result<(), sqlx::Error> {
    let statement = statement.build().persistent(false);
    statement.execute(connection).await?;
    Ok(())
}

/// Opens a connection and never closes it, for a store that another machine has taken: closing a machine's last connection
/// would write its log into the database.
pub(super) async fn stay_connected(dir: &Path) {
    let connected = async {
        let mut connection = connect(&options(&path_of(dir)).read_only(true)).await?;
        // It connects at the first query.
        sqlx::query("select count(*) from sqlite_schema")
            .execute(&mut connection)
            .await?;
        Ok::<_, sqlx::Error>(connection)
    };
    match connected.await {
        Ok(connection) => std::mem::forget(connection),
        Err(error) => tracing::debug!(%error, "a store that was taken"),
    }
}
