package cli

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"charm.land/lipgloss/v2"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
)

// display shows the progress of one or several long operations on stderr. On a terminal the last
// line lives: a spinner, the stage, a bar when the fraction is known. Finished stages stay as one plain
// line each if they took a while or failed. All methods may be called from several goroutines.
type display struct {
	w      io.Writer
	live   bool
	colour bool
	quiet  bool
	now    func() time.Time

	mu      sync.Mutex
	running []*runningStage
	drawn   bool // a live line is on the screen
	frame   int
	stop    chan struct{}
	ended   chan struct{}
}

// runningStage is a stage that has begun and not ended.
type runningStage struct {
	label    string // the thing worked on, when there are several; else empty
	stage    string
	message  string
	fraction float64 // negative when unknown
	begin    time.Time
}

const redraw = 100 * time.Millisecond

// worthALine is how long a stage must take to be kept; `vm events` has all of them.
const worthALine = 100 * time.Millisecond

var spinner = []string{"⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"}

// newDisplay begins a display; close ends it.
func (e *Env) newDisplay() *display {
	d := &display{
		w: e.Stderr, live: isTerminal(e.Stderr) && e.Getenv("TERM") != "dumb", colour: e.colour(e.Stderr),
		quiet: e.quiet, now: e.Now, stop: make(chan struct{}), ended: make(chan struct{}),
	}
	go d.spin()
	return d
}

func (d *display) spin() {
	defer close(d.ended)
	if !d.live || d.quiet {
		return
	}
	tick := time.NewTicker(redraw)
	defer tick.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-tick.C:
			d.mu.Lock()
			d.frame++
			d.draw()
			d.mu.Unlock()
		}
	}
}

// close takes the live line away.
func (d *display) close() {
	close(d.stop)
	<-d.ended
	d.mu.Lock()
	defer d.mu.Unlock()
	d.erase()
}

// sink returns the receiver for one operation; label tells several apart.
func (d *display) sink(label string) func(*bangerv1.Progress) {
	return func(p *bangerv1.Progress) {
		if d.quiet {
			return
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.take(label, p)
	}
}

func (d *display) take(label string, p *bangerv1.Progress) {
	switch p.GetStatus() {
	case bangerv1.Progress_STATUS_STARTED:
		d.running = append(d.running, &runningStage{label: label, stage: p.GetStage(), fraction: -1, begin: d.now()})
	case bangerv1.Progress_STATUS_UPDATE:
		d.update(label, p)
	case bangerv1.Progress_STATUS_DONE:
		d.finish(label, p, d.mark("✓", "2"), "")
	case bangerv1.Progress_STATUS_FAILED:
		d.finish(label, p, d.mark("✗", "1"), " (failed)")
	case bangerv1.Progress_STATUS_NOTICE:
		d.line(withLabel(label, p.GetMessage()), "")
	}
	d.draw()
}

func (d *display) update(label string, p *bangerv1.Progress) {
	s := d.find(label, p.GetStage())
	if s == nil {
		return
	}
	s.message, s.fraction = p.GetMessage(), -1
	if p.Fraction != nil {
		s.fraction = min(1, max(0, p.GetFraction()))
	}
}

func (d *display) finish(label string, p *bangerv1.Progress, mark, ending string) {
	for i, s := range d.running {
		if s.label == label && s.stage == p.GetStage() {
			d.running = append(d.running[:i], d.running[i+1:]...)
			break
		}
	}
	took := time.Duration(p.GetDurationNanos())
	if took < worthALine && p.GetStatus() == bangerv1.Progress_STATUS_DONE {
		return
	}
	d.line(fmt.Sprintf("%-24s %8s%s", withLabel(label, p.GetStage()), seconds(took), ending), mark)
}

func (d *display) find(label, stage string) *runningStage {
	for _, s := range d.running {
		if s.label == label && s.stage == stage {
			return s
		}
	}
	return nil
}

func withLabel(label, text string) string {
	if label == "" {
		return text
	}
	return label + ": " + text
}

// mark renders the sign of a finished stage on a terminal.
func (d *display) mark(sign, colour string) string {
	if !d.colour {
		return sign
	}
	return lipgloss.NewStyle().Foreground(lipgloss.Color(colour)).Render(sign)
}

// line prints a line that stays.
func (d *display) line(text, mark string) {
	d.erase()
	text = fault.Printable(text)
	switch {
	case !d.live:
		fmt.Fprintf(d.w, "banger: %s\n", text)
	case mark == "":
		fmt.Fprintf(d.w, "  %s\n", text)
	default:
		fmt.Fprintf(d.w, "%s %s\n", mark, text)
	}
}

func (d *display) erase() {
	if d.drawn {
		fmt.Fprint(d.w, "\r\x1b[K")
		d.drawn = false
	}
}

// draw shows the newest running stage on the live line.
func (d *display) draw() {
	if !d.live {
		return
	}
	d.erase()
	if len(d.running) == 0 {
		return
	}
	s := d.running[len(d.running)-1]
	text := withLabel(s.label, s.stage)
	if s.fraction >= 0 {
		text += " " + bar(s.fraction)
	}
	if s.message != "" {
		text += "  " + s.message
	}
	if waited := d.now().Sub(s.begin); waited >= time.Second {
		text += "  " + span(waited)
	}
	if more := len(d.running) - 1; more > 0 {
		text += fmt.Sprintf("  (+%d)", more)
	}
	fmt.Fprint(d.w, spinner[d.frame%len(spinner)]+" "+cut(text, maxWidth-3))
	d.drawn = true
}

// bar renders a fraction as twenty cells and per cent.
func bar(fraction float64) string {
	const cells = 20
	full := int(fraction * cells)
	return fmt.Sprintf("[%s%s] %3.0f%%", strings.Repeat("━", full), strings.Repeat(" ", cells-full), fraction*100)
}

// stage runs a step of the client's own as a stage.
func (d *display) stage(label, name string, run func() error) error {
	sink, begin := d.sink(label), d.now()
	sink(&bangerv1.Progress{Stage: name, Status: bangerv1.Progress_STATUS_STARTED})
	err := run()
	p := &bangerv1.Progress{Stage: name, Status: bangerv1.Progress_STATUS_DONE, DurationNanos: int64(d.now().Sub(begin))}
	if err != nil {
		p.Status = bangerv1.Progress_STATUS_FAILED
	}
	sink(p)
	return err
}
