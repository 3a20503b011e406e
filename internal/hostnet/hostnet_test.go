package hostnet_test

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/vm"
)

func TestAllocate(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bits := rapid.IntRange(24, 28).Draw(t, "bits")
		subnet := netip.PrefixFrom(netip.MustParseAddr("10.1.2.0"), bits)
		n := 1<<(32-bits) - 3 // without network, gateway and broadcast
		taken := map[netip.Addr]bool{}
		for range n {
			a, err := hostnet.Allocate(subnet, taken)
			if err != nil || taken[a] || !subnet.Contains(a) || a == subnet.Addr() || a == hostnet.Gateway(subnet).Addr() || !subnet.Contains(a.Next()) {
				t.Fatalf("address %s of %s: %v", a, subnet, err)
			}
			taken[a] = true
		}
		_, err := hostnet.Allocate(subnet, taken)
		if fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
			t.Fatalf("the subnet is full: %v", err)
		}
		back := rapid.IntRange(2, n+1).Draw(t, "back")
		freed := subnet.Addr()
		for range back {
			freed = freed.Next()
		}
		delete(taken, freed)
		if a, err := hostnet.Allocate(subnet, taken); err != nil || a != freed {
			t.Fatalf("address %s, %s is free: %v", a, freed, err)
		}
	})
}

func TestAllocateRefusesOddSubnets(t *testing.T) {
	for _, s := range []string{"10.0.0.0/8", "10.0.0.0/29", "8.8.0.0/16", "fd00::/64", "172.32.0.0/16"} {
		if a, err := hostnet.Allocate(netip.MustParsePrefix(s), nil); fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %s %v", s, a, err)
		}
	}
	if _, err := hostnet.Allocate(netip.Prefix{}, nil); fault.KindOf(err) != fault.Usage {
		t.Error(err)
	}
	if err := hostnet.CheckSubnet(netip.MustParsePrefix("10.1.2.3/16")); !strings.Contains(fault.HintOf(err), "10.1.0.0/16") {
		t.Errorf("host bits: %v, hint %q", err, fault.HintOf(err))
	}
}

func TestMAC(t *testing.T) {
	for id, want := range map[vm.ID]string{
		"0123abcd": "02:b6:01:23:ab:cd", "": "", "0123ABCD": "", "0123abc": "", "0123abcd0": "", "../../..": "",
	} {
		if got := hostnet.MAC(id); got != want {
			t.Errorf("MAC of %q is %q, want %q", id, got, want)
		}
	}
}

func TestCandidatesAreAllowed(t *testing.T) {
	for i, c := range hostnet.Candidates {
		if err := hostnet.CheckSubnet(c); err != nil {
			t.Error(err)
		}
		for _, other := range hostnet.Candidates[i+1:] {
			if c.Overlaps(other) {
				t.Errorf("%s overlaps %s", c, other)
			}
		}
	}
}

func TestPickSubnet(t *testing.T) {
	route := func(s, device string) hostnet.Route {
		return hostnet.Route{Destination: netip.MustParsePrefix(s), Device: device}
	}
	for _, c := range []struct {
		name   string
		routes []hostnet.Route
		want   string
		why    string
	}{
		{"nothing", nil, "172.30.0.0/16", ""},
		{"default route and a VPN for all", []hostnet.Route{route("0.0.0.0/0", "eth0"), route("128.0.0.0/1", "tun0")}, "172.30.0.0/16", ""},
		{"our own bridge", []hostnet.Route{route("172.30.0.0/16", "banger0")}, "172.30.0.0/16", ""},
		{"one host inside", []hostnet.Route{route("172.30.9.9/32", "tun0")}, "10.213.0.0/16", "172.30.9.9/32 on tun0"},
		{"a company's net around it", []hostnet.Route{route("172.16.0.0/12", "tun0"), route("10.0.0.0/8", "tun0")}, "192.168.213.0/24", "172.16.0.0/12"},
	} {
		got, why, err := hostnet.PickSubnet(hostnet.Candidates, c.routes, "banger0")
		if err != nil || got.String() != c.want || !strings.Contains(why, c.why) || (why == "") != (c.why == "") {
			t.Errorf("%s: %s %q %v", c.name, got, why, err)
		}
	}
	all := []hostnet.Route{route("172.16.0.0/12", ""), route("10.0.0.0/8", ""), route("192.168.0.0/16", "")}
	if got, _, err := hostnet.PickSubnet(hostnet.Candidates, all, "banger0"); fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("nothing is free: %s %v", got, err)
	}
}

func TestNameservers(t *testing.T) {
	const stub = "nameserver 127.0.0.53\noptions edns0\nsearch home\n"
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"plain", map[string]string{"/etc/resolv.conf": "# c\n nameserver  192.0.2.1 \nnameserver\t9.9.9.9\n"}, "192.0.2.1 9.9.9.9"},
		{"at most three", map[string]string{"/etc/resolv.conf": strings.Repeat("nameserver 9.9.9.9\n", 5)}, "9.9.9.9 9.9.9.9 9.9.9.9"},
		{"systemd-resolved", map[string]string{"/etc/resolv.conf": stub, "/run/systemd/resolve/resolv.conf": "nameserver 10.1.1.1\n"}, "10.1.1.1"},
		{"NetworkManager's dnsmasq", map[string]string{"/etc/resolv.conf": "nameserver 127.0.0.1\n", "/run/NetworkManager/no-stub-resolv.conf": "nameserver 10.2.2.2\n"}, "10.2.2.2"},
		{"IPv6 and nonsense left out", map[string]string{"/etc/resolv.conf": "nameserver fe80::1%eth0\nnameserver 2001:db8::1\nnameserver x\nnameserver\nnameserver 0.0.0.0\nnameserver 1.1.1.1"}, "1.1.1.1"},
		{"stub and nothing behind it", map[string]string{"/etc/resolv.conf": stub}, ""},
		{"no files", nil, ""},
	} {
		var got []string
		for _, a := range hostnet.Nameservers(func(path string) ([]byte, error) {
			if text, ok := c.files[path]; ok {
				return []byte(text), nil
			}
			return nil, os.ErrNotExist
		}) {
			got = append(got, a.String())
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %v, want %s", c.name, got, c.want)
		}
	}
}

func TestMessages(t *testing.T) {
	var b bytes.Buffer
	want := hostnet.Request{
		Version: hostnet.ProtocolVersion, Op: hostnet.OpSetRules, Bridge: "banger0", Instance: "a1",
		Rules: &hostnet.Rules{Guests: []hostnet.Guest{{TAP: "tap-pool-1", IP: netip.MustParseAddr("10.1.2.3"), NAT: true}}},
	}
	if err := hostnet.WriteMessage(&b, want); err != nil {
		t.Fatal(err)
	}
	var got hostnet.Request
	if err := hostnet.ReadMessage(&b, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v %v", got, err)
	}
	err := fault.New(fault.Conflict, "it is %s", "taken").WithHint("take 100%% of %s", "another")
	back := hostnet.Fail(err).Err()
	if fault.KindOf(back) != fault.Conflict || back.Error() != err.Error() || fault.HintOf(back) != err.Hint {
		t.Errorf("%v, hint %q", back, fault.HintOf(back))
	}
	if err := hostnet.WriteMessage(&b, hostnet.Response{TAPs: []string{strings.Repeat("x", 1<<20)}}); err == nil || b.Len() > 0 {
		t.Errorf("a message too long: %v, %d bytes written", err, b.Len())
	}
}

// FuzzDecode: whatever comes, a request is refused or asks for banger's things only.
func FuzzDecode(f *testing.F) {
	for _, body := range []string{
		`{"version":2,"op":"ensure_bridge","bridge":"banger0","address":"172.30.0.1/16"}`,
		`{"version":2,"op":"add_tap","bridge":"banger0","tap":"bgr-0123abcd","owner":1000,"instance":"a1"}`,
		`{"version":2,"op":"set_rules","bridge":"banger0","rules":{"guests":[{"tap":"tap-pool-0","mac":"02:b6:00:00:00:01","ip":"172.30.0.2","nat":true,"isolated":true}],"link_local":true}}`,
		`{"version":2,"op":"list_taps","bridge":"banger999"}`, `{"version":2,"op":"list_taps","bridge":"eth0"}`,
		`{"version":2,"op":"delete_tap","bridge":"banger0","tap":"bgr-../x"}`, `{"extra":1}`, `{} {}`, `[]`, `null`, ``, `{"version":1e99}`,
		`{"version":2,"op":"set_rules","bridge":"banger0","rules":{"guests":[{"tap":"eth0","ip":"fe80::1%eth0"}]}}`,
	} {
		f.Add(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	}
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, '{'})
	f.Add([]byte{0, 0, 0, 9, '{'})
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var r hostnet.Request
		if hostnet.ReadMessage(bytes.NewReader(b), &r) != nil || r.Check() != nil {
			return
		}
		if !strings.HasPrefix(r.Bridge, "banger") || len(r.Bridge) > 15 || len(r.Instance) > 32 || r.Version != hostnet.ProtocolVersion {
			t.Errorf("accepted: %+v", r)
		}
		switch r.Op {
		case hostnet.OpEnsureBridge:
			if !r.Address.Addr().IsPrivate() || !r.Address.Addr().Is4() {
				t.Errorf("accepted: %+v", r)
			}
		case hostnet.OpAddTAP, hostnet.OpDeleteTAP:
			if r.TAP == "" && r.Op == hostnet.OpAddTAP {
				return // the helper chooses
			}
			if len(r.TAP) > 15 || !strings.HasPrefix(r.TAP, "bgr-") && !strings.HasPrefix(r.TAP, "tap-pool-") {
				t.Errorf("accepted: %+v", r)
			}
		case hostnet.OpSetRules:
			if len(r.Rules.Guests) > hostnet.MaxGuests {
				t.Errorf("accepted %d guests", len(r.Rules.Guests))
			}
			for _, g := range r.Rules.Guests {
				if hostnet.CheckTAP(g.TAP) != nil || g.IP.IsValid() && (!g.IP.IsPrivate() || !g.IP.Is4()) || g.NAT && !g.IP.IsValid() {
					t.Errorf("accepted: %+v", g)
				}
			}
		}
	})
}

func TestFakePrintsItsWorld(t *testing.T) {
	f := hostnet.NewFake()
	ctx := t.Context()
	web := hostnet.Guest{MAC: "02:b6:00:00:00:01", IP: netip.MustParseAddr("172.30.0.2"), NAT: true}
	if _, err := f.Attach(ctx, "00000001", web); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a TAP without a bridge: %v", err)
	}
	address, err := f.EnsureBridge(ctx)
	if err != nil {
		t.Fatal(address, err)
	}
	for range 2 {
		if tap, err := f.Attach(ctx, "00000001", web); err != nil || tap != "tap-pool-0" {
			t.Fatal(tap, err)
		}
	}
	if _, err := f.Attach(ctx, "00000002", hostnet.Guest{TAP: "eth0"}); fault.KindOf(err) != fault.Usage {
		t.Errorf("TAP eth0: %v", err)
	}
	if got, want := f.String(), "bridge 172.30.0.1/16\ntap tap-pool-0\nnat 172.30.0.2\n"; got != want {
		t.Errorf("world:\n%swant:\n%s", got, want)
	}
	f.FailWith(func(op string) error {
		if op == "Detach" {
			return os.ErrClosed
		}
		return nil
	})
	if err := f.Detach(ctx, "00000001"); err != os.ErrClosed {
		t.Error(err)
	}
	f.FailWith(nil)
	f.Leave("bgr-00000003")
	detached := f.Detach(ctx, "00000001")
	removed, err := f.Settle(ctx, nil)
	if detached != nil || err != nil || len(removed) != 1 || f.String() != "bridge 172.30.0.1/16\n" {
		t.Errorf("removed %v, world:\n%s", removed, f)
	}
}
