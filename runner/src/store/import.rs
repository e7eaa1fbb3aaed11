//! Imports runs from a file into the store. The file may come from anywhere.
//!
//! It is read once, into a draft: a database of our own with the tables that the file must have, and directories for the
//! files of artifacts. SQLite copies table by table, which settles types and rules of single columns; then every value is
//! looked at ([`check`]), and every file is hashed. Only checked data goes from the draft into the store, a few whole runs at
//! a time, so that others can write in between ([`pieces`]). Space and time are proportional to the size of the file.
//!
//! Deliberately absent: leases, because imported runs have no runner here, and descriptions of plugins, which come from the
//! plugins themselves.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use retort_checkpoint::regular;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use super::objects::{self, Object, brief};
use super::sandbox::{self, Budget};
use super::scratch::{self, ScratchDir};
use super::transfer::{self, FILES, PART, Transfer};
use super::{Access, Store, StoreError, connection, schema};
use crate::artifact;
use crate::artifact::ArtifactFile;

mod check;
mod pieces;

/// Tables of a store that are not imported. Spans are made anew from the blocks.
const LEFT_OUT: [&str; 5] = ["descriptions", "jobs", "job_elements", "job_lives", "spans"];
/// At most this many artifacts that cannot be imported are named.
const NAMED: i64 = 20;

impl Store {
    /// Imports the runs of an exported file, or of another store's `history.db`, that are not known here, with the files of
    /// their artifacts if the file has them. A refused file leaves nothing. Files that do not match their hash are left
    /// out. Unfinished runs become lost, because they have no runner here. Other processes can write at the same
    /// time. An interrupted import leaves whole runs; if it is repeated, it continues after them.
    ///
    /// # Errors
    /// [`StoreError::NotImportable`] if the file is at fault, and as [`Store::begin_run`].
    pub async fn import(&self, from: &Path) -> Result<Transfer, StoreError> {
        let pause = async || {
            tokio::time::sleep(pieces::PAUSE).await;
            Ok(())
        };
        self.import_by(from, pieces::PIECE, pause).await
    }

    /// Imports in pieces of this duration, and calls `between` after each.
    pub(super) async fn import_by(
        &self,
        from: &Path,
        piece: Duration,
        mut between: impl AsyncFnMut() -> Result<(), StoreError>,
    ) -> Result<Transfer, StoreError> {
        if self.access == Access::ReadOnly {
            return Err(StoreError::ReadOnly {
                path: self.dir.clone(),
            });
        }
        let draft = ScratchDir::new(self.dir(), scratch::IMPORT)
            .map_err(|error| StoreError::refused(&connection::path_of(self.dir()), error))?;
        let artifacts = self.dir().join("artifacts");
        // Files are renamed to their targets while no one else can write. From another disk they would have to be copied.
        let apart = match is_elsewhere(&artifacts, self.dir()) {
            true => Some(
                ScratchDir::new(&artifacts, scratch::IMPORT)
                    .map_err(|error| StoreError::refused(&artifacts, error))?,
            ),
            false => None,
        };
        let staging = apart.as_ref().unwrap_or(&draft).path();
        let staged = AttachedFile::open(from, draft.path())
            .await?
            .read(&artifacts, staging)
            .await?;
        // From here on, only our own data is used.
        let from = connection::path_of(draft.path());
        let mut connection = transfer::connect(&connection::path_of(self.dir()), &from).await?;
        self.confirm().await?;
        let between = async || {
            between().await?;
            self.confirm().await
        };
        let transfer =
            pieces::copy_all(&mut connection, staged, &artifacts, piece, between).await?;
        connection.close().await?;
        Ok(transfer)
    }
}

/// Whether a directory exists and is on another disk.
fn is_elsewhere(dir: &Path, than: &Path) -> bool {
    let disk = |path: &Path| std::fs::metadata(path).map(|found| found.dev());
    matches!((disk(dir), disk(than)), (Ok(a), Ok(b)) if a != b)
}

/// A file to be imported, attached as `source` to the database of a draft.
struct AttachedFile<'p> {
    path: &'p Path,
    draft: &'p Path,
    connection: SqliteConnection,
    budget: Budget,
    /// Bytes of the file, its write-ahead log included.
    size: u64,
    /// Version of its schema.
    version: i64,
}

/// The data read in addition to the tables.
struct Staged {
    /// Hashes of artifacts, and where their files are.
    files: Vec<(String, PathBuf)>,
    /// Hashes of artifacts whose files are already in place.
    there: HashSet<String>,
    /// Messages about data that cannot be imported.
    lost: Vec<String>,
}

impl<'p> AttachedFile<'p> {
    async fn open(path: &'p Path, draft: &'p Path) -> Result<Self, StoreError> {
        let refused = |message: String| StoreError::NotImportable {
            path: path.to_owned(),
            message,
        };
        let size = size(path).map_err(|error| refused(error.to_string()))?;
        schema::check_files(path).map_err(|error| match error {
            StoreError::NotAFile { path: file, kind } if file == path => {
                refused(format!("it is {kind}, not a file"))
            }
            error => refused(error.to_string()),
        })?;
        // SQLite does not say why it cannot be read.
        regular::open(path)
            .and_then(|mut file| file.read(&mut [0]))
            .map_err(|error| refused(error.to_string()))?;
        let (mut connection, _) = attach(&SqliteConnectOptions::new(), path, size).await?;
        let version: i64 = sqlx::query_scalar("pragma source.user_version")
            .fetch_one(&mut connection)
            .await
            .map_err(|error| refused(said(error)))?;
        let application: i64 = sqlx::query_scalar("pragma source.application_id")
            .fetch_one(&mut connection)
            .await
            .map_err(|error| refused(said(error)))?;
        connection.close().await?;
        let known = schema::newest(schema::MIGRATIONS);
        if application != schema::APPLICATION_ID {
            return Err(refused("it is not a retort history".to_owned()));
        }
        if version > known {
            return Err(refused(format!(
                "it was written by a newer retort (schema {version}; this one knows up to {known})"
            )));
        }
        let migrations = usize::try_from(version)
            .ok()
            .filter(|&version| version > 0)
            .and_then(|version| schema::MIGRATIONS.get(..version))
            .ok_or_else(|| refused(format!("it has the unknown schema {version}")))?;
        schema::migrate(draft, migrations).await?;
        let options = connection::options(&connection::path_of(draft)).foreign_keys(false);
        let (connection, budget) = attach(&options, path, size).await?;
        Ok(Self {
            path,
            draft,
            connection,
            budget,
            size,
            version,
        })
    }

    async fn read(mut self, artifacts: &Path, staging: &Path) -> Result<Staged, StoreError> {
        // The draft is discarded after any error.
        sqlx::raw_sql("pragma main.journal_mode = off; pragma main.synchronous = off")
            .execute(&mut self.connection)
            .await?;
        let has_files = self.check_schema().await?;
        // The draft may take as much space as the file, and some for pages that are not full.
        let pages = self.size / 4096 * 3 + 512;
        let limit = format!("pragma main.max_page_count = {pages}");
        sqlx::query(AssertSqlSafe(limit))
            .execute(&mut self.connection)
            .await?;
        for table in self.tables().await? {
            self.copy(&table).await?;
        }
        self.check_references().await?;
        sqlx::query("update main.runs set state = 'lost' where state in ('queued', 'running')")
            .execute(&mut self.connection)
            .await?;
        self.bring_up_to_date().await?;
        check::all(&mut self.connection)
            .await
            .map_err(|found| match found {
                check::ImportError::Fault(message) => self.refused(message),
                check::ImportError::Store(error) => error,
            })?;
        let mut staged = Staged {
            files: Vec::new(),
            there: HashSet::new(),
            lost: Vec::new(),
        };
        if has_files {
            self.read_files(artifacts, staging, &mut staged).await?;
        }
        self.connection.close().await?;
        Ok(staged)
    }

    /// Checks that the file has exactly the tables, indexes, triggers and views of its schema's version, and optionally the
    /// table with the files of artifacts. Returns whether it has that table.
    async fn check_schema(&mut self) -> Result<bool, StoreError> {
        let ours = objects::read(&mut self.connection, "main", usize::MAX).await?;
        // Slightly more than valid ones: enough to detect a violation.
        let theirs = objects::read(&mut self.connection, "source", ours.len() + 9).await;
        let theirs = self.or_refused(theirs)?;
        let name = || "exported_files".to_owned();
        let expected = Object::new("table".into(), name(), name(), Some(FILES));
        let files = |object: &Object| {
            *object == expected
                || (object.name.starts_with("sqlite_autoindex")
                    && object.table == name()
                    && object.sql.is_none())
        };
        let has_files = theirs.contains(&expected);
        for object in &theirs {
            if !ours.contains(object) && !files(object) {
                return Err(self.refused(format!(
                    "its {} `{}` is not that of a retort history",
                    object.kind,
                    brief(&object.name)
                )));
            }
        }
        match ours.iter().find(|object| !theirs.contains(object)) {
            Some(Object { kind, name, .. }) => Err(self.refused(format!(
                "the {kind} `{name}` of a retort history is missing"
            ))),
            None => Ok(has_files),
        }
    }

    async fn tables(&mut self) -> Result<Vec<String>, StoreError> {
        let tables: Vec<String> = sqlx::query_scalar(
            "select name from main.sqlite_schema where type = 'table' and name not like 'sqlite_%'",
        )
        .fetch_all(&mut self.connection)
        .await?;
        let wanted = |table: &String| !LEFT_OUT.contains(&table.as_str());
        Ok(tables.into_iter().filter(wanted).collect())
    }

    /// Copies a table. Its columns are named, so that SQLite rebuilds each row and checks its types and rules instead of
    /// copying bytes.
    async fn copy(&mut self, table: &str) -> Result<(), StoreError> {
        let columns: Vec<String> = sqlx::query_scalar(
            "select '\"' || name || '\"' from pragma_table_xinfo(?1, 'main') where hidden = 0",
        )
        .bind(table)
        .fetch_all(&mut self.connection)
        .await?;
        let columns = columns.join(", ");
        let sql =
            format!("insert into main.{table} ({columns}) select {columns} from source.{table}");
        let copied = sqlx::query(AssertSqlSafe(sql))
            .execute(&mut self.connection)
            .await;
        let Err(error) = copied else { return Ok(()) };
        match StoreError::from(error) {
            StoreError::Full if self.is_too_large() => Err(self.refused(format!(
                "its table `{table}` would take several times the file's size"
            ))),
            error @ (StoreError::Full | StoreError::Busy) => Err(error),
            StoreError::Damaged { message } => {
                Err(self.refused(format!("its table `{table}` is damaged: {message}")))
            }
            StoreError::Sql(error) => {
                let said = self.said(error);
                Err(self.refused(format!("its table `{table}`: {said}")))
            }
            error => Err(error),
        }
    }

    /// Whether SQLite said that the disk is full because of the draft's limit: there is room on the disk.
    fn is_too_large(&self) -> bool {
        std::fs::write(self.draft.join("room"), vec![0; 1 << 20]).is_ok()
    }

    async fn check_references(&mut self) -> Result<(), StoreError> {
        let dangling: Option<(String, Option<i64>, String, i64)> =
            sqlx::query_as("pragma main.foreign_key_check")
                .fetch_optional(&mut self.connection)
                .await?;
        match dangling {
            None => Ok(()),
            Some((table, _, parent, _)) => Err(self.refused(format!(
                "a row of its table `{table}` refers to one of `{parent}` that is not there"
            ))),
        }
    }

    /// Migrates the draft to the newest schema, and attaches the file again.
    async fn bring_up_to_date(&mut self) -> Result<(), StoreError> {
        if self.version == schema::newest(schema::MIGRATIONS) {
            return Ok(());
        }
        let apart = sqlx::raw_sql("detach database source; pragma max_page_count = 4294967294");
        apart.execute(&mut self.connection).await?;
        schema::migrate(self.draft, schema::MIGRATIONS)
            .await
            .map_err(|error| match error {
                error @ (StoreError::Full
                | StoreError::FileTooLong { .. }
                | StoreError::Io { .. }) => error,
                error => self.refused(format!(
                    "it cannot be brought to the present schema: {error}"
                )),
            })?;
        let options = connection::options(&connection::path_of(self.draft));
        (self.connection, self.budget) = attach(&options, self.path, self.size).await?;
        Ok(())
    }

    /// Reads the files of the artifacts that the runs of the file have, and hashes them. An artifact with a missing or wrong
    /// piece leaves nothing.
    async fn read_files(
        &mut self,
        artifacts: &Path,
        place: &Path,
        staged: &mut Staged,
    ) -> Result<(), StoreError> {
        let unknown = sqlx::query_scalar(
            "select distinct substr(artifact, 1, 99) from source.exported_files
             where artifact not in (select hash from main.artifacts) limit ?1",
        )
        .bind(NAMED)
        .fetch_all(&mut self.connection)
        .await;
        let unknown: Vec<String> = self.or_refused(unknown)?;
        staged.lost.extend(
            unknown
                .iter()
                .map(|hash| format!("artifact {}: no run in the file has it", brief(hash))),
        );
        let hashes: Vec<String> =
            sqlx::query_scalar("select hash from main.artifacts order by hash")
                .fetch_all(&mut self.connection)
                .await?;
        // Parts that share pages could be many times as large as the file.
        let mut room = self.size;
        for hash in hashes {
            if !self.has_files_of(&hash).await? {
                continue;
            }
            if artifacts.join(&hash).symlink_metadata().is_ok() {
                staged.there.insert(hash);
                continue;
            }
            let files: String =
                sqlx::query_scalar("select files from main.artifacts where hash = ?1")
                    .bind(&hash)
                    .fetch_one(&mut self.connection)
                    .await?;
            let files: Vec<ArtifactFile> =
                serde_json::from_str(&files).map_err(|error| self.refused(error.to_string()))?;
            let staging = place.join(&hash);
            let fault = match self.stage(&hash, &files, &staging, &mut room).await? {
                Some(fault) => Some(fault),
                None => match artifact::seal(&staging) {
                    Ok(contents) if contents.hash == hash => None,
                    Ok(_) => Some("its files are not what its hash says".to_owned()),
                    Err(artifact::ArtifactError::Io { path, source, .. }) => {
                        return Err(StoreError::refused(&path, source));
                    }
                    Err(error) => Some(error.to_string()),
                },
            };
            match fault {
                None => staged.files.push((hash, staging)),
                Some(fault) => {
                    let _ = std::fs::remove_dir_all(&staging);
                    staged.lost.push(format!("artifact {hash}: {fault}"));
                }
            }
        }
        Ok(())
    }

    async fn has_files_of(&mut self, hash: &str) -> Result<bool, StoreError> {
        let found = sqlx::query_scalar(
            "select exists (select 1 from source.exported_files where artifact = ?1)",
        )
        .bind(hash)
        .fetch_one(&mut self.connection)
        .await;
        self.or_refused(found)
    }

    /// Writes the files of an artifact below `staging`; returns the error in them, if any.
    async fn stage(
        &mut self,
        hash: &str,
        files: &[ArtifactFile],
        staging: &Path,
        room: &mut u64,
    ) -> Result<Option<String>, StoreError> {
        for file in files {
            let to = staging.join(&file.path);
            let refused = |error| StoreError::refused(&to, error);
            std::fs::create_dir_all(to.parent().unwrap_or(staging)).map_err(refused)?;
            let mut writer = std::fs::File::create_new(&to).map_err(refused)?;
            let mut written = 0;
            for part in 0_i64.. {
                let data = sqlx::query_scalar(
                    "select data from source.exported_files
                     where artifact = ?1 and path = ?2 and part = ?3 and length(data) <= ?4",
                )
                .bind(hash)
                .bind(&file.path)
                .bind(part)
                .bind(PART as i64)
                .fetch_optional(&mut self.connection)
                .await;
                let Some(data): Option<Vec<u8>> = self.or_refused(data)? else {
                    return Ok(Some(format!("`{}` is not whole", brief(&file.path))));
                };
                let length = data.len() as u64;
                written += length;
                let Some(left) = room.checked_sub(length) else {
                    return Err(self.refused(
                        "its files would take more space than the file that holds them".to_owned(),
                    ));
                };
                *room = left;
                // An empty file is one empty part.
                if written > file.size || (length == 0 && file.size > 0) {
                    return Ok(Some(format!("`{}` has another size", brief(&file.path))));
                }
                writer.write_all(&data).map_err(refused)?;
                if written == file.size {
                    break;
                }
            }
        }
        Ok(None)
    }

    fn refused(&self, message: String) -> StoreError {
        StoreError::NotImportable {
            path: self.path.to_owned(),
            message,
        }
    }

    /// SQLite's error about reading the file.
    fn or_refused<T>(&self, result: Result<T, sqlx::Error>) -> Result<T, StoreError> {
        result.map_err(|error| self.refused(self.said(error)))
    }

    fn said(&self, error: sqlx::Error) -> String {
        match self.budget.is_spent() {
            true => "reading it takes far longer than its size explains".to_owned(),
            false => said(error),
        }
    }
}

/// A connection to `main` with `source` attached, to be read only, within limits in proportion to its `size`.
async fn attach(
    main: &SqliteConnectOptions,
    source: &Path,
    size: u64,
) -> Result<(SqliteConnection, Budget), StoreError> {
    // Rows may have the maximum length, and several are in flight.
    let mut connection = main.clone().row_buffer_size(4).connect().await?;
    sandbox::limit_sizes(&mut connection, sandbox::LONGEST_FOREIGN).await?;
    sandbox::limit_memory(&mut connection).await?;
    let budget = sandbox::limit_steps(&mut connection, sandbox::ATTACHING).await?;
    sqlx::raw_sql("pragma trusted_schema = off; pragma cell_size_check = on; pragma mmap_size = 0")
        .execute(&mut connection)
        .await?;
    let attached = match transfer::attach(&mut connection, source, "mode=ro").await {
        // In a directory that cannot be written to, a database that no process has open is read as it is.
        Err(error) if !schema::wal_of(source).exists() => {
            let again = transfer::attach(&mut connection, source, "mode=ro&immutable=1").await;
            again.map_err(|_| error)
        }
        attached => attached,
    };
    match attached {
        Ok(()) => {
            let budget = sandbox::limit_steps(&mut connection, 20_000_000 + 64 * size).await?;
            Ok((connection, budget))
        }
        Err(error) => Err(StoreError::NotImportable {
            path: source.to_owned(),
            message: match budget.is_spent() {
                true => "reading it takes far longer than its size explains".to_owned(),
                false => said(error),
            },
        }),
    }
}

/// Bytes of a database with its write-ahead log. Holes count little.
fn size(path: &Path) -> std::io::Result<u64> {
    let real = |found: std::fs::Metadata| found.len().min(found.blocks() * 512 * 16 + (1 << 16));
    let log = std::fs::metadata(schema::wal_of(path)).map_or(0, real);
    Ok(real(std::fs::metadata(path)?) + log)
}

/// SQLite's message, without the library's additions.
fn said(error: sqlx::Error) -> String {
    match error.as_database_error() {
        Some(error) if matches!(error.code().as_deref(), Some("26")) => {
            "it is not a retort history (no SQLite database)".to_owned()
        }
        Some(error) => error.message().to_owned(),
        None => error.to_string(),
    }
}
