-- Jobs of a cluster that do the work of attempts.
--
-- Why these shapes:
-- * A job outlives the process that submitted it: another one finds it by the digest of the stage, and says so in
--   `taken_by`. It is written down before it is submitted, with the name by which Slurm knows it, so that a crash between
--   the two loses nothing; `job` is null until then.
-- * Of an element the present state is one row, which is written again and again. How far what it says has been taken
--   over is there too: `imported` is the number of a record, written after what the record said.
-- * Each time that an element is started is a row of `job_lives`, with where it was and how it ended.
-- * `attempts.waiting` is why nothing of an attempt runs yet; `leases.scheduler` that the runner has left it to Slurm.

create table jobs (
    key       integer primary key,
    attempt   integer not null references attempts (key) on delete cascade,
    taken_by  integer references attempts (key) on delete set null,
    digest    text    not null,
    name      text    not null unique,
    cluster   text    not null,
    job       integer,
    elements  integer not null,
    submitted integer not null,
    over      integer                        -- when nothing of it was left to do
) strict;
create index jobs_of_attempt on jobs (attempt);
create index jobs_taken on jobs (taken_by) where taken_by is not null;
create index jobs_open on jobs (digest) where over is null;

create table job_elements (
    job      integer not null references jobs (key) on delete cascade,
    element  integer not null,
    state    text    not null check (state in ('queued', 'running', 'over')),
    why      text,                           -- it waits
    imported integer not null,
    primary key (job, element)
) strict, without rowid;

create table job_lives (
    job      integer not null references jobs (key) on delete cascade,
    element  integer not null,
    life     integer not null,
    node     text    not null,
    started  integer not null,
    finished integer,
    reason   text,
    primary key (job, element, life)
) strict, without rowid;

alter table attempts add column waiting text;
alter table leases add column scheduler integer not null default 0;

create view v_jobs as
select r.id as run,
       s.name as stage,
       a.key as attempt,
       j.job,
       j.cluster,
       j.name,
       j.elements,
       (select count(*) from job_elements e where e.job = j.key and e.state = 'queued') as queued,
       (select count(*) from job_elements e where e.job = j.key and e.state = 'running') as running,
       (select count(*) from job_lives l where l.job = j.key) as lives,
       j.taken_by is not null as taken_over,
       strftime('%Y-%m-%dT%H:%M:%fZ', j.submitted / 1000.0, 'unixepoch') as submitted,
       strftime('%Y-%m-%dT%H:%M:%fZ', j.over / 1000.0, 'unixepoch') as over
from jobs j
join attempts a on a.key = coalesce(j.taken_by, j.attempt)
join stages s on s.key = a.stage
join runs r on r.key = s.run;

-- Every time that an element of a job was started: where, and how it ended.
create view v_job_lives as
select r.id as run,
       s.name as stage,
       j.job,
       case when j.elements > 0 then l.element end as element,
       l.life,
       l.node,
       strftime('%Y-%m-%dT%H:%M:%fZ', l.started / 1000.0, 'unixepoch') as started,
       strftime('%Y-%m-%dT%H:%M:%fZ', l.finished / 1000.0, 'unixepoch') as finished,
       l.reason
from job_lives l
join jobs j on j.key = l.job
join attempts a on a.key = coalesce(j.taken_by, j.attempt)
join stages s on s.key = a.stage
join runs r on r.key = s.run;
