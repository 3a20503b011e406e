package cli

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

// TestExitCodes is the published table, in both directions.
func TestExitCodes(t *testing.T) {
	s := newSession(t, "web=running", "api=stopped")
	cases := []struct {
		line string
		code int
	}{
		{"vm list", 0},
		{"vm show web", 0},
		{"help", 0},
		{"vm", 0},
		{"vm start --help", 0},
		{"bogus", 2},
		{"vm bogus", 2},
		{"vm list --bogus", 2},
		{"vm list extra", 2},
		{"vm show", 2},
		{"vm show a b", 2},
		{"vm create --cpus 0", 2},
		{"vm create --cpus x", 2},
		{"vm create --memory lots", 2},
		{"vm create --memory 0", 2},
		{"vm create --disk -4G", 2},
		{"vm create a b", 2},
		{"vm list -o yaml", 2},
		{"vm list --timeout -1s", 2},
		{"vm list --timeout x", 2},
		{"vm create --ssh-key /nowhere", 2},
		{"vm exec", 2},
		{"vm exec -- ls", 2},
		{"vm exec web -e =x -- ls", 2},
		{"vm exec web -e x -- ls", 2},
		{"vm logs web -n -1", 2},
		{"run a b", 2},
		{"completion powershell", 2},
		{"help vm bogus", 2},
		{"vm show gone", 3},
		{"vm start gone", 3},
		{"image show gone", 3},
		{"vm ping gone", 3},
		{"daemon logs", 3},
		{"vm delete web", 4},
		{"vm create web", 4},
		{"vm ping api", 4},
		{"vm exec web -- ls", 7},
	}
	for _, c := range cases {
		_, stderr, code := s.run(c.line)
		if code != c.code {
			t.Errorf("banger %s: exit code %d, want %d; %s", c.line, code, c.code, stderr)
		}
		if code >= 2 && code < 7 && !strings.HasPrefix(stderr, "banger: error: ") && !strings.Contains(stderr, "\nbanger: error: ") {
			t.Errorf("banger %s: no error line in %q", c.line, stderr)
		}
	}
}

func TestErrorsNameTheThingAndTheWayOut(t *testing.T) {
	s := newSession(t, "web=running")
	cases := []struct{ line, stderr string }{
		{"ls", "banger: error: unknown command \"ls\" for \"banger\"\nbanger: hint: did you mean \"banger vm list\"?\n"},
		{"vm strat", "banger: error: unknown command \"strat\" for \"banger vm\"\nbanger: hint: did you mean \"banger vm start\"?\n"},
		{"vm create --cpu 2", "banger: error: unknown flag: --cpu\nbanger: hint: did you mean --cpus?\n"},
		{"vm create --cpus two", "banger: error: --cpus cannot be \"two\": it takes a whole number\nbanger: hint: see \"banger vm create --help\"\n"},
		{"vm list -o xml", "banger: error: --output cannot be \"xml\": it takes table or json\nbanger: hint: see \"banger vm list --help\"\n"},
		{"vm exec web ls -l", "banger: error: unknown shorthand flag: 'l' in -l\nbanger: hint: put -- before the command that runs in the guest\n"},
		{"vm show gone", "banger: error: there is no VM gone\nbanger: hint: see: banger vm list\n"},
	}
	for _, c := range cases {
		if _, stderr, _ := s.run(c.line); stderr != c.stderr {
			t.Errorf("banger %s:\n%swant:\n%s", c.line, stderr, c.stderr)
		}
	}
}

func TestSeveralVMsEachFailOnTheirOwnLine(t *testing.T) {
	s := newSession(t, "web=running", "api=running")
	stdout, stderr, code := s.run("vm stop one web two api web -q")
	if stdout != "web\napi\n" || code != 3 {
		t.Errorf("stdout %q, code %d", stdout, code)
	}
	want := "banger: error: there is no VM one\nbanger: hint: see: banger vm list\n" +
		"banger: error: there is no VM two\nbanger: hint: see: banger vm list\n"
	if stderr != want {
		t.Errorf("stderr:\n%s", stderr)
	}
	stdout, _, _ = s.run("vm delete web api -o json -q")
	var deleted []deletedView
	if err := json.Unmarshal([]byte(stdout), &deleted); err != nil || len(deleted) != 2 || deleted[0].Name != "web" {
		t.Errorf("delete printed %s (%v)", stdout, err)
	}
}

func TestFailureOfOneAmongSeveralSaysWhich(t *testing.T) {
	err := about("web", 2, fault.New(fault.Timeout, "no answer").WithHint("wait"))
	if err.Error() != "VM web: no answer" || fault.HintOf(err) != "wait" || exitCode(err) != 6 {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
}

func TestKillForces(t *testing.T) {
	s := newSession(t, "web=running")
	s.run("vm stop web")
	s.run("vm kill web")
	s.run("vm stop --force web")
	want := []string{"StopVM force=false", "StopVM force=true", "StopVM force=true"}
	if !slices.Equal(s.world.calls, want) {
		t.Errorf("calls %q", s.world.calls)
	}
}

func TestCreatePrintsTheNameAndProgressGoesToStderr(t *testing.T) {
	s := newSession(t)
	stdout, stderr, code := s.run("vm create --no-start")
	if code != 0 || !regexp.MustCompile(`^[a-z]+-[a-z]+\n$`).MatchString(stdout) {
		t.Errorf("code %d, stdout %q", code, stdout)
	}
	if stderr != "banger: overlay disk               0.12 s\n" {
		t.Errorf("stderr %q", stderr)
	}
	if _, stderr, _ := s.run("vm create web -q"); stderr != "" {
		t.Errorf("quiet said %q", stderr)
	}
}

func TestInventedNamesAreValid(t *testing.T) {
	valid := regexp.MustCompile(`^[a-z]+-[a-z]+$`)
	for range 200 {
		if n := inventName(); !valid.MatchString(n) || len(n) > 20 {
			t.Fatalf("made up %q", n)
		}
	}
}

func TestInterruptedIs130(t *testing.T) {
	s := newSession(t)
	s.world.hang = "slow"
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		time.Sleep(50 * time.Millisecond)
		cancel()
	}()
	_, stderr, code := s.runContext(ctx, "vm create slow")
	if code != 130 || !strings.HasSuffix(stderr, "banger: error: interrupted\n") {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
}

func TestTimeoutIs6AndSaysHowLong(t *testing.T) {
	s := newSession(t)
	s.world.hang = "slow"
	_, stderr, code := s.run("vm create slow --timeout 50ms")
	if code != 6 || !strings.Contains(stderr, "banger: error: gave up after 50ms\nbanger: hint: give it longer") {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
}

func TestExec(t *testing.T) {
	s := newSession(t, "web=running")
	stdout, stderr, code := s.run("vm exec web -u build -w /srv -e A=1 -- echo -n x")
	if code != 7 || stdout != "" || stderr != "echo|-n|x" {
		t.Errorf("code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	start := s.world.execed[1].GetExec().GetStart()
	if start.GetUser() != "build" || start.GetCwd() != "/srv" || !slices.Equal(start.GetEnv(), []string{"A=1"}) || start.GetStdin() || start.GetTerminal() != nil {
		t.Errorf("start %v", start)
	}
	if !slices.Equal(s.world.calls, []string{"ExecVM"}) {
		t.Errorf("needless calls: %q", s.world.calls)
	}
	s.stdin = "to and fro"
	if stdout, _, _ := s.run("vm exec -i web cat"); stdout != "to and fro" {
		t.Errorf("stdin came back as %q", stdout)
	}
}

func TestExecPassesSignalsOn(t *testing.T) {
	s := newSession(t, "web=running")
	e, _, _ := s.env("vm", "exec", "web", "--", "sleep", "60")
	e.signals = watchSignals(func() { t.Error("the command was cancelled") })
	defer e.signals.close()
	go func() {
		for { // until the command listens
			e.signals.mu.Lock()
			taken := e.signals.handle != nil
			e.signals.mu.Unlock()
			if taken {
				break
			}
			time.Sleep(time.Millisecond)
		}
		e.signals.signals <- unix.SIGTERM
	}()
	if code := Run(context.Background(), e); code != 128+15 {
		t.Errorf("exit code %d", code)
	}
}

// TestExecLeavesAProgramThatIgnoresSignals: the third interrupt ends the command, whatever the guest does.
func TestExecLeavesAProgramThatIgnoresSignals(t *testing.T) {
	s := newSession(t, "web=running")
	s.world.deaf = true
	e, _, _ := s.env("vm", "exec", "web", "--", "sleep", "60")
	e.signals = watchSignals(func() { t.Error("the command was cancelled before it listened") })
	defer e.signals.close()
	code := make(chan int, 1)
	go func() { code <- Run(context.Background(), e) }()
	for listens := false; !listens; time.Sleep(time.Millisecond) {
		e.signals.mu.Lock()
		listens = e.signals.handle != nil
		e.signals.mu.Unlock()
	}
	for range insistence {
		e.signals.signals <- unix.SIGINT
	}
	select {
	case got := <-code:
		if got != int(fault.Interrupted) {
			t.Errorf("exit code %d", got)
		}
	case <-time.After(20 * time.Second):
		t.Error("still there after the last interrupt")
	}
}

// TestUnwritableOutput: a full disk behind standard output is no bug of banger's.
func TestUnwritableOutput(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		need.Missing(t, "kernel", err.Error())
	}
	defer full.Close()
	s := newSession(t, "web=running")
	for _, line := range []string{"vm list", "vm list -o json", "vm show web", "vm logs web", "completion bash", "vm exec web -i cat", "vm create new"} {
		s.stdin = "text"
		e, _, errs := s.env(strings.Fields(line)...)
		e.Stdout = full
		code := Run(context.Background(), e)
		if code != int(fault.Precondition) || !strings.Contains(errs.String(), "cannot write the output: no space left on device\n") || strings.Contains(errs.String(), "bug") {
			t.Errorf("banger %s: code %d, %q", line, code, errs)
		}
	}
}

// TestEmptyName: what a script's unset variable gives is no wish for a name to be made up.
func TestEmptyName(t *testing.T) {
	s := newSession(t, "web=running")
	for _, words := range [][]string{
		{"vm", "create", ""},
		{"run", "", "--", "ls"},
		{"run", ""},
		{"vm", "show", ""},
		{"vm", "exec", "", "--", "ls"},
		{"vm", "delete", "-f", "web", ""},
	} {
		_, stderr, code := s.runWords(words...)
		if code != int(fault.Usage) || !strings.HasPrefix(stderr, "banger: error: a name is empty\n") {
			t.Errorf("banger %q: code %d, %s", words, code, stderr)
		}
	}
	if len(s.world.calls) > 0 || len(s.world.vms) != 1 {
		t.Errorf("the daemon was asked: %q", s.world.calls)
	}
}

// fakeSSH puts an ssh in PATH that prints its arguments, one on a line, and exits with 9.
func fakeSSH(t *testing.T) (log string) {
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	script := "#!/bin/sh\nprintf '%s\\n' \"$@\" > " + log + "\nexit 9\n"
	if err := os.WriteFile(filepath.Join(dir, "ssh"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	return log
}

func TestSSH(t *testing.T) {
	log := fakeSSH(t)
	s := newSession(t, "web=running")
	_, stderr, code := s.run("vm ssh web -- echo it's")
	if code != 9 || stderr != "banger: VM web is still running; stop it with: banger vm stop web\n" {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
	got, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nStrictHostKeyChecking=yes\n", "\nUserKnownHostsFile=\"/a b/known_hosts\"\n", "\nHostKeyAlias=web.vm\n", "-F\nnone\n", "\n--\n172.30.0.2\necho 'it'\"'\"'s'\n"} {
		if !strings.Contains(string(got), want) {
			t.Errorf("ssh was not given %q:\n%s", want, got)
		}
	}
	if _, stderr, code := s.run("vm ssh gone"); code != 3 || strings.Contains(stderr, "still running") {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
}

func TestRun(t *testing.T) {
	fakeSSH(t)
	s := newSession(t, "old=stopped", "web=running")
	_, stderr, code := s.run("run fresh -- true")
	if code != 9 || !strings.Contains(stderr, "VM fresh is still running") {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
	_, stderr, code = s.run("run --rm gone -- true")
	if _, kept := s.world.vms["gone"]; code != 9 || kept || strings.Contains(stderr, "still running") {
		t.Errorf("code %d, kept %t, stderr %q", code, kept, stderr)
	}
	_, stderr, code = s.run("run old")
	if code != 4 || !strings.Contains(stderr, "hint: enter it with: banger vm start old && banger vm ssh old\n") {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
	_, stderr, code = s.run("run web")
	if code != 4 || !strings.Contains(stderr, "hint: enter it with: banger vm ssh web\n") {
		t.Errorf("code %d, stderr %q", code, stderr)
	}
}

func TestRunWithoutSSHMakesNothing(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	s := newSession(t)
	_, _, code := s.run("run web")
	if _, err := os.Stat("/usr/sbin/ssh"); err == nil {
		need.Missing(t, "host", "ssh is where banger looks beside PATH")
	}
	if code != 5 || len(s.world.calls) != 0 {
		t.Errorf("code %d, calls %q", code, s.world.calls)
	}
}

func TestCompletion(t *testing.T) {
	s := newSession(t, "web=running", "api=stopped")
	cases := []struct{ line, want string }{
		{"__complete vm start ", "api\tstopped\n"},
		{"__complete vm stop ", "web\trunning\n"},
		{"__complete vm show w", "web\trunning\n"},
		{"__complete vm show web ", ""},
		{"__complete vm delete web ", "api\tstopped\n"},
		{"__complete vm create --image ", "debian\n"},
		{"__complete vm list -o ", "table\njson\n"},
	}
	for _, c := range cases {
		e, out, _ := s.env(strings.Split(c.line, " ")...)
		Run(context.Background(), e)
		got, _, _ := strings.Cut(out.String(), ":")
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.line, got, c.want)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if stdout, _, code := s.run("completion " + shell); code != 0 || !strings.Contains(stdout, "banger") {
			t.Errorf("completion %s: code %d", shell, code)
		}
	}
}

func TestEveryCommandHasHelpAndACompletion(t *testing.T) {
	s := newSession(t)
	e, _, _ := s.env()
	for _, cmd := range everyCommand(newRoot(e)) {
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: bad short help %q", cmd.CommandPath(), cmd.Short)
		}
		if !cmd.HasSubCommands() && !cmd.Parent().Hidden && cmd.ValidArgsFunction == nil {
			t.Errorf("%s: completes nothing", cmd.CommandPath())
		}
	}
	stdout, _, code := s.run("vm create --help")
	if code != 0 || !strings.Contains(stdout, "--work-disk") {
		t.Errorf("help: code %d\n%s", code, stdout)
	}
}
