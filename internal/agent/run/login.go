package run

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"banger/internal/agent/serve"
)

const (
	rootPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	userPath = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
)

// account is a line of /etc/passwd with the user's groups.
type account struct {
	name, home, shell string
	uid, gid          uint32
	groups            []uint32
}

// command prepares p: who runs it, where, in which environment.
func (r Runner) command(p serve.Program) (*exec.Cmd, error) {
	a, err := r.account(p.User)
	if err != nil {
		return nil, err
	}
	env := append(r.loginEnv(a, p.Terminal != nil), p.Env...)
	argv := p.Argv
	arg0 := ""
	if len(argv) == 0 {
		argv = []string{a.shell}
		arg0 = "-" + filepath.Base(a.shell) // makes it a login shell
	}
	path, err := look(argv[0], env)
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{Path: path, Args: slices.Clone(argv), Env: env, SysProcAttr: &syscall.SysProcAttr{}}
	if arg0 != "" {
		cmd.Args[0] = arg0
	}
	if cmd.Dir, err = directory(p.Dir, a); err != nil {
		return nil, err
	}
	if int(a.uid) != os.Getuid() || int(a.gid) != os.Getgid() {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid, Groups: a.groups}
	}
	return cmd, nil
}

// directory is where the program starts: dir, or the user's home, or / when there is no home.
func directory(dir string, a account) (string, error) {
	if dir == "" {
		if info, err := os.Stat(a.home); err != nil || !info.IsDir() {
			return "/", nil
		}
		return a.home, nil
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(a.home, dir)
	}
	info, err := os.Stat(dir)
	if err != nil {
		// Not the program is missing: say 126, not 127.
		return "", fmt.Errorf("cannot change to %s: %s", dir, err)
	}
	if !info.IsDir() {
		return "", fmt.Errorf("cannot change to %s: not a directory", dir)
	}
	return dir, nil
}

// look finds a program in the PATH of env, as execvp does.
func look(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := ""
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	found := ""
	for _, dir := range filepath.SplitList(path) {
		f := filepath.Join(dir, name)
		info, err := os.Stat(f)
		if err != nil || info.IsDir() {
			continue
		}
		if info.Mode()&0o111 != 0 {
			return f, nil
		}
		found = f
	}
	if found != "" {
		return found, nil // starting it will say why not
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// loginEnv is the environment a login of a would have.
func (r Runner) loginEnv(a account, terminal bool) []string {
	path := userPath
	if a.uid == 0 {
		path = rootPath
	}
	env := []string{"PATH=" + path, "LANG=C.UTF-8"}
	env = append(env, r.assignments("etc/default/locale")...)
	env = append(env, r.assignments("etc/locale.conf")...)
	env = append(env, r.assignments("etc/environment")...)
	env = append(env, "HOME="+a.home, "USER="+a.name, "LOGNAME="+a.name, "SHELL="+a.shell)
	if terminal {
		env = append(env, "TERM=xterm-256color")
	}
	return env
}

// assignments reads lines NAME=value, the value perhaps quoted. A missing file has none.
func (r Runner) assignments(name string) []string {
	var out []string
	for _, line := range r.lines(name) {
		line = strings.TrimPrefix(strings.TrimSpace(line), "export ")
		key, value, ok := strings.Cut(line, "=")
		if !ok || key == "" || strings.HasPrefix(key, "#") || strings.ContainsAny(key, " \t") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		out = append(out, key+"="+value)
	}
	return out
}

// Account returns the home directory and the shell of a user, as a login has them.
func (r Runner) Account(user string) (home, shell string, err error) {
	a, err := r.account(user)
	return a.home, a.shell, err
}

// account finds a user by name or number. Root exists even in an image without /etc/passwd, and so does
// every number.
func (r Runner) account(user string) (account, error) {
	if user == "" {
		user = "root"
	}
	for _, line := range r.lines("etc/passwd") {
		f := strings.Split(line, ":")
		if len(f) < 7 || (f[0] != user && f[2] != user) {
			continue
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		a := account{name: f[0], home: f[5], shell: f[6], uid: uint32(uid), gid: uint32(gid)}
		a.groups = r.groups(a)
		return a.complete(), nil
	}
	if user == "root" || user == "0" {
		return account{name: "root", home: "/root"}.complete(), nil
	}
	if n, err := strconv.ParseUint(user, 10, 32); err == nil {
		return account{name: user, home: "/", uid: uint32(n), gid: uint32(n)}.complete(), nil
	}
	return account{}, fmt.Errorf("no user named %q in the guest", user)
}

func (a account) complete() account {
	if a.shell == "" {
		a.shell = "/bin/sh"
	}
	if a.home == "" {
		a.home = "/"
	}
	return a
}

// groups lists the supplementary groups of a, its own first.
func (r Runner) groups(a account) []uint32 {
	out := []uint32{a.gid}
	for _, line := range r.lines("etc/group") {
		f := strings.Split(line, ":")
		if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), a.name) {
			continue
		}
		if gid, err := strconv.ParseUint(f[2], 10, 32); err == nil && uint32(gid) != a.gid {
			out = append(out, uint32(gid))
		}
	}
	return out
}

// lines reads a small text file below the root; none when it cannot be read.
func (r Runner) lines(name string) []string {
	f, err := os.Open(filepath.Join(r.Root, name))
	if err != nil {
		return nil
	}
	defer f.Close()
	var out []string
	for s := bufio.NewScanner(f); s.Scan(); {
		out = append(out, s.Text())
	}
	return out
}
