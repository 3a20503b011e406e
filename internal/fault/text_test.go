package fault

import "testing"

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"plain":                      "plain",
		"über 東京 🙂":                  "über 東京 🙂",
		"two\r\nlines\tand a tab":    "two lines and a tab",
		"\x1b[31mred\x1b[0m\a\x00":   "[31mred[0m",
		"\u009b31mC1, DEL\x7f":       "31mC1, DEL",
		"turned \u202eexe.txt\u2066": "turned exe.txt",
		"no \xff\xfeUTF-8 \xc3":      "no UTF-8 ",
	} {
		if got := Printable(text); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}
