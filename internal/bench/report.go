package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"
)

// Report is one run: what was measured, on what kind of machine.
type Report struct {
	Date    string   `json:"date"`
	Build   string   `json:"build"`
	Machine Machine  `json:"machine"`
	Results []Result `json:"results"`
	Missing []string `json:"missing,omitempty"` // what could not be measured here, and why
}

// Machine is the kind of machine, without anything that names the one machine.
type Machine struct {
	Architecture string `json:"architecture"`
	CPUs         int    `json:"cpus"`
	MemoryGiB    int    `json:"memory_gib"`
	Accelerator  string `json:"accelerator"`
	VMM          string `json:"vmm"`
}

// Result is one measure. Value is the median of Samples, P95 their 95th percentile where there are ten. Where there is a Baseline, Ratio is
// Value/Baseline, and Limit bounds the ratio; otherwise Limit bounds the value.
type Result struct {
	Name     string    `json:"name"`
	Unit     string    `json:"unit"`
	Value    float64   `json:"value"`
	P95      float64   `json:"p95,omitempty"`
	Samples  []float64 `json:"samples"`
	Baseline float64   `json:"baseline,omitempty"`
	Of       string    `json:"baseline_name,omitempty"`
	Ratio    float64   `json:"ratio,omitempty"`
	Limit    float64   `json:"limit,omitempty"`
	Holds    bool      `json:"holds"`
}

// measured makes a result without a baseline; limit 0 means none.
func measured(name, unit string, limit float64, samples ...float64) Result {
	r := Result{Name: name, Unit: unit, Samples: samples, Value: median(samples), Limit: limit}
	r.Holds = limit == 0 || r.Value <= limit
	if len(samples) >= 10 {
		r.P95 = percentile(samples, 95)
	}
	return r
}

// percentile returns the smallest sample that p percent of all do not exceed.
func percentile(samples []float64, p int) float64 {
	s := slices.Sorted(slices.Values(samples))
	return s[(len(s)*p+99)/100-1]
}

// against makes a result whose limit is on the ratio to a baseline of the same run.
func (r Result) against(of Result, limit float64) Result {
	r.Of, r.Baseline, r.Limit = of.Name, of.Value, limit
	r.Ratio = r.Value / of.Value
	r.Holds = r.Ratio <= limit
	return r
}

// p95Too makes the limit one on the p95 as well.
func (r Result) p95Too() Result {
	r.Holds = r.Holds && r.P95/r.Baseline <= r.Limit
	return r
}

func median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(samples))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

func (r Report) writeJSON(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, append(data, '\n'), 0o644)
}

// The part of the page that a run replaces.
const (
	tableBegin = "<!-- bench: begin -->"
	tableEnd   = "<!-- bench: end -->"
)

func (r Report) writePage(path string) error {
	page, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(page), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no %s … %s to put the table between", path, tableBegin, tableEnd)
	}
	page = []byte(before + tableBegin + "\n" + r.table() + tableEnd + after)
	return renameio.WriteFile(path, page, 0o644)
}

func (r Report) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s with %d CPUs and %d GiB, %s (%s), build %s.\n\n",
		r.Date, r.Machine.Architecture, r.Machine.CPUs, r.Machine.MemoryGiB, r.Machine.VMM, r.Machine.Accelerator, r.Build)
	b.WriteString("| measure | value | p95 | ratio to | ratio | limit | holds |\n|---|---|---|---|---|---|---|\n")
	for _, m := range r.Results {
		ratio, limit := "", ""
		if m.Of != "" {
			ratio = fmt.Sprintf("%.4f", m.Ratio)
		}
		if m.Limit > 0 {
			limit = fmt.Sprintf("%.4g", m.Limit)
			if m.Of == "" {
				limit += " " + m.Unit
			}
		}
		holds := "yes"
		switch {
		case m.Limit == 0:
			holds = ""
		case !m.Holds:
			holds = "**no**"
		}
		p95 := ""
		if m.P95 > 0 {
			p95 = fmt.Sprintf("%.4g %s", m.P95, m.Unit)
		}
		fmt.Fprintf(&b, "| %s | %.4g %s | %s | %s | %s | %s | %s |\n", m.Name, m.Value, m.Unit, p95, m.Of, ratio, limit, holds)
	}
	for _, what := range r.Missing {
		fmt.Fprintf(&b, "\nNot measured: %s.\n", what)
	}
	return b.String()
}

func thisMachine() Machine {
	m := Machine{Architecture: runtime.GOARCH, CPUs: runtime.NumCPU()}
	if data, err := os.ReadFile("/proc/meminfo"); err == nil {
		var kib int
		if _, err := fmt.Sscanf(string(data), "MemTotal: %d kB", &kib); err == nil {
			m.MemoryGiB = (kib + 1<<19) >> 20
		}
	}
	return m
}

func today() string { return time.Now().UTC().Format(time.DateOnly) }
