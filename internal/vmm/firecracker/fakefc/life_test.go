package fakefc_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
)

// steps runs requests in order.
func (p *process) steps(steps ...step) {
	p.t.Helper()
	for _, s := range steps {
		s.check(p.t, p.ask(s.request))
	}
}

// says waits until a file of the process has a text.
func (p *process) says(name, text string) {
	p.t.Helper()
	for end := time.Now().Add(limit); !strings.Contains(p.read(name), text); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			p.t.Fatalf("%s lacks %q:\n%.2000s", name, text, p.read(name))
		}
	}
}

const toSerial = `PUT /serial {"serial_out_path":"serial.log"}`

func TestLife(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path, "--id", "web-1", "--log-path", "vmm.log", "--metrics-path", "metrics.log")
		p.must(
			toSerial, f.guest(p, fctest.Count), `PUT /vsock {"guest_cid":3,"uds_path":"v.sock"}`,
			`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk"}`, "PUT /entropy {}", start)
		p.steps(
			step{"GET /", 200, words(`"id":"web-1","state":"Running"`)},
			step{start, 400, words("after starting")},
			step{f.guest(p, fctest.Count), 400, words("after starting")},
			step{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128}`, 400, words("after starting")},
			step{`PUT /vsock {"guest_cid":3,"uds_path":"w.sock"}`, 400, words("after starting")},
			step{"PUT /entropy {}", 400, words("after starting")},
			step{`PUT /logger {"level":"Info"}`, 400, words("after starting")},
			step{toSerial, 400, words("after starting")},
			step{load, 400, words("after starting")},
			step{"GET /mmds", 400, words("not initialized")},
			step{"GET /balloon", 400, words("device not found")},
			step{create, 400, words("unavailable while running")},
			step{`PUT /drives/b {"drive_id":"b","is_root_device":false,"path_on_host":"disk"}`, 400, words("PCI is not enabled")},
			step{"DELETE /drives/a", 400, words("PCI is not enabled")},
			step{`PATCH /drives/a {"drive_id":"a","path_on_host":"initrd"}`, 204, nil},
			step{`PATCH /drives/a {"drive_id":"a","path_on_host":"gone"}`, 400, words("os error 2")},
			step{`PATCH /drives/a {"drive_id":"a","is_read_only":true}`, 400, words("unknown field")},
			step{`PATCH /drives/z {"drive_id":"z","path_on_host":"disk"}`, 400, nil},
			step{`PUT /actions {"action_type":"FlushMetrics"}`, 204, nil},
			step{resume, 204, nil}, step{pause, 204, nil}, step{pause, 204, nil},
			step{"GET /", 200, words("Paused")},
			step{create, 204, nil},
			step{"GET /", 200, words("Paused")},
			step{resume, 204, nil},
			step{"GET /vm/config", 200, words(`"path_on_host":"initrd"`, `"uds_path":"v.sock"`, `"entropy":{"rate_limiter":null}`)},
		)
		if info, err := os.Stat(filepath.Join(p.dir, "memory")); err != nil || info.Size() != 128<<20 {
			t.Errorf("the memory file: %v, %v", info, err)
		}
		p.says("vmm.log", "[web-1:")
		line, _, _ := strings.Cut(p.read("metrics.log"), "\n")
		if got := map[string]any{}; json.Unmarshal([]byte(line), &got) != nil || got["utc_timestamp_ms"] == nil {
			t.Errorf("metrics: %.200q", line)
		}
		if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if code := p.ended(); code != -int(syscall.SIGTERM) {
			t.Errorf("it ended with %d", code)
		}
		for _, left := range []string{socket, "v.sock"} {
			if info, err := os.Lstat(filepath.Join(p.dir, left)); err != nil || info.Mode()&os.ModeSocket == 0 {
				t.Errorf("%s is not left: %v", left, err)
			}
		}
	})
}

// TestPCI: with a PCI bus, devices come and go; boots are as without.
func TestPCI(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path, "--enable-pci")
		p.must(f.guest(p, fctest.Count), `PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk"}`, start)
		p.steps(
			step{"DELETE /drives/z", 400, words("not found")},
			step{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk"}`, 400, words("in use")},
			step{`PUT /drives/b {"drive_id":"b","is_root_device":true,"path_on_host":"disk"}`, 400, nil},
			step{`PUT /drives/b {"drive_id":"b","is_root_device":false,"path_on_host":"gone"}`, 400, words("os error 2")},
			step{`PUT /drives/b {"drive_id":"b","is_root_device":false,"path_on_host":"disk"}`, 204, nil},
			step{`PUT /drives/b {"drive_id":"b","is_root_device":false,"path_on_host":"disk"}`, 400, words("in use")},
			step{"GET /vm/config", 200, words(`{"drive_id":"b"`)},
			step{"DELETE /drives/b", 204, nil},
			step{"DELETE /drives/b", 400, words("not found")},
			step{"DELETE /network-interfaces/z", 400, words("not found")},
			step{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128}`, 400, words("after starting")},
			step{"GET /", 200, words("Running")},
		)
	})
}

// TestBalloon: before the guest's driver is there, a balloon can be looked at and no more.
func TestBalloon(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path)
		boot := f.guest(p, fctest.Count) // which has no driver
		if !f.real {
			boot = strings.Replace(boot, "panic=1", fakefc.ArgHangBoot, 1)
		}
		p.must(boot, `PUT /balloon {"amount_mib":16,"deflate_on_oom":true,"stats_polling_interval_s":1}`, start)
		p.steps(
			step{"GET /balloon", 200, words(`"amount_mib":16,"deflate_on_oom":true,"stats_polling_interval_s":1`)},
			step{`PATCH /balloon {"amount_mib":8}`, 400, words("activ")},
			step{`PATCH /balloon {"amount_mib":8,"stats_polling_interval_s":1}`, 400, words("unknown field")},
			step{"GET /balloon/statistics", 200, words(`"target_pages":4096`, `"actual_mib":0`)},
			step{"PATCH /balloon/hinting/start", 400, nil},
		)
	})
}

// TestLimits: of bodies and of the metadata.
func TestLimits(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path, "--http-api-max-payload-size", "2000", "--mmds-size-limit", "1000")
		big := func(n int) string { return `PUT /mmds {"a":"` + strings.Repeat("x", n) + `"}` }
		p.steps(
			step{big(900), 204, nil},
			step{`PATCH /mmds {"b":"` + strings.Repeat("x", 200) + `"}`, 413, words("limit")},
			step{big(1200), 413, words("limit")},
			step{"GET /mmds", 200, words("xxx")},
		)
		if a := p.ask(big(2000)); a.status != 400 || !strings.Contains(a.body, `{ "error": "`) {
			t.Errorf("%+v", a)
		}
	})
}

// TestCreateFails: a snapshot that cannot be written leaves the machine as it was.
func TestCreateFails(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path)
		if err := os.Mkdir(filepath.Join(p.dir, "full"), 0o700); err != nil {
			t.Fatal(err)
		}
		fill(t, filepath.Join(p.dir, "full"))
		p.must(f.guest(p, fctest.Count), start, pause)
		p.steps(
			step{`PUT /snapshot/create {"snapshot_path":"gone/state","mem_file_path":"memory"}`, 400, words("os error 2")},
			step{`PUT /snapshot/create {"snapshot_path":"state","mem_file_path":"gone/memory"}`, 400, words("os error 2")},
			step{`PUT /snapshot/create {"snapshot_path":"full/state","mem_file_path":"full/memory"}`, 400, words("os error 28")},
			step{`PUT /snapshot/create {"snapshot_path":"state","mem_file_path":"full/memory"}`, 400, words("os error 28")},
			step{`PUT /snapshot/create {"snapshot_path":"state","mem_file_path":"memory","version":"1.0.0"}`, 400, words("unknown field")},
			step{create, 204, nil},
			step{resume, 204, nil},
			step{"GET /", 200, words("Running")},
		)
	})
}

// fill puts a file system without room there.
func fill(t *testing.T, dir string) {
	t.Helper()
	need.Root(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the disk does not fill")
	}
}

func TestGuestsEnd(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		for name, c := range map[string]struct {
			ending       fctest.Ending
			codes        []int
			console, log string
		}{
			"panic":        {fctest.Panic, []int{0}, "Kernel panic - not syncing", "exit_code=0"},
			"triple fault": {fctest.TripleFault, []int{1, 0}, "", "Received KVM_EXIT_"}, // 0: see guest.tripleFault
		} {
			t.Run(name, func(t *testing.T) {
				p := serve(t, files(t), f.path, "--log-path", "vmm.log")
				p.must(toSerial, f.guest(p, c.ending), start)
				if code := p.ended(); !slices.Contains(c.codes, code) {
					t.Errorf("code %d, want %d", code, c.codes)
				}
				if !strings.Contains(p.read("serial.log"), c.console) {
					t.Errorf("the console: %q", p.read("serial.log"))
				}
				if !strings.Contains(p.read("vmm.log"), c.log) {
					t.Errorf("the log: %.2000s", p.read("vmm.log"))
				}
			})
		}
	})
}

// TestKeys: a guest that heeds the keyboard ends by it, and not while it is paused.
func TestKeys(t *testing.T) {
	const keys = `PUT /actions {"action_type":"SendCtrlAltDel"}`
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path)
		p.must(toSerial, f.guest(p, fctest.Count), start)
		p.says("serial.log", map[bool]string{true: fctest.Tick, false: "login:"}[f.real])
		p.must(pause, keys)
		p.steps(step{"GET /", 200, words("Paused")})
		p.must(resume)
		if code := p.ended(); code != 0 {
			t.Errorf("code %d", code)
		}
		if !strings.Contains(p.read("serial.log"), "reboot: Restarting system") {
			t.Errorf("the console: %.2000s", p.read("serial.log"))
		}
	})
}

// saved makes a snapshot in a directory and returns that.
func saved(t *testing.T, f target) string {
	t.Helper()
	p := serve(t, files(t), f.path)
	p.must(
		toSerial, f.guest(p, fctest.Count), `PUT /vsock {"guest_cid":3,"uds_path":"v.sock"}`,
		`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk"}`, start)
	p.says("serial.log", map[bool]string{true: fctest.Tick + "00000003", false: "login:"}[f.real])
	p.must(pause, create)
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.ended()
	return p.dir
}

// clone makes another directory with the same names in it.
func clone(t *testing.T, from string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"state", "memory", "disk"} {
		if err := os.Link(filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestLoad(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		from := saved(t, f)
		for name, c := range map[string]struct {
			spoil func(p *process)
			load  string
			words []string // of the error; nil: it works
			lives bool     // after the error
		}{
			"elsewhere": {load: load},
			"paused":    {load: strings.Replace(load, "true", "false", 1)},
			"old style": {load: `PUT /snapshot/load {"snapshot_path":"state","mem_file_path":"memory"}`},
			"override":  {load: strings.Replace(load, "true}", `true,"vsock_override":{"uds_path":"other.sock","x":1}}`, 1)},
			"logged": {spoil: func(p *process) {
				p.must(`PUT /logger {"level":"Debug"}`, `PUT /metrics {"metrics_path":"m"}`, toSerial)
			}, load: load},
			"with data": {spoil: func(p *process) { p.must(`PUT /mmds {"a":1}`) }, load: load},
			"configured": {
				spoil: func(p *process) { p.must("PUT /entropy {}") }, load: load, words: words("not allowed after configuring"), lives: true,
			},
			"wrong body":     {load: `PUT /snapshot/load {"snapshot_path":"state"}`, words: words("mem_backend"), lives: true},
			"both memories":  {load: strings.Replace(load, `"state"`, `"state","mem_file_path":"memory"`, 1), words: words("mem_"), lives: true},
			"no state":       {spoil: func(p *process) { p.remove("state") }, load: load, words: words("snapshot file", "os error 2")},
			"short state":    {spoil: func(p *process) { p.replace("state", nil) }, load: load, words: words("snapshot")},
			"damaged state":  {spoil: func(p *process) { p.damage("state") }, load: load, words: words("snapshot")},
			"no memory":      {spoil: func(p *process) { p.remove("memory") }, load: load, words: words("guest memory", "os error 2")},
			"short memory":   {spoil: func(p *process) { p.replace("memory", make([]byte, 1<<20)) }, load: load, words: words("guest memory", "file offset")},
			"no disk":        {spoil: func(p *process) { p.remove("disk") }, load: load, words: words("backing file", "os error 2")},
			"socket in way":  {spoil: func(p *process) { p.write("v.sock", nil) }, load: load, words: words("host-side Unix socket", "os error 98")},
			"unknown device": {load: strings.Replace(load, "true}", `true,"network_overrides":[{"iface_id":"x","host_dev_name":"y"}]}`, 1), words: words("Unknown Network Device")},
			"no handler":     {load: strings.Replace(load, `"File"`, `"Uffd"`, 1), words: words("uffd")},
			"huge pages":     {load: strings.Replace(load, "true}", `true,"huge_pages":"None"}`, 1), words: words("unknown field `huge_pages`"), lives: true},
		} {
			t.Run(name, func(t *testing.T) {
				if name == "huge pages" && strings.HasPrefix(fctest.Version(t, f.path), "1.17.") {
					t.Skip("this version knows the field")
				}
				p := serve(t, clone(t, from), f.path)
				if c.spoil != nil {
					c.spoil(p)
				}
				load := step{request: c.load, status: 204}
				if c.words != nil {
					load.status, load.words = 400, c.words
				}
				if strings.Contains(c.load, `mem_file_path`) && name != "both memories" {
					load.words = append(load.words, "deprecated")
				}
				got := p.ask(c.load)
				if name == "both memories" {
					got.deprecated = false // whether is nobody's concern
				}
				load.check(t, got)
				if c.words != nil && !c.lives {
					if code := p.ended(); code != 1 {
						t.Errorf("code %d", code)
					}
					return
				}
				want := "Running"
				if c.lives {
					want = "Not started"
				} else if !strings.Contains(c.load, "resume_vm\":true") {
					want = "Paused"
				}
				p.steps(step{"GET /", 200, words(want)})
			})
		}
	})
}

func (p *process) remove(name string) {
	p.t.Helper()
	if err := os.Remove(filepath.Join(p.dir, name)); err != nil {
		p.t.Fatal(err)
	}
}

// replace puts a file of its own in the place of a link.
func (p *process) replace(name string, content []byte) {
	p.remove(name)
	p.write(name, content)
}

func (p *process) damage(name string) {
	content := []byte(p.read(name))
	content[len(content)/2] ^= 0x55
	p.replace(name, content)
}

// TestMemoryGoesOn: what a guest had in memory is there after a restore, in another directory and more than once.
func TestMemoryGoesOn(t *testing.T) {
	f := onReal(t)
	from := saved(t, f)
	for range 2 {
		p := serve(t, clone(t, from), f.path)
		p.must(toSerial, load)
		p.says("serial.log", fctest.Tick)
		first, _, _ := strings.Cut(p.read("serial.log"), "\n")
		// It was stopped somewhere in a line.
		p.says("serial.log", "\n"+fctest.Tick+"0000000")
		if strings.Contains(p.read("serial.log"), fctest.Banner) || strings.Contains(p.read("serial.log"), fctest.Tick+"00000001") {
			t.Errorf("it began anew: %q...", first)
		}
	}
}

func TestCommandLine(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		for name, c := range map[string]struct {
			args []string
			code int
			says string
		}{
			"unknown":          {words("--nope"), 153, "nope"},
			"twice":            {words("--id", "a", "--id", "b"), 153, "id"},
			"no value":         {words("--api-sock"), 153, "api-sock"},
			"stray":            {words("stray"), 153, "stray"},
			"no API":           {words("--no-api"), 153, "config-file"},
			"filters":          {words("--no-seccomp", "--seccomp-filter", "x"), 153, "seccomp"},
			"level":            {words("--api-sock", "a.sock", "--level", "loud"), 152, ""},
			"id":               {words("--api-sock", "a.sock", "--id", "a_b"), -int(syscall.SIGABRT), "panicked"},
			"number":           {words("--api-sock", "a.sock", "--http-api-max-payload-size", "x"), -int(syscall.SIGABRT), "panicked"},
			"socket there":     {words("--api-sock", "disk"), 1, "Failed to open the API socket"},
			"no such place":    {words("--api-sock", "gone/a.sock"), 1, "os error 2"},
			"socket too long":  {words("--api-sock", strings.Repeat("x", 120)), 1, "SUN_LEN"},
			"version":          {words("--version"), 0, "Firecracker v1."},
			"snapshot version": {words("--snapshot-version"), 0, "v"},
			"describe":         {words("--describe-snapshot", "disk"), 1, ""},
		} {
			t.Run(name, func(t *testing.T) {
				p := launch(t, files(t), f.path, c.args...)
				if code := p.ended(); code != c.code {
					t.Errorf("code %d, want %d", code, c.code)
				}
				if !strings.Contains(p.out.String(), c.says) {
					t.Errorf("%q lacks %q", p.out.String(), c.says)
				}
			})
		}
	})
}

// TestTAP: a TAP device has one holder, and one that is not there is made for a while.
func TestTAP(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		hosttest.NetNS(t)
		hosttest.TAP(t, "tap-x")
		const put = `PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"tap-x","guest_mac":"06:00:AC:10:00:02"}`
		one, two := serve(t, files(t), f.path), serve(t, files(t), f.path)
		one.must(put, put)
		two.steps(
			step{put, 400, words("tap", "Resource busy", "os error 16")},
			step{strings.ReplaceAll(put, "tap-x", "a-name-that-is-too-long"), 400, words("Invalid interface name")},
			step{strings.Replace(strings.ReplaceAll(put, "tap-x", "tap-y"), `"host`, `"mtu":9,"host`, 1), 400, words("mtu")},
			step{strings.ReplaceAll(put, "tap-x", "tap-y"), 204, nil},
			step{strings.ReplaceAll(strings.ReplaceAll(put, "tap-x", "tap-z"), "eth0", "eth1"), 400, words("MAC address")},
		)
		links, err := netlink.LinkList()
		if err != nil || !slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == "tap-y" }) {
			t.Errorf("links: %v, %v", links, err)
		}
	})
}

// TestOldRelease: before 1.14 logs are not made, and before 1.16 nothing is deleted.
func TestOldRelease(t *testing.T) {
	old := fctest.Faulty(t, fakefc.Faults{Version: "1.10.1"})
	for _, flag := range []string{"--log-path", "--metrics-path"} {
		p := launch(t, files(t), old, "--api-sock", socket, flag, "gone.log")
		if code := p.ended(); code != 1 {
			t.Errorf("%s: code %d", flag, code)
		}
	}
	p := serve(t, files(t), old, "--log-path", "empty")
	p.steps(
		step{`PUT /metrics {"metrics_path":"gone"}`, 400, words("os error 2")},
		step{`PUT /metrics {"metrics_path":"disk"}`, 204, nil},
		step{"PUT /serial {}", 400, words("Invalid request method and/or path: PUT serial.")},
	)
	if a := p.ask("DELETE /drives/a"); !strings.Contains(a.body, "Unsupported HTTP method") {
		t.Errorf("%+v", a)
	}
}
