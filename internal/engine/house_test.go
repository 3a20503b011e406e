package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/firecracker"
)

// house is an engine with the real capabilities and the fake driver, whose machines are processes.
type house struct {
	*Engine
	t     *testing.T
	p     paths.Paths
	net   *hostnet.Fake
	files files
	store *store.Store
	hook  atomic.Pointer[func(operation, stage string)] // the maker of templates looks at it at any time
	more  []vmm.Driver                                  // beside the fake

	templates TemplateConfig
	images    capability.Images
}

// files is one image and one kernel.
type files struct {
	img  image.Image
	k    kernel.Kernel
	base string
}

func (f files) Get(context.Context, string) (image.Image, error) { return f.img, nil }

type kernelFiles struct{ files }

func (f kernelFiles) Get(context.Context, string) (kernel.Kernel, error) { return f.k, nil }
func (f kernelFiles) Initramfs(context.Context, kernel.Kernel, string, ...string) (string, []string, error) {
	return f.base, nil, nil
}

const houseSeed = 64 << 20

func newHouse(t *testing.T) *house {
	t.Helper()
	h := houseIn(t, t.TempDir(), TemplateConfig{})
	t.Cleanup(func() {
		if rows, err := h.List(context.Background()); err == nil {
			for _, v := range rows {
				_ = h.Delete(context.Background(), string(v.ID), true, nil)
			}
		}
		h.close()
	})
	return h
}

// houseIn opens the house in dir, and furnishes it when it is new.
func houseIn(t *testing.T, dir string, templates TemplateConfig) *house {
	t.Helper()
	need.Binary(t, "mke2fs")
	h := &house{t: t, p: paths.Under(dir), net: hostnet.NewFake(), templates: templates}
	if err := h.p.Make(); err != nil {
		t.Fatal(err)
	}
	file := func(name string) string {
		path := filepath.Join(h.p.Cache, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	seed := filepath.Join(h.p.Cache, "seed.ext4")
	if _, err := os.Stat(seed); err != nil {
		if err := disk.CreateExt4(t.Context(), seed, houseSeed, "work"); err != nil {
			t.Fatal(err)
		}
	}
	h.files = files{
		img: image.Image{Name: "debian", Digest: "sha256:1", Root: file("root"), WorkSeed: seed, WorkSeedBytes: houseSeed},
		k:   kernel.Kernel{Name: "k", ELF: file("vmlinux"), ModulesDisk: file("modules")}, base: file("base"),
	}
	h.images = h.files
	h.open()
	return h
}

func (h *house) open() {
	h.t.Helper()
	s, err := store.Open(context.Background(), h.p.Database())
	if err != nil {
		h.t.Fatal(err)
	}
	d, err := fake.New()
	if err != nil {
		h.t.Fatal(err)
	}
	h.store = s
	h.Engine = New(Config{
		Store: s, Paths: h.p, Drivers: append([]vmm.Driver{d}, h.more...), BootTimeout: 30 * time.Second, StopTimeout: 5 * time.Second,
		Limits: vm.Limits{CPUs: 4, MemoryBytes: 8 << 30, VMMs: []string{fake.Name, firecracker.Name}},
		Capabilities: capability.All(capability.Options{
			Paths: h.p, Images: h.images, Kernels: kernelFiles{h.files}, Network: h.net, AgentBinary: h.files.base,
		}),
		Allocate: func(taken map[netip.Addr]bool) (netip.Addr, error) {
			return hostnet.Allocate(hostnet.Candidates[0], taken)
		},
		MAC: hostnet.MAC, Templates: h.templates,
		AfterStage: func(operation, stage string) {
			if hook := h.hook.Load(); hook != nil {
				(*hook)(operation, stage)
			}
		},
	})
}

func (h *house) close() {
	h.t.Helper()
	if err := errors.Join(h.Close(), h.store.Close()); err != nil {
		h.t.Errorf("close: %v", err)
	}
}

func houseSpec(name string) vm.Spec {
	s := spec(name)
	s.DiskBytes, s.WorkDiskBytes, s.NAT = houseSeed, houseSeed, true
	return s
}

// after has f called after each stage of each operation; nil ends that.
func (h *house) after(f func(operation, stage string)) {
	if f == nil {
		h.hook.Store(nil)
		return
	}
	h.hook.Store(&f)
}

func (h *house) create(name string) vm.VM {
	h.t.Helper()
	v, err := h.Create(h.t.Context(), houseSpec(name), true, nil)
	if err != nil {
		h.t.Fatalf("create %s: %v", name, err)
	}
	return v
}

func pid(t *testing.T, v vm.VM) int {
	t.Helper()
	var handle vmm.Handle
	if err := json.Unmarshal(v.Handle, &handle); err != nil {
		t.Fatalf("handle %q: %v", v.Handle, err)
	}
	return handle.PID
}

// count counts the files below the state directory; the database's own come and go.
func (h *house) count() int {
	n := 0
	_ = filepath.WalkDir(h.p.State, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.HasPrefix(filepath.Base(path), "banger.db") {
			n++
		}
		return nil
	})
	return n
}

// Fifty lives leave as many files, descriptors, goroutines, processes and devices as before.
func TestFiftyLivesLeaveNothing(t *testing.T) {
	hosttest.Snapshot(t)
	h := newHouse(t)
	life := func() {
		h.create("web")
		if err := h.Delete(t.Context(), "web", true, nil); err != nil {
			t.Fatal(err)
		}
	}
	life() // makes the client key and the seeds
	files, network, fds := h.count(), h.net.String(), descriptors(t)
	for range 50 {
		life()
	}
	if n := h.count(); n != files {
		t.Errorf("%d files, were %d", n, files)
	}
	if s := h.net.String(); s != network {
		t.Errorf("network is %q, was %q", s, network)
	}
	for deadline := time.Now().Add(patience); descriptors(t) > fds && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if n := descriptors(t); n > fds {
		t.Errorf("%d descriptors, were %d", n, fds)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// kill -9 of the VMM is seen, and the VM starts again with its disks.
func TestKilledVMMIsSeen(t *testing.T) {
	h := newHouse(t)
	v := h.create("web")
	if err := syscall.Kill(pid(t, v), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for v.State != vm.Failed {
		if time.Now().After(deadline) {
			t.Fatalf("%s after the kill the VM is %s", patience, v.State)
		}
		time.Sleep(5 * time.Millisecond)
		v, _ = h.Get(t.Context(), "web")
	}
	if !strings.Contains(v.Reason, "killed") {
		t.Errorf("reason %q", v.Reason)
	}
	if v, err := h.Start(t.Context(), "web", nil); err != nil || v.State != vm.Running {
		t.Errorf("%+v, %v", v, err)
	}
}

// The next daemon adopts the process, and the agent answers it.
func TestNextDaemonAdopts(t *testing.T) {
	h := newHouse(t)
	v := h.create("web")
	h.close()
	h.open()
	if told, err := h.Reconcile(t.Context()); err != nil || len(told) > 0 {
		t.Fatalf("mended %q, %v", told, err)
	}
	got, err := h.Get(t.Context(), "web")
	if err != nil || got.State != vm.Running || pid(t, got) != pid(t, v) {
		t.Fatalf("%+v, %v", got, err)
	}
	agent, err := h.Agent(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Ping(t.Context(), &agentv1.PingRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := h.Stop(t.Context(), "web", false, nil); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(pid(t, v), 0); err == nil {
		t.Error("the process outlived the stop")
	}
}

// A daemon that dies between the start of the process and the row that tells of it leaves a process
// that the next daemon finds all the same.
func TestProcessWithoutARowIsFound(t *testing.T) {
	h := newHouse(t)
	dead, reached, release := h.Engine, make(chan struct{}), make(chan struct{})
	h.after(func(_, stage string) {
		if stage == stageMachine {
			close(reached)
			<-release
		}
	})
	ended := make(chan error, 1)
	go func() { _, err := h.Create(context.Background(), houseSpec("web"), true, nil); ended <- err }()
	<-reached
	h.after(nil)
	old := h.store
	dead.die()
	h.open()
	v, err := h.Get(t.Context(), "web")
	if err != nil || v.Handle != nil || v.State != vm.Starting {
		t.Fatalf("%+v, %v", v, err)
	}
	told, err := h.Reconcile(t.Context())
	if err != nil || len(told) != 1 {
		t.Errorf("mended %q, %v", told, err)
	}
	if _, err := h.Get(t.Context(), "web"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("the row is still there: %v", err)
	}
	if n := h.count(); n > 3 { // the client key, its public half, the known hosts
		t.Errorf("%d files left", n)
	}
	if s := h.net.String(); strings.Contains(s, "tap") || strings.Contains(s, "nat") {
		t.Errorf("left %s", s)
	}
	_ = old.Close()
	close(release)
	<-ended
}

// Ten VMs at once; the time is told, not judged: that is the bench's.
func TestTenAtOnce(t *testing.T) {
	h := newHouse(t)
	h.create("warm")
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			if _, err := h.Create(context.Background(), houseSpec(fmt.Sprintf("vm-%d", i)), true, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("ten VMs in %s", time.Since(begin))
	seen := map[netip.Addr]bool{}
	rows, err := h.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range rows {
		if seen[v.IP] || v.State != vm.Running {
			t.Errorf("%s is %s at %s", v.Spec.Name, v.State, v.IP)
		}
		seen[v.IP] = true
	}
}
