package cli

import (
	"os"
	"strings"

	"charm.land/lipgloss/v2"
	"golang.org/x/term"

	"banger/internal/fault"
)

// maxWidth is how wide a table may be, unless it goes to a terminal that is wider.
const maxWidth = 80

// column is one column of a table. A flexible one is cut when the table would be too wide, down
// to eight columns.
type column struct {
	title    string
	flexible bool
	right    bool // numbers
	paint    func(cell, value string) string
}

const (
	columnGap   = 2
	minFlexible = 8
)

// table renders rows below a line of titles, without borders, as wide as standard output allows.
func (e *Env) table(columns []column, rows [][]string) string {
	most := maxWidth
	if f, ok := e.Stdout.(*os.File); ok {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil { // a terminal
			most = max(most, width)
		}
	}
	return table(columns, rows, most)
}

func table(columns []column, rows [][]string, most int) string {
	widths := fit(columns, rows, most)
	var b strings.Builder
	titles := make([]string, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	writeRow(&b, columns, widths, titles, false)
	for _, row := range rows {
		writeRow(&b, columns, widths, row, true)
	}
	return b.String()
}

// fit returns the widths of the columns: as wide as their longest cell, the widest flexible one
// made narrower until all fit.
func fit(columns []column, rows [][]string, most int) []int {
	widths := make([]int, len(columns))
	total := columnGap * (len(columns) - 1)
	for i, c := range columns {
		widths[i] = lipgloss.Width(c.title)
		for _, row := range rows {
			widths[i] = max(widths[i], lipgloss.Width(fault.Printable(row[i])))
		}
		total += widths[i]
	}
	for ; total > most; total-- {
		widest := -1
		for i, c := range columns {
			if c.flexible && widths[i] > minFlexible && (widest < 0 || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			return widths
		}
		widths[widest]--
	}
	return widths
}

func writeRow(b *strings.Builder, columns []column, widths []int, row []string, paint bool) {
	var line strings.Builder
	for i, c := range columns {
		cell := cut(row[i], widths[i])
		pad := strings.Repeat(" ", widths[i]-lipgloss.Width(cell))
		if paint && c.paint != nil {
			cell = c.paint(cell, row[i])
		}
		if c.right {
			cell = pad + cell
		} else {
			cell += pad
		}
		if i > 0 {
			line.WriteString(strings.Repeat(" ", columnGap))
		}
		line.WriteString(cell)
	}
	b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
}

// field is one line of a description.
type field struct{ name, value string }

// fields renders one thing: a line for each field that has a value. Values are not cut: paths
// and error texts are there to be copied.
func fields(list []field) string {
	width := 0
	for _, f := range list {
		if f.value != "" {
			width = max(width, len(f.name)+1)
		}
	}
	var b strings.Builder
	for _, f := range list {
		if f.value == "" {
			continue
		}
		b.WriteString(f.name + ":" + strings.Repeat(" ", width-len(f.name)-1+columnGap) + fault.Printable(f.value) + "\n")
	}
	return b.String()
}
