// Package wire converts between the API's messages and the domain's types. Generated types stop
// here and in the server's handlers; faults have a package of their own, wirefault.
package wire

import (
	"encoding/json"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/progress"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// Spec fills what the request left out from defaults. It does not validate.
func Spec(p *bangerv1.VMSpec, defaults vm.Spec) vm.Spec {
	s := defaults
	s.Name = p.GetName()
	s.Image = or(p.GetImage(), defaults.Image)
	s.Kernel = or(p.GetKernel(), defaults.Kernel)
	s.VMM = or(p.GetVmm(), defaults.VMM)
	s.CPUs = or(int(p.GetCpus()), defaults.CPUs)
	s.MemoryBytes = or(p.GetMemoryBytes(), defaults.MemoryBytes)
	s.DiskBytes = or(p.GetDiskBytes(), defaults.DiskBytes)
	s.WorkDiskBytes = or(p.GetWorkDiskBytes(), defaults.WorkDiskBytes)
	if p != nil && p.Nat != nil {
		s.NAT = *p.Nat
	}
	s.Units = or(vm.Units(p.GetUnits()), defaults.Units)
	s.AuthorizedKeys = append([]string(nil), p.GetAuthorizedKeys()...)
	s.Ephemeral, s.Cold, s.Isolated = p.GetEphemeral(), p.GetCold(), p.GetIsolated()
	s.DiskRate, s.NetRate, s.Balloon = p.GetDiskRate(), p.GetNetRate(), p.GetBalloon()
	s.Ports = ports(p.GetPorts())
	return s
}

func or[T comparable](value, otherwise T) T {
	var zero T
	if value == zero {
		return otherwise
	}
	return value
}

// VM makes the API's form of a VM; directory is its own one on the host.
func VM(v vm.VM, directory string) *bangerv1.VM {
	s := v.Spec
	m := &bangerv1.VM{
		Id: string(v.ID), Name: s.Name, State: string(v.State), Image: s.Image, Kernel: s.Kernel,
		Vmm: or(v.Driver, s.VMM), Cpus: int32(s.CPUs), MemoryBytes: s.MemoryBytes,
		DiskBytes: s.DiskBytes, WorkDiskBytes: s.WorkDiskBytes,
		Mac: v.MAC, DnsName: v.DNSName(), Nat: s.NAT, Isolated: s.Isolated, CreatedAt: timestamp(v.CreatedAt),
		StartedAt: timestamp(v.StartedAt), Error: v.Reason, Units: string(s.Units), Ephemeral: s.Ephemeral,
		Accelerator: v.Accelerator, SlowReason: v.SlowReason, Pid: pid(v), Directory: directory,
		DiskRate: s.DiskRate, NetRate: s.NetRate, Balloon: s.Balloon,
	}
	if v.IP.IsValid() {
		m.Ip, m.Ip6 = v.IP.String(), v.IPv6().String()
	}
	for _, port := range s.Ports {
		m.Ports = append(m.Ports, PortForward(port))
	}
	return m
}

// pid reads the VMM's process id from the handle; 0 without a machine, or with a handle that some
// other version wrote.
func pid(v vm.VM) int32 {
	var h vmm.Handle
	if len(v.Handle) == 0 || json.Unmarshal(v.Handle, &h) != nil {
		return 0
	}
	return int32(h.PID)
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

var statuses = map[progress.Status]bangerv1.Progress_Status{
	progress.Started: bangerv1.Progress_STATUS_STARTED,
	progress.Update:  bangerv1.Progress_STATUS_UPDATE,
	progress.Done:    bangerv1.Progress_STATUS_DONE,
	progress.Failed:  bangerv1.Progress_STATUS_FAILED,
	progress.Notice:  bangerv1.Progress_STATUS_NOTICE,
}

// Progress makes the API's form of a progress event.
func Progress(e progress.Event) *bangerv1.Progress {
	p := &bangerv1.Progress{
		Stage: e.Stage, Status: statuses[e.Status], Message: e.Message, DurationNanos: int64(e.Duration),
	}
	if e.Fraction >= 0 {
		p.Fraction = &e.Fraction
	}
	return p
}

// Event makes the API's form of a line of a VM's history.
func Event(e store.Event) *bangerv1.Event {
	return &bangerv1.Event{
		Id: e.ID, VmId: string(e.VM), At: timestamp(e.At), Operation: e.Operation, Stage: e.Stage,
		Message: e.Message, DurationNanos: int64(e.Duration),
	}
}
