package capability

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/image"
	"banger/internal/paths"
	"banger/internal/vm"
	"banger/internal/vmm"
)

func TestAllBuildOneMachine(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := f.vm(t, "0a0b0c0d", "web")
	if err := f.check(ctx, v); err != nil {
		t.Fatal(err)
	}
	b, err := f.up(ctx, &v)
	if err != nil {
		t.Fatal(err)
	}
	wantDisks := []vmm.Disk{
		{Role: "root", Path: f.shelf.images["debian-1"].Root, ReadOnly: true},
		{Role: "overlay", Path: paths.OverlayDisk},
		{Role: "work", Path: paths.WorkDisk},
		{Role: "modules", Path: f.shelf.kernel.ModulesDisk, ReadOnly: true},
	}
	if !slices.Equal(b.Machine.Disks, wantDisks) {
		t.Errorf("disks %+v", b.Machine.Disks)
	}
	for i, role := range []agentv1.Disk_Role{agentv1.Disk_ROLE_ROOT, agentv1.Disk_ROLE_OVERLAY, agentv1.Disk_ROLE_WORK, agentv1.Disk_ROLE_MODULES} {
		if g := b.Guest.Disks[i]; g.Role != role || g.ReadOnly != b.Machine.Disks[i].ReadOnly {
			t.Errorf("guest's disk %d: %v", i, g)
		}
	}
	if b.Machine.Kernel != f.shelf.kernel.ELF || b.Machine.Initramfs != paths.VMInitramfs || b.Machine.NICs[0].TAP != "tap-pool-0" {
		t.Errorf("machine %+v", b.Machine)
	}
	g := b.Guest
	nic := &agentv1.Interface{Mac: v.MAC, Addresses: []string{"172.30.0.2/16", "fdb1:a96e:2b47::ac1e:2/112"}, Gateway: "172.30.0.1", Mtu: 1500}
	if g.Hostname != "web" || len(g.MachineId) != 32 || !proto.Equal(g.Interfaces[0], nic) || g.ChannelPort != vmm.ChannelPort ||
		!slices.Equal(g.Nameservers, []string{"9.9.9.9"}) || !slices.Equal(g.MaskedUnits, guest.DefaultMasks()) || g.UnixNanos == 0 ||
		!slices.Equal(g.PlainDirs, plainDirs) || !slices.Equal(g.Modules, []string{"virtio_blk.ko"}) {
		t.Errorf("guest %v", g)
	}
	if _, err := ssh.ParsePrivateKey([]byte(g.SshHostKey)); err != nil || len(g.AuthorizedKeys) != 1 {
		t.Errorf("keys: %v, %q", err, g.AuthorizedKeys)
	}
	known, err := os.ReadFile(f.Paths.KnownHosts())
	if err != nil || !strings.Contains(string(known), "web.vm,172.30.0.2 ssh-ed25519 ") {
		t.Errorf("known hosts %q, %v", known, err)
	}
	var bytes int64
	for _, name := range []string{paths.OverlayDisk, paths.WorkDisk, paths.VMInitramfs} {
		n, err := disk.AllocatedBytes(filepath.Join(b.Machine.Dir, name))
		if err != nil {
			t.Error(err)
		}
		bytes += n
	}
	if bytes > 20<<20 {
		t.Errorf("a new VM costs %d bytes of disk", bytes)
	}
}

// Down takes back the TAP device, NAT and the private initramfs, twice as well as once, and the next
// start finds the same identity and disks.
func TestSecondStartIsTheSameVM(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	v := f.vm(t, "0a0b0c0d", "web")
	empty := f.net.String()
	first, err := f.up(ctx, &v)
	if err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(first.Machine.Dir, paths.WorkDisk)
	mark(t, work)
	for range 2 {
		if err := f.down(ctx, v); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(first.Machine.Dir, paths.VMInitramfs)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the initramfs is still there: %v", err)
	}
	if s := f.net.String(); strings.Contains(s, "tap") || strings.Contains(s, "172.30.0.2") {
		t.Errorf("network after down: %s (before: %s)", s, empty)
	}
	other := image.Image{Name: "debian-2", Digest: "sha256:2", Root: "/nowhere"}
	f.shelf.images["default"] = other // a new default does not change a VM
	second, err := f.up(ctx, &v)
	if err != nil {
		t.Fatal(err)
	}
	a, b := first.Guest, second.Guest
	if a.MachineId != b.MachineId || a.SshHostKey != b.SshHostKey || second.Machine.Disks[0] != first.Machine.Disks[0] {
		t.Error("another identity or image after the second start")
	}
	if !marked(t, work) {
		t.Error("the work disk was made anew")
	}
}

func mark(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("mark"), 0) // the boot block, which ext4 leaves alone
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func marked(t *testing.T, path string) bool {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.HasPrefix(string(data), "mark")
}

// A disk that was made once and is gone is told, never made anew.
func TestMissingDisksAreTold(t *testing.T) {
	for _, name := range []string{paths.OverlayDisk, paths.WorkDisk} {
		f := newFixture(t)
		v := f.vm(t, "0a0b0c0d", "web")
		b, err := f.up(t.Context(), &v)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(b.Machine.Dir, name)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := f.check(t.Context(), v); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), path) {
			t.Errorf("check without %s: %v", name, err)
		}
		if _, err := f.up(t.Context(), &v); fault.KindOf(err) != fault.Precondition {
			t.Errorf("up without %s: %v", name, err)
		}
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s was made anew", name)
		}
	}
}

func TestChecksRefuse(t *testing.T) {
	f := newFixture(t)
	for name, c := range map[string]struct {
		spoil func(*vm.Spec)
		want  fault.Kind
	}{
		"unknown image":    {func(s *vm.Spec) { s.Image = "plan9" }, fault.NotFound},
		"small work disk":  {func(s *vm.Spec) { s.WorkDiskBytes = seedSize - 4096 }, fault.Usage},
		"large work disk":  {func(s *vm.Spec) { s.WorkDiskBytes = math.MaxInt64 }, fault.Precondition},
		"large disk":       {func(s *vm.Spec) { s.DiskBytes = math.MaxInt64 }, fault.Precondition},
		"key that is none": {func(s *vm.Spec) { s.AuthorizedKeys = []string{"ssh-rsa x"} }, fault.Usage},
	} {
		v := f.vm(t, "0a0b0c0d", "web")
		c.spoil(&v.Spec)
		if err := f.check(t.Context(), v); fault.KindOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.shelf.fail = fault.New(fault.Precondition, "checksum is wrong")
	if err := f.check(t.Context(), f.vm(t, "0a0b0c0d", "web")); fault.KindOf(err) != fault.Precondition {
		t.Errorf("broken image: %v", err)
	}
	f.shelf.fail = nil
	_ = os.Remove(f.AgentBinary)
	if err := f.check(t.Context(), f.vm(t, "0a0b0c0d", "web")); fault.KindOf(err) != fault.Precondition {
		t.Errorf("no agent: %v", err)
	}
	entries, err := os.ReadDir(f.Paths.VM("0a0b0c0d"))
	if err != nil || len(entries) > 0 {
		t.Errorf("a check made %v", entries)
	}
}

func TestWorkDiskGrows(t *testing.T) {
	f := newFixture(t)
	v := f.vm(t, "0a0b0c0d", "web")
	v.Spec.WorkDiskBytes = 128 << 20
	b, err := f.up(t.Context(), &v)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(b.Machine.Dir, paths.WorkDisk)); err != nil || info.Size() != 128<<20 {
		t.Errorf("%v, %v", info, err)
	}
}

// A failing Up leaves no TAP device behind.
func TestNetworkUpTakesBackItsTAP(t *testing.T) {
	f := newFixture(t)
	v := f.vm(t, "0a0b0c0d", "web")
	f.net.FailWith(func(op string) error {
		if op == "Attach" {
			return errors.New("no")
		}
		return nil
	})
	if _, err := f.up(t.Context(), &v); err == nil {
		t.Fatal("no error")
	}
	f.net.FailWith(nil)
	if taps := f.net.TAPs(); len(taps) > 0 {
		t.Errorf("left %v", taps)
	}
}

// TestNetworkCheckTellsOfAMissingRight: before any Up, and with nothing made.
func TestNetworkCheckTellsOfAMissingRight(t *testing.T) {
	f := newFixture(t)
	v := f.vm(t, "0a0b0c0d", "web")
	missing := fault.New(fault.Precondition, "no right to make network devices")
	f.net.FailWith(func(op string) error {
		if op == "Check" {
			return missing
		}
		return nil
	})
	var errs []error
	for _, c := range f.all {
		errs = append(errs, c.Check(t.Context(), v))
	}
	if err := errors.Join(errs...); !errors.Is(err, missing) {
		t.Errorf("got %v", err)
	}
}

// TestSweepKeepsTheOthersKnown: one row's note that cannot be read costs the other VMs nothing.
func TestSweepKeepsTheOthersKnown(t *testing.T) {
	f := newFixture(t)
	bad, web := f.vm(t, "0000000a", "bad"), f.vm(t, "0000000b", "web")
	web.IP = mustAddr("172.30.0.3")
	if _, err := f.up(t.Context(), &web); err != nil {
		t.Fatal(err)
	}
	keys := newSSHKeys(f.Options)
	bad.Notes = map[string]Note{keys.Name(): Note("{")}
	if _, err := keys.Sweep(t.Context(), []vm.VM{bad, web}); err == nil {
		t.Error("the damage is not told")
	}
	if known, _ := os.ReadFile(f.Paths.KnownHosts()); !strings.Contains(string(known), "web.vm") {
		t.Errorf("known hosts %q", known)
	}
}

func TestNetworkRefusesAnAddressOfElsewhere(t *testing.T) {
	f := newFixture(t)
	v := f.vm(t, "0a0b0c0d", "web")
	v.IP = mustAddr("10.1.2.3")
	if _, err := f.up(t.Context(), &v); fault.KindOf(err) != fault.Conflict {
		t.Errorf("got %v", err)
	}
}

func TestSweep(t *testing.T) {
	f := newFixture(t)
	ctx := t.Context()
	web, db := f.vm(t, "0000000a", "web"), f.vm(t, "0000000b", "db")
	db.IP = mustAddr("172.30.0.3")
	for _, v := range []*vm.VM{&web, &db} {
		if _, err := f.up(ctx, v); err != nil {
			t.Fatal(err)
		}
	}
	web.State, db.State = vm.Running, vm.Stopped
	if err := os.WriteFile(filepath.Join(f.Paths.SSH(), ".id_ed25519123"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	var told []string
	for _, c := range All(f.Options) { // as a new daemon has them
		if s, ok := c.(Sweeper); ok {
			sentences, err := s.Sweep(ctx, []vm.VM{web, db})
			if err != nil {
				t.Fatal(err)
			}
			told = append(told, sentences...)
		}
	}
	if taps := f.net.TAPs(); len(told) != 1 || !slices.Equal(taps, []string{"tap-pool-0"}) {
		t.Errorf("told %q, left %v", told, taps)
	}
	if files, _ := filepath.Glob(filepath.Join(f.Paths.SSH(), ".*")); len(files) > 0 {
		t.Errorf("left %v", files)
	}
	known, _ := os.ReadFile(f.Paths.KnownHosts())
	if !strings.Contains(string(known), "web.vm") || !strings.Contains(string(known), "db.vm") {
		t.Errorf("known hosts %q", known)
	}
}

func TestEraseForgetsTheHostKey(t *testing.T) {
	f := newFixture(t)
	web, db := f.vm(t, "0000000a", "web"), f.vm(t, "0000000b", "db")
	for _, v := range []*vm.VM{&web, &db} {
		if _, err := f.up(t.Context(), v); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range f.all {
		if e, ok := c.(Eraser); ok {
			if err := e.Erase(t.Context(), web); err != nil {
				t.Fatal(err)
			}
		}
	}
	known, _ := os.ReadFile(f.Paths.KnownHosts())
	if strings.Contains(string(known), "web.vm") || !strings.Contains(string(known), "db.vm") {
		t.Errorf("known hosts %q", known)
	}
}

func TestMasks(t *testing.T) {
	own := []string{"x.service"}
	for _, c := range []struct {
		units vm.Units
		img   image.Image
		want  []string
	}{
		{vm.UnitsFast, image.Image{}, guest.DefaultMasks()},
		{vm.UnitsFast, image.Image{MaskedUnits: &own}, own},
		{vm.UnitsFast, image.Image{MaskedUnits: &[]string{}}, []string{}},
		{vm.UnitsStock, image.Image{MaskedUnits: &own}, []string{"home.mount", "var.mount"}},
	} {
		if got := masks(c.units, c.img); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v", c.units, got)
		}
	}
}
