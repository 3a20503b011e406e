package hostnet

import (
	"net/netip"
	"strings"
)

// resolvConfs are read in this order until one names a server that is not the host's own: a local
// resolver listens on a loopback address that means something else inside a guest, and says
// elsewhere whom it asks (resolved.conf(5), NetworkManager.conf(5)).
var resolvConfs = []string{
	"/etc/resolv.conf",
	"/run/systemd/resolve/resolv.conf",
	"/run/NetworkManager/no-stub-resolv.conf",
}

// maxNameservers is how many servers resolv.conf(5) may name.
const maxNameservers = 3

// Nameservers returns the IPv4 name servers that guests can use, at most three; read is os.ReadFile
// or a stand-in. IPv6 servers are left out, for guests have no IPv6. A host that names no usable
// server, or has no such file, gives none: guests then resolve no names.
func Nameservers(read func(path string) ([]byte, error)) []netip.Addr {
	for _, path := range resolvConfs {
		text, err := read(path)
		if err != nil {
			continue // this host has no such resolver
		}
		if servers := parseResolvConf(string(text)); len(servers) > 0 {
			return servers
		}
	}
	return nil
}

func parseResolvConf(text string) []netip.Addr {
	var servers []netip.Addr
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(fields[1])
		if err != nil || !a.Is4() || a.IsLoopback() || a.IsUnspecified() {
			continue
		}
		if servers = append(servers, a); len(servers) == maxNameservers {
			break
		}
	}
	return servers
}
