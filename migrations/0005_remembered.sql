-- Hashes of files remembered between commands, and time that a stage was stopped.
--
-- Why these shapes:
-- * A folder may hold a million files: one packed row for each folder is read and written at once. The layout of `files`
--   is told in `runner/src/input.rs`. A row is only a memory: without it files are read again.
-- * While a run is stopped (Ctrl-Z) its stages do nothing: `paused` is taken off the seconds that they took.

create table file_hashes (
    path  text not null primary key,         -- of a folder, or of a file that was named itself
    files blob not null
) strict;

alter table attempts add column paused integer not null default 0; -- milliseconds

drop view v_attempts;
drop view v_stages;

create view v_stages as
select r.id as run,
       r.recipe,
       s.position,
       s.name as stage,
       s.kind,
       case when s.state = 'running' and r.state = 'lost' then 'lost'
            when s.state in ('queued', 'running') and r.state not in ('queued', 'running') then 'skipped'
            else s.state end as state,
       a.reason,
       a.message,
       strftime('%Y-%m-%dT%H:%M:%fZ', a.started / 1000.0, 'unixepoch')  as started,
       strftime('%Y-%m-%dT%H:%M:%fZ', a.finished / 1000.0, 'unixepoch') as finished,
       (a.finished - a.started - a.paused) / 1000.0 as seconds,
       a.cpu_seconds,
       a.max_rss,
       (select count(*) from attempts n where n.stage = s.key) as attempts,
       sr.id as reused_from_run,
       ss.name as reused_from_stage,
       coalesce(a.output, src.output) as output,
       s.plugin,
       s.plugin_version,
       s.plugin_hash,
       s.device,
       s.dtype,
       s.seed,
       s.digest,
       s.components,
       s.options
from stages s
join runs r on r.key = s.run
left join attempts a on a.key = (select max(n.key) from attempts n where n.stage = s.key)
left join attempts src on src.key = s.reused_from
left join stages ss on ss.key = src.stage
left join runs sr on sr.key = ss.run;

create view v_attempts as
select a.key as attempt,
       r.id as run,
       s.name as stage,
       a.number,
       case when a.state = 'running' and r.state not in ('queued', 'running') then 'lost' else a.state end as state,
       a.reason,
       a.message,
       a.failure,
       a.summary,
       a.output,
       strftime('%Y-%m-%dT%H:%M:%fZ', a.started / 1000.0, 'unixepoch')  as started,
       strftime('%Y-%m-%dT%H:%M:%fZ', a.finished / 1000.0, 'unixepoch') as finished,
       (a.finished - a.started - a.paused) / 1000.0 as seconds,
       a.cpu_seconds,
       a.max_rss,
       a.worker_pid,
       a.digest
from attempts a
join stages s on s.key = a.stage
join runs r on r.key = s.run;
