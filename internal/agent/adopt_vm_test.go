package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	agentv1 "banger/api/agent/v1"
	"banger/internal/guest"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
	"banger/internal/vmm"
)

const (
	templateMAC = "52:54:00:00:00:01"
	hostAddress = "172.30.9.1"
)

// networked gives the machine a network interface whose other end is the host of a namespace, and the
// identity of a template: no address. The machine must be started by the goroutine of the test.
func (m *machine) networked() *hosttest.NS {
	m.t.Helper()
	need.Binary(m.t, "ip")
	ns := hosttest.NetNS(m.t)
	const tap = "bgr-adopt"
	ns.Run(m.t, "ip", "tuntap", "add", tap, "mode", "tap")
	ns.Run(m.t, "ip", "addr", "add", hostAddress+"/24", "dev", tap)
	ns.Run(m.t, "ip", "link", "set", tap, "up")
	m.m.NICs = []vmm.NIC{{TAP: tap, MAC: templateMAC}}
	m.cfg.Hostname = "template"
	m.cfg.Interfaces = []*agentv1.Interface{{Mac: templateMAC}}
	return ns
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
		UnixNanos: time.Now().UnixNano(), Entropy: entropy, GrowDisks: true,
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

// A guest that adopts an identity has nothing left of the one before, as often as it does.
func TestRealGuestAdopts(t *testing.T) {
	m := newMachine(t)
	ns := m.networked()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	m.boot(ctx)
	m.ping(ctx)
	if got := m.shell(ctx, "cat /sys/class/net/*/operstate | sort -u; ip -o addr show scope global"); strings.Contains(got, "up") {
		t.Errorf("an interface without an address is up: %s", got)
	}
	begin := time.Now()
	_, err := m.client.Quiesce(ctx, &agentv1.QuiesceRequest{ForTemplate: true})
	check(t, err)
	t.Logf("quiesced in %.2f s", time.Since(begin).Seconds())
	bootIDs := map[string]bool{}
	for n := 1; n <= 3; n++ {
		c := newClone(t, n)
		m.adopted(ctx, c)
		begin := time.Now()
		got, err := hostKey(ctx, ns, c.ip)
		t.Logf("sshd answered %.0f ms later", 1000*time.Since(begin).Seconds())
		if err != nil || got+" "+c.name != c.key.Public {
			t.Errorf("sshd answers with the key %q, %v; want %q", got, err, c.key.Public)
		}
		bootIDs[m.lives(ctx, c)] = true
		if neigh := ns.Run(t, "ip", "neigh", "show", c.ip); !strings.Contains(neigh, c.mac) {
			t.Errorf("the host does not know where the clone is: %q", neigh)
		}
	}
	if len(bootIDs) != 3 {
		t.Errorf("three machines have the boot ids %v", bootIDs)
	}
}

// adopted lets the guest become c.
func (m *machine) adopted(ctx context.Context, c clone) {
	m.t.Helper()
	begin := time.Now()
	_, err := m.client.Adopt(ctx, c.request(m.t))
	check(m.t, err)
	took := time.Since(begin)
	m.t.Logf("adopted %s in %.0f ms:\n%s", c.name, 1000*took.Seconds(), m.shell(ctx, "cat /run/banger/adopt.times"))
}

// lives checks everything that names the machine, and returns its boot id.
func (m *machine) lives(ctx context.Context, c clone) string {
	m.t.Helper()
	for script, want := range map[string]string{
		"hostname; cat /etc/hostname":                                          c.name + "\n" + c.name + "\n",
		"cat /etc/machine-id /var/lib/dbus/machine-id":                         c.machineID + "\n" + c.machineID + "\n",
		"systemd-id128 machine-id":                                             c.machineID + "\n",
		"systemctl is-system-running":                                          "running\n",
		"readlink /etc/localtime":                                              "/usr/share/zoneinfo/Europe/Berlin\n",
		"cat /etc/resolv.conf":                                                 "nameserver " + hostAddress + "\n",
		"cat /sys/class/net/e*/address":                                        c.mac + "\n",
		"ip -4 -o addr show scope global | awk '{print $4}'":                   c.ip + "/24\n",
		"ip route show default | awk '{print $3}'":                             hostAddress + "\n",
		"grep -c vm /etc/hosts":                                                "1\n",
		"grep -h . /root/.ssh/authorized_keys | grep -v '^#'":                  "ssh-ed25519 AAAA " + c.name + "\n",
		"ls -d /*/log/journal/" + m.cfg.GetMachineId():                         "",
		"journalctl -o cat -t banger-agent | tail -1":                          "This machine was restored from memory and is now " + c.name + "\n",
		"cmp /run/banger/boot_id /proc/sys/kernel/random/boot_id && echo same": "same\n",
	} {
		if got := m.shell(ctx, script+" 2>/dev/null || true"); got != want {
			m.t.Errorf("%s: %q, want %q", script, got, want)
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
