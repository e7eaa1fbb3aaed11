//! SQL queries by users. The connection is read-only, and an authorizer checks each action of a statement: only reading
//! tables and views and calling functions is allowed.

use std::ops::ControlFlow;
use std::time::Duration;

use futures_util::TryStreamExt;
use serde_json::Value;
use sqlx::sqlite::SqliteRow;
use sqlx::{
    AssertSqlSafe, Column, Either, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef,
};
use tokio::time::timeout;

use super::{Access, Store, StoreError, sandbox, schema};

impl Store {
    /// SQLite's integrity check of the whole database, one line per problem.
    ///
    /// # Errors
    /// [`StoreError`]: the check itself is impossible.
    pub async fn problems(&self) -> Result<Vec<String>, StoreError> {
        let said: Vec<String> = sqlx::query_scalar("pragma quick_check(100)")
            .fetch_all(self.pool())
            .await?;
        Ok(said.into_iter().filter(|line| line != "ok").collect())
    }

    /// Runs a statement, and passes the column names of its result, then its rows as they come, to `take`, until that has
    /// enough. Whatever the statement says, it can only read, and only from the history. Its memory is limited, and it is
    /// ended if the next row takes longer than `patience`.
    ///
    /// # Errors
    /// [`StoreError::Sql`] if SQLite does not understand the statement, or if it would do more than read;
    /// [`StoreError::Endless`].
    pub async fn query(
        &self,
        sql: &str,
        patience: Duration,
        mut take: impl FnMut(QueryPiece<'_>) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        // SQLite stops at a NUL, and the library would then loop forever on the rest.
        let sql = sql.split('\0').next().unwrap_or_default();
        // Views show states, so these must be updated first.
        self.reconcile().await?;
        let reader = match self.access {
            Access::ReadOnly => self.pool.clone(),
            Access::ReadWrite => schema::open_for_reading(&self.dir).await?,
        };
        // The connection cannot be used for anything else afterwards. It is dropped, not closed: if its thread has panicked
        // because a row was too large, a message to it may never be answered, and the pool would wait for that.
        let mut connection = reader.acquire().await?.detach();
        sandbox::limit_sizes(&mut connection, sandbox::LONGEST_ANSWER).await?;
        sandbox::limit_memory(&mut connection).await?;
        sandbox::only_reading(&mut connection).await?;
        let clock = sandbox::limit_time(&mut connection, patience).await?;
        let ended = |error: sqlx::Error| match clock.is_spent() {
            true => StoreError::Endless { patience },
            false => error.into(),
        };
        if let Some(more) = second_statement(sql) {
            return Err(StoreError::SeveralStatements {
                more: more.to_owned(),
            });
        }
        // SQLite looks at its clock between its steps, one of which may take hours. This clock runs beside them.
        let longest = patience.saturating_add(Duration::from_secs(1));
        let late = |_| StoreError::Endless { patience };
        let statement = connection.prepare(AssertSqlSafe(sql).into_sql_str());
        let statement = timeout(longest, statement).await.map_err(late)?;
        let statement = statement.map_err(ended)?;
        let heads: Vec<&str> = statement.columns().iter().map(Column::name).collect();
        if take(QueryPiece::Heads(&heads)).is_break() {
            return Ok(());
        }
        let mut rows = connection.fetch_many(statement.query());
        loop {
            clock.renew();
            let step = timeout(longest, rows.try_next()).await.map_err(late)?;
            let row = match step.map_err(ended)? {
                Some(Either::Right(row)) => row,
                // The statement is complete.
                Some(Either::Left(_)) => break,
                // There is no statement, as in an empty text.
                None if heads.is_empty() => break,
                None => return Err(sqlx::Error::WorkerCrashed.into()),
            };
            let values = (0..heads.len()).map(|place| answer_value(&row, place));
            if take(QueryPiece::Row(values.collect::<Result<_, _>>()?)).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// A piece of a statement's result.
#[derive(Debug)]
pub enum QueryPiece<'a> {
    /// The names of its columns: once, before the rows.
    Heads(&'a [&'a str]),
    /// A row.
    Row(Vec<AnswerValue>),
}

/// A value of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerValue {
    /// A number that may be infinite.
    Real(f64),
    /// Anything else.
    Json(Value),
}

fn answer_value(row: &SqliteRow, place: usize) -> Result<AnswerValue, sqlx::Error> {
    let value = row.try_get_raw(place)?;
    match value.type_info().name() {
        "REAL" if !value.is_null() => row.try_get_unchecked(place).map(AnswerValue::Real),
        _ => json_at(row, place).map(AnswerValue::Json),
    }
}

/// A value of a row, whatever its type, as JSON: bytes as hexadecimal digits, infinities as texts.
pub(super) fn json_at(row: &SqliteRow, place: usize) -> Result<Value, sqlx::Error> {
    let value = row.try_get_raw(place)?;
    let kind = value.type_info().name().to_owned();
    Ok(match kind.as_str() {
        _ if value.is_null() => Value::Null,
        "INTEGER" | "BOOLEAN" => Value::from(row.try_get_unchecked::<i64, _>(place)?),
        "REAL" => match row.try_get_unchecked::<f64, _>(place)? {
            number if number.is_finite() => Value::from(number),
            number if number > 0.0 => "Infinity".into(),
            _ => "-Infinity".into(),
        },
        "BLOB" => {
            let bytes: Vec<u8> = row.try_get_unchecked(place)?;
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
                .into()
        }
        _ => Value::from(row.try_get_unchecked::<String, _>(place)?),
    })
}

/// The first word after the first statement of a text, skipping semicolons, spaces and comments.
fn second_statement(sql: &str) -> Option<&str> {
    let mut rest = sql;
    let (mut has_begun, mut is_over) = (false, false);
    while let Some(first) = rest.chars().next() {
        // Semicolons in quotes or comments do not count.
        let skipped = match first {
            '-' if rest.starts_with("--") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest[2..].find("*/").map_or(rest.len(), |end| end + 4),
            ';' => {
                is_over = has_begun;
                1
            }
            c if c.is_whitespace() => c.len_utf8(),
            _ if is_over => return rest.split_whitespace().next(),
            '\'' | '"' | '`' | '[' => {
                has_begun = true;
                let end = if first == '[' { ']' } else { first };
                rest[1..].find(end).map_or(rest.len(), |end| end + 2)
            }
            c => {
                has_begun = true;
                c.len_utf8()
            }
        };
        rest = &rest[skipped.min(rest.len())..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::second_statement;

    #[test]
    fn a_second_statement_is_found() {
        for (sql, more) in [
            ("select 1; select 2,3", Some("select")),
            ("select 1;;/* x */ -- y\n ;z", Some("z")),
            ("select ';a'; ;", None),
            ("select \";a\", `;b`, [;c] -- ;d\n, 'it''s; not'", None),
            ("select 1 /* ; select 2 */;", None),
            ("select 1 -- ; select 2", None),
            ("select 'open; select 2", None),
            (";select 1;", None),
            ("", None),
        ] {
            assert_eq!(second_statement(sql), more, "{sql}");
        }
    }
}
