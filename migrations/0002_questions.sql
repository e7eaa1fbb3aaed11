-- What people ask of the history, made cheap to answer.
--
-- Why these shapes:
-- * SQLite reads a row from its beginning. The long texts of a run (recipe, plan, environment) therefore leave `runs`
--   for `documents`: a list of 100,000 runs must not read 100,000 recipes.
-- * Names of parameters and of series repeat in every run: they are kept once, in `names`.
-- * `params` and `results` lie by name first: a filter such as `metrics.fd.last < 3` reads the rows of one name from end
--   to end, and what else is asked of a run is one look-up each.
-- * `results` repeats, for every run, what `series` knows, reused stages included. A series is found under its own name
--   (of several stages that have it the last one speaks) and under `stage/series`.
-- * Points are packed: some thousands of one series make a block. A row per point costs 26 bytes and a look-up for each;
--   a packed one about ten bytes or less, and a curve reads the few numbers that describe each block (`blocks`) instead of
--   its points (`packs`). Blocks of a series do not overlap. The layout of `packs.data` is told in
--   `runner/src/store/block.rs`; in SQL `retort_points(data)` gives it as a JSON list of [step, value, milliseconds after
--   `series.base`]. It is known to `retort query`, not to other programs.
-- * The rows of `points` are packed by the program after this file has run; then 0003 removes the table.

drop view v_logs;
drop view v_lineage;
drop view v_artifacts;
drop view v_metrics;
drop view v_series;
drop view v_params;
drop view v_attempts;
drop view v_stages;
drop view v_stage_attempts;
drop view v_runs;

create table documents (
    run         integer primary key references runs (key) on delete cascade,
    recipe_text text    not null,
    resolved    text    not null,            -- JSON: the recipe with every default filled in
    environment text    not null             -- JSON object
) strict;
insert into documents (run, recipe_text, resolved, environment)
select key, recipe_text, resolved, environment from runs;
alter table runs drop column recipe_text;
alter table runs drop column resolved;
alter table runs drop column environment;
alter table runs add column note text not null default '';

create table names (
    key  integer primary key,
    name text    not null unique
) strict;

create table run_params (
    name   integer not null references names (key),
    run    integer not null references runs (key) on delete cascade,
    value  any,
    type   text    not null check (type in ('null', 'boolean', 'integer', 'real', 'text', 'array', 'object')),
    origin text    not null,
    primary key (name, run)
) strict, without rowid;
insert into names (name) select distinct path from params order by path;
insert into run_params (name, run, value, type, origin)
select n.key, p.run, p.value, p.type, p.origin from params p join names n on n.name = p.path;
drop table params;
alter table run_params rename to params;
create index params_of_run on params (run);

alter table series add column points integer not null default 0;
create table blocks (
    series     integer not null references series (key) on delete cascade,
    first_step integer not null,
    last_step  integer not null,
    points     integer not null,             -- how many
    numbers    integer not null,             -- how many of them are not NaN
    sum        real,                         -- of these; null when it is NaN
    min        real,
    max        real,
    first_at   integer not null,             -- milliseconds after series.base
    last_at    integer not null,
    pack       integer not null,
    primary key (series, first_step)
) strict, without rowid;
create table packs (
    key  integer primary key,
    data blob    not null
) strict;
create trigger blocks_take_packs_along after delete on blocks begin
    delete from packs where key = old.pack;
end;

create table results (
    name     integer not null references names (key),
    run      integer not null references runs (key) on delete cascade,
    position integer not null,               -- of the stage
    points   integer not null,
    last     real,                           -- null is NaN
    min      real,
    max      real,
    primary key (name, run)
) strict, without rowid;
create index results_of_run on results (run);

create view v_runs as
select r.id,
       r.recipe,
       r.state,
       strftime('%Y-%m-%dT%H:%M:%fZ', r.created / 1000.0, 'unixepoch')  as started,
       strftime('%Y-%m-%dT%H:%M:%fZ', r.finished / 1000.0, 'unixepoch') as finished,
       (r.finished - r.created) / 1000.0                                as seconds,
       r.seed,
       r.note,
       (select group_concat(t.tag, ' ') from tags t where t.run = r.key) as tags,
       (select count(*) from stages s where s.run = r.key)              as stages,
       (select count(*) from stages s where s.run = r.key and s.state = 'reused') as reused,
       r.error,
       r.recipe_path,
       r.command,
       r.resumed_from,
       d.environment,
       d.resolved
from runs r join documents d on d.run = r.key;

-- The attempts that speak for a stage of a run: its own, or the one it reuses.
create view v_stage_attempts as
select s.run, s.key as stage, a.key as attempt, 0 as reused from stages s join attempts a on a.stage = s.key
union all
select s.run, s.key, s.reused_from, 1 from stages s where s.reused_from is not null;

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
       (a.finished - a.started) / 1000.0 as seconds,
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
       (a.finished - a.started) / 1000.0 as seconds,
       a.cpu_seconds,
       a.max_rss,
       a.worker_pid,
       a.digest
from attempts a
join stages s on s.key = a.stage
join runs r on r.key = s.run;

create view v_params as
select r.id as run, r.recipe, n.name as path, p.value, p.type, p.origin
from params p join names n on n.key = p.name join runs r on r.key = p.run;

-- One row per series of a run; `last`, `min`, `max` as of all its points. A null is NaN.
create view v_series as
select r.id as run, r.recipe, s.name as stage, e.attempt, v.reused, e.name as series, e.points, e.last_step, e.last,
       e.min, e.max
from v_stage_attempts v
join series e on e.attempt = v.attempt
join stages s on s.key = v.stage
join runs r on r.key = v.run;

-- One row per point. A null value is NaN.
create view v_metrics as
select r.id as run,
       s.name as stage,
       e.attempt,
       e.name as series,
       p.value ->> 0 as step,
       p.value ->> 1 as value,
       strftime('%Y-%m-%dT%H:%M:%fZ', (e.base + (p.value ->> 2)) / 1000.0, 'unixepoch') as at
from v_stage_attempts v
join series e on e.attempt = v.attempt
join blocks b on b.series = e.key
join packs k on k.key = b.pack
join json_each(retort_points(k.data)) p
join stages s on s.key = v.stage
join runs r on r.key = v.run;

create view v_artifacts as
select o.artifact as hash,
       o.kind,
       o.name,
       f.size,
       r.id as run,
       s.name as stage,
       v.attempt,
       v.reused,
       o.artifact = a.output as is_output,
       strftime('%Y-%m-%dT%H:%M:%fZ', o.created / 1000.0, 'unixepoch') as created,
       o.meta,
       f.files
from v_stage_attempts v
join attempts a on a.key = v.attempt
join outputs o on o.attempt = v.attempt
join artifacts f on f.hash = o.artifact
join stages s on s.key = v.stage
join runs r on r.key = v.run;

-- Which artifact was made from which.
create view v_lineage as
select o.artifact, o.kind, i.artifact as made_from, o.attempt
from outputs o join inputs i on i.attempt = o.attempt;

create view v_logs as
select r.id as run,
       s.name as stage,
       l.attempt,
       strftime('%Y-%m-%dT%H:%M:%fZ', l.at / 1000.0, 'unixepoch') as at,
       case l.level when 1 then 'error' when 2 then 'warn' when 3 then 'info' when 4 then 'debug' else 'trace' end as level,
       l.source,
       l.text
from logs l
join attempts a on a.key = l.attempt
join stages s on s.key = a.stage
join runs r on r.key = s.run;
