package vmmtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/hosttest/need"
	"banger/internal/vmm"
)

// soon bounds what a paused guest is given to show that it does not answer.
const soon = 300 * time.Millisecond

func (f *fixture) pause(r vmm.Running) {
	f.t.Helper()
	for range 2 {
		if err := r.(vmm.Pauser).Pause(f.ctx()); err != nil {
			f.t.Fatalf("pause: %v", err)
		}
	}
}

func (f *fixture) resume(r vmm.Running) {
	f.t.Helper()
	for range 2 {
		if err := r.(vmm.Pauser).Resume(f.ctx()); err != nil {
			f.t.Fatalf("resume: %v", err)
		}
	}
}

// save pauses and saves a machine into a new directory, or the one given.
func (f *fixture) save(r vmm.Running, dir string) string {
	f.t.Helper()
	if dir == "" {
		dir = f.t.TempDir()
	}
	f.pause(r)
	begin := time.Now()
	if err := r.(vmm.Saver).Save(f.ctx(), dir); err != nil {
		f.t.Fatalf("save: %v", err)
	}
	f.t.Logf("saved in %s", time.Since(begin).Round(time.Millisecond))
	return dir
}

// restore starts m from what was saved; it is stopped at the end of the test.
func (f *fixture) restore(m vmm.Machine, dir string) vmm.Running {
	f.t.Helper()
	begin := time.Now()
	r, err := f.New(f.t).(vmm.Restorer).Restore(f.ctx(), m, dir)
	if err != nil {
		f.t.Fatalf("restore: %v", err)
	}
	loaded := time.Since(begin)
	f.stopAtEnd(r)
	f.ping(r)
	f.t.Logf("restored in %s, the agent answered after %s", loaded.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	return r
}

func (f *fixture) stop(r vmm.Running) {
	f.t.Helper()
	if err := r.Stop(f.ctx()); err != nil {
		f.t.Fatalf("stop: %v", err)
	}
}

// count has the guest count, and compares.
func (f *fixture) count(r vmm.Running, want string) {
	f.t.Helper()
	if out, code := f.exec(r, "count"); strings.TrimSpace(out) != want || code != 0 {
		f.t.Errorf("count: %q, %d, want %s", out, code, want)
	}
}

// chatter starts a program that talks; the function returned tells whether its stream has ended.
func (f *fixture) chatter(r vmm.Running) (ended func() bool) {
	f.t.Helper()
	c := guest.NewClient(r.DialGuest)
	f.t.Cleanup(c.Close)
	stream, err := c.Exec(f.ctx())
	if err == nil {
		err = stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: []string{"chatter"}}}})
	}
	for err == nil {
		var answer *agentv1.ExecResponse
		if answer, err = stream.Receive(); len(answer.GetStdout()) > 0 {
			break
		}
	}
	if err != nil {
		f.t.Fatalf("chatter: %v", err)
	}
	over := make(chan struct{})
	go func() {
		defer close(over)
		for err == nil {
			_, err = stream.Receive()
		}
		_ = stream.CloseResponse() // it has failed already
	}()
	return func() bool {
		select {
		case <-over:
			return true
		case <-time.After(ends):
			return false
		}
	}
}

// another is a machine like f's in a directory of its own.
func (f *fixture) another() *fixture {
	f.t.Helper()
	g := newFixture(f.t, f.Target)
	g.m.Name, g.m.ID = "other", "1a2b3c4d"
	return g
}

// nobodyAnswers: a paused guest does not.
func (f *fixture) nobodyAnswers(r vmm.Running) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx(), soon)
	defer cancel()
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	if _, err := c.Ping(ctx, &agentv1.PingRequest{}); err == nil {
		f.t.Error("a paused guest answers")
	}
}

// testSaved is a machine that is saved with its memory, twice over.
func testSaved(t *testing.T, target Target) {
	f := newFixture(t, target)
	r := f.start()
	boot := f.ping(r)
	f.count(r, "1")
	if err := r.(vmm.Saver).Save(f.ctx(), t.TempDir()); fault.KindOf(err) != fault.Conflict {
		t.Errorf("saving a machine that runs: %v", err)
	}
	f.pause(r)
	f.nobodyAnswers(r)
	r = f.checkAdoptPaused(r)
	f.resume(r)
	f.count(r, "2")

	dir := f.save(r, "")
	if err := r.(vmm.Saver).Save(f.ctx(), t.TempDir()); fault.KindOf(err) != fault.Conflict {
		t.Errorf("saving twice: %v", err)
	}
	f.resume(r)
	f.count(r, "3")
	over := f.chatter(r)
	dir = f.save(r, dir)
	f.stop(r)
	f.waitExit(r, ends, vmm.ExitStopped)
	if !over() {
		t.Error("a stream outlives its machine")
	}
	f.nothingLeft()

	if err := f.d.(vmm.Restorer).CheckSaved(f.ctx(), f.m, dir); err != nil {
		t.Errorf("what was saved: %v", err)
	}
	r = f.restore(f.m, dir)
	f.checkExec(r) // whose output holds nothing of the chatter
	f.count(r, "4")
	r = f.checkAdopt(r, r.Handle(), boot)

	dir = f.save(r, "")
	f.stop(r)
	r = f.restore(f.m, dir)
	f.count(r, "5")
	f.shutdown(r, agentv1.ShutdownRequest_MODE_POWEROFF)
	f.waitExit(r, ends, vmm.ExitPowerOff)
	f.nothingLeft()
}

// checkAdoptPaused: a paused machine stays so when the daemon changes.
func (f *fixture) checkAdoptPaused(r vmm.Running) vmm.Running {
	f.t.Helper()
	// The daemon knows what the VM shall be, which may be changed while it runs.
	f.m.CPUs++
	defer func() { f.m.CPUs-- }()
	h := r.Handle()
	if err := r.Close(); err != nil {
		f.t.Fatalf("close: %v", err)
	}
	r = f.adopt(h)
	f.nobodyAnswers(r)
	return r
}

// testSavedMapped: many machines share the memory of one that was saved, and change nothing of it.
func testSavedMapped(t *testing.T, target Target) {
	f := newFixture(t, target)
	dir := t.TempDir()
	f.m.MemoryFile = filepath.Join(dir, vmm.SavedMemory)
	r := f.start()
	f.count(r, "1")
	f.save(r, dir)
	f.resume(r)
	if err := f.d.(vmm.Restorer).CheckSaved(f.ctx(), f.m, dir); fault.KindOf(err) != fault.Precondition {
		t.Errorf("what was saved of a machine that goes on: %v", err)
	}
	f.count(r, "2")
	f.save(r, dir)
	f.stop(r)
	f.nothingLeft()
	before, memory := readAll(t, filepath.Join(dir, vmm.SavedState)), readAll(t, f.m.MemoryFile)

	f.m.MemoryFile = ""
	g := f.another()
	one, two := f.restore(f.m, dir), f.restore(g.m, dir)
	f.count(one, "3")
	g.count(two, "3")
	g.count(two, "4")
	own := g.save(two, "")
	g.stop(two)
	f.stop(one)
	if err := f.d.(vmm.Restorer).CheckSaved(f.ctx(), f.m, dir); err != nil {
		t.Errorf("after two machines: %v", err)
	}
	if !bytes.Equal(before, readAll(t, filepath.Join(dir, vmm.SavedState))) || !bytes.Equal(memory, readAll(t, filepath.Join(dir, vmm.SavedMemory))) {
		t.Error("what was saved has changed")
	}
	g.count(g.restore(g.m, own), "5")
}

func readAll(t testing.TB, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// testSavedUnfit: what does not fit or is damaged is said, and nothing is started.
func testSavedUnfit(t *testing.T, target Target) {
	f := newFixture(t, target)
	good := t.TempDir()
	f.m.MemoryFile = filepath.Join(good, vmm.SavedMemory)
	r := f.start()
	f.ping(r)
	f.save(r, good)
	f.stop(r)
	f.m.MemoryFile = ""
	for name, spoil := range map[string]func(m *vmm.Machine, dir string){
		"another shape":   func(m *vmm.Machine, _ string) { m.CPUs++ },
		"more memory":     func(m *vmm.Machine, _ string) { m.MemoryBytes *= 2 },
		"another disk":    func(m *vmm.Machine, _ string) { m.Disks = append(m.Disks, vmm.Disk{Role: "x", Path: "y"}) },
		"no manifest":     func(_ *vmm.Machine, dir string) { f.remove(dir, vmm.SavedManifest) },
		"no state":        func(_ *vmm.Machine, dir string) { f.remove(dir, vmm.SavedState) },
		"no memory":       func(_ *vmm.Machine, dir string) { f.remove(dir, vmm.SavedMemory) },
		"nonsense":        func(_ *vmm.Machine, dir string) { f.patch(dir, vmm.SavedManifest, 0, "x") },
		"another format":  func(_ *vmm.Machine, dir string) { f.replace(dir, `"format": 1`, `"format": 9`) },
		"another version": func(_ *vmm.Machine, dir string) { f.replace(dir, `"build": "`, `"build": "9`) },
		"another layout":  func(_ *vmm.Machine, dir string) { f.replace(dir, `"layout": "`, `"layout": "0`) },
		"a changed manifest": func(_ *vmm.Machine, dir string) {
			f.patch(dir, vmm.SavedManifest, int64(strings.Index(string(readAll(t, filepath.Join(dir, vmm.SavedManifest))), `"cpus": `)), `"cpux`)
		},
		"a changed byte":   func(_ *vmm.Machine, dir string) { f.patch(dir, vmm.SavedState, 1, "\x00") },
		"a changed memory": func(_ *vmm.Machine, dir string) { f.patch(dir, vmm.SavedMemory, 1, "\x00") },
		"a longer state":   func(_ *vmm.Machine, dir string) { f.patch(dir, vmm.SavedState, 1<<24, "\x00") },
	} {
		m, dir := f.m, f.copySaved(good)
		spoil(&m, dir)
		err := f.d.(vmm.Restorer).CheckSaved(f.ctx(), m, dir)
		if fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: check: %v", name, err)
		}
		t.Logf("%s: %v", name, err)
		r, err := f.d.(vmm.Restorer).Restore(f.ctx(), m, dir)
		if err == nil {
			f.stopAtEnd(r)
		}
		if fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: restore: %v", name, err)
		}
	}
	f.nothingLeft()
	f.stop(f.restore(f.m, f.copySaved(good)))
}

// copySaved copies a saved machine, with the times of its files.
func (f *fixture) copySaved(from string) string {
	f.t.Helper()
	to := f.t.TempDir()
	for _, name := range []string{vmm.SavedManifest, vmm.SavedState, vmm.SavedMemory} {
		info, err := os.Stat(filepath.Join(from, name))
		if err != nil {
			f.t.Fatal(err)
		}
		path := filepath.Join(to, name)
		if err := copySparse(filepath.Join(from, name), path); err != nil {
			f.t.Fatal(err)
		}
		if err := os.Chtimes(path, info.ModTime(), info.ModTime()); err != nil {
			f.t.Fatal(err)
		}
	}
	return to
}

// copySparse copies a file and leaves out what is zero.
func copySparse(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for at := int64(0); ; {
		n, err := io.ReadFull(in, buf)
		if n > 0 && !bytes.Equal(buf[:n], zero[:n]) {
			if _, err := out.WriteAt(buf[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		switch err {
		case nil:
		case io.EOF, io.ErrUnexpectedEOF:
			return out.Truncate(at)
		default:
			return err
		}
	}
}

func (f *fixture) remove(dir, name string) {
	f.t.Helper()
	if err := os.Remove(filepath.Join(dir, name)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) replace(dir, old, text string) {
	f.t.Helper()
	path := filepath.Join(dir, vmm.SavedManifest)
	was := string(readAll(f.t, path))
	if !strings.Contains(was, old) {
		f.t.Fatalf("the manifest lacks %s:\n%s", old, was)
	}
	changed := unsummed.ReplaceAllString(strings.Replace(was, old, text, 1), "")
	if err := os.WriteFile(path, []byte(changed), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// unsummed is what makes a manifest vouch for itself.
var unsummed = regexp.MustCompile(`"sum": [0-9]+,`)

// patch overwrites a byte; at negative or beyond the end it adds one.
func (f *fixture) patch(dir, name string, at int64, text string) {
	f.t.Helper()
	file, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err == nil {
		_, err = file.WriteAt([]byte(text), at)
	}
	if err == nil {
		err = file.Close()
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// testSaveFails: after a disk that is full or a caller that gives up, nothing is left and the machine goes on.
func testSaveFails(t *testing.T, target Target) {
	f := newFixture(t, target)
	r := f.start()
	f.count(r, "1")
	f.pause(r)
	full := fullDisk(t)
	err := r.(vmm.Saver).Save(f.ctx(), full)
	if fault.KindOf(err) != fault.Precondition {
		t.Errorf("a full disk: %v", err)
	}
	t.Logf("a full disk: %v (hint: %s)", err, fault.HintOf(err))
	f.nothingSaved(full)
	f.resume(r)
	f.count(r, "2")

	dir := t.TempDir()
	for _, most := range []time.Duration{0, time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond} {
		f.pause(r)
		ctx, cancel := context.WithTimeout(f.ctx(), most)
		err := r.(vmm.Saver).Save(ctx, dir)
		cancel()
		t.Logf("within %s: %v", most, err)
		if err != nil {
			if fault.KindOf(err) != fault.Timeout {
				t.Errorf("a save given up: %v", err)
			}
			f.nothingSaved(dir)
		}
		f.resume(r)
	}
	f.count(r, "3")
	f.stop(r)
	if err := r.(vmm.Pauser).Pause(f.ctx()); fault.KindOf(err) != fault.Conflict {
		t.Errorf("pausing a machine that has ended: %v", err)
	}
}

// fullDisk is a directory on a file system without room.
func fullDisk(t *testing.T) string {
	t.Helper()
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the disk does not fill")
	}
	return dir
}

func (f *fixture) nothingSaved(dir string) {
	f.t.Helper()
	for _, name := range []string{vmm.SavedManifest, vmm.SavedState} {
		if _, err := os.Stat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			f.t.Errorf("%s is left (%v)", name, err)
		}
	}
}

// halt stops a process, and waits until it stands.
func (f *fixture) halt(pid int) {
	f.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		f.t.Fatal(err)
	}
	for deadline := time.Now().Add(ends); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if stands(pid) {
			return
		}
	}
	f.t.Fatalf("process %d does not stand still", pid)
}

// stands tells whether all threads of a process are stopped.
func stands(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid)) // the pattern is good
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if _, state, _ := strings.Cut(string(text), ") "); err != nil || !strings.HasPrefix(state, "T") {
			return false
		}
	}
	return len(threads) > 0
}

// testSaveKilled: the VMM dies while it saves.
func testSaveKilled(t *testing.T, target Target) {
	f := newFixture(t, target)
	r := f.start()
	f.ping(r)
	f.pause(r)
	pid := r.Handle().PID
	f.halt(pid) // so that the save is sure to be under way
	dir := t.TempDir()
	saved := make(chan error, 1)
	go func() { saved <- r.(vmm.Saver).Save(f.ctx(), dir) }()
	select {
	case err := <-saved:
		t.Fatalf("saved by a process that stands still: %v", err)
	case <-time.After(soon):
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-saved; fault.KindOf(err) != fault.Conflict {
		t.Errorf("saved by a process that died: %v", err)
	}
	f.waitExit(r, ends, vmm.ExitKilled)
	f.nothingSaved(dir)
	f.nothingLeft()
}
