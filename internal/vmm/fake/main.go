package fake

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/serve"
	"banger/internal/channel"
	"banger/internal/vmm"
	"banger/internal/vmm/fakeguest"
)

// Faults that a kernel argument of the machine brings about.
const (
	ArgHangBoot = "fake.hang-boot"  // the guest never answers
	ArgPanic    = "fake.panic"      // the guest panics right after its start
	ArgRefuse   = "fake.refuse"     // the VMM fails before the machine runs
	ArgSlowBoot = "fake.slow-boot=" // a duration until the agent answers
	ArgDieAfter = "fake.die-after=" // a duration until the VMM crashes

	ArgHangQuiesce = "fake.hang-quiesce" // the agent never answers a Quiesce
	ArgFailSave    = "fake.fail-save"    // the VMM cannot save the machine: its disk is full
	ArgSlowSave    = "fake.slow-save="   // a duration that saving takes

	panicLine     = "Kernel panic - not syncing: asked for by " + ArgPanic
	orphanCheck   = 10 * time.Second // how often the process looks whether its directory is still there
	powerButton   = syscall.SIGUSR1
	readyFD       = 4
	exitCrash     = 3
	directoryGone = "the machine's directory is gone"
)

type knobs struct {
	hang, panics, refuse         bool
	hangQuiesce, failSave        bool
	slowBoot, dieAfter, slowSave time.Duration

	// The driver's own.
	restore    string // directory of a saved machine
	memoryFile string
}

func parseKnobs(args []string) (knobs, error) {
	var k knobs
	for _, a := range args {
		var err error
		switch {
		case a == ArgHangBoot:
			k.hang = true
		case a == ArgPanic:
			k.panics = true
		case a == ArgRefuse:
			k.refuse = true
		case a == ArgHangQuiesce:
			k.hangQuiesce = true
		case a == ArgFailSave:
			k.failSave = true
		case strings.HasPrefix(a, argRestore):
			k.restore = strings.TrimPrefix(a, argRestore)
		case strings.HasPrefix(a, argMemoryFile):
			k.memoryFile = strings.TrimPrefix(a, argMemoryFile)
		case strings.HasPrefix(a, ArgSlowSave):
			k.slowSave, err = time.ParseDuration(strings.TrimPrefix(a, ArgSlowSave))
		case strings.HasPrefix(a, ArgSlowBoot):
			k.slowBoot, err = time.ParseDuration(strings.TrimPrefix(a, ArgSlowBoot))
		case strings.HasPrefix(a, ArgDieAfter):
			k.dieAfter, err = time.ParseDuration(strings.TrimPrefix(a, ArgDieAfter))
		}
		if err != nil {
			return k, fmt.Errorf("kernel argument %s: %w", a, err)
		}
	}
	return k, nil
}

// Main is a fake machine's process: args are the name and the kernel arguments, the working
// directory is the machine's own. It returns the exit code.
func Main(args []string) int {
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "fake machine: no name given")
		return 2
	}
	k, err := parseKnobs(args[1:])
	if err == nil && k.refuse {
		err = errors.New("refused, as " + ArgRefuse + " asks")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fake machine:", err)
		return 1
	}
	m := &guestMachine{
		name: args[0], knobs: k, end: make(chan ending, 1), signals: make(chan os.Signal, 4), clock: fakeguest.NewClock(),
	}
	signal.Notify(m.signals, syscall.SIGTERM, syscall.SIGINT, powerButton)
	if err := m.boot(args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fake machine:", err)
		return 1
	}
	return m.wait()
}

// ending is how a machine ends: with a word of the guest, or with an exit code alone.
type ending struct {
	exit vmm.Exit
	code int
}

type guestMachine struct {
	name    string
	knobs   knobs
	end     chan ending
	signals chan os.Signal
	serial  *os.File
	clock   *fakeguest.Clock
	memory  *fakeguest.Memory
}

func (m *guestMachine) boot(cmdline []string) error {
	serial, err := os.OpenFile(vmm.SerialLog, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	m.serial = serial
	if err := m.load(cmdline); err != nil {
		return err
	}
	l, err := listen(vmm.GuestSocket)
	if err != nil {
		return err
	}
	control, err := listen(controlSocket)
	if err != nil {
		return err
	}
	go m.serveControl(control)
	go m.guest(newPort(l, m.clock))
	ready := os.NewFile(readyFD, "ready")
	_, err = ready.Write([]byte{1})
	return errors.Join(err, ready.Close())
}

func listen(name string) (net.Listener, error) {
	l, err := net.Listen("unix", name)
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(name, 0o600)
}

// load fills the memory: that of a new boot, or what was saved.
func (m *guestMachine) load(cmdline []string) error {
	if m.knobs.restore == "" {
		fmt.Fprintf(m.serial, "[    0.000000] Linux version fake\n[    0.000000] Command line: %s\n", strings.Join(cmdline, " "))
		memory, err := fakeguest.NewMemory(m.name, cmdline)
		if err == nil && m.knobs.memoryFile != "" {
			err = os.WriteFile(m.knobs.memoryFile, nil, 0o600)
		}
		m.memory = memory
		return err
	}
	memory, err := readMemory(m.knobs.restore)
	if err != nil {
		return err
	}
	m.memory = memory
	// What the kernel was started with is in the memory; the guest has booted long ago.
	m.knobs, err = parseKnobs(memory.Cmdline)
	m.knobs.memoryFile, m.knobs.slowBoot, m.knobs.dieAfter = "", 0, 0
	m.clock.Set(true) // until the driver lets it run
	return err
}

// guest is what happens inside.
func (m *guestMachine) guest(p io.ReadWriteCloser) {
	if m.knobs.dieAfter > 0 {
		time.AfterFunc(m.knobs.dieAfter, func() { m.finish(ending{code: exitCrash}) })
	}
	if m.knobs.panics {
		fmt.Fprintln(m.serial, "[    0.100000] "+panicLine)
		m.finish(ending{exit: vmm.Exit{Kind: vmm.ExitPanic, Detail: panicLine}})
		return
	}
	if m.knobs.hang {
		return
	}
	time.Sleep(m.knobs.slowBoot)
	fmt.Fprintf(m.serial, "[    0.200000] Run /init as init process\n%s login: \n", m.memory.Name())
	ctx, agent := context.Background(), serve.New(fakeguest.Agent(m.memory, m.shutdown, m.knobs.hangQuiesce))
	if err := serve.Serve(ctx, channel.Listen(p, serve.Words(ctx, agent)), agent); err != nil {
		fmt.Fprintln(m.serial, "agent:", err)
	}
}

// shutdown ends the machine a little later, so that the answer still gets out.
func (m *guestMachine) shutdown(mode agentv1.ShutdownRequest_Mode) {
	exit := vmm.Exit{Kind: vmm.ExitPowerOff, Detail: "reboot: Power down"}
	if mode == agentv1.ShutdownRequest_MODE_REBOOT {
		exit = vmm.Exit{Kind: vmm.ExitReboot, Detail: "reboot: Restarting system"}
	}
	fmt.Fprintln(m.serial, exit.Detail)
	time.AfterFunc(20*time.Millisecond, func() { m.finish(ending{exit: exit}) })
}

// finish gives the first ending to wait; later ones are lost, as a machine ends once.
func (m *guestMachine) finish(e ending) {
	select {
	case m.end <- e:
	default:
	}
}

// wait returns when the machine ends.
func (m *guestMachine) wait() int {
	orphan := time.NewTicker(orphanCheck)
	defer orphan.Stop()
	for {
		select {
		case s := <-m.signals:
			if s != powerButton {
				return 0
			}
			if !m.knobs.hang {
				m.shutdown(agentv1.ShutdownRequest_MODE_POWEROFF)
			}
		case <-orphan.C:
			if _, err := os.Stat(vmm.SerialLog); err != nil {
				fmt.Fprintln(os.Stderr, "fake machine:", directoryGone)
				return exitCrash
			}
		case e := <-m.end:
			return m.leave(e)
		}
	}
}

func (m *guestMachine) leave(e ending) int {
	if e.exit.Kind == "" {
		return e.code
	}
	text, err := json.Marshal(e.exit)
	if err == nil {
		err = os.WriteFile(exitFile, text, 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "fake machine:", err)
		return exitCrash
	}
	return 0
}

// port is what a virtio-serial port is to a guest: a pipe whose other end comes and goes. One host
// at a time is connected; the next one waits. Reading waits for a host; what is written without
// one is lost.
type port struct {
	l     net.Listener
	clock *fakeguest.Clock
	mu    sync.Mutex
	conn  net.Conn
}

func newPort(l net.Listener, c *fakeguest.Clock) *port { return &port{l: l, clock: c} }

func (p *port) current() net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.conn
}

func (p *port) Read(b []byte) (int, error) {
	for {
		c := p.current()
		if c == nil {
			next, err := p.l.Accept()
			if err != nil {
				return 0, err
			}
			p.mu.Lock()
			p.conn = next
			p.mu.Unlock()
			continue
		}
		n, err := c.Read(b)
		p.clock.Wait() // a paused guest sees nothing
		if n > 0 || err == nil {
			return n, nil
		}
		p.drop(c)
	}
}

func (p *port) Write(b []byte) (int, error) {
	p.clock.Wait()
	if c := p.current(); c != nil {
		if _, err := c.Write(b); err != nil {
			p.drop(c)
		}
	}
	return len(b), nil
}

func (p *port) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conn == c {
		p.conn = nil
	}
	_ = c.Close()
}

func (p *port) Close() error {
	if c := p.current(); c != nil {
		p.drop(c)
	}
	return p.l.Close()
}
