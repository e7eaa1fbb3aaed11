//! A series as a curve: few buckets for any number of points.

use std::collections::BTreeMap;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{Axis, Bucket, CurveQuery, NamedSeries, clamped, unpacked};
use crate::store::block::{BlockPoint, Summary};
use crate::store::time::Time;
use crate::store::{RunId, Store, StoreError};

/// Up to this many blocks, a curve unpacks all of them.
const FEW: i64 = 128;

/// The parts of a series (?1) that begin from step ?2 to step ?3: if ?5, the spans that lie between the steps ?4 and ?3, and
/// otherwise the blocks.
const PARTS: &str = "with whole as materialized (
         select * from spans where series = ?1 and first_step between ?4 and ?3 and last_step <= ?3 and ?5),
     gaps(first, last) as (
         select last_step + 1, coalesce(lead(first_step) over (order by first_step) - 1, ?3) from whole
         union all
         select ?2, coalesce((select min(first_step) - 1 from whole), ?3)),
     parts as (
         select first_step, last_step, points, numbers, sum, min, max, first_at, last_at from whole
         union all
         select b.first_step, b.last_step, b.points, b.numbers, b.sum, b.min, b.max, b.first_at, b.last_at
         from gaps g cross join blocks b on b.series = ?1 and b.first_step between g.first and g.last)";

impl Store {
    /// A series of a run as a curve: at most `query.buckets` buckets for each stage that has it, in order.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn curve(
        &self,
        run: &RunId,
        name: &str,
        query: CurveQuery,
    ) -> Result<Vec<Bucket>, StoreError> {
        let mut buckets = Vec::new();
        for named in self.series_named(run, name).await? {
            let summaries = self.buckets(&named, query).await?;
            buckets.extend(summaries.iter().map(|summary| bucket(&named, summary)));
        }
        Ok(buckets)
    }

    async fn buckets(
        &self,
        named: &NamedSeries,
        query: CurveQuery,
    ) -> Result<Vec<Summary>, StoreError> {
        let (from, to) = (clamped(query.from), clamped(query.to));
        // Whole blocks, or spans, give at least half the requested buckets; otherwise there are only few blocks.
        let few = i64::from(query.buckets).min(FEW.max(i64::from(query.buckets) / 2));
        let begin = self.block_of(named, from).await?;
        // Blocks do not overlap: their positions give the first and the last, and only the blocks in between are counted.
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
        let (first, last): (i64, i64) = match query.axis {
            Axis::Step => {
                let (first, last): (i64, i64) =
                    (extent.try_get("first_step")?, extent.try_get("last_step")?);
                (first.max(from), last.min(to))
            }
            Axis::Time => {
                let extent = format!(
                    "{PARTS} select min(first_at), max(last_at) from parts where last_step >= ?4"
                );
                sqlx::query_as(sqlx::AssertSqlSafe(extent))
                    .bind(named.key)
                    .bind(begin)
                    .bind(to)
                    .bind(from)
                    .bind(true)
                    .fetch_one(self.pool())
                    .await?
            }
        };
        let mut grid = Grid::new(query, first, last);
        if blocks < few {
            for row in &self.packs(named, from, to).await? {
                let mut points = unpacked(row, &named.series)?;
                points.retain(|point| (from..=to).contains(&point.step));
                grid.add(&points);
            }
        } else {
            let spans: i64 = sqlx::query_scalar(
                "select count(*) from (
                     select 1 from spans
                     where series = ?1 and first_step between ?2 and ?3 and last_step <= ?3 limit ?4)",
            )
            .bind(named.key)
            .bind(from)
            .bind(to)
            .bind(few)
            .fetch_one(self.pool())
            .await?;
            self.sum_up(named, (from, to), spans >= few, &mut grid)
                .await?;
        }
        Ok(grid.buckets.into_values().collect())
    }

    /// The first step of the block that contains a step, or would contain it.
    async fn block_of(&self, named: &NamedSeries, step: i64) -> Result<i64, StoreError> {
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

    /// With many more points than buckets, whole blocks are used, except for those that a range of steps cuts. With many more
    /// blocks than buckets, spans stand for them.
    async fn sum_up(
        &self,
        named: &NamedSeries,
        (from, to): (i64, i64),
        by_spans: bool,
        grid: &mut Grid,
    ) -> Result<(), StoreError> {
        let place = match grid.axis {
            Axis::Step => "first_step",
            Axis::Time => "first_at",
        };
        let whole = format!(
            "{PARTS}
             select min(first_step) as first_step, max(last_step) as last_step, sum(points) as points,
                    sum(numbers) as numbers, case when count(sum) = count(*) then sum(sum) end as sum,
                    min(min) as min, max(max) as max, min(first_at) as first_at, max(last_at) as last_at,
                    min({place}) as place
             from parts where first_step >= ?4 and last_step <= ?3
             group by cast(({place} - ?6) * ?7 as integer)"
        );
        let rows = sqlx::query(sqlx::AssertSqlSafe(whole))
            .bind(named.key)
            .bind(from)
            .bind(to)
            .bind(from)
            .bind(by_spans)
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
}

/// Buckets of equal width between two positions, filled from points and from summaries.
struct Grid {
    axis: Axis,
    first: i64,
    /// Buckets per unit of the axis.
    scale: f64,
    buckets: BTreeMap<i64, Summary>,
}

impl Grid {
    fn new(query: CurveQuery, first: i64, last: i64) -> Self {
        // A little wider than the range, so that its last point falls into the last bucket.
        let width = (last as f64 - first as f64 + 1.0).max(1.0);
        Self {
            axis: query.axis,
            first,
            scale: f64::from(query.buckets) / width,
            buckets: BTreeMap::new(),
        }
    }

    /// Adds points in order: neighbours in the same bucket are combined first, so that the bucket is looked up once.
    fn add(&mut self, points: &[BlockPoint]) {
        let mut rest = points;
        while let Some(first) = rest.first() {
            let (place, count) = match self.axis {
                // Steps ascend, so the end of a bucket is searched for instead of tested at every point.
                Axis::Step => {
                    let index = self.index(first.step);
                    let inside = |point: &BlockPoint| self.index(point.step) == index;
                    (first.step, rest.partition_point(inside))
                }
                Axis::Time => {
                    let index = self.index(first.at);
                    let inside = |point: &&BlockPoint| self.index(point.at) == index;
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

fn bucket(named: &NamedSeries, summary: &Summary) -> Bucket {
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
