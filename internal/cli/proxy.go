package cli

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

const (
	proxyLimit    = 2 * time.Minute // until the guest's service is there, a boot in software emulation included
	proxyPause    = 200 * time.Millisecond
	bridgeTimeout = time.Second // for a connection over the bridge: the guest's kernel answers at once
	proxyChunk    = 32 << 10
)

// newProxyCommand is what ssh starts as ProxyCommand: stdin and stdout are the connection.
func newProxyCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "proxy NAME PORT", Short: "Connect stdin and stdout with a port inside a VM",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usage(cmd, "a name and a port are wanted")
			}
			return noneEmpty(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error { return runProxy(cmd.Context(), args[0], args[1], e) },
	}
}

// runProxy waits for a VM that starts, and for a service that is not there yet: who has just made a VM enters it next.
func runProxy(ctx context.Context, host, port string, e *Env) error {
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 {
		return fault.New(fault.Usage, "%q is no port", port)
	}
	name := strings.TrimSuffix(strings.ToLower(host), ".vm")
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	conn, err := e.reach(ctx, c, name, uint16(number))
	if err != nil {
		return err
	}
	defer conn.Close()
	return e.pump(ctx, conn)
}

// pipe is a connection to the guest, over whatever way.
type pipe interface {
	io.ReadWriteCloser
	CloseWrite() error
}

func (e *Env) reach(ctx context.Context, c *client.Client, name string, port uint16) (pipe, error) {
	limit := proxyLimit
	if e.timeout > 0 {
		limit = e.timeout
	}
	begin := time.Now()
	told := false
	for {
		conn, err := e.dialVM(ctx, c, name, port)
		if err == nil || !comes(err) || time.Since(begin) > limit || ctx.Err() != nil {
			return conn, err
		}
		if !told && time.Since(begin) > sshPatience {
			told = true
			e.notice("waiting for port " + strconv.Itoa(int(port)) + " of VM " + name)
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(proxyPause):
		}
	}
}

// errStarts says that a VM is on its way.
var errStarts = errors.New("the VM starts")

// comes tells whether waiting may help: the VM starts, or its service does not listen yet.
func comes(err error) bool {
	return errors.Is(err, errStarts) || fault.KindOf(err) == fault.Conflict && strings.Contains(err.Error(), "nothing listens") ||
		fault.KindOf(err) == fault.Timeout
}

// dialVM connects over the bridge, which is fast and outlives the daemon, or else over the guest channel, which also
// works without a network, and then says so. A port that refuses is no failure of the bridge: the guest may show it to
// its localhost alone.
func (e *Env) dialVM(ctx context.Context, c *client.Client, name string, port uint16) (pipe, error) {
	res, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: name})
	if err != nil {
		return nil, err
	}
	v := res.GetVm()
	if v.GetState() == "starting" || v.GetState() == "resuming" {
		return nil, errStarts
	}
	if ip, err := netip.ParseAddr(v.GetIp()); err == nil && v.GetState() == "running" && v.GetAccelerator() != "fake" {
		conn, err := (&net.Dialer{Timeout: bridgeTimeout}).DialContext(ctx, "tcp", netip.AddrPortFrom(ip, port).String())
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			channel, channelErr := dialChannel(ctx, c, name, port)
			if channelErr == nil {
				e.notice("VM " + name + " is not reached over the bridge (" + err.Error() + "): the slower guest channel is used")
			}
			return channel, channelErr
		}
	}
	return dialChannel(ctx, c, name, port)
}

// channelConn is a connection over the guest channel.
type channelConn struct {
	stream *connect.BidiStreamForClientSimple[bangerv1.DialVMRequest, bangerv1.DialVMResponse]
	cancel context.CancelFunc
	rest   []byte
	eof    bool
}

func dialChannel(ctx context.Context, c *client.Client, name string, port uint16) (pipe, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.Network.DialVM(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	conn := &channelConn{stream: stream, cancel: cancel}
	err = stream.Send(&bangerv1.DialVMRequest{Input: &bangerv1.DialVMRequest_Start{Start: &bangerv1.DialVMStart{Vm: name, Port: int32(port)}}})
	if err == nil || errors.Is(err, io.EOF) { // then Receive tells why
		_, err = stream.Receive()
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func (c *channelConn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.eof {
			return 0, io.EOF
		}
		r, err := c.stream.Receive()
		if err != nil {
			return 0, err
		}
		c.rest, c.eof = r.GetData(), r.GetEof()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

func (c *channelConn) Write(p []byte) (int, error) {
	if err := c.stream.Send(&bangerv1.DialVMRequest{Input: &bangerv1.DialVMRequest_Data{Data: p}}); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *channelConn) CloseWrite() error {
	return c.stream.Send(&bangerv1.DialVMRequest{Input: &bangerv1.DialVMRequest_Eof{Eof: true}})
}

func (c *channelConn) Close() error {
	c.cancel()
	return errors.Join(c.stream.CloseRequest(), c.stream.CloseResponse())
}

// pump copies between our streams and the connection until the guest's side has ended. What we read may never end: ssh
// kills its ProxyCommand, and others wait for our own end.
func (e *Env) pump(ctx context.Context, conn pipe) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{conn}, struct{ io.Reader }{e.Stdin}, make([]byte, proxyChunk))
		if err == nil {
			err = conn.CloseWrite()
		}
		if err != nil {
			_ = conn.Close()
		}
	}()
	_, err := io.CopyBuffer(struct{ io.Writer }{e.Stdout}, struct{ io.Reader }{conn}, make([]byte, proxyChunk))
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
