package e2e

import (
	"archive/tar"
	"bytes"
	"io"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"banger/internal/hosttest/need"
)

// busyBoxLayer is a small root file system without systemd and without an SSH server, made like Alpine's: BusyBox with
// an inittab whose programs are not there.
func busyBoxLayer(t *testing.T) []byte {
	t.Helper()
	program, err := os.ReadFile(need.Binary(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(program, []byte("/lib64/ld-linux")) {
		need.Missing(t, "binary", "busybox: "+"the host's is not static: install busybox-static")
	}
	applets, err := exec.Command(need.Binary(t, "busybox"), "--list-full").Output()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h tar.Header, content string) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	put(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, string(program))
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet = strings.TrimPrefix(applet, "/"); applet != "bin/busybox" {
			put(tar.Header{Typeflag: tar.TypeSymlink, Name: applet, Linkname: "/bin/busybox"}, "")
		}
	}
	for name, content := range map[string]string{
		"etc/os-release": "ID=box\nPRETTY_NAME=\"A box\"\n", "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n",
		"etc/inittab": "::sysinit:/sbin/openrc sysinit\n::respawn:/sbin/getty 38400 tty1\n",
		"etc/profile": "for f in /etc/profile.d/*.sh; do . $f; done\n", "root/kept": "from the image\n",
	} {
		put(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// serveImage starts a registry with one image in it and returns its reference.
func serveImage(t *testing.T, layer []byte) string {
	t.Helper()
	// The namespace of these tests is a new one, where not even this is up.
	if out, err := exec.Command(need.Binary(t, "ip"), "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	server := httptest.NewServer(registry.New())
	t.Cleanup(server.Close)
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	image, err = mutate.Config(image, v1.Config{Env: []string{"PATH=/opt/tool/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TOOL_HOME=/opt/tool"}})
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/library/box:3.20")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

// ownCatalogue lets a world change what images there are, without a change of the prepared ones.
func (w *world) ownCatalogue() {
	w.t.Helper()
	dir := filepath.Join(w.dir, "state/banger/images")
	prepared, err := os.Readlink(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	// Not by os.CopyFS: a work seed is four gigabytes of holes.
	if out, err := exec.Command("cp", "-a", "--sparse=always", prepared+"/.", dir).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
}

// TestRunFromRegistry is the one line that gives a VM of a container image: fetched, imported, booted without systemd,
// entered by SSH although the image has no server.
func TestRunFromRegistry(t *testing.T) {
	ref := serveImage(t, busyBoxLayer(t))
	w := newColdWorld(t)
	w.ownCatalogue()
	r := w.try("run", ref, "--", "cat /root/kept; . /etc/os-release; echo $ID; echo $TOOL_HOME; exit 9")
	if r.code != 9 || r.stdout != "from the image\nbox\n/opt/tool\n" {
		t.Fatalf("run: %+v", r)
	}
	vms := w.list()
	if len(vms) != 1 {
		t.Fatalf("VMs %+v", vms)
	}
	box := vms[0].Name
	t.Run("exec", func(t *testing.T) {
		if out := w.guest(box, "tr '\\0' ' ' </proc/1/cmdline; echo $PATH"); !strings.Contains(out, "supervise") || !strings.Contains(out, "/opt/tool/bin") {
			t.Errorf("first process and PATH: %q", out)
		}
		if out := w.guest(box, "cat /sys/fs/cgroup/cgroup.controllers"); !strings.Contains(out, "memory") {
			t.Errorf("control groups: %q", out)
		}
	})
	t.Run("in use", func(t *testing.T) {
		if r := w.try("image", "delete", "--yes", ref); r.code != 4 || !strings.Contains(r.stderr, box) {
			t.Errorf("delete of an image in use: %+v", r)
		}
	})
	t.Run("power off inside", func(t *testing.T) {
		if r := w.try("vm", "exec", box, "--", "sh", "-c", "echo more >>/root/kept; sync; poweroff; sleep 60"); strings.Contains(r.stderr, "bug in banger") {
			t.Errorf("poweroff: %+v", r)
		}
		if v := w.await(box, "stopped", time.Minute); v.Error != "" {
			t.Errorf("an orderly power-off is called a failure: %s", v.Error)
		}
		w.banger("vm", "start", box)
		if out := w.guest(box, "cat /root/kept"); out != "from the image\nmore" {
			t.Errorf("after stop and start: %q", out)
		}
	})
	w.banger("vm", "stop", box)
	w.banger("vm", "delete", "--yes", box)
	w.banger("image", "delete", "--yes", ref)
	if r := w.try("image", "show", ref); r.code != 3 {
		t.Errorf("a deleted image: %+v", r)
	}
}
