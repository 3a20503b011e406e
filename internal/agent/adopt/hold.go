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
// for what, the second in which machine; then come the control groups, each before it is told to stand still; in a
// template's clone that it knows who it is; and in another copy, before it becomes itself, the machine id of its source.

const (
	recordFile = "held" // below Dir

	forTemplate = "template"
	forCopy     = "copy"

	toldLine = "told"
	wasLine  = "was "
)

func (g *Guest) record() string { return filepath.Join(g.Dir, recordFile) }

// begin writes down that programs are about to stand still.
func (g *Guest) begin(purpose, machine string) error {
	return os.WriteFile(g.record(), []byte(purpose+"\n"+machine+"\n"), 0o600)
}

// note adds a line to the record: a control group, toldLine, or wasLine with an id.
func (g *Guest) note(line string) error {
	f, err := os.OpenFile(g.record(), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
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

// Holds tells whether something of the guest's stands still, by this agent or by one that died.
func (g *Guest) Holds() (bool, error) {
	left, err := g.left()
	return left != nil, err
}

// TakeOver looks after what an agent held that died. A copy's programs run on; a guest that is not the one it was, or a
// template, goes on standing still, for Adopt: nothing runs in it as somebody else. The dead one's guard is this one's.
func (g *Guest) TakeOver() error {
	left, err := g.left()
	if left == nil || err != nil {
		return err
	}
	var disks []*frozenDisk
	for _, dir := range g.Disks { // one that is dead keeps neither the others nor programs standing still
		files, dead := writable([]string{dir})
		for _, f := range files {
			disks = append(disks, newFrozenDisk(f))
		}
		err = errors.Join(err, dead)
	}
	g.starting.Lock()
	g.turn.Lock()
	defer g.turn.Unlock()
	g.held = &held{
		thaw: func() error { return g.thawGroups(left.groups) }, end: func() {},
		since: time.Now(), machine: left.machine, disks: disks, template: left.purpose == forTemplate,
	}
	g.was = left.was
	if g.elsewhere(left) {
		return err
	}
	g.late = !left.told // who is being copied now has a copy that was not held
	err = errors.Join(err, g.release())
	if !left.told {
		return err
	}
	name, unknown := os.Hostname()
	return errors.Join(err, unknown, tellRestored(name))
}

// leftover is what a record says.
type leftover struct {
	purpose, machine string
	told             bool
	was              *string
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
	l := &leftover{purpose: lines[0], machine: lines[1]}
	for _, line := range lines[2:] {
		if was, ok := strings.CutPrefix(line, wasLine); ok {
			l.was = &was
		} else if line == toldLine {
			l.told = true
		} else {
			l.groups = append(l.groups, line)
		}
	}
	return l, nil
}

// elsewhere tells whether what is held must stay so until somebody says who this guest is.
func (g *Guest) elsewhere(l *leftover) bool {
	return !l.told && (l.purpose == forTemplate || l.machine != g.Machine())
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
