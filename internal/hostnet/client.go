package hostnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/system"
	"banger/internal/vm"
)

const (
	// requestTimeout bounds one request, the helper's start included.
	requestTimeout = 15 * time.Second
	// closeTimeout is how long a helper may take to notice that its socket is closed.
	closeTimeout = 3 * time.Second
)

// Options says which helper to use, and for what.
type Options struct {
	HelperPath string       // of banger-nethelper
	HelperLog  string       // file for what the helper says; it logs each refusal
	Bridge     string       // "" is paths.Bridge
	Subnet     netip.Prefix // zero: keep that of an existing bridge, else the first of Candidates that is free
	Pool       int          // how many TAP devices wait for VMs, once there is a bridge; 0 is none
	Policy     Policy       // for all guests
	Instance   string       // tells one banger of a user from another; see CheckInstance. "" is any
	Logger     *slog.Logger
}

// Client asks banger-nethelper. The helper is started by the first request, and once more when it
// has died; requests go one at a time. It is safe for concurrent use.
type Client struct {
	o      Options
	kernel *netlink.Handle // asks about devices, without any right; it stays in the namespace it was made in

	mu      sync.Mutex // held while the helper is asked
	helper  *helper    // nil while none runs
	closed  bool
	address netip.Prefix // of the bridge, once ensured

	state state
	fill  filler
}

var _ Network = (*Client)(nil)

// helper is a running banger-nethelper.
type helper struct {
	process *system.Process
	conn    net.Conn
}

// Start returns a client. Nothing runs and nothing is changed yet. ctx is not kept.
func Start(_ context.Context, o Options) (*Client, error) {
	if o.Bridge == "" {
		o.Bridge = paths.Bridge
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := errors.Join(CheckBridge(o.Bridge), CheckInstance(o.Instance)); err != nil {
		return nil, err
	}
	if o.Subnet.IsValid() {
		if err := CheckSubnet(o.Subnet); err != nil {
			return nil, err
		}
	}
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("ask the kernel about network devices: %w", err)
	}
	c := &Client{o: o, kernel: kernel, state: state{guests: map[vm.ID]Guest{}, notices: map[string][]string{}}}
	c.fill.start(c.refill)
	return c, nil
}

// Close ends the helper. Bridge, TAP devices and rules stay.
func (c *Client) Close() error {
	c.fill.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.kernel.Close()
	}
	c.closed = true
	return c.drop(false)
}

// Check finds what would make the other requests fail on this machine, such as a missing right, and
// changes nothing.
func (c *Client) Check(ctx context.Context) error {
	return c.do(ctx, Request{Op: OpCheck})
}

// EnsureBridge makes the bridge. Without a configured subnet an existing bridge keeps its own, for
// VMs may be running there; else the first candidate is taken that clashes with no route. A
// configured subnet that clashes is a Conflict fault.
func (c *Client) EnsureBridge(ctx context.Context) (netip.Prefix, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	address, err := c.chooseAddress()
	if err != nil {
		return netip.Prefix{}, err
	}
	if address == c.address && c.bridgeUp() {
		return address, nil
	}
	response, err := c.ask(ctx, Request{Op: OpEnsureBridge, Address: address})
	if err != nil {
		return netip.Prefix{}, err
	}
	c.address = address
	c.state.note("bridge", response.Notices)
	c.fill.wake()
	return address, nil
}

// bridgeUp tells whether the bridge we ensured still is up; its address was just read.
func (c *Client) bridgeUp() bool {
	link, err := c.kernel.LinkByName(c.o.Bridge)
	return err == nil && link.Attrs().Flags&net.FlagUp != 0
}

func (c *Client) chooseAddress() (netip.Prefix, error) {
	current, err := bridgeAddress(c.o.Bridge)
	if err != nil {
		return netip.Prefix{}, err
	}
	if current.IsValid() && (!c.o.Subnet.IsValid() || Gateway(c.o.Subnet) == current) {
		return current, nil
	}
	routes, err := ReadRoutes()
	if err != nil {
		return netip.Prefix{}, err
	}
	if c.o.Subnet.IsValid() {
		if r, clash := Clash(c.o.Subnet, routes, c.o.Bridge); clash {
			return netip.Prefix{}, ClashFault(c.o.Subnet, r)
		}
		return Gateway(c.o.Subnet), nil
	}
	subnet, why, err := PickSubnet(Candidates, routes, c.o.Bridge)
	if err != nil {
		return netip.Prefix{}, err
	}
	if why != "" {
		c.o.Logger.Warn("another subnet was chosen for the VMs", "subnet", subnet.String(), "reason", why)
		c.state.note("subnet", []string{why + ": " + subnet.String() + " was chosen"})
	}
	return Gateway(subnet), nil
}

// RemoveBridge takes away the bridge and its rules, and puts back what they needed. It refuses while there are TAP
// devices on it.
func (c *Client) RemoveBridge(ctx context.Context) error {
	return c.do(ctx, Request{Op: OpRemoveBridge})
}

func (c *Client) do(ctx context.Context, r Request) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.ask(ctx, r)
	return err
}

// ask sends a request and returns the answer. Requests ask for states, so one whose answer was lost
// is simply sent again, once, to a new helper.
func (c *Client) ask(ctx context.Context, r Request) (Response, error) {
	r.Version, r.Bridge, r.Instance = ProtocolVersion, c.o.Bridge, c.o.Instance
	if err := r.Check(); err != nil {
		return Response{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	response, err := c.once(ctx, r)
	if err != nil && ctx.Err() == nil && fault.KindOf(err) == fault.Unexpected {
		c.o.Logger.Warn("banger-nethelper is started again", "request", string(r.Op), "reason", err)
		response, err = c.once(ctx, r)
	}
	if err == nil {
		return response, response.Err()
	}
	if ctx.Err() != nil {
		return Response{}, fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "banger-nethelper did not answer to %s", r.Op)
	}
	if fault.KindOf(err) == fault.Unexpected {
		return Response{}, fault.Wrap(fault.Unexpected, err, "banger-nethelper failed twice at %s", r.Op).
			WithHint("what it said is in %s", c.o.HelperLog)
	}
	return Response{}, err
}

// once sends a request to the helper, started if need be. A helper whose answer was not read to
// the end is of no more use.
func (c *Client) once(ctx context.Context, r Request) (response Response, err error) {
	if c.closed {
		return Response{}, fault.New(fault.Conflict, "the network is closed")
	}
	if c.helper == nil {
		if c.helper, err = startHelper(c.o); err != nil {
			return Response{}, err
		}
	}
	conn := c.helper.conn
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err = WriteMessage(conn, r); err == nil {
		err = ReadMessage(conn, &response)
	}
	if err == nil && response.Sockets > 0 {
		response.files, err = receiveSockets(conn, response.Sockets)
	}
	if err != nil {
		return Response{}, errors.Join(explain(err), c.drop(true))
	}
	return response, nil
}

func explain(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return errors.New("banger-nethelper ended")
	}
	return err
}

// drop closes the helper's socket, on which it ends, and insists when it does not, or at once when it
// is no longer trusted. Killing it loses nothing: what it was at is completed by the next request.
func (c *Client) drop(now bool) error {
	h := c.helper
	if h == nil {
		return nil
	}
	c.helper = nil
	err := h.conn.Close()
	if now || !h.endsWithin(closeTimeout) {
		if e := h.process.Signal(syscall.SIGKILL); !errors.Is(e, os.ErrProcessDone) {
			err = errors.Join(err, e)
		}
		if !h.endsWithin(closeTimeout) {
			err = errors.Join(err, fmt.Errorf("banger-nethelper, process %d, does not end", h.process.PID()))
		}
	}
	return errors.Join(err, h.process.Close())
}

func (h *helper) endsWithin(d time.Duration) bool {
	select {
	case <-h.process.Done():
		return true
	case <-time.After(d):
		return false
	}
}

func startHelper(o Options) (*helper, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "nethelper"), os.NewFile(uintptr(fds[1]), "nethelper")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, fmt.Errorf("use a socketpair: %w", err)
	}
	process, err := system.Start(system.StartOptions{
		Path: o.HelperPath, Env: []string{}, Dir: "/", Log: o.HelperLog, ExtraFiles: []*os.File{theirs},
	})
	if err != nil {
		conn.Close()
		return nil, startFault(o.HelperPath, err)
	}
	return &helper{process, conn}, nil
}

func startFault(path string, err error) error {
	f := fault.Wrap(fault.Precondition, err, "cannot start banger-nethelper")
	if errors.Is(err, os.ErrNotExist) {
		return f.WithHint("build and install it: make install")
	}
	return f.WithHint("%s", GrantHint(path))
}

// GrantHint is the command that gives a helper the right it needs.
func GrantHint(path string) string {
	return "sudo setcap cap_net_admin,cap_net_bind_service+ep " + path
}
