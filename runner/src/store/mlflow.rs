//! Runs into a database of MLflow: the file behind `sqlite:///mlflow.db`, which is where the mlflow package keeps runs
//! by default.
//!
//! The database is made by MLflow's own program (`mlflow db upgrade sqlite:///mlflow.db`). We only know the six tables that
//! hold runs, of about sixty others. A recipe becomes an experiment. A run becomes a run,
//! named by a hash of its id, so that it can be exported again.

use std::path::Path;

use serde_json::Value;
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;

use super::{RunDetail, RunId, RunState, SeriesPoint, Store, StoreError, connection, schema};
use crate::artifact::{self, file_name};
use crate::draft::CreatedPaths;

/// Longest value of a parameter or tag, in characters.
const LONGEST: usize = 8000;

impl Store {
    /// Adds runs to the MLflow database at `to`, and replaces what an earlier export of them has written. Images are copied
    /// to a folder next to it.
    ///
    /// # Errors
    /// [`StoreError::NotMlflow`], [`StoreError`].
    pub async fn export_to_mlflow(&self, runs: &[RunId], to: &Path) -> Result<(), StoreError> {
        let refuse = |message: &str| StoreError::NotMlflow {
            path: to.to_owned(),
            message: message.to_owned(),
        };
        if !to.exists() {
            return Err(refuse("it does not exist"));
        }
        schema::check_files(to).map_err(|error| refuse(&error.to_string()))?;
        let outcome = self.add_all(runs, to).await;
        outcome.map_err(|error| error.of_disk_with(to))
    }

    async fn add_all(&self, runs: &[RunId], to: &Path) -> Result<(), StoreError> {
        let at = |error: sqlx::Error| StoreError::from(error).at(to);
        let options = connection::options(to);
        let mut connection = connection::connect(&options).await.map_err(at)?;
        let known: i64 = sqlx::query_scalar(
            "select count(*) from sqlite_schema
             where type = 'table' and name in ('experiments', 'runs', 'metrics', 'latest_metrics', 'params', 'tags')",
        )
        .fetch_one(&mut connection)
        .await
        .map_err(at)?;
        if known != 6 {
            return Err(StoreError::NotMlflow {
                path: to.to_owned(),
                message: "it lacks the tables of MLflow".to_owned(),
            });
        }
        let root = std::path::absolute(to).map_err(|error| StoreError::refused(to, error))?;
        let root = root.parent().unwrap_or(Path::new("/")).join("mlruns");
        let mut transaction = connection.begin_with("begin immediate").await.map_err(at)?;
        let mut made = CreatedPaths::default();
        for run in runs {
            let run = self.run_detail(run).await?;
            self.add(&mut transaction, &run, &root, &mut made).await?;
        }
        transaction.commit().await.map_err(at)?;
        made.keep();
        connection.close().await.map_err(at)
    }

    async fn add(
        &self,
        connection: &mut SqliteConnection,
        run: &RunDetail,
        root: &Path,
        made: &mut CreatedPaths,
    ) -> Result<(), StoreError> {
        let summary = &run.summary;
        let experiment = experiment(connection, &summary.recipe, root).await?;
        let hash = blake3::hash(summary.id.0.as_bytes()).to_hex();
        let uuid = &hash.as_str()[..32];
        let place = root
            .join(experiment.to_string())
            .join(uuid)
            .join("artifacts");
        for table in ["metrics", "latest_metrics", "params", "tags"] {
            let sql = format!("delete from {table} where run_uuid = ?1");
            sqlx::query(sqlx::AssertSqlSafe(sql))
                .bind(uuid)
                .execute(&mut *connection)
                .await?;
        }
        // References to a run in tables unknown to us must not block the update.
        sqlx::query(
            "insert into runs (run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,
                 end_time, source_version, lifecycle_stage, artifact_uri, experiment_id)
             values (?1, ?2, 'LOCAL', ?3, '', '', ?4, ?5, ?6, ?7, 'active', ?8, ?9)
             on conflict (run_uuid) do update set status = excluded.status, end_time = excluded.end_time",
        )
        .bind(uuid)
        .bind(&summary.id.0)
        .bind(cut(&summary.recipe_path, 500))
        .bind(status(summary.state))
        .bind(summary.started.0)
        .bind(summary.finished.map(|time| time.0))
        .bind(run.environment["git_commit"].as_str().map(|commit| cut(commit, 50)))
        .bind(place.to_string_lossy().into_owned())
        .bind(experiment)
        .execute(&mut *connection)
        .await?;
        for param in &run.params {
            let value = match &param.value {
                Value::String(text) => text.clone(),
                value => value.to_string(),
            };
            sqlx::query("insert or ignore into params (key, value, run_uuid) values (?1, ?2, ?3)")
                .bind(key(&param.path))
                .bind(cut(&value, LONGEST))
                .bind(uuid)
                .execute(&mut *connection)
                .await?;
        }
        let mut tags = vec![
            ("mlflow.runName".to_owned(), summary.id.0.clone()),
            ("mlflow.source.name".to_owned(), summary.recipe_path.clone()),
            ("mlflow.source.type".to_owned(), "LOCAL".to_owned()),
            ("retort.state".to_owned(), summary.state.to_string()),
        ];
        if !summary.note.is_empty() {
            tags.push(("mlflow.note.content".into(), summary.note.clone()));
        }
        for tag in &summary.tags {
            tags.push((key(tag), "true".into()));
        }
        for (name, value) in tags {
            sqlx::query("insert or ignore into tags (key, value, run_uuid) values (?1, ?2, ?3)")
                .bind(name)
                .bind(cut(&value, LONGEST))
                .bind(uuid)
                .execute(&mut *connection)
                .await?;
        }
        for series in self.last_metrics(&summary.id).await? {
            let name = format!("{}/{}", series.stage, series.series);
            let mut after = None;
            while let Some(points) = self.points_after(&series, after).await? {
                add_points(connection, uuid, &key(&name), &points).await?;
                after = points.last().map(|point| point.step);
            }
        }
        for row in &run.artifacts {
            let Some(preview) = &row.artifact.meta.preview else {
                continue;
            };
            let from = self.dir().join("artifacts").join(&row.artifact.hash);
            let name = preview.rsplit('/').next().unwrap_or(preview);
            let to = place.join(file_name(&row.stage)).join(file_name(name));
            let copied = artifact::open_inner(&from, preview).and_then(|mut picture| {
                made.file(&to, |copy| std::io::copy(&mut picture, copy).map(drop))
            });
            if let Err(error) = copied {
                tracing::warn!("{preview} in {} was not exported: {error}", from.display());
            }
        }
        Ok(())
    }
}

/// The experiment of a recipe, created if missing.
async fn experiment(
    connection: &mut SqliteConnection,
    recipe: &str,
    root: &Path,
) -> Result<i64, StoreError> {
    let found: Option<i64> =
        sqlx::query_scalar("select experiment_id from experiments where name = ?1")
            .bind(cut(recipe, 256))
            .fetch_optional(&mut *connection)
            .await?;
    if let Some(found) = found {
        return Ok(found);
    }
    let id: i64 = sqlx::query_scalar("select coalesce(max(experiment_id), 0) + 1 from experiments")
        .fetch_one(&mut *connection)
        .await?;
    let now = super::Time::now().0;
    sqlx::query(
        "insert into experiments (experiment_id, name, artifact_location, lifecycle_stage, creation_time,
             last_update_time)
         values (?1, ?2, ?3, 'active', ?4, ?4)",
    )
    .bind(id)
    .bind(cut(recipe, 256))
    .bind(root.join(id.to_string()).to_string_lossy().into_owned())
    .bind(now)
    .execute(connection)
    .await?;
    Ok(id)
}

/// MLflow keeps a NaN as 0 with a mark, and an infinity as the greatest double.
async fn add_points(
    connection: &mut SqliteConnection,
    uuid: &str,
    name: &str,
    points: &[SeriesPoint],
) -> Result<(), StoreError> {
    let stored = |value: f64| {
        if value.is_nan() {
            0.0
        } else {
            value.clamp(f64::MIN, f64::MAX)
        }
    };
    for points in points.chunks(100) {
        let mut insert: sqlx::QueryBuilder<sqlx::Sqlite> = sqlx::QueryBuilder::new(
            "insert or ignore into metrics (key, value, timestamp, run_uuid, step, is_nan) ",
        );
        insert.push_values(points, |mut row, point| {
            row.push_bind(name)
                .push_bind(stored(point.value))
                .push_bind(point.at.0)
                .push_bind(uuid)
                .push_bind(point.step.cast_signed())
                .push_bind(point.value.is_nan());
        });
        insert.build().execute(&mut *connection).await?;
    }
    let Some(last) = points.last() else {
        return Ok(());
    };
    sqlx::query(
        "insert or replace into latest_metrics (key, value, timestamp, step, is_nan, run_uuid)
         values (?1, ?2, ?3, ?4, ?5, ?6)",
    )
    .bind(name)
    .bind(stored(last.value))
    .bind(last.at.0)
    .bind(last.step.cast_signed())
    .bind(last.value.is_nan())
    .bind(uuid)
    .execute(connection)
    .await?;
    Ok(())
}

fn status(state: RunState) -> &'static str {
    match state {
        RunState::Queued => "SCHEDULED",
        RunState::Running => "RUNNING",
        RunState::Succeeded => "FINISHED",
        RunState::Failed | RunState::Lost => "FAILED",
        RunState::Interrupted => "KILLED",
    }
}

/// A name with the characters that MLflow allows.
fn key(name: &str) -> String {
    let allowed = |c: char| c.is_alphanumeric() || "_-./ :".contains(c);
    let name: String = name
        .chars()
        .map(|c| if allowed(c) { c } else { '_' })
        .collect();
    cut(&name, 250)
}

fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}
