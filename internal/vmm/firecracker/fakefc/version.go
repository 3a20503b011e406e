package fakefc

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// version is that of a release: major, minor and patch.
type version [3]int

// parseVersion reads X.Y.Z or X.Y; what follows a '-' or '+' does not count.
func parseVersion(text string) (version, error) {
	var v version
	plain, _, _ := strings.Cut(text, "-")
	plain, _, _ = strings.Cut(plain, "+")
	parts := strings.Split(plain, ".")
	if len(parts) < 2 || len(parts) > 3 {
		return v, fmt.Errorf("%q is no version", text)
	}
	for i, p := range parts {
		n, err := strconv.Atoi(p)
		if err != nil || n < 0 {
			return v, fmt.Errorf("%q is no version", text)
		}
		v[i] = n
	}
	return v, nil
}

// since is a version in a struct tag; a mistake in it is one of this program.
func since(text string) version {
	v, err := parseVersion(text)
	if err != nil {
		panic(err)
	}
	return v
}

func (v version) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

func (v version) atLeast(w version) bool {
	return cmp.Or(cmp.Compare(v[0], w[0]), cmp.Compare(v[1], w[1]), cmp.Compare(v[2], w[2])) >= 0
}

// format is the version of a release's snapshot files.
func (v version) format() string {
	for _, f := range []struct{ since, format string }{
		{"1.17", "11.0.0"},
		{"1.16", "10.0.0"},
		{"1.15", "9.0.0"},
		{"1.13", "8.0.0"},
		{"1.12", "6.0.0"},
		{"1.11", "5.0.0"},
		{"1.9", "3.0.0"},
		{"1.8", "2.0.0"},
	} {
		if v.atLeast(since(f.since)) {
			return f.format
		}
	}
	return "1.0.0"
}

// clockRealtime tells whether a load may step the guest's clock: a fix of several branches.
func (v version) clockRealtime() bool {
	return v.atLeast(version{1, 15, 1}) || v[0] == 1 && v[1] == 14 && v[2] >= 4
}
