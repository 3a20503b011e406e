package kernel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cavaliergopher/cpio"

	"banger/internal/artifact"
	"banger/internal/fault"
	"banger/internal/paths"
)

const (
	initramfsFormat = 1 // part of the hash: raise it when the layout changes
	initramfsKept   = 4 // how many the cache holds

	unfinished    = ".new-*"  // names of archives that are being written
	unfinishedAge = time.Hour // after which their writer is dead
)

// Initramfs returns the path of an initramfs, an uncompressed newc cpio archive: the agent as /init, the modules
// needed to mount the root file system below /lib/modules, and empty directories. Its length is a multiple
// of four, so that a further archive can be appended. modules are the modules in it, in the order to
// load them, as paths below /lib/modules. extra names modules to add, those that are built in are left
// out. It is cached by its content.
func (s *Store) Initramfs(ctx context.Context, k Kernel, agentBinary string, extra ...string) (archive string, modules []string, err error) {
	modules, err = loadOrder(k.Manifest.BootModules, append(basic(k.Manifest.BootModules), extra...))
	if err != nil {
		return "", nil, err
	}
	agent, err := s.agentSum(agentBinary)
	if err != nil {
		return "", nil, fault.Wrap(fault.Precondition, err, "cannot read the guest's agent").WithHint("build it with: make build")
	}
	dir := paths.Paths{Cache: s.cache}.Initramfs()
	archive = filepath.Join(dir, contentHash(k, agent, modules)+".cpio")
	if whole(archive) {
		now := time.Now()
		_ = os.Chtimes(archive, now, now) // it only decides what is forgotten first
		return archive, modules, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", nil, fault.Wrap(fault.Precondition, err, "cannot make directory %s", dir)
	}
	if err := ctx.Err(); err != nil {
		return "", nil, err
	}
	if err := writeArchive(archive, k, agentBinary, modules); err != nil {
		return "", nil, fault.Wrap(fault.Unexpected, err, "cannot write the initramfs of kernel %s", k.Name)
	}
	return archive, modules, forgetOld(dir)
}

// summed is a file whose checksum is known as long as it looks the same.
type summed struct {
	size, modified int64
	sum            string
}

// agentSum sums up the agent's file, which every create asks for, once as long as it does not change.
func (s *Store) agentSum(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	known, ok := s.agents[path]
	if ok && known.size == info.Size() && known.modified == info.ModTime().UnixNano() {
		return known.sum, nil
	}
	sum, _, err := artifact.Sum(path)
	if err != nil {
		return "", err
	}
	s.agents[path] = summed{size: info.Size(), modified: info.ModTime().UnixNano(), sum: sum}
	return sum, nil
}

// whole tells whether a cached archive can be believed: it ends as archives do.
func whole(archive string) bool {
	const end = 128 // bytes; a trailer has 124
	f, err := os.Open(archive)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Seek(-end, io.SeekEnd); err != nil {
		return false
	}
	last, err := io.ReadAll(io.LimitReader(f, end))
	return err == nil && bytes.Contains(last, []byte(trailer+"\x00"))
}

// basic returns those of bootModules that the kernel has; what it must have was checked when it was made.
func basic(known []BootModule) []string {
	var names []string
	for _, m := range known {
		if slices.Contains(bootModules, m.Name) {
			names = append(names, m.Name)
		}
	}
	return names
}

// loadOrder joins the closures of the named modules, each file once.
func loadOrder(known []BootModule, names []string) ([]string, error) {
	var order []string
	for _, name := range names {
		i := slices.IndexFunc(known, func(m BootModule) bool { return m.Name == name })
		if i < 0 {
			return nil, fault.New(fault.Precondition, "the kernel has no module %s ready for the initramfs", name).
				WithHint("make the kernel again with: banger setup --rebuild")
		}
		for _, p := range known[i].Paths {
			if !slices.Contains(order, p) {
				order = append(order, p)
			}
		}
	}
	return order, nil
}

func contentHash(k Kernel, agentSum string, modules []string) string {
	h := sha256.New()
	fmt.Fprintln(h, initramfsFormat, k.Release, agentSum)
	for _, f := range k.Manifest.Files {
		if f.Name == bootName {
			fmt.Fprintln(h, f.SHA256)
		}
	}
	fmt.Fprintln(h, strings.Join(modules, "\n"))
	return hex.EncodeToString(h.Sum(nil))[:32]
}

func writeArchive(archive string, k Kernel, agentBinary string, modules []string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(archive), unfinished)
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = f.Sync() // it is never made again: a power cut must not leave half of it under its name
		}
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(f.Name(), archive)
		}
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	w := newArchive(f)
	for _, dir := range []string{"banger", "dev", "newroot", "proc", "run", "sys", "tmp"} {
		w.mkdirAll(dir)
	}
	w.put(entry{name: "dev/console", mode: typeChar | 0o600, major: 5, minor: 1})
	w.copyFile("init", agentBinary, 0o755)
	w.copyModules(filepath.Join(k.Dir, bootName), modules)
	return w.close()
}

// copyModules takes the named modules over from another archive.
func (a *archiveWriter) copyModules(source string, modules []string) {
	if a.err != nil {
		return
	}
	f, err := os.Open(source)
	if err != nil {
		a.err = err
		return
	}
	defer func() { _ = f.Close() }()
	found := 0
	for r := cpio.NewReader(f); a.err == nil; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			a.err = err
			return
		}
		if name, ok := strings.CutPrefix(h.Name, "lib/modules/"); ok && slices.Contains(modules, name) {
			found++
			a.putFile(h.Name, 0o644, h.Size, r)
		}
	}
	if a.err == nil && found != len(modules) {
		a.err = fmt.Errorf("%s holds %d of %d modules", source, found, len(modules))
	}
}

// forgetOld keeps the newest archives of the cache, and removes those that somebody died over. Machines have
// copies of their own.
func forgetOld(dir string) error {
	found, err := filepath.Glob(filepath.Join(dir, "*.cpio"))
	if err != nil {
		return err
	}
	age := func(path string) time.Time {
		info, err := os.Stat(path)
		if err != nil {
			return time.Time{}
		}
		return info.ModTime()
	}
	dead, err := filepath.Glob(filepath.Join(dir, unfinished))
	if err != nil {
		return err
	}
	dead = slices.DeleteFunc(dead, func(path string) bool { return time.Since(age(path)) < unfinishedAge })
	slices.SortFunc(found, func(a, b string) int { return age(b).Compare(age(a)) })
	for _, old := range append(dead, found[min(len(found), initramfsKept):]...) {
		if err := os.Remove(old); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fault.Wrap(fault.Unexpected, err, "cannot remove an old initramfs")
		}
	}
	return nil
}
