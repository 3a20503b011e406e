package wire

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/progress"
	"banger/internal/vm"
)

var defaults = vm.Spec{
	Image: "debian", Kernel: "cloud", VMM: "auto", CPUs: 2, MemoryBytes: 1 << 30, DiskBytes: 4 << 30, WorkDiskBytes: 4 << 30,
	NAT: true, Units: vm.UnitsFast,
}

func TestEmptySpecIsTheDefaults(t *testing.T) {
	for _, p := range []*bangerv1.VMSpec{nil, {}} {
		if got := Spec(p, defaults); fmt.Sprint(got) != fmt.Sprint(defaults) {
			t.Errorf("got %+v", got)
		}
	}
}

// What a request says survives, and what the VM then shows is what was asked.
func TestSpecArrives(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := &bangerv1.VMSpec{
			Name: rapid.String().Draw(t, "name"), Image: rapid.String().Draw(t, "image"), Kernel: rapid.String().Draw(t, "kernel"),
			Vmm: rapid.String().Draw(t, "vmm"), Cpus: rapid.Int32().Draw(t, "cpus"), MemoryBytes: rapid.Int64().Draw(t, "memory"),
			DiskBytes: rapid.Int64().Draw(t, "disk"), WorkDiskBytes: rapid.Int64().Draw(t, "work"),
			Units: rapid.String().Draw(t, "units"), Ephemeral: rapid.Bool().Draw(t, "ephemeral"),
			DiskRate: rapid.Int64().Draw(t, "disk rate"), NetRate: rapid.Int64().Draw(t, "net rate"), Balloon: rapid.Bool().Draw(t, "balloon"),
		}
		if rapid.Bool().Draw(t, "says nat") {
			p.Nat = proto.Bool(rapid.Bool().Draw(t, "nat"))
		}
		s := Spec(p, defaults)
		m := VM(vm.VM{Spec: s}, "")
		same(t, "name", m.GetName(), p.GetName(), "")
		same(t, "image", m.GetImage(), p.GetImage(), defaults.Image)
		same(t, "kernel", m.GetKernel(), p.GetKernel(), defaults.Kernel)
		same(t, "vmm", m.GetVmm(), p.GetVmm(), defaults.VMM)
		same(t, "cpus", m.GetCpus(), p.GetCpus(), int32(defaults.CPUs))
		same(t, "memory", m.GetMemoryBytes(), p.GetMemoryBytes(), defaults.MemoryBytes)
		same(t, "disk", m.GetDiskBytes(), p.GetDiskBytes(), defaults.DiskBytes)
		same(t, "work disk", m.GetWorkDiskBytes(), p.GetWorkDiskBytes(), defaults.WorkDiskBytes)
		same(t, "units", m.GetUnits(), p.GetUnits(), string(defaults.Units))
		same(t, "ephemeral", m.GetEphemeral(), p.GetEphemeral(), false)
		same(t, "disk rate", m.GetDiskRate(), p.GetDiskRate(), 0)
		same(t, "network rate", m.GetNetRate(), p.GetNetRate(), 0)
		same(t, "balloon", m.GetBalloon(), p.GetBalloon(), false)
		if want := p.Nat == nil || *p.Nat; m.GetNat() != want {
			t.Errorf("nat is %v, want %v", m.GetNat(), want)
		}
	})
}

func same[T comparable](t *rapid.T, what string, got, asked, otherwise T) {
	if want := or(asked, otherwise); got != want {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

func TestVMHandle(t *testing.T) {
	for handle, want := range map[string]int32{"": 0, `{"pid":42,"start_time":7}`: 42, "garbage": 0} {
		if got := VM(vm.VM{Handle: []byte(handle)}, "/d"); got.GetPid() != want || got.GetDirectory() != "/d" || got.GetStartedAt() != nil || got.GetIp() != "" {
			t.Errorf("handle %q: %v", handle, got)
		}
	}
}

func TestProgress(t *testing.T) {
	unknown := Progress(progress.Event{Stage: "boot", Status: progress.Update, Message: "m", Fraction: -1})
	if unknown.Fraction != nil || unknown.GetStatus() != bangerv1.Progress_STATUS_UPDATE || unknown.GetStage() != "boot" {
		t.Errorf("got %v", unknown)
	}
	zero := Progress(progress.Event{Status: progress.Done, Fraction: 0, Duration: time.Second})
	if zero.Fraction == nil || zero.GetDurationNanos() != 1e9 {
		t.Errorf("got %v", zero)
	}
	for _, s := range []progress.Status{progress.Started, progress.Update, progress.Done, progress.Failed, progress.Notice} {
		if Progress(progress.Event{Status: s}).GetStatus() == bangerv1.Progress_STATUS_UNSPECIFIED {
			t.Errorf("status %s is lost", s)
		}
	}
}
