-- +goose Up
CREATE TABLE vms (
	id          TEXT PRIMARY KEY,
	name        TEXT NOT NULL UNIQUE,
	spec        TEXT NOT NULL,              -- vm.Spec as JSON
	state       TEXT NOT NULL,
	creating    INTEGER NOT NULL DEFAULT 0, -- 1 until the create that made the row has ended
	reason      TEXT NOT NULL DEFAULT '',
	ip          TEXT UNIQUE,                -- NULL without a network
	mac         TEXT NOT NULL DEFAULT '',
	driver      TEXT NOT NULL DEFAULT '',
	handle      TEXT,                       -- vmm.Handle as JSON; NULL without a machine
	accelerator TEXT NOT NULL DEFAULT '',
	slow_reason TEXT NOT NULL DEFAULT '',
	notes       TEXT NOT NULL DEFAULT '{}', -- capability name -> its note
	created_at  INTEGER NOT NULL,           -- nanoseconds since the Unix epoch
	started_at  INTEGER NOT NULL DEFAULT 0  -- 0 while it does not run
) STRICT;

CREATE TABLE meta (
	key   TEXT PRIMARY KEY,
	value TEXT NOT NULL
) STRICT;

-- +goose Down
DROP TABLE vms;
DROP TABLE meta;
