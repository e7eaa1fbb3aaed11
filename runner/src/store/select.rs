//! From a filter to the runs that match it: names become columns, the rest becomes SQL with bound parameters.
//!
//! The first statement only finds keys, in order: it reads `runs`, which is narrow, and the rows with the requested names in
//! `results` and `params`, which are stored together in the order of runs. The columns of the few matching runs are read
//! afterwards.
//!
//! There are several ways through the runs ([`Way`]). A comparison with an index may leave only few. Otherwise, in an order
//! that an index has, the first runs may already fill the page. Where they do not, all are looked at: if a match requires a
//! certain row, and unless the order is that of their age, the rows with its name are scanned instead of the runs.
//!
//! A comparison with a field that a run lacks is false, and `not` of it is true.

mod field;
mod statement;
mod way;

use serde_json::{Map, Value as Json};
use sqlx::Row;

use super::query::json_at;
use super::{RunFilter, Store, StoreError};
use crate::filter::{Expr, Field, FilterError, Name, Operator, Value};
use statement::Select;
use way::{Way, can_be_first, way_by};

/// Rows of a comparison that are looked at before anything else is tried.
const FEW: u32 = 1000;

/// Rows of a comparison that are looked at rather than all runs.
const SOME: u32 = 10_000;

/// At most this many comparisons of a filter are tried.
const TRIED: usize = 8;

/// The order of runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Sort {
    /// A field.
    pub name: Name,
    /// Whether the greatest comes first.
    pub descending: bool,
}

/// The result of [`Store::find_runs`]: keys in order, each with the values of the requested columns.
pub(super) struct FoundRuns {
    pub(super) keys: Vec<i64>,
    pub(super) values: Vec<Map<String, Json>>,
}

/// The meaning of a field.
#[derive(Debug, Clone, PartialEq)]
enum FieldTarget {
    /// An expression over `r`, a row of `runs`.
    Run(&'static str, Type),
    /// The run's state, which may need correction.
    State,
    /// Any of several values: a table, and its column.
    Any(&'static str, &'static str),
    /// A column of the stage with this name.
    Stage(String, &'static str, Type),
    /// A fact of the environment.
    Environment(String),
    /// A parameter: the key of its name.
    Param(i64),
    /// A series: the key of its name, and a column of `results`.
    Series(i64, &'static str),
}

/// When a run began, which has an index.
const STARTED: FieldTarget = FieldTarget::Run("r.created", Type::Moment);
/// How long ago that was.
const AGE: FieldTarget =
    FieldTarget::Run("unixepoch('subsec') - r.created / 1000.0", Type::Seconds);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Type {
    Text,
    Number,
    Seconds,
    Moment,
    /// Only known per run.
    Any,
}

impl Store {
    /// The keys of the runs that match a filter, in the requested order.
    pub(super) async fn find_runs(&self, filter: &RunFilter) -> Result<FoundRuns, StoreError> {
        let targets = self.targets(filter).await?;
        let mut few = self.few(filter, &targets, FEW).await?;
        if few.is_none() && can_be_first(filter, &targets) {
            let first = self.found(filter, &targets, Way::First).await?;
            if filter
                .limit
                .is_some_and(|limit| first.keys.len() == limit as usize)
            {
                return Ok(first);
            }
        }
        if few.is_none() {
            few = self.few(filter, &targets, SOME).await?;
        }
        self.found(filter, &targets, few.unwrap_or(Way::All)).await
    }

    /// The meanings of a filter's fields.
    async fn targets<'a>(
        &self,
        filter: &'a RunFilter,
    ) -> Result<Vec<(&'a Field, FieldTarget)>, StoreError> {
        let mut targets = Vec::new();
        if let Some(wanted) = &filter.expr {
            let in_text = |error: FilterError| error.in_text(&wanted.text);
            for field in fields(&wanted.expr) {
                targets.push((field, self.target(field, &in_text).await?));
            }
        }
        for name in filter
            .sort
            .iter()
            .map(|sort| &sort.name)
            .chain(&filter.columns)
        {
            let in_text = |error: FilterError| error.in_text(&name.text);
            targets.push((&name.field, self.target(&name.field, &in_text).await?));
        }
        Ok(targets)
    }

    /// The way through the rows of a comparison that a run must pass, if it has an index and fewer than `most` rows pass.
    async fn few(
        &self,
        filter: &RunFilter,
        targets: &[(&Field, FieldTarget)],
        most: u32,
    ) -> Result<Option<Way>, StoreError> {
        let mut least = (i64::from(most), None);
        if let Some(recipe) = &filter.recipe {
            let sql = "select count(*) from (select 1 from runs r where r.recipe = ?1 limit ?2)";
            let count: i64 = sqlx::query_scalar(sql)
                .bind(recipe)
                .bind(least.0)
                .fetch_one(self.pool())
                .await?;
            if count < least.0 {
                least = (count, Some(Way::Runs));
            }
        }
        let Some(wanted) = &filter.expr else {
            return Ok(least.1);
        };
        let tried = required(&wanted.expr).into_iter().enumerate();
        let tried = tried.filter_map(|(number, (field, operator, value))| {
            let (_, target) = targets.iter().find(|(known, _)| *known == field)?;
            let way = way_by(number, target, operator, value)?;
            Some((way, target, operator, value))
        });
        let tried: Vec<_> = tried.take(TRIED).collect();
        for (way, target, operator, value) in tried {
            let mut select = Select::new("select count(*) from (select 1", String::new());
            select
                .passing(target, operator, value)
                .map_err(|error| StoreError::Filter(Box::new(error.in_text(&wanted.text))))?;
            select.sql.push(" limit ").push_bind(least.0).push(")");
            let count: i64 = select
                .sql
                .build_query_scalar()
                .fetch_one(self.pool())
                .await?;
            if count < least.0 {
                least = (count, Some(way));
            }
        }
        Ok(least.1)
    }

    /// The runs found in one way.
    async fn found(
        &self,
        filter: &RunFilter,
        targets: &[(&Field, FieldTarget)],
        way: Way,
    ) -> Result<FoundRuns, StoreError> {
        let mut select = Select::new("select r.key", self.unrecorded_states());
        select.build(filter, targets, way)?;
        let rows = select.sql.build().fetch_all(self.pool()).await?;
        let mut found = FoundRuns {
            keys: Vec::with_capacity(rows.len()),
            values: Vec::with_capacity(rows.len()),
        };
        for row in &rows {
            found.keys.push(row.try_get(0)?);
            let mut values = Map::new();
            for (place, column) in (1..).zip(&filter.columns) {
                values.insert(column.text.clone(), json_at(row, place)?);
            }
            found.values.push(values);
        }
        Ok(found)
    }

    /// The number of runs that match a filter.
    ///
    /// # Errors
    /// As [`Store::list_runs`].
    pub async fn count_matching(&self, filter: &RunFilter) -> Result<u64, StoreError> {
        if filter.expr.is_none() && filter.states.is_empty() && filter.recipe.is_none() {
            return self.count_runs().await;
        }
        // Neither order nor columns matter.
        let filter = RunFilter {
            sort: Vec::new(),
            columns: Vec::new(),
            limit: None,
            skip: 0,
            ..filter.clone()
        };
        let targets = self.targets(&filter).await?;
        let way = self.few(&filter, &targets, SOME).await?;
        let mut select = Select::new("select count(*)", self.unrecorded_states());
        select.build(&filter, &targets, way.unwrap_or(Way::All))?;
        let count: i64 = select
            .sql
            .build_query_scalar()
            .fetch_one(self.pool())
            .await?;
        Ok(count.cast_unsigned())
    }
}

/// Every field of a filter.
fn fields(expr: &Expr) -> Vec<&Field> {
    match expr {
        Expr::And(parts) | Expr::Or(parts) => parts.iter().flat_map(fields).collect(),
        Expr::Not(part) => fields(part),
        Expr::Has(field) | Expr::Compare(field, ..) | Expr::In(field, _) => vec![field],
    }
}

/// The comparisons without which a run cannot match.
fn required(expr: &Expr) -> Vec<(&Field, Operator, &Value)> {
    match expr {
        Expr::And(parts) => parts.iter().flat_map(required).collect(),
        Expr::Compare(field, operator, value) => vec![(field, *operator, value)],
        _ => Vec::new(),
    }
}

/// The fields without which a run cannot match.
fn needed(expr: &Expr) -> Vec<&Field> {
    match expr {
        Expr::And(parts) => parts.iter().flat_map(needed).collect(),
        Expr::Has(field) | Expr::Compare(field, ..) | Expr::In(field, _) => vec![field],
        Expr::Or(_) | Expr::Not(_) => Vec::new(),
    }
}
