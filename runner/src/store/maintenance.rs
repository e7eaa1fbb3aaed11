//! Store maintenance: tags, notes, removing runs, and unneeded artifacts.

use std::collections::HashSet;
use std::path::PathBuf;

use super::{RunId, Store, StoreError, Time, schema, scratch};
use crate::draft;

/// Contents of a store that no run needs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Garbage {
    /// Hashes of recorded artifacts that no attempt made or used.
    pub artifacts: Vec<String>,
    /// Hashes of the artifacts that are needed.
    pub needed: HashSet<String>,
    /// When the oldest of the runs was recorded.
    pub since: Option<Time>,
    /// Digests of stages that may be resumed: their directories in `work` are needed.
    pub resumable: HashSet<String>,
}

impl Store {
    /// Tags a run. A tag refers to the newest run that has it.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn tag_run(&self, run: &RunId, tag: &str) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("insert or ignore into tags (run, tag) select key, ?2 from runs where id = ?1")
            .bind(&run.0)
            .bind(tag)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// Removes a tag from a run; returns whether it had it.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn untag_run(&self, run: &RunId, tag: &str) -> Result<bool, StoreError> {
        let mut write = self.write().await?;
        let gone = sqlx::query(
            "delete from tags where run = (select key from runs where id = ?1) and tag = ?2",
        )
        .bind(&run.0)
        .bind(tag)
        .execute(&mut *write)
        .await?
        .rows_affected();
        write.commit().await?;
        Ok(gone > 0)
    }

    /// Sets a run's note, replacing the previous one.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn note_run(&self, run: &RunId, note: &str) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update runs set note = ?2 where id = ?1")
            .bind(&run.0)
            .bind(note)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// Other runs that reuse stages of these runs.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn dependents(&self, runs: &[RunId]) -> Result<Vec<RunId>, StoreError> {
        let ids = serde_json::json!(runs).to_string();
        let found: Vec<String> = sqlx::query_scalar(
            "select distinct d.id
             from json_each(?1) wanted
             join runs r on r.id = wanted.value
             join stages s on s.run = r.key
             join attempts a on a.stage = s.key
             join stages ds on ds.reused_from = a.key
             join runs d on d.key = ds.run
             where d.id not in (select value from json_each(?1))
             order by d.key",
        )
        .bind(ids)
        .fetch_all(self.pool())
        .await?;
        Ok(found.into_iter().map(RunId).collect())
    }

    /// Removes runs and all their records from the history, but not the files of their artifacts, which other runs may share.
    /// If one of them is still running, none is removed.
    ///
    /// # Errors
    /// [`StoreError::InUse`], and as [`Store::begin_run`].
    pub async fn remove_runs(&self, runs: &[RunId]) -> Result<(), StoreError> {
        self.reconcile().await?;
        let mut write = self.write().await?;
        let sweeps: Vec<i64> = sqlx::query_scalar(
            "select distinct sweep from runs where sweep is not null and id in (select value from json_each(?1))",
        )
        .bind(serde_json::json!(runs).to_string())
        .fetch_all(&mut *write)
        .await?;
        for run in runs {
            let state: Option<String> = sqlx::query_scalar("select state from runs where id = ?1")
                .bind(&run.0)
                .fetch_optional(&mut *write)
                .await?;
            if matches!(state.as_deref(), Some("queued" | "running")) {
                return Err(StoreError::InUse);
            }
            sqlx::query("delete from runs where id = ?1")
                .bind(&run.0)
                .execute(&mut *write)
                .await?;
        }
        // A sweep is removed with the last of its runs.
        sqlx::query(
            "delete from sweeps where key in (select value from json_each(?1))
             and not exists (select 1 from runs where sweep = sweeps.key)",
        )
        .bind(serde_json::json!(sweeps).to_string())
        .execute(&mut *write)
        .await?;
        write.commit().await
    }

    /// What no run needs.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn garbage(&self) -> Result<Garbage, StoreError> {
        self.reconcile().await?;
        let needed: Vec<String> = sqlx::query_scalar(
            "select artifact from outputs union select artifact from inputs
             union select output from attempts where output is not null",
        )
        .fetch_all(self.pool())
        .await?;
        let needed: HashSet<String> = needed.into_iter().collect();
        let known: Vec<String> = sqlx::query_scalar("select hash from artifacts order by hash")
            .fetch_all(self.pool())
            .await?;
        // Artifacts unknown to a history without runs are not garbage: they belong to another history, or this one was
        // emptied.
        if known.is_empty() && self.count_runs().await? == 0 {
            schema::check_has_no_artifacts(self.dir())?;
        }
        let since: Option<i64> = sqlx::query_scalar("select min(created) from runs")
            .fetch_one(self.pool())
            .await?;
        let unfinished: Vec<String> = sqlx::query_scalar(
            "select distinct digest from attempts a where state != 'succeeded'
             and not exists (select 1 from attempts b where b.digest = a.digest and b.state = 'succeeded')",
        )
        .fetch_all(self.pool())
        .await?;
        Ok(Garbage {
            artifacts: known
                .into_iter()
                .filter(|hash| !needed.contains(hash))
                .collect(),
            needed,
            since: since.map(Time),
            resumable: unfinished.into_iter().collect(),
        })
    }

    /// Leftovers of killed imports, exports and artifacts in the store's directory.
    pub fn abandoned(&self) -> Vec<PathBuf> {
        let mut found = scratch::leftovers(self.dir(), scratch::IMPORT);
        found.extend(scratch::leftovers(self.dir(), scratch::EXPORT));
        found.extend(scratch::leftovers(
            &self.dir().join("artifacts"),
            scratch::IMPORT,
        ));
        found.extend(draft::abandoned(&self.dir().join("artifacts")));
        // Leftovers of earlier versions have no lock. While such files are in use, the store is being written to.
        let entries = std::fs::read_dir(self.dir())
            .into_iter()
            .flatten()
            .flatten();
        let old = entries.filter(|entry| {
            let name = entry.file_name();
            let drawn = name.as_encoded_bytes().strip_prefix(b".import");
            drawn.is_some_and(|drawn| {
                drawn.len() == 6 && drawn.iter().all(u8::is_ascii_alphanumeric)
            }) && entry.file_type().is_ok_and(|kind| kind.is_dir())
        });
        found.extend(old.map(|entry| entry.path()));
        found
    }

    /// Calls `remove` for what no run needs, while no run can begin. Then forgets the artifacts that it reports as removed, and
    /// unused names.
    ///
    /// # Errors
    /// [`StoreError::InUse`] while a run is under way, and as [`Store::begin_run`].
    pub async fn collect_garbage(
        &self,
        remove: impl FnOnce(&Garbage) -> Vec<String>,
    ) -> Result<(), StoreError> {
        self.reconcile().await?;
        let mut write = self.write().await?;
        let alive: i64 =
            sqlx::query_scalar("select count(*) from runs where state in ('queued', 'running')")
                .fetch_one(&mut *write)
                .await?;
        if alive > 0 {
            return Err(StoreError::InUse);
        }
        let gone = remove(&self.garbage().await?);
        for hash in gone {
            sqlx::query("delete from artifacts where hash = ?1")
                .bind(hash)
                .execute(&mut *write)
                .await?;
        }
        sqlx::query(
            "delete from names
             where not exists (select 1 from params p where p.key between names.key << 32 and names.key << 32 | 0xffffffff)
             and not exists (select 1 from results p where p.key between names.key << 32 and names.key << 32 | 0xffffffff)",
        )
        .execute(&mut *write)
        .await?;
        write.commit().await?;
        self.confirm().await?;
        // Returns the freed space to the disk. If there are readers, this is left to the next time.
        if let Err(error) = sqlx::query("vacuum").execute(self.pool()).await {
            tracing::debug!(%error, "the database was not made smaller");
        }
        Ok(())
    }

    /// Whether any run is under way.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn is_in_use(&self) -> Result<bool, StoreError> {
        self.reconcile().await?;
        let runs: Vec<String> = sqlx::query_scalar(
            "select state from runs where state in ('queued', 'running')
             and id not in (select key from json_each(?1) where value in ('interrupted', 'lost'))",
        )
        .bind(self.unrecorded_states())
        .fetch_all(self.pool())
        .await?;
        Ok(!runs.is_empty())
    }
}
