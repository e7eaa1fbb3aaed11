//! The statement that finds the runs: tables, conditions, order.

use sqlx::{QueryBuilder, Sqlite};

use super::way::{FIRST, Leader, Way, column_of, is_narrowed, place_of};
use super::{AGE, FEW, FieldTarget, STARTED, TRIED, Type, needed, required};
use crate::filter::{Expr, Field, FilterError, Operator, Value};
use crate::store::time::Time;
use crate::store::{RunFilter, RunState, StoreError};

/// A statement under construction.
pub(super) struct Select {
    pub(super) sql: QueryBuilder<Sqlite>,
    /// Joined rows of `results` and `params`, by name.
    joins: Vec<FieldTarget>,
    states: String,
    /// The row that is read instead of a joined one.
    instead: Option<&'static str>,
}

impl Select {
    /// A statement with this beginning. `states`: JSON with the states of runs for which another is recorded.
    pub(super) fn new(words: &'static str, states: String) -> Self {
        Self {
            sql: QueryBuilder::new(words),
            joins: Vec::new(),
            states,
            instead: None,
        }
    }

    /// Builds it from a filter. `targets` has the meanings of the fields.
    pub(super) fn build(
        &mut self,
        filter: &RunFilter,
        targets: &[(&Field, FieldTarget)],
        way: Way,
    ) -> Result<(), StoreError> {
        for (_, target) in targets {
            let row = row_of(target);
            if let Some(row) = row
                && !self.joins.contains(&row)
            {
                self.joins.push(row);
            }
        }
        let of = |field: &Field| -> FieldTarget {
            // Every field has been looked up before.
            let found = targets.iter().find(|(known, _)| *known == field);
            found.map_or(FieldTarget::State, |(_, target)| target.clone())
        };
        for column in &filter.columns {
            self.sql.push(", ");
            self.shown(&of(&column.field));
        }
        let needed: Vec<FieldTarget> = filter
            .expr
            .iter()
            .flat_map(|wanted| needed(&wanted.expr))
            .filter_map(|field| row_of(&of(field)))
            .collect();
        let first = filter.sort.first().map(|sort| of(&sort.name.field));
        let mut tested = filter.expr.iter().flat_map(|wanted| required(&wanted.expr));
        let passed = match way {
            Way::Rows(number) => tested.nth(number),
            _ => None,
        };
        let leader = match (way, passed) {
            (Way::All, _) if first.as_ref().is_some_and(|first| *first != STARTED) => {
                let leads = |join: &FieldTarget| needed.contains(join);
                self.joins.iter().position(leads).map(Leader::Joined)
            }
            (Way::Rows(_), Some((field, ..))) => place_of(&of(field)).map(Leader::Indexed),
            (Way::First, _) => first.as_ref().and_then(place_of).map(Leader::Indexed),
            _ => None,
        };
        self.tables(leader, &needed);
        if way == Way::First {
            self.first(filter, first.as_ref());
        }
        if !filter.states.is_empty() {
            self.sql.push(" and ");
            self.scalar(&FieldTarget::State);
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
            let in_text =
                |error: FilterError| StoreError::Filter(Box::new(error.in_text(&wanted.text)));
            if let Some((field, operator, value)) = passed {
                self.sql.push(" and ");
                self.compare_indexed(&of(field), operator, value)
                    .map_err(in_text)?;
            }
            if filter.sort.is_empty() && filter.limit.is_some() {
                self.bounds(&wanted.expr, &of).map_err(in_text)?;
            }
            self.sql.push(" and ");
            self.condition(&wanted.expr, &of, false).map_err(in_text)?;
        }
        let by_index = way == Way::First && matches!(leader, Some(Leader::Indexed(_)));
        self.order(filter, &of, by_index)
    }

    /// The order of the runs, and the page. `by_index`: the order is that of `f`, the row that leads.
    fn order(
        &mut self,
        filter: &RunFilter,
        of: &dyn Fn(&Field) -> FieldTarget,
        by_index: bool,
    ) -> Result<(), StoreError> {
        let limit = filter.limit.map_or(-1, i64::from);
        self.sql.push(" order by ");
        for (number, sort) in filter.sort.iter().enumerate() {
            let target = of(&sort.name.field);
            if matches!(target, FieldTarget::Any(..)) {
                let error = FilterError::new(
                    "a run may have several of these",
                    sort.name.field.at.clone(),
                );
                return Err(StoreError::Filter(Box::new(error.in_text(&sort.name.text))));
            }
            let direction = if sort.descending { " desc" } else { "" };
            if target == STARTED {
                // The index has this order, and no two runs are equal, so nothing more is needed.
                self.sql.push(format_args!(
                    "r.created{direction}, r.key{direction} limit "
                ));
                self.sql.push_bind(limit);
                self.sql.push(" offset ");
                self.sql.push_bind(filter.skip);
                return Ok(());
            }
            if by_index && number == 0 {
                // Rows without a value are left out.
                let column = column_of(&target);
                self.sql.push(format_args!("f.{column}{direction}, "));
                continue;
            }
            self.scalar(&target);
            self.sql.push(direction);
            self.sql.push(" nulls last, ");
        }
        // Of one name, both keys have the same order.
        let row = if by_index { "f" } else { "r" };
        self.sql.push(format_args!("{row}.key desc limit "));
        self.sql.push_bind(limit);
        self.sql.push(" offset ");
        self.sql.push_bind(filter.skip);
        Ok(())
    }

    /// The rows that pass a comparison, or the runs, from `from` on. They have an index (see [`super::way::way_by`]).
    pub(super) fn passing(
        &mut self,
        target: &FieldTarget,
        operator: Operator,
        value: &Value,
    ) -> Result<(), FilterError> {
        let Some((table, name)) = place_of(target) else {
            self.sql.push(" from runs r where ");
            return self.compare(target, operator, value);
        };
        self.sql
            .push(format_args!(" from {table} f where f.name = "));
        self.sql.push_bind(name);
        self.sql.push(" and ");
        self.compare_indexed(target, operator, value)
    }

    /// A comparison of `f`, the row that leads.
    fn compare_indexed(
        &mut self,
        target: &FieldTarget,
        operator: Operator,
        value: &Value,
    ) -> Result<(), FilterError> {
        self.instead = Some("f");
        let pushed = self.compare(target, operator, value);
        self.instead = None;
        pushed
    }

    /// Limits a statement to the first rows in the order of the first sort, `target`, or to the newest runs. Without a filter
    /// each row is a match: then the limit of the statement suffices.
    fn first(&mut self, filter: &RunFilter, target: Option<&FieldTarget>) {
        let descending = filter.sort.first().is_none_or(|sort| sort.descending);
        let column = target.map_or("key", column_of);
        let place = target.and_then(place_of);
        let row = if place.is_some() { "f" } else { "r" };
        if place.is_some() {
            self.sql
                .push(format_args!(" and {row}.{column} is not null"));
        }
        if !is_narrowed(filter) {
            return;
        }
        let symbol = if descending { ">" } else { "<" };
        let table = place.map_or("runs", |(table, _)| table);
        self.sql.push(format_args!(
            " and {row}.{column} {symbol} (select x.{column} from {table} x where x.{column} is not null"
        ));
        if let Some((_, name)) = place {
            self.sql.push(" and x.name = ");
            self.sql.push_bind(name);
        }
        let direction = if descending { " desc" } else { "" };
        self.sql.push(format_args!(
            " order by x.{column}{direction} limit 1 offset "
        ));
        let wanted = filter.limit.unwrap_or(0).saturating_add(filter.skip);
        self.sql.push_bind(wanted.saturating_add(FIRST));
        self.sql.push(")");
    }

    /// `runs r` and its joined rows, up to `where` and the first table's conditions.
    fn tables(&mut self, leader: Option<Leader>, needed: &[FieldTarget]) {
        let joins: Vec<(usize, &'static str, i64, bool)> = self
            .joins
            .iter()
            .enumerate()
            .filter_map(|(number, join)| {
                let (table, name) = place_of(join)?;
                // A run without the row cannot match, so no outer join is needed.
                Some((number, table, name << 32, needed.contains(join)))
            })
            .collect();
        // SQLite runs a cross join in the order in which it is written.
        match leader {
            Some(Leader::Joined(number)) => {
                let (_, table, ..) = joins[number];
                self.sql.push(format_args!(
                    " from {table} j{number} cross join runs r on r.key = j{number}.key & 0xffffffff"
                ));
            }
            Some(Leader::Indexed((table, _))) => {
                self.sql.push(format_args!(
                    " from {table} f cross join runs r on r.key = f.run"
                ));
            }
            None => {
                self.sql.push(" from runs r");
            }
        }
        for (number, table, first, needed) in &joins {
            if leader != Some(Leader::Joined(*number)) {
                let join = if *needed { "cross join" } else { "left join" };
                self.sql.push(format_args!(
                    " {join} {table} j{number} on j{number}.key = "
                ));
                self.sql.push_bind(*first);
                self.sql.push(" + r.key");
            }
        }
        self.sql.push(" where true");
        match leader {
            Some(Leader::Joined(number)) => {
                let (_, _, first, _) = joins[number];
                self.sql.push(format_args!(" and j{number}.key between "));
                self.sql.push_bind(first);
                self.sql.push(" and ");
                self.sql.push_bind(first | 0xffff_ffff);
            }
            Some(Leader::Indexed((_, name))) => {
                self.sql.push(" and f.name = ");
                self.sql.push_bind(name);
            }
            None => {}
        }
    }

    /// Bounds on the keys of runs that must have begun before or after some moment. The search goes from the newest key to the
    /// oldest, and if hardly any run passes, through all of them; the index of moments knows where the few are. Where they are
    /// many, the search soon finds the first ones. Only a few comparisons give bounds: SQLite limits a statement's depth.
    fn bounds(
        &mut self,
        expr: &Expr,
        of: &dyn Fn(&Field) -> FieldTarget,
    ) -> Result<(), FilterError> {
        let bounding = required(expr).into_iter().filter(|(field, operator, _)| {
            let ordered = matches!(
                operator,
                Operator::Greater
                    | Operator::GreaterOrEqual
                    | Operator::Less
                    | Operator::LessOrEqual
            );
            ordered && [STARTED, AGE].contains(&of(field))
        });
        for (field, operator, value) in bounding.take(TRIED) {
            let target = of(field);
            // The plus keeps SQLite from searching for the extreme key in the order of keys.
            for (symbol, extreme, otherwise) in [(">=", "min", 0), ("<=", "max", i64::MAX)] {
                self.sql.push(format_args!(
                    " and r.key {symbol} case when (select count(*) from (select 1 from runs r where "
                ));
                self.compare(&target, operator, value)?;
                self.sql.push(format_args!(
                    " limit {FEW})) < {FEW} then (select {extreme}(+r.key) from runs r where "
                ));
                self.compare(&target, operator, value)?;
                self.sql.push(format_args!(") else {otherwise} end"));
            }
        }
        Ok(())
    }

    fn condition(
        &mut self,
        expr: &Expr,
        of: &dyn Fn(&Field) -> FieldTarget,
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
                // Null counts as false, which matters under `not`.
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

    fn has(&mut self, target: &FieldTarget) {
        match target {
            FieldTarget::Any(table, _) => {
                self.sql.push(format_args!(
                    "exists (select 1 from {table} x where x.run = r.key)"
                ));
            }
            FieldTarget::Param(_) | FieldTarget::Series(..) => {
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
        target: &FieldTarget,
        operator: Operator,
        value: &Value,
    ) -> Result<(), FilterError> {
        if let FieldTarget::Any(table, column) = target {
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
        if target == &FieldTarget::State {
            check_state(value)?;
        }
        if target == &AGE
            && let Some(seconds) = number
        {
            // In terms of the moment, which has an index.
            let symbol = symbol(reversed(operator));
            self.sql
                .push(format_args!("r.created{symbol}(unixepoch('subsec') - "));
            self.sql.push_bind(seconds);
            self.sql.push(") * 1000.0");
            return Ok(());
        }
        let symbol = symbol(operator);
        self.scalar(target);
        self.sql.push(symbol);
        match number {
            Some(number) => self.sql.push_bind(number),
            None => self.sql.push_bind(value.text.clone()),
        };
        // SQLite sorts texts after numbers instead of refusing to compare them. The empty text is the first text.
        let other = match (operator, number) {
            _ if kind != Type::Any => return Ok(()),
            // Results are numbers.
            (Operator::Greater | Operator::GreaterOrEqual, Some(_))
                if !matches!(target, FieldTarget::Series(..)) =>
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

    /// Null is a NaN in `results`, and null in `params`.
    fn compare_with_nothing(
        &mut self,
        target: &FieldTarget,
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
            FieldTarget::Param(_) | FieldTarget::Series(..) => {
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
        if table == "tags" && operator == Operator::Equal {
            // Its key begins with the tag: what has it is listed, instead of every run being asked.
            self.sql
                .push("r.key in (select x.run from tags x where x.tag = ");
            self.sql.push_bind(value.text.clone());
            self.sql.push(")");
            return Ok(());
        }
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

    /// The value of a field, as a column for output.
    fn shown(&mut self, target: &FieldTarget) {
        match target {
            FieldTarget::Series(_, column) if *column != "points" => {
                let join = self.join(target);
                self.sql.push(format_args!(
                    "case when {join}.key is not null then ifnull({join}.{column}, 'NaN') end"
                ));
            }
            FieldTarget::Run(column, Type::Moment) => {
                self.sql.push(format_args!(
                    "strftime('%Y-%m-%dT%H:%M:%fZ', {column} / 1000.0, 'unixepoch')"
                ));
            }
            FieldTarget::Any(table, column) => {
                self.sql.push(format_args!(
                    "(select group_concat(distinct x.{column}) from {table} x where x.run = r.key)"
                ));
            }
            target => self.scalar(target),
        }
    }

    /// The value of a field, as an SQL expression.
    fn scalar(&mut self, target: &FieldTarget) {
        match target {
            FieldTarget::Run(column, _) => {
                self.sql.push(column);
            }
            FieldTarget::State if self.states == "{}" => {
                self.sql.push("r.state");
            }
            FieldTarget::State => {
                self.sql.push(
                    "case when r.state in ('queued', 'running') then coalesce((select value from json_each(",
                );
                self.sql.push_bind(self.states.clone());
                self.sql
                    .push(") where key = r.id), r.state) else r.state end");
            }
            FieldTarget::Any(_, column) => {
                debug_assert!(false, "{column} has several values");
            }
            FieldTarget::Stage(name, column, _) => {
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
            FieldTarget::Environment(name) => {
                self.sql.push("(select d.environment ->> ");
                self.sql
                    .push_bind(format!("$.\"{}\"", name.replace('"', "")));
                self.sql.push(" from documents d where d.run = r.key)");
            }
            FieldTarget::Param(_) => {
                let join = self.join(target);
                self.sql.push(format_args!("{join}.value"));
            }
            FieldTarget::Series(_, column) => {
                let join = self.join(target);
                self.sql.push(format_args!("{join}.{column}"));
            }
        }
    }

    /// The name of the joined row that a field is read from.
    fn join(&self, target: &FieldTarget) -> String {
        if let Some(row) = self.instead {
            return row.to_owned();
        }
        let row = row_of(target);
        let place = self
            .joins
            .iter()
            .position(|join| Some(join) == row.as_ref());
        format!("j{}", place.unwrap_or_default())
    }
}

fn type_of(target: &FieldTarget) -> Type {
    match target {
        FieldTarget::Run(_, kind) | FieldTarget::Stage(_, _, kind) => *kind,
        FieldTarget::State | FieldTarget::Any(..) => Type::Text,
        FieldTarget::Environment(_) | FieldTarget::Param(_) | FieldTarget::Series(..) => Type::Any,
    }
}

/// The row to join for a field; columns of the same row share it.
fn row_of(target: &FieldTarget) -> Option<FieldTarget> {
    match target {
        FieldTarget::Param(key) => Some(FieldTarget::Param(*key)),
        FieldTarget::Series(key, _) => Some(FieldTarget::Series(*key, "last")),
        _ => None,
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
        format!("unknown run state `{}`", value.text),
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

/// Milliseconds since 1970, from a date with or without a time.
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

/// Converts a substring, or a pattern with `*` and `?`, to a pattern for SQL's `like`.
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

/// The operator with its sides exchanged.
fn reversed(operator: Operator) -> Operator {
    match operator {
        Operator::Less => Operator::Greater,
        Operator::LessOrEqual => Operator::GreaterOrEqual,
        Operator::Greater => Operator::Less,
        Operator::GreaterOrEqual => Operator::LessOrEqual,
        operator => operator,
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
