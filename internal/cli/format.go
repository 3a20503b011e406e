package cli

import (
	"fmt"
	"strings"
	"time"

	"charm.land/lipgloss/v2"

	"banger/internal/fault"
)

// size renders bytes as "512M" or "4.0G"; units are powers of 1024.
func size(bytes int64) string {
	const units = "BKMGTPE"
	f, unit := float64(bytes), 0
	for f >= 1000 && unit < len(units)-1 { // 1000: never four digits before the point
		f /= 1024
		unit++
	}
	if unit == 0 {
		return fmt.Sprintf("%dB", bytes)
	}
	if f < 9.95 {
		return fmt.Sprintf("%.1f%c", f, units[unit])
	}
	return fmt.Sprintf("%.0f%c", f, units[unit])
}

// span renders how long something is, in its largest unit: "45 s", "3 h", "12 d".
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "0 s"
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours())/24)
}

// age renders how long ago t was; "-" for none.
func (e *Env) age(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "-"
	}
	return span(e.Now().Sub(*t)) + " ago"
}

// seconds renders the duration of a stage: "0.04 s", "3.2 s", "95 s".
func seconds(d time.Duration) string {
	switch s := d.Seconds(); {
	case s < 0.995:
		return fmt.Sprintf("%.2f s", s)
	case s < 9.95:
		return fmt.Sprintf("%.1f s", s)
	default:
		return fmt.Sprintf("%.0f s", s)
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// plural counts things: "1 name", "2 names".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// cut shortens s to width columns; what is cut away becomes "…". Control characters, which a guest
// or an image description may hold, are dropped.
func cut(s string, width int) string {
	s = fault.Printable(s)
	if lipgloss.Width(s) <= width {
		return s
	}
	var b strings.Builder
	used := 0
	for _, r := range s {
		w := lipgloss.Width(string(r))
		if used+w > width-1 {
			break
		}
		b.WriteRune(r)
		used += w
	}
	return b.String() + "…"
}

// harmless drops the control characters of a text of several lines: what a guest said last is in errors.
func harmless(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = fault.Printable(lines[i])
	}
	return strings.Join(lines, "\n")
}

var stateColours = map[string]string{
	"running": "2", "starting": "3", "stopping": "3", "deleting": "3", "suspending": "3", "resuming": "3", "reverting": "3",
	"failed": "1", "stopped": "8",
	"paused": "6", "suspended": "6",
}

// paintState colours a state's name, whose padding does not count.
func paintState(cell, state string) string {
	c, ok := stateColours[state]
	if !ok {
		return cell
	}
	return lipgloss.NewStyle().Foreground(lipgloss.Color(c)).Render(cell)
}
