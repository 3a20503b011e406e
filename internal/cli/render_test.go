package cli

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"
	"pgregory.net/rapid"

	"banger/internal/fault"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it anew):\n%s\nwant:\n%s", file, got, want)
	}
}

func everyCommand(root *cobra.Command) []*cobra.Command {
	var all []*cobra.Command
	for _, c := range root.Commands() {
		all = append(append(all, c), everyCommand(c)...)
	}
	return all
}

func TestRenderings(t *testing.T) {
	s := newSession(t, "web=running", "api=stopped", strings.Repeat("long-", 12)+"name=failed")
	s.world.vms["api"].Ip = ""
	cases := map[string]string{
		"vm-list.txt": "vm list", "vm-list.json": "vm list -o json", "vm-show.txt": "vm show web", "vm-show.json": "vm show api -o json",
		"image-list.txt": "image list", "image-list.json": "image list -o json", "image-show.txt": "image show debian",
		"kernel-list.txt": "kernel list", "kernel-list.json": "kernel list -o json", "ping.txt": "vm ping web", "ping.json": "vm ping web -o json",
		"setup.txt": "setup -q", "setup.json": "setup -q -o json", "logs.txt": "vm logs web -n 3 --vmm", "names.txt": "vm list --names",
	}
	for file, line := range cases {
		stdout, stderr, code := s.run(line)
		if code != 0 || stderr != "" {
			t.Errorf("banger %s: code %d, %s", line, code, stderr)
		}
		golden(t, file, stdout)
		if strings.HasSuffix(file, "list.txt") {
			checkWidth(t, stdout)
		}
	}
}

func TestDaemonStatusRenderings(t *testing.T) {
	s := newSession(t)
	for file, line := range map[string]string{"daemon-status.txt": "daemon status", "daemon-status.json": "daemon status -o json"} {
		stdout, _, code := s.run(line)
		if code != 0 {
			t.Errorf("code %d", code)
		}
		golden(t, file, strings.ReplaceAll(stdout, s.paths.Socket(), "/run/bangerd.sock"))
	}
	if err := os.Remove(s.paths.Socket()); err != nil {
		t.Fatal(err)
	}
	if stdout, _, code := s.run("daemon status -o json"); code != 3 || !strings.Contains(stdout, `"running": false`) {
		t.Errorf("without a daemon: code %d, %s", code, stdout)
	}
}

func checkWidth(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if w := lipgloss.Width(strings.TrimRight(line, "\n")); w > maxWidth {
			t.Errorf("%d columns: %s", w, line)
		}
	}
}

// TestTableFits: whatever the cells hold, a table with two flexible columns has at most 80 columns
// and no line more than it has rows.
func TestTableFits(t *testing.T) {
	columns := []column{{title: "NAME", flexible: true}, {title: "STATE"}, {title: "N", right: true}, {title: "TEXT", flexible: true}}
	rapid.Check(t, func(t *rapid.T) {
		rows := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) []string {
			return []string{rapid.String().Draw(t, "name"), "running", "12", rapid.String().Draw(t, "text")}
		}), 0, 5).Draw(t, "rows")
		text := table(columns, rows, maxWidth)
		if n := strings.Count(text, "\n"); n != len(rows)+1 {
			t.Fatalf("%d lines for %d rows", n, len(rows))
		}
		for line := range strings.Lines(text) {
			if w := lipgloss.Width(strings.TrimRight(line, "\n")); w > maxWidth {
				t.Fatalf("%d columns: %q", w, line)
			}
		}
	})
}

func TestSizesAndSpans(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0B", 999: "999B", 1000: "1.0K", 4 << 30: "4.0G", 512 << 20: "512M", 1023 << 20: "1.0G", 262 << 20: "262M", 10 << 30: "10G",
	} {
		if got := size(bytes); got != want {
			t.Errorf("size(%d) = %s, want %s", bytes, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0 s", 59 * time.Second: "59 s", 90 * time.Minute: "1 h", 47 * time.Hour: "47 h", 49 * time.Hour: "2 d",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%s) = %s, want %s", d, got, want)
		}
	}
}

func TestShellLine(t *testing.T) {
	for want, words := range map[string][]string{
		"ls | wc":              {"ls | wc"},
		"sh -c 'echo a; b' ''": {"sh", "-c", "echo a; b", ""},
		`echo 'it'"'"'s'`:      {"echo", "it's"},
	} {
		if got := shellLine(words); got != want {
			t.Errorf("%q: %s, want %s", words, got, want)
		}
	}
}

// TestJSONKeysAreDocumented holds docs/json.md and the structs equal.
func TestJSONKeysAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	for title, view := range map[string]any{
		"VM": vmView{}, "Image": imageView{}, "Kernel": kernelView{}, "Daemon": daemonView{}, "Driver": driverView{}, "Ping": pingView{}, "Event": eventView{},
		"KernelCheck": kernelCheckView{}, "KernelOption": optionView{}, "Deleted": deletedView{}, "Setup": setupView{}, "Version": versionView{}, "Template": templateView{}, "Doctor": doctorView{}, "Check": checkView{},
		"Runtime": runtimeView{}, "RuntimeVerify": runtimeVerifyView{}, "RuntimePackage": runtimePackageView{}, "RuntimeInstall": runtimeInstallView{},
		"Port": portView{}, "PortStatus": portStatusView{}, "DaemonDNS": dnsDaemonView{}, "DNS": dnsView{}, "DNSStatus": dnsStatusView{}, "SSHConfig": sshConfigView{},
	} {
		want := documentedKeys(string(doc), title)
		got := jsonKeys(reflect.TypeOf(view))
		if !slices.Equal(got, want) {
			t.Errorf("%s has keys %q, docs/json.md says %q", title, got, want)
		}
	}
}

func jsonKeys(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		keys = append(keys, t.Field(i).Tag.Get("json"))
	}
	return keys
}

var keyRow = regexp.MustCompile("(?m)^\\| `([a-z0-9_]+)` \\|")

func documentedKeys(doc, title string) []string {
	_, section, _ := strings.Cut(doc, "\n## "+title+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var keys []string
	for _, m := range keyRow.FindAllStringSubmatch(section, -1) {
		keys = append(keys, m[1])
	}
	return keys
}

// TestNullsAreStable: all keys are there for a VM of which nothing is known.
func TestNullsAreStable(t *testing.T) {
	text, err := json.Marshal(viewVM(nil))
	if err != nil {
		t.Fatal(err)
	}
	var keys map[string]any
	if err := json.Unmarshal(text, &keys); err != nil {
		t.Fatal(err)
	}
	if len(keys) != reflect.TypeFor[vmView]().NumField() || keys["started_at"] != nil || keys["error"] != "" {
		t.Errorf("%s", text)
	}
}

// TestProblemsAreToldInFull: the table has no room for them, and they name the command that mends them.
func TestProblemsAreToldInFull(t *testing.T) {
	problem := "image debian-trixie-e60d7f53 is damaged: file work-seed.ext4 is too short; make it again with: banger setup --rebuild"
	e, _, _ := newSession(t).env()
	for _, text := range []string{
		e.imageTable([]imageView{{Name: "debian-trixie-e60d7f53", Problem: problem}, {Name: "good"}}),
		e.kernelTable([]kernelView{{Name: "6.12", Problem: problem}, {Name: "good"}}),
	} {
		if !strings.Contains(text, "\nproblem: "+problem+"\n") || strings.Count(text, "problem: ") != 1 {
			t.Errorf("it is cut:\n%s", text)
		}
		for line := range strings.Lines(text) {
			if !strings.HasPrefix(line, "problem: ") && len(strings.TrimSuffix(line, "\n")) > maxWidth {
				t.Errorf("too wide: %q", line)
			}
		}
	}
}

// TestErrorsAreHarmless: what a guest or an archive says gets into errors, and must not command the terminal.
func TestErrorsAreHarmless(t *testing.T) {
	e, _, stderr := newSession(t).env()
	e.printError(fault.New(fault.Precondition, "its last lines:\n  \x1b]0;owned\a\x1b[31mred\r\u009b2J").WithHint("see \x1b[2J"))
	e.notice("left out: \x1b[1mbold\nbanger: error: none")
	want := "banger: error: its last lines:\n  ]0;owned[31mred2J\nbanger: hint: see [2J\nbanger: left out: [1mbold banger: error: none\n"
	if got := stderr.String(); got != want {
		t.Errorf("%q", got)
	}
}
