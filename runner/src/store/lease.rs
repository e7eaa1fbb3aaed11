//! Whether a run's runner is still alive: its lease names a process ([`Holder`]).
//!
//! A runner that was only slow, or whose machine's clock was set, may seem lost to other machines. Its next heartbeat, or its
//! end, corrects the record.

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Row};

use super::holder::Holder;
use super::jobs::STATE_BY_STAGES;
use super::time::Time;
use super::unrecorded::PendingRunState;
use super::{RunId, RunState, Store, StoreError};

impl Store {
    /// Records that the runner of `run` (this process) is alive; to be called every few seconds. If another process has taken
    /// the run for lost, its previous state is restored.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Full`]: the run may go on; the next heartbeat suffices.
    /// [`StoreError::Elsewhere`]: it may not, another machine has taken the store.
    pub async fn heartbeat(&self, run: &RunId) -> Result<(), StoreError> {
        // The claim first: the store stays this machine's even if the database cannot be written to for a while.
        let beaten = match &self.host_lock {
            Some(host_lock) => host_lock.beat().await,
            None => Ok(()),
        };
        if let Err(error) = &beaten {
            tracing::debug!("the store's heartbeat: {error}");
        }
        let mut write = self.write().await?;
        sqlx::query(
            "update leases set heartbeat = ?2 where run = (select key from runs where id = ?1)",
        )
        .bind(&run.0)
        .bind(Time::now().0)
        .execute(&mut *write)
        .await?;
        sqlx::query(AssertSqlSafe(format!(
            "update runs set finished = null, state = {STATE_BY_STAGES} where id = ?1 and state = 'lost'"
        )))
        .bind(&run.0)
        .execute(&mut *write)
        .await?;
        write.commit().await
    }

    /// Marks runs whose runner is gone as lost. If that cannot be recorded it is kept in memory and shown.
    pub(super) async fn reconcile(&self) -> Result<(), StoreError> {
        let gone = gone(&mut *self.pool().acquire().await?, JobCondition::None).await?;
        let recorded = match gone.as_slice() {
            [] => Ok(()),
            gone => self.record_lost(gone).await,
        };
        let mut unrecorded = self.lock_unrecorded();
        // Known facts about runs without Slurm jobs are kept.
        unrecorded.retain(|_, said| said.state != RunState::Lost || said.error.is_some());
        if let Err(error) = recorded {
            tracing::debug!(%error, "lost runs could not be recorded as such");
            let lost = gone.into_iter().map(|(_, id, _)| id);
            unrecorded.extend(lost.map(|id| (id, PendingRunState::of(RunState::Lost))));
        }
        Ok(())
    }

    async fn record_lost(&self, gone: &[(i64, String, bool)]) -> Result<(), StoreError> {
        let mut lease = self.take_write_lease().await?;
        let noted = async {
            for (key, _, _) in gone {
                // The lease is kept: if its holder is alive after all, its heartbeat still needs it.
                sqlx::query(
                    "update runs set state = 'lost', finished = (select min(heartbeat, ?2) from leases where run = key)
                     where key = ?1 and state in ('queued', 'running')",
                )
                .bind(key)
                .bind(Time::now().0)
                .execute(lease.connection())
                .await?;
            }
            Ok(())
        };
        let noted = noted.await;
        lease.close().await;
        noted
    }

    /// The runs that have an unfinished job, and whose runner is gone or has left on purpose.
    pub(super) async fn without_runner(&self) -> Result<Vec<(i64, String, bool)>, StoreError> {
        gone(&mut *self.pool().acquire().await?, JobCondition::Open).await
    }
}

/// An error if a run is under way: its runner, an older program, would not understand a migrated store.
pub(super) async fn nobody_runs(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let alive: Vec<i64> =
        sqlx::query_scalar("select key from runs where state in ('queued', 'running')")
            .fetch_all(&mut *connection)
            .await?;
    let (lost, left) = match has_jobs(connection).await? {
        true => (
            gone(&mut *connection, JobCondition::None).await?,
            gone(&mut *connection, JobCondition::Open).await?,
        ),
        // An older schema has no jobs.
        false => (gone(connection, JobCondition::Unknown).await?, Vec::new()),
    };
    match alive.len() > lost.len() + left.len() {
        true => Err(StoreError::InUse),
        false => Ok(()),
    }
}

/// Whether the store's schema has jobs.
async fn has_jobs(connection: &mut SqliteConnection) -> Result<bool, StoreError> {
    let found = sqlx::query("select 1 from sqlite_schema where name = 'jobs'")
        .fetch_optional(connection)
        .await?;
    Ok(found.is_some())
}

/// Which runs a query is about.
#[derive(Clone, Copy)]
enum JobCondition {
    /// Those without an unfinished job.
    None,
    /// Those with one: only Slurm knows whether they go on.
    Open,
    /// All, in a store whose schema has no jobs.
    Unknown,
}

/// Keys and ids of the runs that are recorded as alive but are not, and whether their runner has left them on purpose.
async fn gone(
    connection: &mut SqliteConnection,
    jobs: JobCondition,
) -> Result<Vec<(i64, String, bool)>, StoreError> {
    let query = match jobs {
        JobCondition::None => {
            "select r.key, r.id, l.host, l.boot, l.pid_namespace, l.pid, l.process_started, l.heartbeat, l.scheduler
             from runs r left join leases l on l.run = r.key
             where r.state in ('queued', 'running')
               and not exists (select 1 from stages s join attempts a on a.stage = s.key
                               join jobs j on a.key in (j.attempt, j.taken_by)
                               where s.run = r.key and j.over is null)"
        }
        JobCondition::Open => {
            "select r.key, r.id, l.host, l.boot, l.pid_namespace, l.pid, l.process_started, l.heartbeat, l.scheduler
             from runs r left join leases l on l.run = r.key
             where r.state in ('queued', 'running')
               and exists (select 1 from stages s join attempts a on a.stage = s.key
                           join jobs j on a.key in (j.attempt, j.taken_by)
                           where s.run = r.key and j.over is null)"
        }
        JobCondition::Unknown => {
            "select r.key, r.id, l.host, l.boot, l.pid_namespace, l.pid, l.process_started, l.heartbeat, 0 as scheduler
             from runs r left join leases l on l.run = r.key
             where r.state in ('queued', 'running')"
        }
    };
    let rows = sqlx::query(query).fetch_all(connection).await?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let (reader, now) = (Holder::this_process(), Time::now());
    let mut gone = Vec::new();
    for row in rows {
        // A run without a lease has no runner. The store is damaged: a run that ends says so when its lease goes.
        if row.try_get::<Option<i64>, _>("pid")?.is_none() {
            gone.push((row.try_get("key")?, row.try_get("id")?, false));
            continue;
        }
        let holder = Holder {
            host: row.try_get("host")?,
            boot: row.try_get("boot")?,
            pid_namespace: row.try_get("pid_namespace")?,
            pid: row.try_get("pid")?,
            process_started: row.try_get::<i64, _>("process_started")?.cast_unsigned(),
        };
        let detached: bool = row.try_get("scheduler")?;
        if detached || !holder.lives(&reader, Time(row.try_get("heartbeat")?), now) {
            gone.push((row.try_get("key")?, row.try_get("id")?, detached));
        }
    }
    Ok(gone)
}
