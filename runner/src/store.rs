//! The store: runs, their outcomes and their results, in SQLite (`<store>/history.db`).
//!
//! In: runs, stages, attempts, metrics, logs and artifact records, only from the runner. Out: the same, through queries. Many
//! processes may use one store at once: readers never wait for a writer (WAL), writers wait for each other for a few seconds
//! and then report [`StoreError::Busy`].
//!
//! A dead run is never shown as alive: its runner holds a lease, and every reading function first marks runs whose runner is
//! gone as `lost` ([`lease`]).
//!
//! One machine at a time writes ([`host`]): before every write this machine checks that it still owns the store.
//!
//! Deliberately absent: the files of artifacts (`artifact.rs`), digests (`plan.rs`), printing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::Sqlite;
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{SqliteConnection, SqlitePool};

mod block;
mod browse;
mod connection;
mod deadline;
mod error;
mod file;
mod file_limit;
mod function;
mod history;
mod holder;
mod host;
mod import;
mod jobs;
mod lease;
mod lineage;
mod log;
mod maintenance;
mod mlflow;
mod objects;
mod query;
mod record;
mod recording;
mod reference;
mod sandbox;
mod schema;
mod scratch;
mod select;
mod series;
mod sweep;
mod time;
mod transfer;
mod unrecorded;

pub use crate::artifact::{ArtifactFile, ArtifactRecord};
pub use browse::{Group, LogQuery};
pub use deadline::within;
pub use error::StoreError;
pub use file::HashTrust;
pub use history::{
    ArtifactRow, AttemptDetail, LastExecution, ReusableAttempt, RunDetail, RunFilter, RunSummary,
    SourceStage, StageCounts, StageDetail,
};
pub use jobs::{DetachedJobs, ElementUpdate, JobKey, JobRow, OpenJob};
pub use lineage::{Lineage, LineageArtifact, StageRecord};
pub use log::{LogLine, LogSource, RunLine};
pub use maintenance::Garbage;
pub use query::{AnswerValue, QueryPiece};
pub use record::{
    AttemptEnd, AttemptState, NewRun, NewStage, Param, RecordedPlugin, RunState, StageState, Usage,
};
pub use recording::{ReadMark, Recording};
pub use reference::is_tag;
pub use select::Sort;
pub use series::{Axis, Batch, Bucket, CurveQuery, MetricPoint, SeriesPoint, SeriesSummary};
pub use sweep::{SweepDetail, SweepId, SweepPlace, SweepPlan, SweepPoint, SweepSummary};
pub use time::Time;
pub use transfer::{Transfer, export};

/// How long a writer waits for another before it reports [`StoreError::Busy`].
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// How a store is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// For recording runs; the store is created if missing, and migrated if older.
    ReadWrite,
    /// For queries; works in a read-only directory, and concurrently with a writer on the same machine.
    ReadOnly,
}

/// Names a run: ten characters, sorting by time of creation.
#[derive(
    Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct RunId(pub String);

impl std::fmt::Display for RunId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// Names a stage of a run, within one store.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct StageId(pub i64);

/// Names an attempt at a stage, within one store.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct AttemptId(pub i64);

impl std::fmt::Display for AttemptId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    access: Access,
    pool: SqlitePool,
    /// Writers of this process queue here instead of polling for SQLite's lock.
    writer: tokio::sync::Mutex<()>,
    /// The series of current attempts: their keys, and the points of their open blocks.
    series: Mutex<HashMap<AttemptId, HashMap<String, series::OpenSeries>>>,
    /// Facts about runs that could not be recorded because the store is not writable, by run id.
    unrecorded: Mutex<HashMap<String, unrecorded::PendingRunState>>,
    /// This machine's right to write.
    host_lock: Option<host::HostLock>,
    /// Whether another machine has taken the store.
    taken: AtomicBool,
}

impl Store {
    /// Opens the store in `dir`. For [`Access::ReadWrite`] the directory and the database are created if missing and migrated
    /// if older; any number of processes may do so at once.
    ///
    /// # Errors
    /// [`StoreError::Missing`] (reading only), [`StoreError::NewerSchema`], [`StoreError::NotAStore`],
    /// [`StoreError::ReadOnly`], [`StoreError::Busy`], [`StoreError::Full`], [`StoreError::Damaged`].
    pub async fn open(dir: &Path, access: Access) -> Result<Store, StoreError> {
        let (pool, host_lock) = match access {
            Access::ReadWrite => {
                schema::check_files(&connection::path_of(dir))?;
                schema::make_directory(dir)?;
                let known = host::is_known(dir);
                let host_lock = host::claim(dir, host::ClaimKind::Lasting).await?;
                match schema::open_for_writing(dir).await {
                    Ok(pool) => (pool, host_lock),
                    Err(error) => {
                        drop(host_lock);
                        // Other files are left as they were.
                        if !known {
                            host::forget(dir);
                        }
                        return Err(error);
                    }
                }
            }
            Access::ReadOnly => {
                host::check(dir)?;
                (schema::open_for_reading(dir).await?, None)
            }
        };
        Ok(Store {
            dir: dir.to_owned(),
            access,
            pool,
            writer: tokio::sync::Mutex::default(),
            series: Mutex::default(),
            unrecorded: Mutex::default(),
            host_lock,
            taken: AtomicBool::new(false),
        })
    }

    /// The directory of the store.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The connection pool for reading, and for `query`.
    pub fn pool(&self) -> &SqlitePool {
        &self.pool
    }

    /// Closes the store, and folds the write-ahead log into the database if no other process uses it. Without this call nothing
    /// is lost, but the next process that opens the store has a little more to read.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Begins a transaction that may write. Waits for other writers.
    async fn write(&self) -> Result<WriteTransaction<'_>, StoreError> {
        if self.access == Access::ReadOnly {
            return Err(StoreError::ReadOnly {
                path: self.dir.clone(),
            });
        }
        let turn = self.writer.lock().await;
        self.confirm().await?;
        let mut write = WriteTransaction {
            store: self,
            connection: self.pool.acquire().await?,
            committed: false,
            _turn: turn,
        };
        sqlx::query("begin immediate").execute(&mut *write).await?;
        Ok(write)
    }

    /// Checks that no other machine has the store. A process that only reads checks every time, because the owner may change.
    ///
    /// # Errors
    /// [`StoreError::Elsewhere`].
    pub async fn check_host(&self) -> Result<(), StoreError> {
        if self.host_lock.is_some() {
            return self.confirm().await;
        }
        let dir = self.dir.clone();
        let checked = tokio::task::spawn_blocking(move || host::check(&dir)).await;
        let checked = checked.unwrap_or_else(|error| {
            Err(StoreError::refused(&self.dir, std::io::Error::other(error)))
        });
        match &checked {
            Err(StoreError::Elsewhere { .. }) => self.taken.store(true, Ordering::Relaxed),
            // These connections have seen the log before another machine wrote to it.
            Ok(()) if self.taken.swap(false, Ordering::Relaxed) => {
                while let Some(connection) = self.pool.try_acquire() {
                    let _ = connection.close().await;
                }
            }
            _ => {}
        }
        checked
    }

    /// Checks before a write that this machine still owns the store.
    async fn confirm(&self) -> Result<(), StoreError> {
        let Some(host_lock) = &self.host_lock else {
            return Ok(());
        };
        let confirmed = host_lock.confirm().await;
        if matches!(confirmed, Err(StoreError::Elsewhere { .. }))
            && !self.taken.swap(true, Ordering::Relaxed)
        {
            connection::stay_connected(&self.dir).await;
        }
        confirmed
    }
}

/// A write transaction, and this process's turn at writing. If dropped without [`WriteTransaction::commit`] it has no effect,
/// and its connection is closed: SQLite ends a transaction itself when the disk is full or fails, and a connection in an
/// unknown state is of no use to the next writer.
struct WriteTransaction<'s> {
    store: &'s Store,
    connection: PoolConnection<Sqlite>,
    committed: bool,
    _turn: tokio::sync::MutexGuard<'s, ()>,
}

impl WriteTransaction<'_> {
    async fn commit(mut self) -> Result<(), StoreError> {
        // This process may have been stopped since it began.
        self.store.confirm().await?;
        sqlx::query("commit").execute(&mut *self).await?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for WriteTransaction<'_> {
    fn drop(&mut self) {
        if !self.committed {
            self.connection.close_on_drop();
        }
    }
}

impl std::ops::Deref for WriteTransaction<'_> {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.connection
    }
}

impl std::ops::DerefMut for WriteTransaction<'_> {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }
}

/// Most memory that a parsed value of a row may take, as [`retort_checkpoint::json::weight`] estimates it: the files of the
/// largest artifact, of which the estimate is several times too high.
pub(crate) const HEAVIEST_VALUE: usize = 384 << 20;

/// Reads a JSON column.
fn json<T: serde::de::DeserializeOwned>(
    row: &sqlx::sqlite::SqliteRow,
    column: &str,
) -> Result<T, sqlx::Error> {
    let text: &str = sqlx::Row::try_get(row, column)?;
    retort_checkpoint::json::check_weight(text.as_bytes(), HEAVIEST_VALUE)
        .and_then(|()| serde_json::from_str(text))
        .map_err(|error| sqlx::Error::ColumnDecode {
            index: column.to_owned(),
            source: Box::new(error),
        })
}

/// Reads a JSON column that may be null.
fn json_or_none<T: serde::de::DeserializeOwned>(
    row: &sqlx::sqlite::SqliteRow,
    column: &str,
) -> Result<Option<T>, sqlx::Error> {
    match sqlx::Row::try_get::<Option<&str>, _>(row, column)? {
        Some(_) => json(row, column).map(Some),
        None => Ok(None),
    }
}

/// Reads the name of an enum's variant, in its JSON form.
fn variant<T: serde::de::DeserializeOwned>(
    row: &sqlx::sqlite::SqliteRow,
    column: &str,
) -> Result<T, sqlx::Error> {
    let text: &str = sqlx::Row::try_get(row, column)?;
    T::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(text)).map_err(
        |error| sqlx::Error::ColumnDecode {
            index: column.to_owned(),
            source: Box::new(error),
        },
    )
}

#[cfg(test)]
pub(crate) mod tests;
