package store

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"time"

	"banger/internal/vm"
)

// Bounds of the history. Both may be passed by pruneEvery events before they are enforced.
const (
	EventsPerVM = 500
	EventsTotal = 20000
	pruneEvery  = 50
)

// Event is one line of a VM's history.
type Event struct {
	ID        int64
	VM        vm.ID
	Name      string // of the VM, so that the history of a deleted one can be told
	At        time.Time
	Operation string // create, start, stop, restart, delete, reconcile or exit
	Stage     string
	Message   string // empty for a stage that went well
	Duration  time.Duration
}

// AddEvents writes events that go with no change of a row.
func (s *Store) AddEvents(ctx context.Context, events ...Event) error {
	err := s.inTx(ctx, func(tx *sql.Tx) error { return insertEvents(ctx, tx, events) })
	if err != nil {
		return s.explain(err, "write events")
	}
	return nil
}

// Events returns the newest events of a VM, at most limit, oldest first.
func (s *Store) Events(ctx context.Context, id vm.ID, limit int) ([]Event, error) {
	return s.events(ctx, "vm", string(id), limit)
}

// EventsNamed is Events for all VMs that ever had a name.
func (s *Store) EventsNamed(ctx context.Context, name string, limit int) ([]Event, error) {
	return s.events(ctx, "name", name, limit)
}

func (s *Store) events(ctx context.Context, column, value string, limit int) ([]Event, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT id, vm, name, at, operation, stage, message, duration
		FROM events WHERE `+column+`=? ORDER BY id DESC LIMIT ?`, value, limit)
	if err != nil {
		return nil, s.explain(err, "read events")
	}
	defer rows.Close()
	var all []Event
	for rows.Next() {
		var e Event
		var at, duration int64
		if err := rows.Scan(&e.ID, &e.VM, &e.Name, &at, &e.Operation, &e.Stage, &e.Message, &duration); err != nil {
			return nil, s.explain(err, "read events")
		}
		e.At, e.Duration = moment(at), time.Duration(duration)
		all = append(all, e)
	}
	slices.Reverse(all)
	if err := rows.Err(); err != nil {
		return nil, s.explain(err, "read events")
	}
	return all, nil
}

func insertEvents(ctx context.Context, tx *sql.Tx, events []Event) error {
	for _, e := range events {
		res, err := tx.ExecContext(ctx, `INSERT INTO events (vm, name, at, operation, stage, message, duration) VALUES (?,?,?,?,?,?,?)`,
			string(e.VM), e.Name, nanos(e.At), e.Operation, e.Stage, e.Message, int64(e.Duration))
		if err != nil {
			return err
		}
		id, err := res.LastInsertId()
		if err != nil {
			return err
		}
		if id%pruneEvery == 0 {
			if err := prune(ctx, tx, e.VM, id); err != nil {
				return err
			}
		}
	}
	return nil
}

// prune enforces the bounds, of the one VM alone: looking at all of them would slow every write.
func prune(ctx context.Context, tx *sql.Tx, id vm.ID, newest int64) error {
	_, err := tx.ExecContext(ctx, `DELETE FROM events WHERE id <= ?`, newest-EventsTotal)
	_, err2 := tx.ExecContext(ctx, `DELETE FROM events WHERE vm=?1 AND id <= (
		SELECT id FROM events WHERE vm=?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)`, string(id), EventsPerVM)
	return errors.Join(err, err2)
}

// Meta returns the value of a key, or "" when there is none.
func (s *Store) Meta(ctx context.Context, key string) (string, error) {
	var value string
	err := s.read.QueryRowContext(ctx, `SELECT value FROM meta WHERE key=?`, key).Scan(&value)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", s.explain(err, "read %s", key)
	}
	return value, nil
}

// SetMeta sets the value of a key.
func (s *Store) SetMeta(ctx context.Context, key, value string) error {
	_, err := s.write.ExecContext(ctx, `INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value=excluded.value`, key, value)
	if err != nil {
		return s.explain(err, "write %s", key)
	}
	return nil
}
