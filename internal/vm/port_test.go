package vm

import (
	"strings"
	"testing"

	"banger/internal/fault"
)

func TestParsePort(t *testing.T) {
	for text, want := range map[string]string{
		"8080:80": "127.0.0.1:8080:80", "3000": "127.0.0.1:3000:3000", "127.0.0.1:8080:80": "127.0.0.1:8080:80",
		"0.0.0.0:8080:80/tcp": "0.0.0.0:8080:80", "[::1]:8080:80": "[::1]:8080:80", " 1:65535 ": "127.0.0.1:1:65535",
	} {
		p, err := ParsePort(text)
		if err != nil || p.String() != want {
			t.Errorf("%q gives %v, %v, want %s", text, p, err, want)
		}
	}
	for _, text := range []string{
		"", ":", "80:", ":80", "0:80", "80:0", "65536:1", "-1:2", "a:b", "1:2:3", "1.2.3.4:80", "[::1:80:80", "::1:80:80",
		"8080:80/udp", "fe80::1%eth0:1:2", "[fe80::1%eth0]:1:2", "host:80:80", "1:2:3:4:5", strings.Repeat("9", 100),
	} {
		if p, err := ParsePort(text); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
			t.Errorf("%q gives %v, %v", text, p, err)
		}
	}
}

func TestCheckPorts(t *testing.T) {
	port := func(text string) Port {
		p, err := ParsePort(text)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := CheckPorts([]Port{port("80:80"), port("81:80"), port("127.0.0.2:80:80")}); err != nil {
		t.Error(err)
	}
	for _, bad := range [][]Port{{port("80:80"), port("127.0.0.1:80:81")}, {{}}, make([]Port, MaxPorts+1)} {
		if err := CheckPorts(bad); fault.KindOf(err) != fault.Usage {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

func FuzzParsePort(f *testing.F) {
	f.Add("127.0.0.1:8080:80")
	f.Add("[::1]:1:2/tcp")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePort(text)
		if err != nil {
			return
		}
		again, err := ParsePort(p.String())
		if err != nil || again != p {
			t.Errorf("%q is read as %s, and that as %s, %v", text, p, again, err)
		}
	})
}
