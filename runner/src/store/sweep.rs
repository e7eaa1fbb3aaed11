//! Sweeps in the store: their definitions, their points with the run of each, and the values by which points are compared.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::reference::steps_back;
use super::{RunId, RunState, Store, StoreError, Time, json, record, variant};
use crate::sweep::Sweep;

/// Names a sweep: `s` and ten characters, sorting by time of creation.
#[derive(
    Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct SweepId(pub String);

impl std::fmt::Display for SweepId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// Which point of which sweep a run is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SweepPlace {
    /// The sweep.
    pub id: SweepId,
    /// The point: 1, 2, ...
    pub point: u32,
}

/// A sweep's definition: everything that determines its points.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepPlan {
    /// The recipe's name.
    pub recipe: String,
    /// Where it was read from, absolute.
    pub recipe_path: String,
    /// As it was written.
    pub recipe_text: String,
    /// The changes by `--set`, which all points share.
    pub settings: Vec<String>,
    /// Parameters, objective, and how points are chosen and stopped.
    pub definition: Sweep,
    /// The choice of stages.
    pub selection: Value,
}

/// A sweep in brief.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepSummary {
    /// Its id.
    pub id: SweepId,
    /// The recipe's name.
    pub recipe: String,
    /// When it was begun.
    pub started: Time,
    /// How many points it has.
    pub points: u32,
    /// Points that have succeeded.
    pub succeeded: u32,
    /// Points whose newest run is under way.
    pub running: u32,
    /// Points whose newest run has failed or is lost.
    pub failed: u32,
    /// Points whose newest run was stopped.
    pub stopped: u32,
    /// Its objective: metric and goal.
    pub objective: Option<Value>,
}

/// A sweep with its points.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepDetail {
    /// Its id.
    pub id: SweepId,
    /// When it was begun.
    pub started: Time,
    /// Its definition.
    #[serde(flatten)]
    pub plan: SweepPlan,
    /// Its points, by number.
    pub points: Vec<SweepPoint>,
}

/// A point of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SweepPoint {
    /// Its number: 1, 2, ...
    pub number: u32,
    /// What it changes: `path=value`.
    pub settings: Vec<String>,
    /// Its newest run, which counts for it, and the state of that; None if it has not begun.
    pub run: Option<(RunId, RunState)>,
    /// The objective's values, rung by rung; None is NaN.
    pub rungs: Vec<Option<f64>>,
}

impl SweepPoint {
    /// Whether its newest run has succeeded.
    pub fn is_done(&self) -> bool {
        matches!(self.run, Some((_, RunState::Succeeded)))
    }
}

impl Store {
    /// Records a sweep and its points.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn begin_sweep(
        &self,
        plan: &SweepPlan,
        points: &[Vec<String>],
    ) -> Result<SweepId, StoreError> {
        let mut write = self.write().await?;
        let now = Time::now();
        let id = loop {
            let id = format!("s{}", record::run_id(now));
            let taken = sqlx::query("select 1 from sweeps where id = ?1")
                .bind(&id)
                .fetch_optional(&mut *write);
            if taken.await?.is_none() {
                break id;
            }
        };
        let key = sqlx::query(
            "insert into sweeps (id, recipe, recipe_path, recipe_text, settings, definition, selection, points, created)
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )
        .bind(&id)
        .bind(&plan.recipe)
        .bind(&plan.recipe_path)
        .bind(&plan.recipe_text)
        .bind(serde_json::json!(plan.settings).to_string())
        .bind(serde_json::json!(plan.definition).to_string())
        .bind(plan.selection.to_string())
        .bind(i64::try_from(points.len()).unwrap_or(i64::MAX))
        .bind(now.0)
        .execute(&mut *write)
        .await?
        .last_insert_rowid();
        for (number, settings) in (1_i64..).zip(points) {
            sqlx::query("insert into sweep_points (sweep, point, settings) values (?1, ?2, ?3)")
                .bind(key)
                .bind(number)
                .bind(serde_json::json!(settings).to_string())
                .execute(&mut *write)
                .await?;
        }
        write.commit().await?;
        Ok(SweepId(id))
    }

    /// Records the objective's value of a point at a rung.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn record_rung(
        &self,
        place: &SweepPlace,
        rung: u32,
        value: f64,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query(
            "insert or replace into sweep_rungs (sweep, point, rung, value)
             values ((select key from sweeps where id = ?1), ?2, ?3, ?4)",
        )
        .bind(&place.id.0)
        .bind(place.point)
        .bind(rung)
        .bind(value)
        .execute(&mut *write)
        .await?;
        write.commit().await
    }

    /// The newest sweep with exactly this definition.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn find_sweep(&self, plan: &SweepPlan) -> Result<Option<SweepId>, StoreError> {
        let found: Option<String> = sqlx::query_scalar(
            "select id from sweeps
             where recipe_path = ?1 and recipe_text = ?2 and settings = ?3 and definition = ?4 and selection = ?5
             order by key desc limit 1",
        )
        .bind(&plan.recipe_path)
        .bind(&plan.recipe_text)
        .bind(serde_json::json!(plan.settings).to_string())
        .bind(serde_json::json!(plan.definition).to_string())
        .bind(plan.selection.to_string())
        .fetch_optional(self.pool())
        .await?;
        Ok(found.map(SweepId))
    }

    /// All sweeps, the newest first.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn list_sweeps(&self) -> Result<Vec<SweepSummary>, StoreError> {
        self.reconcile().await?;
        let rows = sqlx::query(
            "select w.id, w.recipe, w.created, w.points, w.definition ->> '$.objective' as objective,
                    count(*) filter (where r.state = 'succeeded') as succeeded,
                    count(*) filter (where r.state in ('queued', 'running')) as running,
                    count(*) filter (where r.state in ('failed', 'lost')) as failed,
                    count(*) filter (where r.state = 'interrupted') as stopped
             from sweeps w left join (
                 select sweep, point, max(key),
                        case when state in ('queued', 'running')
                             then coalesce((select value from json_each(?1) where key = runs.id), state) else state end as state
                 from runs
                 where sweep is not null group by sweep, point
             ) r on r.sweep = w.key
             group by w.key order by w.key desc",
        )
        .bind(self.unrecorded_states())
        .fetch_all(self.pool())
        .await?;
        let summary = |row: &SqliteRow| {
            let objective: Option<&str> = row.try_get("objective")?;
            Ok(SweepSummary {
                id: SweepId(row.try_get("id")?),
                recipe: row.try_get("recipe")?,
                started: Time(row.try_get("created")?),
                points: row.try_get("points")?,
                succeeded: row.try_get("succeeded")?,
                running: row.try_get("running")?,
                failed: row.try_get("failed")?,
                stopped: row.try_get("stopped")?,
                objective: objective.and_then(|text| serde_json::from_str(text).ok()),
            })
        };
        rows.iter().map(summary).collect()
    }

    /// A sweep and its points.
    ///
    /// # Errors
    /// [`StoreError::NoSweep`], [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn sweep_detail(&self, sweep: &SweepId) -> Result<SweepDetail, StoreError> {
        self.reconcile().await?;
        let row = sqlx::query(
            "select key, recipe, recipe_path, recipe_text, settings, definition, selection, created
             from sweeps where id = ?1",
        )
        .bind(&sweep.0)
        .fetch_optional(self.pool())
        .await?;
        let row = row.ok_or_else(|| StoreError::NoSweep {
            reference: sweep.0.clone(),
        })?;
        let key: i64 = row.try_get("key")?;
        Ok(SweepDetail {
            id: sweep.clone(),
            started: Time(row.try_get("created")?),
            plan: SweepPlan {
                recipe: row.try_get("recipe")?,
                recipe_path: row.try_get("recipe_path")?,
                recipe_text: row.try_get("recipe_text")?,
                settings: json(&row, "settings")?,
                definition: json(&row, "definition")?,
                selection: json(&row, "selection")?,
            },
            points: self.sweep_points(key).await?,
        })
    }

    async fn sweep_points(&self, sweep: i64) -> Result<Vec<SweepPoint>, StoreError> {
        let rungs: Vec<(u32, Option<f64>)> = sqlx::query_as(
            "select point, value from sweep_rungs where sweep = ?1 order by point, rung",
        )
        .bind(sweep)
        .fetch_all(self.pool())
        .await?;
        let mut by_point: BTreeMap<u32, Vec<Option<f64>>> = BTreeMap::new();
        for (point, value) in rungs {
            by_point.entry(point).or_default().push(value);
        }
        let rows = sqlx::query(
            "select p.point, p.settings, r.id,
                    case when r.state in ('queued', 'running')
                         then coalesce((select value from json_each(?2) where key = r.id), r.state)
                         else r.state end as state
             from sweep_points p left join (
                 select point, id, state, max(key) from runs where sweep = ?1 group by point
             ) r on r.point = p.point
             where p.sweep = ?1 order by p.point",
        )
        .bind(sweep)
        .bind(self.unrecorded_states())
        .fetch_all(self.pool())
        .await?;
        let point = |row: &SqliteRow| {
            let number = row.try_get("point")?;
            let run: Option<String> = row.try_get("id")?;
            Ok(SweepPoint {
                number,
                settings: json(row, "settings")?,
                run: match run {
                    Some(id) => Some((RunId(id), variant(row, "state")?)),
                    None => None,
                },
                rungs: by_point.remove(&number).unwrap_or_default(),
            })
        };
        let mut point = point;
        rows.iter().map(&mut point).collect()
    }

    /// The sweep meant by `reference`: `latest`, `latest~N`, its id or a beginning that no other sweep shares.
    ///
    /// # Errors
    /// [`StoreError::NoSweep`], [`StoreError::AmbiguousSweep`].
    pub async fn resolve_sweep(&self, reference: &str) -> Result<SweepId, StoreError> {
        let missing = || StoreError::NoSweep {
            reference: reference.to_owned(),
        };
        if let Some(steps) = steps_back(reference) {
            let found: Option<String> =
                sqlx::query_scalar("select id from sweeps order by key desc limit 1 offset ?1")
                    .bind(steps)
                    .fetch_optional(self.pool())
                    .await?;
            return found.map(SweepId).ok_or_else(missing);
        }
        let prefix = reference.trim().to_ascii_lowercase();
        if !prefix.starts_with('s') || !prefix.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(missing());
        }
        let found = self.only_match(
            "select id from sweeps where id >= ?1 and id < ?1 || '~' order by key desc limit 20",
            prefix,
            |reference, candidates| StoreError::AmbiguousSweep {
                reference,
                candidates,
            },
        );
        found.await?.map(SweepId).ok_or_else(missing)
    }
}

/// Whether a text may be the id of a sweep.
pub(super) fn is_sweep_id(text: &str) -> bool {
    text.strip_prefix('s').is_some_and(record::is_run_id)
}
