// Package need says what a test needs of the machine. Where it is missing the test is skipped,
// unless the environment variable BANGER_REQUIRE names it: then the test fails, so that a skip
// never looks like a pass. BANGER_REQUIRE is a list with commas: root, binary, kvm, vm, network, firecracker,
// kernel, ipv6, cgroup2, architecture, host (one that is
// less able than this one); or all.
package need

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"banger/internal/paths"
)

// RequireVariable is the environment variable that turns skips into failures.
const RequireVariable = "BANGER_REQUIRE"

// StateVariable names a state directory with a kernel and an image, for tests that boot; without
// it the user's own is taken.
const StateVariable = "BANGER_TEST_STATE"

// MirrorVariable names the Debian mirror that tests fetch from.
const MirrorVariable = "BANGER_MIRROR"

const defaultMirror = "http://deb.debian.org/debian"

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root", "this test runs as root only")
	}
}

// Binary needs a program, and returns its path. It is also looked for in /usr/sbin and /sbin.
func Binary(t testing.TB, name string) string {
	t.Helper()
	if path := find(name); path != "" {
		return path
	}
	Missing(t, "binary", "program "+name+" is not installed")
	return ""
}

// Architecture needs a processor of that kind, as Go names it.
func Architecture(t testing.TB, name string) {
	t.Helper()
	if runtime.GOARCH != name {
		Missing(t, "architecture", "this test is for "+name)
	}
}

// Kernel needs a feature of the running kernel; has tells whether it is there.
func Kernel(t testing.TB, feature string, has bool) {
	t.Helper()
	if !has {
		Missing(t, "kernel", "this kernel has no "+feature)
	}
}

// IPv6 needs the loopback address of IPv6.
func IPv6(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		Missing(t, "ipv6", err.Error())
		return
	}
	_ = l.Close()
}

// KVM needs hardware virtualisation that this user may use.
func KVM(t testing.TB) {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		Missing(t, "kvm", err.Error())
		return
	}
	_ = f.Close()
	if !hardwareVirtualization() {
		Missing(t, "kvm", "/dev/kvm is there, but the processor shows neither vmx nor svm")
	}
}

// VM needs what a real VM needs: QEMU, a kernel and an image. It returns the state directory that
// holds kernels/ and images/.
func VM(t testing.TB) string {
	t.Helper()
	qemu := "qemu-system-x86_64"
	if runtime.GOARCH == "arm64" {
		qemu = "qemu-system-aarch64"
	}
	state := os.Getenv(StateVariable)
	if state == "" {
		state = paths.FromEnvironment().State
	}
	switch {
	case find(qemu) == "":
		Missing(t, "vm", "program "+qemu+" is not installed")
	case !matches(state, "kernels/*/kernel.json") || !matches(state, "images/*/image.json"):
		Missing(t, "vm", "no kernel or no image in "+state+": run banger setup, or set "+StateVariable)
	}
	return state
}

var mirrorAnswers = sync.OnceValue(func() error { return ask(Mirror()) })

// Network needs a Debian mirror that answers, and returns its address.
func Network(t testing.TB) string {
	t.Helper()
	if err := mirrorAnswers(); err != nil {
		Missing(t, "network", err.Error())
	}
	return Mirror()
}

// Mirror is the address of the Debian mirror that Network asks.
func Mirror() string {
	if m := os.Getenv(MirrorVariable); m != "" {
		return m
	}
	return defaultMirror
}

// How often the mirror is asked, and how long its answer may take: one that is lost costs a whole run.
const (
	mirrorTries = 3
	mirrorLimit = 10 * time.Second
)

func ask(mirror string) (err error) {
	client := http.Client{Timeout: mirrorLimit}
	for range mirrorTries {
		var answer *http.Response
		if answer, err = client.Head(mirror + "/dists/stable/InRelease"); err == nil {
			return answer.Body.Close()
		}
	}
	return err
}

// Missing says that the test needs what is not there: it is skipped, or fails where BANGER_REQUIRE names it.
func Missing(t testing.TB, what, why string) {
	t.Helper()
	required := strings.Split(os.Getenv(RequireVariable), ",")
	if slices.Contains(required, what) || slices.Contains(required, "all") {
		t.Fatalf("%s requires %s: %s", RequireVariable, what, why)
		return
	}
	t.Skipf("needs %s: %s", what, why)
}

func find(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

func matches(dir, pattern string) bool {
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	return err == nil && len(found) > 0
}

func hardwareVirtualization() bool {
	if runtime.GOARCH == "arm64" {
		return true
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(info)) {
		if name, flags, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "flags" {
			fields := strings.Fields(flags)
			return slices.Contains(fields, "vmx") || slices.Contains(fields, "svm")
		}
	}
	return false
}
