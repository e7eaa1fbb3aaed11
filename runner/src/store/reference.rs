//! Resolves references to runs: `latest`, `latest~1`, a tag, a prefix of an id.
//!
//! The latest run is the one recorded last, regardless of the clock, which may be set back.

use std::collections::HashSet;

use futures_util::TryStreamExt;
use sqlx::Row;

use super::record::could_be_run_id;
use super::{RunId, Store, StoreError};

/// Whether a tag is allowed: a tag that means something else as a reference could never be found.
pub fn is_tag(text: &str) -> bool {
    !text.trim().is_empty() && !text.starts_with("latest") && !could_be_run_id(text)
}

impl Store {
    /// The run meant by `reference`: `latest`, `latest~N` (N runs before it), the whole id, the newest run with that tag (of
    /// this store's own runs, if one of them has it), or a beginning of an id that no other run shares; tried in this order.
    ///
    /// # Errors
    /// [`StoreError::NoRun`], [`StoreError::AmbiguousRun`].
    pub async fn resolve_run(&self, reference: &str) -> Result<RunId, StoreError> {
        self.reconcile().await?;
        let found = match steps_back(reference) {
            Some(steps) => self.run_before_latest(steps).await?,
            None => match self.run_by_id(reference).await? {
                Some(id) => Some(id),
                None => match self.run_by_tag(reference).await? {
                    Some(id) => Some(id),
                    None => self.run_by_prefix(reference).await?,
                },
            },
        };
        match found {
            Some(id) => Ok(RunId(id)),
            None => Err(StoreError::NoRun {
                reference: reference.to_owned(),
                runs: self.count_runs().await?,
            }),
        }
    }

    /// The run that is resumed if none is named. Of this store's own runs it is the latest that was left unfinished: it failed,
    /// was interrupted or lost, or goes on in Slurm without a runner (`left`); it has not been resumed, and its recipe has not
    /// succeeded since. The very latest run qualifies as well if it belongs to a sweep, which may have points that never began.
    /// If no run qualifies, it is the latest.
    ///
    /// # Errors
    /// [`StoreError::NothingToResume`], [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn run_to_resume(&self, left: &[RunId]) -> Result<RunId, StoreError> {
        self.reconcile().await?;
        // From the newest run to older ones, in one pass: if SQL had to look for later successes it would do so anew for every
        // run that failed.
        let mut rows = sqlx::query(
            "select id, recipe, recipe_path, resumed_from, state = 'succeeded' as succeeded, sweep is not null as in_sweep,
                    state in ('failed', 'interrupted', 'lost') or id in (select value from json_each(?1))
                        or id in (select key from json_each(?2) where value in ('interrupted', 'lost')) as unfinished,
                    key not in (select run from imported) as own
             from runs order by key desc",
        )
        .bind(serde_json::json!(left).to_string())
        .bind(self.unrecorded_states())
        .fetch(self.pool());
        let mut resumed: HashSet<String> = HashSet::new();
        let mut succeeded: HashSet<(String, String)> = HashSet::new();
        let mut latest = None;
        while let Some(row) = rows.try_next().await? {
            let id: String = row.try_get("id")?;
            let recipe: (String, String) = (row.try_get("recipe")?, row.try_get("recipe_path")?);
            if row.try_get::<bool, _>("own")? {
                let goes_on = row.try_get::<bool, _>("unfinished")?
                    && !resumed.contains(&id)
                    && !succeeded.contains(&recipe);
                if goes_on || (latest.is_none() && row.try_get::<bool, _>("in_sweep")?) {
                    return Ok(RunId(id));
                }
                latest.get_or_insert(RunId(id));
            }
            resumed.extend(row.try_get::<Option<String>, _>("resumed_from")?);
            if row.try_get::<bool, _>("succeeded")? {
                succeeded.insert(recipe);
            }
        }
        drop(rows);
        match latest {
            Some(id) => Ok(id),
            None => Err(StoreError::NothingToResume {
                imported: self.count_runs().await?,
            }),
        }
    }

    /// Whether a run came from another store.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn is_imported(&self, run: &RunId) -> Result<bool, StoreError> {
        let key = self.run_key(run).await?;
        let found = sqlx::query("select 1 from imported where run = ?1").bind(key);
        Ok(found.fetch_optional(self.pool()).await?.is_some())
    }

    /// Whether a reference counts back from the latest run, and so names none.
    pub fn is_relative(reference: &str) -> bool {
        steps_back(reference).is_some()
    }

    async fn run_before_latest(&self, steps: u32) -> Result<Option<String>, StoreError> {
        let found = sqlx::query_scalar("select id from runs order by key desc limit 1 offset ?1");
        Ok(found.bind(steps).fetch_optional(self.pool()).await?)
    }

    async fn run_by_id(&self, id: &str) -> Result<Option<String>, StoreError> {
        let found = sqlx::query_scalar("select id from runs where id = ?1").bind(id);
        Ok(found.fetch_optional(self.pool()).await?)
    }

    async fn run_by_tag(&self, tag: &str) -> Result<Option<String>, StoreError> {
        let found = sqlx::query_scalar(
            "select r.id from tags t join runs r on r.key = t.run where t.tag = ?1
             order by r.key in (select run from imported), r.key desc limit 1",
        );
        Ok(found.bind(tag).fetch_optional(self.pool()).await?)
    }

    async fn run_by_prefix(&self, prefix: &str) -> Result<Option<String>, StoreError> {
        // Ids are lower case, without characters that are easily confused. What people type may be otherwise.
        let prefix = prefix.trim().to_ascii_lowercase();
        if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Ok(None);
        }
        self.only_match(
            "select id from runs where id >= ?1 and id < ?1 || '~' order by key desc",
            prefix,
            |reference, candidates| StoreError::AmbiguousRun {
                reference,
                candidates,
            },
        )
        .await
    }

    /// The only name that `sql` finds for `prefix`; None if there is none.
    ///
    /// # Errors
    /// The error that `ambiguous` makes of the prefix and the names, if there are several.
    pub(super) async fn only_match(
        &self,
        sql: &'static str,
        prefix: String,
        ambiguous: fn(String, Vec<String>) -> StoreError,
    ) -> Result<Option<String>, StoreError> {
        let mut found: Vec<String> = sqlx::query_scalar(sql)
            .bind(&prefix)
            .fetch_all(self.pool())
            .await?;
        match found.len() {
            0 | 1 => Ok(found.pop()),
            _ => Err(ambiguous(prefix, found)),
        }
    }

    pub(super) async fn count_runs(&self) -> Result<u64, StoreError> {
        let count: i64 = sqlx::query_scalar("select count(*) from runs")
            .fetch_one(self.pool())
            .await?;
        Ok(count.cast_unsigned())
    }
}

/// How many runs before the latest are meant; None if the reference does not have this form.
pub(super) fn steps_back(reference: &str) -> Option<u32> {
    match reference.trim().strip_prefix("latest")? {
        "" => Some(0),
        "~" => Some(1),
        rest => rest.strip_prefix('~')?.parse().ok(),
    }
}
