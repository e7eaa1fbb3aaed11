//! Points into blocks, while a stage runs and when a store of an older schema is opened.

use std::collections::HashMap;

use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{Row, Sqlite, Transaction};

use super::{Batch, MetricPoint, clamped, unpacked};
use crate::store::block::{self, BlockPoint, Summary};
use crate::store::time::Time;
use crate::store::{AttemptId, Store, StoreError};

/// Most points of a block.
const CUT: usize = 4096;

/// A block with so many points is not packed again with the next ones.
const CLOSE: usize = 1024;

/// What [`Store::append_metrics`] remembers of a series.
#[derive(Debug)]
pub(in crate::store) struct OpenSeries {
    key: i64,
    base: Time,
    /// The last block, while it is open.
    open: Option<Vec<BlockPoint>>,
    /// The last step of the blocks before it.
    closed: Option<i64>,
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

    pub(in crate::store) fn lock_series(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<AttemptId, HashMap<String, OpenSeries>>> {
        self.series
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Points by step, each step once: the one given last.
fn in_order(points: &[MetricPoint], base: Time) -> Vec<BlockPoint> {
    let mut packed: Vec<BlockPoint> = points
        .iter()
        .map(|point| BlockPoint {
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
fn keep_last(points: &mut Vec<BlockPoint>) {
    points.reverse();
    points.dedup_by_key(|point| point.step);
    points.reverse();
}

/// Old points with new ones, which replace those at the same step.
fn merged(mut old: Vec<BlockPoint>, new: &[BlockPoint]) -> Vec<BlockPoint> {
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
    series: &mut OpenSeries,
    new: &[BlockPoint],
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
) -> Result<Vec<BlockPoint>, StoreError> {
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
    points: &[BlockPoint],
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
) -> Result<OpenSeries, StoreError> {
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
    Ok(OpenSeries {
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
) -> Result<OpenSeries, StoreError> {
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
    Ok(OpenSeries {
        key,
        base,
        open,
        closed,
    })
}

async fn update_summary(
    connection: &mut SqliteConnection,
    series: i64,
    points: &[BlockPoint],
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
pub(in crate::store) async fn note_results(
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
pub(in crate::store) async fn name_series(
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
pub(in crate::store) async fn pack_points(
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
            let packed: Vec<BlockPoint> = rows
                .iter()
                .map(|&(step, value, at)| BlockPoint {
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
