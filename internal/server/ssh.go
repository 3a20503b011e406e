package server

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	agentv1 "banger/api/agent/v1"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/vm"
)

// Limits of the wait for an SSH server.
const (
	sshWait      = 3 * time.Minute        // for a request without a deadline
	sshAttempt   = 2 * time.Second        // one connection and its banner
	sshLook      = 300 * time.Millisecond // the agent's look for the server: others have to ask it, too
	sshPause     = 100 * time.Millisecond // between two attempts
	sshPort      = 22
	replyReserve = time.Second // kept of the deadline to tell the client what was wrong
)

// GetSSHEndpoint tells how to reach a VM by SSH and, on request, waits until its server answers.
func (s vmService) GetSSHEndpoint(ctx context.Context, req *bangerv1.GetSSHEndpointRequest) (*bangerv1.GetSSHEndpointResponse, error) {
	ctx, cancel := sshDeadline(ctx)
	defer cancel()
	v, err := s.running(ctx, req.GetVm(), req.GetWait())
	if err != nil {
		return nil, err
	}
	if req.GetWait() {
		if err := s.awaitSSH(ctx, v); err != nil {
			return nil, err
		}
	}
	return &bangerv1.GetSSHEndpointResponse{Endpoint: &bangerv1.SSHEndpoint{
		User: "root", Host: v.IP.String(), Port: sshPort, IdentityFile: s.Paths.SSHKey(),
		KnownHostsFile: s.Paths.KnownHosts(), HostKeyAlias: v.DNSName(),
	}}, nil
}

// sshDeadline ends a little before the client's own deadline.
func sshDeadline(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithTimeout(ctx, sshWait)
	}
	return context.WithDeadline(ctx, deadline.Add(-min(replyReserve, time.Until(deadline)/4)))
}

// running returns a VM that runs; with wait, it waits for one that starts.
func (s *service) running(ctx context.Context, ref string, wait bool) (vm.VM, error) {
	for {
		v, err := s.get(ctx, ref)
		if err != nil {
			return v, err
		}
		switch {
		case v.State == vm.Running && v.IP.IsValid():
			return v, nil
		case v.State == vm.Running:
			return v, fault.New(fault.Conflict, "VM %s has no address", v.Spec.Name).
				WithHint("banger vm exec %s works without a network", v.Spec.Name)
		case v.State != vm.Starting && v.State != vm.Resuming || !wait:
			return v, notRunning(v)
		}
		if err := pause(ctx, sshPause); err != nil {
			return v, noSSH(v, err)
		}
	}
}

func notRunning(v vm.VM) error {
	err := fault.New(fault.Conflict, "VM %s is %s, not running", v.Spec.Name, v.State)
	if v.State == vm.Suspended {
		return err.WithHint("resume it: banger vm resume %s", v.Spec.Name)
	}
	return err.WithHint("start it with: banger vm start %s", v.Spec.Name)
}

// awaitSSH waits until the VM's SSH server answers, the VM stops running, or ctx ends. The agent is asked, and the server
// itself only where there is no agent that knows: for each connection it starts a program.
func (s *service) awaitSSH(ctx context.Context, v vm.VM) error {
	address := netip.AddrPortFrom(v.IP, sshPort).String()
	for {
		begin := time.Now()
		err := s.askForSSH(ctx, v)
		if errors.Is(err, errors.ErrUnsupported) {
			err = probeSSH(ctx, address)
		}
		if err == nil {
			return nil
		}
		// An agent takes its time to answer. One that does not is not asked without end.
		if pause(ctx, sshPause-time.Since(begin)) != nil {
			return noSSH(v, err)
		}
		now, err := s.Engine.Get(ctx, string(v.ID))
		if err != nil {
			if ctx.Err() != nil {
				return noSSH(v, err)
			}
			return err
		}
		if now.State != vm.Running {
			return notRunning(now)
		}
	}
}

func noSSH(v vm.VM, err error) error {
	return fault.Wrap(fault.Timeout, err, "the SSH server of VM %s does not answer", v.Spec.Name).
		WithHint("banger vm logs %s shows the guest's console", v.Spec.Name)
}

// errNotListening says that nothing listens yet.
var errNotListening = errors.New("nothing listens on port 22 in the guest")

// askForSSH asks the agent whether the SSH server listens, which it may take a moment to answer.
// errors.ErrUnsupported says that it cannot tell.
func (s *service) askForSSH(ctx context.Context, v vm.VM) error {
	agent, err := s.Engine.Agent(ctx, string(v.ID))
	if err != nil {
		return errors.ErrUnsupported
	}
	res, err := agent.AwaitSSH(ctx, &agentv1.AwaitSSHRequest{WaitMillis: int32(sshLook.Milliseconds())})
	switch {
	case err != nil:
		return errors.Join(errors.ErrUnsupported, err)
	case !res.GetListens():
		return errNotListening
	}
	return nil
}

// probeSSH connects and reads the first bytes of the banner (RFC 4253, 4.2).
func probeSSH(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, sshAttempt)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetReadDeadline(deadline); err != nil {
		return err
	}
	banner := make([]byte, 4)
	if _, err := io.ReadFull(conn, banner); err != nil {
		return err
	}
	if string(banner) != "SSH-" {
		return fault.New(fault.Precondition, "what listens on %s is no SSH server", address)
	}
	return nil
}

// pause waits, or returns ctx's error.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
