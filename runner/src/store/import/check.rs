//! Checks that every value of a draft is one that a store could have written.
//!
//! The tables are our own, so their constraints (not null, unique, one of these states) already hold. The checks here are
//! those that SQL cannot express: ids and hashes are well-formed, JSON has the shape that readers expect, paths stay within
//! their artifact, an artifact's hash matches its list of files, and blocks of points match their summaries.

use std::collections::HashMap;

use futures_util::TryStreamExt;
use retort_abi::{ArtifactMeta, Failure};
use retort_checkpoint::json;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Either, Executor, Row, TypeInfo, ValueRef};

use crate::artifact;
use crate::artifact::ArtifactFile;
use crate::artifact::is_hash;
use crate::recipe::MAX_STAGES;
use crate::store::objects::brief;
use crate::store::record::is_run_id;
use crate::store::sweep::is_sweep_id;
use crate::store::{StoreError, Time, block};
use crate::sweep::{MAX_POINTS, Parameter, Sweep};

/// Why a draft is refused.
pub(super) enum ImportError {
    /// A wrong value: where it is, and what was expected.
    Fault(String),
    /// The draft could not be read.
    Store(StoreError),
}

impl From<sqlx::Error> for ImportError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            // A text that is not UTF-8.
            error @ (sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_)) => {
                Self::Fault(error.to_string())
            }
            error => Self::Store(error.into()),
        }
    }
}

/// What a column may hold.
#[derive(Clone, Copy)]
enum ColumnRule {
    RunId,
    Hash,
    /// A short text without control characters.
    Name,
    /// A text that people read.
    Text,
    Moment,
    /// A number from 0.
    Natural,
    /// The key of a row; names and runs are packed into one number.
    Key,
    /// The number of a point of a sweep, or of its rung.
    Point,
    /// Any number; null is NaN.
    Number,
    Json(fn(&str) -> bool),
}

use ColumnRule::{Hash, Json, Key, Moment, Name, Natural, Number, Point, Text};

/// The tables' columns with their allowed values; a `?` after the name means that null is allowed. For other columns the type
/// is sufficient.
const RULES: &[(&str, &[(&str, ColumnRule)])] = &[
    (
        "runs",
        &[
            ("key", Key),
            ("id", ColumnRule::RunId),
            ("recipe", Name),
            ("recipe_path", Text),
            ("command", Json(is::<Vec<String>>)),
            ("resumed_from?", ColumnRule::RunId),
            ("error?", Text),
            ("created", Moment),
            ("finished?", Moment),
            ("note", Text),
            ("point?", Point),
        ],
    ),
    (
        "documents",
        &[
            ("recipe_text", Text),
            ("resolved", Json(is::<Option<Map<String, Value>>>)),
            ("environment", Json(is::<Map<String, Value>>)),
        ],
    ),
    (
        "sweeps",
        &[
            ("key", Key),
            ("id", Json(is_sweep_id)),
            ("recipe", Name),
            ("recipe_path", Text),
            ("recipe_text", Text),
            ("settings", Json(is::<Vec<String>>)),
            ("definition", Json(is_sweep)),
            ("selection", Json(is::<Map<String, Value>>)),
            ("points", Natural),
            ("created", Moment),
        ],
    ),
    (
        "sweep_points",
        &[("point", Point), ("settings", Json(is::<Vec<String>>))],
    ),
    (
        "sweep_rungs",
        &[("point", Point), ("rung", Point), ("value?", Number)],
    ),
    ("tags", &[("tag", Name)]),
    ("names", &[("key", Key), ("name", Name)]),
    ("params", &[("origin", Name)]),
    (
        "stages",
        &[
            ("position", Point),
            ("name", Name),
            ("kind", Name),
            ("plugin", Name),
            ("plugin_version", Name),
            ("plugin_hash", Hash),
            ("device", Name),
            ("dtype", Name),
            ("options", Json(is::<Map<String, Value>>)),
            ("inputs", Json(is::<Vec<(String, String)>>)),
            ("digest?", Hash),
            ("components?", Json(is::<Map<String, Value>>)),
        ],
    ),
    (
        "attempts",
        &[
            ("number", Point),
            ("digest", Hash),
            ("worker_pid", Point),
            ("reason?", Text),
            ("message?", Text),
            ("failure?", Json(is::<Failure>)),
            ("summary?", Json(is::<Value>)),
            ("output?", Hash),
            ("cpu_seconds?", Number),
            ("max_rss?", Natural),
            ("started", Moment),
            ("finished?", Moment),
            ("paused", Moment),
        ],
    ),
    (
        "artifacts",
        &[("hash", Hash), ("size", Natural), ("created", Moment)],
    ),
    (
        "outputs",
        &[
            ("kind", Name),
            ("name", Name),
            ("meta", Json(is_meta)),
            ("created", Moment),
        ],
    ),
    (
        "series",
        &[
            ("name", Name),
            ("base", Moment),
            ("last?", Number),
            ("min?", Number),
            ("max?", Number),
            ("points", Natural),
        ],
    ),
    (
        "logs",
        &[
            ("at", Moment),
            ("level", Point),
            ("source", Json(is_source)),
            ("text", Text),
        ],
    ),
    ("results", &[("position", Natural), ("points", Natural)]),
];

/// Checks every row of the draft.
pub(super) async fn all(connection: &mut SqliteConnection) -> Result<(), ImportError> {
    for (table, columns) in RULES {
        let names: Vec<&str> = columns
            .iter()
            .map(|(name, _)| name.trim_end_matches('?'))
            .collect();
        let sql = format!("select {} from main.{table}", names.join(", "));
        each(connection, sql, |row| {
            for (place, (name, rule)) in columns.iter().enumerate() {
                check(row, place, name.ends_with('?'), *rule).map_err(|expected| {
                    format!("`{}` of its table `{table}`: {expected}", names[place])
                })?;
            }
            Ok(())
        })
        .await?;
    }
    each(
        connection,
        "select type, value from main.params".into(),
        |row| param(row).map_err(|expected| format!("`value` of its table `params`: {expected}")),
    )
    .await?;
    let sql = "select hash, size, files from main.artifacts";
    each(connection, sql.into(), |row| {
        files(row).map_err(|expected| format!("`files` of its table `artifacts`: {expected}"))
    })
    .await?;
    counted(connection).await?;
    repeated(connection).await?;
    weighed(connection).await?;
    sweeps(connection).await?;
    blocks(connection).await
}

async fn each(
    connection: &mut SqliteConnection,
    sql: String,
    mut look: impl FnMut(&SqliteRow) -> Result<(), String>,
) -> Result<(), ImportError> {
    let mut rows = connection.fetch_many(sqlx::query(AssertSqlSafe(sql)));
    while let Some(step) = rows.try_next().await? {
        match step {
            Either::Right(row) => look(&row).map_err(ImportError::Fault)?,
            Either::Left(_) => return Ok(()),
        }
    }
    // A broken connection also gives no more rows: the others would go unchecked.
    Err(sqlx::Error::WorkerCrashed.into())
}

/// What was expected, and what is there instead.
fn check(row: &SqliteRow, place: usize, optional: bool, rule: ColumnRule) -> Result<(), String> {
    if row.try_get_raw(place).is_ok_and(|value| value.is_null()) {
        return match optional {
            true => Ok(()),
            false => Err("a value is missing".to_owned()),
        };
    }
    let number = || {
        row.try_get::<i64, _>(place)
            .map_err(|error| error.to_string())
    };
    let within = |least: i64, most: i64| match number()? {
        number if (least..=most).contains(&number) => Ok(()),
        number => Err(format!("{number} is not between {least} and {most}")),
    };
    let text = |is: fn(&str) -> bool, expected: &str| {
        let text: &str = row
            .try_get(place)
            .map_err(|_| "it is not text in UTF-8".to_owned())?;
        match is(text) {
            true => Ok(()),
            false => Err(format!("`{}` is not {expected}", brief(text))),
        }
    };
    if let Json(_) = rule {
        light(row.try_get(place).unwrap_or_default())?;
    }
    match rule {
        ColumnRule::RunId => text(is_run_id, "the id of a run"),
        Hash => text(is_hash, "a hash (64 digits and letters from a to f)"),
        Name => text(
            is_name,
            "a name (up to 1024 bytes without control characters)",
        ),
        Text => text(|_| true, ""),
        Json(is) => text(is, "what is kept there"),
        Moment => within(0, Time::LAST.0),
        Natural => within(0, i64::MAX),
        Point => within(0, i64::from(u32::MAX)),
        Key => within(1, i64::from(i32::MAX)),
        Number => row
            .try_get::<f64, _>(place)
            .map(drop)
            .map_err(|error| error.to_string()),
    }
}

/// The text of a JSON value, if reading it takes a bounded amount of memory.
fn light(text: &str) -> Result<&str, String> {
    match json::check_weight(text.as_bytes(), HEAVIEST_RUN) {
        Ok(()) => Ok(text),
        Err(_) => Err(format!(
            "it would take more than {} MiB of memory, the limit for a whole run",
            HEAVIEST_RUN >> 20
        )),
    }
}

fn is<T: DeserializeOwned>(text: &str) -> bool {
    serde_json::from_str::<T>(text).is_ok()
}

fn is_meta(text: &str) -> bool {
    serde_json::from_str::<ArtifactMeta>(text)
        .is_ok_and(|meta| meta.preview.as_deref().is_none_or(artifact::is_inner_path))
}

fn is_sweep(text: &str) -> bool {
    let is_sound = |parameter: &Parameter| parameter.values.check().is_ok();
    serde_json::from_str::<Sweep>(text).is_ok_and(|sweep| sweep.parameters.iter().all(is_sound))
}

fn is_source(text: &str) -> bool {
    matches!(text, "plugin" | "stdout" | "stderr" | "runner")
}

fn is_name(text: &str) -> bool {
    text.len() <= 1024 && !text.chars().any(char::is_control)
}

/// Checks a parameter's value against its recorded type.
fn param(row: &SqliteRow) -> Result<(), String> {
    let kind: &str = row.try_get(0).map_err(|error| error.to_string())?;
    let value = row.try_get_raw(1).map_err(|error| error.to_string())?;
    let stored = match value.is_null() {
        true => "NULL".to_owned(),
        false => value.type_info().name().to_owned(),
    };
    let text = || {
        row.try_get_unchecked::<&str, _>(1)
            .map_err(|_| "it is not text in UTF-8".to_owned())
    };
    let fits = match (kind, stored.as_str()) {
        ("null", "NULL") | ("integer", "INTEGER") | ("real", "REAL" | "NULL") => true,
        ("boolean", "INTEGER") => matches!(row.try_get_unchecked(1), Ok(0_i64 | 1)),
        ("text", "TEXT") => text().map(|_| true)?,
        ("array", "TEXT") => is::<Vec<Value>>(light(text()?)?),
        ("object", "TEXT") => is::<Map<String, Value>>(light(text()?)?),
        _ => false,
    };
    match fits {
        true => Ok(()),
        false => Err(format!("it is not of the type {kind}")),
    }
}

/// Checks that an artifact's hash matches its list of files.
fn files(row: &SqliteRow) -> Result<(), String> {
    let hash: &str = row.try_get(0).map_err(|error| error.to_string())?;
    let size: i64 = row.try_get(1).map_err(|error| error.to_string())?;
    let text: &str = row
        .try_get(2)
        .map_err(|_| "it is not text in UTF-8".to_owned())?;
    let files: Vec<ArtifactFile> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let size = u64::try_from(size).map_err(|_| {
        format!("artifact {hash} is recorded with {size} bytes; expected 0 or more")
    })?;
    artifact::check_list(hash, size, &files)
}

/// Maximum bytes of a run's lists of artifacts and series: many stages may refer to one attempt, and many outputs to one
/// artifact, so a small file could need much memory.
const MOST_OF_A_RUN: i64 = 64 << 20;

/// The most memory of a run's JSON values, or of a sweep's, as estimated by [`json::weight`]: `compare` holds several runs, and
/// `resume` the same values in several forms.
const HEAVIEST_RUN: usize = 96 << 20;

/// Attempts that a run may have, all stages together.
const MOST_ATTEMPTS: usize = 20_000;

/// Checks that a run has no more stages than a recipe may have, and not too many attempts.
async fn counted(connection: &mut SqliteConnection) -> Result<(), ImportError> {
    let sql = format!(
        "select r.id, count(*), sum(octet_length(s.options) + ifnull(octet_length(s.components), 0) + octet_length(s.inputs))
         from main.stages s join main.runs r on r.key = s.run group by r.key
         having count(*) > {MAX_STAGES} or 1.0 * sum(octet_length(s.options) + ifnull(octet_length(s.components), 0) + octet_length(s.inputs))
             > {MOST_OF_A_RUN}"
    );
    each(connection, sql, |row| {
        let id: &str = row.try_get(0).map_err(|error| error.to_string())?;
        Err(format!(
            "its run {} has more than {MAX_STAGES} stages, or they take more than {} MiB",
            brief(id),
            MOST_OF_A_RUN >> 20
        ))
    })
    .await?;
    let sql = format!(
        "select r.id from main.attempts a join main.stages s on s.key = a.stage join main.runs r on r.key = s.run
         group by r.key having count(*) > {MOST_ATTEMPTS}"
    );
    each(connection, sql, |row| {
        let id: &str = row.try_get(0).map_err(|error| error.to_string())?;
        Err(format!(
            "its run {} has more than {MOST_ATTEMPTS} attempts",
            brief(id)
        ))
    })
    .await
}

/// Checks the size of what a run refers to, counting each reference.
async fn repeated(connection: &mut SqliteConnection) -> Result<(), ImportError> {
    let sql = format!(
        "with listed as materialized (select hash, octet_length(files) as bytes from main.artifacts),
              given as materialized (select attempt, count(*) as count from main.inputs group by attempt),
              made as materialized (
                  select o.attempt, sum(f.bytes + octet_length(o.meta)) + 100 * count(*) * coalesce(g.count, 0) as bytes
                  from main.outputs o join listed f on f.hash = o.artifact left join given g on g.attempt = o.attempt
                  group by o.attempt),
              told as materialized (select attempt, 200 * count(*) as bytes from main.series group by attempt)
         select r.id from main.v_stage_attempts v join main.runs r on r.key = v.run
             left join made m on m.attempt = v.attempt left join told t on t.attempt = v.attempt
         group by r.key
         having sum(coalesce(m.bytes, 0) + coalesce(t.bytes, 0)) > {MOST_OF_A_RUN}"
    );
    each(connection, sql, |row| {
        let id: &str = row.try_get(0).map_err(|error| error.to_string())?;
        Err(format!(
            "its run {} names so many artifacts and series, or so often, that they take more than {} MiB",
            brief(id),
            MOST_OF_A_RUN >> 20
        ))
    })
    .await
}

/// Checks the memory that the JSON values of a run, or of a sweep, take. An attempt counts as often as it is referenced.
async fn weighed(connection: &mut SqliteConnection) -> Result<(), ImportError> {
    let of_runs = "select key, command from main.runs
         union all select run, resolved from main.documents
         union all select run, environment from main.documents
         union all select run, value from main.params where type in ('array', 'object')
         union all select run, options from main.stages
         union all select run, inputs from main.stages
         union all select run, components from main.stages where components is not null";
    let of_attempts = "select key, summary from main.attempts where summary is not null
         union all select key, failure from main.attempts where failure is not null
         union all select attempt, meta from main.outputs";
    let of_sweeps = "select key, settings from main.sweeps
         union all select key, definition from main.sweeps
         union all select key, selection from main.sweeps
         union all select sweep, settings from main.sweep_points";
    let mut runs = weights(connection, of_runs).await?;
    let attempts = weights(connection, of_attempts).await?;
    let sql = "select run, attempt from main.v_stage_attempts where attempt is not null";
    each(connection, sql.into(), |row| {
        let (run, attempt): (i64, i64) =
            sqlx::FromRow::from_row(row).map_err(|error| error.to_string())?;
        let own = attempts.get(&attempt).copied().unwrap_or_default();
        let run: &mut usize = runs.entry(run).or_default();
        *run = run.saturating_add(own);
        Ok(())
    })
    .await?;
    let sweeps = weights(connection, of_sweeps).await?;
    for (what, table, weights) in [("run", "runs", runs), ("sweep", "sweeps", sweeps)] {
        let Some((key, _)) = weights.iter().find(|(_, weight)| **weight > HEAVIEST_RUN) else {
            continue;
        };
        let sql = format!("select id from main.{table} where key = {key}");
        each(connection, sql, |row| {
            let id: &str = row.try_get(0).map_err(|error| error.to_string())?;
            Err(format!(
                "its {what} {} has so many values that they would take more than {} MiB of memory",
                brief(id),
                HEAVIEST_RUN >> 20
            ))
        })
        .await?;
    }
    Ok(())
}

/// The weight of the values of each key.
async fn weights(
    connection: &mut SqliteConnection,
    sql: &str,
) -> Result<HashMap<i64, usize>, ImportError> {
    let mut weights: HashMap<i64, usize> = HashMap::new();
    each(connection, sql.into(), |row| {
        let wrong = |error: sqlx::Error| error.to_string();
        let key = row.try_get_unchecked(0).map_err(wrong)?;
        let text: &str = row.try_get_unchecked(1).map_err(wrong)?;
        let weight = weights.entry(key).or_default();
        *weight = weight.saturating_add(json::weight(text.as_bytes()));
        Ok(())
    })
    .await?;
    Ok(weights)
}

/// Checks that a sweep's points are complete and numbered from 1, and that its runs and rungs refer to them.
async fn sweeps(connection: &mut SqliteConnection) -> Result<(), ImportError> {
    let sql = "select w.id from main.sweeps w
         where w.points != (select count(*) from main.sweep_points p where p.sweep = w.key)
            or w.points != (select coalesce(max(p.point), 0) from main.sweep_points p where p.sweep = w.key)
            or exists (select 1 from main.sweep_points p where p.sweep = w.key and p.point = 0)
            or exists (select 1 from main.sweep_rungs g where g.sweep = w.key and g.point not between 1 and w.points)
            or exists (select 1 from main.runs r
                       where r.sweep = w.key and ifnull(r.point, 0) not between 1 and w.points)";
    each(connection, sql.into(), |row| {
        let id: &str = row.try_get(0).map_err(|error| error.to_string())?;
        Err(format!(
            "the points of its sweep {} are not those that its runs have",
            brief(id)
        ))
    })
    .await?;
    let sql = format!("select id from main.sweeps where points > {MAX_POINTS}");
    each(connection, sql, |row| {
        let id: &str = row.try_get(0).map_err(|error| error.to_string())?;
        Err(format!(
            "its sweep {} has more than the {MAX_POINTS} points that a sweep may have",
            brief(id)
        ))
    })
    .await
}

/// Checks blocks of points: each must match its summary, and those of a series must not overlap.
async fn blocks(connection: &mut SqliteConnection) -> Result<(), ImportError> {
    let mut before = None;
    let sql = "select b.series, b.first_step, b.last_step, b.points, b.numbers, k.data, e.base
         from main.blocks b join main.series e on e.key = b.series left join main.packs k on k.key = b.pack
         order by b.series, b.first_step";
    each(connection, sql.into(), |row| {
        let fault = |what: &str| format!("a block of points in its table `blocks` {what}");
        let (series, first, last, points, numbers, data, base): Block =
            sqlx::FromRow::from_row(row).map_err(|error| fault(&error.to_string()))?;
        let data = data.ok_or_else(|| fault("has no points"))?;
        let unpacked = block::unpack(&data).map_err(|_| fault("cannot be unpacked"))?;
        if unpacked.is_empty() || !unpacked.is_sorted_by(|a, b| a.step < b.step) {
            return Err(fault("has no points, or not in the order of their steps"));
        }
        let times = unpacked.iter().map(|point| base.checked_add(point.at));
        if !times
            .into_iter()
            .all(|at| at.is_some_and(|at| (0..=Time::LAST.0).contains(&at)))
        {
            return Err(fault("has points at impossible times"));
        }
        let found = block::Summary::of(&unpacked);
        let said = (first, last, points, numbers);
        if said
            != (
                found.first_step,
                found.last_step,
                found.points,
                found.numbers,
            )
        {
            return Err(fault("has another number of points than its record says"));
        }
        if before.is_some_and(|(known, end)| known == series && first <= end) {
            return Err(fault("overlaps another"));
        }
        before = Some((series, last));
        Ok(())
    })
    .await
}

type Block = (i64, i64, i64, i64, i64, Option<Vec<u8>>, i64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_hashes_are_what_a_store_writes() {
        let hash = "0123456789abcdef".repeat(4);
        assert!(is_hash(&hash));
        for wrong in [
            "",
            "..",
            "../../x",
            &hash[1..],
            &hash.to_uppercase(),
            &format!("{hash}0"),
        ] {
            assert!(!is_hash(wrong), "{wrong}");
        }
        assert!(is_name("größte/loss 1") && !is_name("\x1b[2J") && !is_name(&"x".repeat(2000)));
    }

    #[test]
    fn paths_stay_within_their_artifact() {
        for inner in ["a", "a/b.c", "..a/b..", "größe"] {
            assert!(artifact::is_inner_path(inner), "{inner}");
        }
        for outer in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "a/../b",
            "./a",
            "a/.",
            "a//b",
            "a/",
            "a\0b",
            "a\nb",
        ] {
            assert!(!artifact::is_inner_path(outer), "{outer:?}");
        }
        assert!(!artifact::is_inner_path(&"x".repeat(256)));
        assert!(!artifact::is_inner_path(&"x/".repeat(4000)));
    }

    #[test]
    fn ranges_of_sweeps_go_upwards() {
        let sweep = |values: &str| {
            format!(
                r#"{{"parameters":[{{"path":"seed",{values}}}],"objective":null,"sample":null,"asha":null}}"#
            )
        };
        assert!(is_sweep(&sweep(r#""whole":{"min":1,"max":3,"log":true}"#)));
        for wrong in [
            r#""whole":{"min":3,"max":1,"log":false}"#,
            r#""whole":{"min":0,"max":3,"log":true}"#,
            r#""real":{"min":65536.0,"max":1.0,"log":true,"count":1}"#,
            r#""real":{"min":0.0,"max":1.0,"log":false,"count":0}"#,
            r#""choice":[]"#,
        ] {
            assert!(!is_sweep(&sweep(wrong)), "{wrong}");
            let read: Sweep = serde_json::from_str(&sweep(wrong)).unwrap();
            assert!(read.points().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_preview_is_a_file_of_its_artifact() {
        let meta = |preview: &str| serde_json::json!({ "preview": preview }).to_string();
        assert!(is_meta("{}") && is_meta(&meta("grid.png")));
        assert!(!is_meta(&meta("../../secret.png")) && !is_meta("[]") && !is_meta("3"));
    }
}
