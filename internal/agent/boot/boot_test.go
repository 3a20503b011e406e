package boot

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
)

func TestPlanDisks(t *testing.T) {
	disk := func(r agentv1.Disk_Role, ro bool) *agentv1.Disk { return &agentv1.Disk{Role: r, ReadOnly: ro} }
	root, overlay := disk(agentv1.Disk_ROLE_ROOT, true), disk(agentv1.Disk_ROLE_OVERLAY, false)
	for _, c := range []struct {
		name  string
		disks []*agentv1.Disk
		want  diskPlan
		fails string
	}{
		{
			"all",
			[]*agentv1.Disk{root, overlay, disk(agentv1.Disk_ROLE_WORK, false), disk(agentv1.Disk_ROLE_MODULES, true)},
			diskPlan{"/dev/vda", "/dev/vdb", "/dev/vdc", "/dev/vdd", true},
			"",
		},
		{
			"data disk between",
			[]*agentv1.Disk{root, disk(agentv1.Disk_ROLE_UNSPECIFIED, false), overlay},
			diskPlan{root: "/dev/vda", overlay: "/dev/vdc", rootReadOnly: true},
			"",
		},
		{"plain root", []*agentv1.Disk{disk(agentv1.Disk_ROLE_ROOT, false)}, diskPlan{root: "/dev/vda"}, ""},
		{"no root", []*agentv1.Disk{overlay}, diskPlan{}, "no root disk"},
		{"nowhere to write", []*agentv1.Disk{root}, diskPlan{}, "no overlay disk"},
		{"two roots", []*agentv1.Disk{root, root}, diskPlan{}, "two disks"},
		{"too many", make([]*agentv1.Disk, 27), diskPlan{}, "more than 26"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := planDisks(c.disks)
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Fatalf("got %v, want an error about %q", err, c.fails)
				}
				return
			}
			if err != nil || got != c.want {
				t.Errorf("got %+v, %v; want %+v", got, err, c.want)
			}
		})
	}
}

func TestPlainName(t *testing.T) {
	seen := map[string]string{}
	for _, dir := range []string{"/var/lib/docker", "/var/lib%2Fdocker", "/var%2Flib/docker", "/var/lib/containerd/"} {
		name := plainName(dir)
		if strings.Contains(name, "/") {
			t.Errorf("%s becomes %s", dir, name)
		}
		if other, ok := seen[name]; ok {
			t.Errorf("%s and %s share %s", dir, other, name)
		}
		seen[name] = dir
	}
}

func TestInitArgument(t *testing.T) {
	for line, want := range map[string]string{
		"quiet panic=-1\n":              "",
		"init=/bin/a init=/bin/b quiet": "/bin/b",
		"quiet -- init=/bin/sh":         "",
		"rdinit=/x":                     "",
	} {
		if got := initArgument(line); got != want {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}

func TestFindInit(t *testing.T) {
	root := t.TempDir()
	if got := findInit(root, ""); got != "" {
		t.Errorf("an empty image has the init %q", got)
	}
	for name, mode := range map[string]os.FileMode{"usr/lib/systemd/systemd": 0o755, "sbin/init": 0o644, "bin/mine": 0o755} {
		if err := identity.File(root, name, "x", mode); err != nil {
			t.Fatal(err)
		}
	}
	if got := findInit(root, ""); got != "/usr/lib/systemd/systemd" {
		t.Errorf("got %q: what cannot be executed is no init", got)
	}
	if got := findInit(root, "/bin/mine"); got != "/bin/mine" {
		t.Errorf("got %q, not the one asked for", got)
	}
}

// TestIdleBusyBox: the init of Alpine's container images has nothing to start; of an installed Alpine it has.
func TestIdleBusyBox(t *testing.T) {
	root := t.TempDir()
	table := "# /etc/inittab\n::sysinit:/sbin/openrc sysinit\n::wait:/sbin/openrc default\n"
	if err := errors.Join(
		identity.File(root, "bin/busybox", "x", 0o755), identity.Link(root, "sbin/init", "../bin/busybox"),
		identity.File(root, "etc/inittab", table, 0o644),
	); err != nil {
		t.Fatal(err)
	}
	if got := findInit(root, ""); got != "" {
		t.Errorf("got %q, which has nothing to start", got)
	}
	if err := identity.File(root, "sbin/openrc", "x", 0o755); err != nil {
		t.Fatal(err)
	}
	if got := findInit(root, ""); got != "/sbin/init" {
		t.Errorf("got %q with OpenRC installed", got)
	}
	if err := errors.Join(os.Remove(filepath.Join(root, "etc/inittab")), os.Remove(filepath.Join(root, "sbin/openrc"))); err != nil {
		t.Fatal(err)
	}
	if got := findInit(root, ""); got != "" {
		t.Errorf("got %q without any table", got)
	}
}

func TestReadConfig(t *testing.T) {
	name := filepath.Join(t.TempDir(), "config.json")
	for text, fails := range map[string]string{
		`{"hostname":"web","channelPort":"p","aFieldOfTheFuture":1}`: "",
		`{"hostname":"web"}`: "no port",
		`{`:                  "read the guest config",
		``:                   "read the guest config",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := readConfig(name)
		switch {
		case fails == "" && (err != nil || cfg.GetHostname() != "web"):
			t.Errorf("%q: got %v, %v", text, cfg, err)
		case fails != "" && (err == nil || !strings.Contains(err.Error(), fails)):
			t.Errorf("%q: got %v, want an error about %q", text, err, fails)
		}
	}
}
