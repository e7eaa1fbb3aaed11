-- What filters and orders ask of all stages, without reading their options.
--
-- A row of `stages` has the options, the inputs and the components of the digest, a kB and more. `reused > 0`, `kind ~ x` and
-- `stage.NAME.seconds > 5` look at every run's stages: with the few columns that they need in an index a filter of 100,000 runs
-- of five stages takes a third to a seventh of the time. An index is 30 bytes a stage.

create index stages_in_brief on stages (run, state, kind);
create index attempts_in_time on attempts (stage, started, finished, paused);
