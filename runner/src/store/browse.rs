//! Queries for pages that commands do not need: how many runs pass a filter, names of parameters and series, groups of runs,
//! pages of a log, one artifact. Every answer is bounded.

use sqlx::Row;

use super::log::log_line;
use super::{ArtifactFile, RunId, RunLine, Store, StoreError, json};

/// A value shared by runs, and how many have it.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// The value: a tag.
    pub name: String,
    /// How many runs.
    pub runs: u64,
}

/// Which lines of a run's log.
#[derive(Debug, Clone, Default)]
pub struct LogQuery<'a> {
    /// At most this level: 1 error to 5 trace.
    pub level: u32,
    /// Of this stage.
    pub stage: Option<&'a str>,
    /// Containing this text, ignoring case.
    pub text: Option<&'a str>,
    /// Before this position.
    pub before: Option<i64>,
}

impl Store {
    /// The names of parameters and series that runs of this store have, at most `limit` of each, in order: ready for
    /// filters, as `params.NAME` and `metrics.NAME`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn field_names(&self, limit: u32) -> Result<Vec<String>, StoreError> {
        let rows: Vec<String> = sqlx::query_scalar(
            "select * from (
                 select 'metrics.' || name from names n
                 where exists (select 1 from results where key between n.key << 32 and n.key << 32 | 0xffffffff)
                 order by name limit ?1)
             union all
             select * from (
                 select 'params.' || name from names n
                 where exists (select 1 from params where key between n.key << 32 and n.key << 32 | 0xffffffff)
                 order by name limit ?1)",
        )
        .bind(limit)
        .fetch_all(self.pool())
        .await?;
        Ok(rows)
    }

    /// The tags that runs have, those of the newest runs first.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn tag_groups(&self, limit: u32) -> Result<Vec<Group>, StoreError> {
        let rows = sqlx::query(
            "select tag as name, count(*) as runs from tags group by tag order by max(run) desc limit ?1",
        )
        .bind(limit)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(Group {
                    name: row.try_get("name")?,
                    runs: row.try_get::<i64, _>("runs")?.cast_unsigned(),
                })
            })
            .collect()
    }

    /// The last matching lines of a run's log, at most `limit`, in order; and whether there are more before them.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn log_page(
        &self,
        run: &RunId,
        wish: &LogQuery<'_>,
        limit: u32,
    ) -> Result<(Vec<RunLine>, bool), StoreError> {
        let rows = sqlx::query(
            "select l.key, s.name as stage, l.at, l.level, l.source, l.text
             from stages s
             join attempts a on a.stage = s.key
             join logs l on l.attempt = a.key
             where s.run = (select key from runs where id = ?1)
               and l.level <= ?2 and (?3 is null or s.name = ?3)
               and (?4 is null or instr(lower(l.text), lower(?4)) > 0)
               and (?5 is null or l.key < ?5)
             order by l.key desc limit ?6",
        )
        .bind(&run.0)
        .bind(wish.level)
        .bind(wish.stage)
        .bind(wish.text)
        .bind(wish.before)
        .bind(i64::from(limit) + 1)
        .fetch_all(self.pool())
        .await?;
        let more = rows.len() as u64 > u64::from(limit);
        let lines = rows.iter().take(limit as usize).map(|row| {
            Ok(RunLine {
                key: row.try_get("key")?,
                stage: row.try_get("stage")?,
                line: log_line(row)?,
            })
        });
        let mut lines = lines.collect::<Result<Vec<_>, StoreError>>()?;
        lines.reverse();
        Ok((lines, more))
    }

    /// The files of an artifact, by its full hash; None if the store does not know it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn artifact_files(
        &self,
        hash: &str,
    ) -> Result<Option<Vec<ArtifactFile>>, StoreError> {
        let row = sqlx::query("select files from artifacts where hash = ?1")
            .bind(hash)
            .fetch_optional(self.pool())
            .await?;
        row.map(|row| Ok(json(&row, "files")?)).transpose()
    }
}
