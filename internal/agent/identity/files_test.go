package identity

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	agentv1 "banger/api/agent/v1"
)

func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		if err := File(root, name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func text(t *testing.T, root, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func mode(t *testing.T, root, name string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode()
}

var config = &agentv1.GuestConfig{
	Hostname: "web", MachineId: strings.Repeat("ab", 16),
	Interfaces:       []*agentv1.Interface{{Mac: "02:00:00:00:00:01", Addresses: []string{"172.30.0.2/16"}}},
	Nameservers:      []string{"172.30.0.1"},
	Hosts:            []*agentv1.HostEntry{{Address: "172.30.0.3", Names: []string{"db.vm", "db"}}},
	SshHostKey:       "PRIVATE",
	SshHostKeyPublic: "ssh-ed25519 AAAA host",
	AuthorizedKeys:   []string{"ssh-ed25519 BBBB me"},
	MaskedUnits:      []string{"apt-daily.timer", "systemd-gpt-auto-generator"},
	ChannelPort:      "banger.agent.0",
	Timezone:         "Europe/Berlin",
}

func TestIdentity(t *testing.T) {
	root := tree(t, map[string]string{
		"etc/hosts":                        "127.0.0.1 localhost\n10.9.9.9 mine\n",
		"root/.ssh/authorized_keys":        "ssh-rsa CCCC the user's own",
		"usr/share/zoneinfo/Europe/Berlin": "zone",
		"run/systemd/resolve/stub":         "stub",
		"etc/ssh/ssh_host_ed25519_key":     "from the image",
		"var/lib/dbus/machine-id":          strings.Repeat("cd", 16) + "\n",
	})
	if err := os.Symlink("../run/systemd/resolve/stub", filepath.Join(root, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a second start changes nothing
		if err := Write(root, config); err != nil {
			t.Fatal(err)
		}
	}
	block := func(lines string) string { return blockBegin + "\n" + lines + blockEnd + "\n" }
	for name, want := range map[string]string{
		"etc/hostname":   "web\n",
		"etc/machine-id": strings.Repeat("ab", 16) + "\n", "var/lib/dbus/machine-id": strings.Repeat("ab", 16) + "\n",
		"etc/hosts": "127.0.0.1 localhost\n10.9.9.9 mine\n" + block("127.0.0.1 localhost\n"+
			"::1 localhost ip6-localhost ip6-loopback\n172.30.0.2 web.vm web\n172.30.0.3 db.vm db\n"),
		"etc/resolv.conf":                      "nameserver 172.30.0.1\n",
		"run/systemd/resolve/stub":             "stub",
		"root/.ssh/authorized_keys":            "ssh-rsa CCCC the user's own\n" + block("ssh-ed25519 BBBB me\n"),
		"etc/ssh/ssh_host_ed25519_key":         "PRIVATE\n",
		"etc/ssh/ssh_host_ed25519_key.pub":     "ssh-ed25519 AAAA host\n",
		"etc/ssh/sshd_config.d/00-banger.conf": "HostKey /etc/ssh/ssh_host_ed25519_key\n",
		"etc/localtime":                        "zone",
	} {
		if name == "etc/localtime" {
			if got, _ := os.Readlink(filepath.Join(root, name)); got != "/usr/share/zoneinfo/Europe/Berlin" {
				t.Errorf("%s points to %q", name, got)
			}
			continue
		}
		if got := text(t, root, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	for name, want := range map[string]fs.FileMode{
		"etc/ssh/ssh_host_ed25519_key": 0o600, "root/.ssh/authorized_keys": 0o600,
		"etc/machine-id": 0o444, "etc/resolv.conf": 0o644,
	} {
		if got := mode(t, root, name); got != want {
			t.Errorf("%s has mode %v, want %v", name, got, want)
		}
	}
}

func TestIdentityOfAnEmptyImage(t *testing.T) {
	root := t.TempDir()
	if err := Write(root, config); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(root, "etc/localtime")); err == nil {
		t.Error("a time zone that the image has not")
	}
	if got := mode(t, root, "root/.ssh"); got != 0o700|fs.ModeDir {
		t.Errorf("/root/.ssh has mode %v", got)
	}
}

// What stands in the way of one file does not keep the others from being written.
func TestIdentityInSpiteOfObstacles(t *testing.T) {
	root := tree(t, map[string]string{"etc/hostname/a": "", "etc/hosts/a": "", "etc/localtime/a": "", "usr/share/zoneinfo/Europe/Berlin": "zone"})
	for from, to := range map[string]string{"etc/resolv.conf": "resolv.conf", "root/.ssh": "/nowhere/at/all"} {
		if err := errors.Join(os.MkdirAll(filepath.Join(root, filepath.Dir(from)), 0o755), os.Symlink(to, filepath.Join(root, from))); err != nil {
			t.Fatal(err)
		}
	}
	err := Write(root, config)
	if err == nil {
		t.Fatal("nothing was said")
	}
	for _, name := range []string{"etc/hostname", "etc/hosts", "etc/localtime", "root/.ssh"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not named in: %v", name, err)
		}
	}
	for name, want := range map[string]string{
		"etc/resolv.conf": "nameserver 172.30.0.1\n", "etc/machine-id": config.MachineId + "\n", "etc/ssh/ssh_host_ed25519_key": "PRIVATE\n",
	} {
		if got := text(t, root, name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(root, "etc/*.banger")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestTimezoneStaysInside(t *testing.T) {
	if err := writeTimezone(t.TempDir(), "../../etc/passwd"); err == nil {
		t.Error("taken for a time zone")
	}
}

// The user's lines survive whatever they are and wherever they stand, and the block is there once.
func TestBlock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		line := rapid.OneOf(rapid.SampledFrom([]string{"", "x", blockEnd, " " + blockBegin}), rapid.StringMatching(`[a-z# ]{0,20}`))
		before := rapid.SliceOfN(line, 0, 4).Draw(t, "before")
		after := rapid.SliceOfN(line, 0, 4).Draw(t, "after")
		first := rapid.SliceOfN(rapid.StringMatching(`[a-z]{1,9}`), 0, 3).Draw(t, "first")
		second := rapid.SliceOfN(rapid.StringMatching(`[a-z]{1,9}`), 0, 3).Draw(t, "second")

		user := strings.Join(before, "\n")
		one := withBlock(user, first) + strings.Join(after, "\n")
		two := withBlock(one, second)
		if strings.Count("\n"+two, "\n"+blockBegin+"\n") != 1 {
			t.Fatalf("the block is not there once:\n%s", two)
		}
		want := strings.Join(second, "\n")
		if len(second) > 0 {
			want += "\n"
		}
		block := "\n" + blockBegin + "\n" + want + blockEnd + "\n"
		if !strings.Contains("\n"+two, block) {
			t.Fatalf("the block has not the new lines:\n%s", two)
		}
		rest := strings.Replace("\n"+two, block, "\n", 1)[1:]
		kept := user
		if kept != "" && !strings.HasSuffix(kept, "\n") {
			kept += "\n"
		}
		if kept += strings.Join(after, "\n"); kept != rest && kept+"\n" != rest {
			t.Fatalf("the user's lines %q became %q", kept, rest)
		}
		if again := withBlock(two, second); again != two {
			t.Fatalf("once more changed it:\n%s", again)
		}
	})
}

func TestBlockCutOff(t *testing.T) {
	torn := "mine\n" + blockBegin + "\nold\nmine too\n"
	if got := withBlock(torn, []string{"new"}); !strings.HasPrefix(got, torn) || !strings.HasSuffix(got, "\nnew\n"+blockEnd+"\n") {
		t.Errorf("got %q", got)
	}
}

func TestBlockHasNoForeignLines(t *testing.T) {
	if got := withBlock("", []string{"a\n" + blockEnd + "\nevil"}); strings.Count(got, "\n") != 3 {
		t.Errorf("a key with a line break got out of the block: %q", got)
	}
}

// What banger alone has written, or a disk takes at once, may be changed in place, which is quick; a long file with lines of
// the user's is whole at any time.
func TestUsersLinesAreNeverHalfWritten(t *testing.T) {
	many := strings.Repeat("ssh-rsa CCCC mine\n", blockSize/10)
	for text, inPlace := range map[string]bool{
		"":                    true,
		"ssh-rsa CCCC mine\n": true,
		many:                  false,
		blockBegin + "\n" + blockEnd + "\n" + many: false,
	} {
		root := tree(t, map[string]string{"keys": ""})
		if err := os.WriteFile(filepath.Join(root, "keys"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		var seen [3]fs.FileInfo
		for i, lines := range [][]string{nil, {"a", "b"}, {"a", "b"}} {
			if err := writeBlock(root, "keys", lines, 0o644); err != nil {
				t.Fatal(err)
			}
			info, err := os.Lstat(filepath.Join(root, "keys"))
			if err != nil {
				t.Fatal(err)
			}
			seen[i] = info
		}
		if os.SameFile(seen[0], seen[1]) != inPlace {
			t.Errorf("%.80q: changed in place %v, want %v", text, !inPlace, inPlace)
		}
		if !os.SameFile(seen[1], seen[2]) {
			t.Errorf("%.80q: written again for nothing", text)
		}
	}
}
