//! Metric series: points appended while a stage runs, and read back whole, in brief or as a curve.
//!
//! Points are kept in blocks of up to [`CUT`] ([`block`]). A block with fewer than [`CLOSE`] is open: the next points
//! of its series are packed together with it. That costs no more than a row per point would, because SQLite writes
//! whole pages. Points that come late, or again, are merged into the blocks they belong to.
//!
//! NaN and the infinities are values. SQLite keeps a NaN as null, and gets it back as one here; JSON knows neither, so
//! they serialise as the texts "NaN", "Infinity" and "-Infinity".

use std::collections::{BTreeMap, HashMap};

use serde::{Serialize, Serializer};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Row, Sqlite, Transaction};

use super::block::{self, Packed, Summary};
use super::time::Time;
use super::{AttemptId, RunId, Store, StoreError};

/// Most points of a block.
const CUT: usize = 4096;
/// A block with so many points is not packed again with the next ones.
const CLOSE: usize = 1024;
/// So many blocks are unpacked for a curve in any case.
const FEW: i64 = 128;

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

/// A series in brief.
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

/// Which part of a series to see, and how coarsely.
#[derive(Debug, Clone, Copy)]
pub struct Lens {
    /// At most so many buckets.
    pub buckets: u32,
    /// What divides them.
    pub axis: Axis,
    /// First step wanted.
    pub from: u64,
    /// Last step wanted.
    pub to: u64,
}

/// What a curve is drawn over.
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
    /// How many of them are NaN; they are left out of the next three.
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

/// What [`Store::append_metrics`] remembers of a series.
#[derive(Debug)]
pub(super) struct Known {
    key: i64,
    base: Time,
    /// The last block, while it is open.
    open: Option<Vec<Packed>>,
    /// The last step of the blocks before it.
    closed: Option<i64>,
}

/// A series that a name means, of one stage.
struct Named {
    key: i64,
    base: i64,
    stage: String,
    series: String,
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
        batches: &[Batch],
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        // Taken out, and put back when all has gone well: what a transaction that came to nothing has left of it would
        // be wrong, and is read again when needed.
        let mut known = self.lock_series().remove(&attempt).unwrap_or_default();
        for batch in batches.iter().filter(|batch| !batch.points.is_empty()) {
            if !known.contains_key(&batch.series) {
                let found = find_or_insert(&mut write, attempt, batch).await?;
                known.insert(batch.series.clone(), found);
            }
            let Some(series) = known.get_mut(&batch.series) else {
                continue;
            };
            let points = in_order(&batch.points, series.base);
            let growth = append(&mut write, series, &points).await?;
            update_summary(&mut write, series.key, &points, growth).await?;
        }
        note_results(&mut write, attempt).await?;
        write.commit().await?;
        self.lock_series().insert(attempt, known);
        Ok(())
    }

    /// The series of a run in brief, those of reused stages included, in the order of stages and names.
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

    /// A series of a run as a curve: at most `lens.buckets` buckets for each stage that has it, in order.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn curve(
        &self,
        run: &RunId,
        name: &str,
        lens: Lens,
    ) -> Result<Vec<Bucket>, StoreError> {
        let mut buckets = Vec::new();
        for named in self.series_named(run, name).await? {
            let summaries = self.buckets(&named, lens).await?;
            buckets.extend(summaries.iter().map(|summary| bucket(&named, summary)));
        }
        Ok(buckets)
    }

    /// When the first point of a series was measured: of the first stage that has it.
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

    async fn buckets(&self, named: &Named, lens: Lens) -> Result<Vec<Summary>, StoreError> {
        let (from, to) = (clamped(lens.from), clamped(lens.to));
        // Blocks as a whole give at least half as many buckets as asked for, or there are few.
        let few = i64::from(lens.buckets).min(FEW.max(i64::from(lens.buckets) / 2));
        let begin = self.block_of(named, from).await?;
        // Blocks do not overlap: the first and the last are found by their place, and no more are counted than matter.
        let extent = sqlx::query(
            "with wanted as not materialized (
                 select * from blocks
                 where series = ?1 and last_step >= ?3 and first_step <= ?4 and first_step >= ?2)
             select (select count(*) from (select 1 from wanted limit ?5)) as blocks,
                    (select first_step from wanted order by first_step limit 1) as first_step,
                    (select last_step from wanted order by first_step desc limit 1) as last_step",
        )
        .bind(named.key)
        .bind(begin)
        .bind(from)
        .bind(to)
        .bind(few)
        .fetch_one(self.pool())
        .await?;
        let blocks: i64 = extent.try_get("blocks")?;
        if blocks == 0 {
            return Ok(Vec::new());
        }
        let (first, last): (i64, i64) = match lens.axis {
            Axis::Step => {
                let (first, last): (i64, i64) =
                    (extent.try_get("first_step")?, extent.try_get("last_step")?);
                (first.max(from), last.min(to))
            }
            Axis::Time => {
                sqlx::query_as(
                    "select min(first_at), max(last_at) from blocks
                     where series = ?1 and last_step >= ?2 and first_step <= ?3",
                )
                .bind(named.key)
                .bind(from)
                .bind(to)
                .fetch_one(self.pool())
                .await?
            }
        };
        let mut grid = Grid::new(lens, first, last);
        if blocks < few {
            for row in &self.packs(named, from, to).await? {
                let mut points = unpacked(row, &named.series)?;
                points.retain(|point| (from..=to).contains(&point.step));
                grid.add(&points);
            }
        } else {
            self.sum_up_blocks(named, from, to, &mut grid).await?;
        }
        Ok(grid.buckets.into_values().collect())
    }

    /// Where the block begins that has a step, or would have it.
    async fn block_of(&self, named: &Named, step: i64) -> Result<i64, StoreError> {
        let first = sqlx::query_scalar(
            "select first_step from blocks where series = ?1 and first_step <= ?2
             order by first_step desc limit 1",
        )
        .bind(named.key)
        .bind(step)
        .fetch_optional(self.pool())
        .await?;
        Ok(first.unwrap_or(step))
    }

    /// Many more points than buckets: blocks count as a whole, but for those that the range cuts.
    async fn sum_up_blocks(
        &self,
        named: &Named,
        from: i64,
        to: i64,
        grid: &mut Grid,
    ) -> Result<(), StoreError> {
        let place = match grid.axis {
            Axis::Step => "first_step",
            Axis::Time => "first_at",
        };
        let whole = format!(
            "select min(first_step) as first_step, max(last_step) as last_step, sum(points) as points,
                    sum(numbers) as numbers, case when count(sum) = count(*) then sum(sum) end as sum,
                    min(min) as min, max(max) as max, min(first_at) as first_at, max(last_at) as last_at,
                    min({place}) as place
             from blocks where series = ?1 and first_step between ?2 and ?3 and last_step <= ?3
             group by cast(({place} - ?4) * ?5 as integer)"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(whole))
            .bind(named.key)
            .bind(from)
            .bind(to)
            .bind(grid.first)
            .bind(grid.scale)
            .fetch_all(self.pool())
            .await?;
        for row in &rows {
            grid.merge(row.try_get("place")?, summary(row)?);
        }
        let ends = (
            self.block_of(named, from).await?,
            self.block_of(named, to).await?,
        );
        let cut = sqlx::query(
            "select k.data from blocks b join packs k on k.key = b.pack
             where b.series = ?1 and b.first_step in (?4, ?5) and b.last_step >= ?2 and b.first_step <= ?3
               and (b.first_step < ?2 or b.last_step > ?3)",
        )
        .bind(named.key)
        .bind(from)
        .bind(to)
        .bind(ends.0)
        .bind(ends.1)
        .fetch_all(self.pool())
        .await?;
        for row in &cut {
            let mut points = unpacked(row, &named.series)?;
            points.retain(|point| (from..=to).contains(&point.step));
            grid.add(&points);
        }
        Ok(())
    }

    async fn series_named(&self, run: &RunId, name: &str) -> Result<Vec<Named>, StoreError> {
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
                Ok(Named {
                    key: row.try_get("key")?,
                    base: row.try_get("base")?,
                    stage: row.try_get("stage")?,
                    series: row.try_get("series")?,
                })
            })
            .collect()
    }

    /// The points of a series.
    async fn unpacked(&self, named: &Named) -> Result<Vec<Packed>, StoreError> {
        let mut points = Vec::new();
        for row in &self.packs(named, i64::MIN, i64::MAX).await? {
            points.append(&mut unpacked(row, &named.series)?);
        }
        Ok(points)
    }

    /// The packed blocks of a series that have to do with a range of steps, in order.
    async fn packs(&self, named: &Named, from: i64, to: i64) -> Result<Vec<SqliteRow>, StoreError> {
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

    pub(super) fn lock_series(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<AttemptId, HashMap<String, Known>>> {
        self.series
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Buckets of equal width between two places, filled from points and from summaries.
struct Grid {
    axis: Axis,
    first: i64,
    /// Buckets per unit of the axis.
    scale: f64,
    buckets: BTreeMap<i64, Summary>,
}

impl Grid {
    fn new(lens: Lens, first: i64, last: i64) -> Self {
        // A little wider than the range, so that its last point falls into the last bucket.
        let width = (last as f64 - first as f64 + 1.0).max(1.0);
        Self {
            axis: lens.axis,
            first,
            scale: f64::from(lens.buckets) / width,
            buckets: BTreeMap::new(),
        }
    }

    /// Adds points in their order: neighbours that fall into one bucket are summed up before it is looked up.
    fn add(&mut self, points: &[Packed]) {
        let mut rest = points;
        while let Some(first) = rest.first() {
            let (place, count) = match self.axis {
                // Steps ascend: the end of a bucket is looked for instead of asked for at every point.
                Axis::Step => {
                    let index = self.index(first.step);
                    let inside = |point: &Packed| self.index(point.step) == index;
                    (first.step, rest.partition_point(inside))
                }
                Axis::Time => {
                    let index = self.index(first.at);
                    let inside = |point: &&Packed| self.index(point.at) == index;
                    (first.at, rest.iter().take_while(inside).count())
                }
            };
            let (neighbours, after) = rest.split_at(count);
            self.merge(place, Summary::of(neighbours));
            rest = after;
        }
    }

    fn index(&self, place: i64) -> i64 {
        ((place as f64 - self.first as f64) * self.scale) as i64
    }

    fn merge(&mut self, place: i64, summary: Summary) {
        let index = self.index(place);
        self.buckets
            .entry(index)
            .and_modify(|bucket| *bucket = bucket.with(&summary))
            .or_insert(summary);
    }
}

fn bucket(named: &Named, summary: &Summary) -> Bucket {
    let numbers = (summary.numbers > 0).then_some(summary.numbers as f64);
    Bucket {
        stage: named.stage.clone(),
        series: named.series.clone(),
        first_step: summary.first_step.cast_unsigned(),
        last_step: summary.last_step.cast_unsigned(),
        first_at: Time(named.base.saturating_add(summary.first_at)),
        last_at: Time(named.base.saturating_add(summary.last_at)),
        points: summary.points.cast_unsigned(),
        nan: (summary.points - summary.numbers).cast_unsigned(),
        min: summary.min,
        max: summary.max,
        mean: numbers.map(|numbers| summary.sum / numbers),
    }
}

fn summary(row: &SqliteRow) -> Result<Summary, sqlx::Error> {
    Ok(Summary {
        first_step: row.try_get("first_step")?,
        last_step: row.try_get("last_step")?,
        points: row.try_get("points")?,
        numbers: row.try_get("numbers")?,
        sum: row.try_get::<Option<f64>, _>("sum")?.unwrap_or(f64::NAN),
        min: row.try_get("min")?,
        max: row.try_get("max")?,
        first_at: row.try_get("first_at")?,
        last_at: row.try_get("last_at")?,
    })
}

fn unpacked(row: &SqliteRow, series: &str) -> Result<Vec<Packed>, StoreError> {
    block::unpack(row.try_get("data")?).map_err(|damaged| StoreError::Damaged {
        message: format!("{damaged} (series `{series}`)"),
    })
}

/// Points by step, each step once: the one given last.
fn in_order(points: &[MetricPoint], base: Time) -> Vec<Packed> {
    let mut packed: Vec<Packed> = points
        .iter()
        .map(|point| Packed {
            step: clamped(point.step),
            value: point.value,
            at: point.at.0.saturating_sub(base.0),
        })
        .collect();
    if !packed.is_sorted_by(|a, b| a.step < b.step) {
        packed.sort_by_key(|point| point.step);
        keep_last(&mut packed);
    }
    packed
}

/// Of neighbours at one step only the last.
fn keep_last(points: &mut Vec<Packed>) {
    points.reverse();
    points.dedup_by_key(|point| point.step);
    points.reverse();
}

/// Old points with new ones, which replace those at the same step.
fn merged(mut old: Vec<Packed>, new: &[Packed]) -> Vec<Packed> {
    let in_order = match (old.last(), new.first()) {
        (Some(last), Some(first)) => last.step < first.step,
        _ => true,
    };
    old.extend_from_slice(new);
    if !in_order {
        // Stable: at one step the old one stays before the new one.
        old.sort_by_key(|point| point.step);
        keep_last(&mut old);
    }
    old
}

/// Packs points into the blocks of a series; returns by how many points it grew.
async fn append(
    connection: &mut SqliteConnection,
    series: &mut Known,
    new: &[Packed],
) -> Result<i64, StoreError> {
    let (Some(first), Some(last)) = (new.first(), new.last()) else {
        return Ok(0);
    };
    let (old, late) = match series.closed {
        Some(closed) if first.step <= closed => {
            let (first, last) = (first.step, last.step);
            let old = take_blocks(connection, series.key, first, last).await?;
            let open = series.open.as_ref().and_then(|open| open.first());
            if open.is_some_and(|open| open.step <= last) {
                series.open = None;
            }
            (old, true)
        }
        _ => {
            let open = series.open.take().unwrap_or_default();
            if let Some(first) = open.first() {
                sqlx::query("delete from blocks where series = ?1 and first_step = ?2")
                    .bind(series.key)
                    .bind(first.step)
                    .execute(&mut *connection)
                    .await?;
            }
            (open, false)
        }
    };
    let before = old.len();
    let points = merged(old, new);
    let growth = points.len() - before;
    let mut rest = points.as_slice();
    while rest.len() > CUT || (late && !rest.is_empty()) {
        let (piece, after) = rest.split_at(rest.len().min(CUT));
        insert_block(connection, series.key, piece).await?;
        series.closed = series.closed.max(piece.last().map(|point| point.step));
        rest = after;
    }
    if !rest.is_empty() {
        insert_block(connection, series.key, rest).await?;
        if rest.len() < CLOSE {
            series.open = Some(rest.to_vec());
        } else {
            series.closed = rest.last().map(|point| point.step);
        }
    }
    Ok(growth as i64)
}

/// Removes the blocks that touch a range of steps, and returns their points.
async fn take_blocks(
    connection: &mut SqliteConnection,
    series: i64,
    first: i64,
    last: i64,
) -> Result<Vec<Packed>, StoreError> {
    let rows = sqlx::query(
        "select k.data from blocks b join packs k on k.key = b.pack
         where b.series = ?1 and b.last_step >= ?2 and b.first_step <= ?3 order by b.first_step",
    )
    .bind(series)
    .bind(first)
    .bind(last)
    .fetch_all(&mut *connection)
    .await?;
    let mut points = Vec::new();
    for row in &rows {
        points.append(&mut unpacked(row, &series.to_string())?);
    }
    sqlx::query("delete from blocks where series = ?1 and last_step >= ?2 and first_step <= ?3")
        .bind(series)
        .bind(first)
        .bind(last)
        .execute(connection)
        .await?;
    Ok(points)
}

async fn insert_block(
    connection: &mut SqliteConnection,
    series: i64,
    points: &[Packed],
) -> Result<(), sqlx::Error> {
    let pack = sqlx::query("insert into packs (data) values (?1)")
        .bind(block::pack(points))
        .execute(&mut *connection)
        .await?
        .last_insert_rowid();
    let summary = Summary::of(points);
    sqlx::query(
        "insert into blocks (series, first_step, last_step, points, numbers, sum, min, max, first_at, last_at, pack)
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )
    .bind(series)
    .bind(summary.first_step)
    .bind(summary.last_step)
    .bind(summary.points)
    .bind(summary.numbers)
    .bind(summary.sum)
    .bind(summary.min)
    .bind(summary.max)
    .bind(summary.first_at)
    .bind(summary.last_at)
    .bind(pack)
    .execute(connection)
    .await?;
    Ok(())
}

async fn find_or_insert(
    connection: &mut SqliteConnection,
    attempt: AttemptId,
    batch: &Batch,
) -> Result<Known, StoreError> {
    let found = sqlx::query_as::<_, (i64, i64)>(
        "select key, base from series where attempt = ?1 and name = ?2",
    )
    .bind(attempt.0)
    .bind(&batch.series)
    .fetch_optional(&mut *connection)
    .await?;
    if let Some((key, base)) = found {
        return known(connection, key, Time(base), &batch.series).await;
    }
    // Filters find a series under its own name and under its stage's.
    sqlx::query(
        "insert or ignore into names (name)
         select ?2 union all
         select s.name || '/' || ?2 from attempts a join stages s on s.key = a.stage where a.key = ?1",
    )
    .bind(attempt.0)
    .bind(&batch.series)
    .execute(&mut *connection)
    .await?;
    let first = &batch.points[0];
    let key = sqlx::query(
        "insert into series (attempt, name, base, last_step, last) values (?1, ?2, ?3, ?4, ?5)",
    )
    .bind(attempt.0)
    .bind(&batch.series)
    .bind(first.at.0)
    .bind(clamped(first.step))
    .bind(first.value)
    .execute(connection)
    .await?
    .last_insert_rowid();
    Ok(Known {
        key,
        base: first.at,
        open: None,
        closed: None,
    })
}

/// What another opening of the store has left of a series.
async fn known(
    connection: &mut SqliteConnection,
    key: i64,
    base: Time,
    name: &str,
) -> Result<Known, StoreError> {
    let rows = sqlx::query(
        "select b.last_step, k.data from blocks b join packs k on k.key = b.pack
         where b.series = ?1 order by b.first_step desc limit 2",
    )
    .bind(key)
    .fetch_all(connection)
    .await?;
    let last_step = |row: Option<&SqliteRow>| row.map(|row| row.try_get("last_step")).transpose();
    let open = match rows.first() {
        Some(row) => Some(unpacked(row, name)?).filter(|points| points.len() < CLOSE),
        None => None,
    };
    let closed = last_step(rows.get(usize::from(open.is_some())))?;
    Ok(Known {
        key,
        base,
        open,
        closed,
    })
}

async fn update_summary(
    connection: &mut SqliteConnection,
    series: i64,
    points: &[Packed],
    growth: i64,
) -> Result<(), sqlx::Error> {
    let Some(last) = points.last() else {
        return Ok(());
    };
    let summary = Summary::of(points);
    sqlx::query(
        "update series
         set last = case when ?2 >= last_step then ?3 else last end,
             last_step = max(last_step, ?2),
             min = min(coalesce(min, ?4), coalesce(?4, min)),
             max = max(coalesce(max, ?5), coalesce(?5, max)),
             points = points + ?6
         where key = ?1",
    )
    .bind(series)
    .bind(last.step)
    .bind(last.value)
    .bind(summary.min)
    .bind(summary.max)
    .bind(growth)
    .execute(connection)
    .await?;
    Ok(())
}

/// Repeats what is known of an attempt's series in the results of the runs that have it, or reuse it.
pub(super) async fn note_results(
    connection: &mut SqliteConnection,
    attempt: AttemptId,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into results (key, position, points, last, min, max)
         select n.key << 32 | v.run, s.position, e.points, e.last, e.min, e.max
         from v_stage_attempts v
         join stages s on s.key = v.stage
         join series e on e.attempt = v.attempt
         join names n on n.name in (e.name, s.name || '/' || e.name)
         where v.attempt = ?1
         on conflict (key) do update
         set position = excluded.position, points = excluded.points, last = excluded.last, min = excluded.min,
             max = excluded.max
         where excluded.position >= results.position",
    )
    .bind(attempt.0)
    .execute(connection)
    .await?;
    Ok(())
}

/// Makes the names known under which the series of a reused attempt are found in another run.
pub(super) async fn name_series(
    connection: &mut SqliteConnection,
    attempt: AttemptId,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert or ignore into names (name)
         select s.name || '/' || e.name
         from v_stage_attempts v join stages s on s.key = v.stage join series e on e.attempt = v.attempt
         where v.attempt = ?1",
    )
    .bind(attempt.0)
    .execute(connection)
    .await?;
    Ok(())
}

/// Packs the rows of the table `points`, which stores of schema 1 have.
pub(super) async fn pack_points(
    transaction: &mut Transaction<'_, Sqlite>,
) -> Result<(), StoreError> {
    let keys: Vec<i64> = sqlx::query_scalar("select key from series order by key")
        .fetch_all(&mut **transaction)
        .await?;
    for series in keys {
        let (mut after, mut points) = (None::<i64>, 0);
        loop {
            let rows: Vec<(i64, Option<f64>, i64)> = sqlx::query_as(
                "select step, value, at from points where series = ?1 and (?2 is null or step > ?2)
                 order by step limit ?3",
            )
            .bind(series)
            .bind(after)
            .bind(CUT as i64)
            .fetch_all(&mut **transaction)
            .await?;
            let packed: Vec<Packed> = rows
                .iter()
                .map(|&(step, value, at)| Packed {
                    step,
                    value: value.unwrap_or(f64::NAN),
                    at,
                })
                .collect();
            let Some(last) = packed.last() else { break };
            (after, points) = (Some(last.step), points + packed.len() as i64);
            insert_block(transaction, series, &packed).await?;
        }
        sqlx::query("update series set points = ?2 where key = ?1")
            .bind(series)
            .bind(points)
            .execute(&mut **transaction)
            .await?;
    }
    Ok(())
}

/// A step as SQLite keeps it.
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
