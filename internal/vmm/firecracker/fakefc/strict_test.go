package fakefc

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

// FuzzDecode: what the strict reader takes, an ordinary one takes too and finds the same in; what is no JSON it refuses.
func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		`{"drive_id":"a","is_root_device":true,"path_on_host":null,"rate_limiter":{"ops":{"size":1,"refill_time":2,"x":[{}]}}}`,
		`{"drive_id":"a","drive_id":"b"}`, "{", "[]", "[1,", "5", `{"a":1}{`, `{"drive_id":"\ud800","is_root_device":false}`, " \n{}\n\n x",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var got, want drive
		err := strict{version{1, 16, 1}}.decode(body, &got)
		plain := json.Unmarshal(body, &want)
		if err == nil && (plain != nil || !reflect.DeepEqual(got, want)) {
			t.Errorf("taken: %+v, ordinarily %+v, %v", got, want, plain)
		}
	})
}

// FuzzParse: however requests are cut into pieces, they are the same; and none has a body above the limit.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"GET / HTTP/1.1\r\n\r\n", "PUT /x HTTP/1.0\r\nContent-Length: 3\r\n\r\nabcGET /y HTTP/1.1\r\n\r\n", "POST / HTTP/1.1\r\n\r\n",
		"PUT /x HTTP/1.1\r\ncontent-length:99999999999\r\n\r\n", "\r\n\r\n", "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		s := &server{version: version{1, 16, 1}, payload: 100}
		whole, rest, _, err := s.parseAll(wire)
		for _, r := range whole {
			if len(r.body) > s.payload || r.hasBody != (len(r.body) > 0) {
				t.Fatalf("%+v", r)
			}
		}
		if err != nil {
			return
		}
		var pieces []request
		var pending []byte
		for i := range wire {
			more, left, _, err := s.parseAll(append(pending, wire[i]))
			if err != nil {
				t.Fatalf("in pieces: %v", err)
			}
			pieces, pending = append(pieces, more...), left
		}
		if !reflect.DeepEqual(whole, pieces) || !bytes.Equal(rest, pending) {
			t.Fatalf("whole %+v, in pieces %+v", whole, pieces)
		}
	})
}

// TestVersions: fields, requests and flags come with the releases that brought them.
func TestVersions(t *testing.T) {
	for _, c := range []struct {
		since string
		known func(version) bool
	}{
		{"1.13.0", decodes(snapshotLoad{}, `{"snapshot_path":"a","track_dirty_pages":true}`)},
		{"1.12.0", decodes(snapshotLoad{}, `{"snapshot_path":"a","network_overrides":[]}`)},
		{"1.16.0", decodes(snapshotLoad{}, `{"snapshot_path":"a","vsock_override":{"uds_path":"b"}}`)},
		{"1.17.0", decodes(snapshotLoad{}, `{"snapshot_path":"a","huge_pages":"None"}`)},
		{"1.16.0", decodes(netInterface{}, `{"iface_id":"a","host_dev_name":"b","mtu":1500}`)},
		{"1.14.0", decodes(balloon{}, `{"amount_mib":1,"deflate_on_oom":true,"free_page_hinting":true}`)},
		{"1.16.0", decodes(serialConfig{}, `{"rate_limiter":{"size":1,"refill_time":1}}`)},
		{"1.13.0", decodes(mmdsConfig{}, `{"network_interfaces":["a"],"imds_compat":true}`)},
		{"1.14.0", routed(`PUT`, `/serial`, `{}`)},
		{"1.14.0", routed(`PUT`, `/pmem/a`, `{"id":"a","path_on_host":"b"}`)},
		{"1.16.0", routed(`DELETE`, `/drives/a`, ``)},
		{"1.13.0", func(v version) bool { _, err := parseArguments([]string{"--enable-pci"}, v); return err == nil }},
		{"1.14.4", decodes(snapshotLoad{}, `{"snapshot_path":"a","clock_realtime":true}`)},
	} {
		from := since(c.since)
		before, clock := version{1, from[1] - 1, 9}, c.since == "1.14.4"
		if clock {
			before = version{1, 15, 0} // the branch that got it later
		}
		if c.known(before) || !c.known(from) || !c.known(version{1, 17, 0}) {
			t.Errorf("%s: known before %t, then %t, later %t", c.since, c.known(before), c.known(from), c.known(version{1, 17, 0}))
		}
	}
	for text, want := range map[string]string{
		"1.7.0": "1.0.0", "1.8.0": "2.0.0", "1.10.1": "3.0.0", "1.11.0": "5.0.0", "1.12.0": "6.0.0", "1.14.4": "8.0.0", "1.15.0": "9.0.0",
		"1.16.1": "10.0.0", "1.17.0-dev": "11.0.0",
	} {
		v, err := parseVersion(text)
		if err != nil || v.format() != want {
			t.Errorf("%s: format %s, %v, want %s", text, v.format(), err, want)
		}
	}
	for _, text := range []string{"", "1", "1.x.0", "1.2.3.4", "-1.2.3"} {
		if v, err := parseVersion(text); err == nil {
			t.Errorf("%q is %s", text, v)
		}
	}
}

func decodes(body any, text string) func(version) bool {
	return func(v version) bool {
		return strict{v}.decode([]byte(text), reflect.New(reflect.TypeOf(body)).Interface()) == nil
	}
}

func routed(method, path, body string) func(version) bool {
	return func(v version) bool {
		m := &machine{version: v}
		_, err := m.find(request{method: method, path: path, body: []byte(body), hasBody: body != ""})
		return err == nil
	}
}

// TestBodies: tags say nothing that is not known.
func TestBodies(t *testing.T) {
	for name, r := range routes {
		if r.run == nil || !r.pre && !r.post && !r.hot {
			t.Errorf("%s is never answered", name)
		}
		if r.body == nil || reflect.TypeOf(r.body) == rawMessage {
			continue
		}
		body := reflect.TypeOf(r.body)
		for i := range body.NumField() {
			f := body.Field(i)
			tag := f.Tag.Get("fc")
			if f.Tag.Get("json") == "" || tag != "" && tag != "required" && tag != "since=clock" && since(tag[len("since="):]) == (version{}) {
				t.Errorf("%s: field %s has the tags %q", name, f.Name, f.Tag)
			}
		}
		if r.id && body.Field(0).Type.Kind() != reflect.String {
			t.Errorf("%s: the first field is no id", name)
		}
	}
}

func TestTrailer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "program")
	write := func(content []byte) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	program := bytes.Repeat([]byte("program"), 10)
	write(program)
	if f, err := readFaults(path); err != nil || !reflect.DeepEqual(f, Faults{}) {
		t.Errorf("a plain program: %+v, %v", f, err)
	}
	want := Faults{Version: "1.12.0", API: []APIFault{{On: "PUT", Do: Hang}}, KVM: 13}
	var b bytes.Buffer
	b.Write(program)
	if err := Append(&b, want); err != nil {
		t.Fatal(err)
	}
	write(b.Bytes())
	if f, err := readFaults(path); err != nil || !reflect.DeepEqual(f, want) {
		t.Errorf("%+v, %v", f, err)
	}
	write(nil)
	if _, err := readFaults(path); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty program: %v", err)
	}
}
