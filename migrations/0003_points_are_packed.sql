-- The points have been packed (see 0002): the table of single ones goes.

drop table points;

-- What is known of earlier runs, for filters. From here on it is kept as points and reuses are recorded.
insert or ignore into names (name)
select e.name from series e
union
select s.name || '/' || e.name
from v_stage_attempts v join series e on e.attempt = v.attempt join stages s on s.key = v.stage;

insert or replace into results (name, run, position, points, last, min, max)
select n.key, v.run, s.position, e.points, e.last, e.min, e.max
from v_stage_attempts v
join stages s on s.key = v.stage
join series e on e.attempt = v.attempt
join names n on n.name in (e.name, s.name || '/' || e.name)
order by v.run, s.position, v.attempt;
