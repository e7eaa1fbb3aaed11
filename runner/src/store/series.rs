//! Metric series: points are appended while a stage runs, and read back completely, as a summary or as a curve.
//!
//! Points are kept in blocks of up to [`append::CUT`] ([`block`]). A block with fewer than [`append::CLOSE`] is open: the
//! next points of its series are packed together with it. That costs no more than a row per point would, because SQLite
//! writes whole pages. Late or repeated points are merged into their blocks. Each 64 blocks are summed up by a span, which goes
//! as soon as one of them changes (a trigger).
//!
//! NaN and the infinities are values. SQLite keeps a NaN as null, and gets it back as one here; JSON knows neither, so
//! they serialise as the texts "NaN", "Infinity" and "-Infinity".

mod append;
mod curve;

use serde::{Serialize, Serializer};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::block::{self, BlockPoint};
use super::time::Time;
use super::{AttemptId, RunId, Store, StoreError};

pub(super) use append::{
    OpenSeries, append_points, make_spans, name_series, note_results, pack_points,
};

/// Points of one series about to be appended.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Name of the series: `loss`, `train/accuracy`.
    pub series: String,
    /// Its points, in any order.
    pub points: Vec<MetricPoint>,
}

impl From<(String, Vec<MetricPoint>)> for Batch {
    fn from((series, points): (String, Vec<MetricPoint>)) -> Self {
        Self { series, points }
    }
}

/// A point about to be appended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MetricPoint {
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

/// The summary of a series.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SeriesSummary {
    /// Name of the stage.
    pub stage: String,
    /// Name of the series.
    pub series: String,
    /// How many points it has.
    pub points: u64,
    /// The last step.
    pub last_step: u64,
    /// The value at the last step.
    #[serde(serialize_with = "number")]
    pub last: f64,
    /// The least value; None if all are NaN.
    #[serde(serialize_with = "number_or_none")]
    pub min: Option<f64>,
    /// The greatest value; None if all are NaN.
    #[serde(serialize_with = "number_or_none")]
    pub max: Option<f64>,
    /// The attempt that reported it.
    pub attempt: AttemptId,
    /// Whether the stage was reused: the attempt is another run's.
    pub reused: bool,
}

/// Which part of a series to see, and how coarsely.
#[derive(Debug, Clone, Copy)]
pub struct CurveQuery {
    /// The most buckets.
    pub buckets: u32,
    /// What divides them.
    pub axis: Axis,
    /// The first step.
    pub from: u64,
    /// The last step.
    pub to: u64,
}

/// The horizontal axis of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Steps.
    Step,
    /// Time.
    Time,
}

/// Neighbouring points of a series, summed up. Exact for the steps it covers; where there are many points, it begins
/// and ends with a block, so that buckets differ somewhat in width.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bucket {
    /// Name of the stage.
    pub stage: String,
    /// Name of the series.
    pub series: String,
    /// Its first step.
    pub first_step: u64,
    /// Its last step.
    pub last_step: u64,
    /// When its first point was measured.
    pub first_at: Time,
    /// When its last point was measured.
    pub last_at: Time,
    /// How many points it covers.
    pub points: u64,
    /// How many of them are NaN; the next three fields ignore these.
    pub nan: u64,
    /// The least value.
    #[serde(serialize_with = "number_or_none")]
    pub min: Option<f64>,
    /// The greatest value.
    #[serde(serialize_with = "number_or_none")]
    pub max: Option<f64>,
    /// The mean.
    #[serde(serialize_with = "number_or_none")]
    pub mean: Option<f64>,
}

/// One of the series that a name refers to, of one stage.
struct NamedSeries {
    key: i64,
    base: i64,
    stage: String,
    series: String,
}

impl Store {
    /// Summaries of a run's series, including those of reused stages, by stage and name.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn last_metrics(&self, run: &RunId) -> Result<Vec<SeriesSummary>, StoreError> {
        let key = self.run_key(run).await?;
        let rows = sqlx::query(
            "select s.name as stage, e.name as series, e.points, e.last_step, e.last, e.min, e.max, e.attempt, v.reused
             from v_stage_attempts v
             join stages s on s.key = v.stage
             join series e on e.attempt = v.attempt
             where v.run = ?1
             order by s.position, s.key, e.name, e.attempt",
        )
        .bind(key)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(SeriesSummary {
                    stage: row.try_get("stage")?,
                    series: row.try_get("series")?,
                    points: row.try_get::<i64, _>("points")?.cast_unsigned(),
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
        let mut points = Vec::new();
        for named in self.series_named(run, name).await? {
            let packed = self.unpacked(&named).await?;
            points.extend(packed.into_iter().map(|point| SeriesPoint {
                stage: named.stage.clone(),
                series: named.series.clone(),
                step: point.step.cast_unsigned(),
                value: point.value,
                at: Time(named.base.saturating_add(point.at)),
            }));
        }
        Ok(points)
    }

    /// The next points of a series, by step: a block of them. `after` is the last step that came before; none when there are no
    /// more.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn points_after(
        &self,
        series: &SeriesSummary,
        after: Option<u64>,
    ) -> Result<Option<Vec<SeriesPoint>>, StoreError> {
        let row = sqlx::query(
            "select k.data, e.base from series e
             join blocks b on b.series = e.key join packs k on k.key = b.pack
             where e.attempt = ?1 and e.name = ?2 and b.first_step > ?3 order by b.first_step limit 1",
        )
        .bind(series.attempt.0)
        .bind(&series.series)
        .bind(after.map_or(i64::MIN, clamped))
        .fetch_optional(self.pool())
        .await?;
        let Some(row) = row else { return Ok(None) };
        let base: i64 = row.try_get("base")?;
        let points = unpacked(&row, &series.series)?;
        // Otherwise the same block would come again and again.
        let goes_on = |point: &BlockPoint| after.is_none_or(|after| point.step > clamped(after));
        if points.last().is_some_and(|last| !goes_on(last)) {
            return Err(StoreError::Damaged {
                message: format!(
                    "a block has steps before its first (series `{}`)",
                    series.series
                ),
            });
        }
        let points = points.into_iter().map(|point| SeriesPoint {
            stage: series.stage.clone(),
            series: series.series.clone(),
            step: point.step.cast_unsigned(),
            value: point.value,
            at: Time(base.saturating_add(point.at)),
        });
        Ok(Some(points.collect()).filter(|points: &Vec<_>| !points.is_empty()))
    }

    /// When the first point of a series was measured, in the first stage that has it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn series_began(&self, run: &RunId, name: &str) -> Result<Option<Time>, StoreError> {
        let named = self.series_named(run, name).await?;
        let Some(named) = named.first() else {
            return Ok(None);
        };
        let first: Option<i64> = sqlx::query_scalar(
            "select first_at from blocks where series = ?1 order by first_step limit 1",
        )
        .bind(named.key)
        .fetch_optional(self.pool())
        .await?;
        Ok(first.map(|at| Time(named.base.saturating_add(at))))
    }

    async fn series_named(&self, run: &RunId, name: &str) -> Result<Vec<NamedSeries>, StoreError> {
        let key = self.run_key(run).await?;
        let rows = sqlx::query(
            "select e.key, e.base, s.name as stage, e.name as series
             from v_stage_attempts v
             join stages s on s.key = v.stage
             join series e on e.attempt = v.attempt
             where v.run = ?1 and (e.name = ?2 or s.name || '/' || e.name = ?2)
             order by s.position, s.key, e.attempt",
        )
        .bind(key)
        .bind(name)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(NamedSeries {
                    key: row.try_get("key")?,
                    base: row.try_get("base")?,
                    stage: row.try_get("stage")?,
                    series: row.try_get("series")?,
                })
            })
            .collect()
    }

    /// The points of a series.
    async fn unpacked(&self, named: &NamedSeries) -> Result<Vec<BlockPoint>, StoreError> {
        let mut points = Vec::new();
        for row in &self.packs(named, i64::MIN, i64::MAX).await? {
            points.append(&mut unpacked(row, &named.series)?);
        }
        Ok(points)
    }

    /// The packed blocks of a series that overlap a range of steps, in order.
    async fn packs(
        &self,
        named: &NamedSeries,
        from: i64,
        to: i64,
    ) -> Result<Vec<SqliteRow>, StoreError> {
        let rows = sqlx::query(
            "select k.data from blocks b join packs k on k.key = b.pack
             where b.series = ?1 and b.last_step >= ?2 and b.first_step <= ?3 order by b.first_step",
        )
        .bind(named.key)
        .bind(from)
        .bind(to)
        .fetch_all(self.pool())
        .await?;
        Ok(rows)
    }
}

fn unpacked(row: &SqliteRow, series: &str) -> Result<Vec<BlockPoint>, StoreError> {
    block::unpack(row.try_get("data")?).map_err(|damaged| StoreError::Damaged {
        message: format!("{damaged} (series `{series}`)"),
    })
}

/// A step in SQLite's integer type.
fn clamped(step: u64) -> i64 {
    i64::try_from(step).unwrap_or(i64::MAX)
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
