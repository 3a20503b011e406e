package firecracker_test

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
	"banger/internal/vmm/kvm"
	"banger/internal/vmm/vmmtest"
)

// jailerScript does what upstream says its jailer does, as far as a shell can: it refuses a jail that was used, closes
// descriptors, copies the program, gives the root to the user, makes the devices and changes root, user and program.
// BANGER_JAILER names a real one, to be used in its place.
const jailerScript = `#!/bin/sh
set -e
while [ "$1" != "--" ]; do
	case "$1" in
	--id) id=$2 ;; --exec-file) exec_file=$2 ;; --uid) uid=$2 ;; --gid) gid=$2 ;; --chroot-base-dir) base=$2 ;;
	--cgroup-version|--resource-limit) ;;
	*) echo "unknown argument $1" >&2; exit 1 ;;
	esac
	shift 2
done
shift
name=$(basename "$exec_file")
root=$base/$name/$id/root
ulimit -n 2048
exec 3>&- 4>&-
mkdir -p "$root/run"
mkdir "$root/dev" "$root/dev/net"
cp "$exec_file" "$root/$name"
mknod "$root/dev/net/tun" c 10 200
mknod "$root/dev/kvm" c 10 232
mknod "$root/dev/urandom" c 1 9
chown "$uid:$gid" "$root" "$root/dev" "$root/dev/net" "$root/run" "$root"/dev/net/tun "$root"/dev/kvm
chmod 0700 "$root" "$root/dev" "$root/dev/net" "$root/run"
echo $$ >"$root/$name.pid"
exec chroot --userspec="$uid:$gid" --groups= "$root" "/$name" --id "$id" "$@"
`

// jailed is a driver whose Firecracker is the fake one, in a jail.
func jailed(t *testing.T) func(testing.TB) vmm.Driver {
	t.Helper()
	need.Root(t)
	dir := t.TempDir()
	if real := os.Getenv("BANGER_JAILER"); real != "" {
		copyFile(t, real, filepath.Join(dir, "jailer"))
	} else if err := os.WriteFile(filepath.Join(dir, "jailer"), []byte(jailerScript), 0o755); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "firecracker")
	copyFile(t, fctest.Fake(t), binary)
	return func(testing.TB) vmm.Driver {
		return firecracker.New(firecracker.Options{
			Binary: binary, Jailer: true, KVM: func() kvm.Result { return kvm.Result{Usable: true} },
		})
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// withDisks is a machine with a disk of its own and one that is shared.
func withDisks(t testing.TB, dir string) vmm.Machine {
	m := fakeMachine(t, dir)
	for _, name := range []string{"root.img", "work.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.Disks = []vmm.Disk{{Role: "root", Path: "root.img", ReadOnly: true}, {Role: "work", Path: "work.img"}}
	return m
}

func TestConformanceInAJail(t *testing.T) {
	const elsewhere = "its sockets are in the jail, where the suite does not look"
	vmmtest.Run(t, vmmtest.Target{
		New: jailed(t), Machine: withDisks, BootTimeout: 10 * time.Second,
		Hang:  []string{fakefc.ArgHangBoot},
		Panic: []string{fakefc.ArgPanic}, PanicText: "Kernel panic - not syncing",
		Break:  func(m *vmm.Machine) { m.MemoryBytes = 1 << 60 },
		Cannot: map[string]string{"Life": elsewhere, "KilledUnwatched": elsewhere},
	})
}

// Each machine's Firecracker has a user of its own, and nothing of the jail is left.
func TestJail(t *testing.T) {
	d := jailed(t)(t)
	users := map[uint32]bool{}
	for _, id := range []string{"0a1b2c3d", "0a1b2c3e"} {
		dir := t.TempDir()
		m := withDisks(t, dir)
		m.ID = vm.ID(id)
		r, err := d.Start(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		var proc, disk syscall.Stat_t
		if err := syscall.Stat("/proc/"+strconv.Itoa(r.Handle().PID), &proc); err != nil {
			t.Error(err)
		}
		if err := syscall.Stat(filepath.Join(dir, "work.img"), &disk); err != nil || disk.Uid != proc.Uid {
			t.Errorf("its process is user %d's, its disk %d's (%v)", proc.Uid, disk.Uid, err)
		}
		users[proc.Uid] = true
		again, err := d.Adopt(t.Context(), m, vmm.Handle{})
		if err != nil || again.Handle().PID != r.Handle().PID {
			t.Errorf("adopted %v, %v", again, err)
		}
		if err := r.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if again != nil {
			_ = again.Close()
		}
		if left, err := filepath.Glob(filepath.Join(dir, "jail")); len(left) > 0 || err != nil {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	if len(users) != 2 || users[0] {
		t.Errorf("users %v", users)
	}
}

func TestNoJailer(t *testing.T) {
	need.Root(t)
	d := firecracker.New(firecracker.Options{
		Binary: fctest.Fake(t), Jailer: true, KVM: func() kvm.Result { return kvm.Result{Usable: true} },
	})
	t.Setenv("PATH", "/nowhere")
	if _, err := d.Caps(t.Context()); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("without a jailer: %v", err)
	}
}
