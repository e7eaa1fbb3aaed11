-- Filters over many runs, made cheaper.
--
-- Why this shape:
-- * A parameter, or a result, of a run is found by one integer: the key of its name times 2^32, plus the run's. Of a name
--   the rows still lie together, in the order of runs, so that the next run's row is the next row: SQLite then steps to
--   it instead of searching from the root. With (name, run) as a key it compared whole records on the way.
-- * `name` and `run` are computed: they cost no space and may be used as before.

drop view v_params;

create table keyed_params (
    key    integer primary key,              -- name << 32 | run
    value  any,
    type   text    not null check (type in ('null', 'boolean', 'integer', 'real', 'text', 'array', 'object')),
    origin text    not null,
    name   integer generated always as (key >> 32) virtual,
    run    integer generated always as (key & 0xffffffff) virtual references runs (key) on delete cascade
) strict;
insert into keyed_params (key, value, type, origin)
select name << 32 | run, value, type, origin from params order by name, run;
drop table params;
alter table keyed_params rename to params;
create index params_of_run on params (run);

create table keyed_results (
    key      integer primary key,            -- name << 32 | run
    position integer not null,               -- of the stage
    points   integer not null,
    last     real,                           -- null is NaN
    min      real,
    max      real,
    name     integer generated always as (key >> 32) virtual,
    run      integer generated always as (key & 0xffffffff) virtual references runs (key) on delete cascade
) strict;
insert into keyed_results (key, position, points, last, min, max)
select name << 32 | run, position, points, last, min, max from results order by name, run;
drop table results;
alter table keyed_results rename to results;
create index results_of_run on results (run);

create view v_params as
select r.id as run, r.recipe, n.name as path, p.value, p.type, p.origin
from params p join names n on n.key = p.name join runs r on r.key = p.run;
