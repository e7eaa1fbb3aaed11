-- Which runs came from another store.
--
-- What is continued without being named is a run of this store's own: an imported one, that somebody else left unfinished,
-- would run a recipe which nobody here has asked for.

create table imported (
    run integer primary key references runs (key) on delete cascade
) strict;
