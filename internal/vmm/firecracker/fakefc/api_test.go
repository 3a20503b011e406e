package fakefc_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/vmm/firecracker/fctest"
)

// step is a request and what is answered: the status, and words of the body in any case of letters. A 2xx without words has
// no body that counts.
type step struct {
	request string
	status  int
	words   []string
}

// scripts are run each on a process of its own, where the files kernel, disk and empty are.
var scripts = map[string][]step{
	"router": {
		{"GET /nope", 400, words("Invalid request method and/or path: GET nope.")},
		{"GET /version?x=1", 400, words("GET version?x=1")},
		{"PUT /version {}", 400, words("invalid request method")},
		{"GET /version {}", 400, words("GET", "cannot have a body")},
		{"GET //version/and/more", 200, words("firecracker_version")},
		{"PUT /machine-config", 400, words("empty PUT request")},
		{"PUT /nope", 400, words("empty PUT request")},
		{"PATCH /vm", 400, words("empty PATCH request")},
		{"PATCH /machine-config {}", 400, words("empty PATCH request")},
		{"DELETE /drives/a {}", 400, words("empty delete request")},
		{"DELETE /nope", 400, words("invalid request method")},
		{"PUT /drives/ {}", 400, words("ID cannot be empty")},
		{"PUT /drives {}", 400, words("ID cannot be empty")},
		{"PUT /drives/a-b {}", 400, words("alphanumeric characters and underscores")},
		{"PUT /drives/ä {}", 400, words("missing field")},
		{`PUT /drives/a {"drive_id":"b","is_root_device":false,"path_on_host":"disk"}`, 400, words("does not match")},
		{`PUT /network-interfaces/a {"iface_id":"b","host_dev_name":"x"}`, 400, words("[a]", "[b]")},
		{"PUT /snapshot {}", 400, words("missing snapshot operation type")},
		{"PUT /snapshot/x {}", 400, words("PUT /snapshot/x")},
		{"GET /balloon/x", 400, words("Unrecognized GET request path `x`")},
		{"PUT /mmds/x {}", 400, words("Unrecognized PUT request path `x`")},
		{"PUT /hotplug/x {}", 400, words("invalid request method")},
	},
	"json": {
		{"PUT /machine-config {}", 400, words("missing field `vcpu_count` at line 1 column 2.")},
		{"PUT /machine-config [", 400, words("deserializing the json body")},
		{"PUT /machine-config 5", 400, words("invalid type: integer `5`")},
		{`PUT /machine-config {"vcpu_count":2.0,"mem_size_mib":128}`, 400, words("floating point `2.0`, expected u8 at line 1 column 17")},
		{`PUT /machine-config {"vcpu_count":"2","mem_size_mib":128}`, 400, words("invalid type: string", "expected u8")},
		{`PUT /machine-config {"vcpu_count":300,"mem_size_mib":128}`, 400, words("invalid value: integer `300`")},
		{`PUT /machine-config {"vcpu_count":-1,"mem_size_mib":128}`, 400, words("invalid value: integer `-1`")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128,"smt":null}`, 400, words("invalid type: null, expected a boolean")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128,"x":1}`, 400, words("unknown field `x`, expected one of `vcpu_count`, `mem_size_mib`", "column 38")},
		{`PUT /machine-config {"vcpu_count":1,"vcpu_count":1,"mem_size_mib":128}`, 400, words("duplicate field `vcpu_count` at line 1 column 28")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128} x`, 400, words("trailing characters at line 1 column 37")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128`, 400, words("EOF while parsing")},
		{`PATCH /vm {"state":"paused"}`, 400, words("unknown variant `paused`, expected `Paused` or `Resumed`")},
		{`PUT /actions {"action_type":"X"}`, 400, words("unknown variant `X`, expected one of `FlushMetrics`, `InstanceStart`")},
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk","rate_limiter":{"ops":{"size":1,"refill_time":1,"x":1}}}`, 204, nil},
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk","rate_limiter":{"x":1}}`, 400, words("unknown field `x`, expected `bandwidth` or `ops`")},
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk","cache_type":null}`, 400, words("expected value")},
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"disk","io_engine":null,"partuuid":null}`, 204, nil},
		{`PUT /metrics {"metrics_path":"m","x":1}`, 204, nil},
		{`PUT /logger {"level":"dEbUg"}`, 204, nil},
		{`PUT /logger {"level":"loud"}`, 400, words("LevelFilter")},
		{`PUT /logger {"x":1}`, 400, words("unknown field `x`")},
		{`PUT /network-interfaces/a {"iface_id":"a","host_dev_name":"x","allow_mmds_requests":true}`, 400, words("unknown field")},
		{`PUT /network-interfaces/a {"iface_id":"a","host_dev_name":"x","guest_mac":"1:2:3"}`, 400, words("MAC")},
		{`PUT /snapshot/load {"snapshot_path":"a"}`, 400, words("mem_backend")},
	},
	"before the start": {
		{"GET /", 200, words(`"state":"Not started"`, `"app_name":"Firecracker"`)},
		{`PATCH /vm {"state":"Paused"}`, 400, words("before starting")},
		{`PUT /actions {"action_type":"FlushMetrics"}`, 400, words("before starting")},
		{`PUT /actions {"action_type":"SendCtrlAltDel"}`, 400, words("before starting")},
		{`PUT /snapshot/create {"snapshot_path":"a","mem_file_path":"b"}`, 400, words("before starting")},
		{`PATCH /drives/a {"drive_id":"a","path_on_host":"disk"}`, 400, words("before starting")},
		{"DELETE /drives/a", 400, words("before starting")},
		{"GET /balloon/statistics", 400, words("before starting")},
		{"GET /hotplug/memory", 400, words("before starting")},
		{"GET /balloon", 400, words("no balloon device")},
		{`PUT /actions {"action_type":"InstanceStart"}`, 400, words("Start microvm error", "without kernel configuration")},
		{"GET /", 200, words("Not started")},
	},
	"machine": {
		{"GET /machine-config", 200, words(`"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"`)},
		{`PUT /machine-config {"vcpu_count":0,"mem_size_mib":128}`, 400, words("vCPUs")},
		{`PUT /machine-config {"vcpu_count":33,"mem_size_mib":128}`, 400, words("vCPUs")},
		{`PUT /machine-config {"vcpu_count":3,"mem_size_mib":128,"smt":true}`, 400, words("vCPUs")},
		{`PUT /machine-config {"vcpu_count":3,"mem_size_mib":128}`, 204, nil},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":0}`, 400, words("memory size")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":127,"huge_pages":"2M"}`, 400, words("memory size")},
		{`PATCH /machine-config {"mem_size_mib":256}`, 204, nil},
		{"GET /machine-config", 200, words(`"vcpu_count":3,"mem_size_mib":256`)},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128,"cpu_template":"T2"}`, 204, words("deprecated")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128}`, 204, nil},
		{"GET /machine-config", 200, words(`"cpu_template":"T2"`)},
		{`PUT /balloon {"amount_mib":300,"deflate_on_oom":true}`, 400, words("balloon")},
		{`PUT /balloon {"amount_mib":10,"deflate_on_oom":true}`, 204, nil},
		{"GET /balloon", 200, words(`"amount_mib":10`)},
		{`PUT /boot-source {"kernel_image_path":"gone"}`, 400, words("kernel file cannot be opened", "os error 2")},
		{`PUT /boot-source {"kernel_image_path":"kernel","initrd_path":"gone"}`, 400, words("initrd file", "os error 2")},
		{`PUT /boot-source {"kernel_image_path":"kernel","boot_args":"` + strings.Repeat("x", 3000) + `"}`, 400, words("command line")},
		{`PUT /boot-source {"kernel_image_path":"empty"}`, 204, nil}, // looked into at the start only
		{"GET /vm/config", 200, words(`"kernel_image_path":"empty"`, `"cpu-config":null`, `"entropy":null`)},
	},
	"drives": {
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"gone"}`, 400, words("backing file", "os error 2")},
		{`PUT /drives/a {"drive_id":"a","is_root_device":false}`, 400, words("invalid block config")},
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"empty"}`, 204, nil},
		{`PUT /drives/b {"drive_id":"b","is_root_device":true,"path_on_host":"disk","is_read_only":true}`, 204, nil},
		{`PUT /drives/c {"drive_id":"c","is_root_device":true,"path_on_host":"disk"}`, 400, words("root block device already")},
		{`PUT /drives/b {"drive_id":"b","is_root_device":true,"path_on_host":"disk","cache_type":"Writeback"}`, 204, nil},
		{"GET /vm/config", 200, words(`"drives":[{"drive_id":"b"`, `{"drive_id":"a"`, `"cache_type":"Writeback"`, `"io_engine":"Sync"`)},
		{`PUT /drives/d {"drive_id":"d","is_root_device":false,"path_on_host":"."}`, 400, words("backing file")},
	},
	"vsock and others": {
		{`PUT /vsock {"guest_cid":3,"uds_path":"v.sock"}`, 204, nil},
		{`PUT /vsock {"guest_cid":3,"uds_path":"w.sock"}`, 204, nil},
		{`PUT /vsock {"guest_cid":3,"uds_path":"disk"}`, 400, words("host-side Unix socket", "os error 98")},
		{`PUT /vsock {"guest_cid":3,"uds_path":"x.sock","vsock_id":"x"}`, 204, words("deprecated")},
		{"PUT /entropy {}", 204, nil},
		{`PUT /entropy {"rate_limiter":null}`, 204, nil},
		{`PUT /serial {"serial_out_path":"serial.log"}`, 204, nil},
		{`PUT /metrics {"metrics_path":"m"}`, 204, nil},
		{`PUT /metrics {"metrics_path":"m"}`, 400, words("metrics", "reinitialization")},
		{"GET /mmds", 200, words("{}")},
		{`PATCH /mmds {"a":1}`, 400, words("not initialized")},
		{`PUT /mmds {"a":{"b":1,"c":2}}`, 204, nil},
		{`PATCH /mmds {"a":{"b":null,"d":3}}`, 204, nil},
		{"GET /mmds", 200, words(`{"a":{"c":2,"d":3}}`)},
		{`PUT /mmds/config {"network_interfaces":[]}`, 400, words("deprecated", "list of network interface")},
		{`PUT /mmds/config {"network_interfaces":["a"],"version":"V2"}`, 400, words("network interface")},
		{`PUT /hotplug/memory {"total_size_mib":100}`, 400, nil},
		{`PUT /snapshot/load {"snapshot_path":"a","mem_file_path":"b"}`, 400, words("deprecated", "not allowed after configuring")},
		{"GET /version", 200, words("firecracker_version")}, // it lives on
	},
	"failed puts count": {
		{`PUT /drives/a {"drive_id":"a","is_root_device":false,"path_on_host":"gone"}`, 400, words("backing file")},
		{`PUT /snapshot/load {"snapshot_path":"a","mem_backend":{"backend_type":"File","backend_path":"b"}}`, 400, words("not allowed after configuring")},
	},
	"wrong kernels": {
		{`PUT /boot-source {"kernel_image_path":"empty"}`, 204, nil},
		{`PUT /actions {"action_type":"InstanceStart"}`, 400, words("kernel image")},
		{`PUT /boot-source {"kernel_image_path":"disk"}`, 204, nil},
		{`PUT /actions {"action_type":"InstanceStart"}`, 400, words("kernel image", "invalid")}, // 1.17 says bzImage, not ELF
		{"GET /", 200, words("Not started")},
		{`PUT /boot-source {"kernel_image_path":"kernel"}`, 204, nil},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":1099511627776}`, 204, nil},
		{`PUT /actions {"action_type":"InstanceStart"}`, 400, words("mmap region", "os error 12")},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":128}`, 204, nil},
		{`PUT /boot-source {"kernel_image_path":"kernel","initrd_path":"initrd"}`, 204, nil},
		{`PUT /machine-config {"vcpu_count":1,"mem_size_mib":1}`, 204, nil},
		{`PUT /actions {"action_type":"InstanceStart"}`, 400, nil},
	},
}

func words(w ...string) []string { return w }

// TestScripts holds the fake to what is documented, and what is written here to the real one.
func TestScripts(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		for name, steps := range scripts {
			t.Run(name, func(t *testing.T) {
				p := serve(t, files(t), f.path)
				for _, s := range steps {
					s.check(t, p.ask(s.request))
				}
			})
		}
	})
}

func (s step) check(t *testing.T, got answer) {
	t.Helper()
	if got.status != s.status {
		t.Errorf("%.100s: status %d, want %d: %s", s.request, got.status, s.status, got.body)
	}
	deprecated := false
	for _, w := range s.words {
		if w == "deprecated" {
			deprecated = true
			continue
		}
		if !strings.Contains(strings.ToLower(got.body), strings.ToLower(w)) {
			t.Errorf("%.100s: %q lacks %q", s.request, got.body, w)
		}
	}
	if got.deprecated != deprecated {
		t.Errorf("%.100s: deprecated is %t", s.request, got.deprecated)
	}
	if s.status == 400 && !strings.HasPrefix(got.body, `{"fault_message":"`) {
		t.Errorf("%.100s: %q is no fault message", s.request, got.body)
	}
}

// files makes a directory with what scripts name.
func files(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"kernel": fctest.Kernel(), "disk": make([]byte, 1<<20), "empty": nil, "initrd": make([]byte, 1<<20),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const (
	head     = "\r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
	jsonHead = head + "Content-Type: application/json\r\n"
)

// broken is the answer to what is no request.
func broken(text string) string {
	body := fmt.Sprintf("{ \"error\": \"%s\nAll previous unanswered requests will be dropped.\" }", text)
	return fmt.Sprintf("HTTP/1.1 400 %sContent-Length: %d\r\n\r\n%s", jsonHead, len(body), body)
}

// TestBytes compares what goes over the wire, byte by byte.
func TestBytes(t *testing.T) {
	const entropy = "PUT /entropy HTTP/1.1\r\nContent-Length: 2\r\n"
	const version = "<the version>"
	cases := map[string]struct {
		parts []string
		want  string
	}{
		"no content":      {words(entropy + "\r\n{}"), "HTTP/1.1 204 " + head + "\r\n"},
		"content":         {words("GET /version HTTP/1.0\r\n\r\n"), version},
		"two at once":     {words("GET /version HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n"), version + version},
		"in pieces":       {words("GET /ver", "sion HTTP/1.1\r", "\n\r\n"), version},
		"body in pieces":  {words(entropy+"\r\n{", "}"), "HTTP/1.1 204 " + head + "\r\n"},
		"expect":          {words(entropy+"Expect: 100-continue\r\n\r\n", "{}"), "HTTP/1.1 100 " + head + "\r\nHTTP/1.1 204 " + head + "\r\n"},
		"method":          {words("POST / HTTP/1.1\r\n\r\n"), broken("Invalid HTTP Method: Unsupported HTTP method.")},
		"all is dropped":  {words("POST / HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n"), broken("Invalid HTTP Method: Unsupported HTTP method.")},
		"and it goes on":  {words("POST / HTTP/1.1\r\n\r\n", "GET /version HTTP/1.1\r\n\r\n"), broken("Invalid HTTP Method: Unsupported HTTP method.") + version},
		"version":         {words("GET / HTTP/2.0\r\n\r\n"), broken("Invalid HTTP Version: Unsupported HTTP version.")},
		"chunked":         {words("PUT /entropy HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"), broken("Invalid request.")},
		"length":          {words("PUT /entropy HTTP/1.1\r\nContent-Length: x\r\n\r\n"), broken("Invalid header. Reason: Invalid value. Key:Content-Length; Value: x")},
		"header":          {words("GET / HTTP/1.1\r\nfoo\r\n\r\n"), broken("Invalid header. Reason: Header is incorrectly formatted. Key: foo")},
		"identity":        {words("GET / HTTP/1.1\r\nAccept-Encoding: identity;q=0\r\n\r\n"), broken("Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:identity;q=0")},
		"unknown headers": {words("GET /version HTTP/1.1\r\nX: y\r\naccept: text/plain\r\nCONTENT-LENGTH: 0\r\n\r\n"), version},
		"too large": {
			words("PUT /entropy HTTP/1.1\r\nContent-Length: 51201\r\n\r\n"),
			broken("Request payload with size 51201 is larger than the limit of 51200 allowed by server."),
		},
		"as large as may be": {
			words("PUT /entropy HTTP/1.1\r\nContent-Length: 51200\r\n\r\n{" + strings.Repeat(" ", 51198) + "}"),
			"HTTP/1.1 204 " + head + "\r\n",
		},
	}
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path)
		body := fmt.Sprintf(`{"firecracker_version":"%s"}`, fctest.Version(t, f.path))
		answer := fmt.Sprintf("HTTP/1.1 200 %sContent-Length: %d\r\n\r\n%s", jsonHead, len(body), body)
		for name, c := range cases {
			want := strings.ReplaceAll(c.want, version, answer)
			if got := p.raw(len(want), c.parts...); got != want {
				t.Errorf("%s:\n%q, want\n%q", name, got, want)
			}
		}
		for _, long := range []string{"GET /" + strings.Repeat("x", 1100) + " HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nX: " + strings.Repeat("a", 1100) + "\r\n\r\n"} {
			if got := p.raw(1000, long); !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.Contains(got, `{ "error": "`) {
				t.Errorf("a long line: %.300q", got)
			}
		}
	})
}

// TestConnections: ten clients have a place, and the next one is told so.
func TestConnections(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path)
		for range 10 {
			defer p.place().Close()
		}
		const full = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }"
		if got := p.raw(len(full), ""); got != full {
			t.Errorf("%q", got)
		}
	})
}

// place is a connection that is served. Those closed before count until their end is noticed.
func (p *process) place() net.Conn {
	p.t.Helper()
	for end := time.Now().Add(limit); ; {
		c, err := p.dial()
		if err == nil {
			_, err = c.Write([]byte("GET /version HTTP/1.1\r\n\r\n"))
		}
		b := make([]byte, 4<<10)
		n := 0
		if err == nil {
			n, err = c.Read(b)
		}
		switch {
		case err == nil && strings.HasPrefix(string(b[:n]), "HTTP/1.1 200 "):
			return c
		case time.Now().After(end):
			p.t.Fatalf("no place: %v, %q", err, b[:n])
		}
		if c != nil {
			_ = c.Close()
		}
	}
}
