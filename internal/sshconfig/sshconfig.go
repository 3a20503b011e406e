// Package sshconfig lets ssh, scp, rsync, git and editors reach VMs by name without options: a file of banger's own with
// what ssh needs to know, and one Include line for it in the user's ~/.ssh/config, which stays otherwise as it is.
package sshconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"al.essio.dev/pkg/shellescape"
	"github.com/google/renameio/v2"

	"banger/internal/fault"
)

// The block of ours in the user's configuration. It comes first: an Include below a Host line belongs to that host, and
// of two values ssh takes the first (ssh_config(5)).
const (
	blockBegin   = "# banger: the next line lets ssh reach VMs by name; remove it with: banger ssh-config uninstall\n"
	blockCreated = "# banger: this file was made by banger\n"
)

// Config says what VMs are reached with.
type Config struct {
	Program    string // absolute path of banger
	Key        string // private key
	KnownHosts string

	Included string // the file of ours
	User     string // the user's configuration: ~/.ssh/config
}

// Status is what is in place.
type Status struct {
	Installed bool   // ssh reads our file, and it says what it should
	Included  bool   // the user's configuration includes our file
	Current   bool   // our file is there, and as this banger would write it
	Other     string // an Include of another banger's file that is in the way of nothing; empty: none
}

// Text is what our file says. VMs are reached through banger itself, so no resolver needs to know their names.
func (c Config) Text() (string, error) {
	for _, path := range []string{c.Program, c.Key, c.KnownHosts, c.Included} {
		if strings.ContainsAny(path, "\"\n\r\x00") {
			return "", fault.New(fault.Precondition, "the path %q cannot be written into a configuration of ssh", path).
				WithHint("move banger's directories to paths without quotes and line ends (XDG_STATE_HOME, XDG_CONFIG_HOME)")
		}
	}
	if strings.ContainsAny(c.Included, "*?[%$") { // Include takes patterns, and in newer versions of ssh tokens
		return "", fault.New(fault.Precondition, "the path %q cannot be included by ssh", c.Included).
			WithHint("move banger's state to a path without these characters (XDG_STATE_HOME): * ? [ %% $")
	}
	percent := func(path string) string { return strings.ReplaceAll(path, "%", "%%") } // these options expand tokens
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by banger ssh-config install. Remove it with: banger ssh-config uninstall\n")
	fmt.Fprintf(&b, "Host *.vm\n")
	for _, line := range []string{
		"User root",
		`IdentityFile "` + percent(c.Key) + `"`,
		"IdentitiesOnly yes",
		`UserKnownHostsFile "` + percent(c.KnownHosts) + `"`,
		"GlobalKnownHostsFile none",
		"StrictHostKeyChecking yes",
		"UpdateHostKeys no",
		"ServerAliveInterval 15",
		"ServerAliveCountMax 4",
		"ProxyCommand " + percent(shellescape.Quote(c.Program)) + " internal proxy %n %p",
	} {
		fmt.Fprintf(&b, "    %s\n", line)
	}
	return b.String(), nil
}

func (c Config) include() string { return `Include "` + c.Included + `"` + "\n" }

// Install writes our file and makes the user's configuration include it, and tells whether anything changed.
func (c Config) Install() (changed bool, err error) {
	text, err := c.Text()
	if err != nil {
		return false, err
	}
	if have, err := os.ReadFile(c.Included); err != nil || string(have) != text {
		if err := write(c.Included, []byte(text), 0o600); err != nil {
			return false, err
		}
		changed = true
	}
	user, exists, err := c.read()
	if err != nil {
		return changed, err
	}
	rest, _ := cut(user)
	block := blockBegin + c.include()
	if !exists || bytes.HasPrefix(user, []byte(blockCreated)) {
		block = blockCreated + block
	}
	wanted := append([]byte(block), rest...)
	if bytes.Equal(user, wanted) {
		return changed, nil
	}
	return true, c.writeUser(wanted)
}

// Uninstall takes away what Install added, and tells whether there was anything.
func (c Config) Uninstall() (changed bool, err error) {
	user, exists, err := c.read()
	if err != nil {
		return false, err
	}
	rest, found := cut(user)
	switch {
	case exists && found && len(rest) == 0 && bytes.HasPrefix(user, []byte(blockCreated)):
		if err := os.Remove(c.User); err != nil {
			return false, fault.Wrap(fault.Precondition, err, "cannot remove %s", c.User)
		}
		changed = true
	case found:
		if err := c.writeUser(rest); err != nil {
			return false, err
		}
		changed = true
	}
	err = os.Remove(c.Included)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, fs.ErrNotExist):
		return changed, nil
	}
	return changed, fault.Wrap(fault.Precondition, err, "cannot remove %s", c.Included)
}

// Status tells what is in place. It changes nothing.
func (c Config) Status() (Status, error) {
	text, err := c.Text()
	if err != nil {
		return Status{}, err
	}
	user, _, err := c.read()
	if err != nil {
		return Status{}, err
	}
	var s Status
	have, err := os.ReadFile(c.Included)
	s.Current = err == nil && string(have) == text
	if rest, found := cut(user); found {
		block := string(user[:len(user)-len(rest)])
		s.Included = strings.HasSuffix(block, c.include())
		if !s.Included {
			s.Other = strings.TrimSpace(block[strings.LastIndex(strings.TrimSuffix(block, "\n"), "\n")+1:])
		}
	}
	s.Installed = s.Included && s.Current
	return s, nil
}

// cut takes our block off the front of the user's configuration. What follows is as it was before us.
func cut(user []byte) (rest []byte, found bool) {
	rest, _ = bytes.CutPrefix(user, []byte(blockCreated))
	rest, found = bytes.CutPrefix(rest, []byte(blockBegin))
	if !found {
		return user, false
	}
	line, after, _ := bytes.Cut(rest, []byte("\n"))
	if !bytes.HasPrefix(line, []byte(`Include "`)) { // somebody changed it: only our comment is taken away
		return rest, true
	}
	return after, true
}

// read returns the user's configuration; none is empty.
func (c Config) read() (text []byte, exists bool, err error) {
	text, err = os.ReadFile(c.User)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fault.Wrap(fault.Precondition, err, "cannot read your configuration of ssh")
	}
	return text, true, nil
}

// writeUser replaces the user's configuration. A link is followed: dotfiles are often kept elsewhere.
func (c Config) writeUser(text []byte) error {
	path, mode := c.User, fs.FileMode(0o600)
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	} else if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return fault.New(fault.Precondition, "%s is a link to nowhere", c.User).WithHint("mend or remove it")
	}
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	return write(path, text, mode)
}

func write(path string, text []byte, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot make the directory of %s", path)
	}
	if err := renameio.WriteFile(path, text, mode, renameio.IgnoreUmask()); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write %s", path)
	}
	return nil
}
