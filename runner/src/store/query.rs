//! Questions in SQL, from people. The connection is read-only, and so is whatever a statement attaches to it.

use serde_json::Value;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Column, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef};

use super::{Access, Store, StoreError, schema};
use crate::table::{Cell, Rows};

impl Store {
    /// What SQLite finds wrong with the database, a line each; reads all of it.
    ///
    /// # Errors
    /// [`StoreError`], where it cannot even be looked at.
    pub async fn problems(&self) -> Result<Vec<String>, StoreError> {
        let said: Vec<String> = sqlx::query_scalar("pragma quick_check(100)")
            .fetch_all(self.pool())
            .await?;
        Ok(said.into_iter().filter(|line| line != "ok").collect())
    }

    /// The answer to a statement, which cannot write whatever it says.
    ///
    /// # Errors
    /// [`StoreError::Sql`] when SQLite does not understand the statement, or it would write.
    pub async fn query(&self, sql: &str) -> Result<Rows, StoreError> {
        // Views show states; they have to be true before they are looked at.
        self.reconcile().await?;
        let reader = match self.access {
            Access::ReadOnly => self.pool.clone(),
            Access::ReadWrite => schema::open_for_reading(&self.dir).await?,
        };
        let mut connection = reader.acquire().await?;
        let statement = connection
            .prepare(AssertSqlSafe(sql).into_sql_str())
            .await?;
        let heads: Vec<&str> = statement.columns().iter().map(Column::name).collect();
        let mut answer = Rows::new(&heads);
        for row in statement.query().fetch_all(&mut *connection).await? {
            let cells = (0..heads.len())
                .map(|place| cell(&row, place))
                .collect::<Result<Vec<_>, _>>()?;
            answer.push(cells);
        }
        Ok(answer)
    }
}

fn cell(row: &SqliteRow, place: usize) -> Result<Cell, sqlx::Error> {
    let value = row.try_get_raw(place)?;
    match value.type_info().name() {
        "REAL" if !value.is_null() => Ok(Cell::number(row.try_get_unchecked(place)?)),
        _ => Ok(Cell::json(&json_at(row, place)?)),
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
