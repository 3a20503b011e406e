package store

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/vm"
)

func openTemp(t testing.TB) (*Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "b%20?#.db") // what a URI would take apart
	return reopen(t, path), path
}

func reopen(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// next hands out 10.0.0.1, 10.0.0.2, ... skipping what is taken.
func next(taken map[netip.Addr]bool) (netip.Addr, error) {
	a := netip.MustParseAddr("10.0.0.1")
	for taken[a] {
		a = a.Next()
	}
	return a, nil
}

func sample(name string) vm.VM {
	return vm.VM{
		ID: vm.NewID(), State: vm.Starting, Creating: true, MAC: "02:00:00:00:00:01", CreatedAt: time.Unix(1700000000, 5).UTC(),
		Spec: vm.Spec{Name: name, CPUs: 2, MemoryBytes: 1 << 30, NAT: true, Units: vm.UnitsFast, AuthorizedKeys: []string{"a b"}},
	}
}

func TestRowSurvivesUnchanged(t *testing.T) {
	s, path := openTemp(t)
	v, err := s.Insert(t.Context(), sample("web"), next)
	if err != nil {
		t.Fatal(err)
	}
	v.State, v.Creating, v.Reason, v.Driver = vm.Running, false, "none", "fake"
	v.Handle, v.Accelerator, v.SlowReason = json.RawMessage(`{"pid":7}`), "fake", "slow"
	v.Notes = map[string]json.RawMessage{"network": json.RawMessage(`{"tap":"x"}`)}
	v.StartedAt = time.Unix(1700000100, 0).UTC()
	if err := s.Save(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = reopen(t, path)
	for _, ref := range []string{"web", string(v.ID)} {
		got, err := s.Get(t.Context(), ref)
		if err != nil || !reflect.DeepEqual(got, v) {
			t.Fatalf("Get(%s) = %+v, %v; want %+v", ref, got, err, v)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v; want 0600", info.Mode(), err)
	}
}

func TestConflictsAndMissingRows(t *testing.T) {
	s, _ := openTemp(t)
	ctx := t.Context()
	v, err := s.Insert(ctx, sample("web"), next)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Insert(ctx, sample("web"), next); fault.KindOf(err) != fault.Conflict {
		t.Fatalf("second insert of a name: %v; want a conflict", err)
	}
	if err := s.Delete(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, v.ID); err != nil {
		t.Fatalf("second delete: %v", err)
	}
	if err := s.Save(ctx, v); fault.KindOf(err) != fault.NotFound {
		t.Fatalf("save without a row: %v; want not found", err)
	}
	if _, err := s.Get(ctx, "web"); fault.KindOf(err) != fault.NotFound {
		t.Fatalf("get without a row: %v; want not found", err)
	}
}

func TestAddressIsNeverGivenTwice(t *testing.T) {
	s, path := openTemp(t)
	other := reopen(t, path) // a second set of connections, as from another process
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen, wins := map[netip.Addr]string{}, 0
	for i := range 24 {
		wg.Go(func() {
			name := fmt.Sprintf("vm-%d", i/2) // each name twice
			v, err := []*Store{s, other}[i%2].Insert(context.Background(), sample(name), next)
			if err != nil {
				if fault.KindOf(err) != fault.Conflict {
					t.Errorf("%s: %v", name, err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			wins++
			if first, ok := seen[v.IP]; ok {
				t.Errorf("%s and %s both have %s", first, name, v.IP)
			}
			seen[v.IP] = name
		})
	}
	wg.Wait()
	if wins != 12 {
		t.Errorf("%d inserts of 12 names succeeded", wins)
	}
}

func TestEventsAreBounded(t *testing.T) {
	s, _ := openTemp(t)
	var batch []Event
	for i := range EventsPerVM + 3*pruneEvery {
		batch = append(batch, Event{VM: "aaaaaaaa", Name: "web", At: time.Unix(int64(i), 0), Operation: "start", Stage: fmt.Sprint(i)})
	}
	if err := s.AddEvents(t.Context(), batch...); err != nil {
		t.Fatal(err)
	}
	all, err := s.Events(t.Context(), "aaaaaaaa", 10*EventsPerVM)
	if err != nil || len(all) > EventsPerVM+pruneEvery || len(all) < EventsPerVM {
		t.Fatalf("%d events kept, %v", len(all), err)
	}
	last, err := s.Events(t.Context(), "aaaaaaaa", 3)
	if err != nil || len(last) != 3 || last[2].Stage != fmt.Sprint(len(batch)-1) || last[0].ID >= last[2].ID {
		t.Fatalf("newest three: %+v, %v", last, err)
	}
}

func TestMeta(t *testing.T) {
	s, _ := openTemp(t)
	for _, want := range []string{"172.30.0.0/16", "172.31.0.0/16"} {
		if err := s.SetMeta(t.Context(), "subnet", want); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Meta(t.Context(), "subnet"); err != nil || got != want {
			t.Fatalf("meta = %q, %v", got, err)
		}
	}
	if got, err := s.Meta(t.Context(), "nothing"); err != nil || got != "" {
		t.Fatalf("missing key = %q, %v", got, err)
	}
}

// Every version that was ever released must open, with its rows.
func TestMigratesFromEveryVersion(t *testing.T) {
	migrations, err := fs.Sub(embedded, "migrations")
	if err != nil {
		t.Fatal(err)
	}
	files, err := fs.Glob(migrations, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for from := 1; from <= len(files); from++ {
		path := filepath.Join(t.TempDir(), "old.db")
		old, err := open(t.Context(), path, migrations, int64(from))
		if err != nil {
			t.Fatalf("version %d: %v", from, err)
		}
		_, err = old.write.Exec(`INSERT INTO vms (id, name, spec, state, created_at) VALUES ('0a0b0c0d', 'old', '{"name":"old"}', 'stopped', 1)`)
		if err != nil {
			t.Fatal(err)
		}
		_ = old.Close()
		s := reopen(t, path)
		v, err := s.Get(t.Context(), "old")
		if err != nil || v.State != vm.Stopped || v.ID != "0a0b0c0d" {
			t.Fatalf("from version %d: %+v, %v", from, v, err)
		}
		if err := s.AddEvents(t.Context(), Event{VM: v.ID, Stage: "x"}); err != nil {
			t.Fatalf("from version %d: %v", from, err)
		}
	}
}

func TestNewerVersionIsRefused(t *testing.T) {
	s, path := openTemp(t)
	if _, err := s.write.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`); err != nil {
		t.Fatal(err)
	}
	_ = s.Close()
	_, err := Open(t.Context(), path)
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "999") {
		t.Fatalf("got %v", err)
	}
}

func TestDamageIsToldWithPathAndHint(t *testing.T) {
	s, path := openTemp(t)
	for i := range 50 {
		if _, err := s.Insert(t.Context(), sample(fmt.Sprintf("vm-%d", i)), next); err != nil {
			t.Fatal(err)
		}
	}
	_ = s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	scribbled := append([]byte(nil), whole...)
	for i := 4096; i < len(scribbled); i++ {
		scribbled[i] ^= 0x5a
	}
	for name, content := range map[string][]byte{"text": []byte(strings.Repeat("no database at all ", 100)), "scribbled": scribbled, "cut": whole[:len(whole)/2]} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Open(t.Context(), path)
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), path) || fault.HintOf(err) == "" {
			t.Errorf("%s: %v (hint %q)", name, err, fault.HintOf(err))
		}
	}
}

// What was acknowledged is there after the process ended at any point: the files are copied while
// the database is open and never closed, as kill -9 leaves them.
func TestAcknowledgedRowsSurviveDeath(t *testing.T) {
	s, path := openTemp(t)
	for i := range 10 {
		if _, err := s.Insert(t.Context(), sample(fmt.Sprintf("vm-%d", i)), next); err != nil {
			t.Fatal(err)
		}
		dead := filepath.Join(t.TempDir(), "dead.db")
		for _, suffix := range []string{"", "-wal"} {
			data, err := os.ReadFile(path + suffix)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(dead+suffix, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if all, err := reopen(t, dead).List(t.Context()); err != nil || len(all) != i+1 {
			t.Fatalf("%d rows, %v; want %d", len(all), err, i+1)
		}
	}
}

func TestCancelledContextIsInterrupted(t *testing.T) {
	s, _ := openTemp(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Insert(ctx, sample("web"), next); fault.KindOf(err) != fault.Interrupted {
		t.Fatalf("got %v", err)
	}
}

func BenchmarkList200(b *testing.B) {
	s, _ := openTemp(b)
	for i := range 200 {
		if _, err := s.Insert(b.Context(), sample(fmt.Sprintf("vm-%d", i)), next); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if all, err := s.List(b.Context()); err != nil || len(all) != 200 {
			b.Fatal(len(all), err)
		}
	}
}
