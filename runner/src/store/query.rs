//! Questions in SQL, from people. The connection is read-only, and so is whatever a statement attaches to it.

use serde_json::Value;
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Column, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef};

use super::{Access, Store, StoreError, schema};
use crate::table::{Cell, Rows};

impl Store {
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
    let kind = value.type_info().name().to_owned();
    Ok(match kind.as_str() {
        _ if value.is_null() => Cell::none(),
        "INTEGER" | "BOOLEAN" => Cell::json(&Value::from(row.try_get_unchecked::<i64, _>(place)?)),
        "REAL" => Cell::number(row.try_get_unchecked(place)?),
        "BLOB" => {
            let bytes: Vec<u8> = row.try_get_unchecked(place)?;
            Cell::from(
                bytes
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect::<String>(),
            )
        }
        _ => Cell::from(row.try_get_unchecked::<String, _>(place)?),
    })
}
