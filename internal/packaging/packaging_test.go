package packaging

import (
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/hosttest/need"
)

const commandLimit = 2 * time.Minute

// run runs a program at the root of the tree and returns what it printed.
func run(t *testing.T, env []string, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Env = append(cmd.Env, env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", program, args, err, stderr.String())
	}
	return string(out)
}

// needPrograms needs what `make build` makes.
func needPrograms(t *testing.T) {
	t.Helper()
	bin, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"banger", "bangerd", "banger-agent", "banger-nethelper"} {
		need.Binary(t, filepath.Join(bin, name))
	}
}

// modes lists the files below dir with their permissions.
func modes(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	found := map[string]fs.FileMode{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		rel, _ := filepath.Rel(dir, path)
		found[rel] = info.Mode()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

var installed = map[string]fs.FileMode{
	"bin/banger": 0o755, "bin/bangerd": 0o755, "lib/banger/banger-agent": 0o755, "lib/banger/banger-nethelper": 0o755,
	"lib/banger/runtime-bundle.toml": 0o644, "share/systemd/user/bangerd.service": 0o644, "share/doc/banger/README.md": 0o644,
	"share/doc/banger/docs/runtime.md": 0o644, "share/bash-completion/completions/banger": 0o644,
	"share/zsh/site-functions/_banger": 0o644, "share/fish/vendor_completions.d/banger.fish": 0o644,
}

func TestInstallAndUninstall(t *testing.T) {
	needPrograms(t)
	dest := t.TempDir()
	const prefix = "/opt/of all/banger"
	env := []string{"PREFIX=" + prefix, "DESTDIR=" + dest}
	if err := os.Mkdir(filepath.Join(dest, "opt"), 0o755); err != nil {
		t.Fatal(err)
	}
	before := syscall.Umask(0o077) // as root may have it
	run(t, env, "scripts/install")
	syscall.Umask(before)
	to := filepath.Join(dest, prefix)
	found := modes(t, to)
	for name, mode := range installed {
		if found[name] != mode {
			t.Errorf("%s: mode %v, want %v", name, found[name], mode)
		}
	}
	// The programs know that they are installed, and find what belongs to them.
	home := t.TempDir()
	private := []string{"XDG_STATE_HOME=" + home, "XDG_CONFIG_HOME=" + home, "XDG_CACHE_HOME=" + home, "XDG_RUNTIME_DIR=" + home, "BANGER_RUNTIME_DIR="}
	var status struct {
		Directory, Origin string
		Parts             []struct{ Name string }
	}
	if err := json.Unmarshal([]byte(run(t, private, filepath.Join(to, "bin/banger"), "runtime", "status", "-o", "json")), &status); err != nil {
		t.Fatal(err)
	}
	if status.Origin != "installed" || status.Directory != filepath.Join(to, "lib/banger") || len(status.Parts) != 2 {
		t.Errorf("%+v", status)
	}
	unit, err := os.ReadFile(filepath.Join(to, "share/systemd/user/bangerd.service"))
	if err != nil || !strings.Contains(string(unit), "ExecStart=\"/opt/of all/banger/bin/bangerd\"\n") || !strings.Contains(string(unit), "\nType=notify\n") || strings.Contains(string(unit), "@") {
		t.Errorf("the unit: %v\n%s", err, unit)
	}
	deadLinks(t, filepath.Join(to, "share/doc/banger"))
	run(t, env, "scripts/install") // again, over it
	if len(modes(t, to)) != len(found) {
		t.Errorf("a second install left %v", modes(t, to))
	}
	run(t, env, "scripts/install", "remove")
	var left []string
	err = filepath.WalkDir(dest, func(path string, _ fs.DirEntry, err error) error {
		left = append(left, strings.TrimPrefix(path, dest))
		return err
	})
	if err != nil || !slices.Equal(left, []string{"", "/opt"}) { // which was there before
		t.Errorf("left behind: %q, %v", left, err)
	}
}

var link = regexp.MustCompile(`\]\(([^):#]+)\)`)

// deadLinks finds links of pages below dir to what is not there.
func deadLinks(t *testing.T, dir string) {
	t.Helper()
	links := 0
	for name := range modes(t, dir) {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllSubmatch(text, -1) {
			links++
			if _, err := os.Stat(filepath.Join(dir, filepath.Dir(name), string(m[1]))); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if links == 0 {
		t.Error("no links were found")
	}
}

func TestInstallSaysWhatIsWrong(t *testing.T) {
	for _, prefix := range []string{"opt", "/", ".", "/opt\nExecStart=/bin/sh", `/opt"`, "/o'pt", `/o\pt`} {
		cmd := exec.CommandContext(t.Context(), "../../scripts/install")
		cmd.Env = append(os.Environ(), "PREFIX="+prefix, "DESTDIR="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "error: PREFIX ") || !strings.Contains(string(out), "hint: ") {
			t.Errorf("PREFIX=%s: %v\n%s", prefix, err, out)
		}
	}
}

func TestUnit(t *testing.T) {
	needPrograms(t)
	need.Binary(t, "systemd-analyze")
	for _, name := range []string{"p", "with space, 100%h n&|"} {
		prefix := filepath.Join(t.TempDir(), name)
		run(t, []string{"PREFIX=" + prefix, "DESTDIR=/."}, "scripts/install")
		unit := filepath.Join(prefix, "share/systemd/user/bangerd.service")
		private := []string{"XDG_RUNTIME_DIR=" + t.TempDir()}
		run(t, private, "systemd-analyze", "--user", "verify", unit)
		// That verify looks at the program, and so at the quoting, shows when it is gone.
		if err := os.Remove(filepath.Join(prefix, "bin/bangerd")); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "systemd-analyze", "--user", "verify", unit)
		cmd.Env = append(os.Environ(), private...)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "not executable") {
			t.Errorf("without the daemon: %v\n%s", err, out)
		}
	}
}

func TestDebianPackage(t *testing.T) {
	needPrograms(t)
	need.Binary(t, "dpkg-deb")
	var packages []string
	for range 2 {
		packages = append(packages, strings.TrimSpace(run(t, []string{"COMPRESS=none"}, "scripts/deb", t.TempDir())))
	}
	first, err := os.ReadFile(packages[0])
	if err != nil {
		t.Fatal(err)
	}
	if second, err := os.ReadFile(packages[1]); err != nil || !bytes.Equal(first, second) {
		t.Errorf("the same sources gave another package (%v)", err)
	}
	deb := packages[0]
	version, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	for field, want := range map[string]string{"Package": "banger", "Version": strings.TrimSpace(string(version)), "Architecture": runtime.GOARCH} {
		if got := strings.TrimSpace(run(t, nil, "dpkg-deb", "--field", deb, field)); got != want {
			t.Errorf("%s: %q, want %q", field, got, want)
		}
	}
	if info := run(t, nil, "dpkg-deb", "--info", deb); !strings.Contains(info, "postinst") || !strings.Contains(info, "prerm") || strings.Contains(info, " @") {
		t.Error(info)
	}
	contents := run(t, nil, "dpkg-deb", "--contents", deb)
	for _, name := range []string{"./usr/lib/systemd/user/bangerd.service", "./usr/share/zsh/vendor-completions/_banger", "./usr/lib/banger/banger-agent", "./usr/share/doc/banger/changelog.gz"} {
		if !strings.Contains(contents, " "+name+"\n") {
			t.Errorf("there is no %s", name)
		}
	}
	for line := range strings.Lines(contents) {
		fields := strings.Fields(line)
		mode, owner, name := fields[0], fields[1], fields[5]
		if owner != "root/root" || !slices.Contains([]string{"drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--"}, mode) || !strings.HasPrefix(name, "./") {
			t.Errorf("%s", line)
		}
	}
}

// The package is installed below a root of its own, by the scripts in it, and purged again.
func TestDebianPackageInstalls(t *testing.T) {
	needPrograms(t)
	need.Root(t)
	need.Binary(t, "dpkg")
	need.Binary(t, "setcap")
	root := t.TempDir()
	for _, dir := range []string{"info", "updates"} {
		if err := os.MkdirAll(filepath.Join(root, "var/lib/dpkg", dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	deb := strings.TrimSpace(run(t, []string{"COMPRESS=none"}, "scripts/deb", t.TempDir()))
	dpkg := func(args ...string) {
		t.Helper()
		run(t, nil, "dpkg", append([]string{"--root=" + root, "--force-script-chrootless", "--force-depends"}, args...)...)
	}
	dpkg("--install", deb)
	helper := filepath.Join(root, "usr/lib/banger/banger-nethelper")
	if got := run(t, nil, "getcap", helper); !strings.HasSuffix(got, " cap_net_bind_service,cap_net_admin=ep\n") { // what doctor asks for
		t.Errorf("the helper may: %q", got)
	}
	fetched := filepath.Join(root, "usr/lib/banger/bundle.json")
	if err := os.WriteFile(fetched, []byte(`{"schema": 1}`), 0o644); err != nil {
		t.Fatal(err)
	}
	dpkg("--remove", "banger")
	if _, err := os.Stat(fetched); err != nil {
		t.Errorf("removing the package took what it had not brought: %v", err)
	}
	dpkg("--purge", "banger")
	if _, err := os.Stat(filepath.Dir(fetched)); err == nil {
		t.Error("purging left the runtime directory")
	}
}

// The managers of all users, not the system's, read their units again when the package brings another one or takes it away.
func TestPackageHasUnitsReadAgain(t *testing.T) {
	need.Root(t)
	need.Binary(t, "unshare")
	dir := t.TempDir()
	asked := filepath.Join(dir, "asked")
	for name, text := range map[string]string{"systemctl": "echo \"$@\" >>'" + asked + "'", "setcap": ":"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	const booted = `mount -t tmpfs none /run && mkdir -p /run/systemd/system && PATH=$0:$PATH exec sh "$@"`
	for _, script := range [][]string{{"packaging/deb/postinst", "configure"}, {"packaging/deb/postrm", "remove"}} {
		run(t, nil, "unshare", append([]string{"--mount", "sh", "-c", booted, dir}, script...)...)
		if got, err := os.ReadFile(asked); err != nil || string(got) != "kill --kill-who=main --signal=HUP user@*.service\n" {
			t.Errorf("%q asked systemd: %q, %v", script, got, err)
		}
		if err := os.RemoveAll(asked); err != nil {
			t.Fatal(err)
		}
	}
}
