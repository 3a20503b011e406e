// Package fctest gives tests a Firecracker: the fake one of package fakefc, with faults if asked for, or the real one
// that the environment names; and small guests for the real one.
package fctest

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"banger/internal/hosttest/need"
	"banger/internal/vmm/firecracker/fakefc"
)

// Variable names a real Firecracker.
const Variable = "BANGER_FIRECRACKER"

// Real needs a real Firecracker and returns its path.
func Real(t testing.TB) string {
	t.Helper()
	path := os.Getenv(Variable)
	if path == "" {
		need.Missing(t, "firecracker", "no real Firecracker: set "+Variable)
	}
	return path
}

// Version returns the version of the Firecracker at path.
func Version(t testing.TB, path string) string {
	t.Helper()
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(line, "Firecracker v")
}

var (
	under bool   // Main
	dir   string // of programs that were built; empty: none was
	build = sync.OnceValues(buildFake)
)

// Main runs the tests of a package that wants the fake, which is built once it is asked for, and removes it. It
// returns the exit code for TestMain. A copy of the tests that is killed before it asks leaves nothing.
func Main(m *testing.M) int {
	under = true
	defer func() {
		if dir != "" {
			os.RemoveAll(dir)
		}
	}()
	return m.Run()
}

func buildFake() (path string, err error) {
	if dir, err = os.MkdirTemp("", "fakefc"); err != nil {
		return "", err
	}
	path = filepath.Join(dir, "firecracker")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, "banger/internal/vmm/firecracker/fakefc/firecracker")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return "", &buildError{err, said}
	}
	return path, nil
}

type buildError struct {
	err  error
	said []byte
}

func (e *buildError) Error() string { return e.err.Error() + "\n" + string(e.said) }

// Fake returns the path of a fake Firecracker.
func Fake(t testing.TB) string {
	t.Helper()
	if !under {
		t.Fatal("the tests of this package do not run under fctest.Main")
	}
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Faulty returns the path of one with these faults.
func Faulty(t testing.TB, f fakefc.Faults) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "firecracker")
	if err := copyFaulty(Fake(t), path, f); err != nil {
		t.Fatal(err)
	}
	return path
}

// copyFaulty holds up forks meanwhile: a child that gets the open file would keep the program from being started.
func copyFaulty(from, to string, f fakefc.Faults) (err error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := out.Close(); err == nil {
			err = cerr
		}
	}()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return fakefc.Append(out, f)
}
