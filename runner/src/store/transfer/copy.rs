//! Copies runs one by one from one database into another, with everything that belongs to them.

use std::collections::HashMap;

use libsqlite3_sys as ffi;
use sqlx::AssertSqlSafe;
use sqlx::sqlite::{SqliteConnection, SqliteQueryResult};

use super::Transfer;
use crate::store::series::make_spans;
use crate::store::{RunId, StoreError, block};

/// The state of copying, kept across transactions.
#[derive(Debug, Default)]
pub(in crate::store) struct Copied {
    /// The keys of attempts in the source, and in the destination.
    attempts: HashMap<i64, i64>,
    /// For attempts that have not been copied yet: the copied stages that reuse them, and the pieces of those stages.
    waiting: HashMap<i64, Vec<(i64, u64)>>,
    /// Stages and the attempts that they reuse, both in the destination, still to be written.
    ready: Vec<(i64, i64)>,
    /// The current piece, and how many of its stages wait.
    piece: u64,
    unsettled: u64,
    /// The report.
    pub(in crate::store) done: Transfer,
}

impl Copied {
    /// Records which attempt of the destination corresponds to one of the source.
    fn pair(&mut self, there: i64, here: i64) {
        self.attempts.insert(there, here);
        for (stage, piece) in self.waiting.remove(&there).unwrap_or_default() {
            self.ready.push((stage, here));
            self.unsettled -= u64::from(piece == self.piece);
        }
    }

    /// Records that a copied stage reuses an attempt of the source.
    fn reuses(&mut self, stage: i64, there: i64) {
        match self.attempts.get(&there) {
            Some(here) => self.ready.push((stage, *here)),
            None => {
                let waiting = self.waiting.entry(there).or_default();
                waiting.push((stage, self.piece));
                self.unsettled += 1;
            }
        }
    }
}

/// Copies runs from `source` to `main`.
pub(in crate::store) struct Copy<'c> {
    connection: &'c mut SqliteConnection,
    copied: &'c mut Copied,
    /// Whether the source is undamaged: then many rows are copied at once.
    is_sound: bool,
}

impl<'c> Copy<'c> {
    pub(in crate::store) fn new(
        connection: &'c mut SqliteConnection,
        copied: &'c mut Copied,
        is_sound: bool,
    ) -> Self {
        (copied.piece, copied.unsettled) = (copied.piece + 1, 0);
        Self {
            connection,
            copied,
            is_sound,
        }
    }

    /// Copies a run that the destination does not have.
    pub(in crate::store) async fn run(&mut self, run: &RunId) -> Result<(), StoreError> {
        let there: Option<i64> = sqlx::query_scalar("select key from main.runs where id = ?1")
            .bind(&run.0)
            .fetch_optional(&mut *self.connection)
            .await?;
        if there.is_some() {
            self.known(run).await?;
            self.copied.done.known.push(run.clone());
            return Ok(());
        }
        let Some(here) = self.insert_run(run).await? else {
            return Ok(());
        };
        let (key, sweep, point): (i64, Option<i64>, Option<i64>) =
            sqlx::query_as("select key, sweep, point from source.runs where id = ?1")
                .bind(&run.0)
                .fetch_one(&mut *self.connection)
                .await?;
        let pieces = [
            (
                "recipe and environment",
                "insert into main.documents (run, recipe_text, resolved, environment)
                 select ?2, recipe_text, resolved, environment from source.documents
                 where run = ?1 and json_valid(resolved) and json_valid(environment)",
            ),
            (
                // The end of a lost run is its last heartbeat, which only the source knows.
                "when it was last heard of",
                "update main.runs set finished = coalesce(
                     (select l.heartbeat from source.leases l
                      where l.run = ?1 and l.heartbeat between runs.created and unixepoch() * 1000),
                     (select max(coalesce(a.finished, a.started)) from source.stages s
                      join source.attempts a on a.stage = s.key where s.run = ?1),
                     created)
                 where key = ?2 and state = 'lost' and finished is null",
            ),
            (
                "tags",
                "insert or ignore into main.tags (run, tag) select ?2, tag from source.tags where run = ?1",
            ),
            (
                "names of parameters",
                "insert or ignore into main.names (name)
                 select n.name from source.params p join source.names n on n.key = p.name where p.run = ?1 and ?2",
            ),
            (
                "parameters",
                "insert or ignore into main.params (key, value, type, origin)
                 select m.key << 32 | ?2, p.value, p.type, p.origin
                 from source.params p join source.names n on n.key = p.name join main.names m on m.name = n.name
                 where p.run = ?1",
            ),
            (
                "names of series",
                "insert or ignore into main.names (name)
                 select n.name from source.results p join source.names n on n.key = p.name where p.run = ?1 and ?2",
            ),
            (
                "results",
                "insert or ignore into main.results (key, position, points, last, min, max)
                 select m.key << 32 | ?2, p.position, p.points, p.last, p.min, p.max
                 from source.results p join source.names n on n.key = p.name join main.names m on m.name = n.name
                 where p.run = ?1",
            ),
            (
                "that it comes from elsewhere",
                "insert into main.imported (run) select ?2 where ?1 is not null",
            ),
            (
                // A run without its recipe could not be found.
                "that it has no recipe",
                "insert or ignore into main.documents (run, recipe_text, resolved, environment)
                 select ?2, '', 'null', '{}' where ?1 is not null",
            ),
        ];
        self.pieces(&pieces, (key, here), run).await?;
        if let (Some(sweep), Some(point)) = (sweep, point) {
            self.sweep(run, (sweep, point), here).await?;
        }
        let stages = self.keys(
            "select key from source.stages where run = ?1 order by key",
            key,
            run,
            "stages",
        );
        for stage in stages.await? {
            self.stage(run, stage, here).await?;
        }
        self.copied.done.runs.push(run.clone());
        Ok(())
    }

    /// Copies the row of a run. Returns its new key, if the row can be read.
    async fn insert_run(&mut self, run: &RunId) -> Result<Option<i64>, StoreError> {
        let copied = self
            .row(
                "insert into main.runs (id, recipe, recipe_path, seed, command, resumed_from, state, error, created,
                     finished, note)
                 select id, recipe, recipe_path, seed, command, resumed_from,
                     case when state in ('queued', 'running') then 'lost' else state end, error, created, finished, note
                 from source.runs where id = ?1",
                &run.0,
            )
            .await;
        Ok(self.or_lost(copied, run, "the run")?.flatten())
    }

    /// The sweep of which a run is a point. An existing one of the same name is not changed: the run becomes its point only if
    /// both have the same content.
    async fn sweep(
        &mut self,
        run: &RunId,
        (sweep, point): (i64, i64),
        here: i64,
    ) -> Result<(), StoreError> {
        let copied = self.rows(
                "insert into main.sweeps (id, recipe, recipe_path, recipe_text, settings, definition, selection, points,
                     created)
                 select id, recipe, recipe_path, recipe_text, settings, definition, selection, points, created
                 from source.sweeps w where key = ?1 and ?2 and not exists (select 1 from main.sweeps where id = w.id)",
(sweep, here),
run,
"its sweep",
);
        copied.await?;
        for sql in [
            // An existing sweep has its points already.
            "insert or ignore into main.sweep_points (sweep, point, settings)
             select m.key, p.point, p.settings
             from source.sweeps w join source.sweep_points p on p.sweep = w.key join main.sweeps m on m.id = w.id
             where w.key = ?1 and ?2 and not exists (select 1 from main.sweep_points where sweep = m.key)",
            "update main.runs set
                 sweep = (select m.key from source.sweeps w
                          join main.sweeps m on m.id = w.id and m.recipe_text = w.recipe_text
                              and m.settings = w.settings and m.definition = w.definition and m.points = w.points
                          where w.key = ?1)
             where key = ?2",
        ] {
            self.rows(sql, (sweep, here), run, "its place in a sweep").await?;
        }
        for (sql, value) in [
            (
                "update main.runs set point = ?1 where key = ?2 and sweep is not null",
                point,
            ),
            (
                "insert or ignore into main.sweep_rungs (sweep, point, rung, value)
             select r.sweep, g.point, g.rung, g.value from main.runs r
             join source.sweep_rungs g on g.sweep = ?1 and g.point = r.point
             where r.key = ?2 and r.sweep is not null",
                sweep,
            ),
        ] {
            self.rows(sql, (value, here), run, "its place in a sweep")
                .await?;
        }
        Ok(())
    }

    /// For a run that the destination has: matches its attempts, and adds missing tags.
    async fn known(&mut self, run: &RunId) -> Result<(), StoreError> {
        let pairs: Vec<(i64, i64)> = sqlx::query_as(
            "select sa.key, ma.key
             from source.runs sr
             join source.stages ss on ss.run = sr.key
             join source.attempts sa on sa.stage = ss.key
             join main.runs mr on mr.id = sr.id
             join main.stages ms on ms.run = mr.key and ms.name = ss.name
             join main.attempts ma on ma.stage = ms.key and ma.number = sa.number
             where sr.id = ?1",
        )
        .bind(&run.0)
        .fetch_all(&mut *self.connection)
        .await?;
        for (there, here) in pairs {
            self.copied.pair(there, here);
        }
        // An interrupted import may lack what only a later piece has.
        let unconnected: Vec<(i64, i64)> = sqlx::query_as(
            "select ms.key, ss.reused_from
             from source.runs sr
             join source.stages ss on ss.run = sr.key
             join main.runs mr on mr.id = sr.id
             join main.stages ms on ms.run = mr.key and ms.name = ss.name
             where sr.id = ?1 and ss.reused_from is not null
                 and ms.reused_from is null and ms.state = 'reused' and ms.digest = ss.digest",
        )
        .bind(&run.0)
        .fetch_all(&mut *self.connection)
        .await?;
        for (stage, there) in unconnected {
            self.copied.reuses(stage, there);
        }
        sqlx::query(
            "insert or ignore into main.tags (run, tag)
             select m.key, t.tag from source.runs s join source.tags t on t.run = s.key
             join main.runs m on m.id = s.id where s.id = ?1",
        )
        .bind(&run.0)
        .execute(&mut *self.connection)
        .await?;
        Ok(())
    }

    async fn stage(&mut self, run: &RunId, key: i64, into: i64) -> Result<(), StoreError> {
        let copied = self.one(
                "insert into main.stages (run, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype,
                     seed, options, inputs, state, digest, components)
                 select ?2, position, name, kind, plugin, plugin_version, plugin_hash, device, dtype, seed, options,
                     inputs, state, digest, components
                 from source.stages where key = ?1 and json_valid(options) and json_valid(inputs)",
(key, into),
run,
"a stage",
);
        let Some(here) = copied.await? else {
            return Ok(());
        };
        let reused: Option<i64> =
            sqlx::query_scalar("select reused_from from source.stages where key = ?1")
                .bind(key)
                .fetch_one(&mut *self.connection)
                .await?;
        if let Some(there) = reused {
            self.copied.reuses(here, there);
        }
        let attempts = self.keys(
            "select key from source.attempts where stage = ?1 order by number",
            key,
            run,
            "attempts",
        );
        for attempt in attempts.await? {
            self.attempt(run, attempt, here).await?;
        }
        Ok(())
    }

    async fn attempt(&mut self, run: &RunId, key: i64, into: i64) -> Result<(), StoreError> {
        let artifacts = self.rows(
                "insert or ignore into main.artifacts (hash, size, files, created)
                 select f.hash, f.size, f.files, f.created from source.artifacts f where ?2 and f.hash in (
                     select artifact from source.outputs where attempt = ?1
                     union select artifact from source.inputs where attempt = ?1
                     union select output from source.attempts where key = ?1)",
(key, into),
run,
"artifacts",
);
        artifacts.await?;
        let copied = self.one(
                "insert into main.attempts (stage, number, digest, worker_pid, state, reason, message, failure, summary,
                     output, cpu_seconds, max_rss, started, finished, paused)
                 select ?2, number, digest, worker_pid, state, reason, message, failure, summary,
                     (select hash from main.artifacts where hash = output), cpu_seconds, max_rss, started, finished,
                     paused
                 from source.attempts where key = ?1",
(key, into),
run,
"an attempt",
);
        let Some(here) = copied.await? else {
            return Ok(());
        };
        self.copied.pair(key, here);
        let pieces = [
            (
                "artifacts made",
                "insert into main.outputs (attempt, artifact, kind, name, meta, created)
                 select ?2, artifact, kind, name, meta, created from source.outputs
                 where attempt = ?1 and artifact in (select hash from main.artifacts) order by key",
            ),
            (
                "artifacts given",
                "insert or ignore into main.inputs (attempt, artifact)
                 select ?2, artifact from source.inputs
                 where attempt = ?1 and artifact in (select hash from main.artifacts)",
            ),
            (
                "log",
                "insert into main.logs (attempt, at, level, source, text)
                 select ?2, at, level, source, text from source.logs where attempt = ?1 order by key",
            ),
        ];
        self.pieces(&pieces, (key, here), run).await?;
        let series = self.keys(
            "select key from source.series where attempt = ?1 order by key",
            key,
            run,
            "series",
        );
        for series in series.await? {
            self.series(run, series, here).await?;
        }
        Ok(())
    }

    async fn series(&mut self, run: &RunId, key: i64, into: i64) -> Result<(), StoreError> {
        let copied = self.one(
                "insert into main.series (attempt, name, base, last_step, last, min, max, points)
                 select ?2, name, base, last_step, last, min, max, points from source.series where key = ?1",
(key, into),
run,
"a series",
);
        let Some(here) = copied.await? else {
            return Ok(());
        };
        let steps = self.keys(
            "select first_step from source.blocks where series = ?1 order by first_step",
            key,
            run,
            "blocks of points",
        );
        for step in steps.await? {
            let copied = self.block(key, here, step).await;
            self.or_lost(copied, run, "a block of points")?;
        }
        Ok(make_spans(self.connection, here).await?)
    }

    async fn block(&mut self, key: i64, here: i64, step: i64) -> Result<(), StoreError> {
        if !self.is_sound {
            // SQLite does not detect damage within a value.
            let data: Vec<u8> = sqlx::query_scalar(
                "select k.data from source.blocks b join source.packs k on k.key = b.pack
                 where b.series = ?1 and b.first_step = ?2",
            )
            .bind(key)
            .bind(step)
            .fetch_one(&mut *self.connection)
            .await?;
            block::unpack(&data).map_err(|damaged| StoreError::Damaged {
                message: damaged.to_string(),
            })?;
        }
        sqlx::query(
            "insert into main.packs (data)
             select k.data from source.blocks b join source.packs k on k.key = b.pack
             where b.series = ?1 and b.first_step = ?2;
             insert into main.blocks (series, first_step, last_step, points, numbers, sum, min, max, first_at,
                 last_at, pack)
             select ?3, first_step, last_step, points, numbers, sum, min, max, first_at, last_at, last_insert_rowid()
             from source.blocks where series = ?1 and first_step = ?2",
        )
        .bind(key)
        .bind(step)
        .bind(here)
        .execute(&mut *self.connection)
        .await?;
        Ok(())
    }

    /// Links stages to the attempts that they reuse, as far as these have been copied. Returns whether all attempts that this
    /// piece's stages reuse have been copied.
    pub(in crate::store) async fn connect_reused(&mut self) -> Result<bool, StoreError> {
        for (stage, here) in std::mem::take(&mut self.copied.ready) {
            // A file from elsewhere may claim anything: a reused result must have the stage's digest.
            sqlx::query(
                "update main.stages set reused_from = ?2
                 where key = ?1 and digest is (select digest from main.attempts where key = ?2)",
            )
            .bind(stage)
            .bind(here)
            .execute(&mut *self.connection)
            .await?;
        }
        Ok(self.copied.unsettled == 0)
    }

    /// The artifacts of a source's run that the destination has.
    pub(in crate::store) async fn artifacts(
        &mut self,
        run: &RunId,
    ) -> Result<Vec<String>, StoreError> {
        let found = sqlx::query_scalar(
            "with attempt(key, output) as (
                 select a.key, a.output from source.runs r join source.stages s on s.run = r.key
                 join source.attempts a on a.stage = s.key where r.id = ?1)
             select hash from main.artifacts where hash in (
                 select o.artifact from attempt a join source.outputs o on o.attempt = a.key
                 union select i.artifact from attempt a join source.inputs i on i.attempt = a.key
                 union select output from attempt)",
        );
        Ok(found.bind(&run.0).fetch_all(&mut *self.connection).await?)
    }

    /// Copies the row with an id. Returns its new key, if there was one.
    async fn row(&mut self, sql: &'static str, id: &str) -> Result<Option<i64>, StoreError> {
        let done = sqlx::query(sql)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
        Ok((done.rows_affected() > 0).then(|| done.last_insert_rowid()))
    }

    /// Copies the rows of `key` in the source to `into`. If they cannot be read, `what` names them in the report.
    async fn rows(
        &mut self,
        sql: &'static str,
        (key, into): (i64, i64),
        run: &RunId,
        what: &str,
    ) -> Result<(), StoreError> {
        let done = self.execute(sql, key, into).await;
        self.or_lost(done, run, what)?;
        Ok(())
    }

    async fn execute(
        &mut self,
        sql: &'static str,
        key: i64,
        into: i64,
    ) -> Result<SqliteQueryResult, StoreError> {
        let query = sqlx::query(sql).bind(key).bind(into);
        Ok(query.execute(&mut *self.connection).await?)
    }

    /// Copies pieces, each with its name, of `key` in the source to `into`. Without damage a single query copies them all,
    /// because a query's overhead exceeds its work.
    async fn pieces(
        &mut self,
        pieces: &[(&str, &'static str)],
        (key, into): (i64, i64),
        run: &RunId,
    ) -> Result<(), StoreError> {
        if self.is_sound {
            let all: Vec<&str> = pieces.iter().map(|(_, sql)| *sql).collect();
            let copied = sqlx::query(AssertSqlSafe(all.join(";\n")))
                .bind(key)
                .bind(into)
                .execute(&mut *self.connection)
                .await;
            let copied = copied.map_err(StoreError::from);
            self.or_lost(copied, run, "what belongs to it")?;
            return Ok(());
        }
        for (what, sql) in pieces {
            self.rows(sql, (key, into), run, what).await?;
        }
        Ok(())
    }

    /// Like [`Self::rows`], for the one row with this key. Returns its new key.
    async fn one(
        &mut self,
        sql: &'static str,
        (key, into): (i64, i64),
        run: &RunId,
        what: &str,
    ) -> Result<Option<i64>, StoreError> {
        let done = self.execute(sql, key, into).await;
        let copied = done.and_then(|done| match done.rows_affected() {
            0 => Err(StoreError::Damaged {
                message: "it makes no sense".to_owned(),
            }),
            _ => Ok(done.last_insert_rowid()),
        });
        self.or_lost(copied, run, what)
    }

    /// The keys of the rows of `of` in the source. If they cannot be read, `what` names them in the report.
    async fn keys(
        &mut self,
        sql: &'static str,
        of: i64,
        run: &RunId,
        what: &str,
    ) -> Result<Vec<i64>, StoreError> {
        // Of numbers, not of rows: a row takes several times the memory, and a file decides how many there are.
        let keys = sqlx::query_scalar(sql).bind(of);
        let keys = keys.fetch_all(&mut *self.connection).await;
        let keys = self.or_lost(keys.map_err(StoreError::from), run, what)?;
        Ok(keys.unwrap_or_default())
    }

    /// Reports what cannot be read; passes on other errors.
    pub(super) fn or_lost<T>(
        &mut self,
        result: Result<T, StoreError>,
        run: &RunId,
        what: &str,
    ) -> Result<Option<T>, StoreError> {
        match result {
            Ok(copied) => Ok(Some(copied)),
            Err(StoreError::Damaged { message }) => {
                self.copied
                    .done
                    .lost
                    .push(format!("run {run}: {what}: {message}"));
                Ok(None)
            }
            // Damage may also look like rows that violate a constraint. What has no row or no value is damage too.
            Err(StoreError::Sql(error)) if is_of_the_source(&error) => {
                self.copied
                    .done
                    .lost
                    .push(format!("run {run}: {what}: {error}"));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether an error says something about the rows that were read. Others, as when memory runs out or the connection breaks, end
/// the transfer: what would be missing is not known.
fn is_of_the_source(error: &sqlx::Error) -> bool {
    match error {
        // A full disk has an error of its own.
        sqlx::Error::Database(said) => !matches!(
            said.code().and_then(|code| code.parse().ok()),
            Some(ffi::SQLITE_NOMEM | ffi::SQLITE_IOERR_NOMEM | ffi::SQLITE_IOERR_WRITE)
        ),
        sqlx::Error::RowNotFound
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::Decode(_)
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_connection_is_no_damage() {
        assert!(is_of_the_source(&sqlx::Error::RowNotFound));
        for machine in [sqlx::Error::WorkerCrashed, sqlx::Error::PoolClosed] {
            assert!(!is_of_the_source(&machine), "{machine}");
        }
    }
}
