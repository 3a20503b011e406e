package engine

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/hosttest/need"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/store"
	"banger/internal/system"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/qemu"
)

// A real VM keeps / and /root over stop and start, and what it fsynced over a kill -9 of its VMM. It
// has no network: that would need rights on the host.
func TestRealVM(t *testing.T) {
	state := need.VM(t)
	h := realHouse(t, state)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	s := houseSpec("web")
	s.DiskBytes, s.WorkDiskBytes, s.MemoryBytes = 4<<30, 4<<30, 512<<20
	v, err := h.Create(ctx, s, true, tell(t))
	if err != nil {
		t.Fatal(err)
	}
	id := h.shell(ctx, "cat /etc/machine-id; hostname")
	if !strings.Contains(id, "web") || len(id) < 36 {
		t.Errorf("identity %q", id)
	}
	h.shell(ctx, "echo one > /root/work && echo two > /etc/overlay && sync -f /root/work && sync -f /etc/overlay")
	if _, err := h.Stop(ctx, "web", false, tell(t)); err != nil {
		t.Fatal(err)
	}
	if v, err = h.Start(ctx, "web", tell(t)); err != nil {
		t.Fatal(err)
	}
	if got := h.shell(ctx, "cat /root/work /etc/overlay; cat /etc/machine-id; hostname"); got != "one\ntwo\n"+id {
		t.Errorf("after the second start: %q, want the same as %q", got, id)
	}
	h.shell(ctx, "dd if=/dev/zero of=/root/big bs=64k count=16 conv=fsync 2>/dev/null; echo three > /root/work; sync -f /root/work")
	if err := syscall.Kill(pid(t, v), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(2 * time.Second); v.State != vm.Failed && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
		v, _ = h.Get(ctx, "web")
	}
	if v.State != vm.Failed {
		t.Errorf("two seconds after kill -9 the VM is %s", v.State)
	}
	if _, err = h.Start(ctx, "web", tell(t)); err != nil {
		t.Fatal(err)
	}
	if got := h.shell(ctx, "cat /root/work; stat -c %s /root/big"); got != "three\n1048576\n" {
		t.Errorf("after the kill: %q", got)
	}
	if err := h.Delete(ctx, "web", true, tell(t)); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(h.p.VMs()); len(entries) > 0 {
		t.Errorf("left %v", entries)
	}
}

func tell(t *testing.T) progress.Sink {
	begin := time.Now()
	return func(e progress.Event) {
		if e.Status != progress.Started {
			t.Logf("%6.2fs %-10s %-7s %s", time.Since(begin).Seconds(), e.Stage, e.Status, e.Message)
		}
	}
}

// realHouse is an engine with QEMU and the kernel and image below state.
func realHouse(t *testing.T, state string) *house {
	t.Helper()
	h := &house{t: t, p: paths.Under(t.TempDir())}
	if err := h.p.Make(); err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(h.p.Cache, "banger-agent")
	goTool, err := system.Find("go", "golang")
	if err != nil {
		t.Fatal(err)
	}
	_, err = system.Run(t.Context(), system.Command{
		Path: goTool, Args: []string{"build", "-trimpath", "-ldflags", "-s -w", "-o", agent, "banger/cmd/banger-agent"},
		Env: append(os.Environ(), "CGO_ENABLED=0"), Timeout: 5 * time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	if h.store, err = store.Open(t.Context(), h.p.Database()); err != nil {
		t.Fatal(err)
	}
	all := capability.All(capability.Options{
		Paths: h.p, AgentBinary: agent, Images: image.Open(filepath.Join(state, "images")),
		Kernels: kernel.Open(filepath.Join(state, "kernels"), h.p.Cache),
	})
	all = slices.DeleteFunc(all, func(c capability.Capability) bool { return c.Name() == "network" })
	h.Engine = New(Config{
		Store: h.store, Paths: h.p, Drivers: []vmm.Driver{qemu.New(qemu.Options{})}, Capabilities: all, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Limits: vm.Limits{CPUs: 2, MemoryBytes: 4 << 30, VMMs: []string{"qemu"}},
	})
	t.Cleanup(func() {
		_ = h.Delete(context.Background(), "web", true, nil)
		h.close()
	})
	return h
}

// shell runs a script in the guest and returns what it wrote.
func (h *house) shell(ctx context.Context, script string) string {
	h.t.Helper()
	agent, err := h.Agent(ctx, "web")
	if err != nil {
		h.t.Fatal(err)
	}
	stream, err := agent.Exec(ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	defer stream.CloseResponse()
	start := &agentv1.ExecStart{Argv: []string{"sh", "-c", script}}
	err = stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: start}})
	if err := errors.Join(err, stream.CloseRequest()); err != nil {
		h.t.Fatal(err)
	}
	var out strings.Builder
	for {
		answer, err := stream.Receive()
		if err != nil {
			h.t.Fatalf("%s: %v", script, err)
		}
		out.Write(answer.GetStdout())
		if e := answer.GetExited(); e != nil {
			if e.GetCode() != 0 {
				h.t.Fatalf("%s: code %d %s", script, e.GetCode(), e.GetError())
			}
			return out.String()
		}
	}
}
