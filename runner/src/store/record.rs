//! Records runs, stages, attempts and artifacts as they happen. Each function is one transaction.

use std::hash::{BuildHasher, Hasher};
use std::time::{Duration, Instant};

use retort_abi::{Description, Failure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::sqlite::SqliteConnection;

use super::holder::Holder;
use super::time::Time;
use super::{AttemptId, BUSY_TIMEOUT, RunId, StageId, Store, StoreError, SweepPlace, series};
use crate::artifact::ArtifactRecord;

/// A run about to begin.
#[derive(Debug, Clone, Default)]
pub struct NewRun {
    /// The recipe's name.
    pub recipe_name: String,
    /// Where it was read from, absolute.
    pub recipe_path: String,
    /// As it was written.
    pub recipe_text: String,
    /// With every default filled in.
    pub resolved: Value,
    /// Every value of it, with its origin.
    pub params: Vec<Param>,
    /// The recipe's seed.
    pub seed: u64,
    /// The arguments of the command.
    pub command: Vec<String>,
    /// The run that this one resumes.
    pub resumed_from: Option<RunId>,
    /// Where it runs: see [`crate::environment`].
    pub environment: Value,
    /// Its point of a sweep, if any.
    pub sweep: Option<SweepPlace>,
}

/// A resolved value and where it came from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Param {
    /// Path from the recipe's root: `stages.student.train.steps`.
    pub path: String,
    /// The value.
    pub value: Value,
    /// `recipe:LINE`, `--set`, `params`, `default`, `derived`.
    pub origin: String,
}

/// A stage of a run.
#[derive(Debug, Clone)]
pub struct NewStage {
    /// Name in the recipe.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Place in the order of execution, from 0.
    pub position: usize,
    /// The plugin that runs it.
    pub plugin: RecordedPlugin,
    /// `cpu`, `cuda:0`.
    pub device: String,
    /// `f32`, `bf16`.
    pub dtype: String,
    /// Seed of its random numbers.
    pub seed: u64,
    /// Complete options.
    pub options: Value,
    /// References: pointer into the options, name of the stage referred to.
    pub inputs: Vec<(String, String)>,
}

/// Which plugin, exactly.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedPlugin {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Hex BLAKE3 of its file.
    pub hash: String,
}

/// How an attempt ended.
#[derive(Debug, Clone)]
pub struct AttemptEnd {
    /// In one word.
    pub state: AttemptState,
    /// Precisely: `succeeded`, `panic`, `killed by signal 9`, `timeout`, ...
    pub reason: String,
    /// For people.
    pub message: Option<String>,
    /// The plugin's failure.
    pub failure: Option<Failure>,
    /// Facts the stage returned.
    pub summary: Value,
    /// The hash of the artifact that references to the stage mean, already recorded by [`Store::record_artifact`].
    pub output_artifact: Option<String>,
    /// The resources that it used.
    pub usage: Usage,
    /// How much of its time it was paused.
    pub paused: Duration,
}

/// The resources that an attempt used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time of the worker, user and system, in seconds; with that of all parts.
    pub cpu_seconds: Option<f64>,
    /// Largest resident set of the worker, in bytes; of parts, which run at the same time, the sum.
    pub max_rss: Option<u64>,
}

/// State of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// No stage of it has begun yet. Its runner is alive.
    Queued,
    /// A stage has begun. Its runner is alive.
    Running,
    /// Every stage succeeded or was reused.
    Succeeded,
    /// A stage failed, or the runner did.
    Failed,
    /// Ended by its user.
    Interrupted,
    /// Its runner is gone without having recorded an end.
    Lost,
}

/// State of a stage within a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StageState {
    /// Waits for its inputs or for its turn.
    Queued,
    /// Being run.
    Running,
    /// Ran well.
    Succeeded,
    /// Taken from an earlier run.
    Reused,
    /// Failed.
    Failed,
    /// Stopped by the user.
    Interrupted,
    /// Its runner is gone.
    Lost,
    /// The run ended before its turn.
    Skipped,
}

/// State of an attempt at a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AttemptState {
    /// Under way.
    Running,
    /// Ran well.
    Succeeded,
    /// Failed.
    Failed,
    /// Stopped by the user.
    Interrupted,
    /// Its runner is gone.
    Lost,
}

macro_rules! names {
    ($type:ty: $($variant:ident = $name:literal),+ $(,)?) => {
        impl $type {
            /// As written in JSON and in SQL.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

/// Records something that a run cannot continue without. No result may be lost only because another program fills the disk for
/// a moment: the write is retried for as long as a writer waits for another.
macro_rules! when_there_is_room {
    ($record:expr) => {{
        let began = Instant::now();
        loop {
            let recorded = $record.await;
            if !is_for_a_moment(&recorded, began) {
                break recorded;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }};
}

impl RunState {
    /// All states.
    pub const ALL: [Self; 6] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Interrupted,
        Self::Lost,
    ];

    /// Whether it has not ended.
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::Queued | Self::Running)
    }
}

names!(RunState: Queued = "queued", Running = "running", Succeeded = "succeeded", Failed = "failed",
    Interrupted = "interrupted", Lost = "lost");
names!(StageState: Queued = "queued", Running = "running", Succeeded = "succeeded", Reused = "reused",
    Failed = "failed", Interrupted = "interrupted", Lost = "lost", Skipped = "skipped");
names!(AttemptState: Running = "running", Succeeded = "succeeded", Failed = "failed",
    Interrupted = "interrupted", Lost = "lost");

impl Store {
    /// Records a run as queued, to be executed by this process. Its first attempt sets it to running.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Full`], [`StoreError::ReadOnly`].
    pub async fn begin_run(&self, run: &NewRun) -> Result<RunId, StoreError> {
        let mut write = self.write().await?;
        let now = Time::now();
        let id = loop {
            let id = run_id(now);
            // Two runs may begin within one millisecond and draw the same number; the second draws again.
            let taken = sqlx::query("select 1 from runs where id = ?1")
                .bind(&id.0)
                .fetch_optional(&mut *write);
            if taken.await?.is_none() {
                break id;
            }
        };
        let key = sqlx::query(
            "insert into runs (id, recipe, recipe_path, seed, command, resumed_from, state, created, sweep, point)
             values (?1, ?2, ?3, ?4, ?5, ?6, 'queued', ?7, (select key from sweeps where id = ?8), ?9)",
        )
        .bind(&id.0)
        .bind(&run.recipe_name)
        .bind(&run.recipe_path)
        .bind(run.seed.cast_signed())
        .bind(Value::from(run.command.clone()).to_string())
        .bind(run.resumed_from.as_ref().map(|id| &id.0))
        .bind(now.0)
        .bind(run.sweep.as_ref().map(|place| &place.id.0))
        .bind(run.sweep.as_ref().map(|place| place.point))
        .execute(&mut *write)
        .await?
        .last_insert_rowid();
        sqlx::query("insert into documents (run, recipe_text, resolved, environment) values (?1, ?2, ?3, ?4)")
            .bind(key)
            .bind(&run.recipe_text)
            .bind(run.resolved.to_string())
            .bind(run.environment.to_string())
            .execute(&mut *write)
            .await?;
        insert_lease(&mut write, key, now).await?;
        for param in &run.params {
            insert_param(&mut write, key, param).await?;
        }
        write.commit().await?;
        Ok(id)
    }

    /// Records how a run ended. `error` says why, in a line or two, when it did not succeed.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn finish_run(
        &self,
        run: &RunId,
        state: RunState,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        when_there_is_room!(self.try_finish_run(run, state, error))
    }

    async fn try_finish_run(
        &self,
        run: &RunId,
        state: RunState,
        error: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update runs set state = ?2, error = ?3, finished = ?4 where id = ?1")
            .bind(&run.0)
            .bind(state.name())
            .bind(error)
            .bind(Time::now().0)
            .execute(&mut *write)
            .await?;
        sqlx::query("delete from leases where run = (select key from runs where id = ?1)")
            .bind(&run.0)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// Records a stage as queued.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn add_stage(&self, run: &RunId, stage: &NewStage) -> Result<StageId, StoreError> {
        let mut write = self.write().await?;
        let key = sqlx::query(
            "insert into stages (run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed,
                                 options, inputs, state)
             values ((select key from runs where id = ?1), ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, 'queued')",
        )
        .bind(&run.0)
        .bind(i64::try_from(stage.position).unwrap_or(i64::MAX))
        .bind(&stage.name)
        .bind(&stage.kind)
        .bind(&stage.plugin.name)
        .bind(&stage.plugin.version)
        .bind(&stage.plugin.hash)
        .bind(&stage.device)
        .bind(&stage.dtype)
        .bind(stage.seed.cast_signed())
        .bind(stage.options.to_string())
        .bind(serde_json::json!(stage.inputs).to_string())
        .execute(&mut *write)
        .await?
        .last_insert_rowid();
        write.commit().await?;
        Ok(StageId(key))
    }

    /// Records that a stage was taken from an earlier attempt with the same digest.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn stage_reused(
        &self,
        stage: StageId,
        digest: &str,
        components: &Value,
        source: AttemptId,
    ) -> Result<(), StoreError> {
        when_there_is_room!(self.try_stage_reused(stage, digest, components, source))
    }

    async fn try_stage_reused(
        &self,
        stage: StageId,
        digest: &str,
        components: &Value,
        source: AttemptId,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update stages set state = 'reused', digest = ?2, components = ?3, reused_from = ?4 where key = ?1")
            .bind(stage.0)
            .bind(digest)
            .bind(components.to_string())
            .bind(source.0)
            .execute(&mut *write)
            .await?;
        series::name_series(&mut write, source).await?;
        series::note_results(&mut write, source).await?;
        write.commit().await
    }

    /// Records that a worker has begun a stage, and with it the run. `components` are the parts of the digest, by
    /// name.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn begin_attempt(
        &self,
        stage: StageId,
        digest: &str,
        components: &Value,
        worker_pid: u32,
    ) -> Result<AttemptId, StoreError> {
        when_there_is_room!(self.try_begin_attempt(stage, digest, components, worker_pid))
    }

    async fn try_begin_attempt(
        &self,
        stage: StageId,
        digest: &str,
        components: &Value,
        worker_pid: u32,
    ) -> Result<AttemptId, StoreError> {
        let mut write = self.write().await?;
        sqlx::query(
            "update stages set state = 'running', digest = ?2, components = ?3 where key = ?1",
        )
        .bind(stage.0)
        .bind(digest)
        .bind(components.to_string())
        .execute(&mut *write)
        .await?;
        let key = sqlx::query(
            "insert into attempts (stage, number, digest, worker_pid, state, started)
             values (?1, (select count(*) + 1 from attempts where stage = ?1), ?2, ?3, 'running', ?4)",
        )
        .bind(stage.0)
        .bind(digest)
        .bind(worker_pid)
        .bind(Time::now().0)
        .execute(&mut *write)
        .await?
        .last_insert_rowid();
        sqlx::query(
            "update runs set state = 'running'
             where key = (select run from stages where key = ?1) and state = 'queued'",
        )
        .bind(stage.0)
        .execute(&mut *write)
        .await?;
        write.commit().await?;
        Ok(AttemptId(key))
    }

    /// Records how an attempt ended, and the same state for its stage.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn finish_attempt(
        &self,
        attempt: AttemptId,
        end: &AttemptEnd,
    ) -> Result<(), StoreError> {
        when_there_is_room!(self.try_finish_attempt(attempt, end))
    }

    async fn try_finish_attempt(
        &self,
        attempt: AttemptId,
        end: &AttemptEnd,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        let failure = end
            .failure
            .as_ref()
            .map(|failure| serde_json::json!(failure).to_string());
        sqlx::query(
            "update attempts
             set state = ?2, reason = ?3, message = ?4, failure = ?5, summary = ?6, output = ?7, cpu_seconds = ?8,
                 max_rss = ?9, finished = ?10, paused = ?11
             where key = ?1",
        )
        .bind(attempt.0)
        .bind(end.state.name())
        .bind(&end.reason)
        .bind(&end.message)
        .bind(failure)
        .bind(end.summary.to_string())
        .bind(&end.output_artifact)
        .bind(end.usage.cpu_seconds)
        .bind(end.usage.max_rss.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)))
        .bind(Time::now().0)
        .bind(i64::try_from(end.paused.as_millis()).unwrap_or(i64::MAX))
        .execute(&mut *write)
        .await?;
        sqlx::query(
            "update stages set state = ?2 where key = (select stage from attempts where key = ?1)",
        )
        .bind(attempt.0)
        .bind(end.state.name())
        .execute(&mut *write)
        .await?;
        write.commit().await?;
        self.lock_series().remove(&attempt);
        Ok(())
    }

    /// Records an artifact that an attempt has made, whose files are already in place.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn record_artifact(
        &self,
        attempt: AttemptId,
        artifact: &ArtifactRecord,
    ) -> Result<(), StoreError> {
        when_there_is_room!(self.try_record_artifact(attempt, artifact))
    }

    async fn try_record_artifact(
        &self,
        attempt: AttemptId,
        artifact: &ArtifactRecord,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        let now = Time::now().0;
        sqlx::query(
            "insert or ignore into artifacts (hash, size, files, created) values (?1, ?2, ?3, ?4)",
        )
        .bind(&artifact.hash)
        .bind(i64::try_from(artifact.size).unwrap_or(i64::MAX))
        .bind(serde_json::json!(artifact.files).to_string())
        .bind(now)
        .execute(&mut *write)
        .await?;
        sqlx::query(
            "insert into outputs (attempt, artifact, kind, name, meta, created) values (?1, ?2, ?3, ?4, ?5, ?6)",
        )
        .bind(attempt.0)
        .bind(&artifact.hash)
        .bind(&artifact.kind)
        .bind(&artifact.name)
        .bind(serde_json::json!(artifact.meta).to_string())
        .bind(now)
        .execute(&mut *write)
        .await?;
        write.commit().await
    }

    /// Records which artifacts an attempt was given.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn record_lineage(
        &self,
        attempt: AttemptId,
        inputs: &[String],
    ) -> Result<(), StoreError> {
        when_there_is_room!(self.try_record_lineage(attempt, inputs))
    }

    async fn try_record_lineage(
        &self,
        attempt: AttemptId,
        inputs: &[String],
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        for input in inputs {
            sqlx::query("insert or ignore into inputs (attempt, artifact) values (?1, ?2)")
                .bind(attempt.0)
                .bind(input)
                .execute(&mut *write)
                .await?;
        }
        write.commit().await
    }

    /// Keeps a plugin's description of itself, by the hash of its file.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn cache_description(
        &self,
        plugin_hash: &str,
        description: &Description,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("insert or replace into descriptions (plugin_hash, description, cached) values (?1, ?2, ?3)")
            .bind(plugin_hash)
            .bind(serde_json::json!(description).to_string())
            .bind(Time::now().0)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }
}

/// Whether the disk was full, and may no longer be.
fn is_for_a_moment<T>(recorded: &Result<T, StoreError>, began: Instant) -> bool {
    matches!(recorded, Err(StoreError::Full)) && began.elapsed() < BUSY_TIMEOUT
}

/// Whether a text has the form of a run's id: as long as those of [`run_id`], of digits and lower-case letters.
pub(super) fn is_run_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_digit() || byte.is_ascii_lowercase();
    text.len() == 10 && text.bytes().all(allowed)
}

/// Whether a text could be a run's id. Words cannot: until 2034, ids begin with a digit.
pub(super) fn could_be_run_id(text: &str) -> bool {
    is_run_id(text) && text.starts_with(|first: char| first.is_ascii_digit())
}

/// Ten characters of Crockford's base 32: 40 bits of milliseconds since 2024, which sort, and 10 bits of chance.
pub(super) fn run_id(now: Time) -> RunId {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    const SINCE_2024: i64 = 1_704_067_200_000;
    let time = (now.0 - SINCE_2024).cast_unsigned() & ((1 << 40) - 1);
    // The standard library's hash keys are the operating system's random numbers.
    let chance = std::hash::RandomState::new().build_hasher().finish() & ((1 << 10) - 1);
    let bits = time << 10 | chance;
    let digit =
        |place: u32| char::from(ALPHABET[usize::try_from(bits >> (5 * place) & 31).unwrap_or(0)]);
    RunId((0..10).rev().map(digit).collect())
}

async fn insert_lease(
    connection: &mut SqliteConnection,
    run: i64,
    now: Time,
) -> Result<(), sqlx::Error> {
    let holder = Holder::this_process();
    sqlx::query(
        "insert into leases (run, host, boot, pid_namespace, pid, process_started, heartbeat)
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )
    .bind(run)
    .bind(holder.host)
    .bind(holder.boot)
    .bind(holder.pid_namespace)
    .bind(holder.pid)
    .bind(holder.process_started.cast_signed())
    .bind(now.0)
    .execute(connection)
    .await?;
    Ok(())
}

async fn insert_param(
    connection: &mut SqliteConnection,
    run: i64,
    param: &Param,
) -> Result<(), sqlx::Error> {
    sqlx::query("insert or ignore into names (name) values (?1)")
        .bind(&param.path)
        .execute(&mut *connection)
        .await?;
    let query = sqlx::query(
        "insert or replace into params (key, value, type, origin)
         values ((select key from names where name = ?2) << 32 | ?1, ?3, ?4, ?5)",
    )
    .bind(run)
    .bind(&param.path);
    let query = match &param.value {
        Value::Null => query.bind(None::<i64>).bind("null"),
        Value::Bool(value) => query.bind(i64::from(*value)).bind("boolean"),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => query.bind(integer).bind("integer"),
            (None, real) => query.bind(real).bind("real"),
        },
        Value::String(text) => query.bind(text.as_str()).bind("text"),
        list @ Value::Array(_) => query.bind(list.to_string()).bind("array"),
        map @ Value::Object(_) => query.bind(map.to_string()).bind("object"),
    };
    query.bind(&param.origin).execute(connection).await?;
    Ok(())
}
