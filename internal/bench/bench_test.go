package bench

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestResultsHoldOrNot(t *testing.T) {
	base := measured("base", "s", 0, 9, 10, 30)
	if base.Value != 10 || !base.Holds {
		t.Errorf("%+v", base)
	}
	for limit, holds := range map[float64]bool{0.2: true, 0.1: false} {
		if r := measured("it", "s", 0, 2, 1).against(base, limit); r.Ratio != 0.15 || r.Holds != holds {
			t.Errorf("limit %g: %+v", limit, r)
		}
	}
	if r := measured("size", "MB", 20, 21); r.Holds {
		t.Errorf("over its limit: %+v", r)
	}
}

// Where no mirror of Debian was reached there is no row that could be taken for a measure, and the page says so.
func TestWhatCouldNotBeMeasuredIsSaid(t *testing.T) {
	b := &bench{cache: t.TempDir()}
	keep := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(b.cache, bootstrapFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.reportBootstraps(); err != nil {
			t.Fatal(err)
		}
	}
	keep(`{"Missing": "the mirror is gone"}`)
	page := Report{Results: b.results, Missing: b.missing}.table()
	if len(b.results) > 0 || !strings.Contains(page, "Not measured: ") || !strings.Contains(page, "the mirror is gone") {
		t.Errorf("%+v\n%s", b.results, page)
	}
	for ours, holds := range map[string]bool{"14": true, "16": false} {
		b.results = nil
		keep(`{"Plain": [9, 11], "Ours": [` + ours + `]}`)
		if len(b.results) != 2 || b.results[1].Holds != holds {
			t.Errorf("%s: %+v", ours, b.results)
		}
	}
	if err := os.Remove(filepath.Join(b.cache, bootstrapFile)); err != nil {
		t.Fatal(err)
	}
	if err := b.reportBootstraps(); err == nil {
		t.Error("numbers that nobody took are no error")
	}
}

func TestPageKeepsWhatIsAroundTheTable(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(page, []byte("before\n"+tableBegin+"\nstale row\n"+tableEnd+"\nafter\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := Report{Results: []Result{measured("size", "MB", 20, 21)}}
	if err := r.writePage(page); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for want, there := range map[string]bool{"before\n": true, "\nafter\n": true, "stale row": false, "| size | 21 MB |": true, "**no**": true} {
		if strings.Contains(string(text), want) != there {
			t.Errorf("%q: want %v in\n%s", want, there, text)
		}
	}
	if err := os.WriteFile(page, []byte("no place for a table"), 0o644); err != nil {
		t.Fatal(err)
	}
	if r.writePage(page) == nil {
		t.Error("a page without a place for the table was written")
	}
}

func TestEmulationOf(t *testing.T) {
	file := filepath.Join(t.TempDir(), "command.txt")
	text := "cd /x && exec \\\n  qemu \\\n  -accel tcg,thread=single \\\n  -cpu 'max' \\\n -append 'no_timer_check clearcpuid=141 quiet'"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if e, err := emulationOf(file); err != nil || e != (emulation{"tcg,thread=single", "max", "no_timer_check clearcpuid=141"}) {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestBannerIsWaitedFor(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for _, line := range []string{"", "HTTP/1.1 400\r\n", "SSH-2.0-x\r\n"} { // the third caller meets a server
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte(line))
			_ = conn.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := awaitBanner(ctx, l.Addr().String()); err != nil {
		t.Error(err)
	}
}

func TestMemoryBesideTheGuests(t *testing.T) {
	const smaps = `7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Pss:               65000 kB
Pss_Dirty:         65000 kB
55d000000000-55d000300000 r-xp 00000000 08:01 5 /usr/bin/firecracker
Size:               3072 kB
Pss:                1500 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Pss:                  20 kB
`
	if got, err := besideGuest(strings.NewReader(smaps), 128<<10); err != nil || got != 1520 {
		t.Errorf("%d KiB, %v", got, err)
	}
	if _, err := besideGuest(strings.NewReader("Size: many"), 1); err == nil {
		t.Error("nonsense was summed up")
	}
}
