//! The database file: opening it, and bringing its schema up to date.
//!
//! Migrations are the files of `migrations/`, in order, each applied once; `pragma user_version` counts them. They are
//! not left to sqlx's migrator because that takes no lock on SQLite: of many processes opening one new store at once,
//! all but one would fail. Here the first takes a file lock, the others wait for it and find the work done.

use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqlitePool, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Connection};

use super::connection::{self, options, path_of};
use super::{BUSY_TIMEOUT, StoreError, deadline, function, host, lease, objects, sandbox, series};
use crate::artifact;

/// Every migration, in order. Append only.
pub(super) const MIGRATIONS: &[&str] = &[
    include_str!("../../../migrations/0001_history.sql"),
    include_str!("../../../migrations/0002_questions.sql"),
    include_str!("../../../migrations/0003_points_are_packed.sql"),
    include_str!("../../../migrations/0004_one_key.sql"),
    include_str!("../../../migrations/0005_remembered.sql"),
    include_str!("../../../migrations/0006_sweeps.sql"),
    include_str!("../../../migrations/0007_cluster.sql"),
    include_str!("../../../migrations/0008_stages_in_brief.sql"),
    include_str!("../../../migrations/0009_imported.sql"),
    include_str!("../../../migrations/0010_found_by_index.sql"),
];

/// The schema version after which the program packs points of older stores.
const UNPACKED: usize = 2;

/// `rtrt`: distinguishes retort's history from other SQLite databases.
pub(super) const APPLICATION_ID: i64 = 0x7274_7274;

/// Most memory that SQLite takes in a process that reads a store: 1 GiB, caches and rows that are not yet used included.
const MOST_MEMORY: &str = "1073741824";

/// Opens the store, creating or migrating it if necessary.
pub(super) async fn open_for_writing(dir: &Path) -> Result<SqlitePool, StoreError> {
    let path = path_of(dir);
    migrate(dir, MIGRATIONS).await?;
    let pool = pool(4).after_connect(|connection, _| Box::pin(prepare(connection)));
    Ok(pool.connect_lazy_with(options(&path)))
}

/// Opens for queries only. An older schema is migrated first, through a writable connection.
pub(super) async fn open_for_reading(dir: &Path) -> Result<SqlitePool, StoreError> {
    let path = path_of(dir);
    check_files(&path)?;
    check_is_no_loss(dir)?;
    match path.try_exists() {
        Ok(true) => {}
        Ok(false) => {
            return Err(StoreError::Missing {
                path: dir.to_owned(),
            });
        }
        Err(source) => return Err(StoreError::Io { path, source }),
    }
    let known = newest(MIGRATIONS);
    // Few rows are buffered at a time, because the rows of a user's query may be long.
    let mut read = options(&path)
        .read_only(true)
        .row_buffer_size(8)
        // Many long rows can share the same pages of a small file.
        .pragma("hard_heap_limit", MOST_MEMORY);
    let state = match inspect(&read, &path).await {
        Ok(state) => state,
        // A database in WAL mode needs two more files next to it. If they are absent and cannot be created, nobody else
        // is writing either, and the database can be read as it is.
        Err(StoreError::Io { .. } | StoreError::ReadOnly { .. }) if !wal_of(&path).exists() => {
            read = read.immutable(true);
            inspect(&read, &path).await?
        }
        Err(error) => return Err(error),
    };
    check_version(&state, known, &path)?;
    if state.version < known {
        let migrated = async {
            let _host_lock = host::claim(dir, host::ClaimKind::Lasting).await?;
            migrate(dir, MIGRATIONS).await
        };
        migrated.await.map_err(|error| match error {
            error @ (StoreError::HistoryGone { .. } | StoreError::Elsewhere { .. }) => error,
            // It has not been initialised yet, so there is nothing to query.
            _ if state.version == 0 => StoreError::Missing {
                path: dir.to_owned(),
            },
            error => StoreError::OlderSchema {
                path: path.clone(),
                found: state.version,
                known,
                source: Box::new(error),
            },
        })?;
    }
    // Queries on many runs visit thousands of pages once. Mapped pages are neither read nor copied, and not kept: a check of
    // their cells at every visit would take three times as long as a long list itself.
    let read = read
        .pragma("mmap_size", "2147418112")
        .pragma("cell_size_check", "off");
    let pool = pool(2)
        .after_connect(|connection, _| {
            Box::pin(async move {
                prepare(connection).await?;
                deadline::watch(connection).await
            })
        })
        .before_acquire(|connection, _| {
            Box::pin(async move {
                deadline::watch(connection).await?;
                Ok(true)
            })
        });
    Ok(pool.connect_lazy_with(read))
}

/// Brings the database of `dir` to the last of `migrations`. Makes the directory and the file if necessary.
pub(super) async fn migrate(dir: &Path, migrations: &[&'static str]) -> Result<(), StoreError> {
    let path = path_of(dir);
    check_files(&path)?;
    let known = newest(migrations);
    let existing = options(&path);
    if std::fs::metadata(&path).is_ok_and(|file| file.len() > 0) {
        let state = inspect(&existing, &path).await?;
        check_version(&state, known, &path)?;
        if state.version == known {
            return check_writable(&path);
        }
    }
    make_directory(dir)?;
    let _turn = lock(dir).await?;

    // The journal's mode is only set here, while no other process is here: the file remembers it.
    check_is_no_loss(dir)?;
    if !path.exists() {
        make_file(&path)?;
    }
    let options = existing;
    let at = |error: sqlx::Error| StoreError::from(error).at(&path);
    let mut connection = connection::connect(&options).await.map_err(at)?;
    let state = read_state(&mut connection).await.map_err(at)?;
    check_version(&state, known, &path)?;
    if state.version == known {
        return connection.close().await.map_err(at);
    }
    if state.version == 0 {
        check_has_no_artifacts(dir)?;
    }
    function::register(&mut connection).await.map_err(at)?;
    if state.version > 0 {
        lease::nobody_runs(&mut connection).await?;
        back_up(&mut connection, dir, state.version).await?;
    }
    sqlx::raw_sql("pragma journal_mode = wal")
        .execute(&mut connection)
        .await
        .map_err(at)?;
    let mut transaction = connection.begin_with("begin immediate").await.map_err(at)?;
    let state = read_state(&mut transaction).await.map_err(at)?;
    check_version(&state, known, &path)?;
    let applied = usize::try_from(state.version).unwrap_or(0);
    for (number, migration) in (1..).zip(migrations).skip(applied) {
        sqlx::raw_sql(*migration)
            .execute(&mut *transaction)
            .await
            .map_err(at)?;
        if number == UNPACKED {
            series::pack_points(&mut transaction).await?;
        }
    }
    let stamp = format!("pragma application_id = {APPLICATION_ID}; pragma user_version = {known}");
    sqlx::raw_sql(AssertSqlSafe(stamp))
        .execute(&mut *transaction)
        .await
        .map_err(at)?;
    transaction.commit().await.map_err(at)?;
    connection.close().await.map_err(at)
}

/// Copies the database as it is, before it is migrated.
async fn back_up(
    connection: &mut SqliteConnection,
    dir: &Path,
    version: i64,
) -> Result<(), StoreError> {
    let copy = dir.join(format!("history.schema{version}.backup.db"));
    // Left by a failed migration.
    if copy.exists() {
        std::fs::remove_file(&copy).map_err(|error| StoreError::refused(&copy, error))?;
    }
    // SQLite accepts an empty file for the copy, and keeps its mode.
    make_file(&copy)?;
    sqlx::query("vacuum into ?1")
        .bind(copy.to_string_lossy().into_owned())
        .execute(connection)
        .await
        .map_err(|error| StoreError::from(error).at(&copy))?;
    Ok(())
}

/// The fields of a database's header.
struct State {
    version: i64,
    application: i64,
    tables: i64,
}

pub(super) fn newest(migrations: &[&str]) -> i64 {
    i64::try_from(migrations.len()).unwrap_or(i64::MAX)
}

fn check_version(state: &State, known: i64, path: &Path) -> Result<(), StoreError> {
    if state.application != APPLICATION_ID && (state.tables > 0 || state.version != 0) {
        let message = "an SQLite database of another program".to_owned();
        return Err(StoreError::NotAStore {
            path: path.to_owned(),
            message,
        });
    }
    if state.version > known {
        return Err(StoreError::NewerSchema {
            path: path.to_owned(),
            found: state.version,
            known,
        });
    }
    Ok(())
}

/// The schema of a database that is a store, or can become one.
pub(super) async fn check_is_store(path: &Path) -> Result<i64, StoreError> {
    let state = inspect(&options(path).read_only(true), path).await?;
    check_version(&state, newest(MIGRATIONS), path)?;
    match state.application {
        APPLICATION_ID => Ok(state.version),
        _ => Err(StoreError::NotAStore {
            path: path.to_owned(),
            message: "an empty database".to_owned(),
        }),
    }
}

async fn inspect(options: &SqliteConnectOptions, path: &Path) -> Result<State, StoreError> {
    let at = |error: sqlx::Error| StoreError::from(error).at(path);
    let mut connection = connection::connect(options).await.map_err(at)?;
    let state = read_state(&mut connection).await.map_err(at)?;
    let applied = usize::try_from(state.version).unwrap_or(0);
    if state.application == APPLICATION_ID
        && let Some(migrations) = MIGRATIONS.get(..applied).filter(|made| !made.is_empty())
    {
        objects::check(&mut connection, migrations, path).await?;
    }
    connection.close().await.map_err(at)?;
    Ok(state)
}

async fn read_state(connection: &mut SqliteConnection) -> Result<State, sqlx::Error> {
    let (version, application, tables) = sqlx::query_as(
        "select (select user_version from pragma_user_version), (select application_id from pragma_application_id),
                (select count(*) from sqlite_schema)",
    )
    .fetch_one(connection)
    .await?;
    Ok(State {
        version,
        application,
        tables,
    })
}

fn pool(connections: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(BUSY_TIMEOUT * 2)
        .test_before_acquire(false)
        .idle_timeout(None)
        .max_lifetime(None)
}

/// Gives a new connection of a pool its limits, and the function that the views use.
async fn prepare(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sandbox::protect(connection).await?;
    function::register(connection).await
}

pub(super) fn wal_of(path: &Path) -> PathBuf {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    wal.into()
}

/// An error if the file is read-only: SQLite opens it silently, and fails at the first write.
fn check_writable(path: &Path) -> Result<(), StoreError> {
    let opened = File::options().append(true).open(path);
    opened
        .map(drop)
        .map_err(|error| StoreError::refused(path, error))
}

/// Makes the directory, for its owner only. A new one has a file that makes git ignore it.
pub(super) fn make_directory(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    let refused = |error| StoreError::refused(&path_of(dir), error);
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).map_err(refused)?;
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        // Another process has just created it.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        made => made.map_err(refused)?,
    }
    let ignore = dir.join(".gitignore");
    std::fs::write(&ignore, "*\n").map_err(|error| StoreError::refused(&ignore, error))
}

/// Makes an empty file with the permissions that the directory gives to its group. No one else may read it: the arguments of
/// commands are in it, and the values of `--set`. SQLite gives its further files the mode of the database.
fn make_file(path: &Path) -> Result<(), StoreError> {
    let made = || {
        let dir = path.parent().unwrap_or(Path::new("."));
        let mode = 0o600 | (std::fs::metadata(dir)?.permissions().mode() & 0o060);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(mode)
            .open(path)?;
        // Independent of the umask: in a group's directory the history belongs to the group.
        file.set_permissions(std::fs::Permissions::from_mode(mode))
    };
    made().map_err(|error| StoreError::refused(path, error))
}

/// An error if the database, or a file that SQLite keeps next to it, is not a regular file: opening a pipe would wait forever.
pub(super) fn check_files(path: &Path) -> Result<(), StoreError> {
    // Links are followed, as SQLite does.
    let place = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    for end in ["", "-wal", "-shm", "-journal"] {
        let mut file = place.as_os_str().to_owned();
        file.push(end);
        let Ok(found) = std::fs::metadata(&file) else {
            continue;
        };
        let kind = match found.file_type() {
            kind if kind.is_file() => continue,
            kind if kind.is_dir() => "a directory",
            kind if kind.is_fifo() => "a named pipe",
            kind if kind.is_socket() => "a socket",
            _ => "a device",
        };
        return Err(StoreError::NotAFile {
            path: match end {
                "" => path.to_owned(),
                _ => file.into(),
            },
            kind,
        });
    }
    Ok(())
}

/// An error if the history is gone. Checked before SQLite opens the rest: next to an empty database it would remove the
/// write-ahead log, which may hold everything.
fn check_is_no_loss(dir: &Path) -> Result<(), StoreError> {
    let path = path_of(dir);
    let is_empty = || std::fs::metadata(&path).map_or(true, |file| file.len() == 0);
    let log = || std::fs::metadata(wal_of(&path)).is_ok_and(|file| file.len() > 0);
    // Checked again at the end: another process may be making the store right now.
    match is_empty() && (artifacts(dir) > 0 || log()) && is_empty() {
        true => Err(gone(dir)),
        false => Ok(()),
    }
}

/// An error if there are artifacts: in a new history they would count as unneeded.
pub(super) fn check_has_no_artifacts(dir: &Path) -> Result<(), StoreError> {
    match artifacts(dir) {
        0 => Ok(()),
        _ => Err(gone(dir)),
    }
}

fn artifacts(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir.join("artifacts"))
        .into_iter()
        .flatten();
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .filter(|name| name.to_str().is_some_and(artifact::is_hash))
        .count()
}

/// The error that the history of the artifacts in the directory is missing.
fn gone(dir: &Path) -> StoreError {
    StoreError::HistoryGone {
        path: path_of(dir),
        artifacts: artifacts(dir),
    }
}

/// Waits for the right to make or migrate the store.
async fn lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("migrate.lock");
    let file = artifact::open_lock(&path).map_err(|error| StoreError::refused(&path, error))?;
    let start = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if start.elapsed() > BUSY_TIMEOUT => {
                return Err(StoreError::Busy);
            }
            Err(TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(5)).await,
            Err(TryLockError::Error(source)) => return Err(StoreError::refused(&path, source)),
        }
    }
}
