package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"banger/internal/fault"
	"banger/internal/vm"
)

// Allocator picks an address that is not in taken.
type Allocator func(taken map[netip.Addr]bool) (netip.Addr, error)

const columns = `id, name, spec, state, creating, reason, ip, mac, driver, handle, accelerator, slow_reason, notes, created_at, started_at`

// Insert writes the row of a new VM with an address that no other row has, and returns it with that
// address. A nil allocate gives none. A taken name or ID is a Conflict fault, also when two inserts of it meet.
func (s *Store) Insert(ctx context.Context, v vm.VM, allocate Allocator, events ...Event) (vm.VM, error) {
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		taken, err := takenAddresses(ctx, tx, v)
		if err != nil {
			return err
		}
		if allocate != nil {
			if v.IP, err = allocate(taken); err != nil {
				return err
			}
		}
		args, err := rowOf(v)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO vms (`+columns+`) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)`, args...)
		if err != nil {
			return err
		}
		return insertEvents(ctx, tx, events)
	})
	if err != nil {
		return vm.VM{}, s.explain(err, "record VM %s", v.Spec.Name)
	}
	return v, nil
}

// takenAddresses reads which addresses are in use, and refuses a name or ID that is. The caller
// holds the write lock, so what it reads stays true until the commit.
func takenAddresses(ctx context.Context, tx *sql.Tx, v vm.VM) (map[netip.Addr]bool, error) {
	rows, err := tx.QueryContext(ctx, `SELECT id, name, ip FROM vms`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	taken := map[netip.Addr]bool{}
	for rows.Next() {
		var id, name string
		var ip sql.NullString
		if err := rows.Scan(&id, &name, &ip); err != nil {
			return nil, err
		}
		if name == v.Spec.Name || id == string(v.ID) {
			return nil, fault.New(fault.Conflict, "a VM named %s exists", name).WithHint("choose another name, or delete it: banger vm delete %s", name)
		}
		if addr, err := netip.ParseAddr(ip.String); ip.Valid && err == nil {
			taken[addr] = true
		}
	}
	return taken, rows.Err()
}

// Save writes all of a VM's row but its name, id, address and creation, with events of the same
// moment. A VM without a row is a NotFound fault.
func (s *Store) Save(ctx context.Context, v vm.VM, events ...Event) error {
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		args, err := rowOf(v)
		if err != nil {
			return err
		}
		// spec, state, creating, reason; mac, driver, handle, accelerator, slow_reason, notes; started_at; id
		args = append(append(append(args[2:6:6], args[7:13]...), args[14]), string(v.ID))
		res, err := tx.ExecContext(ctx, `UPDATE vms SET spec=?, state=?, creating=?, reason=?, mac=?, driver=?, handle=?,
			accelerator=?, slow_reason=?, notes=?, started_at=? WHERE id=?`, args...)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n == 0 {
			return errors.Join(err, notFound(v.Spec.Name))
		}
		return insertEvents(ctx, tx, events)
	})
	if err != nil {
		return s.explain(err, "write the row of VM %s", v.Spec.Name)
	}
	return nil
}

// Delete removes a VM's row; it succeeds when there is none. The VM's events stay.
func (s *Store) Delete(ctx context.Context, id vm.ID, events ...Event) error {
	err := s.inTx(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `DELETE FROM vms WHERE id=?`, string(id)); err != nil {
			return err
		}
		return insertEvents(ctx, tx, events)
	})
	if err != nil {
		return s.explain(err, "remove the row of VM %s", id)
	}
	return nil
}

// Get returns the VM of that name or ID, or a NotFound fault.
func (s *Store) Get(ctx context.Context, ref string) (vm.VM, error) {
	row := s.read.QueryRowContext(ctx, `SELECT `+columns+` FROM vms WHERE name=? OR id=? ORDER BY name=? DESC LIMIT 1`, ref, ref, ref)
	v, err := scan(row.Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return vm.VM{}, notFound(ref)
	}
	if err != nil {
		return vm.VM{}, s.explain(err, "read VM %s", ref)
	}
	return v, nil
}

// List returns all VMs by name.
func (s *Store) List(ctx context.Context) ([]vm.VM, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT `+columns+` FROM vms ORDER BY name`)
	if err != nil {
		return nil, s.explain(err, "list VMs")
	}
	defer rows.Close()
	var all []vm.VM
	for rows.Next() {
		v, err := scan(rows.Scan)
		if err != nil {
			return nil, s.explain(err, "list VMs")
		}
		all = append(all, v)
	}
	if err := rows.Err(); err != nil {
		return nil, s.explain(err, "list VMs")
	}
	return all, nil
}

func notFound(ref string) error {
	return fault.New(fault.NotFound, "no VM named %s", ref).WithHint("see what there is: banger vm list")
}

// rowOf returns the values of columns, in their order.
func rowOf(v vm.VM) ([]any, error) {
	spec, err := json.Marshal(v.Spec)
	if err != nil {
		return nil, err
	}
	if v.Notes == nil {
		v.Notes = map[string]json.RawMessage{}
	}
	notes, err := json.Marshal(v.Notes)
	if err != nil {
		return nil, err
	}
	ip := sql.NullString{String: v.IP.String(), Valid: v.IP.IsValid()}
	handle := sql.NullString{String: string(v.Handle), Valid: len(v.Handle) > 0}
	return []any{
		string(v.ID), v.Spec.Name, string(spec), string(v.State), v.Creating, v.Reason, ip, v.MAC, v.Driver, handle,
		v.Accelerator, v.SlowReason, string(notes), nanos(v.CreatedAt), nanos(v.StartedAt),
	}, nil
}

func scan(into func(...any) error) (vm.VM, error) {
	var v vm.VM
	var id, name, spec, state, notes string
	var ip, handle sql.NullString
	var created, started int64
	err := into(&id, &name, &spec, &state, &v.Creating, &v.Reason, &ip, &v.MAC, &v.Driver, &handle,
		&v.Accelerator, &v.SlowReason, &notes, &created, &started)
	if err != nil {
		return vm.VM{}, err
	}
	if err := errors.Join(json.Unmarshal([]byte(spec), &v.Spec), json.Unmarshal([]byte(notes), &v.Notes)); err != nil {
		return vm.VM{}, fmt.Errorf("row of VM %s: %w", name, err)
	}
	v.ID, v.State, v.CreatedAt, v.StartedAt = vm.ID(id), vm.State(state), moment(created), moment(started)
	if ip.Valid {
		if v.IP, err = netip.ParseAddr(ip.String); err != nil {
			return vm.VM{}, fmt.Errorf("row of VM %s: %w", name, err)
		}
	}
	if handle.Valid {
		v.Handle = json.RawMessage(handle.String)
	}
	return v, nil
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func moment(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// inTx runs f in a transaction that holds the write lock from its beginning.
func (s *Store) inTx(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		_ = tx.Rollback() // its failure adds nothing: the connection is thrown away then
		return err
	}
	return tx.Commit()
}
