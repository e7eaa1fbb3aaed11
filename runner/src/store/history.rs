//! Queries on recorded runs. One named function per query.

use std::ops::ControlFlow;
use std::time::Duration;

use futures_util::TryStreamExt;
use retort_abi::{ArtifactMeta, Description, Failure};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::select::Sort;
use super::time::Time;
use super::{
    ArtifactFile, ArtifactRecord, AttemptId, AttemptState, Param, RecordedPlugin, RunId, RunState,
    StageId, StageState, Store, StoreError, SweepId, SweepPlace, Usage, json, json_or_none,
    variant,
};
use crate::filter::{Filter, Name};

/// Which runs to list.
#[derive(Debug, Clone, Default)]
pub struct RunFilter {
    /// At most this many, the newest.
    pub limit: Option<u32>,
    /// How many of the first ones to leave out.
    pub skip: u32,
    /// In one of these states; any when empty.
    pub states: Vec<RunState>,
    /// Of the recipe with this name.
    pub recipe: Option<String>,
    /// That pass this filter.
    pub expr: Option<Filter>,
    /// In this order; the newest first among equals.
    pub sort: Vec<Sort>,
    /// With the values of these fields.
    pub columns: Vec<Name>,
}

/// A run in brief.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunSummary {
    /// Its id.
    pub id: RunId,
    /// Name of its recipe.
    pub recipe: String,
    /// Its state, true as of now.
    pub state: RunState,
    /// When it began.
    pub started: Time,
    /// When it ended; for a lost run, when it was last heard of.
    pub finished: Option<Time>,
    /// From its beginning to its end, or to now, in seconds.
    pub seconds: f64,
    /// Its stages, counted.
    #[serde(rename = "stage_counts")]
    pub stages: StageCounts,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its note, written by a user.
    pub note: String,
    /// Why it did not succeed.
    pub error: Option<String>,
    /// The recipe's seed.
    pub seed: u64,
    /// The path of the recipe.
    pub recipe_path: String,
    /// The arguments of the command.
    pub command: Vec<String>,
    /// The run that it resumed.
    pub resumed_from: Option<RunId>,
    /// Its point of a sweep, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepPlace>,
    /// The values of the columns asked for.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub values: Map<String, Value>,
}

/// How many stages of a run had each outcome.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StageCounts {
    /// All of them.
    pub total: u32,
    /// Ran in this run, however they ended.
    pub ran: u32,
    /// Were taken from an earlier run.
    pub reused: u32,
    /// Failed.
    pub failed: u32,
}

impl StageCounts {
    /// For people: `4 ran, 2 reused of 7`.
    pub fn in_words(self) -> String {
        let named = [
            (self.ran, "ran"),
            (self.reused, "reused"),
            (self.failed, "failed"),
        ];
        let parts = named
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, name)| format!("{count} {name}"));
        let parts = parts.collect::<Vec<_>>().join(", ");
        if self.ran + self.reused < self.total {
            let rest = if parts.is_empty() {
                String::new()
            } else {
                format!("{parts} ")
            };
            format!("{rest}of {}", self.total)
        } else {
            parts
        }
    }
}

/// Everything about a run except its metrics and logs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunDetail {
    /// In brief.
    #[serde(flatten)]
    pub summary: RunSummary,
    /// The recipe as it was written.
    pub recipe_text: String,
    /// The recipe with every default filled in.
    pub resolved: Value,
    /// Every value of it, with its origin.
    pub params: Vec<Param>,
    /// Where it ran.
    pub environment: Value,
    /// Its stages in order of execution.
    pub stages: Vec<StageDetail>,
    /// Its artifacts, those of reused stages included.
    pub artifacts: Vec<ArtifactRow>,
}

/// A stage of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageDetail {
    /// Its id.
    pub id: StageId,
    /// Name in the recipe.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its state, true as of now.
    pub state: StageState,
    /// What ran it.
    pub plugin: RecordedPlugin,
    /// `cpu`, `cuda:0`.
    pub device: String,
    /// `f32`, `bf16`.
    pub dtype: String,
    /// Seed of its random numbers.
    pub seed: u64,
    /// Complete options.
    pub options: Value,
    /// References: pointer into the options, name of the stage.
    pub inputs: Vec<(String, String)>,
    /// Its digest, once known.
    pub digest: Option<String>,
    /// The stage it was taken from.
    pub reused_from: Option<SourceStage>,
    /// Attempts made in this run.
    pub attempts: Vec<AttemptDetail>,
}

/// Where a reused stage came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceStage {
    /// The run.
    pub run: RunId,
    /// The stage.
    pub stage: String,
    /// The attempt.
    pub attempt: AttemptId,
}

/// An attempt at a stage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttemptDetail {
    /// Its id.
    pub id: AttemptId,
    /// 1, 2, ...
    pub number: u32,
    /// Its state, true as of now.
    pub state: AttemptState,
    /// How it ended, precisely.
    pub reason: Option<String>,
    /// For people.
    pub message: Option<String>,
    /// The plugin's failure.
    pub failure: Option<Failure>,
    /// Facts the stage returned.
    pub summary: Option<Value>,
    /// The hash of the artifact that references to the stage mean.
    pub output: Option<String>,
    /// When it began.
    pub started: Time,
    /// When it ended.
    pub finished: Option<Time>,
    /// From its beginning to its end, or to now while it runs; None if lost.
    pub seconds: Option<f64>,
    /// The resources that it used.
    #[serde(flatten)]
    pub usage: Usage,
    /// Process id of its worker; 0 on a cluster.
    pub worker_pid: u32,
    /// Why nothing of it runs yet, on a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
}

/// An artifact of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ArtifactRow {
    /// The artifact.
    #[serde(flatten)]
    pub artifact: ArtifactRecord,
    /// The run it belongs to.
    pub run: RunId,
    /// The stage of that run.
    pub stage: String,
    /// The attempt that made it.
    pub attempt: AttemptId,
    /// Whether the stage was reused: the attempt is another run's.
    pub reused: bool,
    /// Whether references to the stage mean this artifact.
    pub is_output: bool,
    /// When it was made.
    pub created: Time,
    /// Hashes of the artifacts that its attempt was given.
    pub made_from: Vec<String>,
}

/// An earlier attempt that can be reused for a stage with the same digest.
#[derive(Debug, Clone, PartialEq)]
pub struct ReusableAttempt {
    /// The attempt.
    pub attempt: AttemptId,
    /// The run it was made in.
    pub run: RunId,
    /// The artifact that references to the stage mean. The caller checks whether it still exists.
    pub output: ArtifactRecord,
}

/// The last known execution of a stage, to tell why it would run again.
#[derive(Debug, Clone, PartialEq)]
pub struct LastExecution {
    /// The run.
    pub run: RunId,
    /// The stage's digest then.
    pub digest: String,
    /// The parts of the digest, by name.
    pub components: Value,
    /// How it went.
    pub state: StageState,
}

/// Artifacts that one statement reads. Between statements others can empty the write-ahead log.
const ARTIFACTS_AT_ONCE: usize = 256;

impl Store {
    /// Runs, the newest first unless the filter says otherwise.
    ///
    /// # Errors
    /// [`StoreError::Filter`], [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn list_runs(&self, filter: &RunFilter) -> Result<Vec<RunSummary>, StoreError> {
        self.reconcile().await?;
        let found = self.find_runs(filter).await?;
        let mut runs = self.select_runs(&found.keys).await?;
        for (run, values) in runs.iter_mut().zip(found.values) {
            run.values = values;
        }
        Ok(runs)
    }

    /// Everything about one run except metrics and logs.
    ///
    /// # Errors
    /// [`StoreError::NoRun`], [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn run_detail(&self, run: &RunId) -> Result<RunDetail, StoreError> {
        self.reconcile().await?;
        let missing = || StoreError::NoRun {
            reference: run.0.clone(),
            runs: 0,
        };
        let key = self.run_key(run).await?.ok_or_else(missing)?;
        let summary = self.select_runs(&[key]).await?.pop().ok_or_else(missing)?;
        let row = sqlx::query("select recipe_text, resolved, environment from documents where run = (select key from runs where id = ?1)")
            .bind(&run.0)
            .fetch_one(self.pool())
            .await?;
        let mut detail = RunDetail {
            recipe_text: row.try_get("recipe_text")?,
            resolved: json(&row, "resolved")?,
            environment: json(&row, "environment")?,
            params: self.params(run).await?,
            stages: self.stages(run, summary.state).await?,
            artifacts: self.list_artifacts(Some(run)).await?,
            summary,
        };
        self.show_unrecorded(&mut detail);
        Ok(detail)
    }

    /// The key of a run. Statements on views bind this key instead of looking it up by the run's id: SQLite pushes only bound
    /// values down into a view, which is then computed from the rows of this run instead of from all.
    pub(super) async fn run_key(&self, run: &RunId) -> Result<Option<i64>, StoreError> {
        let key = sqlx::query_scalar("select key from runs where id = ?1")
            .bind(&run.0)
            .fetch_optional(self.pool())
            .await?;
        Ok(key)
    }

    /// The resolved values of a run with their origins, in the recipe's order of paths.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn params(&self, run: &RunId) -> Result<Vec<Param>, StoreError> {
        let rows = sqlx::query(
            "select n.name as path, p.value, p.type, p.origin from params p join names n on n.key = p.name
             where p.run = (select key from runs where id = ?1)
             order by n.name",
        )
        .bind(&run.0)
        .fetch_all(self.pool())
        .await?;
        rows.iter()
            .map(|row| {
                Ok(Param {
                    path: row.try_get("path")?,
                    value: param_value(row)?,
                    origin: row.try_get("origin")?,
                })
            })
            .collect()
    }

    /// Artifacts of a run, or of all runs, in the order in which they were made. An artifact of a reused stage is listed for
    /// the named run if that reuses it; without a named run it is listed only for the run that made it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn list_artifacts(
        &self,
        run: Option<&RunId>,
    ) -> Result<Vec<ArtifactRow>, StoreError> {
        let mut all = Vec::new();
        let take = |row| {
            all.push(row);
            ControlFlow::Continue(())
        };
        self.each_artifact(run, take).await?;
        all.reverse();
        Ok(all)
    }

    /// Passes the same artifacts to `take`, the newest first, until that has enough. Their rows are read one by one: there may
    /// be many, and the list of files of each may be long.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn each_artifact(
        &self,
        run: Option<&RunId>,
        mut take: impl FnMut(ArtifactRow) -> ControlFlow<()>,
    ) -> Result<(), StoreError> {
        // The last list of files, because several results in a row are often the same artifact.
        let (mut hash, mut files) = (String::new(), Vec::new());
        for keys in self.artifact_keys(run).await?.chunks(ARTIFACTS_AT_ONCE) {
            // The left side of a cross join is its outer loop: rows come in the order of the keys, without being sorted.
            let mut rows = sqlx::query(
                "select o.artifact as hash, o.kind, o.name, f.size, f.files, o.meta, r.id as run, s.name as stage,
                        o.attempt, a.stage <> s.key as reused, coalesce(a.output = o.artifact, 0) as is_output, o.created,
                        (select json_group_array(i.artifact) from inputs i where i.attempt = o.attempt) as made_from
                 from json_each(?1) k
                 cross join outputs o on o.key = k.value ->> 0
                 cross join stages s on s.key = k.value ->> 1
                 cross join attempts a on a.key = o.attempt
                 cross join artifacts f on f.hash = o.artifact
                 cross join runs r on r.key = s.run",
            )
            .bind(serde_json::json!(keys).to_string())
            .fetch(self.pool());
            while let Some(row) = rows.try_next().await? {
                let own: &str = row.try_get("hash")?;
                if own != hash {
                    (hash, files) = (own.to_owned(), json(&row, "files")?);
                }
                if take(artifact_row(&row, files.clone())?).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The newest result with this hash, of the run that made it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn newest_with_hash(&self, hash: &str) -> Result<Option<ArtifactRow>, StoreError> {
        let mut found = None;
        let take = |row: ArtifactRow| {
            if row.artifact.hash != hash {
                return ControlFlow::Continue(());
            }
            found = Some(row);
            ControlFlow::Break(())
        };
        self.each_artifact(None, take).await?;
        Ok(found)
    }

    /// The keys of artifacts as results, and of their stages, in the order of [`Self::each_artifact`].
    async fn artifact_keys(&self, run: Option<&RunId>) -> Result<Vec<(i64, i64)>, StoreError> {
        // Two separate conditions, because SQLite can push each into the view. Otherwise it would compute the whole view.
        let (key, wanted) = match run {
            Some(run) => (self.run_key(run).await?, "v.run = ?1"),
            None => (None, "?1 is null and v.reused = 0"),
        };
        let keys = sqlx::query_as(sqlx::AssertSqlSafe(format!(
            "select o.key, v.stage
             from v_stage_attempts v
             join outputs o on o.attempt = v.attempt
             join stages s on s.key = v.stage
             where {wanted}
             order by s.run desc, s.position desc, s.key desc, o.key desc"
        )));
        Ok(keys.bind(key).fetch_all(self.pool()).await?)
    }

    /// The record of an artifact, by its hash, as its newest attempt gave it.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn find_artifact(&self, hash: &str) -> Result<Option<ArtifactRecord>, StoreError> {
        let row = sqlx::query(
            "select o.artifact as hash, o.kind, o.name, f.size, f.files, o.meta
             from outputs o join artifacts f on f.hash = o.artifact
             where o.artifact = ?1 order by o.key desc limit 1",
        )
        .bind(hash)
        .fetch_optional(self.pool())
        .await?;
        let record = |row: &SqliteRow| artifact_record(row, json(row, "files")?);
        Ok(row.as_ref().map(record).transpose()?)
    }

    /// The newest successful attempt with a digest.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn find_success(&self, digest: &str) -> Result<Option<ReusableAttempt>, StoreError> {
        let row = sqlx::query(
            "select a.key as attempt, r.id as run, o.artifact as hash, o.kind, o.name, f.size, f.files, o.meta
             from attempts a
             join outputs o on o.attempt = a.key and o.artifact = a.output
             join artifacts f on f.hash = o.artifact
             join stages s on s.key = a.stage
             join runs r on r.key = s.run
             where a.digest = ?1 and a.state = 'succeeded'
             order by a.key desc, o.key desc limit 1",
        )
        .bind(digest)
        .fetch_optional(self.pool())
        .await?;
        row.map(|row| {
            Ok(ReusableAttempt {
                attempt: AttemptId(row.try_get("attempt")?),
                run: RunId(row.try_get("run")?),
                output: artifact_record(&row, json(&row, "files")?)?,
            })
        })
        .transpose()
    }

    /// The newest execution, or reuse, of a stage of this name in a run of a recipe of that name.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn last_execution(
        &self,
        recipe: &str,
        stage: &str,
    ) -> Result<Option<LastExecution>, StoreError> {
        let row = sqlx::query(
            // From the recipe's newest run to older ones: a cross join keeps this order of tables. Only among runs that are as
            // old as some stage of this name: a name that no run has is looked up once.
            "select r.id, r.state as run_state, s.digest, s.components, s.state
             from runs r cross join stages s on s.run = r.key and s.name = ?2
             where r.recipe = ?1 and s.digest is not null
               and r.key between (select min(run) from stages where name = ?2)
                             and (select max(run) from stages where name = ?2)
             order by r.key desc limit 1",
        )
        .bind(recipe)
        .bind(stage)
        .fetch_optional(self.pool())
        .await?;
        row.map(|row| {
            Ok(LastExecution {
                run: RunId(row.try_get("id")?),
                digest: row.try_get("digest")?,
                components: json(&row, "components")?,
                state: shown(variant(&row, "state")?, variant(&row, "run_state")?),
            })
        })
        .transpose()
    }

    /// A plugin's description of itself, by the hash of its file.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn cached_description(
        &self,
        plugin_hash: &str,
    ) -> Result<Option<Description>, StoreError> {
        let row = sqlx::query("select description from descriptions where plugin_hash = ?1")
            .bind(plugin_hash)
            .fetch_optional(self.pool())
            .await?;
        // A description of another version of the messages is no description: the plugin is asked again.
        Ok(row.and_then(|row| json(&row, "description").ok()))
    }

    /// The runs with these keys, in their order.
    async fn select_runs(&self, keys: &[i64]) -> Result<Vec<RunSummary>, StoreError> {
        let rows = sqlx::query(
            "select r.id, r.recipe, r.created, r.finished, r.error, r.seed, r.recipe_path, r.command, r.resumed_from,
                    r.note, (select id from sweeps where key = r.sweep) as sweep, r.point,
                    case when r.state in ('queued', 'running')
                         then coalesce((select value from json_each(?1) where key = r.id), r.state)
                         else r.state end as true_state,
                    (select heartbeat from leases where run = r.key) as heartbeat,
                    (select json_group_array(tag) from tags where run = r.key) as tags,
                    (select count(*) from stages where run = r.key) as total,
                    (select count(*) from stages s where run = r.key
                        and exists (select 1 from attempts where stage = s.key)) as ran,
                    (select count(*) from stages where run = r.key and state = 'reused') as reused,
                    (select count(*) from stages where run = r.key and state = 'failed') as failed
             from json_each(?2) wanted cross join runs r on r.key = wanted.value
             order by wanted.key",
        )
        .bind(self.unrecorded_states())
        .bind(serde_json::json!(keys).to_string())
        .fetch_all(self.pool())
        .await?;
        Ok(rows
            .iter()
            .map(run_summary)
            .collect::<Result<_, sqlx::Error>>()?)
    }

    async fn stages(
        &self,
        run: &RunId,
        run_state: RunState,
    ) -> Result<Vec<StageDetail>, StoreError> {
        let rows = sqlx::query(
            "select s.key, s.name, s.kind, s.state, s.plugin, s.plugin_version, s.plugin_hash, s.device, s.dtype,
                    s.seed, s.options, s.inputs, s.digest, s.reused_from, sr.id as source_run, ss.name as source_stage
             from stages s
             left join attempts a on a.key = s.reused_from
             left join stages ss on ss.key = a.stage
             left join runs sr on sr.key = ss.run
             where s.run = (select key from runs where id = ?1)
             order by s.position, s.key",
        )
        .bind(&run.0)
        .fetch_all(self.pool())
        .await?;
        let mut stages = Vec::with_capacity(rows.len());
        for row in &rows {
            let id = StageId(row.try_get("key")?);
            stages.push(StageDetail {
                id,
                name: row.try_get("name")?,
                kind: row.try_get("kind")?,
                state: shown(variant(row, "state")?, run_state),
                plugin: RecordedPlugin {
                    name: row.try_get("plugin")?,
                    version: row.try_get("plugin_version")?,
                    hash: row.try_get("plugin_hash")?,
                },
                device: row.try_get("device")?,
                dtype: row.try_get("dtype")?,
                seed: row.try_get::<i64, _>("seed")?.cast_unsigned(),
                options: json(row, "options")?,
                inputs: json(row, "inputs")?,
                digest: row.try_get("digest")?,
                reused_from: source_stage(row)?,
                attempts: self.attempts(id, run_state).await?,
            });
        }
        Ok(stages)
    }

    async fn attempts(
        &self,
        stage: StageId,
        run_state: RunState,
    ) -> Result<Vec<AttemptDetail>, StoreError> {
        let rows = sqlx::query(
            "select key, number, state, reason, message, failure, summary, output, started, finished, paused,
                    cpu_seconds, max_rss, worker_pid, waiting
             from attempts where stage = ?1 order by number",
        )
        .bind(stage.0)
        .fetch_all(self.pool())
        .await?;
        Ok(rows
            .iter()
            .map(|row| attempt_detail(row, run_state))
            .collect::<Result<_, sqlx::Error>>()?)
    }
}

/// The state of a stage: as recorded, corrected by the state of its run.
fn shown(stage: StageState, run: RunState) -> StageState {
    match (stage, run) {
        (StageState::Queued | StageState::Running, RunState::Queued | RunState::Running) => stage,
        (StageState::Running, RunState::Lost) => StageState::Lost,
        (StageState::Queued | StageState::Running, _) => StageState::Skipped,
        _ => stage,
    }
}

fn run_summary(row: &SqliteRow) -> Result<RunSummary, sqlx::Error> {
    let state: RunState = variant(row, "true_state")?;
    let started = Time(row.try_get("created")?);
    let heard_of = if state == RunState::Lost {
        row.try_get("heartbeat")?
    } else {
        None
    };
    let finished = row
        .try_get::<Option<i64>, _>("finished")?
        .or(heard_of)
        .map(Time);
    Ok(RunSummary {
        id: RunId(row.try_get("id")?),
        recipe: row.try_get("recipe")?,
        state,
        started,
        finished,
        seconds: finished
            .unwrap_or_else(Time::now)
            .since(started)
            .as_secs_f64(),
        stages: StageCounts {
            total: row.try_get("total")?,
            ran: row.try_get("ran")?,
            reused: row.try_get("reused")?,
            failed: row.try_get("failed")?,
        },
        tags: json(row, "tags")?,
        note: row.try_get("note")?,
        values: Map::new(),
        error: row.try_get("error")?,
        seed: row.try_get::<i64, _>("seed")?.cast_unsigned(),
        recipe_path: row.try_get("recipe_path")?,
        command: json(row, "command")?,
        resumed_from: row.try_get::<Option<String>, _>("resumed_from")?.map(RunId),
        sweep: match row.try_get("sweep")? {
            Some(id) => Some(SweepPlace {
                id: SweepId(id),
                point: row.try_get::<Option<u32>, _>("point")?.unwrap_or_default(),
            }),
            None => None,
        },
    })
}

fn attempt_detail(row: &SqliteRow, run_state: RunState) -> Result<AttemptDetail, sqlx::Error> {
    let mut state: AttemptState = variant(row, "state")?;
    if state == AttemptState::Running && !run_state.is_under_way() {
        state = AttemptState::Lost;
    }
    let started = Time(row.try_get("started")?);
    let finished = row.try_get::<Option<i64>, _>("finished")?.map(Time);
    let paused = row.try_get::<i64, _>("paused")?;
    let paused = Duration::from_millis(paused.unsigned_abs());
    let until = finished.or((state == AttemptState::Running).then(Time::now));
    Ok(AttemptDetail {
        id: AttemptId(row.try_get("key")?),
        number: row.try_get("number")?,
        state,
        reason: row.try_get("reason")?,
        message: row.try_get("message")?,
        failure: json_or_none(row, "failure")?,
        summary: json_or_none(row, "summary")?,
        output: row.try_get("output")?,
        started,
        finished,
        seconds: until.map(|until| until.since(started).saturating_sub(paused).as_secs_f64()),
        usage: Usage {
            cpu_seconds: row.try_get("cpu_seconds")?,
            max_rss: row
                .try_get::<Option<i64>, _>("max_rss")?
                .map(i64::cast_unsigned),
        },
        worker_pid: row.try_get("worker_pid")?,
        waiting: row
            .try_get::<Option<String>, _>("waiting")?
            .filter(|_| state == AttemptState::Running),
    })
}

fn source_stage(row: &SqliteRow) -> Result<Option<SourceStage>, sqlx::Error> {
    let Some(attempt) = row.try_get::<Option<i64>, _>("reused_from")? else {
        return Ok(None);
    };
    Ok(Some(SourceStage {
        run: RunId(row.try_get("source_run")?),
        stage: row.try_get("source_stage")?,
        attempt: AttemptId(attempt),
    }))
}

fn artifact_row(row: &SqliteRow, files: Vec<ArtifactFile>) -> Result<ArtifactRow, sqlx::Error> {
    Ok(ArtifactRow {
        artifact: artifact_record(row, files)?,
        run: RunId(row.try_get("run")?),
        stage: row.try_get("stage")?,
        attempt: AttemptId(row.try_get("attempt")?),
        reused: row.try_get("reused")?,
        is_output: row.try_get("is_output")?,
        created: Time(row.try_get("created")?),
        made_from: json(row, "made_from")?,
    })
}

fn artifact_record(
    row: &SqliteRow,
    files: Vec<ArtifactFile>,
) -> Result<ArtifactRecord, sqlx::Error> {
    Ok(ArtifactRecord {
        hash: row.try_get("hash")?,
        kind: row.try_get("kind")?,
        name: row.try_get("name")?,
        size: row.try_get::<i64, _>("size")?.cast_unsigned(),
        files,
        meta: json::<ArtifactMeta>(row, "meta")?,
    })
}

fn param_value(row: &SqliteRow) -> Result<Value, sqlx::Error> {
    Ok(match row.try_get("type")? {
        "boolean" => Value::Bool(row.try_get("value")?),
        "integer" => Value::from(row.try_get::<i64, _>("value")?),
        "real" => Value::from(row.try_get::<f64, _>("value")?),
        "text" => Value::from(row.try_get::<String, _>("value")?),
        "array" | "object" => json(row, "value")?,
        _ => Value::Null,
    })
}
