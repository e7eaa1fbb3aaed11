//! The meaning of names in a filter: facts of a run or its stages, parameters, metrics.

use super::{AGE, FieldTarget, STARTED, Type};
use crate::filter::{Field, FilterError};
use crate::store::{Store, StoreError};

/// Fields of a run itself, in the help's order.
const FIELDS: [&str; 20] = [
    "id", "state", "recipe", "path", "started", "finished", "seconds", "age", "seed", "error",
    "note", "tag", "stage", "kind", "plugin", "device", "stages", "reused", "sweep", "point",
];

/// Fields of a stage: `stage.NAME.state` and the like.
const STAGE_FIELDS: [&str; 5] = ["state", "seconds", "kind", "plugin", "device"];

impl Store {
    /// The meaning of a field in this store.
    pub(super) async fn target(
        &self,
        field: &Field,
        in_text: &(dyn Fn(FilterError) -> FilterError + Sync),
    ) -> Result<FieldTarget, StoreError> {
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
                FieldTarget::Param(key)
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
                FieldTarget::Series(key, column)
            }
            ["env" | "environment", name @ ..] => FieldTarget::Environment(name.join(".")),
            ["stage" | "stages", name @ .., column] if !name.is_empty() => {
                let Some(known) = STAGE_FIELDS.into_iter().find(|known| known == column) else {
                    let what = "column of a stage";
                    return Err(error(unknown(field, column, &STAGE_FIELDS, what)));
                };
                let kind = match known {
                    "seconds" => Type::Seconds,
                    _ => Type::Text,
                };
                FieldTarget::Stage(name.join("."), known, kind)
            }
            ["stage" | "stages", part] => return Err(error(incomplete(field, part))),
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

    /// The names in a table's rows, with their keys.
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

/// The meaning of a plain name.
fn own(name: &str) -> Option<FieldTarget> {
    Some(match name {
        "id" | "run" => FieldTarget::Run("r.id", Type::Text),
        "state" | "status" => FieldTarget::State,
        "recipe" => FieldTarget::Run("r.recipe", Type::Text),
        "path" => FieldTarget::Run("r.recipe_path", Type::Text),
        "started" | "created" => STARTED,
        "finished" => FieldTarget::Run("r.finished", Type::Moment),
        "seconds" | "took" | "duration" => FieldTarget::Run(
            "(coalesce(r.finished, unixepoch('subsec') * 1000) - r.created) / 1000.0",
            Type::Seconds,
        ),
        "age" => AGE,
        "seed" => FieldTarget::Run("r.seed", Type::Number),
        "error" => FieldTarget::Run("r.error", Type::Text),
        "note" => FieldTarget::Run("r.note", Type::Text),
        "sweep" => FieldTarget::Run(
            "(select w.id from sweeps w where w.key = r.sweep)",
            Type::Text,
        ),
        "point" => FieldTarget::Run("r.point", Type::Number),
        "tag" | "tags" => FieldTarget::Any("tags", "tag"),
        "stage" => FieldTarget::Any("stages", "name"),
        "kind" => FieldTarget::Any("stages", "kind"),
        "plugin" => FieldTarget::Any("stages", "plugin"),
        "device" => FieldTarget::Any("stages", "device"),
        "stages" => FieldTarget::Run(
            "(select count(*) from stages x where x.run = r.key)",
            Type::Number,
        ),
        "reused" => FieldTarget::Run(
            "(select count(*) from stages x where x.run = r.key and x.state = 'reused')",
            Type::Number,
        ),
        _ => return None,
    })
}

/// The key of the name that is meant: the name itself, the name after a common prefix, the name with `/` for `.`, or the only
/// name with this ending. Otherwise the nearest name.
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
            // A series has two names, with and without its stage: the shorter one is suggested for both.
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
    // Of several equally near names, the shortest.
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

/// A field of a stage of which one part is missing: the stage's name, or what of it.
fn incomplete(field: &Field, part: &str) -> FilterError {
    let message = format!("there is no field `{}`", field.name());
    let (name, column) = match STAGE_FIELDS.contains(&part) {
        true => ("NAME", part),
        false => (part, "state"),
    };
    FilterError::new(message, field.at.clone()).hint(format!(
        "did you mean `stage.{name}.{column}`? There are: {}",
        STAGE_FIELDS.join(", ")
    ))
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
