package adopt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// What is held is written down, so that an agent that dies leaves no guest that stands still for ever. The first line says
// for what, the second in which machine; then come the control groups, each before it is told to stand still.

const (
	recordFile = "held" // below Dir

	forTemplate = "template"
	forCopy     = "copy"
)

func (g *Guest) record() string { return filepath.Join(g.Dir, recordFile) }

// begin writes down that programs are about to stand still.
func (g *Guest) begin(purpose, machine string) error {
	return os.WriteFile(g.record(), []byte(purpose+"\n"+machine+"\n"), 0o600)
}

// note adds a control group to the record.
func (g *Guest) note(group string) error {
	f, err := os.OpenFile(g.record(), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(group + "\n")
	return errors.Join(err, f.Close())
}

// end removes the record: all run.
func (g *Guest) end() error {
	err := os.Remove(g.record())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// TakeOver looks after what an agent held that died. A copy's programs run on; a guest that is not the one it was, or a
// template, goes on standing still, for Adopt: nothing runs in it as somebody else.
func (g *Guest) TakeOver() error {
	left, err := g.left()
	if left == nil || err != nil {
		return err
	}
	var disks []*os.File
	for _, dir := range g.Disks { // one that is dead keeps neither the others nor programs standing still
		files, dead := writable([]string{dir})
		disks, err = append(disks, files...), errors.Join(err, dead)
	}
	g.starting.Lock()
	g.turn.Lock()
	defer g.turn.Unlock()
	g.held = &held{
		thaw: func() error { return g.Thaw(left.groups) }, end: func() {},
		since: time.Now(), machine: left.machine, disks: disks,
	}
	if g.elsewhere(left) {
		return err
	}
	return errors.Join(err, g.release())
}

// Guard is TakeOver for who waits beside the agent until it dies: it lets go, or leaves that to the next agent.
func (g *Guest) Guard() error {
	if left, err := g.left(); left == nil || err != nil || g.elsewhere(left) {
		return err
	}
	return g.TakeOver()
}

// leftover is what a record says.
type leftover struct {
	purpose, machine string
	groups           []string
}

// left reads the record; nil: nothing is held.
func (g *Guest) left() (*leftover, error) {
	text, err := os.ReadFile(g.record())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	if len(lines) < 2 { // it died before it held anything
		return &leftover{purpose: forCopy, machine: g.Machine()}, nil
	}
	return &leftover{lines[0], lines[1], lines[2:]}, nil
}

// elsewhere tells whether what is held must stay so until somebody says who this guest is.
func (g *Guest) elsewhere(l *leftover) bool {
	return l.purpose == forTemplate || l.machine != g.Machine()
}

// Serials tells this machine from one that was restored as another VM from its memory: its disks answer with other serial
// numbers, and they are asked at each look. Empty where disks have none.
func Serials() string {
	files, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return ""
	}
	var serials []string
	for _, name := range files {
		if b, err := os.ReadFile(name); err == nil {
			serials = append(serials, fmt.Sprintf("%q", strings.TrimSpace(string(b))))
		}
	}
	return strings.Join(serials, " ")
}
