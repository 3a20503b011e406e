package server

import (
	"context"
	"errors"
	"io"
	"slices"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/forward"
	"banger/internal/guest"
	"banger/internal/vm"
	"banger/internal/wire"
)

// Ports tells what becomes of forwarded ports: *forward.Forwarder.
type Ports interface {
	Status(id vm.ID, p vm.Port) forward.Status
}

type networkService struct{ *service }

type dialStream = connect.BidiStream[bangerv1.DialVMRequest, bangerv1.DialVMResponse]

// dialChunk is how many bytes of the guest's one message carries.
const dialChunk = 32 << 10

// DialVM passes bytes between the client and a port inside the guest: a side that does not read holds up the
// other by flow control, and nothing piles up here.
func (s networkService) DialVM(ctx context.Context, client *dialStream) error {
	first, err := client.Receive()
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	start := first.GetStart()
	if err := named(start.GetVm()); err != nil {
		return err
	}
	if start.GetPort() < 1 || start.GetPort() > 0xffff {
		return fault.New(fault.Usage, "%d is no port", start.GetPort())
	}
	agent, err := s.Engine.Agent(ctx, start.GetVm())
	if err != nil {
		return err
	}
	conn, err := guest.Dial(ctx, agent, uint16(start.GetPort()))
	if err != nil {
		return err
	}
	defer conn.Close()
	connected := &bangerv1.DialVMResponse{Output: &bangerv1.DialVMResponse_Connected{Connected: &bangerv1.DialVMConnected{}}}
	if err := client.Send(connected); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- clientToGuest(client, conn) }()
	if err := guestToClient(conn, client); err != nil {
		return agentFault(err, start.GetVm())
	}
	return <-sent
}

func clientToGuest(client *dialStream, conn *guest.Conn) error {
	for {
		req, err := client.Receive()
		if errors.Is(err, io.EOF) || err == nil && req.GetEof() {
			if err := conn.CloseWrite(); !errors.Is(err, io.EOF) { // the agent has ended the stream: nobody reads
				return err
			}
			return nil
		}
		if err != nil {
			_ = conn.Close() // the other direction ends as well
			return err
		}
		if _, err := conn.Write(req.GetData()); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func guestToClient(conn *guest.Conn, client *dialStream) error {
	buffer := make([]byte, dialChunk)
	for {
		n, err := conn.Read(buffer)
		if n > 0 {
			if err := client.Send(&bangerv1.DialVMResponse{Output: &bangerv1.DialVMResponse_Data{Data: buffer[:n]}}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return client.Send(&bangerv1.DialVMResponse{Output: &bangerv1.DialVMResponse_Eof{Eof: true}})
		}
		if err != nil {
			return err
		}
	}
}

// AddPorts goes on when the client goes away.
func (s networkService) AddPorts(ctx context.Context, req *bangerv1.AddPortsRequest) (*bangerv1.AddPortsResponse, error) {
	v, err := s.changePorts(ctx, req.GetVm(), req.GetPorts(), func(name string, have, wished []vm.Port) ([]vm.Port, error) {
		for _, p := range wished {
			if slices.Contains(have, p) {
				continue // asking for what holds
			}
			if taken := func(other vm.Port) bool { return other.Host == p.Host }; slices.ContainsFunc(have, taken) {
				return nil, fault.New(fault.Conflict, "port %s leads to another port of VM %s already", p.Host, name).
					WithHint("remove it first: banger vm ports remove %s %s", name, p.Host)
			}
			have = append(have, p)
		}
		return have, nil
	})
	if err != nil {
		return nil, err
	}
	return &bangerv1.AddPortsResponse{Vm: s.message(v)}, nil
}

// RemovePorts goes on when the client goes away.
func (s networkService) RemovePorts(ctx context.Context, req *bangerv1.RemovePortsRequest) (*bangerv1.RemovePortsResponse, error) {
	v, err := s.changePorts(ctx, req.GetVm(), req.GetPorts(), func(name string, have, wished []vm.Port) ([]vm.Port, error) {
		for _, p := range wished {
			fits := func(other vm.Port) bool { return other.Host == p.Host && (p.Guest == 0 || p.Guest == other.Guest) }
			i := slices.IndexFunc(have, fits)
			if i < 0 {
				return nil, fault.New(fault.NotFound, "VM %s has no port %s", name, p.Host).
					WithHint("see what there is: banger vm ports list %s", name)
			}
			have = slices.Delete(have, i, i+1)
		}
		return have, nil
	})
	if err != nil {
		return nil, err
	}
	return &bangerv1.RemovePortsResponse{Vm: s.message(v)}, nil
}

// changePorts gives a VM the ports that change makes of those it has and those in the request.
func (s *service) changePorts(ctx context.Context, ref string, wished []*bangerv1.PortForward,
	change func(name string, have, wished []vm.Port) ([]vm.Port, error),
) (vm.VM, error) {
	if err := named(ref); err != nil {
		return vm.VM{}, err
	}
	ports, err := wire.Ports(wished)
	if err == nil && len(ports) == 0 {
		err = fault.New(fault.Usage, "the request names no port")
	}
	if err != nil {
		return vm.VM{}, err
	}
	var refused error
	v, err := s.Engine.Set(context.WithoutCancel(ctx), ref, func(spec *vm.Spec) {
		next, err := change(spec.Name, slices.Clone(spec.Ports), ports)
		if refused = err; err == nil {
			spec.Ports = next
		}
	})
	return v, errors.Join(refused, err)
}

// ListPorts waits for nobody.
func (s networkService) ListPorts(ctx context.Context, req *bangerv1.ListPortsRequest) (*bangerv1.ListPortsResponse, error) {
	var list []vm.VM
	if req.GetVm() == "" {
		all, err := s.Engine.List(ctx)
		if err != nil {
			return nil, err
		}
		list = all
	} else {
		v, err := s.get(ctx, req.GetVm())
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	res := &bangerv1.ListPortsResponse{}
	for _, v := range list {
		for _, p := range v.Spec.Ports {
			status := s.Ports.Status(v.ID, p)
			line := &bangerv1.PortStatus{
				Vm: v.Spec.Name, Port: wire.PortForward(p), Listening: status.Listening, Connections: int32(status.Connections),
			}
			if !status.Listening && v.State == vm.Running {
				line.Problem = "the port was taken when this daemon started; see banger daemon logs"
			}
			res.Ports = append(res.Ports, line)
		}
	}
	return res, nil
}
