package daemon

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/server"
	"banger/internal/vm"
)

func load(t *testing.T, text string) (settings, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return loadConfig(path)
}

func TestConfigDefaults(t *testing.T) {
	missing, err := loadConfig(filepath.Join(t.TempDir(), "config.toml"))
	if err != nil {
		t.Fatal(err)
	}
	empty, err := load(t, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []settings{missing, empty} {
		d := s.defaults
		if d.VMM != "auto" || d.MemoryBytes != 1<<30 || d.WorkDiskBytes != 4<<30 || !d.NAT || d.Units != vm.UnitsFast {
			t.Errorf("defaults are %+v", d)
		}
		if s.bridge != "banger0" || s.subnet.IsValid() || s.bootTimeout != 3*time.Minute || s.logLevel != slog.LevelInfo {
			t.Errorf("settings are %+v", s)
		}
	}
}

func TestConfigValues(t *testing.T) {
	s, err := load(t, `
cpus = 1
memory = "512M"
boot_timeout = "90s"
log_level = "debug"
mirror = "http://mirror.example/debian"
[network]
bridge = "banger7"
subnet = "10.213.0.0/16"
nat = false
tap_pool = 0
host_services = true
[firecracker]
binary = "/opt/firecracker"
jailer = true
`)
	if err != nil {
		t.Fatal(err)
	}
	if s.firecracker != (FirecrackerConfig{Binary: "/opt/firecracker", Jailer: true}) {
		t.Errorf("firecracker is %+v", s.firecracker)
	}
	if s.defaults.CPUs != 1 || s.defaults.MemoryBytes != 512<<20 || s.defaults.NAT || s.bootTimeout != 90*time.Second ||
		s.logLevel != slog.LevelDebug || s.mirror != "http://mirror.example/debian" || s.bridge != "banger7" || s.subnet.String() != "10.213.0.0/16" || s.tapPool != 0 || !s.policy.HostServices || s.policy.LinkLocal || s.defaults.DiskBytes != 4<<30 {
		t.Errorf("settings are %+v", s)
	}
}

func TestConfigMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"cpus = 2\ncolour = 1\n":                     `config.toml:2: unknown key "colour"`,
		"[network]\n\nname = 1\n":                    `config.toml:3: unknown key "network.name"`,
		"cpus = \"two\"\n":                           "config.toml:1:",
		"vmm = \"vbox\"\n":                           "vmm: \"vbox\" is no VMM",
		"[firecracker]\nbinary = \"fc\"\n":           "firecracker.binary: \"fc\" is no absolute path",
		"cpus = \n":                                  "config.toml:1:",
		"memory = \"lots\"\n":                        "memory:",
		"boot_timeout = \"soon\"\n":                  `boot_timeout: "soon" is no time limit`,
		"stop_timeout = \"2h\"\n":                    "stop_timeout:",
		"log_level = \"loud\"\n":                     "log_level:",
		"mirror = \"deb.debian.org\"\n":              "mirror:",
		"mirror = \"ftp://x/debian\"\n":              "mirror:",
		"mirror = \"http://x/a b\"\n":                "mirror:",
		"[network]\nbridge = \"eth0\"\n":             "network.bridge:",
		"[network]\nsubnet = \"8.8.0.0/16\"":         "network.subnet:",
		"[network]\nsubnet = \"172.30.0.0\"":         "network.subnet:",
		"[network]\nsubnet = \"10.0.0.1/30\"":        "network.subnet:",
		"[network]\ntap_pool = 65\n":                 "network.tap_pool:",
		"[network]\nbridge = \"banger-of-mine-0\"\n": "network.bridge:",
		"[network]\nsubnet = \"10.0.0.0/30\"\n":      "network.subnet:",
	} {
		_, err := load(t, text)
		if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), want) || fault.HintOf(err) == "" {
			t.Errorf("%q gives %v (hint %q), want a usage fault with %q", text, err, fault.HintOf(err), want)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("cpus = 2\n[network]\nnat = true\n"))
	f.Add([]byte("memory = \"1G\"\nmemory = 3"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, err := load(t, string(text)); err != nil && fault.KindOf(err) != fault.Usage {
			t.Errorf("%q: %v", text, err)
		}
	})
}

// Where the file names an image and a kernel is known, so that whoever chooses another default can be told.
func TestConfigSaysWhereItNamesDefaults(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte("cpus = 1\n\nimage = 'box'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := loadConfig(path)
	if want := (server.Named{Image: path + ":3"}); err != nil || s.named != want {
		t.Errorf("%+v, %v; want %+v", s.named, err, want)
	}
}
