package fakefc

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// Faults say what the program does wrong, and which release it is. They are at the end of the program's file, see
// Append: nothing on the way to the process can lose them, neither a clean environment nor a sandbox.
type Faults struct {
	Version string        `json:"version,omitempty"` // the release; empty: DefaultVersion
	API     []APIFault    `json:"api,omitempty"`
	Vsock   string        `json:"vsock,omitempty"`  // close, silent, garbage, endless: what a CONNECT is answered with
	KVM     syscall.Errno `json:"kvm,omitempty"`    // of opening /dev/kvm
	NoTAP   bool          `json:"no_tap,omitempty"` // TAP devices are not touched: for tests without the right to
	NoAPI   bool          `json:"no_api,omitempty"` // it hangs before it listens
	Exit    int           `json:"exit,omitempty"`   // ends with this code before it listens
}

// APIFault spoils answers.
type APIFault struct {
	On    string        `json:"on"`              // method and beginning of the path: "PUT /drives"; empty: every request
	After int           `json:"after,omitempty"` // so many of them are answered before
	Do    string        `json:"do"`              // see the constants
	For   time.Duration `json:"for,omitempty"`   // of Slow
}

// What an APIFault does.
const (
	Hang      = "hang"       // never answers, nor anybody else
	Die       = "die"        // is killed before it answers
	Cut       = "cut"        // is killed within the answer
	Slow      = "slow"       // answers later
	WrongJSON = "wrong-json" // 200 with a body that is none
	Garbage   = "garbage"    // bytes that are no HTTP
	Busy      = "busy"       // 503
	Huge      = "huge"       // an error of 10 MB
	Refuse    = "refuse"     // 400
)

// DefaultVersion is the release that the program is.
const DefaultVersion = "1.16.1"

func (f Faults) version() string { return cmp.Or(f.Version, DefaultVersion) }

// hugeAnswer is the size of a Huge one.
const hugeAnswer = 10 << 20

// trailer marks the end of a program with faults, after their length.
const trailer = "fakefc-faults"

// Append writes f behind a program, which stays one.
func Append(w io.Writer, f Faults) error {
	text, err := json.Marshal(f)
	if err != nil {
		return err
	}
	end := binary.LittleEndian.AppendUint32(text, uint32(len(text)))
	_, err = w.Write(append(end, trailer...))
	return err
}

// readFaults reads what is behind the program at path; a plain program has none.
func readFaults(path string) (Faults, error) {
	var faults Faults
	f, err := os.Open(path)
	if err != nil {
		return faults, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return faults, err
	}
	end := make([]byte, 4+len(trailer))
	at := info.Size() - int64(len(end))
	if _, err := f.ReadAt(end, at); err != nil {
		return faults, err
	}
	if string(end[4:]) != trailer {
		return faults, nil
	}
	text := make([]byte, binary.LittleEndian.Uint32(end))
	if _, err := f.ReadAt(text, at-int64(len(text))); err != nil {
		return faults, err
	}
	return faults, json.Unmarshal(text, &faults)
}

// spoil answers r wrongly, if it is to be, and tells whether it did.
func (m *machine) spoil(c net.Conn, r request) bool {
	for i, f := range m.faults.API {
		if !strings.HasPrefix(r.method+" "+r.path, f.On) {
			continue
		}
		if m.asked[i]++; m.asked[i] <= f.After {
			continue
		}
		if f.Do == Slow {
			time.Sleep(f.For)
			return false
		}
		f.answer(m, c, r)
		return true
	}
	return false
}

func (f APIFault) answer(m *machine, c net.Conn, r request) {
	// Who hung up does not want to know: no error of a write matters.
	switch f.Do {
	case Hang:
		time.Sleep(time.Hour)
	case Die:
		die()
	case Cut:
		a, _ := m.answer(r)
		text := a.bytes()
		_, _ = c.Write(text[:len(text)/2])
		die()
	case WrongJSON:
		_, _ = c.Write(response{status: 200, body: []byte(`{"firecracker_version": 5, "state": [`)}.bytes())
	case Garbage:
		_, _ = c.Write([]byte("\x00\xff\x1b[2Jno answer at all\r\n\r\n"))
	case Busy:
		_, _ = io.WriteString(c, fullAnswer)
		_ = c.Close()
	case Huge:
		_, _ = c.Write(faultMessage(failure(strings.Repeat("x", hugeAnswer))).bytes())
	case Refuse:
		_, _ = c.Write(faultMessage(fail("Refused for a test.")).bytes())
	default:
		panic("unknown fault " + f.Do)
	}
}

// die is a death by SIGKILL: nothing is written any more.
func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// spoil answers a CONNECT wrongly, if it is to be.
func (v *vsock) spoil(c net.Conn) bool {
	switch v.m.faults.Vsock {
	case "":
		return false
	case "silent":
	case "garbage":
		_, _ = fmt.Fprintf(c, "\x00\xffHTTP/1.1 200 OK\r\n\r\n")
	case "endless":
		for line := bytes.Repeat([]byte("OK"), 4096); ; {
			if _, err := c.Write(line); err != nil {
				_ = c.Close()
				break
			}
		}
	default:
		panic("unknown fault of vsock " + v.m.faults.Vsock)
	}
	return true
}
