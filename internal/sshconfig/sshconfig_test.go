package sshconfig

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

func config(dir string) Config {
	return Config{
		Program: "/opt/my programs/banger", Key: filepath.Join(dir, "state dir/id_ed25519"), KnownHosts: filepath.Join(dir, "state dir/known_hosts"),
		Included: filepath.Join(dir, "state dir/ssh/config"), User: filepath.Join(dir, "home/.ssh/config"),
	}
}

// The user's configuration is byte for byte as before, whatever is in it.
func TestUninstallRestores(t *testing.T) {
	dir := t.TempDir()
	c := config(dir)
	rapid.Check(t, func(t *rapid.T) {
		before := []byte(rapid.OneOf(
			rapid.String(), rapid.SampledFrom([]string{"", "Host *\n  User me\n", "\ufeffHost a\r\n", blockBegin, blockCreated, "Include \"x\"\n", "no line end"}),
		).Draw(t, "before"))
		if _, ours := cut(before); ours {
			return // an earlier install that somebody cut short
		}
		if err := os.MkdirAll(filepath.Dir(c.User), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(c.User, before, 0o640); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(c.User, 0o640); err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			if changed, err := c.Install(); err != nil || changed != (i == 0) {
				t.Fatalf("install %d: %v, %v", i, changed, err)
			}
		}
		during, err := os.ReadFile(c.User)
		if err != nil || !bytes.HasSuffix(during, before) {
			t.Fatalf("during: %q, %v", during, err)
		}
		if s, err := c.Status(); err != nil || !s.Installed {
			t.Fatalf("status %+v, %v", s, err)
		}
		for i := range 2 {
			if changed, err := c.Uninstall(); err != nil || changed != (i == 0) {
				t.Fatalf("uninstall %d: %v, %v", i, changed, err)
			}
		}
		after, err := os.ReadFile(c.User)
		if err != nil || !bytes.Equal(after, before) {
			t.Fatalf("after: %q, %v, before: %q", after, err, before)
		}
		if info, err := os.Stat(c.User); err != nil || info.Mode().Perm() != 0o640 {
			t.Fatalf("mode: %v, %v", info, err)
		}
	})
}

func TestWithoutConfiguration(t *testing.T) {
	c := config(t.TempDir())
	if s, err := c.Status(); err != nil || s != (Status{}) {
		t.Fatalf("status %+v, %v", s, err)
	}
	if _, err := c.Install(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(c.User); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if _, err := c.Uninstall(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{c.User, c.Included} {
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left", path)
		}
	}
	// What the user wrote into the file that banger made stays.
	if _, err := c.Install(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(c.User, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("Host x\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := c.Uninstall(); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(c.User); err != nil || string(text) != "Host x\n" {
		t.Errorf("left: %q, %v", text, err)
	}
}

func TestLinkIsKept(t *testing.T) {
	dir := t.TempDir()
	c := config(dir)
	real := filepath.Join(dir, "dotfiles")
	if err := os.MkdirAll(filepath.Dir(c.User), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(real, []byte("Host y\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, c.User); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Install(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(c.User); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v, %v", info, err)
	}
	if text, err := os.ReadFile(real); err != nil || !strings.HasSuffix(string(text), "\nHost y\n") {
		t.Errorf("%q, %v", text, err)
	}
	if err := os.Remove(real); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Install(); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("a link to nowhere: %v", err)
	}
}

// TestWhatSSHReads asks ssh itself what it makes of the file, with a user's configuration that says otherwise.
func TestWhatSSHReads(t *testing.T) {
	need.Binary(t, "ssh")
	dir := t.TempDir()
	c := config(dir)
	c.KnownHosts = filepath.Join(dir, "100% known")
	if err := os.MkdirAll(filepath.Dir(c.User), 0o700); err != nil {
		t.Fatal(err)
	}
	const others = "Host other\n  User someone\nHost *\n  User wrong\n  ProxyJump bastion\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
	if err := os.WriteFile(c.User, []byte(others), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Install(); err != nil {
		t.Fatal(err)
	}
	ask := func(host string) string {
		out, err := exec.Command("ssh", "-F", c.User, "-G", host).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	got := ask("web.vm")
	for _, want := range []string{
		"\nuser root\n", "\nidentityfile \"" + c.Key + "\"\n", "\nstricthostkeychecking true\n", "\nidentitiesonly yes\n",
		"\nproxycommand '/opt/my programs/banger' internal proxy %n %p\n", "100% known",
	} {
		if !strings.Contains(got, want) && !strings.Contains(got, strings.ReplaceAll(want, `"`, "")) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if strings.Contains(got, "bastion") {
		t.Errorf("the user's jump host is in the way:\n%s", got)
	}
	if got := ask("other"); !strings.Contains(got, "\nuser someone\n") || strings.Contains(got, "internal proxy") {
		t.Errorf("other hosts are changed:\n%s", got)
	}
}
