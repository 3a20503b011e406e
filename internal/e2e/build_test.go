package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// ownImages gives the world copies of the prepared images: a build adds one to them.
func (w *world) ownImages() {
	w.t.Helper()
	dir := filepath.Join(w.dir, "state/banger/images")
	prepared, err := filepath.EvalSymlinks(dir)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		w.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", "--sparse=always", prepared, dir).CombinedOutput(); err != nil {
		w.t.Fatalf("%v\n%s", err, out)
	}
	// A template of each built image would be one more boot.
	if err := os.MkdirAll(filepath.Join(w.dir, "config/banger"), 0o700); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.dir, "config/banger/config.toml"), []byte("templates = false\n"), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// recipe makes a recipe's directory and returns its path.
func (w *world) recipe(name, text string, files map[string]string) string {
	w.t.Helper()
	dir := filepath.Join(w.dir, "recipes", name)
	if files == nil {
		files = map[string]string{}
	}
	files["recipe.toml"] = text
	for file, content := range files {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			w.t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	return dir
}

// leftOfBuilds lists what is left of builds under way, in files and in the catalogue.
func (w *world) leftOfBuilds() []string {
	left, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/builds/*.under-way"))
	half, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/images/.new-*"))
	bases, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/images/build-*"))
	left = append(append(left, half...), bases...)
	for _, v := range w.list() {
		left = append(left, "VM "+v.Name)
	}
	return left
}

const smallRecipe = `
description = "for the test"
from = "image:debian"
modules = ["dummy"]
[[file]]
path = "/etc/banger-test"
source = "files"
[[step]]
name = "work"
run = """
mkdir -p /srv/made
echo made >/srv/made/one
ln /srv/made/one /srv/made/two
chown 12:34 /srv/made/one
mkfifo /srv/made/pipe
cp /bin/true /srv/made/capable
echo kept >/root/kept
echo "tmpfs /home tmpfs defaults 0 0" >>/etc/fstab
echo "user's own" >>/etc/hosts
echo old >/var/log/old.log
touch /root/get-docker.sh
sleep 1000 & # ends with the step
"""
[[step]]
name = "outside"
needs = "internet"
optional = true
timeout = "60s"
run = "curl -sS --connect-timeout 5 http://192.0.2.1/"
[[test]]
name = "work"
run = "test \"$(stat -c '%u:%g %h' /srv/made/two)\" = '12:34 2' && test -p /srv/made/pipe && grep -q kept /root/kept && grep -q dummy /proc/modules && grep -q deep /etc/banger-test/a/b"
[[test]]
name = "scrubbed"
run = "! grep -q /home /etc/fstab && ! test -e /var/log/old.log && ! test -e /root/get-docker.sh && ! ls /etc/ssh/ssh_host_rsa_key && grep -q \"user's own\" /etc/hosts && test $(grep -c 'banger: begin' /etc/hosts) = 1"
[[test]]
name = "outside"
optional = true
run = "false"
[[test]]
name = "fails"
run = "echo the last line; exit 3"
`

// TestBuild takes a small recipe through every stage, and boots what comes of it.
func TestBuild(t *testing.T) {
	w := newColdWorld(t)
	w.ownImages()
	dir := w.recipe("mine", smallRecipe, map[string]string{"files/a/b": "deep\n"})
	var built struct {
		Image struct {
			Name    string
			Aliases []string
		}
		LeftOut []string `json:"left_out"`
	}
	if err := json.Unmarshal([]byte(w.banger("image", "build", dir, "-o", "json")), &built); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(built.Image.Name, "mine-") || len(built.LeftOut) != 1 || !strings.Contains(built.LeftOut[0], "outside") {
		t.Errorf("built: %+v", built)
	}
	if left := w.leftOfBuilds(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	root := filepath.Join(w.dir, "state/banger/images", built.Image.Name, "root.ext4")
	if out, err := exec.Command("e2fsck", "-fn", root).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}

	r := w.try("image", "test", "mine")
	for _, want := range []string{"passed work", "passed scrubbed", "skipped outside", "left out when the image was built", "failed fails", "exit code 3", "the last line"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("image test does not say %q", want)
		}
	}
	if r.code != 1 || t.Failed() {
		t.Errorf("image test: exit %d\n%s%s", r.code, r.stdout, r.stderr)
	}

	// The recipe changes: the image is stale, and says what to do.
	w.recipe("mine", smallRecipe+"\n# changed\n", nil)
	out := w.banger("image", "show", "mine")
	for _, want := range []string{"has changed", "banger image build " + dir, "built on: ", "export "} {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("image show of a stale one does not say %q:\n%s", want, out)
		}
	}
}

// TestTwoBuilds: one on another image than its recipe says, and one that fails meanwhile and leaves its VM.
func TestTwoBuilds(t *testing.T) {
	w := newColdWorld(t)
	w.ownImages()
	bad := w.recipe("bad", "from = \"image:debian\"\n[[file]]\npath = \"/etc\"\ncontent = \"x\"\n", nil)
	good := w.recipe("good", "from = \"image:nobody\"\n[[step]]\nname = \"room\"\nrun = \"test $(df --output=size -m / | tail -1) -gt 2500\"\n", nil)
	failed := make(chan result, 1)
	go func() { failed <- w.run(context.Background(), "", "image", "build", bad, "--keep-failed") }()
	if name := w.banger("image", "build", good, "--from", "debian", "--size", "3G", "--name", "chosen"); name != "chosen" {
		t.Errorf("built %q", name)
	}
	if out := w.banger("image", "show", "chosen"); !strings.Contains(out, "debian-") {
		t.Errorf("image show does not tell the parent:\n%s", out)
	}
	if r := w.try("image", "build", good, "--from", "debian", "--name", "chosen"); r.code != 4 {
		t.Errorf("a name that is taken: %+v", r)
	}

	r := <-failed
	said := strings.Join(strings.Fields(r.stderr), " ")
	vms := w.list()
	if r.code != 5 || len(vms) != 1 || !strings.Contains(said, "it is a directory") || !strings.Contains(said, "banger vm ssh "+vms[0].Name) {
		t.Fatalf("%+v, VMs %+v", r, vms)
	}
	if out := w.guest(vms[0].Name, "ls -d /run/banger-build"); out != "/run/banger-build" {
		t.Errorf("the VM that was left: %q", out)
	}
	w.killDaemon()
	if vms = w.list(); len(vms) != 1 { // a new daemon has reconciled
		t.Fatalf("the VM went with the daemon: %+v", vms)
	}
	w.banger("vm", "delete", "--force", "--yes", vms[0].Name)
	w.killDaemon()
	w.list()
	if left, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/builds/*.kept")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestBuildFails: the error has the reason and the log, and nothing is left.
func TestBuildFails(t *testing.T) {
	w := newColdWorld(t)
	w.ownImages()
	dir := w.recipe("bad", "from = \"image:debian\"\n[[step]]\nname = \"hangs\"\ntimeout = \"2s\"\nrun = \"echo before it hung; sleep 1000\"\n", nil)
	r := w.try("image", "build", dir)
	logs, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/builds/bad-*.log"))
	if r.code != 6 || len(logs) != 1 {
		t.Fatalf("%+v, logs %v", r, logs)
	}
	said := strings.Join(strings.Fields(r.stderr), " ")
	for _, want := range []string{`"hangs" did not end within 2s`, "before it hung", filepath.Base(logs[0])} {
		if !strings.Contains(said, want) {
			t.Errorf("the error does not say %q:\n%s", want, r.stderr)
		}
	}
	if left := w.leftOfBuilds(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	for ref, want := range map[string]string{"image:debian@sha256:" + strings.Repeat("0", 64): "not the one that the recipe names", "image:nobody": "nobody"} {
		r := w.try("image", "build", w.recipe("other", "from = \""+ref+"\"\n", nil))
		if r.code == 0 || !strings.Contains(r.stderr, want) {
			t.Errorf("from %s: %+v", ref, r)
		}
	}
}

// TestBuildEndsEarly: neither Ctrl-C nor the death of the VM or the daemon leaves anything.
func TestBuildEndsEarly(t *testing.T) {
	w := newColdWorld(t)
	w.ownImages()
	dir := w.recipe("long", "from = \"image:debian\"\n[[step]]\nname = \"long\"\nrun = \"echo begun; sleep 1000\"\n", nil)
	begin := func() *exec.Cmd {
		cmd := w.command(context.Background(), "image", "build", dir)
		cmd.Stderr = &bytes.Buffer{}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(3 * time.Minute)
		for len(w.list()) == 0 || w.list()[0].State != "running" {
			if time.Now().After(deadline) {
				t.Fatal("the VM does not run")
			}
			time.Sleep(200 * time.Millisecond)
		}
		return cmd
	}
	cmd := begin()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // its code is looked at next
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit %d after Ctrl-C", code)
	}
	// The command ends at once, the daemon when all is taken back.
	deadline := time.Now().Add(time.Minute)
	for left := w.leftOfBuilds(); len(left) > 0; left = w.leftOfBuilds() {
		if time.Now().After(deadline) {
			t.Fatalf("left after Ctrl-C: %v", left)
		}
		time.Sleep(200 * time.Millisecond)
	}

	// The VM dies: the build does not wait for an answer.
	cmd = begin()
	if err := syscall.Kill(w.show(w.list()[0].Name).PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // as above
	if said := strings.Join(strings.Fields(cmd.Stderr.(*bytes.Buffer).String()), " "); cmd.ProcessState.ExitCode() != 5 || !strings.Contains(said, "the temporary VM build-") {
		t.Errorf("exit %d: %s", cmd.ProcessState.ExitCode(), said)
	}
	if left := w.leftOfBuilds(); len(left) > 0 {
		t.Errorf("left after the VM's death: %v", left)
	}

	// Half of an image that a dead daemon was writing, as it may be at any moment of the export.
	if err := os.MkdirAll(filepath.Join(w.dir, "state/banger/images/.new-1"), 0o700); err != nil {
		t.Fatal(err)
	}
	cmd = begin()
	w.killDaemon()
	_ = cmd.Wait() // the daemon that it spoke with is gone
	w.list()       // a new daemon answers when it has reconciled
	if left := w.leftOfBuilds(); len(left) > 0 {
		t.Errorf("left after the daemon's death: %v", left)
	}
	if out := w.banger("daemon", "status"); !strings.Contains(out, "interrupted build") {
		t.Errorf("the daemon does not tell what it took back:\n%s", out)
	}
}
