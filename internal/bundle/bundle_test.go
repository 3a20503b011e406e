package bundle

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
)

func put(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil {
			err = os.WriteFile(path, []byte("x"), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestPlaces(t *testing.T) {
	checkout, installed := t.TempDir(), t.TempDir()
	put(t, checkout, SourceFile, "bin/banger")
	put(t, installed, "bin/banger")
	want := Place{Dir: checkout + "/runtime", Origin: FromCheckout, Source: checkout + "/" + SourceFile}
	if got := placeBeside(checkout + "/bin"); got != want {
		t.Errorf("%+v", got)
	}
	want = Place{Dir: installed + "/lib/banger", Origin: FromInstall, Source: installed + "/lib/banger/" + SourceFile}
	if got := placeBeside(installed + "/bin"); got != want {
		t.Errorf("%+v", got)
	}
	t.Setenv(DirVariable, "/srv/./rt/")
	if got, err := Here(); err != nil || got.Dir != "/srv/rt" || got.Origin != FromEnvironment {
		t.Errorf("%+v, %v", got, err)
	}
	t.Setenv(DirVariable, "rt")
	if _, err := Here(); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
		t.Errorf("a relative path: %v", err)
	}
}

func TestBareDirectory(t *testing.T) {
	dir := t.TempDir()
	b, err := Read(dir)
	if err != nil || !b.Bare || !b.Empty() {
		t.Errorf("an empty one: %+v, %v", b, err)
	}
	if b, err := Read(filepath.Join(dir, "gone")); err != nil || !b.Bare || !b.Empty() {
		t.Errorf("one that is not there: %+v, %v", b, err)
	}
	put(t, dir, "vmlinuz", "vmlinux", "initrd.img", "modules.ext4", "rootfs.ext4", "firecracker", "banger-agent", "else")
	if err := os.Mkdir(filepath.Join(dir, "jailer"), 0o755); err != nil {
		t.Fatal(err)
	}
	b, err = Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, p := range b.Parts() {
		got += p.Name + "=" + strings.TrimPrefix(p.Path, dir+"/") + " "
	}
	if got != "kernel=vmlinux initramfs=initrd.img modules=modules.ext4 image=rootfs.ext4 firecracker=firecracker banger-agent=banger-agent " {
		t.Error(got)
	}
}

func TestParse(t *testing.T) {
	good := []string{
		`{"schema": 1}`, `{"schema": 1, "kernel": "a/b", "new_key": {}}`, `{"schema": 1, "architecture": "` + runtime.GOARCH + `"}`,
		`{"schema": 1, "vmms": {"firecracker": "bundle-1-2/vmm/firecracker"}, "helpers": null}`,
	}
	for _, text := range good {
		if _, err := Parse([]byte(text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	bad := []string{
		``, `{`, `[]`, `{}`, `{"schema": 0}`, `{"schema": 2}`, `{"schema": 1, "architecture": "vax"}`, `{"schema": 1, "kernel": 3}`,
		`{"schema": 1, "kernel": "/k"}`, `{"schema": 1, "modules": "a/../../k"}`, `{"schema": 1, "helpers": {"banger-agent": ".."}}`,
		`{"schema": 1, "files": [{"path": "../x"}]}`, `{"schema": 1, "files": [{}]}`, strings.Repeat(" ", maxManifest+1),
	}
	for _, text := range bad {
		if _, err := Parse([]byte(text)); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%.60s: %v", text, err)
		}
	}
}

// Whatever a manifest names, its path is inside of the directory, or the manifest is refused.
func TestPathsStayInside(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		name := rapid.StringMatching(`(\.\.?|[a-z]{0,3})(/(\.\.?|[a-z]{0,3})){0,5}`).Draw(r, "name")
		m := Manifest{Schema: Schema, Image: name, VMMs: map[string]string{"firecracker": name}}
		if m.check() != nil {
			return
		}
		b := Bundle{Dir: "/srv/runtime", Manifest: m}
		for _, p := range b.Parts() {
			if p.Path != "/srv/runtime" && !strings.HasPrefix(p.Path, "/srv/runtime/") {
				r.Errorf("%q is %s", name, p.Path)
			}
		}
	})
}

func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(DirVariable, dir)
	put(t, dir, "bundle-1-2/firecracker", "bundle-1-2/banger-agent", "bundle-1-2/mke2fs", "jailer")
	text := `{"schema": 1, "vmms": {"firecracker": "bundle-1-2/firecracker", "mke2fs": "bundle-1-2/mke2fs", "qemu-system-x86_64": "gone"},
		"helpers": {"banger-agent": "bundle-1-2/banger-agent"}}`
	if err := os.WriteFile(filepath.Join(dir, ManifestName), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if path, found, err := VMM("firecracker"); err != nil || !found || path != dir+"/bundle-1-2/firecracker" {
		t.Errorf("%q, %t, %v", path, found, err)
	}
	for _, name := range []string{"mke2fs", "qemu-system-x86_64", "jailer", ""} { // no VMM; not there; not named; none
		if path, found, err := VMM(name); err != nil || found {
			t.Errorf("%s: %q, %v", name, path, err)
		}
	}
	if path, found, err := Helper("banger-agent"); err != nil || !found || path != dir+"/bundle-1-2/banger-agent" {
		t.Errorf("%q, %t, %v", path, found, err)
	}
	put(t, dir, "banger-agent") // as make install puts it there
	if path, _, err := Helper("banger-agent"); err != nil || path != dir+"/banger-agent" {
		t.Errorf("%q, %v", path, err)
	}
	if _, found, err := Helper("banger-nethelper"); found || err != nil {
		t.Errorf("one that is nowhere: %t, %v", found, err)
	}
	if err := os.WriteFile(filepath.Join(dir, ManifestName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := VMM("firecracker"); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("a manifest that cannot be read: %v", err)
	}
	if _, found, err := VMM("mke2fs"); found || err != nil {
		t.Errorf("what is no VMM needs no manifest: %v", err)
	}
}
