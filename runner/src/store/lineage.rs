//! Lineage of artifacts, and records of stages for explaining why they ran.

use std::collections::{HashMap, HashSet, VecDeque};

use serde::Serialize;
use serde_json::Value;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::time::Time;
use super::{RunId, StageState, Store, StoreError, json, json_or_none, variant};

/// An artifact and everything it was made from, or that was made from it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lineage {
    /// The artifacts: its ancestors first, itself at depth 0, then its descendants.
    pub artifacts: Vec<LineageArtifact>,
    /// The edges: pairs of hashes (made, from).
    pub made_from: Vec<(String, String)>,
}

/// An artifact in a lineage.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LineageArtifact {
    /// Its hash.
    pub hash: String,
    /// Steps to the artifact in question: negative for what that was made from, positive for what was made from it.
    pub depth: i32,
    /// Its kind.
    pub kind: String,
    /// Its size in bytes.
    pub size: u64,
    /// The run that made it first.
    pub run: Option<RunId>,
    /// The stage that made it.
    pub stage: Option<String>,
    /// When.
    pub created: Time,
}

/// A run's record of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct StageRecord {
    /// The run.
    pub run: RunId,
    /// When the run began.
    pub began: Time,
    /// Its state.
    pub state: StageState,
    /// Its digest; None if its inputs never existed.
    pub digest: Option<String>,
    /// The parts of the digest.
    pub components: Option<Value>,
    /// The run that made the result, if it was reused.
    pub reused_from: Option<RunId>,
    /// References: pointer into the options, name of the stage.
    pub inputs: Vec<(String, String)>,
    /// How its last attempt ended.
    pub reason: Option<String>,
    /// Whether it was forced to run.
    pub forced: bool,
}

impl Store {
    /// The hash of the artifact that a reference means: a prefix of its hash, or `RUN/STAGE` for what a stage of a run made.
    ///
    /// # Errors
    /// [`StoreError::NoArtifact`], [`StoreError::AmbiguousArtifact`], [`StoreError::NoRun`].
    pub async fn resolve_artifact(&self, reference: &str) -> Result<String, StoreError> {
        let missing = || StoreError::NoArtifact {
            reference: reference.to_owned(),
        };
        if let Some((run, stage)) = reference.split_once('/') {
            let run = self.resolve_run(run).await?;
            let output: Option<Option<String>> =
                sqlx::query_scalar("select output from v_stages where run = ?1 and stage = ?2")
                    .bind(&run.0)
                    .bind(stage)
                    .fetch_optional(self.pool())
                    .await?;
            return output.flatten().ok_or_else(missing);
        }
        let prefix = reference.trim().to_ascii_lowercase();
        if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let found = self.only_match(
            "select hash from artifacts where hash >= ?1 and hash < ?1 || 'g' order by hash limit 20",
            prefix,
            |reference, candidates| StoreError::AmbiguousArtifact {
                reference,
                candidates,
            },
        );
        found.await?.ok_or_else(missing)
    }

    /// The lineage of the artifact with this hash, in both directions.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn lineage(&self, hash: &str) -> Result<Lineage, StoreError> {
        self.lineage_within(hash, usize::MAX).await
    }

    /// The same, with at most `most` artifacts, the nearest ones.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn lineage_within(&self, hash: &str, most: usize) -> Result<Lineage, StoreError> {
        let mut depths = HashMap::from([(hash.to_owned(), 0)]);
        let mut edges = HashSet::new();
        for direction in [-1, 1] {
            let mut queue = VecDeque::from([(hash.to_owned(), 0)]);
            while let Some((from, depth)) = queue.pop_front() {
                for next in self.neighbours(&from, direction).await? {
                    if !depths.contains_key(&next) && depths.len() >= most {
                        continue;
                    }
                    edges.insert(match direction {
                        -1 => (from.clone(), next.clone()),
                        _ => (next.clone(), from.clone()),
                    });
                    if !depths.contains_key(&next) {
                        depths.insert(next.clone(), depth + direction);
                        queue.push_back((next, depth + direction));
                    }
                }
            }
        }
        let mut artifacts = Vec::with_capacity(depths.len());
        for (hash, depth) in depths {
            artifacts.push(self.relative(hash, depth).await?);
        }
        artifacts.sort_by(|a, b| (a.depth, a.created, &a.hash).cmp(&(b.depth, b.created, &b.hash)));
        let mut made_from: Vec<_> = edges.into_iter().collect();
        made_from.sort();
        Ok(Lineage {
            artifacts,
            made_from,
        })
    }

    /// What an artifact was made from (-1), or what was made from it (1).
    async fn neighbours(&self, hash: &str, direction: i32) -> Result<Vec<String>, StoreError> {
        let sql = match direction {
            -1 => {
                "select distinct i.artifact from outputs o join inputs i on i.attempt = o.attempt where o.artifact = ?1"
            }
            _ => {
                "select distinct o.artifact from inputs i join outputs o on o.attempt = i.attempt where i.artifact = ?1"
            }
        };
        Ok(sqlx::query_scalar(sql)
            .bind(hash)
            .fetch_all(self.pool())
            .await?)
    }

    async fn relative(&self, hash: String, depth: i32) -> Result<LineageArtifact, StoreError> {
        let row = sqlx::query(
            "select f.size, f.created, o.kind, r.id as run, s.name as stage
             from artifacts f
             left join outputs o on o.key = (select min(key) from outputs where artifact = f.hash)
             left join attempts a on a.key = o.attempt
             left join stages s on s.key = a.stage
             left join runs r on r.key = s.run
             where f.hash = ?1",
        )
        .bind(&hash)
        .fetch_one(self.pool())
        .await?;
        Ok(LineageArtifact {
            hash,
            depth,
            kind: row
                .try_get::<Option<String>, _>("kind")?
                .unwrap_or_default(),
            size: row.try_get::<i64, _>("size")?.cast_unsigned(),
            run: row.try_get::<Option<String>, _>("run")?.map(RunId),
            stage: row.try_get("stage")?,
            created: Time(row.try_get("created")?),
        })
    }

    /// What a run's history says of one of its stages; None if the run has no such stage.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn stage_record(
        &self,
        run: &RunId,
        stage: &str,
    ) -> Result<Option<StageRecord>, StoreError> {
        let row = sqlx::query(STAGE_RECORD)
            .bind(&run.0)
            .bind(stage)
            .fetch_optional(self.pool())
            .await?;
        row.as_ref().map(record).transpose()
    }

    /// The record of the stage with this name and a digest in the latest earlier run of the same recipe.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn earlier_stage_record(
        &self,
        run: &RunId,
        stage: &str,
    ) -> Result<Option<StageRecord>, StoreError> {
        let earlier: Option<String> = sqlx::query_scalar(
            "select p.id from runs r
             cross join runs p on p.recipe = r.recipe and p.key < r.key
                 and p.key between (select min(run) from stages where name = ?2)
                               and (select max(run) from stages where name = ?2)
             cross join stages s on s.run = p.key and s.name = ?2
             where r.id = ?1 and s.digest is not null
             order by p.key desc limit 1",
        )
        .bind(&run.0)
        .bind(stage)
        .fetch_optional(self.pool())
        .await?;
        match earlier {
            Some(earlier) => self.stage_record(&RunId(earlier), stage).await,
            None => Ok(None),
        }
    }
}

const STAGE_RECORD: &str = "select r.id as run, r.created, v.state, s.digest, s.components, s.inputs, v.reused_from_run, v.reason,
        exists (select 1 from documents d, json_each(d.resolved, '$.roles') role
                where d.run = r.key and role.key = s.name and role.value = 'forced')
        or exists (select 1 from documents d, json_each(d.resolved, '$.forced') f where d.run = r.key and f.value = s.name)
            as forced
 from runs r
 join stages s on s.run = r.key
 join v_stages v on v.run = r.id and v.stage = s.name
 where r.id = ?1 and s.name = ?2";

fn record(row: &SqliteRow) -> Result<StageRecord, StoreError> {
    Ok(StageRecord {
        run: RunId(row.try_get("run")?),
        began: Time(row.try_get("created")?),
        state: variant(row, "state")?,
        digest: row.try_get("digest")?,
        components: json_or_none(row, "components")?,
        reused_from: row
            .try_get::<Option<String>, _>("reused_from_run")?
            .map(RunId),
        inputs: json(row, "inputs")?,
        reason: row.try_get("reason")?,
        forced: row.try_get("forced")?,
    })
}
