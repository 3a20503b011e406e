package tomlfile

import (
	"strings"
	"testing"

	"banger/internal/fault"
)

func TestDecode(t *testing.T) {
	type content struct {
		Name  string `toml:"name"`
		Table struct {
			Number int `toml:"number"`
		} `toml:"table"`
	}
	var c content
	if err := Decode("f", []byte("name = 'x'\n[table]\nnumber = 3\n"), &c); err != nil || c.Name != "x" || c.Table.Number != 3 {
		t.Errorf("%+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"name = 'x'\n\n[table]\nnumbr = 3\n": `dir/f:4: unknown key "table.numbr"`,
		"name = \n":                          "dir/f:1:",
		"[table]\nnumber = 'three'\n":        "dir/f:2:",
		"name = 'x'\nname = 'y'\n":           "dir/f",
		"\xff\xfe":                           "dir/f",
	} {
		err := Decode("dir/f", []byte(text), &content{})
		if fault.KindOf(err) != fault.Usage || !strings.HasPrefix(err.Error(), want) || fault.HintOf(err) == "" {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("a = 1\n[b]\nc = 'd'\n")
	f.Fuzz(func(t *testing.T, text string) {
		var v struct {
			A int               `toml:"a"`
			B map[string]string `toml:"b"`
		}
		if err := Decode("f", []byte(text), &v); err != nil && fault.KindOf(err) != fault.Usage {
			t.Errorf("%v", err)
		}
	})
}

func TestLine(t *testing.T) {
	text := []byte("# image = \"no\"\ncpus = 2\n\n\"image\" = \"x\" # y\n[dns]\nkernel = \"z\"\n")
	for key, want := range map[string]int{"cpus": 2, "image": 4, "kernel": 0, "nothing": 0} {
		if got := Line(text, key); got != want {
			t.Errorf("%s is on line %d, want %d", key, got, want)
		}
	}
	if got := Line([]byte("= no TOML"), "image"); got != 0 {
		t.Errorf("in nonsense: %d", got)
	}
}
