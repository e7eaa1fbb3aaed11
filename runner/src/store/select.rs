//! From a filter to the runs that pass it: names become columns, the rest becomes SQL with bound parameters.
//!
//! The first statement only finds keys, in order: it reads `runs`, which is narrow, and the rows of the names asked for
//! in `results` and `params`, which lie together in the order of runs. What is shown of the few runs found is read
//! afterwards. Where runs are ordered by something else than their age, and cannot pass without a certain row, the rows
//! of its name are gone through instead of the runs; by age, an index gives the runs in order, and the first that pass
//! are enough.
//!
//! A comparison with something that a run does not have is false, and `not` of it true.

use serde_json::{Map, Value as Json};
use sqlx::{QueryBuilder, Row, Sqlite};

use super::query::json_at;
use super::time::Time;
use super::{RunFilter, RunState, Store, StoreError};
use crate::filter::{Expr, Field, FilterError, Name, Operator, Value};

/// Fields of a run itself, as the help lists them.
const FIELDS: [&str; 20] = [
    "id", "state", "recipe", "path", "started", "finished", "seconds", "age", "seed", "error",
    "note", "tag", "stage", "kind", "plugin", "device", "stages", "reused", "sweep", "point",
];

/// What [`Store::find_runs`] found: keys in order, each with the values of the columns asked for.
pub(super) struct Found {
    pub(super) keys: Vec<i64>,
    pub(super) values: Vec<Map<String, Json>>,
}

/// What a field means.
#[derive(Debug, Clone, PartialEq)]
enum Target {
    /// An expression over `r`, a row of `runs`.
    Run(&'static str, Type),
    /// The run's state, which may have to be corrected.
    State,
    /// Any of several values: a table, and its column.
    Any(&'static str, &'static str),
    /// A column of a stage of this name.
    Stage(String, &'static str, Type),
    /// A fact of the environment.
    Environment(String),
    /// A parameter: key of its name.
    Param(i64),
    /// A series: key of its name, and a column of `results`.
    Series(i64, &'static str),
}

/// When a run began, by which there is an index.
const STARTED: Target = Target::Run("r.created", Type::Moment);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Type {
    Text,
    Number,
    Seconds,
    Moment,
    /// Known for each run only.
    Any,
}

/// A statement being made.
struct Select {
    sql: QueryBuilder<Sqlite>,
    /// Rows of `results` and `params` that are joined: by these names.
    joins: Vec<Target>,
    lost: String,
}

impl Store {
    /// The keys of the runs that pass a filter, in the order asked for.
    pub(super) async fn find_runs(&self, filter: &RunFilter) -> Result<Found, StoreError> {
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
        let mut select = Select {
            sql: QueryBuilder::new("select r.key"),
            joins: Vec::new(),
            lost: self.unrecorded_lost(),
        };
        select.build(filter, &targets)?;
        let rows = select.sql.build().fetch_all(self.pool()).await?;
        let mut found = Found {
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

    /// How many runs pass a filter.
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
        let mut targets = Vec::new();
        if let Some(wanted) = &filter.expr {
            let in_text = |error: FilterError| error.in_text(&wanted.text);
            for field in fields(&wanted.expr) {
                targets.push((field, self.target(field, &in_text).await?));
            }
        }
        let mut select = Select {
            sql: QueryBuilder::new("select count(*)"),
            joins: Vec::new(),
            lost: self.unrecorded_lost(),
        };
        select.build(&filter, &targets)?;
        let count: i64 = select
            .sql
            .build_query_scalar()
            .fetch_one(self.pool())
            .await?;
        Ok(count.cast_unsigned())
    }

    /// What a field means in this store.
    async fn target(
        &self,
        field: &Field,
        in_text: &(dyn Fn(FilterError) -> FilterError + Sync),
    ) -> Result<Target, StoreError> {
        let parts: Vec<&str> = field.parts.iter().map(String::as_str).collect();
        let error = |error: FilterError| StoreError::Filter(Box::new(in_text(error)));
        Ok(match parts.as_slice() {
            [name] => match own(name) {
                Some(target) => target,
                None => return Err(error(unknown(field, name, &FIELDS, "field"))),
            },
            ["params" | "param", path @ ..] => {
                let names = self.names_in("params").await?;
                let key = find_name(field, &path.join("."), "stages.", &names).map_err(|near| {
                    error(nothing(
                        field,
                        "no run has a parameter",
                        &path.join("."),
                        near,
                    ))
                })?;
                Target::Param(key)
            }
            ["metrics" | "metric", path @ ..] => {
                let (path, column) = match path {
                    [path @ .., "last"] if !path.is_empty() => (path, "last"),
                    [path @ .., "min"] if !path.is_empty() => (path, "min"),
                    [path @ .., "max"] if !path.is_empty() => (path, "max"),
                    [path @ .., "points"] if !path.is_empty() => (path, "points"),
                    path => (path, "last"),
                };
                let names = self.names_in("results").await?;
                let key = find_name(field, &path.join("."), "", &names).map_err(|near| {
                    error(nothing(field, "no run has a metric", &path.join("."), near))
                })?;
                Target::Series(key, column)
            }
            ["env" | "environment", name @ ..] => Target::Environment(name.join(".")),
            ["stage" | "stages", name @ .., column] if !name.is_empty() => {
                let columns = ["state", "seconds", "kind", "plugin", "device"];
                let Some(place) = columns.iter().position(|known| known == column) else {
                    return Err(error(unknown(field, column, &columns, "column of a stage")));
                };
                let kind = if columns[place] == "seconds" {
                    Type::Seconds
                } else {
                    Type::Text
                };
                Target::Stage(name.join("."), columns[place], kind)
            }
            [first, ..] => {
                let families = ["params", "metrics", "stage", "env"];
                return Err(error(unknown(field, first, &families, "group of fields")));
            }
            [] => {
                return Err(error(FilterError::new(
                    "expected a field",
                    field.at.clone(),
                )));
            }
        })
    }

    /// The names that rows of a table have, with their keys.
    async fn names_in(&self, table: &'static str) -> Result<Vec<(i64, String)>, StoreError> {
        let names = match table {
            "params" => {
                "select key, name from names n
                 where exists (select 1 from params where key between n.key << 32 and n.key << 32 | 0xffffffff)"
            }
            _ => {
                "select key, name from names n
                 where exists (select 1 from results where key between n.key << 32 and n.key << 32 | 0xffffffff)"
            }
        };
        Ok(sqlx::query_as(names).fetch_all(self.pool()).await?)
    }
}

impl Select {
    fn build(
        &mut self,
        filter: &RunFilter,
        targets: &[(&Field, Target)],
    ) -> Result<(), StoreError> {
        for (_, target) in targets {
            let row = row_of(target);
            if let Some(row) = row
                && !self.joins.contains(&row)
            {
                self.joins.push(row);
            }
        }
        let of = |field: &Field| -> Target {
            // Every field was looked up before.
            let found = targets.iter().find(|(known, _)| *known == field);
            found.map_or(Target::State, |(_, target)| target.clone())
        };
        for column in &filter.columns {
            self.sql.push(", ");
            self.shown(&of(&column.field));
        }
        let needed: Vec<Target> = filter
            .expr
            .iter()
            .flat_map(|wanted| needed(&wanted.expr))
            .filter_map(|field| row_of(&of(field)))
            .collect();
        let leader = match filter.sort.first() {
            Some(sort) if of(&sort.name.field) != STARTED => {
                let leads = |join: &Target| needed.contains(join);
                self.joins.iter().position(leads)
            }
            _ => None,
        };
        self.tables(leader, &needed);
        if !filter.states.is_empty() {
            self.sql.push(" and ");
            self.scalar(&Target::State);
            let states = serde_json::json!(filter.states).to_string();
            self.sql.push(" in (select value from json_each(");
            self.sql.push_bind(states);
            self.sql.push("))");
        }
        if let Some(recipe) = &filter.recipe {
            self.sql.push(" and r.recipe = ");
            self.sql.push_bind(recipe.clone());
        }
        if let Some(wanted) = &filter.expr {
            self.sql.push(" and ");
            self.condition(&wanted.expr, &of, false)
                .map_err(|error| StoreError::Filter(Box::new(error.in_text(&wanted.text))))?;
        }
        let limit = filter.limit.map_or(-1, i64::from);
        self.sql.push(" order by ");
        for sort in &filter.sort {
            let target = of(&sort.name.field);
            if matches!(target, Target::Any(..)) {
                let error = FilterError::new(
                    "a run may have several of these",
                    sort.name.field.at.clone(),
                );
                return Err(StoreError::Filter(Box::new(error.in_text(&sort.name.text))));
            }
            let direction = if sort.descending { " desc" } else { "" };
            if target == STARTED {
                // Just as the index has it, and no two runs are alike: nothing more is needed.
                self.sql.push(format_args!(
                    "r.created{direction}, r.key{direction} limit "
                ));
                self.sql.push_bind(limit);
                self.sql.push(" offset ");
                self.sql.push_bind(filter.skip);
                return Ok(());
            }
            self.scalar(&target);
            self.sql.push(direction);
            self.sql.push(" nulls last, ");
        }
        self.sql.push("r.key desc limit ");
        self.sql.push_bind(limit);
        self.sql.push(" offset ");
        self.sql.push_bind(filter.skip);
        Ok(())
    }

    /// `runs r` and the rows joined to it, up to `where` and what the first table needs there.
    fn tables(&mut self, leader: Option<usize>, needed: &[Target]) {
        let joins: Vec<(usize, &'static str, i64, bool)> = self
            .joins
            .iter()
            .enumerate()
            .filter_map(|(number, join)| {
                let (table, name) = match join {
                    Target::Param(name) => ("params", *name),
                    Target::Series(name, _) => ("results", *name),
                    _ => return None,
                };
                // A run without the row cannot pass: nothing is to be made up for it.
                Some((number, table, name << 32, needed.contains(join)))
            })
            .collect();
        match leader {
            Some(number) => {
                let (_, table, ..) = joins[number];
                // A cross join is made in the order in which it is written.
                self.sql.push(format_args!(
                    " from {table} j{number} cross join runs r on r.key = j{number}.key & 0xffffffff"
                ));
            }
            None => {
                self.sql.push(" from runs r");
            }
        }
        for (number, table, first, needed) in &joins {
            if Some(*number) != leader {
                let join = if *needed { "cross join" } else { "left join" };
                self.sql.push(format_args!(
                    " {join} {table} j{number} on j{number}.key = "
                ));
                self.sql.push_bind(*first);
                self.sql.push(" + r.key");
            }
        }
        self.sql.push(" where true");
        if let Some(number) = leader {
            let (_, _, first, _) = joins[number];
            self.sql.push(format_args!(" and j{number}.key between "));
            self.sql.push_bind(first);
            self.sql.push(" and ");
            self.sql.push_bind(first | 0xffff_ffff);
        }
    }

    fn condition(
        &mut self,
        expr: &Expr,
        of: &dyn Fn(&Field) -> Target,
        negated: bool,
    ) -> Result<(), FilterError> {
        match expr {
            Expr::And(parts) | Expr::Or(parts) => {
                let word = if matches!(expr, Expr::And(_)) {
                    " and "
                } else {
                    " or "
                };
                self.sql.push("(");
                for (number, part) in parts.iter().enumerate() {
                    self.sql.push(if number > 0 { word } else { "" });
                    self.condition(part, of, negated)?;
                }
                self.sql.push(")");
            }
            Expr::Not(part) => {
                self.sql.push("not (");
                self.condition(part, of, true)?;
                self.sql.push(")");
            }
            Expr::Has(field) => self.has(&of(field)),
            Expr::Compare(field, operator, value) => {
                // Unknown is false, which matters where it is turned round.
                self.sql.push(if negated { "ifnull((" } else { "(" });
                self.compare(&of(field), *operator, value)?;
                self.sql.push(if negated { "), false)" } else { ")" });
            }
            Expr::In(field, values) => {
                self.sql.push("(");
                for (number, value) in values.iter().enumerate() {
                    self.sql
                        .push(if number > 0 { " or ifnull(" } else { "ifnull(" });
                    self.compare(&of(field), Operator::Equal, value)?;
                    self.sql.push(", false)");
                }
                self.sql.push(")");
            }
        }
        Ok(())
    }

    fn has(&mut self, target: &Target) {
        match target {
            Target::Any(table, _) => {
                self.sql.push(format_args!(
                    "exists (select 1 from {table} x where x.run = r.key)"
                ));
            }
            Target::Param(_) | Target::Series(..) => {
                let join = self.join(target);
                self.sql.push(format_args!("{join}.key is not null"));
            }
            target => {
                self.sql.push("ifnull(");
                self.scalar(target);
                self.sql.push(", '') != ''");
            }
        }
    }

    fn compare(
        &mut self,
        target: &Target,
        operator: Operator,
        value: &Value,
    ) -> Result<(), FilterError> {
        if let Target::Any(table, column) = target {
            return self.compare_any(table, column, operator, value);
        }
        let kind = type_of(target);
        if matches!(operator, Operator::Like | Operator::Unlike) {
            self.scalar(target);
            let not = if operator == Operator::Unlike {
                " not"
            } else {
                ""
            };
            self.sql.push(format_args!("{not} like "));
            self.sql.push_bind(pattern(&value.text));
            self.sql.push(" escape '\\'");
            return Ok(());
        }
        let number = match kind {
            Type::Text => None,
            Type::Number => Some(value.number().ok_or_else(|| expected("a number", value))?),
            Type::Seconds => Some(seconds(value)?),
            Type::Moment => Some(moment(value)?),
            Type::Any => match value.number() {
                None if value.is_word("true") => Some(1.0),
                None if value.is_word("false") => Some(0.0),
                number => number,
            },
        };
        if kind == Type::Any && (value.is_word("nan") || value.is_word("null")) {
            return self.compare_with_nothing(target, operator, value);
        }
        if target == &Target::State {
            check_state(value)?;
        }
        let symbol = symbol(operator);
        self.scalar(target);
        self.sql.push(symbol);
        match number {
            Some(number) => self.sql.push_bind(number),
            None => self.sql.push_bind(value.text.clone()),
        };
        // SQLite orders texts after numbers instead of refusing to compare them. The empty text is the first of texts.
        let other = match (operator, number) {
            _ if kind != Type::Any => return Ok(()),
            // Results are numbers.
            (Operator::Greater | Operator::GreaterOrEqual, Some(_))
                if !matches!(target, Target::Series(..)) =>
            {
                " < ''"
            }
            (Operator::Less | Operator::LessOrEqual, None) => " >= ''",
            _ => return Ok(()),
        };
        self.sql.push(" and ");
        self.scalar(target);
        self.sql.push(other);
        Ok(())
    }

    /// NaN is null in `results`, and null is null in `params`.
    fn compare_with_nothing(
        &mut self,
        target: &Target,
        operator: Operator,
        value: &Value,
    ) -> Result<(), FilterError> {
        let is = match operator {
            Operator::Equal => "is null",
            Operator::Unequal => "is not null",
            _ => {
                return Err(FilterError::new(
                    "it can only be compared with = and !=",
                    value.at.clone(),
                ));
            }
        };
        match target {
            Target::Param(_) | Target::Series(..) => {
                let join = self.join(target);
                self.sql.push(format_args!("{join}.key is not null and "));
            }
            _ => {}
        }
        self.scalar(target);
        self.sql.push(format_args!(" {is}"));
        Ok(())
    }

    fn compare_any(
        &mut self,
        table: &str,
        column: &str,
        operator: Operator,
        value: &Value,
    ) -> Result<(), FilterError> {
        let not = match operator {
            Operator::Equal | Operator::Like => "",
            Operator::Unequal | Operator::Unlike => "not ",
            _ => {
                return Err(FilterError::new(
                    "expected =, !=, ~, !~ or `in` before this",
                    value.at.clone(),
                )
                .hint("a run may have several of these: they have no order"));
            }
        };
        self.sql.push(format_args!(
            "{not}exists (select 1 from {table} x where x.run = r.key and x.{column}"
        ));
        if matches!(operator, Operator::Like | Operator::Unlike) {
            self.sql.push(" like ");
            self.sql.push_bind(pattern(&value.text));
            self.sql.push(" escape '\\')");
        } else {
            self.sql.push(" = ");
            self.sql.push_bind(value.text.clone());
            self.sql.push(")");
        }
        Ok(())
    }

    /// The value of a field, as a column that is shown.
    fn shown(&mut self, target: &Target) {
        match target {
            Target::Series(_, column) if *column != "points" => {
                let join = self.join(target);
                self.sql.push(format_args!(
                    "case when {join}.key is not null then ifnull({join}.{column}, 'NaN') end"
                ));
            }
            Target::Run(column, Type::Moment) => {
                self.sql.push(format_args!(
                    "strftime('%Y-%m-%dT%H:%M:%fZ', {column} / 1000.0, 'unixepoch')"
                ));
            }
            Target::Any(table, column) => {
                self.sql.push(format_args!(
                    "(select group_concat(distinct x.{column}) from {table} x where x.run = r.key)"
                ));
            }
            target => self.scalar(target),
        }
    }

    /// The value of a field, as an SQL expression.
    fn scalar(&mut self, target: &Target) {
        match target {
            Target::Run(column, _) => {
                self.sql.push(column);
            }
            Target::State if self.lost == "[]" => {
                self.sql.push("r.state");
            }
            Target::State => {
                self.sql.push(
                    "case when r.state in ('queued', 'running') and r.id in (select value from json_each(",
                );
                self.sql.push_bind(self.lost.clone());
                self.sql.push(")) then 'lost' else r.state end");
            }
            Target::Any(_, column) => {
                debug_assert!(false, "{column} has several values");
            }
            Target::Stage(name, column, _) => {
                let column = match *column {
                    "seconds" => {
                        "(select sum(a.finished - a.started - a.paused) / 1000.0 from attempts a where a.stage = s.key)"
                    }
                    "state" => "s.state",
                    "kind" => "s.kind",
                    "plugin" => "s.plugin",
                    _ => "s.device",
                };
                self.sql.push(format_args!(
                    "(select {column} from stages s where s.run = r.key and s.name = "
                ));
                self.sql.push_bind(name.clone());
                self.sql.push(")");
            }
            Target::Environment(name) => {
                self.sql.push("(select d.environment ->> ");
                self.sql
                    .push_bind(format!("$.\"{}\"", name.replace('"', "")));
                self.sql.push(" from documents d where d.run = r.key)");
            }
            Target::Param(_) => {
                let join = self.join(target);
                self.sql.push(format_args!("{join}.value"));
            }
            Target::Series(_, column) => {
                let join = self.join(target);
                self.sql.push(format_args!("{join}.{column}"));
            }
        }
    }

    /// The name of the joined row that a field is read from.
    fn join(&self, target: &Target) -> String {
        let row = row_of(target);
        let place = self
            .joins
            .iter()
            .position(|join| Some(join) == row.as_ref());
        format!("j{}", place.unwrap_or_default())
    }
}

/// What a plain name means.
fn own(name: &str) -> Option<Target> {
    Some(match name {
        "id" | "run" => Target::Run("r.id", Type::Text),
        "state" | "status" => Target::State,
        "recipe" => Target::Run("r.recipe", Type::Text),
        "path" => Target::Run("r.recipe_path", Type::Text),
        "started" | "created" => STARTED,
        "finished" => Target::Run("r.finished", Type::Moment),
        "seconds" | "took" | "duration" => Target::Run(
            "(coalesce(r.finished, unixepoch('subsec') * 1000) - r.created) / 1000.0",
            Type::Seconds,
        ),
        "age" => Target::Run("unixepoch('subsec') - r.created / 1000.0", Type::Seconds),
        "seed" => Target::Run("r.seed", Type::Number),
        "error" => Target::Run("r.error", Type::Text),
        "note" => Target::Run("r.note", Type::Text),
        "sweep" => Target::Run(
            "(select w.id from sweeps w where w.key = r.sweep)",
            Type::Text,
        ),
        "point" => Target::Run("r.point", Type::Number),
        "tag" | "tags" => Target::Any("tags", "tag"),
        "stage" => Target::Any("stages", "name"),
        "kind" => Target::Any("stages", "kind"),
        "plugin" => Target::Any("stages", "plugin"),
        "device" => Target::Any("stages", "device"),
        "stages" => Target::Run(
            "(select count(*) from stages x where x.run = r.key)",
            Type::Number,
        ),
        "reused" => Target::Run(
            "(select count(*) from stages x where x.run = r.key and x.state = 'reused')",
            Type::Number,
        ),
        _ => return None,
    })
}

fn type_of(target: &Target) -> Type {
    match target {
        Target::Run(_, kind) | Target::Stage(_, _, kind) => *kind,
        Target::State | Target::Any(..) => Type::Text,
        Target::Environment(_) | Target::Param(_) | Target::Series(..) => Type::Any,
    }
}

/// The row that has to be joined for a field; columns of one row share it.
fn row_of(target: &Target) -> Option<Target> {
    match target {
        Target::Param(key) => Some(Target::Param(*key)),
        Target::Series(key, _) => Some(Target::Series(*key, "last")),
        _ => None,
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

/// The fields without which a run cannot pass.
fn needed(expr: &Expr) -> Vec<&Field> {
    match expr {
        Expr::And(parts) => parts.iter().flat_map(needed).collect(),
        Expr::Has(field) | Expr::Compare(field, ..) | Expr::In(field, _) => vec![field],
        Expr::Or(_) | Expr::Not(_) => Vec::new(),
    }
}

/// The key of the one name that is meant: the very name; the name behind a usual prefix; with `/` for `.`; the only one
/// that ends so. Otherwise the nearest name.
fn find_name(
    field: &Field,
    name: &str,
    prefix: &str,
    names: &[(i64, String)],
) -> Result<i64, Option<String>> {
    debug_assert!(!field.parts.is_empty());
    let dotted = |name: &str| name.replace('/', ".");
    let wanted = dotted(name);
    let exact = names
        .iter()
        .find(|(_, known)| known == name || known.strip_prefix(prefix) == Some(name));
    let alike = || {
        names.iter().find(|(_, known)| {
            let known = dotted(known);
            known == wanted || known.strip_prefix(prefix) == Some(wanted.as_str())
        })
    };
    let ending = || {
        let end = format!(".{wanted}");
        let mut found = names
            .iter()
            .filter(|(_, known)| dotted(known).ends_with(&end));
        match (found.next(), found.next()) {
            (Some(only), None) => Some(only),
            // A series is known under its own name and under its stage's: the shorter one speaks for both.
            (Some(first), Some(second)) if found.next().is_none() => {
                let (short, long) = if first.1.len() < second.1.len() {
                    (first, second)
                } else {
                    (second, first)
                };
                dotted(&long.1)
                    .ends_with(&format!(".{}", dotted(&short.1)))
                    .then_some(short)
            }
            _ => None,
        }
    };
    if let Some((key, _)) = exact.or_else(alike).or_else(ending) {
        return Ok(*key);
    }
    let likeness = |known: &str| {
        let last = known.rsplit(['.', '/']).next().unwrap_or(known);
        let whole = strsim::jaro_winkler(&wanted, &dotted(known));
        (whole.max(strsim::jaro_winkler(&wanted, last)) * 1000.0) as u32
    };
    // Of several that are alike the shortest.
    let nearest = names
        .iter()
        .max_by_key(|(_, known)| (likeness(known), std::cmp::Reverse(known.len())));
    Err(nearest.map(|(_, known)| known.strip_prefix(prefix).unwrap_or(known).to_owned()))
}

fn nothing(field: &Field, what: &str, name: &str, near: Option<String>) -> FilterError {
    let error = FilterError::new(format!("{what} `{name}`"), field.at.clone());
    match near {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error.hint("there are none in this store yet"),
    }
}

fn unknown(field: &Field, name: &str, known: &[&str], what: &str) -> FilterError {
    let error = FilterError::new(format!("there is no {what} `{name}`"), field.at.clone());
    let nearest = known
        .iter()
        .max_by_key(|known| (strsim::jaro_winkler(name, known) * 1000.0) as u32);
    match nearest {
        Some(nearest) if strsim::jaro_winkler(name, nearest) > 0.7 => error.hint(format!(
            "did you mean `{nearest}`? There are: {}",
            known.join(", ")
        )),
        _ => error.hint(format!("there are: {}", known.join(", "))),
    }
}

fn expected(what: &str, value: &Value) -> FilterError {
    FilterError::new(format!("expected {what}"), value.at.clone())
}

fn check_state(value: &Value) -> Result<(), FilterError> {
    let names = RunState::ALL.map(RunState::name);
    if names.contains(&value.text.as_str()) {
        return Ok(());
    }
    let nearest = names
        .iter()
        .max_by_key(|known| (strsim::jaro_winkler(&value.text, known) * 1000.0) as u32);
    let nearest = nearest.copied().unwrap_or_default();
    Err(FilterError::new(
        format!("`{}` is no state of a run", value.text),
        value.at.clone(),
    )
    .hint(format!(
        "did you mean `{nearest}`? There are: {}",
        names.join(", ")
    )))
}

/// Seconds, or a duration such as `10m`.
fn seconds(value: &Value) -> Result<f64, FilterError> {
    let duration = || humantime::parse_duration(&value.text).ok();
    value
        .number()
        .or_else(|| duration().map(|duration| duration.as_secs_f64()))
        .ok_or_else(|| expected("seconds, or a duration such as 10m or 2h", value))
}

/// Milliseconds since 1970, of a date with or without a time.
fn moment(value: &Value) -> Result<f64, FilterError> {
    let text = value.text.trim_end_matches('Z').replace(' ', "T");
    let whole = if text.contains('T') {
        text
    } else {
        format!("{text}T00:00:00")
    };
    let parsed = humantime::parse_rfc3339_weak(&whole).ok();
    let since = parsed.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    since
        .map(|since| Time(i64::try_from(since.as_millis()).unwrap_or(i64::MAX)).0 as f64)
        .ok_or_else(|| {
            expected(
                "a date such as 2026-01-31 or '2026-01-31 12:00:00' (UTC)",
                value,
            )
            .hint("`age < 7d` asks for the last seven days")
        })
}

/// A text to be contained, or a pattern with `*` and `?`, as SQL's `like` has it.
fn pattern(text: &str) -> String {
    let wild = text.contains(['*', '?']);
    let mut pattern = String::new();
    for character in text.chars() {
        match character {
            '*' => pattern.push('%'),
            '?' => pattern.push('_'),
            '%' | '_' | '\\' => pattern.extend(['\\', character]),
            character => pattern.push(character),
        }
    }
    if wild {
        pattern
    } else {
        format!("%{pattern}%")
    }
}

fn symbol(operator: Operator) -> &'static str {
    match operator {
        Operator::Equal => " = ",
        Operator::Unequal => " != ",
        Operator::Less => " < ",
        Operator::LessOrEqual => " <= ",
        Operator::Greater => " > ",
        Operator::GreaterOrEqual => " >= ",
        Operator::Like => " like ",
        Operator::Unlike => " not like ",
    }
}

/// What runs are ordered by.
#[derive(Debug, Clone, PartialEq)]
pub struct Sort {
    /// A field.
    pub name: Name,
    /// The greatest first.
    pub descending: bool,
}
