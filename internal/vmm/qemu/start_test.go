package qemu

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/fault"
)

// TestReason: what QEMU 7.2 really says, and what we make of it.
func TestReason(t *testing.T) {
	for said, want := range map[string]struct {
		kind fault.Kind
		hint string
	}{
		"-netdev tap,id=n0,ifname=bgr-t0,script=no,downscript=no: could not configure /dev/net/tun (bgr-t0): Device or resource busy": {
			fault.Conflict, "another process uses",
		},
		"-netdev tap,id=n0,ifname=bgr-t1,script=no,downscript=no: could not configure /dev/net/tun (bgr-t1): Operation not permitted": {
			fault.Precondition, "missing or another user's",
		},
		"-netdev tap,id=n0,ifname=bgr-t1,script=no,downscript=no: could not open /dev/net/tun: Permission denied": {
			fault.Precondition, "may not open /dev/net/tun",
		},
		"Could not access KVM kernel module: Permission denied; qemu-system-x86_64: -accel kvm: failed to initialize kvm: Permission denied": {
			fault.Precondition, "KVM",
		},
		"-blockdev x: Could not open '/a': Permission denied":         {fault.Precondition, "cannot open a file"},
		"-blockdev x: Could not open '/a': No such file or directory": {fault.Precondition, "missing"},
		`-device y: Failed to get "write" lock`:                       {fault.Conflict, "writes to this disk"},
		"cannot set up guest memory 'pc.ram': Cannot allocate memory": {fault.Precondition, "memory"},
		"qemu: invalid kernel header":                                 {fault.Precondition, "kernel is damaged"},
		"qemu-system-x86_64: something nobody has seen yet":           {fault.Unexpected, "command.txt"},
	} {
		err := reason(sample(), said)
		if fault.KindOf(err) != want.kind || !strings.Contains(fault.HintOf(err), want.hint) {
			t.Errorf("%s:\n%v %q, want %v %q", said, fault.KindOf(err), fault.HintOf(err), want.kind, want.hint)
		}
		if strings.Contains(err.Error(), "qemu-system") {
			t.Errorf("the program's name is noise: %v", err)
		}
	}
}

// A QEMU that was built without the sandbox runs without it.
func TestWithoutSandbox(t *testing.T) {
	old := filepath.Join(t.TempDir(), "qemu")
	script := "#!/bin/sh\ncase $1 in -sandbox) echo 'There is no option group sandbox' >&2; exit 1;; esac\necho QEMU emulator version 7.2.0\n"
	if err := os.WriteFile(old, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	d := New(Options{Binary: old})
	given, cancel := context.WithCancel(t.Context())
	cancel()
	if filter, err := filterOf(given, old); err == nil { // who gave up has not been told that there is none
		t.Errorf("given up: %v", filter)
	}
	if caps, err := d.Caps(t.Context()); err != nil || caps.Version != "7.2.0" || d.filter != nil {
		t.Errorf("%+v, %v, %v", caps, err, d.filter)
	}
}
