package host

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"banger/internal/bundle"
	"banger/internal/doctor"
	"banger/internal/paths"
)

func TestKVM(t *testing.T) {
	dir := t.TempDir()
	device := filepath.Join(dir, "kvm")
	module := filepath.Join(dir, "kvm_pvm")
	if r := checkKVM(device, module); r.Status != doctor.Warning || r.Hint == "" {
		t.Errorf("without a device: %+v", r)
	}
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := checkKVM(device, module); r.Status != doctor.OKStatus {
		t.Errorf("with a device: %+v", r)
	}
	if err := os.Mkdir(module, 0o700); err != nil {
		t.Fatal(err)
	}
	if r := checkKVM(device, module); r.Status != doctor.Warning {
		t.Errorf("with a paravirtual module: %+v", r)
	}
}

// TestCapabilityBytes: what setcap cap_net_admin,cap_net_bind_service+ep (12, 10), +p, and either alone write, revision 2.
func TestCapabilityBytes(t *testing.T) {
	for data, want := range map[string]bool{
		"\x01\x00\x00\x02\x00\x14\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00": true,
		"\x01\x00\x00\x02\x00\x10\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00": false,
		"\x00\x00\x00\x02\x00\x14\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00": false,
		"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00": false,
		"": false, "\x01": false,
	} {
		if grantsCapabilities([]byte(data)) != want {
			t.Errorf("%q is not %t", data, want)
		}
	}
}

func TestDirectoriesAndSocket(t *testing.T) {
	dir := t.TempDir()
	if r := checkDirectories(paths.Under(dir)); r.Status != doctor.OKStatus {
		t.Errorf("in an empty directory: %+v", r)
	}
	if err := os.WriteFile(filepath.Join(dir, "state"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := checkDirectories(paths.Under(dir)); r.Status != doctor.MissingStatus || r.Hint == "" {
		t.Errorf("with a file in the way: %+v", r)
	}
	long := paths.Under("/" + string(make([]byte, 120)))
	if r := checkSocket(long); r.Status != doctor.MissingStatus || r.Hint == "" {
		t.Errorf("with a long path: %+v", r)
	}
}

func TestFirecrackerIsNotMissed(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if r := checkFirecracker(context.Background()); r.Status != doctor.OKStatus || r.Message == "" {
		t.Errorf("without one: %+v", r)
	}
	path := filepath.Join(os.Getenv("PATH"), "firecracker")
	for script, want := range map[string]doctor.Result{
		"echo Firecracker v1.16.1; echo; echo a line of its log": {Status: doctor.OKStatus, Message: path + ", which is Firecracker v1.16.1"},
		"exit 1": {Status: doctor.Warning, Hint: "banger runtime install firecracker"},
	} {
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		r := checkFirecracker(context.Background())
		if r.Status != want.Status || r.Hint != want.Hint || want.Message != "" && r.Message != want.Message {
			t.Errorf("with one: %+v", r)
		}
	}
}

func TestMissingProgramNamesItsPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	r := program("x", "no-such-program", "no-such-package", "does nothing").Run(context.Background())
	if r.Status != doctor.MissingStatus || r.Hint != "apt install no-such-package" {
		t.Errorf("%+v", r)
	}
}

// TestChecksEnd: every check of the real host comes to a result with a message.
func TestChecksEnd(t *testing.T) {
	for _, r := range doctor.Run(context.Background(), Checks(paths.Under(t.TempDir()))) {
		if r.Message == "" || r.Status != doctor.OKStatus && r.Hint == "" {
			t.Errorf("%+v", r)
		}
	}
}

func TestRuntime(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(bundle.DirVariable, dir)
	if r := checkRuntime(t.Context()); r.Status != doctor.OKStatus {
		t.Errorf("an empty one: %+v", r)
	}
	for text, want := range map[string]doctor.Status{
		`{"schema": 1, "vmms": {"firecracker": "fc"}}`: doctor.OKStatus, `{"schema": 1, "kernel": "gone"}`: doctor.MissingStatus,
		`{`: doctor.MissingStatus, `{"schema": 1, "kernel": "../fc"}`: doctor.MissingStatus,
	} {
		for name, content := range map[string]string{bundle.ManifestName: text, "fc": "x"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if r := checkRuntime(t.Context()); r.Status != want {
			t.Errorf("%s: %+v", text, r)
		}
	}
	t.Setenv(bundle.DirVariable, "relative")
	if r := checkRuntime(t.Context()); r.Status != doctor.MissingStatus || r.Hint == "" {
		t.Errorf("a relative path: %+v", r)
	}
}
