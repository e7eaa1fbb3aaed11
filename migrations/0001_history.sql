-- The history of runs.
--
-- Why these shapes:
-- * Times are integers: milliseconds since 1970-01-01 UTC. The views show them as ISO 8601 text.
-- * `strict` tables: SQLite would otherwise store a text in an integer column without a word.
-- * A run's lease is a table of its own: the heartbeat rewrites its row every few seconds, and the row of a run carries
--   the whole recipe.
-- * The state of a stage is stored as its runner last knew it. Whether that runner still lives is a fact about the run
--   alone (`lost`), so a stage of a lost run is *shown* as lost (v_stages) and nothing has to be rewritten, or put back
--   when a runner that was only slow turns out to live.
-- * An artifact is its content (`artifacts`, by hash). That an attempt made it, under which name and kind and with which
--   remarks, is another fact (`outputs`): two attempts may make the same bytes.
-- * `points` is the one big table: a point costs its key and its value once, no rowid and no second index. Its time is
--   counted from `series.base`, so that it takes three or four bytes instead of six.
-- * SQLite cannot hold a NaN: binding one stores null. In `points` and in the summary columns of `series` a null value
--   therefore *is* NaN; no point is ever without a value. Infinities are stored as they are.
-- * `series` keeps last, min and max, so that lists and filters over many runs do not read points.
--
-- Tables may change with every version; the views (v_...) are what `retort query` promises.

create table runs (
    key          integer primary key,
    id           text    not null unique,
    recipe       text    not null,
    recipe_path  text    not null,
    recipe_text  text    not null,
    resolved     text    not null,           -- JSON: the recipe with every default filled in
    seed         integer not null,           -- the bits of an unsigned 64-bit number
    command      text    not null,           -- JSON list: the arguments of the command
    environment  text    not null,           -- JSON object
    resumed_from text,                       -- id of a run, which may since have been removed
    state        text    not null
        check (state in ('queued', 'running', 'succeeded', 'failed', 'interrupted', 'lost')),
    error        text,
    created      integer not null,
    finished     integer
) strict;
create index runs_by_time on runs (created, key);
create index runs_by_recipe on runs (recipe, created);
create index runs_alive on runs (state) where state in ('queued', 'running');

-- Who carries a run out: enough to tell, later, whether that very process still lives.
create table leases (
    run             integer primary key references runs (key) on delete cascade,
    host            text    not null,
    boot            text    not null,        -- boot id of the machine: a pid means something within one boot only
    pid_namespace   text    not null,        -- and within one namespace of process ids only
    pid             integer not null,
    process_started integer not null,        -- clock ticks since boot; tells a reused pid apart
    heartbeat       integer not null
) strict;

create table tags (
    run integer not null references runs (key) on delete cascade,
    tag text    not null,
    primary key (tag, run)
) strict, without rowid;
create index tags_of_run on tags (run);

-- Every resolved value and where it came from. `value` has its own SQL type, so that it can be compared in SQL;
-- `type` is its JSON type (booleans and null have no SQL value of their own; lists and maps are JSON text).
create table params (
    run    integer not null references runs (key) on delete cascade,
    path   text    not null,
    value  any,
    type   text    not null check (type in ('null', 'boolean', 'integer', 'real', 'text', 'array', 'object')),
    origin text    not null,
    primary key (run, path)
) strict, without rowid;

create table stages (
    key            integer primary key,
    run            integer not null references runs (key) on delete cascade,
    position       integer not null,
    name           text    not null,
    kind           text    not null,
    plugin         text    not null,
    plugin_version text    not null,
    plugin_hash    text    not null,
    device         text    not null,
    dtype          text    not null,
    seed           integer not null,
    options        text    not null,         -- JSON
    inputs         text    not null,         -- JSON list of [pointer into the options, name of the stage]
    state          text    not null
        check (state in ('queued', 'running', 'succeeded', 'reused', 'failed', 'interrupted')),
    digest         text,                     -- null until the inputs are known
    components     text,                     -- JSON: the parts of the digest, to tell later which one differs
    reused_from    integer references attempts (key) on delete set null,
    unique (run, name)
) strict;
create index stages_by_source on stages (reused_from) where reused_from is not null;

create table attempts (
    key         integer primary key,
    stage       integer not null references stages (key) on delete cascade,
    number      integer not null,            -- 1, 2, ... within the stage
    digest      text    not null,
    worker_pid  integer not null,
    state       text    not null check (state in ('running', 'succeeded', 'failed', 'interrupted')),
    reason      text,                        -- how it ended, precisely: succeeded, panic, killed by signal 9, ...
    message     text,
    failure     text,                        -- JSON
    summary     text,                        -- JSON
    output      text references artifacts (hash),
    cpu_seconds real,
    max_rss     integer,                     -- bytes
    started     integer not null,
    finished    integer,
    unique (stage, number)
) strict;
create index attempts_by_digest on attempts (digest, key) where state = 'succeeded';

create table artifacts (
    hash    text    primary key,             -- hex BLAKE3 of the contents
    size    integer not null,                -- bytes
    files   text    not null,                -- JSON list of {path, size, hash}
    created integer not null
) strict, without rowid;

create table outputs (
    key      integer primary key,
    attempt  integer not null references attempts (key) on delete cascade,
    artifact text    not null references artifacts (hash),
    kind     text    not null,
    name     text    not null,
    meta     text    not null,               -- JSON
    created  integer not null
) strict;
create index outputs_of_attempt on outputs (attempt);
create index outputs_by_artifact on outputs (artifact);

-- Lineage: what an attempt was given.
create table inputs (
    attempt  integer not null references attempts (key) on delete cascade,
    artifact text    not null references artifacts (hash),
    primary key (attempt, artifact)
) strict, without rowid;
create index inputs_by_artifact on inputs (artifact);

create table series (
    key       integer primary key,
    attempt   integer not null references attempts (key) on delete cascade,
    name      text    not null,
    base      integer not null,              -- time of the first point appended
    last_step integer not null,
    last      real,
    min       real,                          -- NaN is neither least nor greatest
    max       real,
    unique (attempt, name)
) strict;

create table points (
    series integer not null references series (key) on delete cascade,
    step   integer not null,
    value  real,
    at     integer not null,                 -- milliseconds after series.base
    primary key (series, step)
) strict, without rowid;

create table logs (
    key     integer primary key,
    attempt integer not null references attempts (key) on delete cascade,
    at      integer not null,
    level   integer not null,                -- 1 error, 2 warn, 3 info, 4 debug, 5 trace
    source  text    not null,                -- plugin, stdout, stderr, runner
    text    text    not null
) strict;
create index logs_of_attempt on logs (attempt);

-- What a plugin says of itself, so that a run that reuses everything starts no process.
create table descriptions (
    plugin_hash text    primary key,
    description text    not null,            -- JSON
    cached      integer not null
) strict, without rowid;

create view v_runs as
select r.id,
       r.recipe,
       r.state,
       strftime('%Y-%m-%dT%H:%M:%fZ', r.created / 1000.0, 'unixepoch')  as started,
       strftime('%Y-%m-%dT%H:%M:%fZ', r.finished / 1000.0, 'unixepoch') as finished,
       (r.finished - r.created) / 1000.0                                as seconds,
       r.seed,
       (select group_concat(t.tag, ' ') from tags t where t.run = r.key) as tags,
       (select count(*) from stages s where s.run = r.key)              as stages,
       (select count(*) from stages s where s.run = r.key and s.state = 'reused') as reused,
       r.error,
       r.recipe_path,
       r.command,
       r.resumed_from,
       r.environment,
       r.resolved
from runs r;

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
select r.id as run, r.recipe, p.path, p.value, p.type, p.origin
from params p join runs r on r.key = p.run;

-- One row per series of a run; `last`, `min`, `max` as of all its points. A null is NaN.
create view v_series as
select r.id as run, r.recipe, s.name as stage, e.attempt, v.reused, e.name as series, e.last_step, e.last, e.min, e.max
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
       p.step,
       p.value,
       strftime('%Y-%m-%dT%H:%M:%fZ', (e.base + p.at) / 1000.0, 'unixepoch') as at
from v_stage_attempts v
join series e on e.attempt = v.attempt
join points p on p.series = e.key
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
