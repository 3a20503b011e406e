package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/image/layer"
)

// filterFormat is part of the recipe's hash: raise it when the rules change.
const filterFormat = 1

// packageLists are the files in which package managers keep what is installed, and what reads them.
var packageLists = map[string]func(text string) []string{
	"var/lib/dpkg/status": installed, "lib/apk/db/installed": installedByApk, "usr/lib/apk/db/installed": installedByApk,
}

const (
	maxStatus = 64 << 20 // bytes of a package manager's list
	maxHome   = 64 << 20 // bytes of files in /root
)

// dropped are the paths that do not go into an image: what each machine makes for itself, caches, and
// documentation. "dir/" stands for all below a directory, "dir/*" for all but directories.
var dropped = []string{
	"etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
	"etc/machine-id", "etc/resolv.conf", "etc/hostname", "etc/fstab", "etc/default/locale",
	"run/", "tmp/", "var/tmp/", "var/lib/apt/lists/*", "var/cache/apt/*", "var/cache/ldconfig/*", "var/log/*",
	"var/lib/systemd/random-seed", "var/lib/dbus/machine-id",
	"usr/share/info/", "usr/share/man/", "usr/share/lintian/",
}

// added are the files put in instead. An empty machine-id is filled in by systemd at each boot.
var added = map[string]string{
	"etc/machine-id":     "",
	"etc/resolv.conf":    "",
	"etc/hostname":       "localhost\n",
	"etc/fstab":          "# The root file system is mounted before this file is read.\n",
	"etc/default/locale": "LANG=C.UTF-8\n",
	"etc/ssh/sshd_config.d/10-keys-only.conf": "# Nobody has a password here.\nPasswordAuthentication no\n" +
		"KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n",
}

// neededDirs are directories that others count on; modes are octal.
var neededDirs = map[string]int64{
	"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700,
	"usr/lib/modules": 0o755, "var/log": 0o755,
}

// filtered is what was learnt while a root file system went by.
type filtered struct {
	home     bytes.Buffer // a tar stream of the content of /root; empty when it went elsewhere
	packages []string     // "name=version", sorted
	skipped  disk.LeftOut // what could not be taken over
	files    int
	bytes    int64
}

// rules say what becomes of the files of a root file system.
type rules struct {
	dropped func(name string, dir bool) bool
	added   map[string]string // files, by name, which none must have that goes through
	needed  map[string]int64  // modes of directories, made when they are not there
	maxHome int64             // bytes of files in /root
	raw     bool              // extended attributes are as programs see them, and not yet as ext4 stores them
}

var debianRules = rules{raw: true, dropped: isDropped, added: added, needed: neededDirs, maxHome: maxHome}

// filterRoot copies the root file system of a new Debian, as a tar stream, without what does not belong into an image.
// What is in /root goes into the result.
func filterRoot(ctx context.Context, out io.Writer, in io.Reader) (*filtered, error) {
	result := &filtered{}
	f := newFilter(debianRules, out, &result.home, result)
	if err := f.run(ctx, in); err != nil {
		return nil, err
	}
	if !f.seen["etc"] || !f.seen["usr"] {
		return nil, fault.New(fault.Precondition, "the root file system has no /etc or no /usr")
	}
	return result, f.finish()
}

func newFilter(r rules, out, home io.Writer, result *filtered) *filter {
	return &filter{rules: r, w: tar.NewWriter(out), home: tar.NewWriter(home), seen: map[string]bool{}, result: result}
}

// run lets a whole stream through.
func (f *filter) run(ctx context.Context, in io.Reader) error {
	for r := tar.NewReader(in); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("cannot read the root file system: %w", err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := f.take(h, r); err != nil {
			return fmt.Errorf("cannot write %s: %w", h.Name, err)
		}
	}
	_, err := io.Copy(io.Discard, in) // tar pads its end: the writer must get rid of that
	return err
}

type filter struct {
	rules
	w, home   *tar.Writer
	homeBytes int64
	seen      map[string]bool
	result    *filtered
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (f *filter) take(h *tar.Header, content io.Reader) error {
	name := clean(h.Name)
	home := name == "root" || strings.HasPrefix(name, "root/")
	if !home && f.dropped(name, h.Typeflag == tar.TypeDir) {
		return nil
	}
	if f.raw {
		var left []string
		h.PAXRecords, left = layer.KeepAttributes(h.PAXRecords)
		for _, attribute := range left {
			f.result.skipped.Add("/"+name, "its attribute "+attribute+" has no room beside the others")
		}
	}
	if home {
		return f.takeHome(name, h, content)
	}
	if list := packageLists[name]; list != nil && h.Typeflag == tar.TypeReg {
		text, err := io.ReadAll(io.LimitReader(content, maxStatus))
		if err != nil {
			return err
		}
		f.result.packages = list(string(text))
		content = io.MultiReader(bytes.NewReader(text), content)
	}
	if h.Typeflag == tar.TypeLink {
		if target := clean(h.Linkname); !f.seen[target] {
			return fault.New(fault.Precondition, "it is a hard link to %s, which is not in the image", target)
		}
	}
	f.seen[name] = true
	f.result.files++
	f.result.bytes += h.Size
	return copyEntry(f.w, h, content)
}

// takeHome keeps /root itself in the image, as a mount point, and puts all below it aside.
func (f *filter) takeHome(name string, h *tar.Header, content io.Reader) error {
	if name == "root" {
		f.seen[name] = true
		if err := copyEntry(f.w, h, nil); err != nil {
			return err
		}
	}
	if f.homeBytes += h.Size; f.homeBytes > f.maxHome {
		return fault.New(fault.Precondition, "there are more than %d bytes in /root", f.maxHome)
	}
	inside := *h
	inside.Name = "./" + strings.TrimPrefix(strings.TrimPrefix(name, "root"), "/")
	if h.Typeflag == tar.TypeLink {
		target := clean(h.Linkname)
		if !strings.HasPrefix(target, "root/") {
			return fault.New(fault.Precondition, "it is a hard link to %s, which is on another disk", target)
		}
		inside.Linkname = "./" + strings.TrimPrefix(target, "root/")
	}
	return copyEntry(f.home, &inside, content)
}

// What an inode has room for (Documentation/filesystems/ext4/inodes.rst; linux/kdev_t.h). The last owner means none.
const (
	maxOwner = math.MaxUint32 - 1
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
)

// checkNumbers refuses what would silently become another number: owner 4294967296 would be root.
func checkNumbers(h *tar.Header) error {
	for _, owner := range []int{h.Uid, h.Gid} {
		if owner < 0 || owner > maxOwner {
			return fault.New(fault.Precondition, "it belongs to %d, which is the number of nobody", owner)
		}
	}
	device := h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock
	if device && (h.Devmajor < 0 || h.Devmajor > maxMajor || h.Devminor < 0 || h.Devminor > maxMinor) {
		return fault.New(fault.Precondition, "there is no device %d:%d", h.Devmajor, h.Devminor)
	}
	return nil
}

func copyEntry(w *tar.Writer, h *tar.Header, content io.Reader) error {
	if err := checkNumbers(h); err != nil {
		return err
	}
	h.Format = tar.FormatPAX // names, owners and times of any kind
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.ModTime = disk.Tellable(h.ModTime)
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	if content == nil || h.Size == 0 {
		return nil
	}
	_, err := io.Copy(w, content)
	return err
}

// matches tells whether a list written as dropped has the path.
func matches(list []string, name string, dir bool) bool {
	for _, d := range list {
		tree, filesOnly := strings.CutSuffix(d, "*")
		isTree := strings.HasSuffix(tree, "/")
		if !isTree && name == d || isTree && strings.HasPrefix(name, tree) && !(filesOnly && dir) {
			return true
		}
	}
	return false
}

func isDropped(name string, dir bool) bool {
	switch {
	case matches(dropped, name, dir):
		return true
	case strings.HasPrefix(name, "etc/ssh/ssh_host_"):
		return true
	case strings.HasPrefix(name, "usr/share/doc/") && !dir:
		return path.Base(name) != "copyright"
	case strings.HasPrefix(name, "usr/share/locale/"):
		return strings.Contains(name, "/LC_MESSAGES")
	case strings.HasPrefix(name, "var/cache/debconf/") || strings.HasPrefix(name, "var/lib/dpkg/"):
		return strings.HasSuffix(name, "-old")
	}
	return false
}

// finish adds what is to be there in any case and ends both streams.
func (f *filter) finish() error {
	for _, name := range sortedKeys(f.needed) {
		if f.seen[name] {
			continue
		}
		h := &tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: f.needed[name]}
		if err := f.w.WriteHeader(h); err != nil {
			return err
		}
	}
	for _, name := range sortedKeys(f.added) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(f.added[name]))}
		if err := f.w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.WriteString(f.w, f.added[name]); err != nil {
			return err
		}
	}
	return errors.Join(f.w.Close(), f.home.Close())
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// installed reads dpkg's status file and returns "name=version" of each installed package, sorted.
func installed(status string) []string {
	var packages []string
	for paragraph := range strings.SplitSeq(status, "\n\n") {
		fields := map[string]string{}
		for line := range strings.Lines(paragraph) {
			if name, value, ok := strings.Cut(strings.TrimRight(line, "\n"), ": "); ok && !strings.HasPrefix(line, " ") {
				fields[name] = value
			}
		}
		if fields["Status"] == "install ok installed" {
			packages = append(packages, fields["Package"]+"="+fields["Version"])
		}
	}
	slices.Sort(packages)
	return packages
}

// installedByApk reads the list of Alpine's package manager, whose fields are letters (apk-tools, doc/apk-v2.5.scd), and
// returns the same.
func installedByApk(list string) []string {
	var packages []string
	for paragraph := range strings.SplitSeq(list, "\n\n") {
		var name, version string
		for line := range strings.Lines(paragraph) {
			switch field, value, _ := strings.Cut(strings.TrimRight(line, "\n"), ":"); field {
			case "P":
				name = value
			case "V":
				version = value
			}
		}
		if name != "" {
			packages = append(packages, name+"="+version)
		}
	}
	slices.Sort(packages)
	return packages
}
