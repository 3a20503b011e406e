package need

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

// recorder notes how a helper ended a test.
type recorder struct {
	testing.TB
	skipped, failed bool
}

func (r *recorder) Helper()               {}
func (r *recorder) Skipf(string, ...any)  { r.skipped = true }
func (r *recorder) Fatalf(string, ...any) { r.failed = true }

func TestMissing(t *testing.T) {
	cases := []struct {
		require         string
		skipped, failed bool
	}{
		{"", true, false},
		{"root,kvm", true, false},
		{"binary", false, true},
		{"root,binary", false, true},
		{"binaryx", true, false},
		{"all", false, true},
	}
	for _, c := range cases {
		t.Setenv(RequireVariable, c.require)
		r := &recorder{}
		if path := Binary(r, "no-such-program-here"); path != "" {
			t.Errorf("a program that does not exist was found at %s", path)
		}
		if r.skipped != c.skipped || r.failed != c.failed {
			t.Errorf("with %q: skipped %v, failed %v", c.require, r.skipped, r.failed)
		}
	}
}

func TestPresent(t *testing.T) {
	t.Setenv(RequireVariable, "binary")
	r := &recorder{}
	if path := Binary(r, "sh"); path == "" || r.failed || r.skipped {
		t.Errorf("sh: path %q, failed %v, skipped %v", path, r.failed, r.skipped)
	}
	t.Setenv(RequireVariable, "root")
	Root(r)
	if r.failed != (os.Geteuid() != 0) {
		t.Errorf("root: failed is %v for user %d", r.failed, os.Geteuid())
	}
}

func TestKernel(t *testing.T) {
	t.Setenv(RequireVariable, "kernel")
	had, lacked := &recorder{}, &recorder{}
	Kernel(had, "feature", true)
	Kernel(lacked, "feature", false)
	if had.failed || had.skipped || !lacked.failed {
		t.Errorf("one that is there: %+v; one that is not: %+v", had, lacked)
	}
}

func TestVMNeedsKernelAndImage(t *testing.T) {
	state := t.TempDir()
	t.Setenv(StateVariable, state)
	t.Setenv(RequireVariable, "vm")
	r := &recorder{}
	VM(r)
	if !r.failed {
		t.Error("an empty state directory was taken for one that can boot")
	}
	for _, name := range []string{"kernels/k/kernel.json", "images/i/image.json"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(state, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(state, name), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if !matches(state, "kernels/*/kernel.json") || !matches(state, "images/*/image.json") {
		t.Error("a kernel and an image were not seen")
	}
}

func TestNetworkAsksTheMirror(t *testing.T) {
	var asked string
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked = r.URL.Path }))
	if err := ask(server.URL); err != nil || asked != "/dists/stable/InRelease" {
		t.Errorf("asked for %q, error %v", asked, err)
	}
	server.Close()
	if err := ask(server.URL); err == nil {
		t.Error("a mirror that is gone was taken for one that answers")
	}
}
