package splitdns

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"banger/internal/fault"
)

// delegates is the first version of systemd whose resolver knows dns-delegate files.
const delegates = 258

// detect finds out which resolver this host asks. What resolv.conf names decides: a resolver that runs and that nobody
// asks is of no use.
func (h Host) detect(ctx context.Context) (Method, error) {
	all := methods()
	servers := h.nameservers()
	switch {
	case h.asksResolved(servers):
		if h.systemdVersion(ctx) >= delegates {
			return all[0], nil
		}
		return all[1], nil
	case h.managerDnsmasq():
		return all[2], nil
	case h.asksDnsmasq(servers):
		return all[3], nil
	}
	return Method{}, fault.New(fault.Precondition, "this host has no resolver that can ask banger for .vm alone: %s", h.describe(servers)).
		WithHint("ssh NAME.vm works without one: banger ssh-config install. Else install systemd-resolved or dnsmasq; banger never rewrites resolv.conf")
}

func (h Host) describe(servers []string) string {
	if len(servers) == 0 {
		return "its resolv.conf names no server"
	}
	return "its resolv.conf names " + strings.Join(servers, ", ")
}

// nameservers returns what resolv.conf names.
func (h Host) nameservers() []string {
	text, err := os.ReadFile(h.path("etc/resolv.conf"))
	if err != nil {
		return nil
	}
	var servers []string
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "nameserver" {
			servers = append(servers, fields[1])
		}
	}
	return servers
}

// asksResolved tells whether names are asked of systemd-resolved: by its stub (systemd-resolved.service(8)), or by the
// C library's module.
func (h Host) asksResolved(servers []string) bool {
	for _, s := range servers {
		if s == "127.0.0.53" || s == "127.0.0.54" {
			return true
		}
	}
	if !h.exists("run/systemd/resolve/resolv.conf") {
		return false
	}
	text, err := os.ReadFile(h.path("etc/nsswitch.conf"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		if database, sources, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(database) == "hosts" {
			return strings.Contains(" "+strings.Join(strings.Fields(sources), " ")+" ", " resolve ")
		}
	}
	return false
}

// systemdVersion returns 0 when it cannot be found out.
func (h Host) systemdVersion(ctx context.Context) int {
	out, err := h.Run(ctx, "resolvectl", "--version") // "systemd 252 (252.39-1~deb12u1)"
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(out))
	if len(fields) < 2 {
		return 0
	}
	digits := strings.IndexFunc(fields[1], func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(fields[1])
	}
	version, _ := strconv.Atoi(fields[1][:digits]) // 0 on error
	return version
}

// managerDnsmasq tells whether NetworkManager runs a dnsmasq of its own.
func (h Host) managerDnsmasq() bool {
	files := h.files("usr/lib/NetworkManager/conf.d/*.conf", "run/NetworkManager/conf.d/*.conf",
		"etc/NetworkManager/NetworkManager.conf", "etc/NetworkManager/conf.d/*.conf")
	value := ""
	for _, f := range files { // the last one holds
		if v, ok := setting(f.text, "main", "dns"); ok {
			value = v
		}
	}
	return value == "dnsmasq"
}

// asksDnsmasq tells whether resolv.conf names this host, and dnsmasq reads drop-ins.
func (h Host) asksDnsmasq(servers []string) bool {
	local := false
	for _, s := range servers {
		local = local || strings.HasPrefix(s, "127.") || s == "::1"
	}
	return local && h.exists("etc/dnsmasq.d")
}

// globalServers finds servers that systemd-resolved asks for everything besides those of its links. Ours would stand
// beside them in one list, of which it asks whichever answered last, for all names: neither .vm nor the rest would be
// found reliably.
func (h Host) globalServers() error {
	files := h.files("usr/lib/systemd/resolved.conf.d/*.conf", "run/systemd/resolved.conf.d/*.conf",
		"etc/systemd/resolved.conf", "etc/systemd/resolved.conf.d/*.conf")
	for _, f := range files {
		if f.name == h.path(resolvedFile) {
			continue
		}
		if v, ok := setting(f.text, "Resolve", "DNS"); ok && v != "" {
			return fault.New(fault.Conflict, "systemd-resolved asks %s for all names (%s), and cannot ask banger for .vm alone beside that", v, f.name).
				WithHint("give these servers to a network connection instead, or use systemd 258, which can do both; ssh NAME.vm works with: banger ssh-config install")
		}
	}
	return nil
}

type file struct {
	name string
	text []byte
}

// files returns the files that the patterns match, in the patterns' order and by name.
func (h Host) files(patterns ...string) []file {
	var found []file
	for _, pattern := range patterns {
		names, err := filepath.Glob(h.path(pattern))
		if err != nil {
			continue // the patterns are constants, a root with brackets has no files
		}
		for _, name := range names {
			if text, err := os.ReadFile(name); err == nil {
				found = append(found, file{name, text})
			}
		}
	}
	return found
}

// setting returns the last value of a key in a section of an ini file.
func setting(text []byte, section, key string) (value string, ok bool) {
	current := ""
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			current = strings.Trim(line, "[]")
		case current == section:
			if k, v, found := strings.Cut(line, "="); found && strings.TrimSpace(k) == key {
				value, ok = strings.TrimSpace(v), true
			}
		}
	}
	return value, ok
}
