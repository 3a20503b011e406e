package vmmtest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"

	_ "banger/internal/agent" // which Initramfs builds: a test's result is kept for as long as that does not change
)

// echoSource is the one program of the test's guest.
const echoSource = `package main

import (
	"os"
	"strings"
)

func main() { os.Stdout.WriteString(strings.Join(os.Args[1:], " ") + "\n") }
`

// countSource counts how often it was called, in memory.
const countSource = `package main

import (
	"fmt"
	"os"
)

func main() {
	n := 0
	if text, err := os.ReadFile("/tmp/count"); err == nil {
		fmt.Sscan(string(text), &n)
	}
	n++
	fmt.Println(n)
	if err := os.WriteFile("/tmp/count", []byte(fmt.Sprint(n)), 0o600); err != nil {
		panic(err)
	}
}
`

// chatterSource talks until nobody listens.
const chatterSource = `package main

import (
	"os"
	"time"
)

func main() {
	for {
		if _, err := os.Stdout.WriteString("chatter chatter chatter\n"); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
`

// initSource is the guest's init: there is no disk and no other init, so the agent supervises.
const initSource = `package main

import (
	"os"
	"strings"
	"syscall"
	"unsafe"
)

const sysFinitModule = 313 // of x86-64

func main() {
	for where, what := range map[string]string{"/dev": "devtmpfs", "/proc": "proc", "/sys": "sysfs"} {
		if err := syscall.Mount(what, where, what, 0, ""); err != nil {
			panic(err)
		}
	}
	modules, err := os.ReadFile("/modules.list")
	if err != nil {
		panic(err)
	}
	for _, name := range strings.Fields(string(modules)) {
		f, err := os.Open("/lib/modules/" + name)
		if err != nil {
			panic(err)
		}
		empty := []byte{0}
		if _, _, err := syscall.Syscall(sysFinitModule, f.Fd(), uintptr(unsafe.Pointer(&empty[0])), 0); err != 0 {
			panic(name + ": " + err.Error())
		}
		f.Close()
	}
	channel, err := os.ReadFile("/channel")
	if err != nil {
		panic(err)
	}
	const agent = "/run/banger/agent"
	panic(syscall.Exec(agent, []string{agent, "supervise", string(channel)}, os.Environ()))
}
`

// Guest is what real guests of tests are made of.
type Guest struct {
	Channel string   // the guest channel, as the agent is told
	Base    string   // an initramfs with modules below /lib/modules; "": there is none
	Modules []string // of it, in the order to load them
	Tool    string   // source of a program called tool; "": there is none
}

// Initramfs makes the initramfs of a guest that the suite can be run with: an init, the agent, and the programs that the
// suite calls. It needs the go command.
func Initramfs(t testing.TB, g Guest) string {
	t.Helper()
	dir := t.TempDir()
	programs := map[string]string{"run/banger/agent": "banger/cmd/banger-agent"}
	sources := map[string]string{
		"init": initSource, "bin/echo": echoSource, "bin/count": countSource, "bin/chatter": chatterSource,
	}
	if g.Tool != "" {
		sources["bin/tool"] = g.Tool
	}
	files := map[string][]byte{"channel": []byte(g.Channel), "modules.list": []byte(strings.Join(g.Modules, "\n"))}
	for name, source := range sources {
		programs[name] = filepath.Join(dir, filepath.Base(name)+".go")
		if err := os.WriteFile(programs[name], []byte(source), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, source := range programs {
		files[name] = build(t, source, filepath.Join(dir, filepath.Base(name)))
	}
	var all bytes.Buffer
	if g.Base != "" {
		all.Write(readAll(t, g.Base))
	}
	archive(t, &all, files)
	path := filepath.Join(dir, "initramfs.img")
	if err := os.WriteFile(path, all.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// archive writes a cpio archive of files; one of a name that an archive before it has takes its place.
func archive(t testing.TB, to *bytes.Buffer, files map[string][]byte) {
	t.Helper()
	w := cpio.NewWriter(to)
	for _, name := range []string{"dev", "proc", "sys", "run", "run/banger", "bin", "etc", "root", "tmp"} {
		header(t, w, &cpio.Header{Name: name, Mode: cpio.TypeDir | 0o755})
	}
	for name, content := range files {
		header(t, w, &cpio.Header{Name: name, Mode: cpio.TypeReg | 0o755, Size: int64(len(content))})
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func header(t testing.TB, w *cpio.Writer, h *cpio.Header) {
	t.Helper()
	if err := w.WriteHeader(h); err != nil {
		t.Fatal(err)
	}
}

func build(t testing.TB, source, out string) []byte {
	t.Helper()
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", out, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", source, err, said)
	}
	return readAll(t, out)
}
