package hostnet

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/vm"
)

// state is what the client knows of VMs and devices. Its lock is never held while the helper is asked.
type state struct {
	mu      sync.Mutex
	guests  map[vm.ID]Guest // attached
	ready   []string        // TAP devices that wait
	settled bool
	notices map[string][]string // by what they are about
	opened  []string
}

// Status is what there is of the host's network.
type Status struct {
	Ready   int      // TAP devices that wait for a VM
	Wanted  int      // how many are to wait
	Notices []string // what is not as it should be, sorted
	Opened  []string // chains of other firewalls in which VMs' packets are accepted
}

// Status tells what was last seen; it asks nobody.
func (c *Client) Status() Status {
	s := &c.state
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{Ready: len(s.ready), Wanted: c.o.Pool, Opened: slices.Clone(s.opened)}
	for _, topic := range slices.Sorted(maps.Keys(s.notices)) {
		st.Notices = append(st.Notices, s.notices[topic]...)
	}
	return st
}

func (s *state) note(topic string, notices []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notices[topic] = notices
}

// Attach gives a VM a device and its rules; see Network.
func (c *Client) Attach(ctx context.Context, id vm.ID, g Guest) (tap string, err error) {
	before, had := c.state.get(id)
	if had {
		g.TAP = before.TAP
	}
	fresh := g.TAP == ""
	if fresh {
		if g.TAP, err = c.takeTAP(ctx); err != nil {
			return "", err
		}
	}
	c.state.put(id, g)
	if err := c.sync(ctx); err != nil {
		if had {
			c.state.put(id, before)
		} else {
			c.state.drop(id)
		}
		if fresh {
			err = errors.Join(err, c.giveTAP(context.WithoutCancel(ctx), g.TAP))
		}
		return "", err
	}
	return g.TAP, nil
}

// Detach takes a VM's device and rules back.
func (c *Client) Detach(ctx context.Context, id vm.ID) error {
	g, ok := c.state.drop(id)
	if !ok {
		return nil
	}
	if err := c.sync(ctx); err != nil {
		c.state.put(id, g) // so that it is tried again
		return err
	}
	if !c.state.isSettled() {
		return nil // Settle finds the device
	}
	if err := c.giveTAP(ctx, g.TAP); err != nil {
		c.state.put(id, g)
		return err
	}
	return nil
}

// Settle learns what an earlier daemon left; see Network.
func (c *Client) Settle(ctx context.Context, attached map[vm.ID]Guest) (removed []string, err error) {
	c.state.mu.Lock()
	maps.Copy(c.state.guests, attached)
	used := map[string]bool{}
	for _, g := range c.state.guests {
		used[g.TAP] = true
	}
	c.state.settled = true // also when the rest fails: later rules are those of all VMs we know
	c.state.mu.Unlock()
	defer c.fill.wake()

	taps, err := c.listTAPs(ctx)
	if err != nil {
		return nil, err
	}
	errs := []error{c.sync(ctx)}
	for _, tap := range taps {
		if used[tap] {
			continue
		}
		if strings.HasPrefix(tap, paths.PoolPrefix) && c.keep(tap) || c.inUse(tap) {
			continue // a process that we do not know holds it: better a device too many
		}
		if err := c.deleteTAP(ctx, tap); err != nil {
			errs = append(errs, err)
		} else if !strings.HasPrefix(tap, paths.PoolPrefix) {
			removed = append(removed, tap)
		}
	}
	return removed, errors.Join(errs...)
}

// sync makes the host's rules those of all guests we know.
func (c *Client) sync(ctx context.Context) error {
	c.mu.Lock() // before we look: rules that are sent later are newer
	defer c.mu.Unlock()
	rules, settled := c.state.rules(c.o.Policy)
	if !settled {
		return nil
	}
	response, err := c.ask(ctx, Request{Op: OpSetRules, Rules: &rules})
	if err != nil {
		return err
	}
	c.state.tell(response)
	return nil
}

func (s *state) rules(p Policy) (Rules, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := Rules{Policy: p}
	for _, id := range slices.Sorted(maps.Keys(s.guests)) {
		r.Guests = append(r.Guests, s.guests[id])
	}
	return r, s.settled
}

func (s *state) tell(r Response) {
	s.note("rules", r.Notices)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened = r.Opened
}

func (s *state) isSettled() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.settled
}

func (s *state) get(id vm.ID) (Guest, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, ok := s.guests[id]
	return g, ok
}

func (s *state) put(id vm.ID, g Guest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.guests[id] = g
}

func (s *state) drop(id vm.ID) (Guest, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, ok := s.guests[id]
	delete(s.guests, id)
	return g, ok
}

// takeTAP returns a device that waits, or makes one.
func (c *Client) takeTAP(ctx context.Context) (string, error) {
	defer c.fill.wake()
	for {
		tap, ok := c.state.pop()
		if !ok {
			return c.makeTAP(ctx)
		}
		if c.usable(tap) {
			return tap, nil
		}
		c.o.Logger.Warn("a waiting TAP device was changed by somebody: removed", "tap", tap)
		if err := c.deleteTAP(ctx, tap); err != nil {
			return "", err
		}
	}
}

func (s *state) pop() (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.ready)
	if n == 0 {
		return "", false
	}
	tap := s.ready[n-1]
	s.ready = s.ready[:n-1]
	return tap, true
}

// usable tells whether a waiting device is up and on the bridge, and nobody has it open. It asks the kernel for two
// devices, however many there are.
func (c *Client) usable(tap string) bool {
	link, err := c.kernel.LinkByName(tap)
	if err != nil {
		return false
	}
	bridge, err := c.kernel.LinkByName(c.o.Bridge)
	if err != nil {
		return false
	}
	a := link.Attrs()
	return a.MasterIndex == bridge.Attrs().Index && a.Flags&net.FlagUp != 0 && a.RawFlags&iffLowerUp == 0
}

// iffLowerUp is IFF_LOWER_UP (netdevice(7)): of a TAP device, that somebody has it open.
const iffLowerUp = 0x10000

// inUse tells whether somebody has a TAP device open.
func (c *Client) inUse(tap string) bool {
	link, err := c.kernel.LinkByName(tap)
	return err == nil && link.Attrs().RawFlags&iffLowerUp != 0
}

// giveTAP lets a device wait for the next VM when there are too few, and removes it otherwise.
func (c *Client) giveTAP(ctx context.Context, tap string) error {
	if strings.HasPrefix(tap, paths.PoolPrefix) && c.keep(tap) {
		return nil
	}
	return c.deleteTAP(ctx, tap)
}

// keep adds a device to those that wait, when it can be used and there are too few.
func (c *Client) keep(tap string) bool {
	if !c.usable(tap) {
		return false
	}
	s := &c.state
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready) >= c.o.Pool || slices.Contains(s.ready, tap) {
		return false
	}
	s.ready = append(s.ready, tap)
	return true
}

// makeTAP makes a device with a name that nobody on this host has.
func (c *Client) makeTAP(ctx context.Context) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	response, err := c.ask(ctx, Request{Op: OpAddTAP, Owner: os.Getuid()})
	if err != nil {
		return "", err
	}
	if len(response.TAPs) != 1 {
		return "", fault.New(fault.Unexpected, "banger-nethelper made %d TAP devices, not one", len(response.TAPs))
	}
	return response.TAPs[0], nil
}

func (c *Client) deleteTAP(ctx context.Context, name string) error {
	return c.do(ctx, Request{Op: OpDeleteTAP, TAP: name})
}

// listTAPs returns the TAP devices of this instance, sorted.
func (c *Client) listTAPs(ctx context.Context) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	response, err := c.ask(ctx, Request{Op: OpListTAPs})
	if err != nil {
		return nil, err
	}
	slices.Sort(response.TAPs)
	return response.TAPs, nil
}

// Clean removes all of this instance's devices, the bridge and its rules, and puts back what they needed: for a
// host on which no VM of it runs. A device that is in use is a Conflict fault, and nothing is removed.
func (c *Client) Clean(ctx context.Context) (removed []string, err error) {
	c.fill.stop()
	taps, err := c.listTAPs(ctx)
	if err != nil {
		return nil, err
	}
	for _, tap := range taps {
		if c.inUse(tap) {
			return nil, fault.New(fault.Conflict, "TAP device %s is in use: a VM runs", tap).
				WithHint("stop all VMs first: banger daemon stop --all-vms")
		}
	}
	for _, tap := range taps {
		if err := c.deleteTAP(ctx, tap); err != nil {
			return removed, err
		}
		removed = append(removed, "TAP device "+tap)
	}
	_, missing := c.kernel.LinkByName(c.o.Bridge)
	if err := c.RemoveBridge(ctx); err != nil {
		return removed, err
	}
	if missing == nil {
		removed = append(removed, "bridge "+c.o.Bridge)
	}
	return removed, nil
}

// refill makes devices until enough wait. It asks for nothing while there is no bridge, or none is wanted.
func (c *Client) refill(ctx context.Context) {
	for c.lacksTAP() && ctx.Err() == nil {
		tap, err := c.makeTAP(ctx)
		if err == nil && !c.keep(tap) {
			err = c.deleteTAP(ctx, tap)
		}
		if err != nil {
			if ctx.Err() == nil {
				c.o.Logger.Warn("no TAP device was made in advance: VMs wait for theirs", "reason", err)
			}
			return
		}
	}
}

func (c *Client) lacksTAP() bool {
	c.mu.Lock()
	ensured := c.address.IsValid() && !c.closed
	c.mu.Unlock()
	s := &c.state
	s.mu.Lock()
	defer s.mu.Unlock()
	return ensured && s.settled && len(s.ready) < c.o.Pool
}

// filler runs one function in the background each time it is woken.
type filler struct {
	wakes chan struct{}
	end   context.CancelFunc
	done  chan struct{}
}

func (f *filler) start(work func(context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	f.wakes, f.end, f.done = make(chan struct{}, 1), cancel, make(chan struct{})
	go func() {
		defer close(f.done)
		for {
			select {
			case <-ctx.Done():
				return
			case <-f.wakes:
				work(ctx)
			}
		}
	}()
}

// wake makes the work run once more after now.
func (f *filler) wake() {
	select {
	case f.wakes <- struct{}{}:
	default:
	}
}

// stop ends the work and waits for it; a second call does nothing.
func (f *filler) stop() {
	f.end()
	<-f.done
}
