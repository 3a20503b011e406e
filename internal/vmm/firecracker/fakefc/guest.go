package fakefc

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/serve"
	"banger/internal/vmm/fakeguest"
)

// AgentPort is the vsock port that the guest's agent listens on.
const AgentPort = 1024

// What a kernel argument of the guest brings about.
const (
	ArgHangBoot    = "fakefc.hang-boot"    // the guest's driver never comes up: connections hear nothing
	ArgPanic       = "fakefc.panic"        // the kernel panics right after its start
	ArgTripleFault = "fakefc.triple-fault" // the processor gives up
	ArgLostFault   = "fakefc.lost-fault"   // the same, and the process ends as if all were well
	ArgSlowBoot    = "fakefc.slow-boot="   // a duration until the agent listens; the driver is up after half of it
	ArgDieAfter    = "fakefc.die-after="   // a duration until the VMM dies of a SIGSEGV, which it catches
	ArgHangQuiesce = "fakefc.hang-quiesce" // the agent never answers a Quiesce
	ArgDeaf        = "fakefc.deaf"         // the guest does not heed Ctrl-Alt-Del

	panicLine = "Kernel panic - not syncing: asked for by " + ArgPanic
)

// endSoon is the time between what ends a guest and its end, so that answers still get out. A panicking kernel waits as
// long, instead of the seconds that panic= says.
const endSoon = 20 * time.Millisecond

// guest is what runs inside. Its kernel and disks are not looked into; its agent is the guest's own service.
type guest struct {
	m       *machine
	args    []string
	clock   *fakeguest.Clock
	memory  *fakeguest.Memory
	agent   *port
	console io.Writer
	ready   atomic.Bool // the agent listens
	saved   bool        // and has not run since

	mu     sync.Mutex
	halted bool // powered off, while its process lives on
}

func newGuest(m *machine, args []string) (*guest, error) {
	memory, err := fakeguest.NewMemory("localhost", args)
	if err != nil {
		return nil, err
	}
	return guestOf(m, memory), nil
}

// guestOf is a guest with that memory.
func guestOf(m *machine, memory *fakeguest.Memory) *guest {
	g := &guest{m: m, args: memory.Cmdline, memory: memory, clock: fakeguest.NewClock(), agent: newPort(), console: io.Discard}
	// A kernel that is told of no console writes to none, and one without serial ports has none.
	if slices.ContainsFunc(g.args, func(a string) bool { return a == "console=ttyS0" || strings.HasPrefix(a, "console=ttyS0,") }) &&
		!slices.Contains(g.args, "8250.nr_uarts=0") {
		g.console = m.serial
	}
	return g
}

func (g *guest) printf(format string, args ...any) {
	g.clock.Wait()
	fmt.Fprintf(g.console, format+"\r\n", args...)
}

func (g *guest) has(arg string) bool { return slices.Contains(g.args, arg) }

// duration is the value of an argument; 0 when it is not there or none.
func (g *guest) duration(arg string) time.Duration {
	for _, a := range g.args {
		if value, ok := strings.CutPrefix(a, arg); ok {
			d, _ := time.ParseDuration(value)
			return d
		}
	}
	return 0
}

// boot starts the guest, and returns at once.
func (g *guest) boot() {
	if d := g.duration(ArgDieAfter); d > 0 {
		time.AfterFunc(d, func() { g.m.exit(exitSegfault) })
	}
	go func() {
		g.printf("[    0.000000] Linux version fake")
		g.printf("[    0.000000] Command line: %s", strings.Join(g.args, " "))
		switch {
		case g.has(ArgTripleFault), g.has(ArgLostFault):
			g.tripleFault()
			return
		case g.has(ArgHangBoot):
			return
		case g.has(ArgPanic):
			g.panics(panicLine)
			return
		}
		if why := g.m.unbootable(g.args); why != "" {
			g.panics("Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0): " + why)
			return
		}
		slow := g.duration(ArgSlowBoot) / 2
		time.Sleep(slow)
		g.m.vsock.activate(g)
		time.Sleep(slow)
		g.printf("[    0.200000] Run /init as init process")
		g.run()
	}()
}

// tripleFault ends the process with code 1 as a rule. Of 1.16.1 it was seen that the code is 0 about every third time:
// the main thread looks for the processor's error before its thread has told of it. Only the log knows then.
func (g *guest) tripleFault() {
	g.m.log.printf("fc_vcpu 0", "Received KVM_EXIT_INTERNAL_ERROR signal")
	if g.has(ArgLostFault) {
		g.m.exit(exitOK)
		return
	}
	g.m.exit(exitGeneric)
}

// unbootable finds what keeps a distribution's kernel, whose drivers are modules, from its disks.
func (m *machine) unbootable(args []string) string {
	switch {
	case slices.Contains(args, "nomodule"):
		return "no modules (nomodule)"
	case m.pci && slices.Contains(args, "pci=off"):
		return "no PCI (pci=off)"
	case slices.Contains(args, "acpi=off") && !m.pci:
		return "no virtio devices (acpi=off)"
	}
	return ""
}

// panics ends the process in good order when the kernel was told to reboot then, and never without.
func (g *guest) panics(line string) {
	g.printf("[    0.100000] %s", line)
	for _, a := range g.args {
		if value, ok := strings.CutPrefix(a, "panic="); ok && value != "0" {
			g.printf("[    0.100000] Rebooting in %s seconds..", value)
			time.AfterFunc(endSoon, func() { g.m.exit(exitOK) })
			return
		}
	}
}

// run is the agent.
func (g *guest) run() {
	g.ready.Store(true)
	g.printf("%s login: ", g.memory.Name())
	handler := serve.New(fakeguest.Agent(g.memory, g.shutdown, g.has(ArgHangQuiesce)))
	if err := serve.Serve(context.Background(), g.agent, handler); err != nil {
		g.printf("agent: %v", err)
	}
}

// up tells whether the guest's programs run.
func (g *guest) up() bool { return g.ready.Load() }

// shutdown is the end of the guest. There is no ACPI: a guest that powers off halts, and the VMM lives on; a reboot
// ends it.
func (g *guest) shutdown(mode agentv1.ShutdownRequest_Mode) {
	time.AfterFunc(endSoon, func() {
		if mode == agentv1.ShutdownRequest_MODE_REBOOT {
			g.printf("[    1.000000] reboot: Restarting system")
			g.m.exit(exitOK)
			return
		}
		g.printf("[    1.000000] reboot: Power down")
		g.mu.Lock()
		defer g.mu.Unlock()
		g.halted = true
		g.clock.Set(true)
	})
}

// ctrlAltDel is a key press: an init that heeds it reboots.
func (g *guest) ctrlAltDel() {
	if g.up() && !g.has(ArgDeaf) {
		g.shutdown(agentv1.ShutdownRequest_MODE_REBOOT)
	}
}

// resume lets it go on, unless it has halted.
func (g *guest) resume() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.halted {
		g.clock.Set(false)
	}
}
