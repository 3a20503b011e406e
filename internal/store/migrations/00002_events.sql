-- +goose Up
-- The history outlives its VM, so that a create that was taken back can still be explained.
CREATE TABLE events (
	id        INTEGER PRIMARY KEY AUTOINCREMENT,
	vm        TEXT NOT NULL,
	name      TEXT NOT NULL,
	at        INTEGER NOT NULL, -- nanoseconds since the Unix epoch
	operation TEXT NOT NULL,
	stage     TEXT NOT NULL,
	message   TEXT NOT NULL,
	duration  INTEGER NOT NULL  -- nanoseconds
) STRICT;

CREATE INDEX events_by_vm ON events (vm, id);

-- +goose Down
DROP TABLE events;
