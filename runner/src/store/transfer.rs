//! Transfers runs from one store into another through a file, which is itself a database with the schema of a store and, on
//! request, contains the files of artifacts.
//!
//! Runs are identified by id, so transferring one twice changes nothing. Keys are reassigned. A run whose stages are reused
//! is transferred together with the runs that reuse them. From a damaged store everything readable is exported, piece by
//! piece, and the rest is reported: the remains of a partly lost run are worth having.
//!
//! Deliberately absent: reading a file that comes from elsewhere (`import.rs`).

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;

use super::scratch::{self, ScratchDir};
use super::{RunId, StoreError, connection, schema};

mod copy;
mod files;

pub(super) use copy::{Copied, Copy};
pub(super) use files::{FILES, PART};

use files::put_files;

/// What was transferred.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Transfer {
    /// Transferred runs.
    pub runs: Vec<RunId>,
    /// Runs that already existed.
    pub known: Vec<RunId>,
    /// Artifacts whose files were transferred.
    pub artifacts: Vec<String>,
    /// Errors of reading, one line each.
    pub lost: Vec<String>,
}

/// Writes runs of the store in `dir` into the file `to`, all of them if `runs` is None. With `files`, the files of
/// their artifacts too. Works without an open [`Store`], because that may be what is damaged.
///
/// # Errors
/// [`StoreError`], if nothing can be read, or `to` cannot be written. `to` is complete or absent.
pub async fn export(
    dir: &Path,
    runs: Option<&[RunId]>,
    to: &Path,
    files: bool,
) -> Result<Transfer, StoreError> {
    let outcome = export_whole(dir, runs, to, files).await;
    outcome.map_err(|error| error.of_disk_with(to))
}

async fn export_whole(
    dir: &Path,
    runs: Option<&[RunId]>,
    to: &Path,
    files: bool,
) -> Result<Transfer, StoreError> {
    let source = connection::path_of(dir);
    schema::check_is_store(&source).await?;
    // Any error here is about the file, not the store.
    let refused = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => StoreError::Full,
        _ => StoreError::Io {
            path: to.to_owned(),
            source,
        },
    };
    let to = &crate::draft::place(to).map_err(refused)?;
    if std::fs::canonicalize(&source).is_ok_and(|own| own == *to) {
        let message = "it is the history of the store itself";
        return Err(refused(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            message,
        )));
    }
    let beside = to.parent().filter(|parent| !parent.as_os_str().is_empty());
    let draft =
        ScratchDir::new(beside.unwrap_or(Path::new(".")), scratch::EXPORT).map_err(refused)?;
    schema::migrate(draft.path(), schema::MIGRATIONS).await?;
    let path = connection::path_of(draft.path());
    let mut connection = connect(&path, &source).await?;
    sqlx::query(FILES).execute(&mut connection).await?;
    let mut transfer = Transfer::default();
    let wanted = match runs {
        Some(runs) => with_sources(&mut connection, runs).await?,
        None => all_runs(&mut connection, &mut transfer.lost).await,
    };
    // No transaction: damage found within one would end it, and the draft, which no one else uses, needs none.
    sqlx::raw_sql("pragma synchronous = off")
        .execute(&mut connection)
        .await?;
    let mut copied = Copied::default();
    copied.done = transfer;
    let mut copy = Copy::new(&mut connection, &mut copied, false);
    for run in &wanted {
        let whole = copy.run(run).await;
        copy.or_lost(whole, run, "a part")?;
    }
    copy.connect_reused().await?;
    let mut transfer = copied.done;
    if files {
        let artifacts: Vec<String> =
            sqlx::query_scalar("select hash from main.artifacts order by hash")
                .fetch_all(&mut connection)
                .await?;
        for hash in artifacts {
            let fault = match put_files(&mut connection, &dir.join("artifacts"), &hash).await {
                Ok(()) => {
                    transfer.artifacts.push(hash);
                    continue;
                }
                Err(StoreError::Damaged { message }) => message,
                Err(error @ StoreError::Io { .. }) => error.to_string(),
                Err(error) => return Err(error),
            };
            sqlx::query("delete from main.exported_files where artifact = ?1")
                .bind(&hash)
                .execute(&mut connection)
                .await?;
            transfer.lost.push(format!("artifact {hash}: {fault}"));
        }
    }
    // One file, without a write-ahead log next to it.
    sqlx::raw_sql("detach database source; pragma journal_mode = delete")
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    std::fs::rename(&path, to).map_err(refused)?;
    Ok(transfer)
}

/// A connection that may write to `main`, with another database to read from under the name `source`.
pub(super) async fn connect(main: &Path, source: &Path) -> Result<SqliteConnection, StoreError> {
    let at = |error: sqlx::Error| StoreError::from(error).at(main);
    let options = connection::options(main);
    let mut connection = connection::connect(&options).await.map_err(at)?;
    // Within a transaction, each statement saves the old content of the pages that it changes. For a run these are dozens,
    // because its parameters are stored by name. In a file, perhaps on another disk, that would be most of the work.
    // Of a damaged page of an export's source, the rows that can be read are read.
    sqlx::raw_sql("pragma temp_store = memory; pragma cell_size_check = off")
        .execute(&mut connection)
        .await
        .map_err(at)?;
    attach(&mut connection, source, "mode=ro")
        .await
        .map_err(at)?;
    Ok(connection)
}

/// Attaches a database under the name `source`.
pub(super) async fn attach(
    connection: &mut SqliteConnection,
    source: &Path,
    how: &str,
) -> Result<(), sqlx::Error> {
    let source = std::path::absolute(source)?;
    let mut uri = String::from("file:");
    for byte in source.as_os_str().as_bytes() {
        match *byte {
            byte @ (b'?' | b'#' | b'%') => uri += &format!("%{byte:02x}"),
            byte if byte.is_ascii() => uri.push(char::from(byte)),
            byte => uri += &format!("%{byte:02x}"),
        }
    }
    sqlx::query("attach database ?1 as source")
        .bind(format!("{uri}?{how}"))
        .execute(connection)
        .await?;
    Ok(())
}

/// These runs, each after the runs whose stages it reuses.
async fn with_sources(
    connection: &mut SqliteConnection,
    runs: &[RunId],
) -> Result<Vec<RunId>, StoreError> {
    let found: Vec<String> = sqlx::query_scalar(
        "select distinct x.id from (
             select r.id, r.key from source.runs r where r.id in (select value from json_each(?1))
             union
             select m.id, m.key
             from source.runs r
             join source.stages s on s.run = r.key
             join source.attempts a on a.key = s.reused_from
             join source.stages ms on ms.key = a.stage
             join source.runs m on m.key = ms.run
             where r.id in (select value from json_each(?1))
         ) x order by x.key",
    )
    .bind(serde_json::json!(runs).to_string())
    .fetch_all(connection)
    .await?;
    Ok(found.into_iter().map(RunId).collect())
}

/// Every run that can be found, the oldest first. The table is read from both ends and through an index, because a read
/// stops at damage.
pub(super) async fn all_runs(
    connection: &mut SqliteConnection,
    lost: &mut Vec<String>,
) -> Vec<RunId> {
    const WALKS: [(&str, i64); 2] = [
        (
            "select key, id from source.runs where key > ?1 order by key limit ?2",
            i64::MIN,
        ),
        (
            "select key, id from source.runs where key < ?1 order by key desc limit ?2",
            i64::MAX,
        ),
    ];
    let mut found: Vec<(i64, String)> = Vec::new();
    for (sql, start) in WALKS {
        let Err(error) = walk(connection, sql, start, &mut found).await else {
            break;
        };
        lost.push(format!("some runs may not have been found: {error}"));
    }
    if lost.is_empty() {
        return found.into_iter().map(|(_, id)| RunId(id)).collect();
    }
    let by_index =
        sqlx::query_as("select key, id from source.runs indexed by runs_by_time order by created");
    found.extend(by_index.fetch_all(connection).await.unwrap_or_default());
    found.sort();
    found.dedup();
    found.into_iter().map(|(_, id)| RunId(id)).collect()
}

/// Reads runs in one direction, as far as possible.
async fn walk(
    connection: &mut SqliteConnection,
    sql: &'static str,
    start: i64,
    found: &mut Vec<(i64, String)>,
) -> Result<(), sqlx::Error> {
    let mut from = start;
    // One by one, if reading many at a time hits damage.
    let mut limit = 256;
    loop {
        let rows = sqlx::query_as::<_, (i64, String)>(sql)
            .bind(from)
            .bind(limit)
            .fetch_all(&mut *connection)
            .await;
        match rows {
            Ok(rows) => {
                let Some((last, _)) = rows.last() else {
                    return Ok(());
                };
                from = *last;
                found.extend(rows);
            }
            Err(error) if limit == 1 => return Err(error),
            Err(_) => limit = 1,
        }
    }
}
