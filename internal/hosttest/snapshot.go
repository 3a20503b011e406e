package hosttest

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
)

// settle is how long things may take to go away at the end of a test. Who is killed dies when it is its turn on a processor.
const settle = 20 * time.Second

// Snapshot takes stock of what this process and this network namespace hold: file descriptors,
// goroutines, network devices, nftables rules, mounts, child processes, and the files below dirs. At
// the end of the test, after all cleanups registered later, it does so again and fails the test with
// the difference. Call it first, or right after NetNS. Tests with a snapshot must not be parallel.
func Snapshot(t testing.TB, dirs ...string) {
	t.Helper()
	test, _, _ := strings.Cut(t.Name(), "/")
	before, err := take(test, dirs)
	if err != nil {
		t.Fatalf("take stock: %v", err)
	}
	goroutines := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() {
			return // what is left is not the news
		}
		diff := waitFor(test, before, dirs)
		if diff != "" {
			t.Errorf("the test left things behind (+) or took things away (-):\n%s", diff)
		}
		NoGoroutines(t, goroutines)
	})
}

// waitFor takes stock until nothing differs or the time is over, and returns the difference.
func waitFor(test string, before map[string]int, dirs []string) string {
	deadline := time.Now().Add(settle)
	for {
		after, err := take(test, dirs)
		diff := ""
		if err != nil {
			diff = err.Error()
		} else {
			diff = difference(before, after)
		}
		if diff == "" || time.Now().After(deadline) {
			return diff
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// take returns one line for each thing, and how often it is there.
func take(test string, dirs []string) (map[string]int, error) {
	stock := map[string]int{}
	for _, collect := range []func() ([]string, error){
		descriptors, children, func() ([]string, error) { return mounts(test) }, devices, rules,
	} {
		lines, err := collect()
		if err != nil {
			return nil, err
		}
		for _, l := range lines {
			stock[l]++
		}
	}
	for _, dir := range dirs {
		lines, err := files(dir)
		if err != nil {
			return nil, err
		}
		for _, l := range lines {
			stock[l]++
		}
	}
	return stock, nil
}

func difference(before, after map[string]int) string {
	all := maps.Clone(before)
	maps.Copy(all, after)
	var b strings.Builder
	for _, line := range slices.Sorted(maps.Keys(all)) {
		switch n := after[line] - before[line]; {
		case n > 0:
			fmt.Fprintf(&b, "+ %s%s\n", line, times(n))
		case n < 0:
			fmt.Fprintf(&b, "- %s%s\n", line, times(-n))
		}
	}
	return b.String()
}

func times(n int) string {
	if n == 1 {
		return ""
	}
	return fmt.Sprintf(" (%d times)", n)
}

// descriptors names open files by their target, without the inode numbers of sockets and pipes. The
// runtime's own (epoll, eventfd) come and go with its poller.
func descriptors() ([]string, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || strings.HasPrefix(target, "/proc/") && strings.HasSuffix(target, "/fd") {
			continue // closed meanwhile: the descriptor of the listing itself
		}
		kind, _, numbered := strings.Cut(target, ":[")
		if numbered {
			target = kind
		}
		if strings.HasPrefix(target, "anon_inode:[event") || target == "anon_inode" {
			continue
		}
		lines = append(lines, "fd "+target)
	}
	return lines, nil
}

// children names the processes whose parent is this one. Zombies count.
func children() ([]string, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, err
	}
	self := strconv.Itoa(os.Getpid())
	var lines []string
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it ended meanwhile
		}
		// proc_pid_stat(5): pid (name) state ppid ...
		s := string(text)
		end := strings.LastIndexByte(s, ')')
		fields := strings.Fields(s[end+1:])
		if len(fields) > 1 && fields[1] == self {
			lines = append(lines, "child "+s[:end+1])
		}
	}
	return lines, nil
}

// mounts names what is mounted where, and of which kind: fields 5 and the last but two of
// proc_pid_mountinfo(5). Tests of other packages run meanwhile and mount as well: what lies in the temporary directory of
// another test is not this one's.
func mounts(test string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	anyTest, thisTest := filepath.Join(os.TempDir(), "Test"), filepath.Join(os.TempDir(), test)
	var lines []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 9 {
			if strings.HasPrefix(f[4], anyTest) && !strings.HasPrefix(f[4], thisTest) {
				continue
			}
			lines = append(lines, "mount "+f[4]+" "+f[len(f)-3])
		}
	}
	return lines, nil
}

func devices() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, l := range links {
		lines = append(lines, "device "+l.Type()+" "+l.Attrs().Name)
	}
	return lines, nil
}

// rules lists the nftables rule set, where this process may and nft is installed.
func rules() ([]string, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	nft, err := exec.LookPath("nft")
	if err != nil {
		return nil, nil
	}
	out, err := exec.Command(nft, "list", "ruleset").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("nft list ruleset: %w: %s", err, out)
	}
	var lines []string
	for line := range strings.Lines(string(out)) {
		lines = append(lines, "nft "+strings.TrimSpace(line))
	}
	return lines, nil
}

func files(dir string) ([]string, error) {
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil
		}
		if err != nil {
			return err
		}
		lines = append(lines, "file "+path+" "+d.Type().String())
		return nil
	})
	return lines, err
}
