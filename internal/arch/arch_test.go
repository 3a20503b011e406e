package arch

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "banger/"

// rooms lists every package of the house and the rooms it may open a door to. Test files may
// open more doors (hosttest, the fakes); what ships may not.
var rooms = map[string][]string{
	// Doorbells.
	"cmd/banger":           {"internal/cli"},
	"cmd/bangerd":          {"internal/daemon"},
	"cmd/banger-agent":     {"internal/agent"},
	"cmd/banger-bench":     {"internal/bench"},
	"cmd/banger-nethelper": {"internal/hostnet/helper"},

	// Contracts.
	"api/agent/v1":                  {},
	"api/agent/v1/agentv1connect":   {"api/agent/v1"},
	"api/banger/v1":                 {"api/agent/v1"},
	"api/banger/v1/bangerv1connect": {"api/banger/v1"},
	"images":                        {},

	// Layer 0: pure, or nearly.
	"internal/fault":    {},
	"internal/vm":       {"internal/fault"},
	"internal/undo":     {},
	"internal/progress": {},
	"internal/bundle":   {"internal/fault"},
	"internal/paths":    {"internal/bundle", "internal/fault", "internal/vm"},
	"internal/build":    {},
	"internal/doctor":   {"internal/fault"},
	"internal/channel":  {"internal/fault"},
	"internal/tomlfile": {"internal/fault"},
	"internal/fileio":   {"internal/fault"},

	// Layer 1: hands.
	"internal/system":         {"internal/bundle", "internal/fault", "internal/paths"},
	"internal/disk":           {"internal/fault", "internal/fileio", "internal/paths", "internal/system"},
	"internal/hostnet":        {"internal/fault", "internal/paths", "internal/system", "internal/vm"},
	"internal/dns":            {"internal/fault"},
	"internal/splitdns":       {"internal/fault"},
	"internal/sshconfig":      {"internal/fault"},
	"internal/forward":        {"internal/fault", "internal/vm"},
	"internal/hostnet/helper": {"internal/fault", "internal/hostnet", "internal/paths", "internal/vm"},

	// Layer 2: services.
	"internal/store":    {"internal/fault", "internal/vm"},
	"internal/artifact": {"internal/fault", "internal/fileio"},
	"internal/debian":   {"internal/fault", "internal/system"},
	"internal/archive":  {"internal/fault", "internal/fileio"},
	"internal/download": {"internal/artifact", "internal/build", "internal/fault"},
	"internal/supply": {
		"internal/archive", "internal/artifact", "internal/bundle", "internal/download", "internal/fault", "internal/fileio", "internal/progress",
		"internal/system", "internal/tomlfile",
	},
	"internal/kernel":      {"internal/artifact", "internal/debian", "internal/disk", "internal/fault", "internal/fileio", "internal/paths", "internal/progress", "internal/system"},
	"internal/image":       {"internal/artifact", "internal/debian", "internal/disk", "internal/fault", "internal/image/layer", "internal/image/oci", "internal/paths", "internal/progress", "internal/system"},
	"internal/image/layer": {"internal/disk", "internal/fault"},
	"internal/image/oci":   {"internal/debian", "internal/fault", "internal/image/layer"},
	"internal/guest":       {"api/agent/v1", "api/agent/v1/agentv1connect", "internal/channel", "internal/fault", "internal/paths", "internal/vm"},
	"internal/snapshot":    {"internal/disk", "internal/fault", "internal/fileio", "internal/vm"},
	"internal/template":    {"internal/disk", "internal/fault", "internal/fileio", "internal/vmm"},
	"internal/vmm":         {"internal/fault", "internal/vm"},
	"internal/vmm/machine": {"internal/channel", "internal/fault", "internal/fileio", "internal/system", "internal/vmm"},
	"internal/vmm/firecracker": {
		"internal/disk", "internal/fault", "internal/system", "internal/vmm", "internal/vmm/kvm", "internal/vmm/machine",
	},
	"internal/vmm/kvm":       {},
	"internal/vmm/qemu":      {"internal/fault", "internal/system", "internal/vmm", "internal/vmm/kvm", "internal/vmm/machine"},
	"internal/vmm/fakeguest": {"api/agent/v1", "internal/agent/serve"},
	"internal/vmm/fake": {
		"api/agent/v1", "internal/agent/serve", "internal/channel", "internal/fault", "internal/system",
		"internal/vmm", "internal/vmm/fakeguest", "internal/vmm/machine",
	},

	// Layer 3.
	"internal/capability": {
		"api/agent/v1", "internal/disk", "internal/dns", "internal/fault", "internal/guest", "internal/hostnet", "internal/image",
		"internal/artifact", "internal/kernel", "internal/paths", "internal/template", "internal/vm", "internal/vmm",
	},

	// Layer 4.
	"internal/engine": {
		"api/agent/v1", "api/agent/v1/agentv1connect", "internal/capability", "internal/disk", "internal/fault", "internal/fileio",
		"internal/guest", "internal/paths", "internal/progress", "internal/snapshot", "internal/store", "internal/system",
		"internal/template", "internal/undo", "internal/vm", "internal/vmm",
	},

	// Layer 5.
	"internal/wire/wirefault": {"api/banger/v1", "internal/fault"},
	"internal/wire": {
		"api/banger/v1", "internal/engine", "internal/fault", "internal/image", "internal/kernel", "internal/progress",
		"internal/snapshot", "internal/store", "internal/template", "internal/vm", "internal/vmm",
	},
	"internal/builder": {
		"api/agent/v1/agentv1connect",
		"images", "internal/disk", "internal/fault", "internal/guest", "internal/image", "internal/paths", "internal/progress",
		"internal/tomlfile", "internal/undo", "internal/vm",
	},
	"internal/server": {
		"internal/builder",
		"api/agent/v1", "api/agent/v1/agentv1connect", "api/banger/v1", "api/banger/v1/bangerv1connect",
		"internal/build", "internal/engine", "internal/fault", "internal/forward", "internal/guest", "internal/image", "internal/kernel", "internal/paths",
		"internal/progress", "internal/snapshot", "internal/store", "internal/template", "internal/vm", "internal/vmm", "internal/wire",
		"internal/wire/wirefault",
	},
	"internal/client": {
		"api/agent/v1", "api/banger/v1", "api/banger/v1/bangerv1connect", "internal/build", "internal/fault",
		"internal/daemon/lock", "internal/paths", "internal/system", "internal/wire/wirefault",
	},

	// Layer 6.
	"internal/daemon/lock": {"internal/fault"},
	"internal/daemon": {
		"api/agent/v1/agentv1connect", "internal/daemon/lock",
		"internal/agent/serve", "internal/build", "internal/builder", "internal/bundle", "internal/capability", "internal/dns", "internal/engine", "internal/fault",
		"internal/forward", "internal/guest", "internal/hostnet", "internal/image", "internal/kernel", "internal/paths",
		"internal/progress", "internal/server", "internal/store", "internal/system", "internal/template", "internal/vm",
		"internal/vmm", "internal/vmm/fake", "internal/vmm/firecracker", "internal/vmm/qemu", "internal/disk", "internal/doctor", "internal/tomlfile",
	},
	"internal/cli": {
		"api/agent/v1", "api/banger/v1", "internal/build", "internal/bundle", "internal/client", "internal/doctor", "internal/doctor/host",
		"internal/fault", "internal/paths", "internal/progress", "internal/splitdns", "internal/sshconfig", "internal/supply", "internal/system", "internal/vm",
	},
	"internal/doctor/host": {"internal/bundle", "internal/doctor", "internal/fault", "internal/paths", "internal/system"},

	// The guest's side.
	"internal/agent": {
		"api/agent/v1", "api/agent/v1/agentv1connect", "internal/agent/adopt", "internal/agent/boot", "internal/agent/cgroup", "internal/agent/run", "internal/agent/serve",
		"internal/agent/sshd", "internal/build", "internal/channel",
	},
	"internal/agent/sshd":     {"internal/agent/serve"},
	"internal/agent/boot":     {"api/agent/v1", "internal/agent/identity"},
	"internal/agent/adopt":    {"api/agent/v1", "internal/agent/identity", "internal/agent/run"},
	"internal/agent/cgroup":   {},
	"internal/agent/identity": {"api/agent/v1"},
	"internal/agent/run":      {"internal/agent/serve"},
	"internal/agent/serve":    {"api/agent/v1", "api/agent/v1/agentv1connect", "internal/build"},

	// Tests.
	"internal/arch": {},
	"internal/bench": {
		"internal/build", "internal/debian", "internal/disk", "internal/dns", "internal/hostnet", "internal/image", "internal/paths", "internal/system", "internal/vm", "internal/vmm",
		"internal/vmm/firecracker", "internal/vmm/kvm",
	},
	"internal/e2e":           {},
	"internal/packaging":     {},
	"internal/hosttest":      {"internal/hosttest/need"},
	"internal/hosttest/need": {"internal/paths"},
	"internal/vmm/firecracker/fakefc": {
		"api/agent/v1", "internal/agent/serve", "internal/vmm/fakeguest",
	},
	"internal/vmm/firecracker/fakefc/firecracker": {"internal/vmm/firecracker/fakefc"},
	"internal/vmm/firecracker/fctest":             {"internal/hosttest/need", "internal/vmm/firecracker/fakefc"},
	"internal/vmm/vmmtest":                        {"api/agent/v1", "internal/agent", "internal/fault", "internal/guest", "internal/hosttest", "internal/hosttest/need", "internal/vm", "internal/vmm"},
}

// keys lists outside packages that only some rooms may hold.
var keys = map[string][]string{
	"os/exec":      {"internal/system", "internal/agent/run", "internal/hosttest", "internal/hosttest/need", "internal/vmm/firecracker/fctest", "internal/vmm/vmmtest"},
	"database/sql": {"internal/store"},
	"github.com/vishvananda/netlink": {
		"internal/hostnet", "internal/hostnet/helper", "internal/agent/identity", "internal/hosttest",
	},
	"github.com/google/nftables": {"internal/hostnet", "internal/hostnet/helper", "internal/hosttest"},
	"github.com/miekg/dns":       {"internal/dns"},
	"github.com/spf13/cobra":     {"internal/cli", "internal/daemon"},
}

func TestHouse(t *testing.T) {
	packages := parse(t)
	for name, p := range packages {
		allowed, known := rooms[name]
		if !known {
			t.Errorf("package %s has no room: decide where it lives in internal/arch", name)
			continue
		}
		if p.doc == "" {
			t.Errorf("package %s has no package comment", name)
		}
		for _, imported := range p.imports {
			if inside, ok := strings.CutPrefix(imported, module); ok {
				if !slices.Contains(allowed, inside) {
					t.Errorf("%s must not import %s", name, inside)
				}
			}
			if holders, locked := keys[imported]; locked && !slices.Contains(holders, name) {
				t.Errorf("%s must not import %s: that key is held by %s", name, imported, strings.Join(holders, ", "))
			}
		}
	}
	for name := range rooms {
		if _, ok := packages[name]; !ok {
			t.Errorf("room %s is empty: remove it from the table", name)
		}
	}
}

type house struct {
	imports []string
	doc     string
}

// parse reads the imports and package comments of all files that ship.
func parse(t *testing.T) map[string]*house {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	packages := map[string]*house{}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() {
			if rel == "tools" || strings.HasPrefix(d.Name(), ".") && rel != "." || d.Name() == "testdata" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		return readFile(packages, filepath.ToSlash(filepath.Dir(rel)), path)
	})
	if err != nil {
		t.Fatal(err)
	}
	return packages
}

func readFile(packages map[string]*house, pkg, path string) error {
	src, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	f, err := parser.ParseFile(token.NewFileSet(), path, src, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return err
	}
	p := packages[pkg]
	if p == nil {
		p = &house{}
		packages[pkg] = p
	}
	if f.Doc != nil {
		p.doc += f.Doc.Text()
	}
	if strings.HasPrefix(pkg, "api/") {
		p.doc = "generated"
	}
	for _, spec := range f.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return err
		}
		p.imports = append(p.imports, imported)
	}
	return nil
}
