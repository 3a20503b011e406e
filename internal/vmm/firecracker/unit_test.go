package firecracker

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
)

func TestVersions(t *testing.T) {
	for text, want := range map[string]version{
		"1.16.1": {1, 16, 1, "1.16.1"}, "v1.10.0": {1, 10, 0, "1.10.0"}, "1.17.0-dev": {1, 17, 0, "1.17.0-dev"},
	} {
		if got, err := parseVersion(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "1", "1.2", "1.2.x", "1.2.3.4", "1.2.3\n", "-1.2.3", "99999.1.1", "1.2.3 x"} {
		if v, err := parseVersion(text); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%q is %+v, %v", text, v, err)
		}
	}
	for text, good := range map[string]bool{
		"1.9.1": false, "0.25.2": false, "1.10.0": true, "1.16.0": true, "1.17.0-dev": true, "1.99.0": true, "2.0.0": false,
	} {
		v, err := parseVersion(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := v.check(); (err == nil) != good || err != nil && fault.HintOf(err) == "" {
			t.Errorf("%s: %v", text, err)
		}
		if warned := v.warning() != ""; warned != (text == "1.16.0") {
			t.Errorf("%s: warned %t", text, warned)
		}
	}
}

func TestAdvice(t *testing.T) {
	for text, want := range map[string]fault.Kind{
		"Kvm error: Error creating KVM object: Permission denied (os error 13)":            fault.Precondition,
		"Open tap device failed: Ioctl TUNSETIFF: Resource busy (os error 16)":             fault.Conflict,
		"Unable to create the block device: backing file: No such file (os error 2)":       fault.Precondition,
		"The kernel file cannot be opened: No such file or directory (os error 2)":         fault.Precondition,
		"Cannot create mmap region: Out of memory (os error 12)":                           fault.Precondition,
		"Create snapshot error: Cannot write the memory file: No space left (os error 28)": fault.Precondition,
		"The requested operation is not supported after starting the microVM.":             fault.Conflict,
		"Cannot bind the host-side Unix socket: Address in use (os error 98)":              fault.Conflict,
		"unknown field `x`, expected `y`":                                                  fault.Precondition,
		"something new":                                                                    fault.Unexpected,
	} {
		err := advise(&apiError{Call: "PUT /x", Status: 400, Said: text})
		if fault.KindOf(err) != want || !strings.Contains(err.Error(), text) || (fault.HintOf(err) == "") != (want == fault.Unexpected) {
			t.Errorf("%v (%s), hint %q", err, fault.KindOf(err), fault.HintOf(err))
		}
	}
}

func TestWhatAnAnswerSays(t *testing.T) {
	for body, want := range map[string]string{
		`{"fault_message": "no \u001b[2J good"}`: "no [2J good",
		"{\"error\": \"bad\nrequest\" }":         `{"error": "bad request" }`,
		"":                                       "",
		"\xff\x00binary":                         "binary",
		`{"fault_message": 5}`:                   `{"fault_message": 5}`,
	} {
		if got := said([]byte(body)); got != want {
			t.Errorf("%q says %q, want %q", body, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		got := said(rapid.SliceOf(rapid.Byte()).Draw(t, "body"))
		if len(got) > maxSaid+len("…") || strings.ContainsFunc(got, func(r rune) bool { return r < ' ' }) {
			t.Fatalf("%q", got)
		}
	})
}

func TestJudge(t *testing.T) {
	code := func(n int) system.ExitStatus { return system.ExitStatus{Code: n, Known: true} }
	signal := func(s syscall.Signal) system.ExitStatus {
		return system.ExitStatus{Code: -1, Signal: s, Known: true}
	}
	panicked := []string{"[    1.0] Kernel panic - not syncing: oops", "[    1.0] Rebooting in 1 seconds.."}
	rebooted := []string{"[    9.0] reboot: Restarting system"}
	bad := []string{"2026 [x:main] Firecracker exiting with error. exit_code=148"}
	for name, c := range map[string]struct {
		status system.ExitStatus
		ending ending
		want   vmm.ExitKind
		detail string
	}{
		"power-off":               {signal(syscall.SIGTERM), ending{halted: "reboot: Power down"}, vmm.ExitPowerOff, "Power down"},
		"reboot":                  {code(0), ending{console: rebooted}, vmm.ExitReboot, "Restarting"},
		"silent reset":            {code(0), ending{}, vmm.ExitReboot, "reset"},
		"panic":                   {code(0), ending{console: panicked}, vmm.ExitPanic, "oops"},
		"power button":            {code(0), ending{console: rebooted, pressed: true}, vmm.ExitPowerOff, "Restarting"},
		"panic after the button":  {code(0), ending{console: panicked, pressed: true}, vmm.ExitPanic, "oops"},
		"our kill":                {signal(syscall.SIGKILL), ending{stopped: true}, vmm.ExitStopped, "killed"},
		"somebody's kill":         {signal(syscall.SIGKILL), ending{}, vmm.ExitKilled, "killed"},
		"triple fault":            {code(1), ending{}, vmm.ExitCrash, "general error"},
		"filter":                  {code(148), ending{said: bad}, vmm.ExitCrash, "system calls"},
		"Rust's panic":            {signal(syscall.SIGABRT), ending{}, vmm.ExitCrash, "panicked"},
		"unseen reboot":           {system.ExitStatus{}, ending{console: rebooted}, vmm.ExitReboot, "Restarting"},
		"unseen, told by the log": {system.ExitStatus{}, ending{said: bad}, vmm.ExitCrash, "148"},
		"unseen":                  {system.ExitStatus{}, ending{console: []string{"login: "}}, vmm.ExitKilled, ""},
	} {
		got := judge(c.status, c.ending)
		if got.Kind != c.want || got.Detail == "" || !strings.Contains(got.Detail, c.detail) {
			t.Errorf("%s: %+v, want %s with %q", name, got, c.want, c.detail)
		}
	}
}

// TestHaltWatch: a machine is ended by its console's last word alone, when nothing follows.
func TestHaltWatch(t *testing.T) {
	for name, c := range map[string]struct {
		console string
		want    bool
	}{
		"halted":         {"[    9.0] reboot: Power down\r\n", true},
		"no ACPI":        {"[    9.0] reboot: Power off not available: System halted instead\r\n", true},
		"a log is shown": {"[    9.0] reboot: Power down\r\nweb login: ", false},
		"quoted":         {"grep 'reboot: Power down' x\r\n", false},
		"nothing":        {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			log, err := os.OpenFile(filepath.Join(dir, vmm.SerialLog), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer log.Close()
			halted := make(chan string, 1)
			w := watchHalt(dir, func(line string) { halted <- line })
			defer w.close()
			if _, err := log.WriteString("[    0.0] Linux\r\n" + c.console); err != nil {
				t.Fatal(err)
			}
			select {
			case line := <-halted:
				if !c.want || !strings.HasPrefix(line, "reboot: ") {
					t.Errorf("halted by %q", line)
				}
			case <-time.After(map[bool]time.Duration{true: 20 * time.Second, false: 2 * (haltSettle + haltQuiet)}[c.want]):
				if c.want {
					t.Error("not seen")
				}
			}
		})
	}
}

// peer listens for connections to a guest in dir and gives each to answer.
func peer(t *testing.T, dir string, answer func(n int, c net.Conn)) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, vmm.GuestSocket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go answer(n, c)
		}
	}()
}

func TestDialGuest(t *testing.T) {
	dir := t.TempDir()
	peer(t, dir, func(n int, c net.Conn) {
		request := make([]byte, 32)
		k, _ := c.Read(request)
		switch {
		case string(request[:k]) != "CONNECT 1024\n":
			_, _ = c.Write([]byte("what?\n"))
		case n == 0: // nobody listens yet
			c.Close()
		case n == 1: // the driver is not up yet: silence
		default:
			_, _ = c.Write([]byte("OK 1073741824\nhello"))
		}
	})
	c, err := dialGuest(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	hello := make([]byte, 5)
	if _, err := c.Read(hello); err != nil || string(hello) != "hello" {
		t.Errorf("the guest's first bytes: %q, %v", hello, err)
	}
}

func TestDialGuestFails(t *testing.T) {
	if _, err := dialGuest(t.Context(), t.TempDir()); err == nil {
		t.Error("connected to nobody")
	}
	for name, answer := range map[string]string{
		"garbage": "\x00\xff\x1bsomething\n", "no line": strings.Repeat("OK 1", 100), "no number": "OK \n", "too much": "OK 12345678901\n",
	} {
		dir := t.TempDir()
		peer(t, dir, func(_ int, c net.Conn) {
			_, _ = c.Read(make([]byte, 32))
			_, _ = c.Write([]byte(answer))
		})
		if _, err := dialGuest(t.Context(), dir); fault.KindOf(err) != fault.Unexpected {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	peer(t, dir, func(_ int, c net.Conn) { c.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := dialGuest(ctx, dir); fault.KindOf(err) != fault.Timeout {
		t.Errorf("nobody listens in the guest: %v", err)
	}
}

func TestCommandLineOfTheKernel(t *testing.T) {
	m := vmm.Machine{Cmdline: []string{"quiet"}}
	for text, pciOff := range map[string]bool{"1.10.1": true, "1.12.0": true, "1.13.0": false, "1.17.0": false} {
		v, err := parseVersion(text)
		if err != nil {
			t.Fatal(err)
		}
		for arch, p := range platforms {
			line := cmdline(p, v, m)
			if strings.Contains(line, "pci=off") != pciOff || strings.Contains(line, "nomodule") || !strings.HasSuffix(line, "quiet") ||
				!strings.Contains(line, "console=ttyS0") || !strings.Contains(line, "panic=-1") {
				t.Errorf("%s on %s: %s", text, arch, line)
			}
		}
	}
}

func TestMachinesThatCannotBe(t *testing.T) {
	good := vmm.Machine{Name: "web", CPUs: 1, MemoryBytes: 128 << 20}
	v := version{major: 1, minor: 16}
	if err := checkMachine(v, good); err != nil {
		t.Error(err)
	}
	ballooned := good
	ballooned.Balloon = true
	if err := checkMachine(version{major: 1, minor: 13, text: "1.13.0"}, ballooned); fault.KindOf(err) != fault.Usage {
		t.Errorf("a balloon that nothing is reported to: %v", err)
	}
	if err := checkMachine(version{major: 1, minor: 14}, ballooned); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*vmm.Machine){
		"no CPU":           func(m *vmm.Machine) { m.CPUs = 0 },
		"too many CPUs":    func(m *vmm.Machine) { m.CPUs = 33 },
		"no memory":        func(m *vmm.Machine) { m.MemoryBytes = 0 },
		"half a MiB":       func(m *vmm.Machine) { m.MemoryBytes += 1 << 19 },
		"too many devices": func(m *vmm.Machine) { m.NICs = make([]vmm.NIC, 40) },
		"a bad role":       func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "a-b"}} },
		"one role twice":   func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "a"}, {Role: "a"}} },
	} {
		m := good
		spoil(&m)
		if err := checkMachine(v, m); fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestKernelFormats(t *testing.T) {
	bz := make([]byte, 1024)
	copy(bz[bzAt:], bzMagic)
	image := make([]byte, 64)
	copy(image[imageAt:], imageMagic)
	for want, content := range map[string][]byte{
		"elf": []byte("\x7fELF\x02"), "bzimage": bz, "image": image, "": []byte("#!/bin/sh\n"),
	} {
		path := filepath.Join(t.TempDir(), "kernel")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := kernelFormat(path); err != nil || got != want {
			t.Errorf("%q is %q, %v", want, got, err)
		}
		if err := checkKernel(version{major: 1, minor: 10, text: "1.10.0"}, path); want != kernelFormats(version{})[0] && fault.KindOf(err) != fault.Precondition {
			t.Errorf("1.10 boots %q: %v", want, err)
		}
	}
}
