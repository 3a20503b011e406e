package fake

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// controlSocket is where the driver tells the process what to do: what a monitor is to QEMU.
const controlSocket = "fake-control.sock"

// controlTimeout bounds one request, a save with its knobs aside.
const controlTimeout = 5 * time.Second

// What a control request may ask for.
const (
	doPause  = "pause"
	doResume = "resume"
	doSave   = "save"
)

type request struct {
	Do  string `json:"do"`
	Dir string `json:"dir,omitempty"` // where to save
}

type reply struct {
	Error    string `json:"error,omitempty"`
	Conflict bool   `json:"conflict,omitempty"` // the machine is in the wrong state
	Full     bool   `json:"full,omitempty"`     // there is no space
}

var errState = errors.New("it is in the wrong state")

// serveControl answers one request a connection, one at a time.
func (m *guestMachine) serveControl(l net.Listener) {
	saved := false // and not resumed since
	for {
		conn, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "fake machine:", err)
			return
		}
		_ = conn.SetReadDeadline(time.Now().Add(controlTimeout)) // a deaf driver shows when it is answered
		var r request
		err = json.NewDecoder(conn).Decode(&r)
		if err == nil {
			err = m.control(r, &saved)
		}
		var answer reply
		if err != nil {
			answer = reply{Error: err.Error(), Conflict: errors.Is(err, errState), Full: errors.Is(err, syscall.ENOSPC)}
		}
		_ = json.NewEncoder(conn).Encode(answer) // who hung up does not want to know
		_ = conn.Close()
	}
}

func (m *guestMachine) control(r request, saved *bool) error {
	switch r.Do {
	case doPause:
		m.clock.Set(true)
	case doResume:
		m.clock.Set(false)
		*saved = false
	case doSave:
		switch {
		case !m.clock.Stands():
			return fmt.Errorf("%w: it runs, and can be saved when it is paused", errState)
		case *saved:
			return fmt.Errorf("%w: it was saved already and has not run since", errState)
		case m.knobs.failSave:
			return fmt.Errorf("asked for by %s: %w", ArgFailSave, syscall.ENOSPC)
		}
		time.Sleep(m.knobs.slowSave)
		if err := writeMemory(m.memory, r.Dir, m.knobs.memoryFile); err != nil {
			return err
		}
		*saved = true
	default:
		return fmt.Errorf("unknown request %q", r.Do)
	}
	return nil
}
