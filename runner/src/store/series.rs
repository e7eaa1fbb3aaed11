//! Metric series: points appended while a stage runs, and read back whole or in brief.
//!
//! NaN and the infinities are values. SQLite keeps a NaN as null, and gets it back as one here; JSON knows neither, so
//! they serialise as the texts "NaN", "Infinity" and "-Infinity".

use std::collections::HashMap;

use serde::{Serialize, Serializer};
use sqlx::sqlite::SqliteConnection;
use sqlx::{QueryBuilder, Row, Sqlite};

use super::time::Time;
use super::{AttemptId, RunId, Store, StoreError};

/// A point about to be appended.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricPoint {
    /// Name of the series: `loss`, `train/accuracy`.
    pub series: String,
    /// Step; a second point of a series at one step replaces the first.
    pub step: u64,
    /// Value, NaN and infinities included.
    pub value: f64,
    /// When it was measured.
    pub at: Time,
}

/// A point of a series.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SeriesPoint {
    /// Name of the stage.
    pub stage: String,
    /// Name of the series.
    pub series: String,
    /// Step.
    pub step: u64,
    /// Value.
    #[serde(serialize_with = "number")]
    pub value: f64,
    /// When it was measured.
    pub at: Time,
}

/// A series in brief.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SeriesSummary {
    /// Name of the stage.
    pub stage: String,
    /// Name of the series.
    pub series: String,
    /// The last step.
    pub last_step: u64,
    /// The value at the last step.
    #[serde(serialize_with = "number")]
    pub last: f64,
    /// The least value; none when all were NaN.
    #[serde(serialize_with = "number_or_none")]
    pub min: Option<f64>,
    /// The greatest value; none when all were NaN.
    #[serde(serialize_with = "number_or_none")]
    pub max: Option<f64>,
    /// The attempt that reported it.
    pub attempt: AttemptId,
    /// Whether the stage was reused: the attempt is another run's.
    pub reused: bool,
}

/// What [`Store::append_metrics`] remembers of a series.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    key: i64,
    base: Time,
}

impl Store {
    /// Appends points, of any number of series, to an attempt.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Full`], [`StoreError::ReadOnly`]: never a reason to fail a stage. The
    /// points are then not recorded, and may be given again.
    pub async fn append_metrics(
        &self,
        attempt: AttemptId,
        points: &[MetricPoint],
    ) -> Result<(), StoreError> {
        let mut by_series: HashMap<&str, Vec<&MetricPoint>> = HashMap::new();
        for point in points {
            by_series.entry(&point.series).or_default().push(point);
        }
        let mut write = self.write().await?;
        let mut fresh = Vec::new();
        for (name, points) in by_series {
            let known = match self.known_series(attempt, name) {
                Some(known) => known,
                None => {
                    let known = find_or_insert(&mut write, attempt, name, points[0]).await?;
                    fresh.push(((attempt, name.to_owned()), known));
                    known
                }
            };
            insert_points(&mut write, known, &points).await?;
            update_summary(&mut write, known, &points).await?;
        }
        write.commit().await?;
        // Only now: keys of a transaction that came to nothing must not be remembered.
        self.series
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .extend(fresh);
        Ok(())
    }

    /// The series of a run in brief, those of reused stages included, in the order of stages and names.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn last_metrics(&self, run: &RunId) -> Result<Vec<SeriesSummary>, StoreError> {
        let rows = sqlx::query(
            "select s.name as stage, e.name as series, e.last_step, e.last, e.min, e.max, e.attempt, v.reused
             from v_stage_attempts v
             join stages s on s.key = v.stage
             join series e on e.attempt = v.attempt
             where v.run = (select key from runs where id = ?1)
             order by s.position, s.key, e.name, e.attempt",
        )
        .bind(&run.0)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(SeriesSummary {
                    stage: row.try_get("stage")?,
                    series: row.try_get("series")?,
                    last_step: row.try_get::<i64, _>("last_step")?.cast_unsigned(),
                    last: row.try_get::<Option<f64>, _>("last")?.unwrap_or(f64::NAN),
                    min: row.try_get("min")?,
                    max: row.try_get("max")?,
                    attempt: AttemptId(row.try_get("attempt")?),
                    reused: row.try_get("reused")?,
                })
            })
            .collect()
    }

    /// The points of one series of a run, by step. `name` is the series' name, which every stage that has one
    /// contributes to, or `stage/series`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn metric_series(
        &self,
        run: &RunId,
        name: &str,
    ) -> Result<Vec<SeriesPoint>, StoreError> {
        let rows = sqlx::query(
            "select s.name as stage, e.name as series, p.step, p.value, e.base + p.at as at
             from v_stage_attempts v
             join stages s on s.key = v.stage
             join series e on e.attempt = v.attempt
             join points p on p.series = e.key
             where v.run = (select key from runs where id = ?1) and (e.name = ?2 or s.name || '/' || e.name = ?2)
             order by s.position, s.key, e.attempt, p.step",
        )
        .bind(&run.0)
        .bind(name)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(SeriesPoint {
                    stage: row.try_get("stage")?,
                    series: row.try_get("series")?,
                    step: row.try_get::<i64, _>("step")?.cast_unsigned(),
                    value: row.try_get::<Option<f64>, _>("value")?.unwrap_or(f64::NAN),
                    at: Time(row.try_get("at")?),
                })
            })
            .collect()
    }

    fn known_series(&self, attempt: AttemptId, name: &str) -> Option<Known> {
        let series = self
            .series
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        series.get(&(attempt, name.to_owned())).copied()
    }
}

async fn find_or_insert(
    connection: &mut SqliteConnection,
    attempt: AttemptId,
    name: &str,
    first: &MetricPoint,
) -> Result<Known, sqlx::Error> {
    let found = sqlx::query_as::<_, (i64, i64)>(
        "select key, base from series where attempt = ?1 and name = ?2",
    )
    .bind(attempt.0)
    .bind(name)
    .fetch_optional(&mut *connection)
    .await?;
    if let Some((key, base)) = found {
        return Ok(Known {
            key,
            base: Time(base),
        });
    }
    let key = sqlx::query(
        "insert into series (attempt, name, base, last_step, last) values (?1, ?2, ?3, ?4, ?5)",
    )
    .bind(attempt.0)
    .bind(name)
    .bind(first.at.0)
    .bind(step(first))
    .bind(first.value)
    .execute(connection)
    .await?
    .last_insert_rowid();
    Ok(Known {
        key,
        base: first.at,
    })
}

async fn insert_points(
    connection: &mut SqliteConnection,
    series: Known,
    points: &[&MetricPoint],
) -> Result<(), sqlx::Error> {
    // Many rows in one statement: a statement's cost is mostly its way to the database's thread and back.
    for points in points.chunks(256) {
        let mut insert: QueryBuilder<Sqlite> =
            QueryBuilder::new("insert into points (series, step, value, at) ");
        insert.push_values(points, |mut row, point| {
            row.push_bind(series.key)
                .push_bind(step(point))
                .push_bind(point.value)
                .push_bind(point.at.0.saturating_sub(series.base.0));
        });
        insert.push(
            " on conflict (series, step) do update set value = excluded.value, at = excluded.at",
        );
        insert.build().execute(&mut *connection).await?;
    }
    Ok(())
}

async fn update_summary(
    connection: &mut SqliteConnection,
    series: Known,
    points: &[&MetricPoint],
) -> Result<(), sqlx::Error> {
    // Of several points at the last step, the one given last counts, as in `points`.
    let Some(last) = points.iter().max_by_key(|point| point.step) else {
        return Ok(());
    };
    let values = || {
        points
            .iter()
            .map(|point| point.value)
            .filter(|value| !value.is_nan())
    };
    sqlx::query(
        "update series
         set last = case when ?2 >= last_step then ?3 else last end,
             last_step = max(last_step, ?2),
             min = min(coalesce(min, ?4), coalesce(?4, min)),
             max = max(coalesce(max, ?5), coalesce(?5, max))
         where key = ?1",
    )
    .bind(series.key)
    .bind(step(last))
    .bind(last.value)
    .bind(values().reduce(f64::min))
    .bind(values().reduce(f64::max))
    .execute(connection)
    .await?;
    Ok(())
}

fn step(point: &MetricPoint) -> i64 {
    i64::try_from(point.step).unwrap_or(i64::MAX)
}

/// A number for JSON, which has no NaN and no infinities.
pub(crate) fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        value if value.is_finite() => serializer.serialize_f64(*value),
        value if value.is_nan() => serializer.serialize_str("NaN"),
        value if *value > 0.0 => serializer.serialize_str("Infinity"),
        _ => serializer.serialize_str("-Infinity"),
    }
}

fn number_or_none<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => number(value, serializer),
        None => serializer.serialize_none(),
    }
}
