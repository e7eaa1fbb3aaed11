//! Whether a run's runner is still alive.
//!
//! A lease names the process: machine boot, namespace of process ids, pid, and the moment the process began (pids are
//! used again; a pid that began at another moment is somebody else). Where the reader shares boot and namespace with
//! the runner, the process table decides, whatever the clock says. Elsewhere (another machine, another container) only
//! the age of the heartbeat can.
//!
//! A runner that was only slow, or whose machine's clock was set, may be taken for lost from elsewhere: its next
//! heartbeat, or its end, puts the record right.

use std::time::Duration;

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Row};

use super::jobs::STATE_BY_STAGES;
use super::time::Time;
use super::{RunId, Store, StoreError, connection};

/// A heartbeat older than this, seen from another machine, means that the runner is gone. Runners beat every few
/// seconds; the rest is for clocks that differ and for busy disks.
pub(super) const HEARTBEAT_LIMIT: Duration = Duration::from_secs(120);

/// How far another machine's clock may be ahead.
pub(super) const AHEAD_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// A process, named so that it can be told from every other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) host: String,
    pub(super) boot: String,
    pub(super) pid_namespace: String,
    pub(super) pid: u32,
    pub(super) process_started: u64,
}

impl Holder {
    /// This process.
    pub(super) fn this_process() -> Self {
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let pid = std::process::id();
        Self {
            host: read("/proc/sys/kernel/hostname"),
            boot: read("/proc/sys/kernel/random/boot_id"),
            pid_namespace: std::fs::read_link("/proc/self/ns/pid")
                .map(|link| link.to_string_lossy().into_owned())
                .unwrap_or_default(),
            pid,
            process_started: started(pid).unwrap_or_default(),
        }
    }

    /// Whether this process still lives, as far as `reader` can tell.
    fn lives(&self, reader: &Holder, heartbeat: Time, now: Time) -> bool {
        if self.boot == reader.boot
            && self.pid_namespace == reader.pid_namespace
            && !self.boot.is_empty()
        {
            started(self.pid) == Some(self.process_started)
        } else {
            // A clock may be ahead of ours, but not so far that the run would never end.
            now.since(heartbeat) <= HEARTBEAT_LIMIT && heartbeat.since(now) <= AHEAD_LIMIT
        }
    }
}

/// When a process began, in clock ticks since boot; none when there is no such process, or only its remains.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in brackets, may hold spaces and brackets: count from behind it.
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

impl Store {
    /// Says that the runner of `run` (this process) lives; to be called every few seconds. A run that another process
    /// took for lost meanwhile is again what it was.
    ///
    /// # Errors
    /// [`StoreError::Busy`], [`StoreError::Full`]: the run may go on, the next heartbeat will do.
    pub async fn heartbeat(&self, run: &RunId) -> Result<(), StoreError> {
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
        if let Some(host_lock) = &self.host_lock {
            let _ = host_lock.beat();
        }
        write.commit().await
    }

    /// Marks as lost the runs whose runner is gone. Where that cannot be written down it is remembered and shown.
    pub(super) async fn reconcile(&self) -> Result<(), StoreError> {
        let gone = gone(&mut *self.pool().acquire().await?, JobCondition::None).await?;
        if gone.is_empty() {
            return Ok(());
        }
        let recorded = async {
            let mut connection = connection::connect_for_writing(self.dir()).await?;
            for (key, _, _) in &gone {
                // The lease is kept: should its holder live after all, its heartbeat still has a place to go.
                sqlx::query(
                    "update runs set state = 'lost', finished = (select min(heartbeat, ?2) from leases where run = key)
                     where key = ?1 and state in ('queued', 'running')",
                )
                .bind(key)
                .bind(Time::now().0)
                .execute(&mut connection)
                .await?;
            }
            Ok::<_, StoreError>(())
        };
        if let Err(error) = recorded.await {
            tracing::debug!(%error, "lost runs could not be recorded as such");
            let mut lost = self
                .lost
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            lost.extend(gone.into_iter().map(|(_, id, _)| id));
        }
        Ok(())
    }

    /// The runs whose runner is gone, or has left on purpose, while a job of theirs is not over.
    pub(super) async fn without_runner(&self) -> Result<Vec<(i64, String, bool)>, StoreError> {
        gone(&mut *self.pool().acquire().await?, JobCondition::Open).await
    }

    /// The runs known to be lost but not recorded so, as a JSON list for SQL's `json_each`.
    pub(super) fn unrecorded_lost(&self) -> String {
        let lost = self
            .lost
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        serde_json::Value::from_iter(lost.iter().map(String::as_str)).to_string()
    }
}

/// An error when a run is under way: its runner, an older program, would not understand a migrated store.
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
        // An older schema knows no jobs.
        false => (gone(connection, JobCondition::Unknown).await?, Vec::new()),
    };
    match alive.len() > lost.len() + left.len() {
        true => Err(StoreError::InUse),
        false => Ok(()),
    }
}

/// Whether the store keeps jobs.
async fn has_jobs(connection: &mut SqliteConnection) -> Result<bool, StoreError> {
    let found = sqlx::query("select 1 from sqlite_schema where name = 'jobs'")
        .fetch_optional(connection)
        .await?;
    Ok(found.is_some())
}

/// Which runs are asked about.
#[derive(Clone, Copy)]
enum JobCondition {
    /// Those without a job that is not over.
    None,
    /// Those with one: whether they go on, Slurm knows.
    Open,
    /// All, in a store that knows no jobs.
    Unknown,
}

/// Keys and ids of the runs that are recorded as alive, and are not; and whether the runner has left them on purpose.
async fn gone(
    connection: &mut SqliteConnection,
    jobs: JobCondition,
) -> Result<Vec<(i64, String, bool)>, StoreError> {
    let query = match jobs {
        JobCondition::None => {
            "select r.key, r.id, l.host, l.boot, l.pid_namespace, l.pid, l.process_started, l.heartbeat, l.scheduler
             from runs r join leases l on l.run = r.key
             where r.state in ('queued', 'running')
               and not exists (select 1 from stages s join attempts a on a.stage = s.key
                               join jobs j on a.key in (j.attempt, j.taken_by)
                               where s.run = r.key and j.over is null)"
        }
        JobCondition::Open => {
            "select r.key, r.id, l.host, l.boot, l.pid_namespace, l.pid, l.process_started, l.heartbeat, l.scheduler
             from runs r join leases l on l.run = r.key
             where r.state in ('queued', 'running')
               and exists (select 1 from stages s join attempts a on a.stage = s.key
                           join jobs j on a.key in (j.attempt, j.taken_by)
                           where s.run = r.key and j.over is null)"
        }
        JobCondition::Unknown => {
            "select r.key, r.id, l.host, l.boot, l.pid_namespace, l.pid, l.process_started, l.heartbeat, 0 as scheduler
             from runs r join leases l on l.run = r.key
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

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl Fn(&mut Holder), heartbeat_age_s: i64, lives: bool) {
        let reader = Holder::this_process();
        let mut holder = reader.clone();
        change(&mut holder);
        let now = Time::now();
        assert_eq!(
            holder.lives(&reader, Time(now.0 - heartbeat_age_s * 1000), now),
            lives,
            "{holder:?}"
        );
    }

    #[test]
    fn on_the_same_machine_the_process_decides_and_not_the_clock() {
        check(|_| {}, 1_000_000, true);
        check(|_| {}, -1_000_000, true);
        check(|holder| holder.process_started += 1, 0, false);
        check(|holder| holder.pid = 0x7fff_fff0, 0, false);
    }

    #[test]
    fn elsewhere_the_heartbeat_decides() {
        check(|holder| holder.boot = "another".into(), 1, true);
        check(|holder| holder.boot = "another".into(), 1_000, false);
        check(
            |holder| (holder.pid, holder.pid_namespace) = (1, "another container".into()),
            1,
            true,
        );
        check(
            |holder| (holder.pid, holder.pid_namespace) = (1, "another container".into()),
            1_000,
            false,
        );
        // A clock ahead of ours is no reason to give a run up.
        check(|holder| holder.boot = "another".into(), -1_000, true);
        // Nobody's clock is ahead by days: such a run would be under way for good.
        let far = i64::try_from(AHEAD_LIMIT.as_secs()).unwrap() + 60;
        check(|holder| holder.boot = "another".into(), -far, false);
        check(
            |holder| holder.boot = "another".into(),
            -1_000_000_000,
            false,
        );
    }

    #[test]
    fn the_remains_of_a_process_do_not_live() {
        let mut child = std::process::Command::new("true")
            .spawn()
            .expect("`true` exists");
        let pid = child.id();
        // Not yet waited for, the child becomes a zombie: present in the process table, gone for us.
        while started(pid).is_some() {
            std::thread::yield_now();
        }
        child.wait().expect("own child");
        assert_eq!(started(pid), None);
    }
}
