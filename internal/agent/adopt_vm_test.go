package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/guest"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
	"banger/internal/vmm"
)

const (
	templateMAC = "52:54:00:00:00:01"
	hostAddress = "172.30.9.1"
	bridge      = "bgr-br"
)

// networked puts the machine on a bridge of a namespace with the identity of a template: no address. Machines
// must be started by the goroutine of the test.
func (m *machine) networked() *hosttest.NS {
	m.t.Helper()
	need.Binary(m.t, "ip")
	ns := hosttest.NetNS(m.t)
	ns.Run(m.t, "ip", "link", "add", bridge, "type", "bridge")
	ns.Run(m.t, "ip", "addr", "add", hostAddress+"/24", "dev", bridge)
	ns.Run(m.t, "ip", "link", "set", bridge, "up")
	m.m.NICs = []vmm.NIC{{TAP: newTAP(m.t, ns, 0), MAC: templateMAC}}
	m.cfg.Hostname = "template"
	m.cfg.Interfaces = []*agentv1.Interface{{Mac: templateMAC}}
	return ns
}

func newTAP(t *testing.T, ns *hosttest.NS, n int) string {
	t.Helper()
	tap := fmt.Sprintf("bgr-adopt%d", n)
	ns.Run(t, "ip", "tuntap", "add", tap, "mode", "tap")
	ns.Run(t, "ip", "link", "set", tap, "master", bridge, "up")
	return tap
}

// clone is who a guest becomes.
type clone struct {
	name, mac, ip, machineID string
	key                      guest.KeyPair
}

func newClone(t *testing.T, n int) clone {
	t.Helper()
	name := fmt.Sprintf("clone%d", n)
	key, err := guest.NewKeyPair(name)
	check(t, err)
	return clone{
		name: name, mac: fmt.Sprintf("52:54:00:00:01:%02x", n), ip: fmt.Sprintf("172.30.9.%d", 10+n),
		machineID: strings.Repeat(fmt.Sprintf("%x", n), 32), key: key,
	}
}

func (c clone) request(t *testing.T) *agentv1.AdoptRequest {
	t.Helper()
	entropy := make([]byte, 64)
	_, err := rand.Read(entropy)
	check(t, err)
	return &agentv1.AdoptRequest{
		Entropy: entropy, GrowDisks: true,
		Identity: &agentv1.GuestConfig{
			Hostname: c.name, MachineId: c.machineID, SshHostKey: c.key.Private, SshHostKeyPublic: c.key.Public,
			Interfaces:     []*agentv1.Interface{{Mac: c.mac, Addresses: []string{c.ip + "/24"}, Gateway: hostAddress, Mtu: 1400}},
			Nameservers:    []string{hostAddress},
			AuthorizedKeys: []string{"ssh-ed25519 AAAA " + c.name},
			Timezone:       "Europe/Berlin",
		},
	}
}

// hostKey returns the key with which sshd answers, as soon as it does.
func hostKey(ctx context.Context, ns *hosttest.NS, ip string) (string, error) {
	for {
		got, err := tryHostKey(ctx, ns, ip)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return got, err
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func tryHostKey(ctx context.Context, ns *hosttest.NS, ip string) (string, error) {
	var got string
	err := ns.Do(func() error {
		conn, err := (&net.Dialer{Timeout: 20 * time.Second}).DialContext(ctx, "tcp", ip+":22")
		if err != nil {
			return err
		}
		defer conn.Close()
		_, _, _, err = ssh.NewClientConn(conn, ip, &ssh.ClientConfig{
			User: "root", HostKeyAlgorithms: []string{ssh.KeyAlgoED25519, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoECDSA256},
			HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
				got = strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
				return nil
			},
		})
		if got != "" {
			return nil // to be let in is not asked for
		}
		return err
	})
	return got, err
}

// Clones of one template live at the same time and have nothing in common that names them; one of them becomes
// another one once more, is suspended, and goes on. Its programs do next to nothing: emulated, guests share few
// processors.
func TestRealGuestIsRestored(t *testing.T) {
	m := newMachine(t)
	ns := m.networked()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	template := filepath.Join(m.m.Dir, "template")
	check(t, os.Mkdir(template, 0o700))
	m.m.MemoryFile = filepath.Join(template, vmm.SavedMemory)
	m.boot(ctx)
	m.ping(ctx)
	if got := m.shell(ctx, "cat /sys/class/net/*/operstate | sort -u; ip -o addr show scope global"); strings.Contains(got, "up") {
		t.Errorf("an interface without an address is up: %s", got)
	}
	m.shell(ctx, `setsid perl -e '$| = 1; for (;;) { open F, ">", "/run/count.new"; print F ++$i; close F; rename "/run/count.new", "/run/count"; select undef, undef, undef, 0.1 }' >/dev/null 2>&1 &`)
	held := m.hold(ctx)
	m.saved(ctx, template, true)
	if err := <-held; err == nil {
		t.Error("a program's stream outlived the machine")
	}

	var clones []*machine
	bootIDs := map[string]bool{}
	for n := 1; n <= 2; n++ {
		c := newClone(t, n)
		r := m.cloneDisks(ctx, newTAP(t, ns, n), int64(n)<<30)
		begin := time.Now()
		r.restore(ctx, template)
		loaded := time.Since(begin)
		r.ping(ctx) // the way there takes longer the first time, and the clock's time would age on it
		r.adopted(ctx, c)
		t.Logf("restored in %.0f ms, of in all %.0f ms", 1000*loaded.Seconds(), 1000*time.Since(begin).Seconds())
		r.clockIsRight(ctx)
		if got, err := hostKey(ctx, ns, c.ip); err != nil || got+" "+c.name != c.key.Public {
			t.Errorf("sshd answers with the key %q, %v; want %q", got, err, c.key.Public)
		}
		bootIDs[r.lives(ctx, c)] = true
		kib, err := strconv.Atoi(strings.TrimSpace(r.shell(ctx, "df --output=size / | tail -1")))
		if err != nil || kib < n*900<<10 || kib > n<<20 {
			t.Errorf("the overlay disk of %d GiB has a file system of %d KiB, %v", n, kib, err)
		}
		if got := r.shell(ctx, "until test -s /run/hung-up; do sleep 0.1; done; cat /run/hung-up"); got != "yes\n" {
			t.Errorf("the program whose caller has gone was not told: %q", got)
		}
		clones = append(clones, r)
	}
	r, c := clones[0], newClone(t, 3)
	r.adopted(ctx, c)
	if got, err := hostKey(ctx, ns, c.ip); err != nil || got+" "+c.name != c.key.Public {
		t.Errorf("sshd answers with the key %q, %v; want %q", got, err, c.key.Public)
	}
	bootID := r.lives(ctx, c)
	bootIDs[bootID] = true
	if neigh := ns.Run(t, "ip", "neigh", "show", c.ip); !strings.Contains(neigh, c.mac) {
		t.Errorf("the host does not know where the clone is: %q", neigh)
	}
	if len(bootIDs) != 3 {
		t.Errorf("three machines have the boot ids %v", bootIDs)
	}
	state := t.TempDir()
	count := r.count(ctx)
	r.saved(ctx, state, false)
	ns.Run(t, "ip", "link", "set", r.m.NICs[0].TAP, "nomaster") // the bridge forgets whom it saw there
	ns.Run(t, "ip", "link", "set", r.m.NICs[0].TAP, "master", bridge)
	r.restore(ctx, state)
	r.ping(ctx)
	request := c.request(t)
	request.Identity, request.GrowDisks = nil, false
	begin := time.Now()
	r.setClock(ctx)
	_, err := r.client.Adopt(ctx, request)
	check(t, err)
	t.Logf("resumed in %.0f ms", 1000*time.Since(begin).Seconds())
	r.clockIsRight(ctx)
	if fdb := ns.Run(t, "bridge", "fdb", "show", "br", bridge); !strings.Contains(fdb, c.mac+" dev "+r.m.NICs[0].TAP) {
		t.Errorf("the bridge does not know where the guest is:\n%s", fdb)
	}
	if got, err := tryHostKey(ctx, ns, c.ip); err != nil || got+" "+c.name != c.key.Public {
		t.Errorf("sshd, which has listened all the time, answers with %q, %v", got, err)
	}
	if got := r.lives(ctx, c); got != bootID {
		t.Errorf("resumed with the boot id %s, not %s", got, bootID)
	}
	if now := r.count(ctx); now <= count {
		t.Errorf("the program counted to %d, and now to %d", count, now)
	}
}

// hold runs a program that never ends by itself and says in a file when it is hung up; its stream's end is sent. It
// returns when the program does so.
func (m *machine) hold(ctx context.Context) <-chan error {
	m.t.Helper()
	ended := make(chan error, 1)
	go func() {
		_, _, err := m.exec(ctx, &agentv1.ExecStart{Argv: []string{
			"sh", "-c", "trap 'echo yes >/run/hung-up; exit' HUP; echo >/run/holds; sleep infinity & wait",
		}})
		ended <- err
	}()
	m.shell(ctx, "until test -e /run/holds; do sleep 0.1; done")
	return ended
}

func (m *machine) count(ctx context.Context) int {
	m.t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(m.shell(ctx, "until test -s /run/count; do sleep 0.1; done; cat /run/count")))
	check(m.t, err)
	return n
}

// setClock is a host's first word to a restored guest.
func (m *machine) setClock(ctx context.Context) {
	m.t.Helper()
	_, err := m.client.SetClock(ctx, time.Now, guest.Unknown)
	check(m.t, err)
}

func (m *machine) clockIsRight(ctx context.Context) {
	m.t.Helper()
	before := time.Now()
	s, err := m.client.Status(ctx, &agentv1.StatusRequest{})
	check(m.t, err)
	said := time.Unix(0, s.GetUnixNanos())
	if said.Before(before.Add(-guest.ClockExact)) || said.After(time.Now().Add(guest.ClockExact)) {
		m.t.Errorf("the guest's clock is %v off", said.Sub(before))
	}
}

// saved saves the machine and ends it without letting it go on.
func (m *machine) saved(ctx context.Context, dir string, template bool) {
	m.t.Helper()
	begin := time.Now()
	_, err := m.client.Quiesce(ctx, &agentv1.QuiesceRequest{ForTemplate: template})
	check(m.t, err)
	quiesced := time.Since(begin)
	check(m.t, m.running.(vmm.Pauser).Pause(ctx))
	check(m.t, m.running.(vmm.Saver).Save(ctx, dir))
	m.t.Logf("quiesced in %.0f ms, saved in %.0f ms", 1000*quiesced.Seconds(), 1000*(time.Since(begin)-quiesced).Seconds())
	m.client.Close()
	check(m.t, m.running.Stop(ctx))
}

// cloneDisks returns a machine like m with copies of its disks, the overlay of that size, and its own network
// device.
func (m *machine) cloneDisks(ctx context.Context, tap string, overlay int64) *machine {
	m.t.Helper()
	r := *m
	r.m.Dir, r.m.MemoryFile, r.m.NICs = m.t.TempDir(), "", []vmm.NIC{{TAP: tap, MAC: templateMAC}}
	for _, name := range []string{"overlay", "work"} {
		check(m.t, disk.CloneFile(ctx, filepath.Join(r.m.Dir, name), filepath.Join(m.m.Dir, name)))
	}
	check(m.t, os.Truncate(filepath.Join(r.m.Dir, "overlay"), overlay))
	return &r
}

func (m *machine) restore(ctx context.Context, dir string) {
	m.t.Helper()
	var err error
	m.running, err = m.driver.Restore(ctx, m.m, dir)
	check(m.t, err)
	m.attend()
}

// adopted lets the guest become c.
func (m *machine) adopted(ctx context.Context, c clone) {
	m.t.Helper()
	begin := time.Now()
	m.setClock(ctx)
	_, err := m.client.Adopt(ctx, c.request(m.t))
	check(m.t, err)
	took := time.Since(begin)
	m.t.Logf("adopted %s in %.0f ms:\n%s", c.name, 1000*took.Seconds(), m.shell(ctx, "cat /run/banger/adopt.times"))
}

// lives checks everything that names the machine, and returns its boot id.
func (m *machine) lives(ctx context.Context, c clone) string {
	m.t.Helper()
	asked := []struct{ script, want string }{
		{"hostname; cat /etc/hostname", c.name + "\n" + c.name + "\n"},
		{"cat /etc/machine-id /var/lib/dbus/machine-id", c.machineID + "\n" + c.machineID + "\n"},
		{"systemd-id128 machine-id", c.machineID + "\n"},
		{"systemctl is-system-running", "running\n"},
		{"readlink /etc/localtime", "/usr/share/zoneinfo/Europe/Berlin\n"},
		{"cat /etc/resolv.conf", "nameserver " + hostAddress + "\n"},
		{"cat /sys/class/net/e*/address", c.mac + "\n"},
		{"ip -4 -o addr show scope global | awk '{print $4}'", c.ip + "/24\n"},
		{"ip route show default | awk '{print $3}'", hostAddress + "\n"},
		{"grep -c vm /etc/hosts", "1\n"},
		{"grep -h . /root/.ssh/authorized_keys | grep -v '^#'", "ssh-ed25519 AAAA " + c.name + "\n"},
		{"ls -d /*/log/journal/" + m.cfg.GetMachineId(), ""},
		{"cmp /run/banger/boot_id /proc/sys/kernel/random/boot_id && echo same", "same\n"},
		{ // journald may still be on its way
			"until journalctl -o cat -t banger-agent | tail -1 | grep '" + c.name + "$'; do sleep 0.2; done",
			"This machine was restored from memory and is now " + c.name + "\n",
		},
	}
	const end = "=== end of an answer ===\n"
	var script strings.Builder
	for _, a := range asked {
		fmt.Fprintf(&script, "{ %s; } 2>/dev/null || true; printf '%s'\n", a.script, end)
	}
	answers := strings.Split(m.shell(ctx, script.String()), end)
	for i, a := range asked {
		if i >= len(answers) || answers[i] != a.want {
			m.t.Errorf("%s: %q, want %q", a.script, answers[min(i, len(answers)-1)], a.want)
		}
	}
	status := m.shell(ctx, "hostnamectl")
	boot := strings.TrimSpace(m.shell(ctx, "tr -d - < /proc/sys/kernel/random/boot_id"))
	for _, want := range []string{"hostname: " + c.name, c.machineID, boot} {
		if !strings.Contains(status, want) {
			m.t.Errorf("hostnamectl does not show %q:\n%s", want, status)
		}
	}
	ping, err := m.client.Ping(ctx, &agentv1.PingRequest{})
	if err != nil || strings.ReplaceAll(ping.GetBootId(), "-", "") != boot {
		m.t.Errorf("the agent says boot id %v, %v; want %s", ping, err, boot)
	}
	return boot
}
