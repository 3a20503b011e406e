package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"

	agentv1 "banger/api/agent/v1"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/artifact"
	"banger/internal/build"
	"banger/internal/client"
	"banger/internal/daemon/lock"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/system"
	"banger/internal/vmm/fake"
)

// Environment of the test binary when it is bangerd.
const (
	rootVariable  = "BANGERD_TEST_ROOT"  // paths.Under it; set: be bangerd
	buildVariable = "BANGERD_TEST_BUILD" // the stamp of its build
	killVariable  = "BANGERD_TEST_KILL"  // "operation/stage" after which it kills itself
	pauseVariable = "BANGERD_TEST_PAUSE" // "operation/stage" after which it waits a moment, for what comes meanwhile
	traceVariable = "BANGERD_TEST_TRACE" // file to which it appends "operation/stage" lines
)

// TestMain makes the test binary bangerd, and the fake VMs that it starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fake.Argument {
		os.Exit(fake.Main(os.Args[2:]))
	}
	if root := os.Getenv(rootVariable); root != "" {
		os.Exit(childDaemon(root))
	}
	os.Exit(m.Run())
}

func childDaemon(root string) int {
	build.Stamp = os.Getenv(buildVariable)
	if len(os.Args) > 1 {
		return Main(os.Args[1:])
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return report(os.Stderr, Run(ctx, Options{Paths: paths.Under(root), FakeVMM: true, AfterStage: afterStage}))
}

func afterStage(operation, stage string) {
	at := operation + "/" + stage
	if path := os.Getenv(traceVariable); path != "" {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err == nil {
			fmt.Fprintln(f, at)
			f.Close()
		}
	}
	if at == os.Getenv(pauseVariable) {
		time.Sleep(2 * time.Second)
	}
	if at == os.Getenv(killVariable) {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// place is a banger of a test's own, with an image and a kernel with nothing in them.
type place struct {
	paths.Paths

	root string
}

// newPlace makes one. What still runs in it at the end of the test is ended.
func newPlace(t *testing.T) place {
	t.Helper()
	need.Binary(t, "mke2fs")
	root, err := os.MkdirTemp("", "bgr") // the socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	p := place{Paths: paths.Under(root), root: root}
	t.Cleanup(func() {
		_, _ = client.Stop(context.Background(), p.Paths)
		for _, pid := range p.machines(t) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if t.Failed() {
			log, _ := os.ReadFile(p.DaemonLog())
			t.Logf("daemon's log:\n%s", log[max(0, len(log)-8<<10):])
		}
		os.RemoveAll(root)
	})
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	shelves(t, p.Paths)
	return p
}

// machines returns the pids of the fake machines that run below the place.
func (p place) machines(t *testing.T) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, e := range entries {
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err != nil || !strings.HasPrefix(cwd, p.VMs()+"/") {
			continue
		}
		var pid int
		if _, err := fmt.Sscan(e.Name(), &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func shelves(t *testing.T, p paths.Paths) {
	t.Helper()
	images, kernels := artifact.Open(p.Images(), "image", "image.json"), artifact.Open(p.Kernels(), "kernel", "kernel.json")
	name, err := images.Build(func(dir string) (string, any, error) {
		files := disks(t, dir, "root.ext4", "work-seed.ext4")
		return "test", image.Manifest{
			Name: "test", Digest: artifact.Digest(files), Architecture: runtime.GOARCH, Files: files, CreatedAt: time.Now(),
		}, nil
	})
	if err = errors.Join(err, images.SetDefault(name)); err != nil {
		t.Fatal(err)
	}
	name, err = kernels.Build(func(dir string) (string, any, error) {
		files := disks(t, dir, "modules.ext4")
		var none bytes.Buffer
		if err := cpio.NewWriter(&none).Close(); err != nil {
			return "", nil, err
		}
		if err := os.WriteFile(filepath.Join(dir, "boot-modules.cpio"), none.Bytes(), 0o600); err != nil {
			return "", nil, err
		}
		plain := []string{"vmlinuz", "vmlinux", "config"}
		for _, name := range plain {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
				return "", nil, err
			}
		}
		more, err := artifact.Describe(dir, append(plain, "boot-modules.cpio")...)
		return "test", kernel.Manifest{
			Name: "test", Release: "1.0-test", Architecture: runtime.GOARCH, Files: append(files, more...), CreatedAt: time.Now(),
		}, err
	})
	if err = errors.Join(err, kernels.SetDefault(name)); err != nil {
		t.Fatal(err)
	}
}

func disks(t *testing.T, dir string, names ...string) []artifact.File {
	t.Helper()
	for _, name := range names {
		if err := disk.CreateExt4(t.Context(), filepath.Join(dir, name), 64<<20, "test"); err != nil {
			t.Fatal(err)
		}
	}
	files, err := artifact.Describe(dir, names...)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func (p place) options(env ...string) client.Options {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	env = append([]string{rootVariable + "=" + p.root, "PATH=" + os.Getenv("PATH")}, env...)
	return client.Options{Paths: p.Paths, AutoStart: true, Command: []string{self}, Env: env}
}

func (p place) dial(t *testing.T, env ...string) *client.Client {
	t.Helper()
	c, err := client.Dial(t.Context(), p.options(env...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// daemon returns the place's daemon; the test fails when none runs.
func (p place) daemon(t *testing.T) *system.Process {
	t.Helper()
	h, err := lock.Read(p.Lock())
	if err != nil {
		t.Fatal(err)
	}
	proc, err := system.Adopt(h.PID, h.StartTime)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proc.Close() })
	return proc
}

// end sends the daemon a signal and waits for its end.
func (p place) end(t *testing.T, sig syscall.Signal) {
	t.Helper()
	proc := p.daemon(t)
	if err := proc.Signal(sig); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, proc)
}

func awaitDone(t *testing.T, proc *system.Process) {
	t.Helper()
	select {
	case <-proc.Done():
	case <-time.After(20 * time.Second):
		t.Fatalf("process %d still runs", proc.PID())
	}
}

func (p place) create(t *testing.T, c *client.Client, name string) *bangerv1.VM {
	t.Helper()
	v, err := c.Create(t.Context(), spec(name), nil)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func spec(name string) *bangerv1.CreateVMRequest {
	return &bangerv1.CreateVMRequest{Spec: &bangerv1.VMSpec{
		Name: name, DiskBytes: 64 << 20, WorkDiskBytes: 64 << 20, MemoryBytes: 128 << 20, Cpus: 1,
	}}
}

// execute runs a program in a VM and returns its output and exit code.
func execute(t *testing.T, c *client.Client, vm string, argv ...string) (string, int32) {
	t.Helper()
	stream, err := c.VMs.ExecVM(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []*bangerv1.ExecVMRequest{
		{Input: &bangerv1.ExecVMRequest_Vm{Vm: vm}},
		{Input: &bangerv1.ExecVMRequest_Exec{Exec: &agentv1.ExecRequest{
			Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: argv}},
		}}},
	} {
		if err := stream.Send(m); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	for {
		m, err := stream.Receive()
		if err != nil {
			t.Fatalf("exec %q in %s: %v", argv, vm, err)
		}
		out.Write(m.GetExec().GetStdout())
		if e := m.GetExec().GetExited(); e != nil {
			return out.String(), e.GetCode()
		}
	}
}

func (p place) get(t *testing.T, c *client.Client, name string) *bangerv1.VM {
	t.Helper()
	res, err := c.VMs.GetVM(t.Context(), &bangerv1.GetVMRequest{Vm: name})
	if err != nil {
		t.Fatal(err)
	}
	return res.GetVm()
}

func TestVMsOutliveTheDaemon(t *testing.T) {
	p := newPlace(t)
	c := p.dial(t)
	before := p.create(t, c, "web")
	if before.GetState() != "running" || before.GetPid() == 0 {
		t.Fatalf("created %v", before)
	}
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		p.end(t, sig)
		if _, err := os.Stat(p.Socket()); sig == syscall.SIGTERM && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
		c := p.dial(t)
		after := p.get(t, c, "web")
		if after.GetState() != "running" || after.GetPid() != before.GetPid() {
			t.Fatalf("after %s: %v", sig, after)
		}
		if out, code := execute(t, c, "web", "echo", "hello"); out != "hello\n" || code != 0 {
			t.Errorf("after %s: echo said %q, exit code %d", sig, out, code)
		}
	}
	c = p.dial(t)
	if _, err := c.Stop(t.Context(), &bangerv1.StopVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	if left := p.machines(t); len(left) > 0 {
		t.Errorf("machines %v still run", left)
	}
}

func TestOneDaemon(t *testing.T) {
	p := newPlace(t)
	pids := make([]int32, 8)
	var all sync.WaitGroup
	for i := range pids {
		all.Go(func() {
			c, err := client.Dial(t.Context(), p.options())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			s, err := c.Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
			if err != nil {
				t.Error(err)
			}
			pids[i] = s.GetPid()
		})
	}
	all.Wait()
	for _, pid := range pids {
		if pid == 0 || pid != pids[0] {
			t.Fatalf("the clients saw daemons %v", pids)
		}
	}
	err := Run(t.Context(), Options{Paths: p.Paths, FakeVMM: true})
	if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), fmt.Sprint(pids[0])) {
		t.Errorf("a second daemon said: %v", err)
	}
}

func TestDaemonOfAnotherBuildIsReplaced(t *testing.T) {
	p := newPlace(t)
	old := p.dial(t, buildVariable+"=old")
	p.create(t, old, "web")
	proc := p.daemon(t)
	o := p.options()
	var notices []string
	o.Notice = func(s string) { notices = append(notices, s) }
	for range 2 {
		c, err := client.Dial(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if c.Hello.Build != build.ID() {
			t.Errorf("the daemon is build %s", c.Hello.Build)
		}
		if _, code := execute(t, c, "web", "true"); code != 0 {
			t.Error("the VM does not answer")
		}
	}
	awaitDone(t, proc)
	want := "bangerd was build " + old.Hello.Build + ", restarted as " + build.ID()
	if len(notices) != 1 || notices[0] != want {
		t.Errorf("told %q, want %q once", notices, want)
	}
}

func TestClientOfAnotherBuildThanTheBangerdBesideIt(t *testing.T) {
	p := newPlace(t)
	p.dial(t, buildVariable+"=old")
	proc := p.daemon(t)
	o := p.options(buildVariable + "=old")
	var notices []string
	o.Notice = func(s string) { notices = append(notices, s) }
	c, err := client.Dial(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if p.daemon(t).PID() != proc.PID() || len(notices) != 1 || !strings.Contains(notices[0], "build and install both") {
		t.Errorf("told %q", notices)
	}
}

func TestSocketGone(t *testing.T) {
	p := newPlace(t)
	c := p.dial(t)
	p.create(t, c, "web")
	old := p.daemon(t)
	if err := os.Remove(p.Socket()); err != nil {
		t.Fatal(err)
	}
	c = p.dial(t)
	awaitDone(t, old)
	if _, code := execute(t, c, "web", "true"); code != 0 {
		t.Error("the VM does not answer")
	}
}

func TestDaemonThatCannotStartSaysWhy(t *testing.T) {
	p := newPlace(t)
	if err := os.WriteFile(p.ConfigFile(), []byte("cpus = 1\ncolour = \"red\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := client.Dial(t.Context(), p.options())
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), `config.toml:2: unknown key "colour"`) {
		t.Errorf("got %v", err)
	}
}

func TestNoDaemonWithoutAutoStart(t *testing.T) {
	p := newPlace(t)
	_, err := client.Dial(t.Context(), client.Options{Paths: p.Paths})
	if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) != "start it with: banger daemon start" {
		t.Errorf("got %v", err)
	}
	if was, err := client.Stop(t.Context(), p.Paths); was || err != nil {
		t.Errorf("stopping none: %v, %v", was, err)
	}
}

func TestStopAndRestart(t *testing.T) {
	p := newPlace(t)
	p.dial(t)
	first := p.daemon(t)
	c, err := renewed(t.Context(), p.options())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	awaitDone(t, first)
	second := p.daemon(t)
	if was, err := client.Stop(t.Context(), p.Paths); !was || err != nil {
		t.Errorf("stopping: %v, %v", was, err)
	}
	awaitDone(t, second)
}

func TestPrivateFiles(t *testing.T) {
	p := newPlace(t)
	p.create(t, p.dial(t), "web")
	err := filepath.WalkDir(p.root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 && d.Type()&os.ModeSymlink == 0 {
			t.Errorf("%s has mode %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestOtherUsersAreRefused(t *testing.T) {
	need.Root(t)
	need.Binary(t, "perl")
	dir, err := os.MkdirTemp("", "bgr")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	heard := func(owner, stranger uint32) string {
		t.Helper()
		socket := filepath.Join(dir, "s")
		l, err := listen(socket, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		l.uid = owner
		// Only the credentials are left to keep a stranger out.
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(socket, 0o666)); err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Write([]byte("welcome"))
				_ = conn.Close()
			}
		}()
		return greeting(t, socket, stranger)
	}
	if got := heard(12345, 0); got != "welcome" {
		t.Errorf("root heard %q", got)
	}
	if got := heard(12345, 65534); got != "" {
		t.Errorf("a stranger heard %q", got)
	}
	if got := heard(65534, 65534); got != "welcome" {
		t.Errorf("the owner heard %q", got)
	}
}

// greeting returns what a process of a user hears on the socket.
func greeting(t *testing.T, socket string, uid uint32) string {
	t.Helper()
	if uid == 0 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		data, _ := io.ReadAll(conn)
		return string(data)
	}
	cmd := exec.Command("perl", "-MIO::Socket::UNIX", "-e",
		`my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "connect: $!"; local $/; print scalar <$s> // ""`, socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v", err)
	}
	return string(out)
}

// renewed is a new daemon of the place, and a client of it.
func renewed(ctx context.Context, o client.Options) (*client.Client, error) {
	if err := client.Renew(ctx, o); err != nil {
		return nil, err
	}
	return client.Dial(ctx, o)
}
