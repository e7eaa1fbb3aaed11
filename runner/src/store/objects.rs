//! The tables, indexes, triggers and views of a database, to be compared with those of a history.
//!
//! A store may come from another person. What a statement does depends on the objects that its names mean: a view in place of a
//! table may never end, and a trigger does whatever its author wrote.

use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, Connection};

use super::StoreError;

/// The hash of the objects that all migrations make. The objects of a store with this hash need no separate comparison.
const FINGERPRINT: &str = "365af3b24f8c1ed44daac76f4a1a9647637a6c3678a48dd9b3e219c8c4c5e816";

/// One of them. Its statement is normalised, because versions of SQLite write it differently.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Object {
    pub(super) kind: String,
    pub(super) name: String,
    pub(super) table: String,
    pub(super) sql: Option<String>,
}

impl Object {
    pub(super) fn new(kind: String, name: String, table: String, sql: Option<&str>) -> Self {
        let plain = |sql: &str| {
            let kept = sql.chars().filter(|c| !c.is_whitespace() && *c != '"');
            kept.collect::<String>().to_lowercase()
        };
        Self {
            kind,
            name,
            table,
            sql: sql.map(plain),
        }
    }

    /// Whether it could interfere with our statements: as a trigger, or by a name that they use.
    fn is_in_the_way(&self, ours: &[Self]) -> bool {
        match self.kind.as_str() {
            "trigger" => true,
            "index" => false,
            _ => ours.iter().any(|object| object.name == self.name),
        }
    }
}

/// At most `most` objects of the database that is open under this name. Overlong statements are cut, slightly beyond the length
/// of valid ones.
pub(super) async fn read(
    connection: &mut SqliteConnection,
    database: &str,
    most: usize,
) -> Result<Vec<Object>, sqlx::Error> {
    let sql = format!(
        "select substr(type, 1, 99), substr(name, 1, 99), substr(tbl_name, 1, 99), substr(sql, 1, 9999)
         from {database}.sqlite_schema where substr(name, 1, 11) <> 'sqlite_stat' limit ?1"
    );
    let rows: Vec<(String, String, String, Option<String>)> = sqlx::query_as(AssertSqlSafe(sql))
        .bind(i64::try_from(most).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await?;
    let object = |(kind, name, table, sql): (_, _, _, Option<String>)| {
        Object::new(kind, name, table, sql.as_deref())
    };
    Ok(rows.into_iter().map(object).collect())
}

/// A limit on the number of objects: more than a history has, and still few.
const MANY: usize = 1000;

/// Checks that a history made by these migrations has its own tables, triggers and views, and nothing that interferes with
/// them. Other tables and views, and all indexes, are harmless.
///
/// # Errors
/// [`StoreError::NotAStore`] names an object that does not belong there.
pub(super) async fn check(
    connection: &mut SqliteConnection,
    migrations: &[&'static str],
    path: &Path,
) -> Result<(), StoreError> {
    let at = |error: sqlx::Error| StoreError::from(error).at(path);
    let theirs = read(connection, "main", MANY + 1).await.map_err(at)?;
    if theirs.len() > MANY {
        return Err(StoreError::NotAStore {
            path: path.to_owned(),
            message: format!("it has more than {MANY} tables, views, indexes and triggers"),
        });
    }
    if fingerprint(&theirs) == FINGERPRINT {
        return Ok(());
    }
    let ours = made_by(migrations).await?;
    let changed = theirs
        .iter()
        .find(|object| object.is_in_the_way(&ours) && !ours.contains(object));
    let missing = ours
        .iter()
        .find(|object| object.kind != "index" && !theirs.contains(object));
    let (words, Object { kind, name, .. }) = match (changed, missing) {
        (Some(object), _) => ("is not that of a retort history", object),
        (None, Some(object)) => ("of a retort history is missing", object),
        (None, None) => return Ok(()),
    };
    Err(StoreError::NotAStore {
        path: path.to_owned(),
        message: format!("the {kind} `{}` {words}", brief(name)),
    })
}

/// The objects that migrations make in an empty database.
async fn made_by(migrations: &[&'static str]) -> Result<Vec<Object>, StoreError> {
    let mut memory = SqliteConnection::connect_with(&SqliteConnectOptions::new()).await?;
    super::function::register(&mut memory).await?;
    for migration in migrations {
        sqlx::raw_sql(*migration).execute(&mut memory).await?;
    }
    let objects = read(&mut memory, "main", usize::MAX).await?;
    memory.close().await?;
    Ok(objects)
}

/// The beginning of a text that may be long.
pub(super) fn brief(text: &str) -> String {
    text.chars()
        .take(80)
        .collect::<String>()
        .escape_debug()
        .to_string()
}

fn fingerprint(objects: &[Object]) -> String {
    let mut sorted: Vec<&Object> = objects.iter().collect();
    sorted.sort();
    let mut hasher = blake3::Hasher::new();
    for object in sorted {
        let sql = object.sql.as_deref().unwrap_or_default();
        for text in [&object.kind, &object.name, &object.table, sql] {
            hasher.update(text.as_bytes()).update(&[0]);
        }
    }
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::connection::{options, path_of};
    use crate::store::schema::MIGRATIONS;
    use crate::store::{Access, Store};

    #[tokio::test]
    async fn the_fingerprint_is_that_of_all_migrations() {
        let ours = made_by(MIGRATIONS).await.unwrap();
        assert!(ours.len() > 30 && ours.len() < MANY / 2);
        assert_eq!(fingerprint(&ours), FINGERPRINT);
    }

    /// The errors of the two ways to open a store, after these statements have changed its file.
    async fn said(statements: &str) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path(), Access::ReadWrite)
            .await
            .unwrap()
            .close()
            .await;
        let path = path_of(dir.path());
        let mut connection = SqliteConnection::connect_with(&options(&path))
            .await
            .unwrap();
        let statements = format!("pragma foreign_keys = off; {statements}");
        sqlx::raw_sql(AssertSqlSafe(statements))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
        let text = |result: Result<Store, StoreError>| result.err().map(|error| error.to_string());
        let reading = text(Store::open(dir.path(), Access::ReadOnly).await);
        let writing = text(Store::open(dir.path(), Access::ReadWrite).await);
        assert_eq!(reading, writing);
        writing
    }

    #[tokio::test]
    async fn strange_objects_in_the_way_are_refused() {
        let endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select i as key from n";
        for (statements, expected) in [
            (
                format!("drop table runs; create view runs as {endless}"),
                "the view `runs` is not that of",
            ),
            (
                format!("drop view v_runs; create view v_runs as {endless}"),
                "the view `v_runs` is not that of",
            ),
            (
                "create trigger t after insert on logs begin delete from runs; end".into(),
                "the trigger `t` is not that of",
            ),
            (
                "drop table packs; create table packs (key integer primary key, data as (zeroblob(1e9)))".into(),
                "the table `packs` is not that of",
            ),
            (
                "drop table packs; create virtual table packs using fts5(data)".into(),
                "the table `packs` is not that of",
            ),
            ("drop view v_metrics".into(), "the view `v_metrics` of a retort history is missing"),
        ] {
            let said = said(&statements).await.expect(&statements);
            assert!(said.contains(expected), "{statements}: {said}");
        }
    }

    #[tokio::test]
    async fn no_trigger_hides_behind_many_tables() {
        let tables: String = (0..MANY)
            .map(|number| format!("create table t{number} (x);"))
            .collect();
        let trigger = "create trigger t after insert on logs begin delete from runs; end";
        let said = said(&format!("{tables}{trigger}")).await.expect("an error");
        assert!(said.contains("more than 1000 tables"), "{said}");
    }

    #[tokio::test]
    async fn what_does_nothing_to_a_history_is_left_alone() {
        for statements in [
            "create table notes (text)",
            "create index mine on runs (id)",
            "create view mine as select * from runs",
            "analyze",
            "vacuum",
        ] {
            assert_eq!(said(statements).await, None, "{statements}");
        }
    }
}
