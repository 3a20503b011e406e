package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/guest"
	"banger/internal/hosttest/need"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/qemu"
)

// machine is a real VM on disks of its own, without the engine and without a network.
type machine struct {
	t       *testing.T
	m       vmm.Machine
	base    string
	cfg     *agentv1.GuestConfig
	driver  *qemu.Driver
	running vmm.Running
	client  *guest.Client
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	state := need.VM(t)
	ctx := t.Context()
	dir := t.TempDir()
	k, err := kernel.Open(filepath.Join(state, "kernels"), filepath.Join(dir, "cache")).Get(ctx, "")
	check(t, err)
	img, err := image.Open(filepath.Join(state, "images")).Get(ctx, "")
	check(t, err)
	binary := filepath.Join(dir, "banger-agent")
	goTool, err := system.Find("go", "golang")
	check(t, err)
	_, err = system.Run(ctx, system.Command{
		Path: goTool, Args: []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "banger/cmd/banger-agent"},
		Env: append(os.Environ(), "CGO_ENABLED=0"), Timeout: 5 * time.Minute,
	})
	check(t, err)
	base, modules, err := kernel.Open(filepath.Join(state, "kernels"), filepath.Join(dir, "cache")).Initramfs(ctx, k, binary)
	check(t, err)
	check(t, disk.CreateExt4(ctx, filepath.Join(dir, "overlay"), 1<<30, "overlay"))
	check(t, disk.CloneFile(ctx, filepath.Join(dir, "work"), img.WorkSeed))
	key, err := guest.NewKeyPair("web")
	check(t, err)
	return &machine{
		t: t, base: base, driver: qemu.New(qemu.Options{}),
		m: vmm.Machine{
			ID: "01234567", Name: "web", Dir: dir, CPUs: 2, MemoryBytes: 512 << 20, Kernel: k.ELF, Initramfs: "initramfs",
			Cmdline: []string{"quiet", "systemd.show_status=0"},
			Disks: []vmm.Disk{
				{Role: "root", Path: img.Root, ReadOnly: true},
				{Role: "overlay", Path: "overlay"},
				{Role: "work", Path: "work"},
				{Role: "modules", Path: k.ModulesDisk, ReadOnly: true},
			},
		},
		cfg: &agentv1.GuestConfig{
			Hostname: "web", MachineId: strings.Repeat("0a", 16), Modules: modules, MaskedUnits: guest.DefaultMasks(),
			SshHostKey: key.Private, SshHostKeyPublic: key.Public,
			ChannelPort: vmm.ChannelPort, PlainDirs: []string{"/var/lib/docker"},
			AuthorizedKeys: []string{"ssh-ed25519 AAAA me"}, UnixNanos: time.Now().UnixNano(),
			Disks: []*agentv1.Disk{
				{Role: agentv1.Disk_ROLE_ROOT, ReadOnly: true},
				{Role: agentv1.Disk_ROLE_OVERLAY},
				{Role: agentv1.Disk_ROLE_WORK},
				{Role: agentv1.Disk_ROLE_MODULES, ReadOnly: true},
			},
		},
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// boot starts the machine; its agent need not answer yet.
func (m *machine) boot(ctx context.Context) {
	m.t.Helper()
	check(m.t, guest.WriteInitramfs(filepath.Join(m.m.Dir, "initramfs"), m.base, m.cfg))
	var err error
	m.running, err = m.driver.Start(ctx, m.m)
	check(m.t, err)
	m.attend()
}

// attend speaks to the machine that runs, and ends it with the test.
func (m *machine) attend() {
	m.client = guest.NewClient(m.running.DialGuest)
	client, running := m.client, m.running
	m.t.Cleanup(func() {
		client.Close()
		if err := running.Stop(context.Background()); err != nil {
			m.t.Errorf("stop the machine: %v", err)
		}
		if m.t.Failed() {
			serial, _ := os.ReadFile(filepath.Join(m.m.Dir, vmm.SerialLog))
			m.t.Logf("serial log:\n%s", serial)
		}
	})
}

// ping waits for the agent.
func (m *machine) ping(ctx context.Context) {
	m.t.Helper()
	begin := time.Now()
	for {
		once, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := m.client.Ping(once, &agentv1.PingRequest{})
		cancel()
		if err == nil {
			m.t.Logf("the agent answered after %.2f s", time.Since(begin).Seconds())
			return
		}
		select {
		case <-ctx.Done():
			m.t.Fatalf("the agent does not answer: %v", err)
		case <-m.running.Done():
			m.t.Fatalf("the machine ended: %+v", m.running.Exit())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// exec runs a program and returns its output and exit.
func (m *machine) exec(ctx context.Context, start *agentv1.ExecStart) (string, *agentv1.ExecExited, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	stream, err := m.client.Exec(ctx)
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = stream.CloseResponse() }()
	err = stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: start}})
	if err := errors.Join(err, stream.CloseRequest()); err != nil {
		return "", nil, err
	}
	var out strings.Builder
	for {
		r, err := stream.Receive()
		if err != nil {
			return out.String(), nil, err
		}
		out.Write(r.GetStdout())
		out.Write(r.GetStderr())
		if e := r.GetExited(); e != nil {
			return out.String(), e, nil
		}
	}
}

// shell runs a script that must succeed.
func (m *machine) shell(ctx context.Context, script string) string {
	m.t.Helper()
	out, exit, err := m.exec(ctx, &agentv1.ExecStart{Argv: []string{"sh", "-c", script}})
	if err != nil || exit.GetCode() != 0 {
		m.t.Fatalf("%s: %v, %v\n%s", script, exit, err, out)
	}
	return out
}

// settled waits until systemd has started all it wants to.
func (m *machine) settled(ctx context.Context) *agentv1.StatusResponse {
	m.t.Helper()
	for {
		s, err := m.client.Status(ctx, &agentv1.StatusRequest{})
		if err == nil && s.GetSystemState() != "starting" && s.GetSystemState() != "initializing" {
			return s
		}
		select {
		case <-ctx.Done():
			m.t.Fatalf("the system is still %v: %v", s, err)
		case <-time.After(time.Second):
		}
	}
}

// killAgent kills the agent, which takes the answer with it.
func (m *machine) killAgent(ctx context.Context) {
	m.t.Helper()
	if out, exit, err := m.exec(ctx, &agentv1.ExecStart{Argv: []string{"sh", "-c", "kill -9 $(cat /run/banger/agent.pid)"}}); err == nil {
		m.t.Fatalf("the agent survived kill -9: %v %s", exit, out)
	}
}

func (m *machine) shutdown(ctx context.Context, mode agentv1.ShutdownRequest_Mode, want vmm.ExitKind) {
	m.t.Helper()
	begin := time.Now()
	_, err := m.client.Shutdown(ctx, &agentv1.ShutdownRequest{Mode: mode})
	m.ended(ctx, want) // by which an answer may be lost
	if err != nil {
		m.t.Logf("shutdown: %v", err)
	}
	m.t.Logf("%v after %.2f s", want, time.Since(begin).Seconds())
}

func (m *machine) ended(ctx context.Context, want vmm.ExitKind) {
	m.t.Helper()
	select {
	case <-m.running.Done():
	case <-ctx.Done():
		m.t.Fatal("the machine still runs")
	}
	if got := m.running.Exit(); got.Kind != want {
		m.t.Errorf("the machine ended by %+v, want %s", got, want)
	}
	check(m.t, m.running.Stop(ctx))
	m.client.Close()
}

// The agent in a real guest: before systemd, under systemd, killed, at an early shutdown, and without any init.
func TestRealGuest(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()

	m.boot(ctx)
	m.ping(ctx)
	m.killAgent(ctx) // systemd has not adopted it yet: its unit will start another one
	m.ping(ctx)
	if s := m.settled(ctx); s.GetSystemState() != "running" || s.GetHostname() != "web" || !s.GetSshListening() || len(s.GetFilesystems()) != 2 {
		t.Errorf("settled as %v", s)
	}
	m.killAgent(ctx)
	m.ping(ctx)
	for script, want := range map[string]string{
		"cat /proc/$(cat /run/banger/agent.pid)/cgroup":           "0::/system.slice/banger-agent.service\n",
		"systemctl is-active banger-agent":                        "active\n",
		"stat -fc %T / /root /var/lib/docker":                     "overlayfs\next2/ext3\next2/ext3\n",
		"ls -d /lib/modules/$(uname -r)/kernel >/dev/null; id -u": "0\n",
		"stat -c %a /dev/net/tun /dev/fuse":                       "666\n666\n",
		"cat /etc/machine-id":                                     m.cfg.GetMachineId() + "\n",
		"echo $HOME; pwd":                                         "/root\n/root\n",
	} {
		if got := m.shell(ctx, script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	out, exit, err := m.exec(ctx, &agentv1.ExecStart{
		Argv: []string{"sh", "-c", "tty; exit 5"}, Terminal: &agentv1.TerminalSize{Rows: 24, Columns: 80},
	})
	if err != nil || exit.GetCode() != 5 || !strings.HasPrefix(out, "/dev/pts/") {
		t.Errorf("on a terminal: %q, %v, %v", out, exit, err)
	}
	m.shell(ctx, "echo mine >> /root/.ssh/authorized_keys; echo one > /root/kept; echo two > /etc/kept")
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_REBOOT, vmm.ExitReboot)

	m.boot(ctx)
	m.ping(ctx)
	const want = "ssh-ed25519 AAAA me\nmine\none\ntwo\n"
	if got := m.shell(ctx, "grep -v '^#' /root/.ssh/authorized_keys; cat /root/kept /etc/kept"); got != want {
		t.Errorf("after the reboot: %q, want %q", got, want)
	}
	// systemd runs from memory now; at the next start there is none. It has only just begun to start units.
	m.shell(ctx, "until grep -q systemd /proc/1/comm; do sleep 0.1; done; rm /sbin/init /usr/lib/systemd/systemd")
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)

	m.boot(ctx)
	m.ping(ctx)
	m.killAgent(ctx)
	m.ping(ctx)
	if s := m.settled(ctx); s.GetSystemState() != "none" {
		t.Errorf("without an init the system is %q", s.GetSystemState())
	}
	if got := m.shell(ctx, "(sleep 0.2 & ) ; sleep 1; grep -ls '^State:.Z' /proc/[0-9]*/status || echo none"); got != "none\n" {
		t.Errorf("nobody buries the dead: %s", got)
	}
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)
}

// What a user did to the files that the init writes costs these files, not the start; and a stop loses nothing
// that was written, flushed or not.
func TestRealGuestWithAStubbornUser(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	m.boot(ctx)
	m.ping(ctx)
	m.settled(ctx)
	m.shell(ctx, `set -e
		echo mine > /etc/resolv.conf; echo other > /etc/hostname
		rm /etc/hosts; mkdir /etc/hosts
		umount /var/lib/docker; rmdir /var/lib/docker; ln -s /nowhere/docker /var/lib/docker
		rm -r /root/.ssh; ln -s /nowhere/ssh /root/.ssh`)
	sums := m.shell(ctx, `set -e
		for d in /var/unflushed /root/unflushed; do
			mkdir $d; head -c 30000000 /dev/urandom > $d/large; for i in $(seq 200); do echo $i > $d/$i; done
		done; cat /var/unflushed/* | sha256sum; cat /root/unflushed/* | sha256sum`)
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)

	// chattr +i: 0x10 is the immutable flag, 0x80000 says that the file has extents.
	overlay := filepath.Join(m.m.Dir, "overlay")
	_, _ = system.Run(ctx, system.Command{Path: need.Binary(t, "e2fsck"), Args: []string{"-fp", overlay}}) // 1: it replayed the journal
	for _, name := range []string{"resolv.conf", "hostname"} {
		_, err := system.Run(ctx, system.Command{Path: need.Binary(t, "debugfs"), Args: []string{
			"-w", "-R", "set_inode_field /upper/etc/" + name + " flags 0x80010", overlay,
		}})
		check(t, err)
	}
	m.cfg.Nameservers = []string{"172.30.0.1"}
	m.boot(ctx)
	m.ping(ctx)
	if got := m.shell(ctx, "cat /var/unflushed/* | sha256sum; cat /root/unflushed/* | sha256sum"); got != sums {
		t.Errorf("what was written became something else:\n%s%s", sums, got)
	}
	if got := m.shell(ctx, "cat /etc/resolv.conf /etc/hostname; id -u"); got != "mine\nother\n0\n" {
		t.Errorf("the guest has %q", got)
	}
	serial, err := os.ReadFile(filepath.Join(m.m.Dir, vmm.SerialLog))
	check(t, err)
	for _, name := range []string{"/etc/resolv.conf", "/etc/hosts", "/root/.ssh", "/var/lib/docker"} {
		if !strings.Contains(string(serial), "warning") || !strings.Contains(string(serial), name) {
			t.Errorf("the serial log does not name %s", name)
		}
	}
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)
}

// What the init cannot do it says on the console, and the machine ends.
func TestRealGuestThatCannotBoot(t *testing.T) {
	m := newMachine(t)
	m.cfg.Disks = append(m.cfg.Disks, m.cfg.Disks[0])
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	m.boot(ctx)
	m.ended(ctx, vmm.ExitPanic)
	serial, err := os.ReadFile(filepath.Join(m.m.Dir, vmm.SerialLog))
	check(t, err)
	if !strings.Contains(string(serial), "banger: init: two disks are ROLE_ROOT") {
		t.Errorf("the serial log does not say why:\n%s", serial)
	}
}
