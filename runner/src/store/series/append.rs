//! Packs points into blocks, while a stage runs and when a store with an older schema is opened.

use std::collections::{BTreeSet, HashMap};

use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{QueryBuilder, Row, Sqlite, Transaction};

use super::{Batch, MetricPoint, clamped, unpacked};
use crate::store::block::{self, BlockPoint, Summary};
use crate::store::connection::{ROWS_AT_ONCE, run_once};
use crate::store::time::Time;
use crate::store::{AttemptId, Store, StoreError};

/// The most points of a block.
const CUT: usize = 4096;

/// A block with this many points is closed: it is not packed again with the next ones.
const CLOSE: usize = 1024;

/// So many neighbouring blocks make a span. The migration that made the first ones has the same number.
const SPAN: usize = 64;

/// What [`Store::record`] remembers of a series.
#[derive(Debug)]
pub(in crate::store) struct OpenSeries {
    key: i64,
    base: Time,
    /// The last block, while it is open.
    open: Option<Vec<BlockPoint>>,
    /// The last step of the blocks before it.
    closed: Option<i64>,
    /// About how many of these come after the last span.
    loose: usize,
}

impl Store {
    pub(in crate::store) fn lock_series(
        &self,
    ) -> std::sync::MutexGuard<'_, HashMap<AttemptId, HashMap<String, OpenSeries>>> {
        self.series
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Appends points of any number of series to an attempt. `known` is what is remembered of its series; returns what to remember
/// afterwards.
pub(in crate::store) async fn append_points(
    write: &mut SqliteConnection,
    attempt: AttemptId,
    mut known: HashMap<String, OpenSeries>,
    batches: &[Batch],
) -> Result<HashMap<String, OpenSeries>, StoreError> {
    let mut changes = Changes::default();
    let mut grown = BTreeSet::new();
    for batch in batches.iter().filter(|batch| !batch.points.is_empty()) {
        if !known.contains_key(&batch.series) {
            let found = find_or_insert(write, attempt, batch).await?;
            known.insert(batch.series.clone(), found);
        }
        let Some(series) = known.get_mut(&batch.series) else {
            continue;
        };
        // What is read of a series must be in the database, where the series grows by one row at a time.
        if !grown.insert(series.key) || changes.blocks.len() >= ROWS_AT_ONCE {
            changes.write(write).await?;
        }
        let points = in_order(&batch.points, series.base);
        let growth = append(write, series, &points, &mut changes).await?;
        changes.grow(series.key, &points, growth);
    }
    changes.write(write).await?;
    for series in known.values_mut().filter(|series| series.loose > SPAN) {
        make_spans(write, series.key).await?;
        series.loose %= SPAN;
    }
    note_new_results(write, &grown).await?;
    Ok(known)
}

/// Rows of many series that are written together: a statement for a thousand rows costs little more than one for a single row.
#[derive(Default)]
struct Changes {
    /// Open blocks that are replaced: series and first step.
    replaced: Vec<(i64, i64)>,
    blocks: Vec<(i64, Summary, Vec<u8>)>,
    growth: Vec<Growth>,
}

/// The change of a series by new points.
struct Growth {
    series: i64,
    last: BlockPoint,
    min: Option<f64>,
    max: Option<f64>,
    points: i64,
}

impl Changes {
    fn insert(&mut self, series: i64, points: &[BlockPoint]) {
        self.blocks
            .push((series, Summary::of(points), block::pack(points)));
    }

    fn grow(&mut self, series: i64, points: &[BlockPoint], growth: i64) {
        let summary = Summary::of(points);
        self.growth.extend(points.last().map(|&last| Growth {
            series,
            last,
            min: summary.min,
            max: summary.max,
            points: growth,
        }));
    }

    /// Writes everything. It is empty afterwards.
    async fn write(&mut self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        for replaced in std::mem::take(&mut self.replaced).chunks(ROWS_AT_ONCE) {
            let mut delete =
                QueryBuilder::<Sqlite>::new("delete from blocks where (series, first_step) in (");
            delete.push_values(replaced, |mut row, &(series, first_step)| {
                row.push_bind(series).push_bind(first_step);
            });
            delete.push(")");
            run_once(delete, connection).await?;
        }
        for blocks in std::mem::take(&mut self.blocks).chunks(ROWS_AT_ONCE) {
            insert_blocks(connection, blocks).await?;
        }
        for growth in std::mem::take(&mut self.growth).chunks(ROWS_AT_ONCE) {
            let mut update = QueryBuilder::<Sqlite>::new(
                "with added (series, step, value, min, max, points) as (",
            );
            update.push_values(growth, |mut row, growth| {
                row.push_bind(growth.series)
                    .push_bind(growth.last.step)
                    .push_bind(growth.last.value)
                    .push_bind(growth.min)
                    .push_bind(growth.max)
                    .push_bind(growth.points);
            });
            update.push(
                ")
                 update series
                 set last = case when added.step >= last_step then added.value else last end,
                     last_step = max(last_step, added.step),
                     min = min(coalesce(series.min, added.min), coalesce(added.min, series.min)),
                     max = max(coalesce(series.max, added.max), coalesce(added.max, series.max)),
                     points = series.points + added.points
                 from added where series.key = added.series",
            );
            run_once(update, connection).await?;
        }
        Ok(())
    }
}

async fn insert_blocks(
    connection: &mut SqliteConnection,
    blocks: &[(i64, Summary, Vec<u8>)],
) -> Result<(), sqlx::Error> {
    let last: i64 = sqlx::query_scalar("select coalesce(max(key), 0) from packs")
        .fetch_one(&mut *connection)
        .await?;
    let keyed = || (last + 1..).zip(blocks);
    let mut packs = QueryBuilder::<Sqlite>::new("insert into packs (key, data) ");
    packs.push_values(keyed(), |mut row, (key, (_, _, data))| {
        row.push_bind(key).push_bind(data.as_slice());
    });
    run_once(packs, connection).await?;
    let mut insert = QueryBuilder::<Sqlite>::new(
        "insert into blocks
         (series, first_step, last_step, points, numbers, sum, min, max, first_at, last_at, pack) ",
    );
    insert.push_values(keyed(), |mut row, (key, (series, summary, _))| {
        row.push_bind(*series)
            .push_bind(summary.first_step)
            .push_bind(summary.last_step)
            .push_bind(summary.points)
            .push_bind(summary.numbers)
            .push_bind(summary.sum)
            .push_bind(summary.min)
            .push_bind(summary.max)
            .push_bind(summary.first_at)
            .push_bind(summary.last_at)
            .push_bind(key);
    });
    run_once(insert, connection).await
}

/// Points by step; of several at the same step, the last.
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

/// Keeps only the last of several neighbours at the same step.
fn keep_last(points: &mut Vec<BlockPoint>) {
    points.reverse();
    points.dedup_by_key(|point| point.step);
    points.reverse();
}

/// Merges old points with new ones, which replace those at the same step.
fn merged(mut old: Vec<BlockPoint>, new: &[BlockPoint]) -> Vec<BlockPoint> {
    let in_order = match (old.last(), new.first()) {
        (Some(last), Some(first)) => last.step < first.step,
        _ => true,
    };
    old.extend_from_slice(new);
    if !in_order {
        // The sort is stable, so at one step the old point comes before the new one.
        old.sort_by_key(|point| point.step);
        keep_last(&mut old);
    }
    old
}

/// Packs points into the blocks of a series. Returns the number of added points.
async fn append(
    connection: &mut SqliteConnection,
    series: &mut OpenSeries,
    new: &[BlockPoint],
    changes: &mut Changes,
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
            let first = open.first().map(|first| (series.key, first.step));
            changes.replaced.extend(first);
            (open, false)
        }
    };
    let before = old.len();
    let points = merged(old, new);
    let growth = points.len() - before;
    let mut rest = points.as_slice();
    while rest.len() > CUT || (late && !rest.is_empty()) {
        let (piece, after) = rest.split_at(rest.len().min(CUT));
        changes.insert(series.key, piece);
        series.loose += 1;
        series.closed = series.closed.max(piece.last().map(|point| point.step));
        rest = after;
    }
    if !rest.is_empty() {
        changes.insert(series.key, rest);
        if rest.len() < CLOSE {
            series.open = Some(rest.to_vec());
        } else {
            series.loose += 1;
            series.closed = rest.last().map(|point| point.step);
        }
    }
    Ok(growth as i64)
}

/// Removes the blocks that overlap a range of steps, and returns their points.
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
        loose: 0,
    })
}

/// The state of a series that another process has left.
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
    .fetch_all(&mut *connection)
    .await?;
    let loose: i64 = sqlx::query_scalar(
        "select count(*) from blocks
         where series = ?1
           and first_step > coalesce((select last_step from spans where series = ?1 order by first_step desc limit 1), -1)",
    )
    .bind(key)
    .fetch_one(connection)
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
        loose: usize::try_from(loose).unwrap_or(0),
    })
}

/// Sums up the blocks after a series' last span, so far as they make whole spans. The last block is left out: it may grow.
pub(in crate::store) async fn make_spans(
    connection: &mut SqliteConnection,
    series: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into spans (series, first_step, last_step, points, numbers, sum, min, max, first_at, last_at)
         select ?1, min(first_step), max(last_step), sum(points), sum(numbers),
                case when count(sum) = count(*) then sum(sum) end, min(min), max(max), min(first_at), max(last_at)
         from (select *, (row_number() over (order by first_step) - 1) / ?2 as part from blocks
               where series = ?1
                 and first_step > coalesce((select last_step from spans where series = ?1 order by first_step desc limit 1), -1)
                 and first_step < (select max(first_step) from blocks where series = ?1))
         group by part having count(*) = ?2",
    )
    .bind(series)
    .bind(SPAN as i64)
    .execute(connection)
    .await?;
    Ok(())
}

/// Copies the summaries of an attempt's series to the results of the runs that made or reuse it.
pub(in crate::store) async fn note_results(
    connection: &mut SqliteConnection,
    attempt: AttemptId,
) -> Result<(), sqlx::Error> {
    let mut statement = QueryBuilder::new(NOTE_RESULTS);
    statement.push(" where e.attempt = ").push_bind(attempt.0);
    statement.push(REPLACE_RESULTS);
    run_once(statement, connection).await
}

/// The same for some of the series, at a cost independent of how many others the attempt has.
async fn note_new_results(
    connection: &mut SqliteConnection,
    series: &BTreeSet<i64>,
) -> Result<(), sqlx::Error> {
    let series: Vec<i64> = series.iter().copied().collect();
    for series in series.chunks(ROWS_AT_ONCE) {
        let mut statement = QueryBuilder::new(NOTE_RESULTS);
        statement.push(" where e.key in (");
        let mut keys = statement.separated(", ");
        for &key in series {
            keys.push_bind(key);
        }
        statement.push(")").push(REPLACE_RESULTS);
        run_once(statement, connection).await?;
    }
    Ok(())
}

const NOTE_RESULTS: &str = "insert into results (key, position, points, last, min, max)
    select n.key << 32 | v.run, s.position, e.points, e.last, e.min, e.max
    from series e
    join v_stage_attempts v on v.attempt = e.attempt
    join stages s on s.key = v.stage
    join names n on n.name in (e.name, s.name || '/' || e.name)";
const REPLACE_RESULTS: &str = " on conflict (key) do update
    set position = excluded.position, points = excluded.points, last = excluded.last, min = excluded.min,
        max = excluded.max
    where excluded.position >= results.position";

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

/// Packs the rows of the table `points` of schema 1.
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
            let mut changes = Changes::default();
            changes.insert(series, &packed);
            changes.write(transaction).await?;
        }
        sqlx::query("update series set points = ?2 where key = ?1")
            .bind(series)
            .bind(points)
            .execute(&mut **transaction)
            .await?;
    }
    Ok(())
}
