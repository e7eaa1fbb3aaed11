-- Lists and curves whose cost does not grow with the history.
--
-- Why these shapes:
-- * With a result's last value or a parameter's value in an index, a sorted list begins at the first value and ends with its
--   page, and a filter that few runs pass reads only these. Of a run with 6 results and 21 parameters the indexes take about
--   0.5 kB. The least and greatest values have none: recording would take longer for lists that few ask for.
-- * `runs_of_recipe` has a recipe's runs in the order of their keys; `runs_by_recipe` has them by time.
-- * `stages_by_name` tells whether, and where, a recipe's history can have a stage of some name.
-- * A span sums up 64 neighbouring blocks of a series, so that a curve of a thousand million points reads some thousand rows.
--   It stands for exactly those of the blocks that begin between its first and its last step. Blocks without a span are read
--   themselves. Whoever removes a block or puts one between others therefore removes the span around it: triggers do so.

create index results_by_last on results (name, last);
create index params_by_value on params (name, value);
create index runs_of_recipe on runs (recipe);
create index stages_by_name on stages (name, run);

create table spans (
    series     integer not null references series (key) on delete cascade,
    first_step integer not null,
    last_step  integer not null,
    points     integer not null,             -- these as in `blocks`
    numbers    integer not null,
    sum        real,
    min        real,
    max        real,
    first_at   integer not null,
    last_at    integer not null,
    primary key (series, first_step)
) strict, without rowid;

insert into spans (series, first_step, last_step, points, numbers, sum, min, max, first_at, last_at)
select series, min(first_step), max(last_step), sum(points), sum(numbers), case when count(sum) = count(*) then sum(sum) end,
       min(min), max(max), min(first_at), max(last_at)
from (
    -- The last block may still grow.
    select *, (row_number() over (partition by series order by first_step) - 1) / 64 as part
    from blocks b where first_step < (select max(first_step) from blocks m where m.series = b.series))
group by series, part having count(*) = 64;

create trigger blocks_leave_spans after delete on blocks begin
    delete from spans
    where series = old.series and last_step >= old.first_step
      and first_step = (select max(first_step) from spans where series = old.series and first_step <= old.first_step);
end;
create trigger blocks_divide_spans after insert on blocks begin
    delete from spans
    where series = new.series and last_step >= new.first_step
      and first_step = (select max(first_step) from spans where series = new.series and first_step <= new.first_step);
end;
