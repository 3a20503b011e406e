package disk

import (
	"fmt"
	"slices"
)

// MaxLeftOut is how many things left out are told one by one: the lines go into a manifest.
const MaxLeftOut = 100

// LeftOut tells what could not be taken over into a file system. The zero value tells of nothing.
type LeftOut struct {
	lines []string
	more  int
}

// Add tells why the file at path is not there, or lacks something.
func (l *LeftOut) Add(path, why string) {
	if len(l.lines) == MaxLeftOut {
		l.more++
		return
	}
	l.lines = append(l.lines, fmt.Sprintf("%q: %s", path, why))
}

// Lines are one for each of the first hundred, and one that counts the others.
func (l *LeftOut) Lines() []string {
	if l.more == 0 {
		return l.lines
	}
	return append(slices.Clone(l.lines), fmt.Sprintf("and %d more", l.more))
}
