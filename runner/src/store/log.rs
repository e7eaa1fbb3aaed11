//! The log of an attempt: what its plugin said, and what its worker wrote to stdout and stderr.

use retort_abi::LogLevel;
use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::sqlite::{SqliteConnection, SqliteRow};

use super::time::Time;
use super::{AttemptId, RunId, Store, StoreError, variant};

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

impl LogLine {
    /// A line from the runner itself, now.
    pub fn of_runner(level: LogLevel, text: impl Into<String>) -> Self {
        Self {
            at: Time::now(),
            level: level as u32,
            source: LogSource::Runner,
            text: text.into(),
        }
    }
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

/// A line of a run's log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunLine {
    /// Its place: the next line has a greater one.
    #[serde(skip)]
    pub key: i64,
    /// The stage.
    pub stage: String,
    /// The line.
    #[serde(flatten)]
    pub line: LogLine,
}

impl Store {
    /// Lines of a run's log, of all its attempts in the order in which they were written: at most `limit` behind the
    /// place `after`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn run_log(
        &self,
        run: &RunId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<RunLine>, StoreError> {
        let rows = sqlx::query(
            "select l.key, s.name as stage, l.at, l.level, l.source, l.text
             from stages s
             join attempts a on a.stage = s.key
             join logs l on l.attempt = a.key and l.key > ?2
             where s.run = (select key from runs where id = ?1)
             order by l.key limit ?3",
        )
        .bind(&run.0)
        .bind(after)
        .bind(limit)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(RunLine {
                    key: row.try_get("key")?,
                    stage: row.try_get("stage")?,
                    line: log_line(row)?,
                })
            })
            .collect()
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
        rows.iter().map(log_line).collect()
    }
}

/// Appends lines to the log of an attempt.
pub(super) async fn append_lines(
    write: &mut SqliteConnection,
    attempt: AttemptId,
    lines: &[LogLine],
) -> Result<(), StoreError> {
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
    Ok(())
}

pub(super) fn log_line(row: &SqliteRow) -> Result<LogLine, StoreError> {
    Ok(LogLine {
        at: Time(row.try_get("at")?),
        level: row.try_get("level")?,
        source: variant(row, "source")?,
        text: row.try_get("text")?,
    })
}
