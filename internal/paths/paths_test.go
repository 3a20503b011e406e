package paths

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/vm"
)

// TestPageListsEveryName holds docs/state.md and this package equal.
func TestPageListsEveryName(t *testing.T) {
	page, err := os.ReadFile("../../docs/state.md")
	if err != nil {
		t.Fatal(err)
	}
	names := []string{OverlayDisk, WorkDisk, VMInitramfs, Suspended, SuspendedNew, SuspendedDisk, Forked, Snapshots, RevertNew, SSHHostKey, SSHHostKeyPub, Bridge, TAPPrefix, PoolPrefix}
	p := reflect.ValueOf(Under("/root"))
	for i := range p.NumMethod() {
		if path, ok := p.Method(i).Interface().(func() string); ok {
			names = append(names, filepath.Base(path()))
		}
	}
	if len(names) < 15 {
		t.Fatalf("found only %q", names)
	}
	for _, name := range names {
		if !strings.Contains(string(page), "`"+name) && !strings.Contains(string(page), "/"+name) {
			t.Errorf("docs/state.md does not speak of %s", name)
		}
	}
}

func TestFromEnvironment(t *testing.T) {
	for _, v := range []string{"XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"} {
		t.Setenv(v, "/x/"+v)
	}
	t.Setenv("XDG_RUNTIME_DIR", "/run/me")
	want := Paths{
		Config: "/x/XDG_CONFIG_HOME/banger", State: "/x/XDG_STATE_HOME/banger", Cache: "/x/XDG_CACHE_HOME/banger",
		Runtime: "/run/me/banger",
	}
	if got := FromEnvironment(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	t.Setenv("XDG_RUNTIME_DIR", "")
	if got := FromEnvironment().Runtime; got != "/x/XDG_STATE_HOME/banger/run" {
		t.Errorf("without a runtime directory: %s", got)
	}
}

func TestMakeIsPrivate(t *testing.T) {
	p := Under(filepath.Join(t.TempDir(), "home"))
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{p.Config, p.State, p.Cache, p.Runtime, p.VMs(), p.SSH()} {
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, info, err)
		}
	}
}

func TestLimits(t *testing.T) {
	if name := TAP(vm.ID("0123abcd")); len(name) > 15 {
		t.Errorf("%s is longer than a device's name may be", name)
	}
	if err := CheckSocket("/" + strings.Repeat("x", MaxSocketPath-1)); err != nil {
		t.Errorf("a path of %d bytes: %v", MaxSocketPath, err)
	}
	if err := CheckSocket("/" + strings.Repeat("x", MaxSocketPath)); fault.KindOf(err) != fault.Precondition {
		t.Errorf("a path of %d bytes: %v", MaxSocketPath+1, err)
	}
}
