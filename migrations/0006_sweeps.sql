-- Sweeps: many runs of one recipe that differ in a few values.
--
-- Why these shapes:
-- * A point of a sweep is an ordinary run; it only says which point of which sweep it is. One that was stopped and goes on
--   has several runs: the newest speaks for it.
-- * The points are written down, not computed again: a later version may draw other ones.
-- * A rung is what a point was judged by while it was under way (successive halving). A null value is NaN.

create table sweeps (
    key         integer primary key,
    id          text    not null unique,
    recipe      text    not null,
    recipe_path text    not null,
    recipe_text text    not null,
    settings    text    not null,            -- JSON list: what `--set` changed for all points
    definition  text    not null,            -- JSON: parameters, objective, sample, asha
    selection   text    not null,            -- JSON: the stages that were chosen
    points      integer not null,            -- how many
    created     integer not null
) strict;

create table sweep_points (
    sweep    integer not null references sweeps (key) on delete cascade,
    point    integer not null,               -- 1, 2, ...
    settings text    not null,               -- JSON list: `path=value`
    primary key (sweep, point)
) strict, without rowid;

create table sweep_rungs (
    sweep integer not null references sweeps (key) on delete cascade,
    point integer not null,
    rung  integer not null,                  -- 0, 1, ...
    value real,
    primary key (sweep, point, rung)
) strict, without rowid;

alter table runs add column sweep integer references sweeps (key) on delete set null;
alter table runs add column point integer;
create index runs_of_sweep on runs (sweep, point) where sweep is not null;

drop view v_runs;

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
       (select w.id from sweeps w where w.key = r.sweep)                as sweep,
       r.point,
       d.environment,
       d.resolved
from runs r join documents d on d.run = r.key;

create view v_sweeps as
select w.id,
       w.recipe,
       strftime('%Y-%m-%dT%H:%M:%fZ', w.created / 1000.0, 'unixepoch') as started,
       w.points,
       (select count(distinct r.point) from runs r where r.sweep = w.key and r.state = 'succeeded') as succeeded,
       w.definition ->> '$.objective.metric' as objective,
       w.definition ->> '$.objective.goal'   as goal,
       w.recipe_path,
       w.settings,
       w.definition
from sweeps w;

-- One row per point, with the run that speaks for it.
create view v_points as
select w.id as sweep,
       p.point,
       p.settings,
       r.id as run,
       r.state,
       (select count(*) from sweep_rungs g where g.sweep = p.sweep and g.point = p.point) as rungs
from sweep_points p
join sweeps w on w.key = p.sweep
left join runs r on r.key = (select max(x.key) from runs x where x.sweep = p.sweep and x.point = p.point);
