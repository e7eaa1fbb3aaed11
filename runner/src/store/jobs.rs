//! Cluster jobs of attempts: the submitted jobs, the progress of their elements, and how each start ended.

use serde::Serialize;
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Connection, QueryBuilder, Row, Sqlite};

use super::connection::{ROWS_AT_ONCE, run_once};
use super::time::Time;
use super::unrecorded::PendingRunState;
use super::{AttemptId, ReadMark, RunId, RunState, Store, StoreError};

/// The state of a run that has not ended, for statements on `runs`: running as soon as one of its stages is or was running.
pub(super) const STATE_BY_STAGES: &str = "case
    when exists (select 1 from stages where run = runs.key and state not in ('queued', 'reused'))
    then 'running' else 'queued' end";

/// Names a job, within one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobKey(pub i64);

/// A job that another runner may take over, as recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenJob {
    /// Its key.
    pub key: JobKey,
    /// Its name in Slurm, also the name of its spool.
    pub name: String,
    /// Slurm's id, once it has one.
    pub job: Option<u64>,
    /// The read mark of each element.
    pub imported: Vec<(usize, u64)>,
    /// Whether nothing of it is left to do: only results in its spool are of use.
    pub over: bool,
    /// Whether the attempt that had it last has been recorded as ended.
    pub ended: bool,
}

/// A job, for people.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobRow {
    /// The stage that it works for.
    pub stage: String,
    /// The name of the cluster; empty where it is not known.
    pub cluster: String,
    /// Slurm's id, once it has one.
    pub job: Option<u64>,
    /// The number of elements of an array; 0 if it is not an array.
    pub elements: u32,
    /// Elements that wait.
    pub queued: u32,
    /// Elements that run.
    pub running: u32,
    /// When it was submitted.
    pub submitted: Time,
    /// When it was finished.
    pub over: Option<Time>,
    /// How the starts of its elements ended, and how often in each way.
    pub ends: Vec<(String, u32)>,
}

/// The jobs of a run that its runner has left.
#[derive(Debug, Clone, PartialEq)]
pub struct DetachedJobs {
    /// The run.
    pub run: RunId,
    /// Whether the runner has left it on purpose.
    pub detached: bool,
    /// Slurm's ids.
    pub jobs: Vec<u64>,
    /// The names of those whose id the runner did not live to record.
    pub names: Vec<String>,
}

/// An update about an element.
#[derive(Debug, Clone, PartialEq)]
pub enum ElementUpdate {
    /// It waits, for this reason.
    Queued(String),
    /// It runs.
    Running,
    /// It was started.
    Began {
        /// Which.
        start: u32,
        /// Where.
        node: String,
        /// When.
        at: i64,
    },
    /// One of its starts has ended.
    Ended {
        /// Which.
        start: u32,
        /// How, in a few words.
        reason: String,
        /// When.
        at: i64,
    },
    /// It ended in this way while no runner was present.
    Lost {
        /// The way, in a few words.
        reason: String,
    },
    /// Nothing more will come of it.
    Over,
}

impl Store {
    /// Records a job that is about to be submitted.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn begin_job(
        &self,
        attempt: AttemptId,
        digest: &str,
        name: &str,
        elements: Option<usize>,
    ) -> Result<JobKey, StoreError> {
        let mut write = self.write().await?;
        let count = elements.unwrap_or(0);
        let key = sqlx::query(
            "insert into jobs (attempt, digest, name, cluster, elements, submitted) values (?1, ?2, ?3, '', ?4, ?5)",
        )
        .bind(attempt.0)
        .bind(digest)
        .bind(name)
        .bind(number(count))
        .bind(Time::now().0)
        .execute(&mut *write)
        .await?
        .last_insert_rowid();
        for element in 0..count.max(1) {
            sqlx::query(
                "insert into job_elements (job, element, state, imported) values (?1, ?2, 'queued', 0)",
            )
            .bind(key)
            .bind(number(element))
            .execute(&mut *write)
            .await?;
        }
        write.commit().await?;
        Ok(JobKey(key))
    }

    /// Records that Slurm has accepted a job.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn job_submitted(
        &self,
        key: JobKey,
        job: u64,
        cluster: &str,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update jobs set job = ?2, cluster = ?3 where key = ?1")
            .bind(key.0)
            .bind(job.cast_signed())
            .bind(cluster)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// Forgets a job that Slurm has refused.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn job_refused(&self, key: JobKey) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("delete from jobs where key = ?1")
            .bind(key.0)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// The jobs for a stage with this digest that are not over, and those that are, while no attempt has succeeded with their
    /// results; in order.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn open_jobs(&self, digest: &str) -> Result<Vec<OpenJob>, StoreError> {
        let rows = sqlx::query(
            "select j.key, j.name, j.job, j.over is not null as over, a.state <> 'running' as ended
             from jobs j join attempts a on a.key = coalesce(j.taken_by, j.attempt)
             where j.digest = ?1 and (j.over is null or (j.job is not null and a.state <> 'succeeded'))
             order by j.key",
        )
        .bind(digest)
        .fetch_all(self.pool())
        .await?;
        let mut jobs = Vec::new();
        for row in rows {
            jobs.push(OpenJob {
                over: row.try_get("over")?,
                ended: row.try_get("ended")?,
                ..self.open_job(&row).await?
            });
        }
        Ok(jobs)
    }

    /// The jobs of a run that are not over, in order, each with its stage and the digest that this has.
    ///
    /// # Errors
    /// As [`Store::open_jobs`].
    pub async fn open_jobs_of(
        &self,
        run: &RunId,
    ) -> Result<Vec<(String, String, OpenJob)>, StoreError> {
        let rows = sqlx::query(
            "select distinct j.key, j.name, j.job, j.digest, s.name as stage
             from jobs j join attempts a on a.key in (j.attempt, j.taken_by) join stages s on s.key = a.stage
             where s.run = (select key from runs where id = ?1) and j.over is null order by j.key",
        )
        .bind(&run.0)
        .fetch_all(self.pool())
        .await?;
        let mut jobs = Vec::new();
        for row in rows {
            let job = self.open_job(&row).await?;
            jobs.push((row.try_get("stage")?, row.try_get("digest")?, job));
        }
        Ok(jobs)
    }

    async fn open_job(&self, row: &SqliteRow) -> Result<OpenJob, StoreError> {
        let key: i64 = row.try_get("key")?;
        let imported: Vec<(i64, i64)> =
            sqlx::query_as("select element, imported from job_elements where job = ?1")
                .bind(key)
                .fetch_all(self.pool())
                .await?;
        Ok(OpenJob {
            key: JobKey(key),
            name: row.try_get("name")?,
            job: row
                .try_get::<Option<i64>, _>("job")?
                .map(i64::cast_unsigned),
            imported: imported
                .into_iter()
                .filter_map(|(element, number)| {
                    Some((usize::try_from(element).ok()?, number.cast_unsigned()))
                })
                .collect(),
            over: false,
            ended: false,
        })
    }

    /// Records that another attempt takes a job over.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn job_taken(&self, key: JobKey, attempt: AttemptId) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update jobs set taken_by = ?2 where key = ?1")
            .bind(key.0)
            .bind(attempt.0)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// Records that a job is finished.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn job_over(&self, key: JobKey) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update jobs set over = ?2 where key = ?1 and over is null")
            .bind(key.0)
            .bind(Time::now().0)
            .execute(&mut *write)
            .await?;
        write.commit().await
    }

    /// Records updates about elements.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn note_elements(
        &self,
        news: &[(JobKey, usize, ElementUpdate)],
    ) -> Result<(), StoreError> {
        if news.is_empty() {
            return Ok(());
        }
        let mut write = self.write().await?;
        for (key, element, news) in news {
            let element = number(*element);
            let (state, why) = match news {
                ElementUpdate::Queued(why) => ("queued", Some(why.as_str())),
                ElementUpdate::Running | ElementUpdate::Began { .. } => ("running", None),
                ElementUpdate::Ended { .. } => ("queued", None),
                ElementUpdate::Lost { .. } | ElementUpdate::Over => ("over", None),
            };
            sqlx::query(
                "update job_elements set state = ?3, why = ?4 where job = ?1 and element = ?2",
            )
            .bind(key.0)
            .bind(element)
            .bind(state)
            .bind(why)
            .execute(&mut *write)
            .await?;
            match news {
                ElementUpdate::Began { start, node, at } => {
                    sqlx::query(
                        "insert or ignore into job_lives (job, element, life, node, started)
                         values (?1, ?2, ?3, ?4, ?5)",
                    )
                    .bind(key.0)
                    .bind(element)
                    .bind(start)
                    .bind(node)
                    .bind(at)
                    .execute(&mut *write)
                    .await?;
                }
                ElementUpdate::Ended { start, reason, at } => {
                    // An element that never reported its start can still have an end.
                    sqlx::query(
                        "insert into job_lives (job, element, life, node, started, finished, reason)
                         values (?1, ?2, ?3, '', ?4, ?4, ?5)
                         on conflict do update set finished = ?4, reason = ?5 where finished is null",
                    )
                    .bind(key.0)
                    .bind(element)
                    .bind(start)
                    .bind(at)
                    .bind(reason)
                    .execute(&mut *write)
                    .await?;
                }
                ElementUpdate::Lost { reason } => {
                    sqlx::query(
                        "update job_lives set finished = ?3, reason = ?4
                         where job = ?1 and element = ?2 and finished is null",
                    )
                    .bind(key.0)
                    .bind(element)
                    .bind(Time::now().0)
                    .bind(reason)
                    .execute(&mut *write)
                    .await?;
                }
                ElementUpdate::Queued(_) | ElementUpdate::Running | ElementUpdate::Over => {}
            }
        }
        write.commit().await
    }

    /// Records whether, and why, nothing of an attempt runs: its stage is queued then.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn attempt_waits(
        &self,
        attempt: AttemptId,
        why: Option<&str>,
    ) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query("update attempts set waiting = ?2 where key = ?1")
            .bind(attempt.0)
            .bind(why)
            .execute(&mut *write)
            .await?;
        let state = if why.is_some() { "queued" } else { "running" };
        sqlx::query(
            "update stages set state = ?2
             where key = (select stage from attempts where key = ?1) and state in ('queued', 'running')",
        )
        .bind(attempt.0)
        .bind(state)
        .execute(&mut *write)
        .await?;
        sqlx::query(AssertSqlSafe(format!(
            "update runs set state = {STATE_BY_STAGES}
             where key = (select s.run from stages s join attempts a on a.stage = s.key where a.key = ?1)
               and state in ('queued', 'running')"
        )))
        .bind(attempt.0)
        .execute(&mut *write)
        .await?;
        write.commit().await
    }

    /// Records that the runner leaves a run to Slurm.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn leave_to_scheduler(&self, run: &RunId) -> Result<(), StoreError> {
        let mut write = self.write().await?;
        sqlx::query(
            "update leases set scheduler = 1 where run = (select key from runs where id = ?1)",
        )
        .bind(&run.0)
        .execute(&mut *write)
        .await?;
        write.commit().await
    }

    /// The jobs of a run, in order.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn jobs(&self, run: &RunId) -> Result<Vec<JobRow>, StoreError> {
        let rows = sqlx::query(
            "select j.key, s.name as stage, j.cluster, j.job, j.elements, j.submitted, j.over,
                    (select count(*) from job_elements e where e.job = j.key and e.state = 'queued') as queued,
                    (select count(*) from job_elements e where e.job = j.key and e.state = 'running') as running
             from jobs j
             join attempts a on a.key in (j.attempt, j.taken_by)
             join stages s on s.key = a.stage
             where s.run = (select key from runs where id = ?1)
             group by j.key order by j.key",
        )
        .bind(&run.0)
        .fetch_all(self.pool())
        .await?;
        let mut jobs = Vec::new();
        for row in rows {
            let ends = sqlx::query_as(
                "select reason, count(*) from job_lives where job = ?1 and reason is not null
                 group by reason order by count(*) desc, reason",
            )
            .bind(row.try_get::<i64, _>("key")?)
            .fetch_all(self.pool())
            .await?;
            jobs.push(JobRow {
                stage: row.try_get("stage")?,
                cluster: row.try_get("cluster")?,
                job: row
                    .try_get::<Option<i64>, _>("job")?
                    .map(i64::cast_unsigned),
                elements: row.try_get("elements")?,
                queued: row.try_get("queued")?,
                running: row.try_get("running")?,
                submitted: Time(row.try_get("submitted")?),
                over: row.try_get::<Option<i64>, _>("over")?.map(Time),
                ends,
            });
        }
        Ok(jobs)
    }

    /// The runs with unfinished jobs whose runner has left.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn left_to_scheduler(&self) -> Result<Vec<DetachedJobs>, StoreError> {
        let gone = self.without_runner().await?;
        let mut left = Vec::new();
        for (key, id, detached) in gone {
            let open: Vec<(Option<i64>, String)> = sqlx::query_as(
                "select distinct j.job, j.name from jobs j
                 join attempts a on a.key in (j.attempt, j.taken_by) join stages s on s.key = a.stage
                 where s.run = ?1 and j.over is null",
            )
            .bind(key)
            .fetch_all(self.pool())
            .await?;
            left.push(DetachedJobs {
                run: RunId(id),
                detached,
                jobs: (open.iter())
                    .filter_map(|(job, _)| job.map(i64::cast_unsigned))
                    .collect(),
                names: open
                    .into_iter()
                    .filter_map(|(job, name)| job.is_none().then_some(name))
                    .collect(),
            });
        }
        Ok(left)
    }

    /// Records why all jobs of a run that was left to Slurm wait there, or that one runs.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn scheduler_says(
        &self,
        left: &DetachedJobs,
        waiting: Option<&str>,
    ) -> Result<(), StoreError> {
        // As `STATE_BY_STAGES` after it has been recorded.
        let has_run: bool = sqlx::query_scalar(
            "select exists (select 1 from stages s where s.run = (select key from runs where id = ?1)
                 and s.state not in ('queued', 'reused')
                 and not exists (select 1 from attempts where stage = s.key and state = 'running'))",
        )
        .bind(&left.run.0)
        .fetch_one(self.pool())
        .await?;
        let state = match waiting {
            Some(_) if !has_run => RunState::Queued,
            _ => RunState::Running,
        };
        let recorded = self.record_what_scheduler_says(left, waiting).await;
        let said = PendingRunState {
            waiting: Some(waiting.map(str::to_owned)),
            ..PendingRunState::of(state)
        };
        self.keep_unrecorded(&left.run, said, &recorded);
        recorded
    }

    async fn record_what_scheduler_says(
        &self,
        left: &DetachedJobs,
        waiting: Option<&str>,
    ) -> Result<(), StoreError> {
        let state = if waiting.is_some() {
            "queued"
        } else {
            "running"
        };
        const ATTEMPTS: &str = "where state = 'running' and waiting is not ?2
             and stage in (select key from stages where run = (select key from runs where id = ?1))";
        const STAGES: &str =
            "where run = (select key from runs where id = ?1) and state in ('queued', 'running')
             and state is not ?3
             and exists (select 1 from attempts where stage = stages.key and state = 'running')";
        // The runner may have ended before it recorded that its run was running.
        let runs = format!(
            "where id = ?1 and state in ('queued', 'running') and state <> {STATE_BY_STAGES}"
        );
        let is_news = format!(
            "select exists (select 1 from attempts {ATTEMPTS}) or exists (select 1 from stages {STAGES})
                 or exists (select 1 from runs {runs})"
        );
        let is_news: bool = sqlx::query_scalar(AssertSqlSafe(is_news))
            .bind(&left.run.0)
            .bind(waiting)
            .bind(state)
            .fetch_one(self.pool())
            .await?;
        if !is_news {
            return Ok(());
        }
        let mut lease = self.take_write_lease().await?;
        let noted = async {
            let mut write = lease.connection().begin_with("begin immediate").await?;
            for statement in [
                format!("update attempts set waiting = ?2 {ATTEMPTS}"),
                format!("update stages set state = ?3 {STAGES}"),
                format!("update runs set state = {STATE_BY_STAGES} {runs}"),
            ] {
                sqlx::query(AssertSqlSafe(statement))
                    .bind(&left.run.0)
                    .bind(waiting)
                    .bind(state)
                    .execute(&mut *write)
                    .await?;
            }
            Ok(write.commit().await?)
        };
        let noted = noted.await;
        lease.close().await;
        noted
    }

    /// Whether all attempts of a run that are under way have been submitted.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::Sql`].
    pub async fn is_submitted(&self, run: &RunId) -> Result<bool, StoreError> {
        let (all, not_yet): (i64, i64) = sqlx::query_as(
            "select count(*), count(*) filter (where a.waiting in ('', 'not submitted') or a.waiting like 'the queue%')
             from attempts a join stages s on s.key = a.stage
             where s.run = (select key from runs where id = ?1) and a.state = 'running'",
        )
        .bind(&run.0)
        .fetch_one(self.pool())
        .await?;
        Ok(all > 0 && not_yet == 0)
    }

    /// Records that another run takes over the jobs that a run has left to Slurm.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn take_up(&self, left: &DetachedJobs) -> Result<(), StoreError> {
        self.end_left(left, "taken up again while its Slurm jobs went on")
            .await
    }

    /// Records that a run that was left to Slurm has no job there any more, and what went wrong, if Slurm knows.
    ///
    /// # Errors
    /// As [`Store::begin_run`].
    pub async fn scheduler_is_done(
        &self,
        left: &DetachedJobs,
        fault: Option<&str>,
    ) -> Result<(), StoreError> {
        let fault = fault.map_or_else(String::new, |fault| format!(" ({fault})"));
        let error =
            format!("its Slurm jobs have ended{fault}; `retort resume` takes over what they made");
        self.end_left(left, &error).await
    }

    async fn end_left(&self, left: &DetachedJobs, error: &str) -> Result<(), StoreError> {
        let state = if left.detached {
            RunState::Interrupted
        } else {
            RunState::Lost
        };
        let recorded = self.record_end_of_left(left, state, error).await;
        let said = PendingRunState {
            error: Some(error.to_owned()),
            ..PendingRunState::of(state)
        };
        self.keep_unrecorded(&left.run, said, &recorded);
        recorded
    }

    async fn record_end_of_left(
        &self,
        left: &DetachedJobs,
        state: RunState,
        error: &str,
    ) -> Result<(), StoreError> {
        let mut lease = self.take_write_lease().await?;
        let noted = sqlx::query(
            "update runs set state = ?2, error = ?3, finished = ?4
             where id = ?1 and state in ('queued', 'running')",
        )
        .bind(&left.run.0)
        .bind(state.name())
        .bind(error)
        .bind(Time::now().0)
        .execute(lease.connection())
        .await;
        lease.close().await;
        noted?;
        Ok(())
    }
}

/// Records the read positions of elements' spools.
pub(super) async fn note_marks(
    write: &mut SqliteConnection,
    marks: &[ReadMark],
) -> Result<(), StoreError> {
    // In one statement: a thousand elements write several times a second.
    for marks in marks.chunks(ROWS_AT_ONCE) {
        let mut update = QueryBuilder::<Sqlite>::new("with heard (job, element, number) as (");
        update.push_values(marks, |mut row, mark| {
            row.push_bind(mark.job.0)
                .push_bind(number(mark.element))
                .push_bind(mark.number.cast_signed());
        });
        update.push(
            ")
             update job_elements set imported = max(ifnull(imported, 0), heard.number)
             from heard where job_elements.job = heard.job and job_elements.element = heard.element",
        );
        run_once(update, write).await?;
    }
    Ok(())
}

/// The numbers of elements fit into the type.
fn number(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
