//! The log of an attempt: what its plugin said, and what its worker wrote to stdout and stderr.

use serde::{Deserialize, Serialize};
use sqlx::Row;

use super::time::Time;
use super::{AttemptId, Store, StoreError, variant};

/// A line of a log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LogLine {
    /// When.
    pub at: Time,
    /// 1 error, 2 warn, 3 info, 4 debug, 5 trace: `retort_abi::LogLevel as u32`.
    pub level: u32,
    /// Who said it.
    pub source: LogSource,
    /// What.
    pub text: String,
}

/// Where a log line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// The plugin, through its host.
    Plugin,
    /// The worker's standard output.
    Stdout,
    /// The worker's standard error.
    Stderr,
    /// The runner, about the attempt.
    Runner,
}

impl LogSource {
    /// As written in JSON and in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plugin => "plugin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Runner => "runner",
        }
    }
}

impl Store {
    /// Appends lines to the log of an attempt.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Full`], [`StoreError::ReadOnly`]: never a reason to fail a stage.
    pub async fn append_log(
        &self,
        attempt: AttemptId,
        lines: &[LogLine],
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        for line in lines {
            sqlx::query(
                "insert into logs (attempt, at, level, source, text) values (?1, ?2, ?3, ?4, ?5)",
            )
            .bind(attempt.0)
            .bind(line.at.0)
            .bind(line.level)
            .bind(line.source.name())
            .bind(&line.text)
            .execute(&mut *write)
            .await?;
        }
        write.commit().await
    }

    /// The log of an attempt, oldest line first.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn log(&self, attempt: AttemptId) -> Result<Vec<LogLine>, StoreError> {
        let rows =
            sqlx::query("select at, level, source, text from logs where attempt = ?1 order by key")
                .bind(attempt.0)
                .fetch_all(self.pool())
                .await?;
        rows.iter()
            .map(|row| {
                Ok(LogLine {
                    at: Time(row.try_get("at")?),
                    level: row.try_get("level")?,
                    source: variant(row, "source")?,
                    text: row.try_get("text")?,
                })
            })
            .collect()
    }
}
