package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/vmm/fakeguest"
)

// withNames lets the daemon serve names on any free port.
func (p place) withNames(t *testing.T, listen string) {
	t.Helper()
	if err := os.WriteFile(p.ConfigFile(), []byte("[dns]\nlisten = \""+listen+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// served waits until names are served, or until it is said why not.
func (p place) served(t *testing.T, c *client.Client) *bangerv1.DNSStatus {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		s, err := c.Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if s.GetDns().GetListener() != "" || s.GetDns().GetProblem() != "" {
			return s.GetDns()
		}
		if time.Now().After(deadline) {
			t.Fatal("names are not served")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// address asks the daemon for a name; "" when there is none.
func address(t *testing.T, s *bangerv1.DNSStatus, name string) string {
	t.Helper()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, s.GetListener())
	}}
	found, err := r.LookupNetIP(t.Context(), "ip4", name)
	var missing *net.DNSError
	if errors.As(err, &missing) && missing.IsNotFound {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return found[0].String()
}

func TestNamesFollowTheVMs(t *testing.T) {
	p := newPlace(t)
	p.withNames(t, "127.0.0.1:0")
	c := p.dial(t)
	web := p.create(t, c, "web")
	s := p.served(t, c)
	if got := address(t, s, "web.vm."); got != web.GetIp() || s.GetRecords() != 1 {
		t.Errorf("web.vm is %q, of %v", got, s)
	}
	p.end(t, syscall.SIGKILL)
	c = p.dial(t)
	s = p.served(t, c)
	if got := address(t, s, "web.vm."); got != web.GetIp() {
		t.Errorf("after the daemon's death web.vm is %q", got)
	}
	if _, err := c.Suspend(t.Context(), &bangerv1.SuspendVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := address(t, s, "web.vm."); got != "" {
		t.Errorf("suspended, web.vm is %q", got)
	}
	if _, err := c.Start(t.Context(), &bangerv1.StartVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := address(t, s, "web.vm."); got != web.GetIp() {
		t.Errorf("resumed, web.vm is %q", got)
	}
	if _, err := c.Stop(t.Context(), &bangerv1.StopVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := address(t, s, "web.vm."); got != "" {
		t.Errorf("stopped, web.vm is %q", got)
	}
	if _, err := c.Start(t.Context(), &bangerv1.StartVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := address(t, s, "web.vm."); got != web.GetIp() {
		t.Errorf("started again, web.vm is %q", got)
	}
	if err := c.Delete(t.Context(), &bangerv1.DeleteVMRequest{Vm: "web", Force: true}, nil); err != nil {
		t.Fatal(err)
	}
	if got := address(t, s, "web.vm."); got != "" || p.served(t, c).GetRecords() != 0 {
		t.Errorf("deleted, web.vm is %q", got)
	}
}

// A port that somebody else has is told, keeps nothing else from working, and is used once it is free.
func TestTakenDNSPort(t *testing.T) {
	l, _ := hostPort(t)
	defer l.Close()
	p := newPlace(t)
	p.withNames(t, l.Addr().String())
	c := p.dial(t)
	p.create(t, c, "web")
	if s := p.served(t, c); !strings.Contains(s.GetProblem(), l.Addr().String()) || s.GetRecords() != 1 {
		t.Errorf("status %v", s)
	}
	l.Close()
	deadline := time.Now().Add(2*listenPause + 10*time.Second)
	for p.served(t, c).GetListener() == "" && time.Now().Before(deadline) {
		time.Sleep(100 * time.Millisecond)
	}
	if s := p.served(t, c); s.GetListener() != l.Addr().String() || s.GetProblem() != "" {
		t.Errorf("once it is free: %v", s)
	}
}

func TestConfigOfNames(t *testing.T) {
	for text, ok := range map[string]bool{
		`"127.0.0.1:5353"`: true, `"[::1]:53"`: true, `""`: true, `"127.0.0.1:0"`: true,
		`"0.0.0.0:53"`: false, `"192.168.1.1:53"`: false, `"localhost:53"`: false, `"53"`: false, `"127.0.0.1"`: false,
	} {
		if _, err := load(t, "[dns]\nlisten = "+text+"\n"); ok != (err == nil) || !ok && fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// hostPort takes a port of this host that is free again once its listener is closed.
func hostPort(t *testing.T) (net.Listener, int32) {
	t.Helper()
	port := hosttest.Port(t)
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	return l, int32(port)
}

// echoed sends a text to a port of this host and returns what comes back.
func echoed(t *testing.T, port int32, text string) string {
	t.Helper()
	conn, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write([]byte(text)); err != nil {
		return err.Error()
	}
	if err := conn.CloseWrite(); err != nil {
		return err.Error()
	}
	got, err := io.ReadAll(conn)
	if err != nil {
		return err.Error()
	}
	return string(got)
}

func TestForwardedPorts(t *testing.T) {
	p := newPlace(t)
	p.withNames(t, "")
	c := p.dial(t)
	held, port := hostPort(t)
	request := spec("web")
	forward := &bangerv1.PortForward{HostPort: port, GuestPort: fakeguest.EchoPort}
	request.Spec.Ports = []*bangerv1.PortForward{forward}
	_, err := c.Create(t.Context(), request, nil)
	if fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("with a taken port: %v", err)
	}
	p.nothing(t, c)
	held.Close()
	if _, err := c.Create(t.Context(), request, nil); err != nil {
		t.Fatal(err)
	}
	if got := echoed(t, port, "hello"); got != "hello" {
		t.Errorf("got %q", got)
	}
	p.end(t, syscall.SIGKILL)
	c = p.dial(t)
	if _, err := c.Network.ListPorts(t.Context(), &bangerv1.ListPortsRequest{}); err != nil { // once it has looked after its VMs
		t.Fatal(err)
	}
	if got := echoed(t, port, "again"); got != "again" {
		t.Errorf("after the daemon's death: %q", got)
	}
	t.Run("add and remove", func(t *testing.T) { addAndRemovePorts(t, c, port) })
	if _, err := c.Stop(t.Context(), &bangerv1.StopVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := echoed(t, port, "x"); !strings.Contains(got, "refused") {
		t.Errorf("stopped: %q", got)
	}
	if v := p.get(t, c, "web"); len(v.GetPorts()) != 1 || v.GetPorts()[0].GetHostAddress() != "127.0.0.1" {
		t.Errorf("a stopped VM keeps %v", v.GetPorts())
	}
}

func addAndRemovePorts(t *testing.T, c *client.Client, first int32) {
	held, second := hostPort(t)
	add := func(port int32) error {
		_, err := c.Network.AddPorts(t.Context(), &bangerv1.AddPortsRequest{Vm: "web", Ports: []*bangerv1.PortForward{{HostPort: port, GuestPort: fakeguest.EchoPort}}})
		return err
	}
	if err := add(second); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a taken port: %v", err)
	}
	held.Close()
	for range 2 { // asking for what holds succeeds
		if err := add(second); err != nil {
			t.Fatal(err)
		}
	}
	if got := echoed(t, second, "x"); got != "x" {
		t.Errorf("added: %q", got)
	}
	list, err := c.Network.ListPorts(t.Context(), &bangerv1.ListPortsRequest{Vm: "web"})
	if err != nil || len(list.GetPorts()) != 2 || !list.GetPorts()[0].GetListening() || !list.GetPorts()[1].GetListening() {
		t.Errorf("listed %v, %v", list, err)
	}
	remove := func(port int32) error {
		_, err := c.Network.RemovePorts(t.Context(), &bangerv1.RemovePortsRequest{Vm: "web", Ports: []*bangerv1.PortForward{{HostPort: port}}})
		return err
	}
	if err := remove(second); err != nil {
		t.Fatal(err)
	}
	if err := remove(second); fault.KindOf(err) != fault.NotFound {
		t.Errorf("removed twice: %v", err)
	}
	if got := echoed(t, second, "x"); !strings.Contains(got, "refused") {
		t.Errorf("removed: %q", got)
	}
	if got := echoed(t, first, "x"); got != "x" {
		t.Errorf("the other: %q", got)
	}
	for _, bad := range []*bangerv1.PortForward{{}, {HostPort: 70000, GuestPort: 1}, {HostPort: 1}, {HostAddress: "x", HostPort: 1, GuestPort: 1}} {
		_, err := c.Network.AddPorts(t.Context(), &bangerv1.AddPortsRequest{Vm: "web", Ports: []*bangerv1.PortForward{bad}})
		if fault.KindOf(err) != fault.Usage {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// A fork gets none of its source's ports: each leads to one VM.
func TestClonesHaveNoPorts(t *testing.T) {
	p := newPlace(t)
	p.withNames(t, "")
	c := p.dial(t)
	held, port := hostPort(t)
	held.Close()
	request := spec("web")
	request.NoStart = true
	request.Spec.Ports = []*bangerv1.PortForward{{HostPort: port, GuestPort: fakeguest.EchoPort}}
	if _, err := c.Create(t.Context(), request, nil); err != nil {
		t.Fatal(err)
	}
	made, err := c.Clone(t.Context(), &bangerv1.CloneVMRequest{Vm: "web"}, nil)
	if err != nil || len(made.GetPorts()) > 0 {
		t.Errorf("the clone has %v, %v", made.GetPorts(), err)
	}
}

// DialVM leads to a port in the guest, over the API alone.
func TestDialVM(t *testing.T) {
	p := newPlace(t)
	p.withNames(t, "")
	c := p.dial(t)
	p.create(t, c, "web")
	open := func(vm string, port int32) ([]byte, error) {
		stream, err := c.Network.DialVM(t.Context())
		if err != nil {
			return nil, err
		}
		defer stream.CloseResponse()
		for _, r := range []*bangerv1.DialVMRequest{
			{Input: &bangerv1.DialVMRequest_Start{Start: &bangerv1.DialVMStart{Vm: vm, Port: port}}},
			{Input: &bangerv1.DialVMRequest_Data{Data: []byte("hello")}},
			{Input: &bangerv1.DialVMRequest_Eof{Eof: true}},
		} {
			if err := stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
				return nil, err
			}
		}
		var got []byte
		for {
			r, err := stream.Receive()
			if errors.Is(err, io.EOF) {
				return got, stream.CloseRequest()
			}
			if err != nil {
				return got, errors.Join(err, stream.CloseRequest())
			}
			got = append(got, r.GetData()...)
			if r.GetEof() {
				return got, stream.CloseRequest()
			}
		}
	}
	if got, err := open("web", fakeguest.EchoPort); err != nil || string(got) != "hello" {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := open("web", 22); err != nil || !strings.HasPrefix(string(got), "SSH-") {
		t.Errorf("got %q, %v", got, err)
	}
	for _, c := range []struct {
		vm   string
		port int32
		kind fault.Kind
	}{{"web", 9, fault.Conflict}, {"nobody", 22, fault.NotFound}, {"web", 0, fault.Usage}, {"", 22, fault.Usage}, {"web", 70000, fault.Usage}} {
		if _, err := open(c.vm, c.port); fault.KindOf(err) != c.kind {
			t.Errorf("%q port %d: %v, want %s", c.vm, c.port, err, c.kind)
		}
	}
}
