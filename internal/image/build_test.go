package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/hosttest"
)

// machineTar is the root file system of a Debian that was made ready, as tar writes it.
func machineTar(w io.Writer) error {
	out := tar.NewWriter(w)
	for _, e := range []struct{ name, text string }{
		{"./", ""},
		{"./etc/", ""},
		{"./usr/", ""},
		{"./usr/share/man/man1/ls.1", "long"},
		{"./root/", ""},
		{"./var/lib/dpkg/status", "Package: jq\nStatus: install ok installed\nVersion: 1.7\n"},
		{"./etc/machine-id", "0123\n"},
		{"./etc/ssh/ssh_host_ed25519_key", "secret"},
		{"./etc/ssh/sshd_config.d/10-keys-only.conf", "keys"},
		{"./etc/fstab", "recipe's own\n"},
		{"./etc/hostname", "build-1\n"},
		{"./var/log/old.log", "old"},
		{"./tmp/x", "x"},
		{"./srv/made", "made"},
		{"./var/lib/docker/", ""},
		{"./var/lib/docker/engine-id", "1"},
		{"./root/", ""},
		{"./root/kept", "kept"},
	} {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Mode: 0o644, Size: int64(len(e.text))}
		if strings.HasSuffix(e.name, "/") {
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.WriteString(out, e.text); err != nil {
			return err
		}
	}
	return out.Close()
}

func TestBuild(t *testing.T) {
	needTools(t)
	s := Open(t.TempDir())
	o := BuildOptions{
		Alias: "mine", RecipeHash: "sha256:1", Parent: Image{Manifest: Manifest{Suite: "trixie"}},
		Export: func(_ context.Context, w io.Writer) error { return machineTar(w) },
		Finish: func(m *Manifest) { m.Build = &Built{Recipe: "mine"} },
	}
	i, err := s.Build(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(i.Name, "mine-") || i.Manifest.Build == nil || !slices.Equal(i.Packages, []string{"jq=1.7"}) {
		t.Errorf("%+v", i)
	}
	for path, want := range map[string]string{
		"/srv/made": "made", "/etc/fstab": "recipe's own", "/etc/hostname": "localhost", "/etc/ssh/sshd_config.d/10-keys-only.conf": "keys",
	} {
		if got := strings.TrimSpace(debugfs(t, i.Root, "cat "+path)); got != want {
			t.Errorf("%s: %q", path, got)
		}
	}
	if got := debugfs(t, i.Root, "cat /etc/machine-id"); got != "" {
		t.Errorf("machine id %q", got)
	}
	for path, gone := range map[string]string{
		"/etc/ssh": "ssh_host", "/var/log": "old.log", "/tmp": " x ", "/root": "kept", "/var/lib/docker": "engine", "/usr/share": "man",
	} {
		if got := debugfs(t, i.Root, "ls "+path); strings.Contains(got, gone) {
			t.Errorf("%s has %s: %s", path, gone, got)
		}
	}
	if got := debugfs(t, i.WorkSeed, "cat /kept"); got != "kept" {
		t.Errorf("the work seed: %q", got)
	}

	o.Name = i.Name
	if _, err := s.Build(t.Context(), o, nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a taken name: %v", err)
	}
}

// TestBuildTakesItselfBack: an export that breaks off, or a disk that is full, leaves nothing and says why.
func TestBuildTakesItselfBack(t *testing.T) {
	broken := errors.New("the VM is gone")
	small := filepath.Join(hosttest.SmallDisk(t, 1<<20), "images")
	for name, c := range map[string]struct {
		dir    string
		export error
		kind   fault.Kind
	}{
		"breaks off": {t.TempDir(), broken, fault.Unexpected},
		"no room":    {small, nil, fault.Precondition},
	} {
		_, err := Open(c.dir).Build(t.Context(), BuildOptions{Alias: "mine", Export: func(_ context.Context, w io.Writer) error {
			return errors.Join(c.export, machineTar(w))
		}}, nil)
		if fault.KindOf(err) != c.kind || c.export != nil && !errors.Is(err, c.export) {
			t.Errorf("%s: %v", name, err)
		}
		left, err := filepath.Glob(filepath.Join(c.dir, ".new-*"))
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left %v %v", name, left, err)
		}
		if _, err := os.Stat(filepath.Join(c.dir, "mine")); err == nil {
			t.Errorf("%s: there is an image", name)
		}
	}
}

// A disk that becomes full meanwhile is told as that, not as a fault of the file that was under way.
func TestDiskFullMeanwhile(t *testing.T) {
	home := filepath.Join(t.TempDir(), "home")
	root := filepath.Join(hosttest.SmallDisk(t, 1<<20), rootName)
	_, err := writeTree(t.Context(), root, home, exportRules(true), func(w io.Writer) error {
		out := tar.NewWriter(w)
		const size = 4 << 20
		if err := out.WriteHeader(&tar.Header{Name: "./opt/large", Mode: 0o644, Size: size, Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err := io.Copy(out, strings.NewReader(strings.Repeat("banger ", size/7+1)[:size]))
		return errors.Join(err, out.Close())
	})
	if fault.KindOf(err) != fault.Precondition || !strings.HasPrefix(err.Error(), "disk full while writing "+root) || strings.Contains(err.Error(), "large") {
		t.Errorf("got %v", err)
	}
}
